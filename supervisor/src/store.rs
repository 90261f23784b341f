//! Records on disk: `<state_dir>/guests/<id>/guest.json`, each written beside and renamed over the old one, and on the disk
//! before anybody is told of it.
//!
//! Files and not a database: a record is some hundred bytes and changes when a guest does, so there is nothing to index, and a
//! person can read them, copy them, and mend them with an editor.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::record::{FORMAT, Record};

/// The file's name.
const NAME: &str = "guest.json";
/// Begins the name of a file that is not yet in its place.
const BEGUN: &str = ".new-";
/// The longest record, in bytes; what is longer was not written here.
const MAX_RECORD: u64 = 64 << 10;
/// Hexadecimal digits of an id.
pub const ID_LENGTH: usize = 12;

/// Where the records are.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
}

/// What was found at a start.
#[derive(Debug, Default)]
pub struct Found {
    pub records: Vec<Record>,
    /// Directories without a record: a guest that was being made or removed when the daemon was killed.
    pub unfinished: Vec<PathBuf>,
    /// What cannot be read. It is left as it is, and nobody else gets what may be its.
    pub broken: Vec<(PathBuf, String)>,
    /// What is known to be of the broken ones.
    pub claimed: Vec<Claimed>,
}

/// What a guest has whose record is not understood as a whole: it may run, or be one of a newer release.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Claimed {
    pub name: Option<String>,
    pub uid: Option<u32>,
    pub address: Option<Ipv4Addr>,
}

impl Store {
    /// Makes the directory if it is not there.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(state_dir: &Path) -> io::Result<Store> {
        let directory = state_dir.join("guests");
        crate::cell::make_private_directory(&directory, 0o700)?;
        Ok(Store { directory })
    }

    /// Where the files of a guest are: its record, its disk, its logs.
    pub fn directory(&self, id: &str) -> PathBuf {
        self.directory.join(id)
    }

    /// Writes a record so that it is there whole after a loss of power, or the old one is.
    ///
    /// # Errors
    /// Those of the file system; the old one is there.
    pub fn save(&self, record: &Record) -> io::Result<()> {
        let directory = self.directory(&record.id);
        let text = serde_json::to_string_pretty(record)?;
        replace(&directory, NAME, text.as_bytes())
    }

    /// Removes all files of a guest, the record first: what is left of a removal that is interrupted has no record.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(&self, id: &str) -> io::Result<()> {
        let directory = self.directory(id);
        for path in [directory.join(NAME), directory.clone()] {
            let outcome = if path == directory { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            match outcome {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        sync(&self.directory)
    }

    /// All that is there.
    ///
    /// # Errors
    /// The directory itself cannot be read.
    pub fn load(&self) -> io::Result<Found> {
        let mut found = Found::default();
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if !is_id(name) {
                found.broken.push((path, "its name is no id".into()));
                continue;
            }
            remove_begun(&path);
            match load(&path.join(NAME), name) {
                Ok(record) => found.records.push(record),
                Err(Unloaded::Absent) => found.unfinished.push(path),
                Err(Unloaded::Broken(why)) => {
                    found.claimed.extend(claimed(&path.join(NAME)));
                    found.broken.push((path.join(NAME), why));
                }
            }
        }
        Ok(found)
    }
}

/// An id is part of paths, and of names of interfaces and groups.
pub fn is_id(name: &str) -> bool {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    name.len() == ID_LENGTH && name.bytes().all(is_digit)
}

/// Files that were being written when the daemon was killed.
fn remove_begun(directory: &Path) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(BEGUN)) {
        if let Err(error) = fs::remove_file(entry.path()) {
            log::warn!("{} cannot be removed: {error}", entry.path().display());
        }
    }
}

fn claimed(path: &Path) -> Option<Claimed> {
    let mut text = String::new();
    File::open(path).ok()?.take(MAX_RECORD).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

enum Unloaded {
    Absent,
    Broken(String),
}

fn load(path: &Path, id: &str) -> Result<Record, Unloaded> {
    let broken = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Unloaded::Absent,
        _ => Unloaded::Broken(error.to_string()),
    };
    let file = File::open(path).map_err(broken)?;
    let length = file.metadata().map_err(broken)?.len();
    if length > MAX_RECORD {
        return Err(Unloaded::Broken(format!("it has {length} bytes; a record has at most {MAX_RECORD}")));
    }
    let text = io::read_to_string(file).map_err(broken)?;
    let record = parse(&text).map_err(Unloaded::Broken)?;
    if record.id != id {
        return Err(Unloaded::Broken(format!("it is that of {:?}", record.id)));
    }
    Ok(record)
}

/// Reads a record.
///
/// # Errors
/// What is wrong with it, for a person.
pub fn parse(text: &str) -> Result<Record, String> {
    #[derive(serde::Deserialize)]
    struct Format {
        format: u32,
    }
    let format = serde_json::from_str::<Format>(text).map_err(|error| error.to_string())?.format;
    if format != FORMAT {
        return Err(format!("it has the format {format}; this release knows {FORMAT}: install a newer one"));
    }
    let record: Record = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if !is_id(&record.id) {
        return Err(format!("its id {:?} has not {ID_LENGTH} hexadecimal digits", record.id));
    }
    api_socket::fleet::check_name(&record.name).map_err(|why| format!("its name {why}"))?;
    api_socket::fleet::check_name(&record.image).map_err(|why| format!("its image {why}"))?;
    if record.uid == 0 {
        return Err("its VMM would be root's".into());
    }
    if record.process.as_ref().is_some_and(|process| process.pid < 2) {
        return Err("its process is the host's first, or none".into());
    }
    Ok(record)
}

/// Writes a file of this directory beside the old one, onto the disk, and over it.
///
/// # Errors
/// Those of the file system; the old one is there.
pub fn replace(directory: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let mut file = tempfile::Builder::new().prefix(BEGUN).tempfile_in(directory)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    file.persist(directory.join(name))?;
    sync(directory)
}

fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use api_socket::fleet::NewGuest;
    use proptest::prelude::*;

    use super::*;

    fn record(id: &str) -> Record {
        let address = Some([10, 87, 0, 2].into());
        Record::new(id.into(), "web".into(), 1000, 70_000, address, 1.5, NewGuest::of("debian"))
    }

    fn store() -> (tempfile::TempDir, Store) {
        let place = tempfile::tempdir().unwrap();
        let store = Store::open(place.path()).unwrap();
        (place, store)
    }

    #[test]
    fn what_is_saved_is_found_and_what_is_removed_is_not() {
        let (_place, store) = store();
        let (one, two) = (record("0123456789ab"), record("ba9876543210"));
        for record in [&one, &two] {
            fs::create_dir(store.directory(&record.id)).unwrap();
            store.save(record).unwrap();
        }
        let mut found = store.load().unwrap();
        found.records.sort_by(|a, b| a.id.cmp(&b.id));
        assert_eq!(found.records, [one.clone(), two.clone()]);
        store.remove(&one.id).unwrap();
        // Twice does no harm.
        store.remove(&one.id).unwrap();
        assert_eq!(store.load().unwrap().records, [two]);
        assert!(!store.directory(&one.id).exists());
    }

    #[test]
    fn a_guest_that_is_not_finished_is_told_from_one_that_cannot_be_read() {
        let (_place, store) = store();
        let path = |id: &str| store.directory(id);
        for id in ["000000000000", "111111111111", "222222222222"] {
            fs::create_dir(path(id)).unwrap();
        }
        fs::write(path("111111111111").join(NAME), "{\"format\": 1, \"id\":").unwrap();
        // Another's record, as after a copy by hand.
        fs::write(path("222222222222").join(NAME), serde_json::to_string(&record("333333333333")).unwrap())
            .unwrap();
        let found = store.load().unwrap();
        assert_eq!(found.unfinished, [path("000000000000")]);
        assert!(found.records.is_empty());
        let mut broken: Vec<_> = found.broken.into_iter().map(|(path, _)| path).collect();
        broken.sort();
        assert_eq!(broken, [path("111111111111").join(NAME), path("222222222222").join(NAME)]);
    }

    #[test]
    fn what_a_kill_has_left_is_removed_and_what_is_no_guest_s_is_not() {
        let (_place, store) = store();
        let record = record("0123456789ab");
        fs::create_dir(store.directory(&record.id)).unwrap();
        store.save(&record).unwrap();
        fs::write(store.directory(&record.id).join(".new-a1b2c3"), "{").unwrap();
        let other = store.directory("lost+found");
        fs::create_dir(&other).unwrap();
        let found = store.load().unwrap();
        assert_eq!(found.records, std::slice::from_ref(&record));
        assert!(found.unfinished.is_empty() && other.is_dir());
        assert_eq!(fs::read_dir(store.directory(&record.id)).unwrap().count(), 1);
    }

    #[test]
    fn a_disk_that_is_full_leaves_the_old_record() {
        let (_place, store) = store();
        let old = record("0123456789ab");
        fs::create_dir(store.directory(&old.id)).unwrap();
        store.save(&old).unwrap();
        // As good as full: a directory in the place of the new file's directory entry.
        let mut other = old.clone();
        other.id = "../0123456789ab/none".into();
        assert!(store.save(&other).is_err());
        assert_eq!(store.load().unwrap().records, [old]);
    }

    #[test]
    fn a_record_that_would_lead_elsewhere_is_refused() {
        let text = |change: &dyn Fn(&mut Record)| {
            let mut record = record("0123456789ab");
            change(&mut record);
            serde_json::to_string(&record).unwrap()
        };
        assert!(parse(&text(&|_| ())).is_ok());
        type Change = dyn Fn(&mut Record);
        let cases: [(&Change, &str); 6] = [
            (&|record| record.id = "../../../etc".into(), "hexadecimal digits"),
            (&|record| record.id = "0123456789AB".into(), "hexadecimal digits"),
            (&|record| record.name = "a/b".into(), "its name"),
            (&|record| record.image = "..".into(), "its image"),
            (&|record| record.uid = 0, "root's"),
            (&|record| record.format = 2, "install a newer one"),
        ];
        for (change, why) in cases {
            assert!(parse(&text(change)).unwrap_err().contains(why), "{why}");
        }
    }

    proptest! {
        #[test]
        fn no_file_is_too_strange(text in ".{0,200}") {
            let _ = parse(&text);
        }
    }
}
