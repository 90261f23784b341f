//! The ring that a back-end sees: the driver's requests, by the numbers that the driver gave them, in a ring of our own.
//! Descriptors and buffers stay where they are, in guest memory.
//!
//! The road not taken is to hand over the driver's ring itself, which saves two wake-ups of the io thread for a batch of
//! requests. But then only the back-end knows which requests it has and has not done, and when it dies that is gone, unless
//! it keeps books in memory that outlives it (INFLIGHT_SHMFD), as few do. With a ring between them, that is known here:
//! whatever dies, the next back-end gets what is left. Nor can a driver lead a back-end astray with a broken ring.
//!
//! Everything in the ring is the back-end's to write: what is read from it is checked.

use std::fs::File;
use std::io;
use std::num::Wrapping;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::VRING_USED_F_NO_NOTIFY;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};
use vmm_sys_util::eventfd::EventFd;

use super::message::{Lie, Region, RingAddress};
use super::session::Lost;
use crate::memory::GuestRam;

/// Where a back-end finds the rings, in addresses of the guest: beyond any that a guest's memory has.
pub const BASE: u64 = 1 << 51;

/// Bytes set aside for one ring. Both its parts fit up to [`MAX_SIZE`], and each begins on a page.
pub const RING_BYTES: u64 = 0x4000;
/// The available part first, of 4 bytes and 2 for each entry; the used part behind it, of 4 bytes and 8.
const USED: u64 = 0x1000;
/// The largest ring.
pub const MAX_SIZE: u16 = 1024;

const _: () = assert!(6 + 2 * MAX_SIZE as u64 <= USED);
const _: () = assert!(USED + 6 + 8 * MAX_SIZE as u64 <= RING_BYTES);

/// Offsets in both parts (VIRTIO 1.3, 2.7.6 and 2.7.8).
const FLAGS: u64 = 0;
const INDEX: u64 = 2;
const ENTRIES: u64 = 4;

/// Memory of rings, shared with the back-end.
pub struct RingMemory {
    memory: GuestRam,
}

impl RingMemory {
    /// For so many rings, in `file`, which has the room and stays this large.
    pub fn new(file: File, rings: u16) -> io::Result<RingMemory> {
        let bytes = bytes(rings);
        let size = usize::try_from(bytes).map_err(io::Error::other)?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, 0), size).map_err(io::Error::other)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(BASE))
            .ok_or_else(|| io::Error::other("guest addresses wrap around"))?;
        let memory = GuestRam::from_regions(vec![region]).map_err(io::Error::other)?;
        Ok(RingMemory { memory })
    }

    /// For the memory table.
    pub fn regions(&self) -> impl Iterator<Item = (Region, RawFd)> {
        shared_regions(&self.memory)
    }
}

/// Bytes that so many rings take.
pub fn bytes(rings: u16) -> u64 {
    u64::from(rings) * RING_BYTES
}

/// The parts of memory that lie in a file, and so can be handed over.
pub fn shared_regions(memory: &GuestRam) -> impl Iterator<Item = (Region, RawFd)> {
    memory.iter().filter_map(|region| {
        let file = region.file_offset()?;
        let (guest, size, offset) = (region.start_addr().0, region.len(), file.start());
        Some((Region { guest, size, offset }, file.file().as_raw_fd()))
    })
}

/// One ring, and what the back-end has of it.
pub struct Ring {
    base: u64,
    size: u16,
    next_available: Wrapping<u16>,
    next_used: Wrapping<u16>,
    /// For each number of a request, when it was given to the back-end, which has it still.
    given: Vec<Option<u64>>,
    count: usize,
    clock: u64,
    pub kick: EventFd,
    pub call: EventFd,
}

impl Ring {
    /// Ring `index`, of no size yet.
    pub fn new(index: u16) -> io::Result<Ring> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Ring {
            base: BASE + u64::from(index) * RING_BYTES,
            size: 0,
            next_available: Wrapping(0),
            next_used: Wrapping(0),
            given: Vec::new(),
            count: 0,
            clock: 0,
            kick: event()?,
            call: event()?,
        })
    }

    /// Another driver's, or the same one's after a pause, of `size` entries, with the requests that were not done.
    /// False when that cannot be.
    pub fn reset(&mut self, size: u16, unfinished: &[u16]) -> bool {
        if size > MAX_SIZE || !size.is_power_of_two() {
            return false;
        }
        (self.size, self.count, self.clock) = (size, 0, 0);
        self.given = vec![None; size.into()];
        unfinished.iter().all(|head| self.note(*head))
    }

    /// For a back-end that knows nothing: empties the ring and puts what is not done into it, in its old order.
    pub fn refill(&mut self, rings: &RingMemory) -> io::Result<()> {
        let zeros = [0; RING_BYTES as usize];
        rings.memory.write_slice(&zeros, GuestAddress(self.base)).map_err(io::Error::other)?;
        (self.next_available, self.next_used) = (Wrapping(0), Wrapping(0));
        // What the one before has called for does not count, and this one has not been kicked.
        let _ = (self.call.read(), self.kick.read());
        self.unfinished().into_iter().try_for_each(|head| self.enter(rings, head))?;
        self.publish(rings)
    }

    /// Where the back-end finds it. `descriptors` are the driver's.
    pub fn address(&self, descriptors: u64) -> RingAddress {
        RingAddress { descriptors, available: self.base, used: self.base + USED }
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    /// Requests that the back-end has, the oldest first.
    pub fn unfinished(&self) -> Vec<u16> {
        let mut all: Vec<_> = (0..).zip(&self.given).filter_map(|(head, at)| Some(((*at)?, head))).collect();
        all.sort_unstable();
        all.into_iter().map(|(_, head): (u64, u16)| head).collect()
    }

    /// Nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.count == 0
    }

    /// Takes down a request of the driver, without showing it to the back-end. False when there is no such number, or it is
    /// under way already: the driver's fault.
    pub fn note(&mut self, head: u16) -> bool {
        match self.given.get_mut(usize::from(head)) {
            Some(at @ None) => {
                *at = Some(self.clock);
                self.clock += 1;
                self.count += 1;
                true
            }
            _ => false,
        }
    }

    /// Shows a noted request to the back-end, with the next [`Ring::publish`]. There is always room: each number is in the
    /// ring once at most.
    pub fn enter(&mut self, rings: &RingMemory, head: u16) -> io::Result<()> {
        let slot = u64::from(self.next_available.0 % self.size.max(1));
        let address = GuestAddress(self.base + ENTRIES + 2 * slot);
        rings.memory.write_obj(head.to_le(), address).map_err(io::Error::other)?;
        self.next_available += 1;
        Ok(())
    }

    /// Lets the back-end see what was entered, and kicks it if it wants that.
    pub fn publish(&self, rings: &RingMemory) -> io::Result<()> {
        let index = GuestAddress(self.base + INDEX);
        let new = self.next_available.0.to_le();
        // The entries must be there before the index says so.
        rings.memory.store(new, index, Ordering::Release).map_err(io::Error::other)?;
        // And the index before the back-end's wish is read, which writes its wish and then looks at the index.
        fence(Ordering::SeqCst);
        let flags: u16 = self.load(rings, USED + FLAGS)?;
        if u32::from(flags) & VRING_USED_F_NO_NOTIFY == 0 {
            // Fails only when the counter is full, and then it is kicked anyway.
            let _ = self.kick.write(1);
        }
        Ok(())
    }

    /// Adds to `done` the requests that the back-end has given back since the last call, with the bytes it has written to
    /// each. What it has given back before an error is among them.
    pub fn take(&mut self, rings: &RingMemory, done: &mut Vec<(u16, u32)>) -> Result<(), Lost> {
        let used = Wrapping(self.load(rings, USED + INDEX)?);
        let pending = (used - self.next_used).0;
        if usize::from(pending) > self.count {
            return Err(Lie::UsedIndex { pending, given: self.count }.into());
        }
        for _ in 0..pending {
            let slot = u64::from(self.next_used.0 % self.size.max(1));
            let entry = GuestAddress(self.base + USED + ENTRIES + 8 * slot);
            let [head, written]: [u32; 2] = rings.memory.read_obj(entry).map_err(io::Error::other)?;
            let (head, written) = (u32::from_le(head), u32::from_le(written));
            let number = u16::try_from(head).ok();
            let at = number.and_then(|number| self.given.get_mut(usize::from(number)));
            let (Some(number), Some(_)) = (number, at.and_then(Option::take)) else {
                return Err(Lie::Used { head, size: self.size }.into());
            };
            self.count -= 1;
            self.next_used += 1;
            done.push((number, written));
        }
        Ok(())
    }

    fn load(&self, rings: &RingMemory, offset: u64) -> io::Result<u16> {
        let value = rings.memory.load(GuestAddress(self.base + offset), Ordering::Acquire);
        value.map(u16::from_le).map_err(io::Error::other)
    }
}
