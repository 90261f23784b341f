//! JSON to a value, with errors that name the field; and a reply to JSON.

use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::error::Category;

use crate::types::Reply;

/// Reads one JSON object, to its end. The error is a clause for a person: what was found at which field, and what
/// would have been right.
pub fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    // serde reads an array into a struct field by field, which no client means.
    if text.trim_ascii_start().first() == Some(&b'[') {
        return Err("the JSON is a list; give an object, `{...}`".to_string());
    }
    let mut reader = serde_json::Deserializer::from_slice(text);
    let value = serde_path_to_error::deserialize(&mut reader)
        .map_err(|error| explain(text, &error.path().to_string(), error.inner()))?;
    reader.end().map_err(|error| format!("this is not one JSON object: {error}"))?;
    Ok(value)
}

/// The status of a reply and its body, if it has one.
pub fn write_reply(reply: &Reply) -> (u16, Option<String>) {
    let written = match reply {
        Reply::Empty => return (204, None),
        Reply::Fault(fault) => return (fault.status, Some(write_fault(&fault.message))),
        Reply::InstanceInfo(info) => serde_json::to_string(info),
        Reply::Version(version) => serde_json::to_string(version),
        Reply::MachineConfig(config) => serde_json::to_string(config),
        Reply::VmConfig(config) => serde_json::to_string(config),
        Reply::Mmds(value) => serde_json::to_string(value),
        Reply::Balloon(balloon) => serde_json::to_string(balloon),
        Reply::BalloonStats(stats) => serde_json::to_string(stats),
        Reply::BalloonHintingStatus(status) => serde_json::to_string(status),
        Reply::MemoryHotplug(status) => serde_json::to_string(status),
    };
    match written {
        Ok(body) => (200, Some(body)),
        // A path that is not UTF-8, which came from the command line, has no JSON.
        Err(error) => (500, Some(write_fault(&format!("The reply cannot be written as JSON: {error}.")))),
    }
}

/// The body of a refusal.
pub fn write_fault(message: &str) -> String {
    serde_json::json!({ "fault_message": message }).to_string()
}

fn explain(text: &[u8], path: &str, error: &serde_json::Error) -> String {
    let place = format!(" at line {} column {}", error.line(), error.column());
    let full = error.to_string();
    let what = match error.classify() {
        Category::Data => explain_data(path, full.strip_suffix(&place).unwrap_or(&full)),
        // serde_json calls it a syntax error if the name of an enum's variant is not a string.
        _ if full.starts_with("expected value") && is_json(text) => {
            format!("field `{path}`: this value has a wrong type; give a string")
        }
        _ => return format!("this is not valid JSON: {full}"),
    };
    format!("{what} (line {} column {})", error.line(), error.column())
}

fn is_json(text: &[u8]) -> bool {
    serde_json::from_slice::<IgnoredAny>(text).is_ok()
}

/// serde's messages, which have a fixed form for each kind of error, with the field and in plain words. One that is
/// not known stays as it is.
fn explain_data(path: &str, what: &str) -> String {
    let parent = parent_of(path);
    let inside = if parent.is_empty() { String::new() } else { format!(" in `{parent}`") };
    if let Some((field, allowed)) = split_message(what, "unknown field ", ", expected ") {
        return format!("unknown field {field}{inside}; allowed here: {}", list(allowed));
    }
    if let Some((field, _)) = split_message(what, "unknown field ", ", there are no fields") {
        return format!("unknown field {field}{inside}; this object has no fields");
    }
    if let Some(field) = what.strip_prefix("missing field ") {
        let inside = if is_root(path) { String::new() } else { format!(" in `{path}`") };
        return format!("missing field {field}{inside}; it is required");
    }
    if let Some(field) = what.strip_prefix("duplicate field ") {
        return format!("duplicate field {field}{inside}; give it once");
    }
    let at = if is_root(path) { String::new() } else { format!("field `{path}`: ") };
    if let Some((found, allowed)) = split_message(what, "unknown variant ", ", expected ") {
        return format!("{at}unknown value {found}; allowed here: {}", list(allowed));
    }
    for start in ["invalid type: ", "invalid value: "] {
        if let Some((found, expected)) = split_message(what, start, ", expected ") {
            return format!("{at}found {found}; give {}", plain(expected));
        }
    }
    format!("{at}{what}")
}

fn is_root(path: &str) -> bool {
    path.is_empty() || path == "."
}

/// The object that holds the field at `path`; empty for the outermost.
fn parent_of(path: &str) -> &str {
    path.rsplit_once('.').map_or("", |(parent, _)| parent)
}

/// What stands between `start` and the last `middle`, and what stands after it. The last, because the first part may
/// quote what a client sent.
fn split_message<'a>(message: &'a str, start: &str, middle: &str) -> Option<(&'a str, &'a str)> {
    message.strip_prefix(start)?.rsplit_once(middle)
}

/// serde lists alternatives as "one of `a`, `b`" or "`a` or `b`".
fn list(alternatives: &str) -> String {
    alternatives.strip_prefix("one of ").unwrap_or(alternatives).replace("` or `", "`, `")
}

/// serde's name of an expected type, for somebody who does not know Rust.
fn plain(expected: &str) -> String {
    match expected {
        "u8" => format!("an integer from 0 to {}", u8::MAX),
        "u32" => format!("an integer from 0 to {}", u32::MAX),
        "u64" => format!("an integer from 0 to {}", u64::MAX),
        "a boolean" => "true or false".to_string(),
        "path string" => "a path (a string)".to_string(),
        "a sequence" => "a list".to_string(),
        "a map" => "an object".to_string(),
        _ if expected.starts_with("struct ") => "an object".to_string(),
        _ if expected.starts_with("variant of enum ") || expected.starts_with("enum ") => {
            "a string".to_string()
        }
        _ => expected.to_string(),
    }
}
