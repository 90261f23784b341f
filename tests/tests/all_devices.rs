//! All devices of one guest under load at once, paused and resumed at random, while disks, interfaces and the balloon come,
//! go and change: nothing is lost, the guest's kernel has nothing to complain of, and the VMM keeps nothing.
//!
//! To try another device: a line of [`LOADS`], [`TALKS`] or [`EVENTS`]. `BERTH_SEED=N` repeats the choices of a run, not its
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
    ActionType, Balloon, BalloonStartCmd, BalloonUpdate, Client, Console, Drive, DriveUpdate, IoEngine,
    MmdsConfig, NetworkInterfaceUpdate, Pmem, RateLimiter, Request, TokenBucket, VmState,
};
use berth_tests::footprint::Footprint;
use berth_tests::guest::setup::{VSOCK, disk_drive};
use berth_tests::guest::tap::Tap;
use berth_tests::guest::{
    Guest, Name, Setup, blank_disk, curl_drive, debian_drive, limits, md5, program_drive, streams, times,
};
use berth_tests::host::process;
use rustix::fs::{CWD, Mode, mkfifoat};
use serde_json::json;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const MEMORY_MIB: u64 = 512;

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
/// Behind the number of each line on the virtio console.
const LINE: &str = "the quick brown fox jumps over the lazy dog 0123456789";

/// Ports of the host's end of the tap.
const TO_HOST: u16 = 4000;
const TO_GUEST: u16 = 4001;
/// Ports of sockets.
const ECHO: u32 = 1000;
const COUNTED: u32 = 2000;

/// Loops in the guest: what each turn does, which must succeed.
type Load = (&'static str, fn(&World) -> String);

const LOADS: &[Load] = &[
    ("disk", |_| fio("vdd")),
    ("disk_in_a_ring", |_| fio("vde")),
    // The sum of what the host heard, and of what the host said.
    ("stream_to_host", |world| {
        let host = world.tap.host();
        format!("[ \"$(nc {host} {TO_HOST} < /run/words)\" = \"$(md5sum < /run/words)\" ]")
    }),
    ("stream_to_guest", |world| {
        let host = world.tap.host();
        format!(
            "nc {host} {TO_GUEST} < /dev/null > /run/heard; \
             [ \"$(head -n 1 /run/heard)\" = \"$(tail -n +2 /run/heard | md5sum)\" ]"
        )
    }),
    ("iperf", |world| {
        let iperf = format!("chroot /debian iperf3 -c {} -t 1", world.tap.host());
        format!("{iperf} && {iperf} -R")
    }),
    ("metadata", |_| {
        format!(
            "[ \"$({CURL} {METADATA}/large | wc -c)\" = {DOCUMENT} ] && [ \"$({CURL} {METADATA}/id)\" = i-1 ]"
        )
    }),
    ("socket_to_host", |_| {
        format!(
            "berth-vsock connect {COUNTED} /run/say && [ \"$(cat /run/answer)\" = \"$(md5sum < /run/words)\" ]"
        )
    }),
    ("entropy", |_| {
        "head -c 700 /dev/hwrng > /run/r1; head -c 700 /dev/hwrng > /run/r2; \
         [ $(cat /run/r1 /run/r2 | wc -c) = 1400 ] && ! cmp -s /run/r1 /run/r2"
            .into()
    }),
    ("console", |_| {
        format!(
            "for i in $(seq 40); do echo \"$n {LINE}\"; n=$((n + 1)); done > /dev/hvc0; echo $n > /run/lines"
        )
    }),
    ("pmem", |_| {
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

/// What may happen while all of them go on, and whether it needs PCI.
type Event = (&'static str, bool, fn(&mut World));

const EVENTS: &[Event] = &[
    ("the balloon grows", false, |world| balloon(world, 64)),
    ("the balloon grows a little", false, |world| balloon(world, 20)),
    ("the balloon shrinks", false, |world| balloon(world, 0)),
    ("free pages are hinted at", false, |world| {
        let start = BalloonStartCmd { acknowledge_on_stop: true };
        world.guest.apply(Request::StartBalloonHinting(start));
    }),
    ("a disk's limits change", false, |world| {
        let limits = some_limits(world.chance.next());
        let update = |drive_id: &str| DriveUpdate {
            drive_id: drive_id.into(),
            path_on_host: None,
            rate_limiter: Some(limits),
        };
        for disk in ["plain", "ring"] {
            world.guest.apply(Request::PatchDrive(update(disk)));
        }
    }),
    ("the interface's limits change", false, |world| {
        let limits = some_limits(world.chance.next());
        world.guest.apply(Request::PatchNetworkInterface(NetworkInterfaceUpdate {
            iface_id: world.tap.name(),
            rx_rate_limiter: Some(limits),
            tx_rate_limiter: Some(limits),
        }));
    }),
    ("metrics are flushed", false, |world| world.guest.apply(Request::Action(ActionType::FlushMetrics))),
    ("a disk comes and goes", true, |world| {
        let sum = world.guest.run("head -c 64k /dev/vdb | md5sum");
        let path = world.directory.path().join("extra");
        world.guest.apply(Request::PutDrive(Drive { is_read_only: Some(true), ..disk_drive("extra", path) }));
        world.guest.run("until [ -b /dev/vdf ]; do sleep 0.1; done");
        assert_eq!(world.guest.run("head -c 64k /dev/vdf | md5sum"), sum);
        world.guest.apply(Request::DeleteDrive("extra".into()));
        world.guest.run("while [ -e /dev/vdf ]; do sleep 0.1; done");
        let gone = |guest: &mut Guest| guest.api.vm_config().unwrap().drives.len() == 5;
        until(&mut world.guest, "the disk is gone", gone);
    }),
    ("an interface comes and goes", true, |world| {
        let interface = world.second_tap.interface();
        let id = interface.iface_id.clone();
        world.guest.apply(Request::PutNetworkInterface(interface));
        world.guest.run("until [ -e /sys/class/net/eth1 ]; do sleep 0.1; done");
        let (own, other) = (world.second_tap.guest(), world.second_tap.host());
        world.guest.run(&format!(
            "ip link set eth1 up; ip address add {own}/24 dev eth1; ping -c 2 -i 0.2 -W 60 {other}"
        ));
        world.guest.apply(Request::DeleteNetworkInterface(id));
        world.guest.run("while [ -e /sys/class/net/eth1 ]; do sleep 0.1; done");
        let gone = |guest: &mut Guest| guest.api.vm_config().unwrap().network_interfaces.len() == 1;
        until(&mut world.guest, "the interface is gone", gone);
    }),
];

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
    outside: Arc<Outside>,
    /// Lines that came on the virtio console.
    lines: Arc<AtomicU64>,
    chance: Chance,
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
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    let disk = |id: &str, io_engine| {
        let path = blank_disk(here.join(id), 64 * MIB);
        Drive { io_engine: Some(io_engine), ..disk_drive(id, path) }
    };
    let drives = vec![
        debian_drive(),
        program_drive(here, "berth-vsock"),
        curl_drive(here),
        disk("plain", IoEngine::Sync),
        disk("ring", IoEngine::Async),
    ];
    fs::copy(here.join("berth-vsock"), here.join("extra")).unwrap();
    let pmem =
        Pmem { id: "pmem".into(), path_on_host: blank_disk(here.join("pmem"), 4 * MIB), ..Pmem::default() };
    let balloon = Balloon {
        deflate_on_oom: true,
        stats_polling_interval_s: 1,
        free_page_hinting: true,
        ..Balloon::default()
    };
    let mut guest = Guest::configured(Setup {
        name,
        vcpus: 2,
        memory_mib: MEMORY_MIB,
        drives,
        interfaces: vec![tap.interface()],
        pmems: vec![pmem],
        entropy: true,
        balloon: Some(balloon),
        vsock: true,
        arguments: ["--metrics-path", "metrics"].map(String::from).into(),
        ..Setup::default()
    });
    let service = MmdsConfig { network_interfaces: vec![tap.name()], ..MmdsConfig::default() };
    guest.apply(Request::PutMmdsConfig(service));
    let document = json!({"large": "x".repeat(DOCUMENT), "id": "i-1"});
    guest.apply(Request::PutMmds(document.as_object().unwrap().clone()));
    let (keyboard, screen) = (pipe(&guest.path("keyboard")), pipe(&guest.path("screen")));
    let (output_path, input_path) = (guest.path("screen"), Some(guest.path("keyboard")));
    guest.apply(Request::PutConsole(Console {
        output_path,
        input_path,
        columns: 80,
        rows: 25,
        ..Console::default()
    }));

    let (to_host, to_guest) = (listen(&tap, TO_HOST), listen(&tap, TO_GUEST));
    serve(to_host, |mut stream, _| {
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard)?;
        stream.write_all(md5(&heard).as_bytes())
    });
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

    guest.apply(Request::Action(ActionType::InstanceStart));
    guest.console.wait_for("BERTH-GUEST-READY", limits::BOOT);
    guest.console.wait_for("# ", limits::BOOT);
    prepare(&mut guest, &tap, &keyboard, &screen);
    let lines = Arc::<AtomicU64>::default();
    let reading = Arc::clone(&lines);
    thread::spawn(move || read_lines(screen, &reading));
    let outside = Arc::new(Outside {
        api: Mutex::new(guest.vmm.client()),
        vsock: guest.path(VSOCK),
        keyboard: Mutex::new(keyboard),
        typed: Mutex::default(),
        stop: AtomicBool::new(false),
    });
    World { guest, tap, second_tap, outside, lines, chance: Chance(seed()), directory, _iperf: iperf }
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
    guest.run(&format!("berth-vsock echo {ECHO} > /run/echo 2>&1 &"));
    guest.run("until grep -q listening /run/echo; do sleep 0.1; done");
    // The shell that is on the virtio console gives way to what takes everything that is typed, as it is.
    (&*keyboard).write_all(b"stty raw -echo; echo taken; exec cat > /run/typed\n").unwrap();
    let mut shown = Vec::new();
    while !shown.ends_with(b"taken\n") {
        let mut byte = [0];
        (&*screen).read_exact(&mut byte).unwrap();
        shown.extend(byte);
    }
    guest.run("until [ -e /run/typed ]; do sleep 0.1; done; dmesg -c > /dev/null");
}

/// Each line is the one after the one before, or the first of a new storm.
fn read_lines(screen: File, lines: &AtomicU64) {
    let mut expected = 0;
    for line in BufReader::new(screen).lines() {
        let line = line.unwrap();
        if line == format!("0 {LINE}") {
            expected = 0;
        }
        assert_eq!(line, format!("{expected} {LINE}"), "on the virtio console");
        expected += 1;
        lines.fetch_add(1, Ordering::SeqCst);
    }
}

impl World {
    /// All loads, talks and events for so long. Then all is quiet.
    fn storm(&mut self, length: Duration) {
        self.outside.stop.store(false, Ordering::SeqCst);
        self.guest.run("rm -f /run/stop /run/good.*");
        let lines = self.lines.load(Ordering::SeqCst);
        for (name, turn) in LOADS {
            let turn = turn(self);
            self.guest.run(&format!(
                "(n=0; while [ ! -e /run/stop ]; do {{ {turn}; }} && echo >> /run/good.{name} || break; {REST}; done; \
                 [ -e /run/stop ] || touch /run/failed.{name}; touch /run/ended.{name}) > /run/said.{name} 2>&1 &"
            ));
        }
        let talks: Vec<_> = TALKS.iter().map(|talk| self.talk(*talk)).collect();
        let is_pci = self.guest.setup().name == Name::Berth;
        let events: Vec<_> = EVENTS.iter().filter(|(_, needs_pci, _)| is_pci || !needs_pci).collect();
        // What comes and goes does so in each storm, however short.
        let mut due = events.iter().filter(|(_, needs_pci, _)| *needs_pci);
        let (begin, mut happened) = (Instant::now(), 0);
        while happened < LEAST_EVENTS || begin.elapsed() < length {
            let (what, _, event) = match due.next() {
                Some(event) => event,
                None => &events[(self.chance.next() % events.len() as u64) as usize],
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
        for (name, _) in LOADS {
            let ended = format!("until [ -e /run/ended.{name} ]; do sleep 0.2; done; rm /run/ended.{name}");
            self.guest.run_within(&ended, limits::COMMAND * 2);
            let turns = self.guest.shell(&format!("wc -l < /run/good.{name}"));
            println!("{name}: {}", turns.text.trim());
            assert_eq!(turns.code, 0, "{name}: {}", self.said());
        }
        assert_ne!(self.guest.shell("ls /run/failed.*").code, 0, "{}", self.said());
        self.everything_arrived(lines);
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

    /// On the virtio console, in both directions.
    fn everything_arrived(&mut self, lines_before: u64) {
        let lines = self.guest.number("cat /run/lines");
        let begin = Instant::now();
        while self.lines.load(Ordering::SeqCst) - lines_before < lines {
            assert!(begin.elapsed() < limits::COMMAND, "not all of the {lines} lines came");
            sleep(Duration::from_millis(100));
        }
        assert_eq!(self.lines.load(Ordering::SeqCst) - lines_before, lines);
        let typed = self.outside.typed.lock().unwrap().clone();
        self.guest.run(&format!("until [ $(wc -c < /run/typed) -ge {} ]; do sleep 0.2; done", typed.len()));
        assert_eq!(self.guest.run("md5sum < /run/typed"), md5(&typed));
    }

    fn held(&mut self) -> Held {
        let pid = self.guest.vmm.pid();
        let memory = Footprint::beyond_guest(pid, MEMORY_MIB).unwrap();
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

    let World { mut guest, directory, .. } = world;
    assert_eq!(guest.run("chroot /debian /usr/bin/dmesg --level=emerg,alert,crit,err"), "");
    assert_eq!(guest.shell("dmesg | grep -iE 'lockup|rcu.*stall|blocked for more|hung'").text, "");
    let nothing = [
        ("block", "execute_fails"),
        ("net", "rx_fails"),
        ("net", "tx_fails"),
        ("net", "tap_write_fails"),
        ("balloon", "event_fails"),
        ("vsock", "tx_write_fails"),
        ("pmem", "event_fails"),
    ];
    for (group, key) in nothing {
        assert_eq!(guest.metric(group, key), 0, "{group}.{key}");
    }
    // What is on persistent memory is in its file.
    let mut end = vec![0; 256 << 10];
    File::open(directory.path().join("pmem")).unwrap().read_exact_at(&mut end, 0).unwrap();
    assert_eq!(guest.run("md5sum < /run/p"), md5(&end));
    guest.power_off();
}
