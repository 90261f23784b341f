//! The entropy device (VIRTIO 1.3, section 5.4): fills the driver's buffers with random bytes of the host's kernel.
//!
//! Has no configuration space and no randomness of its own: nothing to save that a clone of the machine could repeat.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::backend::rate_limiter::{Limits, RateLimiter, RateLimiterState};
use crate::host::Source;
use crate::memory::GuestRam;
use crate::random;
use crate::virtio::device::{Active, DeviceState, DeviceType, Identity, StartError, VirtioDevice};
use crate::virtio::queue::{Chain, Queue, QueueError};
use crate::virtio::running::{Running, Step, count};

const QUEUE_SIZE: u16 = 256;

/// Most bytes one request gets; a larger buffer is filled only at its front, as 5.4.6.1 allows. Linux asks for 64.
pub const MAX_REQUEST_BYTES: u32 = 64 << 10;

/// What an entropy device is made of.
pub struct Config {
    pub limits: Limits,
}

/// The entropy device.
pub struct Rng {
    worker: Worker,
    running: Option<Running>,
}

impl Rng {
    /// A stopped device, or, with a state, the one that was saved.
    pub fn new(config: Config, state: Option<State>) -> io::Result<Rng> {
        let limiter = RateLimiter::new(config.limits, state.as_ref().map(|state| &state.limiter))?;
        Ok(Rng { worker: Worker { limiter, counters: Arc::default() }, running: None })
    }

    /// New limits from now on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.worker.limiter.set_limits(limits);
    }

    /// What the device has done since it was built.
    pub fn counters(&self) -> Arc<Counters> {
        self.worker.counters.clone()
    }
}

impl VirtioDevice for Rng {
    fn identity(&self) -> Identity {
        let features = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
        Identity {
            device_type: DeviceType::Entropy,
            features,
            queue_sizes: vec![QUEUE_SIZE],
            config_bytes: 0,
        }
    }

    fn config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn start(&mut self, active: Active) -> Result<Vec<Source>, StartError> {
        let (running, mut sources) = Running::start(active, 1)?;
        sources.push(Source { fd: self.worker.limiter.fd(), token: TIMER });
        self.running = Some(running);
        Ok(sources)
    }

    fn handle(&mut self, token: u32) {
        let Some(running) = &mut self.running else { return };
        if token == TIMER {
            self.worker.limiter.clear();
            count(&self.worker.counters.rate_limiter_event_count, 1);
        } else {
            count(&self.worker.counters.entropy_event_count, 1);
        }
        running.serve(QUEUE, |memory, chain| self.worker.request(memory, chain));
    }

    fn stop(&mut self) -> Vec<Queue> {
        self.running.take().map(Running::stop).unwrap_or_default()
    }

    fn save(&self) -> DeviceState {
        DeviceState::Entropy(State { limiter: self.worker.limiter.save() })
    }
}

/// [`Rng`] as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    limiter: RateLimiterState,
}

/// What an entropy device has done since it was built.
#[derive(Debug, Default)]
pub struct Counters {
    /// Kicks taken in, and turns the device gave itself.
    pub entropy_event_count: AtomicU64,
    pub entropy_bytes: AtomicU64,
    /// Requests that got nothing since the host's kernel gave nothing.
    pub host_rng_fails: AtomicU64,
    /// Requests that were found waiting for the rate limiter.
    pub entropy_rate_limiter_throttled: AtomicU64,
    pub rate_limiter_event_count: AtomicU64,
}

const QUEUE: u16 = 0;
/// The token of the rate limiter's timer; queues have their index.
const TIMER: u32 = 1;

/// What serves requests; the device is its shell.
struct Worker {
    limiter: RateLimiter,
    counters: Arc<Counters>,
}

impl Worker {
    fn request(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<Step, QueueError> {
        let bytes = chain.writable.bytes().min(MAX_REQUEST_BYTES);
        if !self.limiter.take(bytes.into()) {
            count(&self.counters.entropy_rate_limiter_throttled, 1);
            return Ok(Step::Later);
        }
        let mut random = vec![0; bytes as usize];
        if let Err(error) = random::fill(&mut random) {
            log::error!("entropy device: the host gives no random bytes: {error}");
            count(&self.counters.host_rng_fails, 1);
            return Ok(Step::Used(0));
        }
        chain.writable.write(memory, &random)?;
        count(&self.counters.entropy_bytes, bytes.into());
        Ok(Step::Used(bytes))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::backend::rate_limiter::Bucket;
    use crate::virtio::queue::QueueState;
    use crate::virtio::testing::{self, Driver, EVENT_IDX, Slot, Used};

    fn rig(limits: Limits) -> (Slot<Rng>, Driver) {
        let memory = testing::ram(4 << 20);
        let driver = Driver::new(&memory, 0x1000, 256, EVENT_IDX);
        let mut slot = Slot::new(Rng::new(Config { limits }, None).unwrap(), &memory);
        slot.start(vec![driver.queue(0)], EVENT_IDX);
        slot.run(10);
        (slot, driver)
    }

    #[test]
    fn a_buffer_comes_back_full_of_random_bytes() {
        let (mut slot, mut driver) = rig(Limits::default());
        let (a, b) = (driver.room(64), driver.room(64));
        let head = driver.add(&[a, b]);
        slot.run(10);
        assert_eq!(driver.reap(), Some(Used { head, written: 128 }));
        assert_ne!(driver.read(a), [0; 64]);
        assert_ne!(driver.read(a), driver.read(b));
        assert_eq!(slot.calls.take_queue(), 1);
        assert_eq!(slot.device.counters().entropy_bytes.load(Ordering::Relaxed), 128);
    }

    #[test]
    fn a_huge_buffer_is_filled_at_its_front_only() {
        let (mut slot, mut driver) = rig(Limits::default());
        let huge = driver.room(1 << 20);
        driver.add(&[huge]);
        slot.run(10);
        assert_eq!(driver.reap().unwrap().written, MAX_REQUEST_BYTES);
        let data = driver.read(huge);
        assert_ne!(data[MAX_REQUEST_BYTES as usize - 32..][..32], [0; 32]);
        assert!(data[MAX_REQUEST_BYTES as usize..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn buffers_that_cannot_be_written_come_back_empty() {
        let (mut slot, mut driver) = rig(Limits::default());
        let readable = driver.data(b"seven");
        driver.add(&[readable]);
        let room = driver.room(8);
        driver.add(&[readable, room]);
        slot.run(10);
        assert_eq!(driver.reap_all().iter().map(|used| used.written).collect::<Vec<_>>(), [0, 8]);
        assert_eq!(driver.read(readable), b"seven");
        assert!(!slot.calls.broken());
    }

    #[test]
    fn a_whole_queue_of_requests_comes_back_in_turns() {
        let (mut slot, mut driver) = rig(Limits::default());
        let room = driver.room(64);
        for _ in 0..256 {
            driver.add(&[room]);
        }
        assert!(slot.run(300) >= 256 / crate::virtio::running::REQUESTS_PER_TURN);
        assert_eq!(driver.reap_all().len(), 256);
    }

    #[test]
    fn a_kick_for_nothing_is_answered_with_nothing() {
        let memory = testing::ram(1 << 20);
        let driver = Driver::new(&memory, 0x1000, 256, 0);
        let mut slot = Slot::new(Rng::new(Config { limits: Limits::default() }, None).unwrap(), &memory);
        slot.start(vec![driver.queue(0)], 0);
        slot.run(10);
        assert_eq!(slot.calls.take_queue(), 0);
    }

    #[test]
    fn rings_laid_over_one_another_do_not_keep_the_device_from_giving_way() {
        let memory = testing::ram(1 << 20);
        let mut queue = Driver::new(&memory, 0x1000, 256, 0).queue(0);
        // The used ring's flags are the available ring's index: asking for kicks makes a chain come, taking that back
        // makes it go.
        let state = QueueState { avail_ring: 0x2002, used_ring: 0x2004, next_avail: 1, ..queue.save() };
        queue.ring = state.ring().unwrap();
        let mut slot = Slot::new(Rng::new(Config { limits: Limits::default() }, None).unwrap(), &memory);
        slot.start(vec![queue], 0);
        assert_eq!(slot.run(10), 10);
    }

    #[test]
    fn a_limited_device_gets_done_in_its_time() {
        let bucket = Bucket { size: 64, one_time_burst: 0, refill_ms: 2 };
        let (mut slot, mut driver) = rig(Limits { bandwidth: Some(bucket), ops: None });
        let room = driver.room(64);
        for _ in 0..5 {
            driver.add(&[room]);
        }
        slot.run_until(|_| {
            driver.reap_all();
            driver.free_descriptors() == 256
        });
        assert!(slot.device.counters().entropy_bytes.load(Ordering::Relaxed) == 5 * 64);
    }

    #[test]
    fn new_limits_hold_from_now_on_and_a_request_that_waits_goes_when_they_are_lifted() {
        let (mut slot, mut driver) = rig(Limits::default());
        let room = driver.room(64);
        let ask = |slot: &mut Slot<Rng>, driver: &mut Driver| {
            driver.add(&[room]);
            slot.run(10);
            driver.reap_all().len()
        };
        assert_eq!(ask(&mut slot, &mut driver), 1);
        let ops = Some(Bucket { size: 1, one_time_burst: 0, refill_ms: u64::from(u32::MAX) });
        slot.device.set_limits(Limits { bandwidth: None, ops });
        assert_eq!(ask(&mut slot, &mut driver), 1, "the bucket is full");
        assert_eq!(ask(&mut slot, &mut driver), 0);
        let queues = slot.stop();
        slot.device.set_limits(Limits::default());
        slot.start(queues, EVENT_IDX);
        slot.run_until(|_| !driver.reap_all().is_empty());
        slot.device.set_limits(Limits { bandwidth: None, ops });
        assert_eq!([ask(&mut slot, &mut driver), ask(&mut slot, &mut driver)], [1, 0]);
        slot.device.set_limits(Limits::default());
        slot.run_until(|_| !driver.reap_all().is_empty());
    }

    #[test]
    fn a_driver_that_breaks_the_rules_is_told_to_reset_and_costs_nothing_more() {
        let (mut slot, driver) = rig(Limits::default());
        driver.set_avail_index(500);
        driver.kick.write(1).unwrap();
        assert!(slot.run(10) < 10);
        assert!(slot.calls.broken());
        assert_eq!(slot.stop().len(), 1);
        assert!(slot.stop().is_empty());
    }
}
