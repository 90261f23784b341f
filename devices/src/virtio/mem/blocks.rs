//! Which blocks of a region are plugged: a bit for each.

use std::ops::Range;

const WORD: usize = u64::BITS as usize;

/// The blocks of a region, and how many of them are plugged.
pub struct Blocks {
    words: Vec<u64>,
    len: usize,
    plugged: usize,
}

/// What several blocks are together, as STATE tells it (5.15.6.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mix {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

impl Blocks {
    /// So many blocks, none of them plugged.
    pub fn new(len: usize) -> Blocks {
        Blocks { words: vec![0; len.div_ceil(WORD)], len, plugged: 0 }
    }

    /// With what [`Blocks::bits`] gave; `None` when these are not as many.
    pub fn restore(words: Vec<u64>, len: usize) -> Option<Blocks> {
        let mut blocks = Blocks { words, ..Blocks::new(len) };
        let plugged = blocks.words.iter().map(|word| word.count_ones() as usize).sum();
        let fits = blocks.words.len() == len.div_ceil(WORD) && blocks.count(0..len) == plugged;
        blocks.plugged = plugged;
        fits.then_some(blocks)
    }

    pub fn bits(&self) -> &[u64] {
        &self.words
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// How many are plugged of all.
    pub fn plugged(&self) -> usize {
        self.plugged
    }

    /// How many are plugged of these; those that do not exist are not.
    pub fn count(&self, blocks: Range<usize>) -> usize {
        let masked = masks(blocks).filter_map(|(word, mask)| Some(self.words.get(word)? & mask));
        masked.map(|word| word.count_ones() as usize).sum()
    }

    pub fn mix(&self, blocks: Range<usize>) -> Mix {
        match self.count(blocks.clone()) {
            0 => Mix::Unplugged,
            count if count == blocks.len() => Mix::Plugged,
            _ => Mix::Mixed,
        }
    }

    pub fn set(&mut self, blocks: Range<usize>, plugged: bool) {
        for (word, mask) in masks(blocks.start..blocks.end.min(self.len)) {
            if let Some(word) = self.words.get_mut(word) {
                self.plugged -= (*word & mask).count_ones() as usize;
                *word = if plugged { *word | mask } else { *word & !mask };
                self.plugged += (*word & mask).count_ones() as usize;
            }
        }
    }
}

/// The words that these bits are in, and which bits of each.
fn masks(bits: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    (bits.start / WORD..bits.end.div_ceil(WORD)).filter_map(move |word| {
        let first = bits.start.saturating_sub(word * WORD);
        let end = (bits.end - word * WORD).min(WORD);
        let below = |bit: usize| u64::MAX.checked_shr((WORD - bit) as u32).unwrap_or(0);
        (first < end).then(|| (word, below(end) & !below(first)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_range_of_blocks_is_set_counted_and_cleared_by_itself() {
        const LEN: usize = 200;
        for start in (0..LEN).step_by(7).chain([63, 64, 127, 128]) {
            for end in (start..=LEN).step_by(13).chain([64, 128, LEN]).filter(|end| *end >= start) {
                let mut blocks = Blocks::new(LEN);
                blocks.set(start..end, true);
                blocks.set(start..end, true);
                assert_eq!(blocks.plugged(), end - start);
                for block in 0..LEN {
                    let is_in = (start..end).contains(&block);
                    assert_eq!(blocks.count(block..block + 1), usize::from(is_in), "{start}..{end} {block}");
                }
                blocks.set(start..end, false);
                assert_eq!((blocks.plugged(), blocks.count(0..LEN)), (0, 0));
            }
        }
    }

    #[test]
    fn several_blocks_are_plugged_unplugged_or_mixed() {
        let mut blocks = Blocks::new(100);
        blocks.set(60..70, true);
        assert_eq!(blocks.mix(60..70), Mix::Plugged);
        assert_eq!(blocks.mix(50..60), Mix::Unplugged);
        assert_eq!(blocks.mix(70..100), Mix::Unplugged);
        assert_eq!(blocks.mix(59..61), Mix::Mixed);
        assert_eq!(blocks.mix(0..100), Mix::Mixed);
    }

    #[test]
    fn only_as_many_bits_as_there_are_blocks_are_restored() {
        let mut blocks = Blocks::new(70);
        blocks.set(0..70, true);
        let restored = Blocks::restore(blocks.bits().to_vec(), 70).unwrap();
        assert_eq!((restored.plugged(), restored.len()), (70, 70));
        for (words, len) in [(vec![0], 70), (vec![0; 3], 70), (vec![0, 1 << 6], 70), (vec![1], 0)] {
            assert!(Blocks::restore(words, len).is_none());
        }
    }
}
