use super::*;
use crate::doctor::facts::ControlGroups;

/// A host where everything is as it should be.
fn good() -> Facts {
    Facts {
        is_root: false,
        kernel: (Some((6, 1)), "6.1.0-25-amd64".into()),
        has_virtualization: true,
        kvm: Ok(()),
        kvm_access: Some(Access { owner: 0, group: "kvm".into(), mode: 0o660 }),
        vmm: Some("/usr/bin/berth-vmm".into()),
        jailer: Some("/usr/bin/berth-jailer".into()),
        control_groups: ControlGroups {
            is_version_2: true,
            controllers: ["cpuset", "cpu", "io", "memory", "pids"].map(String::from).into(),
        },
        missing_namespaces: vec![],
        namespaces: None,
        seccomp_actions: Some("kill_process kill_thread trap errno trace log allow\n".into()),
        landlock: Some(2),
        tun: Ok(()),
        vhost_net: Ok(()),
        io_uring: Ok(()),
        userfaultfd: Ok(()),
        huge_pages: Some((512, 500)),
        transparent_huge_pages: Some("always".into()),
        ip: Some("/usr/sbin/ip".into()),
        nft: Some("/usr/sbin/nft".into()),
        droppers: Some(Ok(vec![])),
        space: ("/var/lib/berth".into(), Ok(50 << 30)),
        open_files: Some(1 << 20),
        socket: "/run/berth/berthd.sock".into(),
        berthd: Ok(()),
        is_member: Some(true),
        user: "alice".into(),
    }
}

fn chain(family: &str, table: &str, name: &str) -> Chain {
    Chain { family: family.into(), table: table.into(), name: name.into() }
}

/// What is changed on a good host; the check that tells; how; whether guests can run; what mends it.
type Row = (&'static str, fn(&mut Facts), &'static str, Verdict, bool, &'static str);

const BAD: [Row; 42] = {
    use Verdict::{Broken, Missing, Untried};
    fn other() -> Tried {
        Err(Trouble::Other("odd".into()))
    }
    fn denied(facts: &mut Facts) {
        facts.kvm = Err(Trouble::Denied);
    }
    fn without_daemon(facts: &mut Facts) {
        denied(facts);
        facts.berthd = Err(Trouble::Absent);
    }
    [
        ("no module", |f| f.kvm = Err(Trouble::Absent), "kvm", Missing, false, "modprobe kvm_intel"),
        (
            "no virtualization",
            |f| (f.kvm, f.has_virtualization) = (Err(Trouble::Absent), false),
            "kvm",
            Missing,
            false,
            "firmware",
        ),
        ("a KVM that fails", |f| f.kvm = other(), "kvm", Broken, false, "dmesg"),
        ("not allowed, no daemon", without_daemon, "kvm", Broken, false, "as root"),
        ("not in the group", denied, "kvm-permissions", Broken, true, "usermod -aG kvm alice"),
        (
            "no group may",
            |f| {
                denied(f);
                f.kvm_access = Some(Access { owner: 0, group: "root".into(), mode: 0o600 });
            },
            "kvm-permissions",
            Broken,
            true,
            "chgrp kvm /dev/kvm",
        ),
        (
            "the group may only read",
            |f| {
                denied(f);
                f.kvm_access = Some(Access { owner: 0, group: "kvm".into(), mode: 0o640 });
            },
            "kvm-permissions",
            Broken,
            true,
            "chmod 660 /dev/kvm",
        ),
        ("no device", |f| f.kvm_access = None, "kvm-permissions", Missing, true, "see kvm"),
        ("an old kernel", |f| f.kernel.0 = Some((5, 9)), "kernel", Broken, false, "linux-image"),
        ("no version", |f| f.kernel.0 = None, "kernel", Broken, false, "linux-image"),
        ("no VMM", |f| f.vmm = None, "berth-vmm", Missing, false, "apt-get install berth"),
        ("no jailer", |f| f.jailer = None, "berth-jailer", Missing, false, "apt-get install berth"),
        ("version 1", |f| f.control_groups.is_version_2 = false, "control-groups", Missing, false, "cgroup2"),
        (
            "no memory",
            |f| f.control_groups.controllers.retain(|c| c != "memory"),
            "controllers",
            Missing,
            false,
            "/proc/cgroups",
        ),
        (
            "no io",
            |f| f.control_groups.controllers.retain(|c| c != "io"),
            "io-controller",
            Missing,
            true,
            "/proc/cgroups",
        ),
        (
            "none to make",
            |f| f.missing_namespaces = vec!["net".into()],
            "namespaces",
            Missing,
            false,
            "user.max_net_namespaces",
        ),
        (
            "none in here",
            |f| f.namespaces = Some(Err(Trouble::Denied)),
            "namespaces",
            Broken,
            false,
            "container",
        ),
        ("no seccomp", |f| f.seccomp_actions = None, "seccomp", Missing, false, "CONFIG_SECCOMP_FILTER"),
        (
            "old seccomp",
            |f| f.seccomp_actions = Some("kill_thread".into()),
            "seccomp",
            Broken,
            false,
            "CONFIG_SECCOMP_FILTER",
        ),
        ("no Landlock", |f| f.landlock = None, "landlock", Missing, true, "lsm=landlock"),
        ("no tun", |f| f.tun = Err(Trouble::Absent), "tun", Missing, true, "modprobe tun"),
        ("tun fails", |f| f.tun = other(), "tun", Broken, true, "ls -l /dev/net/tun"),
        (
            "no right to taps as root",
            |f| (f.tun, f.is_root) = (Err(Trouble::Denied), true),
            "tun",
            Broken,
            true,
            "in a container",
        ),
        (
            "no vhost",
            |f| f.vhost_net = Err(Trouble::Absent),
            "vhost-net",
            Missing,
            true,
            "modprobe vhost_net",
        ),
        (
            "io_uring off",
            |f| f.io_uring = Err(Trouble::Denied),
            "io-uring",
            Broken,
            true,
            "io_uring_disabled=0",
        ),
        ("no io_uring", |f| f.io_uring = other(), "io-uring", Missing, true, "CONFIG_IO_URING"),
        ("none reserved", |f| f.huge_pages = Some((0, 0)), "huge-pages", Missing, true, "vm.nr_hugepages"),
        ("no hugetlbfs", |f| f.huge_pages = None, "huge-pages", Missing, true, "CONFIG_HUGETLBFS"),
        (
            "never",
            |f| f.transparent_huge_pages = Some("never".into()),
            "transparent-huge-pages",
            Broken,
            true,
            "madvise",
        ),
        (
            "none",
            |f| f.transparent_huge_pages = None,
            "transparent-huge-pages",
            Missing,
            true,
            "CONFIG_TRANSPARENT",
        ),
        ("no userfaultfd", |f| f.userfaultfd = Err(Trouble::Absent), "userfaultfd", Missing, true, "6.1"),
        ("no nft", |f| f.nft = None, "nft", Missing, true, "apt-get install nftables"),
        ("no ip", |f| f.ip = None, "ip", Missing, true, "apt-get install iproute2"),
        (
            "a firewall",
            |f| f.droppers = Some(Ok(vec![chain("ip", "filter", "FORWARD")])),
            "forwarding",
            Broken,
            true,
            "iptables -I FORWARD -i berth0 -j ACCEPT",
        ),
        ("not root", |f| f.droppers = None, "forwarding", Untried, true, "sudo berth doctor"),
        (
            "an nft that fails",
            |f| f.droppers = Some(Err(Trouble::Absent)),
            "forwarding",
            Untried,
            true,
            "list ruleset",
        ),
        ("nobody to ask", |f| f.nft = None, "forwarding", Untried, true, "see nft"),
        ("full", |f| f.space.1 = Ok(1 << 20), "disk-space", Broken, true, "berth image rm"),
        ("few files", |f| f.open_files = Some(1024), "open-files", Broken, true, "ulimit -Hn 2048"),
        ("no daemon", |f| f.berthd = Err(Trouble::Absent), "berthd", Missing, true, "systemctl start berthd"),
        ("a daemon that hangs", |f| f.berthd = other(), "berthd", Broken, true, "journalctl -u berthd"),
        ("not a member", |f| f.is_member = Some(false), "group", Missing, true, "usermod -aG berth alice"),
    ]
};

fn find<'a>(report: &'a Report, name: &str) -> &'a Check {
    report.checks.iter().find(|check| check.name == name).unwrap_or_else(|| panic!("no check {name}"))
}

#[test]
fn on_a_good_host_everything_is_ok() {
    let report = judge(&good());
    assert!(report.guests_can_run);
    for check in &report.checks {
        assert_eq!((check.verdict, &check.costs, &check.mend), (Verdict::Ok, &None, &None), "{}", check.name);
        assert!(!check.found.is_empty(), "{}", check.name);
    }
}

#[test]
fn each_thing_that_is_missing_is_named_with_its_cost_and_what_mends_it() {
    for (what, change, name, verdict, guests_can_run, mend) in BAD {
        let mut facts = good();
        change(&mut facts);
        let report = judge(&facts);
        let check = find(&report, name);
        assert_eq!(check.verdict, verdict, "{what}: {check:?}");
        assert_eq!(report.guests_can_run, guests_can_run, "{what}");
        assert!(check.costs.as_ref().is_some_and(|costs| !costs.is_empty()), "{what}");
        assert!(check.mend.as_ref().is_some_and(|text| text.contains(mend)), "{what}: {:?}", check.mend);
    }
}

#[test]
fn each_check_can_fail() {
    let failing: std::collections::BTreeSet<_> = BAD.iter().map(|(_, _, name, ..)| *name).collect();
    let all: std::collections::BTreeSet<_> = judge(&good()).checks.iter().map(|check| check.name).collect();
    assert_eq!(failing, all);
}

#[test]
fn what_only_root_may_use_is_no_fault_of_an_ordinary_users() {
    let mut facts = good();
    for tried in [&mut facts.tun, &mut facts.vhost_net, &mut facts.userfaultfd] {
        *tried = Err(Trouble::Denied);
    }
    let report = judge(&facts);
    for name in ["tun", "vhost-net", "userfaultfd"] {
        assert_eq!(find(&report, name).verdict, Verdict::Ok, "{name}");
        assert!(find(&report, name).found.contains("only root"), "{name}");
    }
}

#[test]
fn a_kvm_that_only_berthd_may_open_is_neither_called_good_nor_in_the_way() {
    let mut facts = good();
    facts.kvm = Err(Trouble::Denied);
    let report = judge(&facts);
    let kvm = find(&report, "kvm");
    assert_eq!((kvm.verdict, report.guests_can_run), (Verdict::Untried, true));
    assert_eq!(kvm.found, "not tried: you may not open /dev/kvm, and berthd may");
    assert!(kvm.mend.as_ref().is_some_and(|mend| mend.starts_with("sudo berth doctor")), "{kvm:?}");
}

#[test]
fn each_chain_that_drops_is_named_with_what_lets_guests_through() {
    let mut facts = good();
    facts.droppers = Some(Ok(vec![chain("ip", "filter", "FORWARD"), chain("inet", "mine", "through")]));
    let report = judge(&facts);
    let forwarding = find(&report, "forwarding");
    assert!(
        forwarding.found.ends_with("may be dropped, by the policy of ip filter FORWARD, inet mine through"),
        "{forwarding:?}"
    );
    let expected = "\
        sudo iptables -I FORWARD -i berth0 -j ACCEPT; \
        sudo iptables -I FORWARD -o berth0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; \
        sudo nft insert rule inet mine through iifname berth0 accept; \
        sudo nft insert rule inet mine through oifname berth0 ct state established,related accept";
    assert_eq!(forwarding.mend.as_deref(), Some(expected));
}

#[test]
fn root_needs_no_group_and_tries_what_others_cannot() {
    let mut facts = good();
    (facts.is_root, facts.is_member, facts.namespaces) = (true, None, Some(Ok(())));
    let report = judge(&facts);
    assert_eq!(find(&report, "group").verdict, Verdict::Ok);
    assert_eq!(find(&report, "namespaces").found, "a cell's were made");
    assert!(find(&report, "tun").found.contains("a tap was made"));
}

#[test]
fn a_group_that_is_not_there_is_made_first() {
    let mut facts = good();
    facts.is_member = None;
    let mend = find(&judge(&facts), "group").mend.clone().unwrap();
    assert!(mend.starts_with("sudo groupadd"), "{mend}");
}

/// Scripts ask for them.
#[test]
fn the_names_of_checks_stay() {
    let report = judge(&good());
    let names: Vec<_> = report.checks.iter().map(|check| check.name).collect();
    let expected = [
        "kvm",
        "kvm-permissions",
        "kernel",
        "berth-vmm",
        "berth-jailer",
        "control-groups",
        "controllers",
        "io-controller",
        "namespaces",
        "seccomp",
        "landlock",
        "tun",
        "vhost-net",
        "io-uring",
        "huge-pages",
        "transparent-huge-pages",
        "userfaultfd",
        "ip",
        "nft",
        "forwarding",
        "disk-space",
        "open-files",
        "berthd",
        "group",
    ];
    assert_eq!(names, expected);
    let needed: Vec<_> = report.checks.iter().filter(|check| check.needed).map(|check| check.name).collect();
    assert_eq!(
        needed,
        [
            "kvm",
            "kernel",
            "berth-vmm",
            "berth-jailer",
            "control-groups",
            "controllers",
            "namespaces",
            "seccomp"
        ]
    );
}
