//! A tap: a network interface of the host whose wire is a descriptor, or several, one for each queue. A packet is read or
//! written whole, with a virtio-net header before it.
//!
//! Opens no path and makes no interface: whoever sets one up decides its name, its owner and its addresses. Does not know
//! what is in a packet. The gate for the ioctls of linux/if_tun.h: nothing else in here is unsafe.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::backend::vectored;
use crate::virtio::queue::GuestSlice;

/// The header before each packet: struct virtio_net_hdr with `num_buffers` (VIRTIO 1.3, section 5.1.6).
pub const HEADER_BYTES: usize = 12;

/// Most queues of one tap, the kernel's MAX_TAP_QUEUES.
pub const MAX_QUEUES: usize = 256;

/// The longest name of an interface, in bytes.
pub const MAX_NAME: usize = libc::IFNAMSIZ - 1;

/// Most slices of guest memory that one packet may lie in.
pub const MAX_SLICES: usize = vectored::MAX_PACKET_SLICES;

/// A tap of which every queue is open.
pub struct Tap {
    name: String,
    queues: Vec<File>,
    /// The host's kernel cuts UDP into segments too (Linux 6.2).
    segments_udp: bool,
    /// Queues that packets are spread over, from the first.
    attached: usize,
    /// False for sockets that stand for a tap in a test.
    is_real: bool,
}

impl Tap {
    /// Attaches each of `files`, which are /dev/net/tun opened for reading and writing, as a queue of the interface
    /// `name`. One that does not exist is made, where this process may.
    pub fn attach(files: Vec<File>, name: &str) -> Result<Tap, TapError> {
        check_name(name)?;
        let several = files.len() > 1;
        for file in &files {
            let result = match set_interface(file, name, several) {
                // An interface that was made for several queues takes one only if that is said.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) && !several => {
                    set_interface(file, name, true)
                }
                result => result,
            };
            result.map_err(|error| TapError::Attach { name: name.into(), queues: files.len(), error })?;
        }
        Tap::set_up(files, name.into())
    }

    /// Takes over queues that somebody else has attached, all of one interface.
    pub fn adopt(files: Vec<File>) -> Result<Tap, TapError> {
        let mut name = None;
        for (index, file) in files.iter().enumerate() {
            let (found, flags) = interface(file).map_err(|error| TapError::NoTap { index, error })?;
            let needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
            if flags & needed != needed {
                return Err(TapError::Flags { index, flags });
            }
            if name.get_or_insert_with(|| found.clone()) != &found {
                return Err(TapError::TwoInterfaces { first: name.unwrap_or_default(), other: found });
            }
        }
        Tap::set_up(files, name.unwrap_or_default())
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many queues there are.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// One queue, to be watched.
    pub fn queue(&self, index: usize) -> Option<&File> {
        self.queues.get(index)
    }

    /// Whether the host takes and gives UDP packets to be cut into segments.
    pub fn segments_udp(&self) -> bool {
        self.segments_udp
    }

    /// The same queues, by descriptors of their own.
    pub fn try_clone(&self) -> io::Result<Tap> {
        Ok(Tap {
            name: self.name.clone(),
            queues: self.queues.iter().map(File::try_clone).collect::<io::Result<_>>()?,
            ..*self
        })
    }

    /// From now on a packet may come without its checksum, or larger than the MTU, as these TUN_F_ flags say.
    pub fn set_offloads(&self, flags: libc::c_uint) -> io::Result<()> {
        let Some(first) = self.queues.first().filter(|_| self.is_real) else { return Ok(()) };
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe { libc::ioctl(first.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
    }

    /// Spreads packets over the first `count` queues from now on; nothing comes from the others, and nothing may be
    /// written to them.
    pub fn attach_queues(&mut self, count: usize) -> io::Result<()> {
        for index in self.attached.min(count)..self.attached.max(count) {
            let flag = if index < count { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
            if let Some(queue) = self.queues.get(index).filter(|_| self.is_real) {
                set_queue(queue, flag)?;
            }
        }
        self.attached = count;
        Ok(())
    }

    /// Reads one packet from a queue, its header first, and tells its length. What does not fit into `slices` and then
    /// into `rest` is lost. [`io::ErrorKind::WouldBlock`] when there is none.
    pub fn receive(&self, queue: usize, slices: &[GuestSlice<'_>], rest: &mut [u8]) -> io::Result<usize> {
        vectored::receive(self.existing(queue)?, slices, rest)
    }

    /// Writes one packet to a queue: `head`, which begins with its header, then `slices`.
    pub fn send(&self, queue: usize, head: &[u8], slices: &[GuestSlice<'_>]) -> io::Result<usize> {
        vectored::send(self.existing(queue)?, head, slices)
    }

    fn existing(&self, queue: usize) -> io::Result<&File> {
        self.queues.get(queue).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// What every queue needs, however it came.
    fn set_up(queues: Vec<File>, name: String) -> Result<Tap, TapError> {
        let host = |error| TapError::Host { name: name.clone(), error };
        for queue in &queues {
            set_nonblocking(queue).map_err(host)?;
            set_header_size(queue).map_err(host)?;
        }
        let attached = queues.len();
        let mut tap = Tap { name: name.clone(), queues, segments_udp: false, attached, is_real: true };
        let udp = libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;
        tap.segments_udp = tap.set_offloads(udp).is_ok();
        // Until there is a driver that wants something else, packets come as they are on a wire.
        tap.set_offloads(0).map_err(host)?;
        Ok(tap)
    }
}

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    #[error(
        "{0:?} is no name of an interface: it must have from 1 to {MAX_NAME} bytes, without `/`, `%`, `:` or blanks"
    )]
    Name(String),
    #[error("the interface {name} cannot be used: {error}{}", advice(error, name, *queues))]
    Attach { name: String, queues: usize, error: io::Error },
    #[error(
        "descriptor {index} is no tap: {error}; hand over an open /dev/net/tun that is attached to an interface"
    )]
    NoTap { index: usize, error: io::Error },
    #[error(
        "descriptor {index} was attached with flags {flags:#x}; they must have IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
    )]
    Flags { index: usize, flags: libc::c_int },
    #[error("the descriptors are of two interfaces, {first} and {other}; give queues of one")]
    TwoInterfaces { first: String, other: String },
    #[error("the interface {name}: {error}")]
    Host { name: String, error: io::Error },
}

/// What to do about it.
fn advice(error: &io::Error, name: &str, queues: usize) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => format!(
            ". It does not exist in this network namespace, or it belongs to another user; make it for the user or the \
             group of this process: `ip tuntap add {name} mode tap user USER{}`",
            if queues > 1 { " multi_queue" } else { "" }
        ),
        Some(libc::EBUSY) => ". Another process uses it; a tap has one user at a time".into(),
        Some(libc::EINVAL) if queues > 1 => format!(
            ". Is it a tap that was made for {queues} queues: `ip tuntap add {name} mode tap multi_queue`?"
        ),
        Some(libc::EINVAL) => ". Is it a tap: `ip tuntap add NAME mode tap`?".into(),
        Some(libc::E2BIG) => format!(". It has no {queues} queues left"),
        _ => String::new(),
    }
}

fn check_name(name: &str) -> Result<(), TapError> {
    // The kernel's rules (dev_valid_name), and `%`, for which it would make up a number.
    let illegal = |byte: u8| b"/:%".contains(&byte) || byte.is_ascii_whitespace() || byte == 0;
    match (1..=MAX_NAME).contains(&name.len()) && name != "." && name != ".." && !name.bytes().any(illegal) {
        true => Ok(()),
        false => Err(TapError::Name(name.into())),
    }
}

/// TUNSETIFF
fn set_interface(file: &File, name: &str, several: bool) -> io::Result<()> {
    let mut request = new_request();
    for (place, byte) in request.ifr_name.iter_mut().take(MAX_NAME).zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    let several = if several { libc::IFF_MULTI_QUEUE } else { 0 };
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is; its name ends with a zero byte, since only
    // MAX_NAME of it were set.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) })
}

/// TUNGETIFF: the name and the flags.
fn interface(file: &File) -> io::Result<(String, libc::c_int)> {
    let mut request = new_request();
    // SAFETY: TUNGETIFF writes one ifreq, which `request` is.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &mut request) })?;
    let bytes = request.ifr_name.map(|byte| byte as u8);
    let name = CStr::from_bytes_until_nul(&bytes).unwrap_or_default().to_string_lossy().into_owned();
    // SAFETY: every field of the union is plain data, and the kernel has set this one.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((name, i32::from(flags as u16)))
}

/// TUNSETQUEUE
fn set_queue(file: &File, flag: libc::c_int) -> io::Result<()> {
    let mut request = new_request();
    request.ifr_ifru.ifru_flags = flag as libc::c_short;
    // SAFETY: TUNSETQUEUE reads one ifreq, which `request` is.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETQUEUE, &request) })
}

fn set_header_size(file: &File) -> io::Result<()> {
    let size = HEADER_BYTES as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which `size` is.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &size) })
}

fn set_nonblocking(file: &File) -> io::Result<()> {
    // SAFETY: F_GETFL and F_SETFL take and give numbers and touch no memory.
    unsafe {
        let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        check(flags)?;
        check(libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK))
    }
}

fn new_request() -> libc::ifreq {
    let ifr_ifru = libc::__c_anonymous_ifr_ifru { ifru_newname: [0; libc::IFNAMSIZ] };
    libc::ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(any(test, feature = "testing"))]
#[allow(clippy::unwrap_used, reason = "a fixture fails its test by panicking")]
impl Tap {
    /// A socket in place of each queue, and its other ends: what is sent there is received here.
    pub fn fake(queues: usize) -> (Tap, Vec<std::os::unix::net::UnixDatagram>) {
        use std::os::fd::OwnedFd;
        use std::os::unix::net::UnixDatagram;

        let pairs = (0..queues).map(|_| UnixDatagram::pair().unwrap());
        let (ours, theirs): (Vec<_>, Vec<_>) = pairs.unzip();
        ours.iter().chain(&theirs).for_each(|end| end.set_nonblocking(true).unwrap());
        (Tap::of(ours.into_iter().map(|end| File::from(OwnedFd::from(end))).collect()), theirs)
    }

    /// These files in place of each queue.
    pub fn of(queues: Vec<File>) -> Tap {
        let attached = queues.len();
        Tap { name: "fake".into(), queues, segments_udp: true, attached, is_real: false }
    }

    /// How many queues packets are spread over.
    pub fn attached(&self) -> usize {
        self.attached
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_no_interface_can_have_is_refused_before_the_kernel_sees_it() {
        for name in ["", ".", "..", "a/b", "tap%d", "a b", "a:1", "a\0b", "sixteen_bytes_xx"] {
            let error = Tap::attach(Vec::new(), name).err().expect(name);
            assert!(error.to_string().contains("is no name of an interface"), "{error}");
        }
        for name in ["tap0", "fifteen_bytes_x", "väth"] {
            check_name(name).unwrap();
        }
    }

    #[test]
    fn what_is_no_tap_is_not_taken_for_one() {
        let null = || File::options().read(true).write(true).open("/dev/null").unwrap();
        let error = Tap::adopt(vec![null()]).err().unwrap();
        assert!(error.to_string().contains("descriptor 0 is no tap"), "{error}");
        let error = Tap::attach(vec![null()], "tap0").err().unwrap();
        assert!(error.to_string().contains("the interface tap0 cannot be used"), "{error}");
    }

    #[test]
    fn what_is_wrong_is_said_with_what_to_do() {
        let said = |number, queues| advice(&io::Error::from_raw_os_error(number), "tap7", queues);
        assert!(said(libc::EPERM, 1).contains("ip tuntap add tap7 mode tap user USER`"));
        assert!(said(libc::EPERM, 2).contains("ip tuntap add tap7 mode tap user USER multi_queue`"));
        assert!(said(libc::EBUSY, 1).contains("Another process"));
        assert!(said(libc::EINVAL, 4).contains("for 4 queues"));
    }
}
