//! Programs of the host and programs of the guest talk over sockets, and neither side can make the VMM keep more than the
//! limits say.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

use berth_tests::footprint::Footprint;
use berth_tests::guest::setup::VSOCK;
use berth_tests::guest::streams::{self, data, exchange, line};
use berth_tests::guest::{Guest, Name, Setup, md5, program_drive};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;

/// Enough to go round every ring and every window many times.
const BYTES: usize = 8 << 20;

/// What the VMM may grow by while a program does not read: one window, and buffers of requests.
const GROWTH_KIB: u64 = 512;

/// What the sockets of host and guest hold while nobody reads, at most.
const HELD_BYTES: usize = 4 << 20;

/// Descriptors for a test and its VMM, which has one for each connection.
const DESCRIPTORS: u64 = 4096;

/// A guest with sockets and the program that uses them.
struct Talker {
    guest: Guest,
    _program: TempDir,
}

fn talker(name: Name) -> Talker {
    let directory = tempfile::tempdir().unwrap();
    let mut guest = Guest::booted(Setup {
        name,
        vsock: true,
        drives: vec![program_drive(directory.path(), "berth-vsock")],
        arguments: ["--metrics-path", "metrics"].map(String::from).into(),
        ..Setup::default()
    });
    guest.take_program("/dev/vda", "berth-vsock");
    Talker { guest, _program: directory }
}

impl Talker {
    /// Starts this in the guest and waits until it listens.
    fn listening(&mut self, port: u32, what: &str) {
        self.guest.run(&format!("berth-vsock {what} > /run/{port} 2>&1 &"));
        self.guest.run(&format!("until grep -q listening /run/{port}; do sleep 0.1; done"));
    }

    /// A connection to a port of the guest, before it is known whether it is taken.
    fn calling(&self, port: u32) -> UnixStream {
        streams::calling(&self.guest.path(VSOCK), port)
    }

    #[track_caller]
    fn call(&self, port: u32) -> UnixStream {
        streams::call(&self.guest.path(VSOCK), port)
    }

    /// A socket at which the guest finds a port of the host.
    fn serve(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.guest.path(&format!("{VSOCK}_{port}"))).unwrap()
    }
}

#[test]
fn programs_of_host_and_guest_talk_to_each_other() {
    they_talk(Name::Berth);
}

#[test]
fn programs_of_host_and_guest_talk_to_each_other_without_pci() {
    they_talk(Name::Firecracker);
}

fn they_talk(name: Name) {
    let mut talker = talker(name);
    // The host calls: its words come back, after it has ended its direction.
    talker.listening(1000, "echo 1000");
    let words = data(1, BYTES);
    assert!(exchange(&talker.call(1000), &words) == words, "what came back is not what was said");
    // The guest's program hears the end and answers.
    talker.listening(1001, "listen 1001 md5sum");
    assert_eq!(exchange(&talker.call(1001), &words), md5(&words).into_bytes());
    // The guest calls.
    let listener = talker.serve(2000);
    let (server, sum) = (words.clone(), md5(&words));
    let server = thread::spawn(move || exchange(&listener.accept().unwrap().0, &server));
    talker.guest.run("berth-vsock connect 2000 md5sum");
    assert_eq!(server.join().unwrap(), sum.into_bytes());
    assert!(talker.guest.metric("vsock", "rx_bytes_count") > 2 * BYTES as u64);
    assert!(talker.guest.metric("vsock", "tx_bytes_count") > BYTES as u64);
    talker.guest.power_off();
}

#[test]
fn who_calls_where_nobody_listens_is_told() {
    let mut talker = talker(Name::Berth);
    let mut answer = Vec::new();
    // An end, or a reset where the VMM had not read all that was said.
    let ended = talker.calling(1000).read_to_end(&mut answer);
    assert!(answer.is_empty() && ended.is_ok_and(|bytes| bytes == 0));
    assert!(talker.guest.run("berth-vsock connect 2000 true 2>&1; true").contains("reset by peer"));
    // A file that nobody listens at is no more.
    drop(talker.serve(2000));
    assert!(talker.guest.run("berth-vsock connect 2000 true 2>&1; true").contains("reset by peer"));
    talker.guest.power_off();
}

#[test]
fn a_thousand_talk_at_once_and_none_hears_another() {
    a_thousand_talk(Name::Berth);
}

#[test]
fn a_thousand_talk_at_once_and_none_hears_another_without_pci() {
    a_thousand_talk(Name::Firecracker);
}

fn a_thousand_talk(name: Name) {
    let calls = 1000;
    // Before the VMM starts, which inherits it.
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(DESCRIPTORS), maximum }).unwrap();
    let mut talker = talker(name);

    // In the guest too; and a thread for each is more than a kernel with so little memory allows by itself.
    talker.guest.run(&format!("ulimit -n {DESCRIPTORS}; echo {DESCRIPTORS} > /proc/sys/kernel/threads-max"));
    talker.listening(1000, "echo 1000");
    let streams: Vec<_> = (0..calls).map(|_| talker.calling(1000)).collect();
    for stream in &streams {
        assert!(line(stream).starts_with("OK "));
    }
    for (number, stream) in streams.iter().enumerate() {
        assert!(exchange(stream, &data(number as u64, 4096)) == data(number as u64, 4096), "{number}");
    }
    drop(streams);

    let listener = talker.serve(2000);
    let server = thread::spawn(move || {
        let echoes: Vec<_> = (0..calls)
            .map(|_| {
                let (stream, _) = listener.accept().unwrap();
                thread::spawn(move || {
                    io::copy(&mut &stream, &mut &stream).unwrap();
                    stream.shutdown(Shutdown::Write).unwrap();
                })
            })
            .collect();
        echoes.into_iter().for_each(|echo| echo.join().unwrap());
    });
    let said = talker.guest.run(&format!("berth-vsock call 2000 {calls}"));
    assert_eq!(said, format!("{calls} connected, {calls} good\n"));
    server.join().unwrap();
    talker.guest.power_off();
}

/// KiB of the VMM, without the guest's memory, which grows by 2 MiB at a time.
fn held(talker: &Talker) -> u64 {
    let guest = &talker.guest;
    Footprint::beyond_guest(guest.vmm.pid(), guest.setup().memory_mib).unwrap().rss_kib
}

#[test]
fn who_does_not_read_makes_the_other_side_wait_and_the_vmm_keep_no_more() {
    who_does_not_read_waits(Name::Berth);
}

#[test]
fn who_does_not_read_makes_the_other_side_wait_and_the_vmm_keep_no_more_without_pci() {
    who_does_not_read_waits(Name::Firecracker);
}

fn who_does_not_read_waits(name: Name) {
    let mut talker = talker(name);
    // A word each way first, so that what is allocated once is there.
    talker.listening(1000, "echo 1000");
    assert_eq!(exchange(&talker.call(1000), b"a word"), b"a word");
    let before = held(&talker);

    talker.listening(1001, "listen 1001 'sleep 1000'");
    let stream = talker.call(1001);
    stream.set_nonblocking(true).unwrap();
    let mut taken = 0;
    // What is full stays full for as long as it takes to fill: the guest's kernel empties the VMM's side for a while.
    for quiet in 0..20 {
        while let Ok(bytes) = (&stream).write(&[0x55; 65536]) {
            taken += bytes;
            assert!(taken <= HELD_BYTES, "somebody keeps all that is said");
        }
        thread::sleep(Duration::from_millis(10 * quiet));
    }
    let grown = held(&talker).saturating_sub(before);
    assert!(grown <= GROWTH_KIB, "{grown} KiB for {taken} bytes");
    // Nobody else has to wait for it.
    assert_eq!(exchange(&talker.call(1000), b"another"), b"another");
    drop(stream);

    let listener = talker.serve(2000);
    talker.guest.run("(berth-vsock connect 2000 'cat /dev/zero' &) > /dev/null 2>&1");
    let (deaf, _) = listener.accept().unwrap();
    thread::sleep(Duration::from_secs(2));
    let grown = held(&talker).saturating_sub(before);
    assert!(grown <= GROWTH_KIB, "{grown} KiB for a guest that nobody listens to");
    assert_eq!(exchange(&talker.call(1000), b"a third"), b"a third");
    drop(deaf);
    talker.guest.power_off();
}

#[test]
fn a_pause_keeps_a_conversation() {
    pause_keeps_conversation(Name::Berth);
}

#[test]
fn a_pause_keeps_a_conversation_without_pci() {
    pause_keeps_conversation(Name::Firecracker);
}

fn pause_keeps_conversation(name: Name) {
    let mut talker = talker(name);
    talker.listening(1000, "echo 1000");
    let stream = talker.call(1000);
    let mut heard = [0; 5];
    for word in [b"first", b"again"] {
        (&stream).write_all(word).unwrap();
        talker.guest.pause();
        talker.guest.resume();
        (&stream).read_exact(&mut heard).unwrap();
        assert_eq!(&heard, word);
    }
    talker.guest.power_off();
}
