//! The one gate to guest bytes. A guest number becomes host memory only through these types, and that can fail.
//!
//! Does not allocate or map memory: the VMM builds it and hands out [`Memory`].

/// Guest RAM as one consistent view: regions sorted by guest-physical address, with the hole below 4 GiB between them.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;

/// A handle to guest RAM that follows changes of the region list (hot-added memory). Take a view with `memory()` once per
/// batch of work, not once per access.
pub type Memory = vm_memory::GuestMemoryAtomic<GuestRam>;
