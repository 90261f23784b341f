//! A cell like the jailer's, from which layers can be left out, to show what each was good for.
//!
//! It shares no code with the jailer, and none of its care: nobody is in its way. What the caller's side of the exec would
//! do, dropping the environment, is for whoever starts this program.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;

use berth_tests::attack::Layer;
use rustix::fs::{CWD, Gid, Uid};
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount, open_tree,
    unmount,
};
use rustix::process::{Resource, Rlimit, WaitOptions, chroot, fchdir, pivot_root, setrlimit, waitpid};
use rustix::thread::{CapabilitySet, CapabilitySets, LinkNameSpaceType, UnshareFlags};

use crate::aims::Aims;
use crate::call::call;
use crate::fork;
use crate::kernel::unshare;

/// Builds the cell around this process, but for the layers that `without` names. The working directory is its root,
/// whether that is the process's root or not.
pub fn enter(aims: &Aims) -> io::Result<()> {
    let missing: BTreeSet<_> = aims.text("without")?.split(',').filter_map(Layer::named).collect();
    let has = |layer| !missing.contains(&layer);
    let user: u32 = aims.number("user")?;

    if has(Layer::Session) {
        leave_by_fork()?;
        rustix::process::setsid()?;
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    }
    if has(Layer::Descriptors) {
        call(libc::SYS_close_range, &[3, u32::MAX as usize, 0])?;
    }
    if has(Layer::Keyring) {
        call(libc::SYS_keyctl, &[libc::KEYCTL_JOIN_SESSION_KEYRING as usize, 0])?;
    }
    if has(Layer::Network) {
        let network = File::open(aims.text("network")?)?;
        rustix::thread::move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
    }
    if has(Layer::Limits) {
        limit(Resource::Nofile, aims.number("files")?)?;
        limit(Resource::Fsize, aims.number("file-bytes")?)?;
        limit(Resource::Core, 1)?;
    }
    if has(Layer::Group) {
        fs::write(aims.text("group")?, std::process::id().to_string())?;
    }
    std::env::set_current_dir(aims.text("root")?)?;
    if has(Layer::Ipc) {
        unshare(UnshareFlags::NEWIPC)?;
    }
    if has(Layer::Root) {
        change_root(has(Layer::Chroot))?;
    }
    if has(Layer::Pids) {
        unshare(UnshareFlags::NEWPID)?;
        leave_by_fork()?;
    }
    if has(Layer::Capabilities) {
        empty_bounding_set()?;
    }
    if has(Layer::User) {
        let (user, group) = (Uid::from_raw(user), Gid::from_raw(user));
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(group, group, group)?;
        rustix::thread::set_thread_res_uid(user, user, user)?;
    }
    if has(Layer::Capabilities) {
        let none = CapabilitySet::empty();
        let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
        rustix::thread::set_capabilities(None, sets)?;
    }
    if has(Layer::NoNewPrivileges) {
        rustix::thread::set_no_new_privs(true)?;
    }
    Ok(())
}

/// Goes on in a child; the parent ends as that does.
fn leave_by_fork() -> io::Result<()> {
    let Some(child) = fork()? else { return Ok(()) };
    let ended = waitpid(Some(child), WaitOptions::empty())?;
    std::process::exit(ended.and_then(|(_, status)| status.exit_status()).unwrap_or(1))
}

/// Makes the working directory the root, in a mount namespace of its own.
fn change_root(with_chroot: bool) -> io::Result<()> {
    unshare(UnshareFlags::NEWNS)?;
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let [outer, inner] = [open_tree(CWD, ".", flags)?, open_tree(CWD, ".", flags)?];
    move_mount(&outer, "", CWD, ".", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    fchdir(&outer)?;
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    std::env::set_current_dir("/")?;
    if with_chroot {
        move_mount(&inner, "", CWD, "dev", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        fchdir(&inner)?;
        chroot(".")?;
        std::env::set_current_dir("/")?;
    }
    Ok(())
}

fn limit(resource: Resource, value: u64) -> io::Result<()> {
    Ok(setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })?)
}

fn empty_bounding_set() -> io::Result<()> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::capability_is_in_bounding_set(capability) {
            Ok(true) => rustix::thread::remove_capability_from_bounding_set(capability)?,
            Ok(false) => {}
            // The kernel's list ends here.
            Err(_) => break,
        }
    }
    Ok(())
}
