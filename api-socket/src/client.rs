//! The client half: a blocking client over the same types, for the command line, the supervisor and tests.
//!
//! One connection, one request at a time. It does not pipeline and does not repeat a request that failed.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::json;
use crate::routes::Method;
use crate::types::{
    Balloon, BalloonHintingStatus, BalloonStats, Fault, InstanceAction, InstanceInfo, MachineConfig,
    MemoryHotplugStatus, Reply, Request, Version, Vm, VmConfig,
};

/// The longest status line and headers of a reply, in bytes.
const MAX_HEAD: usize = 8192;
/// The most header fields of a reply.
const MAX_HEADERS: usize = 32;
/// The longest body of a reply, in bytes; a configuration with every device has some thousands.
const MAX_BODY: usize = 16 << 20;
/// Between two attempts to connect to a VMM that is starting.
const RETRY: Duration = Duration::from_millis(1);

/// A connection to a VMM's API socket. It is made again at the next request if the VMM closed it with its last reply.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    timeout: Option<Duration>,

    stream: Option<UnixStream>,
}

/// A reply as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: String,
}

/// Why there is no good reply.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The VMM is not there, went away, or took longer than the timeout.
    #[error("API socket {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    /// What answered is not this API.
    #[error("the VMM's reply is not understood: {0}")]
    Protocol(String),
    /// The VMM refused; nothing was changed.
    #[error("{0}")]
    Refused(Fault),
    /// What was to be sent cannot be read here.
    #[error("what is to be sent cannot be read: {0}")]
    Source(io::Error),
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// [`ClientError::Io`]
    pub fn connect(path: &Path) -> Result<Client, ClientError> {
        let mut client = Client { path: path.to_path_buf(), timeout: None, stream: None };
        client.stream = Some(client.open()?);
        Ok(client)
    }

    /// A client on a connection that is there already; `path` is told in errors, and where it is made again.
    pub fn over(stream: UnixStream, path: &Path) -> Client {
        Client { path: path.to_path_buf(), timeout: None, stream: Some(stream) }
    }

    /// Connects to the socket of a VMM that may still be starting: for as long as `patience`, a socket that is not
    /// there or does not listen is tried again.
    ///
    /// # Errors
    /// [`ClientError::Io`], of the last attempt.
    pub fn connect_within(path: &Path, patience: Duration) -> Result<Client, ClientError> {
        let deadline = Instant::now() + patience;
        loop {
            match Client::connect(path) {
                Err(ClientError::Io { source, .. }) if is_starting(&source) && Instant::now() < deadline => {
                    thread::sleep(RETRY);
                }
                outcome => return outcome,
            }
        }
    }

    /// Limits how long a request may take to the end of its reply; `None`, as it is at first, is for ever.
    ///
    /// # Errors
    /// [`ClientError::Io`], for a timeout of zero.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) -> Result<(), ClientError> {
        self.timeout = timeout;
        match &self.stream {
            Some(stream) => set_timeout(stream, timeout).map_err(|source| self.io_error(source)),
            None => Ok(()),
        }
    }

    /// Makes a request that changes something.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the VMM says no, and the other errors if it says nothing that is understood.
    pub fn apply(&mut self, request: &Request) -> Result<(), ClientError> {
        self.send(request).map(|_| ())
    }

    /// `GET /`; errors as for [`apply`](Client::apply).
    pub fn instance_info(&mut self) -> Result<InstanceInfo, ClientError> {
        match self.send(&Request::GetInstanceInfo)? {
            Reply::InstanceInfo(info) => Ok(info),
            other => unexpected(&other),
        }
    }

    /// `GET /version`; errors as for [`apply`](Client::apply).
    pub fn version(&mut self) -> Result<Version, ClientError> {
        match self.send(&Request::GetVersion)? {
            Reply::Version(version) => Ok(version),
            other => unexpected(&other),
        }
    }

    /// `GET /machine-config`; errors as for [`apply`](Client::apply).
    pub fn machine_config(&mut self) -> Result<MachineConfig, ClientError> {
        match self.send(&Request::GetMachineConfig)? {
            Reply::MachineConfig(config) => Ok(config),
            other => unexpected(&other),
        }
    }

    /// `GET /vm/config`; errors as for [`apply`](Client::apply).
    pub fn vm_config(&mut self) -> Result<VmConfig, ClientError> {
        match self.send(&Request::GetVmConfig)? {
            Reply::VmConfig(config) => Ok(*config),
            other => unexpected(&other),
        }
    }

    /// `GET /mmds`; errors as for [`apply`](Client::apply).
    pub fn mmds(&mut self) -> Result<serde_json::Value, ClientError> {
        match self.send(&Request::GetMmds)? {
            Reply::Mmds(value) => Ok(value),
            other => unexpected(&other),
        }
    }

    /// `GET /balloon`; errors as for [`apply`](Client::apply).
    pub fn balloon(&mut self) -> Result<Balloon, ClientError> {
        match self.send(&Request::GetBalloon)? {
            Reply::Balloon(balloon) => Ok(balloon),
            other => unexpected(&other),
        }
    }

    /// `GET /balloon/statistics`; errors as for [`apply`](Client::apply).
    pub fn balloon_stats(&mut self) -> Result<BalloonStats, ClientError> {
        match self.send(&Request::GetBalloonStats)? {
            Reply::BalloonStats(stats) => Ok(*stats),
            other => unexpected(&other),
        }
    }

    /// `GET /balloon/hinting/status`; errors as for [`apply`](Client::apply).
    pub fn balloon_hinting_status(&mut self) -> Result<BalloonHintingStatus, ClientError> {
        match self.send(&Request::GetBalloonHintingStatus)? {
            Reply::BalloonHintingStatus(status) => Ok(status),
            other => unexpected(&other),
        }
    }

    /// `GET /hotplug/memory`; errors as for [`apply`](Client::apply).
    pub fn memory_hotplug(&mut self) -> Result<MemoryHotplugStatus, ClientError> {
        match self.send(&Request::GetMemoryHotplug)? {
            Reply::MemoryHotplug(status) => Ok(status),
            other => unexpected(&other),
        }
    }

    /// Makes a request and waits for its reply, which is never [`Reply::Fault`].
    ///
    /// # Errors
    /// As for [`apply`](Client::apply).
    pub fn send(&mut self, request: &Request) -> Result<Reply, ClientError> {
        let (method, path, body) = encode(request)?;
        let response = self.request(method.as_str(), &path, body.as_deref())?;
        match response.status {
            204 => Ok(Reply::Empty),
            200 => decode(request, &response),
            _ => Err(ClientError::Refused(fault(&response))),
        }
    }

    /// Makes any request at all, right or wrong, and returns the reply as it came, whatever its status.
    ///
    /// # Errors
    /// [`ClientError::Io`] and [`ClientError::Protocol`]
    pub fn request(&mut self, method: &str, path: &str, body: Option<&str>) -> Result<Response, ClientError> {
        self.exchange(request_text(method, path, body).as_bytes())
    }

    /// Sends these bytes and reads one reply.
    ///
    /// # Errors
    /// [`ClientError::Io`] and [`ClientError::Protocol`]
    pub fn exchange(&mut self, request: &[u8]) -> Result<Response, ClientError> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => self.open()?,
        };
        let until = self.timeout.map(|timeout| Instant::now() + timeout);
        // A server that refuses may close before it has read everything, and what it said is worth more than that.
        let written = stream.write_all(request);
        let response = match (read_response(&mut Timed { stream: &stream, until }), written) {
            (Ok(response), _) => response,
            (Err(ReadError::Io(source)), Ok(())) | (Err(_), Err(source)) => return Err(self.io_error(source)),
            (Err(ReadError::Protocol(what)), Ok(())) => return Err(ClientError::Protocol(what)),
        };
        if response.header("connection") != Some("close") {
            self.stream = Some(stream);
        }
        Ok(response)
    }

    fn open(&self) -> Result<UnixStream, ClientError> {
        let connected = UnixStream::connect(&self.path).and_then(|stream| {
            set_timeout(&stream, self.timeout)?;
            Ok(stream)
        });
        connected.map_err(|source| self.io_error(source))
    }

    fn io_error(&self, source: io::Error) -> ClientError {
        ClientError::Io { path: self.path.clone(), source }
    }
}

impl Response {
    /// The value of a header; `name` in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.as_str())
    }

    /// The text of a refusal; empty if this is none.
    pub fn fault_message(&self) -> String {
        let body: serde_json::Value = serde_json::from_str(&self.body).unwrap_or_default();
        body.get("fault_message").and_then(|message| message.as_str()).unwrap_or_default().to_string()
    }
}

/// A request as it is sent.
pub(crate) fn request_text(method: &str, path: &str, body: Option<&str>) -> String {
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n");
    match body {
        Some(body) => text.push_str(&format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )),
        None => text.push_str("\r\n"),
    }
    text
}

/// The method, path and body that [`route`](crate::route) reads as this request.
///
/// # Errors
/// [`ClientError::Protocol`] for a path that is not UTF-8: JSON cannot say it.
pub fn encode(request: &Request) -> Result<(Method, String, Option<String>), ClientError> {
    let get = |path: &str| Ok((Method::Get, path.to_string(), None));
    match request {
        Request::GetInstanceInfo => get("/"),
        Request::GetVersion => get("/version"),
        Request::GetVmConfig => get("/vm/config"),
        Request::GetMachineConfig => get("/machine-config"),
        Request::PutMachineConfig(config) => with_body(Method::Put, "/machine-config", config),
        Request::PatchMachineConfig(update) => with_body(Method::Patch, "/machine-config", update),
        Request::PutBootSource(source) => with_body(Method::Put, "/boot-source", source),
        Request::PutCpuConfig(config) => with_body(Method::Put, "/cpu-config", config),
        Request::PutDrive(drive) => with_body(Method::Put, &drive_path(&drive.drive_id), drive),
        Request::PatchDrive(update) => with_body(Method::Patch, &drive_path(&update.drive_id), update),
        Request::DeleteDrive(id) => Ok((Method::Delete, drive_path(id), None)),
        Request::PutNetworkInterface(interface) => {
            with_body(Method::Put, &interface_path(&interface.iface_id), interface)
        }
        Request::PatchNetworkInterface(update) => {
            with_body(Method::Patch, &interface_path(&update.iface_id), update)
        }
        Request::DeleteNetworkInterface(id) => Ok((Method::Delete, interface_path(id), None)),
        Request::PutPmem(pmem) => with_body(Method::Put, &pmem_path(&pmem.id), pmem),
        Request::PatchPmem(update) => with_body(Method::Patch, &pmem_path(&update.id), update),
        Request::DeletePmem(id) => Ok((Method::Delete, pmem_path(id), None)),
        Request::GetBalloon => get("/balloon"),
        Request::PutBalloon(balloon) => with_body(Method::Put, "/balloon", balloon),
        Request::PatchBalloon(update) => with_body(Method::Patch, "/balloon", update),
        Request::GetBalloonStats => get("/balloon/statistics"),
        Request::PatchBalloonStats(update) => with_body(Method::Patch, "/balloon/statistics", update),
        Request::StartBalloonHinting(command) => with_body(Method::Patch, "/balloon/hinting/start", command),
        Request::StopBalloonHinting => Ok((Method::Patch, "/balloon/hinting/stop".to_string(), None)),
        Request::GetBalloonHintingStatus => get("/balloon/hinting/status"),
        Request::GetMemoryHotplug => get("/hotplug/memory"),
        Request::PutMemoryHotplug(config) => with_body(Method::Put, "/hotplug/memory", config),
        Request::PatchMemoryHotplug(update) => with_body(Method::Patch, "/hotplug/memory", update),
        Request::PutConsole(console) => with_body(Method::Put, "/console", console),
        Request::PatchConsole(update) => with_body(Method::Patch, "/console", update),
        Request::PutVsock(vsock) => with_body(Method::Put, "/vsock", vsock),
        Request::PutEntropy(entropy) => with_body(Method::Put, "/entropy", entropy),
        Request::PatchEntropy(update) => with_body(Method::Patch, "/entropy", update),
        Request::PutSerial(serial) => with_body(Method::Put, "/serial", serial),
        Request::GetMmds => get("/mmds"),
        Request::PutMmds(value) => with_body(Method::Put, "/mmds", value),
        Request::PatchMmds(patch) => with_body(Method::Patch, "/mmds", patch),
        Request::PutMmdsConfig(config) => with_body(Method::Put, "/mmds/config", config),
        Request::PutLogger(logger) => with_body(Method::Put, "/logger", logger),
        Request::PutMetrics(metrics) => with_body(Method::Put, "/metrics", metrics),
        Request::Action(action_type) => {
            with_body(Method::Put, "/actions", &InstanceAction { action_type: *action_type })
        }
        Request::PatchVm(state) => with_body(Method::Patch, "/vm", &Vm { state: *state }),
    }
}

fn with_body(
    method: Method,
    path: &str,
    body: &impl Serialize,
) -> Result<(Method, String, Option<String>), ClientError> {
    let text = serde_json::to_string(body)
        .map_err(|error| ClientError::Protocol(format!("{path} cannot be written as JSON: {error}")))?;
    Ok((method, path.to_string(), Some(text)))
}

fn drive_path(id: &str) -> String {
    format!("/drives/{id}")
}

fn interface_path(id: &str) -> String {
    format!("/network-interfaces/{id}")
}

fn pmem_path(id: &str) -> String {
    format!("/pmem/{id}")
}

fn decode(request: &Request, response: &Response) -> Result<Reply, ClientError> {
    match request {
        Request::GetInstanceInfo => parse(response).map(Reply::InstanceInfo),
        Request::GetVersion => parse(response).map(Reply::Version),
        Request::GetMachineConfig => parse(response).map(Reply::MachineConfig),
        Request::GetBalloon => parse(response).map(Reply::Balloon),
        Request::GetBalloonStats => parse(response).map(|stats| Reply::BalloonStats(Box::new(stats))),
        Request::GetBalloonHintingStatus => parse(response).map(Reply::BalloonHintingStatus),
        Request::GetMemoryHotplug => parse(response).map(Reply::MemoryHotplug),
        Request::GetVmConfig => parse(response).map(|config| Reply::VmConfig(Box::new(config))),
        Request::GetMmds => serde_json::from_str(&response.body)
            .map(Reply::Mmds)
            .map_err(|error| ClientError::Protocol(error.to_string())),
        _ => Err(ClientError::Protocol(format!("200 where 204 should be: {}", response.body))),
    }
}

fn parse<T: DeserializeOwned>(response: &Response) -> Result<T, ClientError> {
    json::parse(response.body.as_bytes()).map_err(ClientError::Protocol)
}

fn unexpected<T>(reply: &Reply) -> Result<T, ClientError> {
    Err(ClientError::Protocol(format!("a reply to another request: {reply:?}")))
}

pub(crate) fn fault(response: &Response) -> Fault {
    let message = match response.fault_message() {
        text if text.is_empty() => format!("status {} without a reason", response.status),
        text => text,
    };
    Fault { status: response.status, message }
}

enum ReadError {
    Io(io::Error),
    Protocol(String),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> ReadError {
        ReadError::Io(error)
    }
}

struct Head {
    response: Response,
    length: usize,
    content_length: usize,
}

/// Reads one reply of the fleet API.
pub(crate) fn read_reply(stream: &mut impl Read) -> io::Result<Response> {
    read_response(stream).map_err(|error| match error {
        ReadError::Io(error) => error,
        ReadError::Protocol(what) => io::Error::new(ErrorKind::InvalidData, what),
    })
}

/// The status in a whole head.
pub(crate) fn status_of(head: &[u8]) -> Result<u16, String> {
    match parse_head(head) {
        Ok(Some(head)) => Ok(head.response.status),
        Ok(None) => Err("its head is not complete".into()),
        Err(ReadError::Io(error)) => Err(error.to_string()),
        Err(ReadError::Protocol(what)) => Err(what),
    }
}

/// Reads one reply; interim ones (1xx) are passed over.
fn read_response(stream: &mut impl Read) -> Result<Response, ReadError> {
    let mut input = Vec::new();
    loop {
        match parse_head(&input)? {
            Some(head) if (100..200).contains(&head.response.status) => {
                input.drain(..head.length);
            }
            Some(head) => {
                let end = head.length + head.content_length;
                while input.len() < end {
                    read_more(stream, &mut input)?;
                }
                let body = input.get(head.length..end).unwrap_or_default();
                let body = String::from_utf8_lossy(body).into_owned();
                return Ok(Response { body, ..head.response });
            }
            None if input.len() > MAX_HEAD => {
                return Err(ReadError::Protocol(format!("its head is longer than {MAX_HEAD} bytes")));
            }
            None => read_more(stream, &mut input)?,
        }
    }
}

fn read_more(stream: &mut impl Read, input: &mut Vec<u8>) -> Result<(), ReadError> {
    let mut buffer = [0; 4096];
    let count = loop {
        match stream.read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            outcome => break outcome?,
        }
    };
    if count == 0 {
        return Err(ReadError::Io(io::Error::new(ErrorKind::UnexpectedEof, "the VMM closed the connection")));
    }
    input.extend_from_slice(buffer.get(..count).unwrap_or_default());
    Ok(())
}

fn parse_head(input: &[u8]) -> Result<Option<Head>, ReadError> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Response::new(&mut fields);
    let length = match parsed.parse(input) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(ReadError::Protocol(format!("it is not HTTP: {error}"))),
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let headers: Vec<_> =
        parsed.headers.iter().map(|field| (field.name.to_ascii_lowercase(), text(field.value))).collect();
    let response = Response { status: parsed.code.unwrap_or_default(), headers, body: String::new() };
    let content_length = match response.header("content-length").unwrap_or("0").parse() {
        Ok(content_length) if content_length <= MAX_BODY => content_length,
        _ => return Err(ReadError::Protocol(format!("its Content-Length is not a number up to {MAX_BODY}"))),
    };
    Ok(Some(Head { response, length, content_length }))
}

/// A stream that is read until then. A limit for each read would be none for a server that says a byte at a time.
struct Timed<'a> {
    stream: &'a UnixStream,
    until: Option<Instant>,
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(until) = self.until {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
        }
        self.stream.read(buffer)
    }
}

fn set_timeout(stream: &UnixStream, timeout: Option<Duration>) -> io::Result<()> {
    stream.set_read_timeout(timeout)?;
    stream.set_write_timeout(timeout)
}

fn is_starting(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused)
}
