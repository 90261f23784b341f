//! Values on the command line: sizes, names, places to copy from and to, keys. Pure.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;

use api_socket::fleet::{check_disk_name, check_name};

/// The most keys of a detach sequence.
const MAX_KEYS: usize = 8;

const MIB: u64 = 1 << 20;

/// A number of bytes, such as `512M` or `2G`; units are powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        let refused = || format!("{text:?} is no size: a whole number with K, M, G or T, such as 512M or 2G");
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at_checked(digits).ok_or_else(refused)?;
        let unit = unit.to_ascii_uppercase();
        let shift = match unit.strip_suffix("IB").or(unit.strip_suffix('B')).unwrap_or(&unit) {
            // "iB" alone is no unit.
            "" if unit != "IB" => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            _ => return Err(refused()),
        };
        let number: u64 = number.parse().map_err(|_| refused())?;
        number.checked_mul(1 << shift).map(Size).ok_or_else(|| format!("{text:?} is more than there can be"))
    }
}

/// Guest memory: a size in whole MiB, and not none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub mib: u32,
}

impl FromStr for Memory {
    type Err = String;

    fn from_str(text: &str) -> Result<Memory, String> {
        match whole_mib(text)? {
            0 => Err("a guest needs memory: 512M, say".into()),
            mib => Ok(Memory { mib }),
        }
    }
}

/// A size in whole MiB.
fn whole_mib(text: &str) -> Result<u32, String> {
    let Size(bytes) = text.parse()?;
    match bytes {
        1..MIB => Err(format!("{text:?} is {bytes} bytes; say {text}M for MiB")),
        _ if bytes % MIB != 0 => Err(format!("{text:?} is not whole MiB")),
        _ => u32::try_from(bytes / MIB).map_err(|_| format!("{text:?} is more than there can be")),
    }
}

/// An empty disk: `NAME=SIZE`. The size is whole MiB, and not none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    pub name: String,
    pub mib: u32,
}

impl FromStr for Disk {
    type Err = String;

    fn from_str(text: &str) -> Result<Disk, String> {
        let (name, size) = text
            .split_once('=')
            .ok_or_else(|| format!("{text:?} has no size behind its name: {text}=10G, say"))?;
        check_disk_name(name)?;
        match whole_mib(size)? {
            0 => Err(format!("a disk has a size: {name}=10G, say")),
            mib => Ok(Disk { name: name.to_owned(), mib }),
        }
    }
}

/// The name of a guest or an image, or the beginning of a guest's id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(String);

impl Name {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Name, String> {
        check_name(text)?;
        Ok(Name(text.to_string()))
    }
}

/// One side of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// `N:PATH`
    Guest { name: Name, path: String },
    /// A file or directory here.
    Local(PathBuf),
    /// `-`: a tar archive on standard input or output.
    Stream,
}

impl Place {
    /// A colon before any slash makes it a path in a guest, so `./a:b` is a file here.
    ///
    /// # Errors
    /// What stands before the colon is no name, or the path in the guest is not absolute.
    pub fn parse(text: &OsStr) -> Result<Place, String> {
        if text == "-" {
            return Ok(Place::Stream);
        }
        if text.is_empty() {
            return Err("an empty path names nothing".into());
        }
        let before_slash = text.as_bytes().split(|byte| *byte == b'/').next().unwrap_or_default();
        if !before_slash.contains(&b':') {
            return Ok(Place::Local(text.into()));
        }
        let Some((name, path)) = text.to_str().and_then(|text| text.split_once(':')) else {
            return Err(format!("{} is not UTF-8; a path in a guest must be", text.display()));
        };
        let name = name.parse().map_err(|why| format!("{why}; a file here with a colon is ./{name}:…"))?;
        if !path.starts_with('/') {
            return Err(format!(
                "{path:?} does not begin with a slash, as a path in a guest does: {name}:/{path}"
            ));
        }
        Ok(Place::Guest { name, path: path.to_string() })
    }
}

/// The keys that leave a console or a terminal: `ctrl-]`, or several as in `ctrl-p,ctrl-q`; `none` for no way out but
/// the guest's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DetachKeys(pub Vec<u8>);

impl FromStr for DetachKeys {
    type Err = String;

    fn from_str(text: &str) -> Result<DetachKeys, String> {
        if text == "none" {
            return Ok(DetachKeys(Vec::new()));
        }
        let keys: Option<Vec<u8>> = text.split(',').map(key).collect();
        keys.filter(|keys| keys.len() <= MAX_KEYS).map(DetachKeys).ok_or_else(|| {
            format!(
                "{text:?} is no key sequence: up to {MAX_KEYS} of ctrl-X or a single character, with commas between, \
                 as in ctrl-p,ctrl-q; or none"
            )
        })
    }
}

/// The byte that a terminal sends for a key.
fn key(text: &str) -> Option<u8> {
    let (byte, is_control) = match text.as_bytes() {
        [byte] => (*byte, false),
        [.., b'-', byte]
            if text.len() == "ctrl-X".len() && text.to_ascii_lowercase().starts_with("ctrl-") =>
        {
            (byte.to_ascii_uppercase(), true)
        }
        _ => return None,
    };
    match is_control {
        // The control characters are the 32 from @ on, less 64.
        true => (b'@'..=b'_').contains(&byte).then(|| byte - b'@'),
        false => byte.is_ascii_graphic().then_some(byte),
    }
}

/// A variable for a command in a guest: `NAME=VALUE`, or `NAME` with the value that it has here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    pub name: String,
    /// `None` takes the value from our own environment.
    pub value: Option<String>,
}

impl FromStr for Variable {
    type Err = String;

    fn from_str(text: &str) -> Result<Variable, String> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_string())),
            None => (text, None),
        };
        if name.is_empty() {
            return Err(format!("{text:?} has no name before the =: NAME=VALUE"));
        }
        Ok(Variable { name: name.to_string(), value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_in_powers_of_1024() {
        let sizes = [
            ("0", 0),
            ("512", 512),
            ("1k", 1 << 10),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("512mb", 512 << 20),
            ("2G", 2 << 30),
            ("3T", 3 << 40),
            ("7B", 7),
        ];
        for (text, bytes) in sizes {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_an_example() {
        for text in ["", "M", "1.5G", "-1", "1 G", "1X", "1MM", "1iB", "iB", "G1", "0x10", "1é", "+1"] {
            let error = text.parse::<Size>().unwrap_err();
            assert!(
                error.contains(&format!("{text:?}")) && error.contains("such as 512M"),
                "{text}: {error}"
            );
        }
        for text in ["99999999999T", "18446744073709551615K"] {
            assert!(text.parse::<Size>().unwrap_err().contains("more than there can be"), "{text}");
        }
    }

    #[test]
    fn memory_is_whole_mib_and_a_number_without_a_unit_is_asked_about() {
        assert_eq!("2G".parse(), Ok(Memory { mib: 2048 }));
        assert_eq!("1048576".parse(), Ok(Memory { mib: 1 }));
        assert!("512".parse::<Memory>().unwrap_err().contains("say 512M"));
        assert!("0".parse::<Memory>().unwrap_err().contains("needs memory"));
        assert!("1025K".parse::<Memory>().unwrap_err().contains("not whole MiB"));
    }

    #[test]
    fn a_disk_has_a_name_that_no_other_can_have_and_a_size() {
        assert_eq!("data=10G".parse(), Ok(Disk { name: "data".into(), mib: 10 << 10 }));
        let refused = |text: &str| text.parse::<Disk>().unwrap_err();
        assert!(refused("data").contains("data=10G"));
        assert!(refused("data=0").contains("data=10G"));
        assert!(refused("data=512").contains("say 512M"));
        assert!(refused("root=1G").contains("the image gave"));
        assert!(refused("a/b=1G").contains("not a name"));
        assert!(refused("=1G").contains("not a name"));
    }

    #[test]
    fn names_are_letters_digits_and_hyphens() {
        for text in ["a", "7", "web-1", "Web", &"x".repeat(63)] {
            assert_eq!(text.parse::<Name>().unwrap().as_str(), text);
        }
        for text in ["", "-a", "a-", "a.b", "a_b", "a b", "é", "a/b", "a:b", &"x".repeat(64)] {
            assert!(text.parse::<Name>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_colon_before_any_slash_is_a_path_in_a_guest() {
        let place = |text: &str| Place::parse(OsStr::new(text));
        let guest = |name: &str, path: &str| Place::Guest { name: name.parse().unwrap(), path: path.into() };
        assert_eq!(place("web:/etc/hosts"), Ok(guest("web", "/etc/hosts")));
        assert_eq!(place("web:/a:b"), Ok(guest("web", "/a:b")));
        assert_eq!(place("-"), Ok(Place::Stream));
        for text in ["hosts", "/etc/hosts", "./a:b", "dir/a:b", ".", "--"] {
            assert_eq!(place(text), Ok(Place::Local(text.into())), "{text}");
        }
        assert!(place("web:etc").unwrap_err().contains("web:/etc"));
        assert!(place("web:").unwrap_err().contains("web:/"));
        assert!(place("a.b:/x").unwrap_err().contains("./a.b:"));
        assert!(place("").is_err());
    }

    #[test]
    fn names_of_files_here_need_not_be_utf_8_and_paths_in_guests_must() {
        let local = OsStr::from_bytes(b"/tmp/\xff");
        assert_eq!(Place::parse(local), Ok(Place::Local(local.into())));
        assert!(Place::parse(OsStr::from_bytes(b"web:/\xff")).unwrap_err().contains("UTF-8"));
    }

    #[test]
    fn keys_are_what_a_terminal_sends() {
        let keys = |text: &str| text.parse::<DetachKeys>().map(|DetachKeys(keys)| keys);
        assert_eq!(keys("ctrl-]"), Ok(vec![0x1d]));
        assert_eq!(keys("Ctrl-A"), Ok(vec![1]));
        assert_eq!(keys("ctrl-p,ctrl-q"), Ok(vec![0x10, 0x11]));
        assert_eq!(keys("ctrl-a,d"), Ok(vec![1, b'd']));
        assert_eq!(keys("~,."), Ok(b"~.".to_vec()));
        assert_eq!(keys("none"), Ok(vec![]));
        for text in
            ["", "ctrl-", "ctrl-1", "ctrl-é", "alt-x", "ctrl-ab", "ctrl", ",", "a,,b", "a,b,c,d,e,f,g,h,i"]
        {
            assert!(keys(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_variable_has_its_value_or_takes_it_from_here() {
        let variable =
            |name: &str, value: Option<&str>| Variable { name: name.into(), value: value.map(Into::into) };
        assert_eq!("A=b=c".parse(), Ok(variable("A", Some("b=c"))));
        assert_eq!("A=".parse(), Ok(variable("A", Some(""))));
        assert_eq!("A".parse(), Ok(variable("A", None)));
        assert!("=b".parse::<Variable>().is_err());
        assert!("".parse::<Variable>().is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in any::<String>(), bytes in any::<Vec<u8>>()) {
            let _ = (text.parse::<Size>(), text.parse::<Memory>(), text.parse::<Name>());
            let _ = (text.parse::<DetachKeys>(), text.parse::<Variable>(), Place::parse(OsStr::from_bytes(&bytes)));
        }
    }
}
