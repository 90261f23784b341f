//! The description as a document for people.

use std::fmt::Write;

use serde_json::Value;

use crate::description::{Description, Operation, reference};

pub fn markdown(description: &Description) -> String {
    let document = &description.document;
    let mut text = String::new();
    let info = &document["info"];
    writeln!(
        text,
        "<!-- Made from resources/api/guest.yaml by BLESS=1 cargo test -p api-socket --test openapi -->"
    )
    .unwrap();
    writeln!(text, "# {}\n\n{}", word(&info["title"]), word(&info["description"]).trim_end()).unwrap();
    text.push_str("\n## Limits\n\n| | at most |\n|---|---|\n");
    for (name, limit) in document["x-limits"].as_object().unwrap() {
        writeln!(text, "| {} | {limit} |", name.replace('_', " ")).unwrap();
    }
    text.push_str("\n## Requests\n\n| Request | | When | Body | Reply |\n|---|---|---|---|---|\n");
    for operation in description.operations() {
        text.push_str(&request_row(&operation));
    }
    text.push_str("\n## Bodies and replies\n");
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        text.push_str(&schema_section(name, schema));
    }
    text
}

fn request_row(operation: &Operation) -> String {
    let node = operation.node;
    let mut what = word(&node["summary"]).to_string();
    if let Some(more) = node["description"].as_str() {
        what.push(' ');
        what.push_str(more.trim_end());
    }
    let body = node.pointer("/requestBody/content/application~1json/schema").map_or(String::new(), type_name);
    let reply =
        node.pointer("/responses/200/content/application~1json/schema").map_or(String::new(), type_name);
    format!(
        "| `{} {}` | {what} | {} | {body} | {reply} |\n",
        operation.method,
        operation.path,
        word(&node["x-when"])
    )
}

fn schema_section(name: &str, schema: &Value) -> String {
    let mut text = format!("\n### {name}\n\n{}\n\n", word(&schema["description"]));
    let Some(properties) = schema["properties"].as_object() else {
        return text.trim_end().to_string() + "\n";
    };
    text.push_str("| Field | Type | | |\n|---|---|---|---|\n");
    for (field, property) in properties {
        let required =
            schema["required"].as_array().is_some_and(|names| names.iter().any(|name| name == field));
        let presence = match property.get("default") {
            _ if required => "required".to_string(),
            Some(default) => format!("default `{default}`"),
            None => String::new(),
        };
        let deprecated = if property["deprecated"] == true { "Deprecated. " } else { "" };
        let meaning = property["description"].as_str().unwrap_or_default();
        writeln!(text, "| `{field}` | {} | {presence} | {deprecated}{meaning} |", type_name(property))
            .unwrap();
    }
    text
}

/// A type in a word or a few.
fn type_name(schema: &Value) -> String {
    let mut name = match (reference(schema), schema["type"].as_str()) {
        (Some(name), _) => format!("[{name}](#{})", name.to_lowercase()),
        (None, Some("array")) if schema["maxItems"] == 0 => "empty list".to_string(),
        (None, Some("array")) => format!("list of {}", type_name(&schema["items"])),
        (None, Some("object")) => format!("object of {}", type_name(&schema["additionalProperties"])),
        (None, Some("integer")) => format!("integer{}", range(schema)),
        (None, Some(name)) => match schema["enum"].as_array() {
            Some(names) => {
                let names: Vec<_> =
                    names.iter().filter_map(Value::as_str).map(|name| format!("`{name}`")).collect();
                names.join(", ")
            }
            None => name.to_string(),
        },
        (None, None) => match schema["oneOf"].as_array() {
            Some(types) => types.iter().map(type_name).collect::<Vec<_>>().join(" or "),
            None => return "`null`".to_string(),
        },
    };
    if schema["nullable"] == true {
        name.push_str(" or `null`");
    }
    name
}

fn range(schema: &Value) -> String {
    match (&schema["minimum"], &schema["maximum"]) {
        (Value::Null, Value::Null) => String::new(),
        (least, Value::Null) => format!(" from {least}"),
        (least, most) => format!(" from {least} to {most}"),
    }
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap()
}
