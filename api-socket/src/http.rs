//! One HTTP/1.1 connection as seen by the server, without I/O: bytes in, requests out, replies in, bytes out.
//!
//! It frames messages: heads, bodies, keep-alive, pipelining, `Expect`. How the bytes were cut on their way makes no
//! difference to what comes out. It does not know paths, JSON or sockets, and of HTTP it leaves out what this API has
//! no use for: transfer codings, upgrades, compression, trailers. Where RFC 9112 lets a server choose, it refuses.

use std::mem;

/// The longest request line and headers together, in bytes.
pub const MAX_HEAD: usize = 8192;
/// The most header fields of a request.
pub const MAX_HEADERS: usize = 32;
/// The longest body, in bytes, unless the VMM was told otherwise. Firecracker's figure.
pub const DEFAULT_MAX_BODY: usize = 51200;
/// With this many bytes of replies not yet taken by the client, in bytes, no further request is read or answered.
pub const MAX_UNSENT: usize = 64 * 1024;

/// A request as it came: nothing in it has been looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpRequest {
    pub method: String,
    /// The target without scheme and host, which clients may give.
    pub path: String,
    /// Empty if there was none.
    pub body: Vec<u8>,
}

/// A reply as it goes out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpResponse {
    pub status: u16,
    /// JSON. There is none with status 204.
    pub body: Option<String>,
    /// Say so in a `Deprecation` header.
    pub deprecated: bool,
}

/// What is wrong with how a client speaks HTTP. It is told, and the connection ends: where its next request would
/// begin is not certain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ProtocolError {
    pub status: u16,
    pub message: String,
}

/// What a connection has for whoever serves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A request. [`Connection::respond`] comes before the next.
    Request(HttpRequest),
    /// The last thing on this connection; it wants a response too.
    Error(ProtocolError),
}

/// The state of one connection. Each of its buffers is bounded: `input` by the largest request and whatever the
/// caller reads at a time, `output` by [`MAX_UNSENT`] and one response.
#[derive(Debug)]
pub struct Connection {
    max_body: usize,

    input: Vec<u8>,
    input_ended: bool,
    output: Vec<u8>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Waiting for a whole head.
    Head,
    /// Waiting for the body of this head.
    Body(Head),
    /// Waiting for the response to a request.
    Response { keep_alive: bool },
    /// Nothing more is read or answered; what is in `output` still goes out.
    Closed,
}

#[derive(Debug)]
pub(crate) struct Head {
    pub method: String,
    pub path: String,
    pub content_length: usize,
    pub keep_alive: bool,
    pub expects_continue: bool,
    /// The client has an `Upgrade` header. The guest API has no use for it.
    pub upgrades: bool,
}

impl Connection {
    /// `max_body` is in bytes.
    pub fn new(max_body: usize) -> Connection {
        Connection { max_body, input: Vec::new(), input_ended: false, output: Vec::new(), state: State::Head }
    }

    /// Takes bytes from the client. Ask [`wants_input`](Connection::wants_input) before reading them.
    pub fn receive(&mut self, bytes: &[u8]) {
        if !self.is_closed() {
            self.input.extend_from_slice(bytes);
        }
    }

    /// The next request, or why there will be none. `None` means wait: for bytes, for a response to the last request,
    /// or for the client to take its replies.
    pub fn next_input(&mut self) -> Option<Input> {
        if self.output.len() >= MAX_UNSENT {
            return None;
        }
        match self.advance() {
            Ok(Some(request)) => Some(Input::Request(request)),
            Ok(None) => {
                if self.input_ended {
                    self.state = State::Closed;
                }
                None
            }
            Err(error) => {
                self.input = Vec::new();
                self.state = State::Response { keep_alive: false };
                Some(Input::Error(error))
            }
        }
    }

    /// Answers the last [`Input`]. Without one it does nothing.
    pub fn respond(&mut self, response: &HttpResponse) {
        let State::Response { keep_alive } = self.state else { return };
        self.output.extend(response.bytes(keep_alive));
        self.state = if keep_alive { State::Head } else { State::Closed };
    }

    /// The client will send no more. What it asked completely is still answered; then the connection is closed.
    pub fn input_ended(&mut self) {
        self.input_ended = true;
    }

    /// What is to be sent.
    pub fn output(&self) -> &[u8] {
        &self.output
    }

    /// The first `count` bytes of [`output`](Connection::output) were sent.
    pub fn sent(&mut self, count: usize) {
        self.output.drain(..count.min(self.output.len()));
        // An idle connection keeps no memory.
        if self.output.is_empty() {
            self.output = Vec::new();
        }
    }

    /// Whether to read from the client now.
    pub fn wants_input(&self) -> bool {
        !self.input_ended && !self.is_closed() && self.output.len() < MAX_UNSENT
    }

    /// Whether the last response is in [`output`](Connection::output) or was sent.
    pub fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed)
    }

    /// Whether a request has begun to arrive and is not complete, or replies wait to be taken: the client is at work
    /// or stuck, and not at rest.
    pub fn is_busy(&self) -> bool {
        !self.input.is_empty() || !self.output.is_empty() || matches!(self.state, State::Body(_))
    }

    fn advance(&mut self) -> Result<Option<HttpRequest>, ProtocolError> {
        if matches!(self.state, State::Head) {
            let Some((head, length)) = parse_head(&self.input, self.max_body)? else { return Ok(None) };
            self.input.drain(..length);
            if head.expects_continue && head.content_length > 0 {
                self.output.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
            }
            self.state = State::Body(head);
        }
        match mem::replace(&mut self.state, State::Closed) {
            State::Body(head) if self.input.len() >= head.content_length => {
                self.state = State::Response { keep_alive: head.keep_alive };
                let body = self.take_input(head.content_length);
                Ok(Some(HttpRequest { method: head.method, path: head.path, body }))
            }
            waiting => {
                self.state = waiting;
                Ok(None)
            }
        }
    }

    fn take_input(&mut self, count: usize) -> Vec<u8> {
        let rest = self.input.split_off(count);
        let taken = mem::replace(&mut self.input, rest);
        if self.input.is_empty() {
            self.input = Vec::new();
        }
        taken
    }
}

impl HttpResponse {
    /// The response as sent.
    pub fn bytes(&self, keep_alive: bool) -> Vec<u8> {
        self.bytes_of_type("application/json", keep_alive)
    }

    /// The same for a body that is not JSON.
    pub(crate) fn bytes_of_type(&self, kind: &str, keep_alive: bool) -> Vec<u8> {
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut text =
            format!("HTTP/1.1 {} {}\r\nConnection: {connection}\r\n", self.status, reason(self.status));
        if self.deprecated {
            text.push_str("Deprecation: true\r\n");
        }
        match &self.body {
            Some(body) => text
                .push_str(&format!("Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}", body.len())),
            None => text.push_str("\r\n"),
        }
        text.into_bytes()
    }
}

/// The reason phrase of a status that this API sends.
pub fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        403 => "Forbidden",
        404 => "Not Found",
        409 => "Conflict",
        426 => "Upgrade Required",
        504 => "Gateway Timeout",
        507 => "Insufficient Storage",
        400 => "Bad Request",
        413 => "Payload Too Large",
        417 => "Expectation Failed",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ => "Status",
    }
}

/// The head at the start of `input` and its length, or `None` while it is not complete.
pub(crate) fn parse_head(input: &[u8], max_body: usize) -> Result<Option<(Head, usize)>, ProtocolError> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut fields);
    // Never more than the limit, so that a longer head is refused in the same way however it arrives.
    let visible = input.get(..MAX_HEAD).unwrap_or(input);
    match request.parse(visible) {
        Ok(httparse::Status::Complete(length)) => Ok(Some((Head::new(&request, max_body)?, length))),
        Ok(httparse::Status::Partial) if input.len() >= MAX_HEAD => refuse(
            400,
            format!("The request line and headers are longer than {MAX_HEAD} bytes; send fewer headers."),
        ),
        Ok(httparse::Status::Partial) => Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            refuse(400, format!("The request has more than {MAX_HEADERS} headers; send fewer."))
        }
        Err(error) => refuse(400, format!("This is not an HTTP/1.1 request: {error}.")),
    }
}

impl Head {
    fn new(request: &httparse::Request, max_body: usize) -> Result<Head, ProtocolError> {
        let fields = || request.headers.iter();
        if fields().any(|field| is(field, "transfer-encoding")) {
            return refuse(501, "This server takes no Transfer-Encoding; send the body with Content-Length.");
        }
        let method = request.method.unwrap_or_default();
        Ok(Head {
            method: method.to_string(),
            path: path_of(request.path.unwrap_or_default()).to_string(),
            content_length: content_length(request.headers, max_body)?,
            // A reply to HEAD has no body, and the replies here do. The method is refused; the end of the connection
            // keeps its client from taking the body for the next reply.
            keep_alive: keep_alive(request) && method != "HEAD",
            expects_continue: expects_continue(request)?,
            upgrades: fields().any(|field| is(field, "upgrade")),
        })
    }
}

/// The length in bytes; 0 without the header.
fn content_length(headers: &[httparse::Header], max_body: usize) -> Result<usize, ProtocolError> {
    let mut lengths = headers.iter().filter(|field| is(field, "content-length"));
    let Some(length) = lengths.next() else { return Ok(0) };
    if lengths.next().is_some() {
        return refuse(400, "The request has more than one Content-Length; send one.");
    }
    // By hand, as the number parsers of the standard library take a sign.
    if length.value.is_empty() || !length.value.iter().all(u8::is_ascii_digit) {
        return refuse(400, "Content-Length is not a number; send the length of the body in bytes.");
    }
    let text = String::from_utf8_lossy(length.value);
    match text.parse() {
        Ok(length) if length <= max_body => Ok(length),
        _ => refuse(
            400,
            format!(
                "The body has {text} bytes, the limit is {max_body}; send less, or start the VMM with a higher \
                 --http-api-max-payload-size."
            ),
        ),
    }
}

/// RFC 9112 section 9.3: the default depends on the version, and `close` wins.
fn keep_alive(request: &httparse::Request) -> bool {
    let has = |option: &[u8]| {
        let fields = request.headers.iter().filter(|field| is(field, "connection"));
        fields
            .flat_map(|field| field.value.split(|byte| *byte == b','))
            .any(|token| token.trim_ascii().eq_ignore_ascii_case(option))
    };
    !has(b"close") && (request.version == Some(1) || has(b"keep-alive"))
}

/// RFC 9110 section 10.1.1. A client of HTTP/1.0 would not understand the interim response.
fn expects_continue(request: &httparse::Request) -> Result<bool, ProtocolError> {
    let mut expectations = request.headers.iter().filter(|field| is(field, "expect"));
    if expectations.any(|field| !field.value.trim_ascii().eq_ignore_ascii_case(b"100-continue")) {
        return refuse(417, "The request has an Expect header other than 100-continue; leave it out.");
    }
    Ok(request.version == Some(1) && request.headers.iter().any(|field| is(field, "expect")))
}

/// A client may send the whole URI (RFC 9112 section 3.2.2). Which host it names does not matter here.
fn path_of(target: &str) -> &str {
    let Some(rest) = target.strip_prefix("http://") else { return target };
    rest.find('/').and_then(|start| rest.get(start..)).unwrap_or("/")
}

fn is(field: &httparse::Header, name: &str) -> bool {
    field.name.eq_ignore_ascii_case(name)
}

fn refuse<T>(status: u16, message: impl Into<String>) -> Result<T, ProtocolError> {
    Err(ProtocolError { status, message: message.into() })
}

#[cfg(test)]
mod tests;
