//! The memory device (VIRTIO 1.3, section 5.15): a region of guest addresses in which the driver plugs and unplugs blocks
//! of memory, until they are as many as the host asks for. What is unplugged goes back to the host at once.
//!
//! Does not know what gives the guest its memory: that comes and goes in whole slots, see [`Backing`]. Decides no sizes, and
//! takes nothing from a guest that gives nothing.

mod blocks;
#[cfg(test)]
mod tests;

use std::io;
use std::mem;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddressSpace;

use self::blocks::{Blocks, Mix};
use crate::host::Source;
use crate::memory::Memory;
use crate::state::StateError;
use crate::times::Times;
use crate::virtio::device::{
    Active, DeviceState, DeviceType, Identity, StartError, VirtioDevice, read_space,
};
use crate::virtio::queue::{Chain, Queue, QueueError};
use crate::virtio::reclaim::Ram;
use crate::virtio::running::{REQUESTS_PER_TURN, Running, TIME_PER_TURN, Turn, count};
use crate::virtio::transport::NewError;

const QUEUE_SIZE: u16 = 128;
const QUEUE: u16 = 0;

/// Most blocks of a region: each is a bit here and in a saved state, 256 KiB in all. 4 TiB of the smallest.
pub const MAX_BLOCKS: u64 = 1 << 21;

/// An UNPLUG ALL that has given up so many bytes goes on in another turn: the host needs some 100 ns for each page.
pub const MAX_TURN_BYTES: u64 = 256 << 20;

/// The driver does not touch what is not plugged (5.15.3). One that cannot promise it is refused: there is nothing then.
pub const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Types of requests (5.15.6).
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const REQUEST_BYTES: usize = 24;
const ANSWER_BYTES: usize = 10;

/// What a memory device is made of. The region is whole slots, a slot is whole blocks, and a block is a power of two and
/// whole pages; the region begins at a multiple of a block.
pub struct Config {
    /// Guest-physical.
    pub region: Range<u64>,
    /// In bytes, as all sizes here.
    pub slot_size: u64,
    pub block_size: u64,
    /// Bytes of the pages that back it.
    pub page: u64,
    /// Guest memory, in which `backing` puts what is there.
    pub memory: Memory,
    pub backing: Box<dyn Backing>,
}

/// Gives slots of the region to the guest and takes them back. A slot is out at first.
pub trait Backing: Send {
    /// From now on the guest and its devices reach the slot with this number, which is zeros. Nothing happens to one that is
    /// in.
    fn bring_in(&mut self, slot: usize) -> io::Result<()>;

    /// From now on nobody reaches the slot, and its memory is the host's. On an error it stays in. Nothing happens to one
    /// that is out.
    fn take_out(&mut self, slot: usize) -> io::Result<()>;

    /// Takes memory of the host for this part of a slot that is in, where touching it could find none.
    fn reserve(&mut self, range: Range<u64>) -> io::Result<()>;
}

/// The memory device.
pub struct Mem {
    /// The driver has not been told yet that another size is wanted.
    changed: bool,
    worker: Worker,
    running: Option<Running>,
}

impl Mem {
    /// A stopped device without a plugged block, or, with a state, the one that was saved. Its slots are in then; what was in
    /// them is not this device's to know.
    pub fn new(config: Config, state: Option<State>) -> Result<Mem, NewError> {
        let Config { region, slot_size, block_size, page, memory, backing } = config;
        let size = region.end.saturating_sub(region.start);
        let blocks = size.checked_div(block_size).filter(|blocks| *blocks <= MAX_BLOCKS);
        let slot_blocks = slot_size.checked_div(block_size).and_then(|blocks| usize::try_from(blocks).ok());
        let (Some(blocks), Some(slot_blocks @ 1..)) = (blocks, slot_blocks) else {
            return Err(NewError::Host(io::Error::other("a memory device of that many blocks")));
        };
        let mut worker = Worker {
            blocks: Blocks::new(blocks as usize),
            ram: Ram { regions: vec![region.clone()], page },
            region,
            block_size,
            slot_blocks,
            requested: 0,
            memory,
            backing,
            counters: Arc::default(),
        };
        let changed = state.as_ref().is_some_and(|state| state.changed);
        if let Some(state) = state {
            worker.restore(state)?;
        }
        Ok(Mem { changed, worker, running: None })
    }

    /// How much is to be plugged from now on, in bytes: whole blocks, and no more than the region. The driver is told at once,
    /// or when it runs again.
    pub fn set_requested(&mut self, bytes: u64) {
        self.worker.requested = bytes;
        self.changed = true;
        if let Some(running) = &self.running {
            self.changed = false;
            running.interrupt.config();
        }
    }

    /// Bytes that are to be plugged.
    pub fn requested(&self) -> u64 {
        self.worker.requested
    }

    /// Bytes that are plugged.
    pub fn plugged(&self) -> u64 {
        self.worker.plugged()
    }

    /// What the device has done since it was built.
    pub fn counters(&self) -> Arc<Counters> {
        self.worker.counters.clone()
    }
}

impl VirtioDevice for Mem {
    fn identity(&self) -> Identity {
        let features =
            F_UNPLUGGED_INACCESSIBLE | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
        Identity {
            device_type: DeviceType::Memory,
            features,
            queue_sizes: vec![QUEUE_SIZE],
            config_bytes: 56,
        }
    }

    /// `struct virtio_mem_config` (5.15.4). All of the region is usable; the node has no meaning.
    fn config(&self, offset: u64, data: &mut [u8]) {
        let worker = &self.worker;
        let (node, size) = (0, worker.region.end - worker.region.start);
        let (plugged, requested) = (worker.plugged(), worker.requested);
        let space = [worker.block_size, node, worker.region.start, size, size, plugged, requested];
        read_space(space.map(u64::to_le_bytes).as_flattened(), offset, data);
    }

    fn start(&mut self, active: Active) -> Result<Vec<Source>, StartError> {
        if active.features & F_UNPLUGGED_INACCESSIBLE == 0 {
            return Err(StartError::Feature { name: "VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE" });
        }
        let (running, sources) = Running::start(active, 1)?;
        if mem::take(&mut self.changed) {
            running.interrupt.config();
        }
        self.running = Some(running);
        Ok(sources)
    }

    /// Memory is looked up anew for each answer: a request may have taken away where the rings are.
    fn handle(&mut self, _token: u32) {
        let Some(running) = &mut self.running else { return };
        let worker = &mut self.worker;
        count(&worker.counters.queue_event_count, 1);
        running.clear_kick(QUEUE);
        let begin = Instant::now();
        for _ in 0..REQUESTS_PER_TURN {
            let mut next = None;
            running.turn(QUEUE, |turn| {
                next = take(turn)?;
                Ok(())
            });
            let Some((chain, request)) = next else { return };
            let answer = worker.serve(request);
            running.turn(QUEUE, |turn| match answer {
                Some(answer) => worker.tell(turn, chain, answer),
                None => {
                    turn.queue.undo_pop(chain);
                    Ok(())
                }
            });
            if answer.is_none() || begin.elapsed() >= TIME_PER_TURN {
                break;
            }
        }
        running.ring(QUEUE);
    }

    fn stop(&mut self) -> Vec<Queue> {
        self.running.take().map(Running::stop).unwrap_or_default()
    }

    // A reset by the driver changes nothing (5.15.5.2): what is plugged is memory that the guest may use, and the next driver
    // finds out or unplugs it all. A reset of the whole machine ends the process.

    fn save(&self) -> DeviceState {
        DeviceState::Memory(State {
            requested: self.worker.requested,
            changed: self.changed,
            plugged: self.worker.blocks.bits().to_vec(),
        })
    }
}

/// [`Mem`] as it is saved. What is in plugged blocks is saved with guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    requested: u64,
    changed: bool,
    /// A bit for each block, the lowest first.
    plugged: Vec<u64>,
}

/// What a memory device has done since it was built. Failures are requests without an ACK.
#[derive(Debug, Default)]
pub struct Counters {
    /// Kicks taken in, and turns the device gave itself.
    pub queue_event_count: AtomicU64,
    /// Requests that are none, and those without room for an answer.
    pub queue_event_fails: AtomicU64,
    pub plug: Requests,
    pub plug_bytes: AtomicU64,
    pub unplug: Requests,
    pub unplug_bytes: AtomicU64,
    /// Parts of what was unplugged that the host would not take back.
    pub unplug_discard_fails: AtomicU64,
    pub unplug_all: Requests,
    pub state: Requests,
}

/// What became of requests of one type.
#[derive(Debug, Default)]
pub struct Requests {
    pub count: AtomicU64,
    pub fails: AtomicU64,
    pub time: Times,
}

/// A request as it was read, if it is one.
type Request = Option<[u8; REQUEST_BYTES]>;

/// Types of answers (5.15.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Ack,
    /// The size that is wanted does not allow it.
    Nack,
    /// The host cannot do it now.
    Busy,
    /// The driver's fault.
    Error,
    /// ACK, with the answer to STATE.
    State(Mix),
}

impl Answer {
    fn bytes(self) -> [u8; ANSWER_BYTES] {
        let (kind, state) = match self {
            Answer::Ack => (0, 0),
            Answer::Nack => (1, 0),
            Answer::Busy => (2, 0),
            Answer::Error => (3, 0),
            Answer::State(mix) => (0, mix as u8),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

/// The next chain and the request in it.
fn take(turn: &mut Turn) -> Result<Option<(Chain, Request)>, QueueError> {
    let next = match turn.queue.pop(turn.memory)? {
        // One that came just before kicks were asked for brings none.
        None if turn.queue.enable_kicks(turn.memory)? => turn.queue.pop(turn.memory)?,
        next => next,
    };
    let Some(mut chain) = next else { return Ok(None) };
    let mut bytes = [0; REQUEST_BYTES];
    match chain.readable.read(turn.memory, &mut bytes) {
        Ok(()) => Ok(Some((chain, Some(bytes)))),
        Err(QueueError::Short { .. }) => Ok(Some((chain, None))),
        Err(error) => Err(error),
    }
}

/// What serves requests; the device is its shell.
struct Worker {
    region: Range<u64>,
    block_size: u64,
    /// Blocks of a slot.
    slot_blocks: usize,
    blocks: Blocks,
    requested: u64,
    ram: Ram,
    memory: Memory,
    backing: Box<dyn Backing>,
    counters: Arc<Counters>,
}

impl Worker {
    /// `None`: not done yet, and to be asked for once more.
    fn serve(&mut self, request: Request) -> Option<Answer> {
        let begin = Instant::now();
        let Some(request) = request else {
            count(&self.counters.queue_event_fails, 1);
            return Some(Answer::Error);
        };
        let [kind_0, kind_1, _, _, _, _, _, _, rest @ ..] = request;
        let [a0, a1, a2, a3, a4, a5, a6, a7, n0, n1, ..] = rest;
        let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let blocks = self.blocks_at(address, u16::from_le_bytes([n0, n1]));
        let kind = u16::from_le_bytes([kind_0, kind_1]);
        let answer = match (kind, blocks) {
            (UNPLUG_ALL, _) => self.unplug_some().then_some(Answer::Ack)?,
            (PLUG, Some(blocks)) => self.plug(blocks),
            (UNPLUG, Some(blocks)) => self.unplug(blocks),
            (STATE, Some(blocks)) => Answer::State(self.blocks.mix(blocks)),
            _ => Answer::Error,
        };
        let told = match kind {
            PLUG => &self.counters.plug,
            UNPLUG => &self.counters.unplug,
            UNPLUG_ALL => &self.counters.unplug_all,
            STATE => &self.counters.state,
            _ => {
                count(&self.counters.queue_event_fails, 1);
                return Some(answer);
            }
        };
        count(&told.count, 1);
        told.time.add(begin);
        let failed = !matches!(answer, Answer::Ack | Answer::State(_));
        count(&told.fails, u64::from(failed));
        Some(answer)
    }

    fn tell(&self, turn: &mut Turn, mut chain: Chain, answer: Answer) -> Result<(), QueueError> {
        let written = match chain.writable.write(turn.memory, &answer.bytes()) {
            Ok(()) => ANSWER_BYTES as u32,
            // A driver that leaves no room for the answer gets none.
            Err(QueueError::Short { .. }) => {
                count(&self.counters.queue_event_fails, 1);
                0
            }
            Err(error) => return Err(error),
        };
        turn.queue.push(turn.memory, chain.head, written)
    }

    /// The blocks that the driver names, if they are some and all in the region.
    fn blocks_at(&self, address: u64, number: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.region.start)?;
        if !offset.is_multiple_of(self.block_size) || number == 0 {
            return None;
        }
        let first = usize::try_from(offset / self.block_size).ok()?;
        let end = first.checked_add(number.into())?;
        (end <= self.blocks.len()).then_some(first..end)
    }

    fn plug(&mut self, blocks: Range<usize>) -> Answer {
        if self.blocks.count(blocks.clone()) > 0 {
            return Answer::Error;
        }
        let bytes = blocks.len() as u64 * self.block_size;
        if self.plugged() + bytes > self.requested {
            return Answer::Nack;
        }
        match self.fill(&blocks) {
            Ok(()) => {
                self.blocks.set(blocks, true);
                count(&self.counters.plug_bytes, bytes);
                Answer::Ack
            }
            Err(error) => {
                log::warn!("memory: {bytes} bytes cannot be plugged: {error}");
                self.clear(blocks);
                Answer::Busy
            }
        }
    }

    /// Puts memory under these blocks, which is zeros.
    fn fill(&mut self, blocks: &Range<usize>) -> io::Result<()> {
        for (slot, part) in self.slots(blocks.clone()) {
            self.backing.bring_in(slot)?;
            // A guest that touches blocks of a slot in which others are plugged finds memory there.
            let range = self.bytes(&part);
            let given = self.ram.give_back(&self.memory.memory(), range.clone());
            given.map_err(|_| io::Error::other("what was in it cannot be discarded"))?;
            self.backing.reserve(range)?;
        }
        Ok(())
    }

    fn unplug(&mut self, blocks: Range<usize>) -> Answer {
        if self.blocks.count(blocks.clone()) < blocks.len() {
            return Answer::Error;
        }
        count(&self.counters.unplug_bytes, blocks.len() as u64 * self.block_size);
        self.blocks.set(blocks.clone(), false);
        self.clear(blocks);
        Answer::Ack
    }

    /// Unplugs as much as a turn may; true when nothing is left.
    fn unplug_some(&mut self) -> bool {
        let mut left = MAX_TURN_BYTES;
        for (_, blocks) in self.slots(0..self.blocks.len()) {
            let bytes = self.blocks.count(blocks.clone()) as u64 * self.block_size;
            if bytes == 0 {
                continue;
            }
            if left == 0 {
                return false;
            }
            left = left.saturating_sub(bytes);
            count(&self.counters.unplug_bytes, bytes);
            self.blocks.set(blocks.clone(), false);
            self.clear(blocks);
        }
        true
    }

    /// Gives blocks that are not plugged back to the host, and the slots in which nothing else is plugged.
    fn clear(&mut self, blocks: Range<usize>) {
        for (slot, part) in self.slots(blocks) {
            let whole = slot * self.slot_blocks..(slot + 1) * self.slot_blocks;
            if self.blocks.count(whole) == 0 {
                match self.backing.take_out(slot) {
                    Ok(()) => continue,
                    Err(error) => log::error!("memory: slot {slot} stays the guest's: {error}"),
                }
            }
            let range = self.bytes(&part);
            if self.ram.give_back(&self.memory.memory(), range).is_err() {
                count(&self.counters.unplug_discard_fails, 1);
            }
        }
    }

    /// The slots that these blocks are in, and which of the blocks are in each.
    fn slots(&self, blocks: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let size = self.slot_blocks;
        let slots = blocks.start / size..blocks.end.div_ceil(size);
        slots.map(move |slot| {
            let (start, end) = (slot * size, (slot + 1) * size);
            (slot, start.max(blocks.start)..end.min(blocks.end))
        })
    }

    /// Where blocks lie. Those of the region do not overflow.
    fn bytes(&self, blocks: &Range<usize>) -> Range<u64> {
        let at = |block: usize| self.region.start + block as u64 * self.block_size;
        at(blocks.start)..at(blocks.end)
    }

    fn plugged(&self) -> u64 {
        self.blocks.plugged() as u64 * self.block_size
    }

    fn restore(&mut self, state: State) -> Result<(), NewError> {
        let size = self.region.end - self.region.start;
        if !state.requested.is_multiple_of(self.block_size) || state.requested > size {
            let rule = format!("a multiple of {} up to {size}", self.block_size);
            return Err(StateError::new("memory", "requested", state.requested, rule).into());
        }
        let (words, len) = (state.plugged.len(), self.blocks.len());
        self.blocks = Blocks::restore(state.plugged, len).ok_or_else(|| {
            StateError::new("memory", "plugged", format!("{words} words of bits"), format!("{len} bits"))
        })?;
        self.requested = state.requested;
        for (slot, blocks) in self.slots(0..len) {
            for block in blocks.filter(|block| self.blocks.count(*block..block + 1) > 0) {
                self.backing.bring_in(slot)?;
                let range = self.bytes(&(block..block + 1));
                self.backing.reserve(range)?;
            }
        }
        Ok(())
    }
}
