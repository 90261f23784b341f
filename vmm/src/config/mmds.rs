//! The metadata service: what a client says of it, and the store that it fills.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;

use api_socket::{DEFAULT_MMDS_ADDRESS, Fault, MmdsConfig, MmdsVersion, Reply};
use devices::virtio::net::Neighbour;
use metadata::{Counters, Metadata, Rules, Stack, StoreError, Version};
use serde_json::{Map, Value};

/// The third byte of a link-local address, of which the first and the last are reserved (RFC 3927, section 2.1).
const THIRD_BYTE: std::ops::RangeInclusive<u8> = 1..=254;

/// The store, and the service if it is configured.
pub struct Mmds {
    settings: Option<MmdsConfig>,
    metadata: Arc<Metadata>,
    has_started: bool,
}

impl Mmds {
    /// An empty store of so many bytes, and no service.
    ///
    /// # Errors
    /// That of asking the kernel for random bytes.
    pub fn new(limit: usize) -> Result<Mmds, Fault> {
        let metadata = Metadata::new(limit).map_err(|error| Fault {
            status: 500,
            message: format!("no key for the metadata service: {error}"),
        })?;
        Ok(Mmds { settings: None, metadata: Arc::new(metadata), has_started: false })
    }

    /// The settings, with the address that is used where none was given.
    pub fn settings(&self) -> Option<MmdsConfig> {
        self.settings.clone()
    }

    /// What the service has done.
    pub fn counters(&self) -> Arc<Counters> {
        self.metadata.counters()
    }

    /// Configures the service for a guest whose interfaces `has_interface` knows.
    ///
    /// # Errors
    /// No interfaces, or one that is not there; an address that is not link-local.
    pub fn configure(
        &mut self,
        settings: MmdsConfig,
        has_interface: impl Fn(&str) -> bool,
    ) -> Result<(), Fault> {
        if settings.network_interfaces.is_empty() {
            return Err(Fault::bad_request(
                "`network_interfaces` is empty; name the network interfaces on which the guest may read its metadata.",
            ));
        }
        if let Some(id) = settings.network_interfaces.iter().find(|id| !has_interface(id)) {
            return Err(Fault::bad_request(format!(
                "`network_interfaces` has {id:?}, and this guest has no such network interface; PUT \
                 /network-interfaces/{id} first."
            )));
        }
        let address = settings.ipv4_address.unwrap_or(DEFAULT_MMDS_ADDRESS);
        check_address(address)?;
        self.settings = Some(MmdsConfig { ipv4_address: Some(address), ..settings });
        Ok(())
    }

    /// The document.
    ///
    /// # Errors
    /// The guest runs without the service.
    pub fn get(&self) -> Result<Reply, Fault> {
        self.check_use()?;
        Ok(Reply::Mmds(self.metadata.store().value()))
    }

    /// Another document.
    ///
    /// # Errors
    /// Status 413 if it is too large; the guest runs without the service.
    pub fn put(&self, value: Map<String, Value>) -> Result<(), Fault> {
        self.check_use()?;
        self.metadata.store().put(value).map_err(fault)
    }

    /// Changes the document.
    ///
    /// # Errors
    /// As [`Mmds::put`]; and there is none yet.
    pub fn patch(&self, patch: Map<String, Value>) -> Result<(), Fault> {
        self.check_use()?;
        self.metadata.store().patch(patch).map_err(fault)
    }

    /// The service for the interface with this id, if it is to be there.
    ///
    /// # Errors
    /// That of asking the kernel for random bytes.
    pub fn neighbour(&self, id: &str) -> io::Result<Option<Box<dyn Neighbour>>> {
        let settings = self
            .settings
            .as_ref()
            .filter(|settings| settings.network_interfaces.iter().any(|known| known == id));
        let Some(settings) = settings else { return Ok(None) };
        let version = match settings.version {
            MmdsVersion::V1 => Version::V1,
            MmdsVersion::V2 => Version::V2,
        };
        let rules = Rules { version, imds_compat: settings.imds_compat };
        let address = settings.ipv4_address.unwrap_or(DEFAULT_MMDS_ADDRESS);
        Ok(Some(Box::new(Stack::new(self.metadata.clone(), address, rules)?)))
    }

    /// The guest runs, with the service or without.
    pub fn started(&mut self) {
        self.has_started = true;
    }

    fn check_use(&self) -> Result<(), Fault> {
        if self.has_started && self.settings.is_none() && !self.metadata.store().is_set() {
            return Err(Fault::bad_request(
                "This guest was started without a metadata service; PUT /mmds/config before the start.",
            ));
        }
        Ok(())
    }
}

fn check_address(address: Ipv4Addr) -> Result<(), Fault> {
    let [_, _, third, _] = address.octets();
    if address.is_link_local() && THIRD_BYTE.contains(&third) {
        return Ok(());
    }
    Err(Fault::bad_request(format!(
        "`ipv4_address` is {address}, which is not link-local; give one from 169.254.1.0 to 169.254.254.255."
    )))
}

fn fault(error: StoreError) -> Fault {
    let status = match error {
        StoreError::TooLarge { .. } => 413,
        StoreError::Empty => 400,
    };
    Fault { status, message: format!("MMDS: {error}.") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn settings(interfaces: &[&str]) -> MmdsConfig {
        MmdsConfig {
            network_interfaces: interfaces.iter().map(|id| id.to_string()).collect(),
            ..MmdsConfig::default()
        }
    }

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn interfaces_must_be_there_and_the_address_link_local() {
        let mut mmds = Mmds::new(100).unwrap();
        let mut refused = |settings, words: &[&str]| {
            let message = mmds.configure(settings, |id| id == "eth0").unwrap_err().message;
            for word in words {
                assert!(message.contains(word), "{word:?} is not in: {message}");
            }
        };
        refused(settings(&[]), &["`network_interfaces` is empty"]);
        refused(settings(&["eth0", "eth1"]), &["`network_interfaces`", "\"eth1\""]);
        for address in ["10.0.0.1", "169.254.0.255", "169.254.255.0", "169.253.1.1", "255.255.255.255"] {
            let ipv4_address = Some(address.parse().unwrap());
            refused(MmdsConfig { ipv4_address, ..settings(&["eth0"]) }, &["`ipv4_address`", address]);
        }
        assert_eq!(mmds.settings(), None);
        mmds.configure(settings(&["eth0"]), |id| id == "eth0").unwrap();
        assert_eq!(mmds.settings().unwrap().ipv4_address, Some(DEFAULT_MMDS_ADDRESS));
        assert!(mmds.neighbour("eth0").unwrap().is_some() && mmds.neighbour("eth1").unwrap().is_none());
    }

    #[test]
    fn what_is_too_large_has_a_status_of_its_own() {
        let mmds = Mmds::new(10).unwrap();
        assert_eq!(mmds.get().unwrap(), Reply::Mmds(Value::Null));
        assert_eq!(mmds.patch(object(json!({"a": 1}))).unwrap_err().status, 400);
        assert_eq!(mmds.put(object(json!({"a": "12345678"}))).unwrap_err().status, 413);
        mmds.put(object(json!({"a": 1}))).unwrap();
        assert_eq!(mmds.patch(object(json!({"b": "12345678"}))).unwrap_err().status, 413);
        assert_eq!(mmds.get().unwrap(), Reply::Mmds(json!({"a": 1})));
    }

    #[test]
    fn a_guest_that_runs_without_the_service_has_no_metadata() {
        let mut mmds = Mmds::new(100).unwrap();
        mmds.started();
        assert_eq!(mmds.get().unwrap_err().status, 400);
        assert!(mmds.put(object(json!({}))).unwrap_err().message.contains("/mmds/config"));
        let mut mmds = Mmds::new(100).unwrap();
        mmds.configure(settings(&["eth0"]), |_| true).unwrap();
        mmds.started();
        mmds.put(object(json!({"a": 1}))).unwrap();
        mmds.patch(object(json!({"a": null, "b": 2}))).unwrap();
        assert_eq!(mmds.get().unwrap(), Reply::Mmds(json!({"b": 2})));
    }
}
