//! A supervisor that dies and comes back finds its VMMs as they were: it made their API's socket and what they write to, and
//! reads how they ended in a file; and a VMM takes no notice of its end.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use api_socket::{ActionType, Client, Request};
use berth_tests::cell::{Cells, Vmm as Jailed, output, was_refused};
use berth_tests::filters;
use berth_tests::guest::vmm::signal_thread;
use berth_tests::guest::{Ended, Guest, Kernel, Name, Setup, Vmm, asset, limits, program};
use berth_tests::host::{process, provide};
use rustix::process::Signal;
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
    let listener = process::passable(UnixListener::bind(place.path("api.sock")).unwrap()).unwrap();
    let mut files: Vec<_> = ["log", "metrics", "exit"].map(|name| place.flag(name)).into();
    for name in ["log", "metrics", "exit"] {
        fs::write(place.path(name), "").unwrap();
    }
    files.push(format!("--fd=api={}", process::number(&listener)));
    let mut command = cells.jailer_of(&program("berth-vmm"), flags);
    command.args(files).args(["--", "--api-sock", "fd:api", "--log-path", "fd:log"]);
    command.args(["--metrics-path", "fd:metrics", "--exit-status", "fd:exit"]);
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    Jailed { child: process::spawn_bound(&mut command, vec![listener]).unwrap() }
}

fn client(place: &Place) -> Client {
    let mut client = Client::connect_within(&place.path("api.sock"), limits::API).unwrap();
    client.set_timeout(Some(limits::API)).unwrap();
    client
}

#[test]
fn a_vmm_in_a_cell_serves_a_socket_and_writes_to_files_that_are_not_in_it() {
    let (cells, place) = (Cells::new(), Place::new());
    let kernel = format!("--file=kernel={}:ro", asset(provide::VMLINUX).display());
    let initrd = format!("--file=initrd={}:ro", asset(provide::INITRAMFS).display());
    let mut vmm = handing_over(&cells, &place, &[&kernel, &initrd]);
    // Connected before anybody serves.
    let mut api = client(&place);
    let mut console = vmm.console();
    let setup = Setup { kernel: Kernel::Path("fd:kernel".into()), ..Setup::default() };
    for mut request in setup.requests() {
        if let Request::PutBootSource(boot) = &mut request {
            boot.initrd_path = Some("fd:initrd".into());
        }
        api.apply(&request).unwrap();
    }
    api.apply(&Request::Action(ActionType::InstanceStart)).unwrap();
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
    let file = process::passable(fs::File::open(place.path("file")).unwrap()).unwrap();
    let number = process::number(&file);
    let refused = |arguments: &[&str], words: &[&str]| {
        let mut command = Command::new(program("berth-vmm"));
        command.arg(format!("--fd=it={number}")).args(arguments).current_dir(place.0.path());
        command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
        command.stderr(std::process::Stdio::piped());
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
