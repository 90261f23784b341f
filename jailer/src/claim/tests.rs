use super::*;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use rustix::fs::{Gid, Uid};

const PROGRAM: &str = "vmm";

fn own() -> Owner {
    Owner { uid: rustix::process::geteuid(), gid: rustix::process::getegid(), mode: PRIVATE }
}

fn stake(place: &tempfile::TempDir) -> Result<Claim> {
    Claim::stake(place.path(), OsStr::new(PROGRAM), "one")
}

fn made(place: &tempfile::TempDir) -> Claim {
    let mut claim = stake(place).unwrap();
    claim.make_directories(own(), Vec::new()).unwrap();
    claim
}

fn cell(place: &tempfile::TempDir) -> PathBuf {
    place.path().join("vmm/one")
}

fn mode(path: PathBuf) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// Everything that a start makes.
fn fill(cell: &Path) {
    for file in ["root/vmm", "root/vmm.pid"].iter().chain(&FILES) {
        fs::write(cell.join(file), "").unwrap();
    }
}

#[test]
fn directories_are_made_where_callers_expect_them_and_are_closed() {
    let place = tempfile::tempdir().unwrap();
    let claim = made(&place);
    for directory in DIRECTORIES {
        assert_eq!(mode(cell(&place).join(directory)), 0o700, "{directory}");
    }
    claim.release().unwrap();
    assert_eq!(fs::read_dir(cell(&place)).unwrap().count(), 1);
}

#[test]
fn what_was_made_is_taken_back_and_what_was_there_stays_as_it_was() {
    for prepared in [None, Some("root"), Some("root/dev/net"), Some("root/images")] {
        let place = tempfile::tempdir().unwrap();
        if let Some(prepared) = prepared {
            fs::create_dir_all(cell(&place).join(prepared)).unwrap();
            fs::set_permissions(cell(&place).join("root"), fs::Permissions::from_mode(0o1750)).unwrap();
            fs::write(cell(&place).join("root/image"), "precious").unwrap();
        }
        let claim = made(&place);
        assert_eq!(mode(cell(&place).join("root")), 0o700);
        fill(&cell(&place));
        claim.take_back().unwrap();
        match prepared {
            None => assert!(!cell(&place).exists()),
            Some(prepared) => {
                assert!(cell(&place).join(prepared).exists() && !cell(&place).join("root/run").exists());
                assert_eq!(mode(cell(&place).join("root")), 0o1750);
                assert_eq!(fs::read(cell(&place).join("root/image")).unwrap(), b"precious");
                assert!(!cell(&place).join("root/vmm").exists() && !cell(&place).join(MARKER).exists());
            }
        }
    }
}

#[test]
fn what_a_killed_jailer_left_is_removed_by_the_next_one() {
    for (was_there, is_full) in [(false, false), (false, true), (true, true)] {
        let place = tempfile::tempdir().unwrap();
        if was_there {
            fs::create_dir_all(cell(&place).join("root")).unwrap();
        }
        // Dropping it lets go of the lock and does nothing else.
        drop(made(&place));
        if is_full {
            fill(&cell(&place));
        }
        let claim = stake(&place).unwrap();
        assert!(claim.has_cleaned);
        assert_eq!(cell(&place).join("root").exists(), was_there);
        assert!(!cell(&place).join("root/vmm").exists());
        claim.take_back().unwrap();
        assert_eq!(cell(&place).exists(), was_there);
    }
}

#[test]
fn a_jailer_that_was_killed_while_it_took_back_is_cleaned_up_after_too() {
    let place = tempfile::tempdir().unwrap();
    drop(made(&place));
    fs::remove_dir_all(cell(&place).join("root")).unwrap();
    let claim = stake(&place).unwrap();
    assert!(claim.has_cleaned);
    claim.take_back().unwrap();
    assert!(!cell(&place).exists());
}

#[test]
fn a_cell_is_made_by_one_jailer_at_a_time() {
    let place = tempfile::tempdir().unwrap();
    let claim = made(&place);
    let error = stake(&place).unwrap_err().to_string();
    assert!(error.contains("another jailer is at work"), "{error}");
    claim.take_back().unwrap();
    assert!(!stake(&place).unwrap().has_cleaned);
}

#[test]
fn a_cell_that_was_handed_over_is_not_touched_and_told_how_to_remove() {
    let place = tempfile::tempdir().unwrap();
    let claim = made(&place);
    fill(&cell(&place));
    claim.release().unwrap();
    drop(claim);
    let mut claim = stake(&place).unwrap();
    assert!(!claim.has_cleaned);
    let error = claim.make_directories(own(), Vec::new()).unwrap_err().to_string();
    let command = format!("rm -r --one-file-system {}", cell(&place).display());
    assert!(error.contains("root/vmm is there already") && error.ends_with(&command), "{error}");
    claim.take_back().unwrap();
    assert!(cell(&place).join("root/vmm.pid").exists());
}

#[test]
fn groups_that_were_made_are_removed_and_parents_stay() {
    let place = tempfile::tempdir().unwrap();
    let hierarchy = tempfile::tempdir().unwrap();
    let group = hierarchy.path().join("parent/one");
    let mut claim = stake(&place).unwrap();
    claim.make_directories(own(), vec![group.clone(), hierarchy.path().join("absent/one")]).unwrap();
    fs::create_dir_all(&group).unwrap();
    drop(claim);
    assert!(stake(&place).unwrap().has_cleaned);
    assert!(!group.exists() && group.parent().unwrap().exists());
}

#[test]
fn a_link_in_the_place_of_any_directory_is_refused() {
    for part in
        ["vmm", "vmm/one", "vmm/one/root", "vmm/one/root/dev", "vmm/one/root/dev/net", "vmm/one/root/run"]
    {
        let place = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let link = place.path().join(part);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(elsewhere.path(), &link).unwrap();
        let error = stake(&place).and_then(|mut claim| {
            let made = claim.make_directories(own(), Vec::new());
            claim.take_back().unwrap();
            made
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("symbolic link"), "{part}: {error}");
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    }
}

#[test]
fn a_marker_of_somebody_elses_is_refused() {
    let place = tempfile::tempdir().unwrap();
    fs::create_dir_all(cell(&place)).unwrap();
    let marker = cell(&place).join(MARKER);
    fs::write(&marker, "files\n").unwrap();
    let error = stake(&place).unwrap_err().to_string();
    assert!(error.contains("not a file that a jailer made"), "{error}");
    if rustix::process::geteuid().is_root() {
        fs::set_permissions(&marker, fs::Permissions::from_mode(0o600)).unwrap();
        rustix::fs::chown(&marker, Some(Uid::from_raw(1234)), Some(Gid::from_raw(0))).unwrap();
        assert!(stake(&place).is_err());
    }
}

#[test]
fn a_base_that_is_none_is_named() {
    let error = Claim::stake(Path::new("/no/such/base"), OsStr::new(PROGRAM), "one").unwrap_err().to_string();
    assert!(error.contains("--chroot-base-dir") && error.contains("/no/such/base"), "{error}");
}
