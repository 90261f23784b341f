//! The metrics file: counters from all over the process, as one JSON object a line.
//!
//! Names nothing itself: who counts keeps plain atomics and says under which group and key they are written. A counter is
//! written as what came to it since the last line that was written, a measured value as it is. The keys are those of
//! Firecracker, all of them, and those that nobody counts are 0: dashboards are built on that. Under our own name
//! there may be more.

mod keys;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use api_socket::{Endpoint, Fault, Method};
use devices::times::Times;
use devices::virtio::transport::Shared;
use devices::virtio::{balloon, blk, console, mem, net, pmem, rng, vhost_user, vsock};
use devices::{i8042, serial};
use serde::Serialize;

use crate::args::{Identity, StartTimes};
use crate::handed::Handed;
use crate::logger::LOGGER;
use crate::sink::Sink;
use crate::vcpu::ExitCounters;
use crate::x86_64::interrupts::Interrupts;

/// Tells counters: calls its argument with each key and its value since the start. A key `a.b` is written as `b` in an
/// object `a`.
pub type Source = Box<dyn Fn(&mut dyn FnMut(&'static str, u64)) + Send>;

/// All metrics of the process, and where they are written.
pub struct Metrics {
    identity: Identity,
    id: String,
    sources: Vec<Counting>,
    /// Of the sources that are added next.
    slot: Option<usize>,
    /// What those counted that are gone, for the groups of all.
    retired: Values,

    output: Option<Output>,
    /// For the next line.
    pub latencies: Latencies,
    startup: [(&'static str, u64); 2],
    /// Lines that could not be written.
    missed: u64,
    /// As of the last line that was written.
    written: Values,
}

/// How long the last of each took, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latencies {
    /// From the request to its answer.
    pub pause_vm: u64,
    pub resume_vm: u64,
    /// The work alone.
    pub vmm_pause_vm: u64,
    pub vmm_resume_vm: u64,
}

/// A source, the group and the id that it counts for, and the slot of the device that may be unplugged.
struct Counting {
    group: &'static str,
    id: Option<String>,
    slot: Option<usize>,
    source: Source,
}

struct Output {
    sink: Sink,
    config: api_socket::Metrics,
}

/// Group and key to value.
type Values = BTreeMap<(String, String), u64>;

impl Metrics {
    /// With what the logger counts. `id` is the instance's.
    pub fn new(identity: Identity, id: &str) -> Metrics {
        Metrics {
            identity,
            id: id.to_string(),
            sources: vec![Counting { group: "logger", id: None, slot: None, source: logger() }],
            slot: None,
            retired: Values::new(),
            output: None,
            latencies: Latencies::default(),
            startup: [("process_startup_time_us", 0), ("process_startup_time_cpu_us", 0)],
            missed: 0,
            written: Values::new(),
        }
    }

    /// Writes what `source` tells in the group from now on. Sources of the same group add up. With an `id` it has a group
    /// `<group>_<id>` too.
    pub fn add(&mut self, group: &'static str, id: Option<&str>, source: Source) {
        self.sources.push(Counting { group, id: id.map(str::to_string), slot: self.slot, source });
    }

    /// Adds a drive that another process serves, in a group of its own; there is none of all.
    pub fn add_vhost_user_block(&mut self, id: &str, counters: Arc<vhost_user::frontend::Counters>) {
        let source = move |tell: &mut dyn FnMut(&'static str, u64)| {
            let c = &counters;
            tell("activate_fails", load(&c.activate_fails));
            tell("cfg_fails", load(&c.cfg_fails));
            tell("init_time_us", load(&c.init_time_us));
            tell("activate_time_us", load(&c.activate_time_us));
            tell("config_change_time_us", load(&c.config_change_time_us));
            // Ours: under Firecracker's name, keys that it has not are left out.
            tell("queue_event_count", load(&c.queue_event_count));
            tell("call_event_count", load(&c.call_event_count));
            tell("requests_count", load(&c.requests_count));
            tell("requests_repeated_count", load(&c.requests_repeated_count));
            tell("backend_lost_count", load(&c.backend_lost_count));
        };
        self.add(keys::VHOST_USER_BLOCK, Some(id), Box::new(source));
    }

    /// Where the device is plugged in whose sources are added next, until another is named; `None` for what stays.
    pub fn at(&mut self, slot: Option<usize>) -> &mut Metrics {
        self.slot = slot;
        self
    }

    /// The device in `slot` is gone, and so are its own groups. What it counted stays in those of all.
    pub fn forget(&mut self, slot: usize) {
        let is_gone = |counting: &Counting| counting.slot == Some(slot);
        for Counting { group, id, source, .. } in self.sources.iter().filter(|counting| is_gone(counting)) {
            source(&mut |key, value| {
                let is_known = self.identity == Identity::Berth || keys::knows(group, key);
                if is_known && keys::is_summed(group, key, id.is_some()) {
                    add(&mut self.retired, group, key, value);
                }
            });
            if let Some(id) = id {
                let own = format!("{group}_{id}");
                self.written.retain(|(group, _), _| *group != own);
            }
        }
        self.sources.retain(|counting| !is_gone(counting));
    }

    /// Adds the requests to the API.
    pub fn add_api(&mut self, counters: &Arc<api_socket::counters::Counters>) {
        for group in ["get_api_requests", "put_api_requests", "patch_api_requests", "delete_api_requests"] {
            self.add(group, None, requests(group, counters.clone()));
        }
        let deprecated = counters.clone();
        self.add(
            "deprecated_api",
            None,
            Box::new(move |tell| tell("deprecated_http_api_calls", load(&deprecated.deprecated))),
        );
        let counters = counters.clone();
        let source = move |tell: &mut dyn FnMut(&'static str, u64)| {
            tell("unknown_requests", load(&counters.unknown));
            tell("refused_connections", load(&counters.refused_connections));
        };
        self.add("api_connections", None, Box::new(source));
    }

    /// Adds the exits of all vCPUs.
    pub fn add_vcpus(&mut self, counters: Arc<ExitCounters>) {
        let source = move |tell: &mut dyn FnMut(&'static str, u64)| {
            tell("exit_io_in", load(&counters.port_in));
            tell("exit_io_out", load(&counters.port_out));
            tell("exit_mmio_read", load(&counters.mmio_read));
            tell("exit_mmio_write", load(&counters.mmio_write));
            tell("failures", load(&counters.failures));
            tell("kvmclock_ctrl_fails", load(&counters.kvmclock_failures));
            tell_times(tell, &EXIT_IO_IN, &counters.port_in_time);
            tell_times(tell, &EXIT_IO_OUT, &counters.port_out_time);
            tell_times(tell, &EXIT_MMIO_READ, &counters.mmio_read_time);
            tell_times(tell, &EXIT_MMIO_WRITE, &counters.mmio_write_time);
        };
        self.add("vcpu", None, Box::new(source));
    }

    /// Adds the serial port, and the bytes that `dropped` counts because they were too many.
    pub fn add_uart(&mut self, counters: Arc<serial::Counters>, dropped: Arc<AtomicU64>) {
        let source = move |tell: &mut dyn FnMut(&'static str, u64)| {
            tell("read_count", load(&counters.read));
            tell("write_count", load(&counters.written));
            tell("missed_write_count", load(&counters.lost));
            tell("error_count", load(&counters.lost));
            tell("rate_limiter_dropped_bytes", load(&dropped));
        };
        self.add("uart", None, Box::new(source));
    }

    /// Adds the keyboard controller.
    pub fn add_i8042(&mut self, counters: Arc<i8042::Counters>) {
        let source = move |tell: &mut dyn FnMut(&'static str, u64)| {
            tell("read_count", load(&counters.read));
            tell("write_count", load(&counters.written));
            tell("reset_count", load(&counters.resets));
        };
        self.add("i8042", None, Box::new(source));
    }

    /// Adds the interrupts of a virtio device.
    pub fn add_interrupts(&mut self, shared: Arc<Shared>) {
        self.add("interrupts", None, Box::new(move |tell| tell("triggers", shared.interrupts())));
    }

    /// Adds what went wrong between a virtio device and its driver.
    pub fn add_transport(&mut self, group: &'static str, id: Option<&str>, shared: Arc<Shared>) {
        let source = move |tell: &mut dyn FnMut(&'static str, u64)| {
            tell("activate_fails", shared.start_fails());
            // Where Firecracker has no such key, ours.
            tell("cfg_fails", shared.config_fails());
        };
        self.add(group, id, Box::new(source));
    }

    /// Adds the changes of message-signalled interrupts.
    pub fn add_routes(&mut self, interrupts: Arc<Interrupts>) {
        self.add("interrupts", None, Box::new(move |tell| tell("config_updates", interrupts.updates())));
    }

    /// Adds a drive, in the group of all drives and in one of its own.
    pub fn add_block(&mut self, id: &str, counters: Arc<blk::Counters>) {
        let source = move |tell: &mut dyn FnMut(&'static str, u64)| {
            let c = &counters;
            tell("queue_event_count", load(&c.queue_event_count));
            tell("rate_limiter_event_count", load(&c.rate_limiter_event_count));
            tell("rate_limiter_throttled_events", load(&c.rate_limiter_throttled_events));
            tell("io_engine_throttled_events", load(&c.io_engine_throttled_events));
            tell("read_count", load(&c.read_count));
            tell("read_bytes", load(&c.read_bytes));
            tell_times(tell, &READ, &c.read_time);
            tell("write_count", load(&c.write_count));
            tell("write_bytes", load(&c.write_bytes));
            tell_times(tell, &WRITE, &c.write_time);
            tell("flush_count", load(&c.flush_count));
            tell("invalid_reqs_count", load(&c.invalid_reqs_count));
            tell("execute_fails", load(&c.execute_fails));
            tell("update_count", load(&c.update_count));
            tell("update_fails", load(&c.update_fails));
            // Ours: under Firecracker's name, keys that it has not are left out.
            tell("discard_count", load(&c.discard_count));
            tell("write_zeroes_count", load(&c.write_zeroes_count));
        };
        self.add("block", Some(id), Box::new(source));
    }

    /// Adds a network interface, in the group of all and in one of its own.
    pub fn add_net(&mut self, id: &str, counters: Arc<net::Counters>) {
        let source = move |tell: &mut dyn FnMut(&'static str, u64)| {
            let c = &counters;
            tell("rx_queue_event_count", load(&c.rx_queue_event_count));
            tell("rx_tap_event_count", load(&c.rx_tap_event_count));
            tell("rx_event_rate_limiter_count", load(&c.rx_event_rate_limiter_count));
            tell("rx_rate_limiter_throttled", load(&c.rx_rate_limiter_throttled));
            tell("no_rx_avail_buffer", load(&c.no_rx_avail_buffer));
            tell("rx_fails", load(&c.rx_fails));
            // A packet is one reading of the tap, so both keys say the same.
            tell("rx_count", load(&c.rx_packets_count));
            tell("rx_packets_count", load(&c.rx_packets_count));
            tell("rx_bytes_count", load(&c.rx_bytes_count));
            tell("tap_read_fails", load(&c.tap_read_fails));
            tell("tx_queue_event_count", load(&c.tx_queue_event_count));
            tell("tx_rate_limiter_event_count", load(&c.tx_rate_limiter_event_count));
            tell("tx_rate_limiter_throttled", load(&c.tx_rate_limiter_throttled));
            tell("tx_count", load(&c.tx_packets_count));
            tell("tx_packets_count", load(&c.tx_packets_count));
            tell("tx_bytes_count", load(&c.tx_bytes_count));
            tell("tx_malformed_frames", load(&c.tx_malformed_frames));
            tell("tx_fails", load(&c.tx_fails));
            tell("tx_spoofed_mac_count", load(&c.tx_spoofed_mac_count));
            tell("tap_write_fails", load(&c.tap_write_fails));
            tell_times(tell, &TAP_WRITE, &c.tap_write_time);
        };
        self.add("net", Some(id), Box::new(source));
    }

    /// Adds persistent memory, in the group of all and in one of its own.
    pub fn add_pmem(&mut self, id: &str, counters: Arc<pmem::Counters>) {
        let source = move |tell: &mut dyn FnMut(&'static str, u64)| {
            tell("queue_event_count", load(&counters.queue_event_count));
            tell("event_fails", load(&counters.event_fails));
            tell("rate_limiter_event_count", load(&counters.rate_limiter_event_count));
            tell("rate_limiter_throttled_events", load(&counters.rate_limiter_throttled_events));
        };
        self.add("pmem", Some(id), Box::new(source));
    }

    /// Adds the console. A group of our own.
    pub fn add_console(&mut self, counters: Arc<console::Counters>) {
        let source = move |tell: &mut dyn FnMut(&'static str, u64)| {
            tell("input_bytes", load(&counters.input_bytes));
            tell("output_bytes", load(&counters.output_bytes));
            tell("lost_bytes", load(&counters.lost_bytes));
        };
        self.add("console", None, Box::new(source));
    }

    /// Adds the metadata service.
    pub fn add_mmds(&mut self, counters: Arc<metadata::Counters>) {
        let source = move |tell: &mut dyn FnMut(&'static str, u64)| {
            let c = &counters;
            tell("rx_accepted", load(&c.rx_accepted));
            tell("rx_accepted_err", load(&c.rx_accepted_err));
            tell("rx_accepted_unusual", load(&c.rx_accepted_unusual));
            tell("rx_bad_eth", load(&c.rx_bad_eth));
            tell("rx_invalid_token", load(&c.rx_invalid_token));
            tell("rx_no_token", load(&c.rx_no_token));
            tell("rx_count", load(&c.rx_count));
            tell("tx_bytes", load(&c.tx_bytes));
            tell("tx_count", load(&c.tx_count));
            tell("tx_errors", load(&c.tx_errors));
            tell("tx_frames", load(&c.tx_frames));
            tell("connections_created", load(&c.connections_created));
            tell("connections_destroyed", load(&c.connections_destroyed));
        };
        self.add("mmds", None, Box::new(source));
    }

    /// Adds the entropy device.
    pub fn add_entropy(&mut self, counters: Arc<rng::Counters>) {
        let source = move |tell: &mut dyn FnMut(&'static str, u64)| {
            let c = &counters;
            tell("entropy_event_count", load(&c.entropy_event_count));
            tell("entropy_bytes", load(&c.entropy_bytes));
            tell("host_rng_fails", load(&c.host_rng_fails));
            tell("entropy_rate_limiter_throttled", load(&c.entropy_rate_limiter_throttled));
            tell("rate_limiter_event_count", load(&c.rate_limiter_event_count));
        };
        self.add("entropy", None, Box::new(source));
    }

    /// Adds the balloon.
    pub fn add_balloon(&mut self, counters: Arc<balloon::Counters>) {
        let source = move |tell: &mut dyn FnMut(&'static str, u64)| {
            let c = &counters;
            tell("inflate_count", load(&c.inflate_count));
            tell("deflate_count", load(&c.deflate_count));
            tell("event_fails", load(&c.event_fails));
            tell("stats_updates_count", load(&c.stats_updates_count));
            tell("stats_update_fails", load(&c.stats_update_fails));
            tell("free_page_report_count", load(&c.free_page_report_count));
            tell("free_page_report_freed", load(&c.free_page_report_freed));
            tell("free_page_report_fails", load(&c.free_page_report_fails));
            tell("free_page_hint_count", load(&c.free_page_hint_count));
            tell("free_page_hint_freed", load(&c.free_page_hint_freed));
            tell("free_page_hint_fails", load(&c.free_page_hint_fails));
        };
        self.add("balloon", None, Box::new(source));
    }

    /// Adds the memory device.
    pub fn add_memory_hotplug(&mut self, counters: Arc<mem::Counters>) {
        let source = move |tell: &mut dyn FnMut(&'static str, u64)| {
            let c = &counters;
            tell("queue_event_count", load(&c.queue_event_count));
            tell("queue_event_fails", load(&c.queue_event_fails));
            tell("plug_count", load(&c.plug.count));
            tell("plug_fails", load(&c.plug.fails));
            tell("plug_bytes", load(&c.plug_bytes));
            tell_times(tell, &PLUG, &c.plug.time);
            tell("unplug_count", load(&c.unplug.count));
            tell("unplug_fails", load(&c.unplug.fails));
            tell("unplug_bytes", load(&c.unplug_bytes));
            tell("unplug_discard_fails", load(&c.unplug_discard_fails));
            tell_times(tell, &UNPLUG, &c.unplug.time);
            tell("unplug_all_count", load(&c.unplug_all.count));
            tell("unplug_all_fails", load(&c.unplug_all.fails));
            tell_times(tell, &UNPLUG_ALL, &c.unplug_all.time);
            tell("state_count", load(&c.state.count));
            tell("state_fails", load(&c.state.fails));
            tell_times(tell, &STATE, &c.state.time);
        };
        self.add("memory_hotplug", None, Box::new(source));
    }

    /// Adds the socket device.
    pub fn add_vsock(&mut self, counters: Arc<vsock::Counters>) {
        let source = move |tell: &mut dyn FnMut(&'static str, u64)| {
            let c = &counters;
            tell("rx_queue_event_count", load(&c.rx_queue_event_count));
            tell("tx_queue_event_count", load(&c.tx_queue_event_count));
            tell("rx_bytes_count", load(&c.rx_bytes_count));
            tell("tx_bytes_count", load(&c.tx_bytes_count));
            tell("rx_packets_count", load(&c.rx_packets_count));
            tell("tx_packets_count", load(&c.tx_packets_count));
            tell("conns_added", load(&c.conns_added));
            tell("conns_removed", load(&c.conns_removed));
            tell("conns_killed", load(&c.conns_killed));
            tell("muxer_event_fails", load(&c.muxer_event_fails));
            tell("tx_write_fails", load(&c.tx_write_fails));
            tell("tx_flush_fails", load(&c.tx_flush_fails));
            tell("rx_read_fails", load(&c.rx_read_fails));
            // Ours: under Firecracker's name, keys that it has not are left out.
            tell("tx_invalid_packets", load(&c.tx_invalid_packets));
            tell("rx_invalid_buffers", load(&c.rx_invalid_buffers));
        };
        self.add("vsock", None, Box::new(source));
    }

    /// Takes the time that the start took, which is now: when the API answers, or without one when the guest is about to
    /// run.
    pub fn started(&mut self, start: &StartTimes) {
        let since = |clock, then: Option<u64>| then.map_or(0, |then| clock_us(clock).saturating_sub(then));
        let wall = since(libc::CLOCK_MONOTONIC, start.wall_us);
        let cpu = since(libc::CLOCK_PROCESS_CPUTIME_ID, start.cpu_us);
        let parent = start.cpu_us.and(start.parent_cpu_us).unwrap_or(0);
        self.startup =
            [("process_startup_time_us", wall), ("process_startup_time_cpu_us", cpu.saturating_add(parent))];
    }

    /// Opens the file that lines are written to from now on.
    ///
    /// # Errors
    /// A second time, and a path that cannot be opened.
    pub fn open(&mut self, config: &api_socket::Metrics, handed: &Handed) -> Result<(), Fault> {
        let path = config.metrics_path.display();
        if let Some(output) = &self.output {
            let first = output.config.metrics_path.display();
            return Err(Fault::bad_request(format!(
                "`metrics_path` is {path}, but metrics are written to {first} already; they can be set up once."
            )));
        }
        let sink = Sink::named("metrics_path", &config.metrics_path, handed)?;
        self.output = Some(Output { sink, config: config.clone() });
        Ok(())
    }

    /// Writes a line: right after the start, when a client asks, every minute, and before the process ends. `Ok(false)`:
    /// there is no file.
    ///
    /// # Errors
    /// The file would not take the line. Nothing is lost by that: the next line has what this one would have had.
    pub fn flush(&mut self) -> Result<bool, Fault> {
        let values = self.collect();
        let Some(output) = &mut self.output else {
            return Ok(false);
        };
        let config = &output.config;
        let line = Line {
            utc_timestamp_ms: now_ms(),
            id: config.emit_id.then_some(self.id.as_str()),
            properties: config.properties.as_ref(),
            groups: groups(&values, &self.written),
        };
        let written = serde_json::to_vec(&line).map_err(io::Error::other).and_then(|mut line| {
            line.push(b'\n');
            output.sink.write_line(&line)
        });
        match written {
            Ok(()) => {
                self.written = values;
                Ok(true)
            }
            Err(error) => {
                self.missed += 1;
                let path = config.metrics_path.display();
                let text = format!("Metrics cannot be written to {path}: {error}. Is somebody reading it?");
                Err(Fault::bad_request(text))
            }
        }
    }

    /// Everything since the start.
    fn collect(&self) -> Values {
        let mut values = Values::new();
        for (group, keys) in keys::KEYS {
            put_zeros(&mut values, group, keys);
        }
        self.own(&mut |group, key, value| add(&mut values, group, key, value));
        for ((group, key), value) in &self.retired {
            add(&mut values, group, key, *value);
        }
        for Counting { group, id, source, .. } in &self.sources {
            let one = id.as_ref().map(|id| format!("{group}_{id}"));
            if let Some(one) = &one {
                put_zeros(&mut values, one, keys::of(group));
            }
            source(&mut |key, value| {
                if self.identity == Identity::Firecracker && !keys::knows(group, key) {
                    return;
                }
                if let Some(one) = &one {
                    add(&mut values, one, key, value);
                }
                if keys::is_summed(group, key, one.is_some()) {
                    add(&mut values, group, key, value);
                }
            });
        }
        values
    }

    fn own(&self, tell: &mut dyn FnMut(&str, &'static str, u64)) {
        for (key, value) in self.startup {
            tell("api_server", key, value);
        }
        tell("latencies_us", "pause_vm", self.latencies.pause_vm);
        tell("latencies_us", "resume_vm", self.latencies.resume_vm);
        tell("latencies_us", "vmm_pause_vm", self.latencies.vmm_pause_vm);
        tell("latencies_us", "vmm_resume_vm", self.latencies.vmm_resume_vm);
        tell("logger", "missed_metrics_count", self.missed);
    }
}

fn put_zeros(values: &mut Values, group: &str, keys: &[&str]) {
    for key in keys {
        match key.ends_with(keys::AGGREGATE) {
            true => keys::AGGREGATED.iter().for_each(|part| add(values, group, &format!("{key}.{part}"), 0)),
            false => add(values, group, key, 0),
        }
    }
}

fn add(values: &mut Values, group: &str, key: &str, value: u64) {
    let sum = values.entry((group.to_string(), key.to_string())).or_default();
    *sum = sum.saturating_add(value);
}

/// A line, as it is written.
#[derive(Serialize)]
struct Line<'a> {
    utc_timestamp_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    properties: Option<&'a BTreeMap<String, String>>,
    #[serde(flatten)]
    groups: BTreeMap<&'a str, Group<'a>>,
}

#[derive(Default, Serialize)]
struct Group<'a> {
    #[serde(flatten)]
    plain: BTreeMap<&'a str, u64>,
    #[serde(flatten)]
    nested: BTreeMap<&'a str, BTreeMap<&'a str, u64>>,
}

/// The groups of `values`, with what `written` says was told before taken off.
fn groups<'a>(values: &'a Values, written: &Values) -> BTreeMap<&'a str, Group<'a>> {
    let mut groups = BTreeMap::<_, Group>::new();
    for (name, value) in values {
        let (group, key) = name;
        let value = match keys::is_measured(group, key) {
            true => *value,
            false => value.saturating_sub(written.get(name).copied().unwrap_or(0)),
        };
        let group = groups.entry(group.as_str()).or_default();
        match key.split_once('.') {
            Some((outer, inner)) => group.nested.entry(outer).or_default().insert(inner, value),
            None => group.plain.insert(key, value),
        };
    }
    groups
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

fn logger() -> Source {
    Box::new(|tell| {
        tell("missed_log_count", load(&LOGGER.counters().missed));
        tell("rate_limited_log_count", load(&LOGGER.counters().limited));
    })
}

/// What is counted of an endpoint: its group, the keys of its requests and of its faults.
type Row = (&'static str, Method, Endpoint, &'static str, Option<&'static str>);

const REQUESTS: &[Row] = &[
    ("get_api_requests", Method::Get, Endpoint::Instance, "instance_info_count", None),
    ("get_api_requests", Method::Get, Endpoint::MachineConfig, "machine_cfg_count", None),
    ("get_api_requests", Method::Get, Endpoint::Version, "vmm_version_count", None),
    ("get_api_requests", Method::Get, Endpoint::VmConfig, "vm_config_count", None),
    ("put_api_requests", Method::Put, Endpoint::Actions, "actions_count", Some("actions_fails")),
    ("put_api_requests", Method::Put, Endpoint::BootSource, "boot_source_count", Some("boot_source_fails")),
    ("put_api_requests", Method::Put, Endpoint::CpuConfig, "cpu_cfg_count", Some("cpu_cfg_fails")),
    ("put_api_requests", Method::Put, Endpoint::Drive, "drive_count", Some("drive_fails")),
    ("put_api_requests", Method::Put, Endpoint::NetworkInterface, "network_count", Some("network_fails")),
    ("put_api_requests", Method::Put, Endpoint::Pmem, "pmem_count", Some("pmem_fails")),
    // Keys of our own.
    ("get_api_requests", Method::Get, Endpoint::Balloon, "balloon_count", None),
    ("get_api_requests", Method::Get, Endpoint::BalloonStats, "balloon_stats_count", None),
    ("get_api_requests", Method::Get, Endpoint::BalloonHintingStatus, "balloon_hinting_status_count", None),
    ("put_api_requests", Method::Put, Endpoint::Balloon, "balloon_count", Some("balloon_fails")),
    ("patch_api_requests", Method::Patch, Endpoint::Balloon, "balloon_count", Some("balloon_fails")),
    (
        "patch_api_requests",
        Method::Patch,
        Endpoint::BalloonStats,
        "balloon_stats_count",
        Some("balloon_stats_fails"),
    ),
    (
        "patch_api_requests",
        Method::Patch,
        Endpoint::BalloonHintingStart,
        "balloon_hinting_start_count",
        Some("balloon_hinting_start_fails"),
    ),
    (
        "patch_api_requests",
        Method::Patch,
        Endpoint::BalloonHintingStop,
        "balloon_hinting_stop_count",
        Some("balloon_hinting_stop_fails"),
    ),
    ("get_api_requests", Method::Get, Endpoint::MemoryHotplug, "hotplug_memory_count", None),
    (
        "put_api_requests",
        Method::Put,
        Endpoint::MemoryHotplug,
        "hotplug_memory_count",
        Some("hotplug_memory_fails"),
    ),
    (
        "patch_api_requests",
        Method::Patch,
        Endpoint::MemoryHotplug,
        "hotplug_memory_count",
        Some("hotplug_memory_fails"),
    ),
    ("put_api_requests", Method::Put, Endpoint::Console, "console_count", Some("console_fails")),
    ("put_api_requests", Method::Put, Endpoint::Entropy, "entropy_count", Some("entropy_fails")),
    ("put_api_requests", Method::Put, Endpoint::Logger, "logger_count", Some("logger_fails")),
    (
        "put_api_requests",
        Method::Put,
        Endpoint::MachineConfig,
        "machine_cfg_count",
        Some("machine_cfg_fails"),
    ),
    ("put_api_requests", Method::Put, Endpoint::Metrics, "metrics_count", Some("metrics_fails")),
    ("get_api_requests", Method::Get, Endpoint::Mmds, "mmds_count", None),
    ("put_api_requests", Method::Put, Endpoint::Mmds, "mmds_count", Some("mmds_fails")),
    // Under one key with the other.
    ("put_api_requests", Method::Put, Endpoint::MmdsConfig, "mmds_count", Some("mmds_fails")),
    ("patch_api_requests", Method::Patch, Endpoint::Mmds, "mmds_count", Some("mmds_fails")),
    ("put_api_requests", Method::Put, Endpoint::Vsock, "vsock_count", Some("vsock_fails")),
    ("put_api_requests", Method::Put, Endpoint::Serial, "serial_count", Some("serial_fails")),
    ("patch_api_requests", Method::Patch, Endpoint::Drive, "drive_count", Some("drive_fails")),
    ("patch_api_requests", Method::Patch, Endpoint::NetworkInterface, "network_count", Some("network_fails")),
    ("patch_api_requests", Method::Patch, Endpoint::Pmem, "pmem_count", Some("pmem_fails")),
    (
        "patch_api_requests",
        Method::Patch,
        Endpoint::MachineConfig,
        "machine_cfg_count",
        Some("machine_cfg_fails"),
    ),
    ("patch_api_requests", Method::Patch, Endpoint::Vm, "vm_count", Some("vm_fails")),
    ("patch_api_requests", Method::Patch, Endpoint::Console, "console_count", Some("console_fails")),
    ("patch_api_requests", Method::Patch, Endpoint::Entropy, "entropy_count", Some("entropy_fails")),
    ("delete_api_requests", Method::Delete, Endpoint::Drive, "drive_count", Some("drive_fails")),
    (
        "delete_api_requests",
        Method::Delete,
        Endpoint::NetworkInterface,
        "network_count",
        Some("network_fails"),
    ),
    ("delete_api_requests", Method::Delete, Endpoint::Pmem, "pmem_count", Some("pmem_fails")),
];

fn requests(group: &'static str, counters: Arc<api_socket::counters::Counters>) -> Source {
    Box::new(move |tell| {
        for (_, method, endpoint, requests, faults) in REQUESTS.iter().filter(|row| row.0 == group) {
            let count = counters.of(*method, *endpoint);
            tell(requests, load(&count.requests));
            if let Some(faults) = faults {
                tell(faults, load(&count.faults));
            }
        }
    })
}

/// The keys of one kind of [`Times`]: the shortest, the longest, the sum.
type TimesKeys = [&'static str; 3];

const READ: TimesKeys = ["read_agg.min_us", "read_agg.max_us", "read_agg.sum_us"];
const WRITE: TimesKeys = ["write_agg.min_us", "write_agg.max_us", "write_agg.sum_us"];
const TAP_WRITE: TimesKeys = ["tap_write_agg.min_us", "tap_write_agg.max_us", "tap_write_agg.sum_us"];
const PLUG: TimesKeys = ["plug_agg.min_us", "plug_agg.max_us", "plug_agg.sum_us"];
const UNPLUG: TimesKeys = ["unplug_agg.min_us", "unplug_agg.max_us", "unplug_agg.sum_us"];
const UNPLUG_ALL: TimesKeys = ["unplug_all_agg.min_us", "unplug_all_agg.max_us", "unplug_all_agg.sum_us"];
const STATE: TimesKeys = ["state_agg.min_us", "state_agg.max_us", "state_agg.sum_us"];
const EXIT_IO_IN: TimesKeys = ["exit_io_in_agg.min_us", "exit_io_in_agg.max_us", "exit_io_in_agg.sum_us"];
const EXIT_IO_OUT: TimesKeys = ["exit_io_out_agg.min_us", "exit_io_out_agg.max_us", "exit_io_out_agg.sum_us"];
const EXIT_MMIO_READ: TimesKeys =
    ["exit_mmio_read_agg.min_us", "exit_mmio_read_agg.max_us", "exit_mmio_read_agg.sum_us"];
const EXIT_MMIO_WRITE: TimesKeys =
    ["exit_mmio_write_agg.min_us", "exit_mmio_write_agg.max_us", "exit_mmio_write_agg.sum_us"];

fn tell_times(tell: &mut dyn FnMut(&'static str, u64), keys: &TimesKeys, times: &Times) {
    let told = [times.min_us(), times.max_us(), times.sum_us()];
    keys.iter().zip(told).for_each(|(key, us)| tell(key, us));
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// Microseconds of one of the kernel's clocks.
pub fn clock_us(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: clock_gettime writes one timespec, which `&mut time` is.
    unsafe { libc::clock_gettime(clock, &mut time) };
    let (seconds, nanos) =
        (u64::try_from(time.tv_sec).unwrap_or(0), u64::try_from(time.tv_nsec).unwrap_or(0));
    seconds.saturating_mul(1_000_000).saturating_add(nanos / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::virtio::rng::Rng;
    use devices::virtio::transport::SharedDevice;
    use serde_json::{Value, json};
    use std::path::{Path, PathBuf};
    use std::sync::Mutex;
    use std::time::{Duration, Instant};

    struct Fixture {
        _dir: tempfile::TempDir,
        path: PathBuf,
        metrics: Metrics,
    }

    fn fixture(identity: Identity) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics");
        let mut metrics = Metrics::new(identity, "vm-1");
        metrics.open(&config(&path), &Handed::default()).unwrap();
        Fixture { _dir: dir, path, metrics }
    }

    fn config(path: &Path) -> api_socket::Metrics {
        api_socket::Metrics { metrics_path: path.into(), ..Default::default() }
    }

    impl Fixture {
        /// Flushes and gives the line that came of it.
        fn line(&mut self) -> Value {
            let before = self.text().lines().count();
            assert!(self.metrics.flush().unwrap());
            let text = self.text();
            assert!(text.ends_with('\n'));
            assert_eq!(text.lines().count(), before + 1);
            serde_json::from_str(text.lines().last().unwrap()).unwrap()
        }

        fn text(&self) -> String {
            std::fs::read_to_string(&self.path).unwrap()
        }

        /// A counter under a key.
        fn counter(&mut self, group: &'static str, id: Option<&str>, key: &'static str) -> Arc<AtomicU64> {
            let counter = Arc::new(AtomicU64::new(0));
            let told = counter.clone();
            self.metrics.add(group, id, Box::new(move |tell| tell(key, load(&told))));
            counter
        }
    }

    /// All keys of a line, objects flattened.
    fn names(value: &Value) -> Vec<String> {
        let Value::Object(map) = value else { return vec![String::new()] };
        let mut all = Vec::new();
        for (key, value) in map {
            all.extend(
                names(value).into_iter().map(|rest| format!("{key}.{rest}").trim_matches('.').to_string()),
            );
        }
        all.sort();
        all
    }

    fn expected_names(devices: &[&str]) -> Vec<String> {
        let mut all = vec!["utc_timestamp_ms".to_string()];
        let mut put = |group: &str, keys: &[&str]| {
            for key in keys {
                match key.ends_with("_agg") {
                    true => {
                        all.extend(["min_us", "max_us", "sum_us"].map(|part| format!("{group}.{key}.{part}")))
                    }
                    false => all.push(format!("{group}.{key}")),
                }
            }
        };
        keys::KEYS.iter().for_each(|(group, keys)| put(group, keys));
        devices.iter().for_each(|device| put(device, keys::of("block")));
        all.sort();
        all
    }

    fn everything(metrics: &mut Metrics) {
        metrics.add_api(&Arc::default());
        metrics.add_vcpus(Arc::default());
        metrics.add_uart(Arc::default(), Arc::default());
        metrics.add_block("vda", Arc::default());
        metrics.add_entropy(Arc::default());
        metrics.add_vsock(Arc::default());
        metrics.add_balloon(Arc::default());
        metrics.add_memory_hotplug(Arc::default());
        let device: SharedDevice =
            Arc::new(Mutex::new(Rng::new(rng::Config { limits: Default::default() }, None).unwrap()));
        for (group, id) in [("block", Some("vda")), ("entropy", None), ("vsock", None), ("balloon", None)] {
            metrics.add_transport(group, id, Shared::of(&device));
        }
    }

    #[test]
    fn under_firecrackers_name_the_keys_are_exactly_firecrackers() {
        let mut fixture = fixture(Identity::Firecracker);
        assert_eq!(names(&fixture.line()), expected_names(&[]), "with nobody who counts");
        everything(&mut fixture.metrics);
        fixture.counter("block", Some("rootfs"), "read_bytes");
        fixture.counter("block", Some("rootfs"), "read_agg.sum_us");
        fixture.counter("block", Some("data"), "a_key_of_our_own");
        assert_eq!(names(&fixture.line()), expected_names(&["block_rootfs", "block_data", "block_vda"]));
    }

    #[test]
    fn the_table_has_each_group_and_key_once() {
        let mut names = expected_names(&[]);
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        assert_eq!(keys::KEYS.len(), 22);
    }

    #[test]
    fn under_our_own_name_there_is_more_and_nothing_less() {
        let mut fixture = fixture(Identity::Berth);
        everything(&mut fixture.metrics);
        let names = names(&fixture.line());
        let expected = expected_names(&["block_vda"]);
        assert!(expected.iter().all(|name| names.contains(name)));
        let own: Vec<_> = names.iter().filter(|name| !expected.contains(name)).collect();
        assert_eq!(
            own,
            [
                "api_connections.refused_connections",
                "api_connections.unknown_requests",
                "balloon.cfg_fails",
                "block.discard_count",
                "block.write_zeroes_count",
                "block_vda.discard_count",
                "block_vda.write_zeroes_count",
                "delete_api_requests.drive_count",
                "delete_api_requests.drive_fails",
                "delete_api_requests.network_count",
                "delete_api_requests.network_fails",
                "delete_api_requests.pmem_count",
                "delete_api_requests.pmem_fails",
                "entropy.cfg_fails",
                "get_api_requests.balloon_count",
                "get_api_requests.balloon_hinting_status_count",
                "get_api_requests.balloon_stats_count",
                "get_api_requests.vm_config_count",
                "patch_api_requests.balloon_count",
                "patch_api_requests.balloon_fails",
                "patch_api_requests.balloon_hinting_start_count",
                "patch_api_requests.balloon_hinting_start_fails",
                "patch_api_requests.balloon_hinting_stop_count",
                "patch_api_requests.balloon_hinting_stop_fails",
                "patch_api_requests.balloon_stats_count",
                "patch_api_requests.balloon_stats_fails",
                "patch_api_requests.console_count",
                "patch_api_requests.console_fails",
                "patch_api_requests.entropy_count",
                "patch_api_requests.entropy_fails",
                "patch_api_requests.vm_count",
                "patch_api_requests.vm_fails",
                "put_api_requests.balloon_count",
                "put_api_requests.balloon_fails",
                "put_api_requests.console_count",
                "put_api_requests.console_fails",
                "put_api_requests.entropy_count",
                "put_api_requests.entropy_fails",
                "vsock.rx_invalid_buffers",
                "vsock.tx_invalid_packets",
            ]
        );
    }

    #[test]
    fn a_counter_is_what_came_since_the_last_line() {
        let mut fixture = fixture(Identity::Firecracker);
        let exits = Arc::new(ExitCounters::default());
        fixture.metrics.add_vcpus(exits.clone());
        exits.port_in.store(5, Ordering::Relaxed);
        assert_eq!(fixture.line()["vcpu"]["exit_io_in"], 5);
        exits.port_in.store(7, Ordering::Relaxed);
        assert_eq!(fixture.line()["vcpu"]["exit_io_in"], 2);
        assert_eq!(fixture.line()["vcpu"]["exit_io_in"], 0);
    }

    #[test]
    fn a_measured_value_stays_until_the_next_is_measured() {
        let mut fixture = fixture(Identity::Firecracker);
        fixture.metrics.latencies =
            Latencies { pause_vm: 1, resume_vm: 2, vmm_pause_vm: 3, vmm_resume_vm: 4 };
        for _ in 0..2 {
            let line = fixture.line();
            let told = ["pause_vm", "resume_vm", "vmm_pause_vm", "vmm_resume_vm"]
                .map(|key| &line["latencies_us"][key]);
            assert_eq!(told, [1, 2, 3, 4]);
        }
    }

    #[test]
    fn devices_have_a_group_each_and_one_that_adds_them_up() {
        let mut fixture = fixture(Identity::Firecracker);
        let first = fixture.counter("block", Some("a"), "read_bytes");
        let second = fixture.counter("block", Some("b"), "read_bytes");
        let least = fixture.counter("block", Some("a"), "read_agg.min_us");
        let sum = fixture.counter("block", Some("a"), "read_agg.sum_us");
        for (counter, value) in [(&first, 3), (&second, 4), (&least, 5), (&sum, 6)] {
            counter.store(value, Ordering::Relaxed);
        }
        let line = fixture.line();
        assert_eq!(line["block_a"]["read_bytes"], 3);
        assert_eq!(line["block_b"]["read_bytes"], 4);
        assert_eq!(line["block"]["read_bytes"], 7);
        assert_eq!(line["block_a"]["read_agg"], json!({"min_us": 5, "max_us": 0, "sum_us": 6}));
        assert_eq!(line["block"]["read_agg"], json!({"min_us": 0, "max_us": 0, "sum_us": 6}));
        assert_eq!(fixture.line()["block_a"]["read_agg"], json!({"min_us": 5, "max_us": 0, "sum_us": 0}));
    }

    #[test]
    fn each_request_is_counted_under_its_key() {
        let mut fixture = fixture(Identity::Berth);
        let counters = Arc::new(api_socket::counters::Counters::default());
        fixture.metrics.add_api(&counters);
        for (number, (_, method, endpoint, _, faults)) in (1..).zip(REQUESTS) {
            let count = counters.of(*method, *endpoint);
            count.requests.store(number, Ordering::Relaxed);
            if faults.is_some() {
                count.faults.store(100 + number, Ordering::Relaxed);
            }
        }
        counters.deprecated.store(50, Ordering::Relaxed);
        let line = fixture.line();
        // Two may have one key.
        let rows = |group, key| (1..).zip(REQUESTS).filter(move |(_, row)| (row.0, row.3) == (group, key));
        for (group, _, _, requests, faults) in REQUESTS {
            let sum: u64 = rows(*group, *requests).map(|(number, _)| number).sum();
            let all: u64 = rows(*group, *requests).map(|(number, _)| 100 + number).sum();
            assert_eq!(line[group][requests], sum, "{group}.{requests}");
            assert!(faults.is_none_or(|key| line[group][key] == all), "{group} {faults:?}");
        }
        assert_eq!(line["deprecated_api"]["deprecated_http_api_calls"], 50);
    }

    #[test]
    fn every_endpoint_and_method_is_counted_somewhere() {
        for (endpoint, path, methods) in api_socket::routes::ENDPOINTS {
            for method in *methods {
                let rows = REQUESTS.iter().filter(|row| row.1 == *method && row.2 == *endpoint).count();
                assert_eq!(rows, 1, "{} {path}", method.as_str());
            }
        }
    }

    #[test]
    fn the_serial_port_is_counted() {
        let mut fixture = fixture(Identity::Firecracker);
        let (uart, dropped) = (Arc::new(serial::Counters::default()), Arc::new(AtomicU64::new(4)));
        uart.read.store(1, Ordering::Relaxed);
        uart.written.store(2, Ordering::Relaxed);
        uart.lost.store(3, Ordering::Relaxed);
        fixture.metrics.add_uart(uart, dropped);
        let line = fixture.line();
        let told =
            ["read_count", "write_count", "missed_write_count", "error_count", "rate_limiter_dropped_bytes"];
        assert_eq!(told.map(|key| &line["uart"][key]), [1, 2, 3, 3, 4]);
    }

    #[test]
    fn drives_and_the_entropy_device_are_counted() {
        let mut fixture = fixture(Identity::Firecracker);
        let (disk, random) = (Arc::new(blk::Counters::default()), Arc::new(rng::Counters::default()));
        disk.write_bytes.store(512, Ordering::Relaxed);
        disk.write_time.add(Instant::now() - Duration::from_micros(900));
        random.entropy_bytes.store(64, Ordering::Relaxed);
        fixture.metrics.add_block("data", disk);
        fixture.metrics.add_entropy(random);
        let line = fixture.line();
        assert_eq!(line["block_data"]["write_bytes"], 512);
        assert!(line["block_data"]["write_agg"]["sum_us"].as_u64() >= Some(900));
        assert_eq!(line["block"]["write_bytes"], 512);
        assert_eq!(line["entropy"]["entropy_bytes"], 64);
    }

    #[test]
    fn the_id_and_the_properties_are_written_when_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics");
        let mut metrics = Metrics::new(Identity::Firecracker, "vm-1");
        let properties = BTreeMap::from([("customer".to_string(), "7".to_string())]);
        metrics
            .open(
                &api_socket::Metrics { emit_id: true, properties: Some(properties), ..config(&path) },
                &Handed::default(),
            )
            .unwrap();
        let mut fixture = Fixture { _dir: dir, path, metrics };
        let line = fixture.line();
        assert_eq!(line["id"], "vm-1");
        assert_eq!(line["properties"], json!({"customer": "7"}));
    }

    #[test]
    fn a_line_has_the_time_in_milliseconds() {
        let mut fixture = fixture(Identity::Firecracker);
        let before = now_ms();
        let told = fixture.line()["utc_timestamp_ms"].as_u64().unwrap();
        assert!((before..=now_ms()).contains(&told));
        assert!(fixture.text().starts_with("{\"utc_timestamp_ms\":"));
    }

    #[test]
    fn the_start_is_measured_from_what_the_starter_said() {
        let mut fixture = fixture(Identity::Firecracker);
        fixture.metrics.started(&StartTimes::default());
        let zero = json!({"process_startup_time_us": 0, "process_startup_time_cpu_us": 0});
        assert_eq!(fixture.line()["api_server"], zero);
        let ago = clock_us(libc::CLOCK_MONOTONIC) - 1_000_000;
        fixture.metrics.started(&StartTimes {
            wall_us: Some(ago),
            cpu_us: Some(0),
            parent_cpu_us: Some(10_000_000),
        });
        let line = fixture.line();
        assert!(line["api_server"]["process_startup_time_us"].as_u64().unwrap() >= 1_000_000);
        assert!(line["api_server"]["process_startup_time_cpu_us"].as_u64().unwrap() >= 10_000_000);
        // A start in the future is nobody's measure.
        fixture.metrics.started(&StartTimes {
            wall_us: Some(u64::MAX),
            cpu_us: Some(u64::MAX),
            parent_cpu_us: None,
        });
        assert_eq!(fixture.line()["api_server"], zero);
    }

    #[test]
    fn without_a_file_nothing_is_written_and_nothing_is_wrong() {
        assert_eq!(Metrics::new(Identity::Berth, "").flush(), Ok(false));
    }

    #[test]
    fn a_second_set_up_and_a_path_that_cannot_be_opened_are_refused() {
        let mut fixture = fixture(Identity::Berth);
        let other = fixture.path.with_file_name("other");
        let fault = fixture.metrics.open(&config(&other), &Handed::default()).unwrap_err();
        assert_eq!(fault.status, 400);
        assert!(fault.message.contains("other") && fault.message.contains("once"), "{fault}");
        assert!(!other.exists());

        let mut metrics = Metrics::new(Identity::Berth, "");
        let fault = metrics.open(&config(&fixture.path.join("no")), &Handed::default()).unwrap_err();
        assert!(fault.message.contains("metrics_path") && fault.message.contains("/no"), "{fault}");
        metrics.open(&config(&other), &Handed::default()).unwrap();
    }

    #[test]
    fn a_line_that_nobody_takes_is_missed_and_its_counts_come_later() {
        use std::io::Read;
        let (mut end, pipe) = std::io::pipe().unwrap();
        let name = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&pipe));
        let mut metrics = Metrics::new(Identity::Firecracker, "");
        metrics.open(&config(Path::new(&name)), &Handed::default()).unwrap();
        let exits = Arc::new(ExitCounters::default());
        metrics.add_vcpus(exits.clone());
        let mut taken = 0;
        let fault = loop {
            exits.port_in.fetch_add(1, Ordering::Relaxed);
            match metrics.flush() {
                Ok(_) => taken += 1,
                Err(fault) => break fault,
            }
        };
        assert!(fault.message.contains("cannot be written"), "{fault}");
        drop(pipe);
        let mut seen = vec![0; 1 << 16];
        let count = end.read(&mut seen).unwrap();
        metrics.flush().unwrap();
        metrics.output = None;
        let mut rest = Vec::new();
        end.read_to_end(&mut rest).unwrap();
        seen.truncate(count);
        seen.extend(rest);
        let lines: Vec<Value> = String::from_utf8(seen)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), taken + 1);
        assert_eq!(lines[taken]["vcpu"]["exit_io_in"], 1);
        assert_eq!(lines[taken]["logger"]["missed_metrics_count"], 1);
        let total: u64 = lines.iter().map(|line| line["vcpu"]["exit_io_in"].as_u64().unwrap()).sum();
        assert_eq!(total, taken as u64 + 1);
    }
}
