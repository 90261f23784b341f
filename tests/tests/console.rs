//! The virtio console is a terminal: what the guest writes comes out, what is typed goes in, and its size is the one that was
//! said last.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use api_socket::{Console, ConsolePort, ConsoleUpdate, RateLimiter, Request, TokenBucket, VmState};
use berth_tests::guest::{Guest, Name, Setup, limits, md5, times};

fn pipe(path: &Path) -> File {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn a_console_is_written_to_typed_at_and_resized() {
    on(Name::Berth);
}

#[test]
fn a_console_is_written_to_typed_at_and_resized_without_pci() {
    on(Name::Firecracker);
}

fn on(name: Name) {
    let mut guest = Guest::configured(Setup { name, ..Setup::default() });
    let (input, output) = (guest.path("input"), guest.path("output"));
    let (mut keyboard, mut screen) = (pipe(&input), pipe(&output));
    let console = Console {
        output_path: output,
        input_path: Some(input),
        columns: 132,
        rows: 43,
        ..Console::default()
    };
    guest.apply(Request::PutConsole(console));
    guest.boot();
    assert_eq!(guest.run("stty size < /dev/hvc0"), "43 132\n");

    // The guest has a shell there too.
    keyboard.write_all(b"echo what is $((40 + 2)) > /run/typed; echo on the screen: $((6 * 7))\n").unwrap();
    let mut shown = Vec::new();
    while !shown.ends_with(b"on the screen: 42") {
        let mut byte = [0];
        screen.read_exact(&mut byte).unwrap();
        shown.push(byte[0]);
    }
    assert_eq!(guest.run("cat /run/typed"), "what is 42\n");

    for (columns, rows) in [(80, 24), (200, 60)] {
        guest.apply(Request::PatchConsole(ConsoleUpdate::size(columns, rows, None)));
        let size = format!("{rows} {columns}");
        guest.run(&format!("until [ \"$(stty size < /dev/hvc0)\" = \"{size}\" ]; do sleep 0.1; done"));
        let told = guest.api.vm_config().unwrap().console.unwrap();
        assert_eq!((told.columns, told.rows), (columns, rows));
    }
    guest.power_off();
}

/// What goes through a stream. In this direction a queue alone may hold half of it.
const TO_GUEST: usize = 2 << 20;
const FROM_GUEST: usize = 4 << 20;

/// Bytes of which no two stretches are alike.
fn noise(bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    File::open("/dev/urandom").unwrap().read_exact(&mut data).unwrap();
    data
}

#[test]
fn a_console_has_further_terminals_and_streams_with_names() {
    further_ports(Name::Berth);
}

/// By limits that never fill again: what goes at once is all that there is, until the limits are taken off.
#[test]
fn what_a_guest_writes_beyond_a_limit_holds_up_nobody_on_a_terminal_and_the_writer_on_a_stream() {
    let mut guest = Guest::configured(Setup::default());
    let (shown, said) = (guest.path("shown"), guest.path("said"));
    let once = TokenBucket { size: 1000, one_time_burst: None, refill_time: 1 << 40 };
    let rate_limiter = Some(RateLimiter { bandwidth: Some(once), ops: None });
    let port =
        ConsolePort { name: "stream".into(), output_path: said.clone(), rate_limiter, ..Default::default() };
    let console =
        Console { output_path: shown.clone(), rate_limiter, ports: vec![port], ..Console::default() };
    guest.apply(Request::PutConsole(console));
    guest.boot();
    // Linux writes 16 bytes at a time to a terminal.
    guest.run("yes | head -c 4000 > /dev/hvc0");
    guest.run("until [ -c /dev/vport*p1 ]; do sleep 0.1; done");
    guest.run("to=$(echo /dev/vport*p1); head -c 300000 /dev/zero > $to & sleep 3; kill $!; ! wait $!");
    let bytes = |output: &Path| std::fs::metadata(output).unwrap().len();
    for (output, most) in [(&shown, 2000), (&said, 64 << 10)] {
        assert!((1..=most).contains(&bytes(output)), "{} bytes in {output:?}", bytes(output));
    }
    let off = TokenBucket { size: 0, one_time_burst: None, refill_time: 0 };
    let rate_limiter = Some(RateLimiter { bandwidth: Some(off), ops: None });
    for port in [None, Some("stream".to_owned())] {
        guest.apply(Request::PatchConsole(ConsoleUpdate { rate_limiter, port, ..Default::default() }));
    }
    guest.run("head -c 300000 /dev/zero > $to");
    let begin = Instant::now();
    while bytes(&shown) < 4000 || bytes(&said) < 300_000 {
        assert!(begin.elapsed() < limits::COMMAND, "{} and {} bytes", bytes(&shown), bytes(&said));
        std::thread::sleep(Duration::from_millis(10));
    }
    guest.power_off();
}

#[test]
fn a_console_has_further_terminals_and_streams_with_names_without_pci() {
    further_ports(Name::Firecracker);
}

fn further_ports(name: Name) {
    let mut guest = Guest::configured(Setup { name, vcpus: 2, ..Setup::default() });
    let path = |name: &str| guest.path(name);
    let (first, second_in, second_out) = (path("first"), path("second in"), path("second out"));
    let (stream_in, stream_out, unread_out) = (path("stream in"), path("stream out"), path("unread out"));
    let (mut keyboard, mut screen) = (pipe(&second_in), pipe(&second_out));
    let (mut to_guest, mut from_guest, mut unread) = (pipe(&stream_in), pipe(&stream_out), pipe(&unread_out));
    let port =
        |name: &str, output_path| ConsolePort { name: name.into(), output_path, ..ConsolePort::default() };
    let ports = vec![
        ConsolePort {
            is_console: true,
            input_path: Some(second_in),
            columns: Some(100),
            rows: Some(30),
            ..port("second", second_out)
        },
        ConsolePort { input_path: Some(stream_in), ..port("org.test.stream", stream_out) },
        port("org.test.unread", unread_out),
    ];
    // Nobody reads the first either, and its pipe is full.
    let mut full = pipe(&first);
    full.write_all(&[0; 64 << 10]).unwrap();
    guest.apply(Request::PutConsole(Console {
        output_path: first,
        columns: 132,
        rows: 43,
        ports,
        ..Console::default()
    }));
    guest.boot();

    guest.run("until [ \"$(cat /sys/class/virtio-ports/*/name | wc -l)\" = 3 ]; do sleep 0.1; done");
    guest.run("cd /sys/class/virtio-ports; for p in *; do ln -s /dev/$p /run/$(cat $p/name 2> /dev/null || echo $p); done");
    let names = guest.run("cat /sys/class/virtio-ports/*/name");
    assert_eq!(names, "second\norg.test.stream\norg.test.unread\n");
    // There is a file for each terminal that there could be; what nobody has open forgets its size.
    for hvc in ["hvc0", "hvc1"] {
        guest.run(&format!(
            "until (: < /dev/{hvc}) 2> /dev/null; do sleep 0.1; done; sleep 100000 < /dev/{hvc} &"
        ));
    }
    assert_ne!(guest.shell("(: < /dev/hvc2) 2> /dev/null").code, 0, "a stream is no terminal");
    let sized = |guest: &mut Guest, hvc: &str, size: &str| {
        guest.run(&format!("until [ \"$(stty size < /dev/{hvc})\" = \"{size}\" ]; do sleep 0.1; done"));
    };
    sized(&mut guest, "hvc0", "43 132");
    sized(&mut guest, "hvc1", "30 100");
    let resize = |columns, rows, port: Option<&str>| {
        Request::PatchConsole(ConsoleUpdate::size(columns, rows, port.map(String::from)))
    };
    guest.apply(resize(200, 60, Some("second")));
    sized(&mut guest, "hvc1", "60 200");
    sized(&mut guest, "hvc0", "43 132");
    guest.apply(resize(81, 26, None));
    sized(&mut guest, "hvc0", "26 81");
    sized(&mut guest, "hvc1", "60 200");
    let told = guest.api.vm_config().unwrap().console.unwrap();
    assert_eq!(
        (told.columns, told.rows, told.ports[0].columns, told.ports[0].rows),
        (81, 26, Some(200), Some(60))
    );
    for (name, words) in [("org.test.stream", "no terminal"), ("other", "no such port")] {
        let error = guest.api.apply(&resize(1, 1, Some(name))).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }

    // The second terminal, in both directions.
    guest.run("stty raw -echo < /dev/hvc1");
    guest.run("(head -c 5 > /run/typed; echo said) < /dev/hvc1 > /dev/hvc1 &");
    keyboard.write_all(b"typed").unwrap();
    let mut said = [0; 4];
    screen.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"said", "{}", String::from_utf8_lossy(&said));
    assert_eq!(guest.run("cat /run/typed"), "typed");

    // Nobody reads these: the terminal's output is lost, and who writes to the stream waits. Linux hands a terminal's over in
    // pieces of 16 bytes and waits for each, which on one processor takes milliseconds.
    guest.run("head -c 80000 /dev/zero > /dev/hvc0");
    guest.run("(yes | head -c 500000 > /run/org.test.unread; touch /run/written) 2> /dev/null &");

    // What is written before a program has the port open is not lost.
    let sent = noise(TO_GUEST);
    let sum = md5(&sent);
    let writer = std::thread::spawn(move || to_guest.write_all(&sent));
    guest.run(&format!("head -c {TO_GUEST} < /run/org.test.stream | md5sum > /run/sum &"));
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(100));
        guest.pause();
        guest.resume();
    }
    writer.join().unwrap().unwrap();
    guest.run("until [ -s /run/sum ]; do sleep 0.1; done");
    assert_eq!(guest.run("cat /run/sum"), sum);

    guest.run(&format!("head -c {FROM_GUEST} /dev/urandom > /run/data; md5sum < /run/data > /run/sum"));
    guest.run("(cat /run/data > /run/org.test.stream; touch /run/sent) &");
    let mut received = vec![0; FROM_GUEST];
    let (begin, rest) = received.split_at_mut(FROM_GUEST / 4);
    from_guest.read_exact(begin).unwrap();
    // A reader that takes its time.
    std::thread::sleep(Duration::from_secs(1));
    assert_ne!(guest.shell("[ -e /run/sent ]").code, 0, "it waits for its reader");
    guest.pause();
    guest.resume();
    from_guest.read_exact(rest).unwrap();
    assert_eq!(guest.run("cat /run/sum"), md5(&received));

    assert_ne!(guest.shell("[ -e /run/written ]").code, 0, "nobody has read it");
    let mut all = vec![0; 500_000];
    unread.read_exact(&mut all).unwrap();
    assert_eq!(all, b"y\n".repeat(250_000));
    guest.run("until [ -e /run/written ]; do sleep 0.1; done");
    // Another driver begins from the beginning.
    guest.run(
        "cd /sys/bus/virtio/drivers/virtio_console; for way in unbind bind; do echo virtio0 > $way; done",
    );
    guest.run("until [ \"$(cat /sys/class/virtio-ports/*/name | wc -l)\" = 3 ]; do sleep 0.1; done");
    guest.power_off();
}

#[test]
fn a_size_that_is_said_while_the_guest_writes_and_is_paused_arrives() {
    sizes_arrive(Name::Berth);
}

#[test]
fn a_size_that_is_said_while_the_guest_writes_and_is_paused_arrives_without_pci() {
    sizes_arrive(Name::Firecracker);
}

fn sizes_arrive(name: Name) {
    let mut guest = Guest::configured(Setup { name, vcpus: 2, ..Setup::default() });
    let (first, second) = (guest.path("first"), guest.path("second"));
    let screens = [pipe(&first), pipe(&second)];
    let port = ConsolePort {
        name: "second".into(),
        is_console: true,
        output_path: second,
        ..ConsolePort::default()
    };
    guest.apply(Request::PutConsole(Console { output_path: first, ports: vec![port], ..Console::default() }));
    guest.boot();
    for mut screen in screens {
        std::thread::spawn(move || while screen.read(&mut [0; 4096]).is_ok() {});
    }
    for hvc in ["hvc0", "hvc1"] {
        guest.run(&format!(
            "until (: < /dev/{hvc}) 2> /dev/null; do sleep 0.1; done; sleep 100000 < /dev/{hvc} &"
        ));
        guest.run(&format!("(while :; do seq 20; sleep 0.1; done) > /dev/{hvc} &"));
    }
    let mut other = guest.vmm.client();
    let stop = Arc::<AtomicBool>::default();
    let stopped = Arc::clone(&stop);
    let pauses = std::thread::spawn(move || {
        for length in (0..).map(|pause| pause * 37 % 100) {
            other.apply(&Request::PatchVm(VmState::Paused)).unwrap();
            std::thread::sleep(Duration::from_millis(length / 4));
            other.apply(&Request::PatchVm(VmState::Resumed)).unwrap();
            if stopped.load(Ordering::SeqCst) {
                return;
            }
            std::thread::sleep(Duration::from_millis(length));
        }
    });
    for round in 0..times(10, 1000) {
        // Of a size of 1 busybox says what it takes for the usual one.
        let (columns, rows) = (round as u16 % 150 + 2, round as u16 % 49 + 2);
        for (hvc, port) in [("hvc0", None), ("hvc1", Some("second".to_owned()))] {
            guest.apply(Request::PatchConsole(ConsoleUpdate::size(columns, rows, port)));
            let (is_now, begin) = (format!("{rows} {columns}\n"), Instant::now());
            loop {
                let told = guest.run(&format!("stty size < /dev/{hvc}"));
                if told == is_now {
                    break;
                }
                assert!(begin.elapsed() < limits::COMMAND, "{hvc} has {told:?} and not {is_now:?}");
            }
        }
    }
    stop.store(true, Ordering::SeqCst);
    pauses.join().unwrap();
    guest.power_off();
}

#[test]
fn a_guest_without_a_console_has_none_to_resize() {
    let mut guest = Guest::booted(Setup::default());
    let resize = Request::PatchConsole(ConsoleUpdate::size(80, 24, None));
    let error = guest.api.apply(&resize).unwrap_err().to_string();
    assert!(error.contains("PUT /console"), "{error}");
    guest.power_off();
}
