//! How the process ended, as one line of JSON in a file or a pipe (`--exit-status`): for a supervisor that is not its
//! parent, because the one that was has died, and so gets no exit code.
//!
//! It is written right before each end that this process sees, by `main` or by `faults.rs`, which does so in signal
//! handlers: this takes no lock and allocates nothing. A kill by the kernel or by somebody else leaves the file empty. The
//! file says nothing about when: the process may still be there for a moment, and is told from a dead one elsewhere.

use std::fs::File;
use std::io;
use std::os::fd::{IntoRawFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use api_socket::Fault;
use rustix::fs::FallocateFlags;

use crate::args::ExitCode;
use crate::faults;
use crate::handed::Handed;
use crate::sink;

/// The longest line, in bytes. A pipe that takes anything takes as many, and at once.
pub const MAX_LINE: usize = 2048;
/// What follows the reason.
const END: &[u8] = b"\"}\n";
/// The longest form that a character of the reason can have in the line, in bytes.
const LONGEST: usize = 6;

/// The descriptor of the file; -1 without one.
static FILE: AtomicI32 = AtomicI32::new(-1);
/// Set after the line was written and not before, so that whoever finds it set may end the process. Threads that fail at
/// the same moment may each write a line.
static IS_TOLD: AtomicBool = AtomicBool::new(false);

/// Opens what `--exit-status` names, and empties it if it is a file. Once.
///
/// # Errors
/// It cannot be written to.
pub fn open(path: &Path, handed: &Handed) -> Result<(), Fault> {
    let file = match handed.find_output("exit-status", path) {
        Some(file) => file?,
        None => sink::open(path).map_err(|error| refused(path, &error))?,
    };
    empty(&file).map_err(|error| refused(path, &error))?;
    FILE.store(file.into_raw_fd(), Ordering::Relaxed);
    Ok(())
}

fn refused(path: &Path, error: &io::Error) -> Fault {
    let path = path.display();
    Fault::bad_request(format!(
        "`exit-status` is {path}, which cannot be written: {error}. Give a file in a directory that exists, or a named pipe."
    ))
}

/// What is in the file is of a process before this one.
fn empty(file: &File) -> io::Result<()> {
    if file.metadata()?.is_file() {
        file.set_len(0)?;
        // A disk that is full at the end has room for this all the same, where its file system can promise that.
        let _ = rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, 0, MAX_LINE as u64);
    }
    Ok(())
}

/// Writes how the process ends, which must follow. What comes first counts. In a signal handler too.
pub fn tell(code: ExitCode, reason: &str) {
    tell_in(FILE.load(Ordering::Relaxed), &IS_TOLD, code, reason);
}

fn tell_in(file: RawFd, is_told: &AtomicBool, code: ExitCode, reason: &str) {
    if file >= 0 && !is_told.load(Ordering::Acquire) {
        faults::write_now(file, Line::new(code, reason).bytes());
        is_told.store(true, Ordering::Release);
    }
}

/// The line, in a buffer of its own.
struct Line {
    bytes: [u8; MAX_LINE],
    length: usize,
}

impl Line {
    fn new(code: ExitCode, reason: &str) -> Line {
        let mut line = Line { bytes: [0; MAX_LINE], length: 0 };
        line.push(b"{\"exit_code\":");
        line.push_number(code as u8);
        line.push(b",\"reason\":\"");
        for char in reason.chars() {
            if line.length + LONGEST + END.len() > MAX_LINE {
                break;
            }
            line.push_char(char);
        }
        line.push(END);
        line
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    fn push(&mut self, bytes: &[u8]) {
        let room = self.bytes.iter_mut().skip(self.length);
        self.length += room.zip(bytes).map(|(place, byte)| *place = *byte).count();
    }

    fn push_number(&mut self, number: u8) {
        for divisor in [100, 10, 1] {
            if number >= divisor || divisor == 1 {
                self.push(&[b'0' + number / divisor % 10]);
            }
        }
    }

    /// As RFC 8259, 7, wants it.
    fn push_char(&mut self, char: char) {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        let hex = |digit: u32| HEX.get((digit & 15) as usize).copied().unwrap_or(b'0');
        match char {
            '"' => self.push(b"\\\""),
            '\\' => self.push(b"\\\\"),
            // Up to U+009F.
            char if char.is_control() => {
                let number = char as u32;
                self.push(&[b'\\', b'u', b'0', b'0', hex(number >> 4), hex(number)]);
            }
            char => self.push(char.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;

    /// The code and the reason in a line.
    fn read(bytes: &[u8]) -> (u64, String) {
        assert_eq!(bytes.iter().position(|byte| *byte == b'\n'), Some(bytes.len() - 1));
        let value: serde_json::Value = serde_json::from_slice(bytes).unwrap();
        assert_eq!(value.as_object().unwrap().len(), 2);
        (value["exit_code"].as_u64().unwrap(), value["reason"].as_str().unwrap().to_string())
    }

    #[test]
    fn the_line_is_json_whatever_the_reason_is() {
        let reasons =
            ["", "plain", "a \"quote\" and \\", "two\nlines\r\t\0\u{1f}\u{7f}\u{9f}", "é ∑ 🦀 \u{2028}"];
        for reason in reasons {
            assert_eq!(read(Line::new(ExitCode::GuestReset, reason).bytes()), (3, reason.to_string()));
        }
        for code in [ExitCode::Ok, ExitCode::Generic, ExitCode::BadSyscall, ExitCode::Sigill] {
            assert_eq!(read(Line::new(code, "x").bytes()).0, code as u64);
        }
        assert_eq!(
            Line::new(ExitCode::GuestReset, "the guest asked").bytes(),
            b"{\"exit_code\":3,\"reason\":\"the guest asked\"}\n"
        );
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        for char in ["x", "é", "🦀", "\"", "\0"] {
            for shift in 0..LONGEST {
                let reason = "-".repeat(shift) + &char.repeat(MAX_LINE);
                let line = Line::new(ExitCode::Ok, &reason);
                assert!(line.bytes().len() <= MAX_LINE && line.length > MAX_LINE - 2 * LONGEST - END.len());
                assert!(reason.starts_with(&read(line.bytes()).1), "{char:?}");
            }
        }
    }

    #[test]
    fn a_file_is_emptied_and_then_has_the_first_end_only() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("exit");
        std::fs::write(&path, "of another process, and long").unwrap();
        let file = sink::open(&path).unwrap();
        empty(&file).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        let is_told = AtomicBool::new(false);
        tell_in(file.as_raw_fd(), &is_told, ExitCode::Ok, "first");
        tell_in(file.as_raw_fd(), &is_told, ExitCode::Generic, "second");
        assert_eq!(read(&std::fs::read(&path).unwrap()), (0, "first".into()));
    }

    #[test]
    fn a_full_pipe_does_not_hold_up_the_end() {
        let (_reader, mut writer) = io::pipe().unwrap();
        // A pipe of 64 KiB.
        writer.write_all(&[0; 16 * 4096]).unwrap();
        tell_in(writer.as_raw_fd(), &AtomicBool::new(false), ExitCode::Ok, "nobody reads");
        tell_in(-1, &AtomicBool::new(false), ExitCode::Ok, "there is no file");
    }

    #[test]
    fn what_cannot_be_written_to_is_named() {
        let path = Path::new("/nowhere/exit");
        let fault = open(path, &Handed::default()).unwrap_err();
        assert!(fault.message.contains("`exit-status` is /nowhere/exit"), "{fault}");
    }
}
