//! What is tried by system calls that only unsafe code can make: a guest, the version of Landlock, a tap, namespaces.
//!
//! The gate: nothing else of this program is unsafe for the doctor. What is made here goes away when the try is over.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::facts::{Trouble, within};

/// A guest of a few instructions needs less than a millisecond; one that has not ended by then hangs.
const LIMIT: Duration = Duration::from_secs(5);

const MEMORY: usize = 64 << 10;
/// Page tables: the first 2 MiB of addresses, to themselves.
const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const PD: usize = 0x3000;
/// Where the program writes.
const SCRATCH: u32 = 0x4000;
const CODE: usize = 0x5000;
/// The port of the guest's answer.
const PORT: u8 = 0xf4;

const KNOWN: u32 = 21;
/// Twice [`KNOWN`].
const ANSWER: u8 = 42;

const PRESENT_WRITABLE: u64 = 0b11;
const HUGE: u64 = 1 << 7;

/// Guest memory: whole pages, as KVM wants it.
#[repr(C, align(4096))]
struct Memory([u8; MEMORY]);

/// Runs a guest in 64-bit mode that uses memory, x87 and SSE at ring 0, as the start of a Linux kernel does: a KVM that
/// emulates too little fails at that and not at making a VM.
///
/// # Errors
/// How far it came.
pub fn run_guest() -> Result<(), Trouble> {
    let hangs = || Trouble::Other(format!("the trial guest hangs; it was given {} s", LIMIT.as_secs()));
    within(LIMIT, guest).ok_or_else(hangs)?
}

fn guest() -> Result<(), Trouble> {
    let kvm = Kvm::new().map_err(|error| Trouble::of(&io::Error::from_raw_os_error(error.errno())))?;
    let failed = |step: &'static str| {
        move |error: kvm_ioctls::Error| {
            Trouble::Other(format!("{step}: {}", io::Error::from_raw_os_error(error.errno())))
        }
    };
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    let memory: &'static mut Memory = Box::leak(Box::new(Memory([0; MEMORY])));
    fill(&mut memory.0).ok_or_else(|| Trouble::Other("the trial guest is larger than its memory".into()))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: std::ptr::from_mut(memory) as u64,
    };
    // SAFETY: the memory is `MEMORY` bytes that were leaked above, so it stays mapped for as long as the guest may run, and
    // this pointer is the only one that is left of it.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    enter_64_bit_mode(&vcpu).map_err(failed("KVM_SET_REGS"))?;

    let answer = match vcpu.run().map_err(failed("KVM_RUN"))? {
        VcpuExit::IoOut(port, &[answer]) if port == u16::from(PORT) => answer,
        exit => return Err(other(&exit)),
    };
    if answer != ANSWER {
        return Err(Trouble::Other(format!("the trial guest took twice {KNOWN} for {answer}")));
    }
    match vcpu.run().map_err(failed("KVM_RUN"))? {
        VcpuExit::Hlt => Ok(()),
        exit => Err(other(&exit)),
    }
}

/// Page tables and the program: it loads [`KNOWN`] into the x87 unit, stores it as an integer, doubles it with SSE2 and
/// says what it has.
fn fill(memory: &mut [u8; MEMORY]) -> Option<()> {
    let mut put = |at: usize, bytes: &[u8]| {
        memory.get_mut(at..at + bytes.len()).map(|place| place.copy_from_slice(bytes))
    };
    put(PML4, &(PDPT as u64 | PRESENT_WRITABLE).to_le_bytes())?;
    put(PDPT, &(PD as u64 | PRESENT_WRITABLE).to_le_bytes())?;
    put(PD, &(HUGE | PRESENT_WRITABLE).to_le_bytes())?;
    let [a, b, c, d] = SCRATCH.to_le_bytes();
    let program: [&[u8]; 9] = [
        &[0xc7, 0x04, 0x25, a, b, c, d, KNOWN as u8, 0, 0, 0], // mov dword [SCRATCH], KNOWN
        &[0xdb, 0xe3],                                         // fninit
        &[0xdb, 0x04, 0x25, a, b, c, d],                       // fild dword [SCRATCH]
        &[0xdb, 0x1c, 0x25, a, b, c, d],                       // fistp dword [SCRATCH]
        &[0xf3, 0x0f, 0x7e, 0x0c, 0x25, a, b, c, d],           // movq xmm1, [SCRATCH]
        &[0x66, 0x0f, 0xd4, 0xc9],                             // paddq xmm1, xmm1
        &[0x66, 0x0f, 0x7e, 0xc8],                             // movd eax, xmm1
        &[0xe6, PORT],                                         // out PORT, al
        &[0xf4],                                               // hlt
    ];
    put(CODE, &program.concat())
}

fn enter_64_bit_mode(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    /// Protected mode, the x87 unit as it is in every processor since the 486, paging.
    const CR0: u64 = 1 << 31 | 1 << 5 | 1 << 4 | 1 << 1 | 1;
    /// Physical address extension, SSE and its exceptions.
    const CR4: u64 = 1 << 10 | 1 << 9 | 1 << 5;
    /// 64-bit mode, enabled and active.
    const EFER: u64 = 1 << 10 | 1 << 8;
    const READ_WRITE: u8 = 3;
    const EXECUTE_READ: u8 = 11;
    let data = kvm_segment {
        limit: u32::MAX,
        type_: READ_WRITE,
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        selector: 0x10,
        ..Default::default()
    };
    let code = kvm_segment { type_: EXECUTE_READ, l: 1, db: 0, selector: 0x08, ..data };
    let before = vcpu.get_sregs()?;
    vcpu.set_sregs(&kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        ss: data,
        cr0: CR0,
        cr3: PML4 as u64,
        cr4: CR4,
        efer: EFER,
        ..before
    })?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = CODE as u64;
    // Bit 1 is always set.
    regs.rflags = 1 << 1;
    vcpu.set_regs(&regs)
}

fn other(exit: &VcpuExit<'_>) -> Trouble {
    Trouble::Other(format!(
        "the trial guest ended with {exit:?}, as it does on a KVM that no stock kernel runs on"
    ))
}

/// The version of Landlock; `None` where the kernel has none or it is switched off.
pub fn landlock() -> Option<u32> {
    const ASK_FOR_VERSION: libc::c_uint = 1;
    let nothing = std::ptr::null::<libc::c_void>();
    // SAFETY: with this flag the call takes no structure, of no bytes, and gives a number.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0usize, ASK_FOR_VERSION) };
    u32::try_from(version).ok().filter(|version| *version > 0)
}

/// Makes a tap, which goes away again. It takes the right to administrate networks.
///
/// # Errors
/// Those of TUNSETIFF.
pub fn make_tap(tun: &File) -> io::Result<()> {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    // SAFETY: all zeroes are an ifreq: an empty name, which has the kernel choose one, and flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads an ifreq and writes its name into it; `request` lives through the call.
    match unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &mut request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes the namespaces of a cell, on a thread that ends with them. It takes root.
///
/// # Errors
/// Those of unshare(2).
pub fn make_namespaces() -> io::Result<()> {
    let flags = UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // SAFETY: unsafe only for UnshareFlags::FILES, which would leave OwnedFds of other threads behind: it is not set.
    let thread = std::thread::spawn(move || unsafe { unshare_unsafe(flags) });
    match thread.join() {
        Ok(outcome) => outcome.map_err(io::Error::from),
        Err(_) => Err(io::Error::other("the thread that tried it panicked")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trial_guest_fits_into_its_memory_and_none_of_it_lies_on_another() {
        let mut memory = [0; MEMORY];
        fill(&mut memory).unwrap();
        assert!(memory[SCRATCH as usize..CODE].iter().all(|byte| *byte == 0));
        assert_eq!(memory[CODE], 0xc7);
        assert_eq!(u32::from(ANSWER), 2 * KNOWN);
    }
}
