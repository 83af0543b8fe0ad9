#!/bin/sh
# Property-based tests of the HTTP API, made from its own OpenAPI document by schemathesis (from PyPI, installed into
# bin/schemathesis-venv): requests of all kinds, right and wrong, against a fresh node on each engine. Fails on an answer
# of 500 or more, and on any that the document does not describe: status, media type, header fields, body.
#
#   ./http_api.sh [EXAMPLES]         # requests of each kind for each operation; 100 by default
#
# METASTORE_BIN names the binary (default: the newest build in cargo's target directory), STORAGE the engines ("rocksdb
# memory" by default), SEED repeats a run.
set -u
cd "$(dirname "$0")"
examples=${1:-100}
seed=${SEED:-$(date +%s)}
target=${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/metastore-target}
binary=${METASTORE_BIN:-$(ls -t "$target"/release/metastore "$target"/debug/metastore ../target/release/metastore \
	../target/debug/metastore 2>/dev/null | head -n 1)}
[ -x "$binary" ] || { echo "no metastore binary: build it, or set METASTORE_BIN" >&2; exit 2; }
venv=bin/schemathesis-venv
if [ ! -x "$venv/bin/schemathesis" ]; then
	python3 -m venv "$venv" && "$venv/bin/pip" install -q 'schemathesis>=4,<5' || exit 2
fi
echo "seed $seed"
failed=0
for storage in ${STORAGE:-rocksdb memory}; do
	dir=$(mktemp -d)
	port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
	url=http://127.0.0.1:$port
	"$binary" --data-dir "$dir/data" --storage "$storage" --listen-client-urls "$url" --advertise-client-urls "$url" \
		--listen-peer-urls http://127.0.0.1:0 >"$dir/log" 2>&1 &
	node=$!
	trap 'kill "$node" 2>/dev/null; rm -rf "$dir"' EXIT INT TERM
	for _ in $(seq 100); do
		curl -sf "$url/health" >/dev/null && break
		sleep 0.1
	done
	echo "# $storage"
	SCHEMATHESIS_HOOKS=http_api_hooks.py "$venv/bin/schemathesis" --config-file http_api.toml run \
		"$url/api/v1/openapi.json" --url "$url" --seed "$seed" --max-examples "$examples" --request-timeout 20 || failed=1
	kill -0 "$node" 2>/dev/null || { echo "the node has ended:"; tail -n 20 "$dir/log"; failed=1; }
	kill "$node" 2>/dev/null
	wait "$node" 2>/dev/null
	trap - EXIT INT TERM
	rm -rf "$dir"
done
exit "$failed"
