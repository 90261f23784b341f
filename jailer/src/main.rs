//! The life of a `berth-jailer` process: root, in the whole host, with all it inherited; then less and less of each; in
//! the end the VMM. Read it as a list of who we are. The reasons are in docs/jailer.md.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::process::ExitCode;

use jailer::args::{self, Args, Command, ExitCode as Code, Identity};
use jailer::cell::{self, Devices};
use jailer::claim::{Claim, PRIVATE, ROOT};
use jailer::dir::{Dir, Owner};
use jailer::error::{During, Result};
use jailer::family::{self, Voice};
use jailer::undo::Undo;
use jailer::vmm::{self, Launch, Times};
use jailer::{cgroup, handed, ids, inherited, limits, mounts, namespaces, remove};
use rustix::fs::Mode;

fn main() -> ExitCode {
    let mut times = Times::start();
    let argv: Vec<OsString> = std::env::args_os().collect();
    let identity = Identity::of(argv.first().unwrap_or(&OsString::new()));
    let args = match args::parse(argv) {
        Ok(Command::Confine(args)) => *args,
        Ok(Command::Remove(removal)) => {
            return match remove::remove(&removal) {
                Ok(()) => Code::Ok.into(),
                Err(error) => Voice::new(identity).last_word(&error),
            };
        }
        Ok(Command::Print(text)) => {
            print!("{text}");
            return Code::Ok.into();
        }
        Err(error) => {
            eprintln!("{}: {error}", identity.name());
            return identity.exit_code(Code::BadArguments).into();
        }
    };
    let (mut voice, mut undo) = (Voice::new(identity), Undo::default());
    let Err(mut error) = confine(&args, &mut times, &mut voice, &mut undo);
    if voice.is_callers() {
        error = undo.after(error);
    }
    voice.last_word(&error)
}

fn confine(args: &Args, times: &mut Times, voice: &mut Voice, undo: &mut Undo) -> Result<Infallible> {
    let Args { id, program_name, .. } = args;

    // We are root in the host, or with --rootless an ordinary user, and have whatever our caller had open. The environment
    // is still there; nothing reads it, and the exec leaves it behind.
    let numbers: Vec<_> = args.handed.iter().filter_map(args::Handed::number).collect();
    inherited::close_descriptors(&numbers)?;
    inherited::leave_keyring()?;
    if args.new_session {
        family::start_session()?;
    }
    let handed = handed::open(&args.handed)?;
    let user = ids::user(args)?;
    // Each file gets the mode that is said where it is made. The VMM has the caller's mask back.
    let umask = rustix::process::umask(Mode::empty());

    // We see the whole host. What the cell needs of it is opened now, and what can be refused is refused before anything
    // is made.
    if user.is_own {
        cell::check_kvm()?;
        if args.vhost_net {
            cell::check_vhost_net()?;
        }
        voice.note(&ids::weaknesses(args, &user));
    }
    let program = cell::open_program(&args.program)?;
    let network = args.netns.as_deref().map(namespaces::open_network).transpose()?;
    let groups = cgroup::plan(&args.cgroups)?;
    let null = args.daemonize.then(open_null).transpose()?;
    let processes = Dir::open(Path::new("/proc"))?;

    // The cell of this id is ours to make, and what we make is taken back if we fail.
    let claim = undo.claim.insert(Claim::stake(&args.base, program_name, id)?);
    if claim.has_cleaned {
        voice.note("a jailer was killed while it made this cell; what it left has been removed");
    }
    let owner = Owner { uid: rustix::process::geteuid(), gid: rustix::process::getegid(), mode: PRIVATE };
    claim.make_directories(owner, cgroup::to_be_made(&groups, id)?)?;
    let root = claim.directory(ROOT)?;
    mounts::check(&root, !user.is_own)?;
    cell::copy_program(program, &root, program_name)?;
    let devices = if user.is_own { Devices::Hosts } else { Devices::Own };
    let cell = cell::furnish(claim, devices, args.vhost_net, &user)?;

    // We are root in the host, in the VMM's network, in the VMM's control group.
    if let Some(network) = network {
        namespaces::enter_network(&network)?;
    }
    undo.ways_back = cgroup::ways_back(&groups);
    cgroup::enter(&groups, id)?;

    // We are root, or have root's rights where there is only us, and the cell is all there is.
    if user.is_own {
        ids::enter_user_namespace(&user)?;
    }
    namespaces::leave_host(id)?;
    mounts::enter(&root, &cell.to_mount)?;
    undo.is_in_cell = true;

    // We may be another process than the one that was started, which hears us until we are the VMM.
    if args.daemonize {
        family::daemonize(&processes, voice, times)?;
    }
    let open_up = |pid| {
        cell.write_pid(program_name, pid)?;
        cell.hand_over(&user)?;
        claim.release()
    };
    match args.new_pid_ns {
        true => family::enter_pid_namespace(&processes, voice, times, open_up)?,
        false => open_up(std::process::id())?,
    }

    // We are under the VMM's limits, which might have been too narrow for us; then the VMM's user; then the VMM.
    limits::apply(&args.limits)?;
    let launch = Launch { user: &user, umask, times, null: null.as_ref(), handed: &handed };
    Err(vmm::become_vmm(args, &launch))
}

fn open_null() -> Result<File> {
    let null = File::options().read(true).write(true).open("/dev/null");
    null.during(|| "--daemonize: cannot open /dev/null".into())
}
