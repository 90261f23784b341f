//! Our agent in a guest: the initramfs that brings it, and operations of a test's.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent::client;
use agent::initramfs::{self, KERNEL_ARGUMENT};
use agent::protocol::{Exec, Exit, FromGuest, ToGuest};

use super::setup::VSOCK;
use super::{Guest, Setup, asset, limits, program};
use crate::host::provide;

/// Between two calls to an agent that is not there yet.
const CALL_AGAIN: Duration = Duration::from_millis(100);

/// A guest to be with the agent in it. `directory` is where its initramfs is made, of the asset and what is to come after it.
pub fn with_agent(directory: &Path, setup: Setup) -> Setup {
    let base = asset(provide::INITRAMFS);
    let initrd = archive(&directory.join("initrd"), Some(&base));
    Setup {
        initrd: Some(initrd),
        vsock: true,
        command_line: format!("{KERNEL_ARGUMENT} {}", setup.command_line),
        ..setup
    }
}

/// The agent's archive behind this one, or alone.
pub fn archive(path: &Path, base: Option<&Path>) -> PathBuf {
    let agent = fs::read(program("berth-agent")).expect("berth-agent");
    let mut file = File::create(path).expect("an initramfs");
    if let Some(base) = base {
        std::io::copy(&mut File::open(base).expect("the asset"), &mut file).expect("a copy of the asset");
    }
    let before = file.metadata().expect("its size").len();
    initramfs::append(&agent, before, &mut file).expect("the agent's archive");
    path.to_owned()
}

/// How a command went.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit: Exit,
}

impl Outcome {
    /// Standard output of one that must have succeeded without a word of complaint.
    #[track_caller]
    pub fn text(self) -> String {
        let stderr = String::from_utf8_lossy(&self.stderr);
        assert_eq!((self.exit, stderr.as_ref()), (Exit::Code(0), ""), "{:?}", self.stdout);
        String::from_utf8(self.stdout).expect("text")
    }
}

/// A command by its words.
pub fn command(argv: &[&str]) -> Exec {
    Exec { argv: argv.iter().map(|word| word.to_string()).collect(), ..Exec::default() }
}

impl Guest {
    /// A connection to the agent, if it is there.
    pub fn try_agent(&self) -> Result<UnixStream, client::ClientError> {
        let stream = client::connect(&self.path(VSOCK))?;
        stream.set_read_timeout(Some(limits::COMMAND)).expect("a limit");
        stream.set_write_timeout(Some(limits::COMMAND)).expect("a limit");
        Ok(stream)
    }

    /// A connection to the agent, which may still have to come.
    #[track_caller]
    pub fn agent(&self) -> UnixStream {
        let deadline = Instant::now() + limits::BOOT;
        loop {
            match self.try_agent() {
                Ok(stream) => return stream,
                Err(error) if Instant::now() > deadline => panic!("no agent: {error}"),
                Err(_) => std::thread::sleep(CALL_AGAIN),
            }
        }
    }

    /// Waits for the guest's root.
    #[track_caller]
    pub fn wait_for_root(&self) {
        let deadline = Instant::now() + limits::DEBIAN;
        while !client::ping(&mut self.agent()).expect("a ping").root_is_ready {
            assert!(Instant::now() < deadline, "the guest has no root yet");
            std::thread::sleep(CALL_AGAIN);
        }
    }

    /// Runs a command by the agent and feeds it this.
    #[track_caller]
    pub fn exec_with(&self, command: Exec, input: &[u8]) -> Outcome {
        let mut stream = self.agent();
        client::exec(&mut stream, command).expect("the command starts");
        let feed = || {
            for piece in input.chunks(10_000) {
                client::say(&mut &stream, ToGuest::Stdin(piece.to_vec()))?;
            }
            client::say(&mut &stream, ToGuest::StdinEnd)
        };
        std::thread::scope(|scope| {
            // A command that has ended does not take what is still said.
            scope.spawn(|| drop(feed()));
            hear(&mut &stream)
        })
    }

    #[track_caller]
    pub fn exec(&self, argv: &[&str]) -> Outcome {
        self.exec_with(command(argv), b"")
    }
}

/// All that a command says, to its end.
#[track_caller]
pub fn hear(stream: &mut (impl Read + Write)) -> Outcome {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match client::hear(stream).expect("a frame") {
            FromGuest::Stdout(bytes) => stdout.extend(bytes),
            FromGuest::Stderr(bytes) => stderr.extend(bytes),
            FromGuest::Exit(exit) => return Outcome { stdout, stderr, exit },
        }
    }
}
