//! berthd keeps guests: it makes them, tells of them, and outlives none of them. Driven over its API; the command line is in
//! berth.rs.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use agent::protocol::Exit;
use api_socket::fleet::{self, Disk, GuestUpdate, NewGuest, Outcome, Restart, State, Stop};
use api_socket::{Client as GuestClient, ClientError, Request, VmState};
use berth_tests::berthd::{Daemon, IMAGE, MEMORY_MIB, hear_until, small};
use berth_tests::guest::limits;
use rustix::process::{Pid, Signal, kill_process};

#[test]
fn a_guest_is_made_runs_is_paused_goes_down_and_leaves_nothing() {
    let daemon = Daemon::start("");
    daemon.import();
    let nothing = daemon.traces();
    let guest = daemon.guest("web");
    assert_eq!((guest.state, guest.name.as_str(), guest.last_end.as_ref()), (State::Running, "web", None));
    assert_eq!(daemon.client().guest(&guest.id[..4]).unwrap().id, guest.id);
    let whole = daemon.exec("web", &["uname", "-s"]);
    assert_eq!(whole.text(), "Linux\n");
    assert_eq!(daemon.exec("web", &["sh", "-c", "exit 7"]).exit, Exit::Code(7));
    assert!(daemon.exec("web", &["cat", "/proc/cmdline"]).text().contains("berth.hostname=web "));

    assert_eq!(daemon.client().pause("web").unwrap().state, State::Paused);
    assert_eq!(daemon.client().pause("web").unwrap().state, State::Paused);
    assert_eq!(daemon.client().resume("web").unwrap().state, State::Running);
    assert_eq!(daemon.exec("web", &["echo", "still"]).text(), "still\n");

    let ended = daemon.client().stop("web", Stop::default()).unwrap();
    assert_eq!((ended.state, ended.pid), (State::Stopped, None));
    let end = ended.last_end.unwrap();
    assert_eq!(end.outcome, Outcome::PoweredOff, "{end:?}\n{}", daemon.console("web"));
    assert_eq!(daemon.traces(), nothing);

    // Again, with the disk that it had.
    daemon.client().start("web").unwrap();
    assert_eq!(daemon.exec("web", &["uname", "-s"]).text(), "Linux\n");
    match daemon.client().remove("web", false) {
        Err(ClientError::Refused(fault)) => {
            assert!(fault.status == 409 && fault.message.contains("not stopped"), "{fault}")
        }
        other => panic!("{other:?}"),
    }
    daemon.client().remove("web", true).unwrap();
    assert_eq!(daemon.traces(), nothing);
    assert!(daemon.client().guests().unwrap().is_empty());
    assert!(fs::read_dir(daemon.path("state/guests")).unwrap().next().is_none());
}

#[test]
fn a_guest_does_not_notice_that_its_daemon_is_killed_and_another_takes_it_on() {
    let mut daemon = Daemon::start("");
    daemon.import();
    let before = daemon.guest("web");
    daemon.exec("web", &["sh", "-c", "echo kept > /run/file"]).text();
    let mut console = daemon.client().console("web").unwrap();
    console.set_read_timeout(Some(limits::COMMAND)).unwrap();
    console.write_all(b"echo one-$((1 + 1))\n").unwrap();
    hear_until(&mut console, "one-2").unwrap();
    daemon.client().create(small("other")).unwrap();

    for _ in 0..3 {
        daemon.kill();
        daemon.run();
        let after = daemon.client().guest("web").unwrap();
        assert_eq!((after.state, after.pid, &after.id), (State::Running, before.pid, &before.id));
        assert_eq!(daemon.exec("web", &["cat", "/run/file"]).text(), "kept\n");
    }
    assert_eq!(daemon.client().guest("other").unwrap().state, State::Stopped);
    let mut console = daemon.client().console("web").unwrap();
    console.set_read_timeout(Some(limits::COMMAND)).unwrap();
    console.write_all(b"echo two-$((1 + 1))\n").unwrap();
    hear_until(&mut console, "two-2").unwrap();
    assert!(daemon.console("web").contains("two-2"));

    // How it ends is known although the daemon is not its parent.
    let ended = daemon.client().stop("web", Stop::default()).unwrap();
    assert_eq!(ended.last_end.unwrap().outcome, Outcome::PoweredOff);
}

#[test]
fn a_guest_that_runs_is_given_memory_and_disks_and_gives_them_back() {
    let daemon = Daemon::start("");
    daemon.import();
    let nothing = daemon.traces();
    let disk = |name: &str, size_mib| Disk { name: name.into(), size_mib };
    let new =
        NewGuest { max_memory_mib: Some(MEMORY_MIB + 256), disks: vec![disk("first", 2)], ..small("web") };
    let guest = daemon.client().create(new).unwrap();
    daemon.client().start("web").unwrap();
    run(
        &daemon,
        "for module in virtio_blk virtio_mem virtio_balloon; do modprobe $module || lsmod | grep -q $module; done",
    );
    assert_eq!(run(&daemon, "cat /sys/block/vda/serial; echo; cat /sys/block/vdb/serial"), "root\nfirst");
    run(&daemon, "echo kept | dd of=/dev/vdb conv=fsync 2> /dev/null");

    let update = |update: GuestUpdate| daemon.client().update("web", update);
    let file = daemon.path("state/guests").join(&guest.id).join("disk-data.img");
    for size in [4, 8] {
        let add_disks = vec![disk("data", size)];
        let told = update(GuestUpdate { add_disks, ..GuestUpdate::default() }).unwrap();
        assert_eq!(told.disks, [disk("first", 2), disk("data", size)]);
        assert_eq!(
            run(
                &daemon,
                "until [ -b /dev/vdc ]; do sleep 0.1; done; cat /sys/block/vdc/size /sys/block/vdc/serial"
            ),
            format!("{}\ndata", size << 11)
        );
        run(&daemon, "echo written | dd of=/dev/vdc conv=fsync 2> /dev/null");
        // To its end, although no file of the guest's was so large before.
        run(&daemon, &format!("echo end | dd of=/dev/vdc bs=1M seek={} conv=fsync 2> /dev/null", size - 1));
        assert!(fs::read(&file).unwrap().starts_with(b"written"));
        let told =
            update(GuestUpdate { remove_disks: vec!["data".into()], ..GuestUpdate::default() }).unwrap();
        assert_eq!(told.disks, [disk("first", 2)]);
        assert!(!file.exists());
        run(&daemon, "while [ -e /dev/vdc ]; do sleep 0.1; done");
    }

    let set_memory = |memory| update(GuestUpdate { memory_mib: Some(memory), ..GuestUpdate::default() });
    let total = "$(sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)";
    let before: u32 = run(&daemon, &format!("echo {total}")).trim().parse().unwrap();
    assert_eq!(set_memory(MEMORY_MIB + 256).unwrap().memory_mib, MEMORY_MIB + 256);
    run(&daemon, &format!("until [ {total} -ge {} ]; do sleep 0.1; done", before + (250 << 10)));
    // All of it can be used: the control group allows it too.
    run(
        &daemon,
        "mkdir -p /mnt; mount -t tmpfs -o size=200m none /mnt; head -c 180m /dev/zero > /mnt/much; umount /mnt",
    );
    set_memory(MEMORY_MIB).unwrap();
    run(&daemon, &format!("until [ {total} -le {} ]; do sleep 0.1; done", before + (8 << 10)));
    // What is in the balloon is still the guest's in name.
    let free = "$(sed -n 's/MemFree: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)";
    let before: u32 = run(&daemon, &format!("echo {free}")).trim().parse().unwrap();
    set_memory(MEMORY_MIB - 16).unwrap();
    run(&daemon, &format!("until [ {free} -le {} ]; do sleep 0.1; done", before - (12 << 10)));
    let refused = set_memory(MEMORY_MIB + 257).unwrap_err().to_string();
    assert!(refused.contains("`memory_mib` is 353, and 352 is the most"), "{refused}");

    daemon.client().stop("web", Stop::default()).unwrap();
    let wider = GuestUpdate {
        memory_mib: Some(MEMORY_MIB),
        max_memory_mib: Some(MEMORY_MIB + 128),
        add_disks: vec![disk("later", 1)],
        ..GuestUpdate::default()
    };
    update(wider).unwrap();
    daemon.client().start("web").unwrap();
    run(&daemon, "until [ -b /dev/vdc ]; do sleep 0.1; done");
    assert_eq!(run(&daemon, "head -n 1 /dev/vdb; cat /sys/block/vdc/serial"), "kept\nlater");
    daemon.client().remove("web", true).unwrap();
    assert_eq!(daemon.traces(), nothing);
}

#[test]
fn what_a_guest_writes_is_counted_and_its_share_of_disks_changes_as_it_runs() {
    let daemon = Daemon::start("");
    daemon.import();
    let file = |guest: &fleet::Guest, name: &str| {
        let path = daemon.group().join(&guest.id).join(name);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    // It has no limits.
    let guest = daemon.guest("web");
    file(&guest, "io.stat");
    run(
        &daemon,
        "modprobe virtio_blk || lsmod | grep -q virtio_blk; until [ -b /dev/vda ]; do sleep 0.1; done",
    );
    // What comes by the host's page cache is counted for whose the file is, and the daemon made it: it becomes the guest's by
    // and by, as that is who writes to it.
    let begin = Instant::now();
    let stats = loop {
        run(&daemon, "dd if=/dev/urandom of=/dev/vda bs=64k count=8 conv=fsync 2> /dev/null");
        let stats = daemon.client().guest_stats("web").unwrap();
        if stats.written_bytes >= 512 << 10 {
            break stats;
        }
        assert!(begin.elapsed() < limits::COMMAND, "{stats:?}, {:?}", file(&guest, "io.stat"));
    };
    let metrics = daemon.client().metrics().unwrap();
    let told = metrics.lines().find_map(|line| {
        line.strip_prefix("berth_guest_written_bytes_total{guest=\"web\"} ")?.parse::<u64>().ok()
    });
    assert!(told >= Some(stats.written_bytes), "{metrics}");

    let limited = |io_weight| fleet::Limits { cpu_percent: Some(50), io_weight, ..fleet::Limits::default() };
    let update = |io_weight| {
        let update = GuestUpdate { limits: Some(limited(io_weight)), ..GuestUpdate::default() };
        daemon.client().update("web", update).unwrap()
    };
    assert_eq!(update(Some(50)).limits, limited(Some(50)));
    assert_eq!(
        (file(&guest, "cpu.max").as_str(), file(&guest, "io.weight").as_str()),
        ("50000 100000\n", "default 50\n")
    );

    // BFQ has a file of its own, and numbers.
    assert!(Command::new("modprobe").arg("bfq").status().unwrap().success());
    update(Some(5050));
    assert_eq!(
        (file(&guest, "io.weight").as_str(), file(&guest, "io.bfq.weight").as_str()),
        ("default 5050\n", "default 550\n")
    );
    update(None);
    assert_eq!(
        (file(&guest, "io.weight").as_str(), file(&guest, "io.bfq.weight").as_str()),
        ("default 100\n", "default 100\n")
    );
    let new = NewGuest { limits: limited(Some(10_000)), ..small("other") };
    let other = daemon.client().create(new).unwrap();
    daemon.client().start("other").unwrap();
    assert_eq!(
        (file(&other, "io.weight").as_str(), file(&other, "io.bfq.weight").as_str()),
        ("default 10000\n", "default 1000\n")
    );
}

/// Has the shell of guest web do this, and fails where it fails.
#[track_caller]
fn run(daemon: &Daemon, script: &str) -> String {
    daemon.exec("web", &["sh", "-ec", script]).text()
}

/// A daemon may be killed between a VMM's answer and the line that writes it down.
#[test]
fn a_guest_that_was_paused_while_no_daemon_is_there_is_known_to_be() {
    let mut daemon = Daemon::start("");
    daemon.import();
    let guest = daemon.guest("web");
    daemon.kill();
    let mut own = GuestClient::connect(&guest.api_socket.unwrap()).unwrap();
    own.apply(&Request::PatchVm(VmState::Paused)).unwrap();
    daemon.run();
    daemon.wait_for("web", State::Paused);
    assert_eq!(daemon.client().resume("web").unwrap().state, State::Running);
    assert_eq!(daemon.exec("web", &["echo", "still"]).text(), "still\n");

    // Nor need the daemon be asked: a guest that its owner has paused goes down when it is stopped.
    own.apply(&Request::PatchVm(VmState::Paused)).unwrap();
    let ended = daemon.client().stop("web", Stop::default()).unwrap();
    assert_eq!(ended.last_end.unwrap().outcome, Outcome::PoweredOff);
}

#[test]
fn a_console_stays_when_its_guest_reboots() {
    let daemon = Daemon::start("");
    daemon.import();
    let before = daemon.guest("web");
    let mut console = daemon.client().console("web").unwrap();
    console.set_read_timeout(Some(limits::COMMAND)).unwrap();
    daemon.say("web", "(sleep 1; reboot -f) &");
    daemon.wait_for_another(&before);
    daemon.exec("web", &["true"]).text();
    console.write_all(b"echo one-$((1 + 1))\n").unwrap();
    hear_until(&mut console, "one-2").unwrap();
}

#[test]
fn a_guest_that_ends_while_no_daemon_is_there_has_ended_when_one_comes() {
    let mut daemon = Daemon::start("");
    daemon.import();
    let nothing = daemon.traces();
    let guest = daemon.guest("web");
    let pid = guest.pid.unwrap();
    daemon.say("web", "(sleep 1; poweroff -f) &");
    daemon.kill();
    let begin = std::time::Instant::now();
    while Path::new(&format!("/proc/{pid}")).exists() {
        assert!(begin.elapsed() < limits::COMMAND, "it does not power off");
        std::thread::sleep(Duration::from_millis(50));
    }
    daemon.run();
    let ended = daemon.wait_for("web", State::Stopped);
    assert_eq!(ended.last_end.unwrap().outcome, Outcome::PoweredOff);
    assert_eq!(daemon.traces(), nothing);
}

#[test]
fn the_owner_drives_the_guest_by_its_own_api() {
    let daemon = Daemon::start("");
    daemon.import();
    let guest = daemon.guest("web");
    let mut client = GuestClient::connect(&guest.api_socket.unwrap()).unwrap();
    assert_eq!(client.instance_info().unwrap().id, guest.id);
    assert_eq!(client.machine_config().unwrap().mem_size_mib, u64::from(guest.memory_mib));
}

#[test]
fn one_user_s_guests_and_images_are_not_another_s() {
    let daemon = Daemon::start("");
    daemon.import();
    daemon.client().create(small("roots")).unwrap();
    // Members of the group reach the socket; nobody else does.
    let ask = |user: &str, group: &str, path: &str| {
        let socket = daemon.path("socket");
        let output = Command::new("setpriv")
            .args([
                "--reuid",
                user,
                "--regid",
                group,
                "--clear-groups",
                "curl",
                "-sS",
                "-m",
                "20",
                "--unix-socket",
            ])
            .arg(socket)
            .arg(format!("http://x{path}"))
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    fs::set_permissions(daemon.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let users = "100";
    assert!(!ask("1000", "1000", "/version").0, "who is not in the group is let in");
    let (is_in, version) = ask("1000", users, "/version");
    assert!(is_in && version.contains("version"), "{version}");
    // A member sees what is everybody's, and not what is root's.
    assert_eq!(ask("1000", users, "/guests").1, r#"{"items":[]}"#);
    assert!(ask("1000", users, "/guests/roots").1.contains("There is no guest"));
    assert!(ask("1000", users, "/guests/roots/logs").1.contains("There is no guest"));
    assert!(ask("1000", users, "/images").1.contains(r#""name":"small""#));
    assert!(!ask("1000", users, "/metrics").1.contains("roots"));
}

#[test]
fn what_cannot_be_is_refused_with_the_reason_and_nothing_is_left() {
    let daemon = Daemon::start("max_guests = 3\nuid_count = 2");
    daemon.import();
    let client = daemon.client();
    let refused = |outcome: Result<fleet::Guest, ClientError>| match outcome {
        Err(ClientError::Refused(fault)) => (fault.status, fault.message),
        other => panic!("{other:?}"),
    };
    let (status, message) = refused(client.create(fleet::NewGuest::of("nothing")));
    assert!(status == 404 && message.contains("There is no image nothing"), "{message}");
    client.create(small("one")).unwrap();
    let (status, message) = refused(client.create(small("one")));
    assert!(status == 409 && message.contains("There is a guest one already"), "{message}");
    client.create(small("two")).unwrap();
    let (status, message) = refused(client.create(small("three")));
    assert!(status == 507 && message.contains("All 2 users of the range"), "{message}");
    let (status, message) = refused(client.pause("one"));
    assert!(status == 409 && message.contains("only one that runs"), "{message}");
    match client.remove_image(IMAGE) {
        Err(ClientError::Refused(fault)) => assert!(fault.message.contains("2 guests boot from"), "{fault}"),
        other => panic!("{other:?}"),
    }

    // A disk that is cut short meanwhile is no disk: the guest does not start, and says why.
    let guest = client.guest("one").unwrap();
    let nothing = daemon.traces();
    fs::remove_file(daemon.path("state/guests").join(&guest.id).join("disk.img")).unwrap();
    let (status, message) = refused(client.start("one"));
    assert!(status == 500 && message.contains("disk") && message.contains("is gone"), "{message}");
    // A kernel that is none: the VMM says so.
    let kernel = daemon.path("state/images/small/kernel");
    fs::write(&kernel, vec![b'x'; kernel.metadata().unwrap().len() as usize]).unwrap();
    let (status, message) = refused(client.start("two"));
    assert!(status == 500 && message.contains("kernel"), "{message}");
    let ended = client.guest("two").unwrap().last_end.unwrap();
    assert_eq!(ended.outcome, Outcome::NotStarted, "{ended:?}");
    assert_eq!(daemon.traces(), nothing);
    client.remove("one", false).unwrap();
    client.remove("two", false).unwrap();
    client.remove_image(IMAGE).unwrap();
}

#[test]
fn a_guest_that_crashes_is_started_again_as_its_policy_says_and_one_that_reboots_always() {
    let daemon = Daemon::start("");
    daemon.import();
    let client = daemon.client();
    let new = fleet::NewGuest { restart: Restart::OnFailure, ..small("phoenix") };
    client.create(new).unwrap();
    let first = client.start("phoenix").unwrap();
    // From outside, as by somebody who wants memory.
    kill(first.pid.unwrap());
    let second = daemon.wait_for_another(&first);
    assert_eq!((second.restarts, second.last_end.as_ref().unwrap().outcome), (1, Outcome::VmmFailed));
    daemon.say("phoenix", "(sleep 1; reboot -f) &");
    let third = daemon.wait_for_another(&second);
    assert_eq!(third.last_end.as_ref().unwrap().outcome, Outcome::Rebooted, "{third:?}");
    // One that powers off is no failure.
    daemon.say("phoenix", "(sleep 1; poweroff -f) &");
    let last = daemon.wait_for("phoenix", State::Stopped);
    assert_eq!(last.last_end.unwrap().outcome, Outcome::PoweredOff);
}

#[test]
fn a_vmm_that_does_not_answer_makes_nobody_wait_but_who_asked_it() {
    let daemon = Daemon::start("");
    daemon.import();
    let guest = daemon.guest("stuck");
    let pid = Pid::from_raw(guest.pid.unwrap() as i32).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let client = daemon.client();
    let asks = std::thread::spawn(move || client.pause("stuck"));
    // Meanwhile others are served.
    assert_eq!(daemon.client().guest("stuck").unwrap().state, State::Running);
    daemon.guest("other");
    match asks.join().unwrap() {
        Err(ClientError::Refused(fault)) => {
            assert!(fault.status == 504 && fault.message.contains("does not answer"), "{fault}");
        }
        other => panic!("{other:?}"),
    }
    let ended = daemon.client().stop("stuck", Stop { seconds: 1 }).unwrap();
    assert_eq!(ended.last_end.unwrap().outcome, Outcome::Ended);
}

fn kill(pid: u32) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
}
