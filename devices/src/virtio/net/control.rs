//! The control queue (VIRTIO 1.3, section 5.1.6.5): how many queue pairs the driver uses. There is one only where there are
//! several; no other command is offered.

use std::io;

use virtio_bindings::virtio_net as spec;

use super::bit;
use crate::backend::tap::Tap;
use crate::memory::GuestRam;
use crate::virtio::queue::{Chain, QueueError};
use crate::virtio::running::Step;

/// What the driver has commanded.
pub struct Control {
    available: usize,
    /// As many pairs may be commanded: none by a driver that has not agreed that there are several.
    most: usize,
    pairs: usize,
    /// Until the driver says otherwise, it is the queue after all pairs.
    queue: u16,
}

impl Control {
    /// For a device with so many pairs, of which `pairs` were enabled when it was saved.
    pub fn new(available: usize, pairs: u16) -> Control {
        let queue = 2 * available as u16;
        Control { available, most: 0, pairs: usize::from(pairs).clamp(1, available.max(1)), queue }
    }

    /// The device runs with these features.
    pub fn start(&mut self, features: u64) {
        let known = known_pairs(self.available, features);
        self.queue = control_queue(self.available, features);
        // A command is one of its feature (5.1.6.5.5), and that of the queue that it comes by (5.1.3.1).
        let may_command = knows_several(features) && features & bit(spec::VIRTIO_NET_F_CTRL_VQ) != 0;
        self.most = if may_command { self.available } else { 0 };
        self.pairs = self.pairs.min(known);
    }

    /// A driver that knows nothing of what the last one commanded.
    pub fn reset(&mut self) {
        self.pairs = 1;
    }

    /// Queue pairs that are in use.
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    /// The index of the control queue, if there is one.
    pub fn queue(&self) -> u16 {
        self.queue
    }

    /// Obeys one command, or says that it cannot.
    pub fn obey(&mut self, memory: &GuestRam, chain: &mut Chain, tap: &mut Tap) -> Result<Step, QueueError> {
        let done = match wanted(memory, chain)? {
            Some(pairs) if (1..=self.most).contains(&pairs) => self.set_pairs(pairs, tap).is_ok(),
            _ => false,
        };
        let answer = if done { spec::VIRTIO_NET_OK } else { spec::VIRTIO_NET_ERR };
        chain.writable.write(memory, &[answer as u8])?;
        Ok(Step::Used(1))
    }

    fn set_pairs(&mut self, pairs: usize, tap: &mut Tap) -> io::Result<()> {
        tap.attach_queues(pairs).inspect_err(|error| {
            log::error!("network device {}: {pairs} queues cannot be used: {error}", tap.name());
        })?;
        self.pairs = pairs;
        Ok(())
    }
}

/// The index of the control queue of a device with so many pairs, for a driver that agreed on these features: after the pairs
/// that it knows of (5.1.2).
pub fn control_queue(available: usize, features: u64) -> u16 {
    2 * known_pairs(available, features) as u16
}

fn known_pairs(available: usize, features: u64) -> usize {
    if knows_several(features) { available } else { 1 }
}

fn knows_several(features: u64) -> bool {
    features & bit(spec::VIRTIO_NET_F_MQ) != 0
}

/// The number of pairs, if that is what the command is about.
fn wanted(memory: &GuestRam, chain: &mut Chain) -> Result<Option<usize>, QueueError> {
    let mut command = [0; 4];
    if chain.readable.bytes() as usize != command.len() {
        return Ok(None);
    }
    chain.readable.read(memory, &mut command)?;
    let [class, command, low, high] = command;
    let is_known = (u32::from(class), u32::from(command))
        == (spec::VIRTIO_NET_CTRL_MQ, spec::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
    Ok(is_known.then_some(u16::from_le_bytes([low, high]).into()))
}
