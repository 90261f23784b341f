use std::fs::File;
use std::io::{ErrorKind, PipeWriter};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard};

use super::*;
use crate::backend::rate_limiter::Bucket;
use crate::virtio::testing::{self, Buffer, Driver, EVENT_IDX, Slot, Used};

/// What the writer has taken, and how much more it takes.
#[derive(Clone, Default)]
struct Screen(Arc<Mutex<(Vec<u8>, usize)>>);

impl Screen {
    fn lock(&self) -> MutexGuard<'_, (Vec<u8>, usize)> {
        self.0.lock().unwrap()
    }

    fn taken(&self) -> Vec<u8> {
        self.lock().0.clone()
    }

    fn make_room(&self, bytes: usize) {
        self.lock().1 = bytes;
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut screen = self.lock();
        let taken = bytes.len().min(screen.1);
        if taken == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        screen.0.extend(&bytes[..taken]);
        screen.1 -= taken;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Rig {
    slot: Slot<Console>,
    receive: Driver,
    transmit: Driver,
    screen: Screen,
}

const SIZE: Size = Size { columns: 132, rows: 43 };
const FOREVER: usize = 100;

fn rig(input: Option<OwnedFd>) -> Rig {
    limited(input, Limits::default())
}

fn limited(input: Option<OwnedFd>, limits: Limits) -> Rig {
    let memory = testing::ram(4 << 20);
    let receive = Driver::new(&memory, 0x1000, 32, EVENT_IDX);
    let transmit = Driver::new(&memory, 0x20_0000, 32, EVENT_IDX);
    let screen = Screen::default();
    screen.make_room(usize::MAX);
    let config = Config { input, output: Box::new(screen.clone()), size: SIZE, limits, ports: Vec::new() };
    let mut slot = Slot::new(Console::new(config, None).unwrap(), &memory);
    slot.start(vec![receive.queue(0), transmit.queue(1)], EVENT_IDX);
    let mut rig = Rig { slot, receive, transmit, screen };
    rig.settle();
    rig
}

fn with_pipe() -> (Rig, PipeWriter) {
    let (reader, writer) = io::pipe().unwrap();
    (rig(Some(reader.into())), writer)
}

impl Rig {
    fn settle(&mut self) {
        assert!(self.slot.run(FOREVER) < FOREVER, "the console never comes to rest");
    }

    fn print(&mut self, text: &[u8]) {
        let buffer = self.transmit.data(text);
        self.transmit.add(&[buffer]);
        self.settle();
        assert_eq!(self.transmit.reap_all().len(), 1, "output is always taken from the guest");
    }

    fn lost(&self) -> u64 {
        self.slot.device.counters().lost_bytes.load(Ordering::Relaxed)
    }
}

#[test]
fn a_driver_is_told_of_another_size_once_and_also_after_a_pause() {
    let mut rig = rig(None);
    let told = |rig: &Rig| rig.slot.calls.config.swap(0, Ordering::SeqCst);
    let size = |rig: &Rig| {
        let mut space = [0; 4];
        rig.slot.device.config(0, &mut space);
        (u16::from_le_bytes([space[0], space[1]]), u16::from_le_bytes([space[2], space[3]]))
    };
    rig.slot.device.resize(0, SIZE);
    assert_eq!(told(&rig), 0, "nothing has changed");
    rig.slot.device.resize(0, Size { columns: 80, rows: 24 });
    assert_eq!((told(&rig), size(&rig)), (1, (80, 24)));
    let queues = rig.slot.stop();
    rig.slot.device.resize(0, SIZE);
    rig.slot.device.resize(0, Size { columns: 200, rows: 60 });
    assert_eq!(told(&rig), 0, "nobody is there");
    rig.slot.start(queues, EVENT_IDX);
    assert_eq!((told(&rig), size(&rig)), (1, (200, 60)));
}

#[test]
fn output_comes_out() {
    let mut rig = rig(None);
    let parts = [rig.transmit.data(b"log"), rig.transmit.data(b"in: ")];
    rig.transmit.add_indirect(&parts);
    rig.settle();
    assert_eq!(rig.transmit.reap_all().len(), 1);
    rig.print(b"root\n");
    assert_eq!(rig.screen.taken(), b"login: root\n");
}

#[test]
fn input_goes_in_when_the_guest_has_room_and_waits_outside_until_then() {
    let (mut rig, mut keyboard) = with_pipe();
    keyboard.write_all(b"early").unwrap();
    rig.settle();
    let room = rig.receive.room(64);
    rig.receive.add(&[room]);
    rig.settle();
    assert_eq!(rig.receive.reap().unwrap().written, 5);
    assert_eq!(&rig.receive.read(room)[..5], b"early");
    assert_eq!(rig.slot.calls.take_queue(), 1);

    let rooms = [rig.receive.room(3), rig.receive.room(64)];
    rig.receive.add(&rooms[..1]);
    rig.receive.add(&rooms[1..]);
    keyboard.write_all(b"later").unwrap();
    rig.settle();
    let written: Vec<u32> = rig.receive.reap_all().iter().map(|used| used.written).collect();
    assert_eq!(written, [3, 2]);
    assert_eq!(&rig.receive.read(rooms[0])[..3], b"lat");
}

#[test]
fn more_room_than_input_makes_nobody_wait() {
    // The pipe blocks: a second read would never return.
    let (mut rig, mut keyboard) = with_pipe();
    for _ in 0..4 {
        let room = rig.receive.room(8);
        rig.receive.add(&[room]);
    }
    rig.settle();
    keyboard.write_all(b"abc").unwrap();
    rig.settle();
    assert_eq!(rig.receive.reap_all().len(), 1);
}

#[test]
fn the_end_of_input_is_quiet() {
    let (mut rig, keyboard) = with_pipe();
    let room = rig.receive.room(8);
    rig.receive.add(&[room]);
    rig.settle();
    drop(keyboard);
    rig.settle();
    assert_eq!(rig.receive.reap(), None);
    rig.receive.add(&[room]);
    rig.settle();
    rig.print(b"still here");
    assert_eq!(rig.screen.taken(), b"still here");
}

#[test]
fn a_regular_file_and_dev_null_are_input_too() {
    let mut rig_of_null = rig(Some(File::open("/dev/null").unwrap().into()));
    let room = rig_of_null.receive.room(8);
    rig_of_null.receive.add(&[room]);
    rig_of_null.settle();
    assert_eq!(rig_of_null.receive.reap(), None);

    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[b'x'; 20]).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    let mut rig = rig(Some(file.into()));
    for _ in 0..4 {
        let room = rig.receive.room(8);
        rig.receive.add(&[room]);
    }
    rig.settle();
    let written: Vec<u32> = rig.receive.reap_all().iter().map(|used| used.written).collect();
    assert_eq!(written, [8, 8, 4]);
}

#[test]
fn what_a_slow_reader_leaves_is_written_later_and_the_guest_does_not_wait() {
    let mut rig = rig(None);
    rig.screen.make_room(3);
    rig.print(b"slow reader");
    assert_eq!(rig.screen.taken(), b"slo");
    rig.screen.make_room(usize::MAX);
    let screen = rig.screen.clone();
    rig.slot.run_until(|_| screen.taken() == b"slow reader");
    assert_eq!(rig.lost(), 0);
}

#[test]
fn output_beyond_the_limit_is_lost_and_counted() {
    let mut rig = rig(None);
    rig.screen.make_room(0);
    let half = OUTPUT_LIMIT / 2;
    for text in [b'a', b'b', b'c'] {
        rig.print(&vec![text; half]);
    }
    rig.print(&vec![b'd'; 2 * OUTPUT_LIMIT]);
    assert_eq!(rig.lost() as usize, half + 2 * OUTPUT_LIMIT);
    rig.screen.make_room(usize::MAX);
    rig.print(b"!");
    assert_eq!(rig.screen.taken(), [vec![b'a'; half], vec![b'b'; half], b"!".to_vec()].concat());
}

#[test]
fn a_writer_that_fails_loses_what_it_was_given_and_no_more() {
    struct Broken;
    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut rig = rig(None);
    rig.slot.device.ports[0].output.writer = Box::new(Broken);
    rig.print(b"gone");
    assert_eq!(rig.lost(), 4);
    rig.slot.device.ports[0].output.writer = Box::new(rig.screen.clone());
    rig.print(b"there");
    assert_eq!(rig.screen.taken(), b"there");
}

#[test]
fn the_size_is_in_the_configuration_space() {
    let rig = rig(None);
    let mut space = [0xff; 12];
    rig.slot.device.config(0, &mut space);
    assert_eq!(space, [132, 0, 43, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut rows = [0xff; 2];
    rig.slot.device.config(2, &mut rows);
    assert_eq!(rows, [43, 0]);
    rig.slot.device.config(u64::MAX, &mut rows);
    assert_eq!(rows, [0, 0]);
}

#[test]
fn buffers_of_the_wrong_direction_come_back_and_eat_nothing() {
    let (mut rig, mut keyboard) = with_pipe();
    keyboard.write_all(b"key").unwrap();
    let readable = rig.receive.data(b"....");
    rig.receive.add(&[readable]);
    let room = rig.receive.room(4);
    rig.receive.add(&[room]);
    let writable = rig.transmit.room(4);
    rig.transmit.add(&[writable]);
    rig.settle();
    let written: Vec<u32> = rig.receive.reap_all().iter().map(|used| used.written).collect();
    assert_eq!(written, [0, 3]);
    assert_eq!(rig.transmit.reap_all().len(), 1);
    assert!(!rig.slot.calls.broken());
}

#[test]
fn a_driver_that_breaks_one_queue_stops_the_device_and_nothing_spins() {
    let (mut rig, mut keyboard) = with_pipe();
    let room = rig.receive.room(4);
    rig.receive.add(&[room]);
    rig.transmit.set_avail_index(100);
    rig.transmit.kick.write(1).unwrap();
    keyboard.write_all(b"key").unwrap();
    rig.settle();
    assert!(rig.slot.calls.broken());
    assert_eq!(rig.slot.stop().len(), 2);
}

#[test]
fn a_queue_that_the_driver_did_not_enable_is_not_touched() {
    let mut rig = rig(None);
    rig.slot.stop();
    let mut queues = vec![rig.receive.queue(0), rig.transmit.queue(1)];
    virtio_queue::QueueT::set_ready(&mut queues[0].ring, false);
    rig.slot.start(queues, EVENT_IDX);
    rig.receive.set_avail_index(100);
    rig.settle();
    rig.slot.device.handle(0);
    assert!(!rig.slot.calls.broken());
}

#[test]
fn output_that_waits_is_saved_and_no_more_than_the_limit_is_taken_from_a_file() {
    let mut rig = rig(None);
    rig.screen.make_room(0);
    rig.print(b"waiting");
    rig.slot.stop();
    let DeviceState::Console(mut state) = rig.slot.device.save() else { unreachable!() };
    assert_eq!(state.ports[0].output, b"waiting");

    state.ports[0].output = vec![b'x'; OUTPUT_LIMIT + 1];
    let config = Config {
        input: None,
        output: Box::new(rig.screen.clone()),
        size: SIZE,
        limits: Limits::default(),
        ports: Vec::new(),
    };
    let mut console = Console::new(config, Some(state)).unwrap();
    rig.screen.make_room(usize::MAX);
    console.stop();
    assert_eq!(rig.screen.taken().len(), OUTPUT_LIMIT);
}

/// Three ports: the first, a second terminal and a stream.
struct Ports {
    slot: Slot<Console>,
    queues: Vec<Driver>,
    screens: [Screen; 3],
    keyboards: [PipeWriter; 3],
    /// Buffers for control messages, in the order in which they were given.
    room: Vec<Buffer>,
}

const SECOND: usize = 1;
const STREAM: usize = 2;
const MULTIPORT: u64 = EVENT_IDX | 1 << F_MULTIPORT;

/// A console of these ports as it is new, or as it was saved.
fn device(state: Option<State>, limits: Limits) -> (Console, [Screen; 3], [PipeWriter; 3]) {
    let screens = [(); 3].map(|()| {
        let screen = Screen::default();
        screen.make_room(usize::MAX);
        screen
    });
    let pipes = [(); 3].map(|()| io::pipe().unwrap());
    let inputs = pipes.each_ref().map(|(reader, _)| Some(OwnedFd::from(reader.try_clone().unwrap())));
    let [first, second, stream] = inputs;
    let port = |name: &str, size, input, screen: &Screen| PortConfig {
        name: name.into(),
        size,
        input,
        output: Box::new(screen.clone()),
        limits,
    };
    let config = Config {
        input: first,
        output: Box::new(screens[0].clone()),
        size: SIZE,
        limits,
        ports: vec![
            port("second", Some(Size { columns: 80, rows: 24 }), second, &screens[SECOND]),
            port("org.test.stream", None, stream, &screens[STREAM]),
        ],
    };
    (Console::new(config, state).unwrap(), screens, pipes.map(|(_, writer)| writer))
}

fn ports() -> Ports {
    ports_with(MULTIPORT, None)
}

fn ports_with(features: u64, state: Option<State>) -> Ports {
    ports_limited(features, state, Limits::default())
}

fn ports_limited(features: u64, state: Option<State>, limits: Limits) -> Ports {
    let memory = testing::ram(16 << 20);
    let (console, screens, keyboards) = device(state, limits);
    let mut slot = Slot::new(console, &memory);
    let count = slot.device.identity().queue_sizes.len() as u64;
    let queues: Vec<_> =
        (0..count).map(|queue| Driver::new(&memory, (queue + 1) << 20, 32, EVENT_IDX)).collect();
    slot.start((0..).zip(&queues).map(|(index, driver)| driver.queue(index)).collect(), features);
    let mut ports = Ports { slot, queues, screens, keyboards, room: Vec::new() };
    ports.settle();
    ports
}

impl Ports {
    fn settle(&mut self) {
        assert!(self.slot.run(FOREVER) < FOREVER, "the console never comes to rest");
    }

    /// Gives the device this many buffers of so many bytes for control messages.
    fn listen(&mut self, count: usize, bytes: u32) {
        for _ in 0..count {
            let room = self.queues[2].room(bytes);
            self.queues[2].add(&[room]);
            self.room.push(room);
        }
        self.settle();
    }

    /// What the device has said since the last call.
    fn heard(&mut self) -> Vec<Vec<u8>> {
        let used = self.queues[2].reap_all();
        let read = |(used, room): (Used, Buffer)| self.queues[2].read(room)[..used.written as usize].to_vec();
        let count = used.len();
        used.into_iter().zip(self.room.drain(..count).collect::<Vec<_>>()).map(read).collect()
    }

    fn say_bytes(&mut self, bytes: &[u8]) {
        let data = self.queues[3].data(bytes);
        self.queues[3].add(&[data]);
        self.settle();
        assert_eq!(self.queues[3].reap_all().len(), 1, "a message is always taken");
    }

    fn say(&mut self, id: u32, event: u16, value: u16) {
        self.say_bytes(&message(id, event, value, &[]));
    }

    /// As Linux begins: it has all ports, and hears of them.
    fn set_up(&mut self) {
        self.listen(20 - self.room.len(), 100);
        self.say(u32::MAX, 0, 1);
        for port in 0..3 {
            self.say(port, 3, 1);
        }
        self.heard();
    }

    fn print(&mut self, port: usize, text: &[u8]) {
        let queue = &mut self.queues[usize::from(transmit_queue(port))];
        let data = queue.data(text);
        queue.add(&[data]);
        self.settle();
        assert_eq!(
            self.queues[usize::from(transmit_queue(port))].reap_all().len(),
            1,
            "output is always taken"
        );
    }

    fn room_for_input(&mut self, port: usize) -> Buffer {
        let queue = &mut self.queues[usize::from(receive_queue(port))];
        let room = queue.room(64);
        queue.add(&[room]);
        self.settle();
        room
    }

    /// What came in since the last call.
    fn input(&mut self, port: usize, room: Buffer) -> Vec<u8> {
        self.settle();
        let queue = &mut self.queues[usize::from(receive_queue(port))];
        let written = queue.reap().map_or(0, |used| used.written as usize);
        queue.read(room)[..written].to_vec()
    }
}

fn message(id: u32, event: u16, value: u16, more: &[u8]) -> Vec<u8> {
    [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes(), more].concat()
}

#[test]
fn queues_and_ports_belong_together() {
    let queues: Vec<_> = (0..8).map(Role::of).collect();
    let expected = [
        Role::Receive(0),
        Role::Transmit(0),
        Role::ControlReceive,
        Role::ControlTransmit,
        Role::Receive(1),
        Role::Transmit(1),
        Role::Receive(2),
        Role::Transmit(2),
    ];
    assert_eq!(queues, expected);
    for port in 0..=MAX_FURTHER_PORTS {
        assert_eq!(Role::of(receive_queue(port)), Role::Receive(port));
        assert_eq!(Role::of(transmit_queue(port)), Role::Transmit(port));
    }
}

#[test]
fn a_console_of_one_port_offers_no_others_and_one_of_several_says_how_many() {
    let rig = rig(None);
    let identity = rig.slot.device.identity();
    assert_eq!((identity.features & 1 << F_MULTIPORT, identity.queue_sizes.len()), (0, 2));
    let ports = ports();
    let identity = ports.slot.device.identity();
    assert_eq!((identity.features & 1 << F_MULTIPORT, identity.queue_sizes.len()), (1 << F_MULTIPORT, 8));
    let mut space = [0xff; 12];
    ports.slot.device.config(0, &mut space);
    assert_eq!(space, [132, 0, 43, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_driver_that_is_ready_hears_what_ports_there_are_and_what_each_is() {
    let mut ports = ports();
    ports.listen(20, 100);
    assert!(ports.heard().is_empty(), "it has not asked");
    ports.say(u32::MAX, 0, 1);
    assert_eq!(ports.heard(), [0, 1, 2].map(|id| message(id, 1, 0, &[])));
    ports.say(1, 3, 1);
    let size = [80, 0, 24, 0];
    let of_second =
        [message(1, 4, 1, &[]), message(1, 7, 1, b"second"), message(1, 5, 0, &size), message(1, 6, 1, &[])];
    assert_eq!(ports.heard(), of_second);
    ports.say(2, 3, 1);
    assert_eq!(ports.heard(), [message(2, 7, 1, b"org.test.stream"), message(2, 6, 1, &[])]);
    ports.say(0, 3, 1);
    let of_first = [message(0, 4, 1, &[]), message(0, 5, 0, &[132, 0, 43, 0]), message(0, 6, 1, &[])];
    assert_eq!(ports.heard(), of_first);
}

#[test]
fn each_port_has_its_own_input_and_output() {
    let mut ports = ports();
    ports.set_up();
    for port in 0..3 {
        ports.say(port as u32, 6, 1);
        ports.print(port, format!("to {port}").as_bytes());
    }
    for port in [STREAM, 0, SECOND] {
        let room = ports.room_for_input(port);
        ports.keyboards[port].write_all(format!("from {port}").as_bytes()).unwrap();
        assert_eq!(ports.input(port, room), format!("from {port}").as_bytes());
        assert_eq!(ports.screens[port].taken(), format!("to {port}").as_bytes());
    }
    let counters = ports.slot.device.counters();
    assert_eq!(counters.input_bytes.load(Ordering::Relaxed), 18);
    assert_eq!(counters.output_bytes.load(Ordering::Relaxed), 12);
}

#[test]
fn what_is_sent_to_a_port_that_nobody_has_open_waits_outside() {
    let mut ports = ports();
    ports.set_up();
    let room = ports.room_for_input(STREAM);
    ports.keyboards[STREAM].write_all(b"early").unwrap();
    assert_eq!(ports.input(STREAM, room), b"");
    ports.say(2, 6, 1);
    assert_eq!(ports.input(STREAM, room), b"early");
    ports.say(2, 6, 0);
    let room = ports.room_for_input(STREAM);
    ports.keyboards[STREAM].write_all(b"late").unwrap();
    assert_eq!(ports.input(STREAM, room), b"");
    ports.say(2, 6, 1);
    assert_eq!(ports.input(STREAM, room), b"late");
}

#[test]
fn a_reader_that_does_not_read_one_port_holds_up_neither_the_guest_nor_another_port() {
    let mut ports = ports();
    ports.set_up();
    ports.screens[SECOND].make_room(0);
    for _ in 0..4 {
        ports.print(SECOND, &vec![b'x'; OUTPUT_LIMIT / 2]);
        ports.print(STREAM, b"goes on ");
    }
    assert_eq!(ports.screens[STREAM].taken(), b"goes on goes on goes on goes on ");
    assert_eq!(ports.slot.device.counters().lost_bytes.load(Ordering::Relaxed), OUTPUT_LIMIT as u64);
}

#[test]
fn a_stream_loses_nothing_that_its_reader_leaves() {
    let mut ports = ports();
    ports.set_up();
    ports.screens[STREAM].make_room(0);
    let queue = usize::from(transmit_queue(STREAM));
    let half = vec![b'x'; OUTPUT_LIMIT / 2];
    for _ in 0..2 {
        ports.print(STREAM, &half);
    }
    for _ in 0..3 {
        let data = ports.queues[queue].data(&half);
        ports.queues[queue].add(&[data]);
        ports.slot.run(FOREVER);
        assert!(ports.queues[queue].reap().is_none(), "it waits in the queue");
    }
    ports.print(SECOND, b"goes on");
    assert_eq!(ports.screens[SECOND].taken(), b"goes on");

    ports.screens[STREAM].make_room(1);
    ports.slot.run_until(|_| ports.screens[STREAM].taken().len() == 1);
    assert!(ports.queues[queue].reap().is_none(), "there is not yet room for all of it");
    ports.screens[STREAM].make_room(usize::MAX);
    ports.slot.run_until(|_| ports.screens[STREAM].taken().len() == 5 * half.len());
    assert_eq!(ports.queues[queue].reap_all().len(), 3);
    assert_eq!(ports.slot.device.counters().lost_bytes.load(Ordering::Relaxed), 0);

    ports.screens[STREAM].make_room(0);
    ports.print(STREAM, &vec![b'y'; OUTPUT_LIMIT + 7]);
    assert_eq!(ports.slot.device.counters().lost_bytes.load(Ordering::Relaxed), 7, "it would never fit");
}

#[test]
fn a_terminal_is_resized_by_its_number_and_its_driver_told_once_also_after_a_pause() {
    let mut ports = ports();
    ports.listen(20, 100);
    let size = |columns, rows| Size { columns, rows };
    ports.slot.device.resize(SECOND, size(100, 30));
    assert!(ports.heard().is_empty(), "the driver knows of no port yet");
    ports.set_up();
    ports.slot.device.resize(SECOND, size(100, 30));
    ports.slot.device.resize(STREAM, size(1, 1));
    ports.slot.device.resize(17, size(1, 1));
    assert!(ports.heard().is_empty(), "nothing has changed");
    ports.slot.device.resize(SECOND, size(101, 31));
    assert_eq!(ports.heard(), [message(1, 5, 0, &[101, 0, 31, 0])]);
    assert_eq!(
        ports.slot.calls.config.load(Ordering::SeqCst),
        0,
        "the configuration space is the first port's"
    );
    ports.slot.device.resize(0, size(5, 6));
    assert_eq!(ports.heard(), [message(0, 5, 0, &[5, 0, 6, 0])]);
    assert_eq!(ports.slot.calls.config.load(Ordering::SeqCst), 1);

    let queues = ports.slot.stop();
    ports.slot.device.resize(SECOND, size(7, 8));
    ports.slot.device.resize(SECOND, size(9, 10));
    ports.slot.start(queues, MULTIPORT);
    assert_eq!(ports.heard(), [message(1, 5, 0, &[9, 0, 10, 0])]);
}

#[test]
fn messages_of_every_kind_at_any_time_harm_nobody() {
    let mut ports = ports();
    for round in 0..2 {
        for event in (0..=9).chain([u16::MAX]) {
            for id in [0, 1, 2, 3, 31, 32, 64, u32::MAX] {
                for value in [0, 1, u16::MAX] {
                    ports.say(id, event, value);
                }
            }
        }
        for length in 0..8 {
            if length > 0 {
                ports.say_bytes(&message(0, 3, 1, &[])[..length]);
            }
        }
        // As long as a buffer may be, and one for the device to write.
        let huge = Buffer { address: 0, len: 1 << 20, writable: false };
        ports.queues[3].add(&[huge; 4]);
        let wrong = ports.queues[3].room(8);
        ports.queues[3].add(&[wrong]);
        ports.settle();
        assert_eq!(ports.queues[3].reap_all().len(), 2);
        if round == 0 {
            // A driver that has not listened by now still hears each thing once.
            for _ in 0..5 {
                ports.say(0, 0, 1);
                (0..3).for_each(|port| ports.say(port, 3, 1));
            }
            ports.listen(31, 100);
            assert_eq!(ports.heard().len(), 3 + 3 + 4 + 2);
        }
    }
    assert!(!ports.slot.calls.broken());
    ports.print(STREAM, b"still here");
    assert_eq!(ports.screens[STREAM].taken(), b"still here");
}

#[test]
fn a_message_that_its_buffer_has_no_room_for_is_lost_and_the_next_is_told() {
    let mut ports = ports();
    for wrong in [ports.queues[2].data(&[0; 100]), ports.queues[2].room(8), ports.queues[2].room(0)] {
        // The name of a port, and that it is open.
        ports.say(2, 3, 1);
        ports.queues[2].add(&[wrong]);
        let header = ports.queues[2].room(8);
        ports.queues[2].add(&[header]);
        ports.settle();
        let written: Vec<u32> = ports.queues[2].reap_all().iter().map(|used| used.written).collect();
        assert_eq!(written, [0, 8]);
        assert_eq!(ports.queues[2].read(header), message(2, 6, 1, &[]));
    }
}

#[test]
fn a_driver_that_knows_of_no_further_ports_has_the_first() {
    let mut ports = ports_with(EVENT_IDX, None);
    let room = ports.room_for_input(0);
    ports.keyboards[0].write_all(b"typed").unwrap();
    assert_eq!(ports.input(0, room), b"typed");
    ports.print(0, b"said");
    assert_eq!(ports.screens[0].taken(), b"said");
    ports.slot.device.resize(0, Size { columns: 1, rows: 2 });
    assert_eq!(ports.slot.calls.config.load(Ordering::SeqCst), 1);
}

#[test]
fn what_the_driver_knows_and_has_open_is_saved_and_forgotten_at_reset() {
    let mut ports = ports();
    ports.set_up();
    ports.say(2, 6, 1);
    ports.slot.stop();
    ports.slot.device.resize(SECOND, Size { columns: 11, rows: 12 });
    let DeviceState::Console(state) = ports.slot.device.save() else { unreachable!() };
    let mut restored = ports_with(MULTIPORT, Some(state.clone()));
    restored.listen(20, 100);
    assert_eq!(restored.heard(), [message(1, 5, 0, &[11, 0, 12, 0])]);
    let room = restored.room_for_input(STREAM);
    restored.keyboards[STREAM].write_all(b"still open").unwrap();
    assert_eq!(restored.input(STREAM, room), b"still open");
    let room = restored.room_for_input(SECOND);
    restored.keyboards[SECOND].write_all(b"not open").unwrap();
    assert_eq!(restored.input(SECOND, room), b"");

    ports.slot.device.reset();
    let DeviceState::Console(after) = ports.slot.device.save() else { unreachable!() };
    let mut restored = ports_with(MULTIPORT, Some(after));
    restored.listen(20, 100);
    assert!(restored.heard().is_empty());
    let room = restored.room_for_input(STREAM);
    restored.keyboards[STREAM].write_all(b"nobody").unwrap();
    assert_eq!(restored.input(STREAM, room), b"");

    // Of another device: what does not fit is passed over.
    let fewer = State { ports: state.ports[..1].to_vec() };
    assert_eq!(device(Some(fewer), Limits::default()).0.ports.len(), 3);
    let more = State { ports: [&state.ports[..], &state.ports[..]].concat() };
    assert_eq!(device(Some(more), Limits::default()).0.ports.len(), 3);
}

fn bytes_per(size: u64, refill_ms: u64) -> Limits {
    Limits { bandwidth: Some(Bucket { size, one_time_burst: 0, refill_ms }), ops: None }
}

#[test]
fn a_terminal_with_a_limit_makes_nobody_wait_and_what_is_too_much_is_lost() {
    let mut rig = limited(None, bytes_per(1000, 3_600_000));
    rig.print(&[b'a'; 1000]);
    assert_eq!(rig.screen.taken(), [b'a'; 1000]);
    for _ in 0..OUTPUT_LIMIT / 1024 {
        rig.print(&[b'b'; 1024]);
    }
    assert_eq!((rig.screen.taken().len(), rig.lost()), (1000, 0), "the rest is kept");
    rig.print(&[b'c'; 10]);
    assert_eq!(rig.lost(), 10);
    let saved = rig.slot.stop().len();
    let DeviceState::Console(State { ports }) = rig.slot.device.save() else { unreachable!() };
    assert_eq!((saved, ports[0].output.len()), (2, OUTPUT_LIMIT), "a stop does not let it out");
}

#[test]
fn what_a_limit_holds_back_goes_when_the_limit_is_taken_off() {
    let mut rig = limited(None, bytes_per(1000, 3_600_000));
    rig.print(&[b'a'; 1000]);
    rig.print(&[b'b'; 4000]);
    assert_eq!(rig.screen.taken().len(), 1000);
    rig.slot.device.set_limits(0, Limits::default());
    rig.slot.device.set_limits(MAX_FURTHER_PORTS + 1, Limits::default());
    let screen = rig.screen.clone();
    rig.slot.run_until(|_| screen.taken().len() == 5000);
}

#[test]
fn a_stream_with_a_limit_loses_nothing_and_its_writer_waits() {
    let mut rig = ports_limited(MULTIPORT, None, bytes_per(8 << 10, 5));
    let queue = usize::from(transmit_queue(STREAM));
    let pieces: Vec<Vec<u8>> = (0..30).map(|number: u8| vec![number; 8 << 10]).collect();
    for piece in &pieces {
        let data = rig.queues[queue].data(piece);
        rig.queues[queue].add(&[data]);
    }
    rig.slot.run(1);
    assert!(rig.queues[queue].reap_all().len() < pieces.len(), "who writes there waits");
    let screen = rig.screens[STREAM].clone();
    rig.slot.run_until(|_| screen.taken().len() == pieces.len() * (8 << 10));
    assert_eq!(rig.screens[STREAM].taken(), pieces.concat());
    assert_eq!(rig.slot.device.counters().lost_bytes.load(Ordering::Relaxed), 0);
}
