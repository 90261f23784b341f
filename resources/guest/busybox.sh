#!/bin/bash
# OUT/busybox: Debian's static busybox, unpacked here because installing it could displace the machine's own.
set -euo pipefail
. ./debian.sh

apt_refresh
apt_unpack busybox-static package
install -m 755 package/bin/busybox "$OUT/busybox"
