//! Block devices and file systems of the host behind a guest's disk: loop devices, and what is mounted for a test.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::tap::host;

/// A loop device on a file, as long as the value lives.
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// With logical blocks of so many bytes.
    #[track_caller]
    pub fn new(file: &Path, block: u32) -> LoopDevice {
        LoopDevice::with(file, block, "--direct-io=off")
    }

    /// One that does not read zeroes where its file has ended, but fails.
    #[track_caller]
    pub fn failing_at_end(file: &Path, block: u32) -> LoopDevice {
        LoopDevice::with(file, block, "--direct-io=on")
    }

    fn with(file: &Path, block: u32, option: &str) -> LoopDevice {
        // A host that has it built in has no such module.
        let _ = Command::new("modprobe").arg("loop").output();
        let block = block.to_string();
        let file = file.display().to_string();
        let name = host("losetup", &["--find", "--show", option, "--sector-size", &block, &file]);
        LoopDevice(name.trim().into())
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).output();
    }
}

/// A mounted file system, as long as the value lives.
pub struct Mount(PathBuf);

impl Mount {
    /// What `mount` makes of these arguments, at `place`, which it makes.
    #[track_caller]
    pub fn new(arguments: &[&str], place: PathBuf) -> Mount {
        std::fs::create_dir_all(&place).expect("a directory to mount on");
        host("mount", &[arguments, &[&place.display().to_string()]].concat());
        Mount(place)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Changes its options.
    #[track_caller]
    pub fn remount(&self, options: &str) {
        host("mount", &["-o", &format!("remount,{options}"), &self.0.display().to_string()]);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Also when its last user ends a moment later.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).output();
    }
}
