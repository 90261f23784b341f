//! The socket device between a hostile driver and programs of the host that come, talk and go as they like.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Once};

use devices::virtio::device::DeviceState;
use devices::virtio::vsock::{self, Vsock};
use libc::{c_int, c_void, siginfo_t};
use tempfile::TempDir;
use vmm_sys_util::signal::register_signal_handler;

use crate::device::drive;

pub const GUEST_CID: u64 = 3;
/// Ports above this are served by nobody.
const SERVED: u32 = 200;

pub fn vsock(data: &[u8]) {
    crate::log_to_nowhere();
    outlive_hang_ups();
    thread_local! {
        static LISTENER: (TempDir, PathBuf, UnixListener) = {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("v");
            let listener = UnixListener::bind(&path).unwrap();
            listener.set_nonblocking(true).unwrap();
            (directory, path, listener)
        };
    }
    LISTENER.with(|(_, path, listener)| {
        // Left by the run before.
        while listener.accept().is_ok() {}
        let programs = Arc::<Mutex<Vec<UnixStream>>>::default();
        let new = |state| device(listener.try_clone().unwrap(), Some(programs.clone()), state);
        drive(data, new, |what| act(&mut programs.lock().unwrap(), path, what));
    });
}

/// SIGPIPE does nothing, as in the VMM, which ignores it. Here main is not Rust's, which would.
fn outlive_hang_ups() {
    extern "C" fn nothing(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}
    static ONCE: Once = Once::new();
    ONCE.call_once(|| register_signal_handler(libc::SIGPIPE, nothing).unwrap());
}

/// The programs of the host are the other ends of its connections; without, all ports are served by nobody.
pub fn device(
    listener: UnixListener,
    programs: Option<Arc<Mutex<Vec<UnixStream>>>>,
    state: Option<DeviceState>,
) -> Vsock {
    let connect = move |port| {
        let Some(programs) = programs.as_ref().filter(|_| port < SERVED) else {
            return Err(std::io::ErrorKind::NotFound.into());
        };
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        programs.lock().unwrap().push(theirs);
        Ok(ours)
    };
    let state = state.map(|state| match state {
        DeviceState::Socket(state) => state,
        other => panic!("{other:?}"),
    });
    Vsock::new(vsock::Config { guest_cid: GUEST_CID, listener, connect: Box::new(connect) }, state).unwrap()
}

/// What a program does: the low bits say what, the high ones which.
fn act(programs: &mut Vec<UnixStream>, path: &PathBuf, what: u8) {
    let which = usize::from(what >> 4) % programs.len().max(1);
    let Some(program) = programs.get_mut(which).filter(|_| what & 0xf != 0) else {
        let Ok(mut client) = UnixStream::connect(path) else { return };
        client.set_nonblocking(true).unwrap();
        let line: &[u8] = if what >> 4 == 15 { b"HELLO\n" } else { b"CONNECT 1\n" };
        let _ = client.write(line);
        return programs.push(client);
    };
    match what & 0xf {
        1..4 => _ = program.write(&[b'h'; 300]),
        4 => _ = program.write(&vec![b'H'; 1 << 18]),
        5..8 => _ = program.read(&mut [0; 1000]),
        8 => _ = program.read(&mut vec![0; 1 << 20]),
        9 => _ = program.shutdown(Shutdown::Write),
        10 => _ = program.shutdown(Shutdown::Read),
        11 => drop(programs.remove(which)),
        _ => {}
    }
}
