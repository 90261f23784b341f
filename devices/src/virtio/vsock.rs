//! The socket device (VIRTIO 1.3, section 5.10): connections between programs of the guest, which know it as AF_VSOCK, and
//! programs of the host, which use Unix sockets.
//!
//! A program of the host connects to one listening socket, says `CONNECT <port>\n`, and reads `OK <port>\n` when a program
//! of the guest has taken the connection. When the guest connects to a port, [`Config::connect`] says whom that is.
//! Stream sockets only, and the host is the only peer: guests do not reach each other.
//!
//! Connections live through a pause. They do not live through a save: their sockets are this process's. A restored device
//! tells its driver so (TRANSPORT_RESET), and lets nobody in until the driver has heard it.

mod connection;
mod muxer;
pub mod packet;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

pub use self::connection::{LINE_BYTES, PACKET_BYTES, WINDOW};
use self::muxer::Muxer;
pub use self::muxer::{FIRST_HOST_PORT, LAST_HOST_PORT, MAX_CONNECTIONS, MAX_RESETS, PATIENCE};
use crate::host::Source;
use crate::virtio::device::{Active, DeviceState, DeviceType, Identity, StartError, VirtioDevice};
use crate::virtio::queue::Queue;
use crate::virtio::running::{Running, Step, count};

/// Linux gives its receive queue a buffer per entry, of a page each.
const QUEUE_SIZE: u16 = 256;
const EVENT_QUEUE_SIZE: u16 = 16;

/// VIRTIO_VSOCK_F_STREAM (5.10.3).
const F_STREAM: u32 = 0;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (5.10.6.7), as it is on the wire.
const EVENT_TRANSPORT_RESET: [u8; 4] = [0; 4];

/// Connects to whoever serves a port of the host. Does not block, and neither does the socket: where that would be
/// necessary, as with a full backlog, it is an error.
pub type Connect = Box<dyn Fn(u32) -> io::Result<UnixStream> + Send>;

/// What a socket device is made of.
pub struct Config {
    /// The guest's address: at least 3, and none of the two that mean anybody.
    pub guest_cid: u64,
    /// Where programs of the host connect to.
    pub listener: UnixListener,
    pub connect: Connect,
}

/// The socket device.
pub struct Vsock {
    guest_cid: u64,
    muxer: Muxer,
    notice: Notice,
    counters: Arc<Counters>,
    running: Option<Running>,
}

/// The driver's hearing that its connections are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Notice {
    None,
    Due,
    /// It lies in the event queue.
    Given,
}

impl Vsock {
    /// A stopped device, or, with a state, one that takes the place of the one that was saved.
    pub fn new(config: Config, state: Option<State>) -> io::Result<Vsock> {
        let Config { guest_cid, listener, connect } = config;
        let counters = Arc::<Counters>::default();
        let next_host_port = state.as_ref().map_or(FIRST_HOST_PORT, |state| state.next_host_port);
        let mut muxer = Muxer::new(guest_cid, listener, connect, counters.clone(), next_host_port)?;
        let notice = if state.is_some() { Notice::Due } else { Notice::None };
        match notice {
            Notice::None => muxer.listen(),
            // A driver without an event queue hears nothing, and shall not keep the host's programs out for ever.
            _ => muxer.listen_after(PATIENCE),
        }
        Ok(Vsock { guest_cid, muxer, notice, counters, running: None })
    }

    /// What the device has done since it was built.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn transmit(&mut self) {
        let Some(running) = &mut self.running else { return };
        running.serve(TRANSMIT, |memory, chain| self.muxer.take(memory, chain));
    }

    fn receive(&mut self) {
        let Some(running) = &mut self.running else { return };
        running.serve(RECEIVE, |memory, chain| self.muxer.give(memory, chain));
    }

    /// The driver has put buffers into the event queue. While there is a notice, each is taken: a queue that was used up is
    /// the only one whose refill is heard of, and a driver refills it after it has read what was in it. Linux reads
    /// nothing from a buffer that comes back empty.
    fn event(&mut self) {
        if self.notice == Notice::Given {
            self.notice = Notice::None;
            self.muxer.listen();
        }
        let Some(running) = &mut self.running else { return };
        running.serve(EVENT, |memory, chain| match self.notice {
            Notice::None => Ok(Step::Later),
            Notice::Given => Ok(Step::Used(0)),
            Notice::Due if (chain.writable.bytes() as usize) < EVENT_TRANSPORT_RESET.len() => {
                Ok(Step::Used(0))
            }
            Notice::Due => {
                chain.writable.write(memory, &EVENT_TRANSPORT_RESET)?;
                self.notice = Notice::Given;
                Ok(Step::Used(EVENT_TRANSPORT_RESET.len() as u32))
            }
        });
    }
}

impl VirtioDevice for Vsock {
    fn identity(&self) -> Identity {
        let features = 1 << F_STREAM | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
        let queue_sizes = vec![QUEUE_SIZE, QUEUE_SIZE, EVENT_QUEUE_SIZE];
        Identity { device_type: DeviceType::Socket, features, queue_sizes, config_bytes: 8 }
    }

    /// `guest_cid` (5.10.4).
    fn config(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (byte, value) in
            data.iter_mut().zip(self.guest_cid.to_le_bytes().get(start..).unwrap_or_default())
        {
            *byte = *value;
        }
    }

    fn start(&mut self, active: Active) -> Result<Vec<Source>, StartError> {
        let (running, mut sources) = Running::start(active, 3)?;
        sources.push(Source { fd: self.muxer.sockets_fd(), token: SOCKETS });
        sources.push(Source { fd: self.muxer.timer_fd(), token: TIMER });
        self.running = Some(running);
        self.muxer.resume();
        Ok(sources)
    }

    fn handle(&mut self, token: u32) {
        match token {
            SOCKETS => self.muxer.sockets_ready(),
            TIMER => self.muxer.time_is_up(),
            _ if token == u32::from(TRANSMIT) => {
                count(&self.counters.tx_queue_event_count, 1);
                self.transmit();
            }
            _ if token == u32::from(EVENT) => self.event(),
            _ => {
                count(&self.counters.rx_queue_event_count, 1);
                self.receive();
            }
        }
        // What has come of it for the guest.
        if token != u32::from(RECEIVE) && self.muxer.has_outgoing() {
            self.receive();
        }
        if self.muxer.was_held_back() {
            self.running.iter().for_each(|running| running.ring(TRANSMIT));
        }
        self.muxer.let_in();
        self.muxer.settle();
    }

    fn stop(&mut self) -> Vec<Queue> {
        self.running.take().map(Running::stop).unwrap_or_default()
    }

    fn reset(&mut self) {
        self.muxer.forget();
        self.notice = Notice::None;
        self.muxer.listen_soon();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Socket(State { next_host_port: self.muxer.next_host_port() })
    }
}

/// [`Vsock`] as it is saved. Its connections are not: they end with the process that has their sockets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// So that a new connection is not taken for one that the guest still knows.
    next_host_port: u32,
}

/// What a socket device has done since it was built. "rx" is towards the guest, "tx" from it.
#[derive(Debug, Default)]
pub struct Counters {
    pub rx_queue_event_count: AtomicU64,
    pub tx_queue_event_count: AtomicU64,
    pub rx_bytes_count: AtomicU64,
    pub tx_bytes_count: AtomicU64,
    pub rx_packets_count: AtomicU64,
    pub tx_packets_count: AtomicU64,
    pub conns_added: AtomicU64,
    pub conns_removed: AtomicU64,
    /// Of those removed: they had waited too long.
    pub conns_killed: AtomicU64,
    /// The host's sockets could not be accepted, watched or had.
    pub muxer_event_fails: AtomicU64,
    /// Bytes of the guest that could not be written, at once or later.
    pub tx_write_fails: AtomicU64,
    pub tx_flush_fails: AtomicU64,
    pub rx_read_fails: AtomicU64,
    /// Packets of the guest that made no sense.
    pub tx_invalid_packets: AtomicU64,
    /// Buffers of the guest that are too small for a packet.
    pub rx_invalid_buffers: AtomicU64,
}

/// The queues (5.10.2), which are also their tokens.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;
const SOCKETS: u32 = 3;
const TIMER: u32 = 4;
