//! The console (VIRTIO 1.3, section 5.3): a terminal, its input from a descriptor, its output to a writer, its size in the
//! configuration space; and, if wanted, further ports with queues of their own, terminals too or plain streams with a name.
//!
//! Without further ports there are no control queues: a device of one port (no VIRTIO_CONSOLE_F_MULTIPORT), always open.
//! Ports do not come and go. Not line-buffered, and no terminal: what comes in goes out. A terminal never makes the guest wait
//! for a reader: Linux holds a lock while it waits for its output to be taken, so what a slow reader leaves is kept up to
//! [`OUTPUT_LIMIT`], as is what a rate limit holds back, and what is more is lost and counted. A stream loses nothing: beyond the limit its output stays in the
//! queue, and in Linux the program that writes waits, which can be ended. Input of a port that no program of the guest has
//! open waits outside.

mod control;
mod port;

use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::control::Said;
use self::port::Port;
use crate::backend::rate_limiter::Limits;
use crate::host::Source;
use crate::virtio::device::{
    Active, DeviceState, DeviceType, Identity, StartError, VirtioDevice, read_space,
};
use crate::virtio::queue::Queue;
use crate::virtio::running::{Running, Step, count};

/// Linux fills the receive queue with a page per entry; a console needs no more than this.
const QUEUE_SIZE: u16 = 32;

/// Most bytes of output that wait for the writer of one port. A write of Linux has at most half of it.
pub const OUTPUT_LIMIT: usize = 64 << 10;

/// Most ports beside the first: each takes two queues, and so two interrupts.
pub const MAX_FURTHER_PORTS: usize = 15;

/// VIRTIO_CONSOLE_F_SIZE, VIRTIO_CONSOLE_F_MULTIPORT (5.3.3).
const F_SIZE: u32 = 0;
const F_MULTIPORT: u32 = 1;

/// What a console is made of.
pub struct Config {
    /// Read when it is readable and the guest has room. A descriptor that blocks is fine if nobody else reads it: there
    /// is one read per readiness. At its end there is no more input.
    pub input: Option<OwnedFd>,
    /// Must not block: [`ErrorKind::WouldBlock`](io::ErrorKind::WouldBlock) is tried again, any other error loses what was to
    /// be written.
    pub output: Box<dyn Write + Send>,
    pub size: Size,
    /// Of the output, in bytes and in writes to the writer, each of at most [`OUTPUT_LIMIT`].
    pub limits: Limits,
    /// At most [`MAX_FURTHER_PORTS`]; those beyond it are not made.
    pub ports: Vec<PortConfig>,
}

/// What a further port is made of. Input and output are as those of [`Config`].
pub struct PortConfig {
    pub name: String,
    /// Of a terminal; a port without one is a stream.
    pub size: Option<Size>,
    pub input: Option<OwnedFd>,
    pub output: Box<dyn Write + Send>,
    pub limits: Limits,
}

/// The size of the terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    pub columns: u16,
    pub rows: u16,
}

/// The console.
pub struct Console {
    ports: Vec<Port>,
    counters: Arc<Counters>,
    running: Option<Running>,
    /// The driver that runs knows of several ports.
    multiport: bool,
    /// The driver has to be told of the size in the configuration space.
    resized: bool,
}

impl Console {
    /// A stopped device, or, with a state, the one that was saved: with the sizes it had and the output still to be
    /// written.
    pub fn new(config: Config, state: Option<State>) -> io::Result<Console> {
        let counters = Arc::<Counters>::default();
        let first = (None, Some(config.size), config.input, config.output, config.limits);
        let further = config.ports.into_iter().take(MAX_FURTHER_PORTS);
        let further = further.map(|port| (Some(port.name), port.size, port.input, port.output, port.limits));
        let mut states = state.map(|state| state.ports).unwrap_or_default().into_iter();
        let ports = [first].into_iter().chain(further).map(|(name, size, input, output, limits)| {
            Port::new(name, size, input, output, limits, counters.clone(), states.next())
        });
        let ports = ports.collect::<io::Result<_>>()?;
        Ok(Console { ports, counters, running: None, multiport: false, resized: false })
    }

    /// Another size of a terminal from now on. A driver that runs is told, one that is paused when it goes on. Does nothing to
    /// a port that is not there or is no terminal.
    pub fn resize(&mut self, port: usize, size: Size) {
        let Some(terminal) = self.ports.get_mut(port).filter(|port| port.size.is_some_and(|now| now != size))
        else {
            return;
        };
        terminal.resize(size);
        self.resized |= port == 0;
        self.announce();
        self.tell();
    }

    /// Other limits of a port from now on, running or not. Does nothing to a port that is not there.
    pub fn set_limits(&mut self, port: usize, limits: Limits) {
        if let Some(port) = self.ports.get_mut(port) {
            port.output.limiter.set_limits(limits);
        }
    }

    fn announce(&mut self) {
        if let Some(running) = &self.running
            && std::mem::take(&mut self.resized)
        {
            running.interrupt.config();
        }
    }

    /// What the device has done since it was built, all ports together.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    fn receive(&mut self, index: usize) {
        let (Some(running), Some(port)) = (&mut self.running, self.ports.get_mut(index)) else { return };
        let takes_input = !self.multiport || port.is_open();
        running.serve(receive_queue(index), |memory, chain| {
            if !takes_input {
                return Ok(Step::Later);
            }
            match port.input.read(memory, chain)? {
                None => Ok(Step::Later),
                Some(bytes) => {
                    count(&self.counters.input_bytes, bytes.into());
                    Ok(Step::Used(bytes))
                }
            }
        });
    }

    fn transmit(&mut self, index: usize) {
        let (Some(running), Some(port)) = (&mut self.running, self.ports.get_mut(index)) else { return };
        let is_stream = port.size.is_none();
        running.serve(transmit_queue(index), |memory, chain| port.output.take(memory, chain, is_stream));
        port.output.flush();
    }

    /// Hears what the driver has to say of its ports, and answers.
    fn hear(&mut self) {
        let Some(running) = &mut self.running else { return };
        let mut opened = 0u32;
        running.serve(CONTROL_TRANSMIT, |memory, chain| {
            match control::read(memory, chain)? {
                Some(Said::DeviceReady) => self.ports.iter_mut().for_each(Port::begin),
                Some(Said::PortReady { id, is_ready }) => {
                    if let Some(port) = self.ports.get_mut(id as usize) {
                        port.ready(is_ready);
                    }
                }
                Some(Said::PortOpen { id, is_open }) => {
                    if let Some(port) = self.ports.get_mut(id as usize) {
                        port.set_open(is_open);
                        opened |= 1 << id;
                    }
                }
                None => {}
            }
            Ok(Step::Used(0))
        });
        self.tell();
        for index in (0..self.ports.len()).filter(|index| opened & 1 << index != 0) {
            self.room(index);
        }
    }

    /// Tells the driver what there is to tell, as far as it has room for it.
    fn tell(&mut self) {
        let Some(running) = &mut self.running else { return };
        running.serve(CONTROL_RECEIVE, |memory, chain| {
            let next = (0..).zip(&mut self.ports).find_map(|(id, port)| port.next_news(id));
            let Some(message) = next.map(|message| message.bytes()) else { return Ok(Step::Later) };
            // A driver that has too little room for a message goes without it.
            if (chain.writable.bytes() as usize) < message.len() {
                return Ok(Step::Used(0));
            }
            chain.writable.write(memory, &message)?;
            Ok(Step::Used(message.len() as u32))
        });
    }

    /// The guest has made room for input, or wants it.
    fn room(&mut self, index: usize) {
        if let Some(port) = self.ports.get_mut(index) {
            port.input.resume();
            self.receive(index);
        }
    }
}

impl VirtioDevice for Console {
    fn identity(&self) -> Identity {
        let mut features = 1 << F_SIZE | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
        if self.ports.len() > 1 {
            features |= 1 << F_MULTIPORT;
        }
        let queue_sizes = vec![QUEUE_SIZE; queues(self.ports.len())];
        Identity { device_type: DeviceType::Console, features, queue_sizes, config_bytes: 8 }
    }

    /// Columns and rows of the first port and, if there are several, how many; what is behind them is not offered (5.3.4).
    fn config(&self, offset: u64, data: &mut [u8]) {
        let first = self.ports.first().and_then(|port| port.size);
        let Size { columns, rows } = first.unwrap_or(Size { columns: 0, rows: 0 });
        let ports = if self.ports.len() > 1 { self.ports.len() as u32 } else { 0 };
        let space = u64::from(columns) | u64::from(rows) << 16 | u64::from(ports) << 32;
        read_space(&space.to_le_bytes(), offset, data);
    }

    fn start(&mut self, active: Active) -> Result<Vec<Source>, StartError> {
        self.multiport = active.features & 1 << F_MULTIPORT != 0;
        let (running, mut sources) = Running::start(active, queues(self.ports.len()))?;
        for (index, port) in (0..).zip(&self.ports) {
            sources.push(Source { fd: port.output.timer.as_raw_fd(), token: RETRY_TIMER + index });
            sources.push(Source { fd: port.output.limiter.fd(), token: LIMIT_TIMER + index });
            sources.extend(port.input.fd().map(|fd| Source { fd, token: INPUT + index }));
        }
        self.running = Some(running);
        self.announce();
        self.tell();
        self.ports.iter_mut().for_each(|port| port.output.flush());
        Ok(sources)
    }

    fn handle(&mut self, token: u32) {
        let index = |first: u32| (token - first) as usize;
        match token {
            LIMIT_TIMER.. => {
                if let Some(port) = self.ports.get_mut(index(LIMIT_TIMER)) {
                    port.output.admitted();
                }
                self.transmit(index(LIMIT_TIMER));
            }
            INPUT.. => {
                if let Some(port) = self.ports.get_mut(index(INPUT)) {
                    port.input.readable();
                }
                self.receive(index(INPUT));
                if let Some(port) = self.ports.get_mut(index(INPUT)) {
                    port.input.pause();
                }
            }
            RETRY_TIMER.. => {
                if let Some(port) = self.ports.get_mut(index(RETRY_TIMER)) {
                    port.output.retry();
                }
                // What a stream has left in the queue.
                self.transmit(index(RETRY_TIMER));
            }
            _ => match Role::of(token as u16) {
                Role::Receive(port) => self.room(port),
                Role::Transmit(port) => self.transmit(port),
                Role::ControlReceive => self.tell(),
                Role::ControlTransmit => self.hear(),
            },
        }
    }

    fn stop(&mut self) -> Vec<Queue> {
        // What the writer does not take now is kept; input that is not read yet is still its sender's.
        self.ports.iter_mut().for_each(|port| port.output.flush());
        self.running.take().map(Running::stop).unwrap_or_default()
    }

    fn reset(&mut self) {
        self.ports.iter_mut().for_each(Port::forget);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Console(State { ports: self.ports.iter().map(Port::save).collect() })
    }
}

/// [`Console`] as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    ports: Vec<port::State>,
}

/// What a console has done since it was built.
#[derive(Debug, Default)]
pub struct Counters {
    pub input_bytes: AtomicU64,
    pub output_bytes: AtomicU64,
    /// Output that nobody took in time.
    pub lost_bytes: AtomicU64,
}

/// The queues for control messages (5.3.2), which stand between those of the first port and those of the second.
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;

/// Tokens of the ports' own descriptors, those of the first port; a queue's token is its index.
const RETRY_TIMER: u32 = 0x100;
const INPUT: u32 = 0x200;
const LIMIT_TIMER: u32 = 0x300;

const _: () = assert!(queues(MAX_FURTHER_PORTS + 1) < RETRY_TIMER as usize);

/// How many queues a device of so many ports has.
const fn queues(ports: usize) -> usize {
    if ports > 1 { 2 * ports + 2 } else { 2 }
}

fn receive_queue(port: usize) -> u16 {
    if port == 0 { 0 } else { 2 * port as u16 + 2 }
}

fn transmit_queue(port: usize) -> u16 {
    receive_queue(port) + 1
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Receive(usize),
    Transmit(usize),
    ControlReceive,
    ControlTransmit,
}

impl Role {
    fn of(queue: u16) -> Role {
        match queue {
            CONTROL_RECEIVE => Role::ControlReceive,
            CONTROL_TRANSMIT => Role::ControlTransmit,
            _ => {
                let port = usize::from(if queue > CONTROL_TRANSMIT { queue / 2 - 1 } else { 0 });
                if queue.is_multiple_of(2) { Role::Receive(port) } else { Role::Transmit(port) }
            }
        }
    }
}

#[cfg(test)]
mod tests;
