//! Files of the host in guest memory: each has a KVM memory slot of its own above the PCI window, where a persistent
//! memory device tells the guest of it. Devices reach it like RAM, so that a guest can read from a disk into it; what is
//! read-only to the guest is so to them.
//!
//! Does not open or flush files, and no part of what is here is RAM to the guest.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, PoisonError};
use std::{process, ptr};

use devices::memory::Memory;
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestRegionMmap};

use crate::x86_64::layout;

/// Addresses and sizes are multiples of this, in bytes: Linux makes persistent memory of no smaller parts (its sections
/// of a direct map), and maps it in pages of this size.
pub const ALIGN: u64 = 2 << 20;

const ACCESS: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const SPACE: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Where files are mapped. Dropping it takes them out of this process; no vCPU may run then.
pub struct FileMemory {
    vm: Arc<VmFd>,
    ram: Memory,
    /// What is free of the guest's addresses, lowest first; no two of these touch.
    free: Vec<Range<u64>>,
    first_slot: u32,
    mapped: Vec<Mapped>,
}

/// A file in guest memory. Dropping it takes it out of this process.
struct Mapped {
    range: Range<u64>,
    slot: u32,
    mapping: Mapping,
}

/// Address space of this process that is never given back, since nothing else makes sure that no [`Memory`] handle is
/// left which could reach it; only what is in it goes.
struct Mapping {
    start: *mut libc::c_void,
    len: usize,
}

// SAFETY: a mapping belongs to the whole process, and `start` is not written to after it is made.
unsafe impl Send for Mapping {}

impl FileMemory {
    /// Nothing mapped yet; files go into `free` of the guest's addresses, and into slots from `first_slot` on.
    pub fn new(vm: Arc<VmFd>, ram: Memory, free: Range<u64>, first_slot: u32) -> FileMemory {
        FileMemory { vm, ram, free: vec![free], first_slot, mapped: Vec::new() }
    }

    /// Maps the whole of `file`, and zeros behind it up to a multiple of [`ALIGN`]; says where. What the guest writes is
    /// in the file at once and durable when the file is flushed; with `read_only` the guest's writes have no effect, and
    /// devices make none ([`devices::memory::is_writable`]). Any that were made would stay within this process.
    ///
    /// The file must not shrink afterwards: this process ends when the guest reaches what is gone (SIGBUS).
    pub fn map(&mut self, file: &File, read_only: bool) -> Result<Range<u64>, FileMemoryError> {
        let mut end = file;
        // Unlike the metadata's length, this is also right for a block device.
        let bytes = end.seek(SeekFrom::End(0))?;
        if bytes == 0 {
            return Err(FileMemoryError::Empty);
        }
        let range = bytes
            .checked_next_multiple_of(ALIGN)
            .and_then(|size| self.find(size))
            .ok_or_else(|| FileMemoryError::Full { bytes, left: self.largest() })?;
        let slot = self.free_slot();
        let mapping = Mapping::new(file, bytes, range.end - range.start, read_only)?;
        self.insert(&mapping, &range, read_only)?;
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: range.start,
            memory_size: range.end - range.start,
            userspace_addr: mapping.start.addr() as u64,
            flags: if read_only { KVM_MEM_READONLY } else { 0 },
        };
        // SAFETY: the range is `mapping`, which stays for the life of the process.
        if let Err(error) = unsafe { self.vm.set_user_memory_region(region) } {
            self.take_out(&range);
            return Err(FileMemoryError::Slot(error));
        }
        self.mapped.push(Mapped { range: range.clone(), slot, mapping });
        self.reserve(&range);
        Ok(range)
    }

    /// Puts zeros, which are nobody's, in the place of the file that [`FileMemory::map`] has put at `range`, for a guest that
    /// has not let go of it: with nothing there, its programs would trap into KVM's emulator, which does not know every
    /// instruction, and a request to another device that names this memory would break that device. The device that used
    /// the file has ended. What the guest writes there takes memory of this process until [`FileMemory::unmap`].
    ///
    /// Ends the process where the host has no memory for it.
    pub fn close(&mut self, range: &Range<u64>) {
        let Some(mapped) = self.mapped.iter_mut().find(|mapped| mapped.range == *range) else { return };
        if let Err(error) = mapped.mapping.clear() {
            // The guest still has this place. The file is there, which is somebody else's from now on, or, before Linux 6.12,
            // nothing, and whatever this process maps next may come there.
            log::error!("no zeros can be put in the place of a file in guest memory: {error}");
            process::abort();
        }
    }

    /// Takes out what [`FileMemory::map`] has put at `range`. The device that used it has ended; to a guest that goes on
    /// there nothing answers.
    pub fn unmap(&mut self, range: &Range<u64>) {
        let Some(place) = self.mapped.iter().position(|mapped| mapped.range == *range) else { return };
        let Some(mapped) = self.mapped.get(place) else { return };
        let none = kvm_userspace_memory_region {
            slot: mapped.slot,
            guest_phys_addr: range.start,
            memory_size: 0,
            userspace_addr: 0,
            flags: 0,
        };
        // SAFETY: a size of 0 takes the slot away, and names no memory.
        if let Err(error) = unsafe { self.vm.set_user_memory_region(none) } {
            // Neither the place nor the slot is used again.
            self.close(range);
            return log::error!("KVM_SET_USER_MEMORY_REGION: {error}");
        }
        self.take_out(range);
        self.release(range);
        self.mapped.remove(place);
    }

    /// The lowest place of this size.
    fn find(&self, size: u64) -> Option<Range<u64>> {
        let room = self.free.iter().find(|free| free.end - free.start >= size)?;
        Some(room.start..room.start + size)
    }

    fn largest(&self) -> u64 {
        self.free.iter().map(|free| free.end - free.start).max().unwrap_or(0)
    }

    fn free_slot(&self) -> u32 {
        let is_free = |slot: &u32| !self.mapped.iter().any(|mapped| mapped.slot == *slot);
        (self.first_slot..).find(is_free).unwrap_or(u32::MAX)
    }

    /// Takes from the free places one that [`FileMemory::find`] gave.
    fn reserve(&mut self, range: &Range<u64>) {
        for free in &mut self.free {
            if free.start == range.start {
                free.start = range.end;
            }
        }
        self.free.retain(|free| free.start < free.end);
    }

    fn release(&mut self, range: &Range<u64>) {
        self.free.push(range.clone());
        self.free.sort_by_key(|free| free.start);
        self.free.dedup_by(|next, before| {
            let touch = before.end == next.start;
            if touch {
                before.end = next.end;
            }
            touch
        });
    }

    /// Takes a file from what devices reach.
    fn take_out(&self, range: &Range<u64>) {
        let lock = self.ram.lock().unwrap_or_else(PoisonError::into_inner);
        match self.ram.memory().remove_region(GuestAddress(range.start), range.end - range.start) {
            Ok((without, _)) => lock.replace(without),
            Err(error) => log::error!("guest memory at {:#x}: {error}", range.start),
        }
    }

    /// Lets devices reach it.
    fn insert(&self, mapping: &Mapping, range: &Range<u64>, read_only: bool) -> Result<(), FileMemoryError> {
        let access = if read_only { libc::PROT_READ } else { ACCESS };
        let builder = MmapRegionBuilder::new(mapping.len).with_mmap_prot(access).with_mmap_flags(SPACE);
        // SAFETY: `start` and `len` are those of a mapping that stays for the life of the process.
        let region = unsafe { builder.with_raw_mmap_pointer(mapping.start.cast()) }.build();
        let region = region.ok().and_then(|region| GuestRegionMmap::new(region, GuestAddress(range.start)));
        let region = region.ok_or_else(|| io::Error::other("it has no place among the guest's memory"))?;
        // Both looks at the regions are under the lock, or two changes at once could lose one.
        let lock = self.ram.lock().unwrap_or_else(PoisonError::into_inner);
        let with = self.ram.memory().insert_region(Arc::new(region)).map_err(io::Error::other)?;
        lock.replace(with);
        Ok(())
    }
}

impl Mapping {
    fn new(file: &File, bytes: u64, size: u64, read_only: bool) -> Result<Mapping, io::Error> {
        let (len, boundary) = (size as usize, ALIGN as usize);
        // SAFETY: without a wanted address and MAP_FIXED this makes a new mapping and touches no other.
        let space = unsafe { libc::mmap(ptr::null_mut(), len + boundary, ACCESS, SPACE, -1, 0) };
        if space == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = space.map_addr(|address| address.next_multiple_of(boundary));
        let mapping = Mapping { start, len };
        let kind = if read_only { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
        let flags = kind | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: `start` is less than `boundary` after `space`, so `bytes`, at most `len`, lie within what the call above
        // has made, where nothing is yet.
        let over = unsafe { libc::mmap(start, bytes as usize, ACCESS, flags, file.as_raw_fd(), 0) };
        if over == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        mapping.hide();
        Ok(mapping)
    }

    /// Zeros, which take no memory until they are written, in the place of what is there.
    fn clear(&mut self) -> io::Result<()> {
        // SAFETY: the range is one that `new` has made and nobody else maps anything into. It stays mapped, so that no
        // address which a handle still has is invalid; no reference into guest memory exists that could see it change.
        let over = unsafe { libc::mmap(self.start, self.len, ACCESS, SPACE | libc::MAP_FIXED, -1, 0) };
        if over == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.hide();
        Ok(())
    }

    /// A core dump of this process must hold none of the guest's secrets. Advice: a kernel without it is fine.
    fn hide(&self) {
        // SAFETY: the range is that of the mapping, and the advice changes no byte of it.
        unsafe { libc::madvise(self.start, self.len, libc::MADV_DONTDUMP) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Nobody reaches it any more.
        if let Err(error) = self.clear() {
            log::error!("a file stays mapped in this process: {error}");
        }
    }
}

/// Why a file is not in guest memory.
#[derive(Debug, thiserror::Error)]
pub enum FileMemoryError {
    #[error("the file is empty; give it a size first, for example with `truncate`")]
    Empty,
    #[error(
        "the file has {bytes} bytes, and the guest's CPUs address only {left} more for files; give the guest less \
         memory, or smaller files"
    )]
    Full { bytes: u64, left: u64 },
    #[error("KVM_SET_USER_MEMORY_REGION: {0}")]
    Slot(kvm_ioctls::Error),
    #[error("cannot map the file: {0}")]
    Host(#[from] io::Error),
}

const _: () = assert!(ALIGN.is_multiple_of(layout::PAGE));

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use devices::memory::GuestRam;
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    const FREE: Range<u64> = 0x40_0000_0000..0x40_0080_0000;

    /// With a VM of the host's KVM, which need not be able to run anything.
    fn files(free: Range<u64>) -> Option<(FileMemory, Memory)> {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            eprintln!("skipped: this test needs /dev/kvm");
            return None;
        };
        let ram = Memory::new(GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        Some((FileMemory::new(Arc::new(kvm.create_vm().unwrap()), ram.clone(), free, 1), ram))
    }

    fn file(bytes: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        file
    }

    #[test]
    fn what_cannot_be_cleared_is_said() {
        // No page begins there.
        let mut mapping =
            std::mem::ManuallyDrop::new(Mapping { start: ptr::without_provenance_mut(1), len: 4096 });
        assert_eq!(mapping.clear().unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn files_lie_one_after_the_other_and_their_bytes_are_guest_memory() {
        let Some((mut files, ram)) = files(FREE) else { return };
        let (odd, even) = (file(ALIGN + 5), file(ALIGN));
        odd.write_all_at(b"hello", ALIGN).unwrap();
        let first = files.map(&odd, false).unwrap();
        assert_eq!(first, FREE.start..FREE.start + 2 * ALIGN);
        let second = files.map(&even, false).unwrap();
        assert_eq!(second, first.end..first.end + ALIGN);

        let memory = ram.memory();
        let mut read = [1; 8];
        memory.read_slice(&mut read, GuestAddress(first.start + ALIGN)).unwrap();
        assert_eq!(&read, b"hello\0\0\0");
        memory.write_slice(b"there", GuestAddress(second.start + 3)).unwrap();
        let mut written = [0; 5];
        even.read_exact_at(&mut written, 3).unwrap();
        assert_eq!(&written, b"there");
        // Behind the end of a file there is memory too, which is nobody's.
        memory.write_slice(b"x", GuestAddress(first.end - 1)).unwrap();
    }

    #[test]
    fn what_is_written_to_a_read_only_file_is_not_in_the_file() {
        let Some((mut files, ram)) = files(FREE) else { return };
        let disk = file(ALIGN);
        let range = files.map(&disk, true).unwrap();
        ram.memory().write_slice(b"x", GuestAddress(range.start)).unwrap();
        let mut byte = [1];
        disk.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [0]);
    }

    #[test]
    fn what_is_read_only_to_the_guest_is_so_to_devices() {
        let Some((mut files, ram)) = files(FREE) else { return };
        let disk = file(ALIGN);
        let [read_only, writable] = [true, false].map(|read_only| files.map(&disk, read_only).unwrap());
        let memory = ram.memory();
        let may_write = |start, bytes| devices::memory::is_writable(&memory, GuestAddress(start), bytes);
        assert!(!may_write(read_only.start, 1) && !may_write(read_only.end - 1, 1));
        assert!(!may_write(read_only.start - 1, 2) && !may_write(0, read_only.end));
        assert!(may_write(writable.start, ALIGN) && may_write(0, 1 << 20));
    }

    #[test]
    fn when_it_is_over_the_files_are_not_mapped_and_no_handle_is_left_in_the_air() {
        let Some((mut files, ram)) = files(FREE) else { return };
        let disk = file(ALIGN);
        let range = files.map(&disk, false).unwrap();
        drop(files);
        ram.memory().write_slice(b"x", GuestAddress(range.start)).unwrap();
        let mut byte = [1];
        disk.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [0]);
    }

    #[test]
    fn what_is_taken_out_makes_room_for_what_comes_next() {
        let Some((mut files, ram)) = files(FREE) else { return };
        let parts: Vec<_> = (0..4).map(|_| files.map(&file(ALIGN), false).unwrap()).collect();
        for round in 0..100 {
            // In any order, and the room becomes one again.
            for part in [1, 2, 0] {
                files.unmap(&parts[part]);
                assert!(ram.memory().write_slice(b"x", GuestAddress(parts[part].start)).is_err());
            }
            let large = file(3 * ALIGN);
            let range = files.map(&large, round % 2 == 0).unwrap();
            assert_eq!(range, parts[0].start..parts[2].end);
            files.unmap(&range);
            assert_eq!([0, 1, 2].map(|_| files.map(&file(ALIGN), false).unwrap()), parts[..3]);
        }
        files.unmap(&(0..ALIGN));
        assert_eq!(files.mapped.len(), 4);
    }

    #[test]
    fn where_a_file_was_that_is_closed_there_are_zeros_until_the_guest_has_let_go_of_it() {
        let Some((mut files, ram)) = files(FREE) else { return };
        let disk = file(ALIGN);
        disk.write_all_at(b"word", 0).unwrap();
        let range = files.map(&disk, false).unwrap();
        files.close(&range);
        let (mut bytes, at) = ([1; 4], GuestAddress(range.start));
        ram.memory().read_slice(&mut bytes, at).unwrap();
        assert_eq!(bytes, [0; 4]);
        ram.memory().write_slice(b"lost", at).unwrap();
        disk.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"word");
        let other = files.map(&file(ALIGN), false).unwrap();
        assert_eq!(other.start, range.end, "nothing else comes there");
        files.unmap(&range);
        assert!(ram.memory().write_slice(b"x", at).is_err());
        assert_eq!(files.map(&disk, false).unwrap(), range);
        ram.memory().read_slice(&mut bytes, at).unwrap();
        assert_eq!(&bytes, b"word");
    }

    #[test]
    fn empty_files_and_those_that_do_not_fit_are_refused() {
        let Some((mut files, ram)) = files(FREE) else { return };
        assert!(matches!(files.map(&file(0), false), Err(FileMemoryError::Empty)));
        let bytes = FREE.end - FREE.start;
        let error = files.map(&file(bytes + 1), false).unwrap_err().to_string();
        assert!(error.contains(&bytes.to_string()) && error.contains(&(bytes + 1).to_string()), "{error}");
        assert_eq!(ram.memory().iter().count(), 1);
        files.map(&file(bytes), false).unwrap();
        assert!(matches!(files.map(&file(1), false), Err(FileMemoryError::Full { left: 0, .. })));
    }
}
