//! What a host does to a daemon: no room on the disk, files cut short, no addresses, clocks that are set, clients that say nothing,
//! another daemon. Each is told plainly, and nothing is lost.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use api_socket::ClientError;
use api_socket::fleet::{Guest, NewGuest, Outcome, Restart, State, Stop};
use berth_tests::berthd::{Daemon, IMAGE, small};
use berth_tests::guest::limits;
use berth_tests::guest::tap::host;
use rustix::process::{Pid, Signal, kill_process};

#[track_caller]
fn refused<T: std::fmt::Debug>(outcome: Result<T, ClientError>) -> (u16, String) {
    match outcome {
        Err(ClientError::Refused(fault)) => (fault.status, fault.message),
        other => panic!("{other:?}"),
    }
}

/// What is written down of a guest.
fn record(daemon: &Daemon, id: &str) -> serde_json::Value {
    let text = fs::read(daemon.path("state/guests").join(id).join("guest.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < limits::COMMAND, "{what}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Takes all the room that there is.
fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    let mut piece = vec![b'x'; 1 << 20];
    while !piece.is_empty() {
        match file.write_all(&piece) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::StorageFull => piece.truncate(piece.len() / 2),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn with_no_room_on_the_disk_nothing_is_made_everything_can_go_and_nothing_is_forgotten() {
    let mut daemon = Daemon::configured("", "");
    let state = daemon.path("state");
    fs::create_dir(&state).unwrap();
    host("mount", &["-t", "tmpfs", "-o", "size=192m", "none", state.to_str().unwrap()]);
    daemon.run();
    daemon.import();
    let nothing = daemon.traces();
    let guests = ["runs", "stops", "ends"].map(|name| daemon.guest(name));
    daemon.exec("ends", &["true"]);
    let idle = daemon.client().create(small("idle")).unwrap();
    fill(&state.join("full"));

    let (status, message) = refused(daemon.client().create(small("more")));
    assert!(status == 507 && message.contains("no place") && message.contains("make room"), "{message}");
    let (status, message) = refused(daemon.client().start("idle"));
    assert!(status == 507 && message.contains("make room"), "{message}");
    assert_eq!(daemon.client().guests().unwrap().len(), 4, "nothing is left of the one that was refused");
    assert_eq!(fs::read_dir(state.join("guests")).unwrap().count(), 4);
    assert_eq!(daemon.exec("runs", &["echo", "still"]).text(), "still\n");
    let stopped = daemon.client().stop("stops", Stop::default()).unwrap();
    assert_eq!(stopped.last_end.unwrap().outcome, Outcome::PoweredOff);
    daemon.say("ends", "(sleep 1; poweroff -f) &");
    assert_eq!(daemon.wait_for("ends", State::Stopped).last_end.unwrap().outcome, Outcome::PoweredOff);

    // What ended is written down when there is room, and another daemon knows it.
    fs::remove_file(state.join("full")).unwrap();
    wait_until("it is not written down", || {
        guests[1..].iter().all(|guest| record(&daemon, &guest.id)["state"] == "stopped")
    });
    daemon.kill();
    daemon.run();
    assert_eq!(daemon.client().guest("ends").unwrap().last_end.unwrap().outcome, Outcome::PoweredOff);
    assert_eq!(daemon.client().guest("runs").unwrap().pid, guests[0].pid);
    daemon.client().start("idle").unwrap();

    fill(&state.join("full"));
    for guest in ["runs", "stops", "ends", &idle.name] {
        daemon.client().remove(guest, true).unwrap();
    }
    assert_eq!(fs::read_dir(state.join("guests")).unwrap().count(), 0);
    assert_eq!(daemon.traces(), nothing);
    daemon.kill();
    host("umount", &[state.to_str().unwrap()]);
}

#[test]
fn what_was_cut_short_is_not_started_and_is_said_to_be() {
    let daemon = Daemon::start("");
    daemon.import();
    let client = daemon.client();
    let guest = client.create(small("web")).unwrap();
    let nothing = daemon.traces();
    let image = daemon.path("state/images").join(IMAGE);
    let disk = daemon.path("state/guests").join(&guest.id).join("disk.img");
    let cut = |path: &Path, by: u64| {
        let file = File::options().write(true).open(path).unwrap();
        file.set_len(path.metadata().unwrap().len() - by).unwrap();
    };

    cut(&disk, 4096);
    let (status, message) = refused(client.start("web"));
    assert!(
        status == 500 && message.contains("disk.img") && message.contains("its end is missing"),
        "{message}"
    );
    File::options().write(true).open(&disk).unwrap().set_len(2 << 20).unwrap();
    client.start("web").unwrap();
    client.stop("web", Stop { seconds: 0 }).unwrap();

    for part in ["kernel", "initrd", "disk"] {
        let path = image.join(part);
        let whole = fs::read(&path).unwrap();
        cut(&path, 1);
        let is_refused = |outcome| {
            let (status, message) = refused(outcome);
            assert!(status == 500 && message.contains(&format!("The {part} of image")), "{message}");
            assert!(message.contains("Bring back") && message.contains("import the image anew"), "{message}");
        };
        is_refused(client.create(small("other")));
        // A guest has a disk of its own.
        if part != "disk" {
            is_refused(client.start("web"));
        }
        fs::write(&path, whole).unwrap();
    }
    client.start("web").unwrap();
    client.remove("web", true).unwrap();
    assert_eq!((daemon.traces(), client.guests().unwrap().len()), (nothing, 0));
}

#[test]
fn when_all_addresses_are_guests_one_more_is_told_so_and_the_next_that_becomes_free_is_given() {
    // Six addresses, and one is the host's.
    let mut daemon = Daemon::configured("", "address = \"10.99.0.1\"\nprefix = 29");
    daemon.run();
    daemon.import();
    let client = daemon.client();
    let addresses: Vec<_> = (0..5)
        .map(|number| client.create(small(&format!("g{number}"))).unwrap().address.unwrap().to_string())
        .collect();
    assert_eq!(addresses, (2..7).map(|last| format!("10.99.0.{last}")).collect::<Vec<_>>());
    let (status, message) = refused(client.create(small("more")));
    assert!(status == 507 && message.contains("All addresses of 10.99.0.1/29"), "{message}");
    client.create(NewGuest { network: false, ..small("alone") }).unwrap();
    client.remove("g3", false).unwrap();
    assert_eq!(client.create(small("more")).unwrap().address.unwrap().to_string(), addresses[3]);
}

fn signal(guest: &Guest, signal: Signal) {
    kill_process(Pid::from_raw(guest.pid.unwrap() as i32).unwrap(), signal).unwrap();
}

/// Of the host as a whole; put back when dropped.
struct Clock;

impl Clock {
    fn turn(days: i32) {
        host("date", &["-s", &format!("{days} days")]);
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        let _ = Command::new("date").args(["-s", "0 days"]).stdout(Stdio::null()).status();
    }
}

#[test]
fn a_clock_that_is_set_makes_nobody_wait_longer_or_shorter() {
    let mut daemon = Daemon::start("");
    daemon.import();
    let _clock = Clock;
    for days in [3650, -7300] {
        // A start by policy that is a second away stays so.
        let new = NewGuest { restart: Restart::OnFailure, ..small("crashes") };
        daemon.client().create(new).unwrap();
        let before = daemon.client().start("crashes").unwrap();
        signal(&before, Signal::KILL);
        daemon.wait_for("crashes", State::Waiting);
        Clock::turn(days);
        daemon.kill();
        daemon.run();
        daemon.wait_for_another(&before);

        // A guest that does not go down has the time that it was given, although the daemon is another by then.
        signal(&daemon.guest("deaf"), Signal::STOP);
        let (client, begin) = (daemon.client(), Instant::now());
        let stop = thread::spawn(move || client.stop("deaf", Stop { seconds: 8 }));
        daemon.wait_for("deaf", State::Stopping);
        Clock::turn(-days);
        daemon.kill();
        daemon.run();
        let ended = daemon.wait_for("deaf", State::Stopped);
        assert_eq!(ended.last_end.unwrap().outcome, Outcome::Ended);
        assert!(begin.elapsed() >= Duration::from_secs(7), "{:?}", begin.elapsed());
        assert!(stop.join().unwrap().is_err(), "its daemon was killed");
        for guest in ["crashes", "deaf"] {
            daemon.client().remove(guest, true).unwrap();
        }
    }
}

#[test]
fn clients_that_say_nothing_keep_nobody_out_but_those_who_come_after_all_places_are_taken() {
    let daemon = Daemon::start("");
    daemon.import();
    let guest = daemon.guest("web");
    let mut silent: Vec<_> = (0..250).map(|_| UnixStream::connect(daemon.path("socket")).unwrap()).collect();
    assert_eq!(daemon.client().guest("web").unwrap().pid, guest.pid);
    assert_eq!(daemon.exec("web", &["echo", "still"]).text(), "still\n");
    // Who has just gone may have a place for a moment more; then one of the next silent ones takes it.
    let begin = Instant::now();
    let message = loop {
        silent.extend((0..10).map(|_| UnixStream::connect(daemon.path("socket")).unwrap()));
        match daemon.client().version() {
            Err(error) => break error.to_string(),
            Ok(_) => assert!(begin.elapsed() < limits::COMMAND, "there is always a place"),
        }
    };
    assert!(message.contains("Too many clients"), "{message}");
    drop(silent);
    wait_until("places stay taken", || daemon.client().version().is_ok());
    assert_eq!(
        daemon.client().stop("web", Stop::default()).unwrap().last_end.unwrap().outcome,
        Outcome::PoweredOff
    );
}

#[test]
fn two_daemons_do_not_touch_each_other_s_guests() {
    let daemon = Daemon::start("");
    daemon.import();
    let before = daemon.guest("web");
    // The same groups, and directories of its own.
    let other = Daemon::start("");
    other.import();
    assert_eq!(other.client().guests().unwrap().len(), 0);
    assert_eq!(daemon.exec("web", &["echo", "still"]).text(), "still\n");

    // The same directories: it ends, and says why.
    let begin = Instant::now();
    let mut second = Command::new(berth_tests::guest::program("berthd"));
    let second = second.arg("--config").arg(daemon.path("berthd.toml")).output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(second.status.code() == Some(1) && said.contains("another berthd keeps its guests in"), "{said}");
    assert!(begin.elapsed() < limits::API);
    let after = daemon.client().guest("web").unwrap();
    assert_eq!((after.pid, after.state), (before.pid, State::Running));
    assert_eq!(daemon.exec("web", &["echo", "still"]).text(), "still\n");
}
