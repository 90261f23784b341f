//! Keeps what a guest can cause at will from filling the log: one line per interval, with the number left out.

use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(1);

/// One kind of line of one device.
#[derive(Debug, Default)]
pub struct LogLimit {
    last: Option<Instant>,
    left_out: u64,
}

impl LogLimit {
    /// `Some` when a line may be written now, with the number of lines left out before it.
    pub fn pass(&mut self) -> Option<u64> {
        self.pass_at(Instant::now())
    }

    fn pass_at(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < INTERVAL) {
            self.left_out += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_per_interval_and_it_counts_the_others() {
        let (mut limit, start) = (LogLimit::default(), Instant::now());
        assert_eq!(limit.pass_at(start), Some(0));
        assert_eq!(limit.pass_at(start), None);
        assert_eq!(limit.pass_at(start + INTERVAL / 2), None);
        assert_eq!(limit.pass_at(start + INTERVAL), Some(2));
        assert_eq!(limit.pass_at(start + INTERVAL * 2), Some(0));
    }
}
