//! Runs of free page hints (VIRTIO 1.3, section 5.5.6.5): which one the host asks for, and which one the guest is at.
//!
//! The host puts the number of a run into the configuration space. The guest says the number, names pages, and says that
//! it has no more; it keeps the pages until the host tells it that the run is done.

use serde::{Deserialize, Serialize};

/// Commands that are no number of a run (5.5.6.5): the guest has no more pages; the guest may use its pages again.
const STOP: u32 = 0;
const DONE: u32 = 1;
const FIRST: u32 = 2;

/// The state of hints, as it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hinting {
    /// `free_page_hint_cmd_id`
    command: u32,
    /// The number of the last run.
    last: u32,
    heard: Option<u32>,
    acknowledge: bool,
}

impl Default for Hinting {
    fn default() -> Hinting {
        Hinting { command: STOP, last: DONE, heard: None, acknowledge: false }
    }
}

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HintingStatus {
    /// What the host asks for: the number of a run, 1 when it is done, 0 before the first.
    pub host: u32,
    /// What the guest said last: the number of a run, 0 when it has no more pages; nothing yet.
    pub guest: Option<u32>,
}

impl Hinting {
    /// Asks for a run, in place of any that is not at its end.
    pub fn start(&mut self, acknowledge: bool) {
        self.last = self.last.wrapping_add(1).max(FIRST);
        self.command = self.last;
        self.acknowledge = acknowledge;
        // That the run before is at its end says nothing of this one.
        self.heard = None;
    }

    /// The run is done, as far as it came.
    pub fn stop(&mut self) {
        self.command = DONE;
    }

    /// The guest says where it is.
    pub fn heard(&mut self, command: u32) {
        if command == STOP && self.is_current() && self.acknowledge {
            self.command = DONE;
        }
        self.heard = Some(command);
    }

    /// What the guest names now belongs to the run that the host asks for.
    pub fn is_current(&self) -> bool {
        self.command >= FIRST && self.heard == Some(self.command)
    }

    /// `free_page_hint_cmd_id`
    pub fn command(&self) -> u32 {
        self.command
    }

    pub fn status(&self) -> HintingStatus {
        HintingStatus { host: self.command, guest: self.heard }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_current_from_its_number_to_its_end() {
        let mut hinting = Hinting::default();
        assert!(!hinting.is_current());
        hinting.start(false);
        assert!(!hinting.is_current());
        hinting.heard(2);
        assert!(hinting.is_current());
        hinting.heard(STOP);
        assert!(!hinting.is_current());
        assert_eq!(hinting.status(), HintingStatus { host: 2, guest: Some(STOP) });
        hinting.stop();
        assert_eq!(hinting.command(), DONE);
    }

    #[test]
    fn the_end_of_a_run_is_acknowledged_when_that_is_wanted_and_no_other_was_begun() {
        let mut hinting = Hinting::default();
        hinting.start(true);
        hinting.heard(2);
        hinting.start(true);
        hinting.heard(STOP);
        assert_eq!(hinting.command(), 3, "that was the end of the run before");
        hinting.heard(3);
        hinting.heard(STOP);
        assert_eq!(hinting.command(), DONE);
    }

    #[test]
    fn a_guest_that_makes_up_commands_has_no_run() {
        let mut hinting = Hinting::default();
        for command in [0, 1, 2, u32::MAX] {
            hinting.heard(command);
            assert!(!hinting.is_current());
        }
        hinting.start(true);
        hinting.stop();
        hinting.heard(DONE);
        assert!(!hinting.is_current());
    }

    #[test]
    fn numbers_of_runs_never_become_one_of_the_two_that_are_none() {
        let mut hinting = Hinting { last: u32::MAX, ..Hinting::default() };
        hinting.start(false);
        assert_eq!(hinting.command(), FIRST);
    }
}
