//! The process itself: what it leaves behind, what it splits into, how it is heard, and its end as the VMM.
//!
//! It has one thread, from first to last.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use rustix::time::{ClockId, clock_gettime};

use crate::args::{Args, ExitCode as Code, Identity};
use crate::error::{During, Error, Result};

/// The longest message that is passed on, in bytes.
const MAX_REPORT: u64 = 64 << 10;

/// Closes every descriptor but standard input, output and error. Before any other is opened.
///
/// # Errors
/// The kernel is older than 5.9.
pub fn close_inherited() -> Result<()> {
    // SAFETY: closing a descriptor takes it away from whoever owns it. Nothing here has opened one yet, as the caller
    // was told, and what the caller of this process left open has no owner here.
    let closed = unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    match closed {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()).during(|| "cannot close inherited descriptors".into()),
    }
}

/// Leaves the caller's session keyring for a new, empty one: who has a session's keyring may use the keys in it, as any
/// user.
///
/// # Errors
/// The user has too many keyrings.
pub fn leave_keyring() -> Result<()> {
    // SAFETY: the call takes the name of a keyring, where a null pointer stands for one without a name, and touches no
    // memory.
    let joined =
        unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<u8>()) };
    match std::io::Error::last_os_error() {
        // A kernel without keys has none to leave.
        error if joined < 0 && error.raw_os_error() != Some(libc::ENOSYS) => {
            Err(error).during(|| "cannot leave the caller's keyring".into())
        }
        _ => Ok(()),
    }
}

/// When the start began, for the VMM's metrics. Microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// CLOCK_MONOTONIC when this process began.
    pub wall_us: u64,
    /// CLOCK_PROCESS_CPUTIME_ID when this process began. An exec does not reset that clock, a fork does.
    pub cpu_us: u64,
    /// What the processes before this one have used.
    pub parents_cpu_us: u64,
}

impl Times {
    /// Starts to measure.
    pub fn start() -> Times {
        Times {
            wall_us: clock_us(ClockId::Monotonic),
            cpu_us: clock_us(ClockId::ProcessCPUTime),
            parents_cpu_us: 0,
        }
    }

    /// What a child has to go by that is forked now.
    fn of_child(self) -> Times {
        let used = clock_us(ClockId::ProcessCPUTime).saturating_sub(self.cpu_us);
        Times { cpu_us: 0, parents_cpu_us: self.parents_cpu_us.saturating_add(used), ..self }
    }
}

/// Where errors are told, and with which code the process ends on them.
#[derive(Debug)]
pub struct Voice {
    identity: Identity,
    /// To the process that our caller waits for. Until there is another process than this, standard error.
    pipe: Option<File>,
}

impl Voice {
    pub fn new(identity: Identity) -> Voice {
        Voice { identity, pipe: None }
    }

    /// Tells why this process ends.
    pub fn last_word(mut self, error: &Error) -> ExitCode {
        let text = format!("{}: {error}\n", self.identity.name());
        // If it cannot be said, nobody is listening.
        let _ = match &mut self.pipe {
            Some(pipe) => pipe.write_all(text.as_bytes()),
            None => std::io::stderr().write_all(text.as_bytes()),
        };
        self.identity.exit_code(Code::NoCell).into()
    }

    /// Waits until the other processes have become the VMM or have failed, and ends with their error or without.
    fn hear_out(&self, pipe: File) -> ! {
        let mut text = Vec::new();
        // What was read before an error is worth telling too.
        let _ = pipe.take(MAX_REPORT).read_to_end(&mut text);
        let _ = std::io::stderr().write_all(&text);
        let code = if text.is_empty() { Code::Ok } else { self.identity.exit_code(Code::NoCell) };
        std::process::exit(code as i32)
    }
}

/// Goes on as a process in a session of its own, which is not the session's leader and so can never get a terminal. The
/// process that the caller waits for ends when the VMM runs, or with what went wrong.
///
/// Standard input and output stay until the exec: see [`become_vmm`].
///
/// # Errors
/// There may be no further process.
pub fn daemonize(voice: &mut Voice, times: &mut Times) -> Result<()> {
    let (hear, speak) = pipe()?;
    let child = times.of_child();
    if fork()?.is_some() {
        drop(speak);
        voice.hear_out(hear);
    }
    *times = child;
    voice.pipe = Some(speak);
    rustix::process::setsid().during(|| "--daemonize: cannot start a session".into())?;
    let child = times.of_child();
    if fork()?.is_some() {
        std::process::exit(Code::Ok as i32);
    }
    *times = child;
    Ok(())
}

/// Goes on as process 1 of a new pid namespace. The process outside learns the new one's number, does `before` with it,
/// and ends as in [`daemonize`]; the new one waits until that is done.
///
/// # Errors
/// There may be no further namespace or process; or `before` failed, and the new process has ended.
pub fn enter_pid_namespace(
    voice: &mut Voice,
    times: &mut Times,
    before: impl FnOnce(u32) -> Result<()>,
) -> Result<()> {
    // SAFETY: unsafe only for UnshareFlags::FILES, which would leave OwnedFds of other threads behind: it is not set.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }
        .during(|| "--new-pid-ns: cannot make a pid namespace".into())?;
    let (mut wait, mut go) = pipe()?;
    let (hear, speak) = pipe()?;
    let child = times.of_child();
    if let Some(pid) = fork()? {
        drop(speak);
        before(pid.as_raw_nonzero().get().unsigned_abs())?;
        go.write_all(&[1]).during(|| "--new-pid-ns: the new process has gone".into())?;
        match voice.pipe {
            // Whoever the caller waits for hears the new process too.
            Some(_) => std::process::exit(Code::Ok as i32),
            None => voice.hear_out(hear),
        }
    }
    drop((hear, go));
    *times = child;
    voice.pipe.get_or_insert(speak);
    // The end of the file is the end of the process outside, which has said why.
    if wait.read_exact(&mut [0]).is_err() {
        std::process::exit(Code::Generic as i32);
    }
    Ok(())
}

/// Becomes the VMM, which lies in the root under its name. Its environment is empty; with `null`, that is its standard
/// input, output and error. Returns only if that fails.
pub fn become_vmm(args: &Args, times: &Times, null: Option<&File>) -> Error {
    let mut path = OsString::from("/");
    path.push(&args.program_name);
    let mut command = Command::new(&path);
    command.env_clear();
    command.args(handed_over(&args.id, times)).args(&args.vmm_arguments);
    for set in [Command::stdin, Command::stdout, Command::stderr] {
        match null.map(File::try_clone) {
            None => {}
            Some(Ok(null)) => _ = set(&mut command, Stdio::from(null)),
            Some(Err(error)) => return Error::System { what: "cannot use /dev/null".into(), error },
        }
    }
    let error = command.exec();
    let what = format!(
        "--exec-file {} cannot be executed in the cell; it must be a program that needs no other file (statically linked)",
        args.program.display()
    );
    Error::System { what, error }
}

/// What every VMM is told by its jailer, before its own arguments.
fn handed_over(id: &str, times: &Times) -> [String; 8] {
    [
        "--id".into(),
        id.into(),
        "--start-time-us".into(),
        times.wall_us.to_string(),
        "--start-time-cpu-us".into(),
        times.cpu_us.to_string(),
        "--parent-cpu-time-us".into(),
        times.parents_cpu_us.to_string(),
    ]
}

/// The child in the parent, nothing in the child.
fn fork() -> Result<Option<Pid>> {
    // SAFETY: a child of a process with several threads may not allocate. This process has one thread, as the module says.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(std::io::Error::last_os_error()).during(|| "cannot start a process".into()),
        pid => Ok(Pid::from_raw(pid)),
    }
}

fn pipe() -> Result<(File, File)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).during(|| "cannot make a pipe".into())?;
    Ok((read.into(), write.into()))
}

fn clock_us(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    // Both clocks count from zero.
    time.tv_sec.unsigned_abs().saturating_mul(1_000_000).saturating_add(time.tv_nsec.unsigned_abs() / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_counts_from_zero_and_knows_what_its_parents_used() {
        let parent = Times { wall_us: 7, cpu_us: 0, parents_cpu_us: 1000 };
        let child = parent.of_child();
        assert_eq!((child.wall_us, child.cpu_us), (7, 0));
        assert!(child.parents_cpu_us >= 1000 && child.of_child().parents_cpu_us >= child.parents_cpu_us);
    }

    #[test]
    fn the_vmm_is_told_its_id_and_the_times() {
        let times = Times { wall_us: 1, cpu_us: 2, parents_cpu_us: 3 };
        let told = handed_over("vm", &times).join(" ");
        assert_eq!(told, "--id vm --start-time-us 1 --start-time-cpu-us 2 --parent-cpu-time-us 3");
    }
}
