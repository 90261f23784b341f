//! Sockets between guest and host: one stream each way. Berth's host side is Unix sockets and its own process; QEMU's is the
//! host's kernel (vhost-vsock).

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::thread;

use berth_tests::guest::program_drive;
use berth_tests::host::error::{Doing, Result};
use berth_tests::host::process;
use serde_json::json;

use crate::disk::in_turn;
use crate::load::{Costs, Devices, Loaded, Subject, Unit, directory, host};
use crate::peer::{self, Peer};
use crate::trace::Trace;

const BASE: &str = "QEMU microvm, vhost";

const SUBJECTS: [Subject; 3] = [
    Subject { name: "Berth", peer: Peer::BerthPci },
    Subject { name: "Berth, MMIO", peer: Peer::BerthMmio },
    Subject { name: BASE, peer: Peer::QemuMicrovm },
];

const CID: u32 = 3;
const SOCKET: &str = "v.sock";
/// A port for each direction, and what the host's end of a connection does: it is told how many MiB there are.
const TO_HOST: (u32, &str) =
    (52, "read n; dd bs=64k iflag=fullblock count=$((n * 16)) of=/dev/null 2> /dev/null; echo done");
const TO_GUEST: (u32, &str) = (53, "read n; dd bs=64k count=$((n * 16)) if=/dev/zero 2> /dev/null");

const MIB: [u64; 2] = [8, 72];

/// The table.
///
/// # Errors
/// What cannot be measured.
pub fn bench(runs: usize, trace: &Trace) -> Result<String> {
    host("modprobe", &["vhost_vsock"])?;
    let mut costs = Costs::new(&SUBJECTS, BASE);
    for run in 1..=runs {
        eprintln!("berth-bench: sockets, run {run} of {runs}");
        for subject in in_turn(&SUBJECTS, run) {
            measure(subject, trace, &mut costs)?;
        }
    }
    Ok(format!("\nSockets, median (least to most), **ratio to {BASE}**:\n\n{costs}"))
}

fn measure(subject: &Subject, trace: &Trace, costs: &mut Costs) -> Result<()> {
    let directory = directory()?;
    let program = program_drive(directory.path(), "berth-vsock").path_on_host.unwrap_or_default();
    let mut devices = Devices::default();
    devices.add_disk("program", &program, true, &json!({}));
    let socket = directory.path().join(SOCKET);
    devices.berth.push(("vsock", json!({"guest_cid": CID, "uds_path": socket})));
    devices.qemu.extend(["-device".into(), format!("vhost-vsock-device,guest-cid={CID}")]);
    let mut guest = Loaded::boot(subject, directory, devices)?;
    let disk = guest.disk("program")?;
    guest.run(&format!("cat /dev/{disk} > /bin/berth-vsock && chmod 755 /bin/berth-vsock"))?;
    let mut servers = Vec::new();
    for (port, command) in [TO_HOST, TO_GUEST] {
        if subject.peer == Peer::QemuMicrovm {
            servers.push(Server::new(port, command)?);
        } else {
            serve(
                UnixListener::bind(guest.directory.path().join(format!("{SOCKET}_{port}")))
                    .doing(|| SOCKET)?,
                command,
            );
        }
    }
    trace.count()?;
    let (to_host, to_guest) = (TO_HOST.0, TO_GUEST.0);
    let cost = guest.cost(trace, MIB, |guest, mib| {
        let send = format!("echo {mib}; dd bs=64k count={} if=/dev/zero 2> /dev/null; read done", mib * 16);
        guest.run(&format!("berth-vsock connect {to_host} '{send}'")).map(drop)
    })?;
    costs.add(subject, "a stream to the host", Unit::Mib, cost);
    let cost = guest.cost(trace, MIB, |guest, mib| {
        let receive = format!("echo {mib}; dd bs=64k of=/dev/null 2> /dev/null");
        guest.run(&format!("berth-vsock connect {to_guest} '{receive}'")).map(drop)
    })?;
    costs.add(subject, "a stream to the guest", Unit::Mib, cost);
    trace.end_count()
}

/// The host's end on Unix sockets, until this process ends.
fn serve(listener: UnixListener, command: &'static str) {
    let run = |stream: UnixStream| {
        let output = OwnedFd::from(stream.try_clone()?);
        Command::new("sh").args(["-c", command]).stdin(OwnedFd::from(stream)).stdout(output).status()
    };
    thread::spawn(move || {
        for stream in listener.incoming() {
            if let Err(error) = stream.and_then(run) {
                eprintln!("berth-bench: {command}: {error}");
            }
        }
    });
}

/// The host's end on sockets of the kernel.
struct Server(Child);

impl Server {
    fn new(port: u32, command: &str) -> Result<Server> {
        let mut server = Command::new(peer::tool("berth-vsock")?);
        server.args(["listen", &port.to_string(), command]).stdin(Stdio::null()).stdout(Stdio::null());
        process::spawn_bound(&mut server, Vec::new()).doing(|| "cannot run berth-vsock").map(Server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        process::kill(&mut self.0);
    }
}
