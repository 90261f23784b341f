//! The console (VIRTIO 1.3, section 5.3): one port, its input from a descriptor, its output to a writer, its size in the
//! configuration space.
//!
//! No control queues: a device of one port (no VIRTIO_CONSOLE_F_MULTIPORT), always open. Not line-buffered, and no
//! terminal: what comes in goes out. Never makes the guest wait for a reader: Linux holds a lock while it waits for its
//! output to be taken, so what a slow reader leaves is kept up to [`OUTPUT_LIMIT`], and what is more is lost and counted.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use crate::host::Source;
use crate::memory::GuestRam;
use crate::virtio::device::{
    Active, DeviceState, DeviceType, Identity, StartError, VirtioDevice, read_space,
};
use crate::virtio::queue::{Chain, Queue, QueueError};
use crate::virtio::running::{Running, Step, count};

/// Linux fills the receive queue with a page per entry; a console needs no more than this.
const QUEUE_SIZE: u16 = 32;

/// Most bytes of output that wait for the writer. A write of Linux has at most half of it.
pub const OUTPUT_LIMIT: usize = 64 << 10;

/// Most bytes of input taken at a time.
const INPUT_BYTES: u32 = 4096;

/// When to try again what the writer would not take.
const RETRY: Duration = Duration::from_millis(10);

/// VIRTIO_CONSOLE_F_SIZE (5.3.3).
const F_SIZE: u32 = 0;

/// What a console is made of.
pub struct Config {
    /// Read when it is readable and the guest has room. A descriptor that blocks is fine if nobody else reads it: there
    /// is one read per readiness. At its end there is no more input.
    pub input: Option<OwnedFd>,
    /// Must not block: [`ErrorKind::WouldBlock`] is tried again, any other error loses what was to be written.
    pub output: Box<dyn Write + Send>,
    pub size: Size,
}

/// The size of the terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    pub columns: u16,
    pub rows: u16,
}

/// The console.
pub struct Console {
    size: Size,
    input: Input,
    output: Output,
    counters: Arc<Counters>,
    running: Option<Running>,
    /// The driver has to be told of the size.
    resized: bool,
}

impl Console {
    /// A stopped device, or, with a state, the one that was saved: with the size it had and the output still to be
    /// written.
    pub fn new(config: Config, state: Option<State>) -> io::Result<Console> {
        let State { size, mut output } = state.unwrap_or(State { size: config.size, output: Vec::new() });
        output.truncate(OUTPUT_LIMIT);
        let counters = Arc::<Counters>::default();
        Ok(Console {
            size,
            input: Input::new(config.input)?,
            output: Output::new(config.output, output, counters.clone())?,
            counters,
            running: None,
            resized: false,
        })
    }

    /// Another size from now on. A driver that runs is told, one that is paused when it goes on.
    pub fn resize(&mut self, size: Size) {
        self.resized |= size != self.size;
        self.size = size;
        self.announce();
    }

    fn announce(&mut self) {
        if let Some(running) = &self.running
            && std::mem::take(&mut self.resized)
        {
            running.interrupt.config();
        }
    }

    /// What the device has done since it was built.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn receive(&mut self) {
        let Some(running) = &mut self.running else { return };
        running.serve(RECEIVE, |memory, chain| match self.input.read(memory, chain)? {
            None => Ok(Step::Later),
            Some(bytes) => {
                count(&self.counters.input_bytes, bytes.into());
                Ok(Step::Used(bytes))
            }
        });
    }

    fn transmit(&mut self) {
        let Some(running) = &mut self.running else { return };
        running.serve(TRANSMIT, |memory, chain| self.output.take(memory, chain));
        self.output.flush();
    }
}

impl VirtioDevice for Console {
    fn identity(&self) -> Identity {
        let features = 1 << F_SIZE | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
        Identity { device_type: DeviceType::Console, features, queue_sizes: vec![QUEUE_SIZE; 2] }
    }

    /// Columns and rows; of the fields behind them, none is offered (5.3.4).
    fn config(&self, offset: u64, data: &mut [u8]) {
        let Size { columns, rows } = self.size;
        let space = u32::from(columns) | u32::from(rows) << 16;
        read_space(&space.to_le_bytes(), offset, data);
    }

    fn start(&mut self, active: Active) -> Result<Vec<Source>, StartError> {
        let (running, mut sources) = Running::start(active, 2)?;
        sources.push(Source { fd: self.output.timer.as_raw_fd(), token: RETRY_TIMER });
        sources.extend(self.input.fd().map(|fd| Source { fd, token: INPUT }));
        self.running = Some(running);
        self.announce();
        self.output.flush();
        Ok(sources)
    }

    fn handle(&mut self, token: u32) {
        match token {
            INPUT => {
                self.input.readable();
                self.receive();
                self.input.pause();
            }
            RETRY_TIMER => self.output.retry(),
            _ if token == u32::from(TRANSMIT) => self.transmit(),
            _ => {
                self.input.resume();
                self.receive();
            }
        }
    }

    fn stop(&mut self) -> Vec<Queue> {
        // What the writer does not take now is kept; input that is not read yet is still its sender's.
        self.output.flush();
        self.running.take().map(Running::stop).unwrap_or_default()
    }

    fn save(&self) -> DeviceState {
        DeviceState::Console(State { size: self.size, output: self.output.waiting.clone() })
    }
}

/// [`Console`] as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    size: Size,
    /// Taken from the guest and not written yet; at most [`OUTPUT_LIMIT`].
    output: Vec<u8>,
}

/// What a console has done since it was built.
#[derive(Debug, Default)]
pub struct Counters {
    pub input_bytes: AtomicU64,
    pub output_bytes: AtomicU64,
    /// Output that nobody took in time.
    pub lost_bytes: AtomicU64,
}

/// The queues of port 0 (5.3.2), which are also their tokens.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const INPUT: u32 = 2;
const RETRY_TIMER: u32 = 3;

/// Where input comes from. A descriptor that is readable while the guest has no room would call us for ever, so it is
/// watched behind an epoll descriptor of our own, from which it can be taken and to which it can be put back.
struct Input {
    file: Option<File>,
    /// None where input is always readable, as a regular file or /dev/null is; epoll does not take those.
    gate: Option<Epoll>,
    /// The descriptor is behind the gate.
    watched: bool,
    /// One read will not block.
    ready: bool,
}

impl Input {
    fn new(input: Option<OwnedFd>) -> io::Result<Input> {
        let Some(input) = input else {
            return Ok(Input { file: None, gate: None, watched: false, ready: false });
        };
        let file = File::from(input);
        let gate = Epoll::new()?;
        let gate = match gate.ctl(ControlOperation::Add, file.as_raw_fd(), no_event()) {
            Ok(()) => {
                gate.ctl(ControlOperation::Delete, file.as_raw_fd(), no_event()).map(|()| Some(gate))?
            }
            Err(error) if error.kind() == ErrorKind::PermissionDenied => None,
            Err(error) => return Err(error),
        };
        Ok(Input { file: Some(file), ready: gate.is_none(), gate, watched: false })
    }

    /// Readable when the input is, and is watched.
    fn fd(&self) -> Option<RawFd> {
        self.gate.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// The descriptor of [`Input::fd`] was readable.
    fn readable(&mut self) {
        self.ready = true;
    }

    /// The guest has made room.
    fn resume(&mut self) {
        if let (Some(gate), Some(file), false) = (&self.gate, &self.file, self.watched) {
            let event = EpollEvent::new(EventSet::IN, 0);
            match gate.ctl(ControlOperation::Add, file.as_raw_fd(), event) {
                Ok(()) => self.watched = true,
                Err(error) => log::error!("console: the input cannot be watched: {error}"),
            }
        }
    }

    /// Watches no longer if there was something to read and no room for it.
    fn pause(&mut self) {
        if self.ready && self.gate.is_some() {
            self.ready = false;
            self.unwatch();
        }
    }

    /// Reads once into the chain if that does not block; `None` when nothing can come now.
    fn read(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<Option<u32>, QueueError> {
        let Some(file) = self.file.as_mut().filter(|_| self.ready) else { return Ok(None) };
        let room = chain.writable.bytes().min(INPUT_BYTES);
        if room == 0 {
            return Ok(Some(0));
        }
        let mut data = vec![0; room as usize];
        self.ready = self.gate.is_none();
        match file.read(&mut data) {
            Ok(0) => self.end(),
            Ok(bytes) => {
                chain.writable.write(memory, data.get(..bytes).unwrap_or_default())?;
                return Ok(Some(bytes as u32));
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => {
                log::warn!("console: there is no more input: {error}");
                self.end();
            }
        }
        Ok(None)
    }

    fn end(&mut self) {
        self.unwatch();
        self.file = None;
    }

    fn unwatch(&mut self) {
        if let (Some(gate), Some(file), true) = (&self.gate, &self.file, self.watched) {
            // It was added, so it can be deleted.
            let _ = gate.ctl(ControlOperation::Delete, file.as_raw_fd(), no_event());
            self.watched = false;
        }
    }
}

fn no_event() -> EpollEvent {
    EpollEvent::new(EventSet::empty(), 0)
}

/// Where output goes, and what of it waits.
struct Output {
    writer: Box<dyn Write + Send>,
    waiting: Vec<u8>,
    timer: TimerFd,
    counters: Arc<Counters>,
}

impl Output {
    fn new(writer: Box<dyn Write + Send>, waiting: Vec<u8>, counters: Arc<Counters>) -> io::Result<Output> {
        Ok(Output { writer, waiting, timer: TimerFd::new()?, counters })
    }

    /// Takes what the chain holds, as far as there is room.
    fn take(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<Step, QueueError> {
        let bytes = chain.readable.bytes() as usize;
        if self.waiting.len() + bytes > OUTPUT_LIMIT {
            self.flush();
        }
        let kept = bytes.min(OUTPUT_LIMIT - self.waiting.len());
        let mut data = vec![0; kept];
        chain.readable.read(memory, &mut data)?;
        self.waiting.append(&mut data);
        count(&self.counters.lost_bytes, (bytes - kept) as u64);
        Ok(Step::Used(0))
    }

    fn retry(&mut self) {
        if let Err(error) = self.timer.clear() {
            log::error!("console: cannot stop the timer: {error}");
        }
        self.flush();
    }

    /// Writes what waits, or sets the timer for what the writer does not take.
    fn flush(&mut self) {
        while !self.waiting.is_empty() {
            let lost = match self.writer.write(&self.waiting) {
                Ok(bytes) if bytes > 0 => {
                    count(&self.counters.output_bytes, bytes as u64);
                    self.waiting.drain(..bytes.min(self.waiting.len()));
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.timer.reset(RETRY, None).is_err(),
                Ok(_) | Err(_) => true,
            };
            if lost {
                count(&self.counters.lost_bytes, self.waiting.len() as u64);
                self.waiting.clear();
            }
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::PipeWriter;
    use std::sync::atomic::Ordering;
    use std::sync::{Mutex, MutexGuard};

    use super::*;
    use crate::virtio::testing::{self, Driver, EVENT_IDX, Slot};

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
        let memory = testing::ram(4 << 20);
        let receive = Driver::new(&memory, 0x1000, 32, EVENT_IDX);
        let transmit = Driver::new(&memory, 0x20_0000, 32, EVENT_IDX);
        let screen = Screen::default();
        screen.make_room(usize::MAX);
        let config = Config { input, output: Box::new(screen.clone()), size: SIZE };
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
        rig.slot.device.resize(SIZE);
        assert_eq!(told(&rig), 0, "nothing has changed");
        rig.slot.device.resize(Size { columns: 80, rows: 24 });
        assert_eq!((told(&rig), size(&rig)), (1, (80, 24)));
        let queues = rig.slot.stop();
        rig.slot.device.resize(SIZE);
        rig.slot.device.resize(Size { columns: 200, rows: 60 });
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
        rig.slot.device.output.writer = Box::new(Broken);
        rig.print(b"gone");
        assert_eq!(rig.lost(), 4);
        rig.slot.device.output.writer = Box::new(rig.screen.clone());
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
        assert_eq!(state.output, b"waiting");

        state.output = vec![b'x'; OUTPUT_LIMIT + 1];
        let config = Config { input: None, output: Box::new(rig.screen.clone()), size: SIZE };
        let mut console = Console::new(config, Some(state)).unwrap();
        rig.screen.make_room(usize::MAX);
        console.stop();
        assert_eq!(rig.screen.taken().len(), OUTPUT_LIMIT);
    }
}
