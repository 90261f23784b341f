//! Whether it pays to let others run before a queue that is empty is looked at once more.
//!
//! Where a guest's processor and the io thread share one of the host's, a kick takes the processor from the guest at once:
//! a driver that is about to make many requests gets each served, and is interrupted for it, alone. An io thread that gives
//! the processor back, kicks still off, finds all of them. A driver that waits for each request gains nothing by that, and
//! where somebody else is busy the io thread comes back late; so it is tried now and then, and goes on for as long as it
//! finds several, soon. What it brings: docs/benchmarks.md, Disks. A network interface and sockets gain nothing by it there:
//! their packets are large, and a guest takes longer over each than is waited for.

use std::time::{Duration, Instant};

/// With one request, the driver could as well have kicked.
const PAYS: u32 = 2;
/// Longest wait for each request that is found. With less than ten thousand of them in a second, kicks are no burden.
const PATIENCE: Duration = Duration::from_micros(100);
/// Trials in a row that may fail once one has paid: others than the guest may have had the processor.
const FAILURES: u8 = 4;
/// Who finds nothing after this long has waited for somebody who is busy with something else.
const SLICE: Duration = Duration::from_millis(1);
/// At most this part of the time goes into trials that fail; one counts for [`TRIAL`] at least.
const PART: u32 = 16;
const TRIAL: Duration = Duration::from_micros(50);

/// What is known of one queue.
#[derive(Debug, Default)]
pub struct Batching {
    /// How long others ran before the last look, if they were let.
    took: Option<Duration>,
    /// Trials that may fail yet.
    trust: u8,
    /// When the next trial may be.
    rests_until: Option<Instant>,
}

impl Batching {
    /// A look at the queue found so many requests, and they are done. True when others are to run before the next look;
    /// [`Batching::ran`] tells of it.
    pub fn pays_after(&mut self, found: u32, now: Instant) -> bool {
        if let Some(took) = self.took.take() {
            let has_paid = found >= PAYS && took <= PATIENCE * found;
            self.trust = match has_paid {
                true => FAILURES,
                // Somebody else is busy. It is paid for at once, or one that pays between each two would excuse them all.
                false if found == 0 && took > SLICE => 0,
                false => self.trust.saturating_sub(1),
            };
            if self.trust == 0 {
                self.rests_until = now.checked_add(took.max(TRIAL) * PART);
            }
        }
        found > 0 && self.rests_until.is_none_or(|until| now >= until)
    }

    #[cfg(test)]
    pub fn has_tried(&self) -> bool {
        self.took.is_some() || self.rests_until.is_some()
    }

    /// The others ran for this long.
    pub fn ran(&mut self, took: Duration) {
        self.took = Some(took);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of the looks, each 10 µs after the last one, were followed by letting others run for so long.
    fn trials(finds: impl IntoIterator<Item = u32>, took: Duration) -> usize {
        let (mut batching, mut now) = (Batching::default(), Instant::now());
        let is_followed = |&found: &u32| {
            now += Duration::from_micros(10);
            let pays = batching.pays_after(found, now);
            if pays {
                now += took;
                batching.ran(took);
            }
            pays
        };
        finds.into_iter().filter(is_followed).count()
    }

    const SOON: Duration = Duration::from_micros(20);
    const LATE: Duration = Duration::from_millis(3);

    #[test]
    fn who_finds_several_soon_goes_on() {
        assert_eq!(trials([2; 100], SOON), 100);
        assert_eq!(trials([32; 100], LATE), 100);
    }

    #[test]
    fn who_finds_one_or_comes_back_late_tries_in_a_small_part_of_the_time() {
        // 800 µs of rest are 80 looks, after one that is tried and the one that sees what came of it.
        assert_eq!(trials([1; 820], SOON), 11);
        // 48 ms are 4800.
        assert_eq!(trials([2; 9700], LATE), 3);
    }

    #[test]
    fn nobody_runs_where_nothing_was_found() {
        assert_eq!(trials([0; 100], SOON), 0);
        assert_eq!(trials([1, 0], SOON), 1);
    }

    #[test]
    fn one_that_has_paid_may_fail_a_few_times() {
        let failures = usize::from(FAILURES);
        assert_eq!(trials([2, 2].into_iter().chain(vec![1; failures + 1]), SOON), 1 + failures);
    }

    #[test]
    fn trials_in_vain_between_those_that_pay_take_a_small_part_of_the_time_too() {
        let (mut batching, begin) = (Batching::default(), Instant::now());
        let (mut now, mut in_vain) = (begin, Duration::ZERO);
        // A burst, after which its driver computes.
        for found in [1, 31, 0].into_iter().cycle().take(30_000) {
            now += Duration::from_micros(10);
            if batching.pays_after(found, now) {
                let took = if found == 1 { SOON } else { LATE };
                now += took;
                batching.ran(took);
                in_vain += if found == 31 { took } else { Duration::ZERO };
            }
        }
        assert!(in_vain * 8 <= now - begin, "{in_vain:?} of {:?}", now - begin);
    }

    #[test]
    fn a_trial_that_begins_to_pay_is_kept() {
        assert_eq!(trials(std::iter::repeat_n(1, 81).chain([8; 20]), SOON), 1 + 20);
    }
}
