//! The agent that comes with an image's initramfs: the host runs commands and copies files in a guest that has nothing of
//! ours installed.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::net::Shutdown;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use agent::client::{self, ClientError};
use agent::files::{self, Owners};
use agent::protocol::{Exec, Exit, FromGuest, Kind, Size, ToGuest};
use berth_tests::guest::agent::{Outcome, command, hear, with_agent};
use berth_tests::guest::streams::data;
use berth_tests::guest::tap::{Tap, host};
use berth_tests::guest::{Ended, Guest, Setup, asset, limits, md5};
use berth_tests::host::disk::WritableDisk;
use berth_tests::host::provide;
use tempfile::TempDir;

/// Enough to fill every buffer on the way many times.
const BYTES: usize = 8 << 20;

/// The agent's directory in /proc.
const AGENT: &str = "$(dirname $(grep -l ^@berth-agent /proc/[0-9]*/cmdline 2> /dev/null))";

/// A Debian with the agent. The disk before the directory, which is the order of their ends.
struct Debian {
    guest: Guest,
    _disk: WritableDisk,
    _directory: TempDir,
}

fn debian(change: impl FnOnce(Setup) -> Setup) -> Debian {
    let directory = tempfile::tempdir().unwrap();
    let name = format!("agent-{}", std::process::id());
    let disk = WritableDisk::new(&asset(provide::DEBIAN), directory.path(), &name).unwrap();
    let setup = with_agent(directory.path(), Setup::debian(disk.path().to_owned()));
    Debian { guest: Guest::started(change(setup)), _disk: disk, _directory: directory }
}

/// The busybox guest with the agent, which needs no disk.
fn busybox(directory: &Path) -> Guest {
    Guest::started(with_agent(directory, Setup::default()))
}

fn run(guest: &Guest, script: &str) -> Outcome {
    guest.exec(&["sh", "-c", script])
}

#[track_caller]
fn said(guest: &Guest, script: &str) -> String {
    run(guest, script).text()
}

/// Waits until systemd has started everything.
#[track_caller]
fn wait_until_running(guest: &Guest) {
    let begin = Instant::now();
    loop {
        let state = run(guest, "systemctl is-system-running 2> /dev/null").stdout;
        if state == b"running\n" {
            return;
        }
        assert!(begin.elapsed() < limits::DEBIAN, "it is {:?}", String::from_utf8_lossy(&state));
        thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_debian_is_reached_before_and_after_its_root_is_there_and_goes_down_when_asked() {
    let mut debian = debian(|setup| setup);
    let guest = &mut debian.guest;
    // In the initramfs, which is another one's and has a busybox.
    assert!(said(guest, "uname -a").starts_with("Linux "));
    assert!(!client::ping(&mut guest.agent()).unwrap().root_is_ready);
    guest.wait_for_root();
    wait_until_running(guest);
    assert_eq!(said(guest, "cat /proc/1/comm; . /etc/os-release; echo $ID"), "systemd\ndebian\n");
    // It is where it was and nothing of it is to be seen: no mount, no unit, no file, no complaint.
    assert_eq!(said(guest, "cat /proc/*/cmdline 2> /dev/null | tr '\\0' '\\n' | grep ^@"), "@berth-agent\n");
    assert_eq!(said(guest, "grep berth /proc/mounts; ls -d /berth 2> /dev/null; true"), "");
    assert_eq!(said(guest, "systemctl list-units --failed --no-legend --plain"), "");
    assert_eq!(said(guest, "dmesg --level=emerg,alert,crit,err,warn | grep -i berth; true"), "");

    assert_eq!(run(guest, "exit 7").exit, Exit::Code(7));
    let missing = guest.exec(&["no-such-program"]);
    assert_eq!((missing.exit, missing.stdout.as_slice()), (Exit::Code(127), &b""[..]));
    assert!(String::from_utf8(missing.stderr).unwrap().contains("no-such-program"));
    assert_eq!(guest.exec(&["/etc/passwd"]).exit, Exit::Code(126));
    assert_eq!(run(guest, "kill -KILL $$").exit, Exit::Signal(9));
    // As after a login.
    assert_eq!(
        said(guest, "pwd; echo $HOME $USER $SHELL; umask; id -u"),
        "/root\n/root root /bin/bash\n0022\n0\n"
    );
    let daemon = Exec {
        user: Some("daemon".into()),
        ..command(&["sh", "-c", "id -un; id -gn; id -Gn; pwd; echo $HOME"])
    };
    assert_eq!(guest.exec_with(daemon, b"").text(), "daemon\ndaemon\ndaemon\n/usr/sbin\n/usr/sbin\n");
    let elsewhere = Exec {
        directory: Some("/tmp".into()),
        environment: [("WORD".into(), "a b".into()), ("HOME".into(), "/x".into())].into(),
        ..command(&["sh", "-c", "pwd; echo $WORD $HOME"])
    };
    assert_eq!(guest.exec_with(elsewhere, b"").text(), "/tmp\na b /x\n");
    for (command, words) in [
        (Exec { user: Some("nobody-here".into()), ..command(&["true"]) }, "nobody-here"),
        (Exec { directory: Some("/no/place".into()), ..command(&["true"]) }, "/no/place"),
        (Exec::default(), "argv"),
    ] {
        let refused = client::exec(&mut guest.agent(), command).unwrap_err();
        assert!(matches!(&refused, ClientError::Refused(why) if why.contains(words)), "{refused}");
    }
    // Nothing of all this is left: of ours one would stay, of others one is there for a moment.
    said(guest, "while ps -e -o stat= -o comm= | grep -q ^Z; do sleep 0.2; done");
    on_a_terminal(guest);
    files_go_both_ways(guest);

    client::shut_down(&mut guest.agent()).unwrap();
    assert_eq!(guest.vmm.ended(limits::DEBIAN), Ended::Code(0));
    assert!(guest.vmm.log().contains("The guest has ended: powered off"), "{}", guest.vmm.log());
}

/// A command with a terminal of its own: its size, keys that are signals, and the end of its input.
fn on_a_terminal(guest: &Guest) {
    let size = Size { rows: 33, columns: 101 };
    let shell =
        "stty -echo; tty; stty size; trap 'stty size; exit 5' WINCH; echo ready; while :; do sleep 0.1; done";
    let mut stream = guest.agent();
    client::exec(&mut stream, Exec { terminal: Some(size), ..command(&["sh", "-c", shell]) }).unwrap();
    let heard = hear_until(&mut stream, "ready\r\n");
    assert!(heard.starts_with("/dev/pts/") && heard.contains("\r\n33 101\r\n"), "{heard}");
    client::say(&mut stream, ToGuest::Window(Size { rows: 44, columns: 122 })).unwrap();
    let outcome = hear(&mut stream);
    assert_eq!((outcome.stdout.as_slice(), outcome.exit), (&b"44 122\r\n"[..], Exit::Code(5)));

    let mut stream = guest.agent();
    client::exec(&mut stream, Exec { terminal: Some(size), ..command(&["sh", "-c", "echo on; sleep 100"]) })
        .unwrap();
    hear_until(&mut stream, "on\r\n");
    client::say(&mut stream, ToGuest::Stdin(vec![3])).unwrap();
    assert_eq!(hear(&mut stream).exit, Exit::Signal(2));

    let mut stream = guest.agent();
    let cat = command(&["sh", "-c", "stty -echo; echo on; cat"]);
    client::exec(&mut stream, Exec { terminal: Some(size), ..cat }).unwrap();
    hear_until(&mut stream, "on\r\n");
    client::say(&mut stream, ToGuest::Stdin(b"a line\n".into())).unwrap();
    client::say(&mut stream, ToGuest::StdinEnd).unwrap();
    assert_eq!(hear(&mut stream).text(), "a line\r\n");
}

/// What a command says, in pieces of any size, up to these words.
#[track_caller]
fn hear_until(stream: &mut UnixStream, words: &str) -> String {
    let mut heard = String::new();
    while !heard.ends_with(words) {
        match client::hear(stream).unwrap() {
            FromGuest::Stdout(bytes) => heard.push_str(&String::from_utf8(bytes).unwrap()),
            other => panic!("{other:?} after {heard:?}"),
        }
    }
    heard
}

/// A tree into the guest and out again, over what is there, with what belongs to others.
fn files_go_both_ways(guest: &Guest) {
    let scratch = tempfile::tempdir().unwrap();
    let tree = scratch.path().join("tree");
    fs::create_dir_all(tree.join("deep/er")).unwrap();
    fs::write(tree.join("deep/er/large"), data(5, BYTES)).unwrap();
    fs::write(tree.join("program"), "#!/bin/sh\necho it runs\n").unwrap();
    fs::set_permissions(tree.join("program"), fs::Permissions::from_mode(0o750)).unwrap();
    fs::set_permissions(tree.join("deep"), fs::Permissions::from_mode(0o555)).unwrap();
    symlink("deep/er/large", tree.join("link")).unwrap();
    symlink("/nowhere", tree.join("dangling")).unwrap();

    for _ in 0..2 {
        send(guest, &tree, "tree", "/srv").unwrap();
    }
    assert_eq!(
        said(guest, "/srv/tree/program; md5sum < /srv/tree/link"),
        format!("it runs\n{}", md5(&data(5, BYTES)))
    );
    let modes = said(guest, "cd /srv/tree; stat -c '%a %u %n' program deep; readlink link dangling");
    assert_eq!(modes, "750 0 program\n555 0 deep\ndeep/er/large\n/nowhere\n");

    said(guest, "chown -h 1:1 /srv/tree/program; mkfifo /srv/tree/pipe");
    let back = scratch.path().join("back");
    fs::create_dir(&back).unwrap();
    fetch(guest, "/srv/tree", Some("copy"), &back).unwrap();
    assert_eq!(fs::read(back.join("copy/link")).unwrap(), data(5, BYTES));
    assert_eq!(fs::read_link(back.join("copy/dangling")).unwrap(), Path::new("/nowhere"));
    assert_eq!(fs::metadata(back.join("copy/program")).unwrap().permissions().mode() & 0o7777, 0o750);
    assert!(!back.join("copy/pipe").exists());
    // Absolute links lead where they lead for the guest.
    said(guest, "ln -s /srv/tree/deep /absolute");
    fetch(guest, "/absolute/er/large", None, &back).unwrap();
    assert_eq!(fs::read(back.join("large")).unwrap(), data(5, BYTES));

    // While it is on its way a file is nobody else's to read, and a directory that nobody said anything of is as usual.
    fs::write(tree.join("program"), data(6, BYTES)).unwrap();
    let mut archive = Vec::new();
    files::pack(&tree.join("program"), Path::new("new/half"), Owners::Own, &mut archive).unwrap();
    let mut stream = guest.agent();
    client::unpack(&mut stream, "/srv").unwrap();
    stream.write_all(&archive[..BYTES / 2]).unwrap();
    let wait = "until [ -s /srv/new/half ]; do sleep 0.1; done; stat -c %a /srv/new/half";
    assert_eq!(said(guest, wait), "600\n");
    stream.write_all(&archive[BYTES / 2..]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    client::unpacked(&mut stream).unwrap();
    assert_eq!(said(guest, "stat -c %a /srv/new /srv/new/half"), "755\n750\n");

    let missing = fetch(guest, "/no/such", None, &back).unwrap_err();
    assert!(missing.contains("/no/such"), "{missing}");
    let nowhere = send(guest, &tree.join("program"), "p", "/etc/hosts").unwrap_err();
    assert!(nowhere.contains("/etc/hosts"), "{nowhere}");
    // Not even through a link that is there already.
    said(guest, "ln -s / /srv/out");
    let outside = send(guest, &tree.join("program"), "out/escaped", "/srv").unwrap_err();
    assert!(outside.contains("out/escaped") || outside.contains("outside"), "{outside}");
    for (path, kind) in [
        ("/etc", Kind::Directory),
        ("/etc/passwd", Kind::File),
        ("/absolute", Kind::Directory),
        ("/dev/null", Kind::Other),
        ("/no/such", Kind::Nothing),
    ] {
        assert_eq!(client::look(&mut guest.agent(), path).unwrap().kind, kind, "{path}");
    }
    assert_eq!(said(guest, "ls /escaped 2> /dev/null; true"), "");
    fs::set_permissions(tree.join("deep"), fs::Permissions::from_mode(0o755)).unwrap();
}

fn send(guest: &Guest, path: &Path, name: &str, into: &str) -> Result<(), String> {
    let mut stream = guest.agent();
    client::unpack(&mut stream, into).map_err(|error| error.to_string())?;
    // Who refuses an entry does not read what follows it, and says so afterwards.
    let packed = files::pack(path, Path::new(name), Owners::Own, &stream);
    let _ = stream.shutdown(Shutdown::Write);
    client::unpacked(&mut stream).map_err(|error| error.to_string())?;
    packed.map_err(|error| error.to_string())
}

fn fetch(guest: &Guest, path: &str, name: Option<&str>, into: &Path) -> Result<(), String> {
    let mut stream = guest.agent();
    client::pack(&mut stream, path, name).map_err(|error| error.to_string())?;
    files::unpack(&stream, into, Owners::Own).map_err(|error| error.to_string())
}

#[test]
fn an_initramfs_alone_runs_as_before_and_is_reached() {
    let directory = tempfile::tempdir().unwrap();
    let mut guest = busybox(directory.path());
    // The image's own init has run.
    guest.console.wait_for("BERTH-GUEST-READY", limits::BOOT);
    guest.console.wait_for("# ", limits::BOOT);
    assert!(client::ping(&mut guest.agent()).unwrap().root_is_ready);
    assert_eq!(said(&guest, "cat /proc/1/comm"), "init\n");

    // Input, output and errors are three streams; none of them loses or mixes anything.
    let (up, down) = (data(1, BYTES), data(2, BYTES));
    fs::write(directory.path().join("down"), &down).unwrap();
    send(&guest, &directory.path().join("down"), "down", "/tmp").unwrap();
    let both = guest.exec_with(command(&["sh", "-c", "cat /tmp/down & md5sum >&2; wait"]), &up);
    assert!(both.stdout == down, "standard output is not what was said");
    assert_eq!((String::from_utf8(both.stderr).unwrap(), both.exit), (md5(&up), Exit::Code(0)));
    let echo = guest.exec_with(command(&["cat"]), &up);
    assert!(echo.stdout == up && echo.exit == Exit::Code(0), "what came back is not what was said");

    a_command_ends_with_its_host(&guest);
    who_does_not_read_holds_up_nobody_else(&guest);

    // The console is a terminal, whose size can be set.
    client::window(&mut guest.agent(), Size { rows: 50, columns: 132 }).unwrap();
    assert_eq!(guest.run("stty size"), "50 132\n");
    // An agent that nobody calls does nothing: it is not woken up.
    let woken = format!(
        "woken() {{ grep ^voluntary {AGENT}/status; }}; before=$(woken); sleep 5; [ \"$before\" = \"$(woken)\" ]"
    );
    said(&guest, &woken);
    client::shut_down(&mut guest.agent()).unwrap();
    assert_eq!(guest.ended(), Ended::Code(0));
}

fn a_command_ends_with_its_host(guest: &Guest) {
    for terminal in [None, Some(Size { rows: 24, columns: 80 })] {
        // One that heeds a hang-up, and one that does not.
        for script in ["sleep 4711", "trap '' HUP; sleep 4711 & sleep 4711"] {
            let (stream, session) = session(guest, script, terminal);
            drop(stream);
            gone(guest, &session);
        }
    }
}

/// Starts a script and learns the number of its session.
fn session(guest: &Guest, script: &str, terminal: Option<Size>) -> (UnixStream, String) {
    let mut stream = guest.agent();
    let script = format!("echo $$; {script}");
    client::exec(&mut stream, Exec { terminal, ..command(&["sh", "-c", &script]) }).unwrap();
    let session = hear_until(&mut stream, "\n").trim().to_owned();
    assert_eq!(said(guest, &format!("{} || echo none", is_left(&session))), "", "{script}");
    (stream, session)
}

/// Waits until nothing of a session runs.
fn gone(guest: &Guest, session: &str) {
    said(guest, &format!("while {}; do sleep 0.1; done", is_left(session)));
}

fn is_left(session: &str) -> String {
    format!("cat /proc/[0-9]*/stat 2> /dev/null | awk '{{print $6}}' | grep -qx {session}")
}

fn who_does_not_read_holds_up_nobody_else(guest: &Guest) {
    // Neither the host, while a command writes without end,
    let deaf = session(guest, "sleep 1; exec cat /dev/zero", None);
    // nor a command, while the host does.
    let full = session(guest, "exec sleep 4711", None);
    full.0.set_write_timeout(Some(Duration::from_secs(3))).unwrap();
    let mut sent = 0;
    while (&full.0).write_all(&ToGuest::Stdin(vec![0; 10_000]).frame().encode()).is_ok() {
        sent += 10_000;
        assert!(sent < 16 << 20, "the agent keeps all that is said");
    }
    let resident = said(guest, &format!("awk '/^VmRSS/ {{print $2}}' {AGENT}/status"));
    assert!(resident.trim().parse::<u32>().unwrap() < 8 << 10, "the agent has {resident} KiB");
    for (stream, session) in [deaf, full] {
        drop(stream);
        gone(guest, &session);
    }
}

#[test]
fn an_image_without_an_init_in_its_initramfs_gets_the_root_that_the_kernel_would_give_it() {
    // The one of the asset counts as missing, as for the kernel, when it is no program. The rest of it stays: the stock kernel
    // has the drivers of disks as modules.
    let mut debian = debian(|setup| {
        let mut file = File::options().write(true).open(setup.initrd.as_ref().unwrap()).unwrap();
        file.seek(SeekFrom::End(0)).unwrap();
        let init = cpio::NewcBuilder::new("init").mode(0o100_644).write(file, 0);
        cpio::newc::trailer(init.finish().unwrap()).unwrap();
        Setup { command_line: format!("{} rootwait berth.hostname=web", setup.command_line), ..setup }
    });
    let guest = &mut debian.guest;
    // Process 1 waits for the disk meanwhile.
    assert!(!client::ping(&mut guest.agent()).unwrap().root_is_ready);
    assert_eq!(said(guest, "hostname"), "web\n");
    assert_eq!(said(guest, "mount -t sysfs sys /sys; ls /sys/class/block; umount /sys"), "");
    said(guest, "modprobe -a virtio_blk ext4");
    guest.wait_for_root();
    wait_until_running(guest);
    assert_eq!(said(guest, "cat /proc/1/comm; findmnt -no FSTYPE /dev"), "systemd\ndevtmpfs\n");
    assert!(said(guest, "findmnt -no SOURCE,OPTIONS /").starts_with("/dev/vda rw"));
    client::shut_down(&mut guest.agent()).unwrap();
    assert_eq!(guest.vmm.ended(limits::DEBIAN), Ended::Code(0));
}

#[test]
fn a_network_comes_up_as_the_command_line_says() {
    let tap = Tap::new(0, &[]);
    let network = |setup: Setup| Setup {
        interfaces: vec![tap.interface()],
        command_line: format!(
            "{} berth.address={}/24 berth.gateway={} berth.dns=10.77.0.53",
            setup.command_line,
            tap.guest(),
            tap.host()
        ),
        ..setup
    };
    // An image that has no network of its own, and one whose network manager asks in vain for an address.
    let directory = tempfile::tempdir().unwrap();
    let guest = Guest::started(network(with_agent(directory.path(), Setup::default())));
    reached(&guest, &tap);
    assert_eq!(said(&guest, "cat /etc/resolv.conf"), "nameserver 10.77.0.53\n");
    drop(guest);
    let mut debian = debian(network);
    debian.guest.wait_for_root();
    reached(&debian.guest, &tap);
    wait_until_running(&debian.guest);
    // This image has one that says something, which counts.
    let kept = said(&debian.guest, "cat /etc/resolv.conf");
    assert!(kept.contains("nameserver") && !kept.contains("10.77.0.53"), "{kept}");
    client::shut_down(&mut debian.guest.agent()).unwrap();
    assert_eq!(debian.guest.vmm.ended(limits::DEBIAN), Ended::Code(0));
}

/// From the host, and by the guest's own way out.
fn reached(guest: &Guest, tap: &Tap) {
    let address = format!(
        "until ip -4 address show scope global | grep -q 'inet {}/24'; do sleep 0.2; done",
        tap.guest()
    );
    said(guest, &address);
    said(guest, &format!("until ip route show default | grep -q 'via {}'; do sleep 0.2; done", tap.host()));
    host("ping", &["-c", "3", "-i", "0.1", "-W", "30", &tap.guest()]);
}
