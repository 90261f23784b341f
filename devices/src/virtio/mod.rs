//! Virtual I/O devices (VIRTIO 1.3).

pub mod balloon;
mod batching;
pub mod blk;
pub mod console;
pub mod dead;
pub mod device;
#[cfg(test)]
mod echo;
#[cfg(test)]
mod hostile;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod pmem;
pub mod queue;
pub mod reclaim;
pub mod rng;
#[cfg(test)]
mod round_trip;
pub mod running;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transport;
mod trouble;
mod turns;
pub mod vhost_user;
pub mod vsock;
