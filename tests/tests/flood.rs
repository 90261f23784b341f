//! A guest at full blast on every device does not move the host beyond the limits that docs/security.md names.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use api_socket::{ActionType, Balloon, Console, Drive, MmdsConfig, Pmem, Request, Serial};
use berth_tests::footprint::Footprint;
use berth_tests::guest::setup::{VSOCK, disk_drive};
use berth_tests::guest::tap::Tap;
use berth_tests::guest::{Guest, Setup, blank_disk, limits, program_drive};
use berth_tests::host::process;
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

/// All of it is touched before anything is measured: what the VMM has of it is the file's.
const PMEM: u64 = 4 << 20;

/// A port of the host's at which somebody answers and reads nothing.
const DEAF: u32 = 3000;

/// What the guest does beside, in loops of its shell. On the network, somebody else adds to it from outside.
const LOADS: &[&str] = &[
    "while :; do dd if=/dev/vdc of=/dev/null bs=64k iflag=direct; done",
    "while :; do dd if=/dev/zero of=/dev/vdd bs=1M oflag=direct; done",
    "while :; do dd if=/dev/zero of=/dev/pmem0 bs=64k conv=fsync; done",
    "cat /dev/hwrng > /dev/null",
    "yes > /dev/hvc0",
    "while :; do ping -A -s 1400 10.77.50.1; done",
    "while :; do yes GET | head -c 20000 | nc 169.254.169.254 80; done",
    // At a port that nobody has, and at one that takes nothing.
    "while :; do berth-vsock connect 1 true; done",
    "while :; do berth-vsock connect 3000 'timeout 1 cat /dev/zero'; done",
    // Memory that comes and goes, which the balloon's driver reports, and the driver with it.
    "while :; do head -c 40m /dev/zero > /dev/shm/fill; rm /dev/shm/fill; sleep 1; done",
    "while :; do for way in unbind bind; do echo $BALLOON > /sys/bus/virtio/drivers/virtio_balloon/$way; done; done",
];

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

fn host(guest: &Guest, held: &Held) -> Host {
    let pid = guest.vmm.pid();
    let footprint = Footprint::beyond_guest(pid, guest.setup().memory_mib).unwrap();
    let of = |is_meant: fn(&str) -> bool| {
        let threads = guest.vmm.thread_ticks();
        threads.iter().filter(|(name, _)| is_meant(name)).map(|(_, ticks)| ticks).sum()
    };
    Host {
        footprint,
        descriptors: descriptors(guest, held),
        log: guest.vmm.log().len(),
        vcpus: of(|name| name.contains("vcpu")),
        callers: of(|name| matches!(name, "berth-vmm" | "berth-api")),
    }
}

/// Who is held at [`DEAF`].
type Held = Arc<Mutex<Option<UnixStream>>>;

/// When the last connections of the flood have ended on both sides.
fn descriptors(guest: &Guest, held: &Held) -> usize {
    let count = || {
        held.lock().unwrap().take();
        fs::read_dir(format!("/proc/{}/fd", guest.vmm.pid())).unwrap().count()
    };
    let (mut before, mut alike) = (count(), 0);
    while alike < 5 {
        thread::sleep(Duration::from_millis(500));
        let now = count();
        alike = if now == before { alike + 1 } else { 0 };
        before = now;
    }
    before
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
    let tap = Tap::new(50, &[]);
    let pmem = blank_disk(directory.path().join("pmem"), PMEM);
    let mut guest = Guest::configured(Setup {
        memory_mib: 256,
        drives: vec![
            program_drive(directory.path(), "berth-attacker"),
            Drive { drive_id: "sockets".into(), ..program_drive(directory.path(), "berth-vsock") },
            disk_drive("broken", broken.clone()),
            disk_drive("sound", sound),
        ],
        interfaces: vec![tap.interface()],
        pmems: vec![Pmem { id: "pmem".into(), path_on_host: pmem, ..Pmem::default() }],
        balloon: Some(Balloon {
            stats_polling_interval_s: 1,
            free_page_reporting: true,
            ..Balloon::default()
        }),
        vsock: true,
        entropy: true,
        arguments: ["--metrics-path", "metrics"].map(String::from).into(),
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
    let service = MmdsConfig { network_interfaces: vec![tap.name()], ..MmdsConfig::default() };
    guest.apply(Request::PutMmdsConfig(service));
    let deaf = UnixListener::bind(guest.path(&format!("{VSOCK}_{DEAF}"))).unwrap();
    // Whoever comes is let in, and waits for the next one to be let go.
    let held = Held::default();
    let holds = held.clone();
    thread::spawn(move || deaf.incoming().for_each(|caller| *holds.lock().unwrap() = caller.ok()));
    guest.apply(Request::Action(ActionType::InstanceStart));
    guest.console.wait_for("# ", limits::BOOT);
    // What the guest's kernel has to say of it would be one more flood, on the console of this test.
    guest.run("dmesg -n 1");
    guest.take_program("/dev/vda", "berth-attacker");
    guest.take_program("/dev/vdb", "berth-vsock");
    tap.set_up(&mut guest, "eth0", None);
    guest.run("ip route add 169.254.0.0/16 dev eth0; modprobe -a virtio_pmem nd_pmem");
    guest.run(
        "until [ -b /dev/pmem0 ]; do sleep 0.1; done; dd if=/dev/zero of=/dev/pmem0 bs=64k conv=fsync; true",
    );
    guest.run("BALLOON=$(basename /sys/bus/virtio/drivers/virtio_balloon/virtio*)");
    // Each read of it fails in the host from now on.
    fs::File::options().write(true).open(&broken).unwrap().set_len(0).unwrap();

    flood(&mut guest, 1);
    let before = host(&guest, &held);
    let work = flood(&mut guest, SECONDS);
    let after = host(&guest, &held);
    println!("{work}\n{before:?}\n{after:?}");

    assert!(after.footprint.rss_kib <= before.footprint.rss_kib + GROWTH_KIB, "{before:?} {after:?}");
    assert!(after.descriptors <= before.descriptors, "{before:?} {after:?}");
    assert!(after.log <= before.log + LOG_GROWTH, "{before:?} {after:?}");
    let (vcpus, callers) = (after.vcpus - before.vcpus, after.callers - before.callers);
    assert!(callers * CALLERS_SHARE <= vcpus, "{callers} ticks for the callers, {vcpus} for vCPUs");
    assert!(guest.api.instance_info().is_ok(), "the API is not held up");
    for (group, key) in [
        ("block_sound", "write_count"),
        ("block_broken", "execute_fails"),
        ("pmem", "queue_event_count"),
        ("net", "tx_packets_count"),
        ("net", "rx_packets_count"),
        ("mmds", "connections_created"),
        ("vsock", "conns_added"),
        ("balloon", "free_page_report_count"),
        ("entropy", "entropy_bytes"),
    ] {
        let count = guest.metric(group, key);
        println!("{group}.{key} {count}");
        assert!(count > 0, "nothing was flooded: {group}.{key}");
    }

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
    for load in LOADS {
        guest.run(&format!("({load}) > /dev/null 2>&1 &"));
    }
    let mut ping = Command::new("ping");
    ping.args(["-f", "-s", "1400", "10.77.50.2"]).stdout(Stdio::null());
    let mut ping = process::spawn_bound(&mut ping, Vec::new()).unwrap();
    said += &guest.run_within(&blast, limit);
    // On a slow host a program may not have had its turn yet.
    while guest.metric("vsock", "conns_added") == 0 || guest.metric("mmds", "connections_created") == 0 {
        guest.run_within("sleep 1", limit);
    }
    process::kill(&mut ping);
    guest.run("kill $(jobs -p); killall yes cat dd nc ping head timeout berth-vsock 2> /dev/null; true");
    guest.run("echo $BALLOON > /sys/bus/virtio/drivers/virtio_balloon/bind 2> /dev/null; true");
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
