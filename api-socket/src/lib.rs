//! The guest API over a Unix socket: HTTP/1.1 and JSON, compatible with Firecracker's.
//!
//! - [`types`]: the wire types, one per request body or reply
//! - [`routes`]: (method, path, body) to a [`Request`], and nothing else
//! - [`config_file`]: the same requests from a `--config-file` document
//! - [`http`]: bytes to messages and back, without I/O
//! - [`server`], [`client`]: the two ends of the socket
//! - [`counters`]: how often each endpoint was used
//! - [`fleet`]: the other API, that of the daemon that keeps the guests
//!
//! This is the only crate that knows HTTP and JSON. It does not know KVM, devices or what a request does to a guest:
//! whether a request is legal now and what its values may be together is decided by whoever handles the [`Request`].

#![forbid(unsafe_code)]

pub mod client;
pub mod config_file;
pub mod counters;
pub mod fleet;
pub mod http;
mod json;
pub mod routes;
pub mod server;
pub mod types;

pub use client::{Client, ClientError};
pub use routes::{Endpoint, Method, Routed, route};
pub use server::{Limits, Server};
pub use types::*;
