//! What is in a kernel file: which parts of it go where in guest memory, and how the kernel begins. Reads headers only.
//!
//! Everything is checked against the file's size and the guest-physical map before it is believed.

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use linux_loader::elf::{
    ELFCLASS64, ELFDATA2LSB, EM_X86_64, ET_DYN, ET_EXEC, Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_INTERP,
    PT_LOAD, PT_NOTE,
};
use vm_memory::ByteValued;

use super::{BootError, Entry, Protocol};
use crate::x86_64::layout;

mod foreign;

/// A kernel that can boot here, as far as its headers tell.
pub(super) struct Image {
    pub entry: Entry,
    /// Parts of the file to copy; each inside `start..end` and the file.
    pub segments: Vec<Segment>,
    /// All memory that the kernel uses until it manages memory itself. At or above [`layout::HIGH_RAM`].
    pub start: u64,
    pub end: u64,
    /// The initrd must end at or below this address.
    pub initrd_limit: u64,
    /// The longest command line, without its NUL.
    pub cmdline_max: usize,
    /// The setup header of a bzImage, to be handed back to the kernel.
    pub header: Option<setup_header>,
}

/// A part of a file and its place in guest memory.
pub(super) struct Segment {
    pub offset: u64,
    pub file_size: u64,
    pub address: u64,
}

/// How much of the file is read to see what it is: all headers of every kernel we know, in one system call.
const HEAD: usize = 4096;
/// The most program headers of an ELF kernel; Linux has five to ten.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// The most bytes of ELF notes; Linux has half a KiB.
const MAX_NOTES: u64 = 64 << 10;

impl Image {
    pub fn read(file: &File) -> Result<Image, BootError> {
        let source = Source::open(file)?;
        if source.head.starts_with(b"\x7fELF") {
            return elf(&source);
        }
        match source.object::<setup_header>(SETUP_HEADER) {
            Some(header) if header.header == HDRS => bzimage(&source, header),
            _ => Err(foreign::identify(&source.head)),
        }
    }
}

/// A file, its size and its first bytes.
struct Source<'a> {
    file: &'a File,
    size: u64,
    head: Vec<u8>,
}

impl<'a> Source<'a> {
    fn open(file: &'a File) -> Result<Source<'a>, BootError> {
        let size = file.metadata().map_err(BootError::ReadKernel)?.len();
        let mut source = Source { file, size, head: Vec::new() };
        source.head = source.read(0, size.min(HEAD as u64))?;
        Ok(source)
    }

    /// `len` bytes at `offset`, which must be in the file: at most a few KiB.
    fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, BootError> {
        let range = offset as usize..(offset + len) as usize;
        if let Some(bytes) = self.head.get(range) {
            return Ok(bytes.to_vec());
        }
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, offset).map_err(BootError::ReadKernel)?;
        Ok(bytes)
    }

    fn object<T: ByteValued + Default>(&self, offset: usize) -> Option<T> {
        object(&self.head, offset)
    }

    fn contains(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.size)
    }
}

fn object<T: ByteValued + Default>(bytes: &[u8], offset: usize) -> Option<T> {
    let mut object = T::default();
    let end = offset.checked_add(size_of::<T>())?;
    object.as_mut_slice().copy_from_slice(bytes.get(offset..end)?);
    Some(object)
}

// bzImage (Linux, Documentation/arch/x86/boot.rst)

/// Offset of the setup header in a bzImage.
const SETUP_HEADER: usize = 0x1f1;
/// `header`: "HdrS".
const HDRS: u32 = 0x5372_6448;
/// The first protocol version that says whether the kernel has a 64-bit entry: Linux 3.8, 2013.
const VERSION_MIN: u16 = 0x20c;
const SECTOR: u64 = 512;
/// `setup_sects` of old kernels that leave it 0.
const DEFAULT_SETUP_SECTORS: u8 = 4;
/// The 64-bit entry, counted from where the protected-mode part is loaded.
const ENTRY_64: u64 = 0x200;

fn bzimage(source: &Source, header: setup_header) -> Result<Image, BootError> {
    let version = header.version;
    if version < VERSION_MIN {
        let (major, minor) = (version >> 8, version & 0xff);
        return Err(BootError::Unsupported(format!(
            "its boot protocol is {major}.{minor:02}; 2.12 (Linux 3.8) or later is needed"
        )));
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::Unsupported("it is a 32-bit kernel; one for x86_64 is needed".into()));
    }
    let broken = |problem: String| BootError::BrokenKernel { format: "bzImage", problem };
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(broken("its loadflags ask for memory below 1 MiB".into()));
    }
    let sectors = if header.setup_sects == 0 { DEFAULT_SETUP_SECTORS } else { header.setup_sects };
    let offset = (u64::from(sectors) + 1) * SECTOR;
    // What follows, in a signed kernel the signature, is not loaded.
    let size = u64::from(header.syssize) * 16;
    if size <= ENTRY_64 || !source.contains(offset, size) {
        return Err(broken(format!(
            "its header tells of {size} bytes of kernel at offset {offset}, the file has {}",
            source.size
        )));
    }
    // At its preferred address a kernel has not to move itself, and none goes to a lower one.
    let start = header.pref_address;
    let end = start.checked_add(size.max(header.init_size.into()));
    match end {
        Some(end) if start >= layout::HIGH_RAM => Ok(Image {
            entry: Entry { protocol: Protocol::Linux64, address: start + ENTRY_64 },
            segments: vec![Segment { offset, file_size: size, address: start }],
            start,
            end,
            initrd_limit: u64::from(header.initrd_addr_max) + 1,
            cmdline_max: (header.cmdline_size as usize).min(layout::CMDLINE_CAPACITY as usize - 1),
            header: Some(header),
        }),
        _ => Err(broken(format!("its preferred address is {start:#x}"))),
    }
}

// ELF

fn elf(source: &Source) -> Result<Image, BootError> {
    let broken = |problem: &str| BootError::BrokenKernel { format: "ELF file", problem: problem.into() };
    // Class and byte order decide the rest of the header, so they are looked at first.
    let ident = source.head.get(4..6).ok_or_else(|| broken("it ends within its header"))?;
    if ident != [ELFCLASS64, ELFDATA2LSB] {
        return Err(foreign::elf(&source.head));
    }
    let header: Elf64_Ehdr = source.object(0).ok_or_else(|| broken("it ends within its header"))?;
    let headers = program_headers(source, &header)?;
    let interpreted = headers.iter().any(|header| header.p_type == PT_INTERP);
    if header.e_machine != EM_X86_64 || !matches!(header.e_type, ET_EXEC | ET_DYN) || interpreted {
        return Err(foreign::elf(&source.head));
    }
    let loads = headers.iter().filter(|header| header.p_type == PT_LOAD && header.p_memsz > 0);
    let spans = loads.map(|header| span(source, header)).collect::<Result<Vec<_>, _>>()?;
    let entry = match pvh_entry(source, &headers)? {
        Some(address) => Entry { protocol: Protocol::Pvh, address },
        None => Entry { protocol: Protocol::Linux64, address: header.e_entry },
    };
    if !spans.iter().any(|span| (span.segment.address..span.end).contains(&entry.address)) {
        return Err(broken("its entry point is not in any of its loaded segments"));
    }
    Ok(Image {
        entry,
        start: spans.iter().map(|span| span.segment.address).min().unwrap_or(layout::HIGH_RAM),
        end: spans.iter().map(|span| span.end).max().unwrap_or(layout::HIGH_RAM),
        segments: spans.into_iter().map(|span| span.segment).collect(),
        initrd_limit: layout::HOLE.start,
        cmdline_max: layout::CMDLINE_CAPACITY as usize - 1,
        header: None,
    })
}

fn program_headers(source: &Source, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, BootError> {
    let broken = |problem: String| BootError::BrokenKernel { format: "ELF file", problem };
    let (count, size) = (header.e_phnum, size_of::<Elf64_Phdr>());
    if count == 0 {
        return Err(foreign::elf(&source.head));
    }
    if count > MAX_PROGRAM_HEADERS || usize::from(header.e_phentsize) != size {
        return Err(broken(format!(
            "it has {count} program headers of {} bytes; at most {MAX_PROGRAM_HEADERS} of {size} are expected",
            header.e_phentsize
        )));
    }
    let len = u64::from(count) * size as u64;
    if !source.contains(header.e_phoff, len) {
        return Err(broken("its program headers are beyond its end".into()));
    }
    let table = source.read(header.e_phoff, len)?;
    Ok((0..usize::from(count)).map_while(|index| object(&table, index * size)).collect())
}

/// A segment and the end of its memory, which zeros fill behind what the file has.
struct Span {
    segment: Segment,
    end: u64,
}

fn span(source: &Source, header: &Elf64_Phdr) -> Result<Span, BootError> {
    let broken = |problem: String| BootError::BrokenKernel { format: "ELF file", problem };
    let (offset, file_size, address) = (header.p_offset, header.p_filesz, header.p_paddr);
    if file_size > header.p_memsz || !source.contains(offset, file_size) {
        return Err(broken(format!(
            "a segment takes {file_size} bytes at offset {offset} for {} of memory, the file has {}",
            header.p_memsz, source.size
        )));
    }
    match address.checked_add(header.p_memsz) {
        Some(end) if address >= layout::HIGH_RAM => {
            Ok(Span { segment: Segment { offset, file_size, address }, end })
        }
        _ => Err(BootError::Unsupported(format!(
            "a segment wants {} bytes of memory at {address:#x}; kernels go above {:#x}",
            header.p_memsz,
            layout::HIGH_RAM
        ))),
    }
}

/// Type of the note that holds the 32-bit entry point of the PVH protocol (Xen, public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

fn pvh_entry(source: &Source, headers: &[Elf64_Phdr]) -> Result<Option<u64>, BootError> {
    for header in headers.iter().filter(|header| header.p_type == PT_NOTE) {
        let (offset, size) = (header.p_offset, header.p_filesz);
        if size > MAX_NOTES || !source.contains(offset, size) {
            return Err(BootError::BrokenKernel {
                format: "ELF file",
                problem: format!(
                    "its notes take {size} bytes at offset {offset}; at most {MAX_NOTES} are expected, within its {}",
                    source.size
                ),
            });
        }
        if let Some(entry) = find_pvh_note(&source.read(offset, size)?) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// The entry in the first note that has one. Notes end where one does not fit.
fn find_pvh_note(notes: &[u8]) -> Option<u64> {
    let mut at = 0;
    loop {
        let note: Elf64_Nhdr = object(notes, at)?;
        let name = at + size_of::<Elf64_Nhdr>();
        let description = name.checked_add(padded(note.n_namesz))?;
        at = description.checked_add(padded(note.n_descsz))?;
        let named = |name: &[u8]| name == b"Xen\0";
        if note.n_type == XEN_ELFNOTE_PHYS32_ENTRY && notes.get(name..description).is_some_and(named) {
            // 4 bytes, or 8 of which a 32-bit entry uses the first 4.
            let end = description.checked_add(4)?;
            let bytes = notes.get(description..end.min(at))?;
            return Some(u32::from_le_bytes(bytes.try_into().ok()?).into());
        }
    }
}

/// Names and descriptions are padded to 4 bytes.
fn padded(len: u32) -> usize {
    (len as usize).next_multiple_of(4)
}
