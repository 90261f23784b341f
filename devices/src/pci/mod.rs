//! PCI as a guest sees it: one bus, a host bridge, functions with memory BARs and MSI-X.
//!
//! Configuration space is reached through ECAM only (PCI Firmware 3.3, section 4.1). The older pair of ports
//! (0xcf8, 0xcfc) is left out on purpose: each access through it costs two exits in place of one, and a scan makes
//! hundreds; kernels that find ECAM in ACPI's MCFG never miss it. Also left out: bridges and further buses, I/O BARs,
//! INTx, expansion ROMs, power management. What is not announced is not probed.

pub mod config;
pub mod hotplug;
pub mod msix;
mod ranges;
pub mod root;

use self::config::Config;

/// One function of a slot. A vCPU's access locks it for the time of the call.
pub trait Function: Send {
    fn config(&mut self) -> &mut Config;

    /// The guest reads configuration space. `offset` is below 4096; `data` is 1, 2, 4 or 8 bytes at any alignment.
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    /// The guest writes configuration space. Here a function learns that its BARs moved or decoding was switched.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config().write(offset, data);
    }

    /// The guest reads at `offset` of BAR `bar`; the access lies within the BAR.
    fn read_bar(&mut self, bar: usize, offset: u64, data: &mut [u8]);

    /// The guest writes at `offset` of BAR `bar`; the access lies within the BAR.
    fn write_bar(&mut self, bar: usize, offset: u64, data: &[u8]);
}
