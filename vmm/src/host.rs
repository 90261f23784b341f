//! The seam of the device crate ([`devices::host::Host`]) on KVM: interrupts by irqfd, doorbells by ioeventfd, readiness by
//! an io thread. A device does not know that there are several: it gets the machine as seen from its own.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};

use devices::host::{Doorbell, Handler, Host, Msi, Source, WatchId};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::io_thread::{Idle, IoThread};
use crate::x86_64::interrupts::Interrupts;

/// What the devices of one guest that share an io thread may ask for.
pub struct KvmHost {
    vm: Arc<VmFd>,
    interrupts: Arc<Interrupts>,
    io: IoThread,
}

/// One for each io thread of a guest, by its number.
pub struct Hosts(BTreeMap<u8, Arc<KvmHost>>);

impl Hosts {
    /// Makes the loops of these threads, which nobody runs yet.
    pub fn new(
        vm: &Arc<VmFd>,
        interrupts: &Arc<Interrupts>,
        threads: &BTreeSet<u8>,
    ) -> io::Result<(Hosts, Vec<(u8, Idle)>)> {
        let (mut hosts, mut loops) = (BTreeMap::new(), Vec::with_capacity(threads.len()));
        for &number in threads {
            let (io, idle) = IoThread::new()?;
            hosts.insert(number, Arc::new(KvmHost { vm: vm.clone(), interrupts: interrupts.clone(), io }));
            loops.push((number, idle));
        }
        Ok((Hosts(hosts), loops))
    }

    /// That of the thread with this number, which is 0 where nothing is said.
    ///
    /// # Errors
    /// There is none: a guest that runs gets no further ones.
    pub fn of(&self, number: Option<u8>) -> Result<Arc<KvmHost>, NoSuchThread> {
        let number = number.unwrap_or_default();
        self.0.get(&number).cloned().ok_or_else(|| NoSuchThread {
            number,
            there: self.0.keys().map(u8::to_string).collect::<Vec<_>>().join(", "),
        })
    }
}

/// A device that comes later wants a thread of its own.
#[derive(Debug, thiserror::Error)]
#[error(
    "`io_thread` is {number}, and this guest has the io threads {there}: they are made when it starts, for the devices that \
     it has then. Give one of these"
)]
pub struct NoSuchThread {
    number: u8,
    there: String,
}

impl Host for KvmHost {
    fn msi(&self) -> io::Result<Box<dyn Msi>> {
        self.interrupts.msi()
    }

    fn ring(&self, doorbell: Doorbell, fd: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(doorbell.address);
        match doorbell.value {
            // Without a length and a value to match, KVM answers the write before it decodes the instruction.
            None => self.vm.register_ioevent(fd, &address, NoDatamatch)?,
            Some(value) => self.vm.register_ioevent(fd, &address, value)?,
        }
        Ok(())
    }

    fn unring(&self, doorbell: Doorbell, fd: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(doorbell.address);
        match doorbell.value {
            None => self.vm.unregister_ioevent(fd, &address, NoDatamatch)?,
            Some(value) => self.vm.unregister_ioevent(fd, &address, value)?,
        }
        Ok(())
    }

    fn watch(&self, handler: Arc<Mutex<dyn Handler>>, sources: &[Source]) -> io::Result<WatchId> {
        self.io.watch(handler, sources)
    }

    fn unwatch(&self, id: WatchId) {
        self.io.unwatch(id);
    }
}
