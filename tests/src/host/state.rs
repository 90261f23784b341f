//! Saved states of booted nested hosts, each kept under the recipe of its machine.
//!
//! A state is a cache entry: it may vanish or fail to load at any time, and then the machine boots from its kernel. An
//! entry appears by one rename, so that a killed run leaves none half written.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::error::{Doing, Result};
use super::rundir::lock_file;

/// Entries kept, by last use. A state of a 3 GiB host takes about 130 MB of disk.
const MAX_STATES: usize = 8;

/// The name of the state's file in an entry, and in the directory of the machine that wrote it.
pub const STATE: &str = "state";

/// The whole recipe is kept beside the state and compared: the key is only a short name for it.
const RECIPE: &str = "recipe";

/// The cache directory of saved states.
#[derive(Debug)]
pub struct States {
    directory: PathBuf,
}

impl States {
    pub fn new(directory: PathBuf) -> Result<Self> {
        fs::create_dir_all(&directory).doing(|| format!("cannot make {}", directory.display()))?;
        Ok(Self { directory })
    }

    /// The state that was saved for this recipe.
    pub fn find(&self, recipe: &str) -> Option<PathBuf> {
        let entry = self.entry(recipe);
        let kept = fs::read_to_string(entry.join(RECIPE)).ok()?;
        let state = entry.join(STATE);
        if kept != recipe || !state.is_file() {
            return None;
        }
        // For `prune`. An entry that cannot be marked is merely forgotten earlier.
        let _ = File::open(entry.join(RECIPE)).and_then(|file| file.set_modified(SystemTime::now()));
        Some(state)
    }

    /// Waits until nobody else makes a state for this recipe; holds others off until dropped.
    pub fn lock(&self, recipe: &str) -> Result<File> {
        let path = self.entry(recipe).with_extension("lock");
        lock_file(&path).doing(|| format!("cannot lock {}", path.display()))
    }

    /// Moves a state from `file`, which must be on the cache's file system. The caller holds [`States::lock`].
    pub fn store(&self, recipe: &str, file: &Path) -> Result<()> {
        let storing = || format!("cannot keep a saved state in {}", self.directory.display());
        self.forget(recipe);
        let new = tempfile::tempdir_in(&self.directory).doing(storing)?;
        fs::write(new.path().join(RECIPE), recipe).doing(storing)?;
        fs::rename(file, new.path().join(STATE)).doing(storing)?;
        fs::rename(new.keep(), self.entry(recipe)).doing(storing)?;
        self.prune();
        Ok(())
    }

    /// Removes the state for this recipe, if there is one.
    pub fn forget(&self, recipe: &str) {
        let _ = fs::remove_dir_all(self.entry(recipe));
    }

    fn entry(&self, recipe: &str) -> PathBuf {
        self.directory.join(key(recipe))
    }

    fn prune(&self) {
        let last_use = |path: &Path| fs::metadata(path.join(RECIPE)).and_then(|m| m.modified()).ok();
        for path in all_but_newest(&self.directory, MAX_STATES, last_use) {
            let _ = fs::remove_dir_all(&path);
            let _ = fs::remove_file(path.with_extension("lock"));
        }
    }
}

/// The entries of a directory to remove so that the `kept` newest stay. Those without an age stay too.
pub fn all_but_newest(
    directory: &Path,
    kept: usize,
    age: impl Fn(&Path) -> Option<SystemTime>,
) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let aged =
        entries.flatten().map(|entry| entry.path()).filter_map(|path| age(&path).map(|age| (age, path)));
    let mut aged: Vec<_> = aged.collect();
    aged.sort();
    let surplus = aged.len().saturating_sub(kept);
    aged.into_iter().take(surplus).map(|(_, path)| path).collect()
}

/// A file name for a text: its 64-bit FNV-1a hash. Who needs to be sure compares the text.
pub fn key(text: &str) -> String {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let hash = text.bytes().fold(OFFSET, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME));
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(states: &States, recipe: &str) {
        let file = states.directory.join("written");
        fs::write(&file, recipe).unwrap();
        let _lock = states.lock(recipe).unwrap();
        states.store(recipe, &file).unwrap();
    }

    #[test]
    fn the_key_is_fnv_1a() {
        assert_eq!(key(""), "cbf29ce484222325");
        assert_eq!(key("foobar"), "85944171f73967e8");
    }

    #[test]
    fn a_state_is_found_under_its_recipe_and_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let states = States::new(directory.path().join("states")).unwrap();
        assert_eq!(states.find("-m 3G"), None);
        store(&states, "-m 3G");
        store(&states, "-m 8G");
        assert_eq!(fs::read_to_string(states.find("-m 3G").unwrap()).unwrap(), "-m 3G");
        assert_eq!(fs::read_to_string(states.find("-m 8G").unwrap()).unwrap(), "-m 8G");
        states.forget("-m 3G");
        assert_eq!(states.find("-m 3G"), None);
        assert!(states.find("-m 8G").is_some());
    }

    #[test]
    fn an_entry_whose_recipe_differs_is_no_state_of_ours() {
        let directory = tempfile::tempdir().unwrap();
        let states = States::new(directory.path().to_owned()).unwrap();
        store(&states, "one");
        fs::write(states.entry("one").join(RECIPE), "another with the same key").unwrap();
        assert_eq!(states.find("one"), None);
        store(&states, "one");
        assert!(states.find("one").is_some());
    }

    #[test]
    fn the_entry_used_longest_ago_makes_room() {
        let directory = tempfile::tempdir().unwrap();
        let states = States::new(directory.path().to_owned()).unwrap();
        for number in 0..MAX_STATES {
            store(&states, &number.to_string());
        }
        states.find("0").unwrap();
        store(&states, "one more");
        assert!(states.find("0").is_some());
        assert_eq!(states.find("1"), None);
        assert!(states.find("one more").is_some());
    }
}
