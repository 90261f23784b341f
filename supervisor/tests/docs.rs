//! docs/berthd.md against the code: its configuration is the default's, and its tables are made from what is in force.

#![allow(clippy::unwrap_used, clippy::panic, reason = "this whole file is a test")]

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use api_socket::fleet::{Outcome, Restart};
use supervisor::config::{self, Config};
use supervisor::fleet::Fleet;
use supervisor::operations::outcome_of;
use supervisor::state::{self, Action, Event, Policy, State, next};
use supervisor::{events, feed, metrics, serve};

fn path(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file)
}

fn document() -> String {
    std::fs::read_to_string(path("docs/berthd.md")).unwrap()
}

/// Fails when what is between these marks is not this; with BLESS=1 in the environment, writes it.
fn assert_made(name: &str, made: &str) {
    // Tests of this file write the same one.
    static WRITES: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = WRITES.lock().unwrap();
    let document = document();
    let mark = format!("<!-- made: {name} -->\n");
    let (before, rest) = document.split_once(&mark).unwrap_or_else(|| panic!("there is no {mark}"));
    let (present, after) = rest.split_once("<!-- end -->").unwrap();
    if std::env::var_os("BLESS").is_some_and(|value| value == "1") {
        std::fs::write(path("docs/berthd.md"), format!("{before}{mark}{made}<!-- end -->{after}")).unwrap();
    } else {
        assert!(present == made, "{name} is stale; run BLESS=1 cargo test -p supervisor --test docs\n{made}");
    }
}

#[test]
fn the_configuration_that_is_shown_is_the_default_and_has_every_setting() {
    let document = document();
    let (_, section) = document.split_once("\n## Configuration\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let shown: String =
        section.lines().filter_map(|line| line.strip_prefix("    ")).fold(String::new(), |mut text, line| {
            writeln!(text, "{line}").unwrap();
            text
        });
    assert_eq!(Config::parse(&shown), Ok(Config::default()));
    let shown: toml::Table = shown.parse().unwrap();
    for table in ["", "network", "programs"] {
        let error = Config::parse(&format!("[{table}.colour]").replace("[.", "[")).unwrap_err();
        let (_, known) = error.split_once("expected ").unwrap();
        let known: BTreeSet<_> = known.split('`').skip(1).step_by(2).collect();
        let of = if table.is_empty() { &shown } else { shown[table].as_table().unwrap() };
        assert_eq!(of.keys().map(String::as_str).collect::<BTreeSet<_>>(), known, "{table}");
    }
}

const STATES: [State; 8] = [
    State::Stopped,
    State::Starting,
    State::StartingAgain,
    State::Running,
    State::Paused,
    State::Stopping,
    State::Waiting,
    State::Removing,
];

#[test]
fn the_transitions_are_those_of_the_code() {
    let policy = |restart| Policy { restart, remove_when_ended: false, streak: 0 };
    let (no, again) = (policy(Restart::No), policy(Restart::Always));
    let happens = [
        ("start", Event::Start, no),
        ("the VMM answers", Event::Started, no),
        ("paused", Event::Paused, no),
        ("resumed", Event::Resumed, no),
        ("stop", Event::Stop, no),
        ("kill, or time is over", Event::Kill, no),
        ("the wait is over", Event::Due, no),
        ("rm", Event::Remove { force: false }, no),
        ("rm by force", Event::Remove { force: true }, no),
        ("ended", Event::Ended(Outcome::PoweredOff), no),
        ("failed", Event::Ended(Outcome::VmmFailed), again),
        ("rebooted", Event::Ended(Outcome::Rebooted), no),
    ];
    let named = |state: State| serde_json::to_value(state).unwrap().as_str().unwrap().to_owned();
    let names: Vec<_> = STATES.into_iter().map(named).collect();
    let mut text = format!("| | {} |\n|---|{}\n", names.join(" | "), "---|".repeat(STATES.len()));
    for (name, event, policy) in happens {
        write!(text, "| {name} |").unwrap();
        for state in STATES {
            let cell = match next(state, event, policy) {
                Err(_) => "refused".to_owned(),
                Ok((then, action)) => {
                    let changed = (then != state).then(|| named(then));
                    let done = match action {
                        Action::Nothing => None,
                        Action::Start => Some("make a process"),
                        Action::AskToGoDown => Some("ask it"),
                        Action::Kill => Some("kill"),
                        Action::Wait(_) => Some("wait"),
                        Action::Forget => Some("forget"),
                    };
                    let parts: Vec<_> = changed.into_iter().chain(done.map(str::to_owned)).collect();
                    if parts.is_empty() { "·".to_owned() } else { parts.join(", ") }
                }
            };
            write!(text, " {cell} |").unwrap();
        }
        text.push('\n');
    }
    assert_made("transitions", &text);
}

#[test]
fn the_waits_that_are_told_are_those_of_the_code() {
    let document = document();
    let failed = |streak| {
        let policy = Policy { restart: Restart::Always, remove_when_ended: false, streak };
        next(State::Running, Event::Ended(Outcome::VmmFailed), policy).unwrap().1
    };
    let Action::Wait(first) = failed(0) else { panic!() };
    let Action::Wait(longest) = failed(state::MAX_STREAK - 1) else { panic!() };
    assert_eq!((first.as_secs(), failed(state::MAX_STREAK)), (1, Action::Nothing));
    for words in [
        format!("The first wait is {} second", first.as_secs()),
        format!("up to {}. A run of {} seconds", longest.as_secs(), state::LONG_RUN.as_secs()),
        format!("After {} starts in a row", state::MAX_STREAK),
    ] {
        assert!(document.replace('\n', " ").contains(&words), "{words}");
    }
}

#[test]
fn the_outcomes_are_those_of_the_code() {
    let mut text = "| Code | Outcome | Before it ran |\n|---|---|---|\n".to_owned();
    let codes = [("0", 0), ("3", 3), ("4, 5", 4), ("148", 148), ("any other", 1)];
    for (shown, code) in codes {
        let [ran, before] = [false, true].map(|is_starting| outcome_of(code, is_starting).as_str());
        writeln!(text, "| {shown} | `{ran}` | `{before}` |").unwrap();
    }
    assert_eq!(outcome_of(4, false), outcome_of(5, false));
    assert_made("outcomes", &text);
}

#[test]
fn the_metrics_are_those_of_the_code() {
    let place = tempfile::tempdir().unwrap();
    let config = Config {
        state_dir: place.path().join("state"),
        run_dir: place.path().join("run"),
        ..Config::default()
    };
    let fleet = Fleet::new(config).unwrap();
    let told = metrics::text(&fleet, 0);
    let mut text = "| Metric | Kind | |\n|---|---|---|\n".to_owned();
    let mut lines = told.lines();
    while let Some(line) = lines.next() {
        let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) else {
            continue;
        };
        let kind = lines.next().unwrap().rsplit_once(' ').unwrap().1;
        let label = if name.starts_with("berth_guest_") { "{guest=\"NAME\"}" } else { "" };
        writeln!(text, "| `{name}{label}` | {kind} | {help} |").unwrap();
    }
    assert_made("metrics", &text.replace("`berth_guests`", "`berth_guests{state=\"STATE\"}`"));
}

#[test]
fn the_limits_are_those_in_force() {
    let rows = [
        ("guests, running or not", format!("`max_guests`, at most {}", config::MAX_GUESTS)),
        ("clients at the same time", serve::MAX_CLIENTS.to_string()),
        ("of these, of one user who is not root", serve::MAX_CLIENTS_OF_USER.to_string()),
        ("of these, kept for root", serve::ROOTS_PLACES.to_string()),
        ("listeners of one console or log", feed::MAX_LISTENERS.to_string()),
        ("what a listener may leave untaken", format!("{} KiB", feed::MAX_UNTAKEN >> 10)),
        ("one file of a log", format!("{} MiB", feed::MAX_LOG >> 20)),
        ("events that are kept", events::KEPT.to_string()),
    ];
    let rows: String = rows.iter().map(|(what, limit)| format!("| {what} | {limit} |\n")).collect();
    assert_made("limits", &format!("| | at most |\n|---|---|\n{rows}"));
    let described = std::fs::read_to_string(path("resources/api/fleet.yaml")).unwrap();
    for (name, limit) in [
        ("clients", serve::MAX_CLIENTS),
        ("clients_of_one_user_who_is_not_root", serve::MAX_CLIENTS_OF_USER),
        ("listeners_of_one_log_or_console", feed::MAX_LISTENERS),
    ] {
        assert!(described.contains(&format!("\n  {name}: {limit}\n")), "{name} in resources/api/fleet.yaml");
    }
}
