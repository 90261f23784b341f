//! Where virtio devices are plugged in: functions of the PCI bus, or pages of virtio-mmio registers.
//!
//! A new kind of device has its line in `machine.rs` and one `add_…` here.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api_socket::RateLimiter;
use devices::backend::rate_limiter::{Bucket, Limits};
use devices::bus::{Bus, BusError};
use devices::virtio::blk::{Blk, Cache, Config as BlkConfig};
use devices::virtio::mmio::{self, Mmio};
use devices::virtio::rng::{Config as RngConfig, Rng};
use devices::virtio::transport::{NewError, SharedDevice};

use crate::config::Drive;
use crate::machine::Board;
use crate::metrics::Metrics;
use crate::x86_64::acpi::{PciWindows, VirtioMmio};
use crate::x86_64::layout;

/// The devices by kind, for what is asked of one of them, and by place, for what is asked of all.
pub struct Slots {
    places: Vec<Place>,
    drives: Vec<(String, Arc<Mutex<Blk>>)>,
    entropy: Option<Arc<Mutex<Rng>>>,
    pci: Option<PciWindows>,
    mmio: Vec<VirtioMmio>,
}

/// Where one device is.
enum Place {
    Mmio(Arc<Mutex<Mmio>>),
}

impl Slots {
    /// Empty slots on `board`.
    pub fn new(_board: &Board, _bus: &mut Bus) -> Result<Self, SlotsError> {
        Ok(Self { places: Vec::new(), drives: Vec::new(), entropy: None, pci: None, mmio: Vec::new() })
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
                serial: settings.drive_id.clone(),
                limits: limits(settings.rate_limiter.as_ref()),
            },
            None,
        )?));
        self.plug(blk.clone(), board, bus)?;
        self.drives.push((settings.drive_id, blk));
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

    /// What ACPI must tell the guest of PCI, if there is PCI.
    pub fn pci_windows(&self) -> Option<PciWindows> {
        self.pci.clone()
    }

    /// What ACPI must tell the guest of virtio-mmio.
    pub fn mmio_devices(&self) -> &[VirtioMmio] {
        &self.mmio
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

    /// Stops every device.
    pub fn pause(&self) {
        for place in &self.places {
            match place {
                Place::Mmio(device) => lock(device).pause(),
            }
        }
    }

    /// Lets every device go on.
    pub fn resume(&self) {
        for place in &self.places {
            match place {
                Place::Mmio(device) => lock(device).resume(),
            }
        }
    }

    /// Adds the devices' counters.
    pub fn count(&self, metrics: &mut Metrics) {
        for (id, blk) in &self.drives {
            metrics.add_block(id, lock(blk).counters());
        }
        if let Some(rng) = &self.entropy {
            metrics.add_entropy(lock(rng).counters());
        }
    }

    fn plug(&mut self, device: SharedDevice, board: &Board, bus: &mut Bus) -> Result<(), SlotsError> {
        let index = self.mmio.len() as u64;
        let gsi = layout::VIRTIO_MMIO_GSI + self.mmio.len() as u32;
        let base = layout::VIRTIO_MMIO.start + index * layout::VIRTIO_MMIO_SIZE;
        if gsi >= layout::IOAPIC_PINS || base >= layout::VIRTIO_MMIO.end {
            return Err(SlotsError::Full { devices: self.mmio.len() });
        }
        let line = board.interrupts.line(gsi)?;
        let device = Mmio::new(base, device, board.host.clone(), board.ram.clone(), line, None)?;
        let device = Arc::new(Mutex::new(device));
        bus.insert(base, mmio::SIZE, device.clone())?;
        self.places.push(Place::Mmio(device));
        self.mmio.push(VirtioMmio { base, gsi });
        Ok(())
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
    #[error("there is no room for another virtio device beside {devices}; give the guest fewer drives")]
    Full { devices: usize },
    #[error("two devices want one address: {0}")]
    Bus(#[from] BusError),
    #[error("{0}")]
    New(#[from] NewError),
    #[error("host: {0}")]
    Host(#[from] io::Error),
}
