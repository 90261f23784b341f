//! A berthd without guests: it answers what a real one would, notes what it was asked, and its agents run commands here.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use agent::files::{self, Owners};
use agent::protocol::{self, Done, Exit, Found, Frame, FromGuest, Kind, Pong, Reply, ToGuest};
use api_socket::Fault;
use api_socket::fleet::routes::Log;
use api_socket::fleet::server::{Answer, serve};
use api_socket::fleet::{End, Event, Guest, Image, List, NewGuest, Outcome, Request, State, Stats, Version};
use tempfile::TempDir;

/// More of a log than all pipes and buffers between hold.
pub const MUCH: usize = 4 << 20;
/// How long what takes its time takes.
const LATE: Duration = Duration::from_millis(500);

#[derive(Default)]
struct Inner {
    guests: BTreeMap<String, Guest>,
    asked: Vec<String>,
    /// What was sent, by image and part.
    parts: BTreeMap<String, usize>,
    /// How often an agent says that its root is not there yet.
    boots: u32,
    stats: u64,
    /// How often a guest was looked at that had no terminals yet.
    looks: u32,
    is_odd: bool,
    /// How often another daemon took the place of this one.
    restarts: u32,
    /// The commands that agents were to run.
    commands: Vec<protocol::Exec>,
}

pub struct Daemon {
    directory: TempDir,
    inner: Arc<Mutex<Inner>>,
}

impl Daemon {
    pub fn new() -> Daemon {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        let inner: Arc<Mutex<Inner>> = Arc::default();
        let shared = inner.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = shared.clone();
                thread::spawn(move || serve(stream.unwrap(), |request, body| answer(&shared, request, body)));
            }
        });
        Daemon { directory, inner }
    }

    /// With a guest of this name in this state.
    pub fn with(self, name: &str, state: State) -> Daemon {
        let mut inner = self.inner.lock().unwrap();
        let mut guest =
            made(inner.guests.len(), &NewGuest { name: Some(name.into()), ..NewGuest::of("debian") });
        guest.state = state;
        inner.guests.insert(guest.id.clone(), guest);
        drop(inner);
        self
    }

    /// Whose agents say what none says.
    pub fn odd(self) -> Daemon {
        self.inner.lock().unwrap().is_odd = true;
        self
    }

    /// That may be asked by everybody.
    pub fn open(self) -> Daemon {
        for path in [self.directory.path().to_owned(), self.socket()] {
            fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
        }
        self
    }

    /// Whose agents say a few times that they have no root yet.
    pub fn slow(self) -> Daemon {
        self.inner.lock().unwrap().boots = 3;
        self
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// What it was asked, without looks that change nothing.
    pub fn asked(&self) -> Vec<String> {
        self.inner.lock().unwrap().asked.clone()
    }

    /// Waits until it is asked this.
    #[track_caller]
    pub fn is_asked(&self, what: &str) {
        for _ in 0..3000 {
            if self.asked().iter().any(|asked| asked == what) {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("not asked {what:?} but {:?}", self.asked());
    }

    pub fn commands(&self) -> Vec<protocol::Exec> {
        self.inner.lock().unwrap().commands.clone()
    }

    pub fn parts(&self) -> BTreeMap<String, usize> {
        self.inner.lock().unwrap().parts.clone()
    }

    pub fn state(&self, name: &str) -> Option<State> {
        self.inner.lock().unwrap().guests.values().find(|guest| guest.name == name).map(|guest| guest.state)
    }

    /// A `berth` that asks this daemon.
    pub fn berth(&self, arguments: &[&str]) -> Command {
        berth(&self.socket(), arguments)
    }
}

pub fn berth(socket: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth"));
    command.arg("--socket").arg(socket).args(arguments).stdin(Stdio::null()).env_remove("BERTH_SOCKET");
    command
}

fn made(number: usize, new: &NewGuest) -> Guest {
    Guest {
        id: format!("{:012x}", 0xabc0_0000_0000_u64 + number as u64),
        name: new.name.clone().unwrap_or_else(|| format!("made-up-{number}")),
        image: new.image.clone(),
        owner: 0,
        state: State::Stopped,
        cpus: new.cpus,
        memory_mib: new.memory_mib,
        max_memory_mib: new.max_memory_mib,
        disks: new.disks.clone(),
        command_line: None,
        network: new.network,
        restart: new.restart,
        limits: new.limits,
        remove_when_ended: new.remove_when_ended,
        created_at: 0.0,
        started_at: None,
        restarts: 0,
        restart_at: None,
        last_end: None,
        pid: None,
        uid: 70_000,
        address: None,
        mac: None,
        api_socket: None,
    }
}

/// A guest for which everything takes its time.
fn is_late(name: &str) -> bool {
    name == "late"
}

fn fault(status: u16, message: &str) -> Answer<'static> {
    Fault { status, message: message.into() }.into()
}

fn answer(shared: &Arc<Mutex<Inner>>, request: Request, body: &mut dyn Read) -> Answer<'static> {
    let mut inner = shared.lock().unwrap();
    match request {
        Request::GetVersion => Answer::json(&Version { version: "9.9.9".into(), pid: 1 + inner.restarts }),
        Request::ListGuests => Answer::json(&List { items: inner.guests.values().collect() }),
        Request::CreateGuest(new) if new.image != "debian" => {
            fault(404, "There is no such image; berth image ls lists them.")
        }
        Request::CreateGuest(new) => {
            let guest = made(inner.guests.len(), &new);
            inner.asked.push(format!("create {}", guest.name));
            inner.guests.insert(guest.id.clone(), guest.clone());
            if is_late(&guest.name) {
                drop(inner);
                thread::sleep(LATE);
            }
            Answer::json(&guest)
        }
        Request::AllStats => {
            inner.stats += 1;
            let (at, used) = (inner.stats as f64, inner.stats * 250_000);
            let stats = |guest: &Guest| Stats {
                id: guest.id.clone(),
                name: guest.name.clone(),
                at,
                cpu_microseconds: used,
                ..Stats::default()
            };
            Answer::json(&List { items: inner.guests.values().map(stats).collect() })
        }
        Request::Events => Answer::Stream(
            "application/json",
            Box::new(|stream| {
                let event = Event {
                    number: 1,
                    at: 0.0,
                    what: "running".into(),
                    id: "abc000000000".into(),
                    name: "web".into(),
                    end: None,
                };
                stream.tell((serde_json::to_string(&event).unwrap() + "\n").as_bytes())
            }),
        ),
        Request::PutPart(image, part) => {
            drop(inner);
            let mut file = Vec::new();
            if body.read_to_end(&mut file).is_err() {
                return fault(400, "The part is not whole.");
            }
            shared.lock().unwrap().parts.insert(format!("{image}/{}", part.as_str()), file.len());
            Answer::Empty
        }
        Request::PutImage(name, new) => {
            let command_line = new.command_line.unwrap_or_else(|| "usual".into());
            inner.asked.push(format!("image {name} {command_line}"));
            Answer::json(&Image {
                name,
                owner: 0,
                command_line,
                has_initrd: false,
                disk_bytes: 0,
                used_bytes: 0,
                created_at: 0.0,
                guests: 0,
            })
        }
        Request::GetGuest(name) => with(&mut inner, &name, |guest| Answer::json(guest)),
        Request::StartGuest(name) => {
            if inner.guests.values().any(|guest| guest.id == name && is_late(&guest.name)) {
                inner.asked.push("late start".into());
                drop(inner);
                thread::sleep(LATE);
                inner = shared.lock().unwrap();
            }
            change(&mut inner, "start", &name, State::Running)
        }
        Request::StopGuest(name, stop) => {
            let what = format!("stop {}", stop.seconds);
            let answer = change(&mut inner, &what, &name, State::Stopped);
            inner.guests.retain(|_, guest| !(guest.remove_when_ended && guest.state == State::Stopped));
            answer
        }
        Request::PauseGuest(name) => change(&mut inner, "pause", &name, State::Paused),
        Request::ResumeGuest(name) => change(&mut inner, "resume", &name, State::Running),
        Request::UpdateGuest(name, update) => {
            inner.asked.push(format!("update {name} {}", serde_json::to_string(&update).unwrap()));
            with(&mut inner, &name, |guest| Answer::json(guest))
        }
        Request::RemoveGuest { guest: name, force } => {
            inner.asked.push(format!("remove {name} {force}"));
            let found = with(&mut inner, &name, |_| Answer::Empty);
            inner.guests.retain(|id, guest| guest.name != name && *id != name);
            found
        }
        Request::Logs { guest: name, .. } if name == "talkative" => {
            let shared = shared.clone();
            Answer::Stream(
                "text/plain",
                Box::new(move |stream| {
                    stream.tell(&vec![b'x'; MUCH])?;
                    shared.lock().unwrap().asked.push("told".into());
                    Ok(())
                }),
            )
        }
        Request::Logs { guest: name, .. } if name == "cut" => Answer::Stream(
            "text/plain",
            Box::new(|stream| {
                stream.tell(b"one\n")?;
                Err(std::io::ErrorKind::Other.into())
            }),
        ),
        Request::Logs { guest: name, of, follow } => with(&mut inner, &name, |_| {
            let log: &[u8] = if of == Log::Vmm { b"of the vmm\n" } else { b"one\ntwo\nthree\n" };
            Answer::Stream(
                "text/plain",
                Box::new(move |stream| {
                    stream.tell(log)?;
                    if follow { stream.tell(b"four\n") } else { Ok(()) }
                }),
            )
        }),
        Request::Console(name) => {
            let shared = shared.clone();
            with(&mut inner, &name, |_| {
                // Says what it hears, in capitals, until it hears an x, or an r, with which another daemon comes.
                Answer::Upgrade(Box::new(move |mut stream, _| {
                    let mut byte = [0];
                    while stream.read(&mut byte).is_ok_and(|count| count > 0) && byte != *b"x" {
                        if byte == *b"r" {
                            shared.lock().unwrap().restarts += 1;
                            break;
                        }
                        if stream.write_all(&byte.map(|byte| byte.to_ascii_uppercase())).is_err() {
                            break;
                        }
                    }
                }))
            })
        }
        Request::Vsock { guest: name, port, .. } => {
            assert_eq!(port, protocol::PORT);
            if inner.guests.get(&name).is_some_and(|guest| guest.name == "orphan") {
                inner.restarts += 1;
                return fault(504, "Nobody listens.");
            }
            let shared = shared.clone();
            with(&mut inner, &name, |guest| match guest.state {
                State::Running => {
                    let id = guest.id.clone();
                    Answer::Upgrade(Box::new(move |stream, _| agent(&shared, &id, stream)))
                }
                State::Paused => fault(504, "Nobody listens."),
                _ => fault(409, "The guest does not run; start it first."),
            })
        }
        other => fault(501, &format!("{other:?} is not known here.")),
    }
}

fn with(inner: &mut Inner, name: &str, then: impl FnOnce(&mut Guest) -> Answer<'static>) -> Answer<'static> {
    let found = inner.guests.values_mut().find(|guest| guest.name == name || guest.id.starts_with(name));
    found.map_or_else(|| fault(404, "There is no such guest; berth ps --all lists them."), then)
}

fn change(inner: &mut Inner, what: &str, name: &str, state: State) -> Answer<'static> {
    let mut asked = None;
    let answer = with(inner, name, |guest| {
        asked = Some(format!("{what} {}", guest.name));
        if guest.name == "stuck" {
            return fault(409, "It is stuck.");
        }
        if guest.state == State::Running && state == State::Stopped {
            guest.last_end = Some(End { at: 0.0, outcome: Outcome::PoweredOff, reason: "it did".into() });
        }
        guest.state = state;
        Answer::json(guest)
    });
    inner.asked.extend(asked);
    answer
}

/// One operation. Commands that begin with a word of ours are played, the others run here.
fn agent(shared: &Mutex<Inner>, id: &str, mut stream: UnixStream) {
    let Ok(request) = protocol::read_line::<protocol::Request>("request", &mut stream) else { return };
    match request {
        protocol::Request::Ping {} if shared.lock().unwrap().is_odd => {
            let _ = stream.write_all(b"welcome\n");
        }
        protocol::Request::Ping {} => {
            let mut inner = shared.lock().unwrap();
            let root_is_ready = inner.boots == 0;
            inner.boots = inner.boots.saturating_sub(1);
            say(&mut stream, Reply::Ok(Pong { version: "1".into(), root_is_ready }));
        }
        protocol::Request::Exec(command) => match command.user.as_deref() {
            Some(user) => say(&mut stream, Reply::<Done>::Error(format!("no user {user:?}"))),
            None => {
                say(&mut stream, Reply::Ok(Done {}));
                shared.lock().unwrap().commands.push(command.clone());
                match command.argv[0].as_str() {
                    "play-power-off" => {
                        let mut inner = shared.lock().unwrap();
                        let guest = inner.guests.get_mut(id).unwrap();
                        guest.state = State::Stopped;
                        guest.last_end =
                            Some(End { at: 0.0, outcome: Outcome::PoweredOff, reason: "it did".into() });
                    }
                    "play-restart" => shared.lock().unwrap().restarts += 1,
                    "play-terminal" if command.terminal.is_some() && shared.lock().unwrap().looks < 2 => {
                        panic!("a terminal was asked for too early");
                    }
                    "play-terminal" => play_terminal(stream, &command),
                    _ => play(stream, &command),
                }
            }
        },
        // Terminals come at the second look.
        protocol::Request::Look { path } if path == "/dev/pts/ptmx" => {
            let mut inner = shared.lock().unwrap();
            inner.looks += 1;
            let kind = if inner.looks > 1 { Kind::Other } else { Kind::Nothing };
            say(&mut stream, Reply::Ok(Found { kind }));
        }
        protocol::Request::Look { path } => {
            let kind = match fs::metadata(path) {
                Ok(found) if found.is_dir() => Kind::Directory,
                Ok(_) => Kind::File,
                Err(_) => Kind::Nothing,
            };
            say(&mut stream, Reply::Ok(Found { kind }));
        }
        protocol::Request::Pack { path, name } => {
            let path = Path::new(&path);
            if !path.exists() {
                return say(&mut stream, Reply::<Done>::Error(format!("{}: no such file", path.display())));
            }
            say(&mut stream, Reply::Ok(Done {}));
            let name = name.map_or_else(|| files::name_of(path), Into::into);
            let _ = files::pack(path, Path::new(&name), Owners::Kept, &stream);
        }
        protocol::Request::Unpack { path } => {
            say(&mut stream, Reply::Ok(Done {}));
            match files::unpack(&stream, Path::new(&path), Owners::Own) {
                Ok(()) => say(&mut stream, Reply::Ok(Done {})),
                Err(error) => say(&mut stream, Reply::<Done>::Error(error.to_string())),
            }
        }
        protocol::Request::Window(_) | protocol::Request::ShutDown {} => say(&mut stream, Reply::Ok(Done {})),
    }
}

fn say<T: serde::Serialize>(stream: &mut UnixStream, reply: Reply<T>) {
    let _ = protocol::write_line(stream, &reply);
}

fn tell(mut stream: &UnixStream, message: FromGuest) {
    let _ = stream.write_all(&message.frame().encode());
}

fn hear(mut stream: &UnixStream) -> Option<ToGuest> {
    Frame::read(&mut stream).ok()?.and_then(|frame| ToGuest::parse(frame).ok())
}

/// A command of this host, with all its input before its output.
fn play(stream: UnixStream, command: &protocol::Exec) {
    let mut input = Vec::new();
    // One that sleeps is sent signals before its input ends.
    if command.argv[0] != "sleep" {
        while let Some(heard) = hear(&stream) {
            match heard {
                ToGuest::Stdin(bytes) => input.extend(bytes),
                ToGuest::StdinEnd => break,
                _ => {}
            }
        }
    }
    let started = Command::new(&command.argv[0])
        .args(&command.argv[1..])
        .envs(&command.environment)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = started else {
        tell(&stream, FromGuest::Stderr(b"berth: not found\n".into()));
        return tell(&stream, FromGuest::Exit(Exit::Code(127)));
    };
    let mut stdin = child.stdin.take().unwrap();
    thread::spawn(move || stdin.write_all(&input));
    let pid = rustix::process::Pid::from_child(&child);
    let hears = stream.try_clone().unwrap();
    thread::spawn(move || {
        while let Some(heard) = hear(&hears) {
            if let ToGuest::Signal(number) = heard {
                let signal = rustix::process::Signal::from_named_raw(number).unwrap();
                let _ = rustix::process::kill_process(pid, signal);
            }
        }
    });
    let output = child.wait_with_output().unwrap();
    for bytes in output.stdout.chunks(protocol::MAX_PAYLOAD) {
        tell(&stream, FromGuest::Stdout(bytes.into()));
    }
    if !output.stderr.is_empty() {
        tell(&stream, FromGuest::Stderr(output.stderr));
    }
    let exit = match (output.status.code(), std::os::unix::process::ExitStatusExt::signal(&output.status)) {
        (Some(code), _) => Exit::Code(code),
        (None, signal) => Exit::Signal(signal.unwrap()),
    };
    tell(&stream, FromGuest::Exit(exit));
    let _ = stream.shutdown(Shutdown::Both);
}

/// Says what it hears, until a q.
fn play_terminal(stream: UnixStream, command: &protocol::Exec) {
    let size = |size: protocol::Size| format!("<{}x{}>", size.rows, size.columns);
    let begin = command.terminal.map_or_else(|| "<none>".into(), size);
    let term = command.environment.get("TERM").map_or("", String::as_str);
    tell(&stream, FromGuest::Stdout(format!("{begin}{term}").into_bytes()));
    while let Some(heard) = hear(&stream) {
        let said = match heard {
            ToGuest::Stdin(bytes) if bytes == b"q" => {
                return tell(&stream, FromGuest::Exit(Exit::Code(5)));
            }
            ToGuest::Stdin(bytes) => format!("{bytes:?}"),
            ToGuest::StdinEnd => "<end>".into(),
            ToGuest::Window(window) => size(window),
            ToGuest::Signal(signal) => format!("<signal {signal}>"),
        };
        tell(&stream, FromGuest::Stdout(said.into_bytes()));
    }
}
