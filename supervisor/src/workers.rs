//! A few threads for work that nobody waits for: starts by policy, and what is to be done after an end.
//!
//! They live as long as the process: a jailer's parent is the thread that made it.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// Threads: a start takes some tens of milliseconds of the disk's and the kernel's time.
const THREADS: usize = 8;

type Work = Box<dyn FnOnce() + Send>;

/// The queue has at most one entry for each guest: the next is made by what the last one did.
#[derive(Debug, Clone)]
pub struct Workers(Sender<Work>);

impl Workers {
    /// Starts the threads.
    ///
    /// # Errors
    /// There can be no more threads.
    pub fn start(name: &str) -> io::Result<Workers> {
        let (sender, receiver) = channel::<Work>();
        let receiver = Arc::new(Mutex::new(receiver));
        for number in 0..THREADS {
            let receiver = receiver.clone();
            thread::Builder::new().name(format!("{name} {number}")).spawn(move || {
                loop {
                    let work = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(work) = work else { return };
                    work();
                }
            })?;
        }
        Ok(Workers(sender))
    }

    /// Does this when a thread is free.
    pub fn put(&self, work: impl FnOnce() + Send + 'static) {
        // The threads end only with the process.
        let _ = self.0.send(Box::new(work));
    }
}
