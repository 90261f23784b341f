//! A cell that was not finished leaves nothing: a start that fails takes back what it made, and one that is killed, at
//! whichever of its system calls, leaves what the next start removes, or names with the command that does.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use berth_tests::cell::{Cells, ID, UID, output, remove_group, traces, tree, was_refused};
use berth_tests::guest::{program, times};

/// Ways to become the VMM, by how many processes there are.
const WAYS: [&[&str]; 4] = [&[], &["--new-pid-ns"], &["--daemonize"], &["--daemonize", "--new-pid-ns"]];

/// A group of the cell's own.
const GROUP: [&str; 6] =
    ["--cgroup-version", "2", "--parent-cgroup", "berth-undone", "--cgroup", "pids.max=100"];
const PARENT: &str = "/sys/fs/cgroup/berth-undone";

/// The parent group, which stays, and goes at the end.
struct Parent;

impl Parent {
    fn new() -> Parent {
        fs::create_dir(PARENT).unwrap();
        fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+pids").unwrap();
        fs::write(format!("{PARENT}/cgroup.subtree_control"), "+pids").unwrap();
        Parent
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        let _ = fs::remove_dir(PARENT);
    }
}

/// Whose each file and directory is, and its mode.
fn owners(base: &Path) -> BTreeMap<String, (u32, u32, u32)> {
    let of = |path: &str| {
        fs::symlink_metadata(base.join(path)).map(|data| (data.uid(), data.gid(), data.mode())).unwrap()
    };
    tree(base).into_iter().map(|path| (path.clone(), of(&path))).collect()
}

/// As callers do before a start.
fn prepare(cells: &Cells) {
    fs::create_dir_all(cells.root().join("run")).unwrap();
    fs::write(cells.root().join("run/image"), "precious").unwrap();
    fs::create_dir(cells.root().join("dev")).unwrap();
    for (path, mode) in [("", 0o1750), ("run", 0o711), ("dev", 0o770)] {
        fs::set_permissions(cells.root().join(path), fs::Permissions::from_mode(mode)).unwrap();
        chown(cells.root().join(path), Some(UID), Some(7)).unwrap();
    }
}

fn script(place: &Path) -> PathBuf {
    let script = place.join("script");
    fs::write(&script, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    script
}

#[test]
fn a_start_that_fails_leaves_what_was_there_as_it_was() {
    let _parent = Parent::new();
    let elsewhere = tempfile::tempdir().unwrap();
    let (script, vmm) = (script(elsewhere.path()), program("berth-vmm"));
    // From early to late.
    let failures: [(&Path, &[&str], &str); 5] = [
        (&vmm, &["--netns", "/etc/passwd"], "--netns"),
        (&vmm, &["--cgroup", "pids.max=many"], "pids.max"),
        (&vmm, &["--cgroup", "pids.none=1"], "pids.none"),
        (&vmm, &["--resource-limit", "no-file=99999999999"], "no-file"),
        (&script, &[], "statically linked"),
    ];
    for way in WAYS {
        for (program, flags, word) in failures {
            for is_prepared in [false, true] {
                let cells = Cells::new();
                // The directory of all cells of this program is shared, and stays.
                fs::create_dir_all(cells.base.path().join(program.file_name().unwrap())).unwrap();
                if is_prepared && program == vmm {
                    prepare(&cells);
                }
                let before = (owners(cells.base.path()), traces());
                let flags = [way, &GROUP, flags].concat();
                was_refused(&output(&mut cells.jailer_of(program, &flags)), &[word]);
                assert_eq!(
                    (owners(cells.base.path()), traces()),
                    before,
                    "{flags:?}, prepared: {is_prepared}"
                );
            }
        }
    }
}

/// A jailer whose VMM only opens its log, and is killed at a call: the flags of the way, the process, the call.
struct Killed<'a> {
    cells: &'a Cells,
    way: &'a [&'a str],
    process: usize,
    call: usize,
}

impl Killed<'_> {
    /// Traced, and how many calls each process has made.
    fn run(&self) -> (Output, Vec<usize>) {
        let jailer = self.jailer();
        let mut command = Command::new(program("berth-killer"));
        command.args([self.process, self.call].map(|number| number.to_string()));
        command.arg(jailer.get_program()).args(jailer.get_args());
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let counts = said.lines().last().unwrap_or_default().split_whitespace();
        let counts = counts.map(|count| count.parse().unwrap()).collect();
        (output, counts)
    }

    /// Ends soon, with the code of a VMM that finds no configuration.
    fn jailer(&self) -> Command {
        let mut command = self.cells.jailer_of(&program("berth-vmm"), &[self.way, &GROUP].concat());
        command.args(["--", "--no-api", "--config-file", "/none", "--log-path", "/run/log"]);
        command
    }

    /// Whether a VMM was executed, which has ended then.
    fn is_vmm(&self) -> bool {
        self.cells.wait();
        self.cells.root().join("run/log").exists()
    }

    /// Starts a VMM in the same cell, after having removed what is in the way if it is named. True when it was.
    fn start_again(&self) -> bool {
        let vmm_ended = |output: &Output| {
            matches!((self.way.is_empty(), output.status.code()), (true, Some(152)) | (false, Some(0)))
        };
        let said = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
        let first = output(&mut self.jailer());
        if vmm_ended(&first) {
            return false;
        }
        let said_first = said(&first);
        assert_eq!(first.status.code(), Some(140), "{said_first}");
        let command =
            said_first.split_once("remove it: ").unwrap_or_else(|| panic!("no command: {said_first}")).1;
        assert!(command.contains(&self.cells.directory().display().to_string()), "{command}");
        assert!(Command::new("sh").args(["-c", command]).status().unwrap().success(), "{command}");
        let second = output(&mut self.jailer());
        assert!(vmm_ended(&second), "{}", said(&second));
        true
    }

    /// As the caller does when the VMM has ended.
    fn remove(&self) {
        self.cells.wait();
        self.cells.remove();
        remove_group(&Path::new(PARENT).join(ID));
    }
}

/// Kills each process of this way at each of its calls. That is hundreds of starts: only a soak run does so, and any other
/// kills at one call of five, and not at the same ones of each process.
fn at_each_call(way: &[&str]) {
    let stride = times(5, 1) as usize;
    let _parent = Parent::new();
    let cells = Cells::new();
    fs::create_dir(cells.base.path().join("berth-vmm")).unwrap();
    let before = (owners(cells.base.path()), traces());
    let (mut killed, mut named, mut unhurt) = (0, 0, 0);
    for process in 0.. {
        for call in (1 + process % stride..).step_by(stride) {
            let this = Killed { cells: &cells, way, process, call };
            let (output, counts) = this.run();
            let Some(&calls) = counts.get(process) else {
                // There are no more processes.
                println!(
                    "{way:?}: {killed} times killed; {named} times named for removal, {unhurt} times a VMM ran"
                );
                this.remove();
                assert_eq!((owners(cells.base.path()), traces()), before);
                return;
            };
            let is_last = calls < call;
            let place = format!("{way:?}, process {process}, call {call}");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            match (output.status.code(), this.is_vmm()) {
                // The one that the caller waits for.
                (Some(137), is_vmm) => {
                    assert_eq!(process, 0, "{place}: {said}");
                    unhurt += usize::from(is_vmm);
                    named += usize::from(this.start_again());
                    this.remove();
                }
                // Another one, too late to matter; or none.
                (Some(0 | 152), true) => {
                    assert!(process > 0 || is_last, "{place}");
                    unhurt += usize::from(!is_last);
                    this.remove();
                }
                (Some(140), false) => {
                    assert!(said.contains("killed before it was executed"), "{place}: {said}")
                }
                other => panic!("{place}: {other:?}: {said}"),
            }
            assert_eq!((owners(cells.base.path()), traces()), before, "{place}");
            if is_last {
                break;
            }
            killed += 1;
        }
    }
}

#[test]
fn a_jailer_killed_at_any_call_leaves_what_the_next_one_removes_or_names() {
    at_each_call(WAYS[0]);
}

#[test]
fn with_a_pid_namespace_each_process_killed_at_any_call_is_told_or_removed() {
    at_each_call(WAYS[1]);
}

#[test]
fn of_a_daemon_each_process_killed_at_any_call_is_told_or_removed() {
    at_each_call(WAYS[2]);
}

#[test]
fn of_a_daemon_in_a_pid_namespace_each_process_killed_at_any_call_is_told_or_removed() {
    at_each_call(WAYS[3]);
}
