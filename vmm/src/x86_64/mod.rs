//! What is particular to x86_64: the map of the machine, its CPUs as a guest first sees them, its interrupt controllers
//! and the tables that describe all of it: those of ACPI, and an older one.
//!
//! Functions over plain data, in the order in which a machine is built; who owns the KVM descriptors and when these are
//! called is the caller's business.

pub mod acpi;
pub mod capabilities;
pub mod cpuid;
pub mod interrupts;
pub mod layout;
pub mod mptable;
pub mod msr;
pub mod ports;
pub mod registers;
pub mod reset_vector;
