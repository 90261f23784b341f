//! The attacker: a program that the tests put in the VMM's place, to try from inside of a cell what must not be possible.
//!
//! Each attempt is a real attack that succeeds where nothing is in its way, and runs in a process of its own. What became
//! of it is the program's report, one line for each and a last one, in the file `report=` or on standard output; see
//! [`berth_tests::attack`]. Nothing here is destructive where it succeeds: what would be is asked for in a form that the
//! kernel finds legal and does nothing for.
//!
//!     berth-attacker [flags of a VMM] attack [KEY=VALUE]... [ATTEMPT]...   all attempts if none is named
//!     berth-attacker cage without=LAYER,... [KEY=VALUE]... [ATTEMPT]...    in a cell of its own making, see `cage.rs`
//!     berth-attacker neighbour [KEY=VALUE]...                              be attacked
//!     berth-attacker swap root=DIR name=NAME victim=PATH                   be in the way of a jailer
//!     berth-attacker blast seconds=N                                       be a guest that gives its VMM work
//!     berth-attacker let-go                                                be a guest that lets go of what it still uses
//!     berth-attacker with-key PROGRAM [ARGUMENT]...                        run with a key in the session's keyring
//!     berth-attacker handle FILE                                           print what open-by-handle needs

mod aims;
mod blast;
mod cage;
mod call;
mod files;
mod kernel;
mod neighbours;
mod shares;
mod swap;
mod uring;

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode, ExitStatus};

use berth_tests::attack::{ATTEMPTS, END, Outcome};
use rustix::process::{Pid, WaitOptions, waitpid};

use aims::Aims;

/// What a process ends with whose attempt failed without an error number.
const NO_ERRNO: i32 = 255;

type Attack = fn(&Aims) -> io::Result<()>;

const ATTACKS: [(&str, Attack); ATTEMPTS.len()] = [
    ("read-host-file", files::read_host_file),
    ("climb", files::climb),
    ("read-secret", files::read_secret),
    ("read-neighbour", files::read_neighbour),
    ("read-stranger", files::read_stranger),
    ("proc-root", files::proc_root),
    ("leaked-directory", files::leaked_directory),
    ("open-descriptors", files::open_descriptors),
    ("chroot-escape", files::chroot_escape),
    ("open-by-handle", files::open_by_handle),
    ("make-device", files::make_device),
    ("open-disk", files::open_disk),
    ("chmod-program", files::chmod_program),
    ("write-program", files::write_program),
    ("setuid-program", files::setuid_program),
    ("capability-program", files::capability_program),
    ("uring-read-host-file", uring::read_host_file),
    ("mount", kernel::mount),
    ("fsopen", kernel::fsopen),
    ("open-tree", kernel::open_tree),
    ("umount", kernel::umount),
    ("user-namespace", kernel::user_namespace),
    ("mount-namespace", kernel::mount_namespace),
    ("network-namespace", kernel::network_namespace),
    ("leaked-namespace", kernel::leaked_namespace),
    ("signal-neighbour", neighbours::signal_neighbour),
    ("signal-root", neighbours::signal_root),
    ("signal-everyone", neighbours::signal_everyone),
    ("trace-neighbour", neighbours::trace_neighbour),
    ("read-memory", neighbours::read_memory),
    ("take-descriptor", neighbours::take_descriptor),
    ("shared-memory", neighbours::shared_memory),
    ("message-queue", neighbours::message_queue),
    ("callers-key", neighbours::callers_key),
    ("callers-environment", neighbours::callers_environment),
    ("type-for-caller", neighbours::type_for_caller),
    ("priority", neighbours::priority),
    ("realtime", neighbours::realtime),
    ("abstract-socket", neighbours::abstract_socket),
    ("host-port", neighbours::host_port),
    ("socket-file", neighbours::socket_file),
    ("raw-socket", neighbours::raw_socket),
    ("packet-socket", neighbours::packet_socket),
    ("make-tap", neighbours::make_tap),
    ("bpf", kernel::bpf),
    ("perf", kernel::perf),
    ("userfaultfd", kernel::userfaultfd),
    ("load-module", kernel::load_module),
    ("kexec", kernel::kexec),
    ("set-clock", kernel::set_clock),
    ("set-host-name", kernel::set_host_name),
    ("swapoff", kernel::swapoff),
    ("kernel-log", kernel::kernel_log),
    ("io-port", kernel::io_port),
    ("raise-limits", shares::raise_limits),
    ("many-files", shares::many_files),
    ("big-file", shares::big_file),
    ("core", shares::core),
    ("fork-bomb", shares::fork_bomb),
    ("eat-memory", shares::eat_memory),
];

fn main() -> ExitCode {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    // What a jailer tells its VMM comes first.
    if words.first().is_some_and(|word| word.starts_with("--"))
        && let Some(at) = words.iter().position(|word| word == "attack")
    {
        words.drain(..at);
    }
    let mut words = words.into_iter();
    let command = words.next().unwrap_or_default();
    match run(&command, words.collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("berth-attacker: {command}: {error}");
            ExitCode::from(error.raw_os_error().unwrap_or(NO_ERRNO) as u8)
        }
    }
}

fn run(command: &str, words: Vec<String>) -> io::Result<()> {
    match command {
        "attack" => {
            let (aims, names) = Aims::take(words);
            attack(&aims, &names)
        }
        "cage" => {
            let (aims, names) = Aims::take(words);
            cage::enter(&aims)?;
            attack(&aims, &names)
        }
        "neighbour" => neighbours::be_neighbour(&Aims::take(words).0),
        "blast" => blast::run(&Aims::take(words).0),
        "let-go" => blast::let_go(),
        "swap" => swap::run(&Aims::take(words).0),
        "with-key" => {
            neighbours::get_key()?;
            let (program, arguments) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
            Err(Command::new(program).args(arguments).exec())
        }
        "handle" => {
            println!("{}", files::handle(words.first().ok_or(io::ErrorKind::InvalidInput)?)?);
            Ok(())
        }
        "am-root" => files::am_root(),
        "am-leaking" => files::am_leaking(),
        "am-capable" => files::am_capable(),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Tries what is named, or everything, each in a process of its own.
fn attack(aims: &Aims, names: &[String]) -> io::Result<()> {
    let mut report: Box<dyn Write> = match aims.given("report") {
        Some(path) => Box::new(File::create(path)?),
        None => Box::new(io::stdout()),
    };
    let is_wanted = |name: &str| names.is_empty() || names.iter().any(|wanted| wanted == name);
    for (name, attack) in ATTACKS.into_iter().filter(|(name, _)| is_wanted(name)) {
        let Some(child) = fork()? else {
            let code = match attack(aims) {
                Ok(()) => 0,
                Err(error) => error.raw_os_error().unwrap_or(NO_ERRNO),
            };
            std::process::exit(code)
        };
        writeln!(report, "{}", outcome(child)?.line(name))?;
    }
    writeln!(report, "{END}")
}

fn outcome(child: Pid) -> io::Result<Outcome> {
    let ended = waitpid(Some(child), WaitOptions::empty())?.ok_or(io::ErrorKind::NotFound)?;
    let status = ExitStatus::from_raw(ended.1.as_raw());
    Ok(match (status.code(), status.signal()) {
        (Some(0), _) => Outcome::Reached,
        (Some(errno), _) => Outcome::Refused(errno),
        (None, signal) => Outcome::Killed(signal.unwrap_or_default()),
    })
}

/// The child in the parent, nothing in the child.
fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: a child of a process with several threads may do little. This process has one thread.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(Pid::from_raw(pid)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_an_attack_for_each_attempt_in_its_order() {
        assert_eq!(ATTACKS.map(|(name, _)| name), ATTEMPTS.map(|attempt| attempt.name));
    }
}
