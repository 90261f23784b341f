//! A command in a guest and the person or program here: its output is ours, our input and signals are its.
//!
//! One thread waits for everything. What is on its way is bounded in both directions: while the guest does not take it, nothing
//! more is read here, and while nobody here takes it, the guest is not heard. Signals and the keys that leave are, always. It
//! starts nothing: it gets a stream on which the agent has said yes.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use agent::protocol::{Exit as Ended, Frame, FromGuest, ProtocolError, ToGuest};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::args::value::DetachKeys;
use crate::keys::{Keys, Typed};
use crate::outlet::Outlet;
use crate::signals::{self, Signals};
use crate::terminal;

/// What is read at a time, of our input and of the stream.
const CHUNK: usize = 32 << 10;
/// What is typed at a terminal for a guest that does not take it, in bytes; the keys that leave are among it.
pub const MAX_TYPED: usize = 1 << 20;
/// A guest that does not take a signal for so long is not going to.
const SIGNAL_PATIENCE: Duration = Duration::from_secs(1);

/// How it came to an end.
#[derive(Debug)]
pub enum Ending {
    /// The command has ended.
    Exit(Ended),
    /// The keys that leave were typed.
    Left,
    /// Nobody reads our output any more.
    Unread,
    /// An output of ours, and why it cannot be written to.
    Unwritten(&'static str, String),
    /// A signal came that the guest does not take, or a second one that is to end it.
    Signalled(i32),
    /// The connection to the guest broke.
    Broken(String),
}

/// The descriptors here.
pub struct Here<'a> {
    /// None for a command that gets no input.
    pub input: Option<BorrowedFd<'a>>,
    pub output: BorrowedFd<'a>,
    pub errors: BorrowedFd<'a>,
    pub signals: &'a Signals,
    /// For a terminal: what leaves it.
    pub keys: Option<&'a DetachKeys>,
}

/// Goes on until an end.
pub fn run(stream: &UnixStream, here: &Here) -> Ending {
    let mut session = Session {
        stream,
        here,
        keys: here.keys.map(Keys::new),
        input: here.input,
        outgoing: Vec::new(),
        received: Vec::new(),
        output: Outlet::of(here.output, "standard output"),
        errors: Outlet::of(here.errors, "standard error"),
        signalled: None,
        is_told_to_end: false,
    };
    if here.input.is_none() {
        session.say(ToGuest::StdinEnd);
    }
    session.run().unwrap_or_else(|ending| ending)
}

struct Session<'a> {
    stream: &'a UnixStream,
    here: &'a Here<'a>,
    keys: Option<Keys<'a>>,

    /// Until its end.
    input: Option<BorrowedFd<'a>>,
    /// What the guest has not taken yet. Input is read when there is nothing, so it is a chunk at most, and signals.
    outgoing: Vec<u8>,
    /// What came of a frame that is not whole, and while an output waits, of others behind it.
    received: Vec<u8>,
    output: Outlet<'a>,
    errors: Outlet<'a>,
    /// A signal that the guest has not taken yet, and since when.
    signalled: Option<(i32, Instant)>,
    /// By a signal, which the command may not have heeded.
    is_told_to_end: bool,
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Signals,
    /// The guest says something, or takes something.
    Guest,
    Input,
    /// An output takes something.
    Output,
}

/// Waits until there is something to do, and says what.
///
/// # Errors
/// Those of poll(2).
pub fn wait(
    wanted: &[(Source, BorrowedFd, PollFlags)],
    limit: Option<Duration>,
) -> rustix::io::Result<Vec<(Source, PollFlags)>> {
    // Of what nothing is wanted, its end would be told again and again.
    let wanted: Vec<_> = wanted.iter().filter(|(_, _, flags)| !flags.is_empty()).collect();
    let mut fds: Vec<_> = wanted.iter().map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    match poll(&mut fds, limit.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error),
    }
    let ready = wanted.iter().map(|(source, ..)| *source).zip(fds.iter().map(PollFd::revents));
    Ok(ready.filter(|(_, events)| !events.is_empty()).collect())
}

/// What to wait for, if it is wanted.
pub fn when(is_wanted: bool, flags: PollFlags) -> PollFlags {
    if is_wanted { flags } else { PollFlags::empty() }
}

impl Session<'_> {
    fn run(&mut self) -> Result<Ending, Ending> {
        self.stream.set_nonblocking(true).map_err(broken)?;
        loop {
            self.hear()?;
            self.send()?;
            let ready = self.wait()?;
            while let Some(signal) = self.here.signals.next() {
                self.signal(signal)?;
            }
            for (source, events) in ready {
                match source {
                    Source::Input => self.read_input()?,
                    Source::Guest if !(events - PollFlags::OUT).is_empty() => self.receive()?,
                    Source::Guest | Source::Signals | Source::Output => {}
                }
            }
        }
    }

    fn wait(&self) -> Result<Vec<(Source, PollFlags)>, Ending> {
        let limit = match self.signalled {
            Some((signal, since)) if since.elapsed() >= SIGNAL_PATIENCE => {
                return Err(Ending::Signalled(signal));
            }
            signalled => signalled.map(|_| SIGNAL_PATIENCE),
        };
        let takes_input = match self.keys {
            Some(_) => self.outgoing.len() < MAX_TYPED,
            None => self.outgoing.is_empty(),
        };
        let guest = when(self.is_shown(), PollFlags::IN) | when(!self.outgoing.is_empty(), PollFlags::OUT);
        let mut wanted = vec![
            (Source::Signals, self.here.signals.as_fd(), PollFlags::IN),
            (Source::Guest, self.stream.as_fd(), guest),
            (Source::Output, self.output.as_fd(), when(!self.output.is_empty(), PollFlags::OUT)),
            (Source::Output, self.errors.as_fd(), when(!self.errors.is_empty(), PollFlags::OUT)),
        ];
        wanted.extend(self.input.map(|input| (Source::Input, input, when(takes_input, PollFlags::IN))));
        wait(&wanted, limit).map_err(broken)
    }

    fn signal(&mut self, signal: i32) -> Result<(), Ending> {
        match signal {
            signals::WINDOW if self.keys.is_some() => self.say(ToGuest::Window(terminal::size())),
            signals::WINDOW => {}
            // The first is the command's to heed; who sends another does not want to wait for that.
            signal if signals::ENDING.contains(&signal) && self.is_told_to_end => {
                return Err(Ending::Signalled(signal));
            }
            signal => {
                self.say(ToGuest::Signal(signal));
                self.signalled.get_or_insert((signal, Instant::now()));
                self.is_told_to_end |= signals::ENDING.contains(&signal);
            }
        }
        Ok(())
    }

    fn say(&mut self, message: ToGuest) {
        self.outgoing.extend(message.frame().encode());
    }

    fn read_input(&mut self) -> Result<(), Ending> {
        let Some(input) = self.input else { return Ok(()) };
        let mut chunk = [0; CHUNK];
        let typed = match rustix::io::read(input, &mut chunk) {
            Ok(count) => chunk.get(..count).unwrap_or_default(),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return Ok(()),
            // A terminal that was hung up.
            Err(_) => &[],
        };
        if typed.is_empty() {
            self.input = None;
            self.say(ToGuest::StdinEnd);
            return Ok(());
        }
        let typed = match &mut self.keys {
            None => Typed::On(typed.into()),
            Some(keys) => keys.typed(typed),
        };
        match typed {
            Typed::On(bytes) if bytes.is_empty() => Ok(()),
            Typed::On(bytes) => {
                self.say(ToGuest::Stdin(bytes));
                Ok(())
            }
            // What was typed before is not worth waiting for.
            Typed::Leave(_) => Err(Ending::Left),
        }
    }

    /// As much of what is to be said as the guest takes now.
    fn send(&mut self) -> Result<(), Ending> {
        while !self.outgoing.is_empty() {
            match (&mut &*self.stream).write(&self.outgoing) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What it has said before it went is still to be heard.
                Err(_) => self.outgoing.clear(),
            }
        }
        self.signalled = None;
        Ok(())
    }

    fn receive(&mut self) -> Result<(), Ending> {
        let mut chunk = [0; CHUNK];
        match (&mut &*self.stream).read(&mut chunk) {
            Ok(0) => Err(broken(ProtocolError::Ended)),
            Ok(count) => {
                self.received.extend_from_slice(chunk.get(..count).unwrap_or_default());
                Ok(())
            }
            Err(error) if [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted].contains(&error.kind()) => {
                Ok(())
            }
            Err(error) => Err(broken(error)),
        }
    }

    /// All that came whole, as long as it is taken here.
    fn hear(&mut self) -> Result<(), Ending> {
        loop {
            self.output.flush()?;
            self.errors.flush()?;
            if !self.is_shown() {
                return Ok(());
            }
            let Some(frame) = Frame::take(&mut self.received).map_err(broken)? else { return Ok(()) };
            match FromGuest::parse(frame).map_err(broken)? {
                FromGuest::Stdout(bytes) => self.output.push(&bytes),
                FromGuest::Stderr(bytes) => self.errors.push(&bytes),
                FromGuest::Exit(exit) => return Err(Ending::Exit(exit)),
            }
        }
    }

    /// All that was heard so far.
    fn is_shown(&self) -> bool {
        self.output.is_empty() && self.errors.is_empty()
    }
}

fn broken(why: impl ToString) -> Ending {
    Ending::Broken(why.to_string())
}

#[cfg(test)]
mod tests;
