//! A change of a guest: what was wished is checked as a whole, then done step by step, each of which is written down.
//!
//! While the guest runs: its limits, its memory by balloon and by what is plugged in, its disks. The rest waits for its next
//! start.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use api_socket::fleet::{Disk, GuestUpdate, Limits, MAX_DISKS};
use api_socket::{ClientError, Fault};
use rustix::fs::{AtFlags, CWD, OFlags, linkat, unlinkat};

use crate::cell::{self, Places};
use crate::fleet::Fleet;
use crate::guest::Guest;
use crate::images::disk_fault;
use crate::operations::vmm_fault;
use crate::record::{BLOCK_MIB, Record};
use crate::spawn::{self, USUAL_WEIGHT, disk_file};
use crate::state::State;
use crate::vmm_api;

/// How long a guest may take to let go of a disk.
const LET_GO: Duration = Duration::from_secs(10);
/// Between two looks whether it has.
const LET_GO_PAUSE: Duration = Duration::from_millis(20);

/// A change under way: of one run of a guest, or of its time between two.
struct Change<'a> {
    fleet: &'a Fleet,
    guest: &'a Guest,
    is_live: bool,
    /// How often the guest had ended when the change was checked.
    ends: u64,
}

impl Fleet {
    /// Changes what can be changed now, and writes down the rest.
    ///
    /// # Errors
    /// 409 for what this guest or host cannot have, and nothing is changed. The VMM, the kernel or the disk refuses, or the guest starts or
    /// ends meanwhile: what was done before that stays.
    pub fn update(&self, guest: &Guest, update: GuestUpdate) -> Result<(), Fault> {
        let _claim = guest.claim("being changed")?;
        let (before, ends) = {
            let inner = guest.lock();
            inner.check_made(&guest.name)?;
            (inner.record.clone(), inner.ends)
        };
        let refused = |why: String| Fault {
            status: 409,
            message: format!("Guest {}: {why}. Nothing is changed.", guest.name),
        };
        let is_live = check(&before, &update).map_err(refused)?;
        if is_live && !update.add_disks.is_empty() {
            let why = "its cell takes no disk while it runs";
            let directory = self.store.directory(&guest.id);
            takes_links(&guest.places, &directory)
                .map_err(|error| refused(format!("{why} ({error}): stop it first")))?;
        }
        let settings = match update.limits.filter(|_| is_live) {
            Some(limits) => group_settings(guest, &before.limits, limits).map_err(refused)?,
            None => Vec::new(),
        };
        let change = Change { fleet: self, guest, is_live, ends };

        if let Some(limits) = update.limits {
            set_limits(guest, &settings)?;
            change.note(false, |record| record.limits = limits)?;
        }
        if let Some(memory) = update.memory_mib {
            if is_live {
                set_memory(guest, &before, memory)?;
            }
            change.note(is_live, |record| record.memory_mib = memory)?;
        }
        change.note(false, |record| {
            record.cpus = update.cpus.unwrap_or(record.cpus);
            record.max_memory_mib = update.max_memory_mib.or(record.max_memory_mib);
            record.restart = update.restart.unwrap_or(record.restart);
        })?;
        update.remove_disks.iter().try_for_each(|name| change.remove_disk(name))?;
        update.add_disks.iter().try_for_each(|disk| change.add_disk(disk))
    }
}

impl Change<'_> {
    /// Writes a change down, unless the guest has started or ended since it was checked. What else has happened to it stays.
    /// With `is_so` the disk's refusal changes nothing about it.
    fn note(&self, is_so: bool, change: impl FnOnce(&mut Record)) -> Result<(), Fault> {
        let mut inner = self.guest.lock();
        if inner.ends != self.ends || inner.record.state.has_process() != self.is_live {
            let message = format!(
                "Guest {} has started or ended meanwhile, and the rest of the change was not made: try again.",
                self.guest.name
            );
            return Err(Fault { status: 409, message });
        }
        let mut record = inner.record.clone();
        change(&mut record);
        if record == inner.record {
            return Ok(());
        }
        self.fleet.save(&mut inner, record, is_so)
    }

    /// Written down before the guest has it: a daemon that is killed between the two, and a guest that reboots there, has a disk
    /// that comes with the next start.
    fn add_disk(&self, disk: &Disk) -> Result<(), Fault> {
        let (guest, name) = (self.guest, &disk.name);
        let directory = self.fleet.store.directory(&guest.id);
        let file = directory.join(disk_file(name));
        let no_disk = |error: io::Error| disk_fault(&format!("Disk {name} of guest {}", guest.name), &error);
        make_disk(&directory, disk).map_err(no_disk)?;
        if let Err(fault) = self.note(false, |record| record.disks.push(disk.clone())) {
            let _ = fs::remove_file(&file);
            return Err(fault);
        }
        if !self.is_live {
            return Ok(());
        }
        raise_file_limit(guest, u64::from(disk.size_mib) << 20);
        let fault = match into_cell(&guest.places, guest.uid, &file, name).map_err(no_disk) {
            Ok(path) => match vmm_api::add_disk(&guest.places, name, path) {
                Ok(()) => return Ok(()),
                Err(error @ ClientError::Refused(_)) => vmm_fault(guest, error),
                Err(error) => {
                    let mut fault = vmm_fault(guest, error);
                    fault.message +=
                        &format!(" It may have disk {name} all the same, and has it at its next start.");
                    return Err(fault);
                }
            },
            Err(fault) => fault,
        };
        // Not if it is another run's by now, which has the disk since its start.
        if self.note(true, |record| record.disks.retain(|other| other.name != *name)).is_ok() {
            let _ = out_of_cell(&guest.places, name);
            let _ = fs::remove_file(&file);
        }
        Err(fault)
    }

    /// The guest has it no more when this is written down, and the file goes last.
    fn remove_disk(&self, name: &str) -> Result<(), Fault> {
        let guest = self.guest;
        if self.is_live {
            let_go(guest, name)?;
            match out_of_cell(&guest.places, name) {
                // It came with the start.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => log::warn!("Disk {name} of guest {} stays in its cell: {error}", guest.name),
                Ok(()) => {}
            }
        }
        self.note(true, |record| record.disks.retain(|disk| disk.name != name))?;
        let file = self.fleet.store.directory(&guest.id).join(disk_file(name));
        // Its VMM may have it open, since the start, as long as it runs: what was on it goes now.
        let emptied = File::options().write(true).open(&file).and_then(|open| open.set_len(0));
        match emptied.and_then(|()| fs::remove_file(&file)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(disk_fault(&format!("Disk {name} of guest {} is gone, and its file", guest.name), &error))
            }
            _ => Ok(()),
        }
    }
}

/// Whether the guest runs and is changed as it does; or why it cannot have what was wished.
fn check(record: &Record, update: &GuestUpdate) -> Result<bool, String> {
    let is_live = match record.state {
        State::Running | State::Paused => true,
        State::Stopped | State::Waiting => false,
        state => {
            let state = state.on_the_wire().as_str();
            return Err(format!("It is {state}: try again when that is done"));
        }
    };
    let memory = update.memory_mib.unwrap_or(record.memory_mib);
    let most = update.max_memory_mib.or(record.max_memory_mib);
    if let Some(cpus) = update.cpus.filter(|cpus| is_live && *cpus != record.cpus) {
        return Err(format!("`cpus` is {cpus}, and it runs with {}: stop it first", record.cpus));
    }
    if is_live && most != record.max_memory_mib {
        let most = most.unwrap_or_default();
        return Err(format!(
            "`max_memory_mib` is {most}, which only its next start can give it: stop it first"
        ));
    }
    let first = record.started_memory_mib.filter(|_| is_live);
    let most_now = match first {
        Some(first) => most.unwrap_or(first).max(first),
        None => most.unwrap_or(memory),
    };
    if memory > most_now && (update.memory_mib.is_some() || update.max_memory_mib.is_some()) {
        let stop = if is_live { "stop it first, and " } else { "" };
        return Err(format!(
            "`memory_mib` is {memory}, and {most_now} is the most that it can have: {stop}give it a larger `max_memory_mib`"
        ));
    }

    let mut names: Vec<_> = record.disks.iter().map(|disk| disk.name.as_str()).collect();
    for name in &update.remove_disks {
        let at = names.iter().position(|other| other == name);
        let at = at.ok_or_else(|| {
            format!("`remove_disks` has {name:?}, and its disks are {names:?} beside that of its image")
        })?;
        names.remove(at);
    }
    if is_live && record.state == State::Paused && !update.remove_disks.is_empty() {
        return Err("It is paused and cannot let go of a disk: resume it first".into());
    }
    for Disk { name, .. } in &update.add_disks {
        if names.contains(&name.as_str()) {
            return Err(format!("`add_disks` has {name:?}, which it has already: give another name"));
        }
        names.push(name);
    }
    if names.len() > MAX_DISKS {
        return Err(format!(
            "It would have {} disks beside that of its image: {MAX_DISKS} are the most",
            names.len()
        ));
    }
    Ok(is_live)
}

/// What a file of a guest's control group gets, and what it has.
struct Setting {
    file: &'static str,
    value: String,
    before: String,
}

/// What limits are in files of the group, all of which are there; or why one is not.
fn group_settings(guest: &Guest, before: &Limits, limits: Limits) -> Result<Vec<Setting>, String> {
    // What it has now and is to have no more is as the kernel had it.
    let usual = |before: Option<u32>, now: Option<u32>| now.or(before.map(|_| USUAL_WEIGHT));
    let weights = Limits {
        cpu_weight: usual(before.cpu_weight, limits.cpu_weight),
        io_weight: usual(before.io_weight, limits.io_weight),
        ..limits
    };
    let group = &guest.places.group;
    let setting = |(file, value)| match fs::read_to_string(group.join(file)) {
        // Lines behind the first are of one disk each, and nobody's here.
        Ok(text) => Ok(Setting { file, value, before: text.lines().next().unwrap_or_default().to_owned() }),
        Err(error) => Err(why_without(group, file, &error)),
    };
    spawn::group_limits(&weights, spawn::has_bfq(group)).into_iter().map(setting).collect()
}

/// Why a file of a guest's group cannot be read.
fn why_without(group: &Path, file: &str, error: &io::Error) -> String {
    if error.kind() != io::ErrorKind::NotFound || !group.exists() {
        return format!("{file} of its control group cannot be read: {error}");
    }
    let controller = file.split('.').next().unwrap_or_default();
    let why = if cell::has_controller(group, controller) {
        "this host's kernel does not have it".to_owned()
    } else if cell::has_controller(Path::new(cell::GROUPS), controller) {
        format!(
            "a group above it does not let it have the {controller} controller; the daemon's log says which"
        )
    } else {
        format!("this host has no {controller} controller")
    };
    format!("Its control group has no {file}: {why}")
}

/// All of them, or none.
fn set_limits(guest: &Guest, settings: &[Setting]) -> Result<(), Fault> {
    for (done, setting) in settings.iter().enumerate() {
        if let Err(mut fault) = set_in_group(guest, setting.file, &setting.value) {
            for before in settings.iter().take(done) {
                match set_in_group(guest, before.file, &before.before) {
                    Ok(()) => {}
                    Err(error) => fault.message += &format!(" {}", error.message),
                }
            }
            return Err(fault);
        }
    }
    Ok(())
}

fn set_in_group(guest: &Guest, file: &str, value: &str) -> Result<(), Fault> {
    // It is the kernel's to make. What a file had is gone with it there, and in a test's.
    let open = File::options().write(true).truncate(true).open(guest.places.group.join(file));
    open.and_then(|mut file| file.write_all(value.as_bytes())).map_err(|error| Fault {
        status: 500,
        message: format!("{file} of guest {} cannot become {value:?}: {error}.", guest.name),
    })
}

/// Below what the guest was started with by its balloon, above it by what is plugged in.
fn set_memory(guest: &Guest, record: &Record, memory: u32) -> Result<(), Fault> {
    let first = record.started_memory_mib.unwrap_or(record.memory_mib);
    let refused = |error| vmm_fault(guest, error);
    // It only goes up: a guest gives back in its own time, and would be ended for what it still has.
    let limit = fs::read_to_string(guest.places.group.join("memory.max")).ok();
    let limit: Option<u64> = limit.and_then(|text| text.trim().parse().ok());
    let wanted = spawn::group_memory(memory);
    if limit.is_some_and(|limit| limit < wanted) {
        set_in_group(guest, "memory.max", &wanted.to_string())?;
    }
    vmm_api::set_balloon(&guest.places, first.saturating_sub(memory)).map_err(refused)?;
    if record.room_mib() > 0 {
        let plugged = memory.saturating_sub(first).next_multiple_of(BLOCK_MIB);
        vmm_api::set_plugged(&guest.places, plugged).map_err(refused)?;
    }
    Ok(())
}

/// Makes the file of an empty disk, in place of one that was left.
///
/// # Errors
/// Those of the file system; there is no file then.
pub fn make_disk(directory: &Path, disk: &Disk) -> io::Result<()> {
    let path = directory.join(disk_file(&disk.name));
    let make = || {
        let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        file.set_len(u64::from(disk.size_mib) << 20)
    };
    make().inspect_err(|_| drop(fs::remove_file(&path)))
}

/// So that all of the disk can be written, if it is the largest that the guest has.
fn raise_file_limit(guest: &Guest, bytes: u64) {
    use rustix::process::{Pid, Resource, Rlimit, prlimit};
    let number = guest.lock().held.as_ref().map(|held| held.process.pid);
    let pid = number.and_then(|number| Pid::from_raw(i32::try_from(number).ok()?));
    let (Some(number), Some(pid)) = (number, pid) else { return };
    let text = fs::read_to_string(format!("/proc/{number}/limits")).unwrap_or_default();
    if file_limit(&text).is_some_and(|limit| limit < bytes) {
        let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
        if let Err(error) = prlimit(Some(pid), Resource::Fsize, limit) {
            log::warn!("The largest file of guest {} stays as it is: {error}", guest.name);
        }
    }
}

/// From /proc/PID/limits; `None` where there is no limit.
fn file_limit(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("Max file size"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Whether disks can be put into the cell.
fn takes_links(places: &Places, directory: &Path) -> io::Result<()> {
    let disks = File::from(disks_in_cell(places)?);
    match disks.metadata()?.dev() == directory.metadata()?.dev() {
        true => Ok(()),
        false => Err(io::Error::other("cells and guests are on different file systems")),
    }
}

/// Puts a disk where its VMM can open it, and returns what the VMM calls it.
fn into_cell(places: &Places, uid: u32, file: &Path, name: &str) -> io::Result<PathBuf> {
    // Before the VMM has it: what it is given here is all that it gets of the file.
    chown(file, Some(uid), Some(uid))?;
    let _ = out_of_cell(places, name);
    let name = disk_file(name);
    linkat(CWD, file, disks_in_cell(places)?, &name, AtFlags::empty())?;
    Ok(Path::new("/").join(cell::DISKS).join(name))
}

fn out_of_cell(places: &Places, name: &str) -> io::Result<()> {
    Ok(unlinkat(disks_in_cell(places)?, disk_file(name), AtFlags::empty())?)
}

/// What is in a cell is the VMM's to move about: only the directory that we made is the right one.
fn disks_in_cell(places: &Places) -> io::Result<OwnedFd> {
    let directory = cell::find_in(&places.root, cell::DISKS, OFlags::DIRECTORY)?;
    if directory.metadata()?.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::other("the directory for disks in its cell is not ours"));
    }
    Ok(directory.into())
}

/// Asks the guest to let go of a disk, and waits until it has.
fn let_go(guest: &Guest, name: &str) -> Result<(), Fault> {
    let has = || vmm_api::has_disk(&guest.places, name).map_err(|error| vmm_fault(guest, error));
    // It did not answer before, or was given it by nobody.
    if !has()? {
        return Ok(());
    }
    vmm_api::remove_disk(&guest.places, name).map_err(|error| vmm_fault(guest, error))?;
    let begin = Instant::now();
    while has()? {
        if begin.elapsed() > LET_GO {
            let message = format!(
                "Guest {} does not let go of disk {name} in {} s. Ask again, and it is taken away without asking.",
                guest.name,
                LET_GO.as_secs()
            );
            return Err(Fault { status: 504, message });
        }
        thread::sleep(LET_GO_PAUSE);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::testing::{self, ID};

    /// A guest that runs, whose control group is a directory with these files.
    fn running_in(fleet: &Fleet, group: &Path, files: &[(&str, &str)]) -> Arc<Guest> {
        testing::guest(fleet, ID, |record| record.state = State::Running);
        let record = fleet.by_id(ID).unwrap().lock().record.clone();
        let mut guest = Guest::new(&fleet.config, &fleet.store, record);
        guest.places.group = group.to_owned();
        guest.lock().is_made = true;
        for (file, text) in files {
            fs::write(group.join(file), text).unwrap();
        }
        Arc::new(guest)
    }

    fn limiting(limits: Limits) -> GuestUpdate {
        GuestUpdate { limits: Some(limits), ..GuestUpdate::default() }
    }

    #[test]
    fn limits_that_are_taken_from_a_running_guest_are_the_kernel_s_own_again() {
        let (place, fleet) = testing::fleet();
        let files = ["cpu.max", "cpu.weight", "io.weight", "io.bfq.weight"].map(|file| (file, ""));
        let guest = running_in(&fleet, place.path(), &files);
        let file = |name: &str| fs::read_to_string(place.path().join(name)).unwrap();
        let weight = Limits { cpu_weight: Some(7), io_weight: Some(111), ..Limits::default() };
        for (limits, weights) in [
            (weight, ["7", "default 111", "default 101"]),
            (Limits::default(), ["100", "default 100", "default 100"]),
        ] {
            fleet.update(&guest, limiting(limits)).unwrap();
            assert_eq!(["cpu.weight", "io.weight", "io.bfq.weight"].map(file), weights);
        }
    }

    #[test]
    fn a_running_guest_gets_all_of_its_new_limits_or_none() {
        let (place, fleet) = testing::fleet();
        let guest = running_in(&fleet, place.path(), &[("cpu.max", "max 100000\n"), ("cpu.weight", "100\n")]);
        let file = |name: &str| fs::read_to_string(place.path().join(name));
        let before = guest.lock().record.clone();
        let limits = Limits { cpu_percent: Some(50), cpu_weight: Some(7), io_weight: Some(8) };
        let is_as_before = || {
            let cpu = ["cpu.max", "cpu.weight"].map(|name| file(name).unwrap().trim().to_owned());
            assert_eq!(cpu, ["max 100000", "100"]);
            assert_eq!(guest.lock().record, before);
        };

        // Which of both is the test's host's to say.
        let fault = fleet.update(&guest, limiting(limits)).unwrap_err();
        assert!(fault.status == 409 && fault.message.contains("no io.weight: "), "{fault:?}");
        assert!(fault.message.ends_with("Nothing is changed."), "{fault:?}");
        is_as_before();
        fs::write(place.path().join("cgroup.controllers"), "cpu io").unwrap();
        let fault = fleet.update(&guest, limiting(limits)).unwrap_err();
        assert!(fault.message.contains("io.weight: this host's kernel does not have it"), "{fault:?}");
        assert!(file("io.weight").is_err());

        // It can be read, and nobody can write it.
        std::os::unix::fs::symlink("/proc/version", place.path().join("io.weight")).unwrap();
        let fault = fleet.update(&guest, limiting(limits)).unwrap_err();
        assert!(fault.status == 500 && fault.message.contains("cannot become \"default 8\""), "{fault:?}");
        is_as_before();
        let cpu = Limits { io_weight: None, ..limits };
        fleet.update(&guest, limiting(cpu)).unwrap();
        assert_eq!(file("cpu.max").unwrap(), "50000 100000");
    }

    #[test]
    fn a_guest_that_is_being_made_is_not_changed() {
        let (_place, fleet) = testing::fleet();
        let guest = testing::guest(&fleet, ID, |_| ());
        let update = GuestUpdate { cpus: Some(2), ..GuestUpdate::default() };
        guest.lock().is_made = false;
        assert_eq!(fleet.update(&guest, update.clone()).unwrap_err().status, 409);
        guest.lock().is_made = true;
        fleet.update(&guest, update).unwrap();
        assert_eq!(fleet.store.load().unwrap().records[0].cpus, 2);
    }

    fn disk(name: &str) -> Disk {
        Disk { name: name.into(), size_mib: 3 }
    }

    fn adding(name: &str) -> GuestUpdate {
        GuestUpdate { add_disks: vec![disk(name)], ..GuestUpdate::default() }
    }

    fn removing(name: &str) -> GuestUpdate {
        GuestUpdate { remove_disks: vec![name.into()], ..GuestUpdate::default() }
    }

    #[test]
    fn what_a_guest_cannot_have_is_refused_with_the_reason_and_nothing_is_changed() {
        let (_place, fleet) = testing::fleet();
        let guest = testing::guest(&fleet, ID, |record| record.disks = vec![disk("data")]);
        let cpus = GuestUpdate { cpus: Some(2), ..GuestUpdate::default() };
        let memory = |mib| GuestUpdate { memory_mib: Some(mib), ..GuestUpdate::default() };
        let most = |mib| GuestUpdate { max_memory_mib: Some(mib), ..GuestUpdate::default() };
        let eight = GuestUpdate {
            add_disks: (0..8).map(|number| disk(&format!("d{number}"))).collect(),
            ..GuestUpdate::default()
        };
        let cases = [
            (State::Running, None, cpus.clone(), "`cpus` is 2, and it runs with 1: stop it first"),
            (
                State::Running,
                None,
                memory(513),
                "`memory_mib` is 513, and 512 is the most that it can have: stop it",
            ),
            (State::Paused, Some(1024), memory(1025), "and 1024 is the most"),
            (State::Running, None, most(1024), "`max_memory_mib` is 1024, which only its next start"),
            (State::Stopped, Some(1024), memory(1025), "1024 is the most that it can have: give it a larger"),
            (State::Stopped, None, most(511), "`memory_mib` is 512, and 511 is the most"),
            (State::Starting, None, cpus, "It is starting: try again"),
            (State::Stopped, None, adding("data"), "`add_disks` has \"data\", which it has already"),
            (State::Stopped, None, eight, "It would have 9 disks beside that of its image: 8 are the most"),
            (
                State::Running,
                None,
                removing("old"),
                "`remove_disks` has \"old\", and its disks are [\"data\"]",
            ),
            (State::Paused, None, removing("data"), "resume it first"),
        ];
        for (state, most, update, why) in cases {
            let before = {
                let mut inner = guest.lock();
                let started = matches!(state, State::Running | State::Paused).then_some(512);
                (inner.record.state, inner.record.max_memory_mib) = (state, most);
                inner.record.started_memory_mib = started;
                inner.record.clone()
            };
            let fault = fleet.update(&guest, update).unwrap_err();
            assert!(fault.status == 409 && fault.message.contains(why), "{fault:?}");
            assert_eq!(guest.lock().record, before);
        }
        // In one change a name can become free and be taken.
        let replaced = GuestUpdate { add_disks: vec![disk("data")], ..removing("data") };
        guest.lock().record.state = State::Stopped;
        fleet.update(&guest, replaced).unwrap();
    }

    #[test]
    fn a_disk_of_a_guest_that_does_not_run_is_a_file_until_it_is_removed() {
        let (_place, fleet) = testing::fleet();
        let guest = testing::guest(&fleet, ID, |_| ());
        let file = fleet.store.directory(ID).join("disk-data.img");
        fs::write(&file, "of one that was removed while the daemon was killed").unwrap();
        fleet.update(&guest, adding("data")).unwrap();
        let found = fs::read(&file).unwrap();
        assert!(found.len() == 3 << 20 && found.iter().all(|byte| *byte == 0));
        assert_eq!(fleet.store.load().unwrap().records[0].disks, [disk("data")]);
        fleet.update(&guest, removing("data")).unwrap();
        assert!(!file.exists() && fleet.store.load().unwrap().records[0].disks.is_empty());
    }

    #[test]
    fn a_disk_that_the_vmm_does_not_take_is_not_the_guest_s() {
        let (_place, fleet) = testing::fleet();
        let guest = testing::guest(&fleet, ID, |record| record.state = State::Running);
        // There is no VMM.
        fleet.update(&guest, adding("data")).unwrap_err();
        assert!(
            guest.lock().record.disks.is_empty() && !fleet.store.directory(ID).join("disk-data.img").exists()
        );
    }

    #[test]
    fn the_largest_file_is_read_from_what_the_kernel_says() {
        let text = |limit: &str| {
            format!("Limit  Soft Limit  Hard Limit  Units\nMax file size    {limit}  {limit}  bytes\n")
        };
        assert_eq!(file_limit(&text("1048576")), Some(1 << 20));
        assert_eq!(file_limit(&text("unlimited")), None);
        assert!(fs::read_to_string("/proc/self/limits").unwrap().contains("\nMax file size "));
    }

    #[test]
    fn a_change_of_a_guest_that_has_started_or_ended_meanwhile_is_not_made() {
        let (_place, fleet) = testing::fleet();
        let guest = testing::guest(&fleet, ID, |_| ());
        let change = Change { fleet: &fleet, guest: &guest, is_live: false, ends: 0 };
        change.note(false, |record| record.cpus = 2).unwrap();
        guest.lock().record.state = State::Starting;
        assert_eq!(change.note(false, |record| record.cpus = 3).unwrap_err().status, 409);
        guest.lock().record.state = State::Stopped;
        guest.lock().ends = 1;
        assert_eq!(change.note(false, |record| record.cpus = 3).unwrap_err().status, 409);
        assert_eq!(guest.lock().record.cpus, 2);
    }

    #[test]
    fn a_disk_goes_into_our_directory_of_the_cell_and_nowhere_else() {
        let place = tempfile::tempdir().unwrap();
        let config = crate::config::Config { state_dir: place.path().join("state"), ..Default::default() };
        let places = Places::new(&config, ID);
        let uid = rustix::process::geteuid().as_raw();
        let file = place.path().join("file");
        fs::write(&file, "ours").unwrap();
        let put = || into_cell(&places, uid, &file, "data");
        fs::create_dir_all(places.root.join("disks")).unwrap();
        // What was left there is replaced.
        fs::write(places.root.join("disks/disk-data.img"), "old").unwrap();
        assert_eq!(put().unwrap(), Path::new("/disks/disk-data.img"));
        assert_eq!(fs::read(places.root.join("disks/disk-data.img")).unwrap(), b"ours");
        out_of_cell(&places, "data").unwrap();
        assert!(file.exists() && !places.root.join("disks/disk-data.img").exists());

        let host = place.path().join("host");
        fs::create_dir(&host).unwrap();
        fs::remove_dir(places.root.join("disks")).unwrap();
        std::os::unix::fs::symlink(&host, places.root.join("disks")).unwrap();
        assert!(put().is_err() && fs::read_dir(&host).unwrap().next().is_none());
    }
}
