//! A running guest's memory grows and shrinks. What it has plugged is its own, what it has unplugged is the host's, and what
//! it has not plugged it does not reach.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::thread::sleep;
use std::time::{Duration, Instant};

use api_socket::{
    ActionType, Balloon, BalloonUpdate, MemoryHotplugConfig, MemoryHotplugSizeUpdate, MemoryHotplugStatus,
    Request,
};
use berth_tests::footprint::Footprint;
use berth_tests::guest::huge_pages::HugePages;
use berth_tests::guest::{Guest, Name, Setup, limits};

/// MiB that the guest starts with, and that it can plug.
const MEMORY: u64 = 128;
const TOTAL: u64 = 1024;
/// MiB that a guest needs beside for what it knows of 512 MiB, at most, and for what it does meanwhile.
const SLACK: u64 = 40;
/// Where the guest finds the region: 64 GiB of PCI window above 4 GiB.
const REGION: u64 = 68 << 30;

fn plug(total_size_mib: u64) -> MemoryHotplugConfig {
    MemoryHotplugConfig { total_size_mib, ..MemoryHotplugConfig::default() }
}

fn setup(name: Name) -> Setup {
    Setup {
        name,
        memory_mib: MEMORY,
        memory_hotplug: Some(plug(TOTAL)),
        // What is movable can be unplugged again.
        command_line: "memhp_default_state=online_movable".into(),
        arguments: ["--metrics-path", "metrics"].map(String::from).into(),
        ..Setup::default()
    }
}

/// KiB that the guest has.
fn total(guest: &mut Guest) -> u64 {
    guest.number("awk '/MemTotal/ {print $2}' /proc/meminfo")
}

/// MiB that the VMM has.
fn resident(guest: &Guest) -> u64 {
    guest.vmm.status_kib("VmRSS") >> 10
}

fn status(guest: &mut Guest) -> MemoryHotplugStatus {
    guest.api.memory_hotplug().unwrap()
}

fn request(guest: &mut Guest, requested_size_mib: u64) {
    guest.apply(Request::PatchMemoryHotplug(MemoryHotplugSizeUpdate { requested_size_mib }));
}

#[track_caller]
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < limits::COMMAND, "not yet: {what}");
        sleep(Duration::from_millis(200));
    }
}

#[track_caller]
fn plugged(guest: &mut Guest, mib: u64) {
    wait_until("it is plugged", || status(guest).plugged_size_mib == mib);
}

/// Uses so many MiB, and keeps them.
fn fill(guest: &mut Guest, mib: u64) {
    guest.run("mkdir -p /fill; mount -t tmpfs -o size=100% fill /fill");
    let zeros = format!("dd if=/dev/zero of=/fill/zeros bs=1M count={mib}");
    guest.run_within(&zeros, limits::COMMAND * 2);
}

/// Tells 32 MiB that are no zeros.
const PIECES: &str = "for i in $(seq 32); do cat /piece; done";

/// Writes something where [`fill`] has filled.
fn write(guest: &mut Guest) {
    guest.run("yes full | head -c 1m > /piece");
    guest.run(&format!("{PIECES} > /fill/written"));
}

/// What was written is there, and nothing else.
fn is_there(guest: &mut Guest) {
    guest.run(&format!("[ \"$({PIECES} | md5sum)\" = \"$(md5sum < /fill/written)\" ]"));
}

fn let_go(guest: &mut Guest) {
    guest.run("umount /fill");
}

#[test]
fn a_running_guest_has_more_memory_and_less_again() {
    grows_and_shrinks(Name::Berth);
}

#[test]
fn a_running_guest_has_more_memory_and_less_again_without_pci() {
    grows_and_shrinks(Name::Firecracker);
}

fn grows_and_shrinks(name: Name) {
    let mut guest = Guest::booted(setup(name));
    assert_eq!(guest.api.vm_config().unwrap().memory_hotplug, Some(plug(TOTAL)));
    let nothing = MemoryHotplugStatus {
        total_size_mib: TOTAL,
        slot_size_mib: 128,
        block_size_mib: 2,
        ..MemoryHotplugStatus::default()
    };
    assert_eq!(status(&mut guest), nothing);
    let (first, least) = (total(&mut guest), resident(&guest));
    for round in 1..=2 {
        request(&mut guest, 512);
        plugged(&mut guest, 512);
        // The device has given it all before the guest's kernel has put the last of it to use.
        wait_until("it is the guest's to the page", || total(&mut guest) == first + (512 << 10));
        let before = resident(&guest);
        assert!(before < least + SLACK, "what is only there costs nothing: {least} MiB became {before}");
        fill(&mut guest, 400);
        let full = resident(&guest);
        assert!(full > least + 400 && full < least + 400 + SLACK, "{least} MiB became {full}");
        let_go(&mut guest);
        assert!(resident(&guest) > least + 400, "what is free in the guest is not the host's");

        guest.pause();
        request(&mut guest, 0);
        sleep(Duration::from_secs(1));
        assert_eq!((status(&mut guest).plugged_size_mib, status(&mut guest).requested_size_mib), (512, 0));
        guest.resume();
        plugged(&mut guest, 0);
        wait_until("the guest has what it had", || total(&mut guest) == first);
        let after = resident(&guest);
        assert!(after < least + SLACK, "{full} MiB became {after}, {least} at first");
        assert_eq!(status(&mut guest), nothing);
        for counter in ["plug_bytes", "unplug_bytes"] {
            assert_eq!(guest.metric("memory_hotplug", counter), round * (512 << 20), "{counter}");
        }
    }
    assert!(guest.metric("memory_hotplug", "plug_count") >= 8);
    for fails in ["plug_fails", "unplug_fails", "unplug_discard_fails", "queue_event_fails", "state_fails"] {
        assert_eq!(guest.metric("memory_hotplug", fails), 0, "{fails}");
    }
    guest.power_off();
}

#[test]
fn a_guest_that_shrinks_keeps_what_it_has_written() {
    let mut guest = Guest::booted(setup(Name::Berth));
    request(&mut guest, 512);
    plugged(&mut guest, 512);
    fill(&mut guest, 128);
    write(&mut guest);
    for size in [256, TOTAL] {
        request(&mut guest, size);
        plugged(&mut guest, size);
        is_there(&mut guest);
    }
    // The guest gives what it can, and no more: what it began with does not hold so much.
    request(&mut guest, 0);
    wait_until("little is left", || status(&mut guest).plugged_size_mib < 256);
    sleep(Duration::from_secs(2));
    assert!(status(&mut guest).plugged_size_mib > 0);
    is_there(&mut guest);
    let_go(&mut guest);
    guest.power_off();
}

#[test]
fn a_guest_that_touches_what_it_has_not_plugged_reaches_nothing_and_costs_nothing() {
    let mut guest = Guest::booted(setup(Name::Berth));
    // With its driver the kernel keeps programs from it.
    guest.run("echo virtio0 > /sys/bus/virtio/drivers/virtio_mem/unbind");
    // Without the memory that it began with, of which its shell may touch more.
    let own = |guest: &Guest| Footprint::beyond_guest(guest.vmm.pid(), MEMORY).unwrap().rss_kib;
    let before = own(&guest);
    let end = REGION + (TOTAL << 20);
    guest.run(&format!(
        "at={REGION}; while [ $at -lt {end} ]; do devmem $at 32 0x12345678; \
         [ $(devmem $at 32) = 0xFFFFFFFF ] || exit 1; at=$((at + (4 << 20))); done"
    ));
    let after = own(&guest);
    assert!(after < before + 512, "{before} KiB became {after}");
    guest.run("echo virtio0 > /sys/bus/virtio/drivers/virtio_mem/bind");
    request(&mut guest, 256);
    plugged(&mut guest, 256);
    fill(&mut guest, 160);
    write(&mut guest);
    is_there(&mut guest);
    let_go(&mut guest);
    guest.power_off();
}

#[test]
fn a_balloon_and_reports_of_free_pages_take_from_what_was_plugged_too() {
    let balloon = Balloon { stats_polling_interval_s: 1, free_page_reporting: true, ..Balloon::default() };
    let mut guest = Guest::booted(Setup { balloon: Some(balloon), ..setup(Name::Berth) });
    let least = resident(&guest);
    request(&mut guest, 512);
    plugged(&mut guest, 512);
    fill(&mut guest, 400);
    assert!(resident(&guest) > 400);
    let_go(&mut guest);
    // Only free blocks of 2 MiB are reported: of the memory that it began with, some stays in smaller pieces.
    wait_until("free memory is the host's", || resident(&guest) < least + MEMORY);
    assert_eq!(status(&mut guest).plugged_size_mib, 512, "it is still the guest's");
    fill(&mut guest, 400);
    write(&mut guest);
    is_there(&mut guest);
    let_go(&mut guest);

    let mut inflate = |amount_mib| {
        guest.apply(Request::PatchBalloon(BalloonUpdate { amount_mib }));
        wait_until("the balloon has its size", || {
            guest.api.balloon_stats().unwrap().actual_mib == amount_mib
        });
    };
    inflate(100);
    inflate(0);
    assert_eq!(guest.metric("balloon", "event_fails"), 0);
    assert_eq!(guest.metric("balloon", "free_page_report_fails"), 0);
    request(&mut guest, 0);
    plugged(&mut guest, 0);
    let after = resident(&guest);
    assert!(after < least + SLACK, "{least} MiB became {after}");
    guest.power_off();
}

#[test]
fn with_huge_pages_what_is_plugged_has_its_pages_and_what_the_host_has_not_is_not_plugged() {
    let huge = HugePages::set_aside((MEMORY + 128) / 2);
    let before = HugePages::used();
    let huge_pages = api_socket::HugePages::Hugetlbfs2M;
    let mut guest = Guest::booted(Setup { huge_pages, ..setup(Name::Berth) });
    let used = || (HugePages::used() - before) * 2;
    assert!(used() <= MEMORY);
    request(&mut guest, 128);
    plugged(&mut guest, 128);
    assert!(used() > 128, "{} MiB", used());
    fill(&mut guest, 110);
    let_go(&mut guest);

    request(&mut guest, 256);
    wait_until("the host has no more", || guest.metric("memory_hotplug", "plug_fails") > 0);
    assert_eq!(status(&mut guest).plugged_size_mib, 128);
    request(&mut guest, 128);
    let more = HugePages::set_aside(64);
    request(&mut guest, 256);
    plugged(&mut guest, 256);
    fill(&mut guest, 160);
    write(&mut guest);
    is_there(&mut guest);
    let_go(&mut guest);
    request(&mut guest, 0);
    plugged(&mut guest, 0);
    assert!(used() <= MEMORY, "{} MiB", used());
    guest.power_off();
    drop((more, huge));
}

#[test]
fn requests_that_make_no_sense_are_refused_and_change_nothing() {
    let mut guest = Guest::configured(setup(Name::Berth));
    let refused = |guest: &mut Guest, request: Request, word: &str| {
        let error = guest.api.apply(&request).unwrap_err().to_string();
        assert!(error.contains(word), "{request:?}: {error}");
    };
    let size =
        |requested_size_mib| Request::PatchMemoryHotplug(MemoryHotplugSizeUpdate { requested_size_mib });
    refused(&mut guest, size(0), "before starting");
    refused(&mut guest, Request::GetMemoryHotplug, "before starting");
    for bad in [plug(100), plug(0), MemoryHotplugConfig { block_size_mib: 3, ..plug(TOTAL) }] {
        refused(&mut guest, Request::PutMemoryHotplug(bad), "must be");
    }
    // More than any CPU reaches.
    let much = MemoryHotplugConfig { slot_size_mib: 1 << 15, block_size_mib: 1 << 10, ..plug(1 << 25) };
    guest.apply(Request::PutMemoryHotplug(much));
    refused(&mut guest, Request::Action(ActionType::InstanceStart), "total_size_mib");
    guest.apply(Request::PutMemoryHotplug(plug(TOTAL)));
    guest.boot();
    refused(&mut guest, Request::PutMemoryHotplug(plug(TOTAL)), "after starting");
    for bad in [1, 3, TOTAL + 2, u64::MAX] {
        refused(&mut guest, size(bad), "requested_size_mib");
    }
    assert_eq!(status(&mut guest).requested_size_mib, 0);
    guest.power_off();

    let mut without = Guest::booted(Setup { memory_hotplug: None, ..setup(Name::Berth) });
    for request in [size(0), Request::GetMemoryHotplug] {
        refused(&mut without, request, "PUT /hotplug/memory");
    }
    without.power_off();
}
