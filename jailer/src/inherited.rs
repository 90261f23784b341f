//! What the caller of this process left in it, and the VMM must not have.

use std::os::fd::RawFd;

use crate::error::{During, Result};

/// Closes every descriptor but standard input, output and error, and these. Before any other is opened.
///
/// # Errors
/// The kernel is older than 5.9.
pub fn close_descriptors(but: &[RawFd]) -> Result<()> {
    let mut kept: Vec<_> = but.iter().filter_map(|number| libc::c_uint::try_from(*number).ok()).collect();
    kept.sort_unstable();
    let mut first = 3;
    for number in kept {
        close_range(first, number.saturating_sub(1))?;
        first = number.saturating_add(1);
    }
    close_range(first, libc::c_uint::MAX)
}

/// Both ends are in the range; one that ends before it begins is empty.
fn close_range(first: libc::c_uint, last: libc::c_uint) -> Result<()> {
    if last < first {
        return Ok(());
    }
    // SAFETY: closing a descriptor takes it away from whoever owns it. Nothing here has opened one yet, as the caller
    // was told, and what the caller of this process left open has no owner here.
    let closed = unsafe { libc::close_range(first, last, 0) };
    match closed {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()).during(|| "cannot close inherited descriptors".into()),
    }
}

/// Leaves the caller's session keyring for a new, empty one: who has a session's keyring may use the keys in it, as any
/// user.
///
/// # Errors
/// The user has too many keyrings.
pub fn leave_keyring() -> Result<()> {
    // SAFETY: the call takes the name of a keyring, where a null pointer stands for one without a name, and touches no
    // memory.
    let joined =
        unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<u8>()) };
    match std::io::Error::last_os_error() {
        // A kernel without keys has none to leave.
        error if joined < 0 && error.raw_os_error() != Some(libc::ENOSYS) => {
            Err(error).during(|| "cannot leave the caller's keyring".into())
        }
        _ => Ok(()),
    }
}

/// Takes back what the caller may have ordered, that children vanish when they end: we look at ours afterwards, and the
/// VMM begins like any other program.
pub fn notice_children() {
    // SAFETY: SIGCHLD is a signal's number, and its default action is no handler that could be called.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}
