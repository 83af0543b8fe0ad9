#!/bin/sh
# Property-based tests of the HTTP API, made from its own OpenAPI document by schemathesis (from PyPI, installed into
# bin/schemathesis-venv): requests of all kinds, right and wrong, against a fresh node on each engine, and once more with
# auth on. Fails on an answer of 500 or more, and on any that the document does not describe: status, media type, header
# fields, body.
#
#   ./http_api.sh [EXAMPLES]         # requests of each kind for each operation; 100 by default
#
# METASTORE_BIN names the binary (default: the newest build in cargo's target directory), STORAGE the engines ("rocksdb
# memory" by default), SEED repeats a run. Exit code: 0 all well, 1 not, 2 it could not run.
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
	python3 -m venv "$venv" && "$venv/bin/pip" install -q --retries 1 --timeout 15 --disable-pip-version-check \
		'schemathesis==4.32.5' || exit 2
fi
echo "seed $seed"
failed=0
dir= node=
finish() {
	[ -z "$node" ] || { kill "$node" && wait "$node"; } 2>/dev/null
	[ -z "$dir" ] || rm -rf "$dir"
	dir= node=
}
trap finish EXIT
trap 'exit 130' INT TERM

start() { # ENGINE
	finish
	dir=$(mktemp -d)
	# Below what the system gives to clients, which could take it before the node does.
	port=$(python3 -c '
import random, socket
while True:
    port = random.randrange(20000, 32000)
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            continue
    print(port)
    break')
	url=http://127.0.0.1:$port
	"$binary" --data-dir "$dir/data" --storage "$1" --listen-client-urls "$url" --advertise-client-urls "$url" \
		--listen-peer-urls http://127.0.0.1:0 --bcrypt-cost 4 >"$dir/log" 2>&1 &
	node=$!
	for _ in $(seq 600); do
		curl -sf "$url/health" >/dev/null && return
		sleep 0.1
	done
	echo "the node does not get ready:"
	tail -n 20 "$dir/log"
	exit 1
}

try() { # EXAMPLES, further arguments
	count=$1
	shift
	SCHEMATHESIS_HOOKS=http_api_hooks.py "$venv/bin/schemathesis" --config-file http_api.toml run \
		"$url/api/v1/openapi.json" --url "$url" --seed "$seed" --max-examples "$count" --request-timeout 20 "$@" ||
		failed=1
	kill -0 "$node" 2>/dev/null || { echo "the node has ended:"; tail -n 20 "$dir/log"; failed=1; }
}

call() { # PATH BODY: over etcd's JSON gateway
	curl -sf "$url/v3/$1" -d "$2" >/dev/null || { echo "/v3/$1 failed" >&2; exit 1; }
}

for storage in ${STORAGE:-rocksdb memory}; do
	start "$storage"
	echo "# $storage"
	try "$examples"
done
start memory
call auth/user/add '{"name":"root","password":"secret"}'
call auth/user/grant '{"user":"root","role":"root"}'
call auth/user/add '{"name":"ann","password":"secret"}'
call auth/role/add '{"name":"app"}'
call auth/role/grant '{"name":"app","perm":{"permType":"READWRITE","key":"YQ==","range_end":"Yg=="}}'
call auth/user/grant '{"user":"ann","role":"app"}'
call auth/enable '{}'
fewer=$(((examples + 3) / 4))
echo "# memory, nobody in particular"
try "$fewer"
echo "# memory, a user of some keys"
try "$fewer" --auth ann:secret
exit "$failed"
