//! docs/security.md, held to what the code and the tests say.

use std::fs;
use std::path::Path;

use crate::attack::{ATTEMPTS, Attempt, IN_ROOTLESS_CELL};

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

#[test]
fn the_tests_that_hold_the_lessons_exist() {
    let page = page();
    let (_, lessons) = page.split_once("\n## Lessons that others paid for\n").unwrap();
    let lessons = lessons.split("\n## ").next().unwrap();
    let mut named = 0;
    for lesson in lessons.split("\n- ").skip(1) {
        let (mut files, mut is_complete) = (Vec::new(), true);
        for words in lesson.split('`').skip(1).step_by(2) {
            if words.ends_with(".rs") {
                // Several files in a row share the tests that follow.
                if std::mem::take(&mut is_complete) {
                    files.clear();
                }
                files.push(words);
            } else if !files.is_empty() && words.contains('_') {
                is_complete = true;
                for file in &files {
                    assert!(has_test(file, words), "{file} has no test {words}");
                    named += 1;
                }
            }
        }
        assert!(is_complete && !files.is_empty(), "no test is named for: {lesson}");
    }
    assert!(named > 0);
}

/// Whether there is such a test: also one that a macro makes, whose attribute may be a few lines above.
fn has_test(file: &str, name: &str) -> bool {
    let text = fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
    let Some((before, _)) = text.split_once(&format!("fn {name}(")) else { return false };
    before.lines().rev().take(4).any(|line| line.trim() == "#[test]")
}

#[test]
fn the_limits_are_those_of_the_code() {
    let rows = table("| | At most | Named |");
    assert!(rows.len() > 10);
    for row in rows {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let [_, _, most, named, _] = cells.as_slice() else { panic!("{row}") };
        let [file, name] = named.split('`').skip(1).step_by(2).collect::<Vec<_>>()[..] else {
            panic!("{row}")
        };
        let documented = in_words(most).unwrap_or_else(|| panic!("no number with a unit: {row}"));
        assert_eq!(Some(documented), constant(file, name), "{row}");
    }
}

#[test]
fn what_a_rootless_cell_does_not_stop_is_said() {
    let page = page();
    let (_, said) = page.split_once("In a [rootless cell]").unwrap();
    let said = said.split("\n\n").next().unwrap();
    let named: Vec<_> = said.split('`').skip(1).step_by(2).collect();
    assert_eq!(named, IN_ROOTLESS_CELL);
}

/// A number with its unit, in bytes or milliseconds where it has one.
fn in_words(text: &str) -> Option<u64> {
    let (number, unit) = text.split_once(' ').unwrap_or((text, ""));
    let factor = match unit {
        "" | "bytes" | "ms" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "s" => 1000,
        _ => return None,
    };
    Some(number.parse::<u64>().ok()? * factor)
}

/// The value of a constant, as far as our limits need arithmetic.
fn constant(file: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
    let (_, definition) = text.split_once(&format!("const {name}: "))?;
    let value = definition.split_once("= ")?.1.split_once(';')?.0;
    let number = |text: &str| match text.trim() {
        "libc::PIPE_BUF" => Some(libc::PIPE_BUF as u64),
        text => text.replace('_', "").parse().ok(),
    };
    let of_time = |unit: &str| value.strip_prefix(unit)?.strip_suffix(')').and_then(number);
    of_time("Duration::from_millis(")
        .or_else(|| of_time("Duration::from_secs(").map(|seconds| seconds * 1000))
        .or_else(|| value.split_once("<<").and_then(|(low, shift)| Some(number(low)? << number(shift)?)))
        .or_else(|| value.split_once('*').and_then(|(one, other)| Some(number(one)? * number(other)?)))
        .or_else(|| number(value))
}
