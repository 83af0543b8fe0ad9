#!/bin/sh
# Everything that says whether what works with etcd works with metastore, on both engines: etcd's own end-to-end tests,
# those of its client library with its examples and recipes, programs in several languages, and Kubernetes; and the HTTP
# API against its own document. With --ci a part of it that takes a few minutes. Needs Go, and for the clients what they
# are written in; where Go is missing it says so and tests the HTTP API alone. Exit code: 0 all as known.txt expects, 1
# not, 2 it could not run.
set -u
cd "$(dirname "$0")"
failed=0
step() {
	echo "# $*"
	"$@"
	status=$?
	[ "$status" -le 1 ] || exit "$status"
	[ "$status" -eq 0 ] || failed=1
}
# The HTTP API against its own document needs Python alone, and its library from PyPI.
if [ "${1:-}" = --ci ]; then
	echo "# ./http_api.sh 10"
	SEED=1 ./http_api.sh 10
	case $? in
	0) ;;
	2) echo "compat: the HTTP API was not tested against its document: SKIPPED" ;;
	*) failed=1 ;;
	esac
else
	step ./http_api.sh
fi
if ! command -v go >/dev/null; then
	echo "compat: SKIPPED: Go is not installed, and etcd's tests are written in it"
	exit "$failed"
fi
mkdir -p bin
for program in etcdctl etcdutl; do
	[ -x "bin/$program" ] || go build -p "${COMPAT_BUILD_JOBS:-2}" -o "bin/$program" "go.etcd.io/etcd/$program/v3" || exit 2
done
if [ "${1:-}" = --ci ]; then
	step ./suite.py --list-file ci.txt --minimal --again --storage rocksdb
else
	step ./suite.py --package common,e2e
	step ./suite.py --package examples,concurrency,recipes,naming
	step ./clients.py
	# These compare with the real etcd.
	[ -x bin/etcd ] || ./build.sh || exit 2
	step ./kube_storage.py
	step ./kube.py
fi
exit "$failed"
