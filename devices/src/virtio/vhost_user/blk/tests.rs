use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use proptest::prelude::*;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::Memory;
use crate::virtio::testing::{Driver, EVENT_IDX, Slot, shared_ram};
use crate::virtio::vhost_user::frontend::{FIRST_WAIT, STOP_LIMIT};
use crate::virtio::vhost_user::message::{F_PROTOCOL_FEATURES, protocol, request};
use crate::virtio::vhost_user::ring::BASE;
use crate::virtio::vhost_user::testing::{
    Backend, CAPACITY, FLUSH, Kind, Place, VERSION_1, answer, calls, rings_file,
};

const SIZE: u16 = 16;

struct Rig {
    slot: Slot<VhostUserBlk>,
    drivers: Vec<Driver>,
    place: Place,
    rings_file: File,
    backend: Backend,
}

fn introduce(kind: Kind, place: &Place, rings_file: &File) -> Result<(Session, Backend), Lost> {
    place.open(true);
    let mut session = Session::begin(place.connect().unwrap(), CONFIG_BYTES)?;
    let mut backend = Backend::new(kind, place.called().unwrap(), rings_file.try_clone().unwrap());
    for _ in 0..100 {
        backend.talk();
        session.receive()?;
        if session.is_introduced() {
            return Ok((session, backend));
        }
    }
    Err(Lost::Silent(Duration::ZERO))
}

fn device(
    kind: Kind,
    place: &Place,
    rings_file: &File,
    queues: u16,
    state: Option<State>,
) -> Result<(VhostUserBlk, Backend), Lost> {
    let (session, backend) = introduce(kind, place, rings_file)?;
    let connect = place.clone();
    let config = Config {
        name: "drive".into(),
        session,
        connect: Box::new(move || connect.connect()),
        calls: calls(),
        rings: rings_file.try_clone().unwrap(),
        cache: Cache::Writeback,
        queues,
    };
    Ok((VhostUserBlk::new(config, state)?, backend))
}

fn rig_of(kind: Kind, queues: u16) -> Rig {
    let (place, rings_file) = (Place::default(), rings_file());
    let (device, backend) = device(kind, &place, &rings_file, queues, None).unwrap();
    let memory = shared_ram(1 << 20);
    let queues = device.identity().queue_sizes.len() as u64;
    let drivers =
        (0..queues).map(|index| Driver::new(&memory, 0x1000 + 0x4000 * index, SIZE, EVENT_IDX)).collect();
    Rig { slot: Slot::new(device, &memory), drivers, place, rings_file, backend }
}

fn rig() -> Rig {
    let mut rig = rig_of(Kind::default(), 1);
    rig.start();
    rig
}

impl Rig {
    fn start(&mut self) {
        let queues = (0..).zip(&self.drivers).map(|(index, driver)| driver.queue(index)).collect();
        self.start_with(queues);
    }

    fn start_with(&mut self, queues: Vec<Queue>) {
        self.slot.start(queues, EVENT_IDX | VERSION_1 | FLUSH);
        self.settle();
    }

    /// Lets both sides do what they can do now.
    fn settle(&mut self) {
        for _ in 0..4 {
            self.slot.run(100);
            self.backend.talk();
        }
    }

    fn request(&mut self) -> u16 {
        let (header, status) = (self.drivers[0].data(&[0; 16]), self.drivers[0].room(1));
        let head = self.drivers[0].add(&[header, status]);
        self.settle();
        head
    }

    fn used(&mut self) -> Vec<u16> {
        self.settle();
        self.drivers[0].reap_all().into_iter().map(|used| used.head).collect()
    }

    /// The back-end dies.
    fn die(&mut self) {
        self.place.open(false);
        let (nobody, _) = UnixStream::pair().unwrap();
        self.backend.socket = nobody;
        self.settle();
    }

    /// Another one is there: waits until it was called and has everything.
    fn revive(&mut self, kind: Kind) {
        self.place.open(true);
        let (place, rings_file) = (self.place.clone(), self.rings_file.try_clone().unwrap());
        let mut backend = None;
        self.slot.run_until(|_| {
            backend = backend.take().or_else(|| {
                Some(Backend::new(kind.clone(), place.called()?, rings_file.try_clone().unwrap()))
            });
            backend.as_mut().is_some_and(|backend| {
                backend.talk();
                backend.heard.contains(&request::SET_VRING_ENABLE) || backend.gone
            })
        });
        self.backend = backend.unwrap();
        self.settle();
    }

    fn counters(&self) -> Arc<Counters> {
        self.slot.device.counters()
    }

    fn lost(&self) -> u64 {
        self.counters().backend_lost_count.load(Ordering::SeqCst)
    }
}

#[test]
fn the_driver_sees_what_the_back_end_says_of_itself_as_far_as_it_is_known() {
    let unknown = 1 << 50 | 1 << spec::VIRTIO_BLK_F_CONFIG_WCE;
    let kind = Kind { features: Kind::default().features | unknown, ..Kind::default() };
    let rig = rig_of(kind, 1);
    let identity = rig.slot.device.identity();
    assert_eq!(identity.features, VERSION_1 | FLUSH | EVENT_IDX);
    assert_eq!(identity.queue_sizes, [QUEUE_SIZE]);
    let mut sectors = [0; 8];
    rig.slot.device.config(0, &mut sectors);
    assert_eq!(u64::from_le_bytes(sectors), CAPACITY);

    let mut queues = [0; 2];
    for (wanted, offered, got) in [(1, 4, 1), (3, 4, 3), (8, 4, 4), (200, u64::MAX, MAX_QUEUES)] {
        let mq = 1 << spec::VIRTIO_BLK_F_MQ;
        let features = Kind::default().features | mq;
        let rig = rig_of(Kind { features, queues: offered, ..Kind::default() }, wanted);
        let identity = rig.slot.device.identity();
        assert_eq!(identity.queue_sizes.len(), usize::from(got));
        assert_eq!(identity.features & mq != 0, got > 1);
        rig.slot.device.config(NUM_QUEUES as u64, &mut queues);
        assert_eq!(u16::from_le_bytes(queues), got);
    }
}

#[test]
fn memory_and_rings_are_handed_over_and_requests_go_there_and_back() {
    let mut rig = rig();
    let backend = &mut rig.backend;
    // The device's events are not the back-end's.
    assert_eq!(backend.agreed, VERSION_1 | FLUSH | F_PROTOCOL_FEATURES);
    assert_eq!(backend.table, (2, 2), "the guest's memory and that of the rings");
    let ring = &backend.rings[&0];
    assert_eq!((ring.size, ring.base), (SIZE, 0));
    assert_eq!(ring.places[0], 0x1000, "the descriptors are the driver's");
    assert!(ring.places[1] >= BASE && ring.places[2] >= BASE);

    // More than the ring has, in any order.
    for round in 0..20 {
        let heads: Vec<_> = (0..5).map(|_| rig.request()).collect();
        assert!(rig.backend.was_kicked(0));
        assert_eq!(rig.backend.take(0), heads);
        assert!(rig.used().is_empty());
        for head in heads.iter().rev() {
            rig.backend.give_back(0, u32::from(*head), round);
        }
        rig.slot.run(100);
        let used = rig.drivers[0].reap_all();
        assert_eq!(
            used.iter().map(|used| used.head).collect::<Vec<_>>(),
            heads.into_iter().rev().collect::<Vec<_>>()
        );
        assert!(used.iter().all(|used| used.written == round));
        assert!(rig.slot.calls.take_queue() > 0);
    }
    assert!(!rig.slot.calls.broken());
    assert_eq!(rig.lost(), 0);
    assert_eq!(rig.slot.run(100), 0, "and then it rests");
}

#[test]
fn a_back_end_that_wants_no_kicks_gets_none() {
    let mut rig = rig();
    assert!(rig.backend.was_kicked(0), "at the start");
    let used = GuestAddress(rig.backend.rings[&0].places[1]);
    rig.backend.rings[&0].memory.as_ref().unwrap().write_obj(1u16, used).unwrap();
    let head = rig.request();
    assert!(!rig.backend.was_kicked(0));
    assert_eq!(rig.backend.take(0), [head]);
}

#[test]
fn what_a_dead_back_end_has_not_done_the_next_one_gets_in_the_old_order_and_nothing_else() {
    let mut rig = rig();
    // Some that were done before, so that no number stands for its place.
    for _ in 0..5 {
        let head = rig.request();
        rig.backend.take(0);
        rig.backend.give_back(0, head.into(), 0);
        assert_eq!(rig.used(), [head]);
    }
    let heads: Vec<_> = (0..6).map(|_| rig.request()).collect();
    rig.backend.take(0);
    for done in [4, 1] {
        rig.backend.give_back(0, heads[done].into(), 0);
    }
    assert_eq!(rig.used(), [heads[4], heads[1]]);
    // Done at the very last, and nobody was told.
    rig.backend.give_back(0, heads[2].into(), 0);
    rig.die();
    assert_eq!(rig.used(), [heads[2]]);
    assert_eq!(rig.lost(), 1);
    // While there is none, the driver goes on.
    let late = rig.request();

    rig.revive(Kind::default());
    let left = [heads[0], heads[3], heads[5], late];
    assert_eq!(rig.backend.take(0), left);
    assert!(rig.backend.was_kicked(0));
    for head in left {
        rig.backend.give_back(0, head.into(), 0);
    }
    assert_eq!(rig.used(), left);
    assert_eq!(rig.counters().requests_repeated_count.load(Ordering::SeqCst), 4);
    assert!(!rig.slot.calls.broken());
}

#[test]
fn it_is_called_again_and_again_with_rests_between_and_then_heard() {
    let mut rig = rig();
    let head = rig.request();
    rig.die();
    // Longer than several waits, the first of which is short.
    let (begin, mut calls) = (Instant::now(), 0);
    while begin.elapsed() < 8 * FIRST_WAIT || calls < 2 {
        calls += rig.slot.run(10);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!((2..=4).contains(&calls), "{calls} in {:?}", begin.elapsed());
    // Two that die in the middle of it.
    for lie in [request::GET_FEATURES, request::SET_MEM_TABLE] {
        let kind = Kind { lie: Some((lie, b"nonsense nonsense".to_vec())), ..Kind::default() };
        rig.revive(kind);
    }
    rig.revive(Kind::default());
    assert_eq!(rig.backend.take(0), [head]);
}

#[test]
fn a_pause_in_the_middle_of_an_introduction_does_not_begin_it_anew() {
    let mut rig = rig();
    let head = rig.request();
    rig.die();
    rig.place.open(true);
    let (place, mut called) = (rig.place.clone(), None);
    rig.slot.run_until(|_| {
        called = called.take().or_else(|| place.called());
        called.is_some()
    });
    rig.backend = Backend::new(Kind::default(), called.unwrap(), rig.rings_file.try_clone().unwrap());
    // Between two pauses it answers one question; the last one is heard in a pause.
    for heard_in_a_pause in [false, false, true] {
        let queues = rig.slot.stop();
        rig.backend.talk();
        if heard_in_a_pause {
            assert!(rig.slot.device.config_asked(Instant::now()).is_ok());
        }
        rig.slot.start(queues, EVENT_IDX | VERSION_1 | FLUSH);
        rig.slot.run(100);
    }
    rig.settle();
    assert!(rig.place.called().is_none(), "it was called once");
    assert_eq!(rig.backend.take(0), [head]);
    rig.backend.give_back(0, head.into(), 0);
    assert_eq!(rig.used(), [head]);
    assert_eq!(rig.lost(), 1);
}

#[test]
fn another_back_end_must_have_what_the_driver_was_offered_and_may_have_another_capacity() {
    let mut rig = rig();
    rig.die();
    let bad = [
        Kind { features: VERSION_1 | F_PROTOCOL_FEATURES, ..Kind::default() },
        Kind { features: VERSION_1 | FLUSH, ..Kind::default() },
        Kind { protocol: protocol::MQ, ..Kind::default() },
        Kind { queues: 0, ..Kind::default() },
    ];
    for kind in bad {
        rig.revive(kind);
        assert!(rig.backend.gone && !rig.backend.heard.contains(&request::SET_MEM_TABLE));
    }
    assert_eq!(rig.slot.calls.config.load(Ordering::SeqCst), 0);
    rig.revive(Kind {
        capacity: CAPACITY + 1,
        features: Kind::default().features | 1 << 40,
        ..Kind::default()
    });
    assert!(!rig.backend.gone);
    assert_eq!(rig.slot.calls.config.load(Ordering::SeqCst), 1);
    let mut sectors = [0; 8];
    rig.slot.device.config(0, &mut sectors);
    assert_eq!(u64::from_le_bytes(sectors), CAPACITY + 1);
}

#[test]
fn one_that_is_stopped_waits_for_what_is_under_way_and_begins_anew() {
    let mut rig = rig();
    for _ in 0..3 {
        let head = rig.request();
        let queues = std::thread::scope(|scope| {
            let backend = &mut rig.backend;
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(50));
                for head in backend.take(0) {
                    backend.give_back(0, head.into(), 0);
                }
                while !backend.heard.contains(&request::GET_VRING_BASE) {
                    backend.talk();
                }
                backend.heard.clear();
            });
            rig.slot.stop()
        });
        assert_eq!(rig.drivers[0].reap_all().len(), 1, "{head}");
        assert_eq!(queues[0].ring.next_avail(), queues[0].ring.next_used());
        assert!(rig.slot.stop().is_empty());
        rig.start_with(queues);
    }
    assert_eq!(rig.lost(), 0);
}

#[test]
fn one_that_hangs_holds_a_stop_up_for_so_long_and_its_requests_are_kept() {
    let mut rig = rig();
    let head = rig.request();
    assert_eq!(rig.backend.take(0), [head]);
    let begin = Instant::now();
    let queues = rig.slot.stop();
    assert!((STOP_LIMIT..2 * STOP_LIMIT).contains(&begin.elapsed()), "{:?}", begin.elapsed());
    assert_eq!(rig.lost(), 1);

    // Saved and restored meanwhile, over there.
    let DeviceState::VhostUserBlock(state) = rig.slot.device.save() else { panic!("another state") };
    let (device, backend) = device(Kind::default(), &rig.place, &rig.rings_file, 1, Some(state)).unwrap();
    rig.slot.device = device;
    rig.backend = backend;
    rig.start_with(queues);
    assert_eq!(rig.backend.take(0), [head]);
    rig.backend.give_back(0, head.into(), 0);
    assert_eq!(rig.used(), [head]);

    // Gone: nothing is waited for.
    rig.request();
    rig.die();
    let begin = Instant::now();
    let queues = rig.slot.stop();
    assert!(begin.elapsed() < STOP_LIMIT / 3, "{:?}", begin.elapsed());
    // Another driver knows of no request.
    rig.slot.device.reset();
    rig.start_with(queues);
    rig.revive(Kind::default());
    assert!(rig.backend.take(0).is_empty());
}

#[test]
fn a_state_that_no_device_had_does_not_start() {
    for unfinished in [vec![SIZE], vec![3, 3]] {
        let (place, rings_file) = (Place::default(), rings_file());
        let state = State { unfinished: vec![unfinished], config: Vec::new() };
        let (mut device, _backend) = device(Kind::default(), &place, &rings_file, 1, Some(state)).unwrap();
        let memory = shared_ram(1 << 16);
        let queues = vec![Driver::new(&memory, 0x1000, SIZE, 0).queue(0)];
        let active = Active {
            memory,
            queues,
            features: VERSION_1,
            interrupt: Arc::<crate::virtio::testing::Calls>::default(),
        };
        device.start(active).unwrap_err();
        assert!(device.stop().is_empty());
    }
}

#[test]
fn rings_in_memory_that_cannot_be_given_away_are_refused() {
    let (place, rings_file) = (Place::default(), rings_file());
    let (mut device, _backend) = device(Kind::default(), &place, &rings_file, 1, None).unwrap();
    let start = |device: &mut VhostUserBlk, memory: Memory, base| {
        let queues = vec![Driver::new(&memory, base, SIZE, 0).queue(0)];
        device.start(Active {
            memory,
            queues,
            features: VERSION_1,
            interrupt: Arc::<crate::virtio::testing::Calls>::default(),
        })
    };
    let error = start(&mut device, crate::virtio::testing::ram(1 << 16), 0x1000).unwrap_err();
    assert!(error.to_string().contains("shared memory"), "{error}");
    for base in [(1 << 16) - 240, 1 << 16, 1 << 50] {
        start(&mut device, shared_ram(1 << 16), base).unwrap_err();
    }
}

#[test]
fn a_driver_that_breaks_the_rules_needs_a_reset_and_the_back_end_does_not_see_it() {
    let mut rig = rig();
    let head = rig.request();
    rig.backend.take(0);
    rig.drivers[0].offer(head);
    rig.settle();
    assert!(rig.slot.calls.broken(), "twice the same");
    assert!(rig.backend.take(0).is_empty());

    let mut rig = self::rig();
    rig.drivers[0].offer(SIZE);
    rig.settle();
    assert!(rig.slot.calls.broken(), "beyond the table");
    assert!(rig.backend.take(0).is_empty());
    assert_eq!(rig.lost(), 0);
}

#[test]
fn a_back_end_that_gives_back_what_it_has_not_is_let_go_and_the_requests_are_kept() {
    type Lie = fn(&mut Backend, u16);
    let lies: [Lie; 4] = [
        |backend, _| backend.give_back(0, 7777, 0),
        |backend, _| backend.give_back(0, 0x1_0000, 0),
        |backend, _| backend.set_used(0, 2),
        |backend, head| backend.give_back(0, u32::from(head) + 1, 0),
    ];
    for lie in lies {
        let mut rig = rig();
        let head = rig.request();
        rig.backend.take(0);
        lie(&mut rig.backend, head);
        assert!(rig.used().is_empty());
        assert_eq!(rig.lost(), 1);
        rig.revive(Kind::default());
        assert_eq!(rig.backend.take(0), [head]);
        assert!(!rig.slot.calls.broken());
    }
}

#[test]
fn a_back_end_that_refuses_memory_or_says_what_nobody_asked_is_let_go() {
    for lie in [
        answer(request::SET_MEM_TABLE, &1u64.to_ne_bytes()),
        answer(request::GET_FEATURES, &0u64.to_ne_bytes()),
        answer(request::SET_MEM_TABLE, &[0; 4]),
        vec![0xff; 300],
    ] {
        let mut rig = rig_of(Kind::default(), 1);
        rig.backend.kind.lie = Some((request::SET_MEM_TABLE, lie));
        rig.start();
        assert_eq!(rig.lost(), 1);
    }
    let mut rig = rig();
    rig.backend.socket.write_all(&answer(request::GET_CONFIG, &[0; 72])).unwrap();
    rig.settle();
    assert_eq!(rig.lost(), 1, "nobody asked");
}

#[test]
fn one_without_confirmations_is_believed() {
    let mut rig = rig_of(Kind { protocol: protocol::CONFIG, ..Kind::default() }, 1);
    rig.start();
    assert!(!rig.backend.heard.contains(&request::GET_QUEUE_NUM));
    let head = rig.request();
    assert_eq!(rig.backend.take(0), [head]);
    rig.backend.give_back(0, head.into(), 0);
    assert_eq!(rig.used(), [head]);
}

#[test]
fn the_configuration_is_read_again_when_asked_and_the_driver_is_told_when_it_runs() {
    let mut rig = rig();
    rig.backend.kind.capacity = 1;
    rig.slot.device.ask_config().unwrap();
    assert_eq!(rig.slot.device.config_asked(Instant::now()).ok(), Some(false));
    rig.settle();
    assert_eq!(rig.slot.device.config_asked(Instant::now()).ok(), Some(true));
    assert_eq!(rig.slot.calls.config.load(Ordering::SeqCst), 1);
    let mut sectors = [0; 8];
    rig.slot.device.config(0, &mut sectors);
    assert_eq!(u64::from_le_bytes(sectors), 1);

    let queues = std::thread::scope(|scope| {
        let backend = &mut rig.backend;
        scope.spawn(|| {
            while !backend.heard.contains(&request::GET_VRING_BASE) {
                backend.talk();
            }
        });
        rig.slot.stop()
    });
    rig.slot.device.ask_config().unwrap();
    rig.slot.device.ask_config().unwrap();
    rig.backend.talk();
    assert_eq!(rig.slot.device.config_asked(Instant::now()).ok(), Some(true));
    assert_eq!(rig.slot.calls.config.load(Ordering::SeqCst), 1);
    rig.start_with(queues);
    assert_eq!(rig.slot.calls.config.load(Ordering::SeqCst), 2);

    rig.die();
    rig.slot.device.ask_config().unwrap_err();
    assert_eq!(rig.counters().cfg_fails.load(Ordering::SeqCst), 1);
}

#[test]
fn a_back_end_that_says_that_its_configuration_has_changed_is_asked_for_it() {
    let mut rig = rig();
    rig.backend.kind.capacity = 77;
    let call = |flags: u32, request: u32, size: u32| [request, flags, size].map(u32::to_ne_bytes).concat();
    let mut calls = UnixStream::from(rig.backend.calls.take().unwrap());
    calls.write_all(&call(0b1001, 2, 0)).unwrap();
    rig.settle();
    let mut reply = [0; 20];
    calls.read_exact(&mut reply).unwrap();
    assert_eq!(&reply[..], answer(2, &[0; 8]));
    let mut sectors = [0; 8];
    rig.slot.device.config(0, &mut sectors);
    assert_eq!(u64::from_le_bytes(sectors), 77);
    assert_eq!(rig.slot.calls.config.load(Ordering::SeqCst), 1);

    // What is unknown or nonsense, and more of it than anybody answers, is heard and nothing comes of it.
    calls.write_all(&call(0b1, 99, 0)).unwrap();
    calls.write_all(&[0xff; 5000]).unwrap();
    rig.settle();
    calls.set_nonblocking(true).unwrap();
    let flood = call(0b1001, 99, 0).repeat(100);
    for _ in 0..1000 {
        let _ = calls.write(&flood);
        rig.slot.run(10);
    }
    assert_eq!(rig.slot.calls.config.load(Ordering::SeqCst), 1);
    let head = rig.request();
    assert_eq!(rig.backend.take(0), [head]);
    assert_eq!(rig.lost(), 0);
}

#[test]
fn a_back_end_that_cannot_be_used_is_refused_when_it_is_made() {
    let refused = |kind| {
        let error = device(kind, &Place::default(), &rings_file(), 1, None).err().unwrap();
        error.to_string()
    };
    assert!(refused(Kind { features: FLUSH | F_PROTOCOL_FEATURES, ..Kind::default() }).contains("VERSION_1"));
    assert!(refused(Kind { features: VERSION_1, ..Kind::default() }).contains("protocol features"));
    assert!(refused(Kind { protocol: 0, ..Kind::default() }).contains("CONFIG"));
    assert!(refused(Kind { queues: 0, ..Kind::default() }).contains("queues"));
    let short = Some((request::GET_CONFIG, answer(request::GET_CONFIG, &[0; 12 + 36])));
    assert!(refused(Kind { lie: short, ..Kind::default() }).contains("48 bytes"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a back-end says at whatever point, and whatever it writes into the ring: no panic, and the device still
    /// stops and starts.
    #[test]
    fn nothing_that_a_back_end_says_breaks_more_than_its_connection(
        about in prop::sample::select(vec![
            request::GET_FEATURES, request::GET_PROTOCOL_FEATURES, request::GET_QUEUE_NUM, request::GET_CONFIG,
            request::SET_FEATURES, request::SET_MEM_TABLE, request::SET_VRING_ENABLE,
        ]),
        honest_header in any::<bool>(),
        said in prop::collection::vec(any::<u8>(), 0..400),
        ring in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let lie = if honest_header { answer(about, &said) } else { said };
        let kind = Kind { lie: Some((about, lie)), ..Kind::default() };
        let (place, rings_file) = (Place::default(), rings_file());
        let _ = device(kind.clone(), &place, &rings_file, 1, None).map(drop);

        let mut rig = rig();
        rig.request();
        let used = GuestAddress(rig.backend.rings[&0].places[1]);
        rig.backend.rings[&0].memory.as_ref().unwrap().write_slice(&ring, used).unwrap();
        rustix::io::write(rig.backend.rings[&0].call.as_ref().unwrap(), &1u64.to_ne_bytes()).unwrap();
        rig.settle();
        rig.die();
        rig.revive(kind);
        rig.die();
        rig.slot.stop();
    }
}
