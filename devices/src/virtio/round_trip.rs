//! One property of every virtio device: stopped, saved, built again and started, at any moment and as often as one likes,
//! it gives each request back exactly once.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::backend::disk::Format;
use crate::backend::rate_limiter::{Bucket, Limits};
use crate::backend::tap::Tap;
use crate::virtio::balloon::{self, Balloon, Ram};
use crate::virtio::blk::{self, Blk, Engine};
use crate::virtio::console::{self, Console, Size};
use crate::virtio::dead::Dead;
use crate::virtio::device::{DeviceState, VirtioDevice};
use crate::virtio::mem::{self, Mem};
use crate::virtio::net::{self, Net};
use crate::virtio::pmem::{self, Pmem};
use crate::virtio::queue::{Queue, QueueState};
use crate::virtio::rng::{self, Rng};
use crate::virtio::testing::{self, Buffer, Driver, EVENT_IDX, Slot};
use crate::virtio::vhost_user::blk as vhost_user;
use crate::virtio::vhost_user::session::Session;
use crate::virtio::vhost_user::testing::{Alone, Kind, calls};
use crate::virtio::vsock::packet::{HOST_CID, Header, op};
use crate::virtio::vsock::{self, Vsock};

/// Keeps the queue with this index full of `request` while the device comes and goes.
fn nothing_is_lost<D: VirtioDevice>(
    new: impl Fn(Option<DeviceState>) -> D,
    index: usize,
    request: impl Fn(&mut Driver) -> Vec<Buffer>,
) {
    nothing_is_lost_with(0, new, index, request);
}

/// The same with a driver that agrees on these features.
fn nothing_is_lost_with<D: VirtioDevice>(
    agreed: u64,
    new: impl Fn(Option<DeviceState>) -> D,
    index: usize,
    request: impl Fn(&mut Driver) -> Vec<Buffer>,
) {
    for features in [agreed, agreed | EVENT_IDX] {
        let memory = testing::shared_ram(16 << 20);
        let mut slot = Slot::new(new(None), &memory);
        let identity = slot.device.identity();
        let bases = (1..).map(|queue| queue << 20);
        let sizes = identity.queue_sizes.iter().zip(bases);
        let mut drivers: Vec<Driver> =
            sizes.map(|(&size, base)| Driver::new(&memory, base, size, features)).collect();
        let buffers = request(&mut drivers[index]);
        slot.start((0..).zip(&drivers).map(|(index, driver)| driver.queue(index)).collect(), features);

        let mut outstanding = HashSet::new();
        for _ in 0..6 {
            fill(&mut drivers[index], &buffers, &mut outstanding);
            slot.run(1);
            reap(&mut drivers[index], &mut outstanding);
            fill(&mut drivers[index], &buffers, &mut outstanding);
            slot = move_on(slot, &new, &mut drivers, features);
            assert_eq!(slot.device.identity(), identity);
        }
        slot.run_until(|_| {
            reap(&mut drivers[index], &mut outstanding);
            outstanding.is_empty()
        });
        assert!(!slot.calls.broken());
    }
}

/// Ends this device and carries on with another one made from its state alone.
fn move_on<D: VirtioDevice>(
    mut slot: Slot<D>,
    new: &impl Fn(Option<DeviceState>) -> D,
    drivers: &mut [Driver],
    features: u64,
) -> Slot<D> {
    let queues: Vec<QueueState> = slot.stop().iter().map(Queue::save).collect();
    assert!(slot.stop().is_empty(), "a second stop has nothing to give");
    let saved = slot.device.save();
    let bytes = postcard::to_stdvec(&(&saved, &queues)).unwrap();
    let memory = slot.memory.clone();
    drop(slot);

    let (state, queues): (DeviceState, Vec<QueueState>) = postcard::from_bytes(&bytes).unwrap();
    assert_eq!(state, saved);
    let mut slot = Slot::new(new(Some(state)), &memory);
    assert_eq!(slot.device.save(), saved);
    let restore = |((index, driver), state): ((u16, &mut Driver), &QueueState)| {
        driver.kick = EventFd::new(EFD_NONBLOCK).unwrap();
        Queue::restore(index, state, driver.kick.try_clone().unwrap()).unwrap()
    };
    slot.start((0..).zip(drivers).zip(&queues).map(restore).collect(), features);
    slot
}

fn fill(driver: &mut Driver, buffers: &[Buffer], outstanding: &mut HashSet<u16>) {
    while driver.free_descriptors() >= buffers.len() {
        assert!(outstanding.insert(driver.add(buffers)));
    }
}

fn reap(driver: &mut Driver, outstanding: &mut HashSet<u16>) {
    for used in driver.reap_all() {
        assert!(outstanding.remove(&used.head), "chain {} was given back twice", used.head);
    }
}

fn a_few_at_a_time() -> Limits {
    Limits { bandwidth: None, ops: Some(Bucket { size: 50, one_time_burst: 20, refill_ms: 5 }) }
}

pub fn blk_of(engine: Engine, queues: u16, limits: Limits) -> impl Fn(Option<DeviceState>) -> Blk {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    blk_on(file, || Format::Raw, engine, queues, limits)
}

/// A disk on this file.
pub fn blk_on(
    file: File,
    format: fn() -> Format,
    engine: Engine,
    queues: u16,
    limits: Limits,
) -> impl Fn(Option<DeviceState>) -> Blk {
    move |state| {
        let config = blk::Config {
            file: file.try_clone().unwrap(),
            format: format(),
            read_only: false,
            cache: blk::Cache::Writeback,
            engine,
            queues,
            serial: "disk".into(),
            limits,
        };
        let state = state.map(|state| match state {
            DeviceState::Block(state) => state,
            other => panic!("{other:?}"),
        });
        Blk::new(config, state).unwrap()
    }
}

pub fn blk_request(kind: u32) -> impl Fn(&mut Driver) -> Vec<Buffer> {
    move |driver| {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        let data = (kind == VIRTIO_BLK_T_IN).then(|| driver.room(512));
        let mut buffers = vec![driver.data(&header)];
        buffers.extend(data);
        buffers.push(driver.room(1));
        buffers
    }
}

#[test]
fn blk() {
    nothing_is_lost(blk_of(Engine::Sync, 1, Limits::default()), 0, blk_request(VIRTIO_BLK_T_IN));
}

#[test]
fn blk_that_is_held_back() {
    nothing_is_lost(blk_of(Engine::Sync, 1, a_few_at_a_time()), 0, blk_request(VIRTIO_BLK_T_FLUSH));
}

#[test]
fn blk_with_requests_in_the_ring() {
    nothing_is_lost(blk_of(Engine::Async, 1, Limits::default()), 0, blk_request(VIRTIO_BLK_T_IN));
}

#[test]
fn blk_with_flushes_in_the_ring_that_are_held_back() {
    nothing_is_lost(blk_of(Engine::Async, 1, a_few_at_a_time()), 0, blk_request(VIRTIO_BLK_T_FLUSH));
}

#[test]
fn blk_of_several_queues() {
    nothing_is_lost(blk_of(Engine::Async, 3, a_few_at_a_time()), 2, blk_request(VIRTIO_BLK_T_IN));
}

/// A disk of `queues` queues that another process has.
pub fn vhost_user_of(
    backend: &Alone,
    queues: u16,
) -> impl Fn(Option<DeviceState>) -> vhost_user::VhostUserBlk {
    let (place, rings) = (backend.place.clone(), backend.rings_file.try_clone().unwrap());
    move |state| {
        let connect = place.clone();
        let config = vhost_user::Config {
            name: "drive".into(),
            session: Session::open(place.connect().unwrap(), vhost_user::CONFIG_BYTES).unwrap(),
            connect: Box::new(move || connect.connect()),
            calls: calls(),
            rings: rings.try_clone().unwrap(),
            cache: blk::Cache::Writeback,
            queues,
        };
        let state = state.map(|state| match state {
            DeviceState::VhostUserBlock(state) => state,
            other => panic!("{other:?}"),
        });
        vhost_user::VhostUserBlk::new(config, state).unwrap()
    }
}

#[test]
fn blk_of_another_process() {
    for (queues, index) in [(1, 0), (3, 2)] {
        let backend = Alone::new(Kind::of_queues(queues));
        nothing_is_lost(vhost_user_of(&backend, queues), index, blk_request(VIRTIO_BLK_T_IN));
    }
}

/// What is left of the device that `new` makes.
pub fn dead_of<D: VirtioDevice>(
    new: impl Fn(Option<DeviceState>) -> D,
) -> impl Fn(Option<DeviceState>) -> Dead {
    move |state| match state {
        None => Dead::of(&new(None)),
        Some(DeviceState::Dead(state)) => Dead::new(state).unwrap(),
        Some(other) => panic!("{other:?}"),
    }
}

#[test]
fn what_was_taken_away() {
    let blk = blk_of(Engine::Sync, 3, Limits::default());
    nothing_is_lost(dead_of(blk), 2, blk_request(VIRTIO_BLK_T_IN));
    nothing_is_lost(dead_of(pmem_of(Limits::default())), 0, pmem_flush);
    nothing_is_lost(dead_of(net_of(Limits::default())), 1, |driver| vec![driver.data(&[0; 72])]);
}

pub fn rng_of(limits: Limits) -> impl Fn(Option<DeviceState>) -> Rng {
    move |state| {
        let state = state.map(|state| match state {
            DeviceState::Entropy(state) => state,
            other => panic!("{other:?}"),
        });
        Rng::new(rng::Config { limits }, state).unwrap()
    }
}

#[test]
fn rng() {
    nothing_is_lost(rng_of(Limits::default()), 0, |driver| vec![driver.room(64)]);
}

#[test]
fn rng_that_is_held_back() {
    nothing_is_lost(rng_of(a_few_at_a_time()), 0, |driver| vec![driver.room(64)]);
}

pub fn pmem_of(limits: Limits) -> impl Fn(Option<DeviceState>) -> Pmem {
    let file = tempfile::tempfile().unwrap();
    move |state| {
        let config = pmem::Config {
            name: "data".into(),
            file: file.try_clone().unwrap(),
            range: 1 << 32..1 << 33,
            limits,
        };
        let state = state.map(|state| match state {
            DeviceState::PersistentMemory(state) => state,
            other => panic!("{other:?}"),
        });
        Pmem::new(config, state).unwrap()
    }
}

pub fn pmem_flush(driver: &mut Driver) -> Vec<Buffer> {
    vec![driver.data(&[0; 4]), driver.room(4)]
}

#[test]
fn pmem() {
    nothing_is_lost(pmem_of(Limits::default()), 0, pmem_flush);
}

#[test]
fn pmem_that_is_held_back() {
    nothing_is_lost(pmem_of(a_few_at_a_time()), 0, pmem_flush);
}

fn console(state: Option<DeviceState>) -> Console {
    console_with(Vec::new(), state)
}

fn console_of_two_ports(state: Option<DeviceState>) -> Console {
    let (name, size, output) = ("second".into(), None, Box::new(std::io::sink()));
    console_with(
        vec![console::PortConfig { name, size, input: None, output, limits: Limits::default() }],
        state,
    )
}

fn console_with(ports: Vec<console::PortConfig>, state: Option<DeviceState>) -> Console {
    let config = console::Config {
        input: Some(File::open("/dev/zero").unwrap().into()),
        output: Box::new(std::io::sink()),
        size: Size { columns: 80, rows: 25 },
        limits: Limits::default(),
        ports,
    };
    let state = state.map(|state| match state {
        DeviceState::Console(state) => state,
        other => panic!("{other:?}"),
    });
    Console::new(config, state).unwrap()
}

#[test]
fn console_input() {
    nothing_is_lost(console, 0, |driver| vec![driver.room(100)]);
}

#[test]
fn console_output() {
    nothing_is_lost(console, 1, |driver| vec![driver.data(b"a line\n")]);
}

#[test]
fn output_of_a_further_port_of_a_console() {
    nothing_is_lost(console_of_two_ports, 5, |driver| vec![driver.data(b"a line\n")]);
}

#[test]
fn control_messages_of_a_console() {
    nothing_is_lost(console_of_two_ports, 3, |driver| vec![driver.data(&[0; 8])]);
}

/// A device whose tap never runs out of packets and takes some or none.
fn net_of(limits: Limits) -> impl Fn(Option<DeviceState>) -> Net {
    let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    // More than the device can be asked for; it ends with its socket.
    std::thread::spawn(move || while theirs.send(&[0; 72]).is_ok() {});
    let wire = File::from(OwnedFd::from(ours));
    move |state| {
        let config = net::Config {
            tap: Tap::of(vec![wire.try_clone().unwrap()]),
            mac: None,
            mtu: None,
            receive_limits: limits,
            transmit_limits: limits,
            neighbour: None,
            vhost: Vec::new(),
            room: None,
        };
        let state = state.map(|state| match state {
            DeviceState::Network(state) => state,
            other => panic!("{other:?}"),
        });
        Net::new(config, state).unwrap()
    }
}

#[test]
fn net_receive() {
    nothing_is_lost(net_of(Limits::default()), 0, |driver| vec![driver.room(1526)]);
}

#[test]
fn net_receive_that_is_held_back() {
    nothing_is_lost(net_of(a_few_at_a_time()), 0, |driver| vec![driver.room(1526)]);
}

#[test]
fn net_transmit() {
    nothing_is_lost(net_of(Limits::default()), 1, |driver| vec![driver.data(&[0; 72])]);
}

#[test]
fn net_transmit_that_is_held_back() {
    nothing_is_lost(net_of(a_few_at_a_time()), 1, |driver| vec![driver.data(&[0; 72])]);
}

fn vsock(state: Option<DeviceState>) -> Vsock {
    let directory = tempfile::tempdir().unwrap();
    let config = vsock::Config {
        guest_cid: 3,
        listener: UnixListener::bind(directory.path().join("v.sock")).unwrap(),
        connect: Box::new(|_| Err(std::io::ErrorKind::NotFound.into())),
    };
    let state = state.map(|state| match state {
        DeviceState::Socket(state) => state,
        other => panic!("{other:?}"),
    });
    Vsock::new(config, state).unwrap()
}

#[test]
fn vsock_packets() {
    nothing_is_lost(vsock, 1, |driver| {
        // One that has no answer: nobody takes answers here.
        let header = Header { src_cid: 3, dst_cid: HOST_CID, op: op::RST, ..Header::default() };
        vec![driver.data(&header.to_bytes())]
    });
}

fn balloon(state: Option<DeviceState>) -> Balloon {
    let config = balloon::Config {
        target_pages: 100,
        deflate_on_oom: true,
        statistics_interval: Some(std::time::Duration::from_millis(1)),
        hinting: true,
        reporting: true,
        ram: Ram { regions: std::iter::once(8 << 20..16 << 20).collect(), page: balloon::PAGE },
    };
    let state = state.map(|state| match state {
        DeviceState::Balloon(state) => state,
        other => panic!("{other:?}"),
    });
    Balloon::new(config, state).unwrap()
}

#[test]
fn balloon_inflate() {
    nothing_is_lost(balloon, 0, |driver| vec![driver.data(&2500u32.to_le_bytes())]);
}

#[test]
fn balloon_deflate() {
    nothing_is_lost(balloon, 1, |driver| vec![driver.data(&2500u32.to_le_bytes())]);
}

/// One of whose blocks a request plugs and the next finds plugged.
pub fn memory_device(state: Option<DeviceState>) -> Mem {
    let memory = testing::ram(1 << 20);
    let region = 1 << 30..(1 << 30) + (16 << 12);
    let config = mem::Config {
        region: region.clone(),
        slot_size: 4 << 12,
        block_size: 1 << 12,
        page: 1 << 12,
        backing: Box::new(testing::Lent::new(&memory, &region, 4 << 12)),
        memory,
    };
    let state = state.map(|state| match state {
        DeviceState::Memory(state) => state,
        other => panic!("{other:?}"),
    });
    let is_new = state.is_none();
    let mut device = Mem::new(config, state).unwrap();
    if is_new {
        device.set_requested(8 << 12);
    }
    device
}

#[test]
fn memory_that_is_plugged() {
    nothing_is_lost_with(mem::F_UNPLUGGED_INACCESSIBLE, memory_device, 0, |driver| {
        let mut request = [0; 24];
        request[8..16].copy_from_slice(&(1u64 << 30).to_le_bytes());
        request[16] = 3;
        vec![driver.data(&request), driver.room(10)]
    });
}

/// A request that unplugs everything.
pub fn unplug_all() -> [u8; 24] {
    let mut request = [0; 24];
    request[0] = 2;
    request
}

#[test]
fn memory_that_is_unplugged() {
    let request = |driver: &mut Driver| vec![driver.data(&unplug_all()), driver.room(10)];
    nothing_is_lost_with(mem::F_UNPLUGGED_INACCESSIBLE, memory_device, 0, request);
}
