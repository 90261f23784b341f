//! A device of several queues, and drivers that use them well, in part or badly.

use virtio_queue::QueueT;

use super::*;
use crate::backend::uring::MAX_JOBS;

const QUEUES: u16 = 3;
const RAM: usize = 8 << 20;
const FEATURES: u64 = EVENT_IDX | FLUSH | 1 << spec::VIRTIO_BLK_F_MQ;

/// A device and a driver for each of its queues.
struct Many {
    slot: Slot<Blk>,
    drivers: Vec<Driver>,
}

fn many(change: impl FnOnce(&mut Config)) -> Many {
    let mut config = config(&file(SECTORS * SECTOR_BYTES));
    config.queues = QUEUES;
    change(&mut config);
    let memory = testing::ram(RAM);
    let slot = Slot::new(Blk::new(config, None).unwrap(), &memory);
    let mut many = Many { slot, drivers: Vec::new() };
    many.start();
    many
}

impl Many {
    /// The driver begins, with every queue from its beginning.
    fn start(&mut self) {
        let memory = &self.slot.memory;
        memory.memory().write_slice(&[0; RAM], GuestAddress(0)).unwrap();
        let driver = |queue| Driver::new(memory, (u64::from(queue) + 1) << 21, QUEUE_SIZE, FEATURES);
        self.drivers = (0..QUEUES).map(driver).collect();
        let queues = (0..).zip(&self.drivers).map(|(index, driver)| driver.queue(index)).collect();
        self.slot.start(queues, FEATURES);
    }

    fn submit(&mut self, queue: usize, kind: u32, sector: u64, data: &[Buffer]) -> Buffer {
        submit(&mut self.drivers[queue], kind, sector, data)
    }

    /// Runs the device until this status is there.
    fn wait_for(&mut self, status: Buffer) -> u8 {
        let memory = self.slot.memory.clone();
        let read = move || memory.memory().read_obj::<u8>(GuestAddress(status.address)).unwrap();
        self.slot.run_until(|_| read() != 0xff);
        self.drivers[0].read(status)[0]
    }

    fn flush(&mut self, queue: usize) -> u8 {
        let status = self.submit(queue, spec::VIRTIO_BLK_T_FLUSH, 0, &[]);
        self.wait_for(status)
    }
}

#[test]
fn the_driver_is_told_of_several_queues_only_where_there_are_several() {
    for queues in [1, 2, MAX_QUEUES] {
        let config = Config { queues, ..config(&file(SECTOR_BYTES)) };
        let blk = Blk::new(config, None).unwrap();
        let identity = blk.identity();
        assert_eq!(identity.queue_sizes, vec![QUEUE_SIZE; queues.into()]);
        assert_eq!(identity.features & 1 << spec::VIRTIO_BLK_F_MQ != 0, queues > 1);
        let mut told = [0; 2];
        blk.config(34, &mut told);
        assert_eq!(u16::from_le_bytes(told), queues);
    }
}

#[test]
fn a_request_comes_back_in_the_queue_that_it_came_in() {
    for engine in BOTH {
        let mut many = many(|config| config.engine = engine);
        let rooms: Vec<Buffer> = many.drivers.iter_mut().map(|driver| driver.room(512)).collect();
        let read = |many: &mut Many, queue: usize| {
            many.submit(queue, spec::VIRTIO_BLK_T_IN, queue as u64 + 5, &[rooms[queue]])
        };
        let statuses: Vec<Buffer> = (0..rooms.len()).map(|queue| read(&mut many, queue)).collect();
        for (queue, (room, status)) in rooms.iter().zip(statuses).enumerate() {
            assert_eq!(many.wait_for(status), OK);
            assert_eq!(many.drivers[queue].read(*room), [queue as u8 + 6; 512]);
        }
        for driver in &mut many.drivers {
            assert_eq!(driver.reap_all().len(), 1);
        }
    }
}

#[test]
fn queues_that_wait_for_the_limiter_take_turns() {
    let few = Bucket { size: 4, one_time_burst: 0, refill_ms: 5 };
    let mut many = many(|config| config.limits.ops = Some(few));
    let rooms: Vec<Buffer> = many.drivers.iter_mut().map(|driver| driver.room(512)).collect();
    for queue in [0, 1, 2].repeat(40) {
        many.submit(queue, spec::VIRTIO_BLK_T_IN, 0, &[rooms[queue]]);
    }
    let mut done = [0; QUEUES as usize];
    many.slot.run_until(|_| {
        for (done, driver) in done.iter_mut().zip(&mut many.drivers) {
            *done += driver.reap_all().len();
        }
        done.iter().sum::<usize>() >= 60
    });
    // Each about 20; a turn takes more than the limiter lets go at a time only when it is slow.
    assert!(done.iter().all(|&done| done >= 10), "{done:?}");
}

#[test]
fn queues_that_waited_come_to_rest_whatever_calls_the_device_meanwhile() {
    let hour = Bucket { size: 1, one_time_burst: 0, refill_ms: 3_600_000 };
    let mut many = many(|config| config.limits.ops = Some(hour));
    let statuses: Vec<Buffer> = [0, 1, 2, 0, 1, 2]
        .map(|queue| many.submit(queue, spec::VIRTIO_BLK_T_FLUSH, 0, &[]))
        .into_iter()
        .collect();
    assert!(many.slot.run(100) < 100);
    many.drivers[2].kick.write(1).unwrap();
    many.slot.device.set_limits(Limits::default());
    assert!(many.slot.run(100) < 100, "it never comes to rest");
    assert!(statuses.iter().all(|status| many.drivers[0].read(*status) == [OK]));
}

/// Gives the ring as much as it holds from the first queue, by a driver that cannot count, without sending it off.
fn fill_the_ring(many: &mut Many, kind: u32, data: &[Buffer]) {
    many.submit(0, kind, 0, data);
    for _ in 1..MAX_JOBS {
        many.drivers[0].offer(0);
    }
    let Blk { worker, running, .. } = &mut many.slot.device;
    while !worker.is_full() {
        running.as_mut().unwrap().serve(0, |memory, chain| worker.request(0, memory, chain));
    }
    let _ = many.drivers[0].kick.read();
}

#[test]
fn a_queue_that_fills_the_ring_again_and_again_does_not_keep_another_out_for_ever() {
    let mut many = many(|config| config.engine = Engine::Async);
    fill_the_ring(&mut many, spec::VIRTIO_BLK_T_FLUSH, &[]);
    for _ in 0..QUEUE_SIZE {
        many.drivers[0].offer(0);
    }
    many.slot.device.handle(0);
    assert_eq!(many.flush(2), OK);
    let counters = many.slot.device.counters();
    let flushes = || counters.flush_count.load(Ordering::Relaxed);
    many.slot.run_until(|_| flushes() == 2 * MAX_JOBS as u64 + 1);
}

#[test]
fn who_waits_for_room_is_served_when_all_in_the_ring_comes_back_at_once() {
    let mut many = many(|config| config.engine = Engine::Async);
    let room = many.drivers[0].room(512);
    // What the host has in memory is done as soon as it is sent off.
    fill_the_ring(&mut many, spec::VIRTIO_BLK_T_IN, &[room]);
    let room = many.drivers[1].room(512);
    let status = many.submit(1, spec::VIRTIO_BLK_T_IN, 2, &[room]);
    many.slot.device.handle(1);
    assert_eq!(many.wait_for(status), OK);
}

#[test]
fn a_queue_that_the_driver_has_not_enabled_is_left_alone() {
    for engine in BOTH {
        let mut many = many(|config| config.engine = engine);
        many.slot.stop();
        many.slot.device.reset();
        let mut queues: Vec<Queue> =
            (0..).zip(&many.drivers).map(|(index, driver)| driver.queue(index)).collect();
        queues[1].ring.set_ready(false);
        many.slot.start(queues, FEATURES);
        let left = many.submit(1, spec::VIRTIO_BLK_T_FLUSH, 0, &[]);
        assert_eq!((many.flush(0), many.flush(2)), (OK, OK));
        // As if it were rung all the same, and with one that does not exist.
        many.slot.device.handle(1);
        many.slot.device.handle(u32::from(QUEUES));
        many.slot.device.handle(u32::from(u16::MAX));
        assert_eq!(many.flush(0), OK);
        assert_eq!(many.drivers[1].read(left), [0xff]);
        assert!(!many.slot.calls.broken());
        assert_eq!(many.slot.stop().len(), usize::from(QUEUES));
    }
}

#[test]
fn a_bad_chain_in_one_queue_ends_them_all_until_the_device_is_started_again() {
    for engine in BOTH {
        let mut many = many(|config| config.engine = engine);
        let under_way = many.submit(0, spec::VIRTIO_BLK_T_FLUSH, 0, &[]);
        let driver = &mut many.drivers[1];
        driver.set_descriptor(9, Descriptor::new(0x1000, 1, WRITE | NEXT, 9));
        driver.offer(9);
        many.slot.device.handle(1);
        assert!(many.slot.calls.broken());
        for queue in 0..QUEUES.into() {
            many.submit(queue, spec::VIRTIO_BLK_T_FLUSH, 0, &[]);
            many.drivers[queue].kick.write(1).unwrap();
        }
        assert!(many.slot.run(100) < 100, "a broken device comes to rest");
        assert_eq!(many.drivers[0].read(under_way), [0xff]);
        assert_eq!(many.slot.calls.needs_reset.load(Ordering::SeqCst), 1);

        many.slot.stop();
        many.slot.device.reset();
        many.start();
        for queue in 0..QUEUES.into() {
            assert_eq!(many.flush(queue), OK);
        }
    }
}

#[test]
fn a_pause_gives_back_what_each_queue_has_under_way_and_what_comes_meanwhile_is_found_afterwards() {
    for engine in BOTH {
        let mut many = many(|config| config.engine = engine);
        let writes: Vec<Buffer> = (0..40)
            .map(|at: u64| {
                let queue = at as usize % many.drivers.len();
                let data = many.drivers[queue].data(&[0xee; 512]);
                many.submit(queue, spec::VIRTIO_BLK_T_OUT, at, &[data])
            })
            .collect();
        // A turn may end with its time, but not before a request.
        for queue in [0, 1, 2].repeat(writes.len()) {
            many.slot.device.handle(queue);
        }
        let states: Vec<_> = many.slot.stop().iter().map(Queue::save).collect();
        assert!(writes.iter().all(|status| many.drivers[0].read(*status) == [OK]));
        let meanwhile: Vec<Buffer> =
            (0..QUEUES.into()).map(|queue| many.submit(queue, spec::VIRTIO_BLK_T_FLUSH, 0, &[])).collect();
        let restore = |(index, (driver, state)): (u16, (&Driver, _))| {
            Queue::restore(index, state, driver.kick.try_clone().unwrap()).unwrap()
        };
        many.slot.start((0..).zip(many.drivers.iter().zip(&states)).map(restore).collect(), FEATURES);
        for status in meanwhile {
            assert_eq!(many.wait_for(status), OK);
        }
    }
}

#[test]
fn a_driver_that_knows_one_queue_has_one() {
    let mut many = many(|_| {});
    many.slot.stop();
    many.slot.device.reset();
    let queues = (0..).zip(&many.drivers).map(|(index, driver)| {
        let mut queue = driver.queue(index);
        queue.ring.set_ready(index == 0);
        queue
    });
    let queues = queues.collect();
    many.slot.start(queues, EVENT_IDX | FLUSH);
    assert_eq!(many.flush(0), OK);
}
