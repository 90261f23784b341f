//! The terminal that berth-host was called from: its size, and raw mode for as long as a command has its keys.

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::wire::Size;

/// Raw mode on standard input; the former mode comes back when this is dropped.
#[derive(Debug)]
pub struct RawMode {
    former: Termios,
}

impl RawMode {
    /// Nothing when standard input is no terminal.
    pub fn enter() -> Option<Self> {
        let former = tcgetattr(rustix::stdio::stdin()).ok()?;
        let mut raw = former.clone();
        raw.make_raw();
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw).ok()?;
        Some(Self { former })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal may be gone, and then has no mode to restore.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.former);
    }
}

/// The terminal's size; 24 lines of 80 characters when standard input is none.
pub fn size() -> Size {
    match tcgetwinsize(rustix::stdio::stdin()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => Size { rows: size.ws_row, columns: size.ws_col },
        _ => Size { rows: 24, columns: 80 },
    }
}
