use std::sync::atomic::{AtomicU64, Ordering};

use smoltcp::wire::IpAddress;

use super::*;
use crate::Version;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const THEIRS: Mac = [2, 0, 0, 0, 0, 7];
/// The address of a router, to which a guest without a network of that address sends its packets.
const ROUTER: Mac = [2, 0, 0, 0, 0, 1];
const ROUNDS: usize = 400;

/// A guest with its own TCP, and the stack beside it.
struct Rig {
    stack: Stack,
    guest: Guest,
    interface: Interface,
    sockets: SocketSet<'static>,
    start: Instant,
}

/// The guest's end of the wire.
#[derive(Default)]
struct Guest {
    incoming: VecDeque<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
}

struct GuestOut<'a>(&'a mut Guest);

impl phy::TxToken for GuestOut<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut packet = vec![0; length];
        let result = f(&mut packet);
        self.0.outgoing.push_back([arp::ipv4_header(ROUTER, THEIRS), packet].concat());
        result
    }
}

impl Device for Guest {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = GuestOut<'a>;

    fn receive(&mut self, _: Ticks) -> Option<(Incoming, GuestOut<'_>)> {
        let frame = self.incoming.pop_front()?;
        assert_eq!(
            (&frame[..6], &frame[6..12]),
            (&THEIRS[..], &MAC[..]),
            "it is sent where packets came from"
        );
        Some((Incoming(frame[ETHERNET_BYTES..].to_vec()), GuestOut(self)))
    }

    fn transmit(&mut self, _: Ticks) -> Option<GuestOut<'_>> {
        Some(GuestOut(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // As a driver does that leaves them to its device.
        capabilities.checksum.tcp = Checksum::Rx;
        capabilities
    }
}

fn rig(document: serde_json::Value) -> Rig {
    let metadata = Arc::new(Metadata::new(1 << 20).unwrap());
    metadata.store().put(document.as_object().unwrap().clone()).unwrap();
    let rules = Rules { version: Version::V1, imds_compat: false };
    let mut guest = Guest::default();
    let mut config = Config::new(HardwareAddress::Ip);
    config.random_seed = 7;
    let mut interface = Interface::new(config, &mut guest, Ticks::ZERO);
    interface.update_ip_addrs(|addresses| addresses.push(IpCidr::new(GUEST.into(), 0)).unwrap());
    Rig {
        stack: Stack::new(metadata, ADDRESS, rules).unwrap(),
        guest,
        interface,
        sockets: SocketSet::new(Vec::new()),
        start: Instant::now(),
    }
}

impl Rig {
    fn connect(&mut self, port: u16) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 1 << 16]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        socket.connect(self.interface.context(), (IpAddress::from(ADDRESS), PORT), port).unwrap();
        self.sockets.add(socket)
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// One round of the guest's network; frames reach the stack, and with `take` its answers the guest.
    fn round(&mut self, take: bool) {
        self.interface.poll(ticks(self.start, Instant::now()), &mut self.guest, &mut self.sockets);
        while let Some(frame) = self.guest.outgoing.pop_front() {
            assert!(self.stack.is_for_me(&frame[..42.min(frame.len())]));
            self.stack.take(&frame);
        }
        while take && let Some(frame) = self.stack.give() {
            self.guest.incoming.push_back(frame);
        }
        assert!(self.stack.wire.to_guest.len() <= MAX_FRAMES + 1);
        assert!(self.stack.connections.len() <= MAX_CONNECTIONS);
    }

    fn settle(&mut self) {
        (0..ROUNDS).for_each(|_| self.round(true));
    }

    /// Asks on a connection, and gives all that has come when nothing more comes.
    fn ask(&mut self, handle: SocketHandle, text: &str) -> String {
        self.settle();
        self.socket(handle).send_slice(text.as_bytes()).unwrap();
        let mut answer = Vec::new();
        for _ in 0..ROUNDS {
            self.round(true);
            let socket = self.socket(handle);
            while socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), answer.extend_from_slice(bytes))).unwrap();
            }
        }
        String::from_utf8(answer).unwrap()
    }

    fn counter(&self, pick: impl Fn(&Counters) -> &AtomicU64) -> u64 {
        pick(self.stack.counters()).load(Ordering::Relaxed)
    }
}

fn small() -> Rig {
    rig(serde_json::json!({"latest": {"id": "i-1"}}))
}

const GET: &str = "GET /latest/id HTTP/1.1\r\n\r\n";
const GET_AND_CLOSE: &str = "GET /latest/id HTTP/1.1\r\nConnection: close\r\n\r\n";

#[test]
fn a_guest_is_answered_by_way_of_its_router_and_the_connection_ends_when_it_wants() {
    let mut rig = small();
    let handle = rig.connect(4000);
    let answer = rig.ask(handle, GET_AND_CLOSE);
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\ni-1"), "{answer}");
    assert!(answer.contains("Connection: close"), "{answer}");
    assert!(!rig.socket(handle).may_recv(), "the end of the answers is told");
    rig.socket(handle).close();
    rig.settle();
    assert!(rig.stack.connections.is_empty());
    assert_eq!(rig.counter(|counters| &counters.connections_created), 1);
    assert_eq!(rig.counter(|counters| &counters.connections_destroyed), 1);
    assert_eq!(rig.counter(|counters| &counters.rx_count), 1);
    assert!(rig.counter(|counters| &counters.tx_bytes) > 100);
    assert_eq!(rig.counter(|counters| &counters.tx_errors), 0);
}

#[test]
fn a_connection_that_stays_is_asked_again_also_at_once() {
    let mut rig = small();
    let handle = rig.connect(4000);
    for _ in 0..3 {
        assert!(rig.ask(handle, GET).ends_with("i-1"));
    }
    let answers = rig.ask(handle, &GET.repeat(5));
    assert_eq!(answers.matches("200 OK").count(), 5, "{answers}");
    // Half closed: what was asked is answered.
    rig.socket(handle).send_slice(GET.as_bytes()).unwrap();
    rig.socket(handle).close();
    assert!(rig.ask_nothing(handle).ends_with("i-1"));
    assert!(rig.stack.connections.is_empty());
}

impl Rig {
    fn ask_nothing(&mut self, handle: SocketHandle) -> String {
        let mut answer = Vec::new();
        for _ in 0..ROUNDS {
            self.round(true);
            let socket = self.socket(handle);
            while socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), answer.extend_from_slice(bytes))).unwrap();
            }
        }
        String::from_utf8(answer).unwrap()
    }
}

#[test]
fn a_large_answer_arrives_whole() {
    let text: String = (0..100_000u32).map(|number| char::from(b'a' + (number % 23) as u8)).collect();
    let mut rig = rig(serde_json::json!({"text": text}));
    let handle = rig.connect(4000);
    let answer = rig.ask(handle, "GET /text HTTP/1.1\r\n\r\n");
    assert!(answer.ends_with(&text), "{} bytes", answer.len());
}

#[test]
fn what_is_no_http_is_refused_and_ends_the_connection() {
    let mut rig = small();
    let handle = rig.connect(4000);
    let answer = rig.ask(handle, "\0\0\0\0");
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    let handle = rig.connect(4001);
    let long = format!("GET /{}", "x".repeat(8000));
    assert!(rig.ask(handle, &long).starts_with("HTTP/1.1 400 "));
}

#[test]
fn one_connection_too_many_is_refused_until_another_ends() {
    let mut rig = small();
    let handles: Vec<_> = (0..MAX_CONNECTIONS as u16).map(|number| rig.connect(4000 + number)).collect();
    // Each takes the listener of the one before.
    rig.settle();
    let open =
        handles.iter().filter(|handle| rig.sockets.get::<Socket>(**handle).state() == State::Established);
    assert_eq!(open.count(), MAX_CONNECTIONS);
    let refused = rig.connect(5000);
    rig.settle();
    assert_eq!(rig.socket(refused).state(), State::Closed);
    rig.socket(handles[3]).abort();
    rig.settle();
    let handle = rig.connect(5001);
    assert!(rig.ask(handle, GET).ends_with("i-1"));
}

#[test]
fn a_guest_that_takes_nothing_costs_a_bounded_number_of_frames_and_is_served_when_it_does() {
    let text = "x".repeat(100_000);
    let mut rig = rig(serde_json::json!({"text": text}));
    let handle = rig.connect(4000);
    rig.settle();
    rig.socket(handle).send_slice(b"GET /text HTTP/1.1\r\n\r\n").unwrap();
    (0..ROUNDS).for_each(|_| rig.round(false));
    for port in 0..200 {
        rig.connect(6000 + port);
        rig.round(false);
    }
    assert!(rig.stack.wire.is_full());
    assert_eq!(rig.stack.wake_in(), None, "nothing to do before it takes some");
    assert!(rig.counter(|counters| &counters.rx_accepted_err) > 0);
    let answer = rig.ask_nothing(handle);
    assert!(answer.ends_with(&text), "{} bytes", answer.len());
}

#[test]
fn what_waited_for_room_comes_as_soon_as_there_is_some() {
    let mut rig = rig(serde_json::json!({"text": "x".repeat(100_000)}));
    let handles: Vec<_> = (0..MAX_CONNECTIONS as u16).map(|number| rig.connect(4000 + number)).collect();
    rig.settle();
    for handle in handles {
        rig.socket(handle).send_slice(b"GET /text HTTP/1.1\r\n\r\n").unwrap();
    }
    rig.round(false);
    assert!(rig.stack.wire.is_full());
    let frames = std::iter::from_fn(|| rig.stack.give()).take(1000).count();
    assert!(frames > MAX_FRAMES, "{frames} frames");
}

#[test]
fn a_connection_on_which_nothing_is_done_ends() {
    let mut rig = small();
    let handle = rig.connect(4000);
    rig.ask(handle, "GET /latest");
    assert!(rig.stack.wake_in().unwrap() <= PATIENCE);
    rig.stack.turn(Instant::now() + PATIENCE + Duration::from_secs(1));
    assert!(rig.stack.connections.is_empty() && rig.stack.has_frames());
    rig.settle();
    assert_eq!(rig.socket(handle).state(), State::Closed, "it was told");
    assert_eq!(rig.stack.wake_in(), None);
}

#[test]
fn another_driver_finds_no_connections_of_the_last_one() {
    let mut rig = small();
    let handle = rig.connect(4000);
    rig.ask(handle, GET);
    rig.stack.reset();
    assert!(rig.stack.connections.is_empty() && !rig.stack.has_frames());
    rig.socket(handle).send_slice(GET.as_bytes()).unwrap();
    rig.settle();
    assert_eq!(rig.socket(handle).state(), State::Closed, "one that goes on is refused");
    let handle = rig.connect(4001);
    assert!(rig.ask(handle, GET).ends_with("i-1"));
}

#[test]
fn arp_is_answered_and_what_is_neither_arp_nor_tcp_is_counted() {
    let mut rig = small();
    let request = [
        &[0xff; 6][..],
        &THEIRS,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &THEIRS,
        &GUEST.octets(),
        &[0; 6],
        &ADDRESS.octets(),
    ]
    .concat();
    rig.stack.take(&request);
    let reply = rig.stack.give().unwrap();
    assert_eq!((&reply[..6], &reply[22..28]), (&THEIRS[..], &MAC[..]));
    rig.stack.take(&request[..41]);
    let mut strange = request.clone();
    strange[15] = 9;
    rig.stack.take(&strange);
    assert_eq!(rig.counter(|counters| &counters.rx_bad_eth), 2);
    assert!(rig.stack.give().is_none());
    let mut udp = vec![0; 34];
    udp[12] = 8;
    udp[14] = 0x45;
    udp[23] = 17;
    udp[30..34].copy_from_slice(&ADDRESS.octets());
    rig.stack.take(&udp);
    assert_eq!(rig.counter(|counters| &counters.rx_accepted_unusual), 1);
}

/// A driver sends what it likes: frames as above, changed and cut anywhere, in any order.
mod any {
    use proptest::prelude::*;

    use super::*;

    fn frames() -> Vec<Vec<u8>> {
        let mut rig = small();
        let handle = rig.connect(4000);
        let mut frames = Vec::new();
        for round in 0..20 {
            rig.interface.poll(ticks(rig.start, Instant::now()), &mut rig.guest, &mut rig.sockets);
            if round == 5 {
                rig.socket(handle).send_slice(GET_AND_CLOSE.as_bytes()).unwrap();
            }
            while let Some(frame) = rig.guest.outgoing.pop_front() {
                rig.stack.take(&frame);
                frames.push(frame);
            }
            while let Some(frame) = rig.stack.give() {
                rig.guest.incoming.push_back(frame);
            }
        }
        frames
    }

    proptest! {
        #[test]
        fn frames_never_break_it(
            changes in prop::collection::vec((any::<prop::sample::Index>(), 0..80usize, any::<u8>(), 0..100usize, any::<bool>()), 1..60)
        ) {
            let (frames, mut rig) = (frames(), small());
            for (which, place, byte, cut, take) in changes {
                let mut frame = which.get(&frames).clone();
                if let Some(place) = frame.get_mut(place) {
                    *place = byte;
                }
                if cut < 20 {
                    frame.truncate(14 + cut);
                }
                rig.stack.take(&frame);
                rig.stack.wake();
                while take && rig.stack.give().is_some() {}
                prop_assert!(rig.stack.wire.to_guest.len() <= MAX_FRAMES + 1);
                prop_assert!(rig.stack.connections.len() <= MAX_CONNECTIONS);
            }
        }
    }
}
