//! System call filters, one for each kind of thread: those of `resources/seccomp`, which `build.rs` has compiled, or those of
//! a file of the same form.
//!
//! What a filter does with a call that it does not allow is in the file: ours send SIGSYS, which `faults.rs` turns into a
//! message and the end of the process.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use api_socket::Fault;
use seccompiler::{BpfMap, BpfProgram, BpfProgramRef};

use super::Role;

/// The compiled filters.
mod built_in {
    use seccompiler::sock_filter;
    include!(concat!(env!("OUT_DIR"), "/filters.rs"));
}

/// Lines of `number name`, in no need of relocation, so that a signal handler may read it and it costs no memory until then.
const SYSCALLS: &str = include_str!("../../../resources/seccomp/x86_64/syscalls.txt");

/// The largest file of filters that is read, in bytes; ours together have a fiftieth.
const MAX_FILE_SIZE: u64 = 1 << 20;

/// What stands in a filter for the number of the process that it is put on, where it is compared with an argument. No
/// process has it: numbers end at 2^22.
const OWN_PROCESS: u32 = i32::MAX as u32;

/// A filter for every [`Role`].
pub struct Filters(Option<BpfMap>);

impl Filters {
    /// Those that this program comes with.
    pub fn built_in() -> Filters {
        Filters(None)
    }

    /// Reads filters from a file: JSON in seccompiler's form, one filter under the name of each [`Role`].
    ///
    /// # Errors
    /// A file that cannot be read, is larger than [`MAX_FILE_SIZE`], or does not hold these filters and no other.
    pub fn read(path: &Path) -> Result<Filters, Fault> {
        let read = read_bounded(path).map_err(|error| error.to_string()).and_then(|text| parse(&text));
        read.map_err(|why| Fault::bad_request(format!("--seccomp-filter {}: {why}", path.display())))
    }

    /// They are not those of a file.
    pub fn are_built_in(&self) -> bool {
        self.0.is_none()
    }

    /// Puts the filter on the calling thread, for ever. Sets `no_new_privs`.
    ///
    /// # Errors
    /// The kernel has no seccomp filters, or no memory.
    pub fn install(&self, role: Role) -> io::Result<()> {
        let program = of_process(self.program(role), std::process::id());
        seccompiler::apply_filter(&program).map_err(io::Error::other)
    }

    fn program(&self, role: Role) -> BpfProgramRef<'_> {
        let own: BpfProgramRef<'static> = match role {
            Role::Control => &built_in::CONTROL,
            Role::Api => &built_in::API,
            Role::Vcpu => &built_in::VCPU,
            Role::Io => &built_in::IO,
        };
        // `parse` has made sure that a file has them all.
        let custom = self.0.as_ref().and_then(|filters| filters.get(role.name()));
        custom.map_or(own, Vec::as_slice)
    }
}

/// The program with this number where it says [`OWN_PROCESS`].
fn of_process(program: BpfProgramRef<'_>, number: u32) -> BpfProgram {
    const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    let mut program = program.to_vec();
    for step in program.iter_mut().filter(|step| step.code == JUMP_IF_EQUAL && step.k == OWN_PROCESS) {
        step.k = number;
    }
    program
}

/// The name of a system call on x86_64. Safe to call in a signal handler.
pub fn syscall_name(number: u32) -> Option<&'static str> {
    SYSCALLS.lines().find_map(|line| {
        let (known, name) = line.split_once(' ')?;
        (known.parse() == Ok(number)).then_some(name)
    })
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_FILE_SIZE + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_FILE_SIZE {
        return Err(io::Error::other(format!("it is larger than {MAX_FILE_SIZE} bytes")));
    }
    Ok(text)
}

fn parse(text: &[u8]) -> Result<Filters, String> {
    let architecture = std::env::consts::ARCH.try_into().map_err(|error| format!("{error}"))?;
    let filters = seccompiler::compile_from_json(text, architecture).map_err(|error| error.to_string())?;
    if let Some(role) = Role::ALL.iter().find(|role| !filters.contains_key(role.name())) {
        return Err(format!(
            "it has no filter {:?}; it must have one for each kind of thread: {}",
            role.name(),
            names()
        ));
    }
    match filters.keys().find(|name| !Role::ALL.iter().any(|role| role.name() == name.as_str())) {
        Some(name) => Err(format!(
            "it has a filter {name:?}, and there is no such kind of thread; there are: {}",
            names()
        )),
        None => Ok(Filters(Some(filters))),
    }
}

fn names() -> String {
    Role::ALL.map(Role::name).join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str =
        r#"{"mismatch_action": "trap", "match_action": "allow", "filter": [{"syscall": "read"}]}"#;

    fn file_of(names: &[&str]) -> String {
        let filters: Vec<_> = names.iter().map(|name| format!("{name:?}: {ONE}")).collect();
        format!("{{{}}}", filters.join(", "))
    }

    fn refused(text: &str) -> String {
        let place = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(place.path(), text).unwrap();
        let error = Filters::read(place.path()).err().expect("an error").message;
        assert!(error.starts_with(&format!("--seccomp-filter {}: ", place.path().display())), "{error}");
        error
    }

    #[test]
    fn a_file_has_a_filter_for_each_kind_of_thread_and_nothing_else() {
        let all = ["control", "api", "vcpu", "io"];
        let filters = parse(file_of(&all).as_bytes()).unwrap();
        for role in Role::ALL {
            assert_eq!(filters.program(role), filters.program(Role::Io), "{role:?}");
            assert_ne!(filters.program(role), Filters::built_in().program(role), "{role:?}");
        }
        assert!(refused(&file_of(&all[..3])).contains("no filter \"io\""));
        assert!(refused(&file_of(&["control", "api", "vcpu", "io", "gpu"])).contains("\"gpu\""));
    }

    #[test]
    fn a_filter_knows_the_process_that_it_is_put_on() {
        let one = r#"{"mismatch_action": "allow", "match_action": {"errno": 99}, "filter": [{"syscall": "tgkill",
            "args": [{"index": 0, "type": "dword", "op": "eq", "val": 2147483647}]}]}"#;
        let filters = parse(file_of(&["control", "api", "vcpu", "io"]).replace(ONE, one).as_bytes()).unwrap();
        let ask = |process: u32| {
            // SAFETY: no signal is sent, and the call touches no memory.
            let asked = unsafe { libc::syscall(libc::SYS_tgkill, process, libc::gettid(), 0) };
            if asked < 0 { io::Error::last_os_error().raw_os_error() } else { None }
        };
        let own = std::process::id();
        std::thread::spawn(move || {
            assert_eq!((ask(own), ask(OWN_PROCESS)), (None, Some(libc::ESRCH)));
            filters.install(Role::Io).unwrap();
            assert_eq!((ask(own), ask(OWN_PROCESS)), (Some(99), Some(libc::ESRCH)));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn no_thread_may_signal_another_process() {
        let tgkill = libc::SYS_tgkill as u32;
        for role in Role::ALL {
            let (filters, number) = (Filters::built_in(), 0x1234_5678);
            let count = |program: &[seccompiler::sock_filter], value| {
                program.iter().filter(|step| step.k == value).count()
            };
            let (before, after) = (filters.program(role), of_process(filters.program(role), number));
            let rules = if role == Role::Control { 2 } else { 1 };
            // However many rules a call has, its number is asked for once.
            assert_eq!((count(before, tgkill), count(before, OWN_PROCESS)), (1, rules), "{role:?}");
            assert_eq!((count(&after, OWN_PROCESS), count(&after, number)), (0, rules), "{role:?}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_file_is_told() {
        assert!(refused("").contains("line 1"));
        assert!(refused(&file_of(&["control"]).replace("read", "raed")).contains("raed"));
        assert!(refused(&file_of(&["control"]).replace("syscall", "call")).contains("call"));
        assert!(refused(&" ".repeat(MAX_FILE_SIZE as usize + 1)).contains("larger than"));
        assert!(Filters::read(Path::new("/no/such/file")).err().unwrap().message.contains("No such file"));
    }

    #[test]
    fn names_are_those_of_the_kernel() {
        for (number, name) in [
            (libc::SYS_read, "read"),
            (libc::SYS_ioctl, "ioctl"),
            (libc::SYS_execve, "execve"),
            (libc::SYS_io_uring_setup, "io_uring_setup"),
            (libc::SYS_mseal, "mseal"),
        ] {
            assert_eq!(syscall_name(number as u32), Some(name));
        }
        for number in [400, u32::MAX, 0x4000_0000] {
            assert_eq!(syscall_name(number), None);
        }
    }

    /// The compiler has a table of its own, for kernels to 6.12.
    #[test]
    fn names_have_the_numbers_that_filters_go_by() {
        const NEWER: u32 = 462;
        let mut checked = 0;
        for (number, name) in SYSCALLS.lines().map(|line| line.split_once(' ').unwrap()) {
            let number: u32 = number.parse().unwrap();
            let filter = format!(r#"{{"x": {}}}"#, ONE.replace("read", name));
            if number < NEWER {
                let program =
                    seccompiler::compile_from_json(filter.as_bytes(), seccompiler::TargetArch::x86_64)
                        .unwrap();
                // BPF_JMP | BPF_JEQ | BPF_K
                assert!(
                    program["x"].iter().any(|step| step.code == 0x15 && step.k == number),
                    "{number} {name}"
                );
                checked += 1;
            }
        }
        assert!(checked > 350, "{checked}");
    }
}
