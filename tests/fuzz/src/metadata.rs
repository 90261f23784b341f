//! The metadata service under a hostile guest: frames of any kind, and segments that its TCP takes for those of a
//! connection, so that HTTP is reached too.

use std::net::Ipv4Addr;
use std::sync::Arc;

use devices::virtio::net::{LOOK, Neighbour};
use metadata::stack::PORT;
use metadata::{Metadata, Rules, Stack, Version};

use crate::input::Input;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const ETHERNET: usize = 14;
const IPV4: usize = 20;
const TCP: usize = 20;
const FIN: u8 = 1;
const SYN: u8 = 2;
const ACK: u8 = 16;
/// Connections that the guest has in mind.
const TALKS: usize = 4;

/// One of them: the next number of each side.
#[derive(Clone, Copy, Default)]
struct Talk {
    ours: u32,
    theirs: u32,
}

pub fn metadata(data: &[u8]) {
    crate::log_to_nowhere();
    let mut input = Input::new(data);
    let flags = input.u8().unwrap_or(0);
    let mut stack = stack(flags);
    let mut talks = [Talk::default(); TALKS];
    while step(&mut input, &mut stack, &mut talks).is_some() {}
    let mut frames = 0;
    while stack.give().is_some() {
        frames += 1;
        assert!(frames < 1 << 16, "it always has another frame");
    }
}

/// With a document of a few hundred bytes; the flags choose version and form.
pub fn stack(flags: u8) -> Stack {
    let metadata = Metadata::new(1 << 12).unwrap();
    let text = serde_json::json!({"a": {"b": "c", "d/e": [1, "f"]}, "long": "x".repeat(3000)});
    metadata.store().put(text.as_object().unwrap().clone()).unwrap();
    let version = if flags & 1 != 0 { Version::V2 } else { Version::V1 };
    Stack::new(Arc::new(metadata), ADDRESS, Rules { version, imds_compat: flags & 2 != 0 }).unwrap()
}

/// One thing that happens. `None` at the end of the input. `examples/seeds.rs` knows the numbers.
fn step(input: &mut Input, stack: &mut Stack, talks: &mut [Talk; TALKS]) -> Option<()> {
    let operation = input.u8()?;
    let which = usize::from(operation >> 4) % TALKS;
    match operation & 0xf {
        0 => take(stack, input.bytes(255)?),
        // For the service at least.
        1 => take(stack, &[&ethernet(0x0806)[..], input.bytes(255)?].concat()),
        2 => {
            let (protocol, payload) = (input.u8()?, input.bytes(255)?);
            take(stack, &packet(protocol, payload));
        }
        3 => {
            talks[which] = Talk { ours: 1000, theirs: 0 };
            segment(stack, talks, which, SYN, &[]);
        }
        4 => segment(stack, talks, which, ACK, input.bytes(255)?),
        5 => {
            let flags = input.u8()?;
            segment(stack, talks, which, flags, &[]);
        }
        // Something else than what is next.
        6 => talks[which].ours = talks[which].ours.wrapping_add_signed((input.u8()? as i8).into()),
        7 => talks[which].theirs = talks[which].theirs.wrapping_add_signed((input.u8()? as i8).into()),
        8..12 => {
            for _ in 0..=operation >> 4 {
                let Some(frame) = stack.give() else { break };
                hear(talks, &frame);
            }
        }
        12 => stack.wake(),
        13 => stack.reset(),
        _ => _ = stack.wake_in(),
    }
    Some(())
}

fn take(stack: &mut Stack, frame: &[u8]) {
    let is_for_it = stack.is_for_me(&frame[..frame.len().min(LOOK)]);
    // One that is not says nothing more.
    if is_for_it || frame.len() % 2 == 0 {
        stack.take(frame);
    }
}

fn segment(stack: &mut Stack, talks: &mut [Talk; TALKS], which: usize, flags: u8, text: &[u8]) {
    let talk = &mut talks[which];
    let mut bytes = (4000 + which as u16).to_be_bytes().to_vec();
    bytes.extend(PORT.to_be_bytes());
    bytes.extend(talk.ours.to_be_bytes());
    bytes.extend(talk.theirs.to_be_bytes());
    bytes.extend([(TCP as u8 / 4) << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    bytes.extend(text);
    talk.ours = talk.ours.wrapping_add(text.len() as u32 + u32::from(flags & (SYN | FIN) != 0));
    take(stack, &packet(6, &bytes));
}

/// Takes the numbers of a segment to one of the talks.
fn hear(talks: &mut [Talk; TALKS], frame: &[u8]) {
    assert!(frame.len() >= ETHERNET && frame.len() <= ETHERNET + 1500, "{}", frame.len());
    assert_eq!(frame[6..12], metadata::stack::MAC);
    let Some(tcp) = frame.get(ETHERNET + IPV4..).filter(|tcp| tcp.len() >= TCP && frame[23] == 6) else {
        return;
    };
    let port = u16::from_be_bytes([tcp[2], tcp[3]]);
    let Some(talk) = talks.get_mut(usize::from(port.wrapping_sub(4000))) else { return };
    let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
    let text = tcp.len() - usize::from(tcp[12] >> 4) * 4;
    talk.theirs = sequence.wrapping_add(text as u32 + u32::from(tcp[13] & (SYN | FIN) != 0));
}

fn ethernet(kind: u16) -> Vec<u8> {
    [&[0xff; 6][..], &MAC, &kind.to_be_bytes()].concat()
}

fn packet(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend(((IPV4 + payload.len()) as u16).to_be_bytes());
    header.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
    header.extend(GUEST.octets());
    header.extend(ADDRESS.octets());
    let sum: u32 = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    [&ethernet(0x0800)[..], &header, payload].concat()
}
