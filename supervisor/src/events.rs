//! What happens to guests, told to whoever listens. Nothing is kept for who comes later: the state of guests is what to ask for.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api_socket::fleet::{End, Event};

use crate::fleet::User;

/// Events that are kept for who is slow to take them.
pub const KEPT: usize = 1024;

/// All events of this run of the daemon.
#[derive(Debug, Default)]
pub struct Events {
    inner: Mutex<Inner>,
    comes: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    /// Of the next event.
    number: u64,
    /// With the users whose guests they are of, who may have been removed since.
    kept: VecDeque<(User, Event)>,
}

impl Events {
    /// Tells one, of a guest of this user's.
    pub fn tell(&self, what: &str, owner: User, id: &str, name: &str, end: Option<End>) {
        let mut inner = self.lock();
        let number = inner.number;
        inner.number += 1;
        if inner.kept.len() == KEPT {
            inner.kept.pop_front();
        }
        let (what, id, name) = (what.to_owned(), id.to_owned(), name.to_owned());
        inner.kept.push_back((owner, Event { number, at: now(), what, id, name, end }));
        self.comes.notify_all();
    }

    /// The number of the next event.
    pub fn next(&self) -> u64 {
        self.lock().number
    }

    /// Those from this number on that are kept, or come within this time. Who is too slow sees a gap in the numbers.
    pub fn since(&self, number: u64, time: Duration) -> Vec<(User, Event)> {
        let inner = self.lock();
        let waits = |inner: &mut Inner| inner.number <= number;
        let (inner, _) =
            self.comes.wait_timeout_while(inner, time, waits).unwrap_or_else(PoisonError::into_inner);
        inner.kept.iter().filter(|(_, event)| event.number >= number).cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Seconds since 1970-01-01 UTC, in whole microseconds: so many digits are the same when they were written and read again.
pub fn now() -> f64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0.0, |time| time.as_micros() as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_the_same_when_it_was_written_and_read() {
        for _ in 0..1000 {
            let time = now();
            let read: f64 = serde_json::from_str(&serde_json::to_string(&time).unwrap()).unwrap();
            assert!(read.to_bits() == time.to_bits(), "{time} {read}");
        }
    }

    #[test]
    fn events_are_told_in_their_order_and_the_oldest_are_let_go() {
        let events = Events::default();
        let start = events.next();
        assert!(events.since(start, Duration::ZERO).is_empty());
        events.tell("running", 1000, "id", "web", None);
        events.tell("paused", 1000, "id", "web", None);
        let whats = |from| {
            let since = events.since(from, Duration::ZERO);
            since.into_iter().map(|(_, event)| event.what).collect::<Vec<_>>()
        };
        assert_eq!(whats(start), ["running", "paused"]);
        assert_eq!(whats(start + 1), ["paused"]);
        for _ in 0..2 * KEPT {
            events.tell("running", 1000, "id", "web", None);
        }
        let kept = events.since(start, Duration::ZERO);
        assert_eq!((kept.len(), kept[0].1.number), (KEPT, KEPT as u64 + 2));
    }
}
