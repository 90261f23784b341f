//! What a guest is to be, validated: from the bodies of requests to values that fit together, and from paths to open
//! files. Below here nothing sees a path.
//!
//! Files are opened when the request comes, so that its client hears what is wrong with them, and only once, so that what
//! was checked is what is used. Whether a request is legal now is not decided here (`admit.rs`), nor what a kernel file
//! holds (`boot.rs`), nor what the host has (memory, CPUs).

mod balloon;
mod cmdline;
pub mod console;
mod image;
pub mod memory_hotplug;
pub mod mmds;
pub mod network;
pub mod pmem;
mod reach;
pub mod vhost_user;
pub mod vsock;

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use api_socket::{
    Balloon, BalloonStatsUpdate, BalloonUpdate, BootSource, ConsoleUpdate, CpuConfig, CpuTemplate,
    DriveUpdate, Entropy, EntropyUpdate, Fault, HugePages, IO_THREAD, IoEngine, MachineConfig,
    MachineConfigUpdate, MemoryHotplugConfig, MmdsConfig, NetworkInterface, NetworkInterfaceUpdate, Pmem,
    PmemUpdate, QUEUES, RateLimiter, Reply, Request, TokenBucket, VCPU_COUNT, VmConfig,
};
use devices::backend::direct;
use devices::backend::rate_limiter::{self, Bucket, Limits};
use devices::virtio::blk::{self, Engine};
use devices::virtio::vhost_user::blk::is_read_only;
use devices::virtio::vhost_user::session::Session;

use self::console::Console;
use self::image::Files;
use self::memory_hotplug::MemoryHotplug;
use self::mmds::Mmds;
use self::network::{Interface, Interfaces, metadata_and_vhost, there_already};
use self::pmem::{PmemFile, Pmems, second_root};
use self::vsock::{Socket, Vsock};
use crate::args::Identity;
use crate::handed::Handed;
use crate::memory::{ByteSize, Pages};
use crate::sink::Sink;
use crate::slots::{self, Unpluggable};

/// The longest `partuuid`, in bytes: a GUID, or a GUID and `/PARTNROFF=` with a number.
pub const MAX_PARTUUID: usize = 64;

/// Everything that is configured before the start.
pub struct Config {
    identity: Identity,
    /// Virtio devices are on PCI, which has room for more.
    pci: bool,
    /// Where files may lie that a running guest is given, beside those that it had at its start.
    hot_plug_directory: Option<PathBuf>,
    handed: Handed,

    pub machine: Machine,
    pub cpu: CpuConfig,
    pub entropy: Option<Entropy>,
    balloon: Option<Balloon>,
    memory_hotplug: Option<MemoryHotplug>,
    /// Until the guest has started; the settings are in `console_settings`.
    pub console: Option<Console>,
    console_settings: Option<api_socket::Console>,
    vsock: Option<Vsock>,
    boot_source: Option<BootSource>,
    /// What `boot_source` names, until the guest has started.
    boot: Option<Boot>,
    has_started: bool,
    /// The guest that has started has memory that other processes can be given.
    has_shared_memory: bool,
    /// The root device first, if there is one. What is behind them is there until the guest has started.
    drives: Vec<(api_socket::Drive, Option<Backing>)>,
    interfaces: Interfaces,
    pmems: Pmems,
    mmds: Mmds,
    serial: Serial,
}

/// The CPUs and the memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    pub vcpus: u8,
    /// Two threads to a core.
    pub smt: bool,
    pub memory: ByteSize,
    pub pages: Pages,
    pub track_dirty_pages: bool,
}

/// What the guest boots.
#[derive(Debug)]
pub struct Boot {
    pub kernel: File,
    pub initrd: Option<File>,
}

/// A disk.
#[derive(Debug)]
pub struct Drive {
    pub settings: api_socket::Drive,
    pub backing: Backing,
}

/// What is behind a disk.
#[derive(Debug)]
pub enum Backing {
    /// An image or a block device, and the images behind it. The settings have a path.
    Files(Files),
    /// Another process. The settings have a `socket`.
    Socket(Session),
}

#[derive(Default)]
struct Serial {
    output: Option<Sink>,
    limit: Option<TokenBucket>,
    dropped: Arc<AtomicU64>,
}

impl Config {
    /// A machine of one CPU and 128 MiB with nothing to boot.
    ///
    /// # Errors
    /// That of asking the kernel for random bytes. The values that go with nothing are checked like all others, and are
    /// legal.
    pub fn new(identity: Identity, pci: bool, mmds_limit: usize, handed: Handed) -> Result<Config, Fault> {
        Ok(Config {
            identity,
            pci,
            hot_plug_directory: None,
            handed,
            machine: Machine::new(&MachineConfig::default())?,
            cpu: CpuConfig::default(),
            entropy: None,
            balloon: None,
            memory_hotplug: None,
            console: None,
            console_settings: None,
            vsock: None,
            boot_source: None,
            boot: None,
            has_started: false,
            has_shared_memory: false,
            drives: Vec::new(),
            interfaces: Interfaces::default(),
            pmems: Pmems::default(),
            mmds: Mmds::new(mmds_limit)?,
            serial: Serial::default(),
        })
    }

    /// Says where files may lie that a running guest is given. Before the start.
    ///
    /// # Errors
    /// There is no such directory.
    pub fn set_hot_plug_directory(&mut self, path: &Path) -> Result<(), Fault> {
        let found = path.metadata().map_err(|error| cannot_open("hot-plug-directory", path, &error, ""))?;
        if !found.is_dir() {
            let path = path.display();
            return Err(Fault::bad_request(format!(
                "`hot-plug-directory` is {path}, which is no directory; give the path of one."
            )));
        }
        self.hot_plug_directory = Some(path.to_owned());
        Ok(())
    }

    /// Answers a request about the configuration, with [`Reply::Fault`] when nothing was changed; gives back one that is
    /// about something else. Requests that change something are legal before the start only, but for the metadata.
    #[expect(clippy::result_large_err, reason = "what is given back is a request on its way and no error")]
    pub fn apply(&mut self, request: Request) -> Result<Reply, Request> {
        let done = match request {
            Request::GetVmConfig => return Ok(Reply::VmConfig(Box::new(self.wire()))),
            Request::GetMachineConfig => return Ok(Reply::MachineConfig(self.machine.wire())),
            Request::GetBalloon => {
                return Ok(self.balloon().map_or_else(Reply::Fault, |balloon| Reply::Balloon(*balloon)));
            }
            Request::PutMachineConfig(config) => self.put_machine(&config),
            Request::PatchMachineConfig(update) => self.patch_machine(update),
            Request::PutBootSource(source) => self.put_boot(source),
            Request::PutCpuConfig(config) => {
                self.cpu = config;
                Ok(())
            }
            Request::PutDrive(drive) if !self.has_started => self.put_drive(drive),
            Request::PutNetworkInterface(interface) if !self.has_started => self.put_interface(interface),
            Request::PutPmem(pmem) if !self.has_started => self.put_pmem(pmem),
            Request::PutBalloon(balloon) => self.put_balloon(balloon),
            Request::PutMemoryHotplug(settings) => self.put_memory_hotplug(settings),
            Request::PutConsole(console) => self.put_console(console),
            Request::PutVsock(settings) => self.put_vsock(settings),
            Request::PutEntropy(entropy) => self.put_entropy(entropy),
            Request::PutSerial(serial) => self.put_serial(&serial),
            Request::GetMmds => return Ok(self.mmds.get().unwrap_or_else(Reply::Fault)),
            Request::PutMmds(value) => self.mmds.put(value),
            Request::PatchMmds(patch) => self.mmds.patch(patch),
            Request::PutMmdsConfig(settings) => self.put_mmds_config(settings),
            other => return Err(other),
        };
        Ok(done.map_or_else(Reply::Fault, |()| Reply::Empty))
    }

    /// What there is to boot.
    ///
    /// # Errors
    /// There is nothing.
    pub fn boot(&self) -> Result<&Boot, Fault> {
        self.boot.as_ref().ok_or_else(|| {
            Fault::bad_request(
                "`kernel_image_path` is not set: there is no kernel to boot; PUT /boot-source first.",
            )
        })
    }

    /// The kernel's command line: `boot_args`, or those that go with our name, then what the configuration adds, and
    /// `more`, which is what the built machine must tell. Arguments for init, after ` -- `, stay at the end.
    ///
    /// # Errors
    /// It is longer than a kernel takes.
    pub fn command_line(&self, more: &str) -> Result<String, Fault> {
        let given = self.boot_source.as_ref().and_then(|source| source.boot_args.as_deref());
        let additions = [self.root_argument(), more.to_string()];
        cmdline::compose(given.unwrap_or(cmdline::default_args(self.identity)), &additions)
    }

    /// The io threads that the devices want, and the first, which every guest has.
    pub fn io_threads(&self) -> BTreeSet<u8> {
        let drives = self.drives.iter().map(|(drive, _)| drive.io_thread);
        let interfaces = self.interfaces.settings().map(|interface| interface.io_thread);
        let pmems = self.pmems.settings().map(|pmem| pmem.io_thread);
        let others = [
            self.vsock.as_ref().and_then(|vsock| vsock.settings.io_thread),
            self.balloon.and_then(|balloon| balloon.io_thread),
            self.memory_hotplug.and_then(|memory| memory.settings.io_thread),
            self.entropy.and_then(|entropy| entropy.io_thread),
            self.console_settings.as_ref().and_then(|console| console.io_thread),
        ];
        let wanted = drives.chain(interfaces).chain(pmems).chain(others);
        wanted.flatten().chain([*IO_THREAD.start()]).collect()
    }

    /// The drives, the root device first, each with a descriptor of its own: a start that fails can be tried again.
    ///
    /// # Errors
    /// Those of `dup`; and after [`Config::started`].
    pub fn drives(&self) -> io::Result<Vec<Drive>> {
        let open = |(settings, backing): &(api_socket::Drive, Option<Backing>)| {
            let backing = match backing {
                Some(Backing::Files(files)) => Backing::Files(files.try_clone()?),
                Some(Backing::Socket(session)) => Backing::Socket(session.try_clone()?),
                None => return Err(io::Error::other("the guest has its drives already")),
            };
            Ok(Drive { settings: settings.clone(), backing })
        };
        self.drives.iter().map(open).collect()
    }

    /// The network interfaces, each with descriptors of its own.
    ///
    /// # Errors
    /// As [`Config::drives`].
    pub fn interfaces(&self) -> io::Result<Vec<Interface>> {
        let mut interfaces = self.interfaces.open()?;
        for interface in &mut interfaces {
            interface.neighbour = self.mmds.neighbour(&interface.settings.iface_id)?;
        }
        Ok(interfaces)
    }

    /// The files that were handed over.
    pub fn handed(&self) -> &Handed {
        &self.handed
    }

    /// What the metadata service has done.
    pub fn mmds_counters(&self) -> Arc<metadata::Counters> {
        self.mmds.counters()
    }

    /// Closes the files: the guest has its own, and a disk that is taken away from it must not stay open here.
    pub fn started(&mut self) {
        self.has_shared_memory = self.shares_memory() || self.machine.pages == Pages::Huge2M;
        self.has_started = true;
        self.boot = None;
        self.serial.output = None;
        self.console = None;
        self.vsock.iter_mut().for_each(Vsock::started);
        for (_, backing) in &mut self.drives {
            *backing = None;
        }
        self.interfaces.close();
        self.pmems.close();
        self.mmds.started();
    }

    /// Where the guest's console output goes. Never waits for a reader: what cannot be written is an error.
    ///
    /// # Errors
    /// Those of `dup`, and of making the limit's timer.
    pub fn serial_output(&self) -> io::Result<Box<dyn Write + Send>> {
        let sink = self.serial.output.as_ref().map_or_else(Sink::stdout, Sink::try_clone)?;
        let Some(limit) = self.serial.limit else {
            return Ok(Box::new(sink));
        };
        let limits = Limits { bandwidth: Some(bucket(limit)), ops: None };
        let limiter = rate_limiter::RateLimiter::new(limits, None)?;
        Ok(Box::new(LimitedSerial { sink, limiter, dropped: self.serial.dropped.clone() }))
    }

    /// Counts the bytes of console output that were dropped because they were more than the limit.
    pub fn serial_dropped(&self) -> Arc<AtomicU64> {
        self.serial.dropped.clone()
    }

    /// The socket device, if there is to be one.
    ///
    /// # Errors
    /// Those of `dup`; and after [`Config::started`].
    pub fn vsock(&self) -> io::Result<Option<Socket>> {
        self.vsock.as_ref().map(Vsock::device).transpose()
    }

    /// Checks that all memory can be given to those who are to have it.
    ///
    /// # Errors
    /// Some of it comes and goes, and a back-end is told of memory once.
    pub fn check_shared_memory(&self) -> Result<(), Fault> {
        let shared = self.drives.iter().map(|(drive, _)| drive).find(|drive| drive.socket.is_some());
        match (shared, &self.memory_hotplug) {
            (Some(drive), Some(_)) => Err(comes_and_goes(&drive.drive_id)),
            _ => Ok(()),
        }
    }

    /// Another process is to have the guest's memory too.
    pub fn shares_memory(&self) -> bool {
        self.drives.iter().any(|(drive, _)| drive.socket.is_some())
    }

    /// The settings of the drive with this id.
    ///
    /// # Errors
    /// There is none.
    pub fn drive(&self, id: &str) -> Result<&api_socket::Drive, Fault> {
        self.drives.iter().map(|(drive, _)| drive).find(|drive| drive.drive_id == id).ok_or_else(|| {
            Fault::bad_request(format!(
                "`drive_id` is {id:?}, and this guest has no such drive; GET /vm/config lists them."
            ))
        })
    }

    /// Opens an image or a block device.
    ///
    /// # Errors
    /// What is wrong with `path_on_host`.
    pub fn open_drive(&self, path: &Path, read_only: bool) -> Result<File, Fault> {
        self.open_image("path_on_host", path, read_only)
    }

    /// Opens another image in the place of a drive's own, with the same images behind it.
    ///
    /// # Errors
    /// As for a new drive.
    pub fn open_in_place(&self, drive: &api_socket::Drive, path: &Path) -> Result<Files, Fault> {
        self.open_files(&api_socket::Drive { path_on_host: Some(path.into()), ..drive.clone() }, path)
    }

    fn open_files(&self, drive: &api_socket::Drive, path: &Path) -> Result<Files, Fault> {
        let image = self.open_disk(path, drive)?;
        let backing = drive.backing.iter().enumerate().map(|(place, backing)| {
            let field = format!("path_on_host` of `backing[{place}]");
            Ok((self.open_image(&field, &backing.path_on_host, true)?, backing.format))
        });
        let files = Files { image, backing: backing.collect::<Result<_, Fault>>()? };
        files.check(drive)?;
        Ok(files)
    }

    fn open_image(&self, field: &str, path: &Path, read_only: bool) -> Result<File, Fault> {
        let file = self.open(field, path, read_only)?;
        let kind = file.metadata().map_err(|error| cannot_open(field, path, &error, ""))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let rule = "it must be a disk image or a block device";
            return Err(Fault::bad_request(format!(
                "`{field}` is {}, which is no file; {rule}.",
                path.display()
            )));
        }
        Ok(file)
    }

    /// Opens the disk of this drive, or the one that it is to have from now on.
    ///
    /// # Errors
    /// What is wrong with the path, or with direct I/O on it.
    pub fn open_disk(&self, path: &Path, drive: &api_socket::Drive) -> Result<File, Fault> {
        let file = self.open_drive(path, drive.is_read_only.unwrap_or(false))?;
        if !drive.direct.unwrap_or(false) {
            return Ok(file);
        }
        self.check_shared(path, drive)?;
        direct::enable(&file).and_then(|()| blk::disk(file.try_clone()?)).map_err(|error| {
            Fault::bad_request(format!(
                "`direct` is true, and `path_on_host` is {}: {error}. Leave `direct` out, or give another file.",
                path.display()
            ))
        })?;
        Ok(file)
    }

    /// Direct is an open file, for all who have it: a handed one for none of the drives or for each.
    fn check_shared(&self, path: &Path, drive: &api_socket::Drive) -> Result<(), Fault> {
        let is_cached = |other: &&api_socket::Drive| {
            other.drive_id != drive.drive_id
                && other.path_on_host.as_deref() == Some(path)
                && !other.direct.unwrap_or(false)
        };
        let other = self.drives.iter().map(|(other, _)| other).find(is_cached);
        match other.filter(|_| self.handed.stands_for(path)) {
            Some(other) => Err(Fault::bad_request(format!(
                "`direct` is true, and drive {:?} has {} without it: they share what was handed over. Make both direct or \
                 none, or hand the file over twice.",
                other.drive_id,
                path.display()
            ))),
            None => Ok(()),
        }
    }

    /// Checks a drive that is to be plugged into a running guest, and opens it.
    ///
    /// # Errors
    /// As for one before the start; it is there already, or is what only a guest that has not started can have.
    pub fn drive_to_plug(&self, settings: api_socket::Drive) -> Result<Drive, Fault> {
        let id = &settings.drive_id;
        if self.drive(id).is_ok() {
            return Err(there_already("drive_id", id));
        }
        if settings.is_root_device {
            return Err(Fault::bad_request(format!(
                "`is_root_device` is true for {id:?}, and a running guest has booted; set it to false."
            )));
        }
        if settings.io_engine == Some(IoEngine::Async) {
            return Err(Fault::bad_request(
                "`io_engine` is Async, and the guest runs: this process may make no io_uring any more, since what goes \
                 through one gets past its filters. Give Sync.",
            ));
        }
        if settings.socket.is_some() && !self.has_shared_memory {
            return Err(Fault::bad_request(format!(
                "`socket` is set for {id:?}, and the memory of this guest cannot be given to a back-end, since it was \
                 started without a drive that has one. Give it such a drive before its start, or `huge_pages` 2M."
            )));
        }
        if settings.socket.is_some() && self.memory_hotplug.is_some() {
            return Err(comes_and_goes(id));
        }
        self.check_room(&format!("`drive_id` is {id:?}, which"))?;
        let backing = self.open_backing_of(&settings, None)?;
        Ok(Drive { settings, backing })
    }

    /// Takes down that a running guest has got a drive.
    pub fn drive_plugged(&mut self, settings: api_socket::Drive) {
        self.drives.push((settings, None));
    }

    /// Checks a network interface that is to be plugged into a running guest, and attaches its tap. The metadata service is
    /// not on it.
    ///
    /// # Errors
    /// As for one before the start, or it is there already.
    pub fn interface_to_plug(&self, settings: NetworkInterface) -> Result<Interface, Fault> {
        self.check_room(&format!("`iface_id` is {:?}, which", settings.iface_id))?;
        self.interfaces.to_plug(settings, &self.handed)
    }

    /// Takes down that a running guest has got a network interface.
    pub fn interface_plugged(&mut self, settings: NetworkInterface) {
        self.interfaces.plugged(settings);
    }

    /// Checks persistent memory that is to be plugged into a running guest, and opens it.
    ///
    /// # Errors
    /// As for one before the start, or it is there already.
    pub fn pmem_to_plug(&self, settings: Pmem) -> Result<PmemFile, Fault> {
        if self.pmem(&settings.id).is_ok() {
            return Err(there_already("id", &settings.id));
        }
        self.check_room(&format!("`id` is {:?}, which", settings.id))?;
        let file = self.open_drive(&settings.path_on_host, settings.read_only)?;
        self.pmems.to_plug(settings, file)
    }

    /// Takes down that a running guest has got persistent memory.
    pub fn pmem_plugged(&mut self, settings: Pmem) {
        self.pmems.plugged(settings);
    }

    /// Whether a running guest has this device.
    ///
    /// # Errors
    /// It has not.
    pub fn check_plugged(&self, device: &Unpluggable) -> Result<(), Fault> {
        match device {
            Unpluggable::Drive(id) => self.drive(id).map(drop),
            Unpluggable::Interface(id) => self.interface(id).map(drop),
            Unpluggable::Pmem(id) => self.pmem(id).map(drop),
        }
    }

    /// Takes down that a running guest has lost a device.
    pub fn unplugged(&mut self, device: &Unpluggable) {
        match device {
            Unpluggable::Drive(id) => self.drives.retain(|(drive, _)| drive.drive_id != *id),
            Unpluggable::Interface(id) => self.interfaces.unplugged(id),
            Unpluggable::Pmem(id) => self.pmems.unplugged(id),
        }
    }

    /// Takes down that a running guest's drive has been changed. For one that does not exist it does nothing.
    pub fn drive_updated(&mut self, update: DriveUpdate) {
        let mut drives = self.drives.iter_mut().map(|(drive, _)| drive);
        let Some(settings) = drives.find(|drive| drive.drive_id == update.drive_id) else { return };
        settings.path_on_host = update.path_on_host.or(settings.path_on_host.take());
        settings.rate_limiter = network::changed(settings.rate_limiter, update.rate_limiter);
    }

    /// The settings of the network interface with this id.
    ///
    /// # Errors
    /// There is none.
    pub fn interface(&self, id: &str) -> Result<&NetworkInterface, Fault> {
        self.interfaces.find(id)
    }

    /// Takes down that a running guest's network interface has been changed.
    pub fn interface_updated(&mut self, update: &NetworkInterfaceUpdate) {
        self.interfaces.updated(update);
    }

    /// Takes down that a running guest's entropy device has other limits, and says what they are in all. Those that the update
    /// leaves out stay as they are; `None` when that is all of them.
    ///
    /// # Errors
    /// There is no entropy device.
    pub fn update_entropy(&mut self, update: EntropyUpdate) -> Result<Option<RateLimiter>, Fault> {
        let entropy = self.entropy.as_mut().ok_or_else(|| {
            Fault::bad_request(
                "This guest has no entropy device; PUT /entropy before the start gives it one.",
            )
        })?;
        entropy.rate_limiter = network::changed(entropy.rate_limiter, update.rate_limiter);
        Ok(update.rate_limiter.and(entropy.rate_limiter))
    }

    /// See [`console::change`].
    ///
    /// # Errors
    /// There is no console or no such port, or that has no size.
    pub fn update_console(&mut self, update: &ConsoleUpdate) -> Result<console::Change, Fault> {
        let settings = self.console_settings.as_mut().ok_or_else(|| {
            Fault::bad_request(
                "This guest has no virtio console; PUT /console before the start gives it one.",
            )
        })?;
        console::change(settings, update)
    }

    /// The persistent memory devices, each with a descriptor of its own.
    ///
    /// # Errors
    /// Those of `dup`; and after [`Config::started`].
    pub fn pmems(&self) -> io::Result<Vec<PmemFile>> {
        self.pmems.open()
    }

    /// The settings of the persistent memory with this id.
    ///
    /// # Errors
    /// There is none.
    pub fn pmem(&self, id: &str) -> Result<&Pmem, Fault> {
        self.pmems.find(id)
    }

    /// Takes down that a running guest's persistent memory has been changed.
    pub fn pmem_updated(&mut self, update: &PmemUpdate) {
        self.pmems.updated(update);
    }

    /// The settings of the balloon.
    ///
    /// # Errors
    /// There is none.
    pub fn balloon(&self) -> Result<&Balloon, Fault> {
        self.balloon.as_ref().ok_or_else(balloon::none)
    }

    /// Takes down another size of the balloon.
    ///
    /// # Errors
    /// There is none, or the guest has not so much memory.
    pub fn update_balloon(&mut self, update: BalloonUpdate) -> Result<(), Fault> {
        let balloon = self.balloon.as_mut().ok_or_else(balloon::none)?;
        balloon::check_amount(update.amount_mib, self.machine.memory)?;
        balloon.amount_mib = update.amount_mib;
        Ok(())
    }

    /// Takes down another interval of the balloon's statistics.
    ///
    /// # Errors
    /// There is no balloon, or its statistics would be switched on or off.
    pub fn update_balloon_stats(&mut self, update: BalloonStatsUpdate) -> Result<(), Fault> {
        let balloon = self.balloon.as_mut().ok_or_else(balloon::none)?;
        balloon::check_interval(balloon.stats_polling_interval_s, update.stats_polling_interval_s)?;
        balloon.stats_polling_interval_s = update.stats_polling_interval_s;
        Ok(())
    }

    /// The sizes of memory that comes and goes.
    ///
    /// # Errors
    /// There is none.
    pub fn memory_hotplug(&self) -> Result<MemoryHotplug, Fault> {
        self.memory_hotplug.ok_or_else(memory_hotplug::none)
    }

    /// The reply of `GET /vm/config`.
    pub fn wire(&self) -> VmConfig {
        VmConfig {
            drives: self.drives.iter().map(|(drive, _)| told(drive)).collect(),
            network_interfaces: self.interfaces.settings().cloned().collect(),
            pmem: self.pmems.settings().cloned().collect(),
            boot_source: self.boot_source.clone().unwrap_or_default(),
            machine_config: Some(self.machine.wire()),
            vsock: self.vsock.as_ref().map(|vsock| vsock.settings.clone()),
            entropy: self.entropy,
            mmds_config: self.mmds.settings(),
            balloon: self.balloon,
            memory_hotplug: self.memory_hotplug.map(|memory| memory.settings),
            console: self.console_settings.clone(),
            ..VmConfig::default()
        }
    }

    fn put_machine(&mut self, config: &MachineConfig) -> Result<(), Fault> {
        let machine = Machine::new(config)?;
        if let Some(balloon) = &self.balloon {
            balloon::check_memory(balloon.amount_mib, machine.memory)?;
        }
        self.machine = machine;
        Ok(())
    }

    fn patch_machine(&mut self, update: MachineConfigUpdate) -> Result<(), Fault> {
        let now = self.machine.wire();
        self.put_machine(&MachineConfig {
            vcpu_count: update.vcpu_count.unwrap_or(now.vcpu_count),
            mem_size_mib: update.mem_size_mib.unwrap_or(now.mem_size_mib),
            smt: update.smt.unwrap_or(now.smt),
            cpu_template: update.cpu_template,
            track_dirty_pages: update.track_dirty_pages.unwrap_or(now.track_dirty_pages),
            huge_pages: update.huge_pages.unwrap_or(now.huge_pages),
        })
    }

    fn put_boot(&mut self, settings: BootSource) -> Result<(), Fault> {
        if let Some(args) = &settings.boot_args {
            cmdline::check(args)?;
        }
        let kernel = self.open_regular("kernel_image_path", &settings.kernel_image_path)?;
        let initrd = settings.initrd_path.as_deref();
        let initrd = initrd.map(|path| self.open_regular("initrd_path", path)).transpose()?;
        self.boot = Some(Boot { kernel, initrd });
        self.boot_source = Some(settings);
        Ok(())
    }

    fn put_drive(&mut self, settings: api_socket::Drive) -> Result<(), Fault> {
        let place = self.drives.iter().position(|(drive, _)| drive.drive_id == settings.drive_id);
        self.check_place(place, &settings)?;
        let kept =
            place.and_then(|place| self.drives.get_mut(place)).and_then(|before| kept(before, &settings));
        let backing = self.open_backing_of(&settings, kept)?;
        let first = settings.is_root_device.then_some(0);
        // One that was there keeps its place, unless it becomes the root device: the guest's names go by it.
        if let Some(place) = place {
            self.drives.remove(place);
        }
        let place = first.or(place).unwrap_or(self.drives.len());
        self.drives.insert(place, (settings, Some(backing)));
        Ok(())
    }

    /// Checks a drive, and opens what it names, unless it is `kept`.
    fn open_backing_of(&self, drive: &api_socket::Drive, kept: Option<Session>) -> Result<Backing, Fault> {
        check_io_thread(drive.io_thread)?;
        if let Some(partuuid) = &drive.partuuid {
            check_partuuid(partuuid, drive.is_root_device)?;
        }
        check_queues(drive)?;
        if let Some(socket) = &drive.socket {
            vhost_user::check(drive)?;
            return kept.map_or_else(|| vhost_user::open(socket), Ok).map(Backing::Socket);
        }
        let path = drive.path_on_host.as_deref().ok_or_else(|| {
            Fault::bad_request(
                "`path_on_host` is not set; give the path of a disk image or of a block device.",
            )
        })?;
        image::check_settings(drive)?;
        let files = self.open_files(drive, path)?;
        engine(drive).check(&files.image).map_err(|error| {
            Fault::bad_request(format!(
                "`io_engine` is Async, and this host refuses io_uring: {error}. Give Sync, or see whether \
                 kernel.io_uring_disabled is 0 and no filter of system calls stands in the way."
            ))
        })?;
        Ok(Backing::Files(files))
    }

    /// Opens for reading what must be an ordinary file.
    fn open_regular(&self, field: &str, path: &Path) -> Result<File, Fault> {
        let file = self.open(field, path, true)?;
        let kind = file.metadata().map_err(|error| cannot_open(field, path, &error, ""))?.file_type();
        if !kind.is_file() {
            return Err(Fault::bad_request(format!(
                "`{field}` is {}, which is no file; give the path of one.",
                path.display()
            )));
        }
        Ok(file)
    }

    /// Opens a file, or takes one that was handed over.
    fn open(&self, field: &str, path: &Path, read_only: bool) -> Result<File, Fault> {
        if let Some(handed) = self.handed.find(field, path, !read_only) {
            return handed;
        }
        let mut options = OpenOptions::new();
        // Without this, opening a named pipe would wait for its other end for ever. Files and disks take no notice of it.
        options.read(true).write(!read_only).custom_flags(libc::O_NONBLOCK);
        options.open(path).map_err(|error| {
            let advice = match error.kind() {
                ErrorKind::NotFound => " Is it there, seen from this process's root directory?",
                ErrorKind::PermissionDenied if self.has_started => {
                    " Once the guest runs, Landlock lets this process open what is in a directory of a drive's or of \
                     --hot-plug-directory."
                }
                ErrorKind::PermissionDenied => {
                    " Let this process's user at it, or set `is_read_only` for a disk."
                }
                _ => "",
            };
            cannot_open(field, path, &error, advice)
        })
    }

    /// What tells the kernel of the root device; empty when there is none.
    fn root_argument(&self) -> String {
        let (device, read_only) = match (self.root(), self.pmems.root()) {
            (Some(drive), _) => {
                let partition = drive.partuuid.as_ref().map(|partuuid| format!("PARTUUID={partuuid}"));
                let read_only = match self.drives.first() {
                    Some((_, Some(Backing::Socket(session)))) => is_read_only(session),
                    _ => drive.is_read_only.unwrap_or(false),
                };
                (partition.unwrap_or("/dev/vda".into()), read_only)
            }
            (None, Some((number, pmem))) => (format!("/dev/pmem{number}"), pmem.read_only),
            (None, None) => return String::new(),
        };
        format!("root={device} {}", if read_only { "ro" } else { "rw" })
    }

    fn root(&self) -> Option<&api_socket::Drive> {
        self.drives.first().map(|(drive, _)| drive).filter(|drive| drive.is_root_device)
    }

    fn check_place(&self, place: Option<usize>, settings: &api_socket::Drive) -> Result<(), Fault> {
        if let Some(root) = self.root()
            && settings.is_root_device
            && root.drive_id != settings.drive_id
        {
            return Err(second_root("is_root_device", &settings.drive_id, &root.drive_id));
        }
        if let Some((_, root)) = self.pmems.root()
            && settings.is_root_device
        {
            return Err(second_root("is_root_device", &settings.drive_id, &root.id));
        }
        if place.is_some() {
            return Ok(());
        }
        self.check_room(&format!("`drive_id` is {:?}, which", settings.drive_id))
    }

    /// Checks that there is a slot for one more virtio device.
    fn check_room(&self, device: &str) -> Result<(), Fault> {
        let taken = self.drives.len()
            + self.interfaces.settings().count()
            + self.pmems.settings().count()
            + usize::from(self.vsock.is_some())
            + usize::from(self.entropy.is_some())
            + usize::from(self.balloon.is_some())
            + usize::from(self.memory_hotplug.is_some())
            + usize::from(self.console_settings.is_some());
        let capacity = slots::capacity(self.pci);
        if taken < capacity {
            return Ok(());
        }
        let advice = match self.pci {
            true => String::new(),
            false => format!(" With --enable-pci there is room for {}.", slots::MAX_PCI),
        };
        Err(Fault::bad_request(format!(
            "{device} would be one device too many: the guest has room for {capacity}, drives, network \
             interfaces, persistent memories, socket device, balloon, memory device, entropy device and console \
             together.{advice}"
        )))
    }

    fn put_interface(&mut self, settings: NetworkInterface) -> Result<(), Fault> {
        if self.interfaces.find(&settings.iface_id).is_err() {
            self.check_room(&format!("`iface_id` is {:?}, which", settings.iface_id))?;
        }
        let has_metadata = |mmds: MmdsConfig| mmds.network_interfaces.contains(&settings.iface_id);
        if settings.vhost == Some(true) && self.mmds.settings().is_some_and(has_metadata) {
            return Err(metadata_and_vhost(&settings.iface_id));
        }
        self.interfaces.put(settings, &self.handed)
    }

    fn put_mmds_config(&mut self, settings: MmdsConfig) -> Result<(), Fault> {
        let is_kernels = |id: &&String| self.interfaces.find(id).is_ok_and(|found| found.vhost == Some(true));
        if let Some(id) = settings.network_interfaces.iter().find(is_kernels) {
            return Err(metadata_and_vhost(id));
        }
        self.mmds.configure(settings, |id| self.interfaces.find(id).is_ok())
    }

    fn put_entropy(&mut self, settings: Entropy) -> Result<(), Fault> {
        check_io_thread(settings.io_thread)?;
        if self.entropy.is_none() {
            self.check_room("the entropy device")?;
        }
        self.entropy = Some(settings);
        Ok(())
    }

    fn put_balloon(&mut self, settings: Balloon) -> Result<(), Fault> {
        check_io_thread(settings.io_thread)?;
        balloon::check_amount(settings.amount_mib, self.machine.memory)?;
        if self.balloon.is_none() {
            self.check_room("the balloon")?;
        }
        self.balloon = Some(settings);
        Ok(())
    }

    fn put_memory_hotplug(&mut self, settings: MemoryHotplugConfig) -> Result<(), Fault> {
        let memory = MemoryHotplug::new(settings)?;
        if self.memory_hotplug.is_none() {
            self.check_room("the memory device")?;
        }
        self.memory_hotplug = Some(memory);
        Ok(())
    }

    fn put_pmem(&mut self, settings: Pmem) -> Result<(), Fault> {
        if let Some(root) = self.root()
            && settings.root_device
        {
            return Err(second_root("root_device", &settings.id, &root.drive_id));
        }
        if self.pmems.find(&settings.id).is_err() {
            self.check_room(&format!("`id` is {:?}, which", settings.id))?;
        }
        let file = self.open_drive(&settings.path_on_host, settings.read_only)?;
        self.pmems.put(settings, file)
    }

    fn put_console(&mut self, settings: api_socket::Console) -> Result<(), Fault> {
        check_io_thread(settings.io_thread)?;
        if self.console_settings.is_none() {
            self.check_room("the console")?;
        }
        self.console = Some(console::open(&settings)?);
        self.console_settings = Some(settings);
        Ok(())
    }

    fn put_vsock(&mut self, settings: api_socket::Vsock) -> Result<(), Fault> {
        if self.vsock.is_none() {
            self.check_room("the socket device")?;
        }
        self.vsock = Some(match self.vsock.take() {
            Some(before) => before.replace(settings).map_err(|(before, fault)| {
                self.vsock = Some(before);
                fault
            })?,
            None => Vsock::listen(settings)?,
        });
        Ok(())
    }

    fn put_serial(&mut self, settings: &api_socket::Serial) -> Result<(), Fault> {
        let output = settings.serial_out_path.as_deref();
        let output = output.map(|path| Sink::named("serial_out_path", path, &self.handed)).transpose()?;
        self.serial = Serial { output, limit: settings.rate_limiter, dropped: self.serial.dropped.clone() };
        Ok(())
    }
}

impl Machine {
    /// Checks what a client wants.
    ///
    /// # Errors
    /// A value that is out of range, or two that do not fit.
    pub fn new(config: &MachineConfig) -> Result<Machine, Fault> {
        let vcpus = config.vcpu_count;
        if !VCPU_COUNT.contains(&vcpus) {
            let (least, most) = (VCPU_COUNT.start(), VCPU_COUNT.end());
            return Err(Fault::bad_request(format!(
                "`vcpu_count` is {vcpus}; it must be from {least} to {most}."
            )));
        }
        if config.smt && vcpus > 1 && vcpus % 2 == 1 {
            return Err(Fault::bad_request(format!(
                "`vcpu_count` is {vcpus} and `smt` is true: with two threads to a core it must be 1 or even."
            )));
        }
        if let Some(template) = config.cpu_template.filter(|template| *template != CpuTemplate::None) {
            return Err(Fault::bad_request(format!(
                "`cpu_template` is {template:?}, which this version does not have; leave it out and say with PUT \
                 /cpu-config what the guest's CPUs are to be."
            )));
        }
        let memory = ByteSize::ram_of_mib(config.mem_size_mib)
            .map_err(|error| Fault::bad_request(format!("{error}.")))?;
        if config.huge_pages != HugePages::None && !memory.mib().is_multiple_of(2) {
            return Err(Fault::bad_request(format!(
                "`mem_size_mib` is {} and `huge_pages` is not None: pages of 2 MiB need a multiple of 2.",
                memory.mib()
            )));
        }
        let pages = match config.huge_pages {
            HugePages::None => Pages::Base,
            HugePages::Transparent => Pages::Transparent,
            HugePages::Hugetlbfs2M => Pages::Huge2M,
        };
        Ok(Machine { vcpus, smt: config.smt, memory, pages, track_dirty_pages: config.track_dirty_pages })
    }

    /// The reply of `GET /machine-config`.
    pub fn wire(&self) -> MachineConfig {
        MachineConfig {
            vcpu_count: self.vcpus,
            mem_size_mib: self.memory.mib(),
            smt: self.smt,
            cpu_template: None,
            track_dirty_pages: self.track_dirty_pages,
            huge_pages: match self.pages {
                Pages::Base => HugePages::None,
                Pages::Transparent => HugePages::Transparent,
                Pages::Huge2M => HugePages::Hugetlbfs2M,
            },
        }
    }
}

/// A drive as replies tell it: what was left out has its default, as Firecracker's clients compare it. With a `socket` it is
/// not ours to know.
fn told(drive: &api_socket::Drive) -> api_socket::Drive {
    let mut drive = drive.clone();
    if drive.socket.is_none() {
        drive.is_read_only.get_or_insert(false);
        drive.io_engine.get_or_insert_default();
    }
    drive
}

fn cannot_open(field: &str, path: &Path, error: &io::Error, advice: &str) -> Fault {
    Fault::bad_request(format!("`{field}` is {}, which cannot be opened: {error}.{advice}", path.display()))
}

fn check_io_thread(number: Option<u8>) -> Result<(), Fault> {
    match number {
        Some(number) if !IO_THREAD.contains(&number) => Err(Fault::bad_request(format!(
            "`io_thread` is {number}; it must be from {} to {}.",
            IO_THREAD.start(),
            IO_THREAD.end()
        ))),
        _ => Ok(()),
    }
}

fn comes_and_goes(drive: &str) -> Fault {
    Fault::bad_request(format!(
        "`socket` is set for {drive:?}, and this guest has memory that comes and goes, of which a vhost-user back-end cannot \
         be told; leave out /hotplug/memory or the `socket`."
    ))
}

/// The connection of a drive that is put again. Its back-end would not answer another call: it has one guest at a time.
fn kept(before: &mut (api_socket::Drive, Option<Backing>), now: &api_socket::Drive) -> Option<Session> {
    match before {
        (settings, Some(Backing::Socket(session))) if settings.socket == now.socket => {
            // One that is gone is called again.
            session.receive().ok().and_then(|_| session.try_clone().ok())
        }
        _ => None,
    }
}

/// It goes into the command line, so it must be one word of it.
fn check_partuuid(partuuid: &str, is_root_device: bool) -> Result<(), Fault> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-/=".contains(&byte);
    if partuuid.is_empty() || partuuid.len() > MAX_PARTUUID || !partuuid.bytes().all(legal) {
        return Err(Fault::bad_request(format!(
            "`partuuid` is {partuuid:?}; it must be the id of a partition, as `blkid` tells it: at most {MAX_PARTUUID} \
             letters, digits and hyphens."
        )));
    }
    if !is_root_device {
        return Err(Fault::bad_request(format!(
            "`partuuid` is {partuuid:?} and `is_root_device` is false: it names the partition to boot from. Leave it \
             out, or make this the root device."
        )));
    }
    Ok(())
}

fn check_queues(drive: &api_socket::Drive) -> Result<(), Fault> {
    match drive.queues.filter(|queues| !QUEUES.contains(queues)) {
        Some(queues) => Err(Fault::bad_request(format!(
            "`queues` is {queues}; it must be from {} to {}.",
            QUEUES.start(),
            QUEUES.end()
        ))),
        None => Ok(()),
    }
}

/// How the requests of this drive reach the host's disk.
pub fn engine(drive: &api_socket::Drive) -> Engine {
    match drive.io_engine {
        None | Some(IoEngine::Sync) => Engine::Sync,
        Some(IoEngine::Async) => Engine::Async,
    }
}

/// What tells the kernel its root device. It is the first drive, so that it has the first name.
fn bucket(limit: TokenBucket) -> Bucket {
    let one_time_burst = limit.one_time_burst.unwrap_or(0);
    Bucket { size: limit.size, one_time_burst, refill_ms: limit.refill_time }
}

/// Console output that drops what is more than its limit, as the UART it comes from cannot wait.
struct LimitedSerial {
    sink: Sink,
    limiter: rate_limiter::RateLimiter,
    dropped: Arc<AtomicU64>,
}

impl Write for LimitedSerial {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len() as u64;
        if self.limiter.take(count) {
            return self.sink.write(bytes);
        }
        self.dropped.fetch_add(count, Ordering::Relaxed);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

#[cfg(test)]
mod tests;
