//! A file of the host is persistent memory to the guest: what is written there is in the file, what was flushed is there
//! after a crash, and a read-only one is not written.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use api_socket::{Pmem, PmemUpdate, RateLimiter, Request, TokenBucket};
use berth_tests::guest::setup::disk_drive;
use berth_tests::guest::{Guest, Name, Setup, blank_disk};

const MIB: u64 = 1 << 20;

fn pmem(id: &str, path: PathBuf) -> Pmem {
    Pmem { id: id.into(), path_on_host: path, ..Pmem::default() }
}

fn setup(pmems: Vec<Pmem>) -> Setup {
    let arguments = ["--metrics-path", "metrics"].map(String::from).into();
    Setup { pmems, arguments, ..Setup::default() }
}

fn find(path: &Path, word: &[u8]) -> bool {
    fs::read(path).unwrap().windows(word.len()).any(|bytes| bytes == word)
}

#[test]
fn what_the_guest_flushed_is_in_the_file_after_a_crash() {
    survives(Name::Berth);
}

#[test]
fn what_the_guest_flushed_is_in_the_file_after_a_crash_without_pci() {
    survives(Name::Firecracker);
}

fn survives(name: Name) {
    let directory = tempfile::tempdir().unwrap();
    // The second has a size that is no multiple of 2 MiB, nor of a page.
    let first = blank_disk(directory.path().join("first"), 32 * MIB);
    let second = blank_disk(directory.path().join("second"), 5 * MIB + 512);
    let both = vec![pmem("a", first.clone()), pmem("b", second.clone())];
    let mut guest = Guest::booted(Setup { name, ..setup(both.clone()) });
    guest.run("modprobe virtio_pmem; modprobe nd_pmem");
    assert_eq!(guest.number("cat /sys/block/pmem0/size"), 32 * MIB / 512);
    assert_eq!(guest.number("cat /sys/block/pmem1/size"), 6 * MIB / 512);
    guest.run("mke2fs -b 4096 /dev/pmem0 > /dev/null; mkdir /mnt; mount -t ext4 -o dax /dev/pmem0 /mnt");
    guest.run("mount | grep pmem0 | grep -q dax");
    guest.run("head -c 4000000 /dev/urandom > /mnt/random; sync; md5sum < /mnt/random > /mnt/sum; sync");
    guest.run("echo persistent | dd of=/dev/pmem1 bs=512 seek=10240 conv=fsync 2> /dev/null");
    assert!(guest.metric("pmem_a", "queue_event_count") > 0);
    assert!(guest.metric("pmem_b", "queue_event_count") > 0);
    assert_eq!(guest.metric("pmem", "event_fails"), 0);
    guest.vmm.kill();

    assert_eq!(fs::metadata(&second).unwrap().len(), 5 * MIB + 512, "no file grows");
    let mut end = [0; 10];
    File::open(&second).unwrap().read_exact_at(&mut end, 5 * MIB).unwrap();
    assert_eq!(&end, b"persistent");
    let mut guest = Guest::booted(Setup { name, ..setup(both) });
    guest.run("modprobe virtio_pmem; modprobe nd_pmem; mkdir /mnt; mount -t ext4 -o dax /dev/pmem0 /mnt");
    guest.run("[ \"$(md5sum < /mnt/random)\" = \"$(cat /mnt/sum)\" ]");
    guest.power_off();
}

#[test]
fn a_read_only_file_is_not_written_and_a_disk_is_read_into_persistent_memory() {
    let directory = tempfile::tempdir().unwrap();
    let fixed = blank_disk(directory.path().join("fixed"), 4 * MIB);
    let target = blank_disk(directory.path().join("target"), 16 * MIB);
    let disk = blank_disk(directory.path().join("disk"), MIB);
    File::options().write(true).open(&fixed).unwrap().write_all_at(b"as it was", 0).unwrap();
    File::options().write(true).open(&disk).unwrap().write_all_at(b"from the disk", 4096).unwrap();
    let before = fs::read(&fixed).unwrap();
    let pmems =
        vec![Pmem { read_only: true, ..pmem("fixed", fixed.clone()) }, pmem("target", target.clone())];
    let mut guest = Guest::booted(Setup { drives: vec![disk_drive("disk", disk)], ..setup(pmems) });
    guest.run("modprobe virtio_pmem; modprobe nd_pmem");
    assert_eq!(guest.run("head -c 9 /dev/pmem0"), "as it was");
    guest.run("echo changed | dd of=/dev/pmem0 bs=512 conv=fsync 2> /dev/null; true");
    assert_eq!(fs::read(&fixed).unwrap(), before);
    // The disk's request has its buffer in the file's pages: dax maps them, and direct I/O hands them to the device.
    guest.run("mke2fs -b 4096 /dev/pmem1 > /dev/null; mkdir /mnt; mount -t ext4 -o dax /dev/pmem1 /mnt");
    guest.run("dd if=/dev/zero of=/mnt/copy bs=4096 count=8 2> /dev/null; sync");
    guest.run(
        "dd if=/dev/vda of=/mnt/copy bs=4096 skip=1 count=4 iflag=direct conv=notrunc 2> /dev/null; sync",
    );
    assert_eq!(guest.run("head -c 13 /mnt/copy"), "from the disk");
    assert!(find(&target, b"from the disk"));
    guest.power_off();
}

#[test]
fn a_limit_holds_flushes_back_and_can_be_lifted_while_the_guest_runs() {
    let directory = tempfile::tempdir().unwrap();
    let file = blank_disk(directory.path().join("file"), 4 * MIB);
    let once = TokenBucket { size: 1, one_time_burst: None, refill_time: 3_600_000 };
    let limit = |ops| Some(RateLimiter { bandwidth: None, ops: Some(ops) });
    let slow = Pmem { rate_limiter: limit(once), ..pmem("slow", file) };
    let mut guest = Guest::booted(setup(vec![slow]));
    guest.run("modprobe virtio_pmem; modprobe nd_pmem");
    let write = "dd if=/dev/zero of=/dev/pmem0 bs=512 count=1 conv=fsync 2> /dev/null";
    guest.run(&format!("{write}; ({write}; {write}; touch /run/done) &"));
    while guest.metric("pmem_slow", "rate_limiter_throttled_events") == 0 {
        guest.run("sleep 0.1");
    }
    guest.run("[ ! -e /run/done ]");
    let none = TokenBucket { size: 0, one_time_burst: None, refill_time: 0 };
    guest.apply(Request::PatchPmem(PmemUpdate { id: "slow".into(), rate_limiter: limit(none) }));
    guest.run("while [ ! -e /run/done ]; do sleep 0.1; done");
    guest.power_off();
}
