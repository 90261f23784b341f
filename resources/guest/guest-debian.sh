#!/bin/bash
# OUT/root.ext4: a Debian with systemd that any stock Linux guest could be, root without a password.
#
# It has the kernel's modules and no kernel: the VMM loads that. Sparse, with room for tests to write in.
set -euo pipefail
. ./debian.sh

readonly SIZE=1536M
readonly LABEL=berth-root
readonly PACKAGES=(
    systemd systemd-sysv libpam-systemd dbus udev kmod procps util-linux e2fsprogs
    iproute2 iputils-ping openssh-server pciutils
    fio iperf3
)

main() {
    apt_refresh
    debian_root root --include="$(IFS=,; echo "${PACKAGES[*]}")"
    debian_modules root
    configure
    truncate -s $SIZE "$OUT/root.ext4"
    # Inode tables written here, so that no thread of the guest does it behind a measurement.
    mkfs.ext4 -q -F -L $LABEL -E lazy_itable_init=0,lazy_journal_init=0 -d root "$OUT/root.ext4"
    rm -r root
}

configure() {
    echo berth > root/etc/hostname
    echo "127.0.0.1 localhost berth" > root/etc/hosts
    echo "LABEL=$LABEL / ext4 errors=remount-ro 0 1" > root/etc/fstab
    sed -i 's/^root:[^:]*:/root::/' root/etc/shadow
    printf 'PermitRootLogin yes\nPermitEmptyPasswords yes\n' > root/etc/ssh/sshd_config.d/berth.conf
    printf '[Match]\nType=ether\n\n[Network]\nDHCP=yes\n\n[Link]\nRequiredForOnline=no\n' \
        > root/etc/systemd/network/80-ether.network
    chroot root systemctl --quiet enable systemd-networkd.service
    chroot root systemctl --quiet disable systemd-networkd-wait-online.service
    # Jobs by the clock: they would start in the middle of a test.
    chroot root systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
        fstrim.timer systemd-tmpfiles-clean.timer
}

main
