//! Run in a guest, as root: does to the machine, as fast as it goes, what makes the VMM work.
//!
//! Only where the guest lives on: no port or register here ends it or takes its console away.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::aims::Aims;
use crate::call::call;

/// The serial port's data, a port that nobody has, the keyboard's data, the clock's registers.
const PORTS: [u16; 5] = [0x3f8, 0x80, 0x60, 0x70, 0x71];

/// By which a guest says that it has let go of PCI slots (devices/src/pci/hotplug.rs).
const EJECT: u16 = 0x618;

/// The I/O privilege level at which a program may use every port.
const EVERY_PORT: usize = 3;

/// Accesses before another target has its turn.
const TURN: usize = 100;

/// Where a virtio function has its doorbells (devices/src/virtio/pci.rs): the distance is the multiplier.
const DOORBELLS: usize = 0x3000;
const DOORBELL: usize = 4;
const BAR_BYTES: usize = 0x8000;
const QUEUES: usize = 3;

/// Goes on for `seconds=`, then says how often it did what.
pub fn run(aims: &Aims) -> io::Result<()> {
    let end = Instant::now() + Duration::from_secs(aims.number("seconds")?);
    call(libc::SYS_iopl, &[EVERY_PORT])?;
    let functions = functions()?;
    let spaces = functions
        .iter()
        .map(|path| File::options().read(true).write(true).open(path.join("config")))
        .collect::<io::Result<Vec<_>>>()?;
    let bars: Vec<_> = functions.iter().filter_map(|path| map(&path.join("resource0")).ok()).collect();
    let (mut port_writes, mut config_accesses, mut doorbells) = (0_u64, 0_u64, 0_u64);
    while Instant::now() < end {
        for (turn, port) in PORTS.iter().cycle().take(TURN).enumerate() {
            write_port(*port, turn as u8);
            port_writes += 1;
        }
        for space in &spaces {
            let mut word = [0; 4];
            for offset in (0..256).step_by(word.len()) {
                space.read_exact_at(&mut word, offset)?;
                space.write_all_at(&word, offset)?;
                config_accesses += 2;
            }
        }
        for bar in &bars {
            for turn in 0..TURN {
                let at = DOORBELLS + turn % QUEUES * DOORBELL;
                // SAFETY: the BAR is mapped, is BAR_BYTES long, and the doorbells are within it, at even addresses.
                unsafe { bar.byte_add(at).cast::<u16>().write_volatile((turn % QUEUES) as u16) };
                doorbells += 1;
            }
        }
    }
    println!("ports={port_writes} config={config_accesses} doorbells={doorbells}");
    Ok(())
}

/// Says of every PCI slot that the guest has let go of what is in there, whoever has it: who was asked for it is believed.
pub fn let_go() -> io::Result<()> {
    call(libc::SYS_iopl, &[EVERY_PORT])?;
    // SAFETY: the instruction touches no memory; `iopl` allows it, without which the kernel would end this process.
    unsafe { std::arch::asm!("out dx, eax", in("dx") EJECT, in("eax") u32::MAX, options(nomem, nostack)) };
    Ok(())
}

fn write_port(port: u16, value: u8) {
    // SAFETY: the instruction touches no memory; `iopl` allows it, without which the kernel would end this process.
    unsafe { std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

/// The PCI functions that are virtio devices.
fn functions() -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/bus/pci/devices")? {
        let path = entry?.path();
        if fs::read_to_string(path.join("vendor"))?.trim() == "0x1af4" {
            found.push(path);
        }
    }
    Ok(found)
}

fn map(resource: &PathBuf) -> io::Result<*mut u8> {
    let file = File::options().read(true).write(true).open(resource)?;
    let access = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file) as usize;
    let address = call(libc::SYS_mmap, &[0, BAR_BYTES, access, libc::MAP_SHARED as usize, fd, 0])?;
    Ok(std::ptr::with_exposed_provenance_mut(address))
}
