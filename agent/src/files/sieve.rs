//! An archive of somebody who is not trusted, on its way to who unpacks it: what would be kept in memory there, in any amount
//! that the archive says, does not pass.

use std::io::{self, Read};

use super::entries::{Entries, Piece};

/// The longest name, or target of a link, that has an entry of its own: the longest path is half as long.
const MAX_NAME: u64 = 8192;

/// Kinds of GNU's tar: the name of the next entry, the target of the next link, and a file with holes. And POSIX's further
/// properties of the next entry.
const LONG_NAME: u8 = b'L';
const LONG_LINK: u8 = b'K';
const SPARSE: u8 = b'S';
const PROPERTIES: u8 = b'x';

pub struct Sieve<R> {
    from: R,
    /// Without them everything passes.
    entries: Option<Entries>,
}

impl<R: Read> Sieve<R> {
    pub fn new(from: R) -> Sieve<R> {
        Sieve { from, entries: Some(Entries::default()) }
    }

    /// For an archive of somebody who could do worse than that.
    pub fn open(from: R) -> Sieve<R> {
        Sieve { from, entries: None }
    }
}

impl<R: Read> Read for Sieve<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.from.read(buffer)?;
        let mut bytes = buffer.get(..count).unwrap_or_default();
        while let Some(piece) = self.entries.as_mut().and_then(|entries| entries.next(&mut bytes)) {
            if let Piece::Entry { kind, size } = piece {
                check(kind, size).map_err(io::Error::other)?;
            }
        }
        Ok(count)
    }
}

fn check(kind: u8, size: u64) -> Result<(), String> {
    match kind {
        LONG_NAME | LONG_LINK if size > MAX_NAME => {
            Err(format!("the archive has a name of {size} bytes; {MAX_NAME} are the most"))
        }
        SPARSE | PROPERTIES => Err(format!(
            "the archive has an entry of the kind {:?}, which an agent does not send",
            kind as char
        )),
        _ => Ok(()),
    }
}
