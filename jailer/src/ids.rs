//! Who the process is in the end: an ordinary user without a capability, who can get none.

use std::fs::File;
use std::io::Write as _;

use rustix::fs::{Gid, Uid};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, UnshareFlags, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
};

use crate::args::Args;
use crate::error::{During, Error, Result};

/// The calling thread becomes this user and group, for good. The calls below are the kernel's own: other threads stay who
/// they are.
///
/// An ordinary user keeps all groups. Where the user is root, what is left is root without capabilities: the owner of root's files.
///
/// # Errors
/// The process is not root, or lacks the capabilities to give them up properly.
pub fn become_user(user: &User) -> Result<()> {
    let (uid, gid) = (user.uid, user.gid);
    // First what needs capabilities. With an empty bounding set, no exec gives one back, not even root's.
    empty_bounding_set()?;
    clear_ambient_capability_set().during(|| "cannot clear the ambient capabilities".into())?;
    if !user.is_own {
        set_thread_groups(&[]).during(|| "cannot leave the caller's groups".into())?;
    }
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
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            Err(Errno::INVAL) => return Ok(()),
            Err(error) => {
                return Err(error)
                    .during(|| format!("cannot drop capability {number} from the bounding set"));
            }
        }
    }
    Ok(())
}

/// Whom the VMM runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    pub uid: Uid,
    pub gid: Gid,
    /// Whether that is who we are: an ordinary user, who is to stay one.
    pub is_own: bool,
}

/// Finds out whom the VMM runs as, and whether we can bring that about.
///
/// # Errors
/// We are not root, and it takes root; or we are, and were told to do without.
pub fn user(args: &Args) -> Result<User> {
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    match (args.rootless, args.user) {
        (false, Some((uid_wanted, gid_wanted))) if uid.is_root() => {
            Ok(User { uid: uid_wanted, gid: gid_wanted, is_own: false })
        }
        (true, _) if uid.is_root() => {
            Err(Error::Refused("--rootless is for an ordinary user, and this is root; leave it out".into()))
        }
        (true, wanted) if wanted.is_none_or(|wanted| wanted == (uid, gid)) => Ok(User { uid, gid, is_own: true }),
        (true, _) => Err(Error::Refused(format!(
            "--uid, --gid: with --rootless the VMM can only run as yourself, {uid} and {gid}; leave them out"
        ))),
        (false, _) => Err(Error::Refused(
            "building a cell takes a mount namespace, device nodes and another user, so it takes root; run this as root, \
             or give --rootless for a weaker cell"
                .into(),
        )),
    }
}

/// Goes on in a user namespace where there is only this user and this group. In it we have all capabilities, over what is
/// made in it.
///
/// # Errors
/// The host does not let ordinary users make user namespaces.
pub fn enter_user_namespace(user: &User) -> Result<()> {
    // SAFETY: unsafe only for UnshareFlags::FILES, which would leave OwnedFds of other threads behind: it is not set.
    unsafe { unshare_unsafe(UnshareFlags::NEWUSER) }.during(|| {
        "--rootless: cannot make a user namespace; the host has to let ordinary users make one \
         (kernel.unprivileged_userns_clone, user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns)"
            .into()
    })?;
    let (uid, gid) = (user.uid, user.gid);
    // To leave a group could be to gain a right, where a file is closed to that group: the kernel wants it ruled out.
    map("setgroups", "deny")?;
    map("gid_map", &format!("{gid} {gid} 1"))?;
    map("uid_map", &format!("{uid} {uid} 1"))
}

fn map(file: &str, text: &str) -> Result<()> {
    let path = format!("/proc/self/{file}");
    let written =
        File::options().write(true).open(&path).and_then(|mut file| file.write_all(text.as_bytes()));
    written.during(|| format!("cannot write {text:?} to {path}"))
}

/// What an ordinary user's cell lacks of root's, to be told to whoever asks for one.
pub fn weaknesses(args: &Args, user: &User) -> String {
    let groups = match args.cgroups.settings.is_empty() {
        true => " Nothing limits its memory and CPU time: there is no --cgroup.",
        false => "",
    };
    format!(
        "--rootless: a cell weaker than root's. The VMM runs as you, user {}, with all your groups, and in your network. \
         Whoever gets out of the cell is you.{groups}",
        user.uid
    )
}
