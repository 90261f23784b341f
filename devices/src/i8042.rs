//! The PC's keyboard controller (i8042) with a keyboard that can type one thing: Ctrl-Alt-Del. Its other use is the pulse
//! that resets the machine.
//!
//! Has no mouse port (it tests as unconnected), no key but those three, and no leds. Answers every command that Linux
//! sends, since Linux waits half a second in a busy loop for an answer that does not come.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{BusDevice, Effect};
use crate::state::StateError;

/// How many ports it answers at; those between its two registers belong to others and read as ones.
pub const LEN: u64 = 5;
/// How many bytes wait for the guest at most. What does not fit is dropped, as by a keyboard.
pub const OUTPUT_LIMIT: usize = 16;

/// The data port 0x60.
const DATA: u64 = 0;
/// The status (read) and command (write) port 0x64.
const COMMAND: u64 = 4;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_LAST_WAS_COMMAND: u8 = 1 << 3;
/// The key lock is open.
const STATUS_UNLOCKED: u8 = 1 << 4;

const MODE_KEYBOARD_INTERRUPT: u8 = 1 << 0;
const MODE_SYSTEM: u8 = 1 << 2;
const MODE_KEYBOARD_OFF: u8 = 1 << 4;
/// The controller turns the keyboard's scan code set 2 into set 1.
const MODE_TRANSLATE: u8 = 1 << 6;

const SELF_TEST_PASSED: u8 = 0x55;
const PORT_TEST_PASSED: u8 = 0x00;
const PORT_TEST_CLOCK_LOW: u8 = 0x01;
/// Not in reset, address line 20 on.
const OUTPUT_PORT: u8 = 0b11;

const KEYBOARD_ACK: u8 = 0xfa;
const KEYBOARD_TEST_PASSED: u8 = 0xaa;
const KEYBOARD_ID: [u8; 2] = [0xab, 0x83];
const KEYBOARD_ECHO: u8 = 0xee;

/// Press Ctrl, Alt, Del, then let go of all.
const CTRL_ALT_DEL_SET_1: &[u8] = &[0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];
const CTRL_ALT_DEL_SET_2: &[u8] = &[0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];

/// The controller on its bus.
pub struct I8042 {
    /// IRQ 1 (edge).
    interrupt: EventFd,
    mode: u8,
    status: u8,
    output: VecDeque<u8>,
    /// The byte the guest read last, which the data port shows until the next one comes.
    last: u8,
    expects: Expects,
    counters: Arc<Counters>,
}

/// What the guest did with the controller since it was built.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes that it read.
    pub read: AtomicU64,
    /// Bytes that it wrote.
    pub written: AtomicU64,
    /// Of these, those that reset the machine.
    pub resets: AtomicU64,
}

/// What the next write to the data port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Expects {
    /// For the keyboard.
    Keyboard,
    /// The controller's mode byte.
    Mode,
    /// The output port, whose bit 0 resets the machine when it is 0.
    OutputPort,
    /// To be read back, as if it came from the keyboard or from the mouse, which is not there.
    Echo,
    /// For the mouse, which is not there.
    Nobody,
}

/// Registers and the bytes that the guest has not read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub mode: u8,
    pub status: u8,
    pub output: Vec<u8>,
    pub last: u8,
    pub expects: Expects,
}

impl I8042 {
    /// A controller as firmware leaves it, keyboard off; or as it was saved. Fails when `state` holds more than
    /// [`OUTPUT_LIMIT`] bytes.
    pub fn new(interrupt: EventFd, state: Option<State>) -> Result<Self, StateError> {
        let state = state.unwrap_or(State {
            mode: MODE_TRANSLATE | MODE_SYSTEM | MODE_KEYBOARD_OFF,
            status: STATUS_SYSTEM | STATUS_UNLOCKED,
            output: Vec::new(),
            last: 0,
            expects: Expects::Keyboard,
        });
        if state.output.len() > OUTPUT_LIMIT {
            return Err(StateError::new("i8042", "output", state.output.len(), "at most 16 bytes"));
        }
        let State { mode, status, output, last, expects } = state;
        let counters = Arc::default();
        Ok(Self { interrupt, mode, status, output: output.into(), last, expects, counters })
    }

    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// Types Ctrl-Alt-Del. False, and nothing typed, when the guest does not listen: it has not enabled the keyboard
    /// and its interrupt, or has not read what is there.
    pub fn ctrl_alt_del(&mut self) -> bool {
        let listens = self.mode & (MODE_KEYBOARD_OFF | MODE_KEYBOARD_INTERRUPT) == MODE_KEYBOARD_INTERRUPT;
        let translate = self.mode & MODE_TRANSLATE != 0;
        let codes = if translate { CTRL_ALT_DEL_SET_1 } else { CTRL_ALT_DEL_SET_2 };
        let typed = listens && self.output.len() + codes.len() <= OUTPUT_LIMIT;
        if typed {
            self.send(codes);
        }
        typed
    }

    /// Raises again what there is reason for, when the guest goes on: an edge may have got lost in a save.
    pub fn resume(&self) {
        self.interrupt_if_full();
    }

    pub fn save(&self) -> State {
        State {
            mode: self.mode,
            status: self.status,
            output: self.output.iter().copied().collect(),
            last: self.last,
            expects: self.expects,
        }
    }

    fn status(&self) -> u8 {
        let full = if self.output.is_empty() { 0 } else { STATUS_OUTPUT_FULL };
        self.status | full
    }

    fn read_data(&mut self) -> u8 {
        if let Some(byte) = self.output.pop_front() {
            self.last = byte;
            self.interrupt_if_full();
        }
        self.last
    }

    fn write_data(&mut self, byte: u8) -> Effect {
        self.status &= !STATUS_LAST_WAS_COMMAND;
        match std::mem::replace(&mut self.expects, Expects::Keyboard) {
            Expects::Keyboard => self.keyboard(byte),
            Expects::Mode => {
                self.mode = byte;
                self.interrupt_if_full();
            }
            Expects::OutputPort if byte & 1 == 0 => return Effect::Reset,
            Expects::Echo => self.send(&[byte]),
            Expects::OutputPort | Expects::Nobody => {}
        }
        Effect::None
    }

    fn write_command(&mut self, command: u8) -> Effect {
        self.status |= STATUS_LAST_WAS_COMMAND;
        self.expects = Expects::Keyboard;
        match command {
            0x20 => self.send(&[self.mode]),
            0x60 => self.expects = Expects::Mode,
            0xa9 => self.send(&[PORT_TEST_CLOCK_LOW]),
            0xaa => self.send(&[SELF_TEST_PASSED]),
            0xab => self.send(&[PORT_TEST_PASSED]),
            0xad => self.mode |= MODE_KEYBOARD_OFF,
            0xae => self.mode &= !MODE_KEYBOARD_OFF,
            0xd0 => self.send(&[OUTPUT_PORT]),
            0xd1 => self.expects = Expects::OutputPort,
            0xd2 | 0xd3 => self.expects = Expects::Echo,
            0xd4 => self.expects = Expects::Nobody,
            // Pulses the output lines whose bit is 0; line 0 is the processor's reset.
            0xf0..=0xff if command & 1 == 0 => return Effect::Reset,
            _ => {}
        }
        Effect::None
    }

    /// The keyboard acknowledges whatever it is told, and answers what asks for more.
    fn keyboard(&mut self, command: u8) {
        match command {
            0xee => self.send(&[KEYBOARD_ECHO]),
            0xf2 => self.send(&[KEYBOARD_ACK, KEYBOARD_ID[0], KEYBOARD_ID[1]]),
            0xff => self.send(&[KEYBOARD_ACK, KEYBOARD_TEST_PASSED]),
            _ => self.send(&[KEYBOARD_ACK]),
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        let room = OUTPUT_LIMIT - self.output.len().min(OUTPUT_LIMIT);
        self.output.extend(bytes.iter().take(room));
        self.interrupt_if_full();
    }

    /// One interrupt for each byte that reaches the data port; the next byte reaches it when this one is read.
    fn interrupt_if_full(&self) {
        if self.mode & MODE_KEYBOARD_INTERRUPT != 0 && !self.output.is_empty() {
            let _ = self.interrupt.write(1);
        }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let value = match offset {
            DATA => self.read_data(),
            COMMAND => self.status(),
            _ => return,
        };
        if let Some(byte) = data.first_mut() {
            *byte = value;
            self.counters.read.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let effect = match (offset, data.first()) {
            (DATA, Some(&byte)) => self.write_data(byte),
            (COMMAND, Some(&byte)) => self.write_command(byte),
            _ => return Effect::None,
        };
        self.counters.written.fetch_add(1, Ordering::Relaxed);
        if effect == Effect::Reset {
            self.counters.resets.fetch_add(1, Ordering::Relaxed);
        }
        effect
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controller() -> (I8042, EventFd) {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (I8042::new(interrupt.try_clone().unwrap(), None).unwrap(), interrupt)
    }

    fn read(chip: &mut I8042, port: u64) -> u8 {
        let mut byte = [0];
        chip.read(port, &mut byte);
        byte[0]
    }

    fn drain(chip: &mut I8042) -> Vec<u8> {
        let mut bytes = Vec::new();
        while read(chip, COMMAND) & STATUS_OUTPUT_FULL != 0 {
            bytes.push(read(chip, DATA));
        }
        bytes
    }

    fn command(chip: &mut I8042, command: u8, parameter: Option<u8>) -> Vec<u8> {
        assert_eq!(chip.write(COMMAND, &[command]), Effect::None);
        if let Some(byte) = parameter {
            assert_eq!(chip.write(DATA, &[byte]), Effect::None);
        }
        drain(chip)
    }

    /// What Linux's i8042 driver does with `noaux nomux` until it listens to the keyboard.
    fn listen(chip: &mut I8042) {
        assert_eq!(command(chip, 0xaa, None), [SELF_TEST_PASSED]);
        assert_ne!(read(chip, COMMAND) & STATUS_UNLOCKED, 0, "else Linux warns of a key lock");
        let mode = command(chip, 0x20, None)[0];
        let mode = mode & !MODE_KEYBOARD_OFF | MODE_KEYBOARD_INTERRUPT;
        assert_eq!(command(chip, 0x60, Some(mode)), []);
        assert_eq!(command(chip, 0x20, None), [mode]);
    }

    #[test]
    fn the_reset_pulse_resets_and_other_pulses_do_not() {
        let (mut chip, _) = controller();
        assert_eq!(chip.write(COMMAND, &[0xfe]), Effect::Reset);
        assert_eq!(chip.write(COMMAND, &[0xff]), Effect::None);
        assert_eq!(chip.write(COMMAND, &[0xd1]), Effect::None);
        assert_eq!(chip.write(DATA, &[0xfe]), Effect::Reset, "through the output port");
    }

    #[test]
    fn ctrl_alt_del_is_typed_one_interrupt_for_each_byte() {
        let (mut chip, interrupt) = controller();
        listen(&mut chip);
        let _ = interrupt.read();
        assert!(chip.ctrl_alt_del());
        let mut typed = Vec::new();
        while interrupt.read().is_ok() {
            typed.push(read(&mut chip, DATA));
        }
        assert_eq!(typed, CTRL_ALT_DEL_SET_1);
    }

    #[test]
    fn ctrl_alt_del_is_scan_code_set_2_when_the_guest_turned_translation_off() {
        let (mut chip, _) = controller();
        listen(&mut chip);
        command(&mut chip, 0x60, Some(MODE_KEYBOARD_INTERRUPT));
        assert!(chip.ctrl_alt_del());
        assert_eq!(drain(&mut chip), CTRL_ALT_DEL_SET_2);
    }

    #[test]
    fn ctrl_alt_del_is_refused_while_the_guest_does_not_listen() {
        let (mut chip, interrupt) = controller();
        assert!(!chip.ctrl_alt_del(), "no driver");
        listen(&mut chip);
        let _ = interrupt.read();
        command(&mut chip, 0xad, None);
        assert!(!chip.ctrl_alt_del(), "keyboard off");
        command(&mut chip, 0xae, None);
        assert!(chip.ctrl_alt_del() && chip.ctrl_alt_del());
        assert!(!chip.ctrl_alt_del(), "the first two were not read");
        assert_eq!(drain(&mut chip).len(), 2 * CTRL_ALT_DEL_SET_1.len(), "never half of it");
    }

    #[test]
    fn the_keyboard_answers_a_probe() {
        let (mut chip, _) = controller();
        for (sent, answer) in [(0xff, &[0xfa, 0xaa][..]), (0xf2, &[0xfa, 0xab, 0x83]), (0xf4, &[0xfa])] {
            let _ = chip.write(DATA, &[sent]);
            assert_eq!(drain(&mut chip), answer, "{sent:#x}");
        }
    }

    #[test]
    fn a_probe_for_a_mouse_is_answered_at_once_and_finds_none() {
        let (mut chip, _) = controller();
        assert_eq!(command(&mut chip, 0xd3, Some(0x5a)), [0x5a], "without the mouse's status bit");
        assert_eq!(command(&mut chip, 0xa9, None), [PORT_TEST_CLOCK_LOW]);
        assert_eq!(command(&mut chip, 0xd4, Some(0xff)), []);
    }

    #[test]
    fn output_is_bounded() {
        let (mut chip, _) = controller();
        for _ in 0..1000 {
            let _ = chip.write(DATA, &[0xf2]);
        }
        assert_eq!(drain(&mut chip).len(), OUTPUT_LIMIT);
    }

    #[test]
    fn a_restored_controller_goes_on_where_it_was() {
        let (mut chip, interrupt) = controller();
        listen(&mut chip);
        assert!(chip.ctrl_alt_del());
        read(&mut chip, DATA);
        let _ = chip.write(COMMAND, &[0x60]);
        let state = chip.save();
        let _ = interrupt.read();
        let mut restored = I8042::new(interrupt.try_clone().unwrap(), Some(state.clone())).unwrap();
        assert_eq!(restored.save(), state);
        restored.resume();
        assert_eq!(interrupt.read().unwrap(), 1, "for what it has not read");
        assert_eq!(drain(&mut restored), CTRL_ALT_DEL_SET_1[1..]);
        let _ = interrupt.read();
        restored.resume();
        assert!(interrupt.read().is_err(), "there is nothing left");
    }

    #[test]
    fn a_state_with_too_much_output_is_refused() {
        let (chip, interrupt) = controller();
        let state = State { output: vec![0; OUTPUT_LIMIT + 1], ..chip.save() };
        assert!(I8042::new(interrupt, Some(state)).is_err());
    }

    #[test]
    fn any_access_is_survived() {
        let (mut chip, _) = controller();
        for value in 0..=u8::MAX {
            for offset in 0..8 {
                for width in [0, 1, 2, 4, 8] {
                    let mut data = [value; 8];
                    let _ = chip.write(offset, &data[..width]);
                    chip.read(offset, &mut data[..width]);
                }
            }
        }
    }
}
