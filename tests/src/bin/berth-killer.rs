//! Kills a program at one of its system calls, before the kernel does what is asked: `berth-killer PROCESS CALL COMMAND...`
//! traces COMMAND and its children, by ptrace(2), and sends SIGKILL to the PROCESS-th of them (from 0) at its CALL-th
//! call (from 1). So a program can be killed at every place where it changes anything, without knowing of it.
//!
//! A process that executes another program is let go. When no other is left, one line on standard output says for each
//! process how many calls it made, and this ends with the command's exit code, or 128 and the signal that ended it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use libc::{c_int, c_long, pid_t};

const USAGE: &str = "berth-killer PROCESS CALL COMMAND...";

/// System calls are told from other stops by a bit in the signal; children are traced too, and untraced ends are none.
const OPTIONS: c_int = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEEXEC
    | libc::PTRACE_O_EXITKILL;
const SYSTEM_CALL: c_int = libc::SIGTRAP | 0x80;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let target = match arguments.as_slice() {
        [process, call, _, ..] => process.parse().ok().zip(call.parse().ok()),
        _ => None,
    };
    let (Some(target), [_, _, program, words @ ..]) = (target, arguments.as_slice()) else {
        eprintln!("{USAGE}");
        return ExitCode::FAILURE;
    };
    match run(Command::new(program).args(words), target) {
        Ok(code) => code.into(),
        Err(error) => {
            eprintln!("berth-killer: {program}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What there is to know of the traced threads.
#[derive(Default)]
struct Traced {
    /// By thread: which process it is of, and whether it is in a call.
    threads: BTreeMap<pid_t, (usize, bool)>,
    /// Of each process: its number, and how many calls it made.
    processes: Vec<(pid_t, usize)>,
    /// Stopped before their parents have told of them.
    early: BTreeSet<pid_t>,
}

fn run(command: &mut Command, target: (usize, usize)) -> io::Result<u8> {
    // SAFETY: between fork and exec only async-signal-safe calls are allowed: this makes one system call.
    let first = unsafe { command.pre_exec(|| ptrace(libc::PTRACE_TRACEME, 0, 0)) }.spawn()?.id() as pid_t;
    let mut traced = Traced::default();
    traced.threads.insert(first, (0, false));
    traced.processes.push((first, 0));
    let mut code = 1;
    let mut is_begun = false;
    while let Some((thread, status)) = wait()? {
        if !libc::WIFSTOPPED(status) {
            traced.threads.remove(&thread);
            if thread == first {
                code = match libc::WIFEXITED(status) {
                    true => libc::WEXITSTATUS(status),
                    false => 128 + libc::WTERMSIG(status),
                };
            }
            continue;
        }
        let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
        let mut pass_on = 0;
        match (signal, event) {
            // The stop at the first exec comes before there are options.
            (libc::SIGTRAP, 0) if !is_begun => {
                ptrace(libc::PTRACE_SETOPTIONS, thread, OPTIONS.into())?;
                is_begun = true;
            }
            (SYSTEM_CALL, _) => traced.call(thread, target)?,
            (libc::SIGTRAP, libc::PTRACE_EVENT_EXEC) => {
                // It is another program now.
                ptrace(libc::PTRACE_DETACH, thread, 0)?;
                continue;
            }
            (libc::SIGTRAP, libc::PTRACE_EVENT_CLONE) => traced.born(thread, new_one(thread)?, true)?,
            (libc::SIGTRAP, 1..) => traced.born(thread, new_one(thread)?, false)?,
            // Each new one begins so.
            (libc::SIGSTOP, _) if traced.threads.contains_key(&thread) => {}
            (libc::SIGSTOP, _) => {
                traced.early.insert(thread);
                continue;
            }
            (other, _) => pass_on = other,
        }
        go_on(thread, pass_on)?;
    }
    let calls: Vec<_> = traced.processes.iter().map(|(_, calls)| calls.to_string()).collect();
    println!("{}", calls.join(" "));
    Ok(u8::try_from(code).unwrap_or(u8::MAX))
}

impl Traced {
    /// A call begins or ends; at its beginning it may be the one.
    fn call(&mut self, thread: pid_t, target: (usize, usize)) -> io::Result<()> {
        let Some((process, is_in_call)) = self.threads.get_mut(&thread) else { return Ok(()) };
        *is_in_call = !*is_in_call;
        let process_number = *process;
        if !*is_in_call {
            return Ok(());
        }
        let Some((pid, calls)) = self.processes.get_mut(process_number) else { return Ok(()) };
        *calls += 1;
        match (process_number, *calls) == target {
            true => kill(*pid),
            false => Ok(()),
        }
    }

    fn born(&mut self, parent: pid_t, child: pid_t, is_thread: bool) -> io::Result<()> {
        let process = match self.threads.get(&parent) {
            Some((process, _)) if is_thread => *process,
            _ => {
                self.processes.push((child, 0));
                self.processes.len() - 1
            }
        };
        self.threads.insert(child, (process, false));
        if self.early.remove(&child) { go_on(child, 0) } else { Ok(()) }
    }
}

/// Until the next call, or its end.
fn go_on(thread: pid_t, signal: c_int) -> io::Result<()> {
    match ptrace(libc::PTRACE_SYSCALL, thread, signal.into()) {
        // Killed while it was stopped.
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        done => done,
    }
}

/// The next thread of which there is something to tell; none when all are gone.
fn wait() -> io::Result<Option<(pid_t, c_int)>> {
    let mut status = 0;
    loop {
        // SAFETY: `status` is a live integer to write to.
        let thread = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL) };
        match io::Error::last_os_error() {
            _ if thread > 0 => return Ok(Some((thread, status))),
            error if error.raw_os_error() == Some(libc::ECHILD) => return Ok(None),
            error if error.raw_os_error() == Some(libc::EINTR) => {}
            error => return Err(error),
        }
    }
}

/// The number of the process or thread that this one has just made.
fn new_one(parent: pid_t) -> io::Result<pid_t> {
    let mut number: libc::c_ulong = 0;
    ptrace(libc::PTRACE_GETEVENTMSG, parent, (&raw mut number) as c_long)?;
    Ok(number as pid_t)
}

/// A request without an address. What `data` must be depends on the request: a number for those that resume a thread or
/// set options, and the address of a live unsigned long for the one that asks.
fn ptrace(request: libc::c_uint, thread: pid_t, data: c_long) -> io::Result<()> {
    // SAFETY: of the requests made here only PTRACE_GETEVENTMSG uses memory of this process: `new_one` gives it the
    // address of its own `number`, which lives through the call.
    match unsafe { libc::ptrace(request, thread, std::ptr::null_mut::<libc::c_void>(), data) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn kill(process: pid_t) -> io::Result<()> {
    // SAFETY: kill takes two numbers and touches no memory.
    match unsafe { libc::kill(process, libc::SIGKILL) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
