//! Registers of the first vCPU where a kernel begins: long mode with paging on, or flat 32-bit mode with paging off.
//!
//! The other vCPUs stay as KVM makes them, waiting for INIT and SIPI. FPU, debug registers and local APIC are not
//! touched either: KVM's reset values (FCW 0x37f, MXCSR 0x1f80, all of the APIC's local vectors masked) are what both
//! boot protocols and the kernels behind them expect.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::layout;
use crate::boot::{Entry, Protocol};

/// KVM refused the registers.
#[derive(Debug, thiserror::Error)]
#[error("cannot set the {which} registers of vCPU 0: {error}")]
pub struct RegisterError {
    which: &'static str,
    error: kvm_ioctls::Error,
}

/// Puts `vcpu`, the first one, where the kernel begins. After its CPUID is set, and before it runs.
pub fn set(vcpu: &VcpuFd, entry: &Entry) -> Result<(), RegisterError> {
    vcpu.set_sregs(&special(entry)).map_err(|error| RegisterError { which: "special", error })?;
    vcpu.set_regs(&general(entry)).map_err(|error| RegisterError { which: "general", error })
}

/// Bit 1 of RFLAGS is always one; interrupts are off.
const RFLAGS_RESERVED: u64 = 1 << 1;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// IA32_APIC_BASE of the bootstrap processor after reset: enabled, at its usual address.
const APIC_BASE: u64 = layout::LAPIC.start | 1 << 11 | 1 << 8;

/// Selectors that the 64-bit protocol demands (Linux, Documentation/arch/x86/boot.rst): __BOOT_CS, __BOOT_DS.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
/// A task register must be there for VM entry; nothing uses it.
const BOOT_TR: u16 = 0x20;

// Segment types (SDM, volume 3, 3.4.5.1 and 3.5).
const CODE_READ_ACCESSED: u8 = 0xb;
const DATA_WRITE_ACCESSED: u8 = 0x3;
const TSS_BUSY: u8 = 0xb;

fn general(entry: &Entry) -> kvm_regs {
    let mut regs = kvm_regs { rip: entry.address, rflags: RFLAGS_RESERVED, ..Default::default() };
    match entry.protocol {
        Protocol::Linux64 => regs.rsi = layout::ZERO_PAGE,
        Protocol::Pvh => regs.rbx = layout::START_INFO,
    }
    regs
}

/// Complete, so that what KVM has need not be read first.
fn special(entry: &Entry) -> kvm_sregs {
    let long = entry.protocol == Protocol::Linux64;
    let mut sregs = kvm_sregs {
        cs: flat(BOOT_CS, CODE_READ_ACCESSED, long),
        ds: flat(BOOT_DS, DATA_WRITE_ACCESSED, false),
        tr: kvm_segment { selector: BOOT_TR, type_: TSS_BUSY, present: 1, limit: 0x67, ..Default::default() },
        ldt: kvm_segment { unusable: 1, ..Default::default() },
        cr0: CR0_PE | CR0_ET,
        apic_base: APIC_BASE,
        ..Default::default()
    };
    (sregs.es, sregs.fs, sregs.gs, sregs.ss) = (sregs.ds, sregs.ds, sregs.ds, sregs.ds);
    if long {
        let limit = (size_of_val(&gdt()) - 1) as u16;
        sregs.gdt = kvm_dtable { base: layout::GDT, limit, ..Default::default() };
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = layout::PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    }
    sregs
}

/// A segment of all 4 GiB, 32 or 64 bits wide.
fn flat(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        selector,
        type_,
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        l: long.into(),
        db: (!long).into(),
        ..Default::default()
    }
}

/// The descriptors behind the segments of the 64-bit protocol, for [`layout::GDT`]: a kernel may reload its segments
/// before it has a table of its own.
pub fn gdt() -> [u64; 5] {
    let tss = 0x0000_8b00_0000_0067;
    [
        0,
        0,
        descriptor(&flat(BOOT_CS, CODE_READ_ACCESSED, true)),
        descriptor(&flat(BOOT_DS, DATA_WRITE_ACCESSED, false)),
        tss,
    ]
}

/// A flat segment as a descriptor (SDM, volume 3, figure 3-8): base 0, limit 0xfffff pages.
fn descriptor(segment: &kvm_segment) -> u64 {
    let bit = |value: u8, shift: u32| u64::from(value) << shift;
    0xffff
        | bit(segment.type_, 40)
        | bit(segment.s, 44)
        | bit(segment.present, 47)
        | bit(0xf, 48)
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
}

/// Pages of [`layout::PAGE_TABLES`], in order: they map the first 4 GiB to themselves with 2 MiB pages, which every
/// 64-bit CPU has. 4 GiB, because that is all a kernel, its command line and its initrd may occupy.
pub fn page_tables() -> Vec<u64> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const ENTRIES: u64 = 512;
    let table = |index: u64| (layout::PAGE_TABLES + index * layout::PAGE) | PRESENT_WRITABLE;
    let padded = |used: Vec<u64>| used.into_iter().chain(std::iter::repeat(0)).take(ENTRIES as usize);
    let pml4 = padded(vec![table(1)]);
    let pdpt = padded((2..6).map(table).collect());
    let directories = (0..4 * ENTRIES).map(|index| index << 21 | LARGE | PRESENT_WRITABLE);
    pml4.chain(pdpt).chain(directories).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_64_bit_protocol_begins_in_long_mode_with_the_zero_page_in_rsi() {
        let entry = Entry { protocol: Protocol::Linux64, address: 0x100_0200 };
        let (regs, sregs) = (general(&entry), special(&entry));
        assert_eq!((regs.rip, regs.rsi, regs.rbx, regs.rflags), (0x100_0200, layout::ZERO_PAGE, 0, 2));
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x8000_0011, 0x20, 0x500));
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.ds.db), (1, 0, 1));
        assert_eq!((sregs.cs.selector, sregs.ss.selector), (0x10, 0x18));
        assert_eq!(sregs.gdt.limit, 39);
    }

    #[test]
    fn pvh_begins_in_flat_32_bit_mode_with_the_start_info_in_ebx() {
        let entry = Entry { protocol: Protocol::Pvh, address: 0x100_0000 };
        let (regs, sregs) = (general(&entry), special(&entry));
        assert_eq!((regs.rip, regs.rbx, regs.rsi), (0x100_0000, layout::START_INFO, 0));
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x11, 0, 0, 0));
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.limit), (0, 1, 0xffff_ffff));
    }

    #[test]
    fn the_descriptors_say_what_the_segments_say() {
        // The classic encodings of flat 64-bit code and flat 32-bit data.
        assert_eq!(gdt()[2], 0x00af_9b00_0000_ffff);
        assert_eq!(gdt()[3], 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn the_page_tables_map_every_address_below_4_gib_to_itself() {
        let tables = page_tables();
        assert_eq!(tables.len(), 6 * 512);
        let follow = |entry: u64| ((entry & !0xfff) - layout::PAGE_TABLES) as usize / 8;
        for address in [0u64, 0x1234_5678, 0xbfff_ffff, 0xffff_ffff] {
            let pdpt = follow(tables[0]);
            let directory = follow(tables[pdpt + (address >> 30) as usize]);
            let entry = tables[directory + (address >> 21 & 511) as usize];
            assert_eq!(entry & 0xfff, 0x83);
            assert_eq!(entry & !0x1f_ffff | address & 0x1f_ffff, address);
        }
        assert_eq!(tables[1], 0, "nothing above 512 GiB");
        assert_eq!(tables[512 + 4], 0, "nothing above 4 GiB");
    }
}
