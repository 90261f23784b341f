//! A tap of the host with an address, for a guest's network interface, and the two ends' addresses.

use std::process::{Command, Output};

use api_socket::NetworkInterface;

use super::Guest;

/// A tap that is there as long as the value is. Its number makes its name, its network and the guest's address.
pub struct Tap {
    pub number: u8,
}

impl Tap {
    /// Makes tap N with the address 10.77.N.1, up. `options` are those of `ip tuntap add`, such as `multi_queue`.
    pub fn new(number: u8, options: &[&str]) -> Tap {
        // A host that has it built in has no such module.
        let _ = Command::new("modprobe").arg("tun").output();
        let tap = Tap { number };
        let name = tap.name();
        host("ip", &[&["tuntap", "add", "dev", &name, "mode", "tap"], options].concat());
        host("ip", &["address", "add", &format!("{}/24", tap.host()), "dev", &name]);
        host("ip", &["-6", "address", "add", &format!("{}/64", tap.host6()), "dev", &name, "nodad"]);
        host("ip", &["link", "set", &name, "up"]);
        tap
    }

    /// Its name, and the id of its interface.
    pub fn name(&self) -> String {
        format!("tap{}", self.number)
    }

    /// The host's address.
    pub fn host(&self) -> String {
        format!("10.77.{}.1", self.number)
    }

    /// The guest's address.
    pub fn guest(&self) -> String {
        format!("10.77.{}.2", self.number)
    }

    pub fn host6(&self) -> String {
        format!("fd77:{}::1", self.number)
    }

    pub fn guest6(&self) -> String {
        format!("fd77:{}::2", self.number)
    }

    /// The interface that a guest gets on it.
    pub fn interface(&self) -> NetworkInterface {
        NetworkInterface {
            iface_id: self.name(),
            host_dev_name: self.name(),
            guest_mac: Some(format!("06:00:0a:4d:{:02x}:02", self.number).parse().expect("an address")),
            ..NetworkInterface::default()
        }
    }

    /// Sets the MTU of the host's end.
    pub fn set_mtu(&self, mtu: u16) {
        host("ip", &["link", "set", &self.name(), "mtu", &mtu.to_string()]);
    }

    /// Gives the guest's `device` its addresses, and an MTU if it is to have another than it has.
    pub fn set_up(&self, guest: &mut Guest, device: &str, mtu: Option<u16>) {
        let mtu = mtu.map_or_else(String::new, |mtu| format!("ip link set {device} mtu {mtu} &&"));
        guest.run(&format!(
            "{mtu} echo 0 > /proc/sys/net/ipv6/conf/{device}/dad_transmits && ip link set {device} up && \
             ip address add {}/24 dev {device} && ip address add {}/64 dev {device}",
            self.guest(),
            self.guest6()
        ));
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", &self.name()]).output();
    }
}

/// Runs a command of the host that must succeed, and gives what it printed.
#[track_caller]
pub fn host(program: &str, arguments: &[&str]) -> String {
    let Output { status, stdout, stderr } =
        Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&stdout).into_owned();
    let errors = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{program} {arguments:?}: {status}\n{text}{errors}");
    text
}
