//! A few threads for what is to be done after an end and when a time has come; and a gate for starts, each of which has a thread of
//! its own.
//!
//! They live as long as the process.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

/// What follows an end takes some tens of milliseconds of the disk's and the kernel's time.
const THREADS: usize = 8;

type Work = Box<dyn FnOnce() + Send>;

/// The queue has at most a few entries for each guest: the next is made by what the last one did.
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

/// Lets so many through at a time; the others wait.
#[derive(Debug)]
pub struct Gate {
    free: Mutex<usize>,
    changed: Condvar,
}

/// A place behind the gate; given back when dropped.
#[derive(Debug)]
pub struct Inside<'a>(&'a Gate);

impl Gate {
    /// One with so many places.
    pub fn new(places: usize) -> Gate {
        Gate { free: Mutex::new(places), changed: Condvar::new() }
    }

    /// Waits for a place.
    pub fn enter(&self) -> Inside<'_> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut free =
            self.changed.wait_while(free, |free| *free == 0).unwrap_or_else(PoisonError::into_inner);
        *free -= 1;
        Inside(self)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn no_more_are_inside_than_there_are_places() {
        let (gate, inside) = (Gate::new(2), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let _place = gate.enter();
                    assert!(inside.fetch_add(1, Ordering::SeqCst) < 2);
                    thread::yield_now();
                    inside.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        assert_eq!(*gate.free.lock().unwrap(), 2);
    }
}
