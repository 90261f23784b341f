//! Attempts on more than the cell's share of the host: descriptors, file sizes, processes, memory, core dumps.

use std::fs::File;
use std::io;

use rustix::process::{Pid, Resource, Rlimit, Signal, WaitOptions, getrlimit, setrlimit};

use crate::aims::Aims;
use crate::call::call;
use crate::fork;

/// More than a cell in these tests may have, and less than a host has.
pub const FILES: usize = 256;
pub const FILE_BYTES: u64 = 16 << 20;
pub const PROCESSES: usize = 200;
pub const MEMORY_BYTES: usize = 256 << 20;

const PAGE: usize = 4096;

pub fn raise_limits(_: &Aims) -> io::Result<()> {
    let more = getrlimit(Resource::Nofile).maximum.unwrap_or(0) + 1;
    Ok(setrlimit(Resource::Nofile, Rlimit { current: Some(more), maximum: Some(more) })?)
}

pub fn many_files(_: &Aims) -> io::Result<()> {
    // What it may ask for, it does.
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most })?;
    let mut open = Vec::new();
    for _ in 0..FILES {
        open.push(rustix::io::dup(rustix::stdio::stdin())?);
    }
    Ok(())
}

pub fn big_file(_: &Aims) -> io::Result<()> {
    File::create("big")?.set_len(FILE_BYTES)
}

/// The kernel says of a process's end whether it left a core.
pub fn core(_: &Aims) -> io::Result<()> {
    let most = getrlimit(Resource::Core).maximum;
    setrlimit(Resource::Core, Rlimit { current: most, maximum: most })?;
    call(libc::SYS_prctl, &[libc::PR_SET_DUMPABLE as usize, 1])?;
    let Some(child) = fork()? else { std::process::abort() };
    let ended = rustix::process::waitpid(Some(child), WaitOptions::empty())?;
    match ended.is_some_and(|(_, status)| libc::WCOREDUMP(status.as_raw())) {
        true => Ok(()),
        false => Err(io::Error::from_raw_os_error(libc::EPERM)),
    }
}

pub fn fork_bomb(_: &Aims) -> io::Result<()> {
    let mut children = Vec::new();
    let result = (0..PROCESSES).try_for_each(|_| match fork() {
        Ok(Some(child)) => {
            children.push(child);
            Ok(())
        }
        Ok(None) => loop {
            _ = call(libc::SYS_pause, &[]);
        },
        Err(error) => Err(error),
    });
    for child in children {
        end(child);
    }
    result
}

fn end(child: Pid) {
    // Both fail only where it is gone.
    let _ = rustix::process::kill_process(child, Signal::KILL);
    let _ = rustix::process::waitpid(Some(child), WaitOptions::empty());
}

pub fn eat_memory(_: &Aims) -> io::Result<()> {
    let mut memory = vec![0_u8; MEMORY_BYTES];
    for page in memory.chunks_mut(PAGE) {
        page[0] = 1;
    }
    std::hint::black_box(memory);
    Ok(())
}
