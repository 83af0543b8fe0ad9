#!/usr/bin/env bash
# Checks licences, sources and bans of the dependencies, and, where the database of advisories can be fetched or has
# been, the advisories too. Installs cargo-deny if it is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! cargo deny --version >/dev/null 2>&1; then
    echo "cargo-deny is missing: installing it (a few minutes, once)"
    cargo install --locked cargo-deny
fi
cargo deny check bans licenses sources
if fetched=$(cargo deny fetch db 2>&1); then
    cargo deny check --disable-fetch advisories
else
    echo "WARNING: advisories are NOT checked: their database cannot be fetched" >&2
    printf '%s\n' "$fetched" | tail -n 1 >&2
fi
