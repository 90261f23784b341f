//! Runs the tests that need real guests: each `#[test]` of the executables that cargo makes of `tests/*.rs`, alone in a
//! host, several hosts side by side.
//!
//! A host serves one test after another, until one fails, hangs or leaves a process behind; then a fresh one takes
//! over. A test finds `$BERTH_SCRATCH` empty, works in it, and may skip itself by printing `SKIPPED: reason` and
//! returning. A file whose name begins with `big_` gets hosts with more memory. In a soak run
//! `$BERTH_SOAK` is set and every test has more time: those that repeat something do so many more times.
//!
//! It retries nothing: a test that fails now and then is a failure.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::choose::Choice;
use super::error::{Doing, Error, Result};
use super::image::Item;
use super::link::Event;
use super::{Config, DEFAULT_MEMORY_MIB, Host, SOAK, process, rundir};

/// Time for one test: some seven times what the slowest needs on an idle machine. What hangs is found by the test's own limits.
const LIMIT: Duration = Duration::from_secs(1500);

/// Time for a test of a soak run.
const SOAK_LIMIT: Duration = Duration::from_secs(4 * 3600);

/// Memory of the nested hosts for files named `big_*`. One of them runs at a time.
const BIG_MEMORY_MIB: u64 = 8 << 10;

/// Hosts side by side, whatever the machine has.
const MAX_HOSTS: usize = 8;

/// Of this machine's free memory, hosts get three quarters.
const MEMORY_SHARE: (u64, u64) = (3, 4);

/// Output of a test that is kept in memory to be shown; its log file has all of it.
const MAX_SHOWN: usize = 64 << 10;

/// Lines of the host's kernel log shown after a failure; its file has all of it.
const SHOWN_LINES: usize = 25;

/// Time to collect what a failed test left.
const COLLECT_LIMIT: Duration = Duration::from_secs(60);

/// Files larger than this (in KiB) are no logs and stay in the host.
const MAX_LOG_KIB: u32 = 4096;

/// A test begins in an empty directory, without the time and space of one for each test.
const IN_SCRATCH: &str = r#"cd "$BERTH_SCRATCH" && find . -mindepth 1 -delete && exec "$@""#;

/// What cargo built and what to make of it.
#[derive(Clone, Debug)]
pub struct Plan {
    tests: Vec<Test>,
    executables: Vec<Item>,
    is_soak: bool,
}

#[derive(Clone, Debug, PartialEq)]
struct Test {
    /// The file in tests/, without its ending.
    file: String,
    name: String,
    is_ignored: bool,
}

#[derive(Clone, Debug, PartialEq)]
enum Outcome {
    Passed,
    Skipped(String),
    Failed(Failure),
}

#[derive(Clone, Debug, PartialEq)]
struct Failure {
    reason: String,
    output: String,
    kernel_log: String,
}

struct Report {
    test: Test,
    outcome: Outcome,
    took: Duration,
    /// Which host ran it, and how that came to be.
    host: String,
}

enum Happening {
    Done(Report),
    /// A host could not be started.
    Broken(Error),
    Signal(i32),
}

impl Plan {
    /// Has cargo build the tests and lists those whose `file::name` contains `filter`, to be run at the length of a
    /// soak run or at the usual one.
    pub fn make(filter: Option<&str>, is_soak: bool) -> Result<Self> {
        let executables = build()?;
        let mut tests = Vec::new();
        for executable in &executables {
            tests.extend(list(executable)?);
        }
        tests.retain(|test| filter.is_none_or(|filter| test.full_name().contains(filter)));
        if tests.is_empty() && filter.is_some() {
            return Err(Error(format!("no test has {:?} in its name", filter.unwrap_or_default())));
        }
        Ok(Self { tests, executables, is_soak })
    }

    /// The test executables, to be shown by the hosts.
    pub fn executables(&self) -> Vec<Item> {
        self.executables.clone()
    }
}

/// Runs the tests and gives this process's exit code. `config` shows the plan's executables. Logs of this run replace
/// those of the last in `logs`. Call [`process::hold_signals`] before.
pub fn run(config: &Config, plan: Plan, choice: &Choice, jobs: Option<usize>, logs: &Path) -> Result<i32> {
    let _ = fs::remove_dir_all(logs);
    fs::create_dir_all(logs).doing(|| format!("cannot make {}", logs.display()))?;
    let jobs = jobs.unwrap_or_else(|| hosts_that_fit(free_memory_mib())).min(plan.tests.len()).max(1);
    println!("{choice}; {} tests, {jobs} hosts side by side", plan.tests.len());

    let (tell, happenings) = channel();
    let queue = Arc::new(Queue::new(plan.tests));
    let total = queue.len();
    let on_signal = tell.clone();
    std::thread::spawn(move || while on_signal.send(Happening::Signal(process::next_signal())).is_ok() {});
    for number in 1..=jobs {
        let worker = Worker {
            number,
            config: config.clone(),
            queue: Arc::clone(&queue),
            tell: tell.clone(),
            logs: logs.to_owned(),
            is_soak: plan.is_soak,
        };
        std::thread::spawn(move || worker.work());
    }

    let mut reports = Vec::new();
    while reports.len() < total {
        match happenings.recv() {
            Ok(Happening::Done(report)) => {
                print_report(&report, logs);
                reports.push(report);
            }
            Ok(Happening::Signal(process::RESIZED)) => {}
            Ok(Happening::Signal(signal)) => {
                // The workers end with this process, and the hosts with the workers.
                rundir::remove_own(&config.run_parent());
                return Ok(128 + signal);
            }
            Ok(Happening::Broken(error)) => {
                rundir::remove_own(&config.run_parent());
                return Err(error);
            }
            Err(_) => return Err(Error("the tests' threads ended".into())),
        }
    }
    Ok(print_summary(&reports))
}

/// Has cargo build the test executables and says where they are.
fn build() -> Result<Vec<Item>> {
    let building = || "cannot build the tests";
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["test", "--package", "berth-tests", "--no-run", "--tests"])
        .args(["--message-format", "json-render-diagnostics"])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .doing(building)?;
    if !output.status.success() {
        return Err(Error(format!("{}: cargo ended with {}", building(), output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(executable).collect())
}

/// Executables named so try the host from outside: they are no tests with guests.
const FROM_OUTSIDE: &str = "here_";

/// The integration test executable that a line of cargo's messages tells of, if it is one with guests.
fn executable(line: &str) -> Option<Item> {
    let message: Value = serde_json::from_str(line).ok()?;
    let target = message.get("target")?;
    let is_test = target.get("kind")?.as_array()?.iter().any(|kind| kind == "test");
    let name = target.get("name")?.as_str()?;
    let path = message.get("executable")?.as_str()?;
    (is_test && !name.starts_with(FROM_OUTSIDE)).then(|| Item::new(format!("tests/{name}"), path))
}

/// The tests in an executable. Listing runs none of them, so it is done on this machine.
fn list(executable: &Item) -> Result<Vec<Test>> {
    let names = |more: &[&str]| -> Result<Vec<String>> {
        let listing = || format!("cannot list the tests of {}", executable.path.display());
        let mut command = Command::new(&executable.path);
        let output = command.args(["--list", "--format", "terse"]).args(more).output().doing(listing)?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(String::from).collect())
    };
    let ignored = names(&["--ignored"])?;
    let file = executable.name.trim_start_matches("tests/");
    let test = |name: String| Test { file: file.into(), is_ignored: ignored.contains(&name), name };
    Ok(names(&[])?.into_iter().map(test).collect())
}

impl Test {
    fn full_name(&self) -> String {
        format!("{}::{}", self.file, self.name)
    }

    fn is_big(&self) -> bool {
        self.file.starts_with("big_")
    }

    fn memory_mib(&self) -> u64 {
        if self.is_big() { BIG_MEMORY_MIB } else { DEFAULT_MEMORY_MIB }
    }
}

/// How many hosts run side by side: one for each processor, as far as memory allows with one of them a big one.
fn hosts_that_fit(free_mib: u64) -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let share = free_mib * MEMORY_SHARE.0 / MEMORY_SHARE.1;
    let others = share.saturating_sub(BIG_MEMORY_MIB) / DEFAULT_MEMORY_MIB;
    (1 + others as usize).min(processors).min(MAX_HOSTS)
}

fn free_memory_mib() -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or_default() >> 10
}

/// Tests that wait. Big ones are for the first host only, which takes them first, so that one big host is up at most.
struct Queue {
    big: Mutex<VecDeque<Test>>,
    others: Mutex<VecDeque<Test>>,
}

impl Queue {
    fn new(tests: Vec<Test>) -> Self {
        let (big, others): (Vec<_>, Vec<_>) = tests.into_iter().partition(Test::is_big);
        Self { big: Mutex::new(big.into()), others: Mutex::new(others.into()) }
    }

    fn len(&self) -> usize {
        let length =
            |queue: &Mutex<VecDeque<Test>>| queue.lock().unwrap_or_else(PoisonError::into_inner).len();
        length(&self.big) + length(&self.others)
    }

    fn next(&self, worker: usize) -> Option<Test> {
        let pop =
            |queue: &Mutex<VecDeque<Test>>| queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let big = if worker == 1 { pop(&self.big) } else { None };
        big.or_else(|| pop(&self.others))
    }
}

/// A thread with a host.
struct Worker {
    number: usize,
    config: Config,
    queue: Arc<Queue>,
    tell: Sender<Happening>,
    logs: PathBuf,
    is_soak: bool,
}

impl Worker {
    fn work(mut self) {
        let mut host: Option<Host> = None;
        while let Some(test) = self.queue.next(self.number) {
            let happening = self.run(&test, &mut host).map_or_else(Happening::Broken, Happening::Done);
            if self.tell.send(happening).is_err() {
                return;
            }
        }
    }

    /// Runs one test. Leaves the host only if it is as good as new.
    fn run(&mut self, test: &Test, host: &mut Option<Host>) -> Result<Report> {
        let report = |outcome, took, host: &str| Report {
            test: test.clone(),
            outcome,
            took,
            host: format!("host {}: {host}", self.number),
        };
        if test.is_ignored {
            return Ok(report(Outcome::Skipped("marked #[ignore]".into()), Duration::ZERO, "not needed"));
        }
        let current = match host.take() {
            Some(host) if self.config.memory_mib == test.memory_mib() => host,
            former => {
                drop(former);
                self.config.memory_mib = test.memory_mib();
                Host::start(&self.config)?
            }
        };
        let described = current.describe();
        let began = Instant::now();
        let outcome = self.run_in(&current, test)?;
        let took = began.elapsed();
        let is_clean = !matches!(outcome, Outcome::Failed(_))
            && current.link().ping(COLLECT_LIMIT).is_ok_and(|n| n == 0);
        *host = Some(current).filter(|_| is_clean);
        Ok(report(outcome, took, described))
    }

    fn run_in(&self, host: &Host, test: &Test) -> Result<Outcome> {
        let directory = self.logs.join(test.full_name().replace("::", "-"));
        fs::create_dir_all(&directory).doing(|| format!("cannot make {}", directory.display()))?;
        let mut log = File::create(directory.join("output")).doing(|| "cannot make a test's log")?;
        let mut shown = Shown::default();

        let script =
            format!(r#"exec "$BERTH_BUILD"/tests/{} --exact "$1" --nocapture --test-threads=1"#, test.file);
        let argv = ["sh", "-c", IN_SCRATCH, "sh", "sh", "-c", &script, "sh", &test.name].map(String::from);
        let (limit, env) = match self.is_soak {
            true => (SOAK_LIMIT, vec![(SOAK.to_owned(), "1".to_owned())]),
            false => (LIMIT, Vec::new()),
        };
        let mut running = host.run(argv.into(), env, None)?;
        let end = running.finish(Some(Instant::now() + limit), |bytes| {
            // A full disk must not fail a test; what is shown is still there.
            let _ = log.write_all(bytes);
            shown.add(bytes);
        });
        let reason = match end {
            Some(Event::Exit(0)) => {
                return Ok(skip_reason(&shown.text()).map_or(Outcome::Passed, Outcome::Skipped));
            }
            Some(Event::Exit(code)) => format!("exit code {code}"),
            None => format!("still running after {} s", limit.as_secs()),
            Some(_) => "its host went away".to_owned(),
        };
        let kernel_log = collect(host, &directory);
        Ok(Outcome::Failed(Failure { reason, output: shown.text(), kernel_log }))
    }
}

/// Brings a failed test's logs and the state of its host into `directory`. Gives the end of the host's kernel log.
fn collect(host: &Host, directory: &Path) -> String {
    let processes = "ps -eo pid,ppid,stat,wchan:32,time,args --forest";
    let _ = fetch(host, processes, &directory.join("processes"));
    let logs = format!(
        r#"cd "$BERTH_SCRATCH" && find . -type f -size -{MAX_LOG_KIB}k -print0 | tar --null -T - -cf -"#
    );
    let archive = directory.join("scratch.tar");
    let fetched = fetch(host, &logs, &archive);
    if fetched.is_ok() && extract(&archive, &directory.join("scratch")).is_ok() {
        let _ = fs::remove_file(&archive);
    }
    let kernel = directory.join("dmesg");
    let text = match fetch(host, "dmesg", &kernel) {
        Ok(()) => {
            fs::read(&kernel).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
        }
        // A host that answers no more may still have said why on its console.
        Err(error) => format!("{error}\n{}", host.console_tail()),
    };
    let lines: Vec<_> = text.lines().collect();
    lines.get(lines.len().saturating_sub(SHOWN_LINES)..).unwrap_or_default().join("\n")
}

/// Writes what a shell command in the host prints to a file here.
fn fetch(host: &Host, script: &str, target: &Path) -> Result<()> {
    let fetching = || format!("cannot write {}", target.display());
    let mut file = File::create(target).doing(fetching)?;
    let mut running = host.run(["sh", "-c", script].map(String::from).into(), Vec::new(), None)?;
    let mut written = Ok(());
    let end = running.finish(Some(Instant::now() + COLLECT_LIMIT), |bytes| {
        if written.is_ok() {
            written = file.write_all(bytes);
        }
    });
    written.doing(fetching)?;
    match end {
        Some(Event::Exit(0)) => Ok(()),
        other => Err(Error(format!("{script}: {other:?}"))),
    }
}

fn extract(archive: &Path, directory: &Path) -> Result<()> {
    let extracting = || format!("cannot unpack {}", archive.display());
    fs::create_dir_all(directory).doing(extracting)?;
    let mut tar = Command::new("tar");
    let status = tar.arg("-xf").arg(archive).arg("-C").arg(directory).stderr(Stdio::null()).status();
    match status.doing(extracting)?.success() {
        true => Ok(()),
        false => Err(Error(extracting())),
    }
}

/// The last part of a test's output.
#[derive(Default)]
struct Shown(Vec<u8>);

impl Shown {
    fn add(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
        // Cut only when there is twice as much, so that each byte is moved once.
        if self.0.len() > 2 * MAX_SHOWN {
            self.0.drain(..self.0.len() - MAX_SHOWN);
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0).into_owned()
    }
}

/// Why a test skipped itself, if it did. The harness may have put `test NAME ... ` in front on the same line.
fn skip_reason(output: &str) -> Option<String> {
    let reason = |line: &str| {
        let line = if line.starts_with("test ") { line.split_once(" ... ")?.1 } else { line };
        line.strip_prefix("SKIPPED: ").map(|reason| reason.trim_end().to_owned())
    };
    output.lines().find_map(reason)
}

fn print_report(report: &Report, logs: &Path) {
    let (word, note) = match &report.outcome {
        Outcome::Passed => ("ok  ", String::new()),
        Outcome::Skipped(reason) => ("skip", format!(": {reason}")),
        Outcome::Failed(failure) => ("FAIL", format!(": {}", failure.reason)),
    };
    let Report { test, took, host, .. } = report;
    println!("{word} {:>7.2} s  {} ({host}){note}", took.as_secs_f64(), test.full_name());
    if let Outcome::Failed(failure) = &report.outcome {
        println!("--- output of {} ---\n{}", test.full_name(), failure.output.trim_end());
        println!("--- end of the host's kernel log ---\n{}", failure.kernel_log);
        println!("--- all of it is in {}/{} ---", logs.display(), test.full_name().replace("::", "-"));
    }
}

/// Prints what is to be known at the end, the count on the last line. Gives the exit code.
fn print_summary(reports: &[Report]) -> i32 {
    let mut counts = (0, 0, 0);
    for report in reports {
        match &report.outcome {
            Outcome::Passed => counts.0 += 1,
            Outcome::Failed(failure) => {
                counts.1 += 1;
                println!("failed: {}: {}", report.test.full_name(), failure.reason);
            }
            Outcome::Skipped(reason) => {
                counts.2 += 1;
                println!("skipped: {}: {reason}", report.test.full_name());
            }
        }
    }
    println!("guests: {} passed, {} failed, {} skipped", counts.0, counts.1, counts.2);
    i32::from(counts.1 > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test(file: &str) -> Test {
        Test { file: file.into(), name: "it".into(), is_ignored: false }
    }

    #[test]
    fn a_skip_is_told_by_its_line_alone_or_after_the_harness_said_the_name() {
        assert_eq!(skip_reason("a\nSKIPPED: no huge pages\nb").unwrap(), "no huge pages");
        assert_eq!(skip_reason("test boot ... SKIPPED: no tap\nok").unwrap(), "no tap");
        assert_eq!(skip_reason("the guest said SKIPPED: x"), None);
    }

    #[test]
    fn only_tests_that_run_in_a_host_are_taken_from_cargos_messages() {
        let line = |kind: &str, name: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","target":{{"kind":["{kind}"],"name":"{name}"}},"executable":"/t/1f"}}"#
            )
        };
        assert_eq!(executable(&line("test", "boot")), Some(Item::new("tests/boot", "/t/1f")));
        assert_eq!(executable(&line("test", "here_host")), None);
        assert_eq!(executable(&line("lib", "boot")), None);
        assert_eq!(executable(r#"{"reason":"build-finished","success":true}"#), None);
        assert_eq!(executable("warning: text"), None);
    }

    #[test]
    fn big_tests_run_first_and_only_on_the_first_host() {
        let queue = Queue::new(vec![test("boot"), test("big_memory"), test("disk")]);
        assert_eq!(queue.len(), 3);
        assert_eq!(queue.next(2), Some(test("boot")));
        assert_eq!(queue.next(1), Some(test("big_memory")));
        assert_eq!(queue.next(1), Some(test("disk")));
        assert_eq!(queue.next(1), None);
        assert_eq!(test("big_memory").memory_mib(), BIG_MEMORY_MIB);
    }

    #[test]
    fn hosts_fit_into_three_quarters_of_the_free_memory_but_one_always_runs() {
        assert_eq!(hosts_that_fit(0), 1);
        assert_eq!(hosts_that_fit((BIG_MEMORY_MIB + DEFAULT_MEMORY_MIB) * 4 / 3 - 2), 1);
        let processors = std::thread::available_parallelism().unwrap().get();
        assert_eq!(hosts_that_fit(1 << 30), processors.min(MAX_HOSTS));
    }

    #[test]
    fn of_long_output_the_end_is_shown() {
        let mut shown = Shown::default();
        for _ in 0..3 * MAX_SHOWN {
            shown.add(b"a");
        }
        shown.add(b"the end");
        assert!(shown.text().ends_with("the end"));
        assert!(shown.0.len() <= 2 * MAX_SHOWN);
    }
}
