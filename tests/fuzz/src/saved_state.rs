//! Saved state from a damaged or hostile file: refused, or a device that runs.

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use devices::backend::rate_limiter::Limits;
use devices::backend::tap::Tap;
use devices::pci::Function;
use devices::testing::FakeHost;
use devices::virtio::balloon::{self, Balloon, Ram};
use devices::backend::disk::Format;
use devices::virtio::blk::{self, Blk, Cache, Engine};
use devices::virtio::console::{self, Console, Size};
use devices::virtio::dead::Dead;
use devices::virtio::device::DeviceState;
use devices::virtio::mem::{self, Mem};
use devices::virtio::net::{self, Net};
use devices::virtio::pci::{self, Pci};
use devices::virtio::pmem::{self, Pmem};
use devices::virtio::rng::{self, Rng};
use devices::virtio::testing;
use devices::virtio::transport::{NewError, SharedDevice};
use devices::virtio::vsock::Vsock;

const RAM: usize = 1 << 16;
const TURNS: usize = 8;

pub fn saved_state(data: &[u8]) {
    crate::log_to_nowhere();
    let Ok(state) = postcard::from_bytes::<pci::State>(data) else { return };
    let Some(device) = restored(state.transport.device.clone()) else { return };
    let host = FakeHost::new();
    let memory = testing::ram(RAM);
    let Ok(mut pci) = Pci::new(device, Arc::new(host.clone()), memory, Some(state)) else { return };
    pci.resume();
    host.run(TURNS);
    let mut data = [0; 4];
    for register in (0..4096).step_by(4) {
        pci.read_config(register, &mut data);
    }
    pci.pause();
    let _ = postcard::to_stdvec(&pci.save()).unwrap();
}

/// How many kinds of devices [`fresh`] knows.
pub const KINDS: u8 = 8;

/// A device of the kind with this number.
pub fn fresh(kind: u8) -> SharedDevice {
    match kind % KINDS {
        0 => Arc::new(Mutex::new(console(None))),
        1 => Arc::new(Mutex::new(rng(None))),
        2 => Arc::new(Mutex::new(blk(None))),
        3 => Arc::new(Mutex::new(net(None))),
        4 => Arc::new(Mutex::new(vsock(None))),
        5 => Arc::new(Mutex::new(balloon(None))),
        6 => Arc::new(Mutex::new(pmem(None))),
        _ => Arc::new(Mutex::new(mem(None).unwrap())),
    }
}

/// The device that was saved so. `None` for what none can have been saved as.
pub fn restored(state: DeviceState) -> Option<SharedDevice> {
    Some(match state {
        DeviceState::Balloon(state) => Arc::new(Mutex::new(balloon(Some(state)))),
        DeviceState::Block(state) => Arc::new(Mutex::new(blk(Some(state)))),
        DeviceState::Console(state) => Arc::new(Mutex::new(console(Some(state)))),
        DeviceState::Dead(state) => Arc::new(Mutex::new(Dead::new(state).ok()?)),
        DeviceState::Entropy(state) => Arc::new(Mutex::new(rng(Some(state)))),
        DeviceState::Memory(state) => Arc::new(Mutex::new(mem(Some(state)).ok()?)),
        DeviceState::Network(state) => Arc::new(Mutex::new(net(Some(state)))),
        DeviceState::PersistentMemory(state) => Arc::new(Mutex::new(pmem(Some(state)))),
        DeviceState::VhostUserBlock(state) => Arc::new(Mutex::new(crate::vhost_user::device(Some(state)))),
        socket @ DeviceState::Socket(_) => Arc::new(Mutex::new(vsock(Some(socket)))),
    })
}

pub fn vsock(state: Option<DeviceState>) -> Vsock {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("v")).unwrap();
    crate::vsock::device(listener, None, state)
}

pub fn balloon(state: Option<balloon::State>) -> Balloon {
    let config = balloon::Config {
        target_pages: 1,
        deflate_on_oom: true,
        statistics_interval: Some(std::time::Duration::from_secs(1)),
        hinting: true,
        reporting: true,
        ram: Ram { regions: vec![0..RAM as u64], page: balloon::PAGE },
    };
    Balloon::new(config, state).unwrap()
}

pub fn blk(state: Option<blk::State>) -> Blk {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 15).unwrap();
    let limits = Limits::default();
    let config = blk::Config {
        file,
        format: Format::Raw,
        read_only: false,
        cache: Cache::Writeback,
        engine: Engine::Sync,
        queues: 1,
        serial: "fuzz".into(),
        limits,
    };
    Blk::new(config, state).unwrap()
}

pub fn console(state: Option<console::State>) -> Console {
    let size = Size { columns: 80, rows: 25 };
    let input = Some(File::open("/dev/zero").unwrap().into());
    let limits = Limits::default();
    let output = || Box::new(std::io::sink());
    let port = console::PortConfig { name: "p".into(), size: None, input: None, output: output(), limits };
    let config = console::Config { input, output: output(), size, limits, ports: vec![port] };
    Console::new(config, state).unwrap()
}

pub fn rng(state: Option<rng::State>) -> Rng {
    Rng::new(rng::Config { limits: Limits::default() }, state).unwrap()
}

pub fn net(state: Option<net::State>) -> Net {
    let (tap, ends) = Tap::fake(2);
    // They wait, although nobody is there any more.
    ends.iter().for_each(|end| _ = end.send(&[0; 72]));
    let limits = Limits::default();
    let config = net::Config {
        tap,
        mac: None,
        mtu: None,
        receive_limits: limits,
        transmit_limits: limits,
        neighbour: None,
        vhost: Vec::new(),
        room: None,
    };
    Net::new(config, state).unwrap()
}

pub fn mem(state: Option<mem::State>) -> Result<Mem, NewError> {
    let (memory, start, block) = (testing::ram(RAM), 1 << 32, 0x1000);
    let region = start..start + 16 * block;
    let config = mem::Config {
        region: region.clone(),
        slot_size: 4 * block,
        block_size: block,
        page: block,
        backing: Box::new(testing::Lent::new(&memory, &region, 4 * block)),
        memory,
    };
    Mem::new(config, state)
}

pub fn pmem(state: Option<pmem::State>) -> Pmem {
    let file = tempfile::tempfile().unwrap();
    let config = pmem::Config { name: String::new(), file, range: 0..0, limits: Limits::default() };
    Pmem::new(config, state).unwrap()
}
