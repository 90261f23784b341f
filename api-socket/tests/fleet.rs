//! The fleet API over a real socket: our client and our server, and clients that are slow, wrong or gone.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use api_socket::fleet::routes::{Log, Part};
use api_socket::fleet::server::{Answer, MAX_BODY, serve};
use api_socket::fleet::{Client, Request, Version};
use api_socket::{ClientError, Fault};
use tempfile::TempDir;

/// What a server was asked, and the files that it was sent.
type Heard = Arc<Mutex<Vec<(Request, Vec<u8>)>>>;

struct Daemon {
    directory: TempDir,
    heard: Heard,
}

impl Daemon {
    fn new() -> Daemon {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
        let heard = Heard::default();
        let hears = heard.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let hears = hears.clone();
                thread::spawn(move || serve(stream.unwrap(), |request, body| answer(&hears, request, body)));
            }
        });
        Daemon { directory, heard }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn client(&self) -> Client {
        Client::new(&self.path())
    }

    /// What is said to these bytes, to the end of the connection.
    fn says(&self, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        // Who is refused may find nobody who reads any more.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }
}

fn answer(heard: &Heard, request: Request, body: &mut dyn Read) -> Answer<'static> {
    let mut file = Vec::new();
    let outcome = body.read_to_end(&mut file);
    heard.lock().unwrap().push((request.clone(), file));
    if let Err(error) = outcome {
        return Fault::bad_request(error.to_string()).into();
    }
    match request {
        Request::GetVersion => Answer::json(&Version { version: "1.2.3".into(), pid: 7 }),
        Request::Metrics => Answer::Text("text/plain", "berth_up 1\n".into()),
        Request::PutPart(..) => Answer::Empty,
        Request::Logs { .. } => Answer::Stream(
            "text/plain",
            Box::new(|stream| {
                stream.tell(b"first ")?;
                stream.tell(b"")?;
                stream.tell(&[b'x'; 100_000])
            }),
        ),
        Request::Events => Answer::Stream(
            "application/json",
            Box::new(|stream| {
                while !stream.is_gone() {
                    thread::yield_now();
                }
                Ok(())
            }),
        ),
        Request::Console(_) => Answer::Upgrade(Box::new(|mut stream, early| {
            stream.write_all(&early).unwrap();
            let mut buffer = [0; 16];
            let count = stream.read(&mut buffer).unwrap();
            stream.write_all(&buffer[..count]).unwrap();
        })),
        _ => Fault { status: 409, message: "not now".into() }.into(),
    }
}

#[test]
fn a_client_gets_replies_texts_and_refusals() {
    let client = Daemon::new().client();
    // The daemon's directory goes with it; its socket stays open.
    let daemon = Daemon::new();
    assert!(matches!(client.version(), Err(ClientError::Io { .. })));
    let client = daemon.client();
    assert_eq!(client.version().unwrap(), Version { version: "1.2.3".into(), pid: 7 });
    assert_eq!(client.metrics().unwrap(), "berth_up 1\n");
    match client.start("web") {
        Err(ClientError::Refused(fault)) => {
            assert_eq!((fault.status, fault.message.as_str()), (409, "not now"))
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_file_arrives_as_it_was_sent_whatever_its_length() {
    let daemon = Daemon::new();
    for length in [0, 1, 4096, 1_000_003] {
        let file: Vec<u8> = (0..length).map(|at| (at * 31 % 251) as u8).collect();
        let mut told = 0;
        let sent = daemon
            .client()
            .put_part("image", Part::Disk, &mut &file[..], length as u64, |count| told = count);
        sent.unwrap();
        let heard = daemon.heard.lock().unwrap().pop().unwrap();
        assert_eq!(heard, (Request::PutPart("image".into(), Part::Disk), file));
        assert_eq!(told, length as u64);
    }
}

#[test]
fn a_file_that_ends_early_is_not_taken_for_a_whole_one() {
    let daemon = Daemon::new();
    let said = daemon.says(b"PUT /images/a/parts/disk HTTP/1.1\r\nContent-Length: 10\r\n\r\nhalf");
    assert!(said.contains("400") && said.contains("in the middle of its file"), "{said}");
}

#[test]
fn a_stream_arrives_whole_and_its_end_is_known() {
    let daemon = Daemon::new();
    let mut text = Vec::new();
    daemon.client().logs("web", Log::Console, false).unwrap().read_to_end(&mut text).unwrap();
    assert_eq!((text.len(), &text[..7]), (100_006, &b"first x"[..]));
}

#[test]
fn who_tells_a_stream_learns_that_nobody_listens() {
    let daemon = Daemon::new();
    let events = daemon.client().events().unwrap();
    drop(events);
    // The thread that tells ends: it drops its half.
    while Arc::strong_count(&daemon.heard) > 2 {
        thread::yield_now();
    }
}

#[test]
fn the_first_piece_of_a_log_is_told_from_what_comes_behind_it() {
    let daemon = Daemon::new();
    let mut log = daemon.client().logs("web", Log::Console, true).unwrap();
    assert_eq!(log.first(1000).unwrap(), b"first ");
    assert_eq!(log.first(99).unwrap(), [b'x'; 100]);
    let mut rest = Vec::new();
    log.read_to_end(&mut rest).unwrap();
    assert_eq!(rest.len(), 99_900);
    assert_eq!(log.first(10).unwrap(), b"");
}

/// The daemon would wait for what was announced.
#[test]
fn a_file_that_cannot_be_read_is_told_at_once_and_as_what_it_is() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("the disk is broken"))
        }
    }
    let daemon = Daemon::new();
    let client = daemon.client();
    for (file, why) in
        [(&mut Broken as &mut dyn Read, "the disk is broken"), (&mut &b"x"[..], "became shorter")]
    {
        let sent = client.put_part("debian", Part::Disk, file, 10, |_| ());
        let Err(ClientError::Source(error)) = sent else { panic!("{sent:?}") };
        assert!(error.to_string().contains(why), "{error}");
    }
}

#[test]
fn a_connection_becomes_another_only_for_who_asks_so_and_loses_no_byte() {
    let daemon = Daemon::new();
    let mut console = daemon.client().console("web").unwrap();
    console.write_all(b"hello").unwrap();
    let mut echo = String::new();
    console.read_to_string(&mut echo).unwrap();
    assert_eq!(echo, "hello");

    let early = daemon.says(b"GET /guests/web/console HTTP/1.1\r\nUpgrade: berth\r\n\r\nearly");
    assert!(early.starts_with("HTTP/1.1 101 ") && early.ends_with("\r\n\r\nearly"), "{early}");
    let plain = daemon.says(b"GET /guests/web/console HTTP/1.1\r\n\r\n");
    assert!(plain.starts_with("HTTP/1.1 426 "), "{plain}");
}

#[test]
fn requests_on_one_connection_are_answered_in_turns() {
    let daemon = Daemon::new();
    let said = daemon.says(b"GET /version HTTP/1.1\r\n\r\nPUT /images/a/parts/disk HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET /metrics HTTP/1.1\r\nConnection: close\r\n\r\n");
    let statuses: Vec<_> = said.match_indices("HTTP/1.1 ").map(|(at, _)| &said[at + 9..at + 12]).collect();
    assert_eq!(statuses, ["200", "204", "200"], "{said}");
}

#[test]
fn what_is_no_request_or_too_long_is_answered_and_ends_the_connection() {
    let daemon = Daemon::new();
    let body = vec![b'x'; MAX_BODY + 1];
    let long = [format!("POST /guests HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(), &body]
        .concat();
    for (bytes, status) in
        [(&b"nonsense\r\n\r\n"[..], "400"), (&long, "413"), (b"GET /nowhere HTTP/1.1\r\n\r\n", "404")]
    {
        let said = daemon.says(bytes);
        assert!(said.starts_with(&format!("HTTP/1.1 {status} ")), "{said}");
    }
    assert!(daemon.heard.lock().unwrap().is_empty());
}

#[test]
fn a_client_is_not_confused_by_a_server_that_answers_another_question() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        for reply in ["HTTP/1.1 101 Switching Protocols\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"] {
            let (mut stream, _) = listener.accept().unwrap();
            assert!(stream.read(&mut [0; 4096]).unwrap() > 0);
            stream.write_all(reply.as_bytes()).unwrap();
        }
    });
    let client = Client::new(&path);
    let log = client.logs("web", Log::Console, false);
    assert!(matches!(log, Err(ClientError::Protocol(_))), "{log:?}");
    let console = client.console("web");
    assert!(matches!(console, Err(ClientError::Protocol(_))), "{console:?}");
    server.join().unwrap();
}
