//! What a guest's programs send and get over its network is what the other side got and sent, whoever moves the packets,
//! whatever the transport, the number of queues and the size of packets: judged by iperf3, by checksums of what arrived, and
//! by what both kernels count as broken.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::process::{Command, Stdio};
use std::thread;

use api_socket::NetworkInterface;
use berth_tests::guest::tap::{Tap, host};
use berth_tests::guest::{Guest, Name, Setup, debian_drive, limits, md5, times};

/// The last is the largest of a tap.
const MTUS: [u16; 4] = [576, 1500, 9000, 65521];

/// A transfer in each direction, in MiB; in a soak run tens of them at each MTU.
const MIB: (u32, u32) = (1, 32);

/// Small ones take their time.
const MAX_DATAGRAMS: u32 = 10_000;

/// What a kernel counts when what has arrived is not what was sent.
const BROKEN: [&str; 5] =
    ["TcpInCsumErrors", "UdpInCsumErrors", "Udp6InCsumErrors", "IcmpInCsumErrors", "TcpInErrs"];

#[test]
fn streams_arrive_whole_at_every_mtu_on_one_queue_and_two_with_the_kernel_and_without() {
    streams(Name::Berth, 40, 0);
}

#[test]
fn streams_arrive_whole_at_every_mtu_on_one_queue_and_two_with_the_kernel_and_without_and_without_pci() {
    streams(Name::Firecracker, 44, 2);
}

/// On four interfaces of one guest. The short form has each with an MTU of its own, and the long form each with all.
fn streams(name: Name, first: u8, shift: usize) {
    let mut taps = Vec::new();
    let mut interfaces = Vec::new();
    for (number, (pairs, vhost)) in (first..).zip([(1, false), (2, false), (1, true), (2, true)]) {
        let options: &[&str] = if pairs > 1 { &["multi_queue"] } else { &[] };
        let tap = Tap::new(number, options);
        let settings = if vhost { tap.interface_with_vhost() } else { tap.interface() };
        interfaces.push(NetworkInterface { queue_pairs: Some(pairs), ..settings });
        taps.push(tap);
    }
    let drives = vec![debian_drive()];
    let setup = Setup { name, vcpus: 2, memory_mib: 256, drives, interfaces, ..Setup::default() };
    let mut guest = Guest::booted(setup);
    guest.mount_debian();
    // Where iperf3 keeps what it sends.
    guest.run("mount -t tmpfs tmp /debian/tmp");
    let before = broken_on_host();
    for (place, tap) in taps.iter().enumerate() {
        tap.set_up(&mut guest, &format!("eth{place}"), None);
    }
    for round in 0..times(1, MTUS.len() as u32) as usize {
        for (place, tap) in taps.iter().enumerate() {
            let mtu = MTUS[(place + round + shift) % MTUS.len()];
            tap.set_mtu(mtu);
            guest.run(&format!("ip link set eth{place} mtu {mtu}"));
            let port = 5000 + 20 * (4 * round + place) as u16;
            there_and_back(&mut guest, tap, port, &format!("eth{place} with an MTU of {mtu}"));
            let bytes = format!("{}M", times(MIB.0, MIB.1));
            // Datagrams as large as packets. What nobody has room for is lost, and what arrives is not broken.
            let datagram = u32::from(mtu.saturating_sub(28).min(65_000));
            let datagrams = (times(MIB.0, MIB.1) << 20).div_ceil(datagram).min(MAX_DATAGRAMS);
            for (port, options) in (port + 2..).zip([
                format!("-n {bytes} -P 2"),
                format!("-n {bytes} -P 2 -R"),
                format!("-u -b 50M -k {datagrams} -l {datagram}"),
                format!("-u -b 50M -k {datagrams} -l {datagram} -R"),
            ]) {
                iperf(&mut guest, tap, port, &options);
            }
        }
    }
    assert_eq!(broken_on_host(), before, "the host has seen broken packets");
    let seen = guest.run("chroot /debian nstat -asz");
    assert_eq!(broken(&seen), [0; BROKEN.len()], "the guest has seen broken packets: {seen}");
    for (place, tap) in taps.iter().enumerate() {
        let errors = "cat /sys/class/net/DEVICE/statistics/rx_errors /sys/class/net/DEVICE/statistics/tx_errors \
                      /sys/class/net/DEVICE/statistics/rx_crc_errors /sys/class/net/DEVICE/statistics/rx_frame_errors \
                      /sys/class/net/DEVICE/statistics/rx_length_errors";
        let zeros = "0\n".repeat(5);
        assert_eq!(guest.run(&errors.replace("DEVICE", &format!("eth{place}"))), zeros, "eth{place}");
        assert_eq!(host("sh", &["-c", &errors.replace("DEVICE", &tap.name())]), zeros, "{}", tap.name());
    }
    guest.power_off();
}

/// Random bytes from the guest to a program of the host, and the same ones from there to the guest.
#[track_caller]
fn there_and_back(guest: &mut Guest, tap: &Tap, port: u16, what: &str) {
    let bytes = times(MIB.0, MIB.1) << 20;
    guest.run(&format!("head -c {bytes} /dev/urandom > /run/words"));
    let sum = guest.run("md5sum < /run/words");
    let listener = TcpListener::bind((tap.host(), port)).unwrap();
    let server = thread::spawn(move || {
        let accept = || {
            let (stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(limits::COMMAND)).unwrap();
            stream.set_write_timeout(Some(limits::COMMAND)).unwrap();
            stream
        };
        let mut words = Vec::new();
        accept().read_to_end(&mut words).unwrap();
        let mut stream = accept();
        stream.write_all(&words).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        // Until the guest has all of it.
        let _ = stream.read_to_end(&mut Vec::new());
        words
    });
    guest.run(&format!("nc {} {port} < /run/words", tap.host()));
    let heard = guest.run(&format!("nc {} {port} < /dev/null | md5sum", tap.host()));
    assert_eq!(md5(&server.join().unwrap()), sum, "to the host, on {what}");
    assert_eq!(heard, sum, "to the guest, on {what}");
}

/// One run of iperf3 with the guest as the client; both ends must be content.
#[track_caller]
fn iperf(guest: &mut Guest, tap: &Tap, port: u16, options: &str) {
    let mut server = Command::new("iperf3")
        .args(["-s", "-1", "--forceflush", "-B", &tap.host(), "-p", &port.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(server.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("Server listening") {
        line.clear();
        assert!(said.read_line(&mut line).unwrap() > 0, "the server of iperf3 has ended");
    }
    let rest = thread::spawn(move || {
        let mut rest = String::new();
        let _ = said.read_to_string(&mut rest);
        rest
    });
    let told = guest.run(&format!("chroot /debian iperf3 -c {} -p {port} {options}", tap.host()));
    assert!(told.contains("iperf Done."), "{options}: {told}");
    let status = server.wait().unwrap();
    assert!(status.success(), "{options}: {status}: {}", rest.join().unwrap());
}

fn broken_on_host() -> [u64; BROKEN.len()] {
    broken(&host("nstat", &["-asz"]))
}

/// Of what nstat prints: a name, a number and a rate on each line.
fn broken(text: &str) -> [u64; BROKEN.len()] {
    BROKEN.map(|name| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let number = line.and_then(|line| line.split_whitespace().next());
        number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
    })
}
