//! The fixture of the tests that run real guests: a guest in a directory of its own, its console, a shell in it, its API,
//! and how it ended.
//!
//! A test says what it wants as a [`Setup`], gets a [`Guest`], and talks to it. Every wait has a limit of [`limits`], and
//! whatever is not as it should be panics, which is how a test fails; a guest that is dropped then shows the end of its
//! console and of the VMM's log. Dropping a guest kills its VMM, and the kernel does so when the test's thread ends.
//!
//! It makes no host and no assets: `berth-host test` runs the tests in a host and says by environment variables where
//! things are (`crate::host`). It knows the VMM by its command line and its API only.

// A fixture fails its test by panicking; nothing of this is in a shipped program.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

pub mod agent;
pub mod block_device;
pub mod console;
pub mod huge_pages;
pub mod setup;
pub mod storage_daemon;
pub mod streams;
pub mod tap;
pub mod vmm;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use api_socket::{ActionType, Client, ClientError, Drive, InstanceState, Request, VmState};
pub use console::{Console, Output};
use serde_json::Value;
pub use setup::{Kernel, Setup};
pub use vmm::{Ended, Name, Status, Vmm};

use crate::host::{SOAK, provide};

/// How long things may take. A nested host runs a guest some twenty times slower than the machine it is on, which may be
/// busy with others: these are limits to find a hang, not measures. Each is below the runner's for a whole test, so that
/// what hangs is shown by the fixture, which knows most.
pub mod limits {
    use std::time::Duration;

    /// The VMM's start until its API answers, and any answer of it.
    pub const API: Duration = Duration::from_secs(60);
    /// A start to the busybox shell; alone it takes about four seconds.
    pub const BOOT: Duration = Duration::from_secs(150);
    /// A start to Debian's login, or its way down; alone they take about 25 seconds.
    pub const DEBIAN: Duration = Duration::from_secs(200);
    /// One command in the guest.
    pub const COMMAND: Duration = Duration::from_secs(120);
    /// From the guest's last act to the end of the VMM.
    pub const EXIT: Duration = Duration::from_secs(90);
}

/// What is shown of the console and of each log when a test fails, in lines.
const TAIL_LINES: usize = 60;

/// What the busybox guest says when its shell is there.
const READY: &str = "BERTH-GUEST-READY";

/// A guest and its VMM.
pub struct Guest {
    pub vmm: Vmm,
    pub console: Console,
    pub api: Client,
    setup: Setup,
}

impl Guest {
    /// Starts a VMM and configures it; the guest does not run yet.
    pub fn configured(setup: Setup) -> Guest {
        let mut vmm = Vmm::spawn(setup.name, &setup.arguments);
        let mut api = vmm.client();
        let console = vmm.console();
        for request in setup.requests() {
            api.apply(&request).unwrap_or_else(|error| panic!("{request:?}: {error}"));
        }
        Guest { vmm, console, api, setup }
    }

    /// A running guest, of which nothing is known yet.
    pub fn started(setup: Setup) -> Guest {
        let mut guest = Guest::configured(setup);
        guest.apply(Request::Action(ActionType::InstanceStart));
        guest
    }

    /// A guest in its busybox shell.
    pub fn booted(setup: Setup) -> Guest {
        let mut guest = Guest::configured(setup);
        guest.boot();
        guest
    }

    /// Starts one that is configured, and waits for its busybox shell.
    #[track_caller]
    pub fn boot(&mut self) {
        self.apply(Request::Action(ActionType::InstanceStart));
        self.console.wait_for(READY, limits::BOOT);
        self.console.wait_for("# ", limits::BOOT);
    }

    /// A Debian guest, logged in as root. See [`Setup::debian`].
    pub fn logged_in(setup: Setup) -> Guest {
        let mut guest = Guest::started(setup);
        guest.console.wait_for("login: ", limits::DEBIAN);
        guest.console.send(b"root\n");
        guest.console.wait_for("# ", limits::DEBIAN);
        guest
    }

    /// Runs a command in the guest's shell, successful or not. One line of at most [`console::MAX_COMMAND`] bytes.
    pub fn shell(&mut self, command: &str) -> Output {
        self.console.shell(command, limits::COMMAND)
    }

    /// The output of a command that must succeed.
    #[track_caller]
    pub fn run(&mut self, command: &str) -> String {
        self.run_within(command, limits::COMMAND)
    }

    /// As [`Guest::run`], for a command that takes long.
    #[track_caller]
    pub fn run_within(&mut self, command: &str, limit: Duration) -> String {
        let Output { text, code } = self.console.shell(command, limit);
        assert_eq!(code, 0, "`{command}` in the guest ended with {code}:\n{text}");
        text
    }

    /// The output of a command that must succeed, as a number.
    #[track_caller]
    pub fn number(&mut self, command: &str) -> u64 {
        let text = self.run(command);
        text.trim().parse().unwrap_or_else(|_| panic!("`{command}` in the guest gave no number: {text:?}"))
    }

    /// Mounts the drive of [`debian_drive`], which is the first, at /debian: `chroot /debian` runs its programs.
    #[track_caller]
    pub fn mount_debian(&mut self) {
        self.run("mkdir /debian; mount -t ext4 -o ro /dev/vda /debian");
        self.run("for tree in dev proc sys; do mount -o bind /$tree /debian/$tree; done");
    }

    /// Puts the program of [`program_drive`], which is this disk of the guest's, where its shell finds it.
    #[track_caller]
    pub fn take_program(&mut self, disk: &str, name: &str) {
        // Without the bytes that filled its last sector it would run as well.
        self.run(&format!("cat {disk} > /bin/{name} && chmod 755 /bin/{name}"));
    }

    /// Says something to the guest's shell that has no answer, such as a command that ends it.
    pub fn say(&mut self, command: &str) {
        self.console.send(format!("{command}\n").as_bytes());
    }

    /// Makes a request that must succeed.
    #[track_caller]
    pub fn apply(&mut self, request: Request) {
        self.api.apply(&request).unwrap_or_else(|error| panic!("{request:?}: {error}"));
    }

    /// Asks the guest for a device; with more requests than one takes it away, unless the guest has let go of it by then.
    #[track_caller]
    pub fn delete(&mut self, request: &Request, requests: u32) {
        self.apply(request.clone());
        for _ in 1..requests {
            match self.api.apply(request) {
                Ok(_) | Err(ClientError::Refused(_)) => {}
                Err(error) => panic!("{request:?}: {error}"),
            }
        }
    }

    #[track_caller]
    pub fn pause(&mut self) {
        self.apply(Request::PatchVm(VmState::Paused));
    }

    #[track_caller]
    pub fn resume(&mut self) {
        self.apply(Request::PatchVm(VmState::Resumed));
    }

    /// As `GET /` tells it.
    #[track_caller]
    pub fn state(&mut self) -> InstanceState {
        self.api.instance_info().unwrap().state
    }

    /// How much a counter has grown since the VMM's start; the VMM writes its metrics to the file `metrics`.
    #[track_caller]
    pub fn metric(&mut self, group: &str, key: &str) -> u64 {
        self.apply(Request::Action(ActionType::FlushMetrics));
        let text =
            fs::read_to_string(self.path("metrics")).expect("the metrics file: give --metrics-path metrics");
        // Each line has what came since the line before.
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a line of metrics"));
        // A device that came later is not in the first lines.
        let counts: Vec<u64> = lines.filter_map(|line| line[group][key].as_u64()).collect();
        assert!(!counts.is_empty(), "no {group}.{key} in {text}");
        counts.iter().sum()
    }

    /// Powers the guest off from inside and waits for the VMM's end.
    #[track_caller]
    pub fn power_off(mut self) {
        self.say("sync; poweroff -f");
        assert_eq!(self.ended(), Ended::Code(0), "after poweroff in the guest");
    }

    /// Waits for the VMM to end by itself.
    #[track_caller]
    pub fn ended(&mut self) -> Ended {
        self.vmm.ended(limits::EXIT)
    }

    /// The path of a file in this guest's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.vmm.path(name)
    }

    /// What the guest was made from.
    pub fn setup(&self) -> &Setup {
        &self.setup
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- end of the guest's console\n{}", tail(&self.console.text()));
        }
    }
}

/// The build product of this name.
pub fn program(name: &str) -> PathBuf {
    directory("BERTH_BUILD").join(name)
}

/// The asset of this name; `host::provide` lists them.
pub fn asset(name: &str) -> PathBuf {
    directory("BERTH_ASSETS").join(name)
}

/// How often a test repeats what it proves: so many times, or in a soak run so many more.
pub fn times(usual: u32, in_soak: u32) -> u32 {
    if std::env::var_os(SOAK).is_some() { in_soak } else { usual }
}

/// A read-only drive with the Debian asset, for its programs and its kernel modules.
pub fn debian_drive() -> Drive {
    Drive {
        drive_id: "debian".into(),
        is_read_only: Some(true),
        path_on_host: Some(asset(provide::DEBIAN)),
        ..Drive::default()
    }
}

/// A read-only drive with a program that a guest may want, copied into `directory`; see [`Guest::take_program`].
pub fn program_drive(directory: &Path, name: &str) -> Drive {
    let copy = directory.join(name);
    let bytes = fs::copy(program(name), &copy).unwrap_or_else(|e| panic!("{name}: {e}"));
    // A guest sees whole sectors.
    let file = File::options().write(true).open(&copy);
    file.and_then(|file| file.set_len(bytes.next_multiple_of(512))).unwrap_or_else(|e| panic!("{name}: {e}"));
    Drive {
        drive_id: "program".into(),
        is_read_only: Some(true),
        path_on_host: Some(copy),
        ..Drive::default()
    }
}

/// A drive with the host's curl and all that it is linked to: no image of a guest has it, and busybox's wget, being linked
/// statically, cannot do without the C library's files.
pub fn curl_drive(directory: &Path) -> Drive {
    const CURL: &str = "/usr/bin/curl";
    let libraries = tap::host("ldd", &[CURL]);
    let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/'));
    let disk = directory.join("curl.tar");
    let files: Vec<&str> = [CURL].into_iter().chain(libraries).collect();
    let create = ["--create", "--dereference", "--absolute-names", "--transform=s|.*/||", "--file"];
    tap::host("tar", &[&create[..], &[disk.to_str().unwrap()], &files].concat());
    Drive { drive_id: "curl".into(), is_read_only: Some(true), path_on_host: Some(disk), ..Drive::default() }
}

/// Makes a request that must be refused with a text that has these words.
#[track_caller]
pub fn refused(guest: &mut Guest, request: &Request, words: &[&str]) {
    let message = guest.api.apply(request).expect_err("accepted").to_string();
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

/// What `md5sum` in a guest prints of these bytes.
pub fn md5(data: &[u8]) -> String {
    let sum = || {
        let path = tempfile::NamedTempFile::new()?;
        fs::write(path.path(), data)?;
        std::process::Command::new("md5sum").stdin(path.reopen()?).output()
    };
    let output = sum().unwrap_or_else(|error| panic!("md5sum: {error}"));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A new sparse file of so many bytes in a guest's or a test's directory.
pub fn blank_disk(path: PathBuf, bytes: u64) -> PathBuf {
    File::create(&path)
        .and_then(|file| file.set_len(bytes))
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    path
}

fn directory(variable: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(path) => path.into(),
        None => panic!("{variable} is not set: this test needs a host with KVM, run it by `make test`"),
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}
