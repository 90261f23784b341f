//! A guest at full blast on every device does not move the host beyond the limits that docs/security.md names.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use api_socket::{ActionType, Console, Request, Serial};
use berth_tests::footprint::Footprint;
use berth_tests::guest::setup::disk_drive;
use berth_tests::guest::{Guest, Setup, blank_disk, limits, program_drive};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Of each part of the flood, in the guest's time. Together they are longer than two periods of the log's limit.
const SECONDS: u64 = 6;

/// What the VMM may grow by: the console's output that waits, and buffers of requests.
const GROWTH_KIB: u64 = 1024;

/// What the log may grow by: ten lines in five seconds from each of a few places.
const LOG_GROWTH: usize = 64 << 10;

/// Of the time that vCPUs use, threads that serve the caller may use this part at most: the flood is not theirs.
const CALLERS_SHARE: u64 = 10;

/// Processor time of a paused guest in [`REST`], in ticks of 10 ms.
const REST_TICKS: u64 = 20;
const REST: Duration = Duration::from_secs(3);

/// A file that the VMM writes to may be so large.
const FILE_BYTES: u64 = 16 << 10;

const BROKEN_DISK: u64 = 64 << 20;

/// What a flood could move.
#[derive(Clone, Copy, Debug)]
struct Host {
    footprint: Footprint,
    descriptors: usize,
    log: usize,
    /// In ticks: all vCPUs, and the threads that serve the caller.
    vcpus: u64,
    callers: u64,
}

fn host(guest: &Guest) -> Host {
    let pid = guest.vmm.pid();
    let footprint = Footprint::beyond_guest(pid, guest.setup().memory_mib).unwrap();
    let of = |is_meant: fn(&str) -> bool| {
        let threads = guest.vmm.thread_ticks();
        threads.iter().filter(|(name, _)| is_meant(name)).map(|(_, ticks)| ticks).sum()
    };
    Host {
        footprint,
        descriptors: fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
        log: guest.vmm.log().len(),
        vcpus: of(|name| name.contains("vcpu")),
        callers: of(|name| matches!(name, "berth-vmm" | "berth-api")),
    }
}

fn fifo(path: &Path) {
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mkfifoat(rustix::fs::CWD, path, mode).unwrap();
}

#[test]
fn a_guest_at_full_blast_on_every_device_moves_nothing_beyond_its_limits() {
    let directory = tempfile::tempdir().unwrap();
    let broken = blank_disk(directory.path().join("broken"), BROKEN_DISK);
    let sound = blank_disk(directory.path().join("sound"), BROKEN_DISK);
    let mut guest = Guest::configured(Setup {
        memory_mib: 256,
        drives: vec![
            program_drive(directory.path(), "berth-attacker"),
            disk_drive("broken", broken.clone()),
            disk_drive("sound", sound),
        ],
        entropy: true,
        // The guest's root may map its devices' registers.
        command_line: "iomem=relaxed".into(),
        ..Setup::default()
    });
    // Nobody reads what the guest says there.
    let unread = directory.path().join("unread");
    fifo(&unread);
    guest.apply(Request::PutConsole(Console {
        output_path: unread,
        input_path: None,
        columns: 80,
        rows: 25,
        ..Console::default()
    }));
    guest.apply(Request::Action(ActionType::InstanceStart));
    guest.console.wait_for("# ", limits::BOOT);
    // What the guest's kernel has to say of it would be one more flood, on the console of this test.
    guest.run("dmesg -n 1");
    guest.take_program("/dev/vda", "berth-attacker");
    // Each read of it fails in the host from now on.
    fs::File::options().write(true).open(&broken).unwrap().set_len(0).unwrap();

    flood(&mut guest, 1);
    let before = host(&guest);
    let work = flood(&mut guest, SECONDS);
    let after = host(&guest);
    println!("{work}\n{before:?}\n{after:?}");

    assert!(after.footprint.rss_kib <= before.footprint.rss_kib + GROWTH_KIB, "{before:?} {after:?}");
    assert_eq!(after.descriptors, before.descriptors);
    assert!(after.log <= before.log + LOG_GROWTH, "{before:?} {after:?}");
    let (vcpus, callers) = (after.vcpus - before.vcpus, after.callers - before.callers);
    assert!(callers * CALLERS_SHARE <= vcpus, "{callers} ticks for the callers, {vcpus} for vCPUs");
    assert!(guest.api.instance_info().is_ok(), "the API is not held up");

    // What was begun ends: a guest that is paused in the middle of it costs nothing.
    guest.run("berth-attacker blast seconds=60 > /dev/null & yes > /dev/hvc0 &");
    guest.pause();
    let before = guest.vmm.cpu_ticks();
    thread::sleep(REST);
    let used = guest.vmm.cpu_ticks() - before;
    assert!(used <= REST_TICKS, "{used} ticks while paused");
}

/// Registers alone, which are then at their fastest, and everything at once; gives what the guest says that it did.
fn flood(guest: &mut Guest, seconds: u64) -> String {
    let limit = limits::COMMAND + Duration::from_secs(seconds * 10);
    let blast = format!("berth-attacker blast seconds={seconds}");
    let mut said = guest.run_within(&blast, limit);
    for load in [
        "while :; do dd if=/dev/vdb of=/dev/null bs=64k iflag=direct; done",
        "while :; do dd if=/dev/zero of=/dev/vdc bs=1M oflag=direct; done",
        "cat /dev/hwrng > /dev/null",
        "yes > /dev/hvc0",
    ] {
        guest.run(&format!("({load}) > /dev/null 2>&1 &"));
    }
    said += &guest.run_within(&blast, limit);
    guest.run("kill $(jobs -p); killall yes cat dd 2> /dev/null; true");
    let counts = said.split_whitespace().filter(|word| word.contains('='));
    counts.collect::<Vec<_>>().join(" ")
}

#[test]
fn a_file_at_its_size_limit_takes_no_more_and_the_guest_goes_on() {
    let mut setup = Setup {
        command_line: r#"berth.run="yes flood | head -c 30000""#.into(),
        arguments: ["--metrics-path", "metrics"].map(String::from).into(),
        ..Setup::default()
    };
    setup.entropy = true;
    let all = getrlimit(Resource::Fsize);
    let least = Rlimit { current: Some(FILE_BYTES), maximum: Some(FILE_BYTES) };
    setrlimit(Resource::Fsize, least).unwrap();
    let mut guest = Guest::configured(setup);
    // The test itself is root, which may take it back.
    setrlimit(Resource::Fsize, all).unwrap();
    let path = guest.path("serial.log");
    guest.apply(Request::PutSerial(Serial { serial_out_path: Some(path.clone()), ..Serial::default() }));
    guest.apply(Request::Action(ActionType::InstanceStart));
    assert_eq!(guest.vmm.ended(limits::BOOT), berth_tests::guest::Ended::Code(0));
    assert_eq!(fs::metadata(path).unwrap().len(), FILE_BYTES);
}
