//! Persistent memory: what a client says of it becomes an open file.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use api_socket::{Fault, Pmem, PmemUpdate};

use crate::config::check_io_thread;
use crate::config::network::changed;

/// A persistent memory device and its file.
pub struct PmemFile {
    pub settings: Pmem,
    /// A file or a block device, not empty; open for writing too unless it is read-only.
    pub file: File,
}

/// The persistent memory devices, in the order in which the guest gets them. The files are there until it has started.
#[derive(Default)]
pub struct Pmems(Vec<(Pmem, Option<File>)>);

impl Pmems {
    /// Adds a device, or puts it in the place of the one with its id. `file` is what it names.
    ///
    /// # Errors
    /// The file is empty, or another one is the root device. Nothing has changed then.
    pub fn put(&mut self, settings: Pmem, file: File) -> Result<(), Fault> {
        let place = self.0.iter().position(|(known, _)| known.id == settings.id);
        self.check(&settings)?;
        check_io_thread(settings.io_thread)?;
        expect_bytes(&settings, &file)?;
        match place.and_then(|place| self.0.get_mut(place)) {
            Some(before) => *before = (settings, Some(file)),
            None => self.0.push((settings, Some(file))),
        }
        Ok(())
    }

    /// Checks a device that a running guest is to get. `file` is what it names.
    ///
    /// # Errors
    /// As for [`Pmems::put`]; it is the root device.
    pub fn to_plug(&self, settings: Pmem, file: File) -> Result<PmemFile, Fault> {
        if settings.root_device {
            return Err(Fault::bad_request(format!(
                "`root_device` is true for {:?}, and a running guest has booted; set it to false.",
                settings.id
            )));
        }
        check_io_thread(settings.io_thread)?;
        expect_bytes(&settings, &file)?;
        Ok(PmemFile { settings, file })
    }

    /// Takes down that a running guest has got a device.
    pub fn plugged(&mut self, settings: Pmem) {
        self.0.push((settings, None));
    }

    /// Takes down that a running guest has lost a device.
    pub fn unplugged(&mut self, id: &str) {
        self.0.retain(|(settings, _)| settings.id != id);
    }

    /// The settings of each.
    pub fn settings(&self) -> impl Iterator<Item = &Pmem> {
        self.0.iter().map(|(settings, _)| settings)
    }

    /// The settings of the one with this id.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, id: &str) -> Result<&Pmem, Fault> {
        self.settings().find(|settings| settings.id == id).ok_or_else(|| {
            Fault::bad_request(format!(
                "`id` is {id:?}, and this guest has no such persistent memory; GET /vm/config lists it."
            ))
        })
    }

    /// The root device, and its number in the guest.
    pub fn root(&self) -> Option<(usize, &Pmem)> {
        self.settings().enumerate().find(|(_, settings)| settings.root_device)
    }

    /// Each with a descriptor of its own: a start that fails can be tried again.
    ///
    /// # Errors
    /// Those of `dup`; and after [`Pmems::close`].
    pub fn open(&self) -> io::Result<Vec<PmemFile>> {
        let open = |(settings, file): &(Pmem, Option<File>)| {
            let file = file.as_ref().ok_or_else(|| io::Error::other("the guest has its files already"))?;
            Ok(PmemFile { settings: settings.clone(), file: file.try_clone()? })
        };
        self.0.iter().map(open).collect()
    }

    /// Closes the files: the guest has its own.
    pub fn close(&mut self) {
        self.0.iter_mut().for_each(|(_, file)| *file = None);
    }

    /// Takes down that a running guest's device has been changed. For one that does not exist it does nothing.
    pub fn updated(&mut self, update: &PmemUpdate) {
        let mut all = self.0.iter_mut().map(|(settings, _)| settings);
        let Some(settings) = all.find(|settings| settings.id == update.id) else { return };
        settings.rate_limiter = changed(settings.rate_limiter, update.rate_limiter);
    }

    fn check(&self, settings: &Pmem) -> Result<(), Fault> {
        if let Some((_, root)) = self.root()
            && settings.root_device
            && root.id != settings.id
        {
            return Err(second_root("root_device", &settings.id, &root.id));
        }
        Ok(())
    }
}

fn expect_bytes(settings: &Pmem, mut file: &File) -> Result<(), Fault> {
    // Unlike the metadata's length, this is also right for a block device.
    if file.seek(SeekFrom::End(0)).is_ok_and(|bytes| bytes == 0) {
        return Err(Fault::bad_request(format!(
            "`path_on_host` is {}, which is empty; give it the size that the guest's memory is to have, for example with \
             `truncate`.",
            settings.path_on_host.display()
        )));
    }
    Ok(())
}

/// What is said of a device that is to be the root device beside another, disk or memory.
pub fn second_root(field: &str, id: &str, other: &str) -> Fault {
    Fault::bad_request(format!(
        "`{field}` is true for {id:?}, and {other:?} is the root device already; a guest has one. Set it to false for one \
         of them."
    ))
}

#[cfg(test)]
mod tests {
    use api_socket::{RateLimiter, TokenBucket};

    use super::*;

    fn pmem(id: &str) -> Pmem {
        Pmem { id: id.into(), path_on_host: "/p".into(), ..Pmem::default() }
    }

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(5).unwrap();
        file
    }

    #[track_caller]
    fn refused(pmems: &mut Pmems, settings: Pmem, file: File, words: &[&str]) {
        let before: Vec<_> = pmems.settings().cloned().collect();
        let message = pmems.put(settings, file).expect_err("accepted").message;
        for word in words {
            assert!(message.contains(word), "{word:?} is not in: {message}");
        }
        assert_eq!(pmems.settings().cloned().collect::<Vec<_>>(), before);
    }

    #[test]
    fn a_second_one_with_an_id_takes_the_place_of_the_first() {
        let mut pmems = Pmems::default();
        for id in ["a", "b"] {
            pmems.put(pmem(id), file()).unwrap();
        }
        let root = Pmem { root_device: true, ..pmem("a") };
        pmems.put(root.clone(), file()).unwrap();
        assert_eq!(pmems.settings().cloned().collect::<Vec<_>>(), [root.clone(), pmem("b")]);
        assert_eq!(pmems.root(), Some((0, &root)));
        assert_eq!(pmems.open().unwrap().len(), 2);
        pmems.close();
        assert!(pmems.open().is_err());
    }

    #[test]
    fn there_is_one_root_device() {
        let mut pmems = Pmems::default();
        pmems.put(Pmem { root_device: true, ..pmem("a") }, file()).unwrap();
        refused(
            &mut pmems,
            Pmem { root_device: true, ..pmem("b") },
            file(),
            &["`root_device`", "\"b\"", "\"a\""],
        );
        pmems.put(Pmem { root_device: true, read_only: true, ..pmem("a") }, file()).unwrap();
    }

    #[test]
    fn an_empty_file_is_no_memory() {
        let empty = tempfile::tempfile().unwrap();
        refused(&mut Pmems::default(), pmem("a"), empty, &["`path_on_host` is /p", "empty", "truncate"]);
    }

    #[test]
    fn one_that_does_not_exist_is_named() {
        let message = Pmems::default().find("b").unwrap_err().message;
        assert!(message.contains("`id` is \"b\"") && message.contains("GET /vm/config"), "{message}");
    }

    #[test]
    fn a_limit_that_a_change_leaves_out_stays() {
        let limit = |size| Some(TokenBucket { size, one_time_burst: None, refill_time: 1 });
        let limiter = |bandwidth, ops| Some(RateLimiter { bandwidth, ops });
        let mut pmems = Pmems::default();
        pmems.put(Pmem { rate_limiter: limiter(limit(1), limit(2)), ..pmem("a") }, file()).unwrap();
        pmems.updated(&PmemUpdate { id: "a".into(), rate_limiter: limiter(None, limit(5)) });
        assert_eq!(pmems.find("a").unwrap().rate_limiter, limiter(limit(1), limit(5)));
    }
}
