//! Random bytes from the host's kernel: the one call, for whatever needs it.

use std::io;

/// Fills `bytes` from the kernel's random number generator (getrandom(2)). Never blocks on a host that has booted.
pub fn fill(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        // SAFETY: getrandom writes at most `bytes.len()` bytes at `bytes.as_mut_ptr()`, which `bytes` owns exclusively.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => bytes = bytes.get_mut(got..).unwrap_or_default(),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn all_bytes_are_filled_and_differ() {
        let (mut a, mut b) = ([0; 400], [0; 400]);
        super::fill(&mut a).unwrap();
        super::fill(&mut b).unwrap();
        assert_ne!(a, b);
        assert_ne!(a[384..], [0; 16], "the end is filled too");
        super::fill(&mut []).unwrap();
    }
}
