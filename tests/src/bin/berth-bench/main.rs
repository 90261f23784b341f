//! Measures a boot of Debian's kernel in 128 MiB with one vCPU: Berth beside QEMU's microvm, in one run in one host,
//! interleaved, as medians and ratios; and what the jailer's cell adds. `make bench` runs it in the host; docs/benchmarks.md
//! says what it measures.
//!
//! It measures processes from outside, by strace, tracefs, /proc and their own sockets, and knows nothing of how they
//! work. What cannot be measured ends it: a table with holes would be taken for a good one.

mod cell;
mod measure;
mod peer;
mod table;
mod trace;

use std::process::ExitCode;

use berth_tests::host::error::{Error, Result};
use lexopt::prelude::*;
use measure::Bench;
use peer::Peer;
use table::Results;
use trace::Trace;

const HELP: &str = "\
berth-bench [--runs N]   measures N times, 5 if not given; more runs give a surer median. Run it by `make bench`.
";

const DEFAULT_RUNS: usize = 5;

fn main() -> ExitCode {
    match runs().and_then(|runs| runs.map_or(Ok(()), bench)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("berth-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// None when only help was wanted.
fn runs() -> Result<Option<usize>> {
    let mut arguments = lexopt::Parser::from_env();
    let usage = |error: lexopt::Error| Error(format!("{error}; see berth-bench --help"));
    let mut runs = DEFAULT_RUNS;
    while let Some(argument) = arguments.next().map_err(usage)? {
        match argument {
            Long("runs") => runs = arguments.value().and_then(|value| value.parse()).map_err(usage)?,
            Long("help") | Short('h') => {
                print!("{HELP}");
                return Ok(None);
            }
            other => return Err(usage(other.unexpected())),
        }
    }
    match runs {
        0 => Err(Error("--runs 0 measures nothing".into())),
        runs => Ok(Some(runs)),
    }
}

fn bench(runs: usize) -> Result<()> {
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
    let cells = cell::bench(runs)?;
    print!("{results}{cells}");
    Ok(())
}
