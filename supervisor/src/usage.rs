//! What a guest uses, by its control group and its network interface.

use std::path::Path;

use api_socket::fleet::Stats;

use crate::cell::Places;
use crate::network;

/// Now; zeros where the host does not tell.
pub fn of(places: &Places, name: &str) -> Stats {
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    let group = |file: &str| read(&places.group.join(file));
    let io = group("io.stat");
    // What the host's end receives, the guest has sent.
    let interface = Path::new("/sys/class/net").join(network::tap_name(&places.id)).join("statistics");
    Stats {
        id: places.id.clone(),
        name: name.to_owned(),
        at: crate::events::now(),
        cpu_microseconds: keyed(&group("cpu.stat"), "usage_usec"),
        memory_bytes: number(&group("memory.current")),
        read_bytes: nested(&io, "rbytes"),
        written_bytes: nested(&io, "wbytes"),
        received_bytes: number(&read(&interface.join("tx_bytes"))),
        sent_bytes: number(&read(&interface.join("rx_bytes"))),
    }
}

/// The host has ended processes of the guest's group for want of memory.
pub fn ran_out_of_memory(places: &Places) -> bool {
    let events = std::fs::read_to_string(places.group.join("memory.events")).unwrap_or_default();
    keyed(&events, "oom_kill") > 0
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

/// Of a flat keyed file: `KEY VALUE`.
fn keyed(text: &str, key: &str) -> u64 {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    value.map_or(0, number)
}

/// The sum over all lines of a nested keyed file: `DEVICE KEY=VALUE KEY=VALUE`.
fn nested(text: &str, key: &str) -> u64 {
    let values = text.split_whitespace().filter_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    values.map(number).fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_files_are_read_as_it_writes_them() {
        assert_eq!(keyed("usage_usec 17\nuser_usec 9\n", "usage_usec"), 17);
        assert_eq!(keyed("oom 3\noom_kill 1\n", "oom_kill"), 1);
        assert_eq!(keyed("", "usage_usec"), 0);
        let io = "254:0 rbytes=10 wbytes=3 rios=1\n254:16 rbytes=5 wbytes=0 dbytes=9\n";
        assert_eq!((nested(io, "rbytes"), nested(io, "wbytes")), (15, 3));
        assert_eq!(number("4096\n"), 4096);
    }
}
