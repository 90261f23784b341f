//! What is asked of a running VMM over the guest's own API, and of programs in the guest over its sockets. Each wait has its
//! limit: a VMM that never answers costs its caller some seconds and nobody else anything.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use api_socket::{
    BalloonUpdate, CacheType, Client, ClientError, Drive, InstanceState, MemoryHotplugSizeUpdate, Request,
    VmState,
};
use rustix::fs::OFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::cell::{self, Places};

/// How long a VMM may take for an answer: pausing waits for the guest's disks.
pub const ANSWER: Duration = Duration::from_secs(10);
/// The same when it is asked whether it is there.
const PING: Duration = Duration::from_secs(1);
/// How long the guest's agent may take to say that it shuts down.
const AGENT: Duration = Duration::from_secs(3);
/// The longest line that says that somebody took a connection, in bytes: `OK` and a number.
const MAX_LINE: usize = 32;
/// Where the VMM has the guest's sockets, in its cell.
pub const VSOCK: &str = "run/v.sock";

/// Whether the VMM says that its guest runs.
///
/// # Errors
/// It does not answer.
pub fn is_running(places: &Places) -> Result<bool, ClientError> {
    Ok(state(places)? != InstanceState::NotStarted)
}

/// What the VMM says of its guest.
///
/// # Errors
/// It does not answer.
pub fn state(places: &Places) -> Result<InstanceState, ClientError> {
    Ok(client(places, PING)?.instance_info()?.state)
}

/// Pauses or resumes the guest.
///
/// # Errors
/// It does not answer, or refuses.
pub fn set_state(places: &Places, state: VmState) -> Result<(), ClientError> {
    client(places, ANSWER)?.apply(&Request::PatchVm(state))
}

/// Takes so many MiB from the guest.
///
/// # Errors
/// It does not answer, or refuses.
pub fn set_balloon(places: &Places, amount_mib: u32) -> Result<(), ClientError> {
    client(places, ANSWER)?.apply(&Request::PatchBalloon(BalloonUpdate { amount_mib }))
}

/// Has so many MiB plugged into the guest, as far as it goes along.
///
/// # Errors
/// It does not answer, or refuses.
pub fn set_plugged(places: &Places, mib: u32) -> Result<(), ClientError> {
    let update = MemoryHotplugSizeUpdate { requested_size_mib: mib.into() };
    client(places, ANSWER)?.apply(&Request::PatchMemoryHotplug(update))
}

/// Gives the guest a disk, whose file is in its cell.
///
/// # Errors
/// It does not answer, or refuses.
pub fn add_disk(places: &Places, name: &str, path: PathBuf) -> Result<(), ClientError> {
    let drive = Drive {
        drive_id: name.to_owned(),
        path_on_host: Some(path),
        cache_type: CacheType::Writeback,
        ..Drive::default()
    };
    client(places, ANSWER)?.apply(&Request::PutDrive(drive))
}

/// Asks the guest to let go of a disk.
///
/// # Errors
/// It does not answer, or refuses.
pub fn remove_disk(places: &Places, name: &str) -> Result<(), ClientError> {
    client(places, ANSWER)?.apply(&Request::DeleteDrive(name.to_owned()))
}

/// Whether the guest has a disk of this name.
///
/// # Errors
/// It does not answer.
pub fn has_disk(places: &Places, name: &str) -> Result<bool, ClientError> {
    let config = client(places, ANSWER)?.vm_config()?;
    Ok(config.drives.iter().any(|drive| drive.drive_id == name))
}

fn client(places: &Places, timeout: Duration) -> Result<Client, ClientError> {
    let path = places.api();
    let stream = call(&path).map_err(|source| ClientError::Io { path: path.clone(), source })?;
    let mut client = Client::over(stream, &path);
    client.set_timeout(Some(timeout))?;
    Ok(client)
}

/// Asks the guest's agent to shut it down, if there is one.
pub fn shut_down(places: &Places, uid: u32) {
    let ask = || -> Option<()> {
        let mut stream = vsock(places, uid, agent::protocol::PORT).ok()?;
        stream.set_read_timeout(Some(AGENT)).ok()?;
        agent::client::shut_down(&mut stream).ok()
    };
    // Who has none, or whose agent does not know its init, has been asked by the power button.
    let _ = ask();
}

/// A connection to a port of the guest, which somebody there has taken.
///
/// # Errors
/// `ConnectionRefused` if nobody listens there, or not yet; others if there is no such VMM.
pub fn vsock(places: &Places, uid: u32, port: u32) -> io::Result<UnixStream> {
    let socket = guests_socket(&places.root, uid)?;
    // By way of the descriptor, so that what was looked at is what is called.
    let stream = call(&PathBuf::from(format!("/proc/self/fd/{}", socket.as_raw_fd())))?;
    introduce(&stream, port, Instant::now() + ANSWER)?;
    // From here on it is the client's: who does not read makes the other side wait.
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    Ok(stream)
}

/// Says which port is meant and hears whether somebody took it, and nothing of what follows, which is the guest's.
fn introduce(mut stream: &UnixStream, port: u32, until: Instant) -> io::Result<()> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        if line.len() == MAX_LINE {
            return Err(io::Error::new(ErrorKind::InvalidData, "the VMM does not say what it should"));
        }
        stream.set_read_timeout(Some(left))?;
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Err(ErrorKind::ConnectionRefused.into()),
            Ok(_) => line.extend(byte),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                return Err(ErrorKind::ConnectionRefused.into());
            }
            Err(error) => return Err(error),
        }
    }
    if line.starts_with(b"OK ") { Ok(()) } else { Err(ErrorKind::ConnectionRefused.into()) }
}

/// The VMM's socket in its cell. What is in a cell is the VMM's to change: a link there, or another's socket, would have us
/// connect whoever may use this guest to something of the host's.
fn guests_socket(root: &Path, uid: u32) -> io::Result<OwnedFd> {
    let socket = cell::find_in(root, VSOCK, OFlags::empty())?;
    let stat = socket.metadata()?;
    use std::os::unix::fs::FileTypeExt;
    if !stat.file_type().is_socket() || stat.uid() != uid {
        return Err(io::Error::other("the guest's socket in its cell is not its own"));
    }
    Ok(socket.into())
}

/// Connects without waiting: a server that takes nobody is as good as none.
fn call(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(ANSWER))?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_the_vmm_s_own_socket_is_called() {
        let place = tempfile::tempdir().unwrap();
        let uid = fs::metadata(&place).unwrap().uid();
        fs::create_dir(place.path().join("run")).unwrap();
        let (inside, outside) = (place.path().join(VSOCK), place.path().join("host.sock"));
        let _host = UnixListener::bind(&outside).unwrap();
        let find = |uid| guests_socket(place.path(), uid);
        assert_eq!(find(uid).unwrap_err().kind(), ErrorKind::NotFound);
        symlink(&outside, &inside).unwrap();
        assert!(find(uid).is_err());
        fs::remove_file(&inside).unwrap();
        fs::write(&inside, "").unwrap();
        assert!(find(uid).is_err());
        fs::remove_file(&inside).unwrap();
        let _own = UnixListener::bind(&inside).unwrap();
        assert!(find(uid).is_ok());
        assert!(find(uid + 1).is_err());
        fs::rename(place.path().join("run"), place.path().join("away")).unwrap();
        symlink(place.path().join("away"), place.path().join("run")).unwrap();
        assert!(find(uid).is_err());
    }

    #[test]
    fn a_server_that_takes_nobody_is_not_waited_for() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("socket");
        let _server = UnixListener::bind(&path).unwrap();
        let mut connections = Vec::new();
        let error = loop {
            match call(&path) {
                Ok(connection) => connections.push(connection),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    }

    #[test]
    fn a_vmm_that_goes_on_for_ever_is_not_listened_to() {
        for (said, pause) in [(&[b'x'; 4096][..], Duration::ZERO), (b"x", Duration::from_millis(15))] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let vmm = std::thread::spawn(move || {
                while theirs.write_all(said).is_ok() {
                    std::thread::sleep(pause);
                }
            });
            assert!(introduce(&ours, 1, Instant::now() + Duration::from_millis(100)).is_err());
            drop(ours);
            vmm.join().unwrap();
        }
    }

    #[test]
    fn what_the_guest_says_first_is_not_taken_from_it() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"OK 1024\nhello").unwrap();
        introduce(&ours, 1, Instant::now() + Duration::from_secs(60)).unwrap();
        let mut buffer = [0; 16];
        assert_eq!((&ours).read(&mut buffer).unwrap(), 5);
        drop(theirs);
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(introduce(&ours, 1, Instant::now() + Duration::from_secs(60)).is_err());
    }
}
