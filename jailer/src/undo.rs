//! Taking back what a start made, when one of its steps fails.

use std::fs::File;

use crate::cgroup;
use crate::claim::Claim;
use crate::error::{Error, Result};
use crate::mounts;

/// What there is to take back; `main` fills it as it goes.
#[derive(Debug, Default)]
pub struct Undo {
    pub claim: Option<Claim>,
    /// The `cgroup.procs` of the groups that we were in before.
    pub ways_back: Vec<File>,
    /// Whether the root of the cell is ours.
    pub is_in_cell: bool,
}

impl Undo {
    /// Takes it back, and adds to `error` what could not be. Of the processes of a start, only the one that its caller
    /// waits for does so: it sees the others end.
    pub fn after(self, error: Error) -> Error {
        match self.take_back() {
            Ok(()) => error,
            Err(left) => Error::Refused(format!(
                "{error}; and what was made could not all be removed, which the next start with this --id tries again: {left}"
            )),
        }
    }

    fn take_back(self) -> Result<()> {
        // A process that is in a group keeps it, and a mount the directory that it is on.
        cgroup::leave(&self.ways_back)?;
        if self.is_in_cell {
            mounts::loosen()?;
        }
        self.claim.map_or(Ok(()), Claim::take_back)
    }
}
