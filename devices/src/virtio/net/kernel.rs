//! Packets that do not come through this process: the kernel (vhost-net) serves the driver's receive and transmit queues,
//! each pair with a queue of the tap.
//!
//! No limit, no look into a frame, no count: what goes on between the driver and the tap is not seen here. The control queue
//! stays the device's.

use std::io;
use std::os::fd::AsRawFd;

use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use crate::backend::tap::Tap;
use crate::backend::vhost::{self, Call, Region, Ring};
use crate::backend::vhost_net::{Ends, VhostNet};
use crate::host::Source;
use crate::memory::Memory;
use crate::virtio::device::StartError;
use crate::virtio::running::Running;

/// The tokens of what the kernel says of the driver's queue N.
pub const CALL: u32 = 0x4000;
pub const ERROR: u32 = 0x5000;

/// The kernel's part of the device.
pub struct Kernel {
    pairs: Vec<VhostNet>,
    /// By the driver's index.
    queues: Vec<Lent>,
    room: Option<Region>,
}

/// One queue of the driver's.
struct Lent {
    call: Call,
    error: EventFd,
    /// The kernel serves it.
    is_served: bool,
    /// The kernel has it, and must say how far it has come.
    is_lent: bool,
}

impl Kernel {
    /// With one of these for each queue pair. What is plugged and unplugged in `room` the kernel is not told of.
    pub fn new(pairs: Vec<VhostNet>, room: Option<Region>) -> io::Result<Kernel> {
        let queues = (0..2 * pairs.len() as u16).map(|index| {
            let error = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
            Ok(Lent { call: Call::new(index)?, error, is_served: false, is_lent: false })
        });
        Ok(Kernel { queues: queues.collect::<io::Result<_>>()?, pairs, room })
    }

    /// Of features that are about rings, those that the kernel knows.
    pub fn knows(&self, feature: u64) -> bool {
        self.pairs.iter().all(|pair| pair.features() & feature == feature)
    }

    /// Gives the kernel the queues that the driver has enabled, of the first `pairs`.
    pub fn start(
        &mut self,
        running: &Running,
        tap: &Tap,
        features: u64,
        pairs: usize,
    ) -> Result<Vec<Source>, StartError> {
        let memory = running.memory().memory();
        let regions = vhost::all_regions(&memory, self.room.as_ref());
        let mut sources = Vec::new();
        for ((number, vhost), lent) in (0..).zip(&self.pairs).zip(self.queues.chunks_mut(2)).take(pairs) {
            vhost.set_features(features)?;
            vhost.set_memory(&regions)?;
            let Some(tap) = tap.queue(number) else { continue };
            for (side, lent) in lent.iter_mut().enumerate() {
                let index = (2 * number + side) as u16;
                let Some(queue) = running.queue(index) else { continue };
                let ring = Ring::of(queue, &memory).ok_or(StartError::Ring { index })?;
                lent.call.connect(&*running.interrupt);
                let ends = Ends { kick: &queue.kick, call: lent.call.fd(), error: &lent.error };
                // Also one that fails half way is taken back.
                (lent.is_served, lent.is_lent) = (true, true);
                vhost.start(side, &ring, &ends, tap)?;
                sources.extend(lent.call.source(CALL + u32::from(index)));
                sources.push(Source { fd: lent.error.as_raw_fd(), token: ERROR + u32::from(index) });
            }
        }
        Ok(sources)
    }

    /// The kernel has given something back, where its interrupts go through the device.
    pub fn called(&self, index: usize, running: &Running) {
        if let Some(lent) = self.queues.get(index) {
            lent.call.pass_on(&*running.interrupt);
        }
    }

    /// The driver has broken the rules of a queue. Nothing is served any more until it resets the device.
    pub fn failed(&self, index: usize, running: &mut Running) {
        let Some(lent) = self.queues.get(index) else { return };
        let _ = lent.error.read();
        if !running.is_broken() {
            running.fail(&format_args!(
                "the driver broke the rules of queue {index}, or put a buffer where guest memory is not"
            ));
        }
    }

    /// Guest memory has other regions.
    pub fn memory_changed(&self, memory: &Memory) {
        let regions = vhost::all_regions(&memory.memory(), self.room.as_ref());
        for (pair, lent) in self.pairs.iter().zip(self.queues.chunks(2)) {
            if lent.iter().any(|queue| queue.is_lent)
                && let Err(error) = pair.set_memory(&regions)
            {
                // With the old ones it does not reach what has come; what has gone is nobody's.
                log::error!(
                    "vhost-net: the guest's memory has changed, and the kernel cannot be told: {error}"
                );
            }
        }
    }

    /// Takes the queues back, each where the kernel has left it.
    pub fn stop(&mut self, running: &mut Running) {
        self.rest();
        let memory = running.memory().memory();
        for (index, lent) in self.queues.iter_mut().enumerate() {
            if !std::mem::take(&mut lent.is_lent) {
                continue;
            }
            let Some(pair) = self.pairs.get(index / 2) else { continue };
            match (pair.take_back(index % 2), running.queue_mut(index as u16)) {
                (Ok(next), Some(queue)) => vhost::take_back(queue, next, &memory),
                (Err(error), _) => log::error!("vhost-net: queue {index} cannot be taken back: {error}"),
                (Ok(_), None) => {}
            }
            // What it has said last.
            lent.call.pass_on(&*running.interrupt);
            let _ = lent.error.read();
        }
    }

    /// Ends the service of all queues. When this returns, what was taken is done.
    pub fn rest(&mut self) {
        for (index, lent) in self.queues.iter_mut().enumerate() {
            if std::mem::take(&mut lent.is_served)
                && let Some(Err(error)) = self.pairs.get(index / 2).map(|pair| pair.detach(index % 2))
            {
                log::error!("vhost-net: queue {index} cannot be detached: {error}");
            }
        }
    }
}
