//! The rules of a balloon's numbers.

use api_socket::Fault;

use crate::memory::ByteSize;

/// Most MiB that a balloon can have: it counts pages of 4 KiB in 32 bits.
const MAX_MIB: u32 = u32::MAX >> 8;

/// Checks how much a guest with so much memory is to give up.
pub fn check_amount(amount_mib: u32, memory: ByteSize) -> Result<(), Fault> {
    let most = memory.mib().min(MAX_MIB.into());
    if u64::from(amount_mib) <= most {
        return Ok(());
    }
    Err(Fault::bad_request(format!(
        "`amount_mib` is {amount_mib}; it must be at most {most}, which is all that the guest can give."
    )))
}

/// Checks the memory of a guest that is to give up so much.
pub fn check_memory(amount_mib: u32, memory: ByteSize) -> Result<(), Fault> {
    if u64::from(amount_mib) <= memory.mib() {
        return Ok(());
    }
    Err(Fault::bad_request(format!(
        "`mem_size_mib` is {}; it must be at least {amount_mib}, the `amount_mib` of the balloon. Make the balloon smaller \
         first.",
        memory.mib()
    )))
}

/// Checks that statistics stay on, or off: whether there are any was agreed on with the guest's driver.
pub fn check_interval(before: u16, interval: u16) -> Result<(), Fault> {
    let rule = match (before, interval) {
        (0, 1..) => "the guest started with 0, which is without statistics, and they cannot be switched on",
        (1.., 0) => "the guest started with statistics, which cannot be switched off; give at least 1",
        _ => return Ok(()),
    };
    Err(Fault::bad_request(format!("`stats_polling_interval_s` is {interval}: {rule}.")))
}

/// There is no balloon.
pub fn none() -> Fault {
    Fault::bad_request("This guest has no balloon; PUT /balloon before the start gives it one.")
}
