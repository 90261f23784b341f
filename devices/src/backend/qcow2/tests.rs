use std::os::unix::fs::MetadataExt;

use vm_memory::{Bytes, GuestAddress};

use super::testing::{Blank, L1_CLUSTER};
use super::*;
use crate::virtio::queue::Segment;

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 1 << 16;
const BLANK: Blank = Blank { cluster_bits: 16, size: 64 * MIB, backing: None };

fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

/// A disk and the guest memory that its operations are made with.
struct Rig {
    disk: Qcow2,
    image: File,
    ram: GuestRam,
}

impl Rig {
    fn new(image: File, backing: Vec<Backing>) -> Rig {
        let disk = Qcow2::open(image.try_clone().unwrap(), backing, false).unwrap();
        Rig { disk, image, ram: GuestRam::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap() }
    }

    /// In two pieces, neither of which is whole sectors.
    fn buffers(len: usize) -> Segments {
        let piece = |at, len: usize| Segment { address: GuestAddress(at), len: len as u32 };
        Segments::new(vec![piece(0, 100), piece(3 << 20, len - 100)])
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.ram.write_slice(&bytes[..100], GuestAddress(0)).unwrap();
        self.ram.write_slice(&bytes[100..], GuestAddress(3 << 20)).unwrap();
        self.perform(Operation::Write { offset, buffers: Self::buffers(bytes.len()) })
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        self.ram.write_slice(&vec![0xee; 4 << 20], GuestAddress(0)).unwrap();
        self.perform(Operation::Read { offset, buffers: Self::buffers(len) }).unwrap();
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes[..100], GuestAddress(0)).unwrap();
        self.ram.read_slice(&mut bytes[100..], GuestAddress(3 << 20)).unwrap();
        bytes
    }

    fn perform(&self, operation: Operation) -> io::Result<()> {
        self.disk.perform(&self.ram, &operation)
    }

    /// Bytes that the host's file system keeps for the image.
    fn allocated(&self) -> u64 {
        self.image.sync_all().unwrap();
        self.image.metadata().unwrap().blocks() * 512
    }
}

fn is_all(bytes: &[u8], value: u8) -> bool {
    bytes.iter().all(|byte| *byte == value)
}

#[test]
fn what_was_written_is_read_in_this_process_and_by_the_next_one() {
    for cluster_bits in [9, 12, 16, 21] {
        let image = file(&Blank { cluster_bits, ..BLANK }.bytes());
        let rig = Rig::new(image.try_clone().unwrap(), Vec::new());
        assert_eq!(rig.disk.bytes(), 64 * MIB);
        let bytes: Vec<u8> = (0..300_000_u32).map(|i| (i % 251) as u8).collect();
        for offset in [512, 33 * MIB + 1024, 64 * MIB - bytes.len() as u64] {
            rig.write(offset, &bytes).unwrap();
        }
        rig.disk.settle().unwrap();
        // Killed: nothing is written any more.
        std::mem::forget(rig.disk);
        let rig = Rig::new(image, Vec::new());
        for offset in [512, 33 * MIB + 1024, 64 * MIB - bytes.len() as u64] {
            assert!(rig.read(offset, bytes.len()) == bytes, "{cluster_bits}: {offset}");
        }
        assert!(is_all(&rig.read(0, 512), 0) && is_all(&rig.read(20 * MIB, 200_000), 0));
    }
}

#[test]
fn what_is_not_in_an_image_is_in_those_behind_it_which_are_not_written() {
    let base = file(&vec![0xba; 3 * MIB as usize + 700]);
    let middle = file(&Blank { backing: Some("nowhere"), ..BLANK }.bytes());
    let base_of = || Backing { file: base.try_clone().unwrap(), is_qcow2: false };
    let rig = Rig::new(middle.try_clone().unwrap(), vec![base_of()]);
    rig.write(MIB + 512, &[1; 512]).unwrap();
    drop(rig);
    let before = middle.metadata().unwrap().mtime_nsec();

    let top = file(&Blank { backing: Some("/etc/passwd"), ..BLANK }.bytes());
    let middle_of = Backing { file: middle.try_clone().unwrap(), is_qcow2: true };
    let rig = Rig::new(top, vec![middle_of, base_of()]);
    rig.write(2 * MIB + 512, &[2; 512]).unwrap();
    assert!(is_all(&rig.read(MIB, 512), 0xba));
    assert!(is_all(&rig.read(MIB + 512, 512), 1));
    assert!(is_all(&rig.read(2 * MIB, 512), 0xba), "the rest of the cluster is copied");
    assert!(is_all(&rig.read(2 * MIB + 512, 512), 2));
    let end = rig.read(3 * MIB, 2048);
    assert!(is_all(&end[..700], 0xba) && is_all(&end[700..], 0), "the base ends, the disk goes on");
    // Given back, and not what is behind it again.
    rig.perform(Operation::WriteZeroes { range: Extent { offset: 0, len: 3 * MIB }, unmap: true }).unwrap();
    assert!((0..3).all(|mib| is_all(&rig.read(mib * MIB, MIB as usize), 0)));
    assert_eq!(middle.metadata().unwrap().mtime_nsec(), before);
    let mut bytes = vec![0; 3 * MIB as usize];
    base.read_exact_at(&mut bytes, 0).unwrap();
    assert!(is_all(&bytes, 0xba));
}

#[test]
fn a_discard_gives_space_back_and_its_clusters_are_used_again() {
    let rig = Rig::new(file(&BLANK.bytes()), Vec::new());
    for mib in 0..8 {
        rig.write(mib * MIB, &vec![7; MIB as usize]).unwrap();
    }
    let (full, len) = (rig.allocated(), rig.image.metadata().unwrap().len());
    // Both ends within a cluster.
    let range = Extent { offset: MIB + 4096, len: 4 * MIB };
    rig.perform(Operation::Discard(vec![range])).unwrap();
    assert!(rig.allocated() <= full - 4 * MIB + 4096, "{} of {full}", rig.allocated());
    assert!(is_all(&rig.read(MIB, 4096), 7) && is_all(&rig.read(5 * MIB + 4096, 4096), 7));
    for mib in 20..23 {
        rig.write(mib * MIB, &vec![9; MIB as usize]).unwrap();
    }
    assert_eq!(rig.image.metadata().unwrap().len(), len, "there was room within the file");
}

#[test]
fn a_discard_where_nothing_is_takes_no_table() {
    let image = file(&Blank { size: 1 << 40, ..BLANK }.bytes());
    let rig = Rig::new(image, Vec::new());
    let before = rig.image.metadata().unwrap().len();
    for start in (0..1 << 40).step_by(1 << 30) {
        let range = Extent { offset: start, len: 1 << 30 };
        rig.perform(Operation::Discard(vec![range])).unwrap();
        rig.perform(Operation::WriteZeroes { range, unmap: true }).unwrap();
    }
    rig.disk.settle().unwrap();
    assert_eq!(rig.image.metadata().unwrap().len(), before);
}

#[test]
fn zeroes_are_zeroes_and_the_rest_is_untouched() {
    for unmap in [false, true] {
        let rig = Rig::new(file(&BLANK.bytes()), Vec::new());
        rig.write(0, &vec![5; MIB as usize]).unwrap();
        let range = Extent { offset: 512, len: 5 * CLUSTER };
        rig.perform(Operation::WriteZeroes { range, unmap }).unwrap();
        assert!(is_all(&rig.read(0, 512), 5) && is_all(&rig.read(512, 5 * CLUSTER as usize), 0));
        assert!(is_all(&rig.read(512 + 5 * CLUSTER, 512), 5));
    }
}

/// The tables of a terabyte do not fit into the cache, which throws out what was used least.
#[test]
fn a_large_disk_takes_no_more_memory_than_its_tables_may() {
    const TABLES: u64 = 2000;
    let covered = CLUSTER / 8 * CLUSTER;
    let rig = Rig::new(file(&Blank { size: 1 << 40, ..BLANK }.bytes()), Vec::new());
    let limit = rig.disk.metadata_bytes();
    assert!(limit < 11 * MIB, "{limit}");
    let resident = || {
        let text = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = text.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    };
    rig.write(0, &[1; 512]).unwrap();
    rig.read(0, 512);
    let before = resident();
    for table in 0..TABLES {
        rig.write(table * covered, &[1; 512]).unwrap();
    }
    rig.disk.settle().unwrap();
    let after = resident();
    // Other tests share the process; without a limit it would be 125 MiB.
    assert!(after < before + limit + 64 * MIB, "{before} before, {after} after, {limit} allowed");
    assert!((0..TABLES).step_by(100).all(|table| is_all(&rig.read(table * covered, 512), 1)));
}

#[track_caller]
fn refused(image: &[u8], backing: Vec<Backing>, word: &str) {
    let error = Qcow2::open(file(image), backing, false).expect_err("accepted").to_string();
    assert!(error.contains(word), "{word:?} is not in: {error}");
}

fn changed(at: u64, value: &[u8]) -> Vec<u8> {
    let mut image = BLANK.bytes();
    image[at as usize..at as usize + value.len()].copy_from_slice(value);
    image
}

#[test]
fn what_is_not_supported_or_damaged_is_refused_with_the_remedy() {
    let u32_at = |at, value: u32| changed(at, &value.to_be_bytes());
    let u64_at = |at, value: u64| changed(at, &value.to_be_bytes());
    let entry = L1_CLUSTER * CLUSTER;
    for (image, word) in [
        (vec![0; 1 << 20], "no qcow2 image"),
        (BLANK.bytes()[..100].to_vec(), "no qcow2 image"),
        (Vec::new(), "no qcow2 image"),
        (u32_at(4, 2), "compat=1.1"),
        (u32_at(4, 4), "version 4"),
        (u64_at(72, 1), "qemu-img check"),
        (u64_at(72, 2), "corrupt"),
        (u64_at(72, 4), "another file"),
        (u64_at(72, 8), "zlib"),
        (u64_at(72, 16), "extended_l2=off"),
        (u64_at(72, 1 << 40), "0x10000000000"),
        (u64_at(88, 1), "bitmap --remove"),
        (u32_at(32, 2), "encrypted"),
        (u32_at(20, 8), "clusters"),
        (u32_at(20, 22), "clusters"),
        (u32_at(20, u32::MAX), "clusters"),
        (u32_at(96, 7), "64 bits"),
        (u32_at(100, 96), "length"),
        (u32_at(100, 105), "length"),
        (u32_at(100, 1 << 20), "length"),
        (u64_at(24, 1 << 50), "too short"),
        (u64_at(24, u64::MAX), "too short"),
        (u32_at(36, u32::MAX), "L1 table"),
        (u32_at(36, 1 << 20), "L1 table"),
        (u64_at(40, 0), "L1 table"),
        (u64_at(40, 513), "L1 table"),
        (u64_at(40, 0_u64.wrapping_sub(CLUSTER)), "L1 table"),
        (u64_at(48, 0), "refcount table"),
        (u64_at(48, 1 << 40), "refcount table"),
        (u32_at(56, u32::MAX), "refcount table"),
        (u64_at(entry, 1 << 40), "L1 table"),
        (u64_at(entry, CLUSTER + 512), "L1 table"),
        (u64_at(CLUSTER, 1 << 62), "refcount table"),
        (u64_at(CLUSTER + 8, 2 * CLUSTER), "in one place"),
        (u64_at(entry, 2 * CLUSTER), "in one place"),
        (u64_at(48, 3 * CLUSTER), "in one place"),
        (changed(104, &[0x68, 3, 0xf8, 0x57, 0, 0, 0, 49]), "features"),
        (changed(104, &[1, 1, 1, 1, 0xff, 0xff, 0xff, 0xff]), "do not end"),
        (changed(104, &[1; 16 * 300]), "extensions"),
    ] {
        refused(&image, Vec::new(), word);
    }
    let named = Blank { backing: Some("elsewhere"), ..BLANK }.bytes();
    let far = [&named[..16], &1024_u32.to_be_bytes(), &named[20..]].concat();
    refused(&far, Vec::new(), "name of its backing file");
}

#[test]
fn images_are_as_many_as_the_headers_say() {
    let named = Blank { backing: Some("elsewhere"), ..BLANK }.bytes();
    let raw = || Backing { file: file(&[0; 512]), is_qcow2: false };
    let qcow2 = |bytes: &[u8]| Backing { file: file(bytes), is_qcow2: true };
    refused(&named, Vec::new(), "image 0 names a backing file");
    refused(&BLANK.bytes(), vec![raw()], "image 1 is given");
    refused(&named, vec![raw(), raw()], "image 2 is given");
    refused(&named, vec![qcow2(&named)], "image 1 names a backing file");
    refused(&named, vec![qcow2(&[0; 512])], "image 1 is which is no qcow2 image");
    refused(&named, (0..MAX_IMAGES).map(|_| qcow2(&named)).collect(), "at most 16");
    let most = (2..MAX_IMAGES).map(|_| qcow2(&named)).chain([raw()]).collect();
    assert!(Qcow2::open(file(&named), most, false).is_ok());
}

#[test]
fn tables_that_would_take_too_much_memory_are_refused() {
    // One L2 table for 512 GiB.
    let bytes = Blank { cluster_bits: 21, size: 1 << 46, backing: None }.bytes();
    refused(&bytes, Vec::new(), "bytes of memory");
    Qcow2::open(file(&Blank { cluster_bits: 21, size: 1 << 43, backing: None }.bytes()), Vec::new(), false)
        .unwrap();
}

#[test]
fn a_read_only_disk_is_not_written() {
    let image = file(&BLANK.bytes());
    let disk = Qcow2::open(image.try_clone().unwrap(), Vec::new(), true).unwrap();
    let rig = Rig { disk, ..Rig::new(image, Vec::new()) };
    let range = Extent { offset: 0, len: MIB };
    assert!(rig.write(0, &[1; 512]).is_err());
    assert!(rig.perform(Operation::WriteZeroes { range, unmap: false }).is_ok(), "there are zeroes already");
    assert!(is_all(&rig.read(0, 512), 0));
}

/// An L2 table that names a cluster far away.
#[test]
fn data_is_not_written_where_a_damaged_table_wants_it() {
    let far = 1_u64 << 40 | 1 << 63;
    let mut image = BLANK.bytes();
    image.resize(5 * CLUSTER as usize, 0);
    let l2 = 4 * CLUSTER;
    image[(L1_CLUSTER * CLUSTER) as usize..][..8].copy_from_slice(&(l2 | 1 << 63).to_be_bytes());
    image[l2 as usize..][..8].copy_from_slice(&far.to_be_bytes());
    let rig = Rig::new(file(&image), Vec::new());
    assert!(is_all(&rig.read(0, 512), 0), "there is nothing");
    for done in
        [rig.write(0, &[1; 512]), rig.perform(Operation::Discard(vec![Extent { offset: 0, len: CLUSTER }]))]
    {
        assert!(done.unwrap_err().to_string().contains("damaged"));
    }
    assert!(rig.image.metadata().unwrap().len() < MIB);
}

#[test]
fn a_file_that_cannot_be_written_is_an_error_and_what_was_there_stays() {
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().write_all_at(&BLANK.bytes(), 0).unwrap();
    let rig = Rig::new(File::open(path.path()).unwrap(), Vec::new());
    assert!(rig.write(0, &[1; 512]).is_err());
    assert!(is_all(&rig.read(0, 512), 0));
}
