#!/bin/bash
# Debian's stock 6.12 cloud kernel, unpacked here and installed nowhere.
#
# OUT/bzImage  as packaged
# OUT/vmlinux  the ELF file packed inside it
# OUT/config   its build configuration
# OUT/release  its version, as uname -r says it
# OUT/modules  /lib/modules/<release>, uncompressed: unpacking each module costs an emulated CPU more than reading it
set -euo pipefail
. ./debian.sh

readonly KERNEL=linux-image-6.12-cloud-amd64

# Linux boot protocol, Documentation/arch/x86/boot.rst
readonly SETUP_SECTS=$((0x1f1)) PAYLOAD_OFFSET=$((0x248)) PAYLOAD_LENGTH=$((0x24c))

main() {
    apt_refresh
    apt_unpack "$(apt_depends $KERNEL)" package
    set -- package/boot/vmlinuz-*
    local release=${1#package/boot/vmlinuz-}
    echo "$release" > "$OUT/release"
    cp "package/boot/vmlinuz-$release" "$OUT/bzImage"
    cp "package/boot/config-$release" "$OUT/config"
    extract_elf "$OUT/bzImage" > "$OUT/vmlinux"

    mkdir -p tree/lib
    mv package/lib/modules tree/lib/
    rm -f "tree/lib/modules/$release"/{build,source}
    find tree -name '*.ko.xz' -print0 | xargs -0 -P 2 -n 64 xz -d
    depmod -b tree "$release"
    mv "tree/lib/modules/$release" "$OUT/modules"
}

extract_elf() {
    local image=$1 setup offset length start size
    setup=$(field u1 $SETUP_SECTS)
    offset=$(field u4 $PAYLOAD_OFFSET)
    length=$(field u4 $PAYLOAD_LENGTH)
    start=$(((setup + 1) * 512 + offset))
    # The build appends the unpacked size, which is no part of the compressed stream.
    size=$(field u4 $((start + length - 4)))
    slice $start $((length - 4)) | unpack > elf
    if [ "$(stat -c %s elf)" != "$size" ]; then
        echo "$image unpacks to $(stat -c %s elf) bytes; its trailer says $size" >&2
        return 1
    fi
    cat elf
}

unpack() {
    case $(slice "$start" 6 | od -An -tx1 | tr -d ' ') in
        28b52ffd*) zstd -dcq ;;
        fd377a585a00) xz -dc ;;
        *) echo "$image: the kernel in it is packed in a way unknown here" >&2; return 1 ;;
    esac
}

field() { od -An -t"$1" -j "$2" -N "${1#u}" "$image" | tr -d ' '; }

slice() { dd if="$image" bs=1M iflag=skip_bytes,count_bytes skip="$1" count="$2" status=none; }

main
