//! What berthd costs: from a wish to a guest's first word, how many come in a second, and the daemon itself with a thousand
//! guests that do nothing. There is no other program here to compare with.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use api_socket::fleet::Stop;
use berth_tests::berthd::{Daemon, IMAGE, small};
use berth_tests::guest::program;
use berth_tests::host::error::{Doing, Error, Result};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::json;

/// Guests of the daemon's that are only tracked.
const STUBS: u32 = 1000;
/// Guests that run.
const REAL: u32 = 30;
/// Over which an idle daemon is watched.
const IDLE: Duration = Duration::from_secs(20);

/// Measures all of it, each as often.
pub fn bench(runs: usize) -> Result<String> {
    let daemon = Daemon::start("");
    daemon.import();
    let (mut words, mut replies, mut starts) = (Vec::new(), Vec::new(), Vec::new());
    for run in 1..=runs {
        eprintln!("berth-bench: fleet, run {run} of {runs}");
        words.push(first_word(&daemon)?);
        replies.push(first_reply(&daemon)?);
        starts.push(start(&daemon)?);
    }
    let real = real(&daemon)?;
    drop(daemon);
    let stubs = stubs()?;
    let median = |mut times: Vec<Duration>| {
        times.sort();
        times.get(times.len() / 2).map_or(0.0, |time| time.as_secs_f64() * 1e3)
    };
    Ok(format!(
        "\nberthd, {runs} runs\n\n| | |\n|---|---|\n\
         | create and start to the first byte on the guest's console, ms | {:.0} |\n\
         | `berth run` to the first byte of a command in the guest, ms | {:.0} |\n\
         | start to the VMM's answer, ms | {:.0} |\n{real}{stubs}",
        median(words),
        median(replies),
        median(starts)
    ))
}

/// From the wish to what the guest says first on its console.
fn first_word(daemon: &Daemon) -> Result<Duration> {
    let begin = Instant::now();
    let client = daemon.client();
    let failed = || "a guest for its first word";
    client.create(small("word")).doing(failed)?;
    client.start("word").doing(failed)?;
    let mut logs = client.logs("word", Default::default(), true).doing(failed)?;
    logs.read_exact(&mut [0]).doing(failed)?;
    let time = begin.elapsed();
    client.remove("word", true).doing(failed)?;
    Ok(time)
}

/// From the command line to what a command in the guest says.
fn first_reply(daemon: &Daemon) -> Result<Duration> {
    let begin = Instant::now();
    let failed = || "berth run";
    let mut child = Command::new(program("berth"))
        .args(["run", "--rm", "--memory", "96M", IMAGE, "--", "echo", "x"])
        .env("BERTH_SOCKET", daemon.path("socket"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .doing(failed)?;
    let mut stdout = child.stdout.take().ok_or_else(|| Error("berth run says nothing".into()))?;
    stdout.read_exact(&mut [0]).doing(failed)?;
    let time = begin.elapsed();
    child.wait().doing(failed)?;
    Ok(time)
}

/// From the wish to a VMM that answers.
fn start(daemon: &Daemon) -> Result<Duration> {
    let client = daemon.client();
    let failed = || "a guest that is started";
    client.create(small("start")).doing(failed)?;
    let begin = Instant::now();
    client.start("start").doing(failed)?;
    let time = begin.elapsed();
    client.stop("start", Stop { seconds: 0 }).doing(failed)?;
    client.remove("start", true).doing(failed)?;
    Ok(time)
}

/// The daemon with guests that run, when all have come to rest.
fn real(daemon: &Daemon) -> Result<String> {
    let failed = || "guests side by side";
    let begin = Instant::now();
    for number in 0..REAL {
        let name = format!("real{number}");
        daemon.client().create(small(&name)).doing(failed)?;
        daemon.client().start(&name).doing(failed)?;
    }
    let rate = f64::from(REAL) / begin.elapsed().as_secs_f64();
    for number in 0..REAL {
        daemon.exec(&format!("real{number}"), &["true"]);
    }
    thread::sleep(IDLE);
    let (memory, ticks) = rest(daemon.pid())?;
    Ok(format!(
        "| guests made and started, each second, one after another | {rate:.1} |\n\
         | berthd with {REAL} guests that run: memory, MiB | {memory:.1} |\n\
         | the same: processor time in {} s, ticks of 10 ms | {ticks} |\n",
        IDLE.as_secs()
    ))
}

/// The daemon with a thousand guests whose processes do nothing at all.
fn stubs() -> Result<String> {
    let mut daemon = Daemon::start("");
    daemon.import();
    daemon.kill();
    let children: Result<Vec<_>> = (0..STUBS).map(|number| stub(&daemon, number)).collect();
    let children = Stubs(children?);
    let begin = Instant::now();
    daemon.run();
    let adopted = begin.elapsed();
    let guests = daemon.client().guests().doing(|| "the list of guests")?;
    let running = guests.iter().filter(|guest| guest.pid.is_some()).count();
    if running != STUBS as usize {
        return Err(Error(format!("{running} of {STUBS} guests were taken on: {}", daemon.log())));
    }
    let (memory, ticks) = rest(daemon.pid())?;
    drop(children);
    Ok(format!(
        "| berthd with {STUBS} guests that do nothing: memory, MiB | {memory:.1} |\n\
         | the same: processor time in {} s, ticks of 10 ms | {ticks} |\n\
         | taking them on: start to the first answer, ms | {:.0} |\n",
        IDLE.as_secs(),
        adopted.as_secs_f64() * 1e3
    ))
}

struct Stubs(Vec<Child>);

impl Drop for Stubs {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A process, and what berthd would have written down of it and made for it.
fn stub(daemon: &Daemon, number: u32) -> Result<Child> {
    let failed = || "a stub";
    let child = Command::new("sleep").arg("infinity").stdin(Stdio::null()).spawn().doing(failed)?;
    let id = format!("{number:012x}");
    let run = daemon.path("run/guests").join(&id);
    fs::create_dir_all(&run).doing(failed)?;
    for name in ["console.in", "console.out", "log"] {
        mknodat(CWD, run.join(name), FileType::Fifo, Mode::from_raw_mode(0o600), 0).doing(failed)?;
    }
    let directory: PathBuf = daemon.path("state/guests").join(&id);
    fs::create_dir_all(&directory).doing(failed)?;
    let record = json!({
        "format": 1, "id": id, "name": format!("stub{number}"), "owner": 0, "created_at": 1.0, "image": IMAGE,
        "cpus": 1, "memory_mib": 96, "uid": 700_000 + number, "state": "running", "started_at": 1.0,
        "process": { "pid": child.id(), "start_ticks": start_ticks(child.id())?, "boot_id": read("/proc/sys/kernel/random/boot_id")?.trim() },
    });
    fs::write(directory.join("guest.json"), record.to_string()).doing(failed)?;
    Ok(child)
}

fn start_ticks(pid: u32) -> Result<u64> {
    let stat = read(&format!("/proc/{pid}/stat"))?;
    let field =
        stat.rsplit_once(')').and_then(|(_, fields)| fields.split_ascii_whitespace().nth(19)?.parse().ok());
    field.ok_or_else(|| Error("no start time in proc_pid_stat(5)".into()))
}

/// Resident memory in MiB, and ticks of processor time while nothing is wanted of it.
fn rest(pid: u32) -> Result<(f64, u64)> {
    let before = ticks(pid)?;
    thread::sleep(IDLE);
    let used = ticks(pid)? - before;
    let status = read(&format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    Ok((kib.unwrap_or(0.0) / 1024.0, used))
}

/// Fields 14 and 15 of proc_pid_stat(5).
fn ticks(pid: u32) -> Result<u64> {
    let stat = read(&format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields.split_ascii_whitespace().skip(11).take(2));
    let numbers = fields.into_iter().flatten().map(|field| field.parse::<u64>().unwrap_or(0));
    Ok(numbers.sum())
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(Path::new(path)).doing(|| format!("reading {path}"))
}
