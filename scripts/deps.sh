#!/usr/bin/env bash
# Makes sure that what the build needs besides Rust is there: a C++ compiler and libclang, for RocksDB. With the argument
# `tests` also protoc and curl: the etcd client that the tests drive the node with generates its code with the former, and
# the examples of the documentation use the latter. What is missing is
# installed with apt where this user may do that; otherwise the command to run is printed and the exit code is 1.
set -euo pipefail

if ! command -v cargo >/dev/null; then
    echo "Rust is missing: install it from https://rustup.rs, then run this again" >&2
    exit 1
fi

have_libclang() {
    # The development package brings the compiler's own headers too, without which libclang finds no stddef.h.
    if [ -n "${LIBCLANG_PATH:-}" ]; then
        return 0
    elif command -v dpkg-query >/dev/null; then
        dpkg-query -W -f '${db:Status-Status} ${Package}\n' 'libclang*-dev' 2>/dev/null |
            grep -qE '^installed libclang-([0-9]+-)?dev$'
    else
        ldconfig -p 2>/dev/null | grep -q libclang
    fi
}

missing=()
command -v c++ >/dev/null && command -v cc >/dev/null || missing+=(g++)
have_libclang || missing+=(libclang-dev)
if [ "${1:-}" = tests ]; then
    command -v curl >/dev/null || missing+=(curl)
fi
if [ "${1:-}" = tests ] && [ -z "${PROTOC:-}" ]; then
    command -v protoc >/dev/null || missing+=(protobuf-compiler)
    # The well-known types that etcd-client's protocol files import; protoc alone comes without them.
    [ -e /usr/include/google/protobuf/descriptor.proto ] || [ -e /usr/local/include/google/protobuf/descriptor.proto ] ||
        missing+=(libprotobuf-dev)
fi
[ ${#missing[@]} -eq 0 ] && exit 0

install="apt-get install -y --no-install-recommends ${missing[*]}"
if ! command -v apt-get >/dev/null; then
    echo "Something that the build needs is missing; on Debian it is called: ${missing[*]}" >&2
    exit 1
fi
if [ "$(id -u)" -eq 0 ]; then
    as_root=()
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    as_root=(sudo -n)
else
    echo "The build needs: ${missing[*]}. Install with:" >&2
    echo "    sudo $install" >&2
    exit 1
fi
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# The package lists may be missing or old; only then are they fetched.
# shellcheck disable=SC2086
"${as_root[@]}" $install || { "${as_root[@]}" apt-get update && "${as_root[@]}" $install; }
