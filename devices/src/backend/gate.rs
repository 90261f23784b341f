//! A descriptor that is watched only while its owner wants to hear of it: behind an epoll descriptor of our own, from
//! which it is taken, and to which it is put back, while the loop goes on watching that one.
//!
//! What is readable and cannot be read now would call its owner for ever otherwise.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// The watch of one descriptor, closed at first.
pub struct Gate {
    epoll: Epoll,
    is_open: bool,
}

impl Gate {
    /// A closed gate.
    pub fn new() -> io::Result<Gate> {
        Ok(Gate { epoll: Epoll::new()?, is_open: false })
    }

    /// Readable when the gate is open and what is behind it is.
    pub fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Watches `source` from now on: the same one as long as the gate lives. Nothing to do when open.
    pub fn open(&mut self, source: &impl AsRawFd) {
        if self.is_open {
            return;
        }
        let event = EpollEvent::new(EventSet::IN, 0);
        match self.epoll.ctl(ControlOperation::Add, source.as_raw_fd(), event) {
            Ok(()) => self.is_open = true,
            Err(error) => log::error!("descriptor {} cannot be watched: {error}", source.as_raw_fd()),
        }
    }

    /// Watches `source` no longer. Nothing to do when closed.
    pub fn close(&mut self, source: &impl AsRawFd) {
        if self.is_open {
            // It was added, so it can be deleted.
            let _ = self.epoll.ctl(ControlOperation::Delete, source.as_raw_fd(), EpollEvent::default());
            self.is_open = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn is_ready(gate: &Gate) -> bool {
        let outer = Epoll::new().unwrap();
        outer.ctl(ControlOperation::Add, gate.fd(), EpollEvent::new(EventSet::IN, 0)).unwrap();
        outer.wait(0, &mut [EpollEvent::default()]).unwrap() == 1
    }

    #[test]
    fn only_an_open_gate_tells_of_what_is_behind_it() {
        let (reader, mut writer) = io::pipe().unwrap();
        let mut gate = Gate::new().unwrap();
        writer.write_all(b"x").unwrap();
        assert!(!is_ready(&gate));
        for _ in 0..2 {
            gate.open(&reader);
            gate.open(&reader);
            assert!(is_ready(&gate));
            gate.close(&reader);
            gate.close(&reader);
            assert!(!is_ready(&gate));
        }
    }
}
