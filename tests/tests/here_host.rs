//! A host keeps its promises to whoever calls from outside. Runs on this machine, not in a host as the other files here.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use berth_tests::assets;
use berth_tests::host::link::{Event, Link, Running};
use berth_tests::host::process::in_session;
use berth_tests::host::wire::{self, Size};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::OpenptFlags;

const LIMIT: Duration = Duration::from_secs(120);

/// The agent on this machine, which is killed with all its commands at the end.
struct Agent {
    link: Link,
    process: Child,
}

impl Agent {
    fn start() -> Agent {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_berth-host-agent"));
        command.arg("--socket").stdin(OwnedFd::from(theirs));
        let process = command.spawn().unwrap();
        drop(command);
        Agent { link: Link::new(ours).unwrap(), process }
    }

    fn run(&self, script: &str) -> Running {
        self.start_command(script, None)
    }

    fn start_command(&self, script: &str, terminal: Option<Size>) -> Running {
        let argv = ["sh", "-c", script].map(String::from).into();
        self.link.run(wire::Command { argv, env: Vec::new(), cwd: None, terminal }).unwrap()
    }

    /// All output and the last event of a command that must end.
    fn finish(&self, mut running: Running) -> (String, Event) {
        let mut output = Vec::new();
        let end = running.finish(Some(Instant::now() + LIMIT), |bytes| output.extend(bytes));
        (String::from_utf8(output).unwrap(), end.expect("the command hangs"))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.link.close();
        self.process.wait().unwrap();
    }
}

#[test]
fn output_error_and_exit_code_come_apart() {
    let agent = Agent::start();
    let mut running = agent.run("printf out; printf err >&2; exit 7");
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        match running.next(Some(Instant::now() + LIMIT)).unwrap() {
            Event::Stdout(bytes) => out.extend(bytes),
            Event::Stderr(bytes) => err.extend(bytes),
            end => break assert_eq!(end, Event::Exit(7)),
        }
    }
    assert_eq!((out.as_slice(), err.as_slice()), (b"out".as_slice(), b"err".as_slice()));
}

#[test]
fn what_cannot_be_started_ends_like_in_a_shell() {
    let agent = Agent::start();
    let start = |program: &str| {
        let command =
            wire::Command { argv: vec![program.into()], env: Vec::new(), cwd: None, terminal: None };
        agent.finish(agent.link.run(command).unwrap())
    };
    let (said, end) = start("no-such-program");
    assert_eq!(end, Event::Exit(127));
    assert!(said.starts_with("cannot run no-such-program: "), "{said}");
    assert_eq!(start("/etc/passwd").1, Event::Exit(126));
}

#[test]
fn a_signal_ends_the_command_and_its_children() {
    let agent = Agent::start();
    let running = agent.run("sleep 1000 & sleep 1000");
    running.input().signal(libc::SIGTERM).unwrap();
    assert_eq!(agent.finish(running).1, Event::Exit(128 + libc::SIGTERM));
    // One that has closed its output may not have ended quite.
    wait_until("the children's end", || agent.link.ping(LIMIT).unwrap() == 0);
}

#[test]
fn megabytes_of_any_bytes_go_through_a_command_unchanged() {
    let agent = Agent::start();
    let sent: Vec<u8> = (0..5_000_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let mut running = agent.run("cat");
    let input = running.input();
    let mut got: Vec<u8> = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            input.write(&sent).unwrap();
            input.end().unwrap();
        });
        let end = running.finish(Some(Instant::now() + LIMIT), |bytes| got.extend(bytes));
        assert_eq!(end, Some(Event::Exit(0)));
    });
    assert!(got == sent, "{} bytes sent, {} came back", sent.len(), got.len());
}

#[test]
fn a_command_whose_output_nobody_takes_holds_up_no_other() {
    let agent = Agent::start();
    let _untaken = agent.run("yes");
    let _unfed = agent.run("sleep 1000");
    for number in 0..100 {
        assert_eq!(agent.finish(agent.run(&format!("echo {number}"))).0, format!("{number}\n"));
    }
}

#[test]
fn input_that_a_command_does_not_take_is_no_error_and_does_not_stay() {
    let agent = Agent::start();
    let running = agent.run("exec <&-; sleep 3; echo done");
    let input = running.input();
    input.write(&vec![0; 4 * wire::WINDOW]).unwrap();
    assert_eq!(agent.finish(running), ("done\n".into(), Event::Exit(0)));
}

#[test]
fn a_terminal_has_its_size_and_learns_a_new_one() {
    let agent = Agent::start();
    let script = "trap 'stty size; exit 5' WINCH; stty size; while :; do sleep 0.01; done";
    let mut running = agent.start_command(script, Some(Size { rows: 30, columns: 100 }));
    let mut said = String::new();
    while !said.contains('\n') {
        let Some(Event::Stdout(bytes)) = running.next(Some(Instant::now() + LIMIT)) else { panic!("{said}") };
        said += &String::from_utf8(bytes).unwrap();
    }
    running.input().resize(Size { rows: 31, columns: 101 }).unwrap();
    let (rest, end) = agent.finish(running);
    assert_eq!((said + &rest, end), ("30 100\r\n31 101\r\n".into(), Event::Exit(5)));
}

#[test]
fn what_a_command_leaves_running_is_counted_and_ends_with_the_owner() {
    let mut agent = Agent::start();
    let (pid, end) = agent.finish(agent.run("setsid sleep 1000 & echo $!"));
    assert_eq!(end, Event::Exit(0));
    assert_eq!(agent.link.ping(LIMIT).unwrap(), 1);
    let process = Path::new("/proc").join(pid.trim());
    assert!(process.exists());
    agent.link.close();
    agent.process.wait().unwrap();
    // It was killed; that it is gone takes until this machine's process 1 has seen its end.
    let began = Instant::now();
    while process.exists() {
        assert!(began.elapsed() < LIMIT, "{pid} is left");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// berth-host with a nested host, whatever this machine can do itself.
fn berth_host(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth-host"));
    command.env("BERTH_HOST", "nested").args(arguments);
    command
}

fn run(arguments: &[&str]) -> Output {
    berth_host(arguments).stdin(Stdio::null()).output().unwrap()
}

fn run_directory() -> PathBuf {
    assets::cache_dir().unwrap().join("run")
}

#[test]
fn a_nested_host_has_kvm_and_runs_a_guest_with_it() {
    let output = run(&["run", "--", "berth-host", "probe"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said, "guests run in this machine's KVM: the processor has svm and a trial guest ran\n");
}

#[test]
fn a_nested_host_shows_what_it_was_given() {
    let directory = tempfile::tempdir().unwrap();
    let given = directory.path().join("given");
    // A restored host must not show what an earlier one was given.
    for text in ["one", "another"] {
        fs::write(&given, text).unwrap();
        let with = format!("some/where={}", given.display());
        let output = run(&["run", "--with", &with, "--", "sh", "-c", "cat $BERTH_BUILD/some/where"]);
        assert_eq!(String::from_utf8_lossy(&output.stdout), text, "{output:?}");
    }
    let output = run(&[
        "run",
        "--",
        "sh",
        "-c",
        "cd $BERTH_ASSETS && file=$BERTH_SCRATCH/x && ls && dd if=debian.ext4 \
        bs=1k count=1 skip=1 2>&- | od -An -tx2 -j56 -N2 && echo x > $file && cat $file",
    ]);
    let said = String::from_utf8(output.stdout).unwrap();
    // The number is the magic of an ext4 superblock.
    let words: Vec<_> = said.split_whitespace().collect();
    assert_eq!(words, ["bzImage", "debian.ext4", "initramfs.cpio", "vmlinux", "ef53", "x"]);
}

#[test]
fn input_output_and_exit_code_pass_through_a_nested_host() {
    let mut command = berth_host(&["run", "--", "sh", "-c", "cat; echo oops >&2; exit 42"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"in\0out\n").unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.stdout, b"in\0out\n");
    assert!(output.stderr.ends_with(b"oops\n"), "{output:?}");
    assert_eq!(output.status.code(), Some(42));
}

#[test]
fn a_command_over_its_time_limit_ends_with_124() {
    assert_eq!(run(&["run", "--timeout", "1", "--", "sleep", "1000"]).status.code(), Some(124));
}

#[test]
fn two_hosts_run_side_by_side() {
    let (mut first, first_qemu) = talking_host();
    let (mut second, second_qemu) = talking_host();
    assert!(is_alive(first_qemu) && is_alive(second_qemu));
    for child in [&mut first, &mut second] {
        child.stdin.take();
        assert_eq!(child.wait().unwrap().code(), Some(0));
    }
}

#[test]
fn an_interrupted_host_leaves_no_process_and_no_directory() {
    for (signal, code) in [(Signal::INT, Some(130)), (Signal::TERM, Some(143)), (Signal::KILL, None)] {
        let (mut child, qemu) = talking_host();
        // Waiting for a child closes its input, and the command would end by that before the signal is seen.
        let _input = child.stdin.take();
        let directory = own_run_directory(&child).expect("it has a directory while it runs");
        kill_process(pid(&child), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), code, "{signal:?}");
        wait_until("QEMU's end", || !is_alive(qemu));
        if signal == Signal::KILL {
            // Nobody could remove it then; the next run does.
            run(&["run", "--", "true"]);
        }
        assert!(!directory.exists(), "{signal:?}");
    }
}

#[test]
fn a_host_interrupted_while_it_starts_leaves_nothing_either() {
    let mut child = berth_host(&["run", "--", "sleep", "1000"]).spawn().unwrap();
    wait_until("the start", || own_run_directory(&child).is_some() || child.try_wait().unwrap().is_some());
    let directory = own_run_directory(&child).expect("it has a directory while it starts");
    kill_process(pid(&child), Signal::TERM).unwrap();
    child.wait().unwrap();
    assert!(!directory.exists());
}

#[test]
fn a_forwarded_port_leads_into_the_nested_host() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let forward = format!("{port}:7777");
    let script = "socat TCP-LISTEN:7777,reuseaddr,fork SYSTEM:'tr a-z A-Z'";
    let mut child = berth_host(&["run", "--forward", &forward, "--", "sh", "-c", script]).spawn().unwrap();
    let mut answer = String::new();
    // QEMU takes connections before the command listens, and then closes them.
    wait_until("an answer", || {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return false };
        answer.clear();
        let asked = stream.write_all(b"hello").and_then(|()| stream.shutdown(std::net::Shutdown::Write));
        asked.and_then(|()| stream.read_to_string(&mut answer)).is_ok_and(|length| length > 0)
    });
    kill_process(pid(&child), Signal::TERM).unwrap();
    child.wait().unwrap();
    assert_eq!(answer, "HELLO");
}

#[test]
fn a_shell_has_a_terminal_of_the_right_size_that_follows_ours() {
    let (main, terminal) = terminal(40, 120);
    let mut command = berth_host(&["shell"]);
    let clone = || terminal.try_clone().unwrap();
    command.stdin(clone()).stdout(clone()).stderr(clone());
    let mut child = in_session(&mut command, true).spawn().unwrap();
    drop((command, terminal));
    let mut screen = Screen { main, text: String::new() };
    screen.wait_for("# ");
    screen.type_in("stty size; [ -t 0 ] && echo 'on' 'a' 'terminal'\n");
    screen.wait_for("40 120\r\non a terminal");
    rustix::termios::tcsetwinsize(&screen.main, window(41, 121)).unwrap();
    screen.type_in("while [ \"$(stty size)\" != '41 121' ]; do sleep 0.1; done; echo 're''sized'\n");
    screen.wait_for("resized");
    screen.wait_for("# ");
    // The key goes to the command in there and ends nothing here.
    screen.type_in("echo sleep'ing'; sleep 1000\n");
    screen.wait_for("sleeping");
    screen.type_in("\x03");
    screen.wait_for("# ");
    screen.type_in("exit 3\n");
    screen.wait_for("exit");
    assert_eq!(child.wait().unwrap().code(), Some(3));
}

#[test]
fn a_saved_state_that_does_not_load_is_replaced_by_booting() {
    let cache = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(assets::cache_dir().unwrap()).unwrap().flatten() {
        let name = entry.file_name();
        if !["run", "host-states"].iter().any(|ours| name == *ours) {
            std::os::unix::fs::symlink(entry.path(), cache.path().join(name)).unwrap();
        }
    }
    let start = || {
        let mut command = berth_host(&["run", "--verbose", "--", "true"]);
        let output = command.env("BERTH_CACHE", cache.path()).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(start().contains("nested host, booted"));
    assert!(start().contains("nested host, restored"));
    let states = cache.path().join("host-states");
    let entry = fs::read_dir(states).unwrap().flatten().map(|e| e.path()).find(|path| path.is_dir()).unwrap();
    File::options().write(true).open(entry.join("state")).unwrap().set_len(100_000).unwrap();
    let said = start();
    assert!(said.contains("a saved state is of no use") && said.contains("nested host, booted"), "{said}");
    assert!(start().contains("nested host, restored"));
}

/// A host with a command in it that waits for its input's end, and the number of its QEMU process.
fn talking_host() -> (Child, i32) {
    let mut command = berth_host(&["run", "--", "sh", "-c", "echo ready; cat"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut ready = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
    let children = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap().flatten();
    let children: String =
        children.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok()).collect();
    let qemu = children.trim().parse().unwrap_or_else(|_| panic!("not one child: {children:?}"));
    (child, qemu)
}

fn own_run_directory(child: &Child) -> Option<PathBuf> {
    let path = run_directory().join(format!("{}-0", child.id()));
    path.exists().then_some(path)
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

fn is_alive(process: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn window(rows: u16, columns: u16) -> rustix::termios::Winsize {
    rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// Both ends of a new terminal.
fn terminal(rows: u16, columns: u16) -> (File, File) {
    let main = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    rustix::pty::grantpt(&main).unwrap();
    rustix::pty::unlockpt(&main).unwrap();
    rustix::termios::tcsetwinsize(&main, window(rows, columns)).unwrap();
    let name = rustix::pty::ptsname(&main, Vec::new()).unwrap();
    let terminal = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    (File::from(main), terminal)
}

/// A person at a terminal.
struct Screen {
    main: File,
    text: String,
}

impl Screen {
    fn type_in(&mut self, text: &str) {
        self.main.write_all(text.as_bytes()).unwrap();
    }

    /// Reads on until `text` appears after what was waited for before.
    fn wait_for(&mut self, text: &str) {
        let mut bytes = [0; 4096];
        while !self.text.contains(text) {
            let mut fds = [PollFd::new(&self.main, PollFlags::IN)];
            let limit = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
            assert!(poll(&mut fds, Some(&limit)).unwrap() > 0, "waited in vain for {text:?}: {}", self.text);
            let length = self.main.read(&mut bytes).unwrap_or(0);
            assert!(length > 0, "the terminal ended before {text:?}: {}", self.text);
            self.text += &String::from_utf8_lossy(&bytes[..length]);
        }
        let end = self.text.find(text).unwrap() + text.len();
        self.text.drain(..end);
    }
}
