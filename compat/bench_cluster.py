#!/usr/bin/env python3
"""Puts load on a cluster of three real etcd members and one of three metastore members, in turns, with `metastore
bench`: puts of 256 bytes from 1, 64 and 256 clients, and what each costs in CPU over all three members.

Both clusters run at the same time, on the same disk and with their own defaults; the one that is not measured idles.
Prints the tool's tables, and at the end one line for each number of clients, for docs/benchmarks.md. Exit code: 0 it
ran, 2 it could not.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile

import cluster
import harness


def bench(binary, ours, theirs, options, clients, results):
    pids = lambda c: ",".join(str(p.pid) for p in c.procs.values())
    endpoints = lambda c: ",".join(c.client(n).split("://")[1] for n in cluster.NAMES)
    out = os.path.join(results, "%d.json" % clients)
    args = [
        binary, "bench", options.workload, "--clients=%d" % clients, "--value-size=256", "--keys=10k",
        "--duration=%ds" % options.seconds, "--warmup=%ds" % options.warmup, "--rounds=%d" % options.rounds,
        "--name=metastore", "--vs-name=etcd", "--json=" + out,
        "--endpoints=" + endpoints(ours), "--pids=" + pids(ours),
        "--vs=" + endpoints(theirs), "--vs-pids=" + pids(theirs),
    ]
    code = subprocess.run(args + options.bench_flag, env=harness.clean_env()).returncode
    if code:
        raise harness.Failure("metastore bench ended with %d" % code)
    return json.load(open(out))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metastore", metavar="PATH", help="the binary (default: METASTORE_BIN, then cargo's newest); a release build")
    parser.add_argument("--storage", default="rocksdb", help="the engine (default: rocksdb)")
    parser.add_argument("--clients", default="1,64,256", help="numbers of clients, with commas")
    parser.add_argument("--workload", default="put")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5, help="of one measurement")
    parser.add_argument("--warmup", type=int, default=1, help="seconds before each")
    parser.add_argument("--bench-flag", action="append", default=[], metavar="FLAG", help="one more flag for metastore bench")
    parser.add_argument("--flag", action="append", default=[], metavar="FLAG", help="one more flag for metastore's members")
    parser.add_argument("--keep-json", metavar="DIR", help="keep the tool's JSON files here")
    options = parser.parse_args()

    binary = harness.find_metastore(options.metastore)
    root = tempfile.mkdtemp(prefix="metastore-bench-")
    clusters = []
    try:
        for target in [
            harness.Target("metastore", binary, ["--storage=" + options.storage] + options.flag),
            harness.Target("etcd", harness.need("etcd"), ["--log-level=warn"]),
        ]:
            clusters.append(cluster.Cluster(target, os.path.join(root, target.label), []))
            clusters[-1].start()
        for clients in [int(c) for c in options.clients.split(",")]:
            bench(binary, clusters[0], clusters[1], options, clients, root)
        if options.keep_json:
            os.makedirs(options.keep_json, exist_ok=True)
            for name in os.listdir(root):
                if name.endswith(".json"):
                    shutil.copy(os.path.join(root, name), options.keep_json)
    finally:
        for c in clusters:
            c.stop_all()
        shutil.rmtree(root, ignore_errors=True)
    return 0


if __name__ == "__main__":
    harness.run(main)
