//! One error for the whole tool: a sentence for a person. Nothing here is recovered from by kind.

use std::fmt;

/// What went wrong, with what, and where known what to do.
#[derive(Debug)]
pub struct Error(pub String);

pub type Result<T> = std::result::Result<T, Error>;

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// Puts what was being done in front of what went wrong.
pub trait Doing<T> {
    /// `doing` is called only on an error; it reads as in "cannot open /dev/kvm".
    fn doing<S: fmt::Display>(self, doing: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: fmt::Display> Doing<T> for std::result::Result<T, E> {
    fn doing<S: fmt::Display>(self, doing: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|error| Error(format!("{}: {error}", doing())))
    }
}
