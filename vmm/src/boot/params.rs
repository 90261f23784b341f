//! What a kernel is told at its first instruction: the zero page of the 64-bit Linux protocol or the start info of PVH,
//! both with the same map of memory.

use devices::memory::GuestRam;
use linux_loader::bootparam::{LOADED_HIGH, boot_e820_entry, boot_params, setup_header};
use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use super::{Initrd, ram_size};
use crate::x86_64::{layout, registers};

/// What a part of the address space is to the guest. The numbers are those of E820 (ACPI 6.5, table 15.4) and of PVH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MemoryType {
    Ram = 1,
    Reserved = 2,
    /// ACPI tables: RAM once the guest has read them.
    Acpi = 3,
}

/// (start, end, type), lowest first.
fn memory_map(ram_size: u64) -> Vec<(u64, u64, MemoryType)> {
    let mut map = vec![
        (0, layout::LOW_RAM_END, MemoryType::Ram),
        (layout::ACPI.start, layout::ACPI.end, MemoryType::Acpi),
        (layout::VMGENID.start, layout::VMGENID.end, MemoryType::Reserved),
        (layout::HIGH_RAM, layout::low_ram_end(ram_size), MemoryType::Ram),
        // Linux believes in an ECAM that MCFG tells of only if this map reserves it.
        (layout::ECAM.start, layout::ECAM.end, MemoryType::Reserved),
        (layout::FIRMWARE.start, layout::FIRMWARE.end, MemoryType::Reserved),
        (layout::RAM_ABOVE_HOLE, layout::ram_end(ram_size), MemoryType::Ram),
    ];
    map.retain(|(start, end, _)| start < end);
    map
}

/// Writes the zero page, the GDT and the page tables. `header` is the bzImage's own; an ELF kernel has none.
pub(super) fn write_linux64(
    ram: &GuestRam,
    header: Option<setup_header>,
    cmdline: &str,
    initrd: Option<Initrd>,
) -> Result<(), GuestMemoryError> {
    let initrd = initrd.unwrap_or_default();
    let mut params = boot_params {
        acpi_rsdp_addr: layout::RSDP,
        hdr: setup_header {
            type_of_loader: UNDEFINED_LOADER,
            // Both are below 4 GiB: layout::CMDLINE is, and the initrd is below the hole.
            cmd_line_ptr: layout::CMDLINE as u32,
            ramdisk_image: initrd.address as u32,
            ramdisk_size: initrd.size as u32,
            // The chain of setup data is the loader's; a file has none.
            setup_data: 0,
            ..header.unwrap_or_else(|| header_for_elf(cmdline))
        },
        ..Default::default()
    };
    for (slot, (start, end, kind)) in params.e820_table.iter_mut().zip(memory_map(ram_size(ram))) {
        *slot = boot_e820_entry { addr: start, size: end - start, r#type: kind as u32 };
        params.e820_entries += 1;
    }
    ram.write_obj(params, GuestAddress(layout::ZERO_PAGE))?;
    write_quadwords(ram, layout::GDT, &registers::gdt())?;
    write_quadwords(ram, layout::PAGE_TABLES, &registers::page_tables())
}

/// `type_of_loader` of one that has no number of its own.
const UNDEFINED_LOADER: u8 = 0xff;

/// What a kernel without a setup header looks at in one: the signatures, without which it takes the page for garbage.
fn header_for_elf(cmdline: &str) -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: 0x5372_6448,
        version: 0x20f,
        loadflags: LOADED_HIGH,
        cmdline_size: cmdline.len() as u32,
        ..Default::default()
    }
}

/// Where the module list and the memory map are in the page at [`layout::START_INFO`].
const MODULES: u64 = layout::START_INFO + 0x40;
const MEMORY_MAP: u64 = layout::START_INFO + 0x100;

/// Writes the start info. The initrd is the first module.
pub(super) fn write_pvh(ram: &GuestRam, initrd: Option<Initrd>) -> Result<(), GuestMemoryError> {
    let map = memory_map(ram_size(ram));
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: if initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::RSDP,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    ram.write_obj(info, GuestAddress(layout::START_INFO))?;
    if let Some(Initrd { address, size }) = initrd {
        let module = hvm_modlist_entry { paddr: address, size, ..Default::default() };
        ram.write_obj(module, GuestAddress(MODULES))?;
    }
    for (at, (start, end, kind)) in (MEMORY_MAP..).step_by(size_of::<hvm_memmap_table_entry>()).zip(map) {
        let entry =
            hvm_memmap_table_entry { addr: start, size: end - start, type_: kind as u32, reserved: 0 };
        ram.write_obj(entry, GuestAddress(at))?;
    }
    Ok(())
}

fn write_quadwords(ram: &GuestRam, address: u64, words: &[u64]) -> Result<(), GuestMemoryError> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.as_slice().iter().copied()).collect();
    ram.write_slice(&bytes, GuestAddress(address))
}
