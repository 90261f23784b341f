//! A guest as the daemon has it: its record, its process, and what it says.

use std::net::Ipv4Addr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use api_socket::Fault;
use api_socket::fleet::{self, End};

use crate::cell::Places;
use crate::config::Config;
use crate::feed::Feed;
use crate::process::Held;
use crate::record::Record;
use crate::state::State;
use crate::store::Store;

/// How long something that is asked of a VMM waits for what was asked before: most answers take a hundredth of it.
const MOMENT: Duration = Duration::from_secs(2);

/// One guest. What does not change is beside the lock.
#[derive(Debug)]
pub struct Guest {
    pub id: String,
    pub name: String,
    pub owner: u32,
    pub uid: u32,
    pub address: Option<Ipv4Addr>,
    pub places: Places,
    /// What the guest writes to its serial console.
    pub console: Feed,
    /// What the jailer and the VMM have to say.
    pub log: Feed,
    inner: Mutex<Inner>,
    changed: Condvar,
}

/// What changes.
#[derive(Debug)]
pub struct Inner {
    pub record: Record,
    pub held: Option<Arc<Held>>,
    /// Its disk is there. Nobody may do anything with it before.
    pub is_made: bool,
    /// Somebody asks its VMM for something that must not be asked for twice at a time: "being paused".
    pub busy: Option<&'static str>,
    /// When it was last seen to start, by the clock that nobody sets.
    pub started: Option<Instant>,
    /// When its start by policy is due.
    pub due: Option<Instant>,
    /// When it is ended, if it does not go down before.
    pub overdue: Option<Instant>,
    /// It was asked to go down in this run, as far as this daemon knows.
    pub is_asked: bool,
    /// It was ended by us.
    pub is_killed: bool,
    /// Why there is no guest, where the VMM cannot know.
    pub why_ended: Option<String>,
    /// How often it has ended, since this daemon knows it.
    pub ends: u64,
    /// It was to be removed, and something was in the way.
    pub is_left: bool,
    /// The disk has refused its record as it is.
    pub is_unwritten: bool,
    /// There is a thread that asks it to go down until it has, or its time is over: the run after so many ends.
    pub being_asked: Option<u64>,
}

impl Inner {
    /// Only then can something be done with it.
    ///
    /// # Errors
    /// 409: it is being made.
    pub fn check_made(&self, name: &str) -> Result<(), Fault> {
        if self.is_made {
            return Ok(());
        }
        let message = format!("Guest {name} is being made; try again when that is done.");
        Err(Fault { status: 409, message })
    }
}

impl Guest {
    /// Of a record, without a process.
    pub fn new(config: &Config, store: &Store, record: Record) -> Guest {
        let directory = store.directory(&record.id);
        Guest {
            id: record.id.clone(),
            name: record.name.clone(),
            owner: record.owner,
            uid: record.uid,
            address: record.address,
            places: Places::new(config, &record.id),
            console: Feed::new(directory.join("console.log")),
            log: Feed::new(directory.join("vmm.log")),
            inner: Mutex::new(Inner {
                record,
                held: None,
                is_made: false,
                busy: None,
                started: None,
                due: None,
                overdue: None,
                is_asked: false,
                is_killed: false,
                why_ended: None,
                ends: 0,
                is_left: false,
                is_unwritten: false,
                being_asked: None,
            }),
            changed: Condvar::new(),
        }
    }

    /// For a moment: nobody waits for anything while they hold it, but for the disk to take a record.
    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody else asks its VMM for something until this is dropped. It waits for somebody who does, for a moment.
    ///
    /// # Errors
    /// 409: somebody does, and that takes long.
    pub fn claim(&self, what: &'static str) -> Result<Claim<'_>, Fault> {
        let waited = self.changed.wait_timeout_while(self.lock(), MOMENT, |inner| inner.busy.is_some());
        let mut inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        if let Some(busy) = inner.busy {
            let message = format!("Guest {} is {busy}; try again when that is done.", self.name);
            return Err(Fault { status: 409, message });
        }
        inner.busy = Some(what);
        Ok(Claim(self))
    }

    /// Whoever waits for a change looks again.
    pub fn changed(&self) {
        self.changed.notify_all();
    }

    /// Waits until this is so, at most so long. Whether it is.
    pub fn wait(&self, time: Duration, mut is_so: impl FnMut(&Inner) -> bool) -> bool {
        let waits = |inner: &mut Inner| !is_so(inner);
        let waited = self.changed.wait_timeout_while(self.lock(), time, waits);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// As clients are told of it.
    pub fn describe(&self) -> fleet::Guest {
        let inner = self.lock();
        let record = &inner.record;
        let has_process = record.state.has_process();
        fleet::Guest {
            id: self.id.clone(),
            name: self.name.clone(),
            image: record.image.clone(),
            owner: self.owner,
            state: record.state.on_the_wire(),
            cpus: record.cpus,
            memory_mib: record.memory_mib,
            max_memory_mib: record.max_memory_mib,
            disks: record.disks.clone(),
            command_line: record.command_line.clone(),
            network: record.address.is_some(),
            restart: record.restart,
            limits: record.limits,
            remove_when_ended: record.remove_when_ended,
            created_at: record.created_at,
            started_at: record.started_at,
            restarts: record.restarts,
            restart_at: record.restart_at,
            last_end: record.last_end.clone(),
            pid: record.process.as_ref().filter(|_| has_process).map(|process| process.pid),
            uid: self.uid,
            address: record.address,
            mac: record.address.map(|_| record.mac()),
            api_socket: has_process.then(|| self.places.api()),
        }
    }

    /// The state now.
    pub fn state(&self) -> State {
        self.lock().record.state
    }

    /// How it ended last.
    pub fn last_end(&self) -> Option<End> {
        self.lock().record.last_end.clone()
    }
}

/// The right to ask a VMM for something.
#[derive(Debug)]
pub struct Claim<'a>(&'a Guest);

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.lock().busy = None;
        self.0.changed();
    }
}
