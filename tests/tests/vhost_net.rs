//! A guest's network interface whose packets the host's kernel moves: they arrive as they were sent, through pauses, resets
//! and the loss of the device, and the VMM has no part in it but the beginning and the end.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{PermissionsExt, chown};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use api_socket::{
    DEFAULT_MMDS_ADDRESS, MemoryHotplugConfig, MemoryHotplugSizeUpdate, MmdsConfig, MmdsVersion,
    NetworkInterface, NetworkInterfaceUpdate, Pmem, RateLimiter, Request,
};
use berth_tests::cell::{Cells, GID, UID, Vmm};
use berth_tests::guest::setup::disk_drive;
use berth_tests::guest::tap::{self, Tap, host, serve};
use berth_tests::guest::{Guest, Name, Setup, blank_disk, md5, refused, times};
use berth_tests::host::process;

/// The test's init loads drivers for what is there when it starts, and no others.
const NETWORK_DRIVER: &str = "modprobe virtio_net";

/// Enough to go round every ring many times.
const BYTES: usize = 4 << 20;

/// Where the kernel's back-ends come from.
const VHOST: &str = "/dev/vhost-net";

/// All that this process counts of an interface, but for the control queue.
const COUNTERS: [&str; 6] = [
    "rx_packets_count",
    "rx_bytes_count",
    "rx_tap_event_count",
    "tx_packets_count",
    "tx_bytes_count",
    "tx_queue_event_count",
];

fn guest_on(tap: &Tap, pairs: Option<u8>, setup: Setup) -> Guest {
    let interfaces = vec![NetworkInterface { queue_pairs: pairs, ..tap.interface_with_vhost() }];
    let arguments = ["--metrics-path", "metrics"].map(String::from).into();
    let mut guest = Guest::booted(Setup { interfaces, arguments, ..setup });
    tap.set_up(&mut guest, "eth0", None);
    guest
}

/// Sends `bytes` to the host and gets them back, all as they were.
#[track_caller]
fn there_and_back(guest: &mut Guest, tap: &Tap, port: u16, bytes: usize) {
    guest.run(&format!("head -c {bytes} /dev/urandom > /run/words"));
    let sum = guest.run("md5sum < /run/words");
    let server = serve(tap, port, |mut stream| {
        let mut words = Vec::new();
        stream.read_to_end(&mut words).unwrap();
        words
    });
    guest.run(&format!("nc {} {port} < /run/words", tap.host()));
    let words = server.join().unwrap();
    assert_eq!(md5(&words), sum, "to the host");
    let server = serve(tap, port + 1, move |mut stream| {
        stream.write_all(&words).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        // Until the guest has all of it.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let heard = guest.run(&format!("nc {} {} < /dev/null | md5sum", tap.host(), port + 1));
    server.join().unwrap();
    assert_eq!(heard, sum, "to the guest");
}

#[test]
fn host_and_guest_reach_one_another_and_the_vmm_sees_nothing_of_it() {
    reach(Name::Berth);
}

#[test]
fn host_and_guest_reach_one_another_without_pci() {
    reach(Name::Firecracker);
}

/// A kernel that is not told of it would find none of the guest's buffers there.
#[test]
fn what_lies_in_memory_that_was_plugged_while_the_guest_ran_is_sent_and_received() {
    let tap = Tap::new(48, &[]);
    // The guest's kernel takes memory for its own use from there first.
    let setup = Setup {
        memory_hotplug: Some(MemoryHotplugConfig { total_size_mib: 256, ..MemoryHotplugConfig::default() }),
        command_line: "memhp_default_state=online_kernel".into(),
        ..Setup::default()
    };
    let mut guest = guest_on(&tap, None, setup);
    guest.apply(Request::PatchMemoryHotplug(MemoryHotplugSizeUpdate { requested_size_mib: 256 }));
    while guest.api.memory_hotplug().unwrap().plugged_size_mib < 256 {
        thread::sleep(Duration::from_millis(100));
    }
    there_and_back(&mut guest, &tap, 4000, BYTES);
    assert_eq!(guest.metric("net_tap48", "rx_packets_count"), 0, "the kernel moved it");
    guest.power_off();
}

fn reach(name: Name) {
    let tap = Tap::new(30, &[]);
    let mut guest = guest_on(&tap, None, Setup { name, ..Setup::default() });
    guest.run(&format!("ping -c 3 -i 0.2 {}", tap.host()));
    for address in [tap.guest(), tap.guest6()] {
        for size in ["0", "56", "1400", "8000", "60000"] {
            host("ping", &["-c", "3", "-i", "0.05", "-s", size, "-W", "30", &address]);
        }
    }
    there_and_back(&mut guest, &tap, 4000, BYTES);
    for counter in COUNTERS {
        assert_eq!(guest.metric("net_tap30", counter), 0, "{counter}");
    }
    guest.power_off();
}

#[test]
fn pauses_and_new_drivers_in_the_middle_of_a_stream_lose_nothing() {
    nothing_is_lost(Name::Berth, 31);
}

#[test]
fn pauses_and_new_drivers_in_the_middle_of_a_stream_lose_nothing_without_pci() {
    nothing_is_lost(Name::Firecracker, 32);
}

/// On two queue pairs.
fn nothing_is_lost(name: Name, number: u8) {
    let tap = Tap::new(number, &["multi_queue"]);
    let mut guest = guest_on(&tap, Some(2), Setup { name, vcpus: 2, ..Setup::default() });
    assert_eq!(guest.run("ls -d /sys/class/net/eth0/queues/rx-* | wc -l"), "2\n");
    guest.run(&format!("head -c {BYTES} /dev/urandom > /run/words"));
    let sum = guest.run("md5sum < /run/words");
    for stream in 0..times(1, 50) as u16 {
        // Both directions at once, and neither waits for the other: an echo would, as busybox's nc does not read while it
        // writes.
        let mut words = vec![0; BYTES];
        File::open("/dev/urandom").unwrap().read_exact(&mut words).unwrap();
        let said = md5(&words);
        let port = 4300 + stream;
        let talks = serve(&tap, port, move |stream| {
            thread::scope(|scope| {
                scope.spawn(|| (&stream).write_all(&words).unwrap());
                let mut heard = Vec::new();
                (&stream).read_to_end(&mut heard).unwrap();
                heard
            })
        });
        guest.run(&format!("(nc {} {port} < /run/words > /run/heard; touch /run/done) &", tap.host()));
        for cycle in 0..20 {
            thread::sleep(Duration::from_millis(cycle * 17 % 41));
            guest.pause();
            thread::sleep(Duration::from_millis(cycle * 7 % 41));
            guest.resume();
        }
        guest.run("until [ -e /run/done ]; do sleep 0.2; done; rm /run/done");
        assert_eq!(md5(&talks.join().unwrap()), sum, "to the host");
        assert_eq!(guest.run("md5sum < /run/heard"), said, "to the guest");
    }

    for round in 0..times(2, 50) {
        // The device is reset with packets on their way.
        guest.run(&format!("(ping -A -s 1400 {} > /dev/null 2>&1 &)", tap.host()));
        guest.run(
            "cd /sys/bus/virtio/drivers/virtio_net; device=$(ls -d virtio*); for way in unbind bind; do \
             echo $device > $way; done; cd /; killall ping; until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done",
        );
        tap.set_up(&mut guest, "eth0", None);
        there_and_back(&mut guest, &tap, 4102 + 2 * round as u16, 1 << 20);
    }
    guest.power_off();
}

/// Descriptors of the kernel's back-ends that the VMM has.
fn back_ends(pid: u32) -> usize {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    files
        .filter(|file| {
            fs::read_link(file.as_ref().unwrap().path()).is_ok_and(|path| path.ends_with("vhost-net"))
        })
        .count()
}

/// Threads that the kernel has in the VMM's process for its back-ends.
fn kernels_threads(guest: &Guest) -> usize {
    guest.vmm.threads().iter().filter(|name| name.starts_with("vhost-")).count()
}

#[test]
fn an_interface_comes_and_goes_while_the_guest_runs_and_memory_too_and_the_kernel_keeps_nothing() {
    let tap = Tap::new(33, &["user", "root"]);
    let directory = tempfile::tempdir().unwrap();
    let arguments = ["--metrics-path", "metrics"].map(String::from).into();
    // Beside a drive's file the guest may be given others.
    let drives = vec![disk_drive("first", blank_disk(directory.path().join("first"), 1 << 20))];
    let mut guest = Guest::booted(Setup { arguments, drives, ..Setup::default() });
    guest.run(NETWORK_DRIVER);
    let pmem =
        || Pmem { path_on_host: directory.path().join("memory"), id: "memory".into(), ..Pmem::default() };
    blank_disk(pmem().path_on_host, 16 << 20);
    for round in 0..times(2, 50) {
        guest.apply(Request::PutNetworkInterface(tap.interface_with_vhost()));
        guest.run("until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done");
        tap.set_up(&mut guest, "eth0", None);
        assert_eq!((back_ends(guest.vmm.pid()), kernels_threads(&guest)), (1, 1), "round {round}");
        guest.apply(Request::PutPmem(pmem()));
        there_and_back(&mut guest, &tap, 4200 + 4 * round as u16, 1 << 20);
        guest.delete(&Request::DeletePmem("memory".into()), 2);
        there_and_back(&mut guest, &tap, 4202 + 4 * round as u16, 1 << 20);
        // Asked for under load, and taken away from a driver that has packets on their way.
        guest.run(&format!("(ping -A -s 1400 {} > /dev/null 2>&1 &)", tap.host()));
        guest.delete(&Request::DeleteNetworkInterface(tap.name()), 1 + round % 2);
        guest.run("while [ -e /sys/class/net/eth0 ]; do sleep 0.1; done; killall ping; true");
        while !guest.api.vm_config().unwrap().network_interfaces.is_empty() {
            guest.run("sleep 0.1");
        }
        assert_eq!(back_ends(guest.vmm.pid()), 0, "round {round}");
        while kernels_threads(&guest) > 0 {
            guest.run("sleep 0.1");
        }
    }
    guest.power_off();
}

#[test]
fn a_driver_that_breaks_the_rules_is_told_by_the_kernels_word_and_the_next_one_works() {
    let tap = Tap::new(34, &[]);
    let mut guest = guest_on(&tap, None, Setup::default());
    tap::bad_driver(&mut guest, "eth0");
    let log = guest.vmm.log();
    assert!(log.contains("Network needs a reset: the driver broke the rules of queue 1"), "{log}");
    tap.set_up(&mut guest, "eth0", None);
    there_and_back(&mut guest, &tap, 4300, 1 << 20);
    guest.power_off();
}

#[test]
fn what_the_kernel_cannot_do_is_refused_with_the_reason() {
    let tap = Tap::new(35, &[]);
    let mut guest = Guest::configured(Setup::default());
    let limiter = Some(RateLimiter::default());
    let limited = NetworkInterface { rx_rate_limiter: limiter, ..tap.interface_with_vhost() };
    refused(&mut guest, &Request::PutNetworkInterface(limited), &["`vhost` is true", "`rx_rate_limiter`"]);
    guest.apply(Request::PutNetworkInterface(tap.interface_with_vhost()));
    // Again, in its own place: it has one user, and that is us.
    guest.apply(Request::PutNetworkInterface(tap.interface_with_vhost()));
    let mmds = MmdsConfig {
        network_interfaces: vec![tap.name()],
        version: MmdsVersion::V2,
        ipv4_address: Some(DEFAULT_MMDS_ADDRESS),
        imds_compat: false,
    };
    refused(&mut guest, &Request::PutMmdsConfig(mmds), &["`vhost` is true", "tap35", "/mmds/config"]);
    assert_eq!(guest.api.vm_config().unwrap().network_interfaces, [tap.interface_with_vhost()]);
    guest.apply(Request::Action(api_socket::ActionType::InstanceStart));
    let update = NetworkInterfaceUpdate {
        iface_id: tap.name(),
        tx_rate_limiter: limiter,
        ..NetworkInterfaceUpdate::default()
    };
    refused(&mut guest, &Request::PatchNetworkInterface(update), &["`vhost` is true", "`tx_rate_limiter`"]);
}

#[test]
fn a_cell_has_the_kernels_back_end_only_where_that_is_asked_for_or_handed_over() {
    let tap = Tap::new(36, &["user", &UID.to_string()]);
    let interface = tap.interface_with_vhost();
    let put = |interface: &NetworkInterface| Request::PutNetworkInterface(interface.clone());
    {
        let cells = Cells::new();
        let _vmm = cells.start(&[]);
        let error = cells.client().apply(&put(&interface)).unwrap_err().to_string();
        for word in ["`vhost` is true", VHOST, "modprobe vhost_net", "--vhost-net", "`vhost_fds`"] {
            assert!(error.contains(word), "{word:?} is not in: {error}");
        }
    }
    {
        let cells = Cells::new();
        let _vmm = cells.start(&["--vhost-net"]);
        cells.client().apply(&put(&interface)).unwrap();
    }
    {
        let cells = Cells::rootless();
        chown(VHOST, None, Some(GID)).unwrap();
        fs::set_permissions(VHOST, Permissions::from_mode(0o660)).unwrap();
        // As udev leaves it.
        fs::set_permissions("/dev/net/tun", Permissions::from_mode(0o666)).unwrap();
        let _vmm = cells.start(&["--vhost-net"]);
        cells.client().apply(&put(&interface)).unwrap();
        assert!(cells.root().join("dev/vhost-net").exists());
    }
    let cells = Cells::new();
    let device = File::options().read(true).write(true).open(VHOST).unwrap();
    let device = process::passable(device).unwrap();
    let flag = format!("--fd=network={}", process::number(&device));
    let mut command = cells.jailer(&[&flag]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let _vmm = Vmm { child: process::spawn_bound(&mut command, vec![device]).unwrap() };
    let handed = |names: &str| NetworkInterface { vhost_fds: Some(names.into()), ..interface.clone() };
    let mut api = cells.client();
    for (names, words) in [
        ("fd:network,fd:network", "twice"),
        ("fd:other", "these were: network"),
        ("/dev/vhost-net", "must be `fd:NAME`"),
    ] {
        let error = api.apply(&put(&handed(names))).unwrap_err().to_string();
        assert!(error.contains("`vhost_fds`") && error.contains(words), "{names}: {error}");
    }
    // Twice: what it was configured with is ours.
    api.apply(&put(&handed("fd:network"))).unwrap();
    api.apply(&put(&handed("fd:network"))).unwrap();
    assert_eq!(api.vm_config().unwrap().network_interfaces, [handed("fd:network")]);
}
