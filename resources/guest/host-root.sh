#!/bin/bash
# OUT/root.erofs: the userland of the nested host, a Debian root with the judges and peers that tests call by name.
#
# Uncompressed, because unpacking under emulation made first commands take ten times as long. Nothing boots it:
# host-init mounts it read-only below a tmpfs and starts the agent, so it needs no fstab, no password and no getty.
set -euo pipefail
. ./debian.sh

readonly PACKAGES=(
    # what any Linux host has
    systemd systemd-sysv dbus udev procps util-linux kmod iproute2 iputils-ping nftables ca-certificates
    # looking at a process and at what it does to the machine
    strace lsof psmisc
    # judges that are not of this project
    curl jq fio iperf3 acpica-tools openssh-client openssh-server socat netcat-openbsd python3-minimal
    # disks
    e2fsprogs erofs-utils dosfstools fdisk qemu-utils
    # the peer of the benchmarks
    qemu-system-x86
)

main() {
    apt_refresh
    debian_root root --include="$(IFS=,; echo "${PACKAGES[*]}")" \
        --dpkgopt='path-exclude=/usr/bin/qemu-system-i386' \
        --setup-hook='cp qemu-from-backports "$1/etc/apt/preferences.d/"'

    debian_modules root
    mkdir root/build root/scratch
    echo berth-host > root/etc/hostname
    echo "127.0.0.1 localhost berth-host" > root/etc/hosts
    echo "nameserver 10.0.2.3" > root/etc/resolv.conf
    # Keys that no one shares: made when a test starts sshd.
    rm -f root/etc/ssh/ssh_host_*
    # It names each file on its standard output.
    mkfs.erofs "$OUT/root.erofs" root > /dev/null
    rm -r root
}

main
