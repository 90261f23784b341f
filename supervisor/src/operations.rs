//! What is done to guests: starting, asking to go down, ending, pausing; and what is to be done when one has ended.
//!
//! Each runs on its caller's thread: a client's, or a worker's. None runs on the loop's, which waits for nobody.

use std::io::Read;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use api_socket::fleet::{End, Outcome, Stop};
use api_socket::{ClientError, Fault, InstanceState, VmState};
use rustix::process::Signal;
use serde::Deserialize;

use crate::events::now;
use crate::fleet::Fleet;
use crate::guest::{Guest, Inner};
use crate::process::{self, Held, Status};
use crate::record::Record;
use crate::state::{Action, Event, State};
use crate::watch::Kind;
use crate::{spawn, usage, vmm_api};

/// How long a VMM may take from its start to an answer; a jailer that hangs is ended then.
const START: Duration = Duration::from_secs(60);
/// Between two looks whether it answers.
const START_PAUSE: Duration = Duration::from_millis(5);
/// How often the agent of a guest that goes down is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// After a process was killed, how long its client waits for all to be cleared away.
const CLEARING: Duration = Duration::from_secs(60);
/// What is kept of why a guest ended, in bytes: a sentence or a few. It becomes part of the record, which has a longest too.
const MAX_REASON: usize = 1024;
/// The longest text of how a process ended, in bytes.
const MAX_EXIT_STATUS: u64 = 4096;

/// What a VMM writes about its end (docs/vmm.md, `--exit-status`).
#[derive(Debug, Deserialize)]
struct ExitStatus {
    exit_code: i32,
    reason: String,
}

impl Fleet {
    /// Sees to what follows from a change, on a worker's thread where it takes long.
    pub fn see_to(self: &Arc<Fleet>, guest: &Arc<Guest>, action: Action) {
        match action {
            Action::Nothing | Action::Wait(_) => {}
            Action::Start => {
                self.start_aside(guest, Fleet::start);
            }
            // Only a client asks, and stays with it: see `stop_and_wait`.
            Action::AskToGoDown => {}
            Action::Kill => kill(guest),
            Action::Forget => {
                let (fleet, guest) = (self.clone(), guest.clone());
                self.ends.put(move || fleet.forget(&guest));
            }
        }
    }

    /// Somebody wants the guest to run. Returns when it does.
    ///
    /// # Errors
    /// 409 if it cannot be now; 500 and why, if it does not.
    pub fn start_and_wait(self: &Arc<Fleet>, guest: &Arc<Guest>) -> Result<(), Fault> {
        if self.apply(guest, Event::Start)? == Action::Start {
            self.start(guest);
        }
        let is_starting =
            |inner: &Inner| matches!(inner.record.state, State::Starting | State::StartingAgain);
        guest.wait(START + CLEARING, |inner| !is_starting(inner));
        let inner = guest.lock();
        match (inner.record.state, &inner.record.last_end) {
            (State::Running | State::Paused | State::Stopping, _) => Ok(()),
            (_, Some(end)) => Err(Fault {
                status: 500,
                message: format!("Guest {} does not start: {}", guest.name, sentence(&end.reason)),
            }),
            _ => Err(Fault { status: 500, message: format!("Guest {} does not start.", guest.name) }),
        }
    }

    /// On a thread of its own: one whose VMM does not answer holds up no other.
    pub fn start_aside(
        self: &Arc<Fleet>,
        guest: &Arc<Guest>,
        start: impl FnOnce(&Arc<Fleet>, &Arc<Guest>) + Send + 'static,
    ) {
        let (fleet, of) = (self.clone(), guest.clone());
        let spawned =
            thread::Builder::new().name(format!("starts {}", guest.id)).spawn(move || start(&fleet, &of));
        if let Err(error) = spawned {
            self.has_ended(guest, Outcome::NotStarted, format!("there is no thread for its start: {error}"));
        }
    }

    /// Makes a process and waits until it answers. The state says already that it starts. The caller's thread lives as long: a
    /// jailer dies with the thread that made it.
    pub fn start(self: &Arc<Fleet>, guest: &Arc<Guest>) {
        let inside = self.starts.enter();
        let record = {
            let mut inner = guest.lock();
            (inner.is_asked, inner.is_killed) = (false, false);
            (inner.why_ended, inner.due, inner.overdue, inner.started) = (None, None, None, None);
            inner.record.clone()
        };
        if matches!(record.state, State::Stopping | State::Removing) {
            // It waited so long that somebody does not want it any more.
            let why = "it was ended before there was a process".to_owned();
            return self.has_ended(guest, Outcome::Ended, why);
        }
        self.watch.time(&guest.id, None);
        let disks = self.store.directory(&guest.id);
        let spawned = spawn::spawn(&self.config, &self.images, &self.network, &guest.places, &record, &disks);
        drop(inside);
        match spawned {
            Ok(started) => self.take(guest, started, &record),
            Err(why) => {
                log::warn!("Guest {}: {why}", guest.name);
                let _ = guest.places.clear(&self.config);
                self.has_ended(guest, Outcome::NotStarted, why);
            }
        }
    }

    /// A process was made: it is written down, watched, and waited for.
    fn take(self: &Arc<Fleet>, guest: &Arc<Guest>, started: spawn::Started, record: &Record) {
        let held = Arc::new(started.held);
        guest.console.connect(started.console);
        guest.log.connect(started.log);
        {
            let mut inner = guest.lock();
            let mut then = inner.record.clone();
            then.process = Some(held.process.clone());
            then.started_at = Some(now());
            then.boot_id = Some(held.process.boot_id.clone());
            then.started_memory_mib = Some(record.memory_mib);
            inner.held = Some(held.clone());
            inner.started = Some(Instant::now());
            let _ = self.save(&mut inner, then, true);
        }
        self.watch_guest(guest, &held);
        self.wait_for_answer(guest, &held);
    }

    /// From now on the loop tells what the guest says, and its end.
    pub fn watch_guest(self: &Arc<Fleet>, guest: &Arc<Guest>, held: &Arc<Held>) {
        use std::os::fd::AsFd;
        let watch = |kind, feed: &crate::feed::Feed| {
            feed.with_pipe(|pipe| pipe.map_or(Ok(()), |pipe| self.watch.guest(&guest.id, kind, pipe)))
        };
        let outcome = watch(Kind::Console, &guest.console)
            .and_then(|()| watch(Kind::Log, &guest.log))
            .and_then(|()| self.watch.guest(&guest.id, Kind::Process, held.pidfd.as_fd()));
        if let Err(error) = outcome {
            // Nobody would hear of its end: no guest is better than one that is lost.
            self.give_up(guest, &format!("it cannot be watched: {error}"));
            let (fleet, guest, held) = (self.clone(), guest.clone(), held.clone());
            self.ends.put(move || {
                held.ends_within(CLEARING);
                fleet.process_has_ended(&guest);
            });
        }
    }

    /// Waits until the guest's VMM says that it runs, or has ended, which the loop sees.
    pub fn wait_for_answer(self: &Arc<Fleet>, guest: &Arc<Guest>, held: &Held) {
        let begin = Instant::now();
        loop {
            if matches!(guest.state(), State::Stopping | State::Removing) {
                // Somebody wanted it ended before there was a process to end.
                return kill(guest);
            }
            let why = match vmm_api::is_running(&guest.places) {
                Ok(true) => break,
                Ok(false) => "it does not come to run its guest".to_owned(),
                Err(error) => error.to_string(),
            };
            if begin.elapsed() > START {
                return self
                    .give_up(guest, &format!("the VMM does not answer in {} s: {why}", START.as_secs()));
            }
            if held.ends_within(START_PAUSE) {
                return;
            }
        }
        // Who wants it to go down from now on asks it, or ends it, by himself.
        match self.apply(guest, Event::Started) {
            Ok(action) => self.see_to(guest, action),
            Err(fault) => log::error!("{fault}"),
        }
    }

    fn give_up(&self, guest: &Guest, why: &str) {
        log::error!("Guest {} is ended: {why}", guest.name);
        guest.lock().why_ended = Some(why.to_owned());
        kill(guest);
    }

    /// Somebody wants the guest to go down. Returns when it has, or whoever wanted it is gone.
    ///
    /// # Errors
    /// 409 if it cannot be now; 504 if the kernel does not let go of it.
    pub fn stop_and_wait(
        self: &Arc<Fleet>,
        guest: &Arc<Guest>,
        stop: Stop,
        is_gone: &dyn Fn() -> bool,
    ) -> Result<(), Fault> {
        let event = if stop.seconds == 0 { Event::Kill } else { Event::Stop };
        let (action, ends) = self.apply_to_run(guest, event)?;
        let time = Duration::from_secs(stop.seconds.into());
        let mut killed = None;
        if action == Action::AskToGoDown {
            self.ask_until(guest, ends, time);
        } else {
            self.see_to(guest, action);
            killed = Some(Instant::now());
        }
        while !guest.wait(ASK_AGAIN, |inner| self.is_down(guest, inner, ends)) {
            if is_gone() {
                // It goes down all the same.
                return Ok(());
            }
            if guest.lock().overdue.is_none() && killed.get_or_insert_with(Instant::now).elapsed() > CLEARING
            {
                let name = &guest.name;
                let message =
                    format!("Guest {name} was killed and its process does not end: the kernel holds it.");
                return Err(Fault { status: 504, message });
            }
        }
        self.wait_for_removal(guest)
    }

    /// Of one that is removed with its end nothing is left: whoever makes another may give it the same name.
    fn wait_for_removal(&self, guest: &Guest) -> Result<(), Fault> {
        guest.wait(CLEARING, |inner| {
            inner.record.state != State::Removing || inner.is_left || self.by_id(&guest.id).is_none()
        });
        let inner = guest.lock();
        if inner.record.state != State::Removing || self.by_id(&guest.id).is_none() {
            return Ok(());
        }
        let why = inner.why_ended.clone().unwrap_or_else(|| "its process does not end".into());
        let message = format!("Guest {} cannot be removed yet: {}", guest.name, sentence(&why));
        Err(Fault { status: 500, message })
    }

    /// Somebody wants the guest forgotten. Returns when it is.
    ///
    /// # Errors
    /// 409 if it cannot be now; 500 if something is in the way.
    pub fn remove_and_wait(self: &Arc<Fleet>, guest: &Arc<Guest>, force: bool) -> Result<(), Fault> {
        guest.lock().why_ended = None;
        let action = self.apply(guest, Event::Remove { force })?;
        // Nobody else tries again what could not be removed before.
        let is_left = std::mem::take(&mut guest.lock().is_left);
        match action {
            Action::Forget => self.forget(guest),
            Action::Kill if is_left => self.forget(guest),
            action => self.see_to(guest, action),
        }
        self.wait_for_removal(guest)
    }

    /// It has ended since it had ended so often. Somebody may have started it again already.
    fn is_down(&self, guest: &Guest, inner: &Inner, ends: u64) -> bool {
        let is_gone = inner.is_left || self.by_id(&guest.id).is_none();
        inner.ends != ends || !inner.record.state.has_process() || is_gone
    }

    /// From now on somebody asks the guest to go down until it has, or this time is over and it is ended. Of the run that it was in
    /// after so many ends: it may have ended meanwhile.
    pub fn ask_until(self: &Arc<Fleet>, guest: &Arc<Guest>, ends: u64, time: Duration) {
        let overdue = Instant::now() + time;
        {
            let mut inner = guest.lock();
            if inner.ends != ends || inner.record.state != State::Stopping {
                return;
            }
            inner.overdue = Some(overdue);
            // So that it is kept whatever becomes of the client, and of this daemon.
            let stop_at = Some((process::since_boot() + time).as_secs_f64());
            let record = Record { stop_at, ..inner.record.clone() };
            let _ = self.save(&mut inner, record, true);
            self.watch.time(&guest.id, Some(overdue));
            if inner.being_asked.replace(ends) == Some(ends) {
                return;
            }
        }
        let (fleet, of) = (self.clone(), guest.clone());
        let ask = move || {
            fleet.ask_to_go_down(&of);
            let is_over = |inner: &Inner| inner.overdue.is_none() || fleet.is_down(&of, inner, ends);
            loop {
                // An init that has only just begun, or a script in its place, does not hear what comes too early.
                if !of.wait(ASK_AGAIN, is_over) {
                    wake(&of);
                    vmm_api::shut_down(&of.places, of.uid);
                    continue;
                }
                let mut inner = of.lock();
                // Unless somebody has just given it more time.
                if is_over(&inner) {
                    inner.being_asked.take_if(|of| *of == ends);
                    return;
                }
            }
        };
        if let Err(error) = thread::Builder::new().name(format!("asks {}", guest.id)).spawn(ask) {
            log::error!("Guest {} is not asked again to go down: {error}", guest.name);
            guest.lock().being_asked = None;
            self.ask_to_go_down(guest);
        }
    }

    /// By its power button, which not every guest listens to, and by its agent, which not every guest has. One that has and hears
    /// both goes down once.
    fn ask_to_go_down(&self, guest: &Guest) {
        wake(guest);
        {
            let mut inner = guest.lock();
            // A second press would end it at once.
            if std::mem::replace(&mut inner.is_asked, true) {
                return;
            }
            if let Some(held) = &inner.held {
                held.signal(Signal::TERM);
            }
        }
        vmm_api::shut_down(&guest.places, guest.uid);
    }

    /// A time of this guest's has come.
    pub fn time_has_come(self: &Arc<Fleet>, guest: &Arc<Guest>) {
        let now = Instant::now();
        let (due, overdue) = {
            let mut inner = guest.lock();
            let has_come = |time: &mut Option<Instant>| time.take_if(|time| *time <= now).is_some();
            (has_come(&mut inner.due), has_come(&mut inner.overdue))
        };
        for event in [due.then_some(Event::Due), overdue.then_some(Event::Kill)].into_iter().flatten() {
            match self.apply(guest, event) {
                Ok(action) => self.see_to(guest, action),
                Err(fault) => log::error!("{fault}"),
            }
        }
    }

    /// Pauses or resumes the guest.
    ///
    /// # Errors
    /// 409 if it does not run; 504 if the VMM does not answer.
    pub fn set_paused(self: &Arc<Fleet>, guest: &Arc<Guest>, is_paused: bool) -> Result<(), Fault> {
        let _claim = guest.claim(if is_paused { "being paused" } else { "being resumed" })?;
        let state = guest.state();
        if !matches!(state, State::Running | State::Paused) {
            let state = state.on_the_wire().as_str();
            let message =
                format!("Guest {} is {state}; only one that runs is paused or resumed.", guest.name);
            return Err(Fault { status: 409, message });
        }
        let (to, event) =
            if is_paused { (VmState::Paused, Event::Paused) } else { (VmState::Resumed, Event::Resumed) };
        vmm_api::set_state(&guest.places, to).map_err(|error| vmm_fault(guest, error))?;
        self.apply(guest, event).map(|_| ())
    }

    /// Writes down whether the guest is paused, if it was paused or resumed while nobody wrote.
    pub fn look_whether_paused(&self, guest: &Guest) {
        // Who has the claim writes down the newest.
        let Ok(_claim) = guest.claim("being looked at") else { return };
        let event = match vmm_api::state(&guest.places) {
            Ok(InstanceState::Paused) => Event::Paused,
            Ok(InstanceState::Running) => Event::Resumed,
            _ => return,
        };
        if let Err(fault) = self.apply(guest, event) {
            log::error!("{fault}");
        }
    }

    /// The process of a guest is gone: what it left is looked at and removed. On a worker's thread.
    pub fn process_has_ended(self: &Arc<Fleet>, guest: &Arc<Guest>) {
        // Two reports of one end: the second finds nothing.
        let Some(held) = guest.lock().held.take() else { return };
        let status = held.reap();
        guest.console.disconnect();
        guest.log.disconnect();
        let (outcome, reason) = how_it_ended(guest, status);
        self.clear_after(guest, outcome, reason);
    }

    /// A process is gone. How it ended is written down first: what tells of it is removed with the rest.
    pub fn clear_after(self: &Arc<Fleet>, guest: &Arc<Guest>, outcome: Outcome, reason: String) {
        let end = End { at: now(), outcome, reason: tame(&reason) };
        {
            let mut inner = guest.lock();
            let record = Record { last_end: Some(end), is_end_told: true, ..inner.record.clone() };
            let _ = self.save(&mut inner, record, true);
        }
        if let Err(error) = guest.places.clear(&self.config) {
            log::error!("What guest {} has left cannot be removed: {error}", guest.name);
        }
        self.has_ended(guest, outcome, reason);
    }

    /// Nothing is left of the guest's run.
    pub fn has_ended(self: &Arc<Fleet>, guest: &Arc<Guest>, outcome: Outcome, reason: String) {
        let end = End { at: now(), outcome, reason: tame(&reason) };
        {
            let mut inner = guest.lock();
            inner.record.last_end = Some(end.clone());
            (inner.record.stop_at, inner.record.is_end_told) = (None, false);
            inner.overdue = None;
        }
        self.watch.time(&guest.id, None);
        if outcome.is_failure() {
            log::warn!("Guest {} has ended: {}: {}", guest.name, outcome.as_str(), end.reason);
        }
        self.events.tell("ended", guest.owner, &guest.id, &guest.name, Some(end));
        match self.apply(guest, Event::Ended(outcome)) {
            Ok(Action::Forget) => self.forget(guest),
            Ok(action) => self.see_to(guest, action),
            Err(fault) => log::error!("{fault}"),
        }
    }
}

/// How a guest ended whose process was gone when the daemon came.
pub fn ended_unseen(guest: &Guest) -> (Outcome, String) {
    let record = guest.lock().record.clone();
    // The last daemon may have written it down, and was killed while it cleared the rest away.
    match record.last_end.filter(|_| record.is_end_told) {
        Some(end) => (end.outcome, end.reason),
        None => how_it_ended(guest, None),
    }
}

/// One that is paused hears nothing. Its VMM knows best: it may be paused by its owner, or only now by somebody here.
fn wake(guest: &Guest) {
    if matches!(vmm_api::state(&guest.places), Ok(InstanceState::Paused))
        && let Err(error) = vmm_api::set_state(&guest.places, VmState::Resumed)
    {
        log::warn!("Guest {} cannot be resumed to go down: {error}", guest.name);
    }
}

fn kill(guest: &Guest) {
    let mut inner = guest.lock();
    inner.is_killed = true;
    if let Some(held) = &inner.held {
        held.signal(Signal::KILL);
    }
}

/// From what it has written itself, what the kernel says of a child, and what we know.
fn how_it_ended(guest: &Guest, status: Option<Status>) -> (Outcome, String) {
    let said = read_exit_status(guest);
    let (is_killed, why, state) = {
        let inner = guest.lock();
        (inner.is_killed, inner.why_ended.clone(), inner.record.state)
    };
    let is_starting = matches!(state, State::Starting | State::StartingAgain);
    let code = said.as_ref().map(|said| said.exit_code).or(match status {
        Some(Status::Code(code)) => Some(code),
        _ => None,
    });
    let last = || match guest.log.last_line() {
        line if line.is_empty() => "it said nothing".to_owned(),
        line => line,
    };
    let reason = |said: Option<ExitStatus>| said.map(|said| said.reason).unwrap_or_else(last);
    match (code, why) {
        (_, Some(why)) => (if is_starting { Outcome::NotStarted } else { Outcome::VmmFailed }, why),
        (None, None) if is_killed => (Outcome::Ended, "it was ended on request".into()),
        (Some(code), None) => (outcome_of(code, is_starting), reason(said)),
        (None, None) if usage::ran_out_of_memory(&guest.places) => {
            (Outcome::VmmFailed, "the kernel ended it: its control group has no memory left".into())
        }
        // A daemon before this one may have ended it.
        (None, None) if status.is_none() && matches!(state, State::Stopping | State::Removing) => {
            (Outcome::Ended, "it was ended on request".into())
        }
        (None, None) => {
            let how = match status {
                Some(Status::Signal(signal)) => format!("a signal {signal} from outside ended it"),
                _ => "it ended without a word: somebody has killed it".to_owned(),
            };
            (if is_starting { Outcome::NotStarted } else { Outcome::VmmFailed }, how)
        }
    }
}

/// Exit codes of the VMM and the jailer (docs/vmm.md, docs/jailer.md).
pub fn outcome_of(code: i32, is_starting: bool) -> Outcome {
    match code {
        0 => Outcome::PoweredOff,
        3 => Outcome::Rebooted,
        4 | 5 => Outcome::GuestCrashed,
        148 => Outcome::JailViolated,
        _ if is_starting => Outcome::NotStarted,
        _ => Outcome::VmmFailed,
    }
}

fn read_exit_status(guest: &Guest) -> Option<ExitStatus> {
    let mut text = String::new();
    let file = std::fs::File::open(guest.places.exit_status()).ok()?;
    file.take(MAX_EXIT_STATUS).read_to_string(&mut text).ok()?;
    // Two threads may have failed at the same moment: the first counts.
    serde_json::from_str(text.lines().next()?).ok()
}

/// What a client is told when a guest's VMM did not do what was asked of it.
pub fn vmm_fault(guest: &Guest, error: ClientError) -> Fault {
    match error {
        ClientError::Refused(fault) => {
            Fault { message: format!("Guest {}: {}", guest.name, tame(&fault.message)), ..fault }
        }
        error => Fault {
            status: 504,
            message: format!(
                "The VMM of guest {} does not answer: {}.",
                guest.name,
                tame(&error.to_string())
            ),
        },
    }
}

/// The beginning of what a VMM has said, with nothing in it that moves a terminal's cursor.
fn tame(text: &str) -> String {
    let mut tame = String::new();
    for char in text.chars().map(|char| if char.is_control() { ' ' } else { char }) {
        if tame.len() + char.len_utf8() > MAX_REASON {
            break;
        }
        tame.push(char);
    }
    tame
}

fn sentence(text: &str) -> String {
    if text.ends_with('.') { text.to_owned() } else { format!("{text}.") }
}

#[cfg(test)]
mod tests {
    use api_socket::fleet::Restart;

    use super::*;
    use crate::testing::{self, ID};

    #[test]
    fn whatever_a_vmm_says_of_its_end_the_record_can_be_read_again() {
        let (_place, fleet) = testing::fleet();
        let guest = testing::guest(&fleet, ID, |record| record.state = State::Running);
        fleet.has_ended(&guest, Outcome::VmmFailed, "\x1b[2Jé".repeat(100_000));
        let found = fleet.store.load().unwrap();
        let [record] = &found.records[..] else { panic!("{found:?}") };
        let reason = &record.last_end.as_ref().unwrap().reason;
        assert!(reason.len() <= MAX_REASON && !reason.contains(char::is_control), "{reason:?}");
        assert_eq!(record.state, State::Stopped);
    }

    #[test]
    fn what_could_not_be_removed_is_removed_when_somebody_asks_again() {
        let (_place, fleet) = testing::fleet();
        let guest = testing::guest(&fleet, ID, |_| ());
        // There is no jailer, which removes cells.
        assert_eq!(fleet.remove_and_wait(&guest, false).unwrap_err().status, 500);
        assert_eq!(guest.state(), State::Removing);
        assert_eq!(fleet.remove_and_wait(&guest, true).unwrap_err().status, 500);
        testing::provide_jailer(&fleet);
        fleet.remove_and_wait(&guest, false).unwrap();
        assert!(fleet.by_id(ID).is_none() && !fleet.store.directory(ID).exists());
        // Whose it was hears of it too.
        let told = fleet.events.since(0, Duration::ZERO);
        assert!(
            told.iter().any(|(owner, event)| (*owner, event.what.as_str()) == (1000, "removed")),
            "{told:?}"
        );
    }

    #[test]
    fn a_start_that_fails_is_no_long_run_whatever_was_before() {
        let (_place, fleet) = testing::fleet();
        testing::provide_jailer(&fleet);
        let guest = testing::guest(&fleet, ID, |record| {
            (record.state, record.restart) = (State::Running, Restart::OnFailure);
        });
        guest.lock().started = Instant::now().checked_sub(crate::state::LONG_RUN);
        fleet.apply(&guest, Event::Ended(Outcome::GuestCrashed)).unwrap();
        for streak in 1..4 {
            assert_eq!(fleet.apply(&guest, Event::Due).unwrap(), Action::Start);
            // There is no such image.
            fleet.start(&guest);
            let inner = guest.lock();
            assert_eq!((inner.record.state, inner.record.streak), (State::Waiting, streak));
        }
    }

    #[test]
    fn what_makes_things_go_away_needs_no_room_and_is_written_down_when_there_is_some() {
        let (_place, fleet) = testing::fleet();
        let guest = testing::guest(&fleet, ID, |record| record.state = State::Running);
        let (directory, aside) = (fleet.store.directory(ID), fleet.store.directory("aside"));
        std::fs::rename(&directory, &aside).unwrap();
        assert_eq!(fleet.apply(&guest, Event::Stop).unwrap(), Action::AskToGoDown);
        fleet.apply(&guest, Event::Ended(Outcome::PoweredOff)).unwrap();
        assert_eq!(fleet.apply(&guest, Event::Start).unwrap_err().status, 500);
        assert_eq!(guest.state(), State::Stopped);
        std::fs::rename(&aside, &directory).unwrap();
        let begin = Instant::now();
        while fleet.store.load().unwrap().records[0].state != State::Stopped {
            assert!(begin.elapsed() < Duration::from_secs(60));
            thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(fleet.apply(&guest, Event::Remove { force: false }).unwrap(), Action::Forget);
    }

    #[test]
    fn how_a_guest_ended_is_known_although_the_daemon_was_killed_while_it_cleared_up() {
        let (_place, fleet) = testing::fleet();
        let guest = testing::guest(&fleet, ID, |record| {
            record.state = State::Running;
            record.last_end = Some(End { at: 9.0, outcome: Outcome::PoweredOff, reason: "it did".into() });
        });
        assert_eq!(ended_unseen(&guest).0, Outcome::VmmFailed, "that was the run before");
        guest.lock().record.is_end_told = true;
        assert_eq!(ended_unseen(&guest), (Outcome::PoweredOff, "it did".into()));
        // One that was to be ended has been, by whichever daemon.
        guest.lock().record.is_end_told = false;
        guest.lock().record.state = State::Stopping;
        assert_eq!(ended_unseen(&guest).0, Outcome::Ended);
    }

    #[test]
    fn who_hangs_up_is_not_waited_for_and_who_stops_a_guest_is_told_although_another_starts_it_at_once() {
        let (_place, fleet) = testing::fleet();
        let guest = testing::guest(&fleet, ID, |record| record.state = State::Running);
        let stop = Stop { seconds: 3600 };
        let begin = Instant::now();
        fleet.stop_and_wait(&guest, stop, &|| true).unwrap();
        assert!(begin.elapsed() < Duration::from_secs(60) && guest.state() == State::Stopping);
        assert!(guest.lock().overdue.is_some(), "it is ended all the same");

        let ends = guest.lock().ends;
        assert!(!fleet.is_down(&guest, &guest.lock(), ends));
        fleet.apply(&guest, Event::Ended(Outcome::PoweredOff)).unwrap();
        fleet.apply(&guest, Event::Start).unwrap();
        assert!(fleet.is_down(&guest, &guest.lock(), ends));
    }

    #[test]
    fn a_guest_that_cannot_be_watched_is_ended_and_known_to_have() {
        let (_place, fleet) = testing::fleet();
        // Of an id that is none the watch makes no token.
        let guest = testing::guest(&fleet, "none", |record| record.state = State::Running);
        let (mut child, held) = testing::process();
        guest.lock().held = Some(held.clone());
        fleet.watch_guest(&guest, &held);
        assert!(guest.wait(Duration::from_secs(60), |inner| inner.record.state == State::Stopped));
        let end = guest.last_end().unwrap();
        assert!(end.outcome == Outcome::VmmFailed && end.reason.contains("cannot be watched"), "{end:?}");
        // It was reaped.
        assert!(child.wait().is_err());
    }

    #[test]
    fn exit_codes_are_what_the_documents_say() {
        let cases = [
            (0, Outcome::PoweredOff),
            (3, Outcome::Rebooted),
            (4, Outcome::GuestCrashed),
            (5, Outcome::GuestCrashed),
            (148, Outcome::JailViolated),
            (1, Outcome::VmmFailed),
            (152, Outcome::VmmFailed),
        ];
        for (code, outcome) in cases {
            assert_eq!(outcome_of(code, false), outcome, "{code}");
        }
        for code in [1, 140, 152, 153] {
            assert_eq!(outcome_of(code, true), Outcome::NotStarted, "{code}");
        }
    }
}
