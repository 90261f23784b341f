//! A command in a guest that runs.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use agent::client;
use agent::protocol::{self, Exit as Ended};
use api_socket::fleet::Client;

use crate::args::{Exec, Inside};
use crate::daemon::{Berthd, ended_with_it};
use crate::error::{During, Error, Result};
use crate::exit::Exit;
use crate::output::{self, progress::Progress};
use crate::reach::{self, told};
use crate::session::{self, Ending, Here};
use crate::signals::Signals;
use crate::terminal::{self, Raw};

/// # Errors
/// All are our own failure: the command's is its exit code.
pub fn run(daemon: &Client, args: &Exec) -> Result<Exit> {
    exec(daemon, args).map_err(|error| error.exit(Exit::Own))
}

fn exec(daemon: &Client, args: &Exec) -> Result<Exit> {
    let guest = args.guest.as_str();
    let signals = Signals::take().map_err(|error| Error::new("signals", error))?;
    let waiting = Progress::waiting(&format!("waiting for {guest}"));
    let (client, name, on_terminal) = (daemon.clone(), guest.to_string(), wants_terminal(&args.inside));
    let stream = match signals.during(move || reach::ready(&client, &name, on_terminal)) {
        Ok(stream) => stream?,
        Err(signal) => return Ok(Exit::signal(signal)),
    };
    drop(waiting);
    let berthd = Berthd::of(daemon);
    match inside(guest, &stream, &args.inside, args.command.clone(), &signals)? {
        Ending::Exit(ended) => Ok(code(ended)),
        Ending::Left => Ok(Exit::Ok),
        Ending::Unread => Ok(Exit::signal(libc::SIGPIPE)),
        Ending::Signalled(signal) => Ok(Exit::signal(signal)),
        Ending::Unwritten(what, why) => Err(Error::new(what, why)),
        Ending::Broken(_) if berthd.has_ended() => Err(ended_with_it("the command", guest)),
        Ending::Broken(why) => Err(Error::new(guest, why)
            .remedy(format!("the guest or its agent has ended: berth ps --all; berth logs {guest}"))),
    }
}

/// Starts a command in a guest and stays with it until an end.
///
/// # Errors
/// The agent refuses.
pub fn inside(
    guest: &str,
    stream: &UnixStream,
    inside: &Inside,
    command: Vec<String>,
    signals: &Signals,
) -> Result<Ending> {
    let on_terminal = wants_terminal(inside);
    let mut agent = stream.try_clone().during(|| guest.to_string())?;
    let command = wanted(inside, command, on_terminal);
    match signals.during(move || client::exec(&mut agent, command)) {
        Ok(started) => started.map_err(|error| told(guest, &error))?,
        Err(signal) => return Ok(Ending::Signalled(signal)),
    }
    // A command may want a terminal where we have none: keys that leave are looked for in any case.
    let raw = match on_terminal && terminal::is_ours() {
        true => Some(Raw::set().map_err(|error| Error::new("the terminal", error))?),
        false => None,
    };
    let (input, output, errors) = (io::stdin(), io::stdout(), io::stderr());
    let has_input = !inside.no_stdin && terminal::may_read();
    let ending = session::run(
        stream,
        &Here {
            input: has_input.then(|| input.as_fd()),
            output: output.as_fd(),
            errors: errors.as_fd(),
            signals,
            keys: on_terminal.then_some(&inside.detach_keys),
        },
    );
    drop(raw);
    if matches!(ending, Ending::Left) && io::stderr().is_terminal() {
        output::tell_below(format_args!("left {guest}"));
    }
    Ok(ending)
}

/// Whether a command gets a terminal: as it was said, or as it is here.
pub fn wants_terminal(inside: &Inside) -> bool {
    match (inside.tty, inside.no_tty) {
        (true, _) => true,
        (_, true) => false,
        _ => terminal::is_ours() && !inside.no_stdin,
    }
}

/// What the agent is asked for.
fn wanted(inside: &Inside, argv: Vec<String>, on_terminal: bool) -> protocol::Exec {
    let mut environment = std::collections::BTreeMap::new();
    if on_terminal {
        // The terminal is the one here, whatever the guest knows of it.
        environment.extend(std::env::var("TERM").ok().map(|term| ("TERM".to_string(), term)));
    }
    for variable in &inside.env {
        let value = variable.value.clone().or_else(|| std::env::var(&variable.name).ok());
        environment.extend(value.map(|value| (variable.name.clone(), value)));
    }
    protocol::Exec {
        argv,
        environment,
        directory: inside.directory.clone(),
        user: inside.user.clone(),
        terminal: on_terminal.then(terminal::size),
    }
}

/// The code that a command's end is for us.
pub fn code(ended: Ended) -> Exit {
    match ended {
        Ended::Code(code) => Exit::Command(u8::try_from(code).unwrap_or(u8::MAX)),
        Ended::Signal(signal) => Exit::signal(signal),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    fn exec_of(line: &str) -> Exec {
        match Cli::try_parse_from(line.split_whitespace()).unwrap().command {
            Command::Exec(exec) => exec,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_said_is_what_the_agent_is_asked_for() {
        let exec = exec_of("berth exec -u www -w /srv -e A=1 -e B -e PATH web -- ls -l");
        let wanted = wanted(&exec.inside, exec.command, false);
        assert_eq!(wanted.argv, ["ls", "-l"]);
        assert_eq!((wanted.user.as_deref(), wanted.directory.as_deref()), (Some("www"), Some("/srv")));
        assert_eq!(wanted.terminal, None);
        // One that is not here is not there either.
        let names: Vec<_> = wanted.environment.keys().map(String::as_str).collect();
        assert_eq!(names, ["A", "PATH"]);
        assert_eq!(wanted.environment["PATH"], std::env::var("PATH").unwrap());
    }

    #[test]
    fn a_commands_end_is_our_code() {
        assert_eq!(code(Ended::Code(0)).code(), 0);
        assert_eq!(code(Ended::Code(255)).code(), 255);
        assert_eq!(code(Ended::Code(256)).code(), 255);
        assert_eq!(code(Ended::Code(-1)).code(), 255);
        assert_eq!(code(Ended::Signal(9)).code(), 137);
    }
}
