//! One port: bytes from a descriptor to the guest, bytes from the guest to a writer, and what the driver is still to be
//! told of it.
//!
//! Knows no queues and no other port.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::control::{Event, Message};
use super::{Counters, OUTPUT_LIMIT, Size};
use crate::backend::rate_limiter::{Limits, RateLimiter, RateLimiterState};
use crate::memory::GuestRam;
use crate::virtio::queue::{Chain, QueueError};
use crate::virtio::running::{Step, count};

/// Most bytes of input taken at a time.
const INPUT_BYTES: u32 = 4096;

/// When to try again what the writer would not take.
const RETRY: Duration = Duration::from_millis(10);

/// One port of a console.
pub struct Port {
    /// Every port has one but the first.
    name: Option<String>,
    /// Of a terminal; other ports have none.
    pub size: Option<Size>,
    pub input: Input,
    pub output: Output,
    driver: DriverSide,
}

/// What the driver has said of a port, and what it is still to be told. With many messages to send for one port there is one
/// bit for each kind: a driver that reads none of them costs nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct DriverSide {
    is_ready: bool,
    is_open: bool,
    news: u8,
}

/// [`Port`] as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub(super) size: Option<Size>,
    /// Taken from the guest and not written yet; at most [`OUTPUT_LIMIT`].
    pub(super) output: Vec<u8>,
    driver: DriverSide,
    pub(super) limiter: RateLimiterState,
}

/// What a driver is told of a port: bits in the order in which it is told.
const ADD: u8 = 1;
const CONSOLE: u8 = 2;
const NAME: u8 = 4;
const RESIZE: u8 = 8;
const OPEN: u8 = 16;

impl Port {
    /// A port as after reset, or as it was saved.
    pub fn new(
        name: Option<String>,
        size: Option<Size>,
        input: Option<OwnedFd>,
        output: Box<dyn Write + Send>,
        limits: Limits,
        counters: Arc<Counters>,
        state: Option<State>,
    ) -> io::Result<Port> {
        let fresh = State {
            size,
            output: Vec::new(),
            driver: DriverSide::default(),
            limiter: RateLimiterState::default(),
        };
        let State { size: saved, output: mut waiting, driver, limiter } = state.unwrap_or(fresh);
        let limiter = RateLimiter::new(limits, Some(&limiter))?;
        waiting.truncate(OUTPUT_LIMIT);
        Ok(Port {
            name,
            // Whether it is a terminal is not the state's to say.
            size: size.map(|configured| saved.unwrap_or(configured)),
            input: Input::new(input)?,
            output: Output::new(output, waiting, limiter, counters)?,
            driver,
        })
    }

    pub fn save(&self) -> State {
        let Output { waiting, limiter, .. } = &self.output;
        State { size: self.size, output: waiting.clone(), driver: self.driver, limiter: limiter.save() }
    }

    /// A program of the guest has it open, or a terminal is there: what is sent to it now is not lost.
    pub fn is_open(&self) -> bool {
        self.driver.is_open
    }

    /// The driver begins, and wants to hear what ports there are.
    pub fn begin(&mut self) {
        self.driver = DriverSide { news: ADD, ..DriverSide::default() };
    }

    /// The driver is gone, with all that it said.
    pub fn forget(&mut self) {
        self.driver = DriverSide::default();
    }

    /// The driver has this port, and wants to hear all of it; or it has not.
    pub fn ready(&mut self, is_ready: bool) {
        let news = CONSOLE | NAME | RESIZE | OPEN;
        self.driver.is_ready = is_ready;
        self.driver.news = if is_ready { self.driver.news | news } else { 0 };
    }

    /// The guest begins to use it, or does so no longer.
    pub fn set_open(&mut self, is_open: bool) {
        self.driver.is_open = is_open;
    }

    /// Another size; nothing changes where there is none. A driver that has the port is to be told.
    pub fn resize(&mut self, size: Size) {
        if let Some(before) = &mut self.size {
            *before = size;
            self.driver.news |= if self.driver.is_ready { RESIZE } else { 0 };
        }
    }

    /// What the driver is to be told next of this port, which has this number.
    pub fn next_news(&mut self, id: u32) -> Option<Message<'_>> {
        while self.driver.news != 0 {
            let kind = self.driver.news & self.driver.news.wrapping_neg();
            self.driver.news &= !kind;
            let event = match kind {
                ADD => Some(Event::PortAdd),
                CONSOLE => self.size.map(|_| Event::ConsolePort),
                NAME => self.name.as_deref().map(Event::PortName),
                RESIZE => self.size.map(Event::Resize),
                OPEN => Some(Event::PortOpen),
                // From a file.
                _ => None,
            };
            if let Some(event) = event {
                return Some(Message { id, event });
            }
        }
        None
    }
}

/// Where input comes from. A descriptor that is readable while the guest has no room would call us for ever, so it is
/// watched behind an epoll descriptor of our own, from which it can be taken and to which it can be put back.
pub struct Input {
    file: Option<File>,
    /// None where input is always readable, as a regular file or /dev/null is; epoll does not take those.
    gate: Option<Epoll>,
    /// The descriptor is behind the gate.
    watched: bool,
    /// One read will not block.
    ready: bool,
}

impl Input {
    pub fn new(input: Option<OwnedFd>) -> io::Result<Input> {
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
    pub fn fd(&self) -> Option<RawFd> {
        self.gate.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// The descriptor of [`Input::fd`] was readable.
    pub fn readable(&mut self) {
        self.ready = true;
    }

    /// The guest has made room.
    pub fn resume(&mut self) {
        if let (Some(gate), Some(file), false) = (&self.gate, &self.file, self.watched) {
            let event = EpollEvent::new(EventSet::IN, 0);
            match gate.ctl(ControlOperation::Add, file.as_raw_fd(), event) {
                Ok(()) => self.watched = true,
                Err(error) => log::error!("console: the input cannot be watched: {error}"),
            }
        }
    }

    /// Watches no longer if there was something to read and no room for it.
    pub fn pause(&mut self) {
        if self.ready && self.gate.is_some() {
            self.ready = false;
            self.unwatch();
        }
    }

    /// Reads once into the chain if that does not block; `None` when nothing can come now.
    pub fn read(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<Option<u32>, QueueError> {
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
pub struct Output {
    pub(super) writer: Box<dyn Write + Send>,
    waiting: Vec<u8>,
    pub(super) timer: TimerFd,
    /// Of what goes to the writer.
    pub(super) limiter: RateLimiter,
    counters: Arc<Counters>,
}

impl Output {
    pub fn new(
        writer: Box<dyn Write + Send>,
        waiting: Vec<u8>,
        limiter: RateLimiter,
        counters: Arc<Counters>,
    ) -> io::Result<Output> {
        Ok(Output { writer, waiting, timer: TimerFd::new()?, limiter, counters })
    }

    /// Takes what the chain holds, as far as there is room; with `patience` it is left where it is until there is enough,
    /// but for a chain that is longer than the limit itself.
    pub fn take(&mut self, memory: &GuestRam, chain: &mut Chain, patience: bool) -> Result<Step, QueueError> {
        let bytes = chain.readable.bytes() as usize;
        if self.waiting.len() + bytes > OUTPUT_LIMIT {
            self.flush();
            if patience && !self.waiting.is_empty() && self.waiting.len() + bytes > OUTPUT_LIMIT {
                return Ok(Step::Later);
            }
        }
        let kept = bytes.min(OUTPUT_LIMIT - self.waiting.len());
        let mut data = vec![0; kept];
        chain.readable.read(memory, &mut data)?;
        self.waiting.append(&mut data);
        count(&self.counters.lost_bytes, (bytes - kept) as u64);
        Ok(Step::Used(0))
    }

    pub fn retry(&mut self) {
        if let Err(error) = self.timer.clear() {
            log::error!("console: cannot stop the timer: {error}");
        }
        self.flush();
    }

    /// The limiter admits more.
    pub fn admitted(&mut self) {
        self.limiter.clear();
        self.flush();
    }

    /// Writes what waits, or sets the timer for what the writer does not take; that of the limiter for what it holds back.
    pub fn flush(&mut self) {
        while !self.waiting.is_empty() {
            if !self.limiter.admits() {
                return;
            }
            let lost = match self.writer.write(&self.waiting) {
                Ok(bytes) if bytes > 0 => {
                    count(&self.counters.output_bytes, bytes as u64);
                    self.limiter.pay(bytes as u64);
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
