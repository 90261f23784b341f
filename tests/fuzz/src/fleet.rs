//! The daemon: what its clients send, what it sends to them, and the files that it finds at its start.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use api_socket::Fault;
use api_socket::fleet::routes::{self, Log, Part};
use api_socket::fleet::server::{Answer, serve};
use api_socket::fleet::{Client, Guest, Image, List, Request, Version};
use supervisor::config::Config;
use supervisor::images::Kept;
use supervisor::{record, store};

/// What is taken of an input, in bytes: the replies to that many fit into a socket, which nobody reads meanwhile.
const MAX_INPUT: usize = 2048;

/// A whole connection as its server sees it. Each request that arrives is the same when a client writes it.
pub fn requests(data: &[u8]) {
    let (client, server) = UnixStream::pair().expect("sockets");
    (&client).write_all(data.get(..MAX_INPUT).unwrap_or(data)).expect("room in the socket");
    client.shutdown(Shutdown::Write).expect("an end");
    let _ = serve(server, |request, body| {
        let (method, target, text) = routes::encode(&request).expect("a request is written");
        assert_eq!(routes::route(method, &target, text.unwrap_or_default().as_bytes()), Ok(request.clone()));
        answer(request, body)
    });
    let mut said = Vec::new();
    // What the server has not read, an upload's rest, resets the connection behind its replies.
    let _ = (&client).read_to_end(&mut said);
    assert!(said.is_empty() || said.starts_with(b"HTTP/1.1 "));
}

/// One of each kind of reply.
fn answer(request: Request, body: &mut dyn Read) -> Answer<'static> {
    match request {
        Request::GetVersion => Answer::json(&Version { version: "1".into(), pid: 7 }),
        Request::Metrics => Answer::Text("text/plain", "berth_up 1\n".into()),
        Request::Logs { follow, .. } => Answer::Stream(
            "text/plain",
            Box::new(move |stream| {
                stream.tell(b"said")?;
                assert!(!follow || stream.is_gone(), "the client has nothing more to say");
                Ok(())
            }),
        ),
        Request::Console(_) | Request::Vsock { .. } => Answer::Upgrade(Box::new(|mut stream, early| {
            let _ = stream.write_all(&early);
        })),
        Request::PutPart(_, Part::Initrd) => Answer::Empty,
        Request::PutPart(..) => match body.read_to_end(&mut Vec::new()) {
            Ok(_) => Answer::Empty,
            Err(error) => Fault::bad_request(error.to_string()).into(),
        },
        _ => Answer::Empty,
    }
}

/// The first byte says what a client asks, the rest is what it hears.
pub fn replies(data: &[u8]) {
    let Some((choice, said)) = data.split_first() else { return };
    let client = Client::new(&server_that_says(said));
    match choice % 8 {
        0 => drop(client.version()),
        1 => drop(client.guests()),
        2 => drop(client.metrics()),
        3 => drop(client.console("web").map(|mut stream| stream.read_to_end(&mut Vec::new()))),
        4 => drop(client.events().map(|mut events| events.find(Result::is_err))),
        5 => drop(client.put_part("debian", Part::Disk, &mut &[7; 5000][..], 5000, |_| {})),
        _ => {
            // The same, however it is taken.
            let [whole, pieces] = [4096, 1].map(|size| {
                let log = client.logs("web", Log::Console, false).ok()?;
                let mut log = BufReader::with_capacity(size, log);
                let mut heard = Vec::new();
                let outcome = loop {
                    match log.fill_buf() {
                        Ok([]) => break Ok(()),
                        Ok(bytes) => {
                            heard.extend_from_slice(bytes);
                            let count = bytes.len();
                            log.consume(count);
                        }
                        Err(error) => break Err(error.kind()),
                    }
                };
                Some((heard, outcome))
            });
            assert_eq!(whole, pieces);
        }
    }
}

/// The socket of a server that takes one piece of a request and says this, to whoever comes, until it is to say another thing.
fn server_that_says(said: &[u8]) -> PathBuf {
    type Said = Arc<Mutex<Vec<u8>>>;
    static SERVER: OnceLock<(PathBuf, Said)> = OnceLock::new();
    let (path, now) = SERVER.get_or_init(|| {
        let path = tempfile::tempdir().expect("a directory").keep().join("socket");
        let listener = UnixListener::bind(&path).expect("a socket");
        let now = Said::default();
        let says = now.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.expect("a client");
                let _ = stream.read(&mut [0; 8192]);
                let said = says.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let _ = stream.write_all(&said);
            }
        });
        (path, now)
    });
    *now.lock().unwrap_or_else(PoisonError::into_inner) = said.to_vec();
    path.clone()
}

/// The first byte says which file, the rest is in it.
pub fn files(data: &[u8]) {
    let Some((choice, content)) = data.split_first() else { return };
    let Ok(text) = str::from_utf8(content) else { return };
    match choice % 4 {
        0 => {
            let Ok(record) = store::parse(text) else { return };
            assert!(!record.id.contains(['/', '.']) && !record.image.contains(['/', '.']));
            assert_eq!(record.mac().len(), 17);
            let again = store::parse(&serde_json::to_string(&record).expect("a record is written"));
            assert_eq!(again.map(timeless), Ok(timeless(record)));
        }
        1 => {
            let Ok(config) = Config::parse(text) else { return };
            assert!(config.state_dir.is_absolute() && config.uid_first > 0);
            assert!(config.network.guests().contains(&config.network.address.to_bits()));
        }
        2 => drop(serde_json::from_str::<Kept>(text)),
        // Not a file, but the other JSON that is read without a limit of its own.
        _ => drop((serde_json::from_str::<List<Guest>>(text), serde_json::from_str::<List<Image>>(text))),
    }
}

/// The last digit of a number with a fraction may change.
fn timeless(record: record::Record) -> record::Record {
    let last_end = record.last_end.map(|end| api_socket::fleet::End { at: 0.0, ..end });
    let [started_at, restart_at] = [record.started_at, record.restart_at].map(|time| time.map(|_| 0.0));
    record::Record { created_at: 0.0, started_at, restart_at, last_end, ..record }
}
