#!/bin/bash
# A guest for a machine without ACPI: Debian's stock 6.12 kernel, which reads MP tables as its cloud kernel does not, and
# the driver of virtio-mmio that finds devices on the command line, which no kernel of Debian's has.
#
# OUT/bzImage         the kernel as packaged
# OUT/initramfs.cpio  the guests' initramfs, with this kernel's drivers behind it
#
# The driver is the file of Debian's own sources, built as a module against the stock kernel: that takes seconds, where a
# kernel of our own takes minutes. The packages are of one version, unpacked here and installed nowhere; they are 280 MB,
# most of it sources.
set -euo pipefail
. ./debian.sh
. ./initramfs.sh

readonly IMAGE=linux-image-6.12-amd64 SOURCE=linux-source-6.12
readonly MODULES=(
    virtio_blk virtio_net virtio_rng virtio_balloon virtio_pmem vmw_vsock_virtio_transport nd_pmem
)

main() {
    apt_refresh
    local image release
    image=$(apt_depends $IMAGE)
    release=${image#linux-image-}
    apt_unpack "$image" package
    cp "package/boot/vmlinuz-$release" "$OUT/bzImage"

    mkdir -p "tree/lib/modules/$release"
    take_modules "package/lib/modules/$release" "tree/lib/modules/$release"
    build_driver "$release" "tree/lib/modules/$release"
    depmod -b tree "$release"
    initramfs_pack tree modules.cpio
    cat "$GUEST_INITRAMFS/initramfs.cpio" modules.cpio > "$OUT/initramfs.cpio"
}

# Uncompressed, and with those that they depend on.
take_modules() {
    local module file
    depmod -b package "$release"
    for module in "${MODULES[@]}"; do
        modprobe -d package -S "$release" --show-depends "$module"
    done | sed -n 's/^insmod \([^ ]*\).*/\1/p' | sort -u > wanted
    while read -r file; do
        xz -dc "$file" > "$2/$(basename "$file" .xz)"
    done < wanted
    cp "$1"/modules.{order,builtin,builtin.modinfo} "$2/"
}

build_driver() {
    local release=$1 version=${1%-amd64} headers=package/usr/src/linux-headers-$1
    apt_unpack "linux-headers-$release" package
    apt_unpack "linux-headers-$version-common" package
    apt_unpack "linux-kbuild-$version" package
    sed -i "s|/usr/src|$PWD/package/usr/src|" "$headers/Makefile"
    # The kernel's types, which a tool that is not here would put into the module.
    rm -f "$headers/vmlinux"

    mkdir driver
    apt_unpack $SOURCE source
    # tar ends at the file's first occurrence, and xz, which has most of 1.5 GB before it still, with it.
    { xz -dc "source/usr/src/$SOURCE.tar.xz" 2> /dev/null || true; } |
        tar -xO --occurrence=1 "$SOURCE/drivers/virtio/virtio_mmio.c" > driver/virtio_mmio.c
    printf '%s\n' 'obj-m := virtio_mmio.o' 'ccflags-y := -DCONFIG_VIRTIO_MMIO_CMDLINE_DEVICES' > driver/Makefile
    # With whatever gcc there is, and without what the make that waits for this tells its children.
    env -u MAKEFLAGS -u MAKELEVEL make -C "$headers" M="$PWD/driver" CC=gcc CROSS_COMPILE= modules
    strip --strip-debug -o "$2/virtio_mmio.ko" driver/virtio_mmio.ko
}

main
