#!/usr/bin/env bash
# A short run of random faults against a real cluster of this build, on both engines, and before it a look at whether each
# kind of fault really happens: see robustness/README.md. DURATION (of the faults, on each engine, default 40s) and SEED
# (default: the time) may be set. Needs Go 1.26 and its modules; without them it says so and does nothing, since the server
# itself needs no Go.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

skip() {
    echo "robustness: SKIPPED: $1; no cluster was tested under faults" >&2
    exit 0
}
command -v go >/dev/null || skip "Go is not installed"
(cd robustness && go mod download >/dev/null 2>&1) || skip "Go's modules are neither here nor to be had"
(cd robustness && go vet ./... && go test ./...)

# What the tests run, so that nothing is compiled with other features for this alone.
cargo test --locked --workspace --no-run --quiet
target=$(cargo metadata --locked --no-deps --format-version 1 | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd robustness && go build -o "$work/robustness" ./cmd/robustness)
seed=${SEED:-$(date +%s)}

# A debug build on a busy machine: what must not happen must not happen there either, but it may take longer.
run() {
    local name=$1 status=0
    shift
    "$work/robustness" --bin "$target/debug/metastore" --seed "$seed" --recover-bound 60s --out "$work/$name" "$@" || status=$?
    if [ "$status" -ne 0 ]; then
        trap - EXIT
        echo "robustness: $name failed with seed $seed; its logs and history are in $work/$name" >&2
        exit "$status"
    fi
    seed=$((seed + 1))
}
run fault-check --bin-args "--storage memory" --scenario fault-check
run corruption --bin-args "--storage rocksdb" --scenario corruption
for storage in rocksdb memory; do
    run "$storage" --bin-args "--storage $storage" --duration "${DURATION:-40s}"
done
