//! Whom the benchmark compares, and the command line of each for the same guest.

use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use api_socket::Client;
use berth_tests::host::error::{Doing, Error, Result};
use berth_tests::host::provide;
use serde_json::json;

pub const GUEST_MIB: u64 = 128;

/// What the guest's first process says first.
pub const MARKER: &str = "BERTH-INIT";

/// The first process is a shell that says [`MARKER`] and sleeps: what comes before is the VMM's work and the kernel's.
/// The kernel takes what follows `--` for the arguments of init.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 reboot=k panic=1 quiet rdinit=/bin/busybox";

/// What a wait for an answer that has begun may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    BerthPci,
    /// Under the name `firecracker`: no PCI bus.
    BerthMmio,
    QemuMicrovm,
}

impl Peer {
    pub const ALL: [Peer; 3] = [Peer::BerthPci, Peer::BerthMmio, Peer::QemuMicrovm];

    /// What the others are compared with.
    pub const BASE: Peer = Peer::QemuMicrovm;

    /// Boots the guest, whose serial line is on standard output.
    ///
    /// # Errors
    /// The program's files cannot be made in `directory`.
    pub fn boot(self, directory: &Path) -> Result<Command> {
        let mut command = self.program(directory)?;
        match self {
            Peer::QemuMicrovm => {
                command.args(["-serial", "stdio"]);
            }
            Peer::BerthPci | Peer::BerthMmio => {
                let config = directory.join("guest.json");
                let guest = json!({
                    "boot-source": {
                        "kernel_image_path": kernel()?,
                        "initrd_path": initramfs()?,
                        "boot_args": kernel_arguments(),
                    },
                    "machine-config": {"vcpu_count": 1, "mem_size_mib": GUEST_MIB},
                    "drives": [],
                });
                fs::write(&config, guest.to_string())
                    .doing(|| format!("cannot write {}", config.display()))?;
                command.args(["--no-api", "--config-file"]).arg(config);
            }
        }
        Ok(command)
    }

    /// Serves its API at `socket` and waits to be told what to do. QEMU is told its machine and its kernel now, for it
    /// takes neither over its API.
    ///
    /// # Errors
    /// The program's files cannot be made in `directory`.
    pub fn serve(self, directory: &Path, socket: &Path) -> Result<Command> {
        let mut command = self.program(directory)?;
        match self {
            Peer::QemuMicrovm => {
                command.args(["-S", "-serial", "null"]);
                command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
            }
            Peer::BerthPci | Peer::BerthMmio => {
                command.arg("--api-sock").arg(socket);
            }
        }
        Ok(command)
    }

    /// Asks the API for something small. Fails while nobody listens yet.
    pub fn ask(self, socket: &Path) -> Result<()> {
        match self {
            Peer::QemuMicrovm => {
                let stream = UnixStream::connect(socket).doing(|| "QMP")?;
                stream.set_read_timeout(Some(ANSWER_LIMIT)).doing(|| "QMP")?;
                let mut lines = BufReader::new(&stream).lines();
                let mut expect = |word: &str| match lines.next() {
                    Some(Ok(line)) if line.contains(word) => Ok(()),
                    other => Err(Error(format!("QMP: {other:?} is no {word}"))),
                };
                expect("QMP")?;
                (&stream).write_all(b"{\"execute\": \"qmp_capabilities\"}\n").doing(|| "QMP")?;
                expect("return")
            }
            Peer::BerthPci | Peer::BerthMmio => {
                let mut client = Client::connect(socket).doing(|| "the API")?;
                client.set_timeout(Some(ANSWER_LIMIT)).doing(|| "the API")?;
                client.instance_info().map(drop).doing(|| "the API")
            }
        }
    }

    fn program(self, directory: &Path) -> Result<Command> {
        let mut command = self.command(directory)?;
        if self == Peer::QemuMicrovm {
            command.args(["-m", &format!("{GUEST_MIB}M")]);
            command.arg("-kernel").arg(kernel()?).arg("-initrd").arg(initramfs()?);
            command.args(["-append", &kernel_arguments()]);
        }
        Ok(command)
    }

    /// The program, and of QEMU its machine, for a guest that is not told yet.
    pub fn command(self, directory: &Path) -> Result<Command> {
        match self {
            Peer::QemuMicrovm => {
                let mut command = Command::new(QEMU);
                command.args(QEMU_MICROVM);
                Ok(command)
            }
            Peer::BerthPci => Ok(Command::new(berth()?)),
            Peer::BerthMmio => {
                let link = directory.join("firecracker");
                symlink(berth()?, &link).doing(|| format!("cannot make {}", link.display()))?;
                Ok(Command::new(link))
            }
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Peer::BerthPci => "Berth",
            Peer::BerthMmio => "Berth, MMIO",
            Peer::QemuMicrovm => "QEMU microvm",
        })
    }
}

/// The program of [`Peer::QemuMicrovm`].
pub const QEMU: &str = "qemu-system-x86_64";

/// The leanest machine of QEMU's that boots a stock kernel to its console. With the default timers and firmware it is
/// slower; without the RTC the kernel polls it 40 000 times.
const QEMU_MICROVM: [&str; 13] = [
    "-nodefaults",
    "-no-user-config",
    "-no-reboot",
    "-display",
    "none",
    "-machine",
    "microvm,acpi=on,pit=off,pic=off,rtc=on,x-option-roms=off,isa-serial=on",
    "-bios",
    "qboot.rom",
    "-accel",
    "kvm",
    "-cpu",
    "host",
];

pub fn kernel_arguments() -> String {
    format!("{KERNEL_ARGUMENTS} -- sh -c \"echo {MARKER}; exec sleep 1000000\"")
}

pub fn berth() -> Result<PathBuf> {
    file("BERTH_BUILD", "berth-vmm")
}

pub fn jailer() -> Result<PathBuf> {
    file("BERTH_BUILD", "berth-jailer")
}

pub fn kernel() -> Result<PathBuf> {
    file("BERTH_ASSETS", provide::VMLINUX)
}

pub fn initramfs() -> Result<PathBuf> {
    file("BERTH_ASSETS", provide::INITRAMFS)
}

pub fn debian() -> Result<PathBuf> {
    file("BERTH_ASSETS", provide::DEBIAN)
}

/// A program of the tests.
pub fn tool(name: &str) -> Result<PathBuf> {
    file("BERTH_BUILD", name)
}

/// A file in a directory that the host names by an environment variable.
fn file(variable: &str, name: &str) -> Result<PathBuf> {
    let directory = std::env::var_os(variable)
        .ok_or_else(|| Error(format!("{variable} is not set: run `make bench`")))?;
    let path = Path::new(&directory).join(name);
    if path.exists() { Ok(path) } else { Err(Error(format!("there is no {}", path.display()))) }
}
