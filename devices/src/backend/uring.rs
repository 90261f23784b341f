//! The asynchronous engine: jobs on one file go to the kernel by io_uring, many with one call, and come back in any order.
//!
//! The gate for unsafe code of the ring: nothing else in here. The kernel reads and writes the memory of a job until it is
//! done, so a job lives in here until then, and nothing that a guest or a client does makes it go earlier. The ring can do
//! no more than a disk needs, on no other file: the kernel holds it to that, as filters of system calls do not see what
//! goes through a ring.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::register::Restriction;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::backend::job::{Call, Job};

/// Most jobs that are under way at a time: as many as a queue has descriptors.
pub const MAX_JOBS: usize = 256;

/// The only file there is.
const FILE: Fixed = Fixed(0);
const IOSQE_FIXED_FILE: u8 = 1;
const IORING_REGISTER_FILES_UPDATE: u8 = 6;

/// A ring and the jobs in it, each with a tag that says what it was for.
pub struct Ring<T> {
    ring: IoUring,
    /// Signalled when a job may be done.
    done: EventFd,
    jobs: Vec<Option<(Job, T)>>,
    free: Vec<usize>,
}

// SAFETY: what is not Send in here are the vectors of jobs. They are addresses in guest RAM, which each job keeps mapped and
// which belongs to no thread, and of a static.
unsafe impl<T: Send> Send for Ring<T> {}

impl<T> Ring<T> {
    /// A ring for this file, of which it takes a descriptor of its own. Fails where the kernel has no io_uring, or not for
    /// us.
    pub fn new(file: &File) -> io::Result<Ring<T>> {
        let ring = IoUring::builder().setup_r_disabled().build(MAX_JOBS as u32)?;
        let done = EventFd::new(EFD_NONBLOCK)?;
        block(file)?;
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        submitter.register_eventfd(done.as_raw_fd())?;
        submitter.register_restrictions(&mut restrictions())?;
        submitter.register_enable_rings()?;
        let jobs = std::iter::repeat_with(|| None).take(MAX_JOBS).collect();
        Ok(Ring { ring, done, jobs, free: (0..MAX_JOBS).rev().collect() })
    }

    /// Readable when [`Ring::turn`] has something to give.
    pub fn fd(&self) -> RawFd {
        self.done.as_raw_fd()
    }

    /// No further job can be put in before another is done.
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Nothing is under way.
    pub fn is_empty(&self) -> bool {
        self.free.len() == MAX_JOBS
    }

    /// Puts a job in; the next [`Ring::turn`] sends it off. Fails when the ring is full.
    pub fn put(&mut self, job: Job, tag: T) -> io::Result<()> {
        let place = self.free.pop().ok_or(io::ErrorKind::ResourceBusy)?;
        let slot = self.jobs.get_mut(place).ok_or(io::ErrorKind::NotFound)?;
        let entry = entry(place, &slot.insert((job, tag)).0.call());
        // SAFETY: the entry's vectors lie in the heap of the job, which stays in `jobs`, untouched, until the kernel has
        // given its completion back (`next`), and the job keeps mapped what they name.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.map_err(|_| {
            // There are as many entries as places, and each job has one.
            *slot = None;
            self.free.push(place);
            io::ErrorKind::ResourceBusy.into()
        })
    }

    /// Sends off what was put in and takes back what is done, without waiting: the tags, and how each job ended.
    pub fn turn(&mut self) -> Vec<(T, io::Result<()>)> {
        self.send();
        // First the signal, then what it stands for: what comes in between signals again.
        let _ = self.done.read();
        let ended = std::iter::from_fn(|| self.next()).collect();
        self.send();
        ended
    }

    /// Waits until nothing is under way. On an error, which only a kernel without this call should give, something is,
    /// and nothing more can be done with this ring.
    pub fn drain(&mut self) -> io::Result<Vec<(T, io::Result<()>)>> {
        let mut ended = Vec::new();
        // What was put in and not sent off is under way too.
        self.submit()?;
        while !self.is_empty() {
            match self.ring.submit_and_wait(1) {
                Err(error) if !is_passing(&error) => return Err(error),
                _ => ended.extend(std::iter::from_fn(|| self.next())),
            }
        }
        let _ = self.done.read();
        Ok(ended)
    }

    /// Another file from now on. Only while nothing is under way. On an error the old one stays.
    pub fn replace(&mut self, file: &File) -> io::Result<()> {
        block(file)?;
        self.ring.submitter().register_files_update(FILE.0, &[file.as_raw_fd()]).map(drop)
    }

    /// The next job that is done; those that go on are put in again.
    fn next(&mut self) -> Option<(T, io::Result<()>)> {
        loop {
            let completion = self.ring.completion().next()?;
            let place = completion.user_data() as usize;
            let Some((job, _)) = self.jobs.get_mut(place).and_then(Option::as_mut) else { continue };
            let end = match job.take(completion.result()) {
                None => {
                    let entry = entry(place, &job.call());
                    // SAFETY: as in `put`. The last call of this job is completed.
                    match unsafe { self.ring.submission().push(&entry) } {
                        Ok(()) => continue,
                        Err(_) => Err(io::ErrorKind::ResourceBusy.into()),
                    }
                }
                Some(end) => end,
            };
            let (_, tag) = self.jobs.get_mut(place).and_then(Option::take)?;
            self.free.push(place);
            return Some((tag, end));
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        match self.ring.submit() {
            Err(error) if !is_passing(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Has the kernel begin with what was put in. Errors are tried again by the next [`Ring::turn`].
    pub fn send(&mut self) {
        if self.ring.submission().is_empty() {
            return;
        }
        if let Err(error) = self.ring.submit() {
            log::error!("io_uring does not take requests, which are tried again: {error}");
            // Fails only when the counter is full, and then it is ready anyway.
            let _ = self.done.write(1);
        }
    }
}

impl<T> Drop for Ring<T> {
    /// The memory of a job is the kernel's until it is done.
    fn drop(&mut self) {
        if let Err(error) = self.drain() {
            log::error!("io_uring: what is under way is left to itself: {error}");
            std::mem::forget(std::mem::take(&mut self.jobs));
        }
    }
}

/// The kernel was disturbed, is short of memory, or has completions that were not taken yet.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

/// What the ring may be used for, by whoever.
fn restrictions() -> [Restriction; 7] {
    [
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Fallocate::CODE),
        Restriction::sqe_flags_allowed(IOSQE_FIXED_FILE),
        Restriction::sqe_flags_required(IOSQE_FIXED_FILE),
        Restriction::register_op(IORING_REGISTER_FILES_UPDATE),
    ]
}

fn entry(place: usize, call: &Call) -> squeue::Entry {
    let entry = match *call {
        Call::Read { vectors, offset } => {
            opcode::Readv::new(FILE, vectors.as_ptr(), vectors.len() as u32).offset(offset).build()
        }
        Call::Write { vectors, offset } => {
            opcode::Writev::new(FILE, vectors.as_ptr(), vectors.len() as u32).offset(offset).build()
        }
        Call::Allocate { mode, range } => {
            opcode::Fallocate::new(FILE, range.len).offset(range.offset).mode(mode).build()
        }
        Call::Sync => opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
    };
    entry.user_data(place as u64)
}

/// With O_NONBLOCK, which files are opened with lest one be a pipe, the kernel would answer EAGAIN where it has to wait for
/// the disk.
fn block(file: &File) -> io::Result<()> {
    let check = |result| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
    // SAFETY: these commands take no pointers, and `file` keeps its descriptor open.
    let flags = check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) })?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) }).map(drop)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::backend::disk::{Extent, Operation};
    use crate::memory::GuestRam;
    use crate::virtio::testing::segments;

    const SECTOR: u32 = 512;

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    fn read(ram: &GuestRam, sector: u64) -> Job {
        let buffers = segments(&[(sector * 512, SECTOR)]);
        Job::new(ram, Operation::Read { offset: sector * 512, buffers }, false).unwrap()
    }

    fn file(sectors: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..sectors * 512).map(|at| (at / 512) as u8).collect();
        file.write_all_at(&data, 0).unwrap();
        file
    }

    #[test]
    fn as_many_jobs_as_there_is_room_for_are_done_each_once_and_signalled() {
        let (ram, file) = (ram(), file(300));
        let mut ring = Ring::new(&file).unwrap();
        for tag in 0..MAX_JOBS as u64 {
            assert!(!ring.is_full());
            ring.put(read(&ram, tag), tag).unwrap();
        }
        assert!(ring.is_full());
        assert!(ring.put(read(&ram, 0), 999).is_err());
        let mut ended = ring.turn();
        ended.extend(ring.drain().unwrap());
        assert!(ended.iter().all(|(_, result)| result.is_ok()));
        let mut tags: Vec<u64> = ended.into_iter().map(|(tag, _)| tag).collect();
        tags.sort();
        assert_eq!(tags, (0..MAX_JOBS as u64).collect::<Vec<_>>());
        for sector in 0..MAX_JOBS {
            assert_eq!(ram.read_obj::<u8>(GuestAddress(512 * sector as u64 + 511)).unwrap(), sector as u8);
        }
        assert!(ring.done.read().is_err(), "what was taken in signals no more");
        // Nothing waits for this flush, so it must signal by itself.
        ring.put(Job::new(&ram, Operation::Flush, false).unwrap(), 0).unwrap();
        while ring.turn().is_empty() {
            ring.ring.submit_and_wait(1).unwrap();
            // A moment after what it stands for.
            while ring.done.read().is_err() {
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn what_the_host_refuses_is_an_error_of_that_job_alone() {
        let (ram, path) = (ram(), tempfile::NamedTempFile::new().unwrap());
        path.as_file().write_all_at(&[7; 1024], 0).unwrap();
        let mut ring = Ring::new(&File::open(path.path()).unwrap()).unwrap();
        let write = Operation::Write { offset: 0, buffers: segments(&[(0, SECTOR)]) };
        ring.put(Job::new(&ram, write, false).unwrap(), "write").unwrap();
        let discard = Operation::Discard(vec![Extent { offset: 0, len: 512 }]);
        ring.put(Job::new(&ram, discard, false).unwrap(), "discard").unwrap();
        ring.put(read(&ram, 1), "read").unwrap();
        ring.put(read(&ram, 2), "beyond the end").unwrap();
        let ended = ring.drain().unwrap();
        let good: Vec<_> = ended.iter().filter(|(_, end)| end.is_ok()).map(|(tag, _)| *tag).collect();
        assert_eq!((ended.len(), good), (4, vec!["read"]));
    }

    #[test]
    fn a_ring_does_what_a_disk_needs_and_nothing_else() {
        let mut ring = Ring::<()>::new(&file(1)).unwrap();
        let path = c"/dev/null";
        let open = opcode::OpenAt::new(io_uring::types::Fd(libc::AT_FDCWD), path.as_ptr()).build();
        let elsewhere = opcode::Fsync::new(io_uring::types::Fd(ring.fd())).build();
        for entry in [open, elsewhere] {
            // SAFETY: `path` lives as long as the program.
            unsafe { ring.ring.submission().push(&entry) }.unwrap();
            ring.ring.submit_and_wait(1).unwrap();
            assert_eq!(ring.ring.completion().next().unwrap().result(), -libc::EACCES);
        }
        assert!(ring.ring.submitter().unregister_files().is_err());
    }

    #[test]
    fn another_file_is_read_after_it_was_replaced_even_if_the_first_is_closed() {
        let ram = ram();
        let mut ring = Ring::new(&file(10)).unwrap();
        ring.put(read(&ram, 5), ()).unwrap();
        ring.drain().unwrap();
        assert_eq!(ram.read_obj::<u8>(GuestAddress(5 * 512)).unwrap(), 5);
        let other = tempfile::tempfile().unwrap();
        other.write_all_at(&[0x55; 8192], 0).unwrap();
        ring.replace(&other).unwrap();
        drop(other);
        ring.put(read(&ram, 5), ()).unwrap();
        assert!(ring.drain().unwrap().iter().all(|(_, end)| end.is_ok()));
        assert_eq!(ram.read_obj::<u8>(GuestAddress(5 * 512)).unwrap(), 0x55);
    }

    #[test]
    fn a_file_opened_without_waiting_is_waited_for() {
        use std::os::unix::fs::OpenOptionsExt;
        let path = tempfile::NamedTempFile::new().unwrap();
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path.path()).unwrap();
        let _ring = Ring::<()>::new(&file).unwrap();
        // SAFETY: it takes no pointers.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        assert_eq!(flags & libc::O_NONBLOCK, 0);
    }
}
