//! The processes of one start: into how many it splits, how the one that its caller waits for hears of the others, and how
//! that one tells whether the VMM was executed.
//!
//! Each has one thread as long as it may still fork.

use std::fs::File;
use std::io::{Read, Write};
use std::process::ExitCode;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, set_child_subreaper, waitpgid, waitpid};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::args::{ExitCode as Code, Identity};
use crate::dir::Dir;
use crate::error::{During, Error, Result};
use crate::inherited::notice_children;
use crate::vmm::Times;

/// The longest message that is passed on, in bytes.
const MAX_REPORT: u64 = 64 << 10;
/// Begins a line that tells which process is to become the VMM. What is not such a line is a message.
const PID_LINE: &str = "pid ";
/// Of a process's flags in /proc/PID/stat: it was forked and has executed nothing since (`PF_FORKNOEXEC` in the kernel's
/// include/linux/sched.h). An exec takes it away before it closes descriptors.
const FORKED_ONLY: u64 = 0x40;

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

    /// Whether this is the process that the caller waits for.
    pub fn is_callers(&self) -> bool {
        self.pipe.is_none()
    }

    /// Tells something that is no error.
    pub fn note(&mut self, text: &str) {
        self.say(&format!("{}: {text}\n", self.identity.name()));
    }

    /// Tells why this process ends.
    pub fn last_word(mut self, error: &Error) -> ExitCode {
        match error {
            Error::Told(text) => self.say(text),
            error => self.note(&error.to_string()),
        }
        self.identity.exit_code(Code::NoCell).into()
    }

    /// Tells which process is to become the VMM, if somebody waits for it.
    fn announce(&mut self, pid: u32) {
        if self.pipe.is_some() {
            self.say(&format!("{PID_LINE}{pid}\n"));
        }
    }

    fn say(&mut self, text: &str) {
        // If it cannot be said, nobody is listening.
        let _ = match &mut self.pipe {
            Some(pipe) => pipe.write_all(text.as_bytes()),
            None => std::io::stderr().write_all(text.as_bytes()),
        };
    }
}

/// Goes on in a session of its own: a key pressed on the caller's terminal, and that terminal's end, are no business of ours.
///
/// # Errors
/// The process leads a group of its caller's session, and the kernel lets no such process leave.
pub fn start_session() -> Result<()> {
    match rustix::process::setsid() {
        // It is the leader of its own already.
        Err(Errno::PERM) if rustix::process::getsid(None) == Ok(rustix::process::getpid()) => Ok(()),
        Err(Errno::PERM) => Err(Error::Refused(
            "--new-session: this process leads a process group, as a job of a shell does, and cannot leave its session; \
             start it by setsid(1), or give --daemonize"
                .into(),
        )),
        done => done.map(drop).during(|| "--new-session: cannot start a session".into()),
    }
}

/// Goes on as a process in a session of its own, which is not the session's leader and so can never get a terminal. The
/// process that the caller waits for ends when the VMM runs, or returns with what went wrong. `processes` is the host's
/// /proc.
///
/// Standard input and output stay until the exec: see [`crate::vmm::become_vmm`].
///
/// # Errors
/// There may be no further process; or another process than this has failed.
pub fn daemonize(processes: &Dir, voice: &mut Voice, times: &mut Times) -> Result<()> {
    let (hear, speak) = pipe()?;
    adopt()?;
    let child = times.of_child();
    if let Some(first) = fork()? {
        drop(speak);
        return hear_out(hear, first, None, processes);
    }
    *times = child;
    voice.pipe = Some(speak);
    rustix::process::setsid().during(|| "--daemonize: cannot start a session".into())?;
    let child = times.of_child();
    if fork()?.is_some() {
        std::process::exit(Code::Ok as i32);
    }
    *times = child;
    voice.announce(std::process::id());
    Ok(())
}

/// Goes on as process 1 of a new pid namespace. The process outside learns the new one's number, does `before` with it,
/// and ends or returns as in [`daemonize`]; the new one waits until that is done.
///
/// # Errors
/// There may be no further namespace or process; or `before` failed, and the new process has ended.
pub fn enter_pid_namespace(
    processes: &Dir,
    voice: &mut Voice,
    times: &mut Times,
    before: impl FnOnce(u32) -> Result<()>,
) -> Result<()> {
    // SAFETY: unsafe only for UnshareFlags::FILES, which would leave OwnedFds of other threads behind: it is not set.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }
        .during(|| "--new-pid-ns: cannot make a pid namespace".into())?;
    let (mut wait, mut go) = pipe()?;
    let (hear, speak) = pipe()?;
    notice_children();
    let child = times.of_child();
    if let Some(first) = fork()? {
        drop(speak);
        let pid = first.as_raw_nonzero().get().unsigned_abs();
        voice.announce(pid);
        let begun = before(pid)
            .and_then(|()| go.write_all(&[1]).during(|| "--new-pid-ns: the new process has gone".into()));
        if let Err(error) = begun {
            drop(go);
            see_out(first);
            return Err(error);
        }
        if voice.is_callers() {
            return hear_out(hear, first, Some(pid), processes);
        }
        // Whoever the caller waits for hears the new process too.
        std::process::exit(Code::Ok as i32);
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

/// Waits until the other processes, of which we made `first`, have become the VMM or have ended. Returns only if there is
/// no VMM, and none of them.
fn hear_out(pipe: File, first: Pid, pid: Option<u32>, processes: &Dir) -> Result<()> {
    let mut said = Vec::new();
    // What was read before an error is worth telling too.
    let _ = pipe.take(MAX_REPORT).read_to_end(&mut said);
    let said = String::from_utf8_lossy(&said);
    let (announced, message) = heard(&said);
    // The pipe's other end is closed by an exec, and by any end of a process.
    if message.is_empty() && announced.or(pid).is_some_and(|pid| has_executed(processes, pid)) {
        std::process::exit(Code::Ok as i32)
    }
    see_out(first);
    match message {
        "" => Err(Error::Refused(
            "the process that was to become the VMM was killed before it was executed".into(),
        )),
        message => Err(Error::Told(message.into())),
    }
}

/// Waits for the end of a child, and of all others that are in the session it may have begun: what they hold, such as a
/// namespace, is free then. Each of them is on its way out. Children that our caller had before it became us are none of
/// these.
fn see_out(first: Pid) {
    while matches!(waitpid(Some(first), WaitOptions::empty()), Ok(_) | Err(Errno::INTR)) {}
    while matches!(waitpgid(first, WaitOptions::empty()), Ok(_) | Err(Errno::INTR)) {}
}

/// The number that was announced last, and the message after that.
fn heard(said: &str) -> (Option<u32>, &str) {
    let (mut pid, mut rest) = (None, said);
    while let Some((number, after)) = rest.strip_prefix(PID_LINE).and_then(|line| line.split_once('\n')) {
        (pid, rest) = (number.parse().ok(), after);
    }
    (pid, rest)
}

/// Whether a process, a child of ours that may have ended, has executed a program.
fn has_executed(processes: &Dir, pid: u32) -> bool {
    let stat = processes.enter(pid.to_string()).and_then(|process| process.read("stat"));
    stat.is_ok_and(|stat| flags(&stat).is_some_and(|flags| flags & FORKED_ONLY == 0))
}

/// The ninth field of proc_pid_stat(5). The second, in parentheses, may hold anything.
fn flags(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(6)?.parse().ok()
}

/// Becomes the parent of children's children whose parents end. They can then be looked at when they have ended.
fn adopt() -> Result<()> {
    notice_children();
    set_child_subreaper(Some(rustix::process::getpid()))
        .during(|| "--daemonize: cannot adopt processes".into())
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn the_last_announced_process_counts_and_what_follows_is_the_message() {
        assert_eq!(heard(""), (None, ""));
        assert_eq!(heard("pid 7\n"), (Some(7), ""));
        assert_eq!(heard("pid 7\npid 8\njailer: no\nmore"), (Some(8), "jailer: no\nmore"));
        assert_eq!(heard("jailer: no\npid 7\n"), (None, "jailer: no\npid 7\n"));
        // Killed while it spoke.
        assert_eq!(heard("pid 7"), (None, "pid 7"));
    }

    #[test]
    fn flags_are_found_behind_any_name() {
        assert_eq!(flags("7 (a) b) S 1 7 7 0 -1 4194368 9 0"), Some(4_194_368));
        assert_eq!(flags("7 (a) S 1"), None);
        assert_eq!(flags(""), None);
    }

    #[test]
    fn a_process_that_ran_a_program_has_executed_and_one_that_is_none_has_not() {
        let processes = Dir::open(Path::new("/proc")).unwrap();
        assert!(has_executed(&processes, std::process::id()));
        // More than the kernel's largest pid.
        assert!(!has_executed(&processes, 1 << 23));
    }
}
