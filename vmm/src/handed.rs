//! Files that were handed to this process as open descriptors: `--fd NAME=NUMBER` on the command line, and `fd:NAME` where
//! the API wants the path of a kernel, an initrd or a disk.
//!
//! Whoever started the process opened them, so it needs neither a path to them nor the right to open them. What a file
//! is, and whether it may be used so, is decided where a path's file is looked at too (`config.rs`).

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use api_socket::Fault;

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
    /// A number is that of no open descriptor, or of one that cannot be read from.
    pub fn take(named: &[(String, RawFd)]) -> Result<Handed, ArgsError> {
        let taken: Result<_, _> = named.iter().map(|(name, number)| take(name, *number)).collect();
        Ok(Handed(taken?))
    }

    /// The file that stands in this path's place, with a descriptor of its own and the position shared by all; `None` for
    /// a path. Where nothing was handed over, all are paths.
    ///
    /// # Errors
    /// No file of this name was handed over, or it was, and not to be written to.
    pub fn find(&self, field: &str, path: &Path, is_writable: bool) -> Option<Result<File, Fault>> {
        let name = self.name(path)?;
        Some(
            self.duplicate(name, is_writable)
                .map_err(|why| Fault::bad_request(format!("`{field}` is {}, {why}", path.display()))),
        )
    }

    /// This path stands for a file that was handed over, or should have been.
    pub fn stands_for(&self, path: &Path) -> bool {
        self.name(path).is_some()
    }

    fn name<'a>(&self, path: &'a Path) -> Option<&'a [u8]> {
        if self.0.is_empty() { None } else { path.as_os_str().as_bytes().strip_prefix(PREFIX) }
    }

    fn duplicate(&self, name: &[u8], is_writable: bool) -> Result<File, String> {
        let Some(found) = self.0.iter().find(|named| named.name.as_bytes() == name) else {
            let names: Vec<_> = self.0.iter().map(|named| named.name.as_str()).collect();
            return Err(format!(
                "and no file of that name was handed over; these were: {}.",
                names.join(", ")
            ));
        };
        if is_writable && found.access != libc::O_RDWR {
            return Err(
                "which was handed over for reading only; set `is_read_only`, or hand it over for writing."
                    .into(),
            );
        }
        found.file.try_clone().map_err(|error| format!("which cannot be duplicated: {error}."))
    }
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
    if access == libc::O_WRONLY || flags & libc::O_PATH != 0 {
        return Err(refused("and this descriptor cannot be read from; open it for reading too"));
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
    fn a_descriptor_that_is_not_open_or_cannot_be_read_is_refused() {
        let closed = libc::c_int::MAX;
        let error = Handed::take(&[("disk".into(), closed)]).unwrap_err().to_string();
        assert!(
            error.contains(&format!("--fd is \"disk={closed}\"")) && error.contains("no open"),
            "{error}"
        );
        let place = tempfile::tempdir().unwrap();
        let write = File::create(place.path().join("log")).unwrap().into_raw_fd();
        let error = Handed::take(&[("disk".into(), write)]).unwrap_err().to_string();
        assert!(error.contains("cannot be read from"), "{error}");
    }
}
