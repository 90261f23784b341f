//! Disk images: copied and received without writing their holes.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use rustix::fs::ioctl_ficlone;
use rustix::io::Errno;

/// What is looked at for zeros at a time, in bytes: a block of most file systems.
const BLOCK: usize = 4096;
/// What is read of an upload at a time, in bytes.
const PIECE: usize = 256 << 10;

/// Makes `to`, which is empty, the same as `from`: by sharing its blocks where the file system can, else by copying what is
/// no hole.
///
/// # Errors
/// Those of the file system; `to` may have a part.
pub fn file(from: &mut File, to: &mut File) -> io::Result<()> {
    if ioctl_ficlone(&*to, &*from).is_ok() {
        return Ok(());
    }
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut at = 0;
    while let Some((start, end)) = next_data(from, at, length)? {
        from.seek(SeekFrom::Start(start))?;
        to.seek(SeekFrom::Start(start))?;
        // In the kernel, by copy_file_range(2).
        let copied = io::copy(&mut from.take(end - start), to)?;
        if copied != end - start {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the image became shorter meanwhile"));
        }
        at = end;
    }
    Ok(())
}

/// The first piece at or behind `at` that is no hole.
fn next_data(file: &File, at: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    use rustix::fs::{SeekFrom, seek};
    match seek(file, SeekFrom::Data(at)) {
        Ok(start) => Ok(Some((start, seek(file, SeekFrom::Hole(start))?))),
        Err(Errno::NXIO) => Ok(None),
        // A file system that knows no holes.
        Err(Errno::INVAL) => Ok((at < length).then_some((at, length))),
        Err(error) => Err(error.into()),
    }
}

/// Writes all that comes into `to`, which is empty; blocks of zeros become holes. Returns how many bytes came.
///
/// # Errors
/// Those of both sides.
pub fn received(from: &mut dyn Read, to: &File) -> io::Result<u64> {
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    loop {
        let count = fill(from, &mut piece)?;
        let Some(whole) = piece.get(..count).filter(|whole| !whole.is_empty()) else { break };
        for (offset, block) in (at..).step_by(BLOCK).zip(whole.chunks(BLOCK)) {
            if block.iter().any(|byte| *byte != 0) {
                to.write_all_at(block, offset)?;
            }
        }
        at += count as u64;
    }
    to.set_len(at)?;
    Ok(at)
}

/// As much as there is until the buffer is full.
fn fill(from: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match from.read(rest) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const MIB: usize = 1 << 20;

    /// Data at the start, in the middle and in the last byte, holes between.
    fn content() -> Vec<u8> {
        let mut content = vec![0; 8 * MIB + 1];
        content[..5000].fill(7);
        content[3 * MIB + 17..3 * MIB + 9000].fill(8);
        content[8 * MIB] = 9;
        content
    }

    fn assert_same_and_sparse(file: &mut File) {
        let mut read = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut read).unwrap();
        assert!(read == content());
        let used = file.metadata().unwrap().blocks() * 512;
        assert!(used < MIB as u64, "{used} bytes are used");
    }

    #[test]
    fn what_comes_is_written_without_its_zeros_and_copied_without_its_holes() {
        let mut first = tempfile::tempfile().unwrap();
        assert_eq!(received(&mut &content()[..], &first).unwrap(), content().len() as u64);
        assert_same_and_sparse(&mut first);
        let mut second = tempfile::tempfile().unwrap();
        file(&mut first, &mut second).unwrap();
        assert_same_and_sparse(&mut second);
    }

    #[test]
    fn nothing_is_a_file_too() {
        let (mut first, mut second) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        assert_eq!(received(&mut io::empty(), &first).unwrap(), 0);
        file(&mut first, &mut second).unwrap();
        assert_eq!(second.metadata().unwrap().len(), 0);
    }
}
