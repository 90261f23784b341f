//! A machine around a device, for unit tests and fuzz targets: a [`Host`] that delivers messages into a list, rings
//! doorbells when told to, and calls handlers in the test's own thread.
//!
//! Panics when a test uses it wrongly, never for what a device does.
#![allow(clippy::unwrap_used, reason = "a mistake in a test shall stop that test")]

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::host::{Doorbell, Handler, Host, Msi, Source, WatchId};

/// The fake. Clones are the same machine.
#[derive(Clone, Default)]
pub struct FakeHost {
    machine: Arc<Machine>,
}

#[derive(Default)]
struct Machine {
    vectors: Mutex<Vectors>,
    doorbells: Mutex<HashMap<Doorbell, EventFd>>,
    watches: Mutex<BTreeMap<u64, Watch>>,
    next: AtomicUsize,
    connections: AtomicUsize,
    fail_connections: AtomicBool,
    fail_watches: AtomicBool,
    fail_msis: AtomicBool,
}

/// By vector: its trigger, and its message while connected.
type Vectors = BTreeMap<usize, (EventFd, Option<(u64, u32)>)>;

struct Watch {
    handler: Arc<Mutex<dyn Handler>>,
    sources: Vec<Source>,
}

impl FakeHost {
    pub fn new() -> Self {
        Self::default()
    }

    /// Message-signalled interrupts in use.
    pub fn msis(&self) -> usize {
        self.vectors().len()
    }

    /// How often a message was connected, ever: what would have been system calls.
    pub fn connections(&self) -> usize {
        self.machine.connections.load(Ordering::SeqCst)
    }

    /// The messages (address, data) delivered since the last call; several raises of one vector are one message.
    pub fn take_messages(&self) -> Vec<(u64, u32)> {
        let delivered =
            |(trigger, message): &(EventFd, Option<(u64, u32)>)| message.filter(|_| trigger.read().is_ok());
        self.vectors().values().filter_map(delivered).collect()
    }

    /// The guest writes `value` at `address`: true when a doorbell took it, so that no device sees the write.
    pub fn write(&self, address: u64, value: u32) -> bool {
        let doorbells = self.machine.doorbells.lock().unwrap();
        let exact = doorbells.get(&Doorbell { address, value: Some(value) });
        let rung = exact.or_else(|| doorbells.get(&Doorbell { address, value: None }));
        rung.inspect(|fd| fd.write(1).unwrap()).is_some()
    }

    /// The doorbells there are, by address.
    pub fn doorbells(&self) -> Vec<Doorbell> {
        let mut all: Vec<_> = self.machine.doorbells.lock().unwrap().keys().copied().collect();
        all.sort_by_key(|doorbell| (doorbell.address, doorbell.value));
        all
    }

    /// Handlers being watched.
    pub fn watches(&self) -> usize {
        self.machine.watches.lock().unwrap().len()
    }

    /// Calls handlers whose descriptors are ready, until none is; returns the number of calls. More than `most` is a
    /// device that never comes to rest.
    pub fn run(&self, most: usize) -> usize {
        (0..most).take_while(|_| self.turn()).count()
    }

    /// From now on no message can be connected, or they can again.
    pub fn fail_connections(&self, fail: bool) {
        self.machine.fail_connections.store(fail, Ordering::SeqCst);
    }

    /// From now on nothing can be watched, or it can again.
    pub fn fail_watches(&self, fail: bool) {
        self.machine.fail_watches.store(fail, Ordering::SeqCst);
    }

    /// From now on no message-signalled interrupt is to be had, or they are again.
    pub fn fail_msis(&self, fail: bool) {
        self.machine.fail_msis.store(fail, Ordering::SeqCst);
    }

    fn turn(&self) -> bool {
        let Some((handler, token)) = self.ready() else { return false };
        handler.lock().unwrap().ready(token);
        true
    }

    fn ready(&self) -> Option<(Arc<Mutex<dyn Handler>>, u32)> {
        let watches = self.machine.watches.lock().unwrap();
        let sources =
            watches.values().flat_map(|watch| watch.sources.iter().map(move |source| (watch, source)));
        let mut ready = sources.filter(|(_, source)| is_readable(source));
        ready.next().map(|(watch, source)| (watch.handler.clone(), source.token))
    }

    fn vectors(&self) -> MutexGuard<'_, Vectors> {
        self.machine.vectors.lock().unwrap()
    }

    fn next(&self) -> usize {
        self.machine.next.fetch_add(1, Ordering::SeqCst)
    }
}

fn is_readable(source: &Source) -> bool {
    let epoll = Epoll::new().unwrap();
    epoll.ctl(ControlOperation::Add, source.fd, EpollEvent::new(EventSet::IN, 0)).unwrap();
    epoll.wait(0, &mut [EpollEvent::default()]).unwrap() > 0
}

fn check(fail: &AtomicBool) -> io::Result<()> {
    if fail.load(Ordering::SeqCst) { Err(io::Error::other("told to fail")) } else { Ok(()) }
}

impl Host for FakeHost {
    fn msi(&self) -> io::Result<Box<dyn Msi>> {
        check(&self.machine.fail_msis)?;
        let trigger = EventFd::new(EFD_NONBLOCK)?;
        let vector = self.next();
        self.vectors().insert(vector, (trigger.try_clone()?, None));
        Ok(Box::new(FakeMsi { host: self.clone(), vector, trigger }))
    }

    fn ring(&self, doorbell: Doorbell, fd: &EventFd) -> io::Result<()> {
        let mut doorbells = self.machine.doorbells.lock().unwrap();
        if doorbells.contains_key(&doorbell) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        doorbells.insert(doorbell, fd.try_clone()?);
        Ok(())
    }

    fn unring(&self, doorbell: Doorbell, _: &EventFd) -> io::Result<()> {
        let removed = self.machine.doorbells.lock().unwrap().remove(&doorbell);
        removed.map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn watch(&self, handler: Arc<Mutex<dyn Handler>>, sources: &[Source]) -> io::Result<WatchId> {
        check(&self.machine.fail_watches)?;
        let id = self.next() as u64;
        self.machine.watches.lock().unwrap().insert(id, Watch { handler, sources: sources.to_vec() });
        Ok(WatchId(id))
    }

    fn unwatch(&self, id: WatchId) {
        let watch = self.machine.watches.lock().unwrap().remove(&id.0).unwrap();
        // As the loop would wait for a handler that runs.
        assert!(watch.handler.try_lock().is_ok(), "unwatch with the handler's lock held");
    }
}

struct FakeMsi {
    host: FakeHost,
    vector: usize,
    trigger: EventFd,
}

impl FakeMsi {
    fn set(&self, message: Option<(u64, u32)>) {
        self.host.vectors().get_mut(&self.vector).unwrap().1 = message;
    }
}

impl Msi for FakeMsi {
    fn trigger(&self) -> &EventFd {
        &self.trigger
    }

    fn connect(&mut self, address: u64, data: u32) -> io::Result<()> {
        check(&self.host.machine.fail_connections)?;
        self.host.machine.connections.fetch_add(1, Ordering::SeqCst);
        self.set(Some((address, data)));
        Ok(())
    }

    fn disconnect(&mut self) -> io::Result<()> {
        self.set(None);
        Ok(())
    }
}

impl Drop for FakeMsi {
    fn drop(&mut self) {
        self.host.vectors().remove(&self.vector);
    }
}
