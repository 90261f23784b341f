//! The life of a `berth` process: read the command line, do the one thing, say why not if not.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::FromArgMatches;
use cli::args::{self, Cli, Command, ImageCommand};
use cli::commands::{console, copy, exec, guests, images, run, show, stats};
use cli::error::Result;
use cli::exit::Exit;
use cli::{daemon, doctor, output, packaging};

fn main() -> ExitCode {
    let matches = args::definition().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match matches {
        Ok(cli) => cli,
        // Help and version are asked for; everything else is a mistake, and told as all of ours are.
        Err(message) if message.use_stderr() => {
            let text = message.render().to_string();
            let text = text.strip_prefix("error: ").map(|text| format!("berth: {text}")).unwrap_or(text);
            let _ = io::stderr().write_all(text.as_bytes());
            return Exit::Usage.into();
        }
        Err(message) => {
            let _ = message.print();
            return Exit::Ok.into();
        }
    };
    match obey(&cli) {
        Ok(exit) => exit.into(),
        Err(error) => {
            output::tell(&error);
            error.exit.into()
        }
    }
}

fn obey(cli: &Cli) -> Result<Exit> {
    let daemon = &daemon::at(&cli.socket);
    match &cli.command {
        Command::Run(args) => run::run(daemon, args),
        Command::Create(args) => guests::create(daemon, args),
        Command::Start(args) => guests::start(daemon, args),
        Command::Stop(args) => guests::stop(daemon, args),
        Command::Restart(args) => guests::restart(daemon, args),
        Command::Rm(args) => guests::rm(daemon, args),
        Command::Ps(args) => show::ps(daemon, args),
        Command::Inspect(args) => show::inspect(daemon, args),
        Command::Logs(args) => show::logs(daemon, args),
        Command::Console(args) => console::run(daemon, args),
        Command::Exec(args) => exec::run(daemon, args),
        Command::Cp(args) => copy::run(daemon, args),
        Command::Pause(args) => guests::pause(daemon, args),
        Command::Resume(args) => guests::resume(daemon, args),
        Command::Set(args) => guests::set(daemon, args),
        Command::Stats(args) => stats::run(daemon, args),
        Command::Events(args) => show::events(daemon, args),
        Command::Image(image) => match &image.command {
            ImageCommand::Import(args) => images::import(daemon, args),
            ImageCommand::Ls(args) => images::ls(daemon, args),
            ImageCommand::Rm(args) => images::rm(daemon, args),
            ImageCommand::Inspect(args) => images::inspect(daemon, args),
        },
        Command::Snapshot(_) => show::later("snapshot"),
        Command::Restore(_) => show::later("restore"),
        Command::Fork(_) => show::later("fork"),
        Command::Doctor(args) => doctor::run(args, &cli.socket),
        Command::Completion(args) => output::print(&packaging::completion(args.shell)).map(|()| Exit::Ok),
        Command::Version(args) => show::version(daemon, args),
        Command::Man(args) => packaging::man_pages(&args.directory).map(|()| Exit::Ok),
    }
}
