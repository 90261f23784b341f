//! Puts a kernel, its initrd and its command line into guest RAM, and says where the first vCPU begins.
//!
//! Any bytes in the kernel file give an entry or an error. Does not uncompress kernels, run firmware or write ACPI
//! tables; those are found at [`layout::RSDP`].
//!
//! `linux-loader` has the structures of the boot protocols but is not asked to load: its ELF loader makes two system
//! calls for each program header and each note, trusts sizes, and takes no notice of memory beyond the file's bytes.

mod image;
mod params;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use devices::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::x86_64::layout;
use image::{Image, Segment};

/// Where and how the first vCPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub protocol: Protocol,
    /// Guest-physical address of the first instruction.
    pub address: u64,
}

/// What a kernel expects of the machine when it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// The 64-bit Linux boot protocol (Linux, Documentation/arch/x86/boot.rst): long mode, `boot_params` in RSI.
    Linux64,
    /// PVH (Xen, docs/misc/pvh.pandoc): 32-bit protected mode, `hvm_start_info` in EBX.
    Pvh,
}

/// Why a guest cannot boot from what it was given. The texts name the field of `/boot-source` or `/machine-config`.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("kernel_image_path: cannot read the file: {0}")]
    ReadKernel(io::Error),
    #[error(
        "kernel_image_path: the file is {what}, not a kernel for this machine; give a bzImage or an uncompressed ELF \
         kernel (vmlinux) for x86_64{}", .hint.map(|hint| format!(": {hint}")).unwrap_or_default()
    )]
    NotAKernel { what: String, hint: Option<&'static str> },
    #[error("kernel_image_path: the {format} is damaged or cut short: {problem}")]
    BrokenKernel { format: &'static str, problem: String },
    #[error("kernel_image_path: this kernel cannot boot here: {0}")]
    Unsupported(String),
    #[error(
        "mem_size_mib is {mib}: the kernel needs the memory from {start:#x} to {end:#x} and RAM below the hole ends at \
         {ram_end:#x}; at least {} MiB are needed", .end.div_ceil(1 << 20)
    )]
    NoRoomForKernel { mib: u64, start: u64, end: u64, ram_end: u64 },
    #[error("initrd_path: cannot read the file: {0}")]
    ReadInitrd(io::Error),
    #[error("initrd_path: the file is empty; leave initrd_path out to boot without one")]
    EmptyInitrd,
    #[error(
        "mem_size_mib is {mib}: the initrd of {size} bytes does not fit between the kernel's end at {start:#x} and \
         {limit:#x}; give the guest more memory or a smaller initrd"
    )]
    NoRoomForInitrd { mib: u64, size: u64, start: u64, limit: u64 },
    #[error("boot_args: the kernel command line has {len} bytes; this kernel takes at most {max}")]
    CmdlineTooLong { len: usize, max: usize },
    #[error("boot_args: the kernel command line has a NUL at byte {at}; a kernel would see nothing after it")]
    CmdlineNul { at: usize },
    #[error("cannot write boot structures to guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Where the initrd is in guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Initrd {
    address: u64,
    size: u64,
}

/// Loads everything that a guest needs before its first instruction into `ram`, which must be fresh (all zeros).
pub fn load(ram: &GuestRam, kernel: &File, initrd: Option<&File>, cmdline: &str) -> Result<Entry, BootError> {
    let image = Image::read(kernel)?;
    check_cmdline(cmdline, image.cmdline_max)?;
    check_room(ram, &image)?;
    for segment in &image.segments {
        copy(ram, kernel, segment).map_err(BootError::ReadKernel)?;
    }
    let initrd = initrd.map(|file| load_initrd(ram, file, &image)).transpose()?;
    ram.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
    match image.entry.protocol {
        Protocol::Linux64 => params::write_linux64(ram, image.header, cmdline, initrd)?,
        Protocol::Pvh => params::write_pvh(ram, initrd)?,
    }
    Ok(image.entry)
}

fn check_cmdline(cmdline: &str, max: usize) -> Result<(), BootError> {
    if let Some(at) = cmdline.bytes().position(|byte| byte == 0) {
        return Err(BootError::CmdlineNul { at });
    }
    match cmdline.len() {
        len if len > max => Err(BootError::CmdlineTooLong { len, max }),
        _ => Ok(()),
    }
}

/// Kernels begin at or above 1 MiB ([`Image::read`] sees to that) and end below the hole.
fn check_room(ram: &GuestRam, image: &Image) -> Result<(), BootError> {
    let ram_end = layout::low_ram_end(ram_size(ram));
    let (start, end) = (image.start, image.end);
    if end > ram_end {
        return Err(BootError::NoRoomForKernel { mib: ram_size(ram) >> 20, start, end, ram_end });
    }
    Ok(())
}

/// As high as the kernel can reach it, so that it is out of the way of what the kernel puts behind itself.
fn load_initrd(ram: &GuestRam, file: &File, image: &Image) -> Result<Initrd, BootError> {
    let size = file.metadata().map_err(BootError::ReadInitrd)?.len();
    if size == 0 {
        return Err(BootError::EmptyInitrd);
    }
    let ram_size = ram_size(ram);
    let limit = layout::low_ram_end(ram_size).min(image.initrd_limit);
    let address = limit.checked_sub(size).map(|address| address & !(layout::PAGE - 1));
    match address.filter(|address| *address >= image.end) {
        Some(address) => {
            let whole = Segment { offset: 0, file_size: size, address };
            copy(ram, file, &whole).map_err(BootError::ReadInitrd)?;
            Ok(Initrd { address, size })
        }
        None => Err(BootError::NoRoomForInitrd { mib: ram_size >> 20, size, start: image.end, limit }),
    }
}

fn copy(ram: &GuestRam, mut file: &File, segment: &Segment) -> io::Result<()> {
    file.seek(SeekFrom::Start(segment.offset))?;
    ram.read_exact_volatile_from(GuestAddress(segment.address), &mut file, segment.file_size as usize)
        .map_err(|error| match error {
            vm_memory::GuestMemoryError::IOError(error) => error,
            other => io::Error::other(other),
        })
}

fn ram_size(ram: &GuestRam) -> u64 {
    ram.iter().map(|region| region.len()).sum()
}

#[cfg(test)]
mod tests;
