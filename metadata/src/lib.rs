//! The metadata service (MMDS): what the host's side has put into a store, guests read by HTTP at a link-local address.
//!
//! - [`store`]: one JSON document with a limit, and how parts of it are found and written
//! - [`token`]: session tokens of version 2
//! - [`http`]: a request's bytes to a request, and an answer to bytes
//! - [`answer`]: what each request gets
//! - [`stack`]: the machine on the guest's network that answers, down to Ethernet
//!
//! It knows no devices but the seam of the network device ([`devices::virtio::net::Neighbour`]), no KVM, no files and no
//! threads. Nothing of the host's network is used: frames to the service never leave the process.

#![forbid(unsafe_code)]

pub mod answer;
mod arp;
mod connection;
pub mod http;
pub mod stack;
pub mod store;
pub mod token;

use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use answer::{Rules, Version};
pub use stack::Stack;
pub use store::{Store, StoreError};
use token::Tokens;

/// What all interfaces of a guest have in common: the store, the key of the tokens, the counters.
pub struct Metadata {
    store: Mutex<Store>,
    tokens: Tokens,
    counters: Arc<Counters>,
}

impl Metadata {
    /// An empty store of at most `limit` bytes of JSON, and a new key.
    ///
    /// # Errors
    /// That of asking the kernel for random bytes.
    pub fn new(limit: usize) -> io::Result<Metadata> {
        Ok(Metadata {
            store: Mutex::new(Store::new(limit)),
            tokens: Tokens::new()?,
            counters: Arc::default(),
        })
    }

    /// The store. Guests wait while it is held.
    pub fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the service has done since the start.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }
}

/// What the service has done since the start, on all interfaces. "rx" is what comes from the guest.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames that were for the service.
    pub rx_accepted: AtomicU64,
    /// Such frames that were dropped since the guest does not take what it is sent.
    pub rx_accepted_err: AtomicU64,
    /// Such frames that are neither ARP nor TCP to the service's port.
    pub rx_accepted_unusual: AtomicU64,
    /// Such frames that are no whole Ethernet frame or ARP packet.
    pub rx_bad_eth: AtomicU64,
    /// GET requests with a token that is not valid.
    pub rx_invalid_token: AtomicU64,
    /// GET requests without a token.
    pub rx_no_token: AtomicU64,
    /// Requests that were answered.
    pub rx_count: AtomicU64,
    /// Of frames to the guest.
    pub tx_bytes: AtomicU64,
    /// Times that frames were made for the guest.
    pub tx_count: AtomicU64,
    /// Frames to the guest that were lost since nobody knows its address.
    pub tx_errors: AtomicU64,
    /// Frames to the guest.
    pub tx_frames: AtomicU64,
    pub connections_created: AtomicU64,
    pub connections_destroyed: AtomicU64,
}

/// Adds to a counter that others only read.
fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, std::sync::atomic::Ordering::Relaxed);
}
