//! The 16550A UART at an ISA port (COM1). The registers are `vm_superio`'s; this file connects them to a bus, an
//! interrupt line, an output and a bounded input.
//!
//! Does not model baud rate, parity or modem lines, and ignores the FIFO control register: clearing the receive FIFO
//! when a driver starts would lose what was typed before.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{SerialEvents, SerialState};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{BusDevice, Effect};
use crate::state::StateError;

/// How many ports the UART answers at.
pub const LEN: u64 = 8;

/// How many bytes of input wait for the guest. Whoever has more keeps it until there is room: a guest that never reads
/// must not grow the host's memory.
pub const INPUT_LIMIT: usize = 64;

const INTERRUPT_ENABLE: u8 = 1;
const RECEIVED_DATA_ENABLED: u8 = 1 << 0;
const TRANSMITTER_EMPTY_ENABLED: u8 = 1 << 1;
const INTERRUPT_IDENTIFICATION: u8 = 2;
const NO_INTERRUPT: u8 = 0b0001;
const TRANSMITTER_EMPTY: u8 = 0b0010;
const RECEIVED_DATA: u8 = 0b0100;
/// The upper half says that there are FIFOs.
const REASON: u8 = 0b1111;
const LINE_CONTROL: u8 = 3;
const DIVISOR_LATCH_ACCESS: u8 = 1 << 7;
const MODEM_CONTROL: u8 = 4;
const LOOPBACK: u8 = 1 << 4;
const LINE_STATUS: u8 = 5;
const DATA_READY: u8 = 1 << 0;

/// What the board connects to the UART.
pub struct Config {
    /// Gets every byte the guest sends, one at a time, on a vCPU thread: it must not block for long. A byte that it
    /// refuses is lost and counted.
    pub output: Box<dyn Write + Send>,
    /// The interrupt line (edge).
    pub interrupt: EventFd,
    /// Signalled when there is room for input again after [`Serial::input`] could not take all.
    pub room: Option<EventFd>,
}

/// The UART on its bus.
pub struct Serial {
    uart: Uart,
    room: Option<EventFd>,
    counters: Arc<Counters>,
    /// Input was refused since the last signal on `room`.
    refused: bool,
    /// A reason for an interrupt that a more urgent one hid when the guest asked.
    transmitter_empty: bool,
}

type Uart = vm_superio::Serial<Line, Arc<Counters>, Box<dyn Write + Send>>;

/// Bytes since the UART was built.
#[derive(Debug, Default)]
pub struct Counters {
    /// The guest read these.
    pub read: AtomicU64,
    /// The guest wrote these and the output took them.
    pub written: AtomicU64,
    /// The guest wrote these and the output failed.
    pub lost: AtomicU64,
}

/// Registers by their name in the data sheet, and the input that the guest has not read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub divisor_low: u8,
    pub divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    pub input: Vec<u8>,
}

impl Serial {
    /// A UART as after power-on, or as it was saved. Fails when `state` holds more than [`INPUT_LIMIT`] bytes.
    pub fn new(config: Config, state: Option<State>) -> Result<Self, StateError> {
        let counters = Arc::new(Counters::default());
        let state = state.map_or_else(SerialState::default, SerialState::from);
        let waiting = state.in_buffer.len();
        let uart = Uart::from_state(&state, Line(config.interrupt), counters.clone(), config.output)
            .map_err(|_| StateError::new("serial", "input", waiting, "at most 64 bytes"))?;
        Ok(Self { uart, room: config.room, counters, refused: false, transmitter_empty: false })
    }

    /// Gives the guest as much of `bytes` as there is room for, and says how much that was.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.room());
        // Fails when full, which `taken` excludes, or when the interrupt cannot be raised, which an eventfd whose
        // counter is at its end would say: it is raised then.
        let _ = self.uart.enqueue_raw_bytes(&bytes[..taken]);
        self.refused |= taken < bytes.len();
        taken
    }

    /// How many bytes [`Serial::input`] would take now. None in loopback mode, when the line is cut off.
    pub fn room(&mut self) -> usize {
        if self.uart.read(MODEM_CONTROL) & LOOPBACK == 0 { self.uart.fifo_capacity() } else { 0 }
    }

    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    pub fn save(&self) -> State {
        let mut state = State::from(self.uart.state());
        if self.transmitter_empty {
            state.interrupt_identification &= !NO_INTERRUPT;
            state.interrupt_identification |= TRANSMITTER_EMPTY;
        }
        state
    }

    /// Raises again what there is reason for, when the guest goes on: an edge may have got lost in a save.
    pub fn resume(&self) {
        let State { interrupt_identification, interrupt_enable, line_status, .. } = self.save();
        let received = interrupt_enable & RECEIVED_DATA_ENABLED != 0 && line_status & DATA_READY != 0;
        if received || interrupt_identification & NO_INTERRUPT == 0 {
            let _ = self.uart.interrupt_evt().trigger();
        }
    }

    fn read_register(&mut self, register: u8) -> u8 {
        match register {
            INTERRUPT_IDENTIFICATION => self.identify_interrupt(),
            _ => self.uart.read(register),
        }
    }

    /// The most urgent reason for an interrupt; reading takes that of the empty transmitter away. `vm_superio` shows both
    /// reasons at once, which is the code of a third, and takes both away. It also forgets received data with the first
    /// byte that is read: a driver that stops in the middle, as Linux does after 256 bytes, would never come back for the
    /// rest.
    fn identify_interrupt(&mut self) -> u8 {
        let value = self.uart.read(INTERRUPT_IDENTIFICATION);
        let empty = std::mem::take(&mut self.transmitter_empty) || value & TRANSMITTER_EMPTY != 0;
        let mut has = |register, bit| self.uart.read(register) & bit != 0;
        // With the latch open, another register is at the place of what is enabled; nobody waits for interrupts then.
        let hidden = has(LINE_CONTROL, DIVISOR_LATCH_ACCESS);
        let received = has(INTERRUPT_ENABLE, RECEIVED_DATA_ENABLED) && has(LINE_STATUS, DATA_READY);
        let empty_told = empty && has(INTERRUPT_ENABLE, TRANSMITTER_EMPTY_ENABLED);
        let (reason, kept) = match (hidden, received, empty_told) {
            (true, ..) => (NO_INTERRUPT, empty),
            (_, true, _) => (RECEIVED_DATA, empty_told),
            (_, _, true) => (TRANSMITTER_EMPTY, false),
            _ => (NO_INTERRUPT, false),
        };
        self.transmitter_empty = kept;
        value & !REASON | reason
    }

    fn signal_room(&mut self) {
        if self.refused && self.room() > 0 {
            self.refused = false;
            if let Some(room) = &self.room {
                let _ = room.write(1);
            }
        }
    }
}

impl BusDevice for Serial {
    /// The registers are one byte wide; a wider access reaches its first register only.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (Ok(register), Some(byte)) = (u8::try_from(offset), data.first_mut()) {
            *byte = self.read_register(register);
            self.signal_room();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let (Ok(register), Some(&byte)) = (u8::try_from(offset), data.first()) {
            // A failed output is counted by `tx_lost_byte`; the guest cannot be told.
            let _ = self.uart.write(register, byte);
            self.signal_room();
        }
        Effect::None
    }
}

struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl SerialEvents for Counters {
    fn buffer_read(&self) {
        self.read.fetch_add(1, Ordering::Relaxed);
    }
    fn out_byte(&self) {
        self.written.fetch_add(1, Ordering::Relaxed);
    }
    fn tx_lost_byte(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
    }
    fn in_buffer_empty(&self) {}
}

impl From<SerialState> for State {
    fn from(s: SerialState) -> Self {
        Self {
            divisor_low: s.baud_divisor_low,
            divisor_high: s.baud_divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            input: s.in_buffer,
        }
    }
}

impl From<State> for SerialState {
    fn from(s: State) -> Self {
        Self {
            baud_divisor_low: s.divisor_low,
            baud_divisor_high: s.divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            in_buffer: s.input,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    const DATA: u8 = 0;

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Broken;

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn event() -> EventFd {
        EventFd::new(libc::EFD_NONBLOCK).unwrap()
    }

    struct Board {
        serial: Serial,
        screen: Screen,
        interrupt: EventFd,
        room: EventFd,
    }

    fn board(state: Option<State>) -> Board {
        let (screen, interrupt, room) = (Screen::default(), event(), event());
        let config = Config {
            output: Box::new(screen.clone()),
            interrupt: interrupt.try_clone().unwrap(),
            room: Some(room.try_clone().unwrap()),
        };
        Board { serial: Serial::new(config, state).unwrap(), screen, interrupt, room }
    }

    fn read(serial: &mut Serial, register: u8) -> u8 {
        let mut byte = [0];
        serial.read(register.into(), &mut byte);
        byte[0]
    }

    fn write(serial: &mut Serial, register: u8, byte: u8) {
        assert_eq!(serial.write(register.into(), &[byte]), Effect::None);
    }

    #[test]
    fn what_the_guest_sends_appears_on_the_output() {
        let mut board = board(None);
        for byte in b"login: " {
            write(&mut board.serial, DATA, *byte);
        }
        assert_eq!(*board.screen.0.lock().unwrap(), b"login: ");
        assert_eq!(board.serial.counters().written.load(Ordering::Relaxed), 7);
    }

    #[test]
    fn a_broken_output_loses_bytes_but_never_stops_the_guest() {
        let config = Config { output: Box::new(Broken), interrupt: event(), room: None };
        let mut serial = Serial::new(config, None).unwrap();
        write(&mut serial, DATA, b'x');
        assert_eq!(serial.counters().lost.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn input_raises_the_interrupt_and_is_read_in_order() {
        let mut board = board(None);
        write(&mut board.serial, INTERRUPT_ENABLE, RECEIVED_DATA_ENABLED);
        assert_eq!(board.serial.input(b"ab"), 2);
        assert_eq!(board.interrupt.read().unwrap(), 1);
        assert_eq!(read(&mut board.serial, LINE_STATUS) & DATA_READY, DATA_READY);
        assert_eq!(read(&mut board.serial, DATA), b'a');
        assert_eq!(read(&mut board.serial, DATA), b'b');
        assert_eq!(read(&mut board.serial, LINE_STATUS) & DATA_READY, 0);
    }

    #[test]
    fn input_that_is_left_is_a_reason_for_an_interrupt_until_the_last_byte_is_read() {
        let mut board = board(None);
        write(&mut board.serial, INTERRUPT_ENABLE, RECEIVED_DATA_ENABLED);
        board.serial.input(b"ab");
        for expected in [RECEIVED_DATA, RECEIVED_DATA, NO_INTERRUPT] {
            for _ in 0..2 {
                assert_eq!(read(&mut board.serial, INTERRUPT_IDENTIFICATION) & 0xf, expected);
            }
            read(&mut board.serial, DATA);
        }
        write(&mut board.serial, INTERRUPT_ENABLE, 0);
        board.serial.input(b"c");
        assert_eq!(
            read(&mut board.serial, INTERRUPT_IDENTIFICATION) & 0xf,
            NO_INTERRUPT,
            "it is not enabled"
        );
    }

    fn reason(serial: &mut Serial) -> u8 {
        read(serial, INTERRUPT_IDENTIFICATION) & REASON
    }

    #[test]
    fn an_empty_transmitter_is_a_reason_once_and_again_after_each_byte() {
        let mut board = board(None);
        write(&mut board.serial, DATA, b'a');
        assert!(board.interrupt.read().is_err(), "it is not enabled");
        write(&mut board.serial, INTERRUPT_ENABLE, TRANSMITTER_EMPTY_ENABLED);
        assert_eq!(board.interrupt.read().unwrap(), 1);
        assert_eq!(read(&mut board.serial, INTERRUPT_IDENTIFICATION), 0xc0 | TRANSMITTER_EMPTY);
        assert_eq!(reason(&mut board.serial), NO_INTERRUPT);
        write(&mut board.serial, DATA, b'b');
        assert_eq!(board.interrupt.read().unwrap(), 1);
        assert_eq!(reason(&mut board.serial), TRANSMITTER_EMPTY);
    }

    #[test]
    fn received_data_is_told_before_an_empty_transmitter_and_neither_is_lost() {
        let mut board = board(None);
        write(&mut board.serial, INTERRUPT_ENABLE, RECEIVED_DATA_ENABLED | TRANSMITTER_EMPTY_ENABLED);
        board.serial.input(b"a");
        for _ in 0..2 {
            assert_eq!(reason(&mut board.serial), RECEIVED_DATA);
        }
        let mut restored = self::board(Some(board.serial.save())).serial;
        for serial in [&mut board.serial, &mut restored] {
            assert_eq!(reason(serial), RECEIVED_DATA);
            read(serial, DATA);
            assert_eq!(reason(serial), TRANSMITTER_EMPTY);
            assert_eq!(reason(serial), NO_INTERRUPT);
        }
    }

    #[test]
    fn what_is_no_longer_enabled_is_no_reason() {
        let mut board = board(None);
        write(&mut board.serial, INTERRUPT_ENABLE, RECEIVED_DATA_ENABLED | TRANSMITTER_EMPTY_ENABLED);
        board.serial.input(b"a");
        write(&mut board.serial, INTERRUPT_ENABLE, 0);
        assert_eq!(reason(&mut board.serial), NO_INTERRUPT);
        board.interrupt.read().unwrap();
        write(&mut board.serial, INTERRUPT_ENABLE, RECEIVED_DATA_ENABLED);
        assert!(board.interrupt.read().is_ok());
        assert_eq!(reason(&mut board.serial), RECEIVED_DATA);
    }

    #[test]
    fn the_open_latch_hides_the_reasons_and_keeps_them() {
        let mut board = board(None);
        let both = RECEIVED_DATA_ENABLED | TRANSMITTER_EMPTY_ENABLED;
        write(&mut board.serial, INTERRUPT_ENABLE, both);
        board.serial.input(b"a");
        write(&mut board.serial, LINE_CONTROL, DIVISOR_LATCH_ACCESS);
        write(&mut board.serial, INTERRUPT_ENABLE, both);
        for _ in 0..2 {
            assert_eq!(reason(&mut board.serial), NO_INTERRUPT);
        }
        write(&mut board.serial, LINE_CONTROL, 0);
        assert_eq!(reason(&mut board.serial), RECEIVED_DATA);
        read(&mut board.serial, DATA);
        assert_eq!(reason(&mut board.serial), TRANSMITTER_EMPTY);
    }

    #[test]
    fn a_guest_that_goes_on_is_interrupted_again_for_what_it_has_not_read() {
        let mut board = board(None);
        write(&mut board.serial, INTERRUPT_ENABLE, RECEIVED_DATA_ENABLED);
        board.serial.resume();
        assert!(board.interrupt.read().is_err(), "no reason");
        board.serial.input(b"a");
        reason(&mut board.serial);
        let _ = board.interrupt.read();
        board.serial.resume();
        assert_eq!(board.interrupt.read().unwrap(), 1);
        write(&mut board.serial, INTERRUPT_ENABLE, TRANSMITTER_EMPTY_ENABLED);
        let _ = board.interrupt.read();
        board.serial.resume();
        assert_eq!(board.interrupt.read().unwrap(), 1);
    }

    #[test]
    fn input_beyond_the_limit_is_refused_until_the_guest_reads() {
        let mut board = board(None);
        assert_eq!(board.serial.input(&[7; 100]), INPUT_LIMIT);
        assert_eq!(board.serial.input(&[7; 100]), 0);
        assert!(board.room.read().is_err(), "no room yet");
        read(&mut board.serial, DATA);
        assert_eq!(board.room.read().unwrap(), 1);
        assert_eq!(board.serial.room(), 1);
        read(&mut board.serial, DATA);
        assert!(board.room.read().is_err(), "told once per refusal");
    }

    #[test]
    fn input_waits_while_the_guest_tests_the_loopback() {
        let mut board = board(None);
        write(&mut board.serial, MODEM_CONTROL, LOOPBACK);
        assert_eq!(board.serial.input(b"a"), 0);
        write(&mut board.serial, DATA, b'z');
        assert_eq!(read(&mut board.serial, DATA), b'z');
        write(&mut board.serial, MODEM_CONTROL, 0);
        assert_eq!(board.room.read().unwrap(), 1);
        assert_eq!(board.serial.input(b"a"), 1);
    }

    #[test]
    fn a_restored_uart_goes_on_where_it_was() {
        let mut board = board(None);
        write(&mut board.serial, 7, 0x5a);
        board.serial.input(b"typed");
        let state = board.serial.save();
        let mut restored = self::board(Some(state.clone())).serial;
        assert_eq!(restored.save(), state);
        assert_eq!(read(&mut restored, DATA), b't');
        assert_eq!(read(&mut restored, 7), 0x5a);
    }

    #[test]
    fn a_state_with_too_much_input_is_refused() {
        let mut state = board(None).serial.save();
        state.input = vec![0; INPUT_LIMIT + 1];
        let config = Config { output: Box::new(Broken), interrupt: event(), room: None };
        let error = Serial::new(config, Some(state)).err().unwrap();
        assert_eq!(error.to_string(), "saved state of serial: input is 65, must be at most 64 bytes");
    }

    #[test]
    fn any_access_is_survived() {
        let mut serial = board(None).serial;
        for offset in [0, 1, 7, 8, 255, 256, u64::MAX] {
            for width in [1, 2, 4, 8] {
                let mut data = [0xff; 8];
                assert_eq!(serial.write(offset, &data[..width]), Effect::None);
                serial.read(offset, &mut data[..width]);
            }
        }
    }
}
