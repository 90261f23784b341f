//! Network interfaces: what a client says of one becomes an attached tap.

use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use api_socket::{
    Fault, MTU, MacAddress, NetworkInterface, NetworkInterfaceUpdate, QUEUE_PAIRS, RateLimiter,
};
use devices::backend::tap::{self, Tap};
use devices::backend::vhost_net::VhostNet;
use devices::virtio::net::Neighbour;

use super::check_io_thread;
use crate::handed::Handed;

/// Where taps come from.
pub const TUN: &str = "/dev/net/tun";

/// Where the kernel's back-ends come from.
pub const VHOST: &str = "/dev/vhost-net";

/// A network interface and its tap.
pub struct Interface {
    pub settings: NetworkInterface,
    pub tap: Tap,
    /// The kernel's back-ends, one for each queue pair, if it moves the packets.
    pub vhost: Vec<VhostNet>,
    /// Who answers on it beside the tap.
    pub neighbour: Option<Box<dyn Neighbour>>,
}

/// The interfaces, in the order in which the guest gets them.
#[derive(Default)]
pub struct Interfaces(Vec<(NetworkInterface, Option<Backing>)>);

/// What is behind an interface on the host's side.
struct Backing {
    tap: Tap,
    vhost: Vec<VhostNet>,
}

impl Interfaces {
    /// Adds an interface, or puts it in the place of the one with its id.
    ///
    /// # Errors
    /// A value that is out of range or taken, or a tap that cannot be had. Nothing has changed then.
    pub fn put(&mut self, settings: NetworkInterface, handed: &Handed) -> Result<(), Fault> {
        let place = self.0.iter().position(|(known, _)| known.iface_id == settings.iface_id);
        self.check(&settings)?;
        let Some((before, backing)) = place.and_then(|place| self.0.get_mut(place)) else {
            let backing = open(&settings, handed)?;
            self.0.push((settings, Some(backing)));
            return Ok(());
        };
        if before.host_dev_name == settings.host_dev_name {
            // A tap has one user at a time, and that is us.
            *backing = None;
        }
        match open(&settings, handed) {
            Ok(new) => (*before, *backing) = (settings, Some(new)),
            Err(fault) => {
                if backing.is_none() {
                    *backing = open(before, handed).ok();
                }
                return Err(fault);
            }
        }
        Ok(())
    }

    /// Checks an interface that a running guest is to get, and attaches its tap.
    ///
    /// # Errors
    /// As for [`Interfaces::put`], or it is there already.
    pub fn to_plug(&self, settings: NetworkInterface, handed: &Handed) -> Result<Interface, Fault> {
        if self.find(&settings.iface_id).is_ok() {
            return Err(there_already("iface_id", &settings.iface_id));
        }
        self.check(&settings)?;
        let Backing { tap, vhost } = open(&settings, handed)?;
        Ok(Interface { settings, tap, vhost, neighbour: None })
    }

    /// Takes down that a running guest has got an interface.
    pub fn plugged(&mut self, settings: NetworkInterface) {
        self.0.push((settings, None));
    }

    /// Takes down that a running guest has lost an interface.
    pub fn unplugged(&mut self, id: &str) {
        self.0.retain(|(settings, _)| settings.iface_id != id);
    }

    /// The settings of each.
    pub fn settings(&self) -> impl Iterator<Item = &NetworkInterface> {
        self.0.iter().map(|(settings, _)| settings)
    }

    /// The settings of the one with this id.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, id: &str) -> Result<&NetworkInterface, Fault> {
        self.settings().find(|settings| settings.iface_id == id).ok_or_else(|| {
            Fault::bad_request(format!(
                "`iface_id` is {id:?}, and this guest has no such network interface; GET /vm/config lists them."
            ))
        })
    }

    /// Each with descriptors of its own: a start that fails can be tried again.
    ///
    /// # Errors
    /// Those of `dup`; and after [`Interfaces::close`].
    pub fn open(&self) -> io::Result<Vec<Interface>> {
        let open = |(settings, backing): &(NetworkInterface, Option<Backing>)| {
            let lost = || format!("network interface {:?} has lost its tap; put it again", settings.iface_id);
            let Backing { tap, vhost } = backing.as_ref().ok_or_else(|| io::Error::other(lost()))?;
            let vhost = vhost.iter().map(VhostNet::try_clone).collect::<io::Result<_>>()?;
            Ok(Interface { settings: settings.clone(), tap: tap.try_clone()?, vhost, neighbour: None })
        };
        self.0.iter().map(open).collect()
    }

    /// Closes the taps: the guest has its own.
    pub fn close(&mut self) {
        self.0.iter_mut().for_each(|(_, backing)| *backing = None);
    }

    /// Takes down that a running guest's interface has been changed. For one that does not exist it does nothing.
    pub fn updated(&mut self, update: &NetworkInterfaceUpdate) {
        let mut all = self.0.iter_mut().map(|(settings, _)| settings);
        let Some(settings) = all.find(|settings| settings.iface_id == update.iface_id) else { return };
        settings.rx_rate_limiter = changed(settings.rx_rate_limiter, update.rx_rate_limiter);
        settings.tx_rate_limiter = changed(settings.tx_rate_limiter, update.tx_rate_limiter);
    }

    fn check(&self, settings: &NetworkInterface) -> Result<(), Fault> {
        check_io_thread(settings.io_thread)?;
        if let Some(mtu) = settings.mtu.filter(|mtu| !MTU.contains(mtu)) {
            return Err(Fault::bad_request(format!(
                "`mtu` is {mtu}; it must be from {} to {}.",
                MTU.start(),
                MTU.end()
            )));
        }
        if let Some(pairs) = settings.queue_pairs.filter(|pairs| !QUEUE_PAIRS.contains(pairs)) {
            return Err(Fault::bad_request(format!(
                "`queue_pairs` is {pairs}; it must be from {} to {}.",
                QUEUE_PAIRS.start(),
                QUEUE_PAIRS.end()
            )));
        }
        // A tap by name is refused by the kernel where it is another's.
        let fds = |settings: &NetworkInterface| {
            let mut names = split(&settings.host_dev_name);
            names.retain(|name| name.starts_with("fd:"));
            names
        };
        self.check_alone("host_dev_name", settings, fds, "a descriptor of a tap for it alone")?;
        self.check_vhost(settings)?;
        settings.guest_mac.map_or(Ok(()), |mac| self.check_mac(mac, &settings.iface_id))
    }

    fn check_vhost(&self, settings: &NetworkInterface) -> Result<(), Fault> {
        if settings.vhost != Some(true) {
            return match &settings.vhost_fds {
                Some(fds) => Err(Fault::bad_request(format!(
                    "`vhost_fds` is {fds:?}, and `vhost` is not true; set it, or leave `vhost_fds` out."
                ))),
                None => Ok(()),
            };
        }
        check_limits(settings.rx_rate_limiter, settings.tx_rate_limiter)?;
        let fds = |settings: &NetworkInterface| split(settings.vhost_fds.as_deref().unwrap_or_default());
        self.check_alone(
            "vhost_fds",
            settings,
            fds,
            &format!("a descriptor of {VHOST} that was opened for it alone"),
        )
    }

    /// What each queue pair has of its own is not also another's.
    fn check_alone(
        &self,
        field: &str,
        settings: &NetworkInterface,
        names: impl Fn(&NetworkInterface) -> Vec<String>,
        what: &str,
    ) -> Result<(), Fault> {
        let ours = names(settings);
        let others = self.settings().filter(|other| other.iface_id != settings.iface_id);
        let taken: Vec<_> = others.flat_map(names).collect();
        let is_twice = |(place, name): &(usize, &String)| {
            taken.contains(name) || ours.iter().take(*place).any(|other| other == *name)
        };
        match ours.iter().enumerate().find(is_twice) {
            Some((_, name)) => Err(Fault::bad_request(format!(
                "`{field}` has {name:?} twice, or another network interface has it; each queue pair needs {what}."
            ))),
            None => Ok(()),
        }
    }

    fn check_mac(&self, mac: MacAddress, id: &str) -> Result<(), Fault> {
        if mac.0[0] & 1 != 0 || mac.0 == [0; 6] {
            return Err(Fault::bad_request(format!(
                "`guest_mac` is {mac}, which is no address of a single interface; the first byte must be even, and not \
                 all may be 0."
            )));
        }
        match self.settings().find(|other| other.guest_mac == Some(mac) && other.iface_id != id) {
            Some(other) => Err(Fault::bad_request(format!(
                "`guest_mac` is {mac}, which network interface {:?} has already; give each its own.",
                other.iface_id
            ))),
            None => Ok(()),
        }
    }
}

/// Names with commas between.
fn split(names: &str) -> Vec<String> {
    names.split(',').filter(|name| !name.is_empty()).map(String::from).collect()
}

/// What is said of a device that a running guest has.
pub fn there_already(field: &str, id: &str) -> Fault {
    Fault::bad_request(format!(
        "`{field}` is {id:?}, and the running guest has such a device: PATCH changes it; DELETE asks the guest for it, and \
         a second DELETE takes it away."
    ))
}

/// A limit as it is after a change: what that leaves out stays.
pub fn changed(before: Option<RateLimiter>, change: Option<RateLimiter>) -> Option<RateLimiter> {
    let Some(change) = change else { return before };
    let before = before.unwrap_or_default();
    Some(RateLimiter { bandwidth: change.bandwidth.or(before.bandwidth), ops: change.ops.or(before.ops) })
}

/// An interface that the kernel serves has no limits, which are this process's.
///
/// # Errors
/// There is one that holds something back.
pub fn check_limits(receive: Option<RateLimiter>, transmit: Option<RateLimiter>) -> Result<(), Fault> {
    for (field, limiter) in [("rx_rate_limiter", receive), ("tx_rate_limiter", transmit)] {
        if limiter.is_some() {
            return Err(Fault::bad_request(format!(
                "`vhost` is true and there is `{field}`: the host's kernel moves the packets and knows no such limit; leave \
                 one of the two out, or limit the tap on the host (tc)."
            )));
        }
    }
    Ok(())
}

/// What is said of an interface that the kernel serves and the metadata service is to be on.
pub fn metadata_and_vhost(id: &str) -> Fault {
    Fault::bad_request(format!(
        "`vhost` is true for network interface {id:?}, and `network_interfaces` of /mmds/config has it: the metadata service \
         answers in this process, which packets then do not come through; give the guest another interface for it."
    ))
}

/// Opens what is behind an interface.
fn open(settings: &NetworkInterface, handed: &Handed) -> Result<Backing, Fault> {
    let tap = open_tap(settings, handed)?;
    let vhost =
        if settings.vhost == Some(true) { open_vhost(settings, tap.queues(), handed)? } else { Vec::new() };
    Ok(Backing { tap, vhost })
}

/// Opens as many back-ends of the kernel's, or takes over those that were handed to us.
fn open_vhost(settings: &NetworkInterface, pairs: usize, handed: &Handed) -> Result<Vec<VhostNet>, Fault> {
    let Some(names) = &settings.vhost_fds else {
        return (0..pairs)
            .map(|_| {
                let file = open_device(VHOST).map_err(|error| {
                    Fault::bad_request(format!(
                        "`vhost` is true, and {VHOST} cannot be opened: {error}. Is the module vhost_net loaded (`modprobe \
                         vhost_net`), may this process's user read and write it, and is it there, seen from this process's \
                         root directory (berth-jailer has --vhost-net)? Or hand over a descriptor of it (`vhost_fds`)."
                    ))
                })?;
                VhostNet::new(file)
                    .map_err(|error| Fault::bad_request(format!("`vhost` is true, and with {VHOST} {error}.")))
            })
            .collect();
    };
    let refused = |why: &dyn Display| Fault::bad_request(format!("`vhost_fds` is {names:?}: {why}."));
    let parts: Vec<_> = names.split(',').collect();
    if parts.len() != pairs {
        return Err(refused(&format_args!(
            "it names {} descriptors, and the interface has {pairs} queue pairs; give one for each",
            parts.len()
        )));
    }
    let found = parts.into_iter().map(|part| {
        let file = handed.find("vhost_fds", Path::new(part), true).unwrap_or_else(|| {
            Err(refused(&"it must be `fd:NAME`, of a descriptor that this process was started with (--fd NAME=NUMBER)"))
        })?;
        VhostNet::new(file).map_err(|error| refused(&error))
    });
    found.collect()
}

/// Attaches the tap, or takes over the one that was handed to us.
fn open_tap(settings: &NetworkInterface, handed: &Handed) -> Result<Tap, Fault> {
    let name = &settings.host_dev_name;
    let refused = |error: tap::TapError| Fault::bad_request(format!("`host_dev_name` is {name:?}: {error}."));
    let files: Option<Result<Vec<File>, Fault>> =
        name.split(',').map(|part| handed.find("host_dev_name", Path::new(part), true)).collect();
    match files {
        Some(files) => {
            let files = files?;
            let pairs = settings.queue_pairs.map_or(files.len(), usize::from);
            if files.len() != pairs {
                return Err(Fault::bad_request(format!(
                    "`host_dev_name` is {name:?}, which names {} descriptors, and `queue_pairs` is {pairs}; give one for \
                     each.",
                    files.len()
                )));
            }
            Tap::adopt(files).map_err(refused)
        }
        None => {
            let files =
                (0..settings.queue_pairs.unwrap_or(1)).map(|_| open_tun()).collect::<Result<_, _>>()?;
            Tap::attach(files, name).map_err(refused)
        }
    }
}

fn open_tun() -> Result<File, Fault> {
    open_device(TUN).map_err(|error| {
        Fault::bad_request(format!(
            "`host_dev_name` is a tap, and {TUN} cannot be opened: {error}. Is it there, seen from this process's root \
             directory, and is the module tun loaded?"
        ))
    })
}

fn open_device(path: &str) -> io::Result<File> {
    // Non-blocking is what a tap would be set to anyway; and this is the form of opening that a running guest's process may
    // use.
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)
}

#[cfg(test)]
mod tests {
    use api_socket::TokenBucket;

    use super::*;

    fn interface(id: &str) -> NetworkInterface {
        NetworkInterface { iface_id: id.into(), host_dev_name: "tap0".into(), ..NetworkInterface::default() }
    }

    /// One that has no tap, and needs none for this.
    fn with(known: NetworkInterface) -> Interfaces {
        Interfaces(vec![(known, None)])
    }

    #[track_caller]
    fn refused(interfaces: &mut Interfaces, settings: NetworkInterface, words: &[&str]) {
        let before: Vec<_> = interfaces.settings().cloned().collect();
        let message = interfaces.put(settings, &Handed::default()).expect_err("accepted").message;
        for word in words {
            assert!(message.contains(word), "{word:?} is not in: {message}");
        }
        assert_eq!(interfaces.settings().cloned().collect::<Vec<_>>(), before);
    }

    #[test]
    fn the_devices_take_as_many_queue_pairs_and_the_same_mtu_as_the_api() {
        assert_eq!(usize::from(*QUEUE_PAIRS.end()), devices::virtio::net::MAX_QUEUE_PAIRS);
        assert_eq!(MTU, devices::virtio::net::MTU);
    }

    #[test]
    fn values_out_of_range_are_refused_by_their_names() {
        let mut none = Interfaces::default();
        let mtu = NetworkInterface { mtu: Some(67), ..interface("a") };
        refused(&mut none, mtu, &["`mtu` is 67", "68 to 65535"]);
        for pairs in [0, 33] {
            let pairs = NetworkInterface { queue_pairs: Some(pairs), ..interface("a") };
            refused(&mut none, pairs, &["`queue_pairs` is", "1 to 32"]);
        }
        let thread = NetworkInterface { io_thread: Some(16), ..interface("a") };
        refused(&mut none, thread, &["`io_thread` is 16", "from 0 to 15"]);
        for mac in ["01:00:00:00:00:01", "00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff"] {
            let settings = NetworkInterface { guest_mac: Some(mac.parse().unwrap()), ..interface("a") };
            refused(&mut none, settings, &["`guest_mac`", mac, "must be even"]);
        }
        let name = NetworkInterface { host_dev_name: "a/b".into(), ..interface("a") };
        refused(&mut none, name, &["`host_dev_name` is \"a/b\""]);
    }

    #[test]
    fn a_descriptor_of_a_tap_is_of_one_queue_pair() {
        let fds = |id, fds: &str| NetworkInterface { host_dev_name: fds.into(), ..interface(id) };
        let mut interfaces = with(fds("a", "fd:one"));
        refused(
            &mut interfaces,
            fds("b", "fd:one"),
            &["`host_dev_name` has \"fd:one\" twice", "for it alone"],
        );
        refused(&mut interfaces, fds("b", "fd:two,fd:two"), &["`host_dev_name` has \"fd:two\" twice"]);
        // A name is the kernel's to refuse, and here there is no such tap.
        refused(&mut interfaces, fds("b", "no/tap"), &["`host_dev_name` is \"no/tap\""]);
    }

    #[test]
    fn an_address_is_of_one_interface() {
        let guest_mac = Some("06:00:00:00:00:01".parse().unwrap());
        let mut interfaces = with(NetworkInterface { guest_mac, ..interface("a") });
        let second = NetworkInterface { guest_mac, ..interface("b") };
        refused(&mut interfaces, second, &["06:00:00:00:00:01", "\"a\" has already"]);
        // The one that is replaced may keep it; this one fails later, for want of a tap of that name.
        let first = NetworkInterface { guest_mac, host_dev_name: "no/tap".into(), ..interface("a") };
        refused(&mut interfaces, first, &["host_dev_name"]);
    }

    #[test]
    fn a_kernel_that_moves_the_packets_knows_no_limits_and_a_descriptor_of_it_serves_one_queue_pair() {
        let vhost = |id| NetworkInterface { vhost: Some(true), ..interface(id) };
        let fds = |id, fds: &str| NetworkInterface { vhost_fds: Some(fds.into()), ..vhost(id) };
        let mut interfaces = with(fds("a", "fd:one"));
        let limiter = Some(RateLimiter::default());
        let receive = NetworkInterface { rx_rate_limiter: limiter, ..vhost("b") };
        refused(&mut interfaces, receive, &["`vhost` is true", "`rx_rate_limiter`"]);
        let transmit = NetworkInterface { tx_rate_limiter: limiter, ..vhost("b") };
        refused(&mut interfaces, transmit, &["`vhost` is true", "`tx_rate_limiter`"]);
        let without = NetworkInterface { vhost: None, ..fds("b", "fd:two") };
        refused(&mut interfaces, without, &["`vhost_fds` is \"fd:two\"", "`vhost` is not true"]);
        refused(&mut interfaces, fds("b", "fd:one"), &["`vhost_fds` has \"fd:one\" twice", "for it alone"]);
        refused(&mut interfaces, fds("b", "fd:two,fd:two"), &["`vhost_fds` has \"fd:two\" twice"]);
        // The one that is replaced may keep it; this one fails later.
        let first = NetworkInterface { host_dev_name: "no/tap".into(), ..fds("a", "fd:one") };
        refused(&mut interfaces, first, &["host_dev_name"]);
        let message = |fds: &str, pairs| {
            let settings = NetworkInterface { vhost_fds: Some(fds.into()), ..vhost("b") };
            open_vhost(&settings, pairs, &Handed::default()).err().unwrap().message
        };
        assert!(message("fd:two", 2).contains("names 1 descriptors, and the interface has 2 queue pairs"));
        assert!(message("/dev/vhost-net", 1).contains("must be `fd:NAME`"));
    }

    #[test]
    fn an_interface_that_does_not_exist_is_named() {
        let message = with(interface("a")).find("b").unwrap_err().message;
        assert!(message.contains("`iface_id` is \"b\"") && message.contains("GET /vm/config"), "{message}");
    }

    #[test]
    fn a_limit_that_a_change_leaves_out_stays() {
        let limit = |size| Some(TokenBucket { size, one_time_burst: None, refill_time: 1 });
        let limiter = |bandwidth, ops| Some(RateLimiter { bandwidth, ops });
        let mut interfaces = with(NetworkInterface {
            rx_rate_limiter: limiter(limit(1), limit(2)),
            tx_rate_limiter: limiter(limit(3), None),
            ..interface("a")
        });
        interfaces.updated(&NetworkInterfaceUpdate {
            iface_id: "a".into(),
            rx_rate_limiter: limiter(None, limit(5)),
            tx_rate_limiter: None,
        });
        let settings = interfaces.find("a").unwrap();
        assert_eq!(settings.rx_rate_limiter, limiter(limit(1), limit(5)));
        assert_eq!(settings.tx_rate_limiter, limiter(limit(3), None));
    }
}
