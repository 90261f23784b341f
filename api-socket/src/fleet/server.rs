//! One connection, served by one thread that may wait: requests, replies, streams, uploads, and connections that become
//! something else.
//!
//! A client that does nothing holds its own thread and nobody else's; how many threads there are is the listener's
//! business. A request is answered before the next is read. What it does not do: pipelined requests are answered in turns,
//! but not read ahead of a stream or an upload.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::Serialize;

use super::routes::{self, Body, Request};
use crate::http::{self, Head, HttpResponse};
use crate::json;
use crate::types::Fault;

/// How long a connection may rest between requests.
const IDLE: Duration = Duration::from_secs(300);
/// How long a client may take to go on with a request, or to take what it asked for.
const STALL: Duration = Duration::from_secs(30);
/// The longest body that is not an upload, in bytes.
pub const MAX_BODY: usize = 64 << 10;
/// The longest upload, in bytes: more than a file system of the day holds.
pub const MAX_UPLOAD: usize = 1 << 44;
/// What is read from a client at a time, in bytes.
const READ_SIZE: usize = 4096;
/// Of a refused upload, bytes that are read and thrown away, so that its client comes to read the refusal.
const MAX_DISCARDED: usize = 1 << 20;

/// What a request gets.
pub enum Answer<'a> {
    /// 204.
    Empty,
    /// 200 and JSON.
    Json(String),
    /// 200 and text of this type.
    Text(&'static str, String),
    Fault(Fault),
    /// 200 and text of this type, in pieces, until it has been told all.
    Stream(&'static str, Tell<'a>),
    /// 101; the connection is whatever takes it. The bytes are what the client sent before it had the reply.
    Upgrade(Take<'a>),
}

/// Tells a reply piece by piece.
pub type Tell<'a> = Box<dyn FnOnce(&mut Stream) -> io::Result<()> + 'a>;
/// Takes a connection over.
pub type Take<'a> = Box<dyn FnOnce(UnixStream, Vec<u8>) + 'a>;

impl Answer<'_> {
    /// A reply that is this value.
    pub fn json(value: &impl Serialize) -> Answer<'static> {
        match serde_json::to_string(value) {
            Ok(text) => Answer::Json(text),
            Err(error) => Answer::Fault(Fault {
                status: 500,
                message: format!("The reply cannot be written as JSON: {error}."),
            }),
        }
    }
}

impl From<Fault> for Answer<'_> {
    fn from(fault: Fault) -> Self {
        Answer::Fault(fault)
    }
}

/// Serves a client until it goes, is too slow, or its connection has become something else. `handler` gets each request, and
/// for an upload the file, which ends early or fails if the client does.
///
/// # Errors
/// Those of the socket; they are the client's end.
pub fn serve<'a>(
    stream: UnixStream,
    mut handler: impl FnMut(Request, &mut dyn Read) -> Answer<'a>,
) -> io::Result<()> {
    stream.set_write_timeout(Some(STALL))?;
    let mut connection = Connection { stream, input: Vec::new() };
    loop {
        let Some(head) = connection.head()? else { return Ok(()) };
        let keep_alive = head.keep_alive;
        let mut upload = Upload { connection: &mut connection, left: 0 };
        let answer = match routes::body_of(&head.method, &head.path) {
            Body::Json => match upload.connection.body(&head)? {
                Ok(body) => match routes::route(&head.method, &head.path, &body) {
                    Ok(request) => handler(request, &mut io::empty()),
                    Err(fault) => fault.into(),
                },
                Err(fault) => {
                    upload.left = head.content_length;
                    fault.into()
                }
            },
            Body::Stream => {
                upload.left = head.content_length;
                if head.expects_continue {
                    upload.connection.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
                }
                match routes::route(&head.method, &head.path, &[]) {
                    Ok(request) => handler(request, &mut upload),
                    Err(fault) => fault.into(),
                }
            }
        };
        let unread = upload.left;
        let is_kept = connection.answer(answer, &head, keep_alive && unread == 0)?;
        match is_kept {
            Kept::Yes => {}
            Kept::No => return connection.close(unread),
            Kept::Elsewhere => return Ok(()),
        }
    }
}

enum Kept {
    Yes,
    No,
    /// It is somebody else's now.
    Elsewhere,
}

struct Connection {
    stream: UnixStream,
    /// What was read and not used yet.
    input: Vec<u8>,
}

impl Connection {
    /// The next request's; `None` when the client is done.
    fn head(&mut self) -> io::Result<Option<Head>> {
        self.stream.set_read_timeout(Some(if self.input.is_empty() { IDLE } else { STALL }))?;
        loop {
            match http::parse_head(&self.input, MAX_UPLOAD) {
                Ok(Some((head, length))) => {
                    self.input.drain(..length);
                    self.stream.set_read_timeout(Some(STALL))?;
                    return Ok(Some(head));
                }
                Ok(None) => {}
                Err(error) => {
                    self.reply(
                        error.status,
                        "application/json",
                        Some(json::write_fault(&error.message)),
                        false,
                    )?;
                    self.close(0)?;
                    return Ok(None);
                }
            }
            if self.read_more()? == 0 {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(STALL))?;
        }
    }

    fn read_more(&mut self) -> io::Result<usize> {
        let mut buffer = [0; READ_SIZE];
        let count = read_some(&self.stream, &mut buffer)?;
        self.input.extend_from_slice(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }

    /// The body of a request that is no upload.
    fn body(&mut self, head: &Head) -> io::Result<Result<Vec<u8>, Fault>> {
        if head.content_length > MAX_BODY {
            let message =
                format!("The body has {} bytes; at most {MAX_BODY} may be sent here.", head.content_length);
            return Ok(Err(Fault { status: 413, message }));
        }
        if head.expects_continue && head.content_length > 0 {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        while self.input.len() < head.content_length {
            if self.read_more()? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        let rest = self.input.split_off(head.content_length);
        Ok(Ok(std::mem::replace(&mut self.input, rest)))
    }

    fn answer(&mut self, answer: Answer, head: &Head, keep_alive: bool) -> io::Result<Kept> {
        let kept = if keep_alive { Kept::Yes } else { Kept::No };
        match answer {
            Answer::Empty => self.reply(204, "", None, keep_alive)?,
            Answer::Json(text) => self.reply(200, "application/json", Some(text), keep_alive)?,
            Answer::Text(kind, text) => self.reply(200, kind, Some(text), keep_alive)?,
            Answer::Fault(fault) => {
                let text = json::write_fault(&fault.message);
                self.reply(fault.status, "application/json", Some(text), keep_alive)?;
            }
            Answer::Stream(kind, tell) => {
                let head = format!(
                    "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
                );
                self.stream.write_all(head.as_bytes())?;
                let mut stream = Stream { stream: &self.stream };
                tell(&mut stream)?;
                self.stream.write_all(b"0\r\n\r\n")?;
                return Ok(Kept::No);
            }
            Answer::Upgrade(_) if !head.upgrades => {
                let text =
                    json::write_fault("This connection would become another: ask with `Upgrade: berth`.");
                self.reply(426, "application/json", Some(text), keep_alive)?;
            }
            Answer::Upgrade(take) => {
                self.stream.write_all(
                    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: berth\r\n\r\n",
                )?;
                self.stream.set_read_timeout(None)?;
                self.stream.set_write_timeout(None)?;
                take(self.stream.try_clone()?, std::mem::take(&mut self.input));
                return Ok(Kept::Elsewhere);
            }
        }
        Ok(kept)
    }

    fn reply(&mut self, status: u16, kind: &str, body: Option<String>, keep_alive: bool) -> io::Result<()> {
        let response = HttpResponse { status, body, deprecated: false };
        self.stream.write_all(&response.bytes_of_type(kind, keep_alive))
    }

    /// After the last reply. Closing with bytes unread would take the reply from a client that is still sending.
    fn close(&mut self, unread: usize) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Write)?;
        self.stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        let mut left = unread.min(MAX_DISCARDED);
        let mut buffer = [0; READ_SIZE];
        while left > 0 {
            match read_some(&self.stream, &mut buffer) {
                Ok(0) | Err(_) => break,
                Ok(count) => left = left.saturating_sub(count),
            }
        }
        Ok(())
    }
}

/// The body of a request as a file.
struct Upload<'a> {
    connection: &'a mut Connection,
    /// Bytes that have not been read yet.
    left: usize,
}

impl Read for Upload<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(self.left);
        let Some(place) = buffer.get_mut(..wanted).filter(|place| !place.is_empty()) else { return Ok(0) };
        let count = if self.connection.input.is_empty() {
            read_some(&self.connection.stream, place)?
        } else {
            let count = place.len().min(self.connection.input.len());
            self.connection.input.drain(..count).zip(place).for_each(|(byte, place)| *place = byte);
            count
        };
        if count == 0 {
            return Err(io::Error::new(
                ErrorKind::UnexpectedEof,
                "the client went away in the middle of its file",
            ));
        }
        self.left -= count;
        Ok(count)
    }
}

/// A reply that is told piece by piece.
#[derive(Debug)]
pub struct Stream<'a> {
    stream: &'a UnixStream,
}

impl Stream<'_> {
    /// Sends a piece. It waits for the client as long as a client may take.
    ///
    /// # Errors
    /// The client is gone, or too slow.
    pub fn tell(&mut self, piece: &[u8]) -> io::Result<()> {
        if piece.is_empty() {
            return Ok(());
        }
        let mut chunk = format!("{:x}\r\n", piece.len()).into_bytes();
        chunk.extend_from_slice(piece);
        chunk.extend_from_slice(b"\r\n");
        self.stream.write_all(&chunk)
    }

    /// The client has hung up. It does not wait.
    pub fn is_gone(&mut self) -> bool {
        let look = || -> io::Result<bool> {
            self.stream.set_nonblocking(true)?;
            let outcome = read_some(self.stream, &mut [0; READ_SIZE]);
            self.stream.set_nonblocking(false)?;
            match outcome {
                Ok(count) => Ok(count == 0),
                Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
                Err(error) => Err(error),
            }
        };
        look().unwrap_or(true)
    }
}

fn read_some(mut stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match stream.read(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}
