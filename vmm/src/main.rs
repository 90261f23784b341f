//! The life of a `berth-vmm` process: who we are, how we log, what may end us, the guest, its API, the loop, the end.

use std::process::ExitCode;
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
use vmm::signals::Requests;
use vmm::terminal::Input;
use vmm::vcpu::EndingSender;
use vmm::vm::Vm;
use vmm::{heap, signals, terminal, vcpu};
use vmm_sys_util::eventfd::EventFd;

fn main() -> ExitCode {
    heap::share();
    let args = match args::parse(std::env::args_os()) {
        Ok(Command::Run(args)) => *args,
        Ok(Command::Print(text)) => {
            print!("{text}");
            return Code::Ok.into();
        }
        Err(error) => return bad_arguments(&error),
    };
    // Before anything is opened: from then on a number may be that of another file.
    let handed = match Handed::take(&args.fds) {
        Ok(handed) => handed,
        Err(error) => return bad_arguments(&error),
    };
    match live(args, handed) {
        Ok(code) => code.into(),
        Err(Death { code, reason }) => {
            log::error!("{reason}");
            eprintln!("berth-vmm: {reason}");
            code.into()
        }
    }
}

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

fn live(args: Args, handed: Handed) -> Result<Code, Death> {
    logger::start(&args).map_err(Death::configuration)?;
    if args.no_seccomp {
        log::warn!(
            "--no-seccomp: no system call of this process is filtered. Never do this with a guest you do not trust."
        );
    } else {
        log::warn!("This version has no seccomp filters: run it where its guest may do what its user may.");
    }
    restore_terminal_at_panic();
    signals::install_fatal_handlers().map_err(Death::host("signal handlers"))?;
    vcpu::install_kick_signal().map_err(Death::host("signal handlers"))?;
    let signals = Requests::new().map_err(Death::host("signal descriptor"))?;

    let wake = Arc::new(event("the control loop's event")?);
    let room = event("the serial port's event")?;
    let (call, calls) = channel();
    let (ending, endings) = channel();
    let endings_to = EndingSender { queue: ending, wake: wake.clone() };
    let serial_room = room.try_clone().map_err(Death::host("the serial port's event"))?;
    let mut vm = Vm::new(&args, handed, endings_to, serial_room).map_err(Death::configuration)?;

    if let Some(file) = &args.config_file {
        for request in api_socket::config_file::read(file).map_err(Death::configuration)? {
            obey(&mut vm, request)?;
        }
        obey(&mut vm, Request::Action(ActionType::InstanceStart))?;
    }
    if let Some(api) = &args.api {
        serve(&args, api, call, wake.clone(), &mut vm)?;
    }

    let input = Input::new().map_err(Death::host("standard input"))?;
    let sources = Sources { calls, endings, wake, signals, room, input };
    let control = Control::new(vm, sources).map_err(Death::host("the control loop"))?;
    let ending = control.run().map_err(Death::host("the control loop"))?;
    log::info!("The guest has ended: {ending}.");
    Ok(args.identity.exit_code(&ending))
}

/// A panic aborts, so nothing is dropped.
fn restore_terminal_at_panic() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        terminal::restore();
        usual(panic);
    }));
}

/// A request that must succeed: without a client there is nobody to mend it.
fn obey(vm: &mut Vm, request: Request) -> Result<(), Death> {
    match vm.handle(request) {
        Reply::Fault(fault) => Err(Death::configuration(fault)),
        _ => Ok(()),
    }
}

/// Opens the socket, so that clients find it from here on, and answers them on a thread of its own.
fn serve(args: &Args, api: &Api, calls: Sender<Call>, wake: Arc<EventFd>, vm: &mut Vm) -> Result<(), Death> {
    let limits = Limits { max_body: api.max_payload, ..Limits::default() };
    let server = Server::bind(&api.socket, limits).map_err(|error| Death {
        code: Code::Generic,
        reason: format!(
            "--api-sock {}: the socket cannot be made: {error}; remove what is there, or name another path",
            api.socket.display()
        ),
    })?;
    vm.metrics().add_api(&server.counters());
    vm.metrics().started(&args.start);
    let answer = move |request| {
        let (reply, answer) = sync_channel(1);
        // The control thread lives as long as the process: a call that gets no reply dies with both.
        let sent = calls.send(Call { request, reply }).is_ok() && wake.write(1).is_ok();
        let gone = Reply::Fault(Fault { status: 500, message: "the guest has ended".into() });
        if sent { answer.recv().unwrap_or(gone) } else { gone }
    };
    thread::Builder::new()
        .name(args.identity.api_thread().into())
        .spawn(move || {
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

fn bad_arguments(error: &ArgsError) -> ExitCode {
    eprintln!("berth-vmm: {error}");
    Code::BadArguments.into()
}
