//! Reaching the agent in a guest, by way of berthd: an operation is a connection.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent::client;
use agent::protocol::{Kind, PORT, ProtocolError};
use api_socket::ClientError;
use api_socket::fleet::{Client, Guest, State};

use crate::daemon::About;
use crate::error::{Error, Result};

/// How long a guest may take to boot until commands can be run in it: what a stock system takes where all is emulated, a few
/// times over.
const BOOT: Duration = Duration::from_secs(180);
/// Between two looks whether its root is there.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// The least time that a guest is given whose boot should be over: its agent may be busy.
const LEAST: Duration = Duration::from_secs(5);

/// What is there when a guest has terminals to give, and how long it is waited for: they come a moment after its root.
const TERMINALS: &str = "/dev/pts/ptmx";
const TERMINALS_PATIENCE: Duration = Duration::from_secs(10);

/// A connection to the agent of a guest that has booted so far that commands find its files and, if one is wanted, a
/// terminal. One that still boots is waited for.
///
/// # Errors
/// berthd refuses or is not there; there is no agent.
pub fn ready(daemon: &Client, guest: &str, wants_terminal: bool) -> Result<UnixStream> {
    let begin = Instant::now();
    // Mostly there is nothing to wait for.
    let mut stream = match daemon.vsock(guest, PORT, 0) {
        Err(ClientError::Refused(_)) => connect(daemon, guest, patience(daemon, guest)?)?,
        outcome => outcome.about(guest)?,
    };
    loop {
        let left = BOOT.saturating_sub(begin.elapsed());
        match client::ping(&mut stream) {
            Ok(pong) if pong.root_is_ready => {
                if wants_terminal {
                    wait_for_terminals(daemon, guest)?;
                }
                return connect(daemon, guest, left);
            }
            // The connection breaks if the guest ends, and berthd knows.
            Ok(_) | Err(client::ClientError::Protocol(ProtocolError::Ended | ProtocolError::Io(_)))
                if !left.is_zero() =>
            {
                std::thread::sleep(LOOK_AGAIN);
                stream = connect(daemon, guest, left)?;
            }
            Ok(_) => {
                let why = format!("has no root file system after {} s", BOOT.as_secs());
                return Err(Error::new(guest, why).remedy(format!("see what it says: berth logs {guest}")));
            }
            Err(error) => return Err(told(guest, &error)),
        }
    }
}

/// A guest that has none after all says so itself, when it is asked for one.
fn wait_for_terminals(daemon: &Client, guest: &str) -> Result<()> {
    let begin = Instant::now();
    while begin.elapsed() < TERMINALS_PATIENCE {
        let mut stream = connect(daemon, guest, LEAST)?;
        let found = client::look(&mut stream, TERMINALS).map_err(|error| told(guest, &error))?;
        if found.kind != Kind::Nothing {
            break;
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    Ok(())
}

/// How long to wait for a guest whose agent does not listen.
fn patience(daemon: &Client, guest: &str) -> Result<Duration> {
    let Guest { state, started_at, .. } = daemon.guest(guest).about(guest)?;
    if state == State::Paused {
        return Err(Error::new(guest, "is paused").remedy(format!("let it go on: berth resume {guest}")));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let up = started_at.and_then(|at| Duration::try_from_secs_f64(now.as_secs_f64() - at).ok());
    Ok(BOOT.saturating_sub(up.unwrap_or_default()).max(LEAST))
}

/// A connection to the agent, as the guest is now or will be within this time.
fn connect(daemon: &Client, guest: &str, patience: Duration) -> Result<UnixStream> {
    let seconds = u32::try_from(patience.as_secs()).unwrap_or(u32::MAX);
    daemon.vsock(guest, PORT, seconds).about(guest)
}

/// What an agent said, or that it said nothing.
pub fn told(guest: &str, error: &client::ClientError) -> Error {
    match error {
        client::ClientError::Refused(why) => Error::new(guest, why),
        other => {
            Error::new(guest, other).remedy(format!("see how it is: berth ps --all; berth logs {guest}"))
        }
    }
}
