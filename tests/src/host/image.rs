//! Read-only images of a few named files, and disks to write on, for a nested host.
//!
//! Files go in uncompressed: unpacking costs an emulated processor more than reading.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::error::{Doing, Error, Result};

/// A file that a host shows under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Relative path without `..`, as in `tests/boot`.
    pub name: String,
    pub path: PathBuf,
}

impl Item {
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self { name: name.into(), path: path.into() }
    }
}

/// Writes an EROFS image with these files, and symbolic links (name, target), at `image`.
/// `staging` is a directory to make and remove, best on the file system of the files.
pub fn pack(items: &[Item], links: &[(String, String)], staging: &Path, image: &Path) -> Result<()> {
    fs::create_dir_all(staging).doing(|| format!("cannot make {}", staging.display()))?;
    for item in items {
        stage(item, &staging.join(&item.name))?;
    }
    for (name, target) in links {
        link(Path::new(target), &staging.join(name))?;
    }
    tool(
        "mkfs.erofs",
        "erofs-utils",
        Command::new("mkfs.erofs").args(["--all-root", "-T0"]).arg(image).arg(staging),
    )?;
    fs::remove_dir_all(staging).doing(|| format!("cannot remove {}", staging.display()))
}

/// Fills a directory with symbolic links to the files, for a host that is this machine.
pub fn link_all(items: &[Item], directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).doing(|| format!("cannot make {}", directory.display()))?;
    items.iter().try_for_each(|item| {
        let path =
            std::path::absolute(&item.path).doing(|| format!("cannot find {}", item.path.display()))?;
        link(&path, &directory.join(&item.name))
    })
}

/// Makes a file as large as the slot that it goes into.
pub fn pad(image: &Path, slot: u64) -> Result<()> {
    let padding = || format!("cannot pad {}", image.display());
    let file = File::options().write(true).open(image).doing(padding)?;
    let size = file.metadata().doing(padding)?.len();
    if size > slot {
        return Err(Error(format!("{} has {size} bytes: {slot} fit into its slot", image.display())));
    }
    file.set_len(slot).doing(padding)
}

/// Makes an empty ext4 disk, sparse, without a journal: it does not outlive its host.
pub fn make_scratch(image: &Path, size: u64) -> Result<()> {
    let making = || format!("cannot make {}", image.display());
    File::create(image).and_then(|file| file.set_len(size)).doing(making)?;
    let options = ["-q", "-F", "-O", "^has_journal", "-E", "nodiscard", "-m", "0"];
    tool("mkfs.ext4", "e2fsprogs", Command::new("mkfs.ext4").args(options).arg(image))
}

fn stage(item: &Item, target: &Path) -> Result<()> {
    make_parent(target)?;
    // A hard link costs nothing; on another file system it has to be a copy. But not onto what is there already: of a name
    // given twice that is a link to the original, which copying would empty.
    fs::hard_link(&item.path, target)
        .or_else(|error| match error.kind() {
            ErrorKind::AlreadyExists => Err(error),
            _ => fs::copy(&item.path, target).map(drop),
        })
        .doing(|| format!("cannot pack {} as {}", item.path.display(), item.name))
}

fn link(path: &Path, name: &Path) -> Result<()> {
    make_parent(name)?;
    std::os::unix::fs::symlink(path, name).doing(|| format!("cannot link {}", name.display()))
}

fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).doing(|| format!("cannot make {}", parent.display()))
}

/// Runs a program that prints nothing of interest unless it fails.
fn tool(name: &str, package: &str, command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .doing(|| format!("cannot run {name} (`make setup` installs it; Debian package {package})"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(Error(format!("{name} failed: {}", String::from_utf8_lossy(&output.stderr).trim_end()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_outgrew_its_slot_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        fs::write(&image, [1; 100]).unwrap();
        pad(&image, 200).unwrap();
        assert_eq!(fs::metadata(&image).unwrap().len(), 200);
        assert!(pad(&image, 199).unwrap_err().to_string().contains("199 fit"));
    }

    #[test]
    fn a_name_given_twice_is_refused_and_its_file_stays_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("berth-vmm");
        fs::write(&file, "vmm").unwrap();
        let item = Item::new("vmm", &file);
        let (staging, image) = (directory.path().join("staging"), directory.path().join("image"));
        let error = pack(&[item.clone(), item], &[], &staging, &image).unwrap_err();
        assert!(error.to_string().contains("cannot pack"), "{error}");
        assert_eq!(fs::read(&file).unwrap(), b"vmm");
    }

    #[test]
    fn a_linked_directory_shows_each_file_under_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("berth-vmm-1f3a");
        fs::write(&file, "vmm").unwrap();
        let shown = directory.path().join("build");
        link_all(&[Item::new("bin/berth-vmm", &file)], &shown).unwrap();
        assert_eq!(fs::read_to_string(shown.join("bin/berth-vmm")).unwrap(), "vmm");
    }
}
