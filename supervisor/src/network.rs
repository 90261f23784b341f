//! The network of guests: a bridge behind address translation, made when the first guest wants it, and a tap for each guest.
//!
//! What configures the host is what an administrator would type: `ip` and `nft`. Addresses are handed out where guests are made.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::{config, process};

/// Of the table of nftables, which is ours alone.
const TABLE: &str = "berth_";
/// Who is asked for names if the host's own answer only to the host.
const PUBLIC_DNS: Ipv4Addr = Ipv4Addr::new(9, 9, 9, 9);
/// The most servers that a guest is told of; the C library asks no more.
const MAX_DNS: usize = 3;

/// The host's side.
#[derive(Debug)]
pub struct Network {
    config: config::Network,
    /// The bridge was looked at since the daemon's start.
    is_ready: Mutex<bool>,
    nowhere: OnceLock<File>,
}

impl Network {
    /// Nothing is made yet.
    pub fn new(config: config::Network) -> Network {
        Network { config, is_ready: Mutex::new(false), nowhere: OnceLock::new() }
    }

    /// A tap on the bridge for the guest of this id. It is gone when nobody holds it any more.
    ///
    /// # Errors
    /// A clause for a person: what failed, and what to do.
    pub fn tap(&self, id: &str) -> Result<File, String> {
        self.prepare()?;
        let name = tap_name(id);
        let tap = crate::tap::make(&name)
            .map_err(|error| format!("/dev/net/tun: no tap can be made: {error}; load the module tun"))?;
        let bridge = &self.config.bridge;
        ip(&format!("link set dev {name} master {bridge} up"))?;
        Ok(tap)
    }

    /// A network namespace in which there is nothing. It lives as long as this daemon, and longer with whoever is in it.
    ///
    /// # Errors
    /// The kernel makes none.
    pub fn nowhere(&self) -> io::Result<&File> {
        if let Some(nowhere) = self.nowhere.get() {
            return Ok(nowhere);
        }
        // A thread is put into a namespace for good, so it is one that ends.
        let made = thread::Builder::new().spawn(|| {
            // SAFETY: of what a thread can leave its process's share of, only the table of descriptors makes others' unsound;
            // the flag names the network alone.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
            File::open("/proc/thread-self/ns/net")
        })?;
        let made = made.join().unwrap_or_else(|_| Err(io::Error::other("its thread has failed")))?;
        Ok(self.nowhere.get_or_init(|| made))
    }

    /// What the guest's agent is told on the kernel's command line.
    pub fn told(&self, address: Ipv4Addr) -> String {
        let config::Network { address: gateway, prefix, .. } = self.config;
        let dns: Vec<_> = self.dns().iter().map(Ipv4Addr::to_string).collect();
        format!("berth.address={address}/{prefix} berth.gateway={gateway} berth.dns={}", dns.join(","))
    }

    fn dns(&self) -> Vec<Ipv4Addr> {
        if !self.config.dns.is_empty() {
            return self.config.dns.iter().copied().take(MAX_DNS).collect();
        }
        // The second is what stands behind systemd-resolved's own, which listens for the host alone.
        let files = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
        let found = files.iter().map(|file| servers(&std::fs::read_to_string(file).unwrap_or_default()));
        found.into_iter().find(|found| !found.is_empty()).unwrap_or_else(|| vec![PUBLIC_DNS])
    }

    fn prepare(&self) -> Result<(), String> {
        let mut is_ready = self.is_ready.lock().unwrap_or_else(PoisonError::into_inner);
        if *is_ready {
            return Ok(());
        }
        let config::Network { bridge, address, prefix, .. } = &self.config;
        if !std::path::Path::new("/dev/net/tun").exists() {
            feed("modprobe", &["tun"], "")?;
        }
        if !std::path::Path::new("/sys/class/net").join(bridge).exists() {
            ip(&format!("link add name {bridge} type bridge"))?;
        }
        // There is no IPv6 for guests, and the host must not take one for its router.
        let ipv6 = format!("/proc/sys/net/ipv6/conf/{bridge}/disable_ipv6");
        if std::path::Path::new(&ipv6).exists() {
            std::fs::write(&ipv6, "1").map_err(|error| format!("{ipv6}: {error}"))?;
        }
        ip(&format!("address replace {address}/{prefix} dev {bridge}"))?;
        ip(&format!("link set dev {bridge} up"))?;
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")
            .map_err(|error| format!("the host cannot be made to forward packets: {error}"))?;
        feed("nft", &["-f", "-"], &rules(&self.config))?;
        *is_ready = true;
        Ok(())
    }
}

/// Of the interface of the guest with this id: 14 bytes, of the 15 that an interface's name may have.
pub fn tap_name(id: &str) -> String {
    format!("bt{id}")
}

/// What guests send elsewhere goes out under the host's address; what comes in is only what answers them.
fn rules(config: &config::Network) -> String {
    let config::Network { bridge, address, prefix, .. } = config;
    format!(
        "table ip {TABLE}{bridge}
         delete table ip {TABLE}{bridge}
         table ip {TABLE}{bridge} {{
           chain out {{
             type nat hook postrouting priority srcnat; policy accept;
             ip saddr {address}/{prefix} oifname != \"{bridge}\" masquerade
           }}
           chain through {{
             type filter hook forward priority filter; policy accept;
             oifname \"{bridge}\" ct state established,related accept
             oifname \"{bridge}\" iifname != \"{bridge}\" drop
           }}
         }}
"
    )
}

/// The servers of a resolv.conf(5) that somebody else than the host can ask.
fn servers(text: &str) -> Vec<Ipv4Addr> {
    let named = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver")?.trim().parse().ok());
    named
        .filter(|address: &Ipv4Addr| !address.is_loopback() && !address.is_unspecified())
        .take(MAX_DNS)
        .collect()
}

fn ip(command: &str) -> Result<(), String> {
    let words: Vec<_> = command.split(' ').collect();
    feed("ip", &words, "")
}

/// Runs a command of the host's and gives it this to read.
fn feed(program: &str, arguments: &[&str], input: &str) -> Result<(), String> {
    let run = || {
        let mut command = Command::new(program);
        command.args(arguments).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        process::output(command, input.as_bytes())
    };
    let what = || format!("`{program} {}`", arguments.join(" "));
    match run() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("{}: {}", what(), String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(format!(
            "there is no `{program}`: install iproute2, nftables and kmod, or make the guest without a network"
        )),
        Err(error) => Err(format!("{}: {error}", what())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_of_the_host_alone_are_not_for_guests() {
        let text = "# comment\nnameserver 127.0.0.53\nnameserver 10.0.0.2\n nameserver 10.0.0.3\nnameserver fe80::1\n";
        assert_eq!(servers(text), [Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(10, 0, 0, 3)]);
        assert_eq!(servers("nameserver 1.1.1.1\n".repeat(9).as_str()).len(), MAX_DNS);
        assert!(servers("search example.org\n").is_empty());
    }

    #[test]
    fn a_guest_is_told_its_address_and_whom_to_ask() {
        let dns = vec![[10, 0, 0, 2].into(), [10, 0, 0, 3].into()];
        let network = Network::new(config::Network { dns, ..config::Network::default() });
        assert_eq!(
            network.told([10, 87, 0, 9].into()),
            "berth.address=10.87.0.9/16 berth.gateway=10.87.0.1 berth.dns=10.0.0.2,10.0.0.3"
        );
    }

    #[test]
    fn a_command_that_fails_is_named_with_what_it_said() {
        let error = feed("sh", &["-c", "cat >&2; exit 1"], "the reason").unwrap_err();
        assert_eq!(error, "`sh -c cat >&2; exit 1`: the reason");
        assert!(feed("no-such-program", &[], "").unwrap_err().contains("install"));
        assert_eq!(feed("cat", &[], "input"), Ok(()));
        let long = "x".repeat(1 << 20);
        assert!(feed("sh", &["-c", "cat >&2; exit 1"], &long).unwrap_err().len() < 16 << 10);
    }
}
