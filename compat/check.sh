#!/bin/sh
# Everything that says whether what works with etcd works with metastore, on both engines: etcd's own end-to-end tests,
# those of its client library with its examples and recipes, and programs in several languages. With --ci a part of it
# that takes a few minutes. Needs Go, and for the clients what they are written in; where Go is missing it says so and
# does nothing. Exit code: 0 all as known.txt expects, 1 not, 2 it could not run.
set -u
cd "$(dirname "$0")"
if ! command -v go >/dev/null; then
	echo "compat: SKIPPED: Go is not installed, and etcd's tests are written in it"
	exit 0
fi
# The etcd to compare with is not needed here.
mkdir -p bin
for program in etcdctl etcdutl; do
	[ -x "bin/$program" ] || go build -p "${COMPAT_BUILD_JOBS:-2}" -o "bin/$program" "go.etcd.io/etcd/$program/v3" || exit 2
done
failed=0
step() {
	echo "# $*"
	"$@"
	status=$?
	[ "$status" -le 1 ] || exit "$status"
	[ "$status" -eq 0 ] || failed=1
}
if [ "${1:-}" = --ci ]; then
	step ./suite.py --list-file ci.txt --minimal --again --storage rocksdb
else
	step ./suite.py --package common,e2e
	step ./suite.py --package examples,concurrency,recipes,naming
	step ./clients.py
fi
exit "$failed"
