//! What a VMM was started with and does not need is gone before it opens anything; what it could open is gone before its
//! guest runs.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use api_socket::Client;
use berth_tests::guest::setup::disk_drive;
use berth_tests::guest::{Guest, Setup, blank_disk, limits, program};
use berth_tests::host::process;
use serde_json::json;
use tempfile::TempDir;

/// Any user but root.
const USER: u32 = 1000;

const SECRET: &str = "a-secret-of-the-caller";

/// A VMM that serves its API and is started as nobody should start one.
struct Careless {
    child: Child,
    directory: TempDir,
}

impl Careless {
    fn start(change: impl FnOnce(&mut Command)) -> Careless {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(directory.path(), Some(USER), None).unwrap();
        let mut command = Command::new(program("berth-vmm"));
        command.arg("--api-sock").arg(directory.path().join("api.sock")).current_dir(directory.path());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        change(&mut command);
        let child = process::spawn_bound(&mut command, Vec::new()).unwrap();
        let careless = Careless { child, directory };
        // Now it is past all that it does before it opens its socket.
        Client::connect_within(&careless.directory.path().join("api.sock"), limits::API).unwrap();
        careless
    }

    fn proc(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.child.id()).into()
    }

    /// What its descriptors are.
    fn descriptors(&self) -> Vec<(u32, PathBuf)> {
        let entries = fs::read_dir(self.proc("fd")).unwrap().map(|entry| entry.unwrap().path());
        let number = |path: &Path| path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        entries.map(|path| (number(&path), fs::read_link(&path).unwrap_or_default())).collect()
    }
}

impl Drop for Careless {
    fn drop(&mut self) {
        process::kill(&mut self.child);
    }
}

#[test]
fn the_environment_is_not_in_the_process_any_more() {
    let vmm = Careless::start(|command| {
        command.env("TOKEN", SECRET);
    });
    let environment = fs::read(vmm.proc("environ")).unwrap();
    assert!(environment.iter().all(|byte| *byte == 0), "{}", String::from_utf8_lossy(&environment));
}

#[test]
fn descriptors_that_nobody_handed_over_are_closed_and_those_that_were_stay() {
    let directory = tempfile::tempdir().unwrap();
    let open = |name: &str| {
        let path = directory.path().join(name);
        fs::write(&path, name).unwrap();
        process::passable(File::open(path).unwrap()).unwrap()
    };
    let (leaked, disk, higher) = (open("leaked"), open("disk"), open("higher"));
    let number = |fd: &std::os::fd::OwnedFd| std::os::fd::AsRawFd::as_raw_fd(fd);
    let handed = format!("disk={}", number(&disk));
    let inherited =
        [&leaked, &disk, &higher].map(|fd| rustix::io::fcntl_setfd(fd.as_fd(), rustix::io::FdFlags::empty()));
    assert!(inherited.iter().all(Result::is_ok));
    let vmm = Careless::start(|command| {
        command.args(["--fd", &handed]);
    });
    let descriptors = vmm.descriptors();
    for name in ["leaked", "higher"] {
        let path = directory.path().join(name);
        assert!(descriptors.iter().all(|(_, target)| *target != path), "{name}: {descriptors:?}");
    }
    let kept = descriptors.iter().find(|(_, target)| *target == directory.path().join("disk"));
    assert_eq!(kept.map(|(fd, _)| *fd), Some(number(&disk) as u32), "{descriptors:?}");
}

#[test]
fn a_closed_standard_stream_does_not_become_a_file_of_the_guest_s() {
    let vmm = Careless::start(|command| {
        let close = || {
            // SAFETY: closes three numbers of the child, which owns nothing by them, and touches no memory.
            unsafe { libc::close_range(0, 2, 0) };
            Ok(())
        };
        // SAFETY: `close` makes one bare system call.
        unsafe { command.pre_exec(close) };
    });
    let descriptors = vmm.descriptors();
    for number in 0..3 {
        let target = descriptors.iter().find(|(fd, _)| *fd == number).map(|(_, target)| target.as_path());
        assert_eq!(target, Some(Path::new("/dev/null")), "{number}: {descriptors:?}");
    }
}

#[test]
fn nobody_of_the_same_user_looks_into_it_and_it_leaves_no_core() {
    let vmm = Careless::start(|command| {
        command.uid(USER);
    });
    let status = fs::read_to_string(vmm.proc("status")).unwrap();
    let user = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap();
    assert_eq!(user.split_whitespace().next(), Some("1000"));
    // Of a process that can be dumped they are its user's.
    assert_eq!(fs::metadata(vmm.proc("mem")).unwrap().uid(), 0);
    let limits = fs::read_to_string(vmm.proc("limits")).unwrap();
    let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).unwrap();
    assert!(core.split_whitespace().take(2).all(|limit| limit == "1"), "{core}");
}

#[test]
fn after_the_start_only_what_is_beside_the_drives_is_opened() {
    let [inside, outside] = [(), ()].map(|()| tempfile::tempdir().unwrap());
    let disk = |directory: &TempDir, name: &str| blank_disk(directory.path().join(name), 1 << 20);
    let first = disk(&inside, "first");
    let (second, elsewhere) = (disk(&inside, "second"), disk(&outside, "elsewhere"));
    let link = inside.path().join("link");
    symlink(&elsewhere, &link).unwrap();

    let mut guest =
        Guest::booted(Setup { drives: vec![disk_drive("disk", first.clone())], ..Setup::default() });
    let mut patch = |path: &Path| {
        let body = json!({"drive_id": "disk", "path_on_host": path}).to_string();
        guest.api.request("PATCH", "/drives/disk", Some(&body)).unwrap()
    };
    for reachable in [&second, &first] {
        assert_eq!(patch(reachable).status, 204, "{}", reachable.display());
    }
    for path in [&elsewhere, &link] {
        let refused = patch(path);
        assert_eq!(refused.status, 400, "{}", path.display());
        let text = refused.fault_message();
        assert!(text.contains(path.to_str().unwrap()) && text.contains("Landlock"), "{text}");
    }
    let log = guest.vmm.log();
    let said = log.lines().find(|line| line.contains("Confined: ")).unwrap_or_else(|| panic!("{log}"));
    for part in
        ["system call filters", "Landlock (version", inside.path().to_str().unwrap(), "no capabilities"]
    {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
    guest.power_off();
}

/// A drive that is a link keeps its file: the same path can be opened again.
#[test]
fn a_drive_behind_a_link_is_opened_again_by_the_same_path() {
    let [inside, outside] = [(), ()].map(|()| tempfile::tempdir().unwrap());
    let link = inside.path().join("link");
    symlink(blank_disk(outside.path().join("disk"), 1 << 20), &link).unwrap();
    let mut guest =
        Guest::booted(Setup { drives: vec![disk_drive("disk", link.clone())], ..Setup::default() });
    let body = json!({"drive_id": "disk", "path_on_host": link}).to_string();
    assert_eq!(guest.api.request("PATCH", "/drives/disk", Some(&body)).unwrap().status, 204);
    guest.power_off();
}
