//! Measures a boot of Debian's kernel in 128 MiB with one vCPU: Berth beside QEMU's microvm, in one run in one host,
//! interleaved, as medians and ratios; what the jailer's cell adds; what disks, networks and sockets cost under
//! load; and what a second io thread brings.
//! `make bench` runs it in the host; docs/benchmarks.md says what it measures.
//!
//! It measures processes from outside, by strace, tracefs, /proc and their own sockets, and knows nothing of how they
//! work. What cannot be measured ends it: a table with holes would be taken for a good one.

mod cell;
mod disk;
mod fleet;
mod load;
mod measure;
mod network;
mod peer;
mod sockets;
mod table;
mod threads;
mod trace;

use std::process::ExitCode;

use berth_tests::host::error::{Error, Result};
use lexopt::prelude::*;
use measure::Bench;
use peer::Peer;
use table::Results;
use trace::Trace;

const HELP: &str = "\
berth-bench [--runs N] [PART...]   measures N times, 5 if not given; more runs give a surer median. Run it by `make bench`.

Parts, all if none is named: boot cell disk network sockets threads fleet
";

const DEFAULT_RUNS: usize = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Boot,
    Cell,
    Disk,
    Network,
    Sockets,
    Threads,
    Fleet,
}

impl Part {
    const ALL: [(&str, Part); 7] = [
        ("boot", Part::Boot),
        ("cell", Part::Cell),
        ("disk", Part::Disk),
        ("network", Part::Network),
        ("sockets", Part::Sockets),
        ("threads", Part::Threads),
        ("fleet", Part::Fleet),
    ];

    fn bench(self, runs: usize) -> Result<String> {
        match self {
            Part::Boot => boot(runs),
            Part::Cell => cell::bench(runs),
            Part::Disk => disk::bench(runs, &Trace::open()?),
            Part::Network => network::bench(runs, &Trace::open()?),
            Part::Sockets => sockets::bench(runs, &Trace::open()?),
            Part::Threads => threads::bench(runs, &Trace::open()?),
            Part::Fleet => fleet::bench(runs),
        }
    }
}

fn main() -> ExitCode {
    match wanted().and_then(|wanted| wanted.map_or(Ok(()), |(runs, parts)| bench(runs, &parts))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("berth-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// None when only help was wanted.
fn wanted() -> Result<Option<(usize, Vec<Part>)>> {
    let mut arguments = lexopt::Parser::from_env();
    let usage = |error: lexopt::Error| Error(format!("{error}; see berth-bench --help"));
    let (mut runs, mut parts) = (DEFAULT_RUNS, Vec::new());
    while let Some(argument) = arguments.next().map_err(usage)? {
        match argument {
            Long("runs") => runs = arguments.value().and_then(|value| value.parse()).map_err(usage)?,
            Long("help") | Short('h') => {
                print!("{HELP}");
                return Ok(None);
            }
            Value(name) => {
                let part = Part::ALL.into_iter().find(|(known, _)| name == *known);
                let unknown =
                    || Error(format!("there is no part {}; see berth-bench --help", name.display()));
                parts.push(part.ok_or_else(unknown)?.1);
            }
            other => return Err(usage(other.unexpected())),
        }
    }
    if parts.is_empty() {
        parts = Part::ALL.map(|(_, part)| part).into();
    }
    match runs {
        0 => Err(Error("--runs 0 measures nothing".into())),
        runs => Ok(Some((runs, parts))),
    }
}

fn bench(runs: usize, parts: &[Part]) -> Result<()> {
    for part in parts {
        // At once: what comes later takes minutes.
        print!("{}", part.bench(runs)?);
    }
    Ok(())
}

fn boot(runs: usize) -> Result<String> {
    let bench = Bench::new(Trace::open()?)?;
    // The first boots read kernels, programs and libraries from the disk.
    for peer in Peer::ALL {
        bench.timed(peer, &mut Results::default())?;
    }
    let mut results = Results::default();
    for run in 1..=runs {
        eprintln!("berth-bench: run {run} of {runs}");
        // The host may get faster or slower while this goes on: each peer has its turn in every run, and is first in
        // some.
        let mut order = Peer::ALL;
        order.rotate_left(run % Peer::ALL.len());
        for method in [Bench::timed, Bench::traced, Bench::straced, Bench::answering] {
            for peer in order {
                method(&bench, peer, &mut results)?;
            }
        }
    }
    Ok(results.to_string())
}
