# boot.sh DIRECTORY FILE...: a Debian with systemd as its first process, in namespaces and a control group of its own, on a copy of
# this host's root that takes what is written. Becomes systemd. Its process's number here is in DIRECTORY/../pid.
#
# In there: /given with the FILEs, a network that leads nowhere, the devices that guests need.
set -eu

directory=$1
shift

group=/sys/fs/cgroup/$(basename "$directory")
case ${STAGE-} in
    '')
        # systemd hands these on to its units, and so to guests' groups.
        for controller in cpu memory pids io; do
            echo +$controller > /sys/fs/cgroup/cgroup.subtree_control 2> /dev/null || true
        done
        mkdir "$group"
        # With --kill-child nothing survives this process.
        STAGE=forked exec unshare --mount --uts --ipc --net --pid --fork --kill-child sh "$0" "$directory" "$@" ;;
    forked)
        # /proc is the host's still, and so the number.
        read -r pid _ < /proc/self/stat
        echo "$pid" > "$directory/../pid"
        # Alone: a group with processes of its own has no groups with limits below it.
        echo 0 > "$group/cgroup.procs"
        STAGE=grouped exec unshare --cgroup sh "$0" "$directory" "$@" ;;
esac

mount -t tmpfs -o mode=755 box "$directory"
mkdir "$directory/upper" "$directory/work" "$directory/root"
root=$directory/root
mount -t overlay -o "lowerdir=/,upperdir=$directory/upper,workdir=$directory/work" box "$root"
mkdir "$root/given"
cp "$@" "$root/given"

mount -t proc proc "$root/proc"
mount -t sysfs -o ro sys "$root/sys"
mount -t cgroup2 cgroup "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 dev "$root/dev"
mount -t tmpfs -o mode=755 run "$root/run"
mount -t tmpfs tmp "$root/tmp"
cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /dev/kvm "$root/dev"
mkdir "$root/dev/pts" "$root/dev/shm" "$root/dev/net"
cp -a /dev/net/tun "$root/dev/net"
mount -t devpts -o newinstance,ptmxmode=666 pts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
mount -t tmpfs shm "$root/dev/shm"

# What is of no use here and takes time.
for unit in ssh.service systemd-udevd.service systemd-udev-trigger.service systemd-logind.service e2scrub_reap.service \
    systemd-timesyncd.service getty@tty1.service console-getty.service timers.target; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
echo box > "$root/etc/hostname"
mkdir "$root/old"
cd "$root"
pivot_root . old
umount -l /old
exec env -i container=box /lib/systemd/systemd --unit=multi-user.target < /dev/null > /dev/null 2>&1
