//! A trial guest: a few instructions of 64-bit kernel code on this machine's KVM, with what a kernel does and software
//! variants of KVM fail at, x87 and SSE at ring 0.

use std::sync::mpsc::channel;
use std::time::Duration;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

use super::error::{Doing, Error, Result};

/// A working guest needs less than a millisecond; one that has not answered by then hangs.
const LIMIT: Duration = Duration::from_secs(5);

const MEMORY: usize = 64 << 10;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const CODE: u64 = 0x5000;

/// The guest's only port, where it reports its result.
const PORT: u16 = 0xf4;

/// Computes (1 + 1) with x87, twice that with SSE2, and reports the sum.
const PROGRAM: [u8; 40] = [
    0xdb, 0xe3, // fninit
    0xd9, 0xe8, // fld1
    0xd9, 0xe8, // fld1
    0xde, 0xc1, // faddp
    0xdb, 0x1c, 0x25, 0x00, 0x40, 0x00, 0x00, // fistp dword [0x4000]
    0x66, 0x0f, 0x6e, 0x04, 0x25, 0x00, 0x40, 0x00, 0x00, // movd xmm0, [0x4000]
    0x66, 0x0f, 0xfe, 0xc0, // paddd xmm0, xmm0
    0x66, 0x0f, 0x7e, 0xc0, // movd eax, xmm0
    0xe6, PORT as u8, // out PORT, al
    0xf4,       // hlt
    0x90, 0x90, 0x90, 0x90, 0x90, // nop
];

const RESULT: u8 = 4;

/// Runs the trial guest. An error says how far it came.
pub fn run() -> Result<()> {
    let (done, result) = channel();
    // A guest that hangs keeps its thread until this process ends.
    std::thread::spawn(move || done.send(trial()));
    result.recv_timeout(LIMIT).unwrap_or_else(|_| Err(Error(format!("it hung for {} s", LIMIT.as_secs()))))
}

fn trial() -> Result<()> {
    let kvm = Kvm::new().doing(|| "cannot open /dev/kvm")?;
    let vm = kvm.create_vm().doing(|| "KVM_CREATE_VM")?;
    let memory = memory().doing(|| "cannot make the trial guest's memory")?;
    let address =
        memory.get_host_address(GuestAddress(0)).doing(|| "cannot find the trial guest's memory")?;
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: address as u64,
    };
    // SAFETY: the region is the whole of `memory`, which is mapped until after the last KVM_RUN below.
    unsafe { vm.set_user_memory_region(slot) }.doing(|| "KVM_SET_USER_MEMORY_REGION")?;
    let mut vcpu = vm.create_vcpu(0).doing(|| "KVM_CREATE_VCPU")?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).doing(|| "KVM_GET_SUPPORTED_CPUID")?;
    vcpu.set_cpuid2(&cpuid).doing(|| "KVM_SET_CPUID2")?;
    enter_long_mode(&vcpu)?;

    match vcpu.run().doing(|| "KVM_RUN")? {
        VcpuExit::IoOut(PORT, &[RESULT]) => {}
        VcpuExit::IoOut(PORT, value) => return Err(Error(format!("2 + 2 gave {value:?} in it"))),
        exit => return Err(unexpected(&exit)),
    }
    match vcpu.run().doing(|| "KVM_RUN")? {
        VcpuExit::Hlt => Ok(()),
        exit => Err(unexpected(&exit)),
    }
}

/// Page tables that map the first 2 MiB to themselves, and the program.
fn memory() -> std::result::Result<GuestMemoryMmap, Box<dyn std::error::Error>> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const HUGE: u64 = 1 << 7;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)])?;
    memory.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    memory.write_obj(PD | PRESENT_WRITABLE, GuestAddress(PDPT))?;
    memory.write_obj(HUGE | PRESENT_WRITABLE, GuestAddress(PD))?;
    memory.write_slice(&PROGRAM, GuestAddress(CODE))?;
    Ok(memory)
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<()> {
    let mut sregs = vcpu.get_sregs().doing(|| "KVM_GET_SREGS")?;
    set_long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).doing(|| "KVM_SET_SREGS")?;
    let mut regs = vcpu.get_regs().doing(|| "KVM_GET_REGS")?;
    regs.rip = CODE;
    regs.rflags = 2; // bit 1 is always set
    vcpu.set_regs(&regs).doing(|| "KVM_SET_REGS")
}

fn set_long_mode(sregs: &mut kvm_sregs) {
    const CR0_PE_MP_ET_NE_PG: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 31;
    const CR4_PAE_OSFXSR_OSXMMEXCPT: u64 = 1 << 5 | 1 << 9 | 1 << 10;
    const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
    let data = kvm_segment {
        limit: !0,
        type_: 3,
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        selector: 16,
        ..Default::default()
    };
    sregs.cs = kvm_segment { type_: 11, l: 1, db: 0, selector: 8, ..data };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cr0 = CR0_PE_MP_ET_NE_PG;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE_OSFXSR_OSXMMEXCPT;
    sregs.efer = EFER_LME_LMA;
}

fn unexpected(exit: &VcpuExit<'_>) -> Error {
    Error(format!("KVM_RUN ended with {exit:?}, as it does on a KVM that cannot run a stock kernel"))
}
