//! The four ways to look at a start. Each is a start of its own, so that none slows down what another measures.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use berth_tests::footprint::Footprint;
use berth_tests::host::error::{Doing, Error, Result};
use berth_tests::host::process;
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::time::{ClockId, clock_gettime};
use tempfile::TempDir;

use crate::peer::{GUEST_MIB, MARKER, Peer, QEMU};
use crate::table::{Measure, Results};
use crate::trace::Trace;

/// To find a hang. A boot takes about two seconds in a nested host, under strace three.
pub const LIMIT: Duration = Duration::from_secs(120);

/// How often a socket is tried. Often, for the answer comes within milliseconds; but the host may have one processor,
/// which the one that is measured needs.
pub const API_RETRY: Duration = Duration::from_micros(500);

const STRACE: &str = "strace";
const STRACE_POLL: Duration = Duration::from_millis(50);

/// What is left alone when the host's memory is touched, in MiB: the measured processes and the files in the page cache.
const UNTOUCHED_MIB: usize = 512;
/// The boots take turns with less memory than this.
const MAX_TOUCHED_MIB: usize = 4096;

/// Everything that the measuring needs is there.
#[derive(Debug)]
pub struct Bench {
    trace: Trace,
}

impl Bench {
    /// # Errors
    /// A program is missing, which is named.
    pub fn new(trace: Trace) -> Result<Bench> {
        for program in [STRACE, QEMU] {
            let quiet = Command::new(program).arg("--version").stdout(Stdio::null()).status();
            let status = quiet.doing(|| format!("cannot run {program}, which the benchmark needs"))?;
            if !status.success() {
                return Err(Error(format!("{program} --version: {status}")));
            }
        }
        touch_memory()?;
        Ok(Bench { trace })
    }

    /// How long a boot takes, with next to nothing recorded; and the VMM's memory at its end.
    pub fn timed(&self, peer: Peer, results: &mut Results) -> Result<()> {
        let directory = directory()?;
        let mut command = peer.boot(directory.path())?;
        self.trace.record_first_entry()?;
        let start = now_us();
        let mut vmm = Vmm::start(&mut command, directory.path())?;
        vmm.wait_for_marker()?;
        let init = now_us();
        let footprint = Footprint::beyond_guest(vmm.child.id(), GUEST_MIB)?;
        let entry = self.trace.first_entry()?;
        for (measure, value) in [
            (Measure::FirstEntry, entry.saturating_sub(start)),
            (Measure::Init, init.saturating_sub(start)),
            (Measure::Rss, footprint.rss_kib),
            (Measure::Private, footprint.private_kib),
            (Measure::Anonymous, footprint.anonymous_kib),
        ] {
            results.add(peer, measure, value);
        }
        Ok(())
    }

    /// How many exits a boot takes.
    pub fn traced(&self, peer: Peer, results: &mut Results) -> Result<()> {
        let directory = directory()?;
        let mut command = peer.boot(directory.path())?;
        self.trace.record_exits()?;
        let mut vmm = Vmm::start(&mut command, directory.path())?;
        vmm.wait_for_marker()?;
        let exits = self.trace.exits_until(MARKER)?;
        results.add(peer, Measure::UserExits, exits.to_user_space);
        results.add(peer, Measure::AllExits, exits.all);
        results.add(peer, Measure::SteadyExits, exits.all - exits.of_time);
        results.keep_exits(peer, exits);
        Ok(())
    }

    /// How many system calls come before the guest runs.
    pub fn straced(&self, peer: Peer, results: &mut Results) -> Result<()> {
        let directory = directory()?;
        let calls = directory.path().join("calls");
        let traced = peer.boot(directory.path())?;
        let mut command = Command::new(STRACE);
        command.arg("-f").arg("-o").arg(&calls).arg("--").arg(traced.get_program()).args(traced.get_args());
        let mut vmm = Vmm::start(&mut command, directory.path())?;
        let deadline = Instant::now() + LIMIT;
        loop {
            thread::sleep(STRACE_POLL);
            let text = String::from_utf8_lossy(&fs::read(&calls).unwrap_or_default()).into_owned();
            if let Some(count) = calls_before_run(&text) {
                results.add(peer, Measure::SystemCalls, count);
                return Ok(());
            }
            vmm.expect_alive("KVM_RUN", deadline)?;
        }
    }

    /// How long it takes until the API answers.
    pub fn answering(&self, peer: Peer, results: &mut Results) -> Result<()> {
        let directory = directory()?;
        let socket = directory.path().join("api.sock");
        let mut command = peer.serve(directory.path(), &socket)?;
        let start = now_us();
        let mut vmm = Vmm::start(&mut command, directory.path())?;
        let deadline = Instant::now() + LIMIT;
        while let Err(error) = peer.ask(&socket) {
            vmm.expect_alive(&error.to_string(), deadline)?;
            thread::sleep(API_RETRY);
        }
        results.add(peer, Measure::ApiWall, now_us().saturating_sub(start));
        results.add(peer, Measure::ApiCpu, cpu_us(vmm.child.id())?);
        Ok(())
    }
}

/// A started VMM, or strace with a VMM, or a jailer. It is killed when this is dropped.
pub struct Vmm {
    child: Child,
    errors: std::path::PathBuf,
}

impl Vmm {
    pub fn start(command: &mut Command, directory: &Path) -> Result<Vmm> {
        let errors = directory.join("stderr");
        let file = File::create(&errors).doing(|| format!("cannot make {}", errors.display()))?;
        command.current_dir(directory).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file);
        let child = process::spawn_bound(command, Vec::new())
            .doing(|| format!("cannot start {}", command.get_program().display()))?;
        Ok(Vmm { child, errors })
    }

    pub fn wait_for_marker(&mut self) -> Result<()> {
        let output = self.child.stdout.take().ok_or_else(|| Error("the output was taken already".into()))?;
        let (sender, receiver) = mpsc::channel();
        // It ends with the VMM.
        thread::spawn(move || sender.send(find_marker(output)));
        match receiver.recv_timeout(LIMIT) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(said)) => {
                Err(Error(format!("the VMM ended before {MARKER}. It said:\n{said}{}", self.errors())))
            }
            Err(_) => Err(Error(format!("no {MARKER} within {LIMIT:?}; {}", self.errors()))),
        }
    }

    fn expect_alive(&mut self, awaited: &str, deadline: Instant) -> Result<()> {
        match self.child.try_wait() {
            Ok(None) if Instant::now() < deadline => Ok(()),
            Ok(None) => Err(Error(format!("{awaited}: nothing within {LIMIT:?}; {}", self.errors()))),
            ended => Err(Error(format!("{awaited}: ended with {ended:?}; {}", self.errors()))),
        }
    }

    /// As [`Vmm::expect_alive`], for a process that may leave the VMM to others and end well.
    pub fn expect_no_failure(&mut self, awaited: &str, deadline: Instant) -> Result<()> {
        match self.child.try_wait() {
            Ok(Some(status)) if status.success() && Instant::now() < deadline => Ok(()),
            _ => self.expect_alive(awaited, deadline),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn errors(&self) -> String {
        format!("standard error: {}", fs::read_to_string(&self.errors).unwrap_or_default())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It leads a session: what strace started is in its group.
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
        process::kill(&mut self.child);
    }
}

/// Reads until the marker; without one, gives what was read.
fn find_marker(output: ChildStdout) -> std::result::Result<(), String> {
    let mut said = String::new();
    for line in BufReader::new(output).split(b'\n').map_while(std::result::Result::ok) {
        let line = String::from_utf8_lossy(&line);
        if line.contains(MARKER) {
            return Ok(());
        }
        said.push_str(&line);
        said.push('\n');
    }
    Err(said)
}

/// The system calls of all threads before the first KVM_RUN, if that has come. Lines are `PID call(arguments) = result`;
/// a call that another thread's interrupts has a second line, `PID <... call resumed>`.
fn calls_before_run(strace: &str) -> Option<u64> {
    let mut count = 0;
    for line in strace.lines() {
        if line.contains("KVM_RUN") {
            return Some(count);
        }
        let call = line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ');
        count += u64::from(!["<...", "+++", "---"].iter().any(|other| call.starts_with(other)));
    }
    None
}

pub fn directory() -> Result<TempDir> {
    let scratch = std::env::var_os("BERTH_SCRATCH").unwrap_or_else(|| std::env::temp_dir().into());
    tempfile::tempdir_in(&scratch).doing(|| format!("cannot make a directory in {}", scratch.display()))
}

/// Writes to all memory that is free, and gives it back. In a host that is itself a guest the first write to a page costs
/// many times more than a later one, and falls on whom it will.
fn touch_memory() -> Result<()> {
    let meminfo = fs::read_to_string("/proc/meminfo").doing(|| "cannot read /proc/meminfo")?;
    let free = meminfo.lines().find_map(|line| line.strip_prefix("MemFree:"));
    let free_kib = free.and_then(|free| free.trim().strip_suffix(" kB")?.parse::<usize>().ok());
    let free_mib = free_kib.ok_or_else(|| Error("no MemFree in /proc/meminfo".into()))? >> 10;
    let mib = free_mib.saturating_sub(UNTOUCHED_MIB).min(MAX_TOUCHED_MIB);
    // Of another value than 0, which would be had without a write.
    std::hint::black_box(vec![1u8; mib << 20]);
    Ok(())
}

/// By the clock that the trace's stamps are of.
pub fn now_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec * 1_000_000 + now.tv_nsec / 1000).unwrap_or_default()
}

/// Processor time of all threads that a process has now. The first number of /proc/PID/task/TID/schedstat is nanoseconds.
fn cpu_us(pid: u32) -> Result<u64> {
    fs::metadata(format!("/proc/{pid}/schedstat")).doing(|| "this kernel has no schedstat")?;
    let path = format!("/proc/{pid}/task");
    let mut sum = 0;
    for thread in fs::read_dir(&path).doing(|| format!("cannot read {path}"))?.flatten() {
        // None: the thread has ended since the directory was read.
        let Ok(stat) = fs::read_to_string(thread.path().join("schedstat")) else { continue };
        let time = stat.split_whitespace().next().and_then(|time| time.parse::<u64>().ok());
        sum += time.ok_or_else(|| Error(format!("no schedstat: {stat:?}")))?;
    }
    Ok(sum / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_once_and_up_to_kvm_run() {
        let strace = "\
7 execve(\"vmm\") = 0
7 clone3({}, 88 <unfinished ...>
8 rseq(0x7) = 0
7 <... clone3 resumed>) = 8
7 --- SIGCHLD {} ---
8 +++ exited with 0 +++
";
        assert_eq!(calls_before_run(strace), None);
        assert_eq!(
            calls_before_run(&format!("{strace}7 ioctl(5, KVM_RUN, 0) = 0\n7 close(1) = 0\n")),
            Some(3)
        );
    }

    #[test]
    fn this_process_has_used_processor_time() {
        assert!(cpu_us(std::process::id()).unwrap() > 0);
    }

    #[test]
    fn threads_that_end_while_they_are_counted_are_no_error() {
        let measured = std::thread::spawn(|| {
            for _ in 0..500 {
                cpu_us(std::process::id())?;
            }
            Ok::<_, Error>(())
        });
        while !measured.is_finished() {
            std::thread::spawn(|| ()).join().unwrap();
        }
        measured.join().unwrap().unwrap();
    }
}
