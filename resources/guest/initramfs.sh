# Sourced by the recipes that make an initramfs: busybox, an init, and modules with what they depend on.

# initramfs_tree DIRECTORY INIT MODULE...
initramfs_tree() {
    local tree=$1 init=$2 release modules
    shift 2
    release=$(cat "$KERNEL/release")
    modules=lib/modules/$release
    mkdir -p "$tree"/{bin,dev,etc,proc,root,run,sys,tmp} "$tree/$modules"
    install -m 755 "$BUSYBOX/busybox" "$tree/bin/busybox"
    "$BUSYBOX/busybox" --list | grep -vx busybox | xargs -I{} ln -s busybox "$tree/bin/{}"
    ln -s bin "$tree/sbin"
    install -m 755 "$init" "$tree/init"

    # depmod and modprobe look only below a root's lib/modules/<release>.
    mkdir -p all/lib/modules
    ln -sfn "$KERNEL/modules" "all/$modules"
    local module file
    for module in "$@"; do
        modprobe -d all -S "$release" --show-depends "$module"
    done | sed -n "s|^insmod .*/$modules/\(.*\.ko\).*|\1|p" | sort -u > modules.list
    while read -r file; do cp "$KERNEL/modules/$file" "$tree/$modules/"; done < modules.list
    cp "$KERNEL"/modules/modules.{order,builtin,builtin.modinfo} "$tree/$modules/"
    depmod -b "$tree" "$release"
    # Indexes that only kmod reads.
    rm -f "$tree/$modules"/modules.{builtin.modinfo,order,softdep,devname,weakdep} "$tree/$modules"/*.bin
}

# initramfs_pack DIRECTORY FILE: not compressed, which an emulated CPU would pay for.
initramfs_pack() {
    (cd "$1" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) > "$2"
}
