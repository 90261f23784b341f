//! The client half: blocking, one connection for each request.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::routes::{self, Log, Part, Request};
use super::types::{Event, Guest, GuestUpdate, Image, List, NewGuest, NewImage, Stats, Stop, Version};
use crate::client::{self, ClientError, Response};

/// Where the daemon listens unless it was told otherwise.
pub const SOCKET: &str = "/run/berth/berthd.sock";
/// The longest head of a reply, in bytes.
const MAX_HEAD: usize = 8192;
/// The longest line that tells the length of a piece, in bytes.
const MAX_LENGTH_LINE: usize = 32;
/// What is sent of a file at a time, in bytes.
const COPY_SIZE: usize = 256 << 10;

/// A daemon's socket.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
    timeout: Option<Duration>,
}

impl Client {
    /// The daemon that listens at `path`. It is not asked anything yet.
    pub fn new(path: &Path) -> Client {
        Client { path: path.to_owned(), timeout: None }
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Limits how long each wait for the daemon may take, streams apart; without it, for ever.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Client {
        Client { timeout: Some(timeout), ..self }
    }

    /// Errors of this and of the following: [`ClientError`].
    pub fn version(&self) -> Result<Version, ClientError> {
        self.get(&Request::GetVersion)
    }

    pub fn guests(&self) -> Result<Vec<Guest>, ClientError> {
        self.get::<List<Guest>>(&Request::ListGuests).map(|list| list.items)
    }

    pub fn guest(&self, guest: &str) -> Result<Guest, ClientError> {
        self.get(&Request::GetGuest(guest.into()))
    }

    pub fn create(&self, guest: NewGuest) -> Result<Guest, ClientError> {
        self.get(&Request::CreateGuest(guest))
    }

    pub fn update(&self, guest: &str, update: GuestUpdate) -> Result<Guest, ClientError> {
        self.get(&Request::UpdateGuest(guest.into(), update))
    }

    /// Returns when the guest runs.
    pub fn start(&self, guest: &str) -> Result<Guest, ClientError> {
        self.get(&Request::StartGuest(guest.into()))
    }

    /// Returns when the guest has ended.
    pub fn stop(&self, guest: &str, stop: Stop) -> Result<Guest, ClientError> {
        self.get(&Request::StopGuest(guest.into(), stop))
    }

    pub fn pause(&self, guest: &str) -> Result<Guest, ClientError> {
        self.get(&Request::PauseGuest(guest.into()))
    }

    pub fn resume(&self, guest: &str) -> Result<Guest, ClientError> {
        self.get(&Request::ResumeGuest(guest.into()))
    }

    /// Returns when nothing is left of the guest.
    pub fn remove(&self, guest: &str, force: bool) -> Result<(), ClientError> {
        self.done(&Request::RemoveGuest { guest: guest.into(), force })
    }

    pub fn stats(&self) -> Result<Vec<Stats>, ClientError> {
        self.get::<List<Stats>>(&Request::AllStats).map(|list| list.items)
    }

    pub fn guest_stats(&self, guest: &str) -> Result<Stats, ClientError> {
        self.get(&Request::GuestStats(guest.into()))
    }

    /// What has been logged, and with `follow` what comes, as it comes.
    pub fn logs(&self, guest: &str, of: Log, follow: bool) -> Result<Pieces, ClientError> {
        self.stream(&Request::Logs { guest: guest.into(), of, follow })
    }

    /// From now on.
    pub fn events(&self) -> Result<impl Iterator<Item = Result<Event, ClientError>> + use<>, ClientError> {
        let pieces = io::BufReader::new(self.stream(&Request::Events)?);
        let path = self.path.clone();
        Ok(io::BufRead::lines(pieces).map(move |line| {
            let line = line.map_err(|source| ClientError::Io { path: path.clone(), source })?;
            serde_json::from_str(&line).map_err(|error| ClientError::Protocol(error.to_string()))
        }))
    }

    /// Metrics in Prometheus' text format.
    pub fn metrics(&self) -> Result<String, ClientError> {
        self.ask(&Request::Metrics).map(|response| response.body)
    }

    /// The guest's serial console: what it writes, and what it gets as typed.
    pub fn console(&self, guest: &str) -> Result<UnixStream, ClientError> {
        self.upgrade(&Request::Console(guest.into()))
    }

    /// A connection to this vsock port of the guest, which for `wait_seconds` may still have nobody there.
    pub fn vsock(&self, guest: &str, port: u32, wait_seconds: u32) -> Result<UnixStream, ClientError> {
        self.upgrade(&Request::Vsock { guest: guest.into(), port, wait_seconds })
    }

    pub fn images(&self) -> Result<Vec<Image>, ClientError> {
        self.get::<List<Image>>(&Request::ListImages).map(|list| list.items)
    }

    pub fn image(&self, image: &str) -> Result<Image, ClientError> {
        self.get(&Request::GetImage(image.into()))
    }

    /// Sends a part of an image that is to be, `length` bytes. `progress` is told how many have been sent.
    pub fn put_part(
        &self,
        image: &str,
        part: Part,
        file: &mut dyn Read,
        length: u64,
        mut progress: impl FnMut(u64),
    ) -> Result<(), ClientError> {
        let (method, target, _) = encode(&Request::PutPart(image.into(), part))?;
        let mut stream = self.open()?;
        let head =
            format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n");
        let mut send = || -> Result<(), Unsent> {
            stream.write_all(head.as_bytes()).map_err(Unsent::There)?;
            let mut buffer = vec![0; COPY_SIZE];
            let mut sent = 0;
            while sent < length {
                let wanted = usize::try_from(length - sent).map_or(COPY_SIZE, |left| left.min(COPY_SIZE));
                let count = match file.read(buffer.get_mut(..wanted).unwrap_or_default()) {
                    Ok(0) => {
                        let why = "the file became shorter meanwhile";
                        return Err(Unsent::Here(io::Error::new(ErrorKind::UnexpectedEof, why)));
                    }
                    Ok(count) => count,
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(error) => return Err(Unsent::Here(error)),
                };
                stream.write_all(buffer.get(..count).unwrap_or_default()).map_err(Unsent::There)?;
                sent += count as u64;
                progress(sent);
            }
            Ok(())
        };
        let sent = match send() {
            // The daemon waits for what does not come, and has nothing to say before.
            Err(Unsent::Here(error)) => return Err(ClientError::Source(error)),
            Err(Unsent::There(error)) => Err(error),
            Ok(()) => Ok(()),
        };
        // Who refuses may close before everything is read, and what it said is worth more than that.
        match (client::read_reply(&mut stream), sent) {
            (Ok(response), _) if response.status != 204 => {
                Err(ClientError::Refused(client::fault(&response)))
            }
            (_, Err(source)) => Err(self.io_error(source)),
            (Err(source), Ok(())) => Err(self.io_error(source)),
            (Ok(_), Ok(())) => Ok(()),
        }
    }

    /// Makes an image of the parts that were sent.
    pub fn put_image(&self, image: &str, new: NewImage) -> Result<Image, ClientError> {
        self.get(&Request::PutImage(image.into(), new))
    }

    pub fn remove_image(&self, image: &str) -> Result<(), ClientError> {
        self.done(&Request::RemoveImage(image.into()))
    }

    fn get<T: DeserializeOwned>(&self, request: &Request) -> Result<T, ClientError> {
        let response = self.ask(request)?;
        serde_json::from_str(&response.body).map_err(|error| ClientError::Protocol(error.to_string()))
    }

    fn done(&self, request: &Request) -> Result<(), ClientError> {
        self.ask(request).map(|_| ())
    }

    fn ask(&self, request: &Request) -> Result<Response, ClientError> {
        let (method, target, body) = encode(request)?;
        let response = self.request(method, &target, body.as_deref())?;
        match response.status {
            200 | 204 => Ok(response),
            _ => Err(ClientError::Refused(client::fault(&response))),
        }
    }

    /// Makes any request at all, right or wrong, and returns the reply as it came, whatever its status.
    ///
    /// # Errors
    /// [`ClientError::Io`] and [`ClientError::Protocol`]
    pub fn request(&self, method: &str, target: &str, body: Option<&str>) -> Result<Response, ClientError> {
        let mut stream = self.open()?;
        let sent = stream.write_all(client::request_text(method, target, body).as_bytes());
        match (client::read_reply(&mut stream), sent) {
            (Ok(response), _) => Ok(response),
            (Err(_), Err(source)) | (Err(source), Ok(())) => Err(self.io_error(source)),
        }
    }

    fn stream(&self, request: &Request) -> Result<Pieces, ClientError> {
        let (method, target, _) = encode(request)?;
        let (stream, status) =
            self.begin(&format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n\r\n"))?;
        if status != 200 {
            return Err(ClientError::Protocol(format!("status {status} where 200 should be")));
        }
        stream.set_read_timeout(None).map_err(|source| self.io_error(source))?;
        Ok(Pieces { stream, left: 0, is_first: true, is_over: false })
    }

    fn upgrade(&self, request: &Request) -> Result<UnixStream, ClientError> {
        let (method, target, _) = encode(request)?;
        let (stream, status) = self.begin(&format!(
            "{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: berth\r\n\r\n"
        ))?;
        if status != 101 {
            return Err(ClientError::Protocol(format!("status {status} where 101 should be")));
        }
        let free = stream.set_read_timeout(None).and_then(|()| stream.set_write_timeout(None));
        free.map_err(|source| self.io_error(source))?;
        Ok(stream)
    }

    /// Sends a request and reads the head of a reply that goes on, and nothing behind it.
    fn begin(&self, request: &str) -> Result<(UnixStream, u16), ClientError> {
        let mut stream = self.open()?;
        stream.write_all(request.as_bytes()).map_err(|source| self.io_error(source))?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if head.len() >= MAX_HEAD {
                return Err(ClientError::Protocol(format!("its head is longer than {MAX_HEAD} bytes")));
            }
            let mut byte = [0];
            stream.read_exact(&mut byte).map_err(|source| self.io_error(source))?;
            head.extend(byte);
        }
        let status = client::status_of(&head).map_err(ClientError::Protocol)?;
        if status == 200 || status == 101 {
            return Ok((stream, status));
        }
        let mut whole = io::Cursor::new(head).chain(stream);
        let response = client::read_reply(&mut whole).map_err(|source| self.io_error(source))?;
        Err(ClientError::Refused(client::fault(&response)))
    }

    fn open(&self) -> Result<UnixStream, ClientError> {
        let connected = UnixStream::connect(&self.path).and_then(|stream| {
            stream.set_read_timeout(self.timeout)?;
            stream.set_write_timeout(self.timeout)?;
            Ok(stream)
        });
        connected.map_err(|source| self.io_error(source))
    }

    fn io_error(&self, source: io::Error) -> ClientError {
        ClientError::Io { path: self.path.clone(), source }
    }
}

/// Why not all of a file was sent.
enum Unsent {
    Here(io::Error),
    There(io::Error),
}

fn encode(request: &Request) -> Result<(&'static str, String, Option<String>), ClientError> {
    routes::encode(request).map_err(|error| ClientError::Protocol(error.to_string()))
}

/// A reply that comes in pieces, as one stream of bytes. It ends where the daemon says so; without that it fails.
pub struct Pieces {
    stream: UnixStream,
    /// Bytes of the piece that is being read.
    left: usize,
    is_first: bool,
    is_over: bool,
}

impl fmt::Debug for Pieces {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Pieces({:?})", self.stream)
    }
}

impl Pieces {
    /// The first piece, or as much of it as this, and waits for it: of a log, what is kept of it so far if that is anything.
    ///
    /// # Errors
    /// The daemon goes away.
    pub fn first(&mut self, most: u64) -> io::Result<Vec<u8>> {
        let mut piece = vec![0];
        let begun = self.read(&mut piece)?;
        piece.truncate(begun);
        let left = (self.left as u64).min(most);
        self.take(left).read_to_end(&mut piece)?;
        Ok(piece)
    }

    /// RFC 9112 section 7.1, without extensions and trailers, which this server does not send.
    fn next_length(&mut self) -> io::Result<usize> {
        if !std::mem::take(&mut self.is_first) {
            self.line()?;
        }
        let line = self.line()?;
        let length = usize::from_str_radix(&line, 16);
        length.map_err(|_| io::Error::new(ErrorKind::InvalidData, "the length of a piece is not a number"))
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        loop {
            let mut byte = [0];
            self.stream.read_exact(&mut byte)?;
            match byte {
                [b'\n'] => return Ok(String::from_utf8_lossy(&line).trim_end().to_owned()),
                _ if line.len() == MAX_LENGTH_LINE => {
                    return Err(io::Error::new(ErrorKind::InvalidData, "this is no chunked reply"));
                }
                [byte] => line.push(byte),
            }
        }
    }
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.is_over || buffer.is_empty() {
            return Ok(0);
        }
        if self.left == 0 {
            self.left = self.next_length()?;
            if self.left == 0 {
                self.is_over = true;
                return Ok(0);
            }
        }
        let wanted = buffer.len().min(self.left);
        let count = self.stream.read(buffer.get_mut(..wanted).unwrap_or_default())?;
        if count == 0 {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "the daemon went away"));
        }
        self.left -= count;
        Ok(count)
    }
}
