//! The directory of one run: console, logs, disks to write on. It goes away with the run, even with a killed one.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use super::error::{Doing, Result};

/// A directory that is removed when this is dropped. Should that not come to pass, [`RunDir::new`] of a later run
/// removes it: the lock in it is then free.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: File,
}

const LOCK: &str = "lock";

/// How often [`remove_own`] looks at most, how often it must find nothing, and the time between two looks.
const MAX_LOOKS: u32 = 1000;
const QUIET_LOOKS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(2);

impl RunDir {
    /// Makes a directory in `parent`, and removes what dead runs left there.
    pub fn new(parent: &Path) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        fs::create_dir_all(parent).doing(|| format!("cannot make {}", parent.display()))?;
        // One at a time, so that nobody takes a directory for dead that is about to be locked.
        let _making = lock_file(&parent.join(LOCK)).doing(|| format!("cannot lock {}", parent.display()))?;
        sweep(parent);
        let name = format!("{}{}", own_prefix(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = parent.join(name);
        fs::create_dir(&path).doing(|| format!("cannot make {}", path.display()))?;
        let lock = lock_file(&path.join(LOCK)).doing(|| format!("cannot lock {}", path.display()))?;
        Ok(Self { path, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // What stays is swept by a later run.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes the directories of this process in `parent`, for an end that drops nothing.
pub fn remove_own(parent: &Path) {
    let prefix = own_prefix();
    let is_own =
        |entry: &fs::DirEntry| entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix));
    // A start in another thread may put something there, or make it anew, until it misses what was there.
    let mut quiet = 0;
    for _ in 0..MAX_LOOKS {
        let own: Vec<_> = fs::read_dir(parent).into_iter().flatten().flatten().filter(is_own).collect();
        quiet = if own.is_empty() { quiet + 1 } else { 0 };
        if quiet == QUIET_LOOKS {
            return;
        }
        own.iter().for_each(|entry| drop(fs::remove_dir_all(entry.path())));
        thread::sleep(PAUSE);
    }
}

fn own_prefix() -> String {
    format!("{}-", std::process::id())
}

/// Takes the lock on a file, which is made if need be; waits for it.
pub fn lock_file(path: &Path) -> io::Result<File> {
    let file = File::options().create(true).append(true).open(path)?;
    file.lock()?;
    Ok(file)
}

fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()) {
        let is_free = match File::open(path.join(LOCK)) {
            Ok(file) => file.try_lock().is_ok(),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        if is_free {
            let _ = fs::remove_dir_all(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_removes_its_directory_and_those_of_dead_runs_but_not_those_of_living_ones() {
        let parent = tempfile::tempdir().unwrap();
        let dead = parent.path().join("1-0");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join(LOCK), "").unwrap();
        fs::write(dead.join("console.log"), "x").unwrap();

        let first = RunDir::new(parent.path()).unwrap();
        fs::write(first.join("disk"), "x").unwrap();
        let second = RunDir::new(parent.path()).unwrap();

        assert!(!dead.exists());
        assert!(first.join("disk").exists() && second.path().exists());
        let path = first.path().to_owned();
        drop(first);
        assert!(!path.exists());
    }
}
