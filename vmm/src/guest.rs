//! A guest that has started: built in one order from a configuration, then only paused and resumed. Dropping it ends it.
//!
//! Does not know requests or phases; `vm.rs` decides when something here may be called.

use std::io;
use std::sync::Arc;

use devices::virtio::mem;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::args::Identity;
use crate::boot::{self, BootError};
use crate::config::memory_hotplug::MemoryHotplug;
use crate::config::{self, Config};
use crate::file_memory::FileMemory;
use crate::host::Hosts;
use crate::hotplug_memory::HotplugMemory;
use crate::machine::{self, Board, Machine, MachineError};
use crate::memory::{ByteSize, GuestMemory, MemoryError};
use crate::sandbox::Sandbox;
use crate::slots::MAX_PCI;
use crate::vcpu::{EndingSender, ExitCounters, Vcpu};
use crate::x86_64::acpi::{self, AcpiError};
use crate::x86_64::capabilities::{self, MissingCapability};
use crate::x86_64::cpuid::{Cpuid, CpuidError, Topology};
use crate::x86_64::interrupts::Interrupts;
use crate::x86_64::layout;
use crate::x86_64::mptable;
use crate::x86_64::msr::{self, MsrError};
use crate::x86_64::ports;
use crate::x86_64::registers::{self, RegisterError};
use crate::x86_64::reset_vector;

/// What a guest takes beside its configuration.
pub struct Surroundings<'a> {
    pub identity: Identity,
    /// Virtio devices are PCI functions; otherwise they are on virtio-mmio.
    pub pci: bool,
    /// The guest may tell when it has booted, and this is said of it in the log.
    pub boot_timer: bool,
    pub endings: EndingSender,
    /// See [`Board::attention`].
    pub attention: &'a EventFd,
    pub sandbox: Arc<Sandbox>,
}

/// Everything that exists only while a guest does.
pub struct Guest {
    pub machine: Machine,
    pub exits: Arc<ExitCounters>,
    vcpus: Vec<Vcpu>,
    // Kept for their lifetime: KVM's memory slots point into the memory.
    _memory: GuestMemory,
    _vm: Arc<VmFd>,
}

impl Guest {
    /// Builds the guest, every vCPU standing at its first instruction. [`Guest::resume`] sets it going.
    ///
    /// Last of all it closes the sandbox on the calling thread and starts the guest's threads in it. When not even these can
    /// be started, a further attempt finds only files that this one could have opened.
    pub fn new(config: &Config, around: Surroundings) -> Result<Self, StartError> {
        // First, since it is what a client forgets.
        let source = config.boot()?;
        let kvm = Kvm::new().map_err(StartError::Kvm)?;
        let (settings, cpu) = (&config.machine, &config.cpu);
        capabilities::check(&kvm, &cpu.kvm_capabilities)?;
        let vm = Arc::new(create_vm(&kvm)?);
        let interrupts = Interrupts::new(vm.clone())?;
        ports::swallow(&vm)?;
        config.check_shared_memory()?;
        let plug = config.memory_hotplug().ok();
        let more = plug.map_or(ByteSize::NONE, |plug| plug.total);
        let mut memory = GuestMemory::new(settings.memory, more, settings.pages, config.shares_memory())?;
        map(&vm, &memory, settings.track_dirty_pages)?;

        let vcpu_count = u32::from(settings.vcpus);
        let fds = (0..vcpu_count)
            .map(|index| vm.create_vcpu(index.into()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(StartError::Vcpu)?;
        let topology = Topology { vcpus: vcpu_count, smt: settings.smt };
        let tsc_khz = fds.first().and_then(|fd| fd.get_tsc_khz().ok());
        let cpuid = Cpuid::new(&kvm, topology, &cpu.cpuid_modifiers, tsc_khz)?;

        let (hosts, idle) = Hosts::new(&vm, &interrupts, &config.io_threads())?;
        let ram = memory.handle();
        let bits = cpuid.physical_bits();
        let mut slots = memory.regions().len() as u32;
        let plug =
            plug.map(|plug| lend(&kvm, &vm, settings, &plug, &mut memory, bits, &mut slots)).transpose()?;
        let hotplug = plug.as_ref().map(|plug| plug.region.clone());
        // A guest without room for PCI has none for files either, and is refused below.
        let space = layout::file_memory(settings.memory.bytes(), hotplug.as_ref(), bits).unwrap_or_default();
        let files = FileMemory::new(vm.clone(), ram.clone(), space, slots);
        let board = Board {
            hosts,
            interrupts,
            ram: ram.clone(),
            ram_size: settings.memory,
            room: memory.room().map(|room| room.told()),
            ram_page: settings.pages.size(),
            physical_bits: bits,
            pci: around.pci,
            boot_timer: around.boot_timer,
            attention: around.attention.try_clone()?,
            vcpus: vcpu_count,
        };
        // RAM alone, as what is loaded goes by its size: there will be files above it.
        let ram = vm_memory::GuestAddressSpace::memory(&ram);
        let machine = machine::build(config, board, files, plug)?;

        let cmdline = config.command_line(&machine.kernel_arguments())?;
        let entry = boot::load(&ram, &source.kernel, source.initrd.as_ref(), &cmdline)?;
        let tables = machine.tables();
        acpi::write(&ram, &tables)?;
        if !around.pci {
            // With PCI a kernel that cannot read ACPI's tables would come up as well, and find no device.
            mptable::write(&ram, &tables).map_err(BootError::Memory)?;
        }
        reset_vector::write(&ram).map_err(BootError::Memory)?;
        for (index, fd) in (0..).zip(&fds) {
            fd.set_cpuid2(&cpuid.for_vcpu(index)?).map_err(StartError::Vcpu)?;
            msr::set(fd, &cpu.msr_modifiers)?;
        }
        // The others wait for this one to wake them (INIT, SIPI).
        if let Some(first) = fds.first() {
            registers::set(first, &entry)?;
        }

        let reach = config.reach();
        around.sandbox.close(&reach.allowed()).map_err(StartError::Sandbox)?;
        around.sandbox.tell(&reach.names());
        let exits = Arc::<ExitCounters>::default();
        let vcpus = (0..)
            .zip(fds)
            .map(|(index, fd)| {
                let name = around.identity.vcpu_thread(index);
                let (buses, sandbox) = (machine.buses.clone(), around.sandbox.clone());
                Vcpu::spawn(name, fd, buses, exits.clone(), around.endings.clone(), sandbox)
            })
            .collect::<io::Result<_>>()?;
        // Last: a start that fails here ends those that it made by dropping the machine, which no device has joined yet.
        for (number, idle) in idle {
            idle.spawn(&around.identity.io_thread(number), around.sandbox.clone())?;
        }
        Ok(Self { machine, exits, vcpus, _memory: memory, _vm: vm })
    }

    /// Lets devices and then vCPUs run.
    pub fn resume(&self) {
        self.machine.resume();
        for vcpu in &self.vcpus {
            vcpu.resume();
        }
    }

    /// Stops vCPUs and then devices. When this returns, nothing of the guest runs and no I/O is half done.
    pub fn pause(&self) {
        let stopping: Vec<_> = self.vcpus.iter().map(Vcpu::pause).collect();
        for stopped in stopping {
            // A thread that is gone does not run either.
            let _ = stopped.recv();
        }
        self.machine.pause();
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, StartError> {
    loop {
        match kvm.create_vm() {
            // A signal may arrive while the kernel waits for its own threads.
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(StartError::CreateVm),
        }
    }
}

/// Memory that comes and goes, with none of it there yet. Adds KVM's memory slots that it may take to `slots`.
fn lend(
    kvm: &Kvm,
    vm: &Arc<VmFd>,
    settings: &config::Machine,
    plug: &MemoryHotplug,
    memory: &mut GuestMemory,
    physical_bits: u8,
    slots: &mut u32,
) -> Result<mem::Config, StartError> {
    let (ram, total, block_size) = (settings.memory.bytes(), plug.total.bytes(), plug.block.bytes());
    let region = layout::hotplug_memory(ram, total, block_size, physical_bits)
        .ok_or(StartError::NoPlace { mib: plug.total.mib(), bits: physical_bits })?;
    let (room, slot_size) = (memory.make_room(region.clone())?, plug.slot.bytes());
    let first = *slots;
    *slots += HotplugMemory::slots(total, slot_size);
    let most = kvm.get_nr_memslots();
    if *slots as usize + MAX_PCI > most {
        return Err(StartError::Slots { mib: plug.slot.mib(), most });
    }
    let handle = memory.handle();
    let backing =
        HotplugMemory::new(vm.clone(), handle.clone(), room, slot_size, first, settings.track_dirty_pages);
    Ok(mem::Config {
        region,
        slot_size,
        block_size,
        page: settings.pages.size(),
        memory: handle,
        backing: Box::new(backing),
    })
}

/// Gives the guest its RAM, one slot per region.
fn map(vm: &VmFd, memory: &GuestMemory, track_dirty_pages: bool) -> Result<(), StartError> {
    for (slot, region) in (0..).zip(memory.regions()) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.guest,
            memory_size: region.size,
            userspace_addr: region.host,
            flags: if track_dirty_pages { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        };
        // SAFETY: the range is a mapping that `memory` owns, and `Guest` keeps `memory` as long as the VM's descriptor
        // and drops its vCPUs first.
        unsafe { vm.set_user_memory_region(region) }.map_err(StartError::Slot)?;
    }
    Ok(())
}

/// Why a guest could not be started. Nothing is left of it, and another attempt is possible.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("/dev/kvm: {0}; is KVM there, and may this user open it?")]
    Kvm(kvm_ioctls::Error),
    #[error("KVM_CREATE_VM: {0}")]
    CreateVm(kvm_ioctls::Error),
    #[error("KVM_SET_USER_MEMORY_REGION: {0}")]
    Slot(kvm_ioctls::Error),
    #[error(
        "`total_size_mib` is {mib}: the guest's CPUs address {bits} bits, which do not reach so far above its other \
         memory and PCI; give it less of either"
    )]
    NoPlace { mib: u64, bits: u8 },
    #[error(
        "`slot_size_mib` is {mib}: these are more slots than this host's KVM has, which is {most} with those for files; \
         give larger ones"
    )]
    Slots { mib: u64, most: usize },
    #[error("vcpu_count: a vCPU cannot be made: {0}")]
    Vcpu(kvm_ioctls::Error),
    #[error("{0}")]
    Capability(#[from] MissingCapability),
    #[error("{0}")]
    Memory(#[from] MemoryError),
    #[error("{0}")]
    Boot(#[from] BootError),
    #[error("ACPI tables: {0}")]
    Acpi(#[from] AcpiError),
    #[error("{0}")]
    Cpuid(#[from] CpuidError),
    #[error("{0}")]
    Msr(#[from] MsrError),
    #[error("{0}")]
    Register(#[from] RegisterError),
    #[error("{0}")]
    Machine(#[from] MachineError),
    #[error("this process cannot be confined: {0}")]
    Sandbox(io::Error),
    #[error("{0}")]
    Configuration(#[from] api_socket::Fault),
    #[error("host: {0}")]
    Host(#[from] io::Error),
}
