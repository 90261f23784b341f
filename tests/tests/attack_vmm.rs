//! An attacker who has got hold of a thread of a VMM whose guest runs: what it must not be able to do, its filter stops.
//! Where there are no filters, the same calls reach the kernel, and most of what they would do is stopped by what else the
//! process has given up.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs;

use berth_tests::guest::{Guest, Setup};
use berth_tests::inject::{Answer, Injector};
use rustix::io::Errno;

/// A call that no thread of a VMM has a need for once its guest runs.
struct Attack {
    what: &'static str,
    number: i64,
    /// What is put into the thread's memory.
    data: &'static [u8],
    /// With the address of that.
    arguments: fn(u64) -> [u64; 6],
    /// What becomes of it in a VMM without filters.
    unfiltered: Unfiltered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unfiltered {
    /// It does what it is there for.
    Succeeds,
    /// The kernel does not see a reason to refuse it, and does nothing for it has no sense as it is.
    Fails(Errno),
    /// No file can be opened, by Landlock.
    Landlock,
    /// There is no capability.
    Capabilities,
}

use Unfiltered::{Capabilities, Fails, Landlock, Succeeds};

const fn attack(
    what: &'static str,
    number: i64,
    data: &'static [u8],
    arguments: fn(u64) -> [u64; 6],
    unfiltered: Unfiltered,
) -> Attack {
    Attack { what, number, data, arguments, unfiltered }
}

const FILE: &[u8] = b"/etc/hostname\0";
const PROGRAM: &[u8] = b"/bin/true\0";
const DIRECTORY: &[u8] = b"/tmp\0";
const NEW: &[u8] = b"/tmp/berth-attack\0";
const HERE: u64 = libc::AT_FDCWD as u64;
const NONE: u64 = u64::MAX;
const PAGE: u64 = 4096;
const EXECUTABLE: u64 = (libc::PROT_READ | libc::PROT_EXEC) as u64;
const PRIVATE_MEMORY: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
const DATAGRAM: u64 = libc::SOCK_DGRAM as u64;
/// KVM_CREATE_VM, TUNSETIFF.
const CREATE_VM: u64 = 0xae01;
const TAP: &str = "a network device";
const SET_INTERFACE: u64 = 0x4004_54ca;

/// The beginning of a `perf_event_attr`: the software event of the CPU's clock, in a structure of its first size.
const PERF: [u8; 64] = {
    let mut attr = [0; 64];
    (attr[0], attr[4]) = (1, 64);
    attr
};

const ATTACKS: [Attack; 58] = [
    // Programs and code.
    attack("execve", libc::SYS_execve, PROGRAM, |at| [at, 0, 0, 0, 0, 0], Landlock),
    attack("execveat", libc::SYS_execveat, PROGRAM, |at| [HERE, at, 0, 0, 0, 0], Landlock),
    attack(
        "executable memory",
        libc::SYS_mmap,
        b"",
        |_| [0, PAGE, EXECUTABLE, PRIVATE_MEMORY, NONE, 0],
        Succeeds,
    ),
    attack(
        "memory made executable",
        libc::SYS_mprotect,
        b"",
        |at| [at / PAGE * PAGE, 0, EXECUTABLE, 0, 0, 0],
        Succeeds,
    ),
    attack(
        "memory made executable with a key",
        libc::SYS_pkey_mprotect,
        b"",
        |at| [at / PAGE * PAGE, 0, EXECUTABLE, NONE, 0, 0],
        Succeeds,
    ),
    attack("a file in memory", libc::SYS_memfd_create, NEW, |at| [at, 0, 0, 0, 0, 0], Succeeds),
    // Processes. The flags of these clones contradict each other.
    attack(
        "fork",
        libc::SYS_clone,
        b"",
        |_| [(libc::CLONE_THREAD | libc::SIGCHLD) as u64, 0, 0, 0, 0, 0],
        Fails(Errno::INVAL),
    ),
    attack("clone3", libc::SYS_clone3, b"", |at| [at, 1, 0, 0, 0, 0], Fails(Errno::INVAL)),
    attack("signal a process", libc::SYS_kill, b"", |_| [1, 0, 0, 0, 0, 0], Capabilities),
    attack("signal a thread of another", libc::SYS_tkill, b"", |_| [1, 0, 0, 0, 0, 0], Capabilities),
    // What threads of this process are sent.
    attack(
        "abort another process",
        libc::SYS_tgkill,
        b"",
        |_| [1, 1, libc::SIGABRT as u64, 0, 0, 0],
        Capabilities,
    ),
    attack(
        "kick another process",
        libc::SYS_tgkill,
        b"",
        |_| [1, 1, libc::SIGRTMIN() as u64, 0, 0, 0],
        Capabilities,
    ),
    attack("a descriptor of a process", libc::SYS_pidfd_open, b"", |_| [1, 0, 0, 0, 0, 0], Succeeds),
    attack(
        "trace a process",
        libc::SYS_ptrace,
        b"",
        |_| [libc::PTRACE_SEIZE as u64, 1, 0, 0, 0, 0],
        Capabilities,
    ),
    attack("read a process's memory", libc::SYS_process_vm_readv, b"", |at| [1, at, 0, at, 0, 0], Succeeds),
    attack("write a process's memory", libc::SYS_process_vm_writev, b"", |at| [1, at, 0, at, 0, 0], Succeeds),
    attack("limits of a process", libc::SYS_prlimit64, b"", |at| [1, 0, 0, at, 0, 0], Succeeds),
    attack(
        "run in real time",
        libc::SYS_sched_setscheduler,
        &1_i32.to_ne_bytes(),
        |at| [0, libc::SCHED_FIFO as u64, at, 0, 0, 0],
        Capabilities,
    ),
    attack("run before others", libc::SYS_setpriority, b"", |_| [0, 0, -5_i64 as u64, 0, 0, 0], Capabilities),
    // Files.
    attack("open", libc::SYS_open, FILE, |at| [at, 0, 0, 0, 0, 0], Landlock),
    attack("openat", libc::SYS_openat, FILE, |at| [HERE, at, 0, 0, 0, 0], Landlock),
    attack("openat2", libc::SYS_openat2, FILE, |at| [HERE, at, at, 0, 0, 0], Fails(Errno::INVAL)),
    attack(
        "list a directory",
        libc::SYS_open,
        DIRECTORY,
        |at| [at, libc::O_DIRECTORY as u64, 0, 0, 0, 0],
        Landlock,
    ),
    attack("make a directory", libc::SYS_mkdir, NEW, |at| [at, 0o700, 0, 0, 0, 0], Landlock),
    attack(
        "make a device",
        libc::SYS_mknod,
        NEW,
        |at| [at, (libc::S_IFCHR | 0o600) as u64, 0x103, 0, 0, 0],
        Capabilities,
    ),
    attack("make a link", libc::SYS_symlink, NEW, |at| [at, at, 0, 0, 0, 0], Landlock),
    attack("remove a file", libc::SYS_unlink, FILE, |at| [at, 0, 0, 0, 0, 0], Landlock),
    attack("rename a file", libc::SYS_rename, FILE, |at| [at, at, 0, 0, 0, 0], Landlock),
    attack("cut a file short", libc::SYS_truncate, NEW, |at| [at, 0, 0, 0, 0, 0], Fails(Errno::NOENT)),
    attack("another root", libc::SYS_chroot, DIRECTORY, |at| [at, 0, 0, 0, 0, 0], Capabilities),
    attack("open by inode", libc::SYS_open_by_handle_at, b"", |at| [0, at, 0, 0, 0, 0], Capabilities),
    // The network.
    attack(
        "a TCP socket",
        libc::SYS_socket,
        b"",
        |_| [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0],
        Succeeds,
    ),
    attack(
        "a Unix socket",
        libc::SYS_socket,
        b"",
        |_| [libc::AF_UNIX as u64, DATAGRAM, 0, 0, 0, 0],
        Succeeds,
    ),
    attack(
        "a netlink socket",
        libc::SYS_socket,
        b"",
        |_| [libc::AF_NETLINK as u64, DATAGRAM, 0, 0, 0, 0],
        Succeeds,
    ),
    attack(
        "a packet socket",
        libc::SYS_socket,
        b"",
        |_| [libc::AF_PACKET as u64, DATAGRAM, 0, 0, 0, 0],
        Capabilities,
    ),
    attack(
        "a pair of sockets",
        libc::SYS_socketpair,
        b"",
        |at| [libc::AF_UNIX as u64, DATAGRAM, 0, at, 0, 0],
        Succeeds,
    ),
    // Who it is and where.
    attack(
        "a user namespace",
        libc::SYS_unshare,
        b"",
        |_| [libc::CLONE_NEWUSER as u64, 0, 0, 0, 0, 0],
        Fails(Errno::INVAL),
    ),
    attack(
        "a network namespace",
        libc::SYS_unshare,
        b"",
        |_| [libc::CLONE_NEWNET as u64, 0, 0, 0, 0, 0],
        Capabilities,
    ),
    attack("mount", libc::SYS_mount, DIRECTORY, |at| [at, at, at, 0, 0, 0], Capabilities),
    attack("another user", libc::SYS_setuid, b"", |_| [1, 0, 0, 0, 0, 0], Capabilities),
    attack("other groups", libc::SYS_setgroups, b"", |_| [0, 0, 0, 0, 0, 0], Capabilities),
    attack(
        "dumpable again",
        libc::SYS_prctl,
        b"",
        |_| [libc::PR_SET_DUMPABLE as u64, 1, 0, 0, 0, 0],
        Succeeds,
    ),
    attack("another filter", libc::SYS_seccomp, b"", |at| [9, 0, at, 0, 0, 0], Fails(Errno::INVAL)),
    // The kernel.
    attack("bpf", libc::SYS_bpf, b"", |at| [5, at, 0, 0, 0, 0], Capabilities),
    attack("perf_event_open", libc::SYS_perf_event_open, &PERF, |at| [at, NONE, 0, NONE, 0, 0], Capabilities),
    attack("io_uring", libc::SYS_io_uring_setup, b"", |at| [0, at, 0, 0, 0, 0], Fails(Errno::INVAL)),
    attack("userfaultfd", libc::SYS_userfaultfd, b"", |_| [0, 0, 0, 0, 0, 0], Capabilities),
    attack("a key", libc::SYS_keyctl, b"", |_| [0, -3_i64 as u64, 1, 0, 0, 0], Succeeds),
    attack("a module", libc::SYS_init_module, b"", |at| [at, 0, at, 0, 0, 0], Capabilities),
    attack("kexec", libc::SYS_kexec_load, b"", |_| [0, 0, 0, 0, 0, 0], Capabilities),
    attack("the kernel's log", libc::SYS_syslog, b"", |_| [9, 0, 0, 0, 0, 0], Capabilities),
    attack("I/O ports", libc::SYS_iopl, b"", |_| [3, 0, 0, 0, 0, 0], Capabilities),
    attack("the clock", libc::SYS_clock_settime, &[0; 16], |at| [0, at, 0, 0, 0, 0], Capabilities),
    attack("shared memory", libc::SYS_shmget, b"", |_| [0, PAGE, 0o600, 0, 0, 0], Succeeds),
    attack("a message queue", libc::SYS_msgget, b"", |_| [0, 0o600, 0, 0, 0, 0], Succeeds),
    // Devices.
    attack(
        "type into a terminal",
        libc::SYS_ioctl,
        b"x",
        |at| [0, libc::TIOCSTI, at, 0, 0, 0],
        Fails(Errno::NOTTY),
    ),
    attack(
        "another virtual machine",
        libc::SYS_ioctl,
        b"",
        |_| [0, CREATE_VM, 0, 0, 0, 0],
        Fails(Errno::NOTTY),
    ),
    attack(TAP, libc::SYS_ioctl, b"", |at| [0, SET_INTERFACE, at, 0, 0, 0], Fails(Errno::NOTTY)),
];

/// The threads of a VMM by their names.
fn threads(guest: &Guest) -> BTreeMap<String, u32> {
    let pid = guest.vmm.pid();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let named = tasks.map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).unwrap();
        (name.trim_end().to_owned(), task.file_name().to_str().unwrap().parse().unwrap())
    });
    // A thread of KVM's own runs nothing but the kernel.
    named.filter(|(name, _)| !name.starts_with("kvm-")).collect()
}

/// What becomes of all attacks, by each thread.
fn all_attacks(guest: &Guest, mut judge: impl FnMut(&str, &Attack, Answer)) {
    let threads = threads(guest);
    let names: Vec<_> = threads.keys().map(String::as_str).collect();
    assert_eq!(names, ["berth-api", "berth-io", "berth-vcpu 0", "berth-vmm"]);
    for (name, thread) in &threads {
        let injector = Injector::stop(guest.vmm.pid(), *thread);
        for attack in &ATTACKS {
            let at = injector.put(attack.data);
            judge(name, attack, injector.call(attack.number, (attack.arguments)(at)));
        }
    }
}

#[test]
fn no_thread_of_a_vmm_is_of_use_to_who_has_got_hold_of_it() {
    let mut guest = Guest::booted(Setup { entropy: true, ..Setup::default() });
    let mut wrong = Vec::new();
    all_attacks(&guest, |thread, attack, answer| {
        // That one may ask for a tap, which the kernel gives it if it belongs to this user.
        let is_its_job = (thread, attack.what) == ("berth-vmm", TAP);
        let not_a_tap = Answer::Returned(-i64::from(Errno::NOTTY.raw_os_error()));
        if answer != if is_its_job { not_a_tap } else { Answer::Trapped } {
            wrong.push(format!("{thread}: {}: {answer:?}", attack.what));
        }
    });
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // The attacker's stops were none to the guest.
    guest.state();
    guest.power_off();
}

#[test]
fn without_filters_the_same_calls_reach_the_kernel_and_most_are_stopped_by_what_else_was_given_up() {
    let guest = Guest::booted(Setup { arguments: vec!["--no-seccomp".into()], ..Setup::default() });
    let mut wrong = Vec::new();
    all_attacks(&guest, |thread, attack, answer| {
        let is_as_said = match (attack.unfiltered, answer) {
            (Succeeds, Answer::Returned(0..)) => true,
            (Fails(errno), Answer::Returned(result)) => result == -i64::from(errno.raw_os_error()),
            (Landlock, Answer::Returned(result)) => result == -i64::from(libc::EACCES),
            (Capabilities, Answer::Returned(result)) => {
                [libc::EPERM, libc::EACCES].iter().any(|errno| result == -i64::from(*errno))
            }
            _ => false,
        };
        if !is_as_said {
            wrong.push(format!("{thread}: {}: {answer:?}, not {:?}", attack.what, attack.unfiltered));
        }
    });
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
