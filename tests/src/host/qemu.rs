//! One QEMU process that emulates a machine with SVM, and its control connection (QMP).
//!
//! What runs in the machine is not this file's business: it starts the process, saves and loads the machine's state, and
//! ends it.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::agent::PORT_NAME;
use super::error::{Doing, Error, Result};
use super::process;

/// What its messages are introduced with.
const PROGRAM: &str = "QEMU";

/// An answer to a control command takes milliseconds, on a busy machine perhaps seconds.
const QMP_LIMIT: Duration = Duration::from_secs(60);

/// Saving or loading a state of some hundred MiB.
const MIGRATION_LIMIT: Duration = Duration::from_secs(300);

/// What of the console is shown when something failed.
const TAIL: usize = 3000;

/// A machine to start. All of it but `forwards` and the contents of `disks` is part of a saved state's recipe.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The program `qemu-system-x86_64`, with `mapped-ram` migration (QEMU 9).
    pub qemu: PathBuf,
    pub memory_mib: u64,
    pub processors: u32,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub disks: Vec<Disk>,
    pub forwards: Vec<Forward>,
}

/// A raw disk image. The first disk is /dev/vda.
#[derive(Clone, Debug)]
pub struct Disk {
    pub path: PathBuf,
    pub read_only: bool,
    /// Another file may be in this place when the state is restored.
    pub replaceable: bool,
}

/// A TCP port of this machine that leads to one of the nested host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    pub host: u16,
    pub guest: u16,
}

/// A running QEMU. Dropping it kills the process.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    control: BufReader<UnixStream>,
    directory: PathBuf,
}

/// The emulated processor. Without these features the kernel copies memory with plain loops; with them it uses string
/// instructions, which TCG executes byte by byte.
const CPU: &str = "max,-erms,-fsrm,-fsrs,-fzrm";

/// With `thread=multi`, and with one vCPU unless a measurement wants more, both on purpose. QEMU's emulated VMRUN leaves the injected vector in the vCPU's
/// exception index; if another thread of QEMU's makes that vCPU leave its loop before the next VM exit, the vector is
/// delivered twice and the guest hangs in its interrupt handler. A second vCPU or `thread=single` gives such kicks.
const ACCELERATOR: [&str; 2] = ["-accel", "tcg,thread=multi"];

const PLATFORM: &str = "q35,smm=off,hpet=off,vmport=off,i8042=off,usb=off";

/// For the nested host's kernel and `resources/guest/host-init`. No mitigations: nothing secret is in there, and they are dear under emulation.
pub const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 mitigations=off berth.root=disk:vda:erofs";

impl Machine {
    /// The options, but for those of the connections and of the forwarded ports. `directory` is QEMU's own.
    fn options(&self) -> Vec<String> {
        let mut options: Vec<String> =
            ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"].map(String::from).into();
        let mut add = |name: &str, value: String| options.extend([name.to_owned(), value]);
        add("-cpu", CPU.into());
        add("-machine", PLATFORM.into());
        add("-m", format!("{}M", self.memory_mib));
        add("-kernel", self.kernel.display().to_string());
        add("-initrd", self.initramfs.display().to_string());
        add("-append", KERNEL_ARGUMENTS.into());
        add("-chardev", "file,id=console,path=console.log".into());
        add("-serial", "chardev:console".into());
        add("-device", "virtio-serial-pci".into());
        add("-device", format!("virtserialport,chardev=agent,name={PORT_NAME}"));
        // Restored twice, a machine must not draw the same random numbers twice.
        add("-device", "vmgenid,guid=auto".into());
        add("-device", "virtio-net-pci,netdev=net,romfile=".into());
        for (index, disk) in self.disks.iter().enumerate() {
            add("-blockdev", disk.block_device(index).to_string());
            add("-device", format!("virtio-blk-pci,drive=disk{index}"));
        }
        add("-smp", self.processors.to_string());
        options.extend(ACCELERATOR.map(String::from));
        options
    }

    /// User-mode networking for the forwarded ports and nothing else: tests must not depend on an outside.
    fn network(&self) -> String {
        let forward = |f: &Forward| format!(",hostfwd=tcp:127.0.0.1:{}-:{}", f.host, f.guest);
        let forwards: String = self.forwards.iter().map(forward).collect();
        format!("user,id=net,restrict=on{forwards}")
    }

    /// Everything that a saved state of this machine depends on, as text: options, and for each file its path, size and
    /// time of change, or its size alone where another file may take its place.
    pub fn recipe(&self) -> Result<String> {
        let mut recipe = String::new();
        for path in [&self.qemu, &self.kernel, &self.initramfs] {
            recipe += &format!("{}\n", file_identity(path)?);
        }
        for disk in &self.disks {
            recipe += &match disk.replaceable {
                true => format!("{} bytes\n", file_size(&disk.path)?),
                false => format!("{}\n", file_identity(&disk.path)?),
            };
        }
        let replaceable: Vec<_> = self.disks.iter().filter(|disk| disk.replaceable).collect();
        for mut option in self.options() {
            for disk in &replaceable {
                option = option.replace(&disk.path.display().to_string(), "-");
            }
            recipe += &format!("{option}\n");
        }
        Ok(recipe)
    }
}

impl Disk {
    fn block_device(&self, index: usize) -> Value {
        json!({
            "driver": "raw",
            "node-name": format!("disk{index}"),
            "read-only": self.read_only,
            // What is written is thrown away with the run, so nothing needs to reach the real disk.
            "cache": { "direct": false, "no-flush": true },
            "file": { "driver": "file", "filename": self.path, "read-only": self.read_only },
        })
    }
}

impl Qemu {
    /// Starts the machine from its kernel, or waiting for a state to load. Gives the agent's connection too.
    /// The calling thread must live as long as the machine is wanted.
    pub fn start(machine: &Machine, directory: &Path, waits_for_state: bool) -> Result<(Self, UnixStream)> {
        let starting = || format!("cannot start {}", machine.qemu.display());
        let (agent, agent_end) = UnixStream::pair().doing(starting)?;
        let (control, control_end) = UnixStream::pair().doing(starting)?;
        control.set_read_timeout(Some(QMP_LIMIT)).doing(starting)?;
        let agent_end = process::passable(agent_end).doing(starting)?;
        let control_end = process::passable(control_end).doing(starting)?;

        let mut command = Command::new(&machine.qemu);
        command
            .args(["-chardev", &format!("socket,id=agent,fd={}", process::number(&agent_end))])
            .args(["-chardev", &format!("socket,id=control,fd={}", process::number(&control_end))])
            .args(["-mon", "chardev=control,mode=control"])
            .args(["-netdev", &machine.network()])
            .args(machine.options());
        if waits_for_state {
            command.args(["-incoming", "defer"]);
        }
        let errors = File::create(directory.join("qemu.log")).doing(starting)?;
        command.current_dir(directory).stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let child = process::spawn_bound(&mut command, vec![agent_end, control_end]).doing(starting)?;
        // Drops our copies of the passed ends, so that QEMU's end is seen as the end of the connection.
        drop(command);

        let mut qemu = Self { child, control: BufReader::new(control), directory: directory.to_owned() };
        qemu.read_answer(|answer| answer.get("QMP").is_some())?;
        qemu.command("qmp_capabilities", json!({}))?;
        Ok((qemu, agent))
    }

    /// Writes the state of the machine, which goes on running afterwards, to a new file in its directory.
    pub fn save(&mut self, file: &str) -> Result<()> {
        self.command("stop", json!({}))?;
        self.use_mapped_ram()?;
        self.command("migrate-set-parameters", json!({ "max-bandwidth": 1u64 << 40 }))?;
        self.command("migrate", json!({ "uri": format!("file:{file}") }))?;
        self.wait_for_migration()?;
        self.command("cont", json!({}))?;
        Ok(())
    }

    /// Loads a state from a file in the directory, into a machine that waits for one, and lets it run.
    pub fn load(&mut self, file: &str) -> Result<()> {
        self.use_mapped_ram()?;
        self.command("migrate-incoming", json!({ "uri": format!("file:{file}") }))?;
        self.wait_for_migration()?;
        // A machine that was saved while stopped stays stopped.
        self.command("cont", json!({}))?;
        Ok(())
    }

    /// The end of the console and of what QEMU itself said, for an error report.
    pub fn last_words(&self) -> String {
        let console = tail(&self.directory.join("console.log"));
        let errors = tail(&self.directory.join("qemu.log"));
        format!("--- console of the nested host ---\n{console}\n--- {PROGRAM} ---\n{errors}")
    }

    fn use_mapped_ram(&mut self) -> Result<()> {
        let capabilities = json!({ "capabilities": [{ "capability": "mapped-ram", "state": true }] });
        self.command("migrate-set-capabilities", capabilities).map(drop)
    }

    fn wait_for_migration(&mut self) -> Result<()> {
        let deadline = Instant::now() + MIGRATION_LIMIT;
        while Instant::now() < deadline {
            let answer = self.command("query-migrate", json!({}))?;
            match answer.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some("failed") => return Err(Error(format!("{PROGRAM} could not move a state: {answer}"))),
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        Err(Error(format!("{PROGRAM} moved no state in {} s", MIGRATION_LIMIT.as_secs())))
    }

    fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": name, "arguments": arguments });
        let sent = self.control.get_mut().write_all(format!("{request}\n").as_bytes());
        sent.map_err(|error| self.broken(name, &error.to_string()))?;
        let answer = self.read_answer(|answer| answer.get("return").or(answer.get("error")).is_some())?;
        match answer.get("return") {
            Some(value) => Ok(value.clone()),
            None => Err(Error(format!("{PROGRAM} refused {name}: {answer}"))),
        }
    }

    /// Reads messages up to the one that is wanted; events come between.
    fn read_answer(&mut self, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        loop {
            let mut line = String::new();
            match self.control.read_line(&mut line) {
                Ok(0) => return Err(self.broken("control connection", "closed")),
                Ok(_) => {}
                Err(error) => return Err(self.broken("control connection", &error.to_string())),
            }
            let message = serde_json::from_str(&line).doing(|| format!("{PROGRAM} said {line:?}"))?;
            if wanted(&message) {
                return Ok(message);
            }
        }
    }

    fn broken(&self, what: &str, how: &str) -> Error {
        Error(format!("{PROGRAM}: {what}: {how}\n{}", self.last_words()))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Nothing in there is worth an orderly end.
        process::kill(&mut self.child);
    }
}

/// A file's path, size and time of change: what tells it from another version of itself.
pub fn file_identity(path: &Path) -> Result<String> {
    let metadata = fs::metadata(path).doing(|| format!("cannot look at {}", path.display()))?;
    let modified = metadata.modified().ok().and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
    let modified = modified.unwrap_or_default().as_nanos();
    Ok(format!("{} {} bytes, changed {modified}", path.display(), metadata.len()))
}

fn file_size(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path).doing(|| format!("cannot look at {}", path.display()))?.len())
}

/// The last few lines of a file, as far as they are text.
pub fn tail(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let start = bytes.len().saturating_sub(TAIL);
    String::from_utf8_lossy(bytes.get(start..).unwrap_or_default()).into_owned()
}
