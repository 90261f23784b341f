//! One connection to a back-end: what it has told of itself, what it was asked, and which replies are still to come.
//!
//! Never waits, but for [`Session::open`]: requests go into the socket's buffer, which holds more than are ever under way,
//! and replies are taken when they are there. Replies come in the order of their requests. Knows no queue and no device,
//! and does not connect again.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read};
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::message::{
    self, F_PROTOCOL_FEATURES, Inbox, Lie, READ_BYTES, Region, Reply, RingAddress, protocol, request,
};

/// How long a back-end may take to answer what it has at hand: who it is, a new configuration, that a ring is started.
pub const REPLY_LIMIT: Duration = Duration::from_secs(5);

/// Connects to the back-end. Does not block, and neither does the socket.
pub type Connect = Box<dyn Fn() -> io::Result<UnixStream> + Send>;

/// See the module.
#[derive(Debug)]
pub struct Session {
    socket: UnixStream,
    inbox: Inbox,
    expected: VecDeque<Expected>,
    config_bytes: usize,
    begun: Instant,
    facts: Facts,
    introduced: bool,
}

/// What the back-end has told of itself.
#[derive(Clone, Debug, Default)]
struct Facts {
    features: u64,
    protocol: u64,
    queues: u64,
    config: Vec<u8>,
    /// How long it took it.
    took: Duration,
}

/// What the next reply is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Features,
    Protocol,
    Queues,
    Config,
    /// That this request was done.
    Done(u32),
    RingBase,
}

/// A ring that is handed over.
#[derive(Clone, Copy, Debug)]
pub struct RingPlan {
    pub index: u16,
    pub size: u16,
    pub address: RingAddress,
    pub kick: RawFd,
    pub call: RawFd,
}

impl Session {
    /// Begins a connection: asks the back-end who it is. `config_bytes` of its configuration space are wanted.
    pub fn begin(socket: UnixStream, config_bytes: usize) -> Result<Session, Lost> {
        let mut session = Session {
            socket,
            inbox: Inbox::default(),
            expected: VecDeque::new(),
            config_bytes,
            begun: Instant::now(),
            facts: Facts::default(),
            introduced: false,
        };
        session.ask(request::GET_FEATURES, &[], Expected::Features)?;
        Ok(session)
    }

    /// As [`Session::begin`], and waits for the answers, at most [`REPLY_LIMIT`].
    pub fn open(socket: UnixStream, config_bytes: usize) -> Result<Session, Lost> {
        let mut session = Session::begin(socket, config_bytes)?;
        let deadline = Instant::now() + REPLY_LIMIT;
        let ready = Epoll::new()?;
        ready.ctl(ControlOperation::Add, session.fd(), EpollEvent::new(EventSet::IN, 0))?;
        while !session.introduced {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Lost::Silent(REPLY_LIMIT));
            }
            match ready.wait(wait_ms(left), &mut [EpollEvent::default()]) {
                Ok(_) => session.receive().map(drop)?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(session)
    }

    /// To a back-end that had these features and no protocol features beside what is needed, and is dead.
    #[cfg(any(test, feature = "testing"))]
    pub fn with_a_dead_one(features: u64, config_bytes: usize) -> io::Result<Session> {
        let (socket, _) = UnixStream::pair()?;
        socket.set_nonblocking(true)?;
        Ok(Session {
            socket,
            inbox: Inbox::default(),
            expected: VecDeque::new(),
            config_bytes,
            begun: Instant::now(),
            facts: Facts { features, queues: 1, config: vec![0; config_bytes], ..Facts::default() },
            introduced: true,
        })
    }

    /// The same connection once more, for a device that may or may not come to use it. One of the two must not be used.
    pub fn try_clone(&self) -> io::Result<Session> {
        Ok(Session {
            socket: self.socket.try_clone()?,
            inbox: Inbox::default(),
            expected: VecDeque::new(),
            facts: self.facts.clone(),
            ..*self
        })
    }

    /// Readable when [`Session::receive`] has something to do.
    pub fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// The back-end has said who it is.
    pub fn is_introduced(&self) -> bool {
        self.introduced
    }

    /// Replies are still to come.
    pub fn is_waiting(&self) -> bool {
        !self.expected.is_empty()
    }

    /// The features of the device, without that of the protocol.
    pub fn features(&self) -> u64 {
        self.facts.features & !F_PROTOCOL_FEATURES
    }

    /// How long it took it to say who it is.
    pub fn took(&self) -> Duration {
        self.facts.took
    }

    /// How many queues it can serve.
    pub fn queues(&self) -> u64 {
        self.facts.queues
    }

    /// The configuration space, as last read.
    pub fn config(&self) -> &[u8] {
        &self.facts.config
    }

    /// Asks for the configuration space, unless that is under way.
    pub fn ask_config(&mut self) -> Result<(), Lost> {
        if self.expected.contains(&Expected::Config) {
            return Ok(());
        }
        self.ask(request::GET_CONFIG, &message::config(self.config_bytes), Expected::Config)
    }

    /// The configuration space was asked for and is still to come.
    pub fn awaits_config(&self) -> bool {
        self.expected.contains(&Expected::Config)
    }

    /// Hands memory and rings over, and the socket by which it may ask back. When no reply is still to come, the back-end serves them, as far as it says.
    pub fn activate(
        &mut self,
        features: u64,
        regions: &[(Region, RawFd)],
        rings: &[RingPlan],
        calls: RawFd,
    ) -> Result<(), Lost> {
        if self.facts.protocol & protocol::BACKEND_REQ != 0 {
            self.tell(request::SET_BACKEND_REQ_FD, &[], &[calls])?;
        }
        self.tell(request::SET_FEATURES, &message::number(features | F_PROTOCOL_FEATURES), &[])?;
        let (table, files): (Vec<_>, Vec<_>) = regions.iter().copied().unzip();
        self.tell(request::SET_MEM_TABLE, &message::memory_table(&table), &files)?;
        for ring in rings {
            let number = message::number(ring.index.into());
            self.tell(request::SET_VRING_NUM, &message::ring_state(ring.index, ring.size.into()), &[])?;
            self.tell(request::SET_VRING_BASE, &message::ring_state(ring.index, 0), &[])?;
            self.tell(request::SET_VRING_ADDR, &message::ring_address(ring.index, &ring.address), &[])?;
            // The kick starts the ring, so by then it must be known where to call.
            self.tell(request::SET_VRING_CALL, &number, &[ring.call])?;
            self.tell(request::SET_VRING_KICK, &number, &[ring.kick])?;
            self.tell(request::SET_VRING_ENABLE, &message::ring_state(ring.index, 1), &[])?;
        }
        Ok(())
    }

    /// Takes a ring back. When the reply is there, the back-end has stopped it.
    pub fn stop_ring(&mut self, index: u16) -> Result<(), Lost> {
        self.ask(request::GET_VRING_BASE, &message::ring_state(index, 0), Expected::RingBase)
    }

    /// Takes in replies that are there: one reading's worth. Says whether a configuration space was among them.
    pub fn receive(&mut self) -> Result<bool, Lost> {
        let mut bytes = [0; READ_BYTES];
        let read = match self.socket.read(&mut bytes) {
            Ok(0) => return Err(Lost::Closed),
            Ok(read) => read,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(false);
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Err(Lost::Closed),
            Err(error) => return Err(error.into()),
        };
        self.inbox.put(bytes.get(..read).unwrap_or_default());
        let mut has_config = false;
        while let Some(reply) = self.inbox.take()? {
            has_config |= self.hear(&reply)?;
        }
        Ok(has_config)
    }

    fn hear(&mut self, reply: &Reply) -> Result<bool, Lost> {
        let expected = self.expected.pop_front();
        let wanted = expected.map(Expected::request);
        if wanted != Some(reply.request) {
            return Err(Lie::Unasked { got: reply.request, wanted }.into());
        }
        match expected {
            Some(Expected::Features) => {
                self.facts.features = reply.number()?;
                if self.facts.features & F_PROTOCOL_FEATURES == 0 {
                    return Err(Lie::Missing("protocol features").into());
                }
                self.ask(request::GET_PROTOCOL_FEATURES, &[], Expected::Protocol)?;
            }
            Some(Expected::Protocol) => {
                let known = protocol::MQ | protocol::REPLY_ACK | protocol::BACKEND_REQ | protocol::CONFIG;
                let taken = reply.number()? & known;
                if taken & protocol::CONFIG == 0 {
                    return Err(Lie::Missing("configuration space (protocol feature CONFIG)").into());
                }
                self.tell(request::SET_PROTOCOL_FEATURES, &message::number(taken), &[])?;
                self.tell(request::SET_OWNER, &[], &[])?;
                self.facts.protocol = taken;
                self.facts.queues = 1;
                if taken & protocol::MQ != 0 {
                    self.ask(request::GET_QUEUE_NUM, &[], Expected::Queues)?;
                }
                self.ask_config()?;
            }
            Some(Expected::Queues) => self.facts.queues = reply.number()?,
            Some(Expected::Config) => {
                self.facts.config = reply.config(self.config_bytes)?.to_vec();
                // The last of the first questions.
                if !mem::replace(&mut self.introduced, true) {
                    self.facts.took = self.begun.elapsed();
                }
                return Ok(true);
            }
            Some(Expected::Done(request)) => match reply.number()? {
                0 => {}
                code => return Err(Lie::Refused { request, code }.into()),
            },
            Some(Expected::RingBase) => drop(reply.ring()?),
            None => {}
        }
        Ok(false)
    }

    /// A request that has a reply.
    fn ask(&mut self, request: u32, payload: &[u8], expected: Expected) -> Result<(), Lost> {
        self.expected.push_back(expected);
        self.send(&message::encode(request, false, payload), &[])
    }

    /// A request that has none; where it can, the back-end confirms it.
    fn tell(&mut self, request: u32, payload: &[u8], files: &[RawFd]) -> Result<(), Lost> {
        let confirm = self.facts.protocol & protocol::REPLY_ACK != 0;
        if confirm {
            self.expected.push_back(Expected::Done(request));
        }
        self.send(&message::encode(request, confirm, payload), files)
    }

    fn send(&self, bytes: &[u8], files: &[RawFd]) -> Result<(), Lost> {
        match self.socket.send_with_fds(&[bytes], files).map_err(io::Error::from) {
            Ok(sent) if sent == bytes.len() => Ok(()),
            // It reads nothing of what it was told.
            Ok(_) => Err(Lost::Full),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Err(Lost::Full),
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                Err(Lost::Closed)
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl Expected {
    fn request(self) -> u32 {
        match self {
            Expected::Features => request::GET_FEATURES,
            Expected::Protocol => request::GET_PROTOCOL_FEATURES,
            Expected::Queues => request::GET_QUEUE_NUM,
            Expected::Config => request::GET_CONFIG,
            Expected::Done(request) => request,
            Expected::RingBase => request::GET_VRING_BASE,
        }
    }
}

/// Rounded up, or who waits would not wait at all at the end.
pub(super) fn wait_ms(time: Duration) -> i32 {
    i32::try_from(time.as_millis()).unwrap_or(i32::MAX).saturating_add(1)
}

/// Why there is no connection any more.
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    #[error("it has closed the connection")]
    Closed,
    #[error("it reads nothing of what it is told")]
    Full,
    #[error("it has not answered within {} s", .0.as_secs())]
    Silent(Duration),
    #[error("it breaks the protocol: {0}")]
    Lie(#[from] Lie),
    #[error("{0}")]
    Host(#[from] io::Error),
}
