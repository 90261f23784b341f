//! The one gate between a driver's ring and a device: a split virtqueue (VIRTIO 1.3, section 2.7) whose descriptors are
//! copied out of guest memory once, checked, and handed on as lists of segments that lie in guest RAM.
//!
//! What is wrong in here is the driver's fault by definition, and says so in [`QueueError`]. Does not know what a request
//! means, never blocks and allocates no more than [`MAX_SEGMENTS`] entries per chain. Packed rings are not offered.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::QueueT;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::bitmap::BS;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::{GuestRam, is_writable};
use crate::virtio::batching::Batching;

/// Most descriptors one chain may have, indirect ones included. A chain may not be longer than its queue (2.7.5.3.1), and
/// no queue of ours is longer than this; so a chain that reaches it is a loop.
pub const MAX_SEGMENTS: usize = 1024;

/// One queue of a running device.
pub struct Queue {
    pub index: u16,
    pub ring: virtio_queue::Queue,
    /// Signalled when the driver kicks this queue; non-blocking.
    pub kick: EventFd,
    /// The used index when the driver was last asked whether it wants an interrupt.
    asked_at: Wrapping<u16>,
    /// Whether it pays to wait a little where it is empty.
    pub(super) batching: Batching,
}

impl Queue {
    /// A queue whose driver wants to know of nothing yet.
    pub fn new(index: u16, ring: virtio_queue::Queue, kick: EventFd) -> Queue {
        let asked_at = Wrapping(ring.next_used());
        Queue { index, ring, kick, asked_at, batching: Batching::default() }
    }

    /// Whether the device may write where its side of the ring is. At the start of each turn: memory can come and go.
    pub fn check(&self, memory: &GuestRam) -> Result<(), QueueError> {
        let (address, bytes) = (self.ring.used_ring(), used_ring_bytes(self.ring.size()));
        match is_writable(memory, GuestAddress(address), bytes) {
            true => Ok(()),
            false => Err(QueueError::ReadOnly { address, bytes }),
        }
    }

    /// The next chain the driver made available, or `None` when there is none. It stays the driver's until
    /// [`Queue::push`] or [`Queue::undo_pop`].
    pub fn pop(&mut self, memory: &GuestRam) -> Result<Option<Chain>, QueueError> {
        let Some(head) = self.head(memory)? else { return Ok(None) };
        let chain = self.chain(memory, head)?;
        self.step();
        Ok(Some(chain))
    }

    /// As [`Queue::pop`] for who does not look at the chain: its head, a number of this queue's table.
    pub fn pop_head(&mut self, memory: &GuestRam) -> Result<Option<u16>, QueueError> {
        let Some(head) = self.head(memory)? else { return Ok(None) };
        let entries = self.ring.size();
        if head >= entries {
            return Err(QueueError::Index { index: head, entries: entries.into() });
        }
        self.step();
        Ok(Some(head))
    }

    /// The chain with this head, which was popped before and not pushed.
    pub fn chain(&self, memory: &GuestRam, head: u16) -> Result<Chain, QueueError> {
        Chain::parse(memory, self.ring.desc_table(), self.ring.size(), head)
    }

    fn head(&self, memory: &GuestRam) -> Result<Option<u16>, QueueError> {
        let next = Wrapping(self.ring.next_avail());
        let pending = (self.avail_index(memory)? - next).0;
        let size = self.ring.size();
        if pending > size {
            return Err(QueueError::AvailIndex { pending, size });
        }
        if pending == 0 {
            return Ok(None);
        }
        let slot = u64::from(next.0 % size.max(1));
        load(memory, self.ring.avail_ring(), AVAIL_RING + 2 * slot).map(Some)
    }

    fn step(&mut self) {
        self.ring.set_next_avail((Wrapping(self.ring.next_avail()) + Wrapping(1)).0);
    }

    /// Takes back the last [`Queue::pop`]: the same chain comes again. For a request whose time has not come yet.
    pub fn undo_pop(&mut self, _chain: Chain) {
        self.ring.set_next_avail((Wrapping(self.ring.next_avail()) - Wrapping(1)).0);
    }

    /// Gives the chain with this [`Chain::head`] back to the driver, with `written` bytes at the start of its writable
    /// part.
    pub fn push(&mut self, memory: &GuestRam, head: u16, written: u32) -> Result<(), QueueError> {
        self.push_all(memory, &[(head, written)])
    }

    /// As [`Queue::push`] for several chains that belong together: the driver sees all of them or none (2.7.8.2).
    pub fn push_all(&mut self, memory: &GuestRam, used: &[(u16, u32)]) -> Result<(), QueueError> {
        let ring = self.ring.used_ring();
        let missing = QueueError::Ring { address: ring };
        let at =
            |offset| ring.checked_add(offset).map(GuestAddress).ok_or(QueueError::Ring { address: ring });
        let mut next = Wrapping(self.ring.next_used());
        for (head, written) in used {
            let slot = u64::from(next.0 % self.ring.size().max(1));
            let element = [u32::from(*head).to_le(), written.to_le()];
            let address = at(USED_RING + size_of_val(&element) as u64 * slot)?;
            memory.write_obj(element, address).map_err(|_| QueueError::Ring { address: ring })?;
            next += 1;
        }
        // The elements must be there before the index says so.
        memory.store(next.0.to_le(), at(USED_INDEX)?, Ordering::Release).map_err(|_| missing)?;
        self.ring.set_next_used(next.0);
        Ok(())
    }

    /// Asks the driver to kick again. True when chains arrived meanwhile, for which no kick may come: pop them first.
    pub fn enable_kicks(&mut self, memory: &GuestRam) -> Result<bool, QueueError> {
        let address = self.ring.used_ring();
        self.ring.enable_notification(memory).map_err(|_| QueueError::Ring { address })
    }

    /// Tells the driver that kicks are not needed now. A hint: it may kick all the same.
    pub fn disable_kicks(&mut self, memory: &GuestRam) -> Result<(), QueueError> {
        let address = self.ring.used_ring();
        self.ring.disable_notification(memory).map_err(|_| QueueError::Ring { address })
    }

    /// Whether the driver wants an interrupt for what was pushed since the last call (2.7.7, 2.7.10).
    pub fn wants_interrupt(&mut self, memory: &GuestRam) -> Result<bool, QueueError> {
        let now = Wrapping(self.ring.next_used());
        let before = std::mem::replace(&mut self.asked_at, now);
        if now == before {
            return Ok(false);
        }
        // The used index must be visible before the driver's wish is read: the driver writes its wish and then looks at
        // the index.
        fence(Ordering::SeqCst);
        let ring = self.ring.avail_ring();
        if !self.ring.event_idx_enabled() {
            return Ok(u32::from(load(memory, ring, AVAIL_FLAGS)?) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let event = Wrapping(load(memory, ring, AVAIL_RING + 2 * u64::from(self.ring.size()))?);
        Ok((now - event - Wrapping(1)).0 < (now - before).0)
    }

    /// Takes in the kicks that have come, so that the descriptor is no longer ready.
    pub fn clear_kick(&self) {
        // Nothing to read is as good as read: the descriptor is non-blocking.
        let _ = self.kick.read();
    }

    /// Kicks the queue for the driver, so that the device comes back to it after others had their turn.
    pub fn rearm(&self) {
        // Fails only when the counter is full, and then it is ready anyway.
        let _ = self.kick.write(1);
    }

    /// The state of the ring. The chains in it are in guest memory; nothing else has to be kept.
    pub fn save(&self) -> QueueState {
        let state = self.ring.state();
        QueueState {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            event_idx: state.event_idx_enabled,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
            next_avail: state.next_avail,
            next_used: state.next_used,
        }
    }

    /// The queue that [`Queue::save`] described, with a doorbell of its own. Sizes and alignment are checked here; that
    /// the rings lie in guest memory is not, as with a queue that a driver sets up: each access checks it.
    pub fn restore(index: u16, state: &QueueState, kick: EventFd) -> Result<Queue, QueueStateError> {
        Ok(Queue::new(index, state.ring()?, kick))
    }

    fn avail_index(&self, memory: &GuestRam) -> Result<Wrapping<u16>, QueueError> {
        load(memory, self.ring.avail_ring(), AVAIL_INDEX).map(Wrapping)
    }
}

/// [`Queue`] as it is saved: the fields of the ring, without its doorbell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    pub max_size: u16,
    pub size: u16,
    pub ready: bool,
    pub event_idx: bool,
    pub desc_table: u64,
    pub avail_ring: u64,
    pub used_ring: u64,
    pub next_avail: u16,
    pub next_used: u16,
}

impl QueueState {
    /// The ring with these values. Fails on sizes and alignments that no driver could have set.
    pub fn ring(&self) -> Result<virtio_queue::Queue, QueueStateError> {
        let state = virtio_queue::QueueState {
            max_size: self.max_size,
            size: self.size,
            ready: self.ready,
            event_idx_enabled: self.event_idx,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
            next_avail: self.next_avail,
            next_used: self.next_used,
        };
        state.try_into().map_err(QueueStateError)
    }
}

/// A saved queue that no device could have had: the file is damaged.
#[derive(Debug, thiserror::Error)]
#[error("saved virtqueue: {0}")]
pub struct QueueStateError(virtio_queue::Error);

/// A buffer of the driver: guest-physical, not empty, and in guest RAM when it was parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub address: GuestAddress,
    pub len: u32,
}

/// One request of the driver, copied out of its ring: what the device may read, then what it may write.
#[derive(Debug, PartialEq, Eq)]
pub struct Chain {
    /// Names the chain to the driver when it is pushed.
    pub head: u16,
    pub readable: Segments,
    pub writable: Segments,
}

impl Chain {
    fn parse(memory: &GuestRam, table: u64, entries: u16, head: u16) -> Result<Chain, QueueError> {
        let mut chain = Chain { head, readable: Segments::default(), writable: Segments::default() };
        let mut table = Table { address: table, entries: entries.into(), indirect: false };
        let mut index = head;
        // One step more than buffers: going over to an indirect table is a step.
        for _ in 0..=MAX_SEGMENTS {
            let descriptor = table.get(memory, index)?;
            if descriptor.refers_to_indirect_table() {
                table = table.switch(&descriptor)?;
                index = 0;
                continue;
            }
            chain.add(memory, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(chain);
            }
            index = descriptor.next();
        }
        Err(QueueError::Endless { head })
    }

    fn add(&mut self, memory: &GuestRam, descriptor: &Descriptor) -> Result<(), QueueError> {
        let segment = Segment { address: descriptor.addr(), len: descriptor.len() };
        let (list, access) = match descriptor.is_write_only() {
            true => (&mut self.writable, Permissions::Write),
            false if self.writable.list.is_empty() => (&mut self.readable, Permissions::Read),
            false => return Err(QueueError::Order { head: self.head }),
        };
        if segment.len == 0 {
            return Ok(()); // Not forbidden, and harmless once it is gone.
        }
        if !memory.check_range(segment.address, segment.len as usize, access) {
            return Err(QueueError::Buffer { address: segment.address.0, len: segment.len });
        }
        if descriptor.is_write_only() && !is_writable(memory, segment.address, segment.len.into()) {
            return Err(QueueError::ReadOnly { address: segment.address.0, bytes: segment.len.into() });
        }
        list.list.push(segment);
        list.bytes = list.bytes.checked_add(segment.len).ok_or(QueueError::Bytes { head: self.head })?;
        Ok(())
    }
}

/// Buffers of one direction in their order, used up from the front.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segments {
    list: Vec<Segment>,
    bytes: u32,
}

impl Segments {
    /// Of buffers that were checked elsewhere.
    #[cfg(any(test, feature = "testing"))]
    pub fn new(list: Vec<Segment>) -> Segments {
        let bytes = list.iter().map(|segment| segment.len).sum();
        Segments { list, bytes }
    }

    /// Bytes left.
    pub fn bytes(&self) -> u32 {
        self.bytes
    }

    /// What is left, in order.
    pub fn list(&self) -> &[Segment] {
        &self.list
    }

    /// Fills `data` from the front of the buffers and uses that part up.
    pub fn read(&mut self, memory: &GuestRam, data: &mut [u8]) -> Result<(), QueueError> {
        let mut done = 0;
        for part in self.take(data.len())?.list {
            let end = done + part.len as usize;
            let piece = data.get_mut(done..end).unwrap_or_default();
            memory.read_slice(piece, part.address).map_err(|_| part.gone())?;
            done = end;
        }
        Ok(())
    }

    /// Writes `data` to the front of the buffers and uses that part up.
    pub fn write(&mut self, memory: &GuestRam, data: &[u8]) -> Result<(), QueueError> {
        let mut done = 0;
        for part in self.take(data.len())?.list {
            let end = done + part.len as usize;
            let piece = data.get(done..end).unwrap_or_default();
            memory.write_slice(piece, part.address).map_err(|_| part.gone())?;
            done = end;
        }
        Ok(())
    }

    /// Cuts the first `bytes` off as a list of their own; all or nothing.
    pub fn take(&mut self, bytes: usize) -> Result<Segments, QueueError> {
        let short = QueueError::Short { needed: bytes, left: self.bytes };
        let Some(rest) = u32::try_from(bytes).ok().and_then(|bytes| self.bytes.checked_sub(bytes)) else {
            return Err(short);
        };
        let mut front = Segments { list: Vec::new(), bytes: self.bytes - rest };
        let mut missing = front.bytes;
        let mut whole = 0;
        for segment in &mut self.list {
            if missing < segment.len {
                if missing > 0 {
                    front.list.push(Segment { address: segment.address, len: missing });
                    segment.address = segment.address.unchecked_add(missing.into());
                    segment.len -= missing;
                }
                break;
            }
            missing -= segment.len;
            front.list.push(*segment);
            whole += 1;
        }
        self.list.drain(..whole);
        self.bytes = rest;
        Ok(front)
    }

    /// Cuts the last byte off and says where it is; `None` when there is none.
    pub fn take_last_byte(&mut self) -> Option<GuestAddress> {
        let last = self.list.last_mut()?;
        last.len -= 1;
        self.bytes -= 1;
        let address = last.address.unchecked_add(last.len.into());
        if last.len == 0 {
            self.list.pop();
        }
        Some(address)
    }

    /// What is left as host memory. A segment that crosses regions of guest RAM becomes several slices.
    pub fn slices<'a>(&self, memory: &'a GuestRam) -> Result<Vec<GuestSlice<'a>>, QueueError> {
        let mut slices = Vec::with_capacity(self.list.len());
        for segment in &self.list {
            // The list holds buffers of one direction, which `Chain::add` has checked for it.
            let parts = memory.get_slices(segment.address, segment.len as usize, Permissions::ReadWrite);
            for part in parts.map_err(|_| segment.gone())? {
                slices.push(part.map_err(|_| segment.gone())?);
            }
        }
        Ok(slices)
    }
}

/// A piece of guest RAM in host memory; the guest may change it at any time.
pub type GuestSlice<'a> = VolatileSlice<'a, BS<'a, <GuestRam as GuestMemory>::Bitmap>>;

/// How the driver broke the rules of the queue. The device cannot go on: DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum QueueError {
    #[error("the ring at {address:#x} is not in guest memory")]
    Ring { address: u64 },
    #[error("the available index is {pending} ahead, the queue has only {size} entries")]
    AvailIndex { pending: u16, size: u16 },
    #[error("descriptor {index} is beyond its table of {entries}")]
    Index { index: u16, entries: u32 },
    #[error("descriptor {index} of the table at {address:#x} is not in guest memory")]
    Table { index: u16, address: u64 },
    #[error("an indirect table of {bytes} bytes is empty or not a whole number of descriptors")]
    IndirectSize { bytes: u32 },
    #[error("an indirect descriptor has a next one")]
    IndirectNext,
    #[error("an indirect table refers to an indirect table")]
    Nested,
    #[error("the chain at {head} loops or has more than {MAX_SEGMENTS} descriptors")]
    Endless { head: u16 },
    #[error("the chain at {head} has a readable buffer after a writable one")]
    Order { head: u16 },
    #[error("the chain at {head} has 4 GiB or more in one direction")]
    Bytes { head: u16 },
    #[error("the buffer {address:#x}+{len:#x} is not in guest memory")]
    Buffer { address: u64, len: u32 },
    #[error("the device may only read what is at {address:#x}+{bytes:#x}")]
    ReadOnly { address: u64, bytes: u64 },
    #[error("the chain at {head} is made available again before it was used")]
    Twice { head: u16 },
    #[error("the request needs {needed} more bytes, its buffers have {left}")]
    Short { needed: usize, left: u32 },
}

/// Offsets in the available ring (2.7.6).
const AVAIL_FLAGS: u64 = 0;
const AVAIL_INDEX: u64 = 2;
const AVAIL_RING: u64 = 4;
/// Offsets in the used ring (2.7.8).
const USED_INDEX: u64 = 2;
const USED_RING: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;
const AVAIL_EVENT_BYTES: u64 = 2;

const DESCRIPTOR_BYTES: u32 = size_of::<Descriptor>() as u32;

impl Segment {
    fn gone(&self) -> QueueError {
        QueueError::Buffer { address: self.address.0, len: self.len }
    }
}

/// Where descriptors are read from: the queue's own table, or one indirect table.
struct Table {
    address: u64,
    entries: u32,
    indirect: bool,
}

impl Table {
    fn get(&self, memory: &GuestRam, index: u16) -> Result<Descriptor, QueueError> {
        if u32::from(index) >= self.entries {
            return Err(QueueError::Index { index, entries: self.entries });
        }
        let missing = QueueError::Table { index, address: self.address };
        let offset = u64::from(index) * u64::from(DESCRIPTOR_BYTES);
        let Some(address) = self.address.checked_add(offset) else {
            return Err(missing);
        };
        memory.read_obj::<RawDescriptor>(GuestAddress(address)).map(Descriptor::from).map_err(|_| missing)
    }

    fn switch(&self, descriptor: &Descriptor) -> Result<Table, QueueError> {
        let bytes = descriptor.len();
        if self.indirect {
            return Err(QueueError::Nested);
        }
        if descriptor.has_next() {
            return Err(QueueError::IndirectNext);
        }
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(QueueError::IndirectSize { bytes });
        }
        Ok(Table { address: descriptor.addr().0, entries: bytes / DESCRIPTOR_BYTES, indirect: true })
    }
}

fn used_ring_bytes(entries: u16) -> u64 {
    USED_RING + USED_ELEMENT_BYTES * u64::from(entries) + AVAIL_EVENT_BYTES
}

fn load(memory: &GuestRam, ring: u64, offset: u64) -> Result<u16, QueueError> {
    let value = ring.checked_add(offset).and_then(|a| memory.load(GuestAddress(a), Ordering::Acquire).ok());
    value.map(u16::from_le).ok_or(QueueError::Ring { address: ring })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::GuestAddressSpace;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::virtio::testing::{self, Buffer, Driver, EVENT_IDX, INDIRECT, NEXT, WRITE};

    const RAM: usize = 1 << 20;

    fn rig(features: u64) -> (crate::memory::Memory, Driver, Queue) {
        let memory = testing::ram(RAM);
        let driver = Driver::new(&memory, 0x1000, 8, features);
        let queue = driver.queue(0);
        (memory, driver, queue)
    }

    fn buffer(address: u64, len: u32, writable: bool) -> Buffer {
        Buffer { address, len, writable }
    }

    /// What the device says of the chain that `break_it` makes available.
    fn fault(break_it: impl FnOnce(&mut Driver)) -> QueueError {
        let (memory, mut driver, mut queue) = rig(0);
        break_it(&mut driver);
        queue.pop(&memory.memory()).unwrap_err()
    }

    #[test]
    fn a_chain_comes_as_readable_and_writable_segments_and_goes_back_used() {
        for indirect in [false, true] {
            let (memory, mut driver, mut queue) = rig(0);
            let view = memory.memory();
            let out = driver.data(b"head");
            let more = driver.data(b"er, data");
            let room = driver.room(5);
            let all = [out, more, room];
            let head = if indirect { driver.add_indirect(&all) } else { driver.add(&all) };

            let mut chain = queue.pop(&view).unwrap().unwrap();
            assert_eq!(chain.head, head);
            assert_eq!((chain.readable.bytes(), chain.writable.bytes()), (12, 5));
            let mut header = [0; 6];
            chain.readable.read(&view, &mut header).unwrap();
            assert_eq!(&header, b"header");
            assert_eq!(chain.readable.bytes(), 6);
            assert_eq!(chain.writable.take_last_byte(), Some(GuestAddress(room.address + 4)));
            chain.writable.write(&view, b"done").unwrap();
            assert_eq!(queue.pop(&view), Ok(None));

            queue.push(&view, chain.head, 5).unwrap();
            assert_eq!(driver.reap(), Some(testing::Used { head, written: 5 }));
            assert_eq!(driver.read(room), b"done\0");
        }
    }

    #[test]
    fn an_indirect_table_may_follow_direct_descriptors() {
        let (memory, mut driver, mut queue) = rig(0);
        let table = driver.data(&[0; 16]);
        driver.set_descriptor_at(table.address, Descriptor::new(0x5000, 7, WRITE, 0));
        driver.set_descriptor(0, Descriptor::new(0x4000, 3, NEXT, 1));
        driver.set_descriptor(1, Descriptor::new(table.address, 16, INDIRECT | WRITE, 0));
        driver.offer(0);
        let chain = queue.pop(&memory.memory()).unwrap().unwrap();
        assert_eq!(chain.readable.list(), [Segment { address: GuestAddress(0x4000), len: 3 }]);
        assert_eq!(chain.writable.list(), [Segment { address: GuestAddress(0x5000), len: 7 }]);
    }

    #[test]
    fn a_chain_taken_back_comes_again() {
        let (memory, mut driver, mut queue) = rig(0);
        let head = driver.add(&[buffer(0x4000, 1, false)]);
        let chain = queue.pop(&memory.memory()).unwrap().unwrap();
        queue.undo_pop(chain);
        assert_eq!(queue.pop(&memory.memory()).unwrap().unwrap().head, head);
    }

    #[test]
    fn the_queue_goes_round_for_ever() {
        for features in [0, EVENT_IDX] {
            let (memory, mut driver, mut queue) = rig(features);
            let view = memory.memory();
            for _ in 0..0x1_0000 / 8 + 2 {
                let heads: Vec<u16> = (0..8).map(|_| driver.add(&[buffer(0x4000, 1, true)])).collect();
                for &head in &heads {
                    assert_eq!(queue.pop(&view).unwrap().unwrap().head, head);
                    queue.push(&view, head, 1).unwrap();
                }
                assert_eq!(queue.pop(&view), Ok(None));
                let used: Vec<u16> = driver.reap_all().iter().map(|used| used.head).collect();
                assert_eq!(used, heads);
            }
        }
    }

    /// RAM as ever, and behind it a page that is mapped to be read.
    fn partly_read_only() -> crate::memory::Memory {
        let (access, flags) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let page = vm_memory::MmapRegion::build(None, 0x1000, access, flags).unwrap();
        let page = vm_memory::GuestRegionMmap::new(page, GuestAddress(RAM as u64)).unwrap();
        let with = testing::ram(RAM).memory().insert_region(std::sync::Arc::new(page)).unwrap();
        crate::memory::Memory::new(with)
    }

    #[test]
    fn where_a_device_may_only_read_it_takes_no_room() {
        let memory = partly_read_only();
        let far = RAM as u64;
        for (address, bytes) in [(far, 1), (far + 0xfff, 1), (far - 1, 2)] {
            let mut driver = Driver::new(&memory, 0x1000, 8, 0);
            let mut queue = driver.queue(0);
            driver.add(&[buffer(address, bytes, false)]);
            let chain = queue.pop(&memory.memory()).unwrap().unwrap();
            assert_eq!(chain.readable.bytes(), bytes);
            driver.add(&[buffer(address, bytes, true)]);
            let refused = QueueError::ReadOnly { address, bytes: bytes.into() };
            assert_eq!(queue.pop(&memory.memory()).unwrap_err(), refused);
        }
    }

    #[test]
    fn a_used_ring_where_a_device_may_only_read_breaks_the_device() {
        use crate::virtio::device::Active;
        use crate::virtio::running::{Running, Step};
        let (memory, calls) = (partly_read_only(), std::sync::Arc::<testing::Calls>::default());
        for (used_ring, works) in [(RAM as u64 - 8, false), (RAM as u64 + 0x10, false), (0x8000, true)] {
            let mut driver = Driver::new(&memory, 0x1000, 8, 0);
            let room = driver.room(1);
            driver.add(&[room]);
            let mut queue = driver.queue(0);
            queue.ring.try_set_used_ring_address(GuestAddress(used_ring)).unwrap();
            let active =
                Active { memory: memory.clone(), queues: vec![queue], features: 0, interrupt: calls.clone() };
            let (mut running, _) = Running::start(active, 1).unwrap();
            let mut served = false;
            running.serve(0, |_, _| {
                served = true;
                Ok(Step::Used(0))
            });
            assert_eq!((served, running.is_broken()), (works, !works), "{used_ring:#x}");
        }
    }

    #[test]
    fn every_broken_chain_has_its_own_error() {
        let far = RAM as u64;
        assert_eq!(fault(|driver| driver.set_avail_index(9)), QueueError::AvailIndex { pending: 9, size: 8 });
        assert_eq!(fault(|driver| driver.offer(8)), QueueError::Index { index: 8, entries: 8 });
        assert_eq!(
            fault(|driver| {
                driver.set_descriptor(0, Descriptor::new(0x4000, 1, NEXT, 8));
                driver.offer(0);
            }),
            QueueError::Index { index: 8, entries: 8 }
        );
        assert_eq!(
            fault(|driver| {
                driver.set_descriptor(0, Descriptor::new(0x4000, 1, NEXT, 1));
                driver.set_descriptor(1, Descriptor::new(0x4000, 1, NEXT, 0));
                driver.offer(0);
            }),
            QueueError::Endless { head: 0 }
        );
        assert_eq!(
            fault(|driver| {
                driver.add(&[buffer(0x4000, 1, true), buffer(0x5000, 1, false)]);
            }),
            QueueError::Order { head: 0 }
        );
        for (address, len) in [(far, 1), (far - 1, 2), (u64::MAX, 1), (u64::MAX - 8, u32::MAX), (0, u32::MAX)]
        {
            let bad = buffer(address, len, true);
            assert_eq!(
                fault(|driver| {
                    driver.add(&[bad]);
                }),
                QueueError::Buffer { address, len }
            );
        }
        for bytes in [0, 15, 17, u32::MAX] {
            assert_eq!(
                fault(|driver| {
                    driver.set_descriptor(0, Descriptor::new(0x4000, bytes, INDIRECT, 0));
                    driver.offer(0);
                }),
                QueueError::IndirectSize { bytes }
            );
        }
        assert_eq!(
            fault(|driver| {
                driver.set_descriptor(0, Descriptor::new(0x4000, 16, INDIRECT | NEXT, 1));
                driver.offer(0);
            }),
            QueueError::IndirectNext
        );
        assert_eq!(
            fault(|driver| {
                driver.set_descriptor_at(0x4000, Descriptor::new(0x4000, 16, INDIRECT, 0));
                driver.set_descriptor(0, Descriptor::new(0x4000, 16, INDIRECT, 0));
                driver.offer(0);
            }),
            QueueError::Nested
        );
        assert_eq!(
            fault(|driver| {
                driver.set_descriptor(0, Descriptor::new(far, 16, INDIRECT, 0));
                driver.offer(0);
            }),
            QueueError::Table { index: 0, address: far }
        );
    }

    #[test]
    fn rings_outside_guest_memory_are_an_error_and_not_more() {
        let (memory, _, queue) = rig(0);
        let view = memory.memory();
        for (avail_ring, used_ring, desc_table) in
            [(0xfff_fff0, 0x3000, 0x1000), (!1, !3, !15), (0x2000, 0xfff_fff0, !15)]
        {
            let state = QueueState { avail_ring, used_ring, desc_table, event_idx: true, ..queue.save() };
            let mut queue = Queue::restore(0, &state, EventFd::new(0).unwrap()).unwrap();
            view.store(1u16, GuestAddress(0x2002), Ordering::SeqCst).unwrap();
            assert!(queue.pop(&view).is_err());
            let used = queue.push(&view, 0, 0);
            assert_eq!(used.is_err(), used_ring != 0x3000);
            assert_eq!(queue.enable_kicks(&view).is_err(), used_ring != 0x3000 || avail_ring != 0x2000);
        }
    }

    #[test]
    fn a_segment_across_two_regions_of_ram_becomes_two_slices() {
        let ranges = [(GuestAddress(0), 0x3000), (GuestAddress(0x3000), 0x3000)];
        let memory = crate::memory::Memory::new(GuestRam::from_ranges(&ranges).unwrap());
        let mut driver = Driver::new(&memory, 0x1000, 8, 0);
        let mut queue = driver.queue(0);
        driver.add(&[buffer(0x2ffe, 4, true)]);
        let view = memory.memory();
        let mut chain = queue.pop(&view).unwrap().unwrap();
        let slices = chain.writable.slices(&view).unwrap();
        assert_eq!(slices.iter().map(|slice| slice.len()).collect::<Vec<_>>(), [2, 2]);
        chain.writable.write(&view, b"abcd").unwrap();
        assert_eq!(driver.read(buffer(0x2ffe, 4, true)), b"abcd");
    }

    #[test]
    fn the_driver_gets_the_interrupts_and_the_device_the_kicks_that_were_asked_for() {
        for features in [0, EVENT_IDX] {
            let (memory, mut driver, mut queue) = rig(features);
            let view = memory.memory();
            assert!(!queue.enable_kicks(&view).unwrap());
            driver.want_interrupts(false);
            driver.add(&[buffer(0x4000, 1, true)]);
            assert!(queue.kick.read().is_ok(), "the first chain kicks");
            queue.disable_kicks(&view).unwrap();
            driver.add(&[buffer(0x4000, 1, true)]);
            assert!(queue.kick.read().is_err(), "the device is busy, the driver saves the exit");
            assert!(queue.enable_kicks(&view).unwrap(), "and the device learns of it");

            let chain = queue.pop(&view).unwrap().unwrap();
            queue.push(&view, chain.head, 0).unwrap();
            assert!(!queue.wants_interrupt(&view).unwrap());
            driver.reap_all();
            driver.want_interrupts(true);
            let chain = queue.pop(&view).unwrap().unwrap();
            queue.push(&view, chain.head, 0).unwrap();
            assert!(queue.wants_interrupt(&view).unwrap());
        }
    }

    #[test]
    fn a_saved_queue_continues_where_it_was() {
        let (memory, mut driver, mut queue) = rig(EVENT_IDX);
        let view = memory.memory();
        let first = driver.add(&[buffer(0x4000, 1, true)]);
        let second = driver.add(&[buffer(0x4000, 1, true)]);
        assert_eq!(queue.pop(&view).unwrap().unwrap().head, first);
        queue.push(&view, first, 1).unwrap();

        let bytes = postcard::to_stdvec(&queue.save()).unwrap();
        let state: QueueState = postcard::from_bytes(&bytes).unwrap();
        let mut queue = Queue::restore(3, &state, EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
        assert_eq!((queue.index, &queue.save()), (3, &state));
        assert_eq!(queue.pop(&view).unwrap().unwrap().head, second);
        queue.push(&view, second, 1).unwrap();
        assert_eq!(driver.reap_all().len(), 2);
    }

    #[test]
    fn a_damaged_saved_queue_is_refused() {
        let (_, _, queue) = rig(0);
        let good = queue.save();
        for bad in [
            QueueState { max_size: 0, ..good.clone() },
            QueueState { max_size: 3, ..good.clone() },
            QueueState { size: 0, ..good.clone() },
            QueueState { size: good.max_size * 2, ..good.clone() },
            QueueState { desc_table: 8, ..good.clone() },
            QueueState { avail_ring: 1, ..good.clone() },
            QueueState { used_ring: 2, ..good.clone() },
        ] {
            assert!(bad.ring().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_in_the_rings_a_chain_lies_in_ram_or_is_an_error(
            noise in proptest::collection::vec(any::<u8>(), 0x100..0x200),
            small in proptest::collection::vec((0u64..0x12000, 0u32..0x1000, 0u16..8, 0u16..9), 8),
            avail in any::<u16>(),
        ) {
            let memory = testing::ram(0x10000);
            let view = memory.memory();
            let driver = Driver::new(&memory, 0, 8, EVENT_IDX);
            view.write_slice(&noise, GuestAddress(0)).unwrap();
            for (index, (address, len, flags, next)) in (0..).zip(small) {
                driver.set_descriptor(index, Descriptor::new(address, len, flags, next));
            }
            driver.set_avail_index(avail % 10);
            let mut queue = driver.queue(0);
            while let Ok(Some(mut chain)) = queue.pop(&view) {
                prop_assert!(chain.readable.list().len() + chain.writable.list().len() <= MAX_SEGMENTS);
                prop_assert!(chain.readable.slices(&view).is_ok());
                let bytes = chain.writable.bytes() as usize;
                prop_assert!(chain.writable.write(&view, &vec![0; bytes]).is_ok());
                prop_assert_eq!(chain.writable.bytes(), 0);
                if queue.push(&view, chain.head, 0).is_err() {
                    break;
                }
            }
        }

        #[test]
        fn cutting_a_list_loses_and_repeats_no_byte(
            lens in proptest::collection::vec(1u32..50, 0..6),
            cut in 0usize..350,
        ) {
            let mut address = 0;
            let mut whole = Segments::default();
            for len in lens {
                whole.list.push(Segment { address: GuestAddress(address), len });
                whole.bytes += len;
                address += u64::from(len) + 100;
            }
            let bytes = |segments: &Segments| -> Vec<u64> {
                segments.list.iter().flat_map(|s| s.address.0..s.address.0 + u64::from(s.len)).collect()
            };
            let before = bytes(&whole);
            match whole.take(cut) {
                Ok(front) => {
                    prop_assert_eq!(front.bytes() as usize, cut);
                    let mut after = bytes(&front);
                    after.extend(bytes(&whole));
                    prop_assert_eq!(after, before);
                }
                Err(error) => {
                    prop_assert_eq!(error, QueueError::Short { needed: cut, left: whole.bytes() });
                    prop_assert_eq!(bytes(&whole), before);
                }
            }
        }
    }
}
