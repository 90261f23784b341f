//! Looking at an archive that goes by, whether it is whole: one that could not be finished has an entry that says why, and
//! one that was cut off has no end.

use agent::files::BROKEN;
use agent::files::entries::{Entries, Piece};

/// How much of the reason is kept.
const MAX_REASON: usize = 4096;

/// What has been seen of an archive.
#[derive(Default)]
pub struct Watch {
    entries: Entries,
    /// Bytes of a reason that are still to come.
    telling: u64,
    reason: Option<Vec<u8>>,
}

impl Watch {
    pub fn see(&mut self, mut bytes: &[u8]) {
        while let Some(piece) = self.entries.next(&mut bytes) {
            match piece {
                Piece::Entry { kind: BROKEN, size } => {
                    self.reason = Some(Vec::new());
                    self.telling = size;
                }
                Piece::Entry { .. } => {}
                Piece::Contents(bytes) => self.hear(bytes),
            }
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
            None if self.entries.is_over() => Ok(()),
            None => Err("the archive is cut off: the connection ended early".into()),
        }
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
        let _ = agent::files::pack(of, Path::new("copy"), agent::files::Owners::Own, &mut bytes);
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
}
