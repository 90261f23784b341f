//! The lines that the server logs, which clients of Firecracker parse. A file of its own, as a process has one logger.

#![allow(clippy::unwrap_used, reason = "this whole file is a test")]

use std::sync::Mutex;

use api_socket::counters::Counters;
use api_socket::http::Connection;
use api_socket::server::answer;
use api_socket::{Fault, Reply};
use log::{Level, Log, Metadata, Record};

static LINES: Mutex<Vec<(Level, String)>> = Mutex::new(Vec::new());

struct Collector;

impl Log for Collector {
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }

    fn log(&self, record: &Record) {
        LINES.lock().unwrap().push((record.level(), record.args().to_string()));
    }

    fn flush(&self) {}
}

/// The lines of one request, but for the duration, which is checked here.
fn lines(method: &str, path: &str, body: &str, reply: Reply) -> Vec<(Level, String)> {
    let mut connection = Connection::new(1000);
    let request = format!("{method} {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    connection.receive(request.as_bytes());
    answer(&mut connection, &Counters::default(), &mut |_| reply.clone());
    let mut lines = std::mem::take(&mut *LINES.lock().unwrap());
    let (level, last) = lines.pop().unwrap();
    assert_eq!(level, Level::Debug);
    let duration = last.strip_prefix("Total previous API call duration: ").unwrap();
    duration.strip_suffix(" us.").unwrap().parse::<u64>().unwrap();
    lines
}

#[test]
fn each_request_is_logged_with_its_body_and_its_outcome() {
    log::set_logger(&Collector).unwrap();
    log::set_max_level(log::LevelFilter::Trace);
    let info = |text: &str| (Level::Info, text.to_string());
    let done = info("The request was executed successfully. Status code: 204 No Content.");

    assert_eq!(
        lines("GET", "/machine-config", "", Reply::MachineConfig(Default::default())),
        [
            info(r#"The API server received a Get request on "/machine-config"."#),
            info("The request was executed successfully. Status code: 200 OK."),
        ]
    );
    assert_eq!(
        lines("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#, Reply::Empty),
        [
            info(
                "The API server received a Put request on \"/actions\" with body \
                 \"{\\\"action_type\\\":\\\"InstanceStart\\\"}\"."
            ),
            done.clone(),
        ]
    );
    assert_eq!(
        lines("PUT", "/cpu-config", "{}", Reply::Empty),
        [info(r#"The API server received a Put request on "/cpu-config"."#), done.clone()]
    );
    assert_eq!(
        lines("PATCH", "/vm", r#"{"state":"Paused"}"#, Fault::bad_request("Not now.").into()),
        [
            info(r#"The API server received a Patch request on "/vm" with body "{\"state\":\"Paused\"}"."#),
            (Level::Error, "Received Error. Status code: 400 Bad Request. Message: Not now.".to_string()),
        ]
    );
    let deprecated = (Level::Warn, "PATCH /machine-config: cpu_template field is deprecated.".to_string());
    assert!(
        lines("PATCH", "/machine-config", r#"{"cpu_template":"T2"}"#, Reply::Empty).contains(&deprecated)
    );
    // Unknown here, but private even so.
    let secret = lines("PUT", "/mmds", r#"{"password":"1234"}"#, Reply::Empty);
    assert!(secret.iter().all(|(_, line)| !line.contains("1234")), "{secret:?}");
}
