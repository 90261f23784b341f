//! A token bucket: so much at once, so much in a time.
//!
//! Knows no clock and no waiting: the caller says what time it is, and what to do when there are no tokens.

use std::time::{Duration, Instant};

/// A bucket that starts full.
#[derive(Clone, Debug)]
pub struct Bucket {
    size: u64,
    /// The time in which an empty bucket fills.
    refill: Duration,

    tokens: u64,
    /// Taken before `tokens`, and never filled again.
    burst: u64,
    /// The time up to which `tokens` is right.
    filled: Instant,
}

impl Bucket {
    /// `None` when `size` or `refill` is 0: no limit.
    pub fn new(size: u64, refill: Duration, one_time_burst: u64, now: Instant) -> Option<Bucket> {
        let limited = size > 0 && !refill.is_zero();
        limited.then_some(Bucket { size, refill, tokens: size, burst: one_time_burst, filled: now })
    }

    /// Takes `count` tokens, all or none, and says whether they were there. More than the bucket holds never are.
    pub fn take(&mut self, count: u64, now: Instant) -> bool {
        self.fill(now);
        if self.tokens.saturating_add(self.burst) < count {
            return false;
        }
        let from_burst = self.burst.min(count);
        self.burst -= from_burst;
        self.tokens -= count - from_burst;
        true
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled);
        let new = elapsed.as_nanos().saturating_mul(self.size.into()) / self.refill.as_nanos();
        let missing = self.size - self.tokens;
        if new >= missing.into() {
            (self.tokens, self.filled) = (self.size, now);
        } else if let Ok(new) = u64::try_from(new) {
            self.tokens += new;
            // Only the time of whole tokens has passed, or a bucket that is asked often would never fill.
            let spent = u128::from(new) * self.refill.as_nanos() / u128::from(self.size);
            self.filled += Duration::from_nanos(u64::try_from(spent).unwrap_or(u64::MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn ten_a_second(burst: u64) -> (Bucket, Instant) {
        let now = Instant::now();
        (Bucket::new(10, SECOND, burst, now).unwrap(), now)
    }

    #[test]
    fn a_bucket_gives_what_it_holds_and_then_nothing() {
        let (mut bucket, now) = ten_a_second(0);
        assert!(bucket.take(4, now));
        assert!(bucket.take(6, now));
        assert!(!bucket.take(1, now));
    }

    #[test]
    fn it_fills_evenly_and_not_beyond_its_size() {
        let (mut bucket, now) = ten_a_second(0);
        assert!(bucket.take(10, now));
        assert!(!bucket.take(6, now + SECOND / 2));
        assert!(bucket.take(5, now + SECOND / 2));
        assert!(!bucket.take(11, now + 100 * SECOND));
        assert!(bucket.take(10, now + 100 * SECOND));
    }

    #[test]
    fn it_fills_though_it_is_asked_more_often_than_a_token_comes() {
        let (mut bucket, now) = ten_a_second(0);
        assert!(bucket.take(10, now));
        let granted = (1..=1000).filter(|ms| bucket.take(1, now + Duration::from_millis(*ms))).count();
        assert_eq!(granted, 10);
    }

    #[test]
    fn the_burst_is_spent_once() {
        let (mut bucket, now) = ten_a_second(20);
        assert!(bucket.take(30, now));
        assert!(!bucket.take(11, now + 10 * SECOND));
        assert!(bucket.take(10, now + 10 * SECOND));
    }

    #[test]
    fn a_size_or_a_time_of_nothing_is_no_limit() {
        let now = Instant::now();
        assert!(Bucket::new(0, SECOND, 0, now).is_none());
        assert!(Bucket::new(1, Duration::ZERO, 0, now).is_none());
    }

    #[test]
    fn no_number_overflows() {
        let now = Instant::now();
        let mut bucket = Bucket::new(u64::MAX, Duration::from_millis(u64::MAX), u64::MAX, now).unwrap();
        assert!(bucket.take(u64::MAX, now));
        assert!(bucket.take(u64::MAX, now));
        assert!(!bucket.take(1, now));
        bucket.take(1, now + Duration::from_secs(1 << 30));
        // A clock that goes back gives nothing and takes nothing.
        assert!(!bucket.take(u64::MAX, now));
    }
}
