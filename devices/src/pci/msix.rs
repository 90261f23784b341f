//! MSI-X (PCI Local Bus 3.0, section 6.8.2): a table of messages, one per vector, and who may send them now.
//!
//! A vector that is masked is disconnected from its message; what is raised meanwhile stays in its eventfd, which so is
//! the pending bit. Messages are handed to the host only when they change for a vector that may send, since each change
//! is a system call: a driver that sets up a masked vector field by field costs one.

use std::io;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::host::{Host, Msi};
use crate::state::StateError;

/// Capability id.
pub const CAPABILITY: u8 = 0x11;
/// Offset of the message control register in the capability.
pub const CONTROL: usize = 2;
/// Bytes of one table entry.
pub const ENTRY: usize = 16;
/// The most vectors that a function may have here: their table fills one page.
pub const MAX_VECTORS: usize = 256;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;
const ENTRY_MASKED: u32 = 1;

/// The vectors of one function.
pub struct Msix {
    vectors: Vec<Vector>,
    control: u16,
}

struct Vector {
    msi: Box<dyn Msi>,
    entry: Entry,
    /// What the host delivers now.
    connected: Option<(u64, u32)>,
}

/// One entry of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

/// The table and what is pending. The control register is in the configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    entries: Vec<Entry>,
    pending: Vec<bool>,
}

/// Where in which BAR the table and the pending bits are: the capability's body, and the bits of it that the guest may
/// change. Offsets are multiples of 8.
pub fn capability(count: usize, bar: u32, table: u32, pending: u32) -> ([u8; 10], [u8; 10]) {
    let mut body = [0; 10];
    body[..2].copy_from_slice(&(count.saturating_sub(1) as u16).to_le_bytes());
    body[2..6].copy_from_slice(&(table | bar).to_le_bytes());
    body[6..].copy_from_slice(&(pending | bar).to_le_bytes());
    let mut writable = [0; 10];
    writable[..2].copy_from_slice(&(CONTROL_ENABLE | CONTROL_MASK_ALL).to_le_bytes());
    (body, writable)
}

impl Msix {
    /// `count` vectors, masked and MSI-X off, or as they were saved; [`Msix::set_control`] then connects them.
    pub fn new(host: &dyn Host, count: usize, state: Option<&State>) -> Result<Self, MsixError> {
        if !(1..=MAX_VECTORS).contains(&count) {
            return Err(MsixError::Count { count });
        }
        let vectors = (0..count).map(|_| Vector::new(host.msi()?)).collect::<io::Result<_>>()?;
        let mut msix = Self { vectors, control: 0 };
        if let Some(state) = state {
            msix.restore(state)?;
        }
        Ok(msix)
    }

    /// Handles that raise the vectors, in their order.
    pub fn triggers(&self) -> io::Result<Vec<EventFd>> {
        self.vectors.iter().map(|vector| vector.msi.trigger().try_clone()).collect()
    }

    /// The guest wrote the capability's message control register.
    pub fn set_control(&mut self, control: u16) {
        if control != self.control {
            self.control = control;
            let open = self.open();
            self.vectors.iter_mut().for_each(|vector| vector.settle(open));
        }
    }

    /// Fills `data` from the table; zeros beyond its end.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(i);
            let entry = self.vectors.get(at / ENTRY).map(|vector| vector.entry.bytes());
            *byte = entry.and_then(|bytes| bytes.get(at % ENTRY).copied()).unwrap_or(0);
        }
    }

    /// The guest writes to the table.
    pub fn write_table(&mut self, offset: usize, data: &[u8]) {
        let open = self.open();
        let mut data = data;
        let mut at = offset;
        while let Some(vector) = self.vectors.get_mut(at / ENTRY)
            && !data.is_empty()
        {
            let (now, rest) = data.split_at(data.len().min(ENTRY - at % ENTRY));
            let mut bytes = vector.entry.bytes();
            for (byte, new) in bytes.iter_mut().skip(at % ENTRY).zip(now) {
                *byte = *new;
            }
            vector.entry = Entry::new(bytes);
            vector.settle(open);
            at += now.len();
            data = rest;
        }
    }

    /// Fills `data` from the pending bits; zeros beyond their end.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let first = offset.saturating_add(i).saturating_mul(8);
            let bits = self.vectors.iter().skip(first).take(8);
            *byte = bits.enumerate().fold(0, |byte, (bit, v)| byte | u8::from(v.pending()) << bit);
        }
    }

    pub fn save(&self) -> State {
        State {
            entries: self.vectors.iter().map(|vector| vector.entry).collect(),
            pending: self.vectors.iter().map(Vector::pending).collect(),
        }
    }

    fn restore(&mut self, state: &State) -> Result<(), StateError> {
        let count = self.vectors.len();
        for (field, len) in [("entries", state.entries.len()), ("pending bits", state.pending.len())] {
            if len != count {
                return Err(StateError::new("msix", field, len, count));
            }
        }
        for (vector, (entry, pending)) in
            self.vectors.iter_mut().zip(state.entries.iter().zip(&state.pending))
        {
            vector.entry = Entry::new(entry.bytes());
            if *pending {
                let _ = vector.msi.trigger().write(1);
            }
        }
        Ok(())
    }

    /// Vectors may send unless they are masked themselves.
    fn open(&self) -> bool {
        self.control & (CONTROL_ENABLE | CONTROL_MASK_ALL) == CONTROL_ENABLE
    }
}

impl Vector {
    fn new(msi: Box<dyn Msi>) -> io::Result<Self> {
        Ok(Self { msi, entry: Entry { address: 0, data: 0, control: ENTRY_MASKED }, connected: None })
    }

    /// Makes the host deliver what the entry says, or nothing, with the least calls.
    fn settle(&mut self, open: bool) {
        let Entry { address, data, control } = self.entry;
        let message = (open && control & ENTRY_MASKED == 0).then_some((address, data));
        if message == self.connected {
            return;
        }
        let done = match message {
            Some((address, data)) => self.msi.connect(address, data),
            None => self.msi.disconnect(),
        };
        if let Err(error) = &done {
            log::debug!("msix: message {data:#x} to {address:#x}: {error}");
            // The message before must not be sent in place of one that the host cannot deliver.
            let _ = self.msi.disconnect();
        }
        self.connected = message.filter(|_| done.is_ok());
    }

    /// Raised and not delivered. The host takes in what is raised while it is connected.
    fn pending(&self) -> bool {
        let pending = self.connected.is_none() && self.msi.trigger().read().is_ok();
        if pending {
            let _ = self.msi.trigger().write(1);
        }
        pending
    }
}

impl Entry {
    fn new(bytes: [u8; ENTRY]) -> Self {
        let value = u128::from_le_bytes(bytes);
        // Address bits 0 and 1 are reserved, as is all of the vector control but its mask bit.
        Self {
            address: value as u64 & !0b11,
            data: (value >> 64) as u32,
            control: (value >> 96) as u32 & ENTRY_MASKED,
        }
    }

    fn bytes(self) -> [u8; ENTRY] {
        let Self { address, data, control } = self;
        (u128::from(address) | u128::from(data) << 64 | u128::from(control) << 96).to_le_bytes()
    }
}

/// Why a function cannot have its vectors.
#[derive(Debug, thiserror::Error)]
pub enum MsixError {
    #[error("a function has 1 to {MAX_VECTORS} vectors, not {count}")]
    Count { count: usize },
    #[error("host: {0}")]
    Host(#[from] io::Error),
    #[error(transparent)]
    State(#[from] StateError),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::FakeHost;

    const CONTROL_OFF: u16 = 0;
    const ADDRESS: u64 = 0xfee0_1000;

    fn msix(count: usize) -> (Msix, FakeHost) {
        let host = FakeHost::new();
        (Msix::new(&host, count, None).unwrap(), host)
    }

    /// As Linux does it: masked, address, data, then unmasked.
    fn set_up(msix: &mut Msix, vector: usize, data: u32) {
        let at = vector * ENTRY;
        msix.write_table(at + 12, &1u32.to_le_bytes());
        msix.write_table(at, &(ADDRESS as u32).to_le_bytes());
        msix.write_table(at + 4, &0u32.to_le_bytes());
        msix.write_table(at + 8, &data.to_le_bytes());
        msix.write_table(at + 12, &0u32.to_le_bytes());
    }

    #[test]
    fn the_capability_says_how_many_and_where() {
        let (body, writable) = capability(3, 2, 0x4000, 0x5000);
        assert_eq!(body, [2, 0, 0x02, 0x40, 0, 0, 0x02, 0x50, 0, 0]);
        assert_eq!(writable, [0, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_vector_set_up_as_linux_does_costs_one_connection() {
        let (mut msix, host) = msix(2);
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        set_up(&mut msix, 1, 0x41);
        assert_eq!(host.connections(), 0, "all are still masked");
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(host.connections(), 1);
        msix.triggers().unwrap()[1].write(1).unwrap();
        assert_eq!(msix.save().pending, [false, false], "what is sent is not pending");
        assert_eq!(host.take_messages(), [(ADDRESS, 0x41)]);
    }

    #[test]
    fn writing_what_is_there_already_costs_nothing() {
        let (mut msix, host) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        set_up(&mut msix, 0, 0x41);
        msix.write_table(8, &0x41u32.to_le_bytes());
        msix.write_table(12, &0u32.to_le_bytes());
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(host.connections(), 1);
        msix.write_table(8, &0x42u32.to_le_bytes());
        assert_eq!(host.connections(), 2, "a new message for an open vector");
    }

    #[test]
    fn what_is_raised_while_masked_is_pending_and_sent_when_unmasked() {
        let (mut msix, host) = msix(10);
        msix.set_control(CONTROL_ENABLE);
        set_up(&mut msix, 9, 7);
        msix.write_table(9 * ENTRY + 12, &1u32.to_le_bytes());
        msix.triggers().unwrap()[9].write(1).unwrap();
        assert_eq!(host.take_messages(), []);
        let mut bits = [0xff; 8];
        msix.read_pending(0, &mut bits);
        assert_eq!(bits, [0, 2, 0, 0, 0, 0, 0, 0]);
        msix.write_table(9 * ENTRY + 12, &0u32.to_le_bytes());
        assert_eq!(host.take_messages(), [(ADDRESS, 7)]);
        msix.read_pending(1, &mut bits[..1]);
        assert_eq!(bits[0], 0);
    }

    #[test]
    fn nothing_is_sent_while_all_are_masked_or_msix_is_off() {
        let (mut msix, host) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        set_up(&mut msix, 0, 7);
        let trigger = &msix.triggers().unwrap()[0];
        for closed in [CONTROL_ENABLE | CONTROL_MASK_ALL, CONTROL_OFF] {
            msix.set_control(closed);
            trigger.write(1).unwrap();
            assert_eq!(host.take_messages(), []);
            msix.set_control(CONTROL_ENABLE);
            assert_eq!(host.take_messages(), [(ADDRESS, 7)]);
        }
    }

    #[test]
    fn restored_vectors_have_their_messages_and_pending_bits() {
        let (mut first, _host) = msix(2);
        first.set_control(CONTROL_ENABLE);
        set_up(&mut first, 0, 7);
        set_up(&mut first, 1, 8);
        first.write_table(ENTRY + 12, &1u32.to_le_bytes());
        first.triggers().unwrap()[1].write(1).unwrap();
        let state = first.save();
        let host = FakeHost::new();
        let mut second = Msix::new(&host, 2, Some(&state)).unwrap();
        second.set_control(CONTROL_ENABLE);
        assert_eq!(second.save(), state);
        second.write_table(ENTRY + 12, &0u32.to_le_bytes());
        assert_eq!(host.take_messages(), [(ADDRESS, 8)]);
        assert!(Msix::new(&host, 3, Some(&state)).is_err());
    }

    #[test]
    fn a_message_the_host_refuses_is_lost_and_the_next_is_sent() {
        let (mut msix, host) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        host.fail_connections(true);
        set_up(&mut msix, 0, 7);
        host.fail_connections(false);
        msix.write_table(8, &8u32.to_le_bytes());
        msix.triggers().unwrap()[0].write(1).unwrap();
        assert_eq!(host.take_messages(), [(ADDRESS, 8)]);
    }

    #[test]
    fn a_message_the_host_refuses_does_not_leave_the_one_before_in_its_place() {
        let (mut msix, host) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        set_up(&mut msix, 0, 7);
        host.fail_connections(true);
        msix.write_table(8, &8u32.to_le_bytes());
        msix.triggers().unwrap()[0].write(1).unwrap();
        assert_eq!(host.take_messages(), []);
        host.fail_connections(false);
        msix.write_table(8, &7u32.to_le_bytes());
        assert_eq!(host.take_messages(), [(ADDRESS, 7)], "and the old one can be had again");
    }

    #[test]
    fn a_dropped_function_gives_its_vectors_back() {
        let (msix, host) = msix(5);
        assert_eq!(host.msis(), 5);
        drop(msix);
        assert_eq!(host.msis(), 0);
    }

    proptest! {
        #[test]
        fn the_table_reads_as_written_and_any_access_is_survived(
            accesses in prop::collection::vec((0usize..100, any::<[u8; 8]>(), 0usize..=8, any::<u16>()), 0..64)
        ) {
            let (mut msix, host) = msix(3);
            let mut model = [0u8; 200];
            (0..3).for_each(|v| model[v * ENTRY + 12] = 1);
            for (offset, data, width, control) in accesses {
                msix.set_control(control);
                msix.write_table(offset, &data[..width]);
                for (i, byte) in data[..width].iter().enumerate() {
                    let mask = match (offset + i) % ENTRY { 0 => 0xfc, 12 => 1, 13..16 => 0, _ => 0xff };
                    if offset + i < 3 * ENTRY {
                        model[offset + i] = byte & mask;
                    }
                }
                let mut seen = [0; 120];
                msix.read_table(0, &mut seen);
                prop_assert_eq!(&seen[..], &model[..120]);
                msix.read_pending(offset, &mut seen[..8]);
                host.take_messages();
            }
        }
    }
}
