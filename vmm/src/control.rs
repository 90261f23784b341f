//! The control thread: one loop, one owner of the guest. API calls, the guest's end, input, signals and the timer become
//! an [`Event`]; only this loop holds the [`Vm`].
//!
//! Does not decide what a request means: that is `vm.rs`, after `admit.rs` has said whether it is legal now.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Duration;

use api_socket::{Fault, Reply, Request};
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::signals::Requests;
use crate::terminal::Input;
use crate::vcpu::Ending;
use crate::vm::Vm;

/// How often counters are written to the metrics file, beside the writes that a client asks for.
const METRICS_PERIOD: Duration = Duration::from_secs(60);

/// Bytes of input taken from the terminal at a time.
const INPUT_CHUNK: usize = 64;

/// A request on its way to the control thread, and the way back for its reply. Without one it is the command line's: there
/// is nobody to mend what is wrong with it, so that ends the process.
pub struct Call {
    pub request: Request,
    pub reply: Option<SyncSender<Reply>>,
}

/// What reaches a guest from outside its vCPUs, and from its vCPUs when it ends.
enum Event {
    Call(Box<Call>),
    Ended(Ending),
    /// The terminal has bytes for the serial port.
    Input,
    /// The serial port takes input again after it refused some, or the guest has let go of a device.
    Attention,
    /// SIGTERM or SIGINT.
    Signal,
    MetricsDue,
}

/// Tokens of the descriptors the loop waits for.
mod token {
    pub const WAKE: u32 = 0;
    pub const SIGNAL: u32 = 1;
    pub const TIMER: u32 = 2;
    pub const INPUT: u32 = 3;
    pub const ATTENTION: u32 = 4;
}

/// The loop, with the guest it owns.
pub struct Control {
    vm: Vm,
    sources: Sources,
    timer: TimerFd,
    /// Input that the serial port has not taken. While there is some, the terminal is not read.
    pending: Vec<u8>,
    /// The terminal is the guest's. Not before it runs: what is typed until then is for whoever started us.
    listening: bool,
    ended: Option<Result<Ending, Fault>>,
}

/// Where events come from.
pub struct Sources {
    pub calls: Receiver<Call>,
    pub endings: Receiver<Ending>,
    /// Signalled after something was put into `calls` or `endings`.
    pub wake: Arc<EventFd>,
    pub signals: Requests,
    /// What devices signal when they want to be looked at.
    pub attention: EventFd,
    /// Where the serial port's input comes from.
    pub input: Input,
}

impl Control {
    pub fn new(vm: Vm, sources: Sources) -> io::Result<Self> {
        let mut timer = TimerFd::new()?;
        timer.reset(METRICS_PERIOD, Some(METRICS_PERIOD))?;
        Ok(Self { vm, sources, timer, pending: Vec::new(), listening: false, ended: None })
    }

    /// Runs until the guest has ended, and says how; or until what the command line asks for has failed. No vCPU runs then,
    /// and the terminal is as it was.
    ///
    /// # Errors
    /// Those of epoll.
    pub fn run(self) -> io::Result<Result<Ending, Fault>> {
        let mut manager = EventManager::new().map_err(io::Error::other)?;
        let id = manager.add_subscriber(self);
        loop {
            if let Err(error) = manager.run() {
                // Only a signal that nobody waits for: the next round finds all that is ready.
                log::debug!("control loop: {error}");
            }
            let control = manager.subscriber_mut(id).map_err(io::Error::other)?;
            if let Some(ending) = control.ended.take() {
                control.vm.finish();
                return Ok(ending);
            }
        }
    }

    fn event(&mut self, token: u32) -> Option<Event> {
        match token {
            token::WAKE => self.woken(),
            token::SIGNAL => self.sources.signals.take().map(|_| Event::Signal),
            token::TIMER => self.timer.wait().ok().map(|_| Event::MetricsDue),
            token::INPUT => Some(Event::Input),
            token::ATTENTION => self.sources.attention.read().ok().map(|_| Event::Attention),
            _ => None,
        }
    }

    /// The next message. The wake-up is taken only when both queues are empty, so none is ever forgotten.
    fn woken(&mut self) -> Option<Event> {
        let next = |sources: &Sources| {
            let ended = sources.endings.try_recv().map(Event::Ended);
            ended.or_else(|_| sources.calls.try_recv().map(|call| Event::Call(Box::new(call)))).ok()
        };
        next(&self.sources).or_else(|| {
            let _ = self.sources.wake.read();
            next(&self.sources)
        })
    }

    fn handle(&mut self, event: Event, ops: &mut EventOps) {
        match event {
            Event::Call(call) => {
                let Call { request, reply } = *call;
                let answer = self.vm.handle(request);
                self.listen(ops);
                match (reply, answer) {
                    (Some(reply), answer) => {
                        // A client that has hung up does not undo what it asked for.
                        let _ = reply.send(answer);
                    }
                    (None, Reply::Fault(fault)) => self.ended = Some(Err(fault)),
                    (None, _) => {}
                }
            }
            Event::Ended(ending) => self.ended = Some(Ok(ending)),
            Event::Input => self.read_input(ops),
            Event::Attention => {
                self.vm.take_unplugged();
                if !self.pending.is_empty() {
                    self.give_input(ops);
                }
            }
            Event::Signal => self.ended = self.vm.asked_to_end().map(Ok),
            Event::MetricsDue => self.vm.flush_metrics(),
        }
    }

    /// Hands the terminal to the guest once it runs.
    fn listen(&mut self, ops: &mut EventOps) {
        if self.listening || !self.vm.is_running() {
            return;
        }
        self.listening = true;
        if self.sources.input.is_anothers() {
            return log::info!("Started in the background: the serial port has no input.");
        }
        self.sources.input.set_raw();
        if let Err(error) = ops.add(self.input_events()) {
            // A plain file or /dev/null cannot be waited for.
            log::debug!(
                "standard input is no terminal, pipe or socket; the serial port has no input: {error}"
            );
        }
    }

    fn read_input(&mut self, ops: &mut EventOps) {
        match self.sources.input.read(INPUT_CHUNK) {
            Ok(bytes) if !bytes.is_empty() => {
                self.pending = bytes;
                log_failure(ops.remove(self.input_events()));
                self.give_input(ops);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The end of input, or an error that will not go away: the guest runs on without.
            _ => log_failure(ops.remove(self.input_events())),
        }
    }

    fn give_input(&mut self, ops: &mut EventOps) {
        let taken = self.vm.serial_input(&self.pending);
        self.pending.drain(..taken);
        if self.pending.is_empty() {
            log_failure(ops.add(self.input_events()));
        }
    }

    fn input_events(&self) -> Events {
        Events::with_data(&self.sources.input, token::INPUT, EventSet::IN)
    }
}

impl MutEventSubscriber for Control {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.ended.is_none()
            && let Some(event) = self.event(events.data())
        {
            self.handle(event, ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let sources = &self.sources;
        for (fd, token) in [
            (sources.wake.as_raw_fd(), token::WAKE),
            (sources.signals.as_raw_fd(), token::SIGNAL),
            (self.timer.as_raw_fd(), token::TIMER),
            (sources.attention.as_raw_fd(), token::ATTENTION),
        ] {
            log_failure(ops.add(Events::with_data_raw(fd, token, EventSet::IN)));
        }
        self.listen(ops);
    }
}

fn log_failure(result: Result<(), event_manager::Error>) {
    if let Err(error) = result {
        log::error!("control loop: {error}");
    }
}
