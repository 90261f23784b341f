//! What requests after the start may open again: the files of the drives and what is beside them, which is where
//! `PATCH /drives` finds a drive's next file; with PCI, where devices come later, also those of persistent memory, a
//! directory that was named for them, and where taps and the kernel's back-ends for them come from.
//!
//! The socket of a vhost-user back-end, which a device connects to again, needs no place here: Landlock does not restrict
//! connecting to a Unix socket that has a path.
//!
//! A drive's path may be a link to elsewhere, so its file is named too, and not only its directory.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::network::{TUN, VHOST};
use super::{Backing, Config};
use crate::sandbox::landlock::Allowed;

/// Open directories and files; those of drives that were handed over are not among them.
pub struct Reach<'a> {
    directories: BTreeMap<PathBuf, (File, bool)>,
    files: Vec<(&'a File, bool)>,
    /// Where taps come from, and the kernel's back-ends for them.
    devices: Vec<File>,
}

impl Config {
    /// What the drives as they are now make reachable. Before [`Config::started`]. A directory that cannot be reached
    /// itself is left out.
    pub fn reach(&self) -> Reach<'_> {
        let mut reach = Reach { directories: BTreeMap::new(), files: Vec::new(), devices: Vec::new() };
        for (settings, backing) in &self.drives {
            let (Some(path), Some(Backing::Files(files))) = (&settings.path_on_host, backing) else {
                continue;
            };
            let is_writable = !settings.is_read_only.unwrap_or(false);
            let behind = settings.backing.iter().zip(&files.backing);
            // Those behind a drive's next image are opened again too.
            let behind = behind.map(|(settings, (file, _))| (&settings.path_on_host, file, false));
            for (path, file, is_writable) in [(path, &files.image, is_writable)].into_iter().chain(behind) {
                if !self.handed.stands_for(path) {
                    reach.files.push((file, is_writable));
                    reach.add_directory(directory_of(path), is_writable);
                }
            }
        }
        if let Some(directory) = &self.hot_plug_directory {
            reach.add_directory(directory, true);
        }
        if self.pci {
            for pmem in self.pmems.settings().filter(|pmem| !self.handed.stands_for(&pmem.path_on_host)) {
                reach.add_directory(directory_of(&pmem.path_on_host), !pmem.read_only);
            }
            // Where there is no such file, no tap can be had by its name, and no back-end.
            let open = |path: &&str| OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).ok();
            reach.devices = [TUN, VHOST].iter().filter_map(open).collect();
        }
        reach
    }
}

impl Reach<'_> {
    /// In the form of a restriction.
    pub fn allowed(&self) -> Vec<Allowed<'_>> {
        let files = self.files.iter().copied();
        let directories = self.directories.values().map(|(directory, is_writable)| (directory, *is_writable));
        files
            .chain(directories)
            .map(|(file, is_writable)| Allowed { place: file.as_fd(), is_writable, is_device: false })
            .chain(self.devices.iter().map(|device| Allowed {
                place: device.as_fd(),
                is_writable: true,
                is_device: true,
            }))
            .collect()
    }

    /// The directories, for the log.
    pub fn names(&self) -> Vec<String> {
        self.directories.keys().map(|path| path.display().to_string()).collect()
    }

    fn add_directory(&mut self, path: &Path, is_writable: bool) {
        // Beside a disk of the host's are all its others.
        if path == Path::new("/dev") {
            return;
        }
        if let Some((_, known)) = self.directories.get_mut(path) {
            *known |= is_writable;
            return;
        }
        match OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(path) {
            Ok(directory) => drop(self.directories.insert(path.into(), (directory, is_writable))),
            Err(error) => log::debug!("{}: {error}; PATCH /drives will not reach it", path.display()),
        }
    }
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
