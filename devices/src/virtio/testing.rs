//! The other side of a virtio device, for unit tests and fuzz targets: a driver that keeps a split virtqueue in plain
//! guest memory, well or badly, and a slot that runs a device as a transport and an event loop would.
//!
//! Not a transport: no registers, no interrupt vectors. Panics when a test uses it wrongly, never for what a device does.
#![allow(clippy::unwrap_used, reason = "a mistake in a test shall stop that test")]

use std::collections::HashMap;
use std::fmt::Display;
use std::io;
use std::num::Wrapping;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue as Ring, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestRegionMmap};
#[cfg(test)]
use vm_memory::{FileOffset, MmapRegion};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::memory::{GuestRam, Memory};
use crate::virtio::device::{Active, Interrupt, VirtioDevice};
use crate::virtio::mem::Backing;
use crate::virtio::queue::{Queue, Segment, Segments};

pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;

/// Feature bit that makes [`Driver::queue`] and a device agree on event indices.
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// Guest RAM of `bytes` at guest-physical 0.
pub fn ram(bytes: usize) -> Memory {
    Memory::new(GuestRam::from_ranges(&[(GuestAddress(0), bytes)]).unwrap())
}

/// Guest RAM of these places and sizes in files of its own, so that it can be handed to another process.
#[cfg(test)]
pub fn shared_ram_of(ranges: &[(GuestAddress, usize)]) -> Memory {
    let region = |&(start, bytes): &(GuestAddress, usize)| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes as u64).unwrap();
        GuestRegionMmap::new(MmapRegion::from_file(FileOffset::new(file, 0), bytes).unwrap(), start).unwrap()
    };
    Memory::new(GuestRam::from_regions(ranges.iter().map(region).collect()).unwrap())
}

/// The same as [`ram`], in a file.
#[cfg(test)]
pub fn shared_ram(bytes: usize) -> Memory {
    shared_ram_of(&[(GuestAddress(0), bytes)])
}

/// Where [`ram_above_4g`] is.
pub const ABOVE_4G: u64 = 0x2_0000_0000;

/// Guest RAM of `bytes` at [`ABOVE_4G`], so that an address that lost a half lies nowhere.
pub fn ram_above_4g(bytes: usize) -> Memory {
    Memory::new(GuestRam::from_ranges(&[(GuestAddress(ABOVE_4G), bytes)]).unwrap())
}

/// Slots of a memory device that come and go in plain guest memory.
pub struct Lent {
    memory: Memory,
    start: u64,
    size: usize,
    is_in: Vec<bool>,
    pub trouble: Arc<Trouble>,
}

/// What the host cannot do, as long as it is set.
#[derive(Debug, Default)]
pub struct Trouble {
    pub bring_in: AtomicBool,
    pub take_out: AtomicBool,
    pub reserve: AtomicBool,
}

impl Lent {
    /// As many slots of `size` bytes as there are in `region`, all of them out.
    pub fn new(memory: &Memory, region: &Range<u64>, size: u64) -> Lent {
        let slots = (region.end - region.start) / size;
        let is_in = vec![false; slots as usize];
        Lent {
            memory: memory.clone(),
            start: region.start,
            size: size as usize,
            is_in,
            trouble: Arc::default(),
        }
    }

    fn at(&self, slot: usize) -> GuestAddress {
        GuestAddress(self.start + (slot * self.size) as u64)
    }
}

impl Backing for Lent {
    fn bring_in(&mut self, slot: usize) -> io::Result<()> {
        fails(&self.trouble.bring_in)?;
        if !self.is_in[slot] {
            let region = GuestRegionMmap::from_range(self.at(slot), self.size, None).unwrap();
            let with = self.memory.memory().insert_region(Arc::new(region)).unwrap();
            self.memory.lock().unwrap().replace(with);
            self.is_in[slot] = true;
        }
        Ok(())
    }

    fn take_out(&mut self, slot: usize) -> io::Result<()> {
        fails(&self.trouble.take_out)?;
        if self.is_in[slot] {
            let (without, _) = self.memory.memory().remove_region(self.at(slot), self.size as u64).unwrap();
            self.memory.lock().unwrap().replace(without);
            self.is_in[slot] = false;
        }
        Ok(())
    }

    fn reserve(&mut self, range: Range<u64>) -> io::Result<()> {
        fails(&self.trouble.reserve)?;
        let bytes = (range.end - range.start) as usize;
        assert!(self.memory.memory().check_range(GuestAddress(range.start), bytes), "{range:x?} is out");
        Ok(())
    }
}

fn fails(trouble: &AtomicBool) -> io::Result<()> {
    match trouble.load(Ordering::SeqCst) {
        true => Err(io::ErrorKind::OutOfMemory.into()),
        false => Ok(()),
    }
}

/// The buffers (address, length) of a request, as a device gets them.
pub fn segments(parts: &[(u64, u32)]) -> Segments {
    let segment = |&(address, len)| Segment { address: GuestAddress(address), len };
    Segments::new(parts.iter().map(segment).collect())
}

/// A driver's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    pub address: u64,
    pub len: u32,
    /// For the device to write.
    pub writable: bool,
}

/// What the device gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    pub head: u16,
    pub written: u32,
}

/// The driver's side of one queue. Rings and buffers lie behind one another from the base address it was given.
pub struct Driver {
    pub memory: Memory,
    pub kick: EventFd,
    size: u16,
    features: u64,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
    next_buffer: u64,
    avail_index: Wrapping<u16>,
    used_index: Wrapping<u16>,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
}

impl Driver {
    /// A driver with a queue of `size` entries at `base` (a multiple of 16), that agreed on `features`.
    pub fn new(memory: &Memory, base: u64, size: u16, features: u64) -> Driver {
        let avail_ring = base + 16 * u64::from(size);
        let used_ring = (avail_ring + 6 + 2 * u64::from(size)).next_multiple_of(4);
        let next_buffer = (used_ring + 6 + 8 * u64::from(size)).next_multiple_of(16);
        Driver {
            memory: memory.clone(),
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            size,
            features,
            desc_table: base,
            avail_ring,
            used_ring,
            next_buffer,
            avail_index: Wrapping(0),
            used_index: Wrapping(0),
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
        }
    }

    /// The queue as a transport hands it to a device, from its beginning.
    pub fn queue(&self, index: u16) -> Queue {
        let mut ring = Ring::new(self.size).unwrap();
        ring.try_set_desc_table_address(GuestAddress(self.desc_table)).unwrap();
        ring.try_set_avail_ring_address(GuestAddress(self.avail_ring)).unwrap();
        ring.try_set_used_ring_address(GuestAddress(self.used_ring)).unwrap();
        ring.set_event_idx(self.features & EVENT_IDX != 0);
        ring.set_ready(true);
        Queue::new(index, ring, self.kick.try_clone().unwrap())
    }

    /// A readable buffer that holds `data`.
    pub fn data(&mut self, data: &[u8]) -> Buffer {
        let buffer = self.allocate(data.len() as u32, false);
        self.memory.memory().write_slice(data, GuestAddress(buffer.address)).unwrap();
        buffer
    }

    /// A writable buffer of `len` bytes.
    pub fn room(&mut self, len: u32) -> Buffer {
        self.allocate(len, true)
    }

    /// What is in `buffer` now.
    pub fn read(&self, buffer: Buffer) -> Vec<u8> {
        let mut data = vec![0; buffer.len as usize];
        self.memory.memory().read_slice(&mut data, GuestAddress(buffer.address)).unwrap();
        data
    }

    /// Makes `buffers` available as one chain and kicks if the device wants that. Returns the head.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let indices: Vec<u16> = buffers.iter().map(|_| self.free.pop().unwrap()).collect();
        for (place, descriptor) in describe(buffers, &indices).into_iter().enumerate() {
            self.set_descriptor(indices[place], descriptor);
        }
        let head = indices[0];
        self.chains.insert(head, indices);
        self.offer(head);
        head
    }

    /// As [`Driver::add`], through an indirect table.
    pub fn add_indirect(&mut self, buffers: &[Buffer]) -> u16 {
        let indices: Vec<u16> = (0..buffers.len() as u16).collect();
        let table = self.allocate(16 * buffers.len() as u32, false);
        for (place, descriptor) in (0..).zip(describe(buffers, &indices)) {
            self.set_descriptor_at(table.address + 16 * place, descriptor);
        }
        let head = self.free.pop().unwrap();
        self.set_descriptor(head, Descriptor::new(table.address, table.len, INDIRECT, 0));
        self.chains.insert(head, vec![head]);
        self.offer(head);
        head
    }

    /// How many descriptors are not in use.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Writes one descriptor of the queue's table as it is, however wrong.
    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        self.set_descriptor_at(self.desc_table + 16 * u64::from(index), descriptor);
    }

    /// Writes a descriptor anywhere, as for an indirect table.
    pub fn set_descriptor_at(&self, address: u64, descriptor: Descriptor) {
        let raw = RawDescriptor::from(descriptor);
        self.memory.memory().write_obj(raw, GuestAddress(address)).unwrap();
    }

    /// Makes the chain at `head` available, whatever it is, and kicks if the device wants that.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail_index.0 % self.size);
        self.store(self.avail_ring + 4 + 2 * slot, head);
        let index = self.avail_index;
        self.avail_index += 1;
        self.set_avail_index(self.avail_index.0);
        if self.device_wants_kick(index) {
            self.kick.write(1).unwrap();
        }
    }

    /// Sets the available index alone, as a broken driver would.
    pub fn set_avail_index(&self, index: u16) {
        self.store(self.avail_ring + 2, index);
    }

    /// Asks the device for interrupts from now on, or for none (a hint, by flag or by event index).
    pub fn want_interrupts(&self, wanted: bool) {
        if self.features & EVENT_IDX != 0 {
            // An event that lies just behind is the furthest away.
            let event = if wanted { self.used_index } else { self.used_index - Wrapping(1) };
            self.store(self.avail_ring + 4 + 2 * u64::from(self.size), event.0);
        } else {
            self.store(self.avail_ring, if wanted { 0 } else { VRING_AVAIL_F_NO_INTERRUPT as u16 });
        }
    }

    /// Takes back the next chain the device has used, and asks for an interrupt with the one after it.
    pub fn reap(&mut self) -> Option<Used> {
        if self.load(self.used_ring + 2) == self.used_index.0 {
            return None;
        }
        let element = self.used_ring + 4 + 8 * u64::from(self.used_index.0 % self.size);
        let head: u32 = self.memory.memory().read_obj(GuestAddress(element)).unwrap();
        let written: u32 = self.memory.memory().read_obj(GuestAddress(element + 4)).unwrap();
        self.used_index += 1;
        self.want_interrupts(true);
        let head = head as u16;
        self.free.extend(self.chains.remove(&head).unwrap_or_default());
        Some(Used { head, written })
    }

    /// Everything the device has used.
    pub fn reap_all(&mut self) -> Vec<Used> {
        std::iter::from_fn(|| self.reap()).collect()
    }

    fn allocate(&mut self, len: u32, writable: bool) -> Buffer {
        let buffer = Buffer { address: self.next_buffer, len, writable };
        self.next_buffer += u64::from(len).next_multiple_of(16);
        buffer
    }

    fn device_wants_kick(&self, index: Wrapping<u16>) -> bool {
        if self.features & EVENT_IDX != 0 {
            return self.load(self.used_ring + 4 + 8 * u64::from(self.size)) == index.0;
        }
        self.load(self.used_ring) & VRING_USED_F_NO_NOTIFY as u16 == 0
    }

    fn load(&self, address: u64) -> u16 {
        self.memory.memory().load(GuestAddress(address), Ordering::SeqCst).unwrap()
    }

    fn store(&self, address: u64, value: u16) {
        self.memory.memory().store(value, GuestAddress(address), Ordering::SeqCst).unwrap();
    }
}

fn describe(buffers: &[Buffer], indices: &[u16]) -> Vec<Descriptor> {
    let nexts = indices.iter().skip(1).map(Some).chain([None]);
    let describe = |(buffer, next): (&Buffer, Option<&u16>)| {
        let flags = if buffer.writable { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
        Descriptor::new(buffer.address, buffer.len, flags, next.copied().unwrap_or(0))
    };
    buffers.iter().zip(nexts).map(describe).collect()
}

/// Counts how often a device called its driver.
#[derive(Debug, Default)]
pub struct Calls {
    pub queue: AtomicUsize,
    pub config: AtomicUsize,
    pub needs_reset: AtomicUsize,
    /// By queue, what others may raise an interrupt with; set none for a transport that has something to do first.
    pub triggers: OnceLock<Vec<EventFd>>,
}

impl Calls {
    /// Interrupts for queues since the last call of this.
    pub fn take_queue(&self) -> usize {
        self.queue.swap(0, Ordering::SeqCst)
    }

    /// Whether the device asked to be reset, ever.
    pub fn broken(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst) > 0
    }
}

impl Interrupt for Calls {
    fn queue(&self, _index: u16) {
        self.queue.fetch_add(1, Ordering::SeqCst);
    }

    fn trigger(&self, index: u16) -> Option<EventFd> {
        self.triggers.get()?.get(usize::from(index))?.try_clone().ok()
    }

    fn config(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }

    fn needs_reset(&self, _reason: &dyn Display) {
        self.needs_reset.fetch_add(1, Ordering::SeqCst);
    }
}

/// Where a device runs: what a transport and an event loop do for it, in the caller's thread.
pub struct Slot<D: VirtioDevice> {
    pub device: D,
    pub memory: Memory,
    pub calls: Arc<Calls>,
    epoll: Epoll,
}

impl<D: VirtioDevice> Slot<D> {
    pub fn new(device: D, memory: &Memory) -> Slot<D> {
        let epoll = Epoll::new().unwrap();
        Slot { device, memory: memory.clone(), calls: Arc::default(), epoll }
    }

    /// Starts the device as if its driver had agreed on `features`; rings each queue once, as transports do.
    pub fn start(&mut self, queues: Vec<Queue>, features: u64) {
        queues.iter().filter(|queue| queue.ring.ready()).for_each(Queue::rearm);
        let active = Active { memory: self.memory.clone(), queues, features, interrupt: self.calls.clone() };
        for source in self.device.start(active).unwrap() {
            let event = EpollEvent::new(EventSet::IN, source.token.into());
            self.epoll.ctl(ControlOperation::Add, source.fd, event).unwrap();
        }
    }

    /// Stops the device and ends the watch of its descriptors.
    pub fn stop(&mut self) -> Vec<Queue> {
        self.epoll = Epoll::new().unwrap();
        self.device.stop()
    }

    /// Calls the device for what is ready, until nothing is. Returns the number of calls; more than `most` is a device
    /// that never comes to rest.
    pub fn run(&mut self, most: usize) -> usize {
        (0..most).take_while(|_| self.turn(0)).count()
    }

    /// Calls the device for what becomes ready, until `done` says so.
    pub fn run_until(&mut self, mut done: impl FnMut(&mut D) -> bool) {
        while !done(&mut self.device) {
            assert!(self.turn(RUN_UNTIL_LIMIT_MS), "the device has nothing left to do, and it is not done");
        }
    }

    fn turn(&mut self, timeout_ms: i32) -> bool {
        let mut ready = [EpollEvent::default()];
        let count = loop {
            match self.epoll.wait(timeout_ms, &mut ready) {
                // As io_uring does to a thread that waits.
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                count => break count.unwrap(),
            }
        };
        if count > 0 {
            self.device.handle(ready[0].data() as u32);
        }
        count > 0
    }
}

/// Far beyond what any timer in a test waits for.
const RUN_UNTIL_LIMIT_MS: i32 = 60_000;
