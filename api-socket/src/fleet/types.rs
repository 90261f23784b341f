//! The wire types of the fleet API. Times are seconds since 1970-01-01 UTC with fractions, sizes are in the unit that the
//! field's name ends with, and what is optional and absent is left out.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The most processors of a guest; the guest API's limit.
pub const MAX_CPUS: u8 = 32;
/// The least and the most memory of a guest, in MiB.
pub const MEMORY_MIB: std::ops::RangeInclusive<u32> = 16..=1 << 20;
/// What a guest gets that asks for nothing else.
pub const DEFAULT_CPUS: u8 = 1;
/// As [`DEFAULT_CPUS`].
pub const DEFAULT_MEMORY_MIB: u32 = 512;
/// How long a guest may take to go down by itself before it is ended, unless the request says otherwise.
pub const DEFAULT_STOP_SECONDS: u32 = 30;
/// The longest such time.
pub const MAX_STOP_SECONDS: u32 = 24 * 60 * 60;
/// The longest name of a guest or an image, in bytes: that of a host name.
pub const MAX_NAME: usize = 63;
/// The most disks of a guest beside the one that its image gave it.
pub const MAX_DISKS: usize = 8;
/// The longest name of such a disk, in bytes: the guest finds it by this serial number (VIRTIO 1.3, 5.2.6).
pub const MAX_DISK_NAME: usize = 20;
/// The least and the most that such a disk has, in MiB.
pub const DISK_MIB: std::ops::RangeInclusive<u32> = 1..=1 << 24;
/// The name of the disk that the image gave.
pub const ROOT_DISK: &str = "root";
/// The longest addition to a kernel's command line, in bytes.
pub const MAX_COMMAND_LINE: usize = 1024;

/// Reply of `GET /version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    pub version: String,
    /// Of this run of the daemon, which is not the guests'.
    pub pid: u32,
}

/// Body of `POST /guests`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewGuest {
    /// Letters, digits and hyphens, at most [`MAX_NAME`], and no other guest's. Without it one is made up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The name of an image.
    pub image: String,
    #[serde(default = "default_cpus")]
    pub cpus: u8,
    #[serde(default = "default_memory")]
    pub memory_mib: u32,
    /// What it may have while it runs; absent is no more than `memory_mib`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory_mib: Option<u32>,
    /// Empty disks beside the image's, at most [`MAX_DISKS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// What the kernel is told beside the image's command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_line: Option<String>,
    #[serde(default = "yes")]
    pub network: bool,
    #[serde(default)]
    pub restart: Restart,
    #[serde(default)]
    pub limits: Limits,
    /// The guest and its disk are removed when it has ended, unless it is started again by its policy.
    #[serde(default)]
    pub remove_when_ended: bool,
}

impl NewGuest {
    /// A guest of this image with the defaults of the API.
    pub fn of(image: &str) -> NewGuest {
        NewGuest {
            name: None,
            image: image.to_owned(),
            cpus: DEFAULT_CPUS,
            memory_mib: DEFAULT_MEMORY_MIB,
            max_memory_mib: None,
            disks: Vec::new(),
            command_line: None,
            network: true,
            restart: Restart::default(),
            limits: Limits::default(),
            remove_when_ended: false,
        }
    }
}

fn default_cpus() -> u8 {
    DEFAULT_CPUS
}

fn default_memory() -> u32 {
    DEFAULT_MEMORY_MIB
}

fn yes() -> bool {
    true
}

/// A disk of a guest beside the one that its image gave it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// No other disk's of this guest, at most [`MAX_DISK_NAME`]: the serial number that the guest sees.
    pub name: String,
    /// As the guest sees it. On the host's disk it takes what was written.
    pub size_mib: u32,
}

/// When a guest that has ended by itself is started again. One that reboots always is, and one that was stopped never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    #[default]
    No,
    /// After a crash, a panic, a fault of the VMM.
    OnFailure,
    /// Also after it powered off, and when the daemon starts on a host that was rebooted.
    Always,
}

/// What a guest's control group allows it; absent is without limit. The guest's memory has its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Of one processor: 150 is one and a half.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_percent: Option<u32>,
    /// Beside others that want the processor: 1 to 10000, 100 where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u32>,
    /// Beside others that want the disks: 1 to 10000, 100 where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_weight: Option<u32>,
}

/// Body of `PATCH /guests/{guest}`: what is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestUpdate {
    /// From the next start on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u8>,
    /// While it runs: below what it was started with by its balloon, above it up to `max_memory_mib` by memory that is
    /// plugged in. Else from the next start on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u32>,
    /// From the next start on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory_mib: Option<u32>,
    /// With all that is on them, and before others are added. A guest that runs is asked to let go of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remove_disks: Vec<String>,
    /// Empty ones, at once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub add_disks: Vec<Disk>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart: Option<Restart>,
    /// At once, also while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
}

/// Body of `POST /guests/{guest}/stop`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stop {
    /// After this time the guest is ended without being asked any more; 0 is at once.
    #[serde(default = "default_stop")]
    pub seconds: u32,
}

impl Default for Stop {
    fn default() -> Stop {
        Stop { seconds: DEFAULT_STOP_SECONDS }
    }
}

fn default_stop() -> u32 {
    DEFAULT_STOP_SECONDS
}

/// Where a guest is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It has never been started, or has ended and stays so.
    Stopped,
    /// Its process is being made.
    Starting,
    Running,
    Paused,
    /// It was asked to go down, or is being ended.
    Stopping,
    /// It has ended and will be started again at `restart_at`.
    Waiting,
    /// It is being ended and will be forgotten.
    Removing,
}

impl State {
    /// As on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Stopped => "stopped",
            State::Starting => "starting",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopping => "stopping",
            State::Waiting => "waiting",
            State::Removing => "removing",
        }
    }

    /// A process of the guest's may be there.
    pub fn has_process(self) -> bool {
        !matches!(self, State::Stopped | State::Waiting)
    }
}

/// How a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It powered off, by itself or because it was asked to.
    PoweredOff,
    /// It asked for a reset; it is started again.
    Rebooted,
    /// It was ended on request: it did not go down in time, or was not asked.
    Ended,
    /// Its kernel panicked, or it faulted three times.
    GuestCrashed,
    /// The VMM has failed or was killed from outside.
    VmmFailed,
    /// The VMM did what its cell forbids.
    JailViolated,
    /// It could not be started.
    NotStarted,
    /// The host went down while it ran, or nobody saw how it ended.
    Lost,
}

impl Outcome {
    /// As on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::PoweredOff => "powered-off",
            Outcome::Rebooted => "rebooted",
            Outcome::Ended => "ended",
            Outcome::GuestCrashed => "guest-crashed",
            Outcome::VmmFailed => "vmm-failed",
            Outcome::JailViolated => "jail-violated",
            Outcome::NotStarted => "not-started",
            Outcome::Lost => "lost",
        }
    }

    /// What the policy `on-failure` is for.
    pub fn is_failure(self) -> bool {
        !matches!(self, Outcome::PoweredOff | Outcome::Rebooted | Outcome::Ended)
    }
}

/// The last end of a guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct End {
    pub at: f64,
    pub outcome: Outcome,
    /// For a person: what the VMM or the jailer said.
    pub reason: String,
}

/// Reply of `GET /guests/{guest}`, and an item of `GET /guests`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Guest {
    /// 12 hexadecimal digits.
    pub id: String,
    pub name: String,
    pub image: String,
    /// The user who made it, by number. Only that user and root are told of it.
    pub owner: u32,
    pub state: State,
    pub cpus: u8,
    pub memory_mib: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory_mib: Option<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_line: Option<String>,
    pub network: bool,
    pub restart: Restart,
    pub limits: Limits,
    pub remove_when_ended: bool,
    pub created_at: f64,
    /// Of the run that it is in, or of the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<f64>,
    /// How often it was started again by its policy since it was last started by somebody.
    pub restarts: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_at: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_end: Option<End>,
    /// The VMM's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The user that the VMM runs as.
    pub uid: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// The guest's own API, for whoever speaks Firecracker's; the owner may use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_socket: Option<PathBuf>,
}

/// Reply of `GET /guests/{guest}/stats`, and an item of `GET /stats`: counters since its last start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    pub id: String,
    pub name: String,
    /// When it was looked at.
    pub at: f64,
    pub cpu_microseconds: u64,
    /// Of the control group: the guest's memory as far as it is used, the VMM's own, and what the host caches for it.
    pub memory_bytes: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub received_bytes: u64,
    pub sent_bytes: u64,
}

/// A line of `GET /events`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Goes up by one from event to event of one run of the daemon.
    pub number: u64,
    pub at: f64,
    /// `created`, `removed`, `ended`, or a [`State`] that the guest has now.
    pub what: String,
    pub id: String,
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<End>,
}

/// Body of `PUT /images/{image}`, which makes an image of the parts that were sent before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewImage {
    /// The kernel's, without what is added for each guest. Default: `console=ttyS0 root=/dev/vda rw panic=1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_line: Option<String>,
}

/// Reply of `GET /images/{image}`, and an item of `GET /images`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Image {
    pub name: String,
    /// The user who imported it. Root's are everybody's to use.
    pub owner: u32,
    pub command_line: String,
    pub has_initrd: bool,
    /// Of the disk as the guest sees it.
    pub disk_bytes: u64,
    /// Of all its files on the host's disk.
    pub used_bytes: u64,
    pub created_at: f64,
    /// How many guests were made of it and are there.
    pub guests: u32,
}

/// Body of replies that are lists: one field, so that more can be said later.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct List<T> {
    pub items: Vec<T>,
}

/// Why a name cannot be that of a disk.
///
/// # Errors
/// A clause that begins with the value.
pub fn check_disk_name(name: &str) -> Result<(), String> {
    check_name(name)?;
    if name == ROOT_DISK {
        return Err(format!("{name:?} is the disk that the image gave"));
    }
    if name.len() > MAX_DISK_NAME {
        return Err(format!("{name:?} has {} bytes, and a disk's name at most {MAX_DISK_NAME}", name.len()));
    }
    Ok(())
}

/// Why a name cannot be one.
///
/// # Errors
/// A clause that begins with the value.
pub fn check_name(name: &str) -> Result<(), String> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    let bytes = name.as_bytes();
    let ends_well = |end: Option<&u8>| end.is_some_and(u8::is_ascii_alphanumeric);
    if bytes.iter().all(|byte| is_allowed(*byte))
        && ends_well(bytes.first())
        && ends_well(bytes.last())
        && bytes.len() <= MAX_NAME
    {
        return Ok(());
    }
    Err(format!(
        "{name:?} is not a name: 1 to {MAX_NAME} letters, digits and hyphens, with no hyphen at its ends"
    ))
}
