//! pvpanic: one port through which a guest kernel tells that it panicked (QEMU, docs/specs/pvpanic).
//!
//! Does not offer the "crash kernel loaded" and "shutdown" events: nothing here would act on them.

use crate::bus::{BusDevice, Effect};

/// How many ports it answers at.
pub const LEN: u64 = 1;

const PANICKED: u8 = 1 << 0;

/// The device; it has no state.
#[derive(Debug, Default)]
pub struct PvPanic;

impl BusDevice for PvPanic {
    /// The events that the device understands.
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(byte) = data.first_mut() {
            *byte = PANICKED;
        }
    }

    fn write(&mut self, _: u64, data: &[u8]) -> Effect {
        match data.first() {
            Some(byte) if byte & PANICKED != 0 => Effect::Panicked,
            _ => Effect::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_reported_and_other_events_are_not() {
        let mut byte = [0];
        PvPanic.read(0, &mut byte);
        assert_eq!(byte, [1], "only the panic event is offered");
        assert_eq!(PvPanic.write(0, &[1]), Effect::Panicked);
        assert_eq!(PvPanic.write(0, &[3]), Effect::Panicked);
        assert_eq!(PvPanic.write(0, &[2]), Effect::None);
        assert_eq!(PvPanic.write(0, &[]), Effect::None);
    }
}
