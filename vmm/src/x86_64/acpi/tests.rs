use super::*;
use std::path::Path;
use std::process::Command;

const DEVICE: VirtioMmio = VirtioMmio { base: layout::VIRTIO_MMIO.start, gsi: 5 };

fn machine() -> Tables {
    Tables {
        vcpus: 4,
        pci: Some(PciWindows {
            below_4g: layout::PCI_WINDOW_32,
            above_4g: layout::pci_window_64(5 << 30, 40).unwrap(),
        }),
        virtio_mmio: vec![DEVICE],
        serial: true,
        rtc: true,
        vmgenid: true,
        pvpanic: true,
    }
}

fn quadword(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The table at a guest-physical address, by its own length.
fn table(blob: &[u8], address: u64) -> &[u8] {
    let at = (address - layout::ACPI.start) as usize;
    let len = u32::from_le_bytes(blob[at + 4..at + 8].try_into().unwrap()) as usize;
    &blob[at..at + len]
}

/// Every table that the RSDP leads to, by following addresses as a guest does.
fn all_tables(blob: &[u8]) -> Vec<&[u8]> {
    let xsdt = table(blob, quadword(blob, 24));
    let mut tables: Vec<_> = xsdt[36..].chunks(8).map(|entry| table(blob, quadword(entry, 0))).collect();
    let fadt = tables.iter().find(|table| table.starts_with(b"FACP")).unwrap();
    tables.push(table(blob, quadword(fadt, 140)));
    tables.push(xsdt);
    tables
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[test]
fn a_guest_that_follows_the_rsdp_finds_every_table_with_a_good_checksum() {
    let blob = build(&machine());
    assert_eq!(&blob[..8], b"RSD PTR ");
    assert_eq!((sum(&blob[..20]), sum(&blob[..36])), (0, 0));
    let tables = all_tables(&blob);
    let mut names: Vec<_> = tables.iter().map(|table| &table[..4]).collect();
    names.sort();
    assert_eq!(names, [&b"APIC"[..], b"DSDT", b"FACP", b"MCFG", b"XSDT"]);
    for table in tables {
        assert_eq!(sum(table), 0, "{:?}", &table[..4]);
    }
}

#[test]
fn a_machine_without_pci_has_a_configuration_space_but_no_host_bridge() {
    let blob = build(&Tables { pci: None, ..machine() });
    assert!(all_tables(&blob).iter().any(|table| table.starts_with(b"MCFG")));
    assert!(!blob.windows(4).any(|bytes| bytes == b"PCI0"));
}

#[test]
fn the_largest_machine_has_room_for_its_tables() {
    let largest =
        Tables { vcpus: layout::MAX_VCPUS, virtio_mmio: vec![DEVICE; crate::slots::MAX_MMIO], ..machine() };
    let len = build(&largest).len() as u64;
    assert!(len < (layout::ACPI.end - layout::ACPI.start) / 2, "{len}");
}

#[test]
fn what_is_too_long_is_refused_and_not_written() {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let error = write(&ram, &Tables { virtio_mmio: vec![DEVICE; 4000], ..machine() }).unwrap_err();
    assert!(matches!(error, AcpiError::TooLong { .. }), "{error}");
    assert_eq!(ram.read_obj::<u64>(GuestAddress(layout::RSDP)).unwrap(), 0);
    write(&ram, &machine()).unwrap();
    assert_eq!(ram.read_obj::<[u8; 8]>(GuestAddress(layout::RSDP)).unwrap(), *b"RSD PTR ");
}

#[test]
fn the_fixed_table_leads_to_the_registers_of_the_chip() {
    let blob = build(&machine());
    let tables = all_tables(&blob);
    let fadt = tables.iter().find(|table| table.starts_with(b"FACP")).unwrap();
    // Offsets of table 5.9. A register: address space 1 (ports), 8 bits wide, byte access, and its address.
    let register = |at: usize| (fadt[at..at + 4].to_vec(), quadword(fadt, at + 4) - layout::ACPI_PM.start);
    assert_eq!(register(116), (vec![1, 8, 0, 1], acpi_pm::RESET));
    assert_eq!(fadt[128], acpi_pm::RESET_VALUE);
    assert_eq!(register(244), (vec![1, 8, 0, 1], acpi_pm::SLEEP_CONTROL));
    assert_eq!(register(256), (vec![1, 8, 0, 1], acpi_pm::SLEEP_STATUS));
    let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
    assert_eq!(flags, 1 << 20 | 1 << 10 | 1 << 5 | 1 << 4 | 1, "hardware-reduced, with a reset register");

    let boot_flags = |tables: &Tables| {
        let blob = build(tables);
        let tables = all_tables(&blob);
        let fadt = tables.iter().find(|table| table.starts_with(b"FACP")).unwrap();
        u16::from_le_bytes(fadt[109..111].try_into().unwrap())
    };
    assert_eq!(boot_flags(&machine()), 1 << 2, "no VGA; nothing of an i8042");
    assert_eq!(boot_flags(&Tables { rtc: false, ..machine() }), 1 << 5 | 1 << 2, "no clock either");
}

/// ACPICA's interpreter as the judge: it calls _OSC as a kernel does that wants everything.
#[test]
fn the_host_bridge_grants_all_but_hotplug_and_knows_what_it_was_asked() {
    if Command::new("acpiexec").arg("-v").output().is_err() {
        eprintln!("skipped: no acpiexec (package acpica-tools)");
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    std::fs::write(scratch.path().join("DSDT.aml"), dsdt(&machine()).as_slice()).unwrap();
    let pci = "5B4DDB33F71F1C4096577441C03DD766";
    // Asked for and granted, and the status that tells what of it was not granted or understood.
    for (uuid, revision, asked, granted, status) in [
        (pci, 1, "3F", "3C", "10"),
        (pci, 1, "14", "14", "00"),
        (pci, 2, "3F", "3C", "18"),
        ("00000000000000000000000000000000", 1, "3F", "3F", "04"),
    ] {
        let answer = format!("{status} 00 00 00 1F 00 00 00 {granted} 00 00 00");
        let bytes: Vec<_> =
            uuid.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap()).collect();
        let wanted = format!("00 00 00 00 1F 00 00 00 {asked} 00 00 00");
        let call = format!("execute \\_SB.PCI0._OSC ({}) {revision} 3 ({wanted})", bytes.join(" "));
        let (text, ok) = acpica("acpiexec", scratch.path(), &["-b", &call, "DSDT.aml"]);
        assert!(ok && text.contains(&format!("[Buffer] Length 0C =     0000: {answer}")), "{call}: {text}");
    }
}

/// ACPICA's compiler as the judge: it disassembles each table, and compiles the DSDT's text again without a complaint.
#[test]
fn iasl_has_no_complaint() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("skipped: no iasl (package acpica-tools)");
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let everything = machine();
    let least = Tables { vcpus: 1, ..Tables::default() };
    for (name, tables) in [("everything", everything), ("least", least)] {
        let directory = scratch.path().join(name);
        std::fs::create_dir(&directory).unwrap();
        let blob = build(&tables);
        for table in all_tables(&blob) {
            let signature = std::str::from_utf8(&table[..4]).unwrap();
            std::fs::write(directory.join(format!("{signature}.aml")), table).unwrap();
            let (text, ok) = acpica("iasl", &directory, &["-d", &format!("{signature}.aml")]);
            assert!(ok && !text.contains("Warning") && !text.contains("Invalid"), "{signature}: {text}");
        }
        let (text, ok) = acpica("iasl", &directory, &["-va", "-p", "again", "DSDT.dsl"]);
        assert!(ok && text.contains("0 Errors, 0 Warnings"), "{text}");
        let again = std::fs::read(directory.join("again.aml")).unwrap();
        assert!(again.len() > 36);
    }
}

fn acpica(program: &str, directory: &Path, arguments: &[&str]) -> (String, bool) {
    let output = Command::new(program).args(arguments).current_dir(directory).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (String::from_utf8_lossy(&text).into_owned(), output.status.success())
}
