//! Disks, network interfaces and persistent memory come and go while the guest runs: it finds them without a rescan, gives
//! them back when asked, and goes on when one is taken away.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use api_socket::{Drive, DriveUpdate, IoEngine, NetworkInterface, Pmem, Request};
use berth_tests::guest::setup::disk_drive;
use berth_tests::guest::tap::{Tap, host};
use berth_tests::guest::{Guest, Name, Setup, blank_disk, debian_drive, limits, refused, times};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// A guest with one disk, beside whose file further ones may lie.
fn guest(name: Name) -> (Guest, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let first = blank_disk(directory.path().join("first"), MIB);
    let arguments = ["--metrics-path", "metrics"].map(String::from).into();
    let setup = Setup { name, drives: vec![disk_drive("first", first)], arguments, ..Setup::default() };
    (Guest::booted(setup), directory)
}

fn put(guest: &mut Guest, id: &str, path: PathBuf) {
    guest.apply(Request::PutDrive(disk_drive(id, path)));
}

fn delete(guest: &mut Guest, id: &str) {
    guest.apply(Request::DeleteDrive(id.into()));
}

fn appears(guest: &mut Guest, device: &str) {
    guest.run(&format!("until [ -b /dev/{device} ]; do sleep 0.1; done"));
}

/// Until both sides have let go of it.
fn disappears(guest: &mut Guest, device: &str, id: &str) {
    guest.run(&format!("while [ -e /dev/{device} ]; do sleep 0.1; done"));
    while ids(guest).contains(&id.to_string()) {
        guest.run("sleep 0.1");
    }
}

fn ids(guest: &mut Guest) -> Vec<String> {
    guest.api.vm_config().unwrap().drives.into_iter().map(|drive| drive.drive_id).collect()
}

/// Files that the VMM has open.
fn open_files(guest: &Guest) -> Vec<PathBuf> {
    let directory = fs::read_dir(format!("/proc/{}/fd", guest.vmm.pid())).unwrap();
    directory.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok()).collect()
}

#[test]
fn a_disk_that_is_plugged_in_is_found_used_given_back_and_closed() {
    let (mut guest, directory) = guest(Name::Berth);
    let path = blank_disk(directory.path().join("second"), 16 * MIB);
    put(&mut guest, "second", path.clone());
    appears(&mut guest, "vdb");
    assert_eq!(guest.number("cat /sys/block/vdb/size"), 16 * MIB / 512);
    guest.run("mke2fs /dev/vdb > /dev/null; mkdir -p /mnt; mount /dev/vdb /mnt");
    guest.run("head -c 4000000 /dev/urandom > /mnt/random; md5sum < /mnt/random > /mnt/sum; umount /mnt");
    assert!(guest.metric("block_second", "write_bytes") > 4_000_000);
    let written = guest.metric("block", "write_bytes");

    delete(&mut guest, "second");
    disappears(&mut guest, "vdb", "second");
    assert!(!open_files(&guest).contains(&path), "the file is closed");
    assert!(guest.metric("block", "write_bytes") >= written, "what it did stays counted");

    // The same file under another name, in the slot that has become free.
    put(&mut guest, "third", path.clone());
    appears(&mut guest, "vdb");
    guest.run("mount /dev/vdb /mnt; [ \"$(md5sum < /mnt/random)\" = \"$(cat /mnt/sum)\" ]; umount /mnt");
    guest.power_off();
}

#[test]
fn a_disk_comes_and_goes_again_and_again_and_the_vmm_keeps_nothing_of_it() {
    let (mut guest, directory) = guest(Name::Berth);
    let path = blank_disk(directory.path().join("second"), MIB);
    let mut files = 0;
    for round in 0..times(8, 200) {
        File::options().write(true).open(&path).unwrap().write_all_at(&[round as u8; 512], 0).unwrap();
        put(&mut guest, "second", path.clone());
        appears(&mut guest, "vdb");
        assert_eq!(guest.number("hexdump -n 1 -e '1/1 \"%d\"' /dev/vdb"), u64::from(round as u8));
        delete(&mut guest, "second");
        disappears(&mut guest, "vdb", "second");
        let now = open_files(&guest).len();
        assert!(round == 0 || now == files, "round {round}: {now} files are open, and {files} were");
        files = now;
    }
    guest.power_off();
}

#[test]
fn a_disk_that_is_taken_away_under_load_is_gone_and_the_guest_and_its_other_disk_go_on() {
    let (mut guest, directory) = guest(Name::Berth);
    let path = blank_disk(directory.path().join("second"), 16 * MIB);
    put(&mut guest, "second", path.clone());
    appears(&mut guest, "vdb");
    guest.run(
        "(while dd if=/dev/vdb of=/dev/null bs=64k iflag=direct; do :; done; echo > /run/ended) > /dev/null 2>&1 &",
    );
    guest.run("sleep 1");
    for _ in 0..2 {
        delete(&mut guest, "second");
    }
    assert_eq!(ids(&mut guest), ["first"]);
    assert!(!open_files(&guest).contains(&path));
    guest.run("while [ -e /sys/block/vdb ] || [ ! -e /run/ended ]; do sleep 0.1; done");
    guest.run("echo still here | dd of=/dev/vda conv=fsync 2> /dev/null");
    let mut word = [0; 10];
    File::open(directory.path().join("first")).unwrap().read_exact_at(&mut word, 0).unwrap();
    assert_eq!(&word, b"still here");
    guest.power_off();
}

/// A guest with fio, a disk of it that stays and one that comes and goes.
fn guest_with_fio() -> (Guest, TempDir, Drive) {
    let directory = tempfile::tempdir().unwrap();
    let disk = |id: &str| disk_drive(id, blank_disk(directory.path().join(id), 32 * MIB));
    let setup = Setup {
        vcpus: 2,
        memory_mib: 256,
        drives: vec![debian_drive(), disk("stays")],
        arguments: ["--metrics-path", "metrics"].map(String::from).into(),
        ..Setup::default()
    };
    let goes = disk("goes");
    let mut guest = Guest::booted(setup);
    guest.mount_debian();
    (guest, directory, goes)
}

/// Random writes of all sizes, read back and compared.
fn fio(disk: &str, megabytes: u32) -> String {
    format!(
        "chroot /debian fio --name={disk} --filename=/dev/{disk} --direct=1 --rw=randrw --bsrange=512-64k --fsync=50 \
         --ioengine=libaio --iodepth=16 --size=32m --io_size={megabytes}m --verify=crc32c --verify_fatal=1 \
         --randrepeat=0 --verify_state_save=0"
    )
}

/// On both disks at once, on the one that goes for longer than it is there; so many requests for the end of that.
fn goes_under_fio(guest: &mut Guest, goes: &Drive, deletes: usize) {
    let path = goes.path_on_host.clone().unwrap();
    guest.apply(Request::PutDrive(goes.clone()));
    appears(guest, "vdc");
    for (disk, megabytes) in [("vdb", 16), ("vdc", 4096)] {
        let fio = fio(disk, megabytes);
        guest.run(&format!(
            "rm -f /run/{disk}.*; ({fio}; echo $? > /run/{disk}.ended) > /run/{disk}.said 2>&1 &"
        ));
    }
    let written = guest.metric("block_goes", "write_bytes");
    while guest.metric("block_goes", "write_bytes") < written + MIB {
        guest.run("sleep 0.1");
    }
    for _ in 0..deletes {
        delete(guest, "goes");
    }
    while ids(guest).len() > 2 {
        guest.run("sleep 0.1");
    }
    assert!(!open_files(guest).contains(&path), "its file is open");
    guest.run("until [ -e /run/vdb.ended ]; do sleep 0.2; done");
    let said = guest.run("tail -n 8 /run/vdb.said");
    assert_eq!(guest.number("cat /run/vdb.ended"), 0, "the disk that stays: {said}");
}

#[test]
fn a_disk_that_goes_while_fio_writes_is_gone_and_another_one_still_verifies() {
    let (mut guest, _directory, goes) = guest_with_fio();
    for (round, deletes) in [1, 2].repeat(times(1, 20) as usize).into_iter().enumerate() {
        goes_under_fio(&mut guest, &goes, deletes);
        guest.run("while [ -e /sys/block/vdc ] || [ ! -e /run/vdc.ended ]; do sleep 0.1; done");
        let said = guest.run("tail -n 8 /run/vdc.said");
        assert_ne!(
            guest.number("cat /run/vdc.ended"),
            0,
            "round {round}: nobody was told that it has gone: {said}"
        );
    }
    // It comes again as if nothing had been.
    guest.apply(Request::PutDrive(goes));
    appears(&mut guest, "vdc");
    guest.run(&fio("vdc", 4));
    guest.power_off();
}

#[test]
fn a_guest_without_disks_is_given_one_from_the_directory_that_was_named_for_it() {
    let [named, elsewhere] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let arguments = vec![format!("--hot-plug-directory={}", named.path().display())];
    let mut guest = Guest::booted(Setup { arguments, ..Setup::default() });
    guest.run("modprobe virtio_blk");
    let out_of_reach = disk_drive("data", blank_disk(elsewhere.path().join("data"), MIB));
    refused(&mut guest, &Request::PutDrive(out_of_reach), &["`path_on_host`", "--hot-plug-directory"]);
    put(&mut guest, "data", blank_disk(named.path().join("data"), 4 * MIB));
    appears(&mut guest, "vda");
    guest.run("[ $(cat /sys/block/vda/serial) = data ]; echo here | dd of=/dev/vda conv=fsync 2> /dev/null");
    delete(&mut guest, "data");
    disappears(&mut guest, "vda", "data");
    assert_eq!(&fs::read(named.path().join("data")).unwrap()[..4], b"here");
    guest.power_off();
}

#[test]
fn a_disk_that_comes_while_the_guest_is_paused_is_there_when_it_goes_on() {
    let (mut guest, directory) = guest(Name::Berth);
    guest.pause();
    put(&mut guest, "second", blank_disk(directory.path().join("second"), MIB));
    guest.resume();
    appears(&mut guest, "vdb");
    guest.pause();
    delete(&mut guest, "second");
    assert_eq!(ids(&mut guest), ["first", "second"], "a paused guest cannot let go of it");
    guest.resume();
    disappears(&mut guest, "vdb", "second");
    guest.power_off();
}

#[test]
fn what_cannot_be_plugged_in_or_out_is_refused_with_the_reason() {
    let (mut guest, directory) = guest(Name::Berth);
    let path = blank_disk(directory.path().join("second"), MIB);
    let drive = disk_drive("second", path);
    let put = |drive: &Drive| Request::PutDrive(drive.clone());
    let twice = Drive { drive_id: "first".into(), ..drive.clone() };
    refused(&mut guest, &put(&twice), &["`drive_id` is \"first\"", "PATCH", "DELETE"]);
    let root = Drive { is_root_device: true, ..drive.clone() };
    refused(&mut guest, &put(&root), &["`is_root_device`", "false"]);
    let ring = Drive { io_engine: Some(IoEngine::Async), ..drive.clone() };
    refused(&mut guest, &put(&ring), &["`io_engine` is Async", "Sync"]);
    let elsewhere = tempfile::tempdir().unwrap();
    let out_of_reach = disk_drive("second", blank_disk(elsewhere.path().join("disk"), MIB));
    refused(&mut guest, &put(&out_of_reach), &["`path_on_host`", "Landlock"]);
    refused(&mut guest, &Request::DeleteDrive("none".into()), &["`drive_id` is \"none\"", "GET /vm/config"]);
    for number in 0..30 {
        let path = blank_disk(directory.path().join(format!("{number}")), MIB);
        guest.apply(put(&disk_drive(&format!("d{number}"), path)));
    }
    refused(&mut guest, &put(&drive), &["`drive_id` is \"second\"", "31"]);
    guest.run("until [ -b /dev/vdae ]; do sleep 0.1; done");
    guest.apply(Request::PatchDrive(DriveUpdate { drive_id: "d29".into(), ..DriveUpdate::default() }));
    guest.power_off();
}

/// The test's init loads drivers for what is there when it starts, and no others.
const NETWORK_DRIVER: &str = "modprobe virtio_net";

/// A tap that the VMM may open without any capability.
fn own_tap(number: u8) -> Tap {
    Tap::new(number, &["user", "root"])
}

#[test]
fn a_network_interface_is_plugged_in_used_given_back_and_its_tap_is_free_again() {
    let tap = own_tap(20);
    let (mut guest, _directory) = guest(Name::Berth);
    guest.run(NETWORK_DRIVER);
    for round in 0..times(3, 50) {
        guest.apply(Request::PutNetworkInterface(tap.interface()));
        guest.run("until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done");
        tap.set_up(&mut guest, "eth0", None);
        host("ping", &["-c", "3", "-i", "0.05", "-s", "8000", "-W", "30", &tap.guest()]);
        assert!(guest.metric("net_tap20", "rx_packets_count") > 0);
        refused(
            &mut guest,
            &Request::PutNetworkInterface(tap.interface()),
            &["`iface_id` is \"tap20\"", "DELETE"],
        );
        guest.apply(Request::DeleteNetworkInterface(tap.name()));
        guest.run("while [ -e /sys/class/net/eth0 ]; do sleep 0.1; done");
        while !guest.api.vm_config().unwrap().network_interfaces.is_empty() {
            guest.run("sleep 0.1");
        }
        assert_eq!(guest.metric("net", "tap_read_fails"), 0, "round {round}");
    }
    guest.power_off();
}

#[test]
fn a_network_interface_that_is_taken_away_under_load_is_gone_and_the_guest_goes_on() {
    let tap = own_tap(21);
    let (mut guest, _directory) = guest(Name::Berth);
    guest.run(NETWORK_DRIVER);
    guest.apply(Request::PutNetworkInterface(tap.interface()));
    guest.run("until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done");
    tap.set_up(&mut guest, "eth0", None);
    guest.run(&format!("ping -c 1 -W 30 {}", tap.host()));
    guest.run(&format!("(ping -A -s 1400 {} > /dev/null 2>&1 &)", tap.host()));
    guest.delete(&Request::DeleteNetworkInterface(tap.name()), 2);
    guest.run("while [ -e /sys/class/net/eth0 ]; do sleep 0.1; done");
    assert_eq!(guest.api.vm_config().unwrap().network_interfaces, Vec::<NetworkInterface>::new());
    guest.power_off();
}

#[test]
fn an_interface_that_goes_in_the_middle_of_a_stream_is_gone_and_comes_again() {
    let (tap, other) = (own_tap(22), own_tap(23));
    let (mut guest, _directory) = guest(Name::Berth);
    guest.run(NETWORK_DRIVER);
    guest.apply(Request::PutNetworkInterface(other.interface()));
    guest.run("until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done");
    other.set_up(&mut guest, "eth0", None);
    let ways = [tap.interface(), tap.interface_with_vhost()];
    let ways = ways.iter().flat_map(|interface| [(interface, 1), (interface, 2)]);
    let ways: Vec<_> = ways.collect::<Vec<_>>().repeat(times(1, 10) as usize);
    for (port, (interface, deletes)) in (4000..).zip(ways) {
        guest.apply(Request::PutNetworkInterface(interface.clone()));
        guest.run("until [ -e /sys/class/net/eth1 ]; do sleep 0.1; done");
        tap.set_up(&mut guest, "eth1", None);
        // There and back at once, for as long as there is a way.
        let listener = TcpListener::bind((tap.host(), port)).unwrap();
        let heard = Arc::<AtomicU64>::default();
        let counts = Arc::clone(&heard);
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            thread::scope(|scope| {
                scope.spawn(|| while (&stream).write_all(&[0; 65536]).is_ok() {});
                let mut buffer = [0; 65536];
                while let Ok(bytes @ 1..) = (&stream).read(&mut buffer) {
                    counts.fetch_add(bytes as u64, Ordering::SeqCst);
                }
                let _ = stream.shutdown(Shutdown::Both);
            });
        });
        guest.run(&format!("(nc {} {port} < /dev/zero > /dev/null 2>&1 &)", tap.host()));
        while heard.load(Ordering::SeqCst) < MIB {
            guest.run("sleep 0.1");
        }
        guest.delete(&Request::DeleteNetworkInterface(tap.name()), deletes);
        guest.run("while [ -e /sys/class/net/eth1 ]; do sleep 0.1; done");
        while guest.api.vm_config().unwrap().network_interfaces.len() > 1 {
            guest.run("sleep 0.1");
        }
        guest.run("killall -9 nc; true");
        host("ping", &["-c", "2", "-i", "0.1", "-W", "30", &other.guest()]);
    }
    guest.power_off();
}

#[test]
fn persistent_memory_is_plugged_in_used_and_given_back() {
    let (mut guest, directory) = guest(Name::Berth);
    guest.run("modprobe virtio_pmem; modprobe nd_pmem; mkdir -p /mnt");
    let pmem = |id: &str, bytes| Pmem {
        id: id.into(),
        path_on_host: blank_disk(directory.path().join(id), bytes),
        ..Pmem::default()
    };
    let (large, small) = (pmem("large", 32 * MIB), pmem("small", 4 * MIB));
    let gone = |guest: &mut Guest, left: usize| {
        while guest.api.vm_config().unwrap().pmem.len() > left {
            guest.run("sleep 0.1");
        }
    };
    for round in 0..times(3, 50) {
        guest.apply(Request::PutPmem(large.clone()));
        guest.run("until [ -b /dev/pmem0 ]; do sleep 0.1; done");
        guest.apply(Request::PutPmem(small.clone()));
        guest.run("until [ -b /dev/pmem1 ]; do sleep 0.1; done");
        guest.run("mke2fs -b 4096 /dev/pmem0 > /dev/null; mount -t ext4 -o dax /dev/pmem0 /mnt");
        guest.run(&format!("echo round {round} > /mnt/word; umount /mnt; echo {round} > /dev/pmem1; sync"));
        guest.apply(Request::DeletePmem("large".into()));
        gone(&mut guest, 1);
        assert!(!open_files(&guest).contains(&large.path_on_host));
        guest.apply(Request::DeletePmem("small".into()));
        gone(&mut guest, 0);
        let maps = fs::read_to_string(format!("/proc/{}/maps", guest.vmm.pid())).unwrap();
        assert!(!maps.contains(&large.path_on_host.display().to_string()), "{maps}");
        assert!(find(&large.path_on_host, format!("round {round}").as_bytes()));
    }
    let root = Pmem { root_device: true, ..large.clone() };
    refused(&mut guest, &Request::PutPmem(root), &["`root_device`"]);
    let none = Request::DeletePmem("none".into());
    refused(&mut guest, &none, &["`id` is \"none\"", "GET /vm/config"]);
    guest.power_off();
}

#[test]
fn persistent_memory_that_goes_while_it_is_written_ends_at_most_the_guest() {
    for deletes in [1, 2].repeat(times(1, 10) as usize) {
        let (mut guest, directory) = guest(Name::Berth);
        guest.run("modprobe virtio_pmem; modprobe nd_pmem");
        let path = blank_disk(directory.path().join("memory"), 16 * MIB);
        let pmem = Pmem { id: "memory".into(), path_on_host: path.clone(), ..Pmem::default() };
        guest.apply(Request::PutPmem(pmem));
        guest.run("until [ -b /dev/pmem0 ]; do sleep 0.1; done");
        guest.run(
            "(while [ -b /dev/pmem0 ]; do dd if=/dev/urandom of=/dev/pmem0 bs=64k count=64 conv=notrunc,fsync; done) \
             > /run/said 2>&1 &",
        );
        let before = guest.metric("pmem", "queue_event_count");
        while guest.metric("pmem", "queue_event_count") < before + 3 {
            guest.run("[ -b /dev/pmem0 ]; sleep 0.1");
        }
        guest.delete(&Request::DeletePmem("memory".into()), deletes);
        let began = Instant::now();
        // A guest that has ended with it has ended as its kernel says, and not as a fault of the VMM's.
        let is_gone = loop {
            match guest.api.vm_config() {
                Ok(config) if config.pmem.is_empty() => break true,
                Ok(_) => {}
                Err(_) => break false,
            }
            assert!(began.elapsed() < limits::COMMAND, "it does not go");
            thread::sleep(Duration::from_millis(100));
        };
        println!("{deletes} times DELETE: the guest {}", if is_gone { "goes on" } else { "has ended" });
        assert!(is_gone, "{:?}", guest.ended());
        assert!(!open_files(&guest).contains(&path));
        guest.run("echo still here | dd of=/dev/vda conv=fsync");
        guest.run("while [ -e /sys/block/pmem0 ]; do sleep 0.1; done");
        guest.power_off();
    }
}

fn find(path: &Path, word: &[u8]) -> bool {
    fs::read(path).unwrap().windows(word.len()).any(|bytes| bytes == word)
}

#[test]
fn without_pci_nothing_comes_or_goes() {
    let (mut guest, directory) = guest(Name::Firecracker);
    let path = blank_disk(directory.path().join("second"), MIB);
    refused(&mut guest, &Request::PutDrive(disk_drive("second", path)), &["after starting the microVM"]);
    refused(&mut guest, &Request::DeleteDrive("first".into()), &["--enable-pci"]);
    guest.power_off();
}
