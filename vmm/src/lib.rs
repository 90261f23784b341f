//! The virtual machine monitor as a library: `main.rs` is the life of the process, everything else is here so that
//! tests and fuzz targets reach it.

pub mod admit;
pub mod args;
pub mod boot;
pub mod io_thread;
pub mod logger;
pub mod memory;
pub mod metrics;
pub mod sink;
pub mod vcpu;
pub mod x86_64;
