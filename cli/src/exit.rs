//! What the exit codes of `berth` mean. Scripts rely on them: a code keeps its meaning.

use std::process::ExitCode;

/// How `berth` ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Ok,
    /// berthd or this host refused, or something failed.
    Failed,
    /// The command line is not understood.
    Usage,
    /// berthd is not reachable.
    Unreachable,
    /// `run` and `exec`: not the command failed, we did.
    Own,
    /// `run` and `exec`: the command is there and cannot be executed.
    NotExecutable,
    /// `run` and `exec`: there is no such command.
    NotFound,
    /// `run` and `exec`: what the command ended with.
    Command(u8),
    /// The signal that ended us; with `run` and `exec`, the command. SIGPIPE where nobody reads what we say.
    Signal(u8),
}

/// The table that the help and docs/cli.md show.
pub const TABLE: [(&str, &str); 10] = [
    ("0", "done"),
    ("1", "refused or failed; the message says why and what to do"),
    ("2", "the command line is not understood"),
    ("3", "berthd is not reachable"),
    ("0 to 255", "run and exec: what the command in the guest ended with"),
    ("125", "run and exec: berth itself failed, whatever the reason"),
    ("126", "run and exec: the command cannot be executed"),
    ("127", "run and exec: there is no such command in the guest"),
    ("128 + N", "run and exec: signal N ended the command; all: signal N ended berth"),
    ("141", "standard output is no longer read"),
];

/// What a shell adds to a signal's number.
const SIGNALLED: u8 = 128;

impl Exit {
    /// As a shell gives the end by a signal.
    pub fn signal(signal: i32) -> Exit {
        Exit::Signal(u8::try_from(signal).unwrap_or(u8::MAX))
    }

    pub fn code(self) -> u8 {
        match self {
            Exit::Ok => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::Unreachable => 3,
            Exit::Own => 125,
            Exit::NotExecutable => 126,
            Exit::NotFound => 127,
            Exit::Command(code) => code,
            Exit::Signal(signal) => SIGNALLED.saturating_add(signal),
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_that_scripts_rely_on() {
        let codes = [
            (Exit::Ok, 0),
            (Exit::Failed, 1),
            (Exit::Usage, 2),
            (Exit::Unreachable, 3),
            (Exit::Own, 125),
            (Exit::NotExecutable, 126),
            (Exit::NotFound, 127),
            (Exit::Command(0), 0),
            (Exit::Command(255), 255),
            (Exit::Signal(9), 137),
            (Exit::Signal(15), 143),
        ];
        for (exit, code) in codes {
            assert_eq!(exit.code(), code, "{exit:?}");
        }
    }

    #[test]
    fn every_code_of_ours_is_in_the_table() {
        let own = [Exit::Ok, Exit::Failed, Exit::Usage, Exit::Unreachable, Exit::Own, Exit::NotExecutable];
        for exit in own.into_iter().chain([Exit::NotFound]) {
            assert!(TABLE.iter().any(|(code, _)| *code == exit.code().to_string()), "{exit:?}");
        }
    }
}
