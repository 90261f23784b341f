//! What clients ask of a running guest's balloon, in their words.

use api_socket::{BalloonHintingStatus, BalloonStats, Fault};
use devices::virtio::balloon::{Balloon, Statistics};

/// Pages of 4 KiB in so many MiB. What the configuration lets through fits.
pub fn pages(mib: u32) -> u32 {
    mib.saturating_mul(PAGES_PER_MIB)
}

const PAGES_PER_MIB: u32 = 256;

/// The reply of `GET /balloon/statistics`.
pub fn stats(balloon: &Balloon) -> BalloonStats {
    let (target, actual) = balloon.pages();
    let said = |tag| balloon.statistics().get(tag);
    BalloonStats {
        target_pages: target,
        actual_pages: actual,
        target_mib: target / PAGES_PER_MIB,
        actual_mib: actual / PAGES_PER_MIB,
        swap_in: said(Statistics::SWAP_IN),
        swap_out: said(Statistics::SWAP_OUT),
        major_faults: said(Statistics::MAJOR_FAULTS),
        minor_faults: said(Statistics::MINOR_FAULTS),
        free_memory: said(Statistics::FREE),
        total_memory: said(Statistics::TOTAL),
        available_memory: said(Statistics::AVAILABLE),
        disk_caches: said(Statistics::CACHES),
        hugetlb_allocations: said(Statistics::HUGETLB_ALLOCATIONS),
        hugetlb_failures: said(Statistics::HUGETLB_FAILURES),
        oom_kill: said(Statistics::OOM_KILL),
        alloc_stall: said(Statistics::ALLOC_STALL),
        async_scan: said(Statistics::ASYNC_SCAN),
        direct_scan: said(Statistics::DIRECT_SCAN),
        async_reclaim: said(Statistics::ASYNC_RECLAIM),
        direct_reclaim: said(Statistics::DIRECT_RECLAIM),
    }
}

/// The reply of `GET /balloon/hinting/status`.
pub fn hinting_status(balloon: &Balloon) -> BalloonHintingStatus {
    let status = balloon.hinting();
    BalloonHintingStatus { host_cmd: status.host, guest_cmd: status.guest }
}

/// Free page hints were asked for and `taken` says that the guest's driver does not give them.
pub fn check_hinting(configured: bool, taken: bool) -> Result<(), Fault> {
    let why = match (configured, taken) {
        (true, true) => return Ok(()),
        (true, false) => {
            "the guest's driver has not taken it (yet); does it run, and does it know free page hints?"
        }
        (false, _) => "set it with PUT /balloon before the start.",
    };
    Err(Fault::bad_request(format!(
        "`free_page_hinting` is {configured}, and without it there are no hints: {why}"
    )))
}
