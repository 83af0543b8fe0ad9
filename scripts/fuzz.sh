#!/bin/sh
# Runs the fuzz targets of fuzz/, one after the other, each for so many seconds (600 by default), or those that are named.
# Needs cargo-fuzz (cargo install cargo-fuzz). The corpora stay in fuzz/corpus; an input that breaks something goes into
# fuzz/artifacts and from there, once mended, into a test beside the code.
#
#   scripts/fuzz.sh [SECONDS [TARGET...]]
set -u
cd "$(dirname "$0")/.."
seconds=${1:-600}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- gateway rest log bbolt config tokens
command -v cargo-fuzz >/dev/null || { echo "cargo-fuzz is not installed: cargo install cargo-fuzz" >&2; exit 2; }
# The sanitizers are for what is unsafe, of which our crates have next to nothing; without them more is tried in the time.
export RUSTC_BOOTSTRAP=1
cargo fuzz build --sanitizer none || exit 2
failed=0
for target in "$@"; do
	echo "# $target"
	mkdir -p "fuzz/corpus/$target"
	seeds=
	[ -d "fuzz/seeds/$target" ] && seeds=fuzz/seeds/$target
	[ "$target" = log ] && seeds="$seeds crates/api/tests/golden/gob"
	# shellcheck disable=SC2086
	cargo fuzz run --sanitizer none "$target" "fuzz/corpus/$target" $seeds -- \
		-max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 || failed=1
done
exit "$failed"
