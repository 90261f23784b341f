//! The terminal that a person sits at: raw while keys go to a guest, and as it was before on every way out: the end, a
//! signal (`signals.rs` makes an end of it), a panic.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, Once, PoisonError};

use agent::protocol::Size;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr};

/// What is to be put back, and where.
static SAVED: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);

/// A terminal of which every key goes through; dropping it gives it back.
pub struct Raw(());

impl Raw {
    /// Standard input's. Ctrl-C and all others are bytes from here on, and what is written is written as it is.
    ///
    /// # Errors
    /// It is no terminal.
    pub fn set() -> io::Result<Raw> {
        Raw::of(io::stdin().as_fd())
    }

    fn of(terminal: BorrowedFd) -> io::Result<Raw> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let usual = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                usual(panic);
            }));
        });
        let before = tcgetattr(terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        // First, as a panic may come right after the change.
        *saved() = Some((terminal.try_clone_to_owned()?, before));
        tcsetattr(terminal, OptionalActions::Drain, &raw)?;
        Ok(Raw(()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

fn saved() -> std::sync::MutexGuard<'static, Option<(OwnedFd, Termios)>> {
    SAVED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives back what [`Raw`] took, once. Nothing to do without.
pub fn restore() {
    if let Some((terminal, settings)) = saved().take() {
        let _ = tcsetattr(terminal, OptionalActions::Drain, &settings);
    }
}

/// Standard input and output are a terminal that is ours: not one that another job of the shell has now, for who touches
/// that is stopped.
pub fn is_ours() -> bool {
    io::stdout().is_terminal() && io::stdin().is_terminal() && !is_anothers(io::stdin().as_fd())
}

/// Standard input can be read without being stopped for it.
pub fn may_read() -> bool {
    !(io::stdin().is_terminal() && is_anothers(io::stdin().as_fd()))
}

fn is_anothers(terminal: BorrowedFd) -> bool {
    // An error is that of a terminal which is not this session's: nobody is stopped there.
    tcgetpgrp(terminal).is_ok_and(|foreground| foreground != rustix::process::getpgrp())
}

/// Of the terminal at standard output. One that does not know says 0 by 0, which is the usual then.
pub fn size() -> Size {
    let size = tcgetwinsize(io::stdout());
    size.ok()
        .filter(|size| size.ws_row > 0 && size.ws_col > 0)
        .map_or(Size { rows: 24, columns: 80 }, |size| Size { rows: size.ws_row, columns: size.ws_col })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

    /// The two ends of a terminal: where a person is, and where a program is.
    fn terminal() -> (OwnedFd, OwnedFd) {
        let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&person).unwrap();
        unlockpt(&person).unwrap();
        let name = ptsname(&person, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let program = rustix::fs::open(name, flags, rustix::fs::Mode::empty()).unwrap();
        (person, program)
    }

    fn modes(terminal: &OwnedFd) -> String {
        let settings = tcgetattr(terminal).unwrap();
        format!("{:?} {:?} {:?}", settings.input_modes, settings.output_modes, settings.local_modes)
    }

    /// In one test, for what is saved belongs to the process.
    #[test]
    fn every_key_goes_through_and_afterwards_the_terminal_is_as_it_was() {
        let (person, program) = terminal();
        let before = modes(&program);
        let raw = Raw::of(program.as_fd()).unwrap();
        // Ctrl-C, Ctrl-D, Enter, Ctrl-Z.
        for key in [3, 4, 13, 26] {
            rustix::io::write(&person, &[key]).unwrap();
            let mut got = [0];
            rustix::io::read(&program, &mut got).unwrap();
            assert_eq!(got, [key]);
        }
        assert_ne!(modes(&program), before);
        drop(raw);
        assert_eq!(modes(&program), before);

        // A panic gives it back before anybody else hears of it.
        let raw = Raw::of(program.as_fd()).unwrap();
        let panicked = std::thread::spawn(|| panic!("on purpose")).join();
        assert!(panicked.is_err());
        assert_eq!(modes(&program), before);
        drop(raw);

        let (end, _) = io::pipe().unwrap();
        assert!(Raw::of(end.as_fd()).is_err());
    }
}
