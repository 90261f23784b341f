use super::*;
use linux_loader::bootparam::{boot_params, setup_header};
use linux_loader::elf::{
    EM_AARCH64, EM_X86_64, ET_EXEC, ET_REL, Elf64_Ehdr, Elf64_Phdr, PT_INTERP, PT_LOAD, PT_NOTE,
};
use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use std::io::Write;
use vm_memory::ByteValued;

const MIB: u64 = 1 << 20;
/// Where the test kernels want to be.
const KERNEL: u64 = 2 * MIB;
const CODE: &[u8] = &[0xf4; 0x1000];

fn ram(mib: u64) -> GuestRam {
    let ranges: Vec<_> =
        layout::ram(mib * MIB).map(|(base, len)| (GuestAddress(base), len as usize)).collect();
    GuestRam::from_ranges(&ranges).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn boot(ram: &GuestRam, kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> Result<Entry, BootError> {
    load(ram, &file(kernel), initrd.map(file).as_ref(), cmdline)
}

fn refusal(kernel: &[u8]) -> String {
    boot(&ram(16), kernel, None, "").unwrap_err().to_string()
}

fn header() -> setup_header {
    setup_header {
        setup_sects: 1,
        syssize: (CODE.len() / 16) as u32,
        boot_flag: 0xaa55,
        header: 0x5372_6448,
        version: 0x20f,
        loadflags: 1,
        xloadflags: 1,
        initrd_addr_max: 0x7fff_ffff,
        cmdline_size: 100,
        setup_data: 0xbad,
        pref_address: KERNEL,
        init_size: 4 * MIB as u32,
        ..Default::default()
    }
}

fn bzimage(header: setup_header) -> Vec<u8> {
    let mut image = vec![0; 0x400];
    image[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(header.as_slice());
    image.extend_from_slice(CODE);
    image.extend_from_slice(b"a signature");
    image
}

struct ElfFile {
    header: Elf64_Ehdr,
    headers: Vec<Elf64_Phdr>,
    notes: Vec<u8>,
}

const CODE_OFFSET: u64 = 0x1000;
const NOTES_OFFSET: u64 = 0x400;

impl ElfFile {
    /// Code, zeros behind it up to 1 MiB, and notes.
    fn new(notes: Vec<u8>) -> ElfFile {
        let mut e_ident = [0; 16];
        e_ident[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        let load = Elf64_Phdr {
            p_type: PT_LOAD,
            p_offset: CODE_OFFSET,
            p_vaddr: 0xffff_ffff_8100_0000,
            p_paddr: KERNEL,
            p_filesz: CODE.len() as u64,
            p_memsz: MIB,
            ..Default::default()
        };
        let note = Elf64_Phdr {
            p_type: PT_NOTE,
            p_offset: NOTES_OFFSET,
            p_filesz: notes.len() as u64,
            ..Default::default()
        };
        let header = Elf64_Ehdr {
            e_ident,
            e_type: ET_EXEC,
            e_machine: EM_X86_64,
            e_entry: KERNEL + 0x10,
            e_phoff: 64,
            e_phentsize: 56,
            e_phnum: 2,
            ..Default::default()
        };
        ElfFile { header, headers: vec![load, note], notes }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; CODE_OFFSET as usize];
        let mut at = 0;
        let mut put = |part: &[u8]| {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        };
        put(self.header.as_slice());
        self.headers.iter().for_each(|header| put(header.as_slice()));
        bytes[NOTES_OFFSET as usize..NOTES_OFFSET as usize + self.notes.len()].copy_from_slice(&self.notes);
        bytes.extend_from_slice(CODE);
        bytes
    }
}

fn note(name: &[u8], kind: u32, description: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [name.len() as u32, description.len() as u32, kind] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    for part in [name, description] {
        note.extend_from_slice(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

fn pvh_notes() -> Vec<u8> {
    let mut notes = note(b"Linux\0", 18, &[1, 2, 3, 4, 5]);
    notes.extend(note(b"Xen\0", 18, &(KERNEL + 0x20).to_le_bytes()));
    notes
}

#[test]
fn a_bzimage_begins_at_its_64_bit_entry_with_its_own_header_in_the_zero_page() {
    let ram = ram(16);
    let entry = boot(&ram, &bzimage(header()), Some(b"initrd"), "console=ttyS0").unwrap();
    assert_eq!(entry, Entry { protocol: Protocol::Linux64, address: KERNEL + 0x200 });
    let code: [u8; 16] = ram.read_obj(GuestAddress(KERNEL + CODE.len() as u64 - 8)).unwrap();
    assert_eq!(code, [[0xf4; 8], [0; 8]].concat()[..], "the signature is not loaded");

    let params: boot_params = ram.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
    let initrd = 16 * MIB - 4096;
    let expected = setup_header {
        type_of_loader: 0xff,
        cmd_line_ptr: layout::CMDLINE as u32,
        ramdisk_image: initrd as u32,
        ramdisk_size: 6,
        setup_data: 0,
        ..header()
    };
    assert_eq!({ params.hdr }, expected);
    assert_eq!({ params.acpi_rsdp_addr }, 0xe0000);
    assert_eq!(ram.read_obj::<[u8; 6]>(GuestAddress(initrd)).unwrap(), *b"initrd");
    assert_eq!(ram.read_obj::<[u8; 14]>(GuestAddress(layout::CMDLINE)).unwrap(), *b"console=ttyS0\0");
    assert_eq!(ram.read_obj::<u64>(GuestAddress(layout::PAGE_TABLES)).unwrap(), layout::PAGE_TABLES + 0x1003);
    assert_eq!(ram.read_obj::<u64>(GuestAddress(layout::GDT + 16)).unwrap(), 0x00af_9b00_0000_ffff);
}

#[test]
fn the_memory_map_leaves_out_the_hole_and_reserves_what_the_machine_needs() {
    let expected = [
        (0, 0xa_0000, 1),
        (0xe_0000, 0xe_f000, 3),
        (0xe_f000, 0xf_0000, 2),
        (0x10_0000, 0xc000_0000, 1),
        (0xe000_0000, 0xe010_0000, 2),
        (0xfffb_c000, 0x1_0000_0000, 2),
        (0x1_0000_0000, 0x1_8000_0000, 1),
    ];
    let linux = ram(5 * 1024);
    boot(&linux, &bzimage(header()), None, "").unwrap();
    let params: boot_params = linux.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
    let entries = params.e820_table;
    let entries: Vec<_> = entries[..params.e820_entries.into()]
        .iter()
        .map(|entry| (entry.addr, entry.addr + entry.size, entry.r#type))
        .collect();
    assert_eq!(entries, expected);

    let pvh = ram(5 * 1024);
    boot(&pvh, &ElfFile::new(pvh_notes()).bytes(), None, "").unwrap();
    let info: hvm_start_info = pvh.read_obj(GuestAddress(layout::START_INFO)).unwrap();
    let entries: Vec<_> = (0..info.memmap_entries.into())
        .map(|index: u64| {
            let at = info.memmap_paddr + index * size_of::<hvm_memmap_table_entry>() as u64;
            let entry: hvm_memmap_table_entry = pvh.read_obj(GuestAddress(at)).unwrap();
            (entry.addr, entry.addr + entry.size, entry.type_)
        })
        .collect();
    assert_eq!(entries, expected);
}

#[test]
fn an_elf_kernel_with_a_pvh_note_begins_there_with_a_start_info() {
    let ram = ram(16);
    let entry = boot(&ram, &ElfFile::new(pvh_notes()).bytes(), Some(b"initrd"), "quiet").unwrap();
    assert_eq!(entry, Entry { protocol: Protocol::Pvh, address: KERNEL + 0x20 });
    let info: hvm_start_info = ram.read_obj(GuestAddress(layout::START_INFO)).unwrap();
    assert_eq!((info.magic, info.version, info.nr_modules), (0x336e_c578, 1, 1));
    assert_eq!((info.cmdline_paddr, info.rsdp_paddr), (layout::CMDLINE, layout::RSDP));
    let module: hvm_modlist_entry = ram.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!((module.paddr, module.size), (16 * MIB - 4096, 6));
    assert_eq!(ram.read_obj::<[u8; 6]>(GuestAddress(module.paddr)).unwrap(), *b"initrd");
}

#[test]
fn an_elf_kernel_without_the_note_begins_at_its_entry_with_a_zero_page() {
    let ram = ram(16);
    let entry = boot(&ram, &ElfFile::new(note(b"GNU\0", 3, &[7; 20])).bytes(), None, "quiet").unwrap();
    assert_eq!(entry, Entry { protocol: Protocol::Linux64, address: KERNEL + 0x10 });
    assert_eq!(ram.read_obj::<[u8; 16]>(GuestAddress(KERNEL)).unwrap(), [0xf4; 16]);
    let params: boot_params = ram.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
    assert_eq!(({ params.hdr.boot_flag }, { params.hdr.header }), (0xaa55, 0x5372_6448));
}

#[test]
fn the_initrd_ends_where_the_kernel_can_still_reach_it() {
    let low = setup_header { initrd_addr_max: 0xaf_ffff, ..header() };
    let ram = ram(16);
    boot(&ram, &bzimage(low), Some(&[1; 5000]), "").unwrap();
    let params: boot_params = ram.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
    assert_eq!({ params.hdr.ramdisk_image }, 0xaf_e000);
}

#[test]
fn what_does_not_fit_says_how_much_memory_is_needed() {
    let text = boot(&ram(5), &bzimage(header()), None, "").unwrap_err().to_string();
    assert!(text.contains("mem_size_mib is 5") && text.contains("at least 6 MiB"), "{text}");
    // Room for the kernel's 6 MiB, and one for the initrd.
    let initrd = vec![1; 2 * MIB as usize];
    let text = boot(&ram(7), &bzimage(header()), Some(&initrd), "").unwrap_err().to_string();
    assert!(text.contains("mem_size_mib is 7") && text.contains("initrd of 2097152 bytes"), "{text}");
    boot(&ram(8), &bzimage(header()), Some(&initrd), "").unwrap();
    let text = boot(&ram(16), &bzimage(header()), Some(b""), "").unwrap_err().to_string();
    assert!(text.contains("initrd_path: the file is empty"), "{text}");
}

#[test]
fn a_command_line_that_the_kernel_would_cut_is_refused() {
    let kernel = bzimage(header());
    boot(&ram(16), &kernel, None, &"x".repeat(100)).unwrap();
    let text = boot(&ram(16), &kernel, None, &"x".repeat(101)).unwrap_err().to_string();
    assert!(
        text.contains("boot_args") && text.contains("101 bytes") && text.contains("at most 100"),
        "{text}"
    );
    let kernel = ElfFile::new(pvh_notes()).bytes();
    boot(&ram(16), &kernel, None, &"x".repeat(2047)).unwrap();
    boot(&ram(16), &kernel, None, &"x".repeat(2048)).unwrap_err();
    let text = boot(&ram(16), &kernel, None, "quiet\0ro").unwrap_err().to_string();
    assert!(text.contains("NUL at byte 5"), "{text}");
}

#[test]
fn a_file_that_is_no_kernel_is_called_what_it_is() {
    let at = |offset: usize, magic: &[u8]| [vec![0; offset], magic.to_vec(), vec![0; 64]].concat();
    let elf = |change: fn(&mut ElfFile)| {
        let mut elf = ElfFile::new(Vec::new());
        change(&mut elf);
        elf.bytes()
    };
    let mut i386 = ElfFile::new(Vec::new()).bytes();
    (i386[4], i386[18]) = (1, 3);
    let mut s390 = ElfFile::new(Vec::new()).bytes();
    (s390[5], s390[18], s390[19]) = (2, 0, 22);
    let cases: &[(Vec<u8>, &str)] = &[
        (vec![], "is empty"),
        (b"\x1f\x8b\x08 and so on".into(), "gzip-compressed data"),
        (b"\xfd7zXZ\0\0".into(), "xz-compressed data"),
        (b"\x28\xb5\x2f\xfd".into(), "zstd-compressed data"),
        (b"#!/bin/sh\n".into(), "a script"),
        ([b"MZ".to_vec(), at(0x36, b"ARM\x64")].concat(), "an arm64 kernel"),
        (at(0, b"MZ"), "an EFI program"),
        (b"070701".into(), "an initrd goes to initrd_path"),
        (b"QFI\xfb\0\0\0\x03".into(), "a qcow2 disk image"),
        (at(0x438, b"\x53\xef"), "an ext2/3/4 file system"),
        (at(0x1fe, b"\x55\xaa"), "a boot sector"),
        (b"<!DOCTYPE html>".into(), "error page of a download"),
        (b"hello".into(), "its first bytes are 68 65 6c 6c 6f"),
        (elf(|elf| elf.header.e_machine = EM_AARCH64), "a 64-bit ELF file for arm64"),
        (elf(|elf| elf.header.e_type = ET_REL), "perhaps a kernel module"),
        (elf(|elf| elf.headers[1].p_type = PT_INTERP), "runs under an operating system"),
        (i386, "a 32-bit ELF file for x86"),
        (s390, "a 64-bit ELF file for s390"),
    ];
    for (bytes, what) in cases {
        let text = refusal(bytes);
        assert!(text.starts_with("kernel_image_path: ") && text.contains(what), "{what}: {text}");
    }
}

#[test]
fn a_bzimage_that_cannot_boot_here_says_why() {
    let with = |change: fn(&mut setup_header)| {
        let mut header = header();
        change(&mut header);
        refusal(&bzimage(header))
    };
    assert!(with(|h| h.version = 0x20b).contains("boot protocol is 2.11"));
    assert!(with(|h| h.xloadflags = 0x2).contains("32-bit kernel"));
    assert!(with(|h| h.loadflags = 0).contains("loadflags"));
    assert!(with(|h| h.syssize = 0x200).contains("8192 bytes of kernel at offset 1024"));
    assert!(with(|h| h.syssize = 0).contains("0 bytes of kernel"));
    assert!(with(|h| h.pref_address = 0x9_0000).contains("0x90000"));
    assert!(with(|h| h.pref_address = u64::MAX - 1).contains("preferred address"));
    assert!(with(|h| h.init_size = u32::MAX).contains("mem_size_mib is 16"));
}

#[test]
fn an_elf_kernel_that_cannot_boot_here_says_why() {
    let with = |change: fn(&mut ElfFile)| {
        let mut elf = ElfFile::new(pvh_notes());
        change(&mut elf);
        refusal(&elf.bytes())
    };
    assert!(
        with(|e| e.headers[0].p_paddr = 0x7000).contains("a segment wants 1048576 bytes of memory at 0x7000")
    );
    assert!(with(|e| e.headers[0].p_paddr = u64::MAX).contains("at 0xffffffffffffffff"));
    assert!(with(|e| e.headers[0].p_memsz = 3 << 30).contains("mem_size_mib is 16"));
    assert!(with(|e| e.headers[0].p_filesz = MIB + 1).contains("a segment takes"));
    assert!(with(|e| e.headers[0].p_memsz = 0x800).contains("for 2048 of memory"));
    assert!(with(|e| e.headers[0].p_offset = u64::MAX).contains("a segment takes"));
    assert!(with(|e| e.headers[1].p_filesz = 1 << 40).contains("its notes take"));
    assert!(with(|e| e.headers[1].p_offset = 1 << 40).contains("its notes take"));
    assert!(with(|e| e.header.e_phnum = 65).contains("65 program headers"));
    assert!(with(|e| e.header.e_phentsize = 0).contains("program headers of 0 bytes"));
    assert!(with(|e| e.header.e_phoff = u64::MAX).contains("beyond its end"));
    assert!(with(|e| e.notes = note(b"Xen\0", 18, &[0; 4])).contains("entry point is not in any"));
}

/// Every file that differs from a good one in one byte, and every file cut short, boots or is refused.
#[test]
fn no_damaged_kernel_brings_the_vmm_down() {
    let ram = ram(8);
    for kernel in [bzimage(header()), ElfFile::new(pvh_notes()).bytes()] {
        let interesting = kernel.len().min(0x500);
        for at in 0..interesting {
            for value in [0, 0x7f, 0xff] {
                let mut damaged = kernel.clone();
                damaged[at] = value;
                let _ = boot(&ram, &damaged, None, "");
            }
            let _ = boot(&ram, &kernel[..at], None, "");
        }
    }
}
