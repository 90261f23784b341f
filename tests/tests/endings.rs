//! Each way in which a guest can end is told by the VMM's exit code; under the name of Firecracker they are all 0.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use berth_tests::guest::{Ended, Guest, Name, Setup, debian_drive, limits};
use rustix::process::Signal;

#[test]
fn a_guest_that_powers_off_ends_with_0() {
    let mut guest = Guest::booted(Setup::default());
    guest.say("poweroff -f");
    assert_eq!(guest.ended(), Ended::Code(0));
}

#[test]
fn a_guest_that_reboots_ends_with_3() {
    for way in ["reboot=k", "reboot=a", ""] {
        let mut guest = Guest::booted(Setup { command_line: way.into(), ..Setup::default() });
        guest.say("reboot -f");
        assert_eq!(guest.ended(), Ended::Code(3), "{way}");
    }
}

#[test]
fn a_guest_with_a_triple_fault_ends_with_4() {
    let mut guest = Guest::booted(Setup { command_line: "reboot=t".into(), ..Setup::default() });
    guest.say("reboot -f");
    assert_eq!(guest.ended(), Ended::Code(4));
}

#[test]
fn a_guest_that_panics_ends_with_5_where_it_can_tell_and_else_with_its_reset() {
    // The driver is in Debian's modules and not in the initramfs.
    let mut guest = Guest::booted(Setup { drives: vec![debian_drive()], ..Setup::default() });
    guest.mount_debian();
    guest.run(
        "cd /debian/lib/modules/*/kernel/drivers/misc/pvpanic; insmod pvpanic.ko; insmod pvpanic-mmio.ko",
    );
    guest.say("echo c > /proc/sysrq-trigger");
    assert_eq!(guest.ended(), Ended::Code(5));

    let mut guest = Guest::booted(Setup::default());
    guest.say("echo c > /proc/sysrq-trigger");
    assert_eq!(guest.ended(), Ended::Code(3));
}

#[test]
fn under_the_name_of_firecracker_every_ending_of_the_guest_is_0() {
    for (way, command) in
        [("reboot=k", "reboot -f"), ("reboot=t", "reboot -f"), ("reboot=k", "echo c > /proc/sysrq-trigger")]
    {
        let name = Name::Firecracker;
        let mut guest = Guest::booted(Setup { name, command_line: way.into(), ..Setup::default() });
        guest.say(command);
        assert_eq!(guest.ended(), Ended::Code(0), "{way}: {command}");
    }
}

#[test]
fn sigterm_asks_the_guest_and_a_second_one_does_not_ask() {
    let mut guest = Guest::booted(Setup::default());
    guest.vmm.signal(Signal::TERM);
    assert_eq!(guest.ended(), Ended::Code(0));
    let console = guest.console.wait_for_end(limits::EXIT);
    assert!(console.contains("Power down"), "the guest was not asked:\n{console}");

    // This one is deaf.
    let mut guest = Guest::booted(Setup::default());
    guest.run("killall acpid; rmmod button");
    guest.vmm.signal(Signal::TERM);
    assert_eq!(guest.run("echo still here"), "still here\n");
    guest.vmm.signal(Signal::TERM);
    assert_eq!(guest.ended(), Ended::Code(0));
}

#[test]
fn sigterm_ends_a_vmm_that_has_no_guest_or_the_name_of_firecracker_at_once() {
    let mut guest = Guest::configured(Setup::default());
    guest.vmm.signal(Signal::TERM);
    assert_eq!(guest.ended(), Ended::Code(0));

    let mut guest = Guest::booted(Setup { name: Name::Firecracker, ..Setup::default() });
    guest.vmm.signal(Signal::TERM);
    assert_eq!(guest.ended(), Ended::Code(0));
    assert!(!guest.console.wait_for_end(limits::EXIT).contains("Power down"));
}
