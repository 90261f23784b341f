#!/bin/bash
# Builds the fuzz targets and runs each for some seconds, from its seeds: run.sh [seconds-per-target] [target...]
#
# Needs no nightly toolchain and no cargo-fuzz: what those switch on, coverage and the address sanitizer, is in every
# rustc. For long runs, cargo-fuzz works here too.
set -euo pipefail
cd "$(dirname "$0")"

seconds=${1:-5}
shift || true
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    mapfile -t targets < <(basename -s .rs -a fuzz_targets/*.rs)
fi

export CARGO_TARGET_DIR=${FUZZ_TARGET_DIR:-$PWD/target}
export ARTIFACTS=$PWD/artifacts
BIN=$CARGO_TARGET_DIR/x86_64-unknown-linux-gnu/release
export BIN
SCRATCH=$(mktemp -d)
# The targets' disks and kernels: in memory they are several times as fast.
if [ -w /dev/shm ]; then export TMPDIR=/dev/shm; fi
export SCRATCH SECONDS_EACH=$seconds
trap 'rm -rf "$SCRATCH"' EXIT

flags=(
    --cfg fuzzing
    -Cpasses=sancov-module
    -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares
    -Ccodegen-units=1
    # The sanitizer's library cannot be linked into a static program.
    -Ctarget-feature=-crt-static
)
if compgen -G "$(rustc --print target-libdir --target x86_64-unknown-linux-gnu)/librustc*_rt.asan.a" >/dev/null; then
    flags+=(-Zsanitizer=address)
else
    echo "fuzz: this toolchain has no address sanitizer; running without it" >&2
fi

# RUSTFLAGS replaces the flags of .cargo/config.toml; RUSTC_BOOTSTRAP lets a stable rustc take -Z.
RUSTC_BOOTSTRAP=1 RUSTFLAGS="${flags[*]}" \
    cargo build --quiet --release --bins --target x86_64-unknown-linux-gnu

run_target() {
    local target=$1 log=$SCRATCH/$1.log
    mkdir -p "$ARTIFACTS/$target" "$SCRATCH/$target"
    # The first folder takes what is found, so that the seeds stay as they are.
    if "$BIN/$target" -max_total_time="$SECONDS_EACH" -timeout=20 -rss_limit_mb=1024 \
        -artifact_prefix="$ARTIFACTS/$target/" "$SCRATCH/$target" "corpus/$target" >"$log" 2>&1 &&
        grep -q '^Done [1-9]' "$log"; then
        rmdir --ignore-fail-on-non-empty "$ARTIFACTS/$target" "$ARTIFACTS"
        echo "fuzz: $target: $(grep '^Done' "$log")"
    else
        tail -n 40 "$log"
        echo "fuzz: $target FAILED; the input is in tests/fuzz/artifacts/$target/, try it with $BIN/$target FILE"
        touch "$SCRATCH/$target.failed"
    fi
}
export -f run_target

printf '%s\n' "${targets[@]}" | xargs -P "$(nproc)" -I{} bash -c 'run_target {}'

failed=$(find "$SCRATCH" -maxdepth 1 -name '*.failed' | wc -l)
echo "fuzz: $((${#targets[@]} - failed)) passed, $failed failed"
[ "$failed" -eq 0 ]
