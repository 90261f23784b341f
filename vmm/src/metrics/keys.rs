//! The keys that Firecracker 1.17 writes on x86_64, by group. Data; a client that checks strictly takes no other.

/// A key that ends so is an object of [`AGGREGATED`].
pub const AGGREGATE: &str = "_agg";
/// The least and the most since the start, and the sum since the last line.
pub const AGGREGATED: [&str; 3] = ["min_us", "max_us", "sum_us"];

/// The keys of a group, none for one that Firecracker does not have.
pub fn of(group: &str) -> &'static [&'static str] {
    KEYS.iter().chain([&OF_ONE]).find(|(name, _)| *name == group).map_or(&[], |(_, keys)| keys)
}

/// Whether Firecracker writes this key, which may be `a.b` for `b` in `a`.
pub fn knows(group: &str, key: &str) -> bool {
    let outer = key.split_once('.').map_or(key, |(outer, _)| outer);
    of(group).contains(&outer)
}

/// Whether the key is a value as it is now. The others count up, and what is written is what came since the last line.
pub fn is_measured(group: &str, key: &str) -> bool {
    match group {
        "api_server" | "latencies_us" | "seccomp" | "vmm" => true,
        "signals" => key != "sigpipe",
        _ if group.starts_with(VHOST_USER_BLOCK) => key.ends_with("_time_us"),
        _ => key.ends_with(".min_us") || key.ends_with(".max_us"),
    }
}

/// Whether the value goes into the group of all too, where it is of a device `with_id`. The least and the most of several
/// devices do not add up; Firecracker writes 0 there, so do we.
pub fn is_summed(group: &str, key: &str, with_id: bool) -> bool {
    group != VHOST_USER_BLOCK && !(with_id && is_measured(group, key))
}

/// The group of a drive that another process serves, with its id behind it.
pub const VHOST_USER_BLOCK: &str = "vhost_user_block";
/// There is none of all such drives.
const OF_ONE: (&str, &[&str]) = (
    VHOST_USER_BLOCK,
    &["activate_fails", "cfg_fails", "init_time_us", "activate_time_us", "config_change_time_us"],
);

/// See the module.
#[rustfmt::skip]
pub const KEYS: &[(&str, &[&str])] = &[
    ("api_server", &["process_startup_time_us", "process_startup_time_cpu_us"]),
    ("balloon", &[
        "activate_fails", "inflate_count", "stats_updates_count", "stats_update_fails", "deflate_count", "event_fails",
        "free_page_report_count", "free_page_report_freed", "free_page_report_fails", "free_page_hint_count",
        "free_page_hint_freed", "free_page_hint_fails",
    ]),
    ("block", &[
        "activate_fails", "cfg_fails", "no_avail_buffer", "event_fails", "execute_fails", "invalid_reqs_count",
        "flush_count", "queue_event_count", "rate_limiter_event_count", "update_count", "update_fails", "read_bytes",
        "write_bytes", "read_count", "write_count", "read_agg", "write_agg", "rate_limiter_throttled_events",
        "io_engine_throttled_events", "remaining_reqs_count",
    ]),
    ("deprecated_api", &["deprecated_http_api_calls"]),
    ("entropy", &[
        "activate_fails", "entropy_event_fails", "entropy_event_count", "entropy_bytes", "host_rng_fails",
        "entropy_rate_limiter_throttled", "rate_limiter_event_count",
    ]),
    ("get_api_requests", &[
        "instance_info_count", "machine_cfg_count", "mmds_count", "vmm_version_count", "hotplug_memory_count",
    ]),
    ("i8042", &[
        "error_count", "missed_read_count", "missed_write_count", "read_count", "reset_count", "write_count",
    ]),
    ("interrupts", &["triggers", "config_updates"]),
    ("latencies_us", &[
        "full_create_snapshot", "diff_create_snapshot", "load_snapshot", "pause_vm", "resume_vm",
        "vmm_full_create_snapshot", "vmm_diff_create_snapshot", "vmm_load_snapshot", "vmm_pause_vm", "vmm_resume_vm",
    ]),
    ("logger", &["missed_metrics_count", "metrics_fails", "missed_log_count", "rate_limited_log_count"]),
    ("memory_hotplug", &[
        "activate_fails", "queue_event_fails", "queue_event_count", "plug_agg", "plug_count", "plug_bytes",
        "plug_fails", "unplug_agg", "unplug_count", "unplug_bytes", "unplug_fails", "unplug_discard_fails",
        "unplug_all_agg", "unplug_all_count", "unplug_all_fails", "state_agg", "state_count", "state_fails",
    ]),
    ("mmds", &[
        "rx_accepted", "rx_accepted_err", "rx_accepted_unusual", "rx_bad_eth", "rx_invalid_token", "rx_no_token",
        "rx_count", "tx_bytes", "tx_count", "tx_errors", "tx_frames", "connections_created", "connections_destroyed",
    ]),
    ("net", &[
        "activate_fails", "cfg_fails", "mac_address_updates", "no_rx_avail_buffer", "no_tx_avail_buffer",
        "event_fails", "rx_queue_event_count", "rx_event_rate_limiter_count", "rx_rate_limiter_throttled",
        "rx_tap_event_count", "rx_bytes_count", "rx_packets_count", "rx_fails", "rx_count", "tap_read_fails",
        "tap_write_fails", "tap_write_agg", "tx_bytes_count", "tx_malformed_frames", "tx_fails", "tx_count",
        "tx_packets_count", "tx_queue_event_count", "tx_rate_limiter_event_count", "tx_rate_limiter_throttled",
        "tx_spoofed_mac_count", "tx_remaining_reqs_count",
    ]),
    ("patch_api_requests", &[
        "drive_count", "drive_fails", "network_count", "network_fails", "machine_cfg_count", "machine_cfg_fails",
        "mmds_count", "mmds_fails", "hotplug_memory_count", "hotplug_memory_fails", "pmem_count", "pmem_fails",
    ]),
    ("pmem", &[
        "activate_fails", "cfg_fails", "event_fails", "queue_event_count", "rate_limiter_throttled_events",
        "rate_limiter_event_count",
    ]),
    ("put_api_requests", &[
        "actions_count", "actions_fails", "boot_source_count", "boot_source_fails", "drive_count", "drive_fails",
        "logger_count", "logger_fails", "machine_cfg_count", "machine_cfg_fails", "cpu_cfg_count", "cpu_cfg_fails",
        "metrics_count", "metrics_fails", "network_count", "network_fails", "mmds_count", "mmds_fails",
        "vsock_count", "vsock_fails", "pmem_count", "pmem_fails", "serial_count", "serial_fails",
        "hotplug_memory_count", "hotplug_memory_fails",
    ]),
    ("seccomp", &["num_faults"]),
    ("signals", &["sigbus", "sigsegv", "sigxfsz", "sigxcpu", "sigpipe", "sighup", "sigill"]),
    ("uart", &[
        "error_count", "flush_count", "missed_read_count", "missed_write_count", "read_count", "write_count",
        "rate_limiter_dropped_bytes",
    ]),
    ("vcpu", &[
        "exit_io_in", "exit_io_out", "exit_mmio_read", "exit_mmio_write", "failures", "kvmclock_ctrl_fails",
        "exit_io_in_agg", "exit_io_out_agg", "exit_mmio_read_agg", "exit_mmio_write_agg",
    ]),
    ("vmm", &["panic_count"]),
    ("vsock", &[
        "activate_fails", "cfg_fails", "rx_queue_event_fails", "tx_queue_event_fails", "ev_queue_event_fails",
        "muxer_event_fails", "conn_event_fails", "rx_queue_event_count", "tx_queue_event_count", "rx_bytes_count",
        "tx_bytes_count", "rx_packets_count", "tx_packets_count", "conns_added", "conns_killed", "conns_removed",
        "killq_resync", "tx_flush_fails", "tx_write_fails", "rx_read_fails",
    ]),
];
