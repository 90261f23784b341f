//! Ports that no device has and every guest writes to: KVM swallows the writes, which saves an exit for each.

use std::io;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

/// CONFIG_ADDRESS of PCI's configuration mechanism 1 (PCI Local Bus 3.0, 3.2.2.3.2), which this machine does not have:
/// reads find nothing there. Linux looks through all of bus 0 with it before it knows of ECAM, 42 writes.
const CONFIG_ADDRESS: u64 = 0xcf8;

/// Lets KVM swallow what is written to [`CONFIG_ADDRESS`], in any width. Once, before the guest runs.
pub fn swallow(vm: &VmFd) -> io::Result<()> {
    // KVM keeps the eventfd alive; nobody reads its counter, and one that is at its end stays there without harm.
    let nobody = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    Ok(vm.register_ioevent(&nobody, &IoEventAddress::Pio(CONFIG_ADDRESS), NoDatamatch)?)
}
