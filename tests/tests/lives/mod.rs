//! Lives of VMMs that between them make every system call a filter allows, each traced.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use super::*;
use api_socket::{BackingFile, Balloon, Client, DiskFormat, Drive, IoEngine, MemoryHotplugConfig, Serial};
use berth_tests::guest::huge_pages::HugePages;
use berth_tests::guest::setup::{VSOCK, disk_drive};
use berth_tests::guest::storage_daemon::StorageDaemon;
use berth_tests::guest::tap::{self, Tap};
use berth_tests::guest::{asset, blank_disk, debian_drive, limits, program, program_drive};
use berth_tests::host::{process, provide};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Gives the calls that were made in it.
pub type Life = fn() -> Vec<Call>;

/// What is done in each, and how.
pub const ALL: &[(&str, Life)] = &[
    ("half started", half_started),
    ("out of memory", out_of_memory),
    ("ended by a signal", ended_by_a_signal),
    ("told to be quiet", told_to_be_quiet),
    ("on a terminal", on_a_terminal),
    ("on the network", on_the_network),
    ("a device is let go of with its driver", let_go_with_its_driver),
    ("served by the kernel", served_by_the_kernel),
    ("over sockets", over_sockets),
    ("with a balloon", with_a_balloon),
    ("with memory that comes and goes", with_more_memory),
    ("on images", on_images),
    ("with disks of another process", with_disks_of_another_process),
    ("busy", busy),
];

const MIB: u64 = 1 << 20;

/// More requests than the replies of which a socket's buffers hold.
const UNREAD: usize = 500;

/// Every device at work, on PCI; a busy API; devices reset by the guest and changed from outside.
fn busy() -> Vec<Call> {
    let place = tempfile::tempdir().unwrap();
    let disk = blank_disk(place.path().join("disk"), 32 * MIB);
    let larger = blank_disk(place.path().join("larger"), 33 * MIB);
    let (input, output) = (pipe(place.path(), "input"), pipe(place.path(), "output"));
    // A file system that cannot zero a part of a file.
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let no_better = blank_disk(memory.path().join("disk"), 4 * MIB);
    let ring = blank_disk(place.path().join("ring"), 32 * MIB);
    let other_ring = blank_disk(place.path().join("other ring"), 32 * MIB);
    let ring = Drive { io_engine: Some(IoEngine::Async), io_thread: Some(1), ..disk_drive("ring", ring) };
    let _clock = SlowClock::set();

    let arguments = ["--metrics-path", "metrics", "--boot-timer"].map(String::from).into();
    // Nor does it say what direct I/O wants.
    let memory = Drive { direct: Some(true), ..disk_drive("memory", no_better.clone()) };
    let drives = vec![debian_drive(), disk_drive("disk", disk), memory, ring];
    let setup = Setup { vcpus: 2, memory_mib: 256, arguments, drives, ..Setup::default() };
    let mut guest = Guest::configured(setup);
    put(
        &mut guest.api,
        "/entropy",
        json!({"rate_limiter": {"bandwidth": {"size": 1000, "refill_time": 100}}}),
    );
    let stream = json!({"name": "stream", "input_path": input, "output_path": output});
    put(&mut guest.api, "/console", json!({"input_path": input, "output_path": output, "ports": [stream]}));
    let tracer = Tracer::attach(guest.vmm.pid());
    guest.boot();
    guest.mount_debian();
    limit(&mut guest, 10);
    guest.run("dd if=/dev/urandom of=/dev/vdb bs=1M count=4 conv=fsync");
    guest.run("dd if=/dev/vdb of=/dev/null bs=1M count=4 iflag=direct");
    limit(&mut guest, 0);
    guest.run("dd if=/dev/urandom of=/dev/vdd bs=1M count=4 conv=fsync");
    guest.run("dd if=/dev/vdd of=/dev/null bs=1M count=4 iflag=direct");
    guest.run("blkdiscard -o 8388608 -l 8388608 /dev/vdb");
    for drive in ["vdb", "vdc"] {
        guest.run(&format!(
            "chroot /debian /sbin/blkdiscard --zeroout --offset 4096 --length 1048576 /dev/{drive}"
        ));
    }
    // Blocks that lie at odd places in memory.
    guest.run("mke2fs -b 1024 /dev/vdc > /dev/null; mkdir /mnt; mount -t ext4 /dev/vdc /mnt; touch /mnt/file; umount /mnt");
    let unlimited = json!({"rate_limiter": {"bandwidth": {"size": 0, "refill_time": 0}}});
    guest.run("dd if=/dev/hwrng bs=64 count=64 iflag=fullblock of=/dev/null");
    send(&mut guest.api, "PATCH", "/entropy", unlimited);
    guest.run("yes more than a pipe holds | head -c 200000 > /dev/hvc0 &");
    File::options().read(true).write(true).open(&input).unwrap().write_all(b"typed\n").unwrap();
    for device in ["virtio1", "virtio3"] {
        comes_and_goes(&mut guest, "virtio_blk", device);
    }
    guest.run("hwclock; for irq in /proc/irq/*; do echo 2 > $irq/smp_affinity; done 2> /dev/null; true");
    guest.pause();
    guest.apply(Request::Action(ActionType::FlushMetrics));
    guest.resume();
    send(&mut guest.api, "PATCH", "/drives/disk", json!({"drive_id": "disk", "path_on_host": larger}));
    send(&mut guest.api, "PATCH", "/drives/memory", json!({"drive_id": "memory", "path_on_host": no_better}));
    send(&mut guest.api, "PATCH", "/drives/ring", json!({"drive_id": "ring", "path_on_host": other_ring}));
    send(
        &mut guest.api,
        "PATCH",
        "/drives/debian",
        json!({"drive_id": "debian", "path_on_host": asset(provide::DEBIAN)}),
    );
    guest.run("dd if=/dev/vdb of=/dev/null bs=1M count=4 iflag=direct");
    let plugged = blank_disk(place.path().join("plugged"), MIB);
    let drive = json!({"drive_id": "plugged", "is_root_device": false, "path_on_host": plugged});
    let tap = Tap::new(10, &["user", "root"]);
    let interface = tap.interface();
    let memory = json!({"id": "memory", "path_on_host": plugged});
    let fixed = json!({"id": "fixed", "path_on_host": plugged, "read_only": true});
    guest.run("modprobe virtio_net");
    guest.apply(Request::PutNetworkInterface(interface));
    send(&mut guest.api, "PUT", "/pmem/memory", memory);
    send(&mut guest.api, "PUT", "/pmem/fixed", fixed);
    guest.run("until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done");
    tap.set_up(&mut guest, "eth0", None);
    guest.run(&format!("ping -c 1 -W 30 {}", tap.host()));
    for id in ["memory", "fixed"] {
        guest.apply(Request::DeletePmem(id.into()));
    }
    guest.apply(Request::DeleteNetworkInterface(tap.name()));
    guest.run("while [ -e /sys/class/net/eth0 ]; do sleep 0.1; done");
    for _ in 0..2 {
        send(&mut guest.api, "PUT", "/drives/plugged", drive.clone());
        // The letter after those that are there.
        guest.run("until [ -e /dev/vde ]; do sleep 0.1; done; dd if=/dev/vde of=/dev/null bs=1M count=1");
        guest.api.apply(&Request::DeleteDrive("plugged".into())).unwrap();
        while guest.api.vm_config().unwrap().drives.iter().any(|drive| drive.drive_id == "plugged") {
            guest.run("sleep 0.1");
        }
    }
    // Taken away from a driver that has it.
    send(&mut guest.api, "PUT", "/drives/plugged", drive);
    guest.run("until [ -e /dev/vde ]; do sleep 0.1; done");
    guest.pause();
    for _ in 0..2 {
        guest.api.apply(&Request::DeleteDrive("plugged".into())).unwrap();
    }
    guest.resume();
    guest.run("while [ -e /dev/vde ]; do sleep 0.1; done");
    rude_clients(&guest.path("api.sock"), &guest.path("vmm.log"), || guest.vmm.client());
    // More than the terminal of a guest whose shell does not read takes.
    guest.say("sleep 3");
    guest.say(&"x".repeat(3000));
    guest.apply(Request::Action(ActionType::SendCtrlAltDel));
    guest.ended();
    tracer.calls()
}

/// A terminal, a log on standard output, virtio-mmio; a disk that is cut short under the guest.
fn on_a_terminal() -> Vec<Call> {
    let place = tempfile::tempdir().unwrap();
    let disk = blank_disk(place.path().join("disk"), 4 * MIB);
    let mut vmm = OnTerminal::spawn(place);
    let tracer = vmm.start(&disk, "sleep 2; dd if=/dev/vda of=/dev/null bs=1M; true");
    File::options().write(true).open(&disk).unwrap().set_len(MIB).unwrap();
    put(&mut vmm.client(), "/actions", json!({"action_type": "FlushMetrics"}));
    assert!(process::wait_for(&mut vmm.child, limits::BOOT), "the guest did not end");
    tracer.calls()
}

/// A qcow2 image on another, written, given back and zeroed; replaced; another one that comes and goes.
fn on_images() -> Vec<Call> {
    let place = tempfile::tempdir().unwrap();
    let base = blank_disk(place.path().join("base"), 32 * MIB);
    let [image, other, plugged] = ["image", "other", "plugged"].map(|name| {
        let path = place.path().join(name);
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(&base).arg(&path);
        assert!(create.status().unwrap().success());
        path
    });
    let backing = vec![BackingFile { path_on_host: base, format: DiskFormat::Raw }];
    let drive = |id: &str, path: PathBuf| Drive {
        format: Some(DiskFormat::Qcow2),
        backing: backing.clone(),
        ..disk_drive(id, path)
    };
    let (mut guest, tracer) = traced(Setup { drives: vec![drive("image", image)], ..Setup::default() });
    guest.run("dd if=/dev/urandom of=/dev/vda bs=4k seek=3 count=1000 conv=fsync");
    guest.run("blkdiscard -o 1048576 -l 1048576 /dev/vda; dd if=/dev/vda of=/dev/null bs=1M iflag=direct");
    send(&mut guest.api, "PATCH", "/drives/image", json!({"drive_id": "image", "path_on_host": other}));
    guest.apply(Request::PutDrive(drive("plugged", plugged)));
    guest.run(
        "until [ -e /dev/vdb ]; do sleep 0.1; done; dd if=/dev/zero of=/dev/vdb bs=1M count=2 conv=fsync",
    );
    guest.apply(Request::DeleteDrive("plugged".into()));
    guest.run("while [ -e /sys/block/vdb ]; do sleep 0.1; done");
    to_the_end(guest, tracer)
}

/// A guest that knows nothing of hot plug says by its register that it has let go of a disk, while its driver has the disk still,
/// interrupts and all.
fn let_go_with_its_driver() -> Vec<Call> {
    let directory = tempfile::tempdir().unwrap();
    let drives = vec![
        program_drive(directory.path(), "berth-attacker"),
        disk_drive("goes", blank_disk(directory.path().join("goes"), MIB)),
    ];
    let command_line = "acpiphp.disable=1".into();
    let (mut guest, tracer) = traced(Setup { drives, command_line, ..Setup::default() });
    guest.take_program("/dev/vda", "berth-attacker");
    guest.run("dd if=/dev/vdb of=/dev/null bs=4k iflag=direct");
    guest.apply(Request::DeleteDrive("goes".into()));
    guest.run("berth-attacker let-go");
    let begin = Instant::now();
    while guest.api.vm_config().unwrap().drives.len() > 1 {
        assert!(begin.elapsed() < limits::COMMAND, "it is there still");
        std::thread::sleep(Duration::from_millis(100));
    }
    // There is nothing any more that the driver could shut down.
    guest.say("echo b > /proc/sysrq-trigger");
    guest.ended();
    tracer.calls()
}

/// A tap of two queues, of which the guest takes one and both; limits that hold packets back; a driver that comes and goes.
fn on_the_network() -> Vec<Call> {
    let tap = Tap::new(9, &["multi_queue"]);
    let limiter = api_socket::TokenBucket { size: 10_000, one_time_burst: None, refill_time: 100 };
    let limiter = Some(api_socket::RateLimiter { bandwidth: Some(limiter), ops: None });
    let interface = api_socket::NetworkInterface {
        queue_pairs: Some(2),
        rx_rate_limiter: limiter,
        tx_rate_limiter: limiter,
        ..tap.interface()
    };
    let setup = Setup { vcpus: 2, interfaces: vec![interface], ..Setup::default() };
    let (mut guest, tracer) = traced(setup);
    tap.set_up(&mut guest, "eth0", None);
    guest.run(&format!("ping -c 3 -W 30 -s 8000 {}", tap.host()));
    guest.pause();
    guest.resume();
    comes_and_goes(&mut guest, "virtio_net", "virtio0");
    tap.set_up(&mut guest, "eth0", None);
    guest.run(&format!("ping -c 3 -W 30 {}", tap.host()));
    to_the_end(guest, tracer)
}

/// An interface whose packets the kernel moves, from when it is plugged in; a driver that comes and goes, and one that breaks
/// the rules.
fn served_by_the_kernel() -> Vec<Call> {
    let tap = Tap::new(11, &["user", "root"]);
    let (mut guest, tracer) = traced(Setup::default());
    guest.run("modprobe virtio_net");
    guest.apply(Request::PutNetworkInterface(tap.interface_with_vhost()));
    guest.run("until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done");
    tap.set_up(&mut guest, "eth0", None);
    guest.run(&format!("ping -c 3 -W 30 {}", tap.host()));
    guest.pause();
    guest.resume();
    tap::bad_driver(&mut guest, "eth0");
    tap.set_up(&mut guest, "eth0", None);
    guest.run(&format!("ping -c 3 -W 30 {}", tap.host()));
    to_the_end(guest, tracer)
}

/// Programs of host and guest call each other, wait for each other and leave; a driver that goes in the middle of it.
fn over_sockets() -> Vec<Call> {
    let place = tempfile::tempdir().unwrap();
    let drives = vec![program_drive(place.path(), "berth-vsock")];
    let (mut guest, tracer) = traced(Setup { vsock: true, drives, ..Setup::default() });
    let path = guest.path(VSOCK);
    guest.take_program("/dev/vda", "berth-vsock");
    guest.run("berth-vsock echo 1000 > /run/said & until grep -q listening /run/said; do sleep 0.1; done");
    let call = || {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"CONNECT 1000\n").unwrap();
        let mut reply = [0; 3];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(&reply, b"OK ");
        stream
    };
    // More than the VMM's side holds: it is watched for room.
    let mut stream = call();
    std::thread::scope(|scope| {
        let mut reader = stream.try_clone().unwrap();
        stream.set_read_timeout(Some(limits::COMMAND)).unwrap();
        scope.spawn(move || {
            stream.write_all(&[7; 4 << 20]).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        });
        std::thread::sleep(Duration::from_secs(1));
        reader.read_to_end(&mut Vec::new()).unwrap();
    });
    let listener = UnixListener::bind(format!("{}_2000", path.display())).unwrap();
    let server = std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"words").unwrap());
    guest.run("berth-vsock connect 2000 cat");
    server.join().unwrap();
    let _kept = call();
    comes_and_goes(&mut guest, "vmw_vsock_virtio_transport", "virtio1");
    guest.pause();
    guest.resume();
    to_the_end(guest, tracer)
}

/// A guest that gives memory up in each of the ways, on ordinary pages and on huge ones; a driver that comes and goes.
fn with_a_balloon() -> Vec<Call> {
    let balloon = Balloon {
        amount_mib: 10,
        deflate_on_oom: true,
        stats_polling_interval_s: 1,
        free_page_hinting: true,
        free_page_reporting: true,
        io_thread: Some(1),
    };
    let setup = || Setup { balloon: Some(balloon), ..Setup::default() };
    let mut calls = Vec::new();
    let huge = HugePages::set_aside(64);
    for huge_pages in [api_socket::HugePages::None, api_socket::HugePages::Hugetlbfs2M] {
        let (mut guest, tracer) = traced(Setup { huge_pages, ..setup() });
        while guest.api.balloon_stats().unwrap().actual_mib < 10 {
            std::thread::sleep(Duration::from_millis(100));
        }
        send(&mut guest.api, "PATCH", "/balloon/hinting/start", json!({}));
        while guest.api.balloon_hinting_status().unwrap().host_cmd != 1 {
            std::thread::sleep(Duration::from_millis(100));
        }
        send(&mut guest.api, "PATCH", "/balloon/statistics", json!({"stats_polling_interval_s": 2}));
        send(&mut guest.api, "PATCH", "/balloon", json!({"amount_mib": 0}));
        guest.pause();
        guest.resume();
        comes_and_goes(&mut guest, "virtio_balloon", "virtio0");
        calls.extend(to_the_end(guest, tracer));
    }
    drop(huge);
    calls
}

/// Memory that is plugged and unplugged, on ordinary pages and on huge ones; a driver that comes and goes.
fn with_more_memory() -> Vec<Call> {
    let memory = MemoryHotplugConfig { total_size_mib: 256, ..MemoryHotplugConfig::default() };
    let setup = || Setup {
        memory_hotplug: Some(memory),
        command_line: "memhp_default_state=online_movable".into(),
        ..Setup::default()
    };
    let mut calls = Vec::new();
    let huge = HugePages::set_aside(128);
    for huge_pages in [api_socket::HugePages::Transparent, api_socket::HugePages::Hugetlbfs2M] {
        let (mut guest, tracer) = traced(Setup { huge_pages, ..setup() });
        let plug = |guest: &mut Guest, mib: u64| {
            send(&mut guest.api, "PATCH", "/hotplug/memory", json!({"requested_size_mib": mib}));
            while guest.api.memory_hotplug().unwrap().plugged_size_mib != mib {
                std::thread::sleep(Duration::from_millis(100));
            }
        };
        plug(&mut guest, 128);
        guest.pause();
        guest.resume();
        plug(&mut guest, 64);
        plug(&mut guest, 0);
        // A driver that goes before it has taken the last block out leaves it, and does not come again.
        guest.run("while grep -q 'virtio_mem' /proc/iomem; do sleep 0.1; done");
        comes_and_goes(&mut guest, "virtio_mem", "virtio0");
        calls.extend(to_the_end(guest, tracer));
    }
    drop(huge);
    calls
}

/// A disk whose process comes, goes and hangs; another that is plugged in and out; a driver that comes and goes.
fn with_disks_of_another_process() -> Vec<Call> {
    let (mut first, second) = (StorageDaemon::blank(4 * MIB), StorageDaemon::blank(4 * MIB));
    let setup = Setup { drives: vec![first.drive("first")], ..Setup::default() };
    let (mut guest, tracer) = traced(setup);
    guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=4 conv=fsync");
    comes_and_goes(&mut guest, "virtio_blk", "virtio0");
    guest.pause();
    guest.resume();
    first.resize(5 * MIB);
    send(&mut guest.api, "PATCH", "/drives/first", json!({"drive_id": "first"}));
    guest.apply(Request::PutDrive(second.drive("second")));
    guest.run("until [ -b /dev/vdb ]; do sleep 0.1; done; dd if=/dev/vdb of=/dev/null bs=1M count=1");
    guest.apply(Request::DeleteDrive("second".into()));
    guest.run("while [ -e /dev/vdb ]; do sleep 0.1; done");
    guest.run("(while dd if=/dev/zero of=/dev/vda bs=64k oflag=direct; do :; done) > /dev/null 2>&1 &");
    first.kill();
    std::thread::sleep(Duration::from_secs(1));
    first.start();
    guest.run("dd if=/dev/vda of=/dev/null bs=1M count=1 iflag=direct");
    first.hang(true);
    guest.pause();
    guest.resume();
    first.hang(false);
    guest.run("dd if=/dev/vda of=/dev/null bs=1M count=1 iflag=direct");
    to_the_end(guest, tracer)
}

/// Serial output beyond its limit.
fn told_to_be_quiet() -> Vec<Call> {
    let command_line = r#"berth.run="yes flood | head -c 2000""#.into();
    let mut guest = Guest::configured(Setup { command_line, ..Setup::default() });
    let limit = serde_json::from_value(json!({"size": 10, "refill_time": 60_000})).unwrap();
    let serial_out_path = Some(guest.path("serial"));
    guest.apply(Request::PutSerial(Serial { serial_out_path, rate_limiter: Some(limit) }));
    let tracer = Tracer::attach(guest.vmm.pid());
    guest.apply(Request::Action(ActionType::InstanceStart));
    assert_eq!(guest.vmm.ended(limits::BOOT), Ended::Code(0));
    tracer.calls()
}

/// Guests with more vCPUs or io threads than the VMM may have threads: those that were started end, and the VMM lives on.
fn half_started() -> Vec<Call> {
    // Of its own: the control thread and the API.
    const THREADS: u8 = 2;
    let place = tempfile::tempdir().unwrap();
    let elsewhere =
        Drive { io_thread: Some(1), ..disk_drive("disk", blank_disk(place.path().join("disk"), MIB)) };
    let vcpus = Setup { vcpus: 4, ..Setup::default() };
    let io_threads = Setup { vcpus: 1, drives: vec![elsewhere], ..Setup::default() };
    let mut calls = Vec::new();
    for setup in [vcpus, io_threads] {
        let mut guest = Guest::configured(setup);
        let group = Cgroup::of(guest.vmm.pid(), THREADS + 2);
        let tracer = Tracer::attach(guest.vmm.pid());
        let error = guest.api.apply(&Request::Action(ActionType::InstanceStart)).unwrap_err().to_string();
        assert!(error.contains("The guest cannot start"), "{error}");
        assert_eq!(guest.state(), api_socket::InstanceState::NotStarted);
        guest.vmm.signal(Signal::TERM);
        assert_eq!(guest.ended(), Ended::Code(0));
        drop(group);
        calls.extend(tracer.calls());
    }
    calls
}

/// A fatal signal, once for each kind of thread: the handler runs under the thread's filter, and gives the terminal back.
fn ended_by_a_signal() -> Vec<Call> {
    let mut calls = Vec::new();
    for name in ["firecracker", "fc_api", "fc_vcpu 0", "fc_io"] {
        let place = tempfile::tempdir().unwrap();
        let disk = blank_disk(place.path().join("disk"), 4 * MIB);
        let mut vmm = OnTerminal::spawn(place);
        let tracer = vmm.start(&disk, "sleep 1000");
        berth_tests::guest::vmm::signal_thread(vmm.child.id(), name, Signal::HUP);
        assert!(process::wait_for(&mut vmm.child, limits::EXIT), "{name} goes on");
        let status = vmm.child.wait().unwrap();
        assert_eq!(status.code(), Some(156), "{name}: {status}");
        let said = if name == "firecracker" { "main" } else { name };
        assert!(vmm.errors().contains(&format!("in thread {said}\n")), "{}", vmm.errors());
        let told = fs::read_to_string(vmm.place.path().join("exit")).unwrap();
        assert!(
            told.starts_with("{\"exit_code\":156,") && told.contains(&format!("in thread {said}\"")),
            "{told}"
        );
        calls.extend(tracer.calls());
    }
    calls
}

/// A request for which there is no memory: the API thread says so and ends the process.
fn out_of_memory() -> Vec<Call> {
    let arguments = vec!["--http-api-max-payload-size=50000000".to_string()];
    let mut guest = Guest::started(Setup { arguments, ..Setup::default() });
    let tracer = Tracer::attach(guest.vmm.pid());
    let used = guest.vmm.status_kib("VmSize") << 10;
    guest.vmm.limit_memory(used + MIB);
    let _ = guest.api.request("PUT", "/logger", Some(&"x".repeat(40_000_000)));
    assert_eq!(guest.ended(), Ended::Code(2));
    assert!(guest.vmm.errors().contains("memory allocation of"), "{}", guest.vmm.errors());
    tracer.calls()
}

/// Clients that hang up in the middle, are one too many, send nonsense and much of it, and do not read what they asked for.
fn rude_clients(socket: &Path, log: &Path, client: impl Fn() -> Client) {
    let connect = || {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(limits::API)).unwrap();
        stream
    };
    connect().write_all(b"PUT /actions HTTP/1.1\r\nContent-Length: 30\r\n\r\n{\"action").unwrap();
    let mut bad = connect();
    bad.write_all(b"NONSENSE\r\n\r\n").unwrap();
    bad.read_to_string(&mut String::new()).unwrap();
    client().request("PUT", "/logger", Some(&"x".repeat(50_000))).unwrap();

    let mut slow = connect();
    let mut writer = slow.try_clone().unwrap();
    let asking = std::thread::spawn(move || {
        for _ in 0..UNREAD {
            writer.write_all(b"GET /vm/config HTTP/1.1\r\n\r\n").unwrap();
        }
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    // Until the server can write no more, and says nothing of further requests.
    let mut before = 0;
    loop {
        std::thread::sleep(Duration::from_secs(2));
        let now = fs::metadata(log).unwrap().len();
        if now == std::mem::replace(&mut before, now) {
            break;
        }
    }
    slow.read_to_string(&mut String::new()).unwrap();
    asking.join().unwrap();
    let many: Vec<_> = (0..11).map(|_| connect()).collect();
    let _ = client().request("GET", "/", None);
    drop(many);
}

fn pipe(directory: &Path, name: &str) -> PathBuf {
    let path = directory.join(name);
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
    path
}

/// A guest in its shell, and the tracer of its VMM since before the start.
fn traced(setup: Setup) -> (Guest, Tracer) {
    let mut guest = Guest::configured(setup);
    let tracer = Tracer::attach(guest.vmm.pid());
    guest.boot();
    (guest, tracer)
}

/// Has the guest power itself off, and gives the calls that were made.
fn to_the_end(mut guest: Guest, tracer: Tracer) -> Vec<Call> {
    guest.say("poweroff");
    guest.ended();
    tracer.calls()
}

/// The guest's driver of a device gives it up and takes it again.
fn comes_and_goes(guest: &mut Guest, driver: &str, device: &str) {
    guest.run(&format!(
        "for way in unbind bind; do echo {device} > /sys/bus/virtio/drivers/{driver}/$way; done"
    ));
}

fn limit(guest: &mut Guest, ops: u32) {
    let limiter = json!({"ops": {"size": ops, "refill_time": 100}});
    send(&mut guest.api, "PATCH", "/drives/disk", json!({"drive_id": "disk", "rate_limiter": limiter}));
}

fn put(client: &mut Client, path: &str, body: Value) {
    send(client, "PUT", path, body);
}

fn send(client: &mut Client, method: &str, path: &str, body: Value) {
    let response = client.request(method, path, Some(&body.to_string())).unwrap();
    assert_eq!(response.status, 204, "{method} {path}: {}", response.body);
}

/// A VMM of Firecracker's name on a terminal, which says everything on standard output.
struct OnTerminal {
    child: Child,
    place: TempDir,
    _terminal: std::os::fd::OwnedFd,
}

impl OnTerminal {
    fn spawn(place: TempDir) -> OnTerminal {
        let link = place.path().join("firecracker");
        std::os::unix::fs::symlink(program("berth-vmm"), &link).unwrap();
        let terminal =
            rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY).unwrap();
        rustix::pty::grantpt(&terminal).unwrap();
        rustix::pty::unlockpt(&terminal).unwrap();
        let name = rustix::pty::ptsname(&terminal, Vec::new()).unwrap();
        // Not this process's own, which would end with it.
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let end = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty()).unwrap();
        let output = File::create(place.path().join("output")).unwrap();
        let mut command = Command::new(link);
        command.arg("--api-sock").arg(place.path().join("api.sock")).args(["--level", "Debug"]);
        command.args(["--metrics-path", "/dev/null", "--exit-status", "exit"]);
        let errors = File::create(place.path().join("errors")).unwrap();
        command.stdin(end).stdout(output).stderr(errors).current_dir(place.path());
        let child = process::spawn_bound(&mut command, Vec::new()).unwrap();
        OnTerminal { child, place, _terminal: terminal }
    }

    /// Starts a guest that does this and ends.
    fn start(&self, disk: &Path, command: &str) -> Tracer {
        let mut client = self.client();
        let drive = json!({"drive_id": "disk", "is_root_device": false, "path_on_host": disk});
        put(&mut client, "/drives/disk", drive);
        let boot = json!({
            "kernel_image_path": asset(provide::VMLINUX),
            "initrd_path": asset(provide::INITRAMFS),
            "boot_args": format!("console=ttyS0 panic=1 quiet berth.run=\"{command}\""),
        });
        put(&mut client, "/boot-source", boot);
        let tracer = Tracer::attach(self.child.id());
        put(&mut client, "/actions", json!({"action_type": "InstanceStart"}));
        tracer
    }

    fn errors(&self) -> String {
        fs::read_to_string(self.place.path().join("errors")).unwrap()
    }

    fn client(&self) -> Client {
        let mut client = Client::connect_within(&self.place.path().join("api.sock"), limits::API).unwrap();
        client.set_timeout(Some(limits::API)).unwrap();
        client
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        process::kill(&mut self.child);
        if std::thread::panicking() {
            eprintln!("{}", fs::read_to_string(self.place.path().join("output")).unwrap_or_default());
        }
    }
}

/// A clock source that cannot be read without a system call, while this lives.
struct SlowClock(String);

impl SlowClock {
    const PLACE: &str = "/sys/devices/system/clocksource/clocksource0";

    fn set() -> SlowClock {
        let read = |name: &str| fs::read_to_string(format!("{}/{name}", Self::PLACE)).unwrap();
        let slow = ["acpi_pm", "hpet"];
        let available = read("available_clocksource");
        let slow = slow.iter().find(|name| available.contains(*name)).expect("a slow clock source");
        let before = read("current_clocksource");
        fs::write(format!("{}/current_clocksource", Self::PLACE), slow).unwrap();
        SlowClock(before)
    }
}

impl Drop for SlowClock {
    fn drop(&mut self) {
        let _ = fs::write(format!("{}/current_clocksource", Self::PLACE), &self.0);
    }
}

/// A control group in which there can be so many threads.
struct Cgroup(PathBuf);

impl Cgroup {
    fn of(pid: u32, threads: u8) -> Cgroup {
        let root = Path::new("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+pids").unwrap();
        let group = root.join(format!("berth-seccomp-{pid}"));
        fs::create_dir(&group).unwrap();
        fs::write(group.join("pids.max"), threads.to_string()).unwrap();
        fs::write(group.join("cgroup.procs"), pid.to_string()).unwrap();
        Cgroup(group)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}
