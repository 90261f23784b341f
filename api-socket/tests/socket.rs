//! Server and client over a real Unix socket, with a handler in place of a VMM.

#![allow(clippy::unwrap_used, clippy::panic, reason = "this whole file is a test")]

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use api_socket::counters::Counters;
use api_socket::server::MAX_CONNECTIONS;
use api_socket::*;
use vmm_sys_util::eventfd::EventFd;

/// Longer than anything here takes; a test that waits so long has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server on a thread of its own, stopped with its value.
struct Fixture {
    path: PathBuf,
    counters: Arc<Counters>,
    seen: Arc<Mutex<Vec<Request>>>,
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Fixture {
        Fixture::with(Limits::default())
    }

    fn with(limits: Limits) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.socket");
        let server = Server::bind(&path, limits).unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (counters, stop) = (server.counters(), server.stop_event().unwrap());
        let noted = seen.clone();
        let thread = std::thread::spawn(move || {
            server
                .run(|request| {
                    noted.lock().unwrap().push(request.clone());
                    answer(&request)
                })
                .unwrap();
        });
        Fixture { path, counters, seen, stop, thread: Some(thread), _dir: dir }
    }

    fn client(&self) -> Client {
        let mut client = Client::connect(&self.path).unwrap();
        client.set_timeout(Some(PATIENCE)).unwrap();
        client
    }

    fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    fn stop(&mut self) {
        self.stop.write(1).unwrap();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.stop();
    }
}

fn info() -> InstanceInfo {
    InstanceInfo {
        id: "guest".to_string(),
        state: InstanceState::NotStarted,
        vmm_version: "1.2.3".to_string(),
        app_name: "test".to_string(),
    }
}

fn answer(request: &Request) -> Reply {
    match request {
        Request::GetInstanceInfo => Reply::InstanceInfo(info()),
        Request::GetVersion => Reply::Version(Version { firecracker_version: "1.17.0".to_string() }),
        Request::GetMachineConfig => Reply::MachineConfig(MachineConfig::default()),
        Request::GetVmConfig => Reply::VmConfig(Box::default()),
        Request::GetMmds => Reply::Mmds(serde_json::json!({"a": 1})),
        Request::GetBalloon => Reply::Balloon(Balloon::default()),
        Request::GetBalloonStats => {
            let swap_in = Some(u64::MAX);
            Reply::BalloonStats(Box::new(BalloonStats { swap_in, ..BalloonStats::default() }))
        }
        Request::GetBalloonHintingStatus => Reply::BalloonHintingStatus(BalloonHintingStatus::default()),
        Request::GetMemoryHotplug => Reply::MemoryHotplug(MemoryHotplugStatus::default()),
        Request::DeleteDrive(id) => Fault::bad_request(format!("there is no drive {id}")).into(),
        _ => Reply::Empty,
    }
}

/// Every request, with every field that it can have.
fn one_of_each() -> Vec<Request> {
    let bucket = Some(TokenBucket { size: 1, one_time_burst: Some(2), refill_time: 3 });
    let rate_limiter = Some(RateLimiter { bandwidth: bucket, ops: None });
    let leaf = CpuidLeafModifier {
        leaf: 7,
        subleaf: 1,
        flags: 1,
        modifiers: vec![CpuidModifier {
            register: CpuidRegister::Ebx,
            bitmap: Bitmap { filter: 3, value: 1 },
        }],
    };
    vec![
        Request::GetInstanceInfo,
        Request::GetVersion,
        Request::GetVmConfig,
        Request::GetMachineConfig,
        Request::PutMachineConfig(MachineConfig {
            vcpu_count: 4,
            huge_pages: HugePages::Hugetlbfs2M,
            cpu_template: Some(CpuTemplate::V1N1),
            ..MachineConfig::default()
        }),
        Request::PatchMachineConfig(MachineConfigUpdate {
            mem_size_mib: Some(u64::MAX),
            ..MachineConfigUpdate::default()
        }),
        Request::PutBootSource(BootSource {
            kernel_image_path: "/k".into(),
            initrd_path: Some("/i".into()),
            boot_args: Some("a=\"b\" é\n".to_string()),
        }),
        Request::PutCpuConfig(CpuConfig {
            kvm_capabilities: vec![KvmCapability::Add(1), KvmCapability::Remove(2)],
            cpuid_modifiers: vec![leaf],
            msr_modifiers: vec![MsrModifier { addr: 0x10a, bitmap: Bitmap { filter: 1 << 63, value: 0 } }],
        }),
        Request::PutDrive(Drive {
            drive_id: "a_1".to_string(),
            partuuid: Some("p".to_string()),
            is_root_device: true,
            cache_type: CacheType::Writeback,
            is_read_only: Some(true),
            path_on_host: Some("/d".into()),
            rate_limiter,
            io_engine: Some(IoEngine::Async),
            socket: Some("/s".into()),
            queues: Some(2),
            io_thread: Some(1),
            direct: Some(true),
            format: Some(DiskFormat::Qcow2),
            backing: vec![BackingFile { path_on_host: "/b".into(), format: DiskFormat::Raw }],
        }),
        Request::PatchDrive(DriveUpdate {
            drive_id: "a_1".to_string(),
            path_on_host: Some("/e".into()),
            rate_limiter,
        }),
        Request::DeleteDrive("a_1".to_string()),
        Request::DeleteNetworkInterface("a_1".to_string()),
        Request::DeletePmem("a_1".to_string()),
        Request::PutNetworkInterface(NetworkInterface {
            iface_id: "eth_0".to_string(),
            host_dev_name: "tap0".to_string(),
            guest_mac: Some(MacAddress([6, 0, 0xac, 0x10, 0, 2])),
            mtu: Some(9000),
            rx_rate_limiter: rate_limiter,
            tx_rate_limiter: rate_limiter,
            queue_pairs: Some(4),
            io_thread: Some(2),
            vhost: Some(true),
            vhost_fds: Some("fd:a,fd:b,fd:c,fd:d".to_string()),
        }),
        Request::PatchNetworkInterface(NetworkInterfaceUpdate {
            iface_id: "eth_0".to_string(),
            rx_rate_limiter: rate_limiter,
            tx_rate_limiter: rate_limiter,
        }),
        Request::PutPmem(Pmem {
            id: "p_1".to_string(),
            path_on_host: "/p".into(),
            root_device: true,
            read_only: true,
            rate_limiter,
            io_thread: Some(3),
        }),
        Request::PatchPmem(PmemUpdate { id: "p_1".to_string(), rate_limiter }),
        Request::GetBalloon,
        Request::PutBalloon(Balloon {
            amount_mib: 1,
            deflate_on_oom: true,
            stats_polling_interval_s: 2,
            free_page_hinting: true,
            free_page_reporting: true,
            io_thread: Some(4),
        }),
        Request::PatchBalloon(BalloonUpdate { amount_mib: 3 }),
        Request::GetBalloonStats,
        Request::PatchBalloonStats(BalloonStatsUpdate { stats_polling_interval_s: 4 }),
        Request::StartBalloonHinting(BalloonStartCmd { acknowledge_on_stop: false }),
        Request::StopBalloonHinting,
        Request::GetBalloonHintingStatus,
        Request::GetMemoryHotplug,
        Request::PutMemoryHotplug(MemoryHotplugConfig {
            total_size_mib: 1024,
            slot_size_mib: 256,
            block_size_mib: 4,
            io_thread: Some(1),
        }),
        Request::PatchMemoryHotplug(MemoryHotplugSizeUpdate { requested_size_mib: 512 }),
        Request::PutVsock(Vsock {
            vsock_id: Some("v".to_string()),
            guest_cid: 3,
            uds_path: "/v".into(),
            io_thread: Some(5),
        }),
        Request::PutEntropy(Entropy { rate_limiter, io_thread: Some(6) }),
        Request::PatchEntropy(EntropyUpdate { rate_limiter }),
        Request::PutSerial(Serial { serial_out_path: Some("/o".into()), rate_limiter: bucket }),
        Request::GetMmds,
        Request::PutMmds(serde_json::Map::from_iter([("a".to_string(), serde_json::json!([1, null]))])),
        Request::PatchMmds(serde_json::Map::from_iter([("a".to_string(), serde_json::Value::Null)])),
        Request::PutMmdsConfig(MmdsConfig {
            version: MmdsVersion::V2,
            network_interfaces: vec!["eth_0".to_string()],
            ipv4_address: Some(std::net::Ipv4Addr::new(169, 254, 1, 2)),
            imds_compat: true,
        }),
        Request::PutLogger(Logger {
            log_path: Some("/l".into()),
            level: Some(LogLevel::Off),
            show_level: Some(true),
            show_log_origin: Some(false),
            module: Some("m".to_string()),
        }),
        Request::PutMetrics(Metrics {
            metrics_path: "/m".into(),
            emit_id: true,
            properties: Some([("a".to_string(), "b".to_string())].into()),
        }),
        Request::Action(ActionType::SendCtrlAltDel),
        Request::PatchVm(VmState::Resumed),
    ]
}

#[test]
fn every_request_arrives_as_it_was_sent() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    for request in one_of_each() {
        match client.send(&request) {
            Err(ClientError::Refused(fault)) => assert_eq!(answer(&request), Reply::Fault(fault)),
            reply => assert_eq!(reply.unwrap(), answer(&request)),
        }
    }
    assert_eq!(fixture.seen(), one_of_each());
}

#[test]
fn the_replies_have_their_types() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    assert_eq!(client.instance_info().unwrap(), info());
    assert_eq!(client.version().unwrap().firecracker_version, "1.17.0");
    assert_eq!(client.machine_config().unwrap(), MachineConfig::default());
    assert_eq!(client.vm_config().unwrap(), VmConfig::default());
    client.apply(&Request::Action(ActionType::InstanceStart)).unwrap();
}

#[test]
fn a_refusal_has_its_status_and_text() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let response = client.request("PUT", "/machine-config", Some(r#"{"vcpu_count":1}"#)).unwrap();
    assert_eq!(response.status, 400);
    assert_eq!(response.header("content-type"), Some("application/json"));
    assert!(response.fault_message().contains("missing field `mem_size_mib`"));
    let refused = client.apply(&Request::DeleteDrive("x".to_string())).unwrap_err();
    assert_eq!(refused.to_string(), "there is no drive x");
    // The handler saw only what was well-formed.
    assert_eq!(fixture.seen(), [Request::DeleteDrive("x".to_string())]);
}

#[test]
fn a_deprecated_field_is_accepted_and_marked() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let response = client.request("PATCH", "/machine-config", Some(r#"{"cpu_template":"None"}"#)).unwrap();
    assert_eq!((response.status, response.header("deprecation")), (204, Some("true")));
    let response = client.request("PATCH", "/machine-config", Some(r#"{"smt":false}"#)).unwrap();
    assert_eq!((response.status, response.header("deprecation")), (204, None));
    assert_eq!(fixture.counters.deprecated.load(Ordering::Relaxed), 1);
}

#[test]
fn requests_and_faults_are_counted_by_endpoint() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    client.instance_info().unwrap();
    client.request("PUT", "/entropy", Some("{}")).unwrap();
    client.request("PUT", "/entropy", Some("{")).unwrap();
    client.request("GET", "/snapshot/create", None).unwrap();
    let counts = |method, endpoint| {
        let count = fixture.counters.of(method, endpoint);
        (count.requests.load(Ordering::Relaxed), count.faults.load(Ordering::Relaxed))
    };
    assert_eq!(counts(Method::Get, Endpoint::Instance), (1, 0));
    assert_eq!(counts(Method::Put, Endpoint::Entropy), (2, 1));
    assert_eq!(fixture.counters.unknown.load(Ordering::Relaxed), 1);
}

#[test]
fn thirty_requests_in_one_write_get_thirty_replies() {
    let fixture = Fixture::new();
    let mut stream = fixture.raw();
    stream.write_all("GET /version HTTP/1.1\r\n\r\n".repeat(30).as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut replies = String::new();
    stream.read_to_string(&mut replies).unwrap();
    assert_eq!(replies.matches(r#"{"firecracker_version":"1.17.0"}"#).count(), 30);
}

#[test]
fn ten_clients_are_served_at_once_and_an_eleventh_is_told_to_come_back() {
    let fixture = Fixture::new();
    let mut clients: Vec<_> = (0..MAX_CONNECTIONS).map(|_| fixture.client()).collect();
    for client in &mut clients {
        client.instance_info().unwrap();
    }
    let mut stream = fixture.raw();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n"), "{reply}");
    let refused = fixture.client().request("GET", "/", None).unwrap();
    assert_eq!(refused.status, 503);
    assert_eq!(fixture.counters.refused_connections.load(Ordering::Relaxed), 2);
    for client in &mut clients {
        client.instance_info().unwrap();
    }
    // The place of one that left is free. The server may learn later that it left.
    clients.pop();
    while fixture.client().request("GET", "/", None).unwrap().status == 503 {}
}

#[test]
fn ten_clients_on_ten_threads_each_get_their_own_replies() {
    let fixture = Fixture::new();
    std::thread::scope(|scope| {
        for n in 0..MAX_CONNECTIONS {
            let mut client = fixture.client();
            scope.spawn(move || {
                for m in 0..200 {
                    let id = format!("drive_{n}_{m}");
                    let refused = client.apply(&Request::DeleteDrive(id.clone())).unwrap_err();
                    assert_eq!(refused.to_string(), format!("there is no drive {id}"));
                }
            });
        }
    });
    assert_eq!(fixture.seen().len(), 200 * MAX_CONNECTIONS);
}

#[test]
fn a_slow_client_keeps_nobody_waiting() {
    let fixture = Fixture::new();
    let mut slow = fixture.raw();
    let mut client = fixture.client();
    for byte in b"GET / HTTP/1.1\r\n\r\n" {
        slow.write_all(&[*byte]).unwrap();
        client.instance_info().unwrap();
    }
    let mut reply = [0; 15];
    slow.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"HTTP/1.1 200 OK");
}

#[test]
fn a_client_that_takes_no_replies_is_not_read_for_ever_and_keeps_nobody_waiting() {
    let fixture = Fixture::new();
    let mut deaf = fixture.raw();
    deaf.set_nonblocking(true).unwrap();
    let request = b"GET /vm/config HTTP/1.1\r\n\r\n";
    let requests = request.repeat(1000);
    let mut client = fixture.client();
    let mut sent = 0;
    // The kernel's buffers and the server's fill up, and then nothing more is taken, whatever else is served.
    let mut full = 0;
    while full < 100 {
        match deaf.write(&requests[sent % request.len()..]) {
            Ok(count) => {
                sent += count;
                full = 0;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => full += 1,
            Err(error) => panic!("{error}"),
        }
        assert!(sent < 64 << 20, "the server takes everything");
        client.instance_info().unwrap();
    }
    // When the client takes its replies after all, it gets every one.
    deaf.set_nonblocking(false).unwrap();
    let mut writer = deaf.try_clone().unwrap();
    let finish = std::thread::spawn(move || {
        writer.write_all(&request[sent % request.len()..]).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut replies = String::new();
    deaf.read_to_string(&mut replies).unwrap();
    finish.join().unwrap();
    assert_eq!(replies.matches("HTTP/1.1 200 OK").count(), sent / request.len() + 1);
}

#[test]
fn a_client_that_vanishes_ends_only_its_own_connection() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    for bytes in ["", "GET / HT", "PUT / HTTP/1.1\r\nContent-Length: 10\r\n\r\n12", "GET / HTTP/1.1\r\n\r\n"]
    {
        for _ in 0..20 {
            let mut vanishing = UnixStream::connect(&fixture.path).unwrap();
            // A refused one, because the server did not yet see the others leave, may be closed already.
            let _ = vanishing.write_all(bytes.as_bytes());
            drop(vanishing);
            client.instance_info().unwrap();
        }
    }
}

#[test]
fn a_client_that_speaks_no_http_is_told_even_while_it_sends_on() {
    let fixture = Fixture::new();
    let mut stream = fixture.raw();
    let body = "x".repeat(200_000);
    let request = format!("PUT /metrics HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 400 Bad Request\r\nConnection: close\r\n"), "{reply}");
    assert!(reply.contains("200000 bytes, the limit is 51200"), "{reply}");
    assert_eq!(reply.matches("HTTP/1.1").count(), 1);
}

#[test]
fn a_client_that_sends_without_end_is_cut_off() {
    let fixture = Fixture::new();
    let mut stream = fixture.raw();
    let chunk = [b'x'; 65536];
    let mut sent = 0;
    while let Ok(count) = stream.write(&chunk) {
        sent += count;
        assert!(sent < 64 << 20, "the server takes everything");
    }
}

#[test]
fn the_body_limit_can_be_set() {
    let fixture = Fixture::with(Limits { max_body: 20, ..Limits::default() });
    let mut client = fixture.client();
    assert_eq!(client.request("PUT", "/entropy", Some("{}")).unwrap().status, 204);
    let long = format!("{{{}}}", " ".repeat(20));
    let refused = client.request("PUT", "/entropy", Some(&long)).unwrap();
    assert!(refused.fault_message().contains("22 bytes, the limit is 20"));
    // The server closed; the client connects again by itself.
    assert_eq!(client.request("PUT", "/entropy", Some("{}")).unwrap().status, 204);
}

#[test]
fn a_request_that_is_never_completed_ends_its_connection() {
    let fixture = Fixture::with(Limits { stall: Duration::from_millis(20), ..Limits::default() });
    let mut resting = fixture.client();
    resting.instance_info().unwrap();
    let mut stalled = fixture.raw();
    stalled.write_all(b"GET / HT").unwrap();
    let mut reply = Vec::new();
    stalled.read_to_end(&mut reply).unwrap_or_default();
    assert_eq!(reply, b"");
    // One that only rests stays.
    resting.instance_info().unwrap();
}

#[test]
fn a_request_that_comes_byte_by_byte_for_ever_ends_its_connection() {
    let fixture = Fixture::with(Limits { stall: Duration::from_millis(50), ..Limits::default() });
    let mut trickling = fixture.raw();
    trickling.write_all(b"PUT /metrics HTTP/1.1\r\nContent-Length: 50000\r\n\r\n").unwrap();
    let mut sent = 0;
    while trickling.write_all(b" ").is_ok() {
        sent += 1;
        assert!(sent < 50_000, "the whole request was read");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn after_the_last_reply_the_client_sees_the_end_without_closing_first() {
    let fixture = Fixture::with(Limits { stall: PATIENCE * 10, ..Limits::default() });
    let mut stream = fixture.raw();
    stream.write_all(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 200 OK\r\nConnection: close\r\n"), "{reply}");
}

#[test]
fn a_connection_that_rests_too_long_is_closed() {
    let fixture = Fixture::with(Limits { idle: Duration::from_millis(20), ..Limits::default() });
    let mut stream = fixture.raw();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_stopped_server_answers_no_more_and_leaves_its_socket() {
    let mut fixture = Fixture::new();
    let mut client = fixture.client();
    client.instance_info().unwrap();
    fixture.stop();
    assert!(matches!(client.request("GET", "/", None), Err(ClientError::Io { .. })));
    assert!(fixture.path.exists());
}

#[test]
fn a_path_that_exists_is_not_taken_over() {
    let fixture = Fixture::new();
    let error = Server::bind(&fixture.path, Limits::default()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    fixture.client().instance_info().unwrap();
}

#[test]
fn an_inherited_listener_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.socket");
    let listener = UnixListener::bind(&path).unwrap();
    let server = Server::from_listener(listener, Limits::default()).unwrap();
    let stop = server.stop_event().unwrap();
    let thread = std::thread::spawn(move || server.run(|request| answer(&request)));
    assert_eq!(Client::connect(&path).unwrap().instance_info().unwrap(), info());
    stop.write(1).unwrap();
    thread.join().unwrap().unwrap();
}

#[test]
fn a_client_waits_for_a_server_that_is_starting() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.socket");
    let error = Client::connect_within(&path, Duration::ZERO).unwrap_err();
    assert!(error.to_string().contains("api.socket"), "{error}");
    let waiting = {
        let path = path.clone();
        std::thread::spawn(move || Client::connect_within(&path, PATIENCE).map(|_| ()))
    };
    let _listener = UnixListener::bind(Path::new(&path)).unwrap();
    waiting.join().unwrap().unwrap();
}

/// What a client makes of a server that reads 30 bytes and says `reply` to them.
fn told(reply: &'static str) -> Result<InstanceInfo, ClientError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.socket");
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 30]).unwrap();
        stream.write_all(reply.as_bytes()).unwrap();
    });
    let outcome = Client::connect(&path).unwrap().instance_info();
    server.join().unwrap();
    outcome
}

#[test]
fn a_client_takes_no_nonsense_for_a_reply() {
    for reply in
        ["nonsense\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n[]"]
    {
        let outcome = told(reply);
        assert!(matches!(outcome, Err(ClientError::Protocol(_))), "{reply:?}: {outcome:?}");
    }
    let cut = told("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}");
    assert!(matches!(cut, Err(ClientError::Io { .. })), "{cut:?}");
}

#[test]
fn a_client_passes_over_interim_replies() {
    let reply = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 400 Bad Request\r\n\r\n";
    let outcome = told(reply);
    assert!(matches!(outcome, Err(ClientError::Refused(Fault { status: 400, .. }))), "{outcome:?}");
}

#[test]
fn a_server_that_goes_on_for_ever_is_not_heard_for_longer_than_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.socket");
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        // Each of these is a whole one, and comes in time.
        while stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").is_ok() {
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    let mut client = Client::connect(&path).unwrap();
    client.set_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(matches!(client.instance_info(), Err(ClientError::Io { .. })));
    drop(client);
    server.join().unwrap();
}
