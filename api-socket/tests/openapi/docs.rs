//! The description as a document for people.

use std::fmt::Write;

use serde_json::Value;

use crate::description::{Description, Operation, reference};

/// `made_from` is the file, `key` and `heading` are of the column that says when or for whom a request is.
pub fn markdown(description: &Description, made_from: &str, (key, heading): (&str, &str)) -> String {
    let document = &description.document;
    let mut text = String::new();
    let info = &document["info"];
    writeln!(
        text,
        "<!-- Made from resources/api/{made_from} by BLESS=1 cargo test -p api-socket --test openapi -->"
    )
    .unwrap();
    writeln!(text, "# {}\n\n{}", word(&info["title"]), word(&info["description"]).trim_end()).unwrap();
    text.push_str("\n## Limits\n\n| | at most |\n|---|---|\n");
    for (name, limit) in document["x-limits"].as_object().unwrap() {
        writeln!(text, "| {} | {limit} |", name.replace('_', " ")).unwrap();
    }
    if let Some(statuses) = document["x-statuses"].as_object() {
        text.push_str("\n## Statuses of refusals\n\n| | |\n|---|---|\n");
        for (status, meaning) in statuses {
            writeln!(text, "| {status} | {} |", word(meaning)).unwrap();
        }
    }
    writeln!(text, "\n## Requests\n\n| Request | | {heading} | Body | Reply |\n|---|---|---|---|---|")
        .unwrap();
    for operation in description.operations() {
        text.push_str(&request_row(&operation, key));
    }
    text.push_str("\n## Bodies and replies\n");
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        text.push_str(&schema_section(name, schema));
    }
    text
}

fn request_row(operation: &Operation, key: &str) -> String {
    let node = operation.node;
    let mut what = word(&node["summary"]).to_string();
    if let Some(more) = node["description"].as_str() {
        what.push(' ');
        what.push_str(more.trim_end());
    }
    for (name, schema, meaning) in operation.queries() {
        let default = &schema["default"];
        write!(what, " `?{name}=`: {meaning}; {}, default `{}`.", type_name(schema), plain(default)).unwrap();
    }
    format!(
        "| `{} {}` | {what} | {} | {} | {} |\n",
        operation.method,
        operation.path,
        word(&node[key]),
        content(&node["requestBody"]),
        match &node["responses"]["101"] {
            Value::Null => content(&node["responses"]["200"]),
            upgrade => format!("101. {}", word(&upgrade["description"])),
        },
    )
}

/// The type of a body or reply; JSON is not named.
fn content(node: &Value) -> String {
    let Some((kind, content)) = node["content"].as_object().and_then(|content| content.iter().next()) else {
        return String::new();
    };
    match (kind.as_str(), reference(&content["schema"])) {
        ("application/json", _) => type_name(&content["schema"]),
        (kind, Some(_)) => format!("`{kind}`, {}", type_name(&content["schema"])),
        (kind, None) => format!("`{kind}`"),
    }
}

/// A text without its quotes.
fn plain(value: &Value) -> String {
    value.as_str().map_or(value.to_string(), str::to_owned)
}

fn schema_section(name: &str, schema: &Value) -> String {
    let mut text = format!("\n### {name}\n\n{}\n\n", word(&schema["description"]));
    let Some(properties) = schema["properties"].as_object() else {
        if schema.get("enum").is_some() {
            writeln!(text, "One of {}.", type_name(schema)).unwrap();
        }
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
