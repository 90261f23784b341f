//! What stands behind a device on the host's side.

pub mod disk;
pub mod gate;
pub mod rate_limiter;
pub mod tap;
pub(crate) mod vectored;
