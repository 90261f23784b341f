//! The life of a `berth-vmm` process: who we are, what we give up, what may end us and who hears of it, how we log, what
//! confines us, the guest, its API, the loop, the end.

#![no_main]

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::thread;

use api_socket::server::{Limits, Server};
use api_socket::{ActionType, Fault, Reply, Request};
use vmm::args::ExitCode as Code;
use vmm::args::{self, Api, Args, ArgsError, Command};
use vmm::control::{Call, Control, Sources};
use vmm::handed::Handed;
use vmm::logger;
use vmm::sandbox::{Role, Sandbox, process};
use vmm::signals::Requests;
use vmm::terminal::Input;
use vmm::vcpu::{Ending, EndingSender};
use vmm::vm::Vm;
use vmm::{exit_status, faults, heap, vcpu};
use vmm_sys_util::eventfd::EventFd;

/// Called by the C library. By way of Rust's own entry each thread would get a signal stack, for a report of stack overflows
/// that the handlers of [`faults`] have taken over: a fifth of all system calls before the guest runs. What else that entry
/// does, [`process::strip`] and [`faults::install`] do.
#[unsafe(no_mangle)]
pub extern "C" fn main() -> libc::c_int {
    // Not by returning, so that standard output is flushed.
    std::process::exit(run() as i32)
}

fn run() -> Code {
    heap::share();
    let args = match args::parse(std::env::args_os()) {
        Ok(Command::Run(args)) => *args,
        Ok(Command::Print(text)) => {
            print!("{text}");
            return Code::Ok;
        }
        Err(error) => return bad_arguments(&error),
    };
    let numbers: Vec<_> = args.fds.iter().map(|(_, number)| *number).collect();
    if let Err(error) = process::strip(&numbers) {
        faults::say(&format!("what was inherited cannot be given up: {error}"));
        return Code::Generic;
    }
    // Before anything is opened: from then on a number may be that of another file.
    let handed = match Handed::take(&args.fds) {
        Ok(handed) => handed,
        Err(error) => return bad_arguments(&error),
    };
    match live(args, handed) {
        Ok((code, ending)) => {
            exit_status::tell(code, &format!("the guest has ended: {ending}"));
            code
        }
        Err(Death { code, reason }) => {
            log::error!("{reason}");
            faults::say(&reason);
            exit_status::tell(code, &reason);
            code
        }
    }
}

const NO_SECCOMP: &str = "--no-seccomp: no system call of this process is filtered. Never do this with a guest you do not \
                          trust.";

/// Why there is no guest.
struct Death {
    code: Code,
    reason: String,
}

impl Death {
    fn host(what: &'static str) -> impl Fn(std::io::Error) -> Death {
        move |error| Death { code: Code::Generic, reason: format!("{what}: {error}") }
    }

    fn configuration(fault: Fault) -> Death {
        Death { code: Code::BadConfiguration, reason: fault.message }
    }
}

fn live(args: Args, handed: Handed) -> Result<(Code, Ending), Death> {
    faults::install().map_err(Death::host("signal handlers"))?;
    if let Some(path) = &args.exit_status {
        exit_status::open(path, &handed).map_err(Death::configuration)?;
    }
    logger::start(&args, &handed).map_err(Death::configuration)?;
    if args.no_seccomp {
        log::warn!("{NO_SECCOMP}");
        faults::say(NO_SECCOMP);
    }
    let sandbox = Arc::new(Sandbox::new(&args).map_err(Death::configuration)?);
    vcpu::install_kick_signal().map_err(Death::host("signal handlers"))?;
    let signals = Requests::new().map_err(Death::host("signal descriptor"))?;
    let listener =
        args.api.as_ref().and_then(|api| handed.find_listener("api-sock", &api.socket)).transpose();
    let listener = listener.map_err(Death::configuration)?;

    let wake = Arc::new(event("the control loop's event")?);
    let attention = event("the devices' event")?;
    let (call, calls) = channel();
    let (ending, endings) = channel();
    let endings_to = EndingSender { queue: ending, wake: wake.clone() };
    let for_devices = attention.try_clone().map_err(Death::host("the devices' event"))?;
    let mut vm =
        Vm::new(&args, handed, endings_to, for_devices, sandbox.clone()).map_err(Death::configuration)?;

    if let Some(file) = &args.metadata {
        let limit = args.mmds_limit;
        obey(&mut vm, api_socket::config_file::read_metadata(file, limit).map_err(Death::configuration)?)?;
    }
    if let Some(file) = &args.config_file {
        for request in api_socket::config_file::read(file).map_err(Death::configuration)? {
            obey(&mut vm, request)?;
        }
        // The start is the loop's first call: it confines this thread, which must have all that it needs by then.
        let _ = call.send(Call { request: Request::Action(ActionType::InstanceStart), reply: None });
        wake.write(1).map_err(Death::host("the control loop's event"))?;
    }
    if let Some(api) = &args.api {
        let server = listen(api, listener)?;
        serve(&args, server, call, wake.clone(), &mut vm, sandbox)?;
    }

    let input = Input::new().map_err(Death::host("standard input"))?;
    let sources = Sources { calls, endings, wake, signals, attention, input };
    let control = Control::new(vm, sources).map_err(Death::host("the control loop"))?;
    let ending = control.run().map_err(Death::host("the control loop"))?.map_err(Death::configuration)?;
    log::info!("The guest has ended: {ending}.");
    Ok((args.identity.exit_code(&ending), ending))
}

/// A request that must succeed: without a client there is nobody to mend it.
fn obey(vm: &mut Vm, request: Request) -> Result<(), Death> {
    match vm.handle(request) {
        Reply::Fault(fault) => Err(Death::configuration(fault)),
        _ => Ok(()),
    }
}

/// Opens the socket, if none was handed over, so that clients find it from here on.
fn listen(api: &Api, listener: Option<UnixListener>) -> Result<Server, Death> {
    let limits = Limits { max_body: api.max_payload, ..Limits::default() };
    match listener {
        Some(listener) => Server::from_listener(listener, limits).map_err(Death::host("--api-sock")),
        None => Server::bind(&api.socket, limits).map_err(|error| Death {
            code: Code::Generic,
            reason: format!(
                "--api-sock {}: the socket cannot be made: {error}; remove what is there, or name another path",
                api.socket.display()
            ),
        }),
    }
}

/// Answers clients on a thread of its own.
fn serve(
    args: &Args,
    server: Server,
    calls: Sender<Call>,
    wake: Arc<EventFd>,
    vm: &mut Vm,
    sandbox: Arc<Sandbox>,
) -> Result<(), Death> {
    vm.metrics().add_api(&server.counters());
    vm.metrics().started(&args.start);
    let answer = move |request| {
        let (reply, answer) = sync_channel(1);
        // The control thread lives as long as the process: a call that gets no reply dies with both.
        let sent = calls.send(Call { request, reply: Some(reply) }).is_ok() && wake.write(1).is_ok();
        let gone = Reply::Fault(Fault { status: 500, message: "the guest has ended".into() });
        if sent { answer.recv().unwrap_or(gone) } else { gone }
    };
    thread::Builder::new()
        .name(args.identity.api_thread().into())
        .spawn(move || {
            // The socket is there already: it needs no file.
            sandbox.shut(Role::Api);
            if let Err(error) = server.run(answer) {
                log::error!("The API server has stopped: {error}.");
            }
        })
        .map_err(Death::host("the API thread"))?;
    Ok(())
}

fn event(what: &'static str) -> Result<EventFd, Death> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Death::host(what))
}

fn bad_arguments(error: &ArgsError) -> Code {
    faults::say(&error.to_string());
    Code::BadArguments
}
