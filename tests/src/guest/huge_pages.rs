//! Pages of 2 MiB that the host sets aside for guests, as long as a test wants them, or gives to who asks.

use std::fs;

const COUNT: &str = "/proc/sys/vm/nr_hugepages";

/// Pages that were set aside. They are given back when it is dropped.
pub struct HugePages {
    before: u64,
}

impl HugePages {
    /// Sets `count` pages of 2 MiB aside, beside those of others.
    #[track_caller]
    pub fn set_aside(count: u64) -> HugePages {
        // What other tests have read from disks is in the way of memory in one piece.
        fs::write("/proc/sys/vm/drop_caches", "3").expect("caches of the host");
        fs::write("/proc/sys/vm/compact_memory", "1").expect("memory of the host");
        let before = read();
        fs::write(COUNT, (before + count).to_string()).expect("a number of huge pages");
        assert_eq!(read(), before + count, "the host has no {count} pages of 2 MiB in one piece each");
        HugePages { before }
    }

    /// How many of the host's are in use.
    pub fn used() -> u64 {
        let text = fs::read_to_string("/proc/meminfo").expect("the host's memory");
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|value| value.trim().parse::<u64>().ok()).expect("a number of huge pages")
        };
        value("HugePages_Total") - value("HugePages_Free")
    }
}

/// Lets memory in files have huge pages where they are asked for, from now on. Without them a guest with such memory takes a
/// fault for each small page, which in a nested host is most of its time.
#[track_caller]
pub fn allow_in_shared_memory() {
    const POLICY: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    fs::write(POLICY, "advise").expect("the host's policy for huge pages");
}

fn read() -> u64 {
    fs::read_to_string(COUNT).expect("the number of huge pages").trim().parse().expect("a number")
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(COUNT, self.before.to_string());
    }
}
