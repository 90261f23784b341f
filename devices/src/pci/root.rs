//! The root complex: bus 0 with its host bridge in slot 0, and the ways in: ECAM and the memory windows.
//!
//! A window finds the function whose decoded BAR holds an address at each access, so that a moved BAR changes no bus.
//! Functions come and go while the guest runs ([`Root::add`], [`Root::remove`]); telling the guest is for whoever does
//! it. Nothing of it has to be saved: the host bridge has no writable register, and where BARs lie is in the functions.
//!
//! Locks: a vCPU holds that of its window (bus), then that of the function. The table of slots is locked only to look
//! something up, never while a function is called, so a function may take its time.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bus::{Bus, BusDevice, BusError, Effect};
use crate::pci::Function;
use crate::pci::config::{self, Bar, Config, Header};
use crate::pci::ranges::Ranges;

/// Slots of the bus, the host bridge's included.
pub const SLOTS: usize = 32;
/// Bytes of ECAM for bus 0.
pub const ECAM_LEN: u64 = 1 << 20;

/// A function as the root and its owner share it.
pub type SharedFunction = Arc<Mutex<dyn Function>>;

/// Where BARs may lie; what ACPI's _CRS says too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    pub below_4g: Range<u64>,
    /// 64-bit BARs go here, when it exists.
    pub above_4g: Option<Range<u64>>,
}

/// The bus and what is plugged into it.
pub struct Root {
    slots: Mutex<Slots>,
}

struct Slots {
    table: [Option<Slot>; SLOTS],
    low: Ranges,
    high: Option<Ranges>,
}

struct Slot {
    /// `None` when the guest has let go of it and its owner has not heard of it yet ([`Root::let_go`]).
    function: Option<SharedFunction>,
    /// What each BAR answers at now.
    decoded: [Option<Range<u64>>; config::BARS],
    /// What was taken from a window for it.
    assigned: Vec<u64>,
}

/// Why a function cannot be plugged in. Nothing was changed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AddError {
    #[error("PCI slot {slot} is taken or does not exist: choose a free one from 1 to 31")]
    Slot { slot: usize },
    #[error(
        "all 31 PCI slots are taken, with those of devices that the guest has not let go of: remove a device first"
    )]
    Full,
    #[error("no room for a BAR of {size:#x} bytes in the PCI windows: remove a device first")]
    Window { size: u64 },
}

impl Root {
    /// A bus with nothing but its host bridge.
    pub fn new(windows: Windows) -> Self {
        let mut table = [const { None }; SLOTS];
        let bridge: SharedFunction = Arc::new(Mutex::new(HostBridge::new()));
        let bridge = Slot { function: Some(bridge), decoded: Default::default(), assigned: Vec::new() };
        table[0] = Some(bridge);
        let (low, high) = (Ranges::new(windows.below_4g), windows.above_4g.map(Ranges::new));
        Self { slots: Mutex::new(Slots { table, low, high }) }
    }

    /// Makes the root answer on `bus`: ECAM at `ecam`, and its windows.
    pub fn connect(self: &Arc<Self>, bus: &mut Bus, ecam: u64) -> Result<(), BusError> {
        let windows = {
            let slots = self.slots();
            [Some(slots.low.window()), slots.high.as_ref().map(Ranges::window)]
        };
        bus.insert(ecam, ECAM_LEN, Arc::new(Mutex::new(Ecam(self.clone()))))?;
        for Range { start, end } in windows.into_iter().flatten() {
            let window = Window { root: self.clone(), start };
            bus.insert(start, end.saturating_sub(start), Arc::new(Mutex::new(window)))?;
        }
        Ok(())
    }

    /// Plugs `function` into `slot`, or the first free one, and gives its BARs addresses. One that was restored keeps
    /// those it has, wherever the guest has put them. Returns the slot. Not with the function's lock held.
    pub fn add(&self, slot: Option<usize>, function: SharedFunction) -> Result<usize, AddError> {
        let mut slots = self.slots();
        let slot = slots.free_slot(slot)?;
        let mut config = lock(&function);
        let assigned = slots.assign(config.config())?;
        let decoded = decoded(config.config());
        drop(config);
        slots.table[slot] = Some(Slot { function: Some(function), decoded, assigned });
        Ok(slot)
    }

    /// Takes the function out of `slot`: no access of the guest finds it any more, and its addresses are free. The host
    /// bridge stays. What the function holds of the host goes with its last owner. `None` also for one that the guest has let
    /// go of: the slot is free all the same.
    pub fn remove(&self, slot: usize) -> Option<SharedFunction> {
        if slot == 0 {
            return None;
        }
        self.slots().clear(slot)?.function
    }

    /// As [`Root::remove`], for a guest that lets go of the function: whoever owns that hears of it later, and knows it by its
    /// slot. So until [`Root::remove`] nothing else comes into the slot, or it would be taken for what has gone; nor to its
    /// addresses, where doorbells may still be bound.
    pub fn let_go(&self, slot: usize) -> Option<SharedFunction> {
        let mut slots = self.slots();
        let left = slots.table.get_mut(slot).filter(|_| slot != 0)?.as_mut()?;
        let function = left.function.take()?;
        left.decoded = Default::default();
        Some(function)
    }

    /// The guest reads configuration space; `offset` counts from the start of ECAM.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        match self.function_at(offset) {
            Some((_, register, function)) => lock(&function).read_config(register, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes configuration space; `offset` counts from the start of ECAM.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        let Some((slot, register, function)) = self.function_at(offset) else { return };
        let decoded = {
            let mut function = lock(&function);
            function.write_config(register, data);
            decoded(function.config())
        };
        // It may have been removed, and another have come, meanwhile.
        if let Some(Some(slot)) = self.slots().table.get_mut(slot)
            && slot.function.as_ref().is_some_and(|there| Arc::ptr_eq(there, &function))
        {
            slot.decoded = decoded;
        }
    }

    /// The guest reads memory at `address` in a window; ones where no BAR holds all of it.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((bar, offset, function)) => lock(&function).read_bar(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes memory at `address` in a window; lost where no BAR holds all of it.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((bar, offset, function)) = self.find(address, data.len()) {
            lock(&function).write_bar(bar, offset, data);
        }
    }

    /// Slot, register and function for an offset in ECAM: bus, device, function, register from bits 20, 15, 12 and 0.
    fn function_at(&self, offset: u64) -> Option<(usize, usize, SharedFunction)> {
        let offset = usize::try_from(offset).ok()?;
        let (slot, number, register) = (offset >> 15, offset >> 12 & 7, offset & 0xfff);
        let slots = self.slots();
        let found = slots.table.get(slot)?.as_ref().filter(|_| number == 0)?;
        Some((slot, register, found.function.clone()?))
    }

    /// BAR, offset in it and function for an address. Where a guest has laid BARs over one another, the first is as good
    /// as any.
    fn find(&self, address: u64, len: usize) -> Option<(usize, u64, SharedFunction)> {
        let end = address.checked_add(len as u64)?;
        let slots = self.slots();
        slots.table.iter().flatten().find_map(|slot| {
            let holds = |range: &Option<Range<u64>>| {
                range.as_ref().is_some_and(|r| r.start <= address && end <= r.end)
            };
            let bar = slot.decoded.iter().position(holds)?;
            let start = slot.decoded.get(bar)?.as_ref()?.start;
            Some((bar, address - start, slot.function.clone()?))
        })
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slots {
    fn free_slot(&self, wanted: Option<usize>) -> Result<usize, AddError> {
        match wanted {
            Some(slot) if self.table.get(slot).is_some_and(Option::is_none) => Ok(slot),
            Some(slot) => Err(AddError::Slot { slot }),
            None => self.table.iter().position(Option::is_none).ok_or(AddError::Full),
        }
    }

    /// Empties a slot, and frees its addresses.
    fn clear(&mut self, slot: usize) -> Option<Slot> {
        let mut cleared = self.table.get_mut(slot)?.take()?;
        for start in std::mem::take(&mut cleared.assigned) {
            self.free(start);
        }
        Some(cleared)
    }

    /// Gives every BAR an address; all or none.
    fn assign(&mut self, config: &mut Config) -> Result<Vec<u64>, AddError> {
        let mut assigned = Vec::new();
        let bars: Vec<_> = config.bars().collect();
        for (index, bar, address) in bars {
            if address != 0 {
                // The guest may have moved it out of the windows or onto another: then it answers to nobody but itself.
                assigned.extend(self.reserve(address, bar.size()).then_some(address));
            } else if let Some(address) = self.allocate(bar) {
                assigned.push(address);
                config.assign(index, address);
            } else {
                assigned.into_iter().for_each(|start| self.free(start));
                return Err(AddError::Window { size: bar.size() });
            }
        }
        Ok(assigned)
    }

    fn allocate(&mut self, bar: Bar) -> Option<u64> {
        let high = self.high.as_mut().filter(|_| matches!(bar, Bar::Memory64(_)));
        high.and_then(|high| high.allocate(bar.size())).or_else(|| self.low.allocate(bar.size()))
    }

    fn reserve(&mut self, start: u64, size: u64) -> bool {
        self.low.reserve(start, size) || self.high.as_mut().is_some_and(|high| high.reserve(start, size))
    }

    fn free(&mut self, start: u64) {
        self.low.free(start);
        if let Some(high) = &mut self.high {
            high.free(start);
        }
    }
}

fn decoded(config: &Config) -> [Option<Range<u64>>; config::BARS] {
    std::array::from_fn(|index| config.decoded(index))
}

fn lock(function: &SharedFunction) -> MutexGuard<'_, dyn Function + 'static> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Ecam(Arc<Root>);

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read_config(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        self.0.write_config(offset, data);
        Effect::None
    }
}

struct Window {
    root: Arc<Root>,
    start: u64,
}

impl BusDevice for Window {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.root.read(self.start.saturating_add(offset), data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        self.root.write(self.start.saturating_add(offset), data);
        Effect::None
    }
}

/// Slot 0: says what the bus hangs on, and takes no write.
struct HostBridge(Config);

impl HostBridge {
    fn new() -> Self {
        // Red Hat's generic PCIe host bridge: an id that no driver or quirk is bound to.
        Self(Config::new(Header {
            vendor: 0x1b36,
            device: 0x0008,
            class: 0x06_00_00,
            revision: 0,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        }))
    }
}

impl Function for HostBridge {
    fn config(&mut self) -> &mut Config {
        &mut self.0
    }
    fn write_config(&mut self, _: usize, _: &[u8]) {}
    fn read_bar(&mut self, _: usize, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write_bar(&mut self, _: usize, _: u64, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ECAM: u64 = 0xe000_0000;
    const LOW: Range<u64> = 0xd000_0000..0xd001_0000;
    const HIGH: Range<u64> = 0x1_0000_0000..0x1_0001_0000;

    /// A function that remembers the last write to a BAR.
    struct Card {
        config: Config,
        written: Option<(usize, u64, Vec<u8>)>,
    }

    impl Function for Card {
        fn config(&mut self) -> &mut Config {
            &mut self.config
        }
        fn read_bar(&mut self, bar: usize, _: u64, data: &mut [u8]) {
            data.fill(bar as u8);
        }
        fn write_bar(&mut self, bar: usize, offset: u64, data: &[u8]) {
            self.written = Some((bar, offset, data.to_vec()));
        }
    }

    fn card(bars: &[(usize, Bar)]) -> Arc<Mutex<Card>> {
        let mut config = Config::new(Header {
            vendor: 0x1234,
            device: 0x5678,
            class: 0xff_0000,
            revision: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        bars.iter().for_each(|&(index, bar)| config.add_bar(index, bar).unwrap());
        Arc::new(Mutex::new(Card { config, written: None }))
    }

    fn machine() -> (Arc<Root>, Bus) {
        let root = Arc::new(Root::new(Windows { below_4g: LOW, above_4g: Some(HIGH) }));
        let mut bus = Bus::default();
        root.connect(&mut bus, ECAM).unwrap();
        (root, bus)
    }

    fn ecam(slot: u64, register: u64) -> u64 {
        ECAM + (slot << 15) + register
    }

    fn read(bus: &Bus, address: u64) -> u32 {
        let mut data = [0; 4];
        bus.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(bus: &Bus, address: u64, value: u32) {
        assert_eq!(bus.write(address, &value.to_le_bytes()), Effect::None);
    }

    fn decode(bus: &Bus, slot: u64) {
        write(bus, ecam(slot, 4), 2);
    }

    #[test]
    fn a_scan_finds_the_bridge_and_what_is_plugged_in() {
        let (root, bus) = machine();
        assert_eq!(root.add(Some(7), card(&[])), Ok(7));
        let found: Vec<_> = (0..32 * 8).filter(|n| read(&bus, ECAM + (n << 12)) != u32::MAX).collect();
        assert_eq!(found, [0, 7 << 3], "one function each");
        assert_eq!(read(&bus, ecam(0, 8)) >> 16, 0x0600, "a host bridge");
        write(&bus, ecam(0, 4), 0xffff);
        assert_eq!(read(&bus, ecam(0, 4)), 0);
    }

    #[test]
    fn bars_get_addresses_in_their_windows_and_answer_there_once_decoded() {
        let (root, bus) = machine();
        let card = card(&[(0, Bar::Memory32(0x1000)), (2, Bar::Memory64(0x4000))]);
        assert_eq!(root.add(None, card.clone()), Ok(1));
        assert_eq!(read(&bus, ecam(1, 0x10)), LOW.start as u32);
        assert_eq!(read(&bus, ecam(1, 0x18)), HIGH.start as u32 | 4);
        assert_eq!(read(&bus, ecam(1, 0x1c)), 1);
        assert_eq!(read(&bus, HIGH.start), u32::MAX, "not decoded yet");
        decode(&bus, 1);
        assert_eq!(read(&bus, HIGH.start + 0x3ffc), 0x0202_0202);
        assert_eq!(read(&bus, HIGH.start + 0x3ffe), u32::MAX, "not all of it is in the BAR");
        write(&bus, LOW.start + 8, 5);
        assert_eq!(card.lock().unwrap().written, Some((0, 8, vec![5, 0, 0, 0])));
    }

    #[test]
    fn a_moved_bar_answers_where_it_went_and_no_longer_where_it_was() {
        let (root, bus) = machine();
        root.add(None, card(&[(0, Bar::Memory32(0x1000))])).unwrap();
        decode(&bus, 1);
        write(&bus, ecam(1, 0x10), LOW.start as u32 + 0x5000);
        assert_eq!(read(&bus, LOW.start), u32::MAX);
        assert_eq!(read(&bus, LOW.start + 0x5000), 0);
        for wild in [0, 0xffff_f000, ECAM as u32] {
            write(&bus, ecam(1, 0x10), wild);
            assert_eq!(read(&bus, LOW.start + 0x5000), u32::MAX);
            assert_eq!(read(&bus, ecam(1, 0)), 0x5678_1234, "ECAM stays what it is");
        }
    }

    #[test]
    fn what_the_guest_has_let_go_of_is_gone_and_has_its_slot_and_addresses_until_its_owner_knows() {
        let (root, bus) = machine();
        let card = || card(&[(0, Bar::Memory32(0x1000))]);
        assert_eq!(root.add(None, card()), Ok(1));
        decode(&bus, 1);
        assert!(root.let_go(1).is_some());
        assert!(root.let_go(1).is_none() && root.let_go(0).is_none() && root.let_go(99).is_none());
        assert_eq!((read(&bus, ecam(1, 0)), read(&bus, LOW.start)), (u32::MAX, u32::MAX));
        assert_eq!(root.add(Some(1), card()), Err(AddError::Slot { slot: 1 }));
        assert_eq!(root.add(None, card()), Ok(2));
        assert_eq!(read(&bus, ecam(2, 0x10)), LOW.start as u32 + 0x1000);
        assert!(root.remove(1).is_none());
        assert_eq!(root.add(None, card()), Ok(1));
        assert_eq!(read(&bus, ecam(1, 0x10)), LOW.start as u32);
    }

    #[test]
    fn a_removed_function_is_gone_and_its_slot_and_addresses_are_free() {
        let (root, bus) = machine();
        root.add(None, card(&[(0, Bar::Memory64(0x1_0000))])).unwrap();
        decode(&bus, 1);
        assert!(root.remove(1).is_some());
        assert_eq!(read(&bus, HIGH.start), u32::MAX);
        assert_eq!(read(&bus, ecam(1, 0)), u32::MAX);
        assert_eq!(root.add(None, card(&[(0, Bar::Memory64(0x1_0000))])), Ok(1));
        assert_eq!(read(&bus, ecam(1, 0x14)), 1, "in the same window again");
        assert!(root.remove(0).is_none() && root.remove(5).is_none() && root.remove(99).is_none());
    }

    #[test]
    fn a_restored_function_keeps_its_addresses_and_others_keep_off() {
        let (root, bus) = machine();
        let restored = card(&[(0, Bar::Memory32(0x1000))]);
        restored.lock().unwrap().config.assign(0, LOW.start);
        root.add(Some(3), restored).unwrap();
        root.add(None, card(&[(0, Bar::Memory32(0x1000))])).unwrap();
        assert_eq!(read(&bus, ecam(3, 0x10)), LOW.start as u32);
        assert_eq!(read(&bus, ecam(1, 0x10)), LOW.start as u32 + 0x1000);
    }

    #[test]
    fn what_has_no_place_is_refused_and_takes_nothing() {
        let (root, _) = machine();
        assert_eq!(root.add(Some(0), card(&[])), Err(AddError::Slot { slot: 0 }));
        assert_eq!(root.add(Some(32), card(&[])), Err(AddError::Slot { slot: 32 }));
        let wide = card(&[(0, Bar::Memory32(0x1_0000)), (1, Bar::Memory32(0x1000))]);
        assert_eq!(root.add(None, wide), Err(AddError::Window { size: 0x1000 }));
        assert_eq!(root.add(None, card(&[(0, Bar::Memory32(0x1_0000))])), Ok(1));
        (2..32).for_each(|slot| assert_eq!(root.add(None, card(&[])), Ok(slot)));
        assert_eq!(root.add(None, card(&[])), Err(AddError::Full));
    }

    #[test]
    fn a_64_bit_bar_goes_below_where_there_is_no_window_above() {
        let root = Root::new(Windows { below_4g: LOW, above_4g: None });
        let card = card(&[(0, Bar::Memory64(0x1000))]);
        root.add(None, card.clone()).unwrap();
        assert_eq!(card.lock().unwrap().config.bars().next().unwrap().2, LOW.start);
    }

    proptest! {
        #[test]
        fn any_access_anywhere_is_survived(
            accesses in prop::collection::vec((0u64..1 << 21, any::<[u8; 8]>(), 0usize..4, any::<bool>()), 0..64)
        ) {
            let (root, _) = machine();
            root.add(None, card(&[(0, Bar::Memory32(0x1000)), (1, Bar::Memory64(0x1000))])).unwrap();
            for (offset, mut data, width, near) in accesses {
                let data = &mut data[..1 << width];
                // Most offsets hit nothing, so half of them go to the card.
                let offset = if near { 1 << 15 | offset & 0xff } else { offset };
                root.write_config(offset, data);
                root.read_config(offset, data);
                for base in [LOW.start, HIGH.start, 0, u64::MAX - offset] {
                    root.write(base.wrapping_add(offset), data);
                    root.read(base.wrapping_add(offset), data);
                }
            }
        }
    }
}
