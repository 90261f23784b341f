//! Metrics in Prometheus' text format: of the daemon, and of each guest that who asks may know of.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::fleet::{Fleet, User};
use crate::usage;

/// Everything, as it is now.
pub fn text(fleet: &Fleet, user: User) -> String {
    let guests = fleet.list(user);
    let mut text = Text::default();
    let mut states: BTreeMap<&str, f64> = BTreeMap::new();
    for guest in &guests {
        *states.entry(guest.state().on_the_wire().as_str()).or_default() += 1.0;
    }
    text.family("berth_guests", "gauge", "Guests by state.");
    for (state, count) in states {
        text.value("berth_guests", &[("state", state)], count);
    }
    text.family("berth_daemon_resident_bytes", "gauge", "Memory of the daemon itself.");
    text.value("berth_daemon_resident_bytes", &[], resident_bytes());

    let described: Vec<_> = guests.iter().map(|guest| guest.describe()).collect();
    text.family("berth_guest_restarts", "gauge", "Starts by policy since somebody started the guest.");
    for guest in &described {
        text.value("berth_guest_restarts", &[("guest", &guest.name)], f64::from(guest.restarts));
    }
    let running = guests.iter().filter(|guest| guest.state().has_process());
    let stats: Vec<_> = running.map(|guest| usage::of(&guest.places, &guest.name)).collect();
    type Of = fn(&api_socket::fleet::Stats) -> f64;
    let families: [(&str, &str, &str, Of); 6] = [
        ("berth_guest_cpu_seconds_total", "counter", "Processor time of the guest and its VMM.", |stats| {
            stats.cpu_microseconds as f64 / 1e6
        }),
        ("berth_guest_memory_bytes", "gauge", "Memory of the guest's control group.", |stats| {
            stats.memory_bytes as f64
        }),
        ("berth_guest_read_bytes_total", "counter", "Read from the host's disks.", |stats| {
            stats.read_bytes as f64
        }),
        ("berth_guest_written_bytes_total", "counter", "Written to the host's disks.", |stats| {
            stats.written_bytes as f64
        }),
        (
            "berth_guest_received_bytes_total",
            "counter",
            "Received by the guest's network interface.",
            |stats| stats.received_bytes as f64,
        ),
        ("berth_guest_sent_bytes_total", "counter", "Sent by the guest's network interface.", |stats| {
            stats.sent_bytes as f64
        }),
    ];
    for (name, kind, help, of) in families {
        text.family(name, kind, help);
        for stats in &stats {
            text.value(name, &[("guest", &stats.name)], of(stats));
        }
    }
    text.0
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    /// Values of labels are names of guests and of states, which have nothing that would need escaping.
    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<_> = labels.iter().map(|(name, value)| format!("{name}=\"{value}\"")).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }
}

/// VmRSS of proc_pid_status(5).
fn resident_bytes() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    kib.map_or(0.0, |kib| kib * 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_written_as_prometheus_reads_them() {
        let mut text = Text::default();
        text.family("a_total", "counter", "Things.");
        text.value("a_total", &[("guest", "web")], 1.5);
        text.value("b", &[], 2.0);
        assert_eq!(
            text.0,
            "# HELP a_total Things.\n# TYPE a_total counter\na_total{guest=\"web\"} 1.5\nb 2\n"
        );
        assert!(resident_bytes() > 0.0);
    }
}
