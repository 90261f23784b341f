//! The mount namespace of a cell: one directory is all there is.
//!
//! Nothing is mounted in it, neither /proc nor /sys; what the caller mounted below the directory stays.

use rustix::fs::{CWD, StatVfsMountFlags};
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount, open_tree,
    unmount,
};
use rustix::process::{chdir, fchdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};
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

/// Makes this directory the root of all that this process sees, in a mount namespace of its own. The directory is given
/// back as it is there.
///
/// # Errors
/// The process is not root, or its root is one that cannot be left, such as an initramfs.
pub fn enter(root: Dir) -> Result<Dir> {
    // The way into the new namespace is the working directory: the kernel moves that along, and no open descriptor.
    fchdir(&root).during(|| format!("cannot go to {}", root.path().display()))?;
    drop(root);
    // SAFETY: unsafe only for UnshareFlags::FILES, which would leave OwnedFds of other threads behind: it is not set.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.during(|| "cannot make a mount namespace".into())?;
    // What is mounted and unmounted here from now on stays here.
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .during(|| "cannot cut the mount namespace off from the host's".into())?;
    // pivot_root(2) wants a mount; bound onto itself, the directory is one. What is mounted below it comes along.
    let tree =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::AT_RECURSIVE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let bound = open_tree(CWD, ".", tree).during(|| "cannot bind the root of the cell".into())?;
    move_mount(&bound, "", CWD, ".", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .during(|| "cannot mount the root of the cell".into())?;
    fchdir(&bound).during(|| "cannot go to the root of the cell".into())?;
    // The old root is put on top of the new one, so that no directory is needed to hold it, and taken off.
    pivot_root(".", ".").during(|| "cannot change to the root of the cell".into())?;
    unmount(".", UnmountFlags::DETACH).during(|| "cannot leave the host's root".into())?;
    chdir("/").during(|| "cannot go to the root of the cell".into())?;
    Dir::open(Path::new("/"))
}
