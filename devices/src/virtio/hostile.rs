//! One property of every virtio device behind every transport: whatever a driver does, nothing panics or spins, no memory
//! is written but what the driver offered for it, the device goes on or asks to be reset, and after a reset it works.
//!
//! What a device answers is not looked at; each device's own tests do that. To try another device, add it to [`DEVICES`];
//! another attack, to [`ON_RINGS`] or [`ON_REGISTERS`]. Each pair of them runs, on a device of its own.

use std::collections::VecDeque;
use std::io::Write;
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::round_trip;
use crate::backend::direct;
use crate::backend::disk::Format;
use crate::backend::qcow2::testing::Blank;
use crate::backend::rate_limiter::Limits;
use crate::backend::tap::Tap;
use crate::bus::BusDevice;
use crate::memory::Memory;
use crate::pci::Function;
use crate::testing::FakeHost;
use crate::virtio::balloon::{self, Balloon, Ram};
use crate::virtio::blk::{Blk, Engine};
use crate::virtio::console::{self, Console, Size};
use crate::virtio::dead::Dead;
use crate::virtio::mem;
use crate::virtio::mmio::{self, Mmio};
use crate::virtio::net::{self, Net};
use crate::virtio::pci::{self, Pci};
use crate::virtio::testing::{ABOVE_4G, Buffer, Driver, EVENT_IDX, INDIRECT, NEXT, WRITE, shared_ram_of};
use crate::virtio::transport::SharedDevice;
use crate::virtio::transport::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};
use crate::virtio::vhost_user::testing::{Alone, Kind};
use crate::virtio::vsock::packet::{HOST_CID, Header, op};
use crate::virtio::vsock::{self, Vsock};

/// Guest RAM is here and at [`ABOVE_4G`], with nothing between.
const LOW_BYTES: u64 = 512 << 10;
const HIGH_BYTES: u64 = 64 << 10;

/// A place for each queue and what its driver offers, from here on.
const RINGS: u64 = 0x1_0000;
const RING_BYTES: u64 = 0x8000;

/// What attacks offer for writing lies here.
const ROOM: Range<u64> = 0x4_0000..0x6_0000;
/// Memory that is a balloon's to take.
const BALLOON: Range<u64> = 0x6_0000..LOW_BYTES;

/// What is in memory that nobody has written.
const UNTOUCHED: u8 = 0xa5;

const VERSION_1: u64 = 1 << 32;

/// Calls of a device before it is said to spin. Of queues with everything in them it needs some dozens.
const MOST_CALLS: usize = 2000;

/// A device, and what a driver and the host's side can do with it.
struct Subject {
    device: SharedDevice,
    /// Something comes from the host's side: a packet, a key.
    stir: Box<dyn FnMut()>,
    /// Another process that has a part in it, if there is one, does what there is to do, and says whether there was anything.
    serve: Box<dyn FnMut() -> bool>,
    /// What is in a chain is that other process's to look at.
    passes_chains_on: bool,
    /// What the device may change without being offered it.
    owns: Range<u64>,
    /// Features without which it does not start.
    needs: u64,
    /// What it answers.
    requests: Requests,
}

/// Each with its queue.
type Requests = Vec<(usize, fn(&mut Driver) -> Vec<Buffer>)>;

type MakeDevice = fn() -> Subject;

const DEVICES: &[(&str, MakeDevice)] = &[
    ("rng", rng),
    ("blk", || blk(Engine::Sync, 1)),
    ("blk with a ring", || blk(Engine::Async, 1)),
    ("blk with three queues", || blk(Engine::Sync, 3)),
    ("blk with a ring for three queues", || blk(Engine::Async, 3)),
    ("blk past the host's cache", || direct_blk(Engine::Sync)),
    ("blk past the host's cache with a ring", || direct_blk(Engine::Async)),
    ("blk on a qcow2 image", qcow2_blk),
    ("net", || net(1)),
    ("net with a neighbour", net_with_neighbour),
    ("net with two pairs of queues", || net(2)),
    ("vsock", vsock),
    ("balloon", balloon),
    ("console", console),
    ("console with ports", console_with_ports),
    ("pmem", pmem),
    ("mem", mem),
    ("blk of another process", || vhost_user(1)),
    ("blk of another process with three queues", || vhost_user(3)),
    ("blk that was taken away", dead_blk),
    ("pmem that was taken away", dead_pmem),
    ("net that was taken away", dead_net),
];

fn quiet(device: SharedDevice, requests: Requests) -> Subject {
    let (stir, serve) = (Box::new(|| {}), Box::new(|| false));
    Subject { device, stir, serve, passes_chains_on: false, owns: 0..0, needs: 0, requests }
}

fn rng() -> Subject {
    let device = round_trip::rng_of(Limits::default())(None);
    quiet(Arc::new(Mutex::new(device)), vec![(0, |driver| vec![driver.room(64)])])
}

fn blk(engine: Engine, queues: u16) -> Subject {
    blk_that_is(round_trip::blk_of(engine, queues, Limits::default())(None), queues)
}

fn direct_blk(engine: Engine) -> Subject {
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(1 << 20).unwrap();
    // A description of its own.
    let file = path.reopen().unwrap();
    direct::enable(&file).unwrap();
    blk_that_is(round_trip::blk_on(file, || Format::Raw, engine, 1, Limits::default())(None), 1)
}

fn qcow2_blk() -> Subject {
    let mut file = tempfile::tempfile().unwrap();
    let image = Blank { cluster_bits: 12, size: 1 << 20, backing: None };
    file.write_all(&image.bytes()).unwrap();
    let format = || Format::Qcow2(Vec::new());
    blk_that_is(round_trip::blk_on(file, format, Engine::Sync, 1, Limits::default())(None), 1)
}

fn blk_that_is(device: Blk, queues: u16) -> Subject {
    let read = |driver: &mut Driver| round_trip::blk_request(VIRTIO_BLK_T_IN)(driver);
    let requests = (0..queues.into()).map(|queue| (queue, read as fn(&mut Driver) -> Vec<Buffer>));
    quiet(Arc::new(Mutex::new(device)), requests.collect())
}

fn dead_blk() -> Subject {
    let device = round_trip::dead_of(round_trip::blk_of(Engine::Sync, 3, Limits::default()))(None);
    let read = |driver: &mut Driver| round_trip::blk_request(VIRTIO_BLK_T_IN)(driver);
    quiet(Arc::new(Mutex::new(device)), vec![(0, read), (2, read)])
}

fn dead_pmem() -> Subject {
    let device = round_trip::dead_of(round_trip::pmem_of(Limits::default()))(None);
    quiet(Arc::new(Mutex::new(device)), vec![(0, round_trip::pmem_flush)])
}

fn dead_net() -> Subject {
    let device = Dead::of(&*net(2).device.lock().unwrap());
    quiet(Arc::new(Mutex::new(device)), vec![(1, |driver| vec![driver.data(&[0; 72])])])
}

fn pmem() -> Subject {
    let device = round_trip::pmem_of(Limits::default())(None);
    quiet(Arc::new(Mutex::new(device)), vec![(0, round_trip::pmem_flush)])
}

fn vhost_user(queues: u16) -> Subject {
    let backend = Alone::new(Kind::of_queues(queues));
    let device = round_trip::vhost_user_of(&backend, queues)(None);
    let read = |driver: &mut Driver| round_trip::blk_request(VIRTIO_BLK_T_IN)(driver);
    let requests = (0..queues.into()).map(|queue| (queue, read as fn(&mut Driver) -> Vec<Buffer>));
    let subject = quiet(Arc::new(Mutex::new(device)), requests.collect());
    Subject { serve: Box::new(move || backend.work()), passes_chains_on: true, ..subject }
}

/// With no block that could be plugged in the memory that is looked at.
fn mem() -> Subject {
    let state = |driver: &mut Driver| vec![driver.data(&round_trip::unplug_all()), driver.room(10)];
    let device = Arc::new(Mutex::new(round_trip::memory_device(None)));
    Subject { needs: mem::F_UNPLUGGED_INACCESSIBLE, ..quiet(device, vec![(0, state)]) }
}

fn net(pairs: usize) -> Subject {
    net_beside(pairs, None)
}

/// Has a word for every driver that comes, takes what is for it and answers twice, as the metadata service would that has more
/// to say than it is asked.
struct Echo {
    words: VecDeque<Vec<u8>>,
}

impl Echo {
    fn new() -> Echo {
        Echo { words: [vec![0x33; 60]].into() }
    }
}

/// That wait until the driver takes them.
const MOST_WORDS: usize = 16;

impl net::Neighbour for Echo {
    /// About half of what comes.
    fn is_for_me(&self, start: &[u8]) -> bool {
        start.first().is_some_and(|byte| byte % 2 == 0)
    }

    fn take(&mut self, frame: &[u8]) {
        if self.words.len() < MOST_WORDS {
            self.words.extend([frame.to_vec(), vec![0x33; 60]]);
        }
    }

    fn give(&mut self) -> Option<Vec<u8>> {
        self.words.pop_front()
    }

    fn has_frames(&self) -> bool {
        !self.words.is_empty()
    }

    fn wake_in(&mut self) -> Option<Duration> {
        self.has_frames().then_some(Duration::from_secs(3600))
    }

    fn wake(&mut self) {}

    fn reset(&mut self) {
        *self = Echo::new();
    }
}

fn net_with_neighbour() -> Subject {
    net_beside(1, Some(Box::new(Echo::new())))
}

fn net_beside(pairs: usize, neighbour: Option<Box<dyn net::Neighbour>>) -> Subject {
    let (tap, ends) = Tap::fake(pairs);
    let config = net::Config {
        tap,
        mac: Some([2, 0, 0, 0, 0, 1]),
        mtu: Some(1500),
        receive_limits: Limits::default(),
        transmit_limits: Limits::default(),
        neighbour,
        vhost: Vec::new(),
        room: None,
    };
    let device = Arc::new(Mutex::new(Net::new(config, None).unwrap()));
    let packet = move || {
        for end in &ends {
            // A full socket is as good as one more packet.
            let _ = end.send(&[0; 72]);
            // What the device sent is not kept.
            while end.recv(&mut [0; 128]).is_ok() {}
        }
    };
    let requests: Requests =
        vec![(0, |driver| vec![driver.room(1526)]), (1, |driver| vec![driver.data(&[0; 72])])];
    Subject { stir: Box::new(packet), ..quiet(device, requests) }
}

fn vsock() -> Subject {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v.sock");
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let config = vsock::Config {
        guest_cid: 3,
        listener,
        connect: Box::new(|_| Err(std::io::ErrorKind::NotFound.into())),
    };
    let device = Arc::new(Mutex::new(Vsock::new(config, None).unwrap()));
    let mut programs = Vec::new();
    let program = move || {
        let _ = &directory;
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"CONNECT 1000\n").unwrap();
        programs.push(stream);
    };
    let requests: Requests = vec![
        (0, |driver| vec![driver.room(4096)]),
        (1, |driver| {
            let header = Header { src_cid: 3, dst_cid: HOST_CID, op: op::RST, ..Header::default() };
            vec![driver.data(&header.to_bytes())]
        }),
    ];
    Subject { stir: Box::new(program), ..quiet(device, requests) }
}

fn balloon() -> Subject {
    let config = balloon::Config {
        target_pages: 100,
        deflate_on_oom: true,
        statistics_interval: Some(std::time::Duration::from_secs(3600)),
        hinting: true,
        reporting: true,
        ram: Ram { regions: std::iter::once(BALLOON).collect(), page: balloon::PAGE },
    };
    let device = Arc::new(Mutex::new(Balloon::new(config, None).unwrap()));
    let page = |driver: &mut Driver| vec![driver.data(&((BALLOON.start >> 12) as u32).to_le_bytes())];
    Subject { owns: BALLOON, ..quiet(device, vec![(0, page), (1, page)]) }
}

fn console() -> Subject {
    console_with(Vec::new(), vec![(0, |driver| vec![driver.room(100)]), (1, output)])
}

fn console_with_ports() -> Subject {
    let (name, output_of_it) = ("second".into(), Box::new(std::io::sink()));
    let port = console::PortConfig {
        name,
        size: None,
        input: None,
        output: output_of_it,
        limits: Limits::default(),
    };
    // Both say that they are there, and that the first is open.
    let ready = |driver: &mut Driver| vec![driver.data(&[0, 0, 0, 0, 3, 0, 1, 0])];
    let open = |driver: &mut Driver| vec![driver.data(&[0, 0, 0, 0, 6, 0, 1, 0])];
    console_with(vec![port], vec![(3, ready), (3, open), (1, output), (5, output)])
}

fn output(driver: &mut Driver) -> Vec<Buffer> {
    vec![driver.data(b"a line\n")]
}

fn console_with(ports: Vec<console::PortConfig>, requests: Requests) -> Subject {
    let (input, mut keyboard) = std::io::pipe().unwrap();
    let config = console::Config {
        input: Some(input.into()),
        output: Box::new(std::io::sink()),
        size: Size { columns: 80, rows: 25 },
        limits: Limits::default(),
        ports,
    };
    let device = Arc::new(Mutex::new(Console::new(config, None).unwrap()));
    let key = move || keyboard.write_all(b"key").unwrap();
    Subject { stir: Box::new(key), ..quiet(device, requests) }
}

/// A transport's registers, by what they are for.
trait Registers {
    /// Writes one, or something that is none.
    fn write(&mut self, offset: u64, data: &[u8]);
    fn read(&mut self, offset: u64, data: &mut [u8]);
    fn at(&self, register: Register) -> (u64, usize);
    /// Where the device's configuration space begins.
    fn config(&self) -> u64;
    /// How far registers reach.
    fn end(&self) -> u64;
    fn notify(&mut self, queue: u32);

    fn set(&mut self, register: Register, value: u64) {
        let (offset, width) = self.at(register);
        if width == 8 {
            // As halves, which both transports take.
            self.write(offset, &(value as u32).to_le_bytes());
            self.write(offset + 4, &((value >> 32) as u32).to_le_bytes());
        } else {
            self.write(offset, &value.to_le_bytes()[..width]);
        }
    }

    fn get(&mut self, register: Register) -> u64 {
        let (offset, width) = self.at(register);
        let mut data = [0; 8];
        self.read(offset, &mut data[..width]);
        u64::from_le_bytes(data)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Status,
    OfferedSelect,
    Offered,
    TakenSelect,
    Taken,
    Queue,
    /// As it was offered, until it is written.
    Size,
    Enable,
    Descriptors,
    Available,
    Used,
}

use Register::*;

struct OnMmio(Mmio);

impl Registers for OnMmio {
    fn write(&mut self, offset: u64, data: &[u8]) {
        let _ = self.0.write(offset, data);
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn at(&self, register: Register) -> (u64, usize) {
        use mmio::register as is;
        match register {
            Status => (is::STATUS, 4),
            OfferedSelect => (is::DEVICE_FEATURES_SEL, 4),
            Offered => (is::DEVICE_FEATURES, 4),
            TakenSelect => (is::DRIVER_FEATURES_SEL, 4),
            Taken => (is::DRIVER_FEATURES, 4),
            Queue => (is::QUEUE_SEL, 4),
            Size => (is::QUEUE_SIZE, 4),
            Enable => (is::QUEUE_READY, 4),
            Descriptors => (is::QUEUE_DESC_LOW, 8),
            Available => (is::QUEUE_DRIVER_LOW, 8),
            Used => (is::QUEUE_DEVICE_LOW, 8),
        }
    }

    fn config(&self) -> u64 {
        mmio::register::CONFIG
    }

    fn end(&self) -> u64 {
        mmio::SIZE
    }

    fn notify(&mut self, queue: u32) {
        self.write(mmio::register::QUEUE_NOTIFY, &queue.to_le_bytes());
    }
}

struct OnPci(Pci);

impl Registers for OnPci {
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.write_bar(pci::BAR, offset, data);
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read_bar(pci::BAR, offset, data);
    }

    fn at(&self, register: Register) -> (u64, usize) {
        use pci::common as is;
        let (offset, width) = match register {
            Status => (is::DEVICE_STATUS, 1),
            OfferedSelect => (is::DEVICE_FEATURE_SELECT, 4),
            Offered => (is::DEVICE_FEATURE, 4),
            TakenSelect => (is::DRIVER_FEATURE_SELECT, 4),
            Taken => (is::DRIVER_FEATURE, 4),
            Queue => (is::QUEUE_SELECT, 2),
            Size => (is::QUEUE_SIZE, 2),
            Enable => (is::QUEUE_ENABLE, 2),
            Descriptors => (is::QUEUE_DESC, 8),
            Available => (is::QUEUE_DRIVER, 8),
            Used => (is::QUEUE_DEVICE, 8),
        };
        (offset as u64, width)
    }

    fn config(&self) -> u64 {
        pci::DEVICE * pci::PAGE
    }

    fn end(&self) -> u64 {
        pci::BAR_SIZE
    }

    fn notify(&mut self, queue: u32) {
        let doorbell = pci::NOTIFY * pci::PAGE + u64::from(queue) * u64::from(pci::NOTIFY_MULTIPLIER);
        if doorbell < pci::BAR_SIZE {
            self.write(doorbell, &queue.to_le_bytes());
        }
    }
}

type MakeRegisters = fn(SharedDevice, &FakeHost, &Memory) -> Box<dyn Registers>;

const TRANSPORTS: &[(&str, MakeRegisters)] = &[("virtio-mmio", on_mmio), ("virtio-pci", on_pci)];

fn on_mmio(device: SharedDevice, host: &FakeHost, memory: &Memory) -> Box<dyn Registers> {
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let host = Arc::new(host.clone());
    Box::new(OnMmio(Mmio::new(0xd000_0000, device, host, memory.clone(), line, None).unwrap()))
}

fn on_pci(device: SharedDevice, host: &FakeHost, memory: &Memory) -> Box<dyn Registers> {
    let mut pci = Pci::new(device, Arc::new(host.clone()), memory.clone(), None).unwrap();
    // Bus mastering and memory decoding.
    pci.write_config(4, &[6, 0]);
    Box::new(OnPci(pci))
}

const PAGE: usize = 4096;

/// Of a place in [`Machine::image`].
fn address_of(place: u64) -> u64 {
    if place < LOW_BYTES { place } else { ABOVE_4G + place - LOW_BYTES }
}

/// A machine with one device, and the driver that attacks it.
struct Machine {
    host: FakeHost,
    memory: Memory,
    subject: Subject,
    registers: Box<dyn Registers>,
    /// The greatest size of each queue.
    sizes: Vec<u16>,
    features: u64,
    drivers: Vec<Driver>,
}

impl Machine {
    /// `features` are those that its driver takes, if they are offered.
    fn new(device: MakeDevice, transport: MakeRegisters, features: u64) -> Machine {
        let ranges = [(GuestAddress(0), LOW_BYTES as usize), (GuestAddress(ABOVE_4G), HIGH_BYTES as usize)];
        let memory = shared_ram_of(&ranges);
        let (host, subject) = (FakeHost::new(), device());
        let registers = transport(subject.device.clone(), &host, &memory);
        let sizes = subject.device.lock().unwrap().identity().queue_sizes;
        let features = features | subject.needs;
        Machine { host, memory, subject, registers, sizes, features, drivers: Vec::new() }
    }

    fn status(&mut self) -> u8 {
        self.registers.get(Status) as u8
    }

    fn add_status(&mut self, bits: u8) -> u8 {
        let status = self.status() | bits;
        self.registers.set(Status, status.into());
        self.status()
    }

    fn needs_reset(&mut self) -> bool {
        self.status() & NEEDS_RESET != 0
    }

    fn reset(&mut self) {
        self.registers.set(Status, 0);
        assert_eq!((self.status(), self.host.watches()), (0, 0), "a reset device has stopped");
    }

    fn offered(&mut self) -> u64 {
        let mut half = |number| {
            self.registers.set(OfferedSelect, number);
            self.registers.get(Offered)
        };
        half(0) | half(1) << 32
    }

    fn take(&mut self, features: u64) {
        for half in [0, 1] {
            self.registers.set(TakenSelect, half);
            self.registers.set(Taken, features >> (32 * half) & 0xffff_ffff);
        }
    }

    /// As after reset, up to features that are agreed on. Memory is as nobody has touched it, and queues are nowhere.
    fn agree(&mut self) {
        self.reset();
        let memory = self.memory.memory();
        memory.write_slice(&vec![UNTOUCHED; LOW_BYTES as usize], GuestAddress(0)).unwrap();
        memory.write_slice(&vec![UNTOUCHED; HIGH_BYTES as usize], GuestAddress(ABOVE_4G)).unwrap();
        self.add_status(ACKNOWLEDGE | DRIVER);
        let features = self.offered() & self.features;
        self.take(features);
        assert_eq!(self.add_status(FEATURES_OK), ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.drivers.clear();
        for (index, &size) in self.sizes.iter().enumerate() {
            let base = RINGS + RING_BYTES * index as u64;
            memory.write_slice(&[0; RING_BYTES as usize], GuestAddress(base)).unwrap();
            self.drivers.push(Driver::new(&self.memory, base, size, features & EVENT_IDX));
        }
    }

    /// Where the rings of a queue are: descriptors, available, used.
    fn rings(&self, queue: usize) -> [u64; 3] {
        let ring = self.drivers[queue].queue(0).save();
        [ring.desc_table, ring.avail_ring, ring.used_ring]
    }

    fn used_ring(&self, queue: usize) -> Range<u64> {
        let [_, _, used] = self.rings(queue);
        used..used + 6 + 8 * u64::from(self.sizes[queue])
    }

    fn set_up(&mut self, queue: usize, size: u16, rings: [u64; 3]) {
        self.registers.set(Queue, queue as u64);
        self.registers.set(Size, size.into());
        for (register, address) in [Descriptors, Available, Used].into_iter().zip(rings) {
            self.registers.set(register, address);
        }
        self.registers.set(Enable, 1);
    }

    /// A running device with all its queues.
    fn start(&mut self) {
        self.agree();
        for queue in 0..self.sizes.len() {
            self.set_up(queue, self.sizes[queue], self.rings(queue));
        }
        assert_eq!(self.add_status(DRIVER_OK), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        self.run();
    }

    /// Until the device has nothing to do.
    fn run(&mut self) {
        let mut calls = 0;
        loop {
            calls += self.host.run(MOST_CALLS);
            assert!(calls < MOST_CALLS, "the device does not come to rest");
            if !(self.subject.serve)() {
                break;
            }
        }
        self.host.take_messages();
    }

    /// Kicks every queue and lets something come from the host.
    fn provoke(&mut self) {
        for queue in 0..self.sizes.len() {
            self.registers.notify(queue as u32);
        }
        (self.subject.stir)();
        self.run();
    }

    fn image(&self) -> Vec<u8> {
        let mut image = vec![0; (LOW_BYTES + HIGH_BYTES) as usize];
        let (low, high) = image.split_at_mut(LOW_BYTES as usize);
        self.memory.memory().read_slice(low, GuestAddress(0)).unwrap();
        self.memory.memory().read_slice(high, GuestAddress(ABOVE_4G)).unwrap();
        image
    }

    /// Provokes the device; nothing changes but the used rings, `offered`, and what is the device's own.
    fn provoke_within(&mut self, offered: &[Range<u64>]) {
        let before = self.image();
        self.provoke();
        let after = self.image();
        let used = (0..self.drivers.len()).map(|queue| self.used_ring(queue));
        let mut may: Vec<_> = used.chain(offered.iter().cloned()).collect();
        may.push(self.subject.owns.clone());
        for (number, (before, after)) in (0..).zip(before.chunks(PAGE).zip(after.chunks(PAGE))) {
            // Whole pages first, since nearly all of them are alike.
            if before != after {
                let changed =
                    (0..).zip(before.iter().zip(after)).filter(|(_, (before, after))| before != after);
                for (offset, _) in changed {
                    let address = address_of(number * PAGE as u64 + offset);
                    assert!(may.iter().any(|range| range.contains(&address)), "{address:#x} was written");
                }
            }
        }
    }

    /// The device answers each of its requests, and where they say.
    fn assert_works(&mut self) {
        let mut offered = Vec::new();
        for (queue, request) in self.subject.requests.clone() {
            let driver = &mut self.drivers[queue];
            let buffers = request(driver);
            let head = driver.add(&buffers);
            let room = buffers.iter().filter(|buffer| buffer.writable);
            offered.extend(room.map(|buffer| buffer.address..buffer.address + u64::from(buffer.len)));
            self.provoke_within(&offered);
            let used = self.drivers[queue].reap_all();
            assert!(used.iter().any(|used| used.head == head), "queue {queue} is not served: {used:?}");
        }
        assert!(!self.needs_reset());
    }
}

/// What an attack does to one queue of a running device, before the device looks. Gives what the device may write to.
type OnRings = fn(&mut Driver, u16) -> Vec<Range<u64>>;

/// What must come of it when the device takes that chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    NeedsReset,
    Either,
}

use Then::{Either, NeedsReset as Broken};

const ON_RINGS: &[(&str, Then, OnRings)] = &[
    ("a head beyond the table", Broken, |driver, size| offered(driver, &[], size)),
    ("a head that is the largest number", Broken, |driver, _| offered(driver, &[], u16::MAX)),
    ("a next one beyond the table", Broken, |driver, size| {
        offered(driver, &[(ROOM.start, 16, NEXT, size)], 0)
    }),
    ("a loop of one", Broken, |driver, _| offered(driver, &[(ROOM.start, 16, NEXT, 0)], 0)),
    ("a loop of two, to be written", Broken, |driver, _| {
        offered(driver, &[(ROOM.start, 16, NEXT | WRITE, 1), (ROOM.start, 16, NEXT | WRITE, 0)], 0)
    }),
    ("a loop through buffers of no bytes", Broken, |driver, _| {
        offered(driver, &[(ROOM.start, 0, NEXT, 1), (0, 0, NEXT, 0)], 0)
    }),
    ("the greatest length", Broken, |driver, _| offered(driver, &[(ROOM.start, u32::MAX, 0, 0)], 0)),
    ("the greatest length, to be written", Broken, |driver, _| {
        offered(driver, &[(ROOM.start, u32::MAX, WRITE, 0)], 0)
    }),
    ("a buffer across the end of memory", Broken, |driver, _| {
        offered(driver, &[(ABOVE_4G + HIGH_BYTES - 8, 16, WRITE, 0)], 0)
    }),
    ("a buffer across the beginning of a hole", Broken, |driver, _| {
        offered(driver, &[(LOW_BYTES - 8, 16, WRITE, 0)], 0)
    }),
    ("a buffer across the end of a hole", Broken, |driver, _| {
        offered(driver, &[(ABOVE_4G - 8, 16, WRITE, 0)], 0)
    }),
    ("a buffer from one part of memory to the other", Broken, |driver, _| {
        offered(driver, &[(LOW_BYTES - 8, u32::MAX, WRITE, 0)], 0)
    }),
    ("a buffer in a hole", Broken, |driver, _| offered(driver, &[(LOW_BYTES + 4096, 16, 0, 0)], 0)),
    ("a buffer that ends at the last address", Broken, |driver, _| {
        offered(driver, &[(u64::MAX - 15, 16, WRITE, 0)], 0)
    }),
    ("a buffer beyond the last address", Broken, |driver, _| offered(driver, &[(u64::MAX, 16, WRITE, 0)], 0)),
    ("a good buffer and then a bad one", Broken, |driver, _| {
        offered(driver, &[(ROOM.start, 16, NEXT | WRITE, 1), (LOW_BYTES, 1, WRITE, 0)], 0)
    }),
    ("a readable buffer after a writable one", Broken, |driver, _| {
        offered(driver, &[(ROOM.start, 16, NEXT | WRITE, 1), (ROOM.start, 16, 0, 0)], 0)
    }),
    ("an indirect table outside memory", Broken, |driver, _| {
        offered(driver, &[(LOW_BYTES, 32, INDIRECT, 0)], 0)
    }),
    ("an indirect table across the end of memory", Broken, |driver, _| {
        indirect(driver, LOW_BYTES - 16, &[(ROOM.start, 16, NEXT | WRITE, 1)], 32, 0)
    }),
    ("an indirect table of no bytes", Broken, |driver, _| indirect(driver, ROOM.start, &[], 0, 0)),
    ("an indirect table of one byte too many", Broken, |driver, _| {
        indirect(driver, ROOM.start, &[(ROOM.end - 64, 16, WRITE, 0)], 17, 0)
    }),
    ("an indirect table of the greatest length", Broken, |driver, _| {
        indirect(driver, ROOM.start, &[(ROOM.end - 64, 16, NEXT, 0)], !15, 0)
    }),
    ("an indirect table with a next one", Broken, |driver, _| {
        indirect(driver, ROOM.start, &[(ROOM.end - 64, 16, WRITE, 0)], 16, NEXT)
    }),
    ("an indirect table in an indirect table", Broken, |driver, _| {
        indirect(driver, ROOM.start, &[(ROOM.start, 16, INDIRECT, 0)], 16, 0)
    }),
    ("a loop in an indirect table", Broken, |driver, _| {
        indirect(driver, ROOM.start, &[(ROOM.end - 64, 1, NEXT, 1), (ROOM.end - 64, 1, NEXT, 0)], 32, 0)
    }),
    ("a next one beyond its indirect table", Broken, |driver, _| {
        indirect(driver, ROOM.start, &[(ROOM.end - 64, 1, NEXT, 2)], 32, 0)
    }),
    ("an available index one too far ahead", Broken, |driver, size| {
        driver.set_avail_index(size + 1);
        Vec::new()
    }),
    ("an available index far ahead", Broken, |driver, _| {
        driver.set_avail_index(0x8000);
        Vec::new()
    }),
    ("an available index that goes back", Broken, |driver, _| {
        driver.set_avail_index(u16::MAX);
        Vec::new()
    }),
    ("a buffer of no bytes", Either, |driver, _| offered(driver, &[(ROOM.start, 0, 0, 0)], 0)),
    ("a buffer of no bytes, to be written", Either, |driver, _| {
        offered(driver, &[(u64::MAX, 0, WRITE, 0)], 0)
    }),
    ("one byte", Either, |driver, _| offered(driver, &[(ROOM.start, 1, 0, 0)], 0)),
    ("one byte, to be written", Either, |driver, _| offered(driver, &[(ROOM.start, 1, WRITE, 0)], 0)),
    ("one byte of each kind", Either, |driver, _| {
        offered(driver, &[(ROOM.start, 1, NEXT, 1), (ROOM.start + 16, 1, WRITE, 0)], 0)
    }),
    ("much to be read and nothing to be written", Either, |driver, _| {
        offered(driver, &[(ROOM.start, (ROOM.end - ROOM.start) as u32, 0, 0)], 0)
    }),
    ("much to be written and nothing to be read", Either, |driver, _| {
        offered(driver, &[(ROOM.start, (ROOM.end - ROOM.start) as u32, WRITE, 0)], 0)
    }),
    ("a chain as long as its queue, of single bytes to be read", Either, |driver, size| {
        offered(driver, &long(size, 0), 0)
    }),
    ("a chain as long as its queue, of single bytes to be written", Either, |driver, size| {
        offered(driver, &long(size, WRITE), 0)
    }),
    ("an indirect table of as many single bytes as may be", Either, |driver, _| {
        indirect(driver, ROOM.start, &long(1024, WRITE), 1024 * 16, 0)
    }),
    ("buffers that lie over one another", Either, |driver, _| {
        offered(
            driver,
            &[(ROOM.start, 4096, NEXT, 1), (ROOM.start, 4096, NEXT | WRITE, 2), (ROOM.start, 1, WRITE, 0)],
            0,
        )
    }),
    ("the same chain again and again", Either, |driver, _| {
        let room = offered(driver, &[(ROOM.start, 512, WRITE, 0)], 0);
        (0..7).for_each(|_| driver.offer(0));
        room
    }),
    ("the queue's own rings, to be written", Either, |driver, _| {
        let rings = driver.queue(0).save().desc_table;
        offered(driver, &[(rings, RING_BYTES as u32, WRITE, 0)], 0)
    }),
    ("the queue's own descriptors, to be read", Either, |driver, _| {
        let table = driver.queue(0).save().desc_table;
        offered(driver, &[(table, 4096, NEXT, 1), (ROOM.start, 512, WRITE, 0)], 0)
    }),
    ("descriptors of chance", Either, |driver, size| {
        let mut chance = Chance(u64::from(size) << 20 | driver.queue(0).save().desc_table);
        for index in 0..size {
            let address = ROOM.start + chance.below(ROOM.end - ROOM.start);
            let len = chance.below((ROOM.end - address).min(5000)) as u32;
            // Rarely nothing that could be.
            let (address, len) =
                if chance.below(20) == 0 { (chance.next(), u32::MAX) } else { (address, len) };
            let flags = chance.below(4) as u16;
            let next = chance.below(u64::from(size) + 2) as u16;
            driver.set_descriptor(index, Descriptor::new(address, len, flags, next));
        }
        (0..size).for_each(|_| driver.offer(chance.below(u64::from(size) + 1) as u16));
        vec![ROOM]
    }),
];

/// (address, length, flags, next)
type Raw = (u64, u32, u16, u16);

/// Sets descriptors from the first on and makes the chain at `head` available. Gives what is for writing in them.
fn offered(driver: &mut Driver, descriptors: &[Raw], head: u16) -> Vec<Range<u64>> {
    for (index, &(address, len, flags, next)) in (0..).zip(descriptors) {
        driver.set_descriptor(index, Descriptor::new(address, len, flags, next));
    }
    driver.offer(head);
    for_writing(descriptors)
}

/// Puts `descriptors` at `table`, of which a length of `len` bytes is said.
fn indirect(driver: &mut Driver, table: u64, descriptors: &[Raw], len: u32, flags: u16) -> Vec<Range<u64>> {
    for (index, &(address, len, flags, next)) in (0..).zip(descriptors) {
        driver.set_descriptor_at(table + 16 * index, Descriptor::new(address, len, flags, next));
    }
    offered(driver, &[(table, len, INDIRECT | flags, 1)], 0);
    for_writing(descriptors)
}

fn for_writing(descriptors: &[Raw]) -> Vec<Range<u64>> {
    let writable = descriptors.iter().filter(|(_, _, flags, _)| flags & WRITE != 0);
    writable.map(|&(address, len, ..)| address..address.saturating_add(len.into())).collect()
}

/// A chain of so many single bytes, behind any table at the beginning of the room.
fn long(count: u16, flags: u16) -> Vec<Raw> {
    let place = |index: u16| ROOM.start + 0x8000 + 16 * u64::from(index);
    let next = |index: u16| if index + 1 < count { (NEXT, index + 1) } else { (0, 0) };
    (0..count).map(|index| (place(index), 1, flags | next(index).0, next(index).1)).collect()
}

/// Numbers that are the same in each run (Marsaglia's xorshift).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

/// Registers in a state in which they must not be written, or with values that they must not have. Whatever comes of it, a
/// reset undoes it.
type OnRegisters = fn(&mut Machine);

const ON_REGISTERS: &[(&str, OnRegisters)] = &[
    ("a running device's queues are set up anew", |machine| {
        machine.start();
        for queue in 0..machine.sizes.len() {
            machine.registers.set(Queue, queue as u64);
            machine.registers.set(Enable, 0);
            machine.set_up(queue, 2, [ROOM.start, ROOM.start + 0x1000, ROOM.start + 0x2000]);
            machine.registers.set(Queue, queue as u64);
            assert_eq!(machine.registers.get(Enable), 1);
        }
        // Nothing of it has happened.
        machine.assert_works();
        machine.provoke_within(&[]);
    }),
    ("a running device's features and status are changed", |machine| {
        machine.start();
        machine.take(u64::MAX);
        machine.registers.set(Status, u64::from(ACKNOWLEDGE));
        assert_eq!(machine.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK, "bits are only added");
        machine.assert_works();
        machine.add_status(FAILED);
        machine.provoke_within(&[]);
    }),
    ("queues before features are agreed on", |machine| {
        machine.start();
        machine.reset();
        machine.add_status(ACKNOWLEDGE | DRIVER);
        for queue in 0..machine.sizes.len() {
            machine.set_up(queue, machine.sizes[queue], machine.rings(queue));
            machine.registers.set(Queue, queue as u64);
            assert_eq!(machine.registers.get(Enable), 0);
        }
        machine.provoke_within(&[]);
    }),
    ("a start without features", |machine| {
        machine.start();
        machine.reset();
        assert_eq!(machine.add_status(ACKNOWLEDGE | DRIVER | DRIVER_OK), ACKNOWLEDGE | DRIVER);
        machine.provoke_within(&[]);
    }),
    ("features that are not offered, and too few", |machine| {
        machine.start();
        for features in [u64::MAX, VERSION_1 | 1 << 60, 0, EVENT_IDX] {
            machine.reset();
            machine.add_status(ACKNOWLEDGE | DRIVER);
            machine.take(features);
            assert_eq!(machine.add_status(FEATURES_OK | DRIVER_OK), ACKNOWLEDGE | DRIVER, "{features:#x}");
            machine.provoke_within(&[]);
        }
    }),
    ("a start without any queue", |machine| {
        machine.agree();
        machine.add_status(DRIVER_OK);
        machine.provoke_within(&[]);
        machine.provoke_within(&[]);
    }),
    ("a start with one queue of all", |machine| {
        for queue in 0..machine.sizes.len() {
            machine.agree();
            machine.set_up(queue, machine.sizes[queue], machine.rings(queue));
            machine.add_status(DRIVER_OK);
            let room = offered(&mut machine.drivers[queue], &[(ROOM.start, 64, WRITE, 0)], 0);
            machine.provoke_within(&room);
        }
    }),
    ("sizes that no queue has", |machine| {
        for size in [0, 3, 1 << 15, u16::MAX] {
            machine.agree();
            for queue in 0..machine.sizes.len() {
                machine.set_up(queue, size, machine.rings(queue));
            }
            machine.add_status(DRIVER_OK);
            // A device may have kept its own size.
            machine.provoke_within(&[]);
        }
    }),
    ("the smallest queues", |machine| {
        machine.agree();
        for queue in 0..machine.sizes.len() {
            machine.set_up(queue, 1, machine.rings(queue));
        }
        machine.add_status(DRIVER_OK);
        for _ in 0..3 {
            for queue in 0..machine.sizes.len() {
                offered(&mut machine.drivers[queue], &[(ROOM.start, 64, WRITE, 0)], 0);
            }
            machine.provoke_within(&[ROOM]);
        }
    }),
    ("rings that are not in memory", |machine| {
        let places = [LOW_BYTES, LOW_BYTES - 16, ABOVE_4G - 16, ABOVE_4G + HIGH_BYTES - 16, !15, 1];
        for place in places {
            for ring in 0..3 {
                machine.agree();
                for queue in 0..machine.sizes.len() {
                    let mut rings = machine.rings(queue);
                    rings[ring] = place;
                    machine.set_up(queue, machine.sizes[queue], rings);
                }
                machine.add_status(DRIVER_OK);
                for driver in &mut machine.drivers {
                    offered(driver, &[(ROOM.start, 64, WRITE, 0)], 0);
                }
                // A part of it may be there, and the rest not.
                let used = if ring == 2 { place..place.saturating_add(RING_BYTES) } else { 0..0 };
                machine.provoke_within(&[ROOM, used]);
                assert!(machine.status() & DRIVER_OK != 0);
            }
        }
    }),
    ("rings that lie over one another", |machine| {
        for order in [[0, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1]] {
            machine.agree();
            let at = |place: u64| ROOM.start + 0x4000 * place;
            for queue in 0..machine.sizes.len() {
                machine.set_up(queue, machine.sizes[queue], order.map(at));
            }
            machine.add_status(DRIVER_OK);
            machine.provoke_within(&[ROOM]);
            machine.provoke_within(&[ROOM]);
        }
    }),
    ("rings that are another queue's", |machine| {
        machine.agree();
        for queue in 0..machine.sizes.len() {
            machine.set_up(queue, machine.sizes[queue], machine.rings(0));
        }
        machine.add_status(DRIVER_OK);
        let room = offered(&mut machine.drivers[0], &[(ROOM.start, 64, WRITE, 0)], 0);
        machine.provoke_within(&room);
    }),
    ("queues that there are not", |machine| {
        machine.start();
        for queue in [machine.sizes.len() as u64, 0x7fff, 0xffff] {
            machine.registers.notify(queue as u32);
            machine.registers.set(Queue, queue);
            assert_eq!(machine.registers.get(Enable), 0);
        }
        machine.registers.notify(u32::MAX);
        machine.assert_works();
        machine.agree();
        for queue in machine.sizes.len()..machine.sizes.len() + 3 {
            machine.set_up(queue, 16, [ROOM.start, ROOM.start + 0x1000, ROOM.start + 0x2000]);
        }
        machine.add_status(DRIVER_OK);
        machine.provoke_within(&[]);
    }),
    ("kicks before the start", |machine| {
        machine.agree();
        for queue in 0..machine.sizes.len() {
            machine.set_up(queue, machine.sizes[queue], machine.rings(queue));
            offered(&mut machine.drivers[queue], &[(ROOM.start, 64, WRITE, 0)], 0);
        }
        machine.provoke_within(&[]);
        let untouched = machine.image();
        machine.registers.set(Status, 0);
        machine.provoke();
        assert!(machine.image() == untouched, "it never ran");
    }),
    ("a reset in the middle of requests", |machine| {
        for _ in 0..20 {
            machine.start();
            for (queue, request) in machine.subject.requests.clone() {
                let driver = &mut machine.drivers[queue];
                while driver.free_descriptors() > 8 {
                    let buffers = request(driver);
                    driver.add(&buffers);
                    if buffers[0].address > RINGS + RING_BYTES * (queue as u64 + 1) - 0x2000 {
                        break;
                    }
                }
                machine.registers.notify(queue as u32);
            }
            (machine.subject.stir)();
            machine.host.run(1);
            machine.reset();
            let then = machine.image();
            machine.provoke();
            assert!(machine.image() == then, "after its reset a device writes nothing");
        }
    }),
    ("a configuration space read and written in every way", |machine| {
        machine.start();
        let config = machine.registers.config();
        let end = machine.registers.end();
        for width in [1, 2, 3, 4, 5, 8] {
            for offset in (config..config + 80).chain(end - 16..end - 8) {
                let mut data = [0; 8];
                machine.registers.read(offset, &mut data[..width]);
                for value in [0xff, 0, 1, 0x80] {
                    machine.registers.write(offset, &[value; 8][..width]);
                }
            }
            machine.provoke_within(&[]);
        }
    }),
    ("writes of chance to any register", |machine| {
        let mut chance = Chance(0x1234_5678_9abc_def1);
        let end = machine.registers.end();
        for round in 0..40 {
            // Every second time, after a good beginning.
            if round % 2 == 0 {
                machine.agree();
            }
            for _ in 0..100 {
                let width = [1, 2, 4, 8][chance.below(4) as usize];
                // Most of them where registers are.
                let reach = if chance.below(4) == 0 { end - 8 } else { 0x100 };
                let value = match chance.below(4) {
                    0 => chance.next(),
                    1 => ROOM.start + (chance.below(ROOM.end - ROOM.start) & !0xf),
                    _ => chance.below(16),
                };
                machine.registers.write(chance.below(reach), &value.to_le_bytes()[..width]);
                if chance.below(8) == 0 {
                    (machine.subject.stir)();
                    // It may have been told to spin, by rings that change while they are looked at.
                    machine.host.run(20);
                }
            }
        }
    }),
];

/// Names what is tried, so that a failure says it.
fn each(of: impl Fn(&str, MakeDevice, MakeRegisters, u64)) {
    for (device, make) in DEVICES {
        for (transport, registers) in TRANSPORTS {
            for features in [u64::MAX, VERSION_1] {
                of(
                    &format!("{device} on {transport} with features {features:#x}"),
                    *make,
                    *registers,
                    features,
                );
            }
        }
    }
}

/// Whose failure it is, on the test's output.
fn told<T>(name: &str, run: impl FnOnce() -> T) -> T {
    struct Told<'a>(&'a str);
    impl Drop for Told<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("it was: {}", self.0);
            }
        }
    }
    let told = Told(name);
    let done = run();
    drop(told);
    done
}

#[test]
fn every_device_works_before_anything_is_tried() {
    each(|name, device, transport, features| {
        told(name, || {
            let mut machine = Machine::new(device, transport, features);
            for _ in 0..3 {
                machine.start();
                machine.assert_works();
            }
        });
    });
}

#[test]
fn no_chain_and_no_ring_makes_a_device_do_what_it_must_not() {
    each(|name, device, transport, features| {
        let mut machine = Machine::new(device, transport, features);
        let served: Vec<usize> = machine.subject.requests.iter().map(|(queue, _)| *queue).collect();
        for (attack, then, act) in ON_RINGS {
            for queue in 0..machine.sizes.len() {
                told(&format!("{attack}, in queue {queue} of {name}"), || {
                    machine.start();
                    let size = machine.sizes[queue];
                    let offered = act(&mut machine.drivers[queue], size);
                    machine.provoke_within(&offered);
                    let broken = machine.needs_reset();
                    let may_go_on = *then == Either || machine.subject.passes_chains_on;
                    assert!(broken || may_go_on || !served.contains(&queue), "it went on");
                    if broken {
                        // Nothing is served until the reset, whatever comes.
                        machine.drivers.iter_mut().for_each(|driver| driver.offer(0));
                        let before = machine.image();
                        machine.provoke();
                        assert!(machine.image() == before, "a broken device writes nothing");
                    }
                    machine.start();
                    machine.assert_works();
                });
            }
        }
    });
}

#[test]
fn no_register_makes_a_device_do_what_it_must_not() {
    each(|name, device, transport, features| {
        for (attack, act) in ON_REGISTERS {
            told(&format!("{attack}, of {name}"), || {
                let mut machine = Machine::new(device, transport, features);
                act(&mut machine);
                machine.start();
                machine.assert_works();
            });
        }
    });
}
