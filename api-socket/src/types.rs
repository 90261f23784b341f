//! The wire types: request bodies, replies, and the enum of each.
//!
//! Field names, defaults and optionality are Firecracker's. Every object rejects fields it does not know, except
//! [`TokenBucket`]. A type accepts whatever its JSON type allows; what the values must be beyond that (a drive with a
//! socket has no path, a memory size fits its pages) is not checked here. The plain limits of a field stand here as
//! constants, for those who check them and for the OpenAPI description.

mod cpu_config;
mod mac;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Map, Value};

pub use cpu_config::{
    Bitmap, CpuConfig, CpuConfigSource, CpuidLeafModifier, CpuidModifier, CpuidRegister, KvmCapability,
    MsrModifier,
};
pub use mac::MacAddress;

/// What `vcpu_count` may be.
pub const VCPU_COUNT: RangeInclusive<u8> = 1..=32;
/// The smallest `mem_size_mib`; the largest is what the host can map.
pub const MEM_SIZE_MIB_MIN: u64 = 1;
/// The machine of a guest for which nothing was set: `vcpu_count`.
pub const DEFAULT_VCPU_COUNT: u8 = 1;
/// The machine of a guest for which nothing was set: `mem_size_mib`.
pub const DEFAULT_MEM_SIZE_MIB: u64 = 128;

/// What the `mtu` of a network interface may be.
pub const MTU: RangeInclusive<u16> = 68..=65535;
/// What the `io_thread` of a device may be. More threads than this would wait for the host's processors, not for each
/// other.
pub const IO_THREAD: RangeInclusive<u8> = 0..=15;

/// What the `queue_pairs` of a network interface may be.
pub const QUEUE_PAIRS: RangeInclusive<u8> = 1..=32;
/// What the `queues` of a drive may be.
pub const QUEUES: RangeInclusive<u8> = 1..=16;

/// Where guests find the metadata service, unless told otherwise.
pub const DEFAULT_MMDS_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// `columns` of a console where nothing is said.
pub const DEFAULT_CONSOLE_COLUMNS: u16 = 80;
/// `rows` of a console where nothing is said.
pub const DEFAULT_CONSOLE_ROWS: u16 = 25;

/// Most `ports` of a console.
pub const MAX_CONSOLE_PORTS: usize = 15;
/// The longest `name` of a console's port, in bytes.
pub const MAX_CONSOLE_PORT_NAME: usize = 63;

/// What `guest_cid` may be: the numbers below are taken, the one above means anybody (VIRTIO 1.3, section 5.10.4).
pub const GUEST_CID: RangeInclusive<u32> = 3..=u32::MAX - 1;

/// One request to the guest API, parsed. What arrives on the socket and what a configuration file says are both a
/// list of these.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// `GET /`
    GetInstanceInfo,
    /// `GET /version`
    GetVersion,
    /// `GET /vm/config`
    GetVmConfig,
    /// `GET /machine-config`
    GetMachineConfig,
    /// `PUT /machine-config`: fields left out take their default.
    PutMachineConfig(MachineConfig),
    /// `PATCH /machine-config`: fields left out keep their value; at least one is there.
    PatchMachineConfig(MachineConfigUpdate),
    /// `PUT /boot-source`
    PutBootSource(BootSource),
    /// `PUT /cpu-config`
    PutCpuConfig(CpuConfig),
    /// `PUT /drives/{drive_id}`
    PutDrive(Drive),
    /// `PATCH /drives/{drive_id}`
    PatchDrive(DriveUpdate),
    /// `DELETE /drives/{drive_id}`: the id.
    DeleteDrive(String),
    /// `PUT /network-interfaces/{iface_id}`
    PutNetworkInterface(NetworkInterface),
    /// `PATCH /network-interfaces/{iface_id}`
    PatchNetworkInterface(NetworkInterfaceUpdate),
    /// `DELETE /network-interfaces/{iface_id}`: the id.
    DeleteNetworkInterface(String),
    /// `PUT /pmem/{id}`
    PutPmem(Pmem),
    /// `PATCH /pmem/{id}`
    PatchPmem(PmemUpdate),
    /// `DELETE /pmem/{id}`: the id.
    DeletePmem(String),
    /// `GET /balloon`
    GetBalloon,
    /// `PUT /balloon`
    PutBalloon(Balloon),
    /// `PATCH /balloon`
    PatchBalloon(BalloonUpdate),
    /// `GET /balloon/statistics`
    GetBalloonStats,
    /// `PATCH /balloon/statistics`
    PatchBalloonStats(BalloonStatsUpdate),
    /// `PATCH /balloon/hinting/start`
    StartBalloonHinting(BalloonStartCmd),
    /// `PATCH /balloon/hinting/stop`
    StopBalloonHinting,
    /// `GET /balloon/hinting/status`
    GetBalloonHintingStatus,
    /// `GET /hotplug/memory`
    GetMemoryHotplug,
    /// `PUT /hotplug/memory`
    PutMemoryHotplug(MemoryHotplugConfig),
    /// `PATCH /hotplug/memory`
    PatchMemoryHotplug(MemoryHotplugSizeUpdate),
    /// `PUT /console`
    PutConsole(Console),
    /// `PATCH /console`
    PatchConsole(ConsoleUpdate),
    /// `PUT /vsock`
    PutVsock(Vsock),
    /// `PUT /entropy`
    PutEntropy(Entropy),
    /// `PATCH /entropy`
    PatchEntropy(EntropyUpdate),
    /// `PUT /serial`
    PutSerial(Serial),
    /// `GET /mmds`
    GetMmds,
    /// `PUT /mmds`: what guests can read; a secret of theirs.
    PutMmds(Map<String, Value>),
    /// `PATCH /mmds`: a merge patch (RFC 7396).
    PatchMmds(Map<String, Value>),
    /// `PUT /mmds/config`
    PutMmdsConfig(MmdsConfig),
    /// `PUT /logger`
    PutLogger(Logger),
    /// `PUT /metrics`
    PutMetrics(Metrics),
    /// `PUT /actions`
    Action(ActionType),
    /// `PATCH /vm`
    PatchVm(VmState),
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// Done; 204, no body.
    Empty,
    /// To [`Request::GetInstanceInfo`]; 200.
    InstanceInfo(InstanceInfo),
    /// To [`Request::GetVersion`]; 200.
    Version(Version),
    /// To [`Request::GetMachineConfig`]; 200.
    MachineConfig(MachineConfig),
    /// To [`Request::GetVmConfig`]; 200.
    VmConfig(Box<VmConfig>),
    /// To [`Request::GetMmds`]; 200.
    Mmds(Value),
    /// To [`Request::GetBalloon`]; 200.
    Balloon(Balloon),
    /// To [`Request::GetBalloonStats`]; 200.
    BalloonStats(Box<BalloonStats>),
    /// To [`Request::GetBalloonHintingStatus`]; 200.
    BalloonHintingStatus(BalloonHintingStatus),
    /// To [`Request::GetMemoryHotplug`]; 200.
    MemoryHotplug(MemoryHotplugStatus),
    /// Not done, and nothing was changed.
    Fault(Fault),
}

impl From<Fault> for Reply {
    fn from(fault: Fault) -> Reply {
        Reply::Fault(fault)
    }
}

/// A refused request: the status and the text of `{"fault_message": ...}`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// The HTTP status, 400 unless there is a reason.
    pub status: u16,
    /// For a person: which field, which value, which rule, what to do.
    pub message: String,
}

impl Fault {
    /// A fault with status 400, which is what nearly every refusal of this API is.
    pub fn bad_request(message: impl Into<String>) -> Fault {
        Fault { status: 400, message: message.into() }
    }
}

/// Reply of `GET /`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceInfo {
    /// The id given at start (`--id`).
    pub id: String,
    pub state: InstanceState,
    pub vmm_version: String,
    /// The name the VMM was started under; see [`Version`].
    pub app_name: String,
}

/// Where a guest is in its life, as `GET /` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum InstanceState {
    #[serde(rename = "Not started")]
    NotStarted,
    Running,
    Paused,
}

/// Reply of `GET /version`. Clients written for Firecracker read this field, whatever the VMM calls itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Version {
    pub firecracker_version: String,
}

/// Body of `PUT /machine-config`, reply of the `GET`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Within [`VCPU_COUNT`].
    pub vcpu_count: u8,
    /// MiB, at least [`MEM_SIZE_MIB_MIN`].
    pub mem_size_mib: u64,
    /// Two threads to a core.
    #[serde(default)]
    pub smt: bool,
    /// Deprecated: `/cpu-config` says it better.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// Keep a log of written pages, for incremental snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    #[serde(default)]
    pub huge_pages: HugePages,
}

impl Default for MachineConfig {
    fn default() -> MachineConfig {
        MachineConfig {
            vcpu_count: DEFAULT_VCPU_COUNT,
            mem_size_mib: DEFAULT_MEM_SIZE_MIB,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
        }
    }
}

/// Body of `PATCH /machine-config`: `None` leaves a value as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigUpdate {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpu_count: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem_size_mib: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub smt: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<HugePages>,
}

/// The pages that back guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// The host's base pages.
    #[default]
    None,
    /// Base pages that the host may merge to huge ones.
    Transparent,
    /// 2 MiB pages of hugetlbfs, which must have been set aside on the host.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// The named CPU models of old; each is for one vendor's CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuTemplate {
    C3,
    T2,
    T2S,
    T2CL,
    T2A,
    V1N1,
    None,
}

/// Body of `PUT /boot-source`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    pub kernel_image_path: PathBuf,
    pub initrd_path: Option<PathBuf>,
    /// The kernel command line; `None` is the VMM's own default.
    pub boot_args: Option<String>,
}

/// Body of `PUT /drives/{drive_id}`. A drive has either a `path_on_host` (virtio-blk in this process) or a `socket`
/// (vhost-user-blk in another).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// The id of the path.
    pub drive_id: String,
    /// The partition to boot from; only with `is_root_device`.
    pub partuuid: Option<String>,
    pub is_root_device: bool,
    #[serde(default)]
    pub cache_type: CacheType,
    /// Not with `socket`. Absent is `false`.
    pub is_read_only: Option<bool>,
    /// An image or a block device. Not with `socket`.
    pub path_on_host: Option<PathBuf>,
    /// Not with `socket`.
    pub rate_limiter: Option<RateLimiter>,
    /// Not with `socket`. Absent is [`IoEngine::Sync`].
    pub io_engine: Option<IoEngine>,
    /// The vhost-user back-end's Unix socket.
    pub socket: Option<PathBuf>,
    /// Request queues, within [`QUEUES`]; absent is 1. Ours, and so left out of a reply where it was not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u8>,
    /// The thread that serves its queues, within [`IO_THREAD`]; absent is 0. Ours, and so left out of a reply where it was
    /// not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_thread: Option<u8>,
    /// Pass by the host's page cache; absent is `false`. Not with `socket`. Ours, as above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct: Option<bool>,
    /// What is in `path_on_host`; never guessed. Absent is [`DiskFormat::Raw`]. Not with `socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// The images behind `path_on_host`, the nearest first; only with [`DiskFormat::Qcow2`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backing: Vec<BackingFile>,
}

/// An image that is read where those before it have nothing, and never written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackingFile {
    pub path_on_host: PathBuf,
    #[serde(default)]
    pub format: DiskFormat,
}

/// What is in a disk's file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskFormat {
    /// The disk, byte for byte.
    #[default]
    Raw,
    /// QEMU's format, version 3.
    Qcow2,
}

/// Body of `PATCH /drives/{drive_id}`: `None` leaves a value as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// The id of the path.
    pub drive_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// What a guest's flush does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// Nothing: the guest is not offered a flush.
    #[default]
    Unsafe,
    /// Everything written so far is on stable storage when it completes.
    Writeback,
    /// Nothing, as each write is on stable storage when it completes: the guest is not offered a flush. Ours.
    Writethrough,
}

/// How a drive's requests reach the host's disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    #[default]
    Sync,
    /// io_uring
    Async,
}

/// Body of `PUT /network-interfaces/{iface_id}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// The id of the path.
    pub iface_id: String,
    /// The name of a tap, or `fd:NAME` for one that was handed over: several with commas between them for as many
    /// queue pairs.
    pub host_dev_name: String,
    /// Absent, the guest makes one up.
    pub guest_mac: Option<MacAddress>,
    /// Bytes, within [`MTU`]; absent, the guest is told nothing.
    pub mtu: Option<u16>,
    /// From the host to the guest.
    pub rx_rate_limiter: Option<RateLimiter>,
    /// From the guest to the host.
    pub tx_rate_limiter: Option<RateLimiter>,
    /// Pairs of a receive and a transmit queue, within [`QUEUE_PAIRS`]; absent is 1. Ours, and so left out of a reply
    /// where it was not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_pairs: Option<u8>,
    /// As [`Drive::io_thread`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_thread: Option<u8>,
    /// The host's kernel moves the packets. Not with limits, nor on an interface of the metadata service. Ours too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost: Option<bool>,
    /// With `vhost`: `fd:NAME` of /dev/vhost-net that was handed over, one for each queue pair with commas between them;
    /// absent, it is opened. Ours too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_fds: Option<String>,
}

/// Body of `PATCH /network-interfaces/{iface_id}`: `None` leaves a limit as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfaceUpdate {
    /// The id of the path.
    pub iface_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// Body of `PUT /pmem/{id}`: a file that the guest sees as persistent memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    /// The id of the path.
    pub id: String,
    /// A file or a block device.
    pub path_on_host: PathBuf,
    /// The guest boots from it.
    #[serde(default)]
    pub root_device: bool,
    /// The guest's writes have no effect.
    #[serde(default)]
    pub read_only: bool,
    /// Of flushes; each counts as one request, and as bytes with the size of the file.
    pub rate_limiter: Option<RateLimiter>,
    /// As [`Drive::io_thread`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_thread: Option<u8>,
}

/// Body of `PATCH /pmem/{id}`: `None` leaves the limits as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemUpdate {
    /// The id of the path.
    pub id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// Limits of bytes and of requests; `None` is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Tokens are bytes.
    pub bandwidth: Option<TokenBucket>,
    /// Tokens are requests.
    pub ops: Option<TokenBucket>,
}

/// A bucket of `size` tokens that refills evenly in `refill_time`. 0 in either switches the limit off.
// Alone among the bodies it takes fields that it does not know: Firecracker does, and clients send some.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucket {
    /// Tokens.
    pub size: u64,
    /// Tokens, spent before those of the bucket and never refilled.
    pub one_time_burst: Option<u64>,
    /// Milliseconds.
    pub refill_time: u64,
}

/// Body of `PUT /vsock`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// Deprecated: a guest has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
    /// Within [`GUEST_CID`].
    pub guest_cid: u32,
    /// The Unix socket that the host's programs connect to; one for the guest's port N is at `<uds_path>_N`.
    pub uds_path: PathBuf,
    /// As [`Drive::io_thread`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_thread: Option<u8>,
}

/// Body of `PUT /balloon`, reply of the `GET`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// MiB that the guest is to give up.
    pub amount_mib: u32,
    /// The guest takes pages back before it kills a process for want of memory.
    pub deflate_on_oom: bool,
    /// Seconds between two readings of the guest's statistics; 0 is none ever.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// The guest can be asked for its free pages.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// The guest gives its free pages up by itself.
    #[serde(default)]
    pub free_page_reporting: bool,
    /// As [`Drive::io_thread`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_thread: Option<u8>,
}

/// Body of `PATCH /balloon`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// MiB that the guest is to give up from now on.
    pub amount_mib: u32,
}

/// Body of `PATCH /balloon/statistics`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatsUpdate {
    /// Seconds; 0 if and only if it was 0 at the start.
    pub stats_polling_interval_s: u16,
}

/// Reply of `GET /balloon/statistics`: the balloon, and what the guest says of its memory. What it does not say is left
/// out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStats {
    /// Pages of 4 KiB, as all pages here.
    pub target_pages: u32,
    pub actual_pages: u32,
    /// MiB.
    pub target_mib: u32,
    pub actual_mib: u32,
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_memory: Option<u64>,
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_memory: Option<u64>,
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_memory: Option<u64>,
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oom_kill: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alloc_stall: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub async_scan: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct_scan: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub async_reclaim: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct_reclaim: Option<u64>,
}

/// Body of `PATCH /balloon/hinting/start`; a request without one is the default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStartCmd {
    /// The guest has its pages again as soon as it has named the last.
    #[serde(default = "yes")]
    pub acknowledge_on_stop: bool,
}

impl Default for BalloonStartCmd {
    fn default() -> BalloonStartCmd {
        BalloonStartCmd { acknowledge_on_stop: true }
    }
}

fn yes() -> bool {
    true
}

/// Reply of `GET /balloon/hinting/status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonHintingStatus {
    /// What the guest is told: the number of a run, from 2 on; 1 that it is done; 0 before the first.
    pub host_cmd: u32,
    /// What the guest said last: the number of a run; 0 that it has no more pages; nothing yet.
    pub guest_cmd: Option<u32>,
}

/// Body of `PUT /hotplug/memory`. Sizes are in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplugConfig {
    /// As much as can be plugged, beside the memory that the guest starts with; whole slots.
    pub total_size_mib: u64,
    /// What the guest reaches as a whole or not at all; whole blocks.
    #[serde(default = "MemoryHotplugConfig::slot_size_mib")]
    pub slot_size_mib: u64,
    /// What the guest plugs and unplugs.
    #[serde(default = "MemoryHotplugConfig::block_size_mib")]
    pub block_size_mib: u64,
    /// As [`Drive::io_thread`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_thread: Option<u8>,
}

impl MemoryHotplugConfig {
    fn slot_size_mib() -> u64 {
        128
    }

    fn block_size_mib() -> u64 {
        2
    }
}

impl Default for MemoryHotplugConfig {
    fn default() -> MemoryHotplugConfig {
        let (slot_size_mib, block_size_mib) = (Self::slot_size_mib(), Self::block_size_mib());
        MemoryHotplugConfig { total_size_mib: slot_size_mib, slot_size_mib, block_size_mib, io_thread: None }
    }
}

/// Body of `PATCH /hotplug/memory`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplugSizeUpdate {
    /// MiB that the guest is to have plugged from now on; whole blocks.
    pub requested_size_mib: u64,
}

/// Reply of `GET /hotplug/memory`. All in MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplugStatus {
    pub total_size_mib: u64,
    pub slot_size_mib: u64,
    pub block_size_mib: u64,
    /// What the guest has plugged.
    pub plugged_size_mib: u64,
    /// What it is to have plugged.
    pub requested_size_mib: u64,
}

/// Body of `PUT /entropy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    pub rate_limiter: Option<RateLimiter>,
    /// As [`Drive::io_thread`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_thread: Option<u8>,
}

/// Body of `PATCH /entropy`: `None` leaves the limits as they are. Ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntropyUpdate {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// Body of `PUT /console`: a virtio console, the guest's `hvc0`. Ours; Firecracker has none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// A terminal, named pipe or file for what the guest writes.
    pub output_path: PathBuf,
    /// A terminal or named pipe whose bytes the guest reads; may be the terminal of `output_path`.
    pub input_path: Option<PathBuf>,
    /// Characters in a line, as the guest is told.
    #[serde(default = "default_columns")]
    pub columns: u16,
    /// Lines, as the guest is told.
    #[serde(default = "default_rows")]
    pub rows: u16,
    /// Of what the guest writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// As [`Drive::io_thread`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_thread: Option<u8>,
    /// Ports beside this one, at most [`MAX_CONSOLE_PORTS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<ConsolePort>,
}

/// A further port of a [`Console`]: another terminal of the guest, or a stream of bytes that its programs find by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsolePort {
    /// At most [`MAX_CONSOLE_PORT_NAME`] letters, digits, dots, hyphens and underscores; no other port has it.
    pub name: String,
    /// A terminal, the guest's `hvc1` and so on.
    #[serde(default)]
    pub is_console: bool,
    /// As that of the console.
    pub output_path: PathBuf,
    /// As that of the console.
    pub input_path: Option<PathBuf>,
    /// Of a terminal only; absent is [`DEFAULT_CONSOLE_COLUMNS`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<u16>,
    /// Of a terminal only; absent is [`DEFAULT_CONSOLE_ROWS`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<u16>,
    /// As that of the console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// Body of `PATCH /console`: `None` leaves things as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleUpdate {
    /// Characters in a line, of a terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<u16>,
    /// Lines, of a terminal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<u16>,
    /// Of what the guest writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// The name of the port that changes; absent is the console itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
}

impl ConsoleUpdate {
    /// Another size of the console itself, or of the port with this name.
    pub fn size(columns: u16, rows: u16, port: Option<String>) -> ConsoleUpdate {
        ConsoleUpdate { columns: Some(columns), rows: Some(rows), rate_limiter: None, port }
    }
}

fn default_columns() -> u16 {
    DEFAULT_CONSOLE_COLUMNS
}

fn default_rows() -> u16 {
    DEFAULT_CONSOLE_ROWS
}

/// Body of `PUT /serial`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// A file or named pipe for what the guest writes; `None` is the VMM's standard output.
    pub serial_out_path: Option<PathBuf>,
    /// Tokens are bytes.
    pub rate_limiter: Option<TokenBucket>,
}

/// Body of `PUT /mmds/config`: the metadata service, and who reaches it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    #[serde(default)]
    pub version: MmdsVersion,
    /// The ids of network interfaces, at least one.
    pub network_interfaces: Vec<String>,
    /// Link-local; absent is [`DEFAULT_MMDS_ADDRESS`].
    pub ipv4_address: Option<Ipv4Addr>,
    /// Answer in the form of EC2's service whatever a guest says that it accepts.
    #[serde(default)]
    pub imds_compat: bool,
}

/// Whom the metadata service answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MmdsVersion {
    /// Everyone. Deprecated: a program of the guest's that fetches what strangers name can be made to read it.
    #[default]
    V1,
    /// Those with a session token.
    V2,
}

/// Body of `PUT /logger`: `None` leaves a value as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file or named pipe.
    pub log_path: Option<PathBuf>,
    pub level: Option<LogLevel>,
    /// Write each line's level.
    pub show_level: Option<bool>,
    /// Write each line's source file and line.
    pub show_log_origin: Option<bool>,
    /// Write only lines of modules whose path begins so.
    pub module: Option<String>,
}

/// The least severe line that is written. Read in any case; `Warn` is `Warning`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum LogLevel {
    Off,
    Error,
    Warning,
    #[default]
    Info,
    Debug,
    Trace,
}

/// What [`LogLevel`] is read from, case apart.
const LOG_LEVELS: [(&str, LogLevel); 7] = [
    ("Error", LogLevel::Error),
    ("Warning", LogLevel::Warning),
    ("Warn", LogLevel::Warning),
    ("Info", LogLevel::Info),
    ("Debug", LogLevel::Debug),
    ("Trace", LogLevel::Trace),
    ("Off", LogLevel::Off),
];

impl std::str::FromStr for LogLevel {
    type Err = String;

    fn from_str(text: &str) -> Result<LogLevel, String> {
        let found = LOG_LEVELS.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
        found.map(|(_, level)| *level).ok_or_else(|| {
            format!(
                "unknown variant `{text}`, expected one of `Error`, `Warning`, `Info`, `Debug`, `Trace`, `Off`"
            )
        })
    }
}

impl<'de> Deserialize<'de> for LogLevel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<LogLevel, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Body of `PUT /metrics`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// A file or named pipe.
    pub metrics_path: PathBuf,
    /// Write the instance's id in each line.
    #[serde(default)]
    pub emit_id: bool,
    /// Written in each line as given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub properties: Option<BTreeMap<String, String>>,
}

/// Body of `PUT /actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceAction {
    pub action_type: ActionType,
}

/// What `PUT /actions` can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActionType {
    /// Once, before anything runs.
    InstanceStart,
    /// Write a metrics line now.
    FlushMetrics,
    /// Ask the guest to shut down.
    SendCtrlAltDel,
}

/// Body of `PATCH /vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    pub state: VmState,
}

/// The state that `PATCH /vm` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    Paused,
    Resumed,
}

/// The whole configuration: reply of `GET /vm/config` and the document of `--config-file`.
///
/// In the reply, what is not configured is `null` and a list without members is empty; `logger`, `metrics` and
/// `cpu-config` are always `null`, as they are with Firecracker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VmConfig {
    #[serde(default)]
    pub drives: Vec<Drive>,
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterface>,
    #[serde(default)]
    pub pmem: Vec<Pmem>,
    pub boot_source: BootSource,
    pub cpu_config: Option<CpuConfigSource>,
    pub logger: Option<Logger>,
    pub machine_config: Option<MachineConfig>,
    pub metrics: Option<Metrics>,
    pub vsock: Option<Vsock>,
    pub entropy: Option<Entropy>,
    pub mmds_config: Option<MmdsConfig>,
    pub balloon: Option<Balloon>,
    pub memory_hotplug: Option<MemoryHotplugConfig>,
    /// Left out of a reply where there is none: Firecracker's clients know no such section.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<Console>,
}
