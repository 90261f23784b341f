//! The register that a guest writes to say that it has booted (`--boot-timer`): Firecracker's, which its guests' init
//! programs know.

use devices::bus::{BusDevice, Effect};

use crate::metrics::clock_us;
use crate::x86_64::layout;

/// Remembers when the guest was started; nothing of it is saved, since a restored guest has booted.
pub struct BootTimer {
    wall_us: u64,
    cpu_us: u64,
}

impl BootTimer {
    /// Starts both clocks.
    pub fn new() -> Self {
        Self { wall_us: clock_us(libc::CLOCK_MONOTONIC), cpu_us: clock_us(libc::CLOCK_PROCESS_CPUTIME_ID) }
    }
}

impl Default for BootTimer {
    fn default() -> Self {
        Self::new()
    }
}

impl BusDevice for BootTimer {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if offset == 0 && data == [layout::BOOT_TIMER_VALUE] {
            let wall = clock_us(libc::CLOCK_MONOTONIC).saturating_sub(self.wall_us);
            let cpu = clock_us(libc::CLOCK_PROCESS_CPUTIME_ID).saturating_sub(self.cpu_us);
            // Harnesses parse this line.
            log::info!(
                "Guest-boot-time = {wall:>6} us {} ms, {cpu:>6} CPU us {} CPU ms",
                wall / 1000,
                cpu / 1000
            );
        }
        Effect::None
    }
}
