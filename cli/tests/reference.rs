//! docs/cli.md, made from the definitions of the command line and held to them.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this whole file is a test")]

use std::fmt::Write;
use std::path::Path;

use clap::{Arg, Command};
use cli::args;
use cli::exit::TABLE;

const HEAD: &str = "\
# The command line

`berth` is a person's way to berthd: it runs guests, shows them, and reaches into them. This page is made from the program's
definitions (`cli/src/args.rs`), as are `berth --help`, the man pages and shell completion.

A guest is named by its name, its id, or the beginning of an id that no other guest's has. `berth completion SHELL` prints
what makes a shell complete commands, flags and values.
";

const ERRORS: &str = "
An error is one line on standard error: `berth: WHAT: WHY; WHAT TO DO`. Standard output has the answer and nothing else.
`--json` is for programs: fields are added to it and do not change.
";

const TERMINALS: &str = "
Colour and progress are shown on a terminal only, and no colour with NO_COLOR in the environment.
";

fn markdown() -> String {
    let mut text = HEAD.to_string();
    let berth = args::definition();
    text.push_str("\n## Exit codes\n\n| Code | Meaning |\n|---|---|\n");
    for (code, meaning) in TABLE {
        writeln!(text, "| {code} | {meaning} |").unwrap();
    }
    text.push_str(ERRORS);
    text.push_str("\n## For every command\n\n");
    flags(&mut text, berth.get_arguments().filter(|flag| flag.is_global_set()));
    text.push_str(TERMINALS);
    for command in berth.get_subcommands().filter(|command| !command.is_hide_set()) {
        section(&mut text, command, "berth");
    }
    text
}

fn section(text: &mut String, command: &Command, parent: &str) {
    let path = format!("{parent} {}", command.get_name());
    writeln!(text, "\n## {path}\n").unwrap();
    let about = command.get_long_about().or(command.get_about()).unwrap().to_string();
    writeln!(text, "{}", about.trim()).unwrap();
    let also: Vec<_> = command.get_visible_aliases().map(|name| format!("`{parent} {name}`")).collect();
    if !also.is_empty() {
        writeln!(text, "\nAlso: {}.", also.join(", ")).unwrap();
    }
    if !command.has_subcommands() {
        let usage = command.clone().bin_name(&path).render_usage().to_string();
        writeln!(text, "\n    {}", usage.trim_start_matches("Usage: ")).unwrap();
    }
    let shown: Vec<_> =
        command.get_arguments().filter(|flag| !flag.is_hide_set() && !flag.is_global_set()).collect();
    if !shown.is_empty() {
        text.push('\n');
        flags(text, shown.into_iter());
    }
    if let Some(examples) = command.get_after_help() {
        text.push('\n');
        for line in examples.to_string().lines().skip(1) {
            writeln!(text, "  {line}").unwrap();
        }
    }
    for inner in command.get_subcommands() {
        section(text, inner, &path);
    }
}

fn flags<'a>(text: &mut String, flags: impl Iterator<Item = &'a Arg>) {
    text.push_str("| | |\n|---|---|\n");
    for flag in flags {
        let takes_value = flag.get_action().takes_values();
        let mut names: Vec<_> = flag.get_short().map(|short| format!("-{short}")).into_iter().collect();
        names.extend(flag.get_long().map(|long| format!("--{long}")));
        let mut name = names.join(", ");
        for value in flag.get_value_names().unwrap_or_default().iter().filter(|_| takes_value) {
            write!(name, "{}{value}", if name.is_empty() { "" } else { " " }).unwrap();
        }
        let mut help = flag.get_help().unwrap().to_string();
        let values: Vec<_> =
            flag.get_possible_values().iter().filter(|_| takes_value).map(possible).collect();
        if !values.is_empty() {
            write!(help, ": {}", values.join(", ")).unwrap();
        }
        if let [default] = flag.get_default_values()
            && takes_value
        {
            write!(help, "; `{}` if not given", default.to_str().unwrap()).unwrap();
        }
        if let Some(variable) = flag.get_env() {
            write!(help, ", or {} in the environment", variable.to_str().unwrap()).unwrap();
        }
        writeln!(text, "| `{name}` | {} |", help.replace('|', "\\|")).unwrap();
    }
}

fn possible(value: &clap::builder::PossibleValue) -> String {
    match value.get_help() {
        Some(help) => format!("`{}` ({})", value.get_name(), help.to_string().to_lowercase()),
        None => format!("`{}`", value.get_name()),
    }
}

/// Fails when docs/cli.md is not what the definitions make; with BLESS=1 in the environment, writes it.
#[test]
fn the_document_for_people_is_made_from_the_definitions() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cli.md");
    let text = markdown();
    if std::env::var_os("BLESS").is_some_and(|value| value == "1") {
        std::fs::write(&path, &text).unwrap();
    }
    let present = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(present == text, "docs/cli.md is stale; run BLESS=1 cargo test -p cli --test reference");
}
