//! The agent inside of guests: how it gets there, and what it can be asked.
//!
//! - [`protocol`]: requests, replies and frames
//! - [`client`]: the host's half of it
//! - [`initramfs`]: the archive that brings the agent into a guest
//! - [`files`]: files and directories as an archive, for both halves
//!
//! The agent itself is the program `berth-agent`, from the modules of `main.rs`. None of this knows the VMM or its API.

#![forbid(unsafe_code)]

pub mod client;
pub mod files;
pub mod initramfs;
pub mod protocol;
