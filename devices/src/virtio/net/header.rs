//! The header before each packet (VIRTIO 1.3, sections 5.1.6 to 5.1.6.4): what a driver may say in it, and what the host
//! is asked to do so that it says only what the driver has agreed to.
//!
//! Does not look at packets: whether a packet is what its header says is for the host's kernel, which parses it.

use virtio_bindings::virtio_net as spec;

use super::bit;
pub use crate::backend::tap::HEADER_BYTES;

/// What an Ethernet header has: two addresses and a type.
pub const ETHERNET_BYTES: usize = 14;

/// The largest packet: 64 KiB, its Ethernet header with two VLAN tags, and the header before it.
pub const MAX_PACKET: usize = (64 << 10) + ETHERNET_BYTES + 8 + HEADER_BYTES;

/// Where `num_buffers` is.
pub const NUM_BUFFERS: usize = 10;

/// A driver's header, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl Header {
    /// The header that a driver with these features has put before a frame of so many bytes.
    pub fn of_driver(bytes: [u8; HEADER_BYTES], features: u64, frame: u32) -> Result<Header, Malformed> {
        let [flags, gso_type, a, b, c, d, e, f, g, h, ..] = bytes;
        let header = Header {
            // The others mean nothing here and are to be ignored (5.1.6.2.2).
            flags: flags & spec::VIRTIO_NET_HDR_F_NEEDS_CSUM as u8,
            gso_type,
            hdr_len: u16::from_le_bytes([a, b]),
            gso_size: u16::from_le_bytes([c, d]),
            csum_start: u16::from_le_bytes([e, f]),
            csum_offset: u16::from_le_bytes([g, h]),
        };
        header.check(features, frame)?;
        Ok(header)
    }

    /// As it is written to the tap.
    pub fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let fields = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset].map(u16::to_le_bytes);
        let all = [self.flags, self.gso_type].into_iter().chain(fields.into_iter().flatten());
        bytes.iter_mut().zip(all).for_each(|(place, byte)| *place = byte);
        bytes
    }

    fn check(&self, features: u64, frame: u32) -> Result<(), Malformed> {
        let has = |feature| features & bit(feature) != 0;
        let wants_checksum = self.flags != 0;
        if wants_checksum {
            if !has(spec::VIRTIO_NET_F_CSUM) {
                return Err(Malformed::NotAgreed("a checksum"));
            }
            // The checksum's own two bytes are in the frame too.
            let end = u32::from(self.csum_start) + u32::from(self.csum_offset) + 2;
            if end > frame {
                return Err(Malformed::Beyond { what: "the checksum", end, frame });
            }
        }
        if u32::from(self.hdr_len) > frame {
            return Err(Malformed::Beyond { what: "the header", end: self.hdr_len.into(), frame });
        }
        let ecn = u32::from(self.gso_type) & spec::VIRTIO_NET_HDR_GSO_ECN != 0;
        let feature = match u32::from(self.gso_type) & !spec::VIRTIO_NET_HDR_GSO_ECN {
            spec::VIRTIO_NET_HDR_GSO_NONE if !ecn => return Ok(()),
            spec::VIRTIO_NET_HDR_GSO_TCPV4 => spec::VIRTIO_NET_F_HOST_TSO4,
            spec::VIRTIO_NET_HDR_GSO_TCPV6 => spec::VIRTIO_NET_F_HOST_TSO6,
            spec::VIRTIO_NET_HDR_GSO_UDP if !ecn => spec::VIRTIO_NET_F_HOST_UFO,
            spec::VIRTIO_NET_HDR_GSO_UDP_L4 if !ecn => spec::VIRTIO_NET_F_HOST_USO,
            _ => return Err(Malformed::GsoType(self.gso_type)),
        };
        if !has(feature) || ecn && !has(spec::VIRTIO_NET_F_HOST_ECN) {
            return Err(Malformed::NotAgreed("segmentation of this type"));
        }
        if !wants_checksum || self.gso_size == 0 {
            return Err(Malformed::Gso);
        }
        Ok(())
    }
}

/// What is wrong with a driver's frame; it is dropped and the device goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("it asks for {0}, which was not agreed on")]
    NotAgreed(&'static str),
    #[error("{what} ends at {end}, beyond the frame of {frame} bytes")]
    Beyond { what: &'static str, end: u32, frame: u32 },
    #[error("its gso_type is {0:#x}")]
    GsoType(u8),
    #[error("segments need a size and a checksum")]
    Gso,
    #[error("it has {0} bytes with its header")]
    Size(u32),
    #[error("it lies in more pieces than one call takes")]
    Pieces,
}

/// The TUN_F_ flags with which a tap gives what a driver of these features takes. `udp`: the host knows UDP segments.
pub fn offloads(features: u64, udp: bool) -> libc::c_uint {
    let has = |feature| features & bit(feature) != 0;
    // Without checksums the kernel takes none of the others (5.1.3.1 says the same of drivers).
    if !has(spec::VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut flags = libc::TUN_F_CSUM;
    let (four, six) = (has(spec::VIRTIO_NET_F_GUEST_TSO4), has(spec::VIRTIO_NET_F_GUEST_TSO6));
    flags |= if four { libc::TUN_F_TSO4 } else { 0 };
    flags |= if six { libc::TUN_F_TSO6 } else { 0 };
    flags |= if (four || six) && has(spec::VIRTIO_NET_F_GUEST_ECN) { libc::TUN_F_TSO_ECN } else { 0 };
    flags |= if has(spec::VIRTIO_NET_F_GUEST_UFO) { libc::TUN_F_UFO } else { 0 };
    // The kernel takes both or none.
    if udp && has(spec::VIRTIO_NET_F_GUEST_USO4) && has(spec::VIRTIO_NET_F_GUEST_USO6) {
        flags |= libc::TUN_F_USO4 | libc::TUN_F_USO6;
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = !0;

    fn header(fields: [u8; 2], words: [u16; 5]) -> [u8; HEADER_BYTES] {
        let [a, b, c, d, e] = words.map(u16::to_le_bytes);
        [&fields[..], &a, &b, &c, &d, &e].concat().try_into().unwrap()
    }

    #[test]
    fn what_the_driver_may_say_goes_on_and_what_means_nothing_does_not() {
        let said = header([7, 1], [54, 1448, 34, 16, 9]);
        let header = Header::of_driver(said, ALL, 3000).unwrap();
        assert_eq!(header.bytes(), super::tests::header([1, 1], [54, 1448, 34, 16, 0]));
        assert_eq!(Header::of_driver([0; 12], 0, 14).unwrap().bytes(), [0; 12]);
    }

    #[test]
    fn a_checksum_and_headers_lie_within_the_frame() {
        let at = |words, frame| Header::of_driver(header([1, 0], words), ALL, frame);
        assert!(at([0, 0, 34, 16, 0], 52).is_ok());
        assert!(matches!(at([0, 0, 34, 16, 0], 51), Err(Malformed::Beyond { end: 52, .. })));
        assert!(matches!(at([0, 0, u16::MAX, u16::MAX, 0], 65535), Err(Malformed::Beyond { .. })));
        assert!(at([52, 0, 0, 0, 0], 52).is_ok());
        assert!(matches!(at([53, 0, 0, 0, 0], 52), Err(Malformed::Beyond { end: 53, .. })));
    }

    #[test]
    fn segments_are_of_a_type_that_was_agreed_on() {
        let types = [
            (1, spec::VIRTIO_NET_F_HOST_TSO4),
            (3, spec::VIRTIO_NET_F_HOST_UFO),
            (4, spec::VIRTIO_NET_F_HOST_TSO6),
            (5, spec::VIRTIO_NET_F_HOST_USO),
        ];
        for gso_type in 0..=u8::MAX {
            let said = |features, words| Header::of_driver(header([1, gso_type], words), features, 3000);
            let words = [54, 1448, 34, 16, 0];
            let known = types.iter().find(|(known, _)| *known == gso_type & 0x7f);
            match known.filter(|(known, _)| gso_type & 0x80 == 0 || [1, 4].contains(known)) {
                Some((_, feature)) => {
                    assert!(said(ALL, words).is_ok(), "{gso_type:#x}");
                    let without = ALL & !bit(*feature);
                    assert!(matches!(said(without, words), Err(Malformed::NotAgreed(_))), "{gso_type:#x}");
                    assert_eq!(said(ALL, [54, 0, 34, 16, 0]), Err(Malformed::Gso));
                    let no_checksum = header([0, gso_type], words);
                    assert_eq!(Header::of_driver(no_checksum, ALL, 3000), Err(Malformed::Gso));
                }
                None if gso_type == 0 => assert!(said(ALL, words).is_ok()),
                None => assert_eq!(said(ALL, words), Err(Malformed::GsoType(gso_type))),
            }
        }
        let ecn = header([1, 0x81], [54, 1448, 34, 16, 0]);
        let without = ALL & !bit(spec::VIRTIO_NET_F_HOST_ECN);
        assert!(matches!(Header::of_driver(ecn, without, 3000), Err(Malformed::NotAgreed(_))));
        let checksum = header([1, 0], [0; 5]);
        let without = ALL & !bit(spec::VIRTIO_NET_F_CSUM);
        assert!(matches!(Header::of_driver(checksum, without, 3000), Err(Malformed::NotAgreed(_))));
    }

    #[test]
    fn a_tap_gives_what_the_driver_takes_in_a_form_that_the_kernel_takes() {
        assert_eq!(offloads(0, true), 0);
        assert_eq!(offloads(ALL, true), 0x7f);
        assert_eq!(offloads(ALL, false), 0x1f);
        assert_eq!(offloads(ALL & !bit(spec::VIRTIO_NET_F_GUEST_CSUM), true), 0);
        let csum = bit(spec::VIRTIO_NET_F_GUEST_CSUM);
        assert_eq!(offloads(csum, true), libc::TUN_F_CSUM);
        assert_eq!(offloads(csum | bit(spec::VIRTIO_NET_F_GUEST_ECN), true), libc::TUN_F_CSUM);
        assert_eq!(offloads(csum | bit(spec::VIRTIO_NET_F_GUEST_USO4), true), libc::TUN_F_CSUM);
        let tso = csum | bit(spec::VIRTIO_NET_F_GUEST_TSO6);
        assert_eq!(offloads(tso, true), libc::TUN_F_CSUM | libc::TUN_F_TSO6);
    }
}
