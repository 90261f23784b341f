//! What the process may do once its guest runs, and which part of that is taken when (docs/security.md has the table).
//!
//! - In the first moments, before anything is opened: `process.rs`.
//! - The API thread, at its start: no file, no capability, its filter.
//! - The control thread, when a guest is built and its files are open: no files but those that later requests may name, no
//!   capability. The threads of the guest are started after that and inherit it. Each puts on its filter first of all, the
//!   control thread last of all, and only then the guest runs.
//!
//! A thread cannot be made to give something up by another, nor can anything be given back.

pub mod landlock;
pub mod process;
pub mod seccomp;

use std::io;

use api_socket::Fault;

use crate::args::{Args, ExitCode};
use crate::{exit_status, faults};
use landlock::Allowed;
use seccomp::Filters;

/// What a thread is for, and so which filter it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Requests, signals, the terminal, the metrics: the main thread.
    Control,
    Api,
    Vcpu,
    /// The queues of devices.
    Io,
}

impl Role {
    pub const ALL: [Role; 4] = [Role::Control, Role::Api, Role::Vcpu, Role::Io];

    /// The name of its filter.
    pub fn name(self) -> &'static str {
        match self {
            Role::Control => "control",
            Role::Api => "api",
            Role::Vcpu => "vcpu",
            Role::Io => "io",
        }
    }
}

/// What threads are put into. One for the process, shared by all of them.
pub struct Sandbox {
    /// `None` with `--no-seccomp`.
    filters: Option<Filters>,
    landlock: Option<u32>,
}

impl Sandbox {
    /// As the command line wants it.
    ///
    /// # Errors
    /// Those of [`Filters::read`].
    pub fn new(args: &Args) -> Result<Sandbox, Fault> {
        let filters = match (&args.seccomp_filter, args.no_seccomp) {
            (_, true) => None,
            (Some(path), false) => Some(Filters::read(path)?),
            (None, false) => Some(Filters::built_in()),
        };
        Ok(Sandbox { filters, landlock: landlock::version() })
    }

    /// Confines nothing, for tests of what runs in it.
    #[cfg(test)]
    pub fn off() -> Sandbox {
        Sandbox { filters: None, landlock: None }
    }

    /// Takes from the calling thread and all that it will start: files but for those that are `allowed`, other processes,
    /// capabilities. For ever.
    ///
    /// # Errors
    /// What the kernel says; what was taken by then is gone.
    pub fn close(&self, allowed: &[Allowed]) -> io::Result<()> {
        if let Some(version) = self.landlock {
            landlock::restrict(version, allowed)?;
        }
        drop_capabilities()
    }

    /// For a thread that needs no file at all: closes it and puts its filter on it, or ends the process.
    pub fn shut(&self, role: Role) {
        if let Err(error) = self.close(&[]) {
            give_up(&format!("the {} thread cannot be confined: {error}", role.name()));
        }
        self.enter(role);
    }

    /// Puts the calling thread's filter on it, or ends the process.
    pub fn enter(&self, role: Role) {
        let thread = std::thread::current();
        faults::name_thread(thread.name().unwrap_or("main"));
        let Some(filters) = &self.filters else { return };
        if let Err(error) = filters.install(role) {
            give_up(&format!(
                "the system call filter of the {} thread cannot be set up: {error}",
                role.name()
            ));
        }
    }

    /// Says in the log what is in force for the guest that is about to run.
    pub fn tell(&self, reachable: &[String]) {
        let filters = match &self.filters {
            None => "no system call filters (--no-seccomp)",
            Some(filters) if filters.are_built_in() => "system call filters",
            Some(_) => "system call filters of --seccomp-filter",
        };
        let files = match (self.landlock, reachable) {
            (None, _) => {
                log::warn!("This kernel has no Landlock: what files the process may open, its user decides.");
                "no Landlock".to_string()
            }
            (Some(version), []) => format!("Landlock (version {version}): no file can be opened"),
            (Some(version), some) => {
                format!("Landlock (version {version}): files can be opened in {} only", some.join(", "))
            }
        };
        log::info!("Confined: {filters}; {files}; no capabilities.");
    }
}

/// All sets but the bounding set, which is for an exec: `no_new_privs` makes that give nothing.
fn drop_capabilities() -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        thread: libc::c_int,
    }
    /// `_LINUX_CAPABILITY_VERSION_3`, whose sets have two words.
    const VERSION: u32 = 0x2008_0522;
    let header = Header { version: VERSION, thread: 0 };
    // Effective, permitted, inheritable; twice.
    let none = [0u32; 6];
    // SAFETY: the kernel reads a header and two `struct __user_cap_data_struct`, which both live through the call, and writes
    // to the header only when it does not know its version, which all kernels do since 2.6.26.
    match unsafe { libc::syscall(libc::SYS_capset, std::ptr::from_ref(&header), none.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A thread that is not confined must not go on.
fn give_up(reason: &str) -> ! {
    log::error!("{reason}");
    faults::say(reason);
    exit_status::tell(ExitCode::Generic, reason);
    std::process::exit(ExitCode::Generic as i32)
}
