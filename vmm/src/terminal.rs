//! Standard input as the guest's serial console: raw while the guest runs, so that every key reaches it, and as it was
//! before on every way out: the end of the guest, a fatal signal, a panic.
//!
//! What is written to the terminal is left as the terminal has it: the log and other programs write there too.

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Standard input; dropping it gives the terminal its line editing back.
pub struct Input {
    file: File,
    raw: bool,
}

/// Settings to be put back, and the descriptor that they belong to.
struct Saved {
    terminal: RawFd,
    settings: libc::termios,
}

/// What [`restore`] puts back; null when there is nothing. It points to memory that is never freed, so that a signal
/// handler may read it at any time.
static SAVED: AtomicPtr<Saved> = AtomicPtr::new(ptr::null_mut());

impl Input {
    /// Standard input as it is.
    ///
    /// # Errors
    /// Those of `dup`.
    pub fn new() -> io::Result<Self> {
        Ok(Self::of(File::from(io::stdin().as_fd().try_clone_to_owned()?)))
    }

    fn of(file: File) -> Self {
        Self { file, raw: false }
    }

    /// Whether it is a terminal that another job of the shell has now. Whoever touches it then is stopped.
    pub fn is_anothers(&self) -> bool {
        self.file.is_terminal() && in_background(self.file.as_raw_fd())
    }

    /// From here on keys go through one by one, Ctrl-C included. Nothing to do where standard input is no terminal.
    /// Not while it [is another's](Self::is_anothers).
    pub fn set_raw(&mut self) {
        if self.raw || !self.file.is_terminal() {
            return;
        }
        let terminal = self.file.as_raw_fd();
        let result = settings(terminal).and_then(|settings| {
            // First, as a signal may end the process right after the change.
            SAVED.store(Box::leak(Box::new(Saved { terminal, settings })), Ordering::SeqCst);
            self.raw = true;
            set_raw(terminal, settings)
        });
        if let Err(error) = result {
            log::warn!("the terminal cannot be set to raw mode: {error}");
        }
    }

    /// At most `limit` bytes of what is there; empty at the end of input. Only when readable, or it blocks.
    pub fn read(&mut self, limit: usize) -> io::Result<Vec<u8>> {
        let mut chunk = vec![0; limit];
        let got = self.file.read(&mut chunk)?;
        chunk.truncate(got);
        Ok(chunk)
    }
}

impl AsRawFd for Input {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        if self.raw {
            restore();
        }
    }
}

/// Gives the terminal the settings that it had before [`Input::set_raw`], once. A signal handler may call it.
pub fn restore() {
    let saved = SAVED.swap(ptr::null_mut(), Ordering::SeqCst);
    // SAFETY: a pointer in `SAVED` is that of a box which `set_raw` leaked, so it stays valid, and nobody writes there.
    let Some(Saved { terminal, settings }) = (unsafe { saved.as_ref() }) else { return };
    if !in_background(*terminal) {
        // SAFETY: tcsetattr reads one termios, which `settings` is; it is async-signal-safe (POSIX, 2.4.3).
        unsafe { libc::tcsetattr(*terminal, libc::TCSANOW, settings) };
    }
}

fn set_raw(terminal: RawFd, before: libc::termios) -> io::Result<()> {
    let mut raw = before;
    raw.c_iflag &= !(libc::IGNBRK
        | libc::BRKINT
        | libc::PARMRK
        | libc::ISTRIP
        | libc::INLCR
        | libc::IGNCR
        | libc::ICRNL
        | libc::IXON);
    raw.c_lflag &= !(libc::ECHO | libc::ECHONL | libc::ICANON | libc::ISIG | libc::IEXTEN);
    (raw.c_cc[libc::VMIN], raw.c_cc[libc::VTIME]) = (1, 0);
    // SAFETY: tcsetattr reads one termios, which `raw` is.
    match unsafe { libc::tcsetattr(terminal, libc::TCSANOW, &raw) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn settings(terminal: RawFd) -> io::Result<libc::termios> {
    let mut settings = std::mem::MaybeUninit::<libc::termios>::uninit();
    // SAFETY: tcgetattr writes one termios, for which there is room.
    match unsafe { libc::tcgetattr(terminal, settings.as_mut_ptr()) } {
        // SAFETY: tcgetattr said that it has written the whole structure.
        0 => Ok(unsafe { settings.assume_init() }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether `terminal` is this session's and its foreground job another one. In a signal handler too.
fn in_background(terminal: RawFd) -> bool {
    // SAFETY: both read numbers of the kernel's and touch no memory; both are async-signal-safe (POSIX, 2.4.3).
    let (foreground, ours) = unsafe { (libc::tcgetpgrp(terminal), libc::getpgrp()) };
    foreground > 0 && foreground != ours
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::FromRawFd;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    /// The two ends of a terminal: where a person is, and where a program is.
    fn terminal() -> (File, File) {
        let (mut person, mut program) = (-1, -1);
        let null = ptr::null_mut();
        // SAFETY: openpty writes two numbers; it may do without a name, settings and a size.
        let made = unsafe { libc::openpty(&mut person, &mut program, null, ptr::null(), ptr::null()) };
        assert_eq!(made, 0, "{}", io::Error::last_os_error());
        // SAFETY: openpty has just made them, and nobody else has them.
        unsafe { (File::from_raw_fd(person), File::from_raw_fd(program)) }
    }

    fn flags(terminal: &File) -> (u32, u32, u32) {
        let settings = settings(terminal.as_raw_fd()).unwrap();
        (settings.c_iflag, settings.c_oflag, settings.c_lflag)
    }

    /// What is to be restored belongs to the process: one test at a time.
    fn alone() -> MutexGuard<'static, ()> {
        static ALONE: Mutex<()> = Mutex::new(());
        ALONE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[test]
    fn every_key_goes_through_as_it_is_typed() {
        let _alone = alone();
        let (mut person, program) = terminal();
        let mut input = Input::of(program);
        input.set_raw();
        // Ctrl-C, Ctrl-D, Enter, Ctrl-Q, Ctrl-S, Ctrl-V, Ctrl-Z.
        let keys = [3, 4, 13, 17, 19, 22, 26];
        for key in keys {
            person.write_all(&[key]).unwrap();
            assert_eq!(input.read(64).unwrap(), [key]);
        }
    }

    #[test]
    fn what_is_written_is_not_changed() {
        let _alone = alone();
        let (_person, program) = terminal();
        let before = flags(&program).1;
        let mut input = Input::of(program);
        input.set_raw();
        assert_eq!(flags(&input.file).1, before);
    }

    #[test]
    fn afterwards_the_terminal_is_as_it_was_and_not_as_terminals_usually_are() {
        let _alone = alone();
        let (_person, program) = terminal();
        let mut odd = settings(program.as_raw_fd()).unwrap();
        odd.c_lflag &= !libc::ECHO;
        odd.c_iflag |= libc::ISTRIP;
        // SAFETY: tcsetattr reads one termios, which `odd` is.
        unsafe { libc::tcsetattr(program.as_raw_fd(), libc::TCSANOW, &odd) };
        let before = flags(&program);
        let mut input = Input::of(program.try_clone().unwrap());
        input.set_raw();
        assert_ne!(flags(&program), before);
        drop(input);
        assert_eq!(flags(&program), before);
    }

    #[test]
    fn a_signal_handler_or_a_panic_restores_it_too_and_only_once() {
        let _alone = alone();
        let (_person, program) = terminal();
        let before = flags(&program);
        let mut input = Input::of(program.try_clone().unwrap());
        input.set_raw();
        let raw = flags(&program);
        restore();
        assert_eq!(flags(&program), before);
        // Somebody else's settings from now on.
        set_raw(program.as_raw_fd(), settings(program.as_raw_fd()).unwrap()).unwrap();
        restore();
        drop(input);
        assert_eq!(flags(&program), raw);
    }

    #[test]
    fn what_is_no_terminal_is_read_as_it_is() {
        let (end, mut pipe) = io::pipe().unwrap();
        let mut input = Input::of(File::from(std::os::fd::OwnedFd::from(end)));
        input.set_raw();
        assert!(!input.raw && !input.is_anothers());
        pipe.write_all(b"typed").unwrap();
        assert_eq!(input.read(64).unwrap(), b"typed");
        drop(pipe);
        assert_eq!(input.read(64).unwrap(), b"");
    }
}
