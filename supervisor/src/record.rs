//! What is written down of a guest: one JSON file, which a person can read and a later release too.

use std::net::Ipv4Addr;

use api_socket::fleet::{End, Limits, NewGuest, Restart};
use serde::{Deserialize, Serialize};

use crate::state::{Policy, State};

/// Of the file's form; what is newer than this program is not touched.
pub const FORMAT: u32 = 1;

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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_end: Option<End>,
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
            command_line: new.command_line,
            restart: new.restart,
            limits: new.limits,
            remove_when_ended: new.remove_when_ended,
            uid,
            address,
            state: State::Stopped,
            process: None,
            started_at: None,
            started_memory_mib: None,
            restarts: 0,
            streak: 0,
            restart_at: None,
            last_end: None,
        }
    }

    /// What [`crate::state::next`] is to know.
    pub fn policy(&self) -> Policy {
        Policy { restart: self.restart, remove_when_ended: self.remove_when_ended, streak: self.streak }
    }

    /// Made of its id: a locally administered address that no other guest of this host has.
    pub fn mac(&self) -> String {
        let digits = self.id.get(..10).unwrap_or("0000000000");
        let pairs: Vec<_> = (0..5).filter_map(|at| digits.get(at * 2..at * 2 + 2)).collect();
        format!("06:{}", pairs.join(":"))
    }
}
