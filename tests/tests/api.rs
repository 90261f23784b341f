//! Every endpoint of the API answers right requests, and refuses wrong ones with a status and a text that names the field;
//! what is refused changes nothing.
//!
//! Which body is well formed is tested with the types (api-socket); here is what a client sees of a whole VMM.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use api_socket::{ActionType, Client, InstanceState, Request};
use berth_tests::guest::setup::disk_drive;
use berth_tests::guest::{Ended, Guest, Kernel, Name, Setup, Vmm, blank_disk, limits};
use serde_json::{Value, json};

/// A request, the status it gets, and words that its answer must have.
type Case<'a> = (&'a str, &'a str, &'a str, u16, &'a [&'a str]);

const BEFORE_START: &str = "not supported before starting the microVM";
const AFTER_START: &str = "not supported after starting the microVM";

/// Refused in every state, for what they are.
const MALFORMED: &[Case] = &[
    ("GET", "/nowhere", "", 400, &["/nowhere", "no such path"]),
    ("POST", "/actions", "{}", 400, &["POST /actions"]),
    ("GET", "/", "{}", 400, &["GET request cannot have a body"]),
    ("PUT", "/actions", "", 400, &["Empty PUT request"]),
    ("PUT", "/actions", "{", 400, &["not valid JSON"]),
    ("PUT", "/actions", "{}", 400, &["missing field `action_type`"]),
    (
        "PUT",
        "/actions",
        r#"{"action_type":"Explode"}"#,
        400,
        &["`action_type`", "`Explode`", "`InstanceStart`"],
    ),
    ("PUT", "/actions", r#"{"action_type":7}"#, 400, &["`action_type`"]),
    ("PUT", "/actions", r#"{"action_type":"InstanceStart","now":true}"#, 400, &["unknown field `now`"]),
    ("PATCH", "/vm", "{}", 400, &["missing field `state`"]),
    ("PATCH", "/vm", r#"{"state":"Asleep"}"#, 400, &["`state`", "`Asleep`", "`Paused`, `Resumed`"]),
    ("PATCH", "/vm", r#"{"state":["Paused"]}"#, 400, &["`state`"]),
    ("PATCH", "/vm", r#"{"state":"Paused","why":""}"#, 400, &["unknown field `why`"]),
    ("GET", "/vm", "", 400, &["GET /vm"]),
    ("PUT", "/machine-config", r#"{"mem_size_mib":128}"#, 400, &["missing field `vcpu_count`"]),
    ("PUT", "/machine-config", r#"{"vcpu_count":1}"#, 400, &["missing field `mem_size_mib`"]),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":"1","mem_size_mib":128}"#,
        400,
        &["`vcpu_count`", "an integer"],
    ),
    ("PUT", "/machine-config", r#"{"vcpu_count":256,"mem_size_mib":128}"#, 400, &["`vcpu_count`", "`256`"]),
    ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":-1}"#, 400, &["`mem_size_mib`", "`-1`"]),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":1,"mem_size_mib":1,"huge_pages":"1G"}"#,
        400,
        &["`huge_pages`", "`1G`"],
    ),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":1,"mem_size_mib":1,"cores":2}"#,
        400,
        &["unknown field `cores`"],
    ),
    ("PATCH", "/machine-config", "{}", 400, &["changes nothing"]),
    ("PATCH", "/machine-config", r#"{"smt":1}"#, 400, &["`smt`", "true or false"]),
    ("PUT", "/boot-source", "{}", 400, &["missing field `kernel_image_path`"]),
    ("PUT", "/boot-source", r#"{"kernel_image_path":3}"#, 400, &["`kernel_image_path`", "a path"]),
    ("PUT", "/boot-source", r#"{"kernel_image_path":"k","cmdline":""}"#, 400, &["unknown field `cmdline`"]),
    (
        "PUT",
        "/cpu-config",
        r#"{"msr_modifiers":[{"addr":"ten","bitmap":"0b1"}]}"#,
        400,
        &["`msr_modifiers[0].addr`"],
    ),
    (
        "PUT",
        "/cpu-config",
        r#"{"cpuid_modifiers":[{"leaf":"0x1"}]}"#,
        400,
        &["cpuid_modifiers[0]", "missing field"],
    ),
    ("PUT", "/cpu-config", r#"{"kvm_capabilities":["x"]}"#, 400, &["`kvm_capabilities[0]`", "`x`"]),
    ("PUT", "/cpu-config", r#"{"template":"T2"}"#, 400, &["unknown field `template`"]),
    ("PUT", "/drives/d", r#"{"drive_id":"d"}"#, 400, &["missing field `is_root_device`"]),
    (
        "PUT",
        "/drives/d",
        r#"{"drive_id":"e","is_root_device":false}"#,
        400,
        &["`drive_id`", "\"d\"", "\"e\""],
    ),
    ("PUT", "/drives/d-1", r#"{"drive_id":"d-1","is_root_device":false}"#, 400, &["`drive_id`", "letters"]),
    ("PUT", "/drives/", r#"{"drive_id":"","is_root_device":false}"#, 400, &["id is empty"]),
    (
        "PUT",
        "/drives/d",
        r#"{"drive_id":"d","is_root_device":"no"}"#,
        400,
        &["`is_root_device`", "true or false"],
    ),
    (
        "PUT",
        "/drives/d",
        r#"{"drive_id":"d","is_root_device":false,"size":1}"#,
        400,
        &["unknown field `size`"],
    ),
    ("PATCH", "/drives/d", "{}", 400, &["missing field `drive_id`"]),
    ("PATCH", "/drives/d", r#"{"drive_id":"d","is_read_only":true}"#, 400, &["unknown field `is_read_only`"]),
    ("DELETE", "/drives/d", "{}", 400, &["DELETE request cannot have a body"]),
    (
        "PUT",
        "/entropy",
        r#"{"rate_limiter":{"ops":{"size":1}}}"#,
        400,
        &["`refill_time`", "`rate_limiter.ops`"],
    ),
    ("PUT", "/entropy", r#"{"rate_limiter":5}"#, 400, &["`rate_limiter`", "an object"]),
    ("PUT", "/entropy", r#"{"source":"/dev/random"}"#, 400, &["unknown field `source`"]),
    ("PUT", "/serial", r#"{"serial_out_path":1}"#, 400, &["`serial_out_path`", "a path"]),
    ("PUT", "/serial", r#"{"baud":9600}"#, 400, &["unknown field `baud`"]),
    ("PUT", "/logger", r#"{"level":"Loud"}"#, 400, &["`level`", "`Loud`", "`Debug`"]),
    ("PUT", "/logger", r#"{"show_level":"yes"}"#, 400, &["`show_level`", "true or false"]),
    ("PUT", "/logger", r#"{"path":"/l"}"#, 400, &["unknown field `path`"]),
    ("PUT", "/metrics", "{}", 400, &["missing field `metrics_path`"]),
    ("PUT", "/metrics", r#"{"metrics_path":false}"#, 400, &["`metrics_path`", "a path"]),
    ("PUT", "/metrics", r#"{"metrics_path":"m","every":1}"#, 400, &["unknown field `every`"]),
    ("PUT", "/network-interfaces/n", r#"{"iface_id":"n"}"#, 400, &["missing field `host_dev_name`"]),
    (
        "PUT",
        "/network-interfaces/n",
        r#"{"iface_id":"m","host_dev_name":"t"}"#,
        400,
        &["`iface_id`", "\"n\"", "\"m\""],
    ),
    (
        "PUT",
        "/network-interfaces/n",
        r#"{"iface_id":"n","host_dev_name":"t","guest_mac":"06:00"}"#,
        400,
        &["`guest_mac`", "06:00"],
    ),
    (
        "PUT",
        "/network-interfaces/n",
        r#"{"iface_id":"n","host_dev_name":"t","mtu":70000}"#,
        400,
        &["`mtu`", "`70000`"],
    ),
    (
        "PUT",
        "/network-interfaces/n",
        r#"{"iface_id":"n","host_dev_name":"t","vlan":1}"#,
        400,
        &["unknown field `vlan`"],
    ),
    ("PATCH", "/network-interfaces/n", "{}", 400, &["missing field `iface_id`"]),
    (
        "PATCH",
        "/network-interfaces/n",
        r#"{"iface_id":"n","host_dev_name":"t"}"#,
        400,
        &["unknown field `host_dev_name`"],
    ),
    ("GET", "/network-interfaces/n", "", 400, &["GET /network-interfaces/n"]),
    ("PUT", "/pmem/p", r#"{"id":"p"}"#, 400, &["missing field `path_on_host`"]),
    ("PUT", "/pmem/p", r#"{"id":"q","path_on_host":"/p"}"#, 400, &["`id`", "\"p\"", "\"q\""]),
    (
        "PUT",
        "/pmem/p",
        r#"{"id":"p","path_on_host":"/p","read_only":"yes"}"#,
        400,
        &["`read_only`", "true or false"],
    ),
    ("PUT", "/pmem/p", r#"{"id":"p","path_on_host":"/p","size":1}"#, 400, &["unknown field `size`"]),
    ("PATCH", "/pmem/p", r#"{"id":"p","path_on_host":"/p"}"#, 400, &["unknown field `path_on_host`"]),
    ("PUT", "/vsock", r#"{"guest_cid":3}"#, 400, &["missing field `uds_path`"]),
    ("PUT", "/vsock", r#"{"guest_cid":"3","uds_path":"v"}"#, 400, &["`guest_cid`", "an integer"]),
    ("PUT", "/vsock", r#"{"guest_cid":3,"uds_path":"v","port":1}"#, 400, &["unknown field `port`"]),
    ("GET", "/vsock", "", 400, &["GET /vsock"]),
    ("PUT", "/balloon", r#"{"amount_mib":1}"#, 400, &["missing field `deflate_on_oom`"]),
    ("PUT", "/balloon", r#"{"deflate_on_oom":true}"#, 400, &["missing field `amount_mib`"]),
    ("PUT", "/balloon", r#"{"amount_mib":-1,"deflate_on_oom":true}"#, 400, &["`amount_mib`", "`-1`"]),
    ("PUT", "/balloon", r#"{"amount_mib":1,"deflate_on_oom":true,"size":1}"#, 400, &["unknown field `size`"]),
    ("PATCH", "/balloon", "{}", 400, &["missing field `amount_mib`"]),
    ("PATCH", "/balloon/statistics", "{}", 400, &["missing field `stats_polling_interval_s`"]),
    ("PATCH", "/balloon/hinting/start", r#"{"acknowledge":true}"#, 400, &["unknown field `acknowledge`"]),
    ("PATCH", "/balloon/hinting/pause", "{}", 400, &["/balloon/hinting/pause"]),
    ("GET", "/balloon/hinting/start", "", 400, &["GET /balloon/hinting/start"]),
    ("PUT", "/mmds", "", 400, &["Empty PUT request"]),
    ("PUT", "/mmds", "[1]", 400, &["an object"]),
    ("PATCH", "/mmds", "", 400, &["Empty PATCH request"]),
    ("PUT", "/mmds/config", "{}", 400, &["missing field `network_interfaces`"]),
    (
        "PUT",
        "/mmds/config",
        r#"{"network_interfaces":["n"],"version":"V3"}"#,
        400,
        &["`version`", "`V3`", "`V1`"],
    ),
    (
        "PUT",
        "/mmds/config",
        r#"{"network_interfaces":["n"],"ipv4_address":"nowhere"}"#,
        400,
        &["`ipv4_address`"],
    ),
    ("PUT", "/mmds/config", r#"{"network_interfaces":["n"],"ttl":1}"#, 400, &["unknown field `ttl`"]),
    ("PUT", "/hotplug/memory", "{}", 400, &["missing field `total_size_mib`"]),
    ("PUT", "/hotplug/memory", r#"{"total_size_mib":"1"}"#, 400, &["`total_size_mib`", "an integer"]),
    ("PUT", "/hotplug/memory", r#"{"total_size_mib":256,"size":1}"#, 400, &["unknown field `size`"]),
    ("PATCH", "/hotplug/memory", "{}", 400, &["missing field `requested_size_mib`"]),
    ("DELETE", "/hotplug/memory", "", 400, &["DELETE /hotplug/memory"]),
    ("PUT", "/console", "{}", 400, &["missing field `output_path`"]),
    ("PATCH", "/console", r#"{"columns":"80"}"#, 400, &["`columns`", "give u16"]),
];

/// Refused before the start: values out of range or that do not fit, and what only a started guest can do.
const REFUSED_BEFORE: &[Case] = &[
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":0,"mem_size_mib":128}"#,
        400,
        &["`vcpu_count` is 0", "from 1 to 32"],
    ),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":33,"mem_size_mib":128}"#,
        400,
        &["`vcpu_count` is 33", "from 1 to 32"],
    ),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":3,"mem_size_mib":128,"smt":true}"#,
        400,
        &["`vcpu_count`", "`smt`"],
    ),
    ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":0}"#, 400, &["mem_size_mib", "0"]),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":1,"mem_size_mib":18446744073709551615}"#,
        400,
        &["mem_size_mib"],
    ),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":1,"mem_size_mib":129,"huge_pages":"2M"}"#,
        400,
        &["`mem_size_mib` is 129", "multiple of 2"],
    ),
    (
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":1,"mem_size_mib":128,"cpu_template":"T2"}"#,
        400,
        &["`cpu_template`", "T2"],
    ),
    ("PATCH", "/machine-config", r#"{"vcpu_count":33}"#, 400, &["`vcpu_count` is 33"]),
    (
        "PUT",
        "/boot-source",
        r#"{"kernel_image_path":"/no/such/kernel"}"#,
        400,
        &["`kernel_image_path`", "/no/such/kernel"],
    ),
    ("PUT", "/boot-source", r#"{"kernel_image_path":"/"}"#, 400, &["`kernel_image_path`", "no file"]),
    ("PUT", "/boot-source", r#"{"kernel_image_path":"/dev/null","boot_args":"a\nb"}"#, 400, &["`boot_args`"]),
    ("PUT", "/drives/d", r#"{"drive_id":"d","is_root_device":false}"#, 400, &["`path_on_host`"]),
    (
        "PUT",
        "/drives/d",
        r#"{"drive_id":"d","is_root_device":false,"path_on_host":"/no/such/disk"}"#,
        400,
        &["`path_on_host`", "/no/such/disk"],
    ),
    (
        "PUT",
        "/drives/d",
        r#"{"drive_id":"d","is_root_device":false,"path_on_host":"/","is_read_only":true}"#,
        400,
        &["`path_on_host`"],
    ),
    (
        "PUT",
        "/drives/d",
        r#"{"drive_id":"d","is_root_device":false,"path_on_host":"/dev/null","partuuid":"a b"}"#,
        400,
        &["`partuuid`"],
    ),
    ("PUT", "/drives/d", r#"{"drive_id":"d","is_root_device":false,"socket":"/s"}"#, 400, &["`socket`"]),
    (
        "PUT",
        "/serial",
        r#"{"serial_out_path":"/no/such/place"}"#,
        400,
        &["`serial_out_path`", "/no/such/place"],
    ),
    ("PUT", "/logger", r#"{"log_path":"/no/such/place"}"#, 400, &["`log_path`", "/no/such/place"]),
    ("PUT", "/metrics", r#"{"metrics_path":"/no/such/place"}"#, 400, &["`metrics_path`", "/no/such/place"]),
    (
        "PUT",
        "/actions",
        r#"{"action_type":"InstanceStart"}"#,
        400,
        &["`kernel_image_path`", "PUT /boot-source"],
    ),
    ("PUT", "/actions", r#"{"action_type":"FlushMetrics"}"#, 400, &[BEFORE_START]),
    ("PUT", "/actions", r#"{"action_type":"SendCtrlAltDel"}"#, 400, &[BEFORE_START]),
    ("PATCH", "/vm", r#"{"state":"Paused"}"#, 400, &[BEFORE_START]),
    ("PATCH", "/vm", r#"{"state":"Resumed"}"#, 400, &[BEFORE_START]),
    ("PATCH", "/drives/d", r#"{"drive_id":"d"}"#, 400, &[BEFORE_START]),
    ("DELETE", "/drives/d", "", 400, &[BEFORE_START]),
    (
        "PUT",
        "/network-interfaces/n",
        r#"{"iface_id":"n","host_dev_name":"no-such-tap","mtu":67}"#,
        400,
        &["`mtu`", "67", "68"],
    ),
    ("PATCH", "/network-interfaces/n", r#"{"iface_id":"n"}"#, 400, &[BEFORE_START]),
    ("DELETE", "/network-interfaces/n", "", 400, &[BEFORE_START]),
    (
        "PUT",
        "/pmem/p",
        r#"{"id":"p","path_on_host":"/no/such/file"}"#,
        400,
        &["`path_on_host`", "/no/such/file"],
    ),
    ("PATCH", "/pmem/p", r#"{"id":"p"}"#, 400, &[BEFORE_START]),
    ("DELETE", "/pmem/p", "", 400, &[BEFORE_START]),
    ("PUT", "/vsock", r#"{"guest_cid":2,"uds_path":"v"}"#, 400, &["`guest_cid`", "2", "3"]),
    ("PUT", "/vsock", r#"{"guest_cid":4294967295,"uds_path":"v"}"#, 400, &["`guest_cid`"]),
    (
        "PUT",
        "/vsock",
        r#"{"guest_cid":3,"uds_path":"/no/such/place/v"}"#,
        400,
        &["`uds_path`", "/no/such/place/v"],
    ),
    ("PUT", "/balloon", r#"{"amount_mib":129,"deflate_on_oom":true}"#, 400, &["`amount_mib`", "129", "128"]),
    ("GET", "/balloon", "", 400, &["balloon"]),
    ("PATCH", "/balloon", r#"{"amount_mib":1}"#, 400, &[BEFORE_START]),
    ("GET", "/balloon/statistics", "", 400, &[BEFORE_START]),
    ("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s":1}"#, 400, &[BEFORE_START]),
    ("PATCH", "/balloon/hinting/start", "", 400, &[BEFORE_START]),
    ("PATCH", "/balloon/hinting/stop", "", 400, &[BEFORE_START]),
    ("GET", "/balloon/hinting/status", "", 400, &[BEFORE_START]),
    ("PUT", "/mmds/config", r#"{"network_interfaces":[]}"#, 400, &["`network_interfaces`"]),
    ("PUT", "/mmds/config", r#"{"network_interfaces":["n"]}"#, 400, &["`network_interfaces`", "n"]),
    ("PUT", "/console", r#"{"output_path":"/no/such/place"}"#, 400, &["`output_path`", "/no/such/place"]),
    ("PATCH", "/console", r#"{"columns":80,"rows":25}"#, 400, &[BEFORE_START]),
    ("GET", "/hotplug/memory", "", 400, &[BEFORE_START]),
    ("PATCH", "/hotplug/memory", r#"{"requested_size_mib":128}"#, 400, &[BEFORE_START]),
    ("PUT", "/hotplug/memory", r#"{"total_size_mib":1}"#, 400, &["`total_size_mib`", "1"]),
    (
        "PUT",
        "/hotplug/memory",
        r#"{"total_size_mib":256,"slot_size_mib":64}"#,
        400,
        &["`slot_size_mib`", "64"],
    ),
    (
        "PUT",
        "/hotplug/memory",
        r#"{"total_size_mib":256,"block_size_mib":3}"#,
        400,
        &["`block_size_mib`", "3"],
    ),
];

/// Refused after the start, running or paused: what belongs before it, and what there is not.
const REFUSED_AFTER: &[Case] = &[
    ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":128}"#, 400, &[AFTER_START]),
    ("PATCH", "/machine-config", r#"{"vcpu_count":1}"#, 400, &[AFTER_START]),
    ("PUT", "/boot-source", r#"{"kernel_image_path":"/k"}"#, 400, &[AFTER_START]),
    ("PUT", "/cpu-config", "{}", 400, &[AFTER_START]),
    ("PUT", "/entropy", "{}", 400, &[AFTER_START]),
    ("PUT", "/serial", "{}", 400, &[AFTER_START]),
    ("PUT", "/logger", "{}", 400, &[AFTER_START]),
    ("PUT", "/metrics", r#"{"metrics_path":"m2"}"#, 400, &[AFTER_START]),
    ("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#, 400, &[AFTER_START]),
    ("PATCH", "/drives/other", r#"{"drive_id":"other"}"#, 400, &["`drive_id`", "\"other\""]),
    ("PUT", "/vsock", r#"{"guest_cid":3,"uds_path":"v"}"#, 400, &[AFTER_START]),
    ("PUT", "/balloon", r#"{"amount_mib":1,"deflate_on_oom":true}"#, 400, &[AFTER_START]),
    ("PUT", "/mmds/config", r#"{"network_interfaces":["n"]}"#, 400, &[AFTER_START]),
    ("PUT", "/console", r#"{"output_path":"c"}"#, 400, &[AFTER_START]),
    // Of devices that this guest has not.
    ("PATCH", "/network-interfaces/n", r#"{"iface_id":"n"}"#, 400, &["`iface_id`", "\"n\""]),
    ("DELETE", "/network-interfaces/n", "", 400, &["`iface_id`", "\"n\""]),
    ("PATCH", "/pmem/p", r#"{"id":"p"}"#, 400, &["`id`", "\"p\""]),
    ("DELETE", "/pmem/p", "", 400, &["`id`", "\"p\""]),
    ("DELETE", "/drives/other", "", 400, &["`drive_id`", "\"other\""]),
    ("GET", "/balloon", "", 400, &["balloon"]),
    ("PATCH", "/balloon", r#"{"amount_mib":1}"#, 400, &["balloon"]),
    ("GET", "/balloon/statistics", "", 400, &["balloon"]),
    ("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s":1}"#, 400, &["balloon"]),
    ("PATCH", "/balloon/hinting/start", "", 400, &["balloon"]),
    ("PATCH", "/balloon/hinting/stop", "", 400, &["balloon"]),
    ("GET", "/balloon/hinting/status", "", 400, &["balloon"]),
    ("GET", "/mmds", "", 400, &["/mmds/config"]),
    ("PUT", "/mmds", "{}", 400, &["/mmds/config"]),
    ("PATCH", "/mmds", "{}", 400, &["/mmds/config"]),
    ("PATCH", "/console", r#"{"columns":80,"rows":25}"#, 400, &["/console"]),
    ("PUT", "/hotplug/memory", r#"{"total_size_mib":256}"#, 400, &[AFTER_START]),
    ("GET", "/hotplug/memory", "", 400, &["/hotplug/memory"]),
    ("PATCH", "/hotplug/memory", r#"{"requested_size_mib":128}"#, 400, &["/hotplug/memory"]),
    (
        "PATCH",
        "/drives/disk",
        r#"{"drive_id":"disk","path_on_host":"/no/such/disk"}"#,
        400,
        &["`path_on_host`", "/no/such/disk"],
    ),
];

/// Answered in every state.
const QUESTIONS: &[Case] = &[
    ("GET", "/", "", 200, &["\"app_name\":\"Berth\"", "\"id\":\"anonymous-instance\"", "\"vmm_version\""]),
    ("GET", "/version", "", 200, &["\"firecracker_version\""]),
    (
        "GET",
        "/vm/config",
        "",
        200,
        &["\"boot-source\"", "\"drives\"", "\"machine-config\"", "\"network-interfaces\""],
    ),
    ("GET", "/machine-config", "", 200, &["\"vcpu_count\"", "\"mem_size_mib\"", "\"smt\"", "\"huge_pages\""]),
];

fn answers(client: &mut Client, cases: &[Case]) {
    for (method, path, body, status, words) in cases {
        let request = format!("{method} {path} {body}");
        let body = Some(*body).filter(|body| !body.is_empty());
        let response =
            client.request(method, path, body).unwrap_or_else(|error| panic!("{request}: {error}"));
        assert_eq!(response.status, *status, "{request}: {}", response.body);
        let text = match status {
            400 => response.fault_message(),
            _ => response.body,
        };
        for word in *words {
            assert!(text.contains(word), "{request}: {word:?} is not in: {text}");
        }
    }
}

/// What is deprecated is taken, with a header that says so; and then the same again, in its present form, without.
const DEPRECATED: &[(&str, &str, &str)] = &[
    (
        "/machine-config",
        r#"{"vcpu_count":1,"mem_size_mib":128,"cpu_template":"None"}"#,
        r#"{"vcpu_count":1,"mem_size_mib":128}"#,
    ),
    (
        "/vsock",
        r#"{"vsock_id":"v","guest_cid":3,"uds_path":"v.sock"}"#,
        r#"{"guest_cid":3,"uds_path":"v.sock"}"#,
    ),
];

#[test]
fn what_is_deprecated_is_taken_and_said() {
    let vmm = Vmm::spawn(Name::Firecracker, &[]);
    let mut client = vmm.client();
    for (path, deprecated, present) in DEPRECATED {
        for (body, said) in [(deprecated, true), (present, false)] {
            let response = client.request("PUT", path, Some(body)).unwrap();
            let is_said = response.headers.iter().any(|(name, _)| name == "deprecation");
            assert_eq!((response.status, is_said), (204, said), "{path} {body}: {response:?}");
        }
    }
}

/// Where nothing is said, it is what Firecracker takes.
#[test]
fn defaults_are_those_that_clients_know() {
    let vmm = Vmm::spawn(Name::Firecracker, &[]);
    let mut client = vmm.client();
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false,
                         "huge_pages": "None"});
    let told = |client: &mut Client, path: &str| -> Value {
        let response = client.request("GET", path, None).unwrap();
        assert_eq!(response.status, 200, "{path}: {}", response.body);
        serde_json::from_str(&response.body).unwrap()
    };
    assert_eq!(told(&mut client, "/machine-config"), machine);
    let disk = blank_disk(vmm.path("disk"), 1 << 20);
    let file = blank_disk(vmm.path("file"), 4 << 20);
    for (path, body) in [
        ("/drives/d", json!({"drive_id": "d", "is_root_device": false, "path_on_host": disk})),
        ("/pmem/p", json!({"id": "p", "path_on_host": file})),
        ("/balloon", json!({"amount_mib": 1, "deflate_on_oom": false})),
        ("/vsock", json!({"guest_cid": 3, "uds_path": "v.sock"})),
        ("/entropy", json!({})),
    ] {
        let response = client.request("PUT", path, Some(&body.to_string())).unwrap();
        assert_eq!(response.status, 204, "{path}: {}", response.body);
    }
    let all = told(&mut client, "/vm/config");
    let sections: Vec<_> = all.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(sections, SECTIONS);
    assert_eq!(all["machine-config"], machine);
    let drive = json!({"drive_id": "d", "partuuid": null, "is_root_device": false, "cache_type": "Unsafe",
                       "is_read_only": false, "path_on_host": disk, "rate_limiter": null, "io_engine": "Sync",
                       "socket": null});
    assert_eq!(all["drives"], json!([drive]));
    let pmem = json!({"id": "p", "path_on_host": file, "root_device": false, "read_only": false,
                      "rate_limiter": null});
    assert_eq!(all["pmem"], json!([pmem]));
    let balloon = json!({"amount_mib": 1, "deflate_on_oom": false, "stats_polling_interval_s": 0,
                         "free_page_hinting": false, "free_page_reporting": false});
    assert_eq!(all["balloon"], balloon);
    assert_eq!(told(&mut client, "/balloon"), balloon);
    assert_eq!(all["vsock"], json!({"guest_cid": 3, "uds_path": "v.sock"}));
    assert_eq!(all["entropy"], json!({"rate_limiter": null}));
    assert_eq!(all["network-interfaces"], json!([]));
}

/// Sorted, as JSON's objects are here.
const SECTIONS: &[&str] = &[
    "balloon",
    "boot-source",
    "cpu-config",
    "drives",
    "entropy",
    "logger",
    "machine-config",
    "memory-hotplug",
    "metrics",
    "mmds-config",
    "network-interfaces",
    "pmem",
    "vsock",
];

fn configuration(client: &mut Client) -> Value {
    serde_json::from_str(&client.request("GET", "/vm/config", None).unwrap().body).unwrap()
}

#[test]
fn before_the_start_wrong_requests_are_refused_and_change_nothing() {
    let vmm = Vmm::spawn(Name::Berth, &[]);
    let mut client = vmm.client();
    let before = configuration(&mut client);
    answers(&mut client, QUESTIONS);
    answers(&mut client, MALFORMED);
    answers(&mut client, REFUSED_BEFORE);
    assert_eq!(configuration(&mut client), before);
}

#[test]
fn after_the_start_wrong_requests_are_refused_and_change_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let disk = blank_disk(directory.path().join("disk"), 1 << 20);
    let mut guest = Guest::booted(Setup { drives: vec![disk_drive("disk", disk)], ..Setup::default() });
    let before = configuration(&mut guest.api);
    for pause in [false, true] {
        if pause {
            guest.pause();
        }
        answers(&mut guest.api, QUESTIONS);
        answers(&mut guest.api, MALFORMED);
        answers(&mut guest.api, REFUSED_AFTER);
        assert_eq!(configuration(&mut guest.api), before);
    }
    guest.resume();
    guest.power_off();
}

#[test]
fn what_is_configured_is_what_is_told_and_what_the_guest_gets() {
    let vmm = Vmm::spawn(Name::Berth, &[]);
    let mut client = vmm.client();
    let disk = blank_disk(vmm.path("disk"), 1 << 20);
    let other = blank_disk(vmm.path("other"), 1 << 21);
    let kernel = Kernel::Elf.path();
    let accepted = |client: &mut Client, method: &str, path: &str, body: Value| {
        let response = client.request(method, path, Some(&body.to_string())).unwrap();
        assert_eq!((response.status, response.body.as_str()), (204, ""), "{method} {path} {body}");
    };
    accepted(
        &mut client,
        "PUT",
        "/machine-config",
        json!({"vcpu_count": 4, "mem_size_mib": 512, "smt": true}),
    );
    accepted(&mut client, "PATCH", "/machine-config", json!({"mem_size_mib": 256}));
    accepted(&mut client, "PUT", "/boot-source", json!({"kernel_image_path": kernel, "boot_args": "quiet"}));
    accepted(&mut client, "PUT", "/cpu-config", json!({}));
    let mut drive =
        json!({"drive_id": "d_1", "is_root_device": false, "path_on_host": disk, "io_engine": "Sync"});
    accepted(&mut client, "PUT", "/drives/d_1", drive.clone());
    // The same id again replaces it.
    drive["path_on_host"] = json!(other);
    drive["cache_type"] = json!("Writeback");
    drive["rate_limiter"] = json!({"ops": {"size": 10, "refill_time": 100}});
    accepted(&mut client, "PUT", "/drives/d_1", drive);
    accepted(
        &mut client,
        "PUT",
        "/entropy",
        json!({"rate_limiter": {"bandwidth": {"size": 1000, "refill_time": 10}}}),
    );
    accepted(&mut client, "PUT", "/serial", json!({}));
    accepted(
        &mut client,
        "PUT",
        "/logger",
        json!({"level": "Debug", "show_level": true, "log_path": vmm.path("log2")}),
    );
    accepted(&mut client, "PUT", "/metrics", json!({"metrics_path": vmm.path("metrics")}));
    let again =
        client.request("PUT", "/metrics", Some(&json!({"metrics_path": vmm.path("m")}).to_string())).unwrap();
    assert_eq!(again.status, 400);

    let told = configuration(&mut client);
    let machine = &told["machine-config"];
    let part = |value: &Value, keys: &[&str]| keys.iter().map(|key| value[*key].clone()).collect::<Vec<_>>();
    assert_eq!(
        part(machine, &["vcpu_count", "mem_size_mib", "smt", "track_dirty_pages", "huge_pages"]),
        [json!(4), json!(256), json!(true), json!(false), json!("None")]
    );
    assert_eq!(told["boot-source"]["kernel_image_path"], json!(kernel));
    assert_eq!(told["boot-source"]["boot_args"], json!("quiet"));
    assert_eq!(told["drives"].as_array().unwrap().len(), 1);
    let keys = ["drive_id", "path_on_host", "cache_type", "is_root_device"];
    assert_eq!(
        part(&told["drives"][0], &keys),
        [json!("d_1"), json!(other), json!("Writeback"), json!(false)]
    );
    assert_eq!(told["drives"][0]["rate_limiter"]["ops"]["size"], json!(10));
    assert_eq!(told["entropy"]["rate_limiter"]["bandwidth"]["refill_time"], json!(10));
    assert_eq!(client.machine_config().unwrap().vcpu_count, 4);
}

#[test]
fn a_configuration_that_was_told_makes_the_same_guest_as_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let disk = blank_disk(directory.path().join("disk"), 1 << 20);
    let setup = Setup { vcpus: 2, entropy: true, drives: vec![disk_drive("disk", disk)], ..Setup::default() };
    let told = configuration(&mut Guest::configured(setup).api);
    let file = directory.path().join("vm.json");
    fs::write(&file, told.to_string()).unwrap();
    let mut vmm = Vmm::spawn(Name::Berth, &["--config-file".into(), file.display().to_string()]);
    let mut client = vmm.client();
    assert_eq!(configuration(&mut client), told);
    assert_eq!(client.instance_info().unwrap().state, InstanceState::Running);
    vmm.console().wait_for("BERTH-GUEST-READY", limits::BOOT);
}

#[test]
fn starts_that_fail_leave_nothing_behind_however_many_there_are() {
    let vmm = Vmm::spawn(Name::Berth, &[]);
    let mut client = vmm.client();
    // It is loaded last, after everything else of the guest was made.
    let kernel = vmm.path("kernel");
    fs::write(&kernel, "no kernel").unwrap();
    let disk = blank_disk(vmm.path("disk"), 1 << 20);
    client.apply(&Request::PutDrive(disk_drive("disk", disk))).unwrap();
    let source = json!({"kernel_image_path": kernel}).to_string();
    assert_eq!(client.request("PUT", "/boot-source", Some(&source)).unwrap().status, 204);
    let held = |vmm: &Vmm| {
        let count = |what: &str| fs::read_dir(format!("/proc/{}/{what}", vmm.pid())).unwrap().count();
        (count("task"), count("fd"))
    };
    let start = &[("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#, 400, &["not a kernel"][..])];
    let before = held(&vmm);
    for _ in 0..20 {
        answers(&mut client, start);
    }
    // A thread that was told to end takes its time.
    let deadline = Instant::now() + limits::EXIT;
    while held(&vmm) != before {
        assert!(Instant::now() < deadline, "threads and files: {before:?} before, {:?} after", held(&vmm));
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_drive_gets_another_file_while_the_guest_runs() {
    let directory = tempfile::tempdir().unwrap();
    let disk = blank_disk(directory.path().join("disk"), 1 << 20);
    let larger = blank_disk(directory.path().join("larger"), 3 << 20);
    fs::write(directory.path().join("note"), "x").unwrap();
    let mut guest = Guest::booted(Setup { drives: vec![disk_drive("disk", disk)], ..Setup::default() });
    assert_eq!(guest.number("blockdev --getsize64 /dev/vda"), 1 << 20);
    let update = json!({"drive_id": "disk", "path_on_host": larger}).to_string();
    assert_eq!(guest.api.request("PATCH", "/drives/disk", Some(&update)).unwrap().status, 204);
    guest.run("for i in 1 2 3 4 5 6 7 8 9; do [ $(blockdev --getsize64 /dev/vda) = 3145728 ] && break; sleep 1; done");
    assert_eq!(guest.number("blockdev --getsize64 /dev/vda"), 3 << 20);
    guest.run("printf new | dd of=/dev/vda bs=512 seek=6000 conv=sync,fsync");
    guest.power_off();
    assert_eq!(&fs::read(&larger).unwrap()[6000 * 512..][..3], b"new");
}

#[test]
fn under_the_name_of_firecracker_it_is_firecracker_to_its_clients() {
    let arguments = ["--id", "my-guest-1"].map(String::from).into();
    let setup = Setup { name: Name::Firecracker, vcpus: 2, arguments, ..Setup::default() };
    let mut guest = Guest::started(setup);
    let info = guest.api.instance_info().unwrap();
    assert_eq!((info.app_name.as_str(), info.id.as_str()), ("Firecracker", "my-guest-1"));
    assert_eq!(info.state, InstanceState::Running);
    assert_eq!(info.vmm_version, guest.api.version().unwrap().firecracker_version);
    let threads = guest.vmm.threads();
    for name in ["firecracker", "fc_api", "fc_vcpu 0", "fc_vcpu 1"] {
        assert!(threads.iter().any(|thread| thread == name), "{name} is not in {threads:?}");
    }
    let log = guest.vmm.log();
    let line =
        log.lines().find(|line| line.contains("API server started")).unwrap_or_else(|| panic!("{log}"));
    // 2026-11-23T22:09:18.123456789 [ID:THREAD:LEVEL] message
    let (time, rest) = line.split_once(" [").unwrap();
    assert_eq!((time.len(), &time[10..11], &time[19..20]), (29, "T", "."), "{line}");
    assert!(rest.starts_with("my-guest-1:") && rest.contains(":INFO] "), "{line}");

    let arguments = ["--version".to_string()];
    let mut vmm = Vmm::spawn_in(tempfile::tempdir().unwrap(), Name::Firecracker, &arguments);
    let text = vmm.console().wait_for_end(limits::API);
    assert!(text.starts_with(&format!("Firecracker v{}\n", info.vmm_version)), "{text}");
    assert_eq!(vmm.ended(limits::EXIT), Ended::Code(0));
}

#[test]
fn under_its_own_name_it_is_berth() {
    let mut guest = Guest::started(Setup { vcpus: 2, ..Setup::default() });
    let info = guest.api.instance_info().unwrap();
    assert_eq!((info.app_name.as_str(), info.id.as_str()), ("Berth", "anonymous-instance"));
    let threads = guest.vmm.threads();
    for name in ["berth-vmm", "berth-api", "berth-vcpu 0", "berth-vcpu 1"] {
        assert!(threads.iter().any(|thread| thread == name), "{name} is not in {threads:?}");
    }
}

#[test]
fn metrics_are_one_line_at_the_start_and_one_for_each_flush() {
    let arguments = ["--metrics-path", "metrics"].map(String::from).into();
    let directory = tempfile::tempdir().unwrap();
    let drives = vec![disk_drive("disk", blank_disk(directory.path().join("disk"), 1 << 20))];
    let mut guest = Guest::booted(Setup { arguments, drives, ..Setup::default() });
    let lines = |guest: &Guest| -> Vec<Value> {
        let text = fs::read_to_string(guest.path("metrics")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    assert_eq!(lines(&guest).len(), 1);
    guest.apply(Request::Action(ActionType::FlushMetrics));
    guest.pause();
    guest.apply(Request::Action(ActionType::FlushMetrics));
    let lines = lines(&guest);
    assert_eq!(lines.len(), 3);
    let counted =
        |group: &str, key: &str| assert!(lines[1][group][key].as_u64().unwrap() > 0, "{group}.{key}");
    counted("vcpu", "exit_io_out");
    assert!(lines[1]["vcpu"]["exit_io_out_agg"]["sum_us"].as_u64().unwrap() > 0);
    counted("interrupts", "triggers");
    counted("interrupts", "config_updates");
    counted("block_disk", "read_count");
    assert!(lines[1]["block_disk"]["read_agg"]["sum_us"].as_u64().unwrap() > 0);
    assert!(lines.iter().all(|line| line["utc_timestamp_ms"].as_u64().unwrap() > 0));
    let names = |line: &Value| line.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&lines[0]), names(&lines[2]));
}

#[test]
fn ten_clients_are_served_at_once_and_the_eleventh_is_told() {
    let vmm = Vmm::spawn(Name::Berth, &[]);
    let clients: Vec<_> = (0..10).map(|_| vmm.client()).collect();
    let asking = clients.into_iter().map(|mut client| {
        thread::spawn(move || {
            for _ in 0..50 {
                assert_eq!(client.instance_info().unwrap().state, InstanceState::NotStarted);
            }
            client
        })
    });
    let asking: Vec<_> = asking.collect();
    let clients: Vec<_> = asking.into_iter().map(|thread| thread.join().unwrap()).collect();
    let refused = vmm.client().request("GET", "/", None).unwrap();
    assert_eq!(refused.status, 503, "{}", refused.body);
    drop(clients);
    // The VMM learns of their going when it looks.
    while vmm.client().instance_info().is_err() {
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_client_that_sends_half_a_request_holds_nobody_up() {
    let mut guest = Guest::booted(Setup::default());
    let mut slow = UnixStream::connect(guest.path("api.sock")).unwrap();
    slow.write_all(b"PUT /actions HTTP/1.1\r\nContent-Length: 30\r\n\r\n{\"action").unwrap();
    guest.pause();
    guest.resume();
    // Two more at once, and the first goes on where it was.
    let mut pipelined = UnixStream::connect(guest.path("api.sock")).unwrap();
    pipelined.set_read_timeout(Some(limits::API)).unwrap();
    pipelined
        .write_all(&b"GET / HTTP/1.1\r\n\r\nGET /version HTTP/1.1\r\nConnection: close\r\n\r\n"[..])
        .unwrap();
    let mut text = String::new();
    pipelined.read_to_string(&mut text).unwrap();
    assert_eq!(text.matches("HTTP/1.1 200").count(), 2, "{text}");
    slow.write_all(b"_type\":\"FlushMetrics\"}").unwrap();
    let mut reply = [0; 12];
    slow.set_read_timeout(Some(limits::API)).unwrap();
    slow.read_exact(&mut reply).unwrap();
    assert!(reply.starts_with(b"HTTP/1.1 "), "{reply:?}");
    guest.power_off();
}

#[test]
fn a_body_over_the_limit_is_refused_and_one_at_the_limit_is_read() {
    let vmm = Vmm::spawn(Name::Berth, &["--http-api-max-payload-size=1000".into()]);
    let body = |length: usize| {
        let start = r#"{"module":""#;
        format!("{start}{}\"}}", "x".repeat(length - start.len() - 2))
    };
    assert_eq!(vmm.client().request("PUT", "/logger", Some(&body(1000))).unwrap().status, 204);
    let refused = vmm.client().request("PUT", "/logger", Some(&body(1001))).unwrap();
    assert!([400, 413].contains(&refused.status), "{}", refused.body);
    assert!(refused.fault_message().contains("1000"), "{}", refused.body);
}
