//! A command of the host's in the guest: started as a login would, heard and fed until its end.
//!
//! One thread waits for everything. What is kept on its way is bounded in both directions: a command that does not read makes
//! the host wait, and a host that does not read makes the command wait. A host that goes away ends the command, and what it
//! has started, but for what has left its session as daemons do.
//!
//! It knows no names of a directory service and opens no session of a login manager's.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use agent::protocol::{Exec, Exit, Frame, FromGuest, Size, ToGuest};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::process::{Gid, Pid, PidfdFlags, Signal, Uid};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use crate::kernel::{self, Kernel};
use crate::serve::Refusal;
use crate::users::{self, User};

/// Where commands are looked for.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Bytes on their way to a command, beyond which the host has to wait. One frame more may come on top.
const MAX_INPUT: usize = 64 << 10;

/// How often a host is asked for a sign of life while it is made to wait: the end of what it says is behind what it has said,
/// and so not heard.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// Bytes read from a command at a time; while some are on their way to the host, no more are read.
const CHUNK: usize = 32 << 10;

/// A command that ended may leave children that hold its output open. It is over when they were silent so long.
const LINGER: Duration = Duration::from_millis(300);

/// Between the hang-up and the end by force of a command whose host has gone away.
const GRACE: Duration = Duration::from_secs(2);

/// How often is looked meanwhile whether something of it is left.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// The shell's codes for what is not found and what cannot be executed.
const NOT_FOUND: i32 = 127;
const NOT_EXECUTABLE: i32 = 126;

/// The end of input as a terminal takes it: Ctrl-D. In a line it only sends on what there is of it.
const END_OF_INPUT: u8 = 4;

/// What ends a line on a terminal as it is at first; and its Ctrl-D.
const LINE_ENDS: [u8; 3] = [b'\n', b'\r', END_OF_INPUT];

/// A command that runs, or could not be started.
pub enum Running {
    Command(Box<Started>),
    /// Why not, and the code that a shell would give.
    Failed(String, i32),
}

pub struct Started {
    child: Child,
    pid: Pid,
    /// Readable when the command has ended.
    pidfd: OwnedFd,
    is_terminal: bool,
    stdin: Option<File>,
    stdout: Option<File>,
    stderr: Option<File>,
    /// What the command has not taken yet, and that nothing comes behind it.
    input: Vec<u8>,
    input_ended: bool,
    /// What was put in has begun a line that it has not ended.
    in_line: bool,
    /// What the host has sent of a frame that is not whole.
    received: Vec<u8>,
    /// What the host has not taken yet.
    output: Vec<u8>,
    exit: Option<Exit>,
    last_output: Instant,
    /// The host does not want to hear what the command has left behind.
    is_hurried: bool,
}

/// What a wait was for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Host,
    Stdin,
    Stdout,
    Stderr,
    End,
}

impl Running {
    /// Starts a command in this thread's root. Refused is what cannot be meant.
    pub fn start(command: &Exec) -> Result<Running, Refusal> {
        let Some((program, arguments)) = command.argv.split_first() else {
            return Err("argv is empty: name a program".into());
        };
        let user = users::find(command.user.as_deref().unwrap_or("root"))?;
        let mut process = Command::new(program);
        process.args(arguments).env_clear().envs(environment(command, &user));
        process.current_dir(directory(command, &user)?);
        let main = match command.terminal {
            Some(size) => Some(terminal(&mut process, size, &user)?),
            None => {
                process.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
                None
            }
        };
        let started = as_user(&mut process, &user, main.is_some()).spawn();
        // It holds the command's end of the terminal.
        drop(process);
        match started {
            Ok(child) => {
                let started = Started::new(child, main).map_err(|error| format!("{program}: {error}"))?;
                Ok(Running::Command(Box::new(started)))
            }
            Err(error) => {
                let code = if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE };
                let why = if code == NOT_FOUND { "not found".into() } else { error.to_string() };
                Ok(Running::Failed(format!("berth: {program}: {why}\n"), code))
            }
        }
    }

    /// Serves its streams until it has ended or the host has gone away.
    pub fn serve(self, kernel: Kernel, mut stream: &UnixStream) -> io::Result<()> {
        match self {
            Running::Command(mut started) => {
                stream.set_nonblocking(true)?;
                let served = started.serve(stream);
                started.end(kernel);
                served
            }
            Running::Failed(why, code) => {
                let messages = [FromGuest::Stderr(why.into_bytes()), FromGuest::Exit(Exit::Code(code))];
                messages.into_iter().try_for_each(|message| stream.write_all(&message.frame().encode()))
            }
        }
    }
}

fn environment(command: &Exec, user: &User) -> Vec<(String, String)> {
    let term = if command.terminal.is_some() { "xterm-256color" } else { "dumb" };
    let usual = [
        ("HOME", user.home.as_str()),
        ("LOGNAME", &user.name),
        ("PATH", PATH),
        ("SHELL", &user.shell),
        ("TERM", term),
        ("USER", &user.name),
    ];
    let usual = usual.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
    // Of two of a name the later counts.
    usual.chain(command.environment.iter().map(|(name, value)| (name.clone(), value.clone()))).collect()
}

fn directory<'a>(command: &'a Exec, user: &'a User) -> Result<&'a Path, Refusal> {
    match command.directory.as_deref().map(Path::new) {
        Some(path) if path.is_dir() => Ok(path),
        Some(path) => Err(format!("{} is not a directory of the guest", path.display())),
        None if Path::new(&user.home).is_dir() => Ok(Path::new(&user.home)),
        None => Ok(Path::new("/")),
    }
}

/// Gives the command a new terminal and keeps its other end.
fn terminal(process: &mut Command, size: Size, user: &User) -> Result<File, Refusal> {
    let open = || {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let main = rustix::pty::openpt(flags)?;
        rustix::pty::unlockpt(&main)?;
        // By its other end and not by its name, which another root may not have.
        let terminal = rustix::pty::ioctl_tiocgptpeer(&main, flags)?;
        rustix::termios::tcsetwinsize(&terminal, winsize(size))?;
        rustix::fs::fchown(&terminal, Some(Uid::from_raw(user.uid)), None)?;
        Ok::<_, io::Error>((File::from(main), File::from(terminal)))
    };
    let failed = |error| format!("no terminal, for which the guest needs /dev/ptmx and /dev/pts: {error}");
    let (main, terminal) = open().map_err(failed)?;
    process.stdin(terminal.try_clone().map_err(failed)?).stdout(terminal.try_clone().map_err(failed)?);
    process.stderr(terminal);
    Ok(main)
}

/// Lets a process start as the leader of a session of its own, which its terminal controls if it has one, and as this user.
fn as_user<'a>(process: &'a mut Command, user: &User, has_terminal: bool) -> &'a mut Command {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let groups: Vec<_> = user.groups.iter().copied().map(Gid::from_raw).collect();
    // The agent is; who tests it may be somebody else, and stays that.
    let is_root = rustix::process::geteuid().is_root();
    let enter = move || {
        rustix::process::setsid()?;
        if has_terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        rustix::process::umask(Mode::WGRP | Mode::WOTH);
        if is_root {
            // The user last, who may do none of this.
            rustix::thread::set_thread_groups(&groups)?;
            rustix::thread::set_thread_res_gid(gid, gid, gid)?;
            rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed: `enter` makes bare system calls, and neither
    // allocates nor locks. The process has this one thread then, so that its identity is the process's.
    unsafe { process.pre_exec(enter) }
}

pub fn winsize(size: Size) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// Our ends of a command's standard streams, none of which makes us wait.
fn streams(child: &mut Child, main: Option<File>) -> io::Result<[Option<File>; 3]> {
    let file = |pipe: OwnedFd| File::from(pipe);
    let (stdin, stdout) = match main {
        Some(main) => (Some(main.try_clone()?), Some(main)),
        None => (
            child.stdin.take().map(OwnedFd::from).map(file),
            child.stdout.take().map(OwnedFd::from).map(file),
        ),
    };
    let streams = [stdin, stdout, child.stderr.take().map(OwnedFd::from).map(file)];
    for pipe in streams.iter().flatten() {
        rustix::io::ioctl_fionbio(pipe, true)?;
    }
    Ok(streams)
}

impl Started {
    /// One that cannot be watched does not run either.
    fn new(mut child: Child, main: Option<File>) -> io::Result<Started> {
        let pid = Pid::from_child(&child);
        let is_terminal = main.is_some();
        let watched = rustix::process::pidfd_open(pid, PidfdFlags::empty())
            .map_err(io::Error::from)
            .and_then(|pidfd| Ok((pidfd, streams(&mut child, main)?)));
        let (pidfd, [stdin, stdout, stderr]) = watched.inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        Ok(Started {
            child,
            pid,
            pidfd,
            is_terminal,
            stdin,
            stdout,
            stderr,
            input: Vec::new(),
            input_ended: false,
            in_line: false,
            received: Vec::new(),
            output: Vec::new(),
            exit: None,
            last_output: Instant::now(),
            is_hurried: false,
        })
    }

    /// Returns when all was said, or with an error when the host has gone away.
    fn serve(&mut self, stream: &UnixStream) -> io::Result<()> {
        let mut said_all = false;
        loop {
            if self.output.is_empty() {
                if said_all {
                    return Ok(());
                }
                if let Some(exit) = self.exit.filter(|_| self.is_over()) {
                    self.output.extend(FromGuest::Exit(exit).frame().encode());
                    said_all = true;
                }
            }
            let ready = self.wait(stream, said_all)?;
            if ready.is_empty() && self.is_full() && self.output.is_empty() {
                // An empty piece of output: it means nothing, and who is not there any more cannot get it.
                self.output = FromGuest::Stdout(Vec::new()).frame().encode();
            }
            for (source, events) in ready {
                match source {
                    Source::Host => {
                        self.send(stream)?;
                        self.receive(stream, events)?;
                    }
                    Source::Stdin => self.feed(),
                    Source::Stdout => self.pump(false),
                    Source::Stderr => self.pump(true),
                    Source::End => {
                        let status = self.child.wait()?;
                        self.exit = Some(match (status.code(), status.signal()) {
                            (None, Some(signal)) => Exit::Signal(signal),
                            (code, _) => Exit::Code(code.unwrap_or_default()),
                        });
                        self.last_output = Instant::now();
                    }
                }
            }
        }
    }

    /// The host has to wait until the command takes some of its input.
    fn is_full(&self) -> bool {
        self.input.len() >= MAX_INPUT
    }

    /// The command has ended and nothing of its output is on its way.
    fn is_over(&self) -> bool {
        let is_silent =
            (self.stdout.is_none() && self.stderr.is_none()) || self.last_output.elapsed() >= LINGER;
        is_silent || self.is_hurried
    }

    /// Waits for something to do and says what it is.
    fn wait(&self, stream: &UnixStream, said_all: bool) -> io::Result<Vec<(Source, PollFlags)>> {
        let mut host = PollFlags::RDHUP;
        host.set(PollFlags::IN, !self.is_full());
        host.set(PollFlags::OUT, !self.output.is_empty());
        let (mut sources, mut descriptors) = (vec![Source::Host], vec![PollFd::new(stream, host)]);
        let mut add = |source, descriptor, flags| {
            sources.push(source);
            descriptors.push(PollFd::from_borrowed_fd(descriptor, flags));
        };
        if self.exit.is_none() {
            add(Source::End, self.pidfd.as_fd(), PollFlags::IN);
        }
        if let Some(stdin) = self.stdin.as_ref().filter(|_| !self.input.is_empty()) {
            add(Source::Stdin, stdin.as_fd(), PollFlags::OUT);
        }
        if self.output.is_empty() && !said_all {
            if let Some(stdout) = &self.stdout {
                add(Source::Stdout, stdout.as_fd(), PollFlags::IN);
            }
            if let Some(stderr) = &self.stderr {
                add(Source::Stderr, stderr.as_fd(), PollFlags::IN);
            }
        }
        let limit = match self.exit {
            _ if !self.output.is_empty() => None,
            Some(_) => Some(LINGER.saturating_sub(self.last_output.elapsed()) + Duration::from_millis(1)),
            None => self.is_full().then_some(ASK_AGAIN),
        };
        let seconds = |limit: Duration| limit.as_secs().try_into().unwrap_or(i64::MAX);
        let limit =
            limit.map(|limit| Timespec { tv_sec: seconds(limit), tv_nsec: limit.subsec_nanos().into() });
        match poll(&mut descriptors, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = sources.into_iter().zip(descriptors.iter().map(PollFd::revents));
        Ok(ready.filter(|(_, events)| !events.is_empty()).collect())
    }

    fn send(&mut self, mut stream: &UnixStream) -> io::Result<()> {
        while !self.output.is_empty() {
            match stream.write(&self.output) {
                Ok(bytes) => {
                    self.output.drain(..bytes);
                    // Silence is that of the command, and not of a host that does not read.
                    self.last_output = Instant::now();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes in what the host sent; its end is an error.
    fn receive(&mut self, mut stream: &UnixStream, events: PollFlags) -> io::Result<()> {
        let gone = || Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the host has hung up"));
        if !events.contains(PollFlags::IN) {
            let is_gone = events.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR);
            return if is_gone { gone() } else { Ok(()) };
        }
        let mut bytes = vec![0; CHUNK];
        match stream.read(&mut bytes) {
            Ok(0) => return gone(),
            Ok(length) => self.received.extend(bytes.iter().take(length)),
            Err(error) if is_harmless(&error) => {}
            Err(error) => return Err(error),
        }
        while let Some(frame) = Frame::take(&mut self.received).map_err(io::Error::other)? {
            self.hear(ToGuest::parse(frame).map_err(io::Error::other)?);
        }
        Ok(())
    }

    fn hear(&mut self, message: ToGuest) {
        match message {
            ToGuest::Stdin(bytes) => {
                if !self.input_ended {
                    if let Some(last) = bytes.last() {
                        self.in_line = !LINE_ENDS.contains(last);
                    }
                    self.input.extend(bytes);
                    self.feed();
                }
            }
            ToGuest::StdinEnd => {
                if !self.input_ended {
                    self.input_ended = true;
                    if self.is_terminal {
                        let times = if self.in_line { 2 } else { 1 };
                        self.input.extend([END_OF_INPUT; 2].iter().take(times));
                    }
                    self.feed();
                }
            }
            ToGuest::Window(size) => {
                if let Some(main) = self.stdin.as_ref().filter(|_| self.is_terminal) {
                    let _ = rustix::termios::tcsetwinsize(main, winsize(size));
                }
            }
            // One that ended in this moment is as good as one that got it; what it has left behind is not waited for.
            ToGuest::Signal(_) if self.exit.is_some() => self.is_hurried = true,
            ToGuest::Signal(number) => {
                if let Some(signal) = Signal::from_named_raw(number) {
                    let _ = rustix::process::kill_process_group(self.pid, signal);
                }
            }
        }
    }

    /// Hands input on, as much as the command takes now.
    fn feed(&mut self) {
        while let Some(stdin) = self.stdin.as_mut().filter(|_| !self.input.is_empty()) {
            match stdin.write(&self.input) {
                Ok(bytes) => drop(self.input.drain(..bytes)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nobody reads it any more.
                Err(_) => self.stdin = None,
            }
        }
        self.input.clear();
        if self.input_ended && !self.is_terminal {
            self.stdin = None;
        }
    }

    /// Takes a piece of the command's output.
    fn pump(&mut self, is_stderr: bool) {
        // The other one may just have been heard.
        if !self.output.is_empty() {
            return;
        }
        let source = if is_stderr { &mut self.stderr } else { &mut self.stdout };
        let Some(file) = source else { return };
        let mut bytes = vec![0; CHUNK];
        match file.read(&mut bytes) {
            Ok(length) if length > 0 => {
                bytes.truncate(length);
                let message = if is_stderr { FromGuest::Stderr(bytes) } else { FromGuest::Stdout(bytes) };
                self.output = message.frame().encode();
                self.last_output = Instant::now();
            }
            Err(error) if is_harmless(&error) => {}
            // A terminal ends with an error when the last process on it has gone.
            Ok(_) | Err(_) => *source = None,
        }
    }

    /// After its end there is nothing to do. Before it, the host has gone away: its session is hung up, and what does not heed
    /// that is killed.
    fn end(mut self, kernel: Kernel) {
        if self.exit.is_some() {
            return;
        }
        // Who is at its terminal hears of it by this already.
        (self.stdin, self.stdout, self.stderr) = (None, None, None);
        // Until it is waited for nobody else can have its number, and so none but what it has started is in its session.
        let deadline = Instant::now() + GRACE;
        signal_session(kernel, self.pid, Signal::HUP);
        while signal_session(kernel, self.pid, Signal::CONT) > 0 {
            if Instant::now() >= deadline {
                signal_session(kernel, self.pid, Signal::KILL);
                break;
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        let _ = self.child.wait();
    }
}

/// Would be as good a moment later.
fn is_harmless(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Sends a signal to every process of a session and says how many there are.
fn signal_session(kernel: Kernel, session: Pid, signal: Signal) -> usize {
    let members = kernel::names(kernel.proc, ".").into_iter().filter_map(|name| {
        let pid = Pid::from_raw(name.parse().ok()?)?;
        let stat = kernel::read(kernel.proc, &format!("{name}/stat")).ok()?;
        is_member(&stat, session).then_some(pid)
    });
    members.filter(|pid| rustix::process::kill_process(*pid, signal).is_ok()).count()
}

/// By proc_pid_stat(5): behind the name, which is in parentheses and may hold anything, the state, the parent, the group and
/// the session. What has ended and only waits to be waited for is none.
fn is_member(stat: &str, session: Pid) -> bool {
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let [state, _parent, _group, of, ..] = fields[..] else { return false };
    state != "Z" && state != "X" && of.parse() == Ok(session.as_raw_pid())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    /// Runs a command that gets this, with the agent's half in a thread.
    fn run(script: &str, input: &[u8]) -> (Vec<u8>, Vec<u8>, Exit) {
        run_on(None, script, input)
    }

    fn run_on(terminal: Option<Size>, script: &str, input: &[u8]) -> (Vec<u8>, Vec<u8>, Exit) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let command =
            Exec { argv: ["sh", "-c", script].map(String::from).into(), terminal, ..Exec::default() };
        let proc = File::open("/proc").unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let kernel = Kernel::new(proc.as_fd(), proc.as_fd());
                Running::start(&command).unwrap().serve(kernel, &theirs)
            });
            scope.spawn(|| {
                for piece in input.chunks(10_000) {
                    (&ours).write_all(&ToGuest::Stdin(piece.into()).frame().encode())?;
                }
                (&ours).write_all(&ToGuest::StdinEnd.frame().encode())
            });
            let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
            loop {
                match FromGuest::parse(Frame::read(&mut &ours).unwrap().unwrap()).unwrap() {
                    FromGuest::Stdout(bytes) => stdout.extend(bytes),
                    FromGuest::Stderr(bytes) => stderr.extend(bytes),
                    FromGuest::Exit(exit) => return (stdout, stderr, exit),
                }
            }
        })
    }

    #[test]
    fn megabytes_pass_in_both_directions() {
        let input: Vec<u8> = (0..4_000_000u32).map(|number| (number % 251) as u8).collect();
        assert!(run("cat", &input) == (input.clone(), Vec::new(), Exit::Code(0)));
        let (stdout, stderr, exit) = run("head -c 4000000 /dev/zero & wc -c >&2; wait", &input);
        assert_eq!((stdout.len(), stderr.as_slice(), exit), (4_000_000, &b"4000000\n"[..], Exit::Code(0)));
    }

    #[test]
    fn input_ends_on_a_terminal_too_also_within_a_line() {
        for (input, typed) in [("", ""), ("line\n", "line"), ("line\nrest", "rest"), ("rest", "rest")] {
            let size = Size { rows: 24, columns: 80 };
            let script = "stty -echo 2>/dev/null; cat; echo; echo over";
            let (stdout, _, exit) = run_on(Some(size), script, input.as_bytes());
            let stdout = String::from_utf8(stdout).unwrap();
            assert_eq!(exit, Exit::Code(0), "{input:?}: {stdout:?}");
            assert!(stdout.contains(typed) && stdout.contains("over"), "{input:?}: {stdout:?}");
        }
    }

    #[test]
    fn a_signal_ends_the_wait_for_what_a_command_has_left_behind() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        // Something that goes on saying something until nobody hears it.
        let script = "while echo x; do :; done & exit 3";
        let command = Exec { argv: ["sh", "-c", script].map(String::from).into(), ..Exec::default() };
        let proc = File::open("/proc").unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let kernel = Kernel::new(proc.as_fd(), proc.as_fd());
                Running::start(&command).unwrap().serve(kernel, &theirs)
            });
            for heard in 0.. {
                match FromGuest::parse(Frame::read(&mut &ours).unwrap().unwrap()).unwrap() {
                    FromGuest::Exit(exit) => {
                        assert_eq!((exit, heard > 20), (Exit::Code(3), true));
                        break;
                    }
                    _ if heard < 20 => {}
                    _ => (&ours).write_all(&ToGuest::Signal(2).frame().encode()).unwrap(),
                }
            }
        });
    }

    #[test]
    fn a_command_that_cannot_be_watched_does_not_run() {
        let child = Command::new("sleep").arg("4711").spawn().unwrap();
        let pid = Pid::from_child(&child);
        // A terminal that is none, and takes no call.
        let main = File::options().read(true).custom_flags(libc::O_PATH).open("/").unwrap();
        assert!(Started::new(child, Some(main)).is_err());
        assert!(rustix::process::test_kill_process(pid).is_err());
    }

    #[test]
    fn a_command_ends_with_its_host() {
        for script in ["echo $$; sleep 4711", "trap '' HUP; echo $$; sleep 4711 & sleep 4711"] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let command = Exec { argv: ["sh", "-c", script].map(String::from).into(), ..Exec::default() };
            let proc = File::open("/proc").unwrap();
            let kernel = Kernel::new(proc.as_fd(), proc.as_fd());
            std::thread::scope(|scope| {
                let serving = scope.spawn(|| Running::start(&command).unwrap().serve(kernel, &theirs));
                let FromGuest::Stdout(pid) =
                    FromGuest::parse(Frame::read(&mut &ours).unwrap().unwrap()).unwrap()
                else {
                    panic!("no number")
                };
                let pid = Pid::from_raw(String::from_utf8(pid).unwrap().trim().parse().unwrap()).unwrap();
                assert!(signal_session(kernel, pid, Signal::CONT) > 0);
                ours.shutdown(std::net::Shutdown::Both).unwrap();
                assert!(serving.join().unwrap().is_err());
                // What was killed may need a moment for it.
                while signal_session(kernel, pid, Signal::CONT) > 0 {
                    std::thread::sleep(LOOK_AGAIN);
                }
            });
        }
    }

    #[test]
    fn a_member_of_a_session_is_known_whatever_it_is_called() {
        let session = Pid::from_raw(42).unwrap();
        assert!(is_member("43 (a b) 9) S 1 43 42 0 -1", session));
        assert!(!is_member("43 (cat) Z 1 43 42 0 -1", session));
        assert!(!is_member("43 (cat) S 1 42 43 0 -1", session));
        assert!(!is_member("", session));
    }
}
