//! HTTP/1.1 as guests speak it to the service: a request at the start of some bytes, and an answer to bytes.
//!
//! A body is taken and not looked at, since no request has a use for one. Transfer codings are refused. The HTTP of the API
//! is another (`api-socket`): it keeps no headers, and here they carry the tokens.

/// The longest request line and headers together, in bytes.
pub const MAX_HEAD: usize = 4 << 10;
/// The most header fields of a request.
pub const MAX_HEADERS: usize = 32;
/// The longest body of a request, in bytes.
pub const MAX_BODY: usize = 1 << 10;

/// A request, as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    /// Without scheme and host, which clients may give.
    pub path: String,
    /// Values that are not UTF-8 are left out.
    headers: Vec<(String, String)>,
    /// The client wants to ask more on this connection.
    pub keep_alive: bool,
}

/// What a request gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    pub content_type: &'static str,
    pub body: String,
    /// Further headers.
    pub headers: Vec<(&'static str, String)>,
}

pub const TEXT: &str = "text/plain";
pub const JSON: &str = "application/json";

impl Request {
    /// The first value of the first of these headers that is there; names in lower case.
    pub fn header(&self, names: &[&'static str]) -> Option<(&'static str, &str)> {
        let value = |name: &str| self.headers.iter().find(|(known, _)| known == name);
        names.iter().find_map(|name| value(name).map(|(_, value)| (*name, value.as_str())))
    }
}

impl Response {
    pub fn text(status: u16, body: impl Into<String>) -> Response {
        Response { status, content_type: TEXT, body: body.into(), headers: Vec::new() }
    }

    /// As it is sent. `head_only` leaves out the body, which HEAD must not have.
    pub fn bytes(&self, keep_alive: bool, head_only: bool) -> Vec<u8> {
        let Response { status, content_type, body, headers } = self;
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut text = format!(
            "HTTP/1.1 {status} {}\r\nServer: MMDS\r\nConnection: {connection}\r\nContent-Type: {content_type}\r\n\
             Content-Length: {}\r\n",
            reason(*status),
            body.len()
        );
        headers.iter().for_each(|(name, value)| text.push_str(&format!("{name}: {value}\r\n")));
        text.push_str("\r\n");
        if !head_only {
            text.push_str(body);
        }
        text.into_bytes()
    }
}

/// The request at the start of `input` and its length with its body; `None` while it is not complete.
///
/// # Errors
/// What its sender is to be told. Where the next request would begin is not certain then.
pub fn parse(input: &[u8]) -> Result<Option<(Request, usize)>, Response> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut fields);
    let head = match parsed.parse(input.get(..MAX_HEAD).unwrap_or(input)) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if input.len() >= MAX_HEAD => {
            return Err(refusal(&format!("The request line and headers are longer than {MAX_HEAD} bytes.")));
        }
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(refusal(&format!("This is not an HTTP/1.1 request: {error}."))),
    };
    let headers: Vec<_> = parsed
        .headers
        .iter()
        .filter_map(|field| {
            let value = std::str::from_utf8(field.value).ok()?;
            Some((field.name.to_ascii_lowercase(), value.trim().to_owned()))
        })
        .collect();
    let values =
        |name: &'static str| headers.iter().filter(move |(known, _)| known == name).map(|(_, value)| value);
    if values("transfer-encoding").next().is_some() {
        return Err(Response::text(501, "Transfer-Encoding is not supported."));
    }
    let mut lengths = values("content-length");
    let body = match (lengths.next(), lengths.next()) {
        (None, _) => 0,
        (Some(length), None) if !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit()) => {
            match length.parse() {
                Ok(length) if length <= MAX_BODY => length,
                _ => return Err(Response::text(413, format!("A body has at most {MAX_BODY} bytes."))),
            }
        }
        _ => return Err(refusal("Content-Length is not one number.")),
    };
    let Some(length) = head.checked_add(body).filter(|length| *length <= input.len()) else {
        return Ok(None);
    };
    let connection = |option: &str| {
        values("connection")
            .flat_map(|value| value.split(','))
            .any(|token| token.trim().eq_ignore_ascii_case(option))
    };
    let request = Request {
        method: parsed.method.unwrap_or_default().to_owned(),
        path: path_of(parsed.path.unwrap_or_default()).to_owned(),
        keep_alive: !connection("close") && (parsed.version == Some(1) || connection("keep-alive")),
        headers,
    };
    Ok(Some((request, length)))
}

fn refusal(why: &str) -> Response {
    Response::text(400, why)
}

fn path_of(target: &str) -> &str {
    let Some(rest) = target.strip_prefix("http://") else { return target };
    rest.find('/').and_then(|start| rest.get(start..)).unwrap_or("/")
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        404 => "Not Found",
        405 => "Method Not Allowed",
        413 => "Payload Too Large",
        501 => "Not Implemented",
        _ => "Status",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Request {
        let (request, length) = parse(text.as_bytes()).unwrap().unwrap();
        assert_eq!(length, text.len());
        request
    }

    fn refused(text: &str) -> u16 {
        parse(text.as_bytes()).unwrap_err().status
    }

    #[test]
    fn a_request_is_there_when_all_of_it_is() {
        let text = "PUT http://169.254.169.254/latest/api/token HTTP/1.1\r\nHost: x\r\nX-Metadata-Token: abc \r\n\
                    Content-Length: 3\r\n\r\nxyz";
        for end in 0..text.len() {
            assert_eq!(parse(&text.as_bytes()[..end]), Ok(None), "{end}");
        }
        let request = request(text);
        assert_eq!((request.method.as_str(), request.path.as_str()), ("PUT", "/latest/api/token"));
        assert_eq!(request.header(&["other", "x-metadata-token"]), Some(("x-metadata-token", "abc")));
        assert_eq!(request.header(&["x-metadata"]), None);
        let (_, length) = parse(format!("{text}GET / HTTP/1.1\r\n\r\n").as_bytes()).unwrap().unwrap();
        assert_eq!(length, text.len(), "the next one is left");
    }

    #[test]
    fn a_connection_stays_as_its_version_and_headers_say() {
        assert!(request("GET / HTTP/1.1\r\n\r\n").keep_alive);
        assert!(!request("GET / HTTP/1.0\r\n\r\n").keep_alive);
        assert!(request("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").keep_alive);
        assert!(!request("GET / HTTP/1.1\r\nConnection: x, Close\r\n\r\n").keep_alive);
    }

    #[test]
    fn what_is_no_request_or_too_much_is_refused() {
        assert_eq!(refused("\0\0\0\0"), 400);
        assert_eq!(refused(&format!("GET /{} HTTP/1.1", "x".repeat(MAX_HEAD))), 400);
        assert_eq!(refused(&format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(MAX_HEADERS + 1))), 400);
        assert_eq!(refused("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), 501);
        for (length, status) in
            [("1025", 413), ("99999999999999999999999", 413), ("-1", 400), ("", 400), ("+1", 400)]
        {
            assert_eq!(
                refused(&format!("PUT / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n")),
                status,
                "{length}"
            );
        }
        assert_eq!(refused("PUT / HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n"), 400);
    }

    #[test]
    fn an_answer_tells_its_length_and_what_becomes_of_the_connection() {
        let response = Response { headers: vec![("Allow", "GET".into())], ..Response::text(405, "no") };
        assert_eq!(
            String::from_utf8(response.bytes(false, false)).unwrap(),
            "HTTP/1.1 405 Method Not Allowed\r\nServer: MMDS\r\nConnection: close\r\nContent-Type: text/plain\r\n\
             Content-Length: 2\r\nAllow: GET\r\n\r\nno"
        );
        assert!(response.bytes(true, true).ends_with(b"\r\n\r\n"));
    }
}
