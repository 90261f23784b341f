//! A guest's network interface: frames of every size cross it both ways and arrive as they were sent, whatever the
//! transport, the MTU and the limits; and what is wrong with a tap is said.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use berth_tests::guest::tap::{Tap, host};
use berth_tests::guest::{Guest, Name, Setup};

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
