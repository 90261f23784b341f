//! The agent: runs commands in a host for its owner at the other end of one connection.
//!
//! In a nested host it is process 1 and the connection is a virtio-serial port. On this machine's own KVM it is an
//! ordinary process and the connection is a socket, so that the owner sees no difference. One thread polls everything;
//! only writes to the connection block, which is safe because the owner always reads.
//!
//! It keeps no terminal settings, copies no files and trusts its owner. Nothing it buffers grows beyond
//! [`wire::WINDOW`] for each stream.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, WaitStatus};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use super::process::in_session;
use super::wire::{self, Frame, FromAgent, Prepare, Size, ToAgent};

/// The port's name on the virtio-serial device of a nested host.
pub const PORT_NAME: &str = "berth.agent";

/// How long to wait for the port to appear after the kernel's start.
const PORT_WAIT: Duration = Duration::from_secs(30);

/// Process 1 looks for orphans to reap at least this often.
const IDLE: Duration = Duration::from_secs(1);

/// A port whose owner is away says so at once, for ever: the pause between two looks.
const OWNER_AWAY: Duration = Duration::from_millis(10);

/// A command that exited may leave children that hold its output open. The stream ends when they were silent so long.
const LINGER: Duration = Duration::from_millis(300);

/// Rounds of killing what is left when the owner has gone. Each kills every process then alive, so a second round is
/// needed only for what was being started meanwhile.
const KILL_ROUNDS: usize = 100;

/// Bytes read from a command at a time.
const CHUNK: usize = 32 << 10;

/// Where the commands of a nested host are.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What process 1 passes on to its commands; an agent elsewhere passes on its own environment.
const INIT_ENVIRONMENT: [(&str, &str); 4] =
    [("PATH", PATH), ("HOME", "/root"), ("TERM", "xterm"), ("LANG", "C.UTF-8")];

/// Finds the port of a nested host and opens it. Call in the nested host only.
pub fn open_port() -> io::Result<fs::File> {
    let deadline = Instant::now() + PORT_WAIT;
    loop {
        if let Some(path) = find_port() {
            return fs::File::options().read(true).write(true).open(path);
        }
        if Instant::now() > deadline {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("no virtio port named {PORT_NAME}")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn find_port() -> Option<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    let named = |entry: &fs::DirEntry| {
        fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim_end() == PORT_NAME)
    };
    ports.flatten().find(named).map(|entry| Path::new("/dev").join(entry.file_name()))
}

/// Serves the owner of a virtio port. Returns only on an error, for the owner may come back.
pub fn serve_port(port: fs::File) -> io::Result<()> {
    Agent::new(port, true).serve()
}

/// Serves the owner at the other end of a socket until it closes it, then kills every process started for it.
pub fn serve_socket(socket: OwnedFd) -> io::Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let mut agent = Agent::new(fs::File::from(socket), false);
    let served = agent.serve();
    agent.kill_everything();
    served
}

struct Agent {
    connection: fs::File,
    is_init: bool,
    received: Vec<u8>,
    streams: BTreeMap<u32, Stream>,
}

struct Stream {
    pid: Pid,
    /// Readable once the process has ended.
    pidfd: OwnedFd,
    is_terminal: bool,
    stdin: Option<fs::File>,
    /// Standard input that the command has not taken yet.
    pending: Vec<u8>,
    input_ended: bool,
    stdout: Option<fs::File>,
    stderr: Option<fs::File>,
    /// Bytes of output that the owner will still take.
    credit: usize,
    exit: Option<i32>,
    last_output: Instant,
}

/// What a file descriptor of the poll set belongs to.
#[derive(Clone, Copy)]
enum Source {
    Connection,
    Stdin(u32),
    Stdout(u32),
    Stderr(u32),
    Process,
}

impl Agent {
    fn new(connection: fs::File, is_init: bool) -> Self {
        Self { connection, is_init, received: Vec::new(), streams: BTreeMap::new() }
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            for source in self.wait()? {
                match source {
                    Source::Connection => {
                        if !self.receive()? {
                            return Ok(());
                        }
                    }
                    Source::Stdin(number) => self.feed(number)?,
                    Source::Stdout(number) => self.pump(number, false)?,
                    Source::Stderr(number) => self.pump(number, true)?,
                    Source::Process => {}
                }
            }
            self.reap();
            self.close_finished()?;
        }
    }

    /// Waits for something to do and says what it is.
    fn wait(&self) -> io::Result<Vec<Source>> {
        let (sources, mut fds): (Vec<_>, Vec<_>) = self.poll_set().into_iter().unzip();
        let lingering = self.streams.values().any(|stream| stream.exit.is_some());
        let limit = if lingering { LINGER / 4 } else { IDLE };
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        match poll(&mut fds, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = sources.into_iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready.map(|(source, _)| source).collect())
    }

    fn poll_set(&self) -> Vec<(Source, PollFd<'_>)> {
        let mut set = vec![(Source::Connection, PollFd::new(&self.connection, PollFlags::IN))];
        for (&number, stream) in &self.streams {
            let mut add = |source, fd, flags| set.push((source, PollFd::from_borrowed_fd(fd, flags)));
            if stream.exit.is_none() {
                add(Source::Process, stream.pidfd.as_fd(), PollFlags::IN);
            }
            if let Some(stdin) = stream.stdin.as_ref().filter(|_| !stream.pending.is_empty()) {
                add(Source::Stdin(number), stdin.as_fd(), PollFlags::OUT);
            }
            if stream.credit > 0 {
                if let Some(stdout) = &stream.stdout {
                    add(Source::Stdout(number), stdout.as_fd(), PollFlags::IN);
                }
                if let Some(stderr) = &stream.stderr {
                    add(Source::Stderr(number), stderr.as_fd(), PollFlags::IN);
                }
            }
        }
        set
    }

    /// Takes in what the owner sent. False when the owner has gone for good.
    fn receive(&mut self) -> io::Result<bool> {
        let mut bytes = [0; CHUNK];
        match self.connection.read(&mut bytes) {
            Ok(0) if self.is_init => std::thread::sleep(OWNER_AWAY),
            Ok(0) => return Ok(false),
            Ok(length) => self.received.extend(&bytes[..length]),
            Err(error) if retry(&error) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
            Err(error) => return Err(error),
        }
        while let Some(frame) = Frame::take(&mut self.received)? {
            self.handle(ToAgent::parse(frame)?)?;
        }
        Ok(true)
    }

    fn handle(&mut self, message: ToAgent) -> io::Result<()> {
        match message {
            ToAgent::Ping(number) => {
                let strays = self.strays();
                self.send(&FromAgent::Pong(number, strays))?;
            }
            ToAgent::Prepare(request) => {
                let error = prepare(&request).err().unwrap_or_default();
                self.send(&FromAgent::Prepared(error))?;
            }
            ToAgent::Run(number, command) => self.run(number, &command)?,
            ToAgent::Stdin(number, bytes) => {
                if let Some(stream) = self.streams.get_mut(&number) {
                    stream.pending.extend(bytes);
                    self.feed(number)?;
                }
            }
            ToAgent::StdinEnd(number) => {
                if let Some(stream) = self.streams.get_mut(&number) {
                    stream.input_ended = true;
                    self.feed(number)?;
                }
            }
            ToAgent::Signal(number, signal) => {
                if let (Some(stream), Some(signal)) =
                    (self.streams.get(&number), Signal::from_named_raw(signal))
                {
                    // It may have ended in this moment, which is as good.
                    let _ = rustix::process::kill_process_group(stream.pid, signal);
                }
            }
            ToAgent::Resize(number, size) => {
                if let Some(terminal) = self.streams.get(&number).and_then(|stream| stream.stdin.as_ref()) {
                    let _ = rustix::termios::tcsetwinsize(terminal, winsize(size));
                }
            }
            ToAgent::Credit(number, bytes) => {
                if let Some(stream) = self.streams.get_mut(&number) {
                    stream.credit = stream.credit.saturating_add(bytes as usize).min(wire::WINDOW);
                }
            }
        }
        Ok(())
    }

    fn run(&mut self, number: u32, command: &wire::Command) -> io::Result<()> {
        let started = if self.streams.len() >= wire::MAX_STREAMS {
            Err(io::Error::other(format!("{} commands are running already", wire::MAX_STREAMS)))
        } else if command.terminal.is_some() {
            Stream::on_terminal(command, self.is_init)
        } else {
            Stream::on_pipes(command, self.is_init)
        };
        match started {
            Ok(stream) => {
                self.streams.insert(number, stream);
                Ok(())
            }
            Err(error) => {
                let name = command.argv.first().map_or("an empty command", String::as_str);
                self.send(&FromAgent::Stderr(number, format!("cannot run {name}: {error}\n").into_bytes()))?;
                // The shell's codes for "not found" and "cannot be executed".
                let code = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
                self.send(&FromAgent::Exit(number, code))
            }
        }
    }

    /// Hands standard input on, as much as the command takes now.
    fn feed(&mut self, number: u32) -> io::Result<()> {
        let Some(stream) = self.streams.get_mut(&number) else { return Ok(()) };
        let before = stream.pending.len();
        stream.feed();
        let taken = before - stream.pending.len();
        if taken > 0 { self.send(&FromAgent::Credit(number, taken as u32)) } else { Ok(()) }
    }

    /// Sends one chunk of a command's output on.
    fn pump(&mut self, number: u32, is_stderr: bool) -> io::Result<()> {
        let Some(stream) = self.streams.get_mut(&number) else { return Ok(()) };
        let source = if is_stderr { &mut stream.stderr } else { &mut stream.stdout };
        let Some(file) = source else { return Ok(()) };
        let mut bytes = vec![0; CHUNK.min(stream.credit)];
        if bytes.is_empty() {
            return Ok(());
        }
        match file.read(&mut bytes) {
            Ok(length) if length > 0 => {
                bytes.truncate(length);
                stream.credit -= length;
                let message = if is_stderr { FromAgent::Stderr } else { FromAgent::Stdout };
                self.send(&message(number, bytes))?;
                // Silence is the command's, and not that of an owner who has not read.
                if let Some(stream) = self.streams.get_mut(&number) {
                    stream.last_output = Instant::now();
                }
                Ok(())
            }
            Err(error) if retry(&error) => Ok(()),
            // A terminal ends with EIO when the last process on it has gone.
            Ok(_) | Err(_) => {
                *source = None;
                Ok(())
            }
        }
    }

    /// Collects every child that ended, ours or inherited.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            if let Some(stream) = self.streams.values_mut().find(|s| s.pid == pid && s.exit.is_none()) {
                stream.exit = Some(exit_code(status));
                stream.last_output = Instant::now();
            }
        }
    }

    fn close_finished(&mut self) -> io::Result<()> {
        let finished = |(&number, stream): (&u32, &Stream)| stream.finished().map(|code| (number, code));
        for (number, code) in self.streams.iter().filter_map(finished).collect::<Vec<_>>() {
            self.streams.remove(&number);
            self.send(&FromAgent::Exit(number, code))?;
        }
        Ok(())
    }

    fn send(&mut self, message: &FromAgent) -> io::Result<()> {
        self.connection.write_all(&message.frame().encode()?)
    }

    /// Processes below this one that belong to no open stream.
    fn strays(&self) -> u32 {
        let of_stream =
            |process: &Process| self.streams.values().any(|s| s.pid.as_raw_pid() == process.session);
        descendants().iter().filter(|process| !of_stream(process)).count() as u32
    }

    fn kill_everything(&mut self) {
        for _ in 0..KILL_ROUNDS {
            let processes = descendants();
            if processes.is_empty() {
                break;
            }
            for pid in processes.iter().filter_map(|process| Pid::from_raw(process.pid)) {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(2));
            self.reap();
        }
    }
}

impl Stream {
    fn on_pipes(command: &wire::Command, is_init: bool) -> io::Result<Self> {
        let mut builder = builder(command, is_init)?;
        builder.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = in_session(&mut builder, false).spawn()?;
        let stdin = child.stdin.take().map(|pipe| fs::File::from(OwnedFd::from(pipe)));
        if let Some(pipe) = &stdin {
            set_nonblocking(pipe)?;
        }
        Ok(Self {
            stdin,
            stdout: child.stdout.take().map(|pipe| fs::File::from(OwnedFd::from(pipe))),
            stderr: child.stderr.take().map(|pipe| fs::File::from(OwnedFd::from(pipe))),
            ..Self::new(child.id(), false)?
        })
    }

    fn on_terminal(command: &wire::Command, is_init: bool) -> io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let main = rustix::pty::openpt(flags)?;
        rustix::pty::grantpt(&main)?;
        rustix::pty::unlockpt(&main)?;
        let name = rustix::pty::ptsname(&main, Vec::new())?;
        let name = name.to_str().map_err(io::Error::other)?;
        let terminal = fs::File::options().read(true).write(true).open(name)?;
        if let Some(size) = command.terminal {
            rustix::termios::tcsetwinsize(&terminal, winsize(size))?;
        }
        let mut builder = builder(command, is_init)?;
        builder.stdin(terminal.try_clone()?).stdout(terminal.try_clone()?).stderr(terminal);
        let child = in_session(&mut builder, true).spawn()?;
        let main = fs::File::from(main);
        set_nonblocking(&main)?;
        Ok(Self { stdin: Some(main.try_clone()?), stdout: Some(main), ..Self::new(child.id(), true)? })
    }

    fn new(pid: u32, is_terminal: bool) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self {
            pid,
            pidfd: rustix::process::pidfd_open(pid, PidfdFlags::empty())?,
            is_terminal,
            stdin: None,
            pending: Vec::new(),
            input_ended: false,
            stdout: None,
            stderr: None,
            credit: wire::WINDOW,
            exit: None,
            last_output: Instant::now(),
        })
    }

    fn feed(&mut self) {
        while let Some(stdin) = self.stdin.as_mut().filter(|_| !self.pending.is_empty()) {
            match stdin.write(&self.pending) {
                Ok(length) => drop(self.pending.drain(..length)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) if self.is_terminal => self.pending.clear(),
                Err(_) => self.stdin = None,
            }
        }
        if self.stdin.is_none() {
            // Nobody reads it any more: taken, as a shell's pipe to a program that has exited.
            self.pending.clear();
        }
        if self.input_ended && self.pending.is_empty() {
            self.end_input();
        }
    }

    fn end_input(&mut self) {
        const END_OF_TRANSMISSION: &[u8] = &[4];
        if !self.is_terminal {
            self.stdin = None;
        } else if let Some(terminal) = &mut self.stdin {
            // A full terminal buffer loses this; a person presses the key again.
            let _ = terminal.write(END_OF_TRANSMISSION);
        }
        self.input_ended = false;
    }

    /// The exit code, once the command has ended and its output has, or lingers in silence.
    fn finished(&self) -> Option<i32> {
        let drained = self.stdout.is_none() && self.stderr.is_none();
        let silent = self.credit > 0 && self.last_output.elapsed() > LINGER;
        self.exit.filter(|_| drained || silent)
    }
}

fn builder(command: &wire::Command, is_init: bool) -> io::Result<Command> {
    let (program, arguments) = command.argv.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut builder = Command::new(program);
    if is_init {
        builder.env_clear().envs(INIT_ENVIRONMENT);
    }
    builder.args(arguments).envs(command.env.iter().map(|(name, value)| (name, value)));
    if let Some(directory) = &command.cwd {
        builder.current_dir(directory);
    }
    Ok(builder)
}

fn prepare(request: &Prepare) -> Result<(), String> {
    let time = rustix::time::Timespec {
        tv_sec: (request.unix_nanoseconds / 1_000_000_000) as i64,
        tv_nsec: (request.unix_nanoseconds % 1_000_000_000) as i64,
    };
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, time)
        .map_err(|error| format!("cannot set the clock: {error}"))?;
    for mount in &request.mounts {
        mount_disk(mount)
            .map_err(|error| format!("cannot mount {} at {}: {error}", mount.device, mount.target))?;
    }
    Ok(())
}

fn mount_disk(mount: &wire::Mount) -> io::Result<()> {
    forget_cached_blocks(&fs::File::open(&mount.device)?)?;
    fs::create_dir_all(&mount.target)?;
    let flags =
        if mount.read_only { rustix::mount::MountFlags::RDONLY } else { rustix::mount::MountFlags::empty() };
    rustix::mount::mount(&mount.device, &mount.target, &mount.file_system, flags, None)?;
    Ok(())
}

/// The kernel looked for partitions when it booted, perhaps on another disk in this slot before the state was saved.
fn forget_cached_blocks(disk: &fs::File) -> io::Result<()> {
    const BLKFLSBUF: rustix::ioctl::Opcode = rustix::ioctl::opcode::none(0x12, 97);
    // SAFETY: BLKFLSBUF takes no argument, and `NoArg` passes none.
    unsafe { rustix::ioctl::ioctl(disk, rustix::ioctl::NoArg::<BLKFLSBUF>::new()) }?;
    Ok(())
}

struct Process {
    pid: i32,
    parent: i32,
    session: i32,
}

/// Every living process below this one.
fn descendants() -> Vec<Process> {
    let mut others: Vec<Process> = fs::read_dir("/proc")
        .map(|entries| entries.flatten().filter_map(|entry| process(&entry.path())).collect())
        .unwrap_or_default();
    let mut family = vec![rustix::process::getpid().as_raw_pid()];
    let mut found = Vec::new();
    loop {
        let (children, rest): (Vec<_>, Vec<_>) = others.into_iter().partition(|p| family.contains(&p.parent));
        if children.is_empty() {
            return found;
        }
        family = children.iter().map(|process| process.pid).collect();
        found.extend(children);
        others = rest;
    }
}

/// Reads `/proc/<pid>/stat` (proc_pid_stat(5)); nothing for a zombie or for what is no process.
fn process(directory: &Path) -> Option<Process> {
    let pid = directory.file_name()?.to_str()?.parse().ok()?;
    let stat = fs::read_to_string(directory.join("stat")).ok()?;
    // The name in parentheses may hold anything, parentheses too.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ');
    let alive = fields.next()? != "Z";
    let parent = fields.next()?.parse().ok()?;
    let session = fields.nth(1)?.parse().ok()?;
    alive.then_some(Process { pid, parent, session })
}

fn exit_code(status: WaitStatus) -> i32 {
    let signalled = || status.terminating_signal().map(|signal| 128 + signal);
    status.exit_status().or_else(signalled).unwrap_or(255)
}

fn winsize(size: Size) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}

fn set_nonblocking(file: &fs::File) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(file, flags | rustix::fs::OFlags::NONBLOCK)?)
}

fn retry(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}
