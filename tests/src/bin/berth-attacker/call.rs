//! System calls as an attacker makes them: by number, also those that no library has a safe function for.

use std::io;

/// Makes a system call. Arguments are numbers and the addresses that [`at`] and [`of`] give.
pub fn call(number: libc::c_long, arguments: &[usize]) -> io::Result<usize> {
    let argument = |index: usize| arguments.get(index).copied().unwrap_or(0);
    // SAFETY: the kernel reads and writes what the arguments point to. An address comes from `at` or `of`, so it is that
    // of a value which the caller still holds and which has the layout and the length that this call documents.
    let result = unsafe {
        libc::syscall(number, argument(0), argument(1), argument(2), argument(3), argument(4), argument(5))
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// The address of what the kernel reads.
pub fn at<T: ?Sized>(value: &T) -> usize {
    std::ptr::from_ref(value).cast::<u8>().expose_provenance()
}

/// The address of what the kernel may write.
pub fn of<T: ?Sized>(value: &mut T) -> usize {
    std::ptr::from_mut(value).cast::<u8>().expose_provenance()
}

/// A negative number as a system call takes it.
pub fn negative(number: i32) -> usize {
    number as isize as usize
}

/// Success, or this error, with which the kernel says that it would have done what was asked for if it made sense.
pub fn reached_or(result: io::Result<usize>, errno: i32) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() != Some(errno) => Err(error),
        _ => Ok(()),
    }
}
