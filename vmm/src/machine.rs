//! The whole machine on one page: everything a guest can touch, and where. The same function builds it for a boot, a
//! restore and a migration.
//!
//! Below here nothing sees a path, JSON or a KVM descriptor; above here nothing knows an address.

use std::fs::File;
use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use api_socket::{NetworkInterfaceUpdate, RateLimiter};
use devices::acpi_pm::{self, AcpiPm};
use devices::backend::disk::Format;
use devices::backend::vhost;
use devices::bus::BusError;
use devices::i8042::{self, I8042};
use devices::memory::Memory;
use devices::pci::hotplug::{self, Hotplug};
use devices::pvpanic::{self, PvPanic};
use devices::rtc::{self, Rtc};
use devices::serial::{self, Serial};
use devices::state::StateError;
use devices::virtio::balloon::Balloon;
use devices::virtio::mem::{self, Mem};
use devices::virtio::vhost_user::session::Lost;
use devices::vmgenid::{self, VmGenId};
use vmm_sys_util::eventfd::EventFd;

use crate::boot_timer::BootTimer;
use crate::config::console;
use crate::config::network::Interface;
use crate::config::pmem::PmemFile;
use crate::config::{Config, Drive};
use crate::file_memory::FileMemory;
use crate::host::Hosts;
use crate::memory::ByteSize;
use crate::metrics::Metrics;
use crate::slots::{Slots, SlotsError, Unpluggable, Unplugged};
use crate::vcpu::Buses;
use crate::x86_64::acpi::Tables;
use crate::x86_64::interrupts::Interrupts;
use crate::x86_64::layout;

/// What a machine is built on.
pub struct Board {
    pub hosts: Hosts,
    pub interrupts: Arc<Interrupts>,
    pub ram: Memory,
    pub ram_size: ByteSize,
    /// Where memory comes and goes, if it does: what back-ends outside of this process are told, see
    /// [`devices::backend::vhost::all_regions`].
    pub room: Option<vhost::Region>,
    /// Bytes of the pages that back RAM.
    pub ram_page: u64,
    /// Address lines of the guest's CPUs.
    pub physical_bits: u8,
    /// Virtio devices are PCI functions; otherwise they are on virtio-mmio.
    pub pci: bool,
    /// A register at [`layout::BOOT_TIMER`].
    pub boot_timer: bool,
    /// Signalled when the control thread should look: the serial port has room for input again, or the guest has let go of
    /// a device.
    pub attention: EventFd,
    pub vcpus: u32,
}

/// The built machine; its buses are what vCPUs exit to.
pub struct Machine {
    pub buses: Arc<Buses>,
    serial: Arc<Mutex<Serial>>,
    /// Bytes of serial output beyond the limit that was set.
    dropped_output: Arc<AtomicU64>,
    keyboard: Arc<Mutex<I8042>>,
    power: Arc<Mutex<AcpiPm>>,
    virtio: Slots,
    /// Of a machine with PCI.
    hotplug: Option<Arc<Mutex<Hotplug>>>,
    board: Board,
    files: FileMemory,
}

/// Puts every device in its place, and what must be in guest memory into `files`; `memory` is for the device that has it
/// come and go.
pub fn build(
    config: &Config,
    board: Board,
    mut files: FileMemory,
    memory: Option<mem::Config>,
) -> Result<Machine, MachineError> {
    let mut buses = Buses::default();
    let line = |gsi| board.interrupts.line(gsi);

    let serial = shared(Serial::new(
        serial::Config {
            output: config.serial_output()?,
            interrupt: line(layout::SERIAL_GSI)?,
            room: Some(board.attention.try_clone()?),
        },
        None,
    )?);
    let keyboard = shared(I8042::new(line(layout::I8042_GSI)?, None)?);
    let power = shared(AcpiPm::new(line(layout::GED_GSI)?, None));
    let clock = shared(Rtc::new(Box::new(seconds_since_1970), None)?);
    VmGenId::new(vmgenid::Config { memory: board.ram.clone(), address: layout::VMGENID.start }, None)?;

    let ports = &mut buses.ports;
    ports.insert(layout::SERIAL.start, serial::LEN, serial.clone())?;
    ports.insert(layout::I8042.start, i8042::LEN, keyboard.clone())?;
    ports.insert(layout::RTC.start, rtc::LEN, clock)?;
    ports.insert(layout::ACPI_PM.start, acpi_pm::LEN, power.clone())?;
    ports.insert(layout::PVPANIC.start, pvpanic::LEN, shared(PvPanic))?;
    if board.boot_timer {
        let size = layout::BOOT_TIMER.end - layout::BOOT_TIMER.start;
        buses.mmio.insert(layout::BOOT_TIMER.start, size, shared(BootTimer::new()))?;
    }

    let mut virtio = Slots::new(&board)?;
    for drive in config.drives()? {
        virtio.add_drive(drive, &board)?;
    }
    for interface in config.interfaces()? {
        virtio.add_interface(interface, &board)?;
    }
    for pmem in config.pmems()? {
        virtio.add_pmem(pmem, &mut files, &board)?;
    }
    if let Some(vsock) = config.vsock()? {
        virtio.add_vsock(vsock, &board)?;
    }
    if let Ok(balloon) = config.balloon() {
        virtio.add_balloon(balloon, &board)?;
    }
    if let Some(memory) = memory {
        let io_thread = config.memory_hotplug().ok().and_then(|memory| memory.settings.io_thread);
        virtio.add_memory(memory, io_thread, &board)?;
    }
    if let Some(entropy) = &config.entropy {
        virtio.add_entropy(entropy, &board)?;
    }
    if let Some(console) = &config.console {
        virtio.add_console(console, &board)?;
    }
    virtio.connect(&mut buses.mmio)?;
    let hotplug = match virtio.root() {
        Some(root) => {
            let hotplug = shared(Hotplug::new(root, board.attention.try_clone()?, None));
            buses.ports.insert(layout::PCI_HOTPLUG.start, hotplug::LEN, hotplug.clone())?;
            Some(hotplug)
        }
        None => None,
    };
    Ok(Machine {
        buses: Arc::new(buses),
        serial,
        dropped_output: config.serial_dropped(),
        keyboard,
        power,
        virtio,
        hotplug,
        board,
        files,
    })
}

impl Machine {
    /// Gives the serial port what was typed; says how much of it was taken.
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        lock(&self.serial).input(bytes)
    }

    /// Ctrl-Alt-Del for a guest that listens to the keyboard; the power button for all others. Both reach its init.
    pub fn ctrl_alt_del(&self) {
        if !lock(&self.keyboard).ctrl_alt_del() {
            self.press_power_button();
        }
    }

    /// See [`AcpiPm::press_power_button`].
    pub fn press_power_button(&self) {
        lock(&self.power).press_power_button();
    }

    /// Plugs a drive in while the guest runs or is paused, and tells it. Only with PCI.
    pub fn plug_drive(&mut self, drive: Drive, metrics: &mut Metrics) -> Result<(), MachineError> {
        let slot = self.virtio.add_drive(drive, &self.board)?;
        self.plugged(slot, metrics);
        Ok(())
    }

    /// The same for a network interface.
    pub fn plug_interface(
        &mut self,
        interface: Interface,
        metrics: &mut Metrics,
    ) -> Result<(), MachineError> {
        let slot = self.virtio.add_interface(interface, &self.board)?;
        self.plugged(slot, metrics);
        Ok(())
    }

    /// The same for persistent memory.
    pub fn plug_pmem(&mut self, pmem: PmemFile, metrics: &mut Metrics) -> Result<(), MachineError> {
        let slot = self.virtio.add_pmem(pmem, &mut self.files, &self.board)?;
        self.virtio.memory_changed();
        self.plugged(slot, metrics);
        Ok(())
    }

    /// Asks the guest to let go of a device; it is over when [`Machine::take_unplugged`] says so. One that has been asked
    /// for before is taken away: then it has ended, and what this gives is its slot, in which something fails the guest's
    /// requests until it lets go.
    pub fn unplug(&mut self, device: &Unpluggable) -> Option<usize> {
        let (slot, hotplug) = (self.virtio.slot_of(device)?, self.hotplug.as_ref()?);
        let is_first = lock(hotplug).ask(slot);
        if !is_first && let Some(range) = self.virtio.take_away(slot) {
            self.files.close(&range);
        }
        lock(&self.power).notify(acpi_pm::EVENT_PCI);
        (!is_first).then_some(slot)
    }

    /// Ends the devices that the guest has let go of since the last call: their slots, and what they were.
    pub fn take_unplugged(&mut self) -> Vec<(usize, Unpluggable)> {
        let slots = self.hotplug.as_ref().map(|hotplug| lock(hotplug).take_gone()).unwrap_or_default();
        slots.into_iter().filter_map(|slot| Some((slot, self.end(slot)?))).collect()
    }

    fn plugged(&self, slot: Option<usize>, metrics: &mut Metrics) {
        if let Some(slot) = slot {
            self.virtio.count_slot(slot, metrics);
            self.announce(slot);
        }
    }

    /// `None` for one that was taken away before.
    fn end(&mut self, slot: usize) -> Option<Unpluggable> {
        let Unplugged { device, memory } = self.virtio.unplug(slot)?;
        if let Some(range) = memory {
            self.files.unmap(&range);
            // What a back-end reaches until here are zeros that stay mapped, and nobody's.
            self.virtio.memory_changed();
        }
        if device.is_none() {
            log::info!("The guest has let go of what was taken away from it: PCI slot {slot} is free.");
        }
        device
    }

    /// Tells the guest of a device that has come.
    fn announce(&self, slot: usize) {
        if let Some(hotplug) = &self.hotplug {
            lock(hotplug).came(slot);
            lock(&self.power).notify(acpi_pm::EVENT_PCI);
        }
    }

    /// Gives a drive another file or other limits while the guest runs.
    pub fn update_drive(
        &self,
        id: &str,
        image: Option<(File, Format)>,
        limits: Option<RateLimiter>,
    ) -> io::Result<()> {
        self.virtio.update_drive(id, image, limits)
    }

    /// Reads the configuration of a drive that another process serves once more while the guest runs.
    pub fn refresh_drive(&self, id: &str) -> Result<(), Lost> {
        self.virtio.refresh_drive(id)
    }

    /// Gives a network interface other limits while the guest runs.
    pub fn update_interface(&self, update: &NetworkInterfaceUpdate) {
        self.virtio.update_interface(update);
    }

    /// Gives persistent memory other limits while the guest runs.
    pub fn update_pmem(&self, id: &str, limits: RateLimiter) {
        self.virtio.update_pmem(id, limits);
    }

    /// The balloon, if there is one, held until this is dropped.
    pub fn balloon(&self) -> Option<MutexGuard<'_, Balloon>> {
        self.virtio.balloon()
    }

    /// The memory device, if there is one, held until this is dropped.
    pub fn memory_device(&self) -> Option<MutexGuard<'_, Mem>> {
        self.virtio.memory_device()
    }

    /// Gives the entropy device other limits while the guest runs.
    pub fn update_entropy(&self, limits: RateLimiter) {
        self.virtio.update_entropy(limits);
    }

    /// Gives a port of the console another size and other limits while the guest runs.
    pub fn update_console(&self, change: console::Change) {
        self.virtio.update_console(change);
    }

    /// Stops every device; see [`devices::virtio::transport::Transport::pause`]. Only while no vCPU runs.
    pub fn pause(&self) {
        self.virtio.pause();
    }

    /// Lets every device go on. Before the vCPUs do.
    pub fn resume(&self) {
        lock(&self.serial).resume();
        lock(&self.keyboard).resume();
        lock(&self.power).resume();
        self.virtio.resume();
    }

    /// What tells the guest's kernel of this machine where ACPI does not. See [`Slots::kernel_arguments`].
    pub fn kernel_arguments(&self) -> String {
        self.virtio.kernel_arguments()
    }

    /// What ACPI tells the guest of this machine.
    pub fn tables(&self) -> Tables {
        Tables {
            vcpus: self.board.vcpus,
            pci: self.virtio.pci_windows(),
            virtio_mmio: self.virtio.mmio_devices().to_vec(),
            serial: true,
            rtc: true,
            vmgenid: true,
            pvpanic: true,
        }
    }

    /// Adds the devices' counters to what is written to the metrics file.
    pub fn count(&self, metrics: &mut Metrics) {
        metrics.add_routes(self.board.interrupts.clone());
        metrics.add_i8042(lock(&self.keyboard).counters());
        metrics.add_uart(lock(&self.serial).counters(), self.dropped_output.clone());
        self.virtio.count(metrics);
    }
}

fn seconds_since_1970() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_secs().try_into().unwrap_or(i64::MAX)
}

fn shared<T>(device: T) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(device))
}

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("{0}")]
    Slots(#[from] SlotsError),
    #[error("two devices want one address: {0}")]
    Bus(#[from] BusError),
    #[error("{0}")]
    State(#[from] StateError),
    #[error("host: {0}")]
    Host(#[from] io::Error),
}
