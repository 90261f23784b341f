//! What a host is made of, from the assets and the programs that cargo built beside this one.
//!
//! In a host the guests' assets have the names of [`BZIMAGE`] and the constants below it.

use std::path::{Path, PathBuf};

use super::choose::Place;
use super::error::{Doing, Error, Result};
use super::image::Item;
use super::qemu::Forward;
use super::{Config, Images, Provisions};
use crate::assets::{self, Asset};

/// Debian's stock kernel as packaged.
pub const BZIMAGE: &str = "bzImage";
/// The same kernel as an ELF file.
pub const VMLINUX: &str = "vmlinux";
/// A small busybox system.
pub const INITRAMFS: &str = "initramfs.cpio";
/// The root file system of a Debian, ext4 without a partition table; in a nested host a block device. Read-only.
pub const DEBIAN: &str = "debian.ext4";

/// Debian's kernel that needs no ACPI, as packaged, and its initramfs. For tests alone.
pub const MPTABLE_BZIMAGE: &str = "mptable-bzImage";
pub const MPTABLE_INITRAMFS: &str = "mptable-initramfs.cpio";

/// Programs under test. A host shows them if they are built.
const PROGRAMS: [&str; 5] = ["berth", "berth-agent", "berth-jailer", "berth-vmm", "berthd"];

/// Tools, which a host shows from this program's own directory.
const TOOLS: [&str; 6] =
    ["berth-host", "berth-bench", "berth-attacker", "berth-killer", "berth-vsock", AGENT];

const AGENT: &str = "berth-host-agent";

/// What a caller of berth-host can choose.
#[derive(Clone, Debug)]
pub struct Wishes {
    pub place: Place,
    pub memory_mib: u64,
    pub processors: u32,
    pub forwards: Vec<Forward>,
    /// Shown among the build products.
    pub with: Vec<Item>,
    /// The directory of the programs under test, if not this program's own.
    pub programs: Option<PathBuf>,
    /// Show what nobody but tests boots, too, among the build products.
    pub for_tests: bool,
}

/// Collects everything for a host, and first makes what is not cached: that takes minutes, once.
pub fn config(wishes: Wishes) -> Result<Config> {
    let beside = own_directory()?;
    let agent = beside.join(AGENT);
    if !agent.is_file() {
        return Err(Error(format!("{} is not built: cargo build -p berth-tests --bins", agent.display())));
    }
    let programs = wishes.programs.as_ref().unwrap_or(&beside);
    let mut build: Vec<_> = PROGRAMS.map(|name| Item::new(name, programs.join(name))).into();
    build.extend(TOOLS.map(|name| Item::new(name, beside.join(name))));
    build.retain(|item| item.path.is_file());
    build.extend(wishes.with);

    let making = || "cannot make the assets";
    let mut wanted = vec![Asset::Kernel, Asset::GuestInitramfs, Asset::GuestDebian];
    if wishes.for_tests {
        wanted.push(Asset::GuestMptable);
    }
    if wishes.place == Place::Nested {
        wanted.extend([Asset::HostRoot, Asset::HostInitramfs]);
    }
    assets::ensure(&wanted).doing(making)?;
    if wishes.for_tests {
        let (kernel, initramfs) = assets::guest_mptable().doing(making)?;
        build.extend([Item::new(MPTABLE_BZIMAGE, kernel), Item::new(MPTABLE_INITRAMFS, initramfs)]);
    }
    let kernel = assets::kernel().doing(making)?;
    let guest_assets = vec![
        Item::new(BZIMAGE, &kernel.bzimage),
        Item::new(VMLINUX, &kernel.vmlinux),
        Item::new(INITRAMFS, assets::guest_initramfs().doing(making)?),
    ];
    let guest_disks = vec![Item::new(DEBIAN, assets::guest_debian().doing(making)?)];
    let images = match wishes.place {
        Place::Direct => Images::default(),
        Place::Nested => Images {
            qemu: assets::tools().doing(making)?.qemu,
            kernel: kernel.vmlinux,
            initramfs: assets::host_initramfs(&agent).doing(making)?,
            root: assets::host_root().doing(making)?,
        },
    };
    Ok(Config {
        place: wishes.place,
        cache: assets::cache_dir().doing(making)?,
        agent,
        provisions: Provisions { build, assets: guest_assets, guest_disks },
        images,
        memory_mib: wishes.memory_mib,
        processors: wishes.processors,
        forwards: wishes.forwards,
    })
}

/// The directory of this program, where cargo puts the others too.
pub fn own_directory() -> Result<PathBuf> {
    let own = std::env::current_exe().doing(|| "cannot find this program")?;
    Ok(own.parent().map(Path::to_owned).unwrap_or_default())
}
