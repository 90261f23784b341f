//! The block device (VIRTIO 1.3, section 5.2): reads, writes, flushes, discards and zeroes a [`Disk`] for its driver.
//!
//! Does not open files or guess formats: the VMM hands over open ones and says what is in them. Write caching is
//! configured, not negotiated (no VIRTIO_BLK_F_CONFIG_WCE): with it a driver could undo what the operator has chosen. The
//! block size and topology are told of a disk that is open for direct I/O only: otherwise they are the driver's defaults,
//! and each field would cost an exit at boot to say what is assumed anyway.
//!
//! With the synchronous engine a request is done before the next is looked at. With the asynchronous one the ring keeps
//! requests, which end in any order (5.2.6.2 asks for none), and stopping waits for them.
//!
//! Several queues spare a driver's CPUs waiting for one another; here one thread serves all of them, in [`Turns`].
//! One ring does for all: rings for each would be filled and emptied by this same thread, with a call for each and no
//! request done earlier, and how much one guest may have under way would grow with its queues.

use std::fmt::{self, Display};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk as spec;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes, GuestAddress};

use crate::backend::direct::Alignment;
use crate::backend::disk::{Disk, Extent, Format, Operation};
use crate::backend::job::Job;
use crate::backend::rate_limiter::{Limits, RateLimiter, RateLimiterState};
use crate::backend::uring::Ring;
use crate::host::Source;
use crate::memory::GuestRam;
use crate::times::Times;
use crate::virtio::device::{
    Active, DeviceState, DeviceType, Identity, StartError, VirtioDevice, read_space,
};
use crate::virtio::queue::{Chain, Queue, QueueError, Segments};
use crate::virtio::running::{Running, Serve, Step, count};
use crate::virtio::trouble::{Failure, Troubles};
use crate::virtio::turns::{Turn, Turns};

/// The unit of every sector number, whatever the disk's own is (5.2.4).
pub const SECTOR_BYTES: u64 = 512;

/// Most queues. Each has its vector and its descriptors; more than a guest has CPUs are of no use.
pub const MAX_QUEUES: u16 = 16;

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
/// Most clusters that one discard or one request for zeroes names in an image, where each is a step of its own: with those of
/// 64 KiB, which are usual, 64 MiB. Some ten milliseconds, of which other devices wait as they do for a large write.
const MAX_CLUSTERS: u64 = 1024;

/// What a block device is made of.
pub struct Config {
    /// An image or a block device, open for writing too unless `read_only`, and direct if it is to be. A last part of
    /// less than a sector is not visible to the guest.
    pub file: File,
    pub format: Format,
    pub read_only: bool,
    pub cache: Cache,
    pub engine: Engine,
    /// 1 to [`MAX_QUEUES`].
    pub queues: u16,
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
    /// Flushes are not offered, and so a write is on stable storage when it is completed (5.2.6.2, the first of its cases).
    Writethrough,
}

/// How requests reach the host's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// One after the other: the io thread waits for the disk.
    Sync,
    /// Many at a time, through an io_uring.
    Async,
}

impl Engine {
    /// Whether this host has it, for disks like this.
    pub fn check(self, file: &File) -> io::Result<()> {
        self.ring(file).map(drop)
    }

    fn ring(self, file: &File) -> io::Result<Option<Ring<Answer>>> {
        match self {
            Engine::Sync => Ok(None),
            Engine::Async => Ring::new(file).map(Some),
        }
    }
}

/// Opens the disk that this file is.
///
/// # Errors
/// Those of the host; and for a file that is open for direct I/O, when it cannot do it, or is not made of whole blocks: what
/// is left over could not be written without the blocks' rest, by which the file would grow.
pub fn disk(file: File) -> io::Result<Disk> {
    let disk = Disk::new(file)?;
    let (bytes, block) = (disk.bytes(), disk.alignment().map_or(SECTOR_BYTES, |alignment| alignment.block));
    if bytes % block >= SECTOR_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("it has {bytes} bytes, and direct I/O on it needs a multiple of {block}"),
        ));
    }
    Ok(disk)
}

fn disk_of(file: File, format: Format, read_only: bool) -> io::Result<Disk> {
    match format {
        Format::Raw => disk(file),
        Format::Qcow2(_) => Disk::with_format(file, format, read_only),
    }
}

/// What the driver is told of the blocks of a disk, so that its requests are made of them (5.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Blocks {
    /// What the disk's content, such as a partition table, counts in. A block device's is the host's; that of an image is
    /// the sector, whatever the disk that it is on.
    logical: u64,
    physical: u64,
}

impl Blocks {
    fn of(disk: &Disk) -> io::Result<Option<Blocks>> {
        let Some(Alignment { block: physical, .. }) = disk.alignment() else { return Ok(None) };
        let is_device = disk.file().metadata()?.file_type().is_block_device();
        let physical = physical.max(SECTOR_BYTES);
        Ok(Some(Blocks { logical: if is_device { physical } else { SECTOR_BYTES }, physical }))
    }
}

/// What the driver is told of discards and zeroes (5.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ranges {
    discard_sectors: u32,
    discard_segments: u32,
    zeroes_sectors: u32,
}

impl Ranges {
    const RAW: Ranges = Ranges {
        discard_sectors: MAX_DISCARD_SECTORS,
        discard_segments: MAX_DISCARD_SEGMENTS,
        zeroes_sectors: MAX_WRITE_ZEROES_SECTORS,
    };

    fn of(disk: &Disk) -> Ranges {
        let Some(cluster) = disk.cluster_bytes() else { return Ranges::RAW };
        let sectors = MAX_CLUSTERS.saturating_mul(cluster) / SECTOR_BYTES;
        let most = u32::try_from(sectors).unwrap_or(u32::MAX);
        Ranges {
            discard_sectors: MAX_DISCARD_SECTORS.min(most),
            discard_segments: 1,
            zeroes_sectors: MAX_WRITE_ZEROES_SECTORS.min(most),
        }
    }
}

/// The block device.
pub struct Blk {
    worker: Worker,
    queues: u16,
    /// Of the disk that was there at the beginning: a driver reads it once.
    blocks: Option<Blocks>,
    turns: Turns,
    /// The driver has to hear that the capacity is another one than it has read.
    resized: bool,
    running: Option<Running>,
}

impl Blk {
    /// A stopped device. With a state, the one that was saved; if the disk's size has changed since, its driver is told.
    pub fn new(config: Config, state: Option<State>) -> io::Result<Blk> {
        let Config { file, format, read_only, cache, engine, queues, serial, limits } = config;
        let ring = engine.ring(&file)?;
        let disk = disk_of(file, format, read_only)?;
        if ring.is_some() && !disk.is_raw() {
            return Err(io::Error::other("the asynchronous engine is for raw disks"));
        }
        let blocks = Blocks::of(&disk)?;
        let worker = Worker {
            read_only,
            cache,
            serial: serial_bytes(&serial),
            ranges: Ranges::of(&disk),
            counters: Arc::default(),
            limiter: RateLimiter::new(limits, state.as_ref().map(|state| &state.limiter))?,
            write_through: false,
            disk,
            ring,
            waits: None,
            ended: Vec::new(),
            troubles: Troubles::default(),
        };
        worker.warn_of_odd_size();
        let resized = state.is_some_and(|state| state.sectors != worker.sectors());
        Ok(Blk { worker, queues, blocks, turns: Turns::default(), resized, running: None })
    }

    /// What the device has done since it was built.
    pub fn counters(&self) -> Arc<Counters> {
        self.worker.counters.clone()
    }

    /// Another file from now on, running or not; opened as the first one was. Requests that have begun end on the old
    /// one. The driver is told and reads the new capacity. On an error the old file stays.
    pub fn replace(&mut self, file: File, format: Format) -> io::Result<()> {
        self.drain();
        self.worker.replace(file, format).inspect_err(|_| count(&self.worker.counters.update_fails, 1))?;
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

    /// Waits for what the ring keeps, and gives it back to the driver.
    fn drain(&mut self) {
        let (Some(ring), Some(running)) = (&mut self.worker.ring, &mut self.running) else { return };
        match ring.drain() {
            Ok(ended) => self.worker.give_back(running, ended),
            Err(error) => running.interrupt.needs_reset(&format_args!("requests are lost: {error}")),
        }
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
        if self.blocks.is_some() {
            bits.extend([spec::VIRTIO_BLK_F_BLK_SIZE, spec::VIRTIO_BLK_F_TOPOLOGY]);
        }
        bits.extend((self.queues > 1).then_some(spec::VIRTIO_BLK_F_MQ));
        let features = bits.into_iter().map(|bit| 1 << bit).sum();
        let queue_sizes = vec![QUEUE_SIZE; self.queues.into()];
        Identity { device_type: DeviceType::Block, features, queue_sizes, config_bytes: CONFIG_BYTES as u64 }
    }

    fn config(&self, offset: u64, data: &mut [u8]) {
        read_space(
            &config_space(self.worker.sectors(), self.queues, self.blocks, self.worker.ranges),
            offset,
            data,
        );
    }

    fn start(&mut self, active: Active) -> Result<Vec<Source>, StartError> {
        let knows_flush = active.features & (1 << spec::VIRTIO_BLK_F_FLUSH) != 0;
        let (running, mut sources) = Running::start(active, self.queues.into())?;
        sources.push(Source { fd: self.worker.limiter.fd(), token: TIMER });
        sources.extend(self.worker.ring.as_ref().map(|ring| Source { fd: ring.fd(), token: RING }));
        self.worker.write_through = match self.worker.cache {
            Cache::Unsafe => false,
            Cache::Writeback => !knows_flush,
            Cache::Writethrough => true,
        };
        self.running = Some(running);
        self.announce();
        Ok(sources)
    }

    fn handle(&mut self, token: u32) {
        let Some(running) = &mut self.running else { return };
        let worker = &mut self.worker;
        match token {
            RING => {
                worker.turn(running);
                if worker.waits != Some(Wait::Room) {
                    return;
                }
            }
            TIMER => {
                worker.limiter.clear();
                count(&worker.counters.rate_limiter_event_count, 1);
            }
            queue => {
                count(&worker.counters.queue_event_count, 1);
                running.clear_kick(queue as u16);
                self.turns.kicked(queue as u16);
            }
        }
        self.turns.take(|queue| worker.serve(running, queue));
        worker.settle();
        if worker.ring.as_ref().is_some_and(|ring| !ring.is_empty()) || !worker.ended.is_empty() {
            worker.turn(running);
        }
        // One turn for each call, for the sake of other devices: the next queue is called for. Also when all that was in the
        // ring has just come back, as no signal of it is left.
        if worker.may_go_on()
            && let Some(next) = self.turns.next()
        {
            running.ring(next);
        }
    }

    fn stop(&mut self) -> Vec<Queue> {
        self.drain();
        self.turns.clear();
        self.worker.waits = None;
        self.worker.forget_troubles();
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
    /// Requests that were found waiting for room in the ring of the asynchronous engine.
    pub io_engine_throttled_events: AtomicU64,
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

/// The token of the rate limiter's timer; queues have their index.
const TIMER: u32 = 0x8000;
/// The token of the asynchronous engine's ring.
const RING: u32 = 0x8001;

/// Up to the last field that is offered.
const CONFIG_BYTES: usize = 60;
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

/// What a request needs to be answered when it is done.
#[derive(Clone, Copy, Debug)]
struct Answer {
    queue: u16,
    head: u16,
    status_at: GuestAddress,
    /// Bytes that the driver left for data.
    room: u32,
    what: What,
    /// Bytes of the disk that are read or written.
    bytes: u64,
    /// Where on the disk, in bytes.
    at: u64,
    begin: Instant,
}

/// What a request was, for the counters and the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    /// Nothing that reaches the disk.
    Other,
}

impl Display for What {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            What::Read => "reading",
            What::Write => "writing",
            What::Flush => "flushing",
            What::Discard => "discarding",
            What::WriteZeroes => "writing zeroes",
            What::Other => "requests",
        })
    }
}

/// What serves requests; the device is its shell.
struct Worker {
    disk: Disk,
    /// Of the asynchronous engine; the synchronous one has none.
    ring: Option<Ring<Answer>>,
    /// What the first queue in line waits for.
    waits: Option<Wait>,
    /// Requests that are done and to be given back: what has left the ring, never more than that holds, or what a turn has
    /// changed in an image.
    ended: Vec<(Answer, io::Result<()>)>,
    troubles: Troubles<What>,
    read_only: bool,
    cache: Cache,
    serial: [u8; ID_BYTES],
    /// Of the disk that was there at the beginning: a driver reads it once.
    ranges: Ranges,
    /// A write has to be stable when it is done: by choice, or as this driver knows no flushes.
    write_through: bool,
    limiter: RateLimiter,
    counters: Arc<Counters>,
}

/// A turn at one queue.
struct Serving<'a> {
    worker: &'a mut Worker,
    queue: u16,
    /// Something was not put back.
    taken: bool,
}

impl Serve for Serving<'_> {
    fn request(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<Step, QueueError> {
        let step = self.worker.request(self.queue, memory, chain)?;
        self.taken |= step != Step::Later;
        Ok(step)
    }

    fn may_pause(&mut self) -> bool {
        // The host's disk works while others do.
        self.worker.ring.iter_mut().for_each(Ring::send);
        self.worker.ended.is_empty()
    }
}

/// What a request may have to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    Limiter,
    /// In the ring.
    Room,
}

impl Worker {
    fn serve(&mut self, running: &mut Running, queue: u16) -> Turn {
        self.waits = None;
        let mut serving = Serving { worker: self, queue, taken: false };
        running.serve_batches(queue, &mut serving);
        let taken = serving.taken;
        match self.waits {
            None => Turn::Over,
            Some(_) if taken => Turn::Partly,
            Some(_) => Turn::Waits,
        }
    }

    /// What the first queue in line waits for has come, if it did.
    fn may_go_on(&self) -> bool {
        match self.waits {
            None => true,
            Some(Wait::Limiter) => false,
            Some(Wait::Room) => !self.is_full(),
        }
    }

    fn is_full(&self) -> bool {
        self.ring.as_ref().is_some_and(Ring::is_full)
    }

    /// Serves one request. Its status is written whatever happens; only where there is no room for one is it an error.
    fn request(&mut self, queue: u16, memory: &GuestRam, chain: &mut Chain) -> Result<Step, QueueError> {
        if self.is_full() {
            count(&self.counters.io_engine_throttled_events, 1);
            self.waits = Some(Wait::Room);
            return Ok(Step::Later);
        }
        let status_at = chain.writable.take_last_byte().ok_or(QueueError::Short { needed: 1, left: 0 })?;
        let room = chain.writable.bytes();
        let request = self.parse(memory, chain);
        let (what, bytes, at) =
            request.as_ref().map_or((What::Other, 0, 0), |request| request.kind(self.cache));
        if !self.limiter.take(bytes) {
            count(&self.counters.rate_limiter_throttled_events, 1);
            self.waits = Some(Wait::Limiter);
            return Ok(Step::Later);
        }
        let answer =
            Answer { queue, head: chain.head, status_at, room, what, bytes, at, begin: Instant::now() };
        match request.and_then(|request| self.perform(memory, request, answer)) {
            Ok(None) => Ok(Step::Kept),
            Ok(Some(written)) => self.finish(memory, &answer, Ok(written)).map(Step::Used),
            Err(failure) => self.finish(memory, &answer, Err(failure)).map(Step::Used),
        }
    }

    /// Does a request, and says how many bytes it has written to the driver's buffers; or gives it to the ring.
    fn perform(
        &mut self,
        memory: &GuestRam,
        request: Request,
        answer: Answer,
    ) -> Result<Option<u32>, Failure> {
        let operation = match request {
            Request::Id(mut buffers) => {
                buffers
                    .write(memory, &self.serial)
                    .map_err(|_| Failure::Driver("has no room for the serial number"))?;
                return Ok(Some(ID_BYTES as u32));
            }
            // Not offered: the operator has chosen not to wait for the host's disk, or all is on it.
            Request::Disk(Operation::Flush) if self.cache != Cache::Writeback => return Ok(Some(0)),
            Request::Disk(operation) => operation,
        };
        if let Some(ring) = &mut self.ring {
            if self.disk.takes(memory, &operation)? {
                ring.put(Job::new(memory, operation, self.write_through)?, answer)?;
                return Ok(None);
            }
            // Seldom, as the driver knows the disk's blocks.
            self.ended.extend(ring.drain()?);
        }
        self.disk.perform(memory, &operation)?;
        if matches!(operation, Operation::Read { .. } | Operation::Flush) {
            return Ok(Some(answer.written()));
        }
        if self.write_through {
            self.disk.perform(memory, &Operation::Flush)?;
        }
        if self.disk.is_raw() {
            return Ok(Some(answer.written()));
        }
        // Done when the image's tables say so, which is once for all of a turn.
        self.ended.push((answer, Ok(())));
        Ok(None)
    }

    /// Counts a request, writes its status and says how many bytes of its buffers are used.
    fn finish(
        &mut self,
        memory: &GuestRam,
        answer: &Answer,
        result: Result<u32, Failure>,
    ) -> Result<u32, QueueError> {
        let status = match &result {
            Ok(_) => spec::VIRTIO_BLK_S_OK,
            Err(Failure::Unsupported(_)) => spec::VIRTIO_BLK_S_UNSUPP,
            Err(_) => spec::VIRTIO_BLK_S_IOERR,
        };
        let gone = QueueError::Buffer { address: answer.status_at.0, len: 1 };
        memory.write_obj(status as u8, answer.status_at).map_err(|_| gone)?;
        let written = match result {
            Ok(written) => {
                self.counters.add(answer);
                if !self.troubles.is_empty() {
                    let lines = self.troubles.worked(answer.what, Instant::now());
                    lines.iter().for_each(|line| log::warn!("{}: {line}", self.name()));
                }
                written
            }
            Err(failure) => {
                self.complain(answer, &failure);
                0
            }
        };
        // What is used is counted from the front (2.7.8.2): the status, at the end, only if all before it is filled.
        Ok(if written == answer.room { written + 1 } else { written })
    }

    /// Sends off what the ring was given, and gives back what is done.
    fn turn(&mut self, running: &mut Running) {
        let mut ended = std::mem::take(&mut self.ended);
        ended.extend(self.ring.as_mut().map(Ring::turn).unwrap_or_default());
        self.give_back(running, ended);
    }

    /// All that came back to one queue in one turn of it, so that its driver is interrupted once.
    fn give_back(&mut self, running: &mut Running, mut ended: Vec<(Answer, io::Result<()>)>) {
        ended.sort_by_key(|(answer, _)| answer.queue);
        let mut ended = ended.into_iter().peekable();
        while let Some(first) = ended.next() {
            let queue = first.0.queue;
            let mut of_queue = vec![first];
            of_queue.extend(std::iter::from_fn(|| ended.next_if(|(answer, _)| answer.queue == queue)));
            running.turn(queue, |turn| {
                of_queue.into_iter().try_for_each(|(answer, result)| {
                    let result = result.map(|()| answer.written()).map_err(Failure::Host);
                    let used = self.finish(turn.memory, &answer, result)?;
                    turn.queue.push(turn.memory, answer.head, used)
                })
            });
        }
    }

    /// What the driver will be told is done must not be lost with this process, whatever flushes are worth to it: what is not
    /// in the image's tables has failed. That of earlier turns has failed before.
    fn settle(&mut self) {
        let Err(error) = self.disk.settle() else { return };
        for (_, result) in &mut self.ended {
            let text = format!("the image's tables cannot be written: {error}");
            *result = Err(io::Error::new(error.kind(), text));
        }
    }

    /// Another file. Only while nothing is under way.
    fn replace(&mut self, file: File, format: Format) -> io::Result<()> {
        let disk = disk_of(file, format, self.read_only)?;
        if let Some(ring) = &mut self.ring {
            ring.replace(disk.file())?;
        }
        self.disk = disk;
        self.forget_troubles();
        Ok(())
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
                let Ranges { discard_segments, discard_sectors, .. } = self.ranges;
                let ranges = self.ranges(memory, readable, discard_segments, discard_sectors)?;
                // A discard has no flags.
                let plain = ranges.into_iter().map(|(range, flags)| match flags {
                    0 => Ok(range),
                    _ => Err(Failure::Unsupported(flags)),
                });
                Operation::Discard(plain.collect::<Result<_, _>>()?)
            }
            spec::VIRTIO_BLK_T_WRITE_ZEROES => {
                let limit = MAX_WRITE_ZEROES_SEGMENTS;
                match *self.ranges(memory, readable, limit, self.ranges.zeroes_sectors)? {
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

    fn complain(&mut self, answer: &Answer, failure: &Failure) {
        let is_host = matches!(failure, Failure::Host(_));
        let counters = &self.counters;
        count(if is_host { &counters.execute_fails } else { &counters.invalid_reqs_count }, 1);
        let Some(line) = self.troubles.failed(answer.what, failure, Instant::now()) else { return };
        if is_host {
            let Answer { what, bytes, at, .. } = answer;
            log::error!("{}: {what} at sector {} ({bytes} bytes): {line}", self.name(), at / SECTOR_BYTES);
        } else {
            log::error!("{}: {line}", self.name());
        }
    }

    fn forget_troubles(&mut self) {
        let lines = self.troubles.clear();
        lines.iter().for_each(|line| log::warn!("{}: {line}", self.name()));
    }

    fn name(&self) -> String {
        let serial = String::from_utf8_lossy(&self.serial);
        format!("block device {}", serial.trim_end_matches('\0'))
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
    /// What it is, the bytes of the disk that it reads or writes, and where they are.
    fn kind(&self, cache: Cache) -> (What, u64, u64) {
        match self {
            Request::Disk(Operation::Read { buffers, offset }) => {
                (What::Read, buffers.bytes().into(), *offset)
            }
            Request::Disk(Operation::Write { buffers, offset }) => {
                (What::Write, buffers.bytes().into(), *offset)
            }
            Request::Disk(Operation::Flush) if cache == Cache::Writeback => (What::Flush, 0, 0),
            Request::Disk(Operation::Discard(ranges)) => {
                (What::Discard, 0, ranges.first().map_or(0, |range| range.offset))
            }
            // What is a note in the host's maps on one disk is written on another.
            Request::Disk(Operation::WriteZeroes { range, .. }) => {
                (What::WriteZeroes, range.len, range.offset)
            }
            Request::Disk(Operation::Flush) | Request::Id(_) => (What::Other, 0, 0),
        }
    }
}

impl Answer {
    /// Bytes written to the driver's buffers by a request that reached the disk.
    fn written(&self) -> u32 {
        match self.what {
            // As many as a chain's buffers have, which is a u32.
            What::Read => self.bytes as u32,
            _ => 0,
        }
    }
}

impl Counters {
    /// A request that was done.
    fn add(&self, answer: &Answer) {
        match answer.what {
            What::Read => {
                self.read_time.add(answer.begin);
                count(&self.read_count, 1);
                count(&self.read_bytes, answer.bytes);
            }
            What::Write => {
                self.write_time.add(answer.begin);
                count(&self.write_count, 1);
                count(&self.write_bytes, answer.bytes);
            }
            What::Flush => count(&self.flush_count, 1),
            What::Discard => count(&self.discard_count, 1),
            What::WriteZeroes => count(&self.write_zeroes_count, 1),
            What::Other => {}
        }
    }
}

/// The configuration space (5.2.4), up to the last field that is offered; zeros elsewhere.
fn config_space(sectors: u64, queues: u16, blocks: Option<Blocks>, ranges: Ranges) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    let mut put = |offset: usize, value: &[u8]| {
        for (byte, value) in space.iter_mut().skip(offset).zip(value) {
            *byte = *value;
        }
    };
    put(0, &sectors.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    if let Some(Blocks { logical, physical }) = blocks {
        let ratio = physical / logical;
        put(20, &(logical as u32).to_le_bytes());
        put(24, &[ratio.ilog2() as u8]); // physical_block_exp
        put(26, &(ratio as u16).to_le_bytes()); // min_io_size
    }
    put(34, &queues.to_le_bytes());
    put(36, &ranges.discard_sectors.to_le_bytes());
    put(40, &ranges.discard_segments.to_le_bytes());
    put(44, &DISCARD_ALIGNMENT_SECTORS.to_le_bytes());
    put(48, &ranges.zeroes_sectors.to_le_bytes());
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
mod tests;
