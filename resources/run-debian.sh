#!/bin/sh
# Boots the Debian image in a guest, with the guest's serial line on this terminal. Runs in the host (`make run`).
set -eu
cd "$BERTH_SCRATCH"
disk=$("$BERTH_BUILD/berth-host" writable "$BERTH_ASSETS/debian.ext4")
cat > guest.json << CONFIG
{
  "boot-source": {
    "kernel_image_path": "$BERTH_ASSETS/vmlinux",
    "initrd_path": "$BERTH_ASSETS/initramfs.cpio",
    "boot_args": "console=ttyS0 quiet panic=1 root=LABEL=berth-root rw"
  },
  "machine-config": { "vcpu_count": 1, "mem_size_mib": 512 },
  "drives": [ { "drive_id": "root", "is_root_device": false, "path_on_host": "$disk" } ],
  "entropy": {}
}
CONFIG
echo "Debian boots in a Berth guest; in a nested host that takes half a minute. Log in as root, leave with poweroff."
exec "$BERTH_BUILD/berth-vmm" --no-api --config-file guest.json
