//! Why a command failed, in one form: what was being done, why it failed, what to do about it.

use crate::exit::Exit;

/// `berth: WHAT: WHY; REMEDY` to a person, a code to a script.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}{}", remedy.as_ref().map(|remedy| format!("; {remedy}")).unwrap_or_default())]
pub struct Error {
    pub what: String,
    pub why: String,
    /// Where `why` does not say it already.
    pub remedy: Option<String>,
    pub exit: Exit,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn new(what: impl Into<String>, why: impl ToString) -> Error {
        Error { what: what.into(), why: why.to_string(), remedy: None, exit: Exit::Failed }
    }

    /// With what to do.
    #[must_use]
    pub fn remedy(self, remedy: impl Into<String>) -> Error {
        Error { remedy: Some(remedy.into()), ..self }
    }

    /// With another code than that of a failure.
    #[must_use]
    pub fn exit(self, exit: Exit) -> Error {
        Error { exit, ..self }
    }
}

/// Says what was being done when something failed.
pub trait During<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: std::fmt::Display> During<T> for std::result::Result<T, E> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::new(what(), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_and_why_and_what_to_do() {
        let error = Error::new("web", "it is running");
        assert_eq!(error.to_string(), "web: it is running");
        assert_eq!(error.exit, Exit::Failed);
        let error = error.remedy("stop it first: berth stop web").exit(Exit::Own);
        assert_eq!(error.to_string(), "web: it is running; stop it first: berth stop web");
        assert_eq!(error.exit, Exit::Own);
    }

    #[test]
    fn a_failed_call_is_told_with_what_was_being_done() {
        let outcome: std::io::Result<()> = Err(std::io::Error::from_raw_os_error(libc::ENOENT));
        let error = outcome.during(|| "cannot read disk.img".into()).unwrap_err();
        assert_eq!(error.to_string(), "cannot read disk.img: No such file or directory (os error 2)");
    }
}
