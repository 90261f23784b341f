//! System calls made by a thread of another process, with that thread's filter, credentials and files: what an attacker
//! could do who has got hold of the thread.
//!
//! By ptrace. The thread is stopped wherever it is, makes the calls one by one, and goes on as if nothing had been. A
//! signal that the kernel sends it for a call that its filter does not allow is seen here and does not reach it. x86_64
//! only; needs the right to trace the process, which root has.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use libc::{c_uint, pid_t, user_regs_struct};

/// Room on the thread's stack for what calls point to: below what a function may use without saying so.
const SCRATCH_BELOW: u64 = 1024;
/// How much of it there is.
pub const SCRATCH_BYTES: usize = 512;

/// The instruction that makes a system call.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// How many signals of others may come while a call is made.
const MAX_STOPS: usize = 64;

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The filter let it through, and the kernel answered: a negative number is an error.
    Returned(i64),
    /// The filter does not allow it.
    Trapped,
}

/// A stopped thread of another process.
pub struct Injector {
    thread: pid_t,
    before: user_regs_struct,
    memory: File,
    /// Where that process has a SYSCALL instruction.
    instruction: u64,
}

impl Injector {
    /// Stops a thread. The calling thread must be the one that makes calls and drops this.
    pub fn stop(pid: u32, thread: u32) -> Injector {
        let thread = thread as pid_t;
        request(libc::PTRACE_SEIZE, thread, 0, 0).expect("ptrace of a thread");
        request(libc::PTRACE_INTERRUPT, thread, 0, 0).expect("a stop");
        wait(thread);
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).expect("memory");
        let instruction = find_instruction(pid, &memory).expect("a SYSCALL instruction");
        Injector { thread, before: registers(thread), memory, instruction }
    }

    /// The address of a copy of these bytes in the process, until the next call of this.
    pub fn put(&self, bytes: &[u8]) -> u64 {
        assert!(bytes.len() <= SCRATCH_BYTES);
        let address = self.before.rsp - SCRATCH_BELOW;
        self.memory.write_all_at(bytes, address).expect("the thread's stack");
        address
    }

    /// Makes the call.
    pub fn call(&self, number: i64, arguments: [u64; 6]) -> Answer {
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let number = number as u64;
        let (rax, rip) = (number, self.instruction);
        // Not in a system call any more: there is nothing that the kernel would make again.
        let orig_rax = u64::MAX;
        let entry = user_regs_struct { rax, orig_rax, rip, rdi, rsi, rdx, r10, r8, r9, ..self.before };
        set_registers(self.thread, &entry);
        let mut trapped = false;
        for _ in 0..MAX_STOPS {
            request(libc::PTRACE_SINGLESTEP, self.thread, 0, 0).expect("a step");
            match wait(self.thread) {
                libc::SIGTRAP => {
                    let now = registers(self.thread);
                    if now.rip != rip {
                        return Answer::Returned(now.rax as i64);
                    }
                    // Not of this step, which has done nothing yet, but of the one that ended in SIGSYS.
                    if trapped {
                        return Answer::Trapped;
                    }
                }
                libc::SIGSYS => {
                    trapped = true;
                    set_registers(self.thread, &entry);
                }
                // Another's signal, such as one that makes a vCPU look up. It is lost to the thread.
                _ => {}
            }
        }
        panic!("signals without end");
    }
}

impl Drop for Injector {
    fn drop(&mut self) {
        set_registers(self.thread, &self.before);
        // It fails when the process has been killed.
        let _ = request(libc::PTRACE_DETACH, self.thread, 0, 0);
    }
}

fn find_instruction(pid: u32, memory: &File) -> Option<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let executable = maps.lines().filter(|line| line.split(' ').nth(1) == Some("r-xp"));
    executable.filter_map(|line| line.split(' ').next()?.split_once('-')).find_map(|(start, end)| {
        let [start, end] = [start, end].map(|hex| u64::from_str_radix(hex, 16).unwrap_or_default());
        let mut text = vec![0; (end - start) as usize];
        memory.read_exact_at(&mut text, start).ok()?;
        let at = text.windows(SYSCALL.len()).position(|bytes| bytes == SYSCALL)?;
        Some(start + at as u64)
    })
}

/// Waits for a stop and gives its signal.
fn wait(thread: pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: `status` is a live integer to write to.
    let waited = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) };
    assert_eq!(waited, thread, "{}", io::Error::last_os_error());
    assert!(libc::WIFSTOPPED(status), "the thread has ended with {status:#x}");
    libc::WSTOPSIG(status)
}

fn registers(thread: pid_t) -> user_regs_struct {
    let mut registers = std::mem::MaybeUninit::<user_regs_struct>::uninit();
    request(libc::PTRACE_GETREGS, thread, 0, registers.as_mut_ptr().expose_provenance()).expect("registers");
    // SAFETY: the request has succeeded, and then the kernel has written all of it.
    unsafe { registers.assume_init() }
}

fn set_registers(thread: pid_t, registers: &user_regs_struct) {
    let address = std::ptr::from_ref(registers).expose_provenance();
    // It fails when the process has been killed, which the next wait says.
    let _ = request(libc::PTRACE_SETREGS, thread, 0, address);
}

fn request(request: c_uint, thread: pid_t, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: of the requests made here, two have an address in `data`: that of a live `user_regs_struct`, which the kernel
    // writes or reads whole. The others touch no memory of this process.
    match unsafe { libc::ptrace(request, thread, address, data) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_thread_makes_calls_and_goes_on_as_if_nothing_had_been() {
        // Until its input is closed, which waiting for it does.
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        while fs::read_to_string(format!("/proc/{pid}/comm")).unwrap() != "cat\n" {
            std::thread::yield_now();
        }
        let injector = Injector::stop(pid, pid);
        assert_eq!(injector.call(libc::SYS_getpid, [0; 6]), Answer::Returned(pid.into()));
        assert_eq!(injector.call(libc::SYS_close, [9999, 0, 0, 0, 0, 0]), Answer::Returned(-9));
        let path = injector.put(b"/\0");
        let flags = libc::O_RDONLY as u64;
        let opened = injector.call(libc::SYS_open, [path, flags, 0, 0, 0, 0]);
        assert!(matches!(opened, Answer::Returned(3..)), "{opened:?}");
        drop(injector);
        assert!(child.wait().unwrap().success());
    }
}
