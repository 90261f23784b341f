//! The kernel command line as text: what it may hold, and how arguments of ours get into one of somebody else's.

use api_socket::Fault;

use crate::args::Identity;
use crate::x86_64::layout;

/// The longest command line, in bytes, without the NUL that ends it. A kernel may take less; `boot.rs` asks it.
pub const MAX_LENGTH: usize = layout::CMDLINE_CAPACITY as usize - 1;

/// What separates the kernel's arguments from those of init.
const INIT_ARGS: &str = " -- ";

/// The arguments when none are given.
pub fn default_args(identity: Identity) -> &'static str {
    match identity {
        // A distribution's kernel, seen on the serial port; it ends the guest when it panics.
        Identity::Berth => "console=ttyS0 reboot=k panic=1",
        // Firecracker's, for a kernel without modules and a console that nobody looks at.
        Identity::Firecracker => {
            "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce"
        }
    }
}

/// Checks a command line that a client gives.
///
/// # Errors
/// It is too long by itself, or has characters that a kernel would not take as they are.
pub fn check(args: &str) -> Result<(), Fault> {
    if let Some(bad) = args.chars().find(|char| !matches!(char, ' '..='~' | '\t')) {
        return Err(Fault::bad_request(format!(
            "`boot_args` has {bad:?} in it; a kernel command line has only printable ASCII characters and spaces."
        )));
    }
    check_length(args)
}

/// Adds arguments for the kernel to a command line; empty ones are none.
///
/// # Errors
/// The whole is too long.
pub fn compose(args: &str, additions: &[String]) -> Result<String, Fault> {
    // A line may also consist of nothing but arguments for init.
    let init = if args.starts_with(INIT_ARGS.trim_start()) { Some(0) } else { args.find(INIT_ARGS) };
    let (kernel, init) = args.split_at(init.unwrap_or(args.len()));
    let parts = std::iter::once(kernel).chain(additions.iter().map(String::as_str)).chain([init]);
    let line = parts.map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ");
    check_length(&line)?;
    Ok(line)
}

fn check_length(args: &str) -> Result<(), Fault> {
    if args.len() > MAX_LENGTH {
        return Err(Fault::bad_request(format!(
            "`boot_args` is too long: the kernel command line would have {} bytes, and may have {MAX_LENGTH}.",
            args.len()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn composed(args: &str, additions: &[&str]) -> String {
        let additions: Vec<_> = additions.iter().map(|addition| addition.to_string()).collect();
        compose(args, &additions).unwrap()
    }

    #[test]
    fn arguments_are_added_after_those_that_were_given() {
        assert_eq!(composed("quiet", &["pci=off", "", "root=/dev/vda rw"]), "quiet pci=off root=/dev/vda rw");
        assert_eq!(composed("", &["a"]), "a");
        assert_eq!(composed(" a  b ", &[]), "a  b");
        assert_eq!(composed("", &[]), "");
    }

    #[test]
    fn inits_arguments_stay_at_the_end() {
        assert_eq!(composed("quiet -- single x", &["pci=off"]), "quiet pci=off -- single x");
        assert_eq!(composed("-- single", &["pci=off"]), "pci=off -- single");
        assert_eq!(composed("a=--b --c", &["pci=off"]), "a=--b --c pci=off");
        assert_eq!(composed("a -- b -- c", &["d"]), "a d -- b -- c");
    }

    #[test]
    fn only_what_a_kernel_takes_as_it_is_may_be_in_it() {
        check("console=ttyS0\troot=\"a b\" ~").unwrap();
        for bad in ["a\0b", "a\nb", "a\u{7f}", "é", "\u{1b}[m"] {
            let fault = check(bad).unwrap_err();
            assert!(fault.message.contains("boot_args") && fault.message.contains("printable"), "{fault}");
        }
    }

    #[test]
    fn it_is_as_long_as_its_place_in_memory_and_no_longer() {
        check(&"x".repeat(MAX_LENGTH)).unwrap();
        let fault = check(&"x".repeat(MAX_LENGTH + 1)).unwrap_err();
        assert!(fault.message.contains("2048 bytes") && fault.message.contains("2047"), "{fault}");
        compose(&"x".repeat(MAX_LENGTH - 2), &["y".to_string()]).unwrap();
        assert!(compose(&"x".repeat(MAX_LENGTH - 1), &["y".to_string()]).is_err());
    }

    #[test]
    fn the_defaults_are_legal() {
        for identity in [Identity::Berth, Identity::Firecracker] {
            check(default_args(identity)).unwrap();
        }
    }
}
