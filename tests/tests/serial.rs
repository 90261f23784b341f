//! The serial console: what is typed arrives, and neither a flood of input nor one of output harms the host.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::Write;
use std::thread;
use std::time::Duration;

use api_socket::{ActionType, Request, Serial};
use berth_tests::footprint::Footprint;
use berth_tests::guest::{Ended, Guest, Setup, limits};

/// More than a pipe and all buffers on the way hold.
const FLOOD: usize = 4 << 20;

/// What the VMM may grow by, in KiB.
const GROWTH_KIB: u64 = 512;

#[test]
fn a_line_that_is_typed_arrives_as_it_is() {
    let mut guest = Guest::booted(Setup::default());
    let line: String = (0..90).map(|n| format!("{n:x}-The.quick_brown,fox;")).collect();
    assert!(line.len() > 2000);
    assert_eq!(guest.run(&format!("echo '{line}'")).trim_end(), line);
    guest.power_off();
}

#[test]
fn a_flood_of_input_that_the_guest_does_not_read_does_not_grow_the_vmm() {
    let mut guest = Guest::booted(Setup::default());
    guest.run("true");
    let private = |guest: &Guest| {
        Footprint::beyond_guest(guest.vmm.pid(), guest.setup().memory_mib).unwrap().private_kib
    };
    let before = private(&guest);
    let mut input = guest.console.input();
    // It blocks when the VMM takes no more; the end of the VMM ends it.
    let flood = thread::spawn(move || input.write_all(&[b'x'; FLOOD]));
    thread::sleep(Duration::from_secs(5));
    let after = private(&guest);
    assert!(after <= before + GROWTH_KIB, "{before} KiB before, {after} KiB after");
    // The API is not held up by it.
    assert!(guest.api.instance_info().is_ok());
    guest.vmm.kill();
    assert!(flood.join().unwrap().is_err(), "the VMM took it all");
}

#[test]
fn a_paused_guest_takes_no_input_and_loses_none() {
    let mut guest = Guest::booted(Setup::default());
    guest.run("true");
    guest.pause();
    guest.say("echo a-''b-c; echo d-''e-f");
    thread::sleep(Duration::from_secs(1));
    guest.resume();
    assert_eq!(guest.console.wait_for("d-e-f", limits::COMMAND).trim_start(), "a-b-c\nd-e-f");
}

#[test]
fn a_flood_of_output_that_nobody_reads_does_not_stop_the_guest() {
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("serial");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    let _reader = fs::File::options().read(true).write(true).open(&pipe).unwrap();
    let setup = Setup {
        command_line: r#"berth.run="yes flood | head -c 100000""#.into(),
        arguments: ["--metrics-path", "metrics"].map(String::from).into(),
        ..Setup::default()
    };
    let mut guest = Guest::configured(setup);
    let serial = Serial { serial_out_path: Some(pipe), ..Serial::default() };
    guest.apply(Request::PutSerial(serial));
    guest.apply(Request::Action(ActionType::InstanceStart));
    // It powers off at the end.
    assert_eq!(guest.vmm.ended(limits::BOOT), Ended::Code(0));
}

#[test]
fn output_goes_to_the_file_that_the_client_names() {
    let mut guest = Guest::configured(Setup {
        command_line: r#"berth.run="echo to-the-file""#.into(),
        ..Setup::default()
    });
    let path = guest.path("serial.log");
    guest.apply(Request::PutSerial(Serial { serial_out_path: Some(path.clone()), ..Serial::default() }));
    guest.apply(Request::Action(ActionType::InstanceStart));
    assert_eq!(guest.vmm.ended(limits::BOOT), Ended::Code(0));
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains("to-the-file") && text.contains("BERTH-EXIT 0"), "{text}");
    assert_eq!(guest.console.wait_for_end(limits::EXIT), "");
}
