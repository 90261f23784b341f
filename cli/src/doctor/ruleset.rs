//! What of the rules of nftables may drop what guests send elsewhere. Pure: it reads what `nft --json list ruleset` says.
//!
//! berthd's own table lets it through, which is not enough: a packet passes if no base chain of the hook drops it. Whether a
//! chain that is called by one of these lets it through is not followed.

use serde::Deserialize;
use serde_json::Value;

/// The families of guests' packets, which are IPv4's alone.
const FAMILIES: [&str; 2] = ["ip", "inet"];

/// A base chain that drops what is forwarded unless a rule lets it through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    pub family: String,
    pub table: String,
    pub name: String,
}

/// libnftables-json(5): a list of objects, each under the name of its kind.
#[derive(Deserialize)]
struct Listing {
    nftables: Vec<Object>,
}

#[derive(Deserialize)]
struct Object {
    chain: Option<BaseChain>,
    rule: Option<Rule>,
}

#[derive(Deserialize)]
struct BaseChain {
    family: String,
    table: String,
    name: String,
    /// This and the policy are those of base chains.
    hook: Option<String>,
    policy: Option<String>,
}

#[derive(Deserialize)]
struct Rule {
    family: String,
    table: String,
    chain: String,
    #[serde(default)]
    expr: Vec<Value>,
}

/// The chains that drop what is forwarded by policy, but those with a rule that lets through all that comes from this bridge.
///
/// # Errors
/// It is not what nft says.
pub fn droppers(listing: &str, bridge: &str) -> Result<Vec<Chain>, serde_json::Error> {
    let Listing { nftables } = serde_json::from_str(listing)?;
    let rules: Vec<_> = nftables.iter().filter_map(|object| object.rule.as_ref()).collect();
    let drops = |chain: &BaseChain| {
        let is_policy = FAMILIES.contains(&chain.family.as_str())
            && chain.hook.as_deref() == Some("forward")
            && chain.policy.as_deref() == Some("drop");
        let has = |rule: &Rule| {
            (&rule.family, &rule.table, &rule.chain) == (&chain.family, &chain.table, &chain.name)
        };
        is_policy && !rules.iter().any(|rule| has(rule) && lets_through(rule, bridge))
    };
    let chains = nftables.iter().filter_map(|object| object.chain.as_ref()).filter(|chain| drops(chain));
    Ok(chains
        .map(|chain| Chain {
            family: chain.family.clone(),
            table: chain.table.clone(),
            name: chain.name.clone(),
        })
        .collect())
}

/// `iifname BRIDGE accept` and nothing else, but that it may count.
fn lets_through(rule: &Rule, bridge: &str) -> bool {
    let from_bridge =
        serde_json::json!({"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": bridge}});
    let mut said = rule.expr.iter().filter(|part| part.get("counter").is_none());
    said.next() == Some(&from_bridge)
        && said.next().is_some_and(|part| part.get("accept").is_some())
        && said.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn chain(family: &str, table: &str, name: &str, hook: &str, policy: &str) -> Value {
        json!({"chain": {"family": family, "table": table, "name": name, "handle": 1, "type": "filter", "hook": hook,
                         "prio": 0, "policy": policy}})
    }

    fn forward_of(table: &str) -> Value {
        chain("ip", table, "FORWARD", "forward", "drop")
    }

    fn accept(chain: &str, conditions: &[Value]) -> Value {
        let counter = json!({"counter": {"packets": 0, "bytes": 0}});
        let parts = [conditions, &[counter, json!({"accept": null})]].concat();
        json!({"rule": {"family": "ip", "table": "filter", "chain": chain, "handle": 2, "expr": parts}})
    }

    fn from(bridge: &str) -> Value {
        json!({"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": bridge}})
    }

    /// Of these objects, as family, table and chain.
    fn droppers_of(objects: &[Value]) -> Vec<String> {
        let listing = json!({"nftables": objects}).to_string();
        let found = droppers(&listing, "berth0").unwrap();
        found.iter().map(|Chain { family, table, name }| format!("{family} {table} {name}")).collect()
    }

    #[test]
    fn what_drops_is_a_base_chain_where_packets_of_guests_are_forwarded() {
        let objects = [
            json!({"metainfo": {"version": "1.0.6", "json_schema_version": 1}}),
            json!({"table": {"family": "ip", "name": "filter", "handle": 1}}),
            forward_of("filter"),
            chain("inet", "mine", "through", "forward", "drop"),
            // None of these is one.
            chain("ip", "berth_berth0", "through", "forward", "accept"),
            chain("ip", "filter", "INPUT", "input", "drop"),
            chain("ip6", "filter", "FORWARD", "forward", "drop"),
            chain("bridge", "filter", "FORWARD", "forward", "drop"),
            json!({"chain": {"family": "ip", "table": "filter", "name": "DOCKER-USER", "handle": 3}}),
        ];
        assert_eq!(droppers_of(&objects), ["ip filter FORWARD", "inet mine through"]);
        assert!(droppers_of(&[]).is_empty());
    }

    #[test]
    fn a_chain_that_lets_all_of_the_bridge_through_is_mended() {
        let with = |rule: Value| droppers_of(&[forward_of("filter"), rule]).is_empty();
        assert!(with(accept("FORWARD", &[from("berth0")])));
        assert!(!with(accept("FORWARD", &[from("docker0")])));
        assert!(!with(accept("FORWARD", &[])));
        assert!(!with(accept("INPUT", &[from("berth0")])));
        let established =
            json!({"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established"]}});
        assert!(!with(accept("FORWARD", &[from("berth0"), established])));
        // Another table's chain of the same name still drops.
        let rule = accept("FORWARD", &[from("berth0")]);
        assert_eq!(droppers_of(&[forward_of("filter"), rule, forward_of("other")]), ["ip other FORWARD"]);
    }

    #[test]
    fn what_nft_does_not_say_is_not_taken_for_no_rules() {
        for listing in ["", "{}", "table ip filter {}", "{\"nftables\": [{\"chain\": {}}]}"] {
            assert!(droppers(listing, "berth0").is_err(), "{listing}");
        }
    }
}
