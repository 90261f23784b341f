//! What guests use: once, or a table that is renewed. Rates are made of two looks at counters.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::time::Duration;

use agent::protocol::Size;
use api_socket::ClientError;
use api_socket::fleet::{Client, Stats as Use};

use crate::args::Stats;
use crate::daemon::About;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::table::Table;
use crate::output::{self, words};
use crate::terminal;

/// Between two looks: of a table that is renewed, and of one that is shown once.
const PERIOD: Duration = Duration::from_secs(1);
const ONCE: Duration = Duration::from_millis(500);

/// ECMA-48: the cursor goes to the first line; what is below it is wiped away; a line is, before its text, as behind one that
/// takes the whole width its last character would be.
const HOME: &str = "\x1b[H";
const WIPE_BELOW: &str = "\x1b[J";
const WIPE_LINE: &str = "\x1b[K";

/// # Errors
/// berthd refuses or is not there.
pub fn run(daemon: &Client, args: &Stats) -> Result<Exit> {
    let mut before = look(daemon, args, true)?;
    if args.json {
        return output::print_json(&before).map(|()| Exit::Ok);
    }
    if args.no_stream || !io::stdout().is_terminal() {
        std::thread::sleep(ONCE);
        let now = look(daemon, args, false)?;
        return output::print(&table(&before, &now)).map(|()| Exit::Ok);
    }
    // Nothing of the terminal's is changed that Ctrl-C would have to give back.
    output::print(&format!("{HOME}{WIPE_BELOW}"))?;
    loop {
        std::thread::sleep(PERIOD);
        let now = look(daemon, args, false)?;
        let shown = fit(&table(&before, &now), terminal::size());
        let lines: String = shown.split_inclusive('\n').map(|line| format!("{WIPE_LINE}{line}")).collect();
        output::print(&format!("{HOME}{lines}{WIPE_BELOW}"))?;
        before = now;
    }
}

/// Of the guests that were named, or of all. One that ends between two looks is no mistake.
fn look(daemon: &Client, args: &Stats, is_first: bool) -> Result<Vec<Use>> {
    if args.guests.is_empty() {
        return daemon.stats().about("stats");
    }
    let mut found = Vec::new();
    for guest in &args.guests {
        match daemon.guest_stats(guest.as_str()) {
            Err(ClientError::Refused(_)) if !is_first => {}
            outcome => found.push(outcome.about(guest.as_str())?),
        }
    }
    Ok(found)
}

fn table(before: &[Use], now: &[Use]) -> String {
    let before: BTreeMap<_, _> = before.iter().map(|stats| (stats.id.as_str(), stats)).collect();
    let mut table = Table::new(&["NAME", "ID", "CPU", "MEMORY", "READ", "WRITTEN", "RECEIVED", "SENT"]);
    for stats in now {
        let share = before.get(stats.id.as_str()).and_then(|earlier| cpu(earlier, stats));
        table.add([
            stats.name.clone(),
            stats.id.clone(),
            share.map_or_else(|| "-".into(), |percent| format!("{percent:.1}%")),
            words::size(stats.memory_bytes),
            words::size(stats.read_bytes),
            words::size(stats.written_bytes),
            words::size(stats.received_bytes),
            words::size(stats.sent_bytes),
        ]);
    }
    table.render()
}

/// As much of a table as a terminal of this size shows without moving: the cursor comes to stand below it.
fn fit(table: &str, size: Size) -> String {
    let rows = usize::from(size.rows).saturating_sub(1);
    let mut lines: Vec<_> = table.lines().map(str::to_string).collect();
    if lines.len() > rows {
        let shown = rows.saturating_sub(1);
        // The heading is nothing that could be missed.
        let left_out = lines.len() - shown.max(1);
        lines.truncate(shown);
        lines.extend((rows > 0).then(|| format!("... and {left_out} more: berth stats --no-stream")));
    }
    let cut = |line: &String| line.chars().take(size.columns.into()).chain(['\n']).collect::<String>();
    lines.iter().map(cut).collect()
}

/// Of one processor, in percent, between two looks; nothing where the guest was started again or no time has passed.
fn cpu(before: &Use, now: &Use) -> Option<f64> {
    let used = now.cpu_microseconds.checked_sub(before.cpu_microseconds)?;
    let seconds = now.at - before.at;
    (seconds > 0.0).then(|| used as f64 / seconds / 10_000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(at: f64, cpu_microseconds: u64) -> Use {
        Use {
            id: "0123456789ab".into(),
            name: "web".into(),
            at,
            cpu_microseconds,
            memory_bytes: 100 << 20,
            read_bytes: 1536,
            ..Use::default()
        }
    }

    #[test]
    fn a_share_of_the_processor_is_made_of_two_looks() {
        assert_eq!(cpu(&used(10.0, 0), &used(12.0, 1_000_000)), Some(50.0));
        assert_eq!(cpu(&used(10.0, 0), &used(11.0, 2_000_000)), Some(200.0));
        assert_eq!(cpu(&used(10.0, 5), &used(11.0, 4)), None);
        assert_eq!(cpu(&used(10.0, 5), &used(10.0, 5)), None);
    }

    #[test]
    fn what_a_terminal_has_no_room_for_is_counted_on_its_last_line() {
        let size = |rows, columns| Size { rows, columns };
        let table = "NAME   CPU\nweb    12.5%\ndb     -\nold    0.0%\n";
        assert_eq!(fit(table, size(5, 80)), table);
        let more = "... and 2 more: berth stats --no-stream\n";
        assert_eq!(fit(table, size(4, 80)), format!("NAME   CPU\nweb    12.5%\n{more}"));
        assert_eq!(fit(table, size(2, 80)), "... and 3 more: berth stats --no-stream\n");
        assert_eq!(fit(table, size(1, 80)), "");
        assert_eq!(fit(table, size(4, 8)), "NAME   C\nweb    1\n... and \n");
        assert_eq!(fit("NAME\nüüüü\n", size(9, 3)), "NAM\nüüü\n");
        assert_eq!(fit("NAME\n", size(2, 4)), "NAME\n");
    }

    #[test]
    fn a_guest_is_a_line_and_one_that_is_new_has_no_share_yet() {
        let now = [used(11.0, 125_000)];
        assert_eq!(
            table(&[used(10.0, 0)], &now),
            "NAME   ID             CPU     MEMORY    READ      WRITTEN   RECEIVED   SENT\n\
             web    0123456789ab   12.5%   100 MiB   1.5 KiB   0 B       0 B        0 B\n"
        );
        assert!(table(&[], &now).contains("0123456789ab   -     100 MiB"));
    }
}
