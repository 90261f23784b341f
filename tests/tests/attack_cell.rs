//! An attacker in the VMM's place gets nothing: each attempt of `berth_tests::attack` fails in the jailer's cell, without
//! any help of the VMM's own filters, and succeeds in a cell that lacks what is said to stop it.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use berth_tests::attack::{ATTEMPTS, Attempt, END, IN_ROOTLESS_CELL, Layer, Outcome, outcomes};
use berth_tests::guest::{limits, program};
use berth_tests::host::process;
use rustix::fs::{CWD, FileType, Mode, OFlags, XattrFlags};
use rustix::process::{Resource, Rlimit};
use rustix::pty::OpenptFlags;
use tempfile::TempDir;

const ID: &str = "attacked";
const USER: u32 = 23_456;
const STRANGER: u32 = 23_457;
const SHARED_MEMORY: usize = 0x6265_7274;
const ABSTRACT: &str = "berth-attacked";
const NETWORK: &str = "berth-attack";
const NETWORK_FILE: &str = "/run/netns/berth-attack";
const GROUP: &str = "berth-attack";

/// What the cells here may have: less than `shares.rs` of the attacker takes.
const FILES: &str = "64";
const FILE_BYTES: &str = "1048576";
const GROUP_LIMITS: [(&str, &str); 2] = [("pids.max", "32"), ("memory.max", "67108864")];

/// CAP_SYS_ADMIN, permitted and effective: struct vfs_cap_data of version 2.
const CAPABILITY: [u32; 5] = [0x0200_0001, 1 << 21, 0, 0, 0];

/// A host with everything in it that the attacker is after.
struct Ground {
    base: TempDir,
    _old_terminals: Setting,
    neighbour: Child,
    /// Open in all that is started from here.
    _leaked: [OwnedFd; 2],
    aims: Vec<String>,
    _listeners: (UnixListener, UnixListener, TcpListener),
}

impl Ground {
    fn new() -> Ground {
        let base = tempfile::tempdir().unwrap();
        let at = |name: &str| base.path().join(name);
        mode(base.path(), 0o755);
        for (name, bits) in [("host-file", 0o644), ("secret", 0o600)] {
            fs::write(at(name), name).unwrap();
            mode(&at(name), bits);
        }
        rustix::fs::mknodat(CWD, at("device"), FileType::CharacterDevice, Mode::RUSR, NULL_DEVICE).unwrap();
        for (name, user) in [("neighbour", USER), ("stranger", STRANGER)] {
            fs::create_dir(at(name)).unwrap();
            let disk = at(name).join("disk");
            fs::write(&disk, name).unwrap();
            mode(&disk, 0o600);
            mode(&at(name), 0o700);
            for path in [&disk, &at(name)] {
                chown(path, Some(user), Some(user)).unwrap();
            }
        }
        fs::create_dir(at("cells")).unwrap();

        let abstract_name = SocketAddr::from_abstract_name(ABSTRACT).unwrap();
        let listeners = (
            UnixListener::bind_addr(&abstract_name).unwrap(),
            UnixListener::bind(at("socket")).unwrap(),
            TcpListener::bind("127.0.0.1:0").unwrap(),
        );
        mode(&at("socket"), 0o777);
        let (neighbour, memory) = neighbour();
        let leaked = ["/", "/proc/self/ns/net"].map(leak);
        let port = listeners.2.local_addr().unwrap().port();
        let path = |name: &str| format!("{name}={}", at(name).display());
        let aims = vec![
            path("host-file"),
            path("secret"),
            path("device"),
            format!("neighbour={}", at("neighbour/disk").display()),
            format!("stranger={}", at("stranger/disk").display()),
            format!("socket-file={}", at("socket").display()),
            format!("directory-fd={}", process::number(&leaked[0])),
            format!("network-fd={}", process::number(&leaked[1])),
            format!("handle={}", handle(&at("host-file"))),
            format!("root-pid={}", std::process::id()),
            format!("neighbour-pid={}", neighbour.id()),
            memory,
            format!("shared-memory={SHARED_MEMORY}"),
            format!("abstract-socket={ABSTRACT}"),
            format!("host-port={port}"),
        ];
        run("ip", &["netns", "add", NETWORK]);
        let old_terminals = Setting::change("/proc/sys/dev/tty/legacy_tiocsti", "1");
        Ground {
            _old_terminals: old_terminals,
            base,
            neighbour,
            aims,
            _leaked: leaked,
            _listeners: listeners,
        }
    }

    /// What the attacker reports from the cell that a jailer with these flags makes, as the user whose cell it is or as
    /// root.
    fn jail(&self, is_users: bool, flags: &[&str]) -> BTreeMap<String, Outcome> {
        let cells = self.base.path().join("cells");
        let cell = cells.join("berth-attacker").join(ID);
        put_programs(&cell.join("root"));
        let mut command = Command::new(program("berth-attacker"));
        if is_users {
            for path in cell.join("root").ancestors().take(4) {
                chown(path, Some(USER), Some(USER)).unwrap();
            }
            command.uid(USER).gid(USER);
        }
        command.arg("with-key").arg(program("berth-jailer"));
        command.args(["--id", ID, "--exec-file"]).arg(program("berth-attacker"));
        command.arg("--chroot-base-dir").arg(&cells).arg("--daemonize").args(flags);
        command.args(["--resource-limit", &format!("no-file={FILES}")]);
        command.args(["--resource-limit", &format!("fsize={FILE_BYTES}")]);
        command.args(["--", "attack", "report=/report"]).args(&self.aims);
        self.report(&mut command);
        let path = cell.join("root/report");
        let deadline = Instant::now() + limits::EXIT;
        loop {
            let text = fs::read_to_string(&path).unwrap_or_default();
            if text.ends_with(&format!("{END}\n")) {
                return outcomes(&text);
            }
            assert!(Instant::now() < deadline, "{text}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it reports from a cell as it should be.
    fn best_jail(&self) -> BTreeMap<String, Outcome> {
        let user = USER.to_string();
        let groups = GROUP_LIMITS.map(|(file, value)| format!("{file}={value}"));
        let mut flags = vec!["--uid", &user, "--gid", &user, "--new-pid-ns", "--netns", NETWORK_FILE];
        flags.extend(["--cgroup-version", "2", "--parent-cgroup", GROUP]);
        flags.extend(groups.iter().flat_map(|group| ["--cgroup", group]));
        self.jail(false, &flags)
    }

    /// What it reports from a cell without these layers.
    fn cage(&self, without: &[Layer], attempts: &[&str]) -> BTreeMap<String, Outcome> {
        let root = self.base.path().join("cage");
        put_programs(&root);
        fs::create_dir_all(root.join("dev/net")).unwrap();
        let tun = root.join("dev/net/tun");
        rustix::fs::mknodat(CWD, &tun, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, TUN_DEVICE)
            .unwrap();
        for path in [&tun, &root] {
            chown(path, Some(USER), Some(USER)).unwrap();
        }
        let group = PathBuf::from("/sys/fs/cgroup").join(GROUP).join("cage");
        make_group(&group);
        let attacker = program("berth-attacker");
        let mut command = Command::new(&attacker);
        if !without.contains(&Layer::Environment) {
            command.env_clear();
        }
        let names: Vec<_> = without.iter().map(|layer| layer.name()).collect();
        command.arg("with-key").arg(&attacker).args(["cage", &format!("without={}", names.join(","))]);
        command.arg(format!("user={USER}")).arg(format!("root={}", root.display()));
        command.arg(format!("network={NETWORK_FILE}")).arg(format!("files={FILES}"));
        command.arg(format!("file-bytes={FILE_BYTES}"));
        command.arg(format!("group={}", group.join("cgroup.procs").display()));
        let report = self.report(command.args(&self.aims).args(attempts));
        fs::remove_dir_all(&root).unwrap();
        report
    }

    fn report(&self, command: &mut Command) -> BTreeMap<String, Outcome> {
        // What the attacker could type into, if it were left its caller's terminal.
        let terminal = terminal();
        command.stdin(terminal.1).stdout(Stdio::piped());
        let mut child = process::in_session(command, true).spawn().unwrap();
        let mut text = String::new();
        child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert!(process::wait_for(&mut child, limits::EXIT), "it runs on");
        let status = child.wait().unwrap();
        assert!(status.success(), "{command:?}: {status}\n{text}");
        outcomes(&text)
    }

    /// What becomes of one attempt in a cell without these layers.
    fn outcome(&self, attempt: &Attempt, without: &[Layer]) -> Outcome {
        let mut report = self.cage(without, &[attempt.name]);
        report.remove(attempt.name).unwrap_or_else(|| panic!("no word of {}", attempt.name))
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        process::kill(&mut self.neighbour);
        // A failed test shows its own reason, not what it left undone.
        let _ = Command::new("ip").args(["netns", "delete", NETWORK]).status();
        // What is left of cells ends with its pid namespace; a group goes when it is empty.
        let groups = Path::new("/sys/fs/cgroup").join(GROUP);
        for name in [ID, "cage", ""] {
            let _ = fs::remove_dir(groups.join(name));
        }
    }
}

/// A setting of the kernel's that is changed for a while. Nothing happens where there is none.
struct Setting {
    file: &'static str,
    before: Option<String>,
}

impl Setting {
    fn change(file: &'static str, value: &str) -> Setting {
        let before = fs::read_to_string(file).ok();
        if before.is_some() {
            fs::write(file, value).unwrap();
        }
        Setting { file, before }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = fs::write(self.file, before);
        }
    }
}

/// Devices 1:3 and 10:200.
const NULL_DEVICE: u64 = libc::makedev(1, 3);
const TUN_DEVICE: u64 = libc::makedev(10, 200);

/// A terminal, from both sides.
fn terminal() -> (OwnedFd, OwnedFd) {
    let outer = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    rustix::pty::unlockpt(&outer).unwrap();
    let name = rustix::pty::ptsname(&outer, Vec::new()).unwrap();
    let inner = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty());
    (outer, inner.unwrap())
}

fn leak(path: &str) -> OwnedFd {
    let fd = process::passable(File::open(path).unwrap()).unwrap();
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).unwrap();
    fd
}

/// A process of the cell's user, and where its secret is.
fn neighbour() -> (Child, String) {
    let mut command = Command::new(program("berth-attacker"));
    command.args(["neighbour", &format!("shared-memory={SHARED_MEMORY}")]).uid(USER).gid(USER);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = process::spawn_bound(&mut command, Vec::new()).unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    (child, line.trim_end().to_owned())
}

fn handle(path: &Path) -> String {
    let output = Command::new(program("berth-attacker")).arg("handle").arg(path).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

/// The attacker as the program of a cell, as one that is setuid root, and as one with a capability.
fn put_programs(root: &Path) {
    fs::create_dir_all(root).unwrap();
    for (name, bits) in [("berth-attacker", 0o555), ("setuid-root", 0o4755), ("with-capability", 0o755)] {
        // The jailer copies the program itself, and takes nothing that is there.
        if name != "berth-attacker" || root.ends_with("cage") {
            fs::copy(program("berth-attacker"), root.join(name)).unwrap();
            mode(&root.join(name), bits);
        }
    }
    let capability: Vec<u8> = CAPABILITY.iter().flat_map(|word| word.to_le_bytes()).collect();
    let file = root.join("with-capability");
    rustix::fs::setxattr(file, "security.capability", &capability, XattrFlags::empty()).unwrap();
}

fn make_group(group: &Path) {
    let parent = group.parent().unwrap();
    fs::create_dir_all(group).unwrap();
    // From above: a group's controllers are those that its parent passes on.
    for passes_on in [parent.parent().unwrap(), parent] {
        fs::write(passes_on.join("cgroup.subtree_control"), "+pids +memory").unwrap();
    }
    for (file, value) in GROUP_LIMITS {
        fs::write(group.join(file), value).unwrap();
    }
}

fn mode(path: &Path, bits: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(bits)).unwrap();
}

fn run(name: &str, arguments: &[&str]) {
    assert!(Command::new(name).args(arguments).status().unwrap().success(), "{name} {arguments:?}");
}

/// A call that the kernel does not have, or does not understand, was no attempt.
fn was_a_try(outcome: &Outcome) -> bool {
    !matches!(outcome, Outcome::Refused(libc::ENOSYS | libc::EINVAL | libc::EFAULT))
}

#[test]
fn nothing_that_an_attacker_tries_in_a_cell_succeeds() {
    let ground = Ground::new();
    let report = ground.best_jail();
    fails_but_for(&report, &[]);
}

#[test]
fn in_a_rootless_cell_succeeds_what_the_documentation_says_and_no_more() {
    let ground = Ground::new();
    // The user has to be let at KVM.
    let kvm = Path::new("/dev/kvm");
    let before = fs::metadata(kvm).unwrap().permissions();
    mode(kvm, 0o666);
    let report = ground.jail(true, &["--rootless"]);
    fs::set_permissions(kvm, before).unwrap();
    fails_but_for(&report, &IN_ROOTLESS_CELL);
}

/// These attempts were made and succeeded; all others were made and failed.
#[track_caller]
fn fails_but_for(report: &BTreeMap<String, Outcome>, successes: &[&str]) {
    let mut wrong = Vec::new();
    for attempt in &ATTEMPTS {
        let outcome = report.get(attempt.name);
        let is_reached = outcome == Some(&Outcome::Reached);
        if is_reached != successes.contains(&attempt.name) || !outcome.is_some_and(was_a_try) {
            wrong.push(format!("{}: {outcome:?}", attempt.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_attempt_succeeds_in_a_cell_without_what_stops_it() {
    let ground = Ground::new();
    let mut wrong = Vec::new();
    for attempt in &ATTEMPTS {
        let outcome = ground.outcome(attempt, attempt.stopped_by);
        if outcome != Outcome::Reached {
            wrong.push(format!("{}: {outcome:?}", attempt.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn each_layer_that_is_said_to_stop_an_attempt_does_so_alone() {
    let ground = Ground::new();
    let mut wrong = Vec::new();
    for attempt in &ATTEMPTS {
        for layer in attempt.stopped_by {
            let others: Vec<_> = attempt.stopped_by.iter().copied().filter(|other| other != layer).collect();
            let outcome = ground.outcome(attempt, &others);
            if outcome == Outcome::Reached || !was_a_try(&outcome) {
                wrong.push(format!("{} by {}: {outcome:?}", attempt.name, layer.name()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_core_of_a_cell_goes_to_a_program_either() {
    let ground = Ground::new();
    let _pattern = Setting::change("/proc/sys/kernel/core_pattern", "|/bin/cat");
    assert_ne!(ground.best_jail()["core"], Outcome::Reached);
    // The usual way to say "no core" is not heard by the kernel where a program takes them.
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, none).unwrap();
    let core = ATTEMPTS.iter().find(|attempt| attempt.name == "core").unwrap();
    assert_eq!(ground.outcome(core, &[Layer::Limits]), Outcome::Reached);
}
