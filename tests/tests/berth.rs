//! The command line on guests of a real daemon: what a person types, and what comes of it.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::{env, fs, thread};

use api_socket::fleet::State;
use berth_tests::berthd::{Daemon, IMAGE};
use berth_tests::guest::{Console, asset, limits, program};
use berth_tests::host::{process, provide};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};
use serde_json::Value;

/// Exit code, standard output, standard error.
type Said = (i32, String, String);

fn berth(daemon: &Daemon, line: &str) -> Command {
    let mut command = Command::new(program("berth"));
    command.env("BERTH_SOCKET", daemon.path("socket")).args(line.split_whitespace()).stdin(Stdio::null());
    command
}

fn says(mut command: Command, input: &[u8]) -> Said {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// What a command answers that must succeed.
#[track_caller]
fn ok(daemon: &Daemon, line: &str) -> String {
    let (code, output, error) = says(berth(daemon, line), b"");
    assert_eq!(code, 0, "{line}: {output}{error}{}", daemon.log());
    output
}

fn code(daemon: &Daemon, line: &str) -> i32 {
    says(berth(daemon, line), b"").0
}

/// Imports the small system by the command line.
fn import(daemon: &Daemon) {
    let disk = daemon.path("blank.img");
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let mut command = berth(daemon, &format!("image import --name {IMAGE}"));
    command.arg("--kernel").arg(asset(provide::BZIMAGE)).arg("--initrd").arg(asset(provide::INITRAMFS));
    command.args(["--cmdline", "console=ttyS0 quiet reboot=k"]).arg(disk);
    let (code, output, error) = says(command, b"");
    assert_eq!((code, output.trim()), (0, IMAGE), "{error}");
}

#[test]
fn a_guest_is_run_looked_into_and_removed() {
    let daemon = Daemon::start("");
    import(&daemon);
    assert!(ok(&daemon, "image ls").contains(IMAGE));
    let id = ok(&daemon, &format!("run --detach --name web --memory 96M {IMAGE}"));
    let guests: Value = serde_json::from_str(&ok(&daemon, "ps --json")).unwrap();
    assert_eq!((guests[0]["id"].as_str().unwrap(), guests[0]["name"].as_str()), (id.trim(), Some("web")));
    assert!(ok(&daemon, "ps").contains("running, up"));

    assert_eq!(ok(&daemon, "exec web -- uname -s"), "Linux\n");
    assert!(ok(&daemon, &format!("exec {} -- cat /proc/cmdline", &id[..5])).contains("berth.hostname=web "));
    assert_eq!(code(&daemon, "exec web -- false"), 1);
    assert_eq!(code(&daemon, "exec web -- no-such-program"), 127);
    assert_eq!(code(&daemon, "exec none -- true"), 125);
    let killed = berth(&daemon, "exec web -- sh -c").arg("kill -9 $$").status().unwrap();
    assert_eq!(killed.code(), Some(137));
    let (_, counted, _) = says(berth(&daemon, "exec web -- wc -c"), &[b'x'; 300_000]);
    assert_eq!(counted.trim(), "300000");

    ok(&daemon, "pause web");
    assert_eq!(code(&daemon, "exec web -- true"), 125);
    ok(&daemon, "resume web");
    assert!(ok(&daemon, "stats --no-stream web").contains("web"));
    let stats: Value = serde_json::from_str(&ok(&daemon, "stats --json")).unwrap();
    assert!(stats[0]["memory_bytes"].as_u64().unwrap() > 1 << 20, "{stats}");

    let (code, shown, _) = says(berth(&daemon, "console web"), b"echo con-$((1 + 1)); poweroff -f\n");
    assert!(code == 0 && shown.contains("con-2"), "{code} {shown}");
    daemon.wait_for("web", State::Stopped);
    assert!(ok(&daemon, "logs web").contains("con-2"));
    assert!(ok(&daemon, "ps --all").contains("stopped, powered-off"));
    assert_eq!(ok(&daemon, "start web"), "web\n");
    assert_eq!(ok(&daemon, "stop --time 30 web"), "web\n");
    assert_eq!(ok(&daemon, "rm web"), "web\n");
    assert_eq!(ok(&daemon, "ps --all --quiet"), "");
    ok(&daemon, &format!("image rm {IMAGE}"));
}

#[test]
fn a_guest_for_one_command_has_its_output_and_code_and_leaves_nothing() {
    let daemon = Daemon::start("");
    import(&daemon);
    let nothing = daemon.traces();
    let mut command = berth(&daemon, &format!("run --rm --memory 96M {IMAGE} -- sh -c"));
    command.arg("cat; echo err >&2; exit 7");
    assert_eq!(says(command, b"typed\n"), (7, "typed\n".into(), "err\n".into()));
    assert_eq!(ok(&daemon, "ps --all --quiet"), "");
    assert_eq!(daemon.traces(), nothing);

    // Nor does one whose command is not there, also where nobody waits for its end.
    let line = format!("run --rm --detach --memory 96M {IMAGE} -- no-such-program");
    let (code, output, error) = says(berth(&daemon, &line), b"");
    assert_eq!((code, output.as_str(), error.trim()), (127, "", "no-such-program: not found"));
    assert_eq!(daemon.traces(), nothing);

    // One that is kept has gone down by itself.
    assert_eq!(ok(&daemon, &format!("run --name kept --memory 96M {IMAGE} -- echo hi")), "hi\n");
    let guest: Value = serde_json::from_str(&ok(&daemon, "inspect kept")).unwrap();
    assert_eq!(
        (guest["state"].as_str(), guest["last_end"]["outcome"].as_str()),
        (Some("stopped"), Some("powered-off"))
    );

    // A shell that reads its commands from a pipe.
    let shell = berth(&daemon, &format!("run --rm --memory 96M {IMAGE}"));
    let (code, shown, error) = says(shell, b"echo in-$((2 + 2))\nexit 3\n");
    assert!(code == 3 && shown.contains("in-4"), "{code} {shown} {error}");
}

#[test]
fn a_guest_that_was_run_goes_on_when_the_daemon_does_not_and_its_runner_is_told() {
    let mut daemon = Daemon::start("");
    import(&daemon);
    let line = format!("run --rm --name web --memory 96M {IMAGE} -- sh -c");
    let mut command = berth(&daemon, &line);
    command.arg("echo begun; sleep 1000").stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut runs = command.spawn().unwrap();
    let mut said = BufReader::new(runs.stdout.take().unwrap());
    let mut begun = String::new();
    said.read_line(&mut begun).unwrap();
    assert_eq!(begun, "begun\n");
    let before = daemon.client().guest("web").unwrap();
    daemon.kill();
    daemon.run();
    let output = runs.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(125) && error.contains("the guest goes on"), "{output:?}");
    let after = daemon.client().guest("web").unwrap();
    assert_eq!((after.pid, after.state), (before.pid, State::Running));
    assert_eq!(ok(&daemon, "exec web -- echo still"), "still\n");

    // It is removed with its end, as was said, and not before.
    let (code, _, error) = says(berth(&daemon, "restart web"), b"");
    assert!(code == 1 && error.contains("--rm"), "{code} {error}");
    assert_eq!(daemon.client().guest("web").unwrap().pid, before.pid);
    ok(&daemon, "stop web");
    assert_eq!(ok(&daemon, "ps --all --quiet"), "");
}

/// What a person sees who types `berth run IMAGE`.
#[test]
fn a_terminal_gets_a_shell_in_a_new_guest_and_is_given_back() {
    let daemon = Daemon::start("");
    import(&daemon);
    let nothing = daemon.traces();
    let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&person).unwrap();
    unlockpt(&person).unwrap();
    let end = ioctl_tiocgptpeer(&person, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    let size = Winsize { ws_row: 41, ws_col: 123, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&person, size).unwrap();
    let before = format!("{:?}", tcgetattr(&end).unwrap());

    let mut command = berth(&daemon, &format!("run --rm --name shell --memory 96M {IMAGE}"));
    let clone = || end.try_clone().unwrap();
    command.stdin(clone()).stdout(clone()).stderr(clone()).env("TERM", "vt100");
    let mut shell = process::in_session(&mut command, true).spawn().unwrap();
    let mut console = Console::new(person.try_clone().unwrap(), person);
    console.wait_for("# ", limits::BOOT);
    console.send(b"echo $TERM-$(stty size)\r");
    console.wait_for("vt100-41 123", limits::COMMAND);
    // Ctrl-C is for what runs in the guest.
    // Said when the shell has given the terminal its mode back, in which the key is a signal.
    console.send(b"echo sleep''ing; sleep 1000\r");
    console.wait_for("sleeping", limits::COMMAND);
    console.send(b"\x03");
    console.send(b"exit 5\r");
    assert!(process::wait_for(&mut shell, limits::COMMAND), "the shell does not end");
    assert_eq!(shell.wait().unwrap().code(), Some(5));
    assert_eq!(format!("{:?}", tcgetattr(&end).unwrap()), before);
    assert_eq!(daemon.traces(), nothing);
}

/// A terminal that the command had would end with `berth`, and the command with it.
#[test]
fn a_command_in_the_background_lives_on_when_it_was_started_at_a_terminal() {
    let daemon = Daemon::start("");
    import(&daemon);
    let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&person).unwrap();
    unlockpt(&person).unwrap();
    let end = ioctl_tiocgptpeer(&person, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    let clone = || end.try_clone().unwrap();
    let mut command = berth(&daemon, &format!("run -d --name web --memory 96M {IMAGE} -- sh -c"));
    command.arg("sleep 2; echo alive > /root/sign");
    command.stdin(clone()).stdout(clone()).stderr(clone()).env("TERM", "vt100");
    let mut started = process::in_session(&mut command, true).spawn().unwrap();
    assert!(process::wait_for(&mut started, limits::BOOT), "it does not go into the background");
    assert_eq!(started.wait().unwrap().code(), Some(0));
    let mut look = berth(&daemon, "exec web -- sh -c");
    look.arg("for i in $(seq 100); do [ -s /root/sign ] && break; sleep 0.1; done; cat /root/sign");
    assert_eq!(says(look, b""), (0, "alive\n".into(), String::new()));
    drop(person);
}

#[test]
fn files_and_archives_go_in_and_come_out() {
    let daemon = Daemon::start("");
    import(&daemon);
    ok(&daemon, &format!("run -d --name web --memory 96M {IMAGE}"));
    let here = tempfile::tempdir().unwrap();
    let path = |name: &str| here.path().join(name).to_str().unwrap().to_string();
    fs::create_dir_all(path("tree/deep")).unwrap();
    fs::write(path("tree/deep/leaf"), "leaf").unwrap();
    let large: Vec<u8> = (0..2_000_000_u32).map(|number| (number % 251) as u8).collect();
    fs::write(path("tree/large"), &large).unwrap();

    ok(&daemon, &format!("cp {} web:/root", path("tree")));
    assert_eq!(ok(&daemon, "exec web -- cat /root/tree/deep/leaf"), "leaf");
    ok(&daemon, &format!("cp web:/root/tree {}", path("back")));
    assert_eq!(fs::read(path("back/large")).unwrap(), large);
    assert_eq!(fs::read_to_string(path("back/deep/leaf")).unwrap(), "leaf");

    let archive = berth(&daemon, "cp web:/root/tree -").output().unwrap();
    assert!(archive.status.success());
    ok(&daemon, "exec web -- mkdir /root/other");
    let (code, _, error) = says(berth(&daemon, "cp - web:/root/other"), &archive.stdout);
    assert_eq!(code, 0, "{error}");
    assert_eq!(ok(&daemon, "exec web -- cat /root/other/tree/deep/leaf"), "leaf");
    let (code, _, error) = says(berth(&daemon, "cp web:/none ."), b"");
    assert!(code == 1 && error.starts_with("berth: web:/none: "), "{error}");
}

#[test]
fn events_and_logs_are_followed_while_things_happen() {
    let daemon = Daemon::start("");
    import(&daemon);
    let mut events = berth(&daemon, "events --json").stdout(Stdio::piped()).spawn().unwrap();
    let told = Arc::new(Mutex::new(Vec::new()));
    let (lines, tells) = (BufReader::new(events.stdout.take().unwrap()).lines(), told.clone());
    let hears = thread::spawn(move || lines.for_each(|line| tells.lock().unwrap().push(line.unwrap())));
    // It is told from when the daemon has its request: until then others come and go.
    while told.lock().unwrap().is_empty() {
        ok(&daemon, &format!("create --name early --memory 96M {IMAGE}"));
        ok(&daemon, "rm early");
    }
    ok(&daemon, &format!("create --name web --memory 96M {IMAGE}"));
    ok(&daemon, "start web");
    let logs = berth(&daemon, "logs --follow web").stdout(Stdio::piped()).spawn().unwrap();
    ok(&daemon, "exec web -- sh -c true");
    berth(&daemon, "exec web -- sh -c").arg("echo to-the-console > /dev/console").status().unwrap();
    ok(&daemon, "stop web");
    // The guest's end is that of what follows it.
    let logged = logs.wait_with_output().unwrap();
    assert!(logged.status.success());
    assert!(String::from_utf8_lossy(&logged.stdout).contains("to-the-console"));
    rustix::process::kill_process(rustix::process::Pid::from_child(&events), rustix::process::Signal::TERM)
        .unwrap();
    events.wait().unwrap();
    hears.join().unwrap();
    let told: Vec<Value> =
        told.lock().unwrap().iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of_web = told.iter().filter(|event| event["name"] == "web");
    let states: Vec<_> = of_web.map(|event| event["what"].as_str().unwrap()).collect();
    for what in ["created", "running", "stopped"] {
        assert!(states.contains(&what), "{what}: {told:?}");
    }
}

/// `make run`, but for the terminal.
#[test]
fn what_make_run_starts_comes_to_a_guest_and_leaves_nothing_on_the_host() {
    let script = env::current_dir().unwrap().join("run-berth");
    fs::write(&script, include_str!("../../resources/run-berth.sh")).unwrap();
    let output = Command::new("sh").arg(&script).args(["--", "uname", "-s"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(String::from_utf8_lossy(&output.stdout).ends_with("\nLinux\n"), "{output:?}");
    let left = Command::new("sh").args(["-c", "ip link show berthrun; pgrep berthd"]).output().unwrap();
    assert_eq!(left.stdout, b"", "{left:?}");
}
