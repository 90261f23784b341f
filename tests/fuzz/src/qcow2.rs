//! qcow2 images of unknown origin: made well and then changed anywhere, or any bytes at all; opened, read, written, given
//! back and opened again. With an image that nobody has changed, the disk is what a disk must be.

use std::fs::File;
use std::os::unix::fs::FileExt;

use devices::backend::disk::{Disk, Extent, Format, Operation};
use devices::backend::qcow2::Backing;
use devices::backend::qcow2::testing::Blank;
use devices::memory::GuestRam;
use devices::virtio::queue::{Segment, Segments};
use vm_memory::{Bytes, GuestAddress};

use crate::input::Input;

const SECTOR_BYTES: u64 = 512;
/// With the smallest clusters, several L2 tables.
const DISK_BYTES: u64 = 1 << 18;
const RAM: usize = 1 << 16;
const BACKING_BYTE: u8 = 0xbb;
/// Less than the disk: there is nothing behind its end.
const BACKING_BYTES: u64 = DISK_BYTES / 2 + 100;
/// Far more than all the disk's clusters and tables.
const MOST_BYTES: u64 = 1 << 31;

struct Chain {
    image: File,
    backing: Option<(File, bool)>,
    read_only: bool,
}

impl Chain {
    fn open(&self) -> Option<Disk> {
        let backing = self.backing.iter().map(|(file, is_qcow2)| Backing {
            file: file.try_clone().unwrap(),
            is_qcow2: *is_qcow2,
        });
        let image = self.image.try_clone().unwrap();
        match Disk::with_format(image, Format::Qcow2(backing.collect()), self.read_only) {
            Ok(disk) => Some(disk),
            Err(error) => {
                assert!(!error.to_string().is_empty());
                None
            }
        }
    }
}

pub fn qcow2(data: &[u8]) {
    crate::log_to_nowhere();
    let _ = run(&mut Input::new(data));
}

fn run(input: &mut Input) -> Option<()> {
    let flags = input.u8()?;
    let cluster_bits = [9, 10, 12, 16][usize::from(flags & 3)];
    let is_whole = flags & 0x40 != 0;
    let name = (flags & 4 != 0).then_some("elsewhere");
    let blank = |size, backing| file(&Blank { cluster_bits, size, backing }.bytes());
    let backing = match (flags & 8 != 0, flags & 0x10 != 0) {
        (false, _) => None,
        (true, false) => Some((file(&vec![BACKING_BYTE; BACKING_BYTES as usize]), false)),
        (true, true) => Some((blank(DISK_BYTES, None), true)),
    };
    let image = if is_whole {
        let len = usize::from(input.u16()?);
        let rest = input.rest();
        let (image, rest) = rest.split_at(len.min(rest.len()));
        *input = Input::new(rest);
        file(image)
    } else {
        blank(DISK_BYTES, name)
    };
    let mut is_well = !is_whole;
    let patches = if is_whole { 0 } else { input.u8()? % 32 };
    for _ in 0..patches {
        is_well = false;
        patch(&image, input)?;
    }
    let chain = Chain { image, backing, read_only: flags & 0x20 != 0 };
    let mut disk = chain.open();
    if is_well {
        assert_eq!(disk.is_some(), name.is_some() == chain.backing.is_some());
    }
    // What the disk must be, as far as it is known.
    let mut model = vec![Some(0); DISK_BYTES as usize];
    if let Some((_, false)) = chain.backing {
        model[..BACKING_BYTES as usize].fill(Some(BACKING_BYTE));
    }
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
    loop {
        let (kind, at, len) = (input.u8()?, input.u16()?, input.u8()?);
        let now = disk.take()?;
        let size = now.bytes() / SECTOR_BYTES * SECTOR_BYTES;
        // From both ends: an image may be of any size.
        let back = u64::from(at) * SECTOR_BYTES;
        let offset = if kind & 0x80 != 0 { size.saturating_sub(back) } else { back.min(size) };
        let len = (u64::from(len) * SECTOR_BYTES).min(size - offset).min(RAM as u64);
        let range = Extent { offset, len };
        let place = offset as usize..(offset + len) as usize;
        let buffers = Segments::new(vec![Segment { address: GuestAddress(0), len: len as u32 }]);
        match kind & 0x0f {
            0 | 1 => {
                let done = now.perform(&ram, &Operation::Read { offset, buffers });
                if is_well {
                    done.unwrap();
                    let mut found = vec![0; len as usize];
                    ram.read_slice(&mut found, GuestAddress(0)).unwrap();
                    let expected = &model[place];
                    assert!(expected.iter().zip(found).all(|(one, other)| one.is_none_or(|one| one == other)));
                }
            }
            2..=4 => {
                let value = kind ^ at as u8;
                ram.write_slice(&vec![value; len as usize], GuestAddress(0)).unwrap();
                let done = now.perform(&ram, &Operation::Write { offset, buffers });
                expect(is_well, chain.read_only, &done, &mut model, place, Some(value));
            }
            5 => {
                let done = now.perform(&ram, &Operation::Discard(vec![range]));
                expect(is_well, chain.read_only, &done, &mut model, place, None);
            }
            kind @ 6..=7 => {
                let done = now.perform(&ram, &Operation::WriteZeroes { range, unmap: kind == 7 });
                expect(is_well, chain.read_only, &done, &mut model, place, Some(0));
            }
            8 => {
                let done = now.perform(&ram, &Operation::Flush);
                assert!(!is_well || done.is_ok());
            }
            9 => {
                let done = now.settle();
                assert!(!is_well || done.is_ok());
                drop(now);
                disk = chain.open();
                assert!(!is_well || disk.is_some());
                continue;
            }
            10 => {
                is_well = false;
                patch(&chain.image, input)?;
            }
            _ => {}
        }
        assert!(chain.image.metadata().unwrap().len() < MOST_BYTES);
        disk = Some(now);
    }
}

fn expect(
    is_well: bool,
    read_only: bool,
    done: &std::io::Result<()>,
    model: &mut [Option<u8>],
    place: std::ops::Range<usize>,
    value: Option<u8>,
) {
    if is_well && !read_only {
        done.as_ref().unwrap();
        model[place].fill(value);
    }
}

/// Any bytes anywhere, or a number where numbers are.
fn patch(image: &File, input: &mut Input) -> Option<()> {
    let (at, width) = (input.u16()?, input.u8()?);
    let at = u64::from(at);
    match width {
        0..128 => image.write_all_at(&[width], at),
        128..192 => image.write_all_at(&input.u64()?.to_be_bytes(), at & !7),
        // A cluster of the image.
        _ => image.write_all_at(&(u64::from(input.u8()?) << 9 | u64::from(width & 1) << 63).to_be_bytes(), at & !7),
    }
    .unwrap();
    Some(())
}

fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}
