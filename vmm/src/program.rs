//! The program's own pages in memory.
//!
//! The kernel maps pages of code sixteen at a time around each that is reached, and what the start needs (JSON, images, the
//! kernel's file, ACPI) is most of the program. In a cell these pages are nobody else's: each VMM has a copy of its own.

use std::ptr;

// Where the linker puts the program's constants and code, one after the other: from the beginning of the file to the end of
// its instructions.
unsafe extern "C" {
    static __executable_start: u8;
    static etext: u8;
}

/// Lets go of all pages of constants and code. What is used from now on comes back from the file as it is reached.
pub fn forget_the_start() {
    let (start, end) = (&raw const __executable_start, &raw const etext);
    let bytes = end.addr() - start.addr();
    // SAFETY: the range is the program's file, mapped for reading or execution only (the linker's symbols above), so none of
    // its pages differs from the file's; MADV_DONTNEED makes the next access read the same bytes from there.
    let result =
        unsafe { libc::madvise(ptr::without_provenance_mut(start.addr()), bytes, libc::MADV_DONTNEED) };
    if result != 0 {
        log::debug!("madvise on the program: {}", std::io::Error::last_os_error());
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_was_let_go_of_is_read_again() {
        super::forget_the_start();
        assert_eq!(format!("{}", "still here".len()), "10");
    }
}
