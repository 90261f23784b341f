//! Where virtio devices are plugged in: functions of the PCI bus, or pages of virtio-mmio registers.
//!
//! A new kind of device has its line in `machine.rs` and one `add_…` here.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api_socket::{NetworkInterfaceUpdate, RateLimiter};
use devices::backend::rate_limiter::{Bucket, Limits};
use devices::bus::{Bus, BusError};
use devices::pci::root::{AddError, Root, Windows};
use devices::virtio::balloon::{self, Balloon, Ram};
use devices::virtio::blk::{Blk, Cache, Config as BlkConfig};
use devices::virtio::console::{self, Console};
use devices::virtio::mmio::{self, Mmio};
use devices::virtio::net::{self, Net};
use devices::virtio::pci::{Pci, PciError};
use devices::virtio::pmem::{self, Pmem};
use devices::virtio::rng::{Config as RngConfig, Rng};
use devices::virtio::transport::{NewError, SharedDevice};
use devices::virtio::vsock::{self, Vsock};

use crate::balloon::pages;
use crate::config::network::Interface;
use crate::config::pmem::PmemFile;
use crate::config::{self, Drive};
use crate::file_memory::{FileMemory, FileMemoryError};
use crate::machine::Board;
use crate::metrics::Metrics;
use crate::x86_64::acpi::{PciWindows, VirtioMmio};
use crate::x86_64::layout;

/// How many virtio devices a guest may have on PCI: all slots of the bus but the host bridge's.
pub const MAX_PCI: usize = 31;
/// How many on virtio-mmio: each has a pin of the I/O APIC to itself, as an edge cannot be shared.
pub const MAX_MMIO: usize = 18;

const _: () = assert!(MAX_PCI == devices::pci::root::SLOTS - 1);
const _: () = assert!(MAX_MMIO == (layout::IOAPIC_PINS - layout::VIRTIO_MMIO_GSI) as usize);

/// How many virtio devices there is room for. Each drive is one, and so are the entropy device and the console.
pub fn capacity(pci: bool) -> usize {
    if pci { MAX_PCI } else { MAX_MMIO }
}

/// The devices by kind, for what is asked of one of them, and by place, for what is asked of all.
pub struct Slots {
    places: Vec<Place>,
    drives: Vec<(String, Arc<Mutex<Blk>>)>,
    interfaces: Vec<(String, Arc<Mutex<Net>>)>,
    pmems: Vec<(String, Arc<Mutex<Pmem>>)>,
    entropy: Option<Arc<Mutex<Rng>>>,
    console: Option<Arc<Mutex<Console>>>,
    vsock: Option<Arc<Mutex<Vsock>>>,
    balloon: Option<Arc<Mutex<Balloon>>>,
    way: Way,
}

/// How the guest reaches virtio devices.
enum Way {
    Pci { root: Arc<Root>, windows: PciWindows },
    Mmio(Vec<VirtioMmio>),
}

/// Where one device is.
enum Place {
    Pci(Arc<Mutex<Pci>>),
    Mmio(Arc<Mutex<Mmio>>),
}

impl Slots {
    /// Empty slots on `board`, whose guest reaches them through `bus`.
    pub fn new(board: &Board, bus: &mut Bus) -> Result<Self, SlotsError> {
        let way = if board.pci { pci(board, bus)? } else { Way::Mmio(Vec::new()) };
        Ok(Self {
            places: Vec::new(),
            drives: Vec::new(),
            interfaces: Vec::new(),
            pmems: Vec::new(),
            entropy: None,
            console: None,
            vsock: None,
            balloon: None,
            way,
        })
    }

    /// A block device for `drive`.
    pub fn add_drive(&mut self, drive: Drive, board: &Board, bus: &mut Bus) -> Result<(), SlotsError> {
        let Drive { settings, file } = drive;
        let blk = Arc::new(Mutex::new(Blk::new(
            BlkConfig {
                file,
                read_only: settings.is_read_only.unwrap_or(false),
                cache: match settings.cache_type {
                    api_socket::CacheType::Unsafe => Cache::Unsafe,
                    api_socket::CacheType::Writeback => Cache::Writeback,
                },
                engine: config::engine(&settings),
                serial: settings.drive_id.clone(),
                limits: limits(settings.rate_limiter.as_ref()),
            },
            None,
        )?));
        self.plug(blk.clone(), board, bus)?;
        self.drives.push((settings.drive_id, blk));
        Ok(())
    }

    /// A network device for `interface`.
    pub fn add_interface(
        &mut self,
        interface: Interface,
        board: &Board,
        bus: &mut Bus,
    ) -> Result<(), SlotsError> {
        let Interface { settings, tap, neighbour } = interface;
        let config = net::Config {
            tap,
            mac: settings.guest_mac.map(|mac| mac.0),
            mtu: settings.mtu,
            receive_limits: limits(settings.rx_rate_limiter.as_ref()),
            transmit_limits: limits(settings.tx_rate_limiter.as_ref()),
            neighbour,
        };
        let net = Arc::new(Mutex::new(Net::new(config, None)?));
        self.plug(net.clone(), board, bus)?;
        self.interfaces.push((settings.iface_id, net));
        Ok(())
    }

    /// A persistent memory device, and its file in guest memory.
    pub fn add_pmem(
        &mut self,
        pmem: PmemFile,
        files: &mut FileMemory,
        board: &Board,
        bus: &mut Bus,
    ) -> Result<(), SlotsError> {
        let PmemFile { settings, file } = pmem;
        let range = files
            .map(&file, settings.read_only)
            .map_err(|error| SlotsError::File { path: settings.path_on_host.clone(), error })?;
        let config = pmem::Config { file, range, limits: limits(settings.rate_limiter.as_ref()) };
        let pmem = Arc::new(Mutex::new(Pmem::new(config, None)?));
        self.plug(pmem.clone(), board, bus)?;
        self.pmems.push((settings.id, pmem));
        Ok(())
    }

    /// The entropy device.
    pub fn add_entropy(
        &mut self,
        entropy: &api_socket::Entropy,
        board: &Board,
        bus: &mut Bus,
    ) -> Result<(), SlotsError> {
        let config = RngConfig { limits: limits(entropy.rate_limiter.as_ref()) };
        let rng = Arc::new(Mutex::new(Rng::new(config, None)?));
        self.plug(rng.clone(), board, bus)?;
        self.entropy = Some(rng);
        Ok(())
    }

    /// A console.
    pub fn add_console(
        &mut self,
        console: &config::Console,
        board: &Board,
        bus: &mut Bus,
    ) -> Result<(), SlotsError> {
        let config = console::Config {
            input: console.input.as_ref().map(File::try_clone).transpose()?.map(OwnedFd::from),
            output: Box::new(console.output.try_clone()?),
            size: console::Size { columns: console.settings.columns, rows: console.settings.rows },
        };
        let device = Arc::new(Mutex::new(Console::new(config, None)?));
        self.plug(device.clone(), board, bus)?;
        self.console = Some(device);
        Ok(())
    }

    /// The socket device.
    pub fn add_vsock(
        &mut self,
        config: vsock::Config,
        board: &Board,
        bus: &mut Bus,
    ) -> Result<(), SlotsError> {
        let device = Arc::new(Mutex::new(Vsock::new(config, None)?));
        self.plug(device.clone(), board, bus)?;
        self.vsock = Some(device);
        Ok(())
    }

    /// The balloon. Before devices that add to guest memory, or after them: it takes back RAM alone.
    pub fn add_balloon(
        &mut self,
        settings: &api_socket::Balloon,
        board: &Board,
        bus: &mut Bus,
    ) -> Result<(), SlotsError> {
        let regions = layout::ram(board.ram_size.bytes()).map(|(start, len)| start..start + len);
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
        self.plug(device.clone(), board, bus)?;
        self.balloon = Some(device);
        Ok(())
    }

    /// The balloon, if there is one, held until this is dropped.
    pub fn balloon(&self) -> Option<MutexGuard<'_, Balloon>> {
        self.balloon.as_deref().map(lock)
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

    /// Gives a drive another file or other limits.
    pub fn update_drive(&self, id: &str, file: Option<File>, change: Option<RateLimiter>) -> io::Result<()> {
        let Some((_, blk)) = self.drives.iter().find(|(known, _)| known == id) else { return Ok(()) };
        let mut blk = lock(blk);
        if let Some(file) = file {
            blk.replace(file)?;
        }
        if change.is_some() {
            blk.set_limits(limits(change.as_ref()));
        }
        Ok(())
    }

    /// Gives a network interface other limits.
    pub fn update_interface(&self, update: &NetworkInterfaceUpdate) {
        if let Some((_, net)) = self.interfaces.iter().find(|(known, _)| *known == update.iface_id) {
            let changed =
                |limiter: &Option<RateLimiter>| limiter.as_ref().map(|limiter| limits(Some(limiter)));
            lock(net).set_limits(changed(&update.rx_rate_limiter), changed(&update.tx_rate_limiter));
        }
    }

    /// Gives persistent memory other limits.
    pub fn update_pmem(&self, id: &str, change: RateLimiter) {
        if let Some((_, pmem)) = self.pmems.iter().find(|(known, _)| known == id) {
            lock(pmem).set_limits(limits(Some(&change)));
        }
    }

    /// Stops every device.
    pub fn pause(&self) {
        for place in &self.places {
            match place {
                Place::Pci(device) => lock(device).pause(),
                Place::Mmio(device) => lock(device).pause(),
            }
        }
    }

    /// Lets every device go on.
    pub fn resume(&self) {
        for place in &self.places {
            match place {
                Place::Pci(device) => lock(device).resume(),
                Place::Mmio(device) => lock(device).resume(),
            }
        }
    }

    /// Adds the devices' counters.
    pub fn count(&self, metrics: &mut Metrics) {
        for place in &self.places {
            metrics.add_interrupts(match place {
                Place::Pci(device) => lock(device).shared(),
                Place::Mmio(device) => lock(device).shared(),
            });
        }
        for (id, blk) in &self.drives {
            metrics.add_block(id, lock(blk).counters());
        }
        for (id, net) in &self.interfaces {
            metrics.add_net(id, lock(net).counters());
        }
        for (id, pmem) in &self.pmems {
            metrics.add_pmem(id, lock(pmem).counters());
        }
        if let Some(rng) = &self.entropy {
            metrics.add_entropy(lock(rng).counters());
        }
        if let Some(console) = &self.console {
            metrics.add_console(lock(console).counters());
        }
        if let Some(balloon) = self.balloon() {
            metrics.add_balloon(balloon.counters());
        }
        if let Some(vsock) = &self.vsock {
            metrics.add_vsock(lock(vsock).counters());
        }
    }

    fn plug(&mut self, device: SharedDevice, board: &Board, bus: &mut Bus) -> Result<(), SlotsError> {
        let (host, ram) = (board.host.clone(), board.ram.clone());
        let place = match &mut self.way {
            Way::Pci { root, .. } => {
                let function = Arc::new(Mutex::new(Pci::new(device, host, ram, None)?));
                root.add(None, function.clone())?;
                Place::Pci(function)
            }
            Way::Mmio(taken) => {
                let at = next_mmio(taken)?;
                let line = board.interrupts.line(at.gsi)?;
                let registers = Arc::new(Mutex::new(Mmio::new(at.base, device, host, ram, line, None)?));
                bus.insert(at.base, mmio::SIZE, registers.clone())?;
                taken.push(at);
                Place::Mmio(registers)
            }
        };
        self.places.push(place);
        Ok(())
    }
}

/// A PCI bus with nothing on it, wide enough for the guest's CPUs.
fn pci(board: &Board, bus: &mut Bus) -> Result<Way, SlotsError> {
    let ram = board.ram_size;
    let above_4g = layout::pci_window_64(ram.bytes(), board.physical_bits)
        .ok_or(SlotsError::NoWindow { mib: ram.mib(), bits: board.physical_bits })?;
    let below_4g = layout::PCI_WINDOW_32;
    let root = Arc::new(Root::new(Windows { below_4g: below_4g.clone(), above_4g: Some(above_4g.clone()) }));
    root.connect(bus, layout::ECAM.start)?;
    Ok(Way::Pci { root, windows: PciWindows { below_4g, above_4g } })
}

/// The page and the interrupt pin after those taken.
fn next_mmio(taken: &[VirtioMmio]) -> Result<VirtioMmio, SlotsError> {
    let next = taken
        .last()
        .map_or(VirtioMmio { base: layout::VIRTIO_MMIO.start, gsi: layout::VIRTIO_MMIO_GSI }, |last| {
            VirtioMmio { base: last.base + layout::VIRTIO_MMIO_SIZE, gsi: last.gsi + 1 }
        });
    if next.gsi >= layout::IOAPIC_PINS || next.base >= layout::VIRTIO_MMIO.end {
        return Err(SlotsError::Full { devices: taken.len() });
    }
    Ok(next)
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
