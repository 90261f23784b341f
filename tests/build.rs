//! The agent is part of what a saved host is keyed by. Without names, line numbers and the linker's id it stays the same
//! when something else in this package changes.

fn main() {
    println!("cargo::rustc-link-arg-bin=berth-host-agent=-Wl,--strip-all,--build-id=none");
    println!("cargo::rerun-if-changed=build.rs");
}
