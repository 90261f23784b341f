//! The virtual machine monitor as a library: `main.rs` is the life of the process, everything else is here so that
//! tests and fuzz targets reach it.

pub mod admit;
pub mod args;
pub mod balloon;
pub mod boot;
pub mod boot_timer;
pub mod config;
pub mod control;
pub mod exit_status;
pub mod faults;
pub mod file_memory;
pub mod guest;
pub mod handed;
pub mod heap;
pub mod host;
pub mod hotplug_memory;
pub mod io_thread;
pub mod logger;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod program;
pub mod sandbox;
pub mod signals;
pub mod sink;
pub mod slots;
pub mod terminal;
pub mod vcpu;
pub mod vm;
pub mod x86_64;
