//! Images: a kernel, perhaps an initramfs, and a disk, from which guests are made.
//!
//! `<state_dir>/images/<name>/` has the files `kernel`, `initrd`, `disk` and `image.json`, and is complete or absent: parts are
//! received in a directory whose name begins with a dot. A guest boots from the kernel here and from its own copy of the disk.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use api_socket::Fault;
use api_socket::fleet::{Image, NewImage, Part};
use serde::{Deserialize, Serialize};

use crate::{copy, events, store};

/// What the kernel of an image is told that says nothing: as in the interface's description.
const COMMAND_LINE: &str = "console=ttyS0 root=/dev/vda rw panic=1";
/// The file that says what an image is.
const NAME: &str = "image.json";
/// Begins the name of what a guest's kernel gets as its initramfs: the image's and the agent's.
const BOOT: &str = "boot-";

/// All images.
#[derive(Debug)]
pub struct Images {
    directory: PathBuf,
    agent: PathBuf,
    /// Of the agent's program, when it was first wanted: a release that brings another brings another daemon too.
    agent_hash: OnceLock<u64>,
}

/// What is kept of an image beside its parts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    pub owner: u32,
    pub command_line: String,
    pub created_at: f64,
    /// Of its parts, in bytes; what is shorter has lost its end.
    #[serde(default)]
    pub lengths: BTreeMap<String, u64>,
}

impl Images {
    /// `agent` is the program that goes into guests.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn open(state_dir: &Path, agent: PathBuf) -> io::Result<Images> {
        let directory = state_dir.join("images");
        crate::cell::make_private_directory(&directory, 0o700)?;
        Ok(Images { directory, agent, agent_hash: OnceLock::new() })
    }

    /// Receives a part of an image that is to be, in place of one that was received before. An empty initramfs is none: what an
    /// import that failed has left would else be in the next one of this name.
    ///
    /// # Errors
    /// There is an image of this name; the client or the disk fails.
    pub fn receive(&self, name: &str, owner: u32, part: Part, from: &mut dyn Read) -> Result<(), Fault> {
        self.check_free(name)?;
        let place = self.unfinished(name, owner);
        let mut receive = || -> io::Result<()> {
            crate::cell::make_private_directory(&place, 0o700)?;
            let file = tempfile::Builder::new().prefix(".part-").tempfile_in(&place)?;
            let length = copy::received(from, file.as_file())?;
            let path = place.join(part.as_str());
            match (length, part) {
                (0, Part::Initrd) => {
                    return match fs::remove_file(path) {
                        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
                        _ => Ok(()),
                    };
                }
                (0, Part::Kernel | Part::Disk) => {
                    return Err(io::Error::new(ErrorKind::InvalidInput, "the file is empty"));
                }
                _ => {}
            }
            file.as_file().sync_all()?;
            file.persist(path)?;
            Ok(())
        };
        receive().map_err(|error| disk_fault(&format!("The {} of image {name}", part.as_str()), &error))
    }

    /// Makes an image of the parts that this user has sent.
    ///
    /// # Errors
    /// There is an image of this name; a part is missing; the disk fails.
    pub fn finish(&self, name: &str, owner: u32, new: NewImage) -> Result<Image, Fault> {
        self.check_free(name)?;
        let place = self.unfinished(name, owner);
        for part in [Part::Kernel, Part::Disk] {
            if !place.join(part.as_str()).is_file() {
                let part = part.as_str();
                return Err(Fault::bad_request(format!(
                    "Image {name} has no {part} yet; send it by PUT /images/{name}/parts/{part}."
                )));
            }
        }
        let command_line = new.command_line.unwrap_or_else(|| COMMAND_LINE.into());
        let mut lengths = BTreeMap::new();
        for part in Part::ALL {
            if let Ok(found) = fs::metadata(place.join(part.as_str())) {
                lengths.insert(part.as_str().to_owned(), found.len());
            }
        }
        let kept = Kept { owner, command_line, created_at: events::now(), lengths };
        let finish = || -> io::Result<()> {
            store::replace(&place, NAME, &serde_json::to_vec_pretty(&kept)?)?;
            fs::rename(&place, self.directory.join(name))?;
            File::open(&self.directory)?.sync_all()
        };
        finish().map_err(|error| disk_fault(&format!("Image {name}"), &error))?;
        self.describe(name, kept).map_err(|error| disk_fault(&format!("Image {name}"), &error))
    }

    /// All images that this user may use.
    ///
    /// # Errors
    /// Those of the directory. What is no image is passed over.
    pub fn list(&self, user: u32) -> io::Result<Vec<Image>> {
        let mut images = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else { continue };
            if let Ok(kept) = self.find(name, user) {
                images.extend(self.describe(name, kept));
            }
        }
        images.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(images)
    }

    /// One that this user may use.
    ///
    /// # Errors
    /// 404; also for one that is another's.
    pub fn get(&self, name: &str, user: u32) -> Result<Image, Fault> {
        let kept = self.find(name, user)?;
        self.describe(name, kept).map_err(|error| disk_fault(&format!("Image {name}"), &error))
    }

    /// Of one that this user may use: its command line, and who has imported it.
    ///
    /// # Errors
    /// 404; also for one that is another's.
    pub fn find(&self, name: &str, user: u32) -> Result<Kept, Fault> {
        let none = |why: String| Fault { status: 404, message: format!("There is no image {name}{why}.") };
        match fs::read_to_string(self.directory.join(name).join(NAME)) {
            Ok(text) => match serde_json::from_str::<Kept>(&text) {
                Ok(kept) if user == 0 || kept.owner == user || kept.owner == 0 => Ok(kept),
                Ok(_) => Err(none("; import one, or see `berth image ls`".into())),
                Err(error) => Err(none(format!(" that can be read: {NAME}: {error}"))),
            },
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Err(none("; import one, or see `berth image ls`".into()))
            }
            Err(error) => Err(none(format!(" that can be read: {error}"))),
        }
    }

    /// Whether all is there of these parts of an image.
    ///
    /// # Errors
    /// What is missing.
    pub fn check_whole(&self, name: &str, kept: &Kept, parts: &[Part]) -> Result<(), Fault> {
        for part in parts {
            let part = part.as_str();
            let path = self.directory.join(name).join(part);
            let now = fs::metadata(&path).map_or(0, |found| found.len());
            if let Some(length) = kept.lengths.get(part).filter(|length| now < **length) {
                let message = format!(
                    "The {part} of image {name} has {now} bytes and had {length}: its end is missing. Bring back {}, or \
                     import the image anew under another name.",
                    path.display()
                );
                return Err(Fault { status: 500, message });
            }
        }
        Ok(())
    }

    /// Removes one. Whether a guest needs it has been seen to.
    ///
    /// # Errors
    /// 404, or 403 for root's; the disk fails.
    pub fn remove(&self, name: &str, user: u32) -> Result<(), Fault> {
        let kept = self.find(name, user)?;
        if user != 0 && kept.owner != user {
            return Err(Fault {
                status: 403,
                message: format!("Image {name} is root's; only root removes it."),
            });
        }
        let remove = || -> io::Result<()> {
            // Out of the way first: what is left of a removal that is interrupted has a dot.
            let aside = self.directory.join(format!(".removed-{name}"));
            let _ = fs::remove_dir_all(&aside);
            fs::rename(self.directory.join(name), &aside)?;
            fs::remove_dir_all(&aside)
        };
        remove().map_err(|error| disk_fault(&format!("Image {name}"), &error))
    }

    /// Removes what was left of imports, removals and starts that a kill has ended. At the start, when nobody imports.
    ///
    /// # Errors
    /// Those of the directory.
    pub fn remove_unfinished(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            match (is_begun(&entry), entry.file_type()?.is_dir()) {
                (true, true) => fs::remove_dir_all(entry.path())?,
                (false, true) => {
                    for part in fs::read_dir(entry.path())?.flatten().filter(is_begun) {
                        fs::remove_file(part.path())?;
                    }
                }
                (_, false) => {}
            }
        }
        Ok(())
    }

    /// A guest's own copy of an image's disk.
    ///
    /// # Errors
    /// 507 when the disk is full.
    pub fn copy_disk(&self, name: &str, to: &Path) -> Result<(), Fault> {
        let copied = || -> io::Result<()> {
            let mut from = File::open(self.path(name, Part::Disk))?;
            let mut to = File::options().read(true).write(true).create_new(true).open(to)?;
            copy::file(&mut from, &mut to)?;
            to.sync_all()
        };
        copied().map_err(|error| disk_fault(&format!("The disk of a guest of image {name}"), &error))
    }

    /// A part of an image.
    pub fn path(&self, name: &str, part: Part) -> PathBuf {
        self.directory.join(name).join(part.as_str())
    }

    /// What a guest's kernel gets as its initramfs: the image's, if it has one, and behind it the agent's. It is made once for
    /// each release of the agent.
    ///
    /// # Errors
    /// The agent is not there, or the disk fails.
    pub fn boot_archive(&self, name: &str) -> io::Result<PathBuf> {
        let program = || {
            let named =
                |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", self.agent.display()));
            fs::read(&self.agent).map_err(named)
        };
        let hash = match self.agent_hash.get() {
            Some(hash) => *hash,
            None => {
                let mut hasher = DefaultHasher::new();
                hasher.write(&program()?);
                *self.agent_hash.get_or_init(|| hasher.finish())
            }
        };
        let directory = self.directory.join(name);
        let file = format!("{BOOT}{hash:016x}");
        let path = directory.join(&file);
        if path.is_file() {
            return Ok(path);
        }
        let program = program()?;
        let mut new = tempfile::Builder::new().prefix(".boot-").tempfile_in(&directory)?;
        let length = match File::open(self.path(name, Part::Initrd)) {
            Ok(mut initrd) => io::copy(&mut initrd, &mut new)?,
            Err(error) if error.kind() == ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        agent::initramfs::append(&program, length, new.as_file())?;
        new.as_file().sync_all()?;
        new.persist(&path)?;
        // Those of other releases: a guest that boots from one has it open.
        for entry in fs::read_dir(&directory)?.flatten() {
            let name = entry.file_name();
            if name.to_string_lossy().starts_with(BOOT) && name != *file {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(path)
    }

    fn unfinished(&self, name: &str, owner: u32) -> PathBuf {
        self.directory.join(format!(".new-{owner}-{name}"))
    }

    fn check_free(&self, name: &str) -> Result<(), Fault> {
        if self.directory.join(name).exists() {
            let message = format!("There is an image {name} already; remove it, or give another name.");
            return Err(Fault { status: 409, message });
        }
        Ok(())
    }

    fn describe(&self, name: &str, kept: Kept) -> io::Result<Image> {
        let mut used_bytes = 0;
        for entry in fs::read_dir(self.directory.join(name))? {
            match entry?.metadata() {
                Ok(metadata) => used_bytes += metadata.blocks() * 512,
                // Something that is being made gets its name just now.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Image {
            name: name.to_owned(),
            owner: kept.owner,
            command_line: kept.command_line,
            has_initrd: self.path(name, Part::Initrd).exists(),
            disk_bytes: fs::metadata(self.path(name, Part::Disk))?.len(),
            used_bytes,
            created_at: kept.created_at,
            guests: 0,
        })
    }
}

/// It has no name of its own yet, or no more.
fn is_begun(entry: &fs::DirEntry) -> bool {
    entry.file_name().to_string_lossy().starts_with('.')
}

/// What the disk says, with the status that is right for it.
pub fn disk_fault(what: &str, error: &io::Error) -> Fault {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Fault {
            status: 507,
            message: format!("{what} has no place: {error}; make room where berthd keeps its state."),
        },
        ErrorKind::UnexpectedEof | ErrorKind::InvalidInput => Fault::bad_request(format!("{what}: {error}.")),
        _ => Fault { status: 500, message: format!("{what}: {error}.") },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: u32 = 1000;

    fn images() -> (tempfile::TempDir, Images) {
        let place = tempfile::tempdir().unwrap();
        let agent = place.path().join("agent");
        fs::write(&agent, "the agent").unwrap();
        let images = Images::open(place.path(), agent).unwrap();
        (place, images)
    }

    fn import(images: &Images, name: &str, owner: u32) -> Result<Image, Fault> {
        for part in Part::ALL {
            images.receive(name, owner, part, &mut part.as_str().as_bytes())?;
        }
        images.finish(name, owner, NewImage::default())
    }

    #[test]
    fn an_image_is_there_when_it_is_complete_and_not_before() {
        let (_place, images) = images();
        images.receive("debian", OWNER, Part::Kernel, &mut &b"kernel"[..]).unwrap();
        assert!(images.list(OWNER).unwrap().is_empty());
        let fault = images.finish("debian", OWNER, NewImage::default()).unwrap_err();
        assert!(fault.message.contains("has no disk yet"), "{fault}");
        let image = import(&images, "debian", OWNER).unwrap();
        assert_eq!(
            (image.disk_bytes, image.has_initrd, image.command_line.as_str()),
            (4, true, COMMAND_LINE)
        );
        assert_eq!(images.list(OWNER).unwrap(), [image]);
        assert_eq!(import(&images, "debian", OWNER).unwrap_err().status, 409);
        images.remove("debian", OWNER).unwrap();
        assert_eq!(images.get("debian", OWNER).unwrap_err().status, 404);
        import(&images, "debian", OWNER).unwrap();
    }

    #[test]
    fn what_one_user_imports_is_not_another_s_and_what_root_imports_is_everybody_s() {
        let (_place, images) = images();
        import(&images, "mine", OWNER).unwrap();
        import(&images, "ours", 0).unwrap();
        let names = |user| images.list(user).unwrap().into_iter().map(|image| image.name).collect::<Vec<_>>();
        assert_eq!(names(OWNER), ["mine", "ours"]);
        assert_eq!(names(0), ["mine", "ours"]);
        assert_eq!(names(OWNER + 1), ["ours"]);
        assert_eq!(images.get("mine", OWNER + 1).unwrap_err().status, 404);
        assert_eq!(images.remove("mine", OWNER + 1).unwrap_err().status, 404);
        assert_eq!(images.remove("ours", OWNER).unwrap_err().status, 403);
        // Nor do parts of one become another's image.
        images.receive("half", OWNER, Part::Kernel, &mut &b"kernel"[..]).unwrap();
        assert!(images.finish("half", OWNER + 1, NewImage::default()).is_err());
    }

    #[test]
    fn a_client_that_goes_away_leaves_no_part() {
        struct Gone;
        impl Read for Gone {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::new(
                    ErrorKind::UnexpectedEof,
                    "the client went away in the middle of its file",
                ))
            }
        }
        let (_place, images) = images();
        let fault = images.receive("a", OWNER, Part::Disk, &mut (&b"half"[..]).chain(Gone)).unwrap_err();
        assert!(fault.status == 400 && fault.message.contains("went away"), "{fault}");
        assert!(fs::read_dir(images.unfinished("a", OWNER)).unwrap().next().is_none());
        images.remove_unfinished().unwrap();
        assert!(fs::read_dir(&images.directory).unwrap().next().is_none());
    }

    #[test]
    fn what_a_kill_has_left_in_an_image_is_removed_and_the_image_is_not() {
        let (_place, images) = images();
        import(&images, "debian", OWNER).unwrap();
        let count = || fs::read_dir(images.directory.join("debian")).unwrap().count();
        let before = count();
        fs::write(images.directory.join("debian/.boot-a1b2c3"), "half").unwrap();
        fs::write(images.directory.join(".keep"), "").unwrap();
        images.remove_unfinished().unwrap();
        assert_eq!(count(), before);
        assert!(images.get("debian", OWNER).is_ok() && images.directory.join(".keep").exists());
    }

    #[test]
    fn an_image_is_there_while_something_is_made_in_it() {
        let (_place, images) = images();
        import(&images, "debian", OWNER).unwrap();
        let directory = images.directory.join("debian");
        let is_over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                    for name in 0..64 {
                        fs::write(directory.join(format!(".boot-{name}")), "").unwrap();
                    }
                    for name in 0..64 {
                        fs::remove_file(directory.join(format!(".boot-{name}"))).unwrap();
                    }
                }
            });
            let missing = (0..1000).filter(|_| images.list(OWNER).unwrap().is_empty()).count();
            is_over.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(missing, 0);
        });
    }

    #[test]
    fn an_empty_file_is_no_part() {
        let (_place, images) = images();
        for part in [Part::Kernel, Part::Disk] {
            let fault = images.receive("a", OWNER, part, &mut io::empty()).unwrap_err();
            assert!(fault.status == 400 && fault.message.contains("the file is empty"), "{fault}");
        }
    }

    #[test]
    fn an_initrd_of_an_import_that_failed_is_not_that_of_the_next_which_says_that_it_has_none() {
        let (_place, images) = images();
        images.receive("a", OWNER, Part::Kernel, &mut &b"kernel"[..]).unwrap();
        images.receive("a", OWNER, Part::Initrd, &mut &b"initrd"[..]).unwrap();

        images.receive("a", OWNER, Part::Kernel, &mut &b"kernel"[..]).unwrap();
        // Said twice it is as true.
        for _ in 0..2 {
            images.receive("a", OWNER, Part::Initrd, &mut io::empty()).unwrap();
        }
        images.receive("a", OWNER, Part::Disk, &mut &b"disk"[..]).unwrap();
        assert!(!images.finish("a", OWNER, NewImage::default()).unwrap().has_initrd);
        let archive = fs::read(images.boot_archive("a").unwrap()).unwrap();
        assert!(archive.starts_with(b"070701"), "{:?}", &archive[..16]);
    }

    #[test]
    fn a_guest_boots_with_the_image_s_initramfs_and_this_release_s_agent() {
        let (place, images) = images();
        import(&images, "debian", OWNER).unwrap();
        let path = images.boot_archive("debian").unwrap();
        let archive = fs::read(&path).unwrap();
        // "initrd" has six bytes.
        assert!(archive.starts_with(b"initrd\x00\x00070701"), "{:?}", &archive[..16]);
        assert_eq!(images.boot_archive("debian").unwrap(), path);
        fs::write(place.path().join("agent"), "a newer agent").unwrap();
        // With which a newer daemon came.
        let images = Images::open(place.path(), place.path().join("agent")).unwrap();
        let newer = images.boot_archive("debian").unwrap();
        assert!(newer != path && newer.is_file() && !path.is_file());
    }
}
