//! What a cell costs: a VMM alone, one in the jailer's cell, and one in a cell with every layer that a group and a pid
//! namespace add, one after another in one host. There is no other program here to compare with.
//!
//! All that is started is in one control group, whose account of processor time has everything in it, also what has ended:
//! the jailer, its children, the VMM. This process is in that group too, and what it uses itself is taken off.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use api_socket::{ActionType, BootSource, Client, MachineConfig, Request};
use berth_tests::footprint::Footprint;
use berth_tests::host::error::{Doing, Error, Result};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use tempfile::TempDir;

use crate::measure::{self, LIMIT, Vmm};
use crate::peer::{self, GUEST_MIB};
use crate::table::Samples;

/// For one figure of how many come and go in a second: how many do so at a time, for some of the time of a start is waiting;
/// and how many one after another.
const AT_A_TIME: u32 = 4;
const IN_A_ROW: u32 = 5;
const RETRY: Duration = Duration::from_micros(200);

/// The hierarchy of version 2, and the group in it of all that is measured here.
const HIERARCHY: &str = "/sys/fs/cgroup";
const GROUP: &str = "berth-bench";
/// In that group: this process, and what is put into no other.
const OWN: &str = "own";
const SOCKET: &str = "run/api.sock";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Alone,
    Cell,
    EveryLayer,
}

impl Kind {
    const ALL: [Kind; 3] = [Kind::Alone, Kind::Cell, Kind::EveryLayer];

    fn name(self) -> &'static str {
        match self {
            Kind::Alone => "without a cell",
            Kind::Cell => "in a cell",
            Kind::EveryLayer => "and a group, a pid namespace, a session",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Measure {
    Answer,
    AnswerCpu,
    Cells,
    Guests,
    Memory,
    Overhead,
}

impl Measure {
    const ALL: [Measure; 6] = [
        Measure::Answer,
        Measure::AnswerCpu,
        Measure::Cells,
        Measure::Guests,
        Measure::Memory,
        Measure::Overhead,
    ];

    fn name(self) -> &'static str {
        match self {
            Measure::Answer => "start to the API's answer, ms",
            Measure::AnswerCpu => "the same, ms of processor time",
            Measure::Cells => "VMMs that come, answer and go in a second, on one core",
            Measure::Guests => "the same, with a guest that is started",
            Measure::Memory => "memory of an idle guest of 128 MiB, with the kernel's for it, MiB",
            Measure::Overhead => "of that not the guest's own pages, MiB",
        }
    }

    /// A value in the unit of the name. Times are measured in µs, rates in thousandths, memory in KiB.
    fn show(self, value: u64) -> String {
        match self {
            Measure::Answer | Measure::AnswerCpu | Measure::Cells | Measure::Guests => {
                format!("{:.1}", value as f64 / 1000.0)
            }
            Measure::Memory | Measure::Overhead => format!("{:.2}", value as f64 / 1024.0),
        }
    }
}

/// The table of all kinds of cells.
///
/// # Errors
/// What cannot be measured.
pub fn bench(runs: usize) -> Result<String> {
    let group = Group::enter()?;
    let mut samples = Samples::<(Kind, Measure)>::default();
    // The first starts read programs and kernels from the disk.
    for kind in Kind::ALL {
        group.answering(kind, &mut Samples::default())?;
    }
    for run in 1..=runs {
        eprintln!("berth-bench: cells, run {run} of {runs}");
        for kind in Kind::ALL {
            group.answering(kind, &mut samples)?;
            for (measure, has_guest) in [(Measure::Cells, false), (Measure::Guests, true)] {
                samples.add((kind, measure), on_one_core(|| rate(kind, has_guest))?);
            }
        }
        group.idle(&mut samples)?;
    }
    let row = |measure: Measure| {
        let cells = Kind::ALL.map(|kind| samples.spread((kind, measure), |value| measure.show(value)));
        format!("| {} | {} |\n", measure.name(), cells.join(" | "))
    };
    Ok(format!(
        "\nThe cost of a cell, median (least to most):\n\n|  | {} |\n|---|{}\n{}",
        Kind::ALL.map(Kind::name).join(" | "),
        "---|".repeat(Kind::ALL.len()),
        Measure::ALL.map(row).concat()
    ))
}

/// The group of what is measured, which this process is in as long as this lives.
struct Group {
    path: PathBuf,
    way_back: PathBuf,
}

impl Group {
    fn enter() -> Result<Group> {
        let now = fs::read_to_string("/proc/self/cgroup").doing(|| "cannot read /proc/self/cgroup")?;
        let now = now.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        let path = Path::new(HIERARCHY).join(GROUP);
        let own = path.join(OWN);
        fs::create_dir_all(&own)
            .doing(|| format!("cannot make {}; is cgroup2 mounted there?", own.display()))?;
        let way_back = Path::new(HIERARCHY).join(now).join("cgroup.procs");
        fs::write(own.join("cgroup.procs"), "0").doing(|| "cannot enter a control group")?;
        Ok(Group { path, way_back })
    }

    /// The time until the API answers, by the clock and of processors.
    fn answering(&self, kind: Kind, samples: &mut Samples<(Kind, Measure)>) -> Result<()> {
        let (used, own, begin) = (self.used_us()?, own_us(), measure::now_us());
        let mut start = Start::new(kind, 0)?;
        start.wait_for_answer()?;
        let wall = measure::now_us().saturating_sub(begin);
        let cpu = (self.used_us()? - used).saturating_sub(own_us() - own);
        start.end()?;
        samples.add((kind, Measure::Answer), wall);
        samples.add((kind, Measure::AnswerCpu), cpu);
        Ok(())
    }

    /// What an idle guest costs, by its group's account of memory.
    fn idle(&self, samples: &mut Samples<(Kind, Measure)>) -> Result<()> {
        let kind = Kind::EveryLayer;
        let mut start = Start::with(kind, 0, &["--new-pid-ns"])?;
        let mut client = start.wait_for_answer()?;
        start.start_guest(&mut client)?;
        start.vmm.wait_for_marker()?;
        let group = self.path.join(&start.id);
        let read = |file: &str| {
            let path = group.join(file);
            fs::read_to_string(&path).doing(|| format!("cannot read {}", path.display()))
        };
        let own = Footprint::beyond_guest(start.pid()?, GUEST_MIB)?;
        let account = read("memory.stat")?;
        let of_account = |name: &str| field(&account, name).map(|bytes| bytes >> 10);
        // The program's copy was written, and so is charged, before there was the group.
        let program = (own.rss_kib - own.anonymous_kib).saturating_sub(of_account("file_mapped")?);
        let all = (number(&read("memory.current")?)? >> 10) + program;
        let guest = of_account("anon")?.saturating_sub(own.anonymous_kib);
        samples.add((kind, Measure::Memory), all);
        samples.add((kind, Measure::Overhead), all.saturating_sub(guest));
        start.end()
    }

    /// Processor time of all that was ever in the group, this process included.
    fn used_us(&self) -> Result<u64> {
        let path = self.path.join("cpu.stat");
        let text = fs::read_to_string(&path).doing(|| format!("cannot read {}", path.display()))?;
        field(&text, "usage_usec")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::write(&self.way_back, "0");
        let _ = fs::remove_dir(self.path.join(OWN));
        let _ = fs::remove_dir(&self.path);
    }
}

/// How many VMMs come, answer, start a guest if that is wanted, and go with all that was made for them, in a thousand
/// seconds.
fn rate(kind: Kind, has_guest: bool) -> Result<u64> {
    let one_after_another = |number: u32| {
        (0..IN_A_ROW).try_for_each(|_| {
            let mut start = Start::new(kind, number)?;
            let mut client = start.wait_for_answer()?;
            if has_guest {
                start.start_guest(&mut client)?;
            }
            start.end()
        })
    };
    let begin = measure::now_us();
    thread::scope(|scope| {
        let workers: Vec<_> =
            (0..AT_A_TIME).map(|number| scope.spawn(move || one_after_another(number))).collect();
        let ended = workers
            .into_iter()
            .map(|worker| worker.join().map_err(|_| Error("a thread has failed".into()))?);
        ended.collect::<Result<()>>()
    })?;
    let taken = measure::now_us().saturating_sub(begin).max(1);
    Ok(u64::from(AT_A_TIME * IN_A_ROW) * 1_000_000_000 / taken)
}

/// A VMM that was started, and the place of its cell, or of its socket if it has none.
struct Start {
    kind: Kind,
    id: String,
    vmm: Vmm,
    place: TempDir,
}

impl Start {
    /// `number` is that of no other at this time.
    fn new(kind: Kind, number: u32) -> Result<Start> {
        Start::with(kind, number, &["--new-pid-ns", "--daemonize"])
    }

    /// `layers` are flags of [`Kind::EveryLayer`].
    fn with(kind: Kind, number: u32, layers: &[&str]) -> Result<Start> {
        let id = format!("cell-{number}");
        let place = measure::directory()?;
        let (kernel, initramfs) = (peer::kernel()?, peer::initramfs()?);
        let mut command = match kind {
            Kind::Alone => {
                fs::create_dir(place.path().join("run")).doing(|| "cannot make a directory")?;
                let mut command = Command::new(peer::berth()?);
                command.arg("--api-sock").arg(place.path().join(SOCKET));
                command
            }
            Kind::Cell | Kind::EveryLayer => {
                let mut command = Command::new(peer::jailer()?);
                command
                    .args(["--id", &id, "--uid", "12345", "--gid", "12345", "--exec-file"])
                    .arg(peer::berth()?);
                command.arg("--chroot-base-dir").arg(place.path());
                command.arg("--file").arg(format!("kernel={}:ro", kernel.display()));
                command.arg("--file").arg(format!("initrd={}:ro", initramfs.display()));
                if kind == Kind::EveryLayer {
                    command.args(["--cgroup-version", "2", "--parent-cgroup", GROUP]);
                    command.args(["--cgroup", "memory.max=512M", "--cgroup", "pids.max=100"]).args(layers);
                }
                command.args(["--", "--api-sock", "/run/api.sock"]);
                command
            }
        };
        let vmm = Vmm::start(&mut command, place.path())?;
        Ok(Start { kind, id, vmm, place })
    }

    fn root(&self) -> PathBuf {
        self.place.path().join("berth-vmm").join(&self.id).join("root")
    }

    fn wait_for_answer(&mut self) -> Result<Client> {
        let socket = match self.kind {
            Kind::Alone => self.place.path().join(SOCKET),
            Kind::Cell | Kind::EveryLayer => self.root().join(SOCKET),
        };
        let deadline = Instant::now() + LIMIT;
        loop {
            let answer =
                Client::connect(&socket).and_then(|mut client| client.instance_info().map(|_| client));
            match answer {
                Ok(client) => return Ok(client),
                Err(error) => self.vmm.expect_no_failure(&error.to_string(), deadline)?,
            }
            thread::sleep(measure::API_RETRY);
        }
    }

    fn start_guest(&self, client: &mut Client) -> Result<()> {
        let path = |name: &str, path: Result<PathBuf>| match self.kind {
            Kind::Alone => path,
            Kind::Cell | Kind::EveryLayer => Ok(format!("fd:{name}").into()),
        };
        let machine = MachineConfig { vcpu_count: 1, mem_size_mib: GUEST_MIB, ..MachineConfig::default() };
        let boot = BootSource {
            kernel_image_path: path("kernel", peer::kernel())?,
            initrd_path: Some(path("initrd", peer::initramfs())?),
            boot_args: Some(peer::kernel_arguments()),
        };
        let start = Request::Action(ActionType::InstanceStart);
        for request in [Request::PutMachineConfig(machine), Request::PutBootSource(boot), start] {
            client.apply(&request).doing(|| format!("{request:?}"))?;
        }
        Ok(())
    }

    /// The VMM's number.
    fn pid(&self) -> Result<u32> {
        match self.kind {
            Kind::Alone => Ok(self.vmm.pid()),
            Kind::Cell | Kind::EveryLayer => {
                let path = self.root().join("berth-vmm.pid");
                let text = fs::read_to_string(&path).doing(|| format!("cannot read {}", path.display()))?;
                u32::try_from(number(&text)?).doing(|| "a process's number")
            }
        }
    }

    /// Kills the VMM and removes what was made for it.
    fn end(self) -> Result<()> {
        let pid = i32::try_from(self.pid()?).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| Error("the VMM has no number".into()))?;
        kill_process(pid, Signal::KILL).doing(|| "cannot kill the VMM")?;
        // Its process is waited for, if it is a child of ours.
        drop(self.vmm);
        if self.kind == Kind::EveryLayer {
            remove_group(&Path::new(HIERARCHY).join(GROUP).join(&self.id))?;
        }
        self.place.close().doing(|| "cannot remove a cell")
    }
}

/// Processor time of this process.
fn own_us() -> u64 {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    u64::try_from(used.tv_sec * 1_000_000 + used.tv_nsec / 1000).unwrap_or_default()
}

/// Removes a group as soon as the last process in it is gone.
fn remove_group(group: &Path) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while let Err(error) = fs::remove_dir(group) {
        if Instant::now() > deadline {
            return Err(Error(format!("cannot remove {}: {error}", group.display())));
        }
        thread::sleep(RETRY);
    }
    Ok(())
}

/// Does something on one processor only, and lets it start processes there.
fn on_one_core<T>(act: impl FnOnce() -> Result<T>) -> Result<T> {
    let all = sched_getaffinity(None).doing(|| "cannot ask for processors")?;
    let mut one = CpuSet::new();
    one.set((0..CpuSet::MAX_CPU).find(|cpu| all.is_set(*cpu)).unwrap_or_default());
    sched_setaffinity(None, &one).doing(|| "cannot choose a processor")?;
    let done = act();
    sched_setaffinity(None, &all).doing(|| "cannot choose processors")?;
    done
}

fn number(text: &str) -> Result<u64> {
    text.trim().parse().doing(|| format!("{text:?} is no number"))
}

/// A line such as `usage_usec 7` of a group's account.
fn field(text: &str, name: &str) -> Result<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    number(value.ok_or_else(|| Error(format!("no {name} in {text:?}")))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_read_by_whole_names() {
        let text = "anon_thp 1\nanon 2\nfile 3\n";
        assert_eq!(field(text, "anon").unwrap(), 2);
        assert!(field(text, "an").unwrap_err().to_string().contains("no an"));
        assert!(field("anon x\n", "anon").is_err());
    }

    #[test]
    fn what_is_done_on_one_core_is_done_on_no_other() {
        let before = sched_getaffinity(None).unwrap();
        let count = on_one_core(|| Ok(sched_getaffinity(None).unwrap().count())).unwrap();
        assert_eq!((count, sched_getaffinity(None).unwrap()), (1, before));
    }
}
