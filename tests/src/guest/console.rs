//! A guest's serial console: everything it says is kept, what is awaited is looked for, commands are typed into its shell.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// What is kept of a console, in bytes; of a guest that says more, the end.
const MAX_KEPT: usize = 16 << 20;

/// The longest command for [`Console::shell`], in bytes: the guest's terminal takes lines of 4095.
pub const MAX_COMMAND: usize = 3800;

/// What the guest's shell does from the first [`Console::shell`] on.
const LOOP: &str = "while IFS= read -r line; do eval \"$line\"; code=$?; done";

/// What a command in the guest did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Standard output and error, with plain line ends.
    pub text: String,
    pub code: i32,
}

/// The guest's end of the VMM's standard input and output.
pub struct Console {
    said: Arc<Said>,
    input: File,
    /// Up to here everything was looked at: a position in all that the guest ever said.
    seen: usize,
    commands: u32,
}

#[derive(Default)]
struct Said {
    record: Mutex<Record>,
    more: Condvar,
}

#[derive(Default)]
struct Record {
    bytes: Vec<u8>,
    /// How much was thrown away before `bytes`.
    forgotten: usize,
    closed: bool,
}

impl Console {
    /// Takes over both ends; a thread reads for as long as there is something to read.
    pub fn new(output: impl Into<OwnedFd>, input: impl Into<OwnedFd>) -> Console {
        let said = Arc::<Said>::default();
        let recording = Arc::clone(&said);
        let output = File::from(output.into());
        thread::spawn(move || recording.record(output));
        Console { said, input: input.into().into(), seen: 0, commands: 0 }
    }

    /// Types these bytes.
    pub fn send(&mut self, bytes: &[u8]) {
        // A VMM that has ended takes no input; the next wait says so.
        let _ = self.input.write_all(bytes).and_then(|()| self.input.flush());
    }

    /// Another way in, for a thread of its own.
    pub fn input(&self) -> File {
        self.input.try_clone().expect("a descriptor for the console's input")
    }

    /// Waits for these words and gives what was said since the last wait up to them.
    #[track_caller]
    pub fn wait_for(&mut self, words: &str, limit: Duration) -> String {
        let deadline = Instant::now() + limit;
        let mut searched = self.seen;
        let mut record = self.said.lock();
        loop {
            if let Some(at) = find(record.since(searched), words.as_bytes()) {
                let end = searched.max(record.forgotten) + at + words.len();
                let unseen = record.since(self.seen);
                let beyond = record.end() - end;
                self.seen = end;
                return plain(&unseen[..unseen.len() - beyond]);
            }
            // The words may have begun to arrive.
            searched = self.seen.max((record.end() + 1).saturating_sub(words.len()));
            assert!(!record.closed, "the VMM ended before the guest said {words:?}");
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the guest did not say {words:?} within {limit:?}");
            record = self.said.wait(record, left);
        }
    }

    /// Waits until the VMM has closed the console and gives everything that was kept.
    #[track_caller]
    pub fn wait_for_end(&mut self, limit: Duration) -> String {
        let deadline = Instant::now() + limit;
        let mut record = self.said.lock();
        while !record.closed {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the VMM did not end within {limit:?}");
            record = self.said.wait(record, left);
        }
        plain(&record.bytes)
    }

    /// Everything that was kept so far.
    pub fn text(&self) -> String {
        plain(&self.said.lock().bytes)
    }

    /// Runs a command in the shell whose prompt was just waited for.
    ///
    /// An interactive shell echoes, wraps and redraws its line. So the first call puts it into a loop that reads plain
    /// lines and evaluates them; from then on the console has nothing but output between two markers. The quotes in the
    /// first line tell what it says from the echo of it.
    #[track_caller]
    pub fn shell(&mut self, command: &str, limit: Duration) -> Output {
        assert!(command.len() <= MAX_COMMAND && !command.contains('\n'), "not one short line: {command:?}");
        if self.commands == 0 {
            self.send(format!("stty -echo; echo BERTH-''LOOP; {LOOP}\n").as_bytes());
            // What is typed while the terminal changes its mode may be lost.
            self.wait_for("BERTH-LOOP", limit);
        }
        self.commands += 1;
        let n = self.commands;
        let (begin, end) = (format!("BERTH-BEGIN-{n}"), format!("BERTH-END-{n} "));
        self.send(format!("echo {begin}; {command}\necho {end}$code\n").as_bytes());
        self.wait_for(&begin, limit);
        let text = self.wait_for(&end, limit);
        let code = self.wait_for("\n", limit);
        let text = text.strip_suffix(&end).unwrap_or_default();
        Output {
            text: text.strip_prefix('\n').unwrap_or(text).to_owned(),
            code: code
                .trim()
                .parse()
                .unwrap_or_else(|_| panic!("the guest's shell gave no exit code: {code:?}")),
        }
    }
}

impl Said {
    fn record(&self, mut output: File) {
        let mut chunk = [0; 4096];
        while let Ok(length @ 1..) = output.read(&mut chunk) {
            let mut record = self.lock();
            record.bytes.extend(&chunk[..length]);
            if record.bytes.len() > MAX_KEPT {
                // Half of it, so that this is not done for every chunk.
                record.bytes.drain(..MAX_KEPT / 2);
                record.forgotten += MAX_KEPT / 2;
            }
            self.more.notify_all();
        }
        self.lock().closed = true;
        self.more.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, record: MutexGuard<'a, Record>, limit: Duration) -> MutexGuard<'a, Record> {
        self.more.wait_timeout(record, limit).unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Record {
    fn since(&self, position: usize) -> &[u8] {
        &self.bytes[position.saturating_sub(self.forgotten)..]
    }

    /// The position after all that was said.
    fn end(&self) -> usize {
        self.forgotten + self.bytes.len()
    }
}

fn find(text: &[u8], words: &[u8]) -> Option<usize> {
    text.windows(words.len()).position(|window| window == words)
}

/// Text with plain line ends: a terminal puts a carriage return before each.
fn plain(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\r', "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    const LIMIT: Duration = Duration::from_secs(30);

    /// A shell on pipes stands for the guest's.
    fn shell() -> (Child, Console) {
        let mut child = Command::new("sh")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let console = Console::new(child.stdout.take().unwrap(), child.stdin.take().unwrap());
        (child, console)
    }

    #[test]
    fn a_command_gives_its_output_and_its_exit_code() {
        let (mut child, mut console) = shell();
        assert_eq!(console.shell("echo a; echo 'b c'", LIMIT), Output { text: "a\nb c\n".into(), code: 0 });
        assert_eq!(console.shell("printf x; (exit 7)", LIMIT), Output { text: "x".into(), code: 7 });
        assert_eq!(console.shell("true", LIMIT), Output { text: String::new(), code: 0 });
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_wait_gives_what_came_since_the_last_one() {
        let (mut child, mut console) = shell();
        console.send(b"printf 'one\\r\\ntwo three\\n'; exit\n");
        assert_eq!(console.wait_for("two", LIMIT), "one\ntwo");
        assert_eq!(console.wait_for("three", LIMIT), " three");
        assert_eq!(console.wait_for_end(LIMIT), "one\ntwo three\n");
        child.wait().unwrap();
    }

    #[test]
    #[should_panic(expected = "the VMM ended before the guest said \"login\"")]
    fn words_that_can_no_longer_come_are_not_waited_for() {
        let (mut child, mut console) = shell();
        console.send(b"exit\n");
        child.wait().unwrap();
        console.wait_for("login", LIMIT);
    }

    #[test]
    #[should_panic(expected = "did not say \"login\" within 50ms")]
    fn a_wait_ends_at_its_limit() {
        let (_child, mut console) = shell();
        console.wait_for("login", Duration::from_millis(50));
    }
}
