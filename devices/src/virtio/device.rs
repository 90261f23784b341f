//! What a virtio device is to its transport, and what a transport is to its device.
//!
//! Life: `new(config, Option<State>)` → `start` (the driver set DRIVER_OK, or the machine resumes) → `handle`… → `stop`
//! (reset, pause, snapshot, unplug: one road) → `start` or drop. A stopped device has given its queues back and has
//! nothing left that could run, so `save` needs no barrier.

use std::fmt::Display;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::host::Source;
use crate::memory::Memory;
use crate::virtio::queue::Queue;
use crate::virtio::{balloon, blk, console, dead, mem, net, pmem, rng, vhost_user, vsock};

/// A device model behind any transport. The transport holds its lock for every call; none may block.
pub trait VirtioDevice: Send {
    /// What the driver sees before it has agreed on anything: plain data, the same at every call.
    fn identity(&self) -> Identity;

    /// Fills `data` from the device-specific configuration space at `offset`; zeros beyond its end.
    fn config(&self, offset: u64, data: &mut [u8]);

    /// The driver writes to the configuration space; fields that are read-only ignore it.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// From now on the device owns what is in `active`. Returns the descriptors to watch: the queues' kicks and its
    /// own, each with the token that [`VirtioDevice::handle`] gets. Only while stopped. The transport has rung each
    /// enabled queue once: what the driver made available before is not lost.
    fn start(&mut self, active: Active) -> Result<Vec<Source>, StartError>;

    /// The descriptor with this token is readable: a queue was kicked, or the device's own descriptor is ready.
    fn handle(&mut self, token: u32);

    /// The regions of guest memory are others than at `start`, or may be: [`Active::memory`] shows them. For a device whose
    /// back-end was told of them; all others look at each access. Called stopped too.
    fn memory_changed(&mut self) {}

    /// Drains what is in flight and gives the queues back, in their order. Idempotent: empty when already stopped.
    fn stop(&mut self) -> Vec<Queue>;

    /// The driver reset the device: forget what belonged to that driver. Called stopped, after [`VirtioDevice::stop`].
    fn reset(&mut self) {}

    /// Everything that `new` needs to build the same device again. Only while stopped.
    fn save(&self) -> DeviceState;
}

/// Fills `data` from `space` at `offset`; zeros beyond its end.
pub fn read_space(space: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    data.fill(0);
    for (byte, value) in data.iter_mut().zip(space.get(start..).unwrap_or_default()) {
        *byte = *value;
    }
}

/// What the driver sees of a device before it agrees on anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// VIRTIO 1.3, section 5.
    pub device_type: DeviceType,
    /// Feature bits the device offers; transports add VIRTIO_F_VERSION_1 and their own.
    pub features: u64,
    /// The greatest size of each queue, a power of two; its length is the number of queues.
    pub queue_sizes: Vec<u16>,
    /// How much of a configuration space it has.
    pub config_bytes: u64,
}

/// Device numbers (VIRTIO 1.3, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u16)]
pub enum DeviceType {
    Network = 1,
    Block = 2,
    Console = 3,
    Entropy = 4,
    Balloon = 5,
    Socket = 19,
    Memory = 24,
    PersistentMemory = 27,
}

/// What a running device owns until `stop`.
pub struct Active {
    pub memory: Memory,
    /// As many as [`Identity::queue_sizes`]; one the driver did not enable is not ready and must not be touched.
    pub queues: Vec<Queue>,
    /// The feature bits that driver and device agreed on.
    pub features: u64,
    pub interrupt: Arc<dyn Interrupt>,
}

/// How a device calls its driver; the transport decides what that is on the wire.
pub trait Interrupt: Send + Sync {
    /// Used buffers are in queue `index`. The caller has asked the queue whether the driver wants to know.
    fn queue(&self, index: u16);

    /// What somebody else than the device may write to raise the interrupt of queue `index`, until the device stops: a
    /// back-end in the kernel or in another process, which then asks the driver itself. Such interrupts are not counted.
    /// `None` when the transport has something to do first, or the driver wants no interrupt: then each goes through
    /// [`Interrupt::queue`].
    fn trigger(&self, index: u16) -> Option<EventFd>;

    /// The configuration space has changed.
    fn config(&self);

    /// The device cannot go on, most often because the driver broke the rules: sets DEVICE_NEEDS_RESET (VIRTIO 1.3,
    /// 2.1.2), tells the driver, and writes `reason` to the log. The machine runs on.
    fn needs_reset(&self, reason: &dyn Display);
}

/// The saved state of any device: one variant each, so that a state can never be given to another kind of device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum DeviceState {
    Balloon(balloon::State),
    Block(blk::State),
    Console(console::State),
    Entropy(rng::State),
    Memory(mem::State),
    Network(net::State),
    PersistentMemory(pmem::State),
    Socket(vsock::State),
    VhostUserBlock(vhost_user::blk::State),
    /// Of any kind, after it was taken away.
    Dead(dead::State),
}

/// Why a device could not start; the driver sees DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the driver enabled {got} queues, the device needs {needed}")]
    Queues { got: usize, needed: usize },
    #[error("the rings of queue {index} are not in guest memory")]
    Ring { index: u16 },
    #[error("the driver does not know {name}, and the device needs it")]
    Feature { name: &'static str },
    #[error("host: {0}")]
    Host(#[from] std::io::Error),
}
