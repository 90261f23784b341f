//! The seam between a device and the machine around it: message-signalled interrupts, doorbells, and a loop that calls a
//! device when a descriptor of its own is ready. `vmm` implements it on KVM; tests implement it with a fake.
//!
//! Wired interrupts need no seam: a chip raises its line by writing an [`EventFd`], which the VMM has bound to the
//! interrupt controller (irqfd).

use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

/// What a device may ask of its machine. Every call may come from a vCPU thread. A machine may have several loops; a device
/// is given the host whose loop is its own.
pub trait Host: Send + Sync {
    /// Reserves one message-signalled interrupt, disconnected. Fails when the machine's named limit is reached.
    fn msi(&self) -> io::Result<Box<dyn Msi>>;

    /// From now on a guest write that matches `doorbell` signals `fd` without leaving the kernel.
    fn ring(&self, doorbell: Doorbell, fd: &EventFd) -> io::Result<()>;

    /// Takes back a [`Host::ring`] with the same arguments.
    fn unring(&self, doorbell: Doorbell, fd: &EventFd) -> io::Result<()>;

    /// Calls `handler` with the token beside each descriptor whenever that descriptor is readable, until
    /// [`Host::unwatch`]. The descriptors stay the caller's and must outlive the watch.
    fn watch(&self, handler: Arc<Mutex<dyn Handler>>, sources: &[Source]) -> io::Result<WatchId>;

    /// Ends a watch. When this returns, the handler is not running and will not be called again.
    ///
    /// Must not be called with the handler's lock held: the loop may be waiting for it.
    fn unwatch(&self, id: WatchId);
}

/// One message-signalled interrupt. Dropping it gives the vector back.
///
/// Masking is disconnecting: what is raised meanwhile stays in the eventfd's counter (the pending bit) and is delivered
/// by the next [`Msi::connect`].
pub trait Msi: Send + Sync {
    /// Writing this raises the interrupt; may be cloned and written from any thread.
    fn trigger(&self) -> &EventFd;

    /// Delivers the message (`address`, `data`) for every raise from now on, and for those pending.
    fn connect(&mut self, address: u64, data: u32) -> io::Result<()>;

    /// Stops delivery. Nothing to do when disconnected.
    fn disconnect(&mut self) -> io::Result<()>;
}

/// Something a [`Host`]'s loop calls.
pub trait Handler: Send {
    /// The descriptor watched under `token` is readable. Must not block.
    fn ready(&mut self, token: u32);
}

/// A guest write that stands for a kick.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Doorbell {
    /// Guest-physical.
    pub address: u64,
    /// `None`: any write of any width. Otherwise a 32-bit write of just this value.
    pub value: Option<u32>,
}

/// A descriptor to watch for reading, level-triggered, and the token that names it to the handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    pub fd: RawFd,
    pub token: u32,
}

/// Names a watch for [`Host::unwatch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WatchId(pub u64);
