//! What is written down of a guest: one JSON file, which a person can read and a later release too.

use std::net::Ipv4Addr;

use api_socket::fleet::{Disk, End, Limits, NewGuest, ROOT_DISK, Restart};
use serde::{Deserialize, Serialize};

use crate::state::{Policy, State};

/// Of the file's form; what is newer than this program is not touched.
pub const FORMAT: u32 = 1;

/// Memory that comes while a guest runs does so in blocks of this size, in MiB, within slots of that (docs/memory.md).
pub const BLOCK_MIB: u32 = 2;
pub const SLOT_MIB: u32 = 128;

/// Everything that must outlive the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub format: u32,
    pub id: String,
    pub name: String,
    pub owner: u32,
    pub created_at: f64,
    pub image: String,
    pub cpus: u8,
    pub memory_mib: u32,
    /// What it may have while it runs; it never has less than `memory_mib`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory_mib: Option<u32>,
    /// Of the disk that its image gave it, as it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root_bytes: Option<u64>,
    /// Beside the one of its image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_line: Option<String>,
    #[serde(default)]
    pub restart: Restart,
    #[serde(default)]
    pub limits: Limits,
    #[serde(default)]
    pub remove_when_ended: bool,
    /// The user of its VMM, no other guest's.
    pub uid: u32,
    /// Its address, no other guest's; none without a network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,

    pub state: State,
    /// The VMM, or the jailer that becomes it. Absent while it is being made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<Process>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<f64>,
    /// The host's run that its last run began in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// What it was started with, in MiB, while it has a process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_memory_mib: Option<u32>,
    /// Starts by policy since somebody started it.
    #[serde(default)]
    pub restarts: u32,
    /// Of these, in a row without a long run.
    #[serde(default)]
    pub streak: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_at: Option<f64>,
    /// When it is ended if it has not gone down, while it is being stopped: in seconds since the host's start, a clock that nobody
    /// sets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_at: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_end: Option<End>,
    /// `last_end` is of this run, which has ended and is not cleared away yet.
    #[serde(default)]
    pub is_end_told: bool,
}

/// A process for all time: its number is given to others, but not in the same tick of the same run of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: u32,
    /// Field 22 of proc_pid_stat(5): ticks from the host's start to the process's.
    pub start_ticks: u64,
    /// /proc/sys/kernel/random/boot_id
    pub boot_id: String,
}

impl Record {
    /// A guest that was never started.
    pub fn new(
        id: String,
        name: String,
        owner: u32,
        uid: u32,
        address: Option<Ipv4Addr>,
        now: f64,
        new: NewGuest,
    ) -> Record {
        Record {
            format: FORMAT,
            id,
            name,
            owner,
            created_at: now,
            image: new.image,
            cpus: new.cpus,
            memory_mib: new.memory_mib,
            max_memory_mib: new.max_memory_mib,
            root_bytes: None,
            disks: new.disks,
            command_line: new.command_line,
            restart: new.restart,
            limits: new.limits,
            remove_when_ended: new.remove_when_ended,
            uid,
            address,
            state: State::Stopped,
            process: None,
            started_at: None,
            boot_id: None,
            started_memory_mib: None,
            restarts: 0,
            streak: 0,
            restart_at: None,
            stop_at: None,
            last_end: None,
            is_end_told: false,
        }
    }

    /// What [`crate::state::next`] is to know.
    pub fn policy(&self) -> Policy {
        Policy { restart: self.restart, remove_when_ended: self.remove_when_ended, streak: self.streak }
    }

    /// How much memory can be plugged in while it runs, in MiB and whole slots: of one that runs, or at its next start.
    pub fn room_mib(&self) -> u32 {
        let first = self.started_memory_mib.unwrap_or(self.memory_mib);
        self.max_memory_mib.unwrap_or(first).saturating_sub(first).next_multiple_of(SLOT_MIB)
    }

    /// Its disks, the root's first.
    pub fn disk_names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(ROOT_DISK).chain(self.disks.iter().map(|disk| disk.name.as_str()))
    }

    /// What a disk had when it was made, where that is known.
    pub fn disk_bytes(&self, name: &str) -> Option<u64> {
        match name {
            ROOT_DISK => self.root_bytes,
            name => {
                self.disks.iter().find(|disk| disk.name == name).map(|disk| u64::from(disk.size_mib) << 20)
            }
        }
    }

    /// Made of its id: a locally administered address that no other guest of this host has.
    pub fn mac(&self) -> String {
        let digits = self.id.get(..10).unwrap_or("0000000000");
        let pairs: Vec<_> = (0..5).filter_map(|at| digits.get(at * 2..at * 2 + 2)).collect();
        format!("06:{}", pairs.join(":"))
    }
}
