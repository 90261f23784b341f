//! berthd as the commands see it: the client of its API, with errors that say what to do.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use api_socket::ClientError;
use api_socket::fleet::Client;

use crate::args::value::Name;
use crate::doctor::facts::GROUP;
use crate::error::{Error, Result};
use crate::exit::Exit;
use crate::output;

/// Guests that are dealt with at a time, where several are named: stopping waits for each, and berthd has a limit of
/// connections.
const AT_A_TIME: usize = 16;

/// How long berthd, which may just be starting anew, is asked which it is.
const PATIENCE: Duration = Duration::from_secs(20);

/// The daemon that listens there. It is not asked anything yet.
pub fn at(socket: &Path) -> Client {
    Client::new(socket)
}

/// Which process berthd is, to know of a connection that breaks whose end that was.
#[derive(Debug)]
pub struct Berthd<'a> {
    daemon: &'a Client,
    pid: Option<u32>,
}

impl Berthd<'_> {
    /// As it is now.
    pub fn of(daemon: &Client) -> Berthd<'_> {
        Berthd { daemon, pid: pid(daemon) }
    }

    /// That process answers no more: all connections have ended with it, and no guest has.
    pub fn has_ended(&self) -> bool {
        pid(self.daemon) != self.pid
    }
}

fn pid(daemon: &Client) -> Option<u32> {
    daemon.clone().with_timeout(PATIENCE).version().ok().map(|version| version.pid)
}

/// What ended with the berthd that had it, which a guest does not.
pub fn ended_with_it(what: &str, guest: &str) -> Error {
    Error::new(guest, format!("{what} has ended with the berthd that had it; the guest goes on"))
        .exit(Exit::Unreachable)
}

/// Says about what a request was.
pub trait About<T> {
    fn about(self, what: &str) -> Result<T>;
}

impl<T> About<T> for std::result::Result<T, ClientError> {
    fn about(self, what: &str) -> Result<T> {
        self.map_err(|error| explain(what, &error))
    }
}

fn explain(what: &str, error: &ClientError) -> Error {
    match error {
        ClientError::Io { path, source } => unreachable(path, source),
        // Sentences of the API's, where ours is a clause.
        ClientError::Refused(fault) => Error::new(what, fault.message.trim_end_matches('.')),
        ClientError::Source(error) => Error::new(what, error),
        ClientError::Protocol(why) => Error::new("berthd", format!("its reply is not understood: {why}"))
            .remedy("berth and berthd may be of different versions; berth version tells")
            .exit(Exit::Unreachable),
    }
}

/// A stream of berthd's broke off.
pub fn broken(daemon: &Client, source: io::Error) -> Error {
    unreachable(daemon.path(), &source)
}

fn unreachable(socket: &Path, source: &io::Error) -> Error {
    let why = match source.kind() {
        ErrorKind::UnexpectedEof => "it went away".into(),
        _ => source.to_string(),
    };
    let error = Error::new(format!("berthd at {}", socket.display()), why).exit(Exit::Unreachable);
    match source.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            error.remedy("start it: sudo systemctl start berthd")
        }
        ErrorKind::PermissionDenied => error.remedy(format!(
            "be a member of its group: sudo usermod -aG {GROUP} $USER, and log in again; or use sudo"
        )),
        _ => error.remedy("see how it is: systemctl status berthd"),
    }
}

/// Does something to each of several guests or images, some at a time, and prints the name of each that it was done to.
/// One that fails is told and does not keep it from the others.
///
/// # Errors
/// That of the last one that failed; the others are told here.
pub fn each(names: &[Name], done: impl Fn(&str) -> Result<()> + Sync) -> Result<Exit> {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(None::<Error>));
    // Who has read enough wants it done all the same.
    let is_read = AtomicBool::new(true);
    let work = || {
        while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
            let outcome = done(name.as_str()).and_then(|()| output::is_read(format!("{name}\n").as_bytes()));
            if let Ok(false) = outcome {
                is_read.store(false, Ordering::Relaxed);
            }
            if let Err(error) = outcome {
                let mut failed = failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if let Some(before) = failed.replace(error) {
                    output::tell(before);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..names.len().min(AT_A_TIME) {
            scope.spawn(work);
        }
        work();
    });
    match failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some(error) => Err(error),
        None if is_read.into_inner() => Ok(Exit::Ok),
        None => Ok(Exit::signal(libc::SIGPIPE)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_socket::Fault;
    use std::collections::BTreeSet;

    #[test]
    fn a_daemon_that_is_not_there_is_told_with_the_command_that_starts_it() {
        let error = at(Path::new("/nowhere/berthd.sock")).guests().about("guests").unwrap_err();
        assert_eq!(error.exit, Exit::Unreachable);
        let text = error.to_string();
        assert!(text.starts_with("berthd at /nowhere/berthd.sock: No such file"), "{text}");
        assert!(text.ends_with("; start it: sudo systemctl start berthd"), "{text}");
    }

    #[test]
    fn who_may_not_is_told_the_group() {
        let source = io::Error::from_raw_os_error(libc::EACCES);
        let text = unreachable(Path::new("/run/b"), &source).to_string();
        assert!(text.contains("usermod -aG berth"), "{text}");
    }

    #[test]
    fn one_that_ends_in_the_middle_is_told_as_such() {
        let source = ErrorKind::UnexpectedEof.into();
        let text = unreachable(Path::new("/run/b"), &source).to_string();
        assert!(text.starts_with("berthd at /run/b: it went away; see how it is"), "{text}");
    }

    #[test]
    fn a_refusal_is_told_in_berthds_words_and_with_what_it_is_about() {
        let fault = Fault { status: 409, message: "The guest runs; stop it first.".into() };
        let error = explain("web", &ClientError::Refused(fault));
        assert_eq!(error.to_string(), "web: The guest runs; stop it first");
        assert_eq!(error.exit, Exit::Failed);
    }

    #[test]
    fn each_of_many_is_done_once_and_those_that_fail_keep_nobody_from_it() {
        let names: Vec<Name> = (0..50).map(|number| format!("g{number}").parse().unwrap()).collect();
        let seen = Mutex::new(Vec::new());
        let outcome = each(&names, |name| {
            seen.lock().unwrap().push(name.to_string());
            match name {
                "g7" => Err(Error::new(name, "no")),
                _ => Ok(()),
            }
        });
        assert_eq!(outcome.unwrap_err().to_string(), "g7: no");
        let seen = seen.into_inner().unwrap();
        assert_eq!(seen.len(), 50);
        assert_eq!(seen.into_iter().collect::<BTreeSet<_>>().len(), 50);
    }
}
