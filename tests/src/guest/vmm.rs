//! One VMM process in a directory of its own: how it is started, looked at and ended.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use api_socket::Client;
use rustix::process::{Pid, Resource, Rlimit, Signal};
use tempfile::TempDir;

use super::{Console, limits, program, tail};
use crate::host::process;

/// The name that a VMM is started under, which decides whom it says it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Name {
    #[default]
    Berth,
    /// By a link of the name `firecracker`.
    Firecracker,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Code(i32),
    Signal(i32),
}

/// The text of /proc/<pid>/task/<tid>/status.
#[derive(Clone, Debug)]
pub struct Status(String);

impl Status {
    /// The value of this field, without the blanks around it.
    #[track_caller]
    pub fn field(&self, name: &str) -> &str {
        let value = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.unwrap_or_else(|| panic!("no {name} in a thread's status")).trim()
    }
}

/// Of each thread of a process but those of KVM and vhost, which run nothing but the kernel.
pub fn thread_statuses(pid: u32) -> Vec<Status> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the process's threads");
    let status = |task: fs::DirEntry| fs::read_to_string(task.path().join("status")).map(Status);
    let statuses = tasks.flatten().map(|task| status(task).expect("a thread's status"));
    let is_kernels = |name: &str| name.starts_with("kvm-") || name.starts_with("vhost-");
    statuses.filter(|status| !is_kernels(status.field("Name"))).collect()
}

/// Sends a signal to the thread of this name.
pub fn signal_thread(pid: u32, name: &str, signal: Signal) {
    let statuses = thread_statuses(pid);
    let thread = statuses.iter().find(|status| status.field("Name") == name);
    let tid: i32 = thread.unwrap_or_else(|| panic!("no thread {name}")).field("Pid").parse().expect("an id");
    // SAFETY: tgkill takes three numbers and touches no memory.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal.as_raw()) };
    assert_eq!(sent, 0, "a signal to {name}");
}

/// A VMM process. Its directory goes with it.
pub struct Vmm {
    child: Child,
    directory: TempDir,
}

impl Vmm {
    /// Starts a VMM that serves its API and logs everything to a file, so that standard output is the guest's alone.
    pub fn spawn(name: Name, arguments: &[String]) -> Vmm {
        let directory = tempfile::tempdir().expect("a directory for the guest");
        let flag =
            |flag: &str, file: &str| [flag.to_owned(), directory.path().join(file).display().to_string()];
        let usual = [
            flag("--api-sock", API_SOCKET).to_vec(),
            flag("--log-path", LOG).to_vec(),
            vec!["--level".into(), "Debug".into(), "--show-level".into()],
        ];
        let arguments: Vec<_> = usual.into_iter().flatten().chain(arguments.iter().cloned()).collect();
        Vmm::spawn_in(directory, name, &arguments)
    }

    /// Starts a VMM with these arguments only, in a directory that is also its working directory.
    pub fn spawn_in(directory: TempDir, name: Name, arguments: &[impl AsRef<OsStr>]) -> Vmm {
        let vmm = program("berth-vmm");
        let program = match name {
            Name::Berth => vmm,
            Name::Firecracker => {
                let link = directory.path().join("firecracker");
                symlink(vmm, &link).expect("a link to the VMM");
                link
            }
        };
        let errors = File::create(directory.path().join(ERRORS)).expect("a file for standard error");
        let mut command = Command::new(&program);
        command.args(arguments).current_dir(directory.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        let child = process::spawn_bound(&mut command, Vec::new())
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()));
        Vmm { child, directory }
    }

    /// The console on its standard input and output. Once.
    pub fn console(&mut self) -> Console {
        let ends = (self.child.stdout.take(), self.child.stdin.take());
        let (Some(output), Some(input)) = ends else { panic!("the console was taken already") };
        Console::new(output, input)
    }

    /// A new connection to its API; waits for the socket.
    #[track_caller]
    pub fn client(&self) -> Client {
        let mut client = Client::connect_within(&self.path(API_SOCKET), limits::API).expect("the API");
        client.set_timeout(Some(limits::API)).expect("a timeout");
        client
    }

    /// The path of a file in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn ended(&mut self, limit: Duration) -> Ended {
        assert!(process::wait_for(&mut self.child, limit), "the VMM did not end within {limit:?}");
        let status = self.child.wait().expect("the VMM's exit status");
        match (status.code(), status.signal()) {
            (Some(code), _) => Ended::Code(code),
            (None, signal) => Ended::Signal(signal.unwrap_or_default()),
        }
    }

    /// Kills it at once, as a power failure would.
    pub fn kill(&mut self) {
        process::kill(&mut self.child);
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32).expect("a process id");
        rustix::process::kill_process(pid, signal).expect("a signal to the VMM");
    }

    /// The names of its threads, sorted.
    pub fn threads(&self) -> Vec<String> {
        let tasks = fs::read_dir(self.proc("task")).expect("the VMM's threads");
        let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        let mut names: Vec<_> = tasks.flatten().map(|task| name(task).trim_end().to_owned()).collect();
        names.sort();
        names
    }

    /// What /proc tells of each thread but KVM's own.
    pub fn thread_statuses(&self) -> Vec<Status> {
        thread_statuses(self.child.id())
    }

    /// From now on its address space cannot grow beyond so many bytes.
    pub fn limit_memory(&self, bytes: u64) {
        let pid = Pid::from_raw(self.child.id() as i32);
        let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
        rustix::process::prlimit(pid, Resource::As, limit).expect("a limit for the VMM");
    }

    /// A line of /proc/<pid>/status that is a number of KiB, such as `VmRSS`.
    pub fn status_kib(&self, name: &str) -> u64 {
        let status = fs::read_to_string(self.proc("status")).expect("the VMM's status");
        let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let number = value.and_then(|value| value.trim().strip_suffix(" kB")?.parse().ok());
        number.unwrap_or_else(|| panic!("no {name} in KiB in the VMM's status"))
    }

    /// The names of its threads and the processor time that each used, in clock ticks.
    pub fn thread_ticks(&self) -> Vec<(String, u64)> {
        let tasks = fs::read_dir(self.proc("task")).expect("the VMM's threads");
        let of = |task: fs::DirEntry| {
            let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            // A thread that has just ended has used nothing since.
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            (name.trim_end().to_owned(), ticks(&stat).unwrap_or_default())
        };
        tasks.flatten().map(of).collect()
    }

    /// Processor time it used, guest included, in clock ticks (hundredths of a second).
    pub fn cpu_ticks(&self) -> u64 {
        let stat = fs::read_to_string(self.proc("stat")).expect("the VMM's stat");
        ticks(&stat).expect("processor times")
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        self.read(LOG)
    }

    /// What it wrote to standard error.
    pub fn errors(&self) -> String {
        self.read(ERRORS)
    }

    /// What each of its threads does at the moment, as far as the kernel tells.
    fn waits(&self) -> String {
        let tasks = fs::read_dir(self.proc("task")).into_iter().flatten().flatten();
        let line = |task: fs::DirEntry| {
            let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let stat = read("stat");
            let state = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next());
            let (state, ticks) = (state.unwrap_or("?").to_owned(), ticks(&stat).unwrap_or_default());
            let stack: Vec<_> = read("stack").lines().take(6).map(String::from).collect();
            format!("{}: {state} {ticks} {}\n", read("comm").trim_end(), stack.join(" < "))
        };
        tasks.map(line).collect()
    }

    fn read(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.path(name)).unwrap_or_default()).into_owned()
    }

    fn proc(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.child.id()).into()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let ended = self.child.try_wait();
        let waits = if std::thread::panicking() { self.waits() } else { String::new() };
        process::kill(&mut self.child);
        if std::thread::panicking() {
            eprintln!("--- the VMM in {}: {ended:?}", self.directory.path().display());
            eprintln!("--- its threads: name, state, processor time in ticks, where in the kernel\n{waits}");
            eprintln!("--- end of the VMM's log\n{}", tail(&self.log()));
            eprintln!("--- end of the VMM's standard error\n{}", tail(&self.errors()));
        }
    }
}

/// User and system time: fields 14 and 15 of proc_pid_stat(5); the second, in parentheses, may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).and_then(|field| field.parse::<u64>().ok());
    field(14).zip(field(15)).map(|(user, system)| user + system)
}

const API_SOCKET: &str = "api.sock";
const LOG: &str = "vmm.log";
const ERRORS: &str = "stderr";
