//! What every running device does with its queues: pops, asks the device to serve, pushes, interrupts; gives way to others
//! after a fair turn; and stops when the driver breaks the rules.
//!
//! Does not know what a request means. One turn is one call: nothing here waits or keeps a thread.

use std::fmt::Display;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

use crate::host::Source;
use crate::memory::{GuestRam, Memory};
use crate::virtio::device::{Active, Interrupt, StartError};
use crate::virtio::queue::{Chain, Queue, QueueError};

/// Most requests one queue is served per turn, and the time after which no other one is begun: a turn of small requests
/// on a fast host ends by their number, one of flushes or large transfers by the clock. Devices share an io thread unless
/// they are given others, so one that is busy comes back to its queue after the others.
pub const REQUESTS_PER_TURN: usize = 64;
#[cfg(not(test))]
pub const TIME_PER_TURN: Duration = Duration::from_millis(5);
/// Unit tests expect whole turns: longer than a loaded machine takes a thread's processor away.
#[cfg(test)]
pub const TIME_PER_TURN: Duration = Duration::from_millis(100);

/// A device's queues between start and stop, and what belongs to them.
pub struct Running {
    pub interrupt: Arc<dyn Interrupt>,
    memory: Memory,
    queues: Vec<Queue>,
    broken: bool,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Done, with this many bytes written to it.
    Used(u32),
    /// It has to wait for something else than the driver: it goes back, and so does the turn. The device serves the queue
    /// again when the time has come; until then no kick is needed.
    Later,
    /// The device keeps it and gives it back in a [`Running::turn`] of later on.
    Kept,
}

/// What is done with the requests of a queue in a turn. A closure is one that does not pause.
pub trait Serve {
    /// One request. An error is the driver's fault.
    fn request(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<Step, QueueError>;

    /// Whether others may run before the next look at the queue: what is kept is under way by then, and nothing waits for the
    /// end of the turn.
    fn may_pause(&mut self) -> bool;
}

impl<F: FnMut(&GuestRam, &mut Chain) -> Result<Step, QueueError>> Serve for F {
    fn request(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<Step, QueueError> {
        self(memory, chain)
    }

    fn may_pause(&mut self) -> bool {
        false
    }
}

impl Running {
    /// Takes over `active` for a device with `needed` queues. The sources are the doorbells of the enabled queues, with
    /// the queue's index as token.
    pub fn start(active: Active, needed: usize) -> Result<(Running, Vec<Source>), StartError> {
        let got = active.queues.len();
        if got != needed {
            return Err(StartError::Queues { got, needed });
        }
        let ready = active.queues.iter().filter(|queue| queue.ring.ready());
        let sources =
            ready.map(|queue| Source { fd: queue.kick.as_raw_fd(), token: queue.index.into() }).collect();
        let Active { memory, queues, features: _, interrupt } = active;
        Ok((Running { interrupt, memory, queues, broken: false }, sources))
    }

    /// The queues, in their order.
    pub fn stop(self) -> Vec<Queue> {
        self.queues
    }

    /// The driver broke the rules: nothing is served any more.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The driver broke the rules in a way that is seen elsewhere than in [`Running::turn`].
    pub fn fail(&mut self, reason: &dyn Display) {
        self.broken = true;
        self.interrupt.needs_reset(reason);
    }

    /// Where the chains are.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The queue with this index if the driver has enabled it; for a device that has it served by somebody else.
    pub fn queue(&self, index: u16) -> Option<&Queue> {
        self.queues.get(usize::from(index)).filter(|queue| queue.ring.ready())
    }

    /// The same, to say how far that one has come.
    pub fn queue_mut(&mut self, index: u16) -> Option<&mut Queue> {
        self.queues.get_mut(usize::from(index)).filter(|queue| queue.ring.ready())
    }

    /// The driver has enabled the queue with this index, and it is served.
    pub fn is_ready(&self, index: u16) -> bool {
        !self.broken && self.queues.get(usize::from(index)).is_some_and(|queue| queue.ring.ready())
    }

    /// Takes in the kicks of the queue with this index.
    pub fn clear_kick(&self, index: u16) {
        if let Some(queue) = self.queues.get(usize::from(index)) {
            queue.clear_kick();
        }
    }

    /// Rings the queue with this index for the driver.
    pub fn ring(&self, index: u16) {
        if let Some(queue) = self.queues.get(usize::from(index)) {
            queue.rearm();
        }
    }

    /// Takes back the last pops of the queue with this index, before it is stopped.
    pub fn undo_pops(&mut self, index: u16, chains: impl IntoIterator<Item = Chain>) {
        if let Some(queue) = self.queues.get_mut(usize::from(index)) {
            chains.into_iter().for_each(|chain| queue.undo_pop(chain));
        }
    }

    /// Takes one turn at the queue with this index: calls `request` for each chain until there is none, the turn is over
    /// (then the queue rings itself) or a request must wait. Errors are as in [`Running::turn`].
    pub fn serve(
        &mut self,
        index: u16,
        mut request: impl FnMut(&GuestRam, &mut Chain) -> Result<Step, QueueError>,
    ) {
        self.clear_kick(index);
        self.turn(index, |turn| turn.serve(&mut request));
    }

    /// As [`Running::serve`], for a device whose driver makes many requests one after the other: between two looks at the
    /// queue it lets others run, while that pays (`batching`).
    pub fn serve_batches(&mut self, index: u16, server: &mut impl Serve) {
        self.clear_kick(index);
        self.turn(index, |turn| turn.serve(server));
    }

    /// Takes one turn at the queue with this index, for a device that pops and pushes by itself. It does not take in
    /// kicks. An error is the driver's fault: DEVICE_NEEDS_RESET, and nothing more happens until then.
    pub fn turn(&mut self, index: u16, work: impl FnOnce(&mut Turn) -> Result<(), QueueError>) {
        let Some(queue) = self.queues.get_mut(usize::from(index)) else { return };
        if self.broken || !queue.ring.ready() {
            return;
        }
        let memory = self.memory.memory();
        let mut turn = Turn { queue, memory: &memory, line: &*self.interrupt };
        let result = turn.queue.check(&memory).and_then(|()| work(&mut turn));
        // Also after an error: what was done before it is done.
        let interrupt = turn.interrupt();
        if let Err(error) = result.and(interrupt) {
            self.broken = true;
            self.interrupt.needs_reset(&format_args!("the driver broke the rules of queue {index}: {error}"));
        }
    }
}

/// A queue that is being served, and the memory its chains are in.
pub struct Turn<'a> {
    pub queue: &'a mut Queue,
    pub memory: &'a GuestRam,
    line: &'a dyn Interrupt,
}

impl Turn<'_> {
    fn serve(&mut self, server: &mut impl Serve) -> Result<(), QueueError> {
        let (mut requests, begin) = (0, Instant::now());
        loop {
            self.queue.disable_kicks(self.memory)?;
            let before = requests;
            loop {
                if requests >= REQUESTS_PER_TURN || requests > 0 && begin.elapsed() >= TIME_PER_TURN {
                    self.queue.rearm();
                    return Ok(());
                }
                let Some(mut chain) = self.queue.pop(self.memory)? else { break };
                requests += 1;
                match server.request(self.memory, &mut chain)? {
                    Step::Used(written) => self.queue.push(self.memory, chain.head, written)?,
                    Step::Kept => {}
                    Step::Later => {
                        self.queue.undo_pop(chain);
                        return Ok(());
                    }
                }
            }
            if server.may_pause() && self.lets_others_run(requests - before)? {
                continue;
            }
            // Looking once more counts too: a driver that lays its rings over one another makes asking for kicks change
            // the available index, and would keep us here for ever.
            requests += 1;
            if !self.queue.enable_kicks(self.memory)? {
                return Ok(());
            }
        }
    }

    /// A look at the queue found so many requests, which are done or under way, and now it is empty. True when the driver has been
    /// told, others have had the processor, and the queue is to be looked at again.
    fn lets_others_run(&mut self, found: usize) -> Result<bool, QueueError> {
        let begin = Instant::now();
        if !self.queue.batching.pays_after(found as u32, begin) {
            return Ok(false);
        }
        self.interrupt()?;
        thread::yield_now();
        self.queue.batching.ran(begin.elapsed());
        Ok(true)
    }

    fn interrupt(&mut self) -> Result<(), QueueError> {
        if self.queue.wants_interrupt(self.memory)? {
            self.line.queue(self.queue.index);
        }
        Ok(())
    }
}

/// Adds to a counter that others only read.
pub(crate) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Calls, Driver, EVENT_IDX, ram};
    use std::sync::Mutex;
    use vmm_sys_util::eventfd::EventFd;

    /// A queue of sixteen with everything in it made available, and how it is served.
    fn full() -> (Running, Driver, Arc<Calls>) {
        let (memory, calls) = (ram(1 << 16), Arc::<Calls>::default());
        let mut driver = Driver::new(&memory, 0x1000, 16, EVENT_IDX);
        let room = driver.room(1);
        while driver.free_descriptors() > 0 {
            driver.add(&[room]);
        }
        let queues = vec![driver.queue(0)];
        let active = Active { memory, queues, features: EVENT_IDX, interrupt: calls.clone() };
        let (running, sources) = Running::start(active, 1).unwrap();
        assert_eq!(sources.len(), 1);
        (running, driver, calls)
    }

    #[test]
    fn a_turn_of_slow_requests_is_over_after_its_time_and_the_rest_comes_in_others() {
        let (mut running, mut driver, calls) = full();
        let slow = |running: &mut Running| {
            running.serve(0, |_, _| {
                std::thread::sleep(TIME_PER_TURN);
                Ok(Step::Used(0))
            });
        };
        driver.kick.read().unwrap();
        for _ in 0..16 {
            slow(&mut running);
            assert_eq!(driver.reap_all().len(), 1);
            assert_eq!(calls.take_queue(), 1);
            assert!(driver.kick.read().is_ok(), "it rings itself");
        }
        slow(&mut running);
        assert!(driver.reap_all().is_empty() && driver.kick.read().is_err(), "then it rests");
    }

    /// A driver that answers its first interrupt with two more requests and no kick.
    struct Eager(Mutex<(Driver, bool)>);

    impl Interrupt for Eager {
        fn queue(&self, _: u16) {
            let (driver, has_answered) = &mut *self.0.lock().unwrap();
            if !std::mem::replace(has_answered, true) {
                let room = driver.room(1);
                driver.add(&[room]);
                driver.add(&[room]);
            }
        }

        fn trigger(&self, _: u16) -> Option<EventFd> {
            None
        }

        fn config(&self) {}

        fn needs_reset(&self, reason: &dyn Display) {
            panic!("{reason}");
        }
    }

    #[test]
    fn what_the_driver_asks_for_when_it_is_told_is_found_without_a_kick() {
        let memory = ram(1 << 16);
        let mut driver = Driver::new(&memory, 0x1000, 16, EVENT_IDX);
        let room = driver.room(1);
        driver.add(&[room]);
        let queues = vec![driver.queue(0)];
        let interrupt = Arc::new(Eager(Mutex::new((driver, false))));
        let active = Active { memory, queues, features: EVENT_IDX, interrupt };
        let (mut running, _) = Running::start(active, 1).unwrap();
        let mut counts = Counts { served: 0, may_pause: true };
        running.serve_batches(0, &mut counts);
        assert_eq!(counts.served, 1 + 2);
    }

    /// Counts what it serves.
    struct Counts {
        served: u32,
        may_pause: bool,
    }

    impl Serve for Counts {
        fn request(&mut self, _: &GuestRam, _: &mut Chain) -> Result<Step, QueueError> {
            self.served += 1;
            Ok(Step::Used(0))
        }

        fn may_pause(&mut self) -> bool {
            self.may_pause
        }
    }

    #[test]
    fn nobody_else_runs_while_something_waits_for_the_end_of_the_turn() {
        for may_pause in [true, false] {
            let (mut running, _driver, _calls) = full();
            running.serve_batches(0, &mut Counts { served: 0, may_pause });
            assert_eq!(running.queues[0].batching.has_tried(), may_pause);
        }
    }

    #[test]
    fn a_request_that_waits_keeps_its_place() {
        let (mut running, mut driver, calls) = full();
        let mut left = 3;
        running.serve(0, |_, _| {
            left -= 1;
            Ok(if left < 0 { Step::Later } else { Step::Used(0) })
        });
        assert_eq!(driver.reap_all().len(), 3);
        assert_eq!(calls.take_queue(), 1);
        assert!(driver.kick.read().is_err(), "its time comes from elsewhere");
        running.serve(0, |_, _| Ok(Step::Used(0)));
        assert_eq!(driver.reap_all().len(), 13);
    }

    #[test]
    fn a_queue_that_does_not_exist_is_not_served() {
        let (mut running, ..) = full();
        running.serve(1, |_, _| unreachable!());
    }
}
