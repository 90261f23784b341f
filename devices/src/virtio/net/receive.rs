//! From the host to the guest: one receive queue and the tap's queue that feeds it.
//!
//! A packet is read straight into the driver's buffers. How large it is shows only then, so with mergeable buffers as many
//! are taken out of the queue as the largest packet needs. When there are fewer, it is read aside, copied if it fits, and
//! otherwise kept until the driver makes room: one packet for each queue, and while it waits nothing else is read. So a
//! guest that does not read costs no more than that, and what comes meanwhile is the host's to keep or to drop.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net as spec;

use super::header::{MAX_PACKET, NUM_BUFFERS};
use super::neighbour::Beside;
use super::{Counters, bit};
use crate::backend::gate::Gate;
use crate::backend::rate_limiter::RateLimiter;
use crate::backend::tap::{HEADER_BYTES, MAX_SLICES, Tap};
use crate::memory::GuestRam;
use crate::virtio::queue::{Chain, GuestSlice, QueueError};
use crate::virtio::running::{self, REQUESTS_PER_TURN, TIME_PER_TURN, count};
use crate::virtio::turns::Turn;

/// How long a packet waits for room before it is dropped: a driver that never makes enough must not stop the others.
const PATIENCE: Duration = Duration::from_secs(1);

/// When to try again after the tap gave an error: its interface may come back, and nothing else would tell.
const RETRY: Duration = Duration::from_secs(1);

/// One receive queue.
pub struct Receiver {
    queue: usize,
    /// Open while nothing but the next packet is waited for.
    gate: Gate,
    /// The driver has agreed on mergeable buffers (5.1.6.4).
    mergeable: bool,
    /// Chains out of the queue that are not filled yet.
    room: Room,
    /// Where packets are read that may not fit; empty until it is needed.
    pub(super) aside: Vec<u8>,
    /// The packet that waits in `aside`, in bytes, and since when.
    waits: Option<(usize, Instant)>,
    /// The tap gave an error; that is logged once.
    is_failing: bool,
    counters: Arc<Counters>,
}

impl Receiver {
    /// For a queue of the tap, with the packet that waited when it was saved.
    pub fn new(queue: usize, mut waiting: Vec<u8>, counters: Arc<Counters>) -> io::Result<Receiver> {
        waiting.truncate(MAX_PACKET);
        let waits = (waiting.len() >= HEADER_BYTES).then(|| (waiting.len(), Instant::now()));
        if waits.is_some() {
            waiting.resize(MAX_PACKET, 0);
        }
        Ok(Receiver {
            queue,
            gate: Gate::new()?,
            mergeable: false,
            room: Room::default(),
            aside: waiting,
            waits,
            is_failing: false,
            counters,
        })
    }

    /// Readable when the tap has packets and they are wanted.
    pub fn fd(&self) -> RawFd {
        self.gate.fd()
    }

    /// The device runs with these features.
    pub fn start(&mut self, features: u64) {
        self.mergeable = features & bit(spec::VIRTIO_NET_F_MRG_RXBUF) != 0;
    }

    /// Rests, and gives back the chains that were not filled.
    pub fn stop(&mut self, tap: &Tap) -> impl Iterator<Item = Chain> {
        self.rest(tap);
        std::mem::take(&mut self.room).chains.into_iter()
    }

    /// Forgets the packet that waits for the driver that is gone.
    pub fn reset(&mut self) {
        self.waits = None;
    }

    /// The packet that waits, empty where none does.
    pub fn waiting(&self) -> &[u8] {
        self.waits.and_then(|(bytes, _)| self.aside.get(..bytes)).unwrap_or_default()
    }

    /// Wants to hear of no packets until the next [`Receiver::take_turn`].
    pub fn rest(&mut self, tap: &Tap) {
        tap.queue(self.queue).into_iter().for_each(|source| self.gate.close(source));
    }

    /// Fills the driver's buffers. Afterwards the tap is watched, or somebody else gives a reason for another turn: the
    /// driver with a kick when it makes room, the limiter's timer in all other cases. Only who waits for the limiter does
    /// not end its turn by it.
    pub fn take_turn(
        &mut self,
        turn: &mut running::Turn,
        tap: &Tap,
        limiter: &mut RateLimiter,
        beside: Option<&mut Beside>,
    ) -> Result<Turn, QueueError> {
        let until = self.fill(turn, tap, limiter, beside)?;
        match until {
            Until::Readable => tap.queue(self.queue).into_iter().for_each(|source| self.gate.open(source)),
            Until::Called | Until::Admitted { .. } => self.rest(tap),
        }
        Ok(match until {
            Until::Admitted { has_had: false } => Turn::Waits,
            Until::Admitted { has_had: true } => Turn::Partly,
            Until::Readable | Until::Called => Turn::Over,
        })
    }

    /// Takes packets until there are no more, no room, the limiter says so, or the turn is over.
    fn fill(
        &mut self,
        turn: &mut running::Turn,
        tap: &Tap,
        limiter: &mut RateLimiter,
        mut beside: Option<&mut Beside>,
    ) -> Result<Until, QueueError> {
        let begin = Instant::now();
        turn.queue.disable_kicks(turn.memory)?;
        for packets in 0..REQUESTS_PER_TURN {
            if packets > 0 && begin.elapsed() >= TIME_PER_TURN {
                break;
            }
            if !limiter.admits() {
                count(&self.counters.rx_rate_limiter_throttled, 1);
                return Ok(Until::Admitted { has_had: packets > 0 });
            }
            self.make_room(turn)?;
            if self.room.chains.is_empty() {
                count(&self.counters.no_rx_avail_buffer, 1);
                return Ok(Until::Called);
            }
            match self.next(turn.memory, tap, beside.as_deref_mut())? {
                Next::Packet(bytes) => {
                    limiter.pay((bytes - HEADER_BYTES) as u64);
                    self.give(turn, bytes)?;
                }
                Next::Dropped => count(&self.counters.rx_fails, 1),
                Next::Waits => {
                    count(&self.counters.no_rx_avail_buffer, 1);
                    limiter.wake_after(PATIENCE);
                    return Ok(Until::Called);
                }
                Next::None => break,
                Next::Error => {
                    limiter.wake_after(RETRY);
                    return Ok(Until::Called);
                }
            }
        }
        if beside.is_some_and(|beside| beside.neighbour.has_frames()) {
            // The turn is over, and no descriptor tells of these.
            turn.queue.rearm();
        }
        Ok(Until::Readable)
    }

    /// Takes chains out of the queue until the largest packet fits. Without that many, asks for a kick when there are more.
    fn make_room(&mut self, turn: &mut running::Turn) -> Result<(), QueueError> {
        // One more look after asking for kicks, and no third: a driver that lays its rings over one another could keep us
        // here for ever.
        for look in 0..2 {
            while !self.room.is_enough(self.mergeable) {
                let Some(chain) = turn.queue.pop(turn.memory)? else { break };
                self.room.add(chain)?;
            }
            if self.room.is_enough(self.mergeable) || look > 0 || !turn.queue.enable_kicks(turn.memory)? {
                break;
            }
        }
        Ok(())
    }

    /// Gets the next packet into the room.
    fn next(
        &mut self,
        memory: &GuestRam,
        tap: &Tap,
        beside: Option<&mut Beside>,
    ) -> Result<Next, QueueError> {
        if let Some((bytes, since)) = self.waits {
            return self.try_again(memory, bytes, since);
        }
        if let Some(frame) = beside.and_then(|beside| beside.neighbour.give()) {
            return self.give_neighbours(memory, &frame);
        }
        // Without mergeable buffers a packet has one chain, and what does not fit is of no use.
        if !self.mergeable || self.room.bytes >= MAX_PACKET && self.room.segments <= MAX_SLICES {
            let slices = self.room.slices(memory, self.mergeable)?;
            if slices.len() <= MAX_SLICES {
                let room: usize = slices.iter().map(|slice| slice.len()).sum();
                // One byte more than there is room for, to see what did not fit.
                let result = tap.receive(self.queue, &slices, &mut [0]);
                return Ok(self.judge(tap, result, room));
            }
        }
        self.aside.resize(MAX_PACKET, 0);
        let result = tap.receive(self.queue, &[], &mut self.aside);
        match self.judge(tap, result, MAX_PACKET) {
            Next::Packet(bytes) => self.try_again(memory, bytes, Instant::now()),
            other => Ok(other),
        }
    }

    /// Takes a frame that is not from the tap, as if it had been read aside.
    fn give_neighbours(&mut self, memory: &GuestRam, frame: &[u8]) -> Result<Next, QueueError> {
        self.aside.resize(MAX_PACKET, 0);
        let packet = [0; HEADER_BYTES].iter().chain(frame);
        let bytes = self.aside.iter_mut().zip(packet).map(|(place, byte)| *place = *byte).count();
        self.try_again(memory, bytes, Instant::now())
    }

    /// Copies the packet that was read aside, if it fits now.
    fn try_again(&mut self, memory: &GuestRam, bytes: usize, since: Instant) -> Result<Next, QueueError> {
        let room: usize =
            self.room.of_packet(self.mergeable).map(|chain| chain.writable.bytes() as usize).sum();
        if bytes <= room {
            self.waits = None;
            self.room.write(memory, self.aside.get(..bytes).unwrap_or_default())?;
            return Ok(Next::Packet(bytes));
        }
        if !self.mergeable || since.elapsed() >= PATIENCE {
            self.waits = None;
            return Ok(Next::Dropped);
        }
        self.waits = Some((bytes, since));
        Ok(Next::Waits)
    }

    fn judge(&mut self, tap: &Tap, result: io::Result<usize>, room: usize) -> Next {
        match result {
            Ok(bytes) => {
                self.is_failing = false;
                if (HEADER_BYTES..=room).contains(&bytes) { Next::Packet(bytes) } else { Next::Dropped }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Next::None,
            Err(error) => {
                count(&self.counters.tap_read_fails, 1);
                if !std::mem::replace(&mut self.is_failing, true) {
                    log::warn!("network device {}: the host gives no packets: {error}", tap.name());
                }
                Next::Error
            }
        }
    }

    /// Gives the driver the chains that the packet at the front of the room takes.
    fn give(&mut self, turn: &mut running::Turn, bytes: usize) -> Result<(), QueueError> {
        let (mut used, mut first) = (Vec::new(), None);
        let mut left = bytes as u32;
        while left > 0 {
            let Some(chain) = self.room.take_first() else { break };
            let part = left.min(chain.writable.bytes());
            left -= part;
            used.push((chain.head, part));
            first.get_or_insert(chain);
        }
        if let Some(mut first) = first {
            // The kernel leaves this field as it finds it.
            first.writable.take(NUM_BUFFERS)?;
            first.writable.write(turn.memory, &(used.len() as u16).to_le_bytes())?;
        }
        turn.queue.push_all(turn.memory, &used)?;
        count(&self.counters.rx_packets_count, 1);
        count(&self.counters.rx_bytes_count, (bytes - HEADER_BYTES) as u64);
        Ok(())
    }
}

/// When to go on.
enum Until {
    /// When the tap has packets.
    Readable,
    /// When somebody else says so.
    Called,
    /// When the limiter admits more, and those before it have had their turn.
    Admitted { has_had: bool },
}

/// What came of a look for a packet.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// One of so many bytes is in the room, at its front.
    Packet(usize),
    /// One did not fit, or was none.
    Dropped,
    /// One waits for more room.
    Waits,
    None,
    Error,
}

/// Chains to be filled, in their order.
#[derive(Default)]
struct Room {
    chains: VecDeque<Chain>,
    bytes: usize,
    segments: usize,
}

impl Room {
    /// Enough for any packet, or as much as one call takes.
    fn is_enough(&self, mergeable: bool) -> bool {
        match mergeable {
            true => self.bytes >= MAX_PACKET || self.segments >= MAX_SLICES,
            false => !self.chains.is_empty(),
        }
    }

    fn add(&mut self, chain: Chain) -> Result<(), QueueError> {
        // Each buffer has room for a header at least (5.1.6.3.1).
        if (chain.writable.bytes() as usize) < HEADER_BYTES {
            return Err(QueueError::Short { needed: HEADER_BYTES, left: chain.writable.bytes() });
        }
        self.bytes += chain.writable.bytes() as usize;
        self.segments += chain.writable.list().len();
        self.chains.push_back(chain);
        Ok(())
    }

    fn take_first(&mut self) -> Option<Chain> {
        let chain = self.chains.pop_front()?;
        self.bytes -= chain.writable.bytes() as usize;
        self.segments -= chain.writable.list().len();
        Some(chain)
    }

    /// The chains that one packet may lie in.
    fn of_packet(&self, mergeable: bool) -> impl Iterator<Item = &Chain> {
        self.chains.iter().take(if mergeable { usize::MAX } else { 1 })
    }

    fn slices<'a>(&self, memory: &'a GuestRam, mergeable: bool) -> Result<Vec<GuestSlice<'a>>, QueueError> {
        let mut slices = Vec::new();
        for chain in self.of_packet(mergeable) {
            slices.extend(chain.writable.slices(memory)?);
        }
        Ok(slices)
    }

    /// Copies a packet to the front; as much of it as fits.
    fn write(&self, memory: &GuestRam, mut packet: &[u8]) -> Result<(), QueueError> {
        for chain in &self.chains {
            let (part, rest) = packet.split_at(packet.len().min(chain.writable.bytes() as usize));
            chain.writable.clone().write(memory, part)?;
            packet = rest;
        }
        Ok(())
    }
}
