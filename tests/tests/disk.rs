//! A disk is what a disk must be: what was written is there after a reboot, what was flushed is there after a crash, a
//! read-only one is not written, and every sector of an odd file is in its place.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use api_socket::{CacheType, DiskFormat, Drive, HugePages, IoEngine, Pmem};
use berth_tests::guest::block_device::LoopDevice;
use berth_tests::guest::huge_pages;
use berth_tests::guest::setup::disk_drive;
use berth_tests::guest::storage_daemon::StorageDaemon;
use berth_tests::guest::tap::host;
use berth_tests::guest::{Ended, Guest, Name, Setup, blank_disk, debian_drive, limits, times};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// A disk that outlives its guests.
struct Disk {
    _directory: TempDir,
    path: PathBuf,
}

impl Disk {
    fn blank(bytes: u64) -> Disk {
        let directory = tempfile::tempdir().unwrap();
        let path = blank_disk(directory.path().join("disk"), bytes);
        Disk { _directory: directory, path }
    }

    fn setup(&self) -> Setup {
        Setup { drives: vec![disk_drive("disk", self.path.clone())], ..Setup::default() }
    }

    fn with(&self, engine: IoEngine) -> Setup {
        let drive = Drive { io_engine: Some(engine), ..disk_drive("disk", self.path.clone()) };
        Setup { drives: vec![drive], ..Setup::default() }
    }

    fn file(&self) -> File {
        File::options().read(true).write(true).open(&self.path).unwrap()
    }

    /// Bytes that the host's file system keeps for it.
    fn allocated(&self) -> u64 {
        // In the file system's books only when written.
        self.file().sync_all().unwrap();
        fs::metadata(&self.path).unwrap().blocks() * 512
    }
}

#[test]
fn a_file_system_survives_the_guest_s_reboot() {
    survives_reboot(Name::Berth);
}

#[test]
fn a_file_system_survives_the_guest_s_reboot_without_pci() {
    survives_reboot(Name::Firecracker);
}

#[test]
fn every_slot_takes_a_disk_that_the_guest_can_read() {
    for (name, slots) in [(Name::Berth, 31), (Name::Firecracker, 18)] {
        let directory = tempfile::tempdir().unwrap();
        let drive = |slot: u64| {
            let path = directory.path().join(format!("d{slot}"));
            fs::write(&path, [slot as u8; 512]).unwrap();
            disk_drive(&format!("d{slot}"), path)
        };
        let drives = (b'A'.into()..).take(slots).map(drive).collect();
        let mut guest = Guest::booted(Setup { name, drives, ..Setup::default() });
        let read =
            guest.run("for disk in /dev/vd? /dev/vd??; do [ ! -b $disk ] || head -c 1 $disk; done; echo");
        let expected: String = (b'A'..).take(slots).map(char::from).collect();
        assert_eq!(read.trim(), expected);
        guest.power_off();
    }
}

#[test]
fn a_disk_has_a_queue_for_each_cpu_and_each_queue_its_interrupt() {
    for name in [Name::Berth, Name::Firecracker] {
        let disk = Disk::blank(MIB);
        let drive = Drive { queues: Some(16), ..disk_drive("disk", disk.path.clone()) };
        let drives = vec![debian_drive(), drive];
        let mut guest = Guest::booted(Setup { name, vcpus: 4, drives, memory_mib: 256, ..Setup::default() });
        guest.mount_debian();
        assert_eq!(guest.number("ls /sys/block/vda/mq | wc -l"), 1);
        assert_eq!(guest.number("ls /sys/block/vdb/mq | wc -l"), 4);
        for cpu in 0..4 {
            let dd = format!("dd if=/dev/zero of=/dev/vdb bs=4k count=10 seek={} oflag=direct", 10 * cpu);
            guest.run(&format!("chroot /debian taskset -c {cpu} {dd}"));
        }
        if name == Name::Berth {
            let interrupts = "awk '/virtio1-req/ { print ($2 + $3 + $4 + $5 > 0) }' /proc/interrupts";
            assert_eq!(guest.run(interrupts), "1\n".repeat(4));
        }
        guest.power_off();
    }
}

fn survives_reboot(name: Name) {
    let disk = Disk::blank(64 * MIB);
    let mut guest = Guest::booted(Setup { name, command_line: "reboot=k".into(), ..disk.setup() });
    guest.run("mke2fs /dev/vda > /dev/null; mkdir /mnt; mount -t ext4 /dev/vda /mnt");
    guest.run("dd if=/dev/urandom of=/mnt/file bs=1M count=8");
    let sum = guest.run("md5sum /mnt/file");
    guest.run("umount /mnt");
    guest.say("reboot -f");
    let code = if name == Name::Berth { 3 } else { 0 };
    assert_eq!(guest.ended(), Ended::Code(code));

    let mut guest = Guest::booted(Setup { name, ..disk.setup() });
    guest.run("mkdir /mnt; mount -t ext4 /dev/vda /mnt");
    assert_eq!(guest.run("md5sum /mnt/file"), sum);
    guest.power_off();
}

/// Each a disk of one guest, in a file.
const WAYS: [(IoEngine, CacheType, Option<bool>, Option<u8>); 8] = [
    (IoEngine::Sync, CacheType::Writeback, None, None),
    (IoEngine::Async, CacheType::Writeback, None, None),
    (IoEngine::Sync, CacheType::Writethrough, None, None),
    (IoEngine::Async, CacheType::Writethrough, None, Some(2)),
    (IoEngine::Sync, CacheType::Writeback, Some(true), Some(2)),
    (IoEngine::Async, CacheType::Writeback, Some(true), Some(2)),
    (IoEngine::Sync, CacheType::Writethrough, Some(true), None),
    (IoEngine::Async, CacheType::Writethrough, Some(true), Some(2)),
];

/// Every way to a disk: those, two images, a block device of the host and a disk that another process serves.
struct Ways {
    drives: Vec<Drive>,
    images: [PathBuf; 2],
    _device: LoopDevice,
    _daemon: StorageDaemon,
    _place: TempDir,
}

impl Ways {
    const SIZE: u64 = 16 * MIB;

    fn new() -> Ways {
        let place = tempfile::tempdir().unwrap();
        let blank = |id: &str| blank_disk(place.path().join(id), Ways::SIZE);
        let file = |(number, way): (usize, (IoEngine, CacheType, Option<bool>, Option<u8>))| {
            let (engine, cache_type, direct, queues) = way;
            let (id, io_engine) = (format!("file{number}"), Some(engine));
            Drive { io_engine, cache_type, direct, queues, ..disk_drive(&id, blank(&id)) }
        };
        let mut drives: Vec<Drive> = WAYS.into_iter().enumerate().map(file).collect();
        let images = ["written_back", "written_through"].map(|id| place.path().join(id));
        for (image, cache_type) in images.iter().zip([CacheType::Writeback, CacheType::Writethrough]) {
            let size = Ways::SIZE.to_string();
            host("qemu-img", &["create", "-q", "-f", "qcow2", image.to_str().unwrap(), &size]);
            let id = image.file_name().unwrap().to_str().unwrap();
            let format = Some(DiskFormat::Qcow2);
            drives.push(Drive { format, cache_type, ..disk_drive(id, image.clone()) });
        }
        let device = LoopDevice::new(&blank("loop"), 512);
        drives.push(disk_drive("device", device.path().into()));
        let daemon = StorageDaemon::blank(Ways::SIZE);
        drives.push(daemon.drive("back_end"));
        Ways { drives, images, _device: device, _daemon: daemon, _place: place }
    }

    fn setup(&self, name: Name) -> Setup {
        let drives = [vec![debian_drive()], self.drives.clone()].concat();
        // Memory that another process has too is faulted in by small pages, if these are not asked for.
        let huge_pages = HugePages::Transparent;
        huge_pages::allow_in_shared_memory();
        Setup { name, vcpus: 2, memory_mib: 256, huge_pages, drives, ..Setup::default() }
    }

    /// A command for each disk, which knows it as `$disk` and its file system as `$at`.
    fn each(&self, what: &str) -> String {
        let disks: String =
            (b'b'..).take(self.drives.len()).map(|letter| format!(" {}", char::from(letter))).collect();
        format!("for disk in{disks}; do at=/debian/mnt/$disk; {what} || exit 1; done")
    }

    fn mount(&self, guest: &mut Guest, before: &str) {
        guest.mount_debian();
        guest.run("mount -t tmpfs tmp /debian/mnt");
        guest.run(&self.each(&format!("{before} mkdir $at && mount -t ext4 /dev/vd$disk $at")));
    }

    /// What fio has written with its checksums, on so many of the disks; `verb` says whether it writes or looks.
    fn fio(&self, verb: &str, disks: usize) -> String {
        let jobs: String = (b'b'..)
            .take(disks)
            .map(char::from)
            .map(|at| format!(" --name={at} --filename=/mnt/{at}/checked"))
            .collect();
        format!(
            "chroot /debian fio --rw=randwrite --bsrange=512-64k --size=512k --direct=1 --end_fsync=1 \
             --verify=crc32c --verify_fatal=1 --verify_state_save=0 --randseed=7 --allrandrepeat=1 --thread --minimal {verb}{jobs}"
        )
    }
}

#[test]
fn a_vmm_that_is_killed_loses_nothing_that_was_flushed() {
    for round in 0..times(1, 50) {
        a_killed_vmm_loses_nothing_flushed(Name::Berth, after(round));
    }
}

#[test]
fn a_vmm_that_is_killed_loses_nothing_that_was_flushed_without_pci() {
    for round in 0..times(1, 50) {
        a_killed_vmm_loses_nothing_flushed(Name::Firecracker, after(round));
    }
}

/// Not at the same moment each time.
fn after(round: u32) -> Duration {
    Duration::from_millis((200 + round * 37 % 500).into())
}

/// The VMM is killed so long after the flush, while the guest writes more.
fn a_killed_vmm_loses_nothing_flushed(name: Name, after: Duration) {
    let ways = Ways::new();
    let mut guest = Guest::booted(ways.setup(name));
    let caches = guest.run("cat /sys/block/vd[bcde]/queue/write_cache");
    assert_eq!(caches, "write back\n".repeat(2) + &"write through\n".repeat(2));
    ways.mount(&mut guest, "mke2fs -b 4096 /dev/vd$disk > /dev/null &&");
    guest.run(&ways.each("dd if=/dev/urandom of=$at/kept bs=1M count=1 conv=fsync"));
    guest.run(&ways.fio("--do_verify=0", ways.drives.len()));
    guest.run("sync");
    let sums = guest.run(&ways.each("md5sum $at/kept"));
    guest.run(
        &ways.each("{ (while :; do dd if=/dev/urandom of=$at/lost bs=1M count=1; done) > /dev/null 2>&1 & }"),
    );
    std::thread::sleep(after);
    guest.vmm.kill();
    for image in &ways.images {
        // 3 is of clusters that nothing names any more.
        let checked =
            Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(image).status().unwrap();
        assert!(matches!(checked.code(), Some(0 | 3)), "{}: {checked}", image.display());
    }

    let mut guest = Guest::booted(ways.setup(name));
    ways.mount(&mut guest, "");
    assert_eq!(guest.run(&ways.each("md5sum $at/kept")), sums);
    guest.run(&ways.fio("--verify_only", ways.drives.len()));
    // What has changed is not taken for what was written.
    guest.run("echo spoilt | dd of=/debian/mnt/b/checked bs=512 seek=100 conv=notrunc,fsync 2> /dev/null");
    assert_ne!(guest.shell(&ways.fio("--verify_only", 1)).code, 0, "fio finds nothing wrong");
    guest.power_off();
}

#[test]
fn a_flush_of_the_guest_is_a_flush_on_the_host_unless_the_drive_is_unsafe() {
    let disk = Disk::blank(8 * MIB);
    let flushed = |cache_type| {
        let drive = Drive { cache_type, ..disk_drive("disk", disk.path.clone()) };
        let arguments = ["--metrics-path", "metrics"].map(String::from).into();
        let mut guest = Guest::booted(Setup { drives: vec![drive], arguments, ..Setup::default() });
        let before = guest.metric("block", "flush_count");
        guest.run("dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync");
        let count = guest.metric("block", "flush_count") - before;
        let cache = guest.run("cat /sys/block/vda/queue/write_cache");
        guest.power_off();
        (cache, count > 0)
    };
    assert_eq!(flushed(CacheType::Writeback), ("write back\n".into(), true));
    assert_eq!(flushed(CacheType::Unsafe), ("write through\n".into(), false));
}

#[test]
fn a_read_only_disk_is_not_written() {
    let disk = Disk::blank(MIB);
    disk.file().write_all_at(b"untouched", 0).unwrap();
    let before = fs::read(&disk.path).unwrap();
    let drive = Drive { is_read_only: Some(true), ..disk_drive("disk", disk.path.clone()) };
    let mut guest = Guest::booted(Setup { drives: vec![drive], ..Setup::default() });
    assert_eq!(guest.run("cat /sys/block/vda/ro"), "1\n");
    assert_eq!(guest.run("head -c 9 /dev/vda"), "untouched");
    assert_ne!(guest.shell("echo overwritten > /dev/vda").code, 0);
    assert_ne!(guest.shell("blkdiscard /dev/vda").code, 0);
    guest.power_off();
    assert!(fs::read(&disk.path).unwrap() == before);
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
    let disk = Disk::blank(32 * MIB);
    let mut guest = Guest::booted(Setup { name, ..disk.setup() });
    guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=32 conv=fsync");
    let full = disk.allocated();
    guest.run("blkdiscard -o 8388608 -l 16777216 /dev/vda; sync");
    let left = disk.allocated();
    assert!(full >= 32 * MIB && left <= full - 15 * MIB, "{full} bytes before, {left} after");
    guest.power_off();
    let bytes = fs::read(&disk.path).unwrap();
    let is_zero =
        |from: u64, to: u64| bytes[(from * MIB) as usize..(to * MIB) as usize].iter().all(|byte| *byte == 0);
    assert!(is_zero(8, 24));
    let full = |at: u64| &bytes[(at * MIB) as usize..][..5] != b"\0\0\0\0\0";
    assert!(full(0) && full(7) && full(24) && full(31));
}

#[test]
fn an_asynchronous_disk_is_discarded_trimmed_and_zeroed() {
    asynchronous_is_discarded(Name::Berth);
}

#[test]
fn an_asynchronous_disk_is_discarded_trimmed_and_zeroed_without_pci() {
    asynchronous_is_discarded(Name::Firecracker);
}

fn asynchronous_is_discarded(name: Name) {
    let disk = Disk::blank(32 * MIB);
    let drives = [vec![debian_drive()], disk.with(IoEngine::Async).drives].concat();
    let mut guest = Guest::booted(Setup { name, drives, memory_mib: 256, ..Setup::default() });
    guest.mount_debian();
    guest.run("dd if=/dev/urandom of=/dev/vdb bs=1M count=32 iflag=fullblock conv=fsync");
    let full = disk.allocated();
    guest.run("blkdiscard -o 8388608 -l 8388608 /dev/vdb; sync");
    guest.run("chroot /debian /sbin/blkdiscard --zeroout --offset 16777216 --length 4194304 /dev/vdb; sync");
    assert!(disk.allocated() <= full - 7 * MIB);
    guest.power_off();
    let bytes = fs::read(&disk.path).unwrap();
    let zeroes = bytes.chunks(MIB as usize).map(|part| part.iter().all(|byte| *byte == 0));
    let expected = (0..32).map(|mib| (8..20).contains(&mib));
    assert_eq!(zeroes.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
}

#[test]
fn a_file_system_is_trimmed() {
    let disk = Disk::blank(64 * MIB);
    let mut guest = Guest::booted(disk.setup());
    guest.run("mke2fs /dev/vda > /dev/null; mkdir /mnt; mount -t ext4 /dev/vda /mnt");
    guest.run("dd if=/dev/urandom of=/mnt/file bs=1M count=32; sync");
    let full = disk.allocated();
    guest.run("rm /mnt/file; sync; fstrim /mnt; sync");
    let left = disk.allocated();
    assert!(full >= 32 * MIB && left <= full - 28 * MIB, "{full} bytes before, {left} after");
    guest.power_off();
}

#[test]
fn zeroes_are_written_without_being_sent() {
    zeroes_are_written(Name::Berth);
}

#[test]
fn zeroes_are_written_without_being_sent_without_pci() {
    zeroes_are_written(Name::Firecracker);
}

fn zeroes_are_written(name: Name) {
    let disk = Disk::blank(16 * MIB);
    let drives = vec![debian_drive(), disk_drive("disk", disk.path.clone())];
    let mut guest = Guest::booted(Setup { name, drives, memory_mib: 256, ..Setup::default() });
    guest.mount_debian();
    assert!(guest.number("cat /sys/block/vdb/queue/write_zeroes_max_bytes") > 0);
    guest.run("dd if=/dev/urandom of=/dev/vdb bs=1M count=16 iflag=fullblock conv=fsync");
    let sectors = |guest: &mut Guest| guest.number("awk '{ print $7 }' /sys/block/vdb/stat");
    let before = sectors(&mut guest);
    guest.run("chroot /debian /sbin/blkdiscard --zeroout --offset 4096 --length 8388608 /dev/vdb");
    assert_eq!(sectors(&mut guest) - before, 8 * MIB / 512);
    guest.power_off();
    let bytes = fs::read(&disk.path).unwrap();
    let (start, end) = (4096, 4096 + (8 * MIB) as usize);
    assert!(bytes[start..end].iter().all(|byte| *byte == 0));
    // Of random bytes so many in a row are not zero by chance.
    for beside in [&bytes[start - 16..start], &bytes[end..end + 16]] {
        assert!(beside.iter().any(|byte| *byte != 0), "more was zeroed than was to be");
    }
}

#[test]
fn a_disk_is_raw_whatever_its_first_bytes_say() {
    let directory = tempfile::tempdir().unwrap();
    let [secret, image] = ["secret", "image"].map(|name| directory.path().join(name));
    fs::write(&secret, vec![b's'; MIB as usize]).unwrap();
    // An image that consists of another file, for who believes its header.
    let mut make = Command::new("qemu-img");
    make.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(&secret).arg(&image);
    assert!(make.status().unwrap().success());
    let header = fs::read(&image).unwrap()[..64].to_vec();
    let size = fs::metadata(&image).unwrap().len();
    let disk = Disk::blank(MIB);
    let drives = vec![disk_drive("image", image), disk_drive("disk", disk.path.clone())];
    let mut guest = Guest::booted(Setup { drives, ..Setup::default() });
    assert_eq!(guest.number("blockdev --getsize64 /dev/vda"), size / 512 * 512);
    assert!(guest.run("head -c 3 /dev/vda").starts_with("QFI"));
    // What a guest has written counts for no more when its disk is opened again.
    guest.run("dd if=/dev/vda of=/dev/vdb conv=fsync");
    guest.power_off();
    assert_eq!(fs::read(&disk.path).unwrap()[..64], header);
    let mut guest = Guest::booted(disk.setup());
    assert_eq!(guest.number("blockdev --getsize64 /dev/vda"), MIB);
    assert!(guest.run("head -c 3 /dev/vda").starts_with("QFI"));
    guest.power_off();
}

#[test]
fn the_last_sector_of_an_odd_file_is_there_and_what_is_less_than_a_sector_is_not() {
    let disk = Disk::blank(MIB + 512 + 188);
    disk.file().write_all_at(b"last sector", MIB).unwrap();
    disk.file().write_all_at(b"beyond", MIB + 512).unwrap();
    let mut guest = Guest::booted(disk.setup());
    assert_eq!(guest.number("blockdev --getsize64 /dev/vda"), MIB + 512);
    assert_eq!(guest.run("dd if=/dev/vda bs=512 skip=2048 2> /dev/null | head -c 11"), "last sector");
    guest.run("printf 'new sector!' | dd of=/dev/vda bs=512 seek=2048 conv=sync,fsync");
    assert_ne!(guest.shell("printf x | dd of=/dev/vda bs=512 seek=2049 conv=sync,fsync").code, 0);
    guest.power_off();
    let bytes = fs::read(&disk.path).unwrap();
    assert_eq!(bytes.len() as u64, MIB + 512 + 188, "the file changed its size");
    assert_eq!(&bytes[MIB as usize..][..11], b"new sector!");
    assert_eq!(&bytes[(MIB + 512) as usize..][..6], b"beyond");
}

#[test]
fn a_disk_of_terabytes_is_written_at_its_end() {
    const SIZE: u64 = 3 << 40;
    let disk = Disk::blank(SIZE);
    let mut guest = Guest::booted(disk.setup());
    assert_eq!(guest.number("blockdev --getsize64 /dev/vda"), SIZE);
    guest.run(&format!("printf end | dd of=/dev/vda bs=4096 seek={} conv=sync,fsync", SIZE / 4096 - 1));
    guest.power_off();
    let mut bytes = [0; 3];
    disk.file().read_exact_at(&mut bytes, SIZE - 4096).unwrap();
    assert_eq!(&bytes, b"end");
}

#[test]
fn a_disk_verifies_under_random_writes_of_all_sizes() {
    verifies(Name::Berth, IoEngine::Sync);
}

#[test]
fn an_asynchronous_disk_verifies_under_random_writes_of_all_sizes() {
    verifies(Name::Berth, IoEngine::Async);
}

#[test]
fn an_asynchronous_disk_verifies_without_pci() {
    verifies(Name::Firecracker, IoEngine::Async);
}

fn verifies(name: Name, engine: IoEngine) {
    let disk = Disk::blank(48 * MIB);
    let drives = [vec![debian_drive()], disk.with(engine).drives].concat();
    let mut guest = Guest::booted(Setup { name, drives, memory_mib: 256, vcpus: 2, ..Setup::default() });
    guest.mount_debian();
    guest.run(
        "chroot /debian fio --name=disk --filename=/dev/vdb --direct=1 --rw=randrw --bsrange=512-256k --fsync=50 \
         --ioengine=libaio --iodepth=16 --size=48m --io_size=24m --verify=crc32c --verify_fatal=1 --randrepeat=0",
    );
    guest.power_off();
}

#[test]
fn drives_are_named_by_their_ids_and_a_guest_boots_from_its_root_device() {
    boots_from_root(Name::Berth);
}

#[test]
fn drives_are_named_by_their_ids_and_a_guest_boots_from_its_root_device_without_pci() {
    boots_from_root(Name::Firecracker);
}

/// Of the disk with a partition, and where that begins, in sectors.
const SIGNATURE: u32 = 0x00aa_10fe;
const FIRST_SECTOR: u32 = 2048;

/// A table with one partition for Linux, which has the rest of a disk of so many bytes (UEFI 2.10, 5.2.1).
fn partition_table(bytes: u64) -> [u8; 512] {
    let mut table = [0; 512];
    table[440..444].copy_from_slice(&SIGNATURE.to_le_bytes());
    table[446 + 4] = 0x83;
    table[446 + 8..][..4].copy_from_slice(&FIRST_SECTOR.to_le_bytes());
    table[446 + 12..][..4].copy_from_slice(&((bytes / 512) as u32 - FIRST_SECTOR).to_le_bytes());
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    table
}

fn boots_from_root(name: Name) {
    const SIZE: u64 = 16 * MIB;
    let (other, whole, parted, memory) =
        (Disk::blank(MIB), Disk::blank(SIZE), Disk::blank(2 * SIZE), Disk::blank(SIZE));
    parted.file().write_all_at(&partition_table(2 * SIZE), 0).unwrap();
    let plain = |id: &str, disk: &Disk| disk_drive(id, disk.path.clone());
    let pmem = Pmem { id: "memory".into(), path_on_host: memory.path.clone(), ..Pmem::default() };
    let mut guest = Guest::booted(Setup {
        name,
        drives: vec![plain("whole", &whole), plain("parted", &parted)],
        pmems: vec![pmem.clone()],
        ..Setup::default()
    });
    // Each a system whose init is a shell, and which knows what it is on.
    guest.run(
        "for disk in vda vdb1 pmem0; do mke2fs -b 4096 /dev/$disk > /dev/null && mkdir /$disk && \
         mount -t ext4 /dev/$disk /$disk && cp -a /bin /$disk/ && cd /$disk && \
         mkdir dev proc sys run && echo $disk > which && cd / && umount /$disk || exit 1; done",
    );
    guest.power_off();

    let root = |id: &str, disk: &Disk| Drive { is_root_device: true, ..plain(id, disk) };
    let partuuid = Some(format!("{SIGNATURE:08x}-01"));
    let of_part = Drive { partuuid, is_read_only: Some(true), ..root("the_parted", &parted) };
    let of_memory = Pmem { root_device: true, ..pmem.clone() };
    // What is put after a disk of the guest comes before it if it is the root device.
    let other = plain("disk_1", &other);
    for (drives, pmem, argument, device, system, mode, disks) in [
        (
            vec![other.clone(), root("the_root", &whole)],
            pmem.clone(),
            "root=/dev/vda rw",
            "/dev/vda",
            "vda",
            "rw",
            vec![("the_root", SIZE), ("disk_1", MIB)],
        ),
        (
            vec![other.clone(), of_part],
            pmem,
            "root=PARTUUID=00aa10fe-01 ro",
            "/dev/vda1",
            "vdb1",
            "ro",
            vec![("the_parted", 2 * SIZE), ("disk_1", MIB)],
        ),
        (vec![other], of_memory, "root=/dev/pmem0 rw", "/dev/pmem0", "pmem0", "rw", vec![("disk_1", MIB)]),
    ] {
        let command_line = "init=/bin/sh".into();
        let setup = Setup { name, drives, pmems: vec![pmem], command_line, ..Setup::default() };
        let mut guest = Guest::started(setup);
        guest.console.wait_for("# ", limits::BOOT);
        assert!(guest.run("cat /proc/cmdline").contains(argument), "{argument}");
        assert_eq!(guest.run("cat /which").trim(), system, "{argument}");
        let mounted = guest.run("grep ' / ' /proc/mounts");
        let words: Vec<&str> = mounted.split_whitespace().collect();
        assert_eq!((words[0], words[3].split(',').next().unwrap()), (device, mode), "{mounted}");
        let told = guest.run(
            "for disk in vda vdb; do [ ! -e /sys/block/$disk ] || echo $(cat /sys/block/$disk/serial) \
             $(cat /sys/block/$disk/size); done",
        );
        let expected = disks.iter().map(|(id, bytes)| format!("{id} {}\n", bytes / 512));
        assert_eq!(told, expected.collect::<String>(), "{argument}");
        guest.power_off();
    }
}
