//! The chips behind ports as a hostile guest uses them, while there is input, a person at the power button, and a machine
//! that is saved and built again.

use std::io;
use std::sync::{Arc, Mutex};

use devices::acpi_pm::{self, AcpiPm};
use devices::bus::{Bus, BusDevice};
use devices::i8042::{self, I8042};
use devices::pvpanic::{self, PvPanic};
use devices::rtc::{self, Rtc};
use devices::serial::{self, Serial};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::input::Input;

/// Where each chip is; the guest writes to these and just beyond them.
const CHIPS: [(u64, u64); 5] = [
    (0x3f8, serial::LEN),
    (0x60, i8042::LEN),
    (0x70, rtc::LEN),
    (0x600, acpi_pm::LEN),
    (0x505, pvpanic::LEN),
];

pub fn ports(data: &[u8]) {
    crate::log_to_nowhere();
    let mut machine = Machine::new(None);
    let mut input = Input::new(data);
    while machine.step(&mut input).is_some() {}
}

type State = (serial::State, i8042::State, rtc::State, acpi_pm::State);

struct Machine {
    serial: Arc<Mutex<Serial>>,
    keyboard: Arc<Mutex<I8042>>,
    clock: Arc<Mutex<Rtc>>,
    power: Arc<Mutex<AcpiPm>>,
    bus: Bus,
}

impl Machine {
    fn new(state: Option<State>) -> Self {
        let (serial, keyboard, clock, power) =
            state.map_or((None, None, None, None), |(a, b, c, d)| (Some(a), Some(b), Some(c), Some(d)));
        let config = serial::Config { output: Box::new(io::sink()), interrupt: event(), room: Some(event()) };
        let serial = Arc::new(Mutex::new(Serial::new(config, serial).unwrap()));
        let keyboard = Arc::new(Mutex::new(I8042::new(event(), keyboard).unwrap()));
        let clock = Arc::new(Mutex::new(Rtc::new(Box::new(|| 1_709_251_198), clock).unwrap()));
        let power = Arc::new(Mutex::new(AcpiPm::new(event(), power)));
        let chips: [Arc<Mutex<dyn BusDevice>>; 5] =
            [serial.clone(), keyboard.clone(), clock.clone(), power.clone(), Arc::new(Mutex::new(PvPanic))];
        let mut bus = Bus::default();
        for ((port, len), chip) in CHIPS.into_iter().zip(chips) {
            bus.insert(port, len, chip).unwrap();
        }
        Self { serial, keyboard, clock, power, bus }
    }

    /// One thing that happens. `None` at the end of the input. `examples/seeds.rs` knows the numbers.
    fn step(&mut self, input: &mut Input) -> Option<()> {
        let operation = input.u8()?;
        let (port, len) = CHIPS[usize::from(operation >> 3 & 7) % CHIPS.len()];
        let width = 1 << (operation >> 6);
        match operation & 7 {
            0..=3 => {
                let port = port + u64::from(input.u8()?) % (len + 1);
                let value = u64::from(input.u8()?) * 0x0101_0101_0101_0101;
                let _ = self.bus.write(port, &value.to_le_bytes()[..width]);
            }
            4 | 5 => self.bus.read(port + u64::from(input.u8()?) % (len + 1), &mut [0; 8][..width]),
            6 => {
                let typed = input.bytes(100)?;
                let mut serial = self.serial.lock().unwrap();
                let room = serial.room();
                assert_eq!(serial.input(typed), typed.len().min(room));
                assert!(serial.save().input.len() <= serial::INPUT_LIMIT);
                self.keyboard.lock().unwrap().ctrl_alt_del();
                self.power.lock().unwrap().press_power_button();
            }
            _ => self.carry_on(),
        }
        Some(())
    }

    fn save(&self) -> State {
        let (serial, keyboard) = (self.serial.lock().unwrap(), self.keyboard.lock().unwrap());
        let (clock, power) = (self.clock.lock().unwrap(), self.power.lock().unwrap());
        (serial.save(), keyboard.save(), clock.save(), power.save())
    }

    fn carry_on(&mut self) {
        let bytes = postcard::to_stdvec(&self.save()).unwrap();
        *self = Self::new(Some(postcard::from_bytes(&bytes).unwrap()));
        assert_eq!(postcard::to_stdvec(&self.save()).unwrap(), bytes);
        self.serial.lock().unwrap().resume();
        self.keyboard.lock().unwrap().resume();
        self.power.lock().unwrap().resume();
    }
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}
