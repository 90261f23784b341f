//! What the kernel tells of itself: /proc and /sys, mounted where nobody else sees them and kept across the switch of root,
//! and its log, for what the agent has to say.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Dir, Mode, OFlags, open, openat, readlinkat, stat};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// What is read of one file at most. The largest is the kernel's command line, a page or two.
const MAX_FILE: u64 = 64 << 10;

/// Places, kept open.
#[derive(Clone, Copy)]
pub struct Kernel<'a> {
    pub proc: BorrowedFd<'a>,
    pub sys: BorrowedFd<'a>,
    /// The root of this process at first, by device and number: it may get another when process 1 does.
    pub first_root: Option<(u64, u64)>,
}

impl<'a> Kernel<'a> {
    pub fn new(proc: BorrowedFd<'a>, sys: BorrowedFd<'a>) -> Kernel<'a> {
        let first_root = stat("/").ok().map(|root| (root.st_dev, root.st_ino));
        Kernel { proc, sys, first_root }
    }

    pub fn command_line(&self) -> io::Result<String> {
        read(self.proc, "cmdline")
    }

    /// The last component of where a link of /sys leads to.
    pub fn link_name(&self, path: &str) -> Option<String> {
        let target = readlinkat(self.sys, path, Vec::new()).ok()?;
        let name = Path::new(OsStr::from_bytes(target.as_bytes())).file_name()?;
        Some(name.to_string_lossy().into_owned())
    }
}

/// A file of /proc or /sys, as text, without the end of its last line.
pub fn read(place: BorrowedFd, path: &str) -> io::Result<String> {
    let file = openat(place, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut bytes = Vec::new();
    File::from(file).take(MAX_FILE).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

/// The names in a directory of /proc or /sys; none if it is not there.
pub fn names(place: BorrowedFd, path: &str) -> Vec<String> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(directory) = openat(place, path, flags, Mode::empty()) else { return Vec::new() };
    let Ok(entries) = Dir::new(directory) else { return Vec::new() };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| !name.starts_with('.')).collect()
}

/// Mounts a file system of the kernel's, opens it and takes the mount away again: what is open stays usable, and the image's
/// init finds everything as it was.
pub fn hidden(kind: &str) -> io::Result<OwnedFd> {
    let place = format!("/berth/{kind}");
    std::fs::create_dir_all(&place)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount(kind, place.as_str(), kind, flags, None::<&std::ffi::CStr>)?;
    let opened = open(place.as_str(), OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    unmount(place.as_str(), UnmountFlags::DETACH)?;
    std::fs::remove_dir(&place)?;
    Ok(opened?)
}

/// The kernel's log, for the agent's standard error.
pub fn log_file() -> io::Result<File> {
    File::options().write(true).open("/berth/kmsg")
}

/// Puts a line into the kernel's log, as a warning. In one write, or it would be several lines.
pub fn warn(words: &str) {
    say(4, words);
}

/// As [`warn`], for what is no trouble.
pub fn tell(words: &str) {
    say(6, words);
}

fn say(level: u8, words: &str) {
    let line = format!("<{level}>berth-agent: {words}\n");
    // Nobody is left to be told when this fails.
    let _ = rustix::io::write(rustix::stdio::stderr(), line.as_bytes());
}

/// Puts words on the console, which is process 1's standard error.
pub fn console(words: &str) {
    let _ = io::stderr().write_all(format!("berth: {words}\n").as_bytes());
}
