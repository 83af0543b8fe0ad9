#!/usr/bin/env bash
# Counts the instructions of the hot paths and compares them with those in crates/sim/benches/guard.txt. Fails if one
# takes more than TOLERANCE percent more. `scripts/bench-check.sh update` writes the counts down instead: with a change
# that makes something slower for a good reason, or faster.
set -euo pipefail
cd "$(dirname "$0")/.."

tolerance=${TOLERANCE:-5}
known=crates/sim/benches/guard.txt
[ -e "$known" ] || [ "${1:-}" = update ] || { echo "there is no $known yet: scripts/bench-check.sh update" >&2; exit 1; }
command -v valgrind >/dev/null || { echo "bench-check needs valgrind: apt-get install valgrind" >&2; exit 1; }

guard=$(cargo bench --locked --workspace --bench guard --no-run --message-format=json |
    sed -n 's/.*"name":"guard".*"executable":"\([^"]*\)".*/\1/p' | tail -1)
[ -x "$guard" ] || { echo "the benchmark was not built" >&2; exit 1; }

count() {
    local log
    log=$(mktemp)
    # Without ASLR and with a hash that is the same each time, the same program counts nearly the same.
    if ! valgrind --tool=callgrind --callgrind-out-file=/dev/null --collect-atstart=no \
        --toggle-collect='*guard*measured*' "$guard" "$1" >/dev/null 2>"$log"; then
        cat "$log" >&2
        exit 1
    fi
    sed -n 's/.*Collected : \([0-9]*\).*/\1/p' "$log"
    rm -f "$log"
}

failed=0
updated=$(mktemp)
printf '%-10s %14s %14s %8s\n' case instructions known change
for case in $("$guard"); do
    now=$(count "$case")
    [ "${now:-0}" -gt 1000 ] || { echo "$case: callgrind counted nothing" >&2; exit 1; }
    echo "$case $now" >>"$updated"
    before=$(awk -v case="$case" '$1 == case { print $2 }' "$known" 2>/dev/null || true)
    if [ -z "$before" ]; then
        printf '%-10s %14d %14s %8s\n' "$case" "$now" - new
        failed=1
        continue
    fi
    change=$(awk -v now="$now" -v before="$before" 'BEGIN { printf "%+.1f", (now - before) * 100 / before }')
    verdict=
    if awk -v change="$change" -v tolerance="$tolerance" 'BEGIN { exit !(change > tolerance) }'; then
        verdict="  SLOWER"
        failed=1
    elif awk -v change="$change" -v tolerance="$tolerance" 'BEGIN { exit !(change < -tolerance) }'; then
        verdict="  faster: note it with 'scripts/bench-check.sh update'"
    fi
    printf '%-10s %14d %14d %7s%%%s\n' "$case" "$now" "$before" "$change" "$verdict"
done
if [ "${1:-}" = update ]; then
    mv "$updated" "$known"
    echo "wrote $known"
    exit 0
fi
rm -f "$updated"
[ "$failed" = 0 ] || { echo "more than $tolerance % more instructions, or a case that is not in $known" >&2; exit 1; }
