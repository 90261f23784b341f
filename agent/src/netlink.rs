//! What is asked of the kernel about networks: an interface up, an address, the default route, and which addresses there are.
//!
//! By rtnetlink(7), in messages of our own making: four of them do not need a library. IPv4 only.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};

/// More than the kernel puts into one answer.
const ANSWER_BYTES: usize = 32 << 10;

/// Answers to one question; a guest has a handful of addresses.
const MAX_ANSWERS: usize = 64;

const HEADER: usize = 16;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;

const AF_INET: u8 = 2;
const IFF_UP: u32 = 1;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;
/// The gateway is on this link whatever the addresses say.
const RTNH_F_ONLINK: u32 = 4;

pub struct Netlink(OwnedFd);

impl Netlink {
    pub fn new() -> io::Result<Netlink> {
        Ok(Netlink(socket_with(AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?))
    }

    /// Switches an interface on.
    pub fn up(&self, index: u32) -> io::Result<()> {
        let up = IFF_UP.to_ne_bytes();
        self.change(RTM_NEWLINK, 0, [[0; 4], index.to_ne_bytes(), up, up].as_flattened())
    }

    /// Gives an interface an address. One that it has already is as good.
    pub fn add_address(&self, index: u32, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        let broadcast = Ipv4Addr::from(u32::from(address) | !mask(prefix));
        let body = [
            &[AF_INET, prefix, 0, 0][..],
            &index.to_ne_bytes(),
            &attribute(IFA_LOCAL, &address.octets()),
            &attribute(IFA_ADDRESS, &address.octets()),
            &attribute(IFA_BROADCAST, &broadcast.octets()),
        ];
        there_already(self.change(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, &body.concat()))
    }

    /// Sends what is for elsewhere to this gateway, unless there is a way already.
    pub fn add_default_route(&self, index: u32, gateway: Ipv4Addr) -> io::Result<()> {
        let body = [
            &[AF_INET, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, 0, RTN_UNICAST][..],
            &RTNH_F_ONLINK.to_ne_bytes(),
            &attribute(RTA_GATEWAY, &gateway.octets()),
            &attribute(RTA_OIF, &index.to_ne_bytes()),
        ];
        there_already(self.change(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, &body.concat()))
    }

    /// The addresses of an interface.
    pub fn addresses(&self, index: u32) -> io::Result<Vec<Ipv4Addr>> {
        self.send(RTM_GETADDR, NLM_F_DUMP, &[AF_INET, 0, 0, 0, 0, 0, 0, 0])?;
        let mut addresses = Vec::new();
        for _ in 0..MAX_ANSWERS {
            for (kind, body) in messages(&self.receive()?) {
                match kind {
                    NLMSG_DONE => return Ok(addresses),
                    NLMSG_ERROR => return failure(body).map(|()| addresses),
                    RTM_NEWADDR => addresses.extend(address_of(index, body)),
                    _ => {}
                }
            }
        }
        Ok(addresses)
    }

    fn change(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.send(kind, flags | NLM_F_ACK, body)?;
        let answer = self.receive()?;
        messages(&answer)
            .into_iter()
            .filter(|(kind, _)| *kind == NLMSG_ERROR)
            .try_for_each(|(_, body)| failure(body))
    }

    fn send(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        let length = (HEADER + body.len()) as u32;
        let header = [
            &length.to_ne_bytes()[..],
            &kind.to_ne_bytes(),
            &(flags | NLM_F_REQUEST).to_ne_bytes(),
            // One question at a time needs no number, and the sender's is filled in.
            &[0; 8],
        ];
        let message = [&header.concat(), body].concat();
        sendto(&self.0, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        Ok(())
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; ANSWER_BYTES];
        let (length, _) = recv(&self.0, &mut bytes[..], RecvFlags::empty())?;
        bytes.truncate(length);
        Ok(bytes)
    }
}

pub fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0)
}

fn there_already(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

/// Length, kind, value; filled up to four bytes.
fn attribute(kind: u16, value: &[u8; 4]) -> Vec<u8> {
    [&8u16.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat()
}

/// The kinds and bodies in what was received.
fn messages(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut messages = Vec::new();
    while let (Some(length), Some(kind)) = (number(bytes, 0), bytes.get(4..6)) {
        let length = length as usize;
        let (Some(body), [one, two]) = (bytes.get(HEADER..length), kind) else { break };
        messages.push((u16::from_ne_bytes([*one, *two]), body));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    messages
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// An answer that begins with the negative of what errno would be, or zero.
fn failure(body: &[u8]) -> io::Result<()> {
    match number(body, 0).map(|number| number as i32) {
        Some(0) => Ok(()),
        Some(error) => Err(Errno::from_raw_os_error(error.wrapping_neg()).into()),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The address in a message about one, if it is this interface's.
fn address_of(index: u32, body: &[u8]) -> Option<Ipv4Addr> {
    if number(body, 4)? != index {
        return None;
    }
    let mut rest = body.get(8..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?);
        let value = rest.get(4..length)?;
        if kind == IFA_LOCAL {
            let octets: [u8; 4] = value.try_into().ok()?;
            return Some(octets.into());
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_kernel_tells_the_address_of_the_loopback_interface() {
        // A sandbox may have none, but the question is understood.
        let addresses = Netlink::new().unwrap().addresses(1).unwrap();
        assert!(addresses.iter().all(|address| address.is_loopback()), "{addresses:?}");
    }

    #[test]
    fn a_mask_has_as_many_bits_as_its_prefix() {
        assert_eq!(
            [0, 1, 16, 24, 32, 99].map(mask),
            [0, 1 << 31, 0xffff_0000, 0xffff_ff00, u32::MAX, u32::MAX]
        );
    }

    #[test]
    fn an_answer_says_what_failed() {
        assert!(failure(&0i32.to_ne_bytes()).is_ok());
        let error = failure(&(-17i32).to_ne_bytes()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert!(failure(&[]).is_err());
    }

    proptest! {
        #[test]
        fn any_answer_is_read_without_a_panic_or_an_endless_loop(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for (_, body) in messages(&bytes) {
                let _ = (address_of(1, body), failure(body));
            }
        }

        #[test]
        fn an_address_is_found_among_other_attributes(index in 1u32..5, kinds in proptest::collection::vec(3u16..20, 0..4)) {
            let mut body = [&[AF_INET, 24, 0, 0][..], &index.to_ne_bytes()].concat();
            for kind in kinds {
                body.extend(attribute(kind, &[9; 4]));
            }
            body.extend(attribute(IFA_LOCAL, &[10, 0, 0, 1]));
            prop_assert_eq!(address_of(index, &body), Some(Ipv4Addr::new(10, 0, 0, 1)));
            prop_assert_eq!(address_of(index + 1, &body), None);
        }
    }
}
