//! Virtio over a page of registers and one interrupt line (VIRTIO 1.3, section 4.2), version 2 only.
//!
//! For kernels without PCI, and for the shortest boot. No shared memory regions and no queue reset: no device here has
//! either.

use std::fmt::Display;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{BusDevice, Effect};
use crate::host::{Doorbell, Host};
use crate::memory::Memory;
use crate::virtio::device::Interrupt;
use crate::virtio::queue::QueueState;
use crate::virtio::transport::{self, NewError, Shared, SharedDevice, Transport};

/// Bytes of one device's registers.
pub const SIZE: u64 = 0x1000;

/// Register offsets (section 4.2.2).
pub(super) mod register {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// "virt"
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "BRTH"; drivers do not look at it.
const VENDOR: u32 = 0x4854_5242;

/// Bits of InterruptStatus.
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGE: u32 = 2;

/// One device on its page.
pub struct Mmio {
    base: u64,
    host: Arc<dyn Host>,
    transport: Transport,
    line: Arc<Line>,
}

/// A saved transport with its device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    interrupt_status: u32,
    pub transport: transport::State,
}

impl Mmio {
    /// A device at guest-physical `base`, interrupting through `line`. As after reset, or, given `state`, paused.
    pub fn new(
        base: u64,
        device: SharedDevice,
        host: Arc<dyn Host>,
        memory: Memory,
        line: EventFd,
        state: Option<State>,
    ) -> Result<Self, NewError> {
        let shared = Shared::of(&device);
        let (interrupt_status, state) = state.map(|s| (s.interrupt_status, s.transport)).unzip();
        let pending = AtomicU32::new(interrupt_status.unwrap_or(0));
        let line = Arc::new(Line { pending, line, shared: shared.clone() });
        let transport = Transport::new(device, host.clone(), memory, line.clone(), shared, state)?;
        let mmio = Self { base, host, transport, line };
        mmio.each_doorbell(|host, doorbell, kick| host.ring(doorbell, kick))?;
        Ok(mmio)
    }

    /// Counts the device's interrupts.
    pub fn shared(&self) -> Arc<Shared> {
        self.line.shared.clone()
    }

    /// See [`Transport::pause`].
    pub fn pause(&mut self) {
        self.transport.pause();
    }

    /// See [`Transport::resume`].
    pub fn resume(&mut self) {
        // An interrupt whose edge fell into the pause is raised again; a spurious one costs the driver a look.
        if self.line.pending.load(Ordering::Acquire) != 0 {
            let _ = self.line.line.write(1);
        }
        self.transport.resume();
    }

    /// See [`Transport::memory_changed`].
    pub fn memory_changed(&self) {
        self.transport.memory_changed();
    }

    /// See [`Transport::save`].
    pub fn save(&self) -> State {
        State {
            interrupt_status: self.line.pending.load(Ordering::Acquire),
            transport: self.transport.save(),
        }
    }

    fn each_doorbell(&self, act: impl Fn(&dyn Host, Doorbell, &EventFd) -> io::Result<()>) -> io::Result<()> {
        for (index, value) in (0..self.transport.queue_count()).zip(0u32..) {
            let doorbell = Doorbell { address: self.base + register::QUEUE_NOTIFY, value: Some(value) };
            if let Some(kick) = self.transport.kick(index) {
                act(&*self.host, doorbell, kick)?;
            }
        }
        Ok(())
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        let queue = |value: fn(&QueueState) -> u32| self.transport.queue().map_or(0, value);
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.transport.identity().device_type as u32,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => self.transport.device_features(),
            register::QUEUE_SIZE_MAX => queue(|q| q.max_size.into()),
            register::QUEUE_READY => queue(|q| q.ready.into()),
            register::INTERRUPT_STATUS => self.line.pending.load(Ordering::Acquire),
            register::STATUS => self.transport.status().into(),
            // No region has a length of all ones (section 4.2.2).
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => self.transport.config_generation().into(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let low = |field: &mut u64| *field = *field & !0xffff_ffff | u64::from(value);
        let high = |field: &mut u64| *field = *field & 0xffff_ffff | u64::from(value) << 32;
        let transport = &mut self.transport;
        match offset {
            register::DEVICE_FEATURES_SEL => *transport.device_features_select() = value,
            register::DRIVER_FEATURES_SEL => *transport.driver_features_select() = value,
            register::DRIVER_FEATURES => transport.set_driver_features(value),
            // Numbers that no queue has must not wrap to one that exists.
            register::QUEUE_SEL => *transport.queue_select() = u16::try_from(value).unwrap_or(u16::MAX),
            register::QUEUE_SIZE => transport.set_queue(|q| q.size = u16::try_from(value).unwrap_or(0)),
            // Linux does so when it cannot set up another queue, and looks whether it is done.
            register::QUEUE_READY if value == 0 => transport.disable_queue(),
            register::QUEUE_READY => transport.set_queue(|q| q.ready = value == 1),
            register::QUEUE_DESC_LOW => transport.set_queue(|q| low(&mut q.desc_table)),
            register::QUEUE_DESC_HIGH => transport.set_queue(|q| high(&mut q.desc_table)),
            register::QUEUE_DRIVER_LOW => transport.set_queue(|q| low(&mut q.avail_ring)),
            register::QUEUE_DRIVER_HIGH => transport.set_queue(|q| high(&mut q.avail_ring)),
            register::QUEUE_DEVICE_LOW => transport.set_queue(|q| low(&mut q.used_ring)),
            register::QUEUE_DEVICE_HIGH => transport.set_queue(|q| high(&mut q.used_ring)),
            // Only for a host that could not bind the doorbell.
            register::QUEUE_NOTIFY => {
                if let Some(kick) = usize::try_from(value).ok().and_then(|index| transport.kick(index)) {
                    let _ = kick.write(1);
                }
            }
            register::INTERRUPT_ACK => drop(self.line.pending.fetch_and(!value, Ordering::AcqRel)),
            register::STATUS => {
                transport.set_status(value as u8);
                transport.resume();
                if transport.status() == 0 {
                    self.line.pending.store(0, Ordering::Release);
                }
            }
            _ => {}
        }
    }
}

impl BusDevice for Mmio {
    /// Registers are read in 32 bits (section 4.2.2.2); only the configuration space takes other widths.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            self.transport.read_config(offset, data);
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            self.transport.write_config(offset, data);
        } else if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
        Effect::None
    }
}

impl Drop for Mmio {
    fn drop(&mut self) {
        if let Err(error) = self.each_doorbell(|host, doorbell, kick| host.unring(doorbell, kick)) {
            log::warn!("virtio-mmio at {:#x}: a doorbell cannot be taken back: {error}", self.base);
        }
    }
}

/// The one interrupt line of a device, and why it was raised.
struct Line {
    pending: AtomicU32,
    line: EventFd,
    shared: Arc<Shared>,
}

impl Line {
    fn raise(&self, reason: u32) {
        self.pending.fetch_or(reason, Ordering::AcqRel);
        // An eventfd refuses only when its counter is at its end: raised already.
        let _ = self.line.write(1);
        self.shared.count_interrupt();
    }
}

impl Interrupt for Line {
    fn queue(&self, _: u16) {
        self.raise(USED_BUFFER);
    }

    /// The driver reads in InterruptStatus why the line was raised.
    fn trigger(&self, _: u16) -> Option<EventFd> {
        None
    }

    fn config(&self) {
        self.shared.config_changed();
        self.raise(CONFIG_CHANGE);
    }

    fn needs_reset(&self, reason: &dyn Display) {
        if self.shared.set_needs_reset(reason) {
            self.raise(CONFIG_CHANGE);
        }
    }
}

#[cfg(test)]
mod tests;
