//! The jailer as a library: `main.rs` is the life of the process, everything else is here so that tests reach it.
//!
//! It builds a cell around one VMM process and becomes that process. It watches nothing: when the VMM runs, no jailer is
//! left, and its cell stays until it is told to remove it. It knows nothing of guests, and of the VMM only the five flags
//! that it is handed.

pub mod args;
pub mod cell;
pub mod cgroup;
pub mod claim;
pub mod dir;
pub mod error;
pub mod family;
pub mod handed;
pub mod ids;
pub mod inherited;
pub mod limits;
pub mod mounts;
pub mod namespaces;
pub mod remove;
pub mod undo;
pub mod vmm;
