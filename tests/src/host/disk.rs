//! A guest's disk of its own, made at once from a shared read-only one.
//!
//! For use inside a host. Where the original is a block device, as in a nested host, the new disk is a device-mapper
//! snapshot that keeps the differences in a sparse file: copying 1.5 GiB there takes 14 s, this 0.4 s. Where it is a
//! file, the new disk is a sparse copy.

use std::fs::{self, File};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::error::{Doing, Error, Result};

/// Differences are kept in units of so many sectors, 4 KiB.
const CHUNK_SECTORS: u32 = 8;

/// Most that a guest can write to a snapshot. The file is sparse.
const MAX_DIFFERENCES: u64 = 8 << 30;

/// A disk to write on. Dropping it throws it away.
#[derive(Debug)]
pub struct WritableDisk {
    path: PathBuf,
    snapshot: Option<Snapshot>,
}

#[derive(Debug)]
struct Snapshot {
    name: String,
    differences: PathBuf,
    loop_device: String,
}

impl WritableDisk {
    /// Makes a disk with the content of `original`. What it needs to keep is put into `directory`, under `name`, which
    /// must be new in the whole host.
    pub fn new(original: &Path, directory: &Path, name: &str) -> Result<Self> {
        let looking = || format!("cannot look at {}", original.display());
        if fs::metadata(original).doing(looking)?.file_type().is_block_device() {
            let original = fs::canonicalize(original).doing(looking)?;
            return Self::snapshot(&original, directory, name);
        }
        let path = directory.join(name);
        run("cp", &["--sparse=always", "--reflink=auto", &text(original)?, &text(&path)?])?;
        Ok(Self { path, snapshot: None })
    }

    /// The file or block device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn snapshot(original: &Path, directory: &Path, name: &str) -> Result<Self> {
        let differences = directory.join(format!("{name}.differences"));
        let making = || format!("cannot make {}", differences.display());
        File::create(&differences).and_then(|file| file.set_len(MAX_DIFFERENCES)).doing(making)?;
        run("modprobe", &["-a", "loop", "dm-snapshot"])?;
        let loop_device = run("losetup", &["--find", "--show", &text(&differences)?])?;
        // From here on dropping it cleans up.
        let snapshot = Snapshot { name: name.into(), differences, loop_device };
        let original = text(original)?;
        let sectors = run("blockdev", &["--getsz", &original])?;
        // N: the differences need not survive the host.
        let table = format!("0 {sectors} snapshot {original} {} N {CHUNK_SECTORS}", snapshot.loop_device);
        run("dmsetup", &["create", name, "--noudevsync", "--table", &table])?;
        let minor = run("dmsetup", &["info", "--columns", "--noheadings", "-o", "minor", name])?;
        // The kernel's own name: there is no udev to make another.
        Ok(Self { path: PathBuf::from(format!("/dev/dm-{minor}")), snapshot: Some(snapshot) })
    }
}

impl Drop for WritableDisk {
    fn drop(&mut self) {
        // What cannot be removed now goes away with the host.
        if self.snapshot.is_none() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        let _ = run("dmsetup", &["remove", "--noudevsync", "--retry", &self.name]);
        let _ = run("losetup", &["--detach", &self.loop_device]);
        let _ = fs::remove_file(&self.differences);
    }
}

fn text(path: &Path) -> Result<String> {
    path.to_str().map(String::from).ok_or_else(|| Error(format!("{path:?} is not UTF-8")))
}

/// Runs a program and gives its first line of output.
fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output().doing(|| format!("cannot run {program}"))?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    match output.status.success() {
        true => Ok(said(&output.stdout)),
        false => Err(Error(format!("{program} {}: {}", arguments.join(" "), said(&output.stderr)))),
    }
}
