#!/bin/sh
# Data from a real etcd into metastore and back, compared on the way, on both engines: see cmd/roundtrip. METASTORE_BIN
# is the binary (default: the newest build in cargo's target directory); further arguments, such as --keys 10000, go to
# the program.
set -eu
cd "$(dirname "$0")"
for program in etcd etcdctl etcdutl roundtrip boltcheck; do
	if [ ! -x "bin/$program" ]; then
		./build.sh
		break
	fi
done
if [ -z "${METASTORE_BIN:-}" ]; then
	target=${CARGO_TARGET_DIR:-../target}
	METASTORE_BIN=$(ls -t "$target/release/metastore" "$target/debug/metastore" 2>/dev/null | head -n 1)
fi
for storage in rocksdb memory; do
	echo "# $storage"
	bin/roundtrip --metastore "$METASTORE_BIN" --storage "$storage" "$@"
done
