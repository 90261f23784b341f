//! One guest's connection: bytes from its socket to requests, answers to the socket, and when it is over.
//!
//! An answer is sent before the next request is looked at, so that at most one of them waits.

use std::time::Instant;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, State};

use crate::http::{self, MAX_BODY, MAX_HEAD};
use crate::{Metadata, Rules};

/// Bytes of requests that wait to be answered.
const MAX_INPUT: usize = MAX_HEAD + MAX_BODY;

/// See the module.
pub struct Connection {
    pub socket: SocketHandle,
    input: Vec<u8>,
    output: Vec<u8>,
    /// So much of `output` is in the socket.
    sent: usize,
    /// The last answer is in `output` or was sent.
    is_closing: bool,
}

impl Connection {
    pub fn new(socket: SocketHandle) -> Connection {
        Connection { socket, input: Vec::new(), output: Vec::new(), sent: 0, is_closing: false }
    }

    /// Goes on as far as the guest has sent and takes.
    pub fn go_on(&mut self, socket: &mut Socket, metadata: &Metadata, rules: Rules, now: Instant) {
        if matches!(socket.state(), State::SynReceived | State::Closed | State::TimeWait | State::Listen) {
            return;
        }
        loop {
            self.receive(socket);
            self.send(socket);
            if !self.output.is_empty() || self.is_closing || !self.answer(socket, metadata, rules, now) {
                break;
            }
        }
        if self.is_closing && self.output.is_empty() {
            socket.close();
        }
    }

    fn receive(&mut self, socket: &mut Socket) {
        while self.input.len() < MAX_INPUT && socket.can_recv() {
            let room = MAX_INPUT - self.input.len();
            let input = &mut self.input;
            let took = socket.recv(|bytes| {
                let took = bytes.get(..room).unwrap_or(bytes);
                input.extend_from_slice(took);
                (took.len(), took.len())
            });
            if !took.is_ok_and(|took| took > 0) {
                return;
            }
        }
    }

    fn send(&mut self, socket: &mut Socket) {
        while self.sent < self.output.len() && socket.can_send() {
            match socket.send_slice(self.output.get(self.sent..).unwrap_or_default()) {
                Ok(0) | Err(_) => return,
                Ok(count) => self.sent += count,
            }
        }
        if self.sent >= self.output.len() {
            // A connection at rest keeps no memory.
            (self.output, self.sent) = (Vec::new(), 0);
        }
    }

    /// Answers the next request; `false` when there is none.
    fn answer(&mut self, socket: &Socket, metadata: &Metadata, rules: Rules, now: Instant) -> bool {
        match http::parse(&self.input) {
            Ok(Some((request, length))) => {
                self.input.drain(..length.min(self.input.len()));
                let is_head = request.method == "HEAD";
                self.output = metadata.answer(rules, &request, now).bytes(request.keep_alive, is_head);
                self.is_closing = !request.keep_alive;
                true
            }
            // The guest has said all that it will.
            Ok(None) => {
                self.is_closing = !socket.may_recv();
                false
            }
            Err(refusal) => {
                (self.input, self.output) = (Vec::new(), refusal.bytes(false, false));
                self.is_closing = true;
                true
            }
        }
    }
}
