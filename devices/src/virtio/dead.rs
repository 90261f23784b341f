//! What takes the place of a device that is taken away while its driver still has it: it has nothing of the host's, looks to
//! the driver as the device did, and fails every request, those that were under way too. So whoever waits for one goes on,
//! and the driver can let go of it; taken off the bus instead, it would leave some drivers waiting for ever.
//!
//! Does not end by itself: it stays until the guest lets go of the function that it is behind.

use std::mem;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_net as net;
use vm_memory::Bytes;

use crate::host::Source;
use crate::memory::GuestRam;
use crate::state::StateError;
use crate::virtio::device::{
    Active, DeviceState, DeviceType, Identity, StartError, VirtioDevice, read_space,
};
use crate::virtio::net::{MAX_QUEUE_PAIRS, control_queue};
use crate::virtio::pmem;
use crate::virtio::queue::{Chain, MAX_SEGMENTS, Queue, QueueError};
use crate::virtio::running::{Running, Step};

/// Most queues of a saved one: a network device has more than any other.
const MAX_QUEUES: usize = 2 * MAX_QUEUE_PAIRS + 1;

/// See the module.
pub struct Dead {
    state: State,
    /// How the requests of each queue are failed.
    refusals: Vec<Refusal>,
    running: Option<Running>,
}

/// [`Dead`] as it is saved: all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    identity: Identity,
    space: Vec<u8>,
    /// Of each queue, the requests that have left it and were not given back.
    unfinished: Vec<Vec<u16>>,
}

/// How a request is failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// Not at all: it asks for what may never come.
    None,
    /// It comes back as if it was done, as packets do that are lost.
    Silent,
    /// By its last byte (VIRTIO 1.3, section 5.2.6).
    Disk,
    /// By a number (5.19.7).
    Flush,
    /// By a byte (5.1.6.5).
    Command,
}

impl Dead {
    /// In the place of `device`, which has stopped.
    pub fn of(device: &dyn VirtioDevice) -> Dead {
        let identity = device.identity();
        let mut space = vec![0; usize::try_from(identity.config_bytes).unwrap_or(0)];
        device.config(0, &mut space);
        let mut unfinished = match device.save() {
            DeviceState::Dead(state) => state.unfinished,
            DeviceState::VhostUserBlock(state) => state.unfinished,
            // All others have given back what they had begun when they stopped.
            _ => Vec::new(),
        };
        unfinished.resize(identity.queue_sizes.len(), Vec::new());
        Dead::with(State { identity, space, unfinished })
    }

    /// The one that was saved.
    ///
    /// # Errors
    /// None was saved so.
    pub fn new(state: State) -> Result<Dead, StateError> {
        let State { identity, space, unfinished } = &state;
        let sizes = &identity.queue_sizes;
        let is_size = |size: &u16| size.is_power_of_two() && usize::from(*size) <= MAX_SEGMENTS;
        if sizes.len() > MAX_QUEUES || !sizes.iter().all(is_size) {
            let rule = format!("at most {MAX_QUEUES} powers of two up to {MAX_SEGMENTS}");
            return Err(StateError::new(
                "a device that was taken away",
                "queues",
                format!("{sizes:?}"),
                rule,
            ));
        }
        if identity.config_bytes != space.len() as u64 {
            let (bytes, rule) = (identity.config_bytes, format!("{}, as there are", space.len()));
            return Err(StateError::new("a device that was taken away", "configuration bytes", bytes, rule));
        }
        let fit = |(requests, size): (&Vec<u16>, &u16)| requests.len() <= usize::from(*size);
        if unfinished.len() != sizes.len() || !unfinished.iter().zip(sizes).all(fit) {
            let value = format!("{unfinished:?}");
            return Err(StateError::new("a device that was taken away", "requests", value, "of its queues"));
        }
        Ok(Dead::with(state))
    }

    fn with(state: State) -> Dead {
        Dead { state, refusals: Vec::new(), running: None }
    }
}

impl VirtioDevice for Dead {
    fn identity(&self) -> Identity {
        self.state.identity.clone()
    }

    fn config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.state.space, offset, data);
    }

    fn start(&mut self, active: Active) -> Result<Vec<Source>, StartError> {
        let Identity { device_type, queue_sizes, .. } = &self.state.identity;
        let count = queue_sizes.len();
        let commands = control_queue(count / 2, active.features);
        let refusal = |index: u16| match device_type {
            DeviceType::Block => Refusal::Disk,
            DeviceType::PersistentMemory => Refusal::Flush,
            DeviceType::Network if index == commands => Refusal::Command,
            DeviceType::Network if index.is_multiple_of(2) => Refusal::None,
            _ => Refusal::Silent,
        };
        self.refusals = (0..).map(refusal).take(count).collect();
        let (running, sources) = Running::start(active, count)?;
        self.running = Some(running);
        Ok(sources)
    }

    fn handle(&mut self, token: u32) {
        let Some(running) = &mut self.running else { return };
        let index = token as u16;
        let refusal = self.refusals.get(usize::from(index)).copied().unwrap_or(Refusal::None);
        if refusal == Refusal::None {
            return running.clear_kick(index);
        }
        let before = self.state.unfinished.get_mut(usize::from(index)).map(mem::take).unwrap_or_default();
        running.turn(index, |turn| {
            for head in before {
                let mut chain = turn.queue.chain(turn.memory, head)?;
                let written = refusal.write(turn.memory, &mut chain)?;
                turn.queue.push(turn.memory, head, written)?;
            }
            Ok(())
        });
        running.serve(index, |memory, chain| refusal.write(memory, chain).map(Step::Used));
    }

    fn stop(&mut self) -> Vec<Queue> {
        self.running.take().map(Running::stop).unwrap_or_default()
    }

    fn reset(&mut self) {
        self.state.unfinished.iter_mut().for_each(Vec::clear);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Dead(self.state.clone())
    }
}

impl Refusal {
    /// Writes that the request has failed, and says how many bytes of its buffers are used. One without room for that is told
    /// nothing.
    fn write(self, memory: &GuestRam, chain: &mut Chain) -> Result<u32, QueueError> {
        let room = &mut chain.writable;
        let answer = match self {
            Refusal::None | Refusal::Silent => return Ok(0),
            Refusal::Disk => {
                let Some(at) = room.take_last_byte() else { return Ok(0) };
                let gone = QueueError::Buffer { address: at.0, len: 1 };
                memory.write_obj(blk::VIRTIO_BLK_S_IOERR as u8, at).map_err(|_| gone)?;
                // What is used is counted from the front (2.7.8.2).
                return Ok(u32::from(room.bytes() == 0));
            }
            Refusal::Flush => &pmem::FAILED.to_le_bytes()[..],
            Refusal::Command => &[net::VIRTIO_NET_ERR as u8],
        };
        match room.write(memory, answer) {
            Ok(()) => Ok(answer.len() as u32),
            Err(QueueError::Short { .. }) => Ok(0),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::rate_limiter::{Bucket, Limits};
    use crate::backend::tap::Tap;
    use crate::virtio::blk::{Blk, Engine};
    use crate::virtio::net::{Config, Net};
    use crate::virtio::round_trip::{blk_of, blk_request, pmem_flush, pmem_of, vhost_user_of};
    use crate::virtio::testing::{Buffer, Driver, EVENT_IDX, Slot, shared_ram};
    use crate::virtio::vhost_user::testing::{Alone, Kind};

    /// One request, and for ever none.
    const ONE: Limits = Limits {
        bandwidth: None,
        ops: Some(Bucket { size: 1, one_time_burst: 0, refill_ms: 24 * 3_600_000 }),
    };

    /// `device` with a driver of `features`, at work.
    fn rig<D: VirtioDevice>(device: D, features: u64) -> (Slot<D>, Vec<Driver>) {
        let memory = shared_ram(16 << 20);
        let sizes = device.identity().queue_sizes;
        let drivers: Vec<_> =
            (1..).zip(&sizes).map(|(at, &size)| Driver::new(&memory, at << 17, size, features)).collect();
        let mut slot = Slot::new(device, &memory);
        slot.start((0..).zip(&drivers).map(|(index, driver)| driver.queue(index)).collect(), features);
        (slot, drivers)
    }

    /// The device is taken away.
    fn dies<D: VirtioDevice>(mut slot: Slot<D>, features: u64) -> Slot<Dead> {
        let queues = slot.stop();
        let mut dead = Slot::new(Dead::of(&slot.device), &slot.memory);
        assert_eq!(dead.device.identity(), slot.device.identity());
        let spaces = [&slot.device as &dyn VirtioDevice, &dead.device].map(|device| {
            let mut space = [0; 80];
            device.config(0, &mut space);
            space
        });
        assert_eq!(spaces[0], spaces[1]);
        drop(slot);
        dead.start(queues, features);
        dead
    }

    /// As many requests as there is room for.
    fn fill(driver: &mut Driver, buffers: &[Buffer]) -> Vec<u16> {
        let mut heads = Vec::new();
        while driver.free_descriptors() >= buffers.len() {
            heads.push(driver.add(buffers));
        }
        heads.sort_unstable();
        heads
    }

    fn reaped(driver: &mut Driver) -> Vec<u16> {
        let mut heads: Vec<_> = driver.reap_all().iter().map(|used| used.head).collect();
        heads.sort_unstable();
        heads
    }

    #[test]
    fn a_disk_s_requests_fail_those_that_waited_and_those_that_come() {
        for engine in [Engine::Sync, Engine::Async] {
            let (mut slot, mut drivers) = rig(blk_of(engine, 2, ONE)(None), EVENT_IDX);
            let driver = &mut drivers[1];
            let buffers = blk_request(blk::VIRTIO_BLK_T_IN)(driver);
            let status = buffers[2];
            let heads = fill(driver, &buffers);
            slot.run_until(|disk| {
                disk.counters().rate_limiter_throttled_events.load(std::sync::atomic::Ordering::Relaxed) > 0
            });
            let mut dead = dies(slot, EVENT_IDX);
            dead.run(50);
            assert_eq!(reaped(driver), heads, "each once");
            assert_eq!(driver.read(status), [blk::VIRTIO_BLK_S_IOERR as u8]);
            for _ in 0..3 {
                let heads = fill(driver, &buffers);
                assert!(dead.run(50) < 50, "then it rests");
                assert_eq!(reaped(driver), heads);
            }
            assert!(dead.calls.take_queue() > 0 && !dead.calls.broken());
        }
    }

    #[test]
    fn its_answer_is_counted_from_the_front_and_one_without_room_for_it_is_given_back() {
        let (slot, mut drivers) = rig(blk_of(Engine::Sync, 1, Limits::default())(None), EVENT_IDX);
        let mut dead = dies(slot, EVENT_IDX);
        let driver = &mut drivers[0];
        let (header, data, room, status) =
            (driver.data(&[0; 16]), driver.room(512), driver.data(&[0; 8]), driver.room(1));
        for (buffers, written) in
            [(vec![header, data, status], 0), (vec![header, status], 1), (vec![room], 0)]
        {
            let head = driver.add(&buffers);
            dead.run(10);
            assert_eq!(driver.reap().map(|used| (used.head, used.written)), Some((head, written)));
        }
        assert!(!dead.calls.broken());
    }

    #[test]
    fn flushes_of_persistent_memory_fail() {
        let (slot, mut drivers) = rig(pmem_of(ONE)(None), EVENT_IDX);
        let driver = &mut drivers[0];
        let buffers = pmem_flush(driver);
        let heads = fill(driver, &buffers);
        let mut dead = dies(slot, EVENT_IDX);
        dead.run(50);
        assert_eq!(reaped(driver), heads);
        assert_ne!(driver.read(buffers[1]), [0; 4]);
        let short = [buffers[0], Buffer { len: 3, ..buffers[1] }];
        let head = driver.add(&short);
        dead.run(10);
        assert_eq!(driver.reap().map(|used| (used.head, used.written)), Some((head, 0)));
    }

    #[test]
    fn packets_are_lost_none_come_and_commands_fail() {
        let several = 1 << net::VIRTIO_NET_F_MQ | 1 << net::VIRTIO_NET_F_CTRL_VQ;
        for (features, commands) in [(EVENT_IDX, 2), (EVENT_IDX | several, 4)] {
            let (tap, wires) = Tap::fake(2);
            let config = Config {
                tap,
                mac: None,
                mtu: None,
                receive_limits: Limits::default(),
                transmit_limits: ONE,
                neighbour: None,
                vhost: Vec::new(),
                room: None,
            };
            let (slot, mut drivers) = rig(Net::new(config, None).unwrap(), features);
            let packet = drivers[1].data(&[0; 72]);
            let heads = fill(&mut drivers[1], &[packet]);
            let mut dead = dies(slot, features);
            assert!(wires[0].send(&[0; 72]).is_err(), "the tap is nobody's");
            let room = drivers[0].room(1526);
            fill(&mut drivers[0], &[room]);
            let (command, answer) = (drivers[commands].data(&[4, 0, 2, 0]), drivers[commands].room(1));
            let head = drivers[commands].add(&[command, answer]);
            assert!(dead.run(100) < 100);
            assert_eq!(reaped(&mut drivers[1]), heads);
            assert!(reaped(&mut drivers[0]).is_empty());
            assert_eq!(reaped(&mut drivers[commands]), [head]);
            assert_eq!(drivers[commands].read(answer), [net::VIRTIO_NET_ERR as u8]);
        }
    }

    #[test]
    fn what_another_process_has_not_done_fails_once_also_after_a_save() {
        let backend = Alone::new(Kind::of_queues(1));
        let device = vhost_user_of(&backend, 1)(None);
        drop(backend);
        let (mut slot, mut drivers) = rig(device, EVENT_IDX);
        let driver = &mut drivers[0];
        let buffers = blk_request(blk::VIRTIO_BLK_T_IN)(driver);
        let heads = fill(driver, &buffers);
        slot.run(50);
        let mut dead = dies(slot, EVENT_IDX);
        // It is saved before it has had a turn.
        let queues = dead.stop();
        let DeviceState::Dead(state) = dead.device.save() else { panic!() };
        assert_eq!(state.unfinished[0].len(), heads.len());
        let mut dead = Slot::new(Dead::new(state).unwrap(), &dead.memory);
        dead.start(queues, EVENT_IDX);
        dead.run(50);
        assert_eq!(reaped(driver), heads);
        assert_eq!(driver.read(buffers[2]), [blk::VIRTIO_BLK_S_IOERR as u8]);
        assert!(!dead.calls.broken());
    }

    #[test]
    fn a_driver_that_resets_it_has_nothing_under_way_any_more() {
        let mut dead = Dead::of(&blk_of(Engine::Sync, 1, Limits::default())(None));
        dead.state.unfinished = vec![vec![3, 5]];
        dead.reset();
        assert_eq!(dead.state.unfinished, [Vec::<u16>::new()]);
    }

    #[test]
    fn what_was_never_saved_is_refused() {
        let good = Dead::of(&blk_of(Engine::Sync, 2, Limits::default())(None) as &Blk).state;
        assert!(Dead::new(good.clone()).is_ok());
        let spoil: [fn(&mut State); 6] = [
            |state| state.identity.queue_sizes = vec![16; 1000],
            |state| state.identity.queue_sizes = vec![16, 17],
            |state| state.identity.queue_sizes = vec![16, 2048],
            |state| state.identity.config_bytes = u64::MAX,
            |state| state.unfinished = vec![vec![0; 257], Vec::new()],
            |state| state.unfinished = vec![Vec::new()],
        ];
        for spoil in spoil {
            let mut state = good.clone();
            spoil(&mut state);
            assert!(Dead::new(state.clone()).is_err(), "{state:?}");
        }
    }
}
