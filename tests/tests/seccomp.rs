//! Each thread of a VMM may make the system calls that it needs and no others; one that it may not make ends the process,
//! which says what it was.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs;

use api_socket::{ActionType, Request};
use berth_tests::calls::{Call, Tracer};
use berth_tests::filters::{self, Rule, UNTESTED};
use berth_tests::guest::{Ended, Guest, Name, Setup, Vmm, limits};

mod lives;

/// Seccomp's modes in /proc/PID/status.
const OFF: &str = "0";
const FILTER: &str = "2";

/// An entry that nothing uses is a hole without a purpose. One that is missing ends the VMM in one of these lives.
#[test]
fn every_entry_of_every_filter_is_used() {
    let mut calls: Vec<Call> = Vec::new();
    for (name, live) in lives::ALL {
        println!("{name}");
        calls.extend(live());
    }
    let used = |kind: &str, rule: &Rule| calls.iter().any(|call| call.kind == kind && rule.allows(call));
    let mut unused = Vec::new();
    for (kind, filter) in filters::ours() {
        for rule in filter.rules.iter().filter(|rule| !used(&kind, rule)) {
            match rule.comment.strip_prefix(UNTESTED) {
                Some(why) => println!("{kind}: {} was not called: {why}", rule.syscall),
                None => unused.push(format!("{kind}: {}: {}", rule.syscall, rule.comment)),
            }
        }
    }
    assert_eq!(unused, [""; 0]);
}

#[test]
fn every_thread_of_a_running_vmm_has_one_filter_and_no_capability() {
    for name in [Name::Berth, Name::Firecracker] {
        let mut guest = Guest::booted(Setup { name, vcpus: 2, entropy: true, ..Setup::default() });
        let threads = guest.vmm.thread_statuses();
        // The control thread, the API, two vCPUs, the io thread.
        assert_eq!(threads.len(), 5, "{threads:?}");
        for thread in threads {
            for (field, value) in [("Seccomp", FILTER), ("Seccomp_filters", "1"), ("NoNewPrivs", "1")] {
                assert_eq!(thread.field(field), value, "{field} of {}", thread.field("Name"));
            }
            for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
                assert_eq!(thread.field(set), "0000000000000000", "{set} of {}", thread.field("Name"));
            }
        }
        guest.state();
        guest.power_off();
    }
}

#[test]
fn before_the_start_the_api_thread_is_confined_already() {
    let vmm = Vmm::spawn(Name::Berth, &[]);
    // The socket is there before its thread is confined; what it answers it answers afterwards.
    vmm.client().instance_info().unwrap();
    let statuses = vmm.thread_statuses();
    let api = statuses.iter().find(|thread| thread.field("Name") == "berth-api").expect("the API thread");
    assert_eq!((api.field("Seccomp"), api.field("CapEff")), (FILTER, "0000000000000000"));
}

/// A custom filter that lacks what `leaves_out` says.
fn with_filter(leaves_out: impl Fn(&str, &Rule) -> bool) -> Guest {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("filter.json");
    fs::write(&file, filters::custom(|kind, rule| !leaves_out(kind, rule))).unwrap();
    let arguments = vec!["--seccomp-filter".into(), file.display().to_string()];
    // Read before the API answers.
    Guest::configured(Setup { arguments, ..Setup::default() })
}

/// What is said of a call that is not allowed, on standard error and in the log.
#[track_caller]
fn ends_for(mut guest: Guest, call: &str, thread: &str) {
    assert_eq!(guest.ended(), Ended::Code(148));
    for text in [guest.vmm.errors(), guest.vmm.log()] {
        let line = text.lines().find(|line| line.contains("SIGSYS")).unwrap_or_else(|| panic!("{text}"));
        assert!(line.contains(call) && line.ends_with(&format!("in thread {thread}")), "{line}");
    }
}

#[test]
fn a_call_that_is_not_allowed_ends_the_process_with_its_name_and_the_thread_s() {
    // KVM_RUN, and with it all ioctls of a vCPU.
    let mut guest = with_filter(|kind, rule| kind == "vcpu" && rule.syscall == "ioctl");
    let _ = guest.api.apply(&Request::Action(ActionType::InstanceStart));
    ends_for(guest, "system call 16 (ioctl)", "berth-vcpu 0");

    let mut guest = with_filter(|kind, rule| kind == "io" && rule.syscall == "epoll_wait");
    let _ = guest.api.apply(&Request::Action(ActionType::InstanceStart));
    ends_for(guest, "system call 232 (epoll_wait)", "berth-io");

    // For a moment it blocks signals, to send one to its vCPUs.
    let mut guest = with_filter(|kind, rule| kind == "control" && rule.syscall == "rt_sigprocmask");
    guest.apply(Request::Action(ActionType::InstanceStart));
    let _ = guest.api.apply(&Request::PatchVm(api_socket::VmState::Paused));
    ends_for(guest, "system call 14 (rt_sigprocmask)", "main");

    let guest = with_filter(|kind, rule| kind == "api" && rule.syscall == "shutdown");
    let mut client = guest.vmm.client();
    let _ = client.request("GET", "/nonsense HTTP/9.9\r\n\r\n", None);
    ends_for(guest, "system call 48 (shutdown)", "berth-api");
}

#[test]
fn without_filters_it_says_so_and_runs() {
    let mut guest = Guest::booted(Setup { arguments: vec!["--no-seccomp".into()], ..Setup::default() });
    for thread in guest.vmm.thread_statuses() {
        assert_eq!(thread.field("Seccomp"), OFF, "{}", thread.field("Name"));
        // The rest does not depend on it.
        assert_eq!(thread.field("CapEff"), "0000000000000000", "{}", thread.field("Name"));
    }
    for text in [guest.vmm.errors(), guest.vmm.log()] {
        assert!(text.contains("--no-seccomp: no system call of this process is filtered"), "{text}");
    }
    guest.state();
    guest.power_off();
}

#[test]
fn a_file_that_is_no_filter_is_refused_with_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("filter.json");
    for (text, said) in [
        ("{}".to_string(), "no filter \"control\""),
        ("not JSON".to_string(), "line 1"),
        (filters::custom(|_, _| true).replace("epoll_wait", "epoll_weight"), "epoll_weight"),
    ] {
        fs::write(&file, text).unwrap();
        let mut vmm = Vmm::spawn(Name::Berth, &["--seccomp-filter".into(), file.display().to_string()]);
        assert_eq!(vmm.ended(limits::API), Ended::Code(152));
        let errors = vmm.errors();
        assert!(
            errors.contains(&format!("--seccomp-filter {}: ", file.display())) && errors.contains(said),
            "{errors}"
        );
    }
}
