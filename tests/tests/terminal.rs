//! A terminal on which a guest was run is as it was, however the VMM ended; and one in the background is left alone.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use berth_tests::guest::{Kernel, asset, limits, program, times};
use berth_tests::host::{process, provide};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use serde_json::json;
use tempfile::TempDir;

/// In proc_pid_status(5) of a process with a SIGTERM that it has not taken.
const TERM_WAITS: &str = "ShdPnd:\t0000000000004000";

/// The two ends of a new terminal: where a person is, and where a program is.
fn terminal() -> (OwnedFd, OwnedFd) {
    let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&person).unwrap();
    unlockpt(&person).unwrap();
    let program = ioctl_tiocgptpeer(&person, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    (person, program)
}

/// A directory with the configuration of a guest that runs `command`, and powers off when that has ended.
fn configured(command: &str) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let config = json!({"boot-source": {
        "kernel_image_path": Kernel::Elf.path(),
        "initrd_path": asset(provide::INITRAMFS),
        "boot_args": format!("console=ttyS0 quiet panic=1 berth.run=\"{command}\""),
    }});
    fs::write(directory.path().join("vm.json"), config.to_string()).unwrap();
    directory
}

fn start(command: &mut Command, directory: &TempDir, terminal: &OwnedFd) -> Child {
    command.current_dir(directory.path()).stdin(terminal.try_clone().unwrap()).stdout(Stdio::null());
    command.stderr(File::create(directory.path().join("errors")).unwrap());
    process::in_session(command, true).spawn().unwrap()
}

fn modes(terminal: &OwnedFd) -> (LocalModes, String) {
    let settings = tcgetattr(terminal).unwrap();
    (settings.local_modes, format!("{settings:?}"))
}

fn ended(vmm: &mut Child, limit: Duration) -> Option<i32> {
    if !process::wait_for(vmm, limit) {
        let _ = vmm.kill();
        panic!("it did not end");
    }
    vmm.wait().unwrap().code()
}

#[test]
fn a_terminal_is_as_it_was_whatever_ends_the_vmm() {
    let ends = [
        (vec![Signal::TERM, Signal::TERM], 0),
        (vec![Signal::HUP], 156),
        (vec![Signal::SEGV], 150),
        (vec![Signal::XCPU], 154),
    ];
    for (signals, code) in ends.iter().cycle().take(ends.len() * times(2, 25) as usize) {
        let (_person, terminal) = terminal();
        let before = modes(&terminal);
        let directory = configured("sleep 1000");
        let mut vmm = Command::new(program("berth-vmm"));
        let mut vmm = start(vmm.args(["--no-api", "--config-file", "vm.json"]), &directory, &terminal);
        let deadline = Instant::now() + limits::API;
        while modes(&terminal).0.contains(LocalModes::ECHO) {
            assert!(Instant::now() < deadline, "it takes no keys");
            // No sleep: the signal is to come as soon after the change as can be.
            thread::yield_now();
        }
        for signal in signals {
            kill_process(Pid::from_child(&vmm), *signal).unwrap();
            // Two of a kind that wait would be one.
            let (status, begin) = (format!("/proc/{}/status", vmm.id()), Instant::now());
            while fs::read_to_string(&status).is_ok_and(|status| status.contains(TERM_WAITS)) {
                assert!(begin.elapsed() < limits::EXIT, "it does not hear a signal");
                thread::sleep(Duration::from_millis(5));
            }
            thread::sleep(Duration::from_millis(200));
        }
        assert_eq!(ended(&mut vmm, limits::EXIT), Some(*code), "{signals:?}");
        assert_eq!(modes(&terminal), before, "{signals:?}");
    }
}

#[test]
fn a_guest_in_the_background_of_a_shell_runs_and_leaves_the_terminal_alone() {
    let (_person, terminal) = terminal();
    let before = modes(&terminal);
    let directory = configured("true");
    let mut shell = Command::new("sh");
    // With job control a job in the background is no part of the terminal's foreground group.
    shell.args(["-c", "set -m; \"$0\" --no-api --config-file vm.json & wait $!"]).arg(program("berth-vmm"));
    let mut shell = start(&mut shell, &directory, &terminal);
    let code = ended(&mut shell, limits::BOOT);
    assert_eq!(code, Some(0), "{}", fs::read_to_string(directory.path().join("errors")).unwrap());
    assert_eq!(modes(&terminal), before);
}
