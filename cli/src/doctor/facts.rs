//! What there is on this host, found by looking and by trying. No judgement: `verdict.rs` has that.
//!
//! Nothing is changed: what a try makes goes away with it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use api_socket::ClientError;
use api_socket::fleet::Client;
use io_uring::IoUring;
use rustix::fs::statfs;
use rustix::process::Resource;

use super::calls;
use super::ruleset::{self, Chain};

pub const KVM: &str = "/dev/kvm";
pub const TUN: &str = "/dev/net/tun";
pub const VHOST_NET: &str = "/dev/vhost-net";
pub const USERFAULTFD: &str = "/dev/userfaultfd";
pub const CONTROL_GROUPS: &str = "/sys/fs/cgroup";
pub const STATE: &str = "/var/lib/berth";
/// Whose members may use berthd.
pub const GROUP: &str = "berth";
/// Of guests' network, unless berthd.toml names another.
pub const BRIDGE: &str = "berth0";
pub const VMM: &str = "berth-vmm";
pub const JAILER: &str = "berth-jailer";

const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
const TRANSPARENT: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
/// What a cell is made of.
const NAMESPACES: [&str; 6] = ["cgroup", "ipc", "mnt", "net", "pid", "uts"];
/// Where programs are, beside `PATH`: an ordinary user's leaves the last two out.
const PLACES: [&str; 5] = ["/usr/local/bin", "/usr/bin", "/usr/lib/berth", "/usr/sbin", "/sbin"];
/// berthd answers within milliseconds; the rest is for one that systemd starts for us at this moment.
const PATIENCE: Duration = Duration::from_secs(2);
/// What nft needs for more rules than hosts have.
const LISTING: Duration = Duration::from_secs(10);
/// The most of its rules that is read, in bytes.
const MAX_LISTING: u64 = 64 << 20;
/// The most of a file of the kernel's that is read.
const MAX_FILE: u64 = 1 << 20;

/// Why something cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It is not there.
    Absent,
    /// Not for us.
    Denied,
    Other(String),
}

impl Trouble {
    pub fn of(error: &io::Error) -> Trouble {
        match error.kind() {
            io::ErrorKind::NotFound => Trouble::Absent,
            io::ErrorKind::PermissionDenied => Trouble::Denied,
            // A device node without its driver.
            _ if [Some(libc::ENODEV), Some(libc::ENXIO)].contains(&error.raw_os_error()) => Trouble::Absent,
            _ => Trouble::Other(error.to_string()),
        }
    }
}

/// What came of a try.
pub type Tried = Result<(), Trouble>;

/// Who may open a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    pub owner: u32,
    /// Its name; its number where it has none.
    pub group: String,
    /// The permission bits.
    pub mode: u32,
}

/// Control groups as they are mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlGroups {
    /// Whether version 2 is what is mounted there.
    pub is_version_2: bool,
    pub controllers: Vec<String>,
}

/// All that is looked at, in the order of the report.
#[derive(Clone, Debug)]
pub struct Facts {
    pub is_root: bool,
    /// Major and minor, and the whole release.
    pub kernel: (Option<(u32, u32)>, String),
    /// The processor says that it can run guests.
    pub has_virtualization: bool,
    pub kvm: Tried,
    pub kvm_access: Option<Access>,
    pub vmm: Option<PathBuf>,
    pub jailer: Option<PathBuf>,
    pub control_groups: ControlGroups,
    /// Those of [`NAMESPACES`] that the kernel does not have, or does not let anybody make.
    pub missing_namespaces: Vec<String>,
    /// Whether they can be made, where we may try.
    pub namespaces: Option<Tried>,
    pub seccomp_actions: Option<String>,
    pub landlock: Option<u32>,
    pub tun: Tried,
    pub vhost_net: Tried,
    pub io_uring: Tried,
    pub userfaultfd: Tried,
    /// Reserved, and of these free; `None` where the kernel has none of 2 MiB.
    pub huge_pages: Option<(u64, u64)>,
    pub transparent_huge_pages: Option<String>,
    pub ip: Option<PathBuf>,
    pub nft: Option<PathBuf>,
    /// What may drop what guests send elsewhere, where we may look.
    pub droppers: Option<Result<Vec<Chain>, Trouble>>,
    /// Where guests' disks are or will be, and the bytes free there.
    pub space: (PathBuf, Result<u64, Trouble>),
    /// Most files that a process may be given.
    pub open_files: Option<u64>,
    pub socket: PathBuf,
    /// Whether it answers. That its socket is there says little: it is systemd's.
    pub berthd: Tried,
    /// Whether we are in the group; `None` where there is none.
    pub is_member: Option<bool>,
    /// Our name, for commands that mend.
    pub user: String,
}

impl Facts {
    /// Looks and tries; takes some milliseconds, and some seconds where KVM or berthd hangs.
    pub fn find(socket: &Path) -> Facts {
        let is_root = rustix::process::geteuid().is_root();
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let groups = read("/etc/group");
        let nft = program("nft");
        Facts {
            is_root,
            kernel: (version(&release), release),
            has_virtualization: has_virtualization(&read("/proc/cpuinfo")),
            kvm: calls::run_guest(),
            kvm_access: access(Path::new(KVM), &groups),
            vmm: program(VMM),
            jailer: program(JAILER),
            control_groups: control_groups(Path::new(CONTROL_GROUPS)),
            missing_namespaces: missing_namespaces(),
            namespaces: is_root.then(|| tried(calls::make_namespaces())),
            seccomp_actions: fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").ok(),
            landlock: calls::landlock(),
            tun: tun(is_root),
            vhost_net: open(VHOST_NET),
            io_uring: tried(make_ring()),
            userfaultfd: open(USERFAULTFD),
            huge_pages: huge_pages(),
            transparent_huge_pages: fs::read_to_string(TRANSPARENT).ok().and_then(|text| chosen(&text)),
            ip: program("ip"),
            droppers: nft.as_deref().filter(|_| is_root).map(droppers),
            nft,
            space: space(Path::new(STATE)),
            open_files: rustix::process::getrlimit(Resource::Nofile).maximum,
            socket: socket.to_path_buf(),
            berthd: ask(socket, PATIENCE),
            is_member: group_id(&groups, GROUP).map(is_member),
            user: std::env::var("USER").ok().filter(|name| is_plain(name)).unwrap_or_else(|| "USER".into()),
        }
    }
}

fn tried(outcome: io::Result<()>) -> Tried {
    outcome.map_err(|error| Trouble::of(&error))
}

fn open(path: &str) -> Tried {
    tried(File::options().read(true).write(true).open(path).map(drop))
}

/// What this work gives, if it gives it in time. What hangs keeps its thread until this process ends, which is soon.
pub(super) fn within<T: Send + 'static>(
    patience: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (done, outcome) = channel();
    std::thread::spawn(move || done.send(work()));
    outcome.recv_timeout(patience).ok()
}

fn droppers(nft: &Path) -> Result<Vec<Chain>, Trouble> {
    let mut command = Command::new(nft);
    command.args(["--json", "--terse", "list", "ruleset"]);
    let listing = said(command, LISTING)?;
    ruleset::droppers(&listing, BRIDGE)
        .map_err(|error| Trouble::Other(format!("what it says is not understood: {error}")))
}

/// What a command of the host's writes, if it ends well and in time.
fn said(mut command: Command, patience: Duration) -> Result<String, Trouble> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| Trouble::of(&error))?;
    let output = child.stdout.take();
    let text = within(patience, move || {
        let mut text = String::new();
        let read = output.map_or(Ok(0), |output| output.take(MAX_LISTING).read_to_string(&mut text));
        read.map(|_| text)
    });
    if text.is_none() {
        let _ = child.kill();
    }
    let status = child.wait().map_err(|error| Trouble::of(&error))?;
    match text {
        Some(text) if status.success() => text.map_err(|error| Trouble::of(&error)),
        Some(_) => Err(Trouble::Other(format!("it fails: {status}"))),
        None => Err(Trouble::Other(format!("it does not end within {} s", patience.as_secs_f32()))),
    }
}

fn ask(socket: &Path, patience: Duration) -> Tried {
    let other = |why: String| Err(Trouble::Other(why));
    let daemon = Client::new(socket);
    // A client's own limit is none for its connection: one to a queue that is full waits.
    let Some(answer) = within(patience, move || daemon.version()) else {
        return other(format!("it does not answer within {} s", patience.as_secs_f32()));
    };
    match answer {
        Ok(_) => Ok(()),
        Err(ClientError::Io { source, .. }) => match source.kind() {
            io::ErrorKind::UnexpectedEof => other("it goes away without an answer".into()),
            io::ErrorKind::InvalidData => other(format!("its answer is not understood: {source}")),
            _ => Err(Trouble::of(&source)),
        },
        Err(ClientError::Protocol(why)) => other(format!("its answer is not understood: {why}")),
        Err(ClientError::Refused(fault)) => other(fault.message),
        Err(ClientError::Source(error)) => other(error.to_string()),
    }
}

/// The text of one of the kernel's files, or nothing.
fn read(path: &str) -> String {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE).read_to_string(&mut text));
    read.map(|_| text).unwrap_or_default()
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn has_virtualization(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

fn access(path: &Path, groups: &str) -> Option<Access> {
    let metadata = fs::metadata(path).ok()?;
    let group = group_name(groups, metadata.gid()).unwrap_or_else(|| metadata.gid().to_string());
    Some(Access { owner: metadata.uid(), group, mode: metadata.permissions().mode() & 0o777 })
}

/// The lines of a group file: name and number.
fn groups_of(text: &str) -> impl Iterator<Item = (&str, u32)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        Some((name, fields.nth(1)?.parse().ok()?))
    })
}

fn group_name(text: &str, id: u32) -> Option<String> {
    groups_of(text).find(|(_, number)| *number == id).map(|(name, _)| name.to_string())
}

fn group_id(text: &str, wanted: &str) -> Option<u32> {
    groups_of(text).find(|(name, _)| *name == wanted).map(|(_, number)| number)
}

fn is_member(group: u32) -> bool {
    let own = rustix::process::getegid().as_raw() == group;
    own || rustix::process::getgroups().is_ok_and(|groups| groups.iter().any(|gid| gid.as_raw() == group))
}

/// Fit for a command that somebody may paste into a shell.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

/// A program that can be executed: beside this one first, as in a build, then in `PATH` and where packages put it.
fn program(name: &str) -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|own| own.parent().map(Path::to_path_buf));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = beside.into_iter().chain(std::env::split_paths(&path)).chain(PLACES.map(PathBuf::from));
    find(name.as_ref(), places)
}

fn find(name: &OsStr, places: impl Iterator<Item = PathBuf>) -> Option<PathBuf> {
    const ANY_EXECUTES: u32 = 0o111;
    places.filter(|place| place.is_absolute()).map(|place| place.join(name)).find(|path| {
        fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & ANY_EXECUTES != 0)
    })
}

fn control_groups(mount: &Path) -> ControlGroups {
    /// statfs(2).
    const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;
    let is_version_2 =
        statfs(mount).is_ok_and(|found| u64::try_from(found.f_type) == Ok(CGROUP2_SUPER_MAGIC));
    let text = fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
    ControlGroups { is_version_2, controllers: text.split_whitespace().map(str::to_string).collect() }
}

fn missing_namespaces() -> Vec<String> {
    let is_missing = |name: &str| {
        let none_allowed = read(&format!("/proc/sys/user/max_{name}_namespaces")).trim() == "0";
        none_allowed || fs::symlink_metadata(format!("/proc/self/ns/{name}")).is_err()
    };
    NAMESPACES.into_iter().filter(|name| is_missing(name)).map(str::to_string).collect()
}

/// Whoever is not root makes no tap, so that opening is all that can be tried.
fn tun(is_root: bool) -> Tried {
    tried(File::options().read(true).write(true).open(TUN).and_then(|file| match is_root {
        true => calls::make_tap(&file),
        false => Ok(()),
    }))
}

/// As the engine Async makes one: it can do nothing before it is told what it may do.
fn make_ring() -> io::Result<()> {
    let ring: IoUring = IoUring::builder().setup_r_disabled().build(1)?;
    ring.submitter().register_enable_rings()
}

fn huge_pages() -> Option<(u64, u64)> {
    let number = |name: &str| read(&format!("{HUGE_PAGES}/{name}")).trim().parse().ok();
    Some((number("nr_hugepages")?, number("free_hugepages")?))
}

/// The word in brackets, as the kernel marks the choice that is in force.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word.to_string())
}

/// The directory or, where it is not there yet, the nearest one above it.
fn space(wanted: &Path) -> (PathBuf, Result<u64, Trouble>) {
    let place = wanted.ancestors().find(|path| path.is_dir()).unwrap_or(wanted);
    let free = rustix::fs::statvfs(place).map(|found| found.f_bavail.saturating_mul(found.f_frsize));
    (place.to_path_buf(), free.map_err(|error| Trouble::of(&error.into())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    #[test]
    fn releases_begin_with_two_numbers() {
        assert_eq!(version("6.1.0-25-amd64"), Some((6, 1)));
        assert_eq!(version("5.10.230"), Some((5, 10)));
        assert_eq!(version("6.1-rc2"), Some((6, 1)));
        assert_eq!(version("six"), None);
        assert_eq!(version("6"), None);
    }

    #[test]
    fn a_processor_that_runs_guests_has_a_flag() {
        assert!(has_virtualization("model name : x\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualization("flags\t\t: fpu svm\n"));
        assert!(!has_virtualization("flags\t\t: fpu vmxoff\nbugs : vmx\n"));
        assert!(!has_virtualization(""));
    }

    #[test]
    fn groups_are_found_by_name_and_number_and_broken_lines_passed_over() {
        let text = "root:x:0:\nbroken\nkvm:x:106:alice,bob\nodd:x:many:\nberth:x:990:alice\n";
        assert_eq!(group_name(text, 106).as_deref(), Some("kvm"));
        assert_eq!(group_name(text, 1), None);
        assert_eq!(group_id(text, "berth"), Some(990));
        assert_eq!(group_id(text, "odd"), None);
    }

    #[test]
    fn a_program_is_a_file_that_can_be_executed_and_the_first_one_counts() {
        let [first, second] = [(), ()].map(|()| tempfile::tempdir().unwrap());
        let places = || [first.path().to_path_buf(), second.path().to_path_buf()].into_iter();
        let program = |at: &tempfile::TempDir, mode| {
            let path = at.path().join("tool");
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        assert_eq!(find("tool".as_ref(), places()), None);
        program(&first, 0o644);
        let executable = program(&second, 0o755);
        assert_eq!(find("tool".as_ref(), places()), Some(executable));
        let executable = program(&first, 0o755);
        assert_eq!(find("tool".as_ref(), places()), Some(executable));
        assert_eq!(find("tool".as_ref(), ["".into()].into_iter()), None);
    }

    #[test]
    fn the_kernels_files_are_read_as_it_writes_them() {
        assert_eq!(chosen("always [madvise] never\n").as_deref(), Some("madvise"));
        assert_eq!(chosen("always"), None);
    }

    #[test]
    fn what_is_not_mounted_is_no_control_group() {
        let nothing = tempfile::tempdir().unwrap();
        let expected = ControlGroups { is_version_2: false, controllers: vec![] };
        assert_eq!(control_groups(nothing.path()), expected);
    }

    #[test]
    fn space_is_told_of_the_nearest_directory_that_is_there() {
        let there = tempfile::tempdir().unwrap();
        let (place, free) = space(&there.path().join("not/yet"));
        assert_eq!(place, there.path());
        assert!(free.unwrap() > 0);
    }

    #[test]
    fn a_socket_where_nobody_answers_is_not_a_daemon() {
        let here = tempfile::tempdir().unwrap();
        let ask = |name: &str| ask(&here.path().join(name), Duration::from_millis(50));
        let trouble = |why: &str| Err(Trouble::Other(why.into()));
        assert_eq!(ask("none"), Err(Trouble::Absent));

        // As systemd's is while the daemon hangs.
        let silent = UnixListener::bind(here.path().join("silent")).unwrap();
        assert_eq!(ask("silent"), trouble("it does not answer within 0.05 s"));
        drop(silent);
        assert!(matches!(ask("silent"), Err(Trouble::Other(_))));

        for (name, reply, expected) in [
            ("gone", "", "it goes away without an answer"),
            ("odd", "220 mail.example.org\r\n\r\n", "its answer is not understood: "),
            ("refusal", "HTTP/1.1 503 x\r\nContent-Length: 0\r\n\r\n", "status 503 without a reason"),
        ] {
            let listener = UnixListener::bind(here.path().join(name)).unwrap();
            let answers = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.read(&mut [0; 1024]).unwrap();
                stream.write_all(reply.as_bytes()).unwrap();
            });
            match super::ask(&here.path().join(name), Duration::from_secs(30)) {
                Err(Trouble::Other(why)) => assert!(why.starts_with(expected), "{name}: {why}"),
                other => panic!("{name}: {other:?}"),
            }
            answers.join().unwrap();
        }
    }

    #[test]
    fn a_command_is_heard_that_ends_well_and_in_time() {
        let said = |script: &str, patience| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            said(command, patience)
        };
        let long = Duration::from_secs(30);
        assert_eq!(said("echo rules; echo why >&2", long), Ok("rules\n".into()));
        let trouble = |why: &str| Err(Trouble::Other(why.into()));
        assert_eq!(said("echo rules; exit 1", long), trouble("it fails: exit status: 1"));
        assert_eq!(
            said("exec sleep 60", Duration::from_millis(50)),
            trouble("it does not end within 0.05 s")
        );
        assert_eq!(super::said(Command::new("/nowhere/nft"), long), Err(Trouble::Absent));
    }

    #[test]
    fn trouble_is_told_by_its_kind() {
        let of = |errno| Trouble::of(&io::Error::from_raw_os_error(errno));
        for errno in [libc::ENOENT, libc::ENODEV, libc::ENXIO] {
            assert_eq!(of(errno), Trouble::Absent);
        }
        assert_eq!(of(libc::EACCES), Trouble::Denied);
        assert_eq!(of(libc::EPERM), Trouble::Denied);
        assert!(matches!(of(libc::EIO), Trouble::Other(_)));
    }

    #[test]
    fn only_a_name_that_a_shell_takes_as_it_is_goes_into_a_command() {
        assert!(is_plain("alice-2"));
        assert!(!is_plain("") && !is_plain("a;rm") && !is_plain("$(x)"));
    }
}
