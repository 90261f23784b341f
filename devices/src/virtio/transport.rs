//! What every virtio transport does alike: status, feature agreement, queue set-up, and the device's life behind them
//! (VIRTIO 1.3, sections 2.1, 2.2, 3.1). A transport gives these registers their addresses and an interrupt its form.
//!
//! Nothing here can be driven out of order: a write that the specification forbids is ignored, and queue registers are
//! frozen while the device runs.

use std::fmt::Display;
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use crate::host::{Handler, Host, WatchId};
use crate::memory::Memory;
use crate::state::StateError;
use crate::virtio::dead::Dead;
use crate::virtio::device::{Active, DeviceState, DeviceType, Identity, Interrupt, VirtioDevice};
use crate::virtio::queue::{Queue, QueueState};
use crate::virtio::running::count;

/// Bits of the device status register (VIRTIO 1.3, section 2.1).
pub mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
}

/// A device as a transport holds it: shared with the loop that calls it.
pub type SharedDevice = Arc<Mutex<dyn VirtioDevice>>;

/// The registers and the device behind them.
pub struct Transport {
    device: SharedDevice,
    identity: Identity,
    host: Arc<dyn Host>,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    /// One per queue, for the life of the transport: doorbells are bound to them.
    kicks: Vec<EventFd>,
    shared: Arc<Shared>,
    registers: Registers,
    running: Option<WatchId>,
}

/// What a transport shares with the [`Interrupt`] that its device holds.
#[derive(Debug)]
pub struct Shared {
    status: AtomicU8,
    generation: AtomicU8,
    /// Interrupts since the start, for the metrics.
    raised: AtomicU64,
    /// For the metrics too: the device did not start; the driver looked or wrote beyond the configuration space.
    start_fails: AtomicU64,
    config_fails: AtomicU64,
    device_type: DeviceType,
}

impl Shared {
    /// As after reset, of the device that will be behind the transport.
    pub fn of(device: &SharedDevice) -> Arc<Self> {
        let device_type = lock(device).identity().device_type;
        Arc::new(Self {
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            raised: AtomicU64::new(0),
            start_fails: AtomicU64::new(0),
            config_fails: AtomicU64::new(0),
            device_type,
        })
    }

    /// Counts an interrupt that is raised.
    pub fn count_interrupt(&self) {
        self.raised.fetch_add(1, Ordering::Relaxed);
    }

    /// The interrupts that were counted.
    pub fn interrupts(&self) -> u64 {
        self.raised.load(Ordering::Relaxed)
    }

    /// Times that the device did not start when its driver was done.
    pub fn start_fails(&self) -> u64 {
        self.start_fails.load(Ordering::Relaxed)
    }

    /// Reads that began beyond the configuration space's end, and writes that reached beyond it.
    pub fn config_fails(&self) -> u64 {
        self.config_fails.load(Ordering::Relaxed)
    }

    /// What is behind the transport.
    pub fn device_type(&self) -> DeviceType {
        self.device_type
    }

    /// The configuration space has changed: a driver that reads it now sees another generation.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// Sets DEVICE_NEEDS_RESET and logs the reason. True when a driver is there to be told (2.1.2).
    pub fn set_needs_reset(&self, reason: &dyn Display) -> bool {
        log::warn!("virtio {:?} needs a reset: {reason}", self.device_type);
        self.status.fetch_or(status::NEEDS_RESET, Ordering::AcqRel) & status::DRIVER_OK != 0
    }
}

/// Registers that the driver writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueState>,
}

/// A saved transport with its device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    status: u8,
    generation: u8,
    registers: Registers,
    pub device: DeviceState,
}

impl Transport {
    /// A transport as after reset, or, given `state`, paused as it was saved: [`Transport::resume`] lets it run.
    /// `shared` is what `interrupt` holds too.
    pub fn new(
        device: SharedDevice,
        host: Arc<dyn Host>,
        memory: Memory,
        interrupt: Arc<dyn Interrupt>,
        shared: Arc<Shared>,
        state: Option<State>,
    ) -> Result<Self, NewError> {
        let identity = lock(&device).identity();
        let kicks = identity.queue_sizes.iter().map(|_| kick()).collect::<io::Result<_>>()?;
        let fresh = Registers::new(&identity);
        let registers = match state {
            None => fresh,
            Some(state) => {
                fresh.check(&state.registers)?;
                check_agreement(&identity, &state)?;
                shared.status.store(state.status, Ordering::Release);
                shared.generation.store(state.generation, Ordering::Release);
                state.registers
            }
        };
        Ok(Self { device, identity, host, memory, interrupt, kicks, shared, registers, running: None })
    }

    /// What the device is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// 32 of the 64 feature bits the device offers, as selected; zeros beyond them.
    pub fn device_features(&self) -> u32 {
        half(offered(&self.identity), self.registers.device_features_select)
    }

    /// 32 of the feature bits the driver has taken, as selected.
    pub fn driver_features(&self) -> u32 {
        half(self.registers.driver_features, self.registers.driver_features_select)
    }

    /// The driver takes these of the selected 32 features. Ignored once they are agreed on.
    pub fn set_driver_features(&mut self, value: u32) {
        if self.status() & status::FEATURES_OK != 0 || self.registers.driver_features_select > 1 {
            return;
        }
        let shift = 32 * self.registers.driver_features_select;
        self.registers.driver_features &= !(u64::from(u32::MAX) << shift);
        self.registers.driver_features |= u64::from(value) << shift;
    }

    pub fn device_features_select(&mut self) -> &mut u32 {
        &mut self.registers.device_features_select
    }

    pub fn driver_features_select(&mut self) -> &mut u32 {
        &mut self.registers.driver_features_select
    }

    pub fn queue_select(&mut self) -> &mut u16 {
        &mut self.registers.queue_select
    }

    /// The selected queue's registers; `None` where the device has no such queue.
    pub fn queue(&self) -> Option<&QueueState> {
        self.registers.queues.get(usize::from(self.registers.queue_select))
    }

    /// Changes the selected queue's registers, if the driver may: between FEATURES_OK and DRIVER_OK and while the queue
    /// is not enabled (3.1.1; a device whose rings could move while it runs would write where it must not).
    pub fn set_queue(&mut self, change: impl FnOnce(&mut QueueState)) {
        if let Some(queue) = self.open_queue()
            && !queue.ready
        {
            change(queue);
        }
    }

    /// The driver takes the selected queue back before the device runs; it may set it up anew.
    pub fn disable_queue(&mut self) {
        if let Some(queue) = self.open_queue() {
            queue.ready = false;
        }
    }

    fn open_queue(&mut self) -> Option<&mut QueueState> {
        let open = self.status() & (status::FEATURES_OK | status::DRIVER_OK) == status::FEATURES_OK;
        let selected = usize::from(self.registers.queue_select);
        self.registers.queues.get_mut(selected).filter(|_| open)
    }

    /// What is signalled when the driver kicks queue `index`; bind doorbells to it.
    pub fn kick(&self, index: usize) -> Option<&EventFd> {
        self.kicks.get(index)
    }

    /// How many queues there are.
    pub fn queue_count(&self) -> usize {
        self.kicks.len()
    }

    /// Reads the device's configuration space.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        count(&self.shared.config_fails, u64::from(offset >= self.identity.config_bytes));
        lock(&self.device).config(offset, data);
    }

    /// Writes to the device's configuration space.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        let end = offset.saturating_add(data.len() as u64);
        count(&self.shared.config_fails, u64::from(end > self.identity.config_bytes));
        lock(&self.device).write_config(offset, data);
    }

    /// Changes whenever the configuration space does; for drivers that read it in more than one access.
    pub fn config_generation(&self) -> u8 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// The device status register.
    pub fn status(&self) -> u8 {
        self.shared.status.load(Ordering::Acquire)
    }

    /// The driver writes the device status register. Bits can only be added; 0 resets, and when this returns, the device
    /// has stopped (2.1.2, 2.4.1). After DRIVER_OK it is [`Transport::resume`] that starts it, when it may run.
    pub fn set_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        let mut added = value & !self.status() & !status::NEEDS_RESET;
        // What stays unset tells the driver that it was refused.
        if !acceptable(&self.identity, self.registers.driver_features) {
            added &= !status::FEATURES_OK;
        }
        if (self.status() | added) & status::FEATURES_OK == 0 {
            added &= !status::DRIVER_OK;
        }
        self.shared.status.fetch_or(added, Ordering::AcqRel);
    }

    /// Stops the device without the driver's knowledge: afterwards nothing of it runs and [`Transport::save`] may be
    /// called. Idempotent.
    pub fn pause(&mut self) {
        // The watch first and without the device's lock: the loop may be waiting for that.
        if let Some(watch) = self.running.take() {
            self.host.unwatch(watch);
        }
        for queue in lock(&self.device).stop() {
            if let Some(saved) = self.registers.queues.get_mut(usize::from(queue.index)) {
                *saved = queue.save();
            }
        }
    }

    /// Lets the device run if it does not yet and its driver wants it to: after DRIVER_OK, after [`Transport::pause`],
    /// after it was restored.
    pub fn resume(&mut self) {
        let runs = status::DRIVER_OK | status::NEEDS_RESET;
        if self.running.is_none() && self.status() & runs == status::DRIVER_OK {
            self.start();
        }
    }

    /// Lets go of the device, with all that it has of the host. Its driver keeps what fails all requests ([`Dead`]): after a
    /// broken rule from its next reset on, as rings that broke one are not to be trusted.
    pub fn take_away(&mut self) {
        let runs = self.running.is_some();
        self.pause();
        let dead = Dead::of(&*lock(&self.device));
        self.device = Arc::new(Mutex::new(dead));
        if runs {
            self.resume();
        }
    }

    /// Tells the device that guest memory has come or gone.
    pub fn memory_changed(&self) {
        lock(&self.device).memory_changed();
    }

    /// Everything that [`Transport::new`] needs. Only while paused, or before the driver has started the device.
    pub fn save(&self) -> State {
        State {
            status: self.status(),
            generation: self.config_generation(),
            registers: self.registers.clone(),
            device: lock(&self.device).save(),
        }
    }

    fn reset(&mut self) {
        self.pause();
        lock(&self.device).reset();
        self.registers = Registers::new(&self.identity);
        for kick in &self.kicks {
            let _ = kick.read();
        }
        self.shared.status.store(0, Ordering::Release);
    }

    fn start(&mut self) {
        match self.try_start() {
            Ok(watch) => self.running = Some(watch),
            Err(error) => {
                lock(&self.device).stop();
                count(&self.shared.start_fails, 1);
                self.interrupt.needs_reset(&format_args!("cannot start: {error}"));
            }
        }
    }

    fn try_start(&mut self) -> Result<WatchId, String> {
        let event_idx = self.registers.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queues = Vec::with_capacity(self.kicks.len());
        for (index, (saved, kick)) in (0..).zip(self.registers.queues.iter_mut().zip(&self.kicks)) {
            saved.event_idx = event_idx;
            let kick = kick.try_clone().map_err(|error| error.to_string())?;
            queues.push(Queue::restore(index, saved, kick).map_err(|error| error.to_string())?);
            // What the driver made available before it could kick, or while the device was paused.
            if saved.ready {
                queues.last().inspect(|queue| queue.rearm());
            }
        }
        let active = Active {
            memory: self.memory.clone(),
            queues,
            features: self.registers.driver_features,
            interrupt: self.interrupt.clone(),
        };
        let sources = lock(&self.device).start(active).map_err(|error| error.to_string())?;
        let handler = Arc::new(Mutex::new(Calls(self.device.clone())));
        self.host.watch(handler, &sources).map_err(|error| error.to_string())
    }
}

impl Drop for Transport {
    /// A device that is unplugged must leave the loop before its descriptors close.
    fn drop(&mut self) {
        self.pause();
    }
}

impl Registers {
    fn new(identity: &Identity) -> Self {
        let queues = identity.queue_sizes.iter().map(|&size| QueueState {
            max_size: size,
            size,
            ready: false,
            event_idx: false,
            desc_table: 0,
            avail_ring: 0,
            used_ring: 0,
            next_avail: 0,
            next_used: 0,
        });
        Self {
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: queues.collect(),
        }
    }

    /// `saved` is of a device with queues like ours.
    fn check(&self, saved: &Registers) -> Result<(), StateError> {
        let sizes = |registers: &Registers| registers.queues.iter().map(|q| q.max_size).collect::<Vec<_>>();
        let (ours, theirs) = (sizes(self), sizes(saved));
        if ours == theirs {
            return Ok(());
        }
        Err(StateError::new("virtio", "queues", format!("{theirs:?}"), format!("{ours:?}")))
    }
}

fn offered(identity: &Identity) -> u64 {
    identity.features | 1 << VIRTIO_F_VERSION_1
}

/// Nothing that is not offered, and not less than what a driver of this version must know (2.2.2, 6.1).
fn acceptable(identity: &Identity, taken: u64) -> bool {
    taken & !offered(identity) == 0 && taken & (1 << VIRTIO_F_VERSION_1) != 0
}

/// A driver that relies on what this device is not able to do must not go on as if it were.
fn check_agreement(identity: &Identity, state: &State) -> Result<(), StateError> {
    let (taken, agreed) = (state.registers.driver_features, state.status & status::FEATURES_OK != 0);
    if agreed && !acceptable(identity, taken) {
        let rule = format!("with VERSION_1 and of those in {:#x}", offered(identity));
        return Err(StateError::new("virtio", "features", format!("{taken:#x}"), rule));
    }
    if state.status & status::DRIVER_OK != 0 && !agreed {
        let rule = "with FEATURES_OK when it has DRIVER_OK";
        return Err(StateError::new("virtio", "status", format!("{:#x}", state.status), rule));
    }
    Ok(())
}

/// Why there is no transport.
#[derive(Debug, thiserror::Error)]
pub enum NewError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("host: {0}")]
    Host(#[from] io::Error),
}

/// The loop's way to the device.
struct Calls(SharedDevice);

impl Handler for Calls {
    fn ready(&mut self, token: u32) {
        lock(&self.0).handle(token);
    }
}

pub(super) fn lock(device: &SharedDevice) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kick() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
