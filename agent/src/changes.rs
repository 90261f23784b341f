//! The kernel's announcements of what comes and goes, so that who waits for a device or a driver sleeps meanwhile.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

/// Those of the kernel, and not what udev makes of them.
const KERNELS: u32 = 1;

/// The longest announcement that the kernel makes.
const MAX_ANNOUNCEMENT: usize = 8 << 10;

/// How many are looked at in one wait before its time is looked at again.
const BATCH: usize = 64;

pub struct Changes(Option<OwnedFd>);

impl Changes {
    /// Without them waiting still works, by the clock.
    pub fn new() -> Changes {
        let open = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(KOBJECT_UEVENT))?;
            bind(&socket, &SocketAddrNetlink::new(0, KERNELS))?;
            Ok::<_, rustix::io::Errno>(socket)
        };
        Changes(open().ok())
    }

    /// Waits for an announcement of something whose path in /sys has this word, but no longer than `limit`.
    pub fn wait(&self, word: &str, limit: Duration) {
        let Some(socket) = &self.0 else { return std::thread::sleep(limit) };
        let end = std::time::Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(std::time::Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => return,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return std::thread::sleep(left),
            }
            for _ in 0..BATCH {
                let mut bytes = [0; MAX_ANNOUNCEMENT];
                match recv(socket, &mut bytes[..], RecvFlags::empty()) {
                    Ok((length, _)) if is_about(bytes.get(..length).unwrap_or_default(), word) => return,
                    Ok(_) => {}
                    // Some were lost: look.
                    Err(rustix::io::Errno::NOBUFS) => return,
                    Err(_) => break,
                }
            }
        }
    }
}

/// `add@/devices/...`, and then further words, each with a zero at its end.
fn is_about(announcement: &[u8], word: &str) -> bool {
    let path = announcement.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(path).contains(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_is_known_by_its_path() {
        let announcement = b"add@/module/vsock\0ACTION=add\0SUBSYSTEM=net\0";
        assert!(is_about(announcement, "vsock"));
        assert!(!is_about(announcement, "net"));
        assert!(!is_about(b"", "net"));
    }
}
