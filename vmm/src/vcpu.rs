//! A virtual CPU and the thread that runs it: the guest exits, a bus answers, the guest goes on.
//!
//! States are functions: [`Runner::paused`] waits for a command, [`Runner::running`] runs the guest until it is told to
//! stop or the guest ends itself. Registers and CPUID are set before the thread starts, by the machine.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use devices::bus::{Bus, Effect};
use devices::times::Times;
use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::sandbox::{Role, Sandbox};

/// What the guest can reach by an exit: ports and memory-mapped I/O. Shared by all vCPUs.
#[derive(Default)]
pub struct Buses {
    pub ports: Bus,
    pub mmio: Bus,
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    PoweredOff,
    Reset,
    TripleFault,
    Panicked,
    /// The operator ended it (SIGTERM).
    Stopped,
    /// KVM cannot go on; the text says what it reported.
    Failed(String),
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Ending::PoweredOff => write!(f, "powered off"),
            Ending::Reset => write!(f, "reset by itself"),
            Ending::TripleFault => write!(f, "triple fault"),
            Ending::Panicked => write!(f, "its kernel panicked"),
            Ending::Stopped => write!(f, "stopped by the operator"),
            Ending::Failed(why) => write!(f, "{why}"),
        }
    }
}

/// Where vCPUs tell the control thread that the guest has ended.
#[derive(Clone)]
pub struct EndingSender {
    pub queue: Sender<Ending>,
    /// Wakes the control thread.
    pub wake: Arc<EventFd>,
}

/// Exits to user space by kind since the start, for `/metrics`.
#[derive(Debug, Default)]
pub struct ExitCounters {
    pub port_in: AtomicU64,
    pub port_out: AtomicU64,
    pub mmio_read: AtomicU64,
    pub mmio_write: AtomicU64,
    pub failures: AtomicU64,
    /// A guest's clock could not be told of a pause.
    pub kvmclock_failures: AtomicU64,
    /// What they took in this process.
    pub port_in_time: Times,
    pub port_out_time: Times,
    pub mmio_read_time: Times,
    pub mmio_write_time: Times,
}

/// The control thread's handle to one vCPU thread.
pub struct Vcpu {
    commands: Sender<Command>,
    thread: JoinHandle<()>,
    run: Arc<RunPage>,
}

enum Command {
    Resume,
    /// Answered when the vCPU has left the guest with no I/O half done.
    Pause(SyncSender<()>),
}

impl Vcpu {
    /// Starts the thread, confined and paused.
    pub fn spawn(
        name: String,
        fd: VcpuFd,
        buses: Arc<Buses>,
        counters: Arc<ExitCounters>,
        endings: EndingSender,
        sandbox: Arc<Sandbox>,
    ) -> io::Result<Self> {
        let run = Arc::new(RunPage::map(&fd)?);
        let (commands, inbox) = channel();
        let runner = Runner { fd, run: run.clone(), buses, counters, endings, inbox };
        let thread = thread::Builder::new().name(name).spawn(move || {
            sandbox.enter(Role::Vcpu);
            runner.paused();
        })?;
        Ok(Self { commands, thread, run })
    }

    /// Lets the guest run. Nothing to do when it runs.
    pub fn resume(&self) {
        self.run.immediate_exit(false);
        // A thread that has ended has told so on its own.
        let _ = self.commands.send(Command::Resume);
    }

    /// Asks the vCPU to leave the guest; the receiver gets one message when it has. Ask all vCPUs first, then wait.
    pub fn pause(&self) -> Receiver<()> {
        let (done, paused) = sync_channel(1);
        let _ = self.commands.send(Command::Pause(done));
        // The flag before the signal: one that arrives just before KVM_RUN then still counts.
        self.run.immediate_exit(true);
        if let Err(error) = self.thread.kill(SIGRTMIN()) {
            log::error!("a vCPU thread cannot be signalled: {error}");
        }
        paused
    }
}

/// Prepares the process for [`Vcpu::pause`]: the signal does nothing but interrupt KVM_RUN. Once, before any vCPU.
pub fn install_kick_signal() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing)?;
    Ok(())
}

struct Runner {
    fd: VcpuFd,
    run: Arc<RunPage>,
    buses: Arc<Buses>,
    counters: Arc<ExitCounters>,
    endings: EndingSender,
    inbox: Receiver<Command>,
}

/// Why the guest no longer runs.
enum Stop {
    Paused(SyncSender<()>),
    Ended(Ending),
}

impl Runner {
    /// Waits for a command; returns, and with it ends the thread, when the control thread has dropped its handle.
    fn paused(mut self) {
        while let Ok(command) = self.inbox.recv() {
            match command {
                Command::Pause(done) => drop(done.send(())),
                Command::Resume => match self.running() {
                    Stop::Paused(done) => drop(done.send(())),
                    Stop::Ended(ending) => return self.ended(ending),
                },
            }
        }
    }

    /// The guest is over: tells the control thread, and from now on only answers that it stands still.
    fn ended(self, ending: Ending) {
        let _ = self.endings.queue.send(ending);
        let _ = self.endings.wake.write(1);
        while let Ok(command) = self.inbox.recv() {
            if let Command::Pause(done) = command {
                let _ = done.send(());
            }
        }
    }

    fn running(&mut self) -> Stop {
        // The guest may have been stopped from outside: its watchdogs must not take that for a hang. EINVAL where the
        // guest has not set up a kvmclock, and then there is nothing to tell.
        if self.fd.kvmclock_ctrl().is_err_and(|error| error.errno() != libc::EINVAL) {
            self.counters.kvmclock_failures.fetch_add(1, Ordering::Relaxed);
        }
        loop {
            match self.fd.run() {
                Ok(exit) => match answer(exit, &self.run, &self.buses, &self.counters) {
                    Ok(Effect::None) => {}
                    Ok(Effect::Reset) => return Stop::Ended(Ending::Reset),
                    Ok(Effect::PowerOff) => return Stop::Ended(Ending::PoweredOff),
                    Ok(Effect::Panicked) => return Stop::Ended(Ending::Panicked),
                    Err(ending) => return Stop::Ended(ending),
                },
                // KVM has completed the pending port or MMIO access before it saw the flag or the signal, so the guest's
                // state is whole here.
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                    if let Ok(Command::Pause(done)) = self.inbox.try_recv() {
                        return Stop::Paused(done);
                    }
                }
                Err(error) => {
                    self.counters.failures.fetch_add(1, Ordering::Relaxed);
                    return Stop::Ended(Ending::Failed(format!("KVM_RUN: {error}")));
                }
            }
        }
    }
}

/// Exit in, entry out.
fn answer(exit: VcpuExit, run: &RunPage, buses: &Buses, counters: &ExitCounters) -> Result<Effect, Ending> {
    let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
    let begin = Instant::now();
    match exit {
        VcpuExit::IoIn(port, data) => {
            count(&counters.port_in);
            // A string instruction is one exit with many accesses to one port.
            for access in data.chunks_mut(run.io_size()) {
                buses.ports.read(port.into(), access);
            }
            counters.port_in_time.add(begin);
            Ok(Effect::None)
        }
        VcpuExit::IoOut(port, data) => {
            count(&counters.port_out);
            for access in data.chunks(run.io_size()) {
                let effect = buses.ports.write(port.into(), access);
                if effect != Effect::None {
                    return Ok(effect);
                }
            }
            counters.port_out_time.add(begin);
            Ok(Effect::None)
        }
        VcpuExit::MmioRead(address, data) => {
            count(&counters.mmio_read);
            buses.mmio.read(address, data);
            counters.mmio_read_time.add(begin);
            Ok(Effect::None)
        }
        VcpuExit::MmioWrite(address, data) => {
            count(&counters.mmio_write);
            let effect = buses.mmio.write(address, data);
            counters.mmio_write_time.add(begin);
            Ok(effect)
        }
        VcpuExit::Shutdown => Err(Ending::TripleFault),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Err(Ending::PoweredOff),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Err(Ending::Reset),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => Err(Ending::Panicked),
        VcpuExit::Intr | VcpuExit::Unknown => Ok(Effect::None),
        VcpuExit::FailEntry(reason, cpu) => {
            count(&counters.failures);
            Err(Ending::Failed(format!(
                "the processor refused to enter the guest: reason {reason:#x}, cpu {cpu}"
            )))
        }
        VcpuExit::InternalError => {
            count(&counters.failures);
            Err(Ending::Failed(format!("KVM internal error, suberror {}", run.internal_suberror())))
        }
        other => {
            count(&counters.failures);
            Err(Ending::Failed(format!("KVM exit that this machine does not use: {other:?}")))
        }
    }
}

/// Our own mapping of a vCPU's `struct kvm_run`, beside the one inside [`VcpuFd`]: it reaches the flag that stops the
/// vCPU from another thread, and the two fields that kvm-ioctls does not hand out.
struct RunPage {
    page: NonNull<kvm_run>,
}

// SAFETY: the page is shared with the kernel anyway; `immediate_exit` is only touched as an atomic, and the other fields
// only by the vCPU's own thread right after KVM_RUN, when the kernel does not write them.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    fn map(fd: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a new shared mapping at an address of the kernel's choice; the result is checked below.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<kvm_run>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(page.cast()).map(|page| Self { page }).ok_or_else(|| io::Error::other("mmap gave 0"))
    }

    /// While set, KVM_RUN completes a pending access and returns EINTR without entering the guest.
    fn immediate_exit(&self, on: bool) {
        // SAFETY: the byte lies in the mapping that `map` made and `drop` ends; all accesses of ours are atomic.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut (*self.page.as_ptr()).immediate_exit) };
        flag.store(on.into(), Ordering::SeqCst);
    }

    /// Width in bytes of one access of the port exit at hand. Never 0, so that it can be stepped by.
    fn io_size(&self) -> usize {
        // SAFETY: in the mapping; called between two KVM_RUN by the vCPU's thread (see `Sync`); any bytes are valid.
        let size = unsafe { (&raw const (*self.page.as_ptr()).__bindgen_anon_1.io.size).read_volatile() };
        usize::from(size).max(1)
    }

    /// What KVM says of its own failure (`kvm_run.internal.suberror`).
    fn internal_suberror(&self) -> u32 {
        // SAFETY: as in `io_size`.
        unsafe { (&raw const (*self.page.as_ptr()).__bindgen_anon_1.internal.suberror).read_volatile() }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made, with its length; no reference into it outlives a method.
        unsafe { libc::munmap(self.page.as_ptr().cast(), size_of::<kvm_run>()) };
    }
}
