//! The guest's network, as the kernel command line says it (`berth.address`, `berth.gateway`, `berth.dns`), for images that do
//! not set up one themselves.
//!
//! It comes after the image's own means and never instead: it waits for the root and for udev, which may rename the interface,
//! leaves an interface alone that has an address, and overwrites no /etc/resolv.conf that says something. An address that the
//! image's manager takes away without giving another is put back, for a minute.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::changes::Changes;
use crate::command_line::CommandLine;
use crate::kernel::{self, Kernel, tell, warn};
use crate::netlink::Netlink;
use crate::root;

/// Name servers; resolv.conf(5) takes three.
const MAX_SERVERS: usize = 3;

/// Between two looks for the root: at first so long, then twice as long each time, and no longer than the last.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// How often is looked for the interface, if the kernel announces none.
const INTERFACE_PAUSE: Duration = Duration::from_secs(60);

/// How long a udev may take to give the interface its name.
const UDEV_LIMIT: Duration = Duration::from_secs(15);

/// Seconds after setting it up, and then after each look before, at which is looked whether the interface still has an address.
const LOOKS: [u64; 6] = [1, 2, 4, 8, 16, 32];

const RESOLV_CONF: &str = "/etc/resolv.conf";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    address: Ipv4Addr,
    prefix: u8,
    gateway: Option<Ipv4Addr>,
    servers: Vec<Ipv4Addr>,
}

impl Network {
    /// None if nothing is said of an address.
    pub fn parse(command_line: &CommandLine) -> Result<Option<Network>, String> {
        let Some(text) = command_line.value("berth.address") else { return Ok(None) };
        let wrong = || format!("berth.address={text} is no address like 10.87.0.5/16");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address = address.parse().map_err(|_| wrong())?;
        let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32).ok_or_else(wrong)?;
        let parse = |name: &str, text: &str| {
            text.parse().map_err(|_| format!("{name}={text} is no address like 10.87.0.1"))
        };
        let gateway =
            command_line.value("berth.gateway").map(|text| parse("berth.gateway", text)).transpose()?;
        let servers =
            command_line.value("berth.dns").unwrap_or_default().split(',').filter(|text| !text.is_empty());
        let servers =
            servers.take(MAX_SERVERS).map(|text| parse("berth.dns", text)).collect::<Result<_, _>>()?;
        Ok(Some(Network { address, prefix, gateway, servers }))
    }
}

/// Sets the network up in a thread, which ends when that is done.
pub fn start(kernel: Kernel<'static>) {
    let command_line = CommandLine::parse(&kernel.command_line().unwrap_or_default());
    let network = match Network::parse(&command_line) {
        Ok(Some(network)) => network,
        Ok(None) => return,
        Err(error) => return warn(&error),
    };
    let set_up = move || {
        if let Err(error) = set_up(kernel, &network) {
            warn(&format!("the network is not set up: {error}"));
        }
    };
    if let Err(error) = thread::Builder::new().spawn(set_up) {
        warn(&format!("no thread for the network: {error}"));
    }
}

fn set_up(kernel: Kernel, network: &Network) -> io::Result<()> {
    let netlink = Netlink::new()?;
    let changes = Changes::new();
    let mut pause = FIRST_PAUSE;
    while !root::is_ready(kernel)? {
        thread::sleep(pause);
        pause = (pause * 2).min(LAST_PAUSE);
    }
    // Its files are looked at from here on.
    root::enter(kernel)?;
    if let Some(loopback) = index(kernel, "lo") {
        netlink.up(loopback)?;
    }
    let interface = loop {
        match interface(kernel) {
            Some(interface) => break interface,
            None => changes.wait("/net/", INTERFACE_PAUSE),
        }
    };
    wait_for_udev(interface);
    let is_ours = is_missing(&netlink, interface)?;
    if is_ours {
        apply(&netlink, interface, network)?;
        tell(&format!("the network has the address {}/{}", network.address, network.prefix));
    } else {
        tell("the image has set up its network itself");
    }
    match offer_servers(Path::new(RESOLV_CONF), &network.servers) {
        Ok(false) => {}
        Ok(true) => tell(&format!("{RESOLV_CONF} is made, for it said nothing")),
        Err(error) => warn(&format!("{RESOLV_CONF} is not made: {error}")),
    }
    for seconds in LOOKS {
        thread::sleep(Duration::from_secs(seconds));
        if is_missing(&netlink, interface)? {
            apply(&netlink, interface, network)?;
            tell("the network's address was taken away and is put back");
        }
    }
    Ok(())
}

fn apply(netlink: &Netlink, interface: u32, network: &Network) -> io::Result<()> {
    netlink.up(interface)?;
    netlink.add_address(interface, network.address, network.prefix)?;
    network.gateway.map_or(Ok(()), |gateway| netlink.add_default_route(interface, gateway))
}

/// It has no address, or one that it gave itself for want of another.
fn is_missing(netlink: &Netlink, interface: u32) -> io::Result<bool> {
    Ok(netlink.addresses(interface)?.iter().all(Ipv4Addr::is_link_local))
}

/// The number of the first interface that is a virtio device.
fn interface(kernel: Kernel) -> Option<u32> {
    let names = kernel::names(kernel.sys, "class/net");
    let is_virtio = |name: &&String| {
        kernel
            .link_name(&format!("class/net/{name}/device/driver"))
            .is_some_and(|driver| driver == "virtio_net")
    };
    names.iter().filter(is_virtio).filter_map(|name| index(kernel, name)).min()
}

fn index(kernel: Kernel, name: &str) -> Option<u32> {
    kernel::read(kernel.sys, &format!("class/net/{name}/ifindex")).ok()?.parse().ok()
}

/// Where there is a udev, it marks an interface when it is done with it.
fn wait_for_udev(interface: u32) {
    let exists = |path: &str| Path::new(path).exists();
    let done = format!("/run/udev/data/n{interface}");
    let begin = Instant::now();
    while (exists("/run/systemd/system") || exists("/run/udev")) && !exists(&done) {
        if begin.elapsed() > UDEV_LIMIT {
            return;
        }
        thread::sleep(FIRST_PAUSE);
    }
}

/// Writes name servers where nothing is said of any. True if it did.
fn offer_servers(path: &Path, servers: &[Ipv4Addr]) -> io::Result<bool> {
    let says_something = match fs::read_to_string(path) {
        Ok(text) => text.lines().any(|line| !line.trim().is_empty() && !line.starts_with(['#', ';'])),
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(error),
    };
    if says_something || servers.is_empty() {
        return Ok(false);
    }
    // A link leads to where a resolver of the image's keeps its own file, mostly in /run, and that one will overwrite it there.
    let target = match fs::read_link(path) {
        Ok(target) => path.parent().unwrap_or(Path::new("/")).join(target),
        Err(_) => PathBuf::from(path),
    };
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    let lines: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    fs::write(&target, lines)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn parse(text: &str) -> Result<Option<Network>, String> {
        Network::parse(&CommandLine::parse(text))
    }

    #[test]
    fn a_network_is_what_the_command_line_says() {
        let full = "berth.address=10.87.0.5/16 berth.gateway=10.87.0.1 berth.dns=10.0.0.2,10.0.0.3";
        let wanted = Network {
            address: [10, 87, 0, 5].into(),
            prefix: 16,
            gateway: Some([10, 87, 0, 1].into()),
            servers: vec![[10, 0, 0, 2].into(), [10, 0, 0, 3].into()],
        };
        assert_eq!(parse(full), Ok(Some(wanted)));
        assert_eq!(parse("root=/dev/vda"), Ok(None));
        for wrong in ["berth.address=10.87.0.5", "berth.address=10.87.0.5/33", "berth.address=a/8"] {
            assert!(parse(wrong).unwrap_err().contains(wrong), "{wrong}");
        }
        for wrong in ["berth.gateway=x", "berth.dns=x"] {
            assert!(
                parse(&format!("berth.address=10.0.0.1/8 {wrong}")).unwrap_err().contains(wrong),
                "{wrong}"
            );
        }
    }

    #[test]
    fn name_servers_are_written_only_where_nothing_is_said() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("resolv.conf");
        let servers = [[10, 0, 0, 2].into()];
        let offer = || offer_servers(&path, &servers).unwrap();
        assert!(offer());
        assert_eq!(fs::read_to_string(&path).unwrap(), "nameserver 10.0.0.2\n");
        assert!(!offer());
        fs::write(&path, "# nothing\n\n").unwrap();
        assert!(offer());
        fs::remove_file(&path).unwrap();
        symlink("run/resolve/stub", &path).unwrap();
        assert!(offer());
        assert_eq!(
            fs::read_to_string(scratch.path().join("run/resolve/stub")).unwrap(),
            "nameserver 10.0.0.2\n"
        );
        assert!(fs::symlink_metadata(&path).unwrap().is_symlink());
        assert!(!offer_servers(&scratch.path().join("none"), &[]).unwrap());
    }
}
