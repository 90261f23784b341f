//! `berth`, the command line: what a person asks of berthd, and what says whether this host can run guests.
//!
//! It knows no KVM but for the doctor's trial, and keeps nothing: all state is berthd's. `main.rs` is the life of the
//! process; everything else is here so that tests reach it.

pub mod args;
pub mod commands;
pub mod daemon;
pub mod doctor;
pub mod error;
pub mod exit;
mod keys;
mod outlet;
pub mod output;
pub mod packaging;
mod reach;
mod session;
mod signals;
mod terminal;
