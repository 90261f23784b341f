//! A virtio device under a hostile driver: descriptors, rings and buffers of any kind in any order, in between stopped,
//! saved and built again.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use devices::backend::direct;
use devices::backend::rate_limiter::{Bucket, Limits};
use devices::backend::tap::Tap;
use devices::memory::Memory;
use devices::virtio::balloon::{self, Balloon, Ram};
use devices::backend::disk::Format;
use devices::virtio::blk::{self, Blk, Cache, Engine};
use devices::virtio::console::{self, Console, Size};
use devices::virtio::device::{DeviceState, VirtioDevice};
use devices::virtio::mem::{self, Mem};
use devices::virtio::net::{self, Net};
use devices::virtio::pmem::{self, Pmem};
use devices::virtio::queue::Queue;
use devices::virtio::rng::{self, Rng};
use devices::virtio::testing::{self, Buffer, Driver, EVENT_IDX, Lent, Slot, Trouble};
use devices::virtio::vsock;
use devices::virtio::vsock::packet::{HEADER_BYTES, HOST_CID, Header, TYPE_STREAM};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::input::Input;
use crate::vsock::GUEST_CID;

/// Small, so that addresses meet; the rings are at its beginning.
const RAM: usize = 1 << 16;
const RINGS: u64 = 0x100;
const RING_BYTES: u64 = 0x400;
const QUEUE_SIZE: u16 = 16;
/// Turns a device gets at a time; it may have more to do then.
const TURNS: usize = 8;
const DISK_BYTES: u64 = 1 << 15;
/// Where the parts of a block request lie.
const HEADER: u64 = 0x2000;
const DATA: u64 = 0x3000;
const STATUS: u64 = 0x2100;
/// A memory device's region, right above RAM, with blocks of a page.
const REGION: u64 = RAM as u64;
const BLOCKS: u64 = 16;
const BLOCK: u64 = 0x1000;
const SLOT: u64 = 4 * BLOCK;

pub fn blk_request(data: &[u8]) {
    crate::log_to_nowhere();
    thread_local! {
        static DISK: RefCell<File> = RefCell::new(tempfile::tempfile().unwrap());
    }
    DISK.with_borrow_mut(|disk| {
        disk.set_len(0).unwrap();
        disk.set_len(DISK_BYTES).unwrap();
        disk.write_all_at(b"the first sector", 0).unwrap();
        let flags = data.first().copied().unwrap_or(0);
        drive(data.get(1..).unwrap_or_default(), |state| new_blk(disk, flags, state), |_| {});
        assert_eq!(disk.metadata().unwrap().len(), DISK_BYTES, "no request changes the size of the disk");
    });
}

fn new_blk(disk: &File, flags: u8, state: Option<DeviceState>) -> Blk {
    // Opened anew: what it is open for is that of all who share it.
    let path = format!("/proc/self/fd/{}", disk.as_raw_fd());
    let file = File::options().read(true).write(true).open(path).unwrap();
    if flags & 64 != 0 {
        direct::enable(&file).unwrap();
    }
    let config = blk::Config {
        file,
        format: Format::Raw,
        read_only: flags & 1 != 0,
        cache: match flags & (2 | 128) {
            0 => Cache::Writeback,
            2 => Cache::Unsafe,
            _ => Cache::Writethrough,
        },
        engine: if flags & 16 != 0 { Engine::Async } else { Engine::Sync },
        queues: if flags & 32 != 0 { 2 } else { 1 },
        serial: "fuzz".into(),
        limits: limits(flags),
    };
    let state = state.map(|state| match state {
        DeviceState::Block(state) => state,
        other => panic!("{other:?}"),
    });
    Blk::new(config, state).unwrap()
}

pub fn rng(data: &[u8]) {
    crate::log_to_nowhere();
    let flags = data.first().copied().unwrap_or(0);
    drive(
        data.get(1..).unwrap_or_default(),
        |state| {
            let state = state.map(|state| match state {
                DeviceState::Entropy(state) => state,
                other => panic!("{other:?}"),
            });
            Rng::new(rng::Config { limits: limits(flags) }, state).unwrap()
        },
        |_| {},
    );
}

/// None, or such that a few requests pass in each millisecond.
fn limits(flags: u8) -> Limits {
    let bucket = |size| Some(Bucket { size, one_time_burst: size, refill_ms: 1 });
    Limits { bandwidth: bucket(1024).filter(|_| flags & 4 != 0), ops: bucket(3).filter(|_| flags & 8 != 0) }
}

pub fn console(data: &[u8]) {
    crate::log_to_nowhere();
    let flags = data.first().copied().unwrap_or(0);
    // Input that is always readable, or typed in advance and then at its end.
    let input = || if flags & 1 != 0 { keyboard() } else { File::open("/dev/zero").unwrap().into() };
    let several = flags & 2 != 0;
    let port = |name: &str, size| console::PortConfig {
        name: name.into(),
        size,
        input: Some(input()),
        output: Box::new(Moody(0)),
        limits: limits(flags),
    };
    let size = Size { columns: 80, rows: 25 };
    drive_with(
        data.get(1..).unwrap_or_default(),
        if several { MULTIPORT } else { 0 },
        |state| {
            let config = console::Config {
                input: Some(input()),
                output: Box::new(Moody(0)),
                size,
                limits: limits(flags),
                ports: if several {
                    vec![port("second", Some(size)), port("stream", None)]
                } else {
                    Vec::new()
                },
            };
            let state = state.map(|state| match state {
                DeviceState::Console(state) => state,
                other => panic!("{other:?}"),
            });
            Console::new(config, state).unwrap()
        },
        |console, number| console.resize(usize::from(number % 4), Size { columns: number.into(), rows: 1 }),
    );
}

/// VIRTIO_CONSOLE_F_MULTIPORT
const MULTIPORT: u64 = 1 << 1;

fn keyboard() -> OwnedFd {
    let (reader, mut writer) = io::pipe().unwrap();
    writer.write_all(&[b'k'; 100]).unwrap();
    reader.into()
}

/// The sizes of the packets that wait in each queue of the tap.
const PACKETS: [usize; 9] = [60, 0, 11, 12, 72, 1526, 300, 9000, 66_000];

pub fn net(data: &[u8]) {
    crate::log_to_nowhere();
    let flags = data.first().copied().unwrap_or(0);
    let pairs = if flags & 2 != 0 { 2 } else { 1 };
    // The other ends, so that they live as long as their device.
    let wires = RefCell::new(Vec::new());
    let new = |state| {
        let (tap, ends) = Tap::fake(pairs);
        for end in &ends {
            PACKETS.iter().for_each(|bytes| _ = end.send(&vec![0; *bytes]));
        }
        *wires.borrow_mut() = ends;
        new_net(tap, flags, state)
    };
    let mergeable = 1 << 15;
    let features = new(None).identity().features & !if flags & 1 != 0 { 0 } else { mergeable };
    drive_with(data.get(1..).unwrap_or_default(), features & !EVENT_IDX, new, |_, _| {});
}

fn new_net(tap: Tap, flags: u8, state: Option<DeviceState>) -> Net {
    let config = net::Config {
        tap,
        mac: Some([2, 0, 0, 0, 0, 1]),
        mtu: Some(1500),
        receive_limits: limits(flags),
        transmit_limits: limits(flags),
        neighbour: (flags & 16 != 0).then(|| Box::new(crate::metadata::stack(flags)) as _),
        vhost: Vec::new(),
        room: None,
    };
    let state = state.map(|state| match state {
        DeviceState::Network(state) => state,
        other => panic!("{other:?}"),
    });
    Net::new(config, state).unwrap()
}

pub fn pmem(data: &[u8]) {
    crate::log_to_nowhere();
    let flags = data.first().copied().unwrap_or(0);
    let file = tempfile::tempfile().unwrap();
    drive(
        data.get(1..).unwrap_or_default(),
        |state| {
            let config = pmem::Config {
                name: String::new(),
                file: file.try_clone().unwrap(),
                range: 0..0,
                limits: limits(flags),
            };
            let state = state.map(|state| match state {
                DeviceState::PersistentMemory(state) => state,
                other => panic!("{other:?}"),
            });
            Pmem::new(config, state).unwrap()
        },
        |_| {},
    );
}

/// The upper part of memory is no RAM to it. The driver agrees on what the first byte says.
pub fn balloon(data: &[u8]) {
    crate::log_to_nowhere();
    let flags = data.first().copied().unwrap_or(0);
    let new = |state: Option<DeviceState>| {
        let config = balloon::Config {
            target_pages: 4,
            deflate_on_oom: true,
            statistics_interval: Some(Duration::from_secs(3600)),
            hinting: true,
            reporting: true,
            ram: Ram { regions: vec![0x2000..0xc000], page: balloon::PAGE << (flags >> 6) },
        };
        let state = state.map(|state| match state {
            DeviceState::Balloon(state) => state,
            other => panic!("{other:?}"),
        });
        Balloon::new(config, state).unwrap()
    };
    // The feature bits are 1 to 5.
    let features = new(None).identity().features & u64::from(flags & 0x3e);
    drive_with(data.get(1..).unwrap_or_default(), features, new, |balloon, ask| match ask % 6 {
        0 => balloon.set_target(ask.into()),
        1 => _ = balloon.start_hinting(ask & 0x80 != 0),
        2 => _ = balloon.stop_hinting(),
        // At once: time is nothing to repeat a run by.
        3 => balloon.set_statistics_interval(Duration::from_nanos(1)),
        4 => balloon.set_statistics_interval(Duration::from_secs(3600)),
        _ => _ = (balloon.pages(), balloon.hinting(), balloon.statistics().clone()),
    });
}

/// The region is right above RAM, so that buffers reach into it. What is plugged is always in a slot that is in.
pub fn mem(data: &[u8]) {
    crate::log_to_nowhere();
    let memory = testing::ram(RAM);
    let region = REGION..REGION + BLOCKS * BLOCK;
    let trouble = RefCell::new(Arc::<Trouble>::default());
    let slots = || (region.start..region.end).step_by(SLOT as usize).map(GuestAddress);
    let new = |state: Option<DeviceState>| {
        // Another process: none of the slots has come along.
        for slot in slots() {
            if let Ok((without, _)) = memory.memory().remove_region(slot, SLOT) {
                memory.lock().unwrap().replace(without);
            }
        }
        let lent = Lent::new(&memory, &region, SLOT);
        *trouble.borrow_mut() = lent.trouble.clone();
        let config = mem::Config {
            region: region.clone(),
            slot_size: SLOT,
            block_size: BLOCK,
            page: BLOCK,
            memory: memory.clone(),
            backing: Box::new(lent),
        };
        let state = state.map(|state| match state {
            DeviceState::Memory(state) => state,
            other => panic!("{other:?}"),
        });
        Mem::new(config, state).unwrap()
    };
    let outside = |device: &mut Mem, ask: u8| {
        let there = |what: &AtomicBool| what.store(ask & 1 != 0, Ordering::SeqCst);
        match ask >> 5 {
            0..3 => device.set_requested(u64::from(ask) % (BLOCKS + 1) * BLOCK),
            3 => there(&trouble.borrow().bring_in),
            4 => there(&trouble.borrow().take_out),
            5 => there(&trouble.borrow().reserve),
            _ => {
                let reached = slots().filter(|slot| memory.memory().address_in_range(*slot)).count() as u64;
                assert!(device.plugged() <= reached * SLOT);
            }
        }
    };
    drive_on(memory.clone(), data, mem::F_UNPLUGGED_INACCESSIBLE, new, outside);
}

/// A writer that takes a little, or fails in one of its ways.
struct Moody(usize);

impl Write for Moody {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += 1;
        match self.0 % 4 {
            0 => Err(ErrorKind::WouldBlock.into()),
            1 => Err(ErrorKind::BrokenPipe.into()),
            mood => Ok(bytes.len().min(mood * 100)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Drives a device as `data` says; `outside` is what happens on its other side, by a number.
pub fn drive<D: VirtioDevice>(
    data: &[u8],
    new: impl Fn(Option<DeviceState>) -> D,
    mut outside: impl FnMut(u8),
) {
    drive_with(data, 0, new, |_, number| outside(number));
}

/// The driver agrees on `features`, and as the first byte says on event indices.
fn drive_with<D: VirtioDevice>(
    data: &[u8],
    features: u64,
    new: impl Fn(Option<DeviceState>) -> D,
    outside: impl FnMut(&mut D, u8),
) {
    drive_on(testing::ram(RAM), data, features, new, outside);
}

/// With this memory.
fn drive_on<D: VirtioDevice>(
    memory: Memory,
    data: &[u8],
    features: u64,
    new: impl Fn(Option<DeviceState>) -> D,
    mut outside: impl FnMut(&mut D, u8),
) {
    let mut input = Input::new(data);
    let features = features | if input.u8().unwrap_or(0) & 1 != 0 { EVENT_IDX } else { 0 };
    let device = new(None);
    let queues = device.identity().queue_sizes.len();
    let mut machine = Machine { slot: Slot::new(device, &memory), drivers: Vec::new(), features, memory };
    machine.plug_in(queues);
    while machine.step(&mut input, &new, &mut outside).is_some() {}
    machine.slot.stop();
}

struct Machine<D: VirtioDevice> {
    slot: Slot<D>,
    drivers: Vec<Driver>,
    features: u64,
    memory: Memory,
}

impl<D: VirtioDevice> Machine<D> {
    /// New drivers and queues, from the beginning.
    fn plug_in(&mut self, queues: usize) {
        let base = |index: u64| RINGS + RING_BYTES * index;
        self.drivers = (0..queues as u64)
            .map(|index| Driver::new(&self.memory, base(index), QUEUE_SIZE, self.features))
            .collect();
        let queues = (0..).zip(&self.drivers).map(|(index, driver)| driver.queue(index)).collect();
        self.slot.start(queues, self.features);
    }

    /// One thing that happens. `None` at the end of the input. `examples/seeds.rs` knows the numbers.
    fn step(
        &mut self,
        input: &mut Input,
        new: &impl Fn(Option<DeviceState>) -> D,
        outside: &mut impl FnMut(&mut D, u8),
    ) -> Option<()> {
        let operation = input.u8()?;
        let queue = usize::from(operation >> 4) % self.drivers.len();
        let driver = &mut self.drivers[queue];
        match operation & 0xf {
            0 => {
                let (index, address) = (input.u8()?, input.u32()?);
                let (len, flags, next) = (input.u32()?, input.u16()?, input.u16()?);
                let descriptor = Descriptor::new(address.into(), len, flags, next);
                driver.set_descriptor(u16::from(index) % QUEUE_SIZE, descriptor);
            }
            1 => {
                let address = GuestAddress(input.u16()?.into());
                self.memory.memory().write(input.bytes(64)?, address).ok();
            }
            2 => driver.offer(input.u16()? % (QUEUE_SIZE + 1)),
            3 => driver.set_avail_index(input.u16()?),
            4 => _ = self.slot.run(TURNS),
            5 => _ = driver.reap_all(),
            // A chain of buffers that may lie anywhere, with or without an indirect table.
            6 => {
                let mut buffers = Vec::new();
                for _ in 0..input.u8()? % 8 {
                    let (address, len) = (input.u16()?.into(), input.u16()?);
                    buffers.push(Buffer { address, len: (len & 0x7fff).into(), writable: len >> 15 != 0 });
                }
                if !buffers.is_empty() && driver.free_descriptors() >= buffers.len() {
                    driver.add(&buffers);
                }
            }
            7 => driver.kick.write(1).ok()?,
            8 => {
                let mut data = vec![0; usize::from(input.u8()? % 16)];
                let offset = input.u64()?;
                self.slot.device.config(offset, &mut data);
                self.slot.device.write_config(offset, &data);
            }
            9 => self.carry_on(new),
            10 => {
                let queues = self.slot.stop().len();
                self.slot.device.reset();
                self.plug_in(queues);
            }
            // A block request with all its parts, near the beginning or the end of the disk.
            11 => {
                let (kind, sector, sectors) = (input.u8()?, input.u8()? as i8, input.u8()?);
                let sector = if sector < 0 { DISK_BYTES / 512 } else { 0 }.wrapping_add_signed(sector.into());
                let header =
                    [&u32::from(kind % 16).to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
                let ranges = [&sector.to_le_bytes()[..], &u32::from(sectors).to_le_bytes(), &[0; 4]].concat();
                let data = match kind % 16 {
                    11 | 13 => 16,
                    _ => u32::from(sectors % 8) * 512,
                };
                self.memory.memory().write_slice(&header, GuestAddress(HEADER)).unwrap();
                self.memory.memory().write_slice(&ranges, GuestAddress(DATA)).unwrap();
                let buffers = [
                    Buffer { address: HEADER, len: 16, writable: false },
                    Buffer { address: DATA, len: data, writable: kind >> 7 != 0 },
                    Buffer { address: STATUS, len: 1, writable: true },
                ];
                if driver.free_descriptors() >= buffers.len() {
                    driver.add(&buffers);
                }
            }
            12 => outside(&mut self.slot.device, input.u8()?),
            // A packet of a socket, of one of a few ports, with a length that may be a lie.
            13 => {
                let (op, ports, len) = (input.u8()?, input.u8()?, input.u16()?);
                let (payload, flags, buf_alloc) = (input.u8()?, input.u8()?, input.u16()?);
                let header = Header {
                    src_cid: GUEST_CID,
                    dst_cid: HOST_CID,
                    src_port: u32::from(ports & 3),
                    dst_port: if ports & 4 != 0 { vsock::FIRST_HOST_PORT } else { 0 } + u32::from(ports >> 4),
                    len: if flags & 0x80 != 0 { len.into() } else { payload.into() },
                    kind: TYPE_STREAM,
                    op: (op & 15).into(),
                    flags: (flags & 3).into(),
                    buf_alloc: buf_alloc.into(),
                    fwd_cnt: (flags & 0x70).into(),
                };
                self.memory.memory().write_slice(&header.to_bytes(), GuestAddress(HEADER)).unwrap();
                let buffers = [
                    Buffer { address: HEADER, len: HEADER_BYTES as u32, writable: false },
                    Buffer { address: DATA, len: u32::from(payload) << (op >> 4 & 7), writable: false },
                ];
                if driver.free_descriptors() >= buffers.len() {
                    driver.add(&buffers);
                }
            }
            // A request to a memory device, at a block or beside one, answered in RAM or in the region.
            14 => {
                let (kind, first, blocks) = (input.u8()?, input.u8()?, input.u8()?);
                let block = u64::from(first) % (BLOCKS + 2);
                let address = (REGION + block * BLOCK - BLOCK).wrapping_add((first >> 7).into());
                let mut request = [0; 24];
                request[0] = kind & 7;
                request[8..16].copy_from_slice(&address.to_le_bytes());
                request[16] = blocks;
                self.memory.memory().write_slice(&request, GuestAddress(HEADER)).unwrap();
                let answer = if kind & 0x80 != 0 { REGION + u64::from(blocks) * 0x100 } else { STATUS };
                let buffers = [
                    Buffer { address: HEADER, len: 24, writable: false },
                    Buffer { address: answer, len: 10, writable: true },
                ];
                if driver.free_descriptors() >= buffers.len() {
                    driver.add(&buffers);
                }
            }
            _ => {}
        }
        Some(())
    }

    /// Stops, saves, builds again and starts.
    fn carry_on(&mut self, new: &impl Fn(Option<DeviceState>) -> D) {
        let queues: Vec<_> = self.slot.stop().iter().map(Queue::save).collect();
        let saved = self.slot.device.save();
        let bytes = postcard::to_stdvec(&saved).unwrap();
        let state: DeviceState = postcard::from_bytes(&bytes).unwrap();
        assert_eq!(state, saved);
        self.slot = Slot::new(new(Some(state)), &self.memory);
        let mut restored = Vec::new();
        for ((index, driver), state) in (0..).zip(&mut self.drivers).zip(&queues) {
            driver.kick = EventFd::new(EFD_NONBLOCK).unwrap();
            restored.push(Queue::restore(index, state, driver.kick.try_clone().unwrap()).unwrap());
        }
        self.slot.start(restored, self.features);
    }
}
