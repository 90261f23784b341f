//! The owner's end of the connection to a host's agent: start commands, feed them, take what they say.
//!
//! A thread reads the connection and sorts frames by stream, for as long as the [`Link`] or a [`Running`] command is
//! kept. It never waits for the taker of a command's output: the agent sends no more than [`wire::WINDOW`] bytes ahead.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::wire::{self, Command, Frame, FromAgent, Prepare, Size, ToAgent};

/// Output taken is credited back in steps of this size, so that small reads cost no frame each.
const CREDIT_STEP: usize = wire::WINDOW / 4;

/// A connection to an agent. Clones share it.
#[derive(Clone, Debug)]
pub struct Link {
    shared: Arc<Shared>,
    /// Answers to pings and preparations, which are asked one at a time.
    answers: Arc<Mutex<Receiver<FromAgent>>>,
}

#[derive(Debug)]
struct Shared {
    writer: Mutex<UnixStream>,
    streams: Mutex<Streams>,
    input_credit: Condvar,
}

#[derive(Debug, Default)]
struct Streams {
    open: BTreeMap<u32, OpenStream>,
    last: u32,
    lost: bool,
}

#[derive(Debug)]
struct OpenStream {
    events: Sender<Event>,
    /// Bytes of standard input that the agent will still take.
    input_credit: usize,
}

/// What a running command did.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    /// It ended, with this exit code; 128 and the number when a signal ended it.
    Exit(i32),
    /// The host went away under it.
    Lost,
}

impl Link {
    /// Takes over a connected socket.
    pub fn new(connection: UnixStream) -> io::Result<Self> {
        let reader = connection.try_clone()?;
        let (answer, answers) = channel();
        let shared = Arc::new(Shared {
            writer: Mutex::new(connection),
            streams: Mutex::default(),
            input_credit: Condvar::new(),
        });
        let reading = Arc::clone(&shared);
        std::thread::Builder::new().name("host-link".into()).spawn(move || reading.read(reader, &answer))?;
        Ok(Self { shared, answers: Arc::new(Mutex::new(answers)) })
    }

    /// Waits until the agent answers. Gives the number of processes in the host that belong to no running command.
    pub fn ping(&self, limit: Duration) -> io::Result<u32> {
        let number = u64::from(std::process::id());
        let deadline = Instant::now() + limit;
        let answers = lock(&self.answers);
        self.shared.send(&ToAgent::Ping(number))?;
        loop {
            match answer(&answers, deadline)? {
                FromAgent::Pong(got, strays) if got == number => return Ok(strays),
                // An answer that nobody waited for any more.
                _ => {}
            }
        }
    }

    /// Makes a started host ready for commands.
    pub fn prepare(&self, request: Prepare, limit: Duration) -> io::Result<()> {
        let deadline = Instant::now() + limit;
        let answers = lock(&self.answers);
        self.shared.send(&ToAgent::Prepare(request))?;
        loop {
            match answer(&answers, deadline)? {
                FromAgent::Prepared(error) if error.is_empty() => return Ok(()),
                FromAgent::Prepared(error) => return Err(io::Error::other(error)),
                _ => {}
            }
        }
    }

    /// Ends the connection for all clones. An agent on this machine then kills what it started and ends.
    pub fn close(&self) {
        // It fails only on a connection that is closed already.
        let _ = lock(&self.shared.writer).shutdown(std::net::Shutdown::Both);
    }

    /// Starts a command. That it cannot be started is seen as its exit code: 127 not found, 126 not to be executed.
    pub fn run(&self, command: Command) -> io::Result<Running> {
        let (events, receiver) = channel();
        let number = self.shared.open(events)?;
        let running = Running { shared: Arc::clone(&self.shared), number, events: receiver, taken: 0 };
        self.shared.send(&ToAgent::Run(number, command))?;
        Ok(running)
    }
}

fn answer(answers: &Receiver<FromAgent>, deadline: Instant) -> io::Result<FromAgent> {
    answers.recv_timeout(deadline.saturating_duration_since(Instant::now())).map_err(|error| match error {
        RecvTimeoutError::Timeout => {
            io::Error::new(io::ErrorKind::TimedOut, "the host's agent does not answer")
        }
        RecvTimeoutError::Disconnected => lost(),
    })
}

/// A command in the host. Dropping it neither ends the command nor waits for it.
pub struct Running {
    shared: Arc<Shared>,
    number: u32,
    events: Receiver<Event>,
    /// Output taken and not yet credited.
    taken: usize,
}

impl Running {
    /// What the command did next; nothing if nothing happened until the deadline.
    pub fn next(&mut self, deadline: Option<Instant>) -> Option<Event> {
        let event = match deadline {
            None => self.events.recv().unwrap_or(Event::Lost),
            Some(deadline) => {
                match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                    Ok(event) => event,
                    Err(RecvTimeoutError::Timeout) => return None,
                    Err(RecvTimeoutError::Disconnected) => Event::Lost,
                }
            }
        };
        if let Event::Stdout(bytes) | Event::Stderr(bytes) = &event {
            self.credit(bytes.len());
        }
        Some(event)
    }

    /// Hands all output to `take` until the command ends. Gives the last event, or nothing when it still ran at the
    /// deadline.
    pub fn finish(&mut self, deadline: Option<Instant>, mut take: impl FnMut(&[u8])) -> Option<Event> {
        loop {
            match self.next(deadline) {
                Some(Event::Stdout(bytes) | Event::Stderr(bytes)) => take(&bytes),
                last => return last,
            }
        }
    }

    /// A handle to talk to the command from another thread.
    pub fn input(&self) -> Input {
        Input { shared: Arc::clone(&self.shared), number: self.number }
    }

    fn credit(&mut self, length: usize) {
        self.taken += length;
        if self.taken >= CREDIT_STEP {
            // A lost connection shows as `Event::Lost`.
            let _ = self.shared.send(&ToAgent::Credit(self.number, self.taken as u32));
            self.taken = 0;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The agent goes on sending up to the window, which is then thrown away: its command stops when it is full.
        lock(&self.shared.streams).open.remove(&self.number);
        self.shared.input_credit.notify_all();
    }
}

/// The way in to a running command.
#[derive(Clone)]
pub struct Input {
    shared: Arc<Shared>,
    number: u32,
}

impl Input {
    /// Hands over standard input; waits while the command takes none. An error when the command or host has ended.
    pub fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let length = self.shared.take_input_credit(self.number, bytes.len().min(wire::MAX_PAYLOAD))?;
            let (now, later) = bytes.split_at(length);
            self.shared.send(&ToAgent::Stdin(self.number, now.to_vec()))?;
            bytes = later;
        }
        Ok(())
    }

    /// Ends standard input; on a terminal, as the end-of-file key would.
    pub fn end(&self) -> io::Result<()> {
        self.shared.send(&ToAgent::StdinEnd(self.number))
    }

    /// Sends a signal to the command and all its children that did not leave its session.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        self.shared.send(&ToAgent::Signal(self.number, signal))
    }

    /// Tells the command's terminal its new size.
    pub fn resize(&self, size: Size) -> io::Result<()> {
        self.shared.send(&ToAgent::Resize(self.number, size))
    }
}

impl Shared {
    fn open(&self, events: Sender<Event>) -> io::Result<u32> {
        let mut streams = lock(&self.streams);
        if streams.lost {
            return Err(lost());
        }
        streams.last = streams.last.wrapping_add(1);
        let number = streams.last;
        streams.open.insert(number, OpenStream { events, input_credit: wire::WINDOW });
        Ok(number)
    }

    fn send(&self, message: &ToAgent) -> io::Result<()> {
        let bytes = message.frame()?.encode()?;
        lock(&self.writer).write_all(&bytes).map_err(|_| lost())
    }

    fn take_input_credit(&self, number: u32, wanted: usize) -> io::Result<usize> {
        let mut streams = lock(&self.streams);
        loop {
            let stream = streams.open.get_mut(&number).ok_or(io::ErrorKind::BrokenPipe)?;
            let taken = wanted.min(stream.input_credit);
            if taken > 0 {
                stream.input_credit -= taken;
                return Ok(taken);
            }
            streams = self.input_credit.wait(streams).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The reading thread's life.
    fn read(&self, mut connection: UnixStream, answers: &Sender<FromAgent>) {
        // Whether the host died or sent nonsense, nothing more can come from it.
        while let Ok(Some(message)) =
            Frame::read(&mut connection).and_then(|f| f.map(FromAgent::parse).transpose())
        {
            self.deliver(message, answers);
        }
        let mut streams = lock(&self.streams);
        streams.lost = true;
        streams.open.clear();
        self.input_credit.notify_all();
    }

    fn deliver(&self, message: FromAgent, answers: &Sender<FromAgent>) {
        let mut streams = lock(&self.streams);
        // A stream that nobody listens to any more is no error: its command may still speak.
        let tell = |number, event| {
            if let Some(stream) = streams.open.get(&number) {
                let _ = stream.events.send(event);
            }
        };
        match message {
            FromAgent::Stdout(number, bytes) => tell(number, Event::Stdout(bytes)),
            FromAgent::Stderr(number, bytes) => tell(number, Event::Stderr(bytes)),
            FromAgent::Exit(number, code) => {
                tell(number, Event::Exit(code));
                streams.open.remove(&number);
                self.input_credit.notify_all();
            }
            FromAgent::Credit(number, bytes) => {
                if let Some(stream) = streams.open.get_mut(&number) {
                    stream.input_credit =
                        stream.input_credit.saturating_add(bytes as usize).min(wire::WINDOW);
                }
                self.input_credit.notify_all();
            }
            answer @ (FromAgent::Pong(..) | FromAgent::Prepared(_)) => {
                let _ = answers.send(answer);
            }
        }
    }
}

fn lost() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the host is gone")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
