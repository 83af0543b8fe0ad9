#!/bin/sh
# Everything: builds what is missing, then compares metastore on both engines with the real etcd, through etcdctl
# (also through an older one, if ETCDCTL_OLD or a Debian etcdctl is there) and through raw requests. Further
# arguments, such as --storage memory or --metastore PATH, go to every comparison.
set -u
cd "$(dirname "$0")"
for program in etcd etcdctl etcdutl grpcdiff gobgolden; do
	if [ ! -x "bin/$program" ]; then
		./build.sh || exit 2
		break
	fi
done
failed=0
# step COMMAND: differences (1) let the rest run; anything worse ends the run.
step() {
	echo "# $*"
	"$@"
	status=$?
	[ "$status" -le 1 ] || exit "$status"
	[ "$status" -eq 0 ] || failed=1
}
step ./compare.py "$@"
old=${ETCDCTL_OLD:-/usr/bin/etcdctl}
if [ -x "$old" ]; then
	step ./compare.py --etcdctl "$old" "$@"
else
	echo "# no older etcdctl: install Debian's package etcd-client or set ETCDCTL_OLD"
fi
step ./grpcdiff.py "$@"
step ./gateway.py "$@"
exit "$failed"
