//! A vhost-user back-end that says anything, and a device whose back-end is dead.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use devices::virtio::blk::Cache;
use devices::virtio::vhost_user::blk::{CONFIG_BYTES, Config, State, VhostUserBlk, ring_bytes};
use devices::virtio::vhost_user::message::Region;
use devices::virtio::vhost_user::session::Session;

const VERSION_1: u64 = 1 << 32;

/// In pieces, the first byte of each of which says how long it is.
pub fn replies(data: &[u8]) {
    crate::log_to_nowhere();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let mut session = Session::begin(ours, CONFIG_BYTES).unwrap();
    let (mut rest, mut is_active) = (data, false);
    while let Some((&len, after)) = rest.split_first() {
        let (piece, after) = after.split_at(usize::from(len).min(after.len()));
        rest = after;
        theirs.write_all(piece).unwrap();
        if session.receive().is_err() {
            return;
        }
        if session.is_introduced() && !is_active {
            is_active = true;
            let region = Region { guest: 0, size: 1 << 20, offset: 0 };
            if session.activate(session.features(), &[(region, 0)], &[], 0).is_err() {
                return;
            }
        }
        // What it was asked goes by unread.
        while !matches!(theirs.read(&mut [0; 4096]), Err(error) if error.kind() == ErrorKind::WouldBlock) {}
    }
}

/// Such a device, whose driver's requests wait.
pub fn device(state: Option<State>) -> VhostUserBlk {
    let calls = UnixStream::pair().unwrap();
    calls.0.set_nonblocking(true).unwrap();
    let rings = tempfile::tempfile().unwrap();
    rings.set_len(ring_bytes(1)).unwrap();
    let config = Config {
        name: "fuzz".into(),
        session: Session::with_a_dead_one(VERSION_1, CONFIG_BYTES).unwrap(),
        connect: Box::new(|| Err(ErrorKind::NotFound.into())),
        calls,
        rings,
        cache: Cache::Writeback,
        queues: 1,
    };
    VhostUserBlk::new(config, state).unwrap()
}
