//! The system call filters of `resources/seccomp` as a test sees them: rules with reasons, judged against calls that threads
//! have made.
//!
//! The kernel judges by what the VMM's build made of the same files; here the files themselves are read.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::calls::Call;

/// Stands for the number of the process that a filter is put on.
const OWN_PROCESS: u64 = i32::MAX as u64;

/// The kinds of threads, each with its file.
const FILES: [(&str, &str); 4] = [
    ("control", include_str!("../../resources/seccomp/x86_64/control.json")),
    ("api", include_str!("../../resources/seccomp/x86_64/api.json")),
    ("vcpu", include_str!("../../resources/seccomp/x86_64/vcpu.json")),
    ("io", include_str!("../../resources/seccomp/x86_64/io.json")),
];

/// A reason that begins so is that of a call which no test makes.
pub const UNTESTED: &str = "Untested: ";

/// What one kind of thread may call.
#[derive(Clone, Debug, Deserialize)]
pub struct Filter {
    pub mismatch_action: String,
    #[serde(rename = "filter")]
    pub rules: Vec<Rule>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Rule {
    pub syscall: String,
    #[serde(default)]
    pub args: Vec<Condition>,
    /// Why.
    #[serde(default)]
    pub comment: String,
}

/// Of one argument; all of a rule's must hold.
#[derive(Clone, Debug, Deserialize)]
pub struct Condition {
    index: usize,
    #[serde(rename = "type")]
    width: String,
    op: Value,
    val: u64,
}

/// All filters by the kind of thread.
pub fn ours() -> BTreeMap<String, Filter> {
    let filters = FILES.map(|(kind, text)| {
        let mut file: BTreeMap<String, Filter> =
            serde_json::from_str(text).unwrap_or_else(|error| panic!("{kind}.json: {error}"));
        (kind.to_owned(), file.remove(kind).unwrap_or_else(|| panic!("{kind}.json has no {kind:?}")))
    });
    filters.into()
}

/// A file for `--seccomp-filter` with all filters, after `change` has seen each rule: false leaves it out.
pub fn custom(keep: impl Fn(&str, &Rule) -> bool) -> String {
    let mut file = serde_json::Map::new();
    for (kind, text) in FILES {
        let mut value: Value = serde_json::from_str(text).unwrap();
        let rules = value[kind]["filter"].as_array_mut().unwrap();
        rules.retain(|rule| keep(kind, &serde_json::from_value(rule.clone()).unwrap()));
        file.insert(kind.into(), value[kind].take());
    }
    Value::Object(file).to_string()
}

impl Rule {
    /// Allows this call.
    pub fn allows(&self, call: &Call) -> bool {
        self.syscall == call.name && self.args.iter().all(|condition| condition.holds(&call.arguments))
    }
}

impl Condition {
    fn holds(&self, arguments: &[u64]) -> bool {
        let Some(argument) = arguments.get(self.index).copied() else { return false };
        let narrow = |value: u64| if self.width == "dword" { value & 0xffff_ffff } else { value };
        if self.val == OWN_PROCESS {
            // What was made of it, and of no other, when the filter was put on.
            return true;
        }
        let (argument, value) = (narrow(argument), narrow(self.val));
        match &self.op {
            Value::String(op) => match op.as_str() {
                "eq" => argument == value,
                "ne" => argument != value,
                "ge" => argument >= value,
                "gt" => argument > value,
                "le" => argument <= value,
                "lt" => argument < value,
                other => panic!("an operator {other:?}"),
            },
            op => {
                let mask = op["masked_eq"].as_u64().unwrap_or_else(|| panic!("an operator {op}"));
                argument & narrow(mask) == value & narrow(mask)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_has_a_reason() {
        for (kind, filter) in ours() {
            assert_eq!(filter.mismatch_action, "trap", "{kind}");
            for rule in filter.rules {
                let reason = rule.comment.strip_prefix(UNTESTED).unwrap_or(&rule.comment);
                assert!(
                    !reason.is_empty() && reason != rule.syscall,
                    "{kind}: {} has no reason",
                    rule.syscall
                );
            }
        }
    }

    #[test]
    fn no_entry_makes_another_one_of_no_use() {
        for (kind, filter) in ours() {
            for (at, rule) in filter.rules.iter().enumerate() {
                let others = filter.rules.iter().enumerate().filter(|(other, _)| *other != at);
                let wider = others.map(|(_, other)| other).find(|other| {
                    other.syscall == rule.syscall && (other.args.is_empty() || rule.args.is_empty())
                });
                assert!(wider.is_none(), "{kind}: {} with and without conditions", rule.syscall);
            }
        }
    }

    #[test]
    fn conditions_hold_as_in_the_kernel() {
        let condition = |op: &str, width: &str, val| Condition {
            index: 1,
            width: width.into(),
            op: serde_json::from_str(op).unwrap(),
            val,
        };
        assert!(condition("\"eq\"", "dword", 7).holds(&[0, 0x1_0000_0007]));
        assert!(!condition("\"eq\"", "qword", 7).holds(&[0, 0x1_0000_0007]));
        assert!(condition(r#"{"masked_eq": 4}"#, "dword", 0).holds(&[0, 3]));
        assert!(!condition(r#"{"masked_eq": 4}"#, "dword", 0).holds(&[0, 7]));
        assert!(!condition("\"eq\"", "dword", 0).holds(&[0]), "no such argument");
    }
}
