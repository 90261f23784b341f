//! ARCHITECTURE.md, held to the tree: its paths exist, the crates know each other as drawn, one copy of each crate that
//! defines shared types, and `unsafe` only where it is listed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Crates whose types cross from one crate to another: a second copy would be a second type.
const SINGLE: [&str; 3] = ["vm-memory", "vmm-sys-util", "kvm-bindings"];

const CRATES: [&str; 9] =
    ["agent", "api-socket", "cli", "devices", "jailer", "metadata", "supervisor", "tests", "vmm"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// What stands between backquotes in `text`.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The part of ARCHITECTURE.md under `heading`.
fn section(heading: &str) -> String {
    let text = read("ARCHITECTURE.md");
    let (_, rest) = text.split_once(&format!("## {heading}\n")).unwrap_or_else(|| panic!("no {heading:?}"));
    rest.split("\n## ").next().unwrap().to_owned()
}

#[test]
fn every_path_in_the_architecture_exists() {
    let text = read("ARCHITECTURE.md");
    let missing: Vec<_> = quoted(&text)
        .filter(|words| words.contains('/') && !words.contains(' ') && !words.starts_with('/'))
        .filter(|path| !root().join(path).exists())
        .collect();
    assert_eq!(missing, [""; 0]);
}

#[test]
fn the_crates_know_each_other_as_drawn() {
    let drawing = section("Who may know whom");
    let mut drawn = BTreeMap::new();
    for line in drawing.lines().filter(|line| line.contains(" -> ")) {
        let (from, to) = line.trim().split_once(" -> ").unwrap();
        let to: BTreeSet<_> =
            to.split(", ").filter(|name| CRATES.contains(name)).map(str::to_owned).collect();
        for name in from.split(", ") {
            drawn.insert(name.to_owned(), to.clone());
        }
    }
    let real: BTreeMap<_, _> = CRATES
        .iter()
        .map(|name| {
            let manifest = read(&format!("{name}/Cargo.toml"));
            let (_, wanted) = manifest.split_once("[dependencies]").unwrap();
            let wanted = wanted.split("\n[").next().unwrap();
            let known = wanted.lines().filter_map(|line| line.split(['.', ' ', '=']).next());
            (name.to_string(), known.filter(|name| CRATES.contains(name)).map(str::to_owned).collect())
        })
        .collect();
    assert_eq!(drawn, real);
}

#[test]
fn crates_whose_types_are_shared_are_there_once() {
    let lock = read("Cargo.lock");
    for name in SINGLE {
        assert_eq!(lock.matches(&format!("\nname = \"{name}\"\n")).count(), 1, "{name}");
    }
}

#[test]
fn unsafe_is_where_it_is_listed_and_nowhere_else() {
    let listed: BTreeSet<_> =
        quoted(&section("unsafe")).filter(|words| words.ends_with(".rs")).map(str::to_owned).collect();
    let mut found = BTreeSet::new();
    for name in CRATES {
        collect(&root().join(name), &mut found);
    }
    assert_eq!(listed, found);
}

/// Rust files below `directory` with unsafe code, relative to the root. Fuzz targets are a workspace of their own.
fn collect(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() && !path.ends_with("fuzz") && !path.ends_with("target") {
            collect(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            // Taken apart, so that this file is not one of them.
            let words = [concat!("uns", "afe {"), concat!("uns", "afe impl"), concat!("uns", "afe fn")];
            if words.iter().any(|word| fs::read_to_string(&path).unwrap().contains(word)) {
                found.insert(path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
}
