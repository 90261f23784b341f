//! How a guest is asked to power off: the way that its init understands.

use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal};

use crate::kernel::{self, Kernel};
use crate::serve::Refusal;

/// Where a guest says that its init is systemd; sd_booted(3).
const SYSTEMD: &str = "/run/systemd/system";

/// What asks other inits, each in its own way.
const PROGRAMS: [&str; 3] = ["/sbin/poweroff", "/usr/sbin/poweroff", "/bin/poweroff"];

/// How much of what a program says is handed on.
const MAX_WORDS: usize = 1000;

/// Asks for it, from inside of the guest's root. The guest goes down by itself then.
pub fn ask(kernel: Kernel) -> Result<(), Refusal> {
    let name = kernel::read(kernel.proc, "1/comm").unwrap_or_default();
    if Path::new(SYSTEMD).is_dir() && run("systemctl", &["--no-block", "poweroff"]).is_ok() {
        return Ok(());
    }
    // busybox's init: SIGUSR2 is its power off.
    let program = rustix::fs::readlinkat(kernel.proc, "1/exe", Vec::new()).unwrap_or_default();
    if name == "init" && program.to_bytes().ends_with(b"/busybox") {
        return signal(Signal::USR2);
    }
    match PROGRAMS.iter().find(|program| Path::new(program).exists()) {
        Some(program) => run(program, &[]),
        None => Err(format!(
            "this guest's init, {name:?}, is none that is known here, and there is no {} to ask it; \
             run what switches it off, or stop the guest by force",
            PROGRAMS[0]
        )),
    }
}

fn signal(signal: Signal) -> Result<(), Refusal> {
    rustix::process::kill_process(Pid::INIT, signal).map_err(|error| format!("a signal to init: {error}"))
}

fn run(program: &str, arguments: &[&str]) -> Result<(), Refusal> {
    let mut command = Command::new(program);
    command.args(arguments).env_clear().env("PATH", crate::exec::PATH).current_dir("/");
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let words: String = words.trim().chars().take(MAX_WORDS).collect();
    Err(format!("{program} ended with {}: {words}", output.status))
}
