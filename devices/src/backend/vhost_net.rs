//! The kernel's own back-end of a network device: /dev/vhost-net, opened once for each pair of a receive and a transmit
//! queue. A thread of the kernel then moves packets between the driver's rings and a tap, and this process is not asked.
//!
//! Opens no path, and does not know what is in a packet. Its requests are made here and not by the crate `vhost`, whose type
//! opens the device itself, so that none can be handed over, and has no way to make it let go of descriptors. The gate for the ioctls of linux/vhost.h: nothing else in here is
//! unsafe.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{
    _IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl, ioctl_expr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref,
};

use crate::backend::vhost::{Region, Ring};

/// The queues of a pair, by the kernel's numbers.
pub const RECEIVE: usize = 0;
pub const TRANSMIT: usize = 1;

/// Most regions of guest memory that the kernel takes, unless its module was told otherwise (max_mem_regions).
const MAX_REGIONS: usize = 64;

/// The kernel's back-end of one queue pair. It belongs to this process, with a thread of the kernel's in it, until the last
/// clone is closed.
pub struct VhostNet {
    way: Way,
    features: u64,
}

enum Way {
    Kernel(File),
    #[cfg(any(test, feature = "testing"))]
    Fake(std::sync::Arc<std::sync::Mutex<fake::Pair>>),
}

/// Whom a queue's descriptors are for. The kernel has its own references to them.
pub struct Ends<'a> {
    /// The driver writes it, and the kernel looks at the ring.
    pub kick: &'a EventFd,
    /// The kernel writes it, and the driver looks at the ring.
    pub call: &'a EventFd,
    /// The kernel writes it when the driver has broken the rules.
    pub error: &'a EventFd,
}

impl VhostNet {
    /// Takes over an open /dev/vhost-net.
    pub fn new(file: File) -> Result<VhostNet, VhostNetError> {
        let mut features = 0;
        // SAFETY: VHOST_GET_FEATURES writes 64 bits, which `features` has.
        let result = unsafe { ioctl_with_mut_ref(&file, GET_FEATURES, &mut features) };
        check(result).map_err(VhostNetError::NoVhost)?;
        // Others, such as vhost-vsock, answer too.
        if features & OWN_HEADERS == 0 {
            return Err(VhostNetError::NotNet);
        }
        own(&file)?;
        Ok(VhostNet { way: Way::Kernel(file), features })
    }

    /// The feature bits that the kernel knows of.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The same by a descriptor of its own.
    pub fn try_clone(&self) -> io::Result<VhostNet> {
        let way = match &self.way {
            Way::Kernel(file) => Way::Kernel(file.try_clone()?),
            #[cfg(any(test, feature = "testing"))]
            Way::Fake(pair) => Way::Fake(pair.clone()),
        };
        Ok(VhostNet { way, ..*self })
    }

    /// The kernel does what the driver has agreed on, as far as it is the kernel's business.
    pub fn set_features(&self, features: u64) -> io::Result<()> {
        // With its own headers the kernel would take the tap's for the packet.
        let features = features & self.features & !OWN_HEADERS;
        match &self.way {
            // SAFETY: VHOST_SET_FEATURES reads 64 bits, which `features` has.
            Way::Kernel(file) => check(unsafe { ioctl_with_ref(file, SET_FEATURES, &features) }),
            #[cfg(any(test, feature = "testing"))]
            Way::Fake(pair) => fake::with(pair, |pair| pair.features = features),
        }
    }

    /// The kernel finds guest memory here from now on, also while it serves queues, and reaches no other.
    pub fn set_memory(&self, regions: &[Region]) -> io::Result<()> {
        if regions.len() > MAX_REGIONS {
            let text =
                format!("guest memory has {} parts; vhost-net knows {MAX_REGIONS} at most", regions.len());
            return Err(io::Error::other(text));
        }
        let mut table = MemoryTable {
            count: regions.len() as u32,
            padding: 0,
            regions: [MemoryRegion::default(); MAX_REGIONS],
        };
        for (place, region) in table.regions.iter_mut().zip(regions) {
            *place = MemoryRegion { guest: region.guest, size: region.size, host: region.host, flags: 0 };
        }
        match &self.way {
            // SAFETY: VHOST_SET_MEM_TABLE reads `count` regions behind the header, which `table` has. The kernel reaches the
            // host addresses later, with the rights of this process: guest memory, which `Region` keeps for as long as the
            // guest has it, and which no reference of ours points into.
            Way::Kernel(file) => check(unsafe { ioctl_with_ptr(file, SET_MEM_TABLE, &table) }),
            #[cfg(any(test, feature = "testing"))]
            Way::Fake(pair) => fake::with(pair, |pair| pair.memory = regions.to_vec()),
        }
    }

    /// From here on the kernel serves a queue of the driver's with a queue of a tap.
    pub fn start(&self, queue: usize, ring: &Ring, ends: &Ends, tap: &File) -> io::Result<()> {
        match &self.way {
            Way::Kernel(file) => {
                let state = |number: u16| State { queue: queue as u32, number: number.into() };
                let descriptor = |fd: RawFd| Descriptor { queue: queue as u32, fd };
                // SAFETY: VHOST_SET_VRING_NUM and VHOST_SET_VRING_BASE read one vhost_vring_state, which `state` makes.
                check(unsafe { ioctl_with_ref(file, SET_VRING_NUM, &state(ring.size)) })?;
                // SAFETY: as above.
                check(unsafe { ioctl_with_ref(file, SET_VRING_BASE, &state(ring.next_available)) })?;
                let address = Address {
                    queue: queue as u32,
                    flags: 0,
                    descriptors: ring.descriptors,
                    used: ring.used,
                    available: ring.available,
                    log: 0,
                };
                // SAFETY: VHOST_SET_VRING_ADDR reads one vhost_vring_addr, which `address` is. The kernel writes to the used
                // ring there: `Ring::of` has found all three in guest memory, which no reference of ours points into.
                check(unsafe { ioctl_with_ref(file, SET_VRING_ADDR, &address) })?;
                set_descriptor(file, SET_VRING_CALL, descriptor(ends.call.as_raw_fd()))?;
                set_descriptor(file, SET_VRING_ERR, descriptor(ends.error.as_raw_fd()))?;
                set_descriptor(file, NET_SET_BACKEND, descriptor(tap.as_raw_fd()))?;
                // The kick last: it may be there already, and whoever has no tap yet does nothing about it.
                set_descriptor(file, SET_VRING_KICK, descriptor(ends.kick.as_raw_fd()))
            }
            #[cfg(any(test, feature = "testing"))]
            Way::Fake(pair) => fake::start(pair, queue, ring, ends),
        }
    }

    /// The kernel stops serving a queue. When this returns, it is done with what it had taken.
    pub fn detach(&self, queue: usize) -> io::Result<()> {
        match &self.way {
            Way::Kernel(file) => {
                set_descriptor(file, NET_SET_BACKEND, Descriptor { queue: queue as u32, fd: NONE })
            }
            #[cfg(any(test, feature = "testing"))]
            Way::Fake(pair) => fake::with(pair, |pair| pair.serves[queue] = false),
        }
    }

    /// Takes a queue back that is detached: the available index of the chain that would have been next. The kernel lets go of
    /// its descriptors.
    pub fn take_back(&self, queue: usize) -> io::Result<u16> {
        match &self.way {
            Way::Kernel(file) => {
                for request in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
                    set_descriptor(file, request, Descriptor { queue: queue as u32, fd: NONE })?;
                }
                let mut state = State { queue: queue as u32, number: 0 };
                // SAFETY: VHOST_GET_VRING_BASE reads and writes one vhost_vring_state, which `state` is.
                check(unsafe { ioctl_with_mut_ref(file, GET_VRING_BASE, &mut state) })?;
                Ok(state.number as u16)
            }
            #[cfg(any(test, feature = "testing"))]
            Way::Fake(pair) => fake::take_back(pair, queue),
        }
    }
}

/// The kernel works for this process from now on, in whose address space it finds guest memory.
fn own(file: &File) -> Result<(), VhostNetError> {
    // SAFETY: VHOST_SET_OWNER takes no argument.
    match check(unsafe { ioctl(file, SET_OWNER) }) {
        // It has an owner. That may be us: a descriptor that was handed over is configured anew.
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let mut state = State { queue: RECEIVE as u32, number: 0 };
            // SAFETY: VHOST_GET_VRING_BASE reads and writes one vhost_vring_state, which `state` is.
            check(unsafe { ioctl_with_mut_ref(file, GET_VRING_BASE, &mut state) })
                .map_err(|_| VhostNetError::Taken)
        }
        result => result.map_err(VhostNetError::Owner),
    }
}

/// Why there is no back-end.
#[derive(Debug, thiserror::Error)]
pub enum VhostNetError {
    #[error("it is no vhost device: {0}; hand over an open /dev/vhost-net")]
    NoVhost(io::Error),
    #[error("it is another vhost device than that of networks; hand over an open /dev/vhost-net")]
    NotNet,
    #[error("it works for another process; open /dev/vhost-net anew for each queue pair of each guest")]
    Taken,
    #[error(
        "the kernel cannot start its thread: {0}. It counts as one of this process: see its limits (pids.max of the \
         control group, RLIMIT_NPROC)"
    )]
    Owner(io::Error),
}

/// struct vhost_vring_state
#[repr(C)]
struct State {
    queue: u32,
    number: u32,
}

/// struct vhost_vring_file
#[repr(C)]
struct Descriptor {
    queue: u32,
    fd: RawFd,
}

/// struct vhost_vring_addr
#[repr(C)]
struct Address {
    queue: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// struct vhost_memory with its regions
#[repr(C)]
struct MemoryTable {
    count: u32,
    padding: u32,
    regions: [MemoryRegion; MAX_REGIONS],
}

/// struct vhost_memory_region
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct MemoryRegion {
    guest: u64,
    size: u64,
    host: u64,
    flags: u64,
}

/// VHOST_FILE_UNBIND
const NONE: RawFd = -1;
/// VHOST_NET_F_VIRTIO_NET_HDR: the kernel puts a header before packets of a socket that has none. All of this device's kind
/// know it, and we never want it.
const OWN_HEADERS: u64 = 1 << 27;

/// VHOST_VIRTIO
const KIND: libc::c_uint = 0xaf;
const GET_FEATURES: libc::c_ulong = ioctl_expr(_IOC_READ, KIND, 0x00, size_of::<u64>() as u32);
const SET_FEATURES: libc::c_ulong = ioctl_expr(_IOC_WRITE, KIND, 0x00, size_of::<u64>() as u32);
const SET_OWNER: libc::c_ulong = ioctl_expr(_IOC_NONE, KIND, 0x01, 0);
/// Its size is that of the header alone.
const SET_MEM_TABLE: libc::c_ulong = ioctl_expr(_IOC_WRITE, KIND, 0x03, 2 * size_of::<u32>() as u32);
const SET_VRING_NUM: libc::c_ulong = ioctl_expr(_IOC_WRITE, KIND, 0x10, size_of::<State>() as u32);
const SET_VRING_ADDR: libc::c_ulong = ioctl_expr(_IOC_WRITE, KIND, 0x11, size_of::<Address>() as u32);
const SET_VRING_BASE: libc::c_ulong = ioctl_expr(_IOC_WRITE, KIND, 0x12, size_of::<State>() as u32);
const GET_VRING_BASE: libc::c_ulong =
    ioctl_expr(_IOC_READ | _IOC_WRITE, KIND, 0x12, size_of::<State>() as u32);
const SET_VRING_KICK: libc::c_ulong = ioctl_expr(_IOC_WRITE, KIND, 0x20, size_of::<Descriptor>() as u32);
const SET_VRING_CALL: libc::c_ulong = ioctl_expr(_IOC_WRITE, KIND, 0x21, size_of::<Descriptor>() as u32);
const SET_VRING_ERR: libc::c_ulong = ioctl_expr(_IOC_WRITE, KIND, 0x22, size_of::<Descriptor>() as u32);
const NET_SET_BACKEND: libc::c_ulong = ioctl_expr(_IOC_WRITE, KIND, 0x30, size_of::<Descriptor>() as u32);

fn set_descriptor(file: &File, request: libc::c_ulong, descriptor: Descriptor) -> io::Result<()> {
    // SAFETY: each request that is given here reads one vhost_vring_file, which `descriptor` is.
    check(unsafe { ioctl_with_ref(file, request, &descriptor) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A kernel for unit tests, which serves a queue when it is told to.
#[cfg(any(test, feature = "testing"))]
#[allow(clippy::unwrap_used, reason = "a fixture fails its test by panicking")]
pub mod fake {
    use std::io;
    use std::sync::{Arc, Mutex};

    use vmm_sys_util::eventfd::EventFd;

    use super::{Ends, OWN_HEADERS, VhostNet, Way};
    use crate::backend::vhost::{Region, Ring};

    /// What a kernel was told of one queue pair.
    #[derive(Default)]
    pub struct Pair {
        pub features: u64,
        pub memory: Vec<Region>,
        pub rings: [Option<Ring>; 2],
        /// Kick, call and error.
        pub ends: [Option<[EventFd; 3]>; 2],
        pub serves: [bool; 2],
        /// Chains that it has taken since it was given the queue.
        pub taken: [u16; 2],
        /// From here on it refuses to start a queue.
        pub refuse: bool,
    }

    impl VhostNet {
        /// A kernel that knows these features, and what it is told.
        pub fn fake(features: u64) -> (VhostNet, Arc<Mutex<Pair>>) {
            let pair = Arc::<Mutex<Pair>>::default();
            (VhostNet { way: Way::Fake(pair.clone()), features: features | OWN_HEADERS }, pair)
        }
    }

    pub(super) fn with(pair: &Mutex<Pair>, act: impl FnOnce(&mut Pair)) -> io::Result<()> {
        act(&mut pair.lock().unwrap());
        Ok(())
    }

    pub(super) fn start(pair: &Mutex<Pair>, queue: usize, ring: &Ring, ends: &Ends) -> io::Result<()> {
        let mut pair = pair.lock().unwrap();
        if pair.refuse {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
        assert!(!pair.serves[queue], "it has this queue");
        pair.rings[queue] = Some(*ring);
        pair.ends[queue] = Some([ends.kick, ends.call, ends.error].map(|end| end.try_clone().unwrap()));
        (pair.serves[queue], pair.taken[queue]) = (true, 0);
        Ok(())
    }

    pub(super) fn take_back(pair: &Mutex<Pair>, queue: usize) -> io::Result<u16> {
        let mut pair = pair.lock().unwrap();
        assert!(!pair.serves[queue], "it still serves this queue");
        pair.ends[queue] = None;
        let begun = pair.rings[queue].take().map_or(0, |ring| ring.next_available);
        Ok(begun.wrapping_add(pair.taken[queue]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_requests_have_the_kernels_numbers() {
        assert_eq!((GET_FEATURES, SET_FEATURES, SET_OWNER), (0x8008_af00, 0x4008_af00, 0xaf01));
        assert_eq!((SET_MEM_TABLE, SET_VRING_NUM, SET_VRING_ADDR), (0x4008_af03, 0x4008_af10, 0x4028_af11));
        assert_eq!((SET_VRING_BASE, GET_VRING_BASE), (0x4008_af12, 0xc008_af12));
        assert_eq!((SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR), (0x4008_af20, 0x4008_af21, 0x4008_af22));
        assert_eq!(NET_SET_BACKEND, 0x4008_af30);
    }

    #[test]
    fn what_is_no_vhost_net_is_not_taken_for_one() {
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let error = VhostNet::new(null).err().unwrap();
        assert!(error.to_string().contains("hand over an open /dev/vhost-net"), "{error}");
    }

    #[test]
    fn more_memory_than_the_kernel_knows_is_said() {
        let (vhost, _) = VhostNet::fake(0);
        let region = Region { guest: 0, size: 1, host: 0, file: None };
        vhost.set_memory(&vec![region.clone(); MAX_REGIONS]).unwrap();
        let error = vhost.set_memory(&vec![region; MAX_REGIONS + 1]).unwrap_err();
        assert!(
            error.to_string().contains("65 parts") && error.to_string().contains("64 at most"),
            "{error}"
        );
    }
}
