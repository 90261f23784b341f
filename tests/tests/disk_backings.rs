//! A disk is a disk whatever is behind it and whichever way its requests go: an image, a block device of the host, past the
//! host's cache, through several queues; and where the host fails, the guest has an I/O error and the operator a line.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use api_socket::{CacheType, Drive, DriveUpdate, IoEngine, Request};
use berth_tests::guest::block_device::{LoopDevice, Mount};
use berth_tests::guest::setup::disk_drive;
use berth_tests::guest::tap::host;
use berth_tests::guest::{Guest, Name, Setup, blank_disk, debian_drive, limits, times};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const ENGINES: [IoEngine; 2] = [IoEngine::Sync, IoEngine::Async];

/// Every way a disk's requests can go: each engine, cache, direct or not, with one queue and with four.
fn ways(place: &Path) -> Vec<Drive> {
    let mut drives = Vec::new();
    for engine in ENGINES {
        for cache_type in [CacheType::Unsafe, CacheType::Writeback, CacheType::Writethrough] {
            for direct in [None, Some(true)] {
                for queues in [None, Some(4)] {
                    let id = format!("d{}", drives.len());
                    let path = blank_disk(place.join(&id), 4 * MIB);
                    let io_engine = Some(engine);
                    drives.push(Drive { cache_type, io_engine, direct, queues, ..disk_drive(&id, path) });
                }
            }
        }
    }
    drives
}

/// The guest's name of the disk with this number, beside the Debian one.
fn name(number: usize) -> String {
    format!("vd{}", char::from(b'b' + number as u8))
}

#[test]
fn every_way_to_a_disk_verifies_under_random_writes_of_all_sizes() {
    let place = tempfile::tempdir().unwrap();
    verify(Name::Berth, &ways(place.path()), "1m");
}

#[test]
fn every_way_to_a_disk_verifies_under_random_writes_of_all_sizes_without_pci() {
    let place = tempfile::tempdir().unwrap();
    let ways = ways(place.path());
    // As many as there is room for at a time. A half has each choice with each other one, and is all that the short form has.
    let (first, second): (Vec<_>, Vec<_>) =
        (0_u32..).zip(&ways).partition(|(number, _)| number.count_ones() % 2 == 0);
    for half in [first, second].into_iter().take(times(1, 2) as usize) {
        let half: Vec<Drive> = half.into_iter().map(|(_, way)| way.clone()).collect();
        let io_size = if times(1, 2) == 1 { "512k" } else { "4m" };
        verify(Name::Firecracker, &half, io_size);
    }
}

fn verify(transport: Name, ways: &[Drive], io_size: &str) {
    let drives = [vec![debian_drive()], ways.to_vec()].concat();
    let setup = Setup { name: transport, vcpus: 4, memory_mib: 384, drives, ..Setup::default() };
    let mut guest = Guest::booted(setup);
    guest.mount_debian();
    for (number, way) in ways.iter().enumerate() {
        let name = name(number);
        assert_eq!(
            guest.number(&format!("ls /sys/block/{name}/mq | wc -l")),
            u64::from(way.queues.unwrap_or(1))
        );
        let cache = guest.run(&format!("cat /sys/block/{name}/queue/write_cache"));
        let expected = if way.cache_type == CacheType::Writeback { "write back" } else { "write through" };
        assert_eq!(cache.trim(), expected, "{way:?}");
    }
    let jobs: Vec<String> = (0..ways.len())
        .map(|number| format!("--name={0} --filename=/dev/{0} --cpus_allowed={1}", name(number), number % 4))
        .collect();
    let fio = format!(
        "chroot /debian fio --direct=1 --rw=randrw --rwmixwrite=75 --bsrange=512-128k --fsync=50 --ioengine=libaio --iodepth=8 --size=4m \
         --io_size={io_size} --verify=crc32c --verify_fatal=1 --randrepeat=0 --thread --minimal {}",
        jobs.join(" ")
    );
    guest.run_within(&fio, 2 * limits::COMMAND);
    guest.power_off();
    for way in ways {
        let bytes = fs::read(way.path_on_host.as_deref().unwrap()).unwrap();
        assert_eq!(bytes.len() as u64, 4 * MIB);
        assert!(bytes.iter().any(|byte| *byte != 0), "{way:?} was never written");
    }
}

/// The flags of all descriptors that a process has of this file.
fn flags(pid: u32, path: &Path) -> Vec<i32> {
    let path = path.canonicalize().unwrap();
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap());
    let of_file = descriptors.filter(|entry| fs::read_link(entry.path()).is_ok_and(|link| link == path));
    let flags = of_file.map(|entry| {
        let name = entry.file_name().into_string().unwrap();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{name}")).unwrap();
        let value = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        i32::from_str_radix(value.trim(), 8).unwrap()
    });
    flags.collect()
}

#[test]
fn a_direct_drive_stays_one_with_another_file() {
    let place = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| blank_disk(place.path().join(name), MIB));
    let drive = |id: &str, path: &PathBuf, engine| Drive {
        direct: Some(true),
        io_engine: Some(engine),
        ..disk_drive(id, path.clone())
    };
    let drives = vec![drive("a", &first, IoEngine::Sync), drive("b", &first, IoEngine::Async)];
    let mut guest = Guest::booted(Setup { drives, ..Setup::default() });
    let is_direct = |guest: &Guest, path: &Path| {
        let flags = flags(guest.vmm.pid(), path);
        assert!(flags.iter().all(|flags| flags & libc::O_DIRECT != 0), "{flags:x?}");
        !flags.is_empty()
    };
    assert!(is_direct(&guest, &first));
    for id in ["a", "b"] {
        let path_on_host = Some(second.clone());
        guest.apply(Request::PatchDrive(DriveUpdate {
            drive_id: id.into(),
            path_on_host,
            rate_limiter: None,
        }));
    }
    assert!(is_direct(&guest, &second) && !is_direct(&guest, &first));
    guest.run("for disk in vda vdb; do echo written | dd of=/dev/$disk bs=512 conv=sync,fsync; done");
    assert_eq!(&fs::read(&second).unwrap()[..7], b"written");
    guest.power_off();
}

/// A file system whose files want blocks of the device's 4096 bytes for direct I/O.
fn large_blocks(device: &LoopDevice, place: &Path) -> Mount {
    let path = device.path().display().to_string();
    host("mke2fs", &["-q", "-t", "ext4", "-O", "^has_journal", &path]);
    Mount::new(&[&path], place.join("mount"))
}

#[test]
fn single_sectors_of_an_image_on_larger_blocks_are_written_past_the_host_s_cache() {
    single_sectors(Name::Berth);
}

#[test]
fn single_sectors_of_an_image_on_larger_blocks_are_written_past_the_host_s_cache_without_pci() {
    single_sectors(Name::Firecracker);
}

fn single_sectors(transport: Name) {
    let place = tempfile::tempdir().unwrap();
    let device = LoopDevice::new(&blank_disk(place.path().join("loop"), 32 * MIB), 4096);
    let mount = large_blocks(&device, place.path());
    let drives: Vec<Drive> = ENGINES
        .map(|engine| {
            let id = format!("{engine:?}");
            let path = mount.path().join(&id);
            fs::write(&path, vec![b'.'; MIB as usize]).unwrap();
            Drive { direct: Some(true), io_engine: Some(engine), ..disk_drive(&id, path) }
        })
        .into();
    let all = [vec![debian_drive()], drives.clone()].concat();
    let mut guest =
        Guest::booted(Setup { name: transport, drives: all, memory_mib: 256, ..Setup::default() });
    guest.mount_debian();
    for (number, drive) in drives.iter().enumerate() {
        let name = name(number);
        let queue = |what: &str| format!("cat /sys/block/{name}/queue/{what}");
        // What counts partitions stays the sector; what file systems are made of is the block.
        assert_eq!(guest.number(&queue("logical_block_size")), 512);
        assert_eq!(guest.number(&queue("physical_block_size")), 4096);
        let dd = |options: &str| {
            format!(
                "yes x | tr -d '\\n' | chroot /debian dd of=/dev/{name} iflag=fullblock oflag=direct {options}"
            )
        };
        guest.run(&dd("bs=512 seek=3 count=2"));
        guest.run(&dd("bs=4096 seek=4 count=2"));
        guest.run(&dd("bs=1536 seek=21 count=1"));
        assert_eq!(
            guest.run(&format!("dd if=/dev/{name} bs=512 skip=3 count=3 2> /dev/null | tr -d x | wc -c")),
            "512\n"
        );
        let bytes = fs::read(drive.path_on_host.as_deref().unwrap()).unwrap();
        let written = [1536..2560, 16384..24576, 32256..33792];
        for (at, byte) in bytes.iter().enumerate() {
            let expected = if written.iter().any(|range| range.contains(&at)) { b'x' } else { b'.' };
            assert_eq!(*byte, expected, "byte {at} of {drive:?}");
        }
    }
    guest.run(&format!(
        "chroot /debian fio --direct=1 --rw=randrw --bsrange=512-32k --ioengine=libaio --iodepth=8 --size=1m --verify=crc32c \
         --verify_fatal=1 --thread --minimal --name={0} --filename=/dev/{0} --name={1} --filename=/dev/{1}",
        name(0),
        name(1)
    ));
    guest.power_off();
}

/// Bytes that the host's file system keeps for a file.
fn allocated(path: &Path) -> u64 {
    File::open(path).unwrap().sync_all().unwrap();
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn a_block_device_of_the_host_is_a_disk_that_is_also_discarded_and_zeroed() {
    let place = tempfile::tempdir().unwrap();
    let kinds = [
        (512, IoEngine::Sync, None),
        (4096, IoEngine::Async, Some(true)),
        (4096, IoEngine::Sync, Some(true)),
    ];
    let disks: Vec<(PathBuf, LoopDevice, Drive)> = (0..)
        .zip(kinds)
        .map(|(number, (block, engine, direct))| {
            let file = blank_disk(place.path().join(number.to_string()), 16 * MIB);
            let device = LoopDevice::new(&file, block);
            let drive = disk_drive(&format!("d{number}"), device.path().into());
            (file, device, Drive { io_engine: Some(engine), direct, ..drive })
        })
        .collect();
    let drives = std::iter::once(debian_drive()).chain(disks.iter().map(|(_, _, drive)| drive.clone()));
    let setup = Setup { drives: drives.collect(), memory_mib: 256, ..Setup::default() };
    let mut guest = Guest::booted(setup);
    guest.mount_debian();
    for (number, ((file, ..), (block, _, direct))) in disks.iter().zip(kinds).enumerate() {
        let name = name(number);
        // A direct one has the device's blocks.
        let expected = if direct.is_some() { block } else { 512 };
        assert_eq!(
            guest.number(&format!("cat /sys/block/{name}/queue/logical_block_size")),
            u64::from(expected)
        );
        assert_eq!(guest.number(&format!("blockdev --getsize64 /dev/{name}")), 16 * MIB);
        guest.run(&format!("dd if=/dev/urandom of=/dev/{name} bs=1M count=16 conv=fsync"));
        let sum = guest.run(&format!("md5sum < /dev/{name}"));
        host("sync", &[]);
        let full = allocated(file);
        assert_eq!(sum, berth_tests::guest::md5(&fs::read(file).unwrap()));
        guest.run(&format!("blkdiscard -o 4194304 -l 4194304 /dev/{name}"));
        guest.run(&format!("chroot /debian /sbin/blkdiscard -z -o 12582912 -l 2097152 /dev/{name}; sync"));
        let left = allocated(file);
        assert!(full >= 16 * MIB && left <= full - 4 * MIB, "{full} bytes before, {left} after");
        let bytes = fs::read(file).unwrap();
        let zeroes = bytes.chunks(MIB as usize).map(|part| part.iter().all(|byte| *byte == 0));
        let expected = (0..16).map(|mib| (4..8).contains(&mib) || (12..14).contains(&mib));
        assert_eq!(zeroes.collect::<Vec<_>>(), expected.collect::<Vec<_>>(), "{name}");
    }
    guest.power_off();
}

/// The lines of the VMM's log that have all these words.
fn lines(guest: &Guest, words: &[&str]) -> usize {
    guest.vmm.log().lines().filter(|line| words.iter().all(|word| line.contains(word))).count()
}

fn with_metrics(drives: Vec<Drive>) -> Setup {
    let arguments = ["--metrics-path", "metrics"].map(String::from).into();
    Setup { drives, arguments, ..Setup::default() }
}

#[test]
fn a_host_without_space_is_an_i_o_error_for_the_guest_and_a_line_for_the_operator() {
    host_without_space(Name::Berth);
}

#[test]
fn a_host_without_space_is_an_i_o_error_for_the_guest_and_a_line_for_the_operator_without_pci() {
    host_without_space(Name::Firecracker);
}

fn host_without_space(transport: Name) {
    let place: TempDir = tempfile::tempdir().unwrap();
    let mount = Mount::new(&["-t", "tmpfs", "-o", "size=4m", "tmpfs"], place.path().join("mount"));
    let drives = ENGINES.map(|engine| {
        let path = blank_disk(mount.path().join(format!("{engine:?}")), 16 * MIB);
        Drive { io_engine: Some(engine), ..disk_drive(&format!("{engine:?}"), path) }
    });
    let mut guest = Guest::booted(Setup { name: transport, ..with_metrics(drives.into()) });
    for (id, disk) in [("Sync", "vda"), ("Async", "vdb")] {
        let fill = format!("dd if=/dev/zero of=/dev/{disk} bs=64k count=256 conv=fsync");
        assert_ne!(guest.shell(&fill).code, 0);
        let device = format!("block device {id}: ");
        let full = [&device[..], "writing at sector", "No space left on device"];
        assert_eq!(lines(&guest, &full), 1, "{}", guest.vmm.log());
        assert!(guest.metric(&format!("block_{id}"), "execute_fails") > 1);
        // It reads on.
        guest.run(&format!("dd if=/dev/{disk} of=/dev/null bs=4k count=1"));
        // Makes room, and time for the trouble to be over.
        mount.remount("size=64m");
        std::thread::sleep(Duration::from_secs(6));
        guest.run(&fill);
        assert_eq!(lines(&guest, &[&device, "writing works again", "more"]), 1);
        assert_eq!(lines(&guest, &full), 1);
        host(
            "fallocate",
            &[
                "--punch-hole",
                "--offset",
                "0",
                "--length",
                "16777216",
                &mount.path().join(id).display().to_string(),
            ],
        );
        mount.remount("size=4m");
    }
    guest.power_off();
}

#[test]
fn a_block_device_that_fails_is_an_i_o_error_for_the_guest_and_a_line_for_the_operator() {
    block_device_fails(Name::Berth);
}

#[test]
fn a_block_device_that_fails_is_an_i_o_error_for_the_guest_and_a_line_for_the_operator_without_pci() {
    block_device_fails(Name::Firecracker);
}

fn block_device_fails(transport: Name) {
    let place = tempfile::tempdir().unwrap();
    let file = blank_disk(place.path().join("file"), 8 * MIB);
    File::options().write(true).open(&file).unwrap().write_all_at(b"first", 0).unwrap();
    let device = LoopDevice::failing_at_end(&file, 512);
    let drives = ENGINES.map(|engine| Drive {
        io_engine: Some(engine),
        direct: Some(true),
        ..disk_drive(&format!("{engine:?}"), device.path().into())
    });
    let mut guest = Guest::booted(Setup { name: transport, ..with_metrics(drives.into()) });
    // What was behind its end is gone.
    File::options().write(true).open(&file).unwrap().set_len(MIB).unwrap();
    for (id, disk) in [("Sync", "vda"), ("Async", "vdb")] {
        assert_eq!(guest.run(&format!("head -c 5 /dev/{disk}")), "first");
        for at in 2..8 {
            assert_ne!(
                guest.shell(&format!("dd if=/dev/{disk} of=/dev/null bs=1M skip={at} count=1")).code,
                0
            );
        }
        assert_eq!(
            lines(&guest, &[&format!("block device {id}: reading at sector")]),
            1,
            "{}",
            guest.vmm.log()
        );
        assert!(guest.metric(&format!("block_{id}"), "execute_fails") >= 6);
    }
    assert_eq!(lines(&guest, &["Input/output error"]), 2);
    guest.pause();
    assert_eq!(lines(&guest, &["more: reading"]), 2, "what was not told is told when it is stopped");
    guest.resume();
    guest.power_off();
}

#[test]
fn every_way_to_a_disk_works_without_pci() {
    let place = tempfile::tempdir().unwrap();
    // As many as there is room for.
    let drives: Vec<Drive> = ways(place.path()).into_iter().rev().take(16).collect();
    let paths: Vec<PathBuf> = drives.iter().filter_map(|drive| drive.path_on_host.clone()).collect();
    let setup = Setup { name: Name::Firecracker, vcpus: 2, drives, ..Setup::default() };
    let mut guest = Guest::booted(setup);
    guest.run("for disk in /dev/vd?; do echo written | dd of=$disk bs=512 conv=sync,fsync; done");
    for path in paths {
        assert_eq!(&fs::read(&path).unwrap()[..7], b"written", "{path:?}");
    }
    guest.power_off();
}
