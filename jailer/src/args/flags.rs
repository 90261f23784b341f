//! The flags there are, what `--help` says of them, and how they are read from a command line.

use std::ffi::{OsStr, OsString};

use super::{ArgsError, Identity};

/// One row of the table of flags.
pub struct Flag {
    pub name: &'static str,
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

pub const FLAGS: [Flag; 20] = [
    value("id", "ID", "The cell's name: 1 to 64 letters, digits and hyphens. Needed."),
    value("exec-file", "FILE", "The VMM's program, one static file. Needed."),
    value("uid", "NUMBER", "The user that the VMM runs as. Needed without --rootless."),
    value("gid", "NUMBER", "The group that the VMM runs as. Needed without --rootless."),
    switch("rootless", "Build the cell as an ordinary user, who the VMM then runs as: a weaker cell."),
    value("chroot-base-dir", "DIR", "Where cells are made; /srv/jailer if not given."),
    value("netns", "FILE", "The network namespace to run in, such as /run/netns/NAME."),
    switch("daemonize", "Run in a session of its own, with standard input and output from and to /dev/null."),
    switch("new-session", "Run in a session of its own, with standard input and output as they are."),
    switch("new-pid-ns", "Run as process 1 of a new pid namespace."),
    values("cgroup", "FILE=VALUE", "A control file of the VMM's group and its value; may be repeated."),
    value("cgroup-version", "1|2", "The kind of control groups; 1 if not given."),
    value("parent-cgroup", "PATH", "Where the VMM's group is made; the program's name if not given."),
    values(
        "resource-limit",
        "NAME=VALUE",
        "fsize=BYTES or no-file=NUMBER (2048 if not given); may be repeated.",
    ),
    values("file", "NAME=PATH[:ro]", "Open this for the VMM's API, which calls it fd:NAME; may be repeated."),
    values("fd", "NAME=NUMBER", "As --file, with a descriptor that is open already; may be repeated."),
    switch("vhost-net", "Give the cell /dev/vhost-net, for network interfaces that the kernel serves."),
    switch("remove", "Start nothing: remove the cell, and its group, of a VMM that has ended."),
    switch("version", "Print the version."),
    switch("help", "Print this."),
];

pub fn help(identity: Identity) -> String {
    let mut text = format!("Usage: {} [flags] -- [flags of the VMM]\n\n", identity.name());
    for flag in &FLAGS {
        let left = format!("--{} {}", flag.name, flag.value.unwrap_or_default());
        text.push_str(&format!("  {left:<28}{}\n", flag.help));
    }
    text
}

/// The flags that were given, with their values.
pub struct Given {
    flags: Vec<(&'static str, OsString)>,
    /// What follows `--`.
    pub rest: Vec<OsString>,
}

impl Given {
    pub fn read(argv: Vec<OsString>) -> Result<Given, ArgsError> {
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

    pub fn has(&self, name: &str) -> bool {
        self.flags.iter().any(|(flag, _)| *flag == name)
    }

    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a OsStr> {
        self.flags.iter().filter(move |(flag, _)| *flag == name).map(|(_, value)| value.as_os_str())
    }

    pub fn last<'a>(&'a self, name: &'a str) -> Option<&'a OsStr> {
        self.all(name).last()
    }

    pub fn needed<'a>(&'a self, name: &'static str) -> Result<&'a OsStr, ArgsError> {
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
