//! Address ranges and what answers there: one [`Bus`] for ports, one for memory-mapped I/O. Built once by the VMM, then
//! shared by all vCPU threads.
//!
//! Does not route PCI: the host bridge claims its windows here and finds the function itself, so that a moved BAR never
//! changes a bus.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Something that answers reads and writes in a range. `offset` counts from the start of the range; `data` is 1, 2, 4 or
/// 8 bytes, little-endian, and never crosses the end of the range.
pub trait BusDevice: Send {
    /// Fills `data`. What is not there reads as the chip says; the bus fills ones where nothing answers.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes `data`, and says what it does to the machine as a whole.
    fn write(&mut self, offset: u64, data: &[u8]) -> Effect;
}

/// What a write by the guest means for the machine as a whole; the vCPU that wrote stops on anything but `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    None,
    /// The guest asked for a reset (reboot).
    Reset,
    /// The guest switched itself off.
    PowerOff,
    /// The guest told of a kernel panic (pvpanic).
    Panicked,
}

/// Why a range was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    #[error("the range {base:#x}+{len:#x} is empty or wraps around")]
    Range { base: u64, len: u64 },
    #[error("the range {base:#x}+{len:#x} overlaps one at {other:#x}")]
    Overlap { base: u64, len: u64, other: u64 },
}

/// Ranges sorted by base address.
#[derive(Default)]
pub struct Bus {
    ranges: BTreeMap<u64, Range>,
}

struct Range {
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

impl Bus {
    /// Lets `device` answer for `len` addresses from `base`.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), BusError> {
        let last =
            len.checked_sub(1).and_then(|l| base.checked_add(l)).ok_or(BusError::Range { base, len })?;
        if let Some((&other, range)) = self.ranges.range(..=last).next_back()
            && other + (range.len - 1) >= base
        {
            return Err(BusError::Overlap { base, len, other });
        }
        self.ranges.insert(base, Range { len, device });
        Ok(())
    }

    /// Fills `data` from whatever answers at `address`; all ones where nothing does.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Gives `data` to whatever answers at `address`; lost where nothing does, as on a real bus.
    pub fn write(&self, address: u64, data: &[u8]) -> Effect {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data)
            }
            None => Effect::None,
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, &Mutex<dyn BusDevice>)> {
        let (base, range) = self.ranges.range(..=address).next_back()?;
        let offset = address - base;
        let end = offset.checked_add(len as u64)?;
        (end <= range.len).then_some((offset, &*range.device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }
        fn write(&mut self, _: u64, data: &[u8]) -> Effect {
            self.0 = data[0];
            Effect::Reset
        }
    }

    fn echo(value: u8) -> Arc<Mutex<dyn BusDevice>> {
        Arc::new(Mutex::new(Echo(value)))
    }

    #[test]
    fn an_access_reaches_the_device_that_owns_the_whole_of_it() {
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, echo(1)).unwrap();
        bus.insert(0x110, 0x10, echo(0x40)).unwrap();
        let mut byte = [0];
        bus.read(0x105, &mut byte);
        assert_eq!(byte, [6]);
        bus.read(0x110, &mut byte);
        assert_eq!(byte, [0x40]);
        let mut word = [0; 4];
        bus.read(0x10e, &mut word);
        assert_eq!(word, [0xff; 4], "an access that crosses the end belongs to nobody");
        assert_eq!(bus.write(0x100, &[9]), Effect::Reset);
        bus.read(0x100, &mut byte);
        assert_eq!(byte, [9]);
    }

    #[test]
    fn nothing_answers_with_ones_and_swallows_writes() {
        let bus = Bus::default();
        let mut word = [0; 8];
        bus.read(u64::MAX, &mut word);
        assert_eq!(word, [0xff; 8]);
        assert_eq!(bus.write(u64::MAX, &[1]), Effect::None);
    }

    #[test]
    fn overlapping_and_wrapping_ranges_are_refused() {
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, echo(1)).unwrap();
        for (base, len) in [(0x100, 1), (0x10f, 1), (0xf0, 0x11), (0x0, 0x1000)] {
            assert_eq!(bus.insert(base, len, echo(2)), Err(BusError::Overlap { base, len, other: 0x100 }));
        }
        for (base, len) in [(0, 0), (u64::MAX, 2)] {
            assert_eq!(bus.insert(base, len, echo(2)), Err(BusError::Range { base, len }));
        }
    }
}
