//! Commands about images. What an image is made of is sent, so that berthd needs no right to a user's files.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::Path;

use api_socket::ClientError;
use api_socket::fleet::{Client, Image, NewImage, Part};

use crate::args::{ImageInspect, ImageLs, ImageRm, Import};
use crate::daemon::{About, each};
use crate::error::{During, Error, Result};
use crate::exit::Exit;
use crate::output::progress::Progress;
use crate::output::table::Table;
use crate::output::{self, words};

/// # Errors
/// A file cannot be read, or berthd refuses or is not there.
pub fn import(daemon: &Client, args: &Import) -> Result<Exit> {
    let name = args.name.as_str();
    let mut files = vec![(Part::Kernel, &args.kernel)];
    files.extend(args.initrd.as_ref().map(|initrd| (Part::Initrd, initrd)));
    files.push((Part::Disk, &args.disk));
    // Before anything is sent, each file is open.
    let files: Vec<_> = files
        .into_iter()
        .map(|(part, path)| open(path).map(|(file, length)| (part, path, file, length)))
        .collect::<Result<_>>()?;
    if args.initrd.is_none() {
        // What an import that failed has sent would be this image's.
        daemon.put_part(name, Part::Initrd, &mut io::empty(), 0, |_| ()).about(name)?;
    }
    for (part, path, mut file, length) in files {
        let progress = Progress::bytes(part.as_str(), Some(length));
        let mut before = 0;
        let tell = |sent: u64| progress.advance(sent - std::mem::replace(&mut before, sent));
        match daemon.put_part(name, part, &mut file, length, tell) {
            Err(ClientError::Source(error)) => {
                return Err(Error::new(format!("cannot read {}", path.display()), error));
            }
            sent => sent.about(name)?,
        }
    }
    daemon.put_image(name, NewImage { command_line: args.cmdline.clone() }).about(name)?;
    output::print(&format!("{name}\n")).map(|()| Exit::Ok)
}

/// A file and its length, which for a block device only seeking tells. One that is empty is a mistake, and as an initrd would
/// mean none.
fn open(path: &Path) -> Result<(File, u64)> {
    let opened = File::open(path).and_then(|mut file| {
        let length = file.seek(SeekFrom::End(0))?;
        file.rewind()?;
        Ok((file, length))
    });
    match opened.during(|| format!("cannot read {}", path.display()))? {
        (_, 0) => Err(Error::new(format!("cannot import {}", path.display()), "it is empty")),
        found => Ok(found),
    }
}

/// # Errors
/// berthd refuses or is not there.
pub fn ls(daemon: &Client, args: &ImageLs) -> Result<Exit> {
    let images = daemon.images().about("images")?;
    let shown = match args {
        ImageLs { json: true, .. } => return output::print_json(&images).map(|()| Exit::Ok),
        ImageLs { quiet: true, .. } => images.iter().map(|image| format!("{}\n", image.name)).collect(),
        _ => table(&images),
    };
    output::print(&shown).map(|()| Exit::Ok)
}

fn table(images: &[Image]) -> String {
    let mut table = Table::new(&["NAME", "DISK", "USED", "GUESTS", "CREATED"]);
    for image in images {
        table.add([
            image.name.clone(),
            words::size(image.disk_bytes),
            words::size(image.used_bytes),
            image.guests.to_string(),
            words::instant(image.created_at),
        ]);
    }
    table.render()
}

/// # Errors
/// As for [`ls`].
pub fn rm(daemon: &Client, args: &ImageRm) -> Result<Exit> {
    each(&args.images, |image| daemon.remove_image(image).about(image))
}

/// # Errors
/// As for [`ls`].
pub fn inspect(daemon: &Client, args: &ImageInspect) -> Result<Exit> {
    for image in &args.images {
        output::print_json(&daemon.image(image.as_str()).about(image.as_str())?)?;
    }
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_shown_with_their_sizes_in_words() {
        let image = Image {
            name: "debian".into(),
            owner: 0,
            command_line: "quiet".into(),
            has_initrd: true,
            disk_bytes: 2 << 30,
            used_bytes: 700 << 20,
            created_at: 0.0,
            guests: 3,
        };
        assert_eq!(
            table(&[image]),
            "NAME     DISK    USED      GUESTS   CREATED\n\
             debian   2 GiB   700 MiB   3        1970-01-01 00:00:00Z\n"
        );
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let error = open(Path::new("/nowhere/kernel")).unwrap_err().to_string();
        assert!(error.starts_with("cannot read /nowhere/kernel: No such file"), "{error}");
    }
}
