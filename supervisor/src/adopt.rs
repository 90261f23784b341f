//! The daemon's start: what is written down meets what is there. A guest that runs is taken on as it is; one whose process is
//! gone has ended; nothing that belongs to nobody stays.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api_socket::fleet::{DEFAULT_STOP_SECONDS, Outcome, Restart};

use crate::fleet::Fleet;
use crate::guest::Guest;
use crate::process::{self, Held};
use crate::record::Record;
use crate::spawn;
use crate::state::{Event, State};

/// Takes on everything. Before the first client is heard.
///
/// # Errors
/// The records cannot be listed.
pub fn all(fleet: &Arc<Fleet>) -> std::io::Result<()> {
    fleet.tidy();
    let found = fleet.store.load()?;
    for path in found.unfinished {
        if let Err(error) = fs::remove_dir_all(&path) {
            log::warn!("{} is half a guest and cannot be removed: {error}", path.display());
        }
    }
    for (path, why) in &found.broken {
        log::error!("{} is no record of a guest and is left alone: {why}", path.display());
    }
    let boot_id = process::boot_id()?;
    let mut works = Vec::new();
    for record in found.records {
        let guest = Arc::new(Guest::new(&fleet.config, &fleet.store, record.clone()));
        guest.lock().is_made = true;
        fleet.insert(guest.clone());
        works.push((guest, record));
    }
    // When all are there: a start by policy must not be given what another has.
    for (guest, record) in works {
        take(fleet, &guest, &record, &boot_id);
    }
    remove_strays(fleet);
    Ok(())
}

fn take(fleet: &Arc<Fleet>, guest: &Arc<Guest>, record: &Record, boot_id: &str) {
    match record.state {
        State::Stopped => {}
        State::Waiting => {
            // The clock may have been set meanwhile; no wait is longer than it was.
            let left = record.restart_at.map_or(0.0, |at| at - crate::events::now()).clamp(0.0, 60.0);
            let due = Instant::now() + Duration::from_secs_f64(left);
            guest.lock().due = Some(due);
            fleet.watch.time(&guest.id, Some(due));
        }
        state => match find(guest, record, boot_id) {
            Some(held) => take_on(fleet, guest, state, held),
            None => was_lost(fleet, guest, record, boot_id),
        },
    }
}

/// The guest's process: the one that is written down, or, when the daemon was killed before it wrote one down, the one in the
/// guest's group. One that is in neither was still the jailer's, and died with the daemon.
fn find(guest: &Guest, record: &Record, boot_id: &str) -> Option<Held> {
    match &record.process {
        Some(process) => Held::of_record(process).filter(|held| held.process.boot_id == boot_id),
        None => guest.places.processes().into_iter().find_map(|pid| Held::of_pid(pid).ok()),
    }
}

fn take_on(fleet: &Arc<Fleet>, guest: &Arc<Guest>, state: State, held: Held) {
    let held = Arc::new(held);
    match (spawn::console(&guest.places), spawn::log(&guest.places)) {
        (Ok(console), Ok(log)) => {
            guest.console.connect(console);
            guest.log.connect(log);
        }
        (Err(error), _) | (_, Err(error)) => {
            log::warn!("Guest {} runs, and its console is lost: {error}", guest.name);
        }
    }
    {
        let mut inner = guest.lock();
        let mut record = inner.record.clone();
        record.process = Some(held.process.clone());
        inner.held = Some(held.clone());
        inner.started = Some(Instant::now());
        if record != inner.record {
            let _ = fleet.save(&mut inner, record, true);
        }
    }
    fleet.watch_guest(guest, &held);
    match state {
        State::Starting | State::StartingAgain => {
            let (fleet, guest) = (fleet.clone(), guest.clone());
            fleet.clone().workers.put(move || fleet.wait_for_answer(&guest, &held));
        }
        // How much time it had left is not known: it has all of it once more.
        State::Stopping => {
            let overdue = Instant::now() + Duration::from_secs(DEFAULT_STOP_SECONDS.into());
            guest.lock().overdue = Some(overdue);
            fleet.watch.time(&guest.id, Some(overdue));
        }
        State::Removing => {
            if let Ok(action) = fleet.apply(guest, Event::Kill) {
                fleet.see_to(guest, action);
            }
        }
        _ => {}
    }
}

/// Its process has ended while nobody watched, or the whole host has.
fn was_lost(fleet: &Arc<Fleet>, guest: &Arc<Guest>, record: &Record, boot_id: &str) {
    let has_rebooted = record.process.as_ref().is_some_and(|process| process.boot_id != boot_id);
    let (outcome, reason) = match has_rebooted {
        true => (Outcome::Lost, "the host went down while it ran".to_owned()),
        false => crate::operations::ended_unseen(guest),
    };
    if has_rebooted && record.restart == Restart::Always {
        log::info!("Guest {} is started again after the host", guest.name);
    }
    let (fleet, guest) = (fleet.clone(), guest.clone());
    fleet.clone().workers.put(move || {
        if let Err(error) = guest.places.clear(&fleet.config) {
            log::error!("What guest {} has left cannot be removed: {error}", guest.name);
        }
        fleet.has_ended(&guest, outcome, reason);
    });
}

/// Cells, groups and sockets of no guest: of one that was removed while the daemon was killed.
fn remove_strays(fleet: &Arc<Fleet>) {
    let config = &fleet.config;
    let program = config.programs.vmm.file_name().unwrap_or_default();
    let places = [
        config.run_dir.join("guests"),
        crate::cell::cells(config).join(program),
        Path::new("/sys/fs/cgroup").join(&config.control_group),
    ];
    for directory in places {
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.path().is_dir()) {
            let name = entry.file_name();
            let Some(id) = name.to_str().filter(|name| is_id(name)) else { continue };
            if fleet.by_id(id).is_some() || has_broken_record(fleet, id) {
                continue;
            }
            log::warn!("{} belongs to no guest and is removed", entry.path().display());
            if let Err(error) = crate::cell::Places::new(config, id).clear(config) {
                log::warn!("{} cannot be removed: {error}", entry.path().display());
            }
        }
    }
}

/// A guest whose record cannot be read may run: it is left alone until a person has looked.
fn has_broken_record(fleet: &Fleet, id: &str) -> bool {
    fleet.store.directory(id).exists()
}

fn is_id(name: &str) -> bool {
    name.len() == crate::store::ID_LENGTH && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}
