//! PCI as a hostile guest uses it: configuration space, and the registers of virtio devices behind BARs, in any order,
//! width and alignment, in between paused, saved and built again.

use std::sync::{Arc, Mutex};

use devices::bus::BusDevice;
use devices::host::Host;
use devices::memory::Memory;
use devices::pci::Function;
use devices::pci::root::{Root, Windows};
use devices::testing::FakeHost;
use devices::virtio::mmio::{self, Mmio};
use devices::virtio::pci::{self, Pci};
use devices::virtio::testing;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::input::Input;
use crate::saved_state::{fresh, restored};

const RAM: usize = 1 << 16;
const LOW: u64 = 0xd000_0000;
const HIGH: u64 = 0x40_0000_0000;
const WINDOW: u64 = 1 << 20;
/// Turns the devices get at a time; they may have more to do then.
const TURNS: usize = 8;

/// Every access goes to configuration space or to the windows, wherever the BARs are then. The device is a console.
pub fn pci_config(data: &[u8]) {
    crate::log_to_nowhere();
    let mut machine = PciMachine::new(0);
    let mut input = Input::new(data);
    while machine.config_step(&mut input).is_some() {}
}

/// The registers of one device at a BAR that is decoded, its rings and its interrupts. The first byte says which device.
pub fn virtio_pci(data: &[u8]) {
    crate::log_to_nowhere();
    let mut input = Input::new(data);
    let Some(kind) = input.u8() else { return };
    let mut machine = PciMachine::new(kind);
    // Memory decoding and bus mastering on, as a driver does first.
    machine.root.write_config(machine.slot << 15 | 4, &[6, 0]);
    while machine.register_step(&mut input).is_some() {}
}

struct PciMachine {
    host: FakeHost,
    memory: Memory,
    root: Root,
    slot: u64,
    function: Arc<Mutex<Pci>>,
}

impl PciMachine {
    fn new(kind: u8) -> Self {
        let windows = Windows { below_4g: LOW..LOW + WINDOW, above_4g: Some(HIGH..HIGH + WINDOW) };
        let (host, memory, root) = (FakeHost::new(), testing::ram(RAM), Root::new(windows));
        let function = Arc::new(Mutex::new(new_pci(&host, &memory, kind, None)));
        let slot = root.add(None, function.clone()).unwrap() as u64;
        Self { host, memory, root, slot, function }
    }

    fn config_step(&mut self, input: &mut Input) -> Option<()> {
        let operation = input.u8()?;
        let mut data = [0; 8];
        let width = 1 << (operation >> 6);
        let data = &mut data[..width];
        match operation & 7 {
            0 | 1 => self.root.read_config(input.u32()?.into(), data),
            2 | 3 => {
                let offset = self.slot << 15 | u64::from(input.u16()? & 0xfff);
                data.fill(input.u8()?);
                self.root.write_config(offset, data);
            }
            4 => {
                let offset = u64::from(input.u16()?);
                let value = input.u64()?.to_le_bytes();
                self.root.write_config(self.slot << 15 | offset & 0xfff, &value[..width]);
            }
            5 => self.root.read(input.u64()?, data),
            6 => {
                let base = if operation & 8 != 0 { HIGH } else { LOW };
                data.fill(input.u8()?);
                self.root.write(base + u64::from(input.u32()? & 0xf_ffff), data);
            }
            _ => self.carry_on(),
        }
        Some(())
    }

    fn register_step(&mut self, input: &mut Input) -> Option<()> {
        let operation = input.u8()?;
        let mut data = [0; 8];
        let width = 1 << (operation >> 6);
        let data = &mut data[..width];
        let bar = self.bar();
        match operation & 7 {
            0 => self.root.read(bar.wrapping_add(input.u16()?.into()), data),
            1..=3 => {
                let offset = u64::from(input.u16()?);
                let value = input.u64()?.to_le_bytes();
                data.copy_from_slice(&value[..width]);
                let address = bar.wrapping_add(offset);
                if width != 4 || !self.host.write(address, u32::from_le_bytes(*value.first_chunk()?)) {
                    self.root.write(address, data);
                }
            }
            4 => {
                let address = GuestAddress(input.u16()?.into());
                self.memory.memory().write(input.bytes(64)?, address).ok();
            }
            5 => {
                self.host.run(TURNS);
                self.host.take_messages();
            }
            6 => {
                let what = input.u8()?;
                self.host.fail_connections(what & 1 != 0);
                if what & 0x80 != 0 {
                    self.function.lock().unwrap().take_away();
                }
            }
            _ => self.carry_on(),
        }
        Some(())
    }

    /// Where the first BAR is that the function decodes; elsewhere nothing answers.
    fn bar(&self) -> u64 {
        let mut function = self.function.lock().unwrap();
        (0..6).find_map(|bar| function.config().decoded(bar)).map_or(LOW, |bar| bar.start)
    }

    /// Pauses, saves, builds again and resumes.
    fn carry_on(&mut self) {
        self.host.fail_connections(false);
        let saved = {
            let mut function = self.function.lock().unwrap();
            function.pause();
            function.save()
        };
        let bytes = postcard::to_stdvec(&saved).unwrap();
        let state: pci::State = postcard::from_bytes(&bytes).unwrap();
        assert_eq!(state, saved);
        self.root.remove(self.slot as usize);
        self.function = Arc::new(Mutex::new(new_pci(&self.host, &self.memory, 0, Some(state))));
        self.slot = self.root.add(Some(self.slot as usize), self.function.clone()).unwrap() as u64;
        self.function.lock().unwrap().resume();
    }
}

/// A function with a device of this kind ([`fresh`]), or with the one that was saved.
pub fn new_pci(host: &FakeHost, memory: &Memory, kind: u8, state: Option<pci::State>) -> Pci {
    let device =
        state.as_ref().map_or_else(|| fresh(kind), |state| restored(state.transport.device.clone()).unwrap());
    let host: Arc<dyn Host> = Arc::new(host.clone());
    Pci::new(device, host, memory.clone(), state).unwrap()
}

/// The registers of virtio-mmio, likewise.
pub fn virtio_mmio(data: &[u8]) {
    crate::log_to_nowhere();
    let mut input = Input::new(data);
    let Some(kind) = input.u8() else { return };
    let mut machine = MmioMachine { host: FakeHost::new(), memory: testing::ram(RAM), mmio: None };
    machine.mmio = Some(machine.new_mmio(kind, None));
    while machine.step(&mut input).is_some() {}
}

struct MmioMachine {
    host: FakeHost,
    memory: Memory,
    mmio: Option<Mmio>,
}

impl MmioMachine {
    fn new_mmio(&self, kind: u8, state: Option<mmio::State>) -> Mmio {
        let device = state
            .as_ref()
            .map_or_else(|| fresh(kind), |state| restored(state.transport.device.clone()).unwrap());
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        Mmio::new(LOW, device, Arc::new(self.host.clone()), self.memory.clone(), line, state).unwrap()
    }

    fn step(&mut self, input: &mut Input) -> Option<()> {
        let operation = input.u8()?;
        let mut data = [0; 8];
        let width = 1 << (operation >> 6);
        let data = &mut data[..width];
        let mmio = self.mmio.as_mut()?;
        match operation & 7 {
            0 => mmio.read(u64::from(input.u16()? & 0xff8), data),
            1..=3 => {
                let offset = u64::from(input.u16()? & 0xfff);
                let value = input.u32()?.to_le_bytes();
                let offset = offset.min(0x1000 - width as u64);
                data.iter_mut().zip(value).for_each(|(byte, value)| *byte = value);
                if width != 4 || !self.host.write(LOW + offset, u32::from_le_bytes(value)) {
                    let _ = mmio.write(offset, data);
                }
            }
            4 => {
                let address = GuestAddress(input.u16()?.into());
                self.memory.memory().write(input.bytes(64)?, address).ok();
            }
            5 => _ = self.host.run(TURNS),
            _ => {
                mmio.pause();
                let saved = mmio.save();
                self.mmio = None;
                let bytes = postcard::to_stdvec(&saved).unwrap();
                let state: mmio::State = postcard::from_bytes(&bytes).unwrap();
                assert_eq!(state, saved);
                let mut mmio = self.new_mmio(0, Some(state));
                mmio.resume();
                self.mmio = Some(mmio);
            }
        }
        Some(())
    }
}
