//! Processes that may be our children or not: who one is, whether it still is, and how it ended.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};

use crate::record::Process;

/// How long a command of the host's may take: `ip`, `nft`, the jailer that removes a cell.
const COMMAND: Duration = Duration::from_secs(20);
/// What is kept of what it said, in bytes.
const MAX_SAID: u64 = 8 << 10;

/// A process that is there, held so that its number cannot become another's.
#[derive(Debug)]
pub struct Held {
    pub pidfd: OwnedFd,
    pub process: Process,
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Code(i32),
    Signal(i32),
}

impl Held {
    /// The process of this number, whoever it is now.
    ///
    /// # Errors
    /// There is none, or it cannot be looked at.
    pub fn of_pid(pid: u32) -> io::Result<Held> {
        let pidfd = open(pid)?;
        // After the descriptor: it is this process's as long as that one says that it lives.
        let process = Process { pid, start_ticks: start_ticks(pid)?, boot_id: boot_id()? };
        Ok(Held { pidfd, process })
    }

    /// The process of a record, if it still is there.
    pub fn of_record(process: &Process) -> Option<Held> {
        let held = Held::of_pid(process.pid).ok()?;
        (held.process == *process).then_some(held)
    }

    /// Sends a signal; to one that has ended it does nothing.
    pub fn signal(&self, signal: Signal) {
        // The only errors left are that it has ended, and that it is not ours to signal, which root never hears.
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// How it ended; `None` if it is not our child, or has not ended. It is reaped.
    pub fn reap(&self) -> Option<Status> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let status = waitid(WaitId::PidFd(self.pidfd.as_fd()), options).ok()??;
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Some(Status::Code(code)),
            (None, Some(signal)) => Some(Status::Signal(signal)),
            (None, None) => None,
        }
    }

    /// Whether it has ended, waiting for that as long.
    pub fn ends_within(&self, time: Duration) -> bool {
        let mut fds = [rustix::event::PollFd::new(&self.pidfd, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec::try_from(time).ok();
        matches!(rustix::event::poll(&mut fds, limit.as_ref()), Ok(ready) if ready > 0)
    }
}

/// Since the host's start, also while it slept.
pub fn since_boot() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs().try_into().unwrap_or_default())
}

/// Runs a command of the host's and gives it this to read: how it ended, and what it said on standard error. One that does not end
/// is ended.
///
/// # Errors
/// It cannot be run, or took too long.
pub fn output(mut command: Command, input: &[u8]) -> io::Result<Output> {
    // Files, so that nobody waits for who does not read, or does not write; in memory, as a disk may be full.
    let file = || memfd_create("berthd", MemfdFlags::CLOEXEC).map(File::from);
    let (mut stdin, mut stderr) = (file()?, file()?);
    stdin.write_all(input)?;
    stdin.rewind()?;
    let mut child = command.stdin(stdin).stdout(Stdio::null()).stderr(stderr.try_clone()?).spawn()?;
    let ended = Held::of_pid(child.id()).map(|held| held.ends_within(COMMAND));
    if !matches!(ended, Ok(true)) {
        let _ = child.kill();
        let _ = child.wait();
        ended?;
        let message = format!("it did not end in {} s", COMMAND.as_secs());
        return Err(io::Error::new(io::ErrorKind::TimedOut, message));
    }
    let status = child.wait()?;
    let mut said = Vec::new();
    stderr.rewind()?;
    stderr.take(MAX_SAID).read_to_end(&mut said)?;
    Ok(Output { status, stdout: Vec::new(), stderr: said })
}

fn open(pid: u32) -> io::Result<OwnedFd> {
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::NotFound)?;
    Ok(pidfd_open(number, PidfdFlags::empty())?)
}

/// Field 22 of proc_pid_stat(5). The second field is in parentheses and may hold anything.
fn start_ticks(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    ticks_in(&stat)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no start time in proc_pid_stat(5)"))
}

fn ticks_in(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    // What follows begins with field 3.
    fields.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

/// Of this run of the host.
///
/// # Errors
/// Those of /proc.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_start_time_is_found_whatever_a_process_calls_itself() {
        let fields: Vec<_> = (3..=30).map(|field| field.to_string()).collect();
        for name in ["sh", "a b", "a) b (", ")"] {
            let stat = format!("7 ({name}) {}\n", fields.join(" "));
            assert_eq!(ticks_in(&stat), Some(22), "{stat}");
        }
        assert_eq!(ticks_in("7 (sh) 3 4"), None);
        assert_eq!(ticks_in(""), None);
    }

    #[test]
    fn a_process_is_known_again_until_it_has_ended_and_then_tells_how() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let held = Held::of_pid(child.id()).unwrap();
        assert!(Held::of_record(&held.process).is_some());
        let other = Process { start_ticks: held.process.start_ticks + 1, ..held.process.clone() };
        assert!(Held::of_record(&other).is_none());
        let rebooted = Process { boot_id: "other".into(), ..held.process.clone() };
        assert!(Held::of_record(&rebooted).is_none());

        assert_eq!(held.reap(), None);
        assert!(!held.ends_within(Duration::ZERO));
        held.signal(Signal::KILL);
        assert!(held.ends_within(Duration::from_secs(10)));
        assert_eq!(held.reap(), Some(Status::Signal(9)));
        assert!(Held::of_record(&held.process).is_none());
        held.signal(Signal::KILL);
        // It has been reaped.
        assert!(child.wait().is_err());
    }

    #[test]
    fn who_is_not_our_child_cannot_be_reaped() {
        let held = Held::of_pid(std::process::id()).unwrap();
        assert_eq!(held.reap(), None);
    }
}
