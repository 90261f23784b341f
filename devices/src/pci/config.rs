//! The configuration space of a conventional PCI function (PCI Local Bus 3.0, chapter 6): a type 0 header, base address
//! registers, a list of capabilities.
//!
//! Bytes and, beside each, a mask of what the guest may change: sizing a BAR falls out of that as it does in hardware.
//! Knows nothing of what the registers control; the function looks after each write. Has no I/O BARs, no expansion ROM,
//! no interrupt pin, and no extended space: what lies beyond 256 bytes reads as ones, which spares a guest the search
//! for extended capabilities.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::state::StateError;

/// Bytes of configuration space.
pub const SIZE: usize = 256;
/// Base address registers of a type 0 header.
pub const BARS: usize = 6;

const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const BAR_0: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
/// A scratch byte for firmware and drivers.
const INTERRUPT_LINE: usize = 0x3c;
const HEADER_END: usize = 0x40;

const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
/// In the upper byte of the command register. Has no effect: no function here raises INTx.
const COMMAND_INTX_DISABLE: u8 = 1 << 2;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const BAR_MEMORY_64: u8 = 0b100;

/// What a function says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub vendor: u16,
    pub device: u16,
    /// Class, subclass and programming interface, from the most significant of the lower 24 bits.
    pub class: u32,
    pub revision: u8,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// The registers of one function.
#[derive(Clone, Debug)]
pub struct Config {
    bytes: [u8; SIZE],
    /// The bits that the guest may change.
    writable: [u8; SIZE],
    bars: [Option<Bar>; BARS],
    /// Where the next capability goes, and the byte that will point to it.
    next: usize,
    link: usize,
}

/// A region of memory that the guest can put anywhere. Not prefetchable: reads here have side effects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bar {
    /// Below 4 GiB.
    Memory32(u32),
    /// Anywhere; takes this and the next register.
    Memory64(u64),
}

impl Bar {
    /// Bytes.
    pub fn size(self) -> u64 {
        match self {
            Bar::Memory32(size) => size.into(),
            Bar::Memory64(size) => size,
        }
    }
}

/// Why a function's own description does not fit its configuration space: a mistake in the device, not of a guest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    #[error("BAR {index} is taken or does not exist, or its size {size:#x} is not a power of two from 16")]
    Bar { index: usize, size: u64 },
    #[error("no room for a capability of {len} bytes")]
    Capability { len: usize },
}

/// What the guest has made of the registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    bytes: Vec<u8>,
}

impl Config {
    pub fn new(header: Header) -> Self {
        let mut config = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bars: [None; BARS],
            next: HEADER_END,
            link: CAPABILITIES,
        };
        let class = header.class.to_le_bytes();
        config.put(VENDOR, &header.vendor.to_le_bytes());
        config.put(DEVICE, &header.device.to_le_bytes());
        config.put(REVISION, &[header.revision]);
        config.put(CLASS, &class[..3]);
        config.put(SUBSYSTEM_VENDOR, &header.subsystem_vendor.to_le_bytes());
        config.put(SUBSYSTEM, &header.subsystem.to_le_bytes());
        config.allow(COMMAND, &[COMMAND_MEMORY | COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE]);
        config.allow(INTERRUPT_LINE, &[0xff]);
        config
    }

    /// Adds a BAR at register `index`, at address 0.
    pub fn add_bar(&mut self, index: usize, bar: Bar) -> Result<(), ConfigError> {
        let size = bar.size();
        let registers = match bar {
            Bar::Memory32(_) => index..index + 1,
            Bar::Memory64(_) => index..index + 2,
        };
        let upper_half = index.checked_sub(1).and_then(|below| self.bars.get(below));
        let free = self.bars.get(registers).is_some_and(|bars| bars.iter().all(Option::is_none))
            && !matches!(upper_half, Some(Some(Bar::Memory64(_))));
        if !free || size < 16 || !size.is_power_of_two() {
            return Err(ConfigError::Bar { index, size });
        }
        let mask = !(size - 1);
        match bar {
            Bar::Memory32(_) => self.allow(BAR_0 + 4 * index, &(mask as u32).to_le_bytes()),
            Bar::Memory64(_) => {
                self.put(BAR_0 + 4 * index, &[BAR_MEMORY_64]);
                self.allow(BAR_0 + 4 * index, &mask.to_le_bytes());
            }
        }
        self.bars[index] = Some(bar);
        Ok(())
    }

    /// Appends a capability with this `id` and what follows its link (`body`), of which the guest may change the bits in
    /// `writable`. Returns its offset. Guests walk the list one exit per entry: put first what they look for first.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<usize, ConfigError> {
        let (at, len) = (self.next, 2 + body.len());
        if at + len > SIZE {
            return Err(ConfigError::Capability { len });
        }
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.put(self.link, &[at as u8]);
        self.put(STATUS, &[STATUS_CAPABILITIES]);
        self.link = at + 1;
        self.next = (at + len).next_multiple_of(4);
        Ok(at)
    }

    /// Fills `data`; ones beyond the end.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset.saturating_add(i)).copied().unwrap_or(0xff);
        }
    }

    /// The guest writes `data`: changes what it may change.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (i, new) in data.iter().enumerate() {
            let at = offset.saturating_add(i);
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | new & mask;
            }
        }
    }

    /// The little-endian word at `offset`; ones beyond the end.
    pub fn word(&self, offset: usize) -> u16 {
        let mut word = [0; 2];
        self.read(offset, &mut word);
        u16::from_le_bytes(word)
    }

    /// The function itself changes its registers, read-only ones too.
    pub fn put(&mut self, offset: usize, data: &[u8]) {
        for (byte, new) in self.bytes.iter_mut().skip(offset).zip(data) {
            *byte = *new;
        }
    }

    /// The BARs there are, and where each is, decoded or not.
    pub fn bars(&self) -> impl Iterator<Item = (usize, Bar, u64)> {
        let present = self.bars.iter().enumerate().filter_map(|(index, bar)| Some((index, (*bar)?)));
        present.map(|(index, bar)| (index, bar, self.address(index, bar)))
    }

    /// Puts BAR `index` at `address`, as firmware would.
    pub fn assign(&mut self, index: usize, address: u64) {
        match self.bars.get(index) {
            Some(Some(Bar::Memory32(_))) => self.write(BAR_0 + 4 * index, &(address as u32).to_le_bytes()),
            Some(Some(Bar::Memory64(_))) => self.write(BAR_0 + 4 * index, &address.to_le_bytes()),
            _ => {}
        }
    }

    /// The addresses at which BAR `index` answers now: `None` while the guest has memory decoding off, or has put it
    /// where its end would be beyond all addresses.
    pub fn decoded(&self, index: usize) -> Option<Range<u64>> {
        let bar = (*self.bars.get(index)?)?;
        let start = self.address(index, bar);
        let end = start.checked_add(bar.size())?;
        (self.bytes[COMMAND] & COMMAND_MEMORY != 0).then_some(start..end)
    }

    /// The function may access guest memory by itself.
    pub fn bus_master(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_BUS_MASTER != 0
    }

    pub fn save(&self) -> State {
        State { bytes: self.bytes.to_vec() }
    }

    /// Takes the guest's bits from `state`, and only those. Fails on another length.
    pub fn restore(&mut self, state: &State) -> Result<(), StateError> {
        if state.bytes.len() != SIZE {
            return Err(StateError::new("pci", "configuration space", state.bytes.len(), "256 bytes"));
        }
        self.write(0, &state.bytes);
        Ok(())
    }

    fn address(&self, index: usize, bar: Bar) -> u64 {
        let at = BAR_0 + 4 * index;
        let low = u64::from(self.word(at)) | u64::from(self.word(at + 2)) << 16;
        let high = u64::from(self.word(at + 4)) | u64::from(self.word(at + 6)) << 16;
        match bar {
            Bar::Memory32(_) => low & !0xf,
            Bar::Memory64(_) => high << 32 | low & !0xf,
        }
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        for (byte, new) in self.writable.iter_mut().skip(offset).zip(mask) {
            *byte = *new;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn config() -> Config {
        let header = Header {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x018000,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1042,
        };
        let mut config = Config::new(header);
        config.add_bar(0, Bar::Memory64(0x8000)).unwrap();
        config.add_bar(2, Bar::Memory32(0x1000)).unwrap();
        config
    }

    fn dword(config: &Config, offset: usize) -> u32 {
        let mut data = [0; 4];
        config.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_header_says_what_the_function_is() {
        let config = config();
        assert_eq!(dword(&config, 0x00), 0x1042_1af4);
        assert_eq!(dword(&config, 0x08), 0x0180_0001);
        assert_eq!(dword(&config, 0x0c), 0, "type 0, one function");
        assert_eq!(dword(&config, 0x2c), 0x1042_1af4);
        assert_eq!(dword(&config, 0x3c), 0, "no interrupt pin");
        assert_eq!(dword(&config, 0x100), u32::MAX, "no extended space");
    }

    #[test]
    fn a_guest_learns_the_size_of_a_bar_by_writing_ones() {
        let mut config = config();
        config.assign(0, 0x12_3456_8000);
        config.assign(2, 0xd000_1000);
        for (offset, size) in
            [(0x10, 0xffff_8004), (0x14, 0xffff_ffff), (0x18, 0xffff_f000), (0x1c, 0), (0x30, 0)]
        {
            let before = dword(&config, offset);
            config.write(offset, &[0xff; 4]);
            assert_eq!(dword(&config, offset), size, "{offset:#x}");
            config.write(offset, &before.to_le_bytes());
        }
        let at: Vec<_> = config.bars().map(|(index, _, address)| (index, address)).collect();
        assert_eq!(at, [(0, 0x12_3456_8000), (2, 0xd000_1000)]);
    }

    #[test]
    fn decoding_bus_mastering_and_intx_can_be_switched_and_nothing_else() {
        let mut config = config();
        config.write(COMMAND, &[0xff; 4]);
        assert_eq!(dword(&config, COMMAND), 0x0000_0406);
        assert!(config.bus_master());
        config.write(COMMAND, &[COMMAND_MEMORY]);
        assert!(!config.bus_master());
    }

    #[test]
    fn a_bar_answers_only_while_decoding_is_on() {
        let mut config = config();
        config.assign(0, 0x1_0000_0000);
        assert_eq!(config.decoded(0), None);
        config.write(COMMAND, &[COMMAND_MEMORY]);
        assert_eq!(config.decoded(0), Some(0x1_0000_0000..0x1_0000_8000));
        assert_eq!(config.decoded(1), None, "the upper half of BAR 0");
        assert_eq!(config.decoded(6), None);
    }

    #[test]
    fn a_bar_at_the_end_of_all_addresses_answers_nowhere() {
        let mut config = config();
        config.write(COMMAND, &[COMMAND_MEMORY]);
        config.assign(0, u64::MAX);
        assert_eq!(config.decoded(0), None);
    }

    #[test]
    fn capabilities_are_linked_in_their_order() {
        let mut config = config();
        assert_eq!(dword(&config, 0x04) >> 16, 0);
        let first = config.add_capability(0x11, &[1, 2, 3], &[]).unwrap();
        let second = config.add_capability(0x09, &[4], &[0xf0]).unwrap();
        assert_eq!(dword(&config, 0x04) >> 16, 0x10);
        assert_eq!(dword(&config, 0x34) & 0xff, first as u32);
        assert_eq!(dword(&config, first), 0x0201_0011 | (second as u32) << 8);
        assert_eq!(dword(&config, second), 0x0004_0009);
        config.write(second, &[0xff; 4]);
        assert_eq!(dword(&config, second), 0x00f4_0009, "only what is writable changes");
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let mut config = config();
        for (index, bar) in
            [(0, Bar::Memory64(16)), (1, Bar::Memory32(16)), (5, Bar::Memory64(16)), (6, Bar::Memory32(16))]
        {
            assert!(config.add_bar(index, bar).is_err(), "{index}");
        }
        for (size, fits) in [(0, false), (8, false), (24, false), (16, true)] {
            assert_eq!(config.add_bar(3, Bar::Memory32(size)).is_ok(), fits, "{size}");
        }
        assert!(config.add_capability(9, &[0; 0xbf], &[]).is_err());
        assert!(config.add_capability(9, &[0; 0xbe], &[]).is_ok(), "all that there is");
    }

    #[test]
    fn a_restored_space_has_what_the_guest_wrote_and_nothing_else() {
        let mut first = config();
        first.assign(0, 0x1_0000_0000);
        first.write(COMMAND, &[0xff; 2]);
        let mut state = first.save();
        state.bytes[0] ^= 0xff;
        let mut second = config();
        second.restore(&state).unwrap();
        assert_eq!(second.save(), first.save(), "the vendor is not the guest's to change");
        state.bytes.pop();
        assert!(second.restore(&state).is_err());
    }

    proptest! {
        #[test]
        fn any_access_is_survived_and_changes_only_what_is_writable(
            accesses in prop::collection::vec((0usize..4200, any::<[u8; 8]>(), 0usize..=8), 0..64)
        ) {
            let mut config = config();
            let before = config.clone();
            for (offset, mut data, width) in accesses {
                config.write(offset, &data[..width]);
                config.read(offset, &mut data[..width]);
                for index in 0..8 {
                    let _ = config.decoded(index);
                }
            }
            for at in 0..SIZE {
                prop_assert_eq!(config.bytes[at] & !before.writable[at], before.bytes[at] & !before.writable[at]);
            }
        }
    }
}
