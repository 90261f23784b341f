//! The table of Intel's MultiProcessor Specification 1.4: processors, I/O APIC and interrupts for a kernel without ACPI.
//!
//! A kernel that has read ACPI's tables looks no further. One that has not, and knows the APICs from here and the frequencies
//! of their timers by CPUID and kvmclock, asks for no other timer: there is no PIT.
//!
//! Virtio devices have no place in such a table, only their interrupts: the kernel command line tells of them.

use devices::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::acpi::Tables;
use super::layout;

/// Kernels search for the pointer from here on (chapter 4): the last of three places, and the one that is no RAM to them.
const POINTER: u64 = layout::MP_TABLE.start;
const TABLE: u64 = POINTER + POINTER_LEN as u64;

const POINTER_LEN: usize = 16;
const HEADER_LEN: usize = 44;
const PROCESSOR_LEN: usize = 20;
/// Of every other entry.
const ENTRY_LEN: usize = 8;
/// Beside the processors: bus, I/O APIC, its pins, two local interrupts.
const MAX_OTHERS: usize = 4 + layout::IOAPIC_PINS as usize;
const MAX_LEN: usize =
    POINTER_LEN + HEADER_LEN + PROCESSOR_LEN * layout::MAX_VCPUS as usize + ENTRY_LEN * MAX_OTHERS;

const _: () = assert!(MAX_LEN as u64 <= layout::MP_TABLE.end - layout::MP_TABLE.start);

const SPECIFICATION_1_4: u8 = 4;
const OEM_ID: [u8; 8] = *b"BERTH   ";
const PRODUCT_ID: [u8; 12] = *b"BERTHVMM    ";

// Types of entries (table 4-3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Of KVM's local APICs and its I/O APIC.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
/// KVM's I/O APIC has it, and so do the ACPI tables. That the first processor has it too was forbidden when all APICs were on
/// one bus.
const IO_APIC_ID: u8 = 0;
const ALL_LOCAL_APICS: u8 = 0xff;

// Of a processor (table 4-4).
const ENABLED: u8 = 1 << 0;
const BOOTSTRAP: u8 = 1 << 1;
/// Family 6, and with FPU and APIC: what kernels take from CPUID themselves.
const SIGNATURE: u32 = 0x600;
const FEATURES: u32 = 1 << 9 | 1 << 0;

/// The one bus. Its interrupts have the numbers of the pins, and Linux's have the same.
const ISA: u8 = 0;

// Of an interrupt (tables 4-10 and 4-11).
const INT: u8 = 0;
const NMI: u8 = 1;
/// Of the PICs, which KVM has.
const EXT_INT: u8 = 3;
const CONFORMS_TO_BUS: u16 = 0;
/// As every interrupt in the ACPI tables.
const EDGE_ACTIVE_HIGH: u16 = 1 << 2 | 1 << 0;

/// Writes the table, and before it the pointer to it, to [`layout::MP_TABLE`]. Before the guest runs.
pub fn write(ram: &GuestRam, tables: &Tables) -> Result<(), GuestMemoryError> {
    ram.write_slice(&build(tables), GuestAddress(POINTER))
}

fn build(tables: &Tables) -> Vec<u8> {
    let entries = entries(tables);
    let mut table = header(&entries);
    table.extend(entries.concat());
    // Both sums are to be 0.
    table[7] = sum(&table).wrapping_neg();
    let mut bytes = pointer();
    bytes[10] = sum(&bytes).wrapping_neg();
    bytes.extend(table);
    bytes
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The floating pointer (4.1), without its checksum. Its feature bytes are 0: there is a table, and no IMCR.
fn pointer() -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend((TABLE as u32).to_le_bytes());
    bytes.extend([(POINTER_LEN / 16) as u8, SPECIFICATION_1_4]);
    bytes.resize(POINTER_LEN, 0);
    bytes
}

/// The header of the table (4.2), without its checksum.
fn header(entries: &[Vec<u8>]) -> Vec<u8> {
    let len = HEADER_LEN + entries.iter().map(Vec::len).sum::<usize>();
    let mut bytes = b"PCMP".to_vec();
    bytes.extend((len as u16).to_le_bytes());
    bytes.extend([SPECIFICATION_1_4, 0]);
    bytes.extend(OEM_ID);
    bytes.extend(PRODUCT_ID);
    // No table of the OEM's: its address and length.
    bytes.extend([0; 6]);
    bytes.extend((entries.len() as u16).to_le_bytes());
    bytes.extend((layout::LAPIC.start as u32).to_le_bytes());
    // No extension of the table.
    bytes.resize(HEADER_LEN, 0);
    bytes
}

/// By type, as they must be.
fn entries(tables: &Tables) -> Vec<Vec<u8>> {
    let vcpus = (0..tables.vcpus.min(layout::MAX_VCPUS)).map(|vcpu| processor(vcpu as u8));
    let bus = [BUS, ISA, b'I', b'S', b'A', b' ', b' ', b' '].to_vec();
    let mut io_apic = vec![IO_APIC, IO_APIC_ID, IO_APIC_VERSION, ENABLED];
    io_apic.extend((layout::IOAPIC.start as u32).to_le_bytes());
    let pins = pins(tables).map(|pin| interrupt(IO_INTERRUPT, INT, EDGE_ACTIVE_HIGH, pin, IO_APIC_ID, pin));
    let local = [(EXT_INT, 0, 0), (NMI, ALL_LOCAL_APICS, 1)]
        .map(|(kind, apic, pin)| interrupt(LOCAL_INTERRUPT, kind, CONFORMS_TO_BUS, 0, apic, pin));
    vcpus.chain([bus, io_apic]).chain(pins).chain(local).collect()
}

fn processor(apic: u8) -> Vec<u8> {
    let flags = if apic == 0 { ENABLED | BOOTSTRAP } else { ENABLED };
    let mut bytes = vec![PROCESSOR, apic, LOCAL_APIC_VERSION, flags];
    bytes.extend(SIGNATURE.to_le_bytes());
    bytes.extend(FEATURES.to_le_bytes());
    bytes.resize(PROCESSOR_LEN, 0);
    bytes
}

/// Without ACPI nobody drives the event device, so its pin is not in here; the keyboard is found by looking.
fn pins(tables: &Tables) -> impl Iterator<Item = u8> {
    let serial = tables.serial.then_some(layout::SERIAL_GSI);
    let virtio = tables.virtio_mmio.iter().map(|device| device.gsi);
    [layout::I8042_GSI].into_iter().chain(serial).chain(virtio).map(|gsi| gsi as u8)
}

fn interrupt(entry: u8, kind: u8, flags: u16, source: u8, apic: u8, pin: u8) -> Vec<u8> {
    let [low, high] = flags.to_le_bytes();
    vec![entry, kind, low, high, ISA, source, apic, pin]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86_64::acpi::VirtioMmio;

    fn machine(vcpus: u32, gsis: impl Iterator<Item = u32>) -> Tables {
        let virtio_mmio = gsis.map(|gsi| VirtioMmio { base: layout::VIRTIO_MMIO.start, gsi }).collect();
        Tables { vcpus, serial: true, virtio_mmio, ..Tables::default() }
    }

    fn word(bytes: &[u8], at: usize) -> usize {
        u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()).into()
    }

    fn address(bytes: &[u8], at: usize) -> u64 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()).into()
    }

    /// As a kernel reads it: searches for the pointer, follows it, and takes the table apart.
    fn parsed(tables: &Tables) -> Vec<Vec<u8>> {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write(&ram, tables).unwrap();
        let mut bytes = vec![0; 1 << 20];
        ram.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        let pointer = (0xf_0000..1 << 20).step_by(16).find(|at| bytes[*at..].starts_with(b"_MP_")).unwrap();
        let pointer = &bytes[pointer..pointer + 16];
        assert_eq!((sum(pointer), &pointer[8..10], &pointer[11..]), (0, &[1, 4][..], &[0; 5][..]));
        let table = &bytes[address(pointer, 4) as usize..];
        let table = &table[..word(table, 4)];
        assert_eq!((sum(table), &table[..4], table[6]), (0, &b"PCMP"[..], 4));
        assert_eq!(address(table, 36), layout::LAPIC.start);
        let (mut entries, mut rest) = (Vec::new(), &table[44..]);
        while let Some(kind) = rest.first() {
            let (entry, others) = rest.split_at(if *kind == PROCESSOR { 20 } else { 8 });
            entries.push(entry.to_vec());
            rest = others;
        }
        assert_eq!(entries.len(), word(table, 34));
        assert!(entries.is_sorted_by_key(|entry| entry[0]));
        entries
    }

    fn of(kind: u8, entries: &[Vec<u8>]) -> Vec<&[u8]> {
        entries.iter().filter(|entry| entry[0] == kind).map(|entry| &entry[1..]).collect()
    }

    #[test]
    fn every_processor_is_in_it_and_the_first_is_the_one_that_boots() {
        for vcpus in [1, 2, 32, layout::MAX_VCPUS] {
            let entries = parsed(&machine(vcpus, layout::virtio_mmio_gsis()));
            let found: Vec<_> = of(PROCESSOR, &entries).iter().map(|entry| (entry[0], entry[2])).collect();
            let expected: Vec<_> =
                (0..vcpus as u8).map(|apic| (apic, if apic == 0 { 0b11 } else { 0b01 })).collect();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn pins_of_the_i_o_apic_are_edges_of_devices_that_there_are() {
        let entries = parsed(&machine(1, layout::virtio_mmio_gsis()));
        assert_eq!(of(BUS, &entries), [b"\0ISA   "]);
        let io_apics = of(IO_APIC, &entries);
        assert_eq!((io_apics.len(), &io_apics[0][..3]), (1, &[0, 0x11, 1][..]));
        assert_eq!(address(io_apics[0], 3), layout::IOAPIC.start);
        let pins = [1, 4, 5, 6, 7].into_iter().chain(9..24);
        let expected: Vec<_> = pins.map(|pin| [0, 0b0101, 0, 0, pin, 0, pin]).collect();
        assert_eq!(of(IO_INTERRUPT, &entries), expected);
        let few = parsed(&Tables { serial: false, ..machine(1, 5..6) });
        let pins: Vec<_> = of(IO_INTERRUPT, &few).iter().map(|entry| entry[6]).collect();
        assert_eq!(pins, [1, 5]);
    }

    #[test]
    fn local_interrupts_are_those_of_every_pc() {
        let entries = parsed(&machine(2, 0..0));
        assert_eq!(of(LOCAL_INTERRUPT, &entries), [[3, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0xff, 1]]);
    }
}
