//! A VMM in a cell: a stock guest boots as an ordinary user's, who has no capability, sees nothing of the host and leaves
//! nothing behind; and what was planted in the way of the jailer is neither followed nor touched.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use api_socket::{ActionType, Client, InstanceState, Request};
use berth_tests::cell::{
    Cells, GID, ID, UID, Vmm, namespace, processes_of_the_user, set, status, traces, tree, was_refused,
};
use berth_tests::guest::{Ended, Kernel, Setup, asset, limits, program};
use berth_tests::host::{process, provide};
use rustix::process::Pid;

/// What is in a cell whose VMM runs.
const FURNITURE: [&str; 9] = [
    "berth-vmm",
    "berth-vmm.pid",
    "dev",
    "dev/kvm",
    "dev/net",
    "dev/net/tun",
    "dev/urandom",
    "run",
    "run/api.sock",
];

#[test]
fn a_stock_guest_boots_in_a_cell_as_an_ordinary_user_and_leaves_only_the_cell() {
    let before = traces();
    let cells = Cells::new();
    // As callers do: the images are put into the cell before it is one.
    fs::create_dir_all(cells.root()).unwrap();
    fs::copy(asset(provide::VMLINUX), cells.root().join("vmlinux")).unwrap();
    fs::copy(asset(provide::INITRAMFS), cells.root().join("initramfs")).unwrap();

    // A group of the caller's, to be left. It is this thread's alone, and what it starts has it too.
    rustix::thread::set_thread_groups(&[rustix::fs::Gid::from_raw(7)]).unwrap();
    let mut vmm = cells.start(&[]);
    let mut console = vmm.console();
    let mut api = cells.client();
    let setup = Setup { kernel: Kernel::Path("/vmlinux".into()), ..Setup::default() };
    for mut request in setup.requests() {
        if let Request::PutBootSource(boot) = &mut request {
            boot.initrd_path = Some("/initramfs".into());
        }
        api.apply(&request).unwrap();
    }
    api.apply(&Request::Action(ActionType::InstanceStart)).unwrap();
    console.wait_for("# ", limits::BOOT);
    assert_eq!(api.instance_info().unwrap().state, InstanceState::Running);
    assert_eq!(api.instance_info().unwrap().id, ID);

    is_an_ordinary_user_without_capabilities(vmm.pid());
    sees_only_the_cell(vmm.pid(), &cells.root());
    has_nothing_of_its_caller(vmm.pid());

    console.send(b"poweroff -f\n");
    assert_eq!(vmm.ended(), Ended::Code(0));
    assert_eq!(processes_of_the_user(), [0; 0]);
    drop(api);
    assert_eq!(traces(), before);
    fs::remove_dir_all(cells.base.path().join("berth-vmm")).unwrap();
    assert_eq!(tree(cells.base.path()), set(&[]));
}

fn is_an_ordinary_user_without_capabilities(pid: u32) {
    assert_eq!(status(pid, "Uid"), format!("{UID} {UID} {UID} {UID}"));
    assert_eq!(status(pid, "Gid"), format!("{GID} {GID} {GID} {GID}"));
    assert_eq!(status(pid, "Groups"), "");
    for kind in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, kind), "0000000000000000", "{kind}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
}

fn sees_only_the_cell(pid: u32, root: &Path) {
    // Of mounts, the cell's root.
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    for kind in ["mnt", "ipc", "uts", "cgroup"] {
        assert_ne!(namespace(pid, kind), namespace(std::process::id(), kind), "{kind}");
    }

    let seen = PathBuf::from(format!("/proc/{pid}/root"));
    let (seen_data, data) = (fs::metadata(seen.join(".")).unwrap(), fs::metadata(root).unwrap());
    assert_eq!((seen_data.dev(), seen_data.ino()), (data.dev(), data.ino()));
    let mut expected = set(&FURNITURE);
    expected.extend(set(&["vmlinux", "initramfs", "run/log"]));
    if Path::new("/dev/userfaultfd").exists() {
        expected.insert("dev/userfaultfd".into());
    }
    assert_eq!(tree(root), expected);
    for name in ["", "dev", "dev/net", "run"] {
        let data = fs::metadata(root.join(name)).unwrap();
        assert_eq!((data.uid(), data.gid(), data.mode() & 0o7777), (UID, GID, 0o700), "{name}");
    }
    // The VMM does not write to itself, nor read itself: so it cannot be traced.
    let data = fs::metadata(root.join("berth-vmm")).unwrap();
    assert_eq!((data.uid(), data.mode() & 0o7777, data.nlink()), (0, 0o111, 1));
}

fn has_nothing_of_its_caller(pid: u32) {
    assert_eq!(fs::read(format!("/proc/{pid}/environ")).unwrap(), b"");
    // The descriptors are those of a VMM: its own, and of files such that are in the cell.
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let number: u32 = entry.file_name().to_str().unwrap().parse().unwrap();
        let target = fs::read_link(entry.path()).unwrap().display().to_string();
        let is_of_the_cell =
            ["/dev/kvm", "/vmlinux", "/initramfs", "/run/log"].iter().any(|end| target.ends_with(end));
        let is_its_own =
            ["anon_inode:", "socket:", "/memfd:", "pipe:"].iter().any(|kind| target.starts_with(kind));
        assert!(number < 3 || is_of_the_cell || is_its_own, "{number} -> {target}");
    }
}

#[test]
fn descriptors_that_the_caller_left_open_are_closed() {
    let cells = Cells::new();
    let secret = fs::File::open("/etc/passwd").unwrap();
    let secret = process::passable(secret).unwrap();
    let number = process::number(&secret);
    let mut command = cells.jailer(&[]);
    let child = process::spawn_bound(&mut command, vec![secret]).unwrap();
    let vmm = Vmm { child };
    cells.client();
    assert!(!Path::new(&format!("/proc/{}/fd/{number}", vmm.pid())).exists());
}

#[test]
fn a_symlink_in_place_of_any_directory_of_a_cell_is_refused() {
    for part in ["berth-vmm", "berth-vmm/cell-1", "berth-vmm/cell-1/root", "berth-vmm/cell-1/root/dev"] {
        let cells = Cells::new();
        let elsewhere = tempfile::tempdir().unwrap();
        let link = cells.base.path().join(part);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(elsewhere.path(), &link).unwrap();
        let before = fs::metadata(elsewhere.path()).unwrap();
        is_refused(&cells, "is a symbolic link");
        let after = fs::metadata(elsewhere.path()).unwrap();
        assert_eq!((after.uid(), after.mode()), (before.uid(), before.mode()), "{part}");
        assert_eq!(tree(elsewhere.path()), set(&[]), "{part}");
    }
}

#[test]
fn a_link_in_place_of_any_file_of_a_cell_is_refused_and_what_it_leads_to_stays_as_it_is() {
    for name in ["berth-vmm", "berth-vmm.pid", "dev/kvm", "dev/net/tun", "dev/urandom"] {
        for is_hard in [false, true] {
            let cells = Cells::new();
            let victim = cells.base.path().join("victim");
            fs::write(&victim, "precious").unwrap();
            let link = cells.root().join(name);
            fs::create_dir_all(link.parent().unwrap()).unwrap();
            match is_hard {
                true => fs::hard_link(&victim, &link).unwrap(),
                false => symlink(&victim, &link).unwrap(),
            }
            let before = fs::metadata(&victim).unwrap();
            is_refused(&cells, "is there already");
            let after = fs::metadata(&victim).unwrap();
            assert_eq!(fs::read(&victim).unwrap(), b"precious", "{name}");
            assert_eq!((after.uid(), after.mode()), (before.uid(), before.mode()), "{name}");
        }
    }
}

#[test]
fn a_cell_that_is_in_use_is_not_touched_by_a_second_one_of_its_name() {
    let cells = Cells::new();
    let vmm = cells.start(&[]);
    cells.client();
    is_refused(&cells, "is there already");
    assert_eq!(cells.pid(), vmm.pid());
}

#[track_caller]
fn is_refused(cells: &Cells, why: &str) {
    was_refused(&cells.run(&[]), &[why]);
}

#[test]
fn a_daemon_has_a_pid_file_and_no_terminal() {
    is_a_daemon(&["--daemonize"], |pid| format!("{pid}"));
}

#[test]
fn a_daemon_in_a_pid_namespace_is_its_first_process() {
    is_a_daemon(&["--daemonize", "--new-pid-ns"], |pid| format!("{pid} 1"));
}

fn is_a_daemon(flags: &[&str], numbers: impl FnOnce(u32) -> String) {
    let cells = Cells::new();
    let output = cells.run(flags);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    // The program runs by now, so the file is there.
    let pid = cells.pid();
    cells.client();
    assert_eq!(status(pid, "NSpid"), numbers(pid));
    is_an_ordinary_user_without_capabilities(pid);
    for number in 0..3 {
        assert_eq!(fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap(), Path::new("/dev/null"));
    }
    let process = Pid::from_raw(pid as i32);
    let session = rustix::process::getsid(process).unwrap();
    assert_ne!(session, rustix::process::getsid(None).unwrap());
    // It cannot get a terminal: that takes the leader of a session.
    assert_ne!(Some(session), process);

    cells.kill();
}

#[test]
fn what_goes_wrong_in_a_daemon_is_told_to_who_started_it() {
    for flags in [&["--daemonize"][..], &["--new-pid-ns"], &["--daemonize", "--new-pid-ns"]] {
        let cells = Cells::new();
        let elsewhere = tempfile::tempdir().unwrap();
        let script = elsewhere.path().join("script");
        fs::write(&script, "#!/bin/sh\n").unwrap();
        fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut command = Command::new(program("berth-jailer"));
        command.args(["--id", ID, "--uid", "1", "--gid", "1", "--exec-file"]).arg(&script);
        let output = command.arg("--chroot-base-dir").arg(cells.base.path()).args(flags).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(140), "{flags:?}: {said}");
        assert!(said.contains("--exec-file") && said.contains("statically linked"), "{flags:?}: {said}");
    }
}

#[test]
fn limits_are_in_force_and_cannot_be_raised() {
    let cells = Cells::new();
    let vmm = cells.start(&["--resource-limit", "fsize=1048576"]);
    cells.client();
    let text = fs::read_to_string(format!("/proc/{}/limits", vmm.pid())).unwrap();
    for (name, value) in
        [("Max open files", "2048"), ("Max file size", "1048576"), ("Max core file size", "1")]
    {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        let values: Vec<_> = line.split_whitespace().take(2).collect();
        assert_eq!(values, [value, value], "{name}");
    }
}

#[test]
fn the_network_is_that_of_the_namespace_that_was_named() {
    let made = Command::new("ip").args(["netns", "add", "berth-jail"]).status().unwrap();
    assert!(made.success());
    let cells = Cells::new();
    let vmm = cells.start(&["--netns", "/run/netns/berth-jail"]);
    cells.client();
    let network = fs::metadata(format!("/proc/{}/ns/net", vmm.pid())).unwrap().ino();
    assert_eq!(network, fs::metadata("/run/netns/berth-jail").unwrap().ino());
    drop(cells);
    Command::new("ip").args(["netns", "delete", "berth-jail"]).status().unwrap();
}

#[test]
fn the_control_group_has_the_vmm_and_its_limits() {
    let Some(hierarchy) = cgroup2() else {
        println!("SKIPPED: no cgroup2 is mounted");
        return;
    };
    let group = hierarchy.join("berth-test/cell-1");
    let cells = Cells::new();
    let mut vmm = cells.start(&[
        "--cgroup-version",
        "2",
        "--parent-cgroup",
        "berth-test",
        "--cgroup",
        "memory.max=268435456",
        "--cgroup",
        "pids.max=64",
    ]);
    cells.client();
    let text = |path: PathBuf| fs::read_to_string(path).unwrap().trim().to_owned();
    assert_eq!(text(group.join("cgroup.procs")), vmm.pid().to_string());
    assert_eq!(text(group.join("memory.max")), "268435456");
    assert_eq!(text(group.join("pids.max")), "64");
    process::kill(&mut vmm.child);
    fs::remove_dir(&group).unwrap();

    // Without a setting: the parent itself, which is there or is asked for.
    fs::remove_dir_all(cells.root()).unwrap();
    fs::create_dir(hierarchy.join("berth-test/made")).unwrap();
    let flags = ["--cgroup-version", "2", "--parent-cgroup"];
    let mut vmm = cells.start(&[&flags[..], &["berth-test/made"]].concat());
    cells.client();
    assert_eq!(text(hierarchy.join("berth-test/made/cgroup.procs")), vmm.pid().to_string());
    process::kill(&mut vmm.child);
    for name in ["berth-test/made", "berth-test"] {
        fs::remove_dir(hierarchy.join(name)).unwrap();
    }
    fs::remove_dir_all(cells.root()).unwrap();
    let output = cells.run(&[&flags[..], &["berth-test"]].concat());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(140) && said.contains("--parent-cgroup berth-test"), "{said}");
}

fn cgroup2() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
    line.split(' ').nth(1).map(PathBuf::from)
}

#[test]
fn under_the_name_firecracker_the_vmm_in_the_cell_is_firecracker() {
    let cells = Cells::new();
    let elsewhere = tempfile::tempdir().unwrap();
    let link = elsewhere.path().join("firecracker");
    symlink(program("berth-vmm"), &link).unwrap();
    let [uid, gid] = [UID, GID].map(|number| number.to_string());
    let mut command = Command::new(program("berth-jailer"));
    command.args(["--id", ID, "--uid", &uid, "--gid", &gid, "--exec-file"]).arg(&link);
    command.arg("--chroot-base-dir").arg(cells.base.path());
    let mut cell = process::spawn_bound(&mut command, Vec::new()).unwrap();
    let socket = cells.base.path().join("firecracker").join(ID).join("root/run/firecracker.socket");
    let mut client = Client::connect_within(&socket, limits::API).unwrap();
    assert_eq!(client.instance_info().unwrap().app_name, "Firecracker");
    cell.kill().unwrap();
    cell.wait().unwrap();
}
