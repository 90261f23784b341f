#!/bin/bash
# OUT/initramfs.cpio: guest-init with busybox and the drivers of the devices that a Berth guest can have.
set -euo pipefail
. ./initramfs.sh

readonly MODULES=(
    virtio_mmio virtio_blk virtio_net virtio_rng virtio_balloon virtio_mem virtio_pmem
    vmw_vsock_virtio_transport virtio_scsi
    nd_pmem button evdev
)

initramfs_tree tree guest-init "${MODULES[@]}"
install -D -m 644 guest-profile tree/etc/profile
# busybox acpid runs what is named after the event.
mkdir -p tree/etc/acpi/PWRF
printf '#!/bin/sh\nexec poweroff\n' > tree/etc/acpi/PWRF/00000080
chmod 755 tree/etc/acpi/PWRF/00000080
echo 'root::0:0:root:/root:/bin/sh' > tree/etc/passwd
echo 'root:x:0:' > tree/etc/group
initramfs_pack tree "$OUT/initramfs.cpio"
