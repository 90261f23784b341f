//! Streams between programs of the host and of a guest: words that cannot be taken for others, and how they are said.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use super::limits;

/// A connection to a port of the guest whose VMM has its socket at `path`, before it is known whether it is taken.
pub fn calling(path: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(limits::COMMAND)).unwrap();
    stream.set_write_timeout(Some(limits::COMMAND)).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    stream
}

/// As [`calling`], when it is taken.
#[track_caller]
pub fn call(path: &Path, port: u32) -> UnixStream {
    let stream = calling(path, port);
    let line = line(&stream);
    assert!(line.starts_with("OK ") && line.ends_with('\n'), "{line:?}");
    stream
}

/// A line, read without what follows it.
pub fn line(stream: &UnixStream) -> String {
    let mut line = String::new();
    let mut byte = [0];
    while !line.ends_with('\n') && (&mut &*stream).read(&mut byte).unwrap() == 1 {
        line.push(char::from(byte[0]));
    }
    line
}

/// No two stretches of it are alike.
pub fn data(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut data = Vec::with_capacity(bytes + 8);
    while data.len() < bytes {
        // Marsaglia's xorshift.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend(state.to_le_bytes());
    }
    data.truncate(bytes);
    data
}

/// Writes `data` and ends that direction, while reading to the end of the other.
pub fn exchange(stream: &UnixStream, data: &[u8]) -> Vec<u8> {
    thread::scope(|scope| {
        let writing = scope.spawn(|| {
            (&mut &*stream).write_all(data).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let mut heard = Vec::new();
        (&mut &*stream).read_to_end(&mut heard).unwrap();
        writing.join().unwrap();
        heard
    })
}
