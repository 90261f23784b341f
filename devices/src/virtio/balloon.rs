//! The memory balloon (VIRTIO 1.3, section 5.5): the guest gives memory up, and what it has given up goes back to the host.
//!
//! Three ways lead there. The driver inflates the balloon to the size that the host asks for, and names the pages; it
//! hints at its free pages, once, when it is asked to; or it reports pages as they become free, by itself. Each is a
//! promise of the guest about its own memory: a guest that lies harms nobody else, as what it touches comes back as zeros.
//!
//! Does not decide how large the balloon should be, and takes nothing from a guest that gives nothing: a host must have the
//! memory that the guest was started with.

mod hinting;
mod statistics;
#[cfg(test)]
mod tests;

use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::timerfd::TimerFd;

use self::hinting::Hinting;
pub use self::hinting::HintingStatus;
pub use self::statistics::{MAX_STATISTICS, Statistics};
use crate::host::Source;
use crate::memory::GuestRam;
use crate::virtio::device::{
    Active, DeviceState, DeviceType, Identity, StartError, VirtioDevice, read_space,
};
use crate::virtio::queue::{Chain, Queue, QueueError, Segments};
use crate::virtio::reclaim::{self, Refused};
pub use crate::virtio::reclaim::{PAGE, Ram};
use crate::virtio::running::{Running, Step, count};

const QUEUE_SIZE: u16 = 256;

/// Most pages that one request is read of; Linux names 256 at a time. What is beyond is left as it is.
pub const MAX_REQUEST_PAGES: usize = 1024;

/// Most bytes that one report or hint gives up: 32 blocks of 4 MiB, which is what Linux reports at a time. Giving up takes
/// the host some 100 ns a page.
pub const MAX_REQUEST_BYTES: u64 = 128 << 20;

/// Feature bits (5.5.3).
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_FREE_PAGE_HINT: u64 = 1 << 3;
const F_PAGE_POISON: u64 = 1 << 4;
const F_PAGE_REPORTING: u64 = 1 << 5;

/// Fields of `struct virtio_balloon_config` (5.5.4), by their offset; each has four bytes.
const ACTUAL: u64 = 4;
const POISON: u64 = 12;

/// What a balloon is made of.
pub struct Config {
    /// The size that the balloon is to have, in pages of 4 KiB.
    pub target_pages: u32,
    /// The guest may take pages out of the balloon before it kills a process for want of memory.
    pub deflate_on_oom: bool,
    /// The time between two readings of the guest's statistics; `None` for no statistics ever.
    pub statistics_interval: Option<Duration>,
    pub hinting: bool,
    pub reporting: bool,
    /// What may be given back. Other guest memory, as a file of persistent memory, is left alone.
    pub ram: Ram,
}

/// The balloon.
pub struct Balloon {
    features: u64,
    target: u32,
    actual: u32,
    interval: Option<Duration>,
    /// There is one when there are statistics.
    timer: Option<TimerFd>,
    /// What the driver agreed on when it was last started.
    agreed: u64,
    /// The driver has not been told yet of a change in the configuration space.
    changed: bool,
    worker: Worker,
    running: Option<Running>,
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hinting,
    Reporting,
}

impl Balloon {
    /// A stopped device, or, with a state, the one that was saved.
    pub fn new(config: Config, state: Option<State>) -> io::Result<Balloon> {
        let optional = [
            (config.statistics_interval.is_some(), F_STATS_VQ),
            (config.deflate_on_oom, F_DEFLATE_ON_OOM),
            (config.hinting, F_FREE_PAGE_HINT),
            (config.reporting, F_PAGE_REPORTING),
            // Of use to those two alone: what the guest wants to find in a page that it gave away and took again.
            (config.hinting || config.reporting, F_PAGE_POISON),
        ];
        let features = optional.iter().filter(|(wanted, _)| *wanted).map(|(_, bit)| bit).sum();
        let fresh = State { target: config.target_pages, ..State::default() };
        let state = state.unwrap_or(fresh);
        let interval = config
            .statistics_interval
            .map(|interval| state.interval_ms.filter(|ms| *ms > 0).map_or(interval, Duration::from_millis));
        let mut balloon = Balloon {
            features,
            target: state.target,
            actual: state.actual,
            interval,
            timer: interval.map(|_| TimerFd::new()).transpose()?,
            agreed: state.agreed & features,
            changed: state.changed,
            worker: Worker {
                ram: config.ram,
                poison: state.poison,
                hinting: state.hinting,
                statistics: Statistics::default(),
                counters: Arc::default(),
            },
            running: None,
        };
        balloon.set_timer();
        Ok(balloon)
    }

    /// The size that the balloon is to have from now on, in pages of 4 KiB. The driver is told at once, or when it runs
    /// again.
    pub fn set_target(&mut self, pages: u32) {
        self.target = pages;
        self.announce();
    }

    /// The size that the balloon is to have, and the one that the driver says it has, in pages of 4 KiB.
    pub fn pages(&self) -> (u32, u32) {
        (self.target, self.actual)
    }

    /// Another time between two readings of the statistics. For a device without statistics it does nothing.
    pub fn set_statistics_interval(&mut self, interval: Duration) {
        if let Some(before) = &mut self.interval {
            *before = interval;
        }
        self.set_timer();
    }

    /// What the guest said last of its memory.
    pub fn statistics(&self) -> &Statistics {
        &self.worker.statistics
    }

    /// Asks the driver to hint at all its free pages. With `acknowledge`, the guest gets them back as soon as it has named
    /// the last one; otherwise with [`Balloon::stop_hinting`]. False when the driver has not agreed on hints.
    pub fn start_hinting(&mut self, acknowledge: bool) -> bool {
        if self.agreed & F_FREE_PAGE_HINT == 0 {
            return false;
        }
        self.worker.hinting.start(acknowledge);
        self.announce();
        true
    }

    /// Ends a run of hints, and lets the guest have its pages again. False when the driver has not agreed on hints.
    pub fn stop_hinting(&mut self) -> bool {
        if self.agreed & F_FREE_PAGE_HINT == 0 {
            return false;
        }
        self.worker.hinting.stop();
        self.announce();
        true
    }

    /// How far the run of hints is.
    pub fn hinting(&self) -> HintingStatus {
        self.worker.hinting.status()
    }

    /// What the device has done since it was built.
    pub fn counters(&self) -> Arc<Counters> {
        self.worker.counters.clone()
    }

    fn announce(&mut self) {
        self.changed = true;
        if let Some(running) = &self.running {
            self.changed = false;
            running.interrupt.config();
        }
    }

    /// Also takes the timer's readiness away, and unlike reading it never blocks.
    fn set_timer(&mut self) {
        if let (Some(timer), Some(interval)) = (&mut self.timer, self.interval)
            && let Err(error) = timer.reset(interval, None)
        {
            log::error!("balloon: cannot set the timer to {interval:?}: {error}");
        }
    }

    /// Queues that nobody agreed on have no number, and those after them move up: so do drivers count (Linux does), and
    /// 5.5.2 says only that such a queue does not exist.
    fn role(&self, index: u32) -> Option<Role> {
        let queues = [
            (true, Role::Inflate),
            (true, Role::Deflate),
            (self.agreed & F_STATS_VQ != 0, Role::Statistics),
            (self.agreed & F_FREE_PAGE_HINT != 0, Role::Hinting),
            (self.agreed & F_PAGE_REPORTING != 0, Role::Reporting),
        ];
        let mut roles = queues.into_iter().filter(|(exists, _)| *exists).map(|(_, role)| role);
        roles.nth(usize::try_from(index).ok()?)
    }

    fn statistics_queue(&self) -> Option<u16> {
        (self.agreed & F_STATS_VQ != 0).then_some(2)
    }

    /// Gives the driver its buffer back, which asks for fresh numbers.
    fn ask_for_statistics(&mut self) {
        self.set_timer();
        let (Some(queue), Some(running)) = (self.statistics_queue(), &mut self.running) else { return };
        let mut asked = false;
        running.serve(queue, |memory, chain| match mem::replace(&mut asked, true) {
            false => Ok(Step::Used(0)),
            true => self.worker.request(Role::Statistics, memory, chain),
        });
    }
}

impl VirtioDevice for Balloon {
    fn identity(&self) -> Identity {
        let optional = [F_STATS_VQ, F_FREE_PAGE_HINT, F_PAGE_REPORTING];
        let queues = 2 + optional.iter().filter(|bit| self.features & **bit != 0).count();
        let features = self.features | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
        Identity {
            device_type: DeviceType::Balloon,
            features,
            queue_sizes: vec![QUEUE_SIZE; queues],
            config_bytes: 16,
        }
    }

    fn config(&self, offset: u64, data: &mut [u8]) {
        let space = [self.target, self.actual, self.worker.hinting.command(), self.worker.poison];
        read_space(space.map(u32::to_le_bytes).as_flattened(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let written = (offset..=u64::MAX).zip(data);
        for (at, value) in written {
            let (field, byte) = match at {
                ACTUAL..8 => (&mut self.actual, at - ACTUAL),
                POISON..16 => (&mut self.worker.poison, at - POISON),
                _ => continue,
            };
            let shift = 8 * byte;
            *field = *field & !(0xff << shift) | u32::from(*value) << shift;
        }
    }

    fn start(&mut self, active: Active) -> Result<Vec<Source>, StartError> {
        self.agreed = active.features & self.features;
        let (running, mut sources) = Running::start(active, self.identity().queue_sizes.len())?;
        sources.extend(self.timer.iter().map(|timer| Source { fd: timer.as_raw_fd(), token: TIMER }));
        if mem::take(&mut self.changed) {
            running.interrupt.config();
        }
        self.running = Some(running);
        Ok(sources)
    }

    fn handle(&mut self, token: u32) {
        if token == TIMER {
            return self.ask_for_statistics();
        }
        let role = self.role(token);
        let (Some(running), Ok(queue)) = (&mut self.running, u16::try_from(token)) else { return };
        // A driver can enable and kick a queue that it has not agreed on: a kick that is not taken in comes for ever.
        let Some(role) = role else { return running.clear_kick(queue) };
        let before = self.worker.hinting.command();
        running.serve(queue, |memory, chain| self.worker.request(role, memory, chain));
        if self.worker.hinting.command() != before {
            self.announce();
        }
    }

    fn stop(&mut self) -> Vec<Queue> {
        self.running.take().map(Running::stop).unwrap_or_default()
    }

    /// The size that is wanted stays: another driver will be told of it.
    fn reset(&mut self) {
        self.actual = 0;
        self.agreed = 0;
        self.worker.poison = 0;
        self.worker.hinting = Hinting::default();
        self.worker.statistics = Statistics::default();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Balloon(State {
            target: self.target,
            actual: self.actual,
            poison: self.worker.poison,
            agreed: self.agreed,
            changed: self.changed,
            hinting: self.worker.hinting,
            interval_ms: self.interval.map(|interval| interval.as_millis().try_into().unwrap_or(u64::MAX)),
        })
    }
}

/// [`Balloon`] as it is saved. The guest's statistics are not: they lie in its queue, and are read again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    target: u32,
    actual: u32,
    poison: u32,
    agreed: u64,
    changed: bool,
    hinting: Hinting,
    interval_ms: Option<u64>,
}

/// What a balloon has done since it was built.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests to take pages, and to give them back.
    pub inflate_count: AtomicU64,
    pub deflate_count: AtomicU64,
    /// Pages that were named and are none, or which the host would not take.
    pub event_fails: AtomicU64,
    pub stats_updates_count: AtomicU64,
    /// Statistics that made no sense.
    pub stats_update_fails: AtomicU64,
    /// Ranges of free pages that were reported, the bytes that went back to the host, and the ranges that could not.
    pub free_page_report_count: AtomicU64,
    pub free_page_report_freed: AtomicU64,
    pub free_page_report_fails: AtomicU64,
    /// The same for hints.
    pub free_page_hint_count: AtomicU64,
    pub free_page_hint_freed: AtomicU64,
    pub free_page_hint_fails: AtomicU64,
}

/// The token of the statistics' timer; queues have their index.
const TIMER: u32 = 5;

/// What serves requests; the device is its shell.
struct Worker {
    ram: Ram,
    /// What the guest wants to find in a free page that it takes again; 0 where it does not care.
    poison: u32,
    hinting: Hinting,
    statistics: Statistics,
    counters: Arc<Counters>,
}

impl Worker {
    fn request(&mut self, role: Role, memory: &GuestRam, chain: &mut Chain) -> Result<Step, QueueError> {
        match role {
            Role::Inflate => self.inflate(memory, chain)?,
            // Nothing to do: what the guest touches is there.
            Role::Deflate => count(&self.counters.deflate_count, 1),
            Role::Statistics => {
                self.read_statistics(memory, chain)?;
                // The buffer stays with us until the numbers are old.
                return Ok(Step::Later);
            }
            Role::Hinting => self.hint(memory, chain)?,
            Role::Reporting => self.report(memory, &chain.writable),
        }
        Ok(Step::Used(0))
    }

    fn inflate(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<(), QueueError> {
        let counters = &self.counters;
        count(&counters.inflate_count, 1);
        let named = chain.readable.bytes() as usize / 4;
        let mut numbers = vec![[0; 4]; named.min(MAX_REQUEST_PAGES)];
        chain.readable.read(memory, numbers.as_flattened_mut())?;
        let pages = numbers.into_iter().map(u32::from_le_bytes);
        let pages: Vec<_> = pages.filter(|page| self.ram.has_page(*page)).collect();
        let mut refused = (named - pages.len()) as u64;
        for run in reclaim::runs(pages) {
            refused += match self.ram.give_back(memory, run.clone()) {
                Ok(_) => 0,
                Err(Refused) => (run.end - run.start) / PAGE,
            };
        }
        count(&counters.event_fails, refused);
        Ok(())
    }

    fn read_statistics(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<(), QueueError> {
        let counter = match self.statistics.read(memory, &mut chain.readable)? {
            true => &self.counters.stats_updates_count,
            false => &self.counters.stats_update_fails,
        };
        count(counter, 1);
        Ok(())
    }

    /// The number of a run, its end, or free pages of it.
    fn hint(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<(), QueueError> {
        if chain.readable.bytes() > 0 {
            let mut command = [0; 4];
            match chain.readable.bytes() {
                4.. => {
                    chain.readable.read(memory, &mut command)?;
                    self.hinting.heard(u32::from_le_bytes(command));
                }
                _ => count(&self.counters.free_page_hint_fails, 1),
            }
        }
        // Late ones may be in use again.
        let free = if self.hinting.is_current() { &chain.writable } else { &Segments::default() };
        let counters = &self.counters;
        let told =
            [&counters.free_page_hint_count, &counters.free_page_hint_freed, &counters.free_page_hint_fails];
        self.give_back(memory, free, told);
        Ok(())
    }

    fn report(&self, memory: &GuestRam, free: &Segments) {
        let counters = &self.counters;
        let told = [
            &counters.free_page_report_count,
            &counters.free_page_report_freed,
            &counters.free_page_report_fails,
        ];
        self.give_back(memory, free, told);
    }

    /// Counts ranges, bytes given back, and ranges that were refused.
    fn give_back(&self, memory: &GuestRam, free: &Segments, [ranges, freed, fails]: [&AtomicU64; 3]) {
        let mut left = MAX_REQUEST_BYTES;
        for segment in free.list() {
            count(ranges, 1);
            let len = u64::from(segment.len);
            // A page that must not come back as zeros stays (5.5.6.6.1).
            let outcome = match left.checked_sub(len) {
                Some(rest) if self.poison == 0 => {
                    left = rest;
                    self.ram.give_back(memory, segment.address.0..segment.address.0.saturating_add(len))
                }
                _ => Err(Refused),
            };
            match outcome {
                Ok(bytes) => count(freed, bytes),
                Err(Refused) => count(fails, 1),
            }
        }
    }
}
