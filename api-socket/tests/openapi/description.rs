//! The description as a tree, and ways through it.

use std::path::Path;

use serde_json::Value;
use yaml_rust2::{Yaml, YamlLoader};

pub struct Description {
    pub document: Value,
}

/// One method of one path.
pub struct Operation<'a> {
    pub path: &'a str,
    /// In upper case.
    pub method: &'static str,
    pub node: &'a Value,
    description: &'a Description,
}

/// As keys of a path, and as HTTP has them; in the order of the document for people.
pub const METHODS: [(&str, &str); 5] =
    [("get", "GET"), ("post", "POST"), ("put", "PUT"), ("patch", "PATCH"), ("delete", "DELETE")];

impl Description {
    /// Of the guest API.
    pub fn read() -> Description {
        Description::of("guest.yaml")
    }

    /// The one in this file of resources/api/.
    pub fn of(file: &str) -> Description {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/api").join(file);
        let text = std::fs::read_to_string(path).unwrap();
        let documents = YamlLoader::load_from_str(&text).unwrap();
        let [document] = &documents[..] else { panic!("{file} has more than one document") };
        Description { document: to_json(document) }
    }

    /// Every operation, by path.
    pub fn operations(&self) -> Vec<Operation<'_>> {
        let mut operations = Vec::new();
        for (path, node) in self.document["paths"].as_object().unwrap() {
            for (key, method) in METHODS {
                if let Some(node) = node.get(key) {
                    operations.push(Operation { path, method, node, description: self });
                }
            }
        }
        operations
    }

    pub fn schema(&self, name: &str) -> Value {
        self.document["components"]["schemas"][name].clone()
    }

    /// The schema that this one refers to, or itself.
    pub fn resolve(&self, schema: &Value) -> Value {
        match reference(schema) {
            Some(name) => self.schema(name),
            None => schema.clone(),
        }
    }
}

impl Operation<'_> {
    /// The schema of the request's body.
    pub fn body(&self) -> Option<Value> {
        let schema = self.node.get("requestBody")?.pointer("/content/application~1json/schema")?;
        Some(self.description.resolve(schema))
    }

    /// What can be in the path or the query.
    pub fn parameters(&self) -> Vec<&Value> {
        let parameters = self.node["parameters"].as_array().into_iter().flatten();
        let resolved = parameters.map(|parameter| match parameter["$ref"].as_str() {
            Some(target) => self.description.document.pointer(target.trim_start_matches('#')).unwrap(),
            None => parameter,
        });
        resolved.collect()
    }

    /// Fields of the query: name, schema, meaning.
    pub fn queries(&self) -> Vec<(&str, &Value, &str)> {
        fn text(value: &Value) -> &str {
            value.as_str().unwrap()
        }
        let placed = self.parameters().into_iter().filter(|parameter| parameter["in"] == "query");
        placed
            .map(|parameter| {
                let schema = &parameter["schema"];
                (text(&parameter["name"]), schema, text(&parameter["description"]))
            })
            .collect()
    }

    /// The path with an id in it that the examples of the schemas have too.
    pub fn example_path(&self) -> String {
        self.path.replace("{drive_id}", "rootfs").replace("{iface_id}", "eth0").replace("{id}", "pmem0")
    }
}

/// The name of the schema that this one refers to.
pub fn reference(schema: &Value) -> Option<&str> {
    let target = schema.get("$ref").or_else(|| schema.pointer("/allOf/0/$ref"))?.as_str()?;
    target.strip_prefix("#/components/schemas/")
}

fn to_json(yaml: &Yaml) -> Value {
    match yaml {
        Yaml::Null => Value::Null,
        Yaml::Boolean(value) => (*value).into(),
        Yaml::Integer(value) => (*value).into(),
        Yaml::String(value) => value.clone().into(),
        Yaml::Array(items) => items.iter().map(to_json).collect(),
        Yaml::Hash(fields) => {
            fields.iter().map(|(key, value)| (key.as_str().unwrap().to_string(), to_json(value))).collect()
        }
        other => panic!("{other:?} has no place in a description"),
    }
}
