//! Files into a guest and out of it, as an archive on the way.
//!
//! A guest is not trusted with where things come to lie here: what it sends is unpacked into a directory of its own, and from
//! there one entry with the name that was asked for is moved to its place.

mod watch;

use std::ffi::OsString;
use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, BufReader, BufWriter, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use agent::client;
use agent::files::{self, FilesError, Owners};
use agent::protocol::Kind;
use api_socket::fleet::Client;

use crate::args::value::{Name, Place};
use crate::args::{Copy, Cp};
use crate::error::{During, Error, Result};
use crate::exit::Exit;
use crate::output::{self, progress::Progress};
use crate::reach::{self, told};
use crate::signals::{Signals, Work};
use watch::Watch;

/// What is moved at a time.
const CHUNK: usize = 64 << 10;
/// The most directories in directories that are merged with what is there.
const MAX_DEPTH: usize = 256;
/// The mode by which an owner may do everything with a directory.
const OWNERS: u32 = 0o700;
/// Why nothing is copied to a device or a pipe, on either side.
const OTHER: &str = "it is neither a file nor a directory, and is not written over";

/// # Errors
/// The sides are no copy, the guest or this host refuses, or the connection breaks.
pub fn run(daemon: &Client, args: &Cp) -> Result<Exit> {
    match args.sides().map_err(|why| Error::new("cp", why).exit(Exit::Usage))? {
        Copy::Out { name, path, to } => out(daemon, &name, &path, &to),
        Copy::In { from, name, path } => into(daemon, &from, &name, &path),
    }
}

fn ready(daemon: &Client, guest: &Name) -> Result<UnixStream> {
    reach::ready(daemon, guest.as_str(), false)
}

fn out(daemon: &Client, guest: &Name, path: &str, to: &Place) -> Result<Exit> {
    let about = format!("{guest}:{path}");
    let Place::Local(to) = to else { return stream_out(daemon, guest, path, &about) };
    let (directory, name) =
        place(to, Path::new(path)).map_err(|why| Error::new(to.display().to_string(), why))?;
    let target = directory.join(&name);
    may_replace(&target).map_err(|why| Error::new(target.display().to_string(), why))?;
    let stream = ready(daemon, guest)?;
    let sent_as =
        name.to_str().ok_or_else(|| Error::new(to.display().to_string(), "its name must be UTF-8"))?;
    client::pack(&mut &stream, path, Some(sent_as)).map_err(|error| told(&about, &error))?;

    // From here on there is something to clear away.
    let signals = Signals::take().during(|| "signals".into())?;
    let staging = Staging::make(&directory)?;
    let (aside, from) = (staging.0.clone(), stream.try_clone().during(|| about.clone())?);
    let label = about.clone();
    let unpacking = Work::begin(move || {
        let progress = Progress::bytes(&label, None);
        let from = progress.reader(BufReader::with_capacity(CHUNK, from));
        files::unpack(from, &aside, Owners::Own)
    });
    let missing = match unpacking.wait(&signals) {
        Ok(Ok(())) => None,
        // The guest has sent all but that.
        Ok(Err(FilesError::Broken(why))) => Some(why),
        Ok(Err(error)) => return Err(Error::new(about, error)),
        Err((signal, unpacking)) => {
            // What it would still write would be left here.
            let _ = stream.shutdown(Shutdown::Both);
            let _ = unpacking.wait(&signals);
            return Ok(Exit::signal(signal));
        }
    };
    let came = staging.0.join(&name);
    if missing.is_none() || fs::symlink_metadata(&came).is_ok() {
        put(&came, &target, MAX_DEPTH).during(|| target.display().to_string())?;
    }
    missing.map_or(Ok(Exit::Ok), |why| Err(Error::new(about, why)))
}

/// A file that takes the place of a device or a pipe is not what is meant by its name, nor by that of a link to it.
fn may_replace(target: &Path) -> std::result::Result<(), &'static str> {
    let is_other = |found: io::Result<fs::Metadata>| {
        found.is_ok_and(|found| !found.is_file() && !found.is_dir() && !found.is_symlink())
    };
    match is_other(fs::symlink_metadata(target)) || is_other(fs::metadata(target)) {
        true => Err(OTHER),
        false => Ok(()),
    }
}

/// The directory that something comes into, and its name there.
fn place(to: &Path, from: &Path) -> std::result::Result<(PathBuf, OsString), String> {
    let name = files::name_of(from);
    if to.is_dir() {
        return Ok((to.to_path_buf(), name));
    }
    if to.as_os_str().as_bytes().ends_with(b"/") {
        return Err("there is no such directory; make it, or leave out the slash at its end".into());
    }
    let parent = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    match to.file_name() {
        Some(name) if parent.is_dir() => Ok((parent.to_path_buf(), name.to_os_string())),
        _ => Err(format!("there is no directory {}", parent.display())),
    }
}

/// A directory beside the place where things will be, which nobody else looks into and which goes away.
struct Staging(PathBuf);

impl Staging {
    fn make(directory: &Path) -> Result<Staging> {
        let path = directory.join(format!(".berth-cp-{}", std::process::id()));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .during(|| format!("cannot write in {}", directory.display()))?;
        Ok(Staging(path))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if fs::remove_dir_all(&self.0).is_err() {
            open_all(&self.0);
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

/// Lets the owner do everything in a directory and those in it, as far as they are the owner's.
fn open_all(directory: &Path) {
    let mut left = vec![directory.to_path_buf()];
    while let Some(directory) = left.pop() {
        let _ = fs::set_permissions(&directory, Permissions::from_mode(OWNERS));
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        let is_dir = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
        left.extend(entries.filter(is_dir).map(|entry| entry.path()));
    }
}

/// Moves what was unpacked to its place: over a file that is there, and into a directory that is there. No link that is there
/// is followed.
fn put(from: &Path, to: &Path, depth: usize) -> io::Result<()> {
    let is_dir = |path: &Path| fs::symlink_metadata(path).is_ok_and(|found| found.is_dir());
    if !is_dir(to) {
        may_replace(to).map_err(|why| io::Error::other(format!("{}: {why}", to.display())))?;
    }
    if !is_dir(from) {
        return fs::rename(from, to);
    }
    // A directory that may not be written is neither moved nor moved out of, but for root.
    let mode = fs::symlink_metadata(from)?.permissions();
    fs::set_permissions(from, Permissions::from_mode(mode.mode() | OWNERS))?;
    if !is_dir(to) {
        fs::rename(from, to)?;
        return fs::set_permissions(to, mode);
    }
    let Some(depth) = depth.checked_sub(1) else {
        return Err(io::Error::other("directories are too deep in each other to be merged"));
    };
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        put(&entry.path(), &to.join(entry.file_name()), depth)?;
    }
    Ok(())
}

/// The archive itself, for whoever reads it.
fn stream_out(daemon: &Client, guest: &Name, path: &str, about: &str) -> Result<Exit> {
    if io::stdout().is_terminal() {
        return Err(Error::new(about, "an archive is nothing for a terminal").remedy("send it on: … | tar t"));
    }
    let mut stream = ready(daemon, guest)?;
    client::pack(&mut stream, path, None).map_err(|error| told(about, &error))?;
    let mut chunk = vec![0; CHUNK];
    let mut watch = Watch::default();
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => {
                let bytes = chunk.get(..count).unwrap_or_default();
                watch.see(bytes);
                if !output::is_read(bytes)? {
                    return Ok(Exit::signal(libc::SIGPIPE));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::new(about, error)),
        }
    }
    match watch.verdict() {
        Ok(()) => Ok(Exit::Ok),
        Err(why) => Err(Error::new(about, why)),
    }
}

fn into(daemon: &Client, from: &Place, guest: &Name, path: &str) -> Result<Exit> {
    let about = format!("{guest}:{path}");
    let refused = |error: &client::ClientError| told(&about, error);
    let source = match from {
        Place::Local(from) => Some(
            fs::symlink_metadata(from)
                .map(|found| (from.clone(), found.is_file().then_some(found.len())))
                .during(|| format!("cannot read {}", from.display()))?,
        ),
        _ => None,
    };
    let (directory, name) = match &source {
        // It says itself what is in it.
        None => (path.to_string(), OsString::new()),
        Some((from, _)) => {
            let found = client::look(&mut &ready(daemon, guest)?, path).map_err(|error| refused(&error))?;
            inside(path, found.kind, from).map_err(|why| Error::new(&about, why))?
        }
    };
    let stream = ready(daemon, guest)?;
    client::unpack(&mut &stream, &directory).map_err(|error| refused(&error))?;
    let progress = Progress::bytes(&about, source.as_ref().and_then(|(_, length)| *length));
    let mut to = Counted { to: &stream, progress };
    let sent = match source {
        Some((from, _)) => {
            let packed =
                files::pack(&from, Path::new(&name), Owners::Own, BufWriter::with_capacity(CHUNK, &mut to));
            packed.map_err(Unsent::from)
        }
        None => io::copy(&mut io::stdin().lock(), &mut to).map(drop).map_err(|_| Unsent::Connection),
    };
    drop(to);
    let _ = stream.shutdown(Shutdown::Write);
    let unpacked = client::unpacked(&mut &stream);
    // What could not be read here is said first; of a connection that ended, the guest knows why.
    if let Err(Unsent::Here(why)) = &sent {
        return Err(Error::new("cp", why));
    }
    unpacked.map_err(|error| refused(&error))?;
    match sent {
        Ok(()) => Ok(Exit::Ok),
        Err(_) => Err(Error::new(&about, "the connection ended early")),
    }
}

enum Unsent {
    Here(String),
    Connection,
}

impl From<FilesError> for Unsent {
    fn from(error: FilesError) -> Unsent {
        match error {
            FilesError::Connection(_) => Unsent::Connection,
            error => Unsent::Here(error.to_string()),
        }
    }
}

/// Counts what is written through it.
struct Counted<'a> {
    to: &'a UnixStream,
    progress: Progress,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.to.write(bytes)?;
        self.progress.advance(count as u64);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// The directory of the guest that something comes into, and its name there.
fn inside(path: &str, kind: Kind, from: &Path) -> std::result::Result<(String, OsString), String> {
    match kind {
        Kind::Directory => {
            // `.` and the like have a name of their own.
            let own = from.file_name().map(OsString::from);
            let name = own.unwrap_or_else(|| {
                fs::canonicalize(from).map_or("root".into(), |path| files::name_of(&path))
            });
            Ok((path.to_string(), name))
        }
        Kind::Nothing | Kind::File if !path.ends_with('/') => {
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
            let parent = if parent.is_empty() { "/" } else { parent };
            Ok((parent.to_string(), name.into()))
        }
        Kind::Nothing | Kind::File => {
            Err("there is no such directory; make it, or leave out the slash at its end".into())
        }
        Kind::Other => Err(OTHER.into()),
    }
}

#[cfg(test)]
mod tests;
