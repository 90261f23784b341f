//! What the guest says of its memory (VIRTIO 1.3, section 5.5.6.4): numbers with tags, in one buffer.
//!
//! Nothing here is true because it is said; it is for people and for programs that know that.

use crate::memory::GuestRam;
use crate::virtio::queue::{QueueError, Segments};

/// How many tags there are.
pub const TAGS: usize = 16;
/// Most numbers that are read of one buffer; each tag is told once.
pub const MAX_STATISTICS: usize = 64;
/// A tag of two bytes and a number of eight.
const BYTES: usize = 10;

/// The guest's numbers by their tag; what it has never said is `None`. Names are those of the tags (5.5.6.4), the last six
/// those of Linux, which are younger than the specification.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics([Option<u64>; TAGS]);

impl Statistics {
    pub const SWAP_IN: usize = 0;
    pub const SWAP_OUT: usize = 1;
    pub const MAJOR_FAULTS: usize = 2;
    pub const MINOR_FAULTS: usize = 3;
    pub const FREE: usize = 4;
    pub const TOTAL: usize = 5;
    pub const AVAILABLE: usize = 6;
    pub const CACHES: usize = 7;
    pub const HUGETLB_ALLOCATIONS: usize = 8;
    pub const HUGETLB_FAILURES: usize = 9;
    pub const OOM_KILL: usize = 10;
    pub const ALLOC_STALL: usize = 11;
    pub const ASYNC_SCAN: usize = 12;
    pub const DIRECT_SCAN: usize = 13;
    pub const ASYNC_RECLAIM: usize = 14;
    pub const DIRECT_RECLAIM: usize = 15;

    /// The number with this tag.
    pub fn get(&self, tag: usize) -> Option<u64> {
        self.0.get(tag).copied().flatten()
    }

    /// Takes what is in a buffer over. Tags that are not known are passed over; those that are not there keep their number.
    /// False for a buffer whose size is none of a list, or too large: then what could be read was taken all the same.
    pub(super) fn read(&mut self, memory: &GuestRam, buffer: &mut Segments) -> Result<bool, QueueError> {
        let bytes = buffer.bytes() as usize;
        let mut entries = vec![[0; BYTES]; (bytes / BYTES).min(MAX_STATISTICS)];
        buffer.read(memory, entries.as_flattened_mut())?;
        for [tag_low, tag_high, number @ ..] in entries {
            let tag = u16::from_le_bytes([tag_low, tag_high]);
            if let Some(place) = self.0.get_mut(usize::from(tag)) {
                *place = Some(u64::from_le_bytes(number));
            }
        }
        Ok(bytes > 0 && bytes.is_multiple_of(BYTES) && bytes / BYTES <= MAX_STATISTICS)
    }
}
