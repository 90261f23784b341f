//! The device under a driver, well-behaved and not.

use std::sync::atomic::Ordering;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::virtio::testing::{self, Buffer, Driver, EVENT_IDX, Lent, Slot, Trouble};

/// Far up, so that an address which lost a half lies nowhere.
const START: u64 = 0x12_0000_0000;
const BLOCK: u64 = 0x4000;
const SLOT: u64 = 4 * BLOCK;
const SLOTS: u64 = 5;
const SIZE: u64 = SLOTS * SLOT;
const FEATURES: u64 = F_UNPLUGGED_INACCESSIBLE | EVENT_IDX;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

struct Rig {
    slot: Slot<Mem>,
    driver: Driver,
    memory: Memory,
    trouble: Arc<Trouble>,
    room: Buffer,
    request: Buffer,
}

fn device(memory: &Memory, state: Option<State>) -> Result<(Mem, Arc<Trouble>), NewError> {
    let region = START..START + SIZE;
    let lent = Lent::new(memory, &region, SLOT);
    let trouble = lent.trouble.clone();
    let (memory, backing) = (memory.clone(), Box::new(lent));
    let config = Config { region, slot_size: SLOT, block_size: BLOCK, page: 0x1000, memory, backing };
    Ok((Mem::new(config, state)?, trouble))
}

/// A running device that wants so many blocks plugged.
fn rig(requested: u64) -> Rig {
    let memory = testing::ram(1 << 20);
    let mut driver = Driver::new(&memory, 0x1000, QUEUE_SIZE, EVENT_IDX);
    let (request, room) = (driver.data(&[0; REQUEST_BYTES]), driver.room(ANSWER_BYTES as u32));
    let (device, trouble) = device(&memory, None).unwrap();
    let mut slot = Slot::new(device, &memory);
    slot.device.set_requested(requested * BLOCK);
    slot.start(vec![driver.queue(0)], FEATURES);
    let mut rig = Rig { slot, driver, memory, trouble, room, request };
    rig.slot.run(10);
    rig
}

fn bytes(kind: u16, address: u64, blocks: u16) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0xee; REQUEST_BYTES];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

impl Rig {
    /// The type of the answer, and the state in it.
    fn ask_at(&mut self, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
        let request = bytes(kind, address, blocks);
        self.memory.memory().write_slice(&request, GuestAddress(self.request.address)).unwrap();
        let head = self.driver.add(&[self.request, self.room]);
        self.slot.run(10);
        let used = self.driver.reap().expect("an answer");
        assert_eq!((used.head, used.written), (head, ANSWER_BYTES as u32));
        assert!(!self.slot.calls.broken());
        let answer = self.driver.read(self.room);
        assert_eq!(answer[2..8], [0; 6]);
        (u16::from_le_bytes([answer[0], answer[1]]), u16::from_le_bytes([answer[8], answer[9]]))
    }

    /// Blocks by their number.
    fn ask(&mut self, kind: u16, first: u64, blocks: u16) -> u16 {
        self.ask_at(kind, START + first * BLOCK, blocks).0
    }

    #[track_caller]
    fn accept(&mut self, kind: u16, first: u64, blocks: u16) {
        assert_eq!(self.ask(kind, first, blocks), ACK);
    }

    fn mix(&mut self, first: u64, blocks: u16) -> u16 {
        let (answer, state) = self.ask_at(STATE, START + first * BLOCK, blocks);
        assert_eq!(answer, ACK);
        state
    }

    fn plugged(&self) -> u64 {
        self.slot.device.plugged() / BLOCK
    }

    /// Which slots are in: what the guest and its devices reach.
    fn slots(&self) -> Vec<u64> {
        let memory = self.memory.memory();
        let is_in = |slot: &u64| memory.address_in_range(GuestAddress(START + slot * SLOT));
        (0..SLOTS).filter(is_in).collect()
    }

    fn fill(&self, first: u64, blocks: u64) {
        let bytes = vec![0x11; (blocks * BLOCK) as usize];
        self.memory.memory().write_slice(&bytes, GuestAddress(START + first * BLOCK)).unwrap();
    }

    fn zeros(&self, first: u64, blocks: u64) -> u64 {
        let mut bytes = vec![1; (blocks * BLOCK) as usize];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(START + first * BLOCK)).unwrap();
        bytes.iter().filter(|byte| **byte == 0).count() as u64
    }

    fn config(&self, offset: u64) -> u64 {
        let mut bytes = [0xee; 8];
        self.slot.device.config(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[test]
fn the_driver_reads_where_the_region_lies_and_how_much_is_wanted_and_changes_nothing() {
    let mut rig = rig(3);
    rig.slot.device.write_config(0, &[0xff; 56]);
    let expected = [BLOCK, 0, START, SIZE, SIZE, 0, 3 * BLOCK, 0];
    assert_eq!([0, 8, 16, 24, 32, 40, 48, 56].map(|offset| rig.config(offset)), expected);
    rig.accept(PLUG, 0, 2);
    assert_eq!(rig.config(40), 2 * BLOCK);
    // At once, and whatever is plugged: it is for the driver to come down.
    let before = rig.slot.calls.config.load(Ordering::SeqCst);
    rig.slot.device.set_requested(BLOCK);
    assert_eq!(rig.slot.calls.config.load(Ordering::SeqCst), before + 1);
    assert_eq!((rig.config(40), rig.config(48)), (2 * BLOCK, BLOCK));
    assert_eq!((rig.slot.device.plugged(), rig.slot.device.requested()), (2 * BLOCK, BLOCK));
}

#[test]
fn a_driver_that_may_touch_what_is_not_plugged_is_refused() {
    let memory = testing::ram(1 << 20);
    let driver = Driver::new(&memory, 0x1000, QUEUE_SIZE, 0);
    let mut device = device(&memory, None).unwrap().0;
    let interrupt = Arc::<testing::Calls>::default();
    let active = Active { memory, queues: vec![driver.queue(0)], features: 0, interrupt };
    let error = device.start(active).unwrap_err().to_string();
    assert!(error.contains("VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE"), "{error}");
    assert!(device.stop().is_empty());
}

#[test]
fn blocks_are_plugged_and_unplugged_and_a_slot_is_in_while_one_of_its_blocks_is() {
    let mut rig = rig(20);
    assert!(rig.slots().is_empty());
    rig.accept(PLUG, 3, 2);
    assert_eq!((rig.plugged(), rig.slots()), (2, vec![0, 1]));
    rig.accept(PLUG, 8, 12);
    assert_eq!((rig.plugged(), rig.slots()), (14, vec![0, 1, 2, 3, 4]));
    assert_eq!([rig.mix(3, 2), rig.mix(0, 3), rig.mix(5, 3), rig.mix(0, 20)], [0, 1, 1, 2]);
    rig.accept(UNPLUG, 4, 1);
    assert_eq!((rig.plugged(), rig.slots()), (13, vec![0, 2, 3, 4]));
    rig.accept(UNPLUG, 9, 11);
    assert_eq!((rig.plugged(), rig.slots()), (2, vec![0, 2]));
    rig.accept(UNPLUG_ALL, 77, 0);
    assert_eq!((rig.plugged(), rig.slots()), (0, vec![]));
    assert_eq!(rig.mix(0, 20), 1);
    rig.accept(UNPLUG_ALL, 0, 0);
    let counters = rig.slot.device.counters();
    let counts = |requests: &Requests| (load(&requests.count), load(&requests.fails));
    assert_eq!((counts(&counters.plug), load(&counters.plug_bytes)), ((2, 0), 14 * BLOCK));
    assert_eq!((counts(&counters.unplug), load(&counters.unplug_bytes)), ((2, 0), 14 * BLOCK));
    assert_eq!((counts(&counters.unplug_all), counts(&counters.state)), ((2, 0), (5, 0)));
    assert_eq!((load(&counters.unplug_discard_fails), load(&counters.queue_event_fails)), (0, 0));
}

#[test]
fn what_is_unplugged_is_given_up_at_once_and_what_is_plugged_is_zeros() {
    let mut rig = rig(20);
    rig.accept(PLUG, 0, 20);
    rig.fill(0, 20);
    rig.accept(UNPLUG, 1, 6);
    assert_eq!((rig.zeros(1, 6), rig.zeros(0, 20)), (6 * BLOCK, 6 * BLOCK));
    // A guest that breaks its word reaches these, for others of their slots are plugged; what it leaves is gone.
    rig.fill(1, 6);
    rig.accept(PLUG, 2, 3);
    assert_eq!(rig.zeros(0, 20), 3 * BLOCK);
    rig.fill(2, 3);
    rig.accept(UNPLUG, 2, 3);
    rig.accept(UNPLUG, 0, 1);
    assert_eq!(rig.slots(), [1, 2, 3, 4]);
    rig.accept(PLUG, 0, 1);
    assert_eq!(rig.zeros(0, 4), 4 * BLOCK, "what was left in the slot is gone too");
    // And the rest was never touched.
    assert_eq!(rig.zeros(7, 13), 0);
}

#[test]
fn no_more_is_plugged_than_is_wanted_at_the_moment() {
    let mut rig = rig(3);
    assert_eq!(rig.ask(PLUG, 0, 4), NACK);
    rig.accept(PLUG, 0, 2);
    assert_eq!(rig.ask(PLUG, 2, 2), NACK);
    rig.accept(PLUG, 2, 1);
    assert_eq!(rig.ask(PLUG, 3, 1), NACK);
    rig.slot.device.set_requested(0);
    rig.accept(UNPLUG, 0, 1);
    assert_eq!(rig.ask(PLUG, 0, 1), NACK);
    assert_eq!((rig.plugged(), rig.slots()), (2, vec![0]));
    assert_eq!(load(&rig.slot.device.counters().plug.fails), 4);
}

#[test]
fn requests_for_what_is_no_block_or_in_the_other_state_are_errors_and_change_nothing() {
    let mut rig = rig(20);
    rig.accept(PLUG, 6, 2);
    rig.fill(6, 2);
    let at = |block: u64| START + block * BLOCK;
    for (address, blocks) in [
        (at(0), 0),
        (at(0), 21),
        (at(0), u16::MAX),
        (at(19), 2),
        (at(20), 1),
        (at(0) + 1, 1),
        (at(0) + 0x1000, 1),
        (at(0) - BLOCK, 1),
        (at(0) - BLOCK, 2),
        (0, 1),
        (0x1000, 1),
        (START >> 32, 1),
        (at(1 << 18), 1),
        (u64::MAX, 1),
        (u64::MAX - BLOCK + 1, 1),
        (u64::MAX - BLOCK + 1, u16::MAX),
        (1 << 63, u16::MAX),
    ] {
        for kind in [PLUG, UNPLUG, STATE] {
            assert_eq!(rig.ask_at(kind, address, blocks), (ERROR, 0), "{kind} {address:#x} {blocks}");
        }
    }
    for (kind, first, blocks) in [(PLUG, 6, 1), (PLUG, 5, 2), (PLUG, 0, 20), (UNPLUG, 5, 2), (UNPLUG, 7, 2)] {
        assert_eq!(rig.ask(kind, first, blocks), ERROR, "{kind} {first} {blocks}");
    }
    for kind in [4, 5, 0x100, 0x103, u16::MAX] {
        assert_eq!(rig.ask(kind, 6, 1), ERROR, "{kind}");
    }
    assert_eq!((rig.plugged(), rig.slots(), rig.zeros(6, 2)), (2, vec![1], 0));
    assert_eq!(load(&rig.slot.device.counters().queue_event_fails), 5);
}

#[test]
fn what_the_host_cannot_do_now_is_answered_with_busy_and_leaves_nothing_behind() {
    let mut rig = rig(20);
    rig.accept(PLUG, 5, 1);
    rig.fill(5, 1);
    let trouble = rig.trouble.clone();
    for what in [&trouble.bring_in, &trouble.reserve] {
        what.store(true, Ordering::SeqCst);
        assert_eq!(rig.ask(PLUG, 0, 5), BUSY);
        assert_eq!((rig.plugged(), rig.slots(), rig.mix(0, 5)), (1, vec![1], 1));
        what.store(false, Ordering::SeqCst);
    }
    assert_eq!(rig.zeros(5, 1), 0, "what was plugged is as it was");
    rig.accept(PLUG, 0, 5);
    // A slot that cannot be taken out stays, but what was in the blocks goes.
    rig.fill(0, 4);
    trouble.take_out.store(true, Ordering::SeqCst);
    rig.accept(UNPLUG, 0, 4);
    assert_eq!((rig.plugged(), rig.slots(), rig.zeros(0, 4)), (2, vec![0, 1], 4 * BLOCK));
    trouble.take_out.store(false, Ordering::SeqCst);
    rig.accept(PLUG, 0, 1);
    rig.accept(UNPLUG, 0, 1);
    assert_eq!(rig.slots(), [1]);
}

#[test]
fn unplugging_all_of_much_memory_takes_several_turns_and_has_one_answer() {
    const SLOT: u64 = MAX_TURN_BYTES;
    let memory = testing::ram(1 << 20);
    let region = START..START + 4 * SLOT;
    let backing = Box::new(Lent::new(&memory, &region, SLOT));
    let config = Config {
        region,
        slot_size: SLOT,
        block_size: SLOT / 2,
        page: 0x1000,
        memory: memory.clone(),
        backing,
    };
    let mut driver = Driver::new(&memory, 0x1000, QUEUE_SIZE, EVENT_IDX);
    let mut slot = Slot::new(Mem::new(config, None).unwrap(), &memory);
    slot.device.set_requested(4 * SLOT);
    slot.start(vec![driver.queue(0)], FEATURES);
    slot.run(10);
    let mut ask = |slot: &mut Slot<Mem>, kind, turns| {
        let (request, room) = (driver.data(&bytes(kind, START, 8)), driver.room(ANSWER_BYTES as u32));
        driver.add(&[request, room]);
        slot.run(turns);
        driver.reap().map(|_| driver.read(room)[0])
    };
    assert_eq!(ask(&mut slot, PLUG, 1), Some(0));
    slot.run(10);
    assert_eq!(ask(&mut slot, UNPLUG_ALL, 1), None);
    assert_eq!(slot.device.plugged(), 3 * SLOT);
    // Stopped in the middle, it goes on when it is started again.
    assert_eq!(slot.run(10), 3);
    assert_eq!(slot.device.plugged(), 0);
    assert_eq!(load(&slot.device.counters().unplug_all.count), 1);
}

#[test]
fn another_driver_finds_what_was_plugged_and_may_unplug_it_all() {
    let mut rig = rig(20);
    rig.accept(PLUG, 0, 6);
    rig.fill(0, 6);
    rig.slot.stop();
    rig.slot.device.reset();
    assert_eq!((rig.plugged(), rig.slots(), rig.zeros(0, 6)), (6, vec![0, 1], 0));
    rig.driver = Driver::new(&rig.memory, 0x1000, QUEUE_SIZE, EVENT_IDX);
    rig.slot.start(vec![rig.driver.queue(0)], FEATURES);
    assert_eq!(rig.config(40), 6 * BLOCK);
    assert_eq!((rig.mix(0, 6), rig.mix(6, 14)), (0, 1));
    rig.accept(UNPLUG_ALL, 0, 0);
    assert_eq!((rig.plugged(), rig.slots()), (0, vec![]));
}

#[test]
fn a_size_that_is_wanted_while_nothing_runs_is_told_when_it_runs() {
    let mut rig = rig(3);
    let told = |rig: &Rig| rig.slot.calls.config.load(Ordering::SeqCst);
    let before = told(&rig);
    let queues = rig.slot.stop();
    rig.slot.device.set_requested(5 * BLOCK);
    assert_eq!(told(&rig), before);
    rig.slot.start(queues, FEATURES);
    assert_eq!((told(&rig), rig.config(48)), (before + 1, 5 * BLOCK));
    let queues = rig.slot.stop();
    rig.slot.start(queues, FEATURES);
    assert_eq!(told(&rig), before + 1, "once");
}

#[test]
fn a_device_that_was_saved_has_its_slots_again() {
    let mut rig = rig(20);
    rig.accept(PLUG, 3, 2);
    rig.accept(PLUG, 19, 1);
    rig.slot.stop();
    rig.slot.device.set_requested(7 * BLOCK);
    let DeviceState::Memory(state) = rig.slot.device.save() else { panic!() };
    let memory = testing::ram(1 << 20);
    let (restored, _) = device(&memory, Some(state.clone())).unwrap();
    assert_eq!(restored.save(), DeviceState::Memory(state.clone()));
    assert_eq!((restored.plugged(), restored.requested()), (3 * BLOCK, 7 * BLOCK));
    let reaches = |slot| memory.memory().address_in_range(GuestAddress(START + slot * SLOT));
    assert_eq!([0, 1, 2, 3, 4].map(reaches), [true, true, false, false, true]);

    let refused = |state| device(&testing::ram(0x1000), Some(state)).err().expect("refused").to_string();
    let changed = |change: fn(&mut State)| {
        let mut state = state.clone();
        change(&mut state);
        refused(state)
    };
    assert!(changed(|state| state.requested += 1).contains("requested"));
    assert!(changed(|state| state.requested = SIZE + BLOCK).contains("requested"));
    assert!(changed(|state| state.plugged.push(0)).contains("plugged"));
    assert!(changed(|state| state.plugged[0] |= 1 << 20).contains("plugged"));
    assert!(changed(|state| state.plugged.clear()).contains("plugged"));
}

#[test]
fn a_device_of_too_many_blocks_or_none_to_a_slot_is_not_built() {
    for (size, slot_size, block_size) in [(MAX_BLOCKS + 1, 16, 1), (16, 0, 1), (16, 1, 0), (16, 1, 2)] {
        let memory = testing::ram(0x1000);
        let backing = Box::new(Lent::new(&memory, &(0..0), 1));
        let config = Config { region: 0..size, slot_size, block_size, page: 1, memory, backing };
        assert!(Mem::new(config, None).is_err(), "{size} {slot_size} {block_size}");
    }
}

#[test]
fn a_request_that_is_cut_short_is_an_error_and_one_without_room_gets_no_answer() {
    let mut rig = rig(20);
    let (short, whole, room) = (rig.driver.data(&[0; 23]), rig.driver.data(&bytes(PLUG, START, 1)), rig.room);
    let give = |rig: &mut Rig, buffers: &[Buffer]| {
        let head = rig.driver.add(buffers);
        rig.slot.run(10);
        let used = rig.driver.reap().expect("it comes back");
        assert_eq!(used.head, head);
        (used.written, rig.driver.read(room)[0])
    };
    assert_eq!(give(&mut rig, &[short, room]), (10, 3));
    assert_eq!(give(&mut rig, &[room]), (10, 3));
    assert_eq!(give(&mut rig, &[whole, Buffer { len: 9, ..room }]).0, 0);
    assert_eq!(rig.plugged(), 1, "what was asked for is done all the same");
    assert_eq!(load(&rig.slot.device.counters().queue_event_fails), 3);
    assert!(!rig.slot.calls.broken());
}

#[test]
fn an_answer_that_was_to_go_where_memory_is_gone_breaks_the_queue_and_writes_nowhere() {
    let mut rig = rig(20);
    rig.accept(PLUG, 0, 1);
    let request = rig.driver.data(&bytes(UNPLUG, START, 1));
    let gone = Buffer { address: START + 0x100, len: ANSWER_BYTES as u32, writable: true };
    rig.driver.add(&[request, gone]);
    rig.slot.run(10);
    assert!(rig.slot.calls.broken());
    assert_eq!((rig.plugged(), rig.slots()), (0, vec![]));
}

#[test]
fn rings_in_memory_that_is_taken_away_break_the_queue() {
    let mut rig = rig(20);
    rig.accept(PLUG, 0, 4);
    rig.slot.stop();
    let mut driver = Driver::new(&rig.memory, START, QUEUE_SIZE, EVENT_IDX);
    rig.slot.start(vec![driver.queue(0)], FEATURES);
    rig.slot.run(10);
    let (request, room) = (driver.data(&bytes(UNPLUG_ALL, 0, 0)), driver.room(ANSWER_BYTES as u32));
    driver.add(&[request, room]);
    rig.slot.run(10);
    assert!(rig.slot.calls.broken());
    assert_eq!((rig.plugged(), rig.slots()), (0, vec![]));
}

#[test]
fn a_driver_that_breaks_the_rules_is_told_to_reset_and_costs_nothing_more() {
    let mut rig = rig(20);
    rig.driver.set_avail_index(500);
    rig.driver.kick.write(1).unwrap();
    assert!(rig.slot.run(10) < 10);
    assert!(rig.slot.calls.broken());
    assert_eq!(rig.slot.stop().len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(50))]

    /// Whatever is asked for, what is plugged is what was acknowledged, and a slot is in if and only if it holds a block.
    #[test]
    fn the_device_and_its_driver_agree_on_what_is_plugged(
        requests in prop::collection::vec((0u16..5, 0u64..22, 0u16..9, 0u64..30), 1..60),
    ) {
        let mut rig = rig(SIZE / BLOCK);
        let mut model = [false; (SIZE / BLOCK) as usize];
        for (kind, first, blocks, wanted) in requests {
            rig.slot.device.set_requested(wanted.min(SIZE / BLOCK) * BLOCK);
            let answer = rig.ask(kind, first, blocks);
            let named = first as usize..first as usize + usize::from(blocks);
            match (kind, answer) {
                (PLUG, ACK) => {
                    prop_assert!(model[named.clone()].iter().all(|plugged| !plugged));
                    model[named].fill(true);
                    prop_assert!(model.iter().filter(|plugged| **plugged).count() as u64 <= wanted);
                }
                (UNPLUG, ACK) => {
                    prop_assert!(model[named.clone()].iter().all(|plugged| *plugged));
                    model[named].fill(false);
                }
                (UNPLUG_ALL, _) => model.fill(false),
                _ => {}
            }
            let plugged = model.iter().filter(|plugged| **plugged).count() as u64;
            prop_assert_eq!(rig.plugged(), plugged);
            let blocks = (SLOT / BLOCK) as usize;
            let slots: Vec<u64> =
                (0..SLOTS).zip(model.chunks(blocks)).filter(|(_, slot)| slot.contains(&true)).map(|(slot, _)| slot).collect();
            prop_assert_eq!(rig.slots(), slots);
        }
    }
}
