//! One connection: a stream socket of the host on one side, packets of the guest on the other, and the credit of both
//! directions (VIRTIO 1.3, section 5.10.6).
//!
//! Knows its state and its socket; not its addresses, the queues or the other connections: that is the muxer's. What a
//! host program does not read is kept up to [`WINDOW`], and nothing else: what the guest does not read stays in the
//! host's socket.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use crate::backend::vectored;
use crate::memory::GuestRam;
use crate::virtio::queue::{QueueError, Segments};
use crate::virtio::running::count;
use crate::virtio::vsock::Counters;
use crate::virtio::vsock::packet::{Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};

/// Most bytes of the guest that wait for the host's program: the credit that the guest is given (`buf_alloc`). Two of
/// Linux's largest packets, so that one can be on its way while the other is taken.
pub const WINDOW: u32 = 128 << 10;

/// Most bytes in one packet to the guest: Linux takes no more.
pub const PACKET_BYTES: u32 = 64 << 10;

/// The longest line that a program of the host may begin with.
pub const LINE_BYTES: usize = 32;

/// Where a connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A program of the host has connected and not said yet to which port.
    Greeting,
    /// The guest is asked whether it takes the connection.
    Calling,
    Open,
    /// The guest was told that both directions are over; its RST is awaited.
    Closing,
    /// The guest is done with it, and does not know it any more. The host has not taken all yet.
    Lingering,
}

/// What is to become of a connection after something happened to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Live,
    /// The guest is told RST, and it is forgotten.
    Reset,
    /// It is forgotten; the guest knows, or never knew.
    Gone,
    /// The guest is told RST, and it is kept until the host has taken what waits: [`Stage::Lingering`].
    Linger,
}

/// What a connection has for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outgoing {
    Nothing,
    /// With `len` bytes of payload, which are in the guest's buffers already.
    Packet {
        op: u16,
        flags: u32,
        len: u32,
    },
    /// The host's socket has failed.
    Reset,
}

/// What a program of the host has said at its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    Incomplete,
    /// It wants this port of the guest.
    Port(u32),
    /// Nonsense, or it has left.
    Wrong,
}

/// A connection.
pub struct Connection {
    stream: UnixStream,
    stage: Stage,
    /// What was read while greeting.
    line: Vec<u8>,
    /// The socket may have something to read. While it is known to, it is not watched for that.
    readable: bool,
    /// The program at the other end of the socket is gone: it reads no more, and what it wrote can still be read.
    hung_up: bool,

    /// From the guest, for the host: taken and not yet written.
    waiting: VecDeque<u8>,
    /// All that was written, or thrown away since nobody reads it.
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest knows it.
    told: Wrapping<u32>,
    /// The guest sends no more.
    guest_over: bool,
    /// The host reads no more.
    host_deaf: bool,

    /// From the host, for the guest: all that was sent.
    sent: Wrapping<u32>,
    /// What the guest says it can hold, and what it has taken out of that.
    allowed: u32,
    consumed: Wrapping<u32>,
    /// The guest was asked for credit since it last had some.
    asked: bool,
    /// The host sends no more.
    host_over: bool,
    /// The guest reads no more.
    guest_deaf: bool,

    due: Due,
}

/// Packets without payload that the guest must get.
#[derive(Default)]
struct Due {
    /// REQUEST or RESPONSE.
    opening: bool,
    /// Flags of a SHUTDOWN, and those that it has been told.
    shutdown: u32,
    told_shutdown: u32,
    credit_request: bool,
    credit_update: bool,
}

impl Connection {
    /// A program of the host has connected. `stream` does not block.
    pub fn greeting(stream: UnixStream) -> Connection {
        Connection::new(stream, Stage::Greeting)
    }

    /// The guest has asked for this connection, and the host has taken it. `stream` does not block.
    pub fn accepted(stream: UnixStream, request: &Header) -> Connection {
        let mut connection = Connection::new(stream, Stage::Open);
        connection.due.opening = true;
        connection.note_credit(request);
        connection
    }

    fn new(stream: UnixStream, stage: Stage) -> Connection {
        Connection {
            stream,
            stage,
            line: Vec::new(),
            readable: false,
            hung_up: false,
            waiting: VecDeque::new(),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            guest_over: false,
            host_deaf: false,
            sent: Wrapping(0),
            allowed: 0,
            consumed: Wrapping(0),
            asked: false,
            host_over: false,
            guest_deaf: false,
            due: Due::default(),
        }
    }

    pub fn stage(&self) -> Stage {
        self.stage
    }

    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// The guest has heard of this connection and must hear of its end.
    pub fn is_known_to_guest(&self) -> bool {
        match self.stage {
            Stage::Greeting | Stage::Lingering => false,
            Stage::Calling => !self.due.opening,
            Stage::Open | Stage::Closing => true,
        }
    }

    /// Which readiness of the socket matters now; hanging up always does. `None`: not even that, for it has been seen,
    /// and would be reported for ever.
    pub fn interest(&self) -> Option<EventSet> {
        let mut set = EventSet::empty();
        set.set(EventSet::IN, self.stage == Stage::Greeting || self.may_read() && !self.readable);
        set.set(EventSet::OUT, !self.waiting.is_empty());
        (self.stage != Stage::Closing && !(set.is_empty() && self.hung_up)).then_some(set)
    }

    /// There may be something for the guest.
    pub fn has_outgoing(&self) -> bool {
        let Due { opening, credit_request, credit_update, .. } = self.due;
        let reading = self.readable && self.may_read() && (self.credit() > 0 || !self.asked);
        opening || credit_request || credit_update || self.shutdown_due() != 0 || reading
    }

    /// Reads the line that a program of the host begins with: `CONNECT <port>`. Byte by byte, for what follows it is the
    /// guest's.
    pub fn greet(&mut self) -> Greeting {
        loop {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(1..) if byte == *b"\n" => return parse_greeting(&std::mem::take(&mut self.line)),
                Ok(1..) if self.line.len() < LINE_BYTES => self.line.extend(byte),
                Ok(_) => return Greeting::Wrong,
                Err(error) if is_later(&error) => return Greeting::Incomplete,
                Err(_) => return Greeting::Wrong,
            }
        }
    }

    /// The guest is to be asked whether it takes the connection.
    pub fn call(&mut self) {
        self.stage = Stage::Calling;
        self.due.opening = true;
    }

    /// Kept for what waits only. After [`Verdict::Linger`].
    pub fn linger(&mut self) {
        self.stage = Stage::Lingering;
        self.due = Due::default();
    }

    /// The socket is ready for what `set` says.
    pub fn host_event(&mut self, set: EventSet, counters: &Counters) -> Verdict {
        if set.contains(EventSet::OUT) {
            self.flush(counters);
        }
        self.hung_up |= set.intersects(EventSet::HANG_UP | EventSet::ERROR);
        match self.stage {
            Stage::Calling if self.hung_up => return Verdict::Reset,
            Stage::Lingering if self.hung_up || self.waiting.is_empty() => return Verdict::Gone,
            Stage::Open if self.may_read() => self.readable |= self.hung_up || set.contains(EventSet::IN),
            Stage::Open if self.hung_up => self.due.shutdown = SHUTDOWN_BOTH,
            _ => {}
        }
        Verdict::Live
    }

    /// Takes a packet of the guest whose payload is what `payload` has. `host_port` is what the host's program is told
    /// when the guest has taken its call.
    pub fn packet(
        &mut self,
        memory: &GuestRam,
        header: &Header,
        payload: Segments,
        host_port: u32,
        counters: &Counters,
    ) -> Result<Verdict, QueueError> {
        self.note_credit(header);
        Ok(match (header.op, self.stage) {
            (op::RST, _) => Verdict::Gone,
            (op::RESPONSE, Stage::Calling) if !self.due.opening => self.answered(host_port),
            (op::RW, Stage::Open) if !self.guest_over => return self.take(memory, payload, counters),
            (op::SHUTDOWN, Stage::Open | Stage::Closing) => self.guest_shuts_down(header.flags),
            (op::CREDIT_REQUEST, Stage::Open) => {
                self.due.credit_update = true;
                Verdict::Live
            }
            (op::CREDIT_UPDATE, Stage::Open) => Verdict::Live,
            // On its way before the guest knew that it is over.
            (op::RW | op::CREDIT_UPDATE | op::CREDIT_REQUEST, Stage::Closing) => Verdict::Live,
            _ => Verdict::Reset,
        })
    }

    /// The next packet for the guest, its payload in the front of `room`.
    pub fn outgoing(
        &mut self,
        memory: &GuestRam,
        room: &Segments,
        counters: &Counters,
    ) -> Result<Outgoing, QueueError> {
        if std::mem::take(&mut self.due.opening) {
            let op = if self.stage == Stage::Calling { op::REQUEST } else { op::RESPONSE };
            return Ok(control(op, 0));
        }
        if self.readable && self.may_read() {
            let outgoing = self.read(memory, room, counters)?;
            if outgoing != Outgoing::Nothing {
                return Ok(outgoing);
            }
        }
        let flags = self.shutdown_due();
        if flags != 0 {
            self.due.told_shutdown |= flags;
            if self.due.told_shutdown == SHUTDOWN_BOTH {
                self.close();
            }
            return Ok(control(op::SHUTDOWN, self.due.told_shutdown));
        }
        if std::mem::take(&mut self.due.credit_request) {
            return Ok(control(op::CREDIT_REQUEST, 0));
        }
        if std::mem::take(&mut self.due.credit_update) {
            return Ok(control(op::CREDIT_UPDATE, 0));
        }
        Ok(Outgoing::Nothing)
    }

    /// What every packet to the guest says of our side: `buf_alloc` and `fwd_cnt`. The guest knows them from now on.
    pub fn tell_credit(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        self.due.credit_update = false;
        (WINDOW, self.told.0)
    }

    /// Something may be read for the guest.
    fn may_read(&self) -> bool {
        self.stage == Stage::Open && !self.host_over && !self.guest_deaf
    }

    /// How much the guest takes now. A guest that says it has consumed more than it got gets nothing.
    fn credit(&self) -> u32 {
        self.allowed.saturating_sub((self.sent - self.consumed).0)
    }

    fn note_credit(&mut self, header: &Header) {
        self.allowed = header.buf_alloc;
        self.consumed = Wrapping(header.fwd_cnt);
        if self.credit() > 0 {
            self.asked = false;
        }
    }

    fn shutdown_due(&self) -> u32 {
        self.due.shutdown & !self.due.told_shutdown
    }

    /// The guest takes the call of a host's program, which hears of it in a line. The socket is empty, so a line fits.
    fn answered(&mut self, host_port: u32) -> Verdict {
        let line = format!("OK {host_port}\n");
        match self.stream.write(line.as_bytes()) {
            Ok(bytes) if bytes == line.len() => {
                self.stage = Stage::Open;
                Verdict::Live
            }
            _ => Verdict::Reset,
        }
    }

    fn take(
        &mut self,
        memory: &GuestRam,
        mut payload: Segments,
        counters: &Counters,
    ) -> Result<Verdict, QueueError> {
        let bytes = payload.bytes();
        if self.waiting.len() + bytes as usize > WINDOW as usize {
            log::debug!("vsock: the guest sends more than it has credit for; the connection is reset");
            return Ok(Verdict::Reset);
        }
        count(&counters.tx_bytes_count, bytes.into());
        if self.waiting.is_empty() && !self.host_deaf && bytes > 0 {
            match vectored::write(&self.stream, &payload.slices(memory)?) {
                Ok(done) => {
                    payload.take(done)?;
                    self.forwarded += done as u32;
                }
                Err(error) if is_later(&error) => {}
                Err(_) => self.is_deaf(counters),
            }
        }
        if self.host_deaf {
            self.forwarded += payload.bytes();
        } else if payload.bytes() > 0 {
            let mut rest = vec![0; payload.bytes() as usize];
            payload.read(memory, &mut rest)?;
            self.waiting.extend(rest);
        }
        self.offer_credit();
        Ok(Verdict::Live)
    }

    /// Writes what waits, as far as the socket takes it.
    fn flush(&mut self, counters: &Counters) {
        while !self.waiting.is_empty() {
            let (front, back) = self.waiting.as_slices();
            match self.stream.write_vectored(&[IoSlice::new(front), IoSlice::new(back)]) {
                Ok(bytes) => {
                    self.waiting.drain(..bytes.min(self.waiting.len()));
                    self.forwarded += bytes as u32;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => {
                    count(&counters.tx_flush_fails, 1);
                    self.is_deaf(counters);
                }
            }
        }
        if self.waiting.is_empty() {
            // Its memory goes back, too.
            self.waiting = VecDeque::new();
            self.finish();
        }
        self.offer_credit();
    }

    /// Nobody reads at the host's side any more.
    fn is_deaf(&mut self, counters: &Counters) {
        count(&counters.tx_write_fails, 1);
        self.host_deaf = true;
        self.forwarded += self.waiting.len() as u32;
        self.waiting.clear();
        self.due.shutdown |= SHUTDOWN_RECEIVE;
    }

    /// Once the guest thinks that less than half of the window is free while more is.
    fn offer_credit(&mut self) {
        let taken = (self.forwarded - self.told).0 + self.waiting.len() as u32;
        if self.forwarded != self.told && taken > WINDOW / 2 && self.stage == Stage::Open {
            self.due.credit_update = true;
        }
    }

    fn guest_shuts_down(&mut self, flags: u32) -> Verdict {
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_deaf {
            self.guest_deaf = true;
            // A socket that is closed at its other end has nothing left to be shut down.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_over = true;
            self.finish();
        }
        match (self.guest_deaf && self.guest_over, self.waiting.is_empty()) {
            (false, _) => Verdict::Live,
            (true, true) => Verdict::Reset,
            (true, false) => Verdict::Linger,
        }
    }

    /// Ends the direction to the host when the guest has ended it and all of it is written.
    fn finish(&mut self) {
        if self.guest_over && self.waiting.is_empty() {
            let _ = self.stream.shutdown(Shutdown::Write);
            self.finish_both();
        }
    }

    fn finish_both(&mut self) {
        if self.guest_over && self.waiting.is_empty() && self.host_over {
            self.due.shutdown = SHUTDOWN_BOTH;
        }
    }

    fn close(&mut self) {
        self.stage = Stage::Closing;
        self.due.credit_request = false;
        self.due.credit_update = false;
        self.waiting = VecDeque::new();
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Reads once into `room`.
    fn read(
        &mut self,
        memory: &GuestRam,
        room: &Segments,
        counters: &Counters,
    ) -> Result<Outgoing, QueueError> {
        let most = room.bytes().min(self.credit()).min(PACKET_BYTES);
        if most == 0 {
            self.due.credit_request |= !std::mem::replace(&mut self.asked, true);
            return Ok(Outgoing::Nothing);
        }
        let slices = room.clone().take(most as usize)?;
        Ok(match vectored::read(&self.stream, &slices.slices(memory)?) {
            Ok(0) => {
                self.host_is_over();
                Outgoing::Nothing
            }
            Ok(bytes) => {
                let len = bytes as u32;
                // Less than asked for is all there is; level-triggered readiness says so if not.
                self.readable = len == most || self.hung_up;
                self.sent += len;
                count(&counters.rx_bytes_count, len.into());
                Outgoing::Packet { op: op::RW, flags: 0, len }
            }
            Err(error) if is_later(&error) => {
                self.readable = false;
                Outgoing::Nothing
            }
            Err(error) => {
                log::debug!("vsock: a program of the host has left: {error}");
                count(&counters.rx_read_fails, 1);
                Outgoing::Reset
            }
        })
    }

    fn host_is_over(&mut self) {
        self.readable = false;
        self.host_over = true;
        self.due.shutdown |= if self.hung_up { SHUTDOWN_BOTH } else { SHUTDOWN_SEND };
        self.finish_both();
    }
}

fn control(op: u16, flags: u32) -> Outgoing {
    Outgoing::Packet { op, flags, len: 0 }
}

fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn parse_greeting(line: &[u8]) -> Greeting {
    let line = String::from_utf8_lossy(line);
    let mut words = line.split_ascii_whitespace();
    let port = match (words.next(), words.next(), words.next()) {
        (Some(word), Some(port), None) if word.eq_ignore_ascii_case("CONNECT") => port.parse().ok(),
        _ => None,
    };
    port.map_or(Greeting::Wrong, Greeting::Port)
}
