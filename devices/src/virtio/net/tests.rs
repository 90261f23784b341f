use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::header::MAX_PACKET;
use super::*;
use crate::backend::rate_limiter::Bucket;
use crate::backend::tap::HEADER_BYTES;
use crate::backend::vhost;
use crate::backend::vhost_net::fake::Pair;
use crate::backend::vhost_net::{RECEIVE, TRANSMIT};
use crate::memory::GuestRam;
use crate::virtio::testing::{self, Buffer, Driver, EVENT_IDX, Slot};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MERGEABLE: u64 = 1 << spec::VIRTIO_NET_F_MRG_RXBUF;
const SEVERAL: u64 = 1 << spec::VIRTIO_NET_F_MQ | 1 << spec::VIRTIO_NET_F_CTRL_VQ;
const FOREVER: usize = 200;

/// A device between its driver and what stands for the tap.
struct Rig {
    slot: Slot<Net>,
    drivers: Vec<Driver>,
    /// The other ends of the tap's queues.
    wires: Vec<UnixDatagram>,
    features: u64,
}

fn config(tap: Tap) -> Config {
    Config {
        tap,
        mac: Some(MAC),
        mtu: None,
        receive_limits: Limits::default(),
        transmit_limits: Limits::default(),
        neighbour: None,
        vhost: Vec::new(),
        room: None,
    }
}

fn rig(features: u64, pairs: usize) -> Rig {
    limited(features, pairs, Limits::default(), Limits::default())
}

fn limited(features: u64, pairs: usize, receive_limits: Limits, transmit_limits: Limits) -> Rig {
    let (tap, wires) = Tap::fake(pairs);
    let net = Net::new(Config { receive_limits, transmit_limits, ..config(tap) }, None).unwrap();
    let memory = testing::ram(16 << 20);
    let queues = net.identity().queue_sizes.len() as u64;
    let features = features | EVENT_IDX;
    let drivers = (0..queues).map(|queue| Driver::new(&memory, (queue + 1) << 20, 16, features)).collect();
    let mut rig = Rig { slot: Slot::new(net, &memory), drivers, wires, features };
    rig.start();
    rig
}

impl Rig {
    fn start(&mut self) {
        let queues = (0..).zip(&self.drivers).map(|(index, driver)| driver.queue(index)).collect();
        self.slot.start(queues, self.features);
        self.settle();
    }

    fn settle(&mut self) {
        assert!(self.slot.run(FOREVER) < FOREVER, "the device never comes to rest");
    }

    /// Gives the first receive queue so many buffers of so many bytes.
    fn make_room(&mut self, buffers: usize, bytes: u32) {
        for _ in 0..buffers {
            let room = self.drivers[0].room(bytes);
            self.drivers[0].add(&[room]);
        }
        self.settle();
    }

    fn arrive(&mut self, frame: &[u8]) {
        self.wires[0].send(&with_header(frame)).unwrap();
    }

    fn received(&mut self) -> Vec<u32> {
        self.drivers[0].reap_all().iter().map(|used| used.written).collect()
    }

    fn send(&mut self, header: [u8; HEADER_BYTES], frame: &[u8]) {
        self.add_frame(header, frame);
        self.settle();
        assert_eq!(self.drivers[1].reap_all().len(), 1, "a frame comes back whatever became of it");
    }

    fn add_frame(&mut self, header: [u8; HEADER_BYTES], frame: &[u8]) {
        let parts = [self.drivers[1].data(&header), self.drivers[1].data(frame)];
        self.drivers[1].add(&parts);
    }

    fn on_the_wire(&self, queue: usize) -> Option<Vec<u8>> {
        let mut packet = vec![0; 1 << 17];
        match self.wires[queue].recv(&mut packet) {
            Ok(bytes) => Some(packet[..bytes].to_vec()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn counter(&self, pick: impl Fn(&Counters) -> &AtomicU64) -> u64 {
        pick(&self.slot.device.counters()).load(Ordering::Relaxed)
    }

    /// Sends a command of four bytes and gives its answer.
    fn command(&mut self, bytes: &[u8]) -> u8 {
        let queue = usize::from(self.slot.device.control.queue());
        let driver = &mut self.drivers[queue];
        let (command, answer) = (driver.data(bytes), driver.room(1));
        driver.add(&[command, answer]);
        self.settle();
        assert_eq!(self.drivers[queue].reap().unwrap().written, 1);
        self.drivers[queue].read(answer)[0]
    }

    fn set_pairs(&mut self, pairs: u8) -> u8 {
        self.command(&[4, 0, pairs, 0])
    }

    /// Stops the device and carries on with one made from its state alone.
    fn move_on(&mut self, tap: Tap) {
        let queues: Vec<_> = self.slot.stop().iter().map(Queue::save).collect();
        let DeviceState::Network(state) = self.slot.device.save() else { unreachable!() };
        let memory = self.slot.memory.clone();
        self.slot = Slot::new(Net::new(config(tap), Some(state)).unwrap(), &memory);
        let restore = |((index, driver), state): ((u16, &Driver), _)| {
            Queue::restore(index, state, driver.kick.try_clone().unwrap()).unwrap()
        };
        self.slot.start((0..).zip(&self.drivers).zip(&queues).map(restore).collect(), self.features);
        self.settle();
    }
}

/// A frame of so many bytes that says which one it is.
fn frame(number: usize, bytes: usize) -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &MAC, &[8, 0]].concat();
    frame.extend((frame.len()..bytes).map(|place| (place * 7 + number) as u8));
    frame
}

fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0; HEADER_BYTES], frame].concat()
}

fn a_few_at_a_time() -> Limits {
    Limits { bandwidth: None, ops: Some(Bucket { size: 2, one_time_burst: 0, refill_ms: 20 }) }
}

#[test]
fn a_frame_goes_out_as_it_is_and_its_header_says_what_was_checked() {
    let mut rig = rig(1 << spec::VIRTIO_NET_F_CSUM, 1);
    let frame = frame(1, 60);
    rig.send([0xff, 0, 54, 0, 0, 0, 34, 0, 16, 0, 7, 7], &frame);
    let expected = [&[1, 0, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0][..], &frame].concat();
    assert_eq!(rig.on_the_wire(0), Some(expected));
    assert_eq!(rig.counter(|c| &c.tx_packets_count), 1);
    assert_eq!(rig.counter(|c| &c.tx_bytes_count), 60);
    assert_eq!(rig.counter(|c| &c.tx_spoofed_mac_count), 0);
}

#[test]
fn a_frame_in_many_pieces_is_one_packet() {
    let mut rig = rig(0, 1);
    let packet = with_header(&frame(2, 900));
    let parts: Vec<Buffer> = packet.chunks(5).map(|part| rig.drivers[1].data(part)).collect();
    rig.drivers[1].add_indirect(&parts);
    rig.settle();
    assert_eq!(rig.on_the_wire(0), Some(packet));
}

#[test]
fn frames_under_another_address_are_counted() {
    let mut rig = rig(0, 1);
    let mut other = frame(0, 60);
    other[11] = 9;
    rig.send([0; 12], &other);
    assert!(rig.on_the_wire(0).is_some());
    assert_eq!(rig.counter(|c| &c.tx_spoofed_mac_count), 1);
}

#[test]
fn malformed_frames_are_dropped_and_the_device_goes_on() {
    let mut rig = rig(0, 1);
    for (header, bytes) in [
        ([0; 12], 13),
        ([0; 12], MAX_PACKET - HEADER_BYTES + 1),
        ([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 60),
        ([0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 60),
        ([0, 0, 61, 0, 0, 0, 0, 0, 0, 0, 0, 0], 60),
    ] {
        rig.send(header, &frame(0, bytes)[..bytes]);
        assert_eq!(rig.on_the_wire(0), None, "{header:?} {bytes}");
    }
    let writable = rig.drivers[1].room(100);
    rig.drivers[1].add(&[writable]);
    rig.settle();
    assert_eq!(rig.counter(|c| &c.tx_malformed_frames), 6);
    assert_eq!(rig.counter(|c| &c.tx_fails), 6);
    rig.drivers[1].reap_all();
    rig.send([0; 12], &frame(0, 14));
    assert!(rig.on_the_wire(0).is_some() && !rig.slot.calls.broken());
}

#[test]
fn a_frame_in_as_many_pieces_as_a_chain_may_have_is_one_packet() {
    let mut rig = rig(0, 1);
    let (header, byte) = (rig.drivers[1].data(&[0; 12 + 14]), rig.drivers[1].data(&[7]));
    let parts: Vec<Buffer> = [header].into_iter().chain(std::iter::repeat_n(byte, 1023)).collect();
    rig.drivers[1].add_indirect(&parts);
    rig.settle();
    assert_eq!(rig.on_the_wire(0).map(|packet| packet.len()), Some(12 + 14 + 1023));
    assert_eq!(rig.drivers[1].reap_all().len(), 1);
}

#[test]
fn a_frame_that_the_host_does_not_take_is_lost_and_counted() {
    let mut rig = rig(0, 1);
    rig.wires.clear();
    for _ in 0..3 {
        rig.send([0; 12], &frame(0, 60));
    }
    assert_eq!(rig.counter(|c| &c.tap_write_fails), 3);
    assert_eq!(rig.counter(|c| &c.tx_fails), 3);
    assert!(!rig.slot.calls.broken());
}

#[test]
fn a_packet_fills_as_many_mergeable_buffers_as_it_needs_and_its_header_counts_them() {
    let mut rig = rig(MERGEABLE, 1);
    let room: Vec<Buffer> = (0..16).map(|_| rig.drivers[0].room(1000)).collect();
    room.iter().for_each(|room| _ = rig.drivers[0].add(&[*room]));
    rig.arrive(&frame(3, 2500));
    rig.arrive(&frame(4, 60));
    rig.settle();
    assert_eq!(rig.received(), [1000, 1000, 512, 72]);
    let bytes = room[..3].iter().flat_map(|room| rig.drivers[0].read(*room)).collect::<Vec<_>>();
    assert_eq!(bytes[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
    assert_eq!(bytes[12..2512], frame(3, 2500));
    let small = rig.drivers[0].read(room[3]);
    assert_eq!(small[10..12], [1, 0]);
    assert_eq!(small[12..72], frame(4, 60));
    assert_eq!(rig.counter(|c| &c.rx_packets_count), 2);
    assert_eq!(rig.counter(|c| &c.rx_bytes_count), 2560);
}

#[test]
fn the_largest_packet_goes_straight_into_the_driver_s_buffers() {
    let mut rig = rig(MERGEABLE, 1);
    let room: Vec<Buffer> = (0..16).map(|_| rig.drivers[0].room(16384)).collect();
    room.iter().for_each(|room| _ = rig.drivers[0].add(&[*room]));
    let large = frame(5, MAX_PACKET - HEADER_BYTES);
    rig.arrive(&large);
    rig.settle();
    assert_eq!(rig.received().iter().sum::<u32>(), MAX_PACKET as u32);
    let bytes = room.iter().flat_map(|room| rig.drivers[0].read(*room)).collect::<Vec<_>>();
    assert_eq!(bytes[10], 5);
    assert!(bytes[12..MAX_PACKET] == large);
    assert!(rig.slot.device.receivers[0].aside.is_empty());
}

#[test]
fn without_mergeable_buffers_a_packet_has_one_chain_and_a_larger_one_is_dropped() {
    let mut rig = rig(0, 1);
    for _ in 0..3 {
        let parts = [rig.drivers[0].room(12), rig.drivers[0].room(500)];
        rig.drivers[0].add(&parts);
    }
    for bytes in [500, 501, 60] {
        rig.arrive(&frame(0, bytes));
    }
    rig.settle();
    assert_eq!(rig.received(), [512, 72]);
    assert_eq!(rig.counter(|c| &c.rx_fails), 1);
}

#[test]
fn a_driver_without_room_costs_nothing_and_when_it_has_some_all_comes_in_order() {
    for features in [0, MERGEABLE] {
        let mut rig = rig(features, 1);
        for number in 0..8 {
            rig.arrive(&frame(number, 100 + number));
        }
        rig.settle();
        assert_eq!(rig.slot.run(FOREVER), 0, "what cannot be read is not watched");
        assert!(rig.counter(|c| &c.no_rx_avail_buffer) > 0);
        for number in 0..8 {
            rig.make_room(1, 400);
            assert_eq!(rig.received(), [112 + number]);
        }
        // And what comes later is seen, though nobody kicks.
        rig.make_room(1, 400);
        rig.arrive(&frame(0, 60));
        rig.settle();
        assert_eq!(rig.received(), [72]);
    }
}

#[test]
fn a_packet_waits_until_there_is_room_for_all_of_it() {
    let mut rig = rig(MERGEABLE, 1);
    rig.make_room(2, 1000);
    rig.arrive(&frame(6, 2500));
    rig.arrive(&frame(7, 60));
    rig.settle();
    assert!(rig.received().is_empty());
    rig.make_room(1, 1000);
    assert_eq!(rig.received(), [1000, 1000, 512]);
    rig.make_room(1, 1000);
    assert_eq!(rig.received(), [72]);
}

#[test]
fn a_packet_that_waits_is_saved() {
    let mut rig = rig(MERGEABLE, 1);
    rig.make_room(2, 1000);
    rig.arrive(&frame(6, 2500));
    rig.settle();
    let (tap, wires) = Tap::fake(1);
    rig.move_on(tap);
    rig.wires = wires;
    assert!(rig.received().is_empty());
    rig.make_room(1, 1000);
    assert_eq!(rig.received(), [1000, 1000, 512]);
}

#[test]
fn a_packet_that_waits_for_a_driver_is_not_for_the_next_one() {
    let mut rig = rig(MERGEABLE, 1);
    rig.make_room(2, 1000);
    rig.arrive(&frame(6, 2500));
    rig.settle();
    let sizes = rig.slot.stop().len();
    rig.slot.device.reset();
    assert_eq!(sizes, 2);
    let memory = rig.slot.memory.clone();
    rig.drivers = (0..2).map(|queue| Driver::new(&memory, (queue + 5) << 20, 16, EVENT_IDX)).collect();
    rig.start();
    rig.make_room(8, 1000);
    assert!(rig.received().is_empty());
    rig.arrive(&frame(6, 60));
    rig.settle();
    assert_eq!(rig.received(), [72]);
}

#[test]
fn a_packet_for_which_there_never_is_room_does_not_stop_the_others() {
    let mut rig = rig(MERGEABLE, 1);
    rig.make_room(2, 1000);
    rig.arrive(&frame(6, 2500));
    rig.arrive(&frame(7, 60));
    rig.settle();
    let counters = rig.slot.device.counters();
    rig.slot.run_until(|_| counters.rx_packets_count.load(Ordering::Relaxed) == 1);
    assert_eq!(rig.received(), [72]);
    assert_eq!(rig.counter(|c| &c.rx_fails), 1);
}

#[test]
fn an_interface_that_comes_back_is_read_again_and_one_that_is_gone_costs_nothing() {
    let mut rig = rig(MERGEABLE, 1);
    // Not readable, and always in error: as a tap whose interface was deleted.
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let gone = Tap::of(vec![OwnedFd::from(writer).into()]);
    let working = std::mem::replace(&mut rig.slot.device.tap, gone);
    rig.make_room(8, 1000);
    assert_eq!(rig.counter(|c| &c.tap_read_fails), 1);
    rig.slot.device.tap = working;
    rig.arrive(&frame(0, 60));
    let counters = rig.slot.device.counters();
    rig.slot.run_until(|_| counters.rx_packets_count.load(Ordering::Relaxed) == 1);
}

#[test]
fn limits_hold_back_both_directions_and_nothing_is_lost() {
    let mut rig = limited(MERGEABLE, 1, a_few_at_a_time(), a_few_at_a_time());
    rig.make_room(16, 6000);
    for number in 0..6 {
        rig.arrive(&frame(number, 100 + number));
        rig.add_frame([0; 12], &frame(number, 200 + number));
    }
    rig.slot.run(1);
    let counters = rig.slot.device.counters();
    let done = |counter: &AtomicU64| counter.load(Ordering::Relaxed) == 6;
    rig.slot.run_until(|_| done(&counters.rx_packets_count) && done(&counters.tx_packets_count));
    assert_eq!(rig.received(), [112, 113, 114, 115, 116, 117]);
    for number in 0..6 {
        assert_eq!(rig.on_the_wire(0), Some(with_header(&frame(number, 200 + number))));
    }
    assert!(rig.counter(|c| &c.rx_rate_limiter_throttled) > 0);
    assert!(rig.counter(|c| &c.tx_rate_limiter_throttled) > 0);
    assert!(rig.counter(|c| &c.rx_event_rate_limiter_count) > 0);
    assert!(rig.counter(|c| &c.tx_rate_limiter_event_count) > 0);
}

/// Lets three pairs do what each of them always has more of, and gives how much each has done when all have done 60.
fn shares(rig: &mut Rig, side: usize, mut more: impl FnMut(&mut Rig, usize)) -> [usize; 3] {
    let mut done = [0; 3];
    while done.iter().sum::<usize>() < 60 {
        for (pair, done) in done.iter_mut().enumerate() {
            *done += rig.drivers[2 * pair + side].reap_all().len();
            more(rig, pair);
        }
        let mut calls = 0;
        rig.slot.run_until(|_| {
            calls += 1;
            calls > 1
        });
    }
    done
}

#[test]
fn pairs_that_wait_for_a_limit_take_turns_at_sending() {
    let few = Limits { bandwidth: None, ops: Some(Bucket { size: 4, one_time_burst: 0, refill_ms: 5 }) };
    let mut rig = limited(SEVERAL, 3, Limits::default(), few);
    rig.set_pairs(3);
    let frames = [1, 3, 5].map(|queue: usize| rig.drivers[queue].data(&with_header(&frame(queue, 60))));
    let done = shares(&mut rig, 1, |rig, pair| {
        while rig.drivers[2 * pair + 1].free_descriptors() > 0 {
            rig.drivers[2 * pair + 1].add(&[frames[pair]]);
        }
        while rig.on_the_wire(pair).is_some() {}
    });
    // A turn is for one to four.
    assert!(done.iter().all(|&done| done > 4), "{done:?}");
}

#[test]
fn pairs_that_wait_for_a_limit_take_turns_at_receiving() {
    let few = Limits { bandwidth: None, ops: Some(Bucket { size: 4, one_time_burst: 0, refill_ms: 5 }) };
    let mut rig = limited(SEVERAL, 3, few, Limits::default());
    rig.set_pairs(3);
    let rooms = [0, 2, 4].map(|queue: usize| rig.drivers[queue].room(100));
    let done = shares(&mut rig, 0, |rig, pair| {
        while rig.drivers[2 * pair].free_descriptors() > 0 {
            rig.drivers[2 * pair].add(&[rooms[pair]]);
        }
        rig.wires[pair].set_nonblocking(true).unwrap();
        while rig.wires[pair].send(&with_header(&frame(pair, 60))).is_ok() {}
    });
    // A turn is for one to four.
    assert!(done.iter().all(|&done| done > 4), "{done:?}");
    // Whoever has room receives without a limit, and then all rest.
    rig.slot.device.set_limits(Some(Limits::default()), None);
    rig.settle();
}

#[test]
fn limits_that_are_lifted_let_go_what_they_held() {
    let slow =
        Limits { bandwidth: None, ops: Some(Bucket { size: 1, one_time_burst: 0, refill_ms: 1 << 30 }) };
    let mut rig = limited(MERGEABLE, 1, slow, slow);
    rig.make_room(16, 6000);
    for number in 0..3 {
        rig.arrive(&frame(number, 100));
        rig.add_frame([0; 12], &frame(number, 100));
    }
    rig.settle();
    assert_eq!(rig.received().len(), 1);
    assert_eq!(rig.drivers[1].reap_all().len(), 1);
    rig.slot.device.set_limits(None, Some(Limits::default()));
    rig.slot.run_until(|device| device.counters.tx_packets_count.load(Ordering::Relaxed) == 3);
    assert!(rig.received().is_empty(), "only what is named changes");
    rig.slot.device.set_limits(Some(Limits::default()), None);
    rig.slot.run_until(|device| device.counters.rx_packets_count.load(Ordering::Relaxed) == 3);
}

#[test]
fn the_driver_reads_the_address_the_queue_pairs_and_the_mtu() {
    let (tap, _wires) = Tap::fake(3);
    let net = Net::new(Config { mtu: Some(9000), ..config(tap) }, None).unwrap();
    let mut space = [0xff; 16];
    net.config(0, &mut space);
    assert_eq!(space, [2, 0, 0, 0, 0, 1, 0, 0, 3, 0, 0x28, 0x23, 0, 0, 0, 0]);
    net.config(u64::MAX, &mut space);
    assert_eq!(space, [0; 16]);
    let identity = net.identity();
    let offers = |feature| identity.features & bit(feature) != 0;
    assert!(offers(spec::VIRTIO_NET_F_MAC) && offers(spec::VIRTIO_NET_F_MTU));
    assert!(offers(spec::VIRTIO_NET_F_MQ) && offers(spec::VIRTIO_NET_F_CTRL_VQ));
    assert_eq!(identity.queue_sizes, [256, 256, 256, 256, 256, 256, 16]);

    let (tap, _wires) = Tap::fake(1);
    let identity = Net::new(Config { mac: None, ..config(tap) }, None).unwrap().identity();
    let absent =
        [spec::VIRTIO_NET_F_MAC, spec::VIRTIO_NET_F_MTU, spec::VIRTIO_NET_F_MQ, spec::VIRTIO_NET_F_CTRL_VQ];
    assert_eq!(identity.features & absent.map(bit).iter().sum::<u64>(), 0);
    assert_eq!(identity.queue_sizes, [256, 256]);
}

#[test]
fn queue_pairs_work_when_the_driver_has_enabled_them() {
    let mut rig = rig(MERGEABLE | SEVERAL, 3);
    assert_eq!(rig.slot.device.tap.attached(), 1);
    let room = rig.drivers[2].room(6000);
    rig.drivers[2].add(&[room]);
    rig.wires[1].send(&with_header(&frame(0, 60))).unwrap();
    let data = rig.drivers[3].data(&with_header(&frame(1, 60)));
    rig.drivers[3].add(&[data]);
    rig.settle();
    assert!(rig.drivers[2].reap().is_none() && rig.on_the_wire(1).is_none(), "not yet");

    assert_eq!(rig.set_pairs(3), 0);
    assert_eq!(rig.slot.device.tap.attached(), 3);
    assert_eq!(rig.drivers[2].reap().unwrap().written, 72);
    assert_eq!(rig.on_the_wire(1), Some(with_header(&frame(1, 60))));

    assert_eq!(rig.set_pairs(1), 0);
    assert_eq!(rig.slot.device.tap.attached(), 1);
    rig.wires[1].send(&with_header(&frame(0, 60))).unwrap();
    rig.settle();
    for wrong in [&[4, 0, 0, 0][..], &[4, 0, 4, 0], &[4, 0, 1, 1], &[4, 1, 1, 0], &[3, 0, 1, 0], &[4, 0, 1]] {
        assert_eq!(rig.command(wrong), 1, "{wrong:?}");
    }
    assert_eq!(rig.slot.device.control.pairs(), 1);
}

#[test]
fn enabled_queue_pairs_are_saved_and_forgotten_at_reset() {
    let mut rig = rig(SEVERAL, 3);
    assert_eq!(rig.set_pairs(2), 0);
    let (tap, wires) = Tap::fake(3);
    rig.move_on(tap);
    rig.wires = wires;
    assert_eq!(rig.slot.device.tap.attached(), 2);
    rig.slot.stop();
    rig.slot.device.reset();
    rig.features &= !SEVERAL;
    rig.start();
    assert_eq!(rig.slot.device.tap.attached(), 1);
    assert_eq!(rig.slot.device.control.queue(), 2, "after the only pair that this driver knows of");
}

#[test]
fn queue_pairs_that_the_driver_has_not_agreed_on_cannot_be_enabled() {
    let one = 1 << spec::VIRTIO_NET_F_CTRL_VQ;
    for (features, most) in [(0, 0), (one, 0), (1 << spec::VIRTIO_NET_F_MQ, 0), (SEVERAL, 3)] {
        let mut rig = rig(features, 3);
        for pairs in 0..5 {
            let is_refused = u8::from(!(1..=most).contains(&pairs));
            assert_eq!(rig.set_pairs(pairs), is_refused, "{pairs} with {features:#x}");
        }
        assert_eq!(rig.slot.device.control.pairs(), usize::from(most.max(1)));
    }
}

#[test]
fn a_receive_buffer_without_room_for_a_header_breaks_the_device_and_nothing_spins() {
    let mut rig = rig(MERGEABLE, 1);
    rig.make_room(1, 11);
    assert!(rig.slot.calls.broken());
    rig.arrive(&frame(0, 60));
    rig.settle();
    assert_eq!(rig.slot.stop().len(), 2);
}

#[test]
fn a_driver_that_breaks_one_queue_stops_the_device_and_nothing_spins() {
    for queue in 0..3 {
        let mut rig = rig(MERGEABLE | SEVERAL, 2);
        rig.make_room(8, 6000);
        rig.drivers[queue * 2].set_avail_index(100);
        rig.drivers[queue * 2].kick.write(1).unwrap();
        rig.settle();
        rig.arrive(&frame(0, 60));
        rig.settle();
        rig.slot.device.handle(1);
        rig.settle();
        assert_eq!(rig.slot.calls.broken(), queue != 1, "the second pair is not in use");
    }
}

#[test]
fn a_queue_that_the_driver_did_not_enable_is_not_touched_and_nothing_spins() {
    let mut rig = rig(0, 1);
    rig.slot.stop();
    let mut queues: Vec<Queue> = (0..2).map(|index| rig.drivers[usize::from(index)].queue(index)).collect();
    virtio_queue::QueueT::set_ready(&mut queues[0].ring, false);
    rig.slot.start(queues, EVENT_IDX);
    rig.drivers[0].set_avail_index(100);
    rig.arrive(&frame(0, 60));
    rig.settle();
    rig.slot.device.handle(TAP);
    rig.slot.device.handle(RECEIVE_TIMER);
    rig.settle();
    assert!(!rig.slot.calls.broken());
}

#[test]
fn one_interrupt_for_all_that_came_at_once() {
    let mut rig = rig(MERGEABLE, 1);
    rig.make_room(16, 6000);
    rig.slot.calls.take_queue();
    for number in 0..8 {
        rig.arrive(&frame(number, 60));
    }
    rig.settle();
    assert_eq!(rig.received().len(), 8);
    assert_eq!(rig.slot.calls.take_queue(), 1);
}

#[test]
fn a_damaged_state_makes_a_device_that_runs() {
    let state = State { pairs: u16::MAX, waiting: vec![vec![1; 1 << 20], vec![2; 3]], ..State::default() };
    let (tap, _wires) = Tap::fake(2);
    let net = Net::new(config(tap), Some(state)).unwrap();
    assert_eq!(net.control.pairs(), 2);
    assert_eq!(net.receivers[0].waiting().len(), MAX_PACKET);
    assert!(net.receivers[1].waiting().is_empty());
}

/// Answers each frame to its Ethernet address with what it was told, twice, and frames of its own when it is woken.
#[derive(Default)]
struct Echo {
    heard: Arc<std::sync::Mutex<Vec<Vec<u8>>>>,
    answers: std::collections::VecDeque<Vec<u8>>,
    wakes: usize,
    /// What it has last looked at.
    looked: std::sync::Mutex<Vec<u8>>,
}

const ITS_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

impl Neighbour for Echo {
    fn is_for_me(&self, start: &[u8]) -> bool {
        *self.looked.lock().unwrap() = start.to_vec();
        start.starts_with(&ITS_MAC)
    }

    fn take(&mut self, frame: &[u8]) {
        assert_eq!(*self.looked.lock().unwrap(), frame[..frame.len().min(LOOK)]);
        self.heard.lock().unwrap().push(frame.to_vec());
        self.answers.extend([frame.to_vec(), frame.to_vec()]);
    }

    fn give(&mut self) -> Option<Vec<u8>> {
        self.answers.pop_front()
    }

    fn has_frames(&self) -> bool {
        !self.answers.is_empty()
    }

    fn wake_in(&mut self) -> Option<std::time::Duration> {
        (self.wakes < 2).then_some(std::time::Duration::ZERO)
    }

    fn wake(&mut self) {
        self.wakes += 1;
        self.answers.push_back(frame(self.wakes, 70));
    }

    fn reset(&mut self) {
        self.answers.clear();
    }
}

/// With what its neighbour has heard.
fn beside(features: u64, wakes: usize) -> (Rig, Arc<std::sync::Mutex<Vec<Vec<u8>>>>) {
    let mut rig = rig(features, 1);
    let echo = Echo { wakes, ..Echo::default() };
    let heard = echo.heard.clone();
    rig.slot.stop();
    rig.slot.device.beside = Some(Beside::new(Box::new(echo)).unwrap());
    rig.drivers =
        (0..2).map(|queue| Driver::new(&rig.slot.memory, (queue + 1) << 20, 16, rig.features)).collect();
    rig.start();
    (rig, heard)
}

fn to_neighbour(number: usize, bytes: usize) -> Vec<u8> {
    let mut frame = frame(number, bytes);
    frame[..6].copy_from_slice(&ITS_MAC);
    frame
}

#[test]
fn frames_to_a_neighbour_do_not_reach_the_tap_and_all_others_do() {
    let (mut rig, heard) = beside(MERGEABLE, 2);
    for bytes in [14, 20, 41, 42, 43, 60, 1500, 60_000] {
        rig.send([0; 12], &to_neighbour(bytes, bytes));
        assert_eq!(heard.lock().unwrap().pop(), Some(to_neighbour(bytes, bytes)));
        assert_eq!(rig.on_the_wire(0), None, "{bytes}");
        rig.send([0; 12], &frame(bytes, bytes));
        assert_eq!(rig.on_the_wire(0), Some(with_header(&frame(bytes, bytes))));
        assert!(heard.lock().unwrap().is_empty(), "{bytes}");
    }
    assert_eq!(rig.counter(|c| &c.tx_packets_count), 8);
    let sizes = 14 + 20 + 41 + 42 + 43 + 60 + 1500 + 60_000;
    assert_eq!(rig.counter(|c| &c.tx_bytes_count), sizes);
    // In pieces of which none is a whole header.
    let packet = with_header(&to_neighbour(7, 100));
    let parts: Vec<Buffer> = packet.chunks(5).map(|part| rig.drivers[1].data(part)).collect();
    rig.drivers[1].add_indirect(&parts);
    rig.settle();
    assert_eq!(heard.lock().unwrap().pop(), Some(to_neighbour(7, 100)));
}

#[test]
fn a_neighbour_is_heard_before_the_tap_and_waits_for_room_as_packets_do() {
    let (mut rig, _) = beside(MERGEABLE, 2);
    rig.add_frame([0; 12], &to_neighbour(1, 100));
    rig.settle();
    assert!(rig.received().is_empty(), "there is no room yet");
    rig.arrive(&frame(2, 60));
    let room: Vec<Buffer> = (0..8).map(|_| rig.drivers[0].room(80)).collect();
    room.iter().for_each(|room| _ = rig.drivers[0].add(&[*room]));
    rig.settle();
    assert_eq!(rig.received(), [80, 32, 80, 32, 72]);
    let first = rig.drivers[0].read(room[0]);
    assert_eq!(first[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0], "nothing is asked of the driver");
    assert_eq!(first[12..], to_neighbour(1, 100)[..68]);
}

#[test]
fn what_a_neighbour_has_beyond_a_turn_comes_in_the_next() {
    const FRAMES: usize = 100;
    let mut rig = rig(MERGEABLE, 1);
    let echo =
        Echo { wakes: 2, answers: (0..FRAMES).map(|number| frame(number, 60)).collect(), ..Echo::default() };
    rig.slot.stop();
    rig.slot.device.beside = Some(Beside::new(Box::new(echo)).unwrap());
    rig.drivers =
        (0..2).map(|queue| Driver::new(&rig.slot.memory, (queue + 1) << 20, 128, rig.features)).collect();
    rig.start();
    rig.make_room(FRAMES, 80);
    assert_eq!(rig.received(), [72; FRAMES]);
}

#[test]
fn a_neighbour_is_woken_when_it_wants_and_forgets_a_driver_that_goes() {
    let (mut rig, _) = beside(MERGEABLE, 0);
    rig.make_room(4, 1000);
    rig.add_frame([0; 12], &to_neighbour(1, 100));
    let counters = rig.slot.device.counters();
    rig.slot.run_until(|_| counters.rx_packets_count.load(Ordering::Relaxed) == 4);
    assert_eq!(rig.received(), [112, 112, 82, 82]);
    rig.add_frame([0; 12], &to_neighbour(1, 100));
    rig.settle();
    rig.slot.stop();
    rig.slot.device.reset();
    assert!(!rig.slot.device.beside.as_ref().unwrap().neighbour.has_frames());
}

/// A device whose queues a kernel serves, and what that kernel was told of each pair.
fn served_by_kernel(pairs: usize, extra: u64) -> (Rig, Vec<Arc<Mutex<Pair>>>) {
    served_by_kernel_with(None, pairs, extra)
}

fn served_by_kernel_with(
    room: Option<vhost::Region>,
    pairs: usize,
    extra: u64,
) -> (Rig, Vec<Arc<Mutex<Pair>>>) {
    let (tap, wires) = Tap::fake(pairs);
    let known = EVENT_IDX | MERGEABLE | 1 << VIRTIO_RING_F_INDIRECT_DESC;
    let (vhost, told) = (0..pairs).map(|_| VhostNet::fake(known)).unzip();
    let net = Net::new(Config { vhost, room, ..config(tap) }, None).unwrap();
    let memory = testing::ram(16 << 20);
    let queues = net.identity().queue_sizes.len() as u64;
    let features = EVENT_IDX | extra;
    let drivers = (0..queues).map(|queue| Driver::new(&memory, (queue + 1) << 20, 16, features)).collect();
    (Rig { slot: Slot::new(net, &memory), drivers, wires, features }, told)
}

/// The kernel gives back what it finds in a queue of the driver's, as long as it has it; gives how much that was.
fn kernel_works(told: &Mutex<Pair>, side: usize, driver: &Driver, memory: &GuestRam) -> usize {
    let mut told = told.lock().unwrap();
    if !told.serves[side] {
        return 0;
    }
    let mut queue = driver.queue(0);
    let next = told.rings[side].unwrap().next_available.wrapping_add(told.taken[side]);
    vhost::take_back(&mut queue, next, memory);
    let mut given = 0;
    while let Some(chain) = queue.pop(memory).unwrap() {
        queue.push(memory, chain.head, 1).unwrap();
        given += 1;
    }
    told.taken[side] = told.taken[side].wrapping_add(given);
    if given > 0 {
        told.ends[side].as_ref().unwrap()[1].write(1).unwrap();
    }
    given.into()
}

#[test]
fn a_kernel_gets_each_queue_with_its_ends_and_calls_the_driver_through_the_device_where_it_must() {
    let (mut rig, told) = served_by_kernel(1, MERGEABLE);
    rig.start();
    let memory = rig.slot.memory.memory();
    for side in [RECEIVE, TRANSMIT] {
        let room = rig.drivers[side].room(1526);
        rig.drivers[side].add(&[room]);
        let told = &told[0];
        assert!(
            told.lock().unwrap().ends[side].as_ref().unwrap()[0].read().unwrap() > 0,
            "the kick is the kernel's"
        );
        assert_eq!(kernel_works(told, side, &rig.drivers[side], &memory), 1);
        rig.settle();
        assert_eq!(rig.slot.calls.take_queue(), 1);
        assert_eq!(rig.drivers[side].reap_all().len(), 1);
    }
    let pair = told[0].lock().unwrap();
    assert_eq!((pair.features & MERGEABLE, pair.memory.len()), (MERGEABLE, 1));
    let counters = rig.slot.device.counters();
    for counter in [&counters.rx_packets_count, &counters.tx_packets_count, &counters.tx_queue_event_count] {
        assert_eq!(counter.load(Ordering::Relaxed), 0, "nothing of it is seen here");
    }
}

#[test]
fn a_kernel_calls_the_driver_directly_where_the_transport_allows_it() {
    let (mut rig, told) = served_by_kernel(1, 0);
    let vectors = [(); 2].map(|()| EventFd::new(libc::EFD_NONBLOCK).unwrap());
    let ours = vectors.iter().map(|vector| vector.try_clone().unwrap()).collect();
    rig.slot.calls.triggers.set(ours).unwrap();
    rig.start();
    rig.drivers[1].add_indirect(&[Buffer { address: 0x10_0000, len: 16, writable: false }]);
    assert_eq!(kernel_works(&told[0], TRANSMIT, &rig.drivers[1], &rig.slot.memory.memory()), 1);
    rig.settle();
    assert_eq!((vectors[1].read().unwrap(), rig.slot.calls.take_queue()), (1, 0));
    assert!(vectors[0].read().is_err());
}

#[test]
fn what_a_kernel_has_not_done_is_done_after_the_device_went_on() {
    let (mut rig, told) = served_by_kernel(1, 0);
    rig.start();
    let mut seen = 0;
    for round in 0..300 {
        let driver = &mut rig.drivers[0];
        (0..round % 4).for_each(|_| {
            let room = Buffer { address: 0x80_0000, len: 64, writable: true };
            driver.add(&[room]);
        });
        let mut calls = 0;
        if round % 3 > 0 {
            kernel_works(&told[0], RECEIVE, driver, &rig.slot.memory.memory());
        }
        if round % 5 > 2 {
            // Nothing in between: what the kernel has called last must not be lost.
            let queues = rig.slot.stop();
            calls += rig.slot.calls.take_queue();
            let given = rig.drivers[0].reap_all().len();
            assert!(
                given == 0 || calls > 0,
                "round {round}: a machine that is saved now would forget to call"
            );
            seen += given;
            assert!(rig.slot.stop().is_empty() && told[0].lock().unwrap().serves == [false; 2]);
            assert!(told[0].lock().unwrap().ends.iter().all(Option::is_none), "it has let go of everything");
            rig.slot.start(queues, rig.features);
        }
        rig.settle();
        let given = rig.drivers[0].reap_all().len();
        calls += rig.slot.calls.take_queue();
        assert!(given == 0 || calls > 0, "round {round}: the driver was not called");
        seen += given;
    }
    kernel_works(&told[0], RECEIVE, &rig.drivers[0], &rig.slot.memory.memory());
    seen += rig.drivers[0].reap_all().len();
    assert_eq!(seen, 300 / 4 * (1 + 2 + 3));
    assert_eq!(rig.drivers[0].free_descriptors(), 16);
}

#[test]
fn a_driver_that_a_kernel_finds_breaking_the_rules_is_told_and_nothing_is_served() {
    let (mut rig, told) = served_by_kernel(1, 0);
    rig.start();
    told[0].lock().unwrap().ends[TRANSMIT].as_ref().unwrap()[2].write(1).unwrap();
    rig.settle();
    assert!(rig.slot.calls.broken());
    assert_eq!(told[0].lock().unwrap().serves, [false; 2]);
    rig.slot.stop();
    rig.slot.device.reset();
    let memory = rig.slot.memory.clone();
    rig.drivers = (1..3).map(|queue| Driver::new(&memory, queue << 20, 16, EVENT_IDX)).collect();
    rig.start();
    assert_eq!(told[0].lock().unwrap().serves, [true; 2], "after a reset all is well");
}

#[test]
fn rings_that_are_not_in_guest_memory_are_not_given_to_a_kernel() {
    let (mut rig, told) = served_by_kernel(1, 0);
    let end = testing::ram(32 << 20);
    // Its rings are beyond what the device is told of.
    let beyond = Driver::new(&end, 24 << 20, 16, EVENT_IDX);
    let queues = vec![rig.drivers[0].queue(0), beyond.queue(1)];
    let memory = rig.slot.memory.clone();
    let interrupt = rig.slot.calls.clone();
    let active = Active { memory, queues, features: EVENT_IDX, interrupt };
    let error = rig.slot.device.start(active).unwrap_err();
    assert!(matches!(error, StartError::Ring { index: 1 }), "{error}");
    assert_eq!(told[0].lock().unwrap().serves, [false; 2], "nor are the others");
    rig.start();
    assert_eq!(told[0].lock().unwrap().serves, [true; 2]);
}

#[test]
fn a_kernel_that_refuses_leaves_nothing_behind() {
    let (mut rig, told) = served_by_kernel(2, SEVERAL);
    told[1].lock().unwrap().refuse = true;
    let queues = (0..).zip(&rig.drivers).map(|(index, driver)| driver.queue(index)).collect();
    let (memory, interrupt) = (rig.slot.memory.clone(), rig.slot.calls.clone());
    let active = Active { memory, queues, features: rig.features, interrupt };
    assert!(rig.slot.device.start(active).is_err());
    assert!(told.iter().all(|pair| pair.lock().unwrap().serves == [false; 2]));
    assert!(rig.slot.device.stop().is_empty());
}

#[test]
fn the_control_queue_stays_the_devices_when_a_kernel_has_the_others() {
    let (mut rig, told) = served_by_kernel(2, SEVERAL);
    rig.start();
    assert!(told.iter().all(|pair| pair.lock().unwrap().serves == [true; 2]));
    assert_eq!(rig.slot.device.tap.attached(), 1);
    assert_eq!(rig.set_pairs(2), 0);
    assert_eq!(rig.slot.device.tap.attached(), 2);
    let kicks = told[1].lock().unwrap().ends.each_ref().map(|ends| ends.as_ref().unwrap()[0].read().is_ok());
    assert_eq!(kicks, [true; 2], "both have something to look at");
    rig.slot.stop();

    // A driver that knows nothing of several pairs has its control queue where the second pair would be.
    rig.features &= !SEVERAL;
    rig.start();
    let serves = [0, 1].map(|pair: usize| told[pair].lock().unwrap().serves);
    assert_eq!(serves, [[true; 2], [false; 2]]);
}

#[test]
fn what_a_kernel_does_not_know_of_rings_is_not_offered() {
    let (tap, _wires) = Tap::fake(1);
    let (vhost, _) = VhostNet::fake(EVENT_IDX);
    let features = Net::new(Config { vhost: vec![vhost], ..config(tap) }, None).unwrap().identity().features;
    assert_eq!(features & (EVENT_IDX | MERGEABLE | 1 << VIRTIO_RING_F_INDIRECT_DESC), EVENT_IDX);
    assert_ne!(features & 1 << spec::VIRTIO_NET_F_HOST_TSO4, 0, "segments are the tap's business");
}

#[test]
fn a_kernel_hears_of_guest_memory_that_comes_while_it_has_queues() {
    let (mut rig, told) = served_by_kernel(1, 0);
    rig.slot.device.memory_changed();
    assert_eq!(told[0].lock().unwrap().memory.len(), 0, "it is told at the start");
    rig.start();
    assert_eq!(told[0].lock().unwrap().memory.len(), 1);
    let more = vm_memory::GuestRegionMmap::from_range(vm_memory::GuestAddress(1 << 32), 4096, None).unwrap();
    let with = rig.slot.memory.memory().insert_region(Arc::new(more)).unwrap();
    rig.slot.memory.lock().unwrap().replace(with);
    rig.slot.device.memory_changed();
    let regions = &told[0].lock().unwrap().memory;
    assert_eq!((regions.len(), regions[1].guest, regions[1].size), (2, 1 << 32, 4096));
}

#[test]
fn a_kernel_is_told_at_once_of_all_the_memory_that_may_come() {
    let room = vhost::Region { guest: 1 << 32, size: 1 << 30, host: 0x7000_0000, file: None };
    let (mut rig, told) = served_by_kernel_with(Some(room), 1, 0);
    rig.start();
    let pair = told[0].lock().unwrap();
    let regions: Vec<_> = pair.memory.iter().map(|region| (region.guest, region.size)).collect();
    assert_eq!(regions, [(0, 16 << 20), (1 << 32, 1 << 30)]);
}
