//! The Debian package, from outside: the same programs give the same file, and it has what docs/install.md names.
//! Installing it is package.rs's.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Files without the man pages of commands, which the command line's own tests count.
const FILES: [&str; 24] = [
    "./etc/berth/berthd.toml",
    "./lib/systemd/system/berth-vmm@.service",
    "./lib/systemd/system/berthd.service",
    "./lib/systemd/system/berthd.socket",
    "./usr/bin/berth",
    "./usr/lib/berth/berth-agent",
    "./usr/lib/berth/berth-jailer",
    "./usr/lib/berth/berth-vmm",
    "./usr/lib/sysusers.d/berth.conf",
    "./usr/lib/tmpfiles.d/berth.conf",
    "./usr/sbin/berthd",
    "./usr/share/bash-completion/completions/berth",
    "./usr/share/doc/berth/CHANGELOG.md",
    "./usr/share/doc/berth/changelog.gz",
    "./usr/share/doc/berth/copyright",
    "./usr/share/doc/berth/docs/install.md",
    "./usr/share/doc/berth/third-party.txt.gz",
    "./usr/share/fish/vendor_completions.d/berth.fish",
    "./usr/share/man/man1/berth-run.1.gz",
    "./usr/share/man/man1/berth.1.gz",
    "./usr/share/man/man8/berth-jailer.8.gz",
    "./usr/share/man/man8/berth-vmm.8.gz",
    "./usr/share/man/man8/berthd.8.gz",
    "./usr/share/zsh/vendor-completions/_berth",
];

fn build(directory: &Path) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    // This test is in .../debug/deps/.
    let own = std::env::current_exe().unwrap();
    let programs = own.ancestors().nth(3).unwrap().join("release");
    let output = Command::new(root.join("resources/deb/build.sh"))
        .args([&programs, directory])
        .args(["1.2.3"])
        .env("SOURCE_DATE_EPOCH", "1700000000")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    directory.join("berth_1.2.3_amd64.deb")
}

fn run(program: &str, arguments: &[&str], package: &Path) -> String {
    let output = Command::new(program).args(arguments).arg(package).output().unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_package_has_what_it_should_and_is_the_same_each_time() {
    let places = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let packages = places.each_ref().map(|place| build(place.path()));
    let bytes = packages.each_ref().map(|package| fs::read(package).unwrap());
    assert!(bytes[0] == bytes[1], "two packages of the same programs differ");

    let package = &packages[0];
    let list = run("dpkg-deb", &["--contents"], package);
    for line in list.lines() {
        assert!(line.contains(" root/root ") && line.contains(" 2023-11-14 22:13 "), "{line}");
        // Nothing that others may write, nothing that gives rights.
        assert!(!line[..10].contains('s') && line.as_bytes()[8] == b'-', "{line}");
    }
    for file in FILES {
        assert!(list.lines().any(|line| line.ends_with(&format!(" {file}"))), "{file} is missing:\n{list}");
    }
    let told = run("dpkg-deb", &["--field"], package);
    for field in
        ["Package: berth\n", "Version: 1.2.3\n", "Architecture: amd64\n", "iproute2", "nftables", "kmod"]
    {
        assert!(told.contains(field), "{field}: {told}");
    }
    if Command::new("lintian").arg("--version").output().is_ok_and(|output| output.status.success()) {
        let faults = ["--fail-on", "error,warning", "--allow-root"];
        run("lintian", &faults, package);
    }
}
