use proptest::prelude::*;

use super::*;

const PUT: &str = "PUT /vm HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello";

/// What came out of a connection whose client took every reply at once.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    inputs: Vec<Input>,
    output: String,
    closed: bool,
}

fn reply() -> HttpResponse {
    HttpResponse { status: 204, body: None, deprecated: false }
}

fn feed<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> Outcome {
    let mut connection = Connection::new(DEFAULT_MAX_BODY);
    let mut outcome = Outcome::default();
    for chunk in chunks {
        connection.receive(chunk);
        while let Some(input) = connection.next_input() {
            let response = match &input {
                Input::Request(_) => reply(),
                Input::Error(error) => HttpResponse {
                    status: error.status,
                    body: Some(error.message.clone()),
                    deprecated: false,
                },
            };
            connection.respond(&response);
            outcome.inputs.push(input);
            drain(&mut connection, &mut outcome.output);
        }
        drain(&mut connection, &mut outcome.output);
    }
    outcome.closed = connection.is_closed();
    outcome
}

fn drain(connection: &mut Connection, output: &mut String) {
    output.push_str(std::str::from_utf8(connection.output()).unwrap());
    connection.sent(connection.output().len());
}

fn feed_text(text: &str) -> Outcome {
    feed([text.as_bytes()])
}

fn request(method: &str, path: &str, body: &str) -> Input {
    Input::Request(HttpRequest {
        method: method.to_string(),
        path: path.to_string(),
        body: body.as_bytes().to_vec(),
    })
}

#[track_caller]
fn refused(text: &str, status: u16, words: &str) {
    let outcome = feed_text(text);
    match &outcome.inputs[..] {
        [Input::Error(error)] => {
            assert_eq!(error.status, status, "{error}");
            assert!(error.message.contains(words), "{words:?} is not in: {error}");
        }
        other => panic!("accepted: {other:?}"),
    }
    assert!(outcome.closed, "the connection goes on");
    assert!(outcome.output.contains("Connection: close\r\n"));
}

fn with_header(header: &str) -> String {
    format!("GET / HTTP/1.1\r\n{header}\r\n\r\n")
}

#[test]
fn a_request_comes_out_as_it_went_in() {
    let outcome = feed_text(PUT);
    assert_eq!(outcome.inputs, [request("PUT", "/vm", "hello")]);
    assert_eq!(outcome.output, "HTTP/1.1 204 No Content\r\nConnection: keep-alive\r\n\r\n");
    assert!(!outcome.closed);
}

#[test]
fn a_request_cut_at_any_byte_is_the_same_request() {
    let text = format!("{PUT}{}{PUT}", with_header("Expect: 100-continue"));
    let whole = feed_text(&text);
    assert_eq!(whole.inputs.len(), 3);
    for cut in 0..text.len() {
        let (first, second) = text.as_bytes().split_at(cut);
        assert_eq!(feed([first, second]), whole, "cut at {cut}");
    }
    assert_eq!(feed(text.as_bytes().chunks(1)), whole);
}

#[test]
fn thirty_pipelined_requests_are_answered_in_order() {
    let text: String = (0..30).map(|n| format!("GET /{n} HTTP/1.1\r\n\r\n")).collect();
    let expected: Vec<_> = (0..30).map(|n| request("GET", &format!("/{n}"), "")).collect();
    let outcome = feed_text(&text);
    assert_eq!(outcome.inputs, expected);
    assert_eq!(outcome.output.matches("204 No Content").count(), 30);
}

#[test]
fn no_second_request_comes_out_before_the_first_is_answered() {
    let mut connection = Connection::new(DEFAULT_MAX_BODY);
    connection.receive(format!("{PUT}{PUT}").as_bytes());
    assert!(connection.next_input().is_some());
    assert_eq!(connection.next_input(), None);
    connection.respond(&reply());
    assert!(connection.next_input().is_some());
}

#[test]
fn a_response_without_a_request_is_not_sent() {
    let mut connection = Connection::new(DEFAULT_MAX_BODY);
    connection.respond(&reply());
    assert!(connection.output().is_empty());
}

#[test]
fn a_client_that_takes_no_replies_gets_no_more_of_them() {
    let mut connection = Connection::new(DEFAULT_MAX_BODY);
    let body = Some("x".repeat(10_000));
    let mut answered = 0;
    for _ in 0..1000 {
        if connection.wants_input() {
            connection.receive(PUT.as_bytes());
        }
        while connection.next_input().is_some() {
            connection.respond(&HttpResponse { status: 200, body: body.clone(), deprecated: false });
            answered += 1;
        }
    }
    assert_eq!(answered, MAX_UNSENT / 10_000 + 1);
    assert!(connection.output().len() < MAX_UNSENT + 11_000);
    assert!(connection.input.is_empty());
    // It goes on when the client does.
    connection.sent(connection.output().len());
    assert!(connection.wants_input());
}

#[test]
fn requests_that_wait_for_room_are_answered_when_there_is_some() {
    let mut connection = Connection::new(DEFAULT_MAX_BODY);
    connection.receive(PUT.repeat(3).as_bytes());
    let huge = HttpResponse { status: 200, body: Some("x".repeat(MAX_UNSENT)), deprecated: false };
    for _ in 0..3 {
        assert!(connection.next_input().is_some());
        connection.respond(&huge);
        assert_eq!(connection.next_input(), None);
        connection.sent(connection.output().len());
    }
}

#[test]
fn a_connection_lasts_unless_the_client_says_otherwise() {
    let closes = |text: &str| feed_text(text).closed;
    assert!(!closes("GET / HTTP/1.1\r\n\r\n"));
    assert!(!closes(&with_header("Connection: keep-alive")));
    for close in ["close", "Close", "keep-alive, close", "upgrade,close ,", "x\r\nConnection: close"] {
        assert!(closes(&with_header(&format!("Connection: {close}"))), "{close}");
    }
    assert!(!closes(&with_header("Connection: closed")));
    assert!(closes("GET / HTTP/1.0\r\n\r\n"));
    assert!(!closes("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"));
}

#[test]
fn after_close_nothing_more_is_answered() {
    let outcome = feed_text(&format!("{}{PUT}", with_header("Connection: close")));
    assert_eq!(outcome.inputs.len(), 1);
    assert!(outcome.output.contains("Connection: close\r\n"));
}

#[test]
fn an_expected_continue_is_sent_before_the_body_comes() {
    let head = "PUT / HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-Continue\r\n\r\n";
    let waiting = feed_text(head);
    assert_eq!(waiting.output, "HTTP/1.1 100 Continue\r\n\r\n");
    assert_eq!(waiting.inputs, []);
    let whole = feed_text(&format!("{head}ok"));
    assert_eq!(whole.inputs, [request("PUT", "/", "ok")]);
    assert!(whole.output.starts_with("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204"));

    assert!(!feed_text(&with_header("Expect: 100-continue")).output.contains("100 Continue"));
    let old = feed_text("PUT / HTTP/1.0\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\nok");
    assert!(!old.output.contains("100 Continue"));
    refused(&with_header("Expect: 200-ok"), 417, "Expect");
}

#[test]
fn a_body_is_as_long_as_the_limit_and_no_longer() {
    let put = |length: usize| format!("PUT / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
    let body = "x".repeat(DEFAULT_MAX_BODY);
    assert_eq!(feed_text(&format!("{}{body}", put(body.len()))).inputs, [request("PUT", "/", &body)]);
    refused(&put(DEFAULT_MAX_BODY + 1), 400, "51201 bytes, the limit is 51200");
    refused(&put(usize::MAX), 400, "--http-api-max-payload-size");
    refused("PUT / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n", 400, "the limit");
    // Told before the client sends it.
    refused("PUT / HTTP/1.1\r\nContent-Length: 60000\r\nExpect: 100-continue\r\n\r\n", 400, "the limit");
}

#[test]
fn a_length_is_one_plain_number() {
    for bad in ["+5", "-5", "5,5", "0x5", "5 5", "", "five", "5.0"] {
        refused(&with_header(&format!("Content-Length: {bad}")), 400, "Content-Length");
    }
    refused(&with_header("Content-Length: 5\r\nContent-Length: 5"), 400, "more than one Content-Length");
    assert_eq!(feed_text(&with_header("Content-Length: 000")).inputs, [request("GET", "/", "")]);
}

#[test]
fn a_transfer_coding_is_refused_with_or_without_a_length() {
    refused(&with_header("Transfer-Encoding: chunked"), 501, "Transfer-Encoding");
    refused(&with_header("Transfer-Encoding: identity"), 501, "Transfer-Encoding");
    refused(&with_header("Content-Length: 3\r\ntransfer-encoding: chunked"), 501, "Transfer-Encoding");
}

#[test]
fn a_head_has_a_longest_size_and_a_largest_number_of_headers() {
    let long = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(MAX_HEAD));
    refused(&long, 400, "longer than 8192 bytes");
    assert_eq!(feed(long.as_bytes().chunks(7)), feed_text(&long));
    refused(&format!("GET /{}", "x".repeat(MAX_HEAD)), 400, "longer than 8192 bytes");
    refused(&"\r\n".repeat(MAX_HEAD), 400, "longer than 8192 bytes");

    let headers = |count: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(count));
    assert_eq!(feed_text(&headers(MAX_HEADERS)).inputs, [request("GET", "/", "")]);
    refused(&headers(MAX_HEADERS + 1), 400, "more than 32 headers");
}

#[test]
fn what_is_not_http_is_refused() {
    for bad in [
        "hello\r\n\r\n",
        "GET / HTTP/2.0\r\n\r\n",
        "GET  / HTTP/1.1\r\n\r\n",
        "GET /\r\n\r\n",
        "GET / HTTP/1.1\r\nno colon\r\n\r\n",
        "GET / HTTP/1.1\r\nA : b\r\n\r\n",
        "GET / HTTP/1.1\r\nA: b\r\n folded\r\n\r\n",
        "GET / HTTP/1.1\r\nA: b\0\r\n\r\n",
        "\0\u{1}\u{2}",
        "\u{16}\u{3}\u{1}",
    ] {
        refused(bad, 400, "not an HTTP/1.1 request");
    }
}

#[test]
fn the_target_may_be_a_whole_uri() {
    for (target, path) in [
        ("http://localhost/vm/config", "/vm/config"),
        ("http://localhost", "/"),
        ("/a?b=c", "/a?b=c"),
        ("*", "*"),
    ] {
        assert_eq!(feed_text(&format!("GET {target} HTTP/1.1\r\n\r\n")).inputs, [request("GET", path, "")]);
    }
}

#[test]
fn a_reply_to_head_ends_the_connection() {
    assert!(feed_text("HEAD / HTTP/1.1\r\n\r\n").closed);
}

#[test]
fn a_half_closed_client_gets_the_replies_to_what_it_asked_completely() {
    let mut connection = Connection::new(DEFAULT_MAX_BODY);
    connection.receive(format!("{PUT}{PUT}PUT / HT").as_bytes());
    connection.input_ended();
    assert!(!connection.wants_input());
    for _ in 0..2 {
        assert_eq!(connection.next_input(), Some(request("PUT", "/vm", "hello")));
        connection.respond(&reply());
    }
    assert_eq!(connection.next_input(), None);
    assert!(connection.is_closed());
    assert_eq!(connection.output().len(), 2 * reply().bytes(true).len());
}

#[test]
fn a_response_has_a_body_a_length_and_marks_what_is_deprecated() {
    let response = HttpResponse { status: 400, body: Some("{\"a\":\"é\"}".to_string()), deprecated: true };
    let expected = "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nDeprecation: true\r\n\
                    Content-Type: application/json\r\nContent-Length: 10\r\n\r\n{\"a\":\"é\"}";
    assert_eq!(String::from_utf8(response.bytes(false)).unwrap(), expected);
}

/// Requests with a little noise: most of a stream is understood, and the rest goes wrong in many places.
fn stream() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        5 => Just(PUT.as_bytes().to_vec()),
        3 => Just(b"GET /version HTTP/1.1\r\n\r\n".to_vec()),
        1 => Just(b"PUT / HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc".to_vec()),
        1 => Just(b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n".to_vec()),
        1 => Just(b"GET / HTTP/1.0\r\n\r\n".to_vec()),
        1 => "[ -~\r\n]{0,40}".prop_map(String::into_bytes),
        1 => "[A-Za-z-]{1,20}: [ -~]{0,9000}\r\n".prop_map(String::into_bytes),
        1 => prop::collection::vec(any::<u8>(), 0..20),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn how_a_stream_is_cut_changes_nothing(stream in stream(), cuts in prop::collection::vec(1usize..200, 1..8)) {
        let whole = feed([&stream[..]]);
        let mut rest = &stream[..];
        let mut chunks = Vec::new();
        for length in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (chunk, after) = rest.split_at((*length).min(rest.len()));
            chunks.push(chunk);
            rest = after;
        }
        prop_assert_eq!(feed(chunks), whole);
    }

    #[test]
    fn no_bytes_at_all_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        feed([&bytes[..]]);
        feed([b"PUT /", &bytes[..]]);
        feed([b"GET / HTTP/1.1\r\n", &bytes[..]]);
    }
}
