#!/bin/bash
# OUT/base.cpio: the nested host's initramfs without the agent, which the driver appends as a second archive.
set -euo pipefail
. ./initramfs.sh

readonly MODULES=(virtio_blk erofs overlay kvm_amd)

initramfs_tree tree host-init "${MODULES[@]}"
mkdir -p tree/{ro,rw,new}
initramfs_pack tree "$OUT/base.cpio"
