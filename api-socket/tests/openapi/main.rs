//! The OpenAPI descriptions in resources/api/ against the types and routes, and docs/api.md and docs/fleet-api.md against them.
//! Here the guest API; fleet.rs has the other.

#![allow(clippy::unwrap_used, clippy::panic, reason = "this whole file is a test")]

mod description;
mod docs;
mod fleet;
mod variants;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use api_socket::routes::ENDPOINTS;
use api_socket::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use description::{Description, Operation};
use variants::Variant;

/// A body or reply of its own, and what reads it.
struct Message<'a> {
    name: String,
    schema: Value,
    reader: Box<dyn Fn(&Value) -> Outcome + 'a>,
}

/// Reads JSON as what a schema describes.
type Reader = fn(&Value) -> Outcome;

/// What a type makes of a JSON value, as JSON again, or its error.
type Outcome = Result<Value, String>;

/// The types of replies, by the schema's name.
const REPLIES: &[(&str, Reader)] = &[
    ("InstanceInfo", read::<InstanceInfo>),
    ("Version", read::<Version>),
    ("MachineConfig", read::<MachineConfig>),
    ("VmConfig", read_config),
    ("Balloon", read::<Balloon>),
    ("BalloonStats", read::<BalloonStats>),
    ("BalloonHintingStatus", read::<BalloonHintingStatus>),
    ("MemoryHotplugStatus", read::<MemoryHotplugStatus>),
];

fn read<T: DeserializeOwned + Serialize>(value: &Value) -> Outcome {
    let read: T = serde_json::from_value(value.clone()).map_err(|error| error.to_string())?;
    Ok(serde_json::to_value(read).unwrap())
}

/// As [`read`], and as the configuration file that it may be.
fn read_config(value: &Value) -> Outcome {
    let config: VmConfig = serde_json::from_value(value.clone()).map_err(|error| error.to_string())?;
    // Its path names no file here.
    let readable = VmConfig { cpu_config: None, ..config.clone() };
    config_file::requests(readable).map_err(|fault| fault.message)?;
    Ok(serde_json::to_value(config).unwrap())
}

/// Sends a body to its route, and gives the body that the client half would send for the request it was read as.
fn send(operation: &Operation, body: &Value) -> Outcome {
    let path = operation.example_path();
    let routed =
        route(operation.method, &path, body.to_string().as_bytes()).map_err(|fault| fault.message)?;
    let (method, sent_to, sent) = client::encode(&routed.request).unwrap();
    assert_eq!((method.as_str(), sent_to), (operation.method, path));
    Ok(serde_json::from_str(&sent.unwrap()).unwrap())
}

fn messages(description: &Description) -> Vec<Message<'_>> {
    let mut messages = Vec::new();
    for operation in description.operations() {
        if let Some(schema) = operation.body() {
            let name = format!("{} {}", operation.method, operation.path);
            messages.push(Message { name, schema, reader: Box::new(move |body| send(&operation, body)) });
        }
    }
    for (name, reader) in REPLIES {
        let schema = description.schema(name);
        messages.push(Message { name: name.to_string(), schema, reader: Box::new(reader) });
    }
    messages
}

#[test]
fn the_paths_and_methods_are_those_of_the_routes() {
    let description = Description::read();
    let described: BTreeSet<_> = description
        .operations()
        .iter()
        .map(|operation| (operation.path.to_string(), operation.method.to_string()))
        .collect();
    let routed: BTreeSet<_> = ENDPOINTS
        .iter()
        .flat_map(|(_, path, methods)| {
            methods.iter().map(|method| (path.to_string(), method.as_str().to_string()))
        })
        .collect();
    assert_eq!(described, routed);
}

#[test]
fn each_body_and_reply_is_accepted_in_full_with_exactly_the_described_fields() {
    let description = Description::read();
    for Message { name, schema, reader } in messages(&description) {
        let full = variants::full(&description, &schema);
        let read = reader(&full).unwrap_or_else(|error| panic!("{name}: {full} is refused: {error}"));
        assert_eq!(shape(&read), shape(&full), "{name}");
    }
}

#[test]
fn each_variant_of_a_body_or_reply_is_accepted_or_refused_as_described() {
    let description = Description::read();
    let mut tried = 0;
    for Message { name, schema, reader } in messages(&description) {
        for Variant { what, value, accepted } in variants::of(&description, &schema) {
            let outcome = reader(&value);
            assert_eq!(outcome.is_ok(), accepted, "{name}: {what}: {outcome:?}");
            tried += 1;
        }
    }
    assert!(tried > 500, "only {tried} variants");
}

#[test]
fn an_unknown_field_is_answered_with_the_described_ones() {
    let description = Description::read();
    for Message { name, schema, reader } in messages(&description) {
        let mut value = variants::full(&description, &schema);
        value.as_object_mut().unwrap().insert("colour".to_string(), json!("red"));
        if schema["additionalProperties"] == true {
            assert_eq!(reader(&value), Ok(value), "{name}");
            continue;
        }
        let error = reader(&value).unwrap_err();
        let (_, allowed) =
            error.rsplit_once("expected ").or_else(|| error.rsplit_once("allowed here: ")).unwrap();
        let allowed: BTreeSet<_> = allowed.split('`').skip(1).step_by(2).map(str::to_string).collect();
        let described: BTreeSet<_> = schema["properties"].as_object().unwrap().keys().cloned().collect();
        assert_eq!(allowed, described, "{name}");
    }
}

#[test]
fn a_field_left_out_has_the_described_default() {
    let description = Description::read();
    for Message { name, schema, reader } in messages(&description) {
        let Ok(read) = reader(&variants::minimal(&description, &schema)) else {
            assert!(schema.get("minProperties").is_some(), "{name}");
            continue;
        };
        for (field, property) in schema["properties"].as_object().into_iter().flatten() {
            if let Some(default) = property.get("default") {
                assert_eq!(&read[field], default, "{name}: {field}");
            }
        }
    }
}

#[test]
fn the_described_limits_are_those_in_force() {
    let description = Description::read();
    let limits = json!({
        "bytes_of_a_body": http::DEFAULT_MAX_BODY,
        "bytes_of_request_line_and_headers": http::MAX_HEAD,
        "headers": http::MAX_HEADERS,
        "connections": server::MAX_CONNECTIONS,
    });
    assert_eq!(description.document["x-limits"], limits);
    let drive = &description.schema("Drive")["properties"];
    assert_eq!(drive["queues"]["minimum"], json!(QUEUES.start()));
    assert_eq!(drive["queues"]["maximum"], json!(QUEUES.end()));
    let interface = &description.schema("NetworkInterface")["properties"];
    assert_eq!(interface["mtu"]["minimum"], json!(MTU.start()));
    assert_eq!(interface["mtu"]["maximum"], json!(MTU.end()));
    assert_eq!(interface["queue_pairs"]["minimum"], json!(QUEUE_PAIRS.start()));
    assert_eq!(interface["queue_pairs"]["maximum"], json!(QUEUE_PAIRS.end()));
    for name in ["Drive", "NetworkInterface", "Pmem", "Vsock", "Balloon", "Entropy", "Console"] {
        let thread = &description.schema(name)["properties"]["io_thread"];
        assert_eq!(
            (&thread["minimum"], &thread["maximum"]),
            (&json!(IO_THREAD.start()), &json!(IO_THREAD.end()))
        );
    }
    assert_eq!(description.schema("Console")["properties"]["ports"]["maxItems"], json!(MAX_CONSOLE_PORTS));
    let name = &description.schema("ConsolePort")["properties"]["name"]["description"];
    assert!(name.as_str().unwrap().contains(&format!("1 to {MAX_CONSOLE_PORT_NAME} letters")));
    for name in ["MachineConfig", "MachineConfigUpdate"] {
        let properties = &description.schema(name)["properties"];
        assert_eq!(properties["vcpu_count"]["minimum"], json!(VCPU_COUNT.start()));
        assert_eq!(properties["vcpu_count"]["maximum"], json!(VCPU_COUNT.end()));
        assert_eq!(properties["mem_size_mib"]["minimum"], json!(MEM_SIZE_MIB_MIN));
    }
}

#[test]
fn the_described_addresses_of_a_guest_are_those_in_force() {
    let cid = &Description::read().schema("Vsock")["properties"]["guest_cid"];
    assert_eq!((&cid["minimum"], &cid["maximum"]), (&json!(GUEST_CID.start()), &json!(GUEST_CID.end())));
}

#[test]
fn a_refusal_is_what_a_fault_is_described_to_be() {
    let description = Description::read();
    let fault = variants::full(&description, &description.schema("Fault"));
    let mut connection = http::Connection::new(0);
    connection.receive(b"GET /nowhere HTTP/1.1\r\n\r\n");
    server::answer(&mut connection, &Default::default(), &mut |_| Reply::Empty);
    let reply = String::from_utf8(connection.output().to_vec()).unwrap();
    let (_, body) = reply.split_once("\r\n\r\n").unwrap();
    assert_eq!(shape(&serde_json::from_str(body).unwrap()), shape(&fault));
}

#[test]
fn every_described_schema_is_used() {
    let description = Description::read();
    let text = description.document.to_string();
    for name in description.document["components"]["schemas"].as_object().unwrap().keys() {
        assert!(text.contains(&format!("\"#/components/schemas/{name}\"")), "{name}");
    }
}

#[test]
fn the_document_for_people_is_made_from_the_description() {
    assert_document("api.md", docs::markdown(&Description::read(), "guest.yaml", ("x-when", "When")));
}

/// Fails when this file of docs/ is not what the description makes; with BLESS=1 in the environment, writes it.
fn assert_document(file: &str, text: String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(file);
    if std::env::var_os("BLESS").is_some_and(|value| value == "1") {
        std::fs::write(&path, &text).unwrap();
    }
    let present = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(present == text, "docs/{file} is stale; run BLESS=1 cargo test -p api-socket --test openapi");
}

/// Which fields there are, in which objects; values aside.
fn shape(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let fields: BTreeMap<_, _> =
                fields.iter().map(|(name, value)| (name.clone(), shape(value))).collect();
            json!(fields)
        }
        Value::Array(items) => items.iter().map(shape).collect(),
        _ => json!("value"),
    }
}
