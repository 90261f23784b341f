//! Places of a guest: what it has while it runs, and the group of its processes. Made before a start, gone after the end.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::config::Config;
use crate::process;

/// Where version 2 of control groups is mounted.
pub const GROUPS: &str = "/sys/fs/cgroup";
/// The controller of what is read and written, which a host may lack.
const IO: &str = "io";
/// The directory in a cell where disks are put for a guest that runs.
pub const DISKS: &str = "disks";
/// How long processes that were killed may still be in their group.
const KILL_TRIES: u32 = 200;
const KILL_PAUSE: Duration = Duration::from_millis(10);

/// The places of one guest. Paths only: whether anything is there is another matter.
#[derive(Clone, Debug)]
pub struct Places {
    pub id: String,
    /// Its sockets and pipes, which others may look into, and not list.
    pub run: PathBuf,
    /// What outlives a run: its record, its disks, its logs.
    pub state: PathBuf,
    /// What the VMM sees as `/`.
    pub root: PathBuf,
    pub group: PathBuf,
}

impl Places {
    /// Of the guest with this id.
    pub fn new(config: &Config, id: &str) -> Places {
        let program = config.programs.vmm.file_name().unwrap_or_default();
        Places {
            id: id.to_owned(),
            run: config.run_dir.join("guests").join(id),
            state: config.state_dir.join("guests").join(id),
            root: cells(config).join(program).join(id).join("root"),
            group: Path::new(GROUPS).join(&config.control_group).join(id),
        }
    }

    /// The guest's own API, for its owner.
    pub fn api(&self) -> PathBuf {
        self.run.join("api.sock")
    }

    /// Where the VMM writes how it ended: not in memory, which it might fill.
    pub fn exit_status(&self) -> PathBuf {
        self.state.join("exit")
    }

    /// The processes in the group.
    pub fn processes(&self) -> Vec<u32> {
        let text = fs::read_to_string(self.group.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Ends whatever is left and removes all that there is; nothing is no error.
    ///
    /// # Errors
    /// What is in the way.
    pub fn clear(&self, config: &Config) -> io::Result<()> {
        self.kill()?;
        remove_cell(config, &self.id)?;
        for outcome in [fs::remove_dir_all(&self.run), fs::remove_file(self.exit_status())] {
            match outcome {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// A guest is one process, but a jailer that was killed may have left another.
    fn kill(&self) -> io::Result<()> {
        match fs::write(self.group.join("cgroup.kill"), "1") {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            outcome => outcome?,
        }
        for _ in 0..KILL_TRIES {
            if self.processes().is_empty() {
                return Ok(());
            }
            thread::sleep(KILL_PAUSE);
        }
        let left = self.processes();
        Err(io::Error::other(format!("processes {left:?} of its group do not end: the kernel holds them")))
    }
}

/// Where the jailer makes cells.
pub fn cells(config: &Config) -> PathBuf {
    config.state_dir.join("cells")
}

/// Finds something in a cell. What is in there is the VMM's to change, so no link is followed: it would lead to what is the host's.
///
/// # Errors
/// Those of openat2(2); also that there is a link on the way.
pub fn find_in(root: &Path, name: &str, flags: OFlags) -> io::Result<File> {
    let root = File::open(root)?;
    let flags = flags | OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok(openat2(root.as_fd(), name, flags, Mode::empty(), resolve)?.into())
}

/// By the jailer, which knows what it has made and follows no link that a guest has made in there.
fn remove_cell(config: &Config, id: &str) -> io::Result<()> {
    let mut command = Command::new(&config.programs.jailer);
    command
        .arg("--remove")
        .args(["--id", id, "--exec-file"])
        .arg(&config.programs.vmm)
        .arg("--chroot-base-dir")
        .arg(cells(config))
        .args(["--cgroup-version", "2", "--parent-cgroup", &config.control_group]);
    let output = process::output(command, &[])?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// Makes a directory and those above it, if they are not there, with this mode.
///
/// # Errors
/// Those of the file system.
pub fn make_private_directory(path: &Path, mode: u32) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(mode).create(path)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Control groups of version 2 are there, and those of guests can be limited.
///
/// # Errors
/// They are not; what to do.
pub fn prepare_groups(config: &Config) -> io::Result<()> {
    let root = Path::new(GROUPS);
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("{GROUPS} has no control groups of version 2: mount cgroup2 there (systemd.unified_cgroup_hierarchy=1)"),
        )
    })?;
    let missing: Vec<_> =
        ["cpu", "memory", "pids"].into_iter().filter(|name| !lists(&controllers, name)).collect();
    if !missing.is_empty() {
        return Err(io::Error::other(format!("{GROUPS} lacks the controllers {}", missing.join(", "))));
    }
    fs::create_dir_all(root.join(&config.control_group))?;
    // The jailer asks for the controllers of those limits only that a guest has.
    if lists(&controllers, IO)
        && let Err(error) = pass_on(IO, root, &config.control_group)
    {
        log::warn!("What guests read and write is not counted, and they have no share of disks: {error}");
    }
    Ok(())
}

/// Whether a group has a controller.
pub fn has_controller(group: &Path, controller: &str) -> bool {
    fs::read_to_string(group.join("cgroup.controllers")).is_ok_and(|all| lists(&all, controller))
}

fn lists(controllers: &str, controller: &str) -> bool {
    controllers.split_whitespace().any(|one| one == controller)
}

/// Lets the groups in this one below the root have a controller. Where a group on the way does not let it, those below it are
/// without.
fn pass_on(controller: &str, root: &Path, group: &str) -> io::Result<()> {
    let mut at = root.to_owned();
    let names = Path::new(group).iter().map(Some);
    for name in names.chain([None]) {
        let file = at.join("cgroup.subtree_control");
        let pass_on = || match lists(&fs::read_to_string(&file)?, controller) {
            true => Ok(()),
            false => File::options().write(true).open(&file)?.write_all(format!("+{controller}").as_bytes()),
        };
        pass_on().map_err(|error| {
            let why = match error.kind() {
                ErrorKind::ResourceBusy => {
                    ": a group with processes of its own has none below it that are limited"
                }
                _ => "",
            };
            io::Error::new(
                error.kind(),
                format!("{} does not take +{controller}: {error}{why}", file.display()),
            )
        })?;
        at.extend(name);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_controller_is_passed_on_from_the_root_to_the_groups_of_guests() {
        let place = tempfile::tempdir().unwrap();
        let file = |group: &str| place.path().join(group).join("cgroup.subtree_control");
        fs::create_dir_all(place.path().join("a/b/guest")).unwrap();
        for (group, has) in [("", "cpu io\n"), ("a", "cpu\n"), ("a/b", "")] {
            fs::write(file(group), has).unwrap();
        }
        pass_on(IO, place.path(), "a/b").unwrap();
        let has = |group| fs::read_to_string(file(group)).unwrap();
        assert_eq!((has("").as_str(), has("a").as_str(), has("a/b").as_str()), ("cpu io\n", "+io\n", "+io"));
        assert!(!file("a/b/guest").exists());

        fs::remove_file(file("a")).unwrap();
        let error = pass_on(IO, place.path(), "a/b").unwrap_err().to_string();
        assert!(error.contains("/a/cgroup.subtree_control does not take +io: "), "{error}");
        assert!(!file("a").exists());
    }
}
