//! Commands that change guests. What is legal when is berthd's to know.

use api_socket::fleet::{self, Client, GuestUpdate, NewGuest, Restart as Policy};

use crate::args::value::Disk;
use crate::args::{
    Create, Grace, Guest, Limits, Pause, Restart, RestartPolicy, Resume, Rm, Set, Start, Stop,
};
use crate::daemon::{About, each};
use crate::error::{Error, Result};
use crate::exit::Exit;
use crate::output::{self, progress::Progress};
use crate::signals::{Signals, Work};

/// What berthd is asked for.
pub fn new_guest(guest: &Guest, image: &str) -> NewGuest {
    let defaults = NewGuest::of(image);
    NewGuest {
        name: guest.name.as_ref().map(ToString::to_string),
        cpus: guest.cpus.unwrap_or(defaults.cpus),
        memory_mib: guest.memory.map_or(defaults.memory_mib, |memory| memory.mib),
        max_memory_mib: guest.max_memory.map(|memory| memory.mib),
        disks: disks(&guest.disk),
        command_line: guest.cmdline.clone(),
        network: !guest.no_network,
        restart: guest.restart.map_or(defaults.restart, policy),
        limits: changed(fleet::Limits::default(), &guest.limits),
        ..defaults
    }
}

/// Makes a guest, or gives the signal that came first: then nothing of it is left.
///
/// # Errors
/// berthd refuses or is not there.
pub fn make(
    daemon: &Client,
    new: NewGuest,
    signals: &Signals,
) -> Result<std::result::Result<fleet::Guest, i32>> {
    let (client, image) = (daemon.clone(), new.image.clone());
    match Work::begin(move || client.create(new)).wait(signals) {
        Ok(made) => made.about(&image).map(Ok),
        Err((signal, making)) => {
            // It comes to be all the same, and nothing has run in it that could be lost. Who does not want to wait leaves it.
            if let Ok(Ok(made)) = making.wait(signals) {
                let _ = daemon.remove(&made.id, true);
            }
            Ok(Err(signal))
        }
    }
}

/// # Errors
/// As for [`make`].
pub fn create(daemon: &Client, args: &Create) -> Result<Exit> {
    let image = args.image.as_str();
    let signals = Signals::take().map_err(|error| Error::new("signals", error))?;
    // Its disk may have to be copied.
    let waiting = Progress::waiting(&format!("making a guest from {image}"));
    let made = make(daemon, new_guest(&args.guest, image), &signals)?;
    drop(waiting);
    match made {
        Ok(guest) => output::print(&format!("{}\n", guest.id)).map(|()| Exit::Ok),
        Err(signal) => Ok(Exit::signal(signal)),
    }
}

/// # Errors
/// As for [`make`].
pub fn start(daemon: &Client, args: &Start) -> Result<Exit> {
    each(&args.guests, |guest| daemon.start(guest).about(guest).map(drop))
}

/// # Errors
/// As for [`make`].
pub fn stop(daemon: &Client, args: &Stop) -> Result<Exit> {
    each(&args.guests, |guest| daemon.stop(guest, grace(&args.grace)).about(guest).map(drop))
}

/// # Errors
/// As for [`make`].
pub fn restart(daemon: &Client, args: &Restart) -> Result<Exit> {
    each(&args.guests, |guest| {
        // One that is not running is started, as its user wants it to run.
        let now = daemon.guest(guest).about(guest)?;
        if now.state != fleet::State::Stopped {
            if now.remove_when_ended {
                let why = "was made with --rm: a stop removes it with its disk, and nothing is left to start";
                return Err(Error::new(guest, why).remedy(format!("reboot it: berth exec {guest} -- reboot")));
            }
            daemon.stop(guest, grace(&args.grace)).about(guest)?;
        }
        daemon.start(guest).about(guest).map(drop)
    })
}

/// # Errors
/// As for [`make`].
pub fn rm(daemon: &Client, args: &Rm) -> Result<Exit> {
    each(&args.guests, |guest| daemon.remove(guest, args.force).about(guest))
}

/// # Errors
/// As for [`make`].
pub fn pause(daemon: &Client, args: &Pause) -> Result<Exit> {
    each(&args.guests, |guest| daemon.pause(guest).about(guest).map(drop))
}

/// # Errors
/// As for [`make`].
pub fn resume(daemon: &Client, args: &Resume) -> Result<Exit> {
    each(&args.guests, |guest| daemon.resume(guest).about(guest).map(drop))
}

/// # Errors
/// As for [`make`].
pub fn set(daemon: &Client, args: &Set) -> Result<Exit> {
    let guest = args.guest.as_str();
    // Limits are replaced as a whole: what is not said stays as it is.
    let limits = match says_something(&args.limits) {
        true => Some(changed(daemon.guest(guest).about(guest)?.limits, &args.limits)),
        false => None,
    };
    let update = GuestUpdate {
        cpus: args.cpus,
        memory_mib: args.memory.map(|memory| memory.mib),
        max_memory_mib: args.max_memory.map(|memory| memory.mib),
        remove_disks: args.remove_disk.clone(),
        add_disks: disks(&args.add_disk),
        restart: args.restart.map(policy),
        limits,
    };
    daemon.update(guest, update).about(guest).map(|_| Exit::Ok)
}

fn grace(grace: &Grace) -> fleet::Stop {
    grace.time.map_or_else(fleet::Stop::default, |seconds| fleet::Stop { seconds })
}

fn disks(disks: &[Disk]) -> Vec<fleet::Disk> {
    disks.iter().map(|disk| fleet::Disk { name: disk.name.clone(), size_mib: disk.mib }).collect()
}

fn policy(policy: RestartPolicy) -> Policy {
    match policy {
        RestartPolicy::No => Policy::No,
        RestartPolicy::OnFailure => Policy::OnFailure,
        RestartPolicy::Always => Policy::Always,
    }
}

fn says_something(limits: &Limits) -> bool {
    limits.cpu_limit.is_some() || limits.cpu_weight.is_some() || limits.io_weight.is_some()
}

/// What is said changes a limit, and 0 takes it away.
fn changed(before: fleet::Limits, said: &Limits) -> fleet::Limits {
    let one = |before: Option<u32>, said: Option<u32>| match said {
        None => before,
        Some(0) => None,
        Some(limit) => Some(limit),
    };
    fleet::Limits {
        cpu_percent: one(before.cpu_percent, said.cpu_limit),
        cpu_weight: one(before.cpu_weight, said.cpu_weight),
        io_weight: one(before.io_weight, said.io_weight),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    fn created(line: &str) -> NewGuest {
        match Cli::try_parse_from(line.split_whitespace()).unwrap().command {
            Command::Create(create) => new_guest(&create.guest, create.image.as_str()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_not_said_is_the_apis_default() {
        assert_eq!(created("berth create debian"), NewGuest::of("debian"));
    }

    #[test]
    fn what_is_said_is_asked_for() {
        let line = "berth create --name web --cpus 2 --memory 1G --max-memory 2G --disk data=10G --cmdline quiet --no-network --restart on-failure \
                    --cpu-limit 150 --cpu-weight 10 --io-weight 20 debian";
        let expected = NewGuest {
            name: Some("web".into()),
            image: "debian".into(),
            cpus: 2,
            memory_mib: 1024,
            max_memory_mib: Some(2048),
            disks: vec![fleet::Disk { name: "data".into(), size_mib: 10 << 10 }],
            command_line: Some("quiet".into()),
            network: false,
            restart: Policy::OnFailure,
            limits: fleet::Limits { cpu_percent: Some(150), cpu_weight: Some(10), io_weight: Some(20) },
            remove_when_ended: false,
        };
        assert_eq!(created(line), expected);
    }

    #[test]
    fn a_limit_that_is_said_changes_0_takes_it_away_and_the_others_stay() {
        let before = fleet::Limits { cpu_percent: Some(50), cpu_weight: Some(10), io_weight: None };
        let said = Limits { cpu_limit: Some(0), cpu_weight: None, io_weight: Some(7) };
        let after = fleet::Limits { cpu_percent: None, cpu_weight: Some(10), io_weight: Some(7) };
        assert_eq!(changed(before, &said), after);
        assert!(says_something(&said) && !says_something(&Limits::default()));
    }
}
