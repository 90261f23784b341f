//! The fixture of the tests that put a VMM into a cell: where cells are, the jailer's command line, what runs in a cell, and
//! what a jailer could leave in its host.
//!
//! Like `crate::guest` it panics on what is not as it should be. It knows the jailer by its command line only.

// A fixture fails its test by panicking; nothing of this is in a shipped program.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use api_socket::Client;
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use crate::guest::{Console, Ended, limits, program};
use crate::host::process;

/// The id of the cells here.
pub const ID: &str = "cell-1";
/// Whom their VMMs run as.
pub const UID: u32 = 12_345;
pub const GID: u32 = 54_321;
const SOCKET: &str = "run/api.sock";
const POLL: Duration = Duration::from_millis(2);

/// Who calls the jailer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    Root,
    /// The user and group that the VMM runs as, with `--rootless`.
    Ordinary,
}

/// A place for cells. Whatever still runs in it is killed when it goes.
pub struct Cells {
    pub base: TempDir,
    caller: Caller,
}

impl Cells {
    pub fn new() -> Cells {
        Cells::of(Caller::Root)
    }

    /// Cells of an ordinary user's, whom this lets at /dev/kvm.
    pub fn rootless() -> Cells {
        let cells = Cells::of(Caller::Ordinary);
        fs::set_permissions("/dev/kvm", fs::Permissions::from_mode(0o660)).unwrap();
        for (path, uid) in [(Path::new("/dev/kvm"), None), (cells.base.path(), Some(UID))] {
            std::os::unix::fs::chown(path, uid, Some(GID)).unwrap();
        }
        cells
    }

    fn of(caller: Caller) -> Cells {
        Cells { base: tempfile::tempdir().unwrap(), caller }
    }

    /// The directory that is the root of the cell.
    pub fn root(&self) -> PathBuf {
        self.directory().join("root")
    }

    /// The directory of the cell's id.
    pub fn directory(&self) -> PathBuf {
        self.base.path().join("berth-vmm").join(ID)
    }

    /// A jailer that is to become a VMM with its API at the socket of [`Cells::client`].
    pub fn jailer(&self, flags: &[&str]) -> Command {
        let mut command = self.jailer_of(&program("berth-vmm"), flags);
        command.args(["--", "--api-sock", "/run/api.sock", "--log-path", "/run/log", "--level", "Off"]);
        command
    }

    /// A jailer that is to become this program.
    pub fn jailer_of(&self, executable: &Path, flags: &[&str]) -> Command {
        let mut command = Command::new(program("berth-jailer"));
        let [uid, gid] = [UID, GID].map(|number| number.to_string());
        match self.caller {
            Caller::Root => command.args(["--uid", &uid, "--gid", &gid]),
            Caller::Ordinary => command.arg("--rootless").uid(UID).gid(GID),
        };
        command.args(["--id", ID, "--exec-file"]).arg(executable);
        command.arg("--chroot-base-dir").arg(self.base.path()).args(flags);
        command
    }

    /// A VMM in a cell, which is the process that was started unless the flags say otherwise.
    pub fn start(&self, flags: &[&str]) -> Vmm {
        let mut command = self.jailer(flags);
        // Cargo's and the host's variables are in the environment, and the VMM is to have none of them.
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        Vmm { child: process::spawn_bound(&mut command, Vec::new()).unwrap() }
    }

    /// Runs a jailer that is not to become a VMM, or not itself.
    #[track_caller]
    pub fn run(&self, flags: &[&str]) -> Output {
        output(&mut self.jailer(flags))
    }

    #[track_caller]
    pub fn client(&self) -> Client {
        let mut client = Client::connect_within(&self.root().join(SOCKET), limits::API).unwrap();
        client.set_timeout(Some(limits::API)).unwrap();
        client
    }

    /// The number in the pid file.
    pub fn pid(&self) -> u32 {
        fs::read_to_string(self.root().join("berth-vmm.pid")).unwrap().parse().unwrap()
    }

    /// Kills what runs in the cells, and waits for its end.
    #[track_caller]
    pub fn kill(&self) {
        kill_the_user();
        self.wait();
    }

    /// Waits for the end of what runs in the cells.
    #[track_caller]
    pub fn wait(&self) {
        let deadline = Instant::now() + limits::EXIT;
        while !processes_of_the_user().is_empty() {
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(POLL);
        }
    }

    /// Removes the cell as its caller would.
    pub fn remove(&self) {
        fs::remove_dir_all(self.directory()).unwrap();
    }
}

impl Default for Cells {
    fn default() -> Cells {
        Cells::new()
    }
}

impl Drop for Cells {
    fn drop(&mut self) {
        // A signal of the fixture's for its parent's end is lost where a process changes its user.
        kill_the_user();
    }
}

/// Runs a jailer to its end, without input.
#[track_caller]
pub fn output(command: &mut Command) -> Output {
    let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = process::spawn_bound(command, Vec::new()).unwrap();
    let has_ended = process::wait_for(&mut child, limits::EXIT);
    process::kill(&mut child);
    assert!(has_ended, "it runs on");
    child.wait_with_output().unwrap()
}

/// The jailer refused, with a message that has these words.
#[track_caller]
pub fn was_refused(output: &Output, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(140), "{said}");
    assert!(said.starts_with("berth-jailer: "), "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

/// What a jailer has become.
pub struct Vmm {
    pub child: Child,
}

impl Vmm {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The console on its standard input and output. Once.
    pub fn console(&mut self) -> Console {
        Console::new(self.child.stdout.take().unwrap(), self.child.stdin.take().unwrap())
    }

    #[track_caller]
    pub fn ended(&mut self) -> Ended {
        assert!(process::wait_for(&mut self.child, limits::EXIT), "the VMM did not end");
        Ended::Code(self.child.wait().unwrap().code().unwrap_or(-1))
    }
}

/// Processes of [`UID`] that have not ended. What is to be seen of others' is not enough: a VMM's directory in
/// /proc is root's.
pub fn processes_of_the_user() -> Vec<u32> {
    let is_the_users = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/status"))
            .is_ok_and(|status| status.contains(&format!("\nUid:\t{UID}\t")))
    };
    processes().into_iter().filter(is_the_users).collect()
}

fn kill_the_user() {
    for pid in processes_of_the_user() {
        let _ = rustix::process::kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL);
    }
}

/// Removes a control group as soon as what has ended in it is gone.
#[track_caller]
pub fn remove_group(group: &Path) {
    let deadline = Instant::now() + limits::EXIT;
    while let Err(error) = fs::remove_dir(group) {
        assert!(Instant::now() < deadline, "{}: {error}", group.display());
        std::thread::sleep(POLL);
    }
}

/// All that have not ended. One that has, and whose parent has not taken note of it, still names its namespaces.
fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let runs = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/status"))
            .is_ok_and(|status| !status.contains("\nState:\tZ") && !status.contains("\nState:\tX"))
    };
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(runs).collect()
}

/// The value of a line of /proc/<pid>/status.
#[track_caller]
pub fn status(pid: u32, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    value.unwrap_or_else(|| panic!("no {key} in {text}")).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A namespace of a process's, as the kernel names it.
#[track_caller]
pub fn namespace(pid: u32, kind: &str) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap()
}

/// Everything under a directory, by relative path.
pub fn tree(root: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).unwrap().flatten() {
            found.insert(entry.path().strip_prefix(root).unwrap().display().to_string());
            if entry.file_type().unwrap().is_dir() {
                left.push(entry.path());
            }
        }
    }
    found
}

pub fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// What a jailer could leave in a host, but for files.
#[derive(Debug, PartialEq, Eq)]
pub struct Traces {
    mounts: String,
    groups: BTreeSet<String>,
    namespaces: BTreeSet<PathBuf>,
}

impl Traces {
    pub fn mounts(&self) -> usize {
        self.mounts.lines().count()
    }

    pub fn groups(&self) -> usize {
        self.groups.len()
    }

    /// How many namespaces of a kind there are; of all, if it is empty.
    pub fn namespaces(&self, kind: &str) -> usize {
        self.namespaces.iter().filter(|name| name.to_string_lossy().starts_with(kind)).count()
    }
}

/// What there is in the host now.
pub fn traces() -> Traces {
    let groups = tree(Path::new("/sys/fs/cgroup"));
    let kinds = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];
    let link = |(pid, kind): (u32, &str)| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
    Traces {
        mounts: fs::read_to_string("/proc/self/mountinfo").unwrap(),
        groups: groups.into_iter().filter(|path| path.ends_with("/cgroup.procs")).collect(),
        namespaces: processes()
            .into_iter()
            .flat_map(|pid| kinds.map(|kind| (pid, kind)))
            .filter_map(link)
            .collect(),
    }
}
