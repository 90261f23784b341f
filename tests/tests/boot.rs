//! Debian's stock cloud kernel boots as bzImage and as ELF, with one vCPU and with several, to a shell; every vCPU works,
//! and the kernel has nothing to complain about.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::time::Duration;

use api_socket::{ActionType, ClientError, Request};
use berth_tests::guest::{Ended, Guest, Kernel, Name, Setup, limits};

#[test]
fn a_bzimage_boots_on_one_vcpu() {
    boots(Kernel::BzImage, 1);
}

#[test]
fn a_bzimage_boots_on_two_vcpus() {
    boots(Kernel::BzImage, 2);
}

#[test]
fn a_bzimage_boots_on_four_vcpus() {
    boots(Kernel::BzImage, 4);
}

#[test]
fn an_elf_kernel_boots_on_one_vcpu() {
    boots(Kernel::Elf, 1);
}

#[test]
fn an_elf_kernel_boots_on_two_vcpus() {
    boots(Kernel::Elf, 2);
}

#[test]
fn an_elf_kernel_boots_on_four_vcpus() {
    boots(Kernel::Elf, 4);
}

fn boots(kernel: Kernel, vcpus: u8) {
    let mut guest = Guest::booted(Setup { kernel, vcpus, ..Setup::default() });
    assert_eq!(guest.number("nproc"), u64::from(vcpus));
    every_vcpu_works(&mut guest, vcpus);
    has_no_complaint(&mut guest);
    has_memory_of_about(&mut guest, 128);
    guest.power_off();
}

/// A task bound to each vCPU says that it ran there.
fn every_vcpu_works(guest: &mut Guest, vcpus: u8) {
    for vcpu in 0..vcpus {
        // Field 39 of a process's stat is the CPU it is on.
        let on = guest.number(&format!("taskset {:x} cut -d' ' -f39 /proc/self/stat", 1u32 << vcpu));
        assert_eq!(on, u64::from(vcpu));
    }
}

/// Warnings that are about the processor below and not about the machine: its frequencies are none of a guest's business,
/// and an emulated one's time-stamp counter is not steady when the emulator does not get its turn. And Debian's driver of
/// virtio-mmio, which finds devices by ACPI, does not know what the command line says of them.
const KNOWN_WARNINGS: [&str; 3] = [
    "amd_pstate: the _CPC object is not present in SBIOS or ACPI disabled",
    "clocksource: ",
    "virtio_mmio: unknown parameter 'device' ignored",
];

/// No error of any kind, and no warning about what the VMM is made of.
fn has_no_complaint(guest: &mut Guest) {
    let log = guest.run("dmesg -r");
    assert!(log.contains("ACPI: "), "not a kernel log: {log}");
    let level = |line: &str| line.strip_prefix('<').and_then(|rest| rest[..1].parse::<u8>().ok());
    let subjects = ["acpi", "pci", "virtio", "mce", "apic", "kvm"];
    let complains = |line: &&str| match level(line) {
        Some(0..=3) => true,
        Some(4) => {
            let is_known = KNOWN_WARNINGS.iter().any(|known| line.contains(known));
            !is_known && subjects.iter().any(|subject| line.to_lowercase().contains(subject))
        }
        _ => false,
    };
    let complaints: Vec<_> = log.lines().filter(complains).collect();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

fn has_memory_of_about(guest: &mut Guest, mib: u64) {
    // The kernel keeps its own image and the map of pages out of the total.
    let total = guest.number("awk '/MemTotal/ { print $2 }' /proc/meminfo") / 1024;
    assert!(total > mib / 2 && total <= mib, "{total} MiB of {mib}");
}

#[test]
fn a_kernel_that_does_not_fit_into_memory_is_refused_with_what_it_needs() {
    let message = refusal(Setup { memory_mib: 16, ..Setup::default() });
    assert!(message.contains("mem_size_mib is 16") && message.contains("are needed"), "{message}");
}

#[test]
fn thirty_two_vcpus_all_work() {
    let mut guest = Guest::booted(Setup { vcpus: 32, memory_mib: 512, ..Setup::default() });
    assert_eq!(guest.number("nproc"), 32);
    every_vcpu_works(&mut guest, 32);
    guest.power_off();
}

#[test]
fn with_smt_two_vcpus_are_threads_of_a_core_and_without_each_is_a_core() {
    let siblings = "cat /sys/devices/system/cpu/cpu*/topology/thread_siblings_list";
    let mut guest = Guest::booted(Setup { vcpus: 4, smt: true, ..Setup::default() });
    assert_eq!(guest.run(siblings), "0-1\n0-1\n2-3\n2-3\n");
    let mut guest = Guest::booted(Setup { vcpus: 2, smt: false, ..Setup::default() });
    assert_eq!(guest.run(siblings), "0\n1\n");
    assert_eq!(guest.run("cat /sys/devices/system/cpu/cpu*/topology/physical_package_id"), "0\n0\n");
}

#[test]
fn a_guest_without_pci_boots_under_the_name_of_firecracker() {
    let setup = Setup { name: Name::Firecracker, vcpus: 2, entropy: true, ..Setup::default() };
    let mut guest = Guest::booted(setup);
    assert_eq!(guest.number("nproc"), 2);
    assert_eq!(guest.run("cat /sys/class/misc/hw_random/rng_current"), "virtio_rng.0\n");
    assert_eq!(guest.shell("ls /sys/bus/pci/devices/* > /dev/null 2>&1").code, 1, "there is a PCI device");
    has_no_complaint(&mut guest);
}

#[test]
fn the_clocks_of_the_guest_are_those_of_kvm_and_of_the_host() {
    let mut guest = Guest::booted(Setup::default());
    let sources = "/sys/devices/system/clocksource/clocksource0";
    let source = guest.run(&format!("cat {sources}/current_clocksource"));
    assert!(["kvm-clock\n", "tsc\n"].contains(&source.as_str()), "{source}");
    assert!(guest.run(&format!("cat {sources}/available_clocksource")).contains("kvm-clock"));
    // Set from the RTC when the kernel started.
    let now = || std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let before = now();
    let there = guest.number("date +%s");
    assert!((before - 2..=now() + 2).contains(&there), "{there} there, {before} here");
}

#[test]
fn a_guest_that_has_booted_can_say_so() {
    let mut guest = Guest::booted(Setup { arguments: vec!["--boot-timer".into()], ..Setup::default() });
    assert!(!guest.vmm.log().contains("Guest-boot-time"));
    guest.run("devmem 0xc0000000 8 123");
    let log = guest.vmm.log();
    let line = log.lines().find(|line| line.contains("Guest-boot-time")).unwrap_or_else(|| panic!("{log}"));
    // Wall and CPU time in microseconds and milliseconds.
    assert!(line.contains(" us ") && line.contains(" CPU us "), "{line}");
}

#[test]
fn a_file_that_is_no_kernel_is_refused_with_what_it_is() {
    let files: [(&str, &[u8], &str); 4] = [
        ("empty", b"", "empty"),
        ("script", b"#!/bin/sh\necho hello, I am a script of some length\n", "script"),
        ("zipped", &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6, 7, 8], "gzip"),
        ("elf-32", b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0\x01\0\0\0\0\0\0\0\x34\0\0\0", "ELF"),
    ];
    for (name, content, word) in files {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        fs::write(&path, content).unwrap();
        let message = refusal(Setup { kernel: Kernel::Path(path), ..Setup::default() });
        assert!(message.contains("kernel_image_path"), "{name}: {message}");
        assert!(message.to_lowercase().contains(&word.to_lowercase()), "{name}: {message}");
    }
}

/// What is said when the boot source is set, or at the start.
fn refusal(setup: Setup) -> String {
    let mut guest = Guest::configured(Setup { kernel: Kernel::Elf, ..setup.clone() });
    let start = Request::Action(ActionType::InstanceStart);
    for request in setup.requests().into_iter().chain([start]) {
        match guest.api.apply(&request) {
            Ok(()) => {}
            Err(ClientError::Refused(fault)) => {
                assert_eq!(fault.status, 400);
                return fault.message;
            }
            Err(error) => panic!("{request:?}: {error}"),
        }
    }
    panic!("{:?} was started", setup.kernel);
}

#[test]
fn a_guest_without_a_disk_or_initramfs_says_why_it_cannot_go_on() {
    let mut guest = Guest::started(Setup { initramfs: false, ..Setup::default() });
    guest.console.wait_for("Unable to mount root fs", limits::BOOT);
    assert_eq!(guest.vmm.ended(limits::EXIT + Duration::from_secs(1)), Ended::Code(3));
}
