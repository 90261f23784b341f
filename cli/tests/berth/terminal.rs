//! A person's terminal with a berth on it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};

const LIMIT: Duration = Duration::from_secs(30);

pub struct Terminal {
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    shown: String,
    end: OwnedFd,
    child: Child,
    modes: String,
}

impl Terminal {
    /// Starts it as the only job of a terminal of 40 by 100.
    pub fn run(mut command: Command) -> Terminal {
        let person = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&person).unwrap();
        unlockpt(&person).unwrap();
        let name = ptsname(&person, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let end = rustix::fs::open(name, flags, rustix::fs::Mode::empty()).unwrap();
        resize(&person, 40, 100);
        let clone = || end.try_clone().unwrap();
        command.stdin(clone()).stdout(clone()).stderr(clone()).env("TERM", "our-term");
        // Without a session of its own the terminal is nobody's, and nobody's job is another's.
        command.process_group(0);
        let modes = modes(&end);
        let child = command.spawn().unwrap();
        drop(command);
        let mut reader = File::from(person.try_clone().unwrap());
        let (show, screen) = channel();
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut chunk) {
                if show.send(chunk[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Terminal { keyboard: person.into(), screen, shown: String::new(), end, child, modes }
    }

    pub fn types(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    /// Waits until this is shown, after what was waited for before. Returns what was shown up to its end.
    #[track_caller]
    pub fn shows(&mut self, text: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        while !self.shown.contains(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            let bytes =
                self.screen.recv_timeout(left).unwrap_or_else(|_| panic!("no {text:?} in {:?}", self.shown));
            self.shown.push_str(&String::from_utf8_lossy(&bytes));
        }
        let at = self.shown.find(text).unwrap() + text.len();
        self.shown.drain(..at).collect()
    }

    pub fn resize(&self, rows: u16, columns: u16) {
        resize(&self.keyboard, rows, columns);
        // Of a terminal without a session nobody is told.
        self.signal(rustix::process::Signal::WINCH);
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }

    pub fn is_as_before(&self) -> bool {
        modes(&self.end) == self.modes
    }

    /// Its exit code.
    #[track_caller]
    pub fn ends(&mut self) -> i32 {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or_else(|| panic!("{status}"));
            }
            assert!(Instant::now() < deadline, "it does not end; {:?}", self.shown);
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn resize(terminal: impl std::os::fd::AsFd, rows: u16, columns: u16) {
    tcsetwinsize(terminal, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
}

fn modes(terminal: &OwnedFd) -> String {
    let settings = tcgetattr(terminal).unwrap();
    format!("{:?} {:?} {:?}", settings.input_modes, settings.output_modes, settings.local_modes)
}
