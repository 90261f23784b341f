//! Disks under fio in the guest: random requests of 4 KiB one at a time and 32 at a time, and 1 MiB in a row. The file is in
//! the host's page cache, so that the VMMs are compared and not the host's disk.

use berth_tests::host::error::Result;
use serde_json::{Value, json};

use crate::load::{Costs, Devices, Loaded, Subject, Unit, directory, full_file};
use crate::peer::Peer;
use crate::trace::Trace;

const DISK_MIB: usize = 256;

const ASYNC: &str = "Berth, Async";
const BASE: &str = "QEMU microvm";

const SUBJECTS: [Subject; 4] = [
    Subject { name: "Berth, Sync", peer: Peer::BerthPci },
    Subject { name: ASYNC, peer: Peer::BerthPci },
    Subject { name: "Berth, Sync, MMIO", peer: Peer::BerthMmio },
    Subject { name: BASE, peer: Peer::QemuMicrovm },
];

/// Name, fio's `rw`, `bs` in KiB and `iodepth`, and how many requests are few and many.
const WORK: [(&str, &str, u64, u64, [u64; 2]); 6] = [
    ("4 KiB random reads, 1 at a time", "randread", 4, 1, [500, 4500]),
    ("4 KiB random reads, 32 at a time", "randread", 4, 32, [500, 8500]),
    ("4 KiB random writes, 1 at a time", "randwrite", 4, 1, [500, 4500]),
    ("4 KiB random writes, 32 at a time", "randwrite", 4, 32, [500, 8500]),
    ("1 MiB sequential reads", "read", 1024, 1, [20, 220]),
    ("1 MiB sequential writes", "write", 1024, 1, [20, 220]),
];

/// The table.
///
/// # Errors
/// What cannot be measured.
pub fn bench(runs: usize, trace: &Trace) -> Result<String> {
    let mut costs = Costs::new(&SUBJECTS, BASE);
    for run in 1..=runs {
        eprintln!("berth-bench: disks, run {run} of {runs}");
        for subject in in_turn(&SUBJECTS, run) {
            measure(subject, trace, &mut costs)?;
        }
    }
    Ok(format!("\nDisks, median (least to most), **ratio to {BASE}**:\n\n{costs}"))
}

/// Each is first in some run: the host may get faster or slower.
pub fn in_turn(subjects: &[Subject], run: usize) -> impl Iterator<Item = &Subject> {
    let first = run % subjects.len().max(1);
    subjects.iter().cycle().skip(first).take(subjects.len())
}

fn measure(subject: &Subject, trace: &Trace, costs: &mut Costs) -> Result<()> {
    let directory = directory()?;
    let path = directory.path().join("disk");
    full_file(&path, DISK_MIB)?;
    let mut devices = Devices::default();
    let options = if subject.name == ASYNC { json!({"io_engine": "Async"}) } else { Value::Null };
    devices.add_disk("data", &path, false, &options);
    let mut guest = Loaded::boot(subject, directory, devices)?;
    let disk = guest.disk("data")?;
    trace.count()?;
    for (name, rw, kib, depth, units) in WORK {
        let cost = guest.cost(trace, units, |guest, count| {
            guest
                .run(&format!(
                    "chroot /debian fio --name=w --filename=/dev/{disk} --direct=1 --ioengine=libaio --rw={rw} \
                     --bs={kib}k --iodepth={depth} --io_size={}k --randrepeat=1 --norandommap --output=/dev/null",
                    count * kib
                ))
                .map(drop)
        })?;
        costs.add(subject, name, Unit::Request, cost);
    }
    trace.end_count()
}
