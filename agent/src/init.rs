//! Process 1, for the moment between the kernel and the image's own init: it leaves the agent behind and goes on as that
//! init, with the arguments and the environment that the kernel gave.
//!
//! It changes nothing that the image's init would find: no mount stays, no descriptor, no signal. What goes wrong is said on
//! the console, and the image boots without an agent.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use rustix::fs::{Access, access};

use crate::command_line::CommandLine;
use crate::kernel::{self, Kernel, console};

/// What the agent is called: by the first letter systemd tells processes that it should not end at the switch of root.
pub const AGENT_NAME: &str = "@berth-agent";

/// This program.
const OURS: &str = "/berth/init";

/// The init of an initramfs, where the kernel looks for it.
const IMAGES: &str = "/init";

/// Returns if there is nothing to go on as; the kernel then panics, as it would without us.
pub fn run() -> ExitCode {
    let view = kernel::hidden("proc").and_then(|proc| Ok((proc, kernel::hidden("sysfs")?)));
    let command_line = match &view {
        Ok((proc, sys)) => Kernel::new(proc.as_fd(), sys.as_fd()).command_line(),
        Err(error) => Err(io::Error::new(error.kind(), format!("no /proc or /sys: {error}"))),
    };
    let command_line = CommandLine::parse(&command_line.unwrap_or_default());
    if let Some(name) = command_line.value("berth.hostname")
        && let Err(error) = rustix::system::sethostname(name.as_bytes())
    {
        console(&format!("the host name {name:?} is not taken: {error}"));
    }
    let view = view.and_then(|(proc, sys)| leave_agent(&proc, &sys).map(|()| (proc, sys)));
    if let Err(error) = &view {
        console(&format!("this guest has no agent: {error}"));
    }
    if access(IMAGES, Access::EXEC_OK).is_ok() {
        let error = go_on_as(OsStr::new(IMAGES));
        console(&format!("the image's {IMAGES} does not run: {error}"));
        return ExitCode::FAILURE;
    }
    let Ok((proc, sys)) = view else { return ExitCode::FAILURE };
    let kernel = Kernel::new(proc.as_fd(), sys.as_fd());
    match crate::switch::to_root(kernel, &command_line) {
        Ok(init) => console(&format!("{} does not run: {}", init.display(), go_on_as(&init))),
        Err(error) => console(&error),
    }
    ExitCode::FAILURE
}

/// Starts the agent. All it needs are its standard descriptors: /proc, /sys and the kernel's log.
fn leave_agent(proc: &OwnedFd, sys: &OwnedFd) -> io::Result<()> {
    let mut agent = Command::new(OURS);
    agent.arg0(AGENT_NAME).env_clear();
    agent.stdin(Stdio::from(proc.try_clone()?)).stdout(Stdio::from(sys.try_clone()?));
    agent.stderr(Stdio::from(kernel::log_file()?));
    // Never waited for here: process 1 becomes another program, which takes in what ends below it.
    agent.spawn().map(drop)
}

/// Becomes this program. Returns only if that fails.
fn go_on_as(init: &OsStr) -> io::Error {
    Command::new(init).arg0(init).args(std::env::args_os().skip(1)).exec()
}
