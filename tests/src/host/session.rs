//! One command in a host of its own, connected to this process's standard input, output and error.

use std::io::{self, Read as _, Write as _};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::error::{Doing, Error, Result};
use super::link::{Event, Input, Running};
use super::terminal::{self, RawMode};
use super::{Config, Host, process, rundir};

/// Exit code of a command that was still running at its time limit, as timeout(1) has it.
pub const TIMED_OUT: i32 = 124;

/// Bytes of standard input taken at a time.
const CHUNK: usize = 32 << 10;

/// A command and how to run it.
#[derive(Clone, Debug)]
pub struct Session {
    pub argv: Vec<String>,
    /// Added to the variables that every command in a host has.
    pub env: Vec<(String, String)>,
    /// On a terminal of its own, with this process's terminal in raw mode.
    pub on_terminal: bool,
    /// Counted from the command's start, not the host's.
    pub limit: Option<Duration>,
    /// Says how the host came to be and how long everything took.
    pub verbose: bool,
}

enum Happening {
    Started(Result<Host>),
    Ended(Result<i32>),
    Signal(i32),
}

/// Starts a host, runs the command in it and gives its exit code; 128 and the signal's number when one of
/// [`process::ENDING`] came. Call [`process::hold_signals`] before.
pub fn run(config: Config, session: &Session) -> Result<i32> {
    let (tell, happenings) = channel();
    let on_signal = tell.clone();
    thread("signals", move || while on_signal.send(Happening::Signal(process::next_signal())).is_ok() {})?;
    let began = Instant::now();
    let host = match start(config.clone(), &tell, &happenings)? {
        Ok(host) => host,
        Err(signal) => {
            // The start goes on in its thread and would leave its directory. Its processes end with this one.
            rundir::remove_own(&config.run_parent());
            return Ok(128 + signal);
        }
    };
    let started = Instant::now();
    let code = converse(&host, session, tell, &happenings);
    if session.verbose {
        let (start, command) = (started - began, started.elapsed());
        eprintln!("berth-host: {}: start {start:.2?}, command {command:.2?}", host.describe());
    }
    code
}

/// Starts the host in a thread that then lives on, as the host wants it. The number of a signal when one came first.
fn start(
    config: Config,
    tell: &Sender<Happening>,
    happenings: &Receiver<Happening>,
) -> Result<std::result::Result<Host, i32>> {
    let tell = tell.clone();
    thread("host", move || {
        let _ = tell.send(Happening::Started(Host::start(&config)));
        loop {
            std::thread::park();
        }
    })?;
    loop {
        match happenings.recv() {
            Ok(Happening::Started(host)) => return host.map(Ok),
            Ok(Happening::Signal(signal)) if signal != process::RESIZED => return Ok(Err(signal)),
            Ok(_) => {}
            Err(_) => return Err(Error("the host's thread ended".into())),
        }
    }
}

/// Runs the command while passing on input, output, window sizes and the end.
fn converse(
    host: &Host,
    session: &Session,
    tell: Sender<Happening>,
    happenings: &Receiver<Happening>,
) -> Result<i32> {
    let size = session.on_terminal.then(terminal::size);
    let running = host.run(session.argv.clone(), session.env.clone(), size)?;
    let _raw = if session.on_terminal { RawMode::enter() } else { None };
    let input = running.input();
    let resized = input.clone();
    thread("stdin", move || pass_input(&input))?;
    thread("stdout", move || drop(tell.send(Happening::Ended(pass_output(running)))))?;

    let deadline = session.limit.map(|limit| Instant::now() + limit);
    loop {
        match next(happenings, deadline) {
            Ok(Happening::Ended(code)) => return code,
            Ok(Happening::Signal(process::RESIZED)) => {
                if session.on_terminal {
                    // A host that is lost shows as the end of the output.
                    let _ = resized.resize(terminal::size());
                }
            }
            Ok(Happening::Signal(signal)) => return Ok(128 + signal),
            Ok(Happening::Started(_)) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(Error("the command's threads ended".into())),
            Err(RecvTimeoutError::Timeout) => {
                eprintln!("berth-host: the time limit of {:?} is over", session.limit.unwrap_or_default());
                return Ok(TIMED_OUT);
            }
        }
    }
}

fn next(
    happenings: &Receiver<Happening>,
    deadline: Option<Instant>,
) -> std::result::Result<Happening, RecvTimeoutError> {
    match deadline {
        Some(deadline) => happenings.recv_timeout(deadline.saturating_duration_since(Instant::now())),
        None => happenings.recv().map_err(|_| RecvTimeoutError::Disconnected),
    }
}

fn pass_input(input: &Input) {
    let mut bytes = [0; CHUNK];
    loop {
        match io::stdin().read(&mut bytes) {
            Ok(0) => break,
            Ok(length) if input.write(&bytes[..length]).is_ok() => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Either the command has ended or there is no input to pass on.
            Ok(_) | Err(_) => break,
        }
    }
    let _ = input.end();
}

fn pass_output(mut running: Running) -> Result<i32> {
    let writing = || "cannot write the command's output";
    loop {
        match running.next(None) {
            Some(Event::Stdout(bytes)) => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(&bytes).and_then(|()| stdout.flush()).doing(writing)?;
            }
            Some(Event::Stderr(bytes)) => io::stderr().write_all(&bytes).doing(writing)?,
            Some(Event::Exit(code)) => return Ok(code),
            Some(Event::Lost) | None => return Err(Error("the host went away under the command".into())),
        }
    }
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(body).doing(|| "cannot start a thread").map(drop)
}
