//! The guest API over a Unix socket: HTTP/1.1 and JSON, compatible with Firecracker's.
//!
//! - [`types`]: the wire types, one per request body or reply
//! - [`routes`]: (method, path, body) to a [`Request`], and nothing else
//! - [`config_file`]: the same requests from a `--config-file` document
//!
//! This is the only crate that knows HTTP and JSON. It does not know KVM, devices or what a request does to a guest:
//! whether a request is legal now and what its values may be together is decided by whoever handles the [`Request`].

pub mod config_file;
mod json;
pub mod routes;
pub mod types;

pub use routes::{Endpoint, Method, Routed, route};
pub use types::*;
