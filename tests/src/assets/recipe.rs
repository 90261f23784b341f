//! What there is to build: each asset's script, the files it reads and the assets it needs.
//!
//! The texts are compiled in, so that a program and its recipes cannot differ.

/// Something that [`super::ensure`] can make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asset {
    /// [`super::kernel`].
    Kernel,
    /// A static busybox, which both initramfs are made of.
    Busybox,
    /// [`super::guest_initramfs`].
    GuestInitramfs,
    /// [`super::guest_mptable`].
    GuestMptable,
    /// [`super::guest_debian`].
    GuestDebian,
    /// [`super::host_root`].
    HostRoot,
    /// [`super::host_initramfs`] without its agent.
    HostInitramfs,
}

/// How one asset is made. The script runs in a directory that holds it and `files`, and leaves its result in `$OUT`.
/// Each input's directory is in a variable named after it: `$KERNEL`, `$BUSYBOX`.
#[derive(Debug)]
pub struct Recipe {
    pub name: &'static str,
    pub script: &'static str,
    pub files: &'static [(&'static str, &'static str)],
    pub inputs: &'static [Asset],
    /// Files in it belong to several users, so it is made by root.
    pub as_root: bool,
}

macro_rules! text {
    ($name:literal) => {
        include_str!(concat!("../../../resources/guest/", $name))
    };
}

const DEBIAN: (&str, &str) = ("debian.sh", text!("debian.sh"));
const INITRAMFS: (&str, &str) = ("initramfs.sh", text!("initramfs.sh"));

pub const TOOLS: Recipe =
    Recipe { name: "tools", script: text!("tools.sh"), files: &[DEBIAN], inputs: &[], as_root: true };

impl Asset {
    pub fn recipe(self) -> Recipe {
        match self {
            Asset::Kernel => Recipe {
                name: "kernel",
                script: text!("kernel.sh"),
                files: &[DEBIAN],
                inputs: &[],
                as_root: false,
            },
            Asset::Busybox => Recipe {
                name: "busybox",
                script: text!("busybox.sh"),
                files: &[DEBIAN],
                inputs: &[],
                as_root: false,
            },
            Asset::GuestInitramfs => Recipe {
                name: "guest-initramfs",
                script: text!("guest-initramfs.sh"),
                files: &[
                    INITRAMFS,
                    ("guest-init", text!("guest-init")),
                    ("guest-profile", text!("guest-profile")),
                ],
                inputs: &[Asset::Kernel, Asset::Busybox],
                as_root: false,
            },
            Asset::GuestMptable => Recipe {
                name: "guest-mptable",
                script: text!("guest-mptable.sh"),
                files: &[DEBIAN, INITRAMFS],
                inputs: &[Asset::GuestInitramfs],
                as_root: false,
            },
            Asset::GuestDebian => Recipe {
                name: "guest-debian",
                script: text!("guest-debian.sh"),
                files: &[DEBIAN],
                inputs: &[Asset::Kernel],
                as_root: true,
            },
            Asset::HostRoot => Recipe {
                name: "host-root",
                script: text!("host-root.sh"),
                files: &[DEBIAN, ("qemu-from-backports", text!("qemu-from-backports"))],
                inputs: &[Asset::Kernel],
                as_root: true,
            },
            Asset::HostInitramfs => Recipe {
                name: "host-initramfs",
                script: text!("host-initramfs.sh"),
                files: &[INITRAMFS, ("host-init", text!("host-init"))],
                inputs: &[Asset::Kernel, Asset::Busybox],
                as_root: false,
            },
        }
    }
}
