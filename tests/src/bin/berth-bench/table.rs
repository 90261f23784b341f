//! What was measured, as tables that can stand in docs/benchmarks.md as they are.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::Hash;

use crate::peer::Peer;
use crate::trace::Exits;

/// How many lines there are of where the exits come from.
const MAX_ORIGINS: usize = 20;

/// Something that is measured of each peer in each run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Measure {
    SystemCalls,
    UserExits,
    AllExits,
    SteadyExits,
    ApiWall,
    ApiCpu,
    FirstEntry,
    Init,
    Rss,
    Private,
    Anonymous,
}

impl Measure {
    const ALL: [Measure; 11] = [
        Measure::SystemCalls,
        Measure::UserExits,
        Measure::AllExits,
        Measure::SteadyExits,
        Measure::ApiWall,
        Measure::ApiCpu,
        Measure::FirstEntry,
        Measure::Init,
        Measure::Rss,
        Measure::Private,
        Measure::Anonymous,
    ];

    fn name(self) -> &'static str {
        match self {
            Measure::SystemCalls => "system calls before the first KVM_RUN",
            Measure::UserExits => "exits to user space until init",
            Measure::AllExits => "all KVM exits until init",
            Measure::SteadyExits => "of these, not for interrupts and timers",
            Measure::ApiWall => "start to the API's answer, ms",
            Measure::ApiCpu => "the same, ms of processor time",
            Measure::FirstEntry => "start to the first KVM entry, ms",
            Measure::Init => "start to init, ms",
            Measure::Rss => "resident beyond guest memory, MiB",
            Measure::Private => "of that private, MiB",
            Measure::Anonymous => "of that anonymous, MiB",
        }
    }

    /// A value in the unit of the name. Times are measured in µs and memory in KiB.
    fn show(self, value: u64) -> String {
        match self {
            Measure::SystemCalls | Measure::UserExits | Measure::AllExits | Measure::SteadyExits => {
                value.to_string()
            }
            Measure::ApiWall | Measure::ApiCpu | Measure::FirstEntry => {
                format!("{:.1}", value as f64 / 1000.0)
            }
            Measure::Init => format!("{:.0}", value as f64 / 1000.0),
            Measure::Rss | Measure::Private | Measure::Anonymous => format!("{:.2}", value as f64 / 1024.0),
        }
    }
}

/// Values by what they were measured of.
#[derive(Debug)]
pub struct Samples<K>(HashMap<K, Vec<u64>>);

impl<K> Default for Samples<K> {
    fn default() -> Self {
        Samples(HashMap::new())
    }
}

impl<K: Eq + Hash> Samples<K> {
    pub fn add(&mut self, key: K, value: u64) {
        self.0.entry(key).or_default().push(value);
    }

    /// Median, and least and most if they differ; a hyphen for what was not measured.
    pub fn spread(&self, key: K, show: impl Fn(u64) -> String) -> String {
        let values = self.sorted(key);
        let (Some(median), Some(least), Some(most)) = (median(&values), values.first(), values.last()) else {
            return "-".into();
        };
        let [median, least, most] = [median, *least, *most].map(show);
        if least == most { median } else { format!("{median} ({least} to {most})") }
    }

    /// The same with the ratio of its median to another's, if that is another.
    pub fn compared(&self, key: K, base: K, show: impl Fn(u64) -> String) -> String
    where
        K: Copy,
    {
        let spread = self.spread(key, show);
        match (self.median(key), self.median(base)) {
            (Some(own), Some(other @ 1..)) if key != base => {
                format!("{spread}, **{:.2}**", own as f64 / other as f64)
            }
            _ => spread,
        }
    }

    pub fn median(&self, key: K) -> Option<u64> {
        median(&self.sorted(key))
    }

    fn sorted(&self, key: K) -> Vec<u64> {
        let mut values = self.0.get(&key).cloned().unwrap_or_default();
        values.sort_unstable();
        values
    }
}

#[derive(Debug, Default)]
pub struct Results {
    samples: Samples<(Peer, Measure)>,
    exits: HashMap<Peer, Exits>,
}

impl Results {
    pub fn add(&mut self, peer: Peer, measure: Measure, value: u64) {
        self.samples.add((peer, measure), value);
    }

    /// Where the exits of a boot come from; of several boots, the last.
    pub fn keep_exits(&mut self, peer: Peer, exits: Exits) {
        self.exits.insert(peer, exits);
    }

    /// Median, least and most, and the ratio of the median to the base's.
    fn cell(&self, peer: Peer, measure: Measure) -> String {
        self.samples.compared((peer, measure), (Peer::BASE, measure), |value| measure.show(value))
    }
}

fn median(sorted: &[u64]) -> Option<u64> {
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get(sorted.len().checked_sub(1)? / 2)?;
    Some(u64::midpoint(lower, upper))
}

impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Median (least to most), **ratio to {}**:\n", Peer::BASE)?;
        head(f)?;
        for measure in Measure::ALL {
            row(f, measure.name(), |peer| self.cell(peer, measure))?;
        }
        writeln!(f, "\nWhere the exits to user space come from, in the last run:\n")?;
        self.write_origins(f, |exits| &exits.by_target)?;
        writeln!(f, "\nWhat all exits are for, in the last run:\n")?;
        self.write_origins(f, |exits| &exits.by_reason)
    }
}

impl Results {
    fn write_origins(
        &self,
        f: &mut fmt::Formatter<'_>,
        of: fn(&Exits) -> &BTreeMap<String, u64>,
    ) -> fmt::Result {
        let count =
            |peer: Peer, name: &str| self.exits.get(&peer).and_then(|exits| of(exits).get(name).copied());
        let mut sums = BTreeMap::<&str, u64>::new();
        for (name, count) in self.exits.values().flat_map(of) {
            *sums.entry(name).or_default() += count;
        }
        let mut names: Vec<_> = sums.into_iter().collect();
        names.sort_by_key(|(_, sum)| std::cmp::Reverse(*sum));
        let rest = names.split_off(names.len().min(MAX_ORIGINS));
        head(f)?;
        for (name, _) in names {
            row(f, name, |peer| count(peer, name).map_or("-".into(), |count| count.to_string()))?;
        }
        if rest.is_empty() {
            return Ok(());
        }
        let other = |peer| rest.iter().filter_map(|(name, _)| count(peer, name)).sum::<u64>();
        row(f, "others", |peer| other(peer).to_string())
    }
}

fn head(f: &mut fmt::Formatter<'_>) -> fmt::Result {
    row(f, "", |peer| peer.to_string())?;
    writeln!(f, "|---|{}", "---|".repeat(Peer::ALL.len()))
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, cell: impl Fn(Peer) -> String) -> fmt::Result {
    writeln!(f, "| {name} | {} |", Peer::ALL.map(cell).join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_has_median_spread_and_ratio() {
        let mut results = Results::default();
        for value in [3072, 1024, 2048] {
            results.add(Peer::BerthPci, Measure::Rss, value);
        }
        results.add(Peer::BASE, Measure::Rss, 4096);
        assert_eq!(results.cell(Peer::BerthPci, Measure::Rss), "2.00 (1.00 to 3.00), **0.50**");
        assert_eq!(results.cell(Peer::BASE, Measure::Rss), "4.00");
        assert_eq!(results.cell(Peer::BerthMmio, Measure::Rss), "-");
    }

    #[test]
    fn the_median_of_an_even_number_is_between_the_two_in_the_middle() {
        assert_eq!(median(&[1, 2, 4, 9]), Some(3));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn the_many_origins_of_few_exits_are_summed() {
        let names = (0..=MAX_ORIGINS).map(|n| (format!("port {n:02}"), if n == 0 { 1 } else { 7 }));
        let mut results = Results::default();
        results.keep_exits(Peer::BerthPci, Exits { by_target: names.collect(), ..Exits::default() });
        let text = results.to_string();
        assert!(text.contains("| port 20 | 7 | - | - |\n| others | 1 | 0 | 0 |"), "{text}");
    }
}
