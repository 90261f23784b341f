//! Signals: those that ask the process to end become a descriptor of the control loop; those that end it for a fault say
//! so and leave with the exit code that callers know.
//!
//! SIGPIPE stays ignored, as the Rust runtime sets it, and so is SIGXFSZ: a reader that hangs up and a file that may not
//! grow are errors of one write. A guest would otherwise end its VMM by saying more than its log or its console may hold.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use vmm_sys_util::signal::{block_signal, create_sigset, register_signal_handler};

use crate::terminal;

/// A signal that ends the process at once, its exit code (docs/vmm.md), and what is said of it.
const FATAL: [(libc::c_int, i32, &str); 6] = [
    (libc::SIGSYS, 148, "SIGSYS: a system call that the filter does not allow"),
    (libc::SIGBUS, 149, "SIGBUS: a file was cut short under its mapping, or huge pages ran out"),
    (libc::SIGSEGV, 150, "SIGSEGV"),
    (libc::SIGXCPU, 154, "SIGXCPU: the limit on CPU time was reached"),
    (libc::SIGHUP, 156, "SIGHUP: the terminal is gone"),
    (libc::SIGILL, 157, "SIGILL"),
];

/// Makes every signal of [`FATAL`] end the process with its code, and SIGXFSZ nothing. Once, before threads start.
pub fn install_fatal_handlers() -> io::Result<()> {
    // SAFETY: SIG_IGN is a disposition that calls nothing of this process.
    if unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    for (signal, _, _) in FATAL {
        register_signal_handler(signal, fatal)?;
    }
    Ok(())
}

extern "C" fn fatal(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let (code, text) = FATAL
        .iter()
        .find(|(known, _, _)| *known == signal)
        .map_or((2, "an unknown signal"), |(_, code, text)| (*code, text));
    for part in ["berth-vmm ended by ", text, "\n"] {
        // SAFETY: write(2) is async-signal-safe; pointer and length are those of one live string.
        unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
    }
    terminal::restore();
    // SAFETY: _exit(2) is async-signal-safe and does not return.
    unsafe { libc::_exit(code) }
}

/// SIGTERM and SIGINT as a descriptor: readable when one came. They are blocked for this thread and all it starts.
pub struct Requests {
    fd: OwnedFd,
}

impl Requests {
    /// Once, before threads start.
    pub fn new() -> io::Result<Self> {
        let signals = [libc::SIGTERM, libc::SIGINT];
        for signal in signals {
            block_signal(signal).map_err(|error| io::Error::other(format!("{error:?}")))?;
        }
        let set = create_sigset(&signals)?;
        // SAFETY: `set` is an initialised set that outlives the call; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made, is valid (checked above) and owned by nobody else.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// The next signal that came, if any.
    pub fn take(&self) -> Option<libc::c_int> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer is `size` bytes long and lives through the call.
        let got = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if usize::try_from(got) != Ok(size) {
            return None;
        }
        // SAFETY: the kernel has written the whole structure (the length was checked above).
        let info = unsafe { info.assume_init() };
        libc::c_int::try_from(info.ssi_signo).ok()
    }
}

impl AsRawFd for Requests {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}
