//! A daemon as a test sees it: with directories of its own, killed and started at will.

#![allow(clippy::expect_used, clippy::panic)]

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use agent::client;
use agent::protocol::Exec;
use api_socket::fleet::{self, Client, NewGuest, NewImage, Part, State};
use tempfile::TempDir;

use crate::guest::agent::{Outcome, hear};
use crate::guest::{asset, limits, program};
use crate::host::provide;

/// Of the guests' users; nobody else in the host is one.
pub const UID_FIRST: u32 = 700_000;
/// The image that [`Daemon::import`] makes.
pub const IMAGE: &str = "small";
/// The least memory that the small guest boots in, in MiB.
pub const MEMORY_MIB: u32 = 96;

/// A daemon of a test's own: its bridge, its control group, its range of users.
#[derive(Debug)]
pub struct Daemon {
    child: Option<Child>,
    pub directory: TempDir,
    /// Made of the test's process: no other test's.
    name: String,
}

impl Daemon {
    /// A daemon that answers and has no guests. `more` goes into its configuration.
    pub fn start(more: &str) -> Daemon {
        let mut daemon = Daemon::configured(more, "");
        daemon.run();
        daemon
    }

    /// The same before it is started; `network` goes into its configuration's part for that.
    pub fn configured(more: &str, network: &str) -> Daemon {
        let directory = tempfile::tempdir().expect("a directory");
        let daemon = Daemon { child: None, directory, name: format!("bt{}", std::process::id()) };
        fs::write(daemon.path("berthd.toml"), daemon.configuration(more, network)).expect("a configuration");
        daemon
    }

    fn configuration(&self, more: &str, network: &str) -> String {
        let path = |name: &str| self.path(name).display().to_string();
        let program = |name: &str| program(name).display().to_string();
        format!(
            "socket = {:?}\nstate_dir = {:?}\nrun_dir = {:?}\ngroup = \"users\"\nuid_first = {UID_FIRST}\n\
             control_group = {:?}\n{more}\n[network]\nbridge = {:?}\n{network}\n\
             [programs]\nvmm = {:?}\njailer = {:?}\nagent = {:?}\n",
            path("socket"),
            path("state"),
            path("run"),
            self.name,
            self.name,
            program("berth-vmm"),
            program("berth-jailer"),
            program("berth-agent"),
        )
    }

    /// A file or directory of the daemon's.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Where control groups of its guests are.
    pub fn group(&self) -> PathBuf {
        Path::new("/sys/fs/cgroup").join(&self.name)
    }

    /// Its bridge.
    pub fn bridge(&self) -> &str {
        &self.name
    }

    /// Starts it, and returns when it answers.
    pub fn run(&mut self) {
        assert!(self.child.is_none(), "it runs");
        let log = File::options().create(true).append(true).open(self.path("berthd.log")).expect("a log");
        let child = Command::new(program("berthd"))
            .arg("--config")
            .arg(self.path("berthd.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("berthd");
        self.child = Some(child);
        let begin = Instant::now();
        while self.client().version().is_err() {
            assert!(begin.elapsed() < limits::API, "the daemon does not answer: {}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it without a word of warning.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("a daemon");
        child.kill().expect("a kill");
        child.wait().expect("an end");
    }

    /// Descriptors that it has open.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).map_or(0, Iterator::count)
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a daemon").id()
    }

    pub fn client(&self) -> Client {
        Client::new(&self.path("socket"))
    }

    /// What it has said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("berthd.log")).unwrap_or_default()
    }

    /// Imports the small busybox system, with a disk of a MiB.
    pub fn import(&self) {
        let disk = self.path("blank.img");
        let file = File::create(&disk).expect("a disk");
        file.set_len(1 << 20).expect("a disk");
        let kernel = asset(provide::BZIMAGE);
        let parts = [(Part::Kernel, kernel), (Part::Initrd, asset(provide::INITRAMFS)), (Part::Disk, disk)];
        for (part, path) in parts {
            let mut file = File::open(&path).expect("a part");
            let length = file.metadata().expect("its length").len();
            self.client().put_part(IMAGE, part, &mut file, length, |_| ()).expect("a part");
        }
        let command_line = Some("console=ttyS0 quiet reboot=k".to_owned());
        self.client().put_image(IMAGE, NewImage { command_line }).expect("an image");
    }

    /// A small guest of this name that runs.
    #[track_caller]
    pub fn guest(&self, name: &str) -> fleet::Guest {
        self.client().create(small(name)).unwrap_or_else(|error| panic!("{error}: {}", self.log()));
        self.client().start(name).unwrap_or_else(|error| panic!("{error}: {}", self.log()))
    }

    /// Runs a command in a guest, as soon as its agent is there.
    #[track_caller]
    pub fn exec(&self, guest: &str, argv: &[&str]) -> Outcome {
        let mut stream = self.agent(guest);
        let argv = argv.iter().map(|word| word.to_string()).collect();
        client::exec(&mut stream, Exec { argv, ..Exec::default() }).expect("the command starts");
        hear(&mut stream)
    }

    /// Has a guest's shell do something that outlives its command.
    #[track_caller]
    pub fn say(&self, guest: &str, command: &str) {
        self.exec(guest, &["sh", "-c", &format!("{{ {command} }} < /dev/null > /dev/null 2>&1")]).text();
    }

    /// A connection to a guest's agent.
    #[track_caller]
    pub fn agent(&self, guest: &str) -> UnixStream {
        let wait = limits::BOOT.as_secs() as u32;
        let stream = self.client().vsock(guest, agent::protocol::PORT, wait);
        let stream = stream.unwrap_or_else(|error| panic!("{error}: {}", self.console(guest)));
        stream.set_read_timeout(Some(limits::COMMAND)).expect("a limit");
        stream
    }

    /// What a guest has written to its console.
    pub fn console(&self, guest: &str) -> String {
        let mut text = Vec::new();
        let logs = self.client().logs(guest, fleet::routes::Log::Console, false);
        let _ = logs.map(|mut logs| logs.read_to_end(&mut text));
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Waits until a guest is in this state.
    #[track_caller]
    pub fn wait_for(&self, guest: &str, state: State) -> fleet::Guest {
        let begin = Instant::now();
        loop {
            let now = self.client().guest(guest).unwrap_or_else(|error| panic!("{guest}: {error}"));
            if now.state == state {
                return now;
            }
            assert!(begin.elapsed() < limits::COMMAND, "it is not {state:?}: {now:?}\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until a guest runs as another process than this one.
    #[track_caller]
    pub fn wait_for_another(&self, before: &fleet::Guest) -> fleet::Guest {
        let begin = Instant::now();
        loop {
            let now = self.wait_for(&before.name, State::Running);
            if now.pid != before.pid {
                return now;
            }
            assert!(begin.elapsed() < limits::COMMAND, "it is not started again: {now:?}\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What the host has of this daemon's guests: cells, groups, directories of sockets, interfaces, mounts, VMMs. Sorted.
    pub fn traces(&self) -> Vec<String> {
        let mut traces = Vec::new();
        let mut list = |directory: &Path| {
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            let named = entries.filter(|entry| entry.path().is_dir());
            traces.extend(named.map(|entry| entry.path().display().to_string()));
        };
        list(&self.path("run/guests"));
        list(&self.path("state/cells/berth-vmm"));
        list(&self.group());
        list(Path::new(&format!("/sys/class/net/{}/brif", self.name)));
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let here = self.directory.path().display().to_string();
        traces.extend(mounts.lines().filter(|line| line.contains(&here)).map(|line| format!("mount {line}")));
        for pid in processes() {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let uid = status
                .lines()
                .find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().next()?.parse().ok());
            let is_zombie = status.contains("State:\tZ");
            if uid.is_some_and(|uid: u32| (UID_FIRST..UID_FIRST + 4096).contains(&uid)) && !is_zombie {
                traces.push(format!("process {pid}"));
            }
        }
        traces.sort();
        traces
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- the daemon's log\n{}", self.log());
        }
        if let Ok(guests) = self.client().guests() {
            for guest in guests {
                let _ = self.client().remove(&guest.id, true);
            }
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = Command::new("ip").args(["link", "delete", &self.name]).stderr(Stdio::null()).status();
        let _ = fs::remove_dir(self.group());
    }
}

/// A small guest of this name.
pub fn small(name: &str) -> NewGuest {
    NewGuest { name: Some(name.into()), memory_mib: MEMORY_MIB, ..NewGuest::of(IMAGE) }
}

fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Reads until this has been said, or fails.
pub fn hear_until(stream: &mut impl Read, what: &str) -> io::Result<String> {
    let mut heard = Vec::new();
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        heard.extend(byte);
        if heard.ends_with(what.as_bytes()) {
            return Ok(String::from_utf8_lossy(&heard).into_owned());
        }
    }
}
