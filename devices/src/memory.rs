//! The one gate to guest bytes. A guest number becomes host memory only through these types, and that can fail.
//!
//! Does not allocate or map memory: the VMM builds it and hands out [`Memory`].

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Guest RAM as one consistent view: regions sorted by guest-physical address, with the hole below 4 GiB between them.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;

/// A handle to guest RAM that follows changes of the region list (hot-added memory). Take a view with `memory()` once per
/// batch of work, not once per access.
pub type Memory = vm_memory::GuestMemoryAtomic<GuestRam>;

/// Whether a device may write to all of a range of guest memory. It may not where a region was made to be read only, a file
/// that the guest cannot write to: what a device writes there would be memory of this process's beside the guest's RAM, as
/// much as the file is long.
pub fn is_writable(memory: &GuestRam, start: GuestAddress, bytes: u64) -> bool {
    let last = GuestAddress(start.0.saturating_add(bytes.saturating_sub(1)));
    let is_in = |region: &Region| region.start_addr() <= last && start <= region.last_addr();
    !memory.iter().any(|region| region.prot() & libc::PROT_WRITE == 0 && is_in(region))
}

type Region = <GuestRam as GuestMemoryBackend>::R;
