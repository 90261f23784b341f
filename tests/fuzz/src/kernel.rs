//! Kernel files: whatever the bytes are, an entry into what was loaded or an error.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;

use devices::memory::GuestRam;
use vm_memory::GuestAddress;

const RAM: usize = 64 << 20;

pub fn kernel_loader(data: &[u8]) {
    crate::log_to_nowhere();
    thread_local! {
        static FILE: RefCell<File> = RefCell::new(tempfile::tempfile().unwrap());
    }
    FILE.with_borrow_mut(|file| {
        // The first byte makes it longer than its content, with a hole: kernels are larger than a fuzzer's inputs.
        let Some((&pad, kernel)) = data.split_first() else { return };
        file.set_len(0).unwrap();
        file.write_all_at(kernel, 0).unwrap();
        file.set_len(kernel.len() as u64 + (u64::from(pad) << 12)).unwrap();
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        match vmm::boot::load(&ram, file, None, "console=ttyS0") {
            Ok(entry) => assert!((1 << 20..RAM as u64).contains(&entry.address), "{entry:?}"),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    });
}
