//! The daemon as a library: `main.rs` is the life of the process, everything else is here so that tests reach it.
//!
//! It makes guests through the jailer and watches their processes. It may be killed at any moment: what it knows is in files,
//! and guests go on without it. It does not know KVM, devices, or what is in an image.

pub mod adopt;
pub mod cell;
pub mod change;
pub mod config;
pub mod copy;
pub mod events;
pub mod feed;
pub mod fleet;
pub mod guest;
pub mod images;
pub mod logger;
pub mod metrics;
pub mod network;
pub mod operations;
pub mod process;
pub mod record;
pub mod serve;
pub mod spawn;
pub mod state;
pub mod store;
pub mod systemd;
pub mod tap;
#[cfg(test)]
mod testing;
pub mod usage;
pub mod vmm_api;
pub mod watch;
pub mod workers;
