use std::sync::Mutex;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::*;
use crate::testing::FakeHost;
use crate::virtio::echo::{Echo, ODD_FEATURE};
use crate::virtio::testing::{ABOVE_4G, Driver, EVENT_IDX, ram_above_4g};
use crate::virtio::transport::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET};

const BASE: u64 = 0xd000_0000;
const VERSION_1: u64 = 1 << 32;
const RINGS: u64 = ABOVE_4G + 0x1_0000;
const FAR: u64 = 0x4000;

struct Machine {
    host: FakeHost,
    memory: Memory,
    echo: Arc<Mutex<Echo>>,
    line: EventFd,
    mmio: Mutex<Mmio>,
}

fn machine() -> Machine {
    build(ram_above_4g(0x10_0000), None).unwrap()
}

fn build(memory: Memory, state: Option<State>) -> Result<Machine, NewError> {
    let host = FakeHost::new();
    let echo = Arc::new(Mutex::new(Echo::default()));
    let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let end = line.try_clone().unwrap();
    let mmio = Mmio::new(BASE, echo.clone(), Arc::new(host.clone()), memory.clone(), end, state)?;
    Ok(Machine { host, memory, echo, line, mmio: Mutex::new(mmio) })
}

impl Machine {
    fn read(&self, register: u64) -> u32 {
        let mut word = [0xee; 4];
        self.mmio.lock().unwrap().read(register, &mut word);
        u32::from_le_bytes(word)
    }

    /// As KVM does it: what a doorbell takes never leaves the kernel.
    fn write(&self, register: u64, value: u32) {
        if !self.host.write(BASE + register, value) {
            assert_eq!(self.mmio.lock().unwrap().write(register, &value.to_le_bytes()), Effect::None);
        }
    }

    fn status(&self) -> u8 {
        self.read(register::STATUS) as u8
    }

    fn add_status(&self, bits: u8) -> u8 {
        self.write(register::STATUS, u32::from(self.status() | bits));
        self.status()
    }

    fn interrupted(&self) -> bool {
        self.line.read().is_ok()
    }
}

/// A driver that does what Linux does, in its order.
struct Guest<'a> {
    machine: &'a Machine,
    queues: Vec<Driver>,
}

impl<'a> Guest<'a> {
    fn agree(machine: &'a Machine, features: u64) -> Self {
        machine.write(register::STATUS, 0);
        assert_eq!(machine.status(), 0);
        machine.add_status(ACKNOWLEDGE);
        machine.add_status(DRIVER);
        for half in [1, 0] {
            machine.write(register::DRIVER_FEATURES_SEL, half);
            machine.write(register::DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        machine.add_status(FEATURES_OK);
        Self { machine, queues: Vec::new() }
    }

    fn set_up_queue(&mut self, index: u16) {
        let m = self.machine;
        m.write(register::QUEUE_SEL, index.into());
        assert_eq!(m.read(register::QUEUE_READY), 0);
        let size = m.read(register::QUEUE_SIZE_MAX);
        m.write(register::QUEUE_SIZE, size);
        let base = RINGS + FAR * u64::from(index);
        m.memory.memory().write_slice(&[0; FAR as usize], GuestAddress(base)).unwrap();
        let driver = Driver::new(&m.memory, base, size as u16, EVENT_IDX);
        let ring = driver.queue(index).save();
        for (low, address) in [
            (register::QUEUE_DESC_LOW, ring.desc_table),
            (register::QUEUE_DRIVER_LOW, ring.avail_ring),
            (register::QUEUE_DEVICE_LOW, ring.used_ring),
        ] {
            // Each half replaces what was there.
            for address in [u64::MAX, address] {
                m.write(low, address as u32);
                m.write(low + 4, (address >> 32) as u32);
            }
        }
        m.write(register::QUEUE_READY, 1);
        assert_eq!(m.read(register::QUEUE_READY), 1);
        driver.want_interrupts(true);
        self.queues.push(driver);
    }

    fn start(machine: &'a Machine) -> Self {
        let mut guest = Self::agree(machine, VERSION_1 | EVENT_IDX);
        guest.set_up_queue(0);
        guest.set_up_queue(1);
        assert_eq!(machine.add_status(DRIVER_OK), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        machine.host.run(10);
        machine.interrupted();
        guest
    }

    fn offer(&mut self, index: u16) -> u16 {
        let driver = &mut self.queues[usize::from(index)];
        let buffer = driver.room(16);
        driver.add(&[buffer])
    }

    fn reap(&mut self, index: u16) -> Vec<u16> {
        self.queues[usize::from(index)].reap_all().iter().map(|used| used.head).collect()
    }

    /// The device gives a buffer back, after a kick, with an interrupt that the driver acknowledges.
    fn assert_works(&mut self, index: u16) {
        let head = self.offer(index);
        self.machine.write(register::QUEUE_NOTIFY, index.into());
        assert!(self.machine.host.run(10) < 10);
        assert_eq!(self.reap(index), [head]);
        assert!(self.machine.interrupted());
        let reason = self.machine.read(register::INTERRUPT_STATUS);
        assert_eq!(reason & USED_BUFFER, USED_BUFFER);
        self.machine.write(register::INTERRUPT_ACK, reason);
        assert_eq!(self.machine.read(register::INTERRUPT_STATUS), 0);
    }
}

#[test]
fn linux_probes_sets_up_and_gets_its_buffers_back_with_an_interrupt() {
    let machine = machine();
    assert_eq!(machine.read(register::MAGIC).to_le_bytes(), *b"virt");
    assert_eq!(machine.read(register::VERSION), 2);
    assert_eq!(machine.read(register::DEVICE_ID), 2);
    assert_eq!(machine.read(register::VENDOR_ID).to_le_bytes(), *b"BRTH");
    for shared_memory in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(machine.read(shared_memory), u32::MAX, "there is none");
    }
    let notify = |value| Doorbell { address: BASE + 0x50, value: Some(value) };
    assert_eq!(machine.host.doorbells(), [notify(0), notify(1)]);
    machine.write(register::DEVICE_FEATURES_SEL, 0);
    assert_eq!(u64::from(machine.read(register::DEVICE_FEATURES)), EVENT_IDX | ODD_FEATURE);
    machine.write(register::DEVICE_FEATURES_SEL, 1);
    assert_eq!(machine.read(register::DEVICE_FEATURES), 1);
    let mut guest = Guest::start(&machine);
    for _ in 0..20 {
        guest.assert_works(0);
        guest.assert_works(1);
    }
}

#[test]
fn without_version_1_there_are_no_features() {
    let machine = machine();
    let _guest = Guest::agree(&machine, EVENT_IDX);
    assert_eq!(machine.status() & FEATURES_OK, 0);
}

#[test]
fn queues_are_frozen_while_the_device_runs() {
    let machine = machine();
    let mut guest = Guest::start(&machine);
    for index in [0, 1] {
        machine.write(register::QUEUE_SEL, index);
        for register in (register::QUEUE_SIZE..=register::QUEUE_DEVICE_HIGH).step_by(4) {
            if ![register::QUEUE_NOTIFY, register::STATUS].contains(&register) {
                machine.write(register, 0x10);
            }
        }
        assert_eq!(machine.read(register::QUEUE_READY), 1);
    }
    machine.host.run(10);
    guest.assert_works(0);
    guest.assert_works(1);
}

#[test]
fn a_queue_can_be_taken_back_and_set_up_anew_until_the_device_runs() {
    let machine = machine();
    let mut guest = Guest::agree(&machine, VERSION_1 | EVENT_IDX);
    guest.set_up_queue(0);
    machine.write(register::QUEUE_DESC_LOW, 0x100);
    machine.write(register::QUEUE_READY, 0);
    assert_eq!(machine.read(register::QUEUE_READY), 0);
    guest.queues.clear();
    guest.set_up_queue(0);
    guest.set_up_queue(1);
    machine.add_status(DRIVER_OK);
    machine.write(register::QUEUE_READY, 0);
    assert_eq!(machine.read(register::QUEUE_READY), 1);
    machine.host.run(10);
    machine.interrupted();
    guest.assert_works(0);
}

#[test]
fn a_queue_that_does_not_exist_has_size_zero_and_takes_nothing() {
    let machine = machine();
    let _guest = Guest::agree(&machine, VERSION_1);
    for index in [2, 0xffff, 0x1_0000, 0x1_0001, u32::MAX] {
        machine.write(register::QUEUE_SEL, index);
        machine.write(register::QUEUE_READY, 1);
        assert_eq!(machine.read(register::QUEUE_SIZE_MAX), 0, "{index:#x}");
        assert_eq!(machine.read(register::QUEUE_READY), 0);
        machine.write(register::QUEUE_NOTIFY, index);
    }
}

#[test]
fn a_ring_that_is_none_needs_a_reset_and_then_all_is_well() {
    let machine = machine();
    for (register, value) in
        [(register::QUEUE_SIZE, 3), (register::QUEUE_SIZE, 0x1_0008), (register::QUEUE_DESC_LOW, 8)]
    {
        let _guest = Guest::agree(&machine, VERSION_1);
        machine.write(register::QUEUE_SEL, 0);
        machine.write(register, value);
        machine.write(register::QUEUE_READY, 1);
        assert_ne!(machine.add_status(DRIVER_OK) & NEEDS_RESET, 0);
        assert!(machine.interrupted());
        assert_eq!(machine.read(register::INTERRUPT_STATUS), CONFIG_CHANGE);
        Guest::start(&machine).assert_works(0);
    }
}

#[test]
fn a_kick_that_no_doorbell_took_reaches_the_queue_too() {
    let machine = machine();
    let mut guest = Guest::start(&machine);
    guest.offer(1);
    let _ = machine.mmio.lock().unwrap().write(register::QUEUE_NOTIFY, &1u32.to_le_bytes());
    assert!(machine.host.run(10) > 0);
    assert_eq!(guest.reap(1).len(), 1);
}

#[test]
fn the_line_is_raised_through_the_transport_alone() {
    let machine = machine();
    let _guest = Guest::start(&machine);
    let interrupt = machine.echo.lock().unwrap().interrupt.clone().unwrap();
    assert!(interrupt.trigger(0).is_none(), "a driver would see no reason");
    machine.mmio.lock().unwrap().memory_changed();
    assert_eq!(machine.echo.lock().unwrap().memory_changes, 1);
}

#[test]
fn a_change_of_the_configuration_is_seen_and_told() {
    let machine = machine();
    let _guest = Guest::start(&machine);
    let before = machine.read(register::CONFIG_GENERATION);
    let interrupt = machine.echo.lock().unwrap().interrupt.clone().unwrap();
    machine.echo.lock().unwrap().config = [1, 2, 3, 4, 5, 6, 7, 8];
    interrupt.config();
    assert_ne!(machine.read(register::CONFIG_GENERATION), before);
    assert!(machine.interrupted());
    assert_eq!(machine.read(register::INTERRUPT_STATUS), CONFIG_CHANGE);
    assert_eq!(machine.read(register::CONFIG + 4), 0x0807_0605);
    let mut byte = [0];
    machine.mmio.lock().unwrap().read(register::CONFIG + 1, &mut byte);
    assert_eq!(byte, [2]);
    machine.write(register::CONFIG, 9);
    assert_eq!(machine.echo.lock().unwrap().config[..4], [9, 0, 0, 0]);
}

#[test]
fn reset_stops_the_device_and_forgets_its_interrupts() {
    let machine = machine();
    let mut guest = Guest::start(&machine);
    guest.offer(0);
    machine.write(register::QUEUE_NOTIFY, 0);
    machine.host.run(10);
    machine.write(register::STATUS, 0);
    assert_eq!(machine.status(), 0);
    assert_eq!(machine.read(register::INTERRUPT_STATUS), 0);
    assert_eq!(machine.host.watches(), 0);
    assert!(!machine.echo.lock().unwrap().runs());
    Guest::start(&machine).assert_works(1);
}

#[test]
fn a_restored_device_goes_on_where_it_was() {
    let first = machine();
    let mut guest = Guest::start(&first);
    guest.offer(0);
    first.write(register::QUEUE_NOTIFY, 0);
    first.host.run(10);
    let head = guest.offer(1);
    let queues = guest.queues;
    first.mmio.lock().unwrap().pause();
    let saved = postcard::to_allocvec(&first.mmio.lock().unwrap().save()).unwrap();

    let second = build(first.memory.clone(), Some(postcard::from_bytes(&saved).unwrap())).unwrap();
    assert_eq!(postcard::to_allocvec(&second.mmio.lock().unwrap().save()).unwrap(), saved);
    second.mmio.lock().unwrap().resume();
    assert!(second.interrupted(), "what the driver has not acknowledged is raised again");
    let mut guest = Guest { machine: &second, queues };
    assert_eq!(guest.reap(0).len(), 1);
    assert!(second.host.run(10) < 10);
    assert_eq!(guest.reap(1), [head], "what was offered and not kicked for is not lost");
    guest.assert_works(0);
    guest.assert_works(1);
}

#[test]
fn an_unplugged_device_leaves_nothing_behind() {
    let Machine { host, mmio, .. } = {
        let machine = machine();
        Guest::start(&machine);
        machine
    };
    assert_eq!((host.doorbells().len(), host.watches()), (2, 1));
    drop(mmio);
    assert_eq!((host.doorbells().len(), host.watches()), (0, 0));
}

#[derive(Clone, Debug)]
enum Act {
    Write(u64, usize, u64),
    Memory(u64, u16),
    Run,
    PauseAndResume,
    SaveAndRestore,
    Driver,
}

fn act() -> impl Strategy<Value = Act> {
    let offset = prop_oneof![4 => (0u64..0x44).prop_map(|n| n * 4), 1 => 0u64..SIZE];
    let width = prop_oneof![4 => Just(4usize), 1 => prop::sample::select(&[1usize, 2, 8][..])];
    let value = prop_oneof![any::<u64>(), 0u64..16, Just(0xff), (0u64..0x40).prop_map(|page| page << 12)];
    prop_oneof![
        12 => (offset, width, value).prop_map(|(o, w, v)| Act::Write(o, w, v)),
        4 => (0u64..0x400, any::<u16>()).prop_map(|(o, v)| Act::Memory(o, v)),
        2 => Just(Act::Run),
        1 => Just(Act::PauseAndResume),
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
                Act::Write(offset, width, value) => {
                    let mut data = value.to_le_bytes();
                    let _ = machine.mmio.lock().unwrap().write(offset, &data[..width]);
                    machine.mmio.lock().unwrap().read(offset, &mut data[..width]);
                }
                Act::Memory(offset, value) => {
                    machine.memory.memory().write_obj(value, GuestAddress(RINGS + offset * 2)).unwrap();
                }
                Act::Run => drop(machine.host.run(8)),
                Act::PauseAndResume => {
                    machine.mmio.lock().unwrap().pause();
                    machine.mmio.lock().unwrap().resume();
                }
                Act::SaveAndRestore => {
                    machine.mmio.lock().unwrap().pause();
                    let state = machine.mmio.lock().unwrap().save();
                    machine = build(machine.memory.clone(), Some(state)).unwrap();
                    machine.mmio.lock().unwrap().resume();
                }
                Act::Driver => Guest::start(&machine).assert_works(0),
            }
        }
    }
}
