//! From the guest to the host: each chain is a frame with its header, and is given back when the tap has it.
//!
//! Nothing waits here but for the rate limiter: a frame that the tap does not take is lost, as on any wire.

use std::sync::Arc;
use std::time::Instant;

use super::Counters;
use super::header::{ETHERNET_BYTES, Header, MAX_PACKET, Malformed};
use super::neighbour::{Beside, Head};
use crate::backend::rate_limiter::RateLimiter;
use crate::backend::tap::{HEADER_BYTES, MAX_SLICES, Tap};
use crate::memory::GuestRam;
use crate::virtio::queue::{Chain, QueueError};
use crate::virtio::running::{Step, count};

/// Where the sender's address is.
const SOURCE: std::ops::Range<usize> = 6..12;

/// Sends for all queues.
pub struct Transmitter {
    pub limiter: RateLimiter,
    mac: Option<[u8; 6]>,
    features: u64,
    /// The tap refused the last frame; that is logged once.
    is_failing: bool,
    counters: Arc<Counters>,
}

impl Transmitter {
    pub fn new(mac: Option<[u8; 6]>, limiter: RateLimiter, counters: Arc<Counters>) -> Transmitter {
        Transmitter { limiter, mac, features: 0, is_failing: false, counters }
    }

    /// The device runs with these features.
    pub fn start(&mut self, features: u64) {
        self.features = features;
    }

    /// Sends one frame by a queue of the tap.
    pub fn send(
        &mut self,
        memory: &GuestRam,
        chain: &mut Chain,
        tap: &Tap,
        queue: usize,
        beside: Option<&mut Beside>,
    ) -> Result<Step, QueueError> {
        let bytes = chain.readable.bytes();
        if !self.limiter.take(u64::from(bytes).saturating_sub(HEADER_BYTES as u64)) {
            count(&self.counters.tx_rate_limiter_throttled, 1);
            return Ok(Step::Later);
        }
        match self.head(memory, chain, bytes)? {
            Ok(mut head) => {
                let is_taken = match beside {
                    Some(beside) => beside.takes(memory, chain, &mut head)?,
                    None => false,
                };
                if !is_taken {
                    self.write(memory, chain, tap, queue, &head)?;
                }
            }
            Err(malformed) => {
                count(&self.counters.tx_malformed_frames, 1);
                count(&self.counters.tx_fails, 1);
                log::debug!("network device {}: a frame was dropped: {malformed}", tap.name());
            }
        }
        Ok(Step::Used(0))
    }

    /// Takes the two headers out of the chain. They are copied and checked, and what was checked is what is sent.
    fn head(
        &self,
        memory: &GuestRam,
        chain: &mut Chain,
        bytes: u32,
    ) -> Result<Result<Head, Malformed>, QueueError> {
        if !(HEAD_BYTES..=MAX_PACKET).contains(&(bytes as usize)) {
            return Ok(Err(Malformed::Size(bytes)));
        }
        let (mut header, mut ethernet) = ([0; HEADER_BYTES], [0; ETHERNET_BYTES]);
        chain.readable.read(memory, &mut header)?;
        chain.readable.read(memory, &mut ethernet)?;
        if self.mac.is_some_and(|mac| ethernet.get(SOURCE) != Some(&mac)) {
            count(&self.counters.tx_spoofed_mac_count, 1);
        }
        let header = Header::of_driver(header, self.features, bytes - HEADER_BYTES as u32);
        Ok(header.map(|header| Head::new(header.bytes(), ethernet)))
    }

    fn write(
        &mut self,
        memory: &GuestRam,
        chain: &mut Chain,
        tap: &Tap,
        queue: usize,
        head: &Head,
    ) -> Result<(), QueueError> {
        let bytes = u64::from(chain.readable.bytes()) + head.frame().len() as u64;
        let slices = chain.readable.slices(memory)?;
        if slices.len() > MAX_SLICES {
            count(&self.counters.tx_malformed_frames, 1);
            count(&self.counters.tx_fails, 1);
            log::debug!("network device {}: a frame was dropped: {}", tap.name(), Malformed::Pieces);
            return Ok(());
        }
        let begin = Instant::now();
        match tap.send(queue, head.bytes(), &slices) {
            Ok(_) => {
                self.is_failing = false;
                self.counters.tap_write_time.add(begin);
                count(&self.counters.tx_packets_count, 1);
                count(&self.counters.tx_bytes_count, bytes);
            }
            Err(error) => {
                count(&self.counters.tap_write_fails, 1);
                count(&self.counters.tx_fails, 1);
                if !std::mem::replace(&mut self.is_failing, true) {
                    log::warn!("network device {}: the host does not take frames: {error}", tap.name());
                }
            }
        }
        Ok(())
    }
}

const HEAD_BYTES: usize = HEADER_BYTES + ETHERNET_BYTES;
