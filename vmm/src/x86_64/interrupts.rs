//! Interrupt controllers and routes on KVM: local APICs, I/O APIC and message-signalled interrupts, each raised by
//! writing an eventfd (irqfd), without an exit to this process.
//!
//! There is no PIT: ACPI calls the machine hardware-reduced, the TSC's and the APIC timer's frequencies are told by
//! CPUID and kvmclock, so nothing is left for it to do but to cost a kernel thread. KVM's PICs come with its I/O APIC; no
//! route leads to them. The paravirtual end of interrupt and the timers are KVM's; nothing of them is seen here.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::host::Msi;
use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PMU_CAP_DISABLE, KvmIrqRouting, kvm_enable_cap,
    kvm_irq_routing_entry, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::layout;

/// The most message-signalled interrupts of one machine: a dozen devices with a vector for each of 32 queues, and room.
/// KVM's own limit is 4096 routes, and each change of one copies all.
pub const MAX_MSI: usize = 1024;

/// The interrupt side of a virtual machine. All methods may be called from any thread.
pub struct Interrupts {
    vm: Arc<VmFd>,
    messages: Mutex<Messages>,
    updates: AtomicU64,
}

/// What KVM's interrupt controllers hold. Routes are not in it: each device connects its own again.
#[derive(Clone, Serialize, Deserialize)]
pub struct State {
    chips: [kvm_irqchip; 3],
}

impl Interrupts {
    /// Makes the interrupt controllers of `vm`. Once, before it has a vCPU: KVM gives local APICs only to later ones.
    pub fn new(vm: Arc<VmFd>) -> io::Result<Arc<Interrupts>> {
        vm.set_tss_address(layout::KVM_TSS as usize)?;
        disable_pmu(&vm);
        vm.create_irq_chip()?;
        Ok(Arc::new(Interrupts { vm, messages: Mutex::default(), updates: AtomicU64::new(0) }))
    }

    /// A wired interrupt: each write raises an edge on pin `gsi` of the I/O APIC.
    pub fn line(&self, gsi: u32) -> io::Result<EventFd> {
        let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        self.vm.register_irqfd(&line, gsi)?;
        Ok(line)
    }

    /// Reserves a message-signalled interrupt, disconnected. Dropping it gives the vector back.
    pub fn msi(self: &Arc<Self>) -> io::Result<Box<dyn Msi>> {
        let trigger = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let vector = self.messages().reserve().ok_or_else(|| {
            io::Error::other(format!(
                "the machine has all of its {MAX_MSI} message-signalled interrupts in use"
            ))
        })?;
        Ok(Box::new(Vector { interrupts: self.clone(), vector, trigger, attached: false }))
    }

    /// How often a message-signalled interrupt was changed: routes that KVM was given anew.
    pub fn updates(&self) -> u64 {
        self.updates.load(Ordering::Relaxed)
    }

    /// The controllers' state. Only while no vCPU runs.
    pub fn save(&self) -> io::Result<State> {
        let mut chips = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
            .map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        for chip in &mut chips {
            self.vm.get_irqchip(chip)?;
        }
        Ok(State { chips })
    }

    /// Takes back what [`Interrupts::save`] gave. Before any vCPU runs; KVM refuses what is no state of its chips.
    pub fn restore(&self, state: &State) -> io::Result<()> {
        for chip in &state.chips {
            self.vm.set_irqchip(chip)?;
        }
        Ok(())
    }

    /// Makes `message` what `vector` delivers.
    fn route(&self, vector: usize, message: Message) -> io::Result<()> {
        let mut messages = self.messages();
        let Some(before) = messages.set(vector, Some(message)) else { return Ok(()) };
        self.updates.fetch_add(1, Ordering::Relaxed);
        // KVM takes the whole table or nothing, under the lock so that an older table never comes after a newer one.
        let table =
            KvmIrqRouting::from_entries(&messages.table()).map_err(|e| io::Error::other(format!("{e:?}")));
        let set = table.and_then(|table| Ok(self.vm.set_gsi_routing(&table)?));
        if set.is_err() {
            messages.set(vector, before);
        }
        set
    }

    fn messages(&self) -> MutexGuard<'_, Messages> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Without performance counters a guest cannot watch its neighbours, and CPUID tells of none. Kernels that cannot do
/// it (before 5.18) leave the registers there for who looks; that harms nobody else.
fn disable_pmu(vm: &VmFd) {
    let mut capability = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
    capability.args[0] = KVM_PMU_CAP_DISABLE.into();
    if let Err(error) = vm.enable_cap(&capability) {
        log::debug!("cannot disable the guest's PMU: {error}");
    }
}

/// A device's end of one message-signalled interrupt.
struct Vector {
    interrupts: Arc<Interrupts>,
    /// Index in [`Messages`]; its GSI is this after [`layout::MSI_GSI`].
    vector: usize,
    trigger: EventFd,
    /// KVM listens to the trigger.
    attached: bool,
}

impl Vector {
    fn gsi(&self) -> u32 {
        layout::MSI_GSI + self.vector as u32
    }
}

impl Msi for Vector {
    fn trigger(&self) -> &EventFd {
        &self.trigger
    }

    fn connect(&mut self, address: u64, data: u32) -> io::Result<()> {
        self.interrupts.route(self.vector, Message { address, data })?;
        if !self.attached {
            // KVM looks at the counter when it begins to listen, and delivers what was raised meanwhile.
            self.interrupts.vm.register_irqfd(&self.trigger, self.gsi())?;
            self.attached = true;
        }
        Ok(())
    }

    /// The route stays in KVM's table, where it does nothing without the eventfd and saves an update when the same
    /// message is connected again (unmasking).
    fn disconnect(&mut self) -> io::Result<()> {
        if self.attached {
            self.interrupts.vm.unregister_irqfd(&self.trigger, self.gsi())?;
            self.attached = false;
        }
        Ok(())
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        match self.disconnect() {
            Ok(()) => self.interrupts.messages().release(self.vector),
            // The vector is lost to others then: its eventfd may still be heard.
            Err(error) => log::error!("cannot disconnect interrupt {}: {error}", self.gsi()),
        }
    }
}

/// A write that is an interrupt (SDM, volume 3, 11.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Message {
    address: u64,
    data: u32,
}

/// Who has which vector, and what each delivers. Pure: KVM's table is made from it.
#[derive(Default)]
struct Messages {
    slots: Vec<Slot>,
}

#[derive(Default)]
struct Slot {
    reserved: bool,
    /// What KVM has been told; kept when the vector is released, as it is only replaced, never removed.
    message: Option<Message>,
}

impl Messages {
    fn reserve(&mut self) -> Option<usize> {
        let free = self.slots.iter().position(|slot| !slot.reserved);
        let vector = free.unwrap_or(self.slots.len());
        if vector == self.slots.len() {
            if vector == MAX_MSI {
                return None;
            }
            self.slots.push(Slot::default());
        }
        self.slots.get_mut(vector)?.reserved = true;
        Some(vector)
    }

    fn release(&mut self, vector: usize) {
        if let Some(slot) = self.slots.get_mut(vector) {
            slot.reserved = false;
        }
    }

    /// What was there before, or `None` when nothing changes.
    fn set(&mut self, vector: usize, message: Option<Message>) -> Option<Option<Message>> {
        let slot = self.slots.get_mut(vector)?;
        (slot.message != message).then(|| std::mem::replace(&mut slot.message, message))
    }

    /// The whole table: every pin of the I/O APIC, then every message.
    fn table(&self) -> Vec<kvm_irq_routing_entry> {
        let pins = (0..layout::IOAPIC_PINS).map(pin);
        let messages = (layout::MSI_GSI..).zip(&self.slots);
        pins.chain(messages.filter_map(|(gsi, slot)| Some(msi(gsi, slot.message?)))).collect()
    }
}

fn pin(gsi: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
    entry.u.irqchip.pin = gsi;
    entry
}

fn msi(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ioctls::{Kvm, VcpuFd};

    const MESSAGE: Message = Message { address: 0xfee0_0000, data: 0x41 };

    #[test]
    fn vectors_are_given_out_once_up_to_the_limit_and_used_again() {
        let mut messages = Messages::default();
        let all: Vec<_> = (0..MAX_MSI).map(|_| messages.reserve().unwrap()).collect();
        assert_eq!(all, (0..MAX_MSI).collect::<Vec<_>>());
        assert_eq!(messages.reserve(), None);
        messages.release(7);
        assert_eq!(messages.reserve(), Some(7));
    }

    #[test]
    fn the_table_is_all_pins_and_every_message_that_was_ever_set() {
        let mut messages = Messages::default();
        let (first, second) = (messages.reserve().unwrap(), messages.reserve().unwrap());
        assert_eq!(messages.table().len(), 24);
        assert_eq!(messages.set(second, Some(MESSAGE)), Some(None));
        assert_eq!(messages.set(second, Some(MESSAGE)), None, "no change, no ioctl");
        messages.release(first);
        let table = messages.table();
        assert_eq!(table.len(), 25);
        assert_eq!((table[24].gsi, table[24].type_), (25, KVM_IRQ_ROUTING_MSI));
        for (gsi, pin) in (0..24).zip(&table) {
            assert_eq!((pin.gsi, pin.type_), (gsi, KVM_IRQ_ROUTING_IRQCHIP));
        }
    }

    /// On a real KVM, when there is one: the message reaches the local APIC.
    #[test]
    fn what_is_raised_while_disconnected_is_delivered_when_connected() {
        let Some((interrupts, vcpu)) = machine() else { return };
        let mut msi = interrupts.msi().unwrap();
        msi.trigger().write(1).unwrap();
        assert!(!requested(&vcpu, 0x41));
        msi.connect(MESSAGE.address, MESSAGE.data).unwrap();
        wait_for(&vcpu, 0x41);
        msi.connect(MESSAGE.address, 0x42).unwrap();
        msi.trigger().write(1).unwrap();
        wait_for(&vcpu, 0x42);
        msi.disconnect().unwrap();
        msi.disconnect().unwrap();
        msi.trigger().write(1).unwrap();
        msi.connect(MESSAGE.address, 0x43).unwrap();
        wait_for(&vcpu, 0x43);
    }

    #[test]
    fn a_dropped_vector_is_free_for_the_next_and_its_eventfd_no_longer_heard() {
        let Some((interrupts, vcpu)) = machine() else { return };
        let mut first = interrupts.msi().unwrap();
        first.connect(MESSAGE.address, 0x50).unwrap();
        let trigger = first.trigger().try_clone().unwrap();
        drop(first);
        trigger.write(1).unwrap();
        let mut second = interrupts.msi().unwrap();
        assert_eq!(interrupts.messages().slots.len(), 1);
        second.connect(MESSAGE.address, 0x51).unwrap();
        second.trigger().write(1).unwrap();
        wait_for(&vcpu, 0x51);
        assert!(!requested(&vcpu, 0x50));
    }

    #[test]
    fn a_line_is_an_edge_on_its_pin_and_controllers_come_back_as_saved() {
        let Some((interrupts, _)) = machine() else { return };
        let line = interrupts.line(layout::SERIAL_GSI).unwrap();
        line.write(1).unwrap();
        let state = interrupts.save().unwrap();
        interrupts.restore(&state).unwrap();
        // SAFETY: KVM filled the third chip as an I/O APIC, which is what its chip_id asked for.
        let (before, after) =
            unsafe { (state.chips[2].chip.ioapic, interrupts.save().unwrap().chips[2].chip.ioapic) };
        assert_eq!((before.base_address, before.id, before.irr), (after.base_address, after.id, after.irr));
        assert_eq!(before.base_address, layout::IOAPIC.start);
    }

    fn machine() -> Option<(Arc<Interrupts>, VcpuFd)> {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("skipped: no /dev/kvm");
            return None;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let interrupts = Interrupts::new(vm.clone()).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut lapic = vcpu.get_lapic().unwrap();
        lapic.regs[0xf1] |= 1; // spurious vector register, bit 8: the APIC accepts interrupts
        vcpu.set_lapic(&lapic).unwrap();
        Some((interrupts, vcpu))
    }

    fn requested(vcpu: &VcpuFd, vector: usize) -> bool {
        let lapic = vcpu.get_lapic().unwrap();
        let register = 0x200 + vector / 32 * 0x10 + vector % 32 / 8;
        lapic.regs[register] as u8 >> (vector % 8) & 1 == 1
    }

    /// Delivery of what was pending is a work item of the host's kernel: soon, not at once.
    fn wait_for(vcpu: &VcpuFd, vector: usize) {
        for _ in 0..3000 {
            if requested(vcpu, vector) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("vector {vector:#x} never arrived");
    }
}
