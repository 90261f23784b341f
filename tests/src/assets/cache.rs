//! The cache of built assets: one directory per asset and recipe, complete or absent.
//!
//! `<cache>/<name>-<key>/` is an asset, `<name>.lock` is held by whoever builds it, `<name>.partial/` is what a build
//! has so far, and `<name>.log` is what its script last said. It knows nothing of what is in an asset.

use std::fs::{self, File, TryLockError};
use std::hash::Hasher;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::recipe::{Asset, Recipe};

/// Versions of an asset that stay: this recipe's, and one more for the other checkout or for what still runs from it.
const KEPT_VERSIONS: usize = 2;

/// Lines of a failed script's output that its error repeats.
const TAIL_LINES: usize = 20;

/// Tenths of a second to wait for an asset's lock before saying so.
const QUIET_TRIES: u32 = 100;

/// Written last into an asset; its content differs from build to build.
const STAMP: &str = "built";

/// Where the administrator's commands are, which some users' search path lacks.
pub const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/sbin:/sbin";

/// Why an asset is not there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no place for the cache.
    #[error("no place for the cache: set BERTH_CACHE to a directory, or HOME")]
    NoCache,
    /// Commands are missing and this is not a machine on which they can be installed.
    #[error(
        "missing commands: {commands}. They are installed without asking on Debian 12 only; Debian's packages of \
         them are: {packages}"
    )]
    MissingTools { commands: String, packages: String },
    /// A recipe's script failed.
    #[error("making {name} failed ({status}); the last lines of {log}:\n{tail}")]
    Script { name: &'static str, status: String, log: PathBuf, tail: String },
    /// A file of the cache cannot be read or written.
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

pub fn io_error(path: &Path, source: io::Error) -> Error {
    Error::Io { path: path.to_owned(), source }
}

/// An asset that is complete.
#[derive(Debug)]
pub struct Built {
    pub dir: PathBuf,
    /// Differs between two builds even of one recipe, because Debian's archive moves on.
    pub id: String,
}

/// An asset and its name, for a recipe that needs it.
pub type Input = (&'static str, Built);

/// `$BERTH_CACHE`, or `berth` in the user's cache directory.
pub fn cache_dir() -> Result<PathBuf, Error> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = variable("BERTH_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|dir| dir.join("berth")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/berth")))
        .ok_or(Error::NoCache)?;
    // Scripts run elsewhere and are told paths below it.
    std::path::absolute(&cache).map_err(|e| io_error(&cache, e))
}

/// The asset, built now if the cache lacks it. Its inputs come first.
pub fn ensure(cache: &Path, asset: Asset) -> Result<Built, Error> {
    let recipe = asset.recipe();
    let mut inputs = Vec::new();
    for input in recipe.inputs {
        inputs.push((input.recipe().name, ensure(cache, *input)?));
    }
    ensure_recipe(cache, &recipe, &inputs)
}

/// The same for a recipe whose inputs are built.
pub fn ensure_recipe(cache: &Path, recipe: &Recipe, inputs: &[Input]) -> Result<Built, Error> {
    let dir = cache.join(format!("{}-{:016x}", recipe.name, key(recipe, inputs)));
    if let Some(built) = find(&dir) {
        return Ok(built);
    }
    let lock = lock(cache, recipe.name)?;
    if let Some(built) = find(&dir) {
        return Ok(built);
    }
    let out = execute(cache, recipe, inputs, &[], &lock)?;
    publish(&out, &dir)?;
    remove_tree(&cache.join(format!("{}.partial", recipe.name)), recipe.as_root)?;
    keep_newest(cache, KEPT_VERSIONS, |name| is_version_of(recipe.name, name))?;
    find(&dir).ok_or_else(|| io_error(&dir, io::ErrorKind::NotFound.into()))
}

/// Runs a recipe's script under its lock and returns the directory with what it made.
pub fn execute(
    cache: &Path,
    recipe: &Recipe,
    inputs: &[Input],
    environment: &[(&str, String)],
    lock: &File,
) -> Result<PathBuf, Error> {
    let started = Instant::now();
    eprintln!("assets: making {}", recipe.name);
    let partial = cache.join(format!("{}.partial", recipe.name));
    remove_tree(&partial, recipe.as_root)?;
    lay_out(recipe, &partial)?;
    run(cache, recipe, inputs, environment, &partial, lock)?;
    eprintln!("assets: made {} in {:.1} s", recipe.name, started.elapsed().as_secs_f32());
    Ok(partial.join("out"))
}

/// Waits for whoever makes this asset now.
pub fn lock(cache: &Path, name: &str) -> Result<File, Error> {
    fs::create_dir_all(cache).map_err(|e| io_error(cache, e))?;
    let path = cache.join(format!("{name}.lock"));
    let in_path = |e| io_error(&path, e);
    let file = File::options().create(true).read(true).append(true).open(&path).map_err(in_path)?;
    for _ in 0..QUIET_TRIES {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(100)),
            Err(TryLockError::Error(e)) => return Err(in_path(e)),
        }
    }
    eprintln!("assets: waiting for {name}, which someone else is making");
    file.lock().map_err(in_path)?;
    Ok(file)
}

/// Removes all but the newest `kept` entries of a directory whose names are accepted.
pub fn keep_newest(dir: &Path, kept: usize, accepted: impl Fn(&str) -> bool) -> Result<(), Error> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| io_error(dir, e))?.flatten() {
        if entry.file_name().to_str().is_some_and(&accepted) {
            let modified = entry.metadata().and_then(|m| m.modified()).unwrap_or(UNIX_EPOCH);
            found.push((modified, entry.path()));
        }
    }
    found.sort();
    let superfluous = found.len().saturating_sub(kept);
    found.iter().take(superfluous).try_for_each(|(_, path)| remove_tree(path, false))
}

/// The 64-bit FNV-1a hash: a name for a content, the same in every release of the compiler; no defence.
pub struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Fnv(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

fn key(recipe: &Recipe, inputs: &[Input]) -> u64 {
    let mut hash = Fnv::default();
    let mut part = |text: &str| {
        hash.write_usize(text.len());
        hash.write(text.as_bytes());
    };
    part(recipe.script);
    for (name, text) in recipe.files {
        part(name);
        part(text);
    }
    for (name, built) in inputs {
        part(name);
        part(&built.id);
    }
    hash.finish()
}

fn find(dir: &Path) -> Option<Built> {
    let id = fs::read_to_string(dir.join(STAMP)).ok()?;
    Some(Built { dir: dir.to_owned(), id })
}

/// A work directory with nothing but the recipe's files, and a place for the result.
fn lay_out(recipe: &Recipe, partial: &Path) -> Result<(), Error> {
    let out = partial.join("out");
    fs::create_dir_all(&out).map_err(|e| io_error(&out, e))?;
    for (name, text) in recipe.files.iter().chain(&[("recipe", recipe.script)]) {
        let path = partial.join(name);
        fs::write(&path, text).map_err(|e| io_error(&path, e))?;
    }
    Ok(())
}

fn run(
    cache: &Path,
    recipe: &Recipe,
    inputs: &[Input],
    environment: &[(&str, String)],
    partial: &Path,
    lock: &File,
) -> Result<(), Error> {
    let log = cache.join(format!("{}.log", recipe.name));
    let output = File::create(&log).map_err(|e| io_error(&log, e))?;
    let errors = output.try_clone().map_err(|e| io_error(&log, e))?;

    let mut command = command(recipe.as_root, "env");
    command.arg(format!("PATH={}:{SYSTEM_PATH}", std::env::var("PATH").unwrap_or_default()));
    command.arg("LC_ALL=C.UTF-8");
    command.arg(format!("OUT={}", partial.join("out").display()));
    // Root's files would be in the way of a user's.
    let apt = cache.join(if recipe.as_root { "apt-of-root" } else { "apt" });
    fs::create_dir_all(&apt).map_err(|e| io_error(&apt, e))?;
    command.arg(format!("BERTH_APT={}", apt.display()));
    if let Ok(mirror) = std::env::var("BERTH_DEBIAN_MIRROR") {
        command.arg(format!("BERTH_DEBIAN_MIRROR={mirror}"));
    }
    for (name, built) in inputs {
        let variable = name.to_uppercase().replace('-', "_");
        command.arg(format!("{variable}={}", built.dir.display()));
    }
    for (name, value) in environment {
        command.arg(format!("{name}={value}"));
    }
    command.args(["bash", "recipe"]).current_dir(partial).stdout(output).stderr(errors);
    // The script holds the lock too: should this process die, no one builds in the same place beside the orphan.
    let held = lock.try_clone().map_err(|e| io_error(partial, e))?;
    command.stdin(Stdio::from(held));
    let status = command.status().map_err(|e| io_error(Path::new("bash"), e))?;
    if status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n");
    Err(Error::Script { name: recipe.name, status: status.to_string(), log, tail })
}

/// Makes a finished build visible under its name, all of it or nothing even when the power fails.
fn publish(out: &Path, dir: &Path) -> Result<(), Error> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let stamp = out.join(STAMP);
    let id = format!("{} {}\n", now.as_nanos(), std::process::id());
    fs::write(&stamp, id).map_err(|e| io_error(&stamp, e))?;
    let _ = Command::new("sync").arg("-f").arg(out).status();
    fs::rename(out, dir).map_err(|e| io_error(dir, e))
}

fn is_version_of(asset: &str, name: &str) -> bool {
    name.strip_prefix(asset)
        .and_then(|rest| rest.strip_prefix('-'))
        .is_some_and(|key| key.len() == 16 && key.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Never crosses into another file system: a build that was killed may have left something mounted.
fn remove_tree(path: &Path, as_root: bool) -> Result<(), Error> {
    if !path.exists() {
        return Ok(());
    }
    let status = command(as_root, "rm").args(["-rf", "--one-file-system", "--"]).arg(path).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(io_error(path, io::Error::other(format!("rm failed: {status}")))),
        Err(e) => Err(io_error(path, e)),
    }
}

/// A command, by way of sudo where it must be root's and we are not.
fn command(as_root: bool, program: &str) -> Command {
    if as_root && !is_root() {
        let mut sudo = Command::new("sudo");
        sudo.arg(program);
        return sudo;
    }
    Command::new(program)
}

/// The owner of /proc/self is the effective user.
fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(script: &'static str) -> Recipe {
        Recipe { name: "thing", script, files: &[("aside", "text beside it")], inputs: &[], as_root: false }
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn versions(dir: &Path) -> usize {
        names(dir).iter().filter(|name| is_version_of("thing", name)).count()
    }

    #[test]
    fn a_recipe_runs_once_and_its_result_stays() {
        let cache = tempfile::tempdir().unwrap();
        let recipe = recipe("echo ran >> ../runs; cp aside $OUT/result");
        let first = ensure_recipe(cache.path(), &recipe, &[]).unwrap();
        let second = ensure_recipe(cache.path(), &recipe, &[]).unwrap();
        assert_eq!(first.id, second.id);
        assert_eq!(fs::read_to_string(second.dir.join("result")).unwrap(), "text beside it");
        assert_eq!(fs::read_to_string(cache.path().join("runs")).unwrap(), "ran\n");
    }

    #[test]
    fn many_at_once_run_it_once() {
        let cache = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    ensure_recipe(cache.path(), &recipe("echo ran >> ../runs; sleep 0.1"), &[]).unwrap()
                });
            }
        });
        assert_eq!(fs::read_to_string(cache.path().join("runs")).unwrap(), "ran\n");
    }

    #[test]
    fn a_changed_script_file_or_input_is_another_asset() {
        let input = |id: &str| ("input", Built { dir: "/nowhere".into(), id: id.to_owned() });
        let keys = [
            key(&recipe("a"), &[]),
            key(&recipe("b"), &[]),
            key(&Recipe { files: &[("aside", "other text")], ..recipe("a") }, &[]),
            key(&recipe("a"), &[input("1")]),
            key(&recipe("a"), &[input("2")]),
        ];
        for (i, a) in keys.iter().enumerate() {
            assert!(keys.iter().skip(i + 1).all(|b| a != b), "key {i} is not alone in {keys:x?}");
        }
    }

    #[test]
    fn old_versions_go() {
        let cache = tempfile::tempdir().unwrap();
        for script in ["true", "true # 2", "true # 3", "true # 4"] {
            ensure_recipe(cache.path(), &recipe(script), &[]).unwrap();
        }
        assert_eq!(versions(cache.path()), KEPT_VERSIONS);
        let runs_again = recipe("touch ../again");
        ensure_recipe(cache.path(), &Recipe { script: "true # 4", ..runs_again }, &[]).unwrap();
        assert!(!cache.path().join("again").exists());
    }

    #[test]
    fn a_failed_script_leaves_no_asset_and_an_error_with_its_last_words() {
        let cache = tempfile::tempdir().unwrap();
        let broken = recipe("seq 100; touch $OUT/half; a-command-that-is-missing; exit 7");
        let error = ensure_recipe(cache.path(), &broken, &[]).unwrap_err().to_string();
        assert!(error.contains("exit status: 7") && error.contains("\n100\n"), "{error}");
        assert!(error.contains("a-command-that-is-missing: command not found"), "{error}");
        assert!(!error.contains("\n50\n"), "{error}");
        assert_eq!(versions(cache.path()), 0);
    }

    #[test]
    fn what_a_killed_build_left_behind_does_not_reach_the_next() {
        let cache = tempfile::tempdir().unwrap();
        fs::create_dir_all(cache.path().join("thing.partial/out")).unwrap();
        fs::write(cache.path().join("thing.partial/out/half"), "").unwrap();
        let built = ensure_recipe(cache.path(), &recipe("touch $OUT/whole"), &[]).unwrap();
        let mut found = names(&built.dir);
        found.sort();
        assert_eq!(found, [STAMP, "whole"]);
    }

    #[test]
    fn only_keyed_directories_are_versions() {
        assert!(is_version_of("host", "host-0123456789abcdef"));
        assert!(!is_version_of("host", "host-root-0123456789abcdef"));
        assert!(!is_version_of("host", "host.lock"));
    }
}
