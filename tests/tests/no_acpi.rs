//! Without PCI, a kernel that has no ACPI finds processors and interrupts by the MP table and devices on the command line, and
//! all of them work; one that has both finds them by ACPI and refuses what it is told once more.
//!
//! The kernel has the driver of virtio-mmio with CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES, which no kernel of Debian's has.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use api_socket::{ActionType, Balloon, BalloonUpdate, Pmem, Request};
use berth_tests::guest::setup::{VSOCK, disk_drive};
use berth_tests::guest::streams::{data, exchange};
use berth_tests::guest::tap::Tap;
use berth_tests::guest::{Ended, Guest, Setup, blank_disk, limits, md5, program_drive};

const MIB: usize = 1 << 20;

/// Beside the program's, one of each kind that is no disk, and so as many as there may be: no pin is left.
const DISKS: u8 = 12;
const DEVICES: usize = 18;

/// Whose driver says of a device that its registers are somebody else's.
const REFUSED: &str = "dmesg | grep -c 'virtio-mmio virtio-mmio.*EBUSY'";

fn everything(directory: &Path, tap: &Tap) -> Setup {
    let program = program_drive(directory, "berth-vsock");
    let disks = (0..DISKS).map(|number| {
        let id = format!("d{number}");
        let path = directory.join(&id);
        fs::write(&path, vec![b'A' + number; 4 * MIB]).unwrap();
        disk_drive(&id, path)
    });
    let path_on_host = blank_disk(directory.join("pmem"), 4 * MIB as u64);
    Setup {
        vcpus: 2,
        drives: [program].into_iter().chain(disks).collect(),
        interfaces: vec![tap.interface()],
        pmems: vec![Pmem { id: "pmem".into(), path_on_host, ..Pmem::default() }],
        vsock: true,
        balloon: Some(Balloon { stats_polling_interval_s: 1, ..Balloon::default() }),
        entropy: true,
        ..Setup::mptable()
    }
}

#[track_caller]
fn everything_works(guest: &mut Guest, directory: &Path, tap: &Tap) {
    assert_eq!(guest.number("nproc"), 2);
    assert_eq!(guest.number("ls /sys/bus/virtio/drivers/*/virtio*/modalias | wc -l"), DEVICES as u64);

    // /dev/vda is the program.
    let letters = guest.run("for disk in /dev/vd[b-m]; do head -c 1 $disk; done");
    assert_eq!(letters, ('A'..).take(DISKS.into()).collect::<String>());
    guest.run("head -c 2m /dev/urandom > /run/words");
    let sum = guest.run("md5sum < /run/words");
    for (device, file) in [("vdb", "d0"), ("pmem0", "pmem")] {
        guest.run(&format!("dd if=/run/words of=/dev/{device} bs=64k conv=fsync"));
        assert_eq!(guest.run(&format!("dd if=/dev/{device} bs=64k count=32 2> /dev/null | md5sum")), sum);
        let there = fs::read(directory.join(file)).unwrap();
        assert_eq!(md5(&there[..2 * MIB]), sum, "{file}");
    }
    guest.run("echo 3 > /proc/sys/vm/drop_caches");
    assert_eq!(guest.run("dd if=/dev/vdb bs=64k count=32 2> /dev/null | md5sum"), sum);

    tap.set_up(guest, "eth0", None);
    guest.run(&format!("ping -c 3 -i 0.2 {}", tap.host()));

    guest.take_program("/dev/vda", "berth-vsock");
    let listener = UnixListener::bind(guest.path(&format!("{VSOCK}_2000"))).unwrap();
    let server = thread::spawn(move || exchange(&listener.accept().unwrap().0, &data(1, MIB)));
    guest.run("berth-vsock connect 2000 md5sum");
    assert_eq!(server.join().unwrap(), md5(&data(1, MIB)).into_bytes());

    guest.run("[ $(head -c 100 /dev/hwrng | wc -c) = 100 ]");
    guest.apply(Request::PatchBalloon(BalloonUpdate { amount_mib: 16 }));
    let begin = Instant::now();
    while guest.api.balloon_stats().unwrap().actual_mib != 16 {
        assert!(begin.elapsed() < limits::COMMAND, "the balloon does not grow");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_kernel_without_acpi_finds_its_processors_and_all_devices_and_they_work() {
    let (directory, tap) = (tempfile::tempdir().unwrap(), Tap::new(0, &[]));
    let setup = everything(directory.path(), &tap);
    let mut guest = Guest::booted(Setup { command_line: "acpi=off".into(), ..setup });
    assert_ne!(guest.shell("ls /sys/firmware/acpi/tables").code, 0, "it has ACPI");
    everything_works(&mut guest, directory.path(), &tap);
    assert_eq!(guest.shell(REFUSED).text, "0\n");

    // Each device has a pin to itself, and has been heard of there.
    let heard = "awk '/IO-APIC.*-edge.*virtio/ { print ($2 + $3 > 0) }' /proc/interrupts";
    assert_eq!(guest.run(heard), "1\n".repeat(DEVICES), "{}", guest.run("cat /proc/interrupts"));
    // No clock but those of the processors: a PIT or an HPET would be a device of all of them.
    let timers = guest.run("awk '/^Clock Event Device:/ { print $4 }' /proc/timer_list");
    assert!(timers.starts_with("<NULL>\n") && timers.matches("lapic").count() == 2, "{timers}");

    // By the keyboard: there is no power button, and no way to power off.
    guest.apply(Request::Action(ActionType::SendCtrlAltDel));
    assert_eq!(guest.ended(), Ended::Code(0));
}

#[test]
fn a_kernel_that_is_told_of_its_devices_twice_refuses_them_the_second_time_and_they_work() {
    let (directory, tap) = (tempfile::tempdir().unwrap(), Tap::new(0, &[]));
    let mut guest = Guest::booted(everything(directory.path(), &tap));
    guest.run("ls /sys/firmware/acpi/tables/DSDT");
    assert_eq!(guest.number(REFUSED), DEVICES as u64);
    everything_works(&mut guest, directory.path(), &tap);
    guest.power_off();
}

#[test]
fn a_device_that_is_in_the_arguments_already_is_refused_the_second_time_and_works() {
    let directory = tempfile::tempdir().unwrap();
    let disk = disk_drive("disk", blank_disk(directory.path().join("disk"), MIB as u64));
    let command_line = "acpi=off virtio_mmio.device=4K@0xc0001000:5".into();
    let mut guest = Guest::booted(Setup { drives: vec![disk], command_line, ..Setup::mptable() });
    assert_eq!(guest.number(REFUSED), 1);
    guest.run("dd if=/dev/urandom of=/dev/vda bs=64k count=4 conv=fsync");
    assert_eq!(guest.number("ls /sys/block | wc -l"), 1);
    guest.say("reboot -f");
    assert_eq!(guest.ended(), Ended::Code(0));
}
