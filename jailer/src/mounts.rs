//! The mount namespace of a cell: one directory is all there is.
//!
//! Nothing is mounted in it, neither /proc nor /sys; what the caller mounted below the directory stays. The directory is
//! there twice: as the root of the namespace, and mounted on an entry of itself, [`INNER`], where the process is put by `chroot`.
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
use std::path::{Path, PathBuf};

use crate::dir::Dir;
use crate::error::{During, Error, Result};

/// Refuses a directory on a file system where the VMM would not work, or its device nodes, if it is to have `own_nodes`.
///
/// # Errors
/// It is mounted `noexec` or `nodev`.
pub fn check(dir: &Dir, own_nodes: bool) -> Result<()> {
    let path = dir.path().display();
    let flags = rustix::fs::fstatvfs(dir).during(|| format!("cannot look at {path}"))?.f_flag;
    let wrong = [(StatVfsMountFlags::NOEXEC, true, "noexec"), (StatVfsMountFlags::NODEV, own_nodes, "nodev")];
    match wrong.iter().find(|(flag, matters, _)| *matters && flags.contains(*flag)) {
        None => Ok(()),
        Some((_, _, name)) => Err(Error::Refused(format!(
            "{path} is on a file system mounted {name}, where a VMM cannot run; give a --chroot-base-dir elsewhere"
        ))),
    }
}

/// The entry of the root that the root is mounted on once more. A cell has it in any case.
const INNER: &str = "dev";

/// Makes this directory the root of all that this process sees, in a mount namespace of its own. `devices` are device
/// nodes of the host's, each to be mounted on the file that has its path in the directory.
///
/// # Errors
/// The process may not mount, or its root is one that cannot be left, such as an initramfs.
pub fn enter(root: &Dir, devices: &[PathBuf]) -> Result<()> {
    // The way into the new namespace is the working directory: the kernel moves that along, and no open descriptor.
    fchdir(root).during(|| format!("cannot go to {}", root.path().display()))?;
    // SAFETY: unsafe only for UnshareFlags::FILES, which would leave OwnedFds of other threads behind: it is not set.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.during(|| "cannot make a mount namespace".into())?;
    // What is mounted and unmounted here from now on stays here.
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .during(|| "cannot cut the mount namespace off from the host's".into())?;
    let devices: Vec<_> = devices.iter().map(|path| Ok((detached(path)?, path))).collect::<Result<_>>()?;
    // pivot_root(2) wants a mount; bound onto itself, the directory is one. What is mounted below it comes along.
    let (outer, inner) = (detached(Path::new("."))?, detached(Path::new("."))?);
    attach(&outer, Path::new("."))?;
    fchdir(&outer).during(|| "cannot go to the root of the cell".into())?;
    // The old root is put on top of the new one, so that no directory is needed to hold it, and taken off.
    pivot_root(".", ".").during(|| "cannot change to the root of the cell".into())?;
    unmount(".", UnmountFlags::DETACH).during(|| "cannot leave the host's root".into())?;
    chdir("/").during(|| "cannot go to the root of the cell".into())?;
    attach(&inner, Path::new(INNER))?;
    fchdir(&inner).during(|| "cannot go to the root of the cell".into())?;
    chroot(".").during(|| "cannot change to the root of the cell".into())?;
    devices.iter().try_for_each(|(device, path)| attach(device, path))
}

/// Takes apart what keeps the directory in use, so that it can be removed: for who was put there by [`enter`] and stays.
///
/// # Errors
/// As umount(2).
pub fn loosen() -> Result<()> {
    unmount("/", UnmountFlags::DETACH).during(|| "cannot unmount the cell".into())
}

/// A file or a directory, with what is mounted below it, as a mount that is nowhere yet.
fn detached(path: &Path) -> Result<OwnedFd> {
    let tree =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::AT_RECURSIVE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, path, tree).during(|| format!("cannot bind {} into the cell", path.display()))
}

fn attach(mount: &OwnedFd, place: &Path) -> Result<()> {
    move_mount(mount, "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .during(|| format!("cannot mount on {} in the cell", place.display()))
}
