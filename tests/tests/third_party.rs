//! A client of Firecracker's that knows nothing of Berth makes a guest with every device, drives it to its end and cleans
//! up: with requests, with a file, and in a cell. In the guest is seen what each call did.
//!
//! The client is fctools; for what it has no call for, it is curl. What is refused, and how, is in api.rs.
//!
//! fctools 0.7 has no call of its own for these of Firecracker's, beside one that sends what it is given: `PUT /serial`,
//! `PATCH /machine-config`, `GET /vm/config`, `PATCH /pmem`, `PUT` of a disk, an interface or persistent memory after the start,
//! and `DELETE` of any of these. Of its calls, those for snapshots are not for us yet: that they are refused is seen.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use berth_tests::guest::setup::CONSOLE;
use berth_tests::guest::streams;
use berth_tests::guest::tap::{Tap, host};
use berth_tests::guest::{
    Console, Kernel, asset, blank_disk, curl_drive, limits, md5, program, program_drive,
};
use berth_tests::host::provide;
use fctools::extension::metrics::{Metrics, spawn_metrics_task};
use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::RuntimeTask;
use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::api::{VmApi, VmApiError};
use fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use fctools::vm::models::*;
use fctools::vm::shutdown::{VmShutdownAction, VmShutdownMethod};
use fctools::vm::{Vm, VmState};
use fctools::vmm::arguments::jailer::{JailerArguments, JailerCgroupVersion};
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments, VmmLogLevel};
use fctools::vmm::executor::either::EitherVmmExecutor;
use fctools::vmm::executor::jailed::{FlatVirtualPathResolver, JailedVmmExecutor};
use fctools::vmm::executor::unrestricted::UnrestrictedVmmExecutor;
use fctools::vmm::id::VmmId;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::process::{VmmProcess, VmmProcessState};
use fctools::vmm::resource::system::ResourceSystem;
use fctools::vmm::resource::{CreatedResourceType, MovedResourceType, Resource, ResourceType};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;

type Executor = EitherVmmExecutor<FlatVirtualPathResolver>;
type Resources = ResourceSystem<DirectProcessSpawner, TokioRuntime>;

const MIB: u64 = 1 << 20;
const ID: &str = "judge-1";
const UID: u32 = 23_456;
const GID: u32 = 65_432;
const MEMORY_MIB: usize = 256;
const METADATA: &str = "169.254.169.254";
/// Bit 30 of ECX of leaf 1: that there is an RDRAND.
const NO_RDRAND: &str = "0bx0xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx";

/// How the client starts the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// By itself, and says by requests what it is to be.
    Requests,
    /// By itself, with PCI, and says in a file what it is to be.
    File,
    /// By way of the jailer.
    Jailed,
}

/// The client and its guest. `vm` before `runtime`, which its end needs.
struct Judge {
    way: Way,
    vm: Vm<Executor, DirectProcessSpawner, TokioRuntime>,
    console: Console,
    runtime: Runtime,
    metrics: PathBuf,
    log: PathBuf,
    tap: Tap,
    directory: TempDir,
}

/// What the client's calls are named by when they fail.
trait Expect<T> {
    fn done(self, what: &str) -> T;
}

impl<T, E: std::fmt::Display> Expect<T> for Result<T, E> {
    #[track_caller]
    fn done(self, what: &str) -> T {
        self.unwrap_or_else(|error| panic!("{what}: {error}"))
    }
}

fn ops(size: u64) -> RateLimiter {
    let bucket = TokenBucket { size, one_time_burst: Some(size), refill_time: 100 };
    RateLimiter { bandwidth: TokenBucket { size: 64 * MIB, ..bucket.clone() }, ops: bucket }
}

/// Links under Firecracker's names. What edits snapshots is not ours, and not asked for anything but its name.
fn installation(directory: &Path, version: &str) -> VmmInstallation {
    let link = |name: &str, to: &str| {
        symlink(program(to), directory.join(name)).unwrap();
        directory.join(name)
    };
    let editor = directory.join("snapshot-editor");
    fs::write(&editor, format!("#!/bin/sh\necho snapshot-editor v{version}\n")).unwrap();
    fs::set_permissions(&editor, fs::Permissions::from_mode(0o755)).unwrap();
    VmmInstallation::new(link("firecracker", "berth-vmm"), link("jailer", "berth-jailer"), editor)
}

/// The release of Firecracker that ours says it is.
fn version() -> String {
    let directory = tempfile::tempdir().unwrap();
    let link = directory.path().join("firecracker");
    symlink(program("berth-vmm"), &link).unwrap();
    let said = host(link.to_str().unwrap(), &["--version"]);
    said.lines().next().unwrap().strip_prefix("Firecracker v").unwrap().to_owned()
}

impl Judge {
    /// A running guest with every device that fctools knows, in its shell.
    fn started(way: Way, tap: Tap) -> Judge {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let entered = runtime.enter();
        let directory = tempfile::tempdir().unwrap();
        let here = directory.path();
        let version = version();
        let installation = installation(here, &version);
        runtime.block_on(installation.verify(&version, &TokioRuntime)).done("the installation");

        let owner = match way {
            Way::Jailed => VmmOwnershipModel::Downgraded { uid: UID, gid: GID },
            _ => VmmOwnershipModel::Shared,
        };
        let mut resources = Resources::new(DirectProcessSpawner, TokioRuntime, owner);
        // What the VMM makes or finds there, by the name that it has in its own root.
        let place = |name: &str| match way {
            Way::Jailed => Path::new("/").join(name),
            _ => here.join(name),
        };
        let socket = VmmApiSocket::Enabled(place("api.sock"));
        let arguments = VmmArguments::new(socket).log_level(VmmLogLevel::Debug);
        let executor = match way {
            Way::Requests => {
                let id = VmmId::new(ID).unwrap();
                Executor::from(UnrestrictedVmmExecutor::new(arguments).id(id))
            }
            Way::File => {
                let id = VmmId::new(ID).unwrap();
                Executor::from(UnrestrictedVmmExecutor::new(arguments.enable_pci_support()).id(id))
            }
            Way::Jailed => {
                let jailer = JailerArguments::new(VmmId::new(ID).unwrap())
                    .chroot_base_dir(here.join("cells"))
                    .cgroup_version(JailerCgroupVersion::V2)
                    .cgroup("pids.max", "64")
                    .max_fd_limit(500);
                fs::create_dir(here.join("cells")).unwrap();
                Executor::from(JailedVmmExecutor::new(arguments, jailer, FlatVirtualPathResolver))
            }
        };
        let data = everything(&mut resources, here, &place, &tap);
        let file = |resource: &Option<Resource>| resource.clone().unwrap();
        let log = file(&data.logger_system.as_ref().unwrap().logs);
        let metrics = data.metrics_system.as_ref().unwrap().metrics.clone();
        let init_method = match way {
            Way::File => InitMethod::ViaJsonConfiguration(place("vm.json")),
            _ => InitMethod::ViaApiCalls,
        };
        let configuration = VmConfiguration::New { init_method, data };
        let mut vm =
            runtime.block_on(Vm::prepare(executor, resources, installation, configuration)).done("preparing");
        if let Err(error) = runtime.block_on(vm.start(limits::API)) {
            let said = read(log.get_effective_path().unwrap());
            panic!("starting: {error}\n{said}");
        }
        let pipes = vm.take_pipes().done("the VMM's standard input and output");
        let output = waits(pipes.stdout.into_inner().into_owned_fd().unwrap());
        let input = waits(pipes.stdin.into_inner().into_owned_fd().unwrap());
        let path = |resource: &Resource| resource.get_effective_path().unwrap().to_owned();
        let (log, metrics) = (path(&log), path(&metrics));
        drop(entered);
        let console = Console::new(output, input);
        let mut judge = Judge { way, vm, console, runtime, metrics, log, tap, directory };
        judge.console.wait_for("BERTH-GUEST-READY", limits::BOOT);
        judge.console.wait_for("# ", limits::BOOT);
        judge
    }

    /// The guest does this, successfully.
    #[track_caller]
    fn run(&mut self, command: &str) -> String {
        let output = self.console.shell(command, limits::COMMAND);
        assert_eq!(output.code, 0, "`{command}` in the guest: {}", output.text);
        output.text
    }

    /// Where the host finds a file of the VMM's root.
    fn path(&self, name: &str) -> PathBuf {
        let directory = match self.way {
            Way::Jailed => self.directory.path().join(format!("cells/firecracker/{ID}/root")),
            _ => self.directory.path().to_owned(),
        };
        directory.join(name)
    }

    /// What curl hears: the status and the body.
    #[track_caller]
    fn curl(&self, method: &str, path: &str, body: Option<Value>) -> (u16, String) {
        curl(&self.path("api.sock"), method, path, body)
    }

    /// A change by curl that must be made.
    #[track_caller]
    fn change(&self, method: &str, path: &str, body: Option<Value>) {
        let (status, text) = self.curl(method, path, body);
        assert_eq!((status, text.as_str()), (204, ""), "{method} {path}");
    }

    /// Everything that has been counted, line by line, as fctools reads it.
    fn metrics(&mut self) -> Vec<Metrics> {
        self.runtime.block_on(self.vm.flush_metrics()).done("flushing metrics");
        let path = self.metrics.clone();
        self.runtime.block_on(async {
            let mut task = spawn_metrics_task(path, MOST_LINES, TokioRuntime);
            task.task.join().await.unwrap().done("the metrics");
            std::iter::from_fn(|| task.receiver.try_recv().ok()).collect()
        })
    }

    /// Waits until the guest's balloon has this size.
    #[track_caller]
    fn balloon_is(&mut self, mib: u32) -> BalloonStatistics {
        let begin = Instant::now();
        loop {
            let statistics = self.runtime.block_on(self.vm.get_balloon_statistics()).done("statistics");
            if statistics.actual_mib == mib {
                return statistics;
            }
            assert!(begin.elapsed() < limits::COMMAND, "not {mib} MiB: {statistics:?}");
            thread::sleep(Duration::from_millis(200));
        }
    }
}

/// As [`Judge::curl`], of the VMM with this socket.
#[track_caller]
fn curl(socket: &Path, method: &str, path: &str, body: Option<Value>) -> (u16, String) {
    let mut command = Command::new("curl");
    command.args(["-sS", "-m", "60", "-w", "\n%{http_code}", "-X", method, "--unix-socket"]);
    command.arg(socket).arg(format!("http://localhost{path}"));
    let body = body.map(|body| body.to_string());
    command.args(body.iter().flat_map(|body| ["-H", "Content-Type: application/json", "-d", body]));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let (body, status) = text.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), body.to_owned())
}

/// More than a test flushes.
const MOST_LINES: usize = 100;

/// As a test's thread wants it, which has nothing else to do.
fn waits(fd: OwnedFd) -> OwnedFd {
    let flags = fcntl_getfl(&fd).unwrap();
    fcntl_setfl(fd.as_fd(), flags - OFlags::NONBLOCK).unwrap();
    fd
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// Every section that fctools knows of.
fn everything(
    resources: &mut Resources,
    here: &Path,
    place: &dyn Fn(&str) -> PathBuf,
    tap: &Tap,
) -> VmConfigurationData {
    let mut moved = |path: PathBuf| {
        let how = ResourceType::Moved(MovedResourceType::Copied);
        resources.create_resource(path, how).done("a file")
    };
    let mut drive = |id: &str, path: PathBuf, is_read_only: bool, io_engine: DriveIoEngine| Drive {
        drive_id: id.into(),
        is_root_device: false,
        cache_type: Some(DriveCacheType::Writeback),
        partuuid: None,
        is_read_only: Some(is_read_only),
        block: Some(moved(path)),
        rate_limiter: Some(ops(10_000)),
        io_engine: Some(io_engine),
        socket: None,
    };
    let program = program_drive(here, "berth-vsock").path_on_host.unwrap();
    let curl = curl_drive(here).path_on_host.unwrap();
    let drives = vec![
        drive("program", program, true, DriveIoEngine::Sync),
        drive("curl", curl, true, DriveIoEngine::Sync),
        drive("plain", blank_disk(here.join("plain.img"), 8 * MIB), false, DriveIoEngine::Sync),
        drive("ring", blank_disk(here.join("ring.img"), 8 * MIB), false, DriveIoEngine::Async),
    ];
    let kernel_image = moved(Kernel::Elf.path());
    let initrd = moved(asset(provide::INITRAMFS));
    let pmem = moved(blank_disk(here.join("pmem.img"), 4 * MIB));
    let mut created = |name: &str| {
        let how = ResourceType::Created(CreatedResourceType::File);
        resources.create_resource(place(name), how).done("a file to be")
    };
    let (logs, metrics) = (created("vmm.log"), created("vmm.metrics"));
    let uds = resources.create_resource(place("v.sock"), ResourceType::Produced).done("a socket to be");
    VmConfigurationData {
        boot_source: BootSource {
            kernel_image,
            boot_args: Some(format!("{CONSOLE} quiet reboot=k memhp_default_state=online_movable")),
            initrd: Some(initrd),
        },
        drives,
        pmem_devices: vec![PmemDevice {
            id: "pmem".into(),
            block: pmem,
            root_device: Some(false),
            read_only: Some(false),
        }],
        machine_configuration: MachineConfiguration {
            vcpu_count: 2,
            mem_size_mib: MEMORY_MIB,
            smt: Some(false),
            track_dirty_pages: Some(false),
            huge_pages: Some(HugePages::None),
        },
        cpu_template: Some(CpuTemplate::X86(X86CpuTemplate {
            kvm_capabilities: Vec::new(),
            cpuid_modifiers: vec![X86CpuidModifier {
                leaf: "0x1".into(),
                subleaf: "0x0".into(),
                flags: 0,
                modifiers: vec![X86CpuidRegisterModifier {
                    register: X86CpuidRegister::Ecx,
                    bitmap: NO_RDRAND.into(),
                }],
            }],
            msr_modifiers: Vec::new(),
        })),
        network_interfaces: vec![NetworkInterface {
            iface_id: "net1".into(),
            host_dev_name: tap.name(),
            guest_mac: Some("06:00:ac:10:00:02".into()),
            rx_rate_limiter: Some(ops(100_000)),
            tx_rate_limiter: Some(ops(100_000)),
        }],
        balloon_device: Some(BalloonDevice {
            amount_mib: 0,
            // With it, Linux counts what is in the balloon as memory of its own.
            deflate_on_oom: false,
            stats_polling_interval_s: Some(1),
            free_page_reporting: Some(false),
            free_page_hinting: Some(true),
        }),
        vsock_device: Some(VsockDevice { guest_cid: 3, uds }),
        logger_system: Some(LoggerSystem {
            logs: Some(logs),
            level: Some(VmmLogLevel::Debug),
            show_level: Some(true),
            show_log_origin: Some(true),
            module: None,
        }),
        metrics_system: Some(MetricsSystem { metrics }),
        memory_hotplug_configuration: Some(MemoryHotplugConfiguration {
            total_size_mib: 256,
            block_size_mib: Some(2),
            slot_size_mib: Some(128),
        }),
        mmds_configuration: Some(MmdsConfiguration {
            version: MmdsVersion::V2,
            network_interfaces: vec!["net1".into()],
            ipv4_address: Some(METADATA.parse().unwrap()),
            imds_compat: Some(false),
        }),
        entropy_device: Some(EntropyDevice { rate_limiter: Some(ops(100)) }),
    }
}

impl Drop for Judge {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = read(&self.log);
            let end = |text: &str| {
                text.lines()
                    .rev()
                    .take(60)
                    .collect::<Vec<_>>()
                    .into_iter()
                    .rev()
                    .fold(String::new(), |all, line| all + line + "\n")
            };
            eprintln!("--- end of the guest's console\n{}", end(&self.console.text()));
            eprintln!("--- end of the VMM's log\n{}", end(&log));
            let kill = VmShutdownAction { method: VmShutdownMethod::Kill, timeout: None, graceful: false };
            let _ = self.runtime.block_on(self.vm.shutdown([kill]));
        }
    }
}

#[test]
fn a_stranger_drives_a_guest_with_every_device_by_requests() {
    drive(Way::Requests, Tap::new(60, &[]));
}

#[test]
fn a_stranger_drives_a_guest_with_every_device_from_a_file() {
    drive(Way::File, Tap::new(61, &["user", "root"]));
}

#[test]
fn a_stranger_drives_a_guest_with_every_device_in_a_cell() {
    drive(Way::Jailed, Tap::new(62, &["user", &UID.to_string(), "group", &GID.to_string()]));
}

fn drive(way: Way, tap: Tap) {
    let mut judge = Judge::started(way, tap);
    it_is_what_was_asked_for(&mut judge);
    disks_are_written_and_change(&mut judge);
    the_network_and_its_metadata(&mut judge);
    sockets(&mut judge);
    the_balloon(&mut judge);
    memory_that_is_plugged_in(&mut judge);
    pauses(&mut judge);
    what_fctools_has_no_call_for(&mut judge);
    what_was_done_is_counted_and_logged(&mut judge);
    it_goes_down_and_nothing_is_left(judge);
}

fn it_is_what_was_asked_for(judge: &mut Judge) {
    let Judge { vm, runtime, .. } = judge;
    let info = runtime.block_on(vm.get_info()).done("GET /");
    let told = runtime.block_on(vm.get_firecracker_version()).done("GET /version");
    assert_eq!((info.app_name.as_str(), info.id.as_str(), info.is_paused), ("Firecracker", ID, false));
    assert_eq!((&info.vmm_version, &told), (&version(), &version()));
    let machine = runtime.block_on(vm.get_machine_configuration()).done("GET /machine-config");
    assert_eq!(machine, vm.get_configuration().get_data().machine_configuration);
    let balloon = runtime.block_on(vm.get_balloon_device()).done("GET /balloon");
    assert_eq!(Some(&balloon), vm.get_configuration().get_data().balloon_device.as_ref());

    let (status, text) = judge.curl("GET", "/vm/config", None);
    let told: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(status, 200);
    // What it was told is in it, but for what Firecracker does not tell either.
    let mut asked = serde_json::to_value(judge.vm.get_configuration().get_data()).unwrap();
    for section in ["cpu-config", "logger", "metrics"] {
        asked.as_object_mut().unwrap().remove(section);
    }
    contains(&told, &asked, "config");

    assert_eq!(judge.run("nproc").trim(), "2");
    assert_eq!(judge.run("grep -c rdrand /proc/cpuinfo; true").trim(), "0");
    let total: usize =
        judge.run("awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo").trim().parse().unwrap();
    assert!((MEMORY_MIB - 60..MEMORY_MIB).contains(&total), "{total} MiB");
    assert_eq!(judge.run("head -c 64 /dev/hwrng | wc -c").trim(), "64");
    let pci = judge.run("ls /sys/bus/pci/devices | wc -l").trim() != "0";
    assert_eq!(pci, judge.way == Way::File);
}

/// Each field of `part` is in `whole`, and has its value.
#[track_caller]
fn contains(whole: &Value, part: &Value, name: &str) {
    match part {
        Value::Object(fields) => {
            fields.iter().for_each(|(key, value)| contains(&whole[key], value, &format!("{name}.{key}")));
        }
        Value::Array(items) => {
            assert_eq!(whole.as_array().map(Vec::len), Some(items.len()), "{name}: {whole}");
            (0..).zip(items).for_each(|(at, item)| contains(&whole[at], item, &format!("{name}[{at}]")));
        }
        value => assert_eq!(whole, value, "{name}"),
    }
}

fn disks_are_written_and_change(judge: &mut Judge) {
    for (disk, image) in [("vdc", "plain.img"), ("vdd", "ring.img")] {
        judge.run(&format!(
            "head -c 4m /dev/urandom > /run/{disk}; dd if=/run/{disk} of=/dev/{disk} bs=64k conv=fsync"
        ));
        let sum = judge.run(&format!("md5sum < /run/{disk}"));
        let mut written = vec![0; 4 << 20];
        File::open(judge.path(image)).unwrap().read_exact_at(&mut written, 0).unwrap();
        assert_eq!(md5(&written), sum, "{disk}");
    }
    judge.run("modprobe virtio_pmem; modprobe nd_pmem; until [ -b /dev/pmem0 ]; do sleep 0.1; done");
    judge.run("echo persistent | dd of=/dev/pmem0 bs=4096 seek=100 conv=sync,fsync");
    let mut word = [0; 10];
    File::open(judge.path("pmem.img")).unwrap().read_exact_at(&mut word, 100 * 4096).unwrap();
    assert_eq!(&word, b"persistent");

    // Another file, which the client moves to where the VMM is.
    let larger = blank_disk(judge.directory.path().join("larger.img"), 12 * MIB);
    let how = ResourceType::Moved(MovedResourceType::Copied);
    let resource = judge.vm.get_resource_system_mut().create_resource(larger, how).done("a file");
    let virtual_path = match judge.way {
        Way::Jailed => PathBuf::from("/larger.img"),
        _ => resource.get_initial_path().to_owned(),
    };
    let effective = judge.path("larger.img");
    resource.start_initialization(effective.clone(), Some(virtual_path)).done("a file");
    judge.runtime.block_on(judge.vm.get_resource_system_mut().synchronize()).done("a file");
    if judge.way == Way::Jailed {
        std::os::unix::fs::chown(&effective, Some(UID), Some(GID)).unwrap();
    }
    let update =
        UpdateDrive { drive_id: "plain".into(), block: Some(resource), rate_limiter: Some(ops(500)) };
    judge.runtime.block_on(judge.vm.update_drive(update)).done("PATCH /drives");
    judge.run(&format!("until [ $(blockdev --getsize64 /dev/vdc) = {} ]; do sleep 0.1; done", 12 * MIB));
    judge.run("echo larger | dd of=/dev/vdc bs=1M seek=11 conv=sync,fsync");
    let mut word = [0; 6];
    File::open(effective).unwrap().read_exact_at(&mut word, 11 * MIB).unwrap();
    assert_eq!(&word, b"larger");

    let missing = UpdateDrive { drive_id: "missing".into(), block: None, rate_limiter: Some(ops(500)) };
    match judge.runtime.block_on(judge.vm.update_drive(missing)) {
        Err(VmApiError::ReceivedErrorResponse { status_code, fault_message }) => {
            assert_eq!(status_code.as_u16(), 400);
            assert!(fault_message.contains("missing"), "{fault_message}");
        }
        other => panic!("{other:?}"),
    }
}

fn the_network_and_its_metadata(judge: &mut Judge) {
    assert_eq!(judge.run("cat /sys/class/net/eth0/address").trim(), "06:00:ac:10:00:02");
    let (own, other) = (judge.tap.guest(), judge.tap.host());
    judge.run(&format!("ip address add {own}/24 dev eth0; ip link set eth0 up; ping -c 3 -i 0.2 {other}"));
    host("ping", &["-c", "3", "-i", "0.05", "-s", "1400", "-W", "30", &own]);
    let update = UpdateNetworkInterface {
        iface_id: "net1".into(),
        rx_rate_limiter: Some(ops(1000)),
        tx_rate_limiter: Some(ops(1000)),
    };
    judge.runtime.block_on(judge.vm.update_network_interface(update)).done("PATCH /network-interfaces");
    host("ping", &["-c", "3", "-i", "0.05", "-W", "30", &own]);

    let document = json!({"latest": {"meta-data": {"instance-id": "i-1", "tags": {"a": "1"}}}});
    let Judge { vm, runtime, .. } = judge;
    runtime.block_on(vm.create_mmds_untyped(&document)).done("PUT /mmds");
    assert_eq!(runtime.block_on(vm.get_mmds_untyped()).done("GET /mmds"), document);
    judge.run("ip route add 169.254.0.0/16 dev eth0; mkdir /run/curl; tar -xf /dev/vdb -C /run/curl");
    let program = "/run/curl/ld-linux-x86-64.so.2 --library-path /run/curl /run/curl/curl -sS -m 60";
    judge.run(&format!(
        "token=$({program} -X PUT -H 'X-metadata-token-ttl-seconds: 600' http://{METADATA}/latest/api/token)"
    ));
    let ask = format!("{program} -H \"X-metadata-token: $token\" http://{METADATA}/latest/meta-data");
    assert_eq!(judge.run(&ask), "instance-id\ntags/");
    // The same by types of the caller's own.
    let Judge { vm, runtime, .. } = judge;
    let typed = Document { latest: Latest { meta_data: MetaData { instance_id: "i-3".into() } } };
    runtime.block_on(vm.update_mmds(&typed)).done("PATCH /mmds");
    assert_eq!(runtime.block_on(vm.get_mmds::<Document>()).done("GET /mmds"), typed);
    assert_eq!(judge.run(&format!("{ask}/tags/a")), "1", "what a change does not name stays");
    let Judge { vm, runtime, .. } = judge;
    runtime.block_on(vm.create_mmds(&typed)).done("PUT /mmds");
    assert_eq!(judge.run(&ask), "instance-id", "a new document takes the place of the old one");
    let Judge { vm, runtime, .. } = judge;
    let change = json!({"latest": {"meta-data": {"instance-id": "i-2"}}});
    runtime.block_on(vm.update_mmds_untyped(&change)).done("PATCH /mmds");
    assert_eq!(judge.run(&format!("{ask}/instance-id")), "i-2");
    assert_eq!(
        judge.run(&format!("{program} -o /dev/null -w '%{{http_code}}' http://{METADATA}/latest")),
        "401"
    );
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Document {
    latest: Latest,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Latest {
    meta_data: MetaData,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct MetaData {
    instance_id: String,
}

fn sockets(judge: &mut Judge) {
    judge.run("cat /dev/vda > /bin/berth-vsock; chmod 755 /bin/berth-vsock");
    judge.run("berth-vsock listen 1000 md5sum > /run/1000 2>&1 &");
    judge.run("until grep -q listening /run/1000; do sleep 0.1; done");
    let words = streams::data(1, 1 << 20);
    let stream = streams::call(&judge.path("v.sock"), 1000);
    assert_eq!(streams::exchange(&stream, &words), md5(&words).into_bytes());

    // The guest calls.
    let path = judge.path("v.sock_2000");
    let listener = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    let server = thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let mut heard = String::new();
        stream.read_to_string(&mut heard).unwrap();
        heard
    });
    judge.run("berth-vsock connect 2000 'echo from the guest'");
    assert_eq!(server.join().unwrap(), "from the guest\n");
}

fn the_balloon(judge: &mut Judge) {
    let resize = |judge: &mut Judge, amount_mib: u16| {
        let update = UpdateBalloonDevice { amount_mib };
        judge.runtime.block_on(judge.vm.update_balloon_device(update)).done("PATCH /balloon");
    };
    resize(judge, 64);
    let statistics = judge.balloon_is(64);
    assert_eq!((statistics.target_mib, statistics.target_pages), (64, 64 * 256));
    assert!(statistics.actual_pages == 64 * 256, "{statistics:?}");
    judge.run("[ $(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) -lt 192 ]");
    resize(judge, 0);
    judge.balloon_is(0);
    let interval = UpdateBalloonStatistics { stats_polling_interval_s: 2 };
    judge.runtime.block_on(judge.vm.update_balloon_statistics(interval)).done("PATCH /balloon/statistics");
    let begin = Instant::now();
    while judge.balloon_is(0).total_memory.is_none() {
        assert!(begin.elapsed() < limits::COMMAND, "the guest does not tell of its memory");
        thread::sleep(Duration::from_millis(200));
    }

    let Judge { vm, runtime, .. } = judge;
    let start = StartBalloonFreePageHintingRun { acknowledge_on_stop: false };
    runtime.block_on(vm.start_balloon_free_page_hinting_run(start)).done("starting hints");
    let begin = Instant::now();
    loop {
        let status =
            runtime.block_on(vm.get_balloon_free_page_hinting_run_status()).done("the hints' status");
        if status.guest_cmd == Some(0) {
            assert!(status.host_cmd > 1, "{status:?}");
            break;
        }
        assert!(begin.elapsed() < limits::COMMAND, "the guest does not stop hinting: {status:?}");
        thread::sleep(Duration::from_millis(200));
    }
    runtime.block_on(vm.stop_balloon_free_page_hinting_run()).done("stopping hints");
    let status = runtime.block_on(vm.get_balloon_free_page_hinting_run_status()).done("the hints' status");
    assert_eq!(status.host_cmd, 1);
}

fn memory_that_is_plugged_in(judge: &mut Judge) {
    let before: u64 =
        judge.run("awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo").trim().parse().unwrap();
    let Judge { vm, runtime, .. } = judge;
    let update = UpdateMemoryHotplugConfiguration { requested_size_mib: 128 };
    runtime.block_on(vm.update_memory_hotplug_configuration(update)).done("PATCH /hotplug/memory");
    let begin = Instant::now();
    loop {
        let status = runtime.block_on(vm.get_memory_hotplug_status()).done("GET /hotplug/memory");
        assert_eq!((status.total_size_mib, status.requested_size_mib), (256, 128));
        if status.plugged_size_mib == 128 {
            break;
        }
        assert!(begin.elapsed() < limits::COMMAND, "not plugged: {status:?}");
        thread::sleep(Duration::from_millis(200));
    }
    // The device has given it all before the guest's kernel has put the last of it to use.
    let wanted = before + 100;
    judge.run(&format!(
        "until [ $(awk '/MemTotal/ {{print int($2 / 1024)}}' /proc/meminfo) -gt {wanted} ]; do sleep 0.1; done"
    ));
}

fn pauses(judge: &mut Judge) {
    for _ in 0..3 {
        let Judge { vm, runtime, .. } = judge;
        runtime.block_on(vm.pause()).done("pausing");
        assert_eq!(vm.get_state(), VmState::Paused);
        assert!(runtime.block_on(vm.get_info()).done("GET /").is_paused);
        is_no_snapshot(vm, runtime);
        runtime.block_on(vm.resume()).done("resuming");
        assert!(!runtime.block_on(vm.get_info()).done("GET /").is_paused);
        assert_eq!(judge.run("echo still here"), "still here\n");
    }
}

/// It is not there yet, and says so instead of making none.
fn is_no_snapshot(vm: &mut Vm<Executor, DirectProcessSpawner, TokioRuntime>, runtime: &Runtime) {
    // Apart from the guest's files: the client's end is in trouble with files that were never made.
    let _entered = runtime.enter();
    let mut apart = Resources::new(DirectProcessSpawner, TokioRuntime, VmmOwnershipModel::Shared);
    let mut file =
        |name: &str| apart.create_resource(PathBuf::from(name), ResourceType::Produced).done("a file to be");
    let (snapshot, mem_file) = (file("/snapshot"), file("/memory"));
    let create = CreateSnapshot { snapshot_type: Some(SnapshotType::Full), snapshot, mem_file };
    match runtime.block_on(vm.create_snapshot(create)) {
        Err(VmApiError::ReceivedErrorResponse { status_code, fault_message }) => {
            assert_eq!(status_code.as_u16(), 400);
            assert!(fault_message.contains("/snapshot/create"), "{fault_message}");
        }
        other => panic!("{other:?}"),
    }
}

/// fctools starts, presses the keys and waits; each request is said by curl, before the start too.
#[test]
fn a_stranger_starts_a_vmm_and_says_each_request_by_itself() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _entered = runtime.enter();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let resources = Resources::new(DirectProcessSpawner, TokioRuntime, VmmOwnershipModel::Shared);
    let arguments = VmmArguments::new(VmmApiSocket::Enabled(path("api.sock")));
    let executor = Executor::from(UnrestrictedVmmExecutor::new(arguments).id(VmmId::new(ID).unwrap()));
    let mut vmm = VmmProcess::new(executor, resources, installation(directory.path(), &version()));
    runtime.block_on(vmm.prepare()).done("preparing");
    assert_eq!(vmm.get_state(), VmmProcessState::AwaitingStart);
    runtime.block_on(vmm.invoke(None)).done("starting");
    let socket = vmm.get_socket_path().unwrap();
    let begin = Instant::now();
    while !socket.exists() {
        assert!(begin.elapsed() < limits::API, "no socket");
        thread::sleep(Duration::from_millis(20));
    }
    let say = |method: &str, path: &str, body: Option<Value>| {
        let (status, text) = curl(&socket, method, path, body);
        assert!(status / 100 == 2, "{method} {path}: {status} {text}");
        if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() }
    };
    say("PUT", "/machine-config", Some(json!({"vcpu_count": 1, "mem_size_mib": 128})));
    say("PATCH", "/machine-config", Some(json!({"vcpu_count": 2})));
    let told = say("GET", "/machine-config", None);
    assert_eq!((&told["vcpu_count"], &told["mem_size_mib"]), (&json!(2), &json!(128)));
    say("PUT", "/serial", Some(json!({"serial_out_path": path("serial")})));
    let boot_args = format!("{CONSOLE} quiet reboot=k");
    let kernel = json!({
        "kernel_image_path": Kernel::Elf.path(),
        "initrd_path": asset(provide::INITRAMFS),
        "boot_args": boot_args,
    });
    say("PUT", "/boot-source", Some(kernel));
    assert_eq!(say("GET", "/", None)["state"], "Not started");
    let config = say("GET", "/vm/config", None);
    contains(
        &config,
        &json!({"machine-config": {"vcpu_count": 2}, "boot-source": {"boot_args": boot_args}}),
        "config",
    );
    say("PUT", "/actions", Some(json!({"action_type": "InstanceStart"})));
    let begin = Instant::now();
    while !read(&path("serial")).contains("BERTH-GUEST-READY") {
        assert!(
            begin.elapsed() < limits::BOOT,
            "the guest says nothing where it was told to: {}",
            read(&path("serial"))
        );
        thread::sleep(Duration::from_millis(100));
    }
    let (status, text) = curl(&socket, "PATCH", "/machine-config", Some(json!({"vcpu_count": 1})));
    assert_eq!(status, 400, "{text}");
    for (state, told) in [("Paused", "Paused"), ("Resumed", "Running")] {
        say("PATCH", "/vm", Some(json!({"state": state})));
        assert_eq!(say("GET", "/", None)["state"], told);
    }
    // The keys are a word to the guest's init, which goes down.
    runtime.block_on(vmm.send_ctrl_alt_del()).done("the keys");
    let exit = async { tokio::time::timeout(limits::EXIT, vmm.wait_for_exit()).await };
    let status = runtime.block_on(exit).expect("it does not end").done("the end");
    assert!(status.success(), "{status}");
    assert_eq!(vmm.get_state(), VmmProcessState::Exited);
    runtime.block_on(vmm.cleanup()).done("cleaning up");
    assert!(!socket.exists());

    // And one that is killed.
    let resources = Resources::new(DirectProcessSpawner, TokioRuntime, VmmOwnershipModel::Shared);
    let arguments = VmmArguments::new(VmmApiSocket::Enabled(path("api.sock")));
    let executor = Executor::from(UnrestrictedVmmExecutor::new(arguments).id(VmmId::new(ID).unwrap()));
    let other = tempfile::tempdir().unwrap();
    let mut vmm = VmmProcess::new(executor, resources, installation(other.path(), &version()));
    runtime.block_on(vmm.prepare()).done("preparing");
    runtime.block_on(vmm.invoke(None)).done("starting");
    vmm.send_sigkill().done("killing");
    // Not by waiting, which is refused where the end has been seen already.
    let begin = Instant::now();
    let state = loop {
        match vmm.get_state() {
            VmmProcessState::Started => assert!(begin.elapsed() < limits::EXIT, "it does not end"),
            state => break state,
        }
        thread::sleep(Duration::from_millis(20));
    };
    assert!(matches!(state, VmmProcessState::Crashed(status) if !status.success()), "{state}");
    runtime.block_on(vmm.cleanup()).done("cleaning up");
}

fn what_fctools_has_no_call_for(judge: &mut Judge) {
    judge.change(
        "PATCH",
        "/pmem/pmem",
        Some(json!({"id": "pmem", "rate_limiter": {"ops": {"size": 100, "refill_time": 100}}})),
    );
    judge.run("echo again | dd of=/dev/pmem0 bs=4096 seek=101 conv=sync,fsync");
    let (status, text) = judge.curl("GET", "/mmds", None);
    assert_eq!((status, text.contains("i-2")), (200, true), "{text}");
    if judge.way != Way::File {
        return;
    }
    // With PCI, disks and interfaces come and go.
    let extra = blank_disk(judge.path("extra.img"), MIB);
    let drive = json!({"drive_id": "extra", "is_root_device": false, "path_on_host": extra});
    judge.change("PUT", "/drives/extra", Some(drive));
    judge.run(
        "until [ -b /dev/vde ]; do sleep 0.1; done; echo plugged | dd of=/dev/vde bs=512 conv=sync,fsync",
    );
    assert!(fs::read(extra).unwrap().starts_with(b"plugged\n"));
    judge.change("DELETE", "/drives/extra", None);
    judge.run("while [ -e /dev/vde ]; do sleep 0.1; done");
    let tap = Tap::new(63, &["user", "root"]);
    let interface = json!({"iface_id": "net2", "host_dev_name": tap.name()});
    judge.change("PUT", "/network-interfaces/net2", Some(interface));
    judge.run("until [ -e /sys/class/net/eth1 ]; do sleep 0.1; done");
    let (own, other) = (tap.guest(), tap.host());
    judge.run(&format!("ip address add {own}/24 dev eth1; ip link set eth1 up; ping -c 1 -W 30 {other}"));
    judge.change("DELETE", "/network-interfaces/net2", None);
    judge.run("while [ -e /sys/class/net/eth1 ]; do sleep 0.1; done");
    let pmem = blank_disk(judge.path("more.img"), 4 * MIB);
    judge.change("PUT", "/pmem/more", Some(json!({"id": "more", "path_on_host": pmem})));
    judge.run("until [ -b /dev/pmem1 ]; do sleep 0.1; done");
    judge.change("DELETE", "/pmem/more", None);
    judge.run("while [ -e /dev/pmem1 ]; do sleep 0.1; done");
}

fn what_was_done_is_counted_and_logged(judge: &mut Judge) {
    let lines = judge.metrics();
    assert!(lines.len() >= 2, "{} lines", lines.len());
    let sum = |of: fn(&Metrics) -> u64| lines.iter().map(of).sum::<u64>();
    type Count = fn(&Metrics) -> u64;
    let counts: [(&str, Count); 10] = [
        ("block.write_bytes", |line| line.block.write_bytes),
        ("net.rx_packets_count", |line| line.net.rx_packets_count),
        ("net.tx_bytes_count", |line| line.net.tx_bytes_count),
        ("mmds.rx_accepted", |line| line.mmds.rx_accepted),
        ("vsock.conns_added", |line| line.vsock.conns_added),
        ("entropy.entropy_bytes", |line| line.entropy.entropy_bytes),
        ("balloon.inflate_count", |line| line.balloon.inflate_count),
        ("vcpu.exit_io_out", |line| line.vcpu.exit_io_out),
        ("patch_api_requests.drive_count", |line| line.patch_api_requests.drive_count),
        ("get_api_requests.instance_info_count", |line| line.get_api_requests.instance_info_count),
    ];
    for (name, of) in counts {
        assert!(sum(of) > 0, "{name} is 0");
    }
    assert_eq!(sum(|line| line.vmm.panic_count + line.seccomp.num_faults), 0);
    let log = read(&judge.log);
    assert!(log.contains(&format!("[{ID}:")), "{log}");
    assert!(log.contains("/balloon/hinting/start"), "{log}");
}

fn it_goes_down_and_nothing_is_left(mut judge: Judge) {
    let action = VmShutdownAction {
        method: VmShutdownMethod::CtrlAltDel,
        timeout: Some(limits::EXIT),
        graceful: true,
    };
    let outcome = judge.runtime.block_on(judge.vm.shutdown([action])).done("shutting down");
    assert!(outcome.is_fully_graceful() && outcome.errors.is_empty(), "{outcome:?}");
    assert_eq!(judge.vm.get_state(), VmState::Exited);
    let (socket, root) = (judge.path("api.sock"), judge.path(""));
    judge.runtime.block_on(judge.vm.cleanup()).done("cleaning up");
    assert!(!socket.exists());
    assert_eq!(root.exists(), judge.way != Way::Jailed, "a cell goes, and a directory of the caller's stays");
}
