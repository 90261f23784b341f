//! The way to the root file system for an image that has no initramfs of its own: what the kernel would do if there were none
//! at all. The disk that `root=` means is waited for and mounted, and becomes the root.
//!
//! It loads no modules, checks no file system, and assembles no disks out of others.

use std::ffi::{CString, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Access, access};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_move, unmount};
use rustix::process::{chdir, chroot};

use crate::changes::Changes;
use crate::command_line::CommandLine;
use crate::disks::Disk;
use crate::kernel::{self, Kernel};

/// How long a disk may take to appear; with `rootwait` on the command line, for ever.
const DISK_LIMIT: Duration = Duration::from_secs(30);

/// How often is looked for it, if the kernel announces nothing.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

const NEW: &str = "/berth/root";

/// Where the kernel looks for an init, in this order.
const INITS: [&str; 4] = ["/sbin/init", "/etc/init", "/bin/init", "/bin/sh"];

/// Mounts the root, makes it process 1's, and says which program is its init.
pub fn to_root(kernel: Kernel, command_line: &CommandLine) -> Result<OsString, String> {
    let root = command_line.value("root").ok_or(
        "the image has no initramfs with an /init, and the kernel command line has no root=: there is nothing to run",
    )?;
    let disk = Disk::parse(root)?;
    directory("/dev")?;
    mount("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, None::<&std::ffi::CStr>)
        .map_err(|error| format!("cannot mount /dev: {error}"))?;
    let device = wait_for(kernel, &disk, command_line.has("rootwait"))
        .ok_or_else(|| format!("there is no disk root={root}; there are: {}", disks(kernel)))?;
    directory(NEW)?;
    mount_root(kernel, command_line, &device)?;
    // Where a kernel that mounts the root itself puts it, too.
    let dev = Path::new(NEW).join("dev");
    if !dev.is_dir() || mount_move("/dev", &dev).is_err() {
        let _ = unmount("/dev", UnmountFlags::DETACH);
    }
    let switch = || {
        chdir(NEW)?;
        mount_move(".", "/")?;
        chroot(".")?;
        chdir("/")
    };
    switch().map_err(|error| format!("cannot make {} the root: {error}", device.display()))?;
    init(command_line)
}

fn directory(path: &str) -> Result<(), String> {
    fs::create_dir_all(path).map_err(|error| format!("cannot make {path}: {error}"))
}

fn wait_for(kernel: Kernel, disk: &Disk, for_ever: bool) -> Option<PathBuf> {
    let changes = Changes::new();
    let begin = Instant::now();
    loop {
        match disk.find(kernel) {
            Some(device) => return Some(device),
            None if !for_ever && begin.elapsed() > DISK_LIMIT => return None,
            None => changes.wait("/block/", LOOK_AGAIN),
        }
    }
}

fn disks(kernel: Kernel) -> String {
    let mut names = kernel::names(kernel.sys, "class/block");
    names.sort();
    if names.is_empty() { "none".into() } else { names.join(" ") }
}

/// With the kinds of file systems that the command line names, or all that the kernel knows.
fn mount_root(kernel: Kernel, command_line: &CommandLine, device: &Path) -> Result<(), String> {
    let kinds: Vec<String> = match command_line.value("rootfstype") {
        Some(kinds) => kinds.split(',').map(str::to_owned).collect(),
        None => {
            let known = kernel::read(kernel.proc, "filesystems").unwrap_or_default();
            // The usual one first, for which the kernel may have to load a module before it knows it.
            ["ext4"].into_iter().chain(on_disks(&known)).map(str::to_owned).collect()
        }
    };
    let options = CString::new(command_line.value("rootflags").unwrap_or_default())
        .map_err(|_| "rootflags has a zero byte".to_owned())?;
    let mut flags = if command_line.is_writable() { MountFlags::empty() } else { MountFlags::RDONLY };
    loop {
        let mut last = Errno::INVAL;
        for kind in &kinds {
            match mount(device, NEW, kind.as_str(), flags, options.as_c_str()) {
                Ok(()) => return Ok(()),
                Err(error @ (Errno::INVAL | Errno::NODEV)) => last = error,
                Err(error) => {
                    last = error;
                    break;
                }
            }
        }
        // A disk that cannot be written.
        if matches!(last, Errno::ACCESS | Errno::ROFS) && !flags.contains(MountFlags::RDONLY) {
            flags |= MountFlags::RDONLY;
            continue;
        }
        return Err(format!(
            "cannot mount {} as the root: {last}; tried as {}; rootfstype= names another",
            device.display(),
            kinds.join(", ")
        ));
    }
}

/// Those of /proc/filesystems that are on disks.
fn on_disks(known: &str) -> impl Iterator<Item = &str> {
    known.lines().filter(|line| !line.starts_with("nodev")).map(str::trim).filter(|kind| *kind != "ext4")
}

fn init(command_line: &CommandLine) -> Result<OsString, String> {
    if let Some(init) = command_line.value("init") {
        return Ok(init.into());
    }
    let found = INITS.iter().find(|path| access(**path, Access::EXEC_OK).is_ok());
    found.map(|path| path.into()).ok_or_else(|| {
        format!("the root has none of {}; init= on the kernel command line names another", INITS.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_without_a_disk_are_not_tried() {
        let known = "nodev\tsysfs\nnodev\tproc\n\text3\n\text4\n\tsquashfs\n";
        assert_eq!(on_disks(known).collect::<Vec<_>>(), ["ext3", "squashfs"]);
    }
}
