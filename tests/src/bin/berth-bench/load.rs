//! A guest under load, and what one unit of its work costs: time, processor time, exits and system calls.
//!
//! Each kind of work is done a little and much, and what counts is the difference: starting a program in the guest, its page
//! faults and its last words cost the same both times. Does not know what the work is.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use berth_tests::guest::Console;
use berth_tests::host::error::{Doing, Error, Result};
use berth_tests::host::process;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::measure;
use crate::peer::{self, Peer};
use crate::table::Samples;
use crate::trace::{Counted, Trace};

/// Room for fio and for what it keeps in flight.
const GUEST_MIB: u64 = 512;

/// What the guest says when its shell is there.
const READY: &str = "BERTH-GUEST-READY";

/// To find a hang; a workload takes some seconds in a nested host.
pub const LIMIT: Duration = Duration::from_secs(240);

/// Clock ticks of /proc in a second: USER_HZ, which is part of the kernel's interface.
const TICKS: u64 = 100;

/// Something to compare: one program with one set of options.
pub struct Subject {
    pub name: &'static str,
    pub peer: Peer,
}

/// What a guest has beside its processor and memory, for either kind of program.
#[derive(Default)]
pub struct Devices {
    /// Sections of Berth's configuration file.
    pub berth: Vec<(&'static str, Value)>,
    pub qemu: Vec<String>,
}

impl Devices {
    /// A raw disk, which the guest finds by its name; see [`Loaded::disk`].
    pub fn add_disk(&mut self, name: &str, path: &Path, read_only: bool, options: &Value) {
        let mut drive = json!({
            "drive_id": name, "path_on_host": path, "is_root_device": false, "is_read_only": read_only,
            "cache_type": "Writeback",
        });
        if let (Some(drive), Some(options)) = (drive.as_object_mut(), options.as_object()) {
            drive.extend(options.clone());
        }
        match self.berth.iter_mut().find(|(section, _)| *section == "drives") {
            Some((_, Value::Array(drives))) => drives.push(drive),
            _ => self.berth.push(("drives", json!([drive]))),
        }
        let read_only = if read_only { "on" } else { "off" };
        self.qemu.extend([
            "-drive".into(),
            format!("if=none,id={name},format=raw,readonly={read_only},file={}", path.display()),
            "-device".into(),
            format!("virtio-blk-device,drive={name},serial={name}"),
        ]);
    }
}

/// A guest whose shell waits for commands. It is killed when this is dropped.
pub struct Loaded {
    child: Child,
    console: Console,
    pub directory: TempDir,
}

impl Loaded {
    /// Boots a guest of one vCPU with these devices, and mounts the Debian that is its disk `debian`, with room in /tmp.
    pub fn boot(subject: &Subject, directory: TempDir, mut devices: Devices) -> Result<Loaded> {
        let debian = peer::debian()?;
        devices.add_disk("debian", &debian, true, &Value::Null);
        let arguments = "console=ttyS0 reboot=k panic=1 quiet berth.plain";
        let mut command = subject.peer.command(directory.path())?;
        if subject.peer == Peer::QemuMicrovm {
            command.args(["-m", &format!("{GUEST_MIB}M"), "-serial", "stdio", "-append", arguments]);
            command.arg("-kernel").arg(peer::kernel()?).arg("-initrd").arg(peer::initramfs()?);
            command.args(&devices.qemu);
        } else {
            let mut config = json!({
                "boot-source": {
                    "kernel_image_path": peer::kernel()?,
                    "initrd_path": peer::initramfs()?,
                    "boot_args": arguments,
                },
                "machine-config": {"vcpu_count": 1, "mem_size_mib": GUEST_MIB},
            });
            if let Some(config) = config.as_object_mut() {
                config.extend(devices.berth.into_iter().map(|(section, value)| (section.to_owned(), value)));
            }
            let path = directory.path().join("guest.json");
            fs::write(&path, config.to_string()).doing(|| format!("cannot write {}", path.display()))?;
            command
                .args(["--no-api", "--level", "Warning", "--log-path", "/dev/null", "--config-file"])
                .arg(path);
        }
        let errors = directory.path().join("stderr");
        let file = File::create(&errors).doing(|| format!("cannot make {}", errors.display()))?;
        command.current_dir(directory.path()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(file);
        let mut child = process::spawn_bound(&mut command, Vec::new())
            .doing(|| format!("cannot start {}", command.get_program().display()))?;
        let (Some(output), Some(input)) = (child.stdout.take(), child.stdin.take()) else {
            return Err(Error("the VMM has no console".into()));
        };
        let mut loaded = Loaded { child, console: Console::new(output, input), directory };
        loaded.console.wait_for(READY, LIMIT);
        loaded.console.wait_for("# ", LIMIT);
        let disk = loaded.disk("debian")?;
        loaded.run(&format!(
            "mkdir -p /debian && mount -t ext4 -o ro /dev/{disk} /debian && \
             for tree in dev proc sys; do mount -o bind /$tree /debian/$tree; done && \
             mount -t tmpfs tmp /debian/tmp"
        ))?;
        Ok(loaded)
    }

    /// The output of a command in the guest that must succeed.
    pub fn run(&mut self, command: &str) -> Result<String> {
        let output = self.console.shell(command, LIMIT);
        match output.code {
            0 => Ok(output.text),
            code => Err(Error(format!("`{command}` in the guest ended with {code}: {}", output.text))),
        }
    }

    /// The guest's name of a disk.
    pub fn disk(&mut self, name: &str) -> Result<String> {
        let find = format!(
            "for d in /sys/block/vd*; do [ \"$(cat $d/serial)\" != {name} ] || echo ${{d##*/}}; done"
        );
        self.run(&find).map(|text| text.trim().to_owned())
    }

    /// What a unit of `work` costs, from doing `few` and then `many`; and `few` once before, since the first time reads the
    /// program from its disk.
    pub fn cost(
        &mut self,
        trace: &Trace,
        [few, many]: [u64; 2],
        mut work: impl FnMut(&mut Loaded, u64) -> Result<()>,
    ) -> Result<Cost> {
        work(self, few)?;
        let mut used = [Used::default(); 2];
        for (used, units) in used.iter_mut().zip([few, many]) {
            let before = self.used(trace)?;
            let begin = Instant::now();
            work(self, units)?;
            let wall_us = begin.elapsed().as_micros() as u64;
            *used = Used { wall_us, ..self.used(trace)?.since(&before) };
        }
        let [few_used, many_used] = used;
        if many_used.wall_us <= few_used.wall_us {
            return Err(Error(format!(
                "{many} took no longer than {few}: the machine is too busy to measure"
            )));
        }
        Ok(many_used.since(&few_used).per(many - few))
    }

    fn used(&self, trace: &Trace) -> Result<Used> {
        let pid = self.child.id();
        let threads = fs::read_dir(format!("/proc/{pid}/task")).doing(|| "the VMM has ended")?;
        let threads: HashSet<u32> =
            threads.flatten().filter_map(|thread| thread.file_name().to_str()?.parse().ok()).collect();
        Ok(Used { wall_us: 0, cpu_us: cpu_us(pid)?, counted: trace.counted(&threads)? })
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        process::kill(&mut self.child);
    }
}

/// What was used up to a moment, or between two.
#[derive(Clone, Copy, Debug, Default)]
struct Used {
    wall_us: u64,
    /// Of all threads, also those that have ended and those in the kernel; the guest's own time is in it.
    cpu_us: u64,
    counted: Counted,
}

impl Used {
    fn since(self, before: &Used) -> Used {
        Used {
            wall_us: self.wall_us.saturating_sub(before.wall_us),
            cpu_us: self.cpu_us.saturating_sub(before.cpu_us),
            counted: self.counted.since(&before.counted),
        }
    }

    fn per(self, units: u64) -> Cost {
        let thousandths = |value: u64| value * 1000 / units.max(1);
        Cost {
            wall_ns: thousandths(self.wall_us),
            cpu_ns: thousandths(self.cpu_us),
            exits: thousandths(self.counted.exits),
            user_exits: thousandths(self.counted.user_exits),
            calls: thousandths(self.counted.calls),
        }
    }
}

/// What one unit of work takes: nanoseconds, and thousandths of events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    pub wall_ns: u64,
    pub cpu_ns: u64,
    pub exits: u64,
    pub user_exits: u64,
    pub calls: u64,
}

/// Processor time of a process, in µs.
fn cpu_us(pid: u32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).doing(|| "the VMM has ended")?;
    // The name before it is in brackets and may have blanks in it; utime and stime are fields 14 and 15 of all.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok());
    match (ticks(11), ticks(12)) {
        (Some(user), Some(system)) => Ok((user + system) * (1_000_000 / TICKS)),
        _ => Err(Error(format!("no times in {stat:?}"))),
    }
}

/// Costs of kinds of work by subject, as a table.
pub struct Costs {
    subjects: Vec<&'static str>,
    base: &'static str,
    /// Work, what one unit is called, and units of it that are shown for a second (1, or bytes in MiB).
    work: Vec<(String, Unit)>,
    samples: Samples<(usize, &'static str, Row)>,
}

/// What the work is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Requests: shown as how many there are in a second.
    Request,
    /// MiB: shown as MiB in a second.
    Mib,
    /// Round trips: shown as µs.
    RoundTrip,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Row {
    Speed,
    Cpu,
    Exits,
    UserExits,
    Calls,
}

impl Row {
    const ALL: [Row; 5] = [Row::Speed, Row::Cpu, Row::Exits, Row::UserExits, Row::Calls];
}

impl Costs {
    /// An empty table; ratios are to `base`.
    pub fn new(subjects: &[Subject], base: &'static str) -> Costs {
        let subjects = subjects.iter().map(|subject| subject.name).collect();
        Costs { subjects, base, work: Vec::new(), samples: Samples::default() }
    }

    pub fn add(&mut self, subject: &Subject, work: &str, unit: Unit, cost: Cost) {
        let index = self.work.iter().position(|(name, _)| name == work).unwrap_or_else(|| {
            self.work.push((work.to_owned(), unit));
            self.work.len() - 1
        });
        let wall_ns = cost.wall_ns.max(1);
        // Thousandths of what is shown.
        let speed = match unit {
            Unit::Request | Unit::Mib => 1_000_000_000_000 / wall_ns,
            Unit::RoundTrip => wall_ns,
        };
        let rows = [speed, cost.cpu_ns, cost.exits, cost.user_exits, cost.calls];
        for (row, value) in Row::ALL.into_iter().zip(rows) {
            self.samples.add((index, subject.name, row), value);
        }
    }
}

impl std::fmt::Display for Costs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "|  | {} |", self.subjects.join(" | "))?;
        writeln!(f, "|---|{}", "---|".repeat(self.subjects.len()))?;
        for (index, (work, unit)) in self.work.iter().enumerate() {
            for row in Row::ALL {
                let name = match (row, unit) {
                    (Row::Speed, Unit::Request) => format!("{work}: requests in a second"),
                    (Row::Speed, Unit::Mib) => format!("{work}: MiB in a second"),
                    (Row::Speed, Unit::RoundTrip) => format!("{work}: µs"),
                    (Row::Cpu, _) => "processor time of each, µs".into(),
                    (Row::Exits, _) => "KVM exits of each".into(),
                    (Row::UserExits, _) => "of these to user space".into(),
                    (Row::Calls, _) => "system calls of each".into(),
                };
                let show = |value: u64| match (row, unit) {
                    (Row::Speed, Unit::Request) => format!("{:.0}", value as f64 / 1000.0),
                    (Row::Speed | Row::Cpu, _) => format!("{:.1}", value as f64 / 1000.0),
                    _ => format!("{:.2}", value as f64 / 1000.0),
                };
                let cells = self.subjects.iter().map(|subject| match row {
                    Row::Speed => {
                        self.samples.compared((index, *subject, row), (index, self.base, row), show)
                    }
                    _ => self.samples.median((index, *subject, row)).map_or("-".into(), show),
                });
                writeln!(f, "| {name} | {} |", cells.collect::<Vec<_>>().join(" | "))?;
            }
        }
        Ok(())
    }
}

/// A file of this size in which every byte is on the disk, and so in the page cache.
pub fn full_file(path: &Path, mib: usize) -> Result<()> {
    fs::write(path, vec![0x5a; mib << 20]).doing(|| format!("cannot write {}", path.display()))
}

/// A directory for a guest.
pub fn directory() -> Result<TempDir> {
    measure::directory()
}

/// Runs a command of the host that must succeed.
pub fn host(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output().doing(|| format!("cannot run {program}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match output.status.success() {
        true => Ok(text),
        false => {
            let errors = String::from_utf8_lossy(&output.stderr);
            Err(Error(format!("{program} {arguments:?}: {}\n{text}{errors}", output.status)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUBJECTS: [Subject; 2] =
        [Subject { name: "one", peer: Peer::BerthPci }, Subject { name: "other", peer: Peer::QemuMicrovm }];

    #[test]
    fn a_unit_costs_the_difference_by_the_number() {
        let few =
            Used { wall_us: 1000, cpu_us: 500, counted: Counted { exits: 70, user_exits: 7, calls: 10 } };
        let many =
            Used { wall_us: 5000, cpu_us: 2500, counted: Counted { exits: 1070, user_exits: 7, calls: 510 } };
        let cost = Cost { wall_ns: 10_000, cpu_ns: 5000, exits: 2500, user_exits: 0, calls: 1250 };
        assert_eq!(many.since(&few).per(400), cost);
    }

    #[test]
    fn a_table_has_speed_with_its_ratio_and_costs() {
        let mut costs = Costs::new(&SUBJECTS, "other");
        let cost = |wall_ns| Cost { wall_ns, cpu_ns: 5000, exits: 2500, user_exits: 0, calls: 1250 };
        costs.add(&SUBJECTS[0], "reads", Unit::Request, cost(10_000));
        costs.add(&SUBJECTS[1], "reads", Unit::Request, cost(20_000));
        let text = costs.to_string();
        assert!(text.contains("| reads: requests in a second | 100000, **2.00** | 50000 |"), "{text}");
        assert!(text.contains("| KVM exits of each | 2.50 | 2.50 |"), "{text}");
    }

    #[test]
    fn this_process_has_used_processor_time() {
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(50) {}
        assert!(cpu_us(std::process::id()).unwrap() > 0);
    }
}
