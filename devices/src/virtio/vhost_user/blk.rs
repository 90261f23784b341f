//! The block device (VIRTIO 1.3, section 5.2) whose disk another process has: the VMM sees neither the disk nor a request,
//! and passes on what the back-end says of itself.
//!
//! Does not limit rates or count bytes, as it does not look at requests. Write caching is configured, not negotiated, so
//! the configuration space is never written.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk as spec;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::frontend::{self, Counters, Frontend};
use super::message::Lie;
use super::session::{Connect, Lost, Session};
use crate::host::Source;
use crate::virtio::blk::Cache;
use crate::virtio::device::{
    Active, DeviceState, DeviceType, Identity, StartError, VirtioDevice, read_space,
};
use crate::virtio::queue::Queue;

/// As many as our own block device has.
const QUEUE_SIZE: u16 = 256;

/// Most queues of a device: all that is to be said of them at a start has room in a socket's buffer, whether the back-end
/// reads it or not.
pub const MAX_QUEUES: u16 = 16;

/// Of the configuration space (5.2.4), up to the last field of the features below.
pub const CONFIG_BYTES: usize = 60;
/// Where it says how many queues there are.
const NUM_QUEUES: usize = 34;

/// Features that are passed on. Not CONFIG_WCE, which is a write to the configuration space.
const KNOWN: [u32; 11] = [
    spec::VIRTIO_BLK_F_SIZE_MAX,
    spec::VIRTIO_BLK_F_SEG_MAX,
    spec::VIRTIO_BLK_F_GEOMETRY,
    spec::VIRTIO_BLK_F_RO,
    spec::VIRTIO_BLK_F_BLK_SIZE,
    spec::VIRTIO_BLK_F_TOPOLOGY,
    spec::VIRTIO_BLK_F_DISCARD,
    spec::VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
    spec::VIRTIO_BLK_F_FLUSH,
];

/// What a block device is made of.
pub struct Config {
    /// Names it in the log.
    pub name: String,
    /// To the back-end that has said who it is, of [`CONFIG_BYTES`].
    pub session: Session,
    pub connect: Connect,
    /// See [`frontend::Config`].
    pub calls: (UnixStream, UnixStream),
    /// Of [`ring_bytes`], shared, that nobody can make smaller.
    pub rings: File,
    /// Without [`Cache::Writeback`] flushes are not offered.
    pub cache: Cache,
    /// At most [`MAX_QUEUES`]; fewer where the back-end has fewer.
    pub queues: u16,
}

/// Whether the back-end lets nobody write.
pub fn is_read_only(session: &Session) -> bool {
    session.features() & 1 << spec::VIRTIO_BLK_F_RO != 0
}

/// Bytes of the memory that a device of so many queues has its rings in.
pub fn ring_bytes(queues: u16) -> u64 {
    super::ring::bytes(queues.clamp(1, MAX_QUEUES))
}

/// The block device.
pub struct VhostUserBlk {
    frontend: Frontend,
    features: u64,
    queues: u16,
}

/// [`VhostUserBlk`] as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Of each queue, the requests that the back-end had not done.
    pub(crate) unfinished: Vec<Vec<u16>>,
    /// As the driver knows it.
    config: Vec<u8>,
}

impl VhostUserBlk {
    /// A stopped device. With a state, the one that was saved, with another back-end for the same disk.
    pub fn new(config: Config, state: Option<State>) -> Result<VhostUserBlk, Lost> {
        let Config { name, session, connect, calls, rings, cache, queues } = config;
        let most = u16::try_from(session.queues()).unwrap_or(MAX_QUEUES);
        let queues = queues.clamp(1, MAX_QUEUES).min(most);
        if queues == 0 {
            return Err(Lie::Queues { got: 0, wanted: 1 }.into());
        }
        let mut known: u64 = KNOWN.iter().map(|bit| 1 << bit).sum();
        if cache != Cache::Writeback {
            known &= !(1 << spec::VIRTIO_BLK_F_FLUSH);
        }
        if queues > 1 {
            known |= 1 << spec::VIRTIO_BLK_F_MQ;
        }
        let features = session.features() & known;
        if features & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err(Lie::Missing("VIRTIO_F_VERSION_1").into());
        }
        let State { unfinished, config } =
            state.unwrap_or_else(|| State { unfinished: Vec::new(), config: session.config().to_vec() });
        let is_other = session.config() != config;
        let needed = features;
        let frontend = Frontend::new(frontend::Config {
            name,
            session,
            connect,
            calls,
            rings,
            needed,
            queues,
            unfinished,
        })?;
        let mut blk = VhostUserBlk { frontend, features, queues };
        if is_other {
            blk.frontend.announce();
        }
        Ok(blk)
    }

    /// What the device has done since it was built.
    pub fn counters(&self) -> Arc<Counters> {
        self.frontend.counters()
    }

    /// See [`Frontend::ask_config`].
    pub fn ask_config(&mut self) -> Result<(), Lost> {
        self.frontend.ask_config()
    }

    /// See [`Frontend::config_asked`].
    pub fn config_asked(&mut self, at: Instant) -> Result<bool, Lost> {
        self.frontend.config_asked(at)
    }
}

impl VirtioDevice for VhostUserBlk {
    fn identity(&self) -> Identity {
        // With the driver, events are ours, whatever the back-end knows of them.
        let features = self.features | 1 << VIRTIO_RING_F_EVENT_IDX;
        let queue_sizes = vec![QUEUE_SIZE; self.queues.into()];
        Identity {
            device_type: DeviceType::Block,
            features,
            queue_sizes,
            config_bytes: self.frontend.config().len() as u64,
        }
    }

    fn config(&self, offset: u64, data: &mut [u8]) {
        let mut space = self.frontend.config().to_vec();
        for (byte, value) in space.iter_mut().skip(NUM_QUEUES).zip(self.queues.to_le_bytes()) {
            *byte = value;
        }
        read_space(&space, offset, data);
    }

    fn start(&mut self, active: Active) -> Result<Vec<Source>, StartError> {
        self.frontend.start(active)
    }

    fn handle(&mut self, token: u32) {
        self.frontend.handle(token);
    }

    fn stop(&mut self) -> Vec<Queue> {
        self.frontend.stop()
    }

    fn reset(&mut self) {
        self.frontend.forget();
    }

    fn save(&self) -> DeviceState {
        DeviceState::VhostUserBlock(State {
            unfinished: self.frontend.unfinished().to_vec(),
            config: self.frontend.config().to_vec(),
        })
    }
}

#[cfg(test)]
mod tests;
