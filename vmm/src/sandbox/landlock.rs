//! Landlock: from here on the calling thread, and those it starts, open no file but those that are named now.
//!
//! What is open already stays as it is. Paths are looked at by the kernel, behind all links, so that none leads out.
//! Kernels have had it since 5.13 and may have it switched off; each version of its interface can forbid more.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A file, or a directory with all below it, that may be opened again.
pub struct Allowed<'a> {
    pub place: BorrowedFd<'a>,
    /// For writing too.
    pub is_writable: bool,
    /// A device, with what ioctls do.
    pub is_device: bool,
}

/// Rights over files, with the version that each came with (linux/landlock.h): execute, write, read, read directories,
/// remove and make what is in them; rename across directories; truncate; ioctls on devices.
const FILE_RIGHTS: [(u32, u64); 4] = [(1, (1 << 13) - 1), (2, 1 << 13), (3, 1 << 14), (5, 1 << 15)];
/// Binding TCP ports and connecting to them.
const NETWORK_RIGHTS: [(u32, u64); 1] = [(4, 0b11)];
/// Connecting to abstract Unix sockets of others, and sending them signals.
const SCOPES: [(u32, u64); 1] = [(6, 0b11)];

const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const IOCTL_DEVICE: u64 = 1 << 15;

const CREATE_RULESET_VERSION: libc::c_uint = 1;
const RULE_PATH_BENEATH: libc::c_int = 1;

/// `struct landlock_ruleset_attr`; a kernel takes as much of it as it knows, if the rest is 0.
#[repr(C)]
struct RulesetAttr {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct PathBeneathAttr {
    allowed_access: u64,
    parent_fd: libc::c_int,
}

/// The version of Landlock that this kernel has; `None` without.
pub fn version() -> Option<u32> {
    // SAFETY: with this flag the call takes no structure and gives a number.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<RulesetAttr>(),
            0usize,
            CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(version).ok().filter(|version| *version > 0)
}

/// Restricts the calling thread, and the threads it starts from now on, to opening what is `allowed`; to no TCP, no
/// abstract socket and no signal to other processes. For ever; a second call leaves what both allow. Needs `no_new_privs`.
///
/// # Errors
/// The kernel has no such version, or 16 restrictions are on this thread already.
pub fn restrict(version: u32, allowed: &[Allowed]) -> io::Result<()> {
    let known = |rights: &[(u32, u64)]| {
        rights.iter().filter(|(since, _)| *since <= version).fold(0, |sum, (_, rights)| sum | rights)
    };
    let ruleset = create(&RulesetAttr {
        handled_access_fs: known(&FILE_RIGHTS),
        handled_access_net: known(&NETWORK_RIGHTS),
        scoped: known(&SCOPES),
    })?;
    for Allowed { place, is_writable, is_device } in allowed {
        let mut rights = if *is_writable { READ_FILE | WRITE_FILE } else { READ_FILE };
        if *is_device {
            rights |= IOCTL_DEVICE;
        }
        // The kernel refuses a right that is not restricted.
        add(&ruleset, *place, rights & known(&FILE_RIGHTS))?;
    }
    // SAFETY: the call takes a descriptor, which `ruleset` keeps open, and touches no memory.
    done(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) }).map(drop)
}

fn create(attr: &RulesetAttr) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads `size_of` bytes, which `attr` has, and writes none.
    let fd = done(unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::from_ref(attr),
            size_of::<RulesetAttr>(),
            0,
        )
    })?;
    // SAFETY: the call has just made the descriptor (`done`), and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

fn add(ruleset: &OwnedFd, place: BorrowedFd, rights: u64) -> io::Result<()> {
    let rule = PathBeneathAttr { allowed_access: rights, parent_fd: place.as_raw_fd() };
    // SAFETY: the kernel reads a `struct landlock_path_beneath_attr`, which `rule` is; both descriptors are open.
    done(unsafe {
        let rule = std::ptr::from_ref(&rule);
        libc::syscall(libc::SYS_landlock_add_rule, ruleset.as_raw_fd(), RULE_PATH_BENEATH, rule, 0)
    })
    .map(drop)
}

fn done(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::os::fd::AsFd;

    /// On a thread of its own, for it does not end.
    fn on_a_thread(work: impl FnOnce() + Send + 'static) {
        std::thread::spawn(work).join().unwrap();
    }

    fn allow_new_restrictions() {
        // SAFETY: the option takes a number and touches no memory.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    }

    #[test]
    fn what_is_allowed_can_be_opened_and_nothing_else() {
        let Some(version) = version() else {
            println!("SKIPPED: this kernel has no Landlock");
            return;
        };
        let [inside, outside] = [(), ()].map(|()| tempfile::tempdir().unwrap());
        for place in [&inside, &outside] {
            for name in ["a", "b"] {
                fs::write(place.path().join(name), name).unwrap();
            }
        }
        std::os::unix::fs::symlink(outside.path().join("b"), inside.path().join("link")).unwrap();
        on_a_thread(move || {
            allow_new_restrictions();
            let directory = File::open(inside.path()).unwrap();
            let file = File::open(outside.path().join("a")).unwrap();
            let allowed = [
                Allowed { place: directory.as_fd(), is_writable: true, is_device: false },
                Allowed { place: file.as_fd(), is_writable: false, is_device: false },
            ];
            restrict(version, &allowed).unwrap();

            let open =
                |path: &std::path::Path, write: bool| File::options().read(true).write(write).open(path);
            open(&inside.path().join("a"), true).unwrap();
            open(&outside.path().join("a"), false).unwrap();
            for (path, write) in [
                (outside.path().join("a"), true),
                (outside.path().join("b"), false),
                (inside.path().join("link"), false),
                (outside.path().into(), false),
                ("/dev/null".into(), false),
            ] {
                let error = open(&path, write).expect_err(&path.display().to_string());
                assert_eq!(error.raw_os_error(), Some(libc::EACCES), "{}", path.display());
            }
            for made in ["made", "a/../made"] {
                File::create(inside.path().join(made)).unwrap_err();
            }
            fs::remove_file(inside.path().join("a")).unwrap_err();
            // Threads that it starts are restricted too.
            let path = outside.path().join("b");
            std::thread::spawn(move || open(&path, false).unwrap_err()).join().unwrap();
        });
    }

    #[test]
    fn nothing_allowed_is_nothing_opened_and_what_is_open_stays_so() {
        let Some(version) = version() else {
            println!("SKIPPED: this kernel has no Landlock");
            return;
        };
        on_a_thread(move || {
            allow_new_restrictions();
            let mut open = tempfile::tempfile().unwrap();
            restrict(version, &[]).unwrap();
            std::io::Write::write_all(&mut open, b"still").unwrap();
            assert!(File::open("/proc/self/status").is_err());
            assert!(std::net::TcpListener::bind("127.0.0.1:0").is_err() || version < 4);
        });
    }
}
