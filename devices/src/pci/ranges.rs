//! Who has which addresses of a window. First fit, since windows are wide and functions few.

use std::collections::BTreeMap;
use std::ops::Range;

/// A window of addresses, parts of which are taken.
#[derive(Debug)]
pub struct Ranges {
    window: Range<u64>,
    /// Length by start.
    taken: BTreeMap<u64, u64>,
}

impl Ranges {
    pub fn new(window: Range<u64>) -> Self {
        Self { window, taken: BTreeMap::new() }
    }

    /// All addresses, taken or not.
    pub fn window(&self) -> Range<u64> {
        self.window.clone()
    }

    /// Takes `size` addresses at a multiple of `size`, which is a power of two. `None` where there are none left.
    pub fn allocate(&mut self, size: u64) -> Option<u64> {
        let mut start = self.window.start.checked_next_multiple_of(size)?;
        for (&taken, &len) in &self.taken {
            if taken.checked_sub(start).is_some_and(|gap| gap >= size) {
                break;
            }
            start = taken.checked_add(len)?.checked_next_multiple_of(size)?;
        }
        self.reserve(start, size).then_some(start)
    }

    /// Takes these addresses. False, and nothing taken, when they are outside of the window or not all free.
    pub fn reserve(&mut self, start: u64, size: u64) -> bool {
        let Some(end) = start.checked_add(size) else { return false };
        let inside = size > 0 && self.window.start <= start && end <= self.window.end;
        let below = self.taken.range(..end).next_back();
        let free = below.is_none_or(|(taken, len)| taken + len <= start);
        if inside && free {
            self.taken.insert(start, size);
        }
        inside && free
    }

    /// Gives back what was taken at `start`.
    pub fn free(&mut self, start: u64) {
        self.taken.remove(&start);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_are_aligned_and_taken_again_when_freed() {
        let mut ranges = Ranges::new(0x1800..0x8000);
        assert_eq!(ranges.allocate(0x1000), Some(0x2000));
        assert_eq!(ranges.allocate(0x4000), Some(0x4000));
        assert_eq!(ranges.allocate(0x1000), Some(0x3000));
        assert_eq!(ranges.allocate(0x1000), None);
        assert_eq!(ranges.allocate(0x800), Some(0x1800));
        ranges.free(0x4000);
        assert_eq!(ranges.allocate(0x2000), Some(0x4000));
    }

    #[test]
    fn only_free_addresses_in_the_window_can_be_reserved() {
        let mut ranges = Ranges::new(0x1000..0x8000);
        assert!(ranges.reserve(0x2000, 0x1000));
        for (start, size) in
            [(0x2000, 1), (0x1fff, 2), (0x2fff, 1), (0xfff, 1), (0x8000, 1), (u64::MAX, 2), (0x4000, 0)]
        {
            assert!(!ranges.reserve(start, size), "{start:#x}+{size:#x}");
        }
        assert_eq!(ranges.allocate(0x2000), Some(0x4000), "around what is reserved");
    }

    proptest! {
        #[test]
        fn nothing_is_given_out_twice(sizes in prop::collection::vec(0u32..12, 1..40), start in 0u64..0x3000) {
            let mut ranges = Ranges::new(start..start + 0x4000);
            let mut given: Vec<Range<u64>> = Vec::new();
            for size in sizes.into_iter().map(|bits| 1u64 << bits) {
                let Some(at) = ranges.allocate(size) else { continue };
                prop_assert_eq!(at % size, 0);
                prop_assert!(at >= start && at + size <= start + 0x4000);
                prop_assert!(given.iter().all(|other| other.end <= at || at + size <= other.start));
                given.push(at..at + size);
            }
        }
    }
}
