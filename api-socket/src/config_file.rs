//! The `--config-file` document: the same requests as over the socket, in the order a client would send them.
//!
//! It does not start the guest: the caller follows with `InstanceStart`.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::json;
use crate::routes::check_id;
use crate::types::{CpuConfig, CpuConfigSource, Fault, Request, VmConfig};

/// The largest configuration file that is read, in bytes. A guest's description has a few thousand.
pub const MAX_FILE_SIZE: u64 = 1 << 20;

/// Reads a configuration file into the list of requests it stands for. A file of its own that the `cpu-config`
/// section names is read too.
///
/// # Errors
/// A file that cannot be read, is larger than [`MAX_FILE_SIZE`], or is not what it must be; the text names the file.
pub fn read(path: &Path) -> Result<Vec<Request>, Fault> {
    let config: VmConfig = read_json(path)?;
    requests(config)
}

/// Reads a file of metadata into the request that puts it.
///
/// # Errors
/// A file that cannot be read, is larger than `limit` or [`MAX_FILE_SIZE`], whichever is more, or is no JSON object; the
/// text names the file and quotes nothing of it.
pub fn read_metadata(path: &Path, limit: usize) -> Result<Request, Fault> {
    let bad = |error: String| Fault::bad_request(format!("--metadata {}: {error}.", path.display()));
    let limit = MAX_FILE_SIZE.max(limit as u64);
    let text = read_bounded(path, limit).map_err(|error| bad(error.to_string()))?;
    match serde_json::from_slice(&text) {
        Ok(Value::Object(object)) => Ok(Request::PutMmds(object)),
        Ok(_) => Err(bad("this is JSON but no object; give an object, `{...}`".to_string())),
        Err(error) => {
            Err(bad(format!("this is not valid JSON (line {} column {})", error.line(), error.column())))
        }
    }
}

/// The requests of a configuration: logger and metrics first, so that they see the rest; then the machine, and then
/// what is in it.
///
/// # Errors
/// As [`read`], for the file of `cpu-config`; and a device whose id is not one.
pub fn requests(config: VmConfig) -> Result<Vec<Request>, Fault> {
    let mut requests = Vec::new();
    requests.extend(config.logger.map(Request::PutLogger));
    requests.extend(config.metrics.map(Request::PutMetrics));
    requests.extend(config.machine_config.map(Request::PutMachineConfig));
    requests.extend(config.cpu_config.map(cpu_config).transpose()?.map(Request::PutCpuConfig));
    requests.push(Request::PutBootSource(config.boot_source));
    for drive in config.drives {
        check_id("drive_id", &drive.drive_id)?;
        requests.push(Request::PutDrive(drive));
    }
    for interface in config.network_interfaces {
        check_id("iface_id", &interface.iface_id)?;
        requests.push(Request::PutNetworkInterface(interface));
    }
    requests.extend(config.mmds_config.map(Request::PutMmdsConfig));
    for pmem in config.pmem {
        check_id("id", &pmem.id)?;
        requests.push(Request::PutPmem(pmem));
    }
    requests.extend(config.balloon.map(Request::PutBalloon));
    requests.extend(config.memory_hotplug.map(Request::PutMemoryHotplug));
    requests.extend(config.console.map(Request::PutConsole));
    requests.extend(config.vsock.map(Request::PutVsock));
    requests.extend(config.entropy.map(Request::PutEntropy));
    Ok(requests)
}

fn cpu_config(source: CpuConfigSource) -> Result<CpuConfig, Fault> {
    match source {
        CpuConfigSource::Inline(config) => Ok(config),
        CpuConfigSource::Path(path) => read_json(&path),
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, Fault> {
    let text = read_bounded(path, MAX_FILE_SIZE)
        .map_err(|error| Fault::bad_request(format!("Configuration file {}: {error}.", path.display())))?;
    json::parse(&text)
        .map_err(|error| Fault::bad_request(format!("Configuration file {}: {error}.", path.display())))
}

fn read_bounded(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?.take(limit.saturating_add(1)).read_to_end(&mut text)?;
    if text.len() as u64 > limit {
        return Err(io::Error::other(format!("it is larger than the limit of {limit} bytes")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::*;

    fn read_text(text: &str) -> Result<Vec<Request>, Fault> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.json");
        std::fs::write(&path, text).unwrap();
        read(&path)
    }

    #[track_caller]
    fn refused_with(text: &str, words: &[&str]) {
        let message = read_text(text).expect_err("accepted").message;
        for word in words {
            assert!(message.contains(word), "{word:?} is not in: {message}");
        }
    }

    #[test]
    fn a_file_is_the_requests_it_stands_for_in_order() {
        let text = r#"{"drives":[{"drive_id":"a","is_root_device":true,"path_on_host":"/a"},
                                 {"drive_id":"b","is_root_device":false,"path_on_host":"/b"}],
            "boot-source":{"kernel_image_path":"/k"},"entropy":{},
            "vsock":{"guest_cid":3,"uds_path":"/v"},
            "cpu-config":{"kvm_capabilities":["1"]},
            "machine-config":{"vcpu_count":2,"mem_size_mib":512},
            "network-interfaces":[{"iface_id":"eth0","host_dev_name":"tap0"}],
            "mmds-config":{"network_interfaces":["eth0"],"version":"V2"},
            "pmem":[{"id":"p","path_on_host":"/p"}],"memory-hotplug":{"total_size_mib":256},
            "metrics":{"metrics_path":"/m"},"logger":{"level":"Debug"}}"#;
        let drive = |id: &str, root| Drive {
            drive_id: id.to_string(),
            is_root_device: root,
            path_on_host: Some(format!("/{id}").into()),
            ..Drive::default()
        };
        let machine = MachineConfig { vcpu_count: 2, mem_size_mib: 512, ..MachineConfig::default() };
        let cpu = CpuConfig { kvm_capabilities: vec![KvmCapability::Add(1)], ..CpuConfig::default() };
        let expected = vec![
            Request::PutLogger(Logger { level: Some(LogLevel::Debug), ..Logger::default() }),
            Request::PutMetrics(Metrics { metrics_path: "/m".into(), ..Metrics::default() }),
            Request::PutMachineConfig(machine),
            Request::PutCpuConfig(cpu),
            Request::PutBootSource(BootSource { kernel_image_path: "/k".into(), ..BootSource::default() }),
            Request::PutDrive(drive("a", true)),
            Request::PutDrive(drive("b", false)),
            Request::PutNetworkInterface(NetworkInterface {
                iface_id: "eth0".to_string(),
                host_dev_name: "tap0".to_string(),
                ..NetworkInterface::default()
            }),
            Request::PutMmdsConfig(MmdsConfig {
                network_interfaces: vec!["eth0".to_string()],
                version: MmdsVersion::V2,
                ..MmdsConfig::default()
            }),
            Request::PutPmem(Pmem { id: "p".to_string(), path_on_host: "/p".into(), ..Pmem::default() }),
            Request::PutMemoryHotplug(MemoryHotplugConfig {
                total_size_mib: 256,
                ..MemoryHotplugConfig::default()
            }),
            Request::PutVsock(Vsock { guest_cid: 3, uds_path: "/v".into(), ..Vsock::default() }),
            Request::PutEntropy(Entropy::default()),
        ];
        assert_eq!(read_text(text).unwrap(), expected);
    }

    #[test]
    fn a_kernel_is_enough() {
        let requests = read_text(r#"{"boot-source":{"kernel_image_path":"/k"}}"#).unwrap();
        assert!(matches!(&requests[..], [Request::PutBootSource(_)]));
    }

    #[test]
    fn the_cpu_configuration_may_be_a_file_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cpu.json");
        let text = format!(r#"{{"boot-source":{{"kernel_image_path":"/k"}},"cpu-config":{path:?}}}"#);
        refused_with(&text, &["cpu.json", "No such file"]);
        std::fs::write(&path, r#"{"msr_modifiers":[{"addr":"0x1","bitmap":"0b1"}]}"#).unwrap();
        assert!(
            matches!(&read_text(&text).unwrap()[0], Request::PutCpuConfig(cpu) if cpu.msr_modifiers[0].addr == 1)
        );
        std::fs::write(&path, r#"{"msr_modifiers":[{"addr":"7"}]}"#).unwrap();
        refused_with(&text, &["cpu.json", "`msr_modifiers[0].addr`", "`7`"]);
    }

    #[test]
    fn an_error_names_the_file_the_section_and_the_field() {
        let boot = r#""boot-source":{"kernel_image_path":"/k"}"#;
        refused_with("{}", &["vm.json", "missing field `boot-source`"]);
        refused_with(
            &format!(r#"{{{boot},"machine":{{}}}}"#),
            &["unknown field `machine`", "`machine-config`"],
        );
        refused_with(
            &format!(r#"{{{boot},"machine-config":{{"vcpu_count":"2","mem_size_mib":1}}}}"#),
            &["`machine-config.vcpu_count`", "\"2\"", "an integer"],
        );
        refused_with(
            &format!(r#"{{{boot},"cpu-config":{{"msr_modifiers":[{{"addr":"0x1","bitmap":"2"}}]}}}}"#),
            &["`cpu-config.msr_modifiers[0].bitmap`", "`2`"],
        );
        refused_with(
            &format!(r#"{{{boot},"drives":[{{"drive_id":"a-b","is_root_device":true}}]}}"#),
            &["drive_id", "a-b", "letters"],
        );
        refused_with(
            &format!(r#"{{{boot},"pmem":[{{"id":"a-b","path_on_host":"/p"}}]}}"#),
            &["`id`", "a-b", "letters"],
        );
        refused_with(
            &format!(r#"{{{boot},"network-interfaces":[{{"iface_id":"a-b","host_dev_name":"t"}}]}}"#),
            &["iface_id", "a-b", "letters"],
        );
    }

    #[test]
    fn the_reply_of_a_vm_config_request_is_a_configuration_file() {
        let config = VmConfig {
            boot_source: BootSource { kernel_image_path: "/k".into(), ..BootSource::default() },
            machine_config: Some(MachineConfig::default()),
            ..VmConfig::default()
        };
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(read_text(&text).unwrap(), requests(config).unwrap());
    }

    #[test]
    fn sections_of_the_reply_that_are_not_configured_are_null_or_empty_lists() {
        let reply = serde_json::to_value(VmConfig::default()).unwrap();
        let expected = serde_json::json!({
            "balloon": null, "drives": [], "cpu-config": null, "logger": null, "machine-config": null,
            "boot-source": {"kernel_image_path": "", "initrd_path": null, "boot_args": null},
            "metrics": null, "memory-hotplug": null, "mmds-config": null, "network-interfaces": [], "pmem": [],
            "vsock": null, "entropy": null
        });
        assert_eq!(reply, expected);
    }

    #[test]
    fn metadata_is_an_object_and_no_error_quotes_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metadata.json");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read_metadata(&path, 10)
        };
        assert!(matches!(read(r#"{"a":"b"}"#), Ok(Request::PutMmds(object)) if object["a"] == "b"));
        for bad in ["\"password\"", "{\"password", "[]", &" ".repeat(MAX_FILE_SIZE as usize + 1)] {
            let message = read(bad).unwrap_err().message;
            assert!(message.contains("metadata.json") && !message.contains("password"), "{message}");
        }
    }

    #[test]
    fn a_file_beyond_the_limit_is_not_read() {
        refused_with(&" ".repeat(MAX_FILE_SIZE as usize + 1), &["larger than the limit of 1048576 bytes"]);
    }
}
