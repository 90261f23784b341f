//! A start: from a record to a VMM in its cell that answers.
//!
//! The order is that of what can be refused: images first, then what is made. Everything is made below the guest's places, so
//! that a start that fails, or a daemon that is killed in the middle, leaves nothing that [`Places::clear`] does not remove.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use api_socket::fleet::{Limits, Part, ROOT_DISK};
use rustix::fs::{CWD, Mode, OFlags, mknodat};
use rustix::io::Errno;
use rustix::process::{Signal, getppid, set_parent_process_death_signal, setsid};
use serde_json::json;

use crate::cell::{self, Places};
use crate::config::Config;
use crate::images::Images;
use crate::network::Network;
use crate::process::Held;
use crate::record::{BLOCK_MIB, Record, SLOT_MIB};
use crate::vmm_api::VSOCK;

/// What a VMM may use beside the guest's memory, in MiB: itself, tables of pages, and what the host caches of its disk.
const OVERHEAD_MIB: u64 = 128;
/// What a VMM may make a file grow to, at least, in bytes: that of how it ended is one. Else it is the largest of its disks.
const LEAST_FILE: u64 = 1 << 20;
/// Threads of a VMM: one for each processor, and a few.
const MAX_THREADS: u32 = 64;
/// The guest's own address for its sockets. Each VMM has sockets of its own, so it can be the same everywhere.
const CID: u32 = 3;
/// As pipes are opened whose other end is the VMM's. For writing too: without anybody who could write, which a VMM brings about
/// by closing its end, a pipe is always ready, and the loop would never rest.
const READ: OFlags = OFlags::RDWR.union(OFlags::NONBLOCK);
/// Of a control group that nobody gave another weight.
pub const USUAL_WEIGHT: u32 = 100;
/// The weight that the disks' scheduler BFQ goes by.
const BFQ_WEIGHT: &str = "io.bfq.weight";
/// The period in which a share of processors is counted, in microseconds; the kernel's default.
const CPU_PERIOD: u64 = 100_000;

/// What a start makes.
#[derive(Debug)]
pub struct Started {
    pub held: Held,
    /// The guest's console and the VMM's log, to be read from.
    pub console: File,
    pub log: File,
}

/// Makes the process. The caller's thread must live until the VMM answers: the jailer dies with it.
///
/// # Errors
/// A sentence for a person. What was made is in the guest's places.
pub fn spawn(
    config: &Config,
    images: &Images,
    network: &Network,
    places: &Places,
    record: &Record,
    disks: &Path,
) -> Result<Started, String> {
    let image = images.find(&record.image, 0).map_err(|fault| fault.message)?;
    // Its disk is its own.
    let parts = [Part::Kernel, Part::Initrd];
    images.check_whole(&record.image, &image, &parts).map_err(|fault| fault.message)?;
    let initrd = images
        .boot_archive(&record.image)
        .map_err(|error| format!("The guest's initramfs cannot be made: {error}."))?;
    let disks: Vec<_> = record.disk_names().map(|name| (name, disks.join(disk_file(name)))).collect();
    let mut largest = 0;
    for (name, path) in &disks {
        let length = path.metadata().ok().filter(|found| found.is_file()).map(|found| found.len());
        match (length, record.disk_bytes(name)) {
            (None, _) => return Err(format!("The guest's disk {} is gone.", path.display())),
            (Some(now), Some(made)) if now < made => {
                return Err(format!(
                    "The guest's disk {} has {now} bytes and had {made}: its end is missing. Bring back what it was.",
                    path.display()
                ));
            }
            (Some(now), _) => largest = largest.max(now),
        }
    }
    // What an earlier end could not remove.
    places
        .clear(config)
        .map_err(|error| format!("What is left of the guest's last run is in the way: {error}."))?;
    let pipes =
        Pipes::make(places, record.owner).map_err(|error| format!("{}: {error}.", places.run.display()))?;
    let tap = match record.address {
        Some(_) => Some(
            network.tap(&record.id).map_err(|why| format!("The guest's network cannot be made: {why}."))?,
        ),
        None => None,
    };
    let told = command_line(&image.command_line, record, network);
    let settings = configuration(record, &told, tap.is_some());
    write_configuration(places, &settings)
        .map_err(|error| format!("The guest's cell cannot be made: {error}."))?;

    let mut command = Command::new(&config.programs.jailer);
    command
        .args(["--id", &record.id, "--exec-file"])
        .arg(&config.programs.vmm)
        .args(["--uid", &record.uid.to_string(), "--gid", &record.uid.to_string(), "--chroot-base-dir"])
        .arg(cell::cells(config))
        .args(["--cgroup-version", "2", "--parent-cgroup", &config.control_group]);
    // The group is not there yet, and has what the one that it comes to has.
    let with_bfq = has_bfq(places.group.parent().unwrap_or(&places.group));
    for (file, value) in group_settings(record.memory_mib, &record.limits, with_bfq) {
        command.arg("--cgroup").arg(format!("{file}={value}"));
    }
    let mut files = vec![
        ("kernel".to_owned(), images.path(&record.image, Part::Kernel), ":ro"),
        ("initrd".to_owned(), initrd, ":ro"),
    ];
    files.extend(disks.into_iter().map(|(name, path)| (format!("disk-{name}"), path, "")));
    for (name, path, mode) in files {
        let mut value = OsString::from(format!("{name}="));
        value.push(path);
        value.push(mode);
        command.arg("--file").arg(value);
    }
    // Not the host's: what a VMM that was taken over can reach there is nothing.
    let nowhere = network.nowhere().map_err(|error| format!("An empty network cannot be made: {error}."))?;
    command.arg("--netns").arg(format!("/proc/{}/fd/{}", std::process::id(), nowhere.as_raw_fd()));
    command.arg("--resource-limit").arg(format!("fsize={}", largest.max(LEAST_FILE)));
    let tap = tap.map(OwnedFd::from);
    let mut handed: Vec<(&str, &OwnedFd)> =
        vec![("api", &pipes.api), ("log", &pipes.log_out), ("exit", &pipes.exit)];
    handed.extend(tap.iter().map(|tap| ("net", tap)));
    for (name, fd) in &handed {
        command.arg("--fd").arg(format!("{name}={}", fd.as_raw_fd()));
    }
    command
        .args(["--", "--api-sock", "fd:api", "--log-path", "fd:log", "--exit-status", "fd:exit"])
        .args(["--config-file", "/vm.json", "--hot-plug-directory", &format!("/{}", cell::DISKS)])
        .env_clear()
        .stdin(Stdio::from(pipes.console_in))
        .stdout(Stdio::from(pipes.console_out))
        .stderr(Stdio::from(pipes.log_out.try_clone().map_err(|error| error.to_string())?));
    let numbers: Vec<_> = handed.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
    let parent = std::process::id();
    let prepare = move || prepare_child(parent, &numbers);
    // SAFETY: what runs between fork and exec may only do what is safe after a signal in a process with many threads:
    // `prepare_child` makes system calls and allocates nothing.
    unsafe { command.pre_exec(prepare) };
    let child = command
        .spawn()
        .map_err(|error| format!("{} cannot be run: {error}.", config.programs.jailer.display()))?;
    let held = hold(child, Held::of_pid).map_err(|error| format!("The jailer's process: {error}."))?;
    Ok(Started { held, console: pipes.console, log: pipes.log })
}

/// A child that can be watched. One that cannot is ended: it would become a VMM that nobody knows of.
fn hold(mut child: Child, look: impl FnOnce(u32) -> io::Result<Held>) -> io::Result<Held> {
    look(child.id()).inspect_err(|_| {
        // It fails only for one that has ended.
        let _ = child.kill();
        let _ = child.wait();
    })
}

/// In the child, before the jailer.
fn prepare_child(parent: u32, numbers: &[i32]) -> io::Result<()> {
    // Until the jailer has become the VMM's user it dies with the daemon: the kernel forgets this with the change of user.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // A daemon that was killed before this is not heard of.
    if getppid().is_none_or(|now| now.as_raw_pid() != parent as i32) {
        return Err(Errno::SRCH.into());
    }
    // A terminal's Ctrl-C is the daemon's.
    setsid()?;
    for number in numbers {
        // SAFETY: F_SETFD takes a number, open or not, and touches no memory.
        if unsafe { libc::fcntl(*number, libc::F_SETFD, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The guest's ends of its pipes and ours, its API's socket, and the file for how it ended.
struct Pipes {
    api: OwnedFd,
    exit: OwnedFd,
    console_in: OwnedFd,
    console_out: OwnedFd,
    log_out: OwnedFd,
    console: File,
    log: File,
}

impl Pipes {
    fn make(places: &Places, owner: u32) -> io::Result<Pipes> {
        // Others come through to the API's socket, and see no more.
        cell::make_private_directory(&places.run, 0o711)?;
        for name in ["console.in", "console.out", "log"] {
            mknodat(CWD, places.run.join(name), rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
        }
        let api = UnixListener::bind(places.api())?;
        fs::set_permissions(places.api(), Permissions::from_mode(0o600))?;
        chown(places.api(), Some(owner), None)?;
        let exit =
            File::options().read(true).write(true).create_new(true).mode(0o600).open(places.exit_status())?;
        let both = |name| open_pipe(places, name, OFlags::RDWR);
        Ok(Pipes {
            api: api.into(),
            exit: exit.into(),
            console_in: both("console.in")?.into(),
            console_out: both("console.out")?.into(),
            log_out: both("log")?.into(),
            console: console(places)?,
            log: log(places)?,
        })
    }
}

/// What the guest writes to its console, to be read.
///
/// # Errors
/// Those of the file system.
pub fn console(places: &Places) -> io::Result<File> {
    open_pipe(places, "console.out", READ)
}

/// What the VMM has to say, to be read.
///
/// # Errors
/// Those of the file system.
pub fn log(places: &Places) -> io::Result<File> {
    open_pipe(places, "log", READ)
}

/// What the guest reads from its console, to be written.
///
/// # Errors
/// Those of the file system; there is none without a process.
pub fn keyboard(places: &Places) -> io::Result<File> {
    open_pipe(places, "console.in", OFlags::WRONLY | OFlags::NONBLOCK)
}

fn open_pipe(places: &Places, name: &str, flags: OFlags) -> io::Result<File> {
    Ok(rustix::fs::open(places.run.join(name), flags | OFlags::CLOEXEC, Mode::empty())?.into())
}

/// What the guest's kernel is told: the image's, what the guest's maker added, what the agent needs.
fn command_line(image: &str, record: &Record, network: &Network) -> String {
    let own = record.command_line.as_deref().unwrap_or_default();
    let network = record.address.map(|address| network.told(address)).unwrap_or_default();
    let agent = format!("{} berth.hostname={}", agent::initramfs::KERNEL_ARGUMENT, record.name);
    // So that memory which comes is used, and can be given back (docs/memory.md).
    let plugged = if record.room_mib() > 0 { "memhp_default_state=online_movable" } else { "" };
    // What stands behind two hyphens is init's (kernel-parameters).
    let (image, init) = image
        .split_once(" -- ")
        .map_or((image, String::new()), |(image, init)| (image, format!("-- {init}")));
    let parts = [image, own, plugged, &agent, &network, &init];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

fn configuration(record: &Record, told: &str, has_network: bool) -> serde_json::Value {
    let mut settings = json!({
        "boot-source": { "kernel_image_path": "fd:kernel", "initrd_path": "fd:initrd", "boot_args": told },
        "machine-config": { "vcpu_count": record.cpus, "mem_size_mib": record.memory_mib },
        "drives": record.disk_names().map(|name| drive(name, &format!("fd:disk-{name}"))).collect::<Vec<_>>(),
        "vsock": { "guest_cid": CID, "uds_path": format!("/{VSOCK}") },
        "entropy": {},
        // What the guest frees goes back to the host, and what `set` takes can be taken.
        "balloon": { "amount_mib": 0, "deflate_on_oom": true, "free_page_reporting": true },
    });
    if record.room_mib() > 0 {
        settings["memory-hotplug"] = json!({
            "total_size_mib": record.room_mib(), "slot_size_mib": SLOT_MIB, "block_size_mib": BLOCK_MIB,
        });
    }
    if has_network {
        settings["network-interfaces"] =
            json!([{ "iface_id": "net", "host_dev_name": "fd:net", "guest_mac": record.mac() }]);
    }
    settings
}

/// A disk as the guest API has it. The guest sees the name as its serial number.
fn drive(name: &str, path: &str) -> serde_json::Value {
    json!({ "drive_id": name, "is_root_device": false, "path_on_host": path, "cache_type": "Writeback" })
}

/// The file of a disk, in the guest's directory.
pub fn disk_file(name: &str) -> String {
    match name {
        ROOT_DISK => "disk.img".into(),
        name => format!("disk-{name}.img"),
    }
}

/// Into the cell that is to be: the jailer takes what is there. Everyone may read the file, as the VMM's user must; nobody else
/// comes as far.
fn write_configuration(places: &Places, settings: &serde_json::Value) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&places.root)?;
    // Root's: what the VMM finds in there was put there by us.
    cell::make_private_directory(&places.root.join(cell::DISKS), 0o755)?;
    let mut file =
        File::options().write(true).create_new(true).mode(0o444).open(places.root.join("vm.json"))?;
    file.write_all(settings.to_string().as_bytes())
}

/// What a guest with so much memory and its VMM may use, in bytes.
pub fn group_memory(memory_mib: u32) -> u64 {
    (u64::from(memory_mib) + OVERHEAD_MIB) << 20
}

/// Files of a control group and what is written into them: its start's.
fn group_settings(memory_mib: u32, limits: &Limits, with_bfq: bool) -> Vec<(&'static str, String)> {
    let memory = group_memory(memory_mib).to_string();
    let mut settings = vec![("memory.max", memory), ("pids.max", MAX_THREADS.to_string())];
    settings.extend(group_limits(limits, with_bfq));
    settings
}

/// The same, of what can be changed.
pub fn group_limits(limits: &Limits, with_bfq: bool) -> Vec<(&'static str, String)> {
    let cpu = match limits.cpu_percent {
        Some(percent) => format!("{} {CPU_PERIOD}", u64::from(percent) * CPU_PERIOD / 100),
        None => format!("max {CPU_PERIOD}"),
    };
    let mut settings = vec![("cpu.max", cpu)];
    settings.extend(limits.cpu_weight.map(|weight| ("cpu.weight", weight.to_string())));
    // Without it nobody needs the controller, which some hosts lack.
    settings.extend(limits.io_weight.map(|weight| ("io.weight", format!("default {weight}"))));
    let bfq = limits.io_weight.filter(|_| with_bfq);
    settings.extend(bfq.map(|weight| (BFQ_WEIGHT, format!("default {}", bfq_weight(weight)))));
    settings
}

/// Whether the scheduler BFQ is in the kernel, which has a weight of its own: that of `io.weight` is blk-iocost's.
pub fn has_bfq(group: &Path) -> bool {
    group.join(BFQ_WEIGHT).exists()
}

/// A weight in BFQ's numbers, from 1 to 1000 with 100 in the same place: as systemd has it.
fn bfq_weight(weight: u32) -> u32 {
    match weight.checked_sub(USUAL_WEIGHT) {
        None => weight,
        Some(above) => USUAL_WEIGHT + above * (1000 - USUAL_WEIGHT) / (10_000 - USUAL_WEIGHT),
    }
}

#[cfg(test)]
mod tests {
    use api_socket::fleet::{Disk, NewGuest};

    use super::*;
    use crate::config;

    fn record(address: bool) -> Record {
        let address = address.then(|| [10, 87, 0, 2].into());
        let new = NewGuest { command_line: Some("quiet".into()), ..NewGuest::of("debian") };
        Record::new("0123456789ab".into(), "web".into(), 1000, 70_000, address, 1.5, new)
    }

    #[test]
    fn a_kernel_is_told_the_image_s_the_guest_s_and_the_agent_s() {
        let dns = vec![[10, 0, 0, 2].into()];
        let network = Network::new(config::Network { dns, ..config::Network::default() });
        assert_eq!(
            command_line("console=ttyS0", &record(true), &network),
            "console=ttyS0 quiet rdinit=/berth/init berth.hostname=web \
             berth.address=10.87.0.2/16 berth.gateway=10.87.0.1 berth.dns=10.0.0.2"
        );
        let mut grows = record(false);
        grows.max_memory_mib = Some(1024);
        assert_eq!(
            command_line("", &grows, &network),
            "quiet memhp_default_state=online_movable rdinit=/berth/init berth.hostname=web"
        );
        assert_eq!(
            command_line("quiet -- single", &record(false), &Network::new(config::Network::default())),
            "quiet quiet rdinit=/berth/init berth.hostname=web -- single"
        );
        assert_eq!(command_line("", &record(false), &network), "quiet rdinit=/berth/init berth.hostname=web");
    }

    #[test]
    fn what_the_vmm_is_told_is_what_its_api_takes() {
        for (has_network, most) in [(false, None), (true, Some(1025))] {
            let mut record = record(has_network);
            record.max_memory_mib = most;
            record.disks = vec![Disk { name: "data".into(), size_mib: 1 }];
            let settings = configuration(&record, "quiet", has_network);
            let place = tempfile::tempdir().unwrap();
            let path = place.path().join("vm.json");
            fs::write(&path, settings.to_string()).unwrap();
            let requests = api_socket::config_file::read(&path).unwrap();
            assert_eq!(requests.len(), if has_network { 9 } else { 7 });
            let room = settings["memory-hotplug"]["total_size_mib"].as_u64();
            assert_eq!(room, most.map(|_| 640));
        }
    }

    #[test]
    fn a_vmm_that_closes_its_ends_does_not_keep_the_loop_awake() {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        let config = Config { run_dir: path("run"), state_dir: path("state"), ..Config::default() };
        let places = Places::new(&config, "0123456789ab");
        fs::create_dir_all(&places.state).unwrap();
        let Pipes { console_in, console_out, log_out, console, log, .. } =
            Pipes::make(&places, rustix::process::getuid().as_raw()).unwrap();
        drop((console_in, console_out, log_out));
        for pipe in [console, log] {
            let mut fds = [rustix::event::PollFd::new(&pipe, rustix::event::PollFlags::IN)];
            assert_eq!(rustix::event::poll(&mut fds, Some(&Default::default())).unwrap(), 0);
        }
    }

    #[test]
    fn a_child_that_cannot_be_watched_is_ended_and_one_whose_daemon_is_gone_does_not_begin() {
        let child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        assert!(hold(child, |_| Err(Errno::MFILE.into())).is_err());
        assert!(Held::of_pid(pid).is_err());

        let run = |parent| {
            let mut command = Command::new("true");
            // SAFETY: as in `spawn`.
            unsafe { command.pre_exec(move || prepare_child(parent, &[])) };
            command.status()
        };
        assert!(run(std::process::id()).unwrap().success());
        assert!(run(1).is_err());
    }

    #[test]
    fn a_cell_that_is_to_be_is_not_for_others_to_look_into() {
        let place = tempfile::tempdir().unwrap();
        let config = Config { state_dir: place.path().into(), ..Config::default() };
        let places = Places::new(&config, "0123456789ab");
        write_configuration(&places, &json!({})).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        for directory in places.root.ancestors().take(3) {
            assert_eq!(mode(directory), 0o700, "{}", directory.display());
        }
        assert_eq!(mode(&places.root.join("vm.json")), 0o444);
    }

    #[test]
    fn a_group_gets_the_memory_of_the_guest_and_of_its_vmm_and_the_share_that_was_asked_for() {
        let limits = Limits { cpu_percent: Some(150), cpu_weight: None, io_weight: Some(10) };
        let settings = group_settings(512, &limits, false);
        assert!(settings.contains(&("memory.max", ((512 + OVERHEAD_MIB) << 20).to_string())));
        assert!(settings.contains(&("cpu.max", "150000 100000".into())));
        assert!(settings.contains(&("io.weight", "default 10".into())));
        assert!(!settings.iter().any(|(file, _)| *file == BFQ_WEIGHT));
        assert!(group_settings(512, &limits, true).contains(&(BFQ_WEIGHT, "default 10".into())));
        let without = group_settings(512, &Limits::default(), true);
        assert!(without.contains(&("cpu.max", "max 100000".into())));
        assert!(!without.iter().any(|(file, _)| file.starts_with("io.")));
    }

    #[test]
    fn a_weight_of_disks_has_its_place_among_those_of_bfq() {
        for (weight, bfq) in [(1, 1), (99, 99), (100, 100), (111, 101), (5050, 550), (10_000, 1000)] {
            assert_eq!(bfq_weight(weight), bfq);
        }
    }
}
