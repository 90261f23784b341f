//! One operation by io_uring, which goes past filters of system calls but not past the kernel's other rules.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::aims::Aims;
use crate::call::{call, of};

const ENTRIES: usize = 1;
const GET_EVENTS: usize = 1;
const OPENAT: u8 = 18;

/// Where the rings and the entries are mapped: offsets of `mmap`, not of the file.
const RINGS_AT: usize = 0;
const ENTRIES_AT: usize = 0x1000_0000;
const MAPPED: usize = 4096;

pub fn read_host_file(aims: &Aims) -> io::Result<()> {
    let path = format!("{}\0", aims.text("host-file")?);
    // struct io_uring_sqe: operation, descriptor, address (the path), length (the mode), flags.
    let mut entry = [0_u8; 64];
    entry[0] = OPENAT;
    entry[4..8].copy_from_slice(&libc::AT_FDCWD.to_ne_bytes());
    entry[16..24].copy_from_slice(&path.as_ptr().expose_provenance().to_ne_bytes());
    entry[28..32].copy_from_slice(&libc::O_RDONLY.to_ne_bytes());
    submit(&entry).map(drop)
}

/// Submits one entry and gives its result.
fn submit(entry: &[u8; 64]) -> io::Result<i32> {
    // struct io_uring_params: 40 bytes, then the offsets in the submission ring and in the completion ring.
    let mut parameters = [0_u32; 30];
    let ring = call(libc::SYS_io_uring_setup, &[ENTRIES, of(&mut parameters)])?;
    let [submission_tail, submission_array] = [parameters[11], parameters[16]];
    let completions = parameters[25];
    let rings = map(ring, RINGS_AT)?;
    let entries = map(ring, ENTRIES_AT)?;
    // SAFETY: `entries` is one page that the kernel mapped for this ring, and an entry has 64 bytes.
    unsafe { entries.cast::<[u8; 64]>().write(*entry) };
    let word = |offset: u32| -> &AtomicU32 {
        // SAFETY: the offsets are the kernel's own, within the page that it mapped, and aligned for what is there; the
        // mapping stays as long as the process.
        unsafe { &*rings.byte_add(offset as usize).cast() }
    };
    word(submission_array).store(0, Ordering::Relaxed);
    word(submission_tail).store(1, Ordering::Release);
    call(libc::SYS_io_uring_enter, &[ring, 1, 1, GET_EVENTS, 0, 0])?;
    // struct io_uring_cqe: 8 bytes of ours, then the result.
    let result = word(completions + 8).load(Ordering::Acquire) as i32;
    match result {
        0.. => Ok(result),
        _ => Err(io::Error::from_raw_os_error(-result)),
    }
}

fn map(ring: usize, offset: usize) -> io::Result<*mut u8> {
    let access = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let page = call(libc::SYS_mmap, &[0, MAPPED, access, libc::MAP_SHARED as usize, ring, offset])?;
    Ok(std::ptr::with_exposed_provenance_mut(page))
}
