//! One JSON document with a limit: put as a whole, changed by merge patches (RFC 7396), read by path.
//!
//! Does not check who reads. How deep a document may be is limited by the parser that it came from (128), and a patch makes
//! none deeper than the deeper of the two.

use serde_json::{Map, Value};

/// The document.
#[derive(Clone, Debug)]
pub struct Store {
    /// `None` until something was put.
    value: Option<Value>,
    limit: usize,
}

/// How a part of the document is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    /// As EC2's metadata service does: the keys of an object in lines, those of objects in it with a `/`; a string as it is.
    /// There is no such form of numbers, lists and others.
    Imds,
}

/// Why the document was not changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error(
        "the metadata would have {size} bytes as JSON, and the limit is {limit}; put less, or start the VMM with a higher \
         --mmds-size-limit"
    )]
    TooLarge { size: usize, limit: usize },
    #[error("there is no metadata to change yet; PUT /mmds first")]
    Empty,
}

/// Why there is no text at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoText {
    NotFound,
    /// There is something that the format has no form for.
    NoForm,
}

impl Store {
    /// Without a document. `limit` is in bytes of JSON without spaces.
    pub fn new(limit: usize) -> Store {
        Store { value: None, limit }
    }

    /// Whether there is a document.
    pub fn is_set(&self) -> bool {
        self.value.is_some()
    }

    /// The document; null where there is none.
    pub fn value(&self) -> Value {
        self.value.clone().unwrap_or_default()
    }

    /// Another document in place of what there was.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`]; nothing has changed then.
    pub fn put(&mut self, value: Map<String, Value>) -> Result<(), StoreError> {
        self.set(Value::Object(value))
    }

    /// Changes the document.
    ///
    /// # Errors
    /// Those of [`StoreError`]; nothing has changed then.
    pub fn patch(&mut self, patch: Map<String, Value>) -> Result<(), StoreError> {
        let mut value = self.value.clone().ok_or(StoreError::Empty)?;
        merge(&mut value, Value::Object(patch));
        self.set(value)
    }

    /// What is at a path. Its parts are keys of objects and numbers in lists, with `~1` for a slash in a key and `~0` for a
    /// tilde (RFC 6901); slashes too many do no harm.
    ///
    /// # Errors
    /// Those of [`NoText`].
    pub fn text(&self, path: &str, format: Format) -> Result<String, NoText> {
        let parts = path.split('/').filter(|part| !part.is_empty());
        let pointer: String = parts.flat_map(|part| ["/", part]).collect();
        let value = self.value.as_ref().and_then(|value| value.pointer(&pointer)).ok_or(NoText::NotFound)?;
        match (format, value) {
            (Format::Json, value) => Ok(value.to_string()),
            (Format::Imds, Value::String(text)) => Ok(text.clone()),
            (Format::Imds, Value::Object(map)) => Ok(list(map)),
            (Format::Imds, _) => Err(NoText::NoForm),
        }
    }

    fn set(&mut self, value: Value) -> Result<(), StoreError> {
        let size = value.to_string().len();
        if size > self.limit {
            return Err(StoreError::TooLarge { size, limit: self.limit });
        }
        self.value = Some(value);
        Ok(())
    }
}

fn list(map: &Map<String, Value>) -> String {
    let line = |(key, value): (&String, &Value)| format!("{key}{}", if value.is_object() { "/" } else { "" });
    map.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// RFC 7396, section 2.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else { return };
    for (key, value) in patch {
        match value {
            Value::Null => drop(target.remove(&key)),
            value => merge(target.entry(key).or_insert(Value::Null), value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    fn store(value: Value) -> Store {
        let mut store = Store::new(1000);
        store.put(object(value)).unwrap();
        store
    }

    /// The examples of RFC 7396, appendix A, whose documents are objects.
    #[test]
    fn patches_do_what_their_specification_shows() {
        for (before, patch, after) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"b": "c"}), json!({"a": "b", "b": "c"})),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (json!({"a": "b", "b": "c"}), json!({"a": null}), json!({"b": "c"})),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "c"}), json!({"a": ["b"]}), json!({"a": ["b"]})),
            (json!({"a": {"b": "c"}}), json!({"a": {"b": "d", "c": null}}), json!({"a": {"b": "d"}})),
            (json!({"a": [{"b": "c"}]}), json!({"a": [1]}), json!({"a": [1]})),
            (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
            (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
        ] {
            let mut store = store(before.clone());
            store.patch(object(patch.clone())).unwrap();
            assert_eq!(store.value(), after, "{before} patched with {patch}");
        }
    }

    #[test]
    fn what_would_be_too_large_changes_nothing() {
        let mut store = Store::new(13);
        assert_eq!((store.is_set(), store.value()), (false, Value::Null));
        assert_eq!(store.patch(object(json!({"a": 1}))), Err(StoreError::Empty));
        store.put(object(json!({"a": "12345"}))).unwrap();
        let error = store.put(object(json!({"a": "123456"}))).unwrap_err();
        assert_eq!(error, StoreError::TooLarge { size: 14, limit: 13 });
        assert!(error.to_string().contains("--mmds-size-limit"));
        assert!(matches!(store.patch(object(json!({"b": 1}))), Err(StoreError::TooLarge { .. })));
        assert_eq!(store.value(), json!({"a": "12345"}));
        // What goes makes room for what comes.
        store.patch(object(json!({"a": null, "b": "12345"}))).unwrap();
    }

    #[test]
    fn a_part_is_found_by_its_path_and_written_in_either_form() {
        let store = store(json!({"latest": {"id": "i-1", "tags": {"a/b": "1", "~": "2"}, "empty": {}},
                                 "list": ["x", {"y": "z"}], "number": 4, "no": null, "yes": true}));
        let json = |path| store.text(path, Format::Json);
        let imds = |path| store.text(path, Format::Imds);
        assert_eq!(imds("/").unwrap(), "latest/\nlist\nno\nnumber\nyes");
        assert_eq!(imds("").unwrap(), imds("///").unwrap());
        assert_eq!(imds("/latest/").unwrap(), "empty/\nid\ntags/");
        assert_eq!(imds("//latest///id/").unwrap(), "i-1");
        assert_eq!(imds("/latest/empty").unwrap(), "");
        assert_eq!(imds("/latest/tags/a~1b").unwrap(), "1");
        assert_eq!(imds("/latest/tags/~0").unwrap(), "2");
        assert_eq!(imds("/list/1/y").unwrap(), "z");
        assert_eq!(json("/latest/id").unwrap(), "\"i-1\"");
        assert_eq!(json("/list").unwrap(), "[\"x\",{\"y\":\"z\"}]");
        assert_eq!(json("/number").unwrap(), "4");
        for path in ["/list", "/number", "/no", "/yes"] {
            assert_eq!(imds(path), Err(NoText::NoForm), "{path}");
        }
        for path in ["/other", "/latest/id/more", "/list/2", "/list/-", "/latest/tags/a/b", "/list/01"] {
            assert_eq!((imds(path), json(path)), (Err(NoText::NotFound), Err(NoText::NotFound)), "{path}");
        }
        assert_eq!(Store::new(1).text("/", Format::Json), Err(NoText::NotFound));
    }
}
