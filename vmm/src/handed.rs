//! Files that were handed to this process as open descriptors: `--fd NAME=NUMBER` on the command line, and `fd:NAME` where
//! the path of a kernel, an initrd or a disk is wanted, of something that is written to (the log, the metrics, the serial
//! port's output, the exit status), or of the API's socket.
//!
//! Whoever started the process opened them, so it needs neither a path to them nor the right to open them. What an image
//! is, and whether it may be used so, is decided where a path's file is looked at too (`config.rs`).

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use api_socket::Fault;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::net::{AddressFamily, SocketType, sockopt};

use crate::args::ArgsError;

/// Begins what stands for a descriptor in place of a path.
const PREFIX: &[u8] = b"fd:";

/// The files, by name.
#[derive(Debug, Default)]
pub struct Handed(Vec<Named>);

#[derive(Debug)]
struct Named {
    name: String,
    file: File,
    /// `O_RDONLY`, `O_WRONLY` or `O_RDWR`.
    access: libc::c_int,
}

impl Handed {
    /// Takes the descriptors that the command line names. Call before this process opens anything: a number that is open
    /// now was handed over.
    ///
    /// # Errors
    /// A number is that of no open descriptor, or of one that is open for neither reading nor writing.
    pub fn take(named: &[(String, RawFd)]) -> Result<Handed, ArgsError> {
        let taken: Result<_, _> = named.iter().map(|(name, number)| take(name, *number)).collect();
        Ok(Handed(taken?))
    }

    /// The file that stands in this path's place, with a descriptor of its own and the position shared by all; `None` for
    /// a path. Where nothing was handed over, all are paths.
    ///
    /// # Errors
    /// No file of this name was handed over, or it was, and not to be read from, or not to be written to.
    pub fn find(&self, field: &str, path: &Path, is_writable: bool) -> Option<Result<File, Fault>> {
        let found = |name| self.image(name, is_writable);
        Some(found(self.name(path)?).map_err(about(field, path)))
    }

    /// The same for what is only written to. A regular file is appended to. A pipe or a socket makes nobody wait from now
    /// on; that and the position is of the open file, so it holds for all who have it.
    ///
    /// # Errors
    /// No file of this name was handed over, or it was, and not to be written to.
    pub fn find_output(&self, field: &str, path: &Path) -> Option<Result<File, Fault>> {
        Some(self.output(self.name(path)?).map_err(about(field, path)))
    }

    /// The same for a listening Unix socket.
    ///
    /// # Errors
    /// Nothing of this name was handed over, or it was, and is something else.
    pub fn find_listener(&self, field: &str, path: &Path) -> Option<Result<UnixListener, Fault>> {
        Some(self.listener(self.name(path)?).map_err(about(field, path)))
    }

    /// This path stands for a file that was handed over, or should have been.
    pub fn stands_for(&self, path: &Path) -> bool {
        self.name(path).is_some()
    }

    fn name<'a>(&self, path: &'a Path) -> Option<&'a [u8]> {
        if self.0.is_empty() { None } else { path.as_os_str().as_bytes().strip_prefix(PREFIX) }
    }

    fn image(&self, name: &[u8], is_writable: bool) -> Result<File, String> {
        let found = self.named(name)?;
        if found.access == libc::O_WRONLY {
            return Err("which was handed over for writing only; hand it over for reading too.".into());
        }
        if is_writable && found.access != libc::O_RDWR {
            return Err(
                "which was handed over for reading only; set `is_read_only`, or hand it over for writing."
                    .into(),
            );
        }
        found.duplicate()
    }

    fn output(&self, name: &[u8]) -> Result<File, String> {
        let found = self.named(name)?;
        if found.access == libc::O_RDONLY {
            return Err("which was handed over for reading only; hand it over for writing.".into());
        }
        let changed = |error: io::Error| format!("which cannot be set up to be written to: {error}.");
        let kind = found.file.metadata().map_err(changed)?.file_type();
        if kind.is_socket() && sockopt::socket_acceptconn(&found.file).unwrap_or(false) {
            return Err("which is a listening socket; hand over a file, or one end of a pipe.".into());
        }
        let wanted = match (kind.is_file(), kind.is_fifo() || kind.is_socket()) {
            (true, _) => OFlags::APPEND,
            (_, true) => OFlags::NONBLOCK,
            // A terminal is others' too.
            _ => OFlags::empty(),
        };
        fcntl_getfl(&found.file)
            .and_then(|flags| fcntl_setfl(&found.file, flags | wanted))
            .map_err(|error| changed(error.into()))?;
        found.duplicate()
    }

    fn listener(&self, name: &[u8]) -> Result<UnixListener, String> {
        let found = self.named(name)?;
        let is_listening = sockopt::socket_domain(&found.file) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(&found.file) == Ok(SocketType::STREAM)
            && sockopt::socket_acceptconn(&found.file) == Ok(true);
        match is_listening {
            true => Ok(UnixListener::from(OwnedFd::from(found.duplicate()?))),
            false => {
                Err("which is not a Unix stream socket that listens; bind one, listen, then hand it over."
                    .into())
            }
        }
    }

    fn named(&self, name: &[u8]) -> Result<&Named, String> {
        self.0.iter().find(|named| named.name.as_bytes() == name).ok_or_else(|| {
            let names: Vec<_> = self.0.iter().map(|named| named.name.as_str()).collect();
            format!("and nothing of that name was handed over; these were: {}.", names.join(", "))
        })
    }
}

impl Named {
    fn duplicate(&self) -> Result<File, String> {
        self.file.try_clone().map_err(|error| format!("which cannot be duplicated: {error}."))
    }
}

fn about(field: &str, path: &Path) -> impl Fn(String) -> Fault {
    move |why| Fault::bad_request(format!("`{field}` is {}, {why}", path.display()))
}

fn take(name: &str, number: RawFd) -> Result<Named, ArgsError> {
    let refused = |rule| ArgsError::Invalid { flag: "fd", value: format!("{name}={number}"), rule };
    // SAFETY: F_GETFL takes a number, open or not, and touches no memory.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFL) };
    if flags < 0 {
        return Err(refused(match io::Error::last_os_error().raw_os_error() {
            Some(libc::EBADF) => {
                "and there is no open descriptor of this number; leave one open for this process"
            }
            _ => "and this descriptor cannot be asked for its mode",
        }));
    }
    let access = flags & libc::O_ACCMODE;
    if flags & libc::O_PATH != 0 {
        return Err(refused("and this descriptor can be neither read from nor written to; open it for that"));
    }
    // SAFETY: a File must be the only owner of an open descriptor. This one is open, as fcntl has just said. Nothing in
    // this process owns it: `Handed::take` is called before anything is opened, and the numbers on a command line are
    // above those of the standard streams and all different (`args::fds`).
    let file = unsafe { File::from_raw_fd(number) };
    Ok(Named { name: name.into(), file, access })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::IntoRawFd;
    use std::os::unix::fs::OpenOptionsExt;

    fn handed(place: &Path) -> Handed {
        let path = place.join("image");
        std::fs::write(&path, "content").unwrap();
        let read = File::open(&path).unwrap().into_raw_fd();
        let write = File::options().read(true).write(true).open(&path).unwrap().into_raw_fd();
        Handed::take(&[("kernel".into(), read), ("disk".into(), write)]).unwrap()
    }

    fn find(handed: &Handed, name: &str, is_writable: bool) -> Option<Result<File, String>> {
        Some(handed.find("path_on_host", Path::new(name), is_writable)?.map_err(|fault| fault.message))
    }

    #[test]
    fn a_name_with_the_prefix_stands_for_its_descriptor_again_and_again() {
        let place = tempfile::tempdir().unwrap();
        let handed = handed(place.path());
        for _ in 0..2 {
            find(&handed, "fd:disk", true).unwrap().unwrap().write_all(b"CON").unwrap();
            let mut file = find(&handed, "fd:kernel", false).unwrap().unwrap();
            std::io::Seek::rewind(&mut file).unwrap();
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            assert!(text.starts_with("CON"), "{text}");
        }
    }

    #[test]
    fn what_was_not_handed_over_is_named_with_what_was() {
        let place = tempfile::tempdir().unwrap();
        let error = find(&handed(place.path()), "fd:other", false).unwrap().unwrap_err();
        for part in ["`path_on_host` is fd:other", "kernel, disk"] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_file_for_reading_is_not_written_to() {
        let place = tempfile::tempdir().unwrap();
        let error = find(&handed(place.path()), "fd:kernel", true).unwrap().unwrap_err();
        assert!(error.contains("for reading only") && error.contains("is_read_only"), "{error}");
    }

    #[test]
    fn a_path_is_a_path_also_with_the_prefix_where_nothing_was_handed_over() {
        let place = tempfile::tempdir().unwrap();
        for path in ["/fd:disk", "./fd:disk", "disk", "FD:disk"] {
            assert!(find(&handed(place.path()), path, false).is_none(), "{path}");
        }
        assert!(find(&Handed::default(), "fd:disk", false).is_none());
    }

    #[test]
    fn a_descriptor_that_is_not_open_or_only_a_place_is_refused() {
        let closed = libc::c_int::MAX;
        let error = Handed::take(&[("disk".into(), closed)]).unwrap_err().to_string();
        assert!(
            error.contains(&format!("--fd is \"disk={closed}\"")) && error.contains("no open"),
            "{error}"
        );
        let place = tempfile::tempdir().unwrap();
        let only = File::options().read(true).custom_flags(libc::O_PATH).open(place.path()).unwrap();
        let error = Handed::take(&[("disk".into(), only.into_raw_fd())]).unwrap_err().to_string();
        assert!(error.contains("neither read from nor written to"), "{error}");
    }

    fn one(file: impl IntoRawFd) -> Handed {
        Handed::take(&[("it".into(), file.into_raw_fd())]).unwrap()
    }

    fn output(handed: &Handed) -> Result<File, String> {
        handed.find_output("log_path", Path::new("fd:it")).unwrap().map_err(|fault| fault.message)
    }

    #[test]
    fn what_is_only_written_to_is_an_output_and_no_image() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("log");
        std::fs::write(&path, "before\n").unwrap();
        let handed = one(File::options().write(true).open(&path).unwrap());
        for is_writable in [false, true] {
            let error = find(&handed, "fd:it", is_writable).unwrap().unwrap_err();
            assert!(error.contains("for writing only"), "{error}");
        }
        output(&handed).unwrap().write_all(b"after\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "before\nafter\n");
        let error = output(&one(File::open(&path).unwrap())).unwrap_err();
        assert!(error.contains("`log_path` is fd:it") && error.contains("for reading only"), "{error}");
    }

    #[test]
    fn a_pipe_that_was_handed_over_to_be_written_to_makes_nobody_wait() {
        let (_reader, writer) = io::pipe().unwrap();
        let mut pipe = output(&one(OwnedFd::from(writer))).unwrap();
        let full = loop {
            if let Err(error) = pipe.write(&[b'x'; 4096]) {
                break error;
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn only_a_unix_socket_that_listens_can_be_listened_on() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("socket");
        let listener = |handed: &Handed| {
            let found = handed.find_listener("api-sock", Path::new("fd:it")).unwrap();
            found.map_err(|fault| fault.message)
        };
        let handed = one(UnixListener::bind(&path).unwrap());
        let client = std::os::unix::net::UnixStream::connect(&path).unwrap();
        listener(&handed).unwrap().accept().unwrap();
        assert!(output(&handed).unwrap_err().contains("listening socket"));

        let datagrams = std::os::unix::net::UnixDatagram::bind(place.path().join("datagrams")).unwrap();
        let others = [
            one(client),
            one(datagrams),
            one(std::net::TcpListener::bind("127.0.0.1:0").unwrap()),
            one(File::open(place.path()).unwrap()),
        ];
        for other in others {
            let error = listener(&other).unwrap_err();
            assert!(error.contains("`api-sock` is fd:it") && error.contains("that listens"), "{error}");
        }
        assert!(handed.find_listener("api-sock", &path).is_none());
    }
}
