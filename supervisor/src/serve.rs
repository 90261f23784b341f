//! Clients: who they are, and what becomes of their requests. A thread for each, up to a number.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use api_socket::Fault;
use api_socket::fleet::routes::Log;
use api_socket::fleet::server::{self, Answer, Stream};
use api_socket::fleet::{List, Request, Version};
use api_socket::http::HttpResponse;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::feed::Heard;
use crate::fleet::{Fleet, User};
use crate::guest::Guest;
use crate::images::disk_fault;
use crate::state::State;
use crate::{metrics, spawn, usage, vmm_api};

/// Clients at the same time; one more is told so and closed.
pub const MAX_CLIENTS: usize = 256;
/// The same of one user who is not root, so that one cannot keep out the others.
pub const MAX_CLIENTS_OF_USER: usize = 64;
/// Places that only root may take: somebody must be able to look into it.
pub const ROOTS_PLACES: usize = 16;
/// Clients that are taken before others have their turn: who connects faster than that keeps nobody from anything.
const MAX_TURN: usize = 64;
/// The stack of a client's thread, in bytes: what it says is on the heap.
const STACK: usize = 256 << 10;
/// How often somebody who tells a stream looks whether it is still heard.
const LOOK: Duration = Duration::from_secs(1);
/// Between two attempts to reach a program in a guest.
const RETRY: Duration = Duration::from_millis(20);
/// How long a guest may leave what is typed untaken, before its client waits no more.
const TYPING: Duration = Duration::from_secs(30);
/// What is copied at a time, in bytes.
const COPY: usize = 64 << 10;

/// How many clients there are.
#[derive(Debug, Default)]
pub struct Clients {
    users: Mutex<BTreeMap<User, usize>>,
}

/// Takes those that have come, up to a turn. Whether there may be more.
pub fn accept(fleet: &Arc<Fleet>, clients: &Arc<Clients>, listener: &UnixListener) -> bool {
    for _ in 0..MAX_TURN {
        match listener.accept() {
            Ok((stream, _)) => admit(fleet, clients, stream),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
            Err(error) => {
                log::error!("No client can be accepted: {error}");
                return false;
            }
        }
    }
    true
}

fn admit(fleet: &Arc<Fleet>, clients: &Arc<Clients>, stream: UnixStream) {
    let user = match rustix::net::sockopt::socket_peercred(stream.as_fd()) {
        Ok(who) => who.uid.as_raw(),
        Err(error) => return log::error!("A client is nobody: {error}"),
    };
    let Some(place) = Place::take(clients, user) else { return refuse(&stream) };
    let client = match stream.try_clone() {
        Ok(client) => client,
        Err(error) => return log::error!("A client cannot be watched: {error}"),
    };
    let fleet = fleet.clone();
    let serve = move || {
        let _place = place;
        // A client's end is its own affair.
        let _ = server::serve(stream, |request, body| {
            handle(&fleet, user, &client, request, body).unwrap_or_else(Answer::Fault)
        });
    };
    if let Err(error) =
        thread::Builder::new().name(format!("client of {user}")).stack_size(STACK).spawn(serve)
    {
        log::error!("A client has no thread: {error}");
    }
}

/// One of the places for clients; given back when dropped.
struct Place {
    clients: Arc<Clients>,
    user: User,
}

impl Place {
    fn take(clients: &Arc<Clients>, user: User) -> Option<Place> {
        let mut users = clients.users.lock().unwrap_or_else(PoisonError::into_inner);
        let of_user = users.get(&user).copied().unwrap_or(0);
        let all: usize = users.values().sum();
        let is_full = match user {
            0 => all >= MAX_CLIENTS,
            _ => all >= MAX_CLIENTS - ROOTS_PLACES || of_user >= MAX_CLIENTS_OF_USER,
        };
        if is_full {
            return None;
        }
        users.insert(user, of_user + 1);
        Some(Place { clients: clients.clone(), user })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut users = self.clients.users.lock().unwrap_or_else(PoisonError::into_inner);
        match users.get_mut(&self.user) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                users.remove(&self.user);
            }
        }
    }
}

/// Without waiting for who is refused.
fn refuse(mut stream: &UnixStream) {
    let body = r#"{"fault_message":"Too many clients are connected; try again when some have gone."}"#;
    let response = HttpResponse { status: 503, body: Some(body.into()), deprecated: false };
    let _ = stream.set_nonblocking(true).and_then(|()| stream.write_all(&response.bytes(false)));
    let _ = stream.shutdown(Shutdown::Write);
}

fn handle<'a>(
    fleet: &'a Arc<Fleet>,
    user: User,
    client: &UnixStream,
    request: Request,
    body: &mut dyn Read,
) -> Result<Answer<'a>, Fault> {
    let find = |called: &str| fleet.find(user, called);
    let described = |guest: &Guest| Ok(Answer::json(&guest.describe()));
    match request {
        Request::GetVersion => {
            let version = env!("CARGO_PKG_VERSION").to_owned();
            Ok(Answer::json(&Version { version, pid: std::process::id() }))
        }
        Request::ListGuests => {
            let items = fleet.list(user).iter().map(|guest| guest.describe()).collect();
            Ok(Answer::json(&List { items }))
        }
        Request::CreateGuest(new) => described(&*fleet.create(user, new)?),
        Request::GetGuest(guest) => described(&*find(&guest)?),
        Request::UpdateGuest(guest, update) => {
            let guest = find(&guest)?;
            fleet.update(&guest, update)?;
            described(&guest)
        }
        Request::RemoveGuest { guest, force } => {
            fleet.remove_and_wait(&find(&guest)?, force)?;
            Ok(Answer::Empty)
        }
        Request::StartGuest(guest) => {
            let guest = find(&guest)?;
            fleet.start_and_wait(&guest)?;
            described(&guest)
        }
        Request::StopGuest(guest, stop) => {
            let guest = find(&guest)?;
            fleet.stop_and_wait(&guest, stop, &|| has_hung_up(client))?;
            described(&guest)
        }
        Request::PauseGuest(guest) => {
            let guest = find(&guest)?;
            fleet.set_paused(&guest, true)?;
            described(&guest)
        }
        Request::ResumeGuest(guest) => {
            let guest = find(&guest)?;
            fleet.set_paused(&guest, false)?;
            described(&guest)
        }
        Request::GuestStats(guest) => {
            let guest = find(&guest)?;
            must_have_process(&guest)?;
            Ok(Answer::json(&usage::of(&guest.places, &guest.name)))
        }
        Request::AllStats => {
            let guests = fleet.list(user);
            let running = guests.iter().filter(|guest| guest.state().has_process());
            let items = running.map(|guest| usage::of(&guest.places, &guest.name)).collect();
            Ok(Answer::json(&List { items }))
        }
        Request::Logs { guest, of, follow } => logs(find(&guest)?, of, follow),
        Request::Console(guest) => console(find(&guest)?),
        Request::Vsock { guest, port, wait_seconds } => {
            vsock(&*find(&guest)?, port, Duration::from_secs(wait_seconds.into()), client)
        }
        Request::Events => {
            let from = fleet.events.next();
            Ok(Answer::Stream(
                "application/x-ndjson",
                Box::new(move |stream| tell_events(fleet, user, from, stream)),
            ))
        }
        Request::Metrics => Ok(Answer::Text("text/plain; version=0.0.4", metrics::text(fleet, user))),
        Request::ListImages => Ok(Answer::json(&List { items: fleet.images(user)? })),
        Request::GetImage(image) => Ok(Answer::json(&fleet.image(user, &image)?)),
        Request::PutPart(image, part) => {
            fleet.images.receive(&image, user, part, body)?;
            Ok(Answer::Empty)
        }
        Request::PutImage(image, new) => Ok(Answer::json(&fleet.images.finish(&image, user, new)?)),
        Request::RemoveImage(image) => {
            fleet.remove_image(user, &image)?;
            Ok(Answer::Empty)
        }
    }
}

/// Who only has nothing more to say is still there.
fn has_hung_up(client: &UnixStream) -> bool {
    is_over(client, Some(&Timespec::default()))
}

/// Both directions of a connection have ended, or do within this time.
fn is_over(stream: &UnixStream, time: Option<&Timespec>) -> bool {
    // What is told without being asked for: POLLHUP, POLLERR.
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    loop {
        match poll(&mut fds, time) {
            Err(Errno::INTR) => {}
            outcome => return outcome.is_ok_and(|ready| ready > 0),
        }
    }
}

fn must_have_process(guest: &Guest) -> Result<(), Fault> {
    let (state, name) = (guest.state(), &guest.name);
    let message = match (state, guest.last_end()) {
        // Also one that is removed by now: whoever asks had it before.
        (State::Removing, Some(end)) => {
            format!("Guest {name} is removed. Its last end: {}: {}", end.outcome.as_str(), end.reason)
        }
        (State::Removing, None) => format!("Guest {name} is being removed."),
        _ if state.has_process() => return Ok(()),
        _ => format!("Guest {name} is {}; start it first.", state.on_the_wire().as_str()),
    };
    Err(Fault { status: 409, message })
}

fn logs(guest: Arc<Guest>, of: Log, follow: bool) -> Result<Answer<'static>, Fault> {
    let feed = match of {
        Log::Console => &guest.console,
        Log::Vmm => &guest.log,
    };
    let (kept, listener) =
        feed.listen().map_err(|error| disk_fault(&format!("The log of guest {}", guest.name), &error))?;
    let tell = move |stream: &mut Stream| {
        stream.tell(&kept)?;
        drop(kept);
        if !follow {
            return Ok(());
        }
        loop {
            match listener.hear(LOOK) {
                Heard::Bytes(bytes) => stream.tell(&bytes)?,
                // A guest that stays stopped says no more, and who follows it need not find that out.
                Heard::Nothing if stream.is_gone() || guest.state() == State::Stopped => return Ok(()),
                Heard::Nothing => {}
                Heard::Over => return Ok(()),
            }
        }
    };
    Ok(Answer::Stream("text/plain; charset=utf-8", Box::new(tell)))
}

fn tell_events(fleet: &Fleet, user: User, from: u64, stream: &mut Stream) -> io::Result<()> {
    let mut next = from;
    loop {
        let events = fleet.events.since(next, LOOK);
        if events.is_empty() && stream.is_gone() {
            return Ok(());
        }
        for (owner, event) in events {
            next = event.number + 1;
            if user == 0 || user == owner {
                let mut line = serde_json::to_vec(&event)?;
                line.push(b'\n');
                stream.tell(&line)?;
            }
        }
    }
}

/// What the guest says goes to the client as it comes, and what the client says to the guest as it takes it.
fn console(guest: Arc<Guest>) -> Result<Answer<'static>, Fault> {
    must_have_process(&guest)?;
    let (_, listener) = guest
        .console
        .listen()
        .map_err(|error| disk_fault(&format!("The console of guest {}", guest.name), &error))?;
    let talk = move |stream: UnixStream, early: Vec<u8>| {
        let Ok(mut from) = stream.try_clone() else { return };
        let (hears, typed_in) = (listener.clone(), guest.clone());
        let types = thread::Builder::new().name("keyboard".into()).stack_size(STACK).spawn(move || {
            let _ = type_in(&typed_in, &early).and_then(|()| {
                let mut buffer = [0; 4096];
                loop {
                    match from.read(&mut buffer) {
                        Ok(0) => return Ok(()),
                        Ok(count) => type_in(&typed_in, buffer.get(..count).unwrap_or_default())?,
                        Err(error) if error.kind() == ErrorKind::Interrupted => {}
                        Err(error) => return Err(error),
                    }
                }
            });
            hears.wake();
        });
        let Ok(types) = types else { return };
        let _ = stream.set_write_timeout(Some(TYPING));
        loop {
            match listener.hear(LOOK) {
                Heard::Bytes(bytes) => {
                    if (&stream).write_all(&bytes).is_err() {
                        break;
                    }
                }
                Heard::Nothing if guest.state().has_process() => {}
                Heard::Nothing | Heard::Over => break,
            }
        }
        let _ = stream.shutdown(Shutdown::Both);
        // Whose place is this one's as long.
        let _ = types.join();
    };
    Ok(Answer::Upgrade(Box::new(talk)))
}

/// Into the guest's console, which takes some hundred bytes at a time. It is opened each time: one that reboots has another.
fn type_in(guest: &Guest, mut typed: &[u8]) -> io::Result<()> {
    let begin = Instant::now();
    while !typed.is_empty() {
        match spawn::keyboard(&guest.places).and_then(|mut keyboard| keyboard.write(typed)) {
            Ok(count) => typed = typed.get(count..).unwrap_or_default(),
            // It is full, or not there yet.
            Err(_) if begin.elapsed() < TYPING && guest.state().has_process() => thread::sleep(RETRY),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn vsock(
    guest: &Guest,
    port: u32,
    patience: Duration,
    client: &UnixStream,
) -> Result<Answer<'static>, Fault> {
    let begin = Instant::now();
    let guests = loop {
        must_have_process(guest)?;
        match vmm_api::vsock(&guest.places, guest.uid, port) {
            Ok(stream) => break stream,
            // Nobody listens yet, or the VMM has no socket yet.
            Err(_) if begin.elapsed() < patience && !has_hung_up(client) => thread::sleep(RETRY),
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                let paused = if guest.state() == State::Paused { " It is paused." } else { "" };
                let message = format!(
                    "Nobody listens at port {port} of guest {}{}.{paused}",
                    guest.name,
                    if port == agent::protocol::PORT {
                        ": its agent has not started yet, or it is no Linux that starts with an initramfs"
                    } else {
                        ""
                    }
                );
                return Err(Fault { status: 504, message });
            }
            Err(error) => {
                let message = format!("Port {port} of guest {} cannot be reached: {error}.", guest.name);
                return Err(Fault { status: 504, message });
            }
        }
    };
    Ok(Answer::Upgrade(Box::new(move |stream, early| {
        let _ = join(stream, guests, &early);
    })))
}

/// Both ways, until both have ended. Each direction ends on its own; a client that is gone ends the other too.
fn join(client: UnixStream, guest: UnixStream, early: &[u8]) -> io::Result<()> {
    guest.set_write_timeout(Some(LOOK))?;
    write_while_heard(&guest, early, &client)?;
    let (from_client, to_guest) = (client.try_clone()?, guest.try_clone()?);
    let says = thread::Builder::new().name("to guest".into()).stack_size(STACK).spawn(move || {
        match pass(&from_client, &to_guest, &from_client) {
            // It may be gone long before the guest has something to say to it, and finds out.
            Ok(()) => drop(is_over(&from_client, None)),
            Err(_) => drop(from_client.shutdown(Shutdown::Both)),
        }
        let _ = to_guest.shutdown(Shutdown::Both);
    })?;
    let outcome = pass(&guest, &client, &client);
    if outcome.is_err() {
        let _ = guest.shutdown(Shutdown::Both);
        let _ = client.shutdown(Shutdown::Both);
    }
    // As long as the connection has a thread it has a client's place.
    let _ = says.join();
    outcome
}

fn pass(mut from: &UnixStream, to: &UnixStream, client: &UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; COPY];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return to.shutdown(Shutdown::Write),
            Ok(count) => write_while_heard(to, buffer.get(..count).unwrap_or_default(), client)?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Waits for who does not read as long as the client is there, whose place it takes: `to` gives up a write after a while.
fn write_while_heard(mut to: &UnixStream, mut bytes: &[u8], client: &UnixStream) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock && !has_hung_up(client) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use api_socket::fleet::{End, Outcome};

    use super::*;
    use crate::testing::{self, ID};

    #[test]
    fn one_user_cannot_take_all_places_and_root_always_finds_one() {
        let clients = Arc::new(Clients::default());
        let take = |user| Place::take(&clients, user);
        let first: Vec<_> = (0..MAX_CLIENTS).filter_map(|_| take(1)).collect();
        assert_eq!(first.len(), MAX_CLIENTS_OF_USER);
        let others: Vec<_> = (2..MAX_CLIENTS as User).filter_map(take).collect();
        assert_eq!(first.len() + others.len(), MAX_CLIENTS - ROOTS_PLACES);
        let roots: Vec<_> = (0..MAX_CLIENTS).filter_map(|_| take(0)).collect();
        assert_eq!(roots.len(), ROOTS_PLACES);
        drop(first);
        assert!(take(0).is_some() && take(1).is_some());
        drop((others, roots));
        assert_eq!(clients.users.lock().unwrap().values().sum::<usize>(), 0);
        assert!(clients.users.lock().unwrap().is_empty());
    }

    #[test]
    fn what_two_say_to_each_other_arrives_and_each_direction_ends_on_its_own() {
        let ((ours, client), (theirs, guest)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let joined = thread::spawn(move || join(client, guest, b"early "));
        (&ours).write_all(b"and late").unwrap();
        ours.shutdown(Shutdown::Write).unwrap();
        let mut heard = String::new();
        (&theirs).read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "early and late");
        (&theirs).write_all(b"answer").unwrap();
        drop(theirs);
        heard.clear();
        (&ours).read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "answer");
        assert!(joined.join().unwrap().is_ok());
    }

    #[test]
    fn a_connection_has_its_place_as_long_as_it_has_a_thread() {
        let ((ours, client), (theirs, guest)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let joined = thread::spawn(move || join(client, guest, b""));
        drop(theirs);
        // Its end has come here, and the client may still speak.
        assert_eq!((&ours).read(&mut [0]).unwrap(), 0);
        thread::sleep(Duration::from_millis(50));
        assert!(!joined.is_finished());
        drop(ours);
        assert!(joined.join().unwrap().is_ok());
    }

    #[test]
    fn a_guest_that_keeps_silent_does_not_keep_the_place_of_a_client_that_is_gone() {
        let ((ours, client), (theirs, guest)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let joined = thread::spawn(move || join(client, guest, b""));
        ours.shutdown(Shutdown::Write).unwrap();
        assert_eq!((&theirs).read(&mut [0]).unwrap(), 0);
        thread::sleep(Duration::from_millis(50));
        assert!(!joined.is_finished());
        drop(ours);
        assert!(joined.join().unwrap().is_ok());
        drop(theirs);
    }

    #[test]
    fn nobody_waits_for_an_agent_on_behalf_of_a_client_that_is_gone() {
        let (_place, fleet) = testing::fleet();
        let guest = testing::guest(&fleet, ID, |record| record.state = State::Running);
        let (ours, client) = UnixStream::pair().unwrap();
        ours.shutdown(Shutdown::Write).unwrap();
        assert!(!has_hung_up(&client));
        let begin = Instant::now();
        assert!(vsock(&guest, 1, Duration::from_millis(100), &client).is_err());
        assert!(begin.elapsed() >= Duration::from_millis(100));
        drop(ours);
        assert!(vsock(&guest, 1, Duration::from_secs(600), &client).is_err());
        assert!(begin.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn nobody_waits_for_an_agent_of_a_guest_that_is_removed() {
        let (_place, fleet) = testing::fleet();
        let end = End { at: 1.0, outcome: Outcome::GuestCrashed, reason: "it panicked".into() };
        let guest = testing::guest(&fleet, ID, |record| {
            (record.state, record.last_end) = (State::Removing, Some(end.clone()));
        });
        let (_ours, client) = UnixStream::pair().unwrap();
        let begin = Instant::now();
        let fault = vsock(&guest, 1, Duration::from_secs(600), &client).err().unwrap();
        assert!(begin.elapsed() < Duration::from_secs(60));
        assert!(fault.status == 409 && fault.message.contains("it panicked"), "{fault}");
    }

    #[test]
    fn what_is_typed_reaches_a_guest_that_has_rebooted() {
        let (_place, fleet) = testing::fleet();
        let guest = testing::guest(&fleet, ID, |record| record.state = State::Running);
        for _ in 0..2 {
            let types = guest.clone();
            let typed = thread::spawn(move || type_in(&types, b"words"));
            thread::sleep(Duration::from_millis(50));
            // Here a new process is made.
            let _ = std::fs::remove_dir_all(&guest.places.run);
            std::fs::create_dir(&guest.places.run).unwrap();
            let path = guest.places.run.join("console.in");
            let mode = rustix::fs::Mode::from_raw_mode(0o600);
            rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
            let mut console = std::fs::File::options().read(true).write(true).open(&path).unwrap();
            let mut heard = [0; 5];
            console.read_exact(&mut heard).unwrap();
            assert_eq!(&heard, b"words");
            typed.join().unwrap().unwrap();
        }
        guest.lock().record.state = State::Stopped;
        std::fs::remove_dir_all(&guest.places.run).unwrap();
        assert!(type_in(&guest, b"words").is_err());
    }
}
