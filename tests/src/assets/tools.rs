//! The commands of this machine that recipes, the nested host and tests call, and their installation on Debian 12.
//!
//! It looks for commands, not for packages: a QEMU of the user's own making is as good.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cache::{self, Error, SYSTEM_PATH};
use super::recipe;

const QEMU: &str = "qemu-system-x86_64";

/// The first with the `mapped-ram` migration that the nested host's saved state is made of.
const MINIMUM_QEMU: u32 = 9;

/// What is called, and Debian's package of it.
const COMMANDS: &[Needed] = &[
    (QEMU, "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("mmdebstrap", "mmdebstrap"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.erofs", "erofs-utils"),
    ("depmod", "kmod"),
    ("modprobe", "kmod"),
    ("cpio", "cpio"),
    ("gcc", "gcc"),
    ("make", "make"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
    ("iasl", "acpica-tools"),
    ("curl", "curl"),
    ("strace", "strace"),
    ("ip", "iproute2"),
    ("apt-get", "apt"),
    ("dpkg-deb", "dpkg"),
    ("flock", "util-linux"),
];

type Needed = (&'static str, &'static str);

/// Where the tools are that the tests start by path.
#[derive(Debug, Clone)]
pub struct Tools {
    /// `qemu-system-x86_64`, version 9 or later.
    pub qemu: PathBuf,
    /// `qemu-img`.
    pub qemu_img: PathBuf,
    /// `mkfs.erofs`.
    pub mkfs_erofs: PathBuf,
    /// `mkfs.ext4`.
    pub mkfs_ext4: PathBuf,
    /// `iasl`, the ACPI compiler and disassembler.
    pub iasl: PathBuf,
}

/// Finds every command, and installs what is missing where that is possible.
pub fn ensure(cache: &Path) -> Result<Tools, Error> {
    if missing(cache).is_empty() {
        return found(cache);
    }
    let lock = cache::lock(cache, recipe::TOOLS.name)?;
    let missing = missing(cache);
    if missing.is_empty() {
        return found(cache);
    }
    if !is_debian_12() {
        return Err(none_of(&missing));
    }
    let packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    let environment = [("PACKAGES", packages.join(" "))];
    cache::execute(cache, &recipe::TOOLS, &[], &environment, &lock)?;
    found(cache)
}

fn found(cache: &Path) -> Result<Tools, Error> {
    let missing = missing(cache);
    let path = |command| find(command).ok_or_else(|| none_of(&missing));
    if !missing.is_empty() {
        return Err(none_of(&missing));
    }
    Ok(Tools {
        qemu: path(QEMU)?,
        qemu_img: path("qemu-img")?,
        mkfs_erofs: path("mkfs.erofs")?,
        mkfs_ext4: path("mkfs.ext4")?,
        iasl: path("iasl")?,
    })
}

fn missing(cache: &Path) -> Vec<Needed> {
    let usable = |command| match find(command) {
        Some(path) => command != QEMU || is_new_enough(cache, &path),
        None => false,
    };
    COMMANDS.iter().copied().filter(|(command, _)| !usable(command)).collect()
}

/// Looks where a shell would, and then where Debian keeps the administrator's commands.
fn find(command: &str) -> Option<PathBuf> {
    let path = format!("{}:{SYSTEM_PATH}", std::env::var("PATH").unwrap_or_default());
    std::env::split_paths(&path).map(|dir| dir.join(command)).find(|file| file.is_file())
}

/// Asks QEMU for its version when this file of it is first met, and remembers a good answer.
fn is_new_enough(cache: &Path, qemu: &Path) -> bool {
    let Ok(file) = fs::metadata(qemu) else { return false };
    let identity = format!("{} {} {}\n", qemu.display(), file.size(), file.mtime());
    let accepted = cache.join("qemu-accepted");
    if fs::read_to_string(&accepted).is_ok_and(|known| known == identity) {
        return true;
    }
    let Ok(output) = Command::new(qemu).arg("--version").output() else { return false };
    let new_enough =
        major_version(&String::from_utf8_lossy(&output.stdout)).is_some_and(|major| major >= MINIMUM_QEMU);
    if new_enough {
        // Forgetting it only costs the next caller the question.
        let _ = fs::create_dir_all(cache).and_then(|()| fs::write(&accepted, identity));
    }
    new_enough
}

/// Of `QEMU emulator version 10.0.2 (Debian ...)`.
fn major_version(text: &str) -> Option<u32> {
    text.split("version ").nth(1)?.split('.').next()?.parse().ok()
}

fn is_debian_12() -> bool {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let says = |line: &str| release.lines().any(|l| l.replace('"', "") == line);
    says("ID=debian") && says("VERSION_ID=12")
}

fn none_of(missing: &[Needed]) -> Error {
    let name = |(command, _): &Needed| match *command {
        QEMU => format!("{QEMU} (version {MINIMUM_QEMU} or later)"),
        other => other.to_owned(),
    };
    Error::MissingTools {
        commands: missing.iter().map(name).collect::<Vec<_>>().join(", "),
        packages: missing.iter().map(|(_, package)| *package).collect::<Vec<_>>().join(" "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_tells_its_major_version() {
        assert_eq!(major_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\n"), Some(10));
        assert_eq!(major_version("QEMU emulator version 7.2.17"), Some(7));
        assert_eq!(major_version("bash: no such command"), None);
    }

    #[test]
    fn the_error_names_each_missing_command_and_its_package() {
        let text = none_of(&[(QEMU, "qemu-system-x86"), ("mkfs.erofs", "erofs-utils")]).to_string();
        for word in ["qemu-system-x86_64 (version 9 or later)", "mkfs.erofs", "erofs-utils"] {
            assert!(text.contains(word), "{word} is not in: {text}");
        }
    }
}
