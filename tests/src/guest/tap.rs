//! A tap of the host with an address, for a guest's network interface, and the two ends' addresses.

use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::thread;

use api_socket::NetworkInterface;

use super::{Guest, limits};

/// A tap that is there as long as the value is. Its number makes its name, its network and the guest's address.
pub struct Tap {
    pub number: u8,
}

impl Tap {
    /// Makes tap N with the address 10.77.N.1, up. `options` are those of `ip tuntap add`, such as `multi_queue`.
    pub fn new(number: u8, options: &[&str]) -> Tap {
        // A host that has them built in has no such modules. What a running guest is to get must be there when it starts.
        let _ = Command::new("modprobe").args(["-a", "tun", "vhost_net"]).output();
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

    /// The same, with the host's kernel to move the packets.
    pub fn interface_with_vhost(&self) -> NetworkInterface {
        NetworkInterface { vhost: Some(true), ..self.interface() }
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

/// A driver in the guest's shell for the network device whose directory it is in: on PCI it takes the place of the transport's
/// driver (VIRTIO 1.3, 4.1.4.3), and without it that of the device's driver (4.2.2), for which the kernel must have been
/// started with `iomem=relaxed`. It starts the transmit queue and, if `$queues` say so, the receive queue. `$avail` is where
/// the available rings are, and so what is in them. `devmem` writes what nobody else has.
const OWN_DRIVER: &str = "\
    parent=$(readlink -f device/..); cd /; if [ -e $parent/vendor ]; then pci=${parent##*/}; \
    echo $pci > /sys/bus/pci/drivers/virtio-pci/unbind; echo 1 > $parent/enable; \
    printf '\\006' | dd of=$parent/config bs=1 seek=4 conv=notrunc 2> /dev/null; read -r base rest < $parent/resource; \
    put() { devmem $((base + $1)) $2 $3; }; status() { put 0x14 8 $1; }; told() { echo $(($(devmem $((base + 0x14)) 8))); }; \
    features() { put 0x08 32 0; put 0x0c 32 0; put 0x08 32 1; put 0x0c 32 1; }; \
    queue() { put 0x16 16 $1; put 0x20 32 0x31000; put 0x24 32 0; put 0x28 32 $avail; put 0x2c 32 0; \
    put 0x30 32 0x30000; put 0x34 32 0; put 0x1c 16 1; }; \
    again() { echo $pci > /sys/bus/pci/drivers/virtio-pci/bind; }; else";

const OWN_DRIVER_WITHOUT_PCI: &str = "\
    virtio=$(basename $parent/virtio*); echo $virtio > /sys/bus/virtio/drivers/virtio_net/unbind; \
    base=0x$(grep ${parent##*/} /proc/iomem | head -n 1 | sed 's/^ *//; s/-.*//'); \
    put() { devmem $((base + $1)) 32 $2; }; status() { put 0x70 $1; }; told() { echo $(($(devmem $((base + 0x70)) 32))); }; \
    features() { put 0x24 0; put 0x20 0; put 0x24 1; put 0x20 1; }; \
    queue() { put 0x30 $1; put 0x38 16; put 0x80 0x31000; put 0x84 0; put 0x90 $avail; put 0x94 0; \
    put 0xa0 0x30000; put 0xa4 0; put 0x44 1; }; \
    again() { echo $virtio > /sys/bus/virtio/drivers/virtio_net/bind; }; fi";

const OWN_DRIVER_STARTS: &str = "\
    for step in 0 1 3; do status $step; done; features; status 11; for queue in $queues; do queue $queue; done; status 15";

/// Puts a driver that breaks the rules in the place of the one that the guest's `device` has, until it is told that the
/// device needs a reset; then the right one finds it again.
#[track_caller]
pub fn bad_driver(guest: &mut Guest, device: &str) {
    // The kernel's command line, which no ring looks like.
    own_driver(guest, device, "1", "0x20000");
    guest.run("until [ $(($(told) & 64)) = 64 ]; do sleep 0.1; done; status 0");
    right_driver(guest, device);
}

/// Puts a driver that has no buffers for packets in the place of the one that the guest's `device` has. `status 0` in the
/// guest's shell ends it.
#[track_caller]
pub fn driver_without_buffers(guest: &mut Guest, device: &str) {
    // Low memory that nobody has used.
    own_driver(guest, device, "0 1", "0x32000");
    assert_eq!(guest.run("told"), "15\n", "it runs");
}

#[track_caller]
fn own_driver(guest: &mut Guest, device: &str, queues: &str, avail: &str) {
    guest.run(&format!(
        "cd /sys/class/net/{device}; queues='{queues}'; avail={avail}; {OWN_DRIVER} {OWN_DRIVER_WITHOUT_PCI}; {OWN_DRIVER_STARTS}"
    ));
}

/// Gives the device back to the driver that it had before.
#[track_caller]
pub fn right_driver(guest: &mut Guest, device: &str) {
    guest.run(&format!("again; until [ -e /sys/class/net/{device} ]; do sleep 0.1; done"));
}

/// The other end of the guest's next connection to a port of the host, which `talk` is called with.
pub fn serve<T: Send + 'static>(
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
