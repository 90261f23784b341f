//! The mount namespace of a cell: one directory is all there is.
//!
//! Nothing is mounted in it, neither /proc nor /sys; what the caller mounted below the directory stays. The directory is
//! there twice: as the root of the namespace, and mounted on an entry of itself, where the process is put by `chroot`.
//! That adds nothing to see, also for who gets out of the chroot. It is for the kernel, which makes no user namespace for a
//! process whose root is not that of its mount namespace: an ordinary user in a cell could otherwise have all
//! capabilities again, over namespaces of his own, and with them the part of the kernel that only they reach.

use rustix::fs::{CWD, StatVfsMountFlags};
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount, open_tree,
    unmount,
};
use rustix::process::{chdir, chroot, fchdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use std::os::fd::OwnedFd;
use std::path::Path;

use crate::dir::Dir;
use crate::error::{During, Error, Result};

/// Refuses a directory on a file system where neither the VMM nor its devices would work.
///
/// # Errors
/// It is mounted `nodev` or `noexec`.
pub fn check(dir: &Dir) -> Result<()> {
    let path = dir.path().display();
    let flags = rustix::fs::fstatvfs(dir).during(|| format!("cannot look at {path}"))?.f_flag;
    for (flag, name) in [(StatVfsMountFlags::NODEV, "nodev"), (StatVfsMountFlags::NOEXEC, "noexec")] {
        if flags.contains(flag) {
            return Err(Error::Refused(format!(
                "{path} is on a file system mounted {name}, where a VMM cannot run; give a --chroot-base-dir elsewhere"
            )));
        }
    }
    Ok(())
}

/// The entry of the root that the root is mounted on once more. A cell has it in any case.
const INNER: &str = "dev";

/// Makes this directory the root of all that this process sees, in mount and IPC namespaces of its own. The directory is
/// given back as it is there.
///
/// # Errors
/// The process is not root, or its root is one that cannot be left, such as an initramfs.
pub fn enter(root: Dir) -> Result<Dir> {
    root.enter_or_make(INNER, 0o700)?;
    // The way into the new namespace is the working directory: the kernel moves that along, and no open descriptor.
    fchdir(&root).during(|| format!("cannot go to {}", root.path().display()))?;
    drop(root);
    // SAFETY: unsafe only for UnshareFlags::FILES, which would leave OwnedFds of other threads behind: it is not set.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWIPC) }
        .during(|| "cannot make a mount and an IPC namespace".into())?;
    // What is mounted and unmounted here from now on stays here.
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .during(|| "cannot cut the mount namespace off from the host's".into())?;
    // pivot_root(2) wants a mount; bound onto itself, the directory is one. What is mounted below it comes along.
    let (outer, inner) = (bind()?, bind()?);
    attach(&outer, ".")?;
    fchdir(&outer).during(|| "cannot go to the root of the cell".into())?;
    // The old root is put on top of the new one, so that no directory is needed to hold it, and taken off.
    pivot_root(".", ".").during(|| "cannot change to the root of the cell".into())?;
    unmount(".", UnmountFlags::DETACH).during(|| "cannot leave the host's root".into())?;
    chdir("/").during(|| "cannot go to the root of the cell".into())?;
    attach(&inner, INNER)?;
    fchdir(&inner).during(|| "cannot go to the root of the cell".into())?;
    chroot(".").during(|| "cannot change to the root of the cell".into())?;
    Dir::open(Path::new("/"))
}

/// The working directory as a mount that is nowhere yet.
fn bind() -> Result<OwnedFd> {
    let tree =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::AT_RECURSIVE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, ".", tree).during(|| "cannot bind the root of the cell".into())
}

fn attach(mount: &OwnedFd, place: &str) -> Result<()> {
    move_mount(mount, "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .during(|| "cannot mount the root of the cell".into())
}
