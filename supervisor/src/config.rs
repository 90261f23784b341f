//! What the administrator has decided: `/etc/berth/berthd.toml`, checked.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where it is looked for without `--config`; without the file all is as by default.
pub const FILE: &str = "/etc/berth/berthd.toml";
/// The most guests that can be asked for: that many have users, addresses and descriptors.
pub const MAX_GUESTS: u32 = 4096;
/// The longest path of a directory that sockets are in: `sockaddr_un` has 108 bytes.
const MAX_RUN_DIR: usize = 60;

/// Why there is no configuration: the file, the line, the rule.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {why}", path = path.display())]
pub struct Wrong {
    path: PathBuf,
    why: String,
}

/// All settings. Each has a default, so that no file is needed.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where clients find the daemon, unless systemd hands it a socket.
    pub socket: PathBuf,
    /// Members may use the socket.
    pub group: String,
    /// Images, guests, cells: what outlives the host's start.
    pub state_dir: PathBuf,
    /// Sockets and pipes: what does not.
    pub run_dir: PathBuf,
    /// The first of the users that VMMs run as, and how many there are: nobody else may be one of them.
    pub uid_first: u32,
    pub uid_count: u32,
    /// How many guests there may be, running or not.
    pub max_guests: u32,
    /// The control group that guests' are made in, below the root of version 2.
    pub control_group: String,
    pub network: Network,
    pub programs: Programs,
}

/// The network that guests get: a bridge behind address translation.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields, default)]
pub struct Network {
    pub bridge: String,
    /// The host's on the bridge; guests get others of the same network.
    pub address: Ipv4Addr,
    pub prefix: u8,
    /// What guests ask for names. Empty: whom the host asks.
    pub dns: Vec<Ipv4Addr>,
}

/// Where our own programs are.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[cfg_attr(test, derive(serde::Serialize))]
#[serde(deny_unknown_fields, default)]
pub struct Programs {
    pub vmm: PathBuf,
    pub jailer: PathBuf,
    pub agent: PathBuf,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            socket: api_socket::fleet::client::SOCKET.into(),
            group: "berth".into(),
            state_dir: "/var/lib/berth".into(),
            run_dir: "/run/berth".into(),
            // Above the containers' of systemd, which has nothing here (systemd's UIDS-GIDS.md).
            uid_first: 0x7000_0000,
            uid_count: MAX_GUESTS,
            max_guests: 1024,
            control_group: "berth".into(),
            network: Network::default(),
            programs: Programs::default(),
        }
    }
}

impl Default for Network {
    fn default() -> Network {
        Network { bridge: "berth0".into(), address: Ipv4Addr::new(10, 87, 0, 1), prefix: 16, dns: Vec::new() }
    }
}

impl Default for Programs {
    fn default() -> Programs {
        let in_lib = |name: &str| Path::new("/usr/lib/berth").join(name);
        Programs { vmm: in_lib("berth-vmm"), jailer: in_lib("berth-jailer"), agent: in_lib("berth-agent") }
    }
}

impl Config {
    /// Reads a file; `None` is [`FILE`], which may be absent.
    ///
    /// # Errors
    /// It cannot be read, or says what cannot be.
    pub fn read(path: Option<&Path>) -> Result<Config, Wrong> {
        let (path, is_optional) = path.map_or((Path::new(FILE), true), |path| (path, false));
        let wrong = |why: String| Wrong { path: path.to_owned(), why };
        let text = match std::fs::read_to_string(path) {
            Err(error) if is_optional && error.kind() == std::io::ErrorKind::NotFound => String::new(),
            outcome => outcome.map_err(|error| wrong(error.to_string()))?,
        };
        Config::parse(&text).map_err(wrong)
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    /// What is wrong with it, for a person.
    pub fn parse(text: &str) -> Result<Config, String> {
        let config: Config = toml::from_str(text).map_err(|error| error.to_string())?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let paths = [
            ("socket", &self.socket),
            ("state_dir", &self.state_dir),
            ("run_dir", &self.run_dir),
            ("programs.vmm", &self.programs.vmm),
            ("programs.jailer", &self.programs.jailer),
            ("programs.agent", &self.programs.agent),
        ];
        for (name, path) in paths {
            if !path.is_absolute() {
                return Err(format!("{name} is {}; give a path from the root", path.display()));
            }
        }
        // Cells have a socket below the one, and guests' own below the other.
        for (name, path) in [("run_dir", &self.run_dir), ("state_dir", &self.state_dir)] {
            if path.as_os_str().len() > MAX_RUN_DIR {
                return Err(format!("{name} is longer than {MAX_RUN_DIR} bytes, and sockets are below it"));
            }
        }
        if self.uid_first == 0 || self.uid_count == 0 || self.uid_first.checked_add(self.uid_count).is_none()
        {
            return Err(format!(
                "uid_first {} and uid_count {} are no range of users without root",
                self.uid_first, self.uid_count
            ));
        }
        if !(1..=MAX_GUESTS).contains(&self.max_guests) {
            return Err(format!("max_guests is {}; give a number from 1 to {MAX_GUESTS}", self.max_guests));
        }
        let is_group = |name: &str| !name.is_empty() && !name.starts_with('.') && !name.contains('/');
        if !self.control_group.split('/').all(is_group) {
            return Err(format!(
                "control_group is {:?}; give a path like `berth` or `machines/berth`",
                self.control_group
            ));
        }
        self.network.check()
    }
}

impl Network {
    fn check(&self) -> Result<(), String> {
        let bridge = &self.bridge;
        // IFNAMSIZ.
        if bridge.is_empty() || bridge.len() > 15 || !bridge.bytes().all(|byte| byte.is_ascii_alphanumeric())
        {
            return Err(format!("network.bridge is {bridge:?}; give 1 to 15 letters and digits"));
        }
        if !(8..=29).contains(&self.prefix) {
            return Err(format!("network.prefix is {}; give a number from 8 to 29", self.prefix));
        }
        if !self.guests().contains(&self.address.to_bits()) {
            return Err(format!("network.address {} is not one of a host's", self.address));
        }
        Ok(())
    }

    /// The addresses of hosts, as numbers: without the network's own and the one for all.
    pub fn guests(&self) -> std::ops::RangeInclusive<u32> {
        let hosts = u32::MAX.checked_shr(u32::from(self.prefix)).unwrap_or(0);
        let first = self.address.to_bits() & !hosts;
        first + 1..=first + hosts - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_a_file_has_the_defaults_and_these_can_be() {
        assert_eq!(Config::parse(""), Ok(Config::default()));
    }

    #[test]
    fn the_file_that_is_installed_has_each_setting_at_its_default() {
        let text = include_str!("../../resources/deb/berthd.toml");
        assert_eq!(Config::parse(text), Ok(Config::default()));
        // A comment that looks like a setting is one.
        let settings: Vec<_> = text
            .lines()
            .map(|line| line.strip_prefix("# ").filter(|rest| rest.contains(" = ")).unwrap_or(line))
            .collect();
        let told: serde_json::Value = toml::from_str(&settings.join("\n")).unwrap();
        assert_eq!(told, serde_json::to_value(Config::default()).unwrap());
    }

    #[test]
    fn a_file_changes_what_it_names() {
        let config = Config::parse("max_guests = 7\n[network]\nprefix = 24\n").unwrap();
        assert_eq!((config.max_guests, config.network.prefix), (7, 24));
        assert_eq!(config.group, "berth");
    }

    #[test]
    fn what_cannot_be_is_named() {
        let cases = [
            ("max_guest = 7", "unknown field `max_guest`"),
            ("max_guests = 0", "max_guests is 0"),
            ("max_guests = \"x\"", "invalid type"),
            ("socket = \"here\"", "socket is here; give a path from the root"),
            ("uid_first = 0", "uid_first 0"),
            ("uid_first = 4294967295", "no range of users"),
            ("control_group = \"../a\"", "control_group is"),
            ("[network]\nbridge = \"a/b\"", "network.bridge is"),
            ("[network]\nprefix = 31", "network.prefix is 31"),
            ("[network]\naddress = \"10.87.0.0\"", "is not one of a host's"),
            ("[network]\naddress = \"10.87.255.255\"", "is not one of a host's"),
        ];
        for (text, why) in cases {
            let error = Config::parse(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
        let long = format!("run_dir = \"/{}\"", "x".repeat(80));
        assert!(Config::parse(&long).unwrap_err().contains("longer than"));
    }

    #[test]
    fn a_network_has_the_addresses_between_its_ends() {
        let network = Network { prefix: 29, address: Ipv4Addr::new(10, 0, 0, 9), ..Network::default() };
        let guests: Vec<_> = network.guests().map(Ipv4Addr::from_bits).collect();
        assert_eq!((guests.len(), guests[0], guests[5]), (6, [10, 0, 0, 9].into(), [10, 0, 0, 14].into()));
    }
}
