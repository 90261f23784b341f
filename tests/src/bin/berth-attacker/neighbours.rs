//! Attempts on other processes, on what they share, and on the network; and the neighbour that is attacked.

use std::io::{self, Write};
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};

use rustix::net::{AddressFamily, SocketType};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};

use crate::aims::Aims;
use crate::call::{at, call, negative, of};

/// What is worth reading.
const SECRET: u64 = 0x5ec2_e75e_c2e7;
const KEY: &[u8] = b"berth-secret\0";
const KEY_TYPE: &[u8] = b"user\0";
const SESSION: usize = libc::KEY_SPEC_SESSION_KEYRING as isize as usize;
const QUEUE: &[u8] = b"berth-neighbour\0";
const SHARED_BYTES: usize = 4096;
const ONLY_ITS_OWNER: usize = 0o600;

/// A process to be attacked: has a secret in its memory, in shared memory and in a queue of its user's alone. Says where,
/// and waits to be killed.
pub fn be_neighbour(aims: &Aims) -> io::Result<()> {
    let secret = Box::new(SECRET);
    let key: usize = aims.number("shared-memory")?;
    let flags = libc::IPC_CREAT as usize | ONLY_ITS_OWNER;
    let shared = call(libc::SYS_shmget, &[key, SHARED_BYTES, flags])?;
    // The queue of one that was killed before is as good.
    let flags = (libc::O_CREAT | libc::O_RDWR) as usize;
    call(libc::SYS_mq_open, &[at(QUEUE), flags, ONLY_ITS_OWNER, 0])?;
    println!("memory={}", at(&*secret));
    io::stdout().flush()?;
    // Its end is that of whoever holds the other end of standard input.
    io::copy(&mut io::stdin(), &mut io::sink())?;
    call(libc::SYS_shmctl, &[shared, libc::IPC_RMID as usize, 0])?;
    call(libc::SYS_mq_unlink, &[at(QUEUE)])?;
    drop(secret);
    Ok(())
}

/// Goes on in a session keyring with a key in it.
pub fn get_key() -> io::Result<()> {
    call(libc::SYS_keyctl, &[libc::KEYCTL_JOIN_SESSION_KEYRING as usize, 0])?;
    let payload = SECRET.to_ne_bytes();
    call(libc::SYS_add_key, &[at(KEY_TYPE), at(KEY), at(&payload), payload.len(), SESSION]).map(drop)
}

pub fn callers_key(_: &Aims) -> io::Result<()> {
    let key = call(libc::SYS_keyctl, &[libc::KEYCTL_SEARCH as usize, SESSION, at(KEY_TYPE), at(KEY), 0])?;
    let mut payload = [0_u8; size_of::<u64>()];
    call(libc::SYS_keyctl, &[libc::KEYCTL_READ as usize, key, of(&mut payload), payload.len()])?;
    is_secret(payload)
}

pub fn callers_environment(_: &Aims) -> io::Result<()> {
    match std::env::vars_os().next() {
        Some(_) => Ok(()),
        None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
    }
}

pub fn signal_neighbour(aims: &Aims) -> io::Result<()> {
    Ok(rustix::process::test_kill_process(neighbour(aims)?)?)
}

pub fn signal_root(aims: &Aims) -> io::Result<()> {
    call(libc::SYS_kill, &[aims.number("root-pid")?, 0]).map(drop)
}

/// The kernel leaves out the caller and process 1.
pub fn signal_everyone(_: &Aims) -> io::Result<()> {
    call(libc::SYS_kill, &[negative(-1), 0]).map(drop)
}

pub fn trace_neighbour(aims: &Aims) -> io::Result<()> {
    let pid: usize = aims.number("neighbour-pid")?;
    call(libc::SYS_ptrace, &[libc::PTRACE_SEIZE as usize, pid, 0, 0]).map(drop)
}

pub fn read_memory(aims: &Aims) -> io::Result<()> {
    let mut secret = [0_u8; size_of::<u64>()];
    let local = [of(&mut secret), secret.len()];
    let remote = [aims.number("memory")?, secret.len()];
    let pid = aims.number("neighbour-pid")?;
    call(libc::SYS_process_vm_readv, &[pid, at(&local), 1, at(&remote), 1, 0])?;
    is_secret(secret)
}

pub fn take_descriptor(aims: &Aims) -> io::Result<()> {
    let process = rustix::process::pidfd_open(neighbour(aims)?, PidfdFlags::empty())?;
    Ok(rustix::process::pidfd_getfd(process, 0, PidfdGetfdFlags::empty()).map(drop)?)
}

pub fn shared_memory(aims: &Aims) -> io::Result<()> {
    let shared = call(libc::SYS_shmget, &[aims.number("shared-memory")?, SHARED_BYTES, 0])?;
    call(libc::SYS_shmat, &[shared, 0, 0]).map(drop)
}

pub fn message_queue(_: &Aims) -> io::Result<()> {
    call(libc::SYS_mq_open, &[at(QUEUE), libc::O_RDWR as usize]).map(drop)
}

pub fn type_for_caller(_: &Aims) -> io::Result<()> {
    let key = b'x';
    call(libc::SYS_ioctl, &[libc::STDIN_FILENO as usize, libc::TIOCSTI as usize, at(&key)]).map(drop)
}

pub fn priority(_: &Aims) -> io::Result<()> {
    Ok(rustix::process::setpriority_process(None, -5)?)
}

pub fn realtime(_: &Aims) -> io::Result<()> {
    let lowest = 1_i32;
    call(libc::SYS_sched_setscheduler, &[0, libc::SCHED_FIFO as usize, at(&lowest)]).map(drop)
}

pub fn abstract_socket(aims: &Aims) -> io::Result<()> {
    let address = SocketAddr::from_abstract_name(aims.text("abstract-socket")?)?;
    UnixStream::connect_addr(&address).map(drop)
}

pub fn host_port(aims: &Aims) -> io::Result<()> {
    TcpStream::connect(("127.0.0.1", aims.number("host-port")?)).map(drop)
}

pub fn socket_file(aims: &Aims) -> io::Result<()> {
    UnixStream::connect(aims.text("socket-file")?).map(drop)
}

pub fn raw_socket(_: &Aims) -> io::Result<()> {
    let icmp = rustix::net::ipproto::ICMP;
    Ok(rustix::net::socket(AddressFamily::INET, SocketType::RAW, Some(icmp)).map(drop)?)
}

pub fn packet_socket(_: &Aims) -> io::Result<()> {
    Ok(rustix::net::socket(AddressFamily::PACKET, SocketType::RAW, None).map(drop)?)
}

pub fn make_tap(_: &Aims) -> io::Result<()> {
    const SET_INTERFACE: usize = 0x4004_54ca;
    const TAP_WITHOUT_HEADER: u16 = 0x1002;
    let tun = std::fs::File::options().read(true).write(true).open("dev/net/tun")?;
    // struct ifreq: a name of 16 bytes, flags, room.
    let mut request = [0_u8; 40];
    request[..9].copy_from_slice(b"berth-tap");
    request[16..18].copy_from_slice(&TAP_WITHOUT_HEADER.to_ne_bytes());
    let fd = std::os::fd::AsRawFd::as_raw_fd(&tun) as usize;
    call(libc::SYS_ioctl, &[fd, SET_INTERFACE, of(&mut request)]).map(drop)
}

fn neighbour(aims: &Aims) -> io::Result<Pid> {
    Pid::from_raw(aims.number("neighbour-pid")?).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn is_secret(bytes: [u8; 8]) -> io::Result<()> {
    match u64::from_ne_bytes(bytes) {
        SECRET => Ok(()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
