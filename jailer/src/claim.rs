//! The claim of a start on the cell of an id: nobody else makes one of this id meanwhile, and what is made can be taken
//! back, by this process or by the next start.
//!
//! A file beside the root, [`MARKER`], is locked as long as a jailer works on the cell, and says what was there before. It
//! says so before anything is made. So no step has an undo of its own: what belongs to a cell and was not there before is
//! the start's. A start that fails takes that back; a start that finds the file and nobody's lock on it does so for a jailer
//! that was killed. When the cell is the VMM's, the file goes: what is there from then on is the caller's to remove.
//!
//! The directories above the id's and the groups above the cell's are shared with other cells and stay.

mod before;

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use self::before::{Before, Stage};
use crate::cgroup;
use crate::dir::{Dir, Owner};
use crate::error::{During, Error, Result};

/// Beside the root while a jailer works on it.
pub const MARKER: &str = ".unfinished";
/// Mode of the directories above the root: the VMM's user comes through to its files.
const PASSAGE: u32 = 0o755;
/// Mode of the root and of the directories in it.
pub const PRIVATE: u32 = 0o700;

/// The directories of a cell below that of its id, parents first.
pub const ROOT: &str = "root";
pub const DEV: &str = "root/dev";
pub const NET: &str = "root/dev/net";
pub const RUN: &str = "root/run";
const DIRECTORIES: [&str; 4] = [ROOT, DEV, NET, RUN];
/// The files in it that have the same name in each cell.
pub const FILES: [&str; 5] =
    ["root/dev/kvm", "root/dev/urandom", "root/dev/userfaultfd", "root/dev/vhost-net", "root/dev/net/tun"];

/// How often a file is locked anew that its last holder has removed in between.
const MAX_TRIES: usize = 64;

/// Of one process and the children it makes.
#[derive(Debug)]
pub struct Claim {
    /// What paths of groups begin at, also when this process has another root.
    host: Dir,
    /// Where the id's directory is.
    cells: Dir,
    id: String,
    directory: Dir,
    /// Locked. Its children have it too, and an exec closes it.
    marker: File,
    program: PathBuf,
    before: Before,
    /// Whether a jailer was killed while it made this cell, and what it left was removed.
    pub has_cleaned: bool,
}

impl Claim {
    /// Claims the cell of this id, and takes back what a jailer left there that was killed.
    ///
    /// # Errors
    /// Another jailer works on it, or the base is none.
    pub fn stake(base: &Path, program: &OsStr, id: &str) -> Result<Claim> {
        let base = open_base(base)?;
        let host = Dir::open(Path::new("/"))?;
        let cells = base.enter_or_make(program, PASSAGE)?;
        let was_there = !cells.make(id, PASSAGE)?;
        let directory = cells.enter(id)?;
        let marker = lock(&directory)?;
        let program = Path::new(ROOT).join(program);
        let left = Before::read(&marker)?;
        let has_cleaned = left.stage > Stage::Nothing;
        let was_there = if has_cleaned { left.has(".") } else { was_there };
        let mut claim =
            Claim { host, cells, id: id.into(), directory, marker, program, before: left, has_cleaned };
        claim.remove()?;
        claim.before = Before::default();
        Before::clear(&claim.marker)?;
        if was_there {
            claim.before.keep(".", claim.directory.owner()?);
        }
        Ok(claim)
    }

    /// Makes the directories of the cell, or takes those that are there, all of them `owner`'s and closed to everyone else.
    /// `groups` are control groups that the start is going to make.
    ///
    /// # Errors
    /// Something is in the way of a directory or a file of the cell.
    pub fn make_directories(&mut self, owner: Owner, groups: Vec<PathBuf>) -> Result<()> {
        for path in DIRECTORIES {
            if let Some(owner) = self.find(path)? {
                self.before.keep(path, owner);
            }
        }
        self.before.groups = groups;
        self.before.write(&self.marker, Stage::Directories)?;
        for path in DIRECTORIES {
            let made = self.in_parent(Path::new(path), |parent, name| parent.enter_or_make(name, PRIVATE))?;
            made.give_to(owner)?;
        }
        // Closed as they are now, nobody else puts a file there between this and what makes the files.
        if let Some(path) = self.files().find_map(|path| self.is_there(&path).transpose()) {
            return Err(self.in_the_way(&path?));
        }
        self.before.write(&self.marker, Stage::Files)
    }

    /// A directory of the cell.
    ///
    /// # Errors
    /// It is not there.
    pub fn directory(&self, path: &str) -> Result<Dir> {
        self.directory.descend(Path::new(path))
    }

    /// The cell is the VMM's: nothing is taken back by the next start.
    ///
    /// # Errors
    /// As unlink(2).
    pub fn release(&self) -> Result<()> {
        self.directory.remove_file(MARKER)
    }

    /// Takes back what was made. No process may be left in the groups but such that have ended.
    ///
    /// # Errors
    /// Something cannot be removed; what comes after it stays too, and the next start tries again.
    pub fn take_back(self) -> Result<()> {
        self.remove()?;
        self.directory.remove_file(MARKER)?;
        match self.before.has(".") {
            true => Ok(()),
            false => self.cells.remove_dir(&self.id),
        }
    }

    fn remove(&self) -> Result<()> {
        if self.before.stage >= Stage::Files {
            self.files().try_for_each(|path| self.remove_file(&path))?;
        }
        if self.before.stage >= Stage::Directories {
            for path in DIRECTORIES.iter().rev() {
                self.restore_directory(path)?;
            }
            self.before.groups.iter().try_for_each(|group| self.remove_group(group))?;
        }
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> Result<()> {
        match self.in_parent(path, |parent, name| parent.remove_file(name)) {
            // Killed before it made the directory, or while it took back.
            Err(error) if error.is_not_found() => Ok(()),
            done => done,
        }
    }

    fn restore_directory(&self, path: &str) -> Result<()> {
        let restored = self.in_parent(Path::new(path), |parent, name| match self.before.owner_of(path) {
            Some(owner) => parent.enter(name)?.give_to(owner),
            None => parent.remove_dir(name),
        });
        match restored {
            Err(error) if error.is_not_found() => Ok(()),
            done => done,
        }
    }

    fn remove_group(&self, group: &Path) -> Result<()> {
        let below = group.strip_prefix("/").unwrap_or(group);
        let (Some(parent), Some(name)) = (below.parent(), below.file_name()) else { return Ok(()) };
        let parent = match self.host.descend(parent) {
            Ok(parent) => parent,
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) => return Err(error),
        };
        cgroup::remove(&parent, name)
    }

    /// What a start makes, without the directories.
    fn files(&self) -> impl Iterator<Item = PathBuf> {
        let mut pid = self.program.clone().into_os_string();
        pid.push(".pid");
        let own = [self.program.clone(), PathBuf::from(pid)];
        own.into_iter().chain(FILES.map(PathBuf::from))
    }

    /// Does something with a path's last name in the directory that the rest leads to.
    fn in_parent<T>(&self, path: &Path, act: impl FnOnce(&Dir, &OsStr) -> Result<T>) -> Result<T> {
        let name = path.file_name().unwrap_or_default();
        match path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            None => act(&self.directory, name),
            Some(parent) => act(&self.directory.descend(parent)?, name),
        }
    }

    /// Who owns a directory, if it is there.
    fn find(&self, path: &str) -> Result<Option<Owner>> {
        match self.directory(path) {
            Ok(directory) => directory.owner().map(Some),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The path again, if something has it.
    fn is_there(&self, path: &Path) -> Result<Option<PathBuf>> {
        let is_there = self.in_parent(path, |parent, name| parent.has(name))?;
        Ok(is_there.then(|| path.to_owned()))
    }

    fn in_the_way(&self, path: &Path) -> Error {
        let there = self.directory.path().join(path);
        let users = self.directory(ROOT).map(|root| processes_in(&root)).unwrap_or_default();
        let cell = self.shown();
        let advice = match users.as_slice() {
            [] => format!("if this cell's VMM has ended, remove it: rm -r --one-file-system {cell}"),
            [first, ..] => format!(
                "process {first} is in the cell; when it has ended, remove it: rm -r --one-file-system {cell}"
            ),
        };
        Error::Refused(format!(
            "{} is there already, and what is there is not touched; {advice}",
            there.display()
        ))
    }

    fn shown(&self) -> String {
        self.directory.path().display().to_string()
    }
}

/// Opens the directory where cells are made.
///
/// # Errors
/// It is not there, or no directory.
pub fn open_base(base: &Path) -> Result<Dir> {
    Dir::open(base).map_err(|error| {
        Error::Refused(format!("--chroot-base-dir: {error}; make it first, as a directory of your own"))
    })
}

/// Opens the marker and locks it, so that it is this process's until its end, or the exec.
///
/// # Errors
/// Another jailer has it, or what is there is no marker.
pub fn lock(directory: &Dir) -> Result<File> {
    for _ in 0..MAX_TRIES {
        let marker = directory.open_own(MARKER)?;
        match flock(&marker, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => break,
            Err(error) => return Err(error).during(|| format!("cannot lock {MARKER}")),
        }
        // Who had it may have removed it before we got the lock; it is then another's that has the name now.
        if marker.metadata().during(|| format!("cannot look at {MARKER}"))?.nlink() > 0 {
            return Ok(marker);
        }
    }
    let cell = directory.path().display();
    Err(Error::Refused(format!("--id: another jailer is at work on {cell}; wait for it, or give another id")))
}

/// The processes whose root this is, as far as we may know. For a message only: they come and go.
pub fn processes_in(root: &Dir) -> Vec<u32> {
    let Ok(own) = rustix::fs::fstat(root) else { return Vec::new() };
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_in = |pid: &u32| {
        std::fs::metadata(format!("/proc/{pid}/root/"))
            .is_ok_and(|seen| seen.dev() == own.st_dev && seen.ino() == own.st_ino)
    };
    pids.filter(is_in).collect()
}

#[cfg(test)]
mod tests;
