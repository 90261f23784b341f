//! By what a guest's ACPI learns that a function has come or is to go, and says that it has let go of one: a bit for each
//! slot, in registers that are one block of ports. The methods that use them are in the guest's tables.
//!
//! Plugs nothing in and takes nothing apart, and does not raise the interrupt that makes a guest look. Only what a guest
//! was asked for can it take off the bus: whoever owns the function finds it in [`Hotplug::take_gone`].
//!
//! | offset | width | register |
//! |---|---|---|
//! | 0 | 4 | changed: slots into which a function has come; reading clears what was read |
//! | 4 | 4 | wanted: slots of which the guest is asked to let go; reading clears what was read |
//! | 8 | 4 | eject: writing a bit lets go of a slot, if that was asked for |

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{BusDevice, Effect};
use crate::pci::root::{Root, SLOTS};

/// How many ports the block takes.
pub const LEN: u64 = 12;

pub const CHANGED: u64 = 0;
pub const WANTED: u64 = 4;
pub const EJECT: u64 = 8;

/// What a slot's object is notified with: look whether something has come (ACPI 6.5, table 5.183).
pub const DEVICE_CHECK: u8 = 1;
/// Let go of what is there.
pub const EJECT_REQUEST: u8 = 3;

const _: () = assert!(SLOTS == u32::BITS as usize);

/// The register block on its bus.
pub struct Hotplug {
    root: Arc<Root>,
    /// Signalled when the guest has let go of a function.
    attention: EventFd,
    state: State,
    /// Slots that are off the bus, until somebody asks.
    gone: u32,
}

/// What the guest has not read or not done yet: a bit for each slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    changed: u32,
    wanted: u32,
    leaving: u32,
}

impl Hotplug {
    /// For the slots of `root`.
    pub fn new(root: Arc<Root>, attention: EventFd, state: Option<State>) -> Hotplug {
        Hotplug { root, attention, state: state.unwrap_or_default(), gone: 0 }
    }

    /// A function has come into `slot`. Interrupt the guest afterwards.
    pub fn came(&mut self, slot: usize) {
        self.state.changed |= bit(slot);
        self.state.wanted &= !bit(slot);
    }

    /// Asks the guest to let go of `slot`; false when it has been asked before and has not done so. Interrupt the guest
    /// afterwards.
    pub fn ask(&mut self, slot: usize) -> bool {
        if self.gone & bit(slot) != 0 {
            // It has done so just now. What comes next into the slot was not asked for.
            return true;
        }
        let is_new = self.state.leaving & bit(slot) == 0;
        self.state.wanted |= bit(slot);
        self.state.leaving |= bit(slot);
        is_new
    }

    /// The slots that the guest has let go of since the last call. What was there is off the bus already.
    pub fn take_gone(&mut self) -> Vec<usize> {
        let gone = std::mem::take(&mut self.gone);
        (0..SLOTS).filter(|slot| gone & bit(*slot) != 0).collect()
    }

    /// There is something that the guest has not read.
    pub fn is_pending(&self) -> bool {
        self.state.changed | self.state.wanted != 0
    }

    pub fn save(&self) -> State {
        self.state
    }

    fn eject(&mut self, slots: u32) {
        let slots = slots & self.state.leaving;
        self.state.leaving &= !slots;
        self.state.wanted &= !slots;
        for slot in (0..SLOTS).filter(|slot| slots & bit(*slot) != 0) {
            self.root.let_go(slot);
        }
        self.gone |= slots;
        if slots != 0 {
            // An eventfd refuses only when its counter is at its end: signalled already.
            let _ = self.attention.write(1);
        }
    }

    fn read_byte(&mut self, offset: u64) -> u8 {
        let register = match offset {
            CHANGED..WANTED => &mut self.state.changed,
            WANTED..EJECT => &mut self.state.wanted,
            _ => return 0,
        };
        let shift = 8 * (offset % 4) as u32;
        let byte = (*register >> shift) as u8;
        *register &= !(0xff << shift);
        byte
    }
}

impl BusDevice for Hotplug {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.read_byte(offset.wrapping_add(i as u64));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let (EJECT, Ok(slots)) = (offset, data.try_into()) {
            self.eject(u32::from_le_bytes(slots));
        }
        Effect::None
    }
}

/// None for a slot that does not exist.
fn bit(slot: usize) -> u32 {
    u32::try_from(slot).ok().and_then(|slot| 1u32.checked_shl(slot)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::pci::Function;
    use crate::pci::config::{Config, Header};
    use crate::pci::root::Windows;

    struct Card(Config);

    impl Function for Card {
        fn config(&mut self) -> &mut Config {
            &mut self.0
        }
        fn read_bar(&mut self, _: usize, _: u64, _: &mut [u8]) {}
        fn write_bar(&mut self, _: usize, _: u64, _: &[u8]) {}
    }

    fn card() -> Arc<Mutex<Card>> {
        let header = Header {
            vendor: 0x1234,
            device: 0x5678,
            class: 0xff_0000,
            revision: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        Arc::new(Mutex::new(Card(Config::new(header))))
    }

    /// With a card in slots 3 and 31.
    fn block() -> (Hotplug, Arc<Root>, EventFd) {
        let root = Arc::new(Root::new(Windows { below_4g: 0x1000..0x2000, above_4g: None }));
        for slot in [3, 31] {
            root.add(Some(slot), card()).unwrap();
        }
        let attention = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (Hotplug::new(root.clone(), attention.try_clone().unwrap(), None), root, attention)
    }

    fn read(block: &mut Hotplug, register: u64) -> u32 {
        let mut data = [0xee; 4];
        block.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    fn eject(block: &mut Hotplug, slots: u32) {
        assert_eq!(block.write(EJECT, &slots.to_le_bytes()), Effect::None);
    }

    fn is_there(root: &Root, slot: u64) -> bool {
        let mut vendor = [0; 2];
        root.read_config(slot << 15, &mut vendor);
        vendor != [0xff; 2]
    }

    #[test]
    fn what_came_and_what_is_wanted_is_told_once() {
        let (mut block, ..) = block();
        block.came(3);
        assert!(block.ask(31));
        assert!(block.is_pending());
        assert_eq!((read(&mut block, CHANGED), read(&mut block, WANTED)), (1 << 3, 1 << 31));
        assert_eq!((read(&mut block, CHANGED), read(&mut block, WANTED)), (0, 0));
        assert!(!block.is_pending());
    }

    #[test]
    fn a_guest_takes_off_the_bus_what_it_was_asked_for_and_nothing_else() {
        let (mut block, root, attention) = block();
        eject(&mut block, u32::MAX);
        assert!(attention.read().is_err() && block.take_gone().is_empty());
        assert!(block.ask(3));
        eject(&mut block, u32::MAX);
        assert_eq!(attention.read().unwrap(), 1);
        assert_eq!(block.take_gone(), [3]);
        assert!(block.take_gone().is_empty());
        assert!(is_there(&root, 0) && !is_there(&root, 3) && is_there(&root, 31));
        eject(&mut block, 1 << 3);
        assert!(attention.read().is_err(), "once is enough");
    }

    #[test]
    fn what_comes_after_a_guest_has_let_go_is_not_taken_for_what_has_gone() {
        let (mut block, root, _) = block();
        assert!(block.ask(3));
        eject(&mut block, 1 << 3);
        assert!(root.add(Some(3), card()).is_err(), "nobody has heard of it yet");
        assert!(block.ask(3), "it has done so");
        assert_eq!(block.take_gone(), [3]);
        root.remove(3);
        root.add(Some(3), card()).unwrap();
        block.came(3);
        eject(&mut block, 1 << 3);
        assert!(is_there(&root, 3), "it was asked for what was there before");
    }

    #[test]
    fn who_is_asked_again_has_not_answered_and_may_still() {
        let (mut block, root, _) = block();
        assert!(block.ask(3));
        assert_eq!(read(&mut block, WANTED), 1 << 3);
        assert!(!block.ask(3));
        assert_eq!(read(&mut block, WANTED), 1 << 3, "it hears of it once more");
        eject(&mut block, 1 << 3);
        assert_eq!(block.take_gone(), [3]);
        assert!(!is_there(&root, 3));
    }

    #[test]
    fn what_the_guest_has_not_done_survives_a_save() {
        let (mut block, root, attention) = block();
        block.ask(31);
        block.came(3);
        read(&mut block, WANTED);
        let mut restored = Hotplug::new(root, attention, Some(block.save()));
        assert_eq!((read(&mut restored, CHANGED), read(&mut restored, WANTED)), (1 << 3, 0));
        eject(&mut restored, 1 << 31);
        assert_eq!(restored.take_gone(), [31]);
    }

    #[test]
    fn any_access_is_survived() {
        let (mut block, ..) = block();
        block.ask(3);
        for offset in (0..20).chain([u64::MAX - 7, u64::MAX]) {
            for width in [0, 1, 2, 4, 8] {
                let mut data = [0xff; 8];
                block.read(offset, &mut data[..width]);
                assert_eq!(block.write(offset, &[0xff; 8][..width]), Effect::None);
            }
        }
        block.came(SLOTS);
        block.ask(usize::MAX);
        assert_eq!(read(&mut block, CHANGED), 0);
    }
}
