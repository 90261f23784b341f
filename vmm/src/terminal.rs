//! Standard input as the guest's serial console: raw while the guest runs, so that every key reaches it, and as it was
//! before when the process ends.

use std::io::{self, IsTerminal, Stdin};
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::terminal::Terminal as _;

/// Standard input; dropping it gives the terminal its line editing back.
pub struct Input {
    stdin: Stdin,
    raw: bool,
}

impl Input {
    /// Standard input as it is.
    pub fn new() -> Self {
        Self { stdin: io::stdin(), raw: false }
    }

    /// From here on keys go through one by one, Ctrl-C included. Nothing to do where standard input is no terminal.
    pub fn set_raw(&mut self) {
        if !self.stdin.is_terminal() || self.raw {
            return;
        }
        match self.stdin.lock().set_raw_mode() {
            Ok(()) => self.raw = true,
            Err(error) => log::warn!("the terminal cannot be set to raw mode: {error}"),
        }
    }

    /// At most `limit` bytes of what is there; empty at the end of input. Only when readable, or it blocks.
    pub fn read(&mut self, limit: usize) -> io::Result<Vec<u8>> {
        let mut chunk = vec![0; limit];
        // Past the buffer of `Stdin`: bytes kept there would not wake the loop again.
        let got = self.stdin.lock().read_raw(&mut chunk)?;
        chunk.truncate(got);
        Ok(chunk)
    }
}

impl Default for Input {
    fn default() -> Self {
        Self::new()
    }
}

impl AsRawFd for Input {
    fn as_raw_fd(&self) -> RawFd {
        self.stdin.as_raw_fd()
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        if self.raw {
            let _ = self.stdin.lock().set_canon_mode();
        }
    }
}
