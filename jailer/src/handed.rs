//! Files that the VMM gets as open descriptors, so that they need not be in the cell and the VMM needs no right to open
//! them. The kinds of file are those that lead to no other: a directory would lead out of the cell. Of other devices there
//! are a tap and the kernel's back-end for one, which the VMM may be given in place of the nodes in the cell; of sockets,
//! one that listens at a path, for the API: whom it hears the file's owner decides.

use std::fs::{File, Metadata};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::makedev;
use rustix::net::{AddressFamily, SocketType, sockopt};

use crate::args::{self, Source};
use crate::cell::{TUN, VHOST_NET};
use crate::error::{During, Error, Result};

/// An open file and the name that it has for the VMM.
#[derive(Debug)]
pub struct Handed {
    pub name: String,
    pub file: File,
}

impl Handed {
    /// The value of the VMM's `--fd`.
    pub fn argument(&self) -> String {
        format!("{}={}", self.name, self.file.as_fd().as_raw_fd())
    }
}

/// Opens what is to be handed over. Call before anything else is opened: a number that is open now was left open by the
/// caller.
///
/// # Errors
/// What is named cannot be opened, or is none of the kinds that are handed over.
pub fn open(wanted: &[args::Handed]) -> Result<Vec<Handed>> {
    // First those that are open, before another file gets their numbers.
    let (descriptors, paths): (Vec<_>, Vec<_>) = wanted.iter().partition(|wanted| wanted.number().is_some());
    descriptors.into_iter().chain(paths).map(open_one).collect()
}

fn open_one(wanted: &args::Handed) -> Result<Handed> {
    let name = wanted.name.clone();
    let (shown, file) = match &wanted.source {
        Source::Descriptor(number) => (format!("--fd {name}={number}"), take(*number)),
        Source::Path { path, is_read_only } => {
            (format!("--file {name}={}", path.display()), open_path(path, *is_read_only))
        }
    };
    let file = file.during(|| format!("{shown} cannot be opened"))?;
    let metadata = file.metadata().during(|| shown.clone())?;
    let kind = metadata.file_type();
    let is_plain = kind.is_file() || kind.is_block_device() || kind.is_fifo();
    match is_plain || is_of_networks(&metadata) || is_listening(&file) {
        true => Ok(Handed { name, file }),
        false => Err(Error::Refused(format!(
            "{shown} is neither a file nor a block device, a pipe, a tap, /dev/vhost-net or a Unix stream socket that \
             listens; only these are handed over"
        ))),
    }
}

fn is_listening(file: &File) -> bool {
    sockopt::socket_domain(file) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(file) == Ok(SocketType::STREAM)
        && sockopt::socket_acceptconn(file) == Ok(true)
}

fn is_of_networks(metadata: &Metadata) -> bool {
    let devices = [TUN, VHOST_NET].map(|node| makedev(node.major, node.minor));
    metadata.file_type().is_char_device() && devices.contains(&metadata.rdev())
}

fn open_path(path: &Path, is_read_only: bool) -> std::io::Result<File> {
    // A pipe of that name must not hold us up.
    File::options().read(true).write(!is_read_only).custom_flags(libc::O_NONBLOCK).open(path)
}

fn take(number: RawFd) -> std::io::Result<File> {
    // SAFETY: the descriptor must stay open while it is borrowed; this is for one call, which says whether it is open.
    rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) })?;
    // SAFETY: a File must be the only owner of an open descriptor. This one is open, as fcntl has just said. Nothing in
    // this process owns it, for nothing was opened yet, and the numbers on a command line are above those of the standard
    // streams and all different (`args`).
    Ok(unsafe { File::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::{IntoRawFd, OwnedFd};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::PathBuf;

    fn path(path: PathBuf, is_read_only: bool) -> args::Handed {
        args::Handed { name: "disk".into(), source: Source::Path { path, is_read_only } }
    }

    fn descriptor(fd: OwnedFd) -> args::Handed {
        args::Handed { name: "disk".into(), source: Source::Descriptor(fd.into_raw_fd()) }
    }

    #[test]
    fn a_file_is_opened_as_it_was_asked_for() {
        let place = tempfile::tempdir().unwrap();
        let image = place.path().join("image");
        std::fs::write(&image, "content").unwrap();
        let mut opened = open(&[path(image.clone(), false), path(image.clone(), true)]).unwrap();
        opened[0].file.write_all(b"CON").unwrap();
        let mut text = String::new();
        opened[1].file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "CONtent");
        assert!(opened[1].file.write_all(b"x").is_err());
        assert_eq!(opened[0].argument(), format!("disk={}", opened[0].file.as_raw_fd()));
    }

    #[test]
    fn a_descriptor_that_is_open_is_taken() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        assert_eq!(open(&[descriptor(file.into())]).unwrap()[0].file.metadata().unwrap().len(), 7);
        let wanted = args::Handed { name: "disk".into(), source: Source::Descriptor(libc::c_int::MAX) };
        assert!(open(&[wanted]).unwrap_err().to_string().contains("--fd disk=2147483647 cannot be opened"));
    }

    #[test]
    fn devices_of_networks_are_known_by_their_numbers() {
        let is_of_networks = |path| std::fs::metadata(path).ok().map(|metadata| is_of_networks(&metadata));
        assert_eq!(is_of_networks("/dev/null"), Some(false));
        assert_eq!(is_of_networks("/"), Some(false));
        // Not every machine has them.
        for device in ["/dev/net/tun", "/dev/vhost-net"] {
            assert_ne!(is_of_networks(device), Some(false), "{device}");
        }
    }

    #[test]
    fn what_leads_to_other_files_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let socket = place.path().join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        for wrong in [place.path().into(), socket.clone(), "/dev/null".into(), place.path().join("absent")] {
            let error = open(&[path(wrong.clone(), true)]).unwrap_err().to_string();
            assert!(error.contains(&format!("--file disk={}", wrong.display())), "{error}");
        }
        let directory = File::open(place.path()).unwrap();
        let connected = UnixStream::connect(&socket).unwrap();
        let of_networks = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for wrong in [OwnedFd::from(directory), connected.into(), of_networks.into()] {
            let error = open(&[descriptor(wrong)]).unwrap_err().to_string();
            assert!(error.contains("neither a file nor a block device"), "{error}");
        }
    }

    #[test]
    fn a_pipe_and_a_unix_socket_that_listens_are_handed_over() {
        let place = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(place.path().join("socket")).unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        for right in [OwnedFd::from(listener), reader.into(), writer.into()] {
            open(&[descriptor(right)]).unwrap();
        }
        let pipe = place.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
            .unwrap();
        open(&[path(pipe, false)]).unwrap();
    }
}
