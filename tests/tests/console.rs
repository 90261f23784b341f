//! The virtio console is a terminal: what the guest writes comes out, what is typed goes in, and its size is the one that was
//! said last.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

use api_socket::{ActionType, Console, ConsoleUpdate, Request};
use berth_tests::guest::{Guest, Name, Setup, limits};

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
    guest.apply(Request::Action(ActionType::InstanceStart));
    guest.console.wait_for("BERTH-GUEST-READY", limits::BOOT);
    guest.console.wait_for("# ", limits::BOOT);
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
        guest.apply(Request::PatchConsole(ConsoleUpdate { columns, rows }));
        let size = format!("{rows} {columns}");
        guest.run(&format!("until [ \"$(stty size < /dev/hvc0)\" = \"{size}\" ]; do sleep 0.1; done"));
        let told = guest.api.vm_config().unwrap().console.unwrap();
        assert_eq!((told.columns, told.rows), (columns, rows));
    }
    guest.power_off();
}

#[test]
fn a_guest_without_a_console_has_none_to_resize() {
    let mut guest = Guest::booted(Setup::default());
    let resize = Request::PatchConsole(ConsoleUpdate { columns: 80, rows: 24 });
    let error = guest.api.apply(&resize).unwrap_err().to_string();
    assert!(error.contains("PUT /console"), "{error}");
    guest.power_off();
}
