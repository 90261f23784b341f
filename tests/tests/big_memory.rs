//! A guest with more memory than fits below the hole sees all of it, and what it writes on either side stays there.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use berth_tests::guest::{Guest, Setup, debian_drive};

const MEMORY_MIB: u64 = 5 << 10;

#[test]
fn five_gib_are_seen_below_and_above_the_hole() {
    let mut guest = Guest::booted(Setup { memory_mib: MEMORY_MIB, vcpus: 2, ..Setup::default() });
    let total = guest.number("awk '/MemTotal/ { print $2 }' /proc/meminfo") / 1024;
    assert!(total > MEMORY_MIB * 95 / 100, "{total} MiB");
    let ranges = guest.run("grep 'System RAM' /proc/iomem");
    assert!(ranges.contains("-bfffffff : System RAM"), "RAM does not end at 3 GiB:\n{ranges}");
    assert!(ranges.contains("100000000-17fffffff : System RAM"), "no 2 GiB from 4 GiB on:\n{ranges}");
    guest.power_off();
}

/// What is tried, in MiB of guest-physical address: in the middle of nowhere, on both sides of the hole, and at the end.
const PLACES: [u64; 4] = [1024, 3072 - PLACE_MIB, 4096, 6144 - PLACE_MIB];
/// The kernel adds such memory in units of this size.
const PLACE_MIB: u64 = 128;
/// What is written at the begin and at the end of each place.
const WRITTEN_MIB: u64 = 2;

#[test]
fn what_is_written_at_either_side_of_the_hole_stays_there() {
    // `memmap=SIZE!ADDRESS` keeps a range of RAM from the kernel's own use and makes it a disk, pmem0 and so on.
    let places: Vec<_> = PLACES.iter().map(|at| format!("memmap={PLACE_MIB}M!{at}M")).collect();
    let setup = Setup {
        memory_mib: MEMORY_MIB,
        command_line: places.join(" "),
        drives: vec![debian_drive()],
        ..Setup::default()
    };
    let mut guest = Guest::booted(setup);
    guest.mount_debian();
    guest.run("modprobe nd_pmem; insmod /debian/lib/modules/*/kernel/drivers/nvdimm/nd_e820.ko");

    // All are written before any is read: memory that is there twice would show the later one's bytes.
    let mut written = Vec::new();
    for (disk, _) in PLACES.iter().enumerate() {
        for seek in [0, PLACE_MIB - WRITTEN_MIB] {
            let first = 1_000_000 * (written.len() + 1);
            let bytes = format!("seq {first} {} | head -c {}", first + 500_000, WRITTEN_MIB << 20);
            guest.run(&format!(
                "{bytes} | dd of=/dev/pmem{disk} bs=1M seek={seek} iflag=fullblock conv=fsync"
            ));
            written.push((disk, seek, guest.run(&format!("{bytes} | md5sum"))));
        }
    }
    guest.run("echo 3 > /proc/sys/vm/drop_caches");
    for (disk, skip, sum) in written {
        let read =
            format!("dd if=/dev/pmem{disk} bs=1M skip={skip} count={WRITTEN_MIB} 2> /dev/null | md5sum");
        assert_eq!(guest.run(&read), sum, "pmem{disk} at {skip} MiB");
    }
    guest.power_off();
}
