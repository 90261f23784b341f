//! Two busy devices on one io thread, or on one each: two disks at once, and a network beside a disk. What comes of it depends
//! on how many processors the host has, so it is for hosts of both kinds (`berth-host --processors 2`).

use berth_tests::host::error::Result;
use serde_json::json;

use crate::disk::in_turn;
use crate::load::{Costs, Devices, Loaded, Subject, Unit, directory, full_file, host};
use crate::network::{self, HOST};
use crate::peer::Peer;
use crate::trace::Trace;

/// Of each disk.
const DISK_MIB: usize = 128;

const BASE: &str = "one io thread";

const SUBJECTS: [Subject; 2] =
    [Subject { name: BASE, peer: Peer::BerthPci }, Subject { name: "two", peer: Peer::BerthPci }];

/// Name, fio's `rw`, `bs` in KiB and `iodepth`, and how many requests of each disk are few and many.
const WORK: [(&str, &str, u64, u64, [u64; 2]); 3] = [
    ("4 KiB random reads, 32 at a time, of two disks", "randread", 4, 32, [500, 6500]),
    ("1 MiB sequential reads, 4 at a time, of two disks", "read", 1024, 4, [20, 220]),
    ("1 MiB sequential writes, 4 at a time, of two disks", "write", 1024, 4, [20, 220]),
];

const ROUND_TRIPS: [u64; 2] = [100, 600];

/// The table.
///
/// # Errors
/// What cannot be measured.
pub fn bench(runs: usize, trace: &Trace) -> Result<String> {
    host("modprobe", &["tun"])?;
    let mut costs = Costs::new(&SUBJECTS, BASE);
    for run in 1..=runs {
        eprintln!("berth-bench: io threads, run {run} of {runs}");
        for subject in in_turn(&SUBJECTS, run) {
            measure(subject, trace, &mut costs)?;
        }
    }
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(format!(
        "\nTwo devices at once, in a host of {processors}; median (least to most), **ratio to {BASE}**:\n\n{costs}"
    ))
}

fn measure(subject: &Subject, trace: &Trace, costs: &mut Costs) -> Result<()> {
    let second = if subject.name == BASE { 0 } else { 1 };
    let directory = directory()?;
    let mut devices = Devices::default();
    for (name, io_thread) in [("one", 0), ("other", second)] {
        let path = directory.path().join(name);
        full_file(&path, DISK_MIB)?;
        devices.add_disk(name, &path, false, &json!({"io_thread": io_thread}));
    }
    let tap = network::Tap::new()?;
    let mut interface = network::interface();
    interface["io_thread"] = json!(second);
    devices.berth.push(("network-interfaces", json!([interface])));
    let mut guest = Loaded::boot(subject, directory, devices)?;
    let disks = [guest.disk("one")?, guest.disk("other")?];
    network::set_up(&mut guest)?;
    trace.count()?;
    for (name, rw, kib, depth, units) in WORK {
        let cost = guest.cost(trace, units, |guest, count| {
            let of_each = disks.iter().map(|disk| format!("--name={disk} --filename=/dev/{disk}"));
            guest
                .run(&format!(
                    "chroot /debian fio --direct=1 --ioengine=libaio --rw={rw} --bs={kib}k --iodepth={depth} \
                     --io_size={}k --randrepeat=1 --norandommap --output=/dev/null {}",
                    count * kib,
                    of_each.collect::<Vec<_>>().join(" ")
                ))
                .map(drop)
        })?;
        costs.add(subject, name, Unit::Request, cost);
    }
    let [disk, _] = disks;
    guest.run(&format!(
        "chroot /debian fio --name=w --filename=/dev/{disk} --direct=1 --ioengine=libaio --rw=write --bs=1M \
         --iodepth=4 --time_based --runtime=10000 --output=/dev/null & sleep 2"
    ))?;
    let cost = guest.cost(trace, ROUND_TRIPS, |guest, count| {
        guest.run(&format!("chroot /debian /usr/bin/ping -q -f -c {count} {HOST} > /dev/null")).map(drop)
    })?;
    costs.add(subject, "a ping of the host beside a disk that is written to", Unit::RoundTrip, cost);
    trace.end_count()?;
    drop((guest, tap));
    Ok(())
}
