//! The directory that is the cell's root: how it is made, what is put into it, and when it becomes the VMM's.
//!
//! While we work in it, all of it is root's and closed to everyone else, also when the caller made it for the VMM's user:
//! that user may have processes, and must not see a half-made cell. It is handed over as the last thing.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{Gid, Uid};

use crate::dir::{Dir, Node};
use crate::error::{During, Error, Result};
use crate::mounts;

/// Mode of the directories above the root: the VMM's user comes through to its files.
const PASSAGE: u32 = 0o755;
/// Mode of the root and of all directories in it.
const PRIVATE: u32 = 0o700;
/// Mode of the VMM's program: nobody writes to it, also not the VMM.
const PROGRAM: u32 = 0o555;
/// Mode of the pid file: whoever gets there may read it.
const PID_FILE: u32 = 0o644;

/// What a VMM opens by path, from Documentation/admin-guide/devices.txt of Linux.
const KVM: Node = Node { name: "kvm", major: 10, minor: 232 };
const URANDOM: Node = Node { name: "urandom", major: 1, minor: 9 };
const TUN: Node = Node { name: "tun", major: 10, minor: 200 };
/// Its minor number is the running kernel's choice.
const USERFAULTFD: &str = "userfaultfd";
/// The major number of the devices in /proc/misc.
const MISC: u32 = 10;

/// Makes `<base>/<program>/<id>/root`, or takes it if it is there, and closes it to everyone but root.
///
/// # Errors
/// The base is none, or a part of the rest is there and is not a directory.
pub fn make_root(base: &Path, program: &OsStr, id: &str) -> Result<Dir> {
    let base = Dir::open(base).map_err(|error| {
        Error::Refused(format!("--chroot-base-dir: {error}; make it first, as a directory of root's"))
    })?;
    mounts::check(&base)?;
    let root =
        base.enter_or_make(program, PASSAGE)?.enter_or_make(id, PASSAGE)?.enter_or_make("root", PRIVATE)?;
    mounts::check(&root)?;
    take(&root)?;
    Ok(root)
}

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

/// The device number of /dev/userfaultfd, where the kernel has it. Call while /proc is there.
pub fn userfaultfd() -> Option<Node> {
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

/// A cell that is ready but for its pid file, and still root's.
#[derive(Debug)]
pub struct Cell {
    root: Dir,
    /// The directories in it.
    inner: [Dir; 3],
}

/// Makes what the VMM finds in an otherwise empty root: devices of its user's, and room for the API socket.
///
/// # Errors
/// One of the devices is there already.
pub fn furnish(root: Dir, userfaultfd: Option<Node>, uid: Uid, gid: Gid) -> Result<Cell> {
    let dev = private(&root, "dev")?;
    let net = private(&dev, "net")?;
    // The API socket's usual place.
    let run = private(&root, "run")?;
    for node in [Some(KVM), Some(URANDOM), userfaultfd].into_iter().flatten() {
        dev.create_node(node, uid, gid)?;
    }
    net.create_node(TUN, uid, gid)?;
    Ok(Cell { root, inner: [net, dev, run] })
}

impl Cell {
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
    pub fn hand_over(self, uid: Uid, gid: Gid) -> Result<()> {
        // The root last: as long as it is closed, so is all of it.
        self.inner.iter().chain([&self.root]).try_for_each(|directory| directory.give_to(uid, gid, PRIVATE))
    }
}

fn private(parent: &Dir, name: &str) -> Result<Dir> {
    let directory = parent.enter_or_make(name, PRIVATE)?;
    take(&directory)?;
    Ok(directory)
}

fn take(directory: &Dir) -> Result<()> {
    directory.give_to(Uid::ROOT, Gid::ROOT, PRIVATE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

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

    #[test]
    fn the_root_is_made_where_callers_expect_it_and_is_closed() {
        let place = tempfile::tempdir().unwrap();
        if !can_make_cells(place.path()) {
            return;
        }
        make_root(place.path(), OsStr::new("vmm"), "one").unwrap();
        let root = place.path().join("vmm/one/root");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&root), 0o700);
        // What a caller prepared is taken over.
        rustix::fs::chown(&root, Some(Uid::from_raw(1234)), None).unwrap();
        fs::set_permissions(&root, fs::Permissions::from_mode(0o777)).unwrap();
        make_root(place.path(), OsStr::new("vmm"), "one").unwrap();
        assert_eq!((mode(&root), fs::metadata(&root).unwrap().uid()), (0o700, 0));
    }

    #[test]
    fn a_link_in_the_place_of_any_part_of_the_root_is_refused() {
        for part in ["vmm", "vmm/one", "vmm/one/root"] {
            let place = tempfile::tempdir().unwrap();
            if !can_make_cells(place.path()) {
                return;
            }
            let elsewhere = tempfile::tempdir().unwrap();
            let link = place.path().join(part);
            fs::create_dir_all(link.parent().unwrap()).unwrap();
            symlink(elsewhere.path(), &link).unwrap();
            let error = make_root(place.path(), OsStr::new("vmm"), "one").unwrap_err().to_string();
            assert!(error.contains("symbolic link"), "{part}: {error}");
            assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_base_that_is_none_is_named() {
        let error = make_root(Path::new("/no/such/base"), OsStr::new("vmm"), "one").unwrap_err().to_string();
        assert!(error.contains("--chroot-base-dir") && error.contains("/no/such/base"), "{error}");
    }

    fn can_make_cells(place: &Path) -> bool {
        let able = rustix::process::geteuid().is_root() && mounts::check(&Dir::open(place).unwrap()).is_ok();
        if !able {
            println!("SKIPPED: needs root and a temporary directory without nodev and noexec");
        }
        able
    }
}
