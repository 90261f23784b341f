//! What is taken away from a guest that waits for it fails the guest's requests, those under way too: who waits for them
//! hears of it, the guest lets go of the device as it was asked to, and its id and its file are free at once.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::{Path, PathBuf};

use api_socket::{
    Drive, DriveUpdate, IoEngine, NetworkInterfaceUpdate, Pmem, PmemUpdate, RateLimiter, Request, TokenBucket,
};
use berth_tests::guest::setup::disk_drive;
use berth_tests::guest::storage_daemon::StorageDaemon;
use berth_tests::guest::tap::{Tap, host};
use berth_tests::guest::{Guest, Setup, blank_disk, debian_drive, refused, times};

const MIB: u64 = 1 << 20;

/// Holds requests back for longer than any test runs.
const STANDS_STILL: RateLimiter = RateLimiter {
    bandwidth: None,
    ops: Some(TokenBucket { size: 1, one_time_burst: None, refill_time: 24 * 3_600_000 }),
};

fn guest(drives: Vec<Drive>) -> Guest {
    let arguments = ["--metrics-path", "metrics"].map(String::from).into();
    let mut guest = Guest::booted(Setup { drives, arguments, ..Setup::default() });
    guest.run("mkdir -p /mnt");
    guest
}

fn drives(guest: &mut Guest) -> Vec<String> {
    guest.api.vm_config().unwrap().drives.into_iter().map(|drive| drive.drive_id).collect()
}

/// What is on the guest's bus.
fn functions(guest: &mut Guest) -> u64 {
    guest.number("ls /sys/bus/pci/devices | wc -l")
}

fn is_open(guest: &Guest, path: &Path) -> bool {
    let mut directory = fs::read_dir(format!("/proc/{}/fd", guest.vmm.pid())).unwrap();
    directory.any(|entry| fs::read_link(entry.unwrap().path()).is_ok_and(|open| open == path))
}

/// In the background, under this name.
fn begin(guest: &mut Guest, name: &str, command: &str) {
    guest.run(&format!("({command}; echo $? > /run/{name}.ended) > /run/{name}.said 2>&1 &"));
}

fn has_ended(guest: &mut Guest, name: &str) -> bool {
    guest.run(&format!("[ ! -e /run/{name}.ended ] || echo yes")) == "yes\n"
}

/// The end of what was begun is an error, and says so.
fn fails(guest: &mut Guest, name: &str) {
    guest.run(&format!("until [ -e /run/{name}.ended ]; do sleep 0.1; done"));
    let said = guest.run(&format!("cat /run/{name}.said"));
    assert_ne!(guest.number(&format!("cat /run/{name}.ended; rm /run/{name}.ended")), 0, "{name}: {said}");
    let errors = ["I/O error", "Input/output error", "No such device or address"];
    assert!(errors.iter().any(|error| said.contains(error)), "{name}: {said}");
}

/// Until more of the guest's is held back than `before`: there may have been a device of this name.
fn is_held_back(guest: &mut Guest, group: &str, before: u64) {
    while guest.metric(group, "rate_limiter_throttled_events") <= before {
        guest.run("sleep 0.1");
    }
}

#[test]
fn a_disk_that_is_taken_away_with_requests_under_way_fails_them_and_comes_again() {
    for engine in [IoEngine::Sync, IoEngine::Async] {
        let place = tempfile::tempdir().unwrap();
        let disk = |id: &str| disk_drive(id, blank_disk(place.path().join(id), 16 * MIB));
        let goes = Drive { io_engine: Some(engine), queues: Some(2), io_thread: Some(1), ..disk("goes") };
        let path = goes.path_on_host.clone().unwrap();
        let mut guest = guest(vec![disk("stays"), goes.clone()]);
        let on_the_bus = functions(&mut guest);
        guest.run("mke2fs /dev/vdb > /dev/null; mount /dev/vdb /mnt; echo before > /mnt/word; sync");
        let rate_limiter = Some(STANDS_STILL);
        guest.apply(Request::PatchDrive(DriveUpdate {
            drive_id: "goes".into(),
            rate_limiter,
            path_on_host: None,
        }));
        begin(&mut guest, "disk", "while dd if=/dev/vdb of=/dev/null bs=64k iflag=direct; do :; done; false");
        begin(&mut guest, "file", "dd if=/dev/zero of=/mnt/file bs=4k count=100 conv=fsync");
        is_held_back(&mut guest, "block_goes", 0);

        guest.apply(Request::DeleteDrive("goes".into()));
        guest.run("sleep 2");
        assert_eq!(drives(&mut guest), ["stays", "goes"], "it waits for its requests first");
        assert!(!has_ended(&mut guest, "disk") && !has_ended(&mut guest, "file"));

        guest.apply(Request::DeleteDrive("goes".into()));
        assert_eq!(drives(&mut guest), ["stays"]);
        assert!(!is_open(&guest, &path), "the host's side is free at once");
        fails(&mut guest, "disk");
        fails(&mut guest, "file");
        guest.run("while [ -e /sys/block/vdb ]; do sleep 0.1; done");
        guest.run("dd if=/dev/zero of=/mnt/file bs=4k count=100 conv=fsync || umount /mnt");
        while functions(&mut guest) == on_the_bus {
            guest.run("sleep 0.1");
        }

        let again = Drive { io_engine: None, ..goes };
        for _ in 0..times(2, 20) {
            guest.apply(Request::PutDrive(again.clone()));
            guest.run("until [ -b /dev/vdb ]; do sleep 0.1; done; mount -o ro /dev/vdb /mnt");
            assert_eq!(guest.run("cat /mnt/word; umount /mnt"), "before\n");
            assert_eq!(functions(&mut guest), on_the_bus, "the slot that it had is free");
            guest.apply(Request::DeleteDrive("goes".into()));
            guest.run("while [ -e /sys/block/vdb ]; do sleep 0.1; done");
            while drives(&mut guest).len() > 1 {
                guest.run("sleep 0.1");
            }
        }
        guest.run("echo still here | dd of=/dev/vda conv=fsync");
        guest.power_off();
    }
}

#[test]
fn its_id_and_its_file_are_free_while_the_guest_has_not_let_go_of_it() {
    let place = tempfile::tempdir().unwrap();
    let goes = disk_drive("goes", blank_disk(place.path().join("goes"), MIB));
    let mut guest = guest(vec![disk_drive("stays", blank_disk(place.path().join("stays"), MIB))]);
    let on_the_bus = functions(&mut guest);
    // A paused guest lets go of nothing, so each of these keeps one of the bus's 31 slots.
    guest.pause();
    for taken in 0..29 {
        guest.apply(Request::PutDrive(goes.clone()));
        for _ in 0..2 {
            guest.apply(Request::DeleteDrive("goes".into()));
        }
        assert_eq!(drives(&mut guest), ["stays"], "{taken}");
    }
    guest.apply(Request::PutDrive(goes.clone()));
    let another = |number: u32| Request::PutDrive(Drive { drive_id: format!("d{number}"), ..goes.clone() });
    refused(&mut guest, &another(0), &["all 31 PCI slots", "not let go of"]);
    guest.resume();
    guest.run("until grep -qs goes /sys/block/*/serial; do sleep 0.1; done");
    while guest.vmm.log().matches("is free.").count() < 29 {
        guest.run("sleep 0.1");
    }
    assert_eq!(functions(&mut guest), on_the_bus + 1);
    for number in 0..29 {
        guest.apply(another(number));
    }
    while functions(&mut guest) < on_the_bus + 30 {
        guest.run("sleep 0.1");
    }
    guest.power_off();
}

#[test]
fn persistent_memory_that_is_taken_away_in_the_middle_of_a_flush_fails_it_and_comes_again() {
    let place = tempfile::tempdir().unwrap();
    let mut guest = guest(vec![disk_drive("stays", blank_disk(place.path().join("stays"), MIB))]);
    guest.run("modprobe virtio_pmem; modprobe nd_pmem");
    let path_on_host = blank_disk(place.path().join("memory"), 16 * MIB);
    let pmem = Pmem { id: "memory".into(), path_on_host: path_on_host.clone(), ..Pmem::default() };
    for _ in 0..times(2, 20) {
        guest.apply(Request::PutPmem(pmem.clone()));
        guest.run("until [ -b /dev/pmem0 ]; do sleep 0.1; done");
        guest.run("echo word | dd of=/dev/pmem0 conv=fsync");
        assert_eq!(&fs::read(&path_on_host).unwrap()[..4], b"word");
        let before = guest.metric("pmem_memory", "rate_limiter_throttled_events");
        let rate_limiter = Some(STANDS_STILL);
        guest.apply(Request::PatchPmem(PmemUpdate { id: "memory".into(), rate_limiter }));
        begin(
            &mut guest,
            "flush",
            "while echo other | dd of=/dev/pmem0 seek=8 conv=notrunc,fsync; do :; done; false",
        );
        is_held_back(&mut guest, "pmem_memory", before);
        guest.apply(Request::DeletePmem("memory".into()));
        guest.run("sleep 2");
        assert_eq!(guest.api.vm_config().unwrap().pmem.len(), 1, "it waits for the flush first");
        assert!(!has_ended(&mut guest, "flush"));
        guest.apply(Request::DeletePmem("memory".into()));
        assert_eq!(guest.api.vm_config().unwrap().pmem, []);
        assert!(!is_open(&guest, &path_on_host));
        let maps = fs::read_to_string(format!("/proc/{}/maps", guest.vmm.pid())).unwrap();
        assert!(!maps.contains(&path_on_host.display().to_string()), "{maps}");
        fails(&mut guest, "flush");
        guest.run("while [ -e /sys/block/pmem0 ]; do sleep 0.1; done");
    }
    guest.power_off();
}

#[test]
fn an_interface_that_is_taken_away_with_packets_held_back_is_gone_and_comes_again() {
    let tap = Tap::new(25, &["user", "root"]);
    let place = tempfile::tempdir().unwrap();
    let mut guest = guest(vec![disk_drive("stays", blank_disk(place.path().join("stays"), MIB))]);
    guest.run("modprobe virtio_net");
    for _ in 0..times(2, 20) {
        guest.apply(Request::PutNetworkInterface(tap.interface()));
        guest.run("until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done");
        tap.set_up(&mut guest, "eth0", None);
        host("ping", &["-c", "1", "-W", "30", &tap.guest()]);
        let before = guest.metric("net", "tx_rate_limiter_throttled");
        let limits = Some(STANDS_STILL);
        guest.apply(Request::PatchNetworkInterface(NetworkInterfaceUpdate {
            iface_id: tap.name(),
            rx_rate_limiter: limits,
            tx_rate_limiter: limits,
        }));
        guest.run(&format!("(ping -A -s 1400 {} > /dev/null 2>&1 &)", tap.host()));
        while guest.metric("net", "tx_rate_limiter_throttled") <= before {
            guest.run("sleep 0.1");
        }
        guest.delete(&Request::DeleteNetworkInterface(tap.name()), 2);
        assert_eq!(guest.api.vm_config().unwrap().network_interfaces, []);
        // Its tap is free, whether the guest has let go or not: another one can be made of it.
        assert!(!is_open(&guest, &PathBuf::from("/dev/net/tun")));
        guest.run("while [ -e /sys/class/net/eth0 ]; do sleep 0.1; done; killall ping; true");
    }
    guest.power_off();
}

#[test]
fn a_disk_whose_back_end_hangs_or_is_gone_is_taken_away_and_its_requests_fail() {
    let first = StorageDaemon::blank(4 * MIB);
    let mut second = StorageDaemon::blank(4 * MIB);
    let mut guest = guest(vec![first.drive("first")]);
    for hangs in [true, false] {
        guest.apply(Request::PutDrive(second.drive("second")));
        guest.run("until [ -b /dev/vdb ]; do sleep 0.1; done; printf plugged | dd of=/dev/vdb conv=fsync");
        match hangs {
            true => second.hang(true),
            false => second.kill(),
        }
        let requests = guest.metric("vhost_user_block_second", "queue_event_count");
        begin(&mut guest, "read", "dd if=/dev/vdb of=/dev/null bs=64k iflag=direct");
        while guest.metric("vhost_user_block_second", "queue_event_count") == requests {
            guest.run("sleep 0.1");
        }
        guest.apply(Request::DeleteDrive("second".into()));
        guest.run("sleep 2");
        assert!(!has_ended(&mut guest, "read"));
        guest.apply(Request::DeleteDrive("second".into()));
        assert_eq!(drives(&mut guest), ["first"]);
        fails(&mut guest, "read");
        guest.run("while [ -e /sys/block/vdb ]; do sleep 0.1; done");
        match hangs {
            true => second.hang(false),
            false => second.start(),
        }
    }
    guest.run("printf still | dd of=/dev/vda conv=fsync");
    guest.power_off();
}

#[test]
fn persistent_memory_that_is_taken_away_while_programs_and_another_disk_use_it_ends_at_most_these_programs() {
    let place = tempfile::tempdir().unwrap();
    let stays = disk_drive("stays", blank_disk(place.path().join("stays"), 16 * MIB));
    let arguments = ["--metrics-path", "metrics"].map(String::from).into();
    let drives = vec![debian_drive(), stays];
    let mut guest = Guest::booted(Setup { drives, vcpus: 2, memory_mib: 256, arguments, ..Setup::default() });
    guest.mount_debian();
    let path_on_host = blank_disk(place.path().join("memory"), 64 * MIB);
    guest.run("modprobe virtio_pmem; modprobe nd_pmem; mkdir -p /debian/mnt");
    guest.apply(Request::PutPmem(Pmem { id: "memory".into(), path_on_host, ..Pmem::default() }));
    guest.run("until [ -b /dev/pmem0 ]; do sleep 0.1; done; mke2fs -b 4096 /dev/pmem0 > /dev/null");
    guest.run("mount -t ext4 -o dax /dev/pmem0 /debian/mnt; cp /bin/busybox /debian/mnt");
    guest.run("dd if=/dev/zero of=/debian/mnt/buffer bs=1M count=4");
    begin(
        &mut guest,
        "program",
        "/debian/mnt/busybox sh -c 'while :; do /debian/mnt/busybox usleep 20000; done'",
    );
    begin(
        &mut guest,
        "copies",
        "while dd if=/dev/zero of=/debian/mnt/copy bs=64k count=64 conv=fsync,notrunc; do :; done; false",
    );
    // What it reads from a disk goes straight into persistent memory.
    begin(
        &mut guest,
        "transfers",
        "chroot /debian fio --name=t --filename=/dev/vdb --direct=1 --ioengine=psync --rw=randread --bs=4k \
         --iomem=mmapshared:/mnt/buffer --time_based --runtime=600",
    );
    while guest.metric("block_stays", "read_count") < 50 {
        guest.run("sleep 0.1");
    }
    for _ in 0..2 {
        guest.apply(Request::DeletePmem("memory".into()));
    }
    let before = guest.metric("block_stays", "read_count");
    guest.run("echo still here | dd of=/dev/vdb conv=fsync,notrunc");
    guest.run("dd if=/dev/vdb of=/dev/null bs=64k iflag=direct");
    assert!(guest.metric("block_stays", "read_count") > before);
    fails(&mut guest, "copies");
    for name in ["program", "transfers"] {
        guest.run(&format!("until [ -e /run/{name}.ended ]; do sleep 0.1; done"));
    }
    guest.run("while [ -e /sys/block/pmem0 ]; do sleep 0.1; done");
    guest.power_off();
}
