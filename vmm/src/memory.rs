//! Guest RAM, mapped in the regions that the guest-physical map wants, with what KVM's memory slots need to know of each.
//!
//! Ordinary RAM is private and anonymous, because only that gets transparent huge pages under every host's default
//! policy: a memfd's pages are mapped into the guest one by one, which costs a boot of Debian's kernel in 128 MiB some
//! 15 000 more exits and twice the time. A memfd is for what needs one: 2 MiB pages of hugetlbfs, and memory that another
//! process is given (vhost-user).
//!
//! Bytes are reached through [`Memory`] alone. Does not tell KVM, does not track dirty pages; what comes and goes while the
//! guest runs has its room here and its slots in `hotplug_memory.rs`.

use std::ffi::CStr;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr;
use std::sync::Arc;

use devices::memory::{GuestRam, Memory};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestRegionMmap, MmapRegion,
};

use crate::hotplug_memory::Room;
use crate::x86_64::layout;

/// A number of bytes. MiB become bytes here and nowhere else, with an error in place of an overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

impl ByteSize {
    /// Guest RAM of `mib` MiB, if it is more than none and the guest-physical map has room for it.
    pub fn ram_of_mib(mib: u64) -> Result<ByteSize, MemoryError> {
        ByteSize::of_mib(mib).filter(|size| *size > ByteSize::NONE).ok_or(MemoryError::Size { mib })
    }

    /// `mib` MiB, if no guest-physical map is too small for them.
    pub fn of_mib(mib: u64) -> Option<ByteSize> {
        mib.checked_mul(1 << 20).filter(|size| *size <= layout::MAX_RAM).map(ByteSize)
    }

    pub const NONE: ByteSize = ByteSize(0);

    pub fn bytes(self) -> u64 {
        self.0
    }

    /// Rounded down.
    pub fn mib(self) -> u64 {
        self.0 >> 20
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} MiB", self.mib())
    }
}

/// What backs guest RAM on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// What the host gives a process, allocated as the guest touches it: huge pages too where its policy is `always`.
    #[default]
    Base,
    /// The same, and the host is asked for huge pages (MADV_HUGEPAGE), which counts where its policy is `madvise`.
    Transparent,
    /// 2 MiB pages of hugetlbfs. All are reserved when the memory is made, so that the guest never dies for want of one.
    Huge2M,
}

impl Pages {
    /// Bytes of one page.
    pub fn size(self) -> u64 {
        match self {
            Pages::Base | Pages::Transparent => layout::PAGE,
            Pages::Huge2M => 2 << 20,
        }
    }
}

/// Why there is no guest RAM. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("mem_size_mib is {mib}; it must be from 1 to {}", layout::MAX_RAM >> 20)]
    Size { mib: u64 },
    #[error("mem_size_mib is {}; with huge_pages 2M it must be a multiple of 2", .size.mib())]
    NotHuge { size: ByteSize },
    #[error(
        "mem_size_mib is {}: the host has not that many free 2 MiB pages (huge_pages is 2M); set more aside in \
         /proc/sys/vm/nr_hugepages",
        .size.mib()
    )]
    NoHugePages { size: ByteSize },
    #[error("`total_size_mib` is {} of memory that can be plugged: there is no room for it: {error}", .size.mib())]
    Room { size: ByteSize, error: io::Error },
    #[error("mem_size_mib is {}: cannot {what}: {error}", .size.mib())]
    Host { size: ByteSize, what: &'static str, error: io::Error },
}

/// Guest RAM, mapped. Dropping it unmaps what no [`Memory`] handle holds any more.
pub struct GuestMemory {
    size: ByteSize,
    pages: Pages,
    regions: Vec<Region>,
    /// What RAM is in, and after it the room; `None` for anonymous memory.
    file: Option<Arc<File>>,
    room: Option<Arc<Room>>,
    memory: Memory,
}

/// A contiguous part of guest RAM, as KVM's memory slots and vhost-user's memory table describe it. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest-physical address.
    pub guest: u64,
    pub size: u64,
    /// Address in this process; mapped as long as the [`GuestMemory`] lives.
    pub host: u64,
    /// The guest-physical address less the hole: the offset in the memfd, if there is one, and in a memory file.
    pub offset: u64,
}

impl GuestMemory {
    /// Makes and maps `size` of zeroed RAM, in a file that other processes can be given if it `is_shared`.
    /// There may be as much as `more` later: see [`GuestMemory::make_room`].
    pub fn new(
        size: ByteSize,
        more: ByteSize,
        pages: Pages,
        is_shared: bool,
    ) -> Result<GuestMemory, MemoryError> {
        if !size.bytes().is_multiple_of(pages.size()) {
            return Err(MemoryError::NotHuge { size });
        }
        let is_in_a_file = is_shared || pages == Pages::Huge2M;
        let file = is_in_a_file.then(|| ram_file(size, more, pages).map(Arc::new)).transpose()?;
        let mut regions = Vec::new();
        let mut mappings = Vec::new();
        let mut offset = 0;
        for (guest, len) in layout::ram(size.bytes()) {
            let mapping = map(file.as_ref(), offset, guest, len, pages).map_err(|error| match pages {
                Pages::Huge2M => MemoryError::NoHugePages { size },
                _ => MemoryError::Host { size, what: "map it", error },
            })?;
            regions.push(Region { guest, size: len, host: mapping.as_ptr() as u64, offset });
            mappings.push(mapping);
            offset += len;
        }
        let ram = GuestRam::from_regions(mappings).map_err(|e| MemoryError::Host {
            size,
            what: "lay it out",
            error: io::Error::other(e),
        })?;
        Ok(GuestMemory { size, pages, regions, file, room: None, memory: Memory::new(ram) })
    }

    /// Makes room for memory that comes and goes at these guest addresses, as much as was said at first. None of it is there
    /// yet.
    pub fn make_room(&mut self, guest: Range<u64>) -> Result<Arc<Room>, MemoryError> {
        let more = ByteSize(guest.end - guest.start);
        let room = Room::new(guest, self.file.clone(), self.size.bytes(), self.pages);
        let room = Arc::new(room.map_err(|error| MemoryError::Room { size: more, error })?);
        self.room = Some(room.clone());
        Ok(room)
    }

    /// A handle for devices; all handles see the same memory.
    pub fn handle(&self) -> Memory {
        self.memory.clone()
    }

    pub fn size(&self) -> ByteSize {
        self.size
    }

    pub fn pages(&self) -> Pages {
        self.pages
    }

    /// What is there from the start to the end. Lowest guest address first.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Where memory comes and goes, if there is such a place.
    pub fn room(&self) -> Option<&Room> {
        self.room.as_deref()
    }

    /// All that can ever be RAM: [`GuestMemory::regions`], and the room for what comes and goes. What is out at the moment
    /// can be touched neither by this process nor by the kernel on its behalf.
    pub fn all_regions(&self) -> impl Iterator<Item = Region> + '_ {
        self.regions.iter().copied().chain(self.room.iter().map(|room| room.region()))
    }

    /// What the regions are in, each at its offset; `None` for anonymous memory.
    pub fn file(&self) -> Option<&Arc<File>> {
        self.file.as_ref()
    }
}

fn ram_file(size: ByteSize, more: ByteSize, pages: Pages) -> Result<File, MemoryError> {
    let huge = if pages == Pages::Huge2M { libc::MFD_HUGETLB | libc::MFD_HUGE_2MB } else { 0 };
    sealed_memfd(c"guest-ram", size.bytes().saturating_add(more.bytes()), huge)
        .map_err(|error| MemoryError::Host { size, what: "make a memfd for it", error })
}

/// Memory beside the guest's that another process is given.
pub fn shared_file(bytes: u64) -> io::Result<File> {
    sealed_memfd(c"rings", bytes, 0)
}

/// A memfd of so many zeros that nobody can resize: a shared mapping that shrinks would kill this process with SIGBUS.
fn sealed_memfd(name: &CStr, bytes: u64, huge: libc::c_uint) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | huge;
    // SAFETY: memfd_create reads a NUL-terminated name, which a `CStr` is, and touches no other memory.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    let file = match fd {
        ..0 => return Err(io::Error::last_os_error()),
        // SAFETY: `fd` is not negative, so memfd_create has just made it and nobody else owns it.
        _ => unsafe { File::from_raw_fd(fd) },
    };
    file.set_len(bytes)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an integer; `file` holds the descriptor open during the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

fn map(
    file: Option<&Arc<File>>,
    offset: u64,
    guest: u64,
    len: u64,
    pages: Pages,
) -> Result<GuestRegionMmap<()>, io::Error> {
    let mapping = match file {
        Some(file) => shared(file.clone(), offset, len, pages),
        None => anonymous(len),
    }
    .map_err(io::Error::other)?;
    // A core dump of this process must hold none of the guest's secrets. Both are advice: a kernel without them is fine.
    advise(&mapping, libc::MADV_DONTDUMP);
    if pages == Pages::Transparent {
        advise(&mapping, libc::MADV_HUGEPAGE);
    }
    GuestRegionMmap::new(mapping, GuestAddress(guest))
        .ok_or_else(|| io::Error::other("guest addresses wrap around"))
}

/// Huge pages are reserved here, because running out of them is a SIGBUS that no OOM killer softens.
fn shared(file: Arc<File>, offset: u64, len: u64, pages: Pages) -> Result<MmapRegion<()>, MmapRegionError> {
    MmapRegionBuilder::new(len as usize)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED)
        .with_file_offset(FileOffset::from_arc(file, offset))
        .with_hugetlbfs(pages == Pages::Huge2M)
        .build()
}

/// Anonymous memory on a 2 MiB boundary: elsewhere KVM cannot use huge pages for it, and Linux before 6.7, or with a size
/// that is no multiple of 2 MiB, puts it anywhere. Not reserved: overcommitting guests is the operator's choice, as with
/// any other process's memory.
///
/// Never unmapped, as nothing else makes sure that no [`Memory`] handle is left; [`GuestMemory`] gives back what is in it.
fn anonymous(len: u64) -> Result<MmapRegion<()>, MmapRegionError> {
    const ACCESS: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
    const FLAGS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let boundary = Pages::Huge2M.size() as usize;
    // SAFETY: without a wanted address and MAP_FIXED this makes a new mapping and touches no other.
    let base = unsafe { libc::mmap(ptr::null_mut(), len as usize + boundary, ACCESS, FLAGS, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(MmapRegionError::Mmap(io::Error::last_os_error()));
    }
    let start = base.cast::<u8>().map_addr(|address| address.next_multiple_of(boundary));
    let builder = MmapRegionBuilder::new(len as usize).with_mmap_prot(ACCESS).with_mmap_flags(FLAGS);
    // SAFETY: `start` is less than `boundary` after `base`, so `len` bytes from it are inside the mapping made above, which
    // stays for the life of the process.
    unsafe { builder.with_raw_mmap_pointer(start) }.build()
}

/// A guest that could not be started leaves no pages behind, and no address that a handle could still use is invalid.
impl Drop for GuestMemory {
    fn drop(&mut self) {
        // What is in a file goes with the last mapping of it.
        for region in self.memory.memory().iter().filter(|_| self.file.is_none()) {
            advise(region, libc::MADV_DONTNEED);
        }
    }
}

fn advise(mapping: &MmapRegion<()>, advice: libc::c_int) {
    // SAFETY: the range is exactly `mapping`, alive during the call. MADV_DONTDUMP and MADV_HUGEPAGE change no byte of it;
    // MADV_DONTNEED makes it zeros, as a write through any handle could, and no reference into guest RAM exists.
    let result = unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), advice) };
    if result != 0 {
        log::debug!("madvise({advice}) on guest RAM: {}", io::Error::last_os_error());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn mib(mib: u64) -> ByteSize {
        ByteSize::ram_of_mib(mib).unwrap()
    }

    #[test]
    fn sizes_that_overflow_or_fit_no_machine_are_refused_by_name() {
        for bad in [0, (layout::MAX_RAM >> 20) + 1, 1 << 44, u64::MAX] {
            let error = ByteSize::ram_of_mib(bad).unwrap_err().to_string();
            assert!(error.contains("mem_size_mib") && error.contains(&bad.to_string()), "{error}");
        }
        assert_eq!(mib(128).bytes(), 128 << 20);
    }

    #[test]
    fn regions_are_flat_in_a_file_while_guest_addresses_jump_the_hole() {
        let memory = GuestMemory::new(mib(3 * 1024 + 2), ByteSize::NONE, Pages::Base, false).unwrap();
        let [low, high] = memory.regions() else { panic!("{:?}", memory.regions()) };
        assert_eq!((low.guest, low.size, low.offset), (0, 3 << 30, 0));
        assert_eq!((high.guest, high.size, high.offset), (4 << 30, 2 << 20, 3 << 30));
        let ram = memory.handle();
        let ram = ram.memory();
        ram.write_obj(0x11u8, GuestAddress(low.size - 1)).unwrap();
        ram.write_obj(0x22u8, GuestAddress(high.guest)).unwrap();
        ram.write_obj(0u8, GuestAddress(low.size)).unwrap_err();
        assert_eq!(ram.read_obj::<u8>(GuestAddress(low.size - 1)).unwrap(), 0x11);
        assert_eq!(ram.read_obj::<u8>(GuestAddress(high.guest)).unwrap(), 0x22);
    }

    #[test]
    fn odd_sizes_too_lie_where_huge_pages_can_back_them() {
        for size in [1, 3, 128, 129, 4097] {
            let memory = GuestMemory::new(mib(size), ByteSize::NONE, Pages::Base, false).unwrap();
            for region in memory.regions() {
                assert_eq!(region.host % (2 << 20), 0, "{size} MiB: {region:x?}");
            }
        }
    }

    #[test]
    fn a_handle_outlives_the_memory_but_nothing_of_what_was_in_it() {
        let memory = GuestMemory::new(mib(1), ByteSize::NONE, Pages::Base, false).unwrap();
        let ram = memory.handle();
        ram.memory().write_obj(0x11u8, GuestAddress(5)).unwrap();
        drop(memory);
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(5)).unwrap(), 0);
    }

    #[test]
    fn what_another_process_is_given_is_the_guest_s_memory_itself_and_goes_back_to_the_host_too() {
        use devices::virtio::reclaim::Ram;
        use std::os::unix::fs::{FileExt, MetadataExt};
        let memory = GuestMemory::new(mib(4), ByteSize::NONE, Pages::Base, true).unwrap();
        let ram = memory.handle();
        ram.memory().write_slice(&[0x11; 1 << 20], GuestAddress(0)).unwrap();
        let ram = ram.memory();
        let region = ram.iter().next().unwrap();
        let file = vm_memory::GuestMemoryRegion::file_offset(region).unwrap().file();
        let mut bytes = [0; 2];
        file.read_exact_at(&mut bytes, (1 << 20) - 1).unwrap();
        assert_eq!(bytes, [0x11, 0]);
        let before = file.metadata().unwrap().blocks();
        let given = Ram {
            regions: memory.regions().iter().map(|part| part.guest..part.guest + part.size).collect(),
            page: layout::PAGE,
        };
        assert_eq!(given.give_back(&ram, 0..1 << 19), Ok(1 << 19));
        assert_eq!(
            file.metadata().unwrap().blocks(),
            before / 2,
            "to the host, and not only out of this process"
        );
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [0, 0]);
    }

    #[test]
    fn nobody_resizes_the_memfd() {
        let memfd = shared_file(2 << 20).unwrap();
        for len in [0, 4 << 20] {
            assert_eq!(memfd.set_len(len).unwrap_err().raw_os_error(), Some(libc::EPERM));
        }
    }

    #[test]
    fn room_for_what_comes_later_is_behind_ram_and_no_memory_yet() {
        let mut memory = GuestMemory::new(mib(3), mib(1024), Pages::Transparent, false).unwrap();
        assert_eq!(memory.all_regions().count(), 1);
        let guest = 1 << 38..(1 << 38) + (1 << 30);
        memory.make_room(guest.clone()).unwrap();
        let all: Vec<_> = memory.all_regions().collect();
        assert_eq!(all[..1], *memory.regions());
        assert_eq!((all[1].guest, all[1].size, all[1].offset), (guest.start, 1 << 30, 3 << 20));
        assert!(all[1].host.is_multiple_of(2 << 20) && memory.file().is_none());
        assert!(memory.handle().memory().read_obj::<u8>(GuestAddress(guest.start)).is_err());
    }

    #[test]
    fn huge_pages_that_the_size_or_the_host_does_not_allow_are_refused_by_name() {
        let odd = GuestMemory::new(mib(3), ByteSize::NONE, Pages::Huge2M, false).err().unwrap().to_string();
        assert!(odd.contains("mem_size_mib is 3") && odd.contains("multiple of 2"), "{odd}");
        // No host has 64 TiB of huge pages set aside.
        let none = GuestMemory::new(mib(layout::MAX_RAM >> 20), ByteSize::NONE, Pages::Huge2M, false)
            .err()
            .unwrap()
            .to_string();
        assert!(none.contains("mem_size_mib is") && none.contains("2 MiB pages"), "{none}");
    }
}
