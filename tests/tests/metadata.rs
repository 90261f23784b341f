//! The metadata service: a guest reads by HTTP what was put, from an address that is not on any network; with version 2 only
//! with a token. The host's network sees nothing of it, and may be down.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::net::{Ipv4Addr, TcpListener};

use api_socket::{ActionType, ClientError, MmdsConfig, MmdsVersion, Request};
use berth_tests::guest::tap::{Tap, host};
use berth_tests::guest::{Guest, Name, Setup, curl_drive};
use serde_json::{Map, Value, json};

/// Where the service is, unless it is told otherwise.
const ADDRESS: &str = "169.254.169.254";
const LARGE: usize = 40_000;

fn object(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

fn document() -> Map<String, Value> {
    object(json!({"latest": {"meta-data": {"instance-id": "i-1", "tags": {"a": "1"}}, "number": 4},
                  "large": "x".repeat(LARGE)}))
}

/// A guest in its shell, with the service on the first of these taps, and routes to it by way of all.
fn guest(name: Name, taps: &[&Tap], config: MmdsConfig) -> Guest {
    let arguments = ["--metrics-path", "metrics"].map(String::from).into();
    let place = tempfile::tempdir().unwrap();
    let drives = vec![curl_drive(place.path())];
    let interfaces = taps.iter().map(|tap| tap.interface()).collect();
    let setup = Setup { name, drives, interfaces, arguments, memory_mib: 256, ..Setup::default() };
    let mut guest = Guest::configured(setup);
    let network_interfaces = vec![taps[0].name()];
    guest.apply(Request::PutMmdsConfig(MmdsConfig { network_interfaces, ..config }));
    guest.apply(Request::PutMmds(document()));
    guest.boot();
    for (number, tap) in taps.iter().enumerate() {
        tap.set_up(&mut guest, &format!("eth{number}"), None);
    }
    guest.run("ip route add 169.254.0.0/16 dev eth0");
    guest.run("mkdir /run/curl && tar -xf /dev/vda -C /run/curl");
    let program = "/run/curl/ld-linux-x86-64.so.2 --library-path /run/curl /run/curl/curl -sS -m 60";
    guest.run(&format!("echo 'exec {program} \"$@\"' > /run/curl/ask && chmod 755 /run/curl/ask"));
    guest
}

/// A command of the guest that asks by curl; `options` are curl's.
fn curl(path: &str, options: &str) -> String {
    format!("/run/curl/ask {options} http://{ADDRESS}{path}")
}

/// The status that an answer has.
fn status(guest: &mut Guest, path: &str, options: &str) -> u64 {
    guest.number(&format!("{} -o /dev/null -w '%{{http_code}}\\n'", curl(path, options)))
}

/// The host's end of the tap has the service's address too, and somebody who listens there.
fn decoy(tap: &Tap) -> TcpListener {
    host("ip", &["address", "add", &format!("{ADDRESS}/32"), "dev", &tap.name()]);
    let listener = TcpListener::bind((ADDRESS.parse::<Ipv4Addr>().unwrap(), 80)).unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

#[test]
fn a_guest_reads_what_was_put_and_the_tap_sees_nothing_of_it() {
    version_1(Name::Berth);
}

#[test]
fn a_guest_reads_what_was_put_without_pci() {
    version_1(Name::Firecracker);
}

fn version_1(name: Name) {
    let (tap, other) = (Tap::new(0, &[]), Tap::new(1, &[]));
    let decoy = decoy(&tap);
    let mut guest = guest(name, &[&tap, &other], MmdsConfig::default());
    assert_eq!(guest.run(&curl("/latest/meta-data", "")), "instance-id\ntags/");
    assert_eq!(guest.run(&curl("/latest/meta-data/instance-id", "")), "i-1");
    let text = guest.run(&curl("/latest", "-H 'Accept: application/json'"));
    let value: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value, document()["latest"]);
    assert_eq!(guest.run(&format!("{} | wc -c", curl("/large", ""))).trim(), LARGE.to_string());

    // While the guest runs.
    let patch = json!({"latest": {"meta-data": {"instance-id": "i-2"}}, "large": null});
    guest.apply(Request::PatchMmds(object(patch)));
    guest.pause();
    guest.resume();
    assert_eq!(guest.run(&curl("/latest/meta-data/instance-id", "")), "i-2");
    assert_eq!(status(&mut guest, "/large", ""), 404);
    assert_eq!(status(&mut guest, "/latest/number", ""), 501);
    assert_eq!(status(&mut guest, "/latest", "-X DELETE"), 405);
    let too_large = guest.api.apply(&Request::PutMmds(object(json!({"a": "x".repeat(1 << 16)}))));
    assert!(matches!(too_large, Err(ClientError::Refused(_))));

    // More connections than there may be at once, one after the other and several together.
    let ask = curl("/latest/meta-data/instance-id", "");
    guest.run(&format!("for n in $(seq 20); do [ $({ask}) = i-2 ] || exit 1; done"));
    guest.run(&format!("for n in $(seq 8); do {ask} > /run/out$n & done; wait"));
    assert_eq!(guest.run("cat /run/out*"), "i-2".repeat(8));
    // Several requests on one connection.
    assert_eq!(guest.run(&curl("/latest/meta-data/{instance-id,instance-id}", "")), "i-2i-2");

    // A driver that comes again, and a network that is down.
    guest.run("for way in unbind bind; do echo virtio1 > /sys/bus/virtio/drivers/virtio_net/$way; done");
    tap.set_up(&mut guest, "eth0", None);
    guest.run("ip route add 169.254.0.0/16 dev eth0");
    host("ip", &["link", "set", &tap.name(), "down"]);
    assert_eq!(guest.run(&ask), "i-2");

    assert!(decoy.accept().is_err(), "nothing of it has reached the host");
    assert_eq!(guest.metric("mmds", "rx_accepted_err"), 0);
    for key in
        ["rx_accepted", "rx_count", "tx_frames", "tx_bytes", "connections_created", "connections_destroyed"]
    {
        assert!(guest.metric("mmds", key) > 30, "{key}");
    }

    // By way of an interface that was not named it is another's address.
    guest.run("ip route change 169.254.0.0/16 dev eth1");
    let elsewhere = guest.shell(&curl("/latest", "-m 2"));
    assert_ne!(elsewhere.code, 0, "{}", elsewhere.text);
    guest.power_off();
}

#[test]
fn version_2_answers_those_with_a_token() {
    version_2(Name::Berth);
}

#[test]
fn version_2_answers_those_with_a_token_without_pci() {
    version_2(Name::Firecracker);
}

fn version_2(name: Name) {
    let tap = Tap::new(0, &[]);
    let config = MmdsConfig { version: MmdsVersion::V2, imds_compat: true, ..MmdsConfig::default() };
    let mut guest = guest(name, &[&tap], config);
    let token = "/latest/api/token";
    let ttl = |seconds: u32| format!("-X PUT -H 'X-metadata-token-ttl-seconds: {seconds}'");
    assert_eq!(status(&mut guest, "/latest", ""), 401);
    assert_eq!(status(&mut guest, "/latest", "-H 'X-metadata-token: x'"), 401);
    assert_eq!(status(&mut guest, token, "-X PUT"), 400);
    assert_eq!(status(&mut guest, token, &format!("{} -H 'X-Forwarded-For: 10.0.0.1'", ttl(60))), 400);
    assert_eq!(status(&mut guest, token, &ttl(21601)), 400);
    assert_eq!(status(&mut guest, "/latest/api", &ttl(60)), 404);
    assert_eq!(status(&mut guest, "/latest", "-X POST -d x"), 405);
    guest.run(&format!("TOKEN=$({})", curl(token, &ttl(21600))));
    for header in ["X-metadata-token", "X-aws-ec2-metadata-token"] {
        // Compatible with EC2's service: never JSON.
        let options = format!("-H \"{header}: $TOKEN\" -H 'Accept: application/json'");
        assert_eq!(guest.run(&curl("/latest/meta-data", &options)), "instance-id\ntags/");
    }
    let short = "-X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 1'";
    guest.run(&format!("TOKEN=$({}); sleep 2", curl(token, short)));
    assert_eq!(status(&mut guest, "/latest", "-H \"X-metadata-token: $TOKEN\""), 401);
    assert_eq!(guest.metric("mmds", "rx_no_token"), 1);
    assert_eq!(guest.metric("mmds", "rx_invalid_token"), 2);
    assert_eq!(guest.api.mmds().unwrap(), Value::Object(document()));
    let reply = guest.api.vm_config().unwrap().mmds_config.unwrap();
    assert_eq!((reply.ipv4_address.unwrap().to_string().as_str(), reply.version), (ADDRESS, MmdsVersion::V2));
    guest.power_off();
}

#[test]
fn metadata_may_come_from_a_file_has_a_limit_and_is_not_logged() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("metadata.json");
    std::fs::write(&file, r#"{"password": "open-sesame"}"#).unwrap();
    let flags = ["--metadata", file.to_str().unwrap(), "--mmds-size-limit", "100"].map(String::from);
    let mut guest = Guest::configured(Setup { arguments: flags.into(), ..Setup::default() });
    assert_eq!(guest.api.mmds().unwrap(), json!({"password": "open-sesame"}));
    let status = |outcome| match outcome {
        Err(ClientError::Refused(fault)) => fault.status,
        other => panic!("{other:?}"),
    };
    let large = || object(json!({"password": "open-sesame".repeat(10)}));
    assert_eq!(status(guest.api.apply(&Request::PutMmds(large()))), 413);
    assert_eq!(status(guest.api.apply(&Request::PatchMmds(large()))), 413);
    let refused = guest.api.request("PUT", "/mmds", Some(r#""open-sesame""#)).unwrap();
    assert!(refused.status == 400 && !refused.fault_message().contains("sesame"), "{refused:?}");
    guest.apply(Request::PatchMmds(object(json!({"user": "ali-baba"}))));
    guest.apply(Request::Action(ActionType::InstanceStart));
    assert_eq!(guest.api.mmds().unwrap(), json!({"password": "open-sesame", "user": "ali-baba"}));
    let log = std::fs::read_to_string(guest.path("vmm.log")).unwrap();
    assert!(log.contains("/mmds") && !log.contains("sesame") && !log.contains("ali-baba"), "{log}");
}

#[test]
fn a_guest_without_the_service_has_no_metadata() {
    let mut guest = Guest::configured(Setup::default());
    assert_eq!(guest.api.mmds().unwrap(), Value::Null);
    let missing = MmdsConfig { network_interfaces: vec!["eth0".into()], ..MmdsConfig::default() };
    let error = guest.api.apply(&Request::PutMmdsConfig(missing.clone())).unwrap_err().to_string();
    assert!(error.contains("`network_interfaces`") && error.contains("eth0"), "{error}");
    guest.apply(Request::Action(ActionType::InstanceStart));
    let error = guest.api.mmds().unwrap_err().to_string();
    assert!(error.contains("/mmds/config"), "{error}");
    guest.api.apply(&Request::PutMmds(document())).unwrap_err();
    let error = guest.api.apply(&Request::PutMmdsConfig(missing)).unwrap_err().to_string();
    assert!(error.contains("after starting"), "{error}");
}
