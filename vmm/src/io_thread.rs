//! A thread on which device queues are served: one epoll loop, a table of watches.
//!
//! Knows nothing of devices: a watch is a handler and its descriptors. One loop serves every device that is not given
//! another; a device keeps its share small by handling a bounded batch per call.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use devices::host::{Handler, Source, WatchId};
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId};
use vmm_sys_util::epoll::EventSet;

use crate::sandbox::{Role, Sandbox};

/// Descriptors that one loop can report ready in one round; more simply wait for the next.
const READY_EVENTS: usize = 64;

/// A handle to the loop; dropping it ends the thread, or a start that fails again and again would leave one each time.
pub struct IoThread {
    loop_: RemoteEndpoint<Watch>,
    ended: Arc<AtomicBool>,
    watches: Mutex<Watches>,
}

#[derive(Default)]
struct Watches {
    next: u64,
    live: Vec<(WatchId, SubscriberId)>,
}

struct Watch {
    handler: Arc<Mutex<dyn Handler>>,
    sources: Vec<Source>,
}

/// The loop, which nobody runs yet.
pub struct Idle {
    manager: EventManager<Watch>,
    ended: Arc<AtomicBool>,
}

impl IoThread {
    /// Makes the loop, and the handle to it. Devices may have it, but nobody may watch or unwatch before it runs.
    pub fn new() -> io::Result<(Self, Idle)> {
        let manager = EventManager::new_with_capacity(READY_EVENTS).map_err(io::Error::other)?;
        let loop_ = manager.remote_endpoint();
        let ended = Arc::<AtomicBool>::default();
        let idle = Idle { manager, ended: ended.clone() };
        Ok((Self { loop_, ended, watches: Mutex::default() }, idle))
    }

    /// See [`devices::host::Host::watch`].
    pub fn watch(&self, handler: Arc<Mutex<dyn Handler>>, sources: &[Source]) -> io::Result<WatchId> {
        let watch = Watch { handler, sources: sources.to_vec() };
        let subscriber = self
            .loop_
            .call_blocking(move |ops| Ok::<_, event_manager::Error>(ops.add_subscriber(watch)))
            .map_err(io::Error::other)?;
        let mut watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
        let id = WatchId(watches.next);
        watches.next += 1;
        watches.live.push((id, subscriber));
        Ok(id)
    }

    /// See [`devices::host::Host::unwatch`]: the call is made by the loop itself, between two handlers.
    pub fn unwatch(&self, id: WatchId) {
        let subscriber = {
            let mut watches = self.watches.lock().unwrap_or_else(PoisonError::into_inner);
            match watches.live.iter().position(|(live, _)| *live == id) {
                Some(at) => watches.live.swap_remove(at).1,
                None => return,
            }
        };
        if let Err(error) = self.loop_.call_blocking(move |ops| ops.remove_subscriber(subscriber).map(drop)) {
            log::error!("io thread: a watch could not be removed: {error}");
        }
    }
}

impl Drop for IoThread {
    /// Does not wait: the last handle may be dropped by a handler, which is the thread itself.
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        if let Err(error) = self.loop_.kick() {
            log::error!("io thread: it cannot be ended: {error}");
        }
    }
}

impl Idle {
    /// Starts the thread under `name` (15 bytes at most are shown by the kernel), confined.
    pub fn spawn(self, name: &str, sandbox: Arc<Sandbox>) -> io::Result<()> {
        let Idle { mut manager, ended } = self;
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            sandbox.enter(Role::Io);
            // Only epoll_wait itself can fail here, with EINTR, and then the next round does its work.
            while !ended.load(Ordering::SeqCst) {
                let _ = manager.run();
            }
        })?;
        Ok(())
    }
}

impl MutEventSubscriber for Watch {
    fn process(&mut self, events: Events, _: &mut EventOps) {
        self.handler.lock().unwrap_or_else(PoisonError::into_inner).ready(events.data());
    }

    fn init(&mut self, ops: &mut EventOps) {
        for Source { fd, token } in &self.sources {
            if let Err(error) = ops.add(readable(*fd, *token)) {
                log::error!("io thread: descriptor {fd} cannot be watched: {error}");
            }
        }
    }
}

fn readable(fd: RawFd, token: u32) -> Events {
    Events::with_data_raw(fd, token, EventSet::IN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
    use std::time::Duration;
    use vmm_sys_util::eventfd::EventFd;

    struct Tell(EventFd, Sender<u32>);

    impl Handler for Tell {
        fn ready(&mut self, token: u32) {
            self.0.read().unwrap();
            self.1.send(token).unwrap();
        }
    }

    #[test]
    fn a_watched_descriptor_calls_its_handler_until_it_is_unwatched() {
        let (io, idle) = IoThread::new().unwrap();
        idle.spawn("io-test", Arc::new(Sandbox::off())).unwrap();
        let fd = EventFd::new(0).unwrap();
        let (tell, told) = channel();
        let handler = Arc::new(Mutex::new(Tell(fd.try_clone().unwrap(), tell)));
        let id = io.watch(handler, &[Source { fd: fd.as_raw_fd(), token: 7 }]).unwrap();
        for _ in 0..3 {
            fd.write(1).unwrap();
            assert_eq!(told.recv_timeout(Duration::from_secs(10)), Ok(7));
        }
        io.unwatch(id);
        fd.write(1).unwrap();
        assert!(told.recv().is_err(), "the handler is gone with its watch");
        io.unwatch(id);
    }

    #[test]
    fn the_thread_ends_with_its_handle_and_lets_go_of_every_handler() {
        let (io, idle) = IoThread::new().unwrap();
        idle.spawn("io-test", Arc::new(Sandbox::off())).unwrap();
        let fd = EventFd::new(0).unwrap();
        let (tell, told) = channel();
        let handler = Arc::new(Mutex::new(Tell(fd.try_clone().unwrap(), tell)));
        io.watch(handler, &[Source { fd: fd.as_raw_fd(), token: 7 }]).unwrap();
        drop(io);
        assert_eq!(told.recv_timeout(Duration::from_secs(10)), Err(RecvTimeoutError::Disconnected));
    }

    /// Does not come back before it is let go, as from a disk that does not answer.
    struct Stuck {
        own: EventFd,
        begun: Sender<()>,
        let_go: Receiver<()>,
    }

    impl Handler for Stuck {
        fn ready(&mut self, _: u32) {
            self.own.read().unwrap();
            self.begun.send(()).unwrap();
            self.let_go.recv().unwrap();
        }
    }

    #[test]
    fn a_handler_that_is_stuck_holds_up_its_own_thread_and_who_waits_for_it_alone() {
        let [own, other] = [(), ()].map(|()| {
            let (io, idle) = IoThread::new().unwrap();
            idle.spawn("io-test", Arc::new(Sandbox::off())).unwrap();
            io
        });
        let [fd, quick] = [(), ()].map(|()| EventFd::new(0).unwrap());
        let ((begun, begins), (lets_go, let_go)) = (channel(), channel());
        let stuck = Stuck { own: fd.try_clone().unwrap(), begun, let_go };
        let id = own.watch(Arc::new(Mutex::new(stuck)), &[Source { fd: fd.as_raw_fd(), token: 0 }]).unwrap();
        fd.write(1).unwrap();
        begins.recv_timeout(Duration::from_secs(10)).unwrap();

        let (tell, told) = channel();
        let handler = Arc::new(Mutex::new(Tell(quick.try_clone().unwrap(), tell)));
        let source = Source { fd: quick.as_raw_fd(), token: 7 };
        let watch = other.watch(handler, &[source]).unwrap();
        quick.write(1).unwrap();
        assert_eq!(told.recv_timeout(Duration::from_secs(10)), Ok(7));
        other.unwatch(watch);
        assert_eq!(told.recv_timeout(Duration::from_secs(10)), Err(RecvTimeoutError::Disconnected));

        let (tell, told) = channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                own.unwatch(id);
                tell.send(()).unwrap();
            });
            assert_eq!(told.recv_timeout(Duration::from_millis(100)), Err(RecvTimeoutError::Timeout));
            lets_go.send(()).unwrap();
            told.recv_timeout(Duration::from_secs(10)).unwrap();
        });
    }

    /// Is always ready, and wakes another in its fifth turn.
    struct Busy {
        own: EventFd,
        other: EventFd,
        turns: Arc<AtomicUsize>,
    }

    impl Handler for Busy {
        fn ready(&mut self, _: u32) {
            if self.turns.fetch_add(1, Ordering::SeqCst) == 5 {
                self.other.write(1).unwrap();
            }
        }
    }

    struct Quiet {
        own: EventFd,
        turns: Arc<AtomicUsize>,
        told: Sender<usize>,
    }

    impl Handler for Quiet {
        fn ready(&mut self, _: u32) {
            self.own.read().unwrap();
            self.told.send(self.turns.load(Ordering::SeqCst)).unwrap();
        }
    }

    #[test]
    fn a_handler_that_is_always_ready_does_not_keep_another_from_its_turn() {
        let (io, idle) = IoThread::new().unwrap();
        idle.spawn("io-test", Arc::new(Sandbox::off())).unwrap();
        let [always, sometimes] = [(), ()].map(|()| EventFd::new(0).unwrap());
        always.write(1).unwrap();
        let turns = Arc::<AtomicUsize>::default();
        let (told, telling) = channel();
        let quiet = Quiet { own: sometimes.try_clone().unwrap(), turns: turns.clone(), told };
        let busy = Busy { own: always.try_clone().unwrap(), other: sometimes.try_clone().unwrap(), turns };
        io.watch(Arc::new(Mutex::new(quiet)), &[Source { fd: sometimes.as_raw_fd(), token: 0 }]).unwrap();
        let fd = busy.own.as_raw_fd();
        io.watch(Arc::new(Mutex::new(busy)), &[Source { fd, token: 0 }]).unwrap();
        let turns_of_the_other = telling.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(turns_of_the_other <= 5 + 2, "{turns_of_the_other}");
    }
}
