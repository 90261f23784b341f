//! Networks: one TCP stream each way under iperf3, and round trips each way, between guest and host over a tap.

use std::process::{Child, Command, Stdio};

use berth_tests::host::error::{Doing, Result};
use berth_tests::host::process;
use serde_json::{Value, json};

use crate::disk::in_turn;
use crate::load::{Costs, Devices, Loaded, Subject, Unit, directory, host};
use crate::peer::Peer;
use crate::trace::Trace;

const TAP: &str = "bench0";
pub const HOST: &str = "10.79.0.1";
const GUEST: &str = "10.79.0.2";
const MAC: &str = "06:00:0a:4f:00:02";

const VHOST: &str = "Berth, vhost";
const QEMU_VHOST: &str = "QEMU microvm, vhost";
const BASE: &str = "QEMU microvm";

const SUBJECTS: [Subject; 5] = [
    Subject { name: "Berth", peer: Peer::BerthPci },
    Subject { name: VHOST, peer: Peer::BerthPci },
    Subject { name: "Berth, MMIO", peer: Peer::BerthMmio },
    Subject { name: BASE, peer: Peer::QemuMicrovm },
    Subject { name: QEMU_VHOST, peer: Peer::QemuMicrovm },
];

const MIB: [u64; 2] = [16, 144];
const ROUND_TRIPS: [u64; 2] = [200, 2200];

/// The table.
///
/// # Errors
/// What cannot be measured.
pub fn bench(runs: usize, trace: &Trace) -> Result<String> {
    for module in ["tun", "vhost_net"] {
        host("modprobe", &[module])?;
    }
    let mut costs = Costs::new(&SUBJECTS, BASE);
    for run in 1..=runs {
        eprintln!("berth-bench: networks, run {run} of {runs}");
        for subject in in_turn(&SUBJECTS, run) {
            measure(subject, trace, &mut costs)?;
        }
    }
    Ok(format!("\nNetworks, median (least to most), **ratio to {BASE}**:\n\n{costs}"))
}

fn measure(subject: &Subject, trace: &Trace, costs: &mut Costs) -> Result<()> {
    let _tap = Tap::new()?;
    let server = Server::new()?;
    let mut devices = Devices::default();
    let mut interface = interface();
    if subject.name == VHOST {
        interface["vhost"] = json!(true);
    }
    devices.berth.push(("network-interfaces", json!([interface])));
    let vhost = if subject.name == QEMU_VHOST { "on" } else { "off" };
    devices.qemu.extend([
        "-netdev".into(),
        format!("tap,id=net,ifname={TAP},script=no,downscript=no,vhost={vhost}"),
        "-device".into(),
        format!("virtio-net-device,netdev=net,mac={MAC}"),
    ]);
    let mut guest = Loaded::boot(subject, directory()?, devices)?;
    set_up(&mut guest)?;
    trace.count()?;
    for (name, reverse) in [("TCP to the host", ""), ("TCP to the guest", "-R")] {
        let cost = guest.cost(trace, MIB, |guest, mib| {
            guest.run(&format!("chroot /debian iperf3 -c {HOST} -n {mib}M {reverse} > /dev/null")).map(drop)
        })?;
        costs.add(subject, name, Unit::Mib, cost);
    }
    let cost = guest.cost(trace, ROUND_TRIPS, |guest, count| {
        guest.run(&format!("chroot /debian /usr/bin/ping -q -f -c {count} {HOST} > /dev/null")).map(drop)
    })?;
    costs.add(subject, "a ping of the host", Unit::RoundTrip, cost);
    let cost = guest.cost(trace, ROUND_TRIPS, |_, count| {
        host("ping", &["-q", "-f", "-c", &count.to_string(), GUEST]).map(drop)
    })?;
    costs.add(subject, "a ping of the guest", Unit::RoundTrip, cost);
    trace.end_count()?;
    drop((guest, server));
    Ok(())
}

/// Berth's, on the tap.
pub fn interface() -> Value {
    json!({"iface_id": "net", "host_dev_name": TAP, "guest_mac": MAC})
}

/// Has the guest and the host reach each other.
pub fn set_up(guest: &mut Loaded) -> Result<()> {
    guest.run(&format!("ip link set eth0 up && ip address add {GUEST}/24 dev eth0"))?;
    guest.run(&format!("until ping -c 1 -W 5 {HOST} > /dev/null; do sleep 0.1; done")).map(drop)
}

/// There while this is.
pub struct Tap;

impl Tap {
    pub fn new() -> Result<Tap> {
        host("ip", &["tuntap", "add", "dev", TAP, "mode", "tap"])?;
        let tap = Tap;
        host("ip", &["address", "add", &format!("{HOST}/24"), "dev", TAP])?;
        host("ip", &["link", "set", TAP, "up"])?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = host("ip", &["link", "delete", TAP]);
    }
}

/// iperf3's other end.
struct Server(Child);

impl Server {
    fn new() -> Result<Server> {
        let mut command = Command::new("iperf3");
        command.args(["-s", "-B", HOST]).stdout(Stdio::null()).stdin(Stdio::null());
        process::spawn_bound(&mut command, Vec::new()).doing(|| "cannot run iperf3").map(Server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        process::kill(&mut self.0);
    }
}
