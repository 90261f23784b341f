//! What the facts mean: what is there, what is not, what that costs, and what mends it. Pure, a function for each check.

use std::path::Path;

use serde::Serialize;

use super::facts::{
    Access, BRIDGE, CONTROL_GROUPS, Facts, GROUP, JAILER, KVM, STATE, TUN, Tried, Trouble, USERFAULTFD,
    VHOST_NET, VMM,
};
use super::ruleset::Chain;
use crate::output::words;

/// Older kernels are not known to work: the oldest of Debian that still gets fixes has this one.
const OLDEST_KERNEL: (u32, u32) = (5, 10);
/// Controllers that berthd limits each guest with.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// And one that it uses if it is there.
const IO: &str = "io";
/// What a guest's disk, its logs and a little of the host's own need at least.
const LEAST_SPACE: u64 = 1 << 30;
/// What the jailer gives a VMM if nothing is said.
const LEAST_OPEN_FILES: u64 = 2048;
/// What berthd wants for a guest's network.
const NO_NETWORK: &str = "guests start without a network only (berth run --no-network)";
/// What filters of system calls end a process with.
const KILL: &str = "kill_process";

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    /// It is not there.
    Missing,
    /// It is there and cannot be used.
    Broken,
    /// It could not be tried, and may well be as it should.
    Untried,
}

/// One line of the report. Its JSON is relied on by scripts: fields are added and do not change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub verdict: Verdict,
    /// No guest runs without it.
    pub needed: bool,
    /// What was seen.
    pub found: String,
    /// What is not to be had without it, or not known; absent when it is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub costs: Option<String>,
    /// A command, or what to do where there is none; absent when it is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

/// The report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// As far as it was tried.
    pub guests_can_run: bool,
    pub checks: Vec<Check>,
}

/// Judges all of it, in the order of the report.
pub fn judge(facts: &Facts) -> Report {
    let checks: Vec<_> = CHECKS.iter().map(|check| check(facts)).collect();
    Report { guests_can_run: !checks.iter().any(Check::is_in_the_way), checks }
}

const CHECKS: [fn(&Facts) -> Check; 24] = [
    kvm,
    kvm_permissions,
    kernel,
    vmm,
    jailer,
    control_groups,
    controllers,
    io_controller,
    namespaces,
    seccomp,
    landlock,
    tun,
    vhost_net,
    io_uring,
    huge_pages,
    transparent_huge_pages,
    userfaultfd,
    ip,
    nft,
    forwarding,
    disk_space,
    open_files,
    berthd,
    group,
];

fn ok(name: &'static str, found: impl Into<String>) -> Check {
    Check { name, verdict: Verdict::Ok, needed: false, found: found.into(), costs: None, mend: None }
}

impl Check {
    fn needed(self) -> Check {
        Check { needed: true, ..self }
    }

    fn missing(self, costs: &str, mend: impl Into<String>) -> Check {
        Check { verdict: Verdict::Missing, costs: Some(costs.into()), mend: Some(mend.into()), ..self }
    }

    fn broken(self, costs: &str, mend: impl Into<String>) -> Check {
        Check { verdict: Verdict::Broken, ..self.missing(costs, mend) }
    }

    /// What is not known by that, and who can try it.
    fn untried(self, costs: &str, mend: impl Into<String>) -> Check {
        Check { verdict: Verdict::Untried, ..self.missing(costs, mend) }
    }

    /// It keeps guests from running.
    pub fn is_in_the_way(&self) -> bool {
        self.needed && matches!(self.verdict, Verdict::Missing | Verdict::Broken)
    }
}

fn kvm(facts: &Facts) -> Check {
    const NAME: &str = "kvm";
    const COSTS: &str = "no guest can run";
    const UNKNOWN: &str = "whether guests can run is not known";
    match &facts.kvm {
        Ok(()) => ok(NAME, "a trial guest ran"),
        Err(Trouble::Absent) if facts.has_virtualization => {
            ok(NAME, format!("there is no {KVM}, and the processor can run guests"))
                .missing(COSTS, "sudo modprobe kvm_intel || sudo modprobe kvm_amd")
        }
        Err(Trouble::Absent) => ok(NAME, format!("there is no {KVM}, and the processor shows no virtualization"))
            .missing(COSTS, "switch on virtualization (VT-x, AMD-V) in the firmware; in a virtual machine, nested virtualization on its host"),
        // Nothing is amiss for who runs guests by berthd. It starts without KVM too, so it proves nothing.
        Err(Trouble::Denied) if facts.berthd.is_ok() => {
            ok(NAME, format!("not tried: you may not open {KVM}, and berthd may"))
                .untried(UNKNOWN, "sudo berth doctor   # tries it")
        }
        Err(Trouble::Denied) => ok(NAME, format!("not tried: you may not open {KVM}"))
            .broken(UNKNOWN, "run berth doctor as root, or see kvm-permissions"),
        Err(Trouble::Other(why)) => ok(NAME, why).broken(
            COSTS,
            "sudo dmesg | grep -i kvm   # tells why; in a virtual machine, its host must offer nested virtualization",
        ),
    }
    .needed()
}

fn kvm_permissions(facts: &Facts) -> Check {
    const NAME: &str = "kvm-permissions";
    let Some(Access { owner, group, mode }) = &facts.kvm_access else {
        return ok(NAME, format!("there is no {KVM}")).missing("as kvm", "see kvm");
    };
    let owner = if *owner == 0 { "root".to_string() } else { format!("user {owner}") };
    let found = ok(NAME, format!("{KVM} is {owner}:{group} {mode:04o}"));
    if facts.kvm != Err(Trouble::Denied) {
        return found;
    }
    const COSTS: &str = "you cannot run guests yourself (berth-vmm, berth-jailer --rootless); berthd can";
    // Where the group may use it, membership is what is missing; else the mode is not what distributions give it.
    match group != "root" && mode & 0o060 == 0o060 {
        true => found.broken(COSTS, format!("sudo usermod -aG {group} {}   # and log in again", facts.user)),
        false => found.broken(
            COSTS,
            format!(
                "sudo groupadd -rf kvm; sudo chgrp kvm {KVM}; sudo chmod 660 {KVM}; sudo usermod -aG kvm {}",
                facts.user
            ),
        ),
    }
}

fn kernel(facts: &Facts) -> Check {
    const NAME: &str = "kernel";
    let (major, minor) = OLDEST_KERNEL;
    let (version, release) = &facts.kernel;
    let found = ok(NAME, format!("Linux {release}"));
    match version {
        Some(version) if *version >= OLDEST_KERNEL => found,
        _ => found.broken(
            &format!("guests are not known to run on a kernel before {major}.{minor}"),
            "sudo apt-get install linux-image-amd64   # and reboot",
        ),
    }
    .needed()
}

fn vmm(facts: &Facts) -> Check {
    program("berth-vmm", VMM, facts.vmm.as_deref(), "no guest can run", "berth").needed()
}

fn jailer(facts: &Facts) -> Check {
    program(
        "berth-jailer",
        JAILER,
        facts.jailer.as_deref(),
        "berthd cannot run a guest, as each has a cell",
        "berth",
    )
    .needed()
}

fn ip(facts: &Facts) -> Check {
    program("ip", "ip", facts.ip.as_deref(), NO_NETWORK, "iproute2")
}

fn nft(facts: &Facts) -> Check {
    program("nft", "nft", facts.nft.as_deref(), NO_NETWORK, "nftables")
}

fn forwarding(facts: &Facts) -> Check {
    const NAME: &str = "forwarding";
    const COSTS: &str = "guests may reach nothing beyond this host";
    const UNKNOWN: &str = "whether a firewall of this host drops what guests send elsewhere is not known";
    match &facts.droppers {
        _ if facts.nft.is_none() => ok(NAME, "not tried: there is no nft").untried(UNKNOWN, "see nft"),
        None => ok(NAME, "not tried: only root sees what nftables has")
            .untried(UNKNOWN, "sudo berth doctor   # tries it"),
        Some(Err(trouble)) => ok(NAME, format!("not tried: nft: {}", why(trouble)))
            .untried(UNKNOWN, "sudo nft --json --terse list ruleset"),
        Some(Ok(chains)) => match chains.as_slice() {
            [] => ok(NAME, "no policy in nftables drops what guests send elsewhere"),
            chains => {
                let list = |of: fn(&Chain) -> String, between| {
                    chains.iter().map(of).collect::<Vec<_>>().join(between)
                };
                let name = |Chain { family, table, name }: &Chain| format!("{family} {table} {name}");
                ok(
                    NAME,
                    format!(
                        "what guests send elsewhere may be dropped, by the policy of {}",
                        list(name, ", ")
                    ),
                )
                .broken(COSTS, list(let_through, "; "))
            }
        },
    }
}

/// Both are put first: what comes behind a chain's other rules may not be reached.
fn let_through(Chain { family, table, name }: &Chain) -> String {
    match (family.as_str(), table.as_str(), name.as_str()) {
        // The table of iptables, which other programs do not touch.
        ("ip", "filter", "FORWARD") => format!(
            "sudo iptables -I FORWARD -i {BRIDGE} -j ACCEPT; \
             sudo iptables -I FORWARD -o {BRIDGE} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
        ),
        _ => format!(
            "sudo nft insert rule {family} {table} {name} iifname {BRIDGE} accept; \
             sudo nft insert rule {family} {table} {name} oifname {BRIDGE} ct state established,related accept"
        ),
    }
}

fn program(name: &'static str, file: &str, found: Option<&Path>, costs: &str, package: &str) -> Check {
    match found {
        Some(path) => ok(name, path.display().to_string()),
        None => ok(name, format!("there is no {file} in PATH and where packages put it"))
            .missing(costs, format!("sudo apt-get install {package}")),
    }
}

fn control_groups(facts: &Facts) -> Check {
    const NAME: &str = "control-groups";
    match facts.control_groups.is_version_2 {
        true => ok(NAME, format!("version 2 at {CONTROL_GROUPS}")),
        false => ok(NAME, format!("no version 2 at {CONTROL_GROUPS}")).missing(
            "berthd cannot run a guest, as each has a control group",
            format!("sudo mount -t cgroup2 none {CONTROL_GROUPS}   # or boot with systemd.unified_cgroup_hierarchy=1"),
        ),
    }
    .needed()
}

fn controllers(facts: &Facts) -> Check {
    let have = &facts.control_groups.controllers;
    let missing: Vec<_> =
        CONTROLLERS.into_iter().filter(|name| !have.iter().any(|known| known == name)).collect();
    controller("controllers", have, &missing, "berthd cannot run a guest, as it limits what each uses", facts)
        .needed()
}

fn io_controller(facts: &Facts) -> Check {
    let have = &facts.control_groups.controllers;
    let missing = if have.iter().any(|known| known == IO) { [].as_slice() } else { &[IO] };
    controller(
        "io-controller",
        have,
        missing,
        "guests share disks as it comes: their --io-weight has no effect",
        facts,
    )
}

fn controller(name: &'static str, have: &[String], missing: &[&str], costs: &str, facts: &Facts) -> Check {
    match missing {
        _ if !facts.control_groups.is_version_2 => ok(name, "not those of version 2").missing(costs, "see control-groups"),
        [] => ok(name, format!("there are {}", have.join(", "))),
        missing => ok(name, format!("without {}", missing.join(", "))).missing(
            costs,
            format!(
                "grep . /proc/cgroups {CONTROL_GROUPS}/cgroup.controllers   # one that version 1 has is not there; boot with cgroup_no_v1=all"
            ),
        ),
    }
}

fn namespaces(facts: &Facts) -> Check {
    const NAME: &str = "namespaces";
    const COSTS: &str = "berthd cannot run a guest, as each has a cell of its own";
    let missing = &facts.missing_namespaces;
    let check = match (missing.as_slice(), &facts.namespaces) {
        ([], Some(Ok(()))) => ok(NAME, "a cell's were made"),
        ([], None) => ok(NAME, "the kernel has a cell's; only root can try"),
        ([], Some(Err(trouble))) => ok(NAME, format!("they cannot be made: {}", why(trouble)))
            .broken(COSTS, "run it on the host itself: a container that hides this has no room for cells"),
        (missing, _) => ok(NAME, format!("none of: {}", missing.join(", "))).missing(
            COSTS,
            missing
                .iter()
                .map(|name| format!("sudo sysctl user.max_{name}_namespaces=10000"))
                .collect::<Vec<_>>()
                .join("; "),
        ),
    };
    check.needed()
}

fn seccomp(facts: &Facts) -> Check {
    const NAME: &str = "seccomp";
    const COSTS: &str =
        "no guest can run but with berth-vmm --no-seccomp, which leaves a VMM all system calls";
    const MEND: &str = "boot a kernel with CONFIG_SECCOMP_FILTER, as all of Debian's are";
    match &facts.seccomp_actions {
        Some(actions) if actions.split_whitespace().any(|action| action == KILL) => {
            ok(NAME, "filters of system calls")
        }
        Some(_) => ok(NAME, format!("filters cannot {KILL}")).broken(COSTS, MEND),
        None => ok(NAME, "the kernel has no filters of system calls").missing(COSTS, MEND),
    }
    .needed()
}

fn landlock(facts: &Facts) -> Check {
    const NAME: &str = "landlock";
    match facts.landlock {
        Some(version) => ok(NAME, format!("version {version}")),
        None => ok(NAME, "the kernel has none, or it is switched off").missing(
            "one wall less: a VMM that is broken into is held by its cell, its user and its system calls alone",
            "cat /sys/kernel/security/lsm   # boot with lsm=landlock, before what this says",
        ),
    }
}

fn tun(facts: &Facts) -> Check {
    device(
        "tun",
        TUN,
        &facts.tun,
        if facts.is_root { "a tap was made" } else { "it can be opened; only root makes taps" },
        NO_NETWORK,
        "sudo modprobe tun",
        facts,
    )
}

fn vhost_net(facts: &Facts) -> Check {
    device(
        "vhost-net",
        VHOST_NET,
        &facts.vhost_net,
        "it can be opened",
        "guests' packets go through their VMM, which takes more of the processor; nothing else is lost",
        "sudo modprobe vhost_net",
        facts,
    )
}

fn userfaultfd(facts: &Facts) -> Check {
    device(
        "userfaultfd",
        USERFAULTFD,
        &facts.userfaultfd,
        "it can be opened",
        "memory of a snapshot cannot be fetched when it is first used; nothing of today's needs it",
        "boot a kernel from 6.1 on with CONFIG_USERFAULTFD",
        facts,
    )
}

/// A device of the kernel's that guests run without.
fn device(
    name: &'static str,
    path: &str,
    tried: &Tried,
    works: &str,
    costs: &str,
    load: &str,
    facts: &Facts,
) -> Check {
    match tried {
        Ok(()) => ok(name, format!("{path}: {works}")),
        Err(Trouble::Absent) => ok(name, format!("there is no {path}")).missing(costs, load),
        // It is berthd who uses it, as root.
        Err(Trouble::Denied) if !facts.is_root => ok(name, format!("{path} is there; only root may open it")),
        Err(trouble) => ok(name, format!("{path} cannot be used: {}", why(trouble)))
            .broken(costs, format!("ls -l {path}; {load}   # in a container, its host must hand it in")),
    }
}

fn why(trouble: &Trouble) -> String {
    match trouble {
        Trouble::Absent => "it is not there".into(),
        Trouble::Denied => "permission denied".into(),
        Trouble::Other(why) => why.clone(),
    }
}

fn io_uring(facts: &Facts) -> Check {
    const NAME: &str = "io-uring";
    const COSTS: &str =
        "disks with the engine Async; those with Sync, which is what berthd gives, are as they are";
    match &facts.io_uring {
        Ok(()) => ok(NAME, "a ring was made"),
        Err(Trouble::Denied) => {
            ok(NAME, "switched off").broken(COSTS, "sudo sysctl kernel.io_uring_disabled=0")
        }
        Err(trouble) => ok(NAME, format!("no ring can be made: {}", why(trouble))).missing(
            COSTS,
            "boot a kernel with CONFIG_IO_URING; in a container, its filter must let io_uring_setup through",
        ),
    }
}

fn huge_pages(facts: &Facts) -> Check {
    const NAME: &str = "huge-pages";
    const COSTS: &str = "guests that ask for huge pages do not start; others are as they are";
    match facts.huge_pages {
        Some((all @ 1.., free)) => ok(NAME, format!("{all} of 2 MiB, {free} free")),
        Some(_) => ok(NAME, "none are reserved")
            .missing(COSTS, "sudo sysctl vm.nr_hugepages=512   # 1 GiB, kept from everything else"),
        None => {
            ok(NAME, "the kernel has none of 2 MiB").missing(COSTS, "boot a kernel with CONFIG_HUGETLBFS")
        }
    }
}

fn transparent_huge_pages(facts: &Facts) -> Check {
    const NAME: &str = "transparent-huge-pages";
    const COSTS: &str = "guests fault their memory in by 4 KiB: they boot slower and run a little slower";
    match facts.transparent_huge_pages.as_deref() {
        Some(choice @ ("always" | "madvise")) => ok(NAME, choice),
        Some(choice) => ok(NAME, choice)
            .broken(COSTS, "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"),
        None => {
            ok(NAME, "the kernel has none").missing(COSTS, "boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE")
        }
    }
}

fn disk_space(facts: &Facts) -> Check {
    const NAME: &str = "disk-space";
    let (place, free) = &facts.space;
    let place = place.display();
    let costs = &format!("images cannot be imported, and guests that write find their disks full ({STATE})");
    match free {
        Ok(free @ LEAST_SPACE..) => ok(NAME, format!("{} free in {place}", words::size(*free))),
        Ok(free) => ok(NAME, format!("only {} free in {place}", words::size(*free)))
            .broken(costs, "berth rm and berth image rm what is not used, or mount a larger disk there"),
        Err(trouble) => {
            ok(NAME, format!("{place}: {}", why(trouble))).broken(costs, format!("sudo mkdir -p {STATE}"))
        }
    }
}

fn open_files(facts: &Facts) -> Check {
    const NAME: &str = "open-files";
    match facts.open_files {
        Some(most @ ..LEAST_OPEN_FILES) => ok(NAME, format!("at most {most} in a process")).broken(
            "guests with many disks do not start",
            format!("ulimit -Hn {LEAST_OPEN_FILES}; or LimitNOFILE= in the unit of whoever starts it"),
        ),
        Some(most) => ok(NAME, format!("up to {most} in a process")),
        None => ok(NAME, "no limit"),
    }
}

fn berthd(facts: &Facts) -> Check {
    const NAME: &str = "berthd";
    const COSTS: &str = "no command of berth that is about guests or images works";
    let socket = facts.socket.display();
    match &facts.berthd {
        Ok(()) => ok(NAME, format!("answers at {socket}")),
        Err(Trouble::Absent) => {
            ok(NAME, format!("there is no {socket}")).missing(COSTS, "sudo systemctl start berthd")
        }
        Err(Trouble::Denied) => ok(NAME, format!("you may not open {socket}")).broken(COSTS, "see group"),
        Err(Trouble::Other(why)) => ok(NAME, format!("{socket}: {why}")).broken(
            COSTS,
            "sudo journalctl -u berthd   # tells why; sudo systemctl restart berthd leaves guests running",
        ),
    }
}

fn group(facts: &Facts) -> Check {
    const NAME: &str = "group";
    const COSTS: &str = "you cannot use berthd without sudo";
    match facts.is_member {
        _ if facts.is_root => ok(NAME, "you are root"),
        Some(true) => ok(NAME, format!("you are in {GROUP}")),
        Some(false) => ok(NAME, format!("you are not in {GROUP}"))
            .missing(COSTS, format!("sudo usermod -aG {GROUP} {}   # and log in again", facts.user)),
        None => ok(NAME, format!("there is no group {GROUP}")).missing(
            COSTS,
            format!("sudo groupadd -r {GROUP}; sudo usermod -aG {GROUP} {}   # and log in again", facts.user),
        ),
    }
}

#[cfg(test)]
mod tests;
