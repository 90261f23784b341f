//! The life of `berthd`: what the administrator wants, what is there already, a socket, the loop. It may be killed at any
//! moment and has no end of its own.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use supervisor::config::{Config, Wrong};
use supervisor::fleet::Fleet;
use supervisor::serve::{self, Clients};
use supervisor::watch::Happened;
use supervisor::{adopt, cell, logger, systemd};

const HELP: &str = "\
berthd: keeps guests, each in a process of its own (docs/berthd.md)

Usage: berthd [--config FILE]

  --config FILE   what the administrator has decided; /etc/berth/berthd.toml if it is there
  --help, --version
";

/// Of a command line or a file that cannot be obeyed, as with the other programs.
const BAD_ARGUMENTS: u8 = 153;

/// Why the daemon does not start.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("{0}")]
    Configuration(#[from] Wrong),
    #[error("{0}: {1}")]
    Host(String, io::Error),
}

fn main() -> ExitCode {
    logger::start();
    let config = match arguments(std::env::args_os().skip(1).collect()) {
        Ok(Some(config)) => config,
        Ok(None) => return ExitCode::SUCCESS,
        Err(why) => {
            log::error!("{why}; see --help");
            return BAD_ARGUMENTS.into();
        }
    };
    match live(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failed::Configuration(wrong)) => {
            log::error!("{wrong}");
            BAD_ARGUMENTS.into()
        }
        Err(failed) => {
            log::error!("{failed}");
            ExitCode::FAILURE
        }
    }
}

/// The file to read; `None` if something was printed and that is all.
fn arguments(words: Vec<std::ffi::OsString>) -> Result<Option<Option<PathBuf>>, String> {
    let texts: Vec<_> = words.iter().map(|word| word.to_str().unwrap_or_default()).collect();
    match texts[..] {
        [] => Ok(Some(None)),
        ["--config", _] => Ok(Some(words.into_iter().nth(1).map(PathBuf::from))),
        ["--help"] => {
            print!("{HELP}");
            Ok(None)
        }
        ["--version"] => {
            println!("berthd {}", env!("CARGO_PKG_VERSION"));
            Ok(None)
        }
        _ => Err(format!("{} is not what can be asked for", texts.join(" "))),
    }
}

fn live(file: Option<PathBuf>) -> Result<(), Failed> {
    let config = Config::read(file.as_deref())?;
    let host = |what: &str| {
        let what = what.to_owned();
        move |error| Failed::Host(what, error)
    };
    raise_limit();
    cell::prepare_groups(&config).map_err(host("control groups"))?;
    let fleet = Fleet::new(config).map_err(host("the daemon's directories and threads"))?;
    // Before anybody can ask: what is told of guests is true from the first answer on.
    adopt::all(&fleet).map_err(host("the records of guests"))?;
    let listener = listen(&fleet.config)?;
    fleet.watch.clients(listener.as_fd()).map_err(host("the clients' socket"))?;
    if let Err(error) = systemd::ready() {
        log::warn!("systemd cannot be told that the daemon is ready: {error}");
    }
    run(&fleet, &listener).map_err(host("the loop"))
}

/// The loop. Nothing in it waits for a guest, a child or a client.
fn run(fleet: &Arc<Fleet>, listener: &UnixListener) -> io::Result<()> {
    let clients = Arc::new(Clients::default());
    let mut more_clients = false;
    loop {
        let happened = fleet.watch.wait(more_clients)?;
        if more_clients || happened.contains(&Happened::Client) {
            more_clients = serve::accept(fleet, &clients, listener);
        }
        for happened in happened {
            match happened {
                Happened::Client => {}
                Happened::ConsoleSaid(id) => {
                    if let Some(guest) = fleet.by_id(&id) {
                        guest.console.drain();
                    }
                }
                Happened::LogSaid(id) => {
                    if let Some(guest) = fleet.by_id(&id) {
                        guest.log.drain();
                    }
                }
                Happened::Ended(id) => {
                    if let Some(guest) = fleet.by_id(&id) {
                        let of = fleet.clone();
                        fleet.ends.put(move || of.process_has_ended(&guest));
                    }
                }
                Happened::Time(id) => {
                    if let Some(guest) = fleet.by_id(&id) {
                        let of = fleet.clone();
                        fleet.ends.put(move || of.time_has_come(&guest));
                    }
                }
            }
        }
    }
}

/// The socket that systemd hands over, or one of our own for the group.
fn listen(config: &Config) -> Result<UnixListener, Failed> {
    let path = &config.socket;
    let failed = |error| Failed::Host(format!("{}: the socket cannot be made", path.display()), error);
    let listener = match systemd::socket() {
        Some(listener) => listener,
        None => bind(config).map_err(failed)?,
    };
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

fn bind(config: &Config) -> io::Result<UnixListener> {
    let path = &config.socket;
    // A daemon that was killed leaves its socket. One that lives is not pushed aside.
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AddrInUse, "a berthd listens there already")),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)?,
        Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    // Root's alone until it is the group's.
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    match group(&config.group)? {
        Some(gid) => {
            chown(path, None, Some(gid))?;
            fs::set_permissions(path, Permissions::from_mode(0o660))?;
        }
        None => log::warn!("There is no group {}: only root can use {}", config.group, path.display()),
    }
    Ok(listener)
}

/// By group(5): a static program cannot ask the C library.
fn group(name: &str) -> io::Result<Option<u32>> {
    let text = fs::read_to_string("/etc/group")?;
    let mut groups = text.lines().map(|line| line.split(':'));
    Ok(groups.find_map(|mut fields| (fields.next()? == name).then(|| fields.nth(1)?.parse().ok())?))
}

/// A guest has a handful of descriptors here.
fn raise_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        log::warn!("The limit of open files stays {:?}: {error}", limit.current);
    }
}
