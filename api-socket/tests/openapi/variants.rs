//! Values that a schema describes, and the same with one thing changed.

use serde_json::{Map, Value, json};

use crate::description::{Description, reference};

/// A value and whether the schema accepts it.
pub struct Variant {
    /// How it differs from the full value.
    pub what: String,
    pub value: Value,
    pub accepted: bool,
}

/// A value with every field there is.
pub fn full(description: &Description, schema: &Value) -> Value {
    let schema = description.resolve(schema);
    if let Some(example) = schema.get("example").or_else(|| schema.pointer("/enum/0")) {
        return example.clone();
    }
    if let Some(alternatives) = schema["oneOf"].as_array() {
        return full(description, alternatives.last().unwrap());
    }
    match schema["type"].as_str() {
        Some("string") => json!("text"),
        Some("boolean") => json!(true),
        Some("integer") => schema.get("minimum").cloned().unwrap_or(json!(1)),
        Some("number") => json!(1.5),
        Some("array") if schema["maxItems"] == 0 => json!([]),
        Some("array") => json!([full(description, &schema["items"])]),
        Some("object") => match schema["properties"].as_object() {
            Some(properties) => properties
                .iter()
                .map(|(name, property)| (name.clone(), full(description, property)))
                .collect(),
            None => json!({ "key": full(description, &schema["additionalProperties"]) }),
        },
        other => panic!("no example of a schema of type {other:?}: {schema}"),
    }
}

/// A value with the required fields only.
pub fn minimal(description: &Description, schema: &Value) -> Value {
    let mut value = full(description, schema);
    value.as_object_mut().unwrap().retain(|name, _| is_required(schema, name));
    value
}

/// The full value with one thing changed, for each thing that can be, at any depth.
pub fn of(description: &Description, schema: &Value) -> Vec<Variant> {
    let schema = description.resolve(schema);
    let mut variants = Vec::new();
    for wrong in wrong_types(&schema) {
        variants.push(Variant { what: format!("is {wrong}"), value: wrong, accepted: false });
    }
    for named in schema["enum"].as_array().unwrap_or(&Vec::new()) {
        variants.push(Variant { what: format!("is {named}"), value: named.clone(), accepted: true });
    }
    let largest = match schema["format"].as_str() {
        Some("uint64") => json!(u64::MAX),
        _ => schema["maximum"].clone(),
    };
    if !largest.is_null() {
        variants.push(Variant { what: format!("is {largest}"), value: largest, accepted: true });
    }
    for alternative in schema["oneOf"].as_array().unwrap_or(&Vec::new()) {
        let value = full(description, alternative);
        variants.push(Variant { what: format!("is {value}"), value, accepted: true });
    }
    match (schema["type"].as_str(), full(description, &schema)) {
        (Some("object"), Value::Object(value)) => of_object(description, &schema, &value, &mut variants),
        (Some("array"), Value::Array(value)) if !value.is_empty() => {
            variants.push(Variant { what: "is empty".to_string(), value: json!([]), accepted: true });
            for Variant { what, value, accepted } in of(description, &schema["items"]) {
                variants.push(Variant { what: format!("[0] {what}"), value: json!([value]), accepted });
            }
        }
        (Some("array"), _) => {
            variants.push(Variant { what: "has an item".to_string(), value: json!([{}]), accepted: false });
        }
        _ => {}
    }
    variants
}

fn of_object(
    description: &Description,
    schema: &Value,
    full: &Map<String, Value>,
    variants: &mut Vec<Variant>,
) {
    let Some(properties) = schema["properties"].as_object() else { return };
    let with = |name: &str, value: Value| {
        let mut changed = full.clone();
        changed.insert(name.to_string(), value);
        Value::Object(changed)
    };
    variants.push(Variant {
        what: "has an unknown field".to_string(),
        value: with("colour", json!("red")),
        accepted: schema["additionalProperties"] == true,
    });
    variants.push(Variant {
        what: "has no fields".to_string(),
        value: json!({}),
        accepted: schema.get("required").is_none() && schema.get("minProperties").is_none(),
    });
    for (name, property) in properties {
        let mut without = full.clone();
        without.remove(name);
        variants.push(Variant {
            what: format!("has no {name}"),
            value: Value::Object(without),
            accepted: !is_required(schema, name),
        });
        variants.push(Variant {
            what: format!(".{name} is null"),
            value: with(name, Value::Null),
            accepted: property["nullable"] == true,
        });
        for Variant { what, value, accepted } in of(description, property) {
            variants.push(Variant { what: format!(".{name} {what}"), value: with(name, value), accepted });
        }
    }
}

fn is_required(schema: &Value, name: &str) -> bool {
    schema["required"].as_array().is_some_and(|required| required.contains(&json!(name)))
}

/// Values of other types than the schema's; for a name or a text with a form, also what does not have it.
fn wrong_types(schema: &Value) -> Vec<Value> {
    assert!(reference(schema).is_none());
    if schema.get("oneOf").is_some() {
        return vec![json!(17), json!([])];
    }
    if schema["enum"] == json!([null]) {
        return vec![json!({}), json!("text"), json!(0)];
    }
    let mut wrong = match schema["type"].as_str() {
        Some("string") => vec![json!(17), json!(true), json!({}), json!([])],
        Some("boolean") => vec![json!("true"), json!(1), json!({})],
        Some("integer") => vec![json!("17"), json!(1.5), json!(-1), json!(18446744073709551616.0), json!([])],
        Some("number") => vec![json!("1.5"), json!(true), json!({})],
        Some("array") => vec![json!("text"), json!({}), json!(17)],
        Some("object") => vec![json!("text"), json!(17), json!(true)],
        other => panic!("no values that are not of type {other:?}"),
    };
    if ["enum", "pattern"].iter().any(|form| schema.get(form).is_some()) || schema["format"] == "ipv4" {
        wrong.push(json!("no such name"));
    }
    if schema["format"] == "uint32" {
        wrong.push(json!(1u64 << 32));
    }
    wrong
}
