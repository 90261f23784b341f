//! What a guest is made of, as plain data, and the API requests that say so.

use std::path::PathBuf;

use api_socket::{
    Balloon, BootSource, CacheType, Drive, Entropy, HugePages, MachineConfig, MemoryHotplugConfig,
    NetworkInterface, Pmem, Request, Vsock,
};

use super::{Name, asset, program};
use crate::host::provide;

/// The console's kernel arguments: what goes wrong shows, and a panic ends the guest instead of hanging it.
pub const CONSOLE: &str = "console=ttyS0 panic=1 berth.plain";

/// Set to anything, the guests' kernels say on the console what they do, from their first moment.
pub const VERBOSE: &str = "BERTH_VERBOSE";

/// Where the host's programs call the guest, and the guest's address.
pub const VSOCK: &str = "v.sock";
const GUEST_CID: u32 = 3;

/// A guest to be. Take [`Setup::default`] (a busybox shell in 128 MiB) or [`Setup::debian`] and change what matters.
#[derive(Clone, Debug)]
pub struct Setup {
    pub name: Name,
    pub vcpus: u8,
    pub smt: bool,
    pub memory_mib: u64,
    pub huge_pages: HugePages,
    pub kernel: Kernel,
    pub initramfs: bool,
    /// Another one than the asset.
    pub initrd: Option<PathBuf>,
    pub drives: Vec<Drive>,
    pub interfaces: Vec<NetworkInterface>,
    pub pmems: Vec<Pmem>,
    pub entropy: bool,
    pub balloon: Option<Balloon>,
    pub memory_hotplug: Option<MemoryHotplugConfig>,
    /// Sockets at [`VSOCK`] in the guest's directory.
    pub vsock: bool,
    /// All of the kernel command line but for [`CONSOLE`] and how much the kernel says.
    pub command_line: String,
    /// Further arguments of the VMM.
    pub arguments: Vec<String>,
}

/// What the guest boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kernel {
    BzImage,
    Elf,
    Path(PathBuf),
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            name: Name::Berth,
            vcpus: 1,
            smt: false,
            memory_mib: 128,
            huge_pages: HugePages::None,
            // Unpacking a bzImage costs seconds in a nested host.
            kernel: Kernel::Elf,
            initramfs: true,
            initrd: None,
            drives: Vec::new(),
            interfaces: Vec::new(),
            pmems: Vec::new(),
            entropy: false,
            balloon: None,
            memory_hotplug: None,
            vsock: false,
            command_line: String::new(),
            arguments: Vec::new(),
        }
    }
}

impl Setup {
    /// The Debian whose root file system is on this disk; a copy of the asset, for it will be written to.
    pub fn debian(disk: PathBuf) -> Setup {
        Setup {
            memory_mib: 512,
            drives: vec![disk_drive("root", disk)],
            command_line: "root=LABEL=berth-root rw".into(),
            ..Setup::default()
        }
    }

    /// A busybox shell like [`Setup::default`] of a kernel that needs no ACPI to find what there is, without PCI.
    pub fn mptable() -> Setup {
        Setup {
            name: Name::Firecracker,
            memory_mib: 256,
            kernel: Kernel::Path(program(provide::MPTABLE_BZIMAGE)),
            initrd: Some(program(provide::MPTABLE_INITRAMFS)),
            ..Setup::default()
        }
    }

    /// The requests that configure it, without the start.
    pub fn requests(&self) -> Vec<Request> {
        let machine = MachineConfig {
            vcpu_count: self.vcpus,
            mem_size_mib: self.memory_mib,
            smt: self.smt,
            huge_pages: self.huge_pages,
            ..MachineConfig::default()
        };
        let boot = BootSource {
            kernel_image_path: self.kernel.path(),
            initrd_path: self.initrd.clone().or_else(|| self.initramfs.then(|| asset(provide::INITRAMFS))),
            boot_args: Some(self.kernel_arguments()),
        };
        let mut requests = vec![Request::PutMachineConfig(machine), Request::PutBootSource(boot)];
        requests.extend(self.drives.iter().cloned().map(Request::PutDrive));
        requests.extend(self.interfaces.iter().cloned().map(Request::PutNetworkInterface));
        requests.extend(self.pmems.iter().cloned().map(Request::PutPmem));
        requests.extend(self.balloon.map(Request::PutBalloon));
        requests.extend(self.memory_hotplug.map(Request::PutMemoryHotplug));
        requests.extend(self.entropy.then(|| Request::PutEntropy(Entropy::default())));
        let vsock = || Vsock { guest_cid: GUEST_CID, uds_path: VSOCK.into(), ..Vsock::default() };
        requests.extend(self.vsock.then(|| Request::PutVsock(vsock())));
        requests
    }

    fn kernel_arguments(&self) -> String {
        // Errors too are left to dmesg: on the console they would lie in what commands say. A panic shows all the same.
        let talk = if std::env::var_os(VERBOSE).is_some() { "earlyprintk=ttyS0" } else { "quiet loglevel=1" };
        format!("{CONSOLE} {talk} {}", self.command_line)
    }
}

impl Kernel {
    pub fn path(&self) -> PathBuf {
        match self {
            Kernel::BzImage => asset(provide::BZIMAGE),
            Kernel::Elf => asset(provide::VMLINUX),
            Kernel::Path(path) => path.clone(),
        }
    }
}

/// A writable disk whose flushes reach the host's storage.
pub fn disk_drive(id: &str, path: PathBuf) -> Drive {
    Drive {
        drive_id: id.into(),
        is_root_device: false,
        cache_type: CacheType::Writeback,
        path_on_host: Some(path),
        ..Drive::default()
    }
}
