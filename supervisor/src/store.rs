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
/// Begins the name of the directory of a guest that is being removed.
const GONE: &str = ".gone-";
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
    /// Guests that were being made or removed when the daemon was killed.
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

    /// Where a guest is made, before [`finish`](Store::finish).
    pub fn begin(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{BEGUN}{id}"))
    }

    /// A guest whose files are made is there from now on, also after a loss of power.
    ///
    /// # Errors
    /// Those of the file system; it is not there.
    pub fn finish(&self, record: &Record) -> io::Result<()> {
        let place = self.begin(&record.id);
        replace(&place, NAME, serde_json::to_string_pretty(record)?.as_bytes())?;
        fs::rename(place, self.directory(&record.id))?;
        sync(&self.directory)
    }

    /// Removes all files of a guest. It is moved aside first: what is left of a removal that is interrupted is no guest's.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(&self, id: &str) -> io::Result<()> {
        let aside = self.directory.join(format!("{GONE}{id}"));
        for outcome in [fs::rename(self.directory(id), &aside), fs::remove_dir_all(&aside)] {
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
            if name.starts_with(BEGUN) || name.starts_with(GONE) {
                found.unfinished.push(path);
                continue;
            }
            if !is_id(name) {
                found.broken.push((path, "its name is no id".into()));
                continue;
            }
            remove_begun(&path);
            match load(&path.join(NAME), name) {
                Ok(record) => {
                    remove_unnamed(&path, &record);
                    found.records.push(record);
                }
                Err(why) => {
                    found.claimed.extend(claimed(&path.join(NAME)));
                    found.broken.push((path.join(NAME), why));
                }
            }
        }
        found.set_aside_doubles(self);
        Ok(found)
    }
}

impl Found {
    /// Of two guests with the same name, user or address the older one has it: a record was copied, or mended by hand.
    fn set_aside_doubles(&mut self, store: &Store) {
        self.records.sort_by(|a, b| a.created_at.total_cmp(&b.created_at).then_with(|| a.id.cmp(&b.id)));
        let mut kept: Vec<Record> = Vec::new();
        for record in self.records.drain(..) {
            let what = |other: &Record| match record {
                Record { ref name, .. } if *name == other.name => Some(format!("name {name}")),
                Record { uid, .. } if uid == other.uid => Some(format!("user {uid}")),
                Record { address: Some(address), .. } if other.address == Some(address) => {
                    Some(format!("address {address}"))
                }
                _ => None,
            };
            match kept.iter().find_map(|other| Some((what(other)?, other.id.clone()))) {
                None => kept.push(record),
                Some((what, other)) => {
                    let why = format!("its {what} is that of {other}, which is older; give it another");
                    self.broken.push((store.directory(&record.id).join(NAME), why));
                    let Record { name, uid, address, .. } = record;
                    self.claimed.push(Claimed { name: Some(name), uid: Some(uid), address });
                }
            }
        }
        self.records = kept;
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

/// Disks that were being added or removed when the daemon was killed.
fn remove_unnamed(directory: &Path, record: &Record) {
    let named: Vec<_> = record.disk_names().map(crate::spawn::disk_file).collect();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("disk-") && name.ends_with(".img") && !named.contains(&name) {
            log::warn!("{} is no disk of the guest's any more and is removed", entry.path().display());
            if let Err(error) = fs::remove_file(entry.path()) {
                log::warn!("{} cannot be removed: {error}", entry.path().display());
            }
        }
    }
}

fn claimed(path: &Path) -> Option<Claimed> {
    let mut text = String::new();
    File::open(path).ok()?.take(MAX_RECORD).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

fn load(path: &Path, id: &str) -> Result<Record, String> {
    let broken = |error: io::Error| error.to_string();
    let file = File::open(path).map_err(broken)?;
    let length = file.metadata().map_err(broken)?.len();
    if length > MAX_RECORD {
        return Err(format!("it has {length} bytes; a record has at most {MAX_RECORD}"));
    }
    let record = parse(&io::read_to_string(file).map_err(broken)?)?;
    if record.id != id {
        return Err(format!("it is that of {:?}", record.id));
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
    for disk in &record.disks {
        api_socket::fleet::check_disk_name(&disk.name).map_err(|why| format!("its disk {why}"))?;
    }
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
        let (one, two) = (
            record("0123456789ab"),
            Record { name: "other".into(), uid: 70_001, address: None, ..record("ba9876543210") },
        );
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
        // One that was finished has lost its record: its disk may be somebody's.
        assert!(found.unfinished.is_empty());
        assert!(found.records.is_empty());
        let mut broken: Vec<_> = found.broken.into_iter().map(|(path, _)| path).collect();
        broken.sort();
        let ids = ["000000000000", "111111111111", "222222222222"];
        assert_eq!(broken, ids.map(|id| path(id).join(NAME)));
    }

    #[test]
    fn a_guest_that_is_being_made_or_removed_is_unfinished() {
        let (_place, store) = store();
        let record = record("0123456789ab");
        fs::create_dir(store.begin(&record.id)).unwrap();
        assert_eq!(store.load().unwrap().unfinished, [store.begin(&record.id)]);
        store.finish(&record).unwrap();
        assert_eq!(store.load().unwrap().records, std::slice::from_ref(&record));
        fs::rename(store.directory(&record.id), store.directory(".gone-0123456789ab")).unwrap();
        let found = store.load().unwrap();
        assert!(found.records.is_empty() && found.unfinished == [store.directory(".gone-0123456789ab")]);
        // Somebody asks again for what was interrupted.
        store.remove(&record.id).unwrap();
        assert!(store.load().unwrap().unfinished.is_empty());
    }

    #[test]
    fn of_two_guests_with_the_same_user_name_or_address_the_older_one_has_it() {
        let (_place, store) = store();
        let guest = |id: &str, change: &dyn Fn(&mut Record)| {
            let mut record = record(id);
            (record.name, record.uid, record.created_at) =
                (format!("g{id}"), record.uid + id.len() as u32, 2.0);
            record.uid = u32::from_str_radix(id, 16).unwrap() + 1;
            record.address = Some(Ipv4Addr::from_bits(record.uid));
            change(&mut record);
            fs::create_dir(store.directory(id)).unwrap();
            store.save(&record).unwrap();
            record
        };
        let old = guest("000000000009", &|record| record.created_at = 1.0);
        guest("000000000001", &|record| record.name = old.name.clone());
        guest("000000000002", &|record| record.uid = old.uid);
        guest("000000000003", &|record| record.address = old.address);
        let found = store.load().unwrap();
        assert_eq!(found.records, std::slice::from_ref(&old));
        let why: Vec<_> =
            found.broken.iter().map(|(_, why)| why.split(" is that of").next().unwrap()).collect();
        assert_eq!(why, ["its name g000000000009", "its user 10", "its address 0.0.0.10"]);
        assert_eq!(found.claimed.len(), 3);
    }

    #[test]
    fn what_a_kill_has_left_is_removed_and_what_is_no_guest_s_is_not() {
        let (_place, store) = store();
        let record = record("0123456789ab");
        fs::create_dir(store.directory(&record.id)).unwrap();
        store.save(&record).unwrap();
        fs::write(store.directory(&record.id).join(".new-a1b2c3"), "{").unwrap();
        fs::write(store.directory(&record.id).join("disk-gone.img"), "").unwrap();
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
