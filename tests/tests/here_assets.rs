//! The guest assets are what they are said to be, by the judgement of a machine that is not ours: QEMU boots them.
//! Runs on this machine, emulated, so that a guest that fails in a host of ours can be told from a broken image.

#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use berth_tests::assets;

/// Ends a machine that no longer says anything; five times what the slowest boot took on two busy cores.
const LIMIT_SECONDS: &str = "300";

/// A busy machine emulates too slowly for the kernel's test of its timer, which would stop the boot.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 no_timer_check";

const CONSOLE_TAIL: usize = 2000;

/// An emulated PC and what its serial console said and was not yet waited for.
struct Machine {
    qemu: Child,
    said: String,
}

impl Machine {
    fn boot(kernel: &Path, arguments: &str, options: &[String]) -> Machine {
        Machine::of_kind("q35", kernel, &assets::guest_initramfs().unwrap(), arguments, options)
    }

    fn of_kind(kind: &str, kernel: &Path, initramfs: &Path, arguments: &str, options: &[String]) -> Machine {
        let mut command = Command::new("timeout");
        command.arg(LIMIT_SECONDS).arg(assets::tools().unwrap().qemu);
        command.args(["-accel", "tcg", "-cpu", "max", "-m", "512M", "-nodefaults", "-display", "none"]);
        command.args(["-machine", kind, "-no-reboot", "-serial", "stdio"]);
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
        command.arg("-append").arg(format!("{KERNEL_ARGUMENTS} {arguments}")).args(options);
        let qemu = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        Machine { qemu, said: String::new() }
    }

    /// What was said before `text`, which is waited for.
    fn until(&mut self, text: &str) -> String {
        loop {
            if let Some((before, after)) = self.said.split_once(text) {
                let (before, after) = (before.to_owned(), after.to_owned());
                self.said = after;
                return before;
            }
            let mut bytes = [0; 4096];
            let count = self.qemu.stdout.as_mut().unwrap().read(&mut bytes).unwrap();
            let tail = self.said.len().saturating_sub(CONSOLE_TAIL);
            assert!(count > 0, "no {text:?} on the console: {}", self.said.get(tail..).unwrap_or(&self.said));
            self.said.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    }

    fn type_line(&mut self, line: &str) {
        writeln!(self.qemu.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Or resets itself, which ends this machine as well.
    fn powers_off(&mut self) {
        assert!(self.qemu.wait().unwrap().success());
    }
}

#[test]
fn the_bzimage_and_the_initramfs_give_a_shell_that_tells_exit_codes() {
    let mut machine = Machine::boot(&assets::kernel().unwrap().bzimage, "berth.plain", &[]);
    machine.until("BERTH-GUEST-READY\n");
    machine.until("berth[0]# ");
    machine.type_line("sh -c 'echo said; exit 42'");
    assert_eq!(machine.until("berth[42]# "), "said\n");
    machine.type_line("uname -r");
    assert_eq!(machine.until("\n"), assets::kernel().unwrap().release);
    machine.type_line("poweroff -f");
    machine.powers_off();
}

#[test]
fn the_elf_kernel_runs_one_command_from_its_command_line() {
    let arguments = "berth.run=\"seq 2000; exit 3\"";
    let mut machine = Machine::boot(&assets::kernel().unwrap().vmlinux, arguments, &[]);
    let output = machine.until("BERTH-EXIT 3");
    let expected: String = (1..=2000).map(|n| format!("{n}\r\n")).collect();
    assert!(output.ends_with(&expected), "{output}");
    machine.powers_off();
}

#[test]
fn the_debian_image_asks_for_a_login_and_lets_root_in_without_a_password() {
    let image = assets::guest_debian().unwrap();
    let drive = format!("if=none,id=root,format=raw,snapshot=on,file={}", image.display());
    let disk = ["-drive".to_owned(), drive, "-device".to_owned(), "virtio-blk-pci,drive=root".to_owned()];
    let mut machine = Machine::boot(&assets::kernel().unwrap().vmlinux, "root=/dev/vda", &disk);
    machine.until("Debian GNU/Linux 12 berth ttyS0");
    machine.until("login: ");
    machine.type_line("root");
    machine.until("root@berth:~# ");
    machine.type_line("findmnt -no SOURCE /; cat /proc/1/comm; modprobe tun && echo tun loaded");
    for answer in ["/dev/vda", "systemd", "tun loaded"] {
        machine.until(&format!("{answer}\r\n"));
    }
    machine.type_line("poweroff");
    machine.powers_off();
}

/// QEMU announces the disk as `virtio_mmio.device=512@...`.
#[test]
fn the_kernel_that_needs_no_acpi_finds_a_disk_by_the_command_line() {
    let (kernel, initramfs) = assets::guest_mptable().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk");
    std::fs::write(&image, "on the disk\n".repeat(512)).unwrap();
    let drive = format!("if=none,id=disk,format=raw,file={}", image.display());
    let disk = ["-drive".to_owned(), drive, "-device".to_owned(), "virtio-blk-device,drive=disk".to_owned()];
    let arguments = "acpi=off berth.run=\"head -n 1 /dev/vda\" berth.then=reboot";
    let mut machine = Machine::of_kind("microvm,acpi=off", &kernel, &initramfs, arguments, &disk);
    machine.until("on the disk\r\n");
    machine.until("BERTH-EXIT 0");
    machine.powers_off();
}
