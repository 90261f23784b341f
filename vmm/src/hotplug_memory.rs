//! Memory that comes and goes while the guest runs, as KVM sees it: a region of guest addresses in slots, each of which has
//! a KVM memory slot while it is in, and is out of everybody's reach otherwise.
//!
//! Three things keep a slot out: it has no KVM memory slot, so that a guest which touches it reaches a bus where nothing
//! answers; devices find no memory there; and this process may not touch it, so that what the kernel does on a device's
//! behalf (io_uring, vhost) fails too. Does not decide which slots are in: that is the memory device's.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::{Arc, PoisonError};

use devices::backend::vhost;
use devices::memory::Memory;
use devices::virtio::mem::Backing;
use devices::virtio::reclaim;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestAddressSpace, GuestRegionMmap};

use crate::memory::{Pages, Region};

const ACCESS: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const SPACE: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Address space for all of the region, of which nothing can be touched at first. Never given back, since nothing else
/// makes sure that no [`Memory`] handle is left which could reach it; only what is in it goes.
pub struct Room {
    region: Region,
    /// What its pages are in, at the region's offset; `None` for anonymous memory.
    file: Option<Arc<File>>,
}

impl Room {
    /// Room for memory at these guest addresses; in `file`, which is as large, or in anonymous memory. Takes no memory of
    /// the host, and reserves none.
    pub fn new(guest: Range<u64>, file: Option<Arc<File>>, offset: u64, pages: Pages) -> io::Result<Room> {
        let size = guest.end - guest.start;
        let (len, boundary) = (size as usize, Pages::Huge2M.size() as usize);
        // SAFETY: without a wanted address and MAP_FIXED this makes a new mapping and touches no other.
        let space = unsafe { libc::mmap(ptr::null_mut(), len + boundary, libc::PROT_NONE, SPACE, -1, 0) };
        if space == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = space.map_addr(|address| address.next_multiple_of(boundary));
        let region = Region { guest: guest.start, size, host: start.addr() as u64, offset };
        let room = Room { region, file };
        if let Some(file) = &room.file {
            let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
            let at = offset.try_into().map_err(io::Error::other)?;
            // SAFETY: `start` is less than `boundary` after `space`, so `len` bytes from it lie within what the call above has
            // made, where nothing is yet.
            let over = unsafe { libc::mmap(start, len, libc::PROT_NONE, flags, file.as_raw_fd(), at) };
            if over == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
        }
        // A core dump of this process must hold none of the guest's secrets. Both are advice: a kernel without them is fine.
        room.advise(libc::MADV_DONTDUMP);
        if pages == Pages::Transparent {
            room.advise(libc::MADV_HUGEPAGE);
        }
        Ok(room)
    }

    /// All of it, whatever is in at the moment: where it lies for the guest, in this process and in its file.
    pub fn region(&self) -> Region {
        self.region
    }

    /// The same, as back-ends outside of this process are told of it.
    pub fn told(&self) -> vhost::Region {
        let Region { guest, size, host, offset } = self.region;
        vhost::Region { guest, size, host, file: self.file.clone().map(|file| (file, offset)) }
    }

    fn advise(&self, advice: libc::c_int) {
        // SAFETY: the range is this mapping; MADV_DONTDUMP and MADV_HUGEPAGE change no byte of it.
        if unsafe { libc::madvise(self.at(0), self.region.size as usize, advice) } != 0 {
            log::debug!("madvise({advice}) on room for memory: {}", io::Error::last_os_error());
        }
    }

    fn at(&self, offset: u64) -> *mut libc::c_void {
        ptr::with_exposed_provenance_mut((self.region.host + offset) as usize)
    }

    /// Lets this process, and the kernel on its behalf, touch a part, or not.
    fn protect(&self, part: &Range<u64>, access: libc::c_int) -> io::Result<()> {
        let len = part.end - part.start;
        if part.end > self.region.size {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the part is inside this mapping, as was checked above, and whole pages of it. No reference into it exists.
        match unsafe { libc::mprotect(self.at(part.start), len as usize, access) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// A part as guest memory.
    fn part(&self, part: &Range<u64>) -> io::Result<GuestRegionMmap<()>> {
        let len = (part.end - part.start) as usize;
        if part.end > self.region.size {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut builder = MmapRegionBuilder::new(len).with_mmap_prot(ACCESS).with_mmap_flags(SPACE);
        if let Some(file) = &self.file {
            let offset = FileOffset::from_arc(file.clone(), self.region.offset + part.start);
            builder = builder.with_file_offset(offset).with_mmap_flags(libc::MAP_SHARED);
        }
        // SAFETY: the part is inside a mapping that stays for the life of the process, as was checked above.
        let region = unsafe { builder.with_raw_mmap_pointer(self.at(part.start).cast()) }.build();
        let region = region.map_err(io::Error::other)?;
        GuestRegionMmap::new(region, GuestAddress(self.region.guest + part.start))
            .ok_or_else(|| io::Error::other("guest addresses wrap around"))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let (len, flags) = (self.region.size as usize, SPACE | libc::MAP_FIXED);
        // SAFETY: the range is one that `new` has made and nobody else maps anything into. It stays mapped, so that no
        // address which a handle still has is invalid; no reference into guest memory exists that could see it change.
        unsafe { libc::mmap(self.at(0), len, ACCESS, flags, -1, 0) };
    }
}

/// The slots of a room.
pub struct HotplugMemory {
    vm: Arc<VmFd>,
    ram: Memory,
    room: Arc<Room>,
    slot_size: u64,
    /// The number of the first of KVM's memory slots.
    first_slot: u32,
    flags: u32,
    /// What is in; the others are out.
    slots: Vec<Option<Arc<GuestRegionMmap<()>>>>,
    /// What is out, and which some device still sees in a view of guest memory that it took before: a transfer that is under
    /// way. It can be touched until that is over, and is looked at again when the next slot comes or goes.
    leaving: Vec<(usize, Arc<GuestRegionMmap<()>>)>,
}

impl HotplugMemory {
    /// All slots out. They take KVM's memory slots from `first_slot` on, as many as [`HotplugMemory::slots`] says.
    pub fn new(
        vm: Arc<VmFd>,
        ram: Memory,
        room: Arc<Room>,
        slot_size: u64,
        first_slot: u32,
        track_dirty_pages: bool,
    ) -> HotplugMemory {
        let flags = if track_dirty_pages { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let slots = vec![None; HotplugMemory::slots(room.region.size, slot_size) as usize];
        HotplugMemory { vm, ram, room, slot_size, first_slot, flags, slots, leaving: Vec::new() }
    }

    /// How many slots there are to so much memory.
    pub fn slots(size: u64, slot_size: u64) -> u32 {
        size.checked_div(slot_size).and_then(|slots| u32::try_from(slots).ok()).unwrap_or(0)
    }

    /// Offsets in the room.
    fn part(&self, slot: usize) -> Range<u64> {
        let start = slot as u64 * self.slot_size;
        start..start + self.slot_size
    }

    /// Gives the guest a slot, or with no memory takes it away.
    fn tell_kvm(&self, slot: usize, memory_size: u64) -> io::Result<()> {
        let (part, region) = (self.part(slot), self.room.region);
        let region = kvm_userspace_memory_region {
            slot: self.first_slot + slot as u32,
            guest_phys_addr: region.guest + part.start,
            memory_size,
            userspace_addr: region.host + part.start,
            flags: self.flags,
        };
        // SAFETY: the range is a part of the room, which stays mapped for the life of the process; a size of 0 names no memory.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(|error| io::Error::other(format!("KVM_SET_USER_MEMORY_REGION: {error}")))
    }

    /// Lets devices reach a slot.
    fn insert(&self, region: Arc<GuestRegionMmap<()>>) -> io::Result<()> {
        // Both looks at the regions are under the lock, or two changes at once could lose one.
        let lock = self.ram.lock().unwrap_or_else(PoisonError::into_inner);
        let with = self.ram.memory().insert_region(region).map_err(io::Error::other)?;
        lock.replace(with);
        Ok(())
    }

    fn remove(&self, slot: usize) -> io::Result<()> {
        let start = GuestAddress(self.room.region.guest + self.part(slot).start);
        let lock = self.ram.lock().unwrap_or_else(PoisonError::into_inner);
        let removed = self.ram.memory().remove_region(start, self.slot_size);
        let (without, _) = removed.map_err(io::Error::other)?;
        lock.replace(without);
        Ok(())
    }

    /// Makes an end of what is in slots that nobody reaches any more, and of every way to those that nobody sees.
    fn shut(&mut self) {
        let mut leaving = std::mem::take(&mut self.leaving);
        leaving.retain_mut(|(slot, region)| {
            if reclaim::give_back_part(region, 0, self.slot_size).is_err() {
                log::error!("memory: what is in slot {slot} stays with this process");
            }
            // Whoever has another view could otherwise touch it and end this process.
            if Arc::get_mut(region).is_none() {
                return true;
            }
            if let Err(error) = self.room.protect(&self.part(*slot), libc::PROT_NONE) {
                log::error!("memory: slot {slot} can still be touched by this process: {error}");
            }
            false
        });
        self.leaving = leaving;
    }

    /// A slot as guest memory, which this process may touch, and which is zeros.
    fn prepare(&mut self, slot: usize) -> io::Result<Arc<GuestRegionMmap<()>>> {
        self.shut();
        if let Some(place) = self.leaving.iter().position(|(leaving, _)| *leaving == slot) {
            return Ok(self.leaving.swap_remove(place).1);
        }
        let part = self.part(slot);
        let region = Arc::new(self.room.part(&part)?);
        self.room.protect(&part, ACCESS)?;
        Ok(region)
    }
}

impl Backing for HotplugMemory {
    fn bring_in(&mut self, slot: usize) -> io::Result<()> {
        match self.slots.get(slot) {
            Some(None) => {}
            Some(Some(_)) => return Ok(()),
            None => return Err(io::ErrorKind::InvalidInput.into()),
        }
        let region = self.prepare(slot)?;
        let given = self.tell_kvm(slot, self.slot_size).and_then(|()| {
            // The guest first: to a device there is never memory that the guest has not.
            self.insert(region.clone()).inspect_err(|_| _ = self.tell_kvm(slot, 0))
        });
        match given {
            Ok(()) => {
                if let Some(place) = self.slots.get_mut(slot) {
                    *place = Some(region);
                }
                Ok(())
            }
            Err(error) => {
                self.leaving.push((slot, region));
                self.shut();
                Err(error)
            }
        }
    }

    fn take_out(&mut self, slot: usize) -> io::Result<()> {
        let Some(Some(region)) = self.slots.get(slot) else { return Ok(()) };
        self.remove(slot)?;
        if let Err(error) = self.tell_kvm(slot, 0) {
            self.insert(region.clone())?;
            return Err(error);
        }
        self.leaving.extend(self.slots.get_mut(slot).and_then(Option::take).map(|region| (slot, region)));
        self.shut();
        Ok(())
    }

    /// Pages of hugetlbfs can run out, and touching one that is not there is a SIGBUS. Other memory comes when it is touched.
    fn reserve(&mut self, range: Range<u64>) -> io::Result<()> {
        let (Some(file), region) = (&self.room.file, self.room.region) else { return Ok(()) };
        let offset = range.start.checked_sub(region.guest).and_then(|at| at.checked_add(region.offset));
        let offset = offset.and_then(|at| libc::off_t::try_from(at).ok());
        let len = range.end.checked_sub(range.start).and_then(|len| libc::off_t::try_from(len).ok());
        let (Some(offset), Some(len)) = (offset, len) else { return Err(io::ErrorKind::InvalidInput.into()) };
        // SAFETY: fallocate takes a descriptor, which `file` holds open during the call, and numbers.
        match unsafe { libc::fallocate(file.as_raw_fd(), 0, offset, len) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use devices::memory::GuestRam;
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    const START: u64 = 0x40_0000_0000;
    const SLOT: u64 = 4 << 20;
    const SLOTS: u64 = 4;

    struct Rig {
        memory: HotplugMemory,
        ram: Memory,
        room: Arc<Room>,
    }

    /// With a VM of the host's KVM, which need not be able to run anything.
    fn rig(file: Option<Arc<File>>, offset: u64) -> Option<Rig> {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            eprintln!("skipped: this test needs /dev/kvm");
            return None;
        };
        let ram = Memory::new(GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let room = Arc::new(Room::new(START..START + SLOTS * SLOT, file, offset, Pages::Base).unwrap());
        let vm = Arc::new(kvm.create_vm().unwrap());
        let memory = HotplugMemory::new(vm, ram.clone(), room.clone(), SLOT, 1, false);
        Some(Rig { memory, ram, room })
    }

    impl Rig {
        fn write(&self, slot: u64) -> bool {
            let written = self.ram.memory().write_slice(&[1; 0x3000], GuestAddress(START + slot * SLOT));
            written.is_ok()
        }

        fn zeros(&self, slot: u64) -> bool {
            let mut bytes = vec![1; SLOT as usize];
            self.ram.memory().read_slice(&mut bytes, GuestAddress(START + slot * SLOT)).unwrap();
            bytes.iter().all(|byte| *byte == 0)
        }

        /// What the kernel finds there on this process's behalf.
        fn kernel_reaches(&self, slot: u64) -> bool {
            let zeros = File::open("/dev/zero").unwrap();
            // SAFETY: the range is in the room, which nothing refers to.
            let read = unsafe { libc::read(zeros.as_raw_fd(), self.room.at(slot * SLOT), 1) };
            read == 1
        }

        /// KiB of the room that this process has.
        fn resident(&self) -> u64 {
            let host = self.room.region().host..self.room.region().host + SLOTS * SLOT;
            let mut inside = false;
            let mut sum = 0;
            for line in fs::read_to_string("/proc/self/smaps").unwrap().lines() {
                let range = line.split(' ').next().and_then(|range| range.split_once('-'));
                if let Some((start, _)) = range
                    && let Ok(start) = u64::from_str_radix(start, 16)
                {
                    inside = host.contains(&start);
                }
                if let Some(rest) = line.strip_prefix("Rss:")
                    && inside
                {
                    sum += rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
                }
            }
            sum
        }
    }

    #[test]
    fn a_slot_is_reached_while_it_is_in_and_by_nobody_otherwise() {
        let Some(mut rig) = rig(None, 0) else { return };
        assert!((0..SLOTS).all(|slot| !rig.write(slot) && !rig.kernel_reaches(slot)));
        for _ in 0..3 {
            for slot in [2, 0] {
                rig.memory.bring_in(slot).unwrap();
                rig.memory.bring_in(slot).unwrap();
            }
            assert_eq!([0, 1, 2, 3].map(|slot| rig.write(slot)), [true, false, true, false]);
            assert!(!rig.zeros(2) && rig.kernel_reaches(0));
            assert!(rig.resident() > 0);
            for slot in [0, 2, 2, 3] {
                rig.memory.take_out(slot).unwrap();
            }
            assert_eq!(rig.resident(), 0);
            assert!((0..SLOTS).all(|slot| !rig.write(slot) && !rig.kernel_reaches(slot)));
            rig.memory.bring_in(2).unwrap();
            assert!(rig.zeros(2));
            rig.memory.take_out(2).unwrap();
        }
        assert_eq!(rig.ram.memory().iter().count(), 1);
        assert!(rig.memory.bring_in(SLOTS as usize).is_err() && rig.memory.take_out(SLOTS as usize).is_ok());
    }

    #[test]
    fn what_is_kept_in_a_file_lies_there_at_its_offset_and_goes_when_its_slot_is_taken_out() {
        use std::os::unix::fs::{FileExt, MetadataExt};
        // tmpfs, which has the holes that a memfd's has.
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(SLOT + SLOTS * SLOT).unwrap();
        let file = Arc::new(file);
        let Some(mut rig) = rig(Some(file.clone()), SLOT) else { return };
        rig.memory.bring_in(1).unwrap();
        assert!(rig.write(1));
        let mut byte = [0];
        file.read_exact_at(&mut byte, 2 * SLOT).unwrap();
        assert_eq!(byte, [1]);
        let slot = START + SLOT..START + 2 * SLOT;
        rig.memory.reserve(slot).unwrap();
        assert_eq!(file.metadata().unwrap().blocks() * 512, SLOT, "it has its memory before it is touched");
        rig.memory.take_out(1).unwrap();
        assert_eq!(file.metadata().unwrap().blocks(), 0);
        rig.memory.bring_in(1).unwrap();
        assert!(rig.zeros(1));
        assert!(rig.memory.reserve(0..SLOT).is_err());
    }

    #[test]
    fn room_is_kept_out_of_core_dumps_and_asks_for_huge_pages_where_they_are_wanted() {
        for (pages, wanted) in [(Pages::Base, false), (Pages::Transparent, true)] {
            let room = Room::new(START..START + SLOT, None, 0, pages).unwrap();
            let maps = fs::read_to_string("/proc/self/smaps").unwrap();
            let start = format!("{:x}-", room.region().host);
            let mapping = maps.lines().skip_while(|line| !line.starts_with(&start));
            let flags = mapping.skip(1).find(|line| line.starts_with("VmFlags:")).unwrap();
            let has = |flag| flags.split(' ').any(|word| word == flag);
            assert!(has("dd") && has("hg") == wanted, "{flags}");
            assert!(room.region().host.is_multiple_of(2 << 20));
        }
    }

    #[test]
    fn a_slot_that_kvm_refuses_is_out_as_before() {
        let Some(mut rig) = rig(None, 0) else { return };
        // One slot of KVM's for two.
        let other =
            HotplugMemory::new(rig.memory.vm.clone(), rig.ram.clone(), rig.room.clone(), SLOT, 9, false);
        let mut other = other;
        other.bring_in(0).unwrap();
        assert!(rig.memory.bring_in(0).is_err());
        assert_eq!(rig.ram.memory().iter().count(), 2);
        other.take_out(0).unwrap();
        rig.memory.bring_in(0).unwrap();
        assert!(rig.write(0));
    }

    #[test]
    fn what_a_device_is_still_about_is_no_trap_and_is_shut_when_it_is_done() {
        let Some(mut rig) = rig(None, 0) else { return };
        for again in [1, 3] {
            rig.memory.bring_in(1).unwrap();
            let view = rig.ram.memory();
            let late = |byte: u8| view.write_slice(&[byte; 0x3000], GuestAddress(START + SLOT)).unwrap();
            rig.memory.take_out(1).unwrap();
            assert!(!rig.write(1));
            late(1);
            assert!(rig.resident() > 0 && rig.kernel_reaches(1));
            // One that comes, be it the same, finds zeros in it.
            rig.memory.bring_in(again).unwrap();
            assert!(rig.zeros(again as u64));
            rig.memory.take_out(again).unwrap();
            late(2);
            drop(view);
            rig.memory.bring_in(0).unwrap();
            assert!(!rig.kernel_reaches(1) && !rig.kernel_reaches(3));
            rig.memory.take_out(0).unwrap();
            assert_eq!(rig.resident(), 0);
            assert!(rig.memory.leaving.is_empty());
        }
    }

    #[test]
    fn when_it_is_over_nothing_is_left_and_no_handle_is_in_the_air() {
        let Some(mut rig) = rig(None, 0) else { return };
        rig.memory.bring_in(3).unwrap();
        assert!(rig.write(3));
        let Rig { memory, ram, room } = rig;
        drop((memory, room));
        let mut byte = [1];
        ram.memory().read_slice(&mut byte, GuestAddress(START + 3 * SLOT)).unwrap();
        assert_eq!(byte, [0]);
    }
}
