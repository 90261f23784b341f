//! Ethernet frames as far as this service needs them, and ARP for IPv4 (RFC 826): whether a frame is for an address, and the
//! answer to who has it.

use std::net::Ipv4Addr;

/// An Ethernet address.
pub type Mac = [u8; 6];

pub const ETHERNET_BYTES: usize = 14;
const ARP_BYTES: usize = 28;
/// Where the address of an IPv4 packet's receiver is in a frame, and that of its sender.
const IPV4_TARGET: usize = ETHERNET_BYTES + 16;
const IPV4_SOURCE: usize = ETHERNET_BYTES + 12;
/// Where the address is that an ARP packet asks for.
const ARP_TARGET: usize = ETHERNET_BYTES + 24;

const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];
/// Ethernet and IPv4 addresses of 6 and 4 bytes, a request.
const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
const REPLY: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 2];

/// What a frame for us is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Arp,
    Ipv4,
}

/// What the frame that begins so is, if it is an ARP or IPv4 packet for this address, whatever its Ethernet address: a
/// packet that the driver sends by way of a router is for us too.
pub fn kind(start: &[u8], address: Ipv4Addr) -> Option<Kind> {
    let is_at = |place: usize| start.get(place..place + 4) == Some(&address.octets()[..]);
    match start.get(12..ETHERNET_BYTES) {
        Some(kind) if kind == IPV4 && is_at(IPV4_TARGET) => Some(Kind::Ipv4),
        Some(kind) if kind == ARP && is_at(ARP_TARGET) => Some(Kind::Arp),
        _ => None,
    }
}

/// Who sent a frame with an IPv4 packet.
pub fn sender(frame: &[u8]) -> Option<(Ipv4Addr, Mac)> {
    let mac: Mac = frame.get(6..12)?.try_into().ok()?;
    let address: [u8; 4] = frame.get(IPV4_SOURCE..IPV4_SOURCE + 4)?.try_into().ok()?;
    Some((address.into(), mac))
}

/// The answer to a request for our address; `None` for what is no request, such as another's answer.
///
/// # Errors
/// It is no ARP packet for Ethernet and IPv4.
pub fn answer(frame: &[u8], ours: Mac, address: Ipv4Addr) -> Result<Option<Vec<u8>>, ()> {
    let packet = frame.get(ETHERNET_BYTES..ETHERNET_BYTES + ARP_BYTES).ok_or(())?;
    let (kind, addresses) = packet.split_first_chunk::<8>().ok_or(())?;
    if *kind == REPLY {
        return Ok(None);
    }
    let sender = addresses.get(..10).filter(|_| *kind == REQUEST).ok_or(())?;
    let their_mac: Mac = sender.get(..6).and_then(|mac| mac.try_into().ok()).ok_or(())?;
    let mut reply = header(their_mac, ours, ARP);
    reply.extend(REPLY);
    reply.extend(ours);
    reply.extend(address.octets());
    reply.extend(sender);
    Ok(Some(reply))
}

/// The header of a frame with an IPv4 packet.
pub fn ipv4_header(to: Mac, from: Mac) -> Vec<u8> {
    header(to, from, IPV4)
}

fn header(to: Mac, from: Mac, kind: [u8; 2]) -> Vec<u8> {
    [&to[..], &from, &kind].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: Mac = [6, 1, 0x23, 0x45, 0x67, 1];
    const THEIRS: Mac = [2, 0, 0, 0, 0, 7];
    const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

    fn request(target: Ipv4Addr) -> Vec<u8> {
        [&[0xff; 6][..], &THEIRS, &ARP, &REQUEST, &THEIRS, &[10, 0, 0, 2], &[0; 6], &target.octets()].concat()
    }

    #[test]
    fn a_request_for_our_address_is_answered() {
        let request = request(ADDRESS);
        assert_eq!(kind(&request, ADDRESS), Some(Kind::Arp));
        let reply = answer(&request, OURS, ADDRESS).unwrap().unwrap();
        let expected =
            [&THEIRS[..], &OURS, &ARP, &REPLY, &OURS, &[169, 254, 169, 254], &THEIRS, &[10, 0, 0, 2]];
        assert_eq!(reply, expected.concat());
        assert_eq!(answer(&reply, OURS, ADDRESS), Ok(None), "an answer is not answered");
    }

    #[test]
    fn other_frames_are_not_for_us() {
        assert_eq!(kind(&request([169, 254, 169, 253].into()), ADDRESS), None);
        let whole = request(ADDRESS);
        for end in 0..whole.len() {
            assert_eq!(kind(&whole[..end], ADDRESS), None, "{end}");
        }
        let mut ipv6 = whole.clone();
        ipv6[12..14].copy_from_slice(&[0x86, 0xdd]);
        assert_eq!(kind(&ipv6, ADDRESS), None);
        let mut packet = vec![0; 34];
        packet[12] = 8;
        packet[30..34].copy_from_slice(&ADDRESS.octets());
        assert_eq!(kind(&packet, ADDRESS), Some(Kind::Ipv4));
        assert_eq!(kind(&packet[..33], ADDRESS), None);
    }

    #[test]
    fn what_is_no_arp_for_ethernet_and_ipv4_is_an_error() {
        for place in ETHERNET_BYTES..ETHERNET_BYTES + 8 {
            let mut wrong = request(ADDRESS);
            wrong[place] ^= 0x40;
            assert_eq!(answer(&wrong, OURS, ADDRESS), Err(()), "{place}");
        }
        assert_eq!(answer(&request(ADDRESS)[..41], OURS, ADDRESS), Err(()));
    }
}
