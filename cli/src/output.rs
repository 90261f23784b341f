//! What is printed: for people on a terminal, for people in a file, for programs.
//!
//! Colour only on a terminal, and not with `NO_COLOR` in the environment. Standard output has the answer and nothing
//! else; everything that is said about it goes to standard error.

pub mod progress;
pub mod table;
pub mod words;

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::error::{Error, Result};
use crate::exit::Exit;

/// How a word looks on a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    Good,
    Doubtful,
    Bad,
    Strong,
}

impl Style {
    /// The number of ECMA-48's SGR.
    fn number(self) -> u8 {
        match self {
            Style::Good => 32,
            Style::Doubtful => 33,
            Style::Bad => 31,
            Style::Strong => 1,
        }
    }
}

/// Whether what is written is coloured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paint(pub bool);

impl Paint {
    /// As standard output wants it.
    pub fn for_stdout() -> Paint {
        Paint::decide(
            io::stdout().is_terminal(),
            std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()),
        )
    }

    fn decide(is_terminal: bool, no_color: bool) -> Paint {
        Paint(is_terminal && !no_color)
    }

    pub fn paint(self, style: Style, text: &str) -> String {
        match self.0 {
            true => format!("\x1b[{}m{text}\x1b[0m", style.number()),
            false => text.to_string(),
        }
    }
}

/// Writes an answer to standard output. A reader that has enough, as `head` has, is no failure.
///
/// # Errors
/// Standard output cannot be written to.
pub fn print(text: &str) -> Result<()> {
    print_bytes(text.as_bytes())
}

/// Writes what somebody else said as it is.
///
/// # Errors
/// As for [`print`].
pub fn print_bytes(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    judge(out.write_all(bytes).and_then(|()| out.flush()))
}

/// Writes an answer for programs: JSON, on lines of its own.
///
/// # Errors
/// As for [`print`].
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let text =
        serde_json::to_string_pretty(value).map_err(|error| Error::new("the answer as JSON", error))?;
    print(&(text + "\n"))
}

/// Writes a part of an answer to standard output, and says whether anybody reads that: for who has more to do than to say it.
///
/// # Errors
/// As for [`print`].
pub fn is_read(bytes: &[u8]) -> Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        written => judge(written).map(|()| true),
    }
}

/// Says something about an answer, on one line of standard error. Part of it may be somebody else's; where that cannot be
/// written to, there is nobody to be told.
pub fn tell(text: impl Display) {
    let _ = writeln!(io::stderr(), "berth: {}", plain(&text.to_string()));
}

/// The same below what a guest has left of a line.
pub fn tell_below(text: impl Display) {
    let _ = writeln!(io::stderr());
    tell(text);
}

fn judge(written: io::Result<()>) -> Result<()> {
    match written {
        // Who reads us is gone: nobody is left to be told, and it is as if a signal had ended us.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
            std::process::exit(Exit::Signal(libc::SIGPIPE as u8).code().into())
        }
        Err(error) => Err(Error::new("standard output", error)),
        Ok(()) => Ok(()),
    }
}

/// Text of somebody else's on one line of a terminal: what would move the cursor or change colours is shown as it is
/// written in code.
pub fn plain(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut shown, c| {
        match c.is_control() {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
        shown
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colour_is_for_a_terminal_and_for_who_did_not_say_no() {
        assert_eq!(Paint::decide(true, false), Paint(true));
        assert_eq!(Paint::decide(true, true), Paint(false));
        assert_eq!(Paint::decide(false, false), Paint(false));
        assert_eq!(Paint(true).paint(Style::Good, "ok"), "\x1b[32mok\x1b[0m");
        assert_eq!(Paint(false).paint(Style::Good, "ok"), "ok");
    }

    #[test]
    fn what_others_wrote_does_not_reach_the_terminal_as_commands() {
        assert_eq!(plain("a\x1b[2Jb\nc\u{9b}"), "a\\u{1b}[2Jb\\nc\\u{9b}");
        assert_eq!(plain("naïve — ok"), "naïve — ok");
    }

    #[test]
    fn a_full_disk_is_told() {
        let error = judge(Err(io::Error::from_raw_os_error(libc::ENOSPC))).unwrap_err();
        assert_eq!(error.to_string(), "standard output: No space left on device (os error 28)");
    }
}
