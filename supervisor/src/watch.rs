//! What the loop waits for: clients, ends of processes, what guests say, and times that come. With nothing of these the daemon
//! sleeps, however many guests there are.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Events that are taken at a time.
const TURN: usize = 64;
/// The token of the clients' socket: no guest's, whose number has 48 bits.
const CLIENTS: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;

/// What has happened. A guest is named by its id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happened {
    Client,
    Ended(String),
    ConsoleSaid(String),
    LogSaid(String),
    /// A time of this guest's has come.
    Time(String),
}

/// Of a guest's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Process = 0,
    Console = 1,
    Log = 2,
}

/// Shared by the loop, which waits, and whoever has something to be waited for.
pub struct Watch {
    epoll: Epoll,
    /// There is a time that is earlier than the one the loop knew.
    wake: EventFd,
    times: Mutex<BTreeMap<String, Instant>>,
}

impl Watch {
    /// Watches nothing yet.
    ///
    /// # Errors
    /// Those of making an epoll and an eventfd.
    pub fn new() -> io::Result<Watch> {
        let (epoll, wake) = (Epoll::new()?, EventFd::new(EFD_NONBLOCK)?);
        add(&epoll, wake.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED, WAKE)?;
        Ok(Watch { epoll, wake, times: Mutex::default() })
    }

    /// Watches the socket that clients come to, which does not block.
    ///
    /// # Errors
    /// Those of epoll.
    pub fn clients(&self, listener: BorrowedFd) -> io::Result<()> {
        // Edge-triggered: what cannot be accepted for want of descriptors is tried again with the next client.
        add(&self.epoll, listener.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED, CLIENTS)
    }

    /// Watches a descriptor of a guest's until it is closed. A process's end is told once.
    ///
    /// # Errors
    /// Those of epoll.
    pub fn guest(&self, id: &str, kind: Kind, fd: BorrowedFd) -> io::Result<()> {
        let events = match kind {
            Kind::Process => EventSet::IN | EventSet::ONE_SHOT,
            // What is there when it is added is told too.
            Kind::Console | Kind::Log => EventSet::IN,
        };
        let number = u64::from_str_radix(id, 16).map_err(|_| ErrorKind::InvalidInput)?;
        add(&self.epoll, fd.as_raw_fd(), events, number << 2 | kind as u64)
    }

    /// Tells at this time, or with `None` not any more.
    pub fn time(&self, id: &str, time: Option<Instant>) {
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        let first = times.values().min().copied();
        match time {
            Some(time) => times.insert(id.to_owned(), time),
            None => times.remove(id),
        };
        if time.is_some_and(|time| first.is_none_or(|first| time < first)) {
            // It fails only when the loop has been told already.
            let _ = self.wake.write(1);
        }
    }

    /// Waits for the next that happens, or only looks whether something has.
    ///
    /// # Errors
    /// Those of the epoll itself.
    pub fn wait(&self, only_look: bool) -> io::Result<Vec<Happened>> {
        let mut events = [EpollEvent::default(); TURN];
        let count = match self.epoll.wait(if only_look { 0 } else { self.time_to_wait() }, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let mut happened: Vec<_> = events.iter().take(count).filter_map(|event| what(event.data())).collect();
        happened.extend(self.times_that_have_come().into_iter().map(Happened::Time));
        Ok(happened)
    }

    /// Milliseconds; -1 without a time. Rounded up, so that the time has come when the wait ends.
    fn time_to_wait(&self) -> i32 {
        let _ = self.wake.read();
        let times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = times
            .values()
            .min()
            .map(|time| time.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
        wait.map_or(-1, |wait| i32::try_from(wait.as_millis()).unwrap_or(i32::MAX))
    }

    fn times_that_have_come(&self) -> Vec<String> {
        let now = Instant::now();
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        let come: Vec<_> = times.iter().filter(|(_, time)| **time <= now).map(|(id, _)| id.clone()).collect();
        for id in &come {
            times.remove(id);
        }
        come
    }
}

fn add(epoll: &Epoll, fd: i32, events: EventSet, token: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
}

fn what(token: u64) -> Option<Happened> {
    let id = || format!("{:012x}", token >> 2);
    match (token, token & 3) {
        (CLIENTS, _) => Some(Happened::Client),
        (WAKE, _) => None,
        (_, 0) => Some(Happened::Ended(id())),
        (_, 1) => Some(Happened::ConsoleSaid(id())),
        (_, 2) => Some(Happened::LogSaid(id())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::sync::Arc;
    use std::thread;

    use super::*;

    const ID: &str = "00ffeeddccbb";

    #[test]
    fn what_happens_is_told_with_whose_it_is() {
        let watch = Watch::new().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        watch.guest(ID, Kind::Console, reader.as_fd()).unwrap();
        writer.write_all(b"x").unwrap();
        assert_eq!(watch.wait(false).unwrap(), [Happened::ConsoleSaid(ID.into())]);
        drop((reader, writer));
        let (reader, writer) = io::pipe().unwrap();
        watch.guest("ffffffffffff", Kind::Process, reader.as_fd()).unwrap();
        drop(writer);
        // Not IN alone: that nobody writes any more counts too. Once.
        assert_eq!(watch.wait(false).unwrap(), [Happened::Ended("ffffffffffff".into())]);
        watch.time(ID, Some(Instant::now()));
        assert_eq!(watch.wait(false).unwrap(), [Happened::Time(ID.into())]);
    }

    #[test]
    fn a_time_that_is_set_while_the_loop_waits_is_told() {
        let watch = Arc::new(Watch::new().unwrap());
        watch.time("000000000001", Some(Instant::now() + Duration::from_secs(3600)));
        let other = watch.clone();
        let waits = thread::spawn(move || {
            loop {
                let happened = other.wait(false).unwrap();
                if !happened.is_empty() {
                    return happened;
                }
            }
        });
        watch.time(ID, Some(Instant::now() + Duration::from_millis(20)));
        assert_eq!(waits.join().unwrap(), [Happened::Time(ID.into())]);
    }

    #[test]
    fn a_time_that_is_taken_back_is_not_told() {
        let watch = Watch::new().unwrap();
        watch.time(ID, Some(Instant::now()));
        watch.time(ID, None);
        watch.time("000000000001", Some(Instant::now()));
        assert_eq!(watch.wait(false).unwrap(), [Happened::Time("000000000001".into())]);
    }
}
