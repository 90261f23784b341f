//! The heap of this process: one arena for all threads.
//!
//! glibc gives each new thread an arena, which takes four system calls and pages of its own, so that threads which
//! allocate much do not wait for each other. Ours allocate little, and nothing at all for a request of the guest's.

/// Before the first thread starts.
pub fn share() {
    // SAFETY: mallopt only changes a setting of malloc's, and no other thread is there that could be in malloc: called
    // first in `main`. A libc that does not know the setting says so by 0, and then nothing changes.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
