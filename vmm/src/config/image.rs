//! The files of a drive: its image and those behind it, checked as far as their headers go.
//!
//! What is in a file is what the client says, and what is behind it are the files the client lists: a header only says
//! whether there must be one.

use std::fs::File;
use std::io;
use std::path::Path;

use api_socket::{DiskFormat, Drive, Fault, IoEngine};
use devices::backend::disk::Format;
use devices::backend::qcow2::{Backing, MAX_IMAGES, MAX_METADATA_BYTES, OpenError, Qcow2};

/// Open files in the order in which they are looked into; the first is open for writing too unless the drive is read-only.
#[derive(Debug)]
pub struct Files {
    pub image: File,
    pub backing: Vec<(File, DiskFormat)>,
}

impl Files {
    /// Each with another descriptor.
    ///
    /// # Errors
    /// Those of `dup`.
    pub fn try_clone(&self) -> io::Result<Files> {
        let backing = self.backing.iter().map(|(file, format)| Ok((file.try_clone()?, *format)));
        Ok(Files { image: self.image.try_clone()?, backing: backing.collect::<io::Result<_>>()? })
    }

    /// As a block device takes them.
    pub fn for_device(self, drive: &Drive) -> (File, Format) {
        let backing = self.backing.into_iter();
        let backing =
            backing.map(|(file, format)| Backing { file, is_qcow2: format == DiskFormat::Qcow2 }).collect();
        match drive.format {
            None | Some(DiskFormat::Raw) => (self.image, Format::Raw),
            Some(DiskFormat::Qcow2) => (self.image, Format::Qcow2(backing)),
        }
    }

    /// Looks into the images, and changes nothing in them.
    ///
    /// # Errors
    /// What is wrong with one, or with their order.
    pub fn check(&self, drive: &Drive) -> Result<(), Fault> {
        let twin = self.try_clone().map_err(|error| Fault::bad_request(error.to_string()))?;
        let (image, Format::Qcow2(backing)) = twin.for_device(drive) else { return Ok(()) };
        let read_only = drive.is_read_only.unwrap_or(false);
        Qcow2::check(image, backing, read_only).map_err(|error| refused(drive, &error))
    }
}

/// What goes together, before anything is opened.
pub fn check_settings(drive: &Drive) -> Result<(), Fault> {
    if drive.format != Some(DiskFormat::Qcow2) {
        if drive.backing.is_empty() {
            return Ok(());
        }
        return Err(Fault::bad_request(
            "`backing` is set and `format` is Raw: a raw image has no backing file. Set `format` to Qcow2, or leave \
             `backing` out.",
        ));
    }
    if drive.direct == Some(true) {
        return Err(Fault::bad_request(
            "`direct` is true and `format` is Qcow2: tables of an image are not in whole blocks. Leave `direct` out, or give \
             a raw image, as `qemu-img convert -O raw` makes one.",
        ));
    }
    if drive.io_engine == Some(IoEngine::Async) {
        return Err(Fault::bad_request(
            "`io_engine` is Async and `format` is Qcow2: the asynchronous engine is for raw images. Give Sync, or a raw \
             image, as `qemu-img convert -O raw` makes one.",
        ));
    }
    Ok(())
}

fn refused(drive: &Drive, error: &OpenError) -> Fault {
    let image = |number: usize| match number.checked_sub(1) {
        None => format!("`path_on_host` is {}", display(drive.path_on_host.as_deref())),
        Some(place) => {
            let path = drive.backing.get(place).map(|backing| backing.path_on_host.as_path());
            format!("`path_on_host` of `backing[{place}]` is {}", display(path))
        }
    };
    Fault::bad_request(match error {
        OpenError::Image(number, why) => format!("{}, {why}.", image(*number)),
        OpenError::BackingMissing(number) => format!(
            "{}, a qcow2 image with a backing file, and `backing` lists none for it: list the images behind the drive's \
             own, the nearest first. The name in the image is not followed.",
            image(*number)
        ),
        OpenError::BackingUnused(number) => format!(
            "{}, and the image before it has no backing file: leave it out of `backing`, or see with `qemu-img info` \
             whether the order is right.",
            image(*number)
        ),
        OpenError::Memory(bytes) => format!(
            "{}, and the tables of its images may take {} MiB of memory; at most {} are allowed. `qemu-img convert -O \
             qcow2 -o cluster_size=64k` makes an image of smaller ones.",
            image(0),
            bytes >> 20,
            MAX_METADATA_BYTES >> 20
        ),
        OpenError::Images(count) => format!(
            "`backing` lists {} images; at most {} are allowed. `qemu-img rebase` or `qemu-img commit` makes them fewer.",
            count - 1,
            MAX_IMAGES - 1
        ),
    })
}

fn display(path: Option<&Path>) -> std::path::Display<'_> {
    path.unwrap_or(Path::new("")).display()
}
