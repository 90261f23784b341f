//! What stands behind a device on the host's side.

pub mod rate_limiter;
