//! The guest-physical map, the I/O ports and the interrupt numbers: every address of the machine, once, with its reason.
//!
//! ```text
//!          0  GDT, boot structures, page tables, command line          (RAM)
//!    0xe0000  RSDP and the other ACPI tables, VMGenID                   (RAM, but no memory to the guest)
//!    0xf0000  MP table, for kernels without ACPI; reset vector          (RAM, but no memory to the guest)
//!   0x100000  RAM, kernel, initrd at its end
//! 0xc0000000  the hole: boot timer, virtio-mmio, PCI window, ECAM, IOAPIC, LAPIC, KVM's own pages
//!      4 GiB  RAM above the hole
//!        ...  64-bit PCI window, above all RAM
//!        ...  memory that comes and goes while the guest runs
//!        ...  files as persistent memory, to the end of what the CPUs address
//! ```
//!
//! Only numbers: nothing is mapped or written here.

use std::ops::Range;

/// A page of the guest and of KVM's memory slots.
pub const PAGE: u64 = 4096;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

// Below 1 MiB, where a kernel expects nothing that it must keep but what the boot protocols point at.

/// The boot GDT of the 64-bit protocol. Above the real-mode interrupt table and BIOS data area, which Linux reads.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` of the PVH protocol, its module list and its memory map: one page.
pub const START_INFO: u64 = 0x6000;
/// `boot_params` of the 64-bit protocol: one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Identity map of the first 4 GiB for the 64-bit protocol: PML4, PDPT and four page directories, a page each.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Bytes for the command line with its NUL: Linux's COMMAND_LINE_SIZE on x86; a longer one would be cut in silence.
pub const CMDLINE_CAPACITY: u64 = 2 * KIB;
/// Where conventional memory ends. RAM is mapped from here to [`HIGH_RAM`] as well, so that a stray access costs no
/// exit, but memory maps given to the guest leave it out: kernels take it for VGA and option ROMs.
pub const LOW_RAM_END: u64 = 0xa_0000;

/// The ACPI tables, RSDP first: from 0xe0000 a kernel searches for it, should the boot protocol not have named it
/// (ACPI 6.5, 5.2.5.1). They end before 0xf0000, from where on Linux insists on a system ROM.
pub const ACPI: Range<u64> = 0xe_0000..0xe_f000;
/// Where the RSDP is.
pub const RSDP: u64 = ACPI.start;
/// The generation ID has a page of its own that is neither RAM nor ACPI memory to the guest, as its specification wants.
pub const VMGENID: Range<u64> = 0xe_f000..0xf_0000;
/// The MP table, its floating pointer first: where a BIOS has it, and kernels search for it.
pub const MP_TABLE: Range<u64> = 0xf_0000..0xf_f000;
/// The first instruction of a PC after a reset, in real mode: F000:FFF0.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// 1 MiB: from here RAM is for the kernel.
pub const HIGH_RAM: u64 = 0x10_0000;

// The hole below 4 GiB: what must have 32-bit addresses and is not RAM.

/// RAM stops here and goes on at [`RAM_ABOVE_HOLE`].
pub const HOLE: Range<u64> = 0xc000_0000..RAM_ABOVE_HOLE;
/// 4 GiB.
pub const RAM_ABOVE_HOLE: u64 = 4 * GIB;

/// A guest that writes [`BOOT_TIMER_VALUE`] here tells that it is up (`--boot-timer`). Firecracker's address, which its
/// guests' init programs know: the reason why the hole starts no higher.
pub const BOOT_TIMER: Range<u64> = 0xc000_0000..0xc000_1000;
/// See [`BOOT_TIMER`].
pub const BOOT_TIMER_VALUE: u8 = 123;
/// Register pages of virtio-mmio devices.
pub const VIRTIO_MMIO: Range<u64> = 0xc000_1000..0xc010_0000;
/// Size of one virtio-mmio register page.
pub const VIRTIO_MMIO_SIZE: u64 = PAGE;
/// PCI memory window for BARs that must be below 4 GiB.
pub const PCI_WINDOW_32: Range<u64> = 0xd000_0000..0xe000_0000;
/// PCI configuration space (ECAM) of bus 0, the only bus: every further MiB would be a bus that the guest scans.
pub const ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
/// The I/O APIC in KVM, at the address that all firmware uses.
pub const IOAPIC: Range<u64> = 0xfec0_0000..0xfec0_1000;
/// Local APICs in KVM: the architectural reset value of IA32_APIC_BASE.
pub const LAPIC: Range<u64> = 0xfee0_0000..0xfee0_1000;
/// Page for KVM's identity map, used on Intel CPUs without unrestricted guest mode.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM's real-mode task state segment, on the same CPUs.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// Where firmware would be; the guest is told to keep out because KVM's own pages are here.
pub const FIRMWARE: Range<u64> = KVM_IDENTITY_MAP..RAM_ABOVE_HOLE;

/// The most RAM that any host can give a guest: beyond it no CPU addresses what PCI needs above.
pub const MAX_RAM: u64 = 1 << 46;
/// Wanted size of the 64-bit PCI window.
const PCI_WINDOW_64_SIZE: u64 = 64 * GIB;
/// Its start is a multiple of this, so that the kernel can map large BARs with large pages.
const PCI_WINDOW_64_ALIGN: u64 = GIB;
/// Memory that comes and goes begins at a multiple of this: the largest unit in which Linux on x86 adds memory. What is of
/// a unit only in part would be of no use to it.
const HOTPLUG_ALIGN: u64 = 2 * GIB;
/// A smaller 64-bit PCI window is refused: CPU and memory do not fit each other.
const PCI_WINDOW_64_MIN: u64 = GIB;

/// Parts of RAM as (guest-physical address, length), lowest first: one below the hole and, if there is more, one above.
pub fn ram(size: u64) -> impl Iterator<Item = (u64, u64)> {
    let below = size.min(HOLE.start);
    let above = size - below;
    [(0, below), (RAM_ABOVE_HOLE, above)].into_iter().filter(|(_, len)| *len > 0)
}

/// End of RAM below the hole.
pub fn low_ram_end(size: u64) -> u64 {
    size.min(HOLE.start)
}

/// The first address above the hole and all RAM.
pub fn ram_end(size: u64) -> u64 {
    RAM_ABOVE_HOLE + (size - low_ram_end(size))
}

/// PCI window for 64-bit BARs: right above RAM, within what CPUs with `physical_bits` address lines can reach. `None`
/// when they cannot reach even a small one.
pub fn pci_window_64(ram_size: u64, physical_bits: u8) -> Option<Range<u64>> {
    let start = ram_end(ram_size).checked_next_multiple_of(PCI_WINDOW_64_ALIGN)?;
    let limit = 1u64.checked_shl(physical_bits.into())?;
    let end = start.checked_add(PCI_WINDOW_64_SIZE)?.min(limit);
    (end.checked_sub(start)? >= PCI_WINDOW_64_MIN).then_some(start..end)
}

/// Guest addresses for `size` bytes of memory that comes and goes, in blocks whose size is the power of two `block_size`:
/// above the PCI window. `None` when CPUs with `physical_bits` address lines cannot reach it.
pub fn hotplug_memory(ram_size: u64, size: u64, block_size: u64, physical_bits: u8) -> Option<Range<u64>> {
    let window = pci_window_64(ram_size, physical_bits)?;
    let limit = 1u64.checked_shl(physical_bits.into())?;
    let start = window.end.checked_next_multiple_of(block_size.max(HOTPLUG_ALIGN))?;
    let end = start.checked_add(size).filter(|end| *end <= limit)?;
    Some(start..end)
}

/// Guest addresses for files: from the PCI window, or what is `above` it, to the end of what CPUs with `physical_bits`
/// address lines can reach. `None` when there is no window.
pub fn file_memory(ram_size: u64, above: Option<&Range<u64>>, physical_bits: u8) -> Option<Range<u64>> {
    let window = pci_window_64(ram_size, physical_bits)?;
    let limit = 1u64.checked_shl(physical_bits.into())?;
    Some(above.map_or(window.end, |above| above.end)..limit)
}

// I/O ports.

/// First serial port (COM1): 16550.
pub const SERIAL: Range<u64> = 0x3f8..0x400;
/// CMOS real-time clock.
pub const RTC: Range<u64> = 0x70..0x72;
/// i8042 keyboard controller: data at 0x60, command at 0x64: a keyboard for Ctrl-Alt-Del, and a reset line.
pub const I8042: Range<u64> = 0x60..0x65;
/// Panic notification (pvpanic), where QEMU has it.
pub const PVPANIC: Range<u64> = 0x505..0x506;
/// ACPI registers: sleep, reset and generic event. Clear of the ports that a PC has in hardware.
pub const ACPI_PM: Range<u64> = 0x600..0x608;
/// Functions that come and go while the guest runs.
pub const PCI_HOTPLUG: Range<u64> = 0x610..0x61c;

// Interrupts. Global system interrupts 0..24 are the pins of the one I/O APIC; message-signalled ones follow.

/// Pins of KVM's I/O APIC.
pub const IOAPIC_PINS: u32 = 24;
/// The keyboard's interrupt on every PC.
pub const I8042_GSI: u32 = 1;
/// Generic event device: power button, new generation ID.
pub const GED_GSI: u32 = 3;
/// COM1's interrupt on every PC.
pub const SERIAL_GSI: u32 = 4;
/// The clock's interrupt on every PC. There is no alarm here, but a kernel without ACPI takes the pin for one.
pub const RTC_GSI: u32 = 8;
/// Message-signalled interrupts are routed from here.
pub const MSI_GSI: u32 = IOAPIC_PINS;

/// The pins for virtio-mmio devices: all that are left. Firecracker's begin with the same.
pub fn virtio_mmio_gsis() -> impl Iterator<Item = u32> {
    (SERIAL_GSI + 1..IOAPIC_PINS).filter(|gsi| *gsi != RTC_GSI)
}

/// The most vCPUs: APIC ids 0..=254. Id 255 is the broadcast id, and larger ones need interrupt remapping, or an
/// extension that KVM's I/O APIC does not have, before a device can reach them.
pub const MAX_VCPUS: u32 = 255;

const _: () = assert!(RESET_VECTOR >= MP_TABLE.end && RESET_VECTOR + 16 == HIGH_RAM);
const _: () = assert!(BOOT_TIMER.start == HOLE.start);
const _: () = assert!(VIRTIO_MMIO.end - VIRTIO_MMIO.start == 255 * PAGE);
const _: () = assert!(KVM_IDENTITY_MAP + PAGE == KVM_TSS);
const _: () = assert!(ECAM.end - ECAM.start == MIB);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overlaps() {
        let ranges = [
            GDT..GDT + 0x20,
            START_INFO..START_INFO + PAGE,
            ZERO_PAGE..ZERO_PAGE + PAGE,
            PAGE_TABLES..PAGE_TABLES + 6 * PAGE,
            CMDLINE..CMDLINE + CMDLINE_CAPACITY,
            LOW_RAM_END..ACPI.start,
            ACPI,
            VMGENID,
            MP_TABLE,
            HIGH_RAM..HOLE.start,
            BOOT_TIMER,
            VIRTIO_MMIO,
            PCI_WINDOW_32,
            ECAM,
            IOAPIC,
            LAPIC,
            FIRMWARE,
            pci_window_64(5 * GIB, 40).unwrap(),
        ];
        for pair in ranges.windows(2) {
            assert!(pair[0].start < pair[0].end && pair[0].end <= pair[1].start, "{pair:x?}");
        }
        let ports = [I8042, RTC, SERIAL, PVPANIC, ACPI_PM, PCI_HOTPLUG];
        for pair in ports.windows(2) {
            assert!(pair[0].end <= pair[1].start, "{pair:x?}");
        }
    }

    #[test]
    fn ram_goes_on_above_the_hole() {
        let parts = |size| ram(size).collect::<Vec<_>>();
        assert_eq!(parts(128 * MIB), [(0, 128 * MIB)]);
        assert_eq!(parts(3 * GIB), [(0, 3 * GIB)]);
        assert_eq!(parts(3 * GIB + MIB), [(0, 3 * GIB), (4 * GIB, MIB)]);
        assert_eq!(parts(5 * GIB), [(0, 3 * GIB), (4 * GIB, 2 * GIB)]);
        assert_eq!(ram_end(MIB), 4 * GIB);
        assert_eq!(ram_end(5 * GIB), 6 * GIB);
    }

    #[test]
    fn the_64_bit_window_is_above_ram_and_within_the_cpus_reach() {
        assert_eq!(pci_window_64(128 * MIB, 40), Some(4 * GIB..68 * GIB));
        assert_eq!(pci_window_64(5 * GIB + MIB, 46), Some(7 * GIB..71 * GIB));
        assert_eq!(pci_window_64(128 * MIB, 36), Some(4 * GIB..64 * GIB));
        assert_eq!(pci_window_64(62 * GIB, 36), Some(63 * GIB..64 * GIB));
        assert_eq!(pci_window_64(63 * GIB, 36), None);
        assert_eq!(pci_window_64(MAX_RAM, 46), None);
        assert_eq!(pci_window_64(u64::MAX - 4 * GIB, 255), None);
    }

    #[test]
    fn files_have_what_the_window_leaves() {
        assert_eq!(file_memory(128 * MIB, None, 40), Some(68 * GIB..1024 * GIB));
        assert_eq!(file_memory(128 * MIB, None, 36), Some(64 * GIB..64 * GIB));
        assert_eq!(file_memory(63 * GIB, None, 36), None);
        let above = 68 * GIB..69 * GIB;
        assert_eq!(file_memory(128 * MIB, Some(&above), 40), Some(69 * GIB..1024 * GIB));
        assert_eq!(file_memory(128 * MIB, Some(&(68 * GIB..1024 * GIB)), 40), Some(1024 * GIB..1024 * GIB));
    }

    #[test]
    fn memory_that_comes_and_goes_is_above_the_window_and_within_the_cpus_reach() {
        let small = 2 * MIB;
        assert_eq!(hotplug_memory(128 * MIB, GIB, small, 40), Some(68 * GIB..69 * GIB));
        assert_eq!(hotplug_memory(6 * GIB, GIB, small, 46), Some(72 * GIB..73 * GIB));
        assert_eq!(hotplug_memory(6 * GIB, 64 * GIB, 32 * GIB, 46), Some(96 * GIB..160 * GIB));
        assert_eq!(hotplug_memory(128 * MIB, 956 * GIB, small, 40), Some(68 * GIB..1024 * GIB));
        assert_eq!(hotplug_memory(128 * MIB, 957 * GIB, small, 40), None);
        assert_eq!(hotplug_memory(128 * MIB, 128 * MIB, small, 36), None);
        assert_eq!(hotplug_memory(128 * MIB, u64::MAX, small, 46), None);
        assert_eq!(hotplug_memory(128 * MIB, GIB, 1 << 63, 46), None);
    }
}
