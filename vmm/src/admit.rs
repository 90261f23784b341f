//! Which request is legal now, and why one is not. Pure: it sees the state and the request, nothing else, and changes
//! nothing.
//!
//! Does not look into a request's values; whether they fit together is for `config.rs`.

use api_socket::{ActionType, InstanceState, Request, VmState};

/// What is to become of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Accept,
    /// What it asks for is so already: answer as if it had been done.
    AlreadyDone,
    /// Status 400 with this text.
    Denied(&'static str),
}

/// What a request gets that is only for a guest that has started. Clients look for this text.
pub const BEFORE_START: &str = "The requested operation is not supported before starting the microVM.";
/// What a request gets that is only for a guest that has not started. Clients look for this text.
pub const AFTER_START: &str = "The requested operation is not supported after starting the microVM.";
/// What DELETE gets without PCI.
pub const NO_UNPLUG: &str =
    "Without PCI a device stays until the guest ends; start the VMM with --enable-pci to remove devices.";

use InstanceState::{NotStarted, Paused, Running};
use Verdict::{Accept, AlreadyDone, Denied};

/// Says whether `request` is legal in `state`; with `pci`, devices come and go while the guest runs.
pub fn admit(state: InstanceState, pci: bool, request: &Request) -> Verdict {
    match request {
        Request::GetInstanceInfo
        | Request::GetVersion
        | Request::GetVmConfig
        | Request::GetMachineConfig
        | Request::GetBalloon => Accept,
        // Whether there is a service that guests could read it from is for `config.rs`.
        Request::GetMmds | Request::PutMmds(_) | Request::PatchMmds(_) => Accept,

        Request::PutMachineConfig(_)
        | Request::PatchMachineConfig(_)
        | Request::PutBootSource(_)
        | Request::PutCpuConfig(_)
        | Request::PutBalloon(_)
        | Request::PutMemoryHotplug(_)
        | Request::PutConsole(_)
        | Request::PutVsock(_)
        | Request::PutEntropy(_)
        | Request::PutSerial(_)
        | Request::PutMmdsConfig(_)
        | Request::PutLogger(_)
        | Request::PutMetrics(_)
        | Request::Action(ActionType::InstanceStart) => before_start(state),

        Request::PatchDrive(_)
        | Request::PatchNetworkInterface(_)
        | Request::PatchPmem(_)
        | Request::PatchBalloon(_)
        | Request::GetBalloonStats
        | Request::PatchBalloonStats(_)
        | Request::StartBalloonHinting(_)
        | Request::StopBalloonHinting
        | Request::GetBalloonHintingStatus
        | Request::GetMemoryHotplug
        | Request::PatchMemoryHotplug(_)
        | Request::PatchConsole(_)
        | Request::PatchEntropy(_)
        | Request::Action(ActionType::FlushMetrics | ActionType::SendCtrlAltDel) => {
            after_start(state, Accept)
        }
        Request::PutDrive(_) | Request::PutNetworkInterface(_) | Request::PutPmem(_) => match pci {
            true => Accept,
            false => before_start(state),
        },
        Request::DeleteDrive(_) | Request::DeleteNetworkInterface(_) | Request::DeletePmem(_) => {
            after_start(state, if pci { Accept } else { Denied(NO_UNPLUG) })
        }

        Request::PatchVm(wanted) => match (state, wanted) {
            (NotStarted, _) => Denied(BEFORE_START),
            (Paused, VmState::Paused) | (Running, VmState::Resumed) => AlreadyDone,
            (Running, VmState::Paused) | (Paused, VmState::Resumed) => Accept,
        },
    }
}

fn before_start(state: InstanceState) -> Verdict {
    match state {
        NotStarted => Accept,
        Running | Paused => Denied(AFTER_START),
    }
}

fn after_start(state: InstanceState, then: Verdict) -> Verdict {
    match state {
        NotStarted => Denied(BEFORE_START),
        Running | Paused => then,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_socket::{
        Balloon, BalloonStartCmd, BalloonStatsUpdate, BalloonUpdate, BootSource, Console, ConsoleUpdate,
        CpuConfig, Drive, DriveUpdate, Entropy, EntropyUpdate, Logger, MachineConfig, MachineConfigUpdate,
        MemoryHotplugConfig, MemoryHotplugSizeUpdate, Metrics, MmdsConfig, NetworkInterface,
        NetworkInterfaceUpdate, Pmem, PmemUpdate, Serial, Vsock,
    };

    /// Each request with its verdict when not started, running and paused.
    fn table() -> Vec<(Request, [Verdict; 3])> {
        let any = [Accept; 3];
        let pre = [Accept, Denied(AFTER_START), Denied(AFTER_START)];
        let post = [Denied(BEFORE_START), Accept, Accept];
        let never = [Denied(BEFORE_START), Denied(NO_UNPLUG), Denied(NO_UNPLUG)];
        vec![
            (Request::GetInstanceInfo, any),
            (Request::GetVersion, any),
            (Request::GetVmConfig, any),
            (Request::GetMachineConfig, any),
            (Request::PutMachineConfig(MachineConfig::default()), pre),
            (Request::PatchMachineConfig(MachineConfigUpdate::default()), pre),
            (Request::PutBootSource(BootSource::default()), pre),
            (Request::PutCpuConfig(CpuConfig::default()), pre),
            (Request::PutDrive(Drive::default()), pre),
            (Request::PatchDrive(DriveUpdate::default()), post),
            (Request::DeleteDrive("d".to_string()), never),
            (Request::PutEntropy(Entropy::default()), pre),
            (Request::PatchEntropy(EntropyUpdate::default()), post),
            (Request::PutSerial(Serial::default()), pre),
            (Request::PutLogger(Logger::default()), pre),
            (Request::PutMetrics(Metrics::default()), pre),
            (Request::Action(ActionType::InstanceStart), pre),
            (Request::Action(ActionType::FlushMetrics), post),
            (Request::Action(ActionType::SendCtrlAltDel), post),
            (Request::PatchVm(VmState::Paused), [Denied(BEFORE_START), Accept, AlreadyDone]),
            (Request::PatchVm(VmState::Resumed), [Denied(BEFORE_START), AlreadyDone, Accept]),
            (Request::PutConsole(Console::default()), pre),
            (Request::PatchConsole(ConsoleUpdate::default()), post),
            (Request::PutNetworkInterface(NetworkInterface::default()), pre),
            (Request::PatchNetworkInterface(NetworkInterfaceUpdate::default()), post),
            (Request::DeleteNetworkInterface("d".to_string()), never),
            (Request::PutPmem(Pmem::default()), pre),
            (Request::PatchPmem(PmemUpdate::default()), post),
            (Request::DeletePmem("d".to_string()), never),
            (Request::PutVsock(Vsock::default()), pre),
            (Request::GetMmds, any),
            (Request::PutMmds(Default::default()), any),
            (Request::PatchMmds(Default::default()), any),
            (Request::PutMmdsConfig(MmdsConfig::default()), pre),
            (Request::GetBalloon, any),
            (Request::PutBalloon(Balloon::default()), pre),
            (Request::PatchBalloon(BalloonUpdate::default()), post),
            (Request::GetBalloonStats, post),
            (Request::PatchBalloonStats(BalloonStatsUpdate::default()), post),
            (Request::StartBalloonHinting(BalloonStartCmd::default()), post),
            (Request::StopBalloonHinting, post),
            (Request::GetBalloonHintingStatus, post),
            (Request::GetMemoryHotplug, post),
            (Request::PutMemoryHotplug(MemoryHotplugConfig::default()), pre),
            (Request::PatchMemoryHotplug(MemoryHotplugSizeUpdate::default()), post),
        ]
    }

    #[test]
    fn each_request_has_its_verdict_in_each_state() {
        for (request, verdicts) in table() {
            for (state, verdict) in [NotStarted, Running, Paused].into_iter().zip(verdicts) {
                assert_eq!(admit(state, false, &request), verdict, "{state:?} {request:?}");
            }
        }
    }

    #[test]
    fn with_pci_devices_come_and_go_while_the_guest_runs() {
        let id = || "d".to_string();
        let put = [
            Request::PutDrive(Drive::default()),
            Request::PutNetworkInterface(NetworkInterface::default()),
            Request::PutPmem(Pmem::default()),
        ];
        let delete =
            [Request::DeleteDrive(id()), Request::DeleteNetworkInterface(id()), Request::DeletePmem(id())];
        for state in [NotStarted, Running, Paused] {
            assert!(put.iter().all(|put| admit(state, true, put) == Accept));
            assert!(delete.iter().all(|delete| admit(state, true, delete) == after_start(state, Accept)));
        }
        let is_other = |request: &Request| !put.contains(request) && !delete.contains(request);
        for (request, verdicts) in table().into_iter().filter(|(request, _)| is_other(request)) {
            for (state, verdict) in [NotStarted, Running, Paused].into_iter().zip(verdicts) {
                assert_eq!(admit(state, true, &request), verdict, "{state:?} {request:?}");
            }
        }
    }

    #[test]
    fn the_table_has_every_request_once() {
        let rows = table();
        for (row, (request, _)) in rows.iter().enumerate() {
            assert!(!rows[..row].iter().any(|(earlier, _)| earlier == request), "{request:?}");
        }
        // A request that is new does not compile here until it has a place, and then a row.
        let place = |request: &Request| match request {
            Request::GetInstanceInfo => 0,
            Request::GetVersion => 1,
            Request::GetVmConfig => 2,
            Request::GetMachineConfig => 3,
            Request::PutMachineConfig(_) => 4,
            Request::PatchMachineConfig(_) => 5,
            Request::PutBootSource(_) => 6,
            Request::PutCpuConfig(_) => 7,
            Request::PutDrive(_) => 8,
            Request::PatchDrive(_) => 9,
            Request::DeleteDrive(_) => 10,
            Request::PutEntropy(_) => 11,
            Request::PutSerial(_) => 12,
            Request::PutLogger(_) => 13,
            Request::PutMetrics(_) => 14,
            Request::Action(ActionType::InstanceStart) => 15,
            Request::Action(ActionType::FlushMetrics) => 16,
            Request::Action(ActionType::SendCtrlAltDel) => 17,
            Request::PatchVm(VmState::Paused) => 18,
            Request::PatchVm(VmState::Resumed) => 19,
            Request::PutConsole(_) => 20,
            Request::PutNetworkInterface(_) => 21,
            Request::PatchNetworkInterface(_) => 22,
            Request::PutPmem(_) => 23,
            Request::PatchPmem(_) => 24,
            Request::PutVsock(_) => 25,
            Request::GetMmds => 26,
            Request::PutMmds(_) => 27,
            Request::PatchMmds(_) => 28,
            Request::PutMmdsConfig(_) => 29,
            Request::GetBalloon => 30,
            Request::PutBalloon(_) => 31,
            Request::PatchBalloon(_) => 32,
            Request::GetBalloonStats => 33,
            Request::PatchBalloonStats(_) => 34,
            Request::StartBalloonHinting(_) => 35,
            Request::StopBalloonHinting => 36,
            Request::GetBalloonHintingStatus => 37,
            Request::DeleteNetworkInterface(_) => 38,
            Request::DeletePmem(_) => 39,
            Request::PatchConsole(_) => 40,
            Request::GetMemoryHotplug => 41,
            Request::PutMemoryHotplug(_) => 42,
            Request::PatchMemoryHotplug(_) => 43,
            Request::PatchEntropy(_) => 44,
        };
        let mut places: Vec<_> = rows.iter().map(|(request, _)| place(request)).collect();
        places.sort_unstable();
        assert_eq!(places, (0..45).collect::<Vec<_>>());
    }

    #[test]
    fn the_texts_are_those_that_clients_look_for() {
        assert_eq!(AFTER_START, "The requested operation is not supported after starting the microVM.");
        assert_eq!(BEFORE_START, "The requested operation is not supported before starting the microVM.");
    }
}
