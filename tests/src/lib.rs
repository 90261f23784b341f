//! What the tests need: a Linux host with KVM anywhere ([`host`]), what guests boot ([`assets`]), and guests
//! ([`guest`]).
//!
//! The tests themselves are in `tests/tests/`, one file for each promise, and run inside such a host, where
//! `berth-host test` starts them; the benchmark is `src/bin/berth-bench/`. The map of the source tree is tested here, for
//! it needs no guest.

pub mod assets;
pub mod attack;
pub mod berthd;
pub mod book;
pub mod calls;
pub mod cell;
#[cfg(test)]
mod contents;
pub mod filters;
pub mod footprint;
pub mod guest;
pub mod host;
pub mod inject;
pub mod machine;
#[cfg(test)]
mod map;
#[cfg(test)]
mod security_doc;
