//! Who the process is in the end: an ordinary user without a capability, who can get none.

use rustix::fs::{Gid, Uid};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

use crate::error::{During, Error, Result};

/// Becomes this user and group, for good. The process must have one thread, for the calls below are the kernel's own and
/// change no other.
///
/// Where the user is root, what is left is root without capabilities: the owner of root's files.
///
/// # Errors
/// The process is not root, or lacks the capabilities to give them up properly.
pub fn become_user(uid: Uid, gid: Gid) -> Result<()> {
    // First what needs capabilities. With an empty bounding set, no exec gives one back, not even root's.
    empty_bounding_set()?;
    clear_ambient_capability_set().during(|| "cannot clear the ambient capabilities".into())?;
    set_thread_groups(&[]).during(|| "cannot leave the caller's groups".into())?;
    // The group goes before the user: afterwards there is no right to change it.
    set_thread_res_gid(gid, gid, gid).during(|| format!("cannot become --gid {gid}"))?;
    set_thread_res_uid(uid, uid, uid).during(|| format!("cannot become --uid {uid}"))?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .during(|| "cannot give up the capabilities".into())?;
    set_no_new_privs(true).during(|| "cannot set no_new_privs".into())
}

fn empty_bounding_set() -> Result<()> {
    for number in 0..u64::BITS {
        // By number, for the kernel may know more than we do; it says where its list ends.
        let capability = CapabilitySet::from_bits_retain(1 << number);
        let dropped = match capability_is_in_bounding_set(capability) {
            Ok(true) => remove_capability_from_bounding_set(capability),
            Ok(false) => Ok(()),
            Err(Errno::INVAL) => return Ok(()),
            Err(error) => Err(error),
        };
        dropped.during(|| format!("cannot drop capability {number} from the bounding set"))?;
    }
    Ok(())
}

/// Refuses to go on as anyone but root.
///
/// # Errors
/// The process is not root.
pub fn require_root() -> Result<()> {
    match rustix::process::geteuid().is_root() {
        true => Ok(()),
        false => Err(Error::Refused(
            "only root can build a cell: it takes a mount namespace, device nodes and another user; run this as root"
                .into(),
        )),
    }
}
