//! A Linux host with KVM, anywhere: this machine where it can run guests, otherwise a nested host.
//!
//! Whoever runs commands in a [`Host`] need not know which it is: the commands find what they need through the
//! environment variables `BERTH_BUILD` (build products), `BERTH_ASSETS` (kernels and images for guests) and
//! `BERTH_SCRATCH` (a directory to write in).
//!
//! It makes no assets (`crate::assets` does) and builds nothing. The order of the parts: `choose` and `probe` decide,
//! `provide` collects what a host is made of, `nested` (with `qemu`, `state`, `image`) or `direct` starts it, `agent` runs
//! in it and `link` talks to the agent by `wire`; `session` and `runner` are what a person calls;
//! `disk` is for use inside a host.

pub mod agent;
pub mod choose;
pub mod direct;
pub mod disk;
pub mod error;
pub mod image;
pub mod link;
pub mod nested;
pub mod probe;
pub mod process;
pub mod provide;
pub mod qemu;
pub mod rundir;
pub mod runner;
pub mod session;
pub mod state;
pub mod terminal;
pub mod wire;

use std::path::PathBuf;

use choose::Place;
use direct::Direct;
use error::{Doing, Result};
use image::Item;
use link::{Link, Running};
use nested::Nested;
use qemu::Forward;
use rundir::RunDir;
use wire::{Command, Size};

/// Set in a soak run, in which tests have their full length (`runner`).
pub const SOAK: &str = "BERTH_SOAK";

/// Where a nested host mounts what it was given.
const BUILD: &str = "/build";
const ASSETS: &str = "/assets";
const SCRATCH: &str = "/scratch";

/// Memory of a nested host unless asked otherwise.
pub const DEFAULT_MEMORY_MIB: u64 = 3 << 10;

/// What a host is made of.
#[derive(Clone, Debug)]
pub struct Config {
    pub place: Place,
    /// Where run directories, saved states and images are kept.
    pub cache: PathBuf,
    /// The program `berth-host-agent`.
    pub agent: PathBuf,
    pub provisions: Provisions,
    /// The rest is for a nested host only.
    pub images: Images,
    pub memory_mib: u64,
    /// More than one makes guests hang now and then (`qemu`): for measurements only.
    pub processors: u32,
    pub forwards: Vec<Forward>,
}

impl Config {
    /// The parent of all run directories.
    pub fn run_parent(&self) -> PathBuf {
        self.cache.join("run")
    }
}

/// The files that a host shows.
#[derive(Clone, Debug, Default)]
pub struct Provisions {
    pub build: Vec<Item>,
    pub assets: Vec<Item>,
    /// Raw disk images for guests: in a nested host each is a block device with a link to it among the assets.
    pub guest_disks: Vec<Item>,
}

/// What a nested host boots, and in what.
#[derive(Clone, Debug, Default)]
pub struct Images {
    pub qemu: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub root: PathBuf,
}

/// A running host. Dropping it ends every command in it and leaves nothing behind.
#[derive(Debug)]
pub enum Host {
    Direct(Direct),
    Nested(Nested),
}

impl Host {
    /// Starts a host. The calling thread must live as long as the host is wanted.
    pub fn start(config: &Config) -> Result<Self> {
        let directory = RunDir::new(&config.run_parent())?;
        Ok(match config.place {
            Place::Direct => Self::Direct(Direct::start(config, directory)?),
            Place::Nested => Self::Nested(Nested::start(config, directory)?),
        })
    }

    /// Starts a command in /scratch, with the variables of this module's description and `env` in its environment.
    pub fn run(
        &self,
        argv: Vec<String>,
        env: Vec<(String, String)>,
        terminal: Option<Size>,
    ) -> Result<Running> {
        let cwd = Some(self.location("scratch", SCRATCH));
        let env = self.environment().into_iter().chain(env).collect();
        let name = argv.first().cloned().unwrap_or_default();
        self.link().run(Command { argv, env, cwd, terminal }).doing(|| format!("cannot run {name}"))
    }

    /// The agent in the host.
    pub fn link(&self) -> &Link {
        match self {
            Self::Direct(host) => host.link(),
            Self::Nested(host) => host.link(),
        }
    }

    /// In a few words, how it came to be.
    pub fn describe(&self) -> &'static str {
        match self {
            Self::Direct(_) => "this machine",
            Self::Nested(host) if host.was_restored() => "nested host, restored",
            Self::Nested(_) => "nested host, booted",
        }
    }

    /// The end of a nested host's console.
    pub fn console_tail(&self) -> String {
        match self {
            Self::Direct(_) => String::new(),
            Self::Nested(host) => host.console_tail(),
        }
    }

    fn environment(&self) -> Vec<(String, String)> {
        let variable = |name: &str, value| (name.to_owned(), value);
        let path = match self {
            Self::Direct(_) => std::env::var("PATH").unwrap_or_default(),
            Self::Nested(_) => agent::PATH.to_owned(),
        };
        vec![
            variable("PATH", format!("{}:{path}", self.location("build", BUILD))),
            variable("BERTH_BUILD", self.location("build", BUILD)),
            variable("BERTH_ASSETS", self.location("assets", ASSETS)),
            variable("BERTH_SCRATCH", self.location("scratch", SCRATCH)),
            variable("TMPDIR", self.location("scratch", SCRATCH)),
        ]
    }

    fn location(&self, direct: &str, nested: &str) -> String {
        match self {
            Self::Direct(host) => host.directory().join(direct).display().to_string(),
            Self::Nested(_) => nested.to_owned(),
        }
    }
}
