//! A guest's serial console.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use agent::client;
use agent::protocol::{Exit as Ended, PORT};
use api_socket::fleet::Client;
use rustix::event::PollFlags;

use crate::args::Console;
use crate::daemon::{About, Berthd, ended_with_it};
use crate::error::{Error, Result};
use crate::exit::Exit;
use crate::keys::{Keys, Typed};
use crate::outlet::Outlet;
use crate::output;
use crate::session::{self, Ending, MAX_TYPED, Source, when};
use crate::signals::{self, Signals};
use crate::terminal::{self, Raw};

/// What is read at a time.
const CHUNK: usize = 16 << 10;
/// A guest that is not told the size of the terminal is used all the same.
const PATIENCE: Duration = Duration::from_secs(5);

/// # Errors
/// berthd refuses or is not there, or the connection breaks.
pub fn run(daemon: &Client, args: &Console) -> Result<Exit> {
    let guest = args.guest.as_str();
    let signals = Signals::take().map_err(|error| Error::new("signals", error))?;
    let berthd = Berthd::of(daemon);
    let stream = daemon.console(guest).about(guest)?;
    let is_terminal = terminal::is_ours();
    if is_terminal {
        output::tell(format_args!("this is the console of {guest}; {} leaves", shown(args)));
    }
    let raw = match is_terminal {
        true => Some(Raw::set().map_err(|error| Error::new("the terminal", error))?),
        false => None,
    };
    let attached = Attached { daemon, guest, stream: &stream, signals: &signals, is_terminal };
    let ending = attached.run(Keys::new(&args.detach_keys));
    drop(raw);
    if is_terminal {
        output::tell_below(format_args!("left the console of {guest}"));
    }
    match ending {
        Ending::Exit(_) | Ending::Broken(_) if berthd.has_ended() => {
            Err(ended_with_it("the console", guest).remedy(format!("attach again: berth console {guest}")))
        }
        Ending::Left | Ending::Exit(_) => Ok(Exit::Ok),
        Ending::Unread => Ok(Exit::signal(libc::SIGPIPE)),
        Ending::Signalled(signal) => Ok(Exit::signal(signal)),
        Ending::Unwritten(what, why) => Err(Error::new(what, why)),
        Ending::Broken(why) => Err(Error::new(guest, why)),
    }
}

/// The keys for a person.
fn shown(args: &Console) -> String {
    let key = |key: &u8| match key {
        0..=31 => format!("Ctrl-{}", char::from(key + b'@')),
        key => char::from(*key).to_string(),
    };
    match args.detach_keys.0.as_slice() {
        [] => "only its end".into(),
        keys => keys.iter().map(key).collect::<Vec<_>>().join(" "),
    }
}

struct Attached<'a> {
    daemon: &'a Client,
    guest: &'a str,
    stream: &'a UnixStream,
    signals: &'a Signals,
    is_terminal: bool,
}

impl Attached<'_> {
    /// Until the guest ends, the keys are typed or a signal comes.
    fn run(&self, keys: Keys) -> Ending {
        self.stay(keys).unwrap_or_else(|ending| ending)
    }

    fn stay(&self, mut keys: Keys) -> std::result::Result<Ending, Ending> {
        let broken = |error: &dyn ToString| Ending::Broken(error.to_string());
        self.stream.set_nonblocking(true).map_err(|error| broken(&error))?;
        let (input, output) = (io::stdin(), io::stdout());
        let mut input = terminal::may_read().then(|| input.as_fd());
        let mut shown = Outlet::of(output.as_fd(), "standard output");
        let mut typed = Outlet::nonblocking(self.stream.as_fd(), "the console");
        if self.is_terminal {
            self.tell_size();
        }
        let mut chunk = [0; CHUNK];
        loop {
            shown.flush()?;
            typed.flush().map_err(|_| broken(&"the console has ended"))?;
            // A guest that does not read its console makes a program wait, and a person only late.
            let takes_input = if self.is_terminal { typed.waiting() < MAX_TYPED } else { typed.is_empty() };
            let guest = when(shown.is_empty(), PollFlags::IN) | when(!typed.is_empty(), PollFlags::OUT);
            let mut wanted = vec![
                (Source::Signals, self.signals.as_fd(), PollFlags::IN),
                (Source::Guest, self.stream.as_fd(), guest),
                (Source::Output, shown.as_fd(), when(!shown.is_empty(), PollFlags::OUT)),
            ];
            wanted.extend(input.map(|input| (Source::Input, input, when(takes_input, PollFlags::IN))));
            let ready = session::wait(&wanted, None).map_err(|error| broken(&error))?;
            while let Some(signal) = self.signals.next() {
                match signal {
                    signals::WINDOW if self.is_terminal => self.tell_size(),
                    signals::WINDOW => {}
                    signal => return Ok(Ending::Signalled(signal)),
                }
            }
            for (source, events) in ready {
                match (source, input) {
                    (Source::Guest, _) if !(events - PollFlags::OUT).is_empty() => {
                        match (&mut &*self.stream).read(&mut chunk) {
                            // The guest has ended, or berthd has.
                            Ok(0) => return Ok(Ending::Exit(Ended::Code(0))),
                            Ok(count) => shown.push(chunk.get(..count).unwrap_or_default()),
                            Err(error) if is_harmless(&error) => {}
                            Err(error) => return Err(broken(&error)),
                        }
                    }
                    (Source::Input, Some(from)) => match rustix::io::read(from, &mut chunk) {
                        Ok(count @ 1..) => {
                            let bytes = chunk.get(..count).unwrap_or_default();
                            match self.is_terminal.then(|| keys.typed(bytes)) {
                                Some(Typed::Leave(_)) => return Ok(Ending::Left),
                                Some(Typed::On(bytes)) => typed.push(&bytes),
                                None => typed.push(bytes),
                            }
                        }
                        Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                        // No more will be typed; what the guest says goes on.
                        Ok(_) | Err(_) if !self.is_terminal => input = None,
                        Ok(_) | Err(_) => return Ok(Ending::Left),
                    },
                    _ => {}
                }
            }
        }
    }

    /// Tells the guest the size of the terminal, if it has an agent: aside, for a guest may take long to answer.
    fn tell_size(&self) {
        let (daemon, guest, size) =
            (self.daemon.clone().with_timeout(PATIENCE), self.guest.to_string(), terminal::size());
        std::thread::spawn(move || {
            if let Ok(mut stream) = daemon.vsock(&guest, PORT, 0) {
                let _ = stream.set_read_timeout(Some(PATIENCE));
                let _ = client::window(&mut stream, size);
            }
        });
    }
}

/// Would be as good a moment later.
fn is_harmless(error: &io::Error) -> bool {
    [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted].contains(&error.kind())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_that_leave_are_told_as_they_are_on_a_keyboard() {
        let console =
            |keys: &str| Console { detach_keys: keys.parse().unwrap(), guest: "web".parse().unwrap() };
        assert_eq!(shown(&console("ctrl-]")), "Ctrl-]");
        assert_eq!(shown(&console("ctrl-p,ctrl-q")), "Ctrl-P Ctrl-Q");
        assert_eq!(shown(&console("~,.")), "~ .");
        assert_eq!(shown(&console("none")), "only its end");
    }
}
