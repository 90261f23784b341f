//! All guests, and the one way in which one of them changes.
//!
//! Locks: with a guest's in hand the list's may be taken, never the other way round.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use api_socket::Fault;
use api_socket::fleet::{Image, NewGuest, Part, ROOT_DISK};

use crate::config::Config;
use crate::events::{Events, now};
use crate::guest::Guest;
use crate::images::{Images, disk_fault};
use crate::network::Network;
use crate::record::Record;
use crate::state::{self, Action, Event, State};
use crate::store::{Claimed, ID_LENGTH, Store};
use crate::watch::Watch;
use crate::workers::{Gate, Workers};
use crate::{cell, change, spawn};

/// Who asks: a user by number, as the kernel tells it.
pub type User = u32;
const ROOT: User = 0;
/// Processes that are made at the same time: each takes some tens of milliseconds of the disk's and the kernel's time.
const STARTS: usize = 8;
/// How long a daemon waits for another to let go of its directory: one that was killed may have a child that is not yet another
/// program.
const LOCK: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(20);
/// How often what the disk has refused is written again.
const WRITE_AGAIN: Duration = Duration::from_secs(5);

/// Everything there is.
pub struct Fleet {
    pub config: Config,
    pub store: Store,
    pub images: Images,
    pub network: Network,
    pub events: Events,
    /// How many processes are made at the same time.
    pub starts: Gate,
    /// For what follows an end, and for times that have come.
    pub ends: Workers,
    pub watch: Watch,
    guests: Mutex<BTreeMap<String, Arc<Guest>>>,
    /// Before all other locks.
    counting: Mutex<()>,
    /// Of guests whose records are not understood: nobody else gets it. Set once, at the start.
    claimed: OnceLock<Vec<Claimed>>,
    /// There is a thread that writes down what the disk has refused.
    is_writing: AtomicBool,
    me: Weak<Fleet>,
    /// As long as it is open and locked, no other daemon keeps guests here.
    _lock: File,
}

impl Fleet {
    /// Without guests. Makes directories.
    ///
    /// # Errors
    /// What the host lacks.
    pub fn new(config: Config) -> io::Result<Arc<Fleet>> {
        cell::make_private_directory(&config.state_dir, 0o711)?;
        let lock = lock(&config.state_dir)?;
        for directory in [config.run_dir.join("guests"), cell::cells(&config)] {
            cell::make_private_directory(&directory, 0o711)?;
        }
        let store = Store::open(&config.state_dir)?;
        let images = Images::open(&config.state_dir, config.programs.agent.clone())?;
        let (ends, watch) = (Workers::start("end")?, Watch::new()?);
        Ok(Arc::new_cyclic(|me| Fleet {
            store,
            images,
            network: Network::new(config.network.clone()),
            events: Events::default(),
            starts: Gate::new(STARTS),
            ends,
            watch,
            guests: Mutex::default(),
            counting: Mutex::default(),
            claimed: OnceLock::new(),
            is_writing: AtomicBool::new(false),
            me: me.clone(),
            _lock: lock,
            config,
        }))
    }

    /// All that this user is told of, by name.
    pub fn list(&self, user: User) -> Vec<Arc<Guest>> {
        let mut guests: Vec<_> = self.guests().values().filter(|guest| may(user, guest)).cloned().collect();
        guests.sort_by(|a, b| a.name.cmp(&b.name));
        guests
    }

    /// The guest of this id.
    pub fn by_id(&self, id: &str) -> Option<Arc<Guest>> {
        self.guests().get(id).cloned()
    }

    /// The guest that a user calls so: by name, id, or the beginning of an id.
    ///
    /// # Errors
    /// 404, also for another's guest; 409 if it is not clear which.
    pub fn find(&self, user: User, called: &str) -> Result<Arc<Guest>, Fault> {
        let guests = self.list(user);
        if let Some(guest) = guests.iter().find(|guest| guest.name == called || guest.id == called) {
            return Ok(guest.clone());
        }
        let begin: Vec<_> = guests.iter().filter(|guest| guest.id.starts_with(called)).collect();
        match begin[..] {
            [guest] => Ok(guest.clone()),
            [] => Err(Fault {
                status: 404,
                message: format!("There is no guest {called:?}; `berth ps --all` lists yours."),
            }),
            _ => Err(Fault {
                status: 409,
                message: format!(
                    "{} guests have ids that begin with {called:?}; give more of it.",
                    begin.len()
                ),
            }),
        }
    }

    /// At the start: what nobody else is to get.
    pub fn set_claimed(&self, claimed: Vec<Claimed>) {
        // Twice would be a second start.
        let _ = self.claimed.set(claimed);
    }

    fn claimed(&self) -> &[Claimed] {
        self.claimed.get().map(Vec::as_slice).unwrap_or_default()
    }

    /// Adds a guest that was found at the start.
    pub fn insert(&self, guest: Arc<Guest>) {
        self.guests().insert(guest.id.clone(), guest);
    }

    /// Makes a guest, which then is stopped.
    ///
    /// # Errors
    /// The name is taken, there is no such image, no place for one more, or the disk fails.
    pub fn create(&self, user: User, new: NewGuest) -> Result<Arc<Guest>, Fault> {
        let memory = new.memory_mib;
        if let Some(most) = new.max_memory_mib.filter(|most| *most < memory) {
            return Err(Fault::bad_request(format!(
                "`max_memory_mib` is {most} and `memory_mib` {memory}; it cannot be less."
            )));
        }
        let guest = {
            // From here on the guest is counted, and its image stays.
            let _images = self.images_are_counted();
            let kept = self.images.find(&new.image, user)?;
            self.images.check_whole(&new.image, &kept, &Part::ALL)?;
            self.reserve(user, new)?
        };
        let make = || -> Result<(), Fault> {
            let directory = self.store.begin(&guest.id);
            let mut record = guest.lock().record.clone();
            let failed = |error: io::Error| disk_fault(&format!("Guest {}", guest.name), &error);
            cell::make_private_directory(&directory, 0o700).map_err(failed)?;
            self.images.copy_disk(&record.image, &directory.join(spawn::disk_file(ROOT_DISK)))?;
            for disk in &record.disks {
                change::make_disk(&directory, disk).map_err(failed)?;
            }
            let root = directory.join(spawn::disk_file(ROOT_DISK)).metadata().map_err(failed)?;
            record.root_bytes = Some(root.len());
            self.store.finish(&record).map_err(failed)?;
            guest.lock().record = record;
            Ok(())
        };
        if let Err(fault) = make() {
            let _ = fs::remove_dir_all(self.store.begin(&guest.id));
            let _ = self.store.remove(&guest.id);
            self.guests().remove(&guest.id);
            return Err(fault);
        }
        guest.lock().is_made = true;
        self.events.tell("created", guest.owner, &guest.id, &guest.name, None);
        Ok(guest)
    }

    /// A place in the list, with a name, a user and an address that no other guest has. Nobody may do anything with it yet.
    fn reserve(&self, owner: User, new: NewGuest) -> Result<Arc<Guest>, Fault> {
        let config = &self.config;
        let full = |what: String| Fault { status: 507, message: what };
        let mut guests = self.guests();
        if guests.len() >= config.max_guests as usize {
            return Err(full(format!(
                "There are as many guests as max_guests, {}; remove one, or allow more in the configuration.",
                guests.len()
            )));
        }
        let id = free_id(&guests).map_err(|error| full(format!("No id can be made: {error}.")))?;
        let name = new.name.clone().unwrap_or_else(|| format!("guest-{}", id.get(..6).unwrap_or(&id)));
        let is_claimed = self.claimed().iter().any(|claimed| claimed.name.as_ref() == Some(&name));
        if is_claimed || guests.values().any(|guest| guest.name == name || guest.id == name) {
            let message = format!("There is a guest {name} already; remove it, or give another name.");
            return Err(Fault { status: 409, message });
        }
        let mut uids: BTreeSet<_> = guests.values().map(|guest| guest.uid).collect();
        uids.extend(self.claimed().iter().filter_map(|claimed| claimed.uid));
        let uid = (config.uid_first..config.uid_first.saturating_add(config.uid_count))
            .find(|uid| !uids.contains(uid));
        let uid = uid.ok_or_else(|| {
            full(format!("All {} users of the range are guests'; widen uid_count.", config.uid_count))
        })?;
        let address = match new.network {
            true => Some(self.free_address(&guests).ok_or_else(|| {
                full(format!(
                    "All addresses of {}/{} are guests'; remove one, make this one without a network, or widen \
                     network.prefix.",
                    config.network.address, config.network.prefix
                ))
            })?),
            false => None,
        };
        let record = Record::new(id.clone(), name, owner, uid, address, now(), new);
        let guest = Arc::new(Guest::new(config, &self.store, record));
        guests.insert(id, guest.clone());
        Ok(guest)
    }

    fn free_address(&self, guests: &BTreeMap<String, Arc<Guest>>) -> Option<std::net::Ipv4Addr> {
        let mut taken: BTreeSet<_> = guests.values().filter_map(|guest| guest.address).collect();
        taken.extend(self.claimed().iter().filter_map(|claimed| claimed.address));
        let all = self.config.network.guests().map(std::net::Ipv4Addr::from_bits);
        { all }.find(|address| *address != self.config.network.address && !taken.contains(address))
    }

    /// Something happens to a guest: its state, its record and everybody who listens learn of it, or nothing changes. What is
    /// to be done is returned, and is the caller's to see to.
    ///
    /// # Errors
    /// 409 if it cannot be now; 507 if it cannot be written down. What has happened already is never refused.
    pub fn apply(&self, guest: &Guest, event: Event) -> Result<Action, Fault> {
        self.apply_to_run(guest, event).map(|(action, _)| action)
    }

    /// The same, with how often the guest had ended then, which tells one of its runs from the next.
    ///
    /// # Errors
    /// As for [`apply`](Fleet::apply).
    pub fn apply_to_run(&self, guest: &Guest, event: Event) -> Result<(Action, u64), Fault> {
        let mut inner = guest.lock();
        let mut record = inner.record.clone();
        let before = record.state;
        if matches!(event, Event::Ended(_)) && inner.started.is_some_and(|at| at.elapsed() >= state::LONG_RUN)
        {
            record.streak = 0;
        }
        let (then, action) = state::next(before, event, record.policy())
            .map_err(|why| Fault { status: 409, message: format!("Guest {} is {}.", guest.name, why.0) })?;
        inner.check_made(&guest.name)?;
        record.state = then;
        if action == Action::Start {
            record.started_memory_mib = None;
        }
        match (event, action) {
            (Event::Start, Action::Start) => (record.restarts, record.streak) = (0, 0),
            (_, Action::Start) if event == Event::Due => {
                record.restarts = record.restarts.saturating_add(1);
                record.streak = record.streak.saturating_add(1);
            }
            // A reboot, which does not wait.
            (Event::Ended(_), Action::Start) => record.streak = record.streak.saturating_add(1),
            _ => {}
        }
        if then != State::Waiting {
            record.restart_at = None;
        }
        if !then.has_process() || action == Action::Start {
            record.process = None;
        }
        if let Action::Wait(time) = action {
            record.restart_at = Some(now() + time.as_secs_f64());
            inner.due = Some(Instant::now() + time);
            self.watch.time(&guest.id, inner.due);
        }
        if record != inner.record {
            // Nothing is made that is not written down. What makes things go away needs no room: a full disk must not keep it.
            self.save(&mut inner, record, event != Event::Start)?;
        }
        inner.ends += u64::from(matches!(event, Event::Ended(_)));
        let ends = inner.ends;
        drop(inner);
        if then != before {
            self.events.tell(then.on_the_wire().as_str(), guest.owner, &guest.id, &guest.name, None);
        }
        guest.changed();
        Ok((action, ends))
    }

    /// Writes a record down and takes it on. What is so already is taken on also if the disk refuses it, and written down when
    /// the disk takes it again.
    ///
    /// # Errors
    /// 507
    pub fn save(&self, inner: &mut crate::guest::Inner, record: Record, is_so: bool) -> Result<(), Fault> {
        match self.store.save(&record) {
            Err(error) if !is_so => {
                return Err(disk_fault(&format!("The record of guest {}", record.name), &error));
            }
            Err(error) => {
                log::error!("The record of guest {} cannot be written: {error}", record.name);
                inner.is_unwritten = true;
                self.write_again();
            }
            Ok(()) => inner.is_unwritten = false,
        }
        inner.record = record;
        Ok(())
    }

    /// On a thread that lives until all is written down.
    fn write_again(&self) {
        let Some(fleet) = self.me.upgrade().filter(|fleet| !fleet.is_writing.swap(true, Ordering::SeqCst))
        else {
            return;
        };
        let write = move || {
            loop {
                thread::sleep(WRITE_AGAIN);
                let left = fleet.list(ROOT).into_iter().filter(|guest| {
                    let mut inner = guest.lock();
                    inner.is_unwritten = inner.is_unwritten && fleet.store.save(&inner.record).is_err();
                    inner.is_unwritten
                });
                if left.count() == 0 {
                    fleet.is_writing.store(false, Ordering::SeqCst);
                    // One that was refused between the two looks.
                    let is_left = fleet.list(ROOT).iter().any(|guest| guest.lock().is_unwritten);
                    return if is_left {
                        fleet.write_again()
                    };
                }
            }
        };
        if let Err(error) = thread::Builder::new().name("writes again".into()).spawn(write) {
            log::error!("Nobody writes down what the disk has refused: {error}");
            self.is_writing.store(false, Ordering::SeqCst);
        }
    }

    /// Nothing is left of a guest, and nobody finds it any more.
    pub fn forget(&self, guest: &Guest) {
        if let Err(error) = guest.places.clear(&self.config).and_then(|()| self.store.remove(&guest.id)) {
            // It is still there for `rm --force`, and for the next start of the daemon.
            log::error!("Guest {} cannot be removed: {error}", guest.name);
            let mut inner = guest.lock();
            (inner.why_ended, inner.is_left) = (Some(error.to_string()), true);
            drop(inner);
            guest.changed();
            return;
        }
        guest.console.end();
        guest.log.end();
        self.watch.time(&guest.id, None);
        self.guests().remove(&guest.id);
        self.events.tell("removed", guest.owner, &guest.id, &guest.name, None);
        guest.changed();
    }

    /// The images, with how many guests each has.
    ///
    /// # Errors
    /// Those of the directory.
    pub fn images(&self, user: User) -> Result<Vec<Image>, Fault> {
        let mut images = self.images.list(user).map_err(|error| disk_fault("The list of images", &error))?;
        let guests = self.list(ROOT);
        for image in &mut images {
            image.guests = count(&guests, &image.name);
        }
        Ok(images)
    }

    /// One image.
    ///
    /// # Errors
    /// 404
    pub fn image(&self, user: User, name: &str) -> Result<Image, Fault> {
        let mut image = self.images.get(name, user)?;
        image.guests = count(&self.list(ROOT), name);
        Ok(image)
    }

    /// Removes an image that no guest needs.
    ///
    /// # Errors
    /// 404, 403, 409
    pub fn remove_image(&self, user: User, name: &str) -> Result<(), Fault> {
        let _images = self.images_are_counted();
        let guests = self.image(user, name)?.guests;
        if guests > 0 {
            let those =
                if guests == 1 { "1 guest boots".to_owned() } else { format!("{guests} guests boot") };
            let message = format!("{those} from the kernel of image {name}; remove what needs it first.");
            return Err(Fault { status: 409, message });
        }
        self.images.remove(name, user)
    }

    /// Nobody removes an image while somebody makes a guest of it, nor the other way round.
    fn images_are_counted(&self) -> MutexGuard<'_, ()> {
        self.counting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes what was left half made, and warns of what cannot be read.
    pub fn tidy(&self) {
        if let Err(error) = self.images.remove_unfinished() {
            log::warn!("What is left of imports cannot be removed: {error}");
        }
    }

    fn guests(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Guest>>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Before anything else is done there: two that keep the same guests would end each other's.
fn lock(state_dir: &Path) -> io::Result<File> {
    let path = state_dir.join("lock");
    // Nobody else may open it: whoever can may lock it.
    let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path)?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    let begin = Instant::now();
    loop {
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if begin.elapsed() < LOCK => thread::sleep(LOCK_PAUSE),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let message = format!("another berthd keeps its guests in {}", state_dir.display());
                return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// A guest is its maker's, and root's.
fn may(user: User, guest: &Guest) -> bool {
    user == ROOT || user == guest.owner
}

fn count(guests: &[Arc<Guest>], image: &str) -> u32 {
    guests.iter().filter(|guest| guest.lock().record.image == image).count() as u32
}

fn free_id(guests: &BTreeMap<String, Arc<Guest>>) -> io::Result<String> {
    let mut random = fs::File::open("/dev/urandom")?;
    loop {
        let mut bytes = [0; ID_LENGTH / 2];
        random.read_exact(&mut bytes)?;
        let id: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        if !guests.contains_key(&id) {
            return Ok(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, ID};

    #[test]
    fn what_may_be_of_a_guest_that_is_not_understood_nobody_else_gets() {
        let (_place, fleet) = testing::fleet();
        let directory = fleet.store.directory(ID);
        fs::create_dir(&directory).unwrap();
        let (uid, address) = (fleet.config.uid_first, "10.87.0.2");
        let newer = format!(r#"{{"format":2,"name":"web","uid":{uid},"address":"{address}","state":{{}}}}"#);
        fs::write(directory.join("guest.json"), newer).unwrap();
        crate::adopt::all(&fleet).unwrap();
        assert!(fleet.list(ROOT).is_empty() && directory.join("guest.json").exists());
        let named = |name: &str| NewGuest { name: Some(name.into()), ..NewGuest::of("debian") };
        assert_eq!(fleet.reserve(1000, named("web")).unwrap_err().status, 409);
        let less = NewGuest { max_memory_mib: Some(511), ..named("less") };
        assert!(fleet.create(1000, less).unwrap_err().message.contains("`max_memory_mib` is 511"));
        let guest = fleet.reserve(1000, named("other")).unwrap();
        assert_eq!((guest.uid, guest.address.unwrap().to_string()), (uid + 1, "10.87.0.3".into()));
    }
}
