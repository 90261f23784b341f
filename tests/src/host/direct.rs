//! The host that is this machine. Commands run through an agent all the same, so that their owner sees no difference.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::error::{Doing, Result};
use super::link::Link;
use super::rundir::RunDir;
use super::{Config, image, process};

/// It has nothing to wait for but its own start.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How long the agent takes to kill what it started, at most.
const END_LIMIT: Duration = Duration::from_secs(5);

/// A running agent on this machine. Dropping it kills everything started through it.
#[derive(Debug)]
pub struct Direct {
    agent: Child,
    link: Link,
    directory: RunDir,
}

impl Direct {
    pub fn start(config: &Config, directory: RunDir) -> Result<Self> {
        let starting = || format!("cannot start {}", config.agent.display());
        let provisions = &config.provisions;
        image::link_all(&provisions.build, &directory.join("build"))?;
        image::link_all(&provisions.assets, &directory.join("assets"))?;
        image::link_all(&provisions.guest_disks, &directory.join("assets"))?;
        let scratch = directory.join("scratch");
        std::fs::create_dir(&scratch).doing(|| format!("cannot make {}", scratch.display()))?;
        let (ours, theirs) = UnixStream::pair().doing(starting)?;
        let mut command = Command::new(&config.agent);
        command.arg("--socket").stdin(Stdio::from(OwnedFd::from(theirs)));
        // Not bound to this thread: the agent sees its owner's end by the socket, and has children to kill first.
        let agent = process::in_session(&mut command, false).spawn().doing(starting)?;
        drop(command);
        let link = Link::new(ours).doing(starting)?;
        link.ping(START_LIMIT).doing(starting)?;
        Ok(Self { agent, link, directory })
    }

    pub fn link(&self) -> &Link {
        &self.link
    }

    /// The directory that holds `build`, `assets` and `scratch`.
    pub fn directory(&self) -> &RunDir {
        &self.directory
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        self.link.close();
        let ended = process::wait_for(&mut self.agent, END_LIMIT);
        if !ended {
            process::kill(&mut self.agent);
        }
    }
}
