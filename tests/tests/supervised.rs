//! A supervisor that dies and comes back finds its VMMs as they were: it made their API's socket and what they write to, and
//! reads how they ended in a file; and a VMM takes no notice of its end.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use api_socket::{ActionType, Client, Request};
use berth_tests::cell::{Cells, Vmm as Jailed, output, was_refused};
use berth_tests::filters;
use berth_tests::guest::vmm::signal_thread;
use berth_tests::guest::{Console, Ended, Guest, Kernel, Name, Setup, Vmm, asset, limits, program};
use berth_tests::host::{process, provide};
use rustix::process::{Pid, Signal};
use serde_json::Value;
use tempfile::TempDir;

/// What a file of `--exit-status` says.
#[track_caller]
fn told(path: &Path) -> (i64, String) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.ends_with('\n') && text.lines().count() == 1, "{text:?}");
    let value: Value = serde_json::from_str(&text).unwrap();
    (value["exit_code"].as_i64().unwrap(), value["reason"].as_str().unwrap().to_string())
}

fn telling(setup: Setup) -> Setup {
    Setup { arguments: [setup.arguments, vec!["--exit-status=exit".into()]].concat(), ..setup }
}

/// The guest has ended as its exit code says, and the file says the same.
#[track_caller]
fn ended_with(mut guest: Guest, code: i32, words: &[&str]) {
    assert_eq!(guest.ended(), Ended::Code(code));
    let (told, reason) = told(&guest.path("exit"));
    assert_eq!(told, i64::from(code), "{reason}");
    for word in words {
        assert!(reason.contains(word), "{word:?} is not in: {reason}");
    }
}

#[test]
fn how_a_guest_ended_is_told_in_a_file() {
    let booted = |name| {
        let setup = Setup { name, command_line: "reboot=k".into(), ..Setup::default() };
        let guest = Guest::booted(telling(setup));
        assert_eq!(fs::read(guest.path("exit")).unwrap(), b"");
        guest
    };
    let mut guest = booted(Name::Berth);
    guest.say("poweroff -f");
    ended_with(guest, 0, &["powered off"]);
    for (name, code) in [(Name::Berth, 3), (Name::Firecracker, 0)] {
        let mut guest = booted(name);
        guest.say("reboot -f");
        ended_with(guest, code, &["reset"]);
    }
}

#[test]
fn how_a_process_ended_without_its_guest_s_doing_is_told_too() {
    let configured = || Guest::configured(telling(Setup::default()));
    let guest = configured();
    guest.vmm.signal(Signal::TERM);
    ended_with(guest, 0, &["stopped by the operator"]);

    let guest = configured();
    signal_thread(guest.vmm.pid(), "berth-api", Signal::HUP);
    ended_with(guest, 156, &["SIGHUP", "in thread berth-api"]);

    // A request for which there is no memory.
    let arguments = vec!["--http-api-max-payload-size=50000000".to_string()];
    let mut guest = Guest::configured(telling(Setup { arguments, ..Setup::default() }));
    guest.vmm.limit_memory((guest.vmm.status_kib("VmSize") << 10) + (1 << 20));
    let _ = guest.api.request("PUT", "/logger", Some(&"x".repeat(40_000_000)));
    ended_with(guest, 2, &["SIGABRT"]);

    // KVM_RUN, and with it all ioctls of a vCPU.
    let place = tempfile::tempdir().unwrap();
    let filter = place.path().join("filter.json");
    fs::write(&filter, filters::custom(|kind, rule| kind != "vcpu" || rule.syscall != "ioctl")).unwrap();
    let arguments = vec!["--seccomp-filter".into(), filter.display().to_string()];
    let mut guest = Guest::configured(telling(Setup { arguments, ..Setup::default() }));
    let _ = guest.api.apply(&Request::Action(ActionType::InstanceStart));
    ended_with(guest, 148, &["SIGSYS", "system call 16 (ioctl)", "in thread berth-vcpu 0"]);
}

#[test]
fn a_vmm_that_was_killed_leaves_the_file_empty() {
    let place = tempfile::tempdir().unwrap();
    fs::write(place.path().join("exit"), "of another process").unwrap();
    let mut vmm = Vmm::spawn_in(place, Name::Berth, &["--api-sock", "api.sock", "--exit-status", "exit"]);
    vmm.client().instance_info().unwrap();
    vmm.kill();
    assert_eq!(vmm.ended(limits::EXIT), Ended::Signal(9));
    assert_eq!(fs::read(vmm.path("exit")).unwrap(), b"");
}

#[test]
fn what_was_wrong_before_there_was_a_guest_is_told() {
    let end = |arguments: &[&str]| {
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("taken"), "").unwrap();
        let arguments = [&["--exit-status", "exit"], arguments].concat();
        let mut vmm = Vmm::spawn_in(place, Name::Berth, &arguments);
        let Ended::Code(code) = vmm.ended(limits::API) else { panic!("killed") };
        let told = told(&vmm.path("exit"));
        assert_eq!(i64::from(code), told.0, "{}", told.1);
        told
    };
    for (arguments, code, word) in [
        (&["--no-api", "--config-file", "none"][..], 152, "none"),
        (&["--log-path", "no/log"], 152, "`log_path` is no/log"),
        (&["--api-sock", "taken"], 1, "--api-sock taken"),
    ] {
        let (told, reason) = end(arguments);
        assert!(told == code && reason.contains(word), "{told}: {reason}");
    }
}

#[test]
fn a_full_pipe_that_nobody_reads_does_not_keep_a_process_from_its_end() {
    for is_shared in [false, true] {
        let place = tempfile::tempdir().unwrap();
        let (_reader, mut writer) = std::io::pipe().unwrap();
        // Of 64 KiB.
        writer.write_all(&[0; 16 * 4096]).unwrap();
        let passed = process::passable(&writer).unwrap();
        let mut command = Command::new(program("berth-vmm"));
        let log = [format!("--fd=log={}", process::number(&passed)), "--log-path=fd:log".into()];
        command.args(if is_shared { &log[..] } else { &[] });
        command.args(["--no-api", "--config-file", "none", "--exit-status", "exit"]);
        command.stdin(Stdio::null()).stdout(writer.try_clone().unwrap()).stderr(writer);
        let child = process::spawn_bound(command.current_dir(place.path()), vec![passed]).unwrap();
        assert_eq!(Jailed { child }.ended(), Ended::Code(152));
        assert_eq!(told(&place.path().join("exit")).0, 152);
    }
}

/// What a supervisor makes for a VMM, where the VMM's user cannot come.
struct Place(TempDir);

impl Place {
    fn new() -> Place {
        Place(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn flag(&self, name: &str) -> String {
        format!("--file={name}={}", self.path(name).display())
    }
}

/// A jailer that is to become a VMM whose socket, log, metrics and exit status were made outside of the cell.
fn handing_over(cells: &Cells, place: &Place, flags: &[&str]) -> Jailed {
    let (mut command, listener) = jailer(cells, place, flags);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    Jailed { child: process::spawn_bound(&mut command, vec![listener]).unwrap() }
}

fn jailer(cells: &Cells, place: &Place, flags: &[&str]) -> (Command, OwnedFd) {
    let listener = process::passable(UnixListener::bind(place.path("api.sock")).unwrap()).unwrap();
    let mut files: Vec<_> = ["log", "metrics", "exit"].map(|name| place.flag(name)).into();
    for name in ["log", "metrics", "exit"] {
        fs::write(place.path(name), "").unwrap();
    }
    files.push(format!("--fd=api={}", process::number(&listener)));
    let mut command = cells.jailer_of(&program("berth-vmm"), flags);
    command.args(files).args(["--", "--api-sock", "fd:api", "--log-path", "fd:log"]);
    command.args(["--metrics-path", "fd:metrics", "--exit-status", "fd:exit"]);
    (command, listener)
}

/// Configures and starts a guest whose kernel and initrd were handed over.
fn start(api: &mut Client) {
    let setup = Setup { kernel: Kernel::Path("fd:kernel".into()), ..Setup::default() };
    for mut request in setup.requests() {
        if let Request::PutBootSource(boot) = &mut request {
            boot.initrd_path = Some("fd:initrd".into());
        }
        api.apply(&request).unwrap();
    }
    api.apply(&Request::Action(ActionType::InstanceStart)).unwrap();
}

/// The flags that hand a guest's kernel and initrd over.
fn images() -> [String; 2] {
    [("kernel", provide::VMLINUX), ("initrd", provide::INITRAMFS)]
        .map(|(name, file)| format!("--file={name}={}:ro", asset(file).display()))
}

fn client(place: &Place) -> Client {
    let mut client = Client::connect_within(&place.path("api.sock"), limits::API).unwrap();
    client.set_timeout(Some(limits::API)).unwrap();
    client
}

#[test]
fn a_vmm_in_a_cell_serves_a_socket_and_writes_to_files_that_are_not_in_it() {
    let (cells, place) = (Cells::new(), Place::new());
    let mut vmm = handing_over(&cells, &place, &images().each_ref().map(String::as_str));
    // Connected before anybody serves.
    let mut api = client(&place);
    let mut console = vmm.console();
    start(&mut api);
    console.wait_for("# ", limits::BOOT);
    // The next client finds it too, whoever had the socket first.
    client(&place).apply(&Request::Action(ActionType::FlushMetrics)).unwrap();
    assert!(fs::read_to_string(place.path("log")).unwrap().contains("/actions"));
    assert!(fs::read_to_string(place.path("metrics")).unwrap().lines().count() >= 2);
    assert_eq!(fs::read(place.path("exit")).unwrap(), b"");
    console.send(b"poweroff -f\n");
    assert_eq!(vmm.ended(), Ended::Code(0));
    assert_eq!(told(&place.path("exit")).0, 0);
    // It is not the VMM's to remove.
    assert!(place.path("api.sock").exists() && !cells.root().join("run/api.sock").exists());
}

#[test]
fn what_cannot_be_served_or_written_to_is_named() {
    let place = Place::new();
    fs::write(place.path("file"), "").unwrap();
    let file = process::passable(File::open(place.path("file")).unwrap()).unwrap();
    let number = process::number(&file);
    let refused = |arguments: &[&str], words: &[&str]| {
        let mut command = Command::new(program("berth-vmm"));
        command.arg(format!("--fd=it={number}")).args(arguments).current_dir(place.0.path());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(Stdio::piped());
        let passed = process::passable(&file).unwrap();
        assert_eq!(rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()), Ok(()));
        let child = process::spawn_bound(&mut command, vec![passed]).unwrap();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(152), "{said}");
        for word in words {
            assert!(said.contains(word), "{word:?} is not in: {said}");
        }
    };
    refused(&["--api-sock", "fd:it"], &["`api-sock` is fd:it", "that listens"]);
    refused(&["--api-sock", "fd:other"], &["`api-sock` is fd:other", "these were: it"]);
    refused(&["--log-path", "fd:it"], &["`log_path` is fd:it", "for reading only"]);
    refused(&["--metrics-path", "fd:it"], &["`metrics_path` is fd:it", "for reading only"]);
    refused(&["--exit-status", "fd:it"], &["`exit-status` is fd:it", "for reading only"]);
    // A connected socket would lead out of a cell.
    let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let one = process::passable(one).unwrap();
    assert_eq!(rustix::io::fcntl_setfd(&one, rustix::io::FdFlags::empty()), Ok(()));
    let flag = format!("--fd=api={}", process::number(&one));
    was_refused(&output(&mut Cells::new().jailer(&[&flag])), &["--fd api=", "socket that listens"]);
}

/// A group of the cell's own.
const GROUP: [&str; 6] =
    ["--cgroup-version", "2", "--parent-cgroup", "berth-supervised", "--cgroup", "pids.max=100"];
const PARENT: &str = "/sys/fs/cgroup/berth-supervised";

#[track_caller]
fn removed(cells: &Cells, flags: &[&str]) {
    let output = cells.run(&[&["--remove"], flags].concat());
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!cells.directory().exists());
}

#[test]
fn a_cell_is_removed_with_its_group_when_its_vmm_has_ended_and_not_before() {
    for way in [&[][..], &["--new-pid-ns"]] {
        let cells = Cells::new();
        removed(&cells, &GROUP);
        let mut vmm = cells.start(&[way, &GROUP].concat());
        cells.client();
        let pid = cells.pid();
        was_refused(
            &cells.run(&[&["--remove"][..], &GROUP].concat()),
            &[&format!("process {pid} is in the cell")],
        );
        assert!(cells.client().instance_info().is_ok());
        process::kill(&mut vmm.child);
        cells.kill();
        fs::create_dir_all(cells.root().join("images/more")).unwrap();
        std::os::unix::fs::symlink(PARENT, cells.root().join("images/link")).unwrap();
        // What its caller has mounted there is not the jailer's to take away.
        let mounted = cells.root().join("images/more");
        let mount = |command: &str, arguments: &[&str]| {
            assert!(Command::new(command).args(arguments).arg(&mounted).status().unwrap().success());
        };
        mount("mount", &["-t", "tmpfs", "tmpfs"]);
        fs::write(mounted.join("precious"), "").unwrap();
        was_refused(&cells.run(&[&["--remove"][..], &GROUP].concat()), &["images/more is a mount"]);
        assert!(mounted.join("precious").exists());
        mount("umount", &[]);
        for _ in 0..2 {
            removed(&cells, &GROUP);
            assert!(!Path::new(PARENT).join("cell-1").exists() && Path::new(PARENT).exists());
        }
        // It can be used again.
        let mut vmm = cells.start(&[way, &GROUP].concat());
        cells.client();
        process::kill(&mut vmm.child);
        cells.kill();
        removed(&cells, &GROUP);
        fs::remove_dir(PARENT).unwrap();
    }
}

#[test]
fn who_lives_in_the_group_of_a_cell_is_named() {
    let cells = Cells::new();
    let group = Path::new(PARENT).join("cell-1");
    let flags = ["--remove", "--cgroup-version", "2", "--parent-cgroup", "berth-supervised"];
    fs::create_dir_all(&group).unwrap();
    let mut other = Command::new("sleep").arg("1000").spawn().unwrap();
    fs::write(group.join("cgroup.procs"), other.id().to_string()).unwrap();
    fs::create_dir_all(cells.root()).unwrap();
    was_refused(&cells.run(&flags), &[&format!("process {} is in the control group", other.id())]);
    assert!(cells.root().exists());
    // A zombie is in nobody's way.
    other.kill().unwrap();
    removed(&cells, &flags[1..]);
    other.wait().unwrap();
    fs::remove_dir(PARENT).unwrap();
}

#[test]
fn an_ordinary_user_removes_his_cell_when_its_vmm_has_ended() {
    let cells = Cells::rootless();
    let mut outside = cells.start(&[]);
    cells.client();
    assert_eq!(outside.ended(), Ended::Code(0));
    was_refused(&cells.run(&["--remove"]), &[&format!("process {} is in the cell", cells.pid())]);
    cells.kill();
    removed(&cells, &[]);
}

const POLL: Duration = Duration::from_millis(20);

#[track_caller]
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + limits::COMMAND;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(POLL);
    }
}

/// A shell in the place of a supervisor: it makes its child die with it, if the child does not see to that.
struct Supervisor {
    shell: Child,
    /// Its child, which becomes the VMM.
    jailer: u32,
}

impl Supervisor {
    /// Starts the jailer with FIFOs of the place as standard streams, each open for reading and writing.
    fn start(place: &Place, jailer: &Command, passed: Vec<OwnedFd>) -> Supervisor {
        const SCRIPT: &str =
            r#"setpriv --pdeathsig KILL "$@" 0<>in 1<>out 2<>err & echo $! > pid.new; mv pid.new pid; wait"#;
        for fifo in ["in", "out", "err"] {
            let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
            rustix::fs::mkfifoat(rustix::fs::CWD, place.path(fifo), mode).unwrap();
        }
        let mut shell = Command::new("sh");
        shell.args(["-c", SCRIPT, "sh"]).arg(jailer.get_program()).args(jailer.get_args());
        let shell = process::spawn_bound(shell.current_dir(place.0.path()), passed).unwrap();
        until("the jailer was not started", || place.path("pid").exists());
        let jailer = fs::read_to_string(place.path("pid")).unwrap().trim().parse().unwrap();
        Supervisor { shell, jailer }
    }

    fn kill(&mut self) {
        self.shell.kill().unwrap();
        self.shell.wait().unwrap();
    }

    /// The jailer, or what it has become, has not ended.
    fn has_child(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/status", self.jailer))
            .is_ok_and(|status| !status.contains("\nState:\tZ") && !status.contains("\nState:\tX"))
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.jailer as i32).unwrap()
    }
}

/// Opens a FIFO that has another end.
fn reader(place: &Place, name: &str) -> File {
    File::options().read(true).custom_flags(libc::O_NONBLOCK).open(place.path(name)).unwrap()
}

/// Reads until this was said.
#[track_caller]
fn read_until(file: &mut File, words: &str) -> String {
    let (mut said, deadline) = (String::new(), Instant::now() + limits::BOOT);
    while !said.contains(words) {
        assert!(Instant::now() < deadline, "{words:?} is not in: {said}");
        let mut bytes = [0; 4096];
        match file.read(&mut bytes) {
            Ok(count) => said.push_str(&String::from_utf8_lossy(&bytes[..count])),
            Err(_) => std::thread::sleep(POLL),
        }
    }
    said
}

/// Bytes of the serial port that nobody took.
fn lost(place: &Place) -> u64 {
    client(place).apply(&Request::Action(ActionType::FlushMetrics)).unwrap();
    let metrics = fs::read_to_string(place.path("metrics")).unwrap();
    let lines = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.map(|line| line["uart"]["missed_write_count"].as_u64().unwrap()).sum()
}

#[test]
fn a_guest_lives_on_and_is_found_again_when_its_supervisor_was_killed() {
    // Less than the guest says, and more than its shell does.
    const FIFO: usize = 16 << 10;
    const FLOOD: u64 = 60_000;
    let (cells, place) = (Cells::new(), Place::new());
    let images = images();
    let flags = [images[0].as_str(), &images[1], "--new-session"];
    let (command, listener) = jailer(&cells, &place, &flags);
    let mut supervisor = Supervisor::start(&place, &command, vec![listener]);
    start(&mut client(&place));
    assert_eq!(cells.pid(), supervisor.jailer);
    let mut errors = reader(&place, "err");
    let mut output = reader(&place, "out");
    read_until(&mut output, "# ");
    rustix::pipe::fcntl_setpipe_size(&output, FIFO).unwrap();

    supervisor.kill();
    let mut input = File::options().write(true).open(place.path("in")).unwrap();
    input.write_all(b"echo still ''here\n").unwrap();
    read_until(&mut output, "still here");
    // Nobody has the FIFOs but the VMM, and the guest fills one of them.
    drop((input, output));
    let mut input = File::options().write(true).open(place.path("in")).unwrap();
    input.write_all(format!("yes 0123456789 | head -c {FLOOD}\n").as_bytes()).unwrap();
    until("the guest waits for a reader", || lost(&place) >= FLOOD - 2 * FIFO as u64);
    assert!(supervisor.has_child());

    let mut output = reader(&place, "out");
    read_until(&mut output, "0123456789\n0123456789\n");
    let flags = rustix::fs::fcntl_getfl(&output).unwrap() - rustix::fs::OFlags::NONBLOCK;
    rustix::fs::fcntl_setfl(&output, flags).unwrap();
    let mut console = Console::new(output, input);
    console.send(b"\n");
    console.wait_for("# ", limits::COMMAND);
    assert_eq!(console.shell("echo and here", limits::COMMAND).text, "and here\n");
    console.send(b"poweroff -f\n");
    cells.wait();
    assert_eq!(told(&place.path("exit")), (0, "the guest has ended: powered off".into()));
    let mut said = String::new();
    let _ = errors.read_to_string(&mut said);
    assert_eq!(said, "");
    removed(&cells, &[]);
}

#[test]
fn a_vmm_does_not_die_with_its_parent_whoever_it_runs_as_and_has_its_own_session_if_asked() {
    for (flags, is_own) in [(&[][..], false), (&["--new-session"], true)] {
        let (cells, place) = (Cells::new(), Place::new());
        let (command, listener) = jailer(&cells, &place, flags);
        let mut supervisor = Supervisor::start(&place, &command, vec![listener]);
        client(&place).instance_info().unwrap();
        let of_the_shell = rustix::process::getsid(Pid::from_raw(supervisor.shell.id() as i32)).unwrap();
        let session = rustix::process::getsid(Some(supervisor.pid())).unwrap();
        assert_eq!(session, if is_own { supervisor.pid() } else { of_the_shell });
        supervisor.kill();
        client(&place).instance_info().unwrap();
        assert!(supervisor.has_child());
    }
    // Root without capabilities: no user is changed.
    let (cells, place) = (Cells::new(), Place::new());
    let listener = process::passable(UnixListener::bind(place.path("api.sock")).unwrap()).unwrap();
    let mut command = Command::new(program("berth-jailer"));
    command.args(["--id", "cell-1", "--uid", "0", "--gid", "0", "--exec-file"]).arg(program("berth-vmm"));
    command.arg("--chroot-base-dir").arg(cells.base.path());
    command.args([&format!("--fd=api={}", process::number(&listener)), "--", "--api-sock", "fd:api"]);
    let mut supervisor = Supervisor::start(&place, &command, vec![listener]);
    client(&place).instance_info().unwrap();
    supervisor.kill();
    client(&place).instance_info().unwrap();
    assert!(supervisor.has_child());
    rustix::process::kill_process(supervisor.pid(), Signal::KILL).unwrap();
    until("it does not end", || !supervisor.has_child());
}

#[test]
fn a_jailer_dies_with_its_parent_while_it_builds_the_cell() {
    let (cells, place) = (Cells::new(), Place::new());
    // It is stopped by its own group as soon as it is in it.
    let flags = [&GROUP[..], &["--cgroup", "cgroup.freeze=1"]].concat();
    let mut supervisor = Supervisor::start(&place, &cells.jailer(&flags), Vec::new());
    let group = Path::new(PARENT).join("cell-1");
    until("it was not stopped", || {
        fs::read_to_string(group.join("cgroup.procs")).is_ok_and(|procs| !procs.is_empty())
            && fs::read_to_string(group.join("cgroup.events")).is_ok_and(|events| events.contains("frozen 1"))
    });
    assert!(supervisor.has_child() && cells.directory().join(".unfinished").exists());
    supervisor.kill();
    until("it goes on", || !supervisor.has_child());
    assert!(!cells.root().join("berth-vmm.pid").exists());
    removed(&cells, &GROUP);
    fs::remove_dir(PARENT).unwrap();
}

#[test]
fn a_job_of_a_shell_cannot_have_a_session_and_is_told_so() {
    let cells = Cells::new();
    let mut command = cells.jailer(&["--new-session"]);
    let output = command.process_group(0).stdin(Stdio::null()).output().unwrap();
    was_refused(&output, &["--new-session", "setsid(1)"]);
}
