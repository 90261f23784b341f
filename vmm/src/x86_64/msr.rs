//! Model-specific registers that a vCPU starts with, where KVM's reset value is not what firmware would leave behind.
//!
//! Does not set what is right already: the SYSENTER, SYSCALL and FS/GS registers are zero, PAT and
//! IA32_ARCH_CAPABILITIES are the host's, kvmclock's are the guest's own.

use api_socket::types::MsrModifier;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

const IA32_MISC_ENABLE: u32 = 0x1a0;
/// Linux switches its fast string routines off without it.
const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;
/// No branch trace store and no event-based sampling, as there is no PMU.
const MISC_ENABLE_BTS_UNAVAILABLE: u64 = 1 << 11;
const MISC_ENABLE_PEBS_UNAVAILABLE: u64 = 1 << 12;

const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// The most MSR modifiers that `/cpu-config` may hold; with the ones set here they fit one KVM call.
pub const MAX_MODIFIERS: usize = 128;

/// Why a vCPU does not have the MSRs it should.
#[derive(Debug, thiserror::Error)]
pub enum MsrError {
    #[error("cpu-config has {count} msr_modifiers; at most {MAX_MODIFIERS} are allowed")]
    TooMany { count: usize },
    #[error("msr_modifiers: this host's KVM does not let a guest have MSR {address:#x}")]
    Unknown { address: u32 },
    #[error(
        "MSR {address:#x} cannot be {value:#x} on this host: KVM refused it; correct its bitmap in msr_modifiers"
    )]
    Refused { address: u32, value: u64 },
    #[error("cannot access MSRs: {0}")]
    Kvm(kvm_ioctls::Error),
}

/// Gives `vcpu` its first MSRs, changed by the operator's `modifiers`. After its CPUID is set, and before it runs.
pub fn set(vcpu: &VcpuFd, modifiers: &[MsrModifier]) -> Result<(), MsrError> {
    let mut entries = boot();
    apply(&mut entries, modifiers, &read(vcpu, modifiers)?);
    let msrs = collect(&entries)?;
    match vcpu.set_msrs(&msrs).map_err(MsrError::Kvm)? {
        // KVM stops at the first one it refuses and says how many it took.
        taken if taken < entries.len() => {
            let refused = entries[taken];
            Err(MsrError::Refused { address: refused.index, value: refused.data })
        }
        _ => Ok(()),
    }
}

fn boot() -> Vec<kvm_msr_entry> {
    let misc = MISC_ENABLE_FAST_STRING | MISC_ENABLE_BTS_UNAVAILABLE | MISC_ENABLE_PEBS_UNAVAILABLE;
    // All memory is write-back unless page attributes say otherwise. Without MTRRs Linux would give up PAT as well.
    let mtrr = MTRR_ENABLE | MTRR_WRITE_BACK;
    vec![entry(IA32_MISC_ENABLE, misc), entry(IA32_MTRR_DEF_TYPE, mtrr)]
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// What KVM has for each modified MSR now.
fn read(vcpu: &VcpuFd, modifiers: &[MsrModifier]) -> Result<Vec<kvm_msr_entry>, MsrError> {
    if modifiers.is_empty() {
        return Ok(Vec::new());
    }
    if modifiers.len() > MAX_MODIFIERS {
        return Err(MsrError::TooMany { count: modifiers.len() });
    }
    let asked: Vec<_> = modifiers.iter().map(|modifier| entry(modifier.addr, 0)).collect();
    let mut msrs = collect(&asked)?;
    match vcpu.get_msrs(&mut msrs).map_err(MsrError::Kvm)? {
        found if found < asked.len() => Err(MsrError::Unknown { address: asked[found].index }),
        _ => Ok(msrs.as_slice().to_vec()),
    }
}

/// Changes `entries`: a modifier works on our own value where there is one, else on KVM's in `current`.
fn apply(entries: &mut Vec<kvm_msr_entry>, modifiers: &[MsrModifier], current: &[kvm_msr_entry]) {
    for (modifier, current) in modifiers.iter().zip(current) {
        match entries.iter_mut().find(|entry| entry.index == modifier.addr) {
            Some(entry) => entry.data = modifier.bitmap.apply(entry.data),
            None => entries.push(entry(modifier.addr, modifier.bitmap.apply(current.data))),
        }
    }
}

fn collect(entries: &[kvm_msr_entry]) -> Result<Msrs, MsrError> {
    // The only error is more entries than KVM takes, and MAX_MODIFIERS is less than that.
    Msrs::from_entries(entries).map_err(|_| MsrError::TooMany { count: entries.len() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_socket::types::Bitmap;

    fn modifier(addr: u32, filter: u64, value: u64) -> MsrModifier {
        MsrModifier { addr, bitmap: Bitmap { filter, value } }
    }

    #[test]
    fn a_modifier_changes_our_value_where_there_is_one_and_else_kvms() {
        let mut entries = boot();
        let modifiers = [
            modifier(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING, 0),
            modifier(0x10a, 0b11, 0b01),
            modifier(0x10a, 0b100, 0b100),
        ];
        let current = [entry(IA32_MISC_ENABLE, 0xdead), entry(0x10a, 0xf2), entry(0x10a, 0xf2)];
        apply(&mut entries, &modifiers, &current);
        let values: Vec<_> = entries.iter().map(|entry| (entry.index, entry.data)).collect();
        assert_eq!(values, [(IA32_MISC_ENABLE, 0x1800), (IA32_MTRR_DEF_TYPE, 0x806), (0x10a, 0xf5)]);
    }

    #[test]
    fn kvm_takes_as_many_as_the_limits_allow() {
        let most = vec![entry(0, 0); MAX_MODIFIERS + boot().len()];
        assert!(collect(&most).is_ok());
    }
}
