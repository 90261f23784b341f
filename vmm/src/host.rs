//! The seam of the device crate ([`devices::host::Host`]) on KVM: interrupts by irqfd, doorbells by ioeventfd, readiness by
//! the io thread.

use std::io;
use std::sync::{Arc, Mutex};

use devices::host::{Doorbell, Handler, Host, Msi, Source, WatchId};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::io_thread::IoThread;
use crate::x86_64::interrupts::Interrupts;

/// What the devices of one guest may ask for.
pub struct KvmHost {
    pub vm: Arc<VmFd>,
    pub interrupts: Arc<Interrupts>,
    pub io: IoThread,
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
