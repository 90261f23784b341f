#!/bin/sh
# Starts berthd, imports Debian as an image, and gives a shell in a guest of it. Runs in the host (`make run`); what is given to
# it goes to `berth run` in place of that shell.
set -eu
cd "$BERTH_SCRATCH"
PATH=$BERTH_BUILD:$PATH
export PATH
cat > berthd.toml << CONFIG
socket = "$BERTH_SCRATCH/berthd.sock"
state_dir = "$BERTH_SCRATCH/state"
run_dir = "$BERTH_SCRATCH/run"
# Beside those of a daemon that is installed.
control_group = "berth-run"
uid_first = 1895825408
[network]
bridge = "berthrun"
address = "10.88.0.1"
[programs]
vmm = "$BERTH_BUILD/berth-vmm"
jailer = "$BERTH_BUILD/berth-jailer"
agent = "$BERTH_BUILD/berth-agent"
CONFIG
berthd --config berthd.toml 2> berthd.log &
daemon=$!
# On a host of its own nothing of it stays.
end() {
    kill $daemon
    wait $daemon 2> /dev/null || true
    ip link delete dev berthrun type bridge 2> /dev/null || true
    nft delete table ip berth_berthrun 2> /dev/null || true
}
trap end EXIT
BERTH_SOCKET=$BERTH_SCRATCH/berthd.sock
export BERTH_SOCKET
tries=0
until [ -S "$BERTH_SOCKET" ]; do
    tries=$((tries + 1))
    [ $tries -lt 100 ] || { cat berthd.log; exit 1; }
    sleep 0.1
done
berth image import --name debian --kernel "$BERTH_ASSETS/vmlinux" --initrd "$BERTH_ASSETS/initramfs.cpio" \
    --cmdline "console=ttyS0 quiet panic=1 root=LABEL=berth-root rw" "$BERTH_ASSETS/debian.ext4"
echo "A shell in a Debian guest; in a nested host it takes some seconds. Leave with exit."
berth run --rm --name debian debian "$@"
