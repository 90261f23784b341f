//! `berth-agent`: what runs inside of a guest that has nothing of ours installed.
//!
//! The kernel starts it as `/berth/init`, out of the archive that was put behind the image's own initramfs. Process 1 goes on
//! as the image's init and leaves the agent behind, which answers the host over a socket until the guest ends:
//!
//! - [`init`]: process 1, for the moment that it is ours
//! - [`switch`]: the way to the root file system, for images without an initramfs
//! - [`root`]: which root is process 1's now
//! - [`serve`]: who calls is answered
//! - [`exec`]: a command, from its start to its end
//! - [`network`]: an address, where the image does not find one itself
//!
//! It installs nothing, watches nothing and asks nobody for anything. It sleeps until it is called.

mod changes;
mod command_line;
mod disks;
mod exec;
mod init;
mod kernel;
mod netlink;
mod network;
mod root;
mod serve;
mod shut_down;
mod switch;
mod users;
mod vsock;

use std::process::ExitCode;

fn main() -> ExitCode {
    let name = std::env::args_os().next().unwrap_or_default();
    if rustix::process::getpid().is_init() {
        init::run()
    } else if name == init::AGENT_NAME {
        serve::run()
    } else {
        eprintln!("berth-agent: this is the first process of a guest and of no use elsewhere");
        ExitCode::FAILURE
    }
}
