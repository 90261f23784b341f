//! Sockets of a guest, for its shell: run in a guest, connects programs to those of the host.
//!
//!     berth-vsock listen PORT COMMAND    run it in a shell for each connection, as its input and output
//!     berth-vsock connect PORT COMMAND   connect to the host, then the same
//!     berth-vsock echo PORT              send back what comes, on each connection until its end
//!     berth-vsock call PORT COUNT        connect COUNT times to an echo of the host, talk on all of them, say how many were
//!                                        connected and how many heard what they had said
//!
//! The address of a socket of this family is the one thing that no crate in use has; a connected one is as good as a Unix
//! stream.

use std::io::{self, Read, Write};
use std::mem;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode, Stdio};
use std::thread;

use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with};

const HOST_CID: u32 = 2;
/// VMADDR_CID_ANY
const ANY_CID: u32 = u32::MAX;
const BACKLOG: i32 = 1024;
const STACK_BYTES: usize = 64 << 10;

/// How long a call may take. Linux's own limit is 2 s, which a guest under load on a slow host exceeds.
const PATIENCE: libc::timeval = libc::timeval { tv_sec: 100, tv_usec: 0 };
/// SO_VM_SOCKETS_CONNECT_TIMEOUT (linux/vm_sockets.h).
const CONNECT_TIMEOUT: libc::c_int = 6;

/// Words of one call, its number in each of them.
const WORDS: u32 = 1000;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        ["listen", port, command] => number(port).and_then(|port| {
            serve(port, |stream| {
                drop(run(stream, command).inspect_err(|error| eprintln!("{command}: {error}")))
            })
        }),
        ["connect", port, command] => {
            number(port).and_then(call).and_then(|stream| run(stream, command)?.wait().map(drop))
        }
        ["echo", port] => number(port).and_then(|port| serve(port, echo)),
        ["call", port, count] => number(port).and_then(|port| call_often(port, number(count)?)),
        _ => {
            Err(io::Error::other("listen PORT COMMAND | connect PORT COMMAND | echo PORT | call PORT COUNT"))
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("berth-vsock: {error}");
            ExitCode::FAILURE
        }
    }
}

fn number(text: &str) -> io::Result<u32> {
    text.parse().map_err(|_| io::Error::other(format!("{text:?} is not a number")))
}

/// A new connection to a port of the host.
fn call(port: u32) -> io::Result<UnixStream> {
    let socket = socket()?;
    let length = mem::size_of_val(&PATIENCE) as libc::socklen_t;
    // SAFETY: the option takes a timeval, which PATIENCE is, and only reads it.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            CONNECT_TIMEOUT,
            std::ptr::from_ref(&PATIENCE).cast(),
            length,
        )
    };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    connect(&socket, &Address { cid: HOST_CID, port })?;
    Ok(socket.into())
}

/// Gives each connection to this port to `take`, for ever.
fn serve(port: u32, take: impl Fn(UnixStream)) -> io::Result<()> {
    let socket = socket()?;
    bind(&socket, &Address { cid: ANY_CID, port })?;
    listen(&socket, BACKLOG)?;
    println!("listening at {port}");
    loop {
        take(accept_with(&socket, SocketFlags::CLOEXEC)?.into());
    }
}

fn socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::VSOCK, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

fn run(stream: UnixStream, command: &str) -> io::Result<std::process::Child> {
    let output = stream.try_clone()?;
    let ends = (Stdio::from(OwnedFd::from(stream)), Stdio::from(OwnedFd::from(output)));
    Command::new("sh").args(["-c", command]).stdin(ends.0).stdout(ends.1).spawn()
}

fn echo(stream: UnixStream) {
    let send_back = move || {
        let ended = io::copy(&mut &stream, &mut &stream).and_then(|_| stream.shutdown(Shutdown::Write));
        // Closed when the other side has ended, too: what it has not read yet is its.
        let _ = ended.and_then(|()| (&stream).read(&mut [0]));
    };
    if let Err(error) = thread::Builder::new().stack_size(STACK_BYTES).spawn(send_back) {
        eprintln!("a connection is closed: {error}");
    }
}

fn call_often(port: u32, count: u32) -> io::Result<()> {
    let streams: Vec<_> = (0..count).map_while(|_| call(port).ok()).collect();
    let mut good = 0;
    let words: Vec<_> = (0..).map(words).take(streams.len()).collect();
    for (mut stream, words) in streams.iter().zip(&words) {
        stream.write_all(words)?;
        stream.shutdown(Shutdown::Write)?;
    }
    for (mut stream, words) in streams.iter().zip(&words) {
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard)?;
        good += u32::from(heard == *words);
    }
    println!("{} connected, {good} good", streams.len());
    Ok(())
}

fn words(caller: u32) -> Vec<u8> {
    (0..WORDS).flat_map(|word| (caller << 16 | word).to_le_bytes()).collect()
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
