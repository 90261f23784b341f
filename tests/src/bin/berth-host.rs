//! A Linux host with KVM, anywhere: runs commands, a shell, or the tests that need real guests. `--help` tells how.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use berth_tests::host::choose;
use berth_tests::host::disk::WritableDisk;
use berth_tests::host::error::{Error, Result};
use berth_tests::host::image::Item;
use berth_tests::host::provide::{self, Wishes};
use berth_tests::host::qemu::Forward;
use berth_tests::host::runner;
use berth_tests::host::session::{self, Session};
use berth_tests::host::{DEFAULT_MEMORY_MIB, probe, process};
use lexopt::prelude::*;

const HELP: &str = "\
A Linux host with KVM: this machine if it can run guests, otherwise a nested host (BERTH_HOST=direct|nested overrides).

  berth-host run [OPTIONS] -- COMMAND...   runs a command there and ends with its exit code
  berth-host shell [OPTIONS]               a shell there
  berth-host test [OPTIONS] [FILTER]       builds the tests in tests/tests/ and runs each in a host, or only those
                                           with FILTER in their file::name
  berth-host writable DISK                 called in a host: makes a disk to write on with the content of this one, at
                                           once, and prints its path; it goes away with the host
  berth-host probe                         says where guests can run, and why

Options:
  --timeout SECONDS      ends the command after so long, with exit code 124
  --memory MIB           memory of a nested host, 3072 if not given
  --processors N         of a nested host, 1 if not given; with more, guests hang now and then: for measurements only
  --forward HOST:GUEST   leads a TCP port of this machine to the nested host's; may be repeated
  --programs DIRECTORY   shows berth and its programs from there, not from berth-host's own directory
  --with NAME=FILE       shows a file as $BERTH_BUILD/NAME too; may be repeated
  --tty                  runs the command on a terminal
  --jobs HOSTS           runs tests in so many hosts side by side
  --soak                 runs tests at their full length, which takes hours
  --verbose              says how the host was started and how long it took
";

fn main() -> ExitCode {
    process::hold_signals();
    match command_line() {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)),
        Err(error) => {
            eprintln!("berth-host: {error}");
            ExitCode::FAILURE
        }
    }
}

fn command_line() -> Result<i32> {
    let mut arguments = lexopt::Parser::from_env();
    let usage = |error: lexopt::Error| Error(format!("{error}; see berth-host --help"));
    match arguments.next().map_err(usage)? {
        Some(Value(command)) if command == "run" => {
            let options = Options::parse(&mut arguments).map_err(usage)?;
            match options.argv.is_empty() {
                true => Err(Error("run what? berth-host run -- COMMAND...".into())),
                false => run(options),
            }
        }
        Some(Value(command)) if command == "shell" => {
            let options = Options::parse(&mut arguments).map_err(usage)?;
            let argv = vec!["bash".into(), "-i".into()];
            run(Options { argv, on_terminal: true, ..options })
        }
        Some(Value(command)) if command == "test" => test(Options::parse(&mut arguments).map_err(usage)?),
        Some(Value(command)) if command == "writable" => {
            let original = PathBuf::from(arguments.value().map_err(usage)?);
            println!("{}", writable(&original)?.display());
            Ok(0)
        }
        Some(Value(command)) if command == "probe" => {
            println!("{}", choose::choose()?);
            if let Err(error) = probe::run() {
                println!("the trial guest: {error}");
            }
            Ok(0)
        }
        Some(Long("help") | Short('h')) => {
            print!("{HELP}");
            Ok(0)
        }
        Some(other) => Err(usage(other.unexpected())),
        None => Err(Error(format!("what to do?\n\n{HELP}"))),
    }
}

#[derive(Debug)]
struct Options {
    argv: Vec<String>,
    limit: Option<Duration>,
    memory_mib: u64,
    processors: u32,
    forwards: Vec<Forward>,
    with: Vec<Item>,
    programs: Option<PathBuf>,
    on_terminal: bool,
    jobs: Option<usize>,
    is_soak: bool,
    verbose: bool,
}

impl Options {
    fn parse(arguments: &mut lexopt::Parser) -> std::result::Result<Self, lexopt::Error> {
        let mut options = Self {
            argv: Vec::new(),
            limit: None,
            memory_mib: DEFAULT_MEMORY_MIB,
            processors: 1,
            forwards: Vec::new(),
            with: Vec::new(),
            programs: None,
            on_terminal: false,
            jobs: None,
            is_soak: false,
            verbose: false,
        };
        while let Some(argument) = arguments.next()? {
            match argument {
                Long("timeout") => options.limit = Some(Duration::from_secs(arguments.value()?.parse()?)),
                Long("memory") => options.memory_mib = arguments.value()?.parse()?,
                Long("processors") => options.processors = arguments.value()?.parse()?,
                Long("forward") => options.forwards.push(arguments.value()?.parse_with(parse_forward)?),
                Long("with") => options.with.push(arguments.value()?.parse_with(parse_item)?),
                Long("programs") => options.programs = Some(arguments.value()?.into()),
                Long("tty") => options.on_terminal = true,
                Long("jobs") => options.jobs = Some(arguments.value()?.parse()?),
                Long("soak") => options.is_soak = true,
                Long("verbose") => options.verbose = true,
                // What follows is the command's own, dashes and all.
                Value(program) => {
                    options.argv.push(program.string()?);
                    for word in arguments.raw_args()? {
                        options.argv.push(word.string()?);
                    }
                }
                other => return Err(other.unexpected()),
            }
        }
        Ok(options)
    }
}

fn parse_forward(text: &str) -> std::result::Result<Forward, String> {
    let parsed = text
        .split_once(':')
        .and_then(|(host, guest)| Some(Forward { host: host.parse().ok()?, guest: guest.parse().ok()? }));
    parsed.ok_or_else(|| format!("{text:?} is no pair of ports like 8080:80"))
}

fn parse_item(text: &str) -> std::result::Result<Item, String> {
    let (name, path) = text.split_once('=').ok_or_else(|| format!("{text:?} is not NAME=FILE"))?;
    Ok(Item::new(name, path))
}

fn run(options: Options) -> Result<i32> {
    let choice = choose::choose()?;
    if options.verbose {
        eprintln!("berth-host: {choice}");
    }
    let env = std::env::var("TERM").map(|term| ("TERM".into(), term)).into_iter().collect();
    let Options {
        argv, on_terminal, limit, verbose, memory_mib, processors, forwards, with, programs, ..
    } = options;
    let place = choice.place;
    let config = provide::config(Wishes {
        place,
        memory_mib,
        processors,
        forwards,
        with,
        programs,
        for_tests: false,
    })?;
    session::run(config, &Session { argv, env, on_terminal, limit, verbose })
}

fn test(options: Options) -> Result<i32> {
    let filter = match options.argv.as_slice() {
        [] => None,
        [filter] => Some(filter.as_str()),
        _ => return Err(Error("one FILTER at most".into())),
    };
    let choice = choose::choose()?;
    let plan = runner::Plan::make(filter, options.is_soak)?;
    let Options { memory_mib, processors, forwards, mut with, programs, jobs, .. } = options;
    with.extend(plan.executables());
    let place = choice.place;
    let config =
        provide::config(Wishes { place, memory_mib, processors, forwards, with, programs, for_tests: true })?;
    let logs = provide::own_directory()?.join("guest-tests");
    runner::run(&config, plan, &choice, jobs, &logs)
}

/// Makes a disk that stays when this process ends.
fn writable(original: &Path) -> Result<PathBuf> {
    let directory = std::env::var_os("BERTH_SCRATCH").unwrap_or_else(|| ".".into());
    let name = format!("disk-{}", std::process::id());
    let disk = std::mem::ManuallyDrop::new(WritableDisk::new(original, Path::new(&directory), &name)?);
    Ok(disk.path().to_owned())
}
