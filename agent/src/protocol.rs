//! What is said between the host and the agent, in bytes: requests, replies, and the frames of a command that runs.
//!
//! A connection is one operation. The client sends a request as one line of JSON, the agent answers with one line, and what
//! follows depends on the operation: frames both ways, an archive in one direction, or nothing.
//!
//! It opens nothing and waits for nothing but the reader that it is given.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The port of the guest's sockets at which the agent listens. Below 1024, so that no other user of the guest can take it.
pub const PORT: u32 = 1;

/// A request or a reply, with its end of line: room for a long command with its environment.
pub const MAX_LINE: usize = 64 << 10;

/// Bytes in one frame.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// What comes before the bytes of a frame: its kind and their number.
pub const FRAME_HEAD: usize = 5;

/// What an agent can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Is it there? Answered with [`Pong`].
    Ping {},
    /// Runs a command; frames follow.
    Exec(Exec),
    /// What is at this path? Answered with [`Found`].
    Look { path: String },
    /// Packs a file or directory into an archive, which follows. Its entries are below `name`, or the path's last component.
    Pack {
        path: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    },
    /// Unpacks the archive that the client sends next into this directory. When the client has ended its direction, one
    /// more line tells how it went.
    Unpack { path: String },
    /// Sets the size of the console's terminal.
    Window(Size),
    /// Asks the guest's init to power off.
    ShutDown {},
}

/// A command.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// The program, looked for in PATH unless it has a slash, and its arguments.
    pub argv: Vec<String>,
    /// Over what a login would set.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,
    /// Where it starts; the user's home if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// A name or number; root if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// It gets a terminal of this size. All its output is then that of the terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<Size>,
}

/// Of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    pub rows: u16,
    pub columns: u16,
}

/// The answer to a request: what was asked for, or why not, in words for a person.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply<T> {
    Ok(T),
    Error(String),
}

/// An agent that is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    pub version: String,
    /// The guest has its root file system, or will have none but the initramfs.
    pub root_is_ready: bool,
}

/// What is at a path; symbolic links are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Nothing,
    Directory,
    File,
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    pub kind: Kind,
}

/// It was done, or has begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    Code(i32),
    Signal(i32),
}

impl Exit {
    /// As a shell gives it: 128 and the number of the signal.
    pub fn code(self) -> i32 {
        match self {
            Exit::Code(code) => code,
            Exit::Signal(signal) => signal.saturating_add(128),
        }
    }
}

/// From the client to a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToGuest {
    Stdin(Vec<u8>),
    StdinEnd,
    Window(Size),
    /// A signal's number, for the command and its children.
    Signal(i32),
}

/// From a command to the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromGuest {
    /// May be empty, which means nothing.
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    /// The last one.
    Exit(Exit),
}

/// What the other side said is not of this protocol, or its end came too early.
#[derive(Debug, Error)]
pub enum ProtocolError {
    #[error("a frame of {0} bytes, where {MAX_PAYLOAD} are allowed")]
    LongFrame(u32),
    #[error("a frame of the kind {0}, which is not known here")]
    Kind(u8),
    #[error("a line of more than {MAX_LINE} bytes")]
    LongLine,
    #[error("{0} bytes of a request, where {MAX_LINE} are allowed")]
    LongRequest(usize),
    #[error("malformed {what}: {error}")]
    Json { what: &'static str, error: serde_json::Error },
    #[error("the connection ended in the middle")]
    Ended,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A kind, and bytes that mean what the kind says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub payload: Vec<u8>,
}

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const WINDOW: u8 = 3;
const SIGNAL: u8 = 4;
const EXIT: u8 = 5;

impl Frame {
    /// Takes the first whole frame out of what was received, if there is one.
    pub fn take(received: &mut Vec<u8>) -> Result<Option<Frame>, ProtocolError> {
        let Some((head, rest)) = received.split_first_chunk() else { return Ok(None) };
        let (kind, length) = head_of(*head)?;
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        let frame = Frame { kind, payload: payload.to_vec() };
        received.drain(..FRAME_HEAD + length);
        Ok(Some(frame))
    }

    /// Reads one frame. None at an end between two frames.
    pub fn read(from: &mut impl Read) -> Result<Option<Frame>, ProtocolError> {
        let mut head = [0; FRAME_HEAD];
        let Some((first, rest)) = head.split_first_mut() else { return Ok(None) };
        if !read_byte(from, first)? {
            return Ok(None);
        }
        read_whole(from, rest)?;
        let (kind, length) = head_of(head)?;
        let mut payload = vec![0; length];
        read_whole(from, &mut payload)?;
        Ok(Some(Frame { kind, payload }))
    }

    /// Its bytes. The payload is one that [`MAX_PAYLOAD`] allows, or the other side will not take it.
    pub fn encode(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(FRAME_HEAD + self.payload.len());
        bytes.push(self.kind);
        bytes.extend(length.to_le_bytes());
        bytes.extend(&self.payload);
        bytes
    }
}

fn head_of(head: [u8; FRAME_HEAD]) -> Result<(u8, usize), ProtocolError> {
    let [kind, length @ ..] = head;
    let length = u32::from_le_bytes(length);
    match usize::try_from(length) {
        Ok(bytes) if bytes <= MAX_PAYLOAD => Ok((kind, bytes)),
        _ => Err(ProtocolError::LongFrame(length)),
    }
}

impl ToGuest {
    pub fn parse(frame: Frame) -> Result<ToGuest, ProtocolError> {
        match frame.kind {
            STDIN if frame.payload.is_empty() => Ok(ToGuest::StdinEnd),
            STDIN => Ok(ToGuest::Stdin(frame.payload)),
            WINDOW => Ok(ToGuest::Window(parse("window size", &frame.payload)?)),
            SIGNAL => Ok(ToGuest::Signal(parse("signal", &frame.payload)?)),
            kind => Err(ProtocolError::Kind(kind)),
        }
    }

    pub fn frame(self) -> Frame {
        match self {
            ToGuest::Stdin(payload) => Frame { kind: STDIN, payload },
            ToGuest::StdinEnd => Frame { kind: STDIN, payload: Vec::new() },
            ToGuest::Window(size) => Frame { kind: WINDOW, payload: json(&size) },
            ToGuest::Signal(signal) => Frame { kind: SIGNAL, payload: json(&signal) },
        }
    }
}

impl FromGuest {
    pub fn parse(frame: Frame) -> Result<FromGuest, ProtocolError> {
        match frame.kind {
            STDOUT => Ok(FromGuest::Stdout(frame.payload)),
            STDERR => Ok(FromGuest::Stderr(frame.payload)),
            EXIT => Ok(FromGuest::Exit(parse("exit", &frame.payload)?)),
            kind => Err(ProtocolError::Kind(kind)),
        }
    }

    pub fn frame(self) -> Frame {
        match self {
            FromGuest::Stdout(payload) => Frame { kind: STDOUT, payload },
            FromGuest::Stderr(payload) => Frame { kind: STDERR, payload },
            FromGuest::Exit(exit) => Frame { kind: EXIT, payload: json(&exit) },
        }
    }
}

/// Reads a request or a reply, and nothing of what follows it.
pub fn read_line<T: DeserializeOwned>(what: &'static str, from: &mut impl Read) -> Result<T, ProtocolError> {
    parse(what, &line(from)?)
}

/// Writes a request or a reply as one line.
pub fn write_line(to: &mut impl Write, message: &impl Serialize) -> Result<(), ProtocolError> {
    let mut line = json(message);
    line.push(b'\n');
    if line.len() > MAX_LINE {
        return Err(ProtocolError::LongRequest(line.len()));
    }
    to.write_all(&line)?;
    Ok(to.flush()?)
}

/// A line without its end. Read byte by byte, for it is short and what comes after it is somebody else's.
pub(crate) fn line(from: &mut impl Read) -> Result<Vec<u8>, ProtocolError> {
    let (mut line, mut byte) = (Vec::new(), 0);
    loop {
        if !read_byte(from, &mut byte)? {
            return Err(ProtocolError::Ended);
        }
        match byte {
            b'\n' => return Ok(line),
            _ if line.len() + 1 >= MAX_LINE => return Err(ProtocolError::LongLine),
            _ => line.push(byte),
        }
    }
}

/// False at the end.
fn read_byte(from: &mut impl Read, byte: &mut u8) -> io::Result<bool> {
    loop {
        match from.read(std::slice::from_mut(byte)) {
            Ok(bytes) => return Ok(bytes > 0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn read_whole(from: &mut impl Read, bytes: &mut [u8]) -> Result<(), ProtocolError> {
    from.read_exact(bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => ProtocolError::Ended,
        _ => error.into(),
    })
}

fn parse<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, ProtocolError> {
    serde_json::from_slice(bytes).map_err(|error| ProtocolError::Json { what, error })
}

fn json(value: &impl Serialize) -> Vec<u8> {
    // It fails for maps with keys that are no text, and for types of others: there are none here.
    serde_json::to_vec(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str) -> Request {
        read_line("request", &mut format!("{text}\n").as_bytes()).unwrap()
    }

    #[test]
    fn requests_and_replies_are_as_documented() {
        assert_eq!(parsed(r#"{"ping":{}}"#), Request::Ping {});
        assert_eq!(parsed(r#"{"shut_down":{}}"#), Request::ShutDown {});
        let exec = r#"{"exec":{"argv":["sh"],"environment":{"K":"V"},"directory":"/root","user":"root","terminal":{"rows":24,"columns":80}}}"#;
        let wanted = Exec {
            argv: vec!["sh".into()],
            environment: [("K".into(), "V".into())].into(),
            directory: Some("/root".into()),
            user: Some("root".into()),
            terminal: Some(Size { rows: 24, columns: 80 }),
        };
        assert_eq!(parsed(exec), Request::Exec(wanted));
        let only_argv = Request::Exec(Exec { argv: vec!["ls".into()], ..Exec::default() });
        assert_eq!(String::from_utf8(json(&only_argv)).unwrap(), r#"{"exec":{"argv":["ls"]}}"#);
        let pong = Reply::Ok(Pong { version: "1".into(), root_is_ready: true });
        assert_eq!(String::from_utf8(json(&pong)).unwrap(), r#"{"ok":{"version":"1","root_is_ready":true}}"#);
        assert_eq!(json(&Reply::<Done>::Error("no".into())), br#"{"error":"no"}"#);
        assert_eq!(json(&Reply::Ok(Done {})), br#"{"ok":{}}"#);
        assert_eq!(json(&Exit::Signal(9)), br#"{"signal":9}"#);
    }

    #[test]
    fn what_is_not_known_is_refused_and_named() {
        for (text, words) in [
            (r#"{"reboot":{}}"#, "reboot"),
            (r#"{"exec":{"argv":[],"shell":true}}"#, "shell"),
            (r#"{"exec":{}}"#, "argv"),
            (r#"{"window":{"rows":70000,"columns":1}}"#, "70000"),
        ] {
            let error = read_line::<Request>("request", &mut format!("{text}\n").as_bytes()).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn a_line_is_read_to_its_end_and_no_further() {
        let mut said = &b"{\"ping\":{}}\nrest"[..];
        assert_eq!(read_line::<Request>("request", &mut said).unwrap(), Request::Ping {});
        assert_eq!(said, b"rest");
        assert!(matches!(read_line::<Request>("request", &mut said), Err(ProtocolError::Ended)));
        let long = vec![b' '; MAX_LINE];
        assert!(matches!(read_line::<Request>("request", &mut &long[..]), Err(ProtocolError::LongLine)));
        let request = Request::Look { path: "x".repeat(MAX_LINE) };
        assert!(matches!(write_line(&mut io::sink(), &request), Err(ProtocolError::LongRequest(_))));
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_before_its_bytes_are_there() {
        let mut received = [&[1][..], &(MAX_PAYLOAD as u32 + 1).to_le_bytes()].concat();
        assert!(matches!(Frame::take(&mut received), Err(ProtocolError::LongFrame(_))));
        assert!(matches!(Frame::read(&mut &received[..]), Err(ProtocolError::LongFrame(_))));
    }

    #[test]
    fn an_end_in_the_middle_of_a_frame_is_not_an_end() {
        let bytes = FromGuest::Stdout(b"abc".into()).frame().encode();
        for length in 1..bytes.len() {
            assert!(matches!(Frame::read(&mut &bytes[..length]), Err(ProtocolError::Ended)), "{length}");
        }
        assert!(Frame::read(&mut &[][..]).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_they_are_cut(
            payloads in proptest::collection::vec((0u8..6, proptest::collection::vec(any::<u8>(), 0..300)), 0..8),
            cut in 1usize..50,
        ) {
            let frames: Vec<_> = payloads.into_iter().map(|(kind, payload)| Frame { kind, payload }).collect();
            let bytes: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
            let (mut received, mut taken) = (Vec::new(), Vec::new());
            for piece in bytes.chunks(cut) {
                received.extend(piece);
                while let Some(frame) = Frame::take(&mut received).unwrap() {
                    taken.push(frame);
                }
            }
            prop_assert_eq!(&taken, &frames);
            prop_assert!(received.is_empty());
            let (mut from, mut read) = (&bytes[..], Vec::new());
            while let Some(frame) = Frame::read(&mut from).unwrap() {
                read.push(frame);
            }
            prop_assert_eq!(read, frames);
        }

        #[test]
        fn what_is_said_to_a_command_is_understood(size in any::<(u16, u16)>(), signal in any::<i32>(), bytes in proptest::collection::vec(any::<u8>(), 1..100)) {
            let size = Size { rows: size.0, columns: size.1 };
            for message in [ToGuest::Stdin(bytes.clone()), ToGuest::StdinEnd, ToGuest::Window(size), ToGuest::Signal(signal)] {
                prop_assert_eq!(ToGuest::parse(message.clone().frame()).unwrap(), message);
            }
            for message in [FromGuest::Stdout(bytes.clone()), FromGuest::Stderr(bytes), FromGuest::Exit(Exit::Code(signal)), FromGuest::Exit(Exit::Signal(signal))] {
                prop_assert_eq!(FromGuest::parse(message.clone().frame()).unwrap(), message);
            }
        }
    }
}
