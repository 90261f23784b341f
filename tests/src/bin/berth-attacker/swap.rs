//! An attacker beside the jailer: a process of the cell's user that lets a name in the cell's directory be now a
//! directory, now a link to something precious, as fast as it can.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags};

use crate::aims::Aims;

/// Never ends by itself. Errors are its daily bread: the name is being taken away from it.
pub fn run(aims: &Aims) -> io::Result<()> {
    let root = Path::new(aims.text("root")?);
    let victim = Path::new(aims.text("victim")?);
    let name = root.join(aims.text("name")?);
    println!("ready");
    loop {
        let _ = round(&name, victim);
    }
}

fn round(name: &Path, victim: &Path) -> io::Result<()> {
    if let Some(parent) = name.parent() {
        let _ = fs::create_dir(parent);
    }
    let aside = name.with_extension("aside");
    let _ = symlink(victim, &aside);
    // Without a moment in which there is nothing.
    let _ = fs::rename(&aside, name);
    let _ = fs::remove_file(name);
    let _ = fs::hard_link(victim, name).and_then(|()| fs::remove_file(name));
    fs::create_dir(name)?;
    // Who has a directory open may think that it is still his.
    let kept = File::open(name)?;
    for planted in ["kvm", "net", "urandom"] {
        let _ = rustix::fs::symlinkat(victim, &kept, planted);
        let _ = rustix::fs::openat(&kept, planted, OFlags::WRONLY | OFlags::NOFOLLOW, Mode::empty());
        let _ = rustix::fs::unlinkat(&kept, planted, AtFlags::empty());
    }
    fs::remove_dir(name)
}
