//! What stands behind a device on the host's side.

pub mod direct;
pub mod disk;
pub mod gate;
pub(crate) mod job;
pub mod qcow2;
pub mod rate_limiter;
pub mod tap;
pub(crate) mod uring;
pub(crate) mod vectored;
pub mod vhost;
pub mod vhost_net;
