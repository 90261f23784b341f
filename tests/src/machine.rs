//! A Debian with systemd as its first process, for tests of the package and its units: namespaces and a control group on this
//! host, on a copy of its root that takes what is written. `machine/boot.sh` makes it.
//!
//! It is no guest: it has this host's kernel and KVM, and boots in seconds where a guest in a guest could not. It isolates a
//! test from its host, and nothing from an attacker.

// A fixture fails its test by panicking; nothing of this is in a shipped program.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::guest::limits;

const BOOT: &str = include_str!("machine/boot.sh");
/// Where files that were given are in there.
pub const GIVEN: &str = "/given";
/// Named by `boot.sh` after its directory.
const GROUP: &str = "/sys/fs/cgroup/machine";
const POLL: Duration = Duration::from_millis(200);

/// A machine that is up. All that runs in it ends with it.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    init: Pid,
    /// Its root is mounted in there, for itself.
    _directory: TempDir,
}

impl Machine {
    /// Boots, with these files in [`GIVEN`].
    pub fn boot(given: &[PathBuf]) -> Machine {
        for module in ["tun", "overlay"] {
            // Where it is built in there is nothing to load, and what is missing is missed below.
            let _ = Command::new("modprobe").arg(module).stderr(Stdio::null()).status();
        }
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("boot.sh");
        fs::write(&script, BOOT).unwrap();
        let root = directory.path().join("machine");
        fs::create_dir(&root).unwrap();
        let child =
            Command::new("sh").arg(script).arg(&root).args(given).stdin(Stdio::null()).spawn().unwrap();
        let told = directory.path().join("pid");
        let begin = Instant::now();
        let init = loop {
            let number = fs::read_to_string(&told).ok().and_then(|text| text.trim().parse().ok());
            if let Some(init) = number.and_then(Pid::from_raw) {
                break init;
            }
            assert!(begin.elapsed() < limits::DEBIAN, "no first process");
            thread::sleep(POLL);
        };
        let machine = Machine { child, init, _directory: directory };
        machine.until(
            "it is up",
            limits::DEBIAN,
            "test \"$(cat /proc/1/comm)\" = systemd && systemctl is-system-running",
        );
        machine
    }

    /// What a command of root's in there comes to, in a shell.
    pub fn shell(&self, command: &str) -> Output {
        self.command(&["sh", "-c", command]).stdin(Stdio::null()).output().unwrap()
    }

    /// The output of a command that must succeed.
    #[track_caller]
    pub fn run(&self, command: &str) -> String {
        text(command, self.shell(command))
    }

    /// The same as another user, with the groups that this one has.
    #[track_caller]
    pub fn run_as(&self, user: &str, command: &str) -> String {
        text(command, self.shell_as(user, command))
    }

    /// As [`Machine::shell`], of another user's.
    pub fn shell_as(&self, user: &str, command: &str) -> Output {
        self.command_as(user, &["sh", "-c", command]).stdin(Stdio::null()).output().unwrap()
    }

    /// A command in there as another user, with the groups that this one has when it starts.
    pub fn command_as(&self, user: &str, argv: &[&str]) -> Command {
        let mut command = self.command(&["setpriv", "--reuid", user, "--regid", user, "--init-groups"]);
        command.args(argv);
        command
    }

    fn command(&self, argv: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init.to_string(), "--all", "env", "-i", "HOME=/root", "LC_ALL=C"]);
        command.arg("PATH=/usr/sbin:/usr/bin:/sbin:/bin").args(argv);
        command
    }

    /// Waits until a command of root's succeeds.
    #[track_caller]
    pub fn until(&self, what: &str, limit: Duration, command: &str) {
        let begin = Instant::now();
        loop {
            let output = self.shell(command);
            if output.status.success() {
                return;
            }
            assert!(begin.elapsed() < limit, "waited in vain until {what}: {output:?}");
            thread::sleep(POLL);
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if thread::panicking() {
            let journal = self.shell("journalctl --no-pager --lines 60");
            eprintln!("--- the machine's journal\n{}", String::from_utf8_lossy(&journal.stdout));
        }
        let _ = kill_process(self.init, Signal::KILL);
        let _ = self.child.wait();
        // From below: a group goes when none is in it.
        let _ = Command::new("find")
            .arg(GROUP)
            .args(["-depth", "-type", "d", "-exec", "rmdir", "{}", "+"])
            .status();
    }
}

#[track_caller]
fn text(command: &str, output: Output) -> String {
    assert!(output.status.success(), "`{command}`: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
