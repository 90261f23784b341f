//! A command in a guest and the person or program here: its output is ours, our input and signals are its.
//!
//! One thread waits for everything. What is on its way to the guest is bounded: while the guest does not take it, nothing more
//! is read here. It starts nothing: it gets a stream on which the agent has said yes.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use agent::protocol::{Exit as Ended, Frame, FromGuest, ProtocolError, ToGuest};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::args::value::DetachKeys;
use crate::keys::{Keys, Typed};
use crate::signals::{self, Signals};
use crate::terminal;

/// What is read at a time, of our input and of the stream.
const CHUNK: usize = 32 << 10;
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
    /// A signal came that the guest does not take.
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
        signalled: None,
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
    /// What came of a frame that is not whole.
    received: Vec<u8>,
    /// A signal that the guest has not taken yet, and since when.
    signalled: Option<(i32, Instant)>,
}

/// Where there is something to read.
struct Ready {
    stream: bool,
    input: bool,
}

impl Session<'_> {
    fn run(&mut self) -> Result<Ending, Ending> {
        self.stream.set_nonblocking(true).map_err(broken)?;
        loop {
            self.hear()?;
            self.send()?;
            let Ready { stream, input } = self.wait()?;
            while let Some(signal) = self.here.signals.next() {
                self.signal(signal);
            }
            if input {
                self.read_input()?;
            }
            if stream {
                self.receive()?;
            }
        }
    }

    fn wait(&self) -> Result<Ready, Ending> {
        let mut wanted = PollFlags::IN;
        wanted.set(PollFlags::OUT, !self.outgoing.is_empty());
        let mut fds = vec![PollFd::new(self.stream, wanted), PollFd::new(self.here.signals, PollFlags::IN)];
        if let Some(input) = self.input.filter(|_| self.outgoing.is_empty()) {
            fds.push(PollFd::from_borrowed_fd(input, PollFlags::IN));
        }
        let limit = match self.signalled {
            Some((signal, since)) if since.elapsed() >= SIGNAL_PATIENCE => {
                return Err(Ending::Signalled(signal));
            }
            Some(_) => Timespec::try_from(SIGNAL_PATIENCE).ok(),
            None => None,
        };
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(broken(error)),
        }
        let is_set = |index: usize| fds.get(index).map_or(PollFlags::empty(), PollFd::revents);
        Ok(Ready { stream: !(is_set(0) - PollFlags::OUT).is_empty(), input: !is_set(2).is_empty() })
    }

    fn signal(&mut self, signal: i32) {
        match signal {
            signals::WINDOW if self.keys.is_some() => self.say(ToGuest::Window(terminal::size())),
            signals::WINDOW => {}
            signal => {
                self.say(ToGuest::Signal(signal));
                self.signalled.get_or_insert((signal, Instant::now()));
            }
        }
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

    /// All that came whole.
    fn hear(&mut self) -> Result<(), Ending> {
        while let Some(frame) = Frame::take(&mut self.received).map_err(broken)? {
            match FromGuest::parse(frame).map_err(broken)? {
                FromGuest::Stdout(bytes) => write(self.here.output, &bytes)?,
                FromGuest::Stderr(bytes) => write(self.here.errors, &bytes)?,
                FromGuest::Exit(exit) => return Err(Ending::Exit(exit)),
            }
        }
        Ok(())
    }
}

fn broken(why: impl ToString) -> Ending {
    Ending::Broken(why.to_string())
}

/// Writes all of it, however long that takes: who does not read makes the guest wait.
///
/// # Errors
/// [`Ending::Unread`], whatever the reason.
pub fn write(to: BorrowedFd, mut bytes: &[u8]) -> Result<(), Ending> {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            // Somebody who has it too wanted it so.
            Err(rustix::io::Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::from_borrowed_fd(to.as_fd(), PollFlags::OUT)], None);
            }
            Err(_) => return Err(Ending::Unread),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
