//! The API socket: HTTP as it comes from a client, and the JSON in it.

use std::cell::RefCell;
use std::fs::File;
use std::io::Write;

use api_socket::counters::Counters;
use api_socket::http::{Connection, DEFAULT_MAX_BODY};
use api_socket::types::{Reply, Request};
use api_socket::{client, config_file, route, server};
use tempfile::NamedTempFile;

/// The first byte says how the rest is cut; the replies must not depend on that.
pub fn http(data: &[u8]) {
    crate::log_to_nowhere();
    let Some((&piece, bytes)) = data.split_first() else { return };
    let piece = usize::from(piece).max(1);
    assert_eq!(replies(bytes.chunks(piece)), replies(std::iter::once(bytes)));
}

fn replies<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut connection = Connection::new(DEFAULT_MAX_BODY);
    let mut output = Vec::new();
    for piece in pieces {
        if !connection.wants_input() {
            break;
        }
        connection.receive(piece);
        serve(&mut connection, &mut output);
    }
    connection.input_ended();
    serve(&mut connection, &mut output);
    assert!(connection.is_closed(), "a connection without further input comes to its end");
    output
}

fn serve(connection: &mut Connection, output: &mut Vec<u8>) {
    let counters = Counters::default();
    loop {
        server::answer(connection, &counters, &mut |_| Reply::Empty);
        if connection.output().is_empty() {
            return;
        }
        output.extend(connection.output());
        connection.sent(connection.output().len());
    }
}

/// The first byte chooses the endpoint, the rest is the body. A body that is taken says the same when written again.
pub fn json(data: &[u8]) {
    crate::log_to_nowhere();
    let Some((&choice, body)) = data.split_first() else { return };
    let Some((method, path)) = ENDPOINTS.get(usize::from(choice) % (ENDPOINTS.len() + 1)) else {
        return config(body);
    };
    let Ok(routed) = route(method, path, body) else { return };
    // The last digit of a number with a fraction may change.
    if matches!(routed.request, Request::PutMmds(_) | Request::PatchMmds(_)) {
        return;
    }
    let Ok((method, path, body)) = client::encode(&routed.request) else { return };
    let again = route(method.as_str(), &path, body.unwrap_or_default().as_bytes());
    assert_eq!(again.map(|routed| routed.request), Ok(routed.request));
}

const ENDPOINTS: &[(&str, &str)] = &[
    ("PUT", "/machine-config"),
    ("PATCH", "/machine-config"),
    ("PUT", "/boot-source"),
    ("PUT", "/cpu-config"),
    ("PUT", "/drives/d"),
    ("PATCH", "/drives/d"),
    ("PUT", "/network-interfaces/d"),
    ("PATCH", "/network-interfaces/d"),
    ("PUT", "/pmem/d"),
    ("PATCH", "/pmem/d"),
    ("PUT", "/console"),
    ("PUT", "/vsock"),
    ("PUT", "/entropy"),
    ("PUT", "/serial"),
    ("PUT", "/logger"),
    ("PUT", "/metrics"),
    ("PUT", "/actions"),
    ("PATCH", "/vm"),
    ("PUT", "/mmds/config"),
    ("PUT", "/mmds"),
    ("PATCH", "/mmds"),
    ("PUT", "/balloon"),
    ("PATCH", "/balloon"),
    ("PATCH", "/balloon/statistics"),
    ("PATCH", "/balloon/hinting/start"),
    ("PUT", "/hotplug/memory"),
    ("PATCH", "/hotplug/memory"),
    ("PATCH", "/console"),
    ("PATCH", "/entropy"),
];

/// A configuration file; one of its own that it names is not there.
fn config(body: &[u8]) {
    thread_local! {
        static FILE: RefCell<NamedTempFile> = RefCell::new(NamedTempFile::new().unwrap());
    }
    FILE.with_borrow_mut(|file| {
        let path = file.path().to_owned();
        File::create(&path).unwrap().write_all(body).unwrap();
        let _ = config_file::read(&path);
    });
}
