//! The control group of a VMM: found among the mounted hierarchies, made, limited, and entered.
//!
//! With settings, the group is `<hierarchy>/<parent>/<id>`, in version 1 once for each controller. Without settings,
//! version 2 means an existing parent to be entered, and version 1 nothing. The VMM is in its group when we are gone: what a
//! failed start made is taken back with all else (`claim`), and what a VMM leaves is removed with its cell (`remove`).

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;

use crate::args::{Cgroups, Setting, Version};
use crate::dir::Dir;
use crate::error::{During, Error, Result};

/// Mode of a group's directory.
const GROUP: u32 = 0o755;
/// How long a group may still have a process that has ended already.
const TRIES: usize = 200;
const PAUSE: Duration = Duration::from_millis(5);

/// A group to be made or entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    hierarchy: PathBuf,
    parent: PathBuf,
    kind: Kind,
    /// Which group of this hierarchy we are in.
    now: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// Version 2: the parent itself. Where it was not named, it need not be there.
    Existing { is_needed: bool },
    /// Version 2: a group in the parent, with these settings.
    Unified(Vec<Setting>),
    /// Version 1: a group in the parent, with the settings of one controller.
    Single(Vec<Setting>),
}

/// What has to be done. Call while /proc is there.
///
/// # Errors
/// A hierarchy or a controller that is needed is not there. Nothing was made.
pub fn plan(cgroups: &Cgroups) -> Result<Vec<Plan>> {
    if cgroups.version == Version::V1 && cgroups.settings.is_empty() {
        return Ok(Vec::new());
    }
    let read = |path: &str| std::fs::read_to_string(path).during(|| format!("cannot read {path}"));
    let host = Host { mounts: read("/proc/self/mounts")?, groups: read("/proc/self/cgroup")? };
    match cgroups.version {
        Version::V1 => plan_v1(cgroups, &host),
        Version::V2 => plan_v2(cgroups, &host),
    }
}

/// What the host says of control groups.
struct Host {
    /// proc_pid_mounts(5)
    mounts: String,
    /// /proc/PID/cgroup of cgroups(7): those we are in.
    groups: String,
}

/// The groups that [`enter`] is going to make below the parents, by path.
///
/// # Errors
/// What is there cannot be looked at.
pub fn to_be_made(plans: &[Plan], id: &str) -> Result<Vec<PathBuf>> {
    let mut paths = BTreeSet::new();
    for plan in plans.iter().filter(|plan| !matches!(plan.kind, Kind::Existing { .. })) {
        let is_there = match plan.open_parent() {
            Ok(parent) => parent.has(id)?,
            Err(error) if error.is_not_found() => false,
            Err(error) => return Err(error),
        };
        if !is_there {
            paths.insert(plan.hierarchy.join(&plan.parent).join(id));
        }
    }
    Ok(paths.into_iter().collect())
}

/// The ways back to where we are, for [`leave`]. A group that is not there is none.
pub fn ways_back(plans: &[Plan]) -> Vec<File> {
    let open = |plan: &Plan| {
        let group = plan.hierarchy.join(plan.now.strip_prefix("/").unwrap_or(&plan.now));
        File::options().write(true).open(group.join("cgroup.procs")).ok()
    };
    plans.iter().filter_map(open).collect()
}

/// Goes back to where we were before [`enter`].
///
/// # Errors
/// The kernel does not let us.
pub fn leave(ways_back: &[File]) -> Result<()> {
    ways_back.iter().try_for_each(|mut procs| {
        // Zero is the process that writes.
        procs
            .write_all(b"0")
            .during(|| "cannot go back to the control group that this process came from".into())
    })
}

/// Moves this process into its group, or groups. What was made stays when a later step fails.
///
/// # Errors
/// The kernel refuses a setting, or a parent that must be there is not.
pub fn enter(plans: &[Plan], id: &str) -> Result<()> {
    plans.iter().try_for_each(|plan| plan.enter(id))
}

/// Removes a group in another, as soon as what has ended in it is gone; it need not be there.
///
/// # Errors
/// A process is in it, or a group.
pub fn remove(parent: &Dir, name: impl AsRef<OsStr>) -> Result<()> {
    let name = name.as_ref();
    for _ in 1..TRIES {
        match parent.remove_dir(name) {
            Err(error) if error.is(Errno::BUSY) => thread::sleep(PAUSE),
            done => return done,
        }
    }
    parent.remove_dir(name)
}

/// Removes the groups that a start with these flags makes for this id, of those that are there. Parents stay.
///
/// # Errors
/// Somebody is in one of them.
pub fn remove_all(cgroups: &Cgroups, id: &str) -> Result<()> {
    let mounts =
        std::fs::read_to_string("/proc/self/mounts").during(|| "cannot read /proc/self/mounts".into())?;
    for hierarchy in hierarchies(&mounts, cgroups.version) {
        let parent = Dir::open(&hierarchy).and_then(|hierarchy| hierarchy.descend(&cgroups.parent));
        match parent {
            Ok(parent) => remove(&parent, id).map_err(|error| inhabited(error, &parent, id))?,
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// All hierarchies of a version: which of those of version 1 a VMM was put into, its start knew by its settings.
fn hierarchies(mounts: &str, version: Version) -> Vec<PathBuf> {
    match version {
        Version::V2 => find_v2(mounts).into_iter().collect(),
        Version::V1 => {
            let points = mount_points(mounts).filter(|(kind, _, _)| *kind == "cgroup");
            points.map(|(_, point, _)| unescaped(point)).collect()
        }
    }
}

/// Who is in a group that cannot be removed.
fn inhabited(error: Error, parent: &Dir, id: &str) -> Error {
    if !error.is(Errno::BUSY) {
        return error;
    }
    let procs = parent.enter(id).and_then(|group| group.read("cgroup.procs")).unwrap_or_default();
    let who = match procs.lines().next() {
        Some(pid) => format!("process {pid} is"),
        None => "other groups are".into(),
    };
    let group = parent.path().join(id);
    Error::Refused(format!(
        "{who} in the control group {}; when that has ended, remove the cell",
        group.display()
    ))
}

fn plan_v1(cgroups: &Cgroups, host: &Host) -> Result<Vec<Plan>> {
    let controllers: BTreeSet<_> = cgroups.settings.iter().map(Setting::controller).collect();
    let plan = |controller: &str| {
        let hierarchy = find_v1(&host.mounts, controller).ok_or_else(|| {
            Error::Refused(format!(
                "--cgroup {controller}.*: no version 1 hierarchy with this controller is mounted; mount it, or give \
                 --cgroup-version 2"
            ))
        })?;
        let of_this = |setting: &&Setting| setting.controller() == controller;
        let settings = cgroups.settings.iter().filter(of_this).cloned().collect();
        let now = group_v1(&host.groups, controller);
        Ok(Plan { hierarchy, parent: cgroups.parent.clone(), kind: Kind::Single(settings), now })
    };
    controllers.into_iter().map(plan).collect()
}

fn plan_v2(cgroups: &Cgroups, host: &Host) -> Result<Vec<Plan>> {
    let kind = match cgroups.settings.is_empty() {
        true => Kind::Existing { is_needed: cgroups.is_parent_given },
        false => Kind::Unified(cgroups.settings.clone()),
    };
    let Some(hierarchy) = find_v2(&host.mounts) else {
        let is_needed = kind != Kind::Existing { is_needed: false };
        return match is_needed {
            true => Err(Error::Refused(
                "--cgroup-version 2: no version 2 hierarchy is mounted; mount cgroup2".into(),
            )),
            false => Ok(Vec::new()),
        };
    };
    check_controllers(&Dir::open(&hierarchy)?, &controllers_of(&cgroups.settings))?;
    let now = group_v2(&host.groups);
    Ok(vec![Plan { hierarchy, parent: cgroups.parent.clone(), kind, now }])
}

/// What the settings of a version 2 group need. The files named cgroup.* are the core's, in every group.
fn controllers_of(settings: &[Setting]) -> BTreeSet<&str> {
    settings.iter().map(Setting::controller).filter(|controller| *controller != "cgroup").collect()
}

impl Plan {
    fn enter(&self, id: &str) -> Result<()> {
        let group = match &self.kind {
            Kind::Existing { is_needed } => match (self.open_parent(), is_needed) {
                (Ok(parent), _) => parent,
                (Err(_), false) => return Ok(()),
                (Err(error), true) => {
                    let parent = self.parent.display();
                    return Err(Error::Refused(format!(
                        "--parent-cgroup {parent}: {error}; make the group first, or give a --cgroup for one to be made"
                    )));
                }
            },
            Kind::Unified(settings) => self.make_unified(settings, id)?,
            Kind::Single(settings) => self.make_single(settings, id)?,
        };
        // Zero is the process that writes.
        group.control("cgroup.procs", "0").map_err(|error| explained(error, &group))
    }

    fn open_parent(&self) -> Result<Dir> {
        self.parent.iter().try_fold(Dir::open(&self.hierarchy)?, |group, name| group.enter(name))
    }

    fn make_unified(&self, settings: &[Setting], id: &str) -> Result<Dir> {
        let controllers = controllers_of(settings);
        let parent = self.parent.iter().try_fold(Dir::open(&self.hierarchy)?, |group, name| {
            enable(&group, &controllers)?;
            group.enter_or_make(name, GROUP)
        })?;
        enable(&parent, &controllers)?;
        let group = parent.enter_or_make(id, GROUP)?;
        apply(&group, settings)?;
        Ok(group)
    }

    fn make_single(&self, settings: &[Setting], id: &str) -> Result<Dir> {
        let is_cpuset = settings.iter().any(|setting| setting.controller() == "cpuset");
        let names = self.parent.iter().chain([id.as_ref()]);
        let group = names.fold(Dir::open(&self.hierarchy), |parent, name| {
            let parent = parent?;
            let group = parent.enter_or_make(name, GROUP)?;
            if is_cpuset {
                inherit_cpuset(&parent, &group)?;
            }
            Ok(group)
        })?;
        apply(&group, settings)?;
        Ok(group)
    }
}

fn check_controllers(root: &Dir, controllers: &BTreeSet<&str>) -> Result<()> {
    if controllers.is_empty() {
        return Ok(());
    }
    let there = root.read("cgroup.controllers")?;
    match controllers.iter().find(|wanted| !there.split_whitespace().any(|name| name == **wanted)) {
        None => Ok(()),
        Some(missing) => Err(Error::Refused(format!(
            "--cgroup {missing}.*: {} has no such controller (it has: {}); the host may use it in version 1",
            root.path().display(),
            there.trim()
        ))),
    }
}

/// Lets the groups below this one have these controllers, where they do not: an ordinary user may not write it in groups
/// that were not delegated to it.
fn enable(group: &Dir, controllers: &BTreeSet<&str>) -> Result<()> {
    const FILE: &str = "cgroup.subtree_control";
    let enabled = group.read(FILE)?;
    let missing =
        controllers.iter().filter(|wanted| !enabled.split_whitespace().any(|name| name == **wanted));
    let mut missing = missing.copied();
    missing.try_for_each(|name| {
        group.control(FILE, &format!("+{name}")).map_err(|error| explained(error, group))
    })
}

/// Adds to what the kernel said about a group what it means by it, by Documentation/admin-guide/cgroup-v2.rst of Linux.
fn explained(error: Error, group: &Dir) -> Error {
    let Error::System { what, error } = error else { return error };
    let kind = group.read("cgroup.type").unwrap_or_default();
    let why = match Errno::from_io_error(&error) {
        Some(Errno::BUSY) => {
            ": a group has either processes of its own or groups below it that have controllers; give a --parent-cgroup \
             without processes, and with --cgroup, so that the VMM gets a group below it"
        }
        Some(Errno::OPNOTSUPP) if kind.trim() == "domain invalid" => {
            ": the group is below a threaded one, and has threads only; give another --parent-cgroup"
        }
        Some(Errno::OPNOTSUPP) => {
            ": the group is threaded, and a process with all its threads cannot enter it; give another --parent-cgroup"
        }
        Some(Errno::NOENT) => ": the group has no such controller; enable it in the groups above",
        Some(Errno::NOSPC) => ": the group has no CPUs or no memory nodes; set cpuset.cpus and cpuset.mems",
        Some(Errno::ACCESS | Errno::PERM) => {
            ": an ordinary user needs a --parent-cgroup that was delegated to it, and has to be below it already"
        }
        _ => "",
    };
    Error::System { what: format!("{what}{why}"), error }
}

/// In version 1 a new cpuset has neither CPUs nor memory, and no process can enter it so.
fn inherit_cpuset(parent: &Dir, group: &Dir) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if group.read(file)?.trim().is_empty() {
            group.control(file, parent.read(file)?.trim())?;
        }
    }
    Ok(())
}

fn apply(group: &Dir, settings: &[Setting]) -> Result<()> {
    settings.iter().try_for_each(|setting| group.control(&setting.file, &setting.value))
}

/// Where the one hierarchy of version 2 is mounted.
fn find_v2(mounts: &str) -> Option<PathBuf> {
    mount_points(mounts).find(|(kind, _, _)| *kind == "cgroup2").map(|(_, point, _)| unescaped(point))
}

/// Where the hierarchy of version 1 with this controller is mounted.
fn find_v1(mounts: &str, controller: &str) -> Option<PathBuf> {
    let has_it = |(kind, _, options): &(&str, &str, &str)| {
        *kind == "cgroup" && options.split(',').any(|option| option == controller)
    };
    mount_points(mounts).find(has_it).map(|(_, point, _)| unescaped(point))
}

/// The one group of version 2 that we are in.
fn group_v2(groups: &str) -> PathBuf {
    groups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").into()
}

/// The group that we are in, in the hierarchy of version 1 with this controller.
fn group_v1(groups: &str, controller: &str) -> PathBuf {
    let group = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let has_it = fields.next()?.split(',').any(|name| name == controller);
        fields.next().filter(|_| has_it).map(PathBuf::from)
    };
    groups.lines().find_map(group).unwrap_or_else(|| "/".into())
}

/// Type, mount point and options of each line of proc_pid_mounts(5).
fn mount_points(mounts: &str) -> impl Iterator<Item = (&str, &str, &str)> {
    mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let point = fields.nth(1)?;
        Some((fields.next()?, point, fields.next()?))
    })
}

/// Blanks and the like are written as `\040` there.
fn unescaped(point: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::new();
    let mut rest = point.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let escaped = after
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(escaped.unwrap_or(first));
        rest = if escaped.is_some() { after.get(3..).unwrap_or_default() } else { after };
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    const MOUNTS: &str = "\
proc /proc proc rw 0 0
tmpfs /sys/fs/cgroup tmpfs rw,mode=755 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/cpuset cgroup rw,relatime,cpuset 0 0
cgroup /sys/fs/cgroup/systemd cgroup rw,relatime,name=systemd 0 0
cgroup2 /sys/fs/cgroup/uni\\040fied cgroup2 rw,relatime,nsdelegate 0 0
broken
";

    const GROUPS: &str = "2:cpu,cpuacct:/a:b\n1:name=systemd:/user\n0::/user.slice/x\n";

    fn host(mounts: &str) -> Host {
        Host { mounts: mounts.into(), groups: GROUPS.into() }
    }

    #[test]
    fn the_groups_that_we_are_in_are_found_by_controller() {
        assert_eq!(group_v2(GROUPS), Path::new("/user.slice/x"));
        assert_eq!(group_v1(GROUPS, "cpuacct"), Path::new("/a:b"));
        for (groups, controller) in [(GROUPS, "memory"), ("", "cpu"), ("broken", "cpu")] {
            assert_eq!(group_v1(groups, controller), Path::new("/"));
        }
    }

    fn wish(version: Version, settings: &[(&str, &str)]) -> Cgroups {
        let setting = |(file, value): &(&str, &str)| Setting { file: (*file).into(), value: (*value).into() };
        let settings = settings.iter().map(setting).collect();
        Cgroups { version, parent: "a/b".into(), is_parent_given: true, settings }
    }

    #[test]
    fn hierarchies_are_found_by_version_and_controller() {
        assert_eq!(find_v2(MOUNTS), Some("/sys/fs/cgroup/uni fied".into()));
        assert_eq!(find_v1(MOUNTS, "cpuacct"), Some("/sys/fs/cgroup/cpu,cpuacct".into()));
        assert_eq!(find_v1(MOUNTS, "cpuset"), Some("/sys/fs/cgroup/cpuset".into()));
        assert_eq!(find_v1(MOUNTS, "memory"), None);
        assert_eq!(find_v2("tmpfs / tmpfs rw 0 0\n"), None);
    }

    #[test]
    fn groups_to_remove_are_looked_for_in_all_hierarchies_of_the_version() {
        assert_eq!(hierarchies(MOUNTS, Version::V2), [Path::new("/sys/fs/cgroup/uni fied")]);
        let v1 = ["cpu,cpuacct", "cpuset", "systemd"].map(|name| Path::new("/sys/fs/cgroup").join(name));
        assert_eq!(hierarchies(MOUNTS, Version::V1), v1);
        assert!(hierarchies("", Version::V1).is_empty() && hierarchies("", Version::V2).is_empty());
    }

    #[test]
    fn mount_points_lose_their_escapes_and_nothing_else() {
        for (escaped, plain) in
            [("/a\\040b", "/a b"), ("/a\\", "/a\\"), ("/\\134x", "/\\x"), ("/\\9zz", "/\\9zz")]
        {
            assert_eq!(unescaped(escaped), Path::new(plain));
        }
    }

    #[test]
    fn version_1_has_a_group_for_each_controller() {
        let wish = wish(Version::V1, &[("cpuset.cpus", "0"), ("cpu.shares", "2"), ("cpuset.mems", "0")]);
        let plans = plan_v1(&wish, &host(MOUNTS)).unwrap();
        let hierarchies: Vec<_> = plans.iter().map(|plan| plan.hierarchy.to_str().unwrap()).collect();
        assert_eq!(hierarchies, ["/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/cpuset"]);
        assert!(matches!(&plans[1].kind, Kind::Single(settings) if settings.len() == 2));
    }

    #[test]
    fn a_controller_that_is_not_there_is_named() {
        let error = plan_v1(&wish(Version::V1, &[("memory.limit_in_bytes", "1")]), &host(MOUNTS))
            .unwrap_err()
            .to_string();
        assert!(error.contains("--cgroup memory.*"), "{error}");
        let error = plan_v2(&wish(Version::V2, &[("memory.max", "1")]), &host("")).unwrap_err().to_string();
        assert!(error.contains("no version 2 hierarchy"), "{error}");
    }

    #[test]
    fn version_2_without_settings_is_the_parent_where_it_is_there() {
        let mut wish = wish(Version::V2, &[]);
        let place = tempfile::tempdir().unwrap();
        let mounts = format!("cgroup2 {} cgroup2 rw 0 0\n", place.path().display());
        let enter = |wish: &Cgroups| enter(&plan_v2(wish, &host(&mounts)).unwrap(), "vm");

        let error = enter(&wish).unwrap_err().to_string();
        assert!(error.contains("--parent-cgroup a/b"), "{error}");
        wish.is_parent_given = false;
        enter(&wish).unwrap();
        assert_eq!(plan_v2(&wish, &host("")).unwrap(), []);

        fs::create_dir_all(place.path().join("a/b")).unwrap();
        fs::write(place.path().join("a/b/cgroup.procs"), "").unwrap();
        enter(&wish).unwrap();
        assert_eq!(fs::read_to_string(place.path().join("a/b/cgroup.procs")).unwrap(), "0");
        assert!(!place.path().join("a/b/vm").exists());
    }

    /// Directories and files stand for a hierarchy.
    #[test]
    fn version_2_with_settings_is_a_new_group_whose_parents_pass_the_controllers_on() {
        let place = tempfile::tempdir().unwrap();
        let at = |path: &str| place.path().join(path);
        fs::create_dir_all(at("a/b/vm")).unwrap();
        fs::write(at("cgroup.controllers"), "cpu memory\n").unwrap();
        for file in ["cgroup.subtree_control", "a/cgroup.subtree_control", "a/b/cgroup.subtree_control"] {
            fs::write(at(file), "").unwrap();
        }
        for file in ["a/b/vm/memory.max", "a/b/vm/cgroup.procs", "a/b/vm/cgroup.max.depth"] {
            fs::write(at(file), "").unwrap();
        }
        let mounts = format!("cgroup2 {} cgroup2 rw 0 0\n", place.path().display());
        let wished = wish(Version::V2, &[("memory.max", "1G"), ("cgroup.max.depth", "0")]);
        enter(&plan_v2(&wished, &host(&mounts)).unwrap(), "vm").unwrap();
        let text = |path: &str| fs::read_to_string(at(path)).unwrap();
        for group in ["", "a/", "a/b/"] {
            assert_eq!(text(&format!("{group}cgroup.subtree_control")), "+memory");
        }
        assert_eq!((text("a/b/vm/memory.max"), text("a/b/vm/cgroup.max.depth")), ("1G".into(), "0".into()));
        assert_eq!(text("a/b/vm/cgroup.procs"), "0");

        let wished = wish(Version::V2, &[("io.max", "1")]);
        let error = plan_v2(&wished, &host(&mounts)).unwrap_err().to_string();
        assert!(error.contains("--cgroup io.*") && error.contains("cpu memory"), "{error}");
    }

    #[test]
    fn a_cpuset_of_version_1_gets_what_its_parent_has() {
        let place = tempfile::tempdir().unwrap();
        let at = |path: &str| place.path().join(path);
        fs::create_dir_all(at("a/b/vm")).unwrap();
        for (group, cpus) in [("", "0-1\n"), ("a/", "\n"), ("a/b/", ""), ("a/b/vm/", "")] {
            fs::write(at(&format!("{group}cpuset.cpus")), cpus).unwrap();
            fs::write(at(&format!("{group}cpuset.mems")), "0\n").unwrap();
        }
        fs::write(at("a/b/vm/cgroup.procs"), "").unwrap();
        let mounts = format!("cgroup {} cgroup rw,cpuset 0 0\n", place.path().display());
        enter(&plan_v1(&wish(Version::V1, &[("cpuset.cpus", "1")]), &host(&mounts)).unwrap(), "vm").unwrap();
        assert_eq!(fs::read_to_string(at("a/b/cpuset.cpus")).unwrap(), "0-1");
        // What was inherited was replaced; a plain file keeps its tail.
        assert_eq!(fs::read_to_string(at("a/b/vm/cpuset.cpus")).unwrap(), "1-1");
    }
}
