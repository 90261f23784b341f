//! What is said of requests that fail: the first of each kind at once, further ones by their number from time to time, and
//! that it works again. A disk of the host's that is full or gone fails every request of a busy guest.
//!
//! Counts no metrics and writes no log: it makes the lines. What a request was for is the device's to say, by a type whose
//! `Display` continues "7 more: ".

use std::fmt::Display;
use std::io;
use std::time::{Duration, Instant};

/// Why a request is answered with another status than that it was done.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A type or flag that was not offered.
    #[error("request type or flag {0:#x} is not supported")]
    Unsupported(u32),
    #[error("the driver's request {0}")]
    Driver(&'static str),
    #[error("{0}")]
    Host(#[from] io::Error),
}

/// Between two lines about failures of one kind.
const SUMMARY_EVERY: Duration = Duration::from_secs(60);
/// A kind that has not come for so long, while requests like those worked, is over. Below it a disk that works now and then
/// would have it said each time.
const OVER_AFTER: Duration = Duration::from_secs(5);
/// How many kinds are told apart; beyond them the last is taken for all others. A host has few, a driver may try many.
const MAX_KINDS: usize = 8;

/// The failures that there are now, by kind.
#[derive(Debug)]
pub struct Troubles<What>(Vec<Trouble<What>>);

#[derive(Debug)]
struct Trouble<What> {
    what: What,
    cause: Cause,
    /// The cause in words.
    text: String,
    told_at: Instant,
    last: Instant,
    /// Failures since the last line.
    untold: u64,
}

/// What makes two failures of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Unsupported,
    Driver(&'static str),
    Host(Option<i32>, io::ErrorKind),
}

impl Cause {
    fn of(failure: &Failure) -> Cause {
        match failure {
            Failure::Unsupported(_) => Cause::Unsupported,
            Failure::Driver(text) => Cause::Driver(text),
            Failure::Host(error) => Cause::Host(error.raw_os_error(), error.kind()),
        }
    }
}

impl<What> Default for Troubles<What> {
    fn default() -> Troubles<What> {
        Troubles(Vec::new())
    }
}

impl<What: Copy + PartialEq + Display> Troubles<What> {
    /// A request failed; what is to be said of it, if anything.
    pub fn failed(&mut self, what: What, failure: &Failure, now: Instant) -> Option<String> {
        let cause = Cause::of(failure);
        let known = self.0.iter().position(|trouble| (trouble.what, trouble.cause) == (what, cause));
        let place = known.unwrap_or(MAX_KINDS - 1);
        let Some(trouble) = self.0.get_mut(place) else {
            let text = failure.to_string();
            self.0.push(Trouble { what, cause, text, told_at: now, last: now, untold: 0 });
            return Some(failure.to_string());
        };
        trouble.last = now;
        trouble.untold += 1;
        if now.saturating_duration_since(trouble.told_at) < SUMMARY_EVERY {
            return None;
        }
        trouble.told_at = now;
        Some(trouble.summary())
    }

    /// Nothing fails, and so [`Troubles::worked`] has nothing to do.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A request was done: what is to be said of those before it.
    pub fn worked(&mut self, what: What, now: Instant) -> Vec<String> {
        let is_over = |trouble: &mut Trouble<What>| {
            trouble.what == what && now.saturating_duration_since(trouble.last) >= OVER_AFTER
        };
        self.0.extract_if(.., is_over).filter_map(Trouble::end).collect()
    }

    /// The device stops, or has another disk: what was not said yet.
    pub fn clear(&mut self) -> Vec<String> {
        self.0.drain(..).filter(|trouble| trouble.untold > 0).map(|mut trouble| trouble.summary()).collect()
    }
}

impl<What: Display> Trouble<What> {
    fn summary(&mut self) -> String {
        let Trouble { what, text, .. } = self;
        format!("{} more: {what}: {text}", std::mem::take(&mut self.untold))
    }

    /// That the driver makes no mistakes now is not worth a line, but how many it made is.
    fn end(mut self) -> Option<String> {
        match self.cause {
            Cause::Host(..) if self.untold > 0 => {
                let summary = self.summary();
                Some(format!("{} works again; {summary}", self.what))
            }
            Cause::Host(..) => Some(format!("{} works again", self.what)),
            _ => (self.untold > 0).then(|| self.summary()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::blk::What;

    fn full() -> Failure {
        Failure::Host(io::Error::from_raw_os_error(libc::ENOSPC))
    }

    fn after(seconds: u64) -> Instant {
        static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
        *START + Duration::from_secs(seconds)
    }

    #[test]
    fn the_first_failure_is_told_the_others_by_their_number_and_when_it_works_again() {
        let mut troubles = Troubles::default();
        let text = "No space left on device (os error 28)";
        assert_eq!(troubles.failed(What::Write, &full(), after(0)).unwrap(), text);
        for seconds in 0..60 {
            assert_eq!(troubles.failed(What::Write, &full(), after(seconds)), None);
        }
        let summary = troubles.failed(What::Write, &full(), after(60)).unwrap();
        assert_eq!(summary, format!("61 more: writing: {text}"));
        assert_eq!(troubles.failed(What::Write, &full(), after(61)), None);
        assert!(troubles.worked(What::Write, after(65)).is_empty(), "too early to say");
        assert!(troubles.worked(What::Read, after(70)).is_empty(), "reading is no writing");
        let over = troubles.worked(What::Write, after(70));
        assert_eq!(over, [format!("writing works again; 1 more: writing: {text}")]);
        assert!(troubles.is_empty());
        assert!(troubles.failed(What::Write, &full(), after(71)).is_some(), "it is the first again");
        assert_eq!(troubles.worked(What::Write, after(76)), ["writing works again"]);
    }

    #[test]
    fn a_disk_that_works_now_and_then_is_no_flood() {
        let mut troubles = Troubles::default();
        let mut lines = 0;
        for seconds in 0..600 {
            lines += usize::from(troubles.failed(What::Read, &full(), after(seconds)).is_some());
            lines += troubles.worked(What::Read, after(seconds)).len();
        }
        assert_eq!(lines, 10);
    }

    #[test]
    fn kinds_are_told_apart_up_to_a_limit() {
        let mut troubles = Troubles::default();
        let broken = || Failure::Host(io::Error::from_raw_os_error(libc::EIO));
        for failure in [full(), broken(), Failure::Unsupported(9), Failure::Driver("has no header")] {
            for what in [What::Read, What::Write, What::Flush] {
                troubles.failed(what, &failure, after(0));
            }
        }
        assert_eq!(troubles.0.len(), MAX_KINDS);
        assert_eq!(troubles.0.iter().map(|trouble| trouble.untold).sum::<u64>(), 4);
        assert_eq!(troubles.clear().len(), 1);
    }

    #[test]
    fn mistakes_of_the_driver_are_numbered_and_their_end_is_no_news() {
        let mut troubles = Troubles::default();
        let mistake = Failure::Driver("has no header");
        assert!(troubles.failed(What::Other, &mistake, after(0)).is_some());
        assert!(troubles.worked(What::Other, after(9)).is_empty() && troubles.is_empty());
        for _ in 0..3 {
            troubles.failed(What::Other, &mistake, after(10));
        }
        let summary = "2 more: requests: the driver's request has no header";
        assert_eq!(troubles.worked(What::Other, after(20)), [summary]);
    }
}
