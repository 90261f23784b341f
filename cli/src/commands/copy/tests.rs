use super::*;
use std::os::unix::fs::symlink;

#[test]
fn a_copy_goes_into_a_directory_that_is_there_or_has_the_name_that_is_said() {
    let here = tempfile::tempdir().unwrap();
    let at = |path: &str| here.path().join(path);
    fs::create_dir(at("dir")).unwrap();
    fs::write(at("file"), "").unwrap();
    let place = |to: &str, from: &str| place(&at(to), Path::new(from));
    assert_eq!(place("dir", "/etc/hosts"), Ok((at("dir"), "hosts".into())));
    assert_eq!(place("dir/", "/etc/hosts"), Ok((at("dir/"), "hosts".into())));
    assert_eq!(place("dir", "/"), Ok((at("dir"), "root".into())));
    assert_eq!(
        place("new", "/etc/hosts"),
        Ok((at(""), "new".into())).map(|(_, name)| (here.path().into(), name))
    );
    assert_eq!(place("file", "/etc/hosts"), Ok((here.path().into(), "file".into())));
    assert!(place("new/", "/etc/hosts").unwrap_err().contains("slash"));
    assert!(place("no/new", "/etc/hosts").unwrap_err().contains("no directory"));
    assert_eq!(super::place(Path::new("new-here"), Path::new("/x")), Ok((".".into(), "new-here".into())));
}

#[test]
fn in_a_guest_it_is_the_same() {
    let inside = |path: &str, kind| inside(path, kind, Path::new("local/site"));
    assert_eq!(inside("/srv", Kind::Directory), Ok(("/srv".into(), "site".into())));
    assert_eq!(inside("/srv/new", Kind::Nothing), Ok(("/srv".into(), "new".into())));
    assert_eq!(inside("/new", Kind::Nothing), Ok(("/".into(), "new".into())));
    assert_eq!(inside("/srv/file", Kind::File), Ok(("/srv".into(), "file".into())));
    assert!(inside("/srv/new/", Kind::Nothing).unwrap_err().contains("slash"));
    assert!(inside("/dev/null", Kind::Other).unwrap_err().contains("neither"));
}

#[test]
fn this_directory_has_a_name_in_a_guest() {
    let (_, name) = inside("/srv", Kind::Directory, Path::new(".")).unwrap();
    assert_eq!(name, std::env::current_dir().unwrap().file_name().unwrap());
    let (_, root) = inside("/srv", Kind::Directory, Path::new("/")).unwrap();
    assert_eq!(root, "root");
}

#[test]
fn what_was_unpacked_is_merged_with_what_is_there_and_no_link_is_followed() {
    let here = tempfile::tempdir().unwrap();
    let at = |path: &str| here.path().join(path);
    fs::create_dir_all(at("from/sub")).unwrap();
    fs::write(at("from/sub/new"), "new").unwrap();
    fs::write(at("from/over"), "new").unwrap();
    fs::create_dir_all(at("to/sub")).unwrap();
    fs::write(at("to/sub/old"), "old").unwrap();
    fs::write(at("to/over"), "old").unwrap();
    put(&at("from"), &at("to"), 10).unwrap();
    let read = |path: &str| fs::read_to_string(at(path)).unwrap();
    assert_eq!(
        (read("to/sub/new"), read("to/sub/old"), read("to/over")),
        ("new".into(), "old".into(), "new".into())
    );

    // A link that is there is what is replaced, not what it leads to.
    fs::create_dir_all(at("again/sub")).unwrap();
    fs::write(at("again/sub/x"), "x").unwrap();
    fs::create_dir(at("outside")).unwrap();
    fs::remove_dir_all(at("to/sub")).unwrap();
    symlink(at("outside"), at("to/sub")).unwrap();
    assert!(put(&at("again"), &at("to"), 10).is_err());
    assert_eq!(fs::read_dir(at("outside")).unwrap().count(), 0);
}

#[test]
fn what_is_neither_a_file_nor_a_directory_is_not_replaced() {
    let here = tempfile::tempdir().unwrap();
    let at = |path: &str| here.path().join(path);
    fs::create_dir(at("to")).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(at("to/other")).unwrap();
    symlink(at("to/other"), at("link")).unwrap();
    symlink(at("nowhere"), at("dangling")).unwrap();
    for refused in ["to/other", "link"] {
        assert_eq!(may_replace(&at(refused)), Err(OTHER), "{refused}");
    }
    for allowed in ["to", "dangling", "none"] {
        assert_eq!(may_replace(&at(allowed)), Ok(()), "{allowed}");
    }
    // Nor inside of a directory that is merged.
    fs::create_dir(at("from")).unwrap();
    fs::write(at("from/other"), "").unwrap();
    let error = put(&at("from"), &at("to"), 10).unwrap_err().to_string();
    assert!(error.contains("to/other: it is neither"), "{error}");
    assert!(!fs::symlink_metadata(at("to/other")).unwrap().is_file());
    drop(socket);
}

#[test]
fn directories_are_merged_to_a_depth() {
    let here = tempfile::tempdir().unwrap();
    for side in ["from", "to"] {
        fs::create_dir_all(here.path().join(side).join("a/b/c")).unwrap();
    }
    assert!(put(&here.path().join("from"), &here.path().join("to"), 3).is_err());
    put(&here.path().join("from"), &here.path().join("to"), 4).unwrap();
}

/// A guest that sends more than it was asked for, and links that lead elsewhere.
#[test]
fn of_what_a_guest_sends_only_what_was_asked_for_comes_to_lie_here() {
    let here = tempfile::tempdir().unwrap();
    let sent = tempfile::tempdir().unwrap();
    fs::write(sent.path().join("wanted"), "wanted").unwrap();
    fs::write(sent.path().join(".bashrc"), "evil").unwrap();
    let mut archive = Vec::new();
    for name in ["wanted", ".bashrc"] {
        // The end of an archive is two blocks of zeros.
        archive.truncate(archive.len().saturating_sub(1024));
        files::pack(&sent.path().join(name), Path::new(name), Owners::Kept, &mut archive).unwrap();
    }
    {
        let staging = Staging::make(here.path()).unwrap();
        files::unpack(&archive[..], &staging.0, Owners::Own).unwrap();
        assert!(staging.0.join(".bashrc").exists());
        put(&staging.0.join("wanted"), &here.path().join("wanted"), MAX_DEPTH).unwrap();
    }
    let names: Vec<_> = fs::read_dir(here.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["wanted"]);
}
