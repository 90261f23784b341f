//! Messages of the vhost-user protocol, as bytes: a header of three words, and a payload whose form the request decides.
//! In the host's byte order, since both sides are on one host.
//!
//! Pure. Descriptors go beside the bytes of a request and never come with a reply: nothing here is asked that has one.

/// Numbers of requests.
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
}

/// What a back-end asks by itself: that the configuration space is read again. Nothing else is heard.
pub const CONFIG_CHANGE: u32 = 2;

/// The feature bit by which a back-end says that it has protocol features.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// Protocol features, as bits.
pub mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
}

pub const HEADER_BYTES: usize = 12;
/// Of a configuration space (the protocol's own limit).
pub const MAX_CONFIG_BYTES: usize = 256;
/// Offset, size and flags of a part of it.
const CONFIG_HEAD_BYTES: usize = 12;
/// The longest payload of a reply: a configuration space.
const MAX_REPLY_BYTES: usize = CONFIG_HEAD_BYTES + MAX_CONFIG_BYTES;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 0b11;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// A part of guest memory that the back-end maps, beside a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub guest: u64,
    pub size: u64,
    /// Where it is in the file.
    pub offset: u64,
}

/// Where a ring is, in the front-end's addresses; these are ours to choose, and we say guest-physical ones, which tell
/// nobody where anything is in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddress {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

/// A request as bytes. `confirm` asks for a reply where the request has none; only once REPLY_ACK is agreed on.
pub fn encode(request: u32, confirm: bool, payload: &[u8]) -> Vec<u8> {
    let flags = VERSION | if confirm { FLAG_NEED_REPLY } else { 0 };
    // No payload of ours is anywhere near 4 GiB.
    let header = [request, flags, payload.len() as u32];
    [header.map(u32::to_ne_bytes).as_flattened(), payload].concat()
}

/// Payload of requests for a number.
pub fn number(value: u64) -> Vec<u8> {
    value.to_ne_bytes().to_vec()
}

/// Payload of requests for a number of one ring.
pub fn ring_state(index: u16, value: u32) -> Vec<u8> {
    [u32::from(index), value].map(u32::to_ne_bytes).concat()
}

/// Payload of SET_VRING_ADDR.
pub fn ring_address(index: u16, ring: &RingAddress) -> Vec<u8> {
    let head = [u32::from(index), 0].map(u32::to_ne_bytes).concat();
    let places = [ring.descriptors, ring.used, ring.available, 0].map(u64::to_ne_bytes).concat();
    [head, places].concat()
}

/// Payload of SET_MEM_TABLE; a descriptor for each region goes with it.
pub fn memory_table(regions: &[Region]) -> Vec<u8> {
    // Two or three.
    let mut payload = [regions.len() as u32, 0].map(u32::to_ne_bytes).concat();
    for region in regions {
        let words = [region.guest, region.size, region.guest, region.offset];
        payload.extend(words.map(u64::to_ne_bytes).as_flattened());
    }
    payload
}

/// Payload of GET_CONFIG for the first `bytes` of the space, at most [`MAX_CONFIG_BYTES`].
pub fn config(bytes: usize) -> Vec<u8> {
    let head = [0, bytes as u32, 0].map(u32::to_ne_bytes).concat();
    [head, vec![0; bytes]].concat()
}

/// A reply of the back-end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub request: u32,
    payload: Vec<u8>,
}

impl Reply {
    /// A number.
    pub fn number(&self) -> Result<u64, Lie> {
        let bytes = self.payload.as_slice().try_into().map_err(|_| self.wrong(8))?;
        Ok(u64::from_ne_bytes(bytes))
    }

    /// A ring's number; which ring it is of.
    pub fn ring(&self) -> Result<u32, Lie> {
        match self.payload.first_chunk() {
            Some(index) if self.payload.len() == 8 => Ok(u32::from_ne_bytes(*index)),
            _ => Err(self.wrong(8)),
        }
    }

    /// The first `bytes` of the configuration space.
    pub fn config(&self, bytes: usize) -> Result<&[u8], Lie> {
        match self.payload.split_at_checked(CONFIG_HEAD_BYTES) {
            Some((_, space)) if space.len() == bytes => Ok(space),
            _ => Err(self.wrong(CONFIG_HEAD_BYTES + bytes)),
        }
    }

    fn wrong(&self, wanted: usize) -> Lie {
        Lie::Size { request: self.request, got: self.payload.len(), wanted }
    }
}

/// A request of the back-end, on the socket that it was given for that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    pub request: u32,
    /// It waits for an answer, as [`answer`] makes it.
    pub is_waiting: bool,
}

/// To a request of the back-end: done.
pub fn answer(request: u32) -> Vec<u8> {
    let header = [request, VERSION | FLAG_REPLY, 8].map(u32::to_ne_bytes).concat();
    [header, number(0)].concat()
}

/// Bytes of messages, until each is whole. Holds no more than one message and what came with it.
#[derive(Debug, Default)]
pub struct Inbox(Vec<u8>);

/// Most bytes read at once; few replies are ever under way.
pub const READ_BYTES: usize = 4096;

impl Inbox {
    /// Takes in what was read: at most [`READ_BYTES`], and not before [`Inbox::take`] had no more.
    pub fn put(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next reply, once it is whole.
    pub fn take(&mut self) -> Result<Option<Reply>, Lie> {
        Ok(self.message(FLAG_REPLY)?.map(|(request, _, payload)| Reply { request, payload }))
    }

    /// The next request, once it is whole. What goes with it is not looked at.
    pub fn take_call(&mut self) -> Result<Option<Call>, Lie> {
        let message = self.message(0)?;
        Ok(message.map(|(request, flags, _)| Call { request, is_waiting: flags & FLAG_NEED_REPLY != 0 }))
    }

    fn message(&mut self, reply: u32) -> Result<Option<(u32, u32, Vec<u8>)>, Lie> {
        let word = |at: usize| self.0.get(at..).and_then(<[u8]>::first_chunk).map(|b| u32::from_ne_bytes(*b));
        let (Some(request), Some(flags), Some(size)) = (word(0), word(4), word(8)) else { return Ok(None) };
        if flags & (VERSION_MASK | FLAG_REPLY) != VERSION | reply {
            return Err(Lie::Flags { request, flags });
        }
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if size > MAX_REPLY_BYTES {
            return Err(Lie::Size { request, got: size, wanted: MAX_REPLY_BYTES });
        }
        let Some(payload) = self.0.get(HEADER_BYTES..HEADER_BYTES + size) else { return Ok(None) };
        let payload = payload.to_vec();
        self.0.drain(..HEADER_BYTES + size);
        Ok(Some((request, flags, payload)))
    }
}

/// What a back-end said that cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Lie {
    #[error("a message that was not due: request {request} with flags {flags:#x}")]
    Flags { request: u32, flags: u32 },
    #[error("a reply of {got} bytes to request {request}; it must have {wanted}")]
    Size { request: u32, got: usize, wanted: usize },
    #[error("a reply to request {got}, and {} was next", .wanted.map_or("none".into(), |wanted| wanted.to_string()))]
    Unasked { got: u32, wanted: Option<u32> },
    #[error("it refuses request {request}: {code}")]
    Refused { request: u32, code: u64 },
    #[error("it has no {0}, which is needed")]
    Missing(&'static str),
    #[error("its features are {offered:#x}, and the driver was offered {needed:#x}")]
    Features { offered: u64, needed: u64 },
    #[error("it has {got} queues, and {wanted} are needed")]
    Queues { got: u64, wanted: u16 },
    #[error("it gave back request {head} of a ring of {size}, which it has not")]
    Used { head: u32, size: u16 },
    #[error("it gave back {pending} requests, and has {given}")]
    UsedIndex { pending: u16, given: usize },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
        let header = [request, VERSION | FLAG_REPLY, payload.len() as u32];
        [header.map(u32::to_ne_bytes).as_flattened(), payload].concat()
    }

    #[test]
    fn a_reply_that_comes_in_pieces_is_put_together_and_what_follows_it_is_kept() {
        let bytes = [reply(1, &number(7)), reply(24, &config(60)), reply(5, &number(0))].concat();
        for piece in [1, 5, 12, 13, 100, bytes.len()] {
            let (mut inbox, mut replies) = (Inbox::default(), Vec::new());
            for part in bytes.chunks(piece) {
                inbox.put(part);
                replies.extend(std::iter::from_fn(|| inbox.take().unwrap()));
            }
            assert_eq!(replies.iter().map(|reply| reply.request).collect::<Vec<_>>(), [1, 24, 5]);
            assert_eq!(replies[0].number(), Ok(7));
            assert_eq!(replies[1].config(60).unwrap(), [0; 60]);
        }
    }

    #[test]
    fn replies_of_the_wrong_size_are_no_replies() {
        let parse = |bytes: &[u8]| {
            let mut inbox = Inbox::default();
            inbox.put(bytes);
            inbox.take()
        };
        let short = parse(&reply(1, &[0; 7])).unwrap().unwrap();
        assert_eq!(short.number(), Err(Lie::Size { request: 1, got: 7, wanted: 8 }));
        for bytes in [0, 11, 12, 59 + 12, 61 + 12] {
            let config = parse(&reply(24, &vec![0; bytes])).unwrap().unwrap();
            config.config(60).unwrap_err();
        }
        // Not waited for, and no memory is set aside for it.
        let header = [1, VERSION | FLAG_REPLY, u32::MAX].map(u32::to_ne_bytes).concat();
        assert!(matches!(parse(&header), Err(Lie::Size { .. })));
        for flags in [0, VERSION, FLAG_REPLY, FLAG_REPLY | 2] {
            let header = [1, flags, 0].map(u32::to_ne_bytes).concat();
            assert!(matches!(parse(&header), Err(Lie::Flags { .. })), "{flags}");
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_no_more_is_kept_than_one_reply_and_one_reading(
            readings in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..READ_BYTES), 0..20),
            honest in any::<bool>(),
        ) {
            let mut inbox = Inbox::default();
            for mut reading in readings {
                if honest {
                    let payload = reading.get(..40).unwrap_or_default().to_vec();
                    reading = reply(1, &payload);
                }
                inbox.put(&reading);
                loop {
                    match inbox.take() {
                        Ok(Some(reply)) => prop_assert!(reply.payload.len() <= MAX_REPLY_BYTES),
                        Ok(None) => break,
                        Err(_) => return Ok(()),
                    }
                }
                prop_assert!(inbox.0.len() <= HEADER_BYTES + MAX_REPLY_BYTES);
            }
        }
    }
}
