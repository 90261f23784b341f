//! The command line: what it may say, who we are by the name we were started under, and what our exit codes mean.
//!
//! Pure: no file is opened and nothing is written. One table holds the flags; `--help` and the parser both read it.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use api_socket::{LogLevel, Logger};
use lexopt::{Arg, ValueExt};

use crate::vcpu::Ending;

/// The release of Firecracker whose API, flags and metrics we follow.
pub const COMPATIBLE_VERSION: &str = "1.17.0";
/// Our own release.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// `--id` when none is given.
pub const DEFAULT_ID: &str = "anonymous-instance";
/// The longest `--id`, in characters.
pub const MAX_ID_LENGTH: usize = 64;
/// `--http-api-max-payload-size` when none is given, in bytes.
pub const DEFAULT_MAX_PAYLOAD: usize = 51_200;

/// How often `--fd` may be given: twice what a guest can have drives, and a kernel and an initrd.
pub const MAX_FDS: usize = 64;
/// The longest name in an `--fd`, in characters.
pub const MAX_FD_NAME_LENGTH: usize = 64;

/// Who we are, by the file name we were started under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    Berth,
    /// Started under the name `firecracker`, by a link: names, texts, transport and exit codes are those of Firecracker.
    Firecracker,
}

impl Identity {
    /// The identity that goes with an `argv[0]`.
    pub fn of(argv0: &OsStr) -> Identity {
        match Path::new(argv0).file_name() {
            Some(name) if name == "firecracker" => Identity::Firecracker,
            _ => Identity::Berth,
        }
    }

    /// `app_name` of `GET /`.
    pub fn app_name(self) -> &'static str {
        match self {
            Identity::Berth => "Berth",
            Identity::Firecracker => "Firecracker",
        }
    }

    /// `vmm_version` of `GET /`, and what `GET /version` tells.
    pub fn version(self) -> &'static str {
        match self {
            Identity::Berth => VERSION,
            Identity::Firecracker => COMPATIBLE_VERSION,
        }
    }

    /// The name of the process and of its control thread.
    pub fn process_name(self) -> &'static str {
        match self {
            Identity::Berth => "berth-vmm",
            Identity::Firecracker => "firecracker",
        }
    }

    /// The name of the API thread.
    pub fn api_thread(self) -> &'static str {
        match self {
            Identity::Berth => "berth-api",
            Identity::Firecracker => "fc_api",
        }
    }

    /// The name of a vCPU's thread.
    pub fn vcpu_thread(self, index: u8) -> String {
        match self {
            Identity::Berth => format!("berth-vcpu {index}"),
            Identity::Firecracker => format!("fc_vcpu {index}"),
        }
    }

    /// The name of a thread that serves device queues. The first, which every guest has, has no number.
    pub fn io_thread(self, number: u8) -> String {
        let name = match self {
            Identity::Berth => "berth-io",
            Identity::Firecracker => "fc_io",
        };
        if number == 0 { name.to_string() } else { format!("{name} {number}") }
    }

    /// `--api-sock` when none is given.
    pub fn default_api_socket(self) -> &'static str {
        match self {
            Identity::Berth => "/run/berth.socket",
            Identity::Firecracker => "/run/firecracker.socket",
        }
    }

    /// What a guest that ended makes the process exit with. Firecracker does not tell how its guest ended; we do.
    pub fn exit_code(self, ending: &Ending) -> ExitCode {
        match (self, ending) {
            (_, Ending::Failed(_)) => ExitCode::Generic,
            (Identity::Firecracker, _) | (_, Ending::PoweredOff | Ending::Stopped) => ExitCode::Ok,
            (_, Ending::Reset) => ExitCode::GuestReset,
            (_, Ending::TripleFault) => ExitCode::GuestTripleFault,
            (_, Ending::Panicked) => ExitCode::GuestPanicked,
        }
    }

    fn version_text(self) -> String {
        match self {
            Identity::Berth => {
                format!("berth-vmm {VERSION}\nFollows the API of Firecracker v{COMPATIBLE_VERSION}.\n")
            }
            Identity::Firecracker => {
                format!("Firecracker v{COMPATIBLE_VERSION}\nThis is berth-vmm {VERSION}.\n")
            }
        }
    }
}

/// What the process exits with. The numbers from 148 on, and their order, are Firecracker's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    Ok = 0,
    /// The host would not do what was asked of it.
    Generic = 1,
    /// Our own fault.
    Unexpected = 2,
    GuestReset = 3,
    GuestTripleFault = 4,
    GuestPanicked = 5,
    /// A system call that the filter does not allow.
    BadSyscall = 148,
    Sigbus = 149,
    Sigsegv = 150,
    Sigxfsz = 151,
    /// The configuration file, or a guest that could not be made from it.
    BadConfiguration = 152,
    BadArguments = 153,
    Sigxcpu = 154,
    Sigpipe = 155,
    Sighup = 156,
    Sigill = 157,
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code as u8)
    }
}

/// What a command line asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    Run(Box<Args>),
    /// Write this to standard output and exit with [`ExitCode::Ok`].
    Print(String),
}

/// A command line that asks for a guest.
#[derive(Clone, Debug, PartialEq)]
pub struct Args {
    pub identity: Identity,
    /// Letters, digits and hyphens, at most [`MAX_ID_LENGTH`].
    pub id: String,
    /// `None` with `--no-api`.
    pub api: Option<Api>,
    /// A guest to start at once. Always there with `--no-api`.
    pub config_file: Option<PathBuf>,
    /// What the `--log-path`, `--level`, `--module` and `--show-*` flags say, in the form of `PUT /logger`.
    pub log: Logger,
    pub metrics_path: Option<PathBuf>,
    /// Where to tell how the process ended.
    pub exit_status: Option<PathBuf>,
    /// What the guest can read from the metadata service at its start.
    pub metadata: Option<PathBuf>,
    /// The most that the metadata may be, in bytes of JSON.
    pub mmds_limit: usize,
    /// Filters of system calls in place of our own.
    pub seccomp_filter: Option<PathBuf>,
    /// No filters at all.
    pub no_seccomp: bool,
    /// Give the guest a port to say that it has booted.
    pub boot_timer: bool,
    /// Virtio devices on PCI; otherwise on virtio-mmio and the guest is told that there is no PCI.
    pub pci: bool,
    /// Where files may lie that a running guest is given, beside those that it had at its start. Only with [`Args::pci`].
    pub hot_plug_directory: Option<PathBuf>,
    pub start: StartTimes,
    /// Open descriptors by name, at most [`MAX_FDS`]: names and numbers are all different, and no number is that of a
    /// standard stream.
    pub fds: Vec<(String, RawFd)>,
}

/// Where and how the API is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Api {
    pub socket: PathBuf,
    /// The longest request body, in bytes.
    pub max_payload: usize,
}

/// When whoever started us says that the start began, for the metrics. Microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StartTimes {
    /// CLOCK_MONOTONIC.
    pub wall_us: Option<u64>,
    /// CLOCK_PROCESS_CPUTIME_ID, which survives an exec.
    pub cpu_us: Option<u64>,
    /// What the parent had used when it forked.
    pub parent_cpu_us: Option<u64>,
}

/// A command line that cannot be obeyed; the process ends with [`ExitCode::BadArguments`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgsError {
    #[error("there is no flag {0:?}; --help lists those there are")]
    Unknown(String),
    #[error("--{0} was given twice; give it once")]
    Twice(&'static str),
    #[error("--{0} wants a value: {1}")]
    NoValue(&'static str, &'static str),
    #[error("--{0} takes no value, and has {1:?}")]
    Value(&'static str, String),
    #[error("--{flag} is {value:?}, {rule}")]
    Invalid { flag: &'static str, value: String, rule: &'static str },
    #[error("--{0} {1}")]
    Conflict(&'static str, &'static str),
    #[error("--{0} is not supported by this version: {1}")]
    Later(&'static str, &'static str),
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
        return Ok(Command::Print(help(identity)));
    }
    if given.has("version") {
        return Ok(Command::Print(identity.version_text()));
    }
    given.check_later()?;
    Ok(Command::Run(Box::new(args(identity, &given)?)))
}

fn args(identity: Identity, given: &Given) -> Result<Args, ArgsError> {
    let config_file = given.path("config-file");
    let api = api(identity, given)?;
    let max_payload = api.as_ref().map_or(DEFAULT_MAX_PAYLOAD, |api| api.max_payload);
    if api.is_none() && config_file.is_none() {
        return Err(ArgsError::Conflict(
            "no-api",
            "leaves no way to say what to run; give --config-file too",
        ));
    }
    if given.has("no-seccomp") && given.has("seccomp-filter") {
        return Err(ArgsError::Conflict(
            "no-seccomp",
            "leaves out the filters; do not give --seccomp-filter too",
        ));
    }
    let pci = identity == Identity::Berth || given.has("enable-pci");
    if !pci && given.has("hot-plug-directory") {
        return Err(ArgsError::Conflict(
            "hot-plug-directory",
            "is of no use without PCI, where devices can come; give --enable-pci too",
        ));
    }
    Ok(Args {
        identity,
        id: id(given)?,
        api,
        config_file,
        log: Logger {
            log_path: given.path("log-path"),
            level: level(given)?,
            show_level: given.has("show-level").then_some(true),
            show_log_origin: given.has("show-log-origin").then_some(true),
            module: given.text("module")?,
        },
        metrics_path: given.path("metrics-path"),
        exit_status: given.path("exit-status"),
        metadata: given.path("metadata"),
        mmds_limit: given.number("mmds-size-limit")?.unwrap_or(max_payload),
        seccomp_filter: given.path("seccomp-filter"),
        no_seccomp: given.has("no-seccomp"),
        boot_timer: given.has("boot-timer"),
        pci,
        hot_plug_directory: given.path("hot-plug-directory"),
        start: StartTimes {
            wall_us: given.number("start-time-us")?,
            cpu_us: given.number("start-time-cpu-us")?,
            parent_cpu_us: given.number("parent-cpu-time-us")?,
        },
        fds: fds(given)?,
    })
}

fn fds(given: &Given) -> Result<Vec<(String, RawFd)>, ArgsError> {
    let fds: Vec<_> = given.values("fd").map(|text| fd(text)).collect::<Result<_, _>>()?;
    let names: BTreeSet<_> = fds.iter().map(|(name, _)| name).collect();
    let numbers: BTreeSet<_> = fds.iter().map(|(_, number)| number).collect();
    if fds.len() > MAX_FDS || names.len() < fds.len() || numbers.len() < fds.len() {
        let rule = "is given more than 64 times, or a name or a number twice; give each descriptor one name";
        return Err(ArgsError::Conflict("fd", rule));
    }
    Ok(fds)
}

fn fd(text: &OsStr) -> Result<(String, RawFd), ArgsError> {
    let rule = "give NAME=NUMBER: 1 to 64 letters, digits, hyphens, underscores and dots, and the number of an open \
                descriptor, from 3 on";
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let parsed = text.to_str().and_then(|text| text.split_once('=')).and_then(|(name, number)| {
        let number: RawFd = number.parse().ok()?;
        let is_name = (1..=MAX_FD_NAME_LENGTH).contains(&name.len()) && name.bytes().all(legal);
        (is_name && number > 2).then(|| (name.to_owned(), number))
    });
    parsed.ok_or_else(|| ArgsError::Invalid { flag: "fd", value: text.to_string_lossy().into_owned(), rule })
}

fn api(identity: Identity, given: &Given) -> Result<Option<Api>, ArgsError> {
    let max_payload = given.number("http-api-max-payload-size")?;
    if given.has("no-api") {
        for flag in ["api-sock", "http-api-max-payload-size"] {
            if given.has(flag) {
                return Err(ArgsError::Conflict("no-api", "leaves out the API; give no flag for it"));
            }
        }
        return Ok(None);
    }
    let socket = given.path("api-sock").unwrap_or_else(|| identity.default_api_socket().into());
    Ok(Some(Api { socket, max_payload: max_payload.unwrap_or(DEFAULT_MAX_PAYLOAD) }))
}

fn id(given: &Given) -> Result<String, ArgsError> {
    let id = given.text("id")?.unwrap_or_else(|| DEFAULT_ID.to_string());
    let legal = id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if !legal || id.is_empty() || id.len() > MAX_ID_LENGTH {
        let rule = "an id has 1 to 64 letters, digits and hyphens";
        return Err(ArgsError::Invalid { flag: "id", value: id, rule });
    }
    Ok(id)
}

fn level(given: &Given) -> Result<Option<LogLevel>, ArgsError> {
    let rule = "a level is Error, Warning, Info, Debug, Trace or Off";
    given
        .text("level")?
        .map(|text| text.parse().map_err(|_| ArgsError::Invalid { flag: "level", value: text, rule }))
        .transpose()
}

/// One row of the table of flags.
struct Flag {
    name: &'static str,
    /// What its value is, for the help; `None` takes no value.
    value: Option<&'static str>,
    /// May contain `{socket}`.
    help: &'static str,
    /// A flag of Firecracker's whose feature we do not have yet: what that is. A flag that did nothing would be a lie.
    later: Option<&'static str>,
    is_repeatable: bool,
}

const fn switch(name: &'static str, help: &'static str) -> Flag {
    Flag { name, value: None, help, later: None, is_repeatable: false }
}

const fn value(name: &'static str, value: &'static str, help: &'static str) -> Flag {
    Flag { name, value: Some(value), help, later: None, is_repeatable: false }
}

const fn values(name: &'static str, value: &'static str, help: &'static str) -> Flag {
    Flag { name, value: Some(value), help, later: None, is_repeatable: true }
}

const fn later(name: &'static str, value: Option<&'static str>, why: &'static str) -> Flag {
    Flag { name, value, help: "", later: Some(why), is_repeatable: false }
}

/// The flags under their headings, in the order of the help.
const FLAGS: &[(&str, &[Flag])] = &[
    (
        "What to run",
        &[
            value(
                "config-file",
                "FILE",
                "Configure the guest from this JSON file and start it at once.\nIts sections are the bodies of \
                 the API.",
            ),
            value("metadata", "FILE", "What the guest can read from the metadata service (JSON)."),
            value(
                "mmds-size-limit",
                "BYTES",
                "The most that may be in the metadata service\n[default: that of --http-api-max-payload-size].",
            ),
            value("id", "ID", "Name of this guest, in the log and in the API: letters, digits,\nhyphens."),
            switch(
                "enable-pci",
                "Give the guest a PCI bus. Always so, unless started under the\nname firecracker.",
            ),
            value(
                "hot-plug-directory",
                "DIR",
                "Where files may lie that a running guest is given, beside those that\nit had at its start.",
            ),
            switch(
                "boot-timer",
                "Log how long the guest took to boot; it says so by writing 123 to\n0xc0000000.",
            ),
        ],
    ),
    (
        "API",
        &[
            value("api-sock", "PATH", "Unix socket of the API [default: {socket}]."),
            switch("no-api", "Serve no API. Needs --config-file."),
            value("http-api-max-payload-size", "BYTES", "Longest body of a request [default: 51200]."),
        ],
    ),
    (
        "Log and metrics",
        &[
            value("log-path", "PATH", "File or named pipe for the log [default: standard output]."),
            value("level", "LEVEL", "Error, Warning, Info, Debug, Trace or Off [default: Info]."),
            value("module", "MODULE", "Log only what comes from modules whose path begins so."),
            switch("show-level", "Write each line's level."),
            switch("show-log-origin", "Write each line's source file and line."),
            value("metrics-path", "PATH", "File or named pipe for the metrics, a JSON object a line."),
        ],
    ),
    (
        "For the program that starts this one",
        &[
            value(
                "exit-status",
                "PATH",
                "File or named pipe that is told how this process ended, in a line of\nJSON.",
            ),
            value("start-time-us", "US", "When it began, by the monotonic clock."),
            value("start-time-cpu-us", "US", "The same, by this process's CPU clock."),
            value("parent-cpu-time-us", "US", "CPU time that the parent had used by then."),
            values(
                "fd",
                "NAME=NUMBER",
                "An open descriptor: fd:NAME stands for the path of a kernel, an\ninitrd or a disk, or the name of a tap; of the API's socket, the\nlog, the metrics. May be repeated.",
            ),
            value("seccomp-filter", "FILE", "System call filters in place of the built-in ones (JSON)."),
            switch("no-seccomp", "Run without system call filters. Not with a guest you do not trust."),
        ],
    ),
    ("Other", &[switch("help", "Show this."), switch("version", "Show the version.")]),
    (
        "",
        &[
            later("snapshot-version", None, "it has no snapshots"),
            later("describe-snapshot", Some("FILE"), "it has no snapshots"),
        ],
    ),
];

fn flags() -> impl Iterator<Item = &'static Flag> {
    FLAGS.iter().flat_map(|(_, flags)| *flags)
}

/// The flags of a command line with their values.
struct Given(Vec<(&'static Flag, Option<OsString>)>);

impl Given {
    fn read(argv: Vec<OsString>) -> Result<Given, ArgsError> {
        let mut parser = lexopt::Parser::from_iter(argv);
        let mut given = Given(Vec::new());
        loop {
            let flag = match parser.next() {
                Ok(None) => return Ok(given),
                Ok(Some(Arg::Long(name))) => {
                    let found = flags().find(|flag| flag.name == name);
                    found.ok_or_else(|| ArgsError::Unknown(format!("--{name}")))?
                }
                Ok(Some(Arg::Short(letter))) => return Err(ArgsError::Unknown(format!("-{letter}"))),
                Ok(Some(Arg::Value(text))) => {
                    return Err(ArgsError::Unknown(text.to_string_lossy().into_owned()));
                }
                Err(error) => return Err(ArgsError::Unknown(error.to_string())),
            };
            if !flag.is_repeatable && given.has(flag.name) {
                return Err(ArgsError::Twice(flag.name));
            }
            let value = match flag.value {
                Some(what) => Some(parser.value().map_err(|_| ArgsError::NoValue(flag.name, what))?),
                None => match parser.optional_value() {
                    Some(text) => {
                        return Err(ArgsError::Value(flag.name, text.to_string_lossy().into_owned()));
                    }
                    None => None,
                },
            };
            given.0.push((flag, value));
        }
    }

    fn check_later(&self) -> Result<(), ArgsError> {
        let refused = self.0.iter().find_map(|(flag, _)| Some((flag.name, flag.later?)));
        refused.map_or(Ok(()), |(name, why)| Err(ArgsError::Later(name, why)))
    }

    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(flag, _)| flag.name == name)
    }

    fn values(&self, name: &str) -> impl Iterator<Item = &OsString> {
        self.0.iter().filter(move |(flag, _)| flag.name == name).filter_map(|(_, value)| value.as_ref())
    }

    fn value(&self, name: &str) -> Option<&OsString> {
        self.values(name).next()
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.value(name).map(PathBuf::from)
    }

    fn text(&self, name: &'static str) -> Result<Option<String>, ArgsError> {
        let invalid = |value: &OsString| ArgsError::Invalid {
            flag: name,
            value: value.to_string_lossy().into_owned(),
            rule: "which is not UTF-8",
        };
        self.value(name).map(|value| value.clone().string().map_err(|_| invalid(value))).transpose()
    }

    fn number<T: FromStr>(&self, name: &'static str) -> Result<Option<T>, ArgsError> {
        let rule = "which is not a whole number that fits";
        self.text(name)?
            .map(|value| value.parse().map_err(|_| ArgsError::Invalid { flag: name, value, rule }))
            .transpose()
    }
}

fn help(identity: Identity) -> String {
    let name = identity.process_name();
    let mut text = format!(
        "{name} runs one virtual machine: from a configuration file, or as it is told over its API.\n\n\
         Usage: {name} [--api-sock PATH] [--config-file FILE] [more flags]\n"
    );
    for (heading, flags) in FLAGS.iter().filter(|(heading, _)| !heading.is_empty()) {
        text += &format!("\n{heading}:\n");
        for flag in *flags {
            let left = match flag.value {
                Some(value) => format!("--{} {value}", flag.name),
                None => format!("--{}", flag.name),
            };
            let help = flag.help.replace("{socket}", identity.default_api_socket());
            let help = help.replace('\n', &format!("\n{:38}", ""));
            text += &format!("  {left:<35} {help}\n");
        }
    }
    if identity == Identity::Berth {
        text += EXIT_CODES;
    }
    text
}

const EXIT_CODES: &str = "
Exit codes:
  0    the guest powered off, or there was nothing to do
  1    the host would not do what was asked
  2    a fault of this program
  3    the guest asked for a reset
  4    the guest ended with a triple fault
  5    the guest's kernel panicked
  148  a system call that the filter does not allow
  152  bad configuration file
  153  bad command line
";

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_as(name: &str, line: &str) -> Result<Command, ArgsError> {
        parse(std::iter::once(name).chain(line.split_whitespace()).map(OsString::from))
    }

    #[track_caller]
    fn run(line: &str) -> Args {
        match parse_as("/usr/bin/berth-vmm", line) {
            Ok(Command::Run(args)) => *args,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[track_caller]
    fn refused(line: &str) -> String {
        parse_as("berth-vmm", line).expect_err(line).to_string()
    }

    #[test]
    fn the_name_we_are_started_under_decides_who_we_are() {
        for (name, identity) in [
            ("firecracker", Identity::Firecracker),
            ("/srv/jail/firecracker", Identity::Firecracker),
            ("./firecracker", Identity::Firecracker),
            ("berth-vmm", Identity::Berth),
            ("/firecracker/berth-vmm", Identity::Berth),
            ("firecrackers", Identity::Berth),
            ("", Identity::Berth),
        ] {
            assert_eq!(Identity::of(OsStr::new(name)), identity, "{name:?}");
        }
    }

    #[test]
    fn each_identity_has_its_names_defaults_and_transport() {
        let Ok(Command::Run(other)) = parse_as("firecracker", "") else { panic!() };
        let own = run("");
        assert_eq!(own.api.unwrap().socket, Path::new("/run/berth.socket"));
        assert_eq!(other.api.unwrap().socket, Path::new("/run/firecracker.socket"));
        assert!(own.pci && !other.pci);
        assert!(matches!(parse_as("firecracker", "--enable-pci"), Ok(Command::Run(args)) if args.pci));
        assert!(parse_as("firecracker", "--hot-plug-directory /p").unwrap_err().to_string().contains("PCI"));
        assert_eq!(Identity::Firecracker.app_name(), "Firecracker");
        assert_eq!(Identity::Firecracker.vcpu_thread(3), "fc_vcpu 3");
        assert_eq!(Identity::Firecracker.api_thread(), "fc_api");
        assert_eq!([0, 2].map(|number| Identity::Firecracker.io_thread(number)), ["fc_io", "fc_io 2"]);
        assert_eq!(Identity::Firecracker.process_name(), "firecracker");
        assert_eq!(Identity::Firecracker.version(), "1.17.0");
    }

    #[test]
    fn thread_names_fit_what_the_kernel_keeps() {
        for identity in [Identity::Berth, Identity::Firecracker] {
            let (vcpu, io) = (identity.vcpu_thread(255), identity.io_thread(255));
            for name in [identity.process_name(), identity.api_thread(), &vcpu, &io] {
                assert!(name.len() <= 15, "{name}");
            }
        }
    }

    #[test]
    fn an_empty_command_line_runs_with_the_defaults() {
        let args = run("");
        let expected = Args {
            identity: Identity::Berth,
            id: "anonymous-instance".to_string(),
            api: Some(Api { socket: "/run/berth.socket".into(), max_payload: 51_200 }),
            config_file: None,
            log: Logger::default(),
            metrics_path: None,
            exit_status: None,
            metadata: None,
            mmds_limit: 51_200,
            seccomp_filter: None,
            no_seccomp: false,
            boot_timer: false,
            pci: true,
            hot_plug_directory: None,
            start: StartTimes::default(),
            fds: Vec::new(),
        };
        assert_eq!(args, expected);
    }

    #[test]
    fn every_flag_reaches_its_field_with_a_space_or_an_equals_sign() {
        let spaced = "--api-sock /s --id a-1 --config-file /c --log-path /l --level warn --module devices \
             --show-level --show-log-origin --metrics-path /m --no-seccomp --boot-timer --enable-pci \
             --http-api-max-payload-size 7 --start-time-us 1 --start-time-cpu-us 2 --parent-cpu-time-us 3 \
             --fd disk=3 --metadata /d --mmds-size-limit 9 --exit-status /e --hot-plug-directory /p";
        let args = run(spaced);
        let expected = Args {
            identity: Identity::Berth,
            id: "a-1".to_string(),
            api: Some(Api { socket: "/s".into(), max_payload: 7 }),
            config_file: Some("/c".into()),
            log: Logger {
                log_path: Some("/l".into()),
                level: Some(LogLevel::Warning),
                show_level: Some(true),
                show_log_origin: Some(true),
                module: Some("devices".to_string()),
            },
            metrics_path: Some("/m".into()),
            exit_status: Some("/e".into()),
            metadata: Some("/d".into()),
            mmds_limit: 9,
            seccomp_filter: None,
            no_seccomp: true,
            boot_timer: true,
            pci: true,
            hot_plug_directory: Some("/p".into()),
            start: StartTimes { wall_us: Some(1), cpu_us: Some(2), parent_cpu_us: Some(3) },
            fds: vec![("disk".to_string(), 3)],
        };
        assert_eq!(args, expected);
        let mut joined = String::new();
        for word in spaced.split_whitespace() {
            joined += if word.starts_with("--") { " " } else { "=" };
            joined += word;
        }
        assert_eq!(run(&joined), expected);
    }

    #[test]
    fn no_api_needs_a_configuration_and_takes_no_flag_of_the_api() {
        assert_eq!(run("--no-api --config-file c").api, None);
        assert!(refused("--no-api").contains("--config-file"));
        assert!(refused("--no-api --config-file c --api-sock s").contains("no-api"));
        assert!(refused("--no-api --config-file c --http-api-max-payload-size 1").contains("no-api"));
    }

    #[test]
    fn filters_are_ours_or_those_of_a_file_or_none() {
        assert_eq!(run("--seccomp-filter /f").seccomp_filter.as_deref(), Some(Path::new("/f")));
        assert!(refused("--seccomp-filter f --no-seccomp").contains("--seccomp-filter"));
    }

    #[test]
    fn an_id_is_short_and_plain() {
        for good in ["a".to_string(), "A-9".to_string(), "x".repeat(64)] {
            assert_eq!(run(&format!("--id {good}")).id, good);
        }
        for bad in ["x".repeat(65), "a_b".to_string(), "a/b".to_string(), "é".to_string()] {
            let error = refused(&format!("--id {bad}"));
            assert!(error.contains("--id") && error.contains(&bad) && error.contains("1 to 64"), "{error}");
        }
        assert!(refused("--id=").contains("1 to 64"));
    }

    #[test]
    fn a_wrong_value_is_named_with_its_flag_and_the_rule() {
        assert_eq!(
            refused("--level loud"),
            r#"--level is "loud", a level is Error, Warning, Info, Debug, Trace or Off"#
        );
        for flag in ["start-time-us", "start-time-cpu-us", "parent-cpu-time-us", "http-api-max-payload-size"]
        {
            for bad in ["x", "-1", "1.5", "99999999999999999999", ""] {
                let error = refused(&format!("--{flag}={bad}"));
                assert!(error.contains(flag) && error.contains("whole number"), "{error}");
            }
        }
        let bytes = <OsString as std::os::unix::ffi::OsStringExt>::from_vec(vec![0xff]);
        let error = parse(["berth-vmm".into(), "--module".into(), bytes]).unwrap_err();
        assert!(error.to_string().contains("UTF-8"));
    }

    #[test]
    fn the_metadata_is_limited_as_requests_are_unless_its_limit_is_given() {
        assert_eq!(run("--metadata m.json").metadata, Some("m.json".into()));
        assert_eq!(run("").mmds_limit, DEFAULT_MAX_PAYLOAD);
        assert_eq!(run("--http-api-max-payload-size 7").mmds_limit, 7);
        assert_eq!(run("--http-api-max-payload-size 7 --mmds-size-limit 9").mmds_limit, 9);
        assert!(refused("--mmds-size-limit x").contains("whole number"));
    }

    #[test]
    fn descriptors_have_names_and_are_not_the_standard_streams() {
        let fds = run("--fd kernel=3 --fd disk_1.raw-x=2048").fds;
        assert_eq!(fds, [("kernel".to_string(), 3), ("disk_1.raw-x".to_string(), 2048)]);
        let long = format!("{}=3", "x".repeat(65));
        for bad in
            ["disk", "disk=", "=3", "disk=2", "disk=-1", "disk=x", "a/b=3", "a=b=3", "disk=2147483648", &long]
        {
            assert!(refused(&format!("--fd {bad}")).contains("NAME=NUMBER"), "{bad}");
        }
        for bad in ["--fd a=3 --fd a=4", "--fd a=3 --fd b=3"] {
            assert!(refused(bad).contains("twice"), "{bad}");
        }
        let many: Vec<_> = (0..=MAX_FDS).map(|n| format!("--fd n{n}={}", n + 3)).collect();
        assert_eq!(run(&many[..MAX_FDS].join(" ")).fds.len(), MAX_FDS);
        assert!(refused(&many.join(" ")).contains("64 times"));
    }

    #[test]
    fn what_is_no_flag_given_twice_or_lacks_its_value_is_refused() {
        assert!(refused("--colour red").contains("--colour"));
        assert!(refused("-v").contains("-v"));
        assert!(refused("guest.json").contains("guest.json"));
        assert_eq!(refused("--id a --id b"), "--id was given twice; give it once");
        assert_eq!(refused("--api-sock"), "--api-sock wants a value: PATH");
        assert!(refused("--no-api=yes").contains("takes no value"));
    }

    #[test]
    fn a_flag_whose_feature_is_not_there_is_refused_by_its_name() {
        for (line, word) in [("--snapshot-version", "snapshots"), ("--describe-snapshot s", "snapshots")] {
            let error = refused(line);
            assert!(error.contains("not supported") && error.contains(word), "{error}");
        }
    }

    #[test]
    fn help_shows_every_flag_that_can_be_given_and_fits_a_terminal() {
        let Ok(Command::Print(text)) = parse_as("berth-vmm", "--help --api-sock x") else { panic!() };
        for flag in flags() {
            let shown = text.contains(&format!("  --{} ", flag.name));
            assert_eq!(shown, flag.later.is_none(), "{}", flag.name);
        }
        assert!(text.contains("/run/berth.socket"));
        assert!(text.lines().all(|line| line.len() <= 110), "{text}");
    }

    #[test]
    fn the_documentation_has_every_flag_and_every_exit_code() {
        let text = include_str!("../../docs/vmm.md");
        for flag in flags() {
            assert!(text.contains(&format!("`--{}`", flag.name)), "{}", flag.name);
        }
        for code in (0..=5).chain(148..=157) {
            assert!(text.contains(&format!("\n| {code} | ")), "{code}");
        }
    }

    #[test]
    fn the_version_comes_under_the_name_we_were_started_under() {
        let Ok(Command::Print(own)) = parse_as("berth-vmm", "--version") else { panic!() };
        assert!(own.starts_with(&format!("berth-vmm {VERSION}\n")));
        let Ok(Command::Print(other)) = parse_as("firecracker", "--version") else { panic!() };
        assert!(other.starts_with("Firecracker v1.17.0\n"));
    }

    #[test]
    fn exit_codes_are_those_that_clients_know() {
        let codes = [
            (ExitCode::Ok, 0),
            (ExitCode::Generic, 1),
            (ExitCode::Unexpected, 2),
            (ExitCode::BadSyscall, 148),
            (ExitCode::Sigbus, 149),
            (ExitCode::Sigsegv, 150),
            (ExitCode::Sigxfsz, 151),
            (ExitCode::BadConfiguration, 152),
            (ExitCode::BadArguments, 153),
            (ExitCode::Sigxcpu, 154),
            (ExitCode::Sigpipe, 155),
            (ExitCode::Sighup, 156),
            (ExitCode::Sigill, 157),
        ];
        for (code, number) in codes {
            assert_eq!(code as u8, number);
        }
    }

    #[test]
    fn how_a_guest_ended_is_told_under_our_own_name_only() {
        let endings =
            [(Ending::PoweredOff, 0), (Ending::Reset, 3), (Ending::TripleFault, 4), (Ending::Panicked, 5)];
        for (ending, number) in endings {
            assert_eq!(Identity::Berth.exit_code(&ending) as u8, number);
            assert_eq!(Identity::Firecracker.exit_code(&ending), ExitCode::Ok);
        }
        let failed = Ending::Failed("KVM_RUN: no".to_string());
        assert_eq!(Identity::Firecracker.exit_code(&failed), ExitCode::Generic);
    }
}
