//! The persistent memory device (VIRTIO 1.3, section 5.19): tells the driver where a file of the host lies in its memory,
//! and makes what the guest has written there durable when it asks.
//!
//! Does not map the file: the guest reaches its bytes without us, and whoever builds the device has put them there.

use std::fmt::{self, Display};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::backend::rate_limiter::{Limits, RateLimiter, RateLimiterState};
use crate::host::Source;
use crate::memory::GuestRam;
use crate::virtio::device::{
    Active, DeviceState, DeviceType, Identity, StartError, VirtioDevice, read_space,
};
use crate::virtio::queue::{Chain, Queue, QueueError};
use crate::virtio::running::{Running, Step, count};
use crate::virtio::trouble::{Failure, Troubles};

const QUEUE_SIZE: u16 = 256;

/// `VIRTIO_PMEM_REQ_TYPE_FLUSH`, the only request there is (5.19.6).
const FLUSH: u32 = 0;
/// `ret` of a request that is done (5.19.7).
const DONE: u32 = 0;
/// `ret` of one that failed; Linux makes it EIO whatever it is, as long as it is not 0.
pub(super) const FAILED: u32 = 1;

/// What a persistent memory device is made of.
pub struct Config {
    /// What the log calls it.
    pub name: String,
    /// What lies in the guest's memory. Written to only through that memory.
    pub file: File,
    /// Where it lies: guest-physical, 2 MiB aligned.
    pub range: Range<u64>,
    pub limits: Limits,
}

/// The persistent memory device.
pub struct Pmem {
    range: Range<u64>,
    worker: Worker,
    running: Option<Running>,
}

impl Pmem {
    /// A stopped device, or, with a state, the one that was saved.
    pub fn new(config: Config, state: Option<State>) -> io::Result<Pmem> {
        let Config { name, file, range, limits } = config;
        let limiter = RateLimiter::new(limits, state.as_ref().map(|state| &state.limiter))?;
        let bytes = range.end.saturating_sub(range.start);
        let worker =
            Worker { file, name, bytes, limiter, troubles: Troubles::default(), counters: Arc::default() };
        Ok(Pmem { range, worker, running: None })
    }

    /// New limits from now on. A flush costs one request, and as many bytes as the guest sees: how many of them it has written
    /// is known to nobody.
    pub fn set_limits(&mut self, limits: Limits) {
        self.worker.limiter.set_limits(limits);
    }

    /// Where its file lies in guest memory.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// What the device has done since it was built.
    pub fn counters(&self) -> Arc<Counters> {
        self.worker.counters.clone()
    }
}

impl VirtioDevice for Pmem {
    fn identity(&self) -> Identity {
        let features = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
        Identity {
            device_type: DeviceType::PersistentMemory,
            features,
            queue_sizes: vec![QUEUE_SIZE],
            config_bytes: 16,
        }
    }

    /// `struct virtio_pmem_config` (5.19.4).
    fn config(&self, offset: u64, data: &mut [u8]) {
        let size = self.range.end - self.range.start;
        let space = [self.range.start.to_le_bytes(), size.to_le_bytes()].concat();
        read_space(&space, offset, data);
    }

    fn start(&mut self, active: Active) -> Result<Vec<Source>, StartError> {
        let (running, mut sources) = Running::start(active, 1)?;
        sources.push(Source { fd: self.worker.limiter.fd(), token: TIMER });
        self.running = Some(running);
        Ok(sources)
    }

    fn handle(&mut self, token: u32) {
        let Some(running) = &mut self.running else { return };
        match token {
            TIMER => {
                self.worker.limiter.clear();
                count(&self.worker.counters.rate_limiter_event_count, 1);
            }
            _ => count(&self.worker.counters.queue_event_count, 1),
        }
        running.serve(QUEUE, |memory, chain| self.worker.request(memory, chain));
    }

    fn stop(&mut self) -> Vec<Queue> {
        self.worker.forget_troubles();
        self.running.take().map(Running::stop).unwrap_or_default()
    }

    fn save(&self) -> DeviceState {
        DeviceState::PersistentMemory(State { limiter: self.worker.limiter.save() })
    }
}

/// [`Pmem`] as it is saved. Where the file lies is the machine's to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    limiter: RateLimiterState,
}

/// What a persistent memory device has done since it was built.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests that were answered with anything but success.
    pub event_fails: AtomicU64,
    /// Kicks taken in, and turns the device gave itself.
    pub queue_event_count: AtomicU64,
    /// Requests that were found waiting for the rate limiter.
    pub rate_limiter_throttled_events: AtomicU64,
    pub rate_limiter_event_count: AtomicU64,
}

const QUEUE: u16 = 0;
/// The token of the rate limiter's timer; queues have their index.
const TIMER: u32 = 1;

/// What may fail for the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Flush;

impl Display for Flush {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("flushing")
    }
}

/// What serves requests; the device is its shell.
struct Worker {
    file: File,
    name: String,
    /// What a flush costs.
    bytes: u64,
    troubles: Troubles<Flush>,
    limiter: RateLimiter,
    counters: Arc<Counters>,
}

impl Worker {
    fn request(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<Step, QueueError> {
        if !self.limiter.take(self.bytes) {
            count(&self.counters.rate_limiter_throttled_events, 1);
            return Ok(Step::Later);
        }
        let mut kind = [0; 4];
        let known = chain.readable.read(memory, &mut kind).is_ok() && u32::from_le_bytes(kind) == FLUSH;
        // Each flush is one of its own: what came while another was under way may have been written after it began.
        let done = known && self.flush();
        let result = if done { DONE } else { FAILED };
        count(&self.counters.event_fails, u64::from(!done));
        // A driver that leaves no room for the answer gets none.
        match chain.writable.write(memory, &result.to_le_bytes()) {
            Ok(()) => Ok(Step::Used(4)),
            Err(QueueError::Short { .. }) => Ok(Step::Used(0)),
            Err(error) => Err(error),
        }
    }

    fn flush(&mut self) -> bool {
        // This also writes what was changed through mappings of the file, as the guest's is.
        match self.file.sync_data() {
            Ok(()) => {
                if !self.troubles.is_empty() {
                    let lines = self.troubles.worked(Flush, Instant::now());
                    lines.iter().for_each(|line| self.warn(line));
                }
                true
            }
            Err(error) => {
                if let Some(line) = self.troubles.failed(Flush, &Failure::Host(error), Instant::now()) {
                    log::error!("persistent memory {}: flushing: {line}", self.name);
                }
                false
            }
        }
    }

    fn forget_troubles(&mut self) {
        let lines = self.troubles.clear();
        lines.iter().for_each(|line| self.warn(line));
    }

    fn warn(&self, line: &str) {
        log::warn!("persistent memory {}: {line}", self.name);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::backend::rate_limiter::Bucket;
    use crate::virtio::testing::{self, Buffer, Driver, EVENT_IDX, Slot, Used};

    const RANGE: Range<u64> = 0x1_2345_0000_0000..0x1_2345_0040_0000;

    fn device(file: File, limits: Limits) -> Pmem {
        Pmem::new(Config { name: "data".into(), file, range: RANGE, limits }, None).unwrap()
    }

    fn rig(file: File, limits: Limits) -> (Slot<Pmem>, Driver) {
        let memory = testing::ram(1 << 20);
        let driver = Driver::new(&memory, 0x1000, QUEUE_SIZE, EVENT_IDX);
        let mut slot = Slot::new(device(file, limits), &memory);
        slot.start(vec![driver.queue(0)], EVENT_IDX);
        slot.run(10);
        (slot, driver)
    }

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 << 20).unwrap();
        file
    }

    fn ask(slot: &mut Slot<Pmem>, driver: &mut Driver, kind: u32) -> (u32, u32) {
        let (request, room) = (driver.data(&kind.to_le_bytes()), driver.room(4));
        let head = driver.add(&[request, room]);
        slot.run(10);
        let used = driver.reap().unwrap();
        assert_eq!(used.head, head);
        (used.written, u32::from_le_bytes(driver.read(room).try_into().unwrap()))
    }

    #[test]
    fn the_driver_reads_where_the_memory_lies_and_cannot_move_it() {
        let mut device = device(file(), Limits::default());
        device.write_config(0, &[0xff; 16]);
        let mut space = [0xaa; 20];
        device.config(0, &mut space);
        assert_eq!(space[..8], RANGE.start.to_le_bytes());
        assert_eq!(space[8..16], 0x40_0000u64.to_le_bytes());
        assert_eq!(space[16..], [0; 4]);
        let mut middle = [0; 4];
        device.config(8, &mut middle);
        assert_eq!(middle, 0x40_0000u32.to_le_bytes());
    }

    #[test]
    fn a_flush_is_answered_with_success() {
        let (mut slot, mut driver) = rig(file(), Limits::default());
        assert_eq!(ask(&mut slot, &mut driver, FLUSH), (4, DONE));
        assert_eq!(ask(&mut slot, &mut driver, FLUSH), (4, DONE));
        assert_eq!(slot.device.counters().event_fails.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_the_host_cannot_flush_is_a_failure_to_the_guest() {
        // A pipe has no disk behind it: EINVAL.
        let (pipe, _other_end) = io::pipe().unwrap();
        let (mut slot, mut driver) = rig(File::from(OwnedFd::from(pipe)), Limits::default());
        assert_eq!(ask(&mut slot, &mut driver, FLUSH), (4, FAILED));
        assert_eq!(slot.device.counters().event_fails.load(Ordering::Relaxed), 1);
        assert!(!slot.calls.broken());
        // Told once, however often the guest tries.
        for _ in 0..30 {
            assert_eq!(ask(&mut slot, &mut driver, FLUSH), (4, FAILED));
        }
        let told = slot.device.worker.troubles.clear();
        assert_eq!(told, ["30 more: flushing: Invalid argument (os error 22)"]);
    }

    #[test]
    fn a_flush_costs_as_many_bytes_as_the_guest_sees_whatever_the_file_says_of_its_size() {
        let bucket = Bucket { size: RANGE.end - RANGE.start, one_time_burst: 0, refill_ms: 3_600_000 };
        // A device's file has a length of 0.
        let (mut slot, mut driver) =
            rig(tempfile::tempfile().unwrap(), Limits { bandwidth: Some(bucket), ops: None });
        assert_eq!(ask(&mut slot, &mut driver, FLUSH), (4, DONE));
        let (request, room) = (driver.data(&FLUSH.to_le_bytes()), driver.room(4));
        driver.add(&[request, room]);
        slot.run(10);
        assert_eq!(driver.reap(), None, "nothing is left of the bucket");
    }

    #[test]
    fn a_request_that_is_none_fails_and_the_next_one_is_served() {
        let (mut slot, mut driver) = rig(file(), Limits::default());
        assert_eq!(ask(&mut slot, &mut driver, 1), (4, FAILED));
        let room = driver.room(4);
        let short = driver.data(&[0; 3]);
        let request = driver.data(&FLUSH.to_le_bytes());
        let mut answer_to = |buffers: &[Buffer]| {
            let head = driver.add(buffers);
            slot.run(10);
            assert_eq!(driver.reap().map(|used| used.head), Some(head));
            (head, driver.read(room))
        };
        assert_eq!(answer_to(&[short, room]).1, FAILED.to_le_bytes(), "half a request");
        assert_eq!(answer_to(&[room]).1, FAILED.to_le_bytes(), "no request");
        answer_to(&[request]);
        answer_to(&[request, Buffer { len: 3, ..room }]);
        assert_eq!(answer_to(&[request, room]).1, DONE.to_le_bytes());
        assert!(!slot.calls.broken());
    }

    #[test]
    fn a_limit_holds_flushes_back_until_their_time() {
        // Longer than a flush takes on a busy disk.
        let bucket = Bucket { size: 1, one_time_burst: 0, refill_ms: 1000 };
        let (mut slot, mut driver) = rig(file(), Limits { bandwidth: None, ops: Some(bucket) });
        let (request, room) = (driver.data(&FLUSH.to_le_bytes()), driver.room(4));
        let heads = [driver.add(&[request, room]), driver.add(&[request, room])];
        slot.run(1);
        assert_eq!(driver.reap_all(), [Used { head: heads[0], written: 4 }]);
        slot.run_until(|_| driver.reap().is_some());
        assert_eq!(slot.device.counters().rate_limiter_throttled_events.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_driver_that_breaks_the_rules_is_told_to_reset_and_costs_nothing_more() {
        let (mut slot, driver) = rig(file(), Limits::default());
        driver.set_avail_index(500);
        driver.kick.write(1).unwrap();
        assert!(slot.run(10) < 10);
        assert!(slot.calls.broken());
        assert_eq!(slot.stop().len(), 1);
    }
}
