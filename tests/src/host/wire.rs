//! The frames between a host's owner and the agent in the host: what they mean and how they are laid out.
//!
//! One connection carries any number of commands, each a stream with a number that the owner picks. A frame is a kind
//! (one byte), a stream (u32), a payload length (u32), both little-endian, and the payload. Bytes of standard input,
//! output and error are flow-controlled for each stream: a side sends at most [`WINDOW`] bytes that the other has not
//! handed on and credited back, so that neither side ever buffers more than that and one slow reader holds up only
//! its own command.
//!
//! Not here: the connection itself (`link.rs` for the owner, `agent.rs` for the agent). Both ends are built from the
//! same source, so there is no version in the protocol: the agent's binary is part of a saved state's recipe.

use std::io::{self, Read};

use serde::{Deserialize, Serialize};

/// Largest payload of one frame, in bytes.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// Bytes of one stream that may be on their way in one direction, standard output and error together.
pub const WINDOW: usize = 256 << 10;

/// Streams that may be open at a time on one connection.
pub const MAX_STREAMS: usize = 64;

const HEADER: usize = 9;

/// A command to start in the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// The program, looked up in PATH, and its arguments.
    pub argv: Vec<String>,
    /// Variables added to the agent's own environment.
    pub env: Vec<(String, String)>,
    /// Working directory; the agent's own when absent.
    pub cwd: Option<String>,
    /// Runs on a new terminal of this size, where standard error is standard output.
    pub terminal: Option<Size>,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    pub rows: u16,
    pub columns: u16,
}

/// What a nested host must do after each start, fresh or restored, before its first command.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prepare {
    /// The time of day, in nanoseconds since 1970: a restored host's clock stands at the moment of the saving.
    pub unix_nanoseconds: u64,
    /// File systems to mount, in this order.
    pub mounts: Vec<Mount>,
}

/// A file system on one of the host's disks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mount {
    pub device: String,
    pub file_system: String,
    pub target: String,
    pub read_only: bool,
}

/// Frames from the owner to the agent.
#[derive(Clone, Debug, PartialEq)]
pub enum ToAgent {
    /// Asks for [`FromAgent::Pong`] with the same number: the agent is there and has read all before this.
    Ping(u64),
    /// Answered by [`FromAgent::Prepared`].
    Prepare(Prepare),
    /// Opens a stream.
    Run(u32, Command),
    Stdin(u32, Vec<u8>),
    /// No more standard input.
    StdinEnd(u32),
    /// A signal for the command's whole session.
    Signal(u32, i32),
    Resize(u32, Size),
    /// So many bytes of output were handed on.
    Credit(u32, u32),
}

/// Frames from the agent to the owner.
#[derive(Clone, Debug, PartialEq)]
pub enum FromAgent {
    /// The number of the ping, and how many processes there are that no open stream accounts for.
    Pong(u64, u32),
    /// Empty, or why the preparation failed.
    Prepared(String),
    Stdout(u32, Vec<u8>),
    Stderr(u32, Vec<u8>),
    /// So many bytes of standard input were handed on.
    Credit(u32, u32),
    /// Ends a stream: the exit code, or 128 and the number of the signal that ended the command.
    Exit(u32, i32),
}

/// A frame as it travels.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    kind: u8,
    stream: u32,
    payload: Vec<u8>,
}

impl Frame {
    fn new(kind: u8, stream: u32, payload: &[u8]) -> Self {
        Self { kind, stream, payload: payload.to_vec() }
    }

    /// The frame's bytes. A payload over [`MAX_PAYLOAD`] is an error: nothing is cut off or split here.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        let length = checked_length(self.payload.len())?;
        let mut bytes = Vec::with_capacity(HEADER + self.payload.len());
        bytes.push(self.kind);
        bytes.extend(self.stream.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(&self.payload);
        Ok(bytes)
    }

    /// Takes the first frame off the front of `bytes`, if all of it is there.
    pub fn take(bytes: &mut Vec<u8>) -> io::Result<Option<Self>> {
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER>() else { return Ok(None) };
        let (kind, stream, length) = parse_header(header)?;
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        let frame = Self::new(kind, stream, payload);
        bytes.drain(..HEADER + length);
        Ok(Some(frame))
    }

    /// Reads one frame, waiting for all of it; nothing at a clean end between frames.
    pub fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER];
        if from.read(&mut header[..1])? == 0 {
            return Ok(None);
        }
        from.read_exact(&mut header[1..])?;
        let (kind, stream, length) = parse_header(&header)?;
        let mut payload = vec![0; length];
        from.read_exact(&mut payload)?;
        Ok(Some(Self { kind, stream, payload }))
    }
}

fn parse_header(header: &[u8; HEADER]) -> io::Result<(u8, u32, usize)> {
    let [kind, s0, s1, s2, s3, l0, l1, l2, l3] = *header;
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    checked_length(length)?;
    Ok((kind, u32::from_le_bytes([s0, s1, s2, s3]), length))
}

fn checked_length(length: usize) -> io::Result<u32> {
    match u32::try_from(length) {
        Ok(small) if length <= MAX_PAYLOAD => Ok(small),
        _ => Err(invalid(format!("a frame of {length} bytes: at most {MAX_PAYLOAD} are allowed"))),
    }
}

impl ToAgent {
    /// The frame for this message; an error when a command does not fit into one.
    pub fn frame(&self) -> io::Result<Frame> {
        Ok(match self {
            Self::Ping(number) => Frame::new(b'?', 0, &number.to_le_bytes()),
            Self::Prepare(prepare) => Frame::new(b'P', 0, &serde_json::to_vec(prepare)?),
            Self::Run(stream, command) => Frame::new(b'R', *stream, &serde_json::to_vec(command)?),
            Self::Stdin(stream, bytes) => Frame::new(b'I', *stream, bytes),
            Self::StdinEnd(stream) => Frame::new(b'E', *stream, &[]),
            Self::Signal(stream, signal) => Frame::new(b'S', *stream, &signal.to_le_bytes()),
            Self::Resize(stream, size) => Frame::new(b'W', *stream, &serde_json::to_vec(size)?),
            Self::Credit(stream, bytes) => Frame::new(b'c', *stream, &bytes.to_le_bytes()),
        })
    }

    /// The message in a frame.
    pub fn parse(frame: Frame) -> io::Result<Self> {
        let Frame { kind, stream, payload } = frame;
        Ok(match kind {
            b'?' => Self::Ping(u64::from_le_bytes(exactly(&payload)?)),
            b'P' => Self::Prepare(serde_json::from_slice(&payload)?),
            b'R' => Self::Run(stream, serde_json::from_slice(&payload)?),
            b'I' => Self::Stdin(stream, payload),
            b'E' => Self::StdinEnd(stream),
            b'S' => Self::Signal(stream, i32::from_le_bytes(exactly(&payload)?)),
            b'W' => Self::Resize(stream, serde_json::from_slice(&payload)?),
            b'c' => Self::Credit(stream, u32::from_le_bytes(exactly(&payload)?)),
            _ => return Err(invalid(format!("the owner sent a frame of kind {kind:#x}"))),
        })
    }
}

impl FromAgent {
    /// The frame for this message.
    pub fn frame(&self) -> Frame {
        match self {
            Self::Pong(number, processes) => Frame::new(b'!', *processes, &number.to_le_bytes()),
            Self::Prepared(error) => Frame::new(b'p', 0, error.as_bytes()),
            Self::Stdout(stream, bytes) => Frame::new(b'o', *stream, bytes),
            Self::Stderr(stream, bytes) => Frame::new(b'e', *stream, bytes),
            Self::Credit(stream, bytes) => Frame::new(b'c', *stream, &bytes.to_le_bytes()),
            Self::Exit(stream, code) => Frame::new(b'x', *stream, &code.to_le_bytes()),
        }
    }

    /// The message in a frame.
    pub fn parse(frame: Frame) -> io::Result<Self> {
        let Frame { kind, stream, payload } = frame;
        Ok(match kind {
            b'!' => Self::Pong(u64::from_le_bytes(exactly(&payload)?), stream),
            b'p' => Self::Prepared(String::from_utf8_lossy(&payload).into_owned()),
            b'o' => Self::Stdout(stream, payload),
            b'e' => Self::Stderr(stream, payload),
            b'c' => Self::Credit(stream, u32::from_le_bytes(exactly(&payload)?)),
            b'x' => Self::Exit(stream, i32::from_le_bytes(exactly(&payload)?)),
            _ => return Err(invalid(format!("the agent sent a frame of kind {kind:#x}"))),
        })
    }
}

fn exactly<const N: usize>(payload: &[u8]) -> io::Result<[u8; N]> {
    payload.try_into().map_err(|_| invalid(format!("a payload of {} bytes where {N} belong", payload.len())))
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_message_to_the_agent() -> Vec<ToAgent> {
        let size = Size { rows: 50, columns: 132 };
        let command = Command {
            argv: vec!["sh".into(), "-c".into(), "echo \"ä\n\"".into()],
            env: vec![("A".into(), "b=c".into())],
            cwd: Some("/scratch".into()),
            terminal: Some(size),
        };
        let mount = Mount {
            device: "/dev/vdb".into(),
            file_system: "erofs".into(),
            target: "/build".into(),
            read_only: true,
        };
        vec![
            ToAgent::Ping(u64::MAX),
            ToAgent::Prepare(Prepare { unix_nanoseconds: 1, mounts: vec![mount] }),
            ToAgent::Run(7, command),
            ToAgent::Stdin(7, (0..=255).collect()),
            ToAgent::StdinEnd(7),
            ToAgent::Signal(7, 15),
            ToAgent::Resize(u32::MAX, size),
            ToAgent::Credit(7, 65536),
        ]
    }

    fn every_message_from_the_agent() -> Vec<FromAgent> {
        vec![
            FromAgent::Pong(3, 2),
            FromAgent::Prepared("no such device".into()),
            FromAgent::Stdout(1, (0..=255).collect()),
            FromAgent::Stderr(1, vec![]),
            FromAgent::Credit(1, 9),
            FromAgent::Exit(1, -1),
        ]
    }

    #[test]
    fn every_message_survives_the_journey() {
        for message in every_message_to_the_agent() {
            let mut bytes = message.frame().unwrap().encode().unwrap();
            let frame = Frame::take(&mut bytes).unwrap().unwrap();
            assert_eq!(ToAgent::parse(frame).unwrap(), message);
            assert!(bytes.is_empty());
        }
        for message in every_message_from_the_agent() {
            let bytes = message.frame().encode().unwrap();
            let frame = Frame::read(&mut bytes.as_slice()).unwrap().unwrap();
            assert_eq!(FromAgent::parse(frame).unwrap(), message);
        }
    }

    #[test]
    fn frames_that_arrive_byte_by_byte_come_out_whole() {
        let sent = every_message_to_the_agent();
        let wire: Vec<u8> = sent.iter().flat_map(|m| m.frame().unwrap().encode().unwrap()).collect();
        let (mut arrived, mut got) = (Vec::new(), Vec::new());
        for byte in wire {
            arrived.push(byte);
            while let Some(frame) = Frame::take(&mut arrived).unwrap() {
                got.push(ToAgent::parse(frame).unwrap());
            }
        }
        assert_eq!(got, sent);
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_its_payload_is_read() {
        let mut header = vec![b'I', 0, 0, 0, 0];
        header.extend((MAX_PAYLOAD as u32 + 1).to_le_bytes());
        assert!(Frame::read(&mut header.as_slice()).is_err());
        assert!(Frame::take(&mut header).is_err());
        assert!(ToAgent::Stdin(1, vec![0; MAX_PAYLOAD]).frame().unwrap().encode().is_ok());
        assert!(ToAgent::Stdin(1, vec![0; MAX_PAYLOAD + 1]).frame().unwrap().encode().is_err());
    }

    #[test]
    fn an_end_between_frames_is_clean_and_an_end_within_one_is_not() {
        assert_eq!(Frame::read(&mut [].as_slice()).unwrap(), None);
        let bytes = FromAgent::Exit(1, 0).frame().encode().unwrap();
        assert!(Frame::read(&mut &bytes[..bytes.len() - 1]).is_err());
    }

    #[test]
    fn unknown_kinds_and_short_payloads_are_errors() {
        assert!(ToAgent::parse(Frame::new(b'z', 0, &[])).is_err());
        assert!(FromAgent::parse(Frame::new(b'z', 0, &[])).is_err());
        assert!(ToAgent::parse(Frame::new(b'S', 0, &[1, 2])).is_err());
        assert!(FromAgent::parse(Frame::new(b'x', 0, &[1, 2, 3, 4, 5])).is_err());
    }
}
