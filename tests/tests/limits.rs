//! A limit holds: of a disk and of an interface, in each direction, of bytes and of requests. What a guest gets done is at
//! most the bucket's size and its extra tokens at once, then what the refill gives, and far more when the limit is lifted.
//! It is the VMM that counts, over a time that the test measures: nothing has to be fast.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use api_socket::{
    ActionType, Drive, DriveUpdate, NetworkInterface, NetworkInterfaceUpdate, RateLimiter, Request,
    TokenBucket,
};
use berth_tests::guest::setup::disk_drive;
use berth_tests::guest::tap::{Tap, host};
use berth_tests::guest::{Guest, Name, Setup, blank_disk, limits, times};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// So long that nothing comes back while a test runs.
const NEVER: u64 = 24 * 3_600_000;
const SECOND: u64 = 1000;

/// What is limited: so many at first, that is the bucket's size and the extra tokens; and so many in a second later. The
/// last is of how many one request is at most.
struct Amounts {
    size: u64,
    extra: u64,
    rate: u64,
    request: u64,
}

/// What moves through a limit of its own: its name, the metrics that count it, and what it is limited to.
struct Flow {
    name: String,
    group: String,
    keys: &'static [&'static str],
    amounts: Amounts,
    limit: fn(TokenBucket) -> RateLimiter,
    change: fn(&str, RateLimiter) -> Request,
}

fn bandwidth(bucket: TokenBucket) -> RateLimiter {
    RateLimiter { bandwidth: Some(bucket), ops: None }
}

fn ops(bucket: TokenBucket) -> RateLimiter {
    RateLimiter { bandwidth: None, ops: Some(bucket) }
}

impl Flow {
    /// The limit that it starts with: a burst, and then nothing.
    fn first(&self) -> RateLimiter {
        let one_time_burst = Some(self.amounts.extra);
        (self.limit)(TokenBucket { size: self.amounts.size, one_time_burst, refill_time: NEVER })
    }

    /// Changes its limit while it moves.
    fn set(&self, guest: &mut Guest, size: u64, refill_time: u64) {
        let limit = (self.limit)(TokenBucket { size, one_time_burst: None, refill_time });
        guest.apply((self.change)(&self.name, limit));
    }
}

/// How much each flow has moved since the VMM's start. What it wrote before is not read again: that would take longer than
/// what is measured.
struct Meter<'a> {
    flows: &'a [Flow],
    counts: Vec<u64>,
    read: usize,
}

impl Meter<'_> {
    fn read(&mut self, guest: &mut Guest) -> Vec<u64> {
        guest.apply(Request::Action(ActionType::FlushMetrics));
        let text = fs::read_to_string(guest.path("metrics")).unwrap();
        for line in text[self.read..].lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            for (flow, count) in self.flows.iter().zip(&mut self.counts) {
                let of = |key: &&str| line[&flow.group][key].as_u64().expect("a counter of this flow");
                *count += flow.keys.iter().map(of).sum::<u64>();
            }
        }
        self.read = text.len();
        self.counts.clone()
    }
}

/// Each flow is held as its limits say while all of them want more, and then no more, one after the other.
fn are_held(guest: &mut Guest, flows: &[Flow]) {
    let mut meter = Meter { flows, counts: vec![0; flows.len()], read: 0 };
    // What went before the load did counts for the burst.
    let (begin, mut before) = (Instant::now(), Vec::new());
    let all = |count: u64, amounts: &Amounts| count + amounts.request >= amounts.size + amounts.extra;
    let counts = loop {
        let now = meter.read(guest);
        if now == before && flows.iter().zip(&now).all(|(flow, count)| all(*count, &flow.amounts)) {
            break now;
        }
        assert!(begin.elapsed() < limits::COMMAND, "not all of the first burst went: {now:?}");
        before = now;
        sleep(Duration::from_millis(500));
    };
    for (flow, count) in flows.iter().zip(counts) {
        let Amounts { size, extra, request, .. } = flow.amounts;
        println!("{}: {count} where {size} and {extra} may go at once", flow.name);
        assert!(count <= size + extra + request, "{}: {count}, where {size} and {extra} may go", flow.name);
    }

    let seconds = times(3, 20);
    let before = meter.read(guest);
    let begin = Instant::now();
    flows.iter().for_each(|flow| flow.set(guest, flow.amounts.rate, SECOND));
    sleep(Duration::from_secs(seconds.into()));
    let slow: Vec<u64> = meter.read(guest).iter().zip(before).map(|(now, before)| now - before).collect();
    let elapsed = begin.elapsed();
    for (flow, count) in flows.iter().zip(&slow) {
        let Amounts { rate, request, .. } = flow.amounts;
        // The bucket is full at first.
        let most = rate + rate * elapsed.as_millis() as u64 * 3 / 2 / SECOND + request;
        println!("{}: {count} of at most {most} in {elapsed:?}", flow.name);
        assert!(*count <= most, "{}: {count} in {elapsed:?} at {rate} in a second", flow.name);
        assert!(*count >= 2 * rate, "{}: {count} in {elapsed:?} at {rate} in a second", flow.name);
    }

    for (place, (flow, slow)) in flows.iter().zip(slow).enumerate() {
        let before = meter.read(guest)[place];
        flow.set(guest, 0, 0);
        let begin = Instant::now();
        let (count, elapsed) = loop {
            let count = meter.read(guest)[place] - before;
            let elapsed = begin.elapsed();
            let held = flow.amounts.rate * (SECOND + elapsed.as_millis() as u64) / SECOND;
            if count > 2 * slow && count > 2 * held {
                break (count, elapsed);
            }
            assert!(elapsed < limits::COMMAND, "{}: {count} in {elapsed:?} without a limit", flow.name);
            sleep(Duration::from_millis(200));
        };
        println!("{}: {count} in {elapsed:?} without a limit", flow.name);
        // The others have the host for themselves.
        guest.run(&format!("touch /run/stop.{place}"));
    }
}

#[test]
fn a_disk_s_limits_hold_reads_and_writes_back_and_are_changed_under_load() {
    disks_are_held(Name::Berth);
}

#[test]
fn a_disk_s_limits_hold_reads_and_writes_back_and_are_changed_under_load_without_pci() {
    disks_are_held(Name::Firecracker);
}

fn disks_are_held(name: Name) {
    /// What the loads ask for at a time.
    const BLOCK: u64 = 64 << 10;
    let change = |id: &str, limit: RateLimiter| {
        Request::PatchDrive(DriveUpdate {
            drive_id: id.into(),
            path_on_host: None,
            rate_limiter: Some(limit),
        })
    };
    let bytes = || Amounts { size: 4 * BLOCK, extra: 12 * BLOCK, rate: 2 * BLOCK, request: BLOCK };
    // Its kernel looks for partitions first, in small requests.
    let requests = || Amounts { size: 20, extra: 40, rate: 5, request: 1 };
    let flow = |name: &str, keys, limit, amounts| Flow {
        name: name.into(),
        group: format!("block_{name}"),
        keys,
        amounts,
        limit,
        change,
    };
    const BYTES: &[&str] = &["read_bytes", "write_bytes"];
    const REQUESTS: &[&str] = &["read_count", "write_count", "flush_count"];
    let flows = [
        flow("read_bytes", BYTES, bandwidth as fn(TokenBucket) -> RateLimiter, bytes()),
        flow("write_bytes", BYTES, bandwidth, bytes()),
        flow("read_ops", REQUESTS, ops, requests()),
        flow("write_ops", REQUESTS, ops, requests()),
    ];
    let directory = tempfile::tempdir().unwrap();
    let drive = |flow: &Flow| {
        let path = blank_disk(directory.path().join(&flow.name), 16 * MIB);
        Drive { rate_limiter: Some(flow.first()), ..disk_drive(&flow.name, path) }
    };
    let drives = flows.iter().map(drive).collect();
    let arguments = ["--metrics-path", "metrics"].map(String::from).into();
    let mut guest = Guest::booted(Setup { name, drives, arguments, ..Setup::default() });
    for (place, what) in [
        "if=/dev/vda of=/dev/null bs=64k iflag=direct",
        "if=/dev/zero of=/dev/vdb bs=64k oflag=direct",
        "if=/dev/vdc of=/dev/null bs=4k iflag=direct",
        "if=/dev/zero of=/dev/vdd bs=4k oflag=direct",
    ]
    .into_iter()
    .enumerate()
    {
        guest.run(&format!(
            "(until [ -e /run/stop.{place} ]; do dd {what} count=256; done > /dev/null 2>&1 &)"
        ));
    }
    are_held(&mut guest, &flows);
    guest.run("while pidof dd; do sleep 0.1; done");
    guest.power_off();
}

#[test]
fn an_interface_s_limits_hold_packets_back_both_ways_and_are_changed_under_load() {
    interfaces_are_held(Name::Berth, 70);
}

#[test]
fn an_interface_s_limits_hold_packets_back_both_ways_and_are_changed_under_load_without_pci() {
    interfaces_are_held(Name::Firecracker, 74);
}

fn interfaces_are_held(name: Name, first: u8) {
    /// Of datagrams to the guest, and with their headers.
    const PACKET: usize = 1000;
    const FRAME: u64 = 1100;
    /// What the guest sends of a stream at a time, with its headers.
    const SEGMENT: u64 = 66_000;
    const PORT: u16 = 4000;
    fn to_guest(id: &str, limit: RateLimiter) -> Request {
        let iface_id = id.into();
        Request::PatchNetworkInterface(NetworkInterfaceUpdate {
            iface_id,
            rx_rate_limiter: Some(limit),
            tx_rate_limiter: None,
        })
    }
    fn to_host(id: &str, limit: RateLimiter) -> Request {
        let iface_id = id.into();
        Request::PatchNetworkInterface(NetworkInterfaceUpdate {
            iface_id,
            rx_rate_limiter: None,
            tx_rate_limiter: Some(limit),
        })
    }
    let sent = || Amounts { size: 3 * SEGMENT, extra: 6 * SEGMENT, rate: SEGMENT, request: SEGMENT };
    let received = || Amounts { size: 40_000, extra: 80_000, rate: 10_000, request: FRAME };
    let packets = || Amounts { size: 30, extra: 60, rate: 10, request: 1 };
    let taps: Vec<Tap> = (first..).take(4).map(|number| Tap::new(number, &[])).collect();
    let flow = |tap: &Tap, key: &'static [&'static str], change, limit, amounts| Flow {
        name: tap.name(),
        group: format!("net_{}", tap.name()),
        keys: key,
        amounts,
        limit,
        change,
    };
    let flows = [
        flow(
            &taps[0],
            &["tx_bytes_count"],
            to_host as fn(&str, RateLimiter) -> Request,
            bandwidth as fn(TokenBucket) -> RateLimiter,
            sent(),
        ),
        flow(&taps[1], &["tx_packets_count"], to_host, ops, packets()),
        flow(&taps[2], &["rx_bytes_count"], to_guest, bandwidth, received()),
        flow(&taps[3], &["rx_packets_count"], to_guest, ops, packets()),
    ];
    let interface = |(place, (tap, flow)): (usize, (&Tap, &Flow))| {
        let (rx_rate_limiter, tx_rate_limiter) =
            if place < 2 { (None, Some(flow.first())) } else { (Some(flow.first()), None) };
        NetworkInterface { rx_rate_limiter, tx_rate_limiter, ..tap.interface() }
    };
    let interfaces = taps.iter().zip(&flows).enumerate().map(interface).collect();
    let arguments = ["--metrics-path", "metrics"].map(String::from).into();
    let mut guest = Guest::booted(Setup { name, interfaces, arguments, ..Setup::default() });
    for (place, tap) in taps.iter().enumerate() {
        tap.set_up(&mut guest, &format!("eth{place}"), None);
        // No packet but those of the load has to come through.
        let mac = host("cat", &[&format!("/sys/class/net/{}/address", tap.name())]);
        guest.run(&format!("arp -i eth{place} -s {} {}", tap.host(), mac.trim()));
        let mac = tap.interface().guest_mac.unwrap().to_string();
        host(
            "ip",
            &["neigh", "replace", &tap.guest(), "lladdr", &mac, "dev", &tap.name(), "nud", "permanent"],
        );
    }
    for (place, tap) in taps[..2].iter().enumerate() {
        // Takes what comes.
        let listener = TcpListener::bind((tap.host(), PORT)).unwrap();
        thread::spawn(move || io::copy(&mut listener.accept()?.0, &mut io::sink()));
        guest.run(&format!(
            "(nc {} {PORT} < /dev/zero & until [ -e /run/stop.{place} ]; do sleep 0.2; done; kill $!) > /dev/null 2>&1 &",
            tap.host()
        ));
    }
    let stop = Arc::<AtomicBool>::default();
    let senders: Vec<_> = taps[2..]
        .iter()
        .map(|tap| {
            let (stop, from, to) = (Arc::clone(&stop), tap.host(), tap.guest());
            thread::spawn(move || {
                let socket = UdpSocket::bind((from, 0)).unwrap();
                while !stop.load(Ordering::SeqCst) {
                    for _ in 0..10 {
                        // What finds no room is dropped, which is no error of the sender's.
                        let _ = socket.send_to(&[0x55; PACKET], (&*to, 9));
                    }
                    sleep(Duration::from_millis(10));
                }
            })
        })
        .collect();
    are_held(&mut guest, &flows);
    stop.store(true, Ordering::SeqCst);
    senders.into_iter().for_each(|sender| sender.join().unwrap());
    guest.power_off();
}
