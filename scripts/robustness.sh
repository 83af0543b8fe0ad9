#!/usr/bin/env bash
# A short run of random faults against a real cluster of this build, on both engines: see robustness/README.md.
# DURATION (each engine, default 60s) and SEED (default: the time) may be set. Needs Go 1.26 and its modules; without
# them it says so and does nothing, since the server itself needs no Go.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

skip() {
    echo "robustness: skipped: $1" >&2
    exit 0
}
command -v go >/dev/null || skip "Go is not installed"
(cd robustness && go mod download >/dev/null 2>&1) || skip "its Go modules cannot be downloaded"
(cd robustness && go vet ./... && go test ./...)

cargo build --locked -p metastore
target=$(cargo metadata --locked --no-deps --format-version 1 | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd robustness && go build -o "$work/robustness" ./cmd/robustness)
seed=${SEED:-$(date +%s)}
for storage in rocksdb memory; do
    # A debug build on a busy machine: what must not happen must not happen there either, but it may take longer.
    "$work/robustness" --bin "$target/debug/metastore" --bin-args "--storage $storage" \
        --duration "${DURATION:-60s}" --seed "$seed" --recover-bound 60s --out "$work/$storage" || {
        status=$?
        trap - EXIT
        echo "robustness: $storage failed with seed $seed; its logs and history are in $work/$storage" >&2
        exit "$status"
    }
    seed=$((seed + 1))
done
