//! A guest's network interface: frames of every size cross it both ways and arrive as they were sent, whatever the
//! transport, the MTU and the limits; and what is wrong with a tap is said.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, UdpSocket};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use api_socket::{NetworkInterface, NetworkInterfaceUpdate, RateLimiter, Request, TokenBucket};
use berth_tests::footprint::Footprint;
use berth_tests::guest::tap::{self, Tap, host, serve};
use berth_tests::guest::{Guest, Name, Setup, debian_drive, md5, times};

/// Of a tap.
const LARGEST_MTU: u16 = 65521;

/// Enough to go round every ring many times.
const BYTES: usize = 4 << 20;

fn guest_on(tap: &Tap, setup: Setup) -> Guest {
    let arguments = ["--metrics-path", "metrics"].map(String::from).into();
    let mut guest = Guest::booted(Setup { interfaces: vec![tap.interface()], arguments, ..setup });
    tap.set_up(&mut guest, "eth0", None);
    guest
}

#[test]
fn host_and_guest_reach_one_another() {
    reach(Name::Berth);
}

#[test]
fn host_and_guest_reach_one_another_without_pci() {
    reach(Name::Firecracker);
}

fn reach(name: Name) {
    let tap = Tap::new(0, &[]);
    let mut guest = guest_on(&tap, Setup { name, ..Setup::default() });
    assert_eq!(guest.run("cat /sys/class/net/eth0/address"), "06:00:0a:4d:00:02\n");
    guest.run(&format!("ping -c 3 -i 0.2 {}", tap.host()));
    for address in [tap.guest(), tap.guest6()] {
        for size in ["0", "56", "1400", "8000", "60000"] {
            host("ping", &["-c", "3", "-i", "0.05", "-s", size, "-W", "30", &address]);
        }
    }
    assert!(guest.metric("net", "rx_packets_count") > 0);
    assert!(guest.metric("net_tap0", "tx_bytes_count") > 60000);
    for key in ["rx_fails", "tx_fails", "tap_read_fails", "tap_write_fails", "tx_spoofed_mac_count"] {
        assert_eq!(guest.metric("net", key), 0, "{key}");
    }
    guest.power_off();
}

#[test]
fn streams_arrive_as_they_were_sent_with_every_size_of_packet_and_whole_segments_cross() {
    streams_arrive(Name::Berth);
}

#[test]
fn streams_arrive_as_they_were_sent_with_every_size_of_packet_and_whole_segments_cross_without_pci() {
    streams_arrive(Name::Firecracker);
}

/// What TCP and IP put before the data of a packet, time stamps with it.
const HEADERS: usize = 52;

/// As many packets on a wire are one between host and guest, at least: far fewer than there are, for a sender does not wait
/// until a segment is full. With the largest MTU a packet is a segment.
const PACKETS_IN_A_SEGMENT: [(u16, u64); 4] = [(576, 5), (1500, 5), (9000, 1), (LARGEST_MTU, 0)];

fn streams_arrive(name: Name) {
    let tap = Tap::new(0, &[]);
    let mut guest = guest_on(&tap, Setup { name, ..Setup::default() });
    guest.run(&format!("head -c {BYTES} /dev/urandom > /run/words"));
    let sum = guest.run("md5sum < /run/words");
    for (number, (mtu, packets_in_a_segment)) in (0..).zip(PACKETS_IN_A_SEGMENT) {
        tap.set_mtu(mtu);
        guest.run(&format!("ip link set eth0 mtu {mtu}"));
        let on_a_wire = BYTES / (usize::from(mtu) - HEADERS);
        let few = |guest: &mut Guest, before: u64, key: &str| {
            let packets = guest.metric("net", key) - before;
            println!("{key} with an MTU of {mtu}: {packets}, and {on_a_wire} on a wire");
            assert!(
                packets * packets_in_a_segment <= on_a_wire as u64,
                "{key} with an MTU of {mtu}: {packets} for what would be {on_a_wire} packets on a wire"
            );
        };
        let port = 4000 + 2 * number;
        let server = serve(&tap, port, |mut stream| {
            let mut words = Vec::new();
            stream.read_to_end(&mut words).unwrap();
            words
        });
        let before = guest.metric("net", "tx_packets_count");
        guest.run(&format!("nc {} {port} < /run/words", tap.host()));
        let words = server.join().unwrap();
        assert_eq!(md5(&words), sum, "to the host with an MTU of {mtu}");
        few(&mut guest, before, "tx_packets_count");

        let port = port + 1;
        let server = serve(&tap, port, move |mut stream| {
            stream.write_all(&words).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            // Until the guest has all of it.
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let before = guest.metric("net", "rx_packets_count");
        let heard = guest.run(&format!("nc {} {port} < /dev/null | md5sum", tap.host()));
        server.join().unwrap();
        assert_eq!(heard, sum, "to the guest with an MTU of {mtu}");
        few(&mut guest, before, "rx_packets_count");
    }
    for key in ["rx_fails", "tx_fails", "tx_malformed_frames", "tap_read_fails", "tap_write_fails"] {
        assert_eq!(guest.metric("net", key), 0, "{key}");
    }
    guest.power_off();
}

#[test]
fn a_guest_has_the_mtu_that_its_interface_is_given_and_else_the_usual_one() {
    for name in [Name::Berth, Name::Firecracker] {
        let mtus = [Some(68), None, Some(1400), Some(9000), Some(LARGEST_MTU)];
        let taps: Vec<Tap> = (57..).take(mtus.len()).map(|number| Tap::new(number, &[])).collect();
        let interface = |(tap, mtu): (&Tap, Option<u16>)| {
            // The tap's own is another matter.
            tap.set_mtu(4000);
            NetworkInterface { mtu, ..tap.interface() }
        };
        let interfaces = taps.iter().zip(mtus).map(interface).collect();
        let mut guest = Guest::booted(Setup { name, interfaces, ..Setup::default() });
        for (number, mtu) in mtus.into_iter().enumerate() {
            let has = guest.number(&format!("cat /sys/class/net/eth{number}/mtu"));
            assert_eq!(has, u64::from(mtu.unwrap_or(1500)), "{mtu:?}");
        }
        guest.power_off();
    }
}

#[test]
fn a_limit_holds_packets_back_and_can_be_lifted_while_the_guest_runs() {
    let tap = Tap::new(0, &[]);
    let limit = |size| {
        let ops = TokenBucket { size, one_time_burst: None, refill_time: 3_600_000 };
        Some(RateLimiter { bandwidth: None, ops: Some(ops) })
    };
    let slow = NetworkInterface { tx_rate_limiter: limit(1), ..tap.interface() };
    let arguments = ["--metrics-path", "metrics"].map(String::from).into();
    let mut guest = Guest::booted(Setup { interfaces: vec![slow], arguments, ..Setup::default() });
    tap.set_up(&mut guest, "eth0", None);
    let ping = format!("ping -c 1 -W 3 {}", tap.host());
    guest.run(&format!("! {ping}"));
    assert!(guest.metric("net_tap0", "tx_rate_limiter_throttled") > 0);
    let lifted =
        NetworkInterfaceUpdate { iface_id: tap.name(), tx_rate_limiter: limit(0), ..Default::default() };
    guest.apply(Request::PatchNetworkInterface(lifted));
    guest.run(&format!("ping -c 1 -W 30 {}", tap.host()));
    guest.power_off();
}

#[test]
fn what_is_wrong_with_a_tap_is_said() {
    // First, as it brings the module.
    let tap = Tap::new(3, &[]);
    let mut guest = Guest::configured(Setup::default());
    let settings = |name: &str| NetworkInterface {
        iface_id: "net".into(),
        host_dev_name: name.into(),
        ..NetworkInterface::default()
    };
    for name in ["lo", "a-name-that-is-too-long", "fd:nothing"] {
        let request = Request::PutNetworkInterface(settings(name));
        let error = guest.api.apply(&request).unwrap_err().to_string();
        assert!(error.contains("`host_dev_name`") && error.contains(name), "{name}: {error}");
    }
    guest.apply(Request::PutNetworkInterface(tap.interface()));
    // A tap has one user at a time.
    let mut second = Guest::configured(Setup::default());
    let error = second.api.apply(&Request::PutNetworkInterface(tap.interface())).unwrap_err().to_string();
    assert!(error.contains("`host_dev_name`") && error.contains("tap3"), "{error}");
}

/// Packets for a guest that does not read.
const UNREAD: u32 = 20_000;

/// How often the VMM's threads, vCPUs aside, may wake up for them; what it may grow by.
const WAKE_UPS: u64 = 500;
const GROWTH_KIB: u64 = 1024;

/// How often the threads of a VMM that are not vCPUs have been given a CPU.
fn wake_ups(guest: &Guest) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{}/task", guest.vmm.pid())).unwrap();
    let of = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        if field("Name").is_none_or(|name| name.contains("vcpu") || name.contains("kvm-")) {
            return 0;
        }
        let number = |name: &str| field(name).and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0);
        number("voluntary_ctxt_switches") + number("nonvoluntary_ctxt_switches")
    };
    tasks.flatten().map(of).sum()
}

#[test]
fn a_guest_that_does_not_read_costs_the_host_no_work_and_no_memory() {
    unread(Name::Berth, false, 50);
}

#[test]
fn a_guest_that_does_not_read_costs_the_host_no_work_and_no_memory_without_pci() {
    unread(Name::Firecracker, false, 54);
}

#[test]
fn a_guest_that_does_not_read_costs_the_host_no_work_and_no_memory_with_the_kernel() {
    unread(Name::Berth, true, 51);
}

#[test]
fn a_guest_that_does_not_read_costs_the_host_no_work_and_no_memory_with_the_kernel_and_without_pci() {
    unread(Name::Firecracker, true, 55);
}

fn unread(name: Name, vhost: bool, number: u8) {
    let tap = Tap::new(number, &[]);
    let settings = if vhost { tap.interface_with_vhost() } else { tap.interface() };
    // Registers that a driver of the kernel has are another one's only so.
    let command_line = "iomem=relaxed".into();
    let mut guest =
        Guest::booted(Setup { name, interfaces: vec![settings], command_line, ..Setup::default() });
    tap.set_up(&mut guest, "eth0", None);
    host("ping", &["-c", "1", "-W", "30", &tap.guest()]);
    let mac = tap.interface().guest_mac.unwrap().to_string();
    let flood = |guest: &mut Guest, state: &str| {
        host(
            "ip",
            &["neigh", "replace", &tap.guest(), "lladdr", &mac, "dev", &tap.name(), "nud", "permanent"],
        );
        let own_kib = |guest: &Guest| {
            Footprint::beyond_guest(guest.vmm.pid(), guest.setup().memory_mib).unwrap().rss_kib
        };
        let (woken, memory) = (wake_ups(guest), own_kib(guest));
        let socket = UdpSocket::bind((tap.host(), 0)).unwrap();
        for number in 0..times(UNREAD, 50 * UNREAD) {
            // What finds no room is dropped, which is no error of the sender's.
            let _ = socket.send_to(&[number as u8; 1000], (tap.guest(), 9));
        }
        let woken = wake_ups(guest) - woken;
        assert!(woken < WAKE_UPS, "{state}: the VMM was woken {woken} times");
        let memory = own_kib(guest).saturating_sub(memory);
        assert!(memory < GROWTH_KIB, "{state}: the VMM has grown by {memory} KiB");
    };
    guest.run("ip link set eth0 down");
    flood(&mut guest, "the interface is down");
    tap::driver_without_buffers(&mut guest, "eth0");
    flood(&mut guest, "there are no buffers");
    guest.run("status 0");
    flood(&mut guest, "there is no driver");
    tap::right_driver(&mut guest, "eth0");
    tap.set_up(&mut guest, "eth0", None);
    host("ping", &["-c", "1", "-W", "30", &tap.guest()]);
    guest.power_off();
}

/// Of what two interfaces send together, the one with one stream beside eight gets this part at least. It had a 40th to an eighth
/// here: how much, TCP decides, which waits behind the other's turns with each of its windows. Nobody is starved.
const SHARE: u64 = 100;

#[test]
fn an_interface_that_is_flooded_leaves_another_its_share() {
    let taps = [Tap::new(52, &[]), Tap::new(53, &[])];
    let interfaces = taps.iter().map(Tap::interface).collect();
    let setup =
        Setup { vcpus: 2, memory_mib: 256, drives: vec![debian_drive()], interfaces, ..Setup::default() };
    let mut guest = Guest::booted(setup);
    guest.mount_debian();
    // Where iperf3 keeps what it sends.
    guest.run("mount -t tmpfs tmp /debian/tmp");
    for (tap, device) in taps.iter().zip(["eth0", "eth1"]) {
        tap.set_up(&mut guest, device, None);
    }
    let seconds = times(4, 60);
    // Both ways: packets for the guest take the io thread as much as those from it.
    for (round, direction) in ["", "-R"].into_iter().enumerate() {
        let bytes = |tap: &Tap| {
            let count = |side: &str| {
                let path = format!("/sys/class/net/{}/statistics/{side}_bytes", tap.name());
                fs::read_to_string(path).unwrap().trim().parse::<u64>().unwrap()
            };
            count("rx") + count("tx")
        };
        let before = taps.each_ref().map(bytes);
        let mut servers = Vec::new();
        for (tap, streams) in taps.iter().zip([8, 1]) {
            let port = (5900 + round).to_string();
            let mut server = Command::new("iperf3");
            server.args(["-s", "-1", "-B", &tap.host(), "-p", &port]).stdout(Stdio::null());
            servers.push(server.spawn().unwrap());
            let address = tap.host();
            guest.run(&format!(
                "(until chroot /debian iperf3 -c {address} -p {port} -t {seconds} -P {streams} {direction} > /dev/null 2>&1; \
                 do sleep 0.2; done; touch /run/done-{round}-{streams}) &"
            ));
        }
        thread::sleep(Duration::from_secs(1));
        host("ping", &["-c", "5", "-i", "0.2", "-W", "30", &taps[1].guest()]);
        guest.run(&format!(
            "until [ -e /run/done-{round}-8 ] && [ -e /run/done-{round}-1 ]; do sleep 0.2; done"
        ));
        for mut server in servers {
            server.wait().unwrap();
        }
        let [flooded, other] = [0, 1].map(|place: usize| bytes(&taps[place]) - before[place]);
        println!("{direction}: {flooded} bytes on the one and {other} on the other");
        assert!(other * SHARE > flooded + other, "{direction}: {other} bytes beside {flooded}");
    }
    guest.power_off();
}
