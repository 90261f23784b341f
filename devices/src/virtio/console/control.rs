//! Control messages of a console with several ports (VIRTIO 1.3, section 5.3.6.2): a port, an event, a value, and what
//! belongs to the event.

use super::Size;
use crate::memory::GuestRam;
use crate::virtio::queue::{Chain, QueueError};

/// What precedes everything else in a message: le32 id, le16 event, le16 value.
const HEADER: usize = 8;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What a driver says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    DeviceReady,
    PortReady { id: u32, is_ready: bool },
    PortOpen { id: u32, is_open: bool },
}

/// Reads a message of the driver's: `None` for what is none, or says nothing to us. What follows the header is not read, as
/// no message of a driver's has more.
pub fn read(memory: &GuestRam, chain: &mut Chain) -> Result<Option<Said>, QueueError> {
    if (chain.readable.bytes() as usize) < HEADER {
        return Ok(None);
    }
    let mut header = [0; HEADER];
    chain.readable.read(memory, &mut header)?;
    let [a, b, c, d, e, f, g, h] = header;
    let (id, value) = (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([g, h]));
    Ok(match u16::from_le_bytes([e, f]) {
        // Otherwise it has failed, and there is nothing to be done for it.
        DEVICE_READY if value == 1 => Some(Said::DeviceReady),
        PORT_READY => Some(Said::PortReady { id, is_ready: value == 1 }),
        PORT_OPEN => Some(Said::PortOpen { id, is_open: value == 1 }),
        _ => None,
    })
}

/// What a driver is told of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    pub id: u32,
    pub event: Event<'a>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    PortAdd,
    /// It is a terminal.
    ConsolePort,
    PortName(&'a str),
    Resize(Size),
    /// The host's side is open, as it always is.
    PortOpen,
}

impl Message<'_> {
    /// As it is sent.
    pub fn bytes(&self) -> Vec<u8> {
        let (event, value) = match self.event {
            Event::PortAdd => (PORT_ADD, 0),
            Event::ConsolePort => (CONSOLE_PORT, 1),
            Event::PortName(_) => (PORT_NAME, 1),
            Event::Resize(_) => (RESIZE, 0),
            Event::PortOpen => (PORT_OPEN, 1u16),
        };
        let mut bytes = [&self.id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        match self.event {
            Event::PortName(name) => bytes.extend(name.as_bytes()),
            // In the order of 5.3.6.2. Linux long read the rows first, and nothing tells a device which kernel it has; the
            // one that the tests boot (Debian's 6.12.117) follows the specification.
            Event::Resize(Size { columns, rows }) => {
                bytes.extend(columns.to_le_bytes());
                bytes.extend(rows.to_le_bytes());
            }
            _ => {}
        }
        bytes
    }
}
