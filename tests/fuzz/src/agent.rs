//! What the host and the agent in a guest say to each other: neither trusts the other's bytes.

use std::fs;

use agent::files::{self, Owners};
use agent::protocol::{self, Frame, FromGuest, Pong, Reply, Request, ToGuest};

/// Lines or frames, by the first byte; it also says in which pieces frames arrive.
pub fn protocol(data: &[u8]) {
    let Some((first, mut data)) = data.split_first() else { return };
    match first & 3 {
        1 => {
            while let Ok(request) = protocol::read_line::<Request>("request", &mut data) {
                let mut line = Vec::new();
                // A short one may be longer when its letters are escaped.
                if protocol::write_line(&mut line, &request).is_ok() {
                    let again = protocol::read_line::<Request>("request", &mut &line[..]);
                    assert_eq!(again.expect("what was written is read"), request);
                }
            }
        }
        2 => while protocol::read_line::<Reply<Pong>>("answer", &mut data).is_ok() {},
        _ => frames(data, usize::from(first >> 2) + 1),
    }
}

/// They are the same whether they are read or taken out of what has come.
fn frames(mut data: &[u8], piece: usize) {
    let (mut received, mut taken) = (Vec::new(), Vec::new());
    for bytes in data.chunks(piece) {
        received.extend(bytes);
        while let Ok(Some(frame)) = Frame::take(&mut received) {
            taken.push(frame);
        }
    }
    let mut read = Vec::new();
    while let Ok(Some(frame)) = Frame::read(&mut data) {
        read.push(frame);
    }
    assert_eq!(taken, read);
    for frame in read {
        if let Ok(message) = ToGuest::parse(frame.clone()) {
            assert_eq!(ToGuest::parse(message.clone().frame()).expect("as it was"), message);
        }
        if let Ok(message) = FromGuest::parse(frame) {
            assert_eq!(FromGuest::parse(message.clone().frame()).expect("as it was"), message);
        }
    }
}

/// An archive, which writes nothing outside of the directory that it is unpacked into.
pub fn files(data: &[u8]) {
    let scratch = tempfile::tempdir().expect("a directory");
    let (into, outside) = (scratch.path().join("into"), scratch.path().join("outside"));
    for directory in [&into, &outside] {
        fs::create_dir(directory).expect("a directory");
    }
    fs::write(outside.join("secret"), "kept").expect("a file");
    let _ = files::unpack(data, &into, Owners::Own);
    assert_eq!(fs::read(outside.join("secret")).expect("the secret"), b"kept");
    for (directory, entries) in [(scratch.path(), 2), (&outside, 1)] {
        assert_eq!(fs::read_dir(directory).expect("a directory").count(), entries);
    }
}
