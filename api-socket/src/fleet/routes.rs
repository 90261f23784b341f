//! (method, target, body) to a [`Request`], and a [`Request`] to what a client sends.
//!
//! Pure: no I/O and no state. Whether there is such a guest and who may ask is not decided here.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::types::{
    DISK_MIB, Disk, GuestUpdate, Limits, MAX_COMMAND_LINE, MAX_CPUS, MAX_DISKS, MAX_STOP_SECONDS, MEMORY_MIB,
    NewGuest, NewImage, Stop, check_disk_name, check_name,
};
use crate::json;
use crate::types::Fault;

/// The longest time that [`Request::Vsock`] waits for a listener, in seconds.
pub const MAX_WAIT_SECONDS: u32 = 600;
/// The highest share of processors that can be asked for, in percent of one.
const MAX_CPU_PERCENT: u32 = 100 * MAX_CPUS as u32;
/// What the kernel takes as a weight.
const WEIGHTS: std::ops::RangeInclusive<u32> = 1..=10_000;

/// What can be asked of the daemon. A guest is named by its name, its id, or the beginning of an id that no other has.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    GetVersion,
    ListGuests,
    CreateGuest(NewGuest),
    GetGuest(String),
    UpdateGuest(String, GuestUpdate),
    /// With `force` a guest that runs is ended first.
    RemoveGuest {
        guest: String,
        force: bool,
    },
    StartGuest(String),
    StopGuest(String, Stop),
    PauseGuest(String),
    ResumeGuest(String),
    GuestStats(String),
    AllStats,
    /// What the guest has written to its console, or the VMM to its log: text, with `follow` also what comes.
    Logs {
        guest: String,
        of: Log,
        follow: bool,
    },
    /// The connection becomes the guest's serial console.
    Console(String),
    /// The connection becomes one to this vsock port of the guest. Until something listens there it waits.
    Vsock {
        guest: String,
        port: u32,
        wait_seconds: u32,
    },
    /// A line of JSON for each event from now on.
    Events,
    /// For Prometheus.
    Metrics,
    ListImages,
    GetImage(String),
    /// The body is the file.
    PutPart(String, Part),
    PutImage(String, NewImage),
    RemoveImage(String),
}

/// Which log of a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Log {
    #[default]
    Console,
    Vmm,
}

impl Log {
    /// As in a query.
    pub fn as_str(self) -> &'static str {
        match self {
            Log::Console => "console",
            Log::Vmm => "vmm",
        }
    }
}

/// A file of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    Kernel,
    Initrd,
    Disk,
}

impl Part {
    /// All of them.
    pub const ALL: [Part; 3] = [Part::Kernel, Part::Initrd, Part::Disk];

    /// As in a path, and the name of the file.
    pub fn as_str(self) -> &'static str {
        match self {
            Part::Kernel => "kernel",
            Part::Initrd => "initrd",
            Part::Disk => "disk",
        }
    }
}

/// How the body of a request is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// Whole, before [`route`].
    Json,
    /// By whoever handles the request; [`route`] gets an empty one.
    Stream,
}

/// Of the request with this method and target.
pub fn body_of(method: &str, target: &str) -> Body {
    let (path, _) = split(target);
    match (method, path.as_slice()) {
        ("PUT", ["images", _, "parts", _]) => Body::Stream,
        _ => Body::Json,
    }
}

/// Parses one request. An empty `body` is a request without one.
///
/// # Errors
/// 404 for a route that is not there, 400 for values that no guest or image can have.
pub fn route(method: &str, target: &str, body: &[u8]) -> Result<Request, Fault> {
    let (path, query) = split(target);
    let mut query = Query(query);
    let request = match (method, path.as_slice()) {
        ("GET", ["version"]) => Request::GetVersion,
        ("GET", ["guests"]) => Request::ListGuests,
        ("POST", ["guests"]) => Request::CreateGuest(checked_guest(parse(body)?)?),
        ("GET", ["guests", guest]) => Request::GetGuest(named(guest)?),
        ("PATCH", ["guests", guest]) => Request::UpdateGuest(named(guest)?, checked_update(parse(body)?)?),
        ("DELETE", ["guests", guest]) => {
            Request::RemoveGuest { guest: named(guest)?, force: query.flag("force")? }
        }
        ("POST", ["guests", guest, "start"]) => Request::StartGuest(named(guest)?),
        ("POST", ["guests", guest, "stop"]) => Request::StopGuest(named(guest)?, checked_stop(body)?),
        ("POST", ["guests", guest, "pause"]) => Request::PauseGuest(named(guest)?),
        ("POST", ["guests", guest, "resume"]) => Request::ResumeGuest(named(guest)?),
        ("GET", ["guests", guest, "stats"]) => Request::GuestStats(named(guest)?),
        ("GET", ["stats"]) => Request::AllStats,
        ("GET", ["guests", guest, "logs"]) => {
            let of = match query.take("of") {
                None | Some("console") => Log::Console,
                Some("vmm") => Log::Vmm,
                Some(other) => return refuse(format!("`of` is {other:?}; give console or vmm.")),
            };
            Request::Logs { guest: named(guest)?, of, follow: query.flag("follow")? }
        }
        ("GET", ["guests", guest, "console"]) => Request::Console(named(guest)?),
        ("GET", ["guests", guest, "vsock", port]) => {
            let port = number("the port", port, 0..=u32::MAX - 1)?;
            let wait_seconds = match query.take("wait") {
                Some(text) => number("`wait`", text, 0..=MAX_WAIT_SECONDS)?,
                None => 0,
            };
            Request::Vsock { guest: named(guest)?, port, wait_seconds }
        }
        ("GET", ["events"]) => Request::Events,
        ("GET", ["metrics"]) => Request::Metrics,
        ("GET", ["images"]) => Request::ListImages,
        ("GET", ["images", image]) => Request::GetImage(image_name(image)?),
        ("PUT", ["images", image, "parts", part]) => {
            let Some(part) = Part::ALL.into_iter().find(|known| known.as_str() == *part) else {
                return refuse(format!("{part:?} is no part of an image; give kernel, initrd or disk."));
            };
            Request::PutPart(image_name(image)?, part)
        }
        ("PUT", ["images", image]) => Request::PutImage(image_name(image)?, checked_image(body)?),
        ("DELETE", ["images", image]) => Request::RemoveImage(image_name(image)?),
        _ => {
            let message =
                format!("There is no {method} on {target:?}; docs/fleet-api.md lists what there is.");
            return Err(Fault { status: 404, message });
        }
    };
    query.end()?;
    Ok(request)
}

/// The method, target and body that [`route`] reads as this request.
///
/// # Errors
/// Those of writing JSON.
pub fn encode(request: &Request) -> serde_json::Result<(&'static str, String, Option<String>)> {
    let bare = |method, target: String| Ok((method, target, None));
    match request {
        Request::GetVersion => bare("GET", "/version".into()),
        Request::ListGuests => bare("GET", "/guests".into()),
        Request::CreateGuest(guest) => with_body("POST", "/guests".into(), guest),
        Request::GetGuest(guest) => bare("GET", format!("/guests/{guest}")),
        Request::UpdateGuest(guest, update) => with_body("PATCH", format!("/guests/{guest}"), update),
        Request::RemoveGuest { guest, force } => bare("DELETE", format!("/guests/{guest}?force={force}")),
        Request::StartGuest(guest) => bare("POST", format!("/guests/{guest}/start")),
        Request::StopGuest(guest, stop) => with_body("POST", format!("/guests/{guest}/stop"), stop),
        Request::PauseGuest(guest) => bare("POST", format!("/guests/{guest}/pause")),
        Request::ResumeGuest(guest) => bare("POST", format!("/guests/{guest}/resume")),
        Request::GuestStats(guest) => bare("GET", format!("/guests/{guest}/stats")),
        Request::AllStats => bare("GET", "/stats".into()),
        Request::Logs { guest, of, follow } => {
            bare("GET", format!("/guests/{guest}/logs?of={}&follow={follow}", of.as_str()))
        }
        Request::Console(guest) => bare("GET", format!("/guests/{guest}/console")),
        Request::Vsock { guest, port, wait_seconds } => {
            bare("GET", format!("/guests/{guest}/vsock/{port}?wait={wait_seconds}"))
        }
        Request::Events => bare("GET", "/events".into()),
        Request::Metrics => bare("GET", "/metrics".into()),
        Request::ListImages => bare("GET", "/images".into()),
        Request::GetImage(image) => bare("GET", format!("/images/{image}")),
        Request::PutPart(image, part) => bare("PUT", format!("/images/{image}/parts/{}", part.as_str())),
        Request::PutImage(image, new) => with_body("PUT", format!("/images/{image}"), new),
        Request::RemoveImage(image) => bare("DELETE", format!("/images/{image}")),
    }
}

fn with_body(
    method: &'static str,
    target: String,
    body: &impl Serialize,
) -> serde_json::Result<(&'static str, String, Option<String>)> {
    Ok((method, target, Some(serde_json::to_string(body)?)))
}

/// The segments of a path, and the fields of a query.
fn split(target: &str) -> (Vec<&str>, Vec<(&str, &str)>) {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let segments = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let fields = query.split('&').filter(|field| !field.is_empty());
    (segments, fields.map(|field| field.split_once('=').unwrap_or((field, "true"))).collect())
}

struct Query<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Query<'a> {
    fn take(&mut self, name: &str) -> Option<&'a str> {
        let at = self.0.iter().position(|(field, _)| *field == name)?;
        Some(self.0.remove(at).1)
    }

    fn flag(&mut self, name: &str) -> Result<bool, Fault> {
        match self.take(name) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(other) => refuse(format!("`{name}` is {other:?}; give true or false.")),
        }
    }

    fn end(self) -> Result<(), Fault> {
        match self.0.first() {
            None => Ok(()),
            Some((name, _)) => refuse(format!("`{name}` in the query is not known here, or is there twice.")),
        }
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    json::parse(body)
        .map_err(|what| Fault::bad_request(format!("The body is not what is wanted here: {what}.")))
}

/// A name, an id or the beginning of one: what can be none of these is no guest's.
fn named(guest: &str) -> Result<String, Fault> {
    check_name(guest)
        .map_err(|why| Fault { status: 404, message: format!("There is no such guest: {why}.") })?;
    Ok(guest.to_owned())
}

fn image_name(image: &str) -> Result<String, Fault> {
    check_name(image).map_err(|why| Fault::bad_request(format!("The image's name {why}.")))?;
    Ok(image.to_owned())
}

fn checked_guest(guest: NewGuest) -> Result<NewGuest, Fault> {
    if let Some(name) = &guest.name {
        check_name(name).map_err(|why| Fault::bad_request(format!("`name`: {why}.")))?;
    }
    check_name(&guest.image).map_err(|why| Fault::bad_request(format!("`image`: {why}.")))?;
    in_range("cpus", u32::from(guest.cpus), 1..=u32::from(MAX_CPUS))?;
    in_range("memory_mib", guest.memory_mib, MEMORY_MIB)?;
    if let Some(most) = guest.max_memory_mib {
        in_range("max_memory_mib", most, MEMORY_MIB)?;
    }
    check_disks("disks", &guest.disks)?;
    check_command_line(guest.command_line.as_deref())?;
    check_limits(&guest.limits)?;
    Ok(guest)
}

fn checked_update(update: GuestUpdate) -> Result<GuestUpdate, Fault> {
    if let Some(cpus) = update.cpus {
        in_range("cpus", u32::from(cpus), 1..=u32::from(MAX_CPUS))?;
    }
    if let Some(memory) = update.memory_mib {
        in_range("memory_mib", memory, MEMORY_MIB)?;
    }
    if let Some(most) = update.max_memory_mib {
        in_range("max_memory_mib", most, MEMORY_MIB)?;
    }
    check_disks("add_disks", &update.add_disks)?;
    if update.remove_disks.len() > MAX_DISKS {
        let many = update.remove_disks.len();
        return refuse(format!("`remove_disks` names {many} disks; a guest has at most {MAX_DISKS}."));
    }
    update.limits.iter().try_for_each(check_limits)?;
    Ok(update)
}

fn check_disks(field: &str, disks: &[Disk]) -> Result<(), Fault> {
    if disks.len() > MAX_DISKS {
        return refuse(format!("`{field}` has {} disks; at most {MAX_DISKS} can be given.", disks.len()));
    }
    for (at, disk) in disks.iter().enumerate() {
        let name = &disk.name;
        check_disk_name(name).map_err(|why| Fault::bad_request(format!("`{field}[{at}].name`: {why}.")))?;
        in_range(&format!("{field}[{at}].size_mib"), disk.size_mib, DISK_MIB)?;
        if disks.iter().take(at).any(|other| other.name == *name) {
            return refuse(format!("`{field}` has {name:?} twice; give each disk a name of its own."));
        }
    }
    Ok(())
}

fn check_limits(limits: &Limits) -> Result<(), Fault> {
    let fields = [
        ("limits.cpu_percent", limits.cpu_percent, 1..=MAX_CPU_PERCENT),
        ("limits.cpu_weight", limits.cpu_weight, WEIGHTS),
        ("limits.io_weight", limits.io_weight, WEIGHTS),
    ];
    fields.into_iter().try_for_each(|(name, value, range)| match value {
        Some(value) => in_range(name, value, range),
        None => Ok(()),
    })
}

fn checked_stop(body: &[u8]) -> Result<Stop, Fault> {
    let stop: Stop = if body.is_empty() { Stop::default() } else { parse(body)? };
    in_range("seconds", stop.seconds, 0..=MAX_STOP_SECONDS)?;
    Ok(stop)
}

fn checked_image(body: &[u8]) -> Result<NewImage, Fault> {
    let image: NewImage = if body.is_empty() { NewImage::default() } else { parse(body)? };
    check_command_line(image.command_line.as_deref())?;
    Ok(image)
}

fn check_command_line(text: Option<&str>) -> Result<(), Fault> {
    let text = text.unwrap_or_default();
    if text.len() > MAX_COMMAND_LINE {
        let long = text.len();
        return refuse(format!("`command_line` has {long} bytes; at most {MAX_COMMAND_LINE} may be given."));
    }
    if text.bytes().any(|byte| byte.is_ascii_control()) {
        return refuse("`command_line` has a line break or another control character; leave it out.");
    }
    Ok(())
}

fn in_range(name: &str, value: u32, range: std::ops::RangeInclusive<u32>) -> Result<(), Fault> {
    if range.contains(&value) {
        return Ok(());
    }
    refuse(format!("`{name}` is {value}; give a number from {} to {}.", range.start(), range.end()))
}

fn number(what: &str, text: &str, range: std::ops::RangeInclusive<u32>) -> Result<u32, Fault> {
    // By hand, as the number parsers of the standard library take a sign.
    let parsed = text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten();
    match parsed {
        Some(number) if range.contains(&number) => Ok(number),
        _ => refuse(format!("{what} is {text:?}; give a number from {} to {}.", range.start(), range.end())),
    }
}

fn refuse<T>(message: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::bad_request(message))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fleet::types::Restart;

    fn every_kind() -> Vec<Request> {
        let guest = || "web-1".to_owned();
        vec![
            Request::GetVersion,
            Request::ListGuests,
            Request::CreateGuest(NewGuest {
                name: Some(guest()),
                restart: Restart::OnFailure,
                limits: Limits { cpu_percent: Some(150), ..Limits::default() },
                command_line: Some("quiet".into()),
                max_memory_mib: Some(1024),
                disks: vec![Disk { name: "data".into(), size_mib: 10 }],
                ..NewGuest::of("debian")
            }),
            Request::GetGuest(guest()),
            Request::UpdateGuest(
                guest(),
                GuestUpdate {
                    memory_mib: Some(64),
                    add_disks: vec![Disk { name: "data".into(), size_mib: 10 }],
                    remove_disks: vec!["old".into()],
                    ..GuestUpdate::default()
                },
            ),
            Request::RemoveGuest { guest: guest(), force: true },
            Request::StartGuest(guest()),
            Request::StopGuest(guest(), Stop { seconds: 5 }),
            Request::PauseGuest(guest()),
            Request::ResumeGuest(guest()),
            Request::GuestStats(guest()),
            Request::AllStats,
            Request::Logs { guest: guest(), of: Log::Vmm, follow: true },
            Request::Console(guest()),
            Request::Vsock { guest: guest(), port: 1, wait_seconds: 60 },
            Request::Events,
            Request::Metrics,
            Request::ListImages,
            Request::GetImage("debian".into()),
            Request::PutPart("debian".into(), Part::Initrd),
            Request::PutImage("debian".into(), NewImage { command_line: Some("root=/dev/vda".into()) }),
            Request::RemoveImage("debian".into()),
        ]
    }

    #[test]
    fn what_a_client_writes_is_read_as_what_it_meant() {
        for request in every_kind() {
            let (method, target, body) = encode(&request).unwrap();
            let read = route(method, &target, body.unwrap_or_default().as_bytes());
            assert_eq!(read.as_ref(), Ok(&request), "{method} {target}");
        }
    }

    #[test]
    fn what_no_guest_can_have_is_refused_with_the_field_the_value_and_the_rule() {
        let refused = |method, target: &str, body: &str| route(method, target, body.as_bytes()).unwrap_err();
        let cases = [
            ("POST", "/guests", r#"{"image":"a","cpus":0}"#, "`cpus` is 0; give a number from 1 to 32."),
            (
                "POST",
                "/guests",
                r#"{"image":"a","memory_mib":8}"#,
                "`memory_mib` is 8; give a number from 16",
            ),
            ("POST", "/guests", r#"{"image":"a","name":"-a"}"#, "`name`: \"-a\" is not a name"),
            ("POST", "/guests", r#"{"image":"../a"}"#, "`image`: \"../a\" is not a name"),
            ("POST", "/guests", r#"{"image":"a","memory":8}"#, "unknown field `memory`"),
            ("POST", "/guests", r#"{"image":"a","command_line":"a\nb"}"#, "a line break"),
            ("POST", "/guests", r#"{"image":"a","limits":{"io_weight":0}}"#, "`limits.io_weight` is 0"),
            (
                "POST",
                "/guests",
                r#"{"image":"a","max_memory_mib":8}"#,
                "`max_memory_mib` is 8; give a number from 16",
            ),
            (
                "POST",
                "/guests",
                r#"{"image":"a","disks":[{"name":"root","size_mib":1}]}"#,
                "`disks[0].name`: \"root\" is the disk that the image gave",
            ),
            (
                "PATCH",
                "/guests/a",
                r#"{"add_disks":[{"name":"a","size_mib":0}]}"#,
                "`add_disks[0].size_mib` is 0",
            ),
            (
                "PATCH",
                "/guests/a",
                r#"{"add_disks":[{"name":"a","size_mib":1},{"name":"a","size_mib":1}]}"#,
                "`add_disks` has \"a\" twice",
            ),
            (
                "PATCH",
                "/guests/a",
                r#"{"add_disks":[{"name":"a23456789012345678901","size_mib":1}]}"#,
                "21 bytes",
            ),
            ("POST", "/guests/a/stop", r#"{"seconds":100000}"#, "`seconds` is 100000"),
            ("GET", "/guests/a/logs?of=other", "", "`of` is \"other\"; give console or vmm."),
            ("GET", "/guests/a/vsock/x", "", "the port is \"x\""),
            ("GET", "/guests/a/vsock/1?wait=+1", "", "`wait` is \"+1\""),
            ("DELETE", "/guests/a?force=maybe", "", "`force` is \"maybe\""),
            ("DELETE", "/guests/a?forse=true", "", "`forse` in the query is not known here"),
            ("PUT", "/images/a/parts/firmware", "", "\"firmware\" is no part of an image"),
        ];
        for (method, target, body, text) in cases {
            let fault = refused(method, target, body);
            assert!(fault.status == 400 && fault.message.contains(text), "{target}: {fault:?}");
        }
        for (method, target) in
            [("GET", "/guests/a b"), ("GET", "/nothing"), ("PUT", "/guests"), ("get", "/guests")]
        {
            assert_eq!(refused(method, target, "").status, 404, "{target}");
        }
    }

    #[test]
    fn only_a_part_of_an_image_is_read_as_it_comes() {
        assert_eq!(body_of("PUT", "/images/a/parts/disk"), Body::Stream);
        for (method, target) in [("PUT", "/images/a"), ("POST", "/images/a/parts/disk"), ("PUT", "/")] {
            assert_eq!(body_of(method, target), Body::Json, "{target}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange_to_be_answered(method in ".{0,8}", target in ".{0,64}", body: Vec<u8>) {
            let _ = route(&method, &target, &body);
            let _ = route("POST", "/guests", &body);
        }
    }
}
