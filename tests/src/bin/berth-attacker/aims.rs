//! What the attacker is told about the host: `KEY=VALUE` words of the command line.

use std::collections::BTreeMap;
use std::io;
use std::str::FromStr;

/// The words by their keys.
#[derive(Debug, Default)]
pub struct Aims(BTreeMap<String, String>);

impl Aims {
    /// Takes the words that have an equals sign; the others come back.
    pub fn take(words: impl IntoIterator<Item = String>) -> (Aims, Vec<String>) {
        let mut aims = Aims::default();
        let mut rest = Vec::new();
        for word in words {
            match word.split_once('=') {
                Some((key, value)) => _ = aims.0.insert(key.into(), value.into()),
                None => rest.push(word),
            }
        }
        (aims, rest)
    }

    /// # Errors
    /// The attacker was not told.
    pub fn text(&self, key: &str) -> io::Result<&str> {
        self.given(key).ok_or_else(|| unusable(key))
    }

    /// What there need not be.
    pub fn given(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// # Errors
    /// The attacker was not told, or this is no number.
    pub fn number<T: FromStr>(&self, key: &str) -> io::Result<T> {
        self.text(key)?.parse().map_err(|_| unusable(key))
    }
}

fn unusable(key: &str) -> io::Error {
    eprintln!("berth-attacker: {key}= is not given, or is no number");
    io::Error::from_raw_os_error(libc::EINVAL)
}
