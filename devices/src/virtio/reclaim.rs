//! Guest memory that nobody needs goes back to the host: what the guest names is held against what is RAM, and whole pages
//! of it are given up.
//!
//! What is given up stays mapped. The next access, by whomever, finds zeros. Does not ask whether the guest still uses it.

use std::io;
use std::ops::Range;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use crate::memory::GuestRam;

/// Bytes of the pages that the device counts in, whatever the guest's and the host's are (VIRTIO 1.3, section 5.5.6).
pub const PAGE: u64 = 4096;

/// The part of guest memory that may be given up.
#[derive(Clone, Debug)]
pub struct Ram {
    /// Guest-physical.
    pub regions: Vec<Range<u64>>,
    /// Bytes of the pages that back it: a part of one cannot be given up.
    pub page: u64,
}

/// Not given up: it is no RAM, or no whole pages, or the host would not take it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

impl Ram {
    /// Whether the page with this number, of [`PAGE`] bytes, is RAM.
    pub fn has_page(&self, page: u32) -> bool {
        let start = u64::from(page) * PAGE;
        self.has(&(start..start + PAGE))
    }

    /// Gives the range up, which must be pages of [`PAGE`] bytes inside one region, with memory all over it. Larger pages
    /// that it covers in part stay. Says how many bytes were given up.
    pub fn give_back(&self, memory: &GuestRam, range: Range<u64>) -> Result<u64, Refused> {
        let is_whole = range.start.is_multiple_of(PAGE) && range.end.is_multiple_of(PAGE);
        if !is_whole || !self.has(&range) {
            return Err(Refused);
        }
        let page = self.page.max(PAGE);
        let start = range.start.checked_next_multiple_of(page).ok_or(Refused)?;
        let end = range.end - range.end % page;
        match end.checked_sub(start) {
            None | Some(0) => Ok(0),
            Some(bytes) => give_back(memory, start, bytes),
        }
    }

    fn has(&self, range: &Range<u64>) -> bool {
        let within = |region: &Range<u64>| region.start <= range.start && range.end <= region.end;
        range.start < range.end && self.regions.iter().any(within)
    }
}

/// Numbers of pages as ranges of addresses, each as long as it can be.
pub fn runs(mut pages: Vec<u32>) -> Vec<Range<u64>> {
    pages.sort_unstable();
    pages.dedup();
    let follows = |a: &u32, b: &u32| a.checked_add(1) == Some(*b);
    let runs = pages.chunk_by(follows).filter_map(|run| Some((*run.first()?, *run.last()?)));
    runs.map(|(first, last)| u64::from(first) * PAGE..(u64::from(last) + 1) * PAGE).collect()
}

/// What is one to the guest may be several mappings here.
fn give_back(memory: &GuestRam, start: u64, bytes: u64) -> Result<u64, Refused> {
    let mut done = 0;
    while done < bytes {
        let (region, offset) = memory.to_region_addr(GuestAddress(start + done)).ok_or(Refused)?;
        let part = (region.len() - offset.0).min(bytes - done);
        give_back_part(region, offset.0, part)?;
        done += part;
    }
    Ok(bytes)
}

/// Gives up a part of one mapping: whole pages of those that back it.
pub fn give_back_part(region: &GuestRegionMmap<()>, offset: u64, bytes: u64) -> Result<(), Refused> {
    let len = usize::try_from(bytes).map_err(|_| Refused)?;
    if region.len().checked_sub(offset).is_none_or(|left| left < bytes) {
        return Err(Refused);
    }
    // A shared mapping has its pages in a file, and leaving them alone would only unmap them here.
    let advice = if region.file_offset().is_some() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    let host = region.get_host_address(MemoryRegionAddress(offset)).map_err(|_| Refused)?;
    // SAFETY: `len` bytes from `host` are inside the mapping of `region`, as was checked above, and the borrow keeps it. They
    // become zeros, as a write of the guest could make them at any time: no reference into guest RAM exists.
    match unsafe { libc::madvise(host.cast(), len, advice) } {
        0 => Ok(()),
        _ => {
            log::warn!(
                "the host does not take {bytes} bytes of guest memory back: {}",
                io::Error::last_os_error()
            );
            Err(Refused)
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddressSpace};

    use super::*;
    use crate::virtio::testing;

    #[test]
    fn neighbours_become_one_range_whatever_their_order() {
        assert_eq!(runs(vec![]), []);
        assert_eq!(runs(vec![7, 5, 6, 6, 9]), [0x5000..0x8000, 0x9000..0xa000]);
        let last = u64::from(u32::MAX) * PAGE;
        assert_eq!(runs(vec![u32::MAX, 0, u32::MAX - 1]), [0..PAGE, last - PAGE..last + PAGE]);
    }

    fn ram(page: u64) -> Ram {
        Ram { regions: vec![0..1 << 20, 1 << 30..(1 << 30) + (1 << 20)], page }
    }

    #[test]
    fn only_whole_pages_inside_one_region_are_given_up() {
        let memory = testing::ram(1 << 20);
        let memory = memory.memory();
        let fill = || memory.write_slice(&[0x11; 1 << 20], GuestAddress(0)).unwrap();
        let zeros = || {
            let mut bytes = vec![0; 1 << 20];
            memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            bytes.iter().filter(|byte| **byte == 0).count()
        };
        let ram = ram(PAGE);
        fill();
        for refused in [
            0x1000..0x1001,
            0x1001..0x2001,
            0x1800..0x3000,
            0x1000..0x1000,
            0xff000..0x101000,
            0x100000..0x101000,
            (1 << 30) - 0x1000..(1 << 30) + 0x1000,
            // RAM by its word, without memory there.
            1 << 30..(1 << 30) + 0x1000,
            u64::MAX - 0xfff..u64::MAX,
        ] {
            assert_eq!(ram.give_back(&memory, refused.clone()), Err(Refused), "{refused:x?}");
        }
        assert_eq!(zeros(), 0);
        assert_eq!(ram.give_back(&memory, 0x1000..0x3000), Ok(0x2000));
        assert_eq!(zeros(), 0x2000);
        assert_eq!(ram.give_back(&memory, 0..1 << 20), Ok(1 << 20));
        assert_eq!(zeros(), 1 << 20);
        assert!(ram.has_page(0xff) && !ram.has_page(0x100) && !ram.has_page(u32::MAX));
    }

    #[test]
    fn what_lies_in_several_mappings_is_given_up_in_each_and_not_beyond() {
        let memory =
            GuestRam::from_ranges(&[(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x4000)]).unwrap();
        memory.write_slice(&[0x11; 0x8000], GuestAddress(0)).unwrap();
        let ram = ram(PAGE);
        assert_eq!(ram.give_back(&memory, 0x3000..0x5000), Ok(0x2000));
        let mut bytes = vec![0; 0x8000];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        assert!(bytes[..0x3000].iter().chain(&bytes[0x5000..]).all(|byte| *byte == 0x11));
        assert!(bytes[0x3000..0x5000].iter().all(|byte| *byte == 0));
        assert_eq!(ram.give_back(&memory, 0x7000..0x9000), Err(Refused), "there is no memory at its end");
    }

    #[test]
    fn of_larger_pages_only_those_that_are_covered_are_given_up() {
        let memory = testing::ram(1 << 20);
        let memory = memory.memory();
        let ram = ram(0x10000);
        assert_eq!(ram.give_back(&memory, 0x1000..0x2000), Ok(0));
        assert_eq!(ram.give_back(&memory, 0x1000..0x11000), Ok(0));
        assert_eq!(ram.give_back(&memory, 0x1000..0x30000), Ok(0x20000));
    }

    #[test]
    fn shared_memory_is_given_up_in_its_file() {
        use std::os::unix::fs::MetadataExt;
        use vm_memory::{FileOffset, GuestRegionMmap, MmapRegion};
        // tmpfs, which has the holes that a memfd's has.
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(1 << 20).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let region = MmapRegion::from_file(offset, 1 << 20).unwrap();
        let memory =
            GuestRam::from_regions(vec![GuestRegionMmap::new(region, GuestAddress(0)).unwrap()]).unwrap();
        memory.write_slice(&[0x11; 1 << 20], GuestAddress(0)).unwrap();
        let before = file.metadata().unwrap().blocks();
        assert_eq!(ram(PAGE).give_back(&memory, 0..1 << 19), Ok(1 << 19));
        assert_eq!(file.metadata().unwrap().blocks(), before / 2);
    }
}
