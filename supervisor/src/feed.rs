//! What a guest or its VMM says: from a pipe into a file of bounded length, and to whoever listens.
//!
//! The pipe is a named one that the VMM has open for reading and writing, so that it loses nothing but its listeners when the
//! daemon goes. Nobody waits here: what a listener does not take in time it misses, and is told so.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The longest log, in bytes; then it is moved aside, and the one before that removed.
pub const MAX_LOG: u64 = 1 << 20;
/// What a listener may leave untaken, in bytes.
pub const MAX_UNTAKEN: usize = 256 << 10;
/// Listeners of one feed at a time.
pub const MAX_LISTENERS: usize = 16;
/// What is read of a pipe before others have their turn, in bytes: what a pipe holds.
const MAX_TURN: usize = 64 << 10;

/// Turns of a pipe that is let go: the largest that a user may make (/proc/sys/fs/pipe-max-size).
const MAX_LAST_TURNS: usize = (1 << 20) / MAX_TURN;

/// A guest has two: its console, and its VMM's log.
#[derive(Debug)]
pub struct Feed {
    path: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    pipe: Option<File>,
    log: Option<(File, u64)>,
    listeners: Vec<Arc<Listener>>,
    /// The feed has ended for good: the guest is removed.
    is_over: bool,
}

/// Somebody who listens to a feed.
#[derive(Debug, Default)]
pub struct Listener {
    untaken: Mutex<Untaken>,
    comes: Condvar,
}

#[derive(Debug, Default)]
struct Untaken {
    bytes: VecDeque<u8>,
    missed: usize,
    is_over: bool,
}

/// What a listener gets.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard {
    Bytes(Vec<u8>),
    /// Nothing came in this time.
    Nothing,
    /// Nothing will come any more.
    Over,
}

impl Feed {
    /// A feed that is kept in this file, to which it adds.
    pub fn new(path: PathBuf) -> Feed {
        Feed { path, inner: Mutex::default() }
    }

    /// Reads from here from now on.
    pub fn connect(&self, pipe: File) {
        self.lock().pipe = Some(pipe);
    }

    /// Reads what is left, and lets go of the pipe. Whoever still writes is not heard to the end.
    pub fn disconnect(&self) {
        let _ = (0..MAX_LAST_TURNS).try_for_each(|_| self.drain().then_some(()));
        self.lock().pipe = None;
    }

    /// Takes what is in the pipe, up to a turn. Whether there may be more.
    pub fn drain(&self) -> bool {
        let mut inner = self.lock();
        let mut buffer = vec![0; MAX_TURN];
        let outcome = match &mut inner.pipe {
            Some(pipe) => pipe.read(&mut buffer),
            None => Ok(0),
        };
        // An error is that nothing is there.
        let said = buffer.get(..outcome.unwrap_or(0)).unwrap_or_default();
        if said.is_empty() {
            return false;
        }
        inner.keep(&self.path, said);
        inner.tell(said);
        true
    }

    /// The pipe, for who watches it.
    pub fn with_pipe<T>(&self, look: impl FnOnce(Option<std::os::fd::BorrowedFd>) -> T) -> T {
        look(self.lock().pipe.as_ref().map(AsFd::as_fd))
    }

    /// What is kept: the log before this one, and this one; and a listener for what comes behind it.
    ///
    /// # Errors
    /// Those of the files, and that too many listen.
    pub fn listen(&self) -> io::Result<(Vec<u8>, Arc<Listener>)> {
        let mut inner = self.lock();
        inner.listeners.retain(|listener| Arc::strong_count(listener) > 1);
        if inner.listeners.len() >= MAX_LISTENERS {
            return Err(io::Error::other(format!("{MAX_LISTENERS} listen already")));
        }
        let listener = Arc::new(Listener::default());
        listener.lock().is_over = inner.is_over;
        // Opened with the lock, so that what comes is in one or with the other; read without, as the disk may take its time.
        let kept = open_kept(&self.path)?;
        inner.listeners.push(listener.clone());
        drop(inner);
        Ok((read_kept(kept)?, listener))
    }

    /// The last line that is no blank, at most 1 KiB of it.
    pub fn last_line(&self) -> String {
        let kept = open_kept(&self.path).and_then(read_kept).unwrap_or_default();
        let start = kept.len().saturating_sub(1024);
        let text = String::from_utf8_lossy(kept.get(start..).unwrap_or_default());
        text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default().to_owned()
    }

    /// Nothing will come any more.
    pub fn end(&self) {
        let mut inner = self.lock();
        inner.is_over = true;
        for listener in &inner.listeners {
            listener.lock().is_over = true;
            listener.comes.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// A disk that is full costs lines of a log, and nothing else.
    fn keep(&mut self, path: &Path, said: &[u8]) {
        if self.log.as_ref().is_some_and(|(_, length)| length + said.len() as u64 > MAX_LOG) {
            self.log = None;
            let _ = fs::rename(path, before(path));
        }
        if self.log.is_none() {
            self.log = open(path).ok();
        }
        if let Some((file, length)) = &mut self.log
            && file.write_all(said).is_ok()
        {
            *length += said.len() as u64;
        }
    }

    fn tell(&mut self, said: &[u8]) {
        self.listeners.retain(|listener| Arc::strong_count(listener) > 1);
        for listener in &self.listeners {
            let mut untaken = listener.lock();
            untaken.bytes.extend(said);
            let over = untaken.bytes.len().saturating_sub(MAX_UNTAKEN);
            untaken.bytes.drain(..over);
            untaken.missed += over;
            listener.comes.notify_all();
        }
    }
}

impl Listener {
    /// What has come, or comes within this time.
    pub fn hear(&self, time: Duration) -> Heard {
        let untaken = self.lock();
        let waits = |untaken: &mut Untaken| untaken.bytes.is_empty() && !untaken.is_over;
        let (mut untaken, _) =
            self.comes.wait_timeout_while(untaken, time, waits).unwrap_or_else(PoisonError::into_inner);
        if untaken.bytes.is_empty() {
            return if untaken.is_over { Heard::Over } else { Heard::Nothing };
        }
        let missed = std::mem::take(&mut untaken.missed);
        let mut bytes: Vec<u8> = Vec::new();
        if missed > 0 {
            bytes.extend(
                format!("\r\n[{missed} bytes were missed here: they came faster than they were taken]\r\n")
                    .bytes(),
            );
        }
        bytes.extend(untaken.bytes.drain(..));
        Heard::Bytes(bytes)
    }

    /// Whoever waits in [`hear`](Listener::hear) returns.
    pub fn wake(&self) {
        self.lock().is_over = true;
        self.comes.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Untaken> {
        self.untaken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn before(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

fn open(path: &Path) -> io::Result<(File, u64)> {
    let file = File::options().create(true).append(true).open(path)?;
    let length = file.metadata()?.len();
    Ok((file, length))
}

/// The log before this one, and this one, and how much of each is to be read. A log that somebody else made longer is not read to
/// its end.
fn open_kept(path: &Path) -> io::Result<Vec<(File, u64)>> {
    let mut kept = Vec::new();
    for path in [before(path), path.to_owned()] {
        match File::open(path) {
            Ok(file) => {
                let length = file.metadata()?.len().min(MAX_LOG);
                kept.push((file, length));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(kept)
}

fn read_kept(kept: Vec<(File, u64)>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for (file, length) in kept {
        file.take(length).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A feed, the other end of its pipe, and where it is kept.
    fn feed() -> (tempfile::TempDir, Feed, io::PipeWriter) {
        let place = tempfile::tempdir().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        let feed = Feed::new(place.path().join("console.log"));
        feed.connect(File::from(std::os::fd::OwnedFd::from(reader)));
        (place, feed, writer)
    }

    #[test]
    fn what_is_said_is_kept_and_heard() {
        let (place, feed, mut writer) = feed();
        writer.write_all(b"before\n").unwrap();
        assert!(feed.drain());
        let (kept, listener) = feed.listen().unwrap();
        assert_eq!(kept, b"before\n");
        assert_eq!(listener.hear(Duration::ZERO), Heard::Nothing);
        writer.write_all(b"after\n").unwrap();
        assert!(feed.drain() && !feed.drain());
        assert_eq!(listener.hear(Duration::ZERO), Heard::Bytes(b"after\n".into()));
        assert_eq!(fs::read(place.path().join("console.log")).unwrap(), b"before\nafter\n");
        assert_eq!(feed.last_line(), "after");
        feed.end();
        assert_eq!(listener.hear(Duration::from_secs(60)), Heard::Over);
    }

    #[test]
    fn a_log_has_its_longest_and_the_newest_is_kept() {
        let (place, feed, mut writer) = feed();
        let piece = [b'x'; 32 << 10];
        for _ in 0..3 * MAX_LOG as usize / piece.len() {
            writer.write_all(&piece).unwrap();
            feed.drain();
        }
        writer.write_all(b"the end").unwrap();
        feed.drain();
        let used: u64 =
            fs::read_dir(&place).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
        assert!(used <= 2 * MAX_LOG, "{used}");
        assert!(feed.listen().unwrap().0.ends_with(b"the end"));
    }

    #[test]
    fn who_does_not_listen_makes_nobody_wait_and_misses_the_oldest() {
        let (_place, feed, mut writer) = feed();
        let (_, listener) = feed.listen().unwrap();
        for _ in 0..2 * MAX_UNTAKEN / MAX_TURN {
            writer.write_all(&[b'x'; MAX_TURN]).unwrap();
            feed.drain();
        }
        let Heard::Bytes(bytes) = listener.hear(Duration::ZERO) else { panic!() };
        assert!(String::from_utf8_lossy(&bytes[..80]).contains(&format!("[{MAX_UNTAKEN} bytes were missed")));
        assert!(bytes.len() < MAX_UNTAKEN + 200);
    }

    #[test]
    fn a_pipe_is_let_go_although_somebody_never_stops_writing() {
        let (_place, feed, mut writer) = feed();
        let writes = std::thread::spawn(move || while writer.write_all(&[b'x'; MAX_TURN]).is_ok() {});
        std::thread::sleep(Duration::from_millis(20));
        feed.disconnect();
        writes.join().unwrap();
    }

    #[test]
    fn so_many_listen_and_no_more_until_one_has_gone() {
        let (_place, feed, _writer) = feed();
        let mut listeners: Vec<_> = (0..MAX_LISTENERS).map(|_| feed.listen().unwrap()).collect();
        assert!(feed.listen().is_err());
        listeners.pop();
        assert!(feed.listen().is_ok());
    }

    #[test]
    fn a_place_that_takes_nothing_costs_the_log_and_nobody_else() {
        let (place, feed, mut writer) = feed();
        let (_, listener) = feed.listen().unwrap();
        fs::create_dir(place.path().join("console.log")).unwrap();
        writer.write_all(b"said").unwrap();
        assert!(feed.drain());
        assert_eq!(listener.hear(Duration::ZERO), Heard::Bytes(b"said".into()));
    }
}
