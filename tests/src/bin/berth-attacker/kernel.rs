//! Attempts on the kernel itself, on mounts and on namespaces.

use std::io;
use std::os::fd::AsFd;

use rustix::mount::{FsOpenFlags, MountFlags, OpenTreeFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use rustix::time::ClockId;

use crate::aims::Aims;
use crate::call::{at, call, negative, of, reached_or};
use crate::files::leaked;

pub fn mount(_: &Aims) -> io::Result<()> {
    Ok(rustix::mount::mount("none", "dev", "tmpfs", MountFlags::empty(), None)?)
}

pub fn fsopen(_: &Aims) -> io::Result<()> {
    Ok(rustix::mount::fsopen("tmpfs", FsOpenFlags::empty()).map(drop)?)
}

pub fn open_tree(_: &Aims) -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE;
    Ok(rustix::mount::open_tree(rustix::fs::CWD, ".", flags).map(drop)?)
}

pub fn umount(_: &Aims) -> io::Result<()> {
    Ok(rustix::mount::unmount("/", UnmountFlags::DETACH)?)
}

pub fn user_namespace(_: &Aims) -> io::Result<()> {
    unshare(UnshareFlags::NEWUSER)
}

pub fn mount_namespace(_: &Aims) -> io::Result<()> {
    unshare(UnshareFlags::NEWNS)
}

pub fn network_namespace(_: &Aims) -> io::Result<()> {
    unshare(UnshareFlags::NEWNET)
}

pub fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: unsafe only for UnshareFlags::FILES, which would leave OwnedFds of other threads behind: nobody here asks
    // for it.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

pub fn leaked_namespace(aims: &Aims) -> io::Result<()> {
    let namespace = leaked(aims.number("network-fd")?)?;
    Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
}

pub fn bpf(_: &Aims) -> io::Result<()> {
    const PROGRAM_LOAD: usize = 5;
    const SOCKET_FILTER: u32 = 1;
    // r0 = 0; exit.
    let program: [u64; 2] = [0xb7, 0x95];
    let license = *b"GPL\0";
    // The beginning of union bpf_attr; what is not given is zero.
    let mut attributes = [0_u64; 8];
    attributes[0] = u64::from(SOCKET_FILTER) | (program.len() as u64) << 32;
    attributes[1] = at(&program) as u64;
    attributes[2] = at(&license) as u64;
    call(libc::SYS_bpf, &[PROGRAM_LOAD, of(&mut attributes), size_of_val(&attributes)]).map(drop)
}

/// All processes on one processor, by the kernel's clock.
pub fn perf(_: &Aims) -> io::Result<()> {
    const SOFTWARE: u32 = 1;
    // The first version of struct perf_event_attr: type, size, and zeroes, which count the CPU's clock.
    let mut attributes = [0_u64; 8];
    attributes[0] = u64::from(SOFTWARE) | (size_of_val(&attributes) as u64) << 32;
    let (every_process, processor) = (negative(-1), 0);
    call(libc::SYS_perf_event_open, &[of(&mut attributes), every_process, processor, negative(-1)]).map(drop)
}

pub fn userfaultfd(_: &Aims) -> io::Result<()> {
    call(libc::SYS_userfaultfd, &[libc::O_CLOEXEC as usize]).map(drop)
}

pub fn load_module(_: &Aims) -> io::Result<()> {
    let (image, parameters) = ([0_u8; 64], [0_u8]);
    let loaded = call(libc::SYS_init_module, &[at(&image), image.len(), at(&parameters)]);
    reached_or(loaded, libc::ENOEXEC)
}

/// Asks for the next kernel to be forgotten, which takes the same right.
pub fn kexec(_: &Aims) -> io::Result<()> {
    call(libc::SYS_kexec_load, &[0, 0, 0, 0]).map(drop)
}

/// To what it is.
pub fn set_clock(_: &Aims) -> io::Result<()> {
    let now = rustix::time::clock_gettime(ClockId::Realtime);
    Ok(rustix::time::clock_settime(ClockId::Realtime, now)?)
}

/// To what it is.
pub fn set_host_name(_: &Aims) -> io::Result<()> {
    Ok(rustix::system::sethostname(rustix::system::uname().nodename().to_bytes())?)
}

pub fn swapoff(_: &Aims) -> io::Result<()> {
    reached_or(call(libc::SYS_swapoff, &[at(b"nowhere\0")]), libc::ENOENT)
}

/// How much of the log is unread.
pub fn kernel_log(_: &Aims) -> io::Result<()> {
    const SIZE_UNREAD: usize = 9;
    call(libc::SYS_syslog, &[SIZE_UNREAD]).map(drop)
}

pub fn io_port(_: &Aims) -> io::Result<()> {
    const DELAY_PORT: usize = 0x80;
    call(libc::SYS_ioperm, &[DELAY_PORT, 1, 1]).map(drop)
}
