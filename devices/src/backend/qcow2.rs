//! A qcow2 image and the images behind it: where a cluster of the disk is, and new clusters for what is written.
//!
//! Formats are told, not guessed, and the files are open: a name in a header says only that there is a file behind, and is
//! never followed. The crate imago maps clusters and keeps the tables; data goes between the files and guest memory by our
//! own calls (`vectored.rs`), so that the library never holds a reference to guest memory. What the library does not doubt
//! about a file is looked at before it gets the file (`header.rs`).
//!
//! Not here: encryption, data in a second file, snapshots (images that have some are read and written), resizing.

mod header;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2 as Format;
use imago::raw::Raw;
use imago::storage::drivers::CommonStorageHelper;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping, Storage};

use self::header::Header;
pub use self::header::Unusable;
use super::disk::{Extent, Operation, Space, allocate};
use super::vectored;
use crate::memory::GuestRam;
use crate::virtio::queue::Segments;

/// The longest chain, the disk's own image included: each costs a look at its tables for a cluster that is in none before.
pub const MAX_IMAGES: usize = 16;
/// Most memory for the tables of all images of a disk. With clusters of 64 KiB, which are usual, an image's take 10 MiB at
/// the most, those of one that is only read 8 MiB.
pub const MAX_METADATA_BYTES: u64 = 160 << 20;
/// How much of compressed data is copied at a time: a cluster has at most so much.
const PIECE_BYTES: u64 = 2 << 20;

/// An image that is read where those before it have nothing.
#[derive(Debug)]
pub struct Backing {
    pub file: File,
    pub is_qcow2: bool,
}

/// Why a chain of images is no disk. Images are counted from the disk's own, which is 0.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("image {0} is {1}")]
    Image(usize, Unusable),
    #[error("image {0} names a backing file, and none is given for it")]
    BackingMissing(usize),
    #[error("image {0} is given, and the one before it has no backing file")]
    BackingUnused(usize),
    #[error(
        "the tables of the images may take {0} bytes of memory; at most {MAX_METADATA_BYTES} are allowed"
    )]
    Memory(u64),
    #[error("there are {0} images; at most {MAX_IMAGES} are allowed")]
    Images(usize),
}

/// An open disk.
#[derive(Debug)]
pub struct Qcow2 {
    /// One operation at a time: only then may clusters be given back.
    image: Mutex<Image>,
    bytes: u64,
    /// Most memory for its tables.
    metadata_bytes: u64,
    /// Of the smallest clusters that there are in the chain.
    cluster_bytes: u64,
}

#[derive(Debug)]
struct Image {
    access: FormatAccess<Layer>,
    /// Tables have changed that are not in the file yet.
    is_dirty: bool,
}

impl Qcow2 {
    /// Opens the image in `file`, which is open for writing too unless it is for reading only, and those behind it, the
    /// nearest first.
    pub fn open(file: File, backing: Vec<Backing>, read_only: bool) -> Result<Qcow2, OpenError> {
        let layers = layers(file, backing, read_only)?;
        let metadata_bytes = metadata_bytes(&layers);
        let clusters = layers.iter().filter_map(|layer| Some(layer.header?.cluster_bytes()));
        let cluster_bytes = clusters.min().unwrap_or(u64::MAX);
        let access = open(layers, read_only)?;
        let bytes = access.size();
        Ok(Qcow2 {
            image: Mutex::new(Image { access, is_dirty: false }),
            bytes,
            metadata_bytes,
            cluster_bytes,
        })
    }

    /// Whether they can be opened so.
    pub fn check(file: File, backing: Vec<Backing>, read_only: bool) -> Result<(), OpenError> {
        open(layers(file, backing, read_only)?, true).map(drop)
    }

    /// Most memory that the tables of its images take.
    pub fn metadata_bytes(&self) -> u64 {
        self.metadata_bytes
    }

    /// Of the smallest clusters of its images: whoever goes through a part of the disk takes no smaller steps.
    pub fn cluster_bytes(&self) -> u64 {
        self.cluster_bytes
    }

    /// The size of the disk, which is not that of the file.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Does all of `operation`, which must lie within the disk. On an error, what of it was done is unknown.
    pub fn perform(&self, memory: &GuestRam, operation: &Operation) -> io::Result<()> {
        let mut image = self.image.lock().unwrap_or_else(PoisonError::into_inner);
        match operation {
            Operation::Read { offset, buffers } => image.read(memory, *offset, buffers.clone()),
            Operation::Write { offset, buffers } => image.write(memory, *offset, buffers.clone()),
            Operation::Flush => {
                image.settle()?;
                image.access.sync()
            }
            Operation::Discard(ranges) => ranges.iter().try_for_each(|range| image.discard(range)),
            Operation::WriteZeroes { range, unmap } => image.write_zeroes(range, *unmap),
        }
    }

    /// Writes changed tables to the file, and does not wait for the host's disk: this process may end afterwards and
    /// nothing is lost that was written.
    pub fn settle(&self) -> io::Result<()> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner).settle()
    }
}

/// Looks at each image, and at how they go together.
fn layers(file: File, backing: Vec<Backing>, read_only: bool) -> Result<Vec<Layer>, OpenError> {
    let images = backing.len() + 1;
    if images > MAX_IMAGES {
        return Err(OpenError::Images(images));
    }
    let chain = [Backing { file, is_qcow2: true }].into_iter().chain(backing).enumerate();
    let layers: Vec<_> = chain
        .map(|(number, image)| {
            let is_writable = number == 0 && !read_only;
            Layer::new(image, is_writable).map_err(|error| OpenError::Image(number, error))
        })
        .collect::<Result<_, _>>()?;
    for (number, layer) in layers.iter().enumerate() {
        let has_backing = layer.header.is_some_and(|header| header.has_backing);
        match (has_backing, number + 1 < images) {
            (true, false) => return Err(OpenError::BackingMissing(number)),
            (false, true) => return Err(OpenError::BackingUnused(number + 1)),
            _ => {}
        }
    }
    match metadata_bytes(&layers) {
        metadata if metadata > MAX_METADATA_BYTES => Err(OpenError::Memory(metadata)),
        _ => Ok(layers),
    }
}

fn metadata_bytes(layers: &[Layer]) -> u64 {
    layers.iter().map(Layer::metadata_bytes).sum()
}

/// Gives them to the library, from the last to the first, since each gets the one behind it.
fn open(layers: Vec<Layer>, read_only: bool) -> Result<FormatAccess<Layer>, OpenError> {
    let mut behind = None;
    for (number, layer) in layers.into_iter().enumerate().rev() {
        let is_writable = number == 0 && !read_only;
        let opened = layer.open(behind.take(), is_writable);
        behind = Some(opened.map_err(|error| OpenError::Image(number, error.into()))?);
    }
    behind.ok_or(OpenError::Images(0))
}

impl Image {
    fn read(&self, memory: &GuestRam, mut offset: u64, mut buffers: Segments) -> io::Result<()> {
        while buffers.bytes() > 0 {
            let (mapping, len) = self.access.get_mapping(offset, buffers.bytes().into())?;
            // Never beyond what was asked for; at the end of the disk, nothing.
            let len = if len == 0 { u64::from(buffers.bytes()) } else { len };
            match mapping {
                Mapping::Raw { storage, offset: at, .. } => {
                    storage.read(memory, at, &mut take(&mut buffers, len)?)?;
                }
                Mapping::Special { layer, offset: at, .. } => {
                    let mut part = take(&mut buffers, len.min(PIECE_BYTES))?;
                    let mut bytes = vec![0; part.bytes() as usize];
                    layer.inner().readv_special(IoVectorMut::from(&mut bytes), at)?;
                    offset += bytes.len() as u64;
                    part.write(memory, &bytes).map_err(io::Error::other)?;
                    continue;
                }
                _ => fill_with_zeroes(memory, &mut take(&mut buffers, len)?)?,
            }
            offset += len;
        }
        Ok(())
    }

    fn write(&mut self, memory: &GuestRam, mut offset: u64, mut buffers: Segments) -> io::Result<()> {
        while buffers.bytes() > 0 {
            let prepared = self.access.prepare_data_mapping(offset, buffers.bytes().into(), true);
            self.is_dirty |= !prepared.as_ref().is_ok_and(|mapping| mapping.is_nonblocking());
            let mapping = prepared?;
            let (layer, at, len) = (mapping.storage(), mapping.offset(), mapping.length());
            let part = take(&mut buffers, len)?;
            layer.expect_room(at, len)?;
            // What fails here gives its new clusters back with the mapping.
            vectored::write_at(&layer.file, &part.slices(memory).map_err(io::Error::other)?, at)?;
            self.access.commit_data_mapping(mapping)?;
            offset += len;
        }
        Ok(())
    }

    fn discard(&mut self, range: &Extent) -> io::Result<()> {
        self.each_part(range, |image, part, what| match what {
            // In an image behind this one, or nowhere.
            Part::NotOurs | Part::Nothing => Ok(()),
            Part::Ours => image.give_back(part).map(|_| ()),
            Part::Zeroes | Part::Special => image.discard_clusters(part),
        })
    }

    fn write_zeroes(&mut self, range: &Extent, unmap: bool) -> io::Result<()> {
        self.each_part(range, |image, part, what| match what {
            Part::Zeroes | Part::Nothing => Ok(()),
            Part::Ours if unmap && image.give_back(part)? => Ok(()),
            _ => {
                image.is_dirty = true;
                image.access.write_zeroes(part.offset, part.len)
            }
        })
    }

    /// Gives back the clusters that lie within a range, and of those that do not, the host's space. False when it does not
    /// read as zeroes afterwards.
    fn give_back(&mut self, part: &Extent) -> io::Result<bool> {
        let (mapping, _) = self.access.get_mapping(part.offset, part.len)?;
        let is_zero = match mapping {
            // Before the clusters are free: one may hold a table afterwards.
            Mapping::Raw { storage, offset, .. } => {
                storage.expect_room(offset, part.len)?;
                allocate(&storage.file, Space::GiveBack, &Extent { offset, len: part.len })?
            }
            _ => false,
        };
        self.discard_clusters(part)?;
        Ok(is_zero)
    }

    fn discard_clusters(&mut self, part: &Extent) -> io::Result<()> {
        self.is_dirty = true;
        self.access.discard_to_any(part.offset, part.len)
    }

    /// Goes through a range in parts that are each of one kind.
    fn each_part(
        &mut self,
        range: &Extent,
        mut each: impl FnMut(&mut Image, &Extent, Part) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut left = *range;
        while left.len > 0 {
            let (mapping, len) = self.access.get_mapping(left.offset, left.len)?;
            let what = match mapping {
                Mapping::Raw { writable: true, .. } => Part::Ours,
                Mapping::Special { .. } => Part::Special,
                Mapping::Zero { explicit: true, .. } => Part::Zeroes,
                Mapping::Zero { .. } => Part::Nothing,
                Mapping::Raw { .. } => Part::NotOurs,
                _ => return Err(io::ErrorKind::UnexpectedEof.into()),
            };
            each(self, &Extent { offset: left.offset, len }, what)?;
            left = Extent { offset: left.offset + len, len: left.len - len };
        }
        Ok(())
    }

    fn settle(&mut self) -> io::Result<()> {
        if self.is_dirty {
            self.access.flush()?;
            self.is_dirty = false;
        }
        Ok(())
    }
}

/// What a part of the disk is, seen from the disk's own image.
#[derive(Clone, Copy)]
enum Part {
    /// Data in it, and in nothing else.
    Ours,
    /// Data that others share: an image behind, or a snapshot.
    NotOurs,
    /// Compressed, here or behind.
    Special,
    Zeroes,
    /// Zeroes, for no image has it.
    Nothing,
}

/// The file of one image, as the library sees it: its reads and writes are of tables, and of what a new cluster takes over
/// from the one before it.
struct Layer {
    file: File,
    /// None is a raw image.
    header: Option<Header>,
    /// The size at the beginning.
    bytes: u64,
    /// The library writes below this.
    limit: u64,
    is_writable: bool,
    helper: CommonStorageHelper,
}

impl Layer {
    fn new(image: Backing, is_writable: bool) -> Result<Layer, Unusable> {
        let Backing { mut file, is_qcow2 } = image;
        // Unlike the metadata's length, this is also right for a block device.
        let bytes = file.seek(SeekFrom::End(0))?;
        let header = is_qcow2.then(|| Header::read(&file, bytes, is_writable)).transpose()?;
        let limit = match header {
            Some(header) if is_writable => header.most_bytes(bytes),
            _ => 0,
        };
        Ok(Layer { file, header, bytes, limit, is_writable, helper: CommonStorageHelper::default() })
    }

    fn metadata_bytes(&self) -> u64 {
        self.header.map_or(0, |header| header.metadata_bytes(self.is_writable))
    }

    fn open(self, behind: Option<FormatAccess<Layer>>, is_writable: bool) -> io::Result<FormatAccess<Layer>> {
        if self.header.is_none() {
            return Ok(FormatAccess::new(Raw::open_image(self, false)?));
        }
        let image = Format::<Layer>::builder(self).write(is_writable).backing(behind).data_file(None);
        Ok(FormatAccess::new(image.open(DenyImplicitOpenGate::default())?))
    }

    /// Fills the buffers; beyond the file's end there are zeroes.
    fn read(&self, memory: &GuestRam, at: u64, buffers: &mut Segments) -> io::Result<()> {
        let slices = buffers.slices(memory).map_err(io::Error::other)?;
        let done = vectored::read_up_to_end(&self.file, &slices, at)?;
        take(buffers, done)?;
        fill_with_zeroes(memory, buffers)
    }

    fn expect_room(&self, at: u64, len: u64) -> io::Result<()> {
        match at.checked_add(len) {
            Some(end) if end <= self.limit => Ok(()),
            _ => Err(io::Error::other("a damaged qcow2 image: it places data where none of it can be")),
        }
    }
}

/// Nothing is opened or named here, and of the disk's own image alone something is written.
impl Storage for Layer {
    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }

    // The trait calls these unsafe for callers that do not keep to an alignment. There is none to keep to.
    unsafe fn pure_readv(&self, buffers: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        for mut buffer in buffers.into_inner() {
            let mut rest: &mut [u8] = &mut buffer;
            while !rest.is_empty() {
                match self.file.read_at(rest, offset) {
                    Ok(0) => {
                        rest.fill(0);
                        break;
                    }
                    Ok(done) => {
                        rest = rest.get_mut(done..).unwrap_or_default();
                        offset += done as u64;
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            offset = offset.saturating_add(rest.len() as u64);
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, buffers: IoVector<'_>, mut offset: u64) -> io::Result<()> {
        self.expect_room(offset, buffers.len())?;
        for buffer in buffers.into_inner() {
            self.file.write_all_at(&buffer, offset)?;
            offset += buffer.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.expect_room(offset, length)?;
        match allocate(&self.file, Space::GiveBack, &Extent { offset, len: length })? {
            true => Ok(()),
            // The library then writes them.
            false => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
}

impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a file that was handed over")
    }
}

/// Cuts off the front of the buffers.
fn take(buffers: &mut Segments, len: u64) -> io::Result<Segments> {
    let len = usize::try_from(len).map_err(io::Error::other)?;
    buffers.take(len).map_err(io::Error::other)
}

fn fill_with_zeroes(memory: &GuestRam, buffers: &mut Segments) -> io::Result<()> {
    const ZEROES: [u8; 4096] = [0; 4096];
    while buffers.bytes() > 0 {
        let piece = ZEROES.get(..ZEROES.len().min(buffers.bytes() as usize)).unwrap_or_default();
        buffers.write(memory, piece).map_err(io::Error::other)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
