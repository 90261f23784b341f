//! Devices that another process serves (the vhost-user protocol): it is given the guest's memory, and a ring to take
//! requests from; here is the side that has the guest.
//!
//! - `message.rs`: what goes over the socket.
//! - `session.rs`: one connection, from the first question to its end.
//! - `ring.rs`: the rings that the other process sees, which are not the driver's.
//! - `frontend.rs`: what every such device does: rings, and a back-end that comes, goes and comes back.
//! - `blk.rs`: the block device.
//!
//! The back-end reads and writes guest memory as it likes, and is trusted with that; with nothing else. What it says is
//! checked, and no thread waits for it without a limit.
//!
//! Does not speak of dirty pages (LOG_SHMFD) or of memory that comes later, and hears of a back-end that asks back
//! (BACKEND_REQ) only that its configuration has changed.

pub mod blk;
pub mod frontend;
pub mod message;
mod ring;
pub mod session;
#[cfg(test)]
pub mod testing;
