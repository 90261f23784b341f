//! Every command of the book does what the book says: those of docs/getting-started.md and docs/operations.md, in their order, on
//! a Debian with systemd.
//!
//! The disk of the book is that of a Debian; here it is a small system's, which is up in seconds. Its kernel is Debian's.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{BufRead as _, BufReader, PipeReader, Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use berth_tests::book::{self, Who};
use berth_tests::guest::{asset, program};
use berth_tests::host::provide;
use berth_tests::machine::Machine;

/// The ordinary user of the book.
const PERSON: &str = "alice";
/// Her files.
const HOME: &str = "/home/alice";
const PACKAGE: &str = concat!("berth_", env!("CARGO_PKG_VERSION"), "_amd64.deb");
/// The init of her guests starts this: the power button, and somebody at the console.
const INITTAB: &str = "\
::sysinit:/bin/modprobe -a button evdev
::respawn:/bin/acpid -f -l /dev/null
::shutdown:/bin/umount -a -r
ttyS0::askfirst:-/bin/sh
";
/// What follows a command's output, with its exit code.
const DONE: &str = "--- done with ";

#[test]
fn every_command_of_the_beginning_does_what_it_says() {
    types_what_is_in("getting-started.md", include_str!("../../docs/getting-started.md"), &machine());
}

#[test]
fn every_command_of_operations_does_what_it_says() {
    let machine = machine();
    machine.run(&format!("cd {HOME} && dpkg --install {PACKAGE}"));
    machine.run(&format!(
        "cd {HOME} && berth image import --name debian --kernel vmlinuz --initrd initrd.img disk.img"
    ));
    types_what_is_in("operations.md", include_str!("../../docs/operations.md"), &machine);
}

/// A machine with nothing of ours but what the user has in her home.
fn machine() -> Machine {
    let files = tempfile::tempdir().unwrap();
    let disk = make_disk(files.path());
    let machine =
        Machine::boot(&[program("berth.deb"), asset(provide::BZIMAGE), asset(provide::INITRAMFS), disk]);
    machine.run(&format!(
        "useradd --create-home --shell /bin/bash {PERSON} && cd {HOME} && mv /given/berth.deb {PACKAGE} && \
         mv /given/bzImage vmlinuz && mv /given/initramfs.cpio initrd.img && mv /given/disk.img . && \
         chown {PERSON}: *"
    ));
    machine
}

/// Does what a page says, to its end, and then tells of all that went otherwise.
fn types_what_is_in(name: &str, page: &str, machine: &Machine) {
    let steps = book::steps(page).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(!steps.is_empty(), "{name} has no commands");
    let (mut root, mut person, mut wrong) = (None, None, String::new());
    for step in steps {
        // Each begins with the first command of its own: the user is in groups by then.
        let (shell, user) = match step.who {
            Who::Root => (&mut root, "root"),
            Who::User => (&mut person, PERSON),
        };
        let (code, output) = shell.get_or_insert_with(|| Shell::begin(machine, user)).run(&step.command);
        eprintln!("{name}:{}: {}\n{output}", step.line, step.command);
        if !step.is_told_by(&output) || (code != 0) != step.should_fail() {
            wrong.push_str(&format!(
                "{name}:{}: {step}\n--- but it ended with {code} and\n{output}\n",
                step.line
            ));
        }
    }
    assert!(wrong.is_empty(), "the book says\n{wrong}");
}

/// A disk with a system on it: what the small initramfs has, with an init of its own.
fn make_disk(directory: &Path) -> PathBuf {
    let (root, disk) = (directory.join("root"), directory.join("disk.img"));
    fs::create_dir(&root).unwrap();
    let mut archive = File::open(asset(provide::INITRAMFS)).unwrap();
    loop {
        let mut reader = cpio::NewcReader::new(archive).unwrap();
        if reader.entry().is_trailer() {
            break;
        }
        let (name, mode) = (root.join(reader.entry().name()), reader.entry().mode());
        let mut content = Vec::new();
        reader.read_to_end(&mut content).unwrap();
        match mode & 0o170_000 {
            0o040_000 => fs::create_dir_all(&name).unwrap(),
            0o120_000 => symlink(OsStr::from_bytes(&content), &name).unwrap(),
            _ => {
                fs::write(&name, &content).unwrap();
                fs::set_permissions(&name, Permissions::from_mode(mode & 0o777)).unwrap();
            }
        }
        archive = reader.finish().unwrap();
    }
    fs::write(root.join("etc/inittab"), INITTAB).unwrap();
    fs::create_dir(root.join("srv")).unwrap();
    let made =
        Command::new("mkfs.ext4").args(["-q", "-d"]).arg(&root).arg(&disk).arg("32M").status().unwrap();
    assert!(made.success());
    disk
}

/// A shell that is there for a page, so that a directory, a variable and what runs in the background are kept.
struct Shell {
    child: Child,
    input: ChildStdin,
    /// What is printed, errors among it as on a terminal.
    output: BufReader<PipeReader>,
}

impl Shell {
    fn begin(machine: &Machine, user: &str) -> Shell {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut child = machine
            .command_as(user, &["bash"])
            .stdin(Stdio::piped())
            .stdout(writer.try_clone().unwrap())
            .stderr(writer)
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let mut shell = Shell { child, input, output: BufReader::new(reader) };
        let home = if user == "root" { "/root" } else { HOME };
        shell.run(&format!("export HOME={home}; cd {HOME}"));
        shell
    }

    /// What a command comes to: its exit code, and what was printed meanwhile.
    fn run(&mut self, command: &str) -> (i32, String) {
        // In a group, so that the command does not read what is said to the shell next.
        write!(self.input, "{{ {command}\n}} < /dev/null; echo '{DONE}'$?\n").unwrap();
        let mut output = String::new();
        loop {
            let mut line = Vec::new();
            let length = self.output.read_until(b'\n', &mut line).unwrap();
            assert!(length > 0, "the shell ended: {command}\n{output}");
            let line = String::from_utf8_lossy(&line);
            // Output need not end its last line.
            if let Some((rest, code)) = line.split_once(DONE) {
                output.push_str(rest);
                return (code.trim().parse().unwrap(), output);
            }
            output.push_str(&line);
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
