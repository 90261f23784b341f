//! The host's side of the socket device: the Unix socket that is listened at, and the paths of those that the guest may
//! call.
//!
//! The socket is made when the request comes, so that a program of the host can wait at it before the guest runs. Its
//! file stays when the process ends, as that of the API does.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use api_socket::{Fault, GUEST_CID};
use devices::virtio::vsock::{Config, Connect};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::check_io_thread;

/// What the device is made of.
pub struct Socket {
    pub io_thread: Option<u8>,
    pub config: Config,
}

/// A socket device, and the socket until the guest has started.
pub struct Vsock {
    pub settings: api_socket::Vsock,
    listener: Option<UnixListener>,
}

impl Vsock {
    /// Checks the settings and makes the socket.
    ///
    /// # Errors
    /// A `guest_cid` that no guest can have; a `uds_path` at which no socket can be made, as where there is a file.
    pub fn listen(settings: api_socket::Vsock) -> Result<Vsock, Fault> {
        check(&settings)?;
        let path = &settings.uds_path;
        let listener = UnixListener::bind(path).map_err(|error| {
            let advice = match error.kind() {
                ErrorKind::AddrInUse => "Remove the file if no other process listens there",
                ErrorKind::InvalidInput => "Give a shorter path: the name of a socket has at most 107 bytes",
                _ => "Give a path in a directory that exists and may be written to",
            };
            Fault::bad_request(format!(
                "`uds_path` is {}, where no socket can be made: {error}. {advice}.",
                path.display()
            ))
        })?;
        Ok(Vsock { settings, listener: Some(listener) })
    }

    /// Other settings. The socket stays if the path does; otherwise its file is removed after the new one was made.
    ///
    /// # Errors
    /// As [`Vsock::listen`]; with the device as it was.
    pub fn replace(self, settings: api_socket::Vsock) -> Result<Vsock, (Vsock, Fault)> {
        if settings.uds_path == self.settings.uds_path {
            return match check(&settings) {
                Ok(()) => Ok(Vsock { settings, ..self }),
                Err(fault) => Err((self, fault)),
            };
        }
        match Vsock::listen(settings) {
            Ok(vsock) => {
                // Somebody else may have removed it.
                let _ = fs::remove_file(&self.settings.uds_path);
                Ok(vsock)
            }
            Err(fault) => Err((self, fault)),
        }
    }

    /// The device, with a descriptor of its own.
    ///
    /// # Errors
    /// Those of `dup`; and after [`Vsock::started`].
    pub fn device(&self) -> io::Result<Socket> {
        let listener =
            self.listener.as_ref().ok_or_else(|| io::Error::other("the guest has its sockets already"))?;
        let config = Config {
            guest_cid: self.settings.guest_cid.into(),
            listener: listener.try_clone()?,
            connect: connect(&self.settings.uds_path),
        };
        Ok(Socket { io_thread: self.settings.io_thread, config })
    }

    /// The guest has it.
    pub fn started(&mut self) {
        self.listener = None;
    }
}

fn check(settings: &api_socket::Vsock) -> Result<(), Fault> {
    check_io_thread(settings.io_thread)?;
    check_cid(settings.guest_cid)
}

fn check_cid(cid: u32) -> Result<(), Fault> {
    if GUEST_CID.contains(&cid) {
        return Ok(());
    }
    let (least, most) = (GUEST_CID.start(), GUEST_CID.end());
    Err(Fault::bad_request(format!("`guest_cid` is {cid}; it must be from {least} to {most}.")))
}

/// Connects to the socket of a port. The standard library's way waits while the other side's backlog is full.
fn connect(uds_path: &Path) -> Connect {
    let prefix = uds_path.as_os_str().as_bytes().to_vec();
    Box::new(move |port| {
        let address = SocketAddrUnix::new([&prefix[..], format!("_{port}").as_bytes()].concat())?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &address)?;
        Ok(UnixStream::from(socket))
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_port_is_a_path_and_a_full_backlog_makes_nobody_wait() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v.sock");
        let connect = connect(&path);
        assert_eq!(connect(80).unwrap_err().kind(), ErrorKind::NotFound);
        let address = SocketAddrUnix::new(directory.path().join("v.sock_80")).unwrap();
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .unwrap();
        rustix::net::bind(&socket, &address).unwrap();
        assert_eq!(connect(80).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        rustix::net::listen(&socket, 1).unwrap();
        let mut first = connect(80).unwrap();
        let refused = std::iter::repeat_with(|| connect(80)).take(10).find_map(Result::err);
        assert_eq!(refused.unwrap().kind(), ErrorKind::WouldBlock);

        let (mut server, _) = UnixListener::from(socket).accept().unwrap();
        server.write_all(b"x").unwrap();
        let mut byte = [0];
        first.read_exact(&mut byte).unwrap();
        assert_eq!(first.read(&mut byte).unwrap_err().kind(), ErrorKind::WouldBlock);
    }
}
