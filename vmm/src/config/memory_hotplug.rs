//! The rules of memory that comes and goes: its sizes fit each other. Whether the guest's CPUs reach so far is seen when it
//! starts.

use api_socket::{Fault, MemoryHotplugConfig};
use devices::virtio::mem::MAX_BLOCKS;

use super::check_io_thread;
use crate::memory::ByteSize;

/// Least MiB of a block: a huge page, so that no page is half plugged.
const MIN_BLOCK_MIB: u64 = 2;
/// Least MiB of a slot: Linux adds no smaller parts.
const MIN_SLOT_MIB: u64 = 128;
/// Most slots, each one of KVM's, and a mapping of this process while its neighbours are not in: the kernel allows 65530
/// of these.
pub const MAX_SLOTS: u64 = 16384;

/// Sizes that fit each other, in bytes and as they were given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryHotplug {
    pub settings: MemoryHotplugConfig,
    pub total: ByteSize,
    pub slot: ByteSize,
    pub block: ByteSize,
}

impl MemoryHotplug {
    /// Checks what a client wants.
    pub fn new(settings: MemoryHotplugConfig) -> Result<MemoryHotplug, Fault> {
        let MemoryHotplugConfig {
            total_size_mib: total,
            slot_size_mib: slot,
            block_size_mib: block,
            io_thread,
        } = settings;
        check_io_thread(io_thread)?;
        if !block.is_power_of_two() || block < MIN_BLOCK_MIB {
            return refuse("block_size_mib", block, &format!("a power of two, and at least {MIN_BLOCK_MIB}"));
        }
        if slot < MIN_SLOT_MIB || !slot.is_multiple_of(block) {
            let rule = format!("at least {MIN_SLOT_MIB}, and a multiple of {block}, the `block_size_mib`");
            return refuse("slot_size_mib", slot, &rule);
        }
        if total == 0 || !total.is_multiple_of(slot) {
            let rule = format!("a multiple of {slot}, the `slot_size_mib`, and not 0");
            return refuse("total_size_mib", total, &rule);
        }
        if total / block > MAX_BLOCKS {
            let rule = format!("at most {MAX_BLOCKS} blocks; give a larger `block_size_mib` than {block}");
            return refuse("total_size_mib", total, &rule);
        }
        if total / slot > MAX_SLOTS {
            let rule = format!("at most {MAX_SLOTS} slots; give a larger `slot_size_mib` than {slot}");
            return refuse("total_size_mib", total, &rule);
        }
        match [total, slot, block].map(ByteSize::of_mib) {
            [Some(total), Some(slot), Some(block)] => Ok(MemoryHotplug { settings, total, slot, block }),
            _ => refuse("total_size_mib", total, "less; no guest has addresses for so much"),
        }
    }

    /// Checks how much is to be plugged.
    pub fn check_requested(&self, mib: u64) -> Result<ByteSize, Fault> {
        let (total, block) = (self.total.mib(), self.block.mib());
        ByteSize::of_mib(mib).filter(|size| *size <= self.total && mib.is_multiple_of(block)).ok_or_else(|| {
            Fault::bad_request(format!(
                "`requested_size_mib` is {mib}; it must be at most {total}, the `total_size_mib`, and a multiple of {block}, \
                 the `block_size_mib`."
            ))
        })
    }
}

fn refuse(field: &str, value: u64, rule: &str) -> Result<MemoryHotplug, Fault> {
    Err(Fault::bad_request(format!("`{field}` is {value}; it must be {rule}.")))
}

/// There is no such memory.
pub fn none() -> Fault {
    Fault::bad_request(
        "This guest has no memory that can be plugged; PUT /hotplug/memory before the start gives it some.",
    )
}
