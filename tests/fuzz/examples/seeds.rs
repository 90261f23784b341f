//! Writes the inputs that the fuzz targets begin with into corpus/: `cargo run --example seeds`. They are committed; run
//! this again when a target reads its bytes another way.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use agent::protocol::{Exit, Frame, FromGuest, Size, ToGuest};
use berth_fuzz::saved_state::{KINDS, balloon, blk, console, mem, net, pmem, rng, vsock};
use devices::backend::qcow2::testing::Blank;
use devices::testing::FakeHost;
use devices::virtio::dead::Dead;
use devices::virtio::pci::Pci;
use devices::virtio::testing;
use devices::virtio::transport::SharedDevice;

fn main() {
    for (target, name, data) in seeds() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(name), data).unwrap();
    }
}

type Seed = (&'static str, &'static str, Vec<u8>);

fn seeds() -> Vec<Seed> {
    let mut seeds = vec![
        ("queue", "chain", queue(false)),
        ("queue", "indirect", queue(true)),
        ("blk_request", "read-write-flush-id", blk_requests(0)),
        ("blk_request", "read-only", blk_requests(1)),
        ("blk_request", "read-end", blk_end(0x80)),
        ("blk_request", "write-end", blk_end(1)),
        ("blk_request", "discard-end", blk_end(11)),
        ("blk_request", "zeroes-end", blk_end(13)),
        ("blk_request", "broken", hostile(&[0])),
        ("blk_request", "limited", blk_requests(12)),
        ("blk_request", "direct", blk_requests(16 | 64)),
        ("blk_request", "two-queues", blk_requests(12 | 16 | 32)),
        ("rng", "requests", rng_requests(0)),
        ("rng", "limited", rng_requests(12)),
        ("rng", "broken", hostile(&[0])),
        ("console", "in-and-out", console_in_and_out(0)),
        ("console", "typed", console_in_and_out(1)),
        ("console", "ports", console_of_ports(2)),
        ("console", "broken", hostile(&[0])),
        ("console", "broken-ports", hostile(&[2])),
        ("net", "mergeable", net_both_ways(1)),
        ("net", "plain", net_both_ways(0)),
        ("net", "limited", net_both_ways(13)),
        ("net", "pairs", net_pairs()),
        ("net", "broken", hostile(&[3])),
        ("net", "neighbour", net_both_ways(17)),
        ("metadata", "get", metadata(b"GET /a/b HTTP/1.1\r\nAccept: application/json\r\n\r\n")),
        (
            "metadata",
            "token",
            metadata(b"PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n"),
        ),
        ("metadata", "large", metadata(b"GET /long HTTP/1.0\r\n\r\n")),
        ("metadata", "frames", metadata_frames()),
        ("qcow2", "alone", qcow2(0)),
        ("qcow2", "large-clusters", qcow2(3)),
        ("qcow2", "over-raw", qcow2(4 | 8)),
        ("qcow2", "over-qcow2", qcow2(1 | 4 | 8 | 0x10)),
        ("qcow2", "read-only", qcow2(0x20)),
        ("qcow2", "patched", qcow2_patched()),
        ("qcow2", "whole", qcow2_whole()),
        ("pmem", "flush", pmem_flushes(0)),
        ("pmem", "limited", pmem_flushes(12)),
        ("pmem", "broken", hostile(&[0])),
        ("balloon", "all-queues", balloon_requests(0x3e)),
        ("balloon", "reports-only", balloon_requests(0x20)),
        ("balloon", "huge", balloon_requests(0xbe)),
        ("balloon", "broken", hostile(&[0x3e])),
        ("mem", "plug-and-unplug", mem_requests(0)),
        ("mem", "answers-in-the-region", mem_requests(0x80)),
        ("mem", "trouble", mem_trouble()),
        ("mem", "broken", hostile(&[])),
        ("vsock", "host-calls", vsock_host_calls()),
        ("vsock", "guest-calls", vsock_guest_calls()),
        ("vsock", "broken", hostile(&[])),
        ("ports", "uart", ports_uart()),
        ("ports", "others", ports_others()),
        ("pci_config", "scan", pci_scan()),
        ("kernel_loader", "bzimage", bzimage()),
        ("kernel_loader", "elf", elf(false)),
        ("kernel_loader", "elf-pvh", elf(true)),
    ];
    seeds.extend(http());
    seeds.extend(json());
    seeds.extend(saved_states());
    for (kind, name) in (0..KINDS).zip(["console", "rng", "blk", "net", "vsock", "balloon", "pmem", "mem"]) {
        seeds.push(("virtio_pci", name, [&[kind], &pci_driver()[..]].concat()));
        seeds.push(("virtio_mmio", name, [&[kind], &mmio_driver()[..]].concat()));
    }
    seeds.push(("vhost_user", "introduction", introduction()));
    seeds.extend(agent());
    seeds.extend(fleet());
    seeds
}

/// Requests, replies, and frames of both directions; an archive whole, hostile and broken.
fn agent() -> Vec<Seed> {
    let exec = r#"{"exec":{"argv":["sh"],"environment":{"K":"V"},"directory":"/","user":"root","terminal":{"rows":24,"columns":80}}}"#;
    let pack = r#"{"pack":{"path":"/etc/hosts","name":"copy"}}"#;
    let frames = [
        ToGuest::Stdin(b"words".into()).frame(),
        ToGuest::Window(Size { rows: 24, columns: 80 }).frame(),
        ToGuest::Signal(15).frame(),
        ToGuest::StdinEnd.frame(),
        FromGuest::Stderr(b"words".into()).frame(),
        FromGuest::Exit(Exit::Signal(9)).frame(),
    ];
    let frames: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
    let archive = |path: &str, name: &str| {
        let mut archive = Vec::new();
        // One of what is missing says so.
        let _ = agent::files::pack(Path::new(path), Path::new(name), agent::files::Owners::Kept, &mut archive);
        archive
    };
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/src/input.rs");
    vec![
        ("agent_protocol", "exec", format!("\x01{exec}\n").into_bytes()),
        ("agent_protocol", "pack", format!("\x01{pack}\n").into_bytes()),
        ("agent_protocol", "ping", b"\x01{\"ping\":{}}\n{\"shut_down\":{}}\n".to_vec()),
        ("agent_protocol", "pong", b"\x02{\"ok\":{\"version\":\"1\",\"root_is_ready\":true}}\n".to_vec()),
        ("agent_protocol", "frames", [&[7 << 2][..], &frames].concat()),
        ("agent_files", "file", archive(file, "a/b")),
        ("agent_files", "hostile", archive(file, "../outside/secret")),
        ("agent_files", "broken", archive("/missing", "a")),
    ]
}

/// Connections of the daemon's clients, what it answers, and its files.
fn fleet() -> Vec<Seed> {
    let request = |method: &str, target: &str, body: &str| {
        let length = body.len();
        format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}")
    };
    let create = r#"{"name":"web","image":"debian","cpus":2,"memory_mib":512,"command_line":"quiet","network":true,
        "restart":"on-failure","limits":{"cpu_percent":150,"cpu_weight":1,"io_weight":100},"remove_when_ended":false}"#;
    let guests = [
        request("POST", "/guests", create),
        request("PATCH", "/guests/web", r#"{"cpus":1,"memory_mib":64,"restart":"always","limits":{}}"#),
        request("POST", "/guests/web/stop", r#"{"seconds":5}"#),
        request("DELETE", "/guests/web?force=true", ""),
        request("GET", "/version", ""),
        request("GET", "/guests/web/logs?of=vmm&follow=true", ""),
    ];
    let images = [
        request("PUT", "/images/debian/parts/disk", "the disk"),
        request("PUT", "/images/debian", r#"{"command_line":"root=/dev/vda"}"#),
        request("PUT", "/images/debian/parts/initrd", "not read"),
    ];
    let upgrade = "GET /guests/web/vsock/1?wait=60 HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: berth\r\n\r\nearly";
    let ok = |kind: &str, body: &str| {
        let length = body.len();
        format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n{body}")
    };
    let chunked = |pieces: &[&str]| {
        let pieces = pieces.iter().map(|piece| format!("{:x}\r\n{piece}\r\n", piece.len())).collect::<String>();
        format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{pieces}0\r\n\r\n")
    };
    let event = r#"{"number":1,"at":1.5,"what":"running","id":"0123456789ab","name":"web"}"#;
    let fault = "HTTP/1.1 404 Not Found\r\nContent-Length: 22\r\n\r\n{\"fault_message\":\"no\"}";
    let record = r#"{"format":1,"id":"0123456789ab","name":"web","owner":1000,"created_at":1.5,"image":"debian","cpus":1,
        "memory_mib":512,"command_line":"quiet","restart":"always","limits":{"io_weight":1},"remove_when_ended":true,
        "uid":70000,"address":"10.87.0.2","state":"starting-again","process":{"pid":7,"start_ticks":9,"boot_id":"a"},
        "started_at":2.5,"started_memory_mib":512,"restarts":1,"streak":1,"restart_at":3.5,
        "last_end":{"at":2.5,"outcome":"jail-violated","reason":"a call"}}"#;
    let config = "max_guests = 7\nsocket = \"/run/socket\"\nuid_first = 70000\ncontrol_group = \"a/b\"\n\
                  [network]\naddress = \"10.0.0.1\"\nprefix = 24\ndns = [\"9.9.9.9\"]\n[programs]\nvmm = \"/vmm\"\n";
    let image = r#"{"owner":1000,"command_line":"root=/dev/vda","created_at":1.5}"#;
    let seed = |target, name, first: &str, rest: &str| (target, name, [first, rest].concat().into_bytes());
    vec![
        seed("fleet_requests", "guests", "", &guests.concat()),
        seed("fleet_requests", "images", "", &images.concat()),
        seed("fleet_requests", "upgrade", "", upgrade),
        seed("fleet_replies", "version", "\x00", &ok("application/json", r#"{"version":"1","pid":7}"#)),
        seed("fleet_replies", "guests", "\x01", &ok("application/json", r#"{"items":[]}"#)),
        seed("fleet_replies", "upgraded", "\x03", "HTTP/1.1 101 Switching Protocols\r\n\r\nsaid"),
        seed("fleet_replies", "events", "\x04", &chunked(&[event, "\n", event, "\n"])),
        seed("fleet_replies", "refused", "\x05", fault),
        seed("fleet_replies", "log", "\x06", &chunked(&["first ", &"x".repeat(300)])),
        seed("fleet_files", "record", "\x00", record),
        seed("fleet_files", "config", "\x01", config),
        seed("fleet_files", "image", "\x02", image),
        seed("fleet_files", "lists", "\x03", r#"{"items":[]}"#),
    ]
}

/// Each operation at each end of the disk, then opened again and read.
fn qcow2(flags: u8) -> Vec<u8> {
    [&[flags, 0][..], &qcow2_operations()].concat()
}

fn qcow2_operations() -> Vec<u8> {
    let operation = |kind: u8, at: u16, len: u8| [&[kind][..], &at.to_le_bytes(), &[len]].concat();
    let mut all = Vec::new();
    for end in [0, 0x80] {
        for (kind, at, len) in
            [(2, 0, 1), (2, 30, 100), (0, 0, 127), (5, 32, 8), (6, 40, 9), (7, 50, 3), (8, 0, 0), (9, 0, 0), (0, 20, 90)]
        {
            all.extend(operation(kind | end, at, len));
        }
    }
    all
}

/// A size that is another one, and an entry of the L1 table.
fn qcow2_patched() -> Vec<u8> {
    let size = [&24_u16.to_le_bytes()[..], &[128], &(1_u64 << 17).to_le_bytes()].concat();
    let entry = [&1536_u16.to_le_bytes()[..], &[193, 2]].concat();
    [&[0, 2][..], &size, &entry, &qcow2_operations()].concat()
}

fn qcow2_whole() -> Vec<u8> {
    let image = Blank { cluster_bits: 9, size: 1 << 18, backing: None }.bytes();
    [&[0x40][..], &(image.len() as u16).to_le_bytes(), &image, &qcow2_operations()].concat()
}

/// What a back-end says of itself: features, protocol features, queues, configuration space; and that it confirms.
fn introduction() -> Vec<u8> {
    let reply = |request: u32, payload: &[u8]| {
        let header = [request, 0b101, payload.len() as u32].map(u32::to_ne_bytes).concat();
        [&header, payload].concat()
    };
    let number = |request, value: u64| reply(request, &value.to_ne_bytes());
    let confirmed = |request| number(request, 0);
    let mut said = [number(1, 1 << 30 | 1 << 32), number(15, 1 << 9 | 1 << 3 | 1), number(17, 1)].concat();
    said.extend(reply(24, &[0; 72]));
    said.extend([2, 5, 8, 10, 9, 13, 12, 18].map(confirmed).concat());
    said.chunks(100).flat_map(|piece| [&[piece.len() as u8][..], piece].concat()).collect()
}

fn http() -> Vec<Seed> {
    let get = "GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let put = "PUT /machine-config HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 35\r\n\r\n\
               {\"vcpu_count\":2,\"mem_size_mib\":256}\n";
    let odd = "PATCH http://host/vm HTTP/1.0\r\nConnection: keep-alive\r\nExpect: 100-continue\r\n\
               Content-Length: 2\r\n\r\n{}DELETE / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    [("get", get.to_string()), ("pipelined", format!("{get}{put}{get}")), ("odd", odd.to_string())]
        .map(|(name, text)| ("http", name, [&[7], text.as_bytes()].concat()))
        .into()
}

fn json() -> Vec<Seed> {
    let limiter = r#""rate_limiter":{"bandwidth":{"size":1,"one_time_burst":2,"refill_time":3},"ops":null}"#;
    let drive = format!(
        r#"{{"drive_id":"d","is_root_device":true,"path_on_host":"/d","cache_type":"Writeback",{limiter}}}"#
    );
    let config = format!(
        r#"{{"boot-source":{{"kernel_image_path":"/k"}},"machine-config":{{"vcpu_count":1,"mem_size_mib":128}},
            "drives":[{drive}],"entropy":{{{limiter}}}}}"#
    );
    let cpu = r#"{"kvm_capabilities":["!56"],"cpuid_modifiers":[{"leaf":"0x1","subleaf":"0x0","flags":0,
                  "modifiers":[{"register":"eax","bitmap":"0bx00100xx"}]}],"msr_modifiers":[{"addr":"0x10a","bitmap":"0b1"}]}"#;
    let bodies = [
        ("machine", 0, r#"{"vcpu_count":2,"mem_size_mib":256,"smt":true,"huge_pages":"2M"}"#),
        ("machine-patch", 1, r#"{"mem_size_mib":512}"#),
        ("boot", 2, r#"{"kernel_image_path":"/k","initrd_path":"/i","boot_args":"console=ttyS0"}"#),
        ("cpu", 3, cpu),
        ("drive", 4, &drive),
        ("drive-patch", 5, r#"{"drive_id":"d","path_on_host":"/e"}"#),
        (
            "network",
            6,
            r#"{"iface_id":"d","host_dev_name":"tap0","guest_mac":"06:00:ac:10:00:02","mtu":1500,"queue_pairs":2}"#,
        ),
        ("network-patch", 7, r#"{"iface_id":"d","rx_rate_limiter":{"ops":{"size":1,"refill_time":2}}}"#),
        ("pmem", 8, r#"{"id":"d","path_on_host":"/p","read_only":true}"#),
        ("pmem-patch", 9, r#"{"id":"d","rate_limiter":{"ops":{"size":1,"refill_time":2}}}"#),
        ("console", 10, r#"{"columns":80}"#),
        ("vsock", 11, r#"{"guest_cid":3,"uds_path":"/v"}"#),
        ("entropy", 12, "{}"),
        ("serial", 13, r#"{"serial_out_path":"/s"}"#),
        ("logger", 14, r#"{"level":"Debug","log_path":"/l","show_level":true}"#),
        ("metrics", 15, r#"{"metrics_path":"/m"}"#),
        ("action", 16, r#"{"action_type":"InstanceStart"}"#),
        ("vm", 17, r#"{"state":"Paused"}"#),
        ("mmds-config", 18, r#"{"network_interfaces":["d"],"version":"V2","ipv4_address":"169.254.1.2"}"#),
        ("mmds", 19, r#"{"a":{"b":[1,"c"]}}"#),
        ("mmds-patch", 20, r#"{"a":null}"#),
        (
            "balloon",
            21,
            r#"{"amount_mib":1,"deflate_on_oom":true,"stats_polling_interval_s":1,"free_page_hinting":true}"#,
        ),
        ("balloon-patch", 22, r#"{"amount_mib":1}"#),
        ("balloon-statistics", 23, r#"{"stats_polling_interval_s":1}"#),
        ("balloon-hinting", 24, r#"{"acknowledge_on_stop":false}"#),
        ("memory-hotplug", 25, r#"{"total_size_mib":1024,"slot_size_mib":128,"block_size_mib":2}"#),
        ("memory-hotplug-patch", 26, r#"{"requested_size_mib":512}"#),
        ("config-file", 27, &config),
    ];
    bodies.map(|(name, choice, body)| ("json", name, [&[choice], body.as_bytes()].concat())).into()
}

/// A connection, a request in two pieces, the answers, the end.
fn metadata(request: &[u8]) -> Vec<u8> {
    let (first, second) = request.split_at(7);
    let text = |text: &[u8]| [&[4, text.len() as u8], text].concat();
    [&[0, 3, 0xf8][..], &text(first), &text(second), &[0xf8, 5, 16, 0xf8, 5, 17, 0xf8, 12, 14]].concat()
}

/// ARP, another protocol, a connection that is called off, another driver.
fn metadata_frames() -> Vec<u8> {
    let arp = [&[0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 7, 10, 0, 0, 2][..], &[0; 6], &[169, 254, 169, 254]]
        .concat();
    [&[1, 1, arp.len() as u8][..], &arp, &[2, 17, 4, 1, 2, 3, 4, 0x13, 8, 0x15, 4, 8, 13, 3, 8, 12]].concat()
}

/// A descriptor as it is in a table.
fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
}

fn queue(indirect: bool) -> Vec<u8> {
    let (table, avail, used) = (0x000u32, 0x100u32, 0x140u32);
    let mut data = vec![4, 1]; // size 16, event index
    data.extend([table, avail, used].map(u32::to_le_bytes).concat());
    data.extend([0u16, 0, 3].map(u16::to_le_bytes).concat()); // next_avail, next_used, cut
    let chain =
        [descriptor(0x1000, 16, 1, 1), descriptor(0x2000, 512, 3, 2), descriptor(0x3000, 1, 2, 0)].concat();
    let mut ram = vec![0; 0x200];
    if indirect {
        ram[..16].copy_from_slice(&descriptor(0x1c0, 48, 4, 0));
        ram[0x1c0..0x1f0].copy_from_slice(&chain);
    } else {
        ram[..48].copy_from_slice(&chain);
    }
    ram[0x102] = 1; // one chain is available, at descriptor 0
    data.extend(ram);
    data
}

type Buffer = (u16, u16, bool);

/// Steps of a device machine: event index, the given bytes in memory, each chain added and served twice, the device
/// carried on in between.
fn chains(chains: &[(u8, &[Buffer])], memory: &[(u16, &[u8])]) -> Vec<u8> {
    let mut data = vec![1];
    for (address, bytes) in memory {
        data.push(1);
        data.extend(address.to_le_bytes());
        data.push(bytes.len() as u8);
        data.extend(*bytes);
    }
    for round in 0..2 {
        for (queue, buffers) in chains {
            data.extend([queue << 4 | 6, buffers.len() as u8]);
            for (address, len, writable) in *buffers {
                data.extend(address.to_le_bytes());
                data.extend((len | u16::from(*writable) << 15).to_le_bytes());
            }
            data.extend([4, queue << 4 | 5]);
        }
        data.push(if round == 0 { 9 } else { 10 });
    }
    data
}

fn rng_requests(flags: u8) -> Vec<u8> {
    let request: (u8, &[Buffer]) = (0, &[(0x2000, 64, true)]);
    [vec![flags], chains(&[request; 3], &[])].concat()
}

fn console_in_and_out(flags: u8) -> Vec<u8> {
    [vec![flags], chains(&[(0, &[(0x2000, 64, true)]), (1, &[(0x3000, 500, false)])], &[])].concat()
}

/// A driver that listens, says that it and its ports are there and open, and uses each.
fn console_of_ports(flags: u8) -> Vec<u8> {
    let message =
        |id: u32, event: u16| [&id.to_le_bytes()[..], &event.to_le_bytes(), &1u16.to_le_bytes()].concat();
    let said = [message(u32::MAX, 0), message(1, 3), message(2, 3), message(2, 6), message(1, 6)].concat();
    let listen: (u8, &[Buffer]) = (2, &[(0x4000, 64, true)]);
    let say = [0x3000, 0x3008, 0x3010, 0x3018, 0x3020].map(|address| [(address, 8, false)]);
    let mut all = vec![listen; 6];
    all.extend(say.iter().map(|message| (3, &message[..])));
    for queue in [0, 4, 6] {
        all.push((queue, &[(0x5000, 64, true)]));
        all.push((queue + 1, &[(0x6000, 500, false)]));
    }
    [vec![flags], chains(&all, &[(0x3000, &said)])].concat()
}

fn blk_requests(flags: u8) -> Vec<u8> {
    let header = |kind: u32, sector: u64| [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    let range =
        |sector: u64, sectors: u32| [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &[0; 4]].concat();
    let memory = [
        (0x2000, header(0, 0)),  // read
        (0x2010, header(1, 3)),  // write
        (0x2020, header(4, 0)),  // flush
        (0x2030, header(8, 0)),  // serial number
        (0x2040, header(11, 0)), // discard
        (0x2050, header(13, 0)), // write zeroes
        (0x2060, range(8, 8)),
    ];
    let memory: Vec<(u16, &[u8])> = memory.iter().map(|(address, bytes)| (*address, &bytes[..])).collect();
    let status = (0x2100, 1, true);
    let data = chains(
        &[
            (0, &[(0x2000, 16, false), (0x3000, 512, true), status]),
            (0, &[(0x2010, 16, false), (0x3000, 512, false), (0x4000, 512, false), status]),
            (0, &[(0x2020, 16, false), status]),
            (0, &[(0x2030, 16, false), (0x3000, 20, true), status]),
            (0, &[(0x2040, 16, false), (0x2060, 16, false), status]),
            (0, &[(0x2050, 16, false), (0x2060, 16, false), status]),
        ],
        &memory,
    );
    [vec![flags], data].concat()
}

/// Room for what the guest is to get: eight buffers, in the first queue.
fn vsock_room() -> Vec<u8> {
    let mut data = vec![1];
    for buffer in 0..8u16 {
        data.extend([6, 1]);
        data.extend((0x8000 + 0x400 * buffer).to_le_bytes());
        data.extend((0x400u16 | 1 << 15).to_le_bytes());
    }
    data
}

/// A packet with its operation, ports, payload, flags and credit.
fn vsock_packet(op: u8, ports: u8, payload: u8, flags: u8) -> Vec<u8> {
    vec![1 << 4 | 13, op, ports, 0, 0, payload, flags, 0, 0x10, 4, 1 << 4 | 5, 5]
}

fn vsock_host_calls() -> Vec<u8> {
    let steps = [
        vsock_room(),
        vec![12, 0, 4, 5],
        vsock_packet(2, 5, 0, 0),
        vec![12, 5, 12, 1, 4, 5],
        vsock_packet(5, 5, 100, 0),
        vec![12, 5, 12, 9, 4, 5],
        vsock_packet(4, 5, 0, 3),
        vec![9, 4, 10, 4],
    ];
    steps.concat()
}

fn vsock_guest_calls() -> Vec<u8> {
    let steps = [
        vsock_room(),
        vsock_packet(1, 1, 0, 0),
        vsock_packet(5, 1, 200, 0),
        vec![12, 4, 4, 5],
        vsock_packet(6, 1, 0, 0),
        vsock_packet(7, 1, 0, 0),
        vec![12, 11, 4, 5],
        vsock_packet(3, 1, 0, 0),
    ];
    steps.concat()
}

/// One request at the end of the disk: short, so that a change is likely to matter.
fn blk_end(kind: u8) -> Vec<u8> {
    vec![0, 1, 11, kind, (-1i8) as u8, 1, 4, 5]
}

/// A loop of descriptors, a head beyond the table, an index beyond the queue, each followed by a new beginning.
fn hostile(prefix: &[u8]) -> Vec<u8> {
    let mut data = [prefix, &[0]].concat();
    let set = |index: u8, flags: u16, next: u16| {
        let raw =
            [&0x2000u32.to_le_bytes()[..], &64u32.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        [vec![0, index], raw.concat()].concat()
    };
    data.extend([set(0, 1, 1), set(1, 1, 0), vec![2, 0, 0, 4, 10]].concat());
    data.extend([2, 16, 0, 4, 10]);
    data.extend([3, 0x40, 0x01, 7, 4, 9, 4, 10]);
    data
}

/// Room for all that waits, and frames of which some are malformed.
fn net_both_ways(flags: u8) -> Vec<u8> {
    let room: (u8, &[Buffer]) = (0, &[(0x4000, 0x3000, true)]);
    let small: (u8, &[Buffer]) = (0, &[(0x4000, 100, true), (0x5000, 1500, true)]);
    let frame: (u8, &[Buffer]) = (1, &[(0x2000, 12, false), (0x2010, 60, false)]);
    let header = [1, 1, 54, 0, 20, 0, 34, 0, 16, 0, 0, 0];
    let memory: [(u16, &[u8]); 1] = [(0x2000, &header)];
    [vec![flags], chains(&[room, frame, small, frame, room, room], &memory)].concat()
}

/// Flushes, one of them without room for its answer, and a request that is none.
fn pmem_flushes(flags: u8) -> Vec<u8> {
    let flush: (u8, &[Buffer]) = (0, &[(0x2000, 4, false), (0x2100, 4, true)]);
    let mute: (u8, &[Buffer]) = (0, &[(0x2000, 4, false)]);
    let other: (u8, &[Buffer]) = (0, &[(0x2200, 4, false), (0x2100, 4, true)]);
    let memory: [(u16, &[u8]); 2] = [(0x2000, &[0; 4]), (0x2200, &[1, 0, 0, 0])];
    [vec![flags], chains(&[flush, mute, other, flush], &memory)].concat()
}

/// Pages into the balloon and out of it, numbers, a run of hints, a report: some of it RAM.
fn balloon_requests(flags: u8) -> Vec<u8> {
    let pages: (u8, &[Buffer]) = (0, &[(0x2000, 16, false)]);
    let back: (u8, &[Buffer]) = (1, &[(0x2000, 16, false)]);
    let numbers: (u8, &[Buffer]) = (2, &[(0x2010, 20, false), (0x3000, 4096, true)]);
    let begin: (u8, &[Buffer]) = (3, &[(0x2030, 4, false)]);
    let free: (u8, &[Buffer]) = (3, &[(0x4000, 0x2000, true), (0xb000, 0x2000, true)]);
    let end: (u8, &[Buffer]) = (3, &[(0x2034, 4, false)]);
    let report: (u8, &[Buffer]) = (4, &[(0x6000, 0x1000, true), (0x7001, 0x1000, true)]);
    let memory: [(u16, &[u8]); 3] = [
        (0x2000, &[3, 0, 0, 0, 5, 0, 0, 0, 4, 0, 0, 0, 0xff, 0, 0, 0]),
        (0x2010, &[4, 0, 1, 0, 0, 0, 0, 0, 0, 0, 5, 0, 2, 0, 0, 0, 0, 0, 0, 0]),
        (0x2030, &[2, 0, 0, 0, 0, 0, 0, 0]),
    ];
    let steps = chains(&[pages, back, numbers, begin, free, end, report], &memory);
    // Event index, and a run of hints is asked for before anything else.
    let (first, rest) = steps.split_at(1);
    [&[flags][..], first, &[12, 0x81, 12, 3], rest].concat()
}

/// A request for so many blocks from this one on, and its answer.
fn mem_request(kind: u8, first: u8, blocks: u8) -> Vec<u8> {
    vec![14, kind, first + 1, blocks, 4, 5]
}

/// All kinds of requests, right and wrong, with a device that is built again in the middle.
fn mem_requests(answer: u8) -> Vec<u8> {
    let ask = |kind, first, blocks| mem_request(answer | kind, first, blocks);
    let steps = [
        vec![1, 12, 12],
        ask(0, 0, 6),
        ask(0, 8, 4),
        ask(0, 7, 9),
        ask(3, 0, 16),
        ask(1, 2, 3),
        vec![12, 0xe0, 9, 12, 5],
        ask(3, 2, 3),
        ask(1, 5, 1),
        ask(0, 3, 2),
        ask(2, 0, 0),
        vec![12, 0xe0, 10],
        ask(0, 0, 1),
    ];
    steps.concat()
}

/// A host that can do one thing less after the other.
fn mem_trouble() -> Vec<u8> {
    let mut data = vec![1, 12, 16];
    for trouble in [0x61, 0x60, 0xa1, 0xa0, 0x81, 0x80] {
        data.extend([12, trouble]);
        data.extend([mem_request(0, 0, 5), mem_request(1, 0, 4), mem_request(1, 4, 1)].concat());
        data.extend([12, 0xe0]);
    }
    data
}

/// Two queue pairs, enabled by a command; then both are used.
fn net_pairs() -> Vec<u8> {
    let command: (u8, &[Buffer]) = (4, &[(0x2000, 4, false), (0x2100, 1, true)]);
    let room: (u8, &[Buffer]) = (2, &[(0x4000, 0x3000, true)]);
    let frame: (u8, &[Buffer]) = (3, &[(0x2200, 80, false)]);
    let memory: [(u16, &[u8]); 1] = [(0x2000, &[4, 0, 2, 0])];
    [vec![3], chains(&[command, room, frame, room, command], &memory)].concat()
}

/// Interrupts on, some typing, both read, saved in the middle of it; the loopback, the divisor.
fn ports_uart() -> Vec<u8> {
    let write = |register: u8, value: u8| [0, register, value];
    let read = |register: u8| [4, register];
    let typing = [6, 3, b'a', b'b', b'c'];
    let mut data = [write(3, 3), write(1, 3), write(0, b'x')].concat();
    data.extend([&typing[..], &read(2), &read(0), &[7], &read(2), &read(0), &read(5), &read(2)].concat());
    data.extend([write(4, 0x13), write(0, b'y'), write(3, 0x83), write(0, 1), write(1, 0)].concat());
    data.extend([read(0), read(2), read(6), read(7)].concat());
    data.push(7);
    data
}

/// The keyboard listens and has Ctrl-Alt-Del typed; the time is read and set; events are read; off and on.
fn ports_others() -> Vec<u8> {
    let write = |chip: u8, offset: u8, value: u8| [chip << 3, offset, value];
    let read = |chip: u8, offset: u8| [chip << 3 | 4, offset];
    let mut data = [write(1, 4, 0x60), write(1, 0, 0x45), write(1, 0, 0xf2)].concat();
    data.extend([&[6, 0, 7][..], &read(1, 4), &read(1, 0), &read(1, 0)].concat());
    for register in [0x00, 0x04, 0x07, 0x09, 0x32, 0x0a, 0x0b, 0x0c, 0x0d] {
        data.extend([&write(2, 0, register)[..], &read(2, 1)].concat());
    }
    data.extend([write(2, 0, 0x0b), write(2, 1, 0x82), write(2, 0, 0x07), write(2, 1, 0x31)].concat());
    data.extend([write(2, 0, 0x0b), write(2, 1, 0x02)].concat());
    data.extend(
        [&[2 << 6 | 3 << 3 | 4, 4][..], &write(3, 0, 0x34), &write(3, 2, 1), &write(4, 0, 1)].concat(),
    );
    data.extend([&write(1, 4, 0xfe)[..], &[7]].concat());
    data
}

fn pci_scan() -> Vec<u8> {
    let mut data = Vec::new();
    for register in (0..0x80u32).step_by(4) {
        data.push(2 << 6);
        data.extend((1 << 15 | register).to_le_bytes());
    }
    for bar in 0..6u16 {
        // All ones, read back, an address.
        data.push(2 << 6 | 4);
        data.extend((0x10 + 4 * bar).to_le_bytes());
        data.extend(u64::MAX.to_le_bytes());
        data.push(2 << 6);
        data.extend(((1 << 15) + 0x10 + u32::from(4 * bar)).to_le_bytes());
        data.push(2 << 6 | 4);
        data.extend((0x10 + 4 * bar).to_le_bytes());
        data.extend(0xd000_0000u64.to_le_bytes());
    }
    data.extend([2, 4, 0, 6, 7, 2 << 6 | 6, 0xff, 0, 0, 0, 0]); // decode, carry on, write to the window
    data
}

fn pci_driver() -> Vec<u8> {
    let mut data = Vec::new();
    let mut write = |width: u8, offset: u16, value: u64| {
        data.push(width << 6 | 1);
        data.extend(offset.to_le_bytes());
        data.extend(value.to_le_bytes());
    };
    for status in [1, 3] {
        write(0, 0x14, status);
    }
    for (select, features) in [(0, 0x3000_0000), (1, 1)] {
        write(2, 0x08, select);
        write(2, 0x0c, features);
    }
    write(0, 0x14, 11);
    write(1, 0x16, 0);
    write(1, 0x18, 16);
    write(1, 0x1a, 1);
    for (offset, ring) in [(0x20, 0x100), (0x28, 0x200), (0x30, 0x240)] {
        write(2, offset, ring);
        write(2, offset + 4, 0);
    }
    write(1, 0x1c, 1);
    // The vector of the table's second entry.
    for (offset, value) in [(0x10, 0xfee0_0000), (0x14, 0), (0x18, 0x41), (0x1c, 0)] {
        write(2, 0x4000 + offset, value);
    }
    write(0, 0x14, 15);
    data.extend(chain_in_memory());
    data.push(2 << 6 | 1);
    data.extend(0x3000u16.to_le_bytes());
    data.extend(0u64.to_le_bytes());
    data.extend([5, 7, 5]);
    data
}

/// Steps that put one writable buffer into the rings at 0x100, 0x200 and 0x240.
fn chain_in_memory() -> Vec<u8> {
    let table = [vec![4, 0x00, 0x01, 16], descriptor(0x1000, 64, 2, 0)].concat();
    [table, vec![4, 0x00, 0x02, 6, 0, 0, 1, 0, 0, 0]].concat()
}

fn mmio_driver() -> Vec<u8> {
    let mut data = Vec::new();
    let mut write = |offset: u16, value: u32| {
        data.push(2 << 6 | 1);
        data.extend(offset.to_le_bytes());
        data.extend(value.to_le_bytes());
    };
    for (offset, value) in [
        (0x70, 1),
        (0x70, 3),
        (0x24, 0),
        (0x20, 0x3000_0000),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        (0x30, 0),
        (0x38, 16),
        (0x80, 0x100),
        (0x90, 0x200),
        (0xa0, 0x240),
        (0x44, 1),
        (0x70, 15),
    ] {
        write(offset, value);
    }
    data.extend(chain_in_memory());
    data.extend([2 << 6 | 1, 0x50, 0, 0, 0, 0, 0, 5, 7, 5]);
    data
}

/// The kernel's code: more than the 64-bit entry needs.
const CODE_BYTES: usize = 0x300;

fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 0x400 + CODE_BYTES];
    let mut put = |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x1f4, &(CODE_BYTES as u32 / 16).to_le_bytes()); // syssize
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes()); // version
    put(0x211, &[1]); // loadflags
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(0x236, &1u16.to_le_bytes()); // xloadflags
    put(0x238, &2047u32.to_le_bytes()); // cmdline_size
    put(0x258, &0x100_0000u64.to_le_bytes()); // pref_address
    put(0x260, &0x10_0000u32.to_le_bytes()); // init_size
    [vec![0], image].concat()
}

fn elf(pvh: bool) -> Vec<u8> {
    let mut header = b"\x7fELF\x02\x01\x01".to_vec();
    header.resize(16, 0);
    header.extend([2u16, 62].map(u16::to_le_bytes).concat()); // ET_EXEC, EM_X86_64
    header.extend(1u32.to_le_bytes());
    header.extend([0x100_0000u64, 64, 0].map(u64::to_le_bytes).concat()); // entry, program headers
    header.extend(0u32.to_le_bytes());
    header.extend([64u16, 56, 2, 64, 0, 0].map(u16::to_le_bytes).concat());
    let program = |kind: u32, offset: u64, address: u64, file: u64, memory: u64| {
        let numbers = [offset, address, address, file, memory, 16].map(u64::to_le_bytes).concat();
        [kind.to_le_bytes().to_vec(), 7u32.to_le_bytes().to_vec(), numbers].concat()
    };
    let note = [4u32, 4, 18].map(u32::to_le_bytes).concat(); // XEN_ELFNOTE_PHYS32_ENTRY
    let note = [note, b"Xen\0".to_vec(), 0x100_0010u32.to_le_bytes().to_vec()].concat();
    let kind = if pvh { 4 } else { 0 }; // PT_NOTE or PT_NULL
    let load = program(1, 0x100, 0x100_0000, CODE_BYTES as u64, 0x1_0000);
    let mut image =
        [header, load, program(kind, 0xb0, 0, note.len() as u64, note.len() as u64), note].concat();
    image.resize(0x100 + CODE_BYTES, 0xf4);
    [vec![0], image].concat()
}

fn saved_states() -> Vec<Seed> {
    let devices: [(&str, SharedDevice); 10] = [
        ("vhost-user-blk", Arc::new(Mutex::new(berth_fuzz::vhost_user::device(None)))),
        ("balloon", Arc::new(Mutex::new(balloon(None)))),
        ("blk", Arc::new(Mutex::new(blk(None)))),
        ("console", Arc::new(Mutex::new(console(None)))),
        ("rng", Arc::new(Mutex::new(rng(None)))),
        ("net", Arc::new(Mutex::new(net(None)))),
        ("pmem", Arc::new(Mutex::new(pmem(None)))),
        ("mem", Arc::new(Mutex::new(mem(None).unwrap()))),
        ("vsock", Arc::new(Mutex::new(vsock(None)))),
        ("dead", Arc::new(Mutex::new(Dead::of(&blk(None))))),
    ];
    let save = |(name, device)| {
        let host = Arc::new(FakeHost::new());
        let pci = Pci::new(device, host, testing::ram(1 << 16), None).unwrap();
        ("saved_state", name, postcard::to_stdvec(&pci.save()).unwrap())
    };
    devices.map(save).into()
}
