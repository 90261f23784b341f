//! berthd is killed again and again while guests are started, stopped, paused and removed: none is lost, none is there twice,
//! and nothing of one that is gone stays.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use api_socket::ClientError;
use api_socket::fleet::{Client, Guest, State, Stop};
use berth_tests::berthd::{Daemon, small};
use berth_tests::guest::{limits, times};

/// Numbers that look random and are the same in each run.
struct Dice(u64);

impl Dice {
    /// Knuth's, with the upper bits, which are the better ones.
    fn throw(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

#[test]
fn no_guest_is_lost_or_doubled_however_often_the_daemon_is_killed() {
    let (guests, kills) = (times(4, 30), times(8, 100));
    let mut daemon = Daemon::start("");
    daemon.import();
    // What a daemon keeps from its first start on is not what is left of a guest.
    daemon.guest("first");
    daemon.client().remove("first", true).unwrap();
    let (nothing, descriptors) = (daemon.traces(), at_rest(&daemon));
    for number in 0..guests {
        daemon.client().create(small(&name(number))).unwrap();
    }
    let is_over = AtomicBool::new(false);
    let socket = daemon.path("socket");
    let done = thread::scope(|scope| {
        let operators: Vec<_> = (0..3)
            .map(|operator| {
                let (client, is_over) = (Client::new(&socket).with_timeout(limits::COMMAND), &is_over);
                scope.spawn(move || operate(&client, guests, operator, is_over))
            })
            .collect();
        let mut dice = Dice(1);
        for _ in 0..kills {
            thread::sleep(Duration::from_millis(100 + dice.throw(2000)));
            daemon.kill();
            daemon.run();
        }
        is_over.store(true, Ordering::Relaxed);
        operators.into_iter().map(|operator| operator.join().unwrap()).collect::<Vec<_>>()
    });
    println!("{kills} kills, {guests} guests; done and refused for each operator: {done:?}");
    assert!(done.iter().all(|(done, _)| *done > 0), "nothing was done: {done:?}");

    let settled: Vec<_> = (0..guests).map(|number| settle(&daemon, &name(number))).collect();
    let processes = vmms(&daemon);
    for guest in &settled {
        let own: Vec<_> =
            processes.iter().filter(|(_, uid)| **uid == guest.uid).map(|(pid, _)| *pid).collect();
        assert_eq!(own, Vec::from_iter(guest.pid), "{guest:?}");
    }
    let running: Vec<_> = settled.iter().filter(|guest| guest.pid.is_some()).collect();
    assert_eq!(processes.len(), running.len(), "{processes:?}");
    println!("{} run", running.len());
    for guest in running {
        // Also one that was paused when the last daemon was killed, and is not known to be yet.
        daemon.client().resume(&guest.name).unwrap();
        let told = daemon.exec(&guest.name, &["cat", "/proc/cmdline"]).text();
        assert!(told.contains(&format!("berth.hostname={} ", guest.name)), "{guest:?}: {told}");
    }
    for guest in daemon.client().guests().unwrap() {
        match daemon.client().remove(&guest.id, true) {
            // It was being removed when the last daemon was killed.
            Err(ClientError::Refused(fault)) if fault.status == 404 => {}
            outcome => outcome.unwrap(),
        }
    }
    assert_eq!(daemon.traces(), nothing);
    let files: Vec<_> = std::fs::read_dir(daemon.path("state/guests")).unwrap().collect();
    assert!(files.is_empty(), "{files:?}");
    // Clients' last descriptors go with their threads.
    let begin = std::time::Instant::now();
    while daemon.descriptors() > descriptors {
        assert!(
            begin.elapsed() < limits::COMMAND,
            "{} descriptors became {}",
            descriptors,
            daemon.descriptors()
        );
        thread::sleep(Duration::from_millis(50));
    }
}

fn name(number: u32) -> String {
    format!("g{number}")
}

/// The daemon's descriptors without those of clients whose threads are about to end.
fn at_rest(daemon: &Daemon) -> usize {
    let looks = (0..20).map(|_| {
        thread::sleep(Duration::from_millis(50));
        daemon.descriptors()
    });
    looks.min().unwrap()
}

/// What a client does until it is told to stop: how much of it was done, and how much refused or cut off.
fn operate(client: &Client, guests: u32, operator: u32, is_over: &AtomicBool) -> (u32, u32) {
    let mut dice = Dice(u64::from(operator) + 100);
    let (mut done, mut refused) = (0, 0);
    while !is_over.load(Ordering::Relaxed) {
        let guest = name(dice.throw(guests.into()) as u32);
        let own = format!("own-{operator}");
        let outcome = match dice.throw(9) {
            0..=2 => client.start(&guest).map(drop),
            3 => client.pause(&guest).map(drop),
            4 => client.resume(&guest).map(drop),
            5 => reboot(client, &guest),
            // One that comes and goes.
            6 => client.create(small(&own)).map(drop).or_else(|error| is_there(client, &own, error)),
            7 => match client.remove(&own, true) {
                // It is not there, or was made so far that nobody can do anything with it.
                Err(ClientError::Refused(fault)) if fault.status == 404 => Ok(()),
                outcome => outcome,
            },
            _ => client.stop(&guest, Stop { seconds: dice.throw(3) as u32 }).map(drop),
        };
        match outcome {
            Ok(()) => done += 1,
            // It cannot be now, or the daemon was killed meanwhile.
            Err(ClientError::Refused(fault)) => {
                assert!(![400, 404].contains(&fault.status), "{guest}: {fault}");
                refused += 1;
            }
            Err(ClientError::Io { .. } | ClientError::Protocol(_) | ClientError::Source(_)) => {
                refused += 1;
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
    (done, refused)
}

/// By the guest's own wish, which its daemon is not asked.
fn reboot(client: &Client, guest: &str) -> Result<(), ClientError> {
    let mut stream = client.vsock(guest, agent::protocol::PORT, 0)?;
    let argv = ["reboot", "-f"].map(String::from).into();
    let _ = stream.set_read_timeout(Some(limits::COMMAND));
    // It may be gone before it says anything.
    let _ = agent::client::exec(&mut stream, agent::protocol::Exec { argv, ..Default::default() });
    let _ = std::io::copy(&mut stream, &mut std::io::sink());
    Ok(())
}

/// What was refused because it was done before is done.
fn is_there(client: &Client, guest: &str, error: ClientError) -> Result<(), ClientError> {
    match error {
        ClientError::Refused(fault) if fault.status == 409 => match client.guest(guest) {
            // A daemon was killed while it removed it, and the next has just done so.
            Err(ClientError::Refused(fault)) if fault.status == 404 => Ok(()),
            outcome => outcome.map(drop),
        },
        error => Err(error),
    }
}

/// A guest that is in the middle of something comes to an end of it by itself.
fn settle(daemon: &Daemon, name: &str) -> Guest {
    let begin = std::time::Instant::now();
    loop {
        let guest = daemon.client().guest(name).unwrap();
        // One that reboots has a process that has ended, for a moment.
        let is_there = guest.pid.is_none_or(|pid| vmms(daemon).contains_key(&pid));
        if is_there && matches!(guest.state, State::Stopped | State::Running | State::Paused) {
            return guest;
        }
        assert!(begin.elapsed() < limits::COMMAND, "it stays in the middle: {guest:?}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// The processes of guests' users, and whose each is.
fn vmms(daemon: &Daemon) -> BTreeMap<u32, u32> {
    let pids = daemon.traces().into_iter().filter_map(|trace| trace.strip_prefix("process ")?.parse().ok());
    pids.filter_map(|pid: u32| Some((pid, uid(pid)?))).collect()
}

fn uid(pid: u32) -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(format!("/proc/{pid}")).ok().map(|process| process.uid())
}
