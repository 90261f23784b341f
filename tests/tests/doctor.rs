//! `berth doctor` sees what this host has, and names what is taken from it.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use berth_tests::guest::program;
use serde_json::Value;

/// Nobody's number.
const USER: u32 = 54_321;

/// What the doctor said, and its exit code.
struct Said {
    guests_can_run: bool,
    checks: BTreeMap<String, Value>,
    code: i32,
}

impl Said {
    /// What came of running the doctor by this shell script, which calls it `"$@"`.
    #[track_caller]
    fn by(script: &str) -> Said {
        let output = Command::new("sh")
            .args(["-euc", script, "sh"])
            .arg(program("berth"))
            .args(["doctor", "--json"])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let report: Value = serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("{error}: {text}{}", String::from_utf8_lossy(&output.stderr)));
        let checks = report["checks"].as_array().unwrap().iter();
        Said {
            guests_can_run: report["guests_can_run"].as_bool().unwrap(),
            checks: checks.map(|check| (check["name"].as_str().unwrap().into(), check.clone())).collect(),
            code: output.status.code().unwrap(),
        }
    }

    #[track_caller]
    fn verdict(&self, name: &str) -> &str {
        self.checks[name]["verdict"].as_str().unwrap()
    }

    #[track_caller]
    fn assert_ok(&self, names: &[&str]) {
        for name in names {
            assert_eq!(self.verdict(name), "ok", "{}", self.checks[*name]);
        }
    }

    #[track_caller]
    fn mend(&self, name: &str) -> &str {
        self.checks[name]["mend"].as_str().unwrap()
    }
}

/// Runs the doctor as an ordinary user who sees a /dev of which there is only this.
#[track_caller]
fn as_a_user_with(devices: &str) -> Said {
    Said::by(&format!(
        "exec unshare --mount sh -euc 'mount -t tmpfs none /dev; {devices}
         exec setpriv --reuid {USER} --regid {USER} --clear-groups \"$@\"' sh \"$@\""
    ))
}

/// Makes /dev/kvm with this mode.
fn kvm(mode: &str) -> String {
    let number = fs::metadata("/dev/kvm").unwrap().rdev();
    let (major, minor) = (number >> 8 & 0xfff, number & 0xff);
    format!("mknod -m {mode} /dev/kvm c {major} {minor};")
}

#[test]
fn a_host_that_runs_guests_is_found_to_do_so() {
    let said = Said::by("modprobe tun; exec \"$@\"");
    said.assert_ok(&["kvm", "kvm-permissions", "kernel", "berth-vmm", "berth-jailer", "control-groups"]);
    said.assert_ok(&["namespaces", "seccomp", "tun", "io-uring", "disk-space", "open-files", "ip"]);
    assert!(said.guests_can_run && said.code == 0, "{:?}", said.checks);
}

#[test]
fn the_report_for_a_person_ends_with_the_answer_and_has_no_colours_in_a_pipe() {
    let output = Command::new(program("berth")).arg("doctor").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.ends_with("\nGuests can run on this host.\n"), "{text}");
    assert!(text.contains("a trial guest ran") && !text.contains('\x1b'), "{text}");
}

#[test]
fn an_ordinary_user_who_may_use_kvm_can_run_guests() {
    let said = as_a_user_with(&kvm("666"));
    said.assert_ok(&["kvm", "kvm-permissions", "seccomp"]);
    assert!(said.guests_can_run && said.code == 0, "{:?}", said.checks);
    assert_eq!(said.verdict("tun"), "missing");
    assert!(said.mend("tun").contains("modprobe tun"));
}

#[test]
fn a_kvm_that_a_user_may_not_open_is_named_with_the_command_that_mends_it() {
    let said = as_a_user_with(&kvm("600"));
    assert_eq!(said.verdict("kvm-permissions"), "broken");
    assert!(said.mend("kvm-permissions").contains("chgrp kvm /dev/kvm"), "{}", said.mend("kvm-permissions"));
    assert_eq!(said.verdict("kvm"), "broken");
    assert!(!said.guests_can_run && said.code == 1, "{:?}", said.checks);
}

#[test]
fn a_host_without_kvm_runs_no_guests_and_what_it_has_besides_is_still_told() {
    let said = as_a_user_with("");
    assert_eq!((said.verdict("kvm"), said.verdict("kvm-permissions")), ("missing", "missing"));
    said.assert_ok(&["kernel", "seccomp"]);
    assert!(!said.guests_can_run && said.code == 1, "{:?}", said.checks);
}

/// A device that opens and is no KVM.
#[test]
fn a_kvm_that_does_not_work_is_broken() {
    let said = as_a_user_with("mknod -m 666 /dev/kvm c 1 3;");
    assert_eq!(said.verdict("kvm"), "broken");
    assert!(!said.guests_can_run && said.code == 1, "{:?}", said.checks);
}

#[test]
fn what_the_host_has_switched_off_is_named() {
    let said = Said::by(
        "before=$(sysctl -n kernel.io_uring_disabled user.max_ipc_namespaces)
         sysctl -qw kernel.io_uring_disabled=2 user.max_ipc_namespaces=0
         \"$@\" || code=$?
         set -- $before; sysctl -qw kernel.io_uring_disabled=$1 user.max_ipc_namespaces=$2
         exit ${code:-0}",
    );
    assert_eq!((said.verdict("io-uring"), said.verdict("namespaces")), ("broken", "missing"));
    assert!(said.mend("io-uring").contains("kernel.io_uring_disabled=0"));
    assert!(said.mend("namespaces").contains("user.max_ipc_namespaces"));
    assert!(!said.guests_can_run && said.code == 1, "{:?}", said.checks);
}

/// Runs the doctor on a network of its own, in which a shell's commands were done before.
#[track_caller]
fn on_a_network_with(rules: &str) -> Said {
    Said::by(&format!("exec unshare --net sh -euc '{rules} exec \"$@\"' sh \"$@\""))
}

/// Another program's: berthd's table cannot overrule it.
const FIREWALL: &str = "nft add table ip t;
     nft add chain ip t f \"{ type filter hook forward priority 0; policy drop; }\";";

#[test]
fn a_firewall_that_drops_what_is_forwarded_is_named_until_it_lets_guests_through() {
    on_a_network_with("").assert_ok(&["forwarding"]);
    let said = on_a_network_with(FIREWALL);
    assert_eq!(said.verdict("forwarding"), "broken", "{}", said.checks["forwarding"]);
    assert!(said.checks["forwarding"]["found"].as_str().unwrap().ends_with("the policy of ip t f"));
    assert!(said.guests_can_run && said.code == 0, "{:?}", said.checks);

    let mended = said.mend("forwarding").replace("sudo ", "");
    on_a_network_with(&format!("{FIREWALL} {mended};")).assert_ok(&["forwarding"]);
}

#[test]
fn who_may_not_see_the_firewall_is_told_that_it_was_not_tried() {
    let said = as_a_user_with(&kvm("666"));
    assert_eq!(said.verdict("forwarding"), "untried");
    assert!(said.mend("forwarding").starts_with("sudo berth doctor"), "{}", said.mend("forwarding"));
}
