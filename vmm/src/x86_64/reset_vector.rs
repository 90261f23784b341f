//! The code at the end of the first MiB, where a PC has its firmware's first instruction: it resets the machine.
//!
//! A kernel that goes back to real mode and jumps there wants a reset. Linux does so by default on a hardware-reduced ACPI
//! machine: it counts on UEFI there, tries that before the ACPI reset register, and then this. Without code here it would
//! run through empty memory for ever.
//!
//! Not firmware: nothing else of a BIOS is there.

use devices::acpi_pm;
use devices::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;

/// Writes the code to [`layout::RESET_VECTOR`]. Before the guest runs.
pub fn write(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    ram.write_slice(&code(), GuestAddress(layout::RESET_VECTOR))
}

/// 16-bit instructions; the ACPI reset register is a port.
#[rustfmt::skip]
fn code() -> [u8; 9] {
    let [low, high] = ((layout::ACPI_PM.start + acpi_pm::RESET) as u16).to_le_bytes();
    [
        0xb0, acpi_pm::RESET_VALUE, // mov al, RESET_VALUE
        0xba, low, high, // mov dx, RESET
        0xee, // out dx, al
        0xf4, // hlt, which is not reached
        0xeb, 0xfd, // jmp to the hlt
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_writes_the_reset_value_to_the_reset_register() {
        assert_eq!(code(), [0xb0, 0x01, 0xba, 0x02, 0x06, 0xee, 0xf4, 0xeb, 0xfd]);
    }
}
