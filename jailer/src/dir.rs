//! The one way in which the jailer reaches and makes files below a directory.
//!
//! Root works here in directories that others may have been in. So a directory is an open descriptor, not a path; what is
//! in it is named by one file name, or by the names of the directories that lead there; no symbolic link is followed,
//! nothing leads out of the directory, and what is made is new: a file that is already there, whatever it is and however many names it has, is never written to.
//! Owners and modes are changed by descriptor.
//!
//! The exception is [`Dir::open`], which takes a path from the administrator and follows his links.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;

use crate::error::{During, Error, Result};

/// How often a look-up is tried again that met a rename elsewhere in the file system: openat2(2), EAGAIN.
const MAX_TRIES: usize = 64;

/// The longest control file or list of the kernel's that is read, in bytes.
const MAX_TEXT: u64 = 1 << 20;

/// How deep directories may lie in one that is emptied. A cell has three, and nothing in a VMM makes any.
const MAX_DEPTH: usize = 64;
/// How many names are looked at before they are removed.
const MAX_NAMES: usize = 1024;
/// How often a directory is looked at until there is nothing in it: somebody might put files there all the time.
const MAX_ROUNDS: usize = 4096;

/// An open directory.
#[derive(Debug)]
pub struct Dir {
    fd: OwnedFd,
    /// For messages only.
    path: PathBuf,
}

/// A character device to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    pub name: &'static str,
    pub major: u32,
    pub minor: u32,
}

/// Whose a directory is, and its mode without the file type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    pub uid: Uid,
    pub gid: Gid,
    pub mode: u32,
}

impl Dir {
    /// Opens a directory that the administrator named.
    ///
    /// # Errors
    /// As open(2).
    pub fn open(path: &Path) -> Result<Dir> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())
            .during(|| format!("{} cannot be opened as a directory", path.display()))?;
        Ok(Dir { fd, path: path.to_owned() })
    }

    /// Opens a directory in this one.
    ///
    /// # Errors
    /// There is none of this name, or it is a symbolic link or a file.
    pub fn enter(&self, name: impl AsRef<OsStr>) -> Result<Dir> {
        let name = name.as_ref();
        let fd = self.look_up(name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty());
        match fd {
            Ok(fd) => Ok(Dir { fd, path: self.path.join(name) }),
            Err(error) => Err(self.unusable(name, error)),
        }
    }

    /// Opens a directory that is below this one, by the names that lead there.
    ///
    /// # Errors
    /// As [`Dir::enter`].
    pub fn descend(&self, path: &Path) -> Result<Dir> {
        if !path.components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(Error::Refused(format!("{} does not lead down a directory", path.display())));
        }
        match self.look_up_below(path.as_os_str(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()) {
            Ok(fd) => Ok(Dir { fd, path: self.path.join(path) }),
            Err(error) => Err(self.unusable(path.as_os_str(), error)),
        }
    }

    /// Makes a directory in this one, and tells whether it did; something of this name may be there.
    ///
    /// # Errors
    /// As mkdir(2).
    pub fn make(&self, name: impl AsRef<OsStr>, mode: u32) -> Result<bool> {
        let name = name.as_ref();
        self.check(name)?;
        match rustix::fs::mkdirat(&self.fd, name, Mode::from_raw_mode(mode)) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            Err(error) => Err(error).during(|| format!("cannot make the directory {}", self.shown(name))),
        }
    }

    /// Opens a directory in this one, which is made if there is nothing of this name.
    ///
    /// # Errors
    /// What is there is no directory, or none can be made.
    pub fn enter_or_make(&self, name: impl AsRef<OsStr>, mode: u32) -> Result<Dir> {
        let name = name.as_ref();
        self.make(name, mode)?;
        self.enter(name)
    }

    /// Whether there is something of this name.
    ///
    /// # Errors
    /// As stat(2), but that nothing is there is none.
    pub fn has(&self, name: impl AsRef<OsStr>) -> Result<bool> {
        let name = name.as_ref();
        self.check(name)?;
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error).during(|| format!("cannot look at {}", self.shown(name))),
        }
    }

    /// Removes a name that is not a directory's; nothing need be there.
    ///
    /// # Errors
    /// As unlink(2), but that nothing is there is none.
    pub fn remove_file(&self, name: impl AsRef<OsStr>) -> Result<()> {
        self.remove(name.as_ref(), AtFlags::empty())
    }

    /// Removes an empty directory; nothing need be there. One that is not empty holds what somebody else put there, and
    /// stays.
    ///
    /// # Errors
    /// As rmdir(2), but for these two.
    pub fn remove_dir(&self, name: impl AsRef<OsStr>) -> Result<()> {
        self.remove(name.as_ref(), AtFlags::REMOVEDIR)
    }

    /// Removes all that is in this directory and below it, but for entries of it that have one of these names.
    ///
    /// # Errors
    /// Something below it is a mount, or lies deeper than a cell's files do, or cannot be removed.
    pub fn empty(&self, but: &[&str]) -> Result<()> {
        self.empty_at(0, but)
    }

    fn empty_at(&self, depth: usize, but: &[&str]) -> Result<()> {
        for _ in 0..MAX_ROUNDS {
            let names = self.names(but)?;
            if names.is_empty() {
                return Ok(());
            }
            names.iter().try_for_each(|name| self.remove_all(name, depth))?;
        }
        Err(Error::Refused(format!(
            "{} gets new files all the time; end who makes them",
            self.path.display()
        )))
    }

    /// Some of the names in this directory, if there are any.
    fn names(&self, but: &[&str]) -> Result<Vec<OsString>> {
        let of_the_directory = |name: &OsStr| name == "." || name == "..";
        let read = rustix::fs::Dir::read_from(&self.fd).and_then(|entries| {
            let names = entries.map(|entry| Ok(OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned()));
            let wanted = |name: &rustix::io::Result<OsString>| {
                name.as_ref().is_ok_and(|name| !of_the_directory(name) && !but.iter().any(|but| name == but))
                    || name.is_err()
            };
            names.filter(wanted).take(MAX_NAMES).collect()
        });
        read.during(|| format!("cannot see what is in {}", self.path.display()))
    }

    fn remove_all(&self, name: &OsStr, depth: usize) -> Result<()> {
        let refused = |error| match error {
            Errno::BUSY | Errno::XDEV => Err(Error::Refused(format!(
                "{} is a mount, and what is mounted is not touched; unmount it first",
                self.shown(name)
            ))),
            error => Err(error).during(|| format!("cannot remove {}", self.shown(name))),
        };
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR) if depth < MAX_DEPTH => {}
            Err(Errno::ISDIR) => {
                return Err(Error::Refused(format!(
                    "{} lies deeper than anything in a cell does; look what it is, then remove it",
                    self.shown(name)
                )));
            }
            Err(error) => return refused(error),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        match self.look_up_with(name, flags, Mode::empty(), ResolveFlags::NO_XDEV) {
            Ok(fd) => Dir { fd, path: self.path.join(name) }.empty_at(depth + 1, &[])?,
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => return refused(error),
        }
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => refused(error),
        }
    }

    fn remove(&self, name: &OsStr, flags: AtFlags) -> Result<()> {
        self.check(name)?;
        match rustix::fs::unlinkat(&self.fd, name, flags) {
            Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY) => Ok(()),
            Err(error) => Err(error).during(|| format!("cannot remove {}", self.shown(name))),
        }
    }

    /// Opens a file that only its owner reads and writes, ourselves; it is made if there is nothing of this name.
    ///
    /// # Errors
    /// What is there is another's, or has another mode or other names, or is no file.
    pub fn open_own(&self, name: &str) -> Result<File> {
        const OWN: u32 = libc::S_IFREG | 0o600;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NONBLOCK;
        let fd = self.look_up(OsStr::new(name), flags, Mode::RUSR | Mode::WUSR);
        let fd = fd.map_err(|error| self.unusable(OsStr::new(name), error))?;
        let stat =
            rustix::fs::fstat(&fd).during(|| format!("cannot look at {}", self.shown(OsStr::new(name))))?;
        let is_own = stat.st_mode == OWN && stat.st_uid == rustix::process::geteuid().as_raw();
        // No name is left of a file whose last holder has just removed it.
        match is_own && stat.st_nlink <= 1 {
            true => Ok(fd.into()),
            false => Err(Error::Refused(format!(
                "{} is not a file that a jailer made; look who put it there, then remove it",
                self.shown(OsStr::new(name))
            ))),
        }
    }

    /// Makes a file, to be written to.
    ///
    /// # Errors
    /// There is something of this name, of whatever kind.
    pub fn create(&self, name: impl AsRef<OsStr>, mode: u32) -> Result<File> {
        let name = name.as_ref();
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        match self.look_up(name, flags, Mode::from_raw_mode(mode)) {
            Ok(fd) => Ok(fd.into()),
            Err(error) => Err(self.unusable(name, error)),
        }
    }

    /// Makes a device node and gives it to a user, for reading and writing.
    ///
    /// # Errors
    /// There is something of this name, or devices may not be made here.
    pub fn create_node(&self, node: Node, uid: Uid, gid: Gid) -> Result<()> {
        let name = OsStr::new(node.name);
        self.check(name)?;
        let device = rustix::fs::makedev(node.major, node.minor);
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(&self.fd, name, FileType::CharacterDevice, mode, device)
            .map_err(|error| self.unusable(name, error))?;
        // To open it for more than its path would open the device.
        let made = self.look_up(name, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty());
        let made = made.map_err(|error| self.unusable(name, error))?;
        rustix::fs::chownat(&made, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)
            .during(|| format!("cannot give {} to its user", self.shown(name)))
    }

    /// Reads a file of text, such as the kernel's control files are.
    ///
    /// # Errors
    /// As open(2) and read(2), and for what is not UTF-8.
    pub fn read(&self, name: &str) -> Result<String> {
        let open = self.look_up(OsStr::new(name), OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty());
        let mut text = String::new();
        open.map_err(std::io::Error::from)
            .and_then(|fd| File::from(fd).take(MAX_TEXT).read_to_string(&mut text))
            .during(|| format!("cannot read {}", self.shown(OsStr::new(name))))?;
        Ok(text)
    }

    /// Writes to a control file of the kernel's, in one piece.
    ///
    /// # Errors
    /// There is no such file, or the kernel does not take the value.
    pub fn control(&self, name: &str, value: &str) -> Result<()> {
        self.look_up(OsStr::new(name), OFlags::WRONLY | OFlags::NONBLOCK, Mode::empty())
            .map_err(std::io::Error::from)
            .and_then(|fd| File::from(fd).write_all(value.as_bytes()))
            .during(|| format!("cannot write {value:?} to {}", self.shown(OsStr::new(name))))
    }

    /// Changes who owns this directory and what its mode is.
    ///
    /// # Errors
    /// As fchown(2) and fchmod(2).
    pub fn give_to(&self, owner: Owner) -> Result<()> {
        rustix::fs::fchown(&self.fd, Some(owner.uid), Some(owner.gid))
            .and_then(|()| rustix::fs::fchmod(&self.fd, Mode::from_raw_mode(owner.mode)))
            .during(|| format!("cannot change the owner and mode of {}", self.path.display()))
    }

    /// Who owns this directory, and its mode.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn owner(&self) -> Result<Owner> {
        let stat =
            rustix::fs::fstat(&self.fd).during(|| format!("cannot look at {}", self.path.display()))?;
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        Ok(Owner { uid, gid, mode: stat.st_mode & 0o7777 })
    }

    /// Where it was opened; another directory may be there by now.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn look_up(&self, name: &OsStr, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
        match is_one_name(name) {
            true => self.look_up_below(name, flags, mode),
            false => Err(Errno::INVAL),
        }
    }

    fn look_up_below(&self, path: &OsStr, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
        self.look_up_with(path, flags, mode, ResolveFlags::empty())
    }

    fn look_up_with(
        &self,
        path: &OsStr,
        flags: OFlags,
        mode: Mode,
        more: ResolveFlags,
    ) -> rustix::io::Result<OwnedFd> {
        let rules = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | more;
        let mut result = Err(Errno::AGAIN);
        for _ in 0..MAX_TRIES {
            result = rustix::fs::openat2(&self.fd, path, flags | OFlags::CLOEXEC, mode, rules);
            if !matches!(result, Err(Errno::AGAIN | Errno::INTR)) {
                break;
            }
        }
        result
    }

    fn check(&self, name: &OsStr) -> Result<()> {
        match is_one_name(name) {
            true => Ok(()),
            false => Err(Error::Refused(format!("{name:?} is not the name of one file in a directory"))),
        }
    }

    fn unusable(&self, name: &OsStr, error: Errno) -> Error {
        let path = self.shown(name);
        let why = match error {
            Errno::LOOP => "is a symbolic link, and none is followed; remove it",
            Errno::NOTDIR => "is no directory, and the cell needs one there",
            Errno::EXIST => {
                "is there already, and what is there is not touched; end the cell that has it, then remove it"
            }
            _ => "cannot be made or opened",
        };
        Error::System { what: format!("{path} {why}"), error: error.into() }
    }

    fn shown(&self, name: &OsStr) -> impl fmt::Display {
        self.path.join(name).display().to_string()
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether this names an entry of a directory, and neither the directory itself nor another.
pub fn is_one_name(name: &OsStr) -> bool {
    let bytes = name.as_encoded_bytes();
    !bytes.is_empty() && bytes != b"." && bytes != b".." && !bytes.contains(&b'/')
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    fn dir() -> (tempfile::TempDir, Dir) {
        let temporary = tempfile::tempdir().unwrap();
        let dir = Dir::open(temporary.path()).unwrap();
        (temporary, dir)
    }

    #[test]
    fn a_new_file_has_its_content_and_its_mode() {
        let (place, dir) = dir();
        dir.create("new", 0o555).unwrap().write_all(b"text").unwrap();
        let path = place.path().join("new");
        assert_eq!(fs::read(&path).unwrap(), b"text");
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o555);
    }

    #[test]
    fn a_planted_symlink_is_not_written_through() {
        let (place, dir) = dir();
        let victim = place.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        for target in [victim.as_path(), Path::new("nowhere"), Path::new("victim")] {
            symlink(target, place.path().join("link")).unwrap();
            let error = dir.create("link", 0o600).unwrap_err().to_string();
            assert!(error.contains("link is there already"), "{error}");
            fs::remove_file(place.path().join("link")).unwrap();
        }
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
        assert!(!place.path().join("nowhere").exists());
    }

    #[test]
    fn a_planted_hard_link_is_not_written_to() {
        let (place, dir) = dir();
        let victim = place.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        fs::hard_link(&victim, place.path().join("program")).unwrap();
        let error = dir.create("program", 0o600).unwrap_err().to_string();
        assert!(error.contains("program is there already"), "{error}");
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
    }

    #[test]
    fn a_symlink_in_place_of_a_directory_is_not_entered() {
        let (place, dir) = dir();
        fs::create_dir(place.path().join("real")).unwrap();
        symlink("real", place.path().join("link")).unwrap();
        symlink("/", place.path().join("up")).unwrap();
        for name in ["link", "up"] {
            let error = dir.enter_or_make(name, 0o700).unwrap_err().to_string();
            assert!(error.contains("is a symbolic link"), "{error}");
        }
        assert!(dir.enter_or_make("real", 0o700).is_ok());
    }

    #[test]
    fn a_name_is_one_name() {
        let (_place, dir) = dir();
        for name in ["", ".", "..", "a/b", "/etc", "a/"] {
            assert!(dir.enter(name).is_err(), "{name:?}");
            assert!(dir.enter_or_make(name, 0o700).is_err(), "{name:?}");
            assert!(dir.create(name, 0o600).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_directory_is_reached_though_its_path_now_leads_elsewhere() {
        let (place, dir) = dir();
        let made = dir.enter_or_make("made", 0o755).unwrap();
        fs::rename(place.path().join("made"), place.path().join("moved")).unwrap();
        symlink("/etc", place.path().join("made")).unwrap();
        made.create("file", 0o600).unwrap();
        assert!(place.path().join("moved/file").exists());
        assert!(!Path::new("/etc/file").exists());
    }

    #[test]
    fn what_is_removed_is_one_name_and_an_empty_directory() {
        let (place, dir) = dir();
        let victim = place.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        fs::hard_link(&victim, place.path().join("hard")).unwrap();
        symlink("victim", place.path().join("link")).unwrap();
        for name in ["hard", "link", "absent"] {
            dir.remove_file(name).unwrap();
            assert!(!dir.has(name).unwrap(), "{name}");
        }
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
        fs::create_dir_all(place.path().join("full/empty")).unwrap();
        for name in ["full", "absent"] {
            dir.remove_dir(name).unwrap();
        }
        assert!(dir.remove_file("full").is_err() && dir.remove_dir("victim").is_err());
        let full = dir.descend(Path::new("full")).unwrap();
        assert!(dir.descend(Path::new("full/empty")).is_ok());
        for astray in ["../full", "/full", "full/../full", ""] {
            assert!(dir.descend(Path::new(astray)).is_err(), "{astray}");
        }
        full.remove_dir("empty").unwrap();
        dir.remove_dir("full").unwrap();
        assert!(!dir.has("full").unwrap() && dir.has("victim").unwrap());
    }

    #[test]
    fn a_directory_is_emptied_of_everything_but_what_was_excepted() {
        let (place, dir) = dir();
        fs::write(place.path().join("kept"), "").unwrap();
        for number in 0..MAX_NAMES + 10 {
            fs::write(place.path().join(number.to_string()), "").unwrap();
        }
        fs::create_dir_all(place.path().join("a/kept/c")).unwrap();
        fs::write(place.path().join("a/kept/file"), "").unwrap();
        dir.empty(&["kept", "none"]).unwrap();
        let left: Vec<_> =
            fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["kept"]);
    }

    #[test]
    fn what_lies_too_deep_is_named_and_stays() {
        let (place, dir) = dir();
        let deep: PathBuf = (0..MAX_DEPTH).map(|_| "d").collect();
        fs::create_dir_all(place.path().join(&deep)).unwrap();
        dir.empty(&[]).unwrap();
        fs::create_dir_all(place.path().join(deep.join("d/d"))).unwrap();
        let error = dir.empty(&[]).unwrap_err().to_string();
        assert!(error.contains("d/d lies deeper"), "{error}");
        assert!(place.path().join(deep.join("d/d")).exists());
    }

    #[test]
    fn an_own_file_is_no_others_and_has_no_other_name() {
        let (place, dir) = dir();
        let path = place.path().join("own");
        for _ in 0..2 {
            dir.open_own("own").unwrap();
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        fs::hard_link(&path, place.path().join("hard")).unwrap();
        symlink("hard", place.path().join("link")).unwrap();
        fs::write(place.path().join("open"), "").unwrap();
        fs::create_dir(place.path().join("directory")).unwrap();
        for name in ["own", "link", "open", "directory"] {
            assert!(dir.open_own(name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_control_file_is_neither_made_nor_cut() {
        let (place, dir) = dir();
        assert!(dir.control("absent", "1").is_err());
        assert!(!place.path().join("absent").exists());
        fs::write(place.path().join("there"), "123").unwrap();
        dir.control("there", "9").unwrap();
        assert_eq!(dir.read("there").unwrap(), "923");
    }

    #[test]
    fn a_device_node_belongs_to_its_user() {
        let (place, dir) = dir();
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: only root makes device nodes");
            return;
        }
        let node = Node { name: "null", major: 1, minor: 3 };
        dir.create_node(node, Uid::from_raw(1234), Gid::from_raw(4321)).unwrap();
        let made = fs::symlink_metadata(place.path().join("null")).unwrap();
        assert_eq!((made.uid(), made.gid(), made.rdev()), (1234, 4321, rustix::fs::makedev(1, 3)));
        assert_eq!(made.permissions().mode(), libc::S_IFCHR | 0o600);
        assert!(dir.create_node(node, Uid::ROOT, Gid::ROOT).is_err());
    }
}
