//! Files and directories as an archive (tar), for both ends of a connection: what one packs the other unpacks.
//!
//! Regular files, directories and symbolic links, with modes, owners and times. A hard link becomes a file of its own, and holes
//! become zeros; devices, sockets and named pipes are left out, and so are extended attributes. Whatever an archive says, nothing
//! is written outside of the directory that it is unpacked into.
//!
//! What is gone before it could be read is passed over. An archive in which something is missing or not as it should be ends
//! with an entry that says so; one that was cut off is told from a whole one.

pub mod entries;
mod sieve;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::error::Error;
use std::ffi::OsString;
use std::fs::{self, File, Metadata, ReadDir};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, Timespec, Timestamps};
use tar::{Archive, Builder, Entry, EntryType, Header};
use thiserror::Error;

use sieve::Sieve;

/// Directories of one archive that are kept in mind until the end, when they get their modes: about 1 KiB each.
pub const MAX_DIRECTORIES: usize = 1 << 16;

/// And their names, in bytes.
const MAX_DIRECTORY_NAMES: usize = 16 << 20;

/// The modes of plain files: without those that change who runs them.
const PLAIN: u32 = 0o777;

/// The umask of who does not say it, and the mode of a directory of which nothing is said.
const USUAL_UMASK: u32 = 0o022;
const USUAL_MODE: u32 = 0o755;

/// Directories in each other that are packed; each is open meanwhile.
const MAX_DEPTH: usize = 256;

/// Files that say they are so short are read before they are sent, as those of /proc and /sys are longer or shorter.
const SHORT: u64 = 64 << 10;

/// What is read of one that says it is short.
const MAX_SHORT: u64 = 16 << 20;

/// How much of what went wrong on the other side is shown.
const MAX_REASON: u64 = 4096;

/// The kind of the entry that says why an archive ends early. POSIX leaves the capital letters to everybody's own use.
pub const BROKEN: u8 = b'E';

#[derive(Debug, Error)]
pub enum FilesError {
    #[error("cannot {doing} {path}: {error}")]
    At { doing: &'static str, path: String, error: io::Error },
    #[error("{name:?} is no name for what is in an archive: it must be a relative path without `..`")]
    Name { name: String },
    #[error("{path} is a device, pipe or socket and cannot be copied")]
    Other { path: String },
    #[error("{path} is more than {MAX_DEPTH} directories deep, and what is in it is left out")]
    Deep { path: String },
    #[error("{path} says that it is short and goes on for more than {MAX_SHORT} bytes")]
    Endless { path: String },
    /// What is not in an archive as it should be.
    #[error("{0}")]
    Partly(String),
    #[error("cannot unpack into {into}: {why}")]
    Unpack { into: String, why: String },
    #[error("the archive names {path:?}, which is not below the directory that it is unpacked into")]
    Outside { path: String },
    #[error("the archive has {path:?}, which is neither a file nor a directory nor a symbolic link")]
    Kind { path: String },
    #[error(
        "the archive has more than {MAX_DIRECTORIES} directories, or their names are too long; copy it in parts"
    )]
    Directories,
    /// What the other side said.
    #[error("{0}")]
    Broken(String),
    #[error("the archive is cut off: the connection ended early")]
    Cut,
    #[error("the connection: {0}")]
    Connection(io::Error),
}

/// Whose the files of an archive are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owners {
    /// Those that the files have, by number. To unpack them so takes root.
    Kept,
    /// Who unpacks, and modes are those of plain files that this one would make. The archive is an enemy's: nothing in it is
    /// kept in memory in an amount that it says, and what [`pack`] does not write is refused.
    Own,
}

/// The name that a packed path gets when nobody says another: its last component, or `root`.
pub fn name_of(path: &Path) -> OsString {
    path.file_name().map_or_else(|| "root".into(), OsString::from)
}

/// A name for [`pack`] is a relative path that leads down.
pub fn check_name(name: &Path) -> Result<(), FilesError> {
    let mut parts = name.components().peekable();
    match parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_))) {
        true => Ok(()),
        false => Err(FilesError::Name { name: name.display().to_string() }),
    }
}

/// Packs the file or directory at `path`, as entries of and below `name`. A symbolic link is packed as one. When something
/// cannot be read the archive says so, and so does the error; if that is not `path` itself, the rest is packed all the same.
/// Without their owners files are root's, who unpacks them in a guest.
pub fn pack(path: &Path, name: &Path, owners: Owners, to: impl Write) -> Result<(), FilesError> {
    let mut packing = Packing { archive: Builder::new(to), owners, first_wrong: None, wrong: 0 };
    let packed = packing.all(path, name).and_then(|()| packing.verdict());
    let mut archive = packing.archive;
    if let Err(error) = &packed {
        let reason = error.to_string();
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::new(BROKEN));
        header.set_size(reason.len() as u64);
        header.set_cksum();
        archive.append(&header, reason.as_bytes()).map_err(FilesError::Connection)?;
    }
    archive.into_inner().and_then(|mut to| to.flush()).map_err(FilesError::Connection)?;
    packed
}

struct Packing<W: Write> {
    archive: Builder<W>,
    owners: Owners,
    /// What could not be packed as it should be: the first, and how many.
    first_wrong: Option<FilesError>,
    wrong: usize,
}

impl<W: Write> Packing<W> {
    fn all(&mut self, path: &Path, name: &Path) -> Result<(), FilesError> {
        check_name(name)?;
        let metadata = fs::symlink_metadata(path).map_err(at("read", path))?;
        if !metadata.is_file() && !metadata.is_dir() && !metadata.is_symlink() {
            return Err(FilesError::Other { path: path.display().to_string() });
        }
        // The directories that are being read, each in the one before it, with their names in the archive.
        let mut open = Vec::new();
        open.extend(self.add(path, name)?.map(|entries| (entries, name.to_owned())));
        while let Some((entries, name)) = open.last_mut() {
            let Some(entry) = entries.next() else {
                open.pop();
                continue;
            };
            let (path, name) = match entry {
                Ok(entry) => (entry.path(), name.join(entry.file_name())),
                Err(error) => {
                    self.note(at("list", name)(error));
                    continue;
                }
            };
            match self.add(&path, &name) {
                Ok(Some(_)) if open.len() >= MAX_DEPTH => {
                    self.note(FilesError::Deep { path: path.display().to_string() });
                }
                Ok(Some(entries)) => open.push((entries, name)),
                Ok(None) => {}
                // It went while its directory was read, as files do where something is at work.
                Err(FilesError::At { error, .. }) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error @ FilesError::Connection(_)) => return Err(error),
                Err(error) => self.note(error),
            }
        }
        Ok(())
    }

    fn note(&mut self, wrong: FilesError) {
        self.first_wrong.get_or_insert(wrong);
        self.wrong += 1;
    }

    fn verdict(&mut self) -> Result<(), FilesError> {
        match (self.first_wrong.take(), self.wrong) {
            (None, _) => Ok(()),
            (Some(first), 1) => Err(FilesError::Partly(first.to_string())),
            (Some(first), wrong) => Err(FilesError::Partly(format!("{first}; and {} more", wrong - 1))),
        }
    }

    /// Adds one entry. What is in a directory is still to come.
    fn add(&mut self, path: &Path, name: &Path) -> Result<Option<ReadDir>, FilesError> {
        let failed = |doing| at(doing, path);
        let metadata = fs::symlink_metadata(path).map_err(failed("read"))?;
        if metadata.is_dir() {
            let mut header = self.header(&metadata);
            self.archive.append_data(&mut header, name, io::empty()).map_err(FilesError::Connection)?;
            return fs::read_dir(path).map(Some).map_err(failed("list"));
        }
        if metadata.is_symlink() {
            let target = fs::read_link(path).map_err(failed("read the link"))?;
            let mut header = self.header(&metadata);
            self.archive.append_link(&mut header, name, target).map_err(FilesError::Connection)?;
        } else if metadata.is_file() {
            self.add_file(path, name)?;
        }
        Ok(None)
    }

    fn add_file(&mut self, path: &Path, name: &Path) -> Result<(), FilesError> {
        let failed = |doing| at(doing, path);
        let mut file = open(path).map_err(failed("open"))?;
        // Of the file that is open now, which may be another than a moment ago.
        let metadata = file.metadata().map_err(failed("read"))?;
        if !metadata.is_file() {
            return Ok(());
        }
        let mut header = self.header(&metadata);
        if metadata.len() <= SHORT {
            let mut contents = Vec::new();
            (&mut file).take(MAX_SHORT + 1).read_to_end(&mut contents).map_err(failed("read"))?;
            let length = contents.len() as u64;
            if length > MAX_SHORT {
                return Err(FilesError::Endless { path: path.display().to_string() });
            }
            header.set_size(length);
            return self
                .archive
                .append_data(&mut header, name, &contents[..])
                .map_err(FilesError::Connection);
        }
        let mut contents = Exactly::new(file, metadata.len());
        self.archive.append_data(&mut header, name, &mut contents).map_err(FilesError::Connection)?;
        contents.failed.map_or(Ok(()), |error| Err(failed("read")(error)))
    }

    fn header(&self, metadata: &Metadata) -> Header {
        let mut header = Header::new_gnu();
        header.set_metadata(metadata);
        if self.owners == Owners::Own {
            header.set_uid(0);
            header.set_gid(0);
            // A program that runs as its owner would be one that runs as root.
            header.set_mode(metadata.permissions().mode() & PLAIN);
        }
        header
    }
}

/// Not one that a symbolic link leads to, nor a pipe that somebody has put there meanwhile.
fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)
}

fn at(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FilesError {
    let path = path.display().to_string();
    move |error| FilesError::At { doing, path, error }
}

/// As many bytes of a file as the archive was told, whatever happens to the file: it is filled up with zeros.
struct Exactly {
    file: File,
    left: u64,
    failed: Option<io::Error>,
}

impl Exactly {
    fn new(file: File, left: u64) -> Exactly {
        Exactly { file, left, failed: None }
    }
}

impl Read for Exactly {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let buffer = &mut buffer[..room];
        let bytes = match self.failed {
            None => self.file.read(buffer),
            Some(_) => Ok(0),
        };
        let bytes = match bytes {
            Ok(0) if room > 0 => {
                self.failed.get_or_insert_with(|| io::Error::other("it became shorter meanwhile"));
                buffer.fill(0);
                room
            }
            Ok(bytes) => bytes,
            Err(error) => {
                self.failed = Some(error);
                buffer.fill(0);
                room
            }
        };
        self.left -= bytes as u64;
        Ok(bytes)
    }
}

/// Unpacks an archive into a directory that exists, over what is there, and reads to the end of `from`. Until a file has its
/// mode it has that of the umask: for root it is to be one by which nobody else reads it.
pub fn unpack(from: impl Read, into: &Path, owners: Owners) -> Result<(), FilesError> {
    let ended = Rc::new(Cell::new(false));
    let from = match owners {
        Owners::Kept => Sieve::open(from),
        Owners::Own => Sieve::new(from),
    };
    let mut archive = Archive::new(Watched { from, ended: Rc::clone(&ended) });
    archive.set_preserve_ownerships(owners == Owners::Kept);
    archive.set_preserve_permissions(owners == Owners::Kept);
    if owners == Owners::Own {
        archive.set_mask(umask());
    }
    archive.set_overwrite(true);
    unpack_all(&mut archive, into, owners, &ended)?;
    let mut rest = archive.into_inner();
    // A whole archive says itself where it ends.
    if ended.get() {
        return Err(FilesError::Cut);
    }
    io::copy(&mut rest, &mut io::sink()).map(drop).map_err(FilesError::Connection)
}

/// This process's, as the kernel tells it: asking by umask(2) would change it for a moment, for all threads.
fn umask() -> u32 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    line.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok()).unwrap_or(USUAL_UMASK)
}

fn unpack_all<R: Read>(
    archive: &mut Archive<R>,
    into: &Path,
    owners: Owners,
    ended: &Cell<bool>,
) -> Result<(), FilesError> {
    let failed = |error: io::Error| match ended.get() {
        true => FilesError::Cut,
        false => FilesError::Unpack { into: into.display().to_string(), why: reasons(&error) },
    };
    if !fs::metadata(into).map_err(failed)?.is_dir() {
        return Err(failed(io::ErrorKind::NotADirectory.into()));
    }
    let mut directories = Directories { named: Vec::new(), names: 0, implied: BTreeSet::new() };
    let unpacked = unpack_entries(archive, into, owners, &mut directories, &failed);
    match unpacked {
        Ok(()) => directories.finish(into, &failed),
        // Of an enemy's nothing is used any more.
        Err(error) if owners == Owners::Own && !matches!(error, FilesError::Broken(_)) => Err(error),
        Err(error) => {
            // What has come stays, and is as it should be as far as that is known.
            let _ = directories.finish(into, &failed);
            Err(error)
        }
    }
}

/// All but directories, which are left for the end.
fn unpack_entries<'a, R: Read>(
    archive: &'a mut Archive<R>,
    into: &Path,
    owners: Owners,
    directories: &mut Directories<'a, R>,
    failed: &impl Fn(io::Error) -> FilesError,
) -> Result<(), FilesError> {
    for entry in archive.entries().map_err(&failed)? {
        let mut entry = entry.map_err(&failed)?;
        let path = entry.path().map_err(&failed)?.into_owned();
        let shown = || path.display().to_string();
        // An agent names them all, and those of others that this process makes are as its user wants them.
        if owners == Owners::Kept {
            directories.imply(into, &path)?;
        }
        match entry.header().entry_type() {
            // Its mode may forbid to write what comes into it: at the end. Files make their directories themselves.
            EntryType::Directory => {
                directories.add(path, entry)?;
            }
            EntryType::Continuous | EntryType::GNUSparse | EntryType::Link | EntryType::XGlobalHeader
                if owners == Owners::Own =>
            {
                return Err(FilesError::Kind { path: shown() });
            }
            EntryType::Regular
            | EntryType::Continuous
            | EntryType::GNUSparse
            | EntryType::Link
            | EntryType::Symlink => {
                if entry.header().entry_type() == EntryType::Link
                    && make_way(&entry, into, &path).map_err(failed)?
                {
                    continue;
                }
                if !entry.unpack_in(into).map_err(failed)? {
                    return Err(FilesError::Outside { path: shown() });
                }
            }
            EntryType::XGlobalHeader => {}
            kind if kind.as_byte() == BROKEN => {
                let mut reason = Vec::new();
                entry.take(MAX_REASON).read_to_end(&mut reason).map_err(failed)?;
                return Err(FilesError::Broken(String::from_utf8_lossy(&reason).into_owned()));
            }
            _ => return Err(FilesError::Kind { path: shown() }),
        }
    }
    Ok(())
}

/// The directories of an archive, which get their modes at the end.
struct Directories<'a, R: Read> {
    named: Vec<(PathBuf, Entry<'a, R>)>,
    /// Bytes of their names.
    names: usize,
    /// Those that were not there and are only part of another's name.
    implied: BTreeSet<PathBuf>,
}

impl<'a, R: Read> Directories<'a, R> {
    fn add(&mut self, path: PathBuf, entry: Entry<'a, R>) -> Result<(), FilesError> {
        self.names += path.as_os_str().len();
        self.named.push((path, entry));
        self.check()
    }

    /// Takes note of what is made for this entry.
    fn imply(&mut self, into: &Path, path: &Path) -> Result<(), FilesError> {
        let path = plain(path);
        let above = path.ancestors().skip(1).filter(|path| !path.as_os_str().is_empty());
        for path in above.take_while(|path| fs::symlink_metadata(into.join(path)).is_err()) {
            if !self.implied.insert(path.to_owned()) {
                break;
            }
            self.names += path.as_os_str().len();
        }
        self.check()
    }

    fn check(&self) -> Result<(), FilesError> {
        match self.named.len() + self.implied.len() > MAX_DIRECTORIES || self.names > MAX_DIRECTORY_NAMES {
            true => Err(FilesError::Directories),
            false => Ok(()),
        }
    }

    /// Makes them and gives them their modes and times: the deepest first, for one that may not be entered any more is not
    /// entered any more.
    fn finish(mut self, into: &Path, failed: &impl Fn(io::Error) -> FilesError) -> Result<(), FilesError> {
        self.named.sort_by(|(one, _), (other, _)| other.cmp(one));
        for path in &self.implied {
            let _ = set_usual_mode(&into.join(path));
        }
        let mut finished = Ok(());
        for (path, mut directory) in self.named {
            let made = match directory.unpack_in(into).map_err(failed) {
                Ok(true) => set_time(&directory, &into.join(plain(&path))).map_err(failed),
                Ok(false) => Err(FilesError::Outside { path: path.display().to_string() }),
                Err(error) => Err(error),
            };
            finished = finished.and(made);
        }
        finished
    }
}

/// A name as it is below the directory that is unpacked into.
fn plain(path: &Path) -> PathBuf {
    path.components().filter(|part| matches!(part, Component::Normal(_))).collect()
}

fn set_usual_mode(directory: &Path) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory, flags, Mode::empty())?;
    Ok(rustix::fs::fchmod(&directory, Mode::from_raw_mode(USUAL_MODE))?)
}

fn set_time<R: Read>(entry: &Entry<R>, directory: &Path) -> io::Result<()> {
    let seconds = entry.header().mtime()?.try_into().unwrap_or(i64::MAX);
    let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(rustix::fs::utimensat(CWD, directory, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Removes a file that is where a hard link will be, and says whether it is that link already.
fn make_way<R: Read>(link: &Entry<R>, into: &Path, path: &Path) -> io::Result<bool> {
    let (Some(target), Ok(into)) = (link.link_name()?, into.canonicalize()) else { return Ok(false) };
    let place = into.join(plain(path));
    let Ok(found) = fs::symlink_metadata(&place) else { return Ok(false) };
    let is_inside = place.parent().and_then(|parent| parent.canonicalize().ok());
    // Who unpacks it refuses what is not.
    if found.is_dir() || !is_inside.is_some_and(|parent| parent.starts_with(&into)) {
        return Ok(false);
    }
    let number = |metadata: &Metadata| (metadata.dev(), metadata.ino());
    if fs::symlink_metadata(into.join(target)).is_ok_and(|target| number(&target) == number(&found)) {
        return Ok(true);
    }
    fs::remove_file(place).map(|()| false)
}

/// An error and what it came from, each once.
fn reasons(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let reason = error.to_string();
        if !text.contains(&reason) {
            text = format!("{text}: {reason}");
        }
        source = error.source();
    }
    text
}

/// A reader of which is known whether it came to its end.
struct Watched<R> {
    from: R,
    ended: Rc<Cell<bool>>,
}

impl<R: Read> Read for Watched<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.from.read(buffer)?;
        if bytes == 0 && !buffer.is_empty() {
            self.ended.set(true);
        }
        Ok(bytes)
    }
}

/// Everything below a directory, for tests: names and what is there.
#[cfg(test)]
pub(crate) fn tree(directory: &Path) -> std::collections::BTreeMap<std::path::PathBuf, String> {
    use std::os::unix::fs::PermissionsExt;
    let mut found = std::collections::BTreeMap::new();
    let mut left = vec![directory.to_owned()];
    while let Some(path) = left.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let what = if metadata.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            format!("directory {:o}", metadata.permissions().mode())
        } else if metadata.is_symlink() {
            format!("link {}", fs::read_link(&path).unwrap().display())
        } else {
            let contents = fs::read(&path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            format!("file {:o} {}", metadata.permissions().mode(), contents.unwrap_or_default())
        };
        found.insert(path.strip_prefix(directory).unwrap().to_owned(), what);
    }
    found
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    fn packed(path: &Path, name: &str) -> Vec<u8> {
        let mut archive = Vec::new();
        pack(path, Path::new(name), Owners::Kept, &mut archive).unwrap();
        archive
    }

    /// A directory with a file that may not be written, in a directory that may not be.
    fn some_tree() -> TempDir {
        let scratch = tempfile::tempdir().unwrap();
        let tree = scratch.path().join("tree");
        fs::create_dir_all(tree.join("closed/deep")).unwrap();
        fs::create_dir(tree.join("empty")).unwrap();
        fs::write(tree.join("closed/deep/file"), "contents").unwrap();
        fs::write(tree.join("program"), "#!").unwrap();
        fs::write(tree.join("x".repeat(200)), "a long name").unwrap();
        symlink("closed/deep/file", tree.join("link")).unwrap();
        symlink("/nowhere", tree.join("dangling")).unwrap();
        let mode = |path: &str, mode| {
            fs::set_permissions(tree.join(path), fs::Permissions::from_mode(mode)).unwrap()
        };
        mode("program", 0o755);
        mode("closed/deep/file", 0o440);
        mode("closed", 0o555);
        scratch
    }

    #[test]
    fn a_tree_comes_out_as_it_went_in() {
        let from = some_tree();
        let then = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
        for path in ["tree/closed", "tree/closed/deep", "tree"] {
            File::open(from.path().join(path)).unwrap().set_modified(then).unwrap();
        }
        let archive = packed(&from.path().join("tree"), "copy");
        let to = tempfile::tempdir().unwrap();
        unpack(&archive[..], to.path(), Owners::Own).unwrap();
        for path in ["copy/closed", "copy/closed/deep", "copy"] {
            assert_eq!(fs::metadata(to.path().join(path)).unwrap().modified().unwrap(), then, "{path}");
        }
        assert_eq!(tree(&to.path().join("copy")), tree(&from.path().join("tree")));
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 1);
        // Once more, over it.
        let file = packed(&from.path().join("tree/program"), "copy/program");
        fs::write(to.path().join("copy/program"), "another").unwrap();
        unpack(&file[..], to.path(), Owners::Own).unwrap();
        assert_eq!(fs::read(to.path().join("copy/program")).unwrap(), b"#!");
        fs::set_permissions(to.path().join("copy/closed"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(from.path().join("tree/closed"), fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn a_name_is_the_last_component() {
        assert_eq!(name_of(Path::new("/etc/hosts")), "hosts");
        assert_eq!(name_of(Path::new("/etc/")), "etc");
        assert_eq!(name_of(Path::new("/")), "root");
        assert_eq!(name_of(Path::new("..")), "root");
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_refused() {
        for name in ["", ".", "/etc", "..", "a/../../b"] {
            let mut archive = Vec::new();
            let error = pack(Path::new("/dev/null"), Path::new(name), Owners::Kept, &mut archive)
                .unwrap_err()
                .to_string();
            assert!(error.contains(&format!("{name:?}")), "{error}");
            let scratch = tempfile::tempdir().unwrap();
            assert_eq!(unpack(&archive[..], scratch.path(), Owners::Own).unwrap_err().to_string(), error);
        }
    }

    #[test]
    fn what_cannot_be_read_is_named_to_both_sides() {
        let scratch = tempfile::tempdir().unwrap();
        let missing = scratch.path().join("missing");
        let mut archive = Vec::new();
        let error = pack(&missing, Path::new("m"), Owners::Kept, &mut archive).unwrap_err().to_string();
        assert!(error.contains(missing.to_str().unwrap()), "{error}");
        assert_eq!(unpack(&archive[..], scratch.path(), Owners::Own).unwrap_err().to_string(), error);
    }

    #[test]
    fn a_file_that_becomes_shorter_breaks_its_archive_and_no_other_entry() {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join("file"), "short").unwrap();
        let mut contents = Exactly::new(File::open(scratch.path().join("file")).unwrap(), 8);
        let mut read = Vec::new();
        contents.read_to_end(&mut read).unwrap();
        assert_eq!(read, b"short\0\0\0");
        assert!(contents.failed.is_some());
    }

    /// An archive of a tree, what its packing said, and what of it came.
    fn partly(tree: &Path) -> (String, TempDir) {
        let mut archive = Vec::new();
        let error = pack(tree, Path::new("copy"), Owners::Own, &mut archive).unwrap_err().to_string();
        let to = tempfile::tempdir().unwrap();
        assert_eq!(unpack(&archive[..], to.path(), Owners::Own).unwrap_err().to_string(), error);
        (error, to)
    }

    #[test]
    fn what_cannot_be_packed_does_not_keep_the_rest_from_it() {
        let from = tempfile::tempdir().unwrap();
        let deepest = "d/".repeat(MAX_DEPTH + 5);
        fs::create_dir_all(from.path().join(deepest)).unwrap();
        fs::write(from.path().join("file"), "contents").unwrap();
        let (error, to) = partly(from.path());
        assert!(error.contains("more than 256 directories deep"), "{error}");
        assert_eq!(fs::read(to.path().join("copy/file")).unwrap(), b"contents");
        assert!(to.path().join("copy").join("d/".repeat(MAX_DEPTH)).exists());
    }

    /// Takes an archive, and when it has begun does something once.
    struct Meanwhile<F>(Vec<u8>, Option<F>);

    impl<F: FnOnce()> Write for Meanwhile<F> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // The directory's header is a block, and the first file's another.
            if self.0.len() > 512 {
                self.1.take().into_iter().for_each(|happens| happens());
            }
            self.0.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn files_that_go_meanwhile_are_passed_over_and_one_that_becomes_shorter_is_told() {
        let from = tempfile::tempdir().unwrap();
        let names = ["a", "b", "c"];
        names.iter().for_each(|name| fs::write(from.path().join(name), "contents").unwrap());
        let go = || names.iter().for_each(|name| fs::remove_file(from.path().join(name)).unwrap());
        let mut archive = Meanwhile(Vec::new(), Some(go));
        pack(from.path(), Path::new("copy"), Owners::Own, &mut archive).unwrap();
        let to = tempfile::tempdir().unwrap();
        unpack(&archive.0[..], to.path(), Owners::Own).unwrap();
        assert_eq!(fs::read_dir(to.path().join("copy")).unwrap().count(), 1);

        let log = from.path().join("log");
        fs::write(&log, vec![1; 200_000]).unwrap();
        let mut archive = Meanwhile(Vec::new(), Some(|| fs::write(&log, "").unwrap()));
        let error = pack(from.path(), Path::new("copy"), Owners::Own, &mut archive).unwrap_err().to_string();
        assert!(error.contains("log: it became shorter meanwhile"), "{error}");
        let error = unpack(&archive.0[..], to.path(), Owners::Own).unwrap_err().to_string();
        assert!(error.contains("log: it became shorter meanwhile"), "{error}");
        assert_eq!(fs::metadata(to.path().join("copy/log")).unwrap().len(), 200_000);
    }

    #[test]
    fn a_device_is_left_out_below_and_refused_by_itself() {
        let from = tempfile::tempdir().unwrap();
        let other = from.path().join("other");
        let _socket = std::os::unix::net::UnixListener::bind(&other).unwrap();
        let (error, to) = partly(&other);
        assert_eq!(error, format!("{} is a device, pipe or socket and cannot be copied", other.display()));
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 0);
        unpack(&packed(from.path(), "copy")[..], to.path(), Owners::Own).unwrap();
        assert_eq!(fs::read_dir(to.path().join("copy")).unwrap().count(), 0);
    }

    #[test]
    fn files_whose_length_the_kernel_does_not_know_are_copied_as_they_are_read() {
        let to = tempfile::tempdir().unwrap();
        for path in ["/proc/version", "/sys/kernel/mm/transparent_hugepage/enabled"] {
            unpack(&packed(Path::new(path), "copy")[..], to.path(), Owners::Own).unwrap();
            assert_eq!(fs::read(to.path().join("copy")).unwrap(), fs::read(path).unwrap(), "{path}");
        }
    }

    #[test]
    fn without_their_owners_files_are_roots_and_run_as_nobody_else() {
        let from = tempfile::tempdir().unwrap();
        let program = from.path().join("program");
        fs::write(&program, "#!").unwrap();
        let _ = std::os::unix::fs::chown(&program, Some(4711), Some(4712));
        fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
        let of = |owners| {
            let mut archive = Vec::new();
            pack(&program, Path::new("program"), owners, &mut archive).unwrap();
            let header = Header::from_byte_slice(&archive[..512]).clone();
            (header.uid().unwrap(), header.gid().unwrap(), header.mode().unwrap() & 0o7777)
        };
        assert_eq!(of(Owners::Own), (0, 0, 0o755));
        let metadata = fs::metadata(&program).unwrap();
        assert_eq!(of(Owners::Kept), (metadata.uid().into(), metadata.gid().into(), 0o4755));
    }

    #[test]
    fn an_archive_that_is_cut_off_is_no_whole_one() {
        let from = some_tree();
        let archive = packed(&from.path().join("tree"), "copy");
        let to = tempfile::tempdir().unwrap();
        for length in [0, 100, 512, 700, archive.len() - 1024] {
            let error = unpack(&archive[..length], to.path(), Owners::Own).unwrap_err();
            assert!(matches!(error, FilesError::Cut), "{length}: {error}");
        }
        fs::set_permissions(from.path().join("tree/closed"), fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn a_place_that_is_no_directory_is_named() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("file");
        fs::write(&file, "").unwrap();
        for place in [file, scratch.path().join("missing")] {
            let error = unpack(&[0; 1024][..], &place, Owners::Own).unwrap_err().to_string();
            assert!(error.contains(place.to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn hard_links_of_an_archive_are_made_anew_each_time_and_nothing_else_goes_for_them() {
        let scratch = tempfile::tempdir().unwrap();
        let (into, outside) = (scratch.path().join("into"), scratch.path().join("outside"));
        fs::create_dir(&into).unwrap();
        fs::write(&outside, "kept").unwrap();
        let archive = hostile(&[
            (EntryType::Regular, "file".into(), String::new()),
            (EntryType::Link, "link".into(), "file".into()),
            (EntryType::Link, "link".into(), "file".into()),
        ]);
        for _ in 0..2 {
            unpack(&archive[..], &into, Owners::Kept).unwrap();
            let number = |name: &str| fs::metadata(into.join(name)).unwrap().ino();
            assert_eq!(number("link"), number("file"));
        }
        symlink(scratch.path(), into.join("out")).unwrap();
        let archive = hostile(&[(EntryType::Link, "out/outside".into(), "file".into())]);
        assert!(unpack(&archive[..], &into, Owners::Kept).is_err());
        assert_eq!(fs::read(outside).unwrap(), b"kept");
    }

    #[test]
    fn what_has_come_of_an_archive_that_is_cut_off_is_as_it_should_be() {
        let archive = hostile(&[
            (EntryType::Directory, "named".into(), String::new()),
            (EntryType::Regular, "named/file".into(), String::new()),
            (EntryType::Regular, "implied/deep/file".into(), String::new()),
        ]);
        let to = tempfile::tempdir().unwrap();
        let cut = &archive[..archive.len() - 1024];
        assert!(matches!(unpack(cut, to.path(), Owners::Kept), Err(FilesError::Cut)));
        let mode = |path: &str| fs::metadata(to.path().join(path)).unwrap().permissions().mode() & 0o777;
        assert_eq!(["named", "implied", "implied/deep"].map(mode), [0o755; 3]);
    }

    #[test]
    fn what_is_never_packed_is_refused_by_name() {
        for kind in [EntryType::Block, EntryType::Link, EntryType::Continuous, EntryType::XGlobalHeader] {
            let archive = hostile(&[(kind, "odd".into(), "target".into())]);
            let scratch = tempfile::tempdir().unwrap();
            let error = unpack(&archive[..], scratch.path(), Owners::Own).unwrap_err().to_string();
            assert!(error.contains("\"odd\""), "{kind:?}: {error}");
        }
    }

    /// The header of an entry that goes on for ever, which nobody reads to its end.
    struct Endless(io::Chain<io::Cursor<Vec<u8>>, io::Repeat>, u64);

    impl Endless {
        fn new(kind: u8) -> Endless {
            let mut header = Header::new_gnu();
            header.set_entry_type(EntryType::new(kind));
            header.set_size(1 << 40);
            header.as_gnu_mut().unwrap().set_is_extended(true);
            header.set_cksum();
            Endless(io::Cursor::new(header.as_bytes().to_vec()).chain(io::repeat(b'1')), 0)
        }
    }

    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.0.read(buffer)?;
            self.1 += count as u64;
            assert!(self.1 < 1 << 20, "it is read on and on");
            Ok(count)
        }
    }

    #[test]
    fn what_a_guest_sends_takes_no_memory_that_it_chooses() {
        for kind in [b'L', b'K', b'x', b'S'] {
            let scratch = tempfile::tempdir().unwrap();
            let error = unpack(Endless::new(kind), scratch.path(), Owners::Own).unwrap_err().to_string();
            assert!(error.contains("the archive has"), "{error}");
        }
    }

    #[test]
    fn the_names_of_directories_have_an_end_together() {
        let name = format!("{}/", "x".repeat(90));
        let entries = vec![(EntryType::Directory, name.clone(), String::new()); MAX_DIRECTORIES + 1];
        let scratch = tempfile::tempdir().unwrap();
        let error = unpack(&hostile(&entries)[..], scratch.path(), Owners::Own).unwrap_err();
        assert!(matches!(error, FilesError::Directories), "{error}");
        let mut archive = Builder::new(Vec::new());
        for _ in 0..MAX_DIRECTORY_NAMES / 4000 + 1 {
            let mut header = Header::new_gnu();
            header.set_entry_type(EntryType::Directory);
            header.set_size(0);
            archive.append_data(&mut header, "x/".repeat(2000), io::empty()).unwrap();
        }
        let archive = archive.into_inner().unwrap();
        let error = unpack(&archive[..], scratch.path(), Owners::Own).unwrap_err();
        assert!(matches!(error, FilesError::Directories), "{error}");
        assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0);
    }

    #[test]
    fn others_may_write_only_what_this_process_lets_them() {
        let from = tempfile::tempdir().unwrap();
        fs::create_dir(from.path().join("tree")).unwrap();
        fs::write(from.path().join("tree/file"), "").unwrap();
        for path in ["tree/file", "tree"] {
            fs::set_permissions(from.path().join(path), fs::Permissions::from_mode(0o777)).unwrap();
        }
        let to = tempfile::tempdir().unwrap();
        unpack(&packed(&from.path().join("tree"), "copy")[..], to.path(), Owners::Own).unwrap();
        let own = tempfile::tempdir_in(&to).unwrap().path().join("own");
        fs::create_dir_all(&own).unwrap();
        let expected = fs::metadata(own).unwrap().permissions().mode() & 0o777;
        for path in ["copy/file", "copy"] {
            let mode = fs::metadata(to.path().join(path)).unwrap().permissions().mode() & 0o777;
            assert_eq!(format!("{mode:o}"), format!("{expected:o}"), "{path}");
        }
    }

    /// An archive of entries as no library would write them.
    fn hostile(entries: &[(EntryType, String, String)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, name, link) in entries {
            let mut header = Header::new_gnu();
            let old = header.as_old_mut();
            old.name[..name.len()].copy_from_slice(name.as_bytes());
            old.linkname[..link.len()].copy_from_slice(link.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o755);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            let data: &[u8] = if kind.is_file() { b"hostile" } else { b"" };
            header.set_size(data.len() as u64);
            header.set_cksum();
            bytes.extend(header.as_bytes());
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }

    fn kind() -> impl Strategy<Value = EntryType> {
        prop_oneof![
            3 => Just(EntryType::Regular),
            3 => Just(EntryType::Symlink),
            1 => Just(EntryType::Link),
            1 => Just(EntryType::Directory),
        ]
    }

    fn name() -> impl Strategy<Value = String> {
        let part = prop_oneof![
            Just("a"),
            Just("b"),
            Just(".."),
            Just("."),
            Just(""),
            Just("outside"),
            Just("secret")
        ];
        proptest::collection::vec(part, 1..5).prop_map(|parts| parts.join("/"))
    }

    proptest! {
        #[test]
        fn nothing_is_written_outside(
            entries in proptest::collection::vec((kind(), name(), prop_oneof![name(), Just("../outside".to_owned())]), 1..8),
            owners in prop_oneof![Just(Owners::Own), Just(Owners::Kept)],
        ) {
            let scratch = tempfile::tempdir().unwrap();
            let (into, outside) = (scratch.path().join("into"), scratch.path().join("outside"));
            fs::create_dir(&into).unwrap();
            fs::create_dir(&outside).unwrap();
            fs::write(outside.join("secret"), "kept").unwrap();
            let before = tree(&outside);
            // It may succeed or not.
            let _ = unpack(&hostile(&entries)[..], &into, owners);
            prop_assert_eq!(tree(&outside), before);
            prop_assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 2);
        }
    }
}
