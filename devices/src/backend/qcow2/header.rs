//! What is looked at in a qcow2 image before the library may: the header and where its tables are.
//!
//! Does not read data, and repairs nothing. The library trusts more than a file of unknown origin deserves: what it would
//! panic at, allocate for or not notice is refused here. Numbers and names are those of QEMU's specification
//! (`docs/interop/qcow2.txt`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// "QFI\xfb".
const MAGIC: u32 = 0x5146_49fb;
const VERSION: u32 = 3;
/// All fields that version 3 must have.
const HEADER_BYTES: usize = 104;
/// QEMU's own limits: 512 bytes to 2 MiB.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// A reference count has at most 64 bits.
const MAX_REFCOUNT_ORDER: u32 = 6;
/// QEMU writes three; each costs an allocation.
const MAX_EXTENSIONS: usize = 32;
const MAX_BACKING_NAME_BYTES: u32 = 1023;
/// Entries of the L1 table and of the refcount table: QEMU's limit, and the library's.
const MAX_TABLE_ENTRIES: u64 = 4 << 20;
const ENTRY_BYTES: u64 = 8;
/// A kernel's file offsets are signed.
const MAX_SIZE: u64 = i64::MAX as u64;
/// How much of a table is read at a time.
const TABLE_PIECE_BYTES: u64 = 64 << 10;
/// The bits of an L1 entry that are an offset; those of a refcount table's are all but the low nine, which are zero.
const OFFSET_BITS: u64 = 0x00ff_ffff_ffff_fe00;
const REFCOUNT_OFFSET_BITS: u64 = !0x1ff;

/// What the library keeps of each kind of table, in tables of one cluster: constants of its own, which it does not let us
/// choose.
const CACHED_L2_TABLES: u64 = 128;
const CACHED_REFCOUNT_BLOCKS: u64 = 32;

const EXTENSION_END: u32 = 0;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const FEATURE_NAME_BYTES: u32 = 48;

/// Why an image is not used.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    #[error("which is no qcow2 image; leave `format` out for a raw one")]
    NotQcow2,
    #[error(
        "a qcow2 image of version {0}, and only version 3 is supported; `qemu-img amend -o compat=1.1` makes it one"
    )]
    Version(u32),
    #[error(
        "a qcow2 image that was not closed: its reference counts may be wrong; `qemu-img check -r all` puts them right"
    )]
    Dirty,
    #[error("a qcow2 image that is marked as corrupt; see what `qemu-img check` says of it")]
    Corrupt,
    #[error(
        "a qcow2 image whose data is in another file, which is not supported; `qemu-img convert -O qcow2` makes one of both"
    )]
    DataFile,
    #[error(
        "a qcow2 image with a compression other than zlib, which is not supported; `qemu-img convert -O qcow2` makes one \
         without"
    )]
    Compression,
    #[error(
        "a qcow2 image with extended L2 entries, which are not supported; `qemu-img convert -O qcow2 -o extended_l2=off` \
         makes one without"
    )]
    ExtendedL2,
    #[error("a qcow2 image with the unknown features {0:#x}; `qemu-img convert -O qcow2` makes one without")]
    Features(u64),
    #[error(
        "a qcow2 image with bitmaps or other data that each write must keep up to date, which is not supported; \
         `qemu-img bitmap --remove` takes them out, and a read-only drive leaves them as they are"
    )]
    AutoClear,
    #[error(
        "an encrypted qcow2 image, which is not supported; `qemu-img convert -O qcow2` makes one that is not"
    )]
    Encrypted,
    #[error("a damaged qcow2 image: {0}; see what `qemu-img check` says of it")]
    Damaged(&'static str),
    #[error("cannot be read: {0}")]
    Host(#[from] io::Error),
}

/// What matters here of an image that may be given to the library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub size: u64,
    /// It is not complete without another image, whose name in it is not believed.
    pub has_backing: bool,
    cluster_bits: u32,
    l1_entries: u64,
    refcount_entries: u64,
    refcount_order: u32,
}

impl Header {
    /// Reads and checks the header of an image of so many bytes, and that its tables lie within it.
    pub fn read(file: &File, bytes: u64, is_writable: bool) -> Result<Header, Unusable> {
        let mut raw = [0; HEADER_BYTES];
        if bytes < HEADER_BYTES as u64 {
            return Err(Unusable::NotQcow2);
        }
        file.read_exact_at(&mut raw, 0)?;
        let raw = BigEndian(&raw);
        if raw.u32(0) != MAGIC {
            return Err(Unusable::NotQcow2);
        }
        if raw.u32(4) != VERSION {
            return Err(Unusable::Version(raw.u32(4)));
        }
        check_features(raw.u64(72))?;
        // The library would clear these bits, and with them what a backup relies on.
        if raw.u64(88) != 0 && is_writable {
            return Err(Unusable::AutoClear);
        }
        if raw.u32(32) != 0 {
            return Err(Unusable::Encrypted);
        }
        let header = Header {
            size: raw.u64(24),
            has_backing: raw.u64(8) != 0,
            cluster_bits: raw.u32(20),
            l1_entries: raw.u32(36).into(),
            refcount_entries: 0,
            refcount_order: raw.u32(96),
        };
        if !CLUSTER_BITS.contains(&header.cluster_bits) {
            return Err(Unusable::Damaged("its clusters are not of 512 bytes to 2 MiB"));
        }
        if header.refcount_order > MAX_REFCOUNT_ORDER {
            return Err(Unusable::Damaged("its reference counts have more than 64 bits"));
        }
        let refcount_clusters: u64 = raw.u32(56).into();
        let refcount_entries = (refcount_clusters << header.cluster_bits) / ENTRY_BYTES;
        let header = Header { refcount_entries, ..header };
        header.check_first_cluster(file, &raw, bytes)?;
        if header.size > MAX_SIZE || header.l1_entries < header.l1_entries_for_size() {
            return Err(Unusable::Damaged("its L1 table is too short for its size"));
        }
        let l1 = Table { at: raw.u64(40), entries: header.l1_entries, offset_bits: OFFSET_BITS };
        let refcounts =
            Table { at: raw.u64(48), entries: refcount_entries, offset_bits: REFCOUNT_OFFSET_BITS };
        // Clusters that hold a table. The header's is the first.
        let mut taken = vec![0];
        l1.check(file, bytes, header.cluster_bits, "its L1 table", &mut taken)?;
        refcounts.check(file, bytes, header.cluster_bits, "its refcount table", &mut taken)?;
        taken.sort_unstable();
        if taken.iter().zip(taken.iter().skip(1)).any(|(one, next)| one == next) {
            return Err(Unusable::Damaged("two of its tables are in one place"));
        }
        Ok(header)
    }

    /// The size of a cluster.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Most memory that the library takes for the tables of this image.
    pub fn metadata_bytes(&self, is_writable: bool) -> u64 {
        let l2 = self.l1_entries.min(CACHED_L2_TABLES) << self.cluster_bits;
        let l1 = self.l1_entries * ENTRY_BYTES;
        if !is_writable {
            return l1 + l2;
        }
        let refcounts = self.refcount_entries.max(self.refcount_entries_when_full()).min(MAX_TABLE_ENTRIES);
        l1 + l2 + refcounts * ENTRY_BYTES + (CACHED_REFCOUNT_BLOCKS << self.cluster_bits)
    }

    /// What the file may grow to: all of the disk and the tables for it, beside what is in it already. Only a damaged image
    /// would have the library write beyond.
    pub fn most_bytes(&self, bytes: u64) -> u64 {
        let cluster = 1 << self.cluster_bits;
        let tables = (self.l1_entries_for_size() << self.cluster_bits)
            .saturating_add(self.l1_entries_for_size().saturating_mul(ENTRY_BYTES));
        let content = bytes.saturating_add(self.size).saturating_add(tables);
        // A refcount table that has grown, and the one before it.
        let refcounts = (content / self.covered_by_refcount_block())
            .saturating_add(2)
            .saturating_mul(cluster + 2 * ENTRY_BYTES);
        content.saturating_add(refcounts).saturating_add(MARGIN_CLUSTERS * cluster).min(MAX_SIZE)
    }

    fn l1_entries_for_size(&self) -> u64 {
        let covered = 1_u64 << (2 * self.cluster_bits - 3);
        self.size.div_ceil(covered)
    }

    /// How much of the file one block of reference counts is for.
    fn covered_by_refcount_block(&self) -> u64 {
        1 << (2 * self.cluster_bits + 3 - self.refcount_order)
    }

    fn refcount_entries_when_full(&self) -> u64 {
        let full = self.size.saturating_add(self.l1_entries_for_size() << self.cluster_bits);
        full.div_ceil(self.covered_by_refcount_block())
    }

    /// The header's length, its extensions and the name of the backing file, all of which the first cluster holds.
    fn check_first_cluster(&self, file: &File, raw: &BigEndian, bytes: u64) -> Result<(), Unusable> {
        let cluster = 1_u64 << self.cluster_bits;
        let length: u64 = raw.u32(100).into();
        if length < HEADER_BYTES as u64 || length > cluster || !length.is_multiple_of(8) {
            return Err(Unusable::Damaged("its header has a length that none has"));
        }
        let name_end = raw.u64(8).checked_add(raw.u32(16).into());
        if self.has_backing
            && (raw.u32(16) > MAX_BACKING_NAME_BYTES || name_end.is_none_or(|end| end > cluster.min(bytes)))
        {
            return Err(Unusable::Damaged("the name of its backing file is not in its first cluster"));
        }
        let mut at = length;
        for _ in 0..MAX_EXTENSIONS {
            let mut extension = [0; 8];
            if at + 8 > cluster.min(bytes) {
                return Err(Unusable::Damaged("the extensions of its header do not end"));
            }
            file.read_exact_at(&mut extension, at)?;
            let extension = BigEndian(&extension);
            let (kind, length) = (extension.u32(0), extension.u32(4));
            if kind == EXTENSION_END {
                return Ok(());
            }
            if kind == EXTENSION_FEATURE_NAMES && !length.is_multiple_of(FEATURE_NAME_BYTES) {
                return Err(Unusable::Damaged("a name in its list of features is cut off"));
            }
            at += 8 + u64::from(length).next_multiple_of(8);
        }
        Err(Unusable::Damaged("its header has too many extensions"))
    }
}

/// Beside what is counted: the library may move a table once more than it must.
const MARGIN_CLUSTERS: u64 = 64;

fn check_features(incompatible: u64) -> Result<(), Unusable> {
    match incompatible {
        0 => Ok(()),
        bits if bits & 1 << 0 != 0 => Err(Unusable::Dirty),
        bits if bits & 1 << 1 != 0 => Err(Unusable::Corrupt),
        bits if bits & 1 << 2 != 0 => Err(Unusable::DataFile),
        bits if bits & 1 << 3 != 0 => Err(Unusable::Compression),
        bits if bits & 1 << 4 != 0 => Err(Unusable::ExtendedL2),
        bits => Err(Unusable::Features(bits)),
    }
}

/// A table of offsets of clusters.
struct Table {
    at: u64,
    entries: u64,
    offset_bits: u64,
}

impl Table {
    /// That it and what it names lies within a file of so many bytes, and not in its first cluster; adds them to `taken`.
    fn check(
        &self,
        file: &File,
        bytes: u64,
        cluster_bits: u32,
        name: &'static str,
        taken: &mut Vec<u64>,
    ) -> Result<(), Unusable> {
        let cluster = 1 << cluster_bits;
        let damaged = || Unusable::Damaged(name);
        if self.entries == 0 {
            return Ok(());
        }
        let end = self.at.checked_add(self.entries * ENTRY_BYTES).ok_or_else(damaged)?;
        // The file may end in the middle of a cluster.
        let last = bytes.checked_next_multiple_of(cluster).ok_or_else(damaged)?;
        if self.entries > MAX_TABLE_ENTRIES
            || self.at < cluster
            || !self.at.is_multiple_of(cluster)
            || end > last
        {
            return Err(damaged());
        }
        taken.extend(self.at >> cluster_bits..end.div_ceil(cluster));
        let mut piece = vec![0; TABLE_PIECE_BYTES.min(self.entries * ENTRY_BYTES) as usize];
        let mut at = self.at;
        while at < end.min(bytes) {
            let len = (end.min(bytes) - at).min(piece.len() as u64);
            let part = piece.get_mut(..len as usize).unwrap_or_default();
            file.read_exact_at(part, at)?;
            for entry in part.chunks_exact(ENTRY_BYTES as usize) {
                let offset = BigEndian(entry).u64(0) & self.offset_bits;
                if offset == 0 {
                    continue;
                }
                if offset < cluster || offset >= last || !offset.is_multiple_of(cluster) {
                    return Err(damaged());
                }
                taken.push(offset >> cluster_bits);
            }
            at += len;
        }
        Ok(())
    }
}

/// Big-endian numbers in bytes; zero beyond them.
struct BigEndian<'a>(&'a [u8]);

impl BigEndian<'_> {
    fn u32(&self, at: usize) -> u32 {
        self.0.get(at..).and_then(<[u8]>::first_chunk).copied().map_or(0, u32::from_be_bytes)
    }

    fn u64(&self, at: usize) -> u64 {
        self.0.get(at..).and_then(<[u8]>::first_chunk).copied().map_or(0, u64::from_be_bytes)
    }
}
