use super::*;
use api_socket::types::{Bitmap, CpuidModifier};

fn leaves(vendor: &[u8; 12]) -> Leaves {
    let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
    Leaves(vec![
        entry(VENDOR, 0, [0x1f, word(0), word(8), word(4)]),
        entry(FEATURES, 0, [0x806f8, 0x7700_0800, !0, !0]),
        indexed(CACHES_INTEL, 0, [0xfc00_4121, 1, 2, 3]),
        indexed(CACHES_INTEL, 1, [0xfc1f_c163, 4, 5, 6]),
        indexed(CACHES_INTEL, 2, [0, 0, 0, 0]),
        entry(MWAIT, 0, [0x40, 0x40, 3, 0]),
        indexed(EXTENDED_FEATURES, 0, [1, !0, !0, !0]),
        indexed(EXTENDED_FEATURES, 1, [!0, 0, 0, 0]),
        entry(PERFORMANCE, 0, [0x0830_0805, 0, 0, 0x603]),
        indexed(TOPOLOGY, 0, [1, 2, 0x100, 0x55]),
        indexed(TOPOLOGY, 3, [7, 7, 7, 7]),
        entry(KVM_SIGNATURE, 0, [0x4000_0001, 0, 0, 0]),
        entry(EXTENDED, 0, [0x8000_0008, 0, 0, 0]),
        entry(AMD_FEATURES, 0, [0, 0, !0, 0]),
        entry(ADDRESS_SIZES, 0, [0x302e, 0, 0xffff, 0]),
        entry(SVM, 0, [1, 1, 1, 1]),
    ])
}

fn machine(vendor: &[u8; 12], vcpus: u32, smt: bool) -> Cpuid {
    let mut leaves = leaves(vendor);
    leaves.add_what_kvm_leaves_out(true, Some(2_500_000));
    leaves.withhold();
    Cpuid { leaves, topology: Topology { vcpus, smt } }
}

fn registers(cpuid: &Cpuid, vcpu: u32, leaf: u32, subleaf: u32) -> [u32; 4] {
    let all = cpuid.for_vcpu(vcpu).unwrap();
    let found: Vec<_> =
        all.as_slice().iter().filter(|entry| (entry.function, entry.index) == (leaf, subleaf)).collect();
    assert_eq!(found.len(), 1, "leaf {leaf:#x} subleaf {subleaf:#x}");
    [found[0].eax, found[0].ebx, found[0].ecx, found[0].edx]
}

fn bits(register: u32, range: std::ops::RangeInclusive<u32>) -> u32 {
    register >> range.start() & ((1u64 << (range.end() - range.start() + 1)) - 1) as u32
}

const INTEL: &[u8; 12] = b"GenuineIntel";
const AMD: &[u8; 12] = b"AuthenticAMD";

#[test]
fn every_vcpu_has_its_own_apic_id_in_every_leaf_that_tells_it() {
    for vendor in [INTEL, AMD] {
        let cpuid = machine(vendor, 6, false);
        for vcpu in 0..6 {
            assert_eq!(bits(registers(&cpuid, vcpu, FEATURES, 0)[1], 24..=31), vcpu);
            for leaf in [TOPOLOGY, TOPOLOGY_V2] {
                for subleaf in 0..3 {
                    assert_eq!(registers(&cpuid, vcpu, leaf, subleaf)[3], vcpu);
                }
            }
        }
    }
    assert_eq!(registers(&machine(AMD, 6, true), 5, TOPOLOGY_AMD, 0), [5, 0x102, 0, 0]);
}

#[test]
fn threads_are_neighbours_in_a_core_and_cores_in_the_one_socket() {
    for (vcpus, smt, threads, thread_bits, socket_bits) in
        [(1, false, 1, 0, 0), (1, true, 1, 0, 0), (2, true, 2, 1, 1), (4, false, 1, 0, 2), (6, true, 2, 1, 3)]
    {
        let cpuid = machine(INTEL, vcpus, smt);
        let level = |subleaf| registers(&cpuid, 0, TOPOLOGY, subleaf);
        assert_eq!(level(0)[..3], [thread_bits, threads, 0x100], "{vcpus} {smt}");
        assert_eq!(level(1)[..3], [socket_bits, vcpus, 0x201], "{vcpus} {smt}");
        assert_eq!(level(2)[..3], [0, 0, 2], "{vcpus} {smt}");
        let [_, ebx, _, edx] = registers(&cpuid, 0, FEATURES, 0);
        assert_eq!(bits(edx, 28..=28), u32::from(vcpus > 1));
        assert_eq!(bits(ebx, 16..=23), 1 << socket_bits);
    }
}

#[test]
fn caches_are_shared_by_the_threads_of_a_core_or_by_all() {
    let cpuid = machine(INTEL, 6, true);
    let first = registers(&cpuid, 0, CACHES_INTEL, 0)[0];
    assert_eq!((bits(first, 14..=25), bits(first, 26..=31)), (1, 3));
    let last = registers(&cpuid, 0, CACHES_INTEL, 1)[0];
    assert_eq!((bits(last, 14..=25), bits(last, 26..=31)), (7, 3));
    assert_eq!(registers(&cpuid, 0, CACHES_INTEL, 2), [0; 4], "the end of the list stays the end");
}

#[test]
fn amd_leaves_count_the_cores() {
    let ecx = registers(&machine(AMD, 6, true), 0, ADDRESS_SIZES, 0)[2];
    assert_eq!((bits(ecx, 0..=7), bits(ecx, 12..=15)), (5, 3));
    let ecx = registers(&machine(AMD, 1, false), 0, AMD_FEATURES, 0)[2];
    assert_eq!(
        (bits(ecx, 1..=1), bits(ecx, 2..=2), bits(ecx, 22..=22)),
        (0, 0, 1),
        "CmpLegacy, SVM, TopologyExt"
    );
}

#[test]
fn what_the_machine_does_not_offer_is_not_announced() {
    let cpuid = machine(INTEL, 2, false);
    let [_, _, ecx, _] = registers(&cpuid, 0, FEATURES, 0);
    assert_eq!((bits(ecx, 3..=3), bits(ecx, 5..=5)), (0, 0), "MONITOR, VMX");
    assert_eq!((bits(ecx, 24..=24), bits(ecx, 31..=31)), (1, 1), "TSC deadline, hypervisor");
    assert_eq!(registers(&cpuid, 0, PERFORMANCE, 0), [0; 4]);
    assert_eq!(bits(registers(&cpuid, 0, EXTENDED_FEATURES, 0)[1], 2..=2), 0, "SGX");
    let all = cpuid.for_vcpu(0).unwrap();
    assert!(!all.as_slice().iter().any(|entry| [MWAIT, SVM].contains(&entry.function)));
    assert!(!all.as_slice().iter().any(|entry| (entry.function, entry.index) == (TOPOLOGY, 3)));
}

#[test]
fn the_tsc_frequency_is_told_where_it_is_known() {
    let cpuid = machine(INTEL, 1, false);
    assert_eq!(registers(&cpuid, 0, TIMING, 0)[..2], [2_500_000, 1_000_000]);
    assert_eq!(registers(&cpuid, 0, KVM_SIGNATURE, 0)[0], TIMING);
}

#[test]
fn modifiers_change_only_their_bits_and_never_who_a_vcpu_is() {
    let modifier = |register, filter, value| CpuidModifier { register, bitmap: Bitmap { filter, value } };
    let change = |leaf, modifiers| CpuidLeafModifier { leaf, subleaf: 0, flags: 0, modifiers };
    let mut cpuid = machine(INTEL, 2, false);
    let modifiers = [
        change(EXTENDED_FEATURES, vec![modifier(CpuidRegister::Ebx, 0b11, 0b01)]),
        change(FEATURES, vec![modifier(CpuidRegister::Ebx, !0, 0x6600_0800)]),
    ];
    cpuid.leaves.modify(&modifiers).unwrap();
    assert_eq!(bits(registers(&cpuid, 1, EXTENDED_FEATURES, 0)[1], 0..=3), 0b1001);
    assert_eq!(registers(&cpuid, 1, FEATURES, 0)[1], 0x0102_0800);
    let error = cpuid.leaves.modify(&[change(0x99, vec![])]).unwrap_err().to_string();
    assert!(error.contains("0x99") && error.contains("cpuid_modifiers"), "{error}");
}

#[test]
fn kvm_takes_what_is_made_of_its_own_answer() {
    let Ok(kvm) = Kvm::new() else {
        eprintln!("skipped: no /dev/kvm");
        return;
    };
    let vm = kvm.create_vm().unwrap();
    let cpuid = Cpuid::new(&kvm, Topology { vcpus: 2, smt: true }, &[], Some(1_000_000)).unwrap();
    assert!((36..=52).contains(&cpuid.physical_bits()), "{}", cpuid.physical_bits());
    for index in 0..2 {
        vm.create_vcpu(index.into()).unwrap().set_cpuid2(&cpuid.for_vcpu(index).unwrap()).unwrap();
    }
}
