//! The socket at which the agent listens: AF_VSOCK, as soon as the guest has a driver for it.
//!
//! The driver is built in, or loaded by the image's own means when they find the device. Where nobody does, the agent asks for
//! it, at growing distances.

use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketAddrAny, SocketFlags, SocketType, bind, listen, socket_with};

use agent::protocol::PORT;

use crate::changes::Changes;
use crate::kernel::{self, Kernel};
use crate::root;

const HOST_CID: u32 = 2;
/// VMADDR_CID_ANY
const ANY_CID: u32 = u32::MAX;

/// Calls that wait to be taken.
const BACKLOG: i32 = 32;

/// Between two attempts: at first so long, then twice as long each time, and no longer than the last.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(60);

const DRIVER: &str = "vmw_vsock_virtio_transport";

/// The number of the socket device in the VIRTIO specification, as /sys shows it.
const DEVICE: &str = "0x0013";

/// Listens, however long it takes until that is possible. Without a socket device that is for ever, asleep.
pub fn listener(kernel: Kernel<'static>) -> OwnedFd {
    let changes = Changes::new();
    let mut pause = FIRST_PAUSE;
    loop {
        let has_device = has_device(kernel);
        if has_device
            && let Ok(socket) = try_listen()
            && has_driver(kernel)
        {
            return socket;
        }
        if has_device && !has_driver(kernel) {
            load(kernel);
            if has_driver(kernel) {
                continue;
            }
        }
        // The device, its driver, or the module of the sockets as such.
        changes.wait(if has_device { "vsock" } else { "virtio" }, pause);
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

fn has_device(kernel: Kernel) -> bool {
    kernel::names(kernel.sys, "bus/virtio/devices").iter().any(|name| {
        kernel::read(kernel.sys, &format!("bus/virtio/devices/{name}/device")).is_ok_and(|id| id == DEVICE)
    })
}

fn has_driver(kernel: Kernel) -> bool {
    kernel::names(kernel.sys, "bus/virtio/drivers").iter().any(|name| name == DRIVER)
}

/// Has the guest's own modprobe load the driver, if it has one. In a thread of its own, for that enters the root.
fn load(kernel: Kernel<'static>) {
    let load = move || {
        root::enter(kernel)?;
        let mut modprobe = Command::new("modprobe");
        modprobe.args(["-q", DRIVER]).env_clear().env("PATH", crate::exec::PATH).current_dir("/");
        modprobe.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        modprobe.status().map(drop)
    };
    // That it is not there, or has no such module, shows in that there is no driver.
    if let Ok(thread) = thread::Builder::new().spawn(load) {
        let _: thread::Result<io::Result<()>> = thread.join();
    }
}

/// By the first call the kernel loads the module of these sockets.
fn try_listen() -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &Address { cid: ANY_CID, port: PORT })?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Whether who called is the host. A program of the guest's own, of any user, can call too: by the loopback address, or by the
/// guest's own on older kernels.
pub fn is_host(caller: &SocketAddrAny) -> bool {
    if caller.address_family() != AddressFamily::VSOCK {
        return false;
    }
    let cid = |address: *const SocketAddrOpaque, length: SocketAddrLen| {
        // SAFETY: an address of this family, and it is read only if it is whole; not aligned as this type has to be.
        let read = || unsafe { address.cast::<libc::sockaddr_vm>().read_unaligned() };
        (length as usize >= mem::size_of::<libc::sockaddr_vm>()).then(|| read().svm_cid)
    };
    // SAFETY: `cid` uses what it gets within the call and no more of it than `length` says.
    unsafe { caller.with_sockaddr(cid) == Some(HOST_CID) }
}

struct Address {
    cid: u32,
    port: u32,
}

// SAFETY: what `f` gets is valid for the call: `address` lives until its end and is as long as said.
unsafe impl SocketAddrArg for Address {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        // All fields named but for the reserved ones, whose names are not the same everywhere.
        // SAFETY: a structure of integers, of which zero is a value.
        let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_cid = self.cid;
        address.svm_port = self.port;
        f(std::ptr::from_ref(&address).cast(), mem::size_of_val(&address) as SocketAddrLen)
    }
}
