//! docs/security.md, held to what the code and the tests say.

use std::fs;
use std::path::Path;

use crate::attack::{ATTEMPTS, Attempt};

const PAGE: &str = "docs/security.md";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn page() -> String {
    fs::read_to_string(root().join(PAGE)).unwrap()
}

/// The rows of the table that begins with this line, as it is there and without the line of hyphens.
fn table(head: &str) -> Vec<String> {
    let page = page();
    let (_, rest) = page.split_once(&format!("{head}\n")).unwrap_or_else(|| panic!("no table {head:?}"));
    rest.lines().skip(1).take_while(|line| line.starts_with('|')).map(str::to_owned).collect()
}

#[test]
fn the_table_of_attempts_is_that_of_the_attacker() {
    let row = |attempt: &Attempt| {
        let layers: Vec<_> = attempt.stopped_by.iter().map(|layer| layer.name()).collect();
        format!("| `{}` | {} | {} |", attempt.name, attempt.what, layers.join(", "))
    };
    let expected: Vec<_> = ATTEMPTS.iter().map(row).collect();
    assert_eq!(table("| Attempt | | Stopped by |"), expected, "{PAGE} should have\n{}", expected.join("\n"));
}
