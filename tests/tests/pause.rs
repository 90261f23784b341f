//! A guest that is paused stands still, and one that is resumed goes on as if nothing had been: no I/O is lost, no watchdog
//! barks, and the time of day is right.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::thread::sleep;
use std::time::{Duration, SystemTime};

use api_socket::InstanceState;
use berth_tests::guest::setup::disk_drive;
use berth_tests::guest::{Guest, Name, Setup, blank_disk, debian_drive, limits, times};

/// Lengths of running and standing, in milliseconds: unlike ones, so that cycles meet I/O in all its moments.
fn lengths(cycle: u32) -> (Duration, Duration) {
    let length = |factor: u32| Duration::from_millis((cycle * factor % 41).into());
    (length(17), length(7))
}

#[test]
fn a_hundred_pauses_under_disk_load_lose_nothing() {
    pauses_lose_nothing(Name::Berth);
}

#[test]
fn a_hundred_pauses_under_disk_load_lose_nothing_without_pci() {
    pauses_lose_nothing(Name::Firecracker);
}

fn pauses_lose_nothing(name: Name) {
    let directory = tempfile::tempdir().unwrap();
    let disk = blank_disk(directory.path().join("disk"), 64 << 20);
    let drives = vec![debian_drive(), disk_drive("disk", disk)];
    let mut guest = Guest::booted(Setup { name, drives, vcpus: 2, memory_mib: 256, ..Setup::default() });
    guest.mount_debian();
    // Each round writes blocks with checksums and reads them back.
    let fio = "chroot /debian fio --name=disk --filename=/dev/vdb --direct=1 --rw=randwrite --bsrange=512-64k \
               --ioengine=libaio --iodepth=8 --size=64m --io_size=8m --fsync=20 --verify=crc32c --verify_fatal=1 \
               --randrepeat=0";
    let round = format!("{fio} > /run/report 2>&1 && echo good >> /run/rounds || touch /run/failed");
    guest.run(&format!(
        "(while [ ! -e /run/stop ] && [ ! -e /run/failed ]; do {round}; done; touch /run/ended) &"
    ));
    for cycle in 0..times(100, 2000) {
        let (running, standing) = lengths(cycle);
        sleep(running);
        guest.pause();
        sleep(standing);
        guest.resume();
    }
    guest.run("touch /run/stop; while [ ! -e /run/ended ]; do sleep 1; done");
    let report = guest.run("cat /run/report");
    assert_ne!(guest.shell("[ -e /run/failed ]").code, 0, "{report}");
    assert!(guest.number("wc -l < /run/rounds") > 0, "{report}");
    guest.power_off();
}

#[test]
fn a_paused_guest_stands_still_and_says_so() {
    let mut guest = Guest::booted(Setup::default());
    assert_eq!(guest.state(), InstanceState::Running);
    guest.pause();
    assert_eq!(guest.state(), InstanceState::Paused);
    guest.pause();
    assert_eq!(guest.state(), InstanceState::Paused);

    let used = |guest: &Guest| guest.vmm.cpu_ticks();
    let before = used(&guest);
    guest.say("echo BERTH-''TYPED-WHILE-PAUSED");
    sleep(Duration::from_secs(2));
    assert!(!guest.console.text().contains("BERTH-TYPED-WHILE-PAUSED"), "it runs");
    assert!(used(&guest) - before <= 5, "it uses the processor");

    guest.resume();
    assert_eq!(guest.state(), InstanceState::Running);
    guest.console.wait_for("BERTH-TYPED-WHILE-PAUSED", limits::COMMAND);
    guest.resume();
    guest.power_off();
}

/// Longer than the guest's watchdogs wait: 20 s for a CPU that runs one task only, 21 s for RCU.
const LONG_PAUSE: Duration = Duration::from_secs(30);

#[test]
fn no_watchdog_of_the_guest_takes_a_pause_for_a_hang_and_its_clock_is_right() {
    let mut guest = Guest::booted(Setup { vcpus: 2, ..Setup::default() });
    // Busy with what RCU has to wait for, so that the pause is in the middle of something.
    guest.run("for cpu in 1 2; do (while :; do cat /proc/self/stat > /dev/null; done) & done; sleep 5");
    guest.pause();
    sleep(LONG_PAUSE);
    guest.resume();
    guest.run("sleep 5");
    let now = || SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let before = now();
    let there = guest.number("date +%s");
    assert!((before - 2..=now() + 2).contains(&there), "{there} there, {before} here");
    let complaints = guest.shell("dmesg | grep -iE 'lockup|rcu.*stall|blocked for more'");
    assert_eq!(complaints.text, "");
    guest.power_off();
}
