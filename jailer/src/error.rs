//! Why there is no cell.

use std::io;

/// A step that could not be done. The message names the flag or the file, its value, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused.
    #[error("{what}: {error}")]
    System { what: String, error: io::Error },
    /// We refused.
    #[error("{0}")]
    Refused(String),
    /// Another process of ours has said it already, with its name before it.
    #[error("{0}")]
    Told(String),
}

impl Error {
    /// Whether the kernel refused with this.
    pub fn is(&self, errno: rustix::io::Errno) -> bool {
        matches!(self, Error::System { error, .. } if error.raw_os_error() == Some(errno.raw_os_error()))
    }

    /// Whether something was not there.
    pub fn is_not_found(&self) -> bool {
        self.is(rustix::io::Errno::NOENT)
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// Says what was being done when a system call failed.
pub trait During<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> During<T> for std::result::Result<T, E> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::System { what: what(), error: error.into() })
    }
}
