//! The network device (VIRTIO 1.3, section 5.1): frames between its driver's queues and a [`Tap`] of the host.
//!
//! Looks into a frame no further than its sender's address, and with a [`Neighbour`] whether it is for that, and keeps none but the one for which the driver has no room
//! (`receive.rs`). Checksums and segmentation are the host kernel's, which sees the driver's headers only when they have
//! been checked (`header.rs`). No filter, no VLAN and no link state: frames for others do not come through a tap, and its
//! link is up. With a back-end in the kernel (`kernel.rs`) nothing of this is done here but the control queue.

mod control;
mod header;
mod kernel;
mod neighbour;
mod receive;
#[cfg(test)]
mod tests;
mod transmit;

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net as spec;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::backend::rate_limiter::{Limits, RateLimiter, RateLimiterState};
use crate::backend::tap::Tap;
use crate::backend::vhost;
use crate::backend::vhost_net::VhostNet;
use crate::host::Source;
use crate::times::Times;
use crate::virtio::device::{Active, DeviceState, DeviceType, Identity, StartError, VirtioDevice};
use crate::virtio::queue::Queue;
use crate::virtio::running::{Running, Step, count};
use crate::virtio::turns::{Turn, Turns};

pub(super) use control::control_queue;
pub use neighbour::{LOOK, Neighbour};

use control::Control;
use kernel::Kernel;
use neighbour::Beside;
use receive::Receiver;
use transmit::Transmitter;

/// Most pairs of a receive and a transmit queue. Each has its vectors and descriptors; more than a guest has CPUs are of
/// no use.
pub const MAX_QUEUE_PAIRS: usize = 32;

/// What the MTU may be: what IPv4 needs (RFC 791), and what fits into a frame of 64 KiB.
pub const MTU: std::ops::RangeInclusive<u16> = 68..=65535;

/// A packet of 64 KiB takes 17 buffers of a page; with these the host has a dozen to fill while the guest works.
const QUEUE_SIZE: u16 = 256;
/// Commands come one at a time.
const CONTROL_QUEUE_SIZE: u16 = 16;

/// What a network device is made of.
pub struct Config {
    /// The number of its queues is the number of the device's queue pairs, 1 to [`MAX_QUEUE_PAIRS`].
    pub tap: Tap,
    /// The address the driver is told to use; without one it makes one up.
    pub mac: Option<[u8; 6]>,
    /// The largest packet the driver is told to send, within [`MTU`].
    pub mtu: Option<u16>,
    /// From the host to the guest.
    pub receive_limits: Limits,
    /// From the guest to the host.
    pub transmit_limits: Limits,
    /// Who else is on the driver's network. Its connections are not saved with the device: it is as if it had been started
    /// anew.
    pub neighbour: Option<Box<dyn Neighbour>>,
    /// One for each queue pair, and the kernel moves the packets: then there are no limits and no neighbour. Or none.
    pub vhost: Vec<VhostNet>,
    /// For the kernel: where guest memory may come and go without its being told, see [`vhost::all_regions`].
    pub room: Option<vhost::Region>,
}

/// The network device.
pub struct Net {
    tap: Tap,
    mac: Option<[u8; 6]>,
    mtu: Option<u16>,
    receivers: Vec<Receiver>,
    receive_limiter: RateLimiter,
    transmitter: Transmitter,
    /// Pairs that have something to receive or to send: each direction has one limiter for all of them.
    receiving: Turns,
    sending: Turns,
    control: Control,
    beside: Option<Beside>,
    kernel: Option<Kernel>,
    counters: Arc<Counters>,
    running: Option<Running>,
}

impl Net {
    /// A stopped device, or, with a state, the one that was saved.
    pub fn new(config: Config, state: Option<State>) -> io::Result<Net> {
        let Config { tap, mac, mtu, receive_limits, transmit_limits, neighbour, vhost, room } = config;
        let state = state.unwrap_or_default();
        let counters = Arc::<Counters>::default();
        let mut waiting = state.waiting.into_iter();
        let receivers = (0..tap.queues())
            .map(|index| Receiver::new(index, waiting.next().unwrap_or_default(), counters.clone()))
            .collect::<io::Result<_>>()?;
        Ok(Net {
            control: Control::new(tap.queues(), state.pairs),
            receivers,
            receive_limiter: RateLimiter::new(receive_limits, state.receive_limiter.as_ref())?,
            transmitter: Transmitter::new(
                mac,
                RateLimiter::new(transmit_limits, state.transmit_limiter.as_ref())?,
                counters.clone(),
            ),
            receiving: Turns::default(),
            sending: Turns::default(),
            tap,
            mac,
            mtu,
            beside: neighbour.map(Beside::new).transpose()?,
            kernel: (!vhost.is_empty()).then(|| Kernel::new(vhost, room)).transpose()?,
            counters,
            running: None,
        })
    }

    /// What the device has done since it was built.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// Other limits from now on, running or not; `None` leaves them as they are.
    pub fn set_limits(&mut self, receive: Option<Limits>, transmit: Option<Limits>) {
        if let Some(limits) = receive {
            self.receive_limiter.set_limits(limits);
        }
        if let Some(limits) = transmit {
            self.transmitter.limiter.set_limits(limits);
        }
    }

    fn receive(&mut self, pair: usize) {
        let (Some(running), Some(receiver)) = (&mut self.running, self.receivers.get_mut(pair)) else {
            return;
        };
        if pair >= self.control.pairs() || !running.is_ready(receive_queue(pair)) {
            return receiver.rest(&self.tap);
        }
        self.receiving.kicked(pair as u16);
        if self.receiving.next() != Some(pair as u16) {
            // What the tap has for it must not call again and again before its turn comes.
            receiver.rest(&self.tap);
        }
        self.receive_next();
    }

    /// The pair whose turn it is receives. The one after it is called for, unless all wait for the limiter.
    fn receive_next(&mut self) {
        let Some(running) = &mut self.running else { return };
        let (tap, limiter, pairs) = (&self.tap, &mut self.receive_limiter, self.control.pairs());
        let mut is_held_back = false;
        self.receiving.take(|pair| {
            let index = usize::from(pair);
            let Some(receiver) = self.receivers.get_mut(index) else { return Turn::Over };
            if index >= pairs {
                receiver.rest(tap);
                return Turn::Over;
            }
            // The first pair is the one that every driver uses.
            let mut beside = self.beside.as_mut().filter(|_| index == 0);
            if pairs > 1 {
                // Called for and kicked alike: left in place, it would put a pair in line that has had its turn, for ever.
                running.clear_kick(receive_queue(index));
            }
            let mut end = Turn::Over;
            running.turn(receive_queue(index), |turn| {
                end = receiver.take_turn(turn, tap, limiter, beside.as_deref_mut())?;
                Ok(())
            });
            beside.into_iter().for_each(Beside::rearm);
            is_held_back = end != Turn::Over;
            end
        });
        if !is_held_back && let Some(next) = self.receiving.next() {
            running.ring(receive_queue(next.into()));
        }
    }

    fn transmit(&mut self, pair: usize) {
        let Some(running) = &mut self.running else { return };
        let queue = receive_queue(pair) + 1;
        if pair >= self.control.pairs() || !running.is_ready(queue) {
            return running.clear_kick(queue);
        }
        self.sending.kicked(pair as u16);
        if self.sending.next() != Some(pair as u16) {
            running.clear_kick(queue);
        }
        self.transmit_next();
    }

    /// The same for sending.
    fn transmit_next(&mut self) {
        let Some(running) = &mut self.running else { return };
        let pairs = self.control.pairs();
        let mut is_held_back = false;
        self.sending.take(|pair| {
            let index = usize::from(pair);
            if index >= pairs {
                return Turn::Over;
            }
            let mut has_had = false;
            running.serve(receive_queue(index) + 1, |memory, chain| {
                let step = self.transmitter.send(memory, chain, &self.tap, index, self.beside.as_mut())?;
                is_held_back = step == Step::Later;
                has_had |= !is_held_back;
                Ok(step)
            });
            match (is_held_back, has_had) {
                (false, _) => Turn::Over,
                (true, true) => Turn::Partly,
                (true, false) => Turn::Waits,
            }
        });
        if !is_held_back && let Some(next) = self.sending.next() {
            running.ring(receive_queue(next.into()) + 1);
        }
        self.hear_neighbour();
    }

    /// Takes what the neighbour has for the driver.
    fn hear_neighbour(&mut self) {
        let Some(beside) = &mut self.beside else { return };
        beside.rearm();
        if beside.neighbour.has_frames() {
            self.receive(0);
        }
    }

    fn command(&mut self) {
        let Some(running) = &mut self.running else { return };
        let before = self.control.pairs();
        running.serve(self.control.queue(), |memory, chain| self.control.obey(memory, chain, &mut self.tap));
        // Both directions of a new pair may have something to do; those of one that is gone must rest.
        for pair in before..self.control.pairs() {
            running.ring(receive_queue(pair));
            running.ring(receive_queue(pair) + 1);
        }
        if self.kernel.is_some() {
            return;
        }
        for pair in self.control.pairs()..before {
            if let Some(receiver) = self.receivers.get_mut(pair) {
                receiver.rest(&self.tap);
            }
        }
    }
}

impl VirtioDevice for Net {
    fn identity(&self) -> Identity {
        let pairs = self.tap.queues();
        let mut bits = OFFERED.to_vec();
        if self.tap.segments_udp() {
            bits.extend([spec::VIRTIO_NET_F_GUEST_USO4, spec::VIRTIO_NET_F_GUEST_USO6]);
            bits.push(spec::VIRTIO_NET_F_HOST_USO);
        }
        bits.extend(self.mac.map(|_| spec::VIRTIO_NET_F_MAC));
        bits.extend(self.mtu.map(|_| spec::VIRTIO_NET_F_MTU));
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * pairs];
        if pairs > 1 {
            bits.extend([spec::VIRTIO_NET_F_CTRL_VQ, spec::VIRTIO_NET_F_MQ]);
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        if let Some(kernel) = &self.kernel {
            bits.retain(|&feature| !OF_RINGS.contains(&feature) || kernel.knows(bit(feature)));
        }
        let features = bits.into_iter().map(bit).sum();
        Identity {
            device_type: DeviceType::Network,
            features,
            queue_sizes,
            config_bytes: CONFIG_BYTES as u64,
        }
    }

    /// The address, the link's state (not offered), the number of queue pairs and the MTU (5.1.4).
    fn config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; CONFIG_BYTES];
        let pairs = self.tap.queues() as u16;
        let fields = [
            &self.mac.unwrap_or_default()[..],
            &[0; 2],
            &pairs.to_le_bytes(),
            &self.mtu.unwrap_or(0).to_le_bytes(),
        ];
        for (place, byte) in space.iter_mut().zip(fields.iter().flat_map(|field| field.iter())) {
            *place = *byte;
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        for (place, byte) in data.iter_mut().zip(space.get(start..).unwrap_or_default()) {
            *place = *byte;
        }
    }

    fn start(&mut self, active: Active) -> Result<Vec<Source>, StartError> {
        let features = active.features;
        let (mut running, mut sources) = Running::start(active, self.identity().queue_sizes.len())?;
        self.control.start(features);
        self.tap.set_offloads(header::offloads(features, self.tap.segments_udp()))?;
        self.tap.attach_queues(self.control.pairs())?;
        if let Some(kernel) = &mut self.kernel {
            let control = self.control.queue();
            sources.retain(|source| source.token == u32::from(control));
            match kernel.start(&running, &self.tap, features, usize::from(control / 2)) {
                Ok(more) => sources.extend(more),
                Err(error) => {
                    kernel.stop(&mut running);
                    return Err(error);
                }
            }
            self.running = Some(running);
            return Ok(sources);
        }
        self.transmitter.start(features);
        for (receiver, token) in self.receivers.iter_mut().zip(TAP..) {
            receiver.start(features);
            sources.push(Source { fd: receiver.fd(), token });
        }
        sources.push(Source { fd: self.receive_limiter.fd(), token: RECEIVE_TIMER });
        sources.push(Source { fd: self.transmitter.limiter.fd(), token: TRANSMIT_TIMER });
        sources.extend(self.beside.iter().map(|beside| Source { fd: beside.fd(), token: NEIGHBOUR_TIMER }));
        self.running = Some(running);
        Ok(sources)
    }

    fn handle(&mut self, token: u32) {
        let (pairs, counters) = (self.control.pairs(), &self.counters);
        match token {
            kernel::CALL..kernel::ERROR => {
                if let (Some(kernel), Some(running)) = (&self.kernel, &self.running) {
                    kernel.called((token - kernel::CALL) as usize, running);
                }
            }
            kernel::ERROR..RECEIVE_TIMER => {
                if let (Some(kernel), Some(running)) = (&self.kernel, &mut self.running) {
                    kernel.failed((token - kernel::ERROR) as usize, running);
                }
            }
            RECEIVE_TIMER => {
                self.receive_limiter.clear();
                count(&counters.rx_event_rate_limiter_count, 1);
                // It is also the clock of who waits for something else.
                (0..pairs).for_each(|pair| self.receive(pair));
            }
            TRANSMIT_TIMER => {
                self.transmitter.limiter.clear();
                count(&counters.tx_rate_limiter_event_count, 1);
                self.transmit_next();
            }
            NEIGHBOUR_TIMER => {
                self.beside.iter_mut().for_each(Beside::woken);
                self.hear_neighbour();
            }
            TAP.. => {
                count(&counters.rx_tap_event_count, 1);
                self.receive((token - TAP) as usize);
            }
            _ if token == u32::from(self.control.queue()) => self.command(),
            _ if token.is_multiple_of(2) => {
                count(&counters.rx_queue_event_count, 1);
                self.running.iter().for_each(|running| running.clear_kick(token as u16));
                self.receive(token as usize / 2);
            }
            _ => {
                count(&counters.tx_queue_event_count, 1);
                self.transmit(token as usize / 2);
            }
        }
        if self.running.as_ref().is_some_and(Running::is_broken) {
            // Nothing takes packets any more until the driver resets the device.
            self.kernel.iter_mut().for_each(Kernel::rest);
            self.receivers.iter_mut().for_each(|receiver| receiver.rest(&self.tap));
        }
    }

    fn memory_changed(&mut self) {
        if let (Some(kernel), Some(running)) = (&self.kernel, &self.running) {
            kernel.memory_changed(running.memory());
        }
    }

    fn stop(&mut self) -> Vec<Queue> {
        let Some(mut running) = self.running.take() else { return Vec::new() };
        if let Some(kernel) = &mut self.kernel {
            kernel.stop(&mut running);
        }
        self.receiving.clear();
        self.sending.clear();
        for (pair, receiver) in self.receivers.iter_mut().enumerate() {
            running.undo_pops(receive_queue(pair), receiver.stop(&self.tap));
        }
        running.stop()
    }

    fn reset(&mut self) {
        self.control.reset();
        self.beside.iter_mut().for_each(|beside| beside.neighbour.reset());
        self.receivers.iter_mut().for_each(Receiver::reset);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Network(State {
            receive_limiter: Some(self.receive_limiter.save()),
            transmit_limiter: Some(self.transmitter.limiter.save()),
            pairs: self.control.pairs() as u16,
            waiting: self.receivers.iter().map(|receiver| receiver.waiting().to_vec()).collect(),
        })
    }
}

/// [`Net`] as it is saved. Packets that nobody has read yet are in the tap.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    receive_limiter: Option<RateLimiterState>,
    transmit_limiter: Option<RateLimiterState>,
    /// Queue pairs that the driver has enabled.
    pairs: u16,
    /// For each receive queue the packet that waits for room; empty where none does.
    waiting: Vec<Vec<u8>>,
}

/// What a network device has done since it was built. "Receive" is from the host to the guest.
#[derive(Debug, Default)]
pub struct Counters {
    /// Kicks of receive queues taken in.
    pub rx_queue_event_count: AtomicU64,
    /// Times the tap had packets.
    pub rx_tap_event_count: AtomicU64,
    pub rx_event_rate_limiter_count: AtomicU64,
    /// Times receiving stopped for the rate limiter.
    pub rx_rate_limiter_throttled: AtomicU64,
    /// Times receiving stopped since the driver had no room.
    pub no_rx_avail_buffer: AtomicU64,
    /// Packets that were dropped, being larger than the driver has room for.
    pub rx_fails: AtomicU64,
    pub rx_packets_count: AtomicU64,
    /// Of frames, without their headers.
    pub rx_bytes_count: AtomicU64,
    pub tap_read_fails: AtomicU64,
    /// Kicks of transmit queues taken in, and turns the device gave itself.
    pub tx_queue_event_count: AtomicU64,
    pub tx_rate_limiter_event_count: AtomicU64,
    /// Frames that were found waiting for the rate limiter.
    pub tx_rate_limiter_throttled: AtomicU64,
    pub tx_packets_count: AtomicU64,
    /// Of frames, without their headers.
    pub tx_bytes_count: AtomicU64,
    /// Frames that were dropped for what the driver says of them or for their size.
    pub tx_malformed_frames: AtomicU64,
    /// Frames that were dropped, malformed or not taken by the tap.
    pub tx_fails: AtomicU64,
    /// Frames that went out under another address than the configured one.
    pub tx_spoofed_mac_count: AtomicU64,
    pub tap_write_fails: AtomicU64,
    pub tap_write_time: Times,
}

/// What is offered in any case; the host's kernel takes and gives it since Linux 4.8.
const OFFERED: [u32; 13] = [
    spec::VIRTIO_NET_F_CSUM,
    spec::VIRTIO_NET_F_GUEST_CSUM,
    spec::VIRTIO_NET_F_GUEST_TSO4,
    spec::VIRTIO_NET_F_GUEST_TSO6,
    spec::VIRTIO_NET_F_GUEST_ECN,
    spec::VIRTIO_NET_F_GUEST_UFO,
    spec::VIRTIO_NET_F_HOST_TSO4,
    spec::VIRTIO_NET_F_HOST_TSO6,
    spec::VIRTIO_NET_F_HOST_ECN,
    spec::VIRTIO_NET_F_HOST_UFO,
    spec::VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_RING_F_EVENT_IDX,
];

/// Of these, those about rings and what is in them: the kernel must know them if it serves the queues.
const OF_RINGS: [u32; 3] =
    [spec::VIRTIO_NET_F_MRG_RXBUF, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX];

/// Of the configuration space, up to the last field that is offered.
const CONFIG_BYTES: usize = 12;

/// Tokens. Queues have their index; what the kernel says of them is in `kernel.rs`; the tap's queues have theirs from here on.
const TAP: u32 = 0x1_0000;
const RECEIVE_TIMER: u32 = 0x8000;
const TRANSMIT_TIMER: u32 = 0x8001;
const NEIGHBOUR_TIMER: u32 = 0x8002;

/// The index of a pair's receive queue; its transmit queue is the next one (5.1.2).
fn receive_queue(pair: usize) -> u16 {
    2 * pair as u16
}

fn bit(feature: u32) -> u64 {
    1 << feature
}
