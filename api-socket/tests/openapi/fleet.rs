//! The fleet API, as main.rs has the guest API.

use std::collections::{BTreeMap, BTreeSet};

use api_socket::fleet::routes::{self, MAX_WAIT_SECONDS, Part};
use api_socket::fleet::{self, Request, server};
use api_socket::{Fault, http};
use serde_json::{Value, json};

use crate::description::{Description, METHODS, Operation};
use crate::variants::{self, Variant};
use crate::{Reader, assert_document, docs, read, shape};

/// The types of replies, by the schema's name.
const REPLIES: &[(&str, Reader)] = &[
    ("Version", read::<fleet::Version>),
    ("Guest", read::<fleet::Guest>),
    ("GuestList", read::<fleet::List<fleet::Guest>>),
    ("Stats", read::<fleet::Stats>),
    ("StatsList", read::<fleet::List<fleet::Stats>>),
    ("Event", read::<fleet::Event>),
    ("Image", read::<fleet::Image>),
    ("ImageList", read::<fleet::List<fleet::Image>>),
];

/// Each request by its `operationId`. A new one does not compile until it has a name here, and then not without a description.
macro_rules! operations {
    ($($pattern:pat => $id:literal,)*) => {
        const OPERATIONS: &[&str] = &[$($id),*];

        fn operation_of(request: &Request) -> &'static str {
            match request {
                $($pattern => $id,)*
            }
        }
    };
}

operations! {
    Request::GetVersion => "getVersion",
    Request::ListGuests => "listGuests",
    Request::CreateGuest(_) => "createGuest",
    Request::GetGuest(_) => "getGuest",
    Request::UpdateGuest(..) => "updateGuest",
    Request::RemoveGuest { .. } => "removeGuest",
    Request::StartGuest(_) => "startGuest",
    Request::StopGuest(..) => "stopGuest",
    Request::PauseGuest(_) => "pauseGuest",
    Request::ResumeGuest(_) => "resumeGuest",
    Request::GuestStats(_) => "getGuestStats",
    Request::AllStats => "listStats",
    Request::Logs { .. } => "getGuestLogs",
    Request::Console(_) => "openConsole",
    Request::Vsock { .. } => "openVsock",
    Request::Events => "followEvents",
    Request::Metrics => "getMetrics",
    Request::ListImages => "listImages",
    Request::GetImage(_) => "getImage",
    Request::PutPart(..) => "putImagePart",
    Request::PutImage(..) => "putImage",
    Request::RemoveImage(_) => "removeImage",
}

fn description() -> Description {
    Description::of("fleet.yaml")
}

/// The path with names in it that the descriptions of its parameters give as examples.
fn path(operation: &Operation) -> String {
    operation.parameters().iter().filter(|parameter| parameter["in"] == "path").fold(
        operation.path.to_owned(),
        |path, parameter| {
            let schema = &parameter["schema"];
            let value = schema.get("example").or_else(|| schema.pointer("/enum/0")).unwrap();
            path.replace(&format!("{{{}}}", parameter["name"].as_str().unwrap()), &plain(value))
        },
    )
}

fn plain(value: &Value) -> String {
    value.as_str().map_or(value.to_string(), str::to_owned)
}

/// A body in full, or none.
fn body(description: &Description, operation: &Operation) -> String {
    operation.body().map_or(String::new(), |schema| variants::full(description, &schema).to_string())
}

fn route(method: &str, target: &str, body: &str) -> Result<Request, Fault> {
    routes::route(method, target, body.as_bytes())
}

/// Sends a body to its route, and gives the body that the client half would send for the request it was read as.
fn send(operation: &Operation, body: &Value) -> Result<Value, String> {
    let path = path(operation);
    let request = route(operation.method, &path, &body.to_string()).map_err(|fault| fault.message)?;
    let (method, sent_to, sent) = routes::encode(&request).unwrap();
    assert_eq!((method, sent_to), (operation.method, path));
    Ok(serde_json::from_str(&sent.unwrap()).unwrap())
}

#[test]
fn each_request_is_described_and_each_description_is_of_a_request() {
    let description = description();
    let mut described = BTreeMap::new();
    for operation in description.operations() {
        let id = operation.node["operationId"].as_str().unwrap();
        let request = route(operation.method, &path(&operation), &body(&description, &operation)).unwrap();
        assert_eq!(operation_of(&request), id);
        let is_upload = routes::body_of(operation.method, &path(&operation)) == routes::Body::Stream;
        let content = &operation.node["requestBody"]["content"];
        assert_eq!(content.get("application/octet-stream").is_some(), is_upload, "{id}");
        assert!(described.insert(id.to_owned(), ()).is_none(), "{id} is there twice");
    }
    let described: BTreeSet<_> = described.keys().map(String::as_str).collect();
    assert_eq!(described, OPERATIONS.iter().copied().collect());
}

#[test]
fn a_method_that_is_not_described_is_not_there() {
    let description = description();
    let operations = description.operations();
    for described in &operations {
        for method in METHODS.iter().map(|(_, method)| *method).chain(["HEAD", "OPTIONS"]) {
            if operations.iter().any(|other| (other.path, other.method) == (described.path, method)) {
                continue;
            }
            let fault = route(method, &path(described), "").unwrap_err();
            assert_eq!(fault.status, 404, "{method} {}", described.path);
        }
    }
}

#[test]
fn the_parts_and_fields_of_a_target_are_those_that_are_described() {
    let description = description();
    let ids = ["{guest}", "{image}", "{part}", "{port}"];
    for operation in description.operations() {
        let named: BTreeSet<_> = ids.into_iter().filter(|id| operation.path.contains(id)).collect();
        let parameters = operation.parameters();
        let of_path = parameters.iter().filter(|parameter| parameter["in"] == "path");
        let described: BTreeSet<_> =
            of_path.map(|parameter| format!("{{{}}}", parameter["name"].as_str().unwrap())).collect();
        assert_eq!(described, named.into_iter().map(str::to_owned).collect(), "{}", operation.path);

        let (path, body) = (path(&operation), body(&description, &operation));
        let refused = |query: &str| {
            let outcome = route(operation.method, &format!("{path}?{query}"), &body);
            assert_eq!(outcome.unwrap_err().status, 400, "{path}?{query}");
        };
        refused("colour=red");
        let plain_request = route(operation.method, &path, &body).unwrap();
        for (name, schema, _) in operation.queries() {
            let with =
                |value: &Value| route(operation.method, &format!("{path}?{name}={}", plain(value)), &body);
            assert_eq!(with(&schema["default"]), Ok(plain_request.clone()), "{path}: {name}");
            let others = match schema["type"].as_str() {
                Some("boolean") => vec![json!(true), json!(false)],
                Some("integer") => vec![schema["minimum"].clone(), schema["maximum"].clone()],
                _ => schema["enum"].as_array().unwrap().clone(),
            };
            for value in others {
                assert_eq!(
                    with(&value).unwrap() == plain_request,
                    value == schema["default"],
                    "{name}={value}"
                );
            }
            refused(&format!("{name}=colour"));
            refused(&format!("{name}={}&{name}={}", plain(&schema["default"]), plain(&schema["default"])));
        }
    }
}

#[test]
fn each_body_and_reply_is_accepted_in_full_with_exactly_the_described_fields() {
    let description = description();
    for operation in description.operations() {
        let Some(schema) = operation.body() else { continue };
        let full = variants::full(&description, &schema);
        assert_eq!(send(&operation, &full).as_ref().map(shape), Ok(shape(&full)), "{}", operation.path);
    }
    for (name, reader) in REPLIES {
        let full = variants::full(&description, &description.schema(name));
        assert_eq!(reader(&full).as_ref().map(shape), Ok(shape(&full)), "{name}");
    }
}

#[test]
fn each_variant_of_a_body_or_reply_is_accepted_or_refused_as_described() {
    let description = description();
    let mut tried = 0;
    for operation in description.operations() {
        let Some(schema) = operation.body() else { continue };
        for Variant { what, value, accepted } in variants::of(&description, &schema) {
            let outcome = send(&operation, &value);
            assert_eq!(outcome.is_ok(), accepted, "{}: {what}: {outcome:?}", operation.path);
            tried += 1;
        }
    }
    for (name, reader) in REPLIES {
        for Variant { what, value, accepted } in variants::of(&description, &description.schema(name)) {
            // The daemon sends no null; a client that takes one does no harm.
            if what.ends_with("is null") {
                continue;
            }
            let outcome = reader(&value);
            assert_eq!(outcome.is_ok(), accepted, "{name}: {what}: {outcome:?}");
            tried += 1;
        }
    }
    assert!(tried > 400, "only {tried} variants");
}

#[test]
fn a_field_left_out_has_the_described_default() {
    let description = description();
    let mut tried = 0;
    for operation in description.operations() {
        let Some(schema) = operation.body() else { continue };
        let read = send(&operation, &variants::minimal(&description, &schema)).unwrap();
        for (field, property) in schema["properties"].as_object().unwrap() {
            if let Some(default) = property.get("default") {
                assert_eq!(&read[field], default, "{}: {field}", operation.path);
                tried += 1;
            }
        }
        // The body as a whole may be left out where it is not required.
        let whole = route(operation.method, &path(&operation), "");
        assert_eq!(whole.is_err(), operation.node["requestBody"]["required"] == true, "{}", operation.path);
    }
    assert!(tried > 5, "only {tried} defaults");
}

/// At any depth: one below the least and one above the most.
#[test]
fn a_number_out_of_its_described_range_and_a_text_too_long_are_refused() {
    let description = description();
    let mut tried = 0;
    for operation in description.operations() {
        let Some(schema) = operation.body() else { continue };
        let full = variants::full(&description, &schema);
        for (pointer, property) in leaves(&description, &schema, "") {
            let mut values = Vec::new();
            values.extend(property["minimum"].as_i64().map(|least| (json!(least - 1), json!(least))));
            values.extend(property["maximum"].as_i64().map(|most| (json!(most + 1), json!(most))));
            values.extend(
                property["maxLength"]
                    .as_u64()
                    .map(|most| (json!("x".repeat(most as usize + 1)), json!("x".repeat(most as usize)))),
            );
            for (outside, inside) in values {
                let with = |value: &Value| {
                    let mut changed = full.clone();
                    *changed.pointer_mut(&pointer).unwrap() = value.clone();
                    send(&operation, &changed)
                };
                assert!(with(&inside).is_ok(), "{}: {pointer} is {inside}", operation.path);
                assert!(with(&outside).is_err(), "{}: {pointer} is {outside}", operation.path);
                tried += 1;
            }
        }
    }
    assert!(tried >= 20, "only {tried} ends of ranges");
}

/// Fields that are no objects, as JSON pointers.
fn leaves(description: &Description, schema: &Value, at: &str) -> Vec<(String, Value)> {
    let schema = description.resolve(schema);
    match schema["properties"].as_object() {
        Some(properties) => {
            let within = properties.iter();
            within
                .flat_map(|(name, property)| leaves(description, property, &format!("{at}/{name}")))
                .collect()
        }
        None => vec![(at.to_owned(), schema)],
    }
}

#[test]
fn the_described_limits_and_names_are_those_in_force() {
    let description = description();
    let limits = &description.document["x-limits"];
    assert_eq!(limits["bytes_of_a_body"], json!(server::MAX_BODY));
    assert_eq!(limits["bytes_of_an_upload"], json!(server::MAX_UPLOAD));
    assert_eq!(limits["bytes_of_request_line_and_headers"], json!(http::MAX_HEAD));
    assert_eq!(limits["headers"], json!(http::MAX_HEADERS));
    let parameters = &description.document["components"]["parameters"];
    let parts: Vec<_> = Part::ALL.iter().map(|part| part.as_str()).collect();
    assert_eq!(parameters["Part"]["schema"]["enum"], json!(parts));
    let port = |number: u64| route("GET", &format!("/guests/web/vsock/{number}"), "");
    let most = parameters["Port"]["schema"]["maximum"].as_u64().unwrap();
    assert!(port(most).is_ok() && port(most + 1).is_err());
    let wait = |seconds: u32| route("GET", &format!("/guests/web/vsock/1?wait={seconds}"), "");
    assert!(wait(MAX_WAIT_SECONDS).is_ok() && wait(MAX_WAIT_SECONDS + 1).is_err());
    let text = description.document["info"]["description"].as_str().unwrap();
    assert!(text.contains(&format!("1 to {} letters, digits and hyphens", fleet::MAX_NAME)));
}

#[test]
fn the_statuses_of_refusals_are_described_and_have_their_name() {
    let description = description();
    let explained: BTreeSet<_> =
        description.document["x-statuses"].as_object().unwrap().keys().cloned().collect();
    for status in &explained {
        assert_ne!(http::reason(status.parse().unwrap()), "Status", "{status}");
    }
    for operation in description.operations() {
        let statuses: Vec<_> = operation.node["responses"].as_object().unwrap().keys().collect();
        let good = statuses.iter().filter(|status| ["101", "200", "204"].contains(&status.as_str())).count();
        assert_eq!(good, 1, "{}", operation.path);
        let bad = statuses.iter().filter(|status| status.starts_with(['4', '5']));
        bad.for_each(|status| assert!(explained.contains(*status), "{}: {status}", operation.path));
    }
}

#[test]
fn every_described_schema_is_used() {
    let description = description();
    let text = description.document.to_string();
    for name in description.document["components"]["schemas"].as_object().unwrap().keys() {
        assert!(text.contains(&format!("\"#/components/schemas/{name}\"")), "{name}");
    }
}

#[test]
fn the_document_for_people_is_made_from_the_description() {
    assert_document("fleet-api.md", docs::markdown(&description(), "fleet.yaml", ("x-who", "Whose")));
}
