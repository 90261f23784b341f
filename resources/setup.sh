#!/bin/bash
# Installs what building and testing need, without asking: a compiler, a linker, make's friends. The programs that make
# images and run the nested host are looked after by `berth-assets tools`, once it is built. Quiet when all is there.
set -euo pipefail

# As in Cargo.toml.
readonly RUST=1.95
# The linker, and the libraries for static programs.
readonly PACKAGES=(gcc libc6-dev make git)

main() {
    # A library that gcc does not find is named without a path.
    if ! command -v gcc > /dev/null || [ "$(gcc -print-file-name=libc.a)" = libc.a ] || ! command -v git > /dev/null; then
        install_packages "${PACKAGES[@]}"
    fi
    command -v cargo > /dev/null || install_rust
    local version
    version=$(rustc --version | cut -d' ' -f2)
    if [ "$(printf '%s\n' $RUST "$version" | sort -V | head -n 1)" != $RUST ]; then
        die "rustc is $version and $RUST is needed: rustup update stable"
    fi
}

install_packages() {
    command -v apt-get > /dev/null || die "missing: $* (Debian's names); install them with your package manager"
    [ "$(id -u)" = 0 ] || die "missing: $*; as root: apt-get install $*"
    apt-get -o DPkg::Lock::Timeout=300 update
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@"
}

# Debian 12's own Rust is too old; rustup is a package from Debian 13 on.
install_rust() {
    if ! command -v rustup > /dev/null; then
        apt-cache show rustup > /dev/null 2>&1 || die "no Rust: install rustup as https://rustup.rs says"
        install_packages rustup
    fi
    rustup toolchain install stable --profile default
}

die() {
    echo "setup: $*" >&2
    exit 1
}

main
