//! A guest's network interface: frames of every size cross it both ways and arrive as they were sent, whatever the
//! transport, the MTU and the limits; and what is wrong with a tap is said.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;

use api_socket::{NetworkInterface, NetworkInterfaceUpdate, RateLimiter, Request, TokenBucket};
use berth_tests::guest::tap::{Tap, host};
use berth_tests::guest::{Guest, Name, Setup, limits, md5};

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

/// The other end of the guest's next connection to a port of the host, which `talk` is called with.
fn serve<T: Send + 'static>(
    tap: &Tap,
    port: u16,
    talk: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> thread::JoinHandle<T> {
    let listener = TcpListener::bind((tap.host(), port)).unwrap();
    thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(limits::COMMAND)).unwrap();
        stream.set_write_timeout(Some(limits::COMMAND)).unwrap();
        talk(stream)
    })
}

#[test]
fn streams_arrive_as_they_were_sent_with_every_size_of_packet() {
    let tap = Tap::new(0, &[]);
    let mut guest = guest_on(&tap, Setup::default());
    guest.run(&format!("head -c {BYTES} /dev/urandom > /run/words"));
    let sum = guest.run("md5sum < /run/words");
    for (number, mtu) in (0..).zip([576, 1500, 9000, LARGEST_MTU]) {
        tap.set_mtu(mtu);
        guest.run(&format!("ip link set eth0 mtu {mtu}"));
        let port = 4000 + 2 * number;
        let server = serve(&tap, port, |mut stream| {
            let mut words = Vec::new();
            stream.read_to_end(&mut words).unwrap();
            words
        });
        guest.run(&format!("nc {} {port} < /run/words", tap.host()));
        let words = server.join().unwrap();
        assert_eq!(md5(&words), sum, "to the host with an MTU of {mtu}");

        let port = port + 1;
        let server = serve(&tap, port, move |mut stream| {
            stream.write_all(&words).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            // Until the guest has all of it.
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let heard = guest.run(&format!("nc {} {port} < /dev/null | md5sum", tap.host()));
        server.join().unwrap();
        assert_eq!(heard, sum, "to the guest with an MTU of {mtu}");
    }
    // Whole segments cross the wire, and not one packet for each.
    let packets = guest.metric("net", "tx_packets_count");
    assert!(packets < (4 * BYTES / 576) as u64, "{packets} packets");
    for key in ["rx_fails", "tx_fails", "tx_malformed_frames", "tap_read_fails", "tap_write_fails"] {
        assert_eq!(guest.metric("net", key), 0, "{key}");
    }
    guest.power_off();
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
