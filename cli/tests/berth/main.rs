//! The program `berth` with a daemon that is played: what it prints, how it ends, and what becomes of a terminal.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this whole file is a test")]

mod daemon;
mod terminal;

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use api_socket::fleet::State;
use daemon::{Daemon, berth};
use rustix::process::Signal;
use serde_json::Value;
use terminal::Terminal;

/// Exit code, standard output, standard error.
type Said = (i32, String, String);

fn says(mut command: Command) -> Said {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

fn fed(mut command: Command, input: &[u8]) -> Said {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

fn web() -> Daemon {
    Daemon::new().with("web", State::Running)
}

#[test]
fn without_a_daemon_commands_end_with_3_and_those_with_a_command_with_125() {
    let nowhere = Path::new("/nowhere/berthd.sock");
    for line in ["ps", "stop web", "image ls", "logs web", "console web", "events", "stats", "cp web:/x ."] {
        let words: Vec<_> = line.split(' ').collect();
        let (code, output, error) = says(berth(nowhere, &words));
        assert_eq!((code, output.as_str()), (3, ""), "{line}: {error}");
        assert!(error.starts_with("berth: berthd at /nowhere/berthd.sock: "), "{line}: {error}");
        assert!(error.ends_with("start it: sudo systemctl start berthd\n"), "{line}: {error}");
    }
    for line in ["run debian -- true", "exec web -- true"] {
        let words: Vec<_> = line.split(' ').collect();
        assert_eq!(says(berth(nowhere, &words)).0, 125, "{line}");
    }
}

#[test]
fn what_is_not_understood_ends_with_2_and_help_with_0() {
    let nowhere = Path::new("/nowhere");
    for line in ["fly", "stop", "run --memory lots debian", "cp a b"] {
        let words: Vec<_> = line.split(' ').collect();
        assert_eq!(says(berth(nowhere, &words)).0, 2, "{line}");
    }
    let (code, output, _) = says(berth(nowhere, &["--help"]));
    assert!(code == 0 && output.contains("Exit codes:") && output.contains("128 + N"), "{output}");
    assert_eq!(says(berth(nowhere, &["exec", "--help"])).0, 0);
    let (code, output, _) = says(berth(nowhere, &["version"]));
    assert_eq!((code, output), (0, format!("berth {}\nberthd not reachable\n", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn commands_that_come_later_say_so() {
    for name in ["snapshot", "restore", "fork"] {
        let (code, _, error) = says(berth(Path::new("/nowhere"), &[name, "web", "--odd"]));
        assert_eq!(
            (code, error),
            (1, format!("berth: {name}: comes with a later version of Berth; this one cannot do it\n"))
        );
    }
}

#[test]
fn guests_are_listed_for_people_and_for_programs() {
    let daemon = web().with("old", State::Stopped);
    let (code, output, _) = says(daemon.berth(&["ps"]));
    assert!(code == 0 && output.contains("web") && !output.contains("old"), "{output}");
    assert!(says(daemon.berth(&["ps", "--all"])).1.contains("old"));
    assert_eq!(says(daemon.berth(&["ps", "--quiet"])).1, "abc000000000\n");
    let guests: Value = serde_json::from_str(&says(daemon.berth(&["ps", "--all", "--json"])).1).unwrap();
    assert_eq!((guests[0]["name"].as_str(), guests[1]["state"].as_str()), (Some("web"), Some("stopped")));
    let guest: Value = serde_json::from_str(&says(daemon.berth(&["inspect", "abc000000000"])).1).unwrap();
    assert_eq!(guest["name"], "web");
    let (code, _, error) = says(daemon.berth(&["inspect", "none"]));
    assert_eq!(
        (code, error.as_str()),
        (1, "berth: none: There is no such guest; berth ps --all lists them\n")
    );
}

#[test]
fn what_is_done_to_several_guests_is_done_to_all_that_it_can_be_done_to() {
    let daemon = web().with("stuck", State::Running).with("db", State::Running);
    let (code, output, error) = says(daemon.berth(&["stop", "--time", "7", "web", "stuck", "db"]));
    assert_eq!((code, error.as_str()), (1, "berth: stuck: It is stuck\n"));
    let mut done: Vec<_> = output.lines().collect();
    done.sort_unstable();
    assert_eq!(done, ["db", "web"]);
    let mut asked = daemon.asked();
    asked.sort_unstable();
    assert_eq!(asked, ["stop 7 db", "stop 7 stuck", "stop 7 web"]);
    assert_eq!(says(daemon.berth(&["restart", "web"])).0, 0);
    assert_eq!(daemon.asked()[3..], ["start web"]);
    assert_eq!(says(daemon.berth(&["restart", "web"])).0, 0);
    assert_eq!(daemon.asked()[4..], ["stop 30 web", "start web"]);
}

#[test]
fn a_guest_is_changed_paused_resumed_and_removed() {
    let daemon = web();
    for line in [
        "set --memory 256M --cpu-limit 50 web",
        "set --add-disk data=1G --remove-disk old web",
        "pause web",
        "resume web",
        "rm --force web",
    ] {
        let words: Vec<_> = line.split(' ').collect();
        let (code, _, error) = says(daemon.berth(&words));
        assert_eq!(code, 0, "{line}: {error}");
    }
    assert_eq!(
        daemon.asked(),
        [
            "update web {\"memory_mib\":256,\"limits\":{\"cpu_percent\":50}}",
            "update web {\"remove_disks\":[\"old\"],\"add_disks\":[{\"name\":\"data\",\"size_mib\":1024}]}",
            "pause web",
            "resume web",
            "remove web true"
        ]
    );
}

#[test]
fn logs_are_shown_whole_or_their_last_lines_and_what_comes() {
    let daemon = web();
    let log = |arguments: &[&str]| says(daemon.berth(arguments)).1;
    assert_eq!(log(&["logs", "web"]), "one\ntwo\nthree\n");
    assert_eq!(log(&["logs", "--tail", "2", "web"]), "two\nthree\n");
    assert_eq!(log(&["logs", "--follow", "web"]), "one\ntwo\nthree\nfour\n");
    assert_eq!(log(&["logs", "-f", "-n", "1", "web"]), "three\nfour\n");
    assert_eq!(log(&["logs", "--vmm", "web"]), "of the vmm\n");
}

/// As in a pager: berthd waits for who reads for some seconds only.
#[test]
fn a_log_is_with_who_reads_it_before_it_is_read() {
    for words in [vec!["logs", "talkative"], vec!["logs", "-f", "talkative"]] {
        let daemon = Daemon::new();
        let mut child = daemon.berth(&words).stdout(Stdio::piped()).spawn().unwrap();
        daemon.is_asked("told");
        let output = std::io::read_to_string(child.stdout.take().unwrap()).unwrap();
        assert_eq!((output.len(), child.wait().unwrap().code()), (daemon::MUCH, Some(0)));
    }
}

#[test]
fn stats_and_events_are_for_people_and_programs() {
    let daemon = web();
    let (code, output, _) = says(daemon.berth(&["stats"]));
    assert!(code == 0 && output.contains("web    abc000000000   25.0%"), "{output}");
    let stats: Value = serde_json::from_str(&says(daemon.berth(&["stats", "--json"])).1).unwrap();
    assert_eq!(stats[0]["name"], "web");
    assert_eq!(says(daemon.berth(&["events"])).1, "1970-01-01 00:00:00Z  abc000000000  web  running\n");
    let event: Value = serde_json::from_str(&says(daemon.berth(&["events", "--json"])).1).unwrap();
    assert_eq!(event["what"], "running");
}

/// A picture of `berth stats` on this terminal, without what moves the cursor.
fn picture(terminal: &mut Terminal) -> String {
    const HOME: &str = "\x1b[H";
    const BELOW: &str = "\x1b[J";
    terminal.shows(HOME);
    let lines = terminal.shows(BELOW);
    lines.trim_end_matches(BELOW).replace("\x1b[K", "").replace('\r', "")
}

#[test]
fn stats_fit_on_a_terminal_however_many_guests_there_are() {
    let name = |number: usize| format!("guest-{number:02}-{}", "x".repeat(40));
    let daemon = (0..60).fold(Daemon::new(), |daemon, number| daemon.with(&name(number), State::Running));
    let mut terminal = Terminal::run(daemon.berth(&["stats"]));
    // First the screen is cleared.
    assert_eq!(picture(&mut terminal), "");
    let shown = picture(&mut terminal);
    assert_eq!(shown.lines().count(), 39, "{shown}");
    assert!(shown.contains(&name(36)) && !shown.contains(&name(37)), "{shown}");
    assert!(shown.ends_with("\n... and 23 more: berth stats --no-stream\n"), "{shown}");
    assert_eq!(shown.lines().map(|line| line.chars().count()).max(), Some(100), "{shown}");

    terminal.resize(80, 200);
    let shown = (0..3).map(|_| picture(&mut terminal)).find(|shown| shown.contains(&name(59)));
    assert_eq!(shown.map(|shown| shown.lines().count()), Some(61));
}

#[test]
fn the_doctor_calls_a_daemon_good_that_answers_and_not_one_whose_socket_is_there() {
    let verdict = |mut command: Command| {
        command.args(["doctor", "--json"]);
        let report: Value = serde_json::from_str(&says(command).1).unwrap();
        let checks = report["checks"].as_array().unwrap();
        checks.iter().find(|check| check["name"] == "berthd").unwrap().clone()
    };
    assert_eq!(verdict(Daemon::new().berth(&[]))["verdict"], "ok");
    let here = tempfile::tempdir().unwrap();
    let socket = here.path().join("socket");
    assert_eq!(verdict(berth(&socket, &[]))["verdict"], "missing");
    // As systemd's is while the daemon hangs.
    let _silent = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let berthd = verdict(berth(&socket, &[]));
    assert_eq!(berthd["verdict"], "broken");
    assert!(berthd["found"].as_str().unwrap().ends_with("it does not answer within 2 s"), "{berthd}");
    assert!(berthd["mend"].as_str().unwrap().contains("journalctl -u berthd"), "{berthd}");
}

#[test]
fn an_image_is_sent_in_parts() {
    let daemon = Daemon::new();
    let here = tempfile::tempdir().unwrap();
    let file = |name: &str, length| {
        let path = here.path().join(name);
        fs::write(&path, vec![1; length]).unwrap();
        path.to_str().unwrap().to_string()
    };
    let (kernel, initrd, disk) = (file("kernel", 10), file("initrd", 20), file("disk", 3 << 20));
    let line = [
        "image",
        "import",
        "--name",
        "debian",
        "--kernel",
        &kernel,
        "--initrd",
        &initrd,
        "--cmdline",
        "quiet",
        &disk,
    ];
    let (code, output, error) = says(daemon.berth(&line));
    assert_eq!((code, output.as_str(), error.as_str()), (0, "debian\n", ""));
    let parts: Vec<_> = daemon.parts().into_iter().collect();
    assert_eq!(
        parts,
        [("debian/disk".into(), 3 << 20), ("debian/initrd".into(), 20), ("debian/kernel".to_string(), 10)]
    );
    assert_eq!(daemon.asked(), ["image debian quiet"]);
    // One without an initrd says so: an import of the same name that failed may have sent one.
    let (code, ..) = says(daemon.berth(&["image", "import", "--name", "tiny", "--kernel", &kernel, &disk]));
    assert_eq!((code, daemon.parts().get("tiny/initrd")), (0, Some(&0)));
    assert_eq!(daemon.asked().len(), 2);

    let empty = file("empty", 0);
    let line = ["image", "import", "--name", "x", "--kernel", &kernel, "--initrd", &empty, &disk];
    let (code, _, error) = says(daemon.berth(&line));
    assert!(code == 1 && error == format!("berth: cannot import {empty}: it is empty\n"), "{error}");
    assert!(!daemon.parts().keys().any(|part| part.starts_with("x/")));
    let (code, _, error) =
        says(daemon.berth(&["image", "import", "--name", "x", "--kernel", &kernel, "/nowhere/disk"]));
    assert!(code == 1 && error.starts_with("berth: cannot read /nowhere/disk: No such file"), "{error}");
    let directory = here.path().to_str().unwrap();
    let (code, _, error) =
        says(daemon.berth(&["image", "import", "--name", "x", "--kernel", directory, &disk]));
    let expected = format!("berth: cannot read {directory}: Is a directory");
    assert!(code == 1 && error.starts_with(&expected), "{error}");
    assert_eq!(daemon.asked().len(), 2);
}

#[test]
fn a_command_has_its_output_its_input_and_its_exit_code() {
    let daemon = web();
    let exec = |command: &[&str]| says(daemon.berth(&[&["exec", "web", "--"], command].concat()));
    assert_eq!(exec(&["echo", "-n", "hello"]), (0, "hello".into(), "".into()));
    assert_eq!(exec(&["sh", "-c", "echo out; echo err >&2; exit 7"]), (7, "out\n".into(), "err\n".into()));
    assert_eq!(exec(&["sh", "-c", "kill -9 $$"]).0, 137);
    assert_eq!(exec(&["no-such-program"]), (127, "".into(), "berth: not found\n".into()));
    let large = exec(&["head", "-c", "1000000", "/dev/zero"]);
    assert_eq!((large.0, large.1.len()), (0, 1_000_000));
    let typed = vec![b'x'; 1_000_000];
    let (code, output, _) = fed(daemon.berth(&["exec", "web", "wc", "-c"]), &typed);
    assert_eq!((code, output.trim()), (0, "1000000"));
    let none = fed(daemon.berth(&["exec", "--no-stdin", "web", "wc", "-c"]), b"for somebody else");
    assert_eq!(none.1.trim(), "0");
    let mut with =
        daemon.berth(&["exec", "-e", "A=1", "-e", "HERE", "web", "--", "sh", "-c", "echo $A $HERE"]);
    with.env("HERE", "of here");
    assert_eq!(says(with).1, "1 of here\n");
}

#[test]
fn our_own_failures_are_125_whatever_the_command_would_have_been() {
    let daemon = web().with("old", State::Stopped);
    let (code, _, error) = says(daemon.berth(&["exec", "--user", "nobody", "web", "true"]));
    assert_eq!((code, error.as_str()), (125, "berth: web: no user \"nobody\"\n"));
    let (code, _, error) = says(daemon.berth(&["exec", "old", "true"]));
    assert_eq!((code, error.as_str()), (125, "berth: old: The guest does not run; start it first\n"));
    assert_eq!(says(daemon.berth(&["exec", "none", "true"])).0, 125);
    let daemon = daemon.with("still", State::Paused);
    let (code, _, error) = says(daemon.berth(&["exec", "still", "true"]));
    assert_eq!((code, error.as_str()), (125, "berth: still: is paused; let it go on: berth resume still\n"));
    let (code, _, error) = says(daemon.berth(&["run", "none", "--", "true"]));
    assert_eq!(
        (code, error.as_str()),
        (125, "berth: none: There is no such image; berth image ls lists them\n")
    );
}

#[test]
fn what_is_no_agent_is_not_waited_for_as_one_that_still_comes() {
    let daemon = web().odd();
    let (code, _, error) = says(daemon.berth(&["exec", "web", "true"]));
    assert!(code == 125 && error.starts_with("berth: web: the guest's agent: malformed answer"), "{error}");
}

#[test]
fn a_signal_goes_to_the_command() {
    let daemon = web();
    let mut child = daemon.berth(&["exec", "web", "sleep", "60"]).spawn().unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    // Early ones are kept until the command is there, or end the wait for it: the code is the same.
    std::thread::sleep(std::time::Duration::from_millis(500));
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
}

#[test]
fn run_makes_a_guest_for_a_command_and_ends_it_afterwards() {
    let daemon = Daemon::new().slow();
    let (code, output, error) =
        says(daemon.berth(&["run", "--name", "one", "debian", "--", "sh", "-c", "echo hi; exit 4"]));
    assert_eq!((code, output.as_str(), error.as_str()), (4, "hi\n", ""));
    assert_eq!(daemon.asked(), ["create one", "start one", "stop 30 one"]);
    assert_eq!(daemon.state("one"), Some(State::Stopped));
}

#[test]
fn run_leaves_nothing_where_nothing_is_to_be_kept() {
    let daemon = Daemon::new();
    assert_eq!(says(daemon.berth(&["run", "--rm", "--name", "two", "debian", "true"])).0, 0);
    assert_eq!(daemon.asked(), ["create two", "start two", "stop 0 two"]);
    assert_eq!(daemon.state("two"), None);
    // One that cannot be started is removed too, and without --rm its log is there to be read.
    let (code, _, _) = says(daemon.berth(&["run", "--rm", "--name", "stuck", "debian", "true"]));
    assert_eq!((code, daemon.asked().last().unwrap().starts_with("remove ")), (125, true));
    let (code, _, error) = says(daemon.berth(&["run", "--name", "stuck", "debian", "true"]));
    assert_eq!((code, error.as_str()), (125, "berth: stuck: It is stuck; its log: berth logs --vmm stuck\n"));
}

/// A program that was asked this of the daemon when a signal comes.
fn interrupted(daemon: &Daemon, line: &str, when: &str) -> i32 {
    let words: Vec<_> = line.split(' ').collect();
    let mut child = daemon.berth(&words).spawn().unwrap();
    daemon.is_asked(when);
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::INT).unwrap();
    child.wait().unwrap().code().unwrap()
}

#[test]
fn a_guest_that_is_interrupted_while_it_is_made_is_not_left() {
    for line in [
        "create --name late debian",
        "run --rm --name late debian true",
        "run --name late debian true",
        "run -d --name late debian",
    ] {
        let daemon = Daemon::new();
        assert_eq!(interrupted(&daemon, line, "create late"), 130);
        assert_eq!((daemon.state("late"), daemon.asked().len()), (None, 2), "{line}: {:?}", daemon.asked());
    }
}

#[test]
fn a_guest_that_is_interrupted_while_it_starts_does_not_run_afterwards() {
    let daemon = Daemon::new();
    assert_eq!(interrupted(&daemon, "run --rm --name late debian true", "late start"), 130);
    assert_eq!(daemon.state("late"), None);
    let daemon = Daemon::new();
    assert_eq!(interrupted(&daemon, "run --name late debian true", "late start"), 130);
    assert_eq!(daemon.state("late"), Some(State::Stopped));
}

#[test]
fn a_person_sees_how_long_a_guest_is_being_made() {
    let daemon = Daemon::new();
    for (line, shown) in [
        (vec!["create", "--name", "late", "debian"], "making a guest from debian"),
        (vec!["run", "-d", "--name", "late", "debian"], "starting debian"),
    ] {
        let mut terminal = Terminal::run(daemon.berth(&line));
        terminal.shows(shown);
        terminal.shows(" 0s");
        terminal.shows("abc00000000");
        assert_eq!(terminal.ends(), 0);
    }
}

#[test]
fn run_in_the_background_prints_the_id_and_leaves_the_guest_running() {
    let daemon = Daemon::new();
    let (code, output, _) = says(daemon.berth(&["run", "--detach", "--name", "three", "debian"]));
    assert_eq!((code, output.as_str()), (0, "abc000000000\n"));
    let (code, output, error) = says(daemon.berth(&["run", "-d", "--name", "four", "debian", "--", "true"]));
    assert_eq!((code, output.as_str()), (0, "abc000000001\n"), "{error}");
    assert_eq!((daemon.state("three"), daemon.state("four")), (Some(State::Running), Some(State::Running)));
}

/// A terminal's end would be that of what is on it, and the command is to outlive us.
#[test]
fn a_command_in_the_background_has_no_terminal_and_no_input_of_ours() {
    let daemon = Daemon::new();
    for (name, flags) in [("one", "-d"), ("two", "-dti")] {
        let mut terminal =
            Terminal::run(daemon.berth(&["run", flags, "--name", name, "debian", "--", "true"]));
        terminal.shows("abc00000000");
        assert_eq!(terminal.ends(), 0);
    }
    assert_eq!(daemon.commands().iter().map(|command| command.terminal).collect::<Vec<_>>(), [None, None]);
    // An input that does not end.
    let mut command = daemon.berth(&["run", "-d", "--name", "three", "debian", "--", "true"]);
    let (input, _open) = std::io::pipe().unwrap();
    command.stdin(input);
    assert_eq!(says(command), (0, "abc000000002\n".into(), "".into()));
}

#[test]
fn a_guest_that_ends_before_its_command_is_our_failure() {
    let daemon = Daemon::new();
    let (code, _, error) = says(daemon.berth(&["run", "--name", "five", "debian", "play-power-off"]));
    assert_eq!(code, 125);
    assert!(error.starts_with("berth: five: ended before the command did (powered-off): "), "{error}");
}

#[test]
fn what_ends_with_berthd_is_told_as_such_and_no_guest_is_stopped_for_it() {
    let daemon = Daemon::new();
    let (code, _, error) = says(daemon.berth(&["run", "--rm", "--name", "one", "debian", "play-restart"]));
    assert!(code == 125 && error.contains("berthd") && error.contains("berth stop one"), "{code} {error}");
    assert_eq!(daemon.asked(), ["create one", "start one"]);
    assert_eq!(daemon.state("one"), Some(State::Running));
    // Nor while it boots.
    let (code, _, error) = says(daemon.berth(&["run", "--rm", "--name", "orphan", "debian", "true"]));
    assert!(code == 125 && error.contains("berth stop orphan"), "{code} {error}");
    assert_eq!(daemon.state("orphan"), Some(State::Running));
    let (code, _, error) = says(daemon.berth(&["exec", "one", "play-restart"]));
    assert!(code == 125 && error.contains("the guest goes on"), "{code} {error}");
    let (code, output, error) = fed(daemon.berth(&["console", "one"]), b"ar");
    assert_eq!((code, output.as_str()), (3, "A"));
    assert!(error.contains("berth console one"), "{error}");
    let (code, output, error) = says(daemon.berth(&["logs", "--follow", "cut"]));
    assert_eq!((code, output.as_str()), (3, "one\n"));
    assert!(error.contains("it went away; see how it is"), "{error}");
}

#[test]
fn one_that_is_removed_with_its_end_is_not_restarted() {
    let daemon = Daemon::new();
    assert_eq!(says(daemon.berth(&["run", "--detach", "--rm", "--name", "one", "debian"])).0, 0);
    let (code, output, error) = says(daemon.berth(&["restart", "one"]));
    assert_eq!((code, output.as_str()), (1, ""));
    assert!(error.contains("--rm"), "{error}");
    assert_eq!(daemon.state("one"), Some(State::Running));
}

#[test]
fn a_terminal_is_raw_for_a_command_and_given_back_afterwards() {
    let daemon = web();
    let mut terminal = Terminal::run(daemon.berth(&["exec", "web", "play-terminal"]));
    terminal.shows("<40x100>our-term");
    assert!(!terminal.is_as_before());
    // Ctrl-C is a key like others.
    terminal.types(&[3]);
    terminal.shows("[3]");
    terminal.resize(50, 132);
    terminal.shows("<50x132>");
    terminal.types(b"q");
    assert_eq!(terminal.ends(), 5);
    assert!(terminal.is_as_before());
}

#[test]
fn the_keys_leave_a_command_and_the_terminal_is_given_back() {
    let daemon = web();
    let mut terminal = Terminal::run(daemon.berth(&["exec", "web", "play-terminal"]));
    terminal.shows("<40x100>");
    terminal.types(&[0x1d]);
    terminal.shows("berth: left web");
    assert_eq!(terminal.ends(), 0);
    assert!(terminal.is_as_before());
}

#[test]
fn a_terminal_is_given_back_when_the_daemon_goes_or_a_signal_comes() {
    let daemon = web();
    let mut terminal = Terminal::run(daemon.berth(&["exec", "web", "play-terminal"]));
    terminal.shows("<40x100>");
    terminal.signal(Signal::TERM);
    terminal.shows("<signal 15>");
    assert!(!terminal.is_as_before());
    terminal.types(b"q");
    assert_eq!(terminal.ends(), 5);
    assert!(terminal.is_as_before());

    let mut terminal = Terminal::run(daemon.berth(&["console", "web"]));
    terminal.shows("Ctrl-] leaves");
    terminal.types(b"a");
    terminal.shows("A");
    terminal.signal(Signal::TERM);
    assert_eq!(terminal.ends(), 143);
    assert!(terminal.is_as_before());
}

#[test]
fn a_console_that_nobody_reads_is_left_by_a_signal() {
    let daemon = web();
    let mut child = daemon.berth(&["console", "web"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut typed = child.stdin.take().unwrap();
    // Until nothing goes on any more: what it hears it says.
    let full = std::thread::spawn(move || while typed.write_all(&[b'a'; 4096]).is_ok() {});
    std::thread::sleep(std::time::Duration::from_millis(500));
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    full.join().unwrap();
}

#[test]
fn a_shell_in_a_new_guest_may_be_left_and_the_guest_runs_on() {
    let daemon = Daemon::new();
    let mut terminal = Terminal::run(daemon.berth(&["run", "--name", "six", "debian", "play-terminal"]));
    terminal.shows("<40x100>");
    terminal.types(&[0x1d]);
    terminal.shows("it runs on: berth exec six -- sh");
    assert_eq!(terminal.ends(), 0);
    assert_eq!(daemon.state("six"), Some(State::Running));
    assert!(terminal.is_as_before());
}

#[test]
fn a_command_may_have_no_terminal_where_there_is_one() {
    let daemon = web();
    let mut terminal = Terminal::run(daemon.berth(&["exec", "-T", "web", "play-terminal"]));
    terminal.shows("<none>");
    assert!(terminal.is_as_before());
    terminal.types(&[4]);
    terminal.shows("<end>");
}

#[test]
fn a_console_is_used_from_a_terminal_and_from_a_pipe() {
    let daemon = web();
    let mut terminal = Terminal::run(daemon.berth(&["console", "--detach-keys", "ctrl-a,d", "web"]));
    terminal.shows("Ctrl-A d leaves");
    terminal.types(b"abc");
    terminal.shows("ABC");
    assert!(!terminal.is_as_before());
    terminal.types(b"\x01d");
    terminal.shows("left the console of web");
    assert_eq!(terminal.ends(), 0);
    assert!(terminal.is_as_before());

    // The guest's end is the console's.
    let (code, output, error) = fed(daemon.berth(&["console", "web"]), b"hello\x1d\nx");
    assert_eq!((code, output.as_str(), error.as_str()), (0, "HELLO\x1d\n", ""));
}

#[test]
fn files_go_in_and_come_out() {
    let daemon = web();
    let here = tempfile::tempdir().unwrap();
    let there = tempfile::tempdir().unwrap();
    let at =
        |directory: &tempfile::TempDir, path: &str| directory.path().join(path).to_str().unwrap().to_string();
    let copy = |from: &str, to: &str| says(daemon.berth(&["cp", from, to]));
    fs::write(here.path().join("file"), "contents").unwrap();
    fs::create_dir_all(here.path().join("tree/deep")).unwrap();
    fs::write(here.path().join("tree/deep/leaf"), "leaf").unwrap();

    let guest = |path: &str| format!("web:{}", at(&there, path));
    assert_eq!(copy(&at(&here, "file"), &guest("")), (0, "".into(), "".into()));
    assert_eq!(fs::read_to_string(there.path().join("file")).unwrap(), "contents");
    assert_eq!(copy(&at(&here, "tree"), &guest("renamed")).0, 0);
    assert_eq!(fs::read_to_string(there.path().join("renamed/deep/leaf")).unwrap(), "leaf");

    assert_eq!(copy(&guest("renamed"), &at(&here, "")).0, 0);
    assert_eq!(fs::read_to_string(here.path().join("renamed/deep/leaf")).unwrap(), "leaf");
    assert_eq!(copy(&guest("file"), &at(&here, "again")).0, 0);
    assert_eq!(fs::read_to_string(here.path().join("again")).unwrap(), "contents");
    let mut names: Vec<_> = fs::read_dir(&here).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort_unstable();
    assert_eq!(names, ["again", "file", "renamed", "tree"]);

    let other = std::os::unix::net::UnixListener::bind(here.path().join("other")).unwrap();
    let (code, _, error) = copy(&guest("file"), &at(&here, "other"));
    assert!(
        code == 1
            && error.ends_with("other: it is neither a file nor a directory, and is not written over\n")
    );
    drop(other);

    let (code, _, error) = copy(&guest("none"), &at(&here, ""));
    assert!(code == 1 && error.contains("no such file"), "{error}");
    let (code, _, error) = copy("/nowhere/file", &guest(""));
    assert!(code == 1 && error.starts_with("berth: cannot read /nowhere/file: "), "{error}");
}

#[test]
fn what_cannot_be_copied_does_not_keep_the_rest_from_it() {
    let daemon = web();
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let deep = "d/".repeat(300);
    for side in [&here, &there] {
        fs::create_dir_all(side.path().join("tree").join(&deep)).unwrap();
        fs::write(side.path().join("tree/file"), "contents").unwrap();
    }
    let at = |side: &tempfile::TempDir, path: &str| side.path().join(path).to_str().unwrap().to_string();
    for (from, to) in [
        (format!("web:{}", at(&there, "tree")), at(&here, "copy")),
        (at(&here, "tree"), format!("web:{}", at(&there, "copy"))),
    ] {
        let (code, _, error) = says(daemon.berth(&["cp", &from, &to]));
        assert!(code == 1 && error.contains("directories deep, and what is in it is left out"), "{error}");
    }
    for side in [&here, &there] {
        assert_eq!(fs::read_to_string(side.path().join("copy/file")).unwrap(), "contents");
    }
    let _socket = std::os::unix::net::UnixListener::bind(here.path().join("other")).unwrap();
    let (code, _, error) =
        says(daemon.berth(&["cp", &at(&here, "other"), &format!("web:{}", at(&there, ""))]));
    assert!(code == 1 && error.ends_with("is a device, pipe or socket and cannot be copied\n"), "{error}");
    assert!(!there.path().join("other").exists());
}

/// Root may write where nobody may, so it is somebody else who copies.
#[test]
fn a_directory_that_may_not_be_written_is_copied_too_and_nothing_else_is_left() {
    const NOBODY: u32 = 65534;
    let daemon = web().open();
    let there = tempfile::tempdir().unwrap();
    let here = tempfile::tempdir().unwrap();
    let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    mode(here.path(), 0o777);
    mode(there.path(), 0o755);
    fs::create_dir_all(there.path().join("closed/deep")).unwrap();
    fs::write(there.path().join("closed/deep/file"), "contents").unwrap();
    mode(&there.path().join("closed/deep"), 0o555);
    mode(&there.path().join("closed"), 0o555);
    let from = format!("web:{}/closed", there.path().display());
    // A second time into what is there, which fails where that may not be written.
    for (time, expected) in [("first", 0), ("second", 1)] {
        let mut command = daemon.berth(&["cp", &from, here.path().to_str().unwrap()]);
        if rustix::process::geteuid().is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        let (code, _, error) = says(command);
        assert_eq!(code, expected, "{time}: {error}");
        assert_eq!(fs::read_to_string(here.path().join("closed/deep/file")).unwrap(), "contents");
        for path in ["closed", "closed/deep"] {
            let mode = fs::metadata(here.path().join(path)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o555, "{time}: {path}");
        }
        assert_eq!(fs::read_dir(&here).unwrap().count(), 1, "{time}");
    }
    for directory in [here, there] {
        mode(&directory.path().join("closed"), 0o755);
        mode(&directory.path().join("closed/deep"), 0o755);
    }
}

#[test]
fn archives_go_in_and_come_out() {
    let daemon = web();
    let there = tempfile::tempdir().unwrap();
    fs::write(there.path().join("file"), "contents").unwrap();
    let path = there.path().to_str().unwrap();
    let output = daemon.berth(&["cp", &format!("web:{path}/file"), "-"]).output().unwrap();
    assert!(output.status.success());
    let into = tempfile::tempdir().unwrap();
    let (code, _, error) =
        fed(daemon.berth(&["cp", "-", &format!("web:{}", into.path().to_str().unwrap())]), &output.stdout);
    assert_eq!((code, error.as_str()), (0, ""));
    assert_eq!(fs::read_to_string(into.path().join("file")).unwrap(), "contents");
    let (code, _, error) = fed(
        daemon.berth(&["cp", "-", &format!("web:{}", into.path().to_str().unwrap())]),
        &output.stdout[..600],
    );
    assert!(code == 1 && error.contains("cut off"), "{error}");
    let mut terminal = Terminal::run(daemon.berth(&["cp", &format!("web:{path}"), "-"]));
    terminal.shows("an archive is nothing for a terminal");
    assert_eq!(terminal.ends(), 1);
}

#[test]
fn what_a_guest_says_is_no_command_to_the_terminal() {
    let daemon = web();
    let (code, _, error) = says(daemon.berth(&["cp", "web:/none\x1b[2J\r", "."]));
    assert_eq!(
        (code, error.as_str()),
        (1, "berth: web:/none\\u{1b}[2J\\r: /none\\u{1b}[2J\\r: no such file\n")
    );
}

#[test]
fn a_full_disk_is_told_and_is_not_a_reader_that_has_enough() {
    let daemon = web();
    let there = tempfile::tempdir().unwrap();
    fs::write(there.path().join("file"), "contents").unwrap();
    let file = format!("web:{}/file", there.path().display());
    for (words, code) in [
        (vec!["exec", "web", "echo", "hi"], 125),
        (vec!["run", "debian", "echo", "hi"], 125),
        (vec!["cp", &file, "-"], 1),
        (vec!["ps"], 1),
    ] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let mut command = daemon.berth(&words);
        let child = command.stdout(full).stderr(Stdio::piped()).spawn().unwrap();
        let output = child.wait_with_output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{words:?}: {error}");
        assert!(error.starts_with("berth: standard output: No space left on device"), "{words:?}: {error}");
    }
}

/// Whoever reads from it is gone.
fn unread() -> std::io::PipeWriter {
    std::io::pipe().unwrap().1
}

#[test]
fn an_error_that_nobody_hears_has_its_code() {
    let daemon = web();
    for (line, code) in [("inspect none", 1), ("fly", 2)] {
        let words: Vec<_> = line.split(' ').collect();
        let mut command = daemon.berth(&words);
        assert_eq!(command.stderr(unread()).status().unwrap().code(), Some(code), "{line}");
    }
}

#[test]
fn who_reads_only_the_first_name_has_all_of_them_removed() {
    let names: Vec<_> = (0..40).map(|number| format!("g{number}")).collect();
    let daemon = names.iter().fold(Daemon::new(), |daemon, name| daemon.with(name, State::Stopped));
    let words: Vec<_> = ["rm"].into_iter().chain(names.iter().map(String::as_str)).collect();
    let mut command = daemon.berth(&words);
    assert_eq!(command.stdout(unread()).status().unwrap().code(), Some(141));
    assert_eq!(daemon.asked().len(), 40);
}

#[test]
fn a_reader_that_has_enough_is_no_failure_to_tell_of() {
    let daemon = web();
    for line in ["ps", "exec web -- head -c 1000000 /dev/zero"] {
        let words: Vec<_> = line.split(' ').collect();
        let mut command = daemon.berth(&words);
        let child = command.stdout(unread()).stderr(Stdio::piped()).spawn().unwrap();
        drop(command);
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), output.stderr.len()), (Some(141), 0), "{line}");
    }
}
