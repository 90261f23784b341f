//! Which root is process 1's now: at first that of the initramfs, later the guest's own file system.
//!
//! The agent itself stays where it was born. Each thread that does something for the host enters the root that process 1 has
//! at this moment, so that paths mean what they mean to the guest.

use std::io;

use rustix::fs::{Mode, OFlags, fstat, openat, readlinkat};
use rustix::process::{chroot, fchdir};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::command_line::CommandLine;
use crate::kernel::Kernel;

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// From now on this thread, and what it starts, has process 1's root as its own. Not for the first thread.
pub fn enter(kernel: Kernel) -> io::Result<()> {
    // SAFETY: of what a thread can stop sharing this is but its root, working directory and umask: no descriptor that another
    // thread holds changes its meaning. The flag says so.
    unsafe { unshare_unsafe(UnshareFlags::FS) }?;
    let root = openat(kernel.proc, "1/root", DIRECTORY, Mode::empty())?;
    let own = readlinkat(kernel.proc, "self/ns/mnt", Vec::new())?;
    if readlinkat(kernel.proc, "1/ns/mnt", Vec::new())? != own {
        let mounts = openat(kernel.proc, "1/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&mounts), Some(LinkNameSpaceType::Mount))?;
    }
    fchdir(&root)?;
    Ok(chroot(".")?)
}

/// Process 1 has left the initramfs, or never will: it has not been told of a root, by the kernel command line or by the file
/// that marks an initramfs of systemd's. Call in a thread that has not entered any root.
pub fn is_ready(kernel: Kernel) -> io::Result<bool> {
    let root = openat(kernel.proc, "1/root", DIRECTORY, Mode::empty())?;
    let root = fstat(root)?;
    if kernel.first_root != Some((root.st_dev, root.st_ino)) {
        return Ok(true);
    }
    let command_line = CommandLine::parse(&kernel.command_line()?);
    Ok(command_line.value("root").is_none() && !std::path::Path::new("/etc/initrd-release").exists())
}
