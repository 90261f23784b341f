//! What the process as a whole gives up in its first moments, before it has opened a file or started a thread: what it was
//! handed without being asked, and what it could ever gain.
//!
//! Nothing here depends on who started us: what a jailer has taken already is taken again.

use std::ffi::{CStr, c_char};
use std::io;
use std::os::fd::RawFd;

/// Takes from this process what it does not need: descriptors that are not in `kept` and no standard streams, the
/// environment, core dumps, other processes' eyes, and all that an exec could give. Once, before anything is opened.
///
/// # Errors
/// The kernel is older than 5.9, or standard input, output or error is closed and there is no /dev/null in its place.
pub fn strip(kept: &[RawFd]) -> io::Result<()> {
    fill_standard_streams()?;
    close_others(kept)?;
    forget_environment();
    no_core_dumps();
    // Kept over everything that follows: no program that this process could start has more rights than it has.
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
    // No core dumps, whatever they go to, and no process of the same user may trace this one or read its memory. Its
    // directory in /proc is root's from here on.
    prctl(libc::PR_SET_DUMPABLE, 0)
}

/// A closed standard stream would become the number of the first file that is opened, and a guest's disk would get what is
/// meant for the terminal.
fn fill_standard_streams() -> io::Result<()> {
    let asked = |fd| libc::pollfd { fd, events: 0, revents: 0 };
    let mut streams = [libc::STDIN_FILENO, libc::STDOUT_FILENO, libc::STDERR_FILENO].map(asked);
    // SAFETY: poll writes to three pollfds, which `streams` holds, and does not wait.
    if unsafe { libc::poll(streams.as_mut_ptr(), streams.len() as libc::nfds_t, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    for _ in streams.iter().filter(|stream| stream.revents & libc::POLLNVAL != 0) {
        // The lowest number that is free, which is the first of those that are missing.
        // SAFETY: the path is a string that ends with NUL.
        if unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn close_others(kept: &[RawFd]) -> io::Result<()> {
    let mut kept: Vec<_> = kept.iter().filter_map(|fd| libc::c_uint::try_from(*fd).ok()).collect();
    kept.sort_unstable();
    let mut first = libc::STDERR_FILENO as libc::c_uint + 1;
    for fd in kept {
        close(first..fd)?;
        first = fd.saturating_add(1);
    }
    close(first..libc::c_uint::MAX)
}

fn close(range: std::ops::Range<libc::c_uint>) -> io::Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    // SAFETY: closing a descriptor takes it away from whoever owns it. Nothing in this process has opened one yet, as the
    // caller of `strip` was told, and those that were handed over are not in the ranges.
    match unsafe { libc::close_range(range.start, range.end - 1, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What a caller has in its environment may be a secret, and is nothing that this program needs: it goes by its command
/// line. Overwritten, so that it is not in this process's memory either.
fn forget_environment() {
    unsafe extern "C" {
        static mut environ: *mut *mut c_char;
    }
    // SAFETY: `environ` is the C library's list of strings, ended by a null pointer, or itself null. All of it is writable
    // memory that this process owns (the initial stack), and no other thread exists that could read it.
    unsafe {
        let mut entry = environ;
        while !entry.is_null() && !(*entry).is_null() {
            let text = *entry;
            text.write_bytes(0, CStr::from_ptr(text).to_bytes().len());
            *entry = std::ptr::null_mut();
            entry = entry.add(1);
        }
    }
}

/// As the jailer does: no file is as small as one byte, and where cores go to a program by a pipe, 1 is taken for none.
fn no_core_dumps() {
    let one = libc::rlimit { rlim_cur: 1, rlim_max: 1 };
    // SAFETY: setrlimit reads the structure that `one` is. A hard limit of 0 cannot be raised to 1 and is as good.
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &one) };
}

fn prctl(option: libc::c_int, value: libc::c_ulong) -> io::Result<()> {
    const NONE: libc::c_ulong = 0;
    // SAFETY: both options in use take a number and touch no memory.
    match unsafe { libc::prctl(option, value, NONE, NONE, NONE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
