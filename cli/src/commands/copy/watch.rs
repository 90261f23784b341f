//! Looking at an archive that goes by, whether it is whole: one that could not be finished has an entry that says why, and
//! one that was cut off has no end. Pure; ustar's header is in POSIX, pax.

/// A block of an archive, and where in a header there is what is looked at.
const BLOCK: usize = 512;
const SIZE: std::ops::Range<usize> = 124..136;
const KIND: usize = 156;
/// The agent's entry that says why.
const BROKEN: u8 = b'E';
/// How much of the reason is kept.
const MAX_REASON: usize = 4096;

/// What has been seen of an archive.
#[derive(Default)]
pub struct Watch {
    /// Of the header that is coming.
    header: Vec<u8>,
    /// Bytes of an entry before the next header.
    left: u64,
    /// Of these, bytes of a reason.
    telling: u64,
    reason: Option<Vec<u8>>,
    is_over: bool,
}

impl Watch {
    pub fn see(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.is_over {
            if self.left > 0 {
                let count = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
                let (seen, rest) = bytes.split_at(count);
                self.hear(seen);
                self.left -= count as u64;
                bytes = rest;
                continue;
            }
            let (seen, rest) = bytes.split_at((BLOCK - self.header.len()).min(bytes.len()));
            self.header.extend_from_slice(seen);
            bytes = rest;
            if self.header.len() == BLOCK {
                let header = std::mem::take(&mut self.header);
                self.enter(&header);
            }
        }
    }

    fn enter(&mut self, header: &[u8]) {
        if header.iter().all(|byte| *byte == 0) {
            self.is_over = true;
            return;
        }
        let size = size(header.get(SIZE).unwrap_or_default());
        self.left = size.div_ceil(BLOCK as u64).saturating_mul(BLOCK as u64);
        if header.get(KIND) == Some(&BROKEN) {
            self.reason = Some(Vec::new());
            self.telling = size;
        }
    }

    fn hear(&mut self, bytes: &[u8]) {
        let Some(reason) = &mut self.reason else { return };
        let count = usize::try_from(self.telling).unwrap_or(usize::MAX).min(bytes.len());
        self.telling -= count as u64;
        let room = MAX_REASON.saturating_sub(reason.len());
        reason.extend_from_slice(bytes.get(..count.min(room)).unwrap_or_default());
    }

    /// When nothing more comes.
    ///
    /// # Errors
    /// Why it is not whole.
    pub fn verdict(self) -> Result<(), String> {
        match self.reason {
            Some(reason) => Err(String::from_utf8_lossy(&reason).into_owned()),
            None if self.is_over => Ok(()),
            None => Err("the archive is cut off: the connection ended early".into()),
        }
    }
}

/// Octal digits, or where those do not do, a big-endian number behind a byte that says so.
fn size(field: &[u8]) -> u64 {
    match field {
        [128..=255, .., a, b, c, d, e, f, g, h] => u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]),
        digits => digits
            .iter()
            .filter(|byte| (b'0'..=b'7').contains(byte))
            .fold(0, |sum: u64, byte| sum.saturating_mul(8).saturating_add(u64::from(byte - b'0'))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    /// An archive of some files, or of what cannot be packed.
    fn archive(of: &Path) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = agent::files::pack(of, Path::new("copy"), &mut bytes);
        bytes
    }

    fn verdict(bytes: &[u8], cut: usize) -> Result<(), String> {
        let mut watch = Watch::default();
        bytes.chunks(cut).for_each(|chunk| watch.see(chunk));
        watch.verdict()
    }

    #[test]
    fn a_whole_archive_is_whole_however_it_comes_and_one_that_is_cut_is_not() {
        let directory = tempfile::tempdir().unwrap();
        for (name, length) in [("empty", 0), ("small", 5), ("block", 512), ("large", 100_000)] {
            fs::write(directory.path().join(name), vec![b'E'; length]).unwrap();
        }
        fs::write(directory.path().join("x".repeat(200)), "a long name").unwrap();
        let bytes = archive(directory.path());
        for cut in [1, 511, 512, 513, 65_536] {
            assert_eq!(verdict(&bytes, cut), Ok(()), "{cut}");
        }
        for length in [0, 1, 512, 700, bytes.len() - 1024] {
            assert!(verdict(&bytes[..length], 512).unwrap_err().contains("cut off"), "{length}");
        }
    }

    #[test]
    fn an_archive_that_could_not_be_finished_says_why() {
        let bytes = archive(Path::new("/nowhere/at/all"));
        for cut in [1, 512, 4096] {
            let why = verdict(&bytes, cut).unwrap_err();
            assert!(why.contains("/nowhere/at/all: No such file"), "{why}");
        }
    }

    #[test]
    fn sizes_are_octal_or_large() {
        assert_eq!(size(b"00000000017\0"), 15);
        assert_eq!(size(b"         17 "), 15);
        assert_eq!(size(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1]), (2 << 32) + 1);
        assert_eq!(size(b""), 0);
    }
}
