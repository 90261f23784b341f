mod direct;
mod image;
mod queues;

use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, GuestAddressSpace};

use super::*;
use crate::backend::rate_limiter::Bucket;
use crate::backend::uring::MAX_JOBS;
use crate::virtio::testing::{self, Buffer, Driver, EVENT_IDX, NEXT, Slot, WRITE};

const OK: u8 = spec::VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = spec::VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = spec::VIRTIO_BLK_S_UNSUPP as u8;
const FLUSH: u64 = 1 << spec::VIRTIO_BLK_F_FLUSH;
const SECTORS: u64 = 64;

const BOTH: [Engine; 2] = [Engine::Sync, Engine::Async];

struct Rig {
    slot: Slot<Blk>,
    driver: Driver,
    file: File,
}

fn config(file: &File) -> Config {
    Config {
        file: file.try_clone().unwrap(),
        format: Format::Raw,
        read_only: false,
        cache: Cache::Writeback,
        engine: Engine::Sync,
        queues: 1,
        serial: "disk-1".into(),
        limits: Limits::default(),
    }
}

fn file(bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    let data: Vec<u8> = (0..bytes).map(|i| ((i / SECTOR_BYTES) as u8).wrapping_add(1)).collect();
    file.write_all_at(&data, 0).unwrap();
    file
}

fn rig_with(change: impl FnOnce(&mut Config)) -> Rig {
    let file = file(SECTORS * SECTOR_BYTES);
    let mut config = config(&file);
    change(&mut config);
    let memory = testing::ram(8 << 20);
    let driver = Driver::new(&memory, 0x1000, 256, EVENT_IDX | FLUSH);
    let mut slot = Slot::new(Blk::new(config, None).unwrap(), &memory);
    slot.start(vec![driver.queue(0)], EVENT_IDX | FLUSH);
    Rig { slot, driver, file }
}

fn rig() -> Rig {
    rig_with(|_| {})
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// Makes a request available; returns the status byte.
fn submit(driver: &mut Driver, kind: u32, sector: u64, data: &[Buffer]) -> Buffer {
    let header = driver.data(&header(kind, sector));
    let status = driver.room(1);
    driver.memory.memory().write_obj(0xffu8, GuestAddress(status.address)).unwrap();
    let (out, room): (Vec<Buffer>, Vec<Buffer>) = data.iter().partition(|buffer| !buffer.writable);
    driver.add(&[vec![header], out, room, vec![status]].concat());
    status
}

impl Rig {
    /// Makes a request available; returns the status byte.
    fn submit(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> Buffer {
        submit(&mut self.driver, kind, sector, data)
    }

    /// Waits until that many requests came back.
    fn reap(&mut self, count: usize) -> Vec<testing::Used> {
        let mut used = Vec::new();
        self.slot.run_until(|_| {
            used.extend(self.driver.reap_all());
            used.len() >= count
        });
        used
    }

    /// Does a request from start to end; returns its status and how much was written.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        let status = self.submit(kind, sector, data);
        let used = self.reap(1)[0];
        self.slot.run(10);
        assert_eq!(self.driver.reap(), None);
        (self.driver.read(status)[0], used.written)
    }

    fn status(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> u8 {
        self.request(kind, sector, data).0
    }

    fn ranges(&mut self, kind: u32, ranges: &[Vec<u8>]) -> u8 {
        let data = self.driver.data(&ranges.concat());
        self.status(kind, 0, &[data])
    }

    fn on_disk(&self, sector: u64, sectors: u64) -> Vec<u8> {
        let mut data = vec![0; (sectors * SECTOR_BYTES) as usize];
        self.file.read_exact_at(&mut data, sector * SECTOR_BYTES).unwrap();
        data
    }

    fn counter(&self, counter: impl Fn(&Counters) -> &AtomicU64) -> u64 {
        counter(&self.slot.device.counters()).load(Ordering::Relaxed)
    }
}

#[test]
fn what_is_written_is_on_the_disk_and_is_read_back() {
    for engine in BOTH {
        let mut rig = rig_with(|config| config.engine = engine);
        let out = [rig.driver.data(&[7; 512]), rig.driver.data(&[8; 1024])];
        assert_eq!(rig.request(spec::VIRTIO_BLK_T_OUT, 5, &out), (OK, 1));
        assert_eq!(rig.on_disk(4, 1), [5; 512]);
        assert_eq!(rig.on_disk(5, 1), [7; 512]);
        assert_eq!(rig.on_disk(6, 2), [8; 1024]);

        let room = [rig.driver.room(1000), rig.driver.room(536)];
        assert_eq!(rig.request(spec::VIRTIO_BLK_T_IN, 5, &room), (OK, 1537));
        let read = [rig.driver.read(room[0]), rig.driver.read(room[1])].concat();
        assert_eq!(read, [vec![7; 512], vec![8; 1024]].concat());
        assert_eq!(rig.counter(|c| &c.read_bytes) + rig.counter(|c| &c.write_bytes), 2 * 1536);
    }
}

#[test]
fn a_mebibyte_in_scattered_pages_is_two_indirect_requests_and_one_interrupt() {
    let mut rig = rig_with(|config| config.file = file(2 << 20));
    rig.slot.run(10);
    let mut add = |sector: u64, pages: u32| {
        let header = rig.driver.data(&header(spec::VIRTIO_BLK_T_IN, sector));
        let room: Vec<Buffer> = (0..pages).map(|_| rig.driver.room(4096)).collect();
        let status = rig.driver.room(1);
        rig.driver.add_indirect(&[vec![header], room, vec![status]].concat());
    };
    add(0, SEG_MAX);
    add(u64::from(SEG_MAX) * 8, 256 - SEG_MAX);
    rig.slot.run(10);
    assert_eq!(rig.driver.reap_all().iter().map(|used| used.written).sum::<u32>(), (1 << 20) + 2);
    assert_eq!(rig.slot.calls.take_queue(), 1);
}

#[test]
fn the_header_may_be_cut_anywhere_and_stand_with_the_data() {
    let mut rig = rig();
    let whole = [header(spec::VIRTIO_BLK_T_OUT, 1), vec![9; 512]].concat();
    for cut in [1, 15, 16, 17, 527] {
        let parts = [rig.driver.data(&whole[..cut]), rig.driver.data(&whole[cut..]), rig.driver.room(1)];
        rig.driver.add(&parts);
        rig.slot.run(10);
        assert_eq!(rig.driver.read(parts[2]), [OK]);
        assert_eq!(rig.on_disk(1, 1), [9; 512]);
        assert_eq!(rig.driver.reap_all().len(), 1);
    }
}

#[test]
fn the_end_of_the_disk_is_the_end() {
    let mut rig = rig_with(|config| config.file = file(SECTORS * SECTOR_BYTES + 511));
    let mut capacity = [0; 8];
    rig.slot.device.config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS, "the last part of a sector is not the guest's");
    for (kind, writable) in [(spec::VIRTIO_BLK_T_IN, true), (spec::VIRTIO_BLK_T_OUT, false)] {
        let one = Buffer { writable, ..rig.driver.data(&[0; 512]) };
        let two = Buffer { writable, ..rig.driver.data(&[0; 1024]) };
        assert_eq!(rig.status(kind, SECTORS - 1, &[one]), OK);
        assert_eq!(rig.status(kind, SECTORS - 1, &[two]), IOERR);
        assert_eq!(rig.status(kind, SECTORS, &[one]), IOERR);
        assert_eq!(rig.status(kind, SECTORS, &[]), OK, "nothing, at the end");
        for sector in [SECTORS + 1, u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1] {
            assert_eq!(rig.status(kind, sector, &[one]), IOERR, "sector {sector}");
            assert_eq!(rig.status(kind, sector, &[]), IOERR, "sector {sector}");
        }
        let odd = Buffer { len: 511, ..one };
        assert_eq!(rig.status(kind, 0, &[odd]), IOERR);
    }
    assert_eq!(rig.file.metadata().unwrap().len(), SECTORS * SECTOR_BYTES);
}

#[test]
fn one_request_moves_no_more_than_64_mib() {
    let mut rig = rig_with(|config| config.file.set_len(1 << 30).unwrap());
    let part = rig.driver.room(4 << 20);
    for (kind, writable) in [(spec::VIRTIO_BLK_T_IN, true), (spec::VIRTIO_BLK_T_OUT, false)] {
        let part = Buffer { writable, ..part };
        assert_eq!(rig.status(kind, 0, &[part; 16]), OK);
        let sector = Buffer { len: 512, ..part };
        assert_eq!(rig.status(kind, 0, &[vec![part; 16], vec![sector]].concat()), IOERR);
    }
}

#[test]
fn a_file_that_shrank_behind_our_back_is_an_error_of_the_host() {
    let mut rig = rig();
    rig.file.set_len(512).unwrap();
    let room = rig.driver.room(1024);
    assert_eq!(rig.request(spec::VIRTIO_BLK_T_IN, 0, &[room]), (IOERR, 0), "nothing of it is to be used");
    assert_eq!(rig.counter(|c| &c.execute_fails), 1);
    let room = rig.driver.room(512);
    assert_eq!(rig.status(spec::VIRTIO_BLK_T_IN, 0, &[room]), OK, "and the device goes on");
}

#[test]
fn of_many_requests_that_fail_one_is_told_and_the_rest_by_their_number() {
    for engine in BOTH {
        let mut rig = rig_with(|config| config.engine = engine);
        rig.file.set_len(512).unwrap();
        let room = rig.driver.room(1024);
        for _ in 0..50 {
            assert_eq!(rig.status(spec::VIRTIO_BLK_T_IN, 2, &[room]), IOERR);
        }
        assert_eq!(rig.counter(|c| &c.execute_fails), 50);
        let untold = rig.slot.device.worker.troubles.clear();
        assert!(untold.len() == 1 && untold[0].starts_with("49 more: reading: "), "{untold:?}");
        rig.slot.stop();
        assert!(rig.slot.device.worker.troubles.is_empty());
    }
}

#[test]
fn a_read_only_disk_is_not_written_by_anything() {
    let mut rig = rig_with(|config| config.read_only = true);
    let features = rig.slot.device.identity().features;
    assert_ne!(features & 1 << spec::VIRTIO_BLK_F_RO, 0);
    assert_eq!(features & (1 << spec::VIRTIO_BLK_F_DISCARD | 1 << spec::VIRTIO_BLK_F_WRITE_ZEROES), 0);
    let data = rig.driver.data(&[0; 512]);
    assert_eq!(rig.status(spec::VIRTIO_BLK_T_OUT, 0, &[data]), IOERR);
    assert_eq!(rig.ranges(spec::VIRTIO_BLK_T_DISCARD, &[range(0, 8, 0)]), IOERR);
    assert_eq!(rig.ranges(spec::VIRTIO_BLK_T_WRITE_ZEROES, &[range(0, 8, 0)]), IOERR);
    assert_eq!(rig.on_disk(0, 1), [1; 512]);
    let room = rig.driver.room(512);
    assert_eq!(rig.status(spec::VIRTIO_BLK_T_IN, 0, &[room]), OK);
}

#[test]
fn the_serial_number_is_twenty_bytes_at_most() {
    for (serial, expected) in [
        ("disk-1", *b"disk-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        ("a-serial-of-more-than-20", *b"a-serial-of-more-tha"),
    ] {
        let mut rig = rig_with(|config| config.serial = serial.into());
        let room = rig.driver.room(20);
        assert_eq!(rig.request(spec::VIRTIO_BLK_T_GET_ID, 0, &[room]), (OK, 21));
        assert_eq!(rig.driver.read(room), expected);
        let short = rig.driver.room(19);
        assert_eq!(rig.status(spec::VIRTIO_BLK_T_GET_ID, 0, &[short]), IOERR);
        let long = rig.driver.room(40);
        assert_eq!(rig.request(spec::VIRTIO_BLK_T_GET_ID, 0, &[long]), (OK, 20), "the rest is not filled");
    }
}

#[test]
fn a_flush_is_offered_with_writeback_only_and_costs_nothing_without() {
    for (cache, offered) in [(Cache::Writeback, true), (Cache::Unsafe, false), (Cache::Writethrough, false)] {
        let mut rig = rig_with(|config| config.cache = cache);
        assert_eq!(rig.slot.device.identity().features & FLUSH != 0, offered);
        assert_eq!(rig.request(spec::VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
        assert_eq!(rig.counter(|c| &c.flush_count), u64::from(offered));
    }
}

#[test]
fn for_a_driver_that_knows_no_flush_and_with_writethrough_every_write_is_one() {
    for (cache, features, expected) in [
        (Cache::Writeback, 0, IOERR),
        (Cache::Writeback, FLUSH, OK),
        (Cache::Unsafe, 0, OK),
        (Cache::Writethrough, 0, IOERR),
        // By a driver that takes what is not offered.
        (Cache::Writethrough, FLUSH, IOERR),
    ] {
        for engine in BOTH {
            // An empty disk that takes a write of nothing and refuses to be flushed.
            let null = File::options().read(true).write(true).open("/dev/null").unwrap();
            let mut rig =
                rig_with(|config| (config.file, config.cache, config.engine) = (null, cache, engine));
            let queues = rig.slot.stop();
            rig.slot.start(queues, features);
            assert_eq!(rig.status(spec::VIRTIO_BLK_T_OUT, 0, &[]), expected, "{cache:?} {engine:?}");
            assert_eq!(rig.status(spec::VIRTIO_BLK_T_IN, 0, &[]), OK, "a read is no write");
        }
    }
}

#[test]
fn discarded_sectors_and_zeroes_change_what_was_named_and_nothing_else() {
    for engine in BOTH {
        let mut rig = rig_with(|config| config.engine = engine);
        assert_eq!(rig.ranges(spec::VIRTIO_BLK_T_DISCARD, &[range(8, 8, 0), range(24, 8, 0)]), OK);
        assert_eq!(rig.ranges(spec::VIRTIO_BLK_T_WRITE_ZEROES, &[range(33, 2, 0)]), OK);
        assert_eq!(rig.ranges(spec::VIRTIO_BLK_T_WRITE_ZEROES, &[range(41, 1, 1)]), OK);
        assert_eq!(rig.on_disk(33, 2), [0; 1024]);
        assert_eq!(rig.on_disk(41, 1), [0; 512]);
        for kept in [7, 16, 23, 32, 35, 40, 42] {
            assert_eq!(rig.on_disk(kept, 1), [kept as u8 + 1; 512]);
        }
    }
}

#[test]
fn ranges_are_checked_before_any_of_them_is_done() {
    for engine in BOTH {
        let mut rig = rig_with(|config| config.engine = engine);
        let (discard, zeroes) = (spec::VIRTIO_BLK_T_DISCARD, spec::VIRTIO_BLK_T_WRITE_ZEROES);
        for (kind, flags) in [(discard, 1), (discard, 2), (zeroes, 2), (zeroes, u32::MAX)] {
            assert_eq!(rig.ranges(kind, &[range(0, 8, flags)]), UNSUPP, "flags {flags}");
        }
        for (sector, sectors) in [(SECTORS, 1), (0, SECTORS as u32 + 1), (u64::MAX, 1), (1, u32::MAX)] {
            assert_eq!(rig.ranges(discard, &[range(0, 8, 0), range(sector, sectors, 0)]), IOERR);
            assert_eq!(rig.ranges(zeroes, &[range(sector, sectors, 0)]), IOERR);
        }
        let many = vec![range(0, 8, 0); MAX_DISCARD_SEGMENTS as usize + 1];
        assert_eq!(rig.ranges(discard, &many), IOERR);
        assert_eq!(rig.ranges(zeroes, &many[..2]), IOERR);
        assert_eq!(rig.ranges(zeroes, &[]), IOERR);
        assert_eq!(rig.ranges(discard, &[vec![0; 15]]), IOERR);
        assert_eq!(rig.on_disk(0, 1), [1; 512]);
    }
}

#[test]
fn unknown_requests_are_unsupported_and_mixed_up_ones_fail() {
    for engine in BOTH {
        let mut rig = rig_with(|config| config.engine = engine);
        for kind in [2, 3, 7, 14, 15, u32::MAX] {
            assert_eq!(rig.request(kind, 0, &[]), (UNSUPP, 1), "type {kind}");
        }
        let (out, room) = (rig.driver.data(&[0; 512]), rig.driver.room(512));
        assert_eq!(rig.status(spec::VIRTIO_BLK_T_IN, 0, &[out]), IOERR);
        assert_eq!(rig.status(spec::VIRTIO_BLK_T_OUT, 0, &[room]), IOERR);
        assert_eq!(rig.status(spec::VIRTIO_BLK_T_GET_ID, 0, &[out, room]), IOERR);
        assert_eq!(rig.on_disk(0, 1), [1; 512]);
    }
}

#[test]
fn a_request_without_a_whole_header_fails() {
    let mut rig = rig();
    let parts = [rig.driver.data(&[0; 15]), rig.driver.room(513)];
    rig.driver.add(&parts);
    rig.slot.run(10);
    assert_eq!(rig.driver.reap().unwrap().written, 0);
    assert_eq!(rig.driver.read(parts[1])[512], IOERR);
    assert!(!rig.slot.calls.broken());
}

#[test]
fn a_request_without_a_status_byte_breaks_the_device_until_it_is_started_again() {
    let mut rig = rig();
    let header = rig.driver.data(&header(spec::VIRTIO_BLK_T_FLUSH, 0));
    rig.driver.add(&[header]);
    rig.slot.run(10);
    assert!(rig.slot.calls.broken());
    rig.submit(spec::VIRTIO_BLK_T_FLUSH, 0, &[]);
    rig.driver.kick.write(1).unwrap();
    assert!(rig.slot.run(10) < 10, "a broken device comes to rest");
    assert_eq!(rig.driver.reap(), None);

    rig.slot.stop();
    rig.slot.device.reset();
    let memory = rig.slot.memory.clone();
    rig.driver = Driver::new(&memory, 0x10_0000, 256, EVENT_IDX | FLUSH);
    rig.slot.start(vec![rig.driver.queue(0)], EVENT_IDX | FLUSH);
    assert_eq!(rig.status(spec::VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
}

#[test]
fn what_was_done_before_the_driver_broke_the_rules_is_told() {
    let mut rig = rig();
    let status = rig.submit(spec::VIRTIO_BLK_T_FLUSH, 0, &[]);
    rig.driver.set_descriptor(9, Descriptor::new(0x1000, 1, WRITE | NEXT, 9));
    rig.driver.offer(9);
    rig.slot.run(300);
    assert!(rig.slot.calls.broken());
    assert_eq!(rig.slot.calls.take_queue(), 1);
    assert_eq!(rig.driver.read(status), [OK]);
}

#[test]
fn a_busy_disk_gives_way_after_its_turn_and_loses_nothing() {
    let mut rig = rig();
    let statuses: Vec<Buffer> = (0..80).map(|_| rig.submit(spec::VIRTIO_BLK_T_FLUSH, 0, &[])).collect();
    assert_eq!(rig.slot.run(1), 1);
    let first = rig.driver.reap_all().len();
    // Fewer if they take long.
    assert!((1..=crate::virtio::running::REQUESTS_PER_TURN).contains(&first));
    rig.slot.run(100);
    assert_eq!(rig.driver.reap_all().len(), 80 - first);
    assert!(statuses.iter().all(|&status| rig.driver.read(status) == [OK]));
}

#[test]
fn a_full_queue_of_requests_held_back_is_served_when_the_limit_goes() {
    let hour = Bucket { size: 1, one_time_burst: 0, refill_ms: 3_600_000 };
    let mut rig = rig_with(|config| config.limits.ops = Some(hour));
    while rig.driver.free_descriptors() >= 2 {
        rig.submit(spec::VIRTIO_BLK_T_FLUSH, 0, &[]);
    }
    rig.slot.run(10);
    assert_eq!(rig.driver.reap_all().len(), 1);
    rig.submit(spec::VIRTIO_BLK_T_FLUSH, 0, &[]);
    assert!(rig.slot.run(10) < 10, "it waits, and does not spin");
    assert!(rig.counter(|c| &c.rate_limiter_throttled_events) > 0);
    rig.slot.device.set_limits(Limits::default());
    rig.slot.run(300);
    assert_eq!(rig.driver.reap_all().len(), 128);
}

#[test]
fn a_whole_queue_of_requests_that_fail_comes_back_and_the_next_are_served() {
    for engine in BOTH {
        let mut rig = rig_with(|config| config.engine = engine);
        for (sector, expected) in [(SECTORS, IOERR), (0, OK), (SECTORS, IOERR), (0, OK)] {
            let room = rig.driver.room(512);
            // A request has a header, a buffer and a status: as many as the queue holds.
            let statuses: Vec<_> =
                (0..QUEUE_SIZE / 3).map(|_| rig.submit(spec::VIRTIO_BLK_T_IN, sector, &[room])).collect();
            assert_eq!(rig.reap(statuses.len()).len(), statuses.len());
            assert!(statuses.iter().all(|status| rig.driver.read(*status) == [expected]));
        }
    }
}

#[test]
fn a_limited_disk_is_slow_but_gets_done() {
    let fast = Bucket { size: 1024, one_time_burst: 0, refill_ms: 5 };
    let mut rig = rig_with(|config| config.limits.bandwidth = Some(fast));
    let room = rig.driver.room(4096);
    let last = (0..4).map(|_| rig.submit(spec::VIRTIO_BLK_T_IN, 0, &[room])).last().unwrap();
    let memory = rig.slot.memory.clone();
    rig.slot.run_until(|_| memory.memory().read_obj::<u8>(GuestAddress(last.address)).unwrap() == OK);
    assert_eq!(rig.driver.reap_all().len(), 4);
}

#[test]
fn zeroes_cost_as_many_bytes_as_they_cover_and_a_discard_costs_none() {
    let hour = Bucket { size: 8 * SECTOR_BYTES, one_time_burst: 0, refill_ms: 3_600_000 };
    for unmap in [0, 1] {
        let mut rig = rig_with(|config| config.limits.bandwidth = Some(hour));
        assert_eq!(rig.ranges(spec::VIRTIO_BLK_T_DISCARD, &[range(0, 64, 0)]), OK);
        assert_eq!(rig.ranges(spec::VIRTIO_BLK_T_WRITE_ZEROES, &[range(0, 8, unmap)]), OK);
        let room = rig.driver.room(512);
        rig.submit(spec::VIRTIO_BLK_T_IN, 0, &[room]);
        rig.slot.run(10);
        assert_eq!(rig.driver.reap(), None, "nothing is left of the bucket");
        rig.slot.device.set_limits(Limits::default());
        rig.reap(1);
    }
}

#[test]
fn another_file_has_another_content_and_size_and_the_driver_hears_of_it() {
    for engine in BOTH {
        let mut rig = rig_with(|config| config.engine = engine);
        let new = tempfile::tempfile().unwrap();
        new.write_all_at(&[0x55; 1024], 0).unwrap();
        rig.slot.device.replace(new, Format::Raw).unwrap();
        assert_eq!(rig.slot.calls.config.load(Ordering::SeqCst), 1);
        let mut capacity = [0; 8];
        rig.slot.device.config(0, &mut capacity);
        assert_eq!(u64::from_le_bytes(capacity), 2);
        let room = rig.driver.room(512);
        assert_eq!(rig.status(spec::VIRTIO_BLK_T_IN, 0, &[room]), OK);
        assert_eq!(rig.driver.read(room), [0x55; 512]);
        assert_eq!(rig.status(spec::VIRTIO_BLK_T_IN, 2, &[room]), IOERR);
    }
}

#[test]
fn a_driver_that_finds_another_size_after_a_restore_is_told() {
    let mut rig = rig();
    rig.slot.stop();
    let DeviceState::Block(state) = rig.slot.device.save() else { unreachable!() };
    for (sectors, told) in [(SECTORS, 0), (SECTORS * 2, 1)] {
        let file = file(sectors * SECTOR_BYTES);
        let blk = Blk::new(config(&file), Some(state.clone())).unwrap();
        let mut slot = Slot::new(blk, &rig.slot.memory);
        slot.start(vec![rig.driver.queue(0)], EVENT_IDX);
        assert_eq!(slot.calls.config.load(Ordering::SeqCst), told);
    }
}

#[test]
fn the_configuration_space_ends_and_may_be_read_in_any_piece() {
    let rig = rig();
    let space = config_space(SECTORS, 1, None, Ranges::RAW);
    for (offset, len) in [(0, 60), (12, 4), (34, 2), (56, 8), (59, 1), (60, 4), (u64::MAX, 4)] {
        let mut data = vec![0xee; len];
        rig.slot.device.config(offset, &mut data);
        let expected: Vec<u8> =
            (0..len).map(|i| *space.get((offset as usize).saturating_add(i)).unwrap_or(&0)).collect();
        assert_eq!(data, expected, "offset {offset}");
    }
    assert_eq!(u32::from_le_bytes(*space[12..].first_chunk().unwrap()), 254);
}

#[test]
fn requests_in_the_ring_are_given_back_by_a_stop_and_their_driver_is_told() {
    let mut rig = asynchronous();
    let rooms: Vec<Buffer> = (0..60).map(|_| rig.driver.room(512)).collect();
    let statuses: Vec<Buffer> =
        (0..60).map(|sector| rig.submit(spec::VIRTIO_BLK_T_IN, sector, &[rooms[sector as usize]])).collect();
    rig.slot.device.handle(0);
    rig.slot.stop();
    assert!(rig.slot.calls.take_queue() > 0);
    assert_eq!(rig.driver.reap_all().len(), 60);
    for sector in 0..60 {
        assert_eq!(rig.driver.read(statuses[sector]), [OK]);
        assert_eq!(rig.driver.read(rooms[sector]), [sector as u8 + 1; 512]);
    }
    assert_eq!(rig.counter(|c| &c.read_count), 60);
}

#[test]
fn a_ring_that_is_full_holds_requests_back_until_there_is_room() {
    let mut rig = asynchronous();
    // A chain that is offered again while the device has it, by a driver that cannot count.
    rig.submit(spec::VIRTIO_BLK_T_FLUSH, 0, &[]);
    let offers = 2 * MAX_JOBS as u64;
    let Blk { worker, running, .. } = &mut rig.slot.device;
    for _ in 1..offers {
        rig.driver.offer(0);
        running.as_mut().unwrap().serve(0, |memory, chain| worker.request(0, memory, chain));
    }
    assert!(worker.ring.as_ref().unwrap().is_full());
    rig.slot.device.handle(0);
    let counters = rig.slot.device.counters();
    assert!(counters.io_engine_throttled_events.load(Ordering::Relaxed) > 0);
    rig.slot.run_until(|_| counters.flush_count.load(Ordering::Relaxed) == offers);
    assert!(!rig.slot.calls.broken());
}

#[test]
fn what_ends_after_the_driver_broke_the_rules_is_dropped_and_the_device_can_be_started_again() {
    let mut rig = asynchronous();
    let status = rig.submit(spec::VIRTIO_BLK_T_FLUSH, 0, &[]);
    rig.driver.set_descriptor(9, Descriptor::new(0x1000, 1, WRITE | NEXT, 9));
    rig.driver.offer(9);
    rig.slot.device.handle(0);
    assert!(rig.slot.calls.broken());
    rig.slot.stop();
    assert!(rig.slot.device.worker.ring.as_ref().unwrap().is_empty());
    assert_eq!(rig.driver.read(status), [0xff]);
    rig.slot.device.reset();
    let memory = rig.slot.memory.clone();
    rig.driver = Driver::new(&memory, 0x10_0000, 256, EVENT_IDX | FLUSH);
    rig.slot.start(vec![rig.driver.queue(0)], EVENT_IDX | FLUSH);
    assert_eq!(rig.status(spec::VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
}

#[test]
fn another_file_takes_over_when_the_requests_on_the_first_are_done() {
    let mut rig = asynchronous();
    let writes: Vec<Buffer> = (0..50u8).map(|byte| rig.driver.data(&[byte; 512])).collect();
    for (sector, write) in (0..).zip(&writes) {
        rig.submit(spec::VIRTIO_BLK_T_OUT, sector, &[*write]);
    }
    rig.slot.device.handle(0);
    rig.slot.device.replace(file(SECTORS * SECTOR_BYTES), Format::Raw).unwrap();
    assert_eq!(rig.driver.reap_all().len(), 50);
    assert_eq!(rig.on_disk(49, 1), [49; 512]);
    let room = rig.driver.room(512);
    assert_eq!(rig.status(spec::VIRTIO_BLK_T_IN, 1, &[room]), OK);
    assert_eq!(rig.driver.read(room), [2; 512], "nothing of the first is on the second");
}

fn asynchronous() -> Rig {
    rig_with(|config| config.engine = Engine::Async)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn no_request_whatever_kills_the_device_or_reaches_beyond_the_disk(
        requests in proptest::collection::vec(
            (prop_oneof![0u32..16, any::<u32>()],
             prop_oneof![0..SECTORS + 2, any::<u64>()],
             proptest::collection::vec((any::<bool>(), prop_oneof![Just(512u32), 0u32..2000]), 0..4)),
            1..8),
        noise in proptest::collection::vec(any::<u8>(), 16),
        engine in proptest::sample::select(&BOTH[..]),
        block in proptest::sample::select(&[None, Some(512), Some(4096)][..]),
    ) {
        let mut rig = rig_with(|config| config.engine = engine);
        if let Some(block) = block {
            rig.slot.device.worker.disk.pretend(Alignment { memory: 512, block });
        }
        for (kind, sector, buffers) in requests {
            let buffers: Vec<Buffer> = buffers
                .into_iter()
                .map(|(writable, len)| {
                    let fill: Vec<u8> = noise.iter().copied().cycle().take(len as usize).collect();
                    Buffer { writable, ..rig.driver.data(&fill) }
                })
                .collect();
            let (status, _) = rig.request(kind, sector, &buffers);
            prop_assert!([OK, IOERR, UNSUPP].contains(&status));
        }
        prop_assert!(!rig.slot.calls.broken());
        prop_assert_eq!(rig.file.metadata().unwrap().len(), SECTORS * SECTOR_BYTES);
    }
}
