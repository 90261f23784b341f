//! Cells come and go, one after another, in every way in which there are cells; with each of them everything goes that
//! it was made of: mounts, control groups, namespaces, files and processes.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use api_socket::{ActionType, Request};
use berth_tests::cell::{Cells, ID, remove_group, traces, tree};
use berth_tests::guest::{Kernel, Setup, asset, times};
use berth_tests::host::provide;
use rustix::process::{Pid, Signal, kill_process};

const PARENT: &str = "/sys/fs/cgroup/berth-cycles";
const NETWORK: &str = "berth-cycles";

/// How many namespaces of a kind there may be beyond those of the beginning. The kernel may free them a little after the
/// last process in them.
const SPARE: usize = 8;

/// A limit on namespaces, so that one that stays and that nobody sees is missing in the end. As long as this lives.
struct FewNamespaces(BTreeMap<String, String>);

impl FewNamespaces {
    fn new() -> FewNamespaces {
        let now = traces();
        let limit = |kind| {
            let file = format!("/proc/sys/user/max_{kind}_namespaces");
            let before = fs::read_to_string(&file).unwrap();
            fs::write(&file, (now.namespaces(kind) + SPARE).to_string()).unwrap();
            (file, before)
        };
        FewNamespaces(["cgroup", "ipc", "mnt", "pid", "user", "uts"].map(limit).into())
    }
}

impl Drop for FewNamespaces {
    fn drop(&mut self) {
        for (file, before) in &self.0 {
            let _ = fs::write(file, before);
        }
    }
}

/// Starts a VMM in a cell, with a guest or without, ends it, and removes the cell as its caller does.
fn cycle(cells: &Cells, flags: &[&str], has_guest: bool) {
    let kernel = format!("kernel={}:ro", asset(provide::BZIMAGE).display());
    let mut started = cells.start(&[flags, &["--file", &kernel]].concat());
    let mut api = cells.client();
    let vmm = Pid::from_raw(cells.pid() as i32).unwrap();
    if has_guest {
        let setup = Setup { kernel: Kernel::Path("fd:kernel".into()), initramfs: false, ..Setup::default() };
        for request in setup.requests().iter().chain([&Request::Action(ActionType::InstanceStart)]) {
            api.apply(request).unwrap();
        }
    }
    kill_process(vmm, if has_guest { Signal::KILL } else { Signal::TERM }).unwrap();
    started.ended();
    cells.wait();
    cells.remove();
    let group = Path::new(PARENT).join(ID);
    if group.exists() {
        remove_group(&group);
    }
}

fn come_and_go(cells: &Cells, ways: &[&[&str]], count: u32) {
    // The first makes the directory of all cells of its program, which stays.
    cycle(cells, ways[0], false);
    let begin = Instant::now();
    let _few = FewNamespaces::new();
    let before = (traces(), tree(cells.base.path()));
    for number in 0..count {
        // With a guest and without, each way has its turn.
        let (way, has_guest) = (ways[number as usize / 2 % ways.len()], number % 2 == 0);
        cycle(cells, way, has_guest);
        let now = (traces(), tree(cells.base.path()));
        assert_eq!(now, before, "cycle {number}, {way:?}, with a guest: {has_guest}");
    }
    println!(
        "{count} cells came and went, half of them with a guest, in {:.0} s; there are {} mounts, {} control groups and {} \
         namespaces, as before the first",
        begin.elapsed().as_secs_f64(),
        before.0.mounts(),
        before.0.groups(),
        before.0.namespaces("")
    );
}

#[test]
fn a_thousand_cells_leave_nothing_in_their_host() {
    let made = Command::new("ip").args(["netns", "add", NETWORK]).status().unwrap();
    assert!(made.success());
    fs::create_dir(PARENT).unwrap();
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+pids").unwrap();
    fs::write(format!("{PARENT}/cgroup.subtree_control"), "+pids").unwrap();
    let network = format!("/run/netns/{NETWORK}");
    let group = [
        "--cgroup-version",
        "2",
        "--parent-cgroup",
        "berth-cycles",
        "--cgroup",
        "pids.max=100",
        "--netns",
        &network,
    ];
    let ways: [&[&str]; 5] = [
        &[],
        &group,
        &["--new-pid-ns"],
        &[&group[..], &["--daemonize"]].concat(),
        &[&group[..], &["--daemonize", "--new-pid-ns"]].concat(),
    ];
    come_and_go(&Cells::new(), &ways, times(40, 1000));
    fs::remove_dir(PARENT).unwrap();
    assert!(Command::new("ip").args(["netns", "delete", NETWORK]).status().unwrap().success());
}

#[test]
fn cells_of_an_ordinary_users_leave_nothing_in_their_host() {
    come_and_go(&Cells::rootless(), &[&[], &["--daemonize"]], times(20, 200));
}
