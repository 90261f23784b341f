//! What each fuzz target does with its bytes. A target is one function of a byte slice; `fuzz_targets/` gives it to the
//! engine, and `examples/seeds.rs` writes inputs to begin with.
//!
//! What is proven by a run: no panic, no overflow, no access that the address sanitizer sees, no endless loop, and the
//! properties asserted here.

pub mod agent;
pub mod api;
pub mod device;
pub mod fleet;
pub mod input;
pub mod kernel;
pub mod metadata;
pub mod pci;
pub mod ports;
pub mod qcow2;
pub mod queue;
pub mod saved_state;
pub mod vhost_user;
pub mod vsock;

use std::sync::Once;

/// Log lines are written, and thrown away: their formatting is code that a guest reaches.
pub fn log_to_nowhere() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = log::set_logger(&Nowhere);
        log::set_max_level(log::LevelFilter::Trace);
    });
}

struct Nowhere;

impl log::Log for Nowhere {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }

    fn log(&self, record: &log::Record) {
        std::hint::black_box(record.args().to_string());
    }

    fn flush(&self) {}
}
