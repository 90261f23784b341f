//! A disk: a file or a block device of the host, read and written straight from and to guest memory. A raw one is here; one
//! that is a qcow2 image is `qcow2.rs`.
//!
//! Knows no sectors and no virtio status; does not open, lock, grow or guess the format of anything. What is here
//! is synchronous. An [`Operation`] owns its buffers, so that the asynchronous engine (`uring.rs`) can keep it until the
//! kernel is done.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use crate::backend::direct::Alignment;
use crate::backend::qcow2::{Backing, Qcow2};
use crate::backend::{job, vectored};
use crate::memory::GuestRam;
use crate::virtio::queue::{GuestSlice, Segments};

/// How much of zeroes is written at a time where the file system has no better way.
const ZEROES_BYTES: usize = 64 << 10;

/// An open disk and its size.
pub struct Disk {
    file: File,
    bytes: u64,
    /// Of a file that is open for direct I/O.
    alignment: Option<Alignment>,
    /// A raw disk has none.
    qcow2: Option<Box<Qcow2>>,
    #[cfg(test)]
    is_full: bool,
}

/// What is in a disk's file.
#[derive(Debug, Default)]
pub enum Format {
    #[default]
    Raw,
    /// With the images behind it, the nearest first.
    Qcow2(Vec<Backing>),
}

impl Disk {
    /// Takes an open file or block device; its size is that of now. One that was opened for direct I/O is used so: what it
    /// does not take as it is goes by a buffer of ours.
    pub fn new(mut file: File) -> io::Result<Disk> {
        // Unlike the metadata's length, this is also right for a block device.
        let bytes = file.seek(SeekFrom::End(0))?;
        let alignment = Alignment::of(&file)?;
        Ok(Disk {
            file,
            bytes,
            alignment,
            qcow2: None,
            #[cfg(test)]
            is_full: false,
        })
    }

    /// The same for one with a format.
    pub fn with_format(file: File, format: Format, read_only: bool) -> io::Result<Disk> {
        let Format::Qcow2(backing) = format else { return Disk::new(file) };
        let image = file.try_clone()?;
        let qcow2 = Qcow2::open(image, backing, read_only).map_err(io::Error::other)?;
        Ok(Disk { bytes: qcow2.bytes(), qcow2: Some(Box::new(qcow2)), alignment: None, ..Disk::new(file)? })
    }

    /// Whether what is in the file is the disk, byte for byte.
    pub fn is_raw(&self) -> bool {
        self.qcow2.is_none()
    }

    /// The least part of the disk that is a step of its own; a raw disk has none.
    pub fn cluster_bytes(&self) -> Option<u64> {
        self.qcow2.as_ref().map(|qcow2| qcow2.cluster_bytes())
    }

    /// Nothing that was written is in this process alone afterwards.
    pub fn settle(&self) -> io::Result<()> {
        #[cfg(test)]
        if self.is_full {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.qcow2.as_ref().map_or(Ok(()), |qcow2| qcow2.settle())
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What a direct file wants of a transfer.
    pub fn alignment(&self) -> Option<Alignment> {
        self.alignment
    }

    /// Makes a file look like a direct one with this alignment.
    #[cfg(test)]
    pub(crate) fn pretend(&mut self, alignment: Alignment) {
        self.alignment = Some(alignment);
    }

    /// Makes the host refuse to take an image's tables.
    #[cfg(test)]
    pub(crate) fn pretend_full(&mut self, is_full: bool) {
        self.is_full = is_full;
    }

    /// The file takes this as it is. Other operations are [`Disk::perform`]'s, while nothing else is under way: a part of a
    /// block is written by writing back what was read around it.
    pub fn takes(&self, memory: &GuestRam, operation: &Operation) -> io::Result<bool> {
        let Some(alignment) = self.alignment else { return Ok(true) };
        Ok(match operation {
            Operation::Read { offset, buffers } | Operation::Write { offset, buffers } => {
                alignment.fits(&slices(buffers, memory)?, *offset)
            }
            Operation::WriteZeroes { range, .. } => {
                alignment.is_whole(range) && alignment.memory <= job::ZEROES_ALIGNMENT
            }
            Operation::Flush | Operation::Discard(_) => true,
        })
    }

    /// Does all of `operation`, which must lie within the disk. On an error, what of it was done is unknown.
    pub fn perform(&self, memory: &GuestRam, operation: &Operation) -> io::Result<()> {
        if let Some(qcow2) = &self.qcow2 {
            return qcow2.perform(memory, operation);
        }
        match operation {
            Operation::Read { offset, buffers } => {
                let slices = slices(buffers, memory)?;
                match self.alignment.filter(|alignment| !alignment.fits(&slices, *offset)) {
                    Some(alignment) => alignment.read(&self.file, memory, buffers.clone(), *offset),
                    None => vectored::read_at(&self.file, &slices, *offset),
                }
            }
            Operation::Write { offset, buffers } => {
                let slices = slices(buffers, memory)?;
                match self.alignment.filter(|alignment| !alignment.fits(&slices, *offset)) {
                    Some(alignment) => alignment.write(&self.file, memory, buffers.clone(), *offset),
                    None => vectored::write_at(&self.file, &slices, *offset),
                }
            }
            Operation::Flush => self.file.sync_data(),
            Operation::Discard(ranges) => ranges.iter().try_for_each(|range| self.discard(range)),
            Operation::WriteZeroes { range, unmap } => self.write_zeroes(range, *unmap),
        }
    }

    fn discard(&self, range: &Extent) -> io::Result<()> {
        // A hint: what cannot be given back is kept.
        allocate(&self.file, Space::GiveBack, range).map(|_| ())
    }

    fn write_zeroes(&self, range: &Extent, unmap: bool) -> io::Result<()> {
        if unmap && allocate(&self.file, Space::GiveBack, range)? || allocate(&self.file, Space::Keep, range)?
        {
            return Ok(());
        }
        match self.alignment {
            Some(alignment) => alignment.write_zeroes(&self.file, range),
            None => self.write_zero_bytes(range),
        }
    }

    fn write_zero_bytes(&self, range: &Extent) -> io::Result<()> {
        let zeroes = vec![0; ZEROES_BYTES];
        let mut done = 0;
        while done < range.len {
            let step = (range.len - done).min(ZEROES_BYTES as u64);
            let piece = zeroes.get(..step as usize).unwrap_or_default();
            self.file.write_all_at(piece, range.offset + done)?;
            done += step;
        }
        Ok(())
    }
}

/// Makes the range read as zeroes without writing them. False when what is behind the file cannot do that.
pub(super) fn allocate(file: &File, space: Space, range: &Extent) -> io::Result<bool> {
    loop {
        let mode = match space {
            Space::GiveBack => FallocateMode::PunchHole,
            Space::Keep => FallocateMode::ZeroRange,
        };
        let Err(error) = fallocate(file, mode, true, range.offset, range.len) else {
            return Ok(true);
        };
        match error.errno() {
            // A block device whose blocks are larger than the range's alignment says EINVAL.
            libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL => return Ok(false),
            libc::EINTR => {}
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

#[derive(Clone, Copy)]
pub(super) enum Space {
    GiveBack,
    Keep,
}

fn slices<'a>(buffers: &Segments, memory: &'a GuestRam) -> io::Result<Vec<GuestSlice<'a>>> {
    buffers.slices(memory).map_err(io::Error::other)
}

/// What a disk can do; offsets and lengths in bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Operation {
    Read {
        offset: u64,
        buffers: Segments,
    },
    Write {
        offset: u64,
        buffers: Segments,
    },
    /// Everything written so far is on stable storage afterwards.
    Flush,
    /// The content is no longer needed; what is read there afterwards is undefined.
    Discard(Vec<Extent>),
    /// Zeroes are read there afterwards; with `unmap`, the space may be given back.
    WriteZeroes {
        range: Extent,
        unmap: bool,
    },
}

/// A part of a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub len: u64,
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn disk(bytes: u64) -> (Disk, GuestRam) {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![0xaa; bytes as usize], 0).unwrap();
        (Disk::new(file).unwrap(), GuestRam::new())
    }

    fn content(disk: &Disk, range: Extent) -> Vec<u8> {
        let mut data = vec![1; range.len as usize];
        disk.file.read_exact_at(&mut data, range.offset).unwrap();
        data
    }

    #[test]
    fn zeroes_are_zeroes_and_the_rest_is_untouched_with_and_without_giving_back_space() {
        for unmap in [false, true] {
            let (disk, ram) = disk(MIB);
            let range = Extent { offset: 512, len: 5 * 4096 + 512 };
            disk.perform(&ram, &Operation::WriteZeroes { range, unmap }).unwrap();
            assert!(content(&disk, range).iter().all(|&byte| byte == 0));
            assert_eq!(content(&disk, Extent { offset: 511, len: 1 }), [0xaa]);
            assert_eq!(content(&disk, Extent { offset: range.offset + range.len, len: 1 }), [0xaa]);
            assert_eq!(disk.file.metadata().unwrap().len(), MIB);
        }
    }

    #[test]
    fn a_discard_gives_space_back_and_keeps_the_size() {
        let (disk, ram) = disk(MIB);
        let before = disk.file.metadata().unwrap().blocks();
        let ranges = vec![Extent { offset: 0, len: MIB / 4 }, Extent { offset: MIB / 2, len: MIB / 2 }];
        disk.perform(&ram, &Operation::Discard(ranges)).unwrap();
        let after = disk.file.metadata().unwrap();
        assert!(after.blocks() < before);
        assert_eq!(after.len(), MIB);
    }

    #[test]
    fn where_the_host_knows_no_better_zeroes_are_written() {
        let (disk, _) = disk(MIB);
        let range = Extent { offset: 512, len: 3 * ZEROES_BYTES as u64 + 512 };
        disk.write_zero_bytes(&range).unwrap();
        assert!(content(&disk, range).iter().all(|&byte| byte == 0));
        assert_eq!(content(&disk, Extent { offset: 511, len: 1 }), [0xaa]);
        assert_eq!(content(&disk, Extent { offset: range.offset + range.len, len: 1 }), [0xaa]);
    }

    #[test]
    fn what_the_host_refuses_is_an_error() {
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(MIB).unwrap();
        let disk = Disk::new(File::open(path.path()).unwrap()).unwrap();
        let range = Extent { offset: 0, len: 4096 };
        let ram = GuestRam::new();
        assert!(disk.perform(&ram, &Operation::Discard(vec![range])).is_err());
        assert!(disk.perform(&ram, &Operation::WriteZeroes { range, unmap: true }).is_err());
    }
}
