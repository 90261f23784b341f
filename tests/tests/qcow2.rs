//! A qcow2 image is a disk like any other: to the guest, and to `qemu-img`, which finds nothing wrong with what was written.
//! Only the images that the configuration lists are behind it, and they are not written.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use api_socket::{BackingFile, CacheType, DiskFormat, Drive, DriveUpdate, IoEngine, Request};
use berth_tests::footprint::Footprint;
use berth_tests::guest::setup::disk_drive;
use berth_tests::guest::{Guest, Name, Setup, asset, blank_disk, debian_drive, limits, times};
use berth_tests::host::provide;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// `qemu-img check`: nothing is wrong; clusters are in use that nothing names.
const CLEAN: i32 = 0;
const LEAKS: i32 = 3;

/// Images that outlive their guests.
struct Images(TempDir);

impl Images {
    fn new() -> Images {
        Images(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A qcow2 image of so many bytes; with options of `qemu-img create`.
    fn create(&self, name: &str, bytes: u64, options: &[&str]) -> PathBuf {
        let path = self.path(name);
        qemu_img(&["create", "-q", "-f", "qcow2"], options, &[path.as_path(), Path::new(&bytes.to_string())]);
        path
    }

    /// An image that names another one.
    fn overlay(&self, name: &str, base: &Path, format: &str) -> PathBuf {
        let path = self.path(name);
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", format], &["-b"], &[base, &path]);
        path
    }
}

fn qemu_img(first: &[&str], more: &[&str], paths: &[&Path]) {
    let status = Command::new("qemu-img").args(first).args(more).args(paths).status().unwrap();
    assert!(status.success(), "qemu-img {first:?} {more:?} {paths:?}");
}

/// What `qemu-img check` ends with.
fn check(path: &Path) -> i32 {
    let output = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path).output().unwrap();
    println!("{}", String::from_utf8_lossy(&output.stdout));
    output.status.code().unwrap()
}

/// Both have the same content.
fn same(one: &Path, format: &str, other: &Path, other_format: &str) -> bool {
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-q", "-f", format, "-F", other_format]).arg(one).arg(other);
    compare.status().unwrap().success()
}

fn qcow2(id: &str, path: &Path) -> Drive {
    Drive { format: Some(DiskFormat::Qcow2), ..disk_drive(id, path.to_owned()) }
}

fn behind(path: &Path, format: DiskFormat) -> BackingFile {
    BackingFile { path_on_host: path.to_owned(), format }
}

fn with(drives: Vec<Drive>) -> Setup {
    Setup { drives, ..Setup::default() }
}

fn allocated(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    // In the file system's books only when written.
    file.sync_all().unwrap();
    file.metadata().unwrap().blocks() * 512
}

#[test]
fn a_file_system_on_it_is_clean_and_the_same_as_on_its_raw_twin() {
    file_system_is_clean(Name::Berth);
}

#[test]
fn a_file_system_on_it_is_clean_and_the_same_as_on_its_raw_twin_without_pci() {
    file_system_is_clean(Name::Firecracker);
}

fn file_system_is_clean(name: Name) {
    let images = Images::new();
    let image = images.create("image", 64 * MIB, &[]);
    let twin = blank_disk(images.path("twin"), 64 * MIB);
    let mut guest =
        Guest::booted(Setup { name, ..with(vec![qcow2("image", &image), disk_drive("twin", twin.clone())]) });
    assert_eq!(guest.number("blockdev --getsize64 /dev/vda"), 64 * MIB);
    guest.run("mke2fs /dev/vda > /dev/null; mkdir /mnt; mount -t ext4 /dev/vda /mnt");
    guest.run("dd if=/dev/urandom of=/mnt/file bs=1M count=16; mkdir /mnt/d; cp /mnt/file /mnt/d/copy");
    guest.run("rm /mnt/file; sync; fstrim /mnt; umount /mnt");
    guest.run("dd if=/dev/vda of=/dev/vdb bs=1M conv=fsync");
    guest.power_off();
    assert_eq!(check(&image), CLEAN);
    assert!(same(&image, "qcow2", &twin, "raw"));
    assert!(fs::metadata(&image).unwrap().len() < 48 * MIB, "only what was written is in the file");
}

#[test]
fn a_chain_of_images_is_read_through_and_only_the_first_is_written() {
    let images = Images::new();
    let base = images.path("base");
    fs::write(&base, vec![b'b'; 8 * MIB as usize]).unwrap();
    let middle = images.overlay("middle", &base, "raw");
    qemu_io(&middle, "write -P 0x6d 1M 1M");
    let top = images.overlay("top", &middle, "qcow2");
    let before = [fs::read(&base).unwrap(), fs::read(&middle).unwrap()];
    let backing = vec![behind(&middle, DiskFormat::Qcow2), behind(&base, DiskFormat::Raw)];
    let drive = Drive { backing, ..qcow2("top", &top) };
    let mut guest = Guest::booted(with(vec![drive.clone()]));
    let letter = |mib: u64| format!("dd if=/dev/vda bs=1M skip={mib} count=1 2> /dev/null | head -c 1");
    assert_eq!(guest.run(&letter(0)) + &guest.run(&letter(1)) + &guest.run(&letter(7)), "bmb");
    guest.run("printf t | dd of=/dev/vda bs=1M seek=1 conv=fsync; printf t | dd of=/dev/vda bs=1M seek=7 conv=fsync");
    guest.run("blkdiscard -o 2097152 -l 1048576 /dev/vda");
    guest.power_off();
    assert_eq!(check(&top), CLEAN);
    assert!(before == [fs::read(&base).unwrap(), fs::read(&middle).unwrap()]);
    let mut guest = Guest::booted(with(vec![drive]));
    assert_eq!(
        guest.run(
            "for at in 0 1 2 7; do dd if=/dev/vda bs=1M skip=$at count=1 2> /dev/null | head -c 2; done"
        ),
        "bbtmbbtb"
    );
    guest.power_off();
}

fn qemu_io(image: &Path, command: &str) {
    let mut run = Command::new("qemu-io");
    let output = run.args(["-f", "qcow2", "-c", command]).arg(image).output().unwrap();
    assert!(output.status.success(), "{command}: {output:?}");
}

#[test]
fn a_vmm_that_is_killed_loses_nothing_that_was_flushed_and_leaves_an_image_without_errors() {
    for round in 0..times(2, 50) {
        let images = Images::new();
        let image = images.create("image", 64 * MIB, &[]);
        let cache_type = [CacheType::Writeback, CacheType::Writethrough][round as usize % 2];
        let drive = Drive { cache_type, ..qcow2("image", &image) };
        let mut guest = Guest::booted(with(vec![drive.clone()]));
        guest.run("mke2fs /dev/vda > /dev/null; mkdir /mnt; mount -t ext4 /dev/vda /mnt");
        guest.run("dd if=/dev/urandom of=/mnt/kept bs=1M count=4 conv=fsync; sync");
        let sum = guest.run("md5sum /mnt/kept");
        guest.say("while :; do dd if=/dev/urandom of=/mnt/lost bs=64k count=16 conv=fsync; done");
        std::thread::sleep(Duration::from_millis(round as u64 * 137 % 1000));
        guest.vmm.kill();
        assert!([CLEAN, LEAKS].contains(&check(&image)));

        let mut guest = Guest::booted(with(vec![drive]));
        guest.run("mkdir /mnt; mount -t ext4 /dev/vda /mnt");
        assert_eq!(guest.run("md5sum /mnt/kept"), sum);
        guest.run("dd if=/dev/urandom of=/mnt/more bs=1M count=4 conv=fsync");
        guest.power_off();
        assert!([CLEAN, LEAKS].contains(&check(&image)));
    }
}

/// Without flushes too: what the guest was told is written is in the file, and not in this process alone.
#[test]
fn a_killed_vmm_loses_nothing_of_an_unsafe_drive() {
    let images = Images::new();
    let image = images.create("image", 32 * MIB, &[]);
    let drive = Drive { cache_type: CacheType::Unsafe, ..qcow2("image", &image) };
    let mut guest = Guest::booted(with(vec![drive.clone()]));
    guest.run("head -c 8388608 /dev/urandom > /run/kept && dd if=/run/kept of=/dev/vda bs=1M oflag=direct");
    let sum = guest.run("md5sum < /run/kept");
    guest.vmm.kill();
    assert!([CLEAN, LEAKS].contains(&check(&image)));
    let mut guest = Guest::booted(with(vec![drive]));
    assert_eq!(guest.run("head -c 8388608 /dev/vda | md5sum"), sum);
    guest.power_off();
}

#[test]
fn a_discard_gives_space_back_to_the_host_and_reads_as_zeros() {
    discard_gives_back(Name::Berth);
}

#[test]
fn a_discard_gives_space_back_to_the_host_and_reads_as_zeros_without_pci() {
    discard_gives_back(Name::Firecracker);
}

fn discard_gives_back(name: Name) {
    let images = Images::new();
    let image = images.create("image", 32 * MIB, &[]);
    let mut guest = Guest::booted(Setup { name, ..with(vec![qcow2("image", &image)]) });
    guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=32 conv=fsync");
    let full = allocated(&image);
    guest.run("blkdiscard -o 8388608 -l 16777216 /dev/vda; sync");
    let left = allocated(&image);
    assert!(full >= 32 * MIB && left <= full - 15 * MIB, "{full} bytes before, {left} after");
    guest.run("[ -z \"$(dd if=/dev/vda bs=1M skip=8 count=16 2> /dev/null | tr -d '\\0')\" ]");
    // There is room for this in the file.
    let len = fs::metadata(&image).unwrap().len();
    guest.run("dd if=/dev/urandom of=/dev/vda bs=1M seek=8 count=8 conv=fsync");
    assert_eq!(fs::metadata(&image).unwrap().len(), len);
    guest.power_off();
    assert_eq!(check(&image), CLEAN);
}

#[test]
fn a_full_host_is_an_error_of_the_guest_s_disk_and_nothing_else_breaks() {
    let images = Images::new();
    let small = images.path("small");
    fs::create_dir(&small).unwrap();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "none"]).arg(&small).status();
    assert!(mount.unwrap().success());
    let image = images.create("small/image", 32 * MIB, &[]);
    let mut guest = Guest::booted(with(vec![qcow2("image", &image)]));
    guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=2 conv=fsync");
    let sum = guest.run("head -c 2097152 /dev/vda | md5sum");
    let output = guest.shell("dd if=/dev/urandom of=/dev/vda bs=1M seek=4 count=24 conv=fsync");
    assert_ne!(output.code, 0, "{}", output.text);
    // Data first, or tables: either is told once, however often it is tried, and nothing is told but that.
    guest.shell(
        "for at in $(seq 4 31); do dd if=/dev/urandom of=/dev/vda bs=1M seek=$at count=1 conv=fsync; done",
    );
    let log = guest.vmm.log();
    let device = |line: &&str| line.contains("block device image: ");
    let full = |line: &&str| line.contains("No space left on device") && !line.contains(" more: ");
    assert!((1..=2).contains(&log.lines().filter(device).filter(full).count()), "{log}");
    assert!(log.lines().filter(device).count() < 10, "{log}");
    guest.run("echo 3 > /proc/sys/vm/drop_caches");
    assert_eq!(guest.run("head -c 2097152 /dev/vda | md5sum"), sum);
    // What is given back can be written again.
    guest.run("blkdiscard -o 4194304 -l 8388608 /dev/vda");
    guest.run("dd if=/dev/urandom of=/dev/vda bs=1M seek=2 count=1 conv=fsync");
    guest.power_off();
    let result = check(&image);
    let umount = Command::new("umount").arg(&small).status();
    assert!(umount.unwrap().success());
    assert!([CLEAN, LEAKS].contains(&result));
}

#[test]
fn it_verifies_under_random_writes_of_all_sizes_with_an_image_behind_it_and_without() {
    verifies(Name::Berth);
}

#[test]
fn it_verifies_under_random_writes_of_all_sizes_with_an_image_behind_it_and_without_without_pci() {
    verifies(Name::Firecracker);
}

fn verifies(name: Name) {
    let images = Images::new();
    let base = images.path("base");
    fs::write(&base, vec![0x55; 48 * MIB as usize]).unwrap();
    let alone = images.create("alone", 48 * MIB, &["-o", "cluster_size=4k"]);
    let over = images.overlay("over", &base, "raw");
    let over_drive = Drive { backing: vec![behind(&base, DiskFormat::Raw)], ..qcow2("over", &over) };
    let drives = vec![debian_drive(), qcow2("alone", &alone), over_drive];
    let mut guest = Guest::booted(Setup { name, drives, memory_mib: 256, vcpus: 2, ..Setup::default() });
    guest.mount_debian();
    for disk in ["vdb", "vdc"] {
        guest.run(&format!(
            "chroot /debian fio --name=disk --filename=/dev/{disk} --direct=1 --rw=randrw --bsrange=512-256k --fsync=50 \
             --ioengine=libaio --iodepth=16 --size=48m --io_size=24m --verify=crc32c --verify_fatal=1 --randrepeat=0",
        ));
    }
    guest.power_off();
    assert_eq!((check(&alone), check(&over)), (CLEAN, CLEAN));
}

#[test]
fn it_is_replaced_by_another_image_and_plugged_in_and_out() {
    let images = Images::new();
    let base = images.path("base");
    fs::write(&base, vec![b'b'; MIB as usize]).unwrap();
    let [first, second, third] = ["first", "second", "third"].map(|name| images.overlay(name, &base, "raw"));
    qemu_io(&second, "write -P 0x73 0 4k");
    let backing = vec![behind(&base, DiskFormat::Raw)];
    let drive = Drive { backing, ..qcow2("disk", &first) };
    let mut guest = Guest::booted(with(vec![drive.clone()]));
    assert_eq!(guest.run("head -c 2 /dev/vda"), "bb");
    let patch = |path: &Path| {
        let path_on_host = Some(path.to_owned());
        Request::PatchDrive(DriveUpdate { drive_id: "disk".into(), path_on_host, rate_limiter: None })
    };
    guest.apply(patch(&second));
    assert_eq!(
        guest.run("head -c 2 /dev/vda; dd if=/dev/vda bs=4k skip=1 count=1 2> /dev/null | head -c 2"),
        "ssbb"
    );
    let message = guest.api.apply(&patch(&base)).unwrap_err().to_string();
    assert!(message.contains("no qcow2 image"), "{message}");
    assert_eq!(guest.run("head -c 2 /dev/vda"), "ss");

    let other = Drive { drive_id: "other".into(), path_on_host: Some(third.clone()), ..drive };
    guest.apply(Request::PutDrive(other));
    guest.run("until [ -b /dev/vdb ]; do sleep 0.1; done; printf new | dd of=/dev/vdb conv=fsync");
    assert_eq!(guest.run("head -c 4 /dev/vdb"), "newb");
    guest.apply(Request::DeleteDrive("other".into()));
    guest.run("while [ -e /sys/block/vdb ]; do sleep 0.1; done");
    guest.power_off();
    assert_eq!((check(&first), check(&second), check(&third)), (CLEAN, CLEAN, CLEAN));
    let mut bytes = [0; 4];
    File::open(&third).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"QFI\xfb");
}

#[test]
fn what_an_image_cannot_be_is_refused_with_the_reason() {
    let images = Images::new();
    let base = blank_disk(images.path("base"), MIB);
    let plain = images.create("plain", MIB, &[]);
    let over = images.overlay("over", &base, "raw");
    let old = images.create("old", MIB, &["-o", "compat=0.10"]);
    let dirty = images.create("dirty", MIB, &[]);
    File::options().write(true).open(&dirty).unwrap().write_all_at(&[1], 79).unwrap();
    let extended = images.create("extended", MIB, &["-o", "extended_l2=on"]);
    let data = images.path("data");
    let outside = images.create("outside", MIB, &["-o", &format!("data_file={}", data.display())]);
    let zstd = images.create("zstd", MIB, &["-o", "compression_type=zstd"]);
    let mut guest = Guest::configured(Setup::default());
    let over_base =
        |path: &Path| Drive { backing: vec![behind(&base, DiskFormat::Raw)], ..qcow2("disk", path) };
    let raw = |path: &Path| Drive { format: None, ..over_base(path) };
    let ring = Drive { io_engine: Some(IoEngine::Async), ..qcow2("disk", &plain) };
    for (drive, words) in [
        (qcow2("disk", &over), ["`path_on_host` is", "`backing`"]),
        (over_base(&plain), ["`backing[0]`", "no backing file"]),
        (raw(&plain), ["`backing` is set", "Raw"]),
        (ring, ["`io_engine` is Async", "Qcow2"]),
        (qcow2("disk", &base), ["no qcow2 image", "`format`"]),
        (qcow2("disk", &old), ["version 2", "compat=1.1"]),
        (qcow2("disk", &dirty), ["not closed", "qemu-img check"]),
        (qcow2("disk", &extended), ["extended L2", "convert"]),
        (qcow2("disk", &outside), ["another file", "convert"]),
        (qcow2("disk", &zstd), ["zlib", "convert"]),
    ] {
        let message = guest.api.apply(&Request::PutDrive(drive)).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "{word:?} is not in: {message}");
        }
    }
    guest.vmm.kill();
}

/// Compressed clusters are read, and written as what they are not any more.
#[test]
fn a_compressed_image_with_a_snapshot_is_read_and_written() {
    let images = Images::new();
    let raw = images.path("raw");
    let mut file = File::create(&raw).unwrap();
    for mib in 0..8_u8 {
        file.write_all(&vec![b'a' + mib; MIB as usize]).unwrap();
    }
    let image = images.path("image");
    qemu_img(&["convert", "-q", "-f", "raw", "-O", "qcow2"], &["-c"], &[&raw, &image]);
    qemu_img(&["snapshot"], &["-c", "before"], &[&image]);
    let mut guest = Guest::booted(with(vec![qcow2("image", &image)]));
    assert_eq!(guest.run("md5sum < /dev/vda"), md5(&raw));
    guest.run("printf written | dd of=/dev/vda bs=1000k seek=3 conv=fsync,notrunc");
    File::options().write(true).open(&raw).unwrap().write_all_at(b"written", 3000 << 10).unwrap();
    guest.run("echo 3 > /proc/sys/vm/drop_caches");
    let read = guest.run("md5sum < /dev/vda");
    guest.power_off();
    assert_eq!(read, md5(&raw));
    assert_eq!(check(&image), CLEAN);
    assert!(same(&image, "qcow2", &raw, "raw"));
}

fn md5(path: &Path) -> String {
    let mut bytes = Vec::new();
    File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
    berth_tests::guest::md5(&bytes)
}

/// Written here and there: the tables for it would take 25 MiB.
#[test]
fn a_large_disk_takes_no_more_of_the_host_s_memory_than_its_tables_may() {
    const MAX_GROWTH_KIB: u64 = 14 << 10;
    let images = Images::new();
    let image = images.create("image", 512 << 30, &[]);
    let mut guest = Guest::booted(with(vec![qcow2("image", &image)]));
    let beyond = |guest: &Guest| Footprint::beyond_guest(guest.vmm.pid(), guest.setup().memory_mib).unwrap();
    // A table is for 512 MiB.
    let write = |first: u32, last: u32| {
        format!(
            "for at in $(seq {first} {last}); do printf x | dd of=/dev/vda bs=64k seek=$((at * 8192)) conv=sync \
             2> /dev/null || exit 1; done; sync"
        )
    };
    guest.run(&write(0, 1));
    let before = beyond(&guest);
    for first in (2..402).step_by(100) {
        guest.run(&write(first, first + 99));
    }
    let after = beyond(&guest);
    println!("{before}; afterwards {after}");
    assert!(after.rss_kib <= before.rss_kib + MAX_GROWTH_KIB, "{before}; afterwards {after}");
    guest.power_off();
    assert_eq!(check(&image), CLEAN);
}

#[test]
fn debian_boots_from_an_overlay_on_a_shared_image() {
    let images = Images::new();
    let base = asset(provide::DEBIAN);
    let root = images.overlay("root", &base, "raw");
    let drive = Drive { backing: vec![behind(&base, DiskFormat::Raw)], ..qcow2("root", &root) };
    let setup = || Setup { drives: vec![drive.clone()], entropy: true, ..Setup::debian(root.clone()) };
    let mut guest = Guest::logged_in(setup());
    assert_eq!(guest.run("systemctl list-units --failed --no-legend --plain --no-pager"), "");
    guest.run("echo kept > /root/file; sync");
    guest.say("systemctl poweroff");
    assert_eq!(guest.vmm.ended(limits::DEBIAN), berth_tests::guest::Ended::Code(0));
    assert_eq!(check(&root), CLEAN);
}
