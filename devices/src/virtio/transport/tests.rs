use super::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};
use super::*;
use crate::testing::FakeHost;
use crate::virtio::echo::{Echo, ODD_FEATURE};
use crate::virtio::testing::{Calls, EVENT_IDX, ram};

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

struct Rig {
    host: FakeHost,
    echo: Arc<Mutex<Echo>>,
    transport: Transport,
}

fn rig() -> Rig {
    build(Echo::default(), None).unwrap()
}

fn build(echo: Echo, state: Option<State>) -> Result<Rig, NewError> {
    let (host, echo) = (FakeHost::new(), Arc::new(Mutex::new(echo)));
    let device: SharedDevice = echo.clone();
    let shared = Shared::of(&device);
    let (interrupt, memory) = (Arc::<Calls>::default(), ram(0x1000));
    let transport = Transport::new(device, Arc::new(host.clone()), memory, interrupt, shared, state)?;
    Ok(Rig { host, echo, transport })
}

fn agree(transport: &mut Transport, features: u64) {
    for half in [0, 1] {
        *transport.driver_features_select() = half;
        transport.set_driver_features((features >> (32 * half)) as u32);
    }
    transport.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
}

#[test]
fn a_driver_adds_bits_and_takes_none_away_but_all() {
    let Rig { mut transport, .. } = rig();
    transport.set_status(ACKNOWLEDGE);
    transport.set_status(DRIVER);
    assert_eq!(transport.status(), ACKNOWLEDGE | DRIVER);
    transport.set_status(NEEDS_RESET | FAILED);
    assert_eq!(transport.status(), ACKNOWLEDGE | DRIVER | FAILED, "NEEDS_RESET is the device's");
    transport.set_status(0);
    assert_eq!(transport.status(), 0);
}

#[test]
fn a_device_that_its_driver_wants_to_run_starts_once_it_may() {
    let Rig { host, echo, mut transport } = rig();
    transport.resume();
    assert_eq!(host.watches(), 0, "no driver");
    agree(&mut transport, VERSION_1);
    transport.set_status(DRIVER_OK);
    assert!(!echo.lock().unwrap().runs(), "it may not yet");
    transport.resume();
    transport.resume();
    assert_eq!(host.watches(), 1);
    transport.pause();
    assert!(!echo.lock().unwrap().runs());
    transport.resume();
    assert!(echo.lock().unwrap().runs());
}

#[test]
fn a_start_that_fails_is_counted_and_its_driver_told() {
    let mut echo = Echo::default();
    echo.refuse = true;
    let Rig { host, mut transport, .. } = build(echo, None).unwrap();
    agree(&mut transport, VERSION_1);
    transport.set_status(DRIVER_OK);
    assert_eq!(transport.shared.start_fails(), 0, "it may not yet");
    transport.resume();
    assert_eq!((transport.shared.start_fails(), host.watches()), (1, 0));
}

#[test]
fn a_device_that_is_taken_away_is_let_go_of_and_what_takes_its_place_runs_when_it_did() {
    let Rig { host, echo, mut transport } = rig();
    transport.write_config(0, &[7; 8]);
    let gone = |echo: &Arc<Mutex<Echo>>| Arc::strong_count(echo) == 1 && !echo.lock().unwrap().runs();
    agree(&mut transport, VERSION_1);
    transport.set_status(DRIVER_OK);
    transport.resume();
    transport.take_away();
    assert!(gone(&echo) && host.watches() == 1);
    let mut data = [0; 8];
    transport.read_config(0, &mut data);
    assert_eq!(data, [7; 8]);
    transport.set_status(0);
    assert_eq!((transport.status(), host.watches()), (0, 0), "a driver that lets go of it resets it");

    // Paused, or without a driver, it is started by whoever would have started the device.
    for paused in [true, false] {
        let Rig { host, echo, mut transport } = rig();
        agree(&mut transport, VERSION_1);
        if paused {
            transport.set_status(DRIVER_OK);
            transport.resume();
            transport.pause();
        }
        transport.take_away();
        assert!(gone(&echo) && host.watches() == 0);
        transport.set_status(DRIVER_OK);
        transport.resume();
        assert_eq!(host.watches(), 1);
    }
}

#[test]
fn who_reads_or_writes_beyond_the_configuration_space_is_counted_and_changes_nothing() {
    let Rig { echo, mut transport, .. } = rig();
    transport.write_config(0, &[7; 8]);
    let mut data = [0xee; 4];
    // A part of it is there.
    transport.read_config(6, &mut data);
    assert_eq!((data, transport.shared.config_fails()), ([7, 7, 0, 0], 0));
    for (fails, offset) in (1..).zip([8, 100, u64::MAX]) {
        transport.read_config(offset, &mut data);
        assert_eq!((data, transport.shared.config_fails()), ([0; 4], fails));
    }
    for (fails, offset) in (4..).zip([8, 1 << 20, u64::MAX >> 1]) {
        transport.write_config(offset, &[9; 4]);
        assert_eq!((echo.lock().unwrap().config, transport.shared.config_fails()), ([7; 8], fails));
    }
}

#[test]
fn a_saved_agreement_that_this_device_cannot_keep_is_refused() {
    let saved = |change: fn(&mut State)| {
        let Rig { mut transport, .. } = rig();
        agree(&mut transport, VERSION_1 | ODD_FEATURE);
        transport.set_status(DRIVER_OK);
        let mut state = transport.save();
        change(&mut state);
        state
    };
    let refused = |echo, change| build(echo, Some(saved(change))).err().map(|error| error.to_string());
    assert_eq!(refused(Echo::default(), |_| {}), None);
    let mut plain = Echo::default();
    plain.features = EVENT_IDX;
    assert_eq!(
        refused(plain, |_| {}).unwrap(),
        "saved state of virtio: features is 0x100000020, must be with VERSION_1 and of those in 0x120000000"
    );
    assert!(refused(Echo::default(), |state| state.registers.driver_features = ODD_FEATURE).is_some());
    assert_eq!(
        refused(Echo::default(), |state| state.status &= !FEATURES_OK).unwrap(),
        "saved state of virtio: status is 0x7, must be with FEATURES_OK when it has DRIVER_OK"
    );
    let before = |state: &mut State| {
        state.status = ACKNOWLEDGE;
        state.registers.driver_features = 1 << 50;
    };
    assert_eq!(refused(Echo::default(), before), None, "nothing is agreed yet");
}
