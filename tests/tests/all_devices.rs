//! All devices of one guest under load at once, paused and resumed at random, while disks, interfaces, memory, a back-end and
//! the balloon come, go and change: nothing is lost, the guest's kernel has nothing to complain of, and the VMM keeps nothing.
//!
//! Memory that comes and goes does not go with a back-end that has the guest's memory: the guest with PCI has the one, the
//! guest without has the other. To try another device: a line of [`LOADS`], [`TALKS`] or [`EVENTS`]. `BERTH_SEED=N` repeats the choices of a run, not its
//! moments.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant, SystemTime};

use api_socket::{
    ActionType, BackingFile, Balloon, BalloonStartCmd, BalloonUpdate, Client, Console, ConsolePort,
    ConsoleUpdate, DiskFormat, Drive, DriveUpdate, HugePages, IoEngine, MemoryHotplugConfig,
    MemoryHotplugSizeUpdate, MmdsConfig, NetworkInterfaceUpdate, Pmem, RateLimiter, Request, TokenBucket,
    VmState,
};
use berth_tests::footprint::Footprint;
use berth_tests::guest::huge_pages;
use berth_tests::guest::setup::{VSOCK, disk_drive};
use berth_tests::guest::storage_daemon::StorageDaemon;
use berth_tests::guest::tap::{self, Tap};
use berth_tests::guest::{
    Guest, Name, Setup, blank_disk, curl_drive, debian_drive, limits, md5, program_drive, streams, times,
};
use berth_tests::host::process;
use rustix::fs::{CWD, Mode, mkfifoat};
use serde_json::json;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const MEMORY_MIB: u64 = 512;
/// What can be plugged beside, and how much of it is at times.
const PLUGGABLE_MIB: u64 = 256;
const PLUGGED_MIB: [u64; 3] = [128, 64, 256];

/// Of the loads; the time of what is begun then comes to it. A first part brings the VMM to what it needs.
const WARM_UP: Duration = Duration::from_secs(5);

/// However long they take, on a host that is busy with others.
const LEAST_EVENTS: u32 = 3;

/// Between two turns of a load, so that none has the guest to itself.
const REST: &str = "sleep 0.5";

/// What the VMM may grow by after the warm-up: buffers of requests that were larger than any before. It is the same after
/// fifteen seconds and after ten minutes.
const GROWTH_KIB: u64 = 1024;

/// Lengths of running and standing between pauses, in milliseconds, at most.
const RUNNING_MS: u64 = 700;
const STANDING_MS: u64 = 150;

/// Of one stream, in bytes.
const WORDS: usize = 300_000;
const METADATA: &str = "http://169.254.169.254";
const DOCUMENT: usize = 20_000;
/// Behind the number of each line on a terminal.
const LINE: &str = "the quick brown fox jumps over the lazy dog 0123456789";

/// Ports of the host's end of the tap.
const TO_HOST: u16 = 4000;
const TO_GUEST: u16 = 4001;
/// Ports of sockets.
const ECHO: u32 = 1000;
const COUNTED: u32 = 2000;

/// The console's other ports.
const TERMINAL: &str = "second";
const STREAM: &str = "org.berth.echo";

/// What a load or an event takes that not every one of these guests, or not every host, has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    Nothing,
    /// PCI, where devices come and go.
    Slots,
    /// Memory that comes and goes.
    Memory,
    /// A disk of another process.
    BackEnd,
    /// A host whose kernel moves packets.
    Vhost,
}
use Needs::{BackEnd, Memory, Nothing, Slots, Vhost};

/// Loops in the guest: what each turn does, which must succeed.
type Load = (&'static str, Needs, fn(&World) -> String);

const LOADS: &[Load] = &[
    ("disk", Nothing, |_| fio("vdd")),
    ("disk_in_a_ring", Nothing, |_| fio("vde")),
    ("qcow2", Nothing, |_| fio("vdf")),
    ("disk_of_a_back_end", BackEnd, |_| fio("vdg")),
    // What the turn before has written.
    ("memory", Nothing, |_| {
        "{ [ ! -e /run/kept ] || [ \"$(md5sum < /run/kept)\" = \"$(cat /run/sum)\" ]; } && n=$((n + 1)) && \
         { echo $n; for i in 1 2 3 4 5 6 7 8; do cat /run/words; done; } > /run/kept && md5sum < /run/kept > /run/sum"
            .into()
    }),
    // The sum of what the host heard, and of what the host said.
    ("stream_to_host", Nothing, |world| {
        let host = world.tap.host();
        format!("[ \"$(nc {host} {TO_HOST} < /run/words)\" = \"$(md5sum < /run/words)\" ]")
    }),
    ("stream_of_the_kernel", Vhost, |world| {
        let host = world.vhost.as_ref().map(Tap::host).unwrap_or_default();
        format!("[ \"$(nc {host} {TO_HOST} < /run/words)\" = \"$(md5sum < /run/words)\" ]")
    }),
    ("stream_to_guest", Nothing, |world| {
        let host = world.tap.host();
        format!(
            "nc {host} {TO_GUEST} < /dev/null > /run/heard; \
             [ \"$(head -n 1 /run/heard)\" = \"$(tail -n +2 /run/heard | md5sum)\" ]"
        )
    }),
    ("iperf", Nothing, |world| {
        let iperf = format!("chroot /debian iperf3 -c {} -t 1", world.tap.host());
        format!("{iperf} && {iperf} -R")
    }),
    ("metadata", Nothing, |_| {
        format!(
            "[ \"$({CURL} {METADATA}/large | wc -c)\" = {DOCUMENT} ] && [ \"$({CURL} {METADATA}/id)\" = i-1 ]"
        )
    }),
    ("socket_to_host", Nothing, |_| {
        format!(
            "berth-vsock connect {COUNTED} /run/say && [ \"$(cat /run/answer)\" = \"$(md5sum < /run/words)\" ]"
        )
    }),
    ("entropy", Nothing, |_| {
        "head -c 700 /dev/hwrng > /run/r1; head -c 700 /dev/hwrng > /run/r2; \
         [ $(cat /run/r1 /run/r2 | wc -c) = 1400 ] && ! cmp -s /run/r1 /run/r2"
            .into()
    }),
    ("terminal", Nothing, |_| lines("hvc0")),
    ("second_terminal", Nothing, |_| lines("hvc1")),
    ("stream_of_the_console", Nothing, |_| {
        format!(
            "{{ cat /run/words >&3; [ \"$(head -c {WORDS} <&3 | md5sum)\" = \"$(md5sum < /run/words)\" ]; }} 3<> /run/echo"
        )
    }),
    ("pmem", Nothing, |_| {
        "head -c 256k /dev/urandom > /run/p; dd if=/run/p of=/dev/pmem0 bs=64k conv=fsync && \
         [ \"$(dd if=/dev/pmem0 bs=64k count=4 iflag=direct | md5sum)\" = \"$(md5sum < /run/p)\" ]"
            .into()
    }),
];

const CURL: &str = "/run/curl/ld-linux-x86-64.so.2 --library-path /run/curl /run/curl/curl -sS -m 100";

fn fio(disk: &str) -> String {
    format!(
        "chroot /debian fio --name={disk} --filename=/dev/{disk} --direct=1 --rw=randrw --bsrange=512-128k --fsync=20 \
         --ioengine=libaio --iodepth=8 --size=32m --io_size=4m --verify=crc32c --verify_fatal=1 --randrepeat=0 \
         --verify_state_save=0"
    )
}

fn lines(terminal: &str) -> String {
    format!(
        "for i in $(seq 20); do echo \"$n {LINE}\"; n=$((n + 1)); done > /dev/{terminal}; echo $n > /run/lines.{terminal}"
    )
}

/// Loops of the host: what each turn does with the VMM from outside.
type Talk = (&'static str, fn(&Outside, u64));

const TALKS: &[Talk] = &[
    ("pauses", |outside, chance| {
        sleep(Duration::from_millis(chance % RUNNING_MS));
        let mut api = outside.api.lock().unwrap();
        api.apply(&Request::PatchVm(VmState::Paused)).unwrap();
        sleep(Duration::from_millis(chance / RUNNING_MS % STANDING_MS));
        api.apply(&Request::PatchVm(VmState::Resumed)).unwrap();
    }),
    ("socket_to_guest", |outside, chance| {
        let words = streams::data(chance, WORDS);
        let heard = streams::exchange(&streams::call(&outside.vsock, ECHO), &words);
        assert!(heard == words, "what came back is not what was said");
    }),
    ("typing", |outside, chance| {
        let words = streams::data(chance, 60);
        outside.keyboard.lock().unwrap().write_all(&words).unwrap();
        outside.typed.lock().unwrap().extend(words);
        sleep(Duration::from_millis(50));
    }),
];

/// What may happen while all of them go on.
type Event = (&'static str, Needs, fn(&mut World));

const EVENTS: &[Event] = &[
    ("the balloon grows", Nothing, |world| balloon(world, 64)),
    ("the balloon grows a little", Nothing, |world| balloon(world, 20)),
    ("the balloon shrinks", Nothing, |world| balloon(world, 0)),
    ("free pages are hinted at", Nothing, |world| {
        let start = BalloonStartCmd { acknowledge_on_stop: true };
        world.guest.apply(Request::StartBalloonHinting(start));
    }),
    ("a disk's limits change", Nothing, |world| {
        let limits = some_limits(world.chance.next());
        let update = |drive_id: &str| DriveUpdate {
            drive_id: drive_id.into(),
            path_on_host: None,
            rate_limiter: Some(limits),
        };
        for disk in ["plain", "ring", "qcow2"] {
            world.guest.apply(Request::PatchDrive(update(disk)));
        }
    }),
    ("the interface's limits change", Nothing, |world| {
        let limits = some_limits(world.chance.next());
        world.guest.apply(Request::PatchNetworkInterface(NetworkInterfaceUpdate {
            iface_id: world.tap.name(),
            rx_rate_limiter: Some(limits),
            tx_rate_limiter: Some(limits),
        }));
    }),
    ("metrics are flushed", Nothing, |world| world.guest.apply(Request::Action(ActionType::FlushMetrics))),
    ("a terminal changes its size", Nothing, |world| {
        // Of a size of 1 busybox says what it takes for the usual one.
        let (columns, rows) =
            ((world.chance.next() % 200) as u16 + 2, (world.chance.next() % 100) as u16 + 2);
        let port = (columns % 2 == 0).then(|| TERMINAL.to_owned());
        let terminal = if port.is_some() { "hvc1" } else { "hvc0" };
        world.guest.apply(Request::PatchConsole(ConsoleUpdate::size(columns, rows, port)));
        let (is_now, begin) = (format!("{rows} {columns}\n"), Instant::now());
        loop {
            let told = world.guest.shell(&format!("stty size < /dev/{terminal}")).text;
            if told == is_now {
                break;
            }
            assert!(begin.elapsed() < limits::COMMAND, "{terminal} has {told:?} and not yet {is_now:?}");
            sleep(Duration::from_millis(100));
        }
    }),
    ("memory comes", Memory, |world| {
        let size = PLUGGED_MIB[(world.chance.next() % PLUGGED_MIB.len() as u64) as usize];
        plug(world, size);
    }),
    // As much as the guest can move.
    ("memory goes", Memory, |world| plug(world, 0)),
    ("a back-end dies and comes back", BackEnd, |world| {
        let back = |guest: &Guest| guest.vmm.log().matches("its back-end is back").count();
        let before = back(&world.guest);
        let daemon = world.daemon.as_mut().unwrap();
        daemon.kill();
        sleep(Duration::from_millis(world.chance.next() % 1000));
        daemon.start();
        until(&mut world.guest, "the back-end is back", |guest| back(guest) > before);
    }),
    ("a disk comes and goes", Slots, |world| {
        let sum = world.guest.run("head -c 64k /dev/vdb | md5sum");
        let path = world.directory.path().join("extra");
        let others = world.guest.setup().drives.len();
        let disk = format!("/dev/vd{}", char::from(b'a' + others as u8));
        world.guest.apply(Request::PutDrive(Drive { is_read_only: Some(true), ..disk_drive("extra", path) }));
        world.guest.run(&format!("until [ -b {disk} ]; do sleep 0.1; done"));
        assert_eq!(world.guest.run(&format!("head -c 64k {disk} | md5sum")), sum);
        world.guest.apply(Request::DeleteDrive("extra".into()));
        world.guest.run(&format!("while [ -e {disk} ]; do sleep 0.1; done"));
        let gone = |guest: &mut Guest| guest.api.vm_config().unwrap().drives.len() == others;
        until(&mut world.guest, "the disk is gone", gone);
    }),
    ("an interface comes and goes", Slots, |world| {
        let interface = world.second_tap.interface();
        let id = interface.iface_id.clone();
        let others = world.guest.setup().interfaces.len();
        let device = format!("eth{others}");
        world.guest.apply(Request::PutNetworkInterface(interface));
        world.guest.run(&format!("until [ -e /sys/class/net/{device} ]; do sleep 0.1; done"));
        let (own, other) = (world.second_tap.guest(), world.second_tap.host());
        world.guest.run(&format!(
            "ip link set {device} up; ip address add {own}/24 dev {device}; ping -c 2 -i 0.2 -W 60 {other}"
        ));
        world.guest.apply(Request::DeleteNetworkInterface(id));
        world.guest.run(&format!("while [ -e /sys/class/net/{device} ]; do sleep 0.1; done"));
        let gone = |guest: &mut Guest| guest.api.vm_config().unwrap().network_interfaces.len() == others;
        until(&mut world.guest, "the interface is gone", gone);
    }),
    ("persistent memory comes and goes", Slots, |world| {
        let path_on_host = world.directory.path().join("more");
        world.guest.apply(Request::PutPmem(Pmem { id: "more".into(), path_on_host, ..Pmem::default() }));
        world.guest.run("until [ -b /dev/pmem1 ]; do sleep 0.1; done");
        world.guest.run(
            "head -c 256k /dev/urandom > /run/m; dd if=/run/m of=/dev/pmem1 bs=64k conv=fsync; \
             [ \"$(dd if=/dev/pmem1 bs=64k count=4 iflag=direct | md5sum)\" = \"$(md5sum < /run/m)\" ]",
        );
        let mut written = vec![0; 256 << 10];
        File::open(world.directory.path().join("more")).unwrap().read_exact_at(&mut written, 0).unwrap();
        assert_eq!(world.guest.run("md5sum < /run/m"), md5(&written));
        world.guest.apply(Request::DeletePmem("more".into()));
        world.guest.run("while [ -e /dev/pmem1 ]; do sleep 0.1; done");
        let gone = |guest: &mut Guest| guest.api.vm_config().unwrap().pmem.len() == 1;
        until(&mut world.guest, "the persistent memory is gone", gone);
    }),
];

/// Memory that is used may not go, and for the maps of what comes there may be none.
const PLUG: Duration = limits::COMMAND.saturating_mul(4);
/// A guest that could not do it tries again after 50, 100 and 200 seconds (Linux, VIRTIO_MEM_RETRY_TIMER_MIN_MS and what
/// doubles it), and at once when it is told again.
const TELL_AGAIN: Duration = Duration::from_secs(15);

fn plug(world: &mut World, requested_size_mib: u64) {
    let request = Request::PatchMemoryHotplug(MemoryHotplugSizeUpdate { requested_size_mib });
    world.guest.apply(request.clone());
    let (begin, mut told) = (Instant::now(), Instant::now());
    loop {
        let plugged_mib = world.guest.api.memory_hotplug().unwrap().plugged_size_mib;
        if plugged_mib == requested_size_mib {
            break;
        }
        assert!(begin.elapsed() < PLUG, "{plugged_mib} MiB are plugged and not {requested_size_mib}");
        if told.elapsed() > TELL_AGAIN {
            world.guest.apply(request.clone());
            told = Instant::now();
        }
        sleep(Duration::from_millis(100));
    }
}

fn balloon(world: &mut World, amount_mib: u32) {
    world.guest.apply(Request::PatchBalloon(BalloonUpdate { amount_mib }));
    let is_so = |guest: &mut Guest| guest.api.balloon_stats().unwrap().actual_mib == amount_mib;
    until(&mut world.guest, "the balloon has its size", is_so);
}

/// None, or some that hold a few requests back.
fn some_limits(chance: u64) -> RateLimiter {
    let bucket = |size| Some(TokenBucket { size, one_time_burst: None, refill_time: 100 });
    match chance % 3 {
        0 => RateLimiter { bandwidth: bucket(0), ops: bucket(0) },
        1 => RateLimiter { bandwidth: bucket(2 << 20), ops: bucket(0) },
        _ => RateLimiter { bandwidth: bucket(0), ops: bucket(200) },
    }
}

#[track_caller]
fn until(guest: &mut Guest, what: &str, mut is_so: impl FnMut(&mut Guest) -> bool) {
    let begin = Instant::now();
    while !is_so(guest) {
        assert!(begin.elapsed() < limits::COMMAND, "not yet: {what}");
        sleep(Duration::from_millis(100));
    }
}

/// The guest and all that there is around it.
struct World {
    guest: Guest,
    tap: Tap,
    second_tap: Tap,
    /// Of an interface whose packets the host's kernel moves, where it can.
    vhost: Option<Tap>,
    /// Of a disk of another process.
    daemon: Option<StorageDaemon>,
    outside: Arc<Outside>,
    /// Terminals of the guest, and how many lines came on each.
    terminals: [(&'static str, Arc<AtomicU64>); 2],
    chance: Chance,
    /// What comes and goes: once before anything else, however short the storms are.
    due: Vec<&'static Event>,
    /// What has not happened since all others have.
    events: Vec<&'static Event>,
    directory: TempDir,
    _iperf: Bound,
}

/// What threads of the host have of the VMM.
struct Outside {
    /// Another client than the test's own.
    api: Mutex<Client>,
    vsock: PathBuf,
    keyboard: Mutex<File>,
    typed: Mutex<Vec<u8>>,
    stop: AtomicBool,
}

/// A process that ends with its test.
struct Bound(Child);

impl Drop for Bound {
    fn drop(&mut self) {
        process::kill(&mut self.0);
    }
}

/// Marsaglia's xorshift.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn seed() -> u64 {
    let told = std::env::var("BERTH_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = told.unwrap_or_else(|| SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64);
    println!("seed {seed}");
    seed | 1
}

fn world(name: Name) -> World {
    // The one that is plugged in is opened without any capability.
    let (tap, second_tap) = (Tap::new(40, &[]), Tap::new(41, &["user", "root"]));
    let vhost = Path::new("/dev/vhost-net").exists().then(|| Tap::new(42, &[]));
    if vhost.is_none() {
        // The rest is tried all the same; whoever counts is to hear of it.
        println!(
            "SKIPPED: in part: there is no /dev/vhost-net, so no interface whose packets the kernel moves"
        );
    }
    let daemon = (name == Name::Firecracker).then(|| StorageDaemon::blank(64 * MIB));
    // The guest touches all that is free to hint at it. The other guest's memory has huge pages by itself.
    let huge_pages = if daemon.is_some() { HugePages::Transparent } else { HugePages::None };
    huge_pages::allow_in_shared_memory();
    let memory_hotplug = daemon
        .is_none()
        .then(|| MemoryHotplugConfig { total_size_mib: PLUGGABLE_MIB, ..MemoryHotplugConfig::default() });
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    let disk = |id: &str, io_engine| {
        let path = blank_disk(here.join(id), 64 * MIB);
        Drive { io_engine: Some(io_engine), ..disk_drive(id, path) }
    };
    let mut drives = vec![
        debian_drive(),
        program_drive(here, "berth-vsock"),
        curl_drive(here),
        disk("plain", IoEngine::Sync),
        Drive { io_thread: Some(1), ..disk("ring", IoEngine::Async) },
        Drive { io_thread: Some(1), ..qcow2(here) },
    ];
    drives.extend(daemon.iter().map(|daemon| daemon.drive("back_end")));
    let mut interfaces = vec![tap.interface()];
    interfaces.extend(vhost.iter().map(Tap::interface_with_vhost));
    fs::copy(here.join("berth-vsock"), here.join("extra")).unwrap();
    blank_disk(here.join("more"), 4 * MIB);
    let pmem =
        Pmem { id: "pmem".into(), path_on_host: blank_disk(here.join("pmem"), 4 * MIB), ..Pmem::default() };
    let balloon = Balloon {
        deflate_on_oom: true,
        stats_polling_interval_s: 1,
        free_page_hinting: true,
        free_page_reporting: true,
        ..Balloon::default()
    };
    let mut guest = Guest::configured(Setup {
        name,
        vcpus: 2,
        memory_mib: MEMORY_MIB,
        huge_pages,
        drives,
        interfaces,
        pmems: vec![pmem],
        entropy: true,
        balloon: Some(balloon),
        memory_hotplug,
        vsock: true,
        // What is movable can be unplugged again.
        command_line: "memhp_default_state=online_movable".into(),
        arguments: ["--metrics-path", "metrics"].map(String::from).into(),
        ..Setup::default()
    });
    let service = MmdsConfig { network_interfaces: vec![tap.name()], ..MmdsConfig::default() };
    guest.apply(Request::PutMmdsConfig(service));
    let document = json!({"large": "x".repeat(DOCUMENT), "id": "i-1"});
    guest.apply(Request::PutMmds(document.as_object().unwrap().clone()));
    let [keyboard, screen, second_screen, said, heard] =
        ["keyboard", "screen", "second_screen", "said", "heard"].map(|name| pipe(&guest.path(name)));
    guest.apply(Request::PutConsole(Console {
        output_path: guest.path("screen"),
        input_path: Some(guest.path("keyboard")),
        columns: 80,
        rows: 25,
        ports: ports(&guest),
        ..Console::default()
    }));
    thread::spawn(move || echo(said, heard));

    let (to_host, to_guest) = (listen(&tap, TO_HOST), listen(&tap, TO_GUEST));
    for listener in [Some(to_host), vhost.as_ref().map(|tap| listen(tap, TO_HOST))].into_iter().flatten() {
        serve(listener, |mut stream, _| {
            let mut heard = Vec::new();
            stream.read_to_end(&mut heard)?;
            stream.write_all(md5(&heard).as_bytes())
        });
    }
    serve(to_guest, |mut stream, number| {
        let words = streams::data(number, WORDS);
        stream.write_all(md5(&words).as_bytes())?;
        stream.write_all(&words)?;
        stream.shutdown(Shutdown::Write)?;
        stream.read_to_end(&mut Vec::new()).map(drop)
    });
    count(UnixListener::bind(guest.path(&format!("{VSOCK}_{COUNTED}"))).unwrap());
    let mut iperf = Command::new("iperf3");
    iperf.args(["-s", "-B", &tap.host()]).stdout(Stdio::null());
    let iperf = Bound(process::spawn_bound(&mut iperf, Vec::new()).unwrap());

    guest.boot();
    prepare(&mut guest, &tap, &keyboard, &screen);
    if let Some(tap) = &vhost {
        tap.set_up(&mut guest, "eth1", None);
    }
    let terminals = [("hvc0", Arc::<AtomicU64>::default()), ("hvc1", Arc::default())];
    for ((terminal, lines), screen) in terminals.iter().cloned().zip([screen, second_screen]) {
        thread::spawn(move || read_lines(screen, terminal, &lines));
    }
    let outside = Arc::new(Outside {
        api: Mutex::new(guest.vmm.client()),
        vsock: guest.path(VSOCK),
        keyboard: Mutex::new(keyboard),
        typed: Mutex::default(),
        stop: AtomicBool::new(false),
    });
    let mut world = World {
        guest,
        tap,
        second_tap,
        vhost,
        daemon,
        outside,
        terminals,
        chance: Chance(seed()),
        due: Vec::new(),
        events: Vec::new(),
        directory,
        _iperf: iperf,
    };
    let due = EVENTS.iter().rev().filter(|(_, needs, _)| *needs != Nothing && world.has(*needs));
    world.due = due.collect();
    world
}

/// A qcow2 image with an image behind it.
fn qcow2(directory: &Path) -> Drive {
    let (image, base) = (directory.join("qcow2"), blank_disk(directory.join("base"), 64 * MIB));
    let paths = [&base, &image].map(|path| path.to_str().unwrap());
    tap::host("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", paths[0], paths[1]]);
    let backing = vec![BackingFile { path_on_host: base, format: DiskFormat::Raw }];
    Drive { format: Some(DiskFormat::Qcow2), backing, ..disk_drive("qcow2", image) }
}

/// A terminal beside the first, and a stream both ways.
fn ports(guest: &Guest) -> Vec<ConsolePort> {
    let port = |name: &str, output: &str| ConsolePort {
        name: name.into(),
        output_path: guest.path(output),
        ..ConsolePort::default()
    };
    vec![
        ConsolePort { is_console: true, ..port(TERMINAL, "second_screen") },
        ConsolePort { input_path: Some(guest.path("heard")), ..port(STREAM, "said") },
    ]
}

/// The host's end of the console's stream: says what it has heard.
fn echo(mut said: File, mut heard: File) {
    let mut words = vec![0; WORDS];
    loop {
        said.read_exact(&mut words).unwrap();
        heard.write_all(&words).unwrap();
    }
}

fn pipe(path: &Path) -> File {
    mkfifoat(CWD, path, Mode::RUSR | Mode::WUSR).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

fn listen(tap: &Tap, port: u16) -> TcpListener {
    TcpListener::bind((tap.host(), port)).unwrap()
}

/// Talks with each that comes, in a thread that ends with the test. What goes wrong shows in what the guest hears.
fn serve(listener: TcpListener, talk: fn(TcpStream, u64) -> std::io::Result<()>) {
    thread::spawn(move || {
        for (number, stream) in (1..).zip(listener.incoming()) {
            let _ = stream.and_then(|stream| talk(stream, number));
        }
    });
}

/// Hears [`WORDS`] and says their sum.
fn count(listener: UnixListener) {
    let talk = |mut stream: UnixStream| {
        let mut heard = vec![0; WORDS];
        stream.read_exact(&mut heard)?;
        stream.write_all(md5(&heard).as_bytes())
    };
    thread::spawn(move || listener.incoming().for_each(|stream| _ = stream.and_then(talk)));
}

/// What the loads need in the guest.
fn prepare(guest: &mut Guest, tap: &Tap, keyboard: &File, screen: &File) {
    guest.mount_debian();
    guest.run("mount -t tmpfs tmp /debian/tmp");
    guest.take_program("/dev/vdb", "berth-vsock");
    guest.run("mkdir /run/curl; tar -xf /dev/vdc -C /run/curl");
    guest.run("modprobe -a virtio_pmem nd_pmem virtio_net; until [ -b /dev/pmem0 ]; do sleep 0.1; done");
    tap.set_up(guest, "eth0", None);
    guest.run("ip route add 169.254.0.0/16 dev eth0");
    guest.run(&format!("head -c {WORDS} /dev/urandom > /run/words"));
    guest.run("printf '#!/bin/sh\\ncat /run/words; cat > /run/answer\\n' > /run/say; chmod 755 /run/say");
    guest.run(&format!("berth-vsock echo {ECHO} > /run/listens 2>&1 &"));
    guest.run("until grep -q listening /run/listens; do sleep 0.1; done");
    // The shell that is on the virtio console gives way to what takes everything that is typed, as it is.
    (&*keyboard).write_all(b"stty raw -echo; echo taken; exec cat > /run/typed\n").unwrap();
    let mut shown = Vec::new();
    while !shown.ends_with(b"taken\n") {
        let mut byte = [0];
        (&*screen).read_exact(&mut byte).unwrap();
        shown.extend(byte);
    }
    guest.run("until [ -e /run/typed ]; do sleep 0.1; done");
    // What nobody has open forgets how it is set.
    guest.run("until (: < /dev/hvc1) 2> /dev/null; do sleep 0.1; done; sleep 1000000 < /dev/hvc1 &");
    guest.run("stty raw -echo < /dev/hvc1");
    guest.run(&format!(
        "cd /sys/class/virtio-ports; until grep -q {STREAM} */name; do sleep 0.1; done; \
         ln -s /dev/$(dirname $(grep -l {STREAM} */name)) /run/echo; cd /"
    ));
    guest.run("dmesg -c > /dev/null");
}

/// Each line is the one after the one before, or the first of a new storm.
fn read_lines(screen: File, terminal: &str, lines: &AtomicU64) {
    let mut expected = 0;
    for line in BufReader::new(screen).lines() {
        let line = line.unwrap();
        if line == format!("0 {LINE}") {
            expected = 0;
        }
        assert_eq!(line, format!("{expected} {LINE}"), "on {terminal}");
        expected += 1;
        lines.fetch_add(1, Ordering::SeqCst);
    }
}

impl World {
    /// All loads, talks and events for so long. Then all is quiet.
    fn storm(&mut self, length: Duration) {
        self.outside.stop.store(false, Ordering::SeqCst);
        self.guest.run("rm -f /run/stop /run/good.*");
        let lines = self.terminals.each_ref().map(|(_, lines)| lines.load(Ordering::SeqCst));
        let loads: Vec<_> = LOADS.iter().filter(|(_, needs, _)| self.has(*needs)).collect();
        for (name, _, turn) in &loads {
            let turn = turn(self);
            self.guest.run(&format!(
                "(n=0; while [ ! -e /run/stop ]; do {{ {turn}; }} && echo >> /run/good.{name} || break; {REST}; done; \
                 [ -e /run/stop ] || touch /run/failed.{name}; touch /run/ended.{name}) > /run/said.{name} 2>&1 &"
            ));
        }
        let talks: Vec<_> = TALKS.iter().map(|talk| self.talk(*talk)).collect();
        let (begin, mut happened) = (Instant::now(), 0);
        loop {
            let is_over = happened >= LEAST_EVENTS && begin.elapsed() >= length;
            let (what, _, event) = match self.due.pop() {
                Some(event) => event,
                None if is_over => break,
                None => self.any_event(),
            };
            println!("{:6.1} s: {what}", begin.elapsed().as_secs_f64());
            event(self);
            happened += 1;
            let failed = self.guest.shell("cat /run/failed.*");
            assert_ne!(failed.code, 0, "a load failed: {}", self.said());
        }
        balloon(self, 0);
        self.outside.stop.store(true, Ordering::SeqCst);
        for ((name, _), talk) in TALKS.iter().zip(talks) {
            let turns = talk.join().unwrap_or_else(|_| panic!("{name}"));
            println!("{name}: {turns}");
            assert!(turns > 0, "{name}");
        }
        self.guest.run("touch /run/stop");
        for (name, _, _) in loads {
            let ended = format!("until [ -e /run/ended.{name} ]; do sleep 0.2; done; rm /run/ended.{name}");
            self.guest.run_within(&ended, limits::COMMAND * 2);
            let turns = self.guest.shell(&format!("wc -l < /run/good.{name}"));
            println!("{name}: {}", turns.text.trim());
            assert_eq!(turns.code, 0, "{name}: {}", self.said());
        }
        assert_ne!(self.guest.shell("ls /run/failed.*").code, 0, "{}", self.said());
        self.everything_arrived(lines);
    }

    /// By chance, and each as often as any other.
    fn any_event(&mut self) -> &'static Event {
        if self.events.is_empty() {
            self.events = EVENTS.iter().filter(|(_, needs, _)| self.has(*needs)).collect();
        }
        self.events.swap_remove((self.chance.next() % self.events.len() as u64) as usize)
    }

    fn has(&self, needs: Needs) -> bool {
        match needs {
            Nothing => true,
            Slots => self.guest.setup().name == Name::Berth,
            Memory => self.guest.setup().memory_hotplug.is_some(),
            BackEnd => self.daemon.is_some(),
            Vhost => self.vhost.is_some(),
        }
    }

    fn talk(&self, (_, turn): Talk) -> JoinHandle<u64> {
        let (outside, mut chance) = (Arc::clone(&self.outside), Chance(self.chance.0));
        thread::spawn(move || {
            let mut turns = 0;
            while !outside.stop.load(Ordering::SeqCst) {
                turn(&outside, chance.next());
                turns += 1;
            }
            turns
        })
    }

    /// What the guest's loads that failed have said, or all of them.
    fn said(&mut self) -> String {
        self.guest.shell("ls /run/failed.*; tail -n 20 /run/said.*; dmesg | tail -n 20").text
    }

    /// On the terminals, in both directions.
    fn everything_arrived(&mut self, before: [u64; 2]) {
        for ((terminal, arrived), before) in self.terminals.iter().zip(before) {
            let lines = self.guest.number(&format!("cat /run/lines.{terminal}"));
            let begin = Instant::now();
            while arrived.load(Ordering::SeqCst) - before < lines {
                assert!(begin.elapsed() < limits::COMMAND, "not all of the {lines} lines came on {terminal}");
                sleep(Duration::from_millis(100));
            }
            assert_eq!(arrived.load(Ordering::SeqCst) - before, lines, "{terminal}");
        }
        let typed = self.outside.typed.lock().unwrap().clone();
        self.guest.run(&format!("until [ $(wc -c < /run/typed) -ge {} ]; do sleep 0.2; done", typed.len()));
        assert_eq!(self.guest.run("md5sum < /run/typed"), md5(&typed));
    }

    fn held(&mut self) -> Held {
        let pid = self.guest.vmm.pid();
        let pluggable_mib = if self.has(Memory) { PLUGGABLE_MIB } else { 0 };
        let memory = Footprint::beyond_guest_that_grows(pid, MEMORY_MIB, pluggable_mib).unwrap();
        let workers = |name: &&String| name.starts_with("iou-");
        Held {
            anonymous_kib: memory.anonymous_kib,
            descriptors: fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
            // Those of an io_uring are the kernel's, which has them as it likes.
            threads: self.guest.vmm.threads().iter().filter(|name| !workers(name)).count(),
        }
    }
}

/// What a VMM could keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    anonymous_kib: u64,
    descriptors: usize,
    threads: usize,
}

#[test]
fn all_devices_at_once_lose_nothing_through_pauses_and_the_vmm_keeps_nothing() {
    weathers(Name::Berth);
}

#[test]
fn all_devices_at_once_lose_nothing_through_pauses_and_the_vmm_keeps_nothing_without_pci() {
    weathers(Name::Firecracker);
}

fn weathers(name: Name) {
    let mut world = world(name);
    world.storm(WARM_UP);
    let before = world.held();
    world.storm(Duration::from_secs(times(10, 600).into()));
    // Connections are closed by now on both sides, and the VMM has heard of it.
    sleep(Duration::from_secs(2));
    let after = world.held();
    println!("{before:?}\n{after:?}");
    assert!(after.anonymous_kib <= before.anonymous_kib + GROWTH_KIB, "{before:?} {after:?}");
    assert_eq!((after.descriptors, after.threads), (before.descriptors, before.threads));

    let plugs = world.has(Memory);
    // The back-end stays as long as the guest.
    let World { mut guest, directory, daemon, .. } = world;
    // With the traces that belong to it.
    let serious = guest.run("chroot /debian /usr/bin/dmesg --level=emerg,alert,crit,err");
    let stuck = guest.shell("dmesg | grep -iE 'lockup|rcu.*stall|blocked for more|hung'").text;
    assert!(serious.is_empty() && stuck.is_empty(), "{}", guest.run("dmesg | tail -n 150"));
    let nothing = [
        ("block", "execute_fails"),
        ("net", "rx_fails"),
        ("net", "tx_fails"),
        ("net", "tap_write_fails"),
        ("balloon", "event_fails"),
        ("balloon", "free_page_report_fails"),
        ("balloon", "free_page_hint_fails"),
        ("vsock", "tx_write_fails"),
        ("pmem", "event_fails"),
    ];
    let of_memory =
        ["plug_fails", "unplug_fails", "unplug_discard_fails", "queue_event_fails", "state_fails"];
    let of_memory = of_memory.into_iter().filter(|_| plugs).map(|key| ("memory_hotplug", key));
    for (group, key) in nothing.into_iter().chain(of_memory) {
        assert_eq!(guest.metric(group, key), 0, "{group}.{key}");
    }
    assert!(guest.metric("balloon", "free_page_report_freed") > 0, "no free page was reported");
    // What is on persistent memory is in its file.
    let mut end = vec![0; 256 << 10];
    File::open(directory.path().join("pmem")).unwrap().read_exact_at(&mut end, 0).unwrap();
    assert_eq!(guest.run("md5sum < /run/p"), md5(&end));
    guest.power_off();
    drop(daemon);
    tap::host("qemu-img", &["check", "-q", "-f", "qcow2", directory.path().join("qcow2").to_str().unwrap()]);
}
