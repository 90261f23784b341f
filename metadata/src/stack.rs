//! The machine on a guest's network that answers at the service's address: TCP by smoltcp, and below it as much of Ethernet
//! and ARP as a network of two needs.
//!
//! It learns where a guest's packets come from and answers there, so it asks nobody for addresses. Checksums of what comes
//! are not verified: the bytes were copied from memory to memory, and a driver leaves them to the device. Fragments, options
//! and everything but TCP are dropped or refused. All limits are constants here and in `http.rs`.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::random;
use devices::virtio::net::Neighbour;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as Ticks;
use smoltcp::wire::{HardwareAddress, IpCidr};

use crate::arp::{self, ETHERNET_BYTES, Kind, Mac};
use crate::connection::Connection;
use crate::{Counters, Metadata, Rules, count};

/// Our Ethernet address, which is Firecracker's: locally administered, so that no real card has it.
pub const MAC: Mac = [0x06, 0x01, 0x23, 0x45, 0x67, 0x01];
/// Where HTTP is served.
pub const PORT: u16 = 80;
/// Connections of one interface; more are refused until one of them ends.
pub const MAX_CONNECTIONS: usize = 16;
/// How long a guest may send nothing on a connection; TCP's own doing, which says that it is over.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Frames that wait for a guest that does not take them.
pub const MAX_FRAMES: usize = 32;
/// Addresses of a guest that are remembered, to answer there.
const MAX_PEERS: usize = 16;
/// The largest IPv4 packet that is sent.
const MTU: usize = 1500;
/// Bytes of a connection that are taken before they are looked at, and so the largest that a guest sends at once.
const RECEIVE_BYTES: usize = 4096;
/// Bytes of a connection that are sent and that the guest has not said to have.
const SEND_BYTES: usize = 8192;
/// Where the number of the protocol in an IPv4 packet is.
const PROTOCOL: usize = ETHERNET_BYTES + 9;

/// See the module.
pub struct Stack {
    address: Ipv4Addr,
    metadata: Arc<Metadata>,
    rules: Rules,
    interface: Interface,
    sockets: SocketSet<'static>,
    /// Waits for the next connection; `None` when there are as many as may be.
    listener: Option<SocketHandle>,
    connections: Vec<Connection>,
    wire: Wire,
    start: Instant,
}

impl Stack {
    /// A service at `address`, as the rules say.
    ///
    /// # Errors
    /// That of asking the kernel for random bytes.
    pub fn new(metadata: Arc<Metadata>, address: Ipv4Addr, rules: Rules) -> std::io::Result<Stack> {
        let mut seed = [0; 8];
        random::fill(&mut seed)?;
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = u64::from_ne_bytes(seed);
        let mut wire = Wire::new(metadata.counters());
        let mut interface = Interface::new(config, &mut wire, Ticks::ZERO);
        interface.update_ip_addrs(|addresses| {
            // Of a network with everybody in it: there is no router. It has room for one.
            let _ = addresses.push(IpCidr::new(address.into(), 0));
        });
        let mut stack = Stack {
            address,
            metadata,
            rules,
            interface,
            sockets: SocketSet::new(Vec::new()),
            listener: None,
            connections: Vec::new(),
            wire,
            start: Instant::now(),
        };
        stack.listen();
        Ok(stack)
    }

    /// Lets the network do what there is to do, then those who talk on it, and then the network again.
    fn turn(&mut self, now: Instant) {
        self.poll(now);
        self.accept();
        for connection in &mut self.connections {
            let socket = self.sockets.get_mut::<Socket>(connection.socket);
            connection.go_on(socket, &self.metadata, self.rules, now);
        }
        self.poll(now);
        self.sweep();
        self.listen();
    }

    fn poll(&mut self, now: Instant) {
        let before = self.wire.to_guest.len();
        self.interface.poll(ticks(self.start, now), &mut self.wire, &mut self.sockets);
        if self.wire.to_guest.len() > before {
            count(&self.counters().tx_count, 1);
        }
    }

    /// Makes a connection of a listener that has been called.
    fn accept(&mut self) {
        let Some(handle) = self.listener else { return };
        if self.sockets.get::<Socket>(handle).state() == State::Listen {
            return;
        }
        self.listener = None;
        self.connections.push(Connection::new(handle));
        count(&self.counters().connections_created, 1);
    }

    /// Forgets connections that are over. Nothing can still be on its way on a wire that is a queue, so none of them waits
    /// for what comes late (TIME-WAIT).
    fn sweep(&mut self) {
        let sockets = &mut self.sockets;
        let before = self.connections.len();
        self.connections.retain(|connection| {
            let state = sockets.get::<Socket>(connection.socket).state();
            // One that was called off before it began listens again.
            let is_over = matches!(state, State::Closed | State::TimeWait | State::Listen);
            if is_over {
                sockets.remove(connection.socket);
            }
            !is_over
        });
        count(&self.counters().connections_destroyed, (before - self.connections.len()) as u64);
    }

    fn listen(&mut self) {
        if self.listener.is_some() || self.connections.len() >= MAX_CONNECTIONS {
            return;
        }
        let mut socket =
            Socket::new(SocketBuffer::new(vec![0; RECEIVE_BYTES]), SocketBuffer::new(vec![0; SEND_BYTES]));
        socket.set_timeout(Some(PATIENCE.into()));
        // Each answer is written as a whole, and its receiver waits for it.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        if socket.listen(PORT).is_ok() {
            self.listener = Some(self.sockets.add(socket));
        }
    }

    fn counters(&self) -> &Counters {
        &self.metadata.counters
    }
}

impl Neighbour for Stack {
    fn is_for_me(&self, start: &[u8]) -> bool {
        arp::kind(start, self.address).is_some()
    }

    fn take(&mut self, frame: &[u8]) {
        count(&self.counters().rx_accepted, 1);
        if self.wire.is_full() {
            count(&self.counters().rx_accepted_err, 1);
            return;
        }
        match arp::kind(frame, self.address) {
            Some(Kind::Arp) => match arp::answer(frame, MAC, self.address) {
                Ok(Some(reply)) => {
                    count(&self.counters().tx_count, 1);
                    self.wire.send(reply);
                }
                Ok(None) => count(&self.counters().rx_accepted_unusual, 1),
                Err(()) => count(&self.counters().rx_bad_eth, 1),
            },
            Some(Kind::Ipv4) => {
                if frame.get(PROTOCOL) != Some(&TCP) {
                    count(&self.counters().rx_accepted_unusual, 1);
                }
                if let Some((address, mac)) = arp::sender(frame) {
                    self.wire.learn(address, mac);
                }
                self.wire.from_guest = frame.get(ETHERNET_BYTES..).map(<[u8]>::to_vec);
                self.turn(Instant::now());
            }
            None => count(&self.counters().rx_bad_eth, 1),
        }
    }

    fn give(&mut self) -> Option<Vec<u8>> {
        let was_full = self.wire.is_full();
        let frame = self.wire.to_guest.pop_front()?;
        if was_full {
            // What waited for room.
            self.turn(Instant::now());
        }
        Some(frame)
    }

    fn has_frames(&self) -> bool {
        !self.wire.to_guest.is_empty()
    }

    fn wake_in(&mut self) -> Option<Duration> {
        // Nothing can be done until the guest takes what it has been sent, and then it is.
        if self.wire.is_full() {
            return None;
        }
        let now = Instant::now();
        self.interface.poll_delay(ticks(self.start, now), &self.sockets).map(Duration::from)
    }

    fn wake(&mut self) {
        self.turn(Instant::now());
    }

    fn reset(&mut self) {
        count(&self.counters().connections_destroyed, self.connections.len() as u64);
        self.connections.clear();
        self.listener = None;
        self.sockets = SocketSet::new(Vec::new());
        self.wire = Wire::new(self.metadata.counters());
        self.listen();
    }
}

/// TCP's number (RFC 9293, section 3.8.5).
const TCP: u8 = 6;

/// What there is between the stack and the guest: one packet that comes, frames that go.
struct Wire {
    from_guest: Option<Vec<u8>>,
    to_guest: VecDeque<Vec<u8>>,
    /// Where packets have come from, the last one first.
    peers: VecDeque<(Ipv4Addr, Mac)>,
    counters: Arc<Counters>,
}

impl Wire {
    fn new(counters: Arc<Counters>) -> Wire {
        Wire { from_guest: None, to_guest: VecDeque::new(), peers: VecDeque::new(), counters }
    }

    fn is_full(&self) -> bool {
        self.to_guest.len() >= MAX_FRAMES
    }

    fn learn(&mut self, address: Ipv4Addr, mac: Mac) {
        self.peers.retain(|(known, _)| *known != address);
        self.peers.truncate(MAX_PEERS - 1);
        self.peers.push_front((address, mac));
    }

    fn send(&mut self, frame: Vec<u8>) {
        count(&self.counters.tx_frames, 1);
        count(&self.counters.tx_bytes, frame.len() as u64);
        self.to_guest.push_back(frame);
    }

    /// Sends an IPv4 packet to where its receiver was last seen.
    fn send_packet(&mut self, packet: &[u8]) {
        let to = packet.get(16..20).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()).map(Ipv4Addr::from);
        let peer = self.peers.iter().find(|(known, _)| Some(*known) == to);
        match peer {
            Some((_, mac)) => {
                let mut frame = arp::ipv4_header(*mac, MAC);
                frame.extend_from_slice(packet);
                self.send(frame);
            }
            None => count(&self.counters.tx_errors, 1),
        }
    }
}

impl Device for Wire {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: Ticks) -> Option<(Incoming, Outgoing<'_>)> {
        let packet = self.from_guest.take()?;
        Some((Incoming(packet), Outgoing(self)))
    }

    fn transmit(&mut self, _: Ticks) -> Option<Outgoing<'_>> {
        (!self.is_full()).then_some(Outgoing(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // Computed for what goes; see the module for what comes.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

struct Incoming(Vec<u8>);

impl phy::RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Outgoing<'a>(&'a mut Wire);

impl phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut packet = vec![0; length];
        let result = f(&mut packet);
        self.0.send_packet(&packet);
        result
    }
}

/// The stack's clock.
fn ticks(start: Instant, now: Instant) -> Ticks {
    let since = now.saturating_duration_since(start).as_micros();
    Ticks::from_micros(i64::try_from(since).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests;
