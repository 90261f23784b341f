//! A machine on the driver's network that is in this process: frames that are for it never reach the tap, and what it sends
//! goes to the driver before what the tap has.
//!
//! Does not know what such a machine is or does: it says itself which frames are for it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use super::header::{ETHERNET_BYTES, HEADER_BYTES};
use crate::memory::GuestRam;
use crate::virtio::queue::{Chain, QueueError};

/// So much of a frame shows to a [`Neighbour`] whether it is for it: Ethernet's header and an IPv4 address's ARP packet.
pub const LOOK: usize = 42;

/// The shortest wait, whatever the neighbour wants: it must not keep the io thread busy. A timer of zero would never fire.
const SHORTEST: Duration = Duration::from_millis(1);

/// The machine. Every buffer that it has must have a limit: the driver says what comes, how often, and whether it takes the
/// answers.
pub trait Neighbour: Send {
    /// Whether the frame that begins with these bytes is for it; at most [`LOOK`], fewer of a shorter frame.
    fn is_for_me(&self, start: &[u8]) -> bool;

    /// Takes a frame, and does what it asks.
    fn take(&mut self, frame: &[u8]);

    /// The next frame for the driver, without the header that virtio puts before it.
    fn give(&mut self) -> Option<Vec<u8>>;

    /// Whether there is one.
    fn has_frames(&self) -> bool;

    /// When [`Neighbour::wake`] is to be called, from now; `None` when there is nothing to wait for but frames.
    fn wake_in(&mut self) -> Option<Duration>;

    /// The time that it wanted to wait is over.
    fn wake(&mut self);

    /// The driver is gone: forget it.
    fn reset(&mut self);
}

/// A neighbour and its alarm clock.
pub struct Beside {
    pub neighbour: Box<dyn Neighbour>,
    timer: TimerFd,
    /// When the timer fires, or has fired and was not heard yet.
    due: Option<Instant>,
    frame: Vec<u8>,
}

/// The start of a frame, as it was copied out of guest memory, with the header that virtio puts before it.
pub struct Head {
    bytes: [u8; HEADER_BYTES + LOOK],
    length: usize,
}

impl Head {
    /// With the header and the frame's first bytes; what is beyond [`LOOK`] is left out.
    pub fn new(header: [u8; HEADER_BYTES], ethernet: [u8; ETHERNET_BYTES]) -> Head {
        let mut head = Head { bytes: [0; HEADER_BYTES + LOOK], length: 0 };
        let all = header.into_iter().chain(ethernet);
        head.length = head.bytes.iter_mut().zip(all).map(|(place, byte)| *place = byte).count();
        head
    }

    /// All of it, as it is sent.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    /// The part of it that is of the frame.
    pub fn frame(&self) -> &[u8] {
        self.bytes.get(HEADER_BYTES..self.length).unwrap_or_default()
    }

    /// Goes on to copy, so that who looks at it and who sends it see the same.
    fn extend(&mut self, memory: &GuestRam, chain: &mut Chain) -> Result<(), QueueError> {
        let rest = self.bytes.get_mut(self.length..).unwrap_or_default();
        let more = rest.len().min(chain.readable.bytes() as usize);
        chain.readable.read(memory, rest.get_mut(..more).unwrap_or_default())?;
        self.length += more;
        Ok(())
    }
}

impl Beside {
    pub fn new(neighbour: Box<dyn Neighbour>) -> io::Result<Beside> {
        Ok(Beside { neighbour, timer: TimerFd::new()?, due: None, frame: Vec::new() })
    }

    /// Readable when the neighbour's time has come; to be answered with [`Beside::woken`].
    pub fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Gives the neighbour the frame of which `head` was taken out of the chain, if it is for it.
    pub fn takes(
        &mut self,
        memory: &GuestRam,
        chain: &mut Chain,
        head: &mut Head,
    ) -> Result<bool, QueueError> {
        head.extend(memory, chain)?;
        if !self.neighbour.is_for_me(head.frame()) {
            return Ok(false);
        }
        let start = head.frame();
        self.frame.clear();
        self.frame.extend_from_slice(start);
        self.frame.resize(start.len() + chain.readable.bytes() as usize, 0);
        chain.readable.read(memory, self.frame.get_mut(start.len()..).unwrap_or_default())?;
        self.neighbour.take(&self.frame);
        Ok(true)
    }

    /// The timer has fired.
    pub fn woken(&mut self) {
        self.due = None;
        // As in the rate limiter: reading a timer that has not fired would block.
        if let Err(error) = self.timer.clear() {
            log::error!("network device: cannot stop a timer: {error}");
        }
        self.neighbour.wake();
    }

    /// Sets the timer as the neighbour wants it now. One that fires too early costs a look at the clock; setting it
    /// whenever the time moves on would cost a call for each frame.
    pub fn rearm(&mut self) {
        let Some(wait) = self.neighbour.wake_in() else { return };
        let due = Instant::now() + wait.max(SHORTEST);
        if self.due.is_some_and(|known| known <= due) {
            return;
        }
        match self.timer.reset(wait.max(SHORTEST), None) {
            Ok(()) => self.due = Some(due),
            Err(error) => log::error!("network device: cannot set a timer: {error}"),
        }
    }
}
