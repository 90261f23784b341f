//! The end of the jailer as the VMM: what the VMM is told, and the exec.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;

use rustix::fs::Mode;
use rustix::io::FdFlags;
use rustix::time::{ClockId, clock_gettime};

use crate::args::Args;
use crate::error::{During, Error, Result};
use crate::handed::Handed;
use crate::ids::{self, User};

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
    pub fn of_child(self) -> Times {
        let used = clock_us(ClockId::ProcessCPUTime).saturating_sub(self.cpu_us);
        Times { cpu_us: 0, parents_cpu_us: self.parents_cpu_us.saturating_add(used), ..self }
    }
}

/// What the VMM is to begin with, besides its arguments.
#[derive(Debug)]
pub struct Launch<'a> {
    pub user: &'a User,
    pub umask: Mode,
    pub times: &'a Times,
    /// What is to be its standard input, output and error, where those are not this process's.
    pub null: Option<&'a File>,
    pub handed: &'a [Handed],
}

/// Becomes the VMM. Returns only if that fails, as who we were before.
///
/// What cannot be undone happens in a thread of its own: the kernel keeps user and capabilities for each thread, and an
/// exec ends all but the one that calls it. So there is still somebody to take back what was made when it fails.
pub fn become_vmm(args: &Args, launch: &Launch<'_>) -> Error {
    let attempt = thread::scope(|scope| {
        let attempt = thread::Builder::new().spawn_scoped(scope, || drop_and_execute(args, launch))?;
        Ok(attempt.join())
    });
    match attempt {
        Ok(Ok(error)) => error,
        // A panic ends the process, but the type does not know.
        Ok(Err(_)) => Error::Refused("the thread that was to become the VMM has ended".into()),
        Err(error) => Error::System { what: "cannot start a thread".into(), error },
    }
}

fn drop_and_execute(args: &Args, launch: &Launch<'_>) -> Error {
    // We are the VMM's user, with no capability and no way to one.
    rustix::process::umask(launch.umask);
    match ids::become_user(launch.user).and_then(|()| command(args, launch)) {
        Err(error) => error,
        Ok(mut command) => {
            let what = format!(
                "--exec-file {} cannot be executed in the cell; it must be a program that needs no other file (statically \
                 linked)",
                args.program.display()
            );
            Error::System { what, error: command.exec() }
        }
    }
}

/// The program lies in the root under its name. Its environment is empty.
fn command(args: &Args, launch: &Launch<'_>) -> Result<Command> {
    let mut path = OsString::from("/");
    path.push(&args.program_name);
    let mut command = Command::new(&path);
    command.env_clear();
    command.args(told(&args.id, launch.times, launch.handed)).args(&args.vmm_arguments);
    for set in [Command::stdin, Command::stdout, Command::stderr] {
        if let Some(null) = launch.null {
            set(&mut command, Stdio::from(null.try_clone().during(|| "cannot use /dev/null".into())?));
        }
    }
    for Handed { name, file } in launch.handed {
        rustix::io::fcntl_setfd(file, FdFlags::empty()).during(|| format!("cannot hand over {name}"))?;
    }
    Ok(command)
}

/// What every VMM is told by its jailer, before its own arguments.
fn told(id: &str, times: &Times, handed: &[Handed]) -> Vec<String> {
    let mut told: Vec<String> = ["--id", id].map(String::from).into();
    for (flag, us) in [
        ("--start-time-us", times.wall_us),
        ("--start-time-cpu-us", times.cpu_us),
        ("--parent-cpu-time-us", times.parents_cpu_us),
    ] {
        told.extend([flag.into(), us.to_string()]);
    }
    told.extend(handed.iter().flat_map(|handed| ["--fd".into(), handed.argument()]));
    told
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
        let told = told("vm", &times, &[]).join(" ");
        assert_eq!(told, "--id vm --start-time-us 1 --start-time-cpu-us 2 --parent-cpu-time-us 3");
    }
}
