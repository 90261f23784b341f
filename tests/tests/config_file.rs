//! A guest from a configuration file, with the API or without, is checked as one from requests is, and what is wrong is the
//! process's last word.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::fs;

use api_socket::InstanceState;
use berth_tests::guest::{Ended, Kernel, Name, Vmm, asset, limits};
use berth_tests::host::provide;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A guest that says something and powers off.
fn good() -> Value {
    json!({
        "boot-source": {
            "kernel_image_path": Kernel::Elf.path(),
            "initrd_path": asset(provide::INITRAMFS),
            "boot_args": "console=ttyS0 quiet panic=1 berth.run=\"nproc; echo from-the-file\"",
        },
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 128},
    })
}

fn run(config: &Value, arguments: &[&str]) -> Vmm {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("vm.json"), config.to_string()).unwrap();
    start(directory, &[&["--config-file", "vm.json"], arguments].concat())
}

fn start(directory: TempDir, arguments: &[&str]) -> Vmm {
    Vmm::spawn_in(directory, Name::Berth, arguments)
}

#[test]
fn a_guest_runs_from_a_file_without_an_api() {
    let mut vmm = run(&good(), &["--no-api"]);
    let console = vmm.console().wait_for_end(limits::BOOT);
    assert_eq!(vmm.ended(limits::EXIT), Ended::Code(0));
    assert!(console.contains("2\nfrom-the-file\nBERTH-EXIT 0"), "{console}");
    assert!(!vmm.path("api.sock").exists());
}

#[test]
fn a_guest_runs_from_a_file_with_an_api() {
    let mut vmm = run(&good(), &["--api-sock", "api.sock"]);
    let mut client = vmm.client();
    assert_eq!(client.instance_info().unwrap().state, InstanceState::Running);
    assert_eq!(client.machine_config().unwrap().vcpu_count, 2);
    let console = vmm.console().wait_for_end(limits::BOOT);
    assert!(console.contains("from-the-file"), "{console}");
    assert_eq!(vmm.ended(limits::EXIT), Ended::Code(0));
}

#[test]
fn what_is_wrong_in_a_file_is_told_and_ends_with_152() {
    let with = |section: &str, value: Value| {
        let mut config = good();
        config[section] = value;
        config
    };
    let disk = json!({"drive_id": "d", "is_root_device": false, "path_on_host": "/no/such/disk"});
    let cases = [
        (json!({}), vec!["vm.json", "missing field `boot-source`"]),
        (with("machine", json!({})), vec!["vm.json", "unknown field `machine`"]),
        (
            with("machine-config", json!({"vcpu_count": 1})),
            vec!["machine-config", "missing field `mem_size_mib`"],
        ),
        (
            with("machine-config", json!({"vcpu_count": "1", "mem_size_mib": 1})),
            vec!["vcpu_count", "an integer"],
        ),
        (
            with("machine-config", json!({"vcpu_count": 33, "mem_size_mib": 128})),
            vec!["vcpu_count", "33", "32"],
        ),
        (
            with("boot-source", json!({"kernel_image_path": "/no/such/kernel"})),
            vec!["kernel_image_path", "/no/such"],
        ),
        (
            with("boot-source", json!({"kernel_image_path": "vm.json"})),
            vec!["kernel_image_path", "not a kernel"],
        ),
        (with("drives", json!([disk])), vec!["path_on_host", "/no/such/disk"]),
        (with("vsock", json!({"guest_cid": 2, "uds_path": "v"})), vec!["guest_cid", "2"]),
        (with("vsock", json!({"guest_cid": 3, "uds_path": "vm.json"})), vec!["uds_path", "vm.json"]),
    ];
    for (config, words) in cases {
        let mut vmm = run(&config, &["--no-api"]);
        let console = vmm.console();
        assert_eq!(vmm.ended(limits::EXIT), Ended::Code(152), "{config}");
        let said = vmm.errors();
        for word in words {
            assert!(said.contains(word), "{config}: {word:?} is not in: {said}");
        }
        drop(console);
    }
}

#[test]
fn a_file_that_cannot_be_read_ends_with_152() {
    let mut vmm = start(tempfile::tempdir().unwrap(), &["--no-api", "--config-file", "none.json"]);
    assert_eq!(vmm.ended(limits::EXIT), Ended::Code(152));
    assert!(vmm.errors().contains("none.json"), "{}", vmm.errors());
}

#[test]
fn wrong_arguments_end_with_153() {
    let cases: [(&[&str], &str); 5] = [
        (&["--colour"], "--colour"),
        (&["--id", "a/b"], "--id"),
        (&["--no-api"], "--config-file"),
        (&["--level", "loud", "--api-sock", "s"], "--level"),
        (&["--api-sock"], "--api-sock"),
    ];
    for (arguments, word) in cases {
        let mut vmm = start(tempfile::tempdir().unwrap(), arguments);
        assert_eq!(vmm.ended(limits::EXIT), Ended::Code(153), "{arguments:?}");
        assert!(vmm.errors().contains(word), "{arguments:?}: {}", vmm.errors());
    }
}

#[test]
fn a_socket_that_cannot_be_made_ends_with_1_and_is_named() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("taken"), "").unwrap();
    let mut vmm = start(directory, &["--api-sock", "taken"]);
    assert_eq!(vmm.ended(limits::EXIT), Ended::Code(1));
    assert!(vmm.errors().contains("taken"), "{}", vmm.errors());
}
