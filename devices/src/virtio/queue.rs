//! A virtqueue as a device owns it: the ring, its doorbell, its number.

use vmm_sys_util::eventfd::EventFd;

/// One queue of a running device (split ring; VIRTIO 1.3, section 2.7).
pub struct Queue {
    pub index: u16,
    pub ring: virtio_queue::Queue,
    /// Signalled when the driver kicks this queue.
    pub kick: EventFd,
}
