//! Whether guests can run on this host, what is missing, what that costs and what mends it.
//!
//! It changes nothing, and asks berthd only whether it is there: it is for the time before berthd runs, too.

mod calls;
pub mod facts;
pub mod ruleset;
pub mod verdict;

use std::path::Path;

use crate::args::Doctor;
use crate::error::Result;
use crate::exit::Exit;
use crate::output::{self, Paint, Style, plain};
use facts::Facts;
use verdict::{Check, Report, Verdict};

/// # Errors
/// The report cannot be written.
pub fn run(args: &Doctor, socket: &Path) -> Result<Exit> {
    let report = verdict::judge(&Facts::find(socket));
    match args.json {
        true => output::print_json(&report)?,
        false => output::print(&render(&report, Paint::for_stdout()))?,
    }
    Ok(if report.guests_can_run { Exit::Ok } else { Exit::Failed })
}

/// The report for a person: a line for each check, and below one that is not ok what it costs and what mends it.
fn render(report: &Report, paint: Paint) -> String {
    let width = report.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for Check { name, verdict, needed, found, costs, mend } in &report.checks {
        let (word, style) = match (verdict, needed) {
            (Verdict::Ok, _) => ("ok", Style::Good),
            (Verdict::Missing, true) => ("missing", Style::Bad),
            (Verdict::Missing, false) => ("missing", Style::Doubtful),
            (Verdict::Broken, true) => ("broken", Style::Bad),
            (Verdict::Broken, false) => ("broken", Style::Doubtful),
            (Verdict::Untried, _) => ("untried", Style::Doubtful),
        };
        let word = paint.paint(style, &format!("{word:<7}"));
        text.push_str(&format!("{word}  {name:<width$}  {}\n", plain(found)));
        for (label, what) in [("costs:", costs), ("mend: ", mend)] {
            if let Some(what) = what {
                text.push_str(&format!("{:9}{:width$}  {label} {}\n", "", "", plain(what)));
            }
        }
    }
    let names = |of: fn(&Check) -> bool| {
        let checks = report.checks.iter().filter(|check| of(check));
        checks.map(|check| check.name).collect::<Vec<_>>().join(", ")
    };
    let untried = names(|check| check.needed && check.verdict == Verdict::Untried);
    let (style, last) = match report.guests_can_run {
        true if untried.is_empty() => (Style::Good, "Guests can run on this host.".to_string()),
        true => {
            (Style::Doubtful, format!("Guests can run on this host as far as was tried; untried: {untried}."))
        }
        false => {
            (Style::Bad, format!("Guests cannot run on this host as it is: {}.", names(Check::is_in_the_way)))
        }
    };
    format!("{text}\n{}\n", paint.paint(style, &last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &'static str, verdict: Verdict, needed: bool) -> Check {
        let is_ok = verdict == Verdict::Ok;
        let only_if_not = |text: &str| (!is_ok).then(|| text.to_string());
        Check {
            name,
            verdict,
            needed,
            found: "seen".into(),
            costs: only_if_not("much"),
            mend: only_if_not("sudo this"),
        }
    }

    #[test]
    fn a_report_names_what_failed_and_what_to_do() {
        let checks = vec![check("kvm", Verdict::Broken, true), check("landlock", Verdict::Ok, false)];
        let text = render(&Report { guests_can_run: false, checks }, Paint(false));
        let expected = "\
broken   kvm       seen
                   costs: much
                   mend:  sudo this
ok       landlock  seen

Guests cannot run on this host as it is: kvm.
";
        assert_eq!(text, expected);
    }

    #[test]
    fn what_is_not_needed_does_not_keep_guests_from_running() {
        let checks = vec![check("kvm", Verdict::Ok, true), check("landlock", Verdict::Missing, false)];
        let text = render(&Report { guests_can_run: true, checks }, Paint(false));
        assert!(text.ends_with("\n\nGuests can run on this host.\n"), "{text}");
    }

    #[test]
    fn what_was_not_tried_is_not_promised() {
        let checks = vec![check("kvm", Verdict::Untried, true), check("forwarding", Verdict::Untried, false)];
        let text = render(&Report { guests_can_run: true, checks }, Paint(false));
        assert!(text.starts_with("untried  kvm         seen\n                     costs: much\n"), "{text}");
        assert!(
            text.ends_with("\n\nGuests can run on this host as far as was tried; untried: kvm.\n"),
            "{text}"
        );
    }

    #[test]
    fn what_others_named_does_not_reach_the_terminal_as_commands() {
        let mut named = check("kvm", Verdict::Ok, true);
        named.found = "\x1b[2J".into();
        let text = render(&Report { guests_can_run: true, checks: vec![named] }, Paint(false));
        assert!(!text.contains('\x1b'), "{text:?}");
    }

    /// Scripts read this.
    #[test]
    fn the_json_of_a_report_is_this() {
        let checks = vec![check("kvm", Verdict::Ok, true), check("tun", Verdict::Missing, false)];
        let json = serde_json::to_value(Report { guests_can_run: true, checks }).unwrap();
        let expected = serde_json::json!({
            "guests_can_run": true,
            "checks": [
                { "name": "kvm", "verdict": "ok", "needed": true, "found": "seen" },
                { "name": "tun", "verdict": "missing", "needed": false, "found": "seen", "costs": "much", "mend": "sudo this" },
            ],
        });
        assert_eq!(json, expected);
    }
}
