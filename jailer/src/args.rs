//! The command line, which is that of Firecracker's jailer, and what our exit codes mean.
//!
//! Pure: no file is opened and nothing is written. `flags` has the table that `--help` and the parser both read.

mod flags;

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::path::{Component, Path, PathBuf};

use flags::Given;
use rustix::fs::{Gid, Uid};

/// The release of Firecracker whose jailer we follow.
pub const COMPATIBLE_VERSION: &str = "1.17.0";
/// Our own release.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The longest `--id`, in characters.
pub const MAX_ID_LENGTH: usize = 64;
/// `--chroot-base-dir` when none is given.
pub const DEFAULT_BASE: &str = "/srv/jailer";
/// `--resource-limit no-file` when none is given.
pub const DEFAULT_FILES: u64 = 2048;
/// The smallest `--resource-limit fsize`, in bytes: the pid file is written under it.
pub const MIN_FILE_BYTES: u64 = 16;

/// How often `--file` and `--fd` may be given together, as the VMM's `--fd`.
pub const MAX_HANDED: usize = 64;
/// The longest name of a file that is handed over, in characters.
pub const MAX_HANDED_NAME_LENGTH: usize = 64;

/// Who we are, by the file name we were started under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    Berth,
    /// Started under the name `jailer`, by a link: the version text and the exit codes are those of Firecracker's.
    Jailer,
}

/// What the process exits with as long as it is not the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// Something was printed, or the VMM runs and this was only the process that started it.
    Ok = 0,
    /// Anything else, under the name of Firecracker's jailer.
    Generic = 1,
    /// There is no cell, and no VMM was started. The VMM has no such exit code.
    NoCell = 140,
    /// A command line that cannot be obeyed, as with the VMM.
    BadArguments = 153,
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code as u8)
    }
}

impl Identity {
    /// The identity that goes with an `argv[0]`.
    pub fn of(argv0: &OsStr) -> Identity {
        match Path::new(argv0).file_name() {
            Some(name) if name == "jailer" => Identity::Jailer,
            _ => Identity::Berth,
        }
    }

    /// Starts each message.
    pub fn name(self) -> &'static str {
        match self {
            Identity::Berth => "berth-jailer",
            Identity::Jailer => "jailer",
        }
    }

    /// This code, or the one that Firecracker's jailer has for everything.
    pub fn exit_code(self, code: ExitCode) -> ExitCode {
        match (self, code) {
            (_, ExitCode::Ok) => ExitCode::Ok,
            (Identity::Jailer, _) => ExitCode::Generic,
            (Identity::Berth, code) => code,
        }
    }

    fn version_text(self) -> String {
        match self {
            Identity::Berth => format!("berth-jailer {VERSION}\n"),
            Identity::Jailer => format!("Jailer v{COMPATIBLE_VERSION}\nThis is berth-jailer {VERSION}.\n"),
        }
    }
}

/// What a command line asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    Confine(Box<Args>),
    Remove(Removal),
    /// Write this to standard output and exit with [`ExitCode::Ok`].
    Print(String),
}

/// A command line that asks for a cell.
#[derive(Clone, Debug, PartialEq)]
pub struct Args {
    /// Letters, digits and hyphens, at most [`MAX_ID_LENGTH`].
    pub id: String,
    /// The VMM's program.
    pub program: PathBuf,
    /// The last part of that path as it was given; a link goes by its own name, which tells the VMM who to be.
    pub program_name: OsString,
    /// Whom the VMM runs as. `None` only with `rootless`: the caller.
    pub user: Option<(Uid, Gid)>,
    /// Build the cell as an ordinary user.
    pub rootless: bool,
    /// Where cells are made.
    pub base: PathBuf,
    /// A network namespace's file.
    pub netns: Option<PathBuf>,
    pub daemonize: bool,
    pub new_session: bool,
    /// Always with `rootless`.
    pub new_pid_ns: bool,
    pub cgroups: Cgroups,
    pub limits: Limits,
    /// The cell has /dev/vhost-net too.
    pub vhost_net: bool,
    /// At most [`MAX_HANDED`], names and numbers all different.
    pub handed: Vec<Handed>,
    /// What comes after `--`.
    pub vmm_arguments: Vec<OsString>,
}

/// A cell whose VMM has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Removal {
    pub id: String,
    /// As in [`Args`].
    pub program_name: OsString,
    pub base: PathBuf,
    pub cgroups: Cgroups,
}

/// Which control group the VMM gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroups {
    pub version: Version,
    /// Relative, of plain names.
    pub parent: PathBuf,
    /// Whether the parent was named, and is not the program's name for want of another.
    pub is_parent_given: bool,
    pub settings: Vec<Setting>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    V1,
    V2,
}

/// A control file of a group and what is written to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// `<controller>.<rest>`.
    pub file: String,
    pub value: String,
}

impl Setting {
    /// The controller that the file belongs to.
    pub fn controller(&self) -> &str {
        self.file.split('.').next().unwrap_or_default()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// One more than the highest descriptor.
    pub files: u64,
    /// The size that a file can be made to grow to.
    pub file_bytes: Option<u64>,
}

/// A file that the VMM gets as an open descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handed {
    /// For the VMM's API, which calls it `fd:<name>`.
    pub name: String,
    pub source: Source,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// To be opened, as who we are in the beginning.
    Path { path: PathBuf, is_read_only: bool },
    /// Left open by the caller; above those of the standard streams.
    Descriptor(RawFd),
}

/// A command line that cannot be obeyed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgsError {
    #[error("there is no flag {0}; --help lists those there are, and what follows -- is for the VMM")]
    Unknown(String),
    #[error("--{0} was given twice; give it once")]
    Twice(&'static str),
    #[error("--{0} wants a value: {1}")]
    NoValue(&'static str, &'static str),
    #[error("--{0} takes no value, and has {1:?}")]
    Value(&'static str, String),
    #[error("--{0} is needed: {1}")]
    Missing(&'static str, &'static str),
    #[error("--{0} and --{1} do not go together: {2}")]
    Conflict(&'static str, &'static str, &'static str),
    #[error("--{flag} is {value:?}, {rule}")]
    Invalid { flag: &'static str, value: String, rule: &'static str },
}

/// Parses a whole command line, `argv[0]` first.
///
/// # Errors
/// See [`ArgsError`]. Where several things are wrong, the first is named.
pub fn parse(argv: impl IntoIterator<Item = OsString>) -> Result<Command, ArgsError> {
    let argv: Vec<OsString> = argv.into_iter().collect();
    let identity = Identity::of(argv.first().map_or(OsStr::new(""), OsString::as_os_str));
    let given = Given::read(argv)?;
    if given.has("help") {
        return Ok(Command::Print(flags::help(identity)));
    }
    if given.has("version") {
        return Ok(Command::Print(identity.version_text()));
    }
    match given.has("remove") {
        true => Ok(Command::Remove(removal(&given)?)),
        false => Ok(Command::Confine(Box::new(args(given)?))),
    }
}

/// Other flags of the start say nothing about what it left.
fn removal(given: &Given) -> Result<Removal, ArgsError> {
    let program_name = program_name(Path::new(given.needed("exec-file")?))?;
    let cgroups = cgroups(given, &program_name)?;
    Ok(Removal { id: id(given)?, program_name, base: base(given), cgroups })
}

fn args(given: Given) -> Result<Args, ArgsError> {
    let program = PathBuf::from(given.needed("exec-file")?);
    let program_name = program_name(&program)?;
    let rootless = given.has("rootless");
    if rootless && given.has("netns") {
        let why = "an ordinary user cannot enter one; start the jailer in it";
        return Err(ArgsError::Conflict("rootless", "netns", why));
    }
    Ok(Args {
        id: id(&given)?,
        user: user(&given, rootless)?,
        rootless,
        base: base(&given),
        netns: given.last("netns").map(PathBuf::from),
        daemonize: given.has("daemonize"),
        new_session: given.has("new-session"),
        // The VMM has the user's number, and could signal all of the user's processes that it can name.
        new_pid_ns: given.has("new-pid-ns") || rootless,
        cgroups: cgroups(&given, &program_name)?,
        limits: limits(&given)?,
        vhost_net: given.has("vhost-net"),
        handed: handed(&given)?,
        program,
        program_name,
        vmm_arguments: given.rest,
    })
}

fn base(given: &Given) -> PathBuf {
    given.last("chroot-base-dir").map_or_else(|| DEFAULT_BASE.into(), PathBuf::from)
}

fn id(given: &Given) -> Result<String, ArgsError> {
    let id = given.needed("id")?.to_string_lossy().into_owned();
    let legal = id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    match legal && !id.is_empty() && id.len() <= MAX_ID_LENGTH {
        true => Ok(id),
        false => invalid("id", id, "an id has 1 to 64 letters, digits and hyphens"),
    }
}

fn program_name(program: &Path) -> Result<OsString, ArgsError> {
    // The last part, also before a slash; nothing of `/` and `..`.
    match program.file_name() {
        Some(name) => Ok(name.to_owned()),
        None => invalid("exec-file", program.display().to_string(), "name the VMM's program, a file"),
    }
}

fn user(given: &Given, rootless: bool) -> Result<Option<(Uid, Gid)>, ArgsError> {
    if rootless && !given.has("uid") && !given.has("gid") {
        return Ok(None);
    }
    let (uid, gid) = (number_of_user(given, "uid")?, number_of_user(given, "gid")?);
    Ok(Some((Uid::from_raw(uid), Gid::from_raw(gid))))
}

/// A user or group, by number: a host's names mean nothing in a cell.
fn number_of_user(given: &Given, flag: &'static str) -> Result<u32, ArgsError> {
    let text = given.needed(flag)?.to_string_lossy().into_owned();
    match text.parse() {
        // For the kernel, the largest number is no user but "leave it as it is".
        Ok(number) if number != u32::MAX => Ok(number),
        _ => invalid(flag, text, "give a number from 0 to 4294967294"),
    }
}

fn cgroups(given: &Given, program_name: &OsStr) -> Result<Cgroups, ArgsError> {
    let version = match given.last("cgroup-version").map(|version| version.to_string_lossy()) {
        None => Version::V1,
        Some(version) if version == "1" => Version::V1,
        Some(version) if version == "2" => Version::V2,
        Some(other) => return invalid("cgroup-version", other.into_owned(), "it is 1 or 2"),
    };
    let named = given.last("parent-cgroup");
    let parent = PathBuf::from(named.unwrap_or(program_name));
    let is_plain = parent.components().all(|part| matches!(part, Component::Normal(_)));
    let is_one_line = !parent.as_os_str().as_encoded_bytes().contains(&b'\n');
    if !is_plain || !is_one_line || parent.as_os_str().is_empty() {
        let rule =
            "give names with slashes between them, below the root of the control groups, without . and ..";
        return invalid("parent-cgroup", parent.display().to_string(), rule);
    }
    let settings = given.all("cgroup").map(setting).collect::<Result<_, _>>()?;
    Ok(Cgroups { version, parent, is_parent_given: named.is_some(), settings })
}

fn setting(text: &OsStr) -> Result<Setting, ArgsError> {
    let rule = "give <controller>.<file>=<value>, such as memory.max=512M or cpuset.cpus=0-1";
    let parsed = text.to_str().and_then(|text| text.split_once('='));
    match parsed {
        // Values may hold more of them: io.max=8:0 rbps=1048576.
        Some((file, value)) if is_control_file(file) && !value.is_empty() => {
            Ok(Setting { file: file.into(), value: value.into() })
        }
        _ => invalid("cgroup", text.to_string_lossy().into_owned(), rule),
    }
}

fn is_control_file(file: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let both_sides =
        file.split_once('.').is_some_and(|(controller, rest)| !controller.is_empty() && !rest.is_empty());
    both_sides && file.bytes().all(legal)
}

fn limits(given: &Given) -> Result<Limits, ArgsError> {
    let mut limits = Limits { files: DEFAULT_FILES, file_bytes: None };
    for text in given.all("resource-limit") {
        let text = text.to_string_lossy();
        let parsed = text.split_once('=').and_then(|(name, value)| Some((name, value.parse().ok()?)));
        match parsed {
            Some(("no-file", files)) => limits.files = files,
            Some(("fsize", bytes)) if bytes >= MIN_FILE_BYTES => limits.file_bytes = Some(bytes),
            _ => {
                let rule = "give fsize=<bytes, at least 16> or no-file=<number>";
                return invalid("resource-limit", text.into_owned(), rule);
            }
        }
    }
    Ok(limits)
}

fn handed(given: &Given) -> Result<Vec<Handed>, ArgsError> {
    let files = given.all("file").map(|text| named("file", text, file_source));
    let descriptors = given.all("fd").map(|text| named("fd", text, descriptor_source));
    let handed: Vec<_> = files.chain(descriptors).collect::<Result<_, _>>()?;
    let names: BTreeSet<_> = handed.iter().map(|handed| &handed.name).collect();
    let numbers: Vec<_> = handed.iter().filter_map(Handed::number).collect();
    let distinct: BTreeSet<_> = numbers.iter().collect();
    if handed.len() > MAX_HANDED || names.len() < handed.len() || distinct.len() < numbers.len() {
        let why = "each name and each number may be given once, and 64 in all";
        return Err(ArgsError::Conflict("file", "fd", why));
    }
    Ok(handed)
}

impl Handed {
    /// The descriptor that the caller left open.
    pub fn number(&self) -> Option<RawFd> {
        match self.source {
            Source::Descriptor(number) => Some(number),
            Source::Path { .. } => None,
        }
    }
}

const HANDED_RULE: &str = "give NAME=PATH, NAME=PATH:ro or, with --fd, NAME=NUMBER, a number from 3 on; a name has 1 to \
                           64 letters, digits, hyphens, underscores and dots";

fn named(
    flag: &'static str,
    text: &OsStr,
    source: impl FnOnce(&[u8]) -> Option<Source>,
) -> Result<Handed, ArgsError> {
    let bytes = text.as_encoded_bytes();
    let legal = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
    let length = bytes.iter().take_while(|byte| legal(byte)).count();
    let parsed = bytes.split_at_checked(length).and_then(|(name, rest)| {
        let name = std::str::from_utf8(name).ok()?.to_owned();
        let source = source(rest.strip_prefix(b"=")?)?;
        (1..=MAX_HANDED_NAME_LENGTH).contains(&name.len()).then_some(Handed { name, source })
    });
    parsed.map_or_else(|| invalid(flag, text.to_string_lossy().into_owned(), HANDED_RULE), Ok)
}

fn file_source(text: &[u8]) -> Option<Source> {
    use std::os::unix::ffi::OsStrExt;
    let (path, is_read_only) = text.strip_suffix(b":ro").map_or((text, false), |path| (path, true));
    let path = PathBuf::from(OsStr::from_bytes(path));
    (!path.as_os_str().is_empty()).then_some(Source::Path { path, is_read_only })
}

fn descriptor_source(text: &[u8]) -> Option<Source> {
    let number: RawFd = std::str::from_utf8(text).ok()?.parse().ok()?;
    (number > 2).then_some(Source::Descriptor(number))
}

fn invalid<T>(flag: &'static str, value: String, rule: &'static str) -> Result<T, ArgsError> {
    Err(ArgsError::Invalid { flag, value, rule })
}

#[cfg(test)]
mod tests;
