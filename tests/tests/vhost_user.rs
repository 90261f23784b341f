//! A disk that another process serves is a disk as any other, and it outlives that process: when it dies under load, the
//! guest waits and sees no error. While there is none, and with one that hangs, nothing else waits.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use api_socket::{ActionType, Balloon, CacheType, Drive, DriveUpdate, HugePages, Request};
use berth_tests::guest::huge_pages;
use berth_tests::guest::setup::disk_drive;
use berth_tests::guest::storage_daemon::StorageDaemon;
use berth_tests::guest::{
    Ended, Guest, Name, Setup, asset, blank_disk, debian_drive, limits, refused, times,
};
use berth_tests::host::disk::WritableDisk;
use berth_tests::host::provide;

const MIB: u64 = 1 << 20;

/// What a pause or an unplug may take when nobody is waited for: far less than the VMM's limits, and enough for a slow host.
const AT_ONCE: Duration = Duration::from_secs(2);
/// The VMM's limit for a back-end that hangs, and what a slow host adds.
const STOP_LIMIT: Duration = Duration::from_secs(3 + 7);

fn metrics() -> Vec<String> {
    ["--metrics-path", "metrics"].map(String::from).into()
}

fn guest(name: Name, drives: Vec<Drive>) -> Guest {
    Guest::booted(Setup { name, drives, arguments: metrics(), ..Setup::default() })
}

/// A guest with fio, whose second disk the daemon has, with a queue for each vCPU.
fn guest_with_fio(name: Name, daemon: &StorageDaemon) -> Guest {
    let disk = Drive { queues: Some(2), ..daemon.drive("disk") };
    let drives = vec![debian_drive(), disk];
    let setup = Setup { name, drives, memory_mib: 256, vcpus: 2, arguments: metrics(), ..Setup::default() };
    let mut guest = Guest::booted(setup);
    guest.mount_debian();
    assert_eq!(guest.run("ls /sys/block/vdb/mq | wc -l"), "2\n");
    guest
}

/// Random writes of all sizes, read back and compared.
fn fio(megabytes: u32) -> String {
    format!(
        "chroot /debian fio --name=disk --filename=/dev/vdb --direct=1 --rw=randrw --bsrange=512-64k --fsync=50 \
         --ioengine=libaio --iodepth=16 --size=48m --io_size={megabytes}m --verify=crc32c --verify_fatal=1 --randrepeat=0"
    )
}

fn log(guest: &Guest) -> String {
    fs::read_to_string(guest.path("vmm.log")).unwrap()
}

#[track_caller]
fn takes<T>(at_most: Duration, work: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let result = work();
    assert!(begin.elapsed() < at_most, "{:?}", begin.elapsed());
    result
}

#[test]
fn what_the_guest_writes_is_in_the_back_end_s_file_and_flushed_when_it_says_so() {
    is_a_disk(Name::Berth);
}

#[test]
fn without_pci_it_is_a_disk_too() {
    is_a_disk(Name::Firecracker);
}

fn is_a_disk(name: Name) {
    let daemon = StorageDaemon::blank(32 * MIB);
    let mut guest = guest(name, vec![daemon.drive("disk")]);
    assert_eq!(guest.number("cat /sys/block/vda/size"), 32 * MIB / 512);
    assert_eq!(guest.run("cat /sys/block/vda/queue/write_cache"), "write back\n");
    guest.run("mke2fs /dev/vda > /dev/null; mkdir /mnt; mount -t ext4 /dev/vda /mnt");
    guest
        .run("dd if=/dev/urandom of=/mnt/file bs=1M count=4 conv=fsync; cp /mnt/file /tmp/file; umount /mnt");
    guest.run("echo 3 > /proc/sys/vm/drop_caches; mount -t ext4 /dev/vda /mnt; cmp /mnt/file /tmp/file");
    guest.run("umount /mnt; printf 'the very end' | dd of=/dev/vda bs=512 seek=65535 conv=sync,fsync");
    let mut end = [0; 12];
    File::open(daemon.disk()).unwrap().read_exact_at(&mut end, 32 * MIB - 512).unwrap();
    assert_eq!(&end, b"the very end");
    let group = guest.metric("vhost_user_block_disk", "activate_time_us");
    assert!(group > 0, "Firecracker's group is there");
    guest.power_off();
}

#[test]
fn without_writeback_the_guest_is_offered_no_flush() {
    let daemon = StorageDaemon::blank(MIB);
    let drive = Drive { cache_type: CacheType::Unsafe, ..daemon.drive("disk") };
    let mut guest = guest(Name::Berth, vec![drive]);
    assert_eq!(guest.run("cat /sys/block/vda/queue/write_cache"), "write through\n");
    guest.power_off();
}

#[test]
fn it_verifies_under_random_writes_of_all_sizes() {
    for name in [Name::Berth, Name::Firecracker] {
        let daemon = StorageDaemon::blank(48 * MIB);
        let mut guest = guest_with_fio(name, &daemon);
        // On each queue.
        for vcpu in 0..2 {
            guest.run(&format!("{} --cpus_allowed={vcpu}", fio(8)));
        }
        guest.power_off();
    }
}

#[test]
fn debian_runs_from_it() {
    let place = tempfile::tempdir().unwrap();
    let disk = WritableDisk::new(&asset(provide::DEBIAN), place.path(), "vhost-user").unwrap();
    let daemon = StorageDaemon::with(disk.path());
    huge_pages::allow_in_shared_memory();
    let mut guest = Guest::logged_in(Setup {
        drives: vec![daemon.drive("root")],
        huge_pages: HugePages::Transparent,
        ..Setup::debian(disk.path().to_owned())
    });
    guest.run("head -c 4000000 /dev/urandom > /root/file; sync; md5sum < /root/file > /root/sum");
    guest.run("echo 3 > /proc/sys/vm/drop_caches; [ \"$(md5sum < /root/file)\" = \"$(cat /root/sum)\" ]");
    guest.say("poweroff");
    assert_eq!(guest.vmm.ended(limits::DEBIAN), Ended::Code(0));
}

#[test]
fn a_back_end_that_is_killed_under_load_again_and_again_costs_the_guest_time_and_nothing_else() {
    dies_under_load(Name::Berth);
}

#[test]
fn nor_does_it_without_pci() {
    dies_under_load(Name::Firecracker);
}

fn dies_under_load(name: Name) {
    let mut daemon = StorageDaemon::blank(48 * MIB);
    let mut guest = guest_with_fio(name, &daemon);
    guest.say(&format!("({}; echo fio ended with $?) > /run/fio 2>&1 &", fio(24)));
    guest.run("until grep -q disk /run/fio; do sleep 0.1; done");
    let rounds = times(3, 20);
    for round in 0..rounds {
        std::thread::sleep(Duration::from_millis((700 + round * 370 % 1000).into()));
        daemon.kill();
        std::thread::sleep(Duration::from_millis((round * 600 % 1500).into()));
        daemon.start();
        let deadline = Instant::now() + limits::COMMAND;
        while log(&guest).matches("its back-end is back").count() as u32 <= round {
            assert!(Instant::now() < deadline, "it does not come back: {}", log(&guest));
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    guest.run("until grep -q 'fio ended' /run/fio; do sleep 0.5; done");
    let report = guest.run("tail -n 30 /run/fio");
    assert!(report.contains("fio ended with 0"), "{report}");
    guest.run("! dmesg | grep -i 'i/o error'");
    let log = log(&guest);
    assert_eq!(log.matches("its back-end is gone").count() as u32, rounds, "{log}");
    assert_eq!(log.matches("its back-end is back").count() as u32, rounds, "{log}");
    guest.power_off();
}

#[test]
fn a_back_end_that_is_not_there_is_said_when_the_drive_is_put_and_one_that_dies_then_is_waited_for() {
    let mut daemon = StorageDaemon::blank(4 * MIB);
    let (disk, drive) = (daemon.disk().to_path_buf(), daemon.drive("disk"));
    let mut guest = Guest::configured(Setup::default());
    daemon.kill();
    refused(&mut guest, &Request::PutDrive(drive.clone()), &["`socket`", "Nobody listens there"]);
    let both = Drive { path_on_host: Some(disk), ..drive.clone() };
    refused(&mut guest, &Request::PutDrive(both), &["`socket`", "`path_on_host`"]);
    daemon.start();
    // Twice, as clients do, though the back-end has one guest at a time.
    for _ in 0..2 {
        guest.apply(Request::PutDrive(drive.clone()));
    }
    daemon.kill();
    guest.apply(Request::Action(ActionType::InstanceStart));
    // Its kernel looks for partitions now, and waits.
    std::thread::sleep(Duration::from_secs(4));
    daemon.start();
    guest.console.wait_for("# ", limits::BOOT);
    guest.run("printf found | dd of=/dev/vda conv=sync,fsync");
    assert_eq!(&fs::read(daemon.disk()).unwrap()[..5], b"found");
    guest.power_off();
}

#[test]
fn the_guest_sees_a_disk_that_has_grown() {
    let mut daemon = StorageDaemon::blank(4 * MIB);
    let mut guest = guest(Name::Berth, vec![daemon.drive("disk")]);
    let sees = |guest: &mut Guest, bytes: u64| {
        guest.run(&format!("until [ $(cat /sys/block/vda/size) = {} ]; do sleep 0.1; done", bytes / 512));
    };
    // It says so by itself.
    daemon.resize(6 * MIB);
    sees(&mut guest, 6 * MIB);
    guest.run("printf more | dd of=/dev/vda bs=1M seek=5 conv=fsync");
    // A paused guest hears of it when it goes on.
    let update = DriveUpdate { drive_id: "disk".into(), ..DriveUpdate::default() };
    guest.pause();
    guest.apply(Request::PatchDrive(update.clone()));
    guest.resume();
    // And so may the next one.
    daemon.kill();
    File::options().write(true).open(daemon.disk()).unwrap().set_len(8 * MIB).unwrap();
    daemon.start();
    sees(&mut guest, 8 * MIB);
    let interrupts = "awk '/virtio.*config/ { sum += $2 } END { print sum }' /proc/interrupts";
    let before = guest.number(interrupts);
    guest.apply(Request::PatchDrive(update.clone()));
    guest.run(&format!("until [ $({interrupts}) -gt {before} ]; do sleep 0.1; done"));
    let with = DriveUpdate { path_on_host: Some("/dev/null".into()), ..update.clone() };
    refused(&mut guest, &Request::PatchDrive(with), &["`socket`", "`path_on_host`"]);
    assert!(guest.metric("vhost_user_block_disk", "config_change_time_us") > 0);
    daemon.hang(true);
    refused(&mut guest, &Request::PatchDrive(update.clone()), &["\"disk\"", "has not answered within 5 s"]);
    daemon.kill();
    guest.run("sleep 1");
    refused(&mut guest, &Request::PatchDrive(update), &["\"disk\"", "closed the connection"]);
    assert!(guest.metric("vhost_user_block_disk", "cfg_fails") >= 2);
    guest.power_off();
}

#[test]
fn a_guest_is_paused_and_goes_on_with_requests_under_way_also_when_the_back_end_hangs_or_is_gone() {
    let mut daemon = StorageDaemon::blank(16 * MIB);
    let mut guest = guest(Name::Berth, vec![daemon.drive("disk")]);
    guest.run("(while dd if=/dev/zero of=/dev/vda bs=64k count=200 oflag=direct; do echo; done) > /run/rounds 2>&1 &");
    for _ in 0..times(5, 100) {
        guest.pause();
        guest.resume();
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(!log(&guest).contains("gone"), "one that answers is waited for");
    // Hangs: it is let go, and its requests are done again.
    daemon.hang(true);
    takes(STOP_LIMIT, || guest.pause());
    guest.resume();
    daemon.hang(false);
    guest.run("echo > /run/rounds; until [ $(grep -c records /run/rounds) -ge 2 ]; do sleep 0.1; done");
    // Gone.
    daemon.kill();
    std::thread::sleep(Duration::from_millis(500));
    takes(AT_ONCE, || guest.pause());
    takes(AT_ONCE, || guest.resume());
    takes(AT_ONCE, || guest.pause());
    daemon.start();
    guest.resume();
    guest.run("echo > /run/rounds; until [ $(grep -c records /run/rounds) -ge 2 ]; do sleep 0.1; done");
    guest.run("! dmesg | grep -i 'i/o error'");
    guest.vmm.kill();
}

#[test]
fn a_driver_that_comes_and_goes_finds_the_disk_again_with_the_back_end_and_without() {
    for name in [Name::Berth, Name::Firecracker] {
        let mut daemon = StorageDaemon::blank(4 * MIB);
        let mut guest = guest(name, vec![daemon.drive("disk")]);
        let both = "for way in unbind bind; do echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/$way; done";
        for round in 0..3 {
            guest.run(both);
            guest.run(&format!("printf round{round} | dd of=/dev/vda conv=sync,fsync"));
            assert_eq!(&fs::read(daemon.disk()).unwrap()[..6], format!("round{round}").as_bytes());
        }
        daemon.kill();
        guest.run("echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/unbind");
        daemon.start();
        guest.run("echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/bind");
        assert!(guest.run("head -c 6 /dev/vda").starts_with("round2"));
        guest.power_off();
    }
}

#[test]
fn it_is_plugged_in_and_out_of_a_guest_whose_memory_is_shared_and_refused_by_any_other() {
    let (first, mut second) = (StorageDaemon::blank(4 * MIB), StorageDaemon::blank(4 * MIB));
    let mut guest = guest(Name::Berth, vec![first.drive("first")]);
    for round in 0..2 {
        guest.apply(Request::PutDrive(second.drive("second")));
        guest.run(
            "until [ -b /dev/vdb ]; do sleep 0.1; done; printf plugged | dd of=/dev/vdb conv=sync,fsync",
        );
        assert_eq!(&fs::read(second.disk()).unwrap()[..7], b"plugged");
        if round > 0 {
            // It goes also when there is nobody behind it.
            second.kill();
            std::thread::sleep(Duration::from_millis(500));
        }
        takes(AT_ONCE, || guest.apply(Request::DeleteDrive("second".into())));
        guest.run("while [ -e /dev/vdb ]; do sleep 0.1; done");
        while guest.api.vm_config().unwrap().drives.len() > 1 {
            guest.run("sleep 0.1");
        }
    }
    guest.run("printf still | dd of=/dev/vda conv=sync,fsync");
    guest.power_off();

    let place = tempfile::tempdir().unwrap();
    let other = disk_drive("other", blank_disk(place.path().join("disk"), MIB));
    let mut guest = self::guest(Name::Berth, vec![other]);
    let put = Request::PutDrive(first.drive("first"));
    refused(&mut guest, &put, &["`socket`", "memory of this guest", "before its start"]);
    guest.power_off();
}

#[test]
fn a_guest_ends_at_once_while_its_back_end_is_gone() {
    let mut daemon = StorageDaemon::blank(4 * MIB);
    let mut guest = guest(Name::Berth, vec![daemon.drive("disk")]);
    daemon.kill();
    guest.run("dd if=/dev/vda of=/dev/null bs=512 count=1 iflag=direct & sleep 1");
    guest.say("poweroff -f");
    assert_eq!(guest.ended(), Ended::Code(0));
}

/// Memory in a file of its own goes back to the host only if the file's pages do.
#[test]
fn memory_that_a_back_end_has_too_goes_back_to_the_host() {
    let daemon = StorageDaemon::blank(4 * MIB);
    let balloon = Balloon { amount_mib: 0, deflate_on_oom: true, ..Balloon::default() };
    let setup = Setup { drives: vec![daemon.drive("disk")], balloon: Some(balloon), ..Setup::default() };
    let mut guest = Guest::booted(setup);
    guest.run("dd if=/dev/zero of=/tmp/file bs=1M count=40; rm /tmp/file");
    let before = guest.vmm.status_kib("RssShmem");
    guest.apply(Request::PatchBalloon(api_socket::BalloonUpdate { amount_mib: 50 }));
    let deadline = Instant::now() + limits::COMMAND;
    while guest.vmm.status_kib("RssShmem") + (40 << 10) > before {
        assert!(Instant::now() < deadline, "{before} KiB before, {} now", guest.vmm.status_kib("RssShmem"));
        std::thread::sleep(Duration::from_millis(200));
    }
    guest.run("printf still | dd of=/dev/vda conv=sync,fsync");
    assert!(fs::metadata(daemon.disk()).unwrap().blocks() > 0);
    guest.power_off();
}
