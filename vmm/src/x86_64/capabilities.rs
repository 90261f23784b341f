//! Which KVM capabilities this host must have, and whether it has them.
//!
//! What the VMM can do without is not here: who uses it asks for it where it is used.

use api_socket::types::KvmCapability;
use kvm_bindings::KVM_CAP_IMMEDIATE_EXIT;
use kvm_ioctls::Kvm;

/// The newest that the VMM needs. Each question is a system call on the way to the guest's first instruction, and a
/// kernel with this one (Linux 4.13) has the others on x86_64: in-kernel irqchip, routing, irqfd, ioeventfd, xsave.
const REQUIRED: [u32; 1] = [KVM_CAP_IMMEDIATE_EXIT];

/// The most entries of `kvm_capabilities` in `/cpu-config`.
pub const MAX_CHANGES: usize = 256;

/// Why the host will not do.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MissingCapability {
    #[error(
        "this host's KVM lacks capability {number} (KVM_CAP_*), which the VMM needs; Linux 4.13 or later has all of them"
    )]
    Required { number: u32 },
    #[error("kvm_capabilities: this host's KVM lacks capability {number}, which cpu-config asks for")]
    Asked { number: u32 },
    #[error("kvm_capabilities has {count} entries; at most {MAX_CHANGES} are allowed")]
    TooMany { count: usize },
}

/// Asks KVM for everything that is required, as the operator's `changes` have it.
pub fn check(kvm: &Kvm, changes: &[KvmCapability]) -> Result<(), MissingCapability> {
    check_with(|number| kvm.check_extension_raw(number.into()) > 0, changes)
}

fn check_with(has: impl Fn(u32) -> bool, changes: &[KvmCapability]) -> Result<(), MissingCapability> {
    if changes.len() > MAX_CHANGES {
        return Err(MissingCapability::TooMany { count: changes.len() });
    }
    let removed = |number| changes.contains(&KvmCapability::Remove(number));
    if let Some(number) = REQUIRED.into_iter().find(|number| !removed(*number) && !has(*number)) {
        return Err(MissingCapability::Required { number });
    }
    let asked = changes.iter().filter_map(|change| match change {
        KvmCapability::Add(number) => Some(*number),
        KvmCapability::Remove(_) => None,
    });
    match asked.into_iter().find(|number| !has(*number)) {
        Some(number) => Err(MissingCapability::Asked { number }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use KvmCapability::{Add, Remove};

    #[test]
    fn what_is_required_or_asked_for_must_be_there_unless_it_is_removed() {
        let has = |number| number == 5;
        let required = MissingCapability::Required { number: KVM_CAP_IMMEDIATE_EXIT };
        assert_eq!(check_with(has, &[]), Err(required));
        let without = Remove(KVM_CAP_IMMEDIATE_EXIT);
        assert_eq!(check_with(has, &[without]), Ok(()));
        assert_eq!(check_with(has, &[without, Add(5)]), Ok(()));
        assert_eq!(check_with(has, &[without, Add(6)]), Err(MissingCapability::Asked { number: 6 }));
        let count = MAX_CHANGES + 1;
        assert_eq!(check_with(|_| true, &vec![Add(1); count]), Err(MissingCapability::TooMany { count }));
    }
}
