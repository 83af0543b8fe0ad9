#!/bin/sh
# Builds the pinned etcd, etcdctl and etcdutl, and the programs of cmd/, into compat/bin.
set -eu
cd "$(dirname "$0")"
mkdir -p bin
jobs=${COMPAT_BUILD_JOBS:-2}
go build -p "$jobs" -o bin/etcd go.etcd.io/etcd/server/v3
go build -p "$jobs" -o bin/etcdctl go.etcd.io/etcd/etcdctl/v3
go build -p "$jobs" -o bin/etcdutl go.etcd.io/etcd/etcdutl/v3
go build -p "$jobs" -o bin/ ./cmd/...
