//! A tap as a descriptor: it is there as long as somebody holds it, so that none outlives its guest.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// linux/if_tun.h
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Makes a tap of this name, which no other interface may have.
///
/// # Errors
/// Those of /dev/net/tun; a name that is too long.
pub fn make(name: &str) -> io::Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: an ifreq is of integers and bytes, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte stays zero, as the kernel wants the name to end.
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the name of an interface has at most 15 bytes",
        ));
    }
    request.ifr_name.iter_mut().zip(name.bytes()).for_each(|(place, byte)| *place = byte as libc::c_char);
    request.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is, and the descriptor is that of the open `file`.
    let outcome = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
}
