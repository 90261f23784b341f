//! CPUID as the guest's vCPUs see it: what KVM supports on this host, the machine's own topology, the operator's changes.
//!
//! One socket; with SMT two threads to a core. APIC id = vCPU index, so that ids have no gaps.
//!
//! Does not offer: performance counters, nested virtualization, SGX, processor trace, MWAIT. Each would be an interface
//! to the host's hardware that no guest needs to boot and most clouds withhold. Does not imitate another CPU model: that
//! is what the operator's modifiers are for.

use api_socket::types::{CpuidLeafModifier, CpuidRegister};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

/// The vCPUs of a machine and how they lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// From 1 to [`super::layout::MAX_VCPUS`].
    pub vcpus: u32,
    /// Two threads to a core.
    pub smt: bool,
}

/// Why there is no CPUID for this machine.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    #[error("cannot ask KVM for the CPUID it supports: {0}")]
    Kvm(kvm_ioctls::Error),
    #[error(
        "cpuid_modifiers: this host's KVM has no CPUID leaf {leaf:#x} subleaf {subleaf:#x}; remove it from cpu-config"
    )]
    NoSuchLeaf { leaf: u32, subleaf: u32 },
    #[error("CPUID has {count} leaves, more than the {KVM_MAX_CPUID_ENTRIES} that KVM takes")]
    TooMany { count: usize },
}

/// CPUID for all vCPUs of one machine.
pub struct Cpuid {
    leaves: Leaves,
    topology: Topology,
}

impl Cpuid {
    /// Asks KVM, and applies `modifiers`. `tsc_khz` is what the guest is told of its TSC, where it is known.
    pub fn new(
        kvm: &Kvm,
        topology: Topology,
        modifiers: &[CpuidLeafModifier],
        tsc_khz: Option<u32>,
    ) -> Result<Cpuid, CpuidError> {
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(CpuidError::Kvm)?;
        let mut leaves = Leaves(supported.as_slice().to_vec());
        leaves.add_what_kvm_leaves_out(kvm.check_extension(Cap::TscDeadlineTimer), tsc_khz);
        leaves.withhold();
        leaves.modify(modifiers)?;
        Ok(Cpuid { leaves, topology })
    }

    /// CPUID of the vCPU with this index, for KVM_SET_CPUID2.
    pub fn for_vcpu(&self, index: u32) -> Result<CpuId, CpuidError> {
        let mut leaves = self.leaves.clone();
        leaves.place(index, self.topology);
        CpuId::from_entries(&leaves.0).map_err(|_| CpuidError::TooMany { count: leaves.0.len() })
    }

    /// How many bits of physical address the guest's CPUs have.
    pub fn physical_bits(&self) -> u8 {
        /// Of 64-bit CPUs that do not say.
        const DEFAULT: u8 = 36;
        self.leaves.find(ADDRESS_SIZES, 0).map_or(DEFAULT, |leaf| leaf.eax as u8)
    }
}

// Leaves (SDM, volume 2, CPUID; AMD APM, volume 3, appendix E; Linux, Documentation/virt/kvm/x86/cpuid.rst).
const VENDOR: u32 = 0x0;
const FEATURES: u32 = 0x1;
const CACHES_INTEL: u32 = 0x4;
const MWAIT: u32 = 0x5;
const EXTENDED_FEATURES: u32 = 0x7;
const PERFORMANCE: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const SGX: u32 = 0x12;
const PROCESSOR_TRACE: u32 = 0x14;
const TOPOLOGY_V2: u32 = 0x1f;
const ARCHITECTURAL_PERFORMANCE: u32 = 0x23;
const KVM_SIGNATURE: u32 = 0x4000_0000;
const TIMING: u32 = 0x4000_0010;
const EXTENDED: u32 = 0x8000_0000;
const AMD_FEATURES: u32 = 0x8000_0001;
const ADDRESS_SIZES: u32 = 0x8000_0008;
const SVM: u32 = 0x8000_000a;
const CACHES_AMD: u32 = 0x8000_001d;
const TOPOLOGY_AMD: u32 = 0x8000_001e;
const PERFORMANCE_AMD: u32 = 0x8000_0022;
const TOPOLOGY_AMD_V2: u32 = 0x8000_0026;

/// Kept sorted by nothing: KVM's order, with what is new at the end.
#[derive(Clone)]
struct Leaves(Vec<kvm_cpuid_entry2>);

impl Leaves {
    fn find(&self, leaf: u32, subleaf: u32) -> Option<&kvm_cpuid_entry2> {
        self.0.iter().find(|entry| (entry.function, entry.index) == (leaf, subleaf))
    }

    fn find_mut(&mut self, leaf: u32, subleaf: u32) -> Option<&mut kvm_cpuid_entry2> {
        self.0.iter_mut().find(|entry| (entry.function, entry.index) == (leaf, subleaf))
    }

    fn change(&mut self, leaf: u32, subleaf: u32, change: impl FnOnce(&mut kvm_cpuid_entry2)) {
        if let Some(entry) = self.find_mut(leaf, subleaf) {
            change(entry);
        }
    }

    fn remove(&mut self, leaf: u32) {
        self.0.retain(|entry| entry.function != leaf);
    }

    /// Puts `entry` in the place of what is there.
    fn put(&mut self, entry: kvm_cpuid_entry2) {
        match self.find_mut(entry.function, entry.index) {
            Some(old) => *old = entry,
            None => self.0.push(entry),
        }
    }

    fn is_intel(&self) -> bool {
        // "GenuineIntel" in EBX, EDX, ECX.
        self.find(VENDOR, 0).is_some_and(|leaf| leaf.ebx == u32::from_le_bytes(*b"Genu"))
    }

    fn is_amd(&self) -> bool {
        // "AuthenticAMD" and, from its joint venture, "HygonGenuine".
        self.find(VENDOR, 0).is_some_and(|leaf| matches!(&leaf.ebx.to_le_bytes(), b"Auth" | b"Hygo"))
    }

    /// What KVM emulates but leaves to user space to announce.
    fn add_what_kvm_leaves_out(&mut self, tsc_deadline: bool, tsc_khz: Option<u32>) {
        self.change(FEATURES, 0, |leaf| {
            set(&mut leaf.ecx, 31, true); // a hypervisor is there
            set(&mut leaf.ecx, 24, tsc_deadline); // in-kernel APIC timer
        });
        // Topology leaves are ours on any vendor: Linux reads them on AMD as well.
        self.change(VENDOR, 0, |leaf| leaf.eax = leaf.eax.max(TOPOLOGY));
        if self.is_amd() {
            self.change(AMD_FEATURES, 0, |leaf| set(&mut leaf.ecx, 22, true)); // topology extensions
            self.change(EXTENDED, 0, |leaf| leaf.eax = leaf.eax.max(TOPOLOGY_AMD));
            self.copy_amd_caches();
        }
        // The convention of VMware, which KVM guests other than Linux look for: TSC and APIC bus frequency in kHz.
        if let (Some(khz), Some(signature)) = (tsc_khz, self.find_mut(KVM_SIGNATURE, 0)) {
            const APIC_BUS_KHZ: u32 = 1_000_000;
            signature.eax = signature.eax.max(TIMING);
            self.put(entry(TIMING, 0, [khz, APIC_BUS_KHZ, 0, 0]));
        }
    }

    /// KVM does not report this leaf; without it the guest knows no cache of an AMD CPU. What is shared by which vCPUs
    /// is corrected in [`Leaves::place`].
    fn copy_amd_caches(&mut self) {
        /// Of real CPUs none has more than four.
        const MAX_CACHES: u32 = 8;
        if std::arch::x86_64::__cpuid(EXTENDED).eax < CACHES_AMD || self.find(CACHES_AMD, 0).is_some() {
            return;
        }
        for index in 0..MAX_CACHES {
            let host = std::arch::x86_64::__cpuid_count(CACHES_AMD, index);
            self.put(indexed(CACHES_AMD, index, [host.eax, host.ebx, host.ecx, host.edx]));
            if host.eax & 0x1f == 0 {
                return;
            }
        }
    }

    /// Takes away what the module header says is not offered.
    fn withhold(&mut self) {
        for leaf in
            [MWAIT, SGX, PROCESSOR_TRACE, ARCHITECTURAL_PERFORMANCE, SVM, PERFORMANCE_AMD, TOPOLOGY_AMD_V2]
        {
            self.remove(leaf);
        }
        // All zeros is version 0, no counters; the leaf itself stays for those who modify it.
        self.change(PERFORMANCE, 0, |leaf| *leaf = entry(PERFORMANCE, 0, [0; 4]));
        self.change(FEATURES, 0, |leaf| {
            for bit in [2, 3, 5, 15] {
                set(&mut leaf.ecx, bit, false); // DTES64, MONITOR, VMX, PDCM
            }
            set(&mut leaf.edx, 21, false); // debug store
        });
        self.change(EXTENDED_FEATURES, 0, |leaf| {
            set(&mut leaf.ebx, 2, false); // SGX
            set(&mut leaf.ebx, 25, false); // processor trace
            set(&mut leaf.ecx, 30, false); // SGX launch configuration
        });
        self.change(EXTENDED_FEATURES, 1, |leaf| set(&mut leaf.eax, 8, false)); // architectural performance leaf
        self.change(AMD_FEATURES, 0, |leaf| {
            for bit in [2, 23, 24, 28, 29] {
                set(&mut leaf.ecx, bit, false); // SVM, performance counters: core, north bridge, L3; MONITORX
            }
        });
    }

    /// Applies the operator's bitmaps, in their order.
    fn modify(&mut self, modifiers: &[CpuidLeafModifier]) -> Result<(), CpuidError> {
        for &CpuidLeafModifier { leaf, subleaf, ref modifiers, .. } in modifiers {
            let entry = self.find_mut(leaf, subleaf).ok_or(CpuidError::NoSuchLeaf { leaf, subleaf })?;
            for modifier in modifiers {
                let register = match modifier.register {
                    CpuidRegister::Eax => &mut entry.eax,
                    CpuidRegister::Ebx => &mut entry.ebx,
                    CpuidRegister::Ecx => &mut entry.ecx,
                    CpuidRegister::Edx => &mut entry.edx,
                };
                *register = modifier.bitmap.apply(*register);
            }
        }
        Ok(())
    }

    /// Writes who vCPU `index` is and who its neighbours are. Last, as no modifier may make two vCPUs the same.
    fn place(&mut self, index: u32, topology: Topology) {
        let ids = Ids::of(topology);
        self.place_basic(index, topology);
        if self.is_intel() {
            self.place_intel_caches(&ids);
        }
        if self.is_amd() {
            self.place_amd(index, topology, &ids);
        }
        self.place_extended(TOPOLOGY, index, topology, &ids);
        // Announced where leaf 0 reaches it; a guest that finds it prefers it.
        if self.find(VENDOR, 0).is_some_and(|leaf| leaf.eax >= TOPOLOGY_V2) {
            self.place_extended(TOPOLOGY_V2, index, topology, &ids);
        }
    }

    fn place_basic(&mut self, index: u32, topology: Topology) {
        self.change(FEATURES, 0, |leaf| {
            field(&mut leaf.ebx, 24, 8, index);
            field(&mut leaf.ebx, 16, 8, topology.vcpus.next_power_of_two().min(0xff));
            set(&mut leaf.edx, 28, topology.vcpus > 1); // HTT: the field above counts
        });
    }

    /// L1 and L2 belong to a core, what is above to the socket.
    fn place_intel_caches(&mut self, ids: &Ids) {
        for leaf in self.0.iter_mut().filter(|leaf| leaf.function == CACHES_INTEL && leaf.eax & 0x1f != 0) {
            let level = leaf.eax >> 5 & 7;
            let sharing = if level < 3 { ids.thread_bits } else { ids.socket_bits };
            field(&mut leaf.eax, 14, 12, (1 << sharing) - 1);
            field(&mut leaf.eax, 26, 6, ((1 << (ids.socket_bits - ids.thread_bits)) - 1).min(0x3f));
        }
    }

    fn place_amd(&mut self, index: u32, topology: Topology, ids: &Ids) {
        self.change(AMD_FEATURES, 0, |leaf| set(&mut leaf.ecx, 1, topology.vcpus > 1)); // CmpLegacy
        self.change(ADDRESS_SIZES, 0, |leaf| {
            field(&mut leaf.ecx, 0, 8, topology.vcpus - 1);
            field(&mut leaf.ecx, 12, 4, ids.socket_bits);
        });
        for leaf in self.0.iter_mut().filter(|leaf| leaf.function == CACHES_AMD && leaf.eax & 0x1f != 0) {
            let level = leaf.eax >> 5 & 7;
            field(&mut leaf.eax, 14, 12, if level < 3 { ids.threads } else { topology.vcpus } - 1);
        }
        let core = (index >> ids.thread_bits) & 0xff;
        self.put(entry(TOPOLOGY_AMD, 0, [index, (ids.threads - 1) << 8 | core, 0, 0]));
    }

    /// The x2APIC topology: a level for threads, one for cores, and the end.
    fn place_extended(&mut self, leaf: u32, index: u32, topology: Topology, ids: &Ids) {
        const THREAD: u32 = 1 << 8;
        const CORE: u32 = 2 << 8;
        self.remove(leaf);
        self.put(indexed(leaf, 0, [ids.thread_bits, ids.threads, THREAD, index]));
        self.put(indexed(leaf, 1, [ids.socket_bits, topology.vcpus, CORE | 1, index]));
        self.put(indexed(leaf, 2, [0, 0, 2, index]));
    }
}

/// How APIC ids are cut into thread, core and (nothing more) socket.
struct Ids {
    /// Threads of each core; 1 with one vCPU, whatever SMT says.
    threads: u32,
    thread_bits: u32,
    /// Bits of thread and core together.
    socket_bits: u32,
}

impl Ids {
    fn of(topology: Topology) -> Ids {
        let threads = if topology.smt && topology.vcpus > 1 { 2 } else { 1 };
        let bits = |count: u32| count.next_power_of_two().trailing_zeros();
        Ids { threads, thread_bits: bits(threads), socket_bits: bits(topology.vcpus) }
    }
}

fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

/// An entry of a leaf that has subleaves.
fn indexed(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX, ..entry(function, index, registers) }
}

fn set(register: &mut u32, bit: u32, value: bool) {
    field(register, bit, 1, value.into());
}

fn field(register: &mut u32, shift: u32, width: u32, value: u32) {
    let mask = ((1 << width) - 1) << shift;
    *register = *register & !mask | value << shift & mask;
}

#[cfg(test)]
mod tests;
