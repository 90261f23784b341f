//! The life of a `berth-jailer` process: root, in the whole host, with all it inherited; then less and less of each; in
//! the end the VMM. Read it as a list of who we are. The reasons are in docs/jailer.md.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

use jailer::args::{self, Args, Command, ExitCode as Code, Identity};
use jailer::error::{During, Result};
use jailer::process::{self, Times, Voice};
use jailer::{cell, cgroup, ids, limits, mounts};
use rustix::fs::Mode;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

fn main() -> ExitCode {
    let mut times = Times::start();
    let argv: Vec<OsString> = std::env::args_os().collect();
    let identity = Identity::of(argv.first().unwrap_or(&OsString::new()));
    let args = match args::parse(argv) {
        Ok(Command::Confine(args)) => *args,
        Ok(Command::Print(text)) => {
            print!("{text}");
            return Code::Ok.into();
        }
        Err(error) => {
            eprintln!("{}: {error}", identity.name());
            return identity.exit_code(Code::BadArguments).into();
        }
    };
    let mut voice = Voice::new(identity);
    let Err(error) = confine(&args, &mut times, &mut voice);
    voice.last_word(&error)
}

fn confine(args: &Args, times: &mut Times, voice: &mut Voice) -> Result<Infallible> {
    let Args { uid, gid, program_name, .. } = args;

    // We are root in the host, and have whatever our caller had open. The environment is still there; nothing reads it,
    // and the exec leaves it behind.
    process::close_inherited()?;
    process::leave_keyring()?;
    ids::require_root()?;
    // Each file gets the mode that is said where it is made. The VMM has the caller's mask back.
    let umask = rustix::process::umask(Mode::empty());

    // We see the whole host. What the cell needs of it is opened now, and what can be refused is refused before anything
    // is made.
    let program = cell::open_program(&args.program)?;
    let network = args.netns.as_deref().map(open_network).transpose()?;
    let groups = cgroup::plan(&args.cgroups)?;
    let null = args.daemonize.then(open_null).transpose()?;
    let userfaultfd = cell::userfaultfd();
    let root = cell::make_root(&args.base, program_name, &args.id)?;
    cell::copy_program(program, &root, program_name)?;

    // We are root in the host, in the VMM's network, under the VMM's limits, in the VMM's control group.
    if let Some(network) = network {
        move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
            .during(|| "--netns: cannot enter the network namespace".into())?;
    }
    limits::apply(&args.limits)?;
    cgroup::enter(&groups, &args.id)?;

    // We are root, and the cell is all there is.
    let root = mounts::enter(root)?;
    let cell = cell::furnish(root, userfaultfd, *uid, *gid)?;

    // We may be another process than the one that was started.
    if args.daemonize {
        process::daemonize(voice, times)?;
    }
    let open_up = |pid| {
        cell.write_pid(program_name, pid)?;
        cell.hand_over(*uid, *gid)
    };
    match args.new_pid_ns {
        true => process::enter_pid_namespace(voice, times, open_up)?,
        false => open_up(std::process::id())?,
    }

    // We are the VMM's user, with no capability and no way to one.
    rustix::process::umask(umask);
    ids::become_user(*uid, *gid)?;

    // We are the VMM.
    Err(process::become_vmm(args, times, null.as_ref()))
}

fn open_network(path: &Path) -> Result<File> {
    File::open(path).during(|| format!("--netns {} cannot be opened", path.display()))
}

fn open_null() -> Result<File> {
    let null = File::options().read(true).write(true).open("/dev/null");
    null.during(|| "--daemonize: cannot open /dev/null".into())
}
