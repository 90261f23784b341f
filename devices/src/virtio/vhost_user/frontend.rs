//! What every device with a back-end does: the driver's requests go to it and come back, and when it goes, another one gets
//! what is left.
//!
//! Who runs here and for how long: the io thread takes what is there and never waits. A vCPU or the control thread that
//! stops the device waits until the back-end has done what it has, at most [`STOP_LIMIT`]; one that is slower is let go, and
//! what it has not done is done again by the next. While there is none, nothing waits at all.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::mem;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::timerfd::TimerFd;

use super::message::{self, Inbox, Lie, READ_BYTES};
use super::ring::{Ring, RingMemory, shared_regions};
use super::session::{Connect, Lost, REPLY_LIMIT, RingPlan, Session, wait_ms};
use crate::host::Source;
use crate::memory::{GuestRam, Memory};
use crate::virtio::device::{Active, StartError};
use crate::virtio::queue::{Queue, QueueError};
use crate::virtio::running::{Running, count};

/// How long a device that stops waits for what the back-end has. A pause of the machine and a reset by the driver take that
/// much longer at worst, so it is short; disks answer in far less.
pub const STOP_LIMIT: Duration = Duration::from_secs(3);

/// The first wait before connecting again, and the longest: each is twice the one before.
pub const FIRST_WAIT: Duration = Duration::from_millis(100);
pub const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// A back-end that has served so long is not one that keeps dying.
const STEADY: Duration = Duration::from_secs(10);

/// Looks at a driver's ring in one turn: one more than it may have to, as each finds something.
const LOOKS_PER_TURN: usize = 4;

/// The token of everything that concerns the back-end; queues have their index.
pub const BACKEND: u32 = u32::MAX;
/// What is watched behind it; calls have their ring's index.
const SOCKET: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
const CALLS: u64 = u64::MAX - 2;

/// What a front-end is made of.
pub struct Config {
    /// Names device and back-end in the log.
    pub name: String,
    /// To a back-end that has said who it is.
    pub session: Session,
    pub connect: Connect,
    /// Two ends of a stream, by which back-ends may say that their configuration has changed. The first is ours, and does not
    /// block.
    pub calls: (UnixStream, UnixStream),
    /// Memory for the rings: `ring::bytes` of it, shared, that nobody can make smaller.
    pub rings: File,
    /// Features that the driver is offered, and that any back-end must have.
    pub needed: u64,
    pub queues: u16,
    /// Of each ring, requests that are to be done again, the oldest first.
    pub unfinished: Vec<Vec<u16>>,
}

/// See the module.
pub struct Frontend {
    name: String,
    connect: Connect,
    needed: u64,
    counters: Arc<Counters>,

    session: Option<Session>,
    stage: Stage,
    calls: (UnixStream, UnixStream),
    calls_heard: Inbox,
    config: Vec<u8>,
    config_is_new: bool,
    memory: RingMemory,
    rings: Vec<Ring>,
    /// The session's socket, the calls of all rings, the other calls, the timer.
    events: Epoll,
    timer: TimerFd,
    wait: Duration,
    served_since: Option<Instant>,
    handed_at: Option<Instant>,
    /// Why there is none, as it was told.
    told: Option<String>,
    unfinished: Vec<Vec<u16>>,
    running: Option<Run>,
}

/// How far a session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It has not said yet who it is.
    Introducing,
    /// It has nothing of the guest's.
    Idle,
    /// It was given memory and rings, and has not confirmed all of it.
    Starting,
    Serving,
}

struct Run {
    queues: Running,
    memory: Memory,
    features: u64,
    /// Where the descriptors of each queue are; `None` for one that the driver has not enabled.
    descriptors: Vec<Option<u64>>,
}

/// What a front-end has done since it was built.
#[derive(Debug, Default)]
pub struct Counters {
    /// Starts that failed, and readings of the configuration.
    pub activate_fails: AtomicU64,
    pub cfg_fails: AtomicU64,
    /// How long the last of each took.
    pub init_time_us: AtomicU64,
    pub activate_time_us: AtomicU64,
    pub config_change_time_us: AtomicU64,
    /// Kicks of the driver taken in, and calls of the back-end.
    pub queue_event_count: AtomicU64,
    pub call_event_count: AtomicU64,
    /// Requests given back to the driver.
    pub requests_count: AtomicU64,
    pub backend_lost_count: AtomicU64,
    /// Requests that another back-end was given again.
    pub requests_repeated_count: AtomicU64,
}

impl Frontend {
    /// A stopped one.
    pub fn new(config: Config) -> Result<Frontend, Lost> {
        let Config { name, session, connect, calls, rings: file, needed, queues, mut unfinished } = config;
        check(&session, needed, queues)?;
        unfinished.resize(queues.into(), Vec::new());
        let rings = (0..queues).map(Ring::new).collect::<Result<Vec<_>, _>>()?;
        let (events, timer) = (Epoll::new()?, TimerFd::new().map_err(std::io::Error::from)?);
        let watch = |fd, token| events.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token));
        watch(session.fd(), SOCKET)?;
        watch(timer.as_raw_fd(), TIMER)?;
        watch(calls.0.as_raw_fd(), CALLS)?;
        for (index, ring) in (0..).zip(&rings) {
            watch(ring.call.as_raw_fd(), index)?;
        }
        Ok(Frontend {
            name,
            connect,
            needed,
            counters: Arc::default(),
            config: session.config().to_vec(),
            config_is_new: false,
            session: Some(session),
            stage: Stage::Idle,
            calls,
            calls_heard: Inbox::default(),
            memory: RingMemory::new(file, queues)?,
            rings,
            events,
            timer,
            wait: FIRST_WAIT,
            served_since: None,
            handed_at: None,
            told: None,
            unfinished,
            running: None,
        })
    }

    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// The configuration space of the last back-end.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// The driver is to be told of the configuration space.
    pub fn announce(&mut self) {
        self.config_is_new = true;
        self.tell_driver();
    }

    /// Requests of each ring that are not done. While stopped.
    pub fn unfinished(&self) -> &[Vec<u16>] {
        &self.unfinished
    }

    /// Nothing of the driver's is left to do.
    pub fn forget(&mut self) {
        self.unfinished.iter_mut().for_each(Vec::clear);
    }

    /// See `VirtioDevice::start`.
    pub fn start(&mut self, active: Active) -> Result<Vec<Source>, StartError> {
        self.try_start(active).inspect_err(|_| count(&self.counters.activate_fails, 1))
    }

    fn try_start(&mut self, active: Active) -> Result<Vec<Source>, StartError> {
        let (memory, features) = (active.memory.clone(), active.features);
        let mut descriptors = vec![None; self.rings.len()];
        for (queue, (ring, unfinished)) in
            active.queues.iter().zip(self.rings.iter_mut().zip(&self.unfinished))
        {
            let (size, table) = (queue.ring.size(), queue.ring.desc_table());
            if !queue.ring.ready() {
                continue;
            }
            if !ring.reset(size, unfinished) {
                return Err(refused(format!("queue {} cannot have had those requests", queue.index)));
            }
            if !is_shared(&memory.memory(), table, u64::from(size) * 16) {
                return Err(refused(format!(
                    "the descriptors of queue {} are in no shared memory",
                    queue.index
                )));
            }
            if let Some(place) = descriptors.get_mut(usize::from(queue.index)) {
                *place = Some(table);
            }
        }
        let (queues, mut sources) = Running::start(active, self.rings.len())?;
        sources.push(Source { fd: self.events.as_raw_fd(), token: BACKEND });
        self.running = Some(Run { queues, memory, features, descriptors });
        self.tell_driver();
        match (&self.session, self.stage) {
            (Some(_), Stage::Introducing) => self.set_timer(Some(REPLY_LIMIT)),
            (Some(_), _) => self.hand_over(),
            (None, _) => self.set_timer(Some(FIRST_WAIT)),
        }
        Ok(sources)
    }

    /// See `VirtioDevice::handle`.
    pub fn handle(&mut self, token: u32) {
        match u16::try_from(token) {
            Ok(index) => self.submit(index),
            Err(_) => self.take_events(0),
        }
    }

    /// See `VirtioDevice::stop`.
    pub fn stop(&mut self) -> Vec<Queue> {
        if self.running.is_none() {
            return Vec::new();
        }
        self.drain();
        // One that has not said yet who it is can do so later: to begin anew after each of many pauses would be for ever.
        self.set_timer(None);
        let Some(run) = self.running.take() else { return Vec::new() };
        self.unfinished = self.rings.iter().map(Ring::unfinished).collect();
        run.queues.stop()
    }

    /// Asks the back-end for its configuration space; what comes of it says [`Frontend::config_asked`].
    pub fn ask_config(&mut self) -> Result<(), Lost> {
        let asked = match &mut self.session {
            Some(session) if session.is_introduced() => {
                session.ask_config().inspect_err(|error| self.lose(error))
            }
            _ => Err(Lost::Closed),
        };
        asked.inspect_err(|_| count(&self.counters.cfg_fails, 1))
    }

    /// Whether the configuration space is there that was asked for at this time. Takes what has come, so that it gets on while
    /// stopped.
    pub fn config_asked(&mut self, at: Instant) -> Result<bool, Lost> {
        self.take_events(0);
        match &self.session {
            Some(session) if !session.awaits_config() => Ok(true),
            Some(_) if at.elapsed() <= REPLY_LIMIT => Ok(false),
            Some(_) => Err(Lost::Silent(REPLY_LIMIT)),
            None => Err(Lost::Closed),
        }
        .inspect_err(|_| count(&self.counters.cfg_fails, 1))
    }

    /// Waits so long at most, and looks at what has come from the back-end.
    fn take_events(&mut self, wait_ms: i32) {
        let mut events = [EpollEvent::default(); 16];
        let ready = match self.events.wait(wait_ms, &mut events) {
            Ok(ready) => ready,
            Err(error) if error.kind() == ErrorKind::Interrupted => return,
            Err(error) => return log::error!("{}: its back-end cannot be waited for: {error}", self.name),
        };
        for event in events.iter().take(ready) {
            match event.data() {
                SOCKET => self.receive(),
                TIMER => self.time_is_up(),
                CALLS => self.hear_calls(),
                index => self.complete(index as usize),
            }
        }
    }

    /// The driver has kicked: its requests become the back-end's, or wait for one.
    fn submit(&mut self, index: u16) {
        let is_served = self.is_served();
        let (Some(run), Some(ring)) = (&mut self.running, self.rings.get_mut(usize::from(index))) else {
            return;
        };
        count(&self.counters.queue_event_count, 1);
        run.queues.clear_kick(index);
        let mut heads = Vec::new();
        run.queues.turn(index, |turn| {
            for _ in 0..LOOKS_PER_TURN {
                turn.queue.disable_kicks(turn.memory)?;
                while let Some(head) = turn.queue.pop_head(turn.memory)? {
                    if !ring.note(head) {
                        return Err(QueueError::Twice { head });
                    }
                    heads.push(head);
                }
                if !turn.queue.enable_kicks(turn.memory)? {
                    return Ok(());
                }
            }
            turn.queue.rearm();
            Ok(())
        });
        if !is_served || heads.is_empty() {
            return;
        }
        let shown = heads.into_iter().try_for_each(|head| ring.enter(&self.memory, head));
        if let Err(error) = shown.and_then(|()| ring.publish(&self.memory)) {
            self.lose(&error.into());
        }
    }

    /// The back-end has called: what it has done goes to the driver.
    fn complete(&mut self, index: usize) {
        if let Some(ring) = self.rings.get(index) {
            let _ = ring.call.read();
        }
        count(&self.counters.call_event_count, 1);
        if self.is_served()
            && let Err(error) = self.collect(index)
        {
            self.lose(&error);
        }
    }

    fn collect(&mut self, index: usize) -> Result<(), Lost> {
        let (Some(run), Some(ring)) = (&mut self.running, self.rings.get_mut(index)) else { return Ok(()) };
        let mut done = Vec::new();
        let taken = ring.take(&self.memory, &mut done);
        if !done.is_empty() {
            count(&self.counters.requests_count, done.len() as u64);
            run.queues.turn(index as u16, |turn| turn.queue.push_all(turn.memory, &done));
        }
        taken
    }

    fn receive(&mut self) {
        let Some(session) = &mut self.session else { return };
        match session.receive() {
            Ok(has_config) => self.get_on(has_config),
            Err(error) => self.lose(&error),
        }
    }

    /// The back-end says something by itself. One that speaks wrongly is no worse than one that says nothing.
    fn hear_calls(&mut self) {
        let mut bytes = [0; READ_BYTES];
        // Our copy of its end is open, so there is no end of it.
        let read = self.calls.0.read(&mut bytes).unwrap_or(0);
        self.calls_heard.put(bytes.get(..read).unwrap_or_default());
        loop {
            match self.calls_heard.take_call() {
                Ok(Some(call)) => {
                    if call.is_waiting {
                        // One that does not read the answers has no use for them.
                        let _ = self.calls.0.send_with_fds(&[&message::answer(call.request)[..]], &[]);
                    }
                    let knows = self.session.as_ref().is_some_and(Session::is_introduced);
                    if call.request == message::CONFIG_CHANGE && knows {
                        // What goes wrong with it was said, and counted.
                        let _ = self.ask_config();
                    }
                }
                Ok(None) => return,
                Err(lie) => {
                    log::warn!("{}: its back-end calls and makes no sense: {lie}", self.name);
                    self.calls_heard = Inbox::default();
                    return;
                }
            }
        }
    }

    /// The session has heard something.
    fn get_on(&mut self, has_config: bool) {
        let Some(session) = &self.session else { return };
        let (introduced, waiting) = (session.is_introduced(), session.is_waiting());
        match self.stage {
            Stage::Introducing if introduced => {
                if let Err(lie) = check(session, self.needed, self.rings.len() as u16) {
                    return self.lose(&lie.into());
                }
                if session.config() != self.config {
                    self.config = session.config().to_vec();
                    self.announce();
                }
                match self.running {
                    Some(_) => self.hand_over(),
                    None => self.stage = Stage::Idle,
                }
            }
            Stage::Starting if !waiting => self.serves(),
            Stage::Introducing => {}
            Stage::Idle | Stage::Starting | Stage::Serving if has_config => {
                self.config = session.config().to_vec();
                self.announce();
            }
            Stage::Idle | Stage::Starting | Stage::Serving => {}
        }
    }

    /// Gives the back-end memory and rings.
    fn hand_over(&mut self) {
        self.handed_at = Some(Instant::now());
        match self.try_hand_over() {
            Ok(true) => self.set_timer(Some(REPLY_LIMIT)),
            Ok(false) => self.serves(),
            Err(error) => self.lose(&error),
        }
    }

    /// True when it has to confirm that.
    fn try_hand_over(&mut self) -> Result<bool, Lost> {
        let (Some(run), Some(session)) = (&self.running, &mut self.session) else { return Ok(false) };
        let mut plans = Vec::with_capacity(self.rings.len());
        for (index, (ring, descriptors)) in (0..).zip(self.rings.iter_mut().zip(&run.descriptors)) {
            let Some(descriptors) = *descriptors else { continue };
            ring.refill(&self.memory)?;
            plans.push(RingPlan {
                index,
                size: ring.size(),
                address: ring.address(descriptors),
                kick: ring.kick.as_raw_fd(),
                call: ring.call.as_raw_fd(),
            });
        }
        let repeated: usize = self.rings.iter().map(Ring::unfinished).map(|heads| heads.len()).sum();
        count(&self.counters.requests_repeated_count, repeated as u64);
        let ram = run.memory.memory();
        let regions: Vec<_> = shared_regions(&ram).chain(self.memory.regions()).collect();
        // What its ring says of events is between it and us, and we do without.
        let features = run.features & session.features() & !(1 << VIRTIO_RING_F_EVENT_IDX);
        self.stage = Stage::Starting;
        session.activate(features, &regions, &plans, self.calls.1.as_raw_fd())?;
        Ok(session.is_waiting())
    }

    fn serves(&mut self) {
        self.set_timer(None);
        self.stage = Stage::Serving;
        self.served_since = Some(Instant::now());
        if let Some(begin) = self.handed_at.take() {
            store_us(&self.counters.activate_time_us, begin);
        }
        if self.told.take().is_some() {
            log::info!("{}: its back-end is back.", self.name);
        }
    }

    /// The back-end is gone, or as good as gone. Requests wait for the next one.
    fn lose(&mut self, reason: &Lost) {
        if self.is_served() {
            // What it had done by then is done.
            for index in 0..self.rings.len() {
                let _ = self.collect(index);
            }
        }
        count(&self.counters.backend_lost_count, 1);
        let text = reason.to_string();
        if self.told.as_ref() != Some(&text) {
            log::warn!(
                "{}: its back-end is gone: {text}. Requests wait until there is one again at its socket.",
                self.name
            );
            self.told = Some(text);
        }
        self.hang_up();
        let was_steady = self.served_since.take().is_some_and(|since| since.elapsed() >= STEADY);
        self.try_again_later(was_steady);
    }

    fn hang_up(&mut self) {
        if let Some(session) = self.session.take() {
            // It was added, so it can be deleted.
            let _ = self.events.ctl(ControlOperation::Delete, session.fd(), EpollEvent::default());
        }
        self.stage = Stage::Introducing;
    }

    /// Only a running device needs one.
    fn try_again_later(&mut self, from_the_first: bool) {
        let wait = if from_the_first { FIRST_WAIT } else { self.wait };
        self.wait = (wait * 2).min(LONGEST_WAIT);
        if self.running.is_some() {
            self.set_timer(Some(wait));
        }
    }

    fn time_is_up(&mut self) {
        self.set_timer(None);
        match (&self.session, self.stage) {
            (None, _) => self.try_again(),
            (Some(_), Stage::Introducing | Stage::Starting) => self.lose(&Lost::Silent(REPLY_LIMIT)),
            (Some(_), Stage::Idle | Stage::Serving) => {}
        }
    }

    fn try_again(&mut self) {
        let begun = (self.connect)().map_err(Lost::from).and_then(|socket| {
            let session = Session::begin(socket, self.config.len())?;
            let event = EpollEvent::new(EventSet::IN, SOCKET);
            self.events.ctl(ControlOperation::Add, session.fd(), event)?;
            Ok(session)
        });
        match begun {
            Ok(session) => {
                self.session = Some(session);
                self.stage = Stage::Introducing;
                self.set_timer(Some(REPLY_LIMIT));
            }
            Err(error) => {
                log::debug!("{}: there is no back-end: {error}", self.name);
                self.try_again_later(false);
            }
        }
    }

    /// Waits until the back-end has done what it has and has let go of the rings, or lets go of it.
    fn drain(&mut self) {
        let deadline = Instant::now() + STOP_LIMIT;
        let mut is_asked = false;
        while self.is_served() {
            let Some(session) = self.session.as_mut() else { return };
            if !session.is_waiting() && self.rings.iter().all(Ring::is_idle) {
                if is_asked {
                    self.stage = Stage::Idle;
                    return;
                }
                is_asked = true;
                let enabled = self.running.iter().flat_map(|run| (0..).zip(&run.descriptors));
                let mut enabled = enabled.filter(|(_, at)| at.is_some());
                match enabled.try_for_each(|(index, _)| session.stop_ring(index)) {
                    Ok(()) => continue,
                    Err(error) => return self.lose(&error),
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return self.lose(&Lost::Silent(STOP_LIMIT));
            }
            self.take_events(wait_ms(left));
        }
    }

    fn is_served(&self) -> bool {
        self.session.is_some() && matches!(self.stage, Stage::Starting | Stage::Serving)
    }

    fn tell_driver(&mut self) {
        if let Some(run) = &self.running
            && mem::take(&mut self.config_is_new)
        {
            run.queues.interrupt.config();
        }
    }

    /// Also takes the timer's readiness away.
    fn set_timer(&mut self, wait: Option<Duration>) {
        let set = match wait {
            Some(wait) => self.timer.reset(wait, None),
            None => self.timer.clear(),
        };
        if let Err(error) = set {
            log::error!("{}: its timer cannot be set: {error}", self.name);
        }
    }
}

/// Takes down what has passed since `begin`.
pub fn store_us(counter: &AtomicU64, begin: Instant) {
    counter.store(begin.elapsed().as_micros().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// A back-end that cannot do what the driver was told it can is none for it.
fn check(session: &Session, needed: u64, queues: u16) -> Result<(), Lie> {
    let offered = session.features();
    if needed & !offered != 0 {
        return Err(Lie::Features { offered, needed });
    }
    if session.queues() < queues.into() {
        return Err(Lie::Queues { got: session.queues(), wanted: queues });
    }
    Ok(())
}

/// The range is inside one part of memory that the back-end is given.
fn is_shared(memory: &GuestRam, start: u64, bytes: u64) -> bool {
    let Some(end) = start.checked_add(bytes) else { return false };
    shared_regions(memory).any(|(region, _)| region.guest <= start && end <= region.guest + region.size)
}

fn refused(why: String) -> StartError {
    StartError::Host(std::io::Error::other(why))
}
