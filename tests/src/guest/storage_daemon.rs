//! A vhost-user back-end that is not of this project: QEMU's storage daemon with one disk, which can be killed, stopped,
//! and started again at the same socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use api_socket::{CacheType, Drive};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use super::{blank_disk, limits};
use crate::host::process;

/// What it can serve; a drive has one if it asks for no more.
const QUEUES: u16 = 4;

/// See the module. The daemon ends with this.
pub struct StorageDaemon {
    place: TempDir,
    disk: PathBuf,
    child: Option<Child>,
    talk: Option<(ChildStdin, BufReader<ChildStdout>)>,
}

impl StorageDaemon {
    /// With a new disk of so many bytes.
    pub fn blank(bytes: u64) -> StorageDaemon {
        let place = tempfile::tempdir().unwrap();
        let disk = blank_disk(place.path().join("disk"), bytes);
        StorageDaemon::started(place, disk)
    }

    /// With this disk.
    pub fn with(disk: &Path) -> StorageDaemon {
        StorageDaemon::started(tempfile::tempdir().unwrap(), disk.into())
    }

    fn started(place: TempDir, disk: PathBuf) -> StorageDaemon {
        let mut daemon = StorageDaemon { place, disk, child: None, talk: None };
        daemon.start();
        daemon
    }

    /// The drive that it serves.
    pub fn drive(&self, id: &str) -> Drive {
        Drive {
            drive_id: id.into(),
            cache_type: CacheType::Writeback,
            socket: Some(self.socket()),
            ..Drive::default()
        }
    }

    pub fn disk(&self) -> &Path {
        &self.disk
    }

    pub fn socket(&self) -> PathBuf {
        self.place.path().join("socket")
    }

    /// Starts it again; when this returns, it listens.
    pub fn start(&mut self) {
        let pid_file = self.place.path().join("pid");
        let _ = std::fs::remove_file(&pid_file);
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--chardev", "stdio,id=talk", "--monitor", "chardev=talk"]);
        let is_device = std::fs::metadata(&self.disk).unwrap().file_type().is_block_device();
        let driver = if is_device { "host_device" } else { "file" };
        command
            .arg("--blockdev")
            .arg(format!("driver={driver},node-name=d,filename={}", self.disk.display()));
        command.arg("--export").arg(format!(
            "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={},writable=on,\
             num-queues={QUEUES}",
            self.socket().display()
        ));
        command.arg("--pidfile").arg(&pid_file);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = process::spawn_bound(&mut command, Vec::new()).unwrap();
        // It writes that file when its exports are there.
        let deadline = Instant::now() + limits::API;
        while !pid_file.exists() {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("qemu-storage-daemon: {status}");
            }
            assert!(Instant::now() < deadline, "qemu-storage-daemon does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        self.talk = Some((input, BufReader::new(output)));
        self.child = Some(child);
    }

    /// Kills it, as a crash does.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            process::kill(&mut child);
        }
    }

    /// Stops it, as one that hangs, or lets it go on.
    pub fn hang(&self, hang: bool) {
        let signal = if hang { Signal::STOP } else { Signal::CONT };
        let pid = Pid::from_child(self.child.as_ref().unwrap());
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Makes the disk larger while it is served.
    pub fn resize(&mut self, bytes: u64) {
        let (input, output) = self.talk.as_mut().unwrap();
        writeln!(input, r#"{{"execute": "qmp_capabilities"}}"#).unwrap();
        let resize =
            format!(r#"{{"execute": "block_resize", "arguments": {{"node-name": "d", "size": {bytes}}}}}"#);
        writeln!(input, "{resize}").unwrap();
        let mut done = 0;
        while done < 2 {
            let mut line = String::new();
            assert!(output.read_line(&mut line).unwrap() > 0, "qemu-storage-daemon has ended");
            assert!(!line.contains("\"error\""), "{line}");
            done += usize::from(line.contains("\"return\""));
        }
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        self.kill();
    }
}
