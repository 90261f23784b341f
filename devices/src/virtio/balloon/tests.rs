//! The device under a driver, well-behaved and not.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::*;
use crate::memory::Memory;
use crate::virtio::testing::{self, Buffer, Driver, EVENT_IDX, Slot};

const MEMORY: usize = 8 << 20;
/// The rings and the requests lie below.
const FREE: u64 = 1 << 20;
/// The device's RAM ends here, and guest memory does not: what is above is as a file of persistent memory.
const RAM_END: u64 = 6 << 20;

const ALL: u64 = F_STATS_VQ | F_DEFLATE_ON_OOM | F_FREE_PAGE_HINT | F_PAGE_POISON | F_PAGE_REPORTING;

struct Rig {
    slot: Slot<Balloon>,
    drivers: Vec<Driver>,
    memory: Memory,
}

fn config() -> Config {
    Config {
        target_pages: 256,
        deflate_on_oom: true,
        statistics_interval: Some(Duration::from_millis(5)),
        hinting: true,
        reporting: true,
        ram: Ram { regions: std::iter::once(0..RAM_END).collect(), page: PAGE },
    }
}

/// A running device whose driver agreed on these features. Free memory is full of ones.
fn rig(config: Config, features: u64) -> Rig {
    let memory = testing::ram(MEMORY);
    memory.memory().write_slice(&vec![1; MEMORY - FREE as usize], GuestAddress(FREE)).unwrap();
    let mut slot = Slot::new(Balloon::new(config, None).unwrap(), &memory);
    let queues = slot.device.identity().queue_sizes.len() as u64;
    let base = |queue| 0x1000 + 0x8000 * queue;
    let drivers: Vec<_> =
        (0..queues).map(|queue| Driver::new(&memory, base(queue), QUEUE_SIZE, EVENT_IDX)).collect();
    slot.start(
        (0..).zip(&drivers).map(|(index, driver)| driver.queue(index)).collect(),
        features | EVENT_IDX,
    );
    let mut rig = Rig { slot, drivers, memory };
    rig.run();
    rig
}

impl Rig {
    fn run(&mut self) {
        self.slot.run(20);
    }

    /// Makes a request of these buffers, and expects that it comes back.
    fn ask(&mut self, queue: usize, buffers: &[Buffer]) {
        let head = self.drivers[queue].add(buffers);
        self.run();
        let used = self.drivers[queue].reap().map(|used| (used.head, used.written));
        assert_eq!(used, Some((head, 0)));
        assert!(!self.slot.calls.broken());
    }

    fn inflate(&mut self, pages: &[u32]) {
        let bytes: Vec<_> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        let request = self.drivers[0].data(&bytes);
        self.ask(0, &[request]);
    }

    fn command(&mut self, command: u32) {
        let request = self.drivers[HINTING].data(&command.to_le_bytes());
        self.ask(HINTING, &[request]);
    }

    /// The numbers of the pages that are zeros, from the beginning of free memory.
    fn given_back(&self) -> Vec<u32> {
        let mut bytes = vec![0; MEMORY - FREE as usize];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(FREE)).unwrap();
        let pages = (FREE_PAGE..).zip(bytes.chunks(PAGE as usize));
        pages.filter(|(_, page)| page.iter().all(|byte| *byte == 0)).map(|(number, _)| number).collect()
    }

    fn field(&self, place: u64) -> u32 {
        let mut field = [0; 4];
        self.slot.device.config(place, &mut field);
        u32::from_le_bytes(field)
    }

    fn configs(&self) -> usize {
        self.slot.calls.config.swap(0, Ordering::SeqCst)
    }

    fn counter(&self, counter: fn(&Counters) -> &AtomicU64) -> u64 {
        counter(&self.slot.device.counters()).load(Ordering::Relaxed)
    }
}

const FREE_PAGE: u32 = (FREE / PAGE) as u32;
const RAM_END_PAGE: u32 = (RAM_END / PAGE) as u32;
const HINTING: usize = 3;
const REPORTING: usize = 4;
const COMMAND: u64 = 8;

fn room(address: u64, len: u32) -> Buffer {
    Buffer { address, len, writable: true }
}

#[test]
fn pages_that_are_named_go_back_to_the_host_and_no_others() {
    let mut rig = rig(config(), ALL);
    rig.inflate(&[FREE_PAGE + 9, FREE_PAGE + 3, FREE_PAGE + 4, FREE_PAGE + 5]);
    assert_eq!(rig.given_back(), [3, 4, 5, 9].map(|page| FREE_PAGE + page));
    let request = rig.drivers[1].data(&(FREE_PAGE + 3).to_le_bytes());
    rig.ask(1, &[request]);
    assert_eq!(rig.counter(|c| &c.inflate_count), 1);
    assert_eq!(rig.counter(|c| &c.deflate_count), 1);
    assert_eq!(rig.counter(|c| &c.event_fails), 0);
}

#[test]
fn pages_that_are_no_ram_are_passed_over_and_counted() {
    let mut rig = rig(config(), ALL);
    rig.inflate(&[RAM_END_PAGE - 1, RAM_END_PAGE, RAM_END_PAGE + 1, (MEMORY as u64 / PAGE) as u32, u32::MAX]);
    assert_eq!(rig.given_back(), [RAM_END_PAGE - 1]);
    assert_eq!(rig.counter(|c| &c.event_fails), 4);
}

#[test]
fn of_a_request_without_end_only_the_beginning_is_read() {
    let mut rig = rig(config(), ALL);
    // Free memory, again and again, as a list of pages: ones, which are page 0x01010101, and no RAM.
    let ones = Buffer { address: FREE, len: 1 << 20, writable: false };
    rig.ask(0, &[ones; 200]);
    assert_eq!(rig.counter(|c| &c.event_fails), 200 << 18);
    rig.inflate(&vec![FREE_PAGE; MAX_REQUEST_PAGES]);
    assert_eq!(rig.given_back(), [FREE_PAGE]);
    let pages: Vec<_> = vec![FREE_PAGE; MAX_REQUEST_PAGES].into_iter().chain([FREE_PAGE + 1]).collect();
    rig.inflate(&pages);
    assert_eq!(rig.given_back(), [FREE_PAGE]);
}

#[test]
fn requests_of_nothing_or_of_half_a_page_number_come_back() {
    let mut rig = rig(config(), ALL);
    let (half, writable) = (rig.drivers[0].data(&[0, 2, 0]), room(FREE, 4096));
    rig.ask(0, &[half]);
    rig.ask(0, &[writable]);
    rig.ask(1, &[writable]);
    assert_eq!(rig.given_back(), [0u32; 0]);
}

#[test]
fn the_driver_is_told_of_another_size_and_says_what_it_has() {
    let mut rig = rig(config(), ALL);
    assert_eq!((rig.field(0), rig.configs()), (256, 0));
    rig.slot.device.set_target(512);
    assert_eq!((rig.field(0), rig.configs()), (512, 1));
    rig.slot.device.write_config(ACTUAL, &300u32.to_le_bytes());
    assert_eq!(rig.slot.device.pages(), (512, 300));
    // A byte at a time, and what is not the driver's.
    rig.slot.device.write_config(ACTUAL + 1, &[0]);
    rig.slot.device.write_config(0, &[0xff; 4]);
    rig.slot.device.write_config(u64::MAX, &[0xff; 4]);
    rig.slot.device.write_config(16, &[0xff; 4]);
    assert_eq!(rig.slot.device.pages(), (512, 300 & 0xff));
    rig.slot.stop();
    rig.slot.device.reset();
    assert_eq!(rig.slot.device.pages(), (512, 0), "the size that is wanted is another driver's too");
}

#[test]
fn a_change_while_the_device_stands_is_told_when_it_runs() {
    let mut rig = rig(config(), ALL);
    let queues = rig.slot.stop();
    rig.slot.device.set_target(0);
    assert_eq!(rig.configs(), 0);
    rig.slot.start(queues, ALL | EVENT_IDX);
    assert_eq!(rig.configs(), 1);
}

#[test]
fn a_balloon_offers_what_it_was_told_to_and_no_more() {
    let plain = || Config {
        deflate_on_oom: false,
        statistics_interval: None,
        hinting: false,
        reporting: false,
        ..config()
    };
    let of = |config: Config| Balloon::new(config, None).unwrap().identity();
    let rings = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
    let offers = |config: Config| (of(config).features & !rings, ());
    assert_eq!(offers(plain()).0, 0);
    assert_eq!(offers(Config { deflate_on_oom: true, ..plain() }).0, F_DEFLATE_ON_OOM);
    assert_eq!(offers(config()).0, ALL);
    assert_eq!(of(plain()).queue_sizes.len(), 2);
    assert_eq!(of(Config { reporting: true, ..plain() }).queue_sizes.len(), 3);
    assert_eq!(of(config()).queue_sizes.len(), 5);
}

#[test]
fn a_queue_that_the_driver_does_not_want_leaves_its_number_to_the_next() {
    let mut rig = rig(config(), F_PAGE_REPORTING);
    rig.ask(2, &[room(FREE, 4096)]);
    assert_eq!(rig.given_back(), [FREE_PAGE]);
    // Those that are left over are nobody's.
    rig.drivers[3].add(&[room(FREE + 4096, 4096)]);
    rig.drivers[4].add(&[room(FREE + 4096, 4096)]);
    rig.slot.run(5);
    assert_eq!(rig.given_back(), [FREE_PAGE]);
}

#[test]
fn pages_that_are_reported_go_back_to_the_host() {
    let mut rig = rig(config(), ALL);
    rig.ask(REPORTING, &[room(FREE, 8192), room(FREE + 0x10000, 4096)]);
    assert_eq!(rig.given_back(), [0, 1, 16].map(|page| FREE_PAGE + page));
    assert_eq!(rig.counter(|c| &c.free_page_report_count), 2);
    assert_eq!(rig.counter(|c| &c.free_page_report_freed), 3 * PAGE);
    // What is no RAM, no whole page or the device's to read stays.
    rig.ask(REPORTING, &[room(RAM_END - 4096, 8192), room(RAM_END, 4096), room(FREE + 0x5001, 4096)]);
    rig.ask(REPORTING, &[Buffer { writable: false, ..room(FREE + 0x5000, 4096) }]);
    assert_eq!(rig.given_back().len(), 3);
    assert_eq!(rig.counter(|c| &c.free_page_report_fails), 3);
}

#[test]
fn of_a_report_of_more_than_a_guest_has_only_the_beginning_is_given_up() {
    let mut rig = rig(config(), ALL);
    let half = MEMORY as u32 / 2;
    let times = MAX_REQUEST_BYTES / u64::from(half) + 10;
    rig.ask(REPORTING, &vec![room(FREE, half); times as usize]);
    assert_eq!(rig.counter(|c| &c.free_page_report_freed), MAX_REQUEST_BYTES);
    assert_eq!(rig.counter(|c| &c.free_page_report_fails), 10);
}

#[test]
fn a_guest_whose_free_pages_must_not_be_zeros_keeps_them() {
    let mut rig = rig(config(), ALL);
    rig.slot.device.write_config(POISON, &[0xaa; 4]);
    rig.ask(REPORTING, &[room(FREE, 4096)]);
    assert_eq!(rig.given_back(), [0u32; 0]);
    assert_eq!(rig.counter(|c| &c.free_page_report_fails), 1);
}

#[test]
fn a_run_of_hints_goes_from_its_number_to_its_acknowledged_end() {
    let mut rig = rig(config(), ALL);
    assert!(rig.slot.device.start_hinting(true));
    assert_eq!((rig.configs(), rig.field(COMMAND)), (1, 2));
    rig.ask(HINTING, &[room(FREE, 4096)]);
    assert_eq!(rig.given_back(), [0u32; 0], "nobody has said which run this is");
    rig.command(2);
    rig.ask(HINTING, &[room(FREE, 4096)]);
    rig.ask(HINTING, &[room(RAM_END, 4096)]);
    assert_eq!(rig.slot.device.hinting(), HintingStatus { host: 2, guest: Some(2) });
    assert_eq!(rig.configs(), 0);
    rig.command(0);
    assert_eq!(rig.slot.device.hinting(), HintingStatus { host: 1, guest: Some(0) });
    assert_eq!((rig.configs(), rig.field(COMMAND)), (1, 1));
    rig.ask(HINTING, &[room(FREE + 4096, 4096)]);
    assert_eq!(rig.given_back(), [FREE_PAGE]);
    assert_eq!(rig.counter(|c| &c.free_page_hint_freed), PAGE);
    assert_eq!(rig.counter(|c| &c.free_page_hint_count), 2);
    assert_eq!(rig.counter(|c| &c.free_page_hint_fails), 1);
}

#[test]
fn hints_of_a_run_that_was_stopped_come_too_late() {
    let mut rig = rig(config(), ALL);
    rig.slot.device.start_hinting(false);
    rig.command(2);
    assert!(rig.slot.device.stop_hinting());
    assert_eq!((rig.configs(), rig.field(COMMAND)), (2, 1));
    rig.ask(HINTING, &[room(FREE, 4096)]);
    let short = rig.drivers[HINTING].data(&[2, 0]);
    rig.ask(HINTING, &[short]);
    assert_eq!(rig.given_back(), [0u32; 0]);
    assert_eq!(rig.counter(|c| &c.free_page_hint_fails), 1);
}

#[test]
fn nobody_hints_who_has_not_agreed_to() {
    let mut rig = rig(config(), ALL & !F_FREE_PAGE_HINT);
    assert!(!rig.slot.device.start_hinting(true) && !rig.slot.device.stop_hinting());
    assert_eq!(rig.configs(), 0);
}

fn numbers(numbers: &[(u16, u64)]) -> Vec<u8> {
    numbers.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect()
}

const STATISTICS: usize = 2;

#[test]
fn the_guest_is_asked_for_its_numbers_again_and_again() {
    let mut rig = rig(config(), ALL);
    for round in 1..4 {
        let buffer = rig.drivers[STATISTICS].data(&numbers(&[(4, round), (5, 100), (15, 7), (99, 1)]));
        rig.drivers[STATISTICS].add(&[buffer]);
        let drivers = &mut rig.drivers;
        rig.slot.run_until(|_| drivers[STATISTICS].reap().is_some());
        let statistics = rig.slot.device.statistics();
        assert_eq!(statistics.get(Statistics::FREE), Some(round));
        assert_eq!(statistics.get(Statistics::TOTAL), Some(100));
        assert_eq!(statistics.get(Statistics::DIRECT_RECLAIM), Some(7));
        assert_eq!(statistics.get(Statistics::SWAP_IN), None);
    }
    assert_eq!(rig.counter(|c| &c.stats_updates_count), 3);
    assert_eq!(rig.counter(|c| &c.stats_update_fails), 0);
    assert!(!rig.slot.calls.broken());
}

#[test]
fn numbers_that_are_cut_short_or_too_many_are_counted() {
    for (bytes, free) in [
        (numbers(&[(4, 1)])[..9].to_vec(), None),
        ([numbers(&[(4, 2)]), vec![0; 3]].concat(), Some(2)),
        (numbers(&vec![(4, 3); MAX_STATISTICS + 1]), Some(3)),
        (vec![0; 1 << 16], None),
    ] {
        // It is not asked for them once more before it has given them.
        let slow = Config { statistics_interval: Some(Duration::from_secs(3600)), ..config() };
        let mut rig = rig(slow, ALL);
        let buffer = rig.drivers[STATISTICS].data(&bytes);
        rig.drivers[STATISTICS].add(&[buffer]);
        rig.slot.run(1);
        assert_eq!(rig.slot.device.statistics().get(Statistics::FREE), free);
        assert_eq!(rig.counter(|c| &c.stats_update_fails), 1);
    }
}

#[test]
fn a_driver_that_gives_many_buffers_for_its_numbers_gets_one_back_at_a_time() {
    let slow = Config { statistics_interval: Some(Duration::from_secs(3600)), ..config() };
    let mut rig = rig(slow, ALL);
    for value in 0..3 {
        let buffer = rig.drivers[STATISTICS].data(&numbers(&[(4, value)]));
        rig.drivers[STATISTICS].add(&[buffer]);
    }
    rig.run();
    assert!(rig.drivers[STATISTICS].reap().is_none());
    rig.slot.device.set_statistics_interval(Duration::from_millis(1));
    let drivers = &mut rig.drivers;
    rig.slot.run_until(|_| drivers[STATISTICS].reap().is_some());
    assert_eq!(rig.slot.device.statistics().get(Statistics::FREE), Some(1));
}

#[test]
fn a_driver_that_breaks_the_rules_is_told_to_reset_and_costs_nothing_more() {
    for queue in 0..5 {
        let quiet = Config { statistics_interval: Some(Duration::from_secs(3600)), ..config() };
        let mut rig = rig(quiet, ALL);
        rig.drivers[queue].set_avail_index(500);
        rig.drivers[queue].kick.write(1).unwrap();
        assert!(rig.slot.run(10) < 10);
        assert!(rig.slot.calls.broken());
        assert_eq!(rig.slot.stop().len(), 5);
    }
    let mut rig = rig(config(), ALL);
    rig.drivers[REPORTING].add(&[room(MEMORY as u64 - 4096, 8192)]);
    rig.run();
    assert!(rig.slot.calls.broken(), "a buffer that lies in no memory");
}

#[test]
fn a_full_queue_of_requests_is_served_in_turns() {
    let mut rig = rig(config(), ALL);
    let page = rig.drivers[0].data(&FREE_PAGE.to_le_bytes());
    while rig.drivers[0].free_descriptors() > 0 {
        rig.drivers[0].add(&[page]);
    }
    let turns = (0..100).take_while(|_| rig.slot.run(1) > 0 && rig.drivers[0].reap_all().len() < 256).count();
    assert!(turns >= 256 / crate::virtio::running::REQUESTS_PER_TURN);
    assert_eq!(rig.counter(|c| &c.inflate_count), 256);
}
