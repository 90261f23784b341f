//! The command line: every command, its flags and what the help says of them, once. Completion, man pages and docs/cli.md
//! are made from this.
//!
//! Pure: nothing is opened, and no rule of berthd's is repeated here.

pub mod value;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use api_socket::fleet::client::SOCKET;

use crate::exit;
use value::{DetachKeys, Disk, Memory, Name, Place, Variable};

/// The environment variable that names another place.
pub const SOCKET_VARIABLE: &str = "BERTH_SOCKET";
/// What leaves a console or a terminal: Ctrl-], as in telnet.
const DETACH_KEYS: &str = "ctrl-]";

const N: &str = "A guest's name, or the beginning of its id";

/// Run guests, each in a virtual machine of its own.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "berth",
    version,
    propagate_version = false,
    after_help = "\
Examples:
  berth doctor                        can guests run on this host?
  berth run debian                    a shell in a new guest
  berth run --detach --name web debian
  berth exec web -- uname -r
  berth ps

`berth COMMAND --help` says more of each."
)]
pub struct Cli {
    /// Where berthd listens
    #[arg(long, global = true, value_name = "PATH", env = SOCKET_VARIABLE, hide_env_values = true,
          default_value = SOCKET, help_heading = "For every command")]
    pub socket: PathBuf,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    Run(Run),
    Create(Create),
    Start(Start),
    Stop(Stop),
    Restart(Restart),
    Rm(Rm),
    Ps(Ps),
    Inspect(Inspect),
    Logs(Logs),
    Console(Console),
    Exec(Exec),
    Cp(Cp),
    Pause(Pause),
    Resume(Resume),
    Set(Set),
    Stats(Stats),
    Events(Events),
    Image(Image),
    Snapshot(Later),
    Restore(Later),
    Fork(Later),
    Doctor(Doctor),
    Completion(Completion),
    Version(Version),
    #[command(hide = true)]
    Man(Man),
}

/// What a new guest gets.
#[derive(Clone, Debug, Args)]
pub struct Guest {
    /// The guest's name, which is its host name too; one is made up if not given
    #[arg(long, value_name = "NAME")]
    pub name: Option<Name>,
    /// How many processors it has
    #[arg(long, value_name = "N")]
    pub cpus: Option<u8>,
    /// How much memory it has, such as 512M or 2G
    #[arg(short, long, value_name = "SIZE")]
    pub memory: Option<Memory>,
    /// How much memory it can be given while it runs (berth set --memory); no more than --memory if not given
    #[arg(long, value_name = "SIZE")]
    pub max_memory: Option<Memory>,
    /// Give it an empty disk, which it finds as /dev/disk/by-id/virtio-NAME; may be repeated
    #[arg(long, value_name = "NAME=SIZE")]
    pub disk: Vec<Disk>,
    /// What its kernel is told beside the image's command line
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Give it no network
    #[arg(long)]
    pub no_network: bool,
    /// When berthd starts it again after it has ended by itself
    #[arg(long, value_name = "WHEN")]
    pub restart: Option<RestartPolicy>,
    #[command(flatten)]
    pub limits: Limits,
}

/// What the host gives a guest at most, or before others.
#[derive(Clone, Debug, Default, Args)]
pub struct Limits {
    /// Limit its time of processors, in percent of one: 150 is one and a half
    #[arg(long, value_name = "PERCENT")]
    pub cpu_limit: Option<u32>,
    /// Its share of processors that others want too: 1 to 10000, 100 if not given
    #[arg(long, value_name = "WEIGHT")]
    pub cpu_weight: Option<u32>,
    /// Its share of disks that others want too, where bfq or io.cost.qos is enabled: 1 to 10000, 100 if not given
    #[arg(long, value_name = "WEIGHT")]
    pub io_weight: Option<u32>,
}

/// When a guest that ended is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RestartPolicy {
    /// Never
    No,
    /// When it did not end by its own wish
    OnFailure,
    /// Also when it did, and when the host was rebooted
    Always,
}

/// What a command in a guest gets.
#[derive(Clone, Debug, Args)]
pub struct Inside {
    /// Set a variable for the command: NAME=VALUE, or NAME with the value that it has here; may be repeated
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<Variable>,
    /// The directory that the command starts in; the user's own if not given
    #[arg(short = 'w', long, value_name = "DIR")]
    pub directory: Option<String>,
    /// The user who runs the command; root if not given
    #[arg(short, long, value_name = "USER")]
    pub user: Option<String>,
    /// Give the command a terminal; without this or -T, it has one if standard input and output are terminals
    #[arg(short, long, overrides_with = "no_tty")]
    pub tty: bool,
    /// Give the command no terminal
    #[arg(short = 'T', long)]
    pub no_tty: bool,
    /// Pass standard input on to the command, which is done in any case but with --no-stdin
    #[arg(short, long, overrides_with = "no_stdin")]
    pub interactive: bool,
    /// Give the command no standard input, so that a script keeps its own
    #[arg(long)]
    pub no_stdin: bool,
    /// The keys that leave a terminal: ctrl-X or a character, with commas between; or none
    #[arg(long, value_name = "KEYS", default_value = DETACH_KEYS)]
    pub detach_keys: DetachKeys,
}

/// Create a guest from an image, start it, and run a command in it.
///
/// Without a command this is the user's shell in the guest. When the command ends, the guest is stopped, and berth ends with
/// the command's exit code; with --rm nothing is left of the guest. The keys of --detach-keys leave the guest running; the
/// command that is left ends.
///
/// With --detach the guest's id is printed as soon as it runs. A command is then started in it with the console for its
/// output (berth logs), and the guest lives on when it ends.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth run debian                              a shell; the guest is stopped when it ends
  berth run --rm debian -- uname -a             one command, and nothing is left
  berth run --detach --name web --memory 1G debian
  echo hello | berth run --rm debian -- cat")]
pub struct Run {
    #[command(flatten)]
    pub guest: Guest,
    /// Leave the guest running in the background, and print its id
    #[arg(short, long)]
    pub detach: bool,
    /// Remove the guest with its disk when it has ended
    #[arg(long)]
    pub rm: bool,
    #[command(flatten)]
    pub inside: Inside,
    /// The image that the guest starts from (berth image ls)
    #[arg(value_name = "IMAGE")]
    pub image: Name,
    /// What to run in the guest
    #[arg(value_name = "COMMAND", trailing_var_arg = true)]
    pub command: Vec<String>,
}

/// Create a guest from an image without starting it, and print its id.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth create --name web --cpus 2 --memory 1G debian
  berth start web")]
pub struct Create {
    #[command(flatten)]
    pub guest: Guest,
    /// The image that the guest starts from (berth image ls)
    #[arg(value_name = "IMAGE")]
    pub image: Name,
}

/// Start guests that are not running.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth start web db")]
pub struct Start {
    #[arg(value_name = "N", required = true, help = N)]
    pub guests: Vec<Name>,
}

/// How long a guest may take to stop.
#[derive(Clone, Debug, Args)]
pub struct Grace {
    /// Seconds that the guest has to shut down before it is ended by force; 30 if not given, 0 is at once
    #[arg(long, value_name = "S")]
    pub time: Option<u32>,
}

/// Stop guests: ask each to shut down, and end it by force when its time is over.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth stop web
  berth stop --time 60 db
  berth stop --time 0 stuck")]
pub struct Stop {
    #[command(flatten)]
    pub grace: Grace,
    #[arg(value_name = "N", required = true, help = N)]
    pub guests: Vec<Name>,
}

/// Stop guests as stop does, and start them again.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth restart web")]
pub struct Restart {
    #[command(flatten)]
    pub grace: Grace,
    #[arg(value_name = "N", required = true, help = N)]
    pub guests: Vec<Name>,
}

/// Remove guests with their disks.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth rm web
  berth rm --force web        ends it first, if it is running")]
pub struct Rm {
    /// End a guest that is running, at once and by force
    #[arg(short, long)]
    pub force: bool,
    #[arg(value_name = "N", required = true, help = N)]
    pub guests: Vec<Name>,
}

/// List guests.
#[derive(Clone, Debug, Args)]
#[command(
    visible_alias = "ls",
    after_help = "\
Examples:
  berth ps
  berth ps --all
  berth ps --json | jq -r '.[].name'
  berth stop $(berth ps --quiet)"
)]
pub struct Ps {
    /// Those that are not running too
    #[arg(short, long)]
    pub all: bool,
    /// Their ids and nothing else
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// For programs
    #[arg(long)]
    pub json: bool,
}

/// Show all that is known of guests, as JSON: an object of each.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth inspect web
  berth inspect web | jq -r .state")]
pub struct Inspect {
    #[arg(value_name = "N", required = true, help = N)]
    pub guests: Vec<Name>,
}

/// Show what a guest has written to its console.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth logs web
  berth logs --follow web
  berth logs --tail 20 web
  berth logs --vmm web        what the virtual machine monitor says instead")]
pub struct Logs {
    /// Go on showing what comes, until the guest ends
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "LINES")]
    pub tail: Option<usize>,
    /// The log of its virtual machine monitor in place of the console
    #[arg(long)]
    pub vmm: bool,
    #[arg(value_name = "N", help = N)]
    pub guest: Name,
}

/// Use a guest's serial console.
///
/// On a terminal every key goes to the guest but those that leave.
#[derive(Clone, Debug, Args)]
#[command(
    visible_alias = "attach",
    after_help = "\
Examples:
  berth console web                             Ctrl-] leaves
  berth console --detach-keys ctrl-p,ctrl-q web"
)]
pub struct Console {
    /// The keys that leave: ctrl-X or a character, with commas between; or none
    #[arg(long, value_name = "KEYS", default_value = DETACH_KEYS)]
    pub detach_keys: DetachKeys,
    #[arg(value_name = "N", help = N)]
    pub guest: Name,
}

/// Run a command in a guest that is running.
///
/// Its output is ours and so is its exit code; signals that we get go to it. At the second INT, TERM or HUP we do not wait
/// for it any longer. It ends when we are gone.
///
/// The image needs nothing for this. One with an sshd is reached by ssh as well, at the address that inspect shows, for what is
/// not done here: sessions of a login manager, forwarding.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth exec web -- uname -r
  berth exec web -- bash
  berth exec --user www-data --directory /srv web -- ls
  berth exec web -- sh -c 'echo $HOSTNAME'
  tar c site | berth exec web -- tar x -C /srv")]
pub struct Exec {
    #[command(flatten)]
    pub inside: Inside,
    #[arg(value_name = "N", help = N)]
    pub guest: Name,
    /// What to run in the guest
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true)]
    pub command: Vec<String>,
}

/// Copy files and directories into a guest and out of it.
///
/// N:PATH is a path in a guest and begins with a slash; - is a tar archive on standard input or output. What is copied to a
/// directory that exists goes into it.
///
/// Files that come into a guest are root's there, with the modes that they have here; those of an archive have the owners that
/// it names, by number. Files that come out are the user's, with no more rights for others than a new file would have. Links
/// are copied as links, holes as zeros, and devices, pipes and sockets not at all. A file that cannot be read is told, and the
/// rest is copied; one that is gone meanwhile is passed over. For files with holes, extended attributes, hard links, or much
/// that changes little there is rsync, with an image that has an sshd.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth cp web:/etc/hosts .
  berth cp site web:/srv
  berth cp web:/var/log - | tar t
  tar c . | berth cp - web:/tmp
  berth cp ./a:b web:/tmp     a file here with a colon in its name")]
pub struct Cp {
    #[arg(value_name = "FROM", help = "What to copy: PATH, N:PATH or -", allow_hyphen_values = true)]
    pub from: OsString,
    #[arg(value_name = "TO", help = "Where to: PATH, N:PATH or -", allow_hyphen_values = true)]
    pub to: OsString,
}

/// Stop the time of guests: they keep their memory and do nothing.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth pause web")]
pub struct Pause {
    #[arg(value_name = "N", required = true, help = N)]
    pub guests: Vec<Name>,
}

/// Let paused guests go on.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth resume web")]
pub struct Resume {
    #[arg(value_name = "N", required = true, help = N)]
    pub guests: Vec<Name>,
}

/// Change a guest: at once what can be changed while it runs, the rest from its next start on.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth set --memory 256M web           while it runs; up to what run --max-memory allows
  berth set --cpu-limit 50 web          half a processor, at once
  berth set --cpu-limit 0 web           without that limit again
  berth set --add-disk data=10G web     while it runs: /dev/disk/by-id/virtio-data
  berth set --remove-disk data web      unmount it first; all that is on it is deleted
  berth set --restart always web")]
#[group(id = "change", required = true, multiple = true,
        args = ["cpus", "memory", "max_memory", "add_disk", "remove_disk", "restart",
                "cpu_limit", "cpu_weight", "io_weight"])]
pub struct Set {
    /// How many processors it has, from its next start on
    #[arg(long, value_name = "N")]
    pub cpus: Option<u8>,
    /// How much memory it has; while it runs, no more than --max-memory
    #[arg(short, long, value_name = "SIZE")]
    pub memory: Option<Memory>,
    /// How much memory it can be given while it runs, from its next start on
    #[arg(long, value_name = "SIZE")]
    pub max_memory: Option<Memory>,
    /// Give it an empty disk, at once; may be repeated
    #[arg(long, value_name = "NAME=SIZE")]
    pub add_disk: Vec<Disk>,
    /// Take a disk from it, at once, and delete it with all that is on it; may be repeated
    #[arg(long, value_name = "NAME")]
    pub remove_disk: Vec<String>,
    /// When berthd starts it again after it has ended by itself
    #[arg(long, value_name = "WHEN")]
    pub restart: Option<RestartPolicy>,
    #[command(flatten)]
    pub limits: Limits,
    #[arg(value_name = "N", help = N)]
    pub guest: Name,
}

/// Show what guests use: a table that is renewed every second, or once where standard output is no terminal.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth stats                 Ctrl-C leaves
  berth stats --no-stream web
  berth stats --json          counters since the guests' start")]
pub struct Stats {
    /// Once
    #[arg(long)]
    pub no_stream: bool,
    /// For programs, once
    #[arg(long)]
    pub json: bool,
    #[arg(
        value_name = "N",
        help = "A guest's name, or the beginning of its id; all that run if none is given"
    )]
    pub guests: Vec<Name>,
}

/// Show what happens to guests as it happens.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth events
  berth events --json | jq -r .what")]
pub struct Events {
    /// For programs, an object on each line
    #[arg(long)]
    pub json: bool,
}

/// What guests start from.
#[derive(Clone, Debug, Args)]
#[command(visible_alias = "images")]
pub struct Image {
    #[command(subcommand)]
    pub command: ImageCommand,
}

#[derive(Clone, Debug, Subcommand)]
pub enum ImageCommand {
    Import(Import),
    Ls(ImageLs),
    Rm(ImageRm),
    Inspect(ImageInspect),
}

/// Make an image of a kernel and a disk.
///
/// The files are copied; changes to them later do not reach the image.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth image import --name debian --kernel vmlinuz --initrd initrd.img disk.ext4
  berth image import --name tiny --kernel vmlinux --cmdline 'root=/dev/vda ro quiet' tiny.img")]
pub struct Import {
    /// The image's name
    #[arg(long, value_name = "NAME")]
    pub name: Name,
    /// A Linux kernel: bzImage or ELF
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// The initial RAM disk that goes with it
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line; console=ttyS0 root=/dev/vda rw panic=1 if not given
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// The disk: a raw image
    #[arg(value_name = "DISK")]
    pub disk: PathBuf,
}

/// List images.
#[derive(Clone, Debug, Args)]
#[command(
    visible_alias = "list",
    after_help = "\
Examples:
  berth image ls
  berth image ls --json"
)]
pub struct ImageLs {
    /// Their names and nothing else
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// For programs
    #[arg(long)]
    pub json: bool,
}

/// Remove images that no guest starts from.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth image rm debian")]
pub struct ImageRm {
    #[arg(value_name = "IMAGE", required = true, help = "An image's name")]
    pub images: Vec<Name>,
}

/// Show all that is known of images, as JSON: an object of each.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth image inspect debian")]
pub struct ImageInspect {
    #[arg(value_name = "IMAGE", required = true, help = "An image's name")]
    pub images: Vec<Name>,
}

/// Not there yet: it comes with a later version.
#[derive(Clone, Debug, Args)]
pub struct Later {
    #[arg(value_name = "ARGUMENT", hide = true, allow_hyphen_values = true, trailing_var_arg = true)]
    pub arguments: Vec<OsString>,
}

/// Find out whether guests can run on this host.
///
/// Tries what Berth needs, and says what each missing thing costs and what mends it. Ends with 0 when guests can run, as far as
/// it was tried, and with 1 when they cannot. Root can try everything.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  berth doctor
  berth doctor --json | jq -r '.checks[] | select(.verdict != \"ok\") | .name'")]
pub struct Doctor {
    /// For programs
    #[arg(long)]
    pub json: bool,
}

/// Print what makes a shell complete the commands, flags and values of berth.
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  source <(berth completion bash)
  berth completion zsh > ~/.zfunc/_berth
  berth completion fish > ~/.config/fish/completions/berth.fish")]
pub struct Completion {
    #[arg(value_name = "SHELL", help = "The shell")]
    pub shell: Shell,
}

/// Print the version.
#[derive(Clone, Debug, Args)]
pub struct Version {
    /// For programs
    #[arg(long)]
    pub json: bool,
}

/// Write the man pages, for packages.
#[derive(Clone, Debug, Args)]
pub struct Man {
    #[arg(value_name = "DIR", help = "The directory to write them to, which must exist", action = ArgAction::Set)]
    pub directory: PathBuf,
}

/// What is copied where: one side is in a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Copy {
    In { from: Place, name: Name, path: String },
    Out { name: Name, path: String, to: Place },
}

impl Cp {
    /// # Errors
    /// A side is nothing that there can be, or not exactly one is in a guest.
    pub fn sides(&self) -> Result<Copy, String> {
        match (Place::parse(&self.from)?, Place::parse(&self.to)?) {
            (Place::Guest { .. }, Place::Guest { .. }) => {
                Err("both sides are in guests; copy by way of this host: berth cp A:/x - | berth cp - B:/"
                    .into())
            }
            (Place::Guest { name, path }, to) => Ok(Copy::Out { name, path, to }),
            (from, Place::Guest { name, path }) => Ok(Copy::In { from, name, path }),
            _ => Err("no side is in a guest; one of them is N:PATH, with N the guest's name".into()),
        }
    }
}

/// All commands, as completion, man pages and docs/cli.md see them.
pub fn definition() -> clap::Command {
    let table: Vec<_> = exit::TABLE.iter().map(|(code, meaning)| format!("  {code:<10}{meaning}")).collect();
    let command = Cli::command();
    let more = format!(
        "{}\n\nExit codes:\n{}",
        command.get_after_help().cloned().unwrap_or_default(),
        table.join("\n")
    );
    command.after_long_help(more)
}

#[cfg(test)]
mod tests;
