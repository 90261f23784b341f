//! Guest and host assets: the kernel, the userlands and the tools that tests, `make run` and the nested host boot.
//!
//! Everything comes from Debian packages, by the recipes in `resources/guest/`, once per machine. A recipe that
//! changes, or one of whose inputs was built anew, is built again; otherwise a call costs milliseconds and touches no
//! network. Safe to call from many threads and processes at once.
//!
//! This module starts no machine and knows nothing of what the assets are for. It removes no package and leaves the
//! machine's own apt configuration as it is. There is no kernel of our own configuration: the stock one boots in
//! seconds, and building another costs twelve minutes of CPU time.

mod cache;
pub mod cpio;
mod recipe;
mod tools;

use std::fs;
use std::hash::Hasher;
use std::path::{Path, PathBuf};

pub use cache::{Error, cache_dir};
pub use recipe::Asset;
pub use tools::Tools;

use cache::{Built, Fnv, io_error};

/// How many combinations of a host initramfs and an agent stay cached.
const KEPT_HOST_INITRAMFS: usize = 16;

/// Debian's stock 6.12 cloud kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    /// The image as packaged.
    pub bzimage: PathBuf,
    /// The uncompressed ELF file out of the image.
    pub vmlinux: PathBuf,
    /// Its build configuration.
    pub config: PathBuf,
    /// What belongs at `/lib/modules/<release>`, modules uncompressed.
    pub modules: PathBuf,
}

/// Makes sure of several assets at once; those that do not need each other are built side by side.
///
/// Worth calling before the functions below when more than one asset is wanted and the cache may be cold.
pub fn ensure(wanted: &[Asset]) -> Result<(), Error> {
    let mut inputs = Vec::new();
    for input in wanted.iter().flat_map(|asset| asset.recipe().inputs) {
        if !inputs.contains(input) {
            inputs.push(*input);
        }
    }
    if inputs.is_empty() {
        tools()?;
    } else {
        ensure(&inputs)?;
    }
    std::thread::scope(|scope| {
        let builds: Vec<_> = wanted.iter().map(|asset| scope.spawn(|| built(*asset))).collect();
        builds.into_iter().try_for_each(|build| match build.join() {
            Ok(result) => result.map(drop),
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

/// Commands of this machine that the other assets, the nested host and the tests call. Installs what is missing on
/// Debian 12; elsewhere the error names the missing commands.
pub fn tools() -> Result<Tools, Error> {
    tools::ensure(&cache_dir()?)
}

/// The stock kernel, for guests and for the nested host.
pub fn kernel() -> Result<Kernel, Error> {
    let dir = built(Asset::Kernel)?.dir;
    let release_file = dir.join("release");
    let release = fs::read_to_string(&release_file).map_err(|e| io_error(&release_file, e))?;
    Ok(Kernel {
        release: release.trim_end().to_owned(),
        bzimage: dir.join("bzImage"),
        vmlinux: dir.join("vmlinux"),
        config: dir.join("config"),
        modules: dir.join("modules"),
    })
}

/// The guests' initramfs: a tiny busybox system, or with `root=` on the kernel command line the way to that disk.
/// `resources/guest/guest-init` says what it can be asked to do.
pub fn guest_initramfs() -> Result<PathBuf, Error> {
    Ok(built(Asset::GuestInitramfs)?.dir.join("initramfs.cpio"))
}

/// A kernel that needs no ACPI, as packaged, and its initramfs, which is [`guest_initramfs`] with its drivers. The command line
/// tells it of virtio-mmio devices.
pub fn guest_mptable() -> Result<(PathBuf, PathBuf), Error> {
    let dir = built(Asset::GuestMptable)?.dir;
    Ok((dir.join("bzImage"), dir.join("initramfs.cpio")))
}

/// An ext4 image (no partition table) of a Debian with systemd and sshd, to be booted with [`guest_initramfs`] and
/// `root=` on the kernel command line. Shared: copy it before a guest writes to it.
pub fn guest_debian() -> Result<PathBuf, Error> {
    Ok(built(Asset::GuestDebian)?.dir.join("root.ext4"))
}

/// The nested host's userland as an erofs image.
pub fn host_root() -> Result<PathBuf, Error> {
    Ok(built(Asset::HostRoot)?.dir.join("root.erofs"))
}

/// The nested host's initramfs with `agent` in it: a static binary that becomes process 1 once the root is mounted.
/// `resources/guest/host-init` says what it finds there.
pub fn host_initramfs(agent: &Path) -> Result<PathBuf, Error> {
    let base = built(Asset::HostInitramfs)?;
    let dir = cache_dir()?.join("host-initramfs-with-agent");
    let image = dir.join(format!("{:016x}.cpio", fingerprint(&base, agent)?));
    if !image.exists() {
        fs::create_dir_all(&dir).map_err(|e| io_error(&dir, e))?;
        cpio::append(&base.dir.join("base.cpio"), &[("bin/berth-host-agent", agent)], &image)
            .map_err(|e| io_error(&image, e))?;
        cache::keep_newest(&dir, KEPT_HOST_INITRAMFS, |name| name.ends_with(".cpio"))?;
    }
    Ok(image)
}

/// By content, for a linker writes the agent anew when anything in its package changes, and mostly it is the same.
fn fingerprint(base: &Built, agent: &Path) -> Result<u64, Error> {
    let mut hash = Fnv::default();
    hash.write(base.id.as_bytes());
    hash.write(&fs::read(agent).map_err(|e| io_error(agent, e))?);
    Ok(hash.finish())
}

fn built(asset: Asset) -> Result<Built, Error> {
    let cache = cache_dir()?;
    tools::ensure(&cache)?;
    cache::ensure(&cache, asset)
}
