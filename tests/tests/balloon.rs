//! Memory that a guest gives up goes back to the host, which is seen in how much the VMM has, and the guest can have it
//! again: by a balloon of the size that is asked for, by hints, and by reports.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::thread::sleep;
use std::time::{Duration, Instant};

use api_socket::{Balloon, BalloonStartCmd, BalloonStats, BalloonStatsUpdate, BalloonUpdate, Request};
use berth_tests::guest::huge_pages::HugePages;
use berth_tests::guest::{Guest, Name, Setup, limits};

/// MiB of the guest.
const MEMORY: u64 = 256;
/// MiB that the guest has never touched after [`fill`], at most; and that the VMM has beside the guest's.
const SLACK: u64 = 40;
const OVERHEAD: u64 = 8;

fn setup(balloon: Balloon) -> Setup {
    let arguments = ["--metrics-path", "metrics"].map(String::from).into();
    Setup { memory_mib: MEMORY, balloon: Some(balloon), arguments, ..Setup::default() }
}

/// With statistics, which tell the size of the balloon.
fn plain() -> Balloon {
    Balloon { stats_polling_interval_s: 1, ..Balloon::default() }
}

/// Writes to nearly all of the guest's memory that is free, and keeps it.
fn fill(guest: &mut Guest) {
    guest.run("mkdir -p /fill; mount -t tmpfs -o size=100% fill /fill; yes full | head -c 1m > /piece");
    guest.run(
        "count=$(awk '/MemAvailable/ {print int($2 / 1024) - 24}' /proc/meminfo); \
         while [ $count -gt 0 ]; do cat /piece; count=$((count - 1)); done > /fill/file; [ -s /fill/file ]",
    );
}

/// What [`fill`] wrote is there: what is given back too much would be zeros.
fn is_full(guest: &mut Guest) {
    let other = guest.run_within("tr -d 'ful\\n' < /fill/file | wc -c", limits::COMMAND * 2);
    assert_eq!(other.trim(), "0");
}

fn let_go(guest: &mut Guest) {
    guest.run("umount /fill");
}

/// MiB that the VMM has.
fn resident(guest: &Guest) -> u64 {
    guest.vmm.status_kib("VmRSS") >> 10
}

#[track_caller]
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < limits::COMMAND, "not yet: {what}");
        sleep(Duration::from_millis(200));
    }
}

fn stats(guest: &mut Guest) -> BalloonStats {
    guest.api.balloon_stats().unwrap()
}

fn resize(guest: &mut Guest, amount_mib: u32) {
    guest.apply(Request::PatchBalloon(BalloonUpdate { amount_mib }));
}

#[track_caller]
fn resized(guest: &mut Guest, amount_mib: u32) {
    resize(guest, amount_mib);
    wait_until("the balloon has its size", || stats(guest).actual_mib == amount_mib);
    assert_eq!(stats(guest).target_pages, amount_mib * 256);
}

#[test]
fn what_is_in_the_balloon_is_the_host_s_and_what_is_out_of_it_the_guest_s() {
    grows_and_shrinks(Name::Berth);
}

#[test]
fn what_is_in_the_balloon_is_the_host_s_and_what_is_out_of_it_the_guest_s_without_pci() {
    grows_and_shrinks(Name::Firecracker);
}

fn grows_and_shrinks(name: Name) {
    let mut guest = Guest::booted(Setup { name, ..setup(plain()) });
    for _ in 0..2 {
        fill(&mut guest);
        let full = resident(&guest);
        assert!(full > MEMORY - SLACK, "{full} MiB");
        let_go(&mut guest);
        assert!(resident(&guest) > MEMORY - SLACK, "without a balloon the VMM keeps it");
        resized(&mut guest, 100);
        let less = resident(&guest);
        assert!(less < MEMORY - 100 + OVERHEAD, "{full} MiB became {less}");
        guest.run("[ $(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) -lt 156 ]");
        resized(&mut guest, 0);
    }
    fill(&mut guest);
    assert!(resident(&guest) > MEMORY - SLACK, "the guest has it again");
    assert!(guest.metric("balloon", "inflate_count") >= 200);
    assert!(guest.metric("balloon", "deflate_count") >= 200);
    assert_eq!(guest.metric("balloon", "event_fails"), 0);
    guest.power_off();
}

#[test]
fn a_balloon_that_is_there_at_the_start_and_one_that_changes_in_a_pause_get_their_size() {
    let mut guest = Guest::booted(setup(Balloon { amount_mib: 64, ..plain() }));
    wait_until("the balloon has its first size", || stats(&mut guest).actual_mib == 64);
    guest.pause();
    resize(&mut guest, 32);
    assert_eq!(guest.api.balloon().unwrap().amount_mib, 32);
    sleep(Duration::from_secs(1));
    assert_eq!(stats(&mut guest).actual_mib, 64);
    guest.resume();
    wait_until("the balloon has its second size", || stats(&mut guest).actual_mib == 32);
    guest.power_off();
}

/// More than the guest has beside the balloon.
const HUNGRY: &str = "dd if=/dev/zero of=/dev/null bs=100M count=1 2> /dev/null";

#[test]
fn a_guest_that_needs_memory_takes_it_out_of_the_balloon_if_it_may_and_else_kills() {
    needs_memory(Name::Berth);
}

#[test]
fn a_guest_that_needs_memory_takes_it_out_of_the_balloon_if_it_may_and_else_kills_without_pci() {
    needs_memory(Name::Firecracker);
}

fn needs_memory(name: Name) {
    for deflate_on_oom in [true, false] {
        let balloon = Balloon { deflate_on_oom, ..plain() };
        let mut guest = Guest::booted(Setup { name, ..setup(balloon) });
        // Else a program that wants more than the guest has is refused, and not killed.
        guest.run("echo 1 > /proc/sys/vm/overcommit_memory");
        guest.run(HUNGRY);
        resize(&mut guest, 140);
        wait_until("the balloon is large", || stats(&mut guest).actual_mib > 130);
        let ended = guest.shell(HUNGRY);
        assert_eq!(ended.code == 0, deflate_on_oom, "{ended:?}");
        let kills = guest.number("awk '/^oom_kill / {print $2}' /proc/vmstat");
        assert_eq!(kills == 0, deflate_on_oom, "{kills} kills");
        guest.power_off();
    }
}

#[test]
fn free_pages_that_are_reported_go_back_by_themselves() {
    for name in [Name::Berth, Name::Firecracker] {
        let balloon = Balloon { free_page_reporting: true, ..Balloon::default() };
        let mut guest = Guest::booted(Setup { name, ..setup(balloon) });
        fill(&mut guest);
        assert!(resident(&guest) > MEMORY - SLACK);
        let_go(&mut guest);
        wait_until("free memory is the host's", || resident(&guest) < MEMORY / 2);
        let freed = guest.metric("balloon", "free_page_report_freed");
        assert!(freed > (MEMORY / 2) << 20, "{freed} bytes");
        assert_eq!(guest.metric("balloon", "free_page_report_fails"), 0);
        // The guest takes it again, as if nothing had been.
        fill(&mut guest);
        is_full(&mut guest);
        assert!(resident(&guest) > MEMORY - SLACK);
        guest.power_off();
    }
}

#[test]
fn hints_that_are_asked_for_once_give_free_memory_back() {
    for name in [Name::Berth, Name::Firecracker] {
        let balloon = Balloon { free_page_hinting: true, ..Balloon::default() };
        let mut guest = Guest::booted(Setup { name, ..setup(balloon) });
        let status = |guest: &mut Guest| {
            let status = guest.api.balloon_hinting_status().unwrap();
            (status.host_cmd, status.guest_cmd)
        };
        assert_eq!(status(&mut guest), (0, None));
        for (run, acknowledge_on_stop) in [(2, true), (3, false)] {
            fill(&mut guest);
            let_go(&mut guest);
            guest.run("echo 1 > /proc/sys/vm/compact_memory");
            let full = resident(&guest);
            assert!(full > MEMORY - SLACK, "{full} MiB");
            let start = BalloonStartCmd { acknowledge_on_stop };
            guest.apply(Request::StartBalloonHinting(start));
            let end = if acknowledge_on_stop { 1 } else { run };
            wait_until("the run is at its end", || status(&mut guest) == (end, Some(0)));
            // Only free blocks of 4 MiB in one piece are named, and how many there are is chance.
            let less = resident(&guest);
            assert!(less < full - 60, "{full} MiB became {less}");
            guest.apply(Request::StopBalloonHinting);
            assert_eq!(status(&mut guest).0, 1);
        }
        assert!(guest.metric("balloon", "free_page_hint_freed") > 120 << 20);
        assert_eq!(guest.metric("balloon", "free_page_hint_fails"), 0);
        fill(&mut guest);
        is_full(&mut guest);
        guest.power_off();
    }
}

#[test]
fn a_guest_on_huge_pages_gives_whole_ones_back() {
    let _huge = HugePages::set_aside(MEMORY / 2);
    let balloon = Balloon { free_page_reporting: true, ..Balloon::default() };
    let before = HugePages::used();
    let huge_pages = api_socket::HugePages::Hugetlbfs2M;
    let mut guest = Guest::booted(Setup { huge_pages, ..setup(balloon) });
    fill(&mut guest);
    let used = || (HugePages::used() - before) * 2;
    assert!(used() > MEMORY - SLACK);
    let_go(&mut guest);
    wait_until("free memory is the host's", || used() < MEMORY / 2);
    assert_eq!(guest.metric("balloon", "free_page_report_fails"), 0);
    fill(&mut guest);
    guest.power_off();
}

#[test]
fn a_guest_tells_of_its_memory() {
    tells_of_memory(Name::Berth);
}

#[test]
fn a_guest_tells_of_its_memory_without_pci() {
    tells_of_memory(Name::Firecracker);
}

fn tells_of_memory(name: Name) {
    let mut guest = Guest::booted(Setup { name, ..setup(plain()) });
    wait_until("the guest has told", || stats(&mut guest).total_memory.is_some());
    let first = stats(&mut guest);
    let total = first.total_memory.unwrap();
    let there = guest.number("awk '/MemTotal/ {print $2}' /proc/meminfo") << 10;
    assert_eq!(total, there);
    assert!(first.free_memory.unwrap() < total && first.available_memory.unwrap() < total, "{first:?}");
    assert!(first.minor_faults.unwrap() > 0 && first.disk_caches.unwrap() > 0, "{first:?}");
    assert_eq!(first.oom_kill, Some(0));
    fill(&mut guest);
    let quarter = total / 4;
    wait_until("the guest has told again", || stats(&mut guest).free_memory.unwrap() < quarter);
    // Rarely, and then often again.
    let interval = |stats_polling_interval_s| {
        Request::PatchBalloonStats(BalloonStatsUpdate { stats_polling_interval_s })
    };
    guest.apply(interval(3600));
    let_go(&mut guest);
    sleep(Duration::from_secs(3));
    assert!(stats(&mut guest).free_memory.unwrap() < quarter);
    guest.apply(interval(1));
    wait_until("the guest has told once more", || stats(&mut guest).free_memory.unwrap() > quarter);
    for refused in [interval(0), Request::PatchBalloon(BalloonUpdate { amount_mib: 257 })] {
        assert!(guest.api.apply(&refused).is_err());
    }
    assert_eq!(guest.metric("balloon", "stats_update_fails"), 0);
    assert!(guest.metric("balloon", "stats_updates_count") > 2);
    guest.power_off();
}
