//! The log: lines in Firecracker's form, to standard output or to a file or named pipe.
//!
//! Logging never waits for a reader and never fails its caller: what cannot be written is counted. What a guest can
//! cause to be logged is limited, each place in the source by itself, so that a guest fills nobody's disk and a flood
//! from one place hides no other.
//!
//! Not for signal handlers: it takes a lock.

use std::fmt::Write as _;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use api_socket::{Fault, LogLevel};
use log::{LevelFilter, Log, Metadata, Record};

use crate::args::Args;
use crate::faults;
use crate::handed::Handed;
use crate::sink::Sink;

/// The longest line, in bytes. What is cut off is marked. A pipe that says it takes bytes takes as many.
pub const MAX_LINE: usize = libc::PIPE_BUF;
/// How many lines a place that a guest can reach may log in a [`PERIOD`].
pub const MAX_IN_PERIOD: u64 = 10;
/// See [`MAX_IN_PERIOD`].
pub const PERIOD: Duration = Duration::from_secs(5);
/// How many such places are told apart; the rest share one limit.
pub const MAX_PLACES: usize = 64;

/// The crates whose lines only the operator and its clients can cause, but for those of [`GUEST_REACHES`]. What is in
/// neither list is limited, so that a library that logs what a driver does wrong is.
const OPERATOR_REACHES: [&str; 2] = ["api_socket", "vmm"];
/// The modules of those crates whose code a guest can run at will.
const GUEST_REACHES: [&str; 5] =
    ["vmm::vcpu", "vmm::io_thread", "vmm::boot_timer", "vmm::host", "vmm::x86_64::interrupts"];

const CUT: &str = "…[cut]";

/// The process's logger; see [`start`].
pub static LOGGER: Logger = Logger {
    state: Mutex::new(State {
        id: String::new(),
        sink: None,
        show_level: false,
        show_origin: false,
        module: None,
        limiter: Limiter { places: Vec::new() },
    }),
    counters: Counters { missed: AtomicU64::new(0), limited: AtomicU64::new(0) },
};

/// Sends the `log` crate's lines to [`LOGGER`]: from level Info up, to standard output, but for what the command line
/// says. Once, when it is known.
///
/// # Errors
/// Those of [`Logger::configure`]; lines go to standard output then.
pub fn start(args: &Args, handed: &Handed) -> Result<(), Fault> {
    LOGGER.state().id = args.id.clone();
    // It fails only when there is a logger already, which is this one.
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
    LOGGER.configure(&args.log, handed)?;
    // Opened now: when there is something to say, no filter lets a thread open it.
    let mut state = LOGGER.state();
    if state.sink.is_none() {
        state.sink = Sink::stdout().ok();
    }
    Ok(())
}

/// See [`LOGGER`].
pub struct Logger {
    state: Mutex<State>,
    counters: Counters,
}

/// Lines that were not written.
#[derive(Debug, Default)]
pub struct Counters {
    /// The output would not take them.
    pub missed: AtomicU64,
    /// There were too many.
    pub limited: AtomicU64,
}

impl Logger {
    /// Changes what `config` names and leaves the rest. May be called at any time.
    ///
    /// # Errors
    /// A `log_path` that cannot be opened; nothing is changed then.
    pub fn configure(&self, config: &api_socket::Logger, handed: &Handed) -> Result<(), Fault> {
        let sink = config.log_path.as_deref().map(|path| Sink::named("log_path", path, handed));
        let sink = sink.transpose()?;
        let mut state = self.state();
        if let Some(sink) = sink {
            // Before the file that has been told so far is closed.
            faults::tell_also(Some(sink.as_raw_fd()));
            state.sink = Some(sink);
        }
        state.show_level = config.show_level.unwrap_or(state.show_level);
        state.show_origin = config.show_log_origin.unwrap_or(state.show_origin);
        state.module = config.module.clone().or(state.module.take());
        if let Some(level) = config.level {
            log::set_max_level(filter(level));
        }
        Ok(())
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// All of [`Log::log`] but the level, which belongs to the process and not to the logger.
    fn put(&self, record: &Record) {
        let mut state = self.state();
        if !state.wants(record) {
            return;
        }
        let Some(dropped) = state.limiter.admit(record, Instant::now()) else {
            self.counters.limited.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let line = state.line(record, dropped, SystemTime::now());
        if state.write(&line).is_err() {
            self.counters.missed.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test that panicked while it logged leaves a state that is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record) {
        if self.enabled(record.metadata()) {
            self.put(record);
        }
    }

    fn flush(&self) {}
}

fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Off => LevelFilter::Off,
        LogLevel::Error => LevelFilter::Error,
        LogLevel::Warning => LevelFilter::Warn,
        LogLevel::Info => LevelFilter::Info,
        LogLevel::Debug => LevelFilter::Debug,
        LogLevel::Trace => LevelFilter::Trace,
    }
}

struct State {
    id: String,
    /// `None` until [`start`]: nothing is written.
    sink: Option<Sink>,
    show_level: bool,
    show_origin: bool,
    module: Option<String>,

    limiter: Limiter,
}

impl State {
    fn wants(&self, record: &Record) -> bool {
        let path = record.module_path().unwrap_or(record.target());
        self.module.as_ref().is_none_or(|module| path.starts_with(module.as_str()))
    }

    /// `TIME [ID:THREAD:LEVEL:FILE:LINE] message`, with a line feed.
    fn line(&self, record: &Record, dropped: u64, now: SystemTime) -> String {
        let thread = std::thread::current();
        let mut line = String::with_capacity(256);
        push_time(&mut line, now.duration_since(UNIX_EPOCH).unwrap_or_default());
        // Writing to a String cannot fail.
        let _ = write!(line, " [{}:{}", self.id, thread.name().unwrap_or("main"));
        if self.show_level {
            let _ = write!(line, ":{}", record.level());
        }
        if self.show_origin {
            let _ = write!(line, ":{}:{}", record.file().unwrap_or("unknown"), record.line().unwrap_or(0));
        }
        let _ = write!(line, "] {}", record.args());
        if dropped > 0 {
            let _ = write!(line, " [{dropped} more from here were dropped]");
        }
        one_line(line)
    }

    fn write(&mut self, line: &str) -> std::io::Result<()> {
        self.sink.as_mut().map_or(Ok(()), |sink| sink.write_line(line.as_bytes()))
    }
}

/// Makes a text one line of at most [`MAX_LINE`] bytes. A client's or a guest's line feed must not begin a line that
/// looks like ours.
fn one_line(text: String) -> String {
    let mut line = match text.contains(char::is_control) {
        false => text,
        true => text.chars().fold(String::with_capacity(text.len() + 16), |mut line, char| {
            match char.is_control() {
                true => line.extend(char.escape_default()),
                false => line.push(char),
            }
            line
        }),
    };
    if line.len() >= MAX_LINE {
        line.truncate(line.floor_char_boundary(MAX_LINE - CUT.len() - 1));
        line += CUT;
    }
    line.push('\n');
    line
}

/// UTC, to the nanosecond: `2026-01-31T23:59:59.000000001`.
fn push_time(line: &mut String, since_epoch: Duration) {
    let seconds = since_epoch.as_secs();
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let nanos = since_epoch.subsec_nanos();
    let _ = write!(line, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}");
}

/// Year, month and day of the Gregorian calendar, so many days after 1970-01-01.
fn date(days: u64) -> (u64, u64, u64) {
    const ERA: u64 = 146_097; // days in 400 years
    // Years that begin in March end with the leap day, so that the months before it have the same days every year.
    let days = days + 719_468; // since 0000-03-01
    let day_of_era = days % ERA;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (days / ERA * 400 + year_of_era + u64::from(month <= 2), month, day)
}

/// A limit for each place that a guest can reach, which a line's source file and line number name.
struct Limiter {
    places: Vec<Place>,
}

struct Place {
    file: &'static str,
    line: u32,
    /// When the period began, and what has been written and dropped since.
    since: Instant,
    written: u64,
    dropped: u64,
}

impl Limiter {
    /// `None` drops the record; otherwise how many were dropped from the same place since the last that was not.
    fn admit(&mut self, record: &Record, now: Instant) -> Option<u64> {
        if !guest_reaches(record) {
            return Some(0);
        }
        let place = self.place(record.file_static().unwrap_or(""), record.line().unwrap_or(0), now)?;
        if now.saturating_duration_since(place.since) >= PERIOD {
            (place.since, place.written) = (now, 0);
        }
        if place.written >= MAX_IN_PERIOD {
            place.dropped += 1;
            return None;
        }
        place.written += 1;
        Some(std::mem::take(&mut place.dropped))
    }

    fn place(&mut self, file: &'static str, line: u32, now: Instant) -> Option<&mut Place> {
        let known = self.places.iter().position(|place| place.line == line && place.file == file);
        if known.is_none() && self.places.len() < MAX_PLACES {
            self.places.push(Place { file, line, since: now, written: 0, dropped: 0 });
        }
        let last = self.places.len() - 1;
        self.places.get_mut(known.unwrap_or(last))
    }
}

fn guest_reaches(record: &Record) -> bool {
    let path = record.module_path().unwrap_or(record.target());
    let within = |module: &&str| {
        path.strip_prefix(*module).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    };
    // Who asks for trace lines wants them all.
    record.level() < log::Level::Trace
        && (GUEST_REACHES.iter().any(within) || !OPERATOR_REACHES.iter().any(within))
}

#[cfg(test)]
mod tests {
    use super::*;
    use log::Level;
    use std::path::Path;

    fn logger() -> Logger {
        Logger {
            state: Mutex::new(State {
                id: "vm-1".to_string(),
                sink: None,
                show_level: false,
                show_origin: false,
                module: None,
                limiter: Limiter { places: Vec::new() },
            }),
            counters: Counters::default(),
        }
    }

    fn to(path: &Path) -> api_socket::Logger {
        api_socket::Logger { log_path: Some(path.into()), ..Default::default() }
    }

    /// The text after the time of each line in a file.
    fn lines(path: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| line.split_once(' ').unwrap().1.to_string()).collect()
    }

    fn log_from(logger: &Logger, module: &'static str, line: u32, text: &str) {
        let args = format_args!("{text}");
        let record = Record::builder()
            .level(Level::Warn)
            .module_path_static(Some(module))
            .file_static(Some("src/x.rs"))
            .line(Some(line))
            .args(args)
            .build();
        logger.put(&record);
    }

    #[test]
    fn a_line_has_the_parts_that_were_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let logger = logger();
        logger.configure(&to(&path), &Handed::default()).unwrap();
        let show = |level, origin| api_socket::Logger {
            show_level: Some(level),
            show_log_origin: Some(origin),
            ..Default::default()
        };
        for (level, origin) in [(false, false), (true, false), (false, true), (true, true)] {
            logger.configure(&show(level, origin), &Handed::default()).unwrap();
            log_from(&logger, "vmm::vm", 7, "hello");
        }
        let thread = std::thread::current().name().unwrap().to_string();
        let expected = ["", ":WARN", ":src/x.rs:7", ":WARN:src/x.rs:7"];
        assert_eq!(lines(&path), expected.map(|parts| format!("[vm-1:{thread}{parts}] hello")));
    }

    #[test]
    fn a_log_path_that_cannot_be_opened_is_named_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let logger = logger();
        logger.configure(&to(&path), &Handed::default()).unwrap();
        let mut wrong = to(&dir.path().join("no/log"));
        wrong.show_level = Some(true);
        let fault = logger.configure(&wrong, &Handed::default()).unwrap_err();
        assert!(fault.message.contains("log_path") && fault.message.contains("no/log"), "{fault}");
        log_from(&logger, "vmm", 1, "still here");
        assert!(lines(&path)[0].ends_with("] still here") && !lines(&path)[0].contains("WARN"));
    }

    #[test]
    fn only_the_module_that_was_asked_for_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let logger = logger();
        logger.configure(&to(&path), &Handed::default()).unwrap();
        let module = api_socket::Logger { module: Some("vmm::vm".to_string()), ..Default::default() };
        logger.configure(&module, &Handed::default()).unwrap();
        for module in ["vmm::vm", "vmm::vm::inner", "vmm::config", "api_socket"] {
            log_from(&logger, module, 1, module);
        }
        let written: Vec<_> =
            lines(&path).iter().map(|line| line.split_once("] ").unwrap().1.to_string()).collect();
        assert_eq!(written, ["vmm::vm", "vmm::vm::inner"]);
    }

    #[test]
    fn a_message_cannot_forge_a_line() {
        let line = one_line("a\r\n2026-01-01T00:00:00.000000000 [b] \u{1b}[31mc\u{85}".to_string());
        assert_eq!(line, "a\\r\\n2026-01-01T00:00:00.000000000 [b] \\u{1b}[31mc\\u{85}\n");
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        for length in MAX_LINE - 3..MAX_LINE + 3 {
            let line = one_line("x".repeat(length));
            assert!(line.len() <= MAX_LINE && line.ends_with('\n'));
            assert_eq!(line.contains(CUT), length >= MAX_LINE, "{length}");
        }
        let line = one_line("é".repeat(MAX_LINE));
        assert!(line.len() <= MAX_LINE && line.ends_with("é…[cut]\n"));
    }

    #[test]
    fn a_guest_can_log_so_much_from_a_place_in_a_time() {
        let mut limiter = Limiter { places: Vec::new() };
        let now = Instant::now();
        let record = |line| {
            Record::builder()
                .level(Level::Error)
                .module_path_static(Some("devices::virtio::blk"))
                .file_static(Some("devices/src/virtio/blk.rs"))
                .line(Some(line))
                .build()
        };
        let admitted = (0..100).filter(|_| limiter.admit(&record(1), now).is_some()).count();
        assert_eq!(admitted as u64, MAX_IN_PERIOD);
        assert_eq!(limiter.admit(&record(2), now), Some(0), "another place has a limit of its own");
        assert_eq!(limiter.admit(&record(1), now + PERIOD), Some(90), "the dropped lines are told");
        assert_eq!(limiter.admit(&record(1), now + PERIOD), Some(0));
    }

    #[test]
    fn places_beyond_the_limit_share_one() {
        let mut limiter = Limiter { places: Vec::new() };
        let now = Instant::now();
        let mut admitted = 0;
        for line in 0..10_000 {
            let record = Record::builder()
                .module_path_static(Some("devices"))
                .file_static(Some("f"))
                .line(Some(line))
                .build();
            admitted += u64::from(limiter.admit(&record, now).is_some());
        }
        assert_eq!(limiter.places.len(), MAX_PLACES);
        assert_eq!(admitted, MAX_PLACES as u64 + MAX_IN_PERIOD - 1);
    }

    #[test]
    fn only_what_a_guest_reaches_is_limited_and_no_trace() {
        let record = |module, level| Record::builder().module_path_static(Some(module)).level(level).build();
        for module in ["devices", "devices::serial", "vmm::vcpu", "vmm::io_thread", "virtio_queue::queue"] {
            assert!(guest_reaches(&record(module, Level::Debug)), "{module}");
            assert!(!guest_reaches(&record(module, Level::Trace)), "{module}");
        }
        for module in ["vmm", "vmm::vm", "vmm::vcpus", "api_socket::server"] {
            assert!(!guest_reaches(&record(module, Level::Error)), "{module}");
        }
    }

    #[test]
    fn the_time_is_utc_in_iso_8601() {
        let time = |seconds, nanos| {
            let mut line = String::new();
            push_time(&mut line, Duration::new(seconds, nanos));
            line
        };
        assert_eq!(time(0, 0), "1970-01-01T00:00:00.000000000");
        assert_eq!(time(951_782_399, 999_999_999), "2000-02-28T23:59:59.999999999");
        assert_eq!(time(951_782_400, 1), "2000-02-29T00:00:00.000000001");
        assert_eq!(time(951_868_800, 0), "2000-03-01T00:00:00.000000000");
        assert_eq!(time(1_767_225_599, 0), "2025-12-31T23:59:59.000000000");
        assert_eq!(time(4_107_542_400, 0), "2100-03-01T00:00:00.000000000");
    }

    #[test]
    fn days_follow_each_other_through_eight_hundred_years() {
        let divides = |number: u64, year: u64| year.is_multiple_of(number);
        let leap = |year| divides(4, year) && (!divides(100, year) || divides(400, year));
        let mut expected = (1970, 1, 1);
        for days in 0..292_194 {
            assert_eq!(date(days), expected);
            let (year, month, day) = expected;
            let last = match month {
                2 => 28 + u64::from(leap(year)),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            expected = match (month, day) {
                (12, 31) => (year + 1, 1, 1),
                _ if day == last => (year, month + 1, 1),
                _ => (year, month, day + 1),
            };
        }
    }

    #[test]
    fn a_full_pipe_loses_lines_and_counts_them() {
        let (end, pipe) = std::io::pipe().unwrap();
        let name = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&pipe));
        let logger = logger();
        logger.configure(&to(Path::new(&name)), &Handed::default()).unwrap();
        let text = "x".repeat(1000);
        for _ in 0..200 {
            log_from(&logger, "vmm", 1, &text);
        }
        assert!(logger.counters.missed.load(Ordering::Relaxed) > 0);
        drop(end);
    }

    #[test]
    fn what_is_limited_is_counted_and_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let logger = logger();
        logger.configure(&to(&path), &Handed::default()).unwrap();
        // More than the periods that pass while this runs let through.
        for _ in 0..1000 {
            log_from(&logger, "devices::serial", 1, "flood");
        }
        let written = lines(&path).len() as u64;
        assert!((MAX_IN_PERIOD..1000).contains(&written));
        assert_eq!(written + logger.counters.limited.load(Ordering::Relaxed), 1000);
    }

    #[test]
    fn every_level_has_its_filter() {
        let levels = [
            (LogLevel::Off, LevelFilter::Off),
            (LogLevel::Error, LevelFilter::Error),
            (LogLevel::Warning, LevelFilter::Warn),
            (LogLevel::Info, LevelFilter::Info),
            (LogLevel::Debug, LevelFilter::Debug),
            (LogLevel::Trace, LevelFilter::Trace),
        ];
        for (level, expected) in levels {
            assert_eq!(filter(level), expected);
        }
    }
}
