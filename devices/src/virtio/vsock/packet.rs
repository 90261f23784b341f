//! The header of a packet (VIRTIO 1.3, section 5.10.6): bytes to fields and back.
//!
//! Knows no connection. What a driver wrote is taken as it is: every field may be anything.

use crate::memory::GuestRam;
use crate::virtio::queue::{QueueError, Segments};

/// The length of a header, on the wire.
pub const HEADER_BYTES: usize = 44;

/// The context identifier of the host (5.10.4).
pub const HOST_CID: u64 = 2;

/// The one socket type that is offered (5.10.6).
pub const TYPE_STREAM: u16 = 1;

/// "Any port" (VMADDR_PORT_ANY of the socket interface): no socket has it.
pub const PORT_ANY: u32 = u32::MAX;

/// What a packet does (5.10.6). Not an enum: a driver may write any number.
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of a SHUTDOWN (5.10.6.5): its sender will no longer receive, will no longer send.
pub const SHUTDOWN_RECEIVE: u32 = 1;
pub const SHUTDOWN_SEND: u32 = 2;
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes of payload behind the header.
    pub len: u32,
    /// "type" in the specification.
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    /// How much the sender can hold of this connection.
    pub buf_alloc: u32,
    /// How much the sender has handed on, since the connection began; wraps.
    pub fwd_cnt: u32,
}

impl Header {
    /// Takes a header off the front of `buffers`; `None` when they are too short for one.
    pub fn take(memory: &GuestRam, buffers: &mut Segments) -> Result<Option<Header>, QueueError> {
        let mut bytes = [0; HEADER_BYTES];
        if (buffers.bytes() as usize) < HEADER_BYTES {
            return Ok(None);
        }
        buffers.read(memory, &mut bytes)?;
        Ok(Some(Header::from_bytes(&bytes)))
    }

    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Header {
        let mut fields = Fields(bytes);
        Header {
            src_cid: u64::from_le_bytes(fields.next()),
            dst_cid: u64::from_le_bytes(fields.next()),
            src_port: u32::from_le_bytes(fields.next()),
            dst_port: u32::from_le_bytes(fields.next()),
            len: u32::from_le_bytes(fields.next()),
            kind: u16::from_le_bytes(fields.next()),
            op: u16::from_le_bytes(fields.next()),
            flags: u32::from_le_bytes(fields.next()),
            buf_alloc: u32::from_le_bytes(fields.next()),
            fwd_cnt: u32::from_le_bytes(fields.next()),
        }
    }

    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut bytes = [0; HEADER_BYTES];
        for (byte, value) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *byte = *value;
        }
        bytes
    }

    /// The answer that no connection stands behind: RST, with the addresses turned round.
    pub fn reset(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Header::default()
        }
    }
}

/// A reader of little-endian fields that follow one another.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn next<const N: usize>(&mut self) -> [u8; N] {
        // The header is as long as its fields together, so none is missing.
        let (field, rest) = self.0.split_first_chunk().unwrap_or((&[0; N], &[]));
        self.0 = rest;
        *field
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_field_is_where_the_specification_has_it() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 0x1112_1314_1516_1718,
            src_port: 0x2122_2324,
            dst_port: 0x3132_3334,
            len: 0x4142_4344,
            kind: 0x5152,
            op: 0x6162,
            flags: 0x7172_7374,
            buf_alloc: 0x8182_8384,
            fwd_cnt: 0x9192_9394,
        };
        let bytes = header.to_bytes();
        for (offset, expected) in [
            (0, &[8u8, 7, 6, 5, 4, 3, 2, 1][..]),
            (8, &[0x18, 0x17]),
            (16, &[0x24, 0x23]),
            (20, &[0x34, 0x33]),
            (24, &[0x44, 0x43]),
            (28, &[0x52, 0x51]),
            (30, &[0x62, 0x61]),
            (32, &[0x74, 0x73]),
            (36, &[0x84, 0x83]),
            (40, &[0x94, 0x93, 0x92, 0x91]),
        ] {
            assert_eq!(&bytes[offset..offset + expected.len()], expected, "at {offset}");
        }
        assert_eq!(Header::from_bytes(&bytes), header);
    }

    #[test]
    fn a_reset_goes_back_where_its_cause_came_from() {
        let header =
            Header { src_cid: 3, dst_cid: 2, src_port: 7, dst_port: 8, kind: 9, ..Header::default() };
        let reset = header.reset();
        assert_eq!((reset.src_cid, reset.dst_cid, reset.src_port, reset.dst_port), (2, 3, 8, 7));
        assert_eq!((reset.kind, reset.op, reset.len), (9, op::RST, 0));
    }
}
