//! Resource limits of the process, which it keeps when it becomes the VMM.

use rustix::process::{Resource, Rlimit, setrlimit};

use crate::args::Limits;
use crate::error::{During, Result};

/// Sets hard and soft limits alike, so that the VMM cannot raise them.
///
/// # Errors
/// The kernel refuses `no-file` above its fs.nr_open.
pub fn apply(limits: &Limits) -> Result<()> {
    set(Resource::Nofile, limits.files, "no-file")?;
    if let Some(bytes) = limits.file_bytes {
        set(Resource::Fsize, bytes, "fsize")?;
    }
    // A core file holds the memory of the guest. No file is as small as one byte; and where cores go to a program by a
    // pipe, which heeds no limit and not 0 either, the kernel takes 1 for "no core" (fs/coredump.c).
    set(Resource::Core, 1, "core")
}

fn set(resource: Resource, value: u64, name: &str) -> Result<()> {
    setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })
        .during(|| format!("--resource-limit {name}={value} cannot be set; give less"))
}
