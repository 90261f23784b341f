//! What an attacker in a cell tries, and which layer of the cell stops it: one table, for the program that tries it
//! (`src/bin/berth-attacker/`), the tests that say it fails, and docs/security.md.
//!
//! The tests hold the table to be true in both directions: in the jailer's cell every attempt is refused, and in a cell
//! like it that lacks just the layers named here, it succeeds.

use std::collections::BTreeMap;

/// One thing that a cell is made of, which can be left out to see what it was good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Layer {
    /// No descriptor of the caller's above 2 stays open.
    Descriptors,
    /// Nothing of the caller's environment stays.
    Environment,
    /// `--daemonize`: a session without a terminal.
    Session,
    /// A session keyring of its own.
    Keyring,
    /// `pivot_root` in a mount namespace.
    Root,
    /// A chroot in that root, which denies user namespaces.
    Chroot,
    /// An IPC namespace.
    Ipc,
    /// `--netns`.
    Network,
    /// `--new-pid-ns`.
    Pids,
    /// `--uid`, `--gid`, no other groups. A user other than root loses root's capabilities by it.
    User,
    /// No capability in any set, nor in the bounding set.
    Capabilities,
    /// `no_new_privs`.
    NoNewPrivileges,
    /// `--resource-limit`, and no core dumps.
    Limits,
    /// `--cgroup`.
    Group,
}

impl Layer {
    pub const ALL: [Layer; 14] = [
        Layer::Descriptors,
        Layer::Environment,
        Layer::Session,
        Layer::Keyring,
        Layer::Root,
        Layer::Chroot,
        Layer::Ipc,
        Layer::Network,
        Layer::Pids,
        Layer::User,
        Layer::Capabilities,
        Layer::NoNewPrivileges,
        Layer::Limits,
        Layer::Group,
    ];

    /// As in the documentation and on the attacker's command line.
    pub fn name(self) -> &'static str {
        match self {
            Layer::Descriptors => "descriptors",
            Layer::Environment => "environment",
            Layer::Session => "session",
            Layer::Keyring => "keyring",
            Layer::Root => "root",
            Layer::Chroot => "chroot",
            Layer::Ipc => "ipc",
            Layer::Network => "network",
            Layer::Pids => "pids",
            Layer::User => "user",
            Layer::Capabilities => "capabilities",
            Layer::NoNewPrivileges => "no_new_privs",
            Layer::Limits => "limits",
            Layer::Group => "cgroup",
        }
    }

    pub fn named(name: &str) -> Option<Layer> {
        Layer::ALL.into_iter().find(|layer| layer.name() == name)
    }
}

/// Something to be tried from inside of a cell.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    pub name: &'static str,
    /// For people.
    pub what: &'static str,
    /// Each of these is enough to stop it; without all of them it succeeds.
    pub stopped_by: &'static [Layer],
}

const fn attempt(name: &'static str, what: &'static str, stopped_by: &'static [Layer]) -> Attempt {
    Attempt { name, what, stopped_by }
}

/// What only a process with capabilities may do. An ordinary user has lost them, and root in a cell has them taken away.
const PRIVILEGE: &[Layer] = &[Layer::User, Layer::Capabilities];

/// All attempts, by what they are after.
pub const ATTEMPTS: [Attempt; 60] = [
    // Files.
    attempt("read-host-file", "read a file of the host's that everyone may read", &[Layer::Root]),
    attempt("climb", "reach it by `..`", &[Layer::Root]),
    attempt("read-secret", "read a file of root's in the host", &[Layer::Root, Layer::User]),
    attempt("read-neighbour", "read a file in another cell of the same user", &[Layer::Root]),
    attempt(
        "read-stranger",
        "read a file in another user's cell",
        &[Layer::Root, Layer::User, Layer::Capabilities],
    ),
    attempt(
        "proc-root",
        "go to the host's root through `/proc/1/root`",
        &[Layer::Root, Layer::User, Layer::Capabilities],
    ),
    attempt("leaked-directory", "use a directory that the caller had open", &[Layer::Descriptors]),
    attempt(
        "open-descriptors",
        "find anything open but standard input, output and error",
        &[Layer::Descriptors],
    ),
    attempt(
        "chroot-escape",
        "leave the root by `chroot` and `fchdir`",
        &[Layer::Root, Layer::User, Layer::Capabilities],
    ),
    attempt("open-by-handle", "open a file of the host's by its inode number", PRIVILEGE),
    attempt("make-device", "make a device node and open it", PRIVILEGE),
    attempt("open-disk", "open a device of the host's", &[Layer::Root, Layer::User]),
    attempt("chmod-program", "make the cell's program writable", &[Layer::User]),
    attempt("write-program", "write to the cell's program", PRIVILEGE),
    attempt("setuid-program", "become root by a setuid program in the cell", &[Layer::NoNewPrivileges]),
    attempt(
        "capability-program",
        "get a capability from a program in the cell that has it",
        &[Layer::NoNewPrivileges, Layer::Capabilities],
    ),
    attempt("uring-read-host-file", "read a file of the host's by io_uring", &[Layer::Root]),
    // Mounts and namespaces.
    attempt("mount", "mount a file system", PRIVILEGE),
    attempt("fsopen", "the same by the newer calls", PRIVILEGE),
    attempt("open-tree", "copy a mount", PRIVILEGE),
    attempt("umount", "unmount the root", PRIVILEGE),
    attempt("user-namespace", "get all capabilities in a user namespace", &[Layer::Chroot]),
    attempt("mount-namespace", "make a mount namespace", PRIVILEGE),
    attempt("network-namespace", "make a network namespace", PRIVILEGE),
    attempt(
        "leaked-namespace",
        "enter the host's network by a descriptor that the caller had open",
        &[Layer::Descriptors, Layer::User, Layer::Capabilities],
    ),
    // Other processes.
    attempt("signal-neighbour", "send a signal to a process of the same user", &[Layer::Pids]),
    attempt("signal-root", "send a signal to a process of root's", &[Layer::Pids, Layer::User]),
    attempt("signal-everyone", "send a signal to every process at once", &[Layer::Pids]),
    attempt("trace-neighbour", "trace a process of the same user (ptrace)", &[Layer::Pids]),
    attempt("read-memory", "read its memory (process_vm_readv)", &[Layer::Pids]),
    attempt("take-descriptor", "take a descriptor out of it (pidfd_getfd)", &[Layer::Pids]),
    attempt("shared-memory", "attach shared memory of the same user (System V)", &[Layer::Ipc]),
    attempt("message-queue", "open a message queue of the same user (POSIX)", &[Layer::Ipc]),
    attempt("callers-key", "read a key of the caller's session", &[Layer::Keyring]),
    attempt("callers-environment", "read the caller's environment", &[Layer::Environment]),
    attempt("type-for-caller", "type into the caller's terminal (TIOCSTI)", &[Layer::Session]),
    attempt("priority", "run before everyone else (setpriority)", PRIVILEGE),
    attempt("realtime", "run to the exclusion of everyone else (sched_setscheduler)", PRIVILEGE),
    // The network.
    attempt("abstract-socket", "connect to an abstract Unix socket of the host's", &[Layer::Network]),
    attempt("host-port", "connect to a TCP port of the host's", &[Layer::Network]),
    attempt("socket-file", "connect to a Unix socket in the host's file system", &[Layer::Root]),
    attempt("raw-socket", "open a raw socket", PRIVILEGE),
    attempt("packet-socket", "open a packet socket", PRIVILEGE),
    attempt("make-tap", "make a tap device", PRIVILEGE),
    // The kernel.
    attempt("bpf", "load a BPF program", PRIVILEGE),
    attempt("perf", "watch the whole machine by perf_event_open", PRIVILEGE),
    attempt("userfaultfd", "hold up the kernel's own page faults (userfaultfd)", PRIVILEGE),
    attempt("load-module", "load a kernel module", PRIVILEGE),
    attempt("kexec", "load another kernel", PRIVILEGE),
    attempt("set-clock", "set the clock", PRIVILEGE),
    attempt("set-host-name", "set the host's name", PRIVILEGE),
    attempt("swapoff", "change what is swapped", PRIVILEGE),
    attempt("kernel-log", "read the kernel's log", PRIVILEGE),
    attempt("io-port", "reach an I/O port", PRIVILEGE),
    // More than its share.
    attempt("raise-limits", "raise a resource limit", PRIVILEGE),
    attempt("many-files", "open more files than `no-file`", &[Layer::Limits]),
    attempt("big-file", "make a file larger than `fsize`", &[Layer::Limits]),
    attempt("core", "leave a core dump", &[Layer::Limits]),
    attempt("fork-bomb", "run more processes than `pids.max`", &[Layer::Group]),
    attempt("eat-memory", "take more memory than `memory.max`", &[Layer::Group]),
];

/// What succeeds in a rootless cell, whose network and whose share of the host are the user's own.
pub const IN_ROOTLESS_CELL: [&str; 6] =
    ["chmod-program", "write-program", "abstract-socket", "host-port", "fork-bomb", "eat-memory"];

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The attacker got what it was after.
    Reached,
    /// The kernel said no, with this error number.
    Refused(i32),
    /// The kernel ended the process by this signal.
    Killed(i32),
}

impl Outcome {
    /// One line of the attacker's report, without its line end.
    pub fn line(&self, attempt: &str) -> String {
        match self {
            Outcome::Reached => format!("{attempt} reached"),
            Outcome::Refused(errno) => format!("{attempt} refused {errno}"),
            Outcome::Killed(signal) => format!("{attempt} killed {signal}"),
        }
    }

    fn parse(words: &str) -> Option<Outcome> {
        match words.split_once(' ') {
            None => (words == "reached").then_some(Outcome::Reached),
            Some(("refused", errno)) => errno.parse().ok().map(Outcome::Refused),
            Some(("killed", signal)) => signal.parse().ok().map(Outcome::Killed),
            Some(_) => None,
        }
    }
}

/// The last line of the attacker's report.
pub const END: &str = "that-is-all";

/// The attacker's report; whatever else is in `text` is passed over.
pub fn outcomes(text: &str) -> BTreeMap<String, Outcome> {
    let line = |line: &str| {
        let (name, rest) = line.split_once(' ')?;
        Some((name.to_owned(), Outcome::parse(rest)?))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_report_reads_as_it_was_written() {
        let all = [Outcome::Reached, Outcome::Refused(libc::EPERM), Outcome::Killed(9)];
        let text: String = all.iter().zip(["a", "b", "c"]).map(|(one, name)| one.line(name) + "\n").collect();
        let read = outcomes(&format!("noise\n{text}more noise\n"));
        assert_eq!(read.into_values().collect::<Vec<_>>(), all);
    }

    #[test]
    fn each_attempt_has_its_name_and_each_layer_is_needed() {
        let names: BTreeSet<_> = ATTEMPTS.iter().map(|attempt| attempt.name).collect();
        assert_eq!(names.len(), ATTEMPTS.len());
        for layer in Layer::ALL {
            let alone = |attempt: &Attempt| attempt.stopped_by.contains(&layer);
            assert!(ATTEMPTS.iter().any(alone), "{layer:?}");
            assert_eq!(Layer::named(layer.name()), Some(layer));
        }
    }
}
