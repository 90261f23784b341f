//! What a VMM holds in memory beyond its guest's, as the kernel counts it.
//!
//! Linux only, from /proc/PID/smaps. Memory that the kernel uses for a process (page tables, KVM's own) is not in there.

use std::fmt;
use std::fs;

use crate::host::error::{Doing, Error, Result};

/// Memory of a process, guest memory aside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Resident: with the pages of its program and its libraries, which other processes may share.
    pub rss_kib: u64,
    /// Resident, and mapped by no other process.
    pub private_kib: u64,
    /// Resident, and in no file: heap, stacks and buffers.
    pub anonymous_kib: u64,
}

/// A guest's memory may be mapped with a little more at its end.
const SLACK_KIB: u64 = 1024;

/// Memory that comes and goes does so in slots of this size, if no other is asked for. Nothing else of a VMM is so large.
const SLOT_KIB: u64 = 128 << 10;

impl Footprint {
    /// Of a VMM with one guest whose memory is in one piece of `guest_mib`.
    ///
    /// # Errors
    /// The process is gone, or does not have exactly one mapping that can be the guest's memory.
    pub fn beyond_guest(pid: u32, guest_mib: u64) -> Result<Footprint> {
        Footprint::beyond_guest_that_grows(pid, guest_mib, 0)
    }

    /// Of one that may have so much plugged beside, in slots of [`SLOT_KIB`], which lie side by side in a mapping or several.
    ///
    /// # Errors
    /// As [`Footprint::beyond_guest`].
    pub fn beyond_guest_that_grows(pid: u32, guest_mib: u64, pluggable_mib: u64) -> Result<Footprint> {
        let path = format!("/proc/{pid}/smaps");
        let smaps = fs::read_to_string(&path).doing(|| format!("cannot read {path}"))?;
        Footprint::in_smaps(&smaps, guest_mib, pluggable_mib).doing(|| path)
    }

    fn in_smaps(smaps: &str, guest_mib: u64, pluggable_mib: u64) -> Result<Footprint> {
        let guest_kib = guest_mib << 10..=(guest_mib << 10) + SLACK_KIB;
        let mut mappings = mappings(smaps);
        // What is out of reach keeps its addresses, and has no pages.
        mappings.retain(|mapping| {
            let is_slots = mapping.size_kib.is_multiple_of(SLOT_KIB) && mapping.size_kib > 0;
            let is_plugged = is_slots && mapping.size_kib <= pluggable_mib << 10;
            !(mapping.is_writable && is_plugged && !guest_kib.contains(&mapping.size_kib))
        });
        let (guest, own): (Vec<_>, Vec<_>) =
            mappings.iter().partition(|mapping| mapping.is_writable && guest_kib.contains(&mapping.size_kib));
        match guest.len() {
            1 => Ok(own.iter().fold(Footprint::default(), |sum, mapping| sum.plus(&mapping.resident))),
            count => Err(Error(format!("{count} mappings of {guest_mib} MiB, not one"))),
        }
    }

    fn plus(self, other: &Footprint) -> Footprint {
        Footprint {
            rss_kib: self.rss_kib + other.rss_kib,
            private_kib: self.private_kib + other.private_kib,
            anonymous_kib: self.anonymous_kib + other.anonymous_kib,
        }
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Footprint { rss_kib, private_kib, anonymous_kib } = self;
        write!(f, "{rss_kib} KiB resident, {private_kib} KiB private, {anonymous_kib} KiB anonymous")
    }
}

#[derive(Debug, Default)]
struct Mapping {
    is_writable: bool,
    size_kib: u64,
    resident: Footprint,
}

/// proc_pid_smaps(5): a line such as `7f00-7f10 rw-p 0 0:0 0 [heap]`, then lines such as `Rss:  4 kB`.
fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (first, second) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        match first.strip_suffix(':') {
            None => mappings.push(Mapping { is_writable: second.contains('w'), ..Mapping::default() }),
            Some(name) => {
                if let (Some(mapping), Ok(kib)) = (mappings.last_mut(), second.parse()) {
                    mapping.add(name, kib);
                }
            }
        }
    }
    mappings
}

impl Mapping {
    fn add(&mut self, name: &str, kib: u64) {
        match name {
            "Size" => self.size_kib = kib,
            "Rss" => self.resident.rss_kib = kib,
            "Private_Clean" | "Private_Dirty" | "Private_Hugetlb" => self.resident.private_kib += kib,
            "Anonymous" => self.resident.anonymous_kib = kib,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROGRAM: &str = "\
00400000-00500000 r-xp 00000000 fe:00 12 /build/berth-vmm
Size:               1024 kB
Rss:                 600 kB
Private_Clean:       500 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
00700000-00720000 rw-p 00000000 00:00 0  [heap]
Size:                128 kB
Rss:                  40 kB
Private_Clean:         0 kB
Private_Dirty:        40 kB
Anonymous:            40 kB
";
    const GUEST: &str = "\
7f0000000000-7f0008000000 rw-p 00000000 00:00 0
Size:             131072 kB
Rss:               90000 kB
Private_Dirty:     90000 kB
Anonymous:         90000 kB
";
    const RESERVED: &str = "\
7e0000000000-7e0008000000 ---p 00000000 00:00 0
Size:             131072 kB
Rss:                   0 kB
";

    #[test]
    fn all_but_the_guests_memory_is_summed() {
        let footprint = Footprint::in_smaps(&[PROGRAM, GUEST, RESERVED].concat(), 128, 0).unwrap();
        assert_eq!(footprint, Footprint { rss_kib: 640, private_kib: 540, anonymous_kib: 40 });
    }

    const PLUGGED: &str = "\
7d0000000000-7d0010000000 rw-p 00000000 00:00 0
Size:             262144 kB
Rss:              200000 kB
Private_Dirty:    200000 kB
Anonymous:        200000 kB
";

    #[test]
    fn what_is_plugged_is_the_guests_too() {
        let smaps = [PLUGGED, PROGRAM, GUEST].concat();
        let own = Footprint { rss_kib: 640, private_kib: 540, anonymous_kib: 40 };
        assert_eq!(Footprint::in_smaps(&smaps, 128, 256).unwrap(), own);
        let all = Footprint::in_smaps(&smaps, 128, 0).unwrap();
        assert_eq!(all.rss_kib, 200_640, "nothing was to be plugged");
    }

    #[test]
    fn what_may_or_may_not_be_guest_memory_is_an_error() {
        for smaps in [PROGRAM.to_owned(), [GUEST, PROGRAM, GUEST].concat()] {
            let error = Footprint::in_smaps(&smaps, 128, 0).unwrap_err();
            assert!(error.to_string().contains("not one"), "{error}");
        }
    }

    #[test]
    fn this_process_has_no_guest() {
        assert!(Footprint::beyond_guest(std::process::id(), 3 << 20).is_err());
    }
}
