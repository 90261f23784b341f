use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use tempfile::TempDir;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::packet::{
    HEADER_BYTES, HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op,
};
use super::*;
use crate::virtio::queue::Queue;
use crate::virtio::testing::{self, Buffer, Driver, EVENT_IDX, Slot};

const CID: u64 = 5;
/// A port of the guest, and one of the host that a program serves.
const GUEST_PORT: u32 = 1234;
const SERVED: u32 = 80;
const ROOM: u32 = 1000;
/// As Linux says it, so that credit is no matter.
const PLENTY: u32 = 1 << 20;
const FOREVER: usize = 500;

type Packet = (Header, Vec<u8>);

/// A host with a directory of sockets, a guest with a driver.
struct Rig {
    directory: TempDir,
    slot: Slot<Vsock>,
    receive: Driver,
    transmit: Driver,
    event: Driver,
    rooms: HashMap<u16, Buffer>,
}

fn rig() -> Rig {
    let mut rig = rig_without_room();
    rig.make_room(16);
    rig
}

fn rig_without_room() -> Rig {
    let directory = tempfile::tempdir().unwrap();
    let device = Vsock::new(config(&directory), None).unwrap();
    plugged(directory, device)
}

/// With a driver that starts from nothing.
fn plugged(directory: TempDir, device: Vsock) -> Rig {
    let memory = testing::ram(8 << 20);
    let slot = Slot::new(device, &memory);
    let driver = |base: u64, size| Driver::new(&memory, base, size, EVENT_IDX);
    let (receive, transmit, event) = (driver(0x1000, 256), driver(0x20_0000, 256), driver(0x60_0000, 16));
    let mut rig = Rig { directory, slot, receive, transmit, event, rooms: HashMap::new() };
    rig.slot.start(rig.queues(), EVENT_IDX);
    rig.settle();
    rig
}

fn config(directory: &TempDir) -> Config {
    let path = directory.path().join("v.sock");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let connect = move |port: u32| {
        let stream = UnixStream::connect(format!("{}_{port}", path.display()))?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    };
    Config { guest_cid: CID, listener, connect: Box::new(connect) }
}

fn header(op: u16, host_port: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: GUEST_PORT,
        dst_port: host_port,
        kind: TYPE_STREAM,
        op,
        buf_alloc: PLENTY,
        ..Header::default()
    }
}

impl Rig {
    fn queues(&self) -> Vec<Queue> {
        vec![self.receive.queue(0), self.transmit.queue(1), self.event.queue(2)]
    }

    #[track_caller]
    fn settle(&mut self) {
        assert!(self.slot.run(FOREVER) < FOREVER, "the device never comes to rest");
    }

    /// The guest gives this many more buffers.
    fn make_room(&mut self, buffers: usize) {
        for _ in 0..buffers {
            let room = self.receive.room(HEADER_BYTES as u32 + ROOM);
            self.rooms.insert(self.receive.add(&[room]), room);
        }
        self.settle();
    }

    /// The guest sends a packet.
    #[track_caller]
    fn send(&mut self, header: Header, payload: &[u8]) {
        self.offer(header, payload);
        self.settle();
        assert_eq!(self.transmit.reap_all().len(), 1);
    }

    fn offer(&mut self, header: Header, payload: &[u8]) {
        let parts = [self.transmit.data(&header.to_bytes()), self.transmit.data(payload)];
        self.transmit.add(&parts);
    }

    /// A packet with a payload, its length as it should be.
    #[track_caller]
    fn write(&mut self, host_port: u32, payload: &[u8]) {
        self.send(Header { len: payload.len() as u32, ..header(op::RW, host_port) }, payload);
    }

    /// What the guest has got since the last call; its buffers go back.
    fn packets(&mut self) -> Vec<Packet> {
        self.settle();
        let mut packets = Vec::new();
        loop {
            let used = self.receive.reap_all();
            if used.is_empty() {
                return packets;
            }
            // A head that came back is another buffer's with the next one added.
            let used: Vec<_> =
                used.iter().map(|used| (used, self.rooms.remove(&used.head).unwrap())).collect();
            for (used, room) in used {
                let bytes = self.receive.read(room);
                assert!(used.written as usize >= HEADER_BYTES);
                let header = Header::from_bytes(bytes[..HEADER_BYTES].try_into().unwrap());
                assert_eq!(header.len as usize + HEADER_BYTES, used.written as usize);
                assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
                packets.push((header, bytes[HEADER_BYTES..used.written as usize].to_vec()));
                self.rooms.insert(self.receive.add(&[room]), room);
            }
            self.settle();
        }
    }

    /// The one packet that the guest has got.
    #[track_caller]
    fn packet(&mut self) -> Packet {
        let mut packets = self.packets();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.pop().unwrap()
    }

    /// Operation and flags of the packets that the guest has got.
    fn operations(&mut self) -> Vec<(u16, u32)> {
        self.packets().iter().map(|(header, _)| (header.op, header.flags)).collect()
    }

    /// A program of the host that has connected.
    fn client(&mut self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("v.sock")).unwrap();
        stream.set_nonblocking(true).unwrap();
        self.settle();
        stream
    }

    /// A connection that a program of the host has made, and its port.
    fn called(&mut self) -> (UnixStream, u32) {
        let mut client = self.client();
        client.write_all(b"CONNECT 1234\n").unwrap();
        let (request, _) = self.packet();
        assert_eq!((request.op, request.dst_port), (op::REQUEST, GUEST_PORT));
        self.send(header(op::RESPONSE, request.src_port), b"");
        assert_eq!(read(&mut client), format!("OK {}\n", request.src_port).into_bytes());
        (client, request.src_port)
    }

    fn serve(&self) -> UnixListener {
        let path = self.directory.path().join(format!("v.sock_{SERVED}"));
        UnixListener::bind(path).unwrap()
    }

    fn connections(&self) -> u64 {
        let counters = self.slot.device.counters();
        counters.conns_added.load(Ordering::Relaxed) - counters.conns_removed.load(Ordering::Relaxed)
    }

    fn invalid(&self) -> u64 {
        self.slot.device.counters().tx_invalid_packets.load(Ordering::Relaxed)
    }

    /// The device saved and built again, with the same driver.
    fn restore(mut self) -> Rig {
        let queues: Vec<_> = self.slot.stop().iter().map(Queue::save).collect();
        let DeviceState::Socket(state) = self.slot.device.save() else { unreachable!() };
        let memory = self.slot.memory.clone();
        self.slot = Slot::new(Vsock::new(config(&self.directory), Some(state)).unwrap(), &memory);
        let mut restored = Vec::new();
        let drivers = [&mut self.receive, &mut self.transmit, &mut self.event];
        for ((index, driver), state) in (0..).zip(drivers).zip(&queues) {
            driver.kick = EventFd::new(EFD_NONBLOCK).unwrap();
            restored.push(Queue::restore(index, state, driver.kick.try_clone().unwrap()).unwrap());
            driver.kick.write(1).unwrap();
        }
        self.slot.start(restored, EVENT_IDX);
        self.settle();
        self
    }
}

/// What there is to read.
fn read(stream: &mut UnixStream) -> Vec<u8> {
    stream.set_nonblocking(true).unwrap();
    let mut bytes = vec![0; 1 << 20];
    match stream.read(&mut bytes) {
        Ok(len) => bytes.truncate(len),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            bytes.clear();
        }
    }
    bytes
}

fn is_at_end(stream: &mut UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    stream.read(&mut [0]).is_ok_and(|len| len == 0)
}

#[test]
fn a_program_of_the_host_calls_the_guest_and_they_talk() {
    let mut rig = rig();
    let (mut client, port) = rig.called();
    assert!((FIRST_HOST_PORT..=LAST_HOST_PORT).contains(&port));
    client.write_all(b"hello guest").unwrap();
    let (header, payload) = rig.packet();
    assert_eq!((header.op, header.src_port, header.dst_port), (op::RW, port, GUEST_PORT));
    assert_eq!((header.buf_alloc, header.fwd_cnt, header.kind), (WINDOW, 0, TYPE_STREAM));
    assert_eq!(payload, b"hello guest");

    rig.write(port, b"hello host");
    assert_eq!(read(&mut client), b"hello host");
    client.write_all(b"again").unwrap();
    assert_eq!(rig.packet().0.fwd_cnt, 10, "what was forwarded comes with every packet");
}

#[test]
fn the_guest_calls_a_program_of_the_host_and_they_talk() {
    let mut rig = rig();
    let listener = rig.serve();
    rig.send(header(op::REQUEST, SERVED), b"");
    let (mut server, _) = listener.accept().unwrap();
    let (response, _) = rig.packet();
    assert_eq!((response.op, response.src_port, response.dst_port), (op::RESPONSE, SERVED, GUEST_PORT));
    rig.write(SERVED, b"hello host");
    assert_eq!(read(&mut server), b"hello host");
    server.write_all(b"hello guest").unwrap();
    assert_eq!(rig.packet().1, b"hello guest");
}

#[test]
fn a_port_that_nobody_serves_is_refused() {
    let mut rig = rig();
    rig.send(header(op::REQUEST, SERVED), b"");
    let (reset, _) = rig.packet();
    assert_eq!((reset.op, reset.src_port, reset.dst_port), (op::RST, SERVED, GUEST_PORT));
    assert_eq!(rig.connections(), 0);
}

#[test]
fn a_call_that_the_guest_refuses_ends_for_the_program_that_made_it() {
    let mut rig = rig();
    let mut client = rig.client();
    client.write_all(b"CONNECT 1234\n").unwrap();
    let port = rig.packet().0.src_port;
    rig.send(header(op::RST, port), b"");
    assert!(is_at_end(&mut client));
    assert_eq!(rig.operations(), []);
    assert_eq!(rig.connections(), 0);
}

#[test]
fn a_program_that_does_not_say_connect_and_a_port_is_hung_up_on() {
    let mut rig = rig();
    for line in [
        "\n",
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT 1 2\n",
        "CONNECT -1\n",
        "CONNECT 4294967295\n",
        "CONNECT 4294967296\n",
        "HELLO 1\n",
        "CONNECT 000000000000000000000000000000001234\n",
        "a line without end, that is too long",
    ] {
        let mut client = rig.client();
        client.write_all(line.as_bytes()).unwrap();
        rig.settle();
        // What of it was not read makes the end an error.
        let end = client.read(&mut [0]).map_err(|error| error.kind());
        assert!(matches!(end, Ok(0) | Err(ErrorKind::ConnectionReset)), "{line:?}: {end:?}");
    }
    drop(rig.client());
    assert_eq!(rig.operations(), []);
    assert_eq!(rig.connections(), 0);
    for line in ["connect 7\n", "CONNECT   7 \r\n"] {
        rig.client().write_all(line.as_bytes()).unwrap();
        assert_eq!(rig.packets()[0].0.dst_port, 7, "{line:?}");
    }
}

#[test]
fn a_line_may_come_in_pieces_and_with_what_follows_it() {
    let mut rig = rig();
    let mut client = rig.client();
    client.write_all(b"CONN").unwrap();
    rig.settle();
    client.write_all(b"ECT 1234\nfirst words").unwrap();
    let (request, _) = rig.packet();
    rig.send(header(op::RESPONSE, request.src_port), b"");
    assert_eq!(rig.packet().1, b"first words");
}

#[test]
fn the_host_ends_its_direction_and_still_gets_the_guests() {
    let mut rig = rig();
    let (mut client, port) = rig.called();
    client.write_all(b"last words").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let packets = rig.packets();
    assert_eq!(packets[0].1, b"last words");
    assert_eq!((packets[1].0.op, packets[1].0.flags), (op::SHUTDOWN, SHUTDOWN_SEND));
    assert_eq!(packets.len(), 2);

    rig.write(port, b"answer");
    assert_eq!(read(&mut client), b"answer");
    rig.send(Header { flags: SHUTDOWN_SEND, ..header(op::SHUTDOWN, port) }, b"");
    assert!(is_at_end(&mut client));
    assert_eq!(rig.operations(), [(op::SHUTDOWN, SHUTDOWN_BOTH)]);
    rig.send(header(op::RST, port), b"");
    assert_eq!(rig.operations(), []);
    assert_eq!(rig.connections(), 0);
}

#[test]
fn the_guest_ends_its_direction_and_still_gets_the_hosts() {
    let mut rig = rig();
    let (mut client, port) = rig.called();
    rig.write(port, b"last words");
    rig.send(Header { flags: SHUTDOWN_SEND, ..header(op::SHUTDOWN, port) }, b"");
    assert_eq!(read(&mut client), b"last words");
    assert!(is_at_end(&mut client));
    client.write_all(b"answer").unwrap();
    assert_eq!(rig.packet().1, b"answer");
    drop(client);
    assert_eq!(rig.operations(), [(op::SHUTDOWN, SHUTDOWN_BOTH)]);
}

#[test]
fn a_guest_that_does_not_read_any_more_is_not_written_to() {
    let mut rig = rig();
    let (mut client, port) = rig.called();
    rig.send(Header { flags: SHUTDOWN_RECEIVE, ..header(op::SHUTDOWN, port) }, b"");
    assert_eq!(client.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    rig.write(port, b"still talking");
    assert_eq!(read(&mut client), b"still talking");
    drop(client);
    assert_eq!(rig.operations(), [(op::SHUTDOWN, SHUTDOWN_BOTH)]);
}

#[test]
fn a_guest_that_closes_gets_its_reset_and_the_host_its_end() {
    let mut rig = rig();
    let (mut client, port) = rig.called();
    rig.write(port, b"bye");
    rig.send(Header { flags: SHUTDOWN_BOTH, ..header(op::SHUTDOWN, port) }, b"");
    assert_eq!(rig.operations(), [(op::RST, 0)]);
    assert_eq!(read(&mut client), b"bye");
    assert!(is_at_end(&mut client));
    assert_eq!(rig.connections(), 0);
}

#[test]
fn a_host_that_is_gone_is_told_after_what_it_said_and_costs_nothing_until_the_guest_answers() {
    let mut rig = rig();
    let (mut client, port) = rig.called();
    client.write_all(&[7; 3 * ROOM as usize]).unwrap();
    drop(client);
    let packets = rig.packets();
    let data: Vec<u8> = packets.iter().flat_map(|(_, payload)| payload.clone()).collect();
    assert_eq!(data, [7; 3 * ROOM as usize]);
    let (last, _) = packets.last().unwrap();
    assert_eq!((last.op, last.flags), (op::SHUTDOWN, SHUTDOWN_BOTH));

    rig.write(port, b"to nobody");
    rig.send(header(op::CREDIT_REQUEST, port), b"");
    assert_eq!(rig.operations(), []);
    assert_eq!(rig.connections(), 1);
    rig.send(header(op::RST, port), b"");
    assert_eq!(rig.connections(), 0);
}

#[test]
fn a_host_that_dies_while_the_guest_writes_is_told_and_takes_no_memory() {
    let mut rig = rig();
    let (client, port) = rig.called();
    fill(&mut rig, port);
    drop(client);
    rig.settle();
    assert_eq!(rig.operations().last(), Some(&(op::RST, 0)), "it had unread bytes, so the end is an error");
    assert_eq!(rig.connections(), 0);
}

/// The guest writes until the host's socket is full and some of it waits.
fn fill(rig: &mut Rig, port: u32) -> usize {
    let mut sent = 0;
    let mut told = 0;
    loop {
        let bytes = 8000.min(WINDOW as usize - (sent - told));
        if bytes == 0 {
            return sent;
        }
        let payload: Vec<u8> = (sent..sent + bytes).map(|i| (i % 251) as u8).collect();
        rig.offer(Header { len: bytes as u32, ..header(op::RW, port) }, &payload);
        rig.settle();
        rig.transmit.reap_all();
        sent += bytes;
        for (header, _) in rig.packets() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            told = header.fwd_cnt as usize;
        }
    }
}

#[test]
fn a_host_that_does_not_read_costs_the_window_and_no_time_and_gets_all_when_it_reads() {
    let mut rig = rig();
    let (mut client, port) = rig.called();
    let sent = fill(&mut rig, port);
    rig.settle();
    let mut got = Vec::new();
    let mut credit = false;
    while got.len() < sent {
        let part = read(&mut client);
        assert!(!part.is_empty(), "{} of {sent} bytes", got.len());
        got.extend(part);
        credit |= rig.operations().contains(&(op::CREDIT_UPDATE, 0));
    }
    assert!(credit, "the guest hears that there is room again");
    assert!(got.iter().enumerate().all(|(i, byte)| *byte == (i % 251) as u8));
}

#[test]
fn a_guest_that_is_done_loses_nothing_of_what_a_slow_host_has_not_read() {
    let mut rig = rig();
    let (mut client, port) = rig.called();
    let sent = fill(&mut rig, port);
    rig.send(Header { flags: SHUTDOWN_BOTH, ..header(op::SHUTDOWN, port) }, b"");
    assert_eq!(rig.operations(), [(op::RST, 0)], "the guest need not wait");
    assert_eq!(rig.connections(), 1);
    let mut got = 0;
    while got < sent {
        got += read(&mut client).len();
        rig.settle();
    }
    assert!(is_at_end(&mut client));
    assert_eq!(rig.connections(), 0);
}

#[test]
fn more_than_the_guest_has_credit_for_is_a_reset() {
    let mut rig = rig();
    let (_client, port) = rig.called();
    fill(&mut rig, port);
    rig.write(port, b"x");
    assert_eq!(rig.operations(), [(op::RST, 0)]);
    assert_eq!(rig.connections(), 0);
}

#[test]
fn a_guest_without_credit_is_asked_once_and_gets_the_rest_when_it_has_some() {
    let mut rig = rig();
    let (mut client, port) = rig.called();
    rig.send(Header { buf_alloc: 5, ..header(op::CREDIT_UPDATE, port) }, b"");
    client.write_all(b"0123456789").unwrap();
    let packets = rig.packets();
    assert_eq!(packets[0].1, b"01234");
    assert_eq!((packets.len(), packets[1].0.op), (2, op::CREDIT_REQUEST));
    // It has none.
    rig.send(Header { buf_alloc: 5, ..header(op::CREDIT_UPDATE, port) }, b"");
    assert_eq!(rig.operations(), []);
    rig.send(Header { buf_alloc: 5, fwd_cnt: 3, ..header(op::CREDIT_UPDATE, port) }, b"");
    assert_eq!(rig.packets()[0].1, b"567");
    // It says that it has taken more than it got.
    rig.send(Header { buf_alloc: 5, fwd_cnt: 1000, ..header(op::CREDIT_UPDATE, port) }, b"");
    assert!(rig.operations().iter().all(|(op, _)| *op == op::CREDIT_REQUEST));
    drop(client);
    rig.settle();
    rig.send(Header { buf_alloc: 100, fwd_cnt: 8, ..header(op::CREDIT_UPDATE, port) }, b"");
    let packets = rig.packets();
    assert_eq!(packets[0].1, b"89");
    assert_eq!((packets[1].0.op, packets[1].0.flags), (op::SHUTDOWN, SHUTDOWN_BOTH));
}

#[test]
fn a_guest_that_asks_for_credit_gets_it() {
    let mut rig = rig();
    let (_client, port) = rig.called();
    rig.write(port, b"12345");
    rig.send(header(op::CREDIT_REQUEST, port), b"");
    let (update, _) = rig.packet();
    assert_eq!((update.op, update.buf_alloc, update.fwd_cnt), (op::CREDIT_UPDATE, WINDOW, 5));
}

#[test]
fn a_guest_without_buffers_costs_no_time_and_gets_everything_later_in_turn() {
    let mut rig = rig_without_room();
    let mut clients: Vec<_> = (0..4).map(|_| rig.client()).collect();
    for client in &mut clients {
        client.write_all(b"CONNECT 1234\n").unwrap();
    }
    rig.settle();
    rig.make_room(4);
    let ports: Vec<u32> = rig.packets().iter().map(|(header, _)| header.src_port).collect();
    assert_eq!(ports.len(), 4);
    for port in &ports {
        rig.send(header(op::RESPONSE, *port), b"");
    }
    // Each has much to say, and nobody has the guest to himself.
    for client in &mut clients {
        client.write_all(&[1; 10 * ROOM as usize]).unwrap();
    }
    let turns: Vec<u32> = rig.packets().iter().map(|(header, _)| header.src_port).collect();
    assert_eq!(turns.len(), 40);
    for round in turns.chunks(4) {
        let mut round = round.to_vec();
        round.sort();
        assert_eq!(round, ports);
    }
}

#[test]
fn a_length_beyond_the_packet_is_a_reset_and_nothing_of_it_reaches_the_host() {
    let mut rig = rig();
    for len in [5, 1 << 16, u32::MAX] {
        let (mut client, port) = rig.called();
        rig.send(Header { len, ..header(op::RW, port) }, b"1234");
        assert_eq!(rig.operations(), [(op::RST, 0)]);
        assert!(is_at_end(&mut client));
    }
    // A packet may be longer than it says.
    let (mut client, port) = rig.called();
    rig.send(Header { len: 2, ..header(op::RW, port) }, b"1234");
    assert_eq!(read(&mut client), b"12");
    assert_eq!(rig.invalid(), 3);
}

#[test]
fn packets_of_no_connection_are_answered_with_a_reset_and_resets_with_nothing() {
    let mut rig = rig();
    let _listener = rig.serve();
    for op in [op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 99, 0xffff] {
        rig.send(header(op, SERVED), b"");
        assert_eq!(rig.operations(), [(op::RST, 0)], "{op}");
    }
    rig.send(header(op::RST, SERVED), b"");
    assert_eq!(rig.operations(), []);
    // A type that is not offered; another guest; the port that is none.
    for odd in [
        Header { kind: 2, ..header(op::REQUEST, SERVED) },
        Header { dst_cid: 9, ..header(op::REQUEST, SERVED) },
        Header { src_port: u32::MAX, ..header(op::REQUEST, SERVED) },
    ] {
        rig.offer(odd, b"");
        rig.slot.run(FOREVER);
        let used = rig.receive.reap().unwrap();
        let room = rig.rooms.remove(&used.head).unwrap();
        let reset = Header::from_bytes(rig.receive.read(room)[..HEADER_BYTES].try_into().unwrap());
        assert_eq!(reset, odd.reset());
    }
    assert_eq!(rig.connections(), 0);
}

#[test]
fn what_is_no_packet_or_not_from_this_guest_is_dropped() {
    let mut rig = rig();
    rig.send(Header { src_cid: 6, ..header(op::REQUEST, SERVED) }, b"");
    let short = rig.transmit.data(&[0; HEADER_BYTES - 1]);
    rig.transmit.add(&[short]);
    let writable = rig.transmit.room(100);
    rig.transmit.add(&[writable]);
    assert_eq!(rig.operations(), []);
    assert_eq!(rig.invalid(), 3);
    assert!(!rig.slot.calls.broken());
}

#[test]
fn packets_out_of_their_turn_end_a_connection() {
    let mut rig = rig();
    for bad in [op::REQUEST, op::RESPONSE, 0, 8] {
        let (mut client, port) = rig.called();
        rig.send(header(bad, port), b"");
        assert_eq!(rig.operations(), [(op::RST, 0)], "{bad}");
        assert!(is_at_end(&mut client));
    }
    // Before the guest has said that it takes the call, and after it has said that it is done.
    let mut client = rig.client();
    client.write_all(b"CONNECT 1234\n").unwrap();
    let port = rig.packet().0.src_port;
    rig.write(port, b"early");
    assert_eq!(rig.operations(), [(op::RST, 0)]);
    let (_client, port) = rig.called();
    rig.send(Header { flags: SHUTDOWN_SEND, ..header(op::SHUTDOWN, port) }, b"");
    rig.write(port, b"late");
    assert_eq!(rig.operations(), [(op::RST, 0)]);
    assert_eq!(rig.connections(), 0);
}

#[test]
fn resets_that_the_guest_does_not_take_hold_its_packets_back_and_none_is_lost() {
    let mut rig = rig_without_room();
    let total = MAX_RESETS + 100;
    let mut taken = 0;
    for port in 0..total as u32 {
        rig.offer(header(op::RW, port), b"");
        rig.settle();
        taken += rig.transmit.reap_all().len();
    }
    assert_eq!(taken, MAX_RESETS);
    rig.make_room(8);
    let ports: Vec<u32> = rig.packets().iter().map(|(header, _)| header.src_port).collect();
    assert_eq!(ports, (0..total as u32).collect::<Vec<_>>());
    assert_eq!(rig.transmit.reap_all().len(), 100);
}

#[test]
fn more_connections_than_there_may_be_are_refused_on_both_sides() {
    let mut rig = rig();
    let listener = rig.serve();
    listener.set_nonblocking(true).unwrap();
    let mut servers = Vec::new();
    for port in 0..MAX_CONNECTIONS as u32 {
        rig.send(Header { src_port: port, ..header(op::REQUEST, SERVED) }, b"");
        servers.push(listener.accept().unwrap());
        assert_eq!(rig.operations(), [(op::RESPONSE, 0)]);
    }
    rig.send(Header { src_port: 1 << 20, ..header(op::REQUEST, SERVED) }, b"");
    assert_eq!(rig.operations(), [(op::RST, 0)]);
    assert!(listener.accept().is_err());
    let mut client = rig.client();
    assert!(is_at_end(&mut client));

    rig.send(Header { src_port: 0, ..header(op::RST, SERVED) }, b"");
    rig.called();
}

#[test]
fn who_waits_too_long_for_the_other_side_is_given_up() {
    let mut rig = rig();
    let mut silent = rig.client();
    let mut calling = rig.client();
    calling.write_all(b"CONNECT 1234\n").unwrap();
    assert_eq!(rig.operations(), [(op::REQUEST, 0)]);
    let (closing, _) = rig.called();
    drop(closing);
    assert_eq!(rig.operations(), [(op::SHUTDOWN, SHUTDOWN_BOTH)]);
    let (mut open, port) = rig.called();
    assert_eq!(rig.connections(), 4);

    rig.slot.device.muxer.time_passes();
    rig.slot.device.handle(TIMER);
    assert_eq!(rig.operations(), [(op::RST, 0), (op::RST, 0)]);
    assert!(is_at_end(&mut silent) && is_at_end(&mut calling));
    assert_eq!(rig.connections(), 1);
    rig.write(port, b"alive");
    assert_eq!(read(&mut open), b"alive");
    assert_eq!(rig.slot.device.counters().conns_killed.load(Ordering::Relaxed), 3);
}

#[test]
fn a_client_that_leaves_before_the_guest_has_answered_is_taken_back() {
    let mut rig = rig();
    let mut client = rig.client();
    client.write_all(b"CONNECT 1234\n").unwrap();
    let port = rig.packet().0.src_port;
    drop(client);
    assert_eq!(rig.operations(), [(op::RST, 0)]);
    rig.send(header(op::RESPONSE, port), b"");
    assert_eq!(rig.operations(), [(op::RST, 0)]);
    assert_eq!(rig.connections(), 0);
}

#[test]
fn connections_live_through_a_pause_and_nobody_is_blamed_for_the_time() {
    let mut rig = rig();
    let (mut client, port) = rig.called();
    let mut calling = rig.client();
    calling.write_all(b"CONNECT 1234\n").unwrap();
    let call = rig.packet().0.src_port;
    client.write_all(b"before").unwrap();
    let queues: Vec<_> = rig.slot.stop().iter().map(Queue::save).collect();
    client.write_all(b" and while").unwrap();
    rig.slot.device.muxer.time_passes();

    let drivers = [&rig.receive, &rig.transmit, &rig.event];
    let restart = |((index, driver), state): ((u16, &Driver), _)| {
        driver.kick.write(1).unwrap();
        Queue::restore(index, state, driver.kick.try_clone().unwrap()).unwrap()
    };
    let queues = (0..).zip(drivers).zip(&queues).map(restart).collect();
    rig.slot.start(queues, EVENT_IDX);
    assert_eq!(rig.packet().1, b"before and while");
    rig.write(port, b"after");
    assert_eq!(read(&mut client), b"after");
    rig.send(header(op::RESPONSE, call), b"");
    assert_eq!(read(&mut calling), format!("OK {call}\n").as_bytes());
}

#[test]
fn a_restored_device_says_that_connections_are_gone_and_lets_nobody_in_before_that_is_heard() {
    let mut rig = rig();
    let (mut client, port) = rig.called();
    let events: Vec<Buffer> = (0..3).map(|_| rig.event.room(4)).collect();
    rig.event.memory = rig.slot.memory.clone();
    for event in &events {
        rig.event.add(&[*event]);
    }
    rig.settle();
    assert_eq!(rig.event.reap(), None, "nothing happens by itself");

    let mut rig = rig.restore();
    assert!(is_at_end(&mut client));
    let written: Vec<u32> = rig.event.reap_all().iter().map(|used| used.written).collect();
    assert_eq!(written, [4, 0, 0]);
    assert_eq!(rig.event.read(events[0]), EVENT_TRANSPORT_RESET);
    let mut early = rig.client();
    early.write_all(b"CONNECT 1234\n").unwrap();
    assert_eq!(rig.operations(), []);
    // What the guest still sends is answered.
    rig.write(port, b"to whom");
    assert_eq!(rig.operations(), [(op::RST, 0)]);

    rig.event.add(&[events[0]]);
    let (request, _) = rig.packet();
    assert_eq!(request.op, op::REQUEST);
    assert_ne!(request.src_port, port);
    assert_eq!(rig.event.reap(), None);
}

#[test]
fn a_driver_that_hears_no_events_does_not_keep_everybody_out_for_ever() {
    let mut rig = rig().restore();
    let mut client = rig.client();
    client.write_all(b"CONNECT 1234\n").unwrap();
    assert_eq!(rig.operations(), []);
    rig.slot.device.muxer.time_passes();
    rig.slot.device.handle(TIMER);
    assert_eq!(rig.operations(), [(op::REQUEST, 0)]);
}

#[test]
fn a_new_driver_knows_nothing_of_the_connections_of_the_one_before() {
    let mut rig = rig();
    let (mut client, port) = rig.called();
    client.write_all(b"unheard").unwrap();
    rig.slot.stop();
    rig.slot.device.reset();
    assert!(client.read(&mut [0]).is_ok_and(|len| len == 0) || client.write(b"x").is_err());
    assert_eq!(rig.connections(), 0);
    let mut rig = plugged(rig.directory, rig.slot.device);
    rig.make_room(4);
    assert_eq!(rig.operations(), []);
    rig.write(port, b"x");
    assert_eq!(rig.operations(), [(op::RST, 0)]);
    rig.called();
}

/// A guest resets a device on a vCPU's thread, which may not begin to watch anything.
#[test]
fn after_a_reset_programs_of_the_host_are_let_in_when_the_device_runs_and_not_before() {
    let mut rig = rig().restore();
    let mut early = rig.client();
    early.write_all(b"CONNECT 1234\n").unwrap();
    rig.slot.stop();
    rig.slot.device.reset();
    let (sockets, watch) = (rig.slot.device.muxer.sockets_fd(), Epoll::new().unwrap());
    watch.ctl(ControlOperation::Add, sockets, EpollEvent::new(EventSet::IN, 0)).unwrap();
    assert_eq!(watch.wait(0, &mut [EpollEvent::default()]).unwrap(), 0);
    let mut rig = plugged(rig.directory, rig.slot.device);
    rig.make_room(4);
    assert_eq!(rig.operations(), [(op::REQUEST, 0)]);
}

#[test]
fn buffers_too_small_for_a_packet_come_back_and_swallow_none() {
    let mut rig = rig();
    let (mut client, _) = rig.called();
    rig.slot.stop();
    let mut rig = plugged(rig.directory, rig.slot.device);
    for len in [1, HEADER_BYTES as u32 - 1, HEADER_BYTES as u32] {
        let room = rig.receive.room(len);
        rig.receive.add(&[room]);
    }
    let readable = rig.receive.data(&[0; 100]);
    rig.receive.add(&[readable]);
    client.write_all(b"whole").unwrap();
    rig.settle();
    assert!(rig.receive.reap_all().iter().all(|used| used.written == 0));
    rig.make_room(1);
    assert_eq!(rig.packet().1, b"whole");
    assert!(!rig.slot.calls.broken());
}

#[test]
fn a_driver_that_breaks_a_queue_stops_the_device_and_nothing_spins() {
    let mut rig = rig();
    let (mut client, _) = rig.called();
    rig.transmit.set_avail_index(5000);
    rig.transmit.kick.write(1).unwrap();
    client.write_all(b"hello").unwrap();
    rig.settle();
    assert!(rig.slot.calls.broken());
    assert_eq!(rig.slot.stop().len(), 3);
}

#[test]
fn the_guests_address_is_in_its_configuration() {
    let rig = rig();
    let mut space = [0xff; 10];
    rig.slot.device.config(0, &mut space);
    assert_eq!(space, [5, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    rig.slot.device.config(4, &mut space[..4]);
    assert_eq!(space[..4], [0; 4]);
    rig.slot.device.config(u64::MAX, &mut space);
    assert_eq!(space, [0; 10]);
}

#[derive(Clone, Debug)]
enum Act {
    HostWrites(usize, usize),
    HostReads(usize),
    HostShutsDown(usize),
    HostLeaves(usize),
    HostCalls(u32),
    Guest { op: u16, connection: usize, len: u32, more: usize, flags: u32, buf_alloc: u32, fwd_cnt: u32 },
    GuestReads,
    TimePasses,
}

fn act() -> impl Strategy<Value = Act> {
    let guest = (0u16..9, 0usize..6, 0u32..200_000, 0usize..2000, 0u32..5, any::<u32>(), any::<u32>());
    prop_oneof![
        (0usize..6, 0usize..100_000).prop_map(|(i, len)| Act::HostWrites(i, len)),
        (0usize..6).prop_map(Act::HostReads),
        (0usize..6).prop_map(Act::HostShutsDown),
        (0usize..6).prop_map(Act::HostLeaves),
        (0u32..5).prop_map(Act::HostCalls),
        guest.prop_map(|(op, connection, len, more, flags, buf_alloc, fwd_cnt)| {
            Act::Guest { op, connection, len: len % 3000, more, flags, buf_alloc, fwd_cnt }
        }),
        Just(Act::GuestReads),
        Just(Act::TimePasses),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Both sides do what they like, in any order.
    #[test]
    fn whatever_both_sides_do_the_device_comes_to_rest_and_forgets_nothing(
        acts in proptest::collection::vec(act(), 1..60),
    ) {
        let mut rig = rig();
        let mut streams: Vec<UnixStream> = Vec::new();
        let mut ports = vec![SERVED];
        let listener = rig.serve();
        listener.set_nonblocking(true).unwrap();
        let pick = |streams: &[UnixStream], index: usize| index % streams.len().max(1);
        for act in acts {
            match act {
                Act::HostWrites(i, len) if !streams.is_empty() => {
                    let at = pick(&streams, i);
                    let _ = streams[at].write(&vec![1; len]);
                }
                Act::HostReads(i) if !streams.is_empty() => {
                    let at = pick(&streams, i);
                    let _ = streams[at].read(&mut [0; 5000]);
                }
                Act::HostShutsDown(i) if !streams.is_empty() => {
                    let at = pick(&streams, i);
                    let _ = streams[at].shutdown(Shutdown::Write);
                }
                Act::HostLeaves(i) if !streams.is_empty() => {
                    let at = pick(&streams, i);
                    streams.remove(at);
                }
                Act::HostCalls(port) => {
                    let mut client = rig.client();
                    let _ = client.write_all(format!("CONNECT {port}\n").as_bytes());
                    streams.push(client);
                }
                Act::Guest { op, connection, len, more, flags, buf_alloc, fwd_cnt } => {
                    let port = ports[connection % ports.len()];
                    let header = Header {
                        src_port: (connection % 5) as u32, len, flags, buf_alloc, fwd_cnt, ..header(op, port)
                    };
                    if rig.transmit.free_descriptors() >= 2 {
                        rig.offer(header, &vec![2; more]);
                    }
                }
                Act::GuestReads => {
                    ports.extend(rig.packets().iter().map(|(header, _)| header.src_port));
                    ports.truncate(50);
                }
                Act::TimePasses => {
                    rig.slot.device.muxer.time_passes();
                    rig.slot.device.handle(TIMER);
                }
                _ => {}
            }
            rig.settle();
            rig.transmit.reap_all();
            while let Ok((stream, _)) = listener.accept() {
                stream.set_nonblocking(true).unwrap();
                streams.push(stream);
            }
        }
        prop_assert!(!rig.slot.calls.broken());
        // When all have left and the guest has been given up, nothing is left.
        drop(streams);
        rig.packets();
        rig.slot.device.muxer.time_passes();
        rig.slot.device.handle(TIMER);
        rig.packets();
        // Those whose guest gives no credit wait for it; a guest that resets them all lets them go.
        rig.slot.stop();
        rig.slot.device.reset();
        prop_assert_eq!(rig.connections(), 0);
    }
}
