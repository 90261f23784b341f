//! The fleet API: what `berthd` is asked over its Unix socket, and what it answers.
//!
//! - [`types`]: the wire types
//! - [`routes`]: (method, path, query, body) to a [`Request`], and back
//! - [`server`]: one connection served by one thread: replies, streams, uploads, connections that become a guest's
//! - [`client`]: the blocking client of the command line and of tests
//!
//! HTTP/1.1 and JSON as in the guest API, with the same rules for bodies and faults. It does not know what a guest is made
//! of, nor who may ask for what: that is decided by whoever handles the [`Request`].

pub mod client;
pub mod routes;
pub mod server;
pub mod types;

pub use client::Client;
pub use routes::{Part, Request};
pub use types::*;
