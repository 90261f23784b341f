//! The entries of an archive as it goes by: where each begins, what kind it is, how long. Nothing is kept of what is in them.

use tar::Header;

/// What an archive is made of.
const BLOCK: usize = 512;

/// Looks at an archive in pieces of any size.
#[derive(Debug, Default)]
pub struct Entries {
    /// Of the header that is coming.
    header: Vec<u8>,
    /// Bytes of an entry before the next header.
    left: u64,
    is_over: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// The header of an entry. Its contents follow.
    Entry { kind: u8, size: u64 },
    /// Contents, and what fills them up to whole blocks.
    Contents(&'a [u8]),
}

impl Entries {
    /// What comes next of these bytes, and leaves the rest of them. None when there is no more to say of them.
    pub fn next<'a>(&mut self, bytes: &mut &'a [u8]) -> Option<Piece<'a>> {
        while !bytes.is_empty() && !self.is_over {
            if self.left > 0 {
                let count = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
                let (contents, rest) = bytes.split_at(count);
                *bytes = rest;
                self.left -= count as u64;
                return Some(Piece::Contents(contents));
            }
            let (begin, rest) = bytes.split_at((BLOCK - self.header.len()).min(bytes.len()));
            self.header.extend_from_slice(begin);
            *bytes = rest;
            if self.header.len() == BLOCK {
                let header = std::mem::take(&mut self.header);
                if header.iter().any(|byte| *byte != 0) {
                    return Some(self.enter(&header));
                }
                self.is_over = true;
            }
        }
        None
    }

    fn enter(&mut self, header: &[u8]) -> Piece<'static> {
        // Read by who unpacks it, so that both find the next header at the same place. That one fails where no size is.
        let header = Header::from_byte_slice(header);
        let size = header.entry_size().unwrap_or(0);
        self.left = size.div_ceil(BLOCK as u64).saturating_mul(BLOCK as u64);
        Piece::Entry { kind: header.entry_type().as_byte(), size }
    }

    /// The archive has said that it ends.
    pub fn is_over(&self) -> bool {
        self.is_over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_found_however_they_come() {
        let mut archive = tar::Builder::new(Vec::new());
        for (name, length) in [("empty", 0), ("small", 5), ("block", 512), ("large", 2000)] {
            let mut header = Header::new_gnu();
            header.set_size(length);
            archive.append_data(&mut header, name, &vec![1; length as usize][..]).unwrap();
        }
        let archive = archive.into_inner().unwrap();
        for cut in [1, 511, 512, 513, 100_000] {
            let (mut entries, mut sizes, mut contents) = (Entries::default(), Vec::new(), 0);
            for mut bytes in archive.chunks(cut) {
                while let Some(piece) = entries.next(&mut bytes) {
                    match piece {
                        Piece::Entry { kind, size } => sizes.push((kind, size)),
                        Piece::Contents(bytes) => contents += bytes.len(),
                    }
                }
            }
            assert_eq!(sizes, [(b'0', 0), (b'0', 5), (b'0', 512), (b'0', 2000)], "{cut}");
            assert_eq!((contents, entries.is_over()), (512 * 6, true), "{cut}");
        }
    }

    #[test]
    fn sizes_are_octal_or_large() {
        let mut header = Header::new_gnu();
        header.set_size((2 << 32) + 1);
        let mut entries = Entries::default();
        let mut bytes = &header.as_bytes()[..];
        assert_eq!(entries.next(&mut bytes), Some(Piece::Entry { kind: b'0', size: (2 << 32) + 1 }));
    }
}
