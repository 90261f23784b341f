//! The archive in which the agent travels. Linux unpacks archives that follow each other into one initramfs, so it goes
//! behind the image's own, compressed or not, and `rdinit=` on the kernel command line makes the kernel run it first.
//!
//! It reads nothing of the image's archive.

use std::io::{self, Write};

use cpio::newc::{self, Builder};

/// What the kernel command line needs for the agent to run.
pub const KERNEL_ARGUMENT: &str = "rdinit=/berth/init";

/// Where an archive may begin for the kernel to see it, and so to what the one before is filled up with zeros.
const ALIGNMENT: u64 = 4;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// The console and what a program without one opens in its place, for an image whose archive has neither; and the kernel's log,
/// for what the agent has to say later.
const DEVICES: [(&str, u32, u32); 3] = [("dev/console", 5, 1), ("dev/null", 1, 3), ("berth/kmsg", 1, 11)];

/// Writes the archive with this program as `/berth/init`. `before` is how many bytes the file has already: those of the
/// image's own initramfs, or none.
pub fn append(agent: &[u8], before: u64, mut to: impl Write) -> io::Result<()> {
    let filling = before.next_multiple_of(ALIGNMENT) - before;
    to.write_all(&[0; ALIGNMENT as usize][..filling as usize])?;
    let mut inodes = 1..;
    let mut entry =
        |name: &str, mode: u32| Builder::new(name).mode(mode).nlink(1).ino(inodes.next().unwrap_or(0));
    let mut to = to;
    for name in ["dev", "berth"] {
        to = entry(name, DIRECTORY).write(to, 0).finish()?;
    }
    for (name, major, minor) in DEVICES {
        let device = entry(name, CHARACTER_DEVICE).rdev_major(major).rdev_minor(minor);
        to = device.write(to, 0).finish()?;
    }
    let size = u32::try_from(agent.len()).map_err(|_| {
        io::Error::new(io::ErrorKind::FileTooLarge, "the agent is too large for an initramfs")
    })?;
    let mut program = entry("berth/init", PROGRAM).write(to, size);
    program.write_all(agent)?;
    newc::trailer(program.finish()?)?.flush()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn archive(agent: &[u8], before: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        append(agent, before, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn it_begins_where_the_kernel_looks_for_it() {
        for before in 0..9_u64 {
            let archive = archive(b"program", before);
            let begin = archive.iter().position(|byte| *byte == b'0').unwrap();
            assert_eq!(&archive[begin..begin + 6], b"070701");
            assert_eq!((before + begin as u64) % 4, 0);
            assert!(begin < 4);
        }
    }

    #[test]
    fn cpio_reads_what_is_in_it() {
        let mut cpio = Command::new("cpio")
            .args(["--quiet", "-tv", "--numeric-uid-gid"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&archive(b"seven..", 0)).unwrap();
        let output = cpio.wait_with_output().unwrap();
        assert!(output.status.success());
        let lines: Vec<_> = std::str::from_utf8(&output.stdout).unwrap().lines().map(words).collect();
        assert_eq!(
            lines,
            [
                "drwxr-xr-x 0 0 0 dev",
                "drwxr-xr-x 0 0 0 berth",
                "crw------- 0 0 5, 1 dev/console",
                "crw------- 0 0 1, 3 dev/null",
                "crw------- 0 0 1, 11 berth/kmsg",
                "-rwxr-xr-x 0 0 7 berth/init",
            ]
        );
    }

    /// Mode, owner, group, size or device, and name, without the number of links and the time.
    fn words(line: &str) -> String {
        let words: Vec<_> = line.split_whitespace().collect();
        let [mode, _links, middle @ .., _month, _day, _year, name] = &words[..] else { panic!("{line}") };
        format!("{mode} {} {name}", middle.join(" "))
    }
}
