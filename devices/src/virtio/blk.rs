//! The block device (VIRTIO 1.3, section 5.2): reads, writes, flushes, discards and zeroes a [`Disk`] for its driver.
//!
//! Does not open files or know formats: the VMM hands over an open, raw disk. One queue. Write caching is configured, not
//! negotiated (no VIRTIO_BLK_F_CONFIG_WCE). The block size and topology are the driver's defaults and not offered: each
//! field would cost an exit at boot to say what is assumed anyway.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk as spec;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::Bytes;

use crate::backend::disk::{Disk, Extent, Operation};
use crate::backend::rate_limiter::{Limits, RateLimiter, RateLimiterState};
use crate::host::Source;
use crate::memory::GuestRam;
use crate::times::Times;
use crate::virtio::device::{
    Active, DeviceState, DeviceType, Identity, StartError, VirtioDevice, read_space,
};
use crate::virtio::queue::{Chain, Queue, QueueError, Segments};
use crate::virtio::running::{Running, Step, count};

/// The unit of every sector number, whatever the disk's own is (5.2.4).
pub const SECTOR_BYTES: u64 = 512;

/// A read of 1 MiB in scattered pages of 4 KiB fits into two requests, and both into one kick.
const QUEUE_SIZE: u16 = 256;
/// All of a chain but the header and the status: a chain is at most as long as its queue, indirect or not.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most bytes one request reads or writes: it is done in one go, while other devices and a pause of the machine wait. Far
/// beyond what drivers put into one: Linux has 1280 KiB.
const MAX_TRANSFER_BYTES: u32 = 64 << 20;
/// A file system's worth of free space in few requests, and still done at once: the host only changes its maps.
const MAX_DISCARD_SECTORS: u32 = ((1 << 30) / SECTOR_BYTES) as u32;
const MAX_DISCARD_SEGMENTS: u32 = 16;
/// Host file systems work in blocks of 4 KiB; smaller holes give nothing back.
const DISCARD_ALIGNMENT_SECTORS: u32 = 8;
/// Bounded more tightly, as some hosts can only do it by writing.
const MAX_WRITE_ZEROES_SECTORS: u32 = ((64 << 20) / SECTOR_BYTES) as u32;
const MAX_WRITE_ZEROES_SEGMENTS: u32 = 1;

/// What a block device is made of.
pub struct Config {
    /// A raw image or a block device, open for writing too unless `read_only`. A last part of less than a sector is not
    /// visible to the guest.
    pub file: File,
    pub read_only: bool,
    pub cache: Cache,
    /// What the guest sees as the disk's serial number; cut to 20 bytes.
    pub serial: String,
    pub limits: Limits,
}

/// What a flush means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Flushes are not offered: the host writes back when it likes, and a crash of the host may lose what the guest
    /// believes written.
    Unsafe,
    /// A flush puts everything on stable storage. For a driver that does not know flushes, every write does.
    Writeback,
}

/// The block device.
pub struct Blk {
    worker: Worker,
    /// The driver has to hear that the capacity is another one than it has read.
    resized: bool,
    running: Option<Running>,
}

impl Blk {
    /// A stopped device. With a state, the one that was saved; if the disk's size has changed since, its driver is told.
    pub fn new(config: Config, state: Option<State>) -> io::Result<Blk> {
        let Config { file, read_only, cache, serial, limits } = config;
        let disk = Disk::new(file)?;
        let worker = Worker {
            read_only,
            cache,
            serial: serial_bytes(&serial),
            counters: Arc::default(),
            limiter: RateLimiter::new(limits, state.as_ref().map(|state| &state.limiter))?,
            write_through: false,
            disk,
        };
        worker.warn_of_odd_size();
        let resized = state.is_some_and(|state| state.sectors != worker.sectors());
        Ok(Blk { worker, resized, running: None })
    }

    /// What the device has done since it was built.
    pub fn counters(&self) -> Arc<Counters> {
        self.worker.counters.clone()
    }

    /// Another file from now on, running or not; opened as the first one was. The driver is told and reads the new
    /// capacity. On an error the old file stays.
    pub fn replace(&mut self, file: File) -> io::Result<()> {
        self.worker.disk = Disk::new(file).inspect_err(|_| count(&self.worker.counters.update_fails, 1))?;
        count(&self.worker.counters.update_count, 1);
        self.worker.warn_of_odd_size();
        self.resized = true;
        self.announce();
        Ok(())
    }

    /// Other limits from now on, running or not.
    pub fn set_limits(&mut self, limits: Limits) {
        self.worker.limiter.set_limits(limits);
    }

    fn announce(&mut self) {
        if let Some(running) = &self.running
            && std::mem::take(&mut self.resized)
        {
            running.interrupt.config();
        }
    }
}

impl VirtioDevice for Blk {
    fn identity(&self) -> Identity {
        let writable = [spec::VIRTIO_BLK_F_DISCARD, spec::VIRTIO_BLK_F_WRITE_ZEROES];
        let mut bits = vec![spec::VIRTIO_BLK_F_SEG_MAX, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX];
        bits.extend(if self.worker.read_only { &[spec::VIRTIO_BLK_F_RO][..] } else { &writable });
        bits.extend((self.worker.cache == Cache::Writeback).then_some(spec::VIRTIO_BLK_F_FLUSH));
        let features = bits.into_iter().map(|bit| 1 << bit).sum();
        Identity { device_type: DeviceType::Block, features, queue_sizes: vec![QUEUE_SIZE] }
    }

    fn config(&self, offset: u64, data: &mut [u8]) {
        read_space(&config_space(self.worker.sectors()), offset, data);
    }

    fn start(&mut self, active: Active) -> Result<Vec<Source>, StartError> {
        let knows_flush = active.features & (1 << spec::VIRTIO_BLK_F_FLUSH) != 0;
        let (running, mut sources) = Running::start(active, 1)?;
        sources.push(Source { fd: self.worker.limiter.fd(), token: TIMER });
        self.worker.write_through = self.worker.cache == Cache::Writeback && !knows_flush;
        self.running = Some(running);
        self.announce();
        Ok(sources)
    }

    fn handle(&mut self, token: u32) {
        let Some(running) = &mut self.running else { return };
        if token == TIMER {
            self.worker.limiter.clear();
            count(&self.worker.counters.rate_limiter_event_count, 1);
        } else {
            count(&self.worker.counters.queue_event_count, 1);
        }
        running.serve(QUEUE, |memory, chain| self.worker.request(memory, chain));
    }

    fn stop(&mut self) -> Vec<Queue> {
        // Nothing is in flight: a request is done before `handle` returns.
        self.running.take().map(Running::stop).unwrap_or_default()
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(State { limiter: self.worker.limiter.save(), sectors: self.worker.sectors() })
    }
}

/// [`Blk`] as it is saved. What the driver asked for is in its queue, the content is on the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    limiter: RateLimiterState,
    sectors: u64,
}

/// What a block device has done since it was built.
#[derive(Debug, Default)]
pub struct Counters {
    /// Kicks taken in, and turns the device gave itself.
    pub queue_event_count: AtomicU64,
    pub rate_limiter_event_count: AtomicU64,
    /// Requests that were found waiting for the rate limiter.
    pub rate_limiter_throttled_events: AtomicU64,
    pub read_count: AtomicU64,
    pub read_bytes: AtomicU64,
    pub read_time: Times,
    pub write_count: AtomicU64,
    pub write_bytes: AtomicU64,
    pub write_time: Times,
    pub flush_count: AtomicU64,
    pub discard_count: AtomicU64,
    pub write_zeroes_count: AtomicU64,
    /// Requests that break the rules or name what is not there: the driver's fault.
    pub invalid_reqs_count: AtomicU64,
    /// Requests that the host could not do.
    pub execute_fails: AtomicU64,
    /// Changes of the backing file.
    pub update_count: AtomicU64,
    pub update_fails: AtomicU64,
}

const QUEUE: u16 = 0;
/// The token of the rate limiter's timer; queues have their index.
const TIMER: u32 = 1;

const HEADER_BYTES: usize = 16;
/// One range of a discard or of zeroes.
const RANGE_BYTES: usize = 16;
const ID_BYTES: usize = spec::VIRTIO_BLK_ID_BYTES as usize;

/// A request whose every field has been checked.
#[derive(Debug, PartialEq, Eq)]
enum Request {
    Disk(Operation),
    Id(Segments),
}

/// Why a request is answered with a status other than OK.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// A type or flag that was not offered.
    #[error("request type or flag {0:#x} is not supported")]
    Unsupported(u32),
    #[error("the driver's request {0}")]
    Driver(&'static str),
    #[error("{0}")]
    Host(#[from] io::Error),
}

/// What serves requests; the device is its shell.
struct Worker {
    disk: Disk,
    read_only: bool,
    cache: Cache,
    serial: [u8; ID_BYTES],
    /// This driver knows no flushes, so a write has to be stable when it is done.
    write_through: bool,
    limiter: RateLimiter,
    counters: Arc<Counters>,
}

impl Worker {
    /// Serves one request. Its status is written whatever happens; only where there is no room for one is it an error.
    fn request(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<Step, QueueError> {
        let status_at = chain.writable.take_last_byte().ok_or(QueueError::Short { needed: 1, left: 0 })?;
        let room = chain.writable.bytes();
        let request = self.parse(memory, chain);
        if !self.limiter.take(request.as_ref().map_or(0, Request::bytes)) {
            count(&self.counters.rate_limiter_throttled_events, 1);
            return Ok(Step::Later);
        }
        let result = request.and_then(|request| self.perform(memory, request));
        let status = match &result {
            Ok(_) => spec::VIRTIO_BLK_S_OK,
            Err(Failure::Unsupported(_)) => spec::VIRTIO_BLK_S_UNSUPP,
            Err(_) => spec::VIRTIO_BLK_S_IOERR,
        };
        let gone = QueueError::Buffer { address: status_at.0, len: 1 };
        memory.write_obj(status as u8, status_at).map_err(|_| gone)?;
        let written = result.unwrap_or_else(|failure| {
            self.complain(&failure);
            0
        });
        // What is used is counted from the front (2.7.8.2): the status, at the end, only if all before it is filled.
        Ok(Step::Used(if written == room { written + 1 } else { written }))
    }

    /// Takes the request out of its chain, from which the status byte is already cut (5.2.6).
    fn parse(&self, memory: &GuestRam, chain: &mut Chain) -> Result<Request, Failure> {
        let mut header = [0; HEADER_BYTES];
        chain.readable.read(memory, &mut header).map_err(|_| Failure::Driver("has no header"))?;
        let (kind, sector) = (u32_at(&header, 0), u64_at(&header, 8));
        let (readable, writable) = (&mut chain.readable, &mut chain.writable);
        let operation = match kind {
            spec::VIRTIO_BLK_T_IN => {
                expect_none(readable)?;
                let offset = self.offset(sector, writable.bytes())?;
                Operation::Read { offset, buffers: std::mem::take(writable) }
            }
            spec::VIRTIO_BLK_T_OUT => {
                self.expect_writable()?;
                expect_none(writable)?;
                let offset = self.offset(sector, readable.bytes())?;
                Operation::Write { offset, buffers: std::mem::take(readable) }
            }
            spec::VIRTIO_BLK_T_FLUSH => Operation::Flush,
            spec::VIRTIO_BLK_T_GET_ID => {
                expect_none(readable)?;
                return Ok(Request::Id(std::mem::take(writable)));
            }
            spec::VIRTIO_BLK_T_DISCARD => {
                let ranges = self.ranges(memory, readable, MAX_DISCARD_SEGMENTS, MAX_DISCARD_SECTORS)?;
                // A discard has no flags.
                let plain = ranges.into_iter().map(|(range, flags)| match flags {
                    0 => Ok(range),
                    _ => Err(Failure::Unsupported(flags)),
                });
                Operation::Discard(plain.collect::<Result<_, _>>()?)
            }
            spec::VIRTIO_BLK_T_WRITE_ZEROES => {
                let limit = MAX_WRITE_ZEROES_SEGMENTS;
                match *self.ranges(memory, readable, limit, MAX_WRITE_ZEROES_SECTORS)? {
                    [(range, 0)] => Operation::WriteZeroes { range, unmap: false },
                    [(range, spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)] => {
                        Operation::WriteZeroes { range, unmap: true }
                    }
                    [(_, flags)] => return Err(Failure::Unsupported(flags)),
                    _ => return Err(Failure::Driver("names no range")),
                }
            }
            _ => return Err(Failure::Unsupported(kind)),
        };
        Ok(Request::Disk(operation))
    }

    /// The ranges and flags that are all of `buffers` (5.2.6, struct virtio_blk_discard_write_zeroes).
    fn ranges(
        &self,
        memory: &GuestRam,
        buffers: &mut Segments,
        most: u32,
        most_sectors: u32,
    ) -> Result<Vec<(Extent, u32)>, Failure> {
        self.expect_writable()?;
        let count = buffers.bytes() / RANGE_BYTES as u32;
        if count > most || !buffers.bytes().is_multiple_of(RANGE_BYTES as u32) {
            return Err(Failure::Driver("has too many ranges or half a one"));
        }
        let mut ranges = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let mut raw = [0; RANGE_BYTES];
            buffers.read(memory, &mut raw).map_err(|_| Failure::Driver("has half a range"))?;
            let (sector, sectors, flags) = (u64_at(&raw, 0), u32_at(&raw, 8), u32_at(&raw, 12));
            if sectors > most_sectors {
                return Err(Failure::Driver("has a range of more sectors than are allowed"));
            }
            let len = u64::from(sectors) * SECTOR_BYTES;
            ranges.push((Extent { offset: self.inside(sector, len)?, len }, flags));
        }
        Ok(ranges)
    }

    /// Where a transfer of whole sectors starts on the disk, in bytes.
    fn offset(&self, sector: u64, bytes: u32) -> Result<u64, Failure> {
        if bytes > MAX_TRANSFER_BYTES {
            return Err(Failure::Driver("is for more than 64 MiB"));
        }
        let bytes = u64::from(bytes);
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(Failure::Driver("is not for whole sectors"));
        }
        self.inside(sector, bytes)
    }

    fn inside(&self, sector: u64, bytes: u64) -> Result<u64, Failure> {
        let outside = Failure::Driver("reaches beyond the end of the disk");
        let Some(offset) = sector.checked_mul(SECTOR_BYTES) else { return Err(outside) };
        match offset.checked_add(bytes) {
            Some(end) if end <= self.sectors() * SECTOR_BYTES => Ok(offset),
            _ => Err(outside),
        }
    }

    fn expect_writable(&self) -> Result<(), Failure> {
        if self.read_only { Err(Failure::Driver("writes to a read-only disk")) } else { Ok(()) }
    }

    /// Returns the number of bytes written to the driver's buffers.
    fn perform(&self, memory: &GuestRam, request: Request) -> Result<u32, Failure> {
        let bytes = request.bytes();
        let operation = match request {
            Request::Disk(operation) => operation,
            Request::Id(mut buffers) => {
                buffers
                    .write(memory, &self.serial)
                    .map_err(|_| Failure::Driver("has no room for the serial number"))?;
                return Ok(ID_BYTES as u32);
            }
        };
        if operation == Operation::Flush && self.cache == Cache::Unsafe {
            return Ok(0); // Not offered; the operator has chosen not to wait for the host's disk.
        }
        let counters = &self.counters;
        let begin = Instant::now();
        self.disk.perform(memory, &operation)?;
        match operation {
            Operation::Read { .. } => {
                counters.read_time.add(begin);
                count(&counters.read_count, 1);
                count(&counters.read_bytes, bytes);
                return Ok(bytes as u32);
            }
            Operation::Flush => {
                count(&counters.flush_count, 1);
                return Ok(0);
            }
            Operation::Write { .. } => {
                counters.write_time.add(begin);
                count(&counters.write_count, 1);
                count(&counters.write_bytes, bytes);
            }
            Operation::Discard(_) => count(&counters.discard_count, 1),
            Operation::WriteZeroes { .. } => count(&counters.write_zeroes_count, 1),
        }
        if self.write_through {
            self.disk.perform(memory, &Operation::Flush)?;
        }
        Ok(0)
    }

    fn complain(&self, failure: &Failure) {
        let counter = match failure {
            Failure::Host(_) => &self.counters.execute_fails,
            _ => &self.counters.invalid_reqs_count,
        };
        count(counter, 1);
        let serial = String::from_utf8_lossy(&self.serial);
        log::error!("block device {}: {failure}", serial.trim_end_matches('\0'));
    }

    fn warn_of_odd_size(&self) {
        let rest = self.disk.bytes() % SECTOR_BYTES;
        if rest > 0 {
            let bytes = self.disk.bytes();
            log::warn!(
                "the disk has {bytes} bytes, which is not a multiple of {SECTOR_BYTES}: the guest does not see the last {rest}"
            );
        }
    }

    fn sectors(&self) -> u64 {
        self.disk.bytes() / SECTOR_BYTES
    }
}

impl Request {
    /// Bytes between the disk and the driver's buffers.
    fn bytes(&self) -> u64 {
        match self {
            Request::Disk(Operation::Read { buffers, .. } | Operation::Write { buffers, .. }) => {
                buffers.bytes().into()
            }
            Request::Disk(_) | Request::Id(_) => 0,
        }
    }
}

/// The configuration space (5.2.4), up to the last field that is offered; zeros elsewhere.
fn config_space(sectors: u64) -> [u8; 60] {
    let mut space = [0; 60];
    let mut put = |offset: usize, value: &[u8]| {
        for (byte, value) in space.iter_mut().skip(offset).zip(value) {
            *byte = *value;
        }
    };
    put(0, &sectors.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
    put(40, &MAX_DISCARD_SEGMENTS.to_le_bytes());
    put(44, &DISCARD_ALIGNMENT_SECTORS.to_le_bytes());
    put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
    put(52, &MAX_WRITE_ZEROES_SEGMENTS.to_le_bytes());
    put(56, &[1]); // write_zeroes_may_unmap
    space
}

/// At most 20 bytes, without a terminating zero when there are as many (5.2.6.1).
fn serial_bytes(serial: &str) -> [u8; ID_BYTES] {
    let mut bytes = [0; ID_BYTES];
    for (byte, value) in bytes.iter_mut().zip(serial.bytes()) {
        *byte = value;
    }
    bytes
}

/// Buffers of the wrong direction are a mix-up; better to fail than to transfer nothing and say OK.
fn expect_none(buffers: &Segments) -> Result<(), Failure> {
    if buffers.bytes() == 0 { Ok(()) } else { Err(Failure::Driver("has buffers of the wrong direction")) }
}

fn u32_at(bytes: &[u8; 16], offset: usize) -> u32 {
    bytes.get(offset..).and_then(<[u8]>::first_chunk).copied().map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8; 16], offset: usize) -> u64 {
    bytes.get(offset..).and_then(<[u8]>::first_chunk).copied().map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::Ordering;

    use proptest::prelude::*;
    use virtio_queue::desc::split::Descriptor;
    use vm_memory::{GuestAddress, GuestAddressSpace};

    use super::*;
    use crate::backend::rate_limiter::Bucket;
    use crate::virtio::testing::{self, Buffer, Driver, EVENT_IDX, NEXT, Slot, WRITE};

    const OK: u8 = spec::VIRTIO_BLK_S_OK as u8;
    const IOERR: u8 = spec::VIRTIO_BLK_S_IOERR as u8;
    const UNSUPP: u8 = spec::VIRTIO_BLK_S_UNSUPP as u8;
    const FLUSH: u64 = 1 << spec::VIRTIO_BLK_F_FLUSH;
    const SECTORS: u64 = 64;

    struct Rig {
        slot: Slot<Blk>,
        driver: Driver,
        file: File,
    }

    fn config(file: &File) -> Config {
        Config {
            file: file.try_clone().unwrap(),
            read_only: false,
            cache: Cache::Writeback,
            serial: "disk-1".into(),
            limits: Limits::default(),
        }
    }

    fn file(bytes: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..bytes).map(|i| ((i / SECTOR_BYTES) as u8).wrapping_add(1)).collect();
        file.write_all_at(&data, 0).unwrap();
        file
    }

    fn rig_with(change: impl FnOnce(&mut Config)) -> Rig {
        let file = file(SECTORS * SECTOR_BYTES);
        let mut config = config(&file);
        change(&mut config);
        let memory = testing::ram(8 << 20);
        let driver = Driver::new(&memory, 0x1000, 256, EVENT_IDX | FLUSH);
        let mut slot = Slot::new(Blk::new(config, None).unwrap(), &memory);
        slot.start(vec![driver.queue(0)], EVENT_IDX | FLUSH);
        Rig { slot, driver, file }
    }

    fn rig() -> Rig {
        rig_with(|_| {})
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
    }

    fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    impl Rig {
        /// Makes a request available; returns the status byte.
        fn submit(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> Buffer {
            let header = self.driver.data(&header(kind, sector));
            let status = self.driver.room(1);
            self.driver.memory.memory().write_obj(0xffu8, GuestAddress(status.address)).unwrap();
            let (out, room): (Vec<Buffer>, Vec<Buffer>) = data.iter().partition(|buffer| !buffer.writable);
            self.driver.add(&[vec![header], out, room, vec![status]].concat());
            status
        }

        /// Does a request from start to end; returns its status and how much was written.
        fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
            let status = self.submit(kind, sector, data);
            self.slot.run(10);
            let used = self.driver.reap().unwrap();
            assert_eq!(self.driver.reap(), None);
            (self.driver.read(status)[0], used.written)
        }

        fn status(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> u8 {
            self.request(kind, sector, data).0
        }

        fn ranges(&mut self, kind: u32, ranges: &[Vec<u8>]) -> u8 {
            let data = self.driver.data(&ranges.concat());
            self.status(kind, 0, &[data])
        }

        fn on_disk(&self, sector: u64, sectors: u64) -> Vec<u8> {
            let mut data = vec![0; (sectors * SECTOR_BYTES) as usize];
            self.file.read_exact_at(&mut data, sector * SECTOR_BYTES).unwrap();
            data
        }

        fn counter(&self, counter: impl Fn(&Counters) -> &AtomicU64) -> u64 {
            counter(&self.slot.device.counters()).load(Ordering::Relaxed)
        }
    }

    #[test]
    fn what_is_written_is_on_the_disk_and_is_read_back() {
        let mut rig = rig();
        let out = [rig.driver.data(&[7; 512]), rig.driver.data(&[8; 1024])];
        assert_eq!(rig.request(spec::VIRTIO_BLK_T_OUT, 5, &out), (OK, 1));
        assert_eq!(rig.on_disk(4, 1), [5; 512]);
        assert_eq!(rig.on_disk(5, 1), [7; 512]);
        assert_eq!(rig.on_disk(6, 2), [8; 1024]);

        let room = [rig.driver.room(1000), rig.driver.room(536)];
        assert_eq!(rig.request(spec::VIRTIO_BLK_T_IN, 5, &room), (OK, 1537));
        let read = [rig.driver.read(room[0]), rig.driver.read(room[1])].concat();
        assert_eq!(read, [vec![7; 512], vec![8; 1024]].concat());
        assert_eq!(rig.counter(|c| &c.read_bytes) + rig.counter(|c| &c.write_bytes), 2 * 1536);
    }

    #[test]
    fn a_mebibyte_in_scattered_pages_is_two_indirect_requests_and_one_interrupt() {
        let mut rig = rig_with(|config| config.file = file(2 << 20));
        rig.slot.run(10);
        let mut add = |sector: u64, pages: u32| {
            let header = rig.driver.data(&header(spec::VIRTIO_BLK_T_IN, sector));
            let room: Vec<Buffer> = (0..pages).map(|_| rig.driver.room(4096)).collect();
            let status = rig.driver.room(1);
            rig.driver.add_indirect(&[vec![header], room, vec![status]].concat());
        };
        add(0, SEG_MAX);
        add(u64::from(SEG_MAX) * 8, 256 - SEG_MAX);
        rig.slot.run(10);
        assert_eq!(rig.driver.reap_all().iter().map(|used| used.written).sum::<u32>(), (1 << 20) + 2);
        assert_eq!(rig.slot.calls.take_queue(), 1);
    }

    #[test]
    fn the_header_may_be_cut_anywhere_and_stand_with_the_data() {
        let mut rig = rig();
        let whole = [header(spec::VIRTIO_BLK_T_OUT, 1), vec![9; 512]].concat();
        for cut in [1, 15, 16, 17, 527] {
            let parts = [rig.driver.data(&whole[..cut]), rig.driver.data(&whole[cut..]), rig.driver.room(1)];
            rig.driver.add(&parts);
            rig.slot.run(10);
            assert_eq!(rig.driver.read(parts[2]), [OK]);
            assert_eq!(rig.on_disk(1, 1), [9; 512]);
            assert_eq!(rig.driver.reap_all().len(), 1);
        }
    }

    #[test]
    fn the_end_of_the_disk_is_the_end() {
        let mut rig = rig_with(|config| config.file = file(SECTORS * SECTOR_BYTES + 511));
        let mut capacity = [0; 8];
        rig.slot.device.config(0, &mut capacity);
        assert_eq!(u64::from_le_bytes(capacity), SECTORS, "the last part of a sector is not the guest's");
        for (kind, writable) in [(spec::VIRTIO_BLK_T_IN, true), (spec::VIRTIO_BLK_T_OUT, false)] {
            let one = Buffer { writable, ..rig.driver.data(&[0; 512]) };
            let two = Buffer { writable, ..rig.driver.data(&[0; 1024]) };
            assert_eq!(rig.status(kind, SECTORS - 1, &[one]), OK);
            assert_eq!(rig.status(kind, SECTORS - 1, &[two]), IOERR);
            assert_eq!(rig.status(kind, SECTORS, &[one]), IOERR);
            assert_eq!(rig.status(kind, SECTORS, &[]), OK, "nothing, at the end");
            for sector in [SECTORS + 1, u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1] {
                assert_eq!(rig.status(kind, sector, &[one]), IOERR, "sector {sector}");
                assert_eq!(rig.status(kind, sector, &[]), IOERR, "sector {sector}");
            }
            let odd = Buffer { len: 511, ..one };
            assert_eq!(rig.status(kind, 0, &[odd]), IOERR);
        }
        assert_eq!(rig.file.metadata().unwrap().len(), SECTORS * SECTOR_BYTES);
    }

    #[test]
    fn one_request_moves_no_more_than_64_mib() {
        let mut rig = rig_with(|config| config.file.set_len(1 << 30).unwrap());
        let part = rig.driver.room(4 << 20);
        for (kind, writable) in [(spec::VIRTIO_BLK_T_IN, true), (spec::VIRTIO_BLK_T_OUT, false)] {
            let part = Buffer { writable, ..part };
            assert_eq!(rig.status(kind, 0, &[part; 16]), OK);
            let sector = Buffer { len: 512, ..part };
            assert_eq!(rig.status(kind, 0, &[vec![part; 16], vec![sector]].concat()), IOERR);
        }
    }

    #[test]
    fn a_file_that_shrank_behind_our_back_is_an_error_of_the_host() {
        let mut rig = rig();
        rig.file.set_len(512).unwrap();
        let room = rig.driver.room(1024);
        assert_eq!(rig.request(spec::VIRTIO_BLK_T_IN, 0, &[room]), (IOERR, 0), "nothing of it is to be used");
        assert_eq!(rig.counter(|c| &c.execute_fails), 1);
        let room = rig.driver.room(512);
        assert_eq!(rig.status(spec::VIRTIO_BLK_T_IN, 0, &[room]), OK, "and the device goes on");
    }

    #[test]
    fn a_read_only_disk_is_not_written_by_anything() {
        let mut rig = rig_with(|config| config.read_only = true);
        let features = rig.slot.device.identity().features;
        assert_ne!(features & 1 << spec::VIRTIO_BLK_F_RO, 0);
        assert_eq!(features & (1 << spec::VIRTIO_BLK_F_DISCARD | 1 << spec::VIRTIO_BLK_F_WRITE_ZEROES), 0);
        let data = rig.driver.data(&[0; 512]);
        assert_eq!(rig.status(spec::VIRTIO_BLK_T_OUT, 0, &[data]), IOERR);
        assert_eq!(rig.ranges(spec::VIRTIO_BLK_T_DISCARD, &[range(0, 8, 0)]), IOERR);
        assert_eq!(rig.ranges(spec::VIRTIO_BLK_T_WRITE_ZEROES, &[range(0, 8, 0)]), IOERR);
        assert_eq!(rig.on_disk(0, 1), [1; 512]);
        let room = rig.driver.room(512);
        assert_eq!(rig.status(spec::VIRTIO_BLK_T_IN, 0, &[room]), OK);
    }

    #[test]
    fn the_serial_number_is_twenty_bytes_at_most() {
        for (serial, expected) in [
            ("disk-1", *b"disk-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
            ("a-serial-of-more-than-20", *b"a-serial-of-more-tha"),
        ] {
            let mut rig = rig_with(|config| config.serial = serial.into());
            let room = rig.driver.room(20);
            assert_eq!(rig.request(spec::VIRTIO_BLK_T_GET_ID, 0, &[room]), (OK, 21));
            assert_eq!(rig.driver.read(room), expected);
            let short = rig.driver.room(19);
            assert_eq!(rig.status(spec::VIRTIO_BLK_T_GET_ID, 0, &[short]), IOERR);
            let long = rig.driver.room(40);
            assert_eq!(
                rig.request(spec::VIRTIO_BLK_T_GET_ID, 0, &[long]),
                (OK, 20),
                "the rest is not filled"
            );
        }
    }

    #[test]
    fn a_flush_is_offered_with_writeback_only_and_costs_nothing_without() {
        for (cache, offered) in [(Cache::Writeback, true), (Cache::Unsafe, false)] {
            let mut rig = rig_with(|config| config.cache = cache);
            assert_eq!(rig.slot.device.identity().features & FLUSH != 0, offered);
            assert_eq!(rig.request(spec::VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
            assert_eq!(rig.counter(|c| &c.flush_count), u64::from(offered));
        }
    }

    #[test]
    fn for_a_driver_that_knows_no_flush_every_write_is_one() {
        for (cache, features, expected) in
            [(Cache::Writeback, 0, IOERR), (Cache::Writeback, FLUSH, OK), (Cache::Unsafe, 0, OK)]
        {
            // An empty disk that takes a write of nothing and refuses to be flushed.
            let null = File::options().read(true).write(true).open("/dev/null").unwrap();
            let mut rig = rig_with(|config| (config.file, config.cache) = (null, cache));
            let queues = rig.slot.stop();
            rig.slot.start(queues, features);
            assert_eq!(rig.status(spec::VIRTIO_BLK_T_OUT, 0, &[]), expected);
        }
    }

    #[test]
    fn discarded_sectors_and_zeroes_change_what_was_named_and_nothing_else() {
        let mut rig = rig();
        assert_eq!(rig.ranges(spec::VIRTIO_BLK_T_DISCARD, &[range(8, 8, 0), range(24, 8, 0)]), OK);
        assert_eq!(rig.ranges(spec::VIRTIO_BLK_T_WRITE_ZEROES, &[range(33, 2, 0)]), OK);
        assert_eq!(rig.ranges(spec::VIRTIO_BLK_T_WRITE_ZEROES, &[range(41, 1, 1)]), OK);
        assert_eq!(rig.on_disk(33, 2), [0; 1024]);
        assert_eq!(rig.on_disk(41, 1), [0; 512]);
        for kept in [7, 16, 23, 32, 35, 40, 42] {
            assert_eq!(rig.on_disk(kept, 1), [kept as u8 + 1; 512]);
        }
    }

    #[test]
    fn ranges_are_checked_before_any_of_them_is_done() {
        let mut rig = rig();
        let (discard, zeroes) = (spec::VIRTIO_BLK_T_DISCARD, spec::VIRTIO_BLK_T_WRITE_ZEROES);
        for (kind, flags) in [(discard, 1), (discard, 2), (zeroes, 2), (zeroes, u32::MAX)] {
            assert_eq!(rig.ranges(kind, &[range(0, 8, flags)]), UNSUPP, "flags {flags}");
        }
        for (sector, sectors) in [(SECTORS, 1), (0, SECTORS as u32 + 1), (u64::MAX, 1), (1, u32::MAX)] {
            assert_eq!(rig.ranges(discard, &[range(0, 8, 0), range(sector, sectors, 0)]), IOERR);
            assert_eq!(rig.ranges(zeroes, &[range(sector, sectors, 0)]), IOERR);
        }
        let many = vec![range(0, 8, 0); MAX_DISCARD_SEGMENTS as usize + 1];
        assert_eq!(rig.ranges(discard, &many), IOERR);
        assert_eq!(rig.ranges(zeroes, &many[..2]), IOERR);
        assert_eq!(rig.ranges(zeroes, &[]), IOERR);
        assert_eq!(rig.ranges(discard, &[vec![0; 15]]), IOERR);
        assert_eq!(rig.on_disk(0, 1), [1; 512]);
    }

    #[test]
    fn unknown_requests_are_unsupported_and_mixed_up_ones_fail() {
        let mut rig = rig();
        for kind in [2, 3, 7, 14, 15, u32::MAX] {
            assert_eq!(rig.request(kind, 0, &[]), (UNSUPP, 1), "type {kind}");
        }
        let (out, room) = (rig.driver.data(&[0; 512]), rig.driver.room(512));
        assert_eq!(rig.status(spec::VIRTIO_BLK_T_IN, 0, &[out]), IOERR);
        assert_eq!(rig.status(spec::VIRTIO_BLK_T_OUT, 0, &[room]), IOERR);
        assert_eq!(rig.status(spec::VIRTIO_BLK_T_GET_ID, 0, &[out, room]), IOERR);
        assert_eq!(rig.on_disk(0, 1), [1; 512]);
    }

    #[test]
    fn a_request_without_a_whole_header_fails() {
        let mut rig = rig();
        let parts = [rig.driver.data(&[0; 15]), rig.driver.room(513)];
        rig.driver.add(&parts);
        rig.slot.run(10);
        assert_eq!(rig.driver.reap().unwrap().written, 0);
        assert_eq!(rig.driver.read(parts[1])[512], IOERR);
        assert!(!rig.slot.calls.broken());
    }

    #[test]
    fn a_request_without_a_status_byte_breaks_the_device_until_it_is_started_again() {
        let mut rig = rig();
        let header = rig.driver.data(&header(spec::VIRTIO_BLK_T_FLUSH, 0));
        rig.driver.add(&[header]);
        rig.slot.run(10);
        assert!(rig.slot.calls.broken());
        rig.submit(spec::VIRTIO_BLK_T_FLUSH, 0, &[]);
        rig.driver.kick.write(1).unwrap();
        assert!(rig.slot.run(10) < 10, "a broken device comes to rest");
        assert_eq!(rig.driver.reap(), None);

        rig.slot.stop();
        rig.slot.device.reset();
        let memory = rig.slot.memory.clone();
        rig.driver = Driver::new(&memory, 0x10_0000, 256, EVENT_IDX | FLUSH);
        rig.slot.start(vec![rig.driver.queue(0)], EVENT_IDX | FLUSH);
        assert_eq!(rig.status(spec::VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    }

    #[test]
    fn what_was_done_before_the_driver_broke_the_rules_is_told() {
        let mut rig = rig();
        let status = rig.submit(spec::VIRTIO_BLK_T_FLUSH, 0, &[]);
        rig.driver.set_descriptor(9, Descriptor::new(0x1000, 1, WRITE | NEXT, 9));
        rig.driver.offer(9);
        rig.slot.run(300);
        assert!(rig.slot.calls.broken());
        assert_eq!(rig.slot.calls.take_queue(), 1);
        assert_eq!(rig.driver.read(status), [OK]);
    }

    #[test]
    fn a_busy_disk_gives_way_after_its_turn_and_loses_nothing() {
        let mut rig = rig();
        let statuses: Vec<Buffer> = (0..80).map(|_| rig.submit(spec::VIRTIO_BLK_T_FLUSH, 0, &[])).collect();
        assert_eq!(rig.slot.run(1), 1);
        let first = rig.driver.reap_all().len();
        // Fewer if they take long.
        assert!((1..=crate::virtio::running::REQUESTS_PER_TURN).contains(&first));
        rig.slot.run(100);
        assert_eq!(rig.driver.reap_all().len(), 80 - first);
        assert!(statuses.iter().all(|&status| rig.driver.read(status) == [OK]));
    }

    #[test]
    fn a_full_queue_of_requests_held_back_is_served_when_the_limit_goes() {
        let hour = Bucket { size: 1, one_time_burst: 0, refill_ms: 3_600_000 };
        let mut rig = rig_with(|config| config.limits.ops = Some(hour));
        while rig.driver.free_descriptors() >= 2 {
            rig.submit(spec::VIRTIO_BLK_T_FLUSH, 0, &[]);
        }
        rig.slot.run(10);
        assert_eq!(rig.driver.reap_all().len(), 1);
        rig.submit(spec::VIRTIO_BLK_T_FLUSH, 0, &[]);
        assert!(rig.slot.run(10) < 10, "it waits, and does not spin");
        assert!(rig.counter(|c| &c.rate_limiter_throttled_events) > 0);
        rig.slot.device.set_limits(Limits::default());
        rig.slot.run(300);
        assert_eq!(rig.driver.reap_all().len(), 128);
    }

    #[test]
    fn a_whole_queue_of_requests_that_fail_comes_back_and_the_next_are_served() {
        let mut rig = rig();
        for (sector, expected) in [(SECTORS, IOERR), (0, OK), (SECTORS, IOERR), (0, OK)] {
            let room = rig.driver.room(512);
            // A request has a header, a buffer and a status: as many as the queue holds.
            let statuses: Vec<_> =
                (0..QUEUE_SIZE / 3).map(|_| rig.submit(spec::VIRTIO_BLK_T_IN, sector, &[room])).collect();
            rig.slot.run(100);
            assert_eq!(rig.driver.reap_all().len(), statuses.len());
            assert!(statuses.iter().all(|status| rig.driver.read(*status) == [expected]));
        }
    }

    #[test]
    fn a_limited_disk_is_slow_but_gets_done() {
        let fast = Bucket { size: 1024, one_time_burst: 0, refill_ms: 5 };
        let mut rig = rig_with(|config| config.limits.bandwidth = Some(fast));
        let room = rig.driver.room(4096);
        let last = (0..4).map(|_| rig.submit(spec::VIRTIO_BLK_T_IN, 0, &[room])).last().unwrap();
        let memory = rig.slot.memory.clone();
        rig.slot.run_until(|_| memory.memory().read_obj::<u8>(GuestAddress(last.address)).unwrap() == OK);
        assert_eq!(rig.driver.reap_all().len(), 4);
    }

    #[test]
    fn another_file_has_another_content_and_size_and_the_driver_hears_of_it() {
        let mut rig = rig();
        let new = tempfile::tempfile().unwrap();
        new.write_all_at(&[0x55; 1024], 0).unwrap();
        rig.slot.device.replace(new).unwrap();
        assert_eq!(rig.slot.calls.config.load(Ordering::SeqCst), 1);
        let mut capacity = [0; 8];
        rig.slot.device.config(0, &mut capacity);
        assert_eq!(u64::from_le_bytes(capacity), 2);
        let room = rig.driver.room(512);
        assert_eq!(rig.status(spec::VIRTIO_BLK_T_IN, 0, &[room]), OK);
        assert_eq!(rig.driver.read(room), [0x55; 512]);
        assert_eq!(rig.status(spec::VIRTIO_BLK_T_IN, 2, &[room]), IOERR);
    }

    #[test]
    fn a_driver_that_finds_another_size_after_a_restore_is_told() {
        let mut rig = rig();
        rig.slot.stop();
        let DeviceState::Block(state) = rig.slot.device.save() else { unreachable!() };
        for (sectors, told) in [(SECTORS, 0), (SECTORS * 2, 1)] {
            let file = file(sectors * SECTOR_BYTES);
            let blk = Blk::new(config(&file), Some(state.clone())).unwrap();
            let mut slot = Slot::new(blk, &rig.slot.memory);
            slot.start(vec![rig.driver.queue(0)], EVENT_IDX);
            assert_eq!(slot.calls.config.load(Ordering::SeqCst), told);
        }
    }

    #[test]
    fn the_configuration_space_ends_and_may_be_read_in_any_piece() {
        let rig = rig();
        let space = config_space(SECTORS);
        for (offset, len) in [(0, 60), (12, 4), (34, 2), (56, 8), (59, 1), (60, 4), (u64::MAX, 4)] {
            let mut data = vec![0xee; len];
            rig.slot.device.config(offset, &mut data);
            let expected: Vec<u8> =
                (0..len).map(|i| *space.get((offset as usize).saturating_add(i)).unwrap_or(&0)).collect();
            assert_eq!(data, expected, "offset {offset}");
        }
        assert_eq!(u32::from_le_bytes(*space[12..].first_chunk().unwrap()), 254);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn no_request_whatever_kills_the_device_or_reaches_beyond_the_disk(
            requests in proptest::collection::vec(
                (prop_oneof![0u32..16, any::<u32>()],
                 prop_oneof![0..SECTORS + 2, any::<u64>()],
                 proptest::collection::vec((any::<bool>(), prop_oneof![Just(512u32), 0u32..2000]), 0..4)),
                1..8),
            noise in proptest::collection::vec(any::<u8>(), 16),
        ) {
            let mut rig = rig();
            for (kind, sector, buffers) in requests {
                let buffers: Vec<Buffer> = buffers
                    .into_iter()
                    .map(|(writable, len)| {
                        let fill: Vec<u8> = noise.iter().copied().cycle().take(len as usize).collect();
                        Buffer { writable, ..rig.driver.data(&fill) }
                    })
                    .collect();
                let (status, _) = rig.request(kind, sector, &buffers);
                prop_assert!([OK, IOERR, UNSUPP].contains(&status));
            }
            prop_assert!(!rig.slot.calls.broken());
            prop_assert_eq!(rig.file.metadata().unwrap().len(), SECTORS * SECTOR_BYTES);
        }
    }
}
