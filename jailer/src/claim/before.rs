//! What was there before a start made anything, as the marker keeps it: lines of text, the last of which says how far the
//! start may have come.
//!
//! ```text
//! had . 0 0 755
//! had root 1000 1000 700
//! group /sys/fs/cgroup/berth-vmm/vm-1
//! directories
//! files
//! ```

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Uid};

use crate::dir::Owner;
use crate::error::{During, Result};

/// The longest marker that is read, in bytes. One has a few lines.
const MAX_MARKER: u64 = 64 << 10;

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Before {
    /// Directories, with whose they were.
    had: Vec<(PathBuf, Owner)>,
    /// Control groups that were not there, by path in the host.
    pub groups: Vec<PathBuf>,
    pub stage: Stage,
}

/// What may have been made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    #[default]
    Nothing,
    /// And groups.
    Directories,
    /// And directories, and groups.
    Files,
}

impl Before {
    /// Reads what a jailer left. What it did not write to its end tells that nothing was made.
    ///
    /// # Errors
    /// As read(2).
    pub fn read(mut marker: &File) -> Result<Before> {
        let mut bytes = Vec::new();
        marker
            .by_ref()
            .take(MAX_MARKER)
            .read_to_end(&mut bytes)
            .during(|| "cannot read the marker".into())?;
        Ok(Before::parse(&bytes))
    }

    /// Writes this over what the marker says, with a stage to begin.
    ///
    /// # Errors
    /// As write(2).
    pub fn write(&mut self, marker: &File, stage: Stage) -> Result<()> {
        self.stage = stage;
        let text = self.text();
        // The first time it is empty, and a later stage only adds a line: at no time it says less than what is true.
        marker.write_all_at(&text, 0).during(|| "cannot write the marker".into())
    }

    /// Lets the marker say that nothing was made.
    ///
    /// # Errors
    /// As ftruncate(2).
    pub fn clear(marker: &File) -> Result<()> {
        marker.set_len(0).during(|| "cannot write the marker".into())
    }

    pub fn keep(&mut self, path: &str, owner: Owner) {
        self.had.push((path.into(), owner));
    }

    pub fn has(&self, path: &str) -> bool {
        self.owner_of(path).is_some()
    }

    pub fn owner_of(&self, path: &str) -> Option<Owner> {
        self.had.iter().find(|(had, _)| had == Path::new(path)).map(|(_, owner)| *owner)
    }

    fn text(&self) -> Vec<u8> {
        let mut text = Vec::new();
        for (path, Owner { uid, gid, mode }) in &self.had {
            let (path, uid, gid) = (path.display(), uid.as_raw(), gid.as_raw());
            text.extend(format!("had {path} {uid} {gid} {mode:o}\n").bytes());
        }
        for group in &self.groups {
            text.extend([b"group ", group.as_os_str().as_bytes(), b"\n"].concat());
        }
        if self.stage >= Stage::Directories {
            text.extend(b"directories\n");
        }
        if self.stage >= Stage::Files {
            text.extend(b"files\n");
        }
        text
    }

    fn parse(text: &[u8]) -> Before {
        let mut before = Before::default();
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            let Some(line) = line.strip_suffix(b"\n") else { break };
            match line {
                b"directories" => before.stage = Stage::Directories,
                b"files" => before.stage = Stage::Files,
                line => before.parse_line(line),
            }
        }
        before
    }

    fn parse_line(&mut self, line: &[u8]) {
        if let Some(group) = line.strip_prefix(b"group ") {
            self.groups.push(std::ffi::OsString::from_vec(group.to_vec()).into());
        }
        if let Some((path, owner)) = line.strip_prefix(b"had ").and_then(had) {
            self.had.push((path, owner));
        }
    }
}

fn had(line: &[u8]) -> Option<(PathBuf, Owner)> {
    let mut words = line.split(|byte| *byte == b' ');
    let path = PathBuf::from(OsStr::from_bytes(words.next()?));
    let mut number = |radix| u32::from_str_radix(std::str::from_utf8(words.next()?).ok()?, radix).ok();
    let (uid, gid, mode) = (number(10)?, number(10)?, number(8)?);
    // The largest numbers are no users.
    let is_user = uid != u32::MAX && gid != u32::MAX && mode <= 0o7777;
    is_user.then(|| (path, Owner { uid: Uid::from_raw(uid), gid: Gid::from_raw(gid), mode }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(uid: u32, mode: u32) -> Owner {
        Owner { uid: Uid::from_raw(uid), gid: Gid::from_raw(7), mode }
    }

    #[test]
    fn what_is_written_is_read_at_every_stage() {
        let marker = tempfile::tempfile().unwrap();
        let mut before = Before::default();
        before.keep(".", owner(0, 0o755));
        before.keep("root", owner(1000, 0o1700));
        before.groups = vec!["/sys/fs/cgroup/a b/vm".into()];
        for stage in [Stage::Directories, Stage::Files] {
            before.write(&marker, stage).unwrap();
            std::io::Seek::rewind(&mut &marker).unwrap();
            assert_eq!(Before::read(&marker).unwrap(), before);
        }
        assert!(before.has("root") && !before.has("root/dev"));
        assert_eq!(before.owner_of("root"), Some(owner(1000, 0o1700)));
    }

    #[test]
    fn a_marker_that_was_not_finished_or_is_none_says_that_nothing_was_made() {
        for text in ["", "had . 0 0 755\ngroup /a\n", "had . 0 0 755\ndirectories", "\0\n\u{fffd}\n"] {
            assert_eq!(Before::parse(text.as_bytes()).stage, Stage::Nothing, "{text}");
        }
    }

    #[test]
    fn a_line_that_makes_no_sense_keeps_nothing() {
        for line in [
            "had root",
            "had root 0 0",
            "had root x 0 700",
            "had root 4294967295 0 700",
            "had root 0 0 17777",
        ] {
            let before = Before::parse(format!("{line}\nfiles\n").as_bytes());
            assert_eq!((before.had.len(), before.stage), (0, Stage::Files), "{line}");
        }
    }
}
