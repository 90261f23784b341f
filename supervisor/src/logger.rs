//! Lines on standard error. Systemd's journal, which has the time and the name already, gets their priority.

use log::{LevelFilter, Log, Metadata, Record};

struct Stderr {
    /// Where standard error is the journal (systemd.exec(5), `JOURNAL_STREAM`).
    is_journal: bool,
}

impl Log for Stderr {
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }

    fn log(&self, record: &Record) {
        // The priority as sd-daemon(3) has it.
        let priority = match record.level() {
            log::Level::Error => 3,
            log::Level::Warn => 4,
            log::Level::Info => 6,
            log::Level::Debug | log::Level::Trace => 7,
        };
        // A name of a guest or a text of a VMM's cannot begin a line of its own.
        let text = record.args().to_string().replace(char::is_control, " ");
        use std::io::Write;
        let _ = match self.is_journal {
            true => writeln!(std::io::stderr(), "<{priority}>{text}"),
            false => writeln!(std::io::stderr(), "berthd: {text}"),
        };
    }

    fn flush(&self) {}
}

/// Once, at the start.
pub fn start() {
    let is_journal = std::env::var_os("JOURNAL_STREAM").is_some();
    if log::set_boxed_logger(Box::new(Stderr { is_journal })).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}
