//! The daemon's start: what is written down meets what is there. A guest that runs is taken on as it is; one whose process is
//! gone has ended; nothing that belongs to nobody stays.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api_socket::fleet::{DEFAULT_STOP_SECONDS, MAX_STOP_SECONDS, Outcome, Restart};

use crate::cell::Places;
use crate::events::now;
use crate::fleet::Fleet;
use crate::guest::Guest;
use crate::process::{self, Held};
use crate::record::Record;
use crate::spawn;
use crate::state::{Event, State};
use crate::store::{self, Claimed};

/// Takes on everything. Before the first client is heard.
///
/// # Errors
/// The records cannot be listed.
pub fn all(fleet: &Arc<Fleet>) -> std::io::Result<()> {
    fleet.tidy();
    let found = fleet.store.load()?;
    for path in found.unfinished {
        if let Err(error) = fs::remove_dir_all(&path) {
            log::warn!("{} is half a guest and cannot be removed: {error}", path.display());
        }
    }
    for (path, why) in &found.broken {
        log::error!("{} is no record of a guest and is left alone: {why}", path.display());
    }
    let running = found.broken.iter().flat_map(|(path, _)| users_of(fleet, path));
    fleet.set_claimed(found.claimed.iter().cloned().chain(running).collect());
    let boot_id = process::boot_id()?;
    let mut works = Vec::new();
    for record in found.records {
        let guest = Arc::new(Guest::new(&fleet.config, &fleet.store, record.clone()));
        guest.lock().is_made = true;
        fleet.insert(guest.clone());
        works.push((guest, record));
    }
    // When all are there: a start by policy must not be given what another has.
    for (guest, record) in works {
        take(fleet, &guest, &record, &boot_id);
    }
    remove_strays(fleet);
    ask_all(fleet)
}

/// Of a guest that runs and whose record says nothing at all: its VMM's user.
fn users_of(fleet: &Fleet, record: &Path) -> Vec<Claimed> {
    let id = record.parent().and_then(|directory| directory.file_name()?.to_str()).unwrap_or_default();
    let processes = Places::new(&fleet.config, id).processes();
    let users = processes.iter().filter_map(|pid| fs::metadata(format!("/proc/{pid}")).ok());
    users.map(|process| Claimed { uid: Some(process.uid()), ..Claimed::default() }).collect()
}

/// What only a VMM knows: the last daemon may have been killed between asking for something and writing it down. On a thread of
/// its own, as some may not answer; nobody waits for it.
fn ask_all(fleet: &Arc<Fleet>) -> std::io::Result<()> {
    let fleet = fleet.clone();
    let ask = move || {
        for guest in fleet.list(0) {
            match guest.state() {
                State::Running | State::Paused => fleet.look_whether_paused(&guest),
                _ => {}
            }
        }
    };
    std::thread::Builder::new().name("asks all".into()).spawn(ask).map(|_| ())
}

fn take(fleet: &Arc<Fleet>, guest: &Arc<Guest>, record: &Record, boot_id: &str) {
    match record.state {
        State::Stopped => {}
        // The disk was full when it was started again.
        State::Waiting if let Some(held) = find(guest, record, boot_id) => {
            let _ = fleet.apply(guest, Event::Due);
            take_on(fleet, guest, State::StartingAgain, held);
        }
        State::Waiting => {
            // The clock may have been set meanwhile; no wait is longer than it was.
            let left = record.restart_at.map_or(0.0, |at| at - crate::events::now()).clamp(0.0, 60.0);
            let due = Instant::now() + Duration::from_secs_f64(left);
            guest.lock().due = Some(due);
            fleet.watch.time(&guest.id, Some(due));
        }
        state => match find(guest, record, boot_id) {
            Some(held) => take_on(fleet, guest, state, held),
            // It was not asked for and nobody has heard of it: a reboot is not lost with the jailer, which dies with its daemon.
            None if state == State::StartingAgain && is_of_this_boot(record, boot_id) => {
                fleet.start_aside(guest, Fleet::start);
            }
            None => was_lost(fleet, guest, record, boot_id),
        },
    }
}

/// The host has not gone down since its last run began, as far as that is known.
fn is_of_this_boot(record: &Record, boot_id: &str) -> bool {
    record.boot_id.as_deref().is_none_or(|of| of == boot_id)
}

/// The guest's process: the one that is written down, or, when the daemon was killed before it wrote it down or could not, the
/// one in the guest's group. One that is in neither was still the jailer's, and died with the daemon.
fn find(guest: &Guest, record: &Record, boot_id: &str) -> Option<Held> {
    let written = record.process.as_ref().and_then(Held::of_record);
    let written = written.filter(|held| held.process.boot_id == boot_id);
    written.or_else(|| guest.places.processes().into_iter().find_map(|pid| Held::of_pid(pid).ok()))
}

fn take_on(fleet: &Arc<Fleet>, guest: &Arc<Guest>, state: State, held: Held) {
    let held = Arc::new(held);
    match (spawn::console(&guest.places), spawn::log(&guest.places)) {
        (Ok(console), Ok(log)) => {
            guest.console.connect(console);
            guest.log.connect(log);
        }
        (Err(error), _) | (_, Err(error)) => {
            log::warn!("Guest {} runs, and its console is lost: {error}", guest.name);
        }
    }
    {
        let mut inner = guest.lock();
        let mut record = inner.record.clone();
        if record.process.replace(held.process.clone()).as_ref() != Some(&held.process) {
            record.started_at = Some(now());
        }
        record.started_memory_mib.get_or_insert(record.memory_mib);
        inner.held = Some(held.clone());
        inner.started = Some(Instant::now());
        if record != inner.record {
            let _ = fleet.save(&mut inner, record, true);
        }
    }
    fleet.watch_guest(guest, &held);
    match state {
        State::Starting | State::StartingAgain => {
            fleet.start_aside(guest, move |fleet, guest| fleet.wait_for_answer(guest, &held));
        }
        State::Stopping => {
            let stop_at = {
                let mut inner = guest.lock();
                // Its power button may have been pressed: a second press would end it at once.
                inner.is_asked = true;
                inner.record.stop_at
            };
            let now = process::since_boot().as_secs_f64();
            let left = stop_at.map_or(f64::from(DEFAULT_STOP_SECONDS), |at| at - now);
            let left = Duration::from_secs_f64(left.clamp(0.0, f64::from(MAX_STOP_SECONDS)));
            let ends = guest.lock().ends;
            fleet.ask_until(guest, ends, left);
        }
        State::Removing => {
            if let Ok(action) = fleet.apply(guest, Event::Kill) {
                fleet.see_to(guest, action);
            }
        }
        _ => {}
    }
}

/// Its process has ended while nobody watched, or the whole host has.
fn was_lost(fleet: &Arc<Fleet>, guest: &Arc<Guest>, record: &Record, boot_id: &str) {
    let has_rebooted = match &record.process {
        Some(process) => process.boot_id != boot_id,
        None => record.state == State::StartingAgain && !is_of_this_boot(record, boot_id),
    };
    let (outcome, reason) = match has_rebooted {
        true => (Outcome::Lost, "the host went down while it ran".to_owned()),
        false => crate::operations::ended_unseen(guest),
    };
    if has_rebooted && record.restart == Restart::Always {
        log::info!("Guest {} is started again after the host", guest.name);
    }
    let (fleet, guest) = (fleet.clone(), guest.clone());
    fleet.clone().ends.put(move || fleet.clear_after(&guest, outcome, reason));
}

/// Cells, groups and sockets of no guest: of one that was removed while the daemon was killed. What runs in a group of ours without
/// a cell of ours is another daemon's, which has been given the same names for groups; a cell is made first and goes last.
fn remove_strays(fleet: &Arc<Fleet>) {
    let config = &fleet.config;
    let program = config.programs.vmm.file_name().unwrap_or_default();
    let places = [
        config.run_dir.join("guests"),
        crate::cell::cells(config).join(program),
        Path::new("/sys/fs/cgroup").join(&config.control_group),
    ];
    for directory in places {
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.path().is_dir()) {
            let name = entry.file_name();
            let Some(id) = name.to_str().filter(|name| store::is_id(name)) else { continue };
            if fleet.by_id(id).is_some() || has_broken_record(fleet, id) {
                continue;
            }
            let places = Places::new(config, id);
            if !places.root.exists() && !places.processes().is_empty() {
                let (group, cells) = (entry.path(), crate::cell::cells(config));
                log::warn!(
                    "{} has processes and no cell below {}: another's",
                    group.display(),
                    cells.display()
                );
                continue;
            }
            log::warn!("{} belongs to no guest and is removed", entry.path().display());
            if let Err(error) = places.clear(config) {
                log::warn!("{} cannot be removed: {error}", entry.path().display());
            }
        }
    }
}

/// A guest whose record cannot be read may run: it is left alone until a person has looked.
fn has_broken_record(fleet: &Fleet, id: &str) -> bool {
    fleet.store.directory(id).exists()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, ID};

    #[test]
    fn a_process_that_could_not_be_written_down_is_found_in_its_guest_s_group() {
        let (place, fleet) = testing::fleet();
        let (mut before, old) = testing::process();
        before.kill().unwrap();
        before.wait().unwrap();
        let (mut child, held) = testing::process();
        let guest = testing::guest(&fleet, ID, |record| record.process = Some(old.process.clone()));
        let record = guest.lock().record.clone();
        let mut guest = Guest::new(&fleet.config, &fleet.store, record.clone());
        guest.places.group = place.path().join("group");
        let boot_id = process::boot_id().unwrap();
        assert!(find(&guest, &record, &boot_id).is_none());
        fs::create_dir(&guest.places.group).unwrap();
        fs::write(guest.places.group.join("cgroup.procs"), format!("{}\n", child.id())).unwrap();
        assert_eq!(find(&guest, &record, &boot_id).unwrap().process, held.process);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn what_an_earlier_run_was_started_with_is_not_this_run_s() {
        let (_place, fleet) = testing::fleet();
        let guest = testing::guest(&fleet, ID, |record| {
            (record.memory_mib, record.started_memory_mib) = (1024, Some(512));
        });
        fleet.apply(&guest, Event::Start).unwrap();
        // Here the daemon is killed; its successor finds a process.
        let (mut child, _) = testing::process();
        take_on(&fleet, &guest, State::Running, Held::of_pid(child.id()).unwrap());
        assert_eq!(guest.lock().record.started_memory_mib, Some(1024));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_guest_that_was_asked_to_go_down_is_not_asked_twice_by_its_power_button() {
        let (_place, fleet) = testing::fleet();
        let guest = testing::guest(&fleet, ID, |record| record.state = State::Stopping);
        let (mut child, _) = testing::process();
        take_on(&fleet, &guest, State::Stopping, Held::of_pid(child.id()).unwrap());
        assert!(guest.lock().is_asked && guest.lock().overdue.is_some());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
