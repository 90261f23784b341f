//! An [`Operation`] on its way through a kernel that does a part of it at a time: which call comes next, and what the last
//! one's result means.
//!
//! Calls nothing itself and knows no rings: pure but for the buffers it keeps, which are guest memory.

use std::io;
use std::sync::atomic::AtomicU8;

use libc::iovec;
use vm_memory::bitmap::Bitmap;

use crate::backend::disk::{Extent, Operation};
use crate::backend::vectored;
use crate::memory::GuestRam;

/// How often in a row a call that the kernel could not begin (EINTR, EAGAIN) is begun again.
const MAX_RETRIES: u8 = 100;

/// What zeroes are written from, as often as a range is long. Never written to; only what can be is kept out of the
/// program's file.
static ZEROES: Zeroes = Zeroes([const { AtomicU8::new(0) }; ZEROES_BYTES]);
const ZEROES_BYTES: usize = 64 << 10;
/// What their address is a multiple of, for files that are open for direct I/O.
pub const ZEROES_ALIGNMENT: usize = align_of::<Zeroes>();

#[repr(align(4096))]
struct Zeroes([AtomicU8; ZEROES_BYTES]);

/// An operation that has begun.
pub struct Job {
    operation: Operation,
    /// Keeps mapped what `vectors` name, even if the guest loses this memory meanwhile.
    ram: GuestRam,
    /// A write is on stable storage when it is done.
    durable: bool,
    stage: Stage,
    vectors: Vec<iovec>,
    /// The vectors before this one are done.
    first: usize,
    offset: u64,
    retries: u8,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Transfer,
    /// The range with this index.
    GiveBack(usize),
    Keep,
    Flush,
}

/// What the kernel is to do next.
pub enum Call<'a> {
    Read { vectors: &'a [iovec], offset: u64 },
    Write { vectors: &'a [iovec], offset: u64 },
    Allocate { mode: i32, range: Extent },
    Sync,
}

impl Job {
    /// Begins `operation` on buffers in `ram`. With `durable`, what changes the disk ends with a flush.
    pub fn new(ram: &GuestRam, operation: Operation, durable: bool) -> io::Result<Job> {
        let mut job = Job {
            stage: Stage::Transfer,
            durable: durable && !matches!(operation, Operation::Read { .. } | Operation::Flush),
            ram: ram.clone(),
            operation,
            vectors: Vec::new(),
            first: 0,
            offset: 0,
            retries: 0,
        };
        match &job.operation {
            Operation::Read { offset, buffers } | Operation::Write { offset, buffers } => {
                job.offset = *offset;
                job.vectors = vectored::vectors(&buffers.slices(&job.ram).map_err(io::Error::other)?);
                job.first = vectored::empty(&job.vectors);
            }
            Operation::Flush => job.stage = Stage::Flush,
            Operation::Discard(_) | Operation::WriteZeroes { unmap: true, .. } => {
                job.stage = Stage::GiveBack(0);
            }
            Operation::WriteZeroes { unmap: false, .. } => job.stage = Stage::Keep,
        }
        Ok(job)
    }

    /// What is to be done now. The vectors stay where they are, and the memory behind them stays mapped, as long as the
    /// job lives and [`Job::take`] is not called.
    pub fn call(&self) -> Call<'_> {
        let offset = self.offset;
        match (self.stage, &self.operation) {
            (Stage::Transfer, Operation::Read { .. }) => Call::Read { vectors: self.left(), offset },
            (Stage::Transfer, _) => Call::Write { vectors: self.left(), offset },
            (Stage::Flush, _) => Call::Sync,
            (Stage::Keep, _) => Call::Allocate {
                mode: libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
                range: self.range(0),
            },
            (Stage::GiveBack(index), _) => Call::Allocate {
                mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                range: self.range(index),
            },
        }
    }

    /// Takes in the result of the last call, as the kernel gives it: a number of bytes or a negative errno. `None` when
    /// there is another call to make, otherwise how it ended; after an error, what of it was done is unknown.
    pub fn take(&mut self, result: i32) -> Option<io::Result<()>> {
        if matches!(-result, libc::EINTR | libc::EAGAIN) && self.retries < MAX_RETRIES {
            self.retries += 1;
            return None;
        }
        self.retries = 0;
        match self.step(result) {
            Ok(true) => Some(Ok(())),
            Ok(false) => None,
            Err(error) => Some(Err(error)),
        }
    }

    /// True when all is done.
    fn step(&mut self, result: i32) -> io::Result<bool> {
        match (self.stage, &self.operation) {
            (Stage::Transfer, _) => {
                self.transferred(bytes(result)?)?;
                Ok(self.left().is_empty() && self.is_last())
            }
            (Stage::Flush, _) => bytes(result).map(|_| true),
            (Stage::GiveBack(index), Operation::Discard(ranges)) => {
                // A hint: what cannot be given back is kept.
                let is_last = index + 1 >= ranges.len();
                allocated(result)?;
                self.stage = Stage::GiveBack(index + 1);
                Ok(is_last && self.is_last())
            }
            (stage, _) => {
                if allocated(result)? {
                    return Ok(self.is_last());
                }
                match stage {
                    Stage::GiveBack(_) => self.stage = Stage::Keep,
                    _ => self.write_zero_bytes(),
                }
                Ok(false)
            }
        }
    }

    /// Goes over to the flush, if one is due.
    fn is_last(&mut self) -> bool {
        if self.durable {
            self.stage = Stage::Flush;
        }
        !self.durable
    }

    fn transferred(&mut self, bytes: usize) -> io::Result<()> {
        let is_read = matches!(self.operation, Operation::Read { .. });
        if let Operation::Read { buffers, .. } = &self.operation {
            // The kernel's writes pass by the bitmap.
            for slice in buffers.slices(&self.ram).map_err(io::Error::other)? {
                slice.bitmap().mark_dirty(0, slice.len());
            }
        }
        let left = self.vectors.get_mut(self.first..).unwrap_or_default();
        if bytes == 0 && !left.is_empty() {
            let kind = if is_read { io::ErrorKind::UnexpectedEof } else { io::ErrorKind::WriteZero };
            return Err(kind.into());
        }
        let rest = vectored::advance(left, bytes).len();
        self.first = self.vectors.len() - rest;
        self.offset += bytes as u64;
        Ok(())
    }

    /// Where the host has no better way.
    fn write_zero_bytes(&mut self) {
        let range = self.range(0);
        let zeroes = ZEROES.0.as_ptr().cast_mut().cast();
        let piece =
            |at: u64| iovec { iov_base: zeroes, iov_len: (range.len - at).min(ZEROES_BYTES as u64) as usize };
        self.vectors = (0..range.len).step_by(ZEROES_BYTES).map(piece).collect();
        (self.stage, self.first, self.offset) = (Stage::Transfer, 0, range.offset);
    }

    /// As many as one call takes.
    fn left(&self) -> &[iovec] {
        let left = self.vectors.get(self.first..).unwrap_or_default();
        left.get(..libc::UIO_MAXIOV as usize).unwrap_or(left)
    }

    /// One of no length where there is none, as in a discard of nothing: the kernel refuses it, which is no harm.
    fn range(&self, index: usize) -> Extent {
        let none = Extent { offset: 0, len: 0 };
        match &self.operation {
            Operation::WriteZeroes { range, .. } => *range,
            Operation::Discard(ranges) => ranges.get(index).copied().unwrap_or(none),
            _ => none,
        }
    }
}

fn bytes(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

/// False when what is behind the file cannot do that.
fn allocated(result: i32) -> io::Result<bool> {
    match -result {
        // A block device whose blocks are larger than the range's alignment says EINVAL.
        libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL => Ok(false),
        _ => bytes(result).map(|_| true),
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::virtio::queue::Segments;
    use crate::virtio::testing::segments;

    const RANGE: Extent = Extent { offset: 512, len: 5 << 16 };

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap()
    }

    fn job(operation: Operation, durable: bool) -> Job {
        Job::new(&ram(), operation, durable).unwrap()
    }

    /// What is called next, in short.
    fn next(job: &Job) -> String {
        let bytes = |vectors: &[iovec]| vectors.iter().map(|vector| vector.iov_len).sum::<usize>();
        match job.call() {
            Call::Read { vectors, offset } => format!("read {} at {offset}", bytes(vectors)),
            Call::Write { vectors, offset } => format!("write {} at {offset}", bytes(vectors)),
            Call::Allocate { mode, range } if mode & libc::FALLOC_FL_PUNCH_HOLE != 0 => {
                format!("punch {} at {}", range.len, range.offset)
            }
            Call::Allocate { range, .. } => format!("zero {} at {}", range.len, range.offset),
            Call::Sync => "sync".into(),
        }
    }

    /// Answers each call as told, and says what the calls were and how it ended.
    fn run(mut job: Job, answers: &[i32]) -> (Vec<String>, Option<Result<(), io::ErrorKind>>) {
        let mut calls = Vec::new();
        for &answer in answers {
            calls.push(next(&job));
            if let Some(end) = job.take(answer) {
                assert_eq!(calls.len(), answers.len(), "{calls:?}");
                return (calls, Some(end.map_err(|error| error.kind())));
            }
        }
        (calls, None)
    }

    fn buffers() -> Segments {
        segments(&[(0x1000, 512), (0x3000, 512)])
    }

    #[test]
    fn a_transfer_that_comes_in_parts_goes_on_where_it_stopped() {
        let read = || job(Operation::Read { offset: 100, buffers: buffers() }, true);
        let calls = ["read 1024 at 100", "read 724 at 400", "read 512 at 612", "read 512 at 612"];
        let (seen, end) = run(read(), &[300, 212, -libc::EINTR, 512]);
        assert_eq!((seen, end), (calls.map(String::from).to_vec(), Some(Ok(()))));
        let (_, end) = run(read(), &[300, 0]);
        assert_eq!(end, Some(Err(io::ErrorKind::UnexpectedEof)));
        let (_, end) = run(job(Operation::Write { offset: 100, buffers: buffers() }, false), &[0]);
        assert_eq!(end, Some(Err(io::ErrorKind::WriteZero)));
    }

    #[test]
    fn what_the_kernel_never_begins_is_an_error_in_the_end() {
        let mut job = job(Operation::Flush, false);
        for _ in 0..MAX_RETRIES {
            assert!(job.take(-libc::EAGAIN).is_none());
        }
        assert_eq!(job.take(-libc::EAGAIN).unwrap().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn what_changes_the_disk_durably_ends_with_a_flush_and_a_failed_flush_fails_it() {
        let changes = [
            Operation::Write { offset: 0, buffers: buffers() },
            Operation::Discard(vec![RANGE]),
            Operation::WriteZeroes { range: RANGE, unmap: false },
        ];
        for operation in changes {
            let first = if matches!(operation, Operation::Write { .. }) { 1024 } else { 0 };
            let mut job = job(operation, true);
            assert!(job.take(first).is_none());
            assert_eq!(next(&job), "sync");
            assert!(job.take(-libc::EIO).unwrap().is_err());
        }
        assert_eq!(run(job(Operation::Flush, true), &[0]).0, ["sync"]);
    }

    #[test]
    fn ranges_are_discarded_one_by_one_and_one_that_cannot_be_is_kept() {
        let other = Extent { offset: 0, len: 4096 };
        let (calls, end) = run(job(Operation::Discard(vec![RANGE, other]), false), &[-libc::EOPNOTSUPP, 0]);
        assert_eq!((calls.len(), calls[1].as_str(), end), (2, "punch 4096 at 0", Some(Ok(()))));
        assert_eq!(run(job(Operation::Discard(vec![]), false), &[-libc::EINVAL]).1, Some(Ok(())));
        let (_, end) = run(job(Operation::Discard(vec![RANGE, other]), false), &[-libc::ENOSPC]);
        assert_eq!(end, Some(Err(io::ErrorKind::StorageFull)));
    }

    #[test]
    fn zeroes_are_made_in_the_best_way_that_the_host_has() {
        let zeroes = |unmap| job(Operation::WriteZeroes { range: RANGE, unmap }, false);
        let no = -libc::EOPNOTSUPP;
        let all = ["punch 327680 at 512", "zero 327680 at 512", "write 327680 at 512", "write 1 at 328191"];
        assert_eq!(run(zeroes(true), &[no, no, 327_679, 1]), (all.map(String::from).to_vec(), Some(Ok(()))));
        assert_eq!(run(zeroes(false), &[no, 327_680]).0, &all[1..3]);
        assert_eq!(run(zeroes(true), &[0]).0, &all[..1]);
    }
}
