//! Virtual I/O devices (VIRTIO 1.3).

pub mod device;
pub mod mmio;
pub mod queue;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transport;
