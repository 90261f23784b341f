//! Device models: what a guest can touch. Nothing here knows KVM, JSON, paths or threads; the machine around a device is
//! the small seam in [`host`], which the VMM implements on KVM and the tests with a fake.
//!
//! A guest can cause most log lines of this crate at will. Whoever takes them keeps a limit, as the VMM's logger does.

pub mod acpi_pm;
pub mod backend;
pub mod bus;
pub mod host;
pub mod i8042;
pub mod memory;
pub mod pci;
pub mod pvpanic;
pub mod random;
pub mod rtc;
pub mod serial;
pub mod state;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod times;
pub mod virtio;
pub mod vmgenid;
