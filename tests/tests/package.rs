//! The package in a Debian with systemd: it installs, guests do not notice an upgrade, a removal leaves what docs/install.md
//! says; and a unit runs one guest without the daemon.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use berth_tests::guest::{asset, limits, program};
use berth_tests::host::provide;
use berth_tests::machine::Machine;
use serde_json::Value;

/// A member of the group, and somebody who is not.
const MEMBER: &str = "member";
const OTHER: &str = "other";
const PACKAGE: &str = "/given/berth.deb";
const COMMAND_LINE: &str = "console=ttyS0 quiet reboot=k";
/// What would be there after a purge, if anything were.
const PLACES: &str = "/etc/berth /etc/systemd/system/*berth* /etc/systemd/system/*/*berth* /lib/systemd/system/*berth* \
    /run/berth /usr/bin/berth /usr/lib/berth /usr/sbin/berthd /usr/share/*/berth* /var/lib/berth /sys/fs/cgroup/berth \
    /sys/class/net/berth0 /srv/jailer";

/// A machine with the package, and two users.
fn installed() -> Machine {
    let machine = Machine::boot(&[program("berth.deb"), asset(provide::BZIMAGE), asset(provide::INITRAMFS)]);
    machine.run(&format!("dpkg --install {PACKAGE}"));
    machine.run(&format!("useradd --groups berth {MEMBER} && useradd {OTHER}"));
    machine
}

/// The process of a guest, in the machine's numbers.
#[track_caller]
fn pid(machine: &Machine, guest: &str) -> u64 {
    let text = machine.run_as(MEMBER, &format!("berth inspect {guest}"));
    let told: Value = serde_json::from_str(&text).unwrap();
    let guest = told.get(0).unwrap_or(&told);
    assert_eq!(guest["state"], "running", "{text}");
    guest["pid"].as_u64().unwrap_or_else(|| panic!("no pid: {text}"))
}

#[test]
fn guests_do_not_notice_an_upgrade_and_a_removal_leaves_what_the_documentation_says() {
    let machine = installed();
    for unit in ["berthd.socket", "berthd.service"] {
        assert_eq!(
            machine.run(&format!("systemctl is-active {unit}; systemctl is-enabled {unit}")),
            "active\nenabled\n"
        );
    }
    assert_eq!(machine.run("stat -c '%U %G %a' /run/berth/berthd.sock"), "root berth 660\n");
    let verdict = machine
        .shell("systemd-analyze verify --man=no berthd.service berthd.socket berth-vmm@x.service 2>&1");
    assert_eq!((verdict.status.success(), String::from_utf8_lossy(&verdict.stdout).as_ref()), (true, ""));

    // Members reach the daemon; others are told.
    assert!(machine.run_as(MEMBER, "berth version").contains("berthd"));
    machine.run_as(MEMBER, "berth doctor");
    assert_eq!(machine.shell_as(OTHER, "berth ps").status.code(), Some(3));

    // Who asks starts it.
    machine.run("systemctl stop berthd.service");
    machine.run_as(MEMBER, "berth ps");
    assert_eq!(machine.run("systemctl is-active berthd.service"), "active\n");

    machine.run("truncate --size 1M /given/blank.img");
    machine.run_as(
        MEMBER,
        &format!(
            "berth image import --name small --kernel /given/bzImage --initrd /given/initramfs.cpio \
             --cmdline '{COMMAND_LINE}' /given/blank.img"
        ),
    );
    machine.run_as(MEMBER, "berth run --detach --memory 96M --name web small");
    machine.run_as(MEMBER, "berth exec web -- sh -c 'echo kept > /run/file'");
    let before = pid(&machine, "web");
    // And one with somebody who stays with it.
    machine.run_as(
        MEMBER,
        "berth run --rm --memory 96M --name front small -- sleep 1000 < /dev/null > /tmp/front 2>&1 &",
    );
    machine.until("its command runs", limits::BOOT, "berth exec front -- pidof sleep");
    let front = pid(&machine, "front");
    // With systemd too, which gives controllers to its own units and takes them away.
    machine.run("systemctl daemon-reload && cat /sys/fs/cgroup/berth/*/io.stat");

    // The same programs as a newer package, without the minute that compressing takes here.
    machine.run(&format!(
        "cd /given && dpkg-deb --raw-extract {PACKAGE} next && sed -i 's/^Version: .*/&+1/' next/DEBIAN/control && \
         dpkg-deb --root-owner-group -Znone --build next next.deb"
    ));
    let daemon = machine.run("systemctl show --property MainPID berthd.service");
    machine.run("dpkg --install /given/next.deb");
    assert!(machine.run("dpkg-query --show berth").trim_end().ends_with("+1"));
    assert_ne!(machine.run("systemctl show --property MainPID berthd.service"), daemon);
    assert_eq!(pid(&machine, "web"), before);
    assert_eq!(machine.run_as(MEMBER, "berth exec web -- cat /run/file"), "kept\n");
    machine.until("it is told", limits::COMMAND, "grep 'the guest goes on' /tmp/front");
    assert_eq!(pid(&machine, "front"), front);
    machine.run_as(MEMBER, "berth stop front");

    // Neither a restart nor the daemon's sudden end; then systemd starts another.
    machine.run(
        "systemctl restart berthd.service; systemctl kill --signal KILL --kill-whom main berthd.service",
    );
    machine.until(
        "another daemon is there",
        limits::API,
        "systemctl is-active --quiet berthd.service && berth ps",
    );
    assert_eq!(pid(&machine, "web"), before);
    assert_eq!(machine.run_as(MEMBER, "berth exec web -- cat /run/file"), "kept\n");

    // The guest is brought down in order, and what is its maker's stays.
    let said = machine.run("dpkg --remove berth");
    assert!(said.contains("stopping 1 guests") && !said.contains("does not power off"), "{said}");
    assert!(!machine.shell(&format!("test -e /proc/{before}")).status.success());
    assert_eq!(
        machine.run("ls -d /etc/berth/* /usr/bin/berth /sys/class/net/berth0 2> /dev/null || true"),
        "/etc/berth/berthd.toml\n"
    );
    let kept = machine.run("ls /var/lib/berth/guests/*/disk.img /var/lib/berth/images");
    assert!(kept.contains("disk.img") && kept.contains("small"), "{kept}");

    let said = machine.run("dpkg --purge berth");
    assert!(said.contains("removing /var/lib/berth with 1 guests and 1 images"), "{said}");
    assert_eq!(machine.run(&format!("ls -d {PLACES} 2> /dev/null || true")), "");
    assert_eq!(machine.run("nft list ruleset; ps -e -o comm= | grep berth || true"), "");
    assert_eq!(machine.run("systemctl list-units --failed --no-legend --plain --no-pager"), "");
}

#[test]
fn a_unit_runs_one_guest_without_the_daemon() {
    let machine = installed();
    let write = |name: &str, text: &str| {
        machine.run(&format!("cat > /etc/berth/guests/{name} << 'END'\n{text}\nEND"))
    };
    write(
        "one.conf",
        "UID=50001\nFLAGS=--file kernel=/given/bzImage:ro --file initrd=/given/initramfs.cpio:ro",
    );
    let configure = |more: &str| {
        write(
            "one.json",
            &format!(
                "{{ \"boot-source\": {{ \"kernel_image_path\": \"fd:kernel\", \"initrd_path\": \"fd:initrd\", \
                 \"boot_args\": \"{COMMAND_LINE} {more}\" }}, \
                 \"machine-config\": {{ \"vcpu_count\": 1, \"mem_size_mib\": 96 }} }}"
            ),
        )
    };
    configure("");
    machine.run("systemctl stop berthd.socket berthd.service; systemctl start berth-vmm@one");
    machine.until(
        "the guest is up",
        limits::BOOT,
        "journalctl --no-pager --unit berth-vmm@one | grep --quiet BERTH-GUEST-READY",
    );
    let main = machine.run("systemctl show --property MainPID --value berth-vmm@one");
    let status = machine.run(&format!("cat /proc/{}/status", main.trim()));
    assert!(status.contains("Name:\tberth-vmm") && status.contains("Uid:\t50001\t50001"), "{status}");
    // In the unit's own group: its limits are the guest's.
    assert!(machine.run(&format!("cat /proc/{}/cgroup", main.trim())).contains("berth-vmm@one.service"));
    machine.run("test -S /var/lib/berth/single/berth-vmm/one/root/run/api.sock");

    // A stop is the guest's power button, and leaves no cell.
    machine.run("systemctl stop berth-vmm@one");
    let result = machine
        .run("systemctl show --property Result --property ExecMainStatus --value berth-vmm@one | sort");
    assert_eq!(result, "0\nsuccess\n");
    assert!(machine.run("journalctl --no-pager --unit berth-vmm@one").contains("powered off"));
    assert_eq!(machine.run("ls /var/lib/berth/single/berth-vmm"), "");

    // A guest that wants a reset is started again.
    configure("berth.run=true berth.then=reboot");
    machine.run("systemctl start berth-vmm@one");
    machine.until(
        "it is started again",
        limits::BOOT + Duration::from_secs(60),
        "test \"$(systemctl show --property NRestarts --value berth-vmm@one)\" -ge 1",
    );

    // A configuration that is wrong is not tried again.
    machine.run("systemctl stop berth-vmm@one && systemctl reset-failed berth-vmm@one || true");
    write("one.json", "{ \"machine-config\": 7 }");
    machine.shell("systemctl start berth-vmm@one");
    machine.until("it has failed", limits::API, "systemctl is-failed --quiet berth-vmm@one");
    assert_eq!(machine.run("systemctl show --property ExecMainStatus --value berth-vmm@one"), "152\n");
    assert_eq!(machine.run("ls /var/lib/berth/single/berth-vmm"), "");
}
