//! A back-end for tests of the side that has the guest: it says of itself what the test wants, and does what it is told when
//! the test, or a thread of its own ([`Alone`]), has it do so.
//!
//! It does nothing with a request but give it back: what is in it, it does not look at.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use virtio_bindings::virtio_blk as spec;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use super::blk::{MAX_QUEUES, ring_bytes};
use super::message::{F_PROTOCOL_FEATURES, HEADER_BYTES, protocol, request};
use super::ring::BASE;
use crate::memory::GuestRam;

pub const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
pub const FLUSH: u64 = 1 << spec::VIRTIO_BLK_F_FLUSH;
pub const CAPACITY: u64 = 2048;

/// What a back-end is, before anybody has called it.
#[derive(Clone)]
pub struct Kind {
    pub features: u64,
    pub protocol: u64,
    pub queues: u64,
    pub capacity: u64,
    /// Said in place of the reply to the request.
    pub lie: Option<(u32, Vec<u8>)>,
}

impl Kind {
    /// One that has so many, and says so.
    pub fn of_queues(queues: u16) -> Kind {
        let mut kind = Kind { queues: queues.into(), ..Kind::default() };
        if queues > 1 {
            kind.features |= 1 << spec::VIRTIO_BLK_F_MQ;
        }
        kind
    }
}

impl Default for Kind {
    fn default() -> Kind {
        Kind {
            features: VERSION_1 | FLUSH | F_PROTOCOL_FEATURES,
            protocol: protocol::CONFIG | protocol::MQ | protocol::REPLY_ACK | protocol::BACKEND_REQ,
            queues: 4,
            capacity: CAPACITY,
            lie: None,
        }
    }
}

/// A back-end that does what the test says, in the test's thread or another.
pub struct Backend {
    pub kind: Kind,
    pub socket: UnixStream,
    pub rings_file: File,
    pub heard: Vec<u32>,
    /// Of the last SET_FEATURES.
    pub agreed: u64,
    /// Regions of the last memory table, and the descriptors that came with it.
    pub table: (u32, usize),
    pub rings: BTreeMap<u16, Given>,
    pub calls: Option<OwnedFd>,
    pub gone: bool,
}

#[derive(Default)]
pub struct Given {
    pub memory: Option<GuestRam>,
    pub size: u16,
    pub base: u32,
    pub places: [u64; 3],
    pub kick: Option<OwnedFd>,
    pub call: Option<OwnedFd>,
    pub next: u16,
    pub used: u16,
}

impl Backend {
    pub fn new(kind: Kind, socket: UnixStream, rings_file: File) -> Backend {
        socket.set_nonblocking(true).unwrap();
        let (heard, rings, table) = (Vec::new(), BTreeMap::new(), (0, 0));
        Backend { kind, socket, rings_file, heard, agreed: 0, table, rings, calls: None, gone: false }
    }

    /// Answers what was asked, until there is no more.
    pub fn talk(&mut self) {
        while let Some((request, flags, payload, files)) = self.message() {
            self.heard.push(request);
            let word = |at: usize| u32::from_ne_bytes(payload[4 * at..][..4].try_into().unwrap());
            let long = |at: usize| u64::from_ne_bytes(payload[at..][..8].try_into().unwrap());
            let number = |value: u64| Some(value.to_ne_bytes().to_vec());
            let reply = match request {
                request::GET_FEATURES => number(self.kind.features),
                request::GET_PROTOCOL_FEATURES => number(self.kind.protocol),
                request::GET_QUEUE_NUM => number(self.kind.queues),
                request::GET_CONFIG => {
                    let mut config = payload.clone();
                    config[12..20].copy_from_slice(&self.kind.capacity.to_le_bytes());
                    Some(config)
                }
                request::GET_VRING_BASE => {
                    let state = [word(0), self.ring(word(0)).next.into()].map(u32::to_ne_bytes).concat();
                    self.rings.remove(&(word(0) as u16));
                    Some(state)
                }
                request::SET_FEATURES => {
                    self.agreed = long(0);
                    None
                }
                request::SET_MEM_TABLE => {
                    self.table = (word(0), files.len());
                    None
                }
                request::SET_BACKEND_REQ_FD => {
                    self.calls = files.into_iter().next();
                    None
                }
                request::SET_VRING_NUM => {
                    self.ring(word(0)).size = word(1) as u16;
                    None
                }
                request::SET_VRING_BASE => {
                    self.ring(word(0)).base = word(1);
                    None
                }
                request::SET_VRING_ADDR => {
                    let memory = self.rings_memory();
                    let ring = self.rings.entry(word(0) as u16).or_default();
                    ring.places = [long(8), long(16), long(24)];
                    ring.memory = Some(memory);
                    None
                }
                request::SET_VRING_CALL => {
                    self.ring(word(0)).call = files.into_iter().next();
                    None
                }
                request::SET_VRING_KICK => {
                    self.ring(word(0)).kick = files.into_iter().next();
                    None
                }
                _ => None,
            };
            let confirm = (flags & 1 << 3 != 0).then(|| 0u64.to_ne_bytes().to_vec());
            let lie = self.kind.lie.as_ref().filter(|(about, _)| *about == request);
            let bytes = match (lie, reply.or(confirm)) {
                (Some((_, bytes)), _) => bytes.clone(),
                (None, Some(payload)) => answer(request, &payload),
                (None, None) => continue,
            };
            if self.socket.write_all(&bytes).is_err() {
                self.gone = true;
            }
        }
    }

    pub fn message(&mut self) -> Option<(u32, u32, Vec<u8>, Vec<OwnedFd>)> {
        let mut header = [0; HEADER_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got =
            recvmsg(&self.socket, &mut [IoSliceMut::new(&mut header)], &mut ancillary, RecvFlags::empty());
        match got {
            Ok(got) if got.bytes == HEADER_BYTES => {}
            Err(error) if error == rustix::io::Errno::WOULDBLOCK => return None,
            _ => {
                self.gone = true;
                return None;
            }
        }
        let files = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files.collect::<Vec<_>>()),
            _ => None,
        });
        let files = files.flatten().collect();
        let word = |at: usize| u32::from_ne_bytes(header[4 * at..][..4].try_into().unwrap());
        let mut payload = vec![0; word(2) as usize];
        self.socket.read_exact(&mut payload).unwrap();
        Some((word(0), word(1), payload, files))
    }

    pub fn ring(&mut self, index: u32) -> &mut Given {
        self.rings.entry(index as u16).or_default()
    }

    pub fn rings_memory(&self) -> GuestRam {
        let file = self.rings_file.try_clone().unwrap();
        let size = file.metadata().unwrap().len() as usize;
        let region = MmapRegion::from_file(FileOffset::new(file, 0), size).unwrap();
        GuestRam::from_regions(vec![GuestRegionMmap::new(region, GuestAddress(BASE)).unwrap()]).unwrap()
    }

    /// The requests that have come since the last call.
    pub fn take(&mut self, index: u16) -> Vec<u16> {
        let Some(ring) = self.rings.get_mut(&index).filter(|ring| ring.kick.is_some()) else {
            return Vec::new();
        };
        let memory = ring.memory.as_ref().unwrap();
        let available: u16 = memory.load(GuestAddress(ring.places[2] + 2), Ordering::SeqCst).unwrap();
        let mut heads = Vec::new();
        while ring.next != available {
            let slot = u64::from(ring.next % ring.size);
            heads.push(memory.read_obj(GuestAddress(ring.places[2] + 4 + 2 * slot)).unwrap());
            ring.next = ring.next.wrapping_add(1);
        }
        heads
    }

    /// Gives a request back, done or not.
    pub fn give_back(&mut self, index: u16, head: u32, written: u32) {
        let ring = self.rings.get_mut(&index).unwrap();
        let memory = ring.memory.as_ref().unwrap();
        let slot = u64::from(ring.used % ring.size);
        memory.write_obj([head, written], GuestAddress(ring.places[1] + 4 + 8 * slot)).unwrap();
        ring.used = ring.used.wrapping_add(1);
        self.set_used(index, self.rings[&index].used);
    }

    pub fn set_used(&mut self, index: u16, used: u16) {
        let ring = &self.rings[&index];
        let memory = ring.memory.as_ref().unwrap();
        memory.store(used, GuestAddress(ring.places[1] + 2), Ordering::SeqCst).unwrap();
        rustix::io::write(ring.call.as_ref().unwrap(), &1u64.to_ne_bytes()).unwrap();
    }

    /// Whether it was kicked since the last call.
    pub fn was_kicked(&self, index: u16) -> bool {
        rustix::io::read(self.rings[&index].kick.as_ref().unwrap(), &mut [0u8; 8]).is_ok()
    }
}

pub fn answer(request: u32, payload: &[u8]) -> Vec<u8> {
    let header = [request, 0b101, payload.len() as u32].map(u32::to_ne_bytes).concat();
    [&header, payload].concat()
}

/// Who calls a back-end finds it here, if it is there.
#[derive(Clone, Default)]
pub struct Place(Arc<Mutex<(bool, Vec<UnixStream>)>>);

impl Place {
    pub fn connect(&self) -> std::io::Result<UnixStream> {
        let mut place = self.0.lock().unwrap();
        if !place.0 {
            return Err(std::io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        place.1.push(theirs);
        Ok(ours)
    }

    pub fn open(&self, is_there: bool) {
        self.0.lock().unwrap().0 = is_there;
    }

    pub fn called(&self) -> Option<UnixStream> {
        self.0.lock().unwrap().1.pop()
    }
}

pub fn calls() -> (UnixStream, UnixStream) {
    let calls = UnixStream::pair().unwrap();
    calls.0.set_nonblocking(true).unwrap();
    calls
}

pub fn rings_file() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(ring_bytes(MAX_QUEUES)).unwrap();
    file
}

/// A back-end that lives by itself, and another one after it when it is called again.
pub struct Alone {
    pub place: Place,
    pub rings_file: File,
    work: Arc<Mutex<Work>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

struct Work {
    place: Place,
    rings_file: File,
    kind: Kind,
    backend: Option<Backend>,
    /// Turns in which there was something to do.
    done: u64,
    seen: u64,
}

/// How long its thread rests: others wait for it only where a device waits for its back-end.
const REST: Duration = Duration::from_micros(200);

impl Alone {
    pub fn new(kind: Kind) -> Alone {
        let (place, rings_file, end) = (Place::default(), rings_file(), Arc::<AtomicBool>::default());
        place.open(true);
        let file = rings_file.try_clone().unwrap();
        let work = Work { place: place.clone(), rings_file: file, kind, backend: None, done: 0, seen: 0 };
        let work = Arc::new(Mutex::new(work));
        let (theirs, ends) = (work.clone(), end.clone());
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::SeqCst) {
                theirs.lock().unwrap().turn();
                std::thread::sleep(REST);
            }
        });
        Alone { place, rings_file, work, end, thread: Some(thread) }
    }

    /// Does what there is to do. Says whether anything was done since the last call.
    pub fn work(&self) -> bool {
        let mut work = self.work.lock().unwrap();
        work.turn();
        let done = work.done;
        std::mem::replace(&mut work.seen, done) != done
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        self.thread.take().into_iter().for_each(|thread| thread.join().unwrap());
    }
}

impl Work {
    fn turn(&mut self) {
        if let Some(socket) = self.place.called() {
            self.backend =
                Some(Backend::new(self.kind.clone(), socket, self.rings_file.try_clone().unwrap()));
            self.done += 1;
        }
        let Some(backend) = &mut self.backend else { return };
        let before = backend.heard.len();
        backend.talk();
        let mut done = backend.heard.len() != before;
        for index in backend.rings.keys().copied().collect::<Vec<_>>() {
            for head in backend.take(index) {
                backend.give_back(index, head.into(), 0);
                done = true;
            }
        }
        self.done += u64::from(done);
    }
}
