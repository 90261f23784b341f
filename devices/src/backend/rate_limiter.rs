//! Token buckets that hold back a device's requests by number and by bytes, and a timer that says when to try again.
//!
//! Does not queue anything: the device leaves a request that may not go yet in its ring.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::timerfd::TimerFd;

/// The longest sleep before a look at the clock, however slowly a bucket fills; far within what a timer takes.
const MAX_WAIT: Duration = Duration::from_secs(3600);

/// A bucket as it is configured. A size or refill time of 0 means no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// Tokens (bytes or requests) it holds; it starts full.
    pub size: u64,
    /// Extra tokens, used first and never again.
    pub one_time_burst: u64,
    /// The time in which an empty bucket fills, in milliseconds.
    pub refill_ms: u64,
}

/// The limits of one direction of a device; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub bandwidth: Option<Bucket>,
    pub ops: Option<Bucket>,
}

/// Lets requests pass, or tells when they may.
pub struct RateLimiter {
    bandwidth: Option<Level>,
    ops: Option<Level>,
    timer: TimerFd,
    /// When the timer fires, or has fired and was not heard yet.
    due: Option<Instant>,
}

impl RateLimiter {
    /// With full buckets, or as they were saved. A saved bucket counts only for the same configuration.
    pub fn new(limits: Limits, state: Option<&RateLimiterState>) -> io::Result<RateLimiter> {
        Self::new_at(Instant::now(), limits, state)
    }

    fn new_at(now: Instant, limits: Limits, state: Option<&RateLimiterState>) -> io::Result<RateLimiter> {
        let saved = state.cloned().unwrap_or_default();
        Ok(RateLimiter {
            bandwidth: Level::new(limits.bandwidth, saved.bandwidth, now),
            ops: Level::new(limits.ops, saved.ops, now),
            timer: TimerFd::new()?,
            due: None,
        })
    }

    /// Readable when a request that was held back may go; to be answered with [`RateLimiter::clear`].
    pub fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Whether a request of this many bytes may go now. If not, nothing is taken and the timer is set.
    ///
    /// A request larger than the whole bucket goes when the bucket is full, and the next one waits until the debt is
    /// paid: the rate holds over time, and no request waits for ever.
    pub fn take(&mut self, bytes: u64) -> bool {
        let goes = self.passes(bytes);
        if goes {
            self.pay(bytes);
        }
        goes
    }

    /// Whether something may go now whose size shows only when it goes; it is then to be paid with [`RateLimiter::pay`].
    /// If not, the timer is set. A debt is paid before the next one goes, so that the rate holds over time.
    pub fn admits(&mut self) -> bool {
        self.passes(1)
    }

    /// Pays for something of this many bytes that [`RateLimiter::admits`] let go.
    pub fn pay(&mut self, bytes: u64) {
        for (level, cost) in [(&mut self.bandwidth, bytes), (&mut self.ops, 1)] {
            if let Some(level) = level {
                level.pay(cost);
            }
        }
    }

    /// Sets the timer for a device that has another reason to try again.
    pub fn wake_after(&mut self, wait: Duration) {
        self.set_timer(wait);
    }

    /// The timer has fired and was heard.
    pub fn clear(&mut self) {
        self.due = None;
        // Reading a timer that has not fired would block; setting one takes its readiness away and never blocks.
        if let Err(error) = self.timer.clear() {
            log::error!("rate limiter: cannot stop the timer: {error}");
        }
    }

    /// New limits from now on. A bucket whose configuration stays the same keeps its level. The timer fires at once, so
    /// that the device tries again.
    pub fn set_limits(&mut self, limits: Limits) {
        let saved = self.save();
        let now = Instant::now();
        self.bandwidth = Level::new(limits.bandwidth, saved.bandwidth, now);
        self.ops = Level::new(limits.ops, saved.ops, now);
        self.set_timer(Duration::ZERO);
    }

    /// The levels of the buckets. The time until they are restored does not fill them.
    pub fn save(&self) -> RateLimiterState {
        let save = |level: &Option<Level>| level.as_ref().map(|level| level.state);
        RateLimiterState { bandwidth: save(&self.bandwidth), ops: save(&self.ops) }
    }

    fn passes(&mut self, bytes: u64) -> bool {
        if self.bandwidth.is_none() && self.ops.is_none() {
            return true;
        }
        let wait = self.wait_at(Instant::now(), bytes);
        if let Some(wait) = wait {
            self.set_timer(wait);
        }
        wait.is_none()
    }

    /// The time until a request of this many bytes may go; `None` when it may.
    fn wait_at(&mut self, now: Instant, bytes: u64) -> Option<Duration> {
        let mut wait = None;
        for (level, cost) in [(&mut self.bandwidth, bytes), (&mut self.ops, 1)] {
            if let Some(level) = level {
                level.refill(now);
                wait = wait.max(level.missing(cost).map(|tokens| level.time_for(tokens, now)));
            }
        }
        wait
    }

    /// Only ever to an earlier time: somebody waits for the one that is set.
    fn set_timer(&mut self, wait: Duration) {
        // A timer set to zero is a timer switched off.
        let wait = wait.clamp(Duration::from_nanos(1), MAX_WAIT);
        let due = Instant::now() + wait;
        if self.due.is_some_and(|set| set <= due) {
            return;
        }
        self.due = Some(due);
        if let Err(error) = self.timer.reset(wait, None) {
            log::error!("rate limiter: cannot set the timer to {wait:?}: {error}");
        }
    }
}

/// [`RateLimiter`] as it is saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimiterState {
    bandwidth: Option<LevelState>,
    ops: Option<LevelState>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct LevelState {
    bucket: Bucket,
    burst: u64,
    /// At most the bucket's size; below zero after a request larger than the bucket.
    tokens: i128,
}

struct Level {
    state: LevelState,
    /// The time up to which `tokens` counts.
    refilled: Instant,
}

impl Level {
    fn new(bucket: Option<Bucket>, saved: Option<LevelState>, now: Instant) -> Option<Level> {
        let bucket = bucket.filter(|bucket| bucket.size > 0 && bucket.refill_ms > 0)?;
        let full = LevelState { bucket, burst: bucket.one_time_burst, tokens: bucket.size.into() };
        let mut state = saved.filter(|saved| saved.bucket == bucket).unwrap_or(full);
        // A damaged file shall not give an unlimited guest, nor a debt beyond what one request can make.
        state.tokens = state.tokens.clamp(-i128::from(u32::MAX), bucket.size.into());
        state.burst = state.burst.min(bucket.one_time_burst);
        Some(Level { state, refilled: now })
    }

    fn refill(&mut self, now: Instant) {
        let size = u128::from(self.state.bucket.size);
        let elapsed = now.saturating_duration_since(self.refilled).as_nanos();
        let earned = elapsed.saturating_mul(size) / self.refill_nanos();
        let tokens = self.state.tokens.saturating_add_unsigned(earned);
        if tokens >= i128::from(self.state.bucket.size) {
            self.state.tokens = self.state.bucket.size.into();
            self.refilled = now;
        } else {
            self.state.tokens = tokens;
            // Only the time of whole tokens is spent; the rest counts towards the next one.
            self.refilled += self.nanos(earned);
        }
    }

    /// Tokens that must come before a request of this cost may go; `None` when it may.
    fn missing(&self, cost: u64) -> Option<u128> {
        let needed = i128::from(cost.min(self.state.bucket.size));
        let missing = needed - self.state.tokens.saturating_add(self.state.burst.into());
        (cost > 0 && missing > 0).then_some(missing.unsigned_abs())
    }

    fn pay(&mut self, cost: u64) {
        let from_burst = cost.min(self.state.burst);
        self.state.burst -= from_burst;
        self.state.tokens = self.state.tokens.saturating_sub(i128::from(cost - from_burst));
    }

    /// The time from `now` until this many tokens have come, rounded up.
    fn time_for(&self, tokens: u128, now: Instant) -> Duration {
        let gone = now.saturating_duration_since(self.refilled);
        (self.nanos(tokens) + Duration::from_nanos(1)).saturating_sub(gone)
    }

    fn nanos(&self, tokens: u128) -> Duration {
        let size = u128::from(self.state.bucket.size);
        let nanos = tokens.saturating_mul(self.refill_nanos()) / size;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn refill_nanos(&self) -> u128 {
        u128::from(self.state.bucket.refill_ms) * 1_000_000
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    impl RateLimiter {
        fn take_at(&mut self, now: Instant, bytes: u64) -> Result<(), Duration> {
            match self.wait_at(now, bytes) {
                Some(wait) => Err(wait),
                None => {
                    self.pay(bytes);
                    Ok(())
                }
            }
        }
    }

    fn bucket(size: u64, one_time_burst: u64, refill_ms: u64) -> Option<Bucket> {
        Some(Bucket { size, one_time_burst, refill_ms })
    }

    fn limiter(bandwidth: Option<Bucket>, ops: Option<Bucket>) -> (RateLimiter, Instant) {
        let now = Instant::now();
        (RateLimiter::new_at(now, Limits { bandwidth, ops }, None).unwrap(), now)
    }

    #[test]
    fn a_full_bucket_empties_and_then_fills_at_its_rate() {
        let (mut limiter, start) = limiter(bucket(1000, 0, 1000), None);
        assert_eq!(limiter.take_at(start, 600), Ok(()));
        let wait = limiter.take_at(start, 600).unwrap_err();
        assert!(
            wait > SECOND / 10 * 2 - SECOND / 1000 && wait <= SECOND / 10 * 2 + SECOND / 1000,
            "{wait:?}"
        );
        assert!(limiter.take_at(start + SECOND / 10, 600).is_err());
        assert_eq!(limiter.take_at(start + wait, 600), Ok(()));
        assert_eq!(
            limiter.take_at(start + wait + 100 * SECOND, 1000),
            Ok(()),
            "it never holds more than its size"
        );
        assert!(limiter.take_at(start + wait + 100 * SECOND, 1).is_err());
    }

    #[test]
    fn what_is_paid_afterwards_holds_back_the_next_one_until_the_debt_is_paid() {
        let (mut limiter, start) = limiter(bucket(1000, 0, 1000), bucket(100, 0, 1000));
        assert_eq!(limiter.wait_at(start, 1), None);
        limiter.pay(3000);
        let wait = limiter.wait_at(start, 1).unwrap();
        assert!(wait >= 2 * SECOND && wait <= 2 * SECOND + SECOND / 100, "{wait:?}");
        assert_eq!(limiter.wait_at(start + wait, 1), None);
    }

    #[test]
    fn the_burst_is_used_first_and_once() {
        let (mut limiter, start) = limiter(None, bucket(2, 3, 1000));
        for _ in 0..5 {
            assert_eq!(limiter.take_at(start, 0), Ok(()));
        }
        assert!(limiter.take_at(start, 0).is_err());
        let later = start + 100 * SECOND;
        assert_eq!(limiter.take_at(later, 0), Ok(()));
        assert_eq!(limiter.take_at(later, 0), Ok(()));
        assert!(limiter.take_at(later, 0).is_err());
    }

    #[test]
    fn a_request_larger_than_the_bucket_goes_when_it_is_full_and_the_next_waits_for_the_debt() {
        let (mut limiter, start) = limiter(bucket(100, 0, 1000), None);
        assert_eq!(limiter.take_at(start, 300), Ok(()));
        assert!(limiter.take_at(start + SECOND, 1).is_err());
        assert!(limiter.take_at(start + 2 * SECOND, 1).is_err());
        assert_eq!(limiter.take_at(start + 2 * SECOND + SECOND / 10, 1), Ok(()));
    }

    #[test]
    fn a_request_held_back_by_one_bucket_takes_nothing_from_the_other() {
        let (mut limiter, start) = limiter(bucket(100, 0, 1000), bucket(1, 0, 1000));
        assert_eq!(limiter.take_at(start, 50), Ok(()));
        assert!(limiter.take_at(start, 50).is_err());
        let bandwidth = limiter.save().bandwidth.unwrap();
        assert!(bandwidth.tokens >= 50);
    }

    #[test]
    fn the_wait_counts_the_time_that_has_already_gone() {
        let (mut limiter, start) = limiter(None, bucket(1, 0, 1000));
        assert_eq!(limiter.take_at(start, 0), Ok(()));
        let wait = limiter.take_at(start + SECOND / 10 * 9, 0).unwrap_err();
        assert_eq!(wait, SECOND / 10 + Duration::from_nanos(1));
    }

    #[test]
    fn a_flush_costs_no_bandwidth_even_in_debt() {
        let (mut limiter, start) = limiter(bucket(100, 0, 1000), None);
        assert_eq!(limiter.take_at(start, 300), Ok(()));
        assert_eq!(limiter.take_at(start, 0), Ok(()));
    }

    #[test]
    fn size_or_time_of_zero_is_no_limit() {
        let (mut limiter, start) = limiter(bucket(0, 5, 1000), bucket(5, 5, 0));
        for _ in 0..100 {
            assert_eq!(limiter.take_at(start, u64::MAX), Ok(()));
        }
    }

    #[test]
    fn the_timer_says_when_to_try_again() {
        let (mut limiter, _) = limiter(None, bucket(1, 0, 20));
        assert!(limiter.take(0));
        while !limiter.take(0) {
            limiter.timer.wait().unwrap();
            limiter.clear();
        }
    }

    #[test]
    fn new_limits_keep_the_level_of_the_same_bucket_and_wake_the_device() {
        let hour = bucket(10, 0, 3_600_000);
        let (mut limiter, _) = limiter(hour, bucket(1, 0, 3_600_000));
        assert!(limiter.take(10));
        assert!(!limiter.take(10));
        limiter.set_limits(Limits { bandwidth: hour, ops: None });
        limiter.timer.wait().unwrap();
        assert!(!limiter.take(10), "its bandwidth is still used up");
        limiter.set_limits(Limits::default());
        assert!(limiter.take(10));
    }

    #[test]
    fn saved_levels_come_back_and_damaged_ones_are_bounded() {
        let limits = Limits { bandwidth: bucket(10, 5, 3_600_000), ops: None };
        let mut limiter = RateLimiter::new(limits, None).unwrap();
        assert!(limiter.take(15));
        let bytes = postcard::to_stdvec(&limiter.save()).unwrap();
        let mut state: RateLimiterState = postcard::from_bytes(&bytes).unwrap();
        assert_eq!(state, limiter.save());
        assert!(!RateLimiter::new(limits, Some(&state)).unwrap().take(10));

        let saved = state.bandwidth.as_mut().unwrap();
        (saved.tokens, saved.burst) = (i128::MAX, u64::MAX);
        let mut limiter = RateLimiter::new(limits, Some(&state)).unwrap();
        assert!(limiter.take(15));
        assert!(!limiter.take(10));
    }

    proptest! {
        #[test]
        fn no_configuration_and_no_request_overflows(
            size in any::<u64>(), burst in any::<u64>(), refill in any::<u64>(),
            costs in proptest::collection::vec((any::<u64>(), 0u64..1 << 40), 1..20),
        ) {
            let (mut limiter, mut now) = limiter(bucket(size, burst, refill), bucket(size, burst, refill));
            for (cost, nanos) in costs {
                now += Duration::from_nanos(nanos);
                let _ = limiter.take_at(now, cost);
            }
        }

        #[test]
        fn over_time_no_more_passes_than_size_burst_and_rate_allow(
            size in 1u64..10_000, burst in 0u64..10_000, refill in 1u64..5_000,
            costs in proptest::collection::vec((1u64..5_000, 0u64..50), 1..200),
        ) {
            let (mut limiter, start) = limiter(bucket(size, burst, refill), None);
            let (mut now, mut passed, mut largest) = (start, 0, 0);
            for (cost, millis) in costs {
                now += Duration::from_millis(millis);
                if limiter.take_at(now, cost).is_ok() {
                    passed += cost;
                    largest = largest.max(cost);
                }
            }
            let earned = (now - start).as_millis() as u64 * size / refill;
            prop_assert!(passed <= size + burst + earned + largest);
        }
    }
}
