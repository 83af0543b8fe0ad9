#!/bin/sh
# Stores this machine's Debian package lists in a running server and checks what comes back: see cmd/debian.
#
#   compat/debian.sh                              both engines, and etcd where compat/bin has it
#   compat/debian.sh --storage memory             one engine
#   compat/debian.sh --against etcd               the real etcd alone
#   compat/debian.sh --help                       all flags
#
# The environment's METASTORE_BIN names the binary; else the release build of this checkout is taken.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ -z "${METASTORE_BIN:-}" ]; then
    METASTORE_BIN=${CARGO_TARGET_DIR:-$here/../target}/release/metastore
    export METASTORE_BIN
fi
if [ "$#" -eq 0 ]; then
    set -- --storage rocksdb,memory
    if [ -x "$here/bin/etcd" ]; then
        set -- "$@" --against etcd
    fi
fi
mkdir -p "$here/bin"
(cd "$here" && go build -p "${COMPAT_BUILD_JOBS:-2}" -o bin/debian ./cmd/debian)
exec "$here/bin/debian" "$@"
