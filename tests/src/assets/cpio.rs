//! Adds files to an initramfs: the kernel unpacks archives that follow each other, a later file over an earlier.
//!
//! Writes the "newc" format of `Documentation/driver-api/early-userspace/buffer-format.rst`. Directories must exist in
//! the base; nothing is read back.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

const REGULAR_EXECUTABLE: u32 = 0o100_755;
const TRAILER: &str = "TRAILER!!!";

/// Writes `image`: the bytes of `base`, and after them an archive of `files`, each a path inside and the file to put
/// there, owned by root and executable. `image` appears complete or not at all.
pub fn append(base: &Path, files: &[(&str, &Path)], image: &Path) -> io::Result<()> {
    let partial = image.with_extension(format!("partial-{}", std::process::id()));
    let result = write(base, files, &partial).and_then(|()| fs::rename(&partial, image));
    if result.is_err() {
        let _ = fs::remove_file(&partial);
    }
    result
}

fn write(base: &Path, files: &[(&str, &Path)], image: &Path) -> io::Result<()> {
    let mut out = File::create(image)?;
    io::copy(&mut File::open(base)?, &mut out)?;
    for (number, (name, file)) in (1u32..).zip(files) {
        entry(&mut out, number, REGULAR_EXECUTABLE, name, &fs::read(file)?)?;
    }
    entry(&mut out, 0, 0, TRAILER, &[])
}

/// Header, name and data, the last two padded to four bytes. Thirteen fields of eight hexadecimal digits: inode, mode,
/// uid, gid, links, mtime, file size, device (2), special device (2), name size with its zero, checksum.
fn entry(out: &mut impl Write, inode: u32, mode: u32, name: &str, data: &[u8]) -> io::Result<()> {
    let too_large =
        |_| io::Error::new(io::ErrorKind::FileTooLarge, format!("{name} is too large for an initramfs"));
    let size = u32::try_from(data.len()).map_err(too_large)?;
    let name_size = u32::try_from(name.len() + 1).map_err(too_large)?;
    let mut header = String::from("070701");
    for field in [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
        header.push_str(&format!("{field:08x}"));
    }
    header.push_str(name);
    header.push('\0');
    padded(out, header.as_bytes())?;
    padded(out, data)
}

fn padded(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(bytes)?;
    let padding = bytes.len().next_multiple_of(4) - bytes.len();
    out.write_all(&[0; 3][..padding])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn cpio_reads_what_was_appended() {
        let dir = tempfile::tempdir().unwrap();
        let (base, image) = (dir.path().join("base"), dir.path().join("image"));
        let files = [("bin/three", "abc"), ("bin/four", "abcd"), ("empty", "")];
        fs::write(&base, b"").unwrap();
        let sources = [0, 1, 2].map(|n| dir.path().join(format!("source-{n}")));
        for ((_, text), source) in files.iter().zip(&sources) {
            fs::write(source, text).unwrap();
        }
        let named: Vec<_> =
            files.iter().zip(&sources).map(|((name, _), source)| (*name, source.as_path())).collect();
        append(&base, &named, &image).unwrap();

        let status = Command::new("cpio")
            .args(["--quiet", "-id"])
            .current_dir(dir.path())
            .stdin(File::open(&image).unwrap())
            .status()
            .unwrap();
        assert!(status.success());
        for (name, text) in files {
            assert_eq!(fs::read_to_string(dir.path().join(name)).unwrap(), text, "{name}");
        }
    }

    #[test]
    fn the_base_comes_first_and_unchanged() {
        let dir = tempfile::tempdir().unwrap();
        let (base, image) = (dir.path().join("base"), dir.path().join("image"));
        fs::write(&base, b"the base").unwrap();
        append(&base, &[], &image).unwrap();
        assert!(fs::read(&image).unwrap().starts_with(b"the base070701"));
    }

    #[test]
    fn a_missing_file_leaves_no_image() {
        let dir = tempfile::tempdir().unwrap();
        let (base, image) = (dir.path().join("base"), dir.path().join("image"));
        fs::write(&base, b"").unwrap();
        assert!(append(&base, &[("x", &dir.path().join("absent"))], &image).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
