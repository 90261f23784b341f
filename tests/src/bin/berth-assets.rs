//! Makes the guest and host assets that are named, or all of them, and says where they are.

use std::process::ExitCode;

use berth_tests::assets::{self, Asset, Error};

const ALL: [&str; 6] = ["tools", "kernel", "guest-initramfs", "guest-mptable", "guest-debian", "host-root"];

fn main() -> ExitCode {
    let named: Vec<String> = std::env::args().skip(1).collect();
    let wanted: Vec<&str> =
        if named.is_empty() { ALL.to_vec() } else { named.iter().map(String::as_str).collect() };
    if let Some(unknown) = wanted.iter().find(|name| !ALL.contains(name)) {
        eprintln!("berth-assets: {unknown} is none of: {}", ALL.join(" "));
        return ExitCode::FAILURE;
    }
    match make(&wanted) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("berth-assets: {error}");
            ExitCode::FAILURE
        }
    }
}

fn make(wanted: &[&str]) -> Result<(), Error> {
    let all_assets: Vec<Asset> = wanted
        .iter()
        .filter_map(|name| match *name {
            "kernel" => Some(Asset::Kernel),
            "guest-initramfs" => Some(Asset::GuestInitramfs),
            "guest-mptable" => Some(Asset::GuestMptable),
            "guest-debian" => Some(Asset::GuestDebian),
            "host-root" => Some(Asset::HostRoot),
            _ => None,
        })
        .collect();
    assets::ensure(&all_assets)?;
    for name in wanted {
        match *name {
            "tools" => println!("qemu {}", assets::tools()?.qemu.display()),
            "kernel" => {
                let kernel = assets::kernel()?;
                println!("kernel {} {}", kernel.bzimage.display(), kernel.vmlinux.display());
            }
            "guest-initramfs" => println!("guest-initramfs {}", assets::guest_initramfs()?.display()),
            "guest-mptable" => {
                let (kernel, initramfs) = assets::guest_mptable()?;
                println!("guest-mptable {} {}", kernel.display(), initramfs.display());
            }
            "guest-debian" => println!("guest-debian {}", assets::guest_debian()?.display()),
            "host-root" => println!("host-root {}", assets::host_root()?.display()),
            _ => {}
        }
    }
    Ok(())
}
