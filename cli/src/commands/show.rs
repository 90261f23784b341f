//! Commands that show guests and change nothing.

use std::collections::VecDeque;
use std::io::Read;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use api_socket::fleet::routes::Log;
use api_socket::fleet::{Client, Event, Guest, State};

use crate::args::{Events, Inspect, Logs, Ps, Version};
use crate::daemon::{About, broken};
use crate::error::{Error, Result};
use crate::exit::Exit;
use crate::output::table::Table;
use crate::output::{self, plain, words};

/// What is read of a log at a time.
const CHUNK: usize = 64 << 10;
/// The most of a log that is kept here; berthd keeps less.
const MAX_LOG: u64 = 64 << 20;

/// # Errors
/// berthd refuses or is not there.
pub fn ps(daemon: &Client, args: &Ps) -> Result<Exit> {
    let mut guests = daemon.guests().about("guests")?;
    guests.retain(|guest| args.all || guest.state != State::Stopped);
    let shown = match args {
        Ps { json: true, .. } => return output::print_json(&guests).map(|()| Exit::Ok),
        Ps { quiet: true, .. } => guests.iter().map(|guest| format!("{}\n", guest.id)).collect(),
        _ => table(&guests, now()),
    };
    output::print(&shown).map(|()| Exit::Ok)
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

fn table(guests: &[Guest], now: f64) -> String {
    let mut table = Table::new(&["NAME", "ID", "IMAGE", "STATE", "CPUS", "MEMORY", "ADDRESS"]);
    for guest in guests {
        table.add([
            guest.name.clone(),
            guest.id.clone(),
            guest.image.clone(),
            state(guest, now),
            guest.cpus.to_string(),
            words::size(u64::from(guest.memory_mib) << 20),
            guest.address.map_or_else(|| "-".into(), |address| address.to_string()),
        ]);
    }
    table.render()
}

/// A state, with since when and why.
fn state(guest: &Guest, now: f64) -> String {
    let word = guest.state.as_str();
    match (guest.state, guest.started_at, &guest.last_end) {
        (State::Running | State::Paused | State::Stopping, Some(at), _) => {
            format!("{word}, up {}", words::duration(between(at, now)))
        }
        (State::Stopped, _, Some(end)) => {
            format!("{word}, {} {} ago", end.outcome.as_str(), words::duration(between(end.at, now)))
        }
        (State::Waiting, _, Some(end)) => {
            let left = words::duration(between(now, guest.restart_at.unwrap_or(now)));
            format!("{word}, {}, again in {left}", end.outcome.as_str())
        }
        _ => word.to_string(),
    }
}

/// Nothing where clocks disagree about what was first.
fn between(from: f64, to: f64) -> Duration {
    Duration::try_from_secs_f64(to - from).unwrap_or_default()
}

/// # Errors
/// As for [`ps`].
pub fn inspect(daemon: &Client, args: &Inspect) -> Result<Exit> {
    for guest in &args.guests {
        output::print_json(&daemon.guest(guest.as_str()).about(guest.as_str())?)?;
    }
    Ok(Exit::Ok)
}

/// # Errors
/// As for [`ps`], or the log's stream breaks off.
pub fn logs(daemon: &Client, args: &Logs) -> Result<Exit> {
    let guest = args.guest.as_str();
    let of = if args.vmm { Log::Vmm } else { Log::Console };
    let broken = |source| broken(daemon, source);
    let mut stream = daemon.logs(guest, of, args.follow).about(guest)?;
    // Whoever reads this may take the time that a person takes, for which berthd does not wait: what is kept is ours first.
    let mut log = Vec::new();
    match args.follow {
        true => log = stream.first(MAX_LOG).map_err(broken)?,
        false => (&mut stream).take(MAX_LOG).read_to_end(&mut log).map(drop).map_err(broken)?,
    }
    output::print_bytes(args.tail.map_or(log.as_slice(), |lines| tail(&log, lines)))?;
    drop(log);
    let mut chunk = vec![0; CHUNK];
    loop {
        match stream.read(&mut chunk).map_err(broken)? {
            0 => return Ok(Exit::Ok),
            count => output::print_bytes(chunk.get(..count).unwrap_or_default())?,
        }
    }
}

/// The last lines; one without its end counts as one.
fn tail(log: &[u8], lines: usize) -> &[u8] {
    let mut starts = VecDeque::from([0]);
    let ends = log.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
    for start in ends.filter(|start| *start < log.len()) {
        starts.push_back(start);
        if starts.len() > lines {
            starts.pop_front();
        }
    }
    match (lines, starts.front()) {
        (1.., Some(start)) => log.get(*start..).unwrap_or_default(),
        _ => &[],
    }
}

/// # Errors
/// As for [`ps`], or the stream breaks off.
pub fn events(daemon: &Client, args: &Events) -> Result<Exit> {
    for event in daemon.events().about("events")? {
        let event = event.about("events")?;
        let line = match args.json {
            true => serde_json::to_string(&event).map_err(|error| Error::new("an event", error))?,
            false => told(&event),
        };
        output::print(&(line + "\n"))?;
    }
    Ok(Exit::Ok)
}

fn told(event: &Event) -> String {
    let mut line = format!("{}  {}  {}  {}", words::instant(event.at), event.id, event.name, event.what);
    if let Some(end) = &event.end {
        line.push_str(&format!(": {}: {}", end.outcome.as_str(), end.reason));
    }
    plain(&line)
}

/// Ours, and that of the daemon if it is there.
///
/// # Errors
/// It cannot be printed.
pub fn version(daemon: &Client, args: &Version) -> Result<Exit> {
    const PATIENCE: Duration = Duration::from_secs(2);
    const OURS: &str = env!("CARGO_PKG_VERSION");
    let theirs = daemon.clone().with_timeout(PATIENCE).version().ok().map(|reply| reply.version);
    match args.json {
        true => output::print_json(&serde_json::json!({ "berth": OURS, "berthd": theirs }))?,
        false => {
            let theirs = theirs.map_or_else(|| "not reachable".into(), |version| plain(&version));
            output::print(&format!("berth {OURS}\nberthd {theirs}\n"))?;
        }
    }
    Ok(Exit::Ok)
}

/// Commands whose place is kept.
///
/// # Errors
/// Always.
pub fn later(name: &str) -> Result<Exit> {
    Err(Error::new(name, "comes with a later version of Berth; this one cannot do it"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_socket::fleet::{End, Limits, Outcome, Restart};

    fn guest() -> Guest {
        Guest {
            id: "0123456789ab".into(),
            name: "web".into(),
            image: "debian".into(),
            owner: 1000,
            state: State::Running,
            cpus: 2,
            memory_mib: 1536,
            max_memory_mib: None,
            disks: Vec::new(),
            command_line: None,
            network: true,
            restart: Restart::No,
            limits: Limits::default(),
            remove_when_ended: false,
            created_at: 900.0,
            started_at: Some(1000.0),
            restarts: 0,
            restart_at: None,
            last_end: None,
            pid: Some(7),
            uid: 70_000,
            address: Some([10, 87, 0, 5].into()),
            mac: None,
            api_socket: None,
        }
    }

    #[test]
    fn a_guest_is_a_line_of_the_table() {
        assert_eq!(
            table(&[guest()], 1200.0),
            "NAME   ID             IMAGE    STATE                   CPUS   MEMORY    ADDRESS\n\
             web    0123456789ab   debian   running, up 3 minutes   2      1.5 GiB   10.87.0.5\n"
        );
    }

    #[test]
    fn a_state_says_since_when_and_why() {
        let end = |outcome| Some(End { at: 1100.0, outcome, reason: String::new() });
        let states = [
            (Guest { state: State::Paused, ..guest() }, "paused, up 3 minutes"),
            (Guest { state: State::Starting, started_at: None, ..guest() }, "starting"),
            (Guest { state: State::Stopped, started_at: None, ..guest() }, "stopped"),
            (
                Guest { state: State::Stopped, last_end: end(Outcome::PoweredOff), ..guest() },
                "stopped, powered-off 1 minute ago",
            ),
            (
                Guest {
                    state: State::Waiting,
                    last_end: end(Outcome::GuestCrashed),
                    restart_at: Some(1210.0),
                    ..guest()
                },
                "waiting, guest-crashed, again in 10 seconds",
            ),
            // A clock that went back.
            (Guest { started_at: Some(9999.0), ..guest() }, "running, up 0 seconds"),
        ];
        for (guest, words) in states {
            assert_eq!(state(&guest, 1200.0), words);
        }
    }

    #[test]
    fn the_last_lines_are_the_last_lines() {
        let cases: [(&str, usize, &str); 8] = [
            ("a\nb\nc\n", 2, "b\nc\n"),
            ("a\nb\nc", 2, "b\nc"),
            ("a\nb\nc\n", 3, "a\nb\nc\n"),
            ("a\nb\nc\n", 9, "a\nb\nc\n"),
            ("a\nb\n", 0, ""),
            ("", 3, ""),
            ("\n\n", 1, "\n"),
            ("a", 1, "a"),
        ];
        for (log, lines, expected) in cases {
            assert_eq!(tail(log.as_bytes(), lines), expected.as_bytes(), "{log:?} {lines}");
        }
    }

    #[test]
    fn an_event_is_a_line_whatever_a_guest_said() {
        let end = End { at: 0.0, outcome: Outcome::GuestCrashed, reason: "panic:\n\x1b[2J".into() };
        let event = Event {
            number: 1,
            at: 0.0,
            what: "ended".into(),
            id: "0123456789ab".into(),
            name: "web".into(),
            end: Some(end),
        };
        assert_eq!(
            told(&event),
            "1970-01-01 00:00:00Z  0123456789ab  web  ended: guest-crashed: panic:\\n\\u{1b}[2J"
        );
    }

    #[test]
    fn commands_that_come_later_say_so() {
        let error = later("snapshot").unwrap_err();
        assert_eq!(error.exit, Exit::Failed);
        assert!(error.to_string().starts_with("snapshot: comes with a later version"));
    }
}
