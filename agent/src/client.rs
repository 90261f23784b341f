//! The host's half: how an agent is called, and what can be said to it. A connection is one operation.
//!
//! It takes any stream, so that the same words go through the VMM's socket or through a server between. It waits as long as
//! the stream does: who wants a limit sets it on the stream.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::protocol::{
    self, Done, Exec, Found, Frame, FromGuest, PORT, Pong, ProtocolError, Reply, Request, Size, ToGuest,
};

/// Why an agent did not do what it was asked.
#[derive(Debug, Error)]
pub enum ClientError {
    #[error("cannot connect to {path}, the guest's sockets: {error}")]
    Connect { path: String, error: std::io::Error },
    /// Too early, or no agent of ours: a guest without Linux, or without the initramfs that brings it.
    #[error("nothing in the guest listens at port {PORT}: it has no agent, or not yet")]
    NoAgent,
    #[error("the VMM said {0:?} to a call to port {PORT}")]
    Handshake(String),
    /// What the agent said.
    #[error("{0}")]
    Refused(String),
    #[error("the guest's agent: {0}")]
    Protocol(#[from] ProtocolError),
}

type Result<T> = std::result::Result<T, ClientError>;

/// A connection to the agent of the guest whose VMM has its socket here.
pub fn connect(path: &Path) -> Result<UnixStream> {
    let failed = |error| ClientError::Connect { path: path.display().to_string(), error };
    let mut stream = UnixStream::connect(path).map_err(failed)?;
    handshake(&mut stream)?;
    Ok(stream)
}

/// Has the VMM connect this stream, which is to its socket, to the agent's port.
pub fn handshake(stream: &mut (impl Read + Write)) -> Result<()> {
    // A VMM that closes has nobody to connect to. What it did not read yet it answers with a reset.
    let closed = |error: ProtocolError| match error {
        ProtocolError::Ended | ProtocolError::Io(_) => ClientError::NoAgent,
        other => other.into(),
    };
    stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).map_err(|error| closed(error.into()))?;
    let line = match protocol::line(stream) {
        // A limit of the stream's is another matter.
        Err(ProtocolError::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
            return Err(ProtocolError::Io(error).into());
        }
        line => line.map_err(closed)?,
    };
    match line.starts_with(b"OK ") {
        true => Ok(()),
        false => Err(ClientError::Handshake(String::from_utf8_lossy(&line).into_owned())),
    }
}

/// Asks and hears the answer. What follows it, if anything, is on the stream.
pub fn ask<T: DeserializeOwned>(stream: &mut (impl Read + Write), request: &Request) -> Result<T> {
    protocol::write_line(stream, request)?;
    answer(stream)
}

/// Is the agent there, and is the guest's root?
pub fn ping(stream: &mut (impl Read + Write)) -> Result<Pong> {
    ask(stream, &Request::Ping {})
}

/// Starts a command. Then [`hear`] what it says until it ends, and [`say`] to it what there is to say: from two threads, if
/// both its input and its output are more than the pipes between hold.
pub fn exec(stream: &mut (impl Read + Write), command: Exec) -> Result<()> {
    ask::<Done>(stream, &Request::Exec(command)).map(drop)
}

/// Tells a running command something.
pub fn say(stream: &mut impl Write, message: ToGuest) -> Result<()> {
    Ok(stream.write_all(&message.frame().encode()).map_err(ProtocolError::Io)?)
}

/// What a running command says next; after [`FromGuest::Exit`] there is no more.
pub fn hear(stream: &mut impl Read) -> Result<FromGuest> {
    let frame = Frame::read(stream)?.ok_or(ProtocolError::Ended)?;
    Ok(FromGuest::parse(frame)?)
}

/// What is at a path?
pub fn look(stream: &mut (impl Read + Write), path: &str) -> Result<Found> {
    ask(stream, &Request::Look { path: path.into() })
}

/// Afterwards an archive is on the stream: for [`crate::files::unpack`].
pub fn pack(stream: &mut (impl Read + Write), path: &str, name: Option<&str>) -> Result<()> {
    let request = Request::Pack { path: path.into(), name: name.map(str::to_owned) };
    ask::<Done>(stream, &request).map(drop)
}

/// Afterwards the agent expects an archive, as [`crate::files::pack`] writes it; then end that direction of the stream and
/// call [`unpacked`].
pub fn unpack(stream: &mut (impl Read + Write), path: &str) -> Result<()> {
    ask::<Done>(stream, &Request::Unpack { path: path.into() }).map(drop)
}

/// How the unpacking went.
pub fn unpacked(stream: &mut impl Read) -> Result<()> {
    answer::<Done>(stream).map(drop)
}

/// Sets the size of the console's terminal.
pub fn window(stream: &mut (impl Read + Write), size: Size) -> Result<()> {
    ask::<Done>(stream, &Request::Window(size)).map(drop)
}

/// Asks the guest's init to power off.
pub fn shut_down(stream: &mut (impl Read + Write)) -> Result<()> {
    ask::<Done>(stream, &Request::ShutDown {}).map(drop)
}

fn answer<T: DeserializeOwned>(stream: &mut impl Read) -> Result<T> {
    match protocol::read_line("answer", stream)? {
        Reply::Ok(answer) => Ok(answer),
        Reply::Error(why) => Err(ClientError::Refused(why)),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// A stream whose other end says this, whatever it hears, and how that was taken.
    fn talk<T>(says: &str, with: impl FnOnce(&mut UnixStream) -> T) -> (T, String) {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(says.as_bytes()).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        let result = with(&mut ours);
        drop(ours);
        let mut heard = String::new();
        theirs.read_to_string(&mut heard).unwrap();
        (result, heard)
    }

    #[test]
    fn a_call_is_made_as_the_vmm_wants_it() {
        let (result, heard) = talk("OK 1073741824\nrest", |stream| {
            handshake(stream).unwrap();
            let mut rest = String::new();
            stream.read_to_string(&mut rest).map(|_| rest)
        });
        assert_eq!((result.unwrap().as_str(), heard.as_str()), ("rest", "CONNECT 1\n"));
        assert!(matches!(talk("", handshake).0, Err(ClientError::NoAgent)));
        assert!(matches!(talk("what?\n", handshake).0, Err(ClientError::Handshake(_))));
    }

    #[test]
    fn an_answer_is_what_was_asked_for_or_the_reason_why_not() {
        let (pong, heard) = talk("{\"ok\":{\"version\":\"2\",\"root_is_ready\":false}}\n", ping);
        assert_eq!(pong.unwrap(), Pong { version: "2".into(), root_is_ready: false });
        assert_eq!(heard, "{\"ping\":{}}\n");
        let (refused, _) = talk("{\"error\":\"no room\"}\n", shut_down);
        assert!(matches!(refused, Err(ClientError::Refused(why)) if why == "no room"));
        let (cut, _) = talk("{\"ok\":", shut_down);
        assert!(matches!(cut, Err(ClientError::Protocol(ProtocolError::Ended))));
    }

    #[test]
    fn a_command_is_heard_to_its_end() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let agent = thread::spawn(move || {
            let request: Request = protocol::read_line("request", &mut theirs).unwrap();
            protocol::write_line(&mut theirs, &Reply::Ok(Done {})).unwrap();
            let said = ToGuest::parse(Frame::read(&mut theirs).unwrap().unwrap()).unwrap();
            for message in [FromGuest::Stdout(b"out".into()), FromGuest::Exit(protocol::Exit::Code(3))] {
                theirs.write_all(&message.frame().encode()).unwrap();
            }
            (request, said)
        });
        let command = Exec { argv: vec!["cat".into()], ..Exec::default() };
        exec(&mut ours, command.clone()).unwrap();
        say(&mut ours, ToGuest::Stdin(b"in".into())).unwrap();
        assert_eq!(hear(&mut ours).unwrap(), FromGuest::Stdout(b"out".into()));
        assert_eq!(hear(&mut ours).unwrap(), FromGuest::Exit(protocol::Exit::Code(3)));
        assert!(matches!(hear(&mut ours), Err(ClientError::Protocol(ProtocolError::Ended))));
        assert_eq!(agent.join().unwrap(), (Request::Exec(command), ToGuest::Stdin(b"in".into())));
    }
}
