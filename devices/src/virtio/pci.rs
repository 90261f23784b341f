//! Virtio as a PCI function (VIRTIO 1.3, section 4.1): where its registers are, and its interrupts as MSI-X vectors.
//!
//! Modern only, and MSI-X only: a driver that wants INTx gets no interrupts. No shared memory regions, no queue reset, no
//! notification data: no device here has any. What the registers mean is [`Transport`]'s.
//!
//! | BAR 0, page | structure |
//! |---|---|
//! | 0 | common configuration (4.1.4.3) |
//! | 1 | ISR status (4.1.4.5) |
//! | 2 | device-specific configuration (4.1.4.6) |
//! | 3 | a doorbell of four bytes for each queue (4.1.4.4) |
//! | 4 | MSI-X table |
//! | 5 | MSI-X pending bits |
//!
//! Each is a page of its own, so that a doorbell can be bound without the others.

use std::fmt::Display;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::host::{Doorbell, Host};
use crate::memory::Memory;
use crate::pci::Function;
use crate::pci::config::{self, Bar, Config, ConfigError, Header};
use crate::pci::msix::{self, Msix, MsixError};
use crate::state::StateError;
use crate::virtio::device::{DeviceType, Interrupt, read_space};
use crate::virtio::transport::{self, NewError, Shared, SharedDevice, Transport};

const VENDOR: u16 = 0x1af4;
/// The first device id; the device's type is added to it.
const FIRST_DEVICE: u16 = 0x1040;
/// A driver that does not know section 4.1 must not bind (4.1.2.1).
const REVISION: u8 = 1;

pub(super) const BAR: usize = 0;
pub(super) const BAR_SIZE: u64 = 8 * PAGE;
pub(super) const PAGE: u64 = 0x1000;
const COMMON: u64 = 0;
const ISR: u64 = 1;
pub(super) const DEVICE: u64 = 2;
pub(super) const NOTIFY: u64 = 3;
const TABLE: u64 = 4;
const PENDING: u64 = 5;

/// Between the doorbells of two queues: a `queue_notify_off` of 1.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;

/// Vendor-specific capability, and what it describes (4.1.4).
const CAPABILITY_VENDOR: u8 = 0x09;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Offsets in a vendor-specific capability.
const CAPABILITY_BAR: usize = 4;
const CAPABILITY_OFFSET: usize = 8;
const CAPABILITY_LENGTH: usize = 12;
const CAPABILITY_DATA: usize = 16;

/// Offsets in the common configuration.
pub(super) mod common {
    pub const DEVICE_FEATURE_SELECT: usize = 0x00;
    pub const DEVICE_FEATURE: usize = 0x04;
    pub const DRIVER_FEATURE_SELECT: usize = 0x08;
    pub const DRIVER_FEATURE: usize = 0x0c;
    pub const CONFIG_MSIX_VECTOR: usize = 0x10;
    pub const NUM_QUEUES: usize = 0x12;
    pub const DEVICE_STATUS: usize = 0x14;
    pub const CONFIG_GENERATION: usize = 0x15;
    pub const QUEUE_SELECT: usize = 0x16;
    pub const QUEUE_SIZE: usize = 0x18;
    pub const QUEUE_MSIX_VECTOR: usize = 0x1a;
    pub const QUEUE_ENABLE: usize = 0x1c;
    pub const QUEUE_NOTIFY_OFF: usize = 0x1e;
    pub const QUEUE_DESC: usize = 0x20;
    pub const QUEUE_DRIVER: usize = 0x28;
    pub const QUEUE_DEVICE: usize = 0x30;
    pub const LEN: usize = 0x38;
}

/// No vector is assigned, or the one asked for does not exist (4.1.5.1.2).
const NO_VECTOR: u16 = 0xffff;

/// Bits of the ISR status.
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// One device as a PCI function.
pub struct Pci {
    host: Arc<dyn Host>,
    config: Config,
    /// Where the capabilities are that the guest writes to.
    msix_capability: usize,
    access_capability: usize,
    msix: Msix,
    vectors: Arc<Vectors>,
    transport: Transport,
    /// The address at which the doorbells are bound now.
    doorbells: Option<u64>,
    /// An interrupt on its way when the machine was saved may have got lost.
    restored: bool,
}

/// A saved function with its device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    config: config::State,
    msix: msix::State,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    isr: u8,
    pub transport: transport::State,
}

/// Why there is no function.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    #[error(transparent)]
    Transport(#[from] NewError),
    #[error(transparent)]
    Msix(#[from] MsixError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("host: {0}")]
    Host(#[from] io::Error),
    #[error(transparent)]
    State(#[from] StateError),
}

impl Pci {
    /// A function as after reset, to be plugged into a [`crate::pci::root::Root`]; or, given `state`, as it was saved and
    /// paused.
    pub fn new(
        device: SharedDevice,
        host: Arc<dyn Host>,
        memory: Memory,
        state: Option<State>,
    ) -> Result<Self, PciError> {
        let identity = transport::lock(&device).identity();
        let queues = identity.queue_sizes.len();
        let Registers { mut config, msix_capability, access_capability } =
            Registers::new(identity.device_type, queues)?;

        let msix = Msix::new(&*host, queues + 1, state.as_ref().map(|s| &s.msix))?;
        let vectors = Arc::new(Vectors::new(msix.triggers()?, queues, Shared::of(&device)));
        let restored = state.is_some();
        if let Some(state) = &state {
            config.restore(&state.config)?;
            vectors.restore(state)?;
        }
        let shared = vectors.shared.clone();
        let state = state.map(|s| s.transport);
        let transport = Transport::new(device, host.clone(), memory, vectors.clone(), shared, state)?;
        let mut pci = Self {
            host,
            config,
            msix_capability,
            access_capability,
            msix,
            vectors,
            transport,
            doorbells: None,
            restored,
        };
        pci.settle();
        Ok(pci)
    }

    /// Counts the device's interrupts.
    pub fn shared(&self) -> Arc<Shared> {
        self.vectors.shared.clone()
    }

    /// See [`Transport::pause`].
    pub fn pause(&mut self) {
        self.transport.pause();
    }

    /// See [`Transport::resume`].
    pub fn resume(&mut self) {
        if self.config.bus_master() {
            if std::mem::take(&mut self.restored) {
                self.vectors.raise_again();
            }
            self.transport.resume();
        }
    }

    /// See [`Transport::take_away`].
    pub fn take_away(&mut self) {
        self.transport.take_away();
    }

    /// See [`Transport::memory_changed`].
    pub fn memory_changed(&self) {
        self.transport.memory_changed();
    }

    /// See [`Transport::save`].
    pub fn save(&self) -> State {
        State {
            config: self.config.save(),
            msix: self.msix.save(),
            config_vector: self.vectors.config.load(Ordering::Acquire),
            queue_vectors: self.vectors.queues.iter().map(|v| v.load(Ordering::Acquire)).collect(),
            isr: self.vectors.isr.load(Ordering::Acquire),
            transport: self.transport.save(),
        }
    }

    /// Makes the host do what the configuration space says now.
    fn settle(&mut self) {
        self.msix.set_control(self.config.word(self.msix_capability + msix::CONTROL));
        let doorbells = self.config.decoded(BAR).map(|bar| bar.start + NOTIFY * PAGE);
        if doorbells != self.doorbells {
            self.bind_doorbells(doorbells);
        }
    }

    /// A doorbell that the host cannot bind, say because the guest has put another one there, works through
    /// [`Function::write_bar`].
    fn bind_doorbells(&mut self, doorbells: Option<u64>) {
        let before = std::mem::replace(&mut self.doorbells, doorbells);
        for index in 0..self.transport.queue_count() {
            let Some(kick) = self.transport.kick(index) else { continue };
            let at = |base: u64| Doorbell {
                address: base + index as u64 * u64::from(NOTIFY_MULTIPLIER),
                value: None,
            };
            if let Some(Err(error)) = before.map(|base| self.host.unring(at(base), kick)) {
                log::debug!("virtio-pci: doorbell {:?}: {error}", before.map(at));
            }
            if let Some(Err(error)) = doorbells.map(|base| self.host.ring(at(base), kick)) {
                log::debug!("virtio-pci: doorbell {:?}: {error}", doorbells.map(at));
            }
        }
    }

    /// All of the common configuration: reading it has no side effect.
    fn common(&mut self) -> [u8; common::LEN] {
        let mut bytes = [0; common::LEN];
        let mut put = |at: usize, value: &[u8]| {
            for (byte, new) in bytes.iter_mut().skip(at).zip(value) {
                *byte = *new;
            }
        };
        let transport = &mut self.transport;
        put(common::DEVICE_FEATURE_SELECT, &transport.device_features_select().to_le_bytes());
        put(common::DEVICE_FEATURE, &transport.device_features().to_le_bytes());
        put(common::DRIVER_FEATURE_SELECT, &transport.driver_features_select().to_le_bytes());
        put(common::DRIVER_FEATURE, &transport.driver_features().to_le_bytes());
        put(common::CONFIG_MSIX_VECTOR, &self.vectors.config.load(Ordering::Acquire).to_le_bytes());
        put(common::NUM_QUEUES, &(transport.queue_count() as u16).to_le_bytes());
        put(common::DEVICE_STATUS, &[transport.status()]);
        put(common::CONFIG_GENERATION, &[transport.config_generation()]);
        let select = *transport.queue_select();
        put(common::QUEUE_SELECT, &select.to_le_bytes());
        put(common::QUEUE_MSIX_VECTOR, &self.vectors.of_queue(select).to_le_bytes());
        // A queue that does not exist has size 0 (4.1.4.3.1).
        if let Some(queue) = transport.queue() {
            put(common::QUEUE_SIZE, &queue.size.to_le_bytes());
            put(common::QUEUE_ENABLE, &u16::from(queue.ready).to_le_bytes());
            put(common::QUEUE_NOTIFY_OFF, &select.to_le_bytes());
            put(common::QUEUE_DESC, &queue.desc_table.to_le_bytes());
            put(common::QUEUE_DRIVER, &queue.avail_ring.to_le_bytes());
            put(common::QUEUE_DEVICE, &queue.used_ring.to_le_bytes());
        }
        bytes
    }

    /// Fields are written in their own width, addresses also in halves (4.1.3.1); anything else is ignored.
    fn write_common(&mut self, offset: usize, data: &[u8]) {
        let mut bytes = [0; 8];
        for (byte, new) in bytes.iter_mut().zip(data) {
            *byte = *new;
        }
        let value = u64::from_le_bytes(bytes);
        match data.len() {
            1 if offset == common::DEVICE_STATUS => self.set_status(value as u8),
            2 => self.write_common_16(offset, value as u16),
            4 => self.write_common_32(offset, value as u32),
            8 => self.write_address(offset, |field| *field = value),
            _ => {}
        }
    }

    fn write_common_16(&mut self, offset: usize, value: u16) {
        let transport = &mut self.transport;
        match offset {
            common::CONFIG_MSIX_VECTOR => self.vectors.assign(&self.vectors.config, value),
            common::QUEUE_SELECT => *transport.queue_select() = value,
            common::QUEUE_SIZE => transport.set_queue(|queue| {
                if value.is_power_of_two() && value <= queue.max_size {
                    queue.size = value;
                }
            }),
            common::QUEUE_MSIX_VECTOR => {
                let queue = self.vectors.queues.get(usize::from(*transport.queue_select()));
                if let Some(vector) = queue {
                    transport.set_queue(|_| self.vectors.assign(vector, value));
                }
            }
            common::QUEUE_ENABLE => transport.set_queue(|queue| queue.ready = value == 1),
            _ => {}
        }
    }

    fn write_common_32(&mut self, offset: usize, value: u32) {
        match offset {
            common::DEVICE_FEATURE_SELECT => *self.transport.device_features_select() = value,
            common::DRIVER_FEATURE_SELECT => *self.transport.driver_features_select() = value,
            common::DRIVER_FEATURE => self.transport.set_driver_features(value),
            _ if offset.is_multiple_of(8) => {
                self.write_address(offset, |field| *field = *field & !0xffff_ffff | u64::from(value));
            }
            _ => self.write_address(offset.wrapping_sub(4), |field| {
                *field = *field & 0xffff_ffff | u64::from(value) << 32;
            }),
        }
    }

    fn write_address(&mut self, offset: usize, change: impl FnOnce(&mut u64)) {
        match offset {
            common::QUEUE_DESC => self.transport.set_queue(|queue| change(&mut queue.desc_table)),
            common::QUEUE_DRIVER => self.transport.set_queue(|queue| change(&mut queue.avail_ring)),
            common::QUEUE_DEVICE => self.transport.set_queue(|queue| change(&mut queue.used_ring)),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u8) {
        self.transport.set_status(value);
        if value == 0 {
            self.vectors.reset();
        }
        if self.config.bus_master() {
            self.transport.resume();
        }
    }

    /// Only what no bound doorbell took.
    fn write_doorbell(&self, offset: u64) {
        let index = usize::try_from(offset / u64::from(NOTIFY_MULTIPLIER));
        if let Some(kick) = index.ok().and_then(|index| self.transport.kick(index)) {
            // Fails only when its counter is at its end: rung already.
            let _ = kick.write(1);
        }
    }

    /// The part of the BAR that the guest has chosen for access through the configuration space (4.1.4.9): offset and
    /// length. `None` when that is not a register of this function.
    fn access_window(&self) -> Option<(u64, usize)> {
        let mut capability = [0; CAPABILITY_DATA];
        self.config.read(self.access_capability, &mut capability);
        let word = |at: usize| {
            let bytes = capability.get(at..at + 4).and_then(|b| b.try_into().ok());
            bytes.map(u32::from_le_bytes)
        };
        let (bar, offset, len) =
            (capability[CAPABILITY_BAR], word(CAPABILITY_OFFSET)?, word(CAPABILITY_LENGTH)?);
        let fits =
            bar == BAR as u8 && matches!(len, 1 | 2 | 4) && u64::from(offset) + u64::from(len) <= BAR_SIZE;
        fits.then_some((offset.into(), len as usize))
    }
}

impl Function for Pci {
    fn config(&mut self) -> &mut Config {
        &mut self.config
    }

    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        let access = self.access_capability + CAPABILITY_DATA;
        if offset == access
            && let Some((offset, len)) = self.access_window()
        {
            let mut bytes = [0; 4];
            let bytes = &mut bytes[..len];
            self.read_bar(BAR, offset, bytes);
            self.config.put(access, bytes);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let before = self.config.bus_master();
        self.config.write(offset, data);
        self.settle();
        let access = self.access_capability + CAPABILITY_DATA;
        if offset == access
            && let Some((offset, len)) = self.access_window()
        {
            let mut bytes = [0; 4];
            self.config.read(access, &mut bytes);
            self.write_bar(BAR, offset, &bytes[..len]);
        }
        // Without bus mastering a function must not touch memory: so a kernel that hands over to the next one stops it.
        match (before, self.config.bus_master()) {
            (true, false) => self.transport.pause(),
            (false, true) => self.resume(),
            _ => {}
        }
    }

    fn read_bar(&mut self, _: usize, offset: u64, data: &mut [u8]) {
        let (page, offset) = (offset / PAGE, offset % PAGE);
        data.fill(0);
        match page {
            COMMON => read_space(&self.common(), offset, data),
            ISR if offset == 0 => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.vectors.isr.swap(0, Ordering::AcqRel);
                }
            }
            DEVICE => self.transport.read_config(offset, data),
            TABLE => self.msix.read_table(offset as usize, data),
            PENDING => self.msix.read_pending(offset as usize, data),
            _ => {}
        }
    }

    fn write_bar(&mut self, _: usize, offset: u64, data: &[u8]) {
        let (page, offset) = (offset / PAGE, offset % PAGE);
        match page {
            COMMON => self.write_common(offset as usize, data),
            DEVICE => self.transport.write_config(offset, data),
            NOTIFY => self.write_doorbell(offset),
            TABLE => self.msix.write_table(offset as usize, data),
            _ => {}
        }
    }
}

impl Drop for Pci {
    /// The host must not keep doorbells of a device that is gone.
    fn drop(&mut self) {
        self.bind_doorbells(None);
    }
}

/// The configuration space of a device that nobody has touched.
struct Registers {
    config: Config,
    msix_capability: usize,
    access_capability: usize,
}

impl Registers {
    /// Capabilities are searched one exit per entry, most often for one that is not there, so there are no more than the
    /// specification demands, and those that Linux looks for come before the one it does not.
    fn new(device: DeviceType, queues: usize) -> Result<Self, ConfigError> {
        let number = FIRST_DEVICE + device as u16;
        let mut config = Config::new(Header {
            vendor: VENDOR,
            device: number,
            class: class(device),
            revision: REVISION,
            subsystem_vendor: VENDOR,
            subsystem: number,
        });
        config.add_bar(BAR, Bar::Memory64(BAR_SIZE))?;

        let page = |index: u64| (index * PAGE) as u32;
        let (body, writable) = msix::capability(queues + 1, BAR as u32, page(TABLE), page(PENDING));
        let msix_capability = config.add_capability(msix::CAPABILITY, &body, &writable)?;

        let doorbells = queues as u32 * NOTIFY_MULTIPLIER;
        let mut add = |kind, page, len, more: &[u8], writable: &[u8]| {
            config.add_capability(CAPABILITY_VENDOR, &vendor_capability(kind, page, len, more), writable)
        };
        add(CFG_COMMON, page(COMMON), common::LEN as u32, &[], &[])?;
        add(CFG_ISR, page(ISR), 1, &[], &[])?;
        add(CFG_NOTIFY, page(NOTIFY), doorbells, &NOTIFY_MULTIPLIER.to_le_bytes(), &[])?;
        if has_config(device) {
            add(CFG_DEVICE, page(DEVICE), PAGE as u32, &[], &[])?;
        }
        // The guest chooses BAR, offset and length, and writes the data.
        let mut writable = [0; CAPABILITY_DATA + 4 - 2];
        writable[CAPABILITY_BAR - 2] = 0xff;
        writable[CAPABILITY_OFFSET - 2..].fill(0xff);
        let access_capability = add(CFG_PCI, 0, 0, &[0; 4], &writable)?;
        Ok(Self { config, msix_capability, access_capability })
    }
}

/// What follows id and link of a `virtio_pci_cap` (4.1.4): its length, kind, BAR, id, padding, offset, length, and `more`.
fn vendor_capability(kind: u8, offset: u32, len: u32, more: &[u8]) -> Vec<u8> {
    let total = (CAPABILITY_DATA + more.len()) as u8;
    let mut body = vec![total, kind, BAR as u8, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(len.to_le_bytes());
    body.extend(more);
    body
}

/// PCI's classes fit virtio's types loosely; drivers do not look at them, people do.
fn class(device: DeviceType) -> u32 {
    match device {
        DeviceType::Network => 0x02_00_00,
        DeviceType::Block => 0x01_80_00,
        DeviceType::Console | DeviceType::Socket => 0x07_80_00,
        DeviceType::Entropy | DeviceType::Balloon => 0x00_ff_00,
        DeviceType::Memory | DeviceType::PersistentMemory => 0x05_80_00,
    }
}

/// Whether VIRTIO 1.3, section 5, gives this device a configuration space.
fn has_config(device: DeviceType) -> bool {
    !matches!(device, DeviceType::Entropy)
}

/// The interrupts of one function: raised from any thread, without a lock.
struct Vectors {
    triggers: Vec<EventFd>,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
    isr: AtomicU8,
    shared: Arc<Shared>,
}

impl Vectors {
    fn new(triggers: Vec<EventFd>, queues: usize, shared: Arc<Shared>) -> Self {
        let none = || AtomicU16::new(NO_VECTOR);
        let queues = (0..queues).map(|_| none()).collect();
        Self { triggers, config: none(), queues, isr: AtomicU8::new(0), shared }
    }

    fn restore(&self, state: &State) -> Result<(), StateError> {
        let (saved, queues) = (&state.queue_vectors, self.queues.len());
        if saved.len() != queues {
            return Err(StateError::new("virtio-pci", "queue vectors", saved.len(), queues));
        }
        self.assign(&self.config, state.config_vector);
        self.queues.iter().zip(saved).for_each(|(vector, &value)| self.assign(vector, value));
        self.isr.store(state.isr, Ordering::Release);
        Ok(())
    }

    fn reset(&self) {
        self.queues
            .iter()
            .chain([&self.config])
            .for_each(|vector| vector.store(NO_VECTOR, Ordering::Release));
        self.isr.store(0, Ordering::Release);
    }

    /// One that does not exist reads back as none, which tells the driver (4.1.5.1.2.1).
    fn assign(&self, vector: &AtomicU16, value: u16) {
        let exists = usize::from(value) < self.triggers.len();
        vector.store(if exists { value } else { NO_VECTOR }, Ordering::Release);
    }

    fn of_queue(&self, index: u16) -> u16 {
        self.queues.get(usize::from(index)).map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    /// False when the driver has assigned no vector.
    fn raise(&self, vector: u16) -> bool {
        let Some(trigger) = self.triggers.get(usize::from(vector)) else { return false };
        // An eventfd refuses only when its counter is at its end: raised already.
        let _ = trigger.write(1);
        self.shared.count_interrupt();
        true
    }

    /// Whatever may have been raised; a spurious one costs the driver a look. With MSI-X no driver clears the ISR status,
    /// so it says whether the configuration has ever changed.
    fn raise_again(&self) {
        let changed = self.isr.load(Ordering::Acquire) & ISR_CONFIG != 0;
        for vector in self.queues.iter().chain(changed.then_some(&self.config)) {
            self.raise(vector.load(Ordering::Acquire));
        }
    }

    fn raise_config(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.raise(self.config.load(Ordering::Acquire));
    }
}

impl Interrupt for Vectors {
    fn queue(&self, index: u16) {
        if !self.raise(self.of_queue(index)) {
            self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        }
    }

    /// Right until the device stops: a driver assigns vectors before DRIVER_OK. What masks the vector meanwhile takes its
    /// message from the host and leaves the descriptor, which so is the pending bit.
    fn trigger(&self, index: u16) -> Option<EventFd> {
        self.triggers.get(usize::from(self.of_queue(index)))?.try_clone().ok()
    }

    fn config(&self) {
        self.shared.config_changed();
        self.raise_config();
    }

    fn needs_reset(&self, reason: &dyn Display) {
        if self.shared.set_needs_reset(reason) {
            self.raise_config();
        }
    }
}

#[cfg(test)]
mod tests;
