//! Files and pipes that we write to for someone who may not be reading: the log, the metrics, the guest's console.
//!
//! A write never waits. What a full pipe does not take is the caller's loss to count; a line is written whole or not at
//! all. Nothing is buffered but the end of one line.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use api_socket::Fault;

use crate::handed::Handed;

/// An output that never makes its writer wait.
#[derive(Debug)]
pub struct Sink {
    file: File,
    /// The descriptor is shared with others and blocks, so it is asked before each write.
    ask: bool,
    /// The end of a line that a pipe has taken the beginning of.
    rest: Vec<u8>,
}

impl Sink {
    /// What a client's or the command line's `field` names: a file that was handed over, or as [`Sink::open`].
    ///
    /// # Errors
    /// It cannot be written to.
    pub fn named(field: &str, path: &Path, handed: &Handed) -> Result<Sink, Fault> {
        match handed.find_output(field, path) {
            Some(file) => file.map(Sink::of_handed),
            None => Sink::open(path).map_err(|error| {
                Fault::bad_request(format!(
                    "`{field}` is {}, which cannot be written: {error}. Give a file in a directory that exists, or a named \
                     pipe.",
                    path.display()
                ))
            }),
        }
    }

    /// Does not block, unless it is a terminal or the like.
    fn of_handed(file: File) -> Sink {
        let ask = file.metadata().is_ok_and(|metadata| metadata.file_type().is_char_device());
        Sink { file, ask, rest: Vec::new() }
    }

    /// As [`open`].
    pub fn open(path: &Path) -> io::Result<Sink> {
        Ok(Sink { file: open(path)?, ask: false, rest: Vec::new() })
    }

    /// Standard output, as it is: it may be a terminal that others use too, so its flags are not changed.
    pub fn stdout() -> io::Result<Sink> {
        let file = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        Ok(Sink { file, ask: true, rest: Vec::new() })
    }

    /// The same output again; for a file or pipe of [`Sink::open`] they share what is appended to.
    pub fn try_clone(&self) -> io::Result<Sink> {
        Ok(Sink { file: self.file.try_clone()?, ask: self.ask, rest: Vec::new() })
    }

    /// Writes a line, which must have its line feed, whole or not at all.
    ///
    /// # Errors
    /// Those of `write`; [`ErrorKind::WouldBlock`] when a pipe is full.
    pub fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        while !self.rest.is_empty() {
            let taken = self.put_rest()?;
            self.rest.drain(..taken);
        }
        let taken = self.write(line)?;
        self.rest.extend(line.iter().skip(taken));
        Ok(())
    }

    fn put_rest(&mut self) -> io::Result<usize> {
        let rest = std::mem::take(&mut self.rest);
        let taken = self.write(&rest);
        self.rest = rest;
        taken
    }
}

/// Opens a file, which is made if it is not there and appended to, or a named pipe, which need not have a reader. Writes
/// to it do not wait.
pub fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.append(true).create(true).custom_flags(libc::O_NONBLOCK);
    match options.open(path) {
        // A pipe that nobody reads yet. Whoever opens it for reading and writing reads it himself.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)
        }
        opened => opened,
    }
}

impl AsRawFd for Sink {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Bytes, for what has no lines. Do not mix with [`Sink::write_line`].
impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.ask && !takes_bytes(&self.file) {
            return Err(ErrorKind::WouldBlock.into());
        }
        match self.file.write(bytes) {
            Ok(0) if !bytes.is_empty() => Err(ErrorKind::WriteZero.into()),
            written => written,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether a write of up to PIPE_BUF bytes would not wait now. Another writer may still come first.
fn takes_bytes(file: &File) -> bool {
    let mut poll = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: `poll` writes to one pollfd, which `&mut poll` is, and the count says one.
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    // A descriptor in error is for the write to report.
    ready == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CString;
    use std::io::Read;
    use std::os::unix::ffi::OsStrExt;
    use std::path::PathBuf;

    fn fifo(dir: &tempfile::TempDir) -> PathBuf {
        let path = dir.path().join("fifo");
        let name = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: `name` is a string that ends with NUL.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        path
    }

    fn reader(path: &Path) -> File {
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
    }

    /// All that is in the pipe.
    fn drain(pipe: &mut File) -> Vec<u8> {
        let (mut all, mut part) = (Vec::new(), [0; 4096]);
        while let Ok(count @ 1..) = pipe.read(&mut part) {
            all.extend_from_slice(&part[..count]);
        }
        all
    }

    #[test]
    fn a_file_is_made_and_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for line in ["one\n", "two\n"] {
            Sink::open(&path).unwrap().write_line(line.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo\n");
        assert!(Sink::open(&dir.path().join("nowhere/log")).is_err());
        assert!(Sink::open(dir.path()).is_err());
    }

    #[test]
    fn a_pipe_needs_no_reader_to_be_opened_and_keeps_what_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir);
        let mut sink = Sink::open(&path).unwrap();
        sink.write_line(b"early\n").unwrap();
        assert_eq!(drain(&mut reader(&path)), b"early\n");
    }

    #[test]
    fn a_full_pipe_loses_whole_lines_and_never_a_part_of_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir);
        let mut pipe = reader(&path);
        let mut sink = Sink::open(&path).unwrap();
        // Longer than a pipe takes at once, and no divisor of its size.
        let line: Vec<u8> = [vec![b'x'; 10_000], vec![b'\n']].concat();
        let mut written = 0;
        while sink.write_line(&line).is_ok() {
            written += 1;
        }
        assert_eq!(sink.write_line(&line).unwrap_err().kind(), ErrorKind::WouldBlock);
        let mut seen = drain(&mut pipe);
        sink.write_line(b"last\n").unwrap();
        seen.extend(drain(&mut pipe));
        let expected = [line.repeat(written), b"last\n".to_vec()].concat();
        assert!(seen == expected, "{} lines, {} bytes", written, seen.len());
    }

    #[test]
    fn a_reader_that_goes_is_an_error_and_one_that_comes_back_is_served() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir);
        let pipe = reader(&path);
        let mut sink = Sink::open(&path).unwrap();
        drop(pipe);
        assert_eq!(sink.write_line(b"lost\n").unwrap_err().kind(), ErrorKind::BrokenPipe);
        let mut pipe = reader(&path);
        sink.write_line(b"seen\n").unwrap();
        assert_eq!(drain(&mut pipe), b"seen\n");
    }

    #[test]
    fn a_shared_descriptor_that_blocks_is_asked_first() {
        let (mut pipe, end) = std::io::pipe().unwrap();
        let mut sink =
            Sink { file: File::from(std::os::fd::OwnedFd::from(end)), ask: true, rest: Vec::new() };
        let mut written = 0;
        while sink.write_line(&[b'x'; 4096]).is_ok() {
            written += 1;
        }
        assert!(written > 0);
        pipe.read_exact(&mut vec![0; 4096]).unwrap();
        sink.write_line(&[b'x'; 4096]).unwrap();
    }
}
