//! Drives whose disk another process has: what such a drive may say, and the connection to that process.
//!
//! It is asked who it is when the request comes, so that its client hears what is wrong. When it dies later, the device
//! waits for another one at the same path; that is for `devices`.

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::path::Path;

use api_socket::{CacheType, Drive, DriveUpdate, Fault};
use devices::virtio::vhost_user::blk::CONFIG_BYTES;
use devices::virtio::vhost_user::session::{Connect, Lost, Session};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Checks what goes with `socket`.
///
/// # Errors
/// A field for which there is the back-end's own configuration.
pub fn check(drive: &Drive) -> Result<(), Fault> {
    refuse(&[
        ("path_on_host", drive.path_on_host.is_some()),
        ("is_read_only", drive.is_read_only.is_some()),
        ("rate_limiter", drive.rate_limiter.is_some()),
        ("io_engine", drive.io_engine.is_some()),
        ("direct", drive.direct.is_some()),
        ("format", drive.format.is_some()),
        ("backing", !drive.backing.is_empty()),
    ])?;
    match drive.cache_type {
        CacheType::Unsafe | CacheType::Writeback => Ok(()),
        CacheType::Writethrough => Err(Fault::bad_request(
            "`cache_type` is Writethrough, which nobody can tell a vhost-user back-end; give Writeback, with which the \
             guest flushes.",
        )),
    }
}

/// Asks the back-end at `socket` who it is.
///
/// # Errors
/// Nobody is there, or nobody who answers.
pub fn open(socket: &Path) -> Result<Session, Fault> {
    connect(socket).map_err(Lost::from).and_then(|stream| Session::open(stream, CONFIG_BYTES)).map_err(
        |error| {
            let advice = match &error {
                Lost::Host(error) => advice(error.kind()),
                _ => "Is it a vhost-user-blk back-end, and free for one more guest?",
            };
            Fault::bad_request(format!(
                "`socket` is {}, where no vhost-user back-end can be used: {error}. {advice}",
                socket.display()
            ))
        },
    )
}

/// Checks a change of such a drive: there is nothing to change here but to look again.
///
/// # Errors
/// A field that only a drive with `path_on_host` has.
pub fn check_update(update: &DriveUpdate) -> Result<(), Fault> {
    refuse(&[
        ("path_on_host", update.path_on_host.is_some()),
        ("rate_limiter", update.rate_limiter.is_some()),
    ])
}

/// How a device connects to this socket again.
pub fn connecting(socket: &Path) -> Connect {
    let socket = socket.to_path_buf();
    Box::new(move || connect(&socket))
}

/// The standard library's way waits while the other side's backlog is full.
fn connect(socket: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(socket)?;
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let stream = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&stream, &address)?;
    Ok(UnixStream::from(stream))
}

/// Two ends of a stream, the first of which does not block.
///
/// # Errors
/// Those of making it.
pub fn calls() -> io::Result<(UnixStream, UnixStream)> {
    let calls = UnixStream::pair()?;
    calls.0.set_nonblocking(true)?;
    Ok(calls)
}

fn refuse(others: &[(&str, bool)]) -> Result<(), Fault> {
    match others.iter().find(|(_, is_set)| *is_set) {
        None => Ok(()),
        Some((field, _)) => Err(Fault::bad_request(format!(
            "`socket` and `{field}` do not go together: with `socket` the disk is the back-end's, and so is what is said \
             of it. Leave `{field}` out and tell the back-end."
        ))),
    }
}

fn advice(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::NotFound => "Start it first; is its path right, seen from this process's root directory?",
        ErrorKind::ConnectionRefused => "Nobody listens there; start it first.",
        ErrorKind::PermissionDenied => "Let this process's user at it.",
        ErrorKind::WouldBlock => "It takes no calls; does it serve another guest?",
        _ => "Start it first.",
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::time::Instant;

    use api_socket::{DiskFormat, IoEngine, RateLimiter};
    use devices::virtio::vhost_user::session::REPLY_LIMIT;

    use super::*;

    fn drive() -> Drive {
        Drive { drive_id: "d".into(), ..Drive::default() }
    }

    #[test]
    fn what_the_back_end_is_told_is_refused_by_name() {
        let with = [
            ("path_on_host", Drive { path_on_host: Some("/d".into()), ..drive() }),
            ("is_read_only", Drive { is_read_only: Some(false), ..drive() }),
            ("rate_limiter", Drive { rate_limiter: Some(RateLimiter::default()), ..drive() }),
            ("io_engine", Drive { io_engine: Some(IoEngine::Sync), ..drive() }),
            ("direct", Drive { direct: Some(false), ..drive() }),
            ("format", Drive { format: Some(DiskFormat::Raw), ..drive() }),
        ];
        for (field, drive) in with {
            let text = check(&drive).unwrap_err().message;
            assert!(text.contains("`socket`") && text.contains(&format!("`{field}`")), "{text}");
        }
        let through = Drive { cache_type: CacheType::Writethrough, ..drive() };
        assert!(check(&through).unwrap_err().message.contains("`cache_type` is Writethrough"));
        let update = DriveUpdate { path_on_host: Some("/d".into()), ..DriveUpdate::default() };
        assert!(check_update(&update).unwrap_err().message.contains("`path_on_host`"));
        let update = DriveUpdate { rate_limiter: Some(RateLimiter::default()), ..DriveUpdate::default() };
        assert!(check_update(&update).unwrap_err().message.contains("`rate_limiter`"));
        assert!(check_update(&DriveUpdate::default()).is_ok());
    }

    #[test]
    fn nobody_at_the_socket_is_said_and_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let refused = |words: &[&str]| {
            let text = open(&path).unwrap_err().message;
            for word in words.iter().chain(&["`socket`", path.to_str().unwrap()]) {
                assert!(text.contains(word), "{word:?} is not in: {text}");
            }
        };
        refused(&["No such file", "Start it first"]);
        drop(UnixListener::bind(&path).unwrap());
        refused(&["refused", "Nobody listens"]);
    }

    #[test]
    fn one_that_is_no_back_end_or_does_not_answer_is_waited_for_so_long_and_no_longer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let begin = Instant::now();
        let text = open(&path).unwrap_err().message;
        assert!(text.contains("has not answered within 5 s"), "{text}");
        assert!(begin.elapsed() >= REPLY_LIMIT);
        drop(listener.accept().unwrap());
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 100]);
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        });
        let text = open(&path).unwrap_err().message;
        assert!(text.contains("breaks the protocol") && text.contains("vhost-user-blk"), "{text}");
        server.join().unwrap();
    }
}
