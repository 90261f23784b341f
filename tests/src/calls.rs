//! What system calls a VMM's threads make once their filters are on, as strace tells.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use crate::host::process;

/// A system call with its arguments as they were.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Call {
    /// The kind of thread, as filters name it.
    pub kind: &'static str,
    pub name: String,
    pub arguments: Vec<u64>,
}

/// A strace of a running VMM.
pub struct Tracer {
    strace: Child,
    directory: TempDir,
}

impl Tracer {
    /// Follows all threads of a process that has not started its guest, from now on.
    pub fn attach(pid: u32) -> Tracer {
        let directory = tempfile::tempdir().expect("a directory for the trace");
        let mut command = Command::new("strace");
        command.args(["-f", "-Y", "-e", "raw=all", "-o"]).arg(directory.path().join(TRACE));
        command.arg("-p").arg(pid.to_string()).stderr(Stdio::piped());
        let mut strace = process::spawn_bound(&mut command, Vec::new()).expect("strace");
        // "strace: Process PID attached with N threads"
        let mut said = BufReader::new(strace.stderr.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).expect("what strace says");
        assert!(line.contains("attached"), "{line}");
        // Later lines tell of new threads. Somebody must read them.
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        Tracer { strace, directory }
    }

    /// Stops to follow, if the process still runs, and gives the calls of threads whose filter was on.
    pub fn calls(mut self) -> Vec<Call> {
        let pid = Pid::from_raw(self.strace.id() as i32).unwrap();
        // It detaches and ends by that; and by itself when the process has ended.
        let _ = rustix::process::kill_process(pid, Signal::INT);
        self.strace.wait().expect("strace");
        calls(&fs::read_to_string(self.directory.path().join(TRACE)).expect("the trace"))
    }

    /// Where the trace is written.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

const TRACE: &str = "trace";

/// Lines are `TID<NAME> call(0x1, 0x2) = 0`, where the end may be `<unfinished ...>`.
fn calls(trace: &str) -> Vec<Call> {
    let mut calls = Vec::new();
    // Whether a thread's filter is on. One that had it before the trace began is known by its name.
    let mut filtered: BTreeMap<&str, bool> = BTreeMap::new();
    for (thread, name, arguments) in trace.lines().filter_map(line) {
        let (tid, comm) = thread.split_once('<').unwrap_or((thread, ""));
        let kind = kind(comm);
        let is_filtered = filtered.entry(tid).or_insert(kind == "api");
        if name == "seccomp" {
            *is_filtered = true;
        } else if *is_filtered {
            calls.push(Call { kind, name: name.into(), arguments });
        }
    }
    calls
}

fn line(line: &str) -> Option<(&str, &str, Vec<u64>)> {
    let (thread, rest) = line.split_once("> ")?;
    let (name, rest) = rest.trim_start().split_once('(')?;
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return None;
    }
    let arguments = rest.split([')', '<']).next()?.trim_end();
    let number = |text: &str| u64::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok();
    let arguments = arguments.split(',').filter(|text| !text.trim().is_empty()).map(number);
    Some((thread, name, arguments.collect::<Option<_>>()?))
}

fn kind(comm: &str) -> &'static str {
    match comm {
        _ if comm.contains("api") => "api",
        _ if comm.contains("vcpu") => "vcpu",
        _ if comm.contains("io") && !comm.contains("firecracker") => "io",
        _ => "control",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_count_from_the_filter_on_with_their_arguments() {
        let trace = "\
7<berth-vmm> openat(0xffffff9c, 0x7f, 0x80000, 0) = 0x3
8<berth-api> epoll_wait(0x5, 0x7ffc, 0xc, 0xffffffff <unfinished ...>
7<berth-vmm> clone3(0x7f, 0x58) = 0x9
9<berth-vmm> prctl(0xf, 0x7f) = 0
9<berth-vcpu 0> seccomp(0x1, 0, 0x7f) = 0
8<berth-api> <... epoll_wait resumed>) = 0x1
9<berth-vcpu 0> getpid()                = 0x7
7<berth-vmm> seccomp(0x1, 0, 0x7f <unfinished ...>
7<berth-vmm> <... seccomp resumed>)    = 0
9<berth-vcpu 0> --- SIGRT_2 {si_signo=0x22} ---
7<berth-vmm> ioctl(0, 0x5401, 0x7fff)          = -1 ENOTTY (Inappropriate ioctl for device)
9<berth-vcpu 0> +++ exited with 0 +++
";
        let call = |kind, name: &str, arguments: &[u64]| Call {
            kind,
            name: name.into(),
            arguments: arguments.into(),
        };
        let expected = [
            call("api", "epoll_wait", &[5, 0x7ffc, 12, 0xffff_ffff]),
            call("vcpu", "getpid", &[]),
            call("control", "ioctl", &[0, 0x5401, 0x7fff]),
        ];
        assert_eq!(calls(trace), expected);
    }

    #[test]
    fn threads_are_known_by_their_names_under_both_identities() {
        for (comm, expected) in [
            ("berth-vmm", "control"),
            ("firecracker", "control"),
            ("fc_api", "api"),
            ("fc_vcpu 3", "vcpu"),
            ("berth-io", "io"),
            ("fc_io", "io"),
            ("berth-io 3", "io"),
        ] {
            assert_eq!(kind(comm), expected, "{comm}");
        }
    }
}
