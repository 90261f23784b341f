//! KVM's tracepoints: which exits a boot takes, and when the guest first runs.
//!
//! There must be no other guest in this host, whose events would be counted too.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::Path;

use berth_tests::host::error::{Doing, Error, Result};
use rustix::mount::{MountFlags, mount};

/// Holds a boot's events more than ten times over.
const BUFFER_KIB: u32 = 32 << 10;

const TRACEFS: &str = "/sys/kernel/tracing";

/// The data port of the first serial line.
const SERIAL_DATA: &str = "0x3f8";

/// KVM's names, with SVM and with VMX, for an interrupt of the host and for a guest that can take its own at last.
const OF_TIME: [&str; 4] = ["interrupt", "vintr", "EXTERNAL_INTERRUPT", "INTERRUPT_WINDOW"];

/// IA32_TSC_DEADLINE, with which a guest sets its timer.
const TSC_DEADLINE: &str = "6e0";

/// What is counted without a record of each, by thread: exits, those to user space, and system calls.
const COUNTED: [&str; 3] = ["kvm/kvm_exit", "kvm/kvm_userspace_exit", "raw_syscalls/sys_enter"];
const BY_THREAD: &str = "hist:keys=common_pid";

/// The kernel's trace buffer. Stamps are of the monotonic clock.
#[derive(Debug)]
pub struct Trace(());

/// Exits up to a moment.
#[derive(Debug, Default)]
pub struct Exits {
    pub all: u64,
    pub to_user_space: u64,
    /// Those of [`Exits::all`] that come with the passing of time: the host's interrupts, the guest's timer.
    pub of_time: u64,
    /// All of them by the processor's reason, as KVM names it.
    pub by_reason: BTreeMap<String, u64>,
    /// Those to user space by port, by page of physical addresses, or by KVM's reason.
    pub by_target: BTreeMap<String, u64>,
}

/// How often some threads did what is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    pub exits: u64,
    pub user_exits: u64,
    pub calls: u64,
}

impl Counted {
    pub fn since(self, before: &Counted) -> Counted {
        Counted {
            exits: self.exits.saturating_sub(before.exits),
            user_exits: self.user_exits.saturating_sub(before.user_exits),
            calls: self.calls.saturating_sub(before.calls),
        }
    }
}

impl Trace {
    /// # Errors
    /// This kernel has no tracefs, or no KVM in it; or this is not root.
    pub fn open() -> Result<Trace> {
        if !Path::new(TRACEFS).join("trace_clock").exists() {
            mount("tracefs", TRACEFS, "tracefs", MountFlags::empty(), None)
                .doing(|| format!("cannot mount tracefs at {TRACEFS}"))?;
        }
        let trace = Trace(());
        trace.write("tracing_on", "0")?;
        trace.write("trace_clock", "mono")?;
        trace.write("buffer_size_kb", &BUFFER_KIB.to_string())?;
        Ok(trace)
    }

    /// Begins to record the first entry into a guest, and nothing else.
    pub fn record_first_entry(&self) -> Result<()> {
        self.record(&["kvm_entry"])?;
        // The trigger acts once. It must be taken away to be set again.
        self.write("events/kvm/kvm_entry/trigger", "traceoff:1")
    }

    /// Ends what [`Trace::record_first_entry`] began: when the guest was entered, in µs of the monotonic clock.
    pub fn first_entry(&self) -> Result<u64> {
        self.write("tracing_on", "0")?;
        self.write("events/kvm/kvm_entry/trigger", "!traceoff:1")?;
        let text = self.read()?;
        let entry = events(&text).find(|event| event.name == "kvm_entry");
        entry.and_then(|event| event.stamp_us()).ok_or_else(|| Error("no guest was entered".into()))
    }

    /// Begins to record exits and the accesses that caused them.
    pub fn record_exits(&self) -> Result<()> {
        self.record(&["kvm_exit", "kvm_userspace_exit", "kvm_pio", "kvm_mmio", "kvm_msr"])
    }

    /// Ends what [`Trace::record_exits`] began: the exits before the guest wrote the first byte of `marker` to its
    /// serial line.
    pub fn exits_until(&self, marker: &str) -> Result<Exits> {
        self.write("tracing_on", "0")?;
        Exits::until(&self.read()?, marker)
    }

    /// Begins to count.
    pub fn count(&self) -> Result<()> {
        COUNTED.iter().try_for_each(|event| self.write(&format!("events/{event}/trigger"), BY_THREAD))
    }

    /// What these threads did since [`Trace::count`].
    pub fn counted(&self, threads: &HashSet<u32>) -> Result<Counted> {
        let count = |event: &str| {
            let path = Path::new(TRACEFS).join("events").join(event).join("hist");
            let text = fs::read_to_string(&path).doing(|| format!("cannot read {}", path.display()))?;
            Ok(hits(&text, threads))
        };
        let [exits, user_exits, calls] = COUNTED.map(count);
        Ok(Counted { exits: exits?, user_exits: user_exits?, calls: calls? })
    }

    /// Ends what [`Trace::count`] began.
    pub fn end_count(&self) -> Result<()> {
        let end = format!("!{BY_THREAD}");
        COUNTED.iter().try_for_each(|event| self.write(&format!("events/{event}/trigger"), &end))
    }

    fn record(&self, names: &[&str]) -> Result<()> {
        self.write("tracing_on", "0")?;
        self.write("events/enable", "0")?;
        self.write("trace", "")?;
        for name in names {
            self.write(&format!("events/kvm/{name}/enable"), "1")?;
        }
        self.write("tracing_on", "1")
    }

    fn read(&self) -> Result<String> {
        let path = Path::new(TRACEFS).join("trace");
        let text = fs::read_to_string(&path).doing(|| format!("cannot read {}", path.display()))?;
        is_complete(&text).then_some(text).ok_or_else(|| Error("the trace buffer is too small".into()))
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = Path::new(TRACEFS).join(name);
        fs::write(&path, text).doing(|| format!("cannot write {text:?} to {}", path.display()))
    }
}

/// Lines are `{ common_pid:       1234 } hitcount:         56`.
fn hits(histogram: &str, threads: &HashSet<u32>) -> u64 {
    let line = |line: &str| {
        let (thread, hits) = line.strip_prefix("{ common_pid:")?.split_once("} hitcount:")?;
        threads.contains(&thread.trim().parse().ok()?).then(|| hits.trim().parse::<u64>().ok())?
    };
    histogram.lines().filter_map(line).sum()
}

/// The head of a trace says `entries-in-buffer/entries-written: N/N   #P:1`.
fn is_complete(trace: &str) -> bool {
    let count = trace.lines().find_map(|line| line.strip_prefix("# entries-in-buffer/entries-written: "));
    let count = count.and_then(|count| count.split_whitespace().next()?.split_once('/'));
    count.is_some_and(|(kept, written)| kept == written)
}

impl Exits {
    fn until(trace: &str, marker: &str) -> Result<Exits> {
        let events: Vec<_> = events(trace).collect();
        let end = marker_position(&events, marker)
            .ok_or_else(|| Error(format!("the trace does not have {marker:?} on the serial line")))?;
        let mut exits = Exits::default();
        let (mut reason, mut port, mut page) = ("", String::new(), String::new());
        for event in events.iter().take(end) {
            match event.name {
                "kvm_exit" => {
                    reason = event.after("reason").unwrap_or("?");
                    port =
                        event.number_after("info1").map_or("?".into(), |info| format!("{:#x}", info >> 16));
                    exits.all += 1;
                    exits.of_time += u64::from(OF_TIME.contains(&reason));
                    *exits.by_reason.entry(reason.into()).or_default() += 1;
                }
                // It follows the exit that it is the reason of.
                "kvm_msr" if event.after("msr_write") == Some(TSC_DEADLINE) => {
                    exits.of_time += 1;
                    *exits.by_reason.entry("msr: timer".into()).or_default() += 1;
                    exits.by_reason.entry(reason.into()).and_modify(|count| *count -= 1);
                }
                "kvm_mmio" => {
                    page = event.number_after("gpa").map_or("?".into(), |gpa| format!("{:#x}", gpa & !0xfff));
                }
                "kvm_userspace_exit" => {
                    let target = match event.after("reason").unwrap_or("?") {
                        // In the first word on an I/O exit, VMX and SVM both have the port in bits 16 to 31.
                        "KVM_EXIT_IO" => format!("port {port}"),
                        "KVM_EXIT_MMIO" => format!("page {page}"),
                        other => format!("{other} ({reason})"),
                    };
                    exits.to_user_space += 1;
                    *exits.by_target.entry(target).or_default() += 1;
                }
                _ => {}
            }
        }
        Ok(exits)
    }
}

/// Which event is the write of the first byte of `marker`.
fn marker_position(events: &[Event<'_>], marker: &str) -> Option<usize> {
    let written: Vec<_> = events
        .iter()
        .enumerate()
        .filter(|(_, event)| event.name == "kvm_pio" && event.text.starts_with("pio_write"))
        .filter(|(_, event)| event.after("at") == Some(SERIAL_DATA))
        .filter_map(|(position, event)| Some((position, event.number_after("val")?)))
        .collect();
    let is_marker =
        |window: &&[(usize, u64)]| window.iter().map(|(_, byte)| *byte).eq(marker.bytes().map(u64::from));
    written.windows(marker.len()).find(is_marker)?.first().map(|(position, _)| *position)
}

/// A line such as `qemu-179 [000] d..1. 5.456896: kvm_entry: vcpu 0, rip 0xfff0`.
#[derive(Debug)]
struct Event<'a> {
    stamp: &'a str,
    name: &'a str,
    text: &'a str,
}

fn events(trace: &str) -> impl Iterator<Item = Event<'_>> {
    trace.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
        let (head, rest) = line.split_once(": ")?;
        let (name, text) = rest.split_once(": ")?;
        Some(Event { stamp: head.split_whitespace().next_back()?, name, text })
    })
}

impl<'a> Event<'a> {
    /// The word that follows `word`.
    fn after(&self, word: &str) -> Option<&'a str> {
        let mut words = self.text.split_whitespace();
        words.find(|candidate| *candidate == word)?;
        words.next()
    }

    fn number_after(&self, word: &str) -> Option<u64> {
        let number = self.after(word)?;
        u64::from_str_radix(number.strip_prefix("0x").unwrap_or(number), 16).ok()
    }

    /// Stamps are seconds with six decimals.
    fn stamp_us(&self) -> Option<u64> {
        let (seconds, micros) = self.stamp.split_once('.')?;
        Some(seconds.parse::<u64>().ok()? * 1_000_000 + micros.parse::<u64>().ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
# tracer: nop
#
# entries-in-buffer/entries-written: 15/15   #P:1
#
 vmm-7 [000] d..1.     5.000001: kvm_exit: vcpu 0 reason io rip 0x1 info1 0x000000000cf80040 info2 0x2
 vmm-7 [000] .....     5.000002: kvm_pio: pio_write at 0xcf8 size 4 count 1 val 0x42
 vmm-7 [000] .....     5.000003: kvm_userspace_exit: reason KVM_EXIT_IO (2)
 vmm-7 [000] d..1.     5.000004: kvm_exit: vcpu 0 reason npf rip 0x1 info1 0xe info2 0x00000000fec00010
 vmm-7 [000] .....     5.000005: kvm_mmio: mmio unsatisfied-read len 4 gpa 0xfec00010 val 0x0
 vmm-7 [000] .....     5.000006: kvm_userspace_exit: reason KVM_EXIT_MMIO (6)
 vmm-7 [000] d..1.     5.000007: kvm_exit: vcpu 0 reason msr rip 0x1 info1 0x1 info2 0x0
 vmm-7 [000] .....     5.000007: kvm_msr: msr_write 6e0 = 0x1234
 vmm-7 [000] d..1.     5.000007: kvm_exit: vcpu 0 reason msr rip 0x1 info1 0x1 info2 0x0
 vmm-7 [000] .....     5.000007: kvm_msr: msr_write 10 = 0x1234
 vmm-7 [000] d..1.     5.000007: kvm_exit: vcpu 0 reason interrupt rip 0x1 info1 0x1 info2 0x0
 vmm-7 [000] .....     5.000008: kvm_pio: pio_write at 0x3f8 size 1 count 1 val 0x42
 vmm-7 [000] .....     6.000009: kvm_pio: pio_write at 0x3f8 size 1 count 1 val 0x42
 vmm-7 [000] d..1.     6.000010: kvm_exit: vcpu 0 reason io rip 0x1 info1 0x0000000003f80010 info2 0x2
 vmm-7 [000] .....     6.000011: kvm_pio: pio_write at 0x3f8 size 1 count 1 val 0x45
";

    #[test]
    fn exits_are_counted_up_to_the_first_byte_of_the_marker() {
        let exits = Exits::until(TRACE, "BE").unwrap();
        assert_eq!((exits.all, exits.to_user_space, exits.of_time), (5, 2, 2));
        let reasons = [("interrupt", 1), ("io", 1), ("msr", 1), ("msr: timer", 1), ("npf", 1)]
            .map(|(name, count)| (name.to_owned(), count));
        assert_eq!(exits.by_reason, reasons.into());
        let targets = [("page 0xfec00000", 1), ("port 0xcf8", 1)].map(|(name, n)| (name.to_owned(), n));
        assert_eq!(exits.by_target, targets.into());
    }

    #[test]
    fn a_trace_without_the_marker_is_an_error() {
        assert!(Exits::until(TRACE, "BERTH").is_err());
    }

    #[test]
    fn a_trace_that_lost_its_beginning_is_not_complete() {
        assert!(is_complete(TRACE));
        assert!(!is_complete(&TRACE.replace("15/15", "15/16")));
        assert!(!is_complete(""));
    }

    #[test]
    fn a_histogram_is_summed_over_the_threads_that_are_asked_for() {
        let text = "# trigger info: hist:keys=common_pid:vals=hitcount:sort=hitcount:size=2048 [active]\n\n\n\
            { common_pid:       1234 } hitcount:         56\n{ common_pid:          7 } hitcount:          1\n\
            { common_pid:          8 } hitcount:        100\n\nTotals:\n    Hits: 157\n";
        assert_eq!(hits(text, &HashSet::from([1234, 7, 9])), 57);
    }

    #[test]
    fn stamps_are_microseconds() {
        assert_eq!(events(TRACE).next().unwrap().stamp_us(), Some(5_000_001));
    }
}
