//! The guest from the outside: one owner of configuration and guest, one function per request.
//!
//! Whether a request is legal now is `admit.rs`, whether its values fit is `config.rs`, how a guest is built is
//! `guest.rs`; here they meet.

use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use api_socket::{
    ActionType, BalloonStartCmd, BalloonStatsUpdate, BalloonUpdate, ConsoleUpdate, DriveUpdate,
    EntropyUpdate, Fault, InstanceInfo, InstanceState, MemoryHotplugSizeUpdate, MemoryHotplugStatus,
    NetworkInterface, NetworkInterfaceUpdate, Pmem, PmemUpdate, Reply, Request, Version, VmState,
};
use devices::virtio::balloon::Balloon;
use devices::virtio::mem::Mem;
use vmm_sys_util::eventfd::EventFd;

use crate::admit::{Verdict, admit};
use crate::args::{Args, COMPATIBLE_VERSION, Identity};
use crate::balloon;
use crate::config::Config;
use crate::config::network::{changed, check_limits};
use crate::config::vhost_user;
use crate::guest::{Guest, Surroundings};
use crate::handed::Handed;
use crate::logger::LOGGER;
use crate::metrics::Metrics;
use crate::program;
use crate::sandbox::{Role, Sandbox};
use crate::slots::Unpluggable;
use crate::vcpu::{Ending, EndingSender};

/// Configuration, guest and counters; lives on the control thread.
pub struct Vm {
    identity: Identity,
    id: String,
    pci: bool,
    boot_timer: bool,
    endings: EndingSender,
    attention: EventFd,
    sandbox: Arc<Sandbox>,

    config: Config,
    metrics: Metrics,
    guest: Option<Guest>,
    paused: bool,
    /// SIGTERM has pressed the power button once; the next one does not wait.
    asked_to_power_off: bool,
}

impl Vm {
    /// A VM without a guest, as the command line wants it.
    pub fn new(
        args: &Args,
        handed: Handed,
        endings: EndingSender,
        attention: EventFd,
        sandbox: Arc<Sandbox>,
    ) -> Result<Self, Fault> {
        let mut metrics = Metrics::new(args.identity, &args.id);
        if let Some(path) = &args.metrics_path {
            let settings = api_socket::Metrics { metrics_path: path.clone(), ..Default::default() };
            metrics.open(&settings, &handed)?;
        }
        let mut config = Config::new(args.identity, args.pci, args.mmds_limit, handed)?;
        if let Some(directory) = &args.hot_plug_directory {
            config.set_hot_plug_directory(directory)?;
        }
        metrics.add_mmds(config.mmds_counters());
        Ok(Self {
            identity: args.identity,
            id: args.id.clone(),
            pci: args.pci,
            boot_timer: args.boot_timer,
            endings,
            attention,
            sandbox,
            config,
            metrics,
            guest: None,
            paused: false,
            asked_to_power_off: false,
        })
    }

    /// Counters that are written with this VM's own.
    pub fn metrics(&mut self) -> &mut Metrics {
        &mut self.metrics
    }

    /// Does what a client asks, if it may.
    pub fn handle(&mut self, request: Request) -> Reply {
        match admit(self.state(), self.pci, &request) {
            Verdict::AlreadyDone => Reply::Empty,
            Verdict::Denied(why) => Fault::bad_request(why).into(),
            Verdict::Accept => self.obey(request).unwrap_or_else(Reply::Fault),
        }
    }

    /// The guest's vCPUs run.
    pub fn is_running(&self) -> bool {
        self.state() == InstanceState::Running
    }

    /// Gives the serial port what was typed; says how much of it was taken.
    pub fn serial_input(&mut self, bytes: &[u8]) -> usize {
        self.guest.as_ref().map_or(0, |guest| guest.machine.serial_input(bytes))
    }

    /// SIGTERM or SIGINT: the first asks a running guest to switch itself off; without a guest that could, and the
    /// second time, it is the end.
    pub fn asked_to_end(&mut self) -> Option<Ending> {
        match &self.guest {
            // Firecracker does not ask, and its callers rely on the process being gone.
            Some(guest)
                if self.is_running() && !self.asked_to_power_off && self.identity == Identity::Berth =>
            {
                self.asked_to_power_off = true;
                guest.machine.press_power_button();
                log::info!("Asked to end: the power button was pressed. Ask again to end at once.");
                None
            }
            _ => Some(Ending::Stopped),
        }
    }

    /// Closes the devices that the guest has let go of.
    pub fn take_unplugged(&mut self) {
        let gone = self.guest.as_mut().map(|guest| guest.machine.take_unplugged()).unwrap_or_default();
        for (slot, device) in gone {
            self.unplugged(slot, &device);
        }
    }

    /// Writes the counters, where a file for them is set.
    pub fn flush_metrics(&mut self) {
        if let Err(fault) = self.metrics.flush() {
            log::warn!("metrics: {}", fault.message);
        }
    }

    /// The guest is over: stops what still runs of it and writes the last counters. The process must end now.
    pub fn finish(&mut self) {
        if let Some(guest) = self.guest.take() {
            guest.pause();
            // The end of the process takes it apart faster than we could, and asks no filter.
            std::mem::forget(guest);
        }
        self.flush_metrics();
    }

    fn state(&self) -> InstanceState {
        match (&self.guest, self.paused) {
            (None, _) => InstanceState::NotStarted,
            (Some(_), false) => InstanceState::Running,
            (Some(_), true) => InstanceState::Paused,
        }
    }

    fn obey(&mut self, request: Request) -> Result<Reply, Fault> {
        let request = match self.config.apply(request) {
            Ok(reply) => return Ok(reply),
            Err(request) => request,
        };
        match request {
            Request::GetInstanceInfo => return Ok(Reply::InstanceInfo(self.info())),
            Request::GetVersion => {
                return Ok(Reply::Version(Version { firecracker_version: COMPATIBLE_VERSION.into() }));
            }
            Request::GetBalloonStats => return Ok(Reply::BalloonStats(Box::new(self.balloon_stats()?))),
            Request::GetBalloonHintingStatus => {
                let status = balloon::hinting_status(&*self.hinting_balloon()?);
                return Ok(Reply::BalloonHintingStatus(status));
            }
            Request::GetMemoryHotplug => return Ok(Reply::MemoryHotplug(self.memory_hotplug_status()?)),
            Request::PutLogger(logger) => LOGGER.configure(&logger, self.config.handed())?,
            Request::PutMetrics(metrics) => self.metrics.open(&metrics, self.config.handed())?,
            Request::Action(ActionType::InstanceStart) => self.start()?,
            Request::Action(ActionType::FlushMetrics) => drop(self.metrics.flush()?),
            Request::Action(ActionType::SendCtrlAltDel) => self.guest()?.machine.ctrl_alt_del(),
            Request::PatchVm(VmState::Paused) => self.pause()?,
            Request::PatchVm(VmState::Resumed) => self.resume()?,
            Request::PutDrive(drive) => self.plug_drive(drive)?,
            Request::PutNetworkInterface(interface) => self.plug_interface(interface)?,
            Request::PutPmem(pmem) => self.plug_pmem(pmem)?,
            Request::PatchDrive(update) => self.update_drive(update)?,
            Request::DeleteDrive(id) => self.unplug(&Unpluggable::Drive(id))?,
            Request::DeleteNetworkInterface(id) => self.unplug(&Unpluggable::Interface(id))?,
            Request::DeletePmem(id) => self.unplug(&Unpluggable::Pmem(id))?,
            Request::PatchNetworkInterface(update) => self.update_interface(update)?,
            Request::PatchPmem(update) => self.update_pmem(update)?,
            Request::PatchBalloon(update) => self.update_balloon(update)?,
            Request::PatchBalloonStats(update) => self.update_balloon_stats(update)?,
            Request::StartBalloonHinting(command) => self.start_hinting(command)?,
            Request::StopBalloonHinting => {
                let stopped = self.hinting_balloon()?.stop_hinting();
                balloon::check_hinting(true, stopped)?;
            }
            Request::PatchMemoryHotplug(update) => self.update_memory_hotplug(update)?,
            Request::PatchEntropy(update) => self.update_entropy(update)?,
            Request::PatchConsole(update) => self.update_console(&update)?,
            other => return Err(Fault::bad_request(format!("{other:?} is not supported by this version"))),
        }
        Ok(Reply::Empty)
    }

    fn start(&mut self) -> Result<(), Fault> {
        let around = Surroundings {
            identity: self.identity,
            pci: self.pci,
            boot_timer: self.boot_timer,
            endings: self.endings.clone(),
            attention: &self.attention,
            sandbox: self.sandbox.clone(),
        };
        let guest = Guest::new(&self.config, around)
            .map_err(|error| Fault::bad_request(format!("The guest cannot start: {error}")))?;
        self.metrics.add_vcpus(guest.exits.clone());
        guest.machine.count(&mut self.metrics);
        self.config.started();
        program::forget_the_start();
        self.sandbox.enter(Role::Control);
        guest.resume();
        self.guest = Some(guest);
        log::info!("Successfully started microvm that was configured from one single json or the API.");
        self.flush_metrics();
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Fault> {
        let since = Instant::now();
        self.guest()?.pause();
        self.paused = true;
        let us = microseconds(since);
        (self.metrics.latencies.pause_vm, self.metrics.latencies.vmm_pause_vm) = (us, us);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Fault> {
        let since = Instant::now();
        self.guest()?.resume();
        self.paused = false;
        let us = microseconds(since);
        (self.metrics.latencies.resume_vm, self.metrics.latencies.vmm_resume_vm) = (us, us);
        Ok(())
    }

    fn plug_drive(&mut self, settings: api_socket::Drive) -> Result<(), Fault> {
        let drive = self.config.drive_to_plug(settings)?;
        let settings = drive.settings.clone();
        let guest = self.guest.as_mut().ok_or_else(not_started)?;
        guest.machine.plug_drive(drive, &mut self.metrics).map_err(|error| {
            Fault::bad_request(format!("The drive {:?} cannot be plugged in: {error}", settings.drive_id))
        })?;
        self.config.drive_plugged(settings);
        Ok(())
    }

    fn plug_interface(&mut self, settings: NetworkInterface) -> Result<(), Fault> {
        let interface = self.config.interface_to_plug(settings)?;
        let settings = interface.settings.clone();
        let guest = self.guest.as_mut().ok_or_else(not_started)?;
        guest.machine.plug_interface(interface, &mut self.metrics).map_err(|error| {
            let id = &settings.iface_id;
            Fault::bad_request(format!("The network interface {id:?} cannot be plugged in: {error}"))
        })?;
        self.config.interface_plugged(settings);
        Ok(())
    }

    fn plug_pmem(&mut self, settings: Pmem) -> Result<(), Fault> {
        let pmem = self.config.pmem_to_plug(settings)?;
        let settings = pmem.settings.clone();
        let guest = self.guest.as_mut().ok_or_else(not_started)?;
        guest.machine.plug_pmem(pmem, &mut self.metrics).map_err(|error| {
            Fault::bad_request(format!("Persistent memory {:?} cannot be plugged in: {error}", settings.id))
        })?;
        self.config.pmem_plugged(settings);
        Ok(())
    }

    /// Asks the guest for a device, or takes it away when it has been asked before.
    fn unplug(&mut self, device: &Unpluggable) -> Result<(), Fault> {
        self.config.check_plugged(device)?;
        let guest = self.guest.as_mut().ok_or_else(not_started)?;
        match guest.machine.unplug(device) {
            Some(slot) => self.unplugged(slot, device),
            None => log::info!("The guest was asked to let go of {device:?}."),
        }
        Ok(())
    }

    fn unplugged(&mut self, slot: usize, device: &Unpluggable) {
        self.metrics.forget(slot);
        self.config.unplugged(device);
        log::info!("{device:?} is unplugged.");
    }

    fn update_drive(&mut self, update: DriveUpdate) -> Result<(), Fault> {
        let drive = self.config.drive(&update.drive_id)?;
        if drive.socket.is_some() {
            return self.refresh_drive(&update);
        }
        // Limits that the update leaves out stay as they are.
        let limits = update.rate_limiter.and_then(|change| changed(drive.rate_limiter, Some(change)));
        let open = |path| Ok(self.config.open_in_place(drive, path)?.for_device(drive));
        let image = update.path_on_host.as_deref().map(open).transpose()?;
        self.guest()?.machine.update_drive(&update.drive_id, image, limits).map_err(|error| {
            Fault::bad_request(format!("The drive {:?} cannot be changed: {error}", update.drive_id))
        })?;
        self.config.drive_updated(update);
        Ok(())
    }

    /// Nothing is changed but what the guest knows of it.
    fn refresh_drive(&self, update: &DriveUpdate) -> Result<(), Fault> {
        vhost_user::check_update(update)?;
        self.guest()?.machine.refresh_drive(&update.drive_id).map_err(|error| {
            let id = &update.drive_id;
            Fault::bad_request(format!("The back-end of the drive {id:?} cannot be asked: {error}."))
        })
    }

    fn update_interface(&mut self, update: NetworkInterfaceUpdate) -> Result<(), Fault> {
        let interface = self.config.interface(&update.iface_id)?;
        if interface.vhost == Some(true) {
            check_limits(update.rx_rate_limiter, update.tx_rate_limiter)?;
        }
        // Limits that the update leaves out stay as they are.
        let whole = |before, change: Option<_>| change.and_then(|change| changed(before, Some(change)));
        let update = NetworkInterfaceUpdate {
            rx_rate_limiter: whole(interface.rx_rate_limiter, update.rx_rate_limiter),
            tx_rate_limiter: whole(interface.tx_rate_limiter, update.tx_rate_limiter),
            ..update
        };
        self.guest()?.machine.update_interface(&update);
        self.config.interface_updated(&update);
        Ok(())
    }

    fn update_pmem(&mut self, update: PmemUpdate) -> Result<(), Fault> {
        let before = self.config.pmem(&update.id)?.rate_limiter;
        if let Some(limits) = update.rate_limiter.and_then(|change| changed(before, Some(change))) {
            self.guest()?.machine.update_pmem(&update.id, limits);
        }
        self.config.pmem_updated(&update);
        Ok(())
    }

    fn update_balloon(&mut self, update: BalloonUpdate) -> Result<(), Fault> {
        self.config.update_balloon(update)?;
        self.balloon()?.set_target(balloon::pages(update.amount_mib));
        Ok(())
    }

    fn update_balloon_stats(&mut self, update: BalloonStatsUpdate) -> Result<(), Fault> {
        self.config.update_balloon_stats(update)?;
        if update.stats_polling_interval_s > 0 {
            let interval = Duration::from_secs(update.stats_polling_interval_s.into());
            self.balloon()?.set_statistics_interval(interval);
        }
        Ok(())
    }

    fn balloon_stats(&self) -> Result<api_socket::BalloonStats, Fault> {
        if self.config.balloon()?.stats_polling_interval_s == 0 {
            return Err(Fault::bad_request(
                "`stats_polling_interval_s` is 0, and so there are no statistics; set it with PUT /balloon before the start.",
            ));
        }
        Ok(balloon::stats(&*self.balloon()?))
    }

    fn start_hinting(&self, command: BalloonStartCmd) -> Result<(), Fault> {
        let started = self.hinting_balloon()?.start_hinting(command.acknowledge_on_stop);
        balloon::check_hinting(true, started)
    }

    /// The balloon, which was configured with free page hints.
    fn hinting_balloon(&self) -> Result<MutexGuard<'_, Balloon>, Fault> {
        let configured = self.config.balloon()?.free_page_hinting;
        balloon::check_hinting(configured, configured)?;
        self.balloon()
    }

    fn balloon(&self) -> Result<MutexGuard<'_, Balloon>, Fault> {
        self.config.balloon()?;
        self.guest()?.machine.balloon().ok_or_else(not_started)
    }

    fn update_memory_hotplug(&mut self, update: MemoryHotplugSizeUpdate) -> Result<(), Fault> {
        let size = self.config.memory_hotplug()?.check_requested(update.requested_size_mib)?;
        self.memory_device()?.set_requested(size.bytes());
        Ok(())
    }

    fn memory_hotplug_status(&self) -> Result<MemoryHotplugStatus, Fault> {
        let settings = self.config.memory_hotplug()?.settings;
        let device = self.memory_device()?;
        Ok(MemoryHotplugStatus {
            total_size_mib: settings.total_size_mib,
            slot_size_mib: settings.slot_size_mib,
            block_size_mib: settings.block_size_mib,
            plugged_size_mib: device.plugged() >> 20,
            requested_size_mib: device.requested() >> 20,
        })
    }

    fn memory_device(&self) -> Result<MutexGuard<'_, Mem>, Fault> {
        self.guest()?.machine.memory_device().ok_or_else(not_started)
    }

    fn update_console(&mut self, update: &ConsoleUpdate) -> Result<(), Fault> {
        let change = self.config.update_console(update)?;
        self.guest()?.machine.update_console(change);
        Ok(())
    }

    fn update_entropy(&mut self, update: EntropyUpdate) -> Result<(), Fault> {
        if let Some(limits) = self.config.update_entropy(update)? {
            self.guest()?.machine.update_entropy(limits);
        }
        Ok(())
    }

    fn guest(&self) -> Result<&Guest, Fault> {
        self.guest.as_ref().ok_or_else(not_started)
    }

    fn info(&self) -> InstanceInfo {
        InstanceInfo {
            id: self.id.clone(),
            state: self.state(),
            vmm_version: self.identity.version().into(),
            app_name: self.identity.app_name().into(),
        }
    }
}

fn not_started() -> Fault {
    Fault::bad_request(crate::admit::BEFORE_START)
}

fn microseconds(since: Instant) -> u64 {
    since.elapsed().as_micros().try_into().unwrap_or(u64::MAX)
}
