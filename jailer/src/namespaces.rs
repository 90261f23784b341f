//! The namespaces of a cell but for those of mounts (`mounts`), users (`ids`) and processes (`family`): what the VMM could
//! see of the host, and the host's other processes of it, without a file between them.
//!
//! The time namespace stays the host's: it hides nothing, it only moves clocks.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::system::sethostname;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::error::{During, Result};

/// Opens a network namespace's file.
///
/// # Errors
/// As open(2).
pub fn open_network(path: &Path) -> Result<File> {
    File::open(path).during(|| format!("--netns {} cannot be opened", path.display()))
}

/// Enters a network namespace.
///
/// # Errors
/// It is none.
pub fn enter_network(network: &File) -> Result<()> {
    move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
        .during(|| "--netns: cannot enter the network namespace".into())
}

/// Leaves the host's System V and POSIX message queues and shared memory; its name, in place of which there is the
/// cell's; and its view of control groups, of which the one we are in becomes the root. Call in that group.
///
/// # Errors
/// The host lets nobody have more namespaces.
pub fn leave_host(id: &str) -> Result<()> {
    let flags = UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWCGROUP;
    // SAFETY: unsafe only for UnshareFlags::FILES, which would leave OwnedFds of other threads behind: it is not set.
    unsafe { unshare_unsafe(flags) }.during(|| {
        "cannot make an IPC, a UTS and a control group namespace; the host may have too many (user.max_*_namespaces)".into()
    })?;
    sethostname(id.as_bytes()).during(|| "cannot name the cell".into())
}
