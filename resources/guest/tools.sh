#!/bin/bash
# Installs $PACKAGES on this Debian 12. QEMU comes from backports: bookworm's own cannot restore the nested host's
# saved state, and conflicts with newer QEMU tools that may be there already.
set -euo pipefail
. ./debian.sh

apt_refresh
stable=() backports=()
for package in $PACKAGES; do
    case $package in
        qemu-*) backports+=("$package") ;;
        *) stable+=("$package") ;;
    esac
done
if [ ${#stable[@]} -gt 0 ]; then
    apt_machine install --no-install-recommends "${stable[@]}"
fi
if [ ${#backports[@]} -gt 0 ]; then
    apt_machine install --no-install-recommends -t $SUITE-backports "${backports[@]}"
fi
apt_machine clean
