//! Reaching the agent in a guest, by way of berthd: an operation is a connection.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use agent::client;
use agent::protocol::PORT;
use api_socket::fleet::Client;

use crate::daemon::About;
use crate::error::{Error, Result};

/// How long a guest may take to boot until commands can be run in it: what a stock system takes where all is emulated, a few
/// times over.
pub const BOOT: Duration = Duration::from_secs(180);
/// Between two looks whether its root is there.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A connection to the agent of a guest that has booted so far that commands find its files, or an error when it takes
/// longer than this.
///
/// # Errors
/// berthd refuses or is not there; there is no agent.
pub fn ready(daemon: &Client, guest: &str, patience: Duration) -> Result<UnixStream> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut stream = connect(daemon, guest, left)?;
        match client::ping(&mut stream) {
            Ok(pong) if pong.root_is_ready => return connect(daemon, guest, left),
            Ok(_) if left.is_zero() => {
                let why = format!("has no root file system after {} s", patience.as_secs());
                return Err(Error::new(guest, why).remedy(format!("see what it says: berth logs {guest}")));
            }
            Ok(_) => std::thread::sleep(LOOK_AGAIN),
            // It ended, or its agent was moved along with its root: berthd knows.
            Err(client::ClientError::Protocol(_)) if !left.is_zero() => std::thread::sleep(LOOK_AGAIN),
            Err(error) => return Err(told(guest, &error)),
        }
    }
}

/// A connection to the agent, as the guest is now or will be within this time.
///
/// # Errors
/// As for [`ready`].
pub fn connect(daemon: &Client, guest: &str, patience: Duration) -> Result<UnixStream> {
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
