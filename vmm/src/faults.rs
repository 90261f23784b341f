//! What ends the process for a fault: a fatal signal, a forbidden system call, a panic. Each is said on standard error, in
//! the log's file where there is one, and to whoever wants the exit status, and has the exit code that callers know
//! (docs/vmm.md).
//!
//! Handlers run in whatever the thread was doing, under its system call filter: they take no lock, allocate nothing, write,
//! give the terminal back, and exit. Where a thread has signals blocked, as the C library has for moments when it sends one,
//! a forbidden system call ends the process without a word, by SIGSYS.

use std::cell::Cell;
use std::io;
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicI32, Ordering};

use vmm_sys_util::signal::register_signal_handler;

use crate::args::ExitCode;
use crate::exit_status;
use crate::sandbox::seccomp::syscall_name;
use crate::terminal;

/// The longest message, in bytes; what is longer is cut.
const MAX_MESSAGE: usize = 1024;

/// The longest name of a thread that is told, in bytes; the kernel keeps as many.
const MAX_NAME: usize = 15;

/// A signal that ends the process at once, its exit code, and what is said of it.
const FATAL: [(libc::c_int, ExitCode, &str); 7] = [
    (libc::SIGSYS, ExitCode::BadSyscall, "SIGSYS"),
    (libc::SIGBUS, ExitCode::Sigbus, "SIGBUS: a file was cut short under its mapping, or huge pages ran out"),
    (libc::SIGSEGV, ExitCode::Sigsegv, "SIGSEGV"),
    (libc::SIGXCPU, ExitCode::Sigxcpu, "SIGXCPU: the limit on CPU time was reached"),
    (libc::SIGHUP, ExitCode::Sighup, "SIGHUP: the terminal is gone"),
    (libc::SIGILL, ExitCode::Sigill, "SIGILL"),
    (libc::SIGABRT, ExitCode::Unexpected, "SIGABRT: no memory is left, or the heap is broken"),
];

/// The descriptor of the log's file; -1 without one.
static LOG: AtomicI32 = AtomicI32::new(-1);

thread_local! {
    /// Has nothing to make and nothing to drop, so that a handler may look at it at any moment.
    static NAME: Cell<[u8; MAX_NAME]> = const { Cell::new([0; MAX_NAME]) };
}

/// Signals of an error that one write reports too: a reader that hangs up, a file that may not grow. A guest would otherwise
/// end its VMM by saying more than its log or its console may hold.
const IGNORED: [libc::c_int; 2] = [libc::SIGPIPE, libc::SIGXFSZ];

/// Makes every signal of [`FATAL`] and every panic end the process with its code. Once, before threads start.
pub fn install() -> io::Result<()> {
    for (signal, _, _) in FATAL {
        register_signal_handler(signal, fatal)?;
    }
    for signal in IGNORED {
        // SAFETY: SIG_IGN is a disposition that calls nothing of this process.
        if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    std::panic::set_hook(Box::new(panicked));
    Ok(())
}

/// What the calling thread is called in messages.
pub fn name_thread(name: &str) {
    let mut kept = [0; MAX_NAME];
    kept.iter_mut().zip(name.bytes()).for_each(|(place, byte)| *place = byte);
    NAME.set(kept);
}

/// Where messages go beside standard error. The descriptor must stay open until this is called again.
pub fn tell_also(log: Option<libc::c_int>) {
    LOG.store(log.unwrap_or(-1), Ordering::Relaxed);
}

/// The beginning of `siginfo_t` when a filter has trapped a system call (`_sigsys`).
#[repr(C)]
struct Trapped {
    signal: libc::c_int,
    error: libc::c_int,
    code: libc::c_int,
    address: *const libc::c_void,
    syscall: libc::c_int,
    architecture: libc::c_uint,
}

/// `si_code` of a signal that a filter has sent.
const SYS_SECCOMP: libc::c_int = 1;

extern "C" fn fatal(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let known = FATAL.iter().find(|(known, _, _)| *known == signal);
    let (code, text) =
        known.map_or((ExitCode::Unexpected, "an unknown signal"), |(_, code, text)| (*code, *text));
    let mut message = Message::default();
    message.push("berth-vmm ended by ");
    message.push(text);
    // SAFETY: the kernel passes a whole siginfo_t, which is longer than `Trapped` and aligned as it; any bytes are valid.
    let trapped = unsafe { &*info.cast::<Trapped>() };
    if signal == libc::SIGSYS && trapped.code == SYS_SECCOMP {
        let number = trapped.syscall as u32;
        message.push(": system call ");
        message.push_number(number);
        message.push(" (");
        message.push(syscall_name(number).unwrap_or("unknown"));
        message.push(") is not allowed");
    }
    message.push(", in thread ");
    message.push_thread();
    message.end(code)
}

/// Rust's own hook would look for a backtrace in files that no filter lets it open.
fn panicked(panic: &PanicHookInfo) {
    let mut message = Message::default();
    message.push("berth-vmm: a fault of this program in thread ");
    message.push_thread();
    message.push(": ");
    // Its Display goes over two lines, with nothing of a client's or a guest's in them but what the text quotes.
    let _ = std::fmt::write(&mut message, format_args!("{panic}"));
    message.end(ExitCode::Unexpected)
}

/// One line, in a buffer of its own.
struct Message {
    bytes: [u8; MAX_MESSAGE],
    length: usize,
}

impl Default for Message {
    fn default() -> Message {
        Message { bytes: [0; MAX_MESSAGE], length: 0 }
    }
}

impl Message {
    fn push(&mut self, text: &str) {
        for byte in text.bytes() {
            self.push_byte(byte);
        }
    }

    /// A line stays one line, and room for its end is kept.
    fn push_byte(&mut self, byte: u8) {
        if self.length + 1 < MAX_MESSAGE
            && let Some(place) = self.bytes.get_mut(self.length)
        {
            *place = if byte.is_ascii_control() { b' ' } else { byte };
            self.length += 1;
        }
    }

    fn push_number(&mut self, number: u32) {
        let mut divisor = 1_000_000_000;
        while divisor > 1 && number / divisor == 0 {
            divisor /= 10;
        }
        while divisor > 0 {
            self.push_byte(b'0' + (number / divisor % 10) as u8);
            divisor /= 10;
        }
    }

    fn push_thread(&mut self) {
        for byte in NAME.get().into_iter().take_while(|byte| *byte != 0) {
            self.push_byte(byte);
        }
    }

    /// Without a character that was cut in the middle.
    fn text(&self) -> &str {
        let bytes = self.bytes.get(..self.length).unwrap_or_default();
        bytes.utf8_chunks().next().map_or("", |chunk| chunk.valid())
    }

    /// Says it and ends the process.
    fn end(mut self, code: ExitCode) -> ! {
        exit_status::tell(code, self.text());
        if let Some(place) = self.bytes.get_mut(self.length) {
            *place = b'\n';
        }
        let line = self.bytes.get(..=self.length).unwrap_or(&self.bytes);
        for fd in [libc::STDERR_FILENO, LOG.load(Ordering::Relaxed)] {
            write_now(fd, line);
        }
        terminal::restore();
        // SAFETY: _exit(2) is async-signal-safe and does not return.
        unsafe { libc::_exit(code as libc::c_int) }
    }
}

/// Says on standard error why the process ends, or what is unsafe about it. Standard error may be a pipe that nobody reads
/// any more, which must not keep the process from its end; what is longer than a pipe takes at once is cut.
pub fn say(text: &str) {
    let mut line = format!("berth-vmm: {text}\n").into_bytes();
    line.truncate(libc::PIPE_BUF);
    write_now(libc::STDERR_FILENO, &line);
}

/// Writes bytes if they are taken at once. In a signal handler too; -1 is nobody.
pub fn write_now(fd: libc::c_int, bytes: &[u8]) {
    if takes_now(fd) {
        // SAFETY: write(2) is async-signal-safe; pointer and length are those of one live slice.
        unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
    }
}

/// Whether what is said now is taken at once: who does not read must not keep the process from its end.
fn takes_now(fd: libc::c_int) -> bool {
    let mut wanted = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
    // SAFETY: poll(2) is async-signal-safe; the pointer is to one live entry, as the count says, and it does not wait.
    let ready = unsafe { libc::poll(&raw mut wanted, 1, 0) };
    ready == 1 && wanted.revents & libc::POLLOUT != 0
}

impl std::fmt::Write for Message {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.push(text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;

    use super::*;

    fn text(message: &Message) -> &str {
        std::str::from_utf8(&message.bytes[..message.length]).unwrap()
    }

    #[test]
    fn nothing_is_said_to_who_does_not_read() {
        let (_reader, mut writer) = std::io::pipe().unwrap();
        assert!(takes_now(writer.as_raw_fd()));
        // A pipe of 64 KiB.
        writer.write_all(&[0; 16 * 4096]).unwrap();
        assert!(!takes_now(writer.as_raw_fd()) && !takes_now(-1));
    }

    #[test]
    fn numbers_are_written_as_they_are() {
        for number in [0, 7, 10, 202, 1_000_000_000, u32::MAX] {
            let mut message = Message::default();
            message.push_number(number);
            assert_eq!(text(&message), number.to_string());
        }
    }

    #[test]
    fn a_message_is_one_line_of_bounded_length() {
        let mut message = Message::default();
        message.push("a\nb\r");
        assert_eq!(text(&message), "a b ");
        message.push(&"x".repeat(2 * MAX_MESSAGE));
        assert_eq!(message.length, MAX_MESSAGE - 1);
        let mut message = Message::default();
        message.push("x");
        message.push(&"é".repeat(MAX_MESSAGE));
        assert_eq!(message.text(), format!("x{}", "é".repeat((MAX_MESSAGE - 2) / 2)));
    }

    #[test]
    fn a_thread_is_told_by_the_name_it_was_given() {
        std::thread::spawn(|| {
            for (name, told) in
                [("berth-vcpu 31", "berth-vcpu 31"), ("", ""), ("a name of many bytes", "a name of many ")]
            {
                name_thread(name);
                let mut message = Message::default();
                message.push_thread();
                assert_eq!(text(&message), told);
            }
        })
        .join()
        .unwrap();
    }
}
