//! Signals as a descriptor: they are waited for beside everything else, so that each ends or changes what is being done in
//! an orderly way, and a terminal is given back.

use std::io::{self, PipeReader};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};

pub const WINDOW: i32 = libc::SIGWINCH;

/// What is sent to have something end, and may be heeded.
pub const ENDING: [i32; 3] = [libc::SIGHUP, libc::SIGINT, libc::SIGTERM];

/// What a command in a guest is told of, and what ends a wait.
const TAKEN: [i32; 7] =
    [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2, libc::SIGWINCH];

/// Signals that come from now on; they do nothing else any more to this thread and those that it starts.
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Before threads are started.
    ///
    /// # Errors
    /// Those of signalfd(2).
    pub fn take() -> io::Result<Signals> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset makes a set of what it is given room for, which sigaddset and pthread_sigmask then read; the
        // signals are numbers that there are, and the old mask is not asked for.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in TAKEN {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            let set = set.assume_init();
            match libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) {
                0 => set,
                error => return Err(io::Error::from_raw_os_error(error)),
            }
        };
        // SAFETY: `set` is an initialised set that lives through the call; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made, is valid (checked above) and owned by nobody else.
        Ok(Signals { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// The next signal that came, if any.
    pub fn next(&self) -> Option<i32> {
        // struct signalfd_siginfo, which begins with the number.
        let mut info = [0; 128];
        match rustix::io::read(&self.fd, &mut info) {
            Ok(count) if count == info.len() => {
                let [a, b, c, d, ..] = info;
                i32::try_from(u32::from_ne_bytes([a, b, c, d])).ok()
            }
            _ => None,
        }
    }

    /// Does something that waits, in a thread of its own. A signal that asks us to end ends the wait, and the thread is
    /// left to itself.
    ///
    /// # Errors
    /// The signal.
    pub fn during<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, i32> {
        Work::begin(work).wait(self).map_err(|(signal, _)| signal)
    }

    /// A signal, or none when the pipe has ended.
    fn wait(&self, end: &PipeReader) -> Option<i32> {
        loop {
            let mut fds = [PollFd::new(end, PollFlags::IN), PollFd::new(&self.fd, PollFlags::IN)];
            let waited = poll(&mut fds, None);
            if let Some(signal) = self.next() {
                return Some(signal);
            }
            let has_ended = !fds.first().is_none_or(|fd| fd.revents().is_empty());
            if has_ended || waited.is_err_and(|error| error != rustix::io::Errno::INTR) {
                return None;
            }
        }
    }
}

/// Something that is being done in a thread of its own.
pub struct Work<T> {
    /// Ends with the thread, which has the other end.
    end: PipeReader,
    thread: JoinHandle<T>,
}

/// Work that goes on, or has been done: without a pipe there is no descriptor left for the work either, and it says so.
pub enum Begun<T> {
    Going(Work<T>),
    Done(T),
}

impl<T: Send + 'static> Work<T> {
    /// After [`Signals::take`], so that no signal goes to the thread.
    pub fn begin(work: impl FnOnce() -> T + Send + 'static) -> Begun<T> {
        let Ok((end, thread_end)) = io::pipe() else { return Begun::Done(work()) };
        let work = move || {
            let result = work();
            drop(thread_end);
            result
        };
        Begun::Going(Work { end, thread: thread::spawn(work) })
    }
}

impl<T> Begun<T> {
    /// Waits for it.
    ///
    /// # Errors
    /// A signal that asks us to end, and the work, which goes on and may be waited for again.
    pub fn wait(self, signals: &Signals) -> Result<T, (i32, Begun<T>)> {
        let work = match self {
            Begun::Done(result) => return Ok(result),
            Begun::Going(work) => work,
        };
        loop {
            match signals.wait(&work.end) {
                Some(WINDOW) => {}
                Some(signal) => return Err((signal, Begun::Going(work))),
                None => break,
            }
        }
        match work.thread.join() {
            Ok(result) => Ok(result),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
