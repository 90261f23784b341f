//! Reading a file or a stream straight into guest memory and writing it straight from there: `preadv` and `pwritev` on
//! slices of guest RAM, to the last byte; `readv` and `writev`, one for a packet, or as far as a descriptor that does not
//! block goes.
//!
//! The gate for unsafe code of the back-ends: nothing else in here, and nothing of the kind elsewhere.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::bitmap::Bitmap;

use crate::virtio::queue::GuestSlice;

/// Fills `slices` from `file` at `offset`. On an error, what of them is filled is unknown.
pub fn read_at(file: &File, slices: &[GuestSlice<'_>], offset: u64) -> io::Result<()> {
    let wanted: usize = slices.iter().map(|slice| slice.len()).sum();
    match read_up_to_end(file, slices, offset)? {
        done if done == wanted as u64 => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Fills the front of `slices` from `file` at `offset`, all of them unless the file ends, and tells how many bytes that are.
pub fn read_up_to_end(file: &File, slices: &[GuestSlice<'_>], offset: u64) -> io::Result<u64> {
    let result = transfer(file, slices, offset, libc::preadv);
    for slice in slices {
        // The kernel's writes pass by the bitmap.
        slice.bitmap().mark_dirty(0, slice.len());
    }
    result
}

/// Writes `slices` to `file` at `offset`. On an error, what of them is written is unknown.
pub fn write_at(file: &File, slices: &[GuestSlice<'_>], offset: u64) -> io::Result<()> {
    let wanted: usize = slices.iter().map(|slice| slice.len()).sum();
    match transfer(file, slices, offset, libc::pwritev)? {
        done if done == wanted as u64 => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// Reads one packet into `slices`, of which there may be [`MAX_PACKET_SLICES`], and tells its length; what does not fit
/// into them and then into `rest` is lost.
pub fn receive(file: &File, slices: &[GuestSlice<'_>], rest: &mut [u8]) -> io::Result<usize> {
    let guards: Vec<_> = slices.iter().map(|slice| slice.ptr_guard_mut()).collect();
    let rest = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
    let vectors: Vec<libc::iovec> = guards.iter().map(to_vector).chain([rest]).collect();
    let packet = loop {
        // SAFETY: readv touches only as many vectors as there are, and the memory these name: parts of guest RAM that
        // `guards` keeps mapped and to which no Rust reference exists, and `rest`, borrowed for us alone.
        let done = unsafe { libc::readv(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) };
        match finished(done) {
            Some(result) => break result?,
            None => continue,
        }
    };
    let mut left = packet;
    for slice in slices {
        let part = left.min(slice.len());
        slice.bitmap().mark_dirty(0, part);
        left -= part;
    }
    Ok(packet)
}

/// Writes one packet: `head`, then `slices`, of which there may be [`MAX_PACKET_SLICES`]. Tells how much was taken.
pub fn send(file: &File, head: &[u8], slices: &[GuestSlice<'_>]) -> io::Result<usize> {
    let guards: Vec<_> = slices.iter().map(|slice| slice.ptr_guard_mut()).collect();
    let head = libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() };
    let vectors: Vec<libc::iovec> = [head].into_iter().chain(guards.iter().map(to_vector)).collect();
    loop {
        // SAFETY: writev only reads, and only as many vectors as there are and the memory these name: `head`, borrowed by
        // us, and parts of guest RAM that `guards` keeps mapped.
        let done = unsafe { libc::writev(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) };
        if let Some(result) = finished(done) {
            return result;
        }
    }
}

/// What one call takes beside the part that is no guest memory; of more it makes an error.
pub const MAX_PACKET_SLICES: usize = libc::UIO_MAXIOV as usize - 1;

/// What a call has done; `None` when a signal came first.
fn finished(done: libc::ssize_t) -> Option<io::Result<usize>> {
    match usize::try_from(done) {
        Ok(done) => Some(Ok(done)),
        Err(_) => {
            let error = io::Error::last_os_error();
            (error.kind() != io::ErrorKind::Interrupted).then_some(Err(error))
        }
    }
}

/// Fills the front of `slices` with what there is to read now; 0 at the end of the stream. One call, at most `UIO_MAXIOV`
/// slices.
pub fn read(stream: &impl AsRawFd, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
    let result = once(stream, slices, libc::readv);
    for slice in slices {
        // The kernel's writes pass by the bitmap.
        slice.bitmap().mark_dirty(0, slice.len());
    }
    result
}

/// Writes the front of `slices`, as far as it is taken now. One call, at most `UIO_MAXIOV` slices. A reader that hung up is
/// an error, for SIGPIPE is ignored.
pub fn write(stream: &impl AsRawFd, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
    once(stream, slices, libc::writev)
}

type CallOnce = unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int) -> libc::ssize_t;

fn once(stream: &impl AsRawFd, slices: &[GuestSlice<'_>], call: CallOnce) -> io::Result<usize> {
    // The guards keep the memory mapped; they live until the call has returned.
    let guards: Vec<_> = slices.iter().map(|slice| slice.ptr_guard_mut()).collect();
    let vectors: Vec<libc::iovec> = guards.iter().map(to_vector).collect();
    let count = vectors.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
    // SAFETY: `call` is readv or writev. They touch only the first `count` vectors, which `vectors` holds, and the memory
    // these name: parts of guest RAM that `guards` keeps mapped for their whole length, and to which no Rust reference
    // exists, since a volatile slice gives none.
    let done = unsafe { call(stream.as_raw_fd(), vectors.as_ptr(), count) };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

fn to_vector(guard: &vm_memory::volatile_memory::PtrGuardMut) -> libc::iovec {
    libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }
}

type Call = unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off_t) -> libc::ssize_t;

/// Goes on until all is done or a call does nothing, and tells how many bytes are.
fn transfer(file: &File, slices: &[GuestSlice<'_>], mut offset: u64, call: Call) -> io::Result<u64> {
    let start = offset;
    // The guards keep the memory mapped; they live until the last call has returned.
    let guards: Vec<_> = slices.iter().map(|slice| slice.ptr_guard_mut()).collect();
    let mut vectors: Vec<libc::iovec> = guards.iter().map(to_vector).collect();
    let mut left = vectors.as_mut_slice();
    loop {
        left = skip_empty(left);
        if left.is_empty() {
            return Ok(offset - start);
        }
        let count = left.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
        let position = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: `call` is preadv or pwritev. They touch only the first `count` vectors, which `left` holds, and the
        // memory these name: parts of guest RAM that `guards` keeps mapped for their whole length, and to which no Rust
        // reference exists, since a volatile slice gives none. `advance` moves a vector only within its own part.
        let done = unsafe { call(file.as_raw_fd(), left.as_ptr(), count, position) };
        match finished(done) {
            Some(Ok(0)) => return Ok(offset - start),
            Some(Ok(done)) => {
                offset += done as u64;
                left = advance(left, done);
            }
            Some(Err(error)) => return Err(error),
            None => {}
        }
    }
}

/// `slices` as the kernel takes them. They are addresses and keep nothing mapped.
pub(super) fn vectors(slices: &[GuestSlice<'_>]) -> Vec<libc::iovec> {
    slices.iter().map(|slice| to_vector(&slice.ptr_guard_mut())).collect()
}

/// How many vectors at the front are empty.
pub(super) fn empty(vectors: &[libc::iovec]) -> usize {
    vectors.iter().take_while(|vector| vector.iov_len == 0).count()
}

fn skip_empty(vectors: &mut [libc::iovec]) -> &mut [libc::iovec] {
    let empty = empty(vectors);
    vectors.get_mut(empty..).unwrap_or_default()
}

/// Takes the first `done` bytes off the vectors.
pub(super) fn advance(vectors: &mut [libc::iovec], mut done: usize) -> &mut [libc::iovec] {
    for vector in vectors.iter_mut() {
        let step = done.min(vector.iov_len);
        vector.iov_base = vector.iov_base.wrapping_byte_add(step);
        vector.iov_len -= step;
        done -= step;
        if done == 0 {
            break;
        }
    }
    skip_empty(vectors)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

    use super::*;
    use crate::memory::GuestRam;

    fn slices<'a>(ram: &'a GuestRam, parts: &[(u64, usize)]) -> Vec<GuestSlice<'a>> {
        let slice = |&(address, len)| ram.get_slices(GuestAddress(address), len, Permissions::ReadWrite);
        parts.iter().flat_map(|part| slice(part).unwrap()).map(Result::unwrap).collect()
    }

    #[test]
    fn more_slices_than_one_call_takes_are_all_written_and_read_back_in_order() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let pattern: Vec<u8> = (0..9000u32).map(|i| (i % 251) as u8).collect();
        ram.write_slice(&pattern, GuestAddress(0)).unwrap();
        let parts: Vec<(u64, usize)> = (0..3000).map(|i| (3 * i, 3)).collect();
        let file = tempfile::tempfile().unwrap();
        write_at(&file, &slices(&ram, &parts), 100).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 9100);

        let back: Vec<(u64, usize)> = (0..3000).map(|i| (0x10000 + 3 * i, 3)).collect();
        read_at(&file, &slices(&ram, &back), 100).unwrap();
        let mut found = vec![0; 9000];
        ram.read_slice(&mut found, GuestAddress(0x10000)).unwrap();
        assert_eq!(found, pattern);
    }

    #[test]
    fn nothing_to_transfer_is_done_without_the_file() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let file = tempfile::tempfile().unwrap();
        read_at(&file, &slices(&ram, &[]), u64::MAX).unwrap();
        assert_eq!(
            read_at(&file, &slices(&ram, &[(0, 1)]), 0).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
        assert!(read_at(&file, &slices(&ram, &[(0, 1)]), u64::MAX).is_err());
    }

    #[test]
    fn vectors_advance_across_their_borders() {
        let mut bytes = [0u8; 10];
        let base: *mut libc::c_void = bytes.as_mut_ptr().cast();
        let vector = |at: usize, len| libc::iovec { iov_base: base.wrapping_byte_add(at), iov_len: len };
        for (done, rest) in [
            (0, vec![(0, 4), (4, 0), (4, 6)]),
            (3, vec![(3, 1), (4, 0), (4, 6)]),
            (4, vec![(4, 6)]),
            (9, vec![(9, 1)]),
            (10, vec![]),
        ] {
            let mut vectors = [vector(0, 4), vector(4, 0), vector(4, 6)];
            let left: Vec<(usize, usize)> = advance(&mut vectors, done)
                .iter()
                .map(|v| (v.iov_base as usize - base as usize, v.iov_len))
                .collect();
            assert_eq!(left, rest, "after {done} bytes");
        }
    }
}
