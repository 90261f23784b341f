//! What a back-end outside of this process is told of a virtio device: where guest memory is, where a queue is, and how
//! to call the driver. For the kernel's (vhost) and for those in other processes (vhost-user).
//!
//! Speaks with none of them. Once a back-end has a queue, it reads and writes the driver's rings itself: nothing of
//! `virtio/queue.rs` is between it and the guest, and what it does is not counted here.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::QueueT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::host::Source;
use crate::memory::{GuestRam, is_writable};
use crate::virtio::device::Interrupt;
use crate::virtio::queue::Queue;

/// A part of guest memory that is one piece here too. All in bytes.
#[derive(Clone, Debug)]
pub struct Region {
    /// Guest-physical address.
    pub guest: u64,
    pub size: u64,
    /// Address in this process. It stays valid as long as the guest has the region.
    pub host: u64,
    /// What is mapped there, and from which offset on; `None` for memory that no other process can have.
    pub file: Option<(Arc<File>, u64)>,
}

/// Every region of guest memory, lowest guest address first: RAM, and files that the guest sees as memory. But not those that
/// devices only read: a back-end knows no such regions, and who holds buffers against them (`virtio/queue.rs`) is not there.
pub fn regions(memory: &GuestRam) -> Vec<Region> {
    let writable = memory.iter().filter(|region| is_writable(memory, region.start_addr(), region.len()));
    let regions = writable.filter_map(|region| {
        // The region is a mapping from its beginning to its end.
        let host = region.get_host_address(MemoryRegionAddress(0)).ok()?;
        let file = region.file_offset().map(|file| (file.arc().clone(), file.start()));
        Some(Region { guest: region.start_addr().raw_value(), size: region.len(), host: host as u64, file })
    });
    regions.collect()
}

/// The same with all memory that can ever be there, for back-ends that are told once: `room` is where memory comes and goes,
/// as one region in place of those that are in it at the moment. What is not in fails like a wrong address, as the kernel
/// may not touch it for this process either; a back-end in another process can touch it.
pub fn all_regions(memory: &GuestRam, room: Option<&Region>) -> Vec<Region> {
    let mut all = regions(memory);
    if let Some(room) = room {
        let within = |region: &Region| region.guest >= room.guest && region.guest - room.guest < room.size;
        all.retain(|region| !within(region));
        all.push(room.clone());
        all.sort_by_key(|region| region.guest);
    }
    all
}

/// A queue as back-ends want it: addresses in this process, and where to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    /// The available index of the next chain to take.
    pub next_available: u16,
}

impl Ring {
    /// Of a queue that its driver has enabled. `None` when a part of it is not in guest memory as one piece, or the used ring
    /// where devices only read; whoever takes the queue then must not be given it.
    pub fn of(queue: &Queue, memory: &GuestRam) -> Option<Ring> {
        queue.check(memory).ok()?;
        let (ring, size) = (&queue.ring, u64::from(queue.ring.size()));
        Some(Ring {
            size: ring.size(),
            descriptors: host_address(memory, ring.desc_table(), size * size_of::<Descriptor>() as u64)?,
            // With the two bytes of the event index behind each (VIRTIO 1.3, 2.7.6 and 2.7.8).
            available: host_address(memory, ring.avail_ring(), 4 + 2 * size + 2)?,
            used: host_address(memory, ring.used_ring(), 4 + 8 * size + 2)?,
            next_available: ring.next_avail(),
        })
    }
}

/// Makes `queue` go on where a back-end has left it, which says what it would have taken next. What it has given back is
/// in the ring itself. A ring that is in guest memory no more is left as it is: whoever serves it next finds that out.
pub fn take_back(queue: &mut Queue, next_available: u16, memory: &GuestRam) {
    queue.ring.set_next_avail(next_available);
    let used: Option<u16> = queue
        .ring
        .used_ring()
        .checked_add(USED_INDEX)
        .and_then(|address| memory.load(GuestAddress(address), Ordering::Acquire).ok());
    if let Some(used) = used {
        queue.ring.set_next_used(u16::from_le(used));
    }
}

/// How a back-end calls the driver of one queue: right away where the transport allows that, else through the device.
pub struct Call {
    queue: u16,
    /// Of the driver that the device was started for last.
    trigger: Option<EventFd>,
    /// For transports that have something to do first.
    own: EventFd,
}

impl Call {
    /// Made with the device: where devices are started nothing new can be opened.
    pub fn new(queue: u16) -> io::Result<Call> {
        let own = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Call { queue, trigger: None, own })
    }

    /// The device starts for the driver behind `interrupt`. What the back-end writes to from now on is [`Call::fd`].
    pub fn connect(&mut self, interrupt: &dyn Interrupt) {
        self.trigger = interrupt.trigger(self.queue);
    }

    pub fn fd(&self) -> &EventFd {
        self.trigger.as_ref().unwrap_or(&self.own)
    }

    /// What the device must have watched, if it is in between: it answers with [`Call::pass_on`].
    pub fn source(&self, token: u32) -> Option<Source> {
        self.trigger.is_none().then(|| Source { fd: self.own.as_raw_fd(), token })
    }

    /// Raises the interrupt if the back-end has called through the device. Also due after the back-end has stopped, since
    /// what it has said last may not have been heard yet.
    pub fn pass_on(&self, interrupt: &dyn Interrupt) {
        if self.own.read().is_ok() {
            interrupt.queue(self.queue);
        }
    }
}

/// Where a back-end finds these bytes of guest memory, if they are one piece.
fn host_address(memory: &GuestRam, guest: u64, bytes: u64) -> Option<u64> {
    let (region, offset) = memory.to_region_addr(GuestAddress(guest))?;
    let end = offset.checked_add(bytes)?;
    let is_inside = end.raw_value() <= region.len();
    region.get_host_address(offset).ok().filter(|_| is_inside).map(|address| address as u64)
}

/// Offset in the used ring (VIRTIO 1.3, 2.7.8).
const USED_INDEX: u64 = 2;

#[cfg(test)]
mod tests {
    use vm_memory::{FileOffset, GuestAddressSpace, GuestRegionMmap, MmapRegion};

    use super::*;
    use crate::memory::Memory;
    use crate::virtio::testing::{Calls, Driver, ram};

    const PAGE: u64 = 4096;

    #[test]
    fn each_region_is_told_with_its_addresses_and_its_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * PAGE).unwrap();
        let start = GuestAddress(0x1_0000_0000);
        let mapped = FileOffset::new(file, PAGE);
        let high = GuestRegionMmap::from_range(start, 2 * PAGE as usize, Some(mapped)).unwrap();
        let low = GuestRegionMmap::from_range(GuestAddress(0), PAGE as usize, None).unwrap();
        let memory = GuestRam::from_regions(vec![low, high]).unwrap();
        memory.write_obj(0x5555_u16, GuestAddress(PAGE - 2)).unwrap();

        let [low, high] = &regions(&memory)[..] else { panic!("two regions") };
        assert_eq!((low.guest, low.size, low.file.is_none()), (0, PAGE, true));
        assert_eq!((high.guest, high.size), (start.0, 2 * PAGE));
        assert_eq!(high.file.as_ref().unwrap().1, PAGE);
        assert_eq!(host_address(&memory, PAGE - 2, 2), Some(low.host + PAGE - 2));
        assert_eq!(host_address(&memory, start.0 + PAGE, PAGE), Some(high.host + PAGE));
    }

    #[test]
    fn memory_that_comes_and_goes_is_one_region_whatever_of_it_is_there() {
        let ranges = [(0, PAGE), (8 * PAGE, PAGE), (10 * PAGE, PAGE), (12 * PAGE, PAGE)];
        let ranges = ranges.map(|(start, len)| (GuestAddress(start), len as usize));
        let memory = GuestRam::from_ranges(&ranges).unwrap();
        let room = Region { guest: 8 * PAGE, size: 4 * PAGE, host: 0x7000_0000, file: None };
        let told = |room| {
            let regions = all_regions(&memory, room);
            regions.iter().map(|region| (region.guest, region.size)).collect::<Vec<_>>()
        };
        assert_eq!(told(Some(&room)), [(0, PAGE), (8 * PAGE, 4 * PAGE), (12 * PAGE, PAGE)]);
        assert_eq!(told(None).len(), 4);
    }

    #[test]
    fn a_ring_that_is_not_all_in_guest_memory_is_given_to_nobody() {
        let memory = ram(PAGE as usize);
        let base = regions(&memory.memory())[0].host;
        let fits = Driver::new(&memory, 0, 16, 0).queue(0);
        let ring = Ring::of(&fits, &memory.memory()).unwrap();
        assert_eq!((ring.size, ring.descriptors, ring.available), (16, base, base + 256));
        assert_eq!(ring.used, base + 256 + 40);
        // The last ring of 256 that fits ends with the page; each other one lies beyond it somewhere.
        let bytes = 256 + 40 + 134;
        assert!(
            Ring::of(&Driver::new(&memory, PAGE - bytes - 2, 16, 0).queue(0), &memory.memory()).is_some()
        );
        for base in (PAGE - bytes + 14..PAGE + 32).step_by(16) {
            let queue = Driver::new(&memory, base / 16 * 16, 16, 0).queue(0);
            assert_eq!(Ring::of(&queue, &memory.memory()), None, "{base:#x}");
        }
        assert_eq!(host_address(&memory.memory(), u64::MAX, 2), None);
        assert_eq!(host_address(&memory.memory(), PAGE - 1, u64::MAX), None);
    }

    #[test]
    fn where_devices_only_read_a_back_end_finds_neither_memory_nor_a_used_ring() {
        let (access, flags) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let page = MmapRegion::build(None, PAGE as usize, access, flags).unwrap();
        let page = GuestRegionMmap::new(page, GuestAddress(PAGE)).unwrap();
        let memory = ram(PAGE as usize);
        let with = memory.memory().insert_region(Arc::new(page)).unwrap();
        assert_eq!(regions(&with).iter().map(|region| region.guest).collect::<Vec<_>>(), [0]);

        let mut queue = Driver::new(&memory, 0, 16, 0).queue(0);
        assert!(Ring::of(&queue, &with).is_some());
        queue.ring.try_set_used_ring_address(GuestAddress(PAGE)).unwrap();
        assert_eq!(Ring::of(&queue, &with), None);
    }

    #[test]
    fn a_queue_goes_on_where_a_back_end_has_left_it() {
        let memory = ram(1 << 16);
        let mut driver = Driver::new(&memory, 0x1000, 16, 0);
        let room = driver.room(8);
        let heads: Vec<u16> = (0..3).map(|_| driver.add(&[room])).collect();
        let mut served = driver.queue(0);
        served.pop(&memory.memory()).unwrap().unwrap();
        served.push(&memory.memory(), heads[0], 8).unwrap();

        let mut queue = driver.queue(0);
        take_back(&mut queue, served.ring.next_avail(), &memory.memory());
        assert_eq!((queue.ring.next_avail(), queue.ring.next_used()), (1, 1));
        let next = queue.pop(&memory.memory()).unwrap().unwrap();
        assert_eq!(next.head, heads[1]);
    }

    #[test]
    fn a_back_end_calls_the_driver_itself_or_through_the_device() {
        let calls = Calls::default();
        let mut call = Call::new(0).unwrap();
        call.connect(&calls);
        let source = call.source(7).unwrap();
        assert_eq!((source.fd, source.token), (call.fd().as_raw_fd(), 7));
        call.pass_on(&calls);
        assert_eq!(calls.take_queue(), 0, "nobody has called");
        call.fd().write(2).unwrap();
        call.pass_on(&calls);
        call.pass_on(&calls);
        assert_eq!(calls.take_queue(), 1);

        let direct = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        calls.triggers.set(vec![direct.try_clone().unwrap()]).unwrap();
        call.connect(&calls);
        assert_eq!(call.source(7), None);
        call.fd().write(1).unwrap();
        call.pass_on(&calls);
        assert_eq!(calls.take_queue(), 0, "the descriptor is the interrupt");
        assert_eq!(direct.read().unwrap(), 1, "and what is in it stays in it");
        let mut other = Call::new(1).unwrap();
        other.connect(&calls);
        assert!(other.source(7).is_some());
    }

    #[test]
    fn memory_that_comes_later_is_told_of_too() {
        let memory: Memory = ram(PAGE as usize);
        assert_eq!(regions(&memory.memory()).len(), 1);
        let more = GuestRegionMmap::from_range(GuestAddress(PAGE), PAGE as usize, None).unwrap();
        let with = memory.memory().insert_region(Arc::new(more)).unwrap();
        memory.lock().unwrap().replace(with);
        assert_eq!(regions(&memory.memory())[1].guest, PAGE);
    }
}
