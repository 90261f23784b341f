//! What systemd and the daemon say to each other: that it is ready (sd_notify(3)), and the socket that was made for it
//! (sd_listen_fds(3)).

use std::ffi::OsStr;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};

/// The first descriptor that systemd hands over.
const FIRST: i32 = 3;

/// The socket that systemd listens on for us, if it does. Once, before anything is opened.
pub fn socket() -> Option<UnixListener> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    if number("LISTEN_PID") != Some(std::process::id()) || number("LISTEN_FDS").is_none_or(|count| count == 0)
    {
        return None;
    }
    // SAFETY: the descriptor must be open and nobody else's. That both variables are there and the one is our number is
    // systemd's word that it opened this one for us; this function is called once, by `main`, and nothing else takes it.
    let socket = unsafe { OwnedFd::from_raw_fd(FIRST) };
    // It came without, so that it would survive the exec. A guest is not to have it.
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC).ok()?;
    Some(UnixListener::from(socket))
}

/// Tells whoever started us, if it wants to know.
///
/// # Errors
/// Those of the socket.
pub fn ready() -> io::Result<()> {
    match std::env::var_os("NOTIFY_SOCKET") {
        Some(socket) => tell(&socket, "READY=1"),
        None => Ok(()),
    }
}

fn tell(socket: &OsStr, what: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
    };
    UnixDatagram::unbound()?.send_to_addr(what.as_bytes(), &address).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_it_is_told() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("notify");
        let name = format!("@berth-test-{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name.as_bytes()[1..]).unwrap();
        let listeners = [
            (path.as_os_str(), UnixDatagram::bind(&path).unwrap()),
            (OsStr::new(&name), UnixDatagram::bind_addr(&abstract_address).unwrap()),
        ];
        for (socket, listener) in listeners {
            tell(socket, "READY=1").unwrap();
            let mut buffer = [0; 64];
            let count = listener.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..count], b"READY=1");
        }
    }
}
