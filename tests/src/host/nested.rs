//! The nested host: a Debian kernel and root in an emulated machine with SVM, and so with a complete KVM.
//!
//! Its disks, in this order: the root, the build products (/build), the guest assets (/assets), a disk to write on
//! (/scratch), and the guests' disk images as they are. A start restores a saved state of the same recipe, or boots and
//! saves one.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::error::{Doing, Error, Result};
use super::image::{self, Item};
use super::link::{Event, Link};
use super::qemu::{self, Disk, Machine, Qemu};
use super::rundir::RunDir;
use super::state::{self, STATE, States};
use super::wire::{Command, Mount, Prepare};
use super::{Config, Provisions};

/// The build products' slot has this size in every saved state.
const BUILD_SLOT: u64 = 2 << 30;

/// Size of /scratch. The file is sparse.
const SCRATCH_SIZE: u64 = 32 << 30;

/// Index of the first disk image of the guests' among the disks.
const FIRST_GUEST_DISK: usize = 4;

/// Disks get one letter, and the first four are taken.
const MAX_GUEST_DISKS: usize = 8;

/// Images of the assets that are kept, 75 MB each.
const MAX_ASSET_IMAGES: usize = 4;

/// A boot takes about five seconds on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// A restored agent answers in milliseconds.
const RESTORE_LIMIT: Duration = Duration::from_secs(30);

/// Mounting and setting the clock, and before a state is saved the commands of `SET_UP`.
const PREPARE_LIMIT: Duration = Duration::from_secs(60);

/// Run once before a state is saved: the network that port forwarding leads to, and commands that bring what most first
/// commands need into the page cache.
const SET_UP: &str = "modprobe virtio_net && ip address add 10.0.2.15/24 dev eth0 && ip link set eth0 up \
    && ip route add default via 10.0.2.2 && ls -l /dev/kvm && dmesg > /dev/null && bash -c true";

/// A running nested host. Dropping it ends it.
#[derive(Debug)]
pub struct Nested {
    // Dropped in this order: the process first, then the directory that it writes to.
    _qemu: Qemu,
    directory: RunDir,
    link: Link,
    restored: bool,
}

impl Nested {
    /// Starts a nested host. The calling thread must live as long as the host is wanted.
    pub fn start(config: &Config, directory: RunDir) -> Result<Self> {
        let machine = machine(config, &directory)?;
        let recipe = machine.recipe()?;
        let states = States::new(config.cache.join("host-states"))?;
        let (qemu, link, restored) = match restore(&machine, &directory, &states, &recipe) {
            Some((qemu, link)) => (qemu, link, true),
            None => boot_and_save(&machine, &directory, &states, &recipe)?,
        };
        link.prepare(preparation(), PREPARE_LIMIT).map_err(|error| {
            Error(format!("the nested host is not ready: {error}\n{}", qemu.last_words()))
        })?;
        Ok(Self { _qemu: qemu, directory, link, restored })
    }

    /// The agent in it.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Whether it came from a saved state.
    pub fn was_restored(&self) -> bool {
        self.restored
    }

    /// The end of its kernel's console.
    pub fn console_tail(&self) -> String {
        qemu::tail(&self.directory.join("console.log"))
    }
}

fn machine(config: &Config, directory: &RunDir) -> Result<Machine> {
    let Provisions { build, assets, guest_disks, .. } = &config.provisions;
    if guest_disks.len() > MAX_GUEST_DISKS {
        return Err(Error(format!(
            "{} guest disks: at most {MAX_GUEST_DISKS} are allowed",
            guest_disks.len()
        )));
    }
    let build_image = directory.join("build.erofs");
    image::pack(build, &[], &directory.join("staging"), &build_image)?;
    image::pad(&build_image, BUILD_SLOT)?;
    let scratch = directory.join("scratch.ext4");
    image::make_scratch(&scratch, SCRATCH_SIZE)?;

    let fixed = |path: PathBuf| Disk { path, read_only: true, replaceable: false };
    let mut disks = vec![
        fixed(config.images.root.clone()),
        Disk { path: build_image, read_only: true, replaceable: true },
        fixed(assets_image(assets, guest_disks, &config.cache, directory)?),
        Disk { path: scratch, read_only: false, replaceable: true },
    ];
    disks.extend(guest_disks.iter().map(|item| fixed(item.path.clone())));
    Ok(Machine {
        qemu: config.images.qemu.clone(),
        memory_mib: config.memory_mib,
        processors: config.processors,
        kernel: config.images.kernel.clone(),
        initramfs: config.images.initramfs.clone(),
        disks,
        forwards: config.forwards.clone(),
    })
}

/// The image of the assets, in which each guest disk is a link to its device. Made once for each set of assets.
fn assets_image(assets: &[Item], guest_disks: &[Item], cache: &Path, directory: &RunDir) -> Result<PathBuf> {
    let device = |index: usize| format!("/dev/vd{}", (b'a' + (FIRST_GUEST_DISK + index) as u8) as char);
    let links: Vec<_> =
        guest_disks.iter().enumerate().map(|(index, item)| (item.name.clone(), device(index))).collect();
    let mut recipe = format!("{links:?}\n");
    for item in assets {
        recipe += &format!("{} {}\n", item.name, qemu::file_identity(&item.path)?);
    }
    let kept = cache.join("host-assets");
    let image = kept.join(format!("{}.erofs", state::key(&recipe)));
    if !image.is_file() {
        let making = || format!("cannot make {}", image.display());
        std::fs::create_dir_all(&kept).doing(making)?;
        let new = directory.join("assets.erofs");
        image::pack(assets, &links, &directory.join("staging"), &new)?;
        std::fs::rename(&new, &image).doing(making)?;
        let age = |path: &Path| std::fs::metadata(path).and_then(|m| m.modified()).ok();
        for old in state::all_but_newest(&kept, MAX_ASSET_IMAGES, age) {
            let _ = std::fs::remove_file(old);
        }
    }
    Ok(image)
}

fn preparation() -> Prepare {
    let mount = |device: &str, file_system: &str, target: &str, read_only| Mount {
        device: device.into(),
        file_system: file_system.into(),
        target: target.into(),
        read_only,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Prepare {
        unix_nanoseconds: u64::try_from(now.as_nanos()).unwrap_or_default(),
        mounts: vec![
            mount("/dev/vdb", "erofs", super::BUILD, true),
            mount("/dev/vdc", "erofs", super::ASSETS, true),
            mount("/dev/vdd", "ext4", super::SCRATCH, false),
        ],
    }
}

/// A host from the saved state, if there is one and it works; one that does not work is forgotten.
fn restore(machine: &Machine, directory: &RunDir, states: &States, recipe: &str) -> Option<(Qemu, Link)> {
    let state = states.find(recipe)?;
    let started = start_restored(machine, directory, &state);
    if let Err(error) = &started {
        eprintln!("berth-host: a saved state is of no use, booting instead: {error}");
        states.forget(recipe);
    }
    started.ok()
}

fn start_restored(machine: &Machine, directory: &RunDir, state: &Path) -> Result<(Qemu, Link)> {
    // QEMU reads options of its own out of a state's path, so it gets a plain name.
    let name = directory.join(STATE);
    let _ = std::fs::remove_file(&name);
    std::os::unix::fs::symlink(state, &name).doing(|| format!("cannot link {}", name.display()))?;
    let (mut qemu, agent) = Qemu::start(machine, directory.path(), true)?;
    qemu.load(STATE)?;
    let link = connect(agent, &qemu, RESTORE_LIMIT)?;
    Ok((qemu, link))
}

/// Boots a host and saves its state, while others that want the same one wait.
fn boot_and_save(
    machine: &Machine,
    directory: &RunDir,
    states: &States,
    recipe: &str,
) -> Result<(Qemu, Link, bool)> {
    let _lock = states.lock(recipe)?;
    if let Some((qemu, link)) = restore(machine, directory, states, recipe) {
        return Ok((qemu, link, true));
    }
    let (mut qemu, agent) = Qemu::start(machine, directory.path(), false)?;
    let link = connect(agent, &qemu, BOOT_LIMIT)?;
    set_up(&link)?;
    let _ = std::fs::remove_file(directory.join(STATE));
    qemu.save(STATE)?;
    if let Err(error) = states.store(recipe, &directory.join(STATE)) {
        eprintln!("berth-host: {error}; this host runs, the next one will boot again");
    }
    Ok((qemu, link, false))
}

fn connect(agent: std::os::unix::net::UnixStream, qemu: &Qemu, limit: Duration) -> Result<Link> {
    let connected = Link::new(agent).and_then(|link| link.ping(limit).map(|_| link));
    connected.map_err(|error| Error(format!("the nested host did not start: {error}\n{}", qemu.last_words())))
}

fn set_up(link: &Link) -> Result<()> {
    let argv = ["sh", "-c", SET_UP].map(String::from).into();
    let command = Command { argv, env: Vec::new(), cwd: None, terminal: None };
    let mut running = link.run(command).doing(|| "cannot set up the nested host")?;
    let mut said = Vec::new();
    match running.finish(Some(Instant::now() + PREPARE_LIMIT), |bytes| said.extend(bytes)) {
        Some(Event::Exit(0)) => Ok(()),
        other => Err(Error(format!(
            "cannot set up the nested host: {other:?}\n{}",
            String::from_utf8_lossy(&said)
        ))),
    }
}
