//! A new guest with a command in it, from its making to its end.

use std::io::{self, IsTerminal};

use api_socket::ClientError;
use api_socket::fleet::{Client, Guest, NewGuest, State, Stop};

use super::{exec, guests};
use crate::args::{Inside, Run};
use crate::daemon::{About, Berthd, ended_with_it};
use crate::error::{Error, Result};
use crate::exit::Exit;
use crate::output::{self, progress::Progress};
use crate::reach;
use crate::session::Ending;
use crate::signals::{Signals, Work};

/// The shell that the user has in the guest, as a login would start it.
const SHELL: [&str; 3] = ["/bin/sh", "-c", "exec \"${SHELL:-/bin/sh}\" -l"];
/// Has a command live on without us, with the console for its output. That there is none is said here and not there.
const IN_BACKGROUND: [&str; 4] = [
    "/bin/sh",
    "-c",
    "command -v \"$1\" >/dev/null || { echo \"$1: not found\" >&2; exit 127; }
     setsid \"$@\" </dev/null >/dev/console 2>&1 &",
    "sh",
];

/// # Errors
/// All are our own failure: the command's is its exit code.
pub fn run(daemon: &Client, args: &Run) -> Result<Exit> {
    live(daemon, args).map_err(|error| error.exit(Exit::Own))
}

fn live(daemon: &Client, args: &Run) -> Result<Exit> {
    let image = args.image.as_str();
    let signals = Signals::take().map_err(|error| Error::new("signals", error))?;
    let waiting = Progress::waiting(&format!("starting {image}"));
    let new = NewGuest { remove_when_ended: args.rm, ..guests::new_guest(&args.guest, image) };
    let made = match guests::make(daemon, new, &signals)? {
        Ok(made) => made,
        Err(signal) => return Ok(Exit::signal(signal)),
    };
    let end = End { daemon, berthd: Berthd::of(daemon), guest: &made, signals: &signals, removes: args.rm };
    let (client, id) = (daemon.clone(), made.id.clone());
    let started = match Work::begin(move || client.start(&id)).wait(&signals) {
        Ok(started) => started.about(&made.name),
        Err((signal, starting)) => {
            // A stop that comes before the start has ended is none.
            let _ = starting.wait(&signals);
            end.by_force();
            return Ok(Exit::signal(signal));
        }
    };
    if let Err(error) = started {
        if args.rm {
            end.by_force();
            return Err(error);
        }
        return Err(error.remedy(format!("its log: berth logs --vmm {}", made.name)));
    }
    if args.detach && args.command.is_empty() {
        drop(waiting);
        return output::print(&format!("{}\n", made.id)).map(|()| Exit::Ok);
    }

    // From here on the guest is there for the command, and whatever goes wrong but for berthd, it ends.
    let inside = inside(args);
    let (client, id, on_terminal) = (daemon.clone(), made.id.clone(), exec::wants_terminal(&inside));
    let stream = match signals.during(move || reach::ready(&client, &id, on_terminal)) {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            let remedy = error.remedy.or_else(|| Some(format!("see what it said: berth logs {}", made.name)));
            let error = Error { what: made.name.clone(), remedy: remedy.filter(|_| !args.rm), ..error };
            return Err(end.failed(error));
        }
        Err(signal) => {
            end.by_force();
            return Ok(Exit::signal(signal));
        }
    };
    drop(waiting);
    let command = command(args);
    let ending = match exec::inside(&made.name, &stream, &inside, command, &signals) {
        Ok(ending) => ending,
        Err(error) => return Err(end.failed(error)),
    };
    match ending {
        Ending::Exit(ended) if args.detach => match exec::code(ended) {
            Exit::Command(0) => output::print(&format!("{}\n", made.id)).map(|()| Exit::Ok),
            code => {
                end.by_force();
                Ok(code)
            }
        },
        Ending::Exit(ended) => {
            end.gently()?;
            Ok(exec::code(ended))
        }
        Ending::Left => {
            if io::stderr().is_terminal() {
                output::tell(format_args!("it runs on: berth exec {0} -- sh, or berth stop {0}", made.name));
            }
            Ok(Exit::Ok)
        }
        Ending::Unread => {
            end.gently()?;
            Ok(Exit::signal(libc::SIGPIPE))
        }
        Ending::Unwritten(what, why) => {
            end.gently()?;
            Err(Error::new(what, why))
        }
        Ending::Signalled(signal) => {
            end.by_force();
            Ok(Exit::signal(signal))
        }
        Ending::Broken(_) if end.berthd.has_ended() => Err(end.is_berthds()),
        Ending::Broken(why) => match end.gently()? {
            // A person who powers the guest off is done with it.
            how if args.command.is_empty() => {
                if io::stderr().is_terminal() {
                    output::tell(format_args!("{} has ended{how}", made.name));
                }
                Ok(Exit::Ok)
            }
            how => Err(Error::new(&made.name, format!("ended before the command did{how}: {why}"))),
        },
    }
}

fn command(args: &Run) -> Vec<String> {
    let (before, command): (&[&str], _) = match (args.command.is_empty(), args.detach) {
        (true, _) => (&SHELL, [].as_slice()),
        (false, true) => (&IN_BACKGROUND, args.command.as_slice()),
        (false, false) => (&[], args.command.as_slice()),
    };
    before.iter().map(ToString::to_string).chain(command.iter().cloned()).collect()
}

/// A command that lives on without us has no terminal, whose end would be its own, and what can be read here is not for it.
fn inside(args: &Run) -> Inside {
    let inside = args.inside.clone();
    match args.detach {
        true => Inside { tty: false, no_tty: true, no_stdin: true, ..inside },
        false => inside,
    }
}

/// The end of a guest that was there for a command.
struct End<'a> {
    daemon: &'a Client,
    berthd: Berthd<'a>,
    guest: &'a Guest,
    signals: &'a Signals,
    removes: bool,
}

impl End<'_> {
    /// Lets it go down by itself, unless nothing of it is kept or a signal says that this takes too long. Gives how it ended,
    /// for a sentence, as far as that is known.
    fn gently(&self) -> Result<String> {
        let _waiting = Progress::waiting(&format!("stopping {}", self.guest.name));
        let stop = if self.removes { Stop { seconds: 0 } } else { Stop::default() };
        let (daemon, id) = (self.daemon.clone(), self.guest.id.clone());
        let Ok(stopped) = self.signals.during(move || daemon.stop(&id, stop)) else {
            self.by_force();
            return Ok(String::new());
        };
        match stopped {
            Ok(guest) => {
                Ok(guest.last_end.map(|end| format!(" ({})", end.outcome.as_str())).unwrap_or_default())
            }
            // It had ended, or is removed already.
            Err(ClientError::Refused(_)) if self.has_ended() => Ok(String::new()),
            Err(error) => Err(error).about(&self.guest.name),
        }
    }

    fn has_ended(&self) -> bool {
        match self.daemon.guest(&self.guest.id) {
            Ok(guest) => guest.state == State::Stopped || guest.state == State::Removing,
            Err(error) => matches!(error, ClientError::Refused(fault) if fault.status == 404),
        }
    }

    /// What went wrong ends the guest, unless it was the end of the berthd that was asked.
    fn failed(&self, error: Error) -> Error {
        if self.berthd.has_ended() {
            return self.is_berthds();
        }
        self.by_force();
        error
    }

    /// Nobody wants the guest to end for that.
    fn is_berthds(&self) -> Error {
        let name = &self.guest.name;
        ended_with_it("the command", name)
            .remedy(format!("see to it: berth exec {name} -- sh, or berth stop {name}"))
    }

    /// What went wrong is told already, and more than this cannot be done.
    fn by_force(&self) {
        let _ = match self.removes {
            // Also one that never ran, which no end of its own removes.
            true => self.daemon.remove(&self.guest.id, true),
            false => self.daemon.stop(&self.guest.id, Stop { seconds: 0 }).map(drop),
        };
    }
}
