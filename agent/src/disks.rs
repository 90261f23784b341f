//! Which disk is meant by `root=`: names of devices, partitions by their unique identifiers, file systems of the ext family by
//! identifier or label. Tables are read as the disk has them and no checksum is checked, as the kernel does it.

use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::PathBuf;

use crate::kernel::{self, Kernel};

/// Partitions of one disk that are looked at; a table has 128.
const MAX_PARTITIONS: u32 = 1024;

/// Bytes of an entry in a partition table; by the UEFI specification 128, or more.
const ENTRY_BYTES: std::ops::RangeInclusive<u32> = 128..=4096;

/// What a value of `root=` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disk {
    Path(PathBuf),
    Partition(String),
    Identifier(String),
    Label(String),
}

impl Disk {
    pub fn parse(text: &str) -> Result<Disk, String> {
        match text.split_once('=') {
            Some(("PARTUUID", id)) if !id.contains('/') => Ok(Disk::Partition(id.to_ascii_lowercase())),
            Some(("UUID", id)) => Ok(Disk::Identifier(id.to_ascii_lowercase())),
            Some(("LABEL", label)) => Ok(Disk::Label(label.into())),
            None if text.starts_with("/dev/") => Ok(Disk::Path(text.into())),
            _ => Err(format!(
                "root={text} is not known here: it takes /dev/NAME, PARTUUID=, and for ext2 to ext4 UUID= and LABEL="
            )),
        }
    }

    /// Its device, if it is there now.
    pub fn find(&self, kernel: Kernel) -> Option<PathBuf> {
        let names = kernel::names(kernel.sys, "class/block");
        let named = |matches: &dyn Fn(&File) -> bool| {
            let found = names.iter().find(|name| open(name).is_some_and(|disk| matches(&disk)));
            found.map(|name| device(name))
        };
        match self {
            Disk::Path(path) => {
                let is_disk = std::fs::metadata(path).is_ok_and(|file| file.file_type().is_block_device());
                is_disk.then(|| path.clone())
            }
            Disk::Identifier(id) => named(&|disk| ext(disk).is_some_and(|(other, _)| other == *id)),
            Disk::Label(label) => named(&|disk| ext(disk).is_some_and(|(_, other)| other == *label)),
            Disk::Partition(id) => names.iter().find_map(|name| {
                let number = partition(&open(name)?, block_bytes(kernel, name), id)?;
                names.iter().find(|part| is_partition(kernel, name, part, number)).map(|part| device(part))
            }),
        }
    }
}

fn device(name: &str) -> PathBuf {
    // A name in /sys has an exclamation mark where that in /dev has a slash.
    PathBuf::from("/dev").join(name.replace('!', "/"))
}

fn open(name: &str) -> Option<File> {
    File::open(device(name)).ok()
}

fn block_bytes(kernel: Kernel, disk: &str) -> u64 {
    let text = kernel::read(kernel.sys, &format!("class/block/{disk}/queue/logical_block_size"));
    text.ok().and_then(|text| text.parse().ok()).unwrap_or(512)
}

fn is_partition(kernel: Kernel, disk: &str, part: &str, number: u32) -> bool {
    let text = kernel::read(kernel.sys, &format!("class/block/{disk}/{part}/partition"));
    text.is_ok_and(|text| text.parse() == Ok(number))
}

/// Identifier and label of a file system of the ext family; Documentation/filesystems/ext4/super.rst.
fn ext(disk: &File) -> Option<(String, String)> {
    const SUPERBLOCK: u64 = 1024;
    let mut block = [0; 0x88];
    disk.read_exact_at(&mut block, SUPERBLOCK).ok()?;
    if block.get(0x38..0x3a)? != [0x53, 0xef] {
        return None;
    }
    let label = block.get(0x78..0x88)?.split(|byte| *byte == 0).next()?;
    let id: [u8; 16] = block.get(0x68..0x78)?.try_into().ok()?;
    Some((identifier(id), String::from_utf8_lossy(label).into_owned()))
}

/// The number of the partition with this identifier, from 1.
fn partition(disk: &File, block_bytes: u64, id: &str) -> Option<u32> {
    gpt(disk, block_bytes, id).or_else(|| mbr(disk, id))
}

/// By the UEFI specification, 5.3: a header in the second block, entries where it says.
fn gpt(disk: &File, block_bytes: u64, wanted: &str) -> Option<u32> {
    let mut header = [0; 92];
    disk.read_exact_at(&mut header, block_bytes).ok()?;
    if header.get(..8)? != b"EFI PART" {
        return None;
    }
    let word = |at: usize| Some(u32::from_le_bytes(header.get(at..at + 4)?.try_into().ok()?));
    let first = u64::from_le_bytes(header.get(72..80)?.try_into().ok()?);
    let (count, bytes) = (word(80)?.min(MAX_PARTITIONS), word(84)?);
    if !ENTRY_BYTES.contains(&bytes) {
        return None;
    }
    (0..count).find_map(|index| {
        let at = first.checked_mul(block_bytes)?.checked_add(u64::from(index) * u64::from(bytes))?;
        let mut entry = [0; 32];
        disk.read_exact_at(&mut entry, at).ok()?;
        let [.., a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = entry;
        // Its first three parts are little-endian numbers.
        let id = [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p];
        (id != [0; 16] && identifier(id) == wanted).then_some(index + 1)
    })
}

/// The kernel's own name for partitions of the older table: the disk's signature and the number, both hexadecimal.
fn mbr(disk: &File, wanted: &str) -> Option<u32> {
    let mut block = [0; 512];
    disk.read_exact_at(&mut block, 0).ok()?;
    if block.get(510..512)? != [0x55, 0xaa] {
        return None;
    }
    let signature = u32::from_le_bytes(block.get(440..444)?.try_into().ok()?);
    let number = wanted.strip_prefix(&format!("{signature:08x}-"))?;
    u32::from_str_radix(number, 16).ok().filter(|number| *number > 0)
}

fn identifier(id: [u8; 16]) -> String {
    let digits: Vec<_> = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [0..4, 4..6, 6..8, 8..10, 10..16];
    parts.map(|part| digits.get(part).unwrap_or_default().concat()).join("-")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn disk(bytes: usize, pieces: &[(usize, &[u8])]) -> File {
        let mut image = vec![0; bytes];
        for (at, piece) in pieces {
            image[*at..at + piece.len()].copy_from_slice(piece);
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&image).unwrap();
        file
    }

    const ID: [u8; 16] = [0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0, 1, 2, 3, 4, 5, 6, 7, 8];

    #[test]
    fn a_value_says_which_disk() {
        assert_eq!(Disk::parse("/dev/vda1"), Ok(Disk::Path("/dev/vda1".into())));
        assert_eq!(Disk::parse("LABEL=Root"), Ok(Disk::Label("Root".into())));
        assert_eq!(Disk::parse("UUID=AB"), Ok(Disk::Identifier("ab".into())));
        assert_eq!(Disk::parse("PARTUUID=AB-01"), Ok(Disk::Partition("ab-01".into())));
        for unknown in ["PARTUUID=AB/PARTNROFF=1", "vda", "254:1", "PARTLABEL=x", ""] {
            assert!(Disk::parse(unknown).unwrap_err().contains(&format!("root={unknown} ")));
        }
    }

    #[test]
    fn a_file_system_is_known_by_its_superblock() {
        let found =
            disk(4096, &[(1024 + 0x38, &[0x53, 0xef]), (1024 + 0x68, &ID), (1024 + 0x78, b"berth-root")]);
        let wanted = ("12345678-9abc-def0-0102-030405060708".to_owned(), "berth-root".to_owned());
        assert_eq!(ext(&found), Some(wanted));
        assert_eq!(ext(&disk(4096, &[(1024 + 0x68, &ID)])), None);
        assert_eq!(ext(&disk(1024, &[])), None);
    }

    #[test]
    fn a_partition_is_found_in_both_kinds_of_tables() {
        for block in [512, 4096] {
            let header = [
                &b"EFI PART"[..],
                &[0; 64],
                &2u64.to_le_bytes(),
                &4u32.to_le_bytes(),
                &128u32.to_le_bytes(),
                &[0; 4],
            ];
            let found = disk(block * 4, &[(block, &header.concat()), (block * 2 + 128 + 16, &ID)]);
            let id = "78563412-bc9a-f0de-0102-030405060708";
            assert_eq!(partition(&found, block as u64, id), Some(2));
            assert_eq!(partition(&found, block as u64, "00000000-0000-0000-0000-000000000000"), None);
        }
        let found = disk(1024, &[(440, &0x0abc_def0u32.to_le_bytes()), (510, &[0x55, 0xaa])]);
        assert_eq!(partition(&found, 512, "0abcdef0-0b"), Some(11));
        assert_eq!(partition(&found, 512, "0abcdef0-00"), None);
        assert_eq!(partition(&found, 512, "0abcdef1-01"), None);
    }

    #[test]
    fn a_table_that_makes_no_sense_has_no_partition() {
        let header = [&b"EFI PART"[..], &[0xff; 84]].concat();
        assert_eq!(
            partition(&disk(4096, &[(512, &header)]), 512, "ffffffff-ffff-ffff-ffff-ffffffffffff"),
            None
        );
    }
}
