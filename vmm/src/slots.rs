//! Where virtio devices are plugged in: functions of the PCI bus, or pages of virtio-mmio registers.
//!
//! A new kind of device has its line in `machine.rs` and one `add_…` here.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use api_socket::{NetworkInterfaceUpdate, RateLimiter};
use devices::backend::disk::Format;
use devices::backend::rate_limiter::{Bucket, Limits};
use devices::bus::{Bus, BusError};
use devices::pci::root::{AddError, Root, Windows};
use devices::virtio::balloon::{self, Balloon, Ram};
use devices::virtio::blk::{Blk, Cache, Config as BlkConfig};
use devices::virtio::console::{self, Console};
use devices::virtio::device::DeviceType;
use devices::virtio::mem::{self, Mem};
use devices::virtio::mmio::{self, Mmio};
use devices::virtio::net::{self, Net};
use devices::virtio::pci::{Pci, PciError};
use devices::virtio::pmem::{self, Pmem};
use devices::virtio::rng::{Config as RngConfig, Rng};
use devices::virtio::transport::{NewError, Shared, SharedDevice};
use devices::virtio::vhost_user;
use devices::virtio::vhost_user::blk::VhostUserBlk;
use devices::virtio::vhost_user::frontend::store_us;
use devices::virtio::vhost_user::session::{Lost, Session};
use devices::virtio::vsock::Vsock;

use crate::balloon::pages;
use crate::config::console::{Change, Ends};
use crate::config::network::Interface;
use crate::config::pmem::PmemFile;
use crate::config::vhost_user::{calls, connecting};
use crate::config::vsock::Socket;
use crate::config::{self, Backing, Drive};
use crate::file_memory::{FileMemory, FileMemoryError};
use crate::host::{KvmHost, NoSuchThread};
use crate::machine::Board;
use crate::memory::shared_file;
use crate::metrics::Metrics;
use crate::x86_64::acpi::{PciWindows, VirtioMmio};
use crate::x86_64::layout;

/// How many virtio devices a guest may have on PCI: all slots of the bus but the host bridge's.
pub const MAX_PCI: usize = 31;
/// How many on virtio-mmio: each has a pin of the I/O APIC to itself, as an edge cannot be shared.
pub const MAX_MMIO: usize = 18;

const _: () = assert!(MAX_PCI == devices::pci::root::SLOTS - 1);
const _: () = assert!(
    MAX_MMIO as u64 <= (layout::VIRTIO_MMIO.end - layout::VIRTIO_MMIO.start) / layout::VIRTIO_MMIO_SIZE
);

/// Between two looks whether a back-end has answered, which takes it less as a rule.
const ASK_AGAIN: Duration = Duration::from_millis(2);

/// How many virtio devices there is room for. Each drive is one, and so are the entropy device and the console.
pub fn capacity(pci: bool) -> usize {
    if pci { MAX_PCI } else { MAX_MMIO }
}

/// The devices by kind, for what is asked of one of them, and by place, for what is asked of all.
pub struct Slots {
    places: Vec<Place>,
    drives: Vec<Named<Blk>>,
    /// Those that another process serves.
    vhost_user_drives: Vec<Named<VhostUserBlk>>,
    interfaces: Vec<Named<Net>>,
    pmems: Vec<Named<Pmem>>,
    entropy: Option<Arc<Mutex<Rng>>>,
    console: Option<Arc<Mutex<Console>>>,
    vsock: Option<Arc<Mutex<Vsock>>>,
    balloon: Option<Arc<Mutex<Balloon>>>,
    memory: Option<Arc<Mutex<Mem>>>,
    /// Taken away, and the guest has not let go of them: each has its place.
    dead: Vec<Taken>,
    way: Way,
}

/// How the guest reaches virtio devices.
enum Way {
    Pci { root: Arc<Root>, windows: PciWindows },
    Mmio(Vec<VirtioMmio>),
}

/// Where one device is.
enum Place {
    Pci { slot: usize, function: Arc<Mutex<Pci>> },
    Mmio { base: u64, registers: Arc<Mutex<Mmio>> },
}

/// A device that there may be several of. On virtio-mmio it has no slot.
struct Named<D> {
    id: String,
    slot: Option<usize>,
    /// Of its transport.
    shared: Arc<Shared>,
    device: Arc<Mutex<D>>,
}

/// A device that can be taken out while the guest runs, by its id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unpluggable {
    Drive(String),
    Interface(String),
    Pmem(String),
}

/// What a slot had that the guest has let go of.
pub struct Unplugged {
    /// `None` for what was taken away before.
    pub device: Option<Unpluggable>,
    /// The guest memory that was its file.
    pub memory: Option<Range<u64>>,
}

/// What is left of a device on the host's side when it was taken away.
struct Taken {
    slot: usize,
    memory: Option<Range<u64>>,
}

impl Slots {
    /// Empty slots on `board`.
    pub fn new(board: &Board) -> Result<Self, SlotsError> {
        let way = if board.pci { pci(board)? } else { Way::Mmio(Vec::new()) };
        Ok(Self {
            places: Vec::new(),
            drives: Vec::new(),
            vhost_user_drives: Vec::new(),
            interfaces: Vec::new(),
            pmems: Vec::new(),
            entropy: None,
            console: None,
            vsock: None,
            balloon: None,
            memory: None,
            dead: Vec::new(),
            way,
        })
    }

    /// Makes what there is by now answer on `bus`: on PCI also what comes later.
    pub fn connect(&self, bus: &mut Bus) -> Result<(), BusError> {
        if let Way::Pci { root, .. } = &self.way {
            root.connect(bus, layout::ECAM.start)?;
        }
        self.places.iter().try_for_each(|place| match place {
            Place::Pci { .. } => Ok(()),
            Place::Mmio { base, registers } => bus.insert(*base, mmio::SIZE, registers.clone()),
        })
    }

    /// The PCI bus, if there is one.
    pub fn root(&self) -> Option<Arc<Root>> {
        match &self.way {
            Way::Pci { root, .. } => Some(root.clone()),
            Way::Mmio(_) => None,
        }
    }

    /// The slot of a device; `None` also when there is no such device.
    pub fn slot_of(&self, device: &Unpluggable) -> Option<usize> {
        match device {
            Unpluggable::Drive(id) => match find(&self.drives, id) {
                Some(drive) => drive.slot,
                None => find(&self.vhost_user_drives, id)?.slot,
            },
            Unpluggable::Interface(id) => find(&self.interfaces, id)?.slot,
            Unpluggable::Pmem(id) => find(&self.pmems, id)?.slot,
        }
    }

    /// Takes the device in `slot` away from a guest that has not let go of it: its files are closed, it has no id any more,
    /// and its driver keeps what fails all requests. Says which guest memory was its file.
    pub fn take_away(&mut self, slot: usize) -> Option<Range<u64>> {
        let function = self.places.iter().find_map(|place| match place {
            Place::Pci { slot: at, function } if *at == slot => Some(function),
            _ => None,
        })?;
        lock(function).take_away();
        let memory = self.forget(slot)?.memory;
        self.dead.push(Taken { slot, memory: memory.clone() });
        memory
    }

    /// Ends what is in `slot`, which is off the bus already, and says what it was. Nothing of it runs afterwards, and its
    /// files are closed.
    pub fn unplug(&mut self, slot: usize) -> Option<Unplugged> {
        if let Way::Pci { root, .. } = &self.way {
            root.remove(slot);
        }
        self.places.retain(|place| place.slot() != Some(slot));
        match self.dead.iter().position(|taken| taken.slot == slot) {
            Some(place) => Some(Unplugged { device: None, memory: self.dead.remove(place).memory }),
            None => self.forget(slot),
        }
    }

    /// Takes the device in `slot` off the list of its kind.
    fn forget(&mut self, slot: usize) -> Option<Unplugged> {
        let plain = |device| Unplugged { device: Some(device), memory: None };
        take(&mut self.drives, slot)
            .map(|drive| drive.id)
            .or_else(|| take(&mut self.vhost_user_drives, slot).map(|drive| drive.id))
            .map(|id| plain(Unpluggable::Drive(id)))
            .or_else(|| take(&mut self.interfaces, slot).map(|net| plain(Unpluggable::Interface(net.id))))
            .or_else(|| {
                let Named { id, device, .. } = take(&mut self.pmems, slot)?;
                let memory = Some(lock(&device).range());
                Some(Unplugged { device: Some(Unpluggable::Pmem(id)), memory })
            })
    }

    /// A block device for `drive`. Each of these gives the slot on PCI.
    pub fn add_drive(&mut self, drive: Drive, board: &Board) -> Result<Option<usize>, SlotsError> {
        let Drive { settings, backing } = drive;
        let files = match backing {
            Backing::Files(files) => files,
            Backing::Socket(session) => return self.add_vhost_user_drive(settings, session, board),
        };
        let (file, format) = files.for_device(&settings);
        let host = board.hosts.of(settings.io_thread)?;
        let blk = Arc::new(Mutex::new(Blk::new(
            BlkConfig {
                file,
                format,
                read_only: settings.is_read_only.unwrap_or(false),
                cache: cache(&settings),
                engine: config::engine(&settings),
                queues: settings.queues.unwrap_or(1).into(),
                serial: settings.drive_id.clone(),
                limits: limits(settings.rate_limiter.as_ref()),
            },
            None,
        )?));
        let (slot, shared) = self.plug(blk.clone(), host, board)?;
        self.drives.push(Named { id: settings.drive_id, slot, shared, device: blk });
        Ok(slot)
    }

    /// A block device for a drive that another process serves.
    fn add_vhost_user_drive(
        &mut self,
        settings: api_socket::Drive,
        session: Session,
        board: &Board,
    ) -> Result<Option<usize>, SlotsError> {
        // From the first question on.
        let begin = Instant::now().checked_sub(session.took()).unwrap_or_else(Instant::now);
        let socket = settings.socket.clone().unwrap_or_default();
        let queues = settings.queues.unwrap_or(1).into();
        let host = board.hosts.of(settings.io_thread)?;
        let config = vhost_user::blk::Config {
            name: format!("drive {:?} at {}", settings.drive_id, socket.display()),
            session,
            connect: connecting(&socket),
            calls: calls()?,
            rings: shared_file(vhost_user::blk::ring_bytes(queues))?,
            cache: cache(&settings),
            queues,
        };
        let blk =
            VhostUserBlk::new(config, None).map_err(|error| SlotsError::Backend { path: socket, error })?;
        store_us(&blk.counters().init_time_us, begin);
        let blk = Arc::new(Mutex::new(blk));
        let (slot, shared) = self.plug(blk.clone(), host, board)?;
        self.vhost_user_drives.push(Named { id: settings.drive_id, slot, shared, device: blk });
        Ok(slot)
    }

    /// A network device for `interface`.
    pub fn add_interface(
        &mut self,
        interface: Interface,
        board: &Board,
    ) -> Result<Option<usize>, SlotsError> {
        let Interface { settings, tap, vhost, neighbour } = interface;
        let host = board.hosts.of(settings.io_thread)?;
        let config = net::Config {
            tap,
            mac: settings.guest_mac.map(|mac| mac.0),
            mtu: settings.mtu,
            receive_limits: limits(settings.rx_rate_limiter.as_ref()),
            transmit_limits: limits(settings.tx_rate_limiter.as_ref()),
            neighbour,
            vhost,
            room: board.room.clone(),
        };
        let net = Arc::new(Mutex::new(Net::new(config, None)?));
        let (slot, shared) = self.plug(net.clone(), host, board)?;
        self.interfaces.push(Named { id: settings.iface_id, slot, shared, device: net });
        Ok(slot)
    }

    /// A persistent memory device, and its file in guest memory.
    pub fn add_pmem(
        &mut self,
        pmem: PmemFile,
        files: &mut FileMemory,
        board: &Board,
    ) -> Result<Option<usize>, SlotsError> {
        let PmemFile { settings, file } = pmem;
        let host = board.hosts.of(settings.io_thread)?;
        let range = files
            .map(&file, settings.read_only)
            .map_err(|error| SlotsError::File { path: settings.path_on_host.clone(), error })?;
        let config = pmem::Config {
            name: settings.id.clone(),
            file,
            range: range.clone(),
            limits: limits(settings.rate_limiter.as_ref()),
        };
        // A guest that gets no device must not have its memory.
        self.plug_pmem(settings.id, config, host, board).inspect_err(|_| files.unmap(&range))
    }

    fn plug_pmem(
        &mut self,
        id: String,
        config: pmem::Config,
        host: Arc<KvmHost>,
        board: &Board,
    ) -> Result<Option<usize>, SlotsError> {
        let device = Arc::new(Mutex::new(Pmem::new(config, None)?));
        let (slot, shared) = self.plug(device.clone(), host, board)?;
        self.pmems.push(Named { id, slot, shared, device });
        Ok(slot)
    }

    /// The entropy device.
    pub fn add_entropy(
        &mut self,
        entropy: &api_socket::Entropy,
        board: &Board,
    ) -> Result<Option<usize>, SlotsError> {
        let host = board.hosts.of(entropy.io_thread)?;
        let config = RngConfig { limits: limits(entropy.rate_limiter.as_ref()) };
        let rng = Arc::new(Mutex::new(Rng::new(config, None)?));
        let (slot, _) = self.plug(rng.clone(), host, board)?;
        self.entropy = Some(rng);
        Ok(slot)
    }

    /// A console.
    pub fn add_console(
        &mut self,
        console: &config::console::Console,
        board: &Board,
    ) -> Result<Option<usize>, SlotsError> {
        let host = board.hosts.of(console.settings.io_thread)?;
        let settings = &console.settings;
        let ends = |ends: &Ends| -> io::Result<(_, Box<dyn Write + Send>)> {
            let input = ends.input.as_ref().map(File::try_clone).transpose()?.map(OwnedFd::from);
            Ok((input, Box::new(ends.output.try_clone()?)))
        };
        let ports = settings.ports.iter().zip(&console.ports).map(|(port, connected)| {
            let (input, output) = ends(connected)?;
            let (name, size) = (port.name.clone(), config::console::size(port));
            let limits = limits(port.rate_limiter.as_ref());
            Ok(console::PortConfig { name, size, input, output, limits })
        });
        let (input, output) = ends(&console.ends)?;
        let config = console::Config {
            input,
            output,
            size: console::Size { columns: settings.columns, rows: settings.rows },
            limits: limits(settings.rate_limiter.as_ref()),
            ports: ports.collect::<io::Result<_>>()?,
        };
        let device = Arc::new(Mutex::new(Console::new(config, None)?));
        let (slot, _) = self.plug(device.clone(), host, board)?;
        self.console = Some(device);
        Ok(slot)
    }

    /// The socket device.
    pub fn add_vsock(&mut self, socket: Socket, board: &Board) -> Result<Option<usize>, SlotsError> {
        let Socket { io_thread, config } = socket;
        let host = board.hosts.of(io_thread)?;
        let device = Arc::new(Mutex::new(Vsock::new(config, None)?));
        let (slot, _) = self.plug(device.clone(), host, board)?;
        self.vsock = Some(device);
        Ok(slot)
    }

    /// The balloon. Before devices that add to guest memory, or after them: it takes back RAM alone, that which comes and goes
    /// too.
    pub fn add_balloon(
        &mut self,
        settings: &api_socket::Balloon,
        board: &Board,
    ) -> Result<Option<usize>, SlotsError> {
        let host = board.hosts.of(settings.io_thread)?;
        let regions = layout::ram(board.ram_size.bytes()).map(|(start, len)| start..start + len);
        let room = board.room.as_ref().map(|room| room.guest..room.guest + room.size);
        let regions = regions.chain(room);
        let interval = settings.stats_polling_interval_s;
        let config = balloon::Config {
            target_pages: pages(settings.amount_mib),
            deflate_on_oom: settings.deflate_on_oom,
            statistics_interval: (interval > 0).then(|| Duration::from_secs(interval.into())),
            hinting: settings.free_page_hinting,
            reporting: settings.free_page_reporting,
            ram: Ram { regions: regions.collect(), page: board.ram_page },
        };
        let device = Arc::new(Mutex::new(Balloon::new(config, None)?));
        let (slot, _) = self.plug(device.clone(), host, board)?;
        self.balloon = Some(device);
        Ok(slot)
    }

    /// The balloon, if there is one, held until this is dropped.
    pub fn balloon(&self) -> Option<MutexGuard<'_, Balloon>> {
        self.balloon.as_deref().map(lock)
    }

    /// The device by which memory comes and goes.
    pub fn add_memory(
        &mut self,
        config: mem::Config,
        io_thread: Option<u8>,
        board: &Board,
    ) -> Result<Option<usize>, SlotsError> {
        let host = board.hosts.of(io_thread)?;
        let device = Arc::new(Mutex::new(Mem::new(config, None)?));
        let (slot, _) = self.plug(device.clone(), host, board)?;
        self.memory = Some(device);
        Ok(slot)
    }

    /// The memory device, if there is one, held until this is dropped.
    pub fn memory_device(&self) -> Option<MutexGuard<'_, Mem>> {
        self.memory.as_deref().map(lock)
    }

    /// What ACPI must tell the guest of PCI, if there is PCI.
    pub fn pci_windows(&self) -> Option<PciWindows> {
        match &self.way {
            Way::Pci { windows, .. } => Some(windows.clone()),
            Way::Mmio(_) => None,
        }
    }

    /// What ACPI must tell the guest of virtio-mmio.
    pub fn mmio_devices(&self) -> &[VirtioMmio] {
        match &self.way {
            Way::Pci { .. } => &[],
            Way::Mmio(devices) => devices,
        }
    }

    /// What the kernel command line must tell the guest of virtio-mmio, for kernels without ACPI: Linux's with
    /// CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES. One that has both finds each device twice, and refuses the second.
    pub fn kernel_arguments(&self) -> String {
        self.mmio_devices().iter().map(argument).collect::<Vec<_>>().join(" ")
    }

    /// Gives a drive another file or other limits.
    pub fn update_drive(
        &self,
        id: &str,
        image: Option<(File, Format)>,
        change: Option<RateLimiter>,
    ) -> io::Result<()> {
        let Some(drive) = find(&self.drives, id) else { return Ok(()) };
        let mut blk = lock(&drive.device);
        if let Some((file, format)) = image {
            blk.replace(file, format)?;
        }
        if change.is_some() {
            blk.set_limits(limits(change.as_ref()));
        }
        Ok(())
    }

    /// Reads the configuration of a drive that another process serves once more, and tells the guest. Waits for the answer
    /// for a limited time, with the device going on.
    pub fn refresh_drive(&self, id: &str) -> Result<(), Lost> {
        let Some(drive) = find(&self.vhost_user_drives, id) else { return Ok(()) };
        let begin = Instant::now();
        lock(&drive.device).ask_config()?;
        while !lock(&drive.device).config_asked(begin)? {
            thread::sleep(ASK_AGAIN);
        }
        store_us(&lock(&drive.device).counters().config_change_time_us, begin);
        Ok(())
    }

    /// Gives a network interface other limits.
    pub fn update_interface(&self, update: &NetworkInterfaceUpdate) {
        if let Some(interface) = find(&self.interfaces, &update.iface_id) {
            let changed =
                |limiter: &Option<RateLimiter>| limiter.as_ref().map(|limiter| limits(Some(limiter)));
            lock(&interface.device)
                .set_limits(changed(&update.rx_rate_limiter), changed(&update.tx_rate_limiter));
        }
    }

    /// Gives persistent memory other limits.
    pub fn update_pmem(&self, id: &str, change: RateLimiter) {
        if let Some(pmem) = find(&self.pmems, id) {
            lock(&pmem.device).set_limits(limits(Some(&change)));
        }
    }

    /// Gives the entropy device other limits.
    pub fn update_entropy(&self, change: RateLimiter) {
        if let Some(rng) = &self.entropy {
            lock(rng).set_limits(limits(Some(&change)));
        }
    }

    /// Gives a port of the console another size and other limits.
    pub fn update_console(&self, Change { port, size, limits: change }: Change) {
        let Some(console) = &self.console else { return };
        let mut console = lock(console);
        if let Some(size) = size {
            console.resize(port, size);
        }
        if let Some(change) = change {
            console.set_limits(port, limits(Some(&change)));
        }
    }

    /// Stops every device.
    pub fn pause(&self) {
        for place in &self.places {
            match place {
                Place::Pci { function, .. } => lock(function).pause(),
                Place::Mmio { registers, .. } => lock(registers).pause(),
            }
        }
    }

    /// Lets every device go on.
    pub fn resume(&self) {
        for place in &self.places {
            match place {
                Place::Pci { function, .. } => lock(function).resume(),
                Place::Mmio { registers, .. } => lock(registers).resume(),
            }
        }
    }

    /// Tells every device that guest memory has come or gone. Called after each change, and before the guest hears of it.
    pub fn memory_changed(&self) {
        for place in &self.places {
            match place {
                Place::Pci { function, .. } => lock(function).memory_changed(),
                Place::Mmio { registers, .. } => lock(registers).memory_changed(),
            }
        }
    }

    /// Adds the devices' counters.
    pub fn count(&self, metrics: &mut Metrics) {
        self.count_where(metrics, |_| true);
        if let Some(rng) = &self.entropy {
            metrics.add_entropy(lock(rng).counters());
        }
        if let Some(console) = &self.console {
            metrics.add_console(lock(console).counters());
        }
        if let Some(balloon) = self.balloon() {
            metrics.add_balloon(balloon.counters());
        }
        if let Some(memory) = self.memory_device() {
            metrics.add_memory_hotplug(memory.counters());
        }
        if let Some(vsock) = &self.vsock {
            metrics.add_vsock(lock(vsock).counters());
        }
        let places = || self.places.iter().map(Place::shared);
        for (group, device) in [
            ("entropy", DeviceType::Entropy),
            ("balloon", DeviceType::Balloon),
            ("memory_hotplug", DeviceType::Memory),
            ("vsock", DeviceType::Socket),
        ] {
            if let Some(shared) = places().find(|shared| shared.device_type() == device) {
                metrics.add_transport(group, None, shared);
            }
        }
    }

    /// Adds the counters of the device in `slot`.
    pub fn count_slot(&self, slot: usize, metrics: &mut Metrics) {
        self.count_where(metrics, |at| at == Some(slot));
    }

    fn count_where(&self, metrics: &mut Metrics, is_meant: impl Fn(Option<usize>) -> bool) {
        for place in self.places.iter().filter(|place| is_meant(place.slot())) {
            metrics.at(place.slot()).add_interrupts(place.shared());
        }
        for drive in self.drives.iter().filter(|drive| is_meant(drive.slot)) {
            metrics.at(drive.slot).add_block(&drive.id, lock(&drive.device).counters());
            metrics.add_transport("block", Some(&drive.id), drive.shared.clone());
        }
        for drive in self.vhost_user_drives.iter().filter(|drive| is_meant(drive.slot)) {
            metrics.at(drive.slot).add_vhost_user_block(&drive.id, lock(&drive.device).counters());
        }
        for net in self.interfaces.iter().filter(|net| is_meant(net.slot)) {
            metrics.at(net.slot).add_net(&net.id, lock(&net.device).counters());
            metrics.add_transport("net", Some(&net.id), net.shared.clone());
        }
        for pmem in self.pmems.iter().filter(|pmem| is_meant(pmem.slot)) {
            metrics.at(pmem.slot).add_pmem(&pmem.id, lock(&pmem.device).counters());
            metrics.add_transport("pmem", Some(&pmem.id), pmem.shared.clone());
        }
        metrics.at(None);
    }

    fn plug(
        &mut self,
        device: SharedDevice,
        host: Arc<KvmHost>,
        board: &Board,
    ) -> Result<(Option<usize>, Arc<Shared>), SlotsError> {
        let ram = board.ram.clone();
        let place = match &mut self.way {
            Way::Pci { root, .. } => {
                let function = Arc::new(Mutex::new(Pci::new(device, host, ram, None)?));
                Place::Pci { slot: root.add(None, function.clone())?, function }
            }
            Way::Mmio(taken) => {
                let at = next_mmio(taken)?;
                let line = board.interrupts.line(at.gsi)?;
                let registers = Arc::new(Mutex::new(Mmio::new(at.base, device, host, ram, line, None)?));
                taken.push(at);
                Place::Mmio { base: at.base, registers }
            }
        };
        let plugged = (place.slot(), place.shared());
        self.places.push(place);
        Ok(plugged)
    }
}

impl Place {
    fn slot(&self) -> Option<usize> {
        match self {
            Place::Pci { slot, .. } => Some(*slot),
            Place::Mmio { .. } => None,
        }
    }

    fn shared(&self) -> Arc<Shared> {
        match self {
            Place::Pci { function, .. } => lock(function).shared(),
            Place::Mmio { registers, .. } => lock(registers).shared(),
        }
    }
}

/// Takes the device in `slot` out of the list.
fn take<D>(devices: &mut Vec<Named<D>>, slot: usize) -> Option<Named<D>> {
    let place = devices.iter().position(|device| device.slot == Some(slot))?;
    Some(devices.remove(place))
}

fn find<'a, D>(devices: &'a [Named<D>], id: &str) -> Option<&'a Named<D>> {
    devices.iter().find(|device| device.id == id)
}

/// A PCI bus with nothing on it, wide enough for the guest's CPUs.
fn pci(board: &Board) -> Result<Way, SlotsError> {
    let ram = board.ram_size;
    let above_4g = layout::pci_window_64(ram.bytes(), board.physical_bits)
        .ok_or(SlotsError::NoWindow { mib: ram.mib(), bits: board.physical_bits })?;
    let below_4g = layout::PCI_WINDOW_32;
    let root = Arc::new(Root::new(Windows { below_4g: below_4g.clone(), above_4g: Some(above_4g.clone()) }));
    Ok(Way::Pci { root, windows: PciWindows { below_4g, above_4g } })
}

/// The page and the interrupt pin after those taken.
fn next_mmio(taken: &[VirtioMmio]) -> Result<VirtioMmio, SlotsError> {
    let devices = taken.len();
    let gsi = layout::virtio_mmio_gsis().nth(devices).ok_or(SlotsError::Full { devices })?;
    Ok(VirtioMmio { base: layout::VIRTIO_MMIO.start + devices as u64 * layout::VIRTIO_MMIO_SIZE, gsi })
}

/// Linux, Documentation/admin-guide/kernel-parameters.txt.
fn argument(at: &VirtioMmio) -> String {
    const KIB: u64 = layout::VIRTIO_MMIO_SIZE >> 10;
    format!("virtio_mmio.device={KIB}K@{:#x}:{}", at.base, at.gsi)
}

fn cache(drive: &api_socket::Drive) -> Cache {
    match drive.cache_type {
        api_socket::CacheType::Unsafe => Cache::Unsafe,
        api_socket::CacheType::Writeback => Cache::Writeback,
        api_socket::CacheType::Writethrough => Cache::Writethrough,
    }
}

fn limits(limiter: Option<&RateLimiter>) -> Limits {
    let bucket = |bucket: Option<api_socket::TokenBucket>| {
        bucket.map(|b| Bucket {
            size: b.size,
            one_time_burst: b.one_time_burst.unwrap_or(0),
            refill_ms: b.refill_time,
        })
    };
    let limiter = limiter.copied().unwrap_or_default();
    Limits { bandwidth: bucket(limiter.bandwidth), ops: bucket(limiter.ops) }
}

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a device has no place.
#[derive(Debug, thiserror::Error)]
pub enum SlotsError {
    #[error(
        "there is no room for another virtio device beside {devices}; give the guest fewer drives, network \
         interfaces and persistent memories"
    )]
    Full { devices: usize },
    #[error(
        "mem_size_mib is {mib}: the guest's CPUs address {bits} bits, which leaves nothing for PCI above it; give the \
         guest less memory"
    )]
    NoWindow { mib: u64, bits: u8 },
    #[error("pmem: `path_on_host` is {}: {error}", .path.display())]
    File { path: PathBuf, error: FileMemoryError },
    #[error("drive: `socket` is {}: {error}", .path.display())]
    Backend { path: PathBuf, error: Lost },
    #[error("{0}")]
    IoThread(#[from] NoSuchThread),
    #[error("{0}")]
    Add(#[from] AddError),
    #[error("{0}")]
    Pci(#[from] PciError),
    #[error("two devices want one address: {0}")]
    Bus(#[from] BusError),
    #[error("{0}")]
    New(#[from] NewError),
    #[error("host: {0}")]
    Host(#[from] io::Error),
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use devices::memory::{GuestRam, Memory};
    use vm_memory::GuestAddress;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::file_memory::ALIGN;
    use crate::host::Hosts;
    use crate::memory::ByteSize;
    use crate::x86_64::interrupts::Interrupts;

    const FREE: Range<u64> = 0x40_0000_0000..0x40_0000_0000 + ALIGN;

    /// On the host's KVM, which need not be able to run anything; and what maps files there.
    fn board() -> Option<(Board, FileMemory)> {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            eprintln!("skipped: this test needs /dev/kvm");
            return None;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let interrupts = Interrupts::new(vm.clone()).unwrap();
        let (hosts, _) = Hosts::new(&vm, &interrupts, &BTreeSet::from([0, 3])).unwrap();
        let ram = Memory::new(GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let files = FileMemory::new(vm, ram.clone(), FREE, 1);
        let board = Board {
            hosts,
            interrupts,
            ram,
            ram_size: ByteSize::ram_of_mib(1).unwrap(),
            room: None,
            ram_page: layout::PAGE,
            physical_bits: 40,
            pci: true,
            boot_timer: false,
            attention: EventFd::new(0).unwrap(),
            vcpus: 1,
        };
        Some((board, files))
    }

    #[test]
    fn a_file_whose_device_has_no_place_is_not_in_guest_memory() {
        let Some((board, mut files)) = board() else { return };
        let mut slots = Slots::new(&board).unwrap();
        for _ in 0..MAX_PCI {
            slots.add_entropy(&api_socket::Entropy::default(), &board).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        file.set_len(ALIGN).unwrap();
        let pmem = PmemFile { settings: api_socket::Pmem::default(), file: file.try_clone().unwrap() };
        let error = slots.add_pmem(pmem, &mut files, &board).unwrap_err().to_string();
        assert!(error.contains("31 PCI slots"), "{error}");
        assert_eq!(files.map(&file, false).unwrap(), FREE, "there is room for it");
    }

    #[test]
    fn devices_without_pci_are_on_the_command_line_with_size_address_and_interrupt() {
        let Some((board, _)) = board() else { return };
        let arguments = |board: &Board| {
            let mut slots = Slots::new(board).unwrap();
            for _ in 0..2 {
                slots.add_entropy(&api_socket::Entropy::default(), board).unwrap();
            }
            slots.kernel_arguments()
        };
        assert_eq!(arguments(&board), "");
        let expected = "virtio_mmio.device=4K@0xc0001000:5 virtio_mmio.device=4K@0xc0002000:6";
        assert_eq!(arguments(&Board { pci: false, ..board }), expected);
    }

    #[test]
    fn without_pci_there_is_a_pin_for_each_device_and_none_is_the_clocks() {
        let mut taken = Vec::new();
        while let Ok(at) = next_mmio(&taken) {
            taken.push(at);
        }
        assert_eq!(taken.len(), MAX_MMIO);
        let pins: Vec<_> = taken.iter().map(|at| at.gsi).collect();
        assert_eq!(pins, [5, 6, 7].into_iter().chain(9..24).collect::<Vec<_>>());
        assert!(taken.windows(2).all(|pair| pair[0].base + layout::PAGE == pair[1].base));
    }

    #[test]
    fn a_device_on_a_thread_that_is_not_there_has_no_place() {
        let Some((board, _)) = board() else { return };
        let mut slots = Slots::new(&board).unwrap();
        let on = |io_thread| api_socket::Entropy { io_thread, ..api_socket::Entropy::default() };
        for thread in [None, Some(0), Some(3)] {
            slots.add_entropy(&on(thread), &board).unwrap();
        }
        let error = slots.add_entropy(&on(Some(2)), &board).unwrap_err().to_string();
        assert!(error.contains("`io_thread` is 2") && error.contains("io threads 0, 3"), "{error}");
    }
}
