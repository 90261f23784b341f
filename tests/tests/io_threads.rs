//! Devices may be served by several threads: one that waits for the host holds up those that share its thread, and no
//! others.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use api_socket::{
    ActionType, Balloon, Console, Drive, Entropy, MemoryHotplugConfig, MemoryHotplugSizeUpdate, Pmem,
    Request, Vsock,
};
use berth_tests::guest::setup::{VSOCK, disk_drive};
use berth_tests::guest::tap::Tap;
use berth_tests::guest::{Guest, Name, Setup, blank_disk, debian_drive, program_drive, times};

const MIB: u64 = 1 << 20;

fn on(io_thread: u8, drive: Drive) -> Drive {
    Drive { io_thread: Some(io_thread), ..drive }
}

/// A disk of the host's that can be made not to answer.
struct Mapped {
    name: String,
    loop_device: String,
    path: PathBuf,
}

impl Mapped {
    fn new(file: &Path, bytes: u64) -> Mapped {
        blank_disk(file.to_path_buf(), bytes);
        host("modprobe", &["-a", "loop", "dm-mod"]);
        let loop_device = host("losetup", &["--find", "--show", file.to_str().unwrap()]);
        let name = format!("berth-io-threads-{}", std::process::id());
        let table = format!("0 {} linear {loop_device} 0", bytes / 512);
        host("dmsetup", &["create", &name, "--noudevsync", "--table", &table]);
        let minor = host("dmsetup", &["info", "--columns", "--noheadings", "-o", "minor", &name]);
        Mapped { path: format!("/dev/dm-{minor}").into(), name, loop_device }
    }

    /// Until what this gives is dropped, nothing is read from it but what the host has in memory.
    fn stall(&self) -> Stalled<'_> {
        host("dmsetup", &["suspend", "--nolockfs", "--noflush", "--noudevsync", &self.name]);
        Stalled(self)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let run = |program, arguments: &[&str]| Command::new(program).args(arguments).status();
        let _ = run("dmsetup", &["remove", "--noudevsync", "--retry", &self.name]);
        let _ = run("losetup", &["--detach", &self.loop_device]);
    }
}

struct Stalled<'a>(&'a Mapped);

impl Drop for Stalled<'_> {
    fn drop(&mut self) {
        let _ = Command::new("dmsetup").args(["resume", "--noudevsync", &self.0.name]).status();
    }
}

#[track_caller]
fn host(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_string()
}

/// What /proc says of the thread of this name.
#[track_caller]
fn of_thread(guest: &Guest, name: &str, field: &str) -> String {
    let statuses = guest.vmm.thread_statuses();
    let status = statuses.iter().find(|status| status.field("Name") == name);
    status.unwrap_or_else(|| panic!("no thread {name}")).field(field).to_string()
}

fn io_threads(guest: &Guest) -> Vec<String> {
    guest.vmm.threads().into_iter().filter(|name| name.contains("io") && !name.contains("fire")).collect()
}

/// Reads so much that the host has not in memory, and then makes this file.
fn read(disk: &str, done: &str) -> String {
    format!("dd if=/dev/{disk} of=/dev/null bs=64k skip=128 count=1 iflag=direct && touch /run/{done}")
}

#[test]
fn a_disk_that_does_not_answer_holds_up_the_disks_of_its_thread_and_no_others() {
    let directory = tempfile::tempdir().unwrap();
    let mapped = Mapped::new(&directory.path().join("stalled"), 16 * MIB);
    let blank = |name: &str| blank_disk(directory.path().join(name), 16 * MIB);
    let drives = vec![
        on(1, disk_drive("stalled", mapped.path.clone())),
        on(1, disk_drive("neighbour", blank("neighbour"))),
        disk_drive("other", blank("other")),
    ];
    let mut guest = Guest::booted(Setup { drives, vcpus: 2, ..Setup::default() });
    assert_eq!(io_threads(&guest), ["berth-io", "berth-io 1"]);

    let stalled = mapped.stall();
    guest.run(&format!("({}) > /run/log 2>&1 &", read("vda", "stalled")));
    while !of_thread(&guest, "berth-io 1", "State").starts_with('D') {
        sleep(Duration::from_millis(100));
    }
    guest.run(&format!("({}) > /run/log 2>&1 &", read("vdb", "neighbour")));
    for _ in 0..5 {
        guest.run(&read("vdc", "other"));
        guest.run("dd if=/dev/urandom of=/dev/vdc bs=1M count=4 conv=fsync; sleep 1");
    }
    assert_eq!(guest.run("ls /run/other"), "/run/other\n");
    assert_ne!(guest.shell("ls /run/neighbour /run/stalled").code, 0, "they wait for the same thread");
    assert!(!guest.shell("ls /run/neighbour").text.contains("/run/neighbour\n"));
    // Who asks for nothing of that disk is answered.
    guest.apply(Request::Action(ActionType::FlushMetrics));
    assert_eq!(guest.api.vm_config().unwrap().drives[1].io_thread, Some(1));
    assert!(of_thread(&guest, "berth-io 1", "State").starts_with('D'));

    drop(stalled);
    guest.run("until [ -e /run/neighbour ] && [ -e /run/stalled ]; do sleep 0.1; done");
    guest.power_off();
}

#[test]
fn pauses_under_load_on_several_threads_lose_nothing() {
    pauses_lose_nothing(Name::Berth);
}

#[test]
fn pauses_under_load_on_several_threads_lose_nothing_without_pci() {
    pauses_lose_nothing(Name::Firecracker);
}

fn pauses_lose_nothing(name: Name) {
    let directory = tempfile::tempdir().unwrap();
    let disk = |name: &str| disk_drive(name, blank_disk(directory.path().join(name), 32 * MIB));
    let drives = vec![debian_drive(), on(1, disk("one")), on(2, disk("two"))];
    let mut guest = Guest::booted(Setup { name, drives, vcpus: 2, memory_mib: 256, ..Setup::default() });
    guest.mount_debian();
    // Each round writes blocks with checksums and reads them back.
    for disk in ["vdb", "vdc"] {
        let fio = format!(
            "chroot /debian fio --name={disk} --filename=/dev/{disk} --direct=1 --rw=randwrite --bsrange=512-64k \
             --ioengine=libaio --iodepth=8 --size=32m --io_size=4m --fsync=20 --verify=crc32c --verify_fatal=1 \
             --randrepeat=0"
        );
        let round = format!(
            "{fio} > /run/report.{disk} 2>&1 && echo good >> /run/rounds.{disk} || touch /run/failed"
        );
        guest.run(&format!(
            "(while [ ! -e /run/stop ] && [ ! -e /run/failed ]; do {round}; done; touch /run/ended.{disk}) &"
        ));
    }
    for cycle in 0..times(30, 1000) {
        sleep(Duration::from_millis((cycle * 17 % 41).into()));
        guest.pause();
        sleep(Duration::from_millis((cycle * 7 % 41).into()));
        guest.resume();
    }
    guest.run("touch /run/stop; while [ ! -e /run/ended.vdb ] || [ ! -e /run/ended.vdc ]; do sleep 1; done");
    let report = guest.run("cat /run/report.*");
    assert_ne!(guest.shell("[ -e /run/failed ]").code, 0, "{report}");
    for disk in ["vdb", "vdc"] {
        assert!(guest.number(&format!("wc -l < /run/rounds.{disk}")) > 0, "{report}");
    }
    guest.power_off();
}

#[test]
fn a_disk_that_comes_later_is_served_by_a_thread_that_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let disk = |name: &str| disk_drive(name, blank_disk(directory.path().join(name), 16 * MIB));
    let mut guest = Guest::booted(Setup { drives: vec![on(2, disk("first"))], ..Setup::default() });
    for round in 0..2 {
        guest.apply(Request::PutDrive(on(2, disk("later"))));
        guest.run("until [ -b /dev/vdb ]; do sleep 0.1; done");
        let before = turns(&guest, "berth-io 2");
        guest.run("dd if=/dev/urandom of=/dev/vdb bs=1M count=4 conv=fsync");
        assert!(turns(&guest, "berth-io 2") > before, "the thread has served it");
        let told = guest.api.vm_config().unwrap().drives.into_iter().find(|drive| drive.drive_id == "later");
        assert_eq!(told.unwrap().io_thread, Some(2));
        guest.apply(Request::DeleteDrive("later".into()));
        guest.run("while [ -e /dev/vdb ]; do sleep 0.1; done");
        while guest.api.vm_config().unwrap().drives.len() > 1 {
            sleep(Duration::from_millis(100));
        }
        if round == 0 {
            // The thread stays when no device is left on it.
            guest.apply(Request::DeleteDrive("first".into()));
            guest.run("while [ -e /dev/vda ]; do sleep 0.1; done; touch /run/gone");
            while !guest.api.vm_config().unwrap().drives.is_empty() {
                sleep(Duration::from_millis(100));
            }
            // Names are given anew.
            guest.apply(Request::PutDrive(disk("first")));
            guest.run("until [ -b /dev/vda ]; do sleep 0.1; done");
        }
    }
    let error = guest.api.apply(&Request::PutDrive(on(3, disk("other")))).unwrap_err().to_string();
    for words in ["`io_thread` is 3", "io threads 0, 2", "when it starts"] {
        assert!(error.contains(words), "{error}");
    }
    assert_eq!(io_threads(&guest), ["berth-io", "berth-io 2"]);
    guest.power_off();
}

/// How often a thread has gone to sleep: an io thread does so after each batch of work.
fn turns(guest: &Guest, thread: &str) -> u64 {
    of_thread(guest, thread, "voluntary_ctxt_switches").parse().unwrap()
}

#[test]
fn every_device_may_have_a_thread_of_its_own() {
    every_device_has_a_thread(Name::Berth);
}

#[test]
fn every_device_may_have_a_thread_of_its_own_without_pci() {
    every_device_has_a_thread(Name::Firecracker);
}

fn every_device_has_a_thread(name: Name) {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let tap = Tap::new(30, &[]);
    let interface = api_socket::NetworkInterface { io_thread: Some(2), ..tap.interface() };
    let drives = vec![
        on(1, disk_drive("disk", blank_disk(path("disk"), MIB))),
        program_drive(directory.path(), "berth-vsock"),
    ];
    let pmem = Pmem {
        id: "memory".into(),
        path_on_host: blank_disk(path("memory"), 16 * MIB),
        io_thread: Some(3),
        ..Pmem::default()
    };
    let setup = Setup {
        name,
        drives,
        interfaces: vec![interface],
        pmems: vec![pmem],
        balloon: Some(Balloon { amount_mib: 0, io_thread: Some(5), ..Balloon::default() }),
        memory_hotplug: Some(MemoryHotplugConfig { io_thread: Some(7), ..MemoryHotplugConfig::default() }),
        ..Setup::default()
    };
    let mut guest = Guest::configured(setup);
    let socket = guest.path(VSOCK);
    let output_path = path("screen");
    guest.apply(Request::PutVsock(Vsock {
        guest_cid: 3,
        uds_path: socket.clone(),
        io_thread: Some(4),
        ..Vsock::default()
    }));
    guest.apply(Request::PutEntropy(Entropy { io_thread: Some(6), ..Entropy::default() }));
    guest.apply(Request::PutConsole(Console { output_path, io_thread: Some(15), ..Console::default() }));
    guest.boot();
    let first = if name == Name::Berth { "berth-io" } else { "fc_io" };
    let mut names = vec![first.to_string()];
    names.extend([1, 15, 2, 3, 4, 5, 6, 7].map(|number| format!("{first} {number}")));
    assert_eq!(io_threads(&guest), names);
    guest.run("modprobe virtio_pmem; modprobe nd_pmem");
    guest.take_program("/dev/vdb", "berth-vsock");
    tap.set_up(&mut guest, "eth0", None);

    let listener = std::os::unix::net::UnixListener::bind(format!("{}_2000", socket.display())).unwrap();
    let server = std::thread::spawn(move || drop(listener.accept().unwrap()));
    let again = "unbind bind; do echo virtio0 > /sys/bus/virtio/drivers/virtio_blk";
    let work = [
        (
            1,
            format!(
                "for way in {again}/$way; done; dd if=/dev/urandom of=/dev/vda bs=512k count=2 conv=fsync"
            ),
        ),
        (2, format!("ping -c 3 -W 30 {}", tap.host())),
        (3, "dd if=/dev/urandom of=/dev/pmem0 bs=1M count=4 conv=fsync".into()),
        (4, "berth-vsock connect 2000 cat".into()),
        (6, "dd if=/dev/hwrng bs=64 count=64 iflag=fullblock of=/dev/null".into()),
        (15, "echo on the screen > /dev/hvc0".into()),
    ];
    for (number, command) in work {
        let before = turns(&guest, &format!("{first} {number}"));
        guest.run(&command);
        assert!(turns(&guest, &format!("{first} {number}")) > before, "{command}");
    }
    server.join().unwrap();
    let before = turns(&guest, &format!("{first} 5"));
    guest.apply(Request::PatchBalloon(api_socket::BalloonUpdate { amount_mib: 8 }));
    while turns(&guest, &format!("{first} 5")) == before {
        sleep(Duration::from_millis(100));
    }
    let before = turns(&guest, &format!("{first} 7"));
    let update = MemoryHotplugSizeUpdate { requested_size_mib: 128 };
    guest.apply(Request::PatchMemoryHotplug(update));
    while guest.api.memory_hotplug().unwrap().plugged_size_mib < 128 {
        sleep(Duration::from_millis(100));
    }
    assert!(turns(&guest, &format!("{first} 7")) > before);
    guest.pause();
    guest.resume();
    guest.power_off();
}
