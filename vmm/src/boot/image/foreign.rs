//! Says what a file is that is not a kernel for this machine: half of all failed first boots are a wrong file.
//!
//! Knows by first bytes only; never opens, uncompresses or otherwise believes the file.

use super::{BootError, object};
use linux_loader::elf::{ELFCLASS64, ELFDATA2LSB, EM_X86_64, ET_DYN, ET_EXEC};

/// (offset, bytes, what it is, what to do).
type Known = (usize, &'static [u8], &'static str, Option<&'static str>);

const UNCOMPRESS: Option<&str> = Some("uncompress it first");

/// In this order: an EFI program that is an arm64 kernel is both.
const KNOWN: &[Known] = &[
    (0x38, b"ARM\x64", "an arm64 kernel (Image)", None),
    (0x38, b"RSC\x05", "a RISC-V kernel (Image)", None),
    (4, b"zimg", "a compressed EFI kernel (vmlinuz.efi) of another architecture", None),
    (
        0,
        b"MZ",
        "an EFI program or a Windows executable",
        Some("a unified kernel image has the bzImage in its .linux section"),
    ),
    (0, b"\x1f\x8b", "gzip-compressed data", UNCOMPRESS),
    (0, b"\xfd7zXZ\0", "xz-compressed data", UNCOMPRESS),
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed data", UNCOMPRESS),
    (0, b"BZh", "bzip2-compressed data", UNCOMPRESS),
    (0, b"\x04\x22\x4d\x18", "lz4-compressed data", UNCOMPRESS),
    (0, b"\x02\x21\x4c\x18", "lz4-compressed data", UNCOMPRESS),
    (0, b"\x5d\0\0", "LZMA-compressed data", UNCOMPRESS),
    (0, b"\x89LZO", "lzop-compressed data", UNCOMPRESS),
    (0, b"PK\x03\x04", "a zip archive", None),
    (0, b"#!", "a script", None),
    (0, b"07070", "a cpio archive", Some("an initrd goes to initrd_path")),
    (0, b"\x27\x05\x19\x56", "a U-Boot image", None),
    (0, b"ANDROID!", "an Android boot image", None),
    (0, b"\xd0\x0d\xfe\xed", "a device tree or FIT image", None),
    (0, b"!<arch>", "a Debian package or an archive", Some("the kernel is in it, under boot/")),
    (0, b"\xed\xab\xee\xdb", "an RPM package", Some("the kernel is in it")),
    (0, b"QFI\xfb", "a qcow2 disk image", Some("a disk goes to /drives")),
    (0, b"hsqs", "a squashfs image", Some("a disk goes to /drives")),
    (0x438, b"\x53\xef", "an ext2/3/4 file system", Some("a disk goes to /drives")),
    (0x101, b"ustar", "a tar archive", None),
    (0, b"<", "an XML or HTML text, perhaps the error page of a download", None),
    (0x1fe, b"\x55\xaa", "a boot sector or a disk image", Some("a disk goes to /drives")),
];

/// The error for a file that is neither ELF nor bzImage.
pub(super) fn identify(head: &[u8]) -> BootError {
    let known = KNOWN
        .iter()
        .find(|(offset, magic, ..)| head.get(*offset..).is_some_and(|tail| tail.starts_with(magic)));
    match known {
        Some((_, _, what, hint)) => not_a_kernel(*what, *hint),
        None if head.is_empty() => not_a_kernel("empty", None),
        None => {
            let first: Vec<_> = head.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
            not_a_kernel(format!("of an unknown kind (its first bytes are {})", first.join(" ")), None)
        }
    }
}

/// The error for an ELF file that is no kernel for x86_64.
pub(super) fn elf(head: &[u8]) -> BootError {
    let [class, data] = head.get(4..6).and_then(|ident| ident.try_into().ok()).unwrap_or([0, 0]);
    let half = |offset| {
        let bytes = object::<u16>(head, offset).unwrap_or_default();
        if data == ELFDATA2LSB { bytes } else { bytes.swap_bytes() }
    };
    let (e_type, machine) = (half(16), half(18));
    if class != ELFCLASS64 || machine != EM_X86_64 {
        let bits = if class == ELFCLASS64 { "64" } else { "32" };
        return not_a_kernel(format!("a {bits}-bit ELF file for {}", machine_name(machine)), None);
    }
    match e_type {
        1 => not_a_kernel("an ELF object file, perhaps a kernel module", None),
        4 => not_a_kernel("a core dump", None),
        ET_EXEC | ET_DYN => not_a_kernel("a program or library that runs under an operating system", None),
        other => not_a_kernel(format!("an ELF file of type {other}"), None),
    }
}

/// e_machine (System V ABI).
fn machine_name(machine: u16) -> String {
    match machine {
        3 => "x86".into(),
        8 => "MIPS".into(),
        20 => "PowerPC".into(),
        21 => "64-bit PowerPC".into(),
        22 => "s390".into(),
        40 => "ARM".into(),
        EM_X86_64 => "x86_64".into(),
        183 => "arm64".into(),
        243 => "RISC-V".into(),
        258 => "LoongArch".into(),
        other => format!("machine {other}"),
    }
}

fn not_a_kernel(what: impl Into<String>, hint: Option<&'static str>) -> BootError {
    BootError::NotAKernel { what: what.into(), hint }
}
