//! The server half: one thread, one epoll, a Unix socket and a handler for the requests.
//!
//! No client can hold up another: sockets do not block, buffers are bounded, and what stalls is closed. A request is
//! answered before the next is looked at, on whatever connection; there is no queue. The server does not decide
//! whether a request is legal: the handler does, and its time is everyone's.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{debug, error, info, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::counters::{Counters, count};
use crate::http::{self, Connection, HttpRequest, HttpResponse, Input};
use crate::json;
use crate::routes::{self, Method};
use crate::types::{Fault, Reply, Request};

/// Clients connected at the same time; one more is told so and closed. Firecracker's figure.
pub const MAX_CONNECTIONS: usize = 10;
/// Bytes read from a client at a time, so that one who sends much does not keep the others waiting.
const READ_SIZE: usize = 4096;
/// After the last reply on a connection, bytes that are read and thrown away. Closing with bytes unread would take
/// the reply from a client that is still sending.
const MAX_DISCARDED: usize = 1 << 20;

/// What a server allows its clients. The defaults are the API's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes; `--http-api-max-payload-size`.
    pub max_body: usize,
    /// How long a client may take to go on with a request that it began, or to take replies.
    pub stall: Duration,
    /// How long a connection may rest between requests. Long: clients keep connections for the life of a guest.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_body: http::DEFAULT_MAX_BODY,
            stall: Duration::from_secs(30),
            idle: Duration::from_secs(60 * 60),
        }
    }
}

/// A listening socket and its clients.
pub struct Server {
    limits: Limits,

    listener: UnixListener,
    stop: EventFd,
    epoll: Epoll,
    counters: Arc<Counters>,

    /// A client's place in here is the token of its events.
    clients: [Option<Client>; MAX_CONNECTIONS],
}

const LISTENER: u64 = MAX_CONNECTIONS as u64;
const STOP: u64 = LISTENER + 1;

impl Server {
    /// Creates the socket at `path`, where nothing may be yet. It is not removed at the end.
    ///
    /// # Errors
    /// Those of `socket`, `bind` and `listen`, and of making an epoll and an eventfd.
    pub fn bind(path: &Path, limits: Limits) -> io::Result<Server> {
        Server::from_listener(UnixListener::bind(path)?, limits)
    }

    /// Serves a socket that is already listening, such as one that was inherited.
    ///
    /// # Errors
    /// Those of making an epoll and an eventfd.
    pub fn from_listener(listener: UnixListener, limits: Limits) -> io::Result<Server> {
        listener.set_nonblocking(true)?;
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        // Edge-triggered: when no connection can be accepted for want of file descriptors, the next attempt is at the
        // next connection, and not at once and for ever.
        let incoming = EventSet::IN | EventSet::EDGE_TRIGGERED;
        watch(&epoll, ControlOperation::Add, listener.as_raw_fd(), incoming, LISTENER)?;
        watch(&epoll, ControlOperation::Add, stop.as_raw_fd(), EventSet::IN, STOP)?;
        let clients = Default::default();
        Ok(Server { limits, listener, stop, epoll, counters: Arc::default(), clients })
    }

    /// An event that ends [`run`](Server::run) when it is written to.
    ///
    /// # Errors
    /// That of duplicating a file descriptor.
    pub fn stop_event(&self) -> io::Result<EventFd> {
        self.stop.try_clone()
    }

    /// What has been asked so far.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// Serves until the stop event. Replies already given are still sent as far as clients take them at once.
    ///
    /// # Errors
    /// Those of the epoll itself. A client's end only its own connection.
    pub fn run(mut self, mut handler: impl FnMut(Request) -> Reply) -> io::Result<()> {
        info!("API server started.");
        let mut events = [EpollEvent::default(); MAX_CONNECTIONS + 2];
        loop {
            let ready = match self.epoll.wait(self.time_to_wait(), &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == ErrorKind::Interrupted => 0,
                Err(error) => return Err(error),
            };
            let mut stopped = false;
            for event in events.iter().take(ready) {
                match event.data() {
                    STOP => stopped = true,
                    LISTENER => self.accept(),
                    slot => self.serve(slot as usize, &mut handler),
                }
            }
            self.close_the_overdue();
            if stopped {
                debug!("API server stopped.");
                return Ok(());
            }
        }
    }

    fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return warn!("The API server cannot accept a connection: {error}."),
            }
        }
    }

    fn admit(&mut self, stream: UnixStream) {
        let Some((slot, place)) = self.clients.iter_mut().enumerate().find(|(_, place)| place.is_none())
        else {
            count(&self.counters.refused_connections);
            return refuse(stream);
        };
        let client = Client::new(stream, self.limits).and_then(|client| {
            watch(
                &self.epoll,
                ControlOperation::Add,
                client.stream.as_raw_fd(),
                client.interest,
                slot as u64,
            )?;
            Ok(client)
        });
        match client {
            Ok(client) => *place = Some(client),
            Err(error) => warn!("The API server cannot serve a new connection: {error}."),
        }
    }

    /// Goes on with one client as far as that is possible without waiting.
    fn serve(&mut self, slot: usize, handler: &mut impl FnMut(Request) -> Reply) {
        let Some(place) = self.clients.get_mut(slot) else { return };
        // None: it was closed by an earlier event of the same round.
        let Some(client) = place else { return };
        let outcome = client.go_on(self.limits, &self.counters, handler).and_then(|progress| {
            let interest = client.wanted_events();
            if progress == Progress::Open && interest != client.interest {
                client.interest = interest;
                watch(
                    &self.epoll,
                    ControlOperation::Modify,
                    client.stream.as_raw_fd(),
                    interest,
                    slot as u64,
                )?;
            }
            Ok(progress)
        });
        match outcome {
            Ok(Progress::Open) => {}
            // Dropping the stream takes it out of the epoll.
            Ok(Progress::Done) => *place = None,
            Err(error) => {
                debug!("An API connection ended: {error}.");
                *place = None;
            }
        }
    }

    /// Milliseconds until the first client is overdue; -1 without clients.
    fn time_to_wait(&self) -> i32 {
        let now = Instant::now();
        let first = self.clients.iter().flatten().map(|client| client.deadline).min();
        match first {
            // Rounded up, so that the deadline has passed when the wait ends.
            Some(deadline) => {
                i32::try_from(deadline.saturating_duration_since(now).as_millis() + 1).unwrap_or(i32::MAX)
            }
            None => -1,
        }
    }

    fn close_the_overdue(&mut self) {
        let now = Instant::now();
        for place in &mut self.clients {
            if place.as_ref().is_some_and(|client| client.deadline <= now) {
                debug!("An API connection was closed: its client did nothing for too long.");
                *place = None;
            }
        }
    }
}

/// Answers everything that a connection has received, as far as its client takes replies. No I/O of its own: the
/// whole of the API from bytes to bytes.
pub fn answer(connection: &mut Connection, counters: &Counters, handler: &mut impl FnMut(Request) -> Reply) {
    while let Some(input) = connection.next_input() {
        let response = match input {
            Input::Request(request) => answer_request(&request, counters, handler),
            Input::Error(error) => {
                count(&counters.unknown);
                let fault = Fault { status: error.status, message: error.message };
                respond(fault.into(), false)
            }
        };
        connection.respond(&response);
    }
}

fn answer_request(
    request: &HttpRequest,
    counters: &Counters,
    handler: &mut impl FnMut(Request) -> Reply,
) -> HttpResponse {
    let started = Instant::now();
    info!("The API server received a {}.", describe(request));
    let routed = routes::route(&request.method, &request.path, &request.body);
    let (reply, deprecated) = match routed {
        Ok(routed) => (handler(routed.request), routed.deprecated),
        Err(fault) => (Reply::Fault(fault), None),
    };
    if let Some(what) = deprecated {
        count(&counters.deprecated);
        warn!("{what}");
    }
    match (Method::parse(&request.method), routes::locate(&request.path)) {
        (Some(method), Some((endpoint, _))) => {
            let counter = counters.of(method, endpoint);
            count(&counter.requests);
            if matches!(reply, Reply::Fault(_)) {
                count(&counter.faults);
            }
        }
        _ => count(&counters.unknown),
    }
    let response = respond(reply, deprecated.is_some());
    debug!("Total previous API call duration: {} us.", started.elapsed().as_micros());
    response
}

fn respond(reply: Reply, deprecated: bool) -> HttpResponse {
    let (status, body) = json::write_reply(&reply);
    match &reply {
        Reply::Fault(fault) => {
            error!(
                "Received Error. Status code: {status} {}. Message: {}",
                http::reason(status),
                fault.message
            );
        }
        _ => {
            info!("The request was executed successfully. Status code: {status} {}.", http::reason(status));
        }
    }
    HttpResponse { status, body, deprecated }
}

/// For the log, in the form that Firecracker's users parse. A CPU configuration is long, and what is in the metadata
/// service is the guest's secret: these bodies are left out.
fn describe(request: &HttpRequest) -> String {
    let method = match Method::parse(&request.method) {
        Some(method) => format!("{method:?}"),
        None => request.method.clone(),
    };
    let HttpRequest { path, body, .. } = request;
    let private = ["cpu-config", "mmds"].contains(&path.trim_matches('/'));
    if body.is_empty() || private {
        return format!("{method} request on {path:?}");
    }
    format!("{method} request on {path:?} with body {:?}", String::from_utf8_lossy(body))
}

/// One client's socket and what has to be known to go on with it.
struct Client {
    stream: UnixStream,
    connection: Connection,
    /// What the epoll watches for.
    interest: EventSet,
    /// When it is closed if nothing happens before.
    deadline: Instant,
    /// Bytes thrown away after the last reply.
    discarded: usize,
    /// The last reply was sent, and the client was told that no more follow.
    finished: bool,
}

#[derive(PartialEq, Eq)]
enum Progress {
    Open,
    Done,
}

impl Client {
    fn new(stream: UnixStream, limits: Limits) -> io::Result<Client> {
        stream.set_nonblocking(true)?;
        Ok(Client {
            stream,
            connection: Connection::new(limits.max_body),
            interest: EventSet::IN,
            deadline: Instant::now() + limits.idle,
            discarded: 0,
            finished: false,
        })
    }

    /// Reads once, answers, writes, and answers what that made room for.
    ///
    /// # Errors
    /// Those of the socket: the client is gone.
    fn go_on(
        &mut self,
        limits: Limits,
        counters: &Counters,
        handler: &mut impl FnMut(Request) -> Reply,
    ) -> io::Result<Progress> {
        let was_busy = self.connection.is_busy();
        let mut progress = self.read()? && !was_busy;
        loop {
            answer(&mut self.connection, counters, handler);
            match self.write()? {
                0 => break,
                _ => progress = true,
            }
        }
        if self.connection.is_closed()
            && self.connection.output().is_empty()
            && self.finish()? == Progress::Done
        {
            return Ok(Progress::Done);
        }
        // More bytes of the same request are no progress: one byte a minute must not hold a place for ever.
        if progress {
            let limit = if self.connection.is_busy() || self.finished { limits.stall } else { limits.idle };
            self.deadline = Instant::now() + limit;
        }
        Ok(Progress::Open)
    }

    /// Reads at most [`READ_SIZE`] bytes if they are wanted. Returns whether there were any.
    fn read(&mut self) -> io::Result<bool> {
        if !self.connection.wants_input() {
            return Ok(false);
        }
        let mut buffer = [0; READ_SIZE];
        match self.stream.read(&mut buffer) {
            Ok(0) => {
                self.connection.input_ended();
                Ok(false)
            }
            Ok(count) => {
                self.connection.receive(buffer.get(..count).unwrap_or_default());
                Ok(true)
            }
            Err(error) if is_transient(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Returns how many bytes the client took.
    fn write(&mut self) -> io::Result<usize> {
        if self.connection.output().is_empty() {
            return Ok(0);
        }
        match self.stream.write(self.connection.output()) {
            Ok(count) => {
                self.connection.sent(count);
                Ok(count)
            }
            Err(error) if is_transient(&error) => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// After the last reply: says so, and waits for the client to close.
    fn finish(&mut self) -> io::Result<Progress> {
        if !self.finished {
            self.finished = true;
            self.stream.shutdown(Shutdown::Write)?;
        }
        let mut buffer = [0; READ_SIZE];
        while self.discarded < MAX_DISCARDED {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(Progress::Done),
                Ok(count) => self.discarded += count,
                Err(error) if is_transient(&error) => return Ok(Progress::Open),
                Err(error) => return Err(error),
            }
        }
        Ok(Progress::Done)
    }

    fn wanted_events(&self) -> EventSet {
        let mut events = EventSet::empty();
        if self.connection.wants_input() || self.finished {
            events |= EventSet::IN;
        }
        if !self.connection.output().is_empty() {
            events |= EventSet::OUT;
        }
        events
    }
}

/// Tells a client that there are too many, if it takes that at once.
fn refuse(mut stream: UnixStream) {
    warn!("The API server refused a connection: {MAX_CONNECTIONS} clients are connected.");
    let message =
        format!("{MAX_CONNECTIONS} clients are connected, which is the most; try again when one has closed.");
    let response = HttpResponse { status: 503, body: Some(json::write_fault(&message)), deprecated: false };
    let told = stream.set_nonblocking(true).and_then(|()| stream.write(&response.bytes(false)));
    if let Err(error) = told {
        debug!("A refused client was not told: {error}.");
    }
}

fn watch(
    epoll: &Epoll,
    operation: ControlOperation,
    fd: RawFd,
    events: EventSet,
    token: u64,
) -> io::Result<()> {
    epoll.ctl(operation, fd, EpollEvent::new(events, token))
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
