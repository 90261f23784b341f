//! (method, path, body) to a [`Request`]: the table of endpoints, the rules of bodies and ids.
//!
//! Pure: no I/O and no state. Whether the request is legal now is not decided here.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::json;
use crate::types::{
    Balloon, BalloonStartCmd, BalloonStatsUpdate, BalloonUpdate, BootSource, Console, ConsoleUpdate,
    CpuConfig, Drive, DriveUpdate, Entropy, EntropyUpdate, Fault, InstanceAction, Logger, MachineConfig,
    MachineConfigUpdate, Metrics, MmdsConfig, MmdsVersion, NetworkInterface, NetworkInterfaceUpdate, Pmem,
    PmemUpdate, Request, Serial, Vm, Vsock,
};

/// A request, and what its client should be told about how it was made.
#[derive(Clone, Debug, PartialEq)]
pub struct Routed {
    pub request: Request,
    /// The request used something deprecated: what. The reply gets a `Deprecation` header.
    pub deprecated: Option<&'static str>,
}

/// The methods of HTTP that this API has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Get,
    Put,
    Patch,
    Delete,
}

impl Method {
    /// The method of a request line; `None` for one that no endpoint has.
    pub fn parse(text: &str) -> Option<Method> {
        match text {
            "GET" => Some(Method::Get),
            "PUT" => Some(Method::Put),
            "PATCH" => Some(Method::Patch),
            "DELETE" => Some(Method::Delete),
            _ => None,
        }
    }

    /// As in a request line.
    pub fn as_str(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Put => "PUT",
            Method::Patch => "PATCH",
            Method::Delete => "DELETE",
        }
    }
}

/// What a path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Instance,
    Version,
    Vm,
    VmConfig,
    Actions,
    MachineConfig,
    BootSource,
    CpuConfig,
    Drive,
    NetworkInterface,
    Pmem,
    Balloon,
    BalloonStats,
    BalloonHintingStart,
    BalloonHintingStop,
    BalloonHintingStatus,
    MemoryHotplug,
    Console,
    Vsock,
    Entropy,
    Serial,
    Mmds,
    MmdsConfig,
    Logger,
    Metrics,
}

/// Every endpoint with its path and the methods it has. A `{...}` segment is an id.
pub const ENDPOINTS: &[(Endpoint, &str, &[Method])] = &[
    (Endpoint::Instance, "/", &[Method::Get]),
    (Endpoint::Version, "/version", &[Method::Get]),
    (Endpoint::Vm, "/vm", &[Method::Patch]),
    (Endpoint::VmConfig, "/vm/config", &[Method::Get]),
    (Endpoint::Actions, "/actions", &[Method::Put]),
    (Endpoint::MachineConfig, "/machine-config", &[Method::Get, Method::Put, Method::Patch]),
    (Endpoint::BootSource, "/boot-source", &[Method::Put]),
    (Endpoint::CpuConfig, "/cpu-config", &[Method::Put]),
    (Endpoint::Drive, "/drives/{drive_id}", &[Method::Put, Method::Patch, Method::Delete]),
    (
        Endpoint::NetworkInterface,
        "/network-interfaces/{iface_id}",
        &[Method::Put, Method::Patch, Method::Delete],
    ),
    (Endpoint::Pmem, "/pmem/{id}", &[Method::Put, Method::Patch, Method::Delete]),
    (Endpoint::Balloon, "/balloon", &[Method::Get, Method::Put, Method::Patch]),
    (Endpoint::BalloonStats, "/balloon/statistics", &[Method::Get, Method::Patch]),
    (Endpoint::BalloonHintingStart, "/balloon/hinting/start", &[Method::Patch]),
    (Endpoint::BalloonHintingStop, "/balloon/hinting/stop", &[Method::Patch]),
    (Endpoint::BalloonHintingStatus, "/balloon/hinting/status", &[Method::Get]),
    (Endpoint::MemoryHotplug, "/hotplug/memory", &[Method::Get, Method::Put, Method::Patch]),
    (Endpoint::Console, "/console", &[Method::Put, Method::Patch]),
    (Endpoint::Vsock, "/vsock", &[Method::Put]),
    (Endpoint::Entropy, "/entropy", &[Method::Put, Method::Patch]),
    (Endpoint::Serial, "/serial", &[Method::Put]),
    (Endpoint::Mmds, "/mmds", &[Method::Get, Method::Put, Method::Patch]),
    (Endpoint::MmdsConfig, "/mmds/config", &[Method::Put]),
    (Endpoint::Logger, "/logger", &[Method::Put]),
    (Endpoint::Metrics, "/metrics", &[Method::Put]),
];

/// Parses one request. An empty `body` is a request without one.
///
/// # Errors
/// Status 400 with a text for the client: an unknown route, a body where none may be or none where one must be, a
/// malformed or mismatched id, a body that is not what the endpoint takes.
pub fn route(method: &str, path: &str, body: &[u8]) -> Result<Routed, Fault> {
    let unknown = || unknown_route(method, path);
    let parsed_method = Method::parse(method).ok_or_else(unknown)?;
    let located = locate(path);
    check_body(parsed_method, located.map(|(endpoint, _)| endpoint), body)?;
    let (endpoint, id) = located.ok_or_else(unknown)?;
    let at = Place { method, path };
    let request = match (parsed_method, endpoint) {
        (Method::Get, Endpoint::Instance) => Request::GetInstanceInfo,
        (Method::Get, Endpoint::Version) => Request::GetVersion,
        (Method::Get, Endpoint::VmConfig) => Request::GetVmConfig,
        (Method::Patch, Endpoint::Vm) => Request::PatchVm(at.parse::<Vm>(body)?.state),
        (Method::Put, Endpoint::Actions) => Request::Action(at.parse::<InstanceAction>(body)?.action_type),
        (Method::Get, Endpoint::MachineConfig) => Request::GetMachineConfig,
        (Method::Put, Endpoint::MachineConfig) => return put_machine_config(at.parse(body)?),
        (Method::Patch, Endpoint::MachineConfig) => return patch_machine_config(at.parse(body)?),
        (Method::Put, Endpoint::BootSource) => Request::PutBootSource(at.parse::<BootSource>(body)?),
        (Method::Put, Endpoint::CpuConfig) => Request::PutCpuConfig(at.parse::<CpuConfig>(body)?),
        (Method::Put, Endpoint::Drive) => {
            let id = check_id("drive_id", id)?;
            let drive: Drive = at.parse(body)?;
            check_same_id("drive_id", id, &drive.drive_id)?;
            Request::PutDrive(drive)
        }
        (Method::Patch, Endpoint::Drive) => {
            let id = check_id("drive_id", id)?;
            let update: DriveUpdate = at.parse(body)?;
            check_same_id("drive_id", id, &update.drive_id)?;
            Request::PatchDrive(update)
        }
        (Method::Delete, Endpoint::Drive) => Request::DeleteDrive(check_id("drive_id", id)?.to_string()),
        (Method::Put, Endpoint::NetworkInterface) => {
            let id = check_id("iface_id", id)?;
            let interface: NetworkInterface = at.parse(body)?;
            check_same_id("iface_id", id, &interface.iface_id)?;
            Request::PutNetworkInterface(interface)
        }
        (Method::Patch, Endpoint::NetworkInterface) => {
            let id = check_id("iface_id", id)?;
            let update: NetworkInterfaceUpdate = at.parse(body)?;
            check_same_id("iface_id", id, &update.iface_id)?;
            Request::PatchNetworkInterface(update)
        }
        (Method::Delete, Endpoint::NetworkInterface) => {
            Request::DeleteNetworkInterface(check_id("iface_id", id)?.to_string())
        }
        (Method::Put, Endpoint::Pmem) => {
            let id = check_id("id", id)?;
            let pmem: Pmem = at.parse(body)?;
            check_same_id("id", id, &pmem.id)?;
            Request::PutPmem(pmem)
        }
        (Method::Patch, Endpoint::Pmem) => {
            let id = check_id("id", id)?;
            let update: PmemUpdate = at.parse(body)?;
            check_same_id("id", id, &update.id)?;
            Request::PatchPmem(update)
        }
        (Method::Delete, Endpoint::Pmem) => Request::DeletePmem(check_id("id", id)?.to_string()),
        (Method::Get, Endpoint::Balloon) => Request::GetBalloon,
        (Method::Put, Endpoint::Balloon) => Request::PutBalloon(at.parse::<Balloon>(body)?),
        (Method::Patch, Endpoint::Balloon) => Request::PatchBalloon(at.parse::<BalloonUpdate>(body)?),
        (Method::Get, Endpoint::BalloonStats) => Request::GetBalloonStats,
        (Method::Patch, Endpoint::BalloonStats) => {
            Request::PatchBalloonStats(at.parse::<BalloonStatsUpdate>(body)?)
        }
        (Method::Patch, Endpoint::BalloonHintingStart) if body.is_empty() => {
            Request::StartBalloonHinting(BalloonStartCmd::default())
        }
        (Method::Patch, Endpoint::BalloonHintingStart) => Request::StartBalloonHinting(at.parse(body)?),
        // Firecracker does not look at what is in it.
        (Method::Patch, Endpoint::BalloonHintingStop) => Request::StopBalloonHinting,
        (Method::Get, Endpoint::BalloonHintingStatus) => Request::GetBalloonHintingStatus,
        (Method::Get, Endpoint::MemoryHotplug) => Request::GetMemoryHotplug,
        (Method::Put, Endpoint::MemoryHotplug) => Request::PutMemoryHotplug(at.parse(body)?),
        (Method::Patch, Endpoint::MemoryHotplug) => Request::PatchMemoryHotplug(at.parse(body)?),
        (Method::Put, Endpoint::Console) => Request::PutConsole(at.parse::<Console>(body)?),
        (Method::Patch, Endpoint::Console) => Request::PatchConsole(at.parse::<ConsoleUpdate>(body)?),
        (Method::Put, Endpoint::Vsock) => return Ok(put_vsock(at.parse(body)?)),
        (Method::Put, Endpoint::Entropy) => Request::PutEntropy(at.parse::<Entropy>(body)?),
        (Method::Patch, Endpoint::Entropy) => Request::PatchEntropy(at.parse::<EntropyUpdate>(body)?),
        (Method::Put, Endpoint::Serial) => Request::PutSerial(at.parse::<Serial>(body)?),
        (Method::Get, Endpoint::Mmds) => Request::GetMmds,
        (Method::Put, Endpoint::Mmds) => Request::PutMmds(at.parse_secret(body)?),
        (Method::Patch, Endpoint::Mmds) => Request::PatchMmds(at.parse_secret(body)?),
        (Method::Put, Endpoint::MmdsConfig) => return Ok(put_mmds_config(at.parse(body)?)),
        (Method::Put, Endpoint::Logger) => Request::PutLogger(at.parse::<Logger>(body)?),
        (Method::Put, Endpoint::Metrics) => Request::PutMetrics(at.parse::<Metrics>(body)?),
        _ => return Err(unknown()),
    };
    Ok(Routed { request, deprecated: None })
}

/// The endpoint of a path and the id in it, which is empty where the path has none. Empty segments do not count, so
/// that a slash too many does no harm.
pub fn locate(path: &str) -> Option<(Endpoint, &str)> {
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    ENDPOINTS
        .iter()
        .find_map(|(endpoint, template, _)| Some((*endpoint, match_template(template, &segments)?)))
}

/// Checks the id of a resource: ASCII letters, digits and underscores, at least one. `field` is its name in a body.
pub(crate) fn check_id<'a>(field: &str, id: &'a str) -> Result<&'a str, Fault> {
    if id.is_empty() {
        return Err(Fault::bad_request(format!(
            "The id is empty; put the `{field}` at the end of the path and into the body."
        )));
    }
    if !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return Err(Fault::bad_request(format!(
            "`{field}` is {id:?}; an id may have only letters (a-z, A-Z), digits and underscores."
        )));
    }
    Ok(id)
}

fn match_template<'a>(template: &str, segments: &[&'a str]) -> Option<&'a str> {
    let mut wanted = template.split('/').filter(|segment| !segment.is_empty());
    let mut given = segments.iter();
    let mut id = "";
    loop {
        match (wanted.next(), given.next()) {
            (None, None) => return Some(id),
            (Some(want), Some(have)) if want.starts_with('{') => id = have,
            (Some(want), Some(have)) if want == *have => {}
            // The id alone may be missing: that is an empty id, not an unknown route.
            (Some(want), None) if want.starts_with('{') => {}
            _ => return None,
        }
    }
}

fn check_body(method: Method, endpoint: Option<Endpoint>, body: &[u8]) -> Result<(), Fault> {
    let name = method.as_str();
    let optional = matches!(endpoint, Some(Endpoint::BalloonHintingStart | Endpoint::BalloonHintingStop));
    match (method, body.is_empty()) {
        (Method::Get | Method::Delete, false) => {
            Err(Fault::bad_request(format!("A {name} request cannot have a body; send it without one.")))
        }
        (Method::Put | Method::Patch, true) if !optional => {
            Err(Fault::bad_request(format!("Empty {name} request; send a JSON object as its body.")))
        }
        _ => Ok(()),
    }
}

fn check_same_id(field: &str, in_path: &str, in_body: &str) -> Result<(), Fault> {
    if in_path == in_body {
        return Ok(());
    }
    Err(Fault::bad_request(format!(
        "The id from the path does not match the id from the body: the path has {in_path:?}, `{field}` is \
         {in_body:?}; give the same twice."
    )))
}

fn unknown_route(method: &str, path: &str) -> Fault {
    let methods = match locate(path).and_then(|(endpoint, _)| ENDPOINTS.iter().find(|row| row.0 == endpoint))
    {
        Some((_, template, methods)) => {
            let names: Vec<_> = methods.iter().map(|method| method.as_str()).collect();
            format!("{template} has {}", names.join(", "))
        }
        None => "there is no such path".to_string(),
    };
    Fault::bad_request(format!("Invalid request method and/or path: {method} {path}; {methods}."))
}

fn put_machine_config(config: MachineConfig) -> Result<Routed, Fault> {
    let deprecated = config.cpu_template.map(|_| "PUT /machine-config: cpu_template field is deprecated.");
    Ok(Routed { request: Request::PutMachineConfig(config), deprecated })
}

fn patch_machine_config(update: MachineConfigUpdate) -> Result<Routed, Fault> {
    if update == MachineConfigUpdate::default() {
        return Err(Fault::bad_request(
            "PATCH /machine-config: the body changes nothing; give at least one field of the machine configuration.",
        ));
    }
    let deprecated = update.cpu_template.map(|_| "PATCH /machine-config: cpu_template field is deprecated.");
    Ok(Routed { request: Request::PatchMachineConfig(update), deprecated })
}

fn put_vsock(vsock: Vsock) -> Routed {
    let deprecated = vsock.vsock_id.as_ref().map(|_| "PUT /vsock: vsock_id field is deprecated.");
    Routed { request: Request::PutVsock(vsock), deprecated }
}

fn put_mmds_config(config: MmdsConfig) -> Routed {
    let is_old = config.version == MmdsVersion::V1;
    let deprecated = is_old.then_some("PUT /mmds/config: V1 is deprecated. Use V2 instead.");
    Routed { request: Request::PutMmdsConfig(config), deprecated }
}

/// Where a body came from, for its errors.
struct Place<'a> {
    method: &'a str,
    path: &'a str,
}

impl Place<'_> {
    fn parse<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T, Fault> {
        json::parse(body)
            .map_err(|error| Fault::bad_request(format!("Body of {} {}: {error}.", self.method, self.path)))
    }

    /// As [`Place::parse`], for any object, with an error that quotes nothing of it: errors are logged.
    fn parse_secret(&self, body: &[u8]) -> Result<Map<String, Value>, Fault> {
        let error = match serde_json::from_slice(body) {
            Ok(Value::Object(object)) => return Ok(object),
            Ok(_) => "this is JSON but no object; give an object, `{...}`".to_string(),
            Err(error) => format!("this is not valid JSON (line {} column {})", error.line(), error.column()),
        };
        Err(Fault::bad_request(format!("Body of {} {}: {error}.", self.method, self.path)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::*;

    fn accepted(method: &str, path: &str, body: &str) -> Request {
        route(method, path, body.as_bytes())
            .unwrap_or_else(|fault| panic!("{method} {path}: {fault}"))
            .request
    }

    fn refused(method: &str, path: &str, body: &str) -> String {
        let fault =
            route(method, path, body.as_bytes()).expect_err(&format!("{method} {path} {body} is accepted"));
        assert_eq!(fault.status, 400);
        fault.message
    }

    #[track_caller]
    fn refused_with(method: &str, path: &str, body: &str, words: &[&str]) {
        let message = refused(method, path, body);
        for word in words {
            assert!(message.contains(word), "{word:?} is not in: {message}");
        }
    }

    /// For each endpoint with a body: the body with everything in it, and its required fields.
    const BODIES: &[(&str, &str, &str, &[&str])] = &[
        ("PATCH", "/vm", r#"{"state":"Paused"}"#, &["state"]),
        ("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#, &["action_type"]),
        (
            "PUT",
            "/machine-config",
            r#"{"vcpu_count":2,"mem_size_mib":256,"smt":true,"cpu_template":"T2","track_dirty_pages":true,
                "huge_pages":"2M"}"#,
            &["vcpu_count", "mem_size_mib"],
        ),
        (
            "PATCH",
            "/machine-config",
            r#"{"vcpu_count":2,"mem_size_mib":256,"smt":true,"cpu_template":"T2","track_dirty_pages":true,
                "huge_pages":"Transparent"}"#,
            &[],
        ),
        (
            "PUT",
            "/boot-source",
            r#"{"kernel_image_path":"/k","initrd_path":"/i","boot_args":"quiet"}"#,
            &["kernel_image_path"],
        ),
        (
            "PUT",
            "/cpu-config",
            r#"{"kvm_capabilities":["121","!122"],
                "cpuid_modifiers":[{"leaf":"0x1","subleaf":"0b1","flags":1,
                                    "modifiers":[{"register":"ecx","bitmap":"0bx10"}]}],
                "msr_modifiers":[{"addr":"0x10a","bitmap":"0b1"}]}"#,
            &[],
        ),
        (
            "PUT",
            "/drives/d_1",
            r#"{"drive_id":"d_1","partuuid":"u","is_root_device":true,"cache_type":"Writeback","is_read_only":true,
                "path_on_host":"/d","rate_limiter":{"bandwidth":{"size":1,"one_time_burst":2,"refill_time":3},
                "ops":null},"io_engine":"Async","socket":null}"#,
            &["drive_id", "is_root_device"],
        ),
        (
            "PATCH",
            "/drives/d_1",
            r#"{"drive_id":"d_1","path_on_host":"/d","rate_limiter":{}}"#,
            &["drive_id"],
        ),
        (
            "PUT",
            "/network-interfaces/eth_0",
            r#"{"iface_id":"eth_0","host_dev_name":"tap0","guest_mac":"06:00:AC:10:00:02","mtu":1500,"queue_pairs":2,
                "rx_rate_limiter":{"ops":{"size":1,"refill_time":2}},"tx_rate_limiter":{},"vhost":false,
                "vhost_fds":"fd:a,fd:b"}"#,
            &["iface_id", "host_dev_name"],
        ),
        (
            "PATCH",
            "/network-interfaces/eth_0",
            r#"{"iface_id":"eth_0","rx_rate_limiter":{},"tx_rate_limiter":{}}"#,
            &["iface_id"],
        ),
        (
            "PUT",
            "/pmem/p_1",
            r#"{"id":"p_1","path_on_host":"/p","root_device":true,"read_only":true,
                "rate_limiter":{"ops":{"size":1,"refill_time":2}}}"#,
            &["id", "path_on_host"],
        ),
        ("PATCH", "/pmem/p_1", r#"{"id":"p_1","rate_limiter":{}}"#, &["id"]),
        (
            "PUT",
            "/balloon",
            r#"{"amount_mib":1,"deflate_on_oom":true,"stats_polling_interval_s":2,"free_page_hinting":true,
                "free_page_reporting":true}"#,
            &["amount_mib", "deflate_on_oom"],
        ),
        ("PATCH", "/balloon", r#"{"amount_mib":1}"#, &["amount_mib"]),
        ("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s":1}"#, &["stats_polling_interval_s"]),
        ("PATCH", "/balloon/hinting/start", r#"{"acknowledge_on_stop":false}"#, &[]),
        (
            "PUT",
            "/hotplug/memory",
            r#"{"total_size_mib":1024,"slot_size_mib":256,"block_size_mib":4}"#,
            &["total_size_mib"],
        ),
        ("PATCH", "/hotplug/memory", r#"{"requested_size_mib":512}"#, &["requested_size_mib"]),
        ("PUT", "/vsock", r#"{"vsock_id":"v","guest_cid":3,"uds_path":"/v"}"#, &["guest_cid", "uds_path"]),
        ("PUT", "/entropy", r#"{"rate_limiter":{"ops":{"size":1,"refill_time":2}}}"#, &[]),
        (
            "PUT",
            "/mmds/config",
            r#"{"version":"V2","network_interfaces":["eth0"],"ipv4_address":"169.254.1.2","imds_compat":true}"#,
            &["network_interfaces"],
        ),
        ("PUT", "/serial", r#"{"serial_out_path":"/s","rate_limiter":{"size":1,"refill_time":2}}"#, &[]),
        (
            "PUT",
            "/logger",
            r#"{"log_path":"/l","level":"wArNiNg","show_level":true,"show_log_origin":false,"module":"m"}"#,
            &[],
        ),
        (
            "PUT",
            "/metrics",
            r#"{"metrics_path":"/m","emit_id":true,"properties":{"a":"b"}}"#,
            &["metrics_path"],
        ),
    ];

    #[test]
    fn every_endpoint_takes_a_full_body() {
        for (method, path, body, _) in BODIES {
            accepted(method, path, body);
        }
    }

    #[test]
    fn every_endpoint_names_a_required_field_that_is_missing() {
        for (method, path, body, required) in BODIES {
            for field in *required {
                let mut object: serde_json::Map<_, _> = serde_json::from_str(body).unwrap();
                object.remove(*field).unwrap();
                let body = serde_json::Value::from(object).to_string();
                refused_with(method, path, &body, &[path, &format!("missing field `{field}`"), "required"]);
            }
        }
    }

    #[test]
    fn every_endpoint_names_a_field_it_does_not_know_and_lists_those_it_does() {
        for (method, path, body, _) in BODIES {
            let mut object: serde_json::Map<_, _> = serde_json::from_str(body).unwrap();
            let known: Vec<_> = object.keys().map(|field| format!("`{field}`")).collect();
            object.insert("colour".to_string(), "red".into());
            let body = serde_json::Value::from(object).to_string();
            refused_with(method, path, &body, &[path, "unknown field `colour`"]);
            refused_with(method, path, &body, &known.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }

    #[test]
    fn every_endpoint_names_a_field_of_a_wrong_type() {
        for (method, path, body, _) in BODIES {
            let object: serde_json::Map<_, _> = serde_json::from_str(body).unwrap();
            for field in object.keys() {
                let mut wrong = object.clone();
                // No field of any body is a list of lists.
                wrong.insert(field.clone(), serde_json::json!([[]]));
                let body = serde_json::Value::from(wrong).to_string();
                refused_with(method, path, &body, &[path, &format!("`{field}")]);
            }
        }
    }

    #[test]
    fn every_endpoint_refuses_what_is_not_one_json_object() {
        let nested = format!("{}1{}", r#"{"a":"#.repeat(10_000), "}".repeat(10_000));
        for (method, path, body, _) in BODIES {
            let twice = format!("{body}{body}");
            for bad in ["x", "{", "[]", "null", "17", "\"text\"", "{}}", "{\"a\":1e999}", &twice, &nested] {
                refused(method, path, bad);
            }
            let broken_utf8 = [b"{\"", b"\xff\xfe".as_slice(), b"\":1}"].concat();
            assert!(route(method, path, &broken_utf8).is_err());
        }
    }

    #[test]
    fn an_error_says_what_would_be_right() {
        let put = |body: &str, words: &[&str]| refused_with("PUT", "/machine-config", body, words);
        put(
            r#"{"vcpu_count":300,"mem_size_mib":1}"#,
            &["PUT /machine-config", "field `vcpu_count`", "`300`", "an integer from 0 to 255", "line 1"],
        );
        put(r#"{"vcpu_count":-2,"mem_size_mib":1}"#, &["`vcpu_count`", "`-2`", "from 0 to 255"]);
        put(
            r#"{"vcpu_count":1,"mem_size_mib":18446744073709551616}"#,
            &["`mem_size_mib`", "18446744073709551615"],
        );
        put(r#"{"vcpu_count":1e999,"mem_size_mib":1}"#, &["number out of range"]);
        put(r#"{"vcpu_count":1,"mem_size_mib":1,"huge_pages":2}"#, &["field `huge_pages`", "give a string"]);
        put(r#"{"vcpu_count":1.5,"mem_size_mib":1}"#, &["`vcpu_count`", "1.5", "an integer"]);
        put(r#"{"vcpu_count":1,"mem_size_mib":1,"smt":"yes"}"#, &["`smt`", "\"yes\"", "true or false"]);
        put(
            r#"{"vcpu_count":1,"mem_size_mib":1,"huge_pages":"1G"}"#,
            &["`1G`", "`None`, `Transparent`, `2M`"],
        );
        put(r#"{"vcpu_count":1,"vcpu_count":1,"mem_size_mib":1}"#, &["duplicate field `vcpu_count`", "once"]);
        refused_with(
            "PUT",
            "/drives/d",
            r#"{"drive_id":"d","is_root_device":true,"rate_limiter":{"ops":{"size":1}}}"#,
            &["missing field `refill_time` in `rate_limiter.ops`"],
        );
        refused_with(
            "PUT",
            "/entropy",
            r#"{"rate_limiter":{"opps":{}}}"#,
            &["unknown field `opps` in `rate_limiter`", "`bandwidth`, `ops`"],
        );
        refused_with("PUT", "/logger", r#"{"level":"loud"}"#, &["`level`", "`loud`", "`Trace`, `Off`"]);
        refused_with(
            "PUT",
            "/network-interfaces/e",
            r#"{"iface_id":"e","host_dev_name":"t","guest_mac":"06:00"}"#,
            &["`guest_mac`", "\"06:00\"", "a MAC address such as"],
        );
        refused_with(
            "PUT",
            "/network-interfaces/e",
            r#"{"iface_id":"f","host_dev_name":"t"}"#,
            &["does not match"],
        );
        refused_with("PATCH", "/network-interfaces/e", r#"{"iface_id":"f"}"#, &["does not match"]);
        refused_with("PUT", "/actions", "{", &["not valid JSON", "line 1 column 1"]);
        refused_with("PUT", "/actions", "[\"InstanceStart\"]", &["a list", "object"]);
    }

    #[test]
    fn a_client_cannot_forge_the_words_of_an_error() {
        refused_with(
            "PUT",
            "/entropy",
            r#"{"x`, expected one of `y":1}"#,
            &["unknown field `x`, expected one of `y`; allowed here: `rate_limiter`, `io_thread`"],
        );
    }

    #[test]
    fn a_token_bucket_takes_fields_it_does_not_know() {
        let body = r#"{"rate_limiter":{"ops":{"size":1,"refill_time":2,"colour":"red"}}}"#;
        let ops = Some(TokenBucket { size: 1, one_time_burst: None, refill_time: 2 });
        let rate_limiter = Some(RateLimiter { bandwidth: None, ops });
        assert_eq!(
            accepted("PUT", "/entropy", body),
            Request::PutEntropy(Entropy { rate_limiter, io_thread: None })
        );
    }

    #[test]
    fn defaults_are_those_of_firecracker() {
        let machine = accepted("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":128}"#);
        assert_eq!(machine, Request::PutMachineConfig(MachineConfig::default()));
        let drive = accepted("PUT", "/drives/d", r#"{"drive_id":"d","is_root_device":false}"#);
        let expected = Drive { drive_id: "d".to_string(), cache_type: CacheType::Unsafe, ..Drive::default() };
        assert_eq!(drive, Request::PutDrive(expected));
        assert_eq!(accepted("PUT", "/logger", "{}"), Request::PutLogger(Logger::default()));
    }

    #[test]
    fn a_get_or_delete_with_a_body_and_a_put_or_patch_without_are_refused() {
        refused_with("GET", "/", "{}", &["GET request cannot have a body"]);
        refused_with("DELETE", "/drives/d", "{}", &["DELETE request cannot have a body"]);
        refused_with("PUT", "/boot-source", "", &["Empty PUT request"]);
        refused_with("PATCH", "/vm", "", &["Empty PATCH request"]);
    }

    #[test]
    fn hints_are_started_and_stopped_without_a_body_too() {
        let start =
            |acknowledge_on_stop| Request::StartBalloonHinting(BalloonStartCmd { acknowledge_on_stop });
        assert_eq!(accepted("PATCH", "/balloon/hinting/start", ""), start(true));
        assert_eq!(accepted("PATCH", "/balloon/hinting/start", "{}"), start(true));
        let without = r#"{"acknowledge_on_stop":false}"#;
        assert_eq!(accepted("PATCH", "/balloon/hinting/start", without), start(false));
        for body in ["", "{}", "anything"] {
            assert_eq!(accepted("PATCH", "/balloon/hinting/stop", body), Request::StopBalloonHinting);
        }
        refused_with("PATCH", "/balloon", "", &["Empty PATCH request"]);
        refused_with("GET", "/balloon/hinting", "", &["no such path"]);
    }

    #[test]
    fn an_unknown_route_is_named_with_what_its_path_has() {
        refused_with(
            "GET",
            "/nowhere",
            "",
            &["Invalid request method and/or path: GET /nowhere", "no such path"],
        );
        refused_with("PATCH", "/boot-source", "{}", &["PATCH /boot-source", "/boot-source has PUT"]);
        refused_with("POST", "/actions", "{}", &["POST /actions", "/actions has PUT"]);
        refused_with("get", "/", "", &["get /"]);
        refused_with("GET", "/vm", "", &["GET /vm", "/vm has PATCH"]);
        refused_with("GET", "/version/x", "", &["no such path"]);
        refused_with("PUT", "/drives/a/b", "{}", &["no such path"]);
        for later in ["/snapshot/create", "/snapshot/load"] {
            refused_with("PUT", later, "{}", &["Invalid request method", later]);
        }
    }

    #[test]
    fn a_slash_too_many_does_no_harm() {
        assert_eq!(accepted("GET", "//version/", ""), Request::GetVersion);
        assert_eq!(accepted("DELETE", "/drives//d/", ""), Request::DeleteDrive("d".to_string()));
        let interface = Request::DeleteNetworkInterface("d".to_string());
        assert_eq!(accepted("DELETE", "/network-interfaces/d", ""), interface);
        assert_eq!(accepted("DELETE", "/pmem/d", ""), Request::DeletePmem("d".to_string()));
    }

    #[test]
    fn an_id_is_letters_digits_and_underscores_and_the_same_in_path_and_body() {
        let body = |id: &str| format!(r#"{{"drive_id":{id:?},"is_root_device":false}}"#);
        for id in ["a", "Z9_", "0"] {
            accepted("PUT", &format!("/drives/{id}"), &body(id));
            accepted("DELETE", &format!("/drives/{id}"), "");
        }
        for bad in ["a-b", "a.b", "a%20b", "é", "a b"] {
            refused_with("PUT", &format!("/drives/{bad}"), &body(bad), &["drive_id", "letters"]);
            refused_with("DELETE", &format!("/drives/{bad}"), "", &["drive_id", "letters"]);
        }
        for empty in ["/drives", "/drives/"] {
            refused_with("PUT", empty, &body(""), &["id is empty"]);
            refused_with("PATCH", empty, r#"{"drive_id":""}"#, &["id is empty"]);
            refused_with("DELETE", empty, "", &["id is empty"]);
        }
        refused_with("PUT", "/drives/a", &body("b"), &["\"a\"", "\"b\"", "does not match"]);
        refused_with("PATCH", "/drives/a", r#"{"drive_id":"b"}"#, &["does not match"]);
    }

    #[test]
    fn a_patch_of_the_machine_must_change_something() {
        refused_with("PATCH", "/machine-config", "{}", &["changes nothing"]);
        refused_with("PATCH", "/machine-config", r#"{"smt":null}"#, &["changes nothing"]);
    }

    #[test]
    fn a_cpu_template_is_accepted_and_reported_as_deprecated() {
        let put =
            route("PUT", "/machine-config", br#"{"vcpu_count":1,"mem_size_mib":1,"cpu_template":"None"}"#);
        assert_eq!(put.unwrap().deprecated, Some("PUT /machine-config: cpu_template field is deprecated."));
        let patch = route("PATCH", "/machine-config", br#"{"cpu_template":"T2"}"#);
        assert_eq!(
            patch.unwrap().deprecated,
            Some("PATCH /machine-config: cpu_template field is deprecated.")
        );
        let without = route("PUT", "/machine-config", br#"{"vcpu_count":1,"mem_size_mib":1}"#);
        assert_eq!(without.unwrap().deprecated, None);
    }

    #[test]
    fn an_id_of_the_socket_device_is_accepted_and_reported_as_deprecated() {
        let put = |body: &[u8]| route("PUT", "/vsock", body).unwrap().deprecated;
        let with = put(br#"{"vsock_id":"v","guest_cid":3,"uds_path":"/v"}"#);
        assert_eq!(with, Some("PUT /vsock: vsock_id field is deprecated."));
        assert_eq!(put(br#"{"guest_cid":3,"uds_path":"/v"}"#), None);
    }

    #[test]
    fn metadata_is_any_object_and_no_error_quotes_it() {
        let secret = serde_json::json!({"a": [1, null, {"password": "1234"}]});
        let object = secret.as_object().unwrap().clone();
        let body = secret.to_string();
        assert_eq!(accepted("PUT", "/mmds", &body), Request::PutMmds(object.clone()));
        assert_eq!(accepted("PATCH", "/mmds", &body), Request::PatchMmds(object));
        let nested = format!("{}1{}", r#"{"password":"#.repeat(200), "}".repeat(200));
        for bad in ["\"password\"", "[\"password\"]", "{\"password", "{\"password\":x}", "17", &nested] {
            let message = refused("PUT", "/mmds", bad);
            assert!(message.contains("PUT /mmds") && !message.contains("password"), "{message}");
        }
    }

    #[test]
    fn the_first_version_of_the_metadata_service_is_accepted_and_reported_as_deprecated() {
        let put = |body: &[u8]| route("PUT", "/mmds/config", body).unwrap().deprecated;
        let told = Some("PUT /mmds/config: V1 is deprecated. Use V2 instead.");
        assert_eq!(put(br#"{"network_interfaces":["a"]}"#), told);
        assert_eq!(put(br#"{"network_interfaces":["a"],"version":"V1"}"#), told);
        assert_eq!(put(br#"{"network_interfaces":["a"],"version":"V2"}"#), None);
    }

    #[test]
    fn each_endpoint_has_exactly_the_methods_of_its_row() {
        for (_, template, methods) in ENDPOINTS {
            let path = template.replace("{drive_id}", "d").replace("{iface_id}", "d").replace("{id}", "d");
            for method in ["GET", "PUT", "PATCH", "DELETE", "POST", "HEAD"] {
                let body = if matches!(method, "PUT" | "PATCH") { "{" } else { "" };
                let known = match route(method, &path, body.as_bytes()) {
                    Ok(_) => true,
                    Err(fault) => !fault.message.starts_with("Invalid request method"),
                };
                let listed = Method::parse(method).is_some_and(|method| methods.contains(&method));
                assert_eq!(known, listed, "{method} {path}");
            }
        }
    }
}
