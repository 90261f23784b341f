//! What is in a cell: the program, devices, the pid file; and when it becomes the VMM's.
//!
//! While we work in it, all of it is root's and closed to everyone else, also when the caller made it for the VMM's user:
//! that user may have processes, and must not see a half-made cell. It is handed over as the last thing.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::Access;

use crate::claim::{Claim, DEV, NET, PRIVATE, ROOT, RUN};
use crate::dir::{Dir, Node, Owner};
use crate::error::{During, Error, Result};
use crate::ids::User;

/// Mode of the VMM's program. Nobody writes to it, also not the VMM. Nor may it be read, for the kernel makes a process
/// that executes what it may not read one that other processes of its user's cannot trace, from its first instruction on.
const PROGRAM: u32 = 0o111;
/// Mode of the pid file: whoever gets there may read it.
const PID_FILE: u32 = 0o644;
/// Mode of the files that the host's nodes are mounted on.
const PLACE: u32 = 0o600;

/// What a VMM opens by path, from Documentation/admin-guide/devices.txt of Linux.
const KVM: Node = Node { name: "kvm", major: 10, minor: 232 };
const URANDOM: Node = Node { name: "urandom", major: 1, minor: 9 };
pub(crate) const TUN: Node = Node { name: "tun", major: 10, minor: 200 };
pub(crate) const VHOST_NET: Node = Node { name: "vhost-net", major: 10, minor: 238 };
const VHOST_NET_PATH: &str = "/dev/vhost-net";
/// Its minor number is the running kernel's choice.
const USERFAULTFD: &str = "userfaultfd";
/// The major number of the devices in /proc/misc.
const MISC: u32 = 10;

/// A program to be copied, opened and looked at.
///
/// # Errors
/// It is not a file, or nobody may execute it.
pub fn open_program(path: &Path) -> Result<File> {
    let shown = path.display();
    // A pipe of that name must not hold us up.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .during(|| format!("--exec-file {shown} cannot be opened"))?;
    let metadata = file.metadata().during(|| format!("--exec-file {shown}"))?;
    if !metadata.is_file() || metadata.mode() & 0o111 == 0 {
        return Err(Error::Refused(format!(
            "--exec-file {shown} is not an executable file; name the VMM's program"
        )));
    }
    Ok(file)
}

/// Copies the program. A copy of its own, because two cells must not share its pages, and because a link would be to a
/// file outside of the cell.
///
/// # Errors
/// There is something of its name in the cell, or the disk is full.
pub fn copy_program(mut program: File, root: &Dir, name: &OsStr) -> Result<()> {
    let mut copy = root.create(name, PROGRAM)?;
    io::copy(&mut program, &mut copy).during(|| format!("cannot copy --exec-file {name:?} into the cell"))?;
    Ok(())
}

/// The device number of /dev/userfaultfd, where the kernel has it.
fn userfaultfd() -> Option<Node> {
    // A host without /proc/misc is one without the device.
    let text = std::fs::read_to_string("/proc/misc").ok()?;
    let minor = misc_minor(&text, USERFAULTFD)?;
    Some(Node { name: USERFAULTFD, major: MISC, minor })
}

fn misc_minor(misc: &str, name: &str) -> Option<u32> {
    misc.lines().find_map(|line| {
        let (minor, found) = line.trim().split_once(' ')?;
        (found.trim() == name).then(|| minor.parse().ok())?
    })
}

/// Where the cell gets its devices from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Devices {
    /// Nodes of its own, which only root can make.
    Own,
    /// The host's nodes, mounted on empty files.
    Hosts,
}

/// A cell that is ready but for its pid file, and still ours.
#[derive(Debug)]
pub struct Cell {
    root: Dir,
    /// The directories in it.
    inner: [Dir; 3],
    /// Paths of the host's nodes, each to be mounted on the file of the same path in the cell.
    pub to_mount: Vec<PathBuf>,
}

/// Puts devices into the directories of a cell; /dev/vhost-net only where it is asked for, since it is more of the kernel
/// than a VMM needs.
///
/// # Errors
/// One cannot be made; or the caller may not use KVM, where the host's nodes are used.
pub fn furnish(claim: &Claim, devices: Devices, vhost_net: bool, user: &User) -> Result<Cell> {
    let [dev, net, run] = [claim.directory(DEV)?, claim.directory(NET)?, claim.directory(RUN)?];
    let mut to_mount = Vec::new();
    match devices {
        Devices::Own => {
            let vhost_net = vhost_net.then_some(VHOST_NET);
            for node in [Some(KVM), Some(URANDOM), userfaultfd(), vhost_net].into_iter().flatten() {
                dev.create_node(node, user.uid, user.gid)?;
            }
            net.create_node(TUN, user.uid, user.gid)?;
        }
        Devices::Hosts => {
            let places = [
                (&dev, "/dev/kvm"),
                (&dev, "/dev/urandom"),
                (&dev, "/dev/userfaultfd"),
                (&net, "/dev/net/tun"),
            ];
            let vhost_net = vhost_net.then_some((&dev, VHOST_NET_PATH));
            for (directory, path) in places.into_iter().filter(|(_, path)| is_usable(path)).chain(vhost_net) {
                let path = PathBuf::from(path);
                directory.create(path.file_name().unwrap_or_default(), PLACE)?;
                to_mount.push(path);
            }
        }
    }
    Ok(Cell { root: claim.directory(ROOT)?, inner: [net, dev, run], to_mount })
}

/// Refuses an ordinary user who may not use KVM.
///
/// # Errors
/// The kernel's answer to that user.
pub fn check_kvm() -> Result<()> {
    rustix::fs::access("/dev/kvm", Access::READ_OK | Access::WRITE_OK).during(|| {
        "--rootless: you may not use /dev/kvm; join the group it belongs to (kvm), and log in anew".into()
    })
}

/// Refuses an ordinary user who asks for the kernel's back-end of networks and may not use it.
///
/// # Errors
/// The kernel's answer to that user.
pub fn check_vhost_net() -> Result<()> {
    rustix::fs::access(VHOST_NET_PATH, Access::READ_OK | Access::WRITE_OK).during(|| {
        format!(
            "--vhost-net: you may not use {VHOST_NET_PATH}; is the module vhost_net loaded, and are you in the group that \
             the file belongs to (kvm)?"
        )
    })
}

fn is_usable(path: &str) -> bool {
    rustix::fs::access(path, Access::READ_OK | Access::WRITE_OK).is_ok()
}

impl Cell {
    /// The directory that is to be all there is.
    pub fn root(&self) -> &Dir {
        &self.root
    }

    /// Writes the number of the VMM's process, as it is outside of the cell, into `<program>.pid`: without a line end, as
    /// Firecracker's jailer does.
    ///
    /// # Errors
    /// There is a pid file, or something else of its name.
    pub fn write_pid(&self, program: &OsStr, pid: u32) -> Result<()> {
        let mut name = program.to_owned();
        name.push(".pid");
        let mut file = self.root.create(&name, PID_FILE)?;
        file.write_all(pid.to_string().as_bytes()).during(|| format!("cannot write the pid file {name:?}"))
    }

    /// Makes the directories the VMM's. From here on nothing in them can be relied on.
    ///
    /// # Errors
    /// As fchown(2).
    pub fn hand_over(&self, user: &User) -> Result<()> {
        let owner = Owner { uid: user.uid, gid: user.gid, mode: PRIVATE };
        // The root last: as long as it is closed, so is all of it.
        self.inner.iter().chain([&self.root]).try_for_each(|directory| directory.give_to(owner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_number_of_a_misc_device_is_found_by_its_whole_name() {
        let misc = "257 userfaultfd\n126 userfaultfd2\n232 kvm\n";
        assert_eq!(misc_minor(misc, "userfaultfd"), Some(257));
        assert_eq!(misc_minor(misc, "kvm"), Some(232));
        assert_eq!(misc_minor(misc, "fault"), None);
        assert_eq!(misc_minor("", "kvm"), None);
        assert_eq!(misc_minor("x kvm\n", "kvm"), None);
    }

    #[test]
    fn a_program_is_an_executable_file() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("vmm");
        assert!(open_program(&path).unwrap_err().to_string().contains("--exec-file"));
        fs::write(&path, "x").unwrap();
        assert!(open_program(&path).unwrap_err().to_string().contains("not an executable file"));
        assert!(open_program(place.path()).unwrap_err().to_string().contains("not an executable file"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(open_program(&path).is_ok());
    }

    #[test]
    fn the_program_is_copied_under_its_name_and_never_over_something() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("source");
        fs::write(&path, "program").unwrap();
        let root = Dir::open(place.path()).unwrap();
        copy_program(File::open(&path).unwrap(), &root, OsStr::new("vmm")).unwrap();
        assert_eq!(fs::read(place.path().join("vmm")).unwrap(), b"program");
        assert!(copy_program(File::open(&path).unwrap(), &root, OsStr::new("vmm")).is_err());
    }
}
