//! The console: what a client says of its ports becomes open terminals, pipes and files.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use api_socket::{
    ConsolePort, ConsoleUpdate, DEFAULT_CONSOLE_COLUMNS, DEFAULT_CONSOLE_ROWS, Fault, MAX_CONSOLE_PORT_NAME,
    MAX_CONSOLE_PORTS, RateLimiter,
};
use devices::virtio::console::Size;

use crate::config::network;
use crate::sink::Sink;

const _: () = assert!(MAX_CONSOLE_PORTS == devices::virtio::console::MAX_FURTHER_PORTS);

/// A virtio console and what it is connected to.
pub struct Console {
    pub settings: api_socket::Console,
    pub ends: Ends,
    /// Those of the settings' ports.
    pub ports: Vec<Ends>,
}

/// What a port of a console is connected to.
pub struct Ends {
    pub input: Option<File>,
    pub output: Sink,
}

/// Checks the settings and opens what they name.
///
/// # Errors
/// A port that the guest could not have, or what cannot be opened.
pub fn open(settings: &api_socket::Console) -> Result<Console, Fault> {
    check(&settings.ports)?;
    let ends = Ends::open(&settings.output_path, settings.input_path.as_deref())?;
    let ports = settings.ports.iter().map(|port| Ends::open(&port.output_path, port.input_path.as_deref()));
    Ok(Console { settings: settings.clone(), ends, ports: ports.collect::<Result<_, _>>()? })
}

/// The size of a port that is a terminal.
pub fn size(port: &ConsolePort) -> Option<Size> {
    port.is_console.then(|| Size {
        columns: port.columns.unwrap_or(DEFAULT_CONSOLE_COLUMNS),
        rows: port.rows.unwrap_or(DEFAULT_CONSOLE_ROWS),
    })
}

/// What becomes of a port of a running guest's console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// 0 is the console itself.
    pub port: usize,
    pub size: Option<Size>,
    pub limits: Option<RateLimiter>,
}

/// Takes down what changes of a port, and says what that is in all.
///
/// # Errors
/// There is no such port, or it has no size.
pub fn change(settings: &mut api_socket::Console, update: &ConsoleUpdate) -> Result<Change, Fault> {
    let is_resized = update.columns.is_some() || update.rows.is_some();
    let (port, before, limits): (usize, _, _) = match &update.port {
        None => {
            let size = Size { columns: settings.columns, rows: settings.rows };
            (0, Some(size), &mut settings.rate_limiter)
        }
        Some(name) => {
            let named = (1..).zip(&mut settings.ports).find(|(_, port)| port.name == *name);
            let (number, port) = named.ok_or_else(|| {
                Fault::bad_request(format!(
                    "`port` is {name:?}, and this guest's console has no such port; GET /vm/config lists them."
                ))
            })?;
            (number, size(port), &mut port.rate_limiter)
        }
    };
    if is_resized && before.is_none() {
        let name = update.port.as_deref().unwrap_or_default();
        return Err(Fault::bad_request(format!(
            "`port` is {name:?}, which is no terminal and has no size; PUT /console with `is_console` makes one."
        )));
    }
    *limits = network::changed(*limits, update.rate_limiter);
    let limits = update.rate_limiter.and(*limits);
    let size = before.filter(|_| is_resized).map(|before| Size {
        columns: update.columns.unwrap_or(before.columns),
        rows: update.rows.unwrap_or(before.rows),
    });
    if let Some(Size { columns, rows }) = size {
        match port.checked_sub(1).and_then(|at| settings.ports.get_mut(at)) {
            Some(port) => (port.columns, port.rows) = (Some(columns), Some(rows)),
            None => (settings.columns, settings.rows) = (columns, rows),
        }
    }
    Ok(Change { port, size, limits })
}

impl Ends {
    fn open(output_path: &Path, input_path: Option<&Path>) -> Result<Ends, Fault> {
        let output = Sink::open(output_path).map_err(|error| {
            Fault::bad_request(format!(
                "`output_path` is {}, which cannot be written: {error}. Give a terminal, a named pipe or a file in a \
                 directory that exists.",
                output_path.display()
            ))
        })?;
        Ok(Ends { input: input_path.map(open_input).transpose()?, output })
    }
}

fn check(ports: &[ConsolePort]) -> Result<(), Fault> {
    if ports.len() > MAX_CONSOLE_PORTS {
        return Err(Fault::bad_request(format!(
            "`ports` has {} members; a console has at most {MAX_CONSOLE_PORTS} ports beside itself.",
            ports.len()
        )));
    }
    let mut names = BTreeSet::new();
    for port in ports {
        let name = &port.name;
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        // The guest makes a path of it.
        let is_path = name == "." || name == "..";
        if name.is_empty() || name.len() > MAX_CONSOLE_PORT_NAME || !name.bytes().all(legal) || is_path {
            return Err(Fault::bad_request(format!(
                "`name` is {name:?}; that of a port must be 1 to {MAX_CONSOLE_PORT_NAME} letters, digits, dots, hyphens \
                 and underscores."
            )));
        }
        if !names.insert(name) {
            return Err(Fault::bad_request(format!(
                "`name` is {name:?} twice in `ports`; give each port a name of its own."
            )));
        }
        if !port.is_console && (port.columns.is_some() || port.rows.is_some()) {
            return Err(Fault::bad_request(format!(
                "`columns` or `rows` is set for {name:?}, which is no terminal; leave them out, or set `is_console`."
            )));
        }
    }
    Ok(())
}

/// Opens what a console reads from: bytes that come when somebody types them, which an ordinary file has not.
fn open_input(path: &Path) -> Result<File, Fault> {
    let mut options = OpenOptions::new();
    // Writable too, so that a named pipe does not end with its first writer.
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let opened = options.open(path).and_then(|file| Ok((file.metadata()?.file_type(), file)));
    let problem = match opened {
        Ok((kind, file)) if kind.is_fifo() || kind.is_char_device() => return Ok(file),
        Ok(_) => "which nobody can type at".to_string(),
        Err(error) => format!("which cannot be opened: {error}"),
    };
    let path = path.display();
    Err(Fault::bad_request(format!("`input_path` is {path}, {problem}. Give a terminal or a named pipe.")))
}
