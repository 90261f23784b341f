//! What stands behind a device on the host's side.

pub mod disk;
pub mod rate_limiter;
mod vectored;
