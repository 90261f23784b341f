//! The command line, which is that of Firecracker's jailer, and what our exit codes mean.
//!
//! Pure: no file is opened and nothing is written. One table holds the flags; `--help` and the parser both read it.

use std::ffi::{OsStr, OsString};
use std::path::{Component, Path, PathBuf};

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
    pub uid: Uid,
    pub gid: Gid,
    /// Where cells are made.
    pub base: PathBuf,
    /// A network namespace's file.
    pub netns: Option<PathBuf>,
    pub daemonize: bool,
    pub new_pid_ns: bool,
    pub cgroups: Cgroups,
    pub limits: Limits,
    /// What comes after `--`.
    pub vmm_arguments: Vec<OsString>,
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
        return Ok(Command::Print(help(identity)));
    }
    if given.has("version") {
        return Ok(Command::Print(identity.version_text()));
    }
    Ok(Command::Confine(Box::new(args(given)?)))
}

fn args(given: Given) -> Result<Args, ArgsError> {
    let program = PathBuf::from(given.needed("exec-file")?);
    let program_name = program_name(&program)?;
    Ok(Args {
        id: id(&given)?,
        uid: Uid::from_raw(number_of_user(&given, "uid")?),
        gid: Gid::from_raw(number_of_user(&given, "gid")?),
        base: given.last("chroot-base-dir").map_or_else(|| DEFAULT_BASE.into(), PathBuf::from),
        netns: given.last("netns").map(PathBuf::from),
        daemonize: given.has("daemonize"),
        new_pid_ns: given.has("new-pid-ns"),
        cgroups: cgroups(&given, &program_name)?,
        limits: limits(&given)?,
        program,
        program_name,
        vmm_arguments: given.rest,
    })
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
    if !is_plain || parent.as_os_str().is_empty() {
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

fn invalid<T>(flag: &'static str, value: String, rule: &'static str) -> Result<T, ArgsError> {
    Err(ArgsError::Invalid { flag, value, rule })
}

/// One row of the table of flags.
struct Flag {
    name: &'static str,
    /// What its value is, for the help; `None` takes no value.
    value: Option<&'static str>,
    is_repeatable: bool,
    help: &'static str,
}

const fn value(name: &'static str, value: &'static str, help: &'static str) -> Flag {
    Flag { name, value: Some(value), is_repeatable: false, help }
}

const fn values(name: &'static str, value: &'static str, help: &'static str) -> Flag {
    Flag { name, value: Some(value), is_repeatable: true, help }
}

const fn switch(name: &'static str, help: &'static str) -> Flag {
    Flag { name, value: None, is_repeatable: false, help }
}

const FLAGS: [Flag; 14] = [
    value("id", "ID", "The cell's name: 1 to 64 letters, digits and hyphens. Needed."),
    value("exec-file", "FILE", "The VMM's program, one static file. Needed."),
    value("uid", "NUMBER", "The user that the VMM runs as. Needed."),
    value("gid", "NUMBER", "The group that the VMM runs as. Needed."),
    value("chroot-base-dir", "DIR", "Where cells are made; /srv/jailer if not given."),
    value("netns", "FILE", "The network namespace to run in, such as /run/netns/NAME."),
    switch("daemonize", "Run in a session of its own, with standard input and output from and to /dev/null."),
    switch("new-pid-ns", "Run as process 1 of a new pid namespace."),
    values("cgroup", "FILE=VALUE", "A control file of the VMM's group and its value; may be repeated."),
    value("cgroup-version", "1|2", "The kind of control groups; 1 if not given."),
    value("parent-cgroup", "PATH", "Where the VMM's group is made; the program's name if not given."),
    values(
        "resource-limit",
        "NAME=VALUE",
        "fsize=BYTES or no-file=NUMBER (2048 if not given); may be repeated.",
    ),
    switch("version", "Print the version."),
    switch("help", "Print this."),
];

fn help(identity: Identity) -> String {
    let mut text = format!("Usage: {} [flags] -- [flags of the VMM]\n\n", identity.name());
    for flag in &FLAGS {
        let left = format!("--{} {}", flag.name, flag.value.unwrap_or_default());
        text.push_str(&format!("  {left:<28}{}\n", flag.help));
    }
    text
}

/// The flags that were given, with their values.
struct Given {
    flags: Vec<(&'static str, OsString)>,
    rest: Vec<OsString>,
}

impl Given {
    fn read(argv: Vec<OsString>) -> Result<Given, ArgsError> {
        let mut given = Given { flags: Vec::new(), rest: Vec::new() };
        let mut parser = lexopt::Parser::from_iter(argv);
        loop {
            if let Some(mut raw) = parser.try_raw_args()
                && raw.next_if(|word| word == "--").is_some()
            {
                given.rest = raw.collect();
                return Ok(given);
            }
            let Some(argument) = parser.next().map_err(|error| unexpected_value(&given, error))? else {
                return Ok(given);
            };
            let flag = known(argument)?;
            if !flag.is_repeatable && given.has(flag.name) {
                return Err(ArgsError::Twice(flag.name));
            }
            let value = match flag.value {
                Some(value) => parser.value().map_err(|_| ArgsError::NoValue(flag.name, value))?,
                None => OsString::new(),
            };
            given.flags.push((flag.name, value));
        }
    }

    fn has(&self, name: &str) -> bool {
        self.flags.iter().any(|(flag, _)| *flag == name)
    }

    fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a OsStr> {
        self.flags.iter().filter(move |(flag, _)| *flag == name).map(|(_, value)| value.as_os_str())
    }

    fn last<'a>(&'a self, name: &'a str) -> Option<&'a OsStr> {
        self.all(name).last()
    }

    fn needed<'a>(&'a self, name: &'static str) -> Result<&'a OsStr, ArgsError> {
        self.last(name).ok_or(ArgsError::Missing(name, help_of(name)))
    }
}

fn known(argument: lexopt::Arg) -> Result<&'static Flag, ArgsError> {
    let (name, shown) = match &argument {
        lexopt::Arg::Long(name) => ((*name).to_string(), format!("--{name}")),
        lexopt::Arg::Short('h') => ("help".to_string(), "-h".to_string()),
        lexopt::Arg::Short(letter) => (String::new(), format!("-{letter}")),
        lexopt::Arg::Value(value) => (String::new(), format!("{value:?}")),
    };
    FLAGS.iter().find(|flag| flag.name == name).ok_or(ArgsError::Unknown(shown))
}

/// The parser finds out about the value of a flag without one only when it goes on.
fn unexpected_value(given: &Given, error: lexopt::Error) -> ArgsError {
    let last = given.flags.last().map_or("", |(flag, _)| flag);
    match error {
        lexopt::Error::UnexpectedValue { value, .. } => {
            ArgsError::Value(last, value.to_string_lossy().into_owned())
        }
        error => ArgsError::Unknown(error.to_string()),
    }
}

fn help_of(name: &str) -> &'static str {
    FLAGS.iter().find(|flag| flag.name == name).map_or("", |flag| flag.help)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDED: &str = "--id vm-1 --exec-file /bin/berth-vmm --uid 1000 --gid 100";

    fn read(words: &str) -> Result<Command, ArgsError> {
        parse(["berth-jailer"].into_iter().chain(words.split_whitespace()).map(OsString::from))
    }

    fn cell(words: &str) -> Args {
        match read(&format!("{NEEDED} {words}")) {
            Ok(Command::Confine(args)) => *args,
            other => panic!("{words}: {other:?}"),
        }
    }

    #[track_caller]
    fn refused(words: &str, expected: &[&str]) {
        let error = match read(words) {
            Err(error) => error.to_string(),
            Ok(command) => panic!("{words}: {command:?}"),
        };
        for part in expected {
            assert!(error.contains(part), "{words}: {part:?} is not in: {error}");
        }
    }

    #[test]
    fn what_is_not_given_is_as_with_firecracker() {
        let args = cell("");
        assert_eq!((args.id.as_str(), args.program.as_path()), ("vm-1", Path::new("/bin/berth-vmm")));
        assert_eq!((args.uid.as_raw(), args.gid.as_raw()), (1000, 100));
        assert_eq!(args.program_name, "berth-vmm");
        assert_eq!(args.base, Path::new("/srv/jailer"));
        assert_eq!((args.netns, args.daemonize, args.new_pid_ns), (None, false, false));
        assert_eq!(args.limits, Limits { files: 2048, file_bytes: None });
        let parent = PathBuf::from("berth-vmm");
        let none = Cgroups { version: Version::V1, parent, is_parent_given: false, settings: vec![] };
        assert_eq!(args.cgroups, none);
        assert!(args.vmm_arguments.is_empty());
    }

    #[test]
    fn every_flag_is_read() {
        let args = cell(
            "--chroot-base-dir /cells --netns /run/netns/a --daemonize --new-pid-ns --cgroup-version 2 \
             --parent-cgroup a/b --cgroup memory.max=1G --cgroup cpu.weight=5 --resource-limit fsize=4096 \
             --resource-limit no-file=64",
        );
        assert_eq!(
            (args.base.as_path(), args.netns.as_deref()),
            (Path::new("/cells"), Some(Path::new("/run/netns/a")))
        );
        assert!(args.daemonize && args.new_pid_ns);
        assert_eq!(args.limits, Limits { files: 64, file_bytes: Some(4096) });
        let setting = |file: &str, value: &str| Setting { file: file.into(), value: value.into() };
        let settings = vec![setting("memory.max", "1G"), setting("cpu.weight", "5")];
        let groups = Cgroups { version: Version::V2, parent: "a/b".into(), is_parent_given: true, settings };
        assert_eq!(args.cgroups, groups);
    }

    #[test]
    fn what_follows_two_hyphens_is_for_the_vmm_alone() {
        let args = cell("-- --api-sock /a --id x -- y");
        assert_eq!(args.vmm_arguments, ["--api-sock", "/a", "--id", "x", "--", "y"]);
        assert_eq!(args.id, "vm-1");
        assert!(cell("--").vmm_arguments.is_empty());
        // The same word as a value is one.
        assert_eq!(cell("--netns -- --daemonize").netns.as_deref(), Some(Path::new("--")));
    }

    #[test]
    fn a_flag_that_is_needed_is_named() {
        for flag in ["id", "exec-file", "uid", "gid"] {
            let words: Vec<_> = NEEDED.split_whitespace().collect();
            let at = words.iter().position(|word| *word == format!("--{flag}")).unwrap();
            let left = [&words[..at], &words[at + 2..]].concat().join(" ");
            refused(&left, &[&format!("--{flag} is needed")]);
        }
    }

    #[test]
    fn values_that_break_a_rule_are_refused_with_it() {
        let long = "a".repeat(65);
        let cases = [
            ("id", "a/b", "letters"),
            ("id", "..", "letters"),
            ("id", "a_b", "letters"),
            ("id", "\u{e4}", "letters"),
            ("id", long.as_str(), "1 to 64"),
            ("exec-file", "/", "file"),
            ("exec-file", "/bin/..", "file"),
            ("uid", "root", "number"),
            ("uid", "-1", "number"),
            ("uid", "4294967295", "4294967294"),
            ("gid", "4294967296", "4294967294"),
        ];
        for (flag, value, rule) in cases {
            let words: Vec<_> = NEEDED.split_whitespace().collect();
            let at = words.iter().position(|word| *word == format!("--{flag}")).unwrap();
            let mut changed = words.clone();
            changed[at + 1] = value;
            refused(&changed.join(" "), &[&format!("--{flag} is {value:?}"), rule]);
        }
        assert_eq!(cell("").id.len(), 4);
    }

    #[test]
    fn values_of_optional_flags_that_break_a_rule_are_refused_with_it() {
        let cases = [
            ("--cgroup-version 3", "1 or 2"),
            ("--cgroup memory.max", "=<value>"),
            ("--cgroup memory.max=", "=<value>"),
            ("--cgroup max=1", "<controller>."),
            ("--cgroup .max=1", "<controller>."),
            ("--cgroup memory.=1", "<controller>."),
            ("--cgroup ../memory.max=1", "<controller>."),
            ("--parent-cgroup /a", "below the root"),
            ("--parent-cgroup a/../../b", "below the root"),
            ("--parent-cgroup ./a", "below the root"),
            ("--resource-limit fsize", "fsize=<bytes"),
            ("--resource-limit fsize=x", "fsize=<bytes"),
            ("--resource-limit fsize=15", "at least 16"),
            ("--resource-limit core=1", "no-file=<number>"),
            ("--daemonize=yes", "takes no value"),
            ("--netns", "wants a value"),
            ("--netns a --netns b", "twice"),
            ("--node 0", "no flag --node"),
            ("-x", "no flag -x"),
            ("--api-sock /a", "no flag --api-sock"),
            ("stray", "no flag \"stray\""),
        ];
        for (words, rule) in cases {
            refused(&format!("{NEEDED} {words}"), &[rule]);
        }
    }

    #[test]
    fn the_value_of_a_control_file_may_have_equals_signs_and_the_file_dots() {
        let parse = |text: &str| setting(OsStr::new(text)).unwrap();
        assert_eq!(parse("io.max=8:0 rbps=1").value, "8:0 rbps=1");
        assert_eq!(parse("memory.swap.max=0").file, "memory.swap.max");
        assert_eq!(parse("hugetlb.2MB.max=0").controller(), "hugetlb");
    }

    #[test]
    fn help_and_version_need_nothing_else() {
        let Ok(Command::Print(help)) = read("--help") else { panic!("no help") };
        for flag in &FLAGS {
            assert!(help.contains(&format!("--{}", flag.name)), "{help}");
        }
        assert_eq!(read("-h"), Ok(Command::Print(help)));
        assert_eq!(read("--version"), Ok(Command::Print(format!("berth-jailer {VERSION}\n"))));
        let Ok(Command::Print(text)) = parse(["/usr/bin/jailer", "--version"].map(OsString::from)) else {
            panic!("no version")
        };
        assert!(text.starts_with("Jailer v1.17.0\n"), "{text}");
    }

    #[test]
    fn under_the_name_of_firecrackers_jailer_all_errors_end_with_1() {
        let jailer = Identity::of(OsStr::new("/usr/bin/jailer"));
        for code in [ExitCode::NoCell, ExitCode::BadArguments] {
            assert_eq!(jailer.exit_code(code), ExitCode::Generic);
            assert_eq!(Identity::of(OsStr::new("berth-jailer")).exit_code(code), code);
        }
        assert_eq!(jailer.exit_code(ExitCode::Ok), ExitCode::Ok);
    }
}
