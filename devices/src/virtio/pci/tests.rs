use std::sync::Mutex;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::*;
use crate::backend::rate_limiter::Limits;
use crate::bus::{Bus, Effect};
use crate::pci::root::{Root, Windows};
use crate::testing::FakeHost;
use crate::virtio::echo::{Echo, ODD_FEATURE};
use crate::virtio::rng::{self, Rng};
use crate::virtio::testing::{ABOVE_4G, Driver, EVENT_IDX, ram_above_4g};
use crate::virtio::transport::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET};

const ECAM: u64 = 0xe000_0000;
const LOW: u64 = 0xd000_0000;
const HIGH: u64 = 0x1_0000_0000;
const WINDOW: u64 = 0x10_0000;
const VERSION_1: u64 = 1 << 32;
/// Where LAPIC messages go.
const MESSAGES: u64 = 0xfee0_0000;
const RINGS: u64 = ABOVE_4G + 0x1_0000;
const FAR: u64 = 0x4000;

/// A machine with one echo device in slot 1.
struct Machine {
    host: FakeHost,
    memory: Memory,
    bus: Bus,
    root: Arc<Root>,
    echo: Arc<Mutex<Echo>>,
    pci: Arc<Mutex<Pci>>,
}

fn machine() -> Machine {
    build(ram_above_4g(0x10_0000), None).unwrap()
}

fn build(memory: Memory, state: Option<State>) -> Result<Machine, PciError> {
    let host = FakeHost::new();
    let echo = Arc::new(Mutex::new(Echo::default()));
    let pci = Pci::new(echo.clone(), Arc::new(host.clone()), memory.clone(), state)?;
    let pci = Arc::new(Mutex::new(pci));
    let windows = Windows { below_4g: LOW..LOW + WINDOW, above_4g: Some(HIGH..HIGH + WINDOW) };
    let root = Arc::new(Root::new(windows));
    let mut bus = Bus::default();
    root.connect(&mut bus, ECAM).unwrap();
    assert_eq!(root.add(None, pci.clone()), Ok(1));
    Ok(Machine { host, memory, bus, root, echo, pci })
}

impl Machine {
    fn read(&self, address: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        self.bus.read(address, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    /// As KVM does it: what a doorbell takes never leaves the kernel.
    fn write(&self, address: u64, width: usize, value: u64) {
        if !self.host.write(address, value as u32) {
            assert_eq!(self.bus.write(address, &value.to_le_bytes()[..width]), Effect::None);
        }
    }

    fn config(&self, register: usize) -> u64 {
        ECAM + (1 << 15) + register as u64
    }

    fn capabilities(&self) -> Vec<(u8, u64)> {
        assert_ne!(self.read(self.config(6), 2) & 0x10, 0, "there is a list");
        let mut found = Vec::new();
        let mut at = self.read(self.config(0x34), 1) as usize;
        while at != 0 {
            let entry = self.read(self.config(at), 2);
            found.push((entry as u8, self.config(at)));
            at = (entry >> 8) as usize;
        }
        found
    }

    /// The address of the structure with this `cfg_type`, and where its capability is.
    fn structure(&self, bar: u64, kind: u8) -> Option<(u64, u64)> {
        let vendor = |&&(id, at): &&(u8, u64)| id == 9 && self.read(at + 3, 1) == u64::from(kind);
        let &(_, at) = self.capabilities().iter().find(vendor)?;
        assert_eq!(self.read(at + 4, 1), 0, "in BAR 0");
        let (offset, len) = (self.read(at + 8, 4), self.read(at + 12, 4));
        assert!(offset + len <= 0x8000 && len > 0);
        Some((bar + offset, at))
    }
}

/// What a driver knows of the device after it probed it.
struct Probe {
    common: u64,
    isr: u64,
    notify: u64,
    multiplier: u64,
    device: u64,
    msix: u64,
    table: u64,
}

/// A driver that does what Linux does, in its order.
struct Guest<'a> {
    machine: &'a Machine,
    at: Probe,
    queues: Vec<Driver>,
}

impl<'a> Guest<'a> {
    fn probe(machine: &'a Machine) -> Self {
        let m = machine;
        assert_eq!(m.read(m.config(0), 4), 0x1042_1af4);
        assert_eq!(m.read(m.config(8), 4), 0x0180_0001, "mass storage; not transitional");
        let bar = m.read(m.config(0x10), 4) & !0xf | m.read(m.config(0x14), 4) << 32;
        m.write(m.config(0x10), 4, 0xffff_ffff);
        assert_eq!(m.read(m.config(0x10), 4), 0xffff_8004, "32 KiB, 64-bit, not prefetchable");
        m.write(m.config(0x10), 4, bar | 4);
        m.write(m.config(4), 2, 6);

        let (common, capability) = m.structure(bar, CFG_COMMON).unwrap();
        assert_eq!(m.read(capability + 2, 1), 16, "its own length");
        let (isr, _) = m.structure(bar, CFG_ISR).unwrap();
        let (notify, capability) = m.structure(bar, CFG_NOTIFY).unwrap();
        assert_eq!(m.read(capability + 2, 1), 20, "with the multiplier");
        let (device, _) = m.structure(bar, CFG_DEVICE).unwrap();
        let msix = m.capabilities().iter().find(|(id, _)| *id == 0x11).unwrap().1;
        let table = bar + m.read(msix + 4, 4);
        let multiplier = m.read(capability + 16, 4);
        let at = Probe { common, isr, notify, multiplier, device, msix, table };
        Self { machine, at, queues: Vec::new() }
    }

    fn get(&self, field: usize, width: usize) -> u64 {
        self.machine.read(self.at.common + field as u64, width)
    }

    fn set(&self, field: usize, width: usize, value: u64) {
        self.machine.write(self.at.common + field as u64, width, value);
    }

    fn status(&self) -> u8 {
        self.get(common::DEVICE_STATUS, 1) as u8
    }

    fn add_status(&self, bits: u8) -> u8 {
        self.set(common::DEVICE_STATUS, 1, u64::from(self.status() | bits));
        self.status()
    }

    fn reset(&self) {
        self.set(common::DEVICE_STATUS, 1, 0);
        assert_eq!(self.status(), 0);
    }

    /// From reset to FEATURES_OK; the status says whether the device took them.
    fn agree(&self, features: u64) -> u8 {
        self.reset();
        self.add_status(ACKNOWLEDGE);
        self.add_status(DRIVER);
        for half in [0, 1] {
            self.set(common::DRIVER_FEATURE_SELECT, 4, half);
            self.set(common::DRIVER_FEATURE, 4, features >> (32 * half) & 0xffff_ffff);
        }
        self.add_status(FEATURES_OK)
    }

    fn offered(&self) -> u64 {
        let half = |half| {
            self.set(common::DEVICE_FEATURE_SELECT, 4, half);
            self.get(common::DEVICE_FEATURE, 4)
        };
        half(0) | half(1) << 32
    }

    /// Vector 0 for changes of the configuration, then one for each queue; their data is 0x40 and up.
    fn set_up_interrupts(&self) {
        let m = self.machine;
        m.write(self.at.msix + 2, 2, 0xc000);
        let count = (m.read(self.at.msix + 2, 2) & 0x7ff) + 1;
        for vector in 0..count {
            let entry = self.at.table + 16 * vector;
            for (offset, value) in [(12, 1), (0, MESSAGES), (4, 0), (8, 0x40 + vector), (12, 0)] {
                m.write(entry + offset, 4, value);
            }
        }
        m.write(self.at.msix + 2, 2, 0x8000);
        self.set(common::CONFIG_MSIX_VECTOR, 2, 0);
        assert_eq!(self.get(common::CONFIG_MSIX_VECTOR, 2), 0);
    }

    fn set_up_queue(&mut self, index: u16) {
        self.set(common::QUEUE_SELECT, 2, index.into());
        let size = self.get(common::QUEUE_SIZE, 2) as u16;
        assert!(size > 0 && self.get(common::QUEUE_ENABLE, 2) == 0);
        let base = RINGS + FAR * u64::from(index);
        self.machine.memory.memory().write_slice(&[0; FAR as usize], GuestAddress(base)).unwrap();
        let driver = Driver::new(&self.machine.memory, base, size, EVENT_IDX);
        let ring = driver.queue(index).save();
        self.set(common::QUEUE_SIZE, 2, size.into());
        for (field, value) in [
            (common::QUEUE_DESC, ring.desc_table),
            (common::QUEUE_DRIVER, ring.avail_ring),
            (common::QUEUE_DEVICE, ring.used_ring),
        ] {
            // In halves, each of which replaces what was there, or as a whole.
            self.set(field, 8, u64::MAX);
            if index == 0 {
                self.set(field, 8, value);
            } else {
                self.set(field, 4, value & 0xffff_ffff);
                self.set(field + 4, 4, value >> 32);
            }
            assert_eq!(self.get(field, 8), value);
        }
        self.set(common::QUEUE_MSIX_VECTOR, 2, u64::from(index) + 1);
        assert_eq!(self.get(common::QUEUE_MSIX_VECTOR, 2), u64::from(index) + 1);
        driver.want_interrupts(true);
        self.queues.push(driver);
    }

    fn enable_queues(&self) {
        for index in 0..self.queues.len() {
            self.set(common::QUEUE_SELECT, 2, index as u64);
            self.set(common::QUEUE_ENABLE, 2, 1);
        }
    }

    /// Everything up to a running device.
    fn start(machine: &'a Machine) -> Self {
        let mut guest = Self::probe(machine);
        let all = VERSION_1 | EVENT_IDX;
        assert_eq!(guest.agree(all), ACKNOWLEDGE | DRIVER | FEATURES_OK);
        guest.set_up_interrupts();
        let queues = guest.get(common::NUM_QUEUES, 2) as u16;
        (0..queues).for_each(|index| guest.set_up_queue(index));
        guest.enable_queues();
        assert_eq!(guest.add_status(DRIVER_OK), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        machine.host.run(10);
        machine.host.take_messages();
        guest
    }

    fn doorbell(&self, index: u16) -> u64 {
        self.set(common::QUEUE_SELECT, 2, index.into());
        self.at.notify + self.get(common::QUEUE_NOTIFY_OFF, 2) * self.at.multiplier
    }

    /// Gives the device a buffer, without a kick.
    fn offer(&mut self, index: u16) -> u16 {
        let driver = &mut self.queues[usize::from(index)];
        let buffer = driver.room(16);
        driver.add(&[buffer])
    }

    /// The device gives a buffer back, after a kick, with an interrupt.
    fn assert_works(&mut self, index: u16) {
        let head = self.offer(index);
        self.machine.write(self.doorbell(index), 2, index.into());
        assert!(self.machine.host.run(10) < 10);
        let used: Vec<u16> =
            self.queues[usize::from(index)].reap_all().iter().map(|used| used.head).collect();
        assert_eq!(used, [head]);
        assert_eq!(self.machine.host.take_messages(), [(MESSAGES, 0x41 + u32::from(index))]);
    }
}

#[test]
fn linux_probes_sets_up_and_gets_its_buffers_back_with_an_interrupt() {
    let machine = machine();
    let mut guest = Guest::start(&machine);
    for _ in 0..20 {
        guest.assert_works(0);
        guest.assert_works(1);
    }
    assert_eq!(machine.host.connections(), 3, "one system call for each vector");
}

#[test]
fn there_are_no_more_capabilities_than_needed_and_those_in_use_come_first() {
    let machine = machine();
    let kinds = |m: &Machine| -> Vec<(u8, u8)> {
        m.capabilities().iter().map(|&(id, at)| (id, m.read(at + 3, 1) as u8)).collect()
    };
    assert_eq!(kinds(&machine), [(0x11, 0), (9, 1), (9, 3), (9, 2), (9, 4), (9, 5)]);
    let device = Rng::new(rng::Config { limits: Limits::default() }, None).unwrap();
    let device = Arc::new(Mutex::new(device));
    let rng = Pci::new(device, Arc::new(machine.host.clone()), machine.memory.clone(), None).unwrap();
    machine.root.remove(1);
    machine.root.add(None, Arc::new(Mutex::new(rng))).unwrap();
    assert_eq!(kinds(&machine), [(0x11, 0), (9, 1), (9, 3), (9, 2), (9, 5)], "it has no configuration");
}

#[test]
fn features_are_taken_only_if_offered_and_with_version_1() {
    let machine = machine();
    let guest = Guest::probe(&machine);
    assert_eq!(guest.offered(), VERSION_1 | EVENT_IDX | ODD_FEATURE);
    for refused in [0, EVENT_IDX, VERSION_1 | 1 << 40, VERSION_1 | 1 << 6] {
        assert_eq!(guest.agree(refused) & FEATURES_OK, 0, "{refused:#x}");
        assert_eq!(guest.add_status(DRIVER_OK) & DRIVER_OK, 0, "not without features");
    }
    assert_ne!(guest.agree(VERSION_1 | ODD_FEATURE) & FEATURES_OK, 0);
    guest.set(common::DRIVER_FEATURE_SELECT, 4, 0);
    guest.set(common::DRIVER_FEATURE, 4, 0);
    assert_eq!(guest.get(common::DRIVER_FEATURE, 4), ODD_FEATURE, "agreed is agreed");
    for beyond in [2, u64::from(u32::MAX)] {
        guest.set(common::DEVICE_FEATURE_SELECT, 4, beyond);
        assert_eq!(guest.get(common::DEVICE_FEATURE, 4), 0);
    }
}

/// What a driver can read of a queue.
fn queue_registers(guest: &Guest, index: u16) -> Vec<u64> {
    guest.set(common::QUEUE_SELECT, 2, index.into());
    let fields = [
        (common::QUEUE_SIZE, 2),
        (common::QUEUE_MSIX_VECTOR, 2),
        (common::QUEUE_ENABLE, 2),
        (common::QUEUE_DESC, 8),
        (common::QUEUE_DRIVER, 8),
        (common::QUEUE_DEVICE, 8),
    ];
    fields.map(|(field, width)| guest.get(field, width)).to_vec()
}

fn scribble(guest: &Guest, index: u16) {
    guest.set(common::QUEUE_SELECT, 2, index.into());
    for (field, width) in
        (common::QUEUE_SIZE..common::LEN).flat_map(|field| [(field, 2), (field, 4), (field, 8)])
    {
        guest.set(field, width, 2);
    }
}

#[test]
fn queues_are_frozen_before_features_are_agreed_once_enabled_and_while_the_device_runs() {
    let machine = machine();
    let mut guest = Guest::probe(&machine);
    let fresh = [8, 0xffff, 0, 0, 0, 0];
    scribble(&guest, 0);
    assert_eq!(queue_registers(&guest, 0), fresh, "before FEATURES_OK");
    guest.agree(VERSION_1 | EVENT_IDX);
    guest.set_up_queue(0);
    guest.enable_queues();
    let enabled = queue_registers(&guest, 0);
    scribble(&guest, 0);
    assert_eq!(queue_registers(&guest, 0), enabled, "once enabled");
    guest.add_status(DRIVER_OK);
    scribble(&guest, 1);
    assert_eq!(queue_registers(&guest, 1), [4, 0xffff, 0, 0, 0, 0], "not enabled, but the device runs");
}

#[test]
fn a_queue_size_that_is_none_is_ignored() {
    let machine = machine();
    let guest = Guest::probe(&machine);
    guest.agree(VERSION_1);
    for size in [0, 3, 16, 0xffff] {
        guest.set(common::QUEUE_SIZE, 2, size);
        assert_eq!(guest.get(common::QUEUE_SIZE, 2), 8);
    }
    guest.set(common::QUEUE_SIZE, 2, 4);
    assert_eq!(guest.get(common::QUEUE_SIZE, 2), 4);
}

#[test]
fn a_queue_that_does_not_exist_reads_as_size_zero_and_takes_nothing() {
    let machine = machine();
    let guest = Guest::probe(&machine);
    guest.agree(VERSION_1);
    for index in [2, 3, 0x7fff, 0xffff] {
        scribble(&guest, index);
        assert_eq!(queue_registers(&guest, index), [0, 0xffff, 0, 0, 0, 0]);
    }
    assert_eq!(guest.add_status(DRIVER_OK) & (DRIVER_OK | NEEDS_RESET), DRIVER_OK);
}

#[test]
fn a_vector_that_does_not_exist_reads_back_as_none() {
    let machine = machine();
    let guest = Guest::probe(&machine);
    guest.agree(VERSION_1);
    for (field, vector) in [(common::CONFIG_MSIX_VECTOR, 3), (common::QUEUE_MSIX_VECTOR, 0xfffe)] {
        guest.set(field, 2, 2);
        assert_eq!(guest.get(field, 2), 2);
        guest.set(field, 2, vector);
        assert_eq!(guest.get(field, 2), 0xffff);
    }
}

#[test]
fn vectors_are_set_up_in_the_table_and_pending_ones_seen() {
    let machine = machine();
    let mut guest = Guest::start(&machine);
    let entry = guest.at.table + 16;
    assert_eq!(machine.read(entry, 8), MESSAGES);
    assert_eq!(machine.read(entry + 8, 8), 0x41);
    machine.write(entry + 12, 4, 1);
    guest.offer(0);
    machine.write(guest.doorbell(0), 2, 0);
    machine.host.run(10);
    assert_eq!(machine.host.take_messages(), []);
    let bar = guest.at.common;
    let pending = bar + machine.read(guest.at.msix + 8, 4);
    assert_eq!(machine.read(pending, 8), 1 << 1);
    machine.write(entry + 12, 4, 0);
    assert_eq!(machine.host.take_messages(), [(MESSAGES, 0x41)]);
    assert_eq!(machine.read(pending, 8), 0);
}

#[test]
fn what_somebody_else_raises_is_the_vector_of_the_queue_and_waits_while_that_is_masked() {
    let machine = machine();
    let guest = Guest::start(&machine);
    let interrupt = machine.echo.lock().unwrap().interrupt.clone().unwrap();
    let raised = interrupt_count(&machine);
    let trigger = interrupt.trigger(1).unwrap();
    assert!(interrupt.trigger(2).is_none(), "there is no such queue");
    trigger.write(1).unwrap();
    assert_eq!(machine.host.take_messages(), [(MESSAGES, 0x42)]);

    let entry = guest.at.table + 2 * 16;
    machine.write(entry + 12, 4, 1);
    trigger.write(1).unwrap();
    assert_eq!(machine.host.take_messages(), []);
    // The driver sends the vector to another CPU meanwhile.
    machine.write(entry + 8, 4, 0x77);
    machine.write(entry + 12, 4, 0);
    assert_eq!(machine.host.take_messages(), [(MESSAGES, 0x77)]);
    assert_eq!(interrupt_count(&machine), raised, "these are not counted");

    guest.reset();
    assert!(interrupt.trigger(1).is_none(), "the driver has no vector any more");
}

fn interrupt_count(machine: &Machine) -> u64 {
    machine.pci.lock().unwrap().shared().interrupts()
}

#[test]
fn a_device_hears_of_guest_memory_that_has_come() {
    let machine = machine();
    machine.pci.lock().unwrap().memory_changed();
    assert_eq!(machine.echo.lock().unwrap().memory_changes, 1);
}

#[test]
fn registers_take_no_byte_but_the_status() {
    let machine = machine();
    let guest = Guest::start(&machine);
    let registers = || (0..common::LEN).map(|at| guest.get(at, 1)).collect::<Vec<_>>();
    let before = registers();
    for offset in (0..common::LEN).filter(|&at| at != common::DEVICE_STATUS) {
        guest.set(offset, 1, 0x5a);
        guest.set(offset, 1, 0);
    }
    assert_eq!(registers(), before);
}

#[test]
fn doorbells_follow_the_bar() {
    let machine = machine();
    let bound = || machine.host.doorbells().iter().map(|doorbell| doorbell.address).collect::<Vec<_>>();
    assert!(bound().is_empty(), "the guest has decoding off");
    let mut guest = Guest::start(&machine);
    assert_eq!(bound(), [HIGH + 0x3000, HIGH + 0x3004]);
    guest.assert_works(1);
    machine.write(machine.config(0x10), 4, 0x8_8000);
    assert_eq!(bound(), [HIGH + 0x8_b000, HIGH + 0x8_b004]);
    guest.at.common += 0x8_8000;
    guest.at.notify += 0x8_8000;
    guest.assert_works(1);
    machine.write(machine.config(4), 2, 4);
    assert!(bound().is_empty());
}

#[test]
fn a_bar_at_a_wild_address_harms_nobody() {
    let machine = machine();
    let _guest = Guest::start(&machine);
    for (low, high) in
        [(0xffff_ffff, 0xffff_ffff), (0, 0), (0xfee0_0000, 0), (ECAM, 0), (0x8000, 0x8000_0000)]
    {
        machine.write(machine.config(0x14), 4, high);
        machine.write(machine.config(0x10), 4, low);
        assert_eq!(machine.read(machine.config(0), 4), 0x1042_1af4);
        assert_eq!(machine.read(HIGH + 0x14, 1), 0xff, "no longer there");
    }
    machine.write(machine.config(0x10), 4, 0);
    machine.write(machine.config(0x14), 4, 1);
    assert_ne!(machine.read(HIGH + 0x14, 1) as u8 & DRIVER_OK, 0, "back again, and still running");
}

#[test]
fn a_kick_that_no_doorbell_took_reaches_the_queue_too() {
    let machine = machine();
    let mut guest = Guest::start(&machine);
    for (width, at) in [(1, 0), (2, 0), (4, 0), (1, 3)] {
        guest.offer(1);
        assert_eq!(machine.host.run(10), 0);
        machine.root.write(guest.doorbell(1) + at, &[1; 4][..width]);
        assert!(machine.host.run(10) > 0);
        assert_eq!(guest.queues[1].reap_all().len(), 1);
    }
    machine.root.write(guest.at.notify + 8, &[0; 4]);
    machine.root.write(guest.at.notify + 0xffc, &[0; 4]);
    assert_eq!(machine.host.run(10), 0, "queues that do not exist cannot be kicked");
}

#[test]
fn reset_stops_the_device_before_the_status_reads_zero() {
    let machine = machine();
    let mut guest = Guest::start(&machine);
    guest.assert_works(0);
    guest.offer(0);
    machine.write(guest.doorbell(0), 2, 0);
    guest.reset();
    assert_eq!(machine.host.watches(), 0);
    assert!(!machine.echo.lock().unwrap().runs());
    assert_eq!(machine.host.run(10), 0);
    assert_eq!(guest.queues[0].reap_all().len(), 0, "nothing is written to a reset driver's memory");
    assert_eq!(queue_registers(&guest, 0), [8, 0xffff, 0, 0, 0, 0]);
    assert_eq!(guest.get(common::CONFIG_MSIX_VECTOR, 2), 0xffff);
    assert!(machine.echo.lock().unwrap().resets > 0);
    Guest::start(&machine).assert_works(0);
}

#[test]
fn a_driver_that_breaks_its_ring_is_told_to_reset_and_nobody_else_suffers() {
    let machine = machine();
    let guest = Guest::start(&machine);
    guest.queues[0].set_avail_index(100);
    machine.write(guest.doorbell(0), 2, 0);
    machine.host.run(10);
    assert_ne!(guest.status() & NEEDS_RESET, 0);
    assert_eq!(machine.host.take_messages(), [(MESSAGES, 0x40)], "a change of the configuration");
    Guest::start(&machine).assert_works(0);
}

#[test]
fn a_device_that_cannot_start_needs_a_reset() {
    for fail in [0, 1, 2] {
        let machine = machine();
        let mut guest = Guest::probe(&machine);
        guest.agree(VERSION_1 | EVENT_IDX);
        guest.set_up_interrupts();
        guest.set_up_queue(0);
        match fail {
            0 => guest.set(common::QUEUE_DESC, 4, 8), // not aligned
            1 => machine.echo.lock().unwrap().refuse = true,
            _ => machine.host.fail_watches(true),
        }
        guest.enable_queues();
        assert_ne!(guest.add_status(DRIVER_OK) & NEEDS_RESET, 0, "{fail}");
        assert_eq!(machine.host.take_messages(), [(MESSAGES, 0x40)]);
        assert!(!machine.echo.lock().unwrap().runs());
        machine.echo.lock().unwrap().refuse = false;
        machine.host.fail_watches(false);
        Guest::start(&machine).assert_works(0);
    }
}

#[test]
fn a_change_of_the_configuration_is_seen_and_told() {
    let machine = machine();
    let guest = Guest::start(&machine);
    let before = guest.get(common::CONFIG_GENERATION, 1);
    let interrupt = machine.echo.lock().unwrap().interrupt.clone().unwrap();
    machine.echo.lock().unwrap().config[3] = 7;
    interrupt.config();
    assert_ne!(guest.get(common::CONFIG_GENERATION, 1), before);
    assert_eq!(machine.host.take_messages(), [(MESSAGES, 0x40)]);
    assert_eq!(machine.read(guest.at.device + 3, 1), 7);
    machine.write(guest.at.device + 4, 4, 0x0403_0201);
    assert_eq!(machine.read(guest.at.device, 8), 0x0403_0201_0700_0000);
    assert_eq!(machine.read(guest.at.isr + 1, 1), 0, "which is not the register");
    assert_eq!(machine.read(guest.at.isr, 1), 2);
    assert_eq!(machine.read(guest.at.isr, 1), 0, "reading clears it");
}

#[test]
fn without_a_vector_the_isr_says_that_buffers_were_used() {
    let machine = machine();
    let mut guest = Guest::probe(&machine);
    guest.agree(VERSION_1 | EVENT_IDX);
    guest.set_up_queue(0);
    guest.set(common::QUEUE_MSIX_VECTOR, 2, NO_VECTOR.into());
    guest.enable_queues();
    guest.add_status(DRIVER_OK);
    assert!(machine.echo.lock().unwrap().interrupt.as_ref().unwrap().trigger(0).is_none());
    guest.offer(0);
    machine.write(guest.doorbell(0), 2, 0);
    machine.host.run(10);
    assert_eq!(machine.read(guest.at.isr, 1), 1);
}

#[test]
fn a_function_that_may_not_master_the_bus_does_not_run() {
    let machine = machine();
    let mut guest = Guest::start(&machine);
    machine.write(machine.config(4), 2, 2);
    assert_eq!(machine.host.watches(), 0);
    guest.offer(0);
    machine.write(guest.at.notify, 2, 0);
    assert_eq!(machine.host.run(10), 0);
    machine.write(machine.config(4), 2, 6);
    assert!(machine.host.run(10) < 10);
    assert_eq!(guest.queues[0].reap_all().len(), 1, "it goes on where it was");
    machine.host.take_messages();
    guest.assert_works(0);

    machine.write(machine.config(4), 2, 2);
    machine.pci.lock().unwrap().resume();
    assert_eq!(machine.host.watches(), 0, "not even when the machine goes on");
    guest.agree(VERSION_1 | EVENT_IDX);
    machine.echo.lock().unwrap().interrupt = None;
    guest.add_status(DRIVER_OK);
    assert!(machine.echo.lock().unwrap().interrupt.is_none(), "not for a moment when its driver starts it");
    machine.write(machine.config(4), 2, 6);
    assert_eq!(machine.host.watches(), 1);
}

#[test]
fn a_paused_device_loses_no_kick() {
    let machine = machine();
    let mut guest = Guest::start(&machine);
    for _ in 0..100 {
        machine.pci.lock().unwrap().pause();
        machine.pci.lock().unwrap().pause();
        assert_eq!(machine.host.watches(), 0);
        guest.offer(0);
        machine.write(guest.doorbell(0), 2, 0);
        assert_eq!(machine.host.run(10), 0);
        machine.pci.lock().unwrap().resume();
        machine.pci.lock().unwrap().resume();
        assert!(machine.host.run(10) < 10);
        assert_eq!(guest.queues[0].reap_all().len(), 1);
        machine.host.take_messages();
        guest.assert_works(1);
    }
}

fn saved(machine: &Machine) -> Vec<u8> {
    let mut pci = machine.pci.lock().unwrap();
    pci.pause();
    postcard::to_allocvec(&pci.save()).unwrap()
}

#[test]
fn a_restored_function_goes_on_where_it_was() {
    let first = machine();
    let mut guest = Guest::start(&first);
    guest.assert_works(0);
    let head = guest.offer(0);
    let (at, queues) = (guest.at, guest.queues);
    let bytes = saved(&first);

    let state: State = postcard::from_bytes(&bytes).unwrap();
    let second = build(first.memory.clone(), Some(state)).unwrap();
    assert_eq!(saved(&second), bytes, "and can be saved again");
    assert_eq!(second.host.doorbells(), first.host.doorbells());
    assert_eq!(second.host.watches(), 0, "paused");
    second.pci.lock().unwrap().resume();
    assert!(second.host.run(10) < 10);
    let mut guest = Guest { machine: &second, at, queues };
    assert_eq!(guest.queues[0].reap_all().iter().map(|used| used.head).collect::<Vec<_>>(), [head]);
    assert_eq!(second.host.take_messages().len(), 2, "each queue may have lost an interrupt");
    guest.assert_works(0);
    guest.assert_works(1);
}

#[test]
fn a_change_of_the_configuration_is_not_lost_in_a_save_and_told_once() {
    let first = machine();
    let _guest = Guest::start(&first);
    first.echo.lock().unwrap().interrupt.clone().unwrap().config();
    let state: State = postcard::from_bytes(&saved(&first)).unwrap();
    let second = build(first.memory.clone(), Some(state)).unwrap();
    second.pci.lock().unwrap().resume();
    assert_eq!(second.host.take_messages(), [(MESSAGES, 0x40), (MESSAGES, 0x41), (MESSAGES, 0x42)]);
    second.pci.lock().unwrap().pause();
    second.pci.lock().unwrap().resume();
    assert_eq!(second.host.take_messages(), [], "nothing gets lost in a pause");
}

#[test]
fn a_function_saved_before_its_driver_came_starts_from_there() {
    let first = machine();
    let bytes = saved(&first);
    let second = build(first.memory.clone(), Some(postcard::from_bytes(&bytes).unwrap())).unwrap();
    second.pci.lock().unwrap().resume();
    assert_eq!(second.host.take_messages(), []);
    Guest::start(&second).assert_works(0);
}

#[test]
fn a_state_of_another_device_is_refused() {
    let first = machine();
    let _guest = Guest::start(&first);
    let state = || postcard::from_bytes::<State>(&saved(&first)).unwrap();
    let refused = |state| build(first.memory.clone(), Some(state)).err().unwrap().to_string();
    let vectors = State { queue_vectors: vec![1], ..state() };
    assert_eq!(refused(vectors), "saved state of virtio-pci: queue vectors is 1, must be 2");
    let rng = Rng::new(rng::Config { limits: Limits::default() }, None).unwrap();
    let rng = Arc::new(Mutex::new(rng));
    let other = Pci::new(rng, Arc::new(first.host.clone()), first.memory.clone(), Some(state()));
    assert!(other.is_err());
}

#[test]
fn registers_can_be_reached_through_the_configuration_space() {
    let machine = machine();
    let guest = Guest::start(&machine);
    let &(_, access) = machine.capabilities().last().unwrap();
    let select = |offset: u64, len: u64| {
        machine.write(access + 8, 4, offset);
        machine.write(access + 12, 4, len);
    };
    select(common::DEVICE_STATUS as u64, 1);
    assert_eq!(machine.read(access + 16, 4) as u8, guest.status());
    select(common::QUEUE_SELECT as u64, 2);
    for queue in [1, 0] {
        machine.write(access + 16, 4, queue);
        assert_eq!(guest.get(common::QUEUE_SELECT, 2), queue);
    }
    for (offset, len) in [(0x7fff, 2), (0xffff_ffff, 4), (0, 3), (0, 0), (0x8000, 1)] {
        select(offset, len);
        machine.write(access + 16, 4, 0x5555_5555);
        assert_eq!(machine.read(access + 16, 4), 0x5555_5555, "{offset:#x}+{len} is no register");
    }
    select(common::DEVICE_STATUS as u64, 1);
    machine.write(access + 4, 1, 3);
    machine.write(access + 16, 1, 0);
    assert_ne!(guest.status(), 0, "another BAR is not this one");
}

#[test]
fn an_unplugged_function_leaves_nothing_behind() {
    let Machine { host, root, pci, bus, .. } = {
        let machine = machine();
        Guest::start(&machine);
        machine
    };
    drop(pci);
    assert_eq!((host.msis(), host.doorbells().len(), host.watches()), (3, 2, 1));
    drop(root.remove(1));
    assert_eq!((host.msis(), host.doorbells().len(), host.watches()), (0, 0, 0));
    let mut data = [0; 4];
    bus.read(HIGH, &mut data);
    assert_eq!(data, [0xff; 4]);
}

#[test]
fn a_host_without_interrupts_left_is_an_error() {
    let host = FakeHost::new();
    host.fail_msis(true);
    let echo = Arc::new(Mutex::new(Echo::default()));
    assert!(Pci::new(echo, Arc::new(host), ram_above_4g(0x1000), None).is_err());
}

#[test]
fn every_register_survives_every_width_at_every_offset() {
    let machine = machine();
    let guest = Guest::start(&machine);
    let edges = (0..8u64).flat_map(|page| (0..0x140).chain(0xff0..0x1000).map(move |at| page * 0x1000 + at));
    for offset in edges {
        for width in [1, 2, 4, 8] {
            for value in [0, 1, u64::MAX] {
                machine.root.write(HIGH + offset, &u64::to_le_bytes(value)[..width]);
                machine.read(HIGH + offset, width);
            }
        }
        machine.host.run(4);
    }
    for register in 0..0x120 {
        for width in [1, 2, 4, 8] {
            let before = machine.read(machine.config(register), width);
            for value in [0, u64::MAX, before] {
                machine.write(machine.config(register), width, value);
                machine.read(machine.config(register), width);
            }
        }
    }
    let at = guest.at;
    drop(guest.queues);
    machine.write(machine.config(0x10), 4, 4);
    machine.write(machine.config(0x14), 4, 1);
    Guest { machine: &machine, at, queues: Vec::new() }.reset();
    Guest::start(&machine).assert_works(0);
}

/// Most of what a guest writes at random hits nothing, so offsets are drawn from where registers are.
fn bar_offset() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0u64..0x40, 1 => 0x1000u64..0x1004, 1 => 0x2000u64..0x200a, 1 => 0x3000u64..0x300a,
        2 => 0x4000u64..0x4034, 1 => 0x5000u64..0x5009, 1 => 0u64..0x8000]
}

#[derive(Clone, Debug)]
enum Act {
    Bar(u64, usize, u64),
    Config(usize, usize, u64),
    Memory(u64, u16),
    Run,
    Pause,
    SaveAndRestore,
    Driver,
}

fn act() -> impl Strategy<Value = Act> {
    let width = || prop::sample::select(&[1usize, 2, 4, 8][..]);
    let value = || {
        prop_oneof![
            any::<u64>(),
            0u64..16,
            Just(0xffu64),
            Just(u64::MAX),
            (0u64..0x40).prop_map(|page| page << 12)
        ]
    };
    prop_oneof![
        12 => (bar_offset(), width(), value()).prop_map(|(o, w, v)| Act::Bar(o, w, v)),
        4 => (0usize..0x110, width(), value()).prop_map(|(o, w, v)| Act::Config(o, w, v)),
        4 => (0u64..0x400, any::<u16>()).prop_map(|(o, v)| Act::Memory(o, v)),
        2 => Just(Act::Run),
        1 => Just(Act::Pause),
        1 => Just(Act::SaveAndRestore),
        1 => Just(Act::Driver),
    ]
}

proptest! {
    #[test]
    fn whatever_a_guest_does_the_machine_survives(acts in prop::collection::vec(act(), 0..120), started: bool) {
        let mut machine = machine();
        if started {
            Guest::start(&machine);
        }
        for act in acts {
            match act {
                Act::Bar(offset, width, value) => {
                    let mut data = value.to_le_bytes();
                    machine.pci.lock().unwrap().write_bar(BAR, offset, &data[..width]);
                    machine.pci.lock().unwrap().read_bar(BAR, offset, &mut data[..width]);
                }
                Act::Config(register, width, value) => {
                    machine.write(machine.config(register), width, value);
                    machine.read(machine.config(register), width);
                }
                Act::Memory(offset, value) => {
                    machine.memory.memory().write_obj(value, GuestAddress(RINGS + offset * 2)).unwrap();
                }
                Act::Run => drop(machine.host.run(8)),
                Act::Pause => {
                    machine.pci.lock().unwrap().pause();
                    machine.pci.lock().unwrap().resume();
                }
                Act::SaveAndRestore => {
                    let state = postcard::from_bytes(&saved(&machine)).unwrap();
                    machine = build(machine.memory.clone(), Some(state)).unwrap();
                    machine.pci.lock().unwrap().resume();
                }
                Act::Driver => {
                    machine.write(machine.config(0x10), 4, 4);
                    machine.write(machine.config(0x14), 4, 1);
                    Guest::start(&machine).assert_works(0);
                }
            }
        }
    }

    #[test]
    fn a_damaged_state_is_refused_or_survived(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let first = machine();
        Guest::start(&first);
        let mut bytes = saved(&first);
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(state) = postcard::from_bytes(&bytes)
            && let Ok(second) = build(first.memory.clone(), Some(state))
        {
            second.pci.lock().unwrap().resume();
            second.host.run(8);
            second.write(second.config(0x10), 4, 4);
            second.write(second.config(0x14), 4, 1);
            Guest::start(&second).assert_works(0);
        }
    }
}
