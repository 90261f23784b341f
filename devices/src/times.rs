//! How long things of one kind took. Any thread may add; whoever reads may see one in part.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Kept in nanoseconds, as the sum of many short times is no sum of rounded ones.
#[derive(Debug)]
pub struct Times {
    min_ns: AtomicU64,
    max_ns: AtomicU64,
    sum_ns: AtomicU64,
}

impl Times {
    /// Adds what has passed since `begin`.
    pub fn add(&self, begin: Instant) {
        self.add_ns(u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }

    /// The shortest in microseconds; 0 before the first.
    pub fn min_us(&self) -> u64 {
        match self.min_ns.load(Ordering::Relaxed) {
            u64::MAX => 0,
            ns => ns / 1000,
        }
    }

    /// The longest in microseconds.
    pub fn max_us(&self) -> u64 {
        self.max_ns.load(Ordering::Relaxed) / 1000
    }

    /// All together in microseconds.
    pub fn sum_us(&self) -> u64 {
        self.sum_ns.load(Ordering::Relaxed) / 1000
    }

    fn add_ns(&self, ns: u64) {
        self.min_ns.fetch_min(ns, Ordering::Relaxed);
        self.max_ns.fetch_max(ns, Ordering::Relaxed);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }
}

impl Default for Times {
    fn default() -> Self {
        let [max_ns, sum_ns] = [0; 2].map(AtomicU64::new);
        Self { min_ns: AtomicU64::new(u64::MAX), max_ns, sum_ns }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_the_longest_and_the_sum_are_told_in_microseconds() {
        let times = Times::default();
        let told = || [times.min_us(), times.max_us(), times.sum_us()];
        assert_eq!(told(), [0; 3]);
        times.add_ns(5_600);
        assert_eq!(told(), [5, 5, 5]);
        times.add_ns(2_600);
        times.add_ns(9_000);
        assert_eq!(told(), [2, 9, 17], "the sum is not that of whole microseconds");
    }
}
