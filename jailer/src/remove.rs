//! The end of a cell whose VMM has ended (`--remove`): its control group, then its directory with all that is in it.
//!
//! What is in it the VMM's user may have made, and a VMM that was broken into was that user. So it is removed as all else is
//! done in a cell: by open directories and single names, without following a link, and not across a mount (`dir.rs`). Nothing
//! is killed and nothing is unmounted: whoever still lives there is named.

use std::ffi::OsStr;
use std::path::Path;

use crate::args::Removal;
use crate::cgroup;
use crate::claim::{self, MARKER, ROOT};
use crate::dir::Dir;
use crate::error::{Error, Result};

/// Removes what there is of a cell; it need not be there.
///
/// # Errors
/// Another jailer works on it, somebody lives in it or in its group, or something cannot be removed. Another call goes on where
/// this one stopped.
pub fn remove(removal: &Removal) -> Result<()> {
    let base = claim::open_base(&removal.base)?;
    let cells = present(base.enter(&removal.program_name))?;
    let cell = cells.as_ref().map(|cells| present(cells.enter(&removal.id))).transpose()?.flatten();
    // Held to the end, so that nobody makes a cell of this id meanwhile.
    let lock = cell.as_ref().map(|cell| present(claim::lock(cell))).transpose()?.flatten();
    if let Some(cell) = &cell {
        check_nobody_lives_in(cell, removal)?;
    }
    // First of all, for it is the kernel that says whether somebody is in it.
    cgroup::remove_all(&removal.cgroups, &removal.id)?;
    if let (Some(cells), Some(cell), Some(_)) = (cells, cell, &lock) {
        cell.empty(&[MARKER])?;
        cell.remove_file(MARKER)?;
        cells.remove_dir(&removal.id)?;
    }
    Ok(())
}

/// Nothing for what is not there.
fn present<T>(found: Result<T>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

fn check_nobody_lives_in(cell: &Dir, removal: &Removal) -> Result<()> {
    let Some(root) = present(cell.enter(ROOT))? else { return Ok(()) };
    let seen = claim::processes_in(&root).first().copied();
    match seen.or_else(|| recorded(&root, &removal.program_name, &removal.id)) {
        None => Ok(()),
        Some(pid) => Err(Error::Refused(format!(
            "process {pid} is in the cell {}; when it has ended, remove the cell",
            cell.path().display()
        ))),
    }
}

/// The process of the pid file, if it is this cell's VMM: an ordinary user does not see whose root is where. Nobody trusts
/// what the file says: it can only keep the cell.
fn recorded(root: &Dir, program: &OsStr, id: &str) -> Option<u32> {
    let mut name = program.to_owned();
    name.push(".pid");
    let pid: u32 = root.read(name.to_str()?).ok()?.parse().ok()?;
    let command = std::fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).ok()?;
    is_vmm_of(&command, program, id).then_some(pid)
}

/// Whether a command line, as in /proc, is one that the jailer gives a VMM. That of a zombie is empty.
fn is_vmm_of(command: &[u8], program: &OsStr, id: &str) -> bool {
    command.starts_with(&[b"/", program.as_encoded_bytes(), b"\0--id\0", id.as_bytes(), b"\0"].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use crate::args::{Cgroups, Version};

    fn removal(place: &tempfile::TempDir) -> Removal {
        let cgroups = Cgroups {
            version: Version::V2,
            parent: "berth-none".into(),
            is_parent_given: true,
            settings: Vec::new(),
        };
        Removal { id: "one".into(), program_name: "vmm".into(), base: place.path().into(), cgroups }
    }

    fn cell(place: &tempfile::TempDir) -> PathBuf {
        place.path().join("vmm/one")
    }

    #[test]
    fn a_cell_is_removed_with_all_that_is_in_it_and_what_is_not_there_need_not_be() {
        let place = tempfile::tempdir().unwrap();
        remove(&removal(&place)).unwrap();
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
        fs::create_dir_all(cell(&place).join("root/dev/net")).unwrap();
        fs::create_dir_all(place.path().join("vmm/two/root")).unwrap();
        for file in ["notes", "root/vmm", "root/vmm.pid", "root/dev/kvm"] {
            fs::write(cell(&place).join(file), "").unwrap();
        }
        for _ in 0..2 {
            remove(&removal(&place)).unwrap();
            assert!(!cell(&place).exists() && place.path().join("vmm/two/root").exists());
        }
    }

    #[test]
    fn no_link_is_followed_wherever_it_was_planted() {
        let place = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        fs::write(elsewhere.path().join("file"), "precious").unwrap();
        fs::create_dir_all(cell(&place).join("root/run")).unwrap();
        symlink(elsewhere.path(), cell(&place).join("root/run/directory")).unwrap();
        symlink(elsewhere.path().join("file"), cell(&place).join("root/link")).unwrap();
        fs::hard_link(elsewhere.path().join("file"), cell(&place).join("root/hard")).unwrap();
        remove(&removal(&place)).unwrap();
        assert!(!cell(&place).exists());
        for link in ["vmm/one/root", "vmm/one", "vmm"] {
            let _ = fs::remove_dir_all(place.path().join("vmm"));
            let link = place.path().join(link);
            fs::create_dir_all(link.parent().unwrap()).unwrap();
            symlink(elsewhere.path(), &link).unwrap();
            let error = remove(&removal(&place)).unwrap_err().to_string();
            assert!(error.contains("is a symbolic link"), "{error}");
            let _ = fs::remove_file(&link);
        }
        assert_eq!(fs::read(elsewhere.path().join("file")).unwrap(), b"precious");
    }

    #[test]
    fn a_cell_that_another_jailer_works_on_is_left_as_it_is() {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir_all(cell(&place).join("root")).unwrap();
        let held = claim::lock(&Dir::open(&cell(&place)).unwrap()).unwrap();
        let error = remove(&removal(&place)).unwrap_err().to_string();
        assert!(error.contains("another jailer is at work"), "{error}");
        drop(held);

        // It was the lock alone.
        remove(&removal(&place)).unwrap();
        assert!(!cell(&place).exists());
    }

    #[test]
    fn a_vmm_is_known_by_its_name_and_its_id() {
        let is = |command: &str| is_vmm_of(command.as_bytes(), OsStr::new("vmm"), "one");
        assert!(is("/vmm\0--id\0one\0--start-time-us\0"));
        for other in [
            "",
            "/vmm\0--id\0one-more\0",
            "/vmm2\0--id\0one\0",
            "vmm\0--id\0one\0",
            "/bin/sh\0/vmm\0--id\0one\0",
        ] {
            assert!(!is(other), "{other:?}");
        }
        // Nobody's cell is kept by what the file says of this process.
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("vmm.pid"), std::process::id().to_string()).unwrap();
        assert_eq!(recorded(&Dir::open(place.path()).unwrap(), OsStr::new("vmm"), "one"), None);
    }

    #[test]
    fn a_base_that_is_not_there_is_a_mistake() {
        let place = tempfile::tempdir().unwrap();
        let removal = Removal { base: place.path().join("none"), ..removal(&place) };
        assert!(remove(&removal).unwrap_err().to_string().contains("--chroot-base-dir"));
    }
}
