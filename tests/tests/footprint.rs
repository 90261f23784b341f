//! What a VMM takes of the host beyond its guest's memory is little, and stays so.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use berth_tests::footprint::Footprint;
use berth_tests::guest::{Guest, Name, Setup};

/// With one vCPU and 128 MiB, at the guest's shell. The API's connection and the log at its longest are part of it.
const MAX_RSS_KIB: u64 = 2560;
const MAX_PRIVATE_KIB: u64 = 2560;
const MAX_ANONYMOUS_KIB: u64 = 512;

/// More than the pages that a first request, a first log line and the like make resident.
const MAX_GROWTH_KIB: u64 = 128;

/// As many bring what is allocated once.
const FIRST: usize = 20;

/// Enough that a leak of one page each would show.
const REQUESTS: usize = 200;

fn footprint(guest: &Guest) -> Footprint {
    Footprint::beyond_guest(guest.vmm.pid(), guest.setup().memory_mib).unwrap()
}

fn is_small(name: Name) {
    let guest = Guest::booted(Setup { name, ..Setup::default() });
    let footprint = footprint(&guest);
    println!("{name:?}: {footprint}");
    assert!(footprint.rss_kib <= MAX_RSS_KIB, "{footprint}");
    assert!(footprint.private_kib <= MAX_PRIVATE_KIB, "{footprint}");
    assert!(footprint.anonymous_kib <= MAX_ANONYMOUS_KIB, "{footprint}");
}

#[test]
fn a_vmm_takes_at_most_2_5_mib_beyond_its_guest() {
    is_small(Name::Berth);
}

#[test]
fn a_vmm_without_pci_takes_at_most_2_5_mib_beyond_its_guest() {
    is_small(Name::Firecracker);
}

#[test]
fn requests_and_pauses_leave_nothing_behind() {
    let mut guest = Guest::booted(Setup::default());
    let mut ask = |times| {
        for _ in 0..times {
            guest.pause();
            guest.state();
            guest.resume();
        }
        footprint(&guest)
    };
    let before = ask(FIRST);
    let after = ask(REQUESTS);
    // Pages of the program come when they are first used; what is kept is anonymous.
    assert!(after.anonymous_kib <= before.anonymous_kib + MAX_GROWTH_KIB, "{before}; afterwards {after}");
}
