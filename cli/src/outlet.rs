//! An output that may not take what is written to it: it is waited for beside everything else, so that signals and the keys
//! that leave are heard meanwhile. Who writes here waits for nothing.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::session::Ending;

/// What a pipe takes as a whole when it takes anything (pipe(7)).
const PIPE_BUF: usize = 4096;

pub struct Outlet<'a> {
    fd: Fd<'a>,
    /// What is written at a time, so that it does not wait.
    at_once: usize,
    name: &'static str,

    waiting: Vec<u8>,
    /// How much of it has been written.
    written: usize,
}

enum Fd<'a> {
    Anothers(BorrowedFd<'a>),
    Own(OwnedFd),
}

impl<'a> Outlet<'a> {
    /// An output of this process, with the name that it has in errors.
    pub fn of(fd: BorrowedFd<'a>, name: &'static str) -> Outlet<'a> {
        let (fd, at_once) = match reopened(fd) {
            Some(own) => (Fd::Own(own), usize::MAX),
            None if is_file(fd) => (Fd::Anothers(fd), usize::MAX),
            None => (Fd::Anothers(fd), PIPE_BUF),
        };
        Outlet { fd, at_once, name, waiting: Vec::new(), written: 0 }
    }

    /// One that does not wait by itself.
    pub fn nonblocking(fd: BorrowedFd<'a>, name: &'static str) -> Outlet<'a> {
        Outlet { fd: Fd::Anothers(fd), at_once: usize::MAX, name, waiting: Vec::new(), written: 0 }
    }

    /// What it has not taken yet, in bytes.
    pub fn waiting(&self) -> usize {
        self.waiting.len() - self.written
    }

    pub fn is_empty(&self) -> bool {
        self.waiting() == 0
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.waiting.drain(..std::mem::take(&mut self.written));
        self.waiting.extend_from_slice(bytes);
    }

    /// Writes as much as it takes now.
    ///
    /// # Errors
    /// [`Ending::Unread`] and [`Ending::Unwritten`].
    pub fn flush(&mut self) -> Result<(), Ending> {
        while !self.is_empty() {
            match poll(&mut [PollFd::new(&*self, PollFlags::OUT)], Some(&Timespec::default())) {
                Ok(0) => return Ok(()),
                Err(error) if error != Errno::INTR => return Err(failed(self.name, error)),
                Ok(_) | Err(_) => {}
            }
            let piece = self.waiting.get(self.written..).unwrap_or_default();
            match rustix::io::write(self.as_fd(), piece.get(..self.at_once).unwrap_or(piece)) {
                Ok(count) => self.written += count,
                Err(Errno::INTR) => {}
                // Somebody who has it too wanted it so.
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(failed(self.name, error)),
            }
        }
        Ok(())
    }
}

impl AsFd for Outlet<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.fd {
            Fd::Anothers(fd) => *fd,
            Fd::Own(fd) => fd.as_fd(),
        }
    }
}

/// Why an output does not take anything any more.
pub fn failed(name: &'static str, error: Errno) -> Ending {
    match error {
        Errno::PIPE => Ending::Unread,
        error => Ending::Unwritten(name, error.to_string()),
    }
}

/// A pipe or a terminal once more, as one that never waits: of the one that was handed to us, others would find it changed.
fn reopened(fd: BorrowedFd) -> Option<OwnedFd> {
    let is_pipe =
        rustix::fs::fstat(fd).is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Fifo);
    if !is_pipe && !rustix::termios::isatty(fd) {
        return None;
    }
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    rustix::fs::open(format!("/proc/self/fd/{}", fd.as_raw_fd()), flags, Mode::empty()).ok()
}

fn is_file(fd: BorrowedFd) -> bool {
    rustix::fs::fstat(fd).is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::RegularFile)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write, pipe};
    use std::os::unix::net::UnixStream;

    #[test]
    fn what_is_not_read_waits_and_nobody_waits_for_it() {
        let much: Vec<u8> = (0..1_000_000u32).map(|number| (number % 251) as u8).collect();
        let (mut reader, writer) = pipe().unwrap();
        let (mut end, socket) = UnixStream::pair().unwrap();
        for (mut outlet, reader) in [
            (Outlet::of(writer.as_fd(), "pipe"), &mut reader as &mut dyn Read),
            (Outlet::of(socket.as_fd(), "socket"), &mut end),
        ] {
            outlet.push(&much[..500_000]);
            outlet.push(&much[500_000..]);
            outlet.flush().unwrap();
            assert!(outlet.waiting() > 0 && outlet.waiting() < much.len());
            let mut read = Vec::new();
            while read.len() < much.len() {
                let mut chunk = [0; 10_000];
                let count = reader.read(&mut chunk).unwrap();
                read.extend_from_slice(&chunk[..count]);
                outlet.flush().unwrap();
            }
            assert!(read == much && outlet.is_empty());
        }
        // For others it is as it was.
        assert!(!rustix::fs::fcntl_getfl(&writer).unwrap().contains(OFlags::NONBLOCK));
    }

    #[test]
    fn a_file_is_gone_on_with_where_it_was() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"before ").unwrap();
        let mut outlet = Outlet::of(file.as_fd(), "file");
        outlet.push(b"after");
        outlet.flush().unwrap();
        drop(outlet);
        std::io::Seek::rewind(&mut file).unwrap();
        assert_eq!(std::io::read_to_string(file).unwrap(), "before after");
    }

    #[test]
    fn nobody_who_reads_is_told_from_a_full_disk() {
        let (reader, writer) = pipe().unwrap();
        let mut outlet = Outlet::of(writer.as_fd(), "pipe");
        drop(reader);
        outlet.push(b"x");
        assert!(matches!(outlet.flush(), Err(Ending::Unread)));
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let mut outlet = Outlet::of(full.as_fd(), "full");
        outlet.push(b"x");
        let ending = outlet.flush().unwrap_err();
        assert!(matches!(&ending, Ending::Unwritten("full", why) if why.contains("No space")), "{ending:?}");
    }
}
