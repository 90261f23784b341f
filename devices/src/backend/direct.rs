//! Files that pass by the host's page cache (O_DIRECT): what they want of a transfer, and the way for those that are not so.
//!
//! Opens nothing. A part of a block is written by reading, changing and writing back whole ones, so whoever calls that must
//! see to it that nothing else writes there meanwhile.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, statx};

use crate::backend::disk::Extent;
use crate::memory::GuestRam;
use crate::virtio::queue::{GuestSlice, Segments};

/// The largest block that a file may want: file systems go so far, disks not yet.
const MAX_BLOCK: u64 = 64 << 10;
/// What is moved at a time where a transfer is not as the file wants it. At least a block.
const BOUNCE_BYTES: u64 = 64 << 10;
/// The smallest block that is tried where the kernel does not say.
const LEAST_BLOCK: u64 = 512;
/// What is taken for the alignment of memory then: that of a page, which all are content with.
const PAGE: usize = 4096;
/// Asks for the two fields of direct I/O (Linux 6.1); rustix has no name for it.
const STATX_DIOALIGN: StatxFlags = StatxFlags::from_bits_retain(0x2000);

/// What is a multiple of what in a transfer of a file that is open for direct I/O: powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Addresses in memory.
    pub memory: usize,
    /// Offsets in the file, and the length of each buffer.
    pub block: u64,
}

/// Makes a file direct from now on, for all who have this open file.
pub fn enable(file: &File) -> io::Result<()> {
    Ok(fcntl_setfl(file, fcntl_getfl(file)? | OFlags::DIRECT)?)
}

impl Alignment {
    /// `None` for a file that is not direct. Fails where the file system cannot do it, and for blocks beyond our limit.
    pub fn of(file: &File) -> io::Result<Option<Alignment>> {
        if !fcntl_getfl(file)?.contains(OFlags::DIRECT) {
            return Ok(None);
        }
        let told = statx(file, "", AtFlags::EMPTY_PATH, STATX_DIOALIGN)?;
        let (memory, block) = match told.stx_mask & STATX_DIOALIGN.bits() {
            0 => (PAGE, tried(file)?),
            _ => (told.stx_dio_mem_align as usize, u64::from(told.stx_dio_offset_align)),
        };
        if block == 0 {
            return Err(unsupported("its file system does not do direct I/O".into()));
        }
        let is_possible = |value: u64| value.is_power_of_two() && value <= MAX_BLOCK;
        if !is_possible(block) || !is_possible(memory as u64) {
            let rule = format!("its blocks for direct I/O are of {block} bytes, more than {MAX_BLOCK}");
            return Err(unsupported(rule));
        }
        Ok(Some(Alignment { memory, block }))
    }

    /// The file takes this transfer as it is.
    pub fn fits(&self, slices: &[GuestSlice<'_>], offset: u64) -> bool {
        let fits = |slice: &GuestSlice<'_>| {
            let address = slice.ptr_guard().as_ptr().addr();
            address.is_multiple_of(self.memory) && (slice.len() as u64).is_multiple_of(self.block)
        };
        offset.is_multiple_of(self.block) && slices.iter().all(fits)
    }

    /// This part of the file is made of whole blocks.
    pub fn is_whole(&self, range: &Extent) -> bool {
        range.offset.is_multiple_of(self.block) && range.len.is_multiple_of(self.block)
    }

    /// Fills `buffers` from `file` at `offset`, by a buffer of our own.
    pub fn read(&self, file: &File, memory: &GuestRam, mut buffers: Segments, offset: u64) -> io::Result<()> {
        let mut bounce = Bounce::new(self.memory);
        for piece in self.pieces(offset, buffers.bytes().into()) {
            let whole = bounce.part(0, piece.blocks.len);
            file.read_exact_at(whole, piece.blocks.offset)?;
            buffers.write(memory, bounce.part(piece.before, piece.len)).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Writes `buffers` to `file` at `offset`, by a buffer of our own.
    pub fn write(
        &self,
        file: &File,
        memory: &GuestRam,
        mut buffers: Segments,
        offset: u64,
    ) -> io::Result<()> {
        let range = Extent { offset, len: buffers.bytes().into() };
        self.change(file, &range, |piece| buffers.read(memory, piece).map_err(io::Error::other))
    }

    /// Writes zeroes there.
    pub fn write_zeroes(&self, file: &File, range: &Extent) -> io::Result<()> {
        self.change(file, range, |piece| {
            piece.fill(0);
            Ok(())
        })
    }

    fn change(
        &self,
        file: &File,
        range: &Extent,
        mut fill: impl FnMut(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut bounce = Bounce::new(self.memory);
        for piece in self.pieces(range.offset, range.len) {
            if piece.len < piece.blocks.len {
                file.read_exact_at(bounce.part(0, piece.blocks.len), piece.blocks.offset)?;
            }
            fill(bounce.part(piece.before, piece.len))?;
            file.write_all_at(bounce.part(0, piece.blocks.len), piece.blocks.offset)?;
        }
        Ok(())
    }

    /// Cuts a part of a file into pieces that with what is around them in their blocks fit into a [`Bounce`].
    fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = Piece> {
        let (mut at, end, block) = (offset, offset + len, self.block);
        std::iter::from_fn(move || {
            let first = at - at % block;
            let last = end.next_multiple_of(block).min(first + BOUNCE_BYTES.max(block));
            let piece = Piece {
                blocks: Extent { offset: first, len: last - first },
                before: at - first,
                len: end.min(last) - at,
            };
            let is_there = at < end;
            at += piece.len;
            is_there.then_some(piece)
        })
    }
}

/// A part of a file, and the blocks that it is in.
struct Piece {
    blocks: Extent,
    /// Bytes of the first block before it.
    before: u64,
    len: u64,
}

/// A buffer whose address is a multiple of what a file wants.
struct Bounce {
    bytes: Vec<u8>,
    start: usize,
}

impl Bounce {
    fn new(alignment: usize) -> Bounce {
        let bytes = vec![0; BOUNCE_BYTES as usize + alignment];
        let start = bytes.as_ptr().addr().next_multiple_of(alignment) - bytes.as_ptr().addr();
        Bounce { bytes, start }
    }

    fn part(&mut self, offset: u64, len: u64) -> &mut [u8] {
        let start = self.start + offset as usize;
        self.bytes.get_mut(start..start + len as usize).unwrap_or_default()
    }
}

/// The smallest block that the file takes, where the kernel does not say.
fn tried(file: &File) -> io::Result<u64> {
    let mut bounce = Bounce::new(PAGE);
    let mut block = LEAST_BLOCK;
    loop {
        match file.read_at(bounce.part(0, block), 0) {
            Ok(_) => return Ok(block),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && block < MAX_BLOCK => block *= 2,
            Err(error) => return Err(error),
        }
    }
}

fn unsupported(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, why)
}

const _: () = assert!(MAX_BLOCK <= BOUNCE_BYTES && LEAST_BLOCK.is_power_of_two());

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::virtio::testing::segments;

    /// Of no real file: the ways through the buffer work on any.
    const ALIGNMENT: Alignment = Alignment { memory: 4096, block: 4096 };
    const BYTES: u64 = 3 * BOUNCE_BYTES;

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    fn pattern(from: u64, len: u64) -> Vec<u8> {
        (from..from + len).map(|at| (at % 251) as u8).collect()
    }

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&pattern(0, BYTES), 0).unwrap();
        file
    }

    /// Parts of a file: within a block, of whole ones, across the borders of the buffer.
    const PARTS: [(u64, u64); 8] = [
        (0, 512),
        (512, 3584),
        (4096, 8192),
        (4000, 200),
        (BOUNCE_BYTES - 512, 1024),
        (512, BOUNCE_BYTES),
        (1536, 2 * BOUNCE_BYTES),
        (0, BYTES),
    ];

    #[test]
    fn pieces_are_of_whole_blocks_fit_into_the_buffer_and_are_all_of_it() {
        for block in [512, 4096, MAX_BLOCK] {
            for (offset, len) in PARTS {
                let mut at = offset;
                for piece in (Alignment { memory: 1, block }).pieces(offset, len) {
                    assert_eq!((piece.blocks.offset % block, piece.blocks.len % block), (0, 0));
                    assert!(piece.blocks.len <= BOUNCE_BYTES && piece.len > 0);
                    assert_eq!(piece.blocks.offset + piece.before, at);
                    at += piece.len;
                    assert!(at <= piece.blocks.offset + piece.blocks.len);
                }
                assert_eq!(at, offset + len, "{offset}+{len} in blocks of {block}");
            }
        }
        assert_eq!(ALIGNMENT.pieces(100, 0).count(), 0);
    }

    #[test]
    fn any_part_is_read_into_buffers_of_any_length() {
        let (ram, file) = (ram(), file());
        for (offset, len) in PARTS {
            let buffers = segments(&[(0x1001, 13), (0x20_00, len as u32 - 13)]);
            ALIGNMENT.read(&file, &ram, buffers, offset).unwrap();
            let mut found = vec![0; len as usize];
            ram.read_slice(&mut found[..13], GuestAddress(0x1001)).unwrap();
            ram.read_slice(&mut found[13..], GuestAddress(0x2000)).unwrap();
            assert!(found == pattern(offset, len), "{offset}+{len}");
        }
        let beyond = segments(&[(0, 512)]);
        assert!(ALIGNMENT.read(&file, &ram, beyond, BYTES).is_err());
    }

    #[test]
    fn what_is_beside_a_part_that_is_written_stays() {
        let ram = ram();
        ram.write_slice(&vec![0xee; 1 << 20], GuestAddress(0)).unwrap();
        for (offset, len) in PARTS {
            for zeroes in [false, true] {
                let file = file();
                let mut expected = pattern(0, BYTES);
                let part = &mut expected[offset as usize..(offset + len) as usize];
                if zeroes {
                    part.fill(0);
                    ALIGNMENT.write_zeroes(&file, &Extent { offset, len }).unwrap();
                } else {
                    part.fill(0xee);
                    let buffers = segments(&[(0x1001, 13), (0x2000, len as u32 - 13)]);
                    ALIGNMENT.write(&file, &ram, buffers, offset).unwrap();
                }
                let mut found = vec![0; BYTES as usize];
                file.read_exact_at(&mut found, 0).unwrap();
                assert!(found == expected, "{offset}+{len}");
                assert_eq!(file.metadata().unwrap().len(), BYTES);
            }
        }
    }

    #[test]
    fn a_transfer_fits_when_memory_offset_and_each_length_do() {
        let ram = ram();
        let fits = |alignment: Alignment, parts: &[(u64, u32)], offset| {
            alignment.fits(&segments(parts).slices(&ram).unwrap(), offset)
        };
        let (small, large) = (Alignment { memory: 4, block: 512 }, ALIGNMENT);
        assert!(fits(small, &[(0x1004, 512), (0x2000, 1024)], 512));
        assert!(fits(large, &[(0x1000, 4096), (0x8000, 8192)], 4096));
        for (alignment, parts, offset) in [
            (small, [(0x1002, 512), (0x2000, 512)], 512),
            (small, [(0x1000, 256), (0x2000, 256)], 512),
            (small, [(0x1000, 512), (0x2000, 512)], 256),
            (large, [(0x1000, 4096), (0x2200, 4096)], 4096),
            (large, [(0x1000, 3584), (0x2000, 512)], 4096),
            (large, [(0x1000, 4096), (0x2000, 4096)], 512),
        ] {
            assert!(!fits(alignment, &parts, offset), "{alignment:?} {parts:?} at {offset}");
        }
    }

    #[test]
    fn only_a_direct_file_wants_anything_and_what_it_wants_works() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let file = path.reopen().unwrap();
        file.write_all_at(&pattern(0, BYTES), 0).unwrap();
        assert_eq!(Alignment::of(&file).unwrap(), None);
        let direct = path.reopen().unwrap();
        enable(&direct).unwrap();
        assert_eq!(Alignment::of(&file).unwrap(), None, "another open file");
        let alignment = Alignment::of(&direct).unwrap().unwrap();
        for block in [alignment.block, tried(&direct).unwrap()] {
            let alignment = Alignment { block, ..alignment };
            let ram = ram();
            alignment.write(&direct, &ram, segments(&[(3, 1536)]), 512).unwrap();
            alignment.read(&direct, &ram, segments(&[(0x1001, 4096)]), 0).unwrap();
            let mut found = vec![0; 4096];
            ram.read_slice(&mut found, GuestAddress(0x1001)).unwrap();
            let mut expected = pattern(0, 4096);
            expected[512..2048].fill(0);
            assert!(found == expected);
        }
    }
}
