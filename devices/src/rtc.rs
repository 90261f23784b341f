//! The PC's clock and its CMOS memory (MC146818) at ports 0x70 and 0x71: UTC, binary coded decimal, 24 hours.
//!
//! Never shows an update in progress, so no guest polls for its end. Raises no interrupt: the alarm registers hold what
//! is written, the periodic interrupt's flags stay clear, and the ACPI tables give the device no interrupt.

use serde::{Deserialize, Serialize};

use crate::bus::{BusDevice, Effect};
use crate::state::StateError;

/// How many ports it answers at.
pub const LEN: u64 = 2;

/// The clock: seconds since 1970 in UTC. Not the guest's, which may have set its own.
pub type Clock = Box<dyn Fn() -> i64 + Send>;

const REGISTERS: usize = 128;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
/// Where PCs have it. ACPI does not name it: reading it is two exits more at boot, and a year of two digits is enough.
const CENTURY: u8 = 0x32;
const TIME: [u8; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];

const STATUS_A: u8 = 0x0a;
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// 32.768 kHz time base.
const STATUS_A_RESET: u8 = 0x26;

const STATUS_B: u8 = 0x0b;
/// The time stands still, to be set.
const SET: u8 = 1 << 7;
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;

const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// The battery is good.
const VALID: u8 = 1 << 7;

/// The clock chip on its bus.
pub struct Rtc {
    clock: Clock,
    index: u8,
    /// What was written. Those of the time count only while SET is on.
    registers: [u8; REGISTERS],
    /// Seconds by which the guest set its time ahead of the clock.
    ahead: i64,
}

/// The registers, and how far the guest's time is ahead of the clock. The time itself goes on while saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub index: u8,
    pub registers: Vec<u8>,
    pub ahead: i64,
}

impl Rtc {
    /// A chip with a full battery, or as it was saved. Fails when `state` has not 128 registers.
    pub fn new(clock: Clock, state: Option<State>) -> Result<Self, StateError> {
        let Some(State { index, registers, ahead }) = state else {
            let mut registers = [0; REGISTERS];
            registers[usize::from(STATUS_A)] = STATUS_A_RESET;
            registers[usize::from(STATUS_B)] = HOURS_24;
            return Ok(Self { clock, index: 0, registers, ahead: 0 });
        };
        let registers = registers
            .try_into()
            .map_err(|r: Vec<u8>| StateError::new("rtc", "registers", r.len(), "128 bytes"))?;
        Ok(Self { clock, index: index & 0x7f, registers, ahead })
    }

    pub fn save(&self) -> State {
        State { index: self.index, registers: self.registers.to_vec(), ahead: self.ahead }
    }

    fn now(&self) -> i64 {
        (self.clock)().saturating_add(self.ahead)
    }

    fn stands_still(&self) -> bool {
        self.register(STATUS_B) & SET != 0
    }

    fn read_register(&self, register: u8) -> u8 {
        match register {
            STATUS_A => self.register(STATUS_A) & !UPDATE_IN_PROGRESS,
            STATUS_C => 0,
            STATUS_D => VALID,
            _ if TIME.contains(&register) && !self.stands_still() => {
                Time::from_unix(self.now()).register(register)
            }
            _ => self.register(register),
        }
    }

    fn write_register(&mut self, register: u8, value: u8) {
        match register {
            STATUS_B => self.write_status_b(value & !BINARY | HOURS_24),
            STATUS_C | STATUS_D => {}
            _ if TIME.contains(&register) && !self.stands_still() => {
                self.hold_time();
                self.set(register, value);
                self.release_time();
            }
            _ => self.set(register, value),
        }
    }

    fn write_status_b(&mut self, value: u8) {
        match (self.stands_still(), value & SET != 0) {
            (false, true) => self.hold_time(),
            (true, false) => self.release_time(),
            _ => {}
        }
        self.set(STATUS_B, value);
    }

    fn hold_time(&mut self) {
        let time = Time::from_unix(self.now());
        TIME.iter().for_each(|&register| self.set(register, time.register(register)));
    }

    /// The time goes on from what the registers say; a date that does not exist is not taken.
    fn release_time(&mut self) {
        if let Some(time) = self.held_time() {
            self.ahead = time.to_unix().saturating_sub((self.clock)());
        }
    }

    fn held_time(&self) -> Option<Time> {
        let field = |register| from_bcd(self.register(register));
        Some(Time {
            year: field(CENTURY)? * 100 + field(YEAR)?,
            month: field(MONTH).filter(|m| (1..=12).contains(m))?,
            day: field(DAY).filter(|d| (1..=31).contains(d))?,
            hours: field(HOURS).filter(|h| *h < 24)?,
            minutes: field(MINUTES).filter(|m| *m < 60)?,
            seconds: field(SECONDS).filter(|s| *s < 60)?,
            weekday: 1,
        })
    }

    fn register(&self, register: u8) -> u8 {
        self.registers.get(usize::from(register)).copied().unwrap_or_default()
    }

    fn set(&mut self, register: u8, value: u8) {
        if let Some(byte) = self.registers.get_mut(usize::from(register)) {
            *byte = value;
        }
    }
}

impl BusDevice for Rtc {
    /// The index port cannot be read.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (1, Some(byte)) = (offset, data.first_mut()) {
            *byte = self.read_register(self.index);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match (offset, data.first()) {
            // Bit 7 masks the NMI, which nothing here raises.
            (0, Some(value)) => self.index = value & 0x7f,
            (1, Some(&value)) => self.write_register(self.index, value),
            _ => {}
        }
        Effect::None
    }
}

/// A moment of the proleptic Gregorian calendar, from year 0 to 9999.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Time {
    year: i64,
    month: i64,
    day: i64,
    /// From 1, Sunday.
    weekday: i64,
    hours: i64,
    minutes: i64,
    seconds: i64,
}

const DAY_SECONDS: i64 = 24 * 60 * 60;
/// From 1 March of year 0, with which the calendar's 400-year cycle is counted here, to 1 January 1970.
const EPOCH_DAYS: i64 = 719_468;
const CYCLE_DAYS: i64 = 400 * 365 + 97;
/// 31 December 9999, the last day that the registers can show.
const LAST_DAY: i64 = 2_932_896;
/// 1 January 0.
const FIRST_DAY: i64 = -EPOCH_DAYS - 60;

impl Time {
    /// Dates beyond what the registers can show are cut to the nearest they can.
    fn from_unix(unix: i64) -> Self {
        let days = unix.div_euclid(DAY_SECONDS).clamp(FIRST_DAY, LAST_DAY);
        let second = unix.rem_euclid(DAY_SECONDS);
        // Years begin in March here, so that the leap day is the last of its year.
        let since = days + EPOCH_DAYS;
        let (cycle, in_cycle) = (since.div_euclid(CYCLE_DAYS), since.rem_euclid(CYCLE_DAYS));
        let in_cycle_years = (in_cycle - in_cycle / 1460 + in_cycle / 36524 - in_cycle / 146_096) / 365;
        let in_year = in_cycle - days_before(in_cycle_years);
        let march_month = (5 * in_year + 2) / 153;
        let month = (march_month + 2) % 12 + 1;
        Self {
            year: cycle * 400 + in_cycle_years + i64::from(month <= 2),
            month,
            day: in_year - (153 * march_month + 2) / 5 + 1,
            weekday: (days + 4).rem_euclid(7) + 1,
            hours: second / 3600,
            minutes: second / 60 % 60,
            seconds: second % 60,
        }
    }

    fn to_unix(self) -> i64 {
        let year = self.year - i64::from(self.month <= 2);
        let (cycle, in_cycle_years) = (year.div_euclid(400), year.rem_euclid(400));
        let march_month = (self.month + 9) % 12;
        let in_year = (153 * march_month + 2) / 5 + self.day - 1;
        let days = cycle * CYCLE_DAYS + days_before(in_cycle_years) + in_year - EPOCH_DAYS;
        days * DAY_SECONDS + self.hours * 3600 + self.minutes * 60 + self.seconds
    }

    fn register(&self, register: u8) -> u8 {
        to_bcd(match register {
            SECONDS => self.seconds,
            MINUTES => self.minutes,
            HOURS => self.hours,
            WEEKDAY => self.weekday,
            DAY => self.day,
            MONTH => self.month,
            YEAR => self.year % 100,
            CENTURY => self.year / 100,
            _ => 0,
        })
    }
}

/// Days in the first `years` of a 400-year cycle.
fn days_before(years: i64) -> i64 {
    365 * years + years / 4 - years / 100
}

fn to_bcd(value: i64) -> u8 {
    (value / 10 % 10 * 16 + value % 10) as u8
}

fn from_bcd(byte: u8) -> Option<i64> {
    let (tens, ones) = (byte >> 4, byte & 0xf);
    (tens < 10 && ones < 10).then(|| i64::from(tens * 10 + ones))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicI64, Ordering};

    use proptest::prelude::*;

    use super::*;

    /// Thursday 29 February 2024, 23:59:58 UTC.
    const LEAP_DAY: i64 = 1_709_251_198;

    fn chip(state: Option<State>) -> (Rtc, Arc<AtomicI64>) {
        let clock = Arc::new(AtomicI64::new(LEAP_DAY));
        let hand = clock.clone();
        (Rtc::new(Box::new(move || hand.load(Ordering::Relaxed)), state).unwrap(), clock)
    }

    fn read(chip: &mut Rtc, register: u8) -> u8 {
        let _ = chip.write(0, &[register]);
        let mut byte = [0];
        chip.read(1, &mut byte);
        byte[0]
    }

    fn write(chip: &mut Rtc, register: u8, value: u8) {
        let _ = chip.write(0, &[register]);
        let _ = chip.write(1, &[value]);
    }

    fn time(chip: &mut Rtc) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|r| read(chip, r))
    }

    #[test]
    fn the_registers_show_utc_in_bcd() {
        let (mut chip, clock) = chip(None);
        assert_eq!(time(&mut chip), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
        clock.fetch_add(2, Ordering::Relaxed);
        assert_eq!(time(&mut chip), [0x20, 0x24, 0x03, 0x01, 6, 0, 0, 0]);
    }

    #[test]
    fn linux_finds_a_clock_it_can_use_without_polling() {
        let (mut chip, _) = chip(None);
        assert_eq!(read(&mut chip, STATUS_A) & UPDATE_IN_PROGRESS, 0);
        assert_eq!(read(&mut chip, STATUS_B) & (BINARY | HOURS_24), HOURS_24);
        assert_eq!(read(&mut chip, STATUS_C), 0);
        assert_eq!(read(&mut chip, STATUS_D), VALID);
        write(&mut chip, STATUS_A, 0xff);
        assert_eq!(read(&mut chip, STATUS_A), 0x7f);
        for (written, read_back) in [(BINARY, HOURS_24), (0, HOURS_24), (0x70 | BINARY, 0x70 | HOURS_24)] {
            write(&mut chip, STATUS_B, written);
            assert_eq!(read(&mut chip, STATUS_B), read_back, "always BCD and 24 hours");
        }
    }

    #[test]
    fn the_guest_sets_the_time_and_it_goes_on_from_there() {
        let (mut chip, clock) = chip(None);
        write(&mut chip, STATUS_B, SET | HOURS_24);
        clock.fetch_add(100, Ordering::Relaxed);
        assert_eq!(read(&mut chip, SECONDS), 0x58, "it stands still meanwhile");
        for (register, value) in [(CENTURY, 0x19), (YEAR, 0x99), (MONTH, 0x12), (DAY, 0x31)] {
            write(&mut chip, register, value);
        }
        write(&mut chip, STATUS_B, HOURS_24);
        assert_eq!(time(&mut chip), [0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x58]);
        clock.fetch_add(2, Ordering::Relaxed);
        assert_eq!(time(&mut chip), [0x20, 0x00, 0x01, 0x01, 7, 0, 0, 0]);
    }

    #[test]
    fn a_date_that_does_not_exist_changes_nothing() {
        let (mut chip, _) = chip(None);
        let before = time(&mut chip);
        for (register, value) in [(MONTH, 0x13), (MONTH, 0), (DAY, 0), (HOURS, 0x24), (SECONDS, 0xff)] {
            write(&mut chip, register, value);
            assert_eq!(time(&mut chip), before, "{register:#x} {value:#x}");
        }
    }

    #[test]
    fn other_registers_hold_what_is_written() {
        let (mut chip, _) = chip(None);
        for register in [0x01, 0x03, 0x05, 0x0f, 0x7f] {
            write(&mut chip, register, 0x42);
            assert_eq!(read(&mut chip, register), 0x42);
        }
    }

    #[test]
    fn a_restored_clock_shows_the_new_time_and_keeps_what_the_guest_set() {
        let (mut first, _) = chip(None);
        write(&mut first, 0x0f, 0x0a);
        write(&mut first, HOURS, 0x20);
        let state = first.save();
        let (mut second, clock) = chip(Some(state.clone()));
        assert_eq!(second.save(), state);
        clock.fetch_add(60, Ordering::Relaxed);
        assert_eq!(time(&mut second)[5..], [0x21, 0x00, 0x58]);
        assert_eq!(read(&mut second, 0x0f), 0x0a);
    }

    #[test]
    fn a_state_of_another_length_is_refused() {
        let state = State { registers: vec![0; 127], ..chip(None).0.save() };
        assert!(Rtc::new(Box::new(|| 0), Some(state)).is_err());
    }

    #[test]
    fn the_ends_of_the_calendar_are_shown_as_such() {
        for (unix, year) in [(i64::MIN, [0, 0]), (i64::MAX, [0x99, 0x99])] {
            let mut chip = Rtc::new(Box::new(move || unix), None).unwrap();
            assert_eq!(time(&mut chip)[..2], year);
            write(&mut chip, SECONDS, 0);
        }
    }

    proptest! {
        #[test]
        fn time_goes_to_the_calendar_and_back(unix in FIRST_DAY * DAY_SECONDS..=LAST_DAY * DAY_SECONDS) {
            let time = Time::from_unix(unix);
            prop_assert!((1..=12).contains(&time.month) && (1..=31).contains(&time.day));
            prop_assert_eq!(time.to_unix(), unix);
        }

        #[test]
        fn any_access_is_survived(accesses in prop::collection::vec((0u64..4, any::<[u8; 8]>(), 0usize..=8), 0..64)) {
            let (mut chip, _) = chip(None);
            for (offset, mut data, width) in accesses {
                let _ = chip.write(offset, &data[..width]);
                chip.read(offset, &mut data[..width]);
            }
        }
    }
}
