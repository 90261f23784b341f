//! Processes that do not outlive this one, and this process's own signals.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::io::FdFlags;
use rustix::process::Signal;

/// Descriptors for a child are moved above this number, clear of any that the child opens by itself.
const FIRST_PASSED_FD: i32 = 64;

/// A duplicate of a descriptor for [`spawn_bound`] to pass on; its number is the same in the child.
pub fn passable(fd: impl AsFd) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, FIRST_PASSED_FD)?)
}

/// Starts a process in a session of its own, where a key pressed on our terminal does not reach it, and which the
/// kernel kills when the **calling thread** ends, however it ends. `passed` stays open in it.
pub fn spawn_bound(command: &mut Command, passed: Vec<OwnedFd>) -> io::Result<Child> {
    let parent = rustix::process::getpid();
    let enter = move || {
        rustix::process::setsid()?;
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        if rustix::process::getppid() != Some(parent) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        for fd in &passed {
            rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed: `enter` makes bare system calls, and its
    // error is built without allocating.
    unsafe { command.pre_exec(enter) }.spawn()
}

/// Lets a process start as the leader of a session of its own: signals can be sent to it and all its children, and a key
/// pressed on our terminal does not reach it. With `controls_terminal` its standard input is the session's terminal.
pub fn in_session(command: &mut Command, controls_terminal: bool) -> &mut Command {
    let enter = move || {
        rustix::process::setsid()?;
        if controls_terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed: `enter` makes two bare system calls and
    // neither allocates nor locks.
    unsafe { command.pre_exec(enter) }
}

/// Waits for a child to end, but no longer than `limit`. False when it still runs.
pub fn wait_for(child: &mut Child, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    false
}

/// Signals that ask this process to end.
pub const ENDING: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// The terminal has changed its size.
pub const RESIZED: i32 = libc::SIGWINCH;

/// From now on the signals of [`ENDING`] and [`RESIZED`] wait for [`next_signal`]. Call before any thread is started.
pub fn hold_signals() {
    let set = held_signals();
    // SAFETY: `set` is initialised by `held_signals`; a null pointer says that the old mask is not wanted.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}

/// Waits for one of the signals that [`hold_signals`] holds.
pub fn next_signal() -> i32 {
    let (set, mut signal) = (held_signals(), 0);
    loop {
        // SAFETY: `set` is initialised by `held_signals` and `signal` is a live integer to write to.
        if unsafe { libc::sigwait(&raw const set, &raw mut signal) } == 0 {
            return signal;
        }
    }
}

fn held_signals() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the whole set, so it is initialised from there on; sigaddset gets valid numbers.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in ENDING.into_iter().chain([RESIZED]) {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

/// Sends SIGKILL; for a child that may have ended already.
pub fn kill(child: &mut Child) {
    // It fails only for a process that was waited for, which is as dead as it can be.
    let _ = child.kill();
    let _ = child.wait();
}

/// The number of a descriptor, as a program's argument.
pub fn number(fd: &OwnedFd) -> String {
    fd.as_raw_fd().to_string()
}
