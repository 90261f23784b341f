//! An unmodified Debian with systemd boots from its disk to a login, with nothing failed, and goes down when asked.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use api_socket::{ActionType, Request};
use berth_tests::guest::{Ended, Guest, Setup, asset, limits};
use berth_tests::host::disk::WritableDisk;
use berth_tests::host::provide;
use rustix::process::Signal;
use tempfile::TempDir;

/// A Debian root file system to write on. The disk before the directory, which is the order of their ends.
struct Root {
    disk: WritableDisk,
    _directory: TempDir,
}

impl Root {
    fn new() -> Root {
        let directory = tempfile::tempdir().unwrap();
        // Devices of the host are named by it.
        let name = format!("root-{}", std::process::id());
        let disk = WritableDisk::new(&asset(provide::DEBIAN), directory.path(), &name).unwrap();
        Root { disk, _directory: directory }
    }

    fn setup(&self) -> Setup {
        Setup { entropy: true, ..Setup::debian(self.disk.path().to_owned()) }
    }
}

#[test]
fn debian_boots_to_a_login_with_no_failed_unit_and_powers_off() {
    let root = Root::new();
    let mut guest = Guest::logged_in(root.setup());
    // It waits for the last of the units.
    let state = guest.shell("systemctl is-system-running --wait");
    let failed = guest.run("systemctl list-units --failed --no-legend --plain --no-pager");
    assert_eq!((state.text.trim(), failed.as_str()), ("running", ""));
    assert_eq!(guest.run("cat /proc/1/comm"), "systemd\n");
    assert!(guest.run("findmnt -no SOURCE,OPTIONS /").starts_with("/dev/vda rw"));
    let errors = guest.run("dmesg --level=emerg,alert,crit,err");
    assert_eq!(errors, "");

    guest.say("systemctl poweroff");
    assert_eq!(guest.vmm.ended(limits::DEBIAN), Ended::Code(0));
}

#[test]
fn debian_goes_down_cleanly_on_sigterm_and_comes_back_and_goes_down_on_ctrl_alt_del() {
    let root = Root::new();
    let mut guest = Guest::logged_in(root.setup());
    guest.run("echo kept > /root/file");
    guest.vmm.signal(Signal::TERM);
    assert_eq!(guest.vmm.ended(limits::DEBIAN), Ended::Code(0));
    // Not merely stopped: the guest itself has switched off.
    assert!(guest.vmm.log().contains("The guest has ended: powered off"), "{}", guest.vmm.log());

    // The journal of the file system was closed: there is nothing to recover.
    let mut guest = Guest::logged_in(root.setup());
    assert_eq!(guest.run("cat /root/file"), "kept\n");
    assert!(!guest.run("dmesg").contains("recovery"));
    guest.apply(Request::Action(ActionType::SendCtrlAltDel));
    // By the keyboard it would reboot; this kernel has none, and by the power button it powers off.
    assert_eq!(guest.vmm.ended(limits::DEBIAN), Ended::Code(0));
    assert!(guest.vmm.log().contains("The guest has ended: powered off"), "{}", guest.vmm.log());
}
