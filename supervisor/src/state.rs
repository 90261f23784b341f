//! The life of a guest: its states, what may happen to it, and what is to be done then. One function, no I/O, no clock.
//!
//! It does not know processes or files. Whether an action succeeded comes back as an event.

use std::time::Duration;

use api_socket::fleet::{self, Outcome, Restart};
use serde::{Deserialize, Serialize};

/// The wait before the first start by policy; each further one waits twice as long.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// A guest that ran as long as this is not one that fails at once: the next wait is the first again.
pub const LONG_RUN: Duration = Duration::from_secs(60);
/// So many starts by policy in a row without a long run, and it is given up: half an hour of tries.
pub const MAX_STREAK: u32 = 32;

/// Where a guest is. What is more to know of it (its process, its deadlines) is beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// There is no process, and none will be made.
    Stopped,
    /// A process is being made, because somebody asked for it.
    Starting,
    /// A process is being made by policy, or because the guest reboots.
    StartingAgain,
    Running,
    Paused,
    /// It was asked to go down, or is being ended.
    Stopping,
    /// There is no process, and one will be made when its time comes.
    Waiting,
    /// It is being ended, and then forgotten.
    Removing,
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Somebody wants it to run.
    Start,
    /// The time to wait is over.
    Due,
    /// The VMM answers: the guest runs.
    Started,
    /// The VMM has paused it.
    Paused,
    /// The VMM has resumed it.
    Resumed,
    /// Somebody wants it to go down by itself.
    Stop,
    /// Somebody wants it ended, or the time to go down is over.
    Kill,
    /// Somebody wants it forgotten; with `force` also while it has a process.
    Remove { force: bool },
    /// Its process is gone and nothing is left of it. From `Starting`, also that none could be made.
    Ended(Outcome),
}

/// What is to be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Nothing,
    /// Make a process.
    Start,
    /// Ask the guest to go down, and end it when its time is over.
    AskToGoDown,
    /// End the process.
    Kill,
    /// Be told when this time is over.
    Wait(Duration),
    /// Remove all that there is of it.
    Forget,
}

/// What the guest's makers wanted, and how it fared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    pub restart: Restart,
    pub remove_when_ended: bool,
    /// Starts by policy in a row, none of which led to a long run.
    pub streak: u32,
}

/// Why something cannot be now; it goes on "the guest is …".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused(pub &'static str);

/// The state after this event, and what is to be done.
///
/// # Errors
/// Nothing changes.
pub fn next(state: State, event: Event, policy: Policy) -> Result<(State, Action), Refused> {
    use Action as A;
    use State as S;
    let (state, action) = match (state, event) {
        (S::Stopped | S::Waiting, Event::Start) => (S::Starting, A::Start),
        (S::Starting | S::StartingAgain | S::Running, Event::Start) => (state, A::Nothing),
        (S::Paused, Event::Start) => return Err(Refused("paused; resume it")),

        (S::Waiting, Event::Due) => (S::StartingAgain, A::Start),
        (_, Event::Due) => (state, A::Nothing),

        (S::Starting | S::StartingAgain, Event::Started) => (S::Running, A::Nothing),
        // It was stopped or removed meanwhile, and is being ended.
        (_, Event::Started) => (state, A::Nothing),

        (S::Running | S::Paused, Event::Paused) => (S::Paused, A::Nothing),
        (S::Running | S::Paused, Event::Resumed) => (S::Running, A::Nothing),
        (_, Event::Paused | Event::Resumed) => (state, A::Nothing),

        (S::Running | S::Paused, Event::Stop) => (S::Stopping, A::AskToGoDown),
        // Again: perhaps with less time.
        (S::Stopping, Event::Stop) => (S::Stopping, A::AskToGoDown),
        // There is nobody yet who could be asked.
        (S::Starting | S::StartingAgain, Event::Stop | Event::Kill) => (S::Stopping, A::Kill),
        (S::Running | S::Paused | S::Stopping, Event::Kill) => (S::Stopping, A::Kill),
        // It will not be started again, so it has ended.
        (S::Waiting, Event::Stop | Event::Kill) if policy.remove_when_ended => (S::Removing, A::Forget),
        (S::Waiting, Event::Stop | Event::Kill) => (S::Stopped, A::Nothing),
        (S::Stopped, Event::Stop | Event::Kill) => (S::Stopped, A::Nothing),

        (S::Removing, Event::Start) => return Err(Refused("being removed")),
        (S::Stopping, Event::Start) => return Err(Refused("going down; start it when it has stopped")),
        (S::Removing, Event::Stop | Event::Kill | Event::Remove { .. }) => (S::Removing, A::Kill),

        (S::Stopped | S::Waiting, Event::Remove { .. }) => (S::Removing, A::Forget),
        (_, Event::Remove { force: true }) => (S::Removing, A::Kill),
        (_, Event::Remove { force: false }) => {
            return Err(Refused("not stopped; stop it, or remove it by force"));
        }

        (S::Removing, Event::Ended(_)) => (S::Removing, A::Forget),
        // A report that comes twice.
        (S::Stopped | S::Waiting, Event::Ended(_)) => (state, A::Nothing),
        (_, Event::Ended(outcome)) => after(state, outcome, policy),
    };
    Ok((state, action))
}

/// After an end that is not asked for by a removal.
fn after(state: State, outcome: Outcome, policy: Policy) -> (State, Action) {
    let starts_again = match (state, outcome, policy.restart) {
        // Somebody waits to hear of it.
        (State::Starting | State::Stopping, _, _) => false,
        (_, Outcome::Ended, _) => false,
        (_, Outcome::Rebooted, _) => true,
        (_, _, Restart::Always) => true,
        // The host's failure, not the guest's.
        (_, Outcome::Lost, Restart::OnFailure) => false,
        (_, outcome, Restart::OnFailure) => outcome.is_failure(),
        (_, _, Restart::No) => false,
    };
    match (starts_again, policy.streak) {
        // A guest that runs and reboots does not wait; one that only ever reboots does.
        (true, 0) if outcome == Outcome::Rebooted => (State::StartingAgain, Action::Start),
        (true, streak) if streak < MAX_STREAK => (State::Waiting, Action::Wait(wait(streak))),
        _ if policy.remove_when_ended => (State::Removing, Action::Forget),
        _ => (State::Stopped, Action::Nothing),
    }
}

fn wait(streak: u32) -> Duration {
    FIRST_WAIT.saturating_mul(1 << streak.min(16)).min(LONGEST_WAIT)
}

impl State {
    /// There may be a process.
    pub fn has_process(self) -> bool {
        self.on_the_wire().has_process()
    }

    /// As clients are told it.
    pub fn on_the_wire(self) -> fleet::State {
        match self {
            State::Stopped => fleet::State::Stopped,
            State::Starting | State::StartingAgain => fleet::State::Starting,
            State::Running => fleet::State::Running,
            State::Paused => fleet::State::Paused,
            State::Stopping => fleet::State::Stopping,
            State::Waiting => fleet::State::Waiting,
            State::Removing => fleet::State::Removing,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OUTCOMES: [Outcome; 8] = [
        Outcome::PoweredOff,
        Outcome::Rebooted,
        Outcome::Ended,
        Outcome::GuestCrashed,
        Outcome::VmmFailed,
        Outcome::JailViolated,
        Outcome::NotStarted,
        Outcome::Lost,
    ];

    fn policy(restart: Restart) -> Policy {
        Policy { restart, remove_when_ended: false, streak: 0 }
    }

    fn after_end(outcome: Outcome, policy: Policy) -> (State, Action) {
        next(State::Running, Event::Ended(outcome), policy).unwrap()
    }

    #[test]
    fn a_guest_is_started_again_when_its_policy_says_so_and_always_when_it_reboots() {
        for outcome in OUTCOMES {
            let again = |restart| after_end(outcome, policy(restart)).0 != State::Stopped;
            let is_reboot = outcome == Outcome::Rebooted;
            assert_eq!(again(Restart::No), is_reboot, "{outcome:?}");
            let is_its_own = outcome.is_failure() && outcome != Outcome::Lost;
            assert_eq!(again(Restart::OnFailure), is_reboot || is_its_own, "{outcome:?}");
            assert_eq!(again(Restart::Always), outcome != Outcome::Ended, "{outcome:?}");
        }
    }

    #[test]
    fn one_that_was_stopped_stays_so_whatever_its_policy_and_its_end() {
        for outcome in OUTCOMES {
            let ended = next(State::Stopping, Event::Ended(outcome), policy(Restart::Always));
            assert_eq!(ended, Ok((State::Stopped, Action::Nothing)), "{outcome:?}");
        }
    }

    #[test]
    fn one_that_is_removed_with_its_end_is_removed_when_it_need_not_wait_for_a_start_any_more() {
        let removed = Policy { remove_when_ended: true, ..policy(Restart::Always) };
        for event in [Event::Stop, Event::Kill] {
            assert_eq!(next(State::Waiting, event, removed), Ok((State::Removing, Action::Forget)));
            let kept = next(State::Waiting, event, policy(Restart::Always));
            assert_eq!(kept, Ok((State::Stopped, Action::Nothing)));
        }
    }

    #[test]
    fn waits_double_up_to_a_minute_and_end_after_so_many() {
        let waited = |streak| after_end(Outcome::VmmFailed, Policy { streak, ..policy(Restart::Always) });
        let seconds: Vec<_> = (0..MAX_STREAK)
            .map(|streak| match waited(streak) {
                (State::Waiting, Action::Wait(time)) => time.as_secs(),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(seconds[..8], [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(waited(MAX_STREAK), (State::Stopped, Action::Nothing));
        assert_eq!(waited(u32::MAX), (State::Stopped, Action::Nothing));
    }

    #[test]
    fn a_reboot_is_at_once_but_for_one_that_does_nothing_else() {
        let rebooted = |streak| after_end(Outcome::Rebooted, Policy { streak, ..policy(Restart::No) });
        assert_eq!(rebooted(0), (State::StartingAgain, Action::Start));
        assert_eq!(rebooted(2), (State::Waiting, Action::Wait(Duration::from_secs(4))));
    }

    /// What a host is: whether there is a process, whether it is being ended, and whether a wait was asked for.
    #[derive(Debug, Default)]
    struct Model {
        has_process: bool,
        is_waited_for: bool,
        is_forgotten: bool,
    }

    fn events() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Start),
            Just(Event::Due),
            Just(Event::Started),
            Just(Event::Paused),
            Just(Event::Resumed),
            Just(Event::Stop),
            Just(Event::Kill),
            any::<bool>().prop_map(|force| Event::Remove { force }),
            (0..OUTCOMES.len()).prop_map(|at| Event::Ended(OUTCOMES[at])),
        ]
    }

    fn policies() -> impl Strategy<Value = Policy> {
        let restarts = prop_oneof![Just(Restart::No), Just(Restart::OnFailure), Just(Restart::Always)];
        (restarts, any::<bool>(), 0..MAX_STREAK + 2).prop_map(|(restart, remove_when_ended, streak)| Policy {
            restart,
            remove_when_ended,
            streak,
        })
    }

    proptest! {
        /// Against a host that only ever reports what can be: a state with a process and a process go together, no second
        /// process is made beside one, a guest that is forgotten has none, and one that waits is waited for.
        #[test]
        fn the_state_and_the_host_never_part(steps in prop::collection::vec((events(), policies()), 1..200)) {
            let (mut state, mut host) = (State::Stopped, Model::default());
            for (event, policy) in steps {
                // What cannot be is not reported.
                let is_possible = match event {
                    Event::Ended(_) | Event::Started | Event::Paused | Event::Resumed => host.has_process,
                    Event::Due => host.is_waited_for,
                    _ => true,
                };
                if !is_possible {
                    continue;
                }
                if matches!(event, Event::Ended(_)) {
                    host.has_process = false;
                }
                if event == Event::Due {
                    host.is_waited_for = false;
                }
                let Ok((then, action)) = next(state, event, policy) else { continue };
                match action {
                    Action::Start => {
                        prop_assert!(!host.has_process, "{state:?} {event:?}: a second process");
                        host.has_process = true;
                    }
                    Action::AskToGoDown | Action::Kill => prop_assert!(host.has_process, "{state:?} {event:?}"),
                    Action::Wait(time) => {
                        prop_assert!(time <= LONGEST_WAIT);
                        host.is_waited_for = true;
                    }
                    Action::Forget => {
                        prop_assert!(!host.has_process, "{state:?} {event:?}: forgotten while it runs");
                        host.is_forgotten = true;
                    }
                    Action::Nothing => {}
                }
                state = then;
                if host.is_forgotten {
                    break;
                }
                prop_assert_eq!(state.has_process(), host.has_process, "{:?} after {:?}", state, event);
                prop_assert!(state != State::Waiting || host.is_waited_for, "{state:?}: nobody will wake it");
            }
        }

        #[test]
        fn whoever_wants_it_gone_is_obeyed_in_every_state(
            steps in prop::collection::vec((events(), policies()), 0..50),
            policy in policies(),
        ) {
            let state = steps.into_iter().fold(State::Stopped, |state, (event, policy)| {
                next(state, event, policy).map_or(state, |(state, _)| state)
            });
            let (state, action) = next(state, Event::Remove { force: true }, policy).unwrap();
            prop_assert_eq!(state, State::Removing);
            prop_assert!(matches!(action, Action::Kill | Action::Forget));
        }
    }
}
