//! Runs commands in a host for its owner; see `berth_tests::host::agent`.
//!
//! Without arguments it serves the virtio port of a nested host, where it is process 1. `--socket` serves the socket on
//! standard input, for a host that is this machine.

use std::io;
use std::os::fd::AsFd as _;
use std::process::ExitCode;

use berth_tests::host::agent;

fn main() -> ExitCode {
    let served = match std::env::args().nth(1).as_deref() {
        None => agent::open_port().and_then(agent::serve_port),
        Some("--socket") => io::stdin().as_fd().try_clone_to_owned().and_then(agent::serve_socket),
        Some(other) => {
            Err(io::Error::other(format!("unknown argument {other:?}: expected --socket or nothing")))
        }
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("berth-host-agent: {error}");
            ExitCode::FAILURE
        }
    }
}
