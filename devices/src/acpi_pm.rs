//! The fixed registers of a hardware-reduced ACPI machine (ACPI 6.5, section 4.1), and the event register that its Generic
//! Event Device reads (section 5.6.9), as one block of ports.
//!
//! The constants below are the layout; the ACPI tables are generated from them. Does not sleep: the only sleep state
//! is S5, power-off. There is no PM timer, no general-purpose event block and no SMI command port, as hardware-reduced
//! machines have none.
//!
//! | offset | width | register |
//! |---|---|---|
//! | 0 | 1 | SLEEP_CONTROL (section 4.8.3.7) |
//! | 1 | 1 | SLEEP_STATUS (section 4.8.3.8) |
//! | 2 | 1 | RESET (section 4.8.3.6) |
//! | 4 | 4 | events: a bit for each that is pending; reading clears what was read |

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{BusDevice, Effect};

/// How many ports the block takes.
pub const LEN: u64 = 8;

/// FADT SLEEP_CONTROL_REG: writing [`SLP_EN`] with [`S5_SLP_TYP`] switches the machine off.
pub const SLEEP_CONTROL: u64 = 0;
/// FADT SLEEP_STATUS_REG: nothing ever wakes this machine, so WAK_STS reads 0.
pub const SLEEP_STATUS: u64 = 1;
/// FADT RESET_REG, to be written with [`RESET_VALUE`].
pub const RESET: u64 = 2;
/// The 32-bit register that the Generic Event Device's _EVT reads.
pub const EVENTS: u64 = 4;

/// What \_S5 returns, shifted by [`SLP_TYP_SHIFT`] in SLEEP_CONTROL.
pub const S5_SLP_TYP: u8 = 5;
pub const SLP_TYP_SHIFT: u8 = 2;
pub const SLP_TYP_MASK: u8 = 0b111 << SLP_TYP_SHIFT;
/// Enter the sleep state that SLP_TYP names.
pub const SLP_EN: u8 = 1 << 5;

/// FADT RESET_VALUE.
pub const RESET_VALUE: u8 = 1;

/// Event: the power button (PNP0C0C) was pressed.
pub const EVENT_POWER_BUTTON: u32 = 1 << 0;
/// Event: the VM generation id has changed.
pub const EVENT_GENERATION: u32 = 1 << 1;
/// Event: a register of [`crate::pci::hotplug`] has something to tell.
pub const EVENT_PCI: u32 = 1 << 2;

/// The register block on its bus.
pub struct AcpiPm {
    /// The Generic Event Device's interrupt line (edge).
    interrupt: EventFd,
    events: u32,
}

/// Events the guest has not read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub events: u32,
}

impl AcpiPm {
    pub fn new(interrupt: EventFd, state: Option<State>) -> Self {
        Self { interrupt, events: state.unwrap_or_default().events }
    }

    /// As a person would press it: an operating system that listens shuts down in good order.
    pub fn press_power_button(&mut self) {
        self.notify(EVENT_POWER_BUTTON);
    }

    /// Makes `events` pending and tells the guest, again even when they are pending already: an edge is lost while the
    /// guest has not yet set up its interrupt controller.
    pub fn notify(&mut self, events: u32) {
        self.events |= events;
        // An eventfd refuses only when its counter is at its end: raised already.
        let _ = self.interrupt.write(1);
    }

    /// Raises again what there is reason for, when the guest goes on: an edge may have got lost in a save.
    pub fn resume(&mut self) {
        if self.events != 0 {
            self.notify(0);
        }
    }

    pub fn save(&self) -> State {
        State { events: self.events }
    }

    fn read_byte(&mut self, offset: u64) -> u8 {
        match offset {
            EVENTS..LEN => {
                let shift = 8 * (offset - EVENTS) as u32;
                let byte = (self.events >> shift) as u8;
                self.events &= !(0xff << shift);
                byte
            }
            _ => 0,
        }
    }
}

impl BusDevice for AcpiPm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.read_byte(offset.wrapping_add(i as u64));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let s5 = SLP_EN | S5_SLP_TYP << SLP_TYP_SHIFT;
        match (offset, data.first()) {
            (SLEEP_CONTROL, Some(value)) if value & (SLP_EN | SLP_TYP_MASK) == s5 => Effect::PowerOff,
            (RESET, Some(&RESET_VALUE)) => Effect::Reset,
            _ => Effect::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block() -> (AcpiPm, EventFd) {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (AcpiPm::new(interrupt.try_clone().unwrap(), None), interrupt)
    }

    fn events(block: &mut AcpiPm) -> u32 {
        let mut data = [0xee; 4];
        block.read(EVENTS, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn only_sleep_type_5_with_the_enable_bit_switches_off() {
        let (mut block, _) = block();
        for value in 0..=u8::MAX {
            let off = value & SLP_EN != 0 && (value >> 2) & 7 == 5;
            let effect = if off { Effect::PowerOff } else { Effect::None };
            assert_eq!(block.write(SLEEP_CONTROL, &[value]), effect, "{value:#x}");
        }
    }

    #[test]
    fn only_the_reset_value_resets() {
        let (mut block, _) = block();
        assert_eq!(block.write(RESET, &[0]), Effect::None);
        assert_eq!(block.write(RESET, &[RESET_VALUE]), Effect::Reset);
    }

    #[test]
    fn a_pressed_button_interrupts_and_its_event_is_read_once() {
        let (mut block, interrupt) = block();
        block.press_power_button();
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(events(&mut block), EVENT_POWER_BUTTON);
        assert_eq!(events(&mut block), 0);
    }

    #[test]
    fn a_second_press_interrupts_again_when_the_first_was_never_read() {
        let (mut block, interrupt) = block();
        block.press_power_button();
        interrupt.read().unwrap();
        block.press_power_button();
        assert_eq!(interrupt.read().unwrap(), 1);
    }

    #[test]
    fn events_survive_a_save() {
        let (mut block, interrupt) = block();
        block.notify(EVENT_GENERATION | EVENT_POWER_BUTTON);
        interrupt.read().unwrap();
        let mut restored = AcpiPm::new(interrupt.try_clone().unwrap(), Some(block.save()));
        restored.resume();
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(events(&mut restored), EVENT_GENERATION | EVENT_POWER_BUTTON);
        restored.resume();
        assert!(interrupt.read().is_err(), "there is nothing left");
    }

    #[test]
    fn a_narrow_read_clears_only_what_it_read() {
        let (mut block, _) = block();
        block.notify(0x0101_0101);
        let mut byte = [0];
        block.read(EVENTS + 1, &mut byte);
        assert_eq!(byte, [1]);
        assert_eq!(events(&mut block), 0x0101_0001);
    }

    #[test]
    fn any_access_is_survived() {
        let (mut block, _) = block();
        for offset in (0..16).chain([u64::MAX - 7, u64::MAX]) {
            for width in [0, 1, 2, 4, 8] {
                let mut data = [0; 8];
                block.read(offset, &mut data[..width]);
                assert_eq!(block.write(offset, &data[..width]), Effect::None);
            }
        }
    }
}
