//! How far long work is, on standard error; nothing where that is no terminal.

use std::io::{self, IsTerminal, Read};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const WITH_TOTAL: &str = "{msg} {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}";
const WITHOUT_TOTAL: &str = "{msg} {spinner} {bytes} {binary_bytes_per_sec}";
const WAITING: &str = "{msg} {spinner} {elapsed}";
/// How often what turns is turned.
const TICK: Duration = Duration::from_millis(100);

/// Progress over bytes, of which there are `total` if that is known. It is wiped away when it is dropped.
pub struct Progress(ProgressBar);

impl Progress {
    pub fn bytes(what: &str, total: Option<u64>) -> Progress {
        Progress::on(io::stderr().is_terminal(), what, total)
    }

    fn on(is_terminal: bool, what: &str, total: Option<u64>) -> Progress {
        let target = match is_terminal {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let template = if total.is_some() { WITH_TOTAL } else { WITHOUT_TOTAL };
        Progress::made(ProgressBar::with_draw_target(total, target), template, what)
    }

    /// A wait of which nobody knows how long it is.
    pub fn waiting(what: &str) -> Progress {
        let target = match io::stderr().is_terminal() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let progress = Progress::made(ProgressBar::with_draw_target(None, target), WAITING, what);
        progress.0.enable_steady_tick(TICK);
        progress
    }

    fn made(bar: ProgressBar, template: &str, what: &str) -> Progress {
        // A template that is not understood, which a test rules out, leaves the library's own.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what.to_string());
        Progress(bar)
    }

    pub fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    /// Counts what is read through it.
    pub fn reader<R: Read>(&self, from: R) -> impl Read + use<R> {
        self.0.wrap_read(from)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_understood() {
        for template in [WITH_TOTAL, WITHOUT_TOTAL, WAITING] {
            ProgressStyle::with_template(template).unwrap();
        }
    }

    #[test]
    fn nothing_is_drawn_where_there_is_no_terminal_and_bytes_are_counted() {
        let progress = Progress::on(false, "copying", Some(10));
        assert!(progress.0.is_hidden());
        let mut read = Vec::new();
        progress.reader(&b"four"[..]).read_to_end(&mut read).unwrap();
        progress.advance(2);
        assert_eq!(progress.0.position(), 6);
    }
}
