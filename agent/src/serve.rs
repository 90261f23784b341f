//! The agent: who calls is answered, each in a thread of its own that is in the root of process 1.
//!
//! Only the host can call: a socket of this family knows no network, and who calls from inside of the guest is turned away.

use std::io::{self, BufReader, BufWriter};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use agent::files::{self, Owners};
use agent::protocol::{self, Done, Found, Kind, Pong, ProtocolError, Reply, Request};
use rustix::fs::{Mode, OFlags, open};
use rustix::net::{SocketFlags, acceptfrom_with};
use serde::Serialize;

use crate::kernel::{Kernel, tell, warn};
use crate::{exec, network, root, shut_down, vsock};

/// Operations at a time.
const MAX_OPERATIONS: usize = 64;

/// For a thread that serves an operation. The largest frame is on the heap.
const STACK_BYTES: usize = 256 << 10;

/// How long who calls may take to say what it wants.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);

/// After a call that could not be taken, for want of memory or descriptors.
const PAUSE: Duration = Duration::from_secs(1);

const TRANSFER_BYTES: usize = 64 << 10;

/// What it says to who asked: the reason why not, for a person.
pub type Refusal = String;

pub fn run() -> ExitCode {
    // What came with the program: see `init::leave_agent`.
    let kernel = Kernel::new(rustix::stdio::stdin(), rustix::stdio::stdout());
    // Out of the console's session, so that it is not hung up with it.
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(c"berth-agent");
    network::start(kernel);
    let listener = vsock::listener(kernel);
    tell("the host is listened to");
    let operations = Arc::new(AtomicUsize::new(0));
    loop {
        match acceptfrom_with(&listener, SocketFlags::CLOEXEC) {
            Ok((caller, Some(address))) if vsock::is_host(&address) => take(kernel, caller, &operations),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
            Err(error) => {
                warn(&format!("a call is not taken: {error}"));
                thread::sleep(PAUSE);
            }
        }
    }
}

fn take(kernel: Kernel<'static>, caller: OwnedFd, operations: &Arc<AtomicUsize>) {
    // A connected socket of this family is as good as a Unix stream.
    let stream = UnixStream::from(caller);
    if operations.fetch_add(1, Ordering::Relaxed) >= MAX_OPERATIONS {
        operations.fetch_sub(1, Ordering::Relaxed);
        let busy = format!("the agent does {MAX_OPERATIONS} things already; try again when one has ended");
        let _ = protocol::write_line(&mut &stream, &Reply::<Done>::Error(busy));
        return;
    }
    let done = Operation(Arc::clone(operations));
    let serve = move || {
        let _done = done;
        if let Err(error) = serve(kernel, &stream) {
            tell(&format!("an operation ends early: {error}"));
        }
        let _ = stream.shutdown(Shutdown::Both);
    };
    if let Err(error) = thread::Builder::new().stack_size(STACK_BYTES).spawn(serve) {
        warn(&format!("no thread for an operation: {error}"));
    }
}

/// Counted until its thread ends.
struct Operation(Arc<AtomicUsize>);

impl Drop for Operation {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve(kernel: Kernel, stream: &UnixStream) -> Result<(), ProtocolError> {
    stream.set_read_timeout(Some(REQUEST_LIMIT))?;
    let request = protocol::read_line("request", &mut &*stream);
    stream.set_read_timeout(None)?;
    let request = match request {
        Ok(request) => request,
        Err(error) => return answer(stream, &Reply::<Done>::Error(error.to_string())),
    };
    let is_ready = root::is_ready(kernel);
    if let Err(error) = root::enter(kernel) {
        let refusal = format!("the root of process 1 cannot be entered: {error}");
        return answer(stream, &Reply::<Done>::Error(refusal));
    }
    match request {
        Request::Ping {} => {
            let root_is_ready = is_ready.unwrap_or(false);
            answer(stream, &Reply::Ok(Pong { version: env!("CARGO_PKG_VERSION").into(), root_is_ready }))
        }
        Request::Exec(command) => match exec::Running::start(&command) {
            Ok(running) => {
                answer(stream, &Reply::Ok(Done {}))?;
                Ok(running.serve(kernel, stream)?)
            }
            Err(refusal) => answer(stream, &Reply::<Done>::Error(refusal)),
        },
        Request::Look { path } => answer(stream, &reply(look(Path::new(&path)))),
        Request::Pack { path, name } => {
            let path = Path::new(&path);
            let name = name.map_or_else(|| files::name_of(path), Into::into);
            // Said before the archive begins, for that is easier to hear.
            let found =
                std::fs::symlink_metadata(path).map_err(|error| format!("{}: {error}", path.display()));
            let checked = files::check_name(Path::new(&name)).map_err(|error| error.to_string());
            if let Err(refusal) = found.and(checked) {
                return answer(stream, &Reply::<Done>::Error(refusal));
            }
            answer(stream, &Reply::Ok(Done {}))?;
            // What fails is in the archive.
            let packed = files::pack(
                path,
                Path::new(&name),
                Owners::Kept,
                BufWriter::with_capacity(TRANSFER_BYTES, stream),
            );
            drop(packed);
            Ok(())
        }
        Request::Unpack { path } => {
            let path = Path::new(&path);
            if !path.is_dir() {
                let refusal = format!("{} is not a directory of the guest", path.display());
                return answer(stream, &Reply::<Done>::Error(refusal));
            }
            answer(stream, &Reply::Ok(Done {}))?;
            // This thread's own. Until a file is whole and has its mode, it is nobody else's to read.
            rustix::process::umask(Mode::RWXG | Mode::RWXO);
            let from = BufReader::with_capacity(TRANSFER_BYTES, stream);
            let unpacked = files::unpack(from, path, Owners::Kept);
            answer(stream, &reply(unpacked.map(|()| Done {}).map_err(|error| error.to_string())))
        }
        Request::Window(size) => {
            // Without making it this process's terminal, and without waiting for a carrier.
            let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let set = open("/dev/console", flags, Mode::empty())
                .and_then(|console| rustix::termios::tcsetwinsize(console.as_fd(), exec::winsize(size)));
            answer(stream, &reply(set.map(|()| Done {}).map_err(|error| format!("/dev/console: {error}"))))
        }
        Request::ShutDown {} => answer(stream, &reply(shut_down::ask(kernel).map(|()| Done {}))),
    }
}

fn answer(stream: &UnixStream, reply: &impl Serialize) -> Result<(), ProtocolError> {
    protocol::write_line(&mut &*stream, reply)
}

fn reply<T>(result: Result<T, Refusal>) -> Reply<T> {
    match result {
        Ok(answer) => Reply::Ok(answer),
        Err(why) => Reply::Error(why),
    }
}

fn look(path: &Path) -> Result<Found, Refusal> {
    let kind = match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Kind::Directory,
        Ok(metadata) if metadata.is_file() => Kind::File,
        Ok(_) => Kind::Other,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Kind::Nothing,
        Err(error) => return Err(format!("{}: {error}", path.display())),
    };
    Ok(Found { kind })
}
