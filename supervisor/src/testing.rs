//! What unit tests need of a daemon: one with places of its own, and guests in any state. It is not root's and has no jailer.

use std::os::unix::fs::symlink;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use api_socket::fleet::NewGuest;
use tempfile::TempDir;

use crate::config::Config;
use crate::fleet::Fleet;
use crate::guest::Guest;
use crate::process::Held;
use crate::record::Record;

pub const ID: &str = "0123456789ab";

/// A daemon without guests.
pub fn fleet() -> (TempDir, Arc<Fleet>) {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name);
    let mut config = Config {
        state_dir: path("state"),
        run_dir: path("run"),
        control_group: "berth-unit-tests".into(),
        ..Config::default()
    };
    config.programs.jailer = path("jailer");
    let fleet = Fleet::new(config).unwrap();
    (place, fleet)
}

/// From now on the daemon's jailer finds nothing in the way.
pub fn provide_jailer(fleet: &Fleet) {
    symlink("/bin/true", &fleet.config.programs.jailer).unwrap();
}

/// A guest whose record is on the disk.
pub fn guest(fleet: &Fleet, id: &str, change: impl FnOnce(&mut Record)) -> Arc<Guest> {
    let mut record = Record::new(id.into(), "web".into(), 1000, 70_000, None, 1.5, NewGuest::of("debian"));
    change(&mut record);
    std::fs::create_dir(fleet.store.directory(id)).unwrap();
    fleet.store.save(&record).unwrap();
    let guest = Arc::new(Guest::new(&fleet.config, &fleet.store, record));
    guest.lock().is_made = true;
    fleet.insert(guest.clone());
    guest
}

/// A process that only ends when it is killed.
pub fn process() -> (Child, Arc<Held>) {
    let child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let held = Arc::new(Held::of_pid(child.id()).unwrap());
    (child, held)
}
