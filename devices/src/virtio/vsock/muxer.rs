//! All connections of a device: which socket is which pair of ports, whose turn it is, who has waited too long.
//!
//! The host's sockets are watched behind one epoll descriptor, so that a device has one source for all of them, and each
//! only for what matters now ([`Connection::interest`]): nothing that cannot go on is reported over and over. Knows no
//! queue: packets come and go as chains.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{self, ErrorKind};
use std::ops::Bound;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use crate::memory::GuestRam;
use crate::virtio::queue::{Chain, QueueError};
use crate::virtio::running::{Step, count};
use crate::virtio::vsock::connection::{Connection, Greeting, Outgoing, Stage, Verdict};
use crate::virtio::vsock::packet::{HEADER_BYTES, HOST_CID, Header, PORT_ANY, TYPE_STREAM, op};
use crate::virtio::vsock::{Connect, Counters};

/// Most connections at a time, in whatever stage. Each has one descriptor; a jailed process has 2048.
pub const MAX_CONNECTIONS: usize = 1024;

/// Most resets that wait for room in the guest. With so many, its packets are left where they are.
pub const MAX_RESETS: usize = 256;

/// How long a step of the protocol may take: a host's program to say what it wants, the guest to take a call or to
/// confirm an end. Guests can be slow; Linux itself waits 2 s for the first and 8 s for the last.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// After accepting failed, for want of descriptors or memory.
const ACCEPT_AGAIN: Duration = Duration::from_millis(500);

/// Sockets looked at, and connections accepted, in one turn.
const EVENTS_PER_TURN: usize = 64;

/// The ports that the host's programs call from, taken in turn. Far from those that services have.
pub const FIRST_HOST_PORT: u32 = 1 << 30;
pub const LAST_HOST_PORT: u32 = (1 << 31) - 1;

/// The two ports that name a connection. Until a host's program has said which port of the guest it wants, and after the
/// guest has done with the connection, `guest` is [`PORT_ANY`], which no packet can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    host: u32,
    guest: u32,
}

/// Stands for the listening socket where connections have theirs.
const LISTENER: Key = Key { host: PORT_ANY, guest: PORT_ANY };

impl Key {
    fn to_token(self) -> u64 {
        u64::from(self.host) << 32 | u64::from(self.guest)
    }

    fn from_token(token: u64) -> Key {
        Key { host: (token >> 32) as u32, guest: token as u32 }
    }
}

/// A connection, and what the muxer has arranged for it.
struct Entry {
    connection: Connection,
    /// What its socket is watched for.
    watched: Option<EventSet>,
    /// When it has waited too long in the stage for which this was set.
    deadline: Option<Instant>,
    stage: Stage,
}

/// See the module.
pub struct Muxer {
    guest_cid: u64,
    listener: UnixListener,
    connect: Connect,
    counters: Arc<Counters>,

    sockets: Epoll,
    timer: TimerFd,
    timer_set_for: Option<Instant>,

    connections: BTreeMap<Key, Entry>,
    next_host_port: u32,
    /// The listening socket is watched.
    listening: bool,
    /// It is to be watched when the device is called next.
    is_listen_due: bool,
    deadlines: BTreeSet<(Instant, Key)>,
    /// Those with something for the guest, and who had the last turn.
    ready: BTreeSet<Key>,
    last_turn: Key,
    /// Answers to packets of no connection, and ends of connections that are forgotten.
    resets: VecDeque<Header>,
    /// A packet of the guest was left in its queue since there were too many of those.
    held_back: bool,
    /// Connections whose watches and deadlines may have to change.
    touched: Vec<Key>,
}

impl Muxer {
    /// With no connection. `next_host_port` is that of a device whose place it takes.
    pub fn new(
        guest_cid: u64,
        listener: UnixListener,
        connect: Connect,
        counters: Arc<Counters>,
        next_host_port: u32,
    ) -> io::Result<Muxer> {
        listener.set_nonblocking(true)?;
        Ok(Muxer {
            guest_cid,
            listener,
            connect,
            counters,
            sockets: Epoll::new()?,
            timer: TimerFd::new()?,
            timer_set_for: None,
            connections: BTreeMap::new(),
            next_host_port: next_host_port.clamp(FIRST_HOST_PORT, LAST_HOST_PORT),
            listening: false,
            is_listen_due: false,
            deadlines: BTreeSet::new(),
            ready: BTreeSet::new(),
            last_turn: LISTENER,
            resets: VecDeque::new(),
            held_back: false,
            touched: Vec::new(),
        })
    }

    /// Readable when [`Muxer::sockets_ready`] has something to do.
    pub fn sockets_fd(&self) -> RawFd {
        self.sockets.as_raw_fd()
    }

    /// Readable when [`Muxer::time_is_up`] has something to do.
    pub fn timer_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    pub fn next_host_port(&self) -> u32 {
        self.next_host_port
    }

    /// There is something for the guest.
    pub fn has_outgoing(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Whether a packet was left in the guest's queue that can be taken now. Once.
    pub fn was_held_back(&mut self) -> bool {
        self.resets.len() < MAX_RESETS && std::mem::take(&mut self.held_back)
    }

    /// The host's programs can connect.
    pub fn listen(&mut self) {
        self.drop_deadline(LISTENER);
        if !self.listening {
            let event = EpollEvent::new(EventSet::IN, LISTENER.to_token());
            match self.sockets.ctl(ControlOperation::Add, self.listener.as_raw_fd(), event) {
                Ok(()) => self.listening = true,
                Err(error) => self.complain("the listening socket cannot be watched", &error),
            }
        }
    }

    /// The same from the next [`Muxer::let_in`] on: a guest resets its device on a thread that may not begin to watch anything.
    pub fn listen_soon(&mut self) {
        self.is_listen_due = !self.listening;
    }

    /// Lets the host's programs in, if they are to be.
    pub fn let_in(&mut self) {
        if std::mem::take(&mut self.is_listen_due) {
            self.listen();
        }
    }

    /// The host's programs have to wait for so long, or until [`Muxer::listen`].
    pub fn listen_after(&mut self, wait: Duration) {
        if std::mem::take(&mut self.listening) {
            // It was added, so it can be deleted.
            let _ = self.sockets.ctl(ControlOperation::Delete, self.listener.as_raw_fd(), no_event());
        }
        self.drop_deadline(LISTENER);
        self.deadlines.insert((Instant::now() + wait, LISTENER));
    }

    /// The device runs again: nobody is to blame for the time that has passed.
    pub fn resume(&mut self) {
        let now = Instant::now();
        self.deadlines = std::mem::take(&mut self.deadlines)
            .into_iter()
            .map(|(_, key)| {
                let deadline = now + PATIENCE;
                self.connections.get_mut(&key).into_iter().for_each(|entry| entry.deadline = Some(deadline));
                (deadline, key)
            })
            .collect();
        self.settle();
    }

    /// The driver is a new one, which knows of no connection.
    pub fn forget(&mut self) {
        count(&self.counters.conns_removed, self.connections.len() as u64);
        self.connections.clear();
        self.deadlines.retain(|(_, key)| *key == LISTENER);
        self.ready.clear();
        self.resets.clear();
        self.touched.clear();
        self.held_back = false;
    }

    /// Takes the guest's packet in `chain`.
    pub fn take(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<Step, QueueError> {
        if self.resets.len() >= MAX_RESETS {
            self.held_back = true;
            return Ok(Step::Later);
        }
        count(&self.counters.tx_packets_count, 1);
        // Too short for a header, or from somebody else: there is nobody to answer.
        let header = Header::take(memory, &mut chain.readable)?;
        let Some(header) = header.filter(|header| header.src_cid == self.guest_cid) else {
            count(&self.counters.tx_invalid_packets, 1);
            return Ok(Step::Used(0));
        };
        let key = Key { host: header.dst_port, guest: header.src_port };
        let addressed = header.dst_cid == HOST_CID && header.kind == TYPE_STREAM && key.guest != PORT_ANY;
        match self.connections.get_mut(&key).filter(|_| addressed) {
            // Its length is a number of the guest's, the chain is what there is (CVE-2019-18960).
            Some(entry) if header.op != op::REQUEST && header.len <= chain.readable.bytes() => {
                let payload = chain.readable.take(header.len as usize)?;
                let verdict = entry.connection.packet(memory, &header, payload, key.host, &self.counters)?;
                self.judge(key, verdict);
            }
            Some(_) => {
                count(&self.counters.tx_invalid_packets, 1);
                self.judge(key, Verdict::Reset);
            }
            None if addressed && header.op == op::REQUEST => self.request(key, &header),
            None if header.op == op::RST => {}
            None => self.resets.push_back(header.reset()),
        }
        Ok(Step::Used(0))
    }

    /// Fills `chain` with the next packet for the guest.
    pub fn give(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<Step, QueueError> {
        if chain.writable.bytes() as usize <= HEADER_BYTES {
            count(&self.counters.rx_invalid_buffers, 1);
            return Ok(Step::Used(0));
        }
        let mut front = chain.writable.take(HEADER_BYTES)?;
        let Some(header) = self.next(memory, chain)? else { return Ok(Step::Later) };
        front.write(memory, &header.to_bytes())?;
        count(&self.counters.rx_packets_count, 1);
        Ok(Step::Used(HEADER_BYTES as u32 + header.len))
    }

    /// Sockets of the host are ready: looks at some of them.
    pub fn sockets_ready(&mut self) {
        let mut events = [EpollEvent::default(); EVENTS_PER_TURN];
        let ready = match self.sockets.wait(0, &mut events) {
            Ok(ready) => ready,
            Err(error) if error.kind() == ErrorKind::Interrupted => return,
            Err(error) => return self.complain("the host's sockets cannot be waited for", &error),
        };
        for event in events.iter().take(ready) {
            match Key::from_token(event.data()) {
                LISTENER => self.accept(),
                key => self.socket_ready(key, event.event_set()),
            }
        }
    }

    /// The timer has run out: ends what has waited too long.
    pub fn time_is_up(&mut self) {
        self.timer_set_for = None;
        if let Err(error) = self.timer.clear() {
            self.complain("the timer cannot be stopped", &error.into());
        }
        let now = Instant::now();
        while let Some(&(deadline, key)) = self.deadlines.first() {
            if deadline > now {
                break;
            }
            self.deadlines.pop_first();
            if key == LISTENER {
                self.listen();
            } else if let Some(entry) = self.connections.get_mut(&key) {
                entry.deadline = None;
                count(&self.counters.conns_killed, 1);
                self.judge(key, Verdict::Reset);
            }
        }
    }

    /// Brings watches and deadlines in line with what has happened. At the end of every call of the device.
    pub fn settle(&mut self) {
        for key in std::mem::take(&mut self.touched) {
            self.settle_one(key);
        }
        let next = self.deadlines.first().map(|(deadline, _)| *deadline);
        if let Some(next) = next
            && self.timer_set_for.is_none_or(|set_for| next < set_for)
        {
            // Not zero, which would stop the timer.
            let wait = next.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            match self.timer.reset(wait, None) {
                Ok(()) => self.timer_set_for = Some(next),
                Err(error) => self.complain("the timer cannot be set", &error.into()),
            }
        }
    }

    /// The guest asks for a connection.
    fn request(&mut self, key: Key, header: &Header) {
        if self.connections.len() >= MAX_CONNECTIONS {
            self.complain("a call of the guest is refused", &too_many());
            return self.resets.push_back(header.reset());
        }
        match (self.connect)(key.host) {
            Ok(stream) => self.add(key, Connection::accepted(stream, header)),
            Err(error) => {
                log::debug!("vsock: nobody serves port {}: {error}", key.host);
                self.resets.push_back(header.reset());
            }
        }
    }

    /// The next packet: resets first, since they make room for the guest's packets; then the connections in turn.
    fn next(&mut self, memory: &GuestRam, chain: &Chain) -> Result<Option<Header>, QueueError> {
        loop {
            if let Some(reset) = self.resets.pop_front() {
                return Ok(Some(reset));
            }
            let after = (Bound::Excluded(self.last_turn), Bound::Unbounded);
            let Some(&key) = self.ready.range(after).next().or_else(|| self.ready.first()) else {
                return Ok(None);
            };
            self.last_turn = key;
            let Some(entry) = self.connections.get_mut(&key) else {
                self.ready.remove(&key);
                continue;
            };
            let outgoing = entry.connection.outgoing(memory, &chain.writable, &self.counters)?;
            let header = match outgoing {
                Outgoing::Packet { op, flags, len } => {
                    let (buf_alloc, fwd_cnt) = entry.connection.tell_credit();
                    let guest_cid = self.guest_cid;
                    Some(Header { flags, len, buf_alloc, fwd_cnt, ..address(guest_cid, key, op) })
                }
                Outgoing::Nothing | Outgoing::Reset => None,
            };
            self.judge(key, if outgoing == Outgoing::Reset { Verdict::Reset } else { Verdict::Live });
            if header.is_some() {
                return Ok(header);
            }
        }
    }

    fn socket_ready(&mut self, key: Key, set: EventSet) {
        let Some(entry) = self.connections.get_mut(&key) else { return };
        if entry.connection.stage() == Stage::Greeting {
            return self.greet(key);
        }
        let verdict = entry.connection.host_event(set, &self.counters);
        self.judge(key, verdict);
    }

    fn accept(&mut self) {
        for _ in 0..EVENTS_PER_TURN {
            match self.listener.accept() {
                // One too many is closed, so that its program knows.
                Ok(_) if self.connections.len() >= MAX_CONNECTIONS => {
                    self.complain("a connection to the listening socket is closed", &too_many());
                }
                Ok((stream, _)) => match stream.set_nonblocking(true) {
                    Ok(()) => {
                        let key = Key { host: self.free_host_port(), guest: PORT_ANY };
                        self.add(key, Connection::greeting(stream));
                    }
                    Err(error) => self.complain("a connection cannot be used", &error),
                },
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error)
                    if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(error) => {
                    // The socket would be ready for ever.
                    self.complain("connections cannot be accepted", &error);
                    return self.listen_after(ACCEPT_AGAIN);
                }
            }
        }
    }

    /// Hears whom a program of the host wants, and calls the guest.
    fn greet(&mut self, key: Key) {
        let Some(entry) = self.connections.get_mut(&key) else { return };
        match entry.connection.greet() {
            Greeting::Incomplete => {}
            // A guest may use our port meanwhile, which does not do it good.
            Greeting::Port(guest) if !self.connections.contains_key(&Key { guest, ..key }) => {
                if let Some(mut connection) = self.remove(key) {
                    connection.call();
                    self.insert(Key { guest, ..key }, connection);
                }
            }
            Greeting::Port(_) | Greeting::Wrong => {
                log::debug!("vsock: a program of the host did not say CONNECT and a port");
                self.judge(key, Verdict::Gone);
            }
        }
    }

    fn add(&mut self, key: Key, connection: Connection) {
        count(&self.counters.conns_added, 1);
        self.insert(key, connection);
    }

    /// A port that no connection has; as often as there are connections it may be one that some has.
    fn free_host_port(&mut self) -> u32 {
        loop {
            let host = self.next_host_port;
            self.next_host_port = if host >= LAST_HOST_PORT { FIRST_HOST_PORT } else { host + 1 };
            let (first, last) = (Key { host, guest: 0 }, Key { host, guest: PORT_ANY });
            if self.connections.range(first..=last).next().is_none() {
                return host;
            }
        }
    }

    /// Puts a connection into its place, which is free.
    fn insert(&mut self, key: Key, connection: Connection) {
        let event = EpollEvent::new(EventSet::empty(), key.to_token());
        let added = self.sockets.ctl(ControlOperation::Add, connection.fd(), event);
        let stage = connection.stage();
        let watched = added.is_ok().then(EventSet::empty);
        self.connections.insert(key, Entry { connection, watched, deadline: None, stage });
        self.set_deadline(key, stage);
        let verdict = match added {
            Ok(()) => Verdict::Live,
            Err(error) => {
                self.complain("a connection cannot be watched", &error);
                Verdict::Reset
            }
        };
        self.judge(key, verdict);
    }

    fn remove(&mut self, key: Key) -> Option<Connection> {
        self.ready.remove(&key);
        self.drop_deadline(key);
        let Entry { connection, watched, .. } = self.connections.remove(&key)?;
        if watched.is_some() {
            // It was added, so it can be deleted.
            let _ = self.sockets.ctl(ControlOperation::Delete, connection.fd(), no_event());
        }
        Some(connection)
    }

    fn judge(&mut self, key: Key, verdict: Verdict) {
        let Some(entry) = self.connections.get(&key) else { return };
        if verdict == Verdict::Live {
            match entry.connection.has_outgoing() {
                true => self.ready.insert(key),
                false => self.ready.remove(&key),
            };
            return self.touched.push(key);
        }
        if verdict != Verdict::Gone && entry.connection.is_known_to_guest() {
            self.resets.push_back(address(self.guest_cid, key, op::RST));
        }
        let Some(mut connection) = self.remove(key) else { return };
        if verdict == Verdict::Linger {
            connection.linger();
            let key = Key { host: self.free_host_port(), guest: PORT_ANY };
            return self.insert(key, connection);
        }
        count(&self.counters.conns_removed, 1);
    }

    fn settle_one(&mut self, key: Key) {
        let Some(entry) = self.connections.get_mut(&key) else { return };
        let interest = entry.connection.interest();
        if interest != entry.watched {
            let operation = match (entry.watched, interest) {
                (None, _) => ControlOperation::Add,
                (_, None) => ControlOperation::Delete,
                _ => ControlOperation::Modify,
            };
            let event = EpollEvent::new(interest.unwrap_or(EventSet::empty()), key.to_token());
            let done = self.sockets.ctl(operation, entry.connection.fd(), event);
            entry.watched = interest;
            if let Err(error) = done {
                self.complain("a connection cannot be watched", &error);
                return self.judge(key, Verdict::Reset);
            }
        }
        let Some(entry) = self.connections.get_mut(&key) else { return };
        let stage = entry.connection.stage();
        if std::mem::replace(&mut entry.stage, stage) != stage {
            self.set_deadline(key, stage);
        }
    }

    /// Who waits for the other side has a deadline.
    fn set_deadline(&mut self, key: Key, stage: Stage) {
        self.drop_deadline(key);
        let waits = matches!(stage, Stage::Greeting | Stage::Calling | Stage::Closing);
        if waits && let Some(entry) = self.connections.get_mut(&key) {
            let deadline = Instant::now() + PATIENCE;
            entry.deadline = Some(deadline);
            self.deadlines.insert((deadline, key));
        }
    }

    fn drop_deadline(&mut self, key: Key) {
        if key == LISTENER {
            self.deadlines.retain(|(_, key)| *key != LISTENER);
        } else if let Some(deadline) = self.connections.get_mut(&key).and_then(|entry| entry.deadline.take())
        {
            self.deadlines.remove(&(deadline, key));
        }
    }

    /// Whatever has a deadline has reached it.
    #[cfg(test)]
    pub fn time_passes(&mut self) {
        let now = Instant::now();
        self.deadlines = std::mem::take(&mut self.deadlines).into_iter().map(|(_, key)| (now, key)).collect();
        self.connections
            .values_mut()
            .filter(|entry| entry.deadline.is_some())
            .for_each(|entry| entry.deadline = Some(now));
    }

    fn complain(&self, what: &str, error: &io::Error) {
        count(&self.counters.muxer_event_fails, 1);
        log::warn!("vsock: {what}: {error}");
    }
}

fn address(guest_cid: u64, key: Key, op: u16) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: guest_cid,
        src_port: key.host,
        dst_port: key.guest,
        kind: TYPE_STREAM,
        op,
        ..Header::default()
    }
}

fn too_many() -> io::Error {
    io::Error::other(format!("there are {MAX_CONNECTIONS} connections already"))
}

fn no_event() -> EpollEvent {
    EpollEvent::new(EventSet::empty(), 0)
}
