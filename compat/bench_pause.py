#!/usr/bin/env python3
"""The longest that a put takes while history is compacted and while the store is defragmented, on a real etcd and on
metastore, in turns.

Starts one of each, alone, on fresh directories and with their own defaults. A round, for each in turn: as many revisions
are written as --revisions says; then puts come at a fixed rate (an open loop, so that a put that could not be sent in
time counts with its wait), first with nothing else to do, then while everything is compacted (the call returns when that
is done: --physical), then while the store is defragmented. Prints each measurement, and at the end the medians and
ratios for docs/benchmarks.md. Exit code: 0 it ran, 2 it could not.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import harness

PHASES = ["nothing", "compaction", "defragmentation"]


def etcdctl(server, *args):
    command = [harness.need("etcdctl"), "--endpoints=" + server.url, "--command-timeout=600s", *args]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=harness.clean_env())
    if done.returncode:
        raise harness.Failure("etcdctl %s: %s" % (" ".join(args), done.stderr.decode()))
    return done.stdout.decode()


def revision(server):
    status = json.loads(etcdctl(server, "endpoint", "status", "--write-out=json"))
    return status[0]["Status"]["header"]["revision"]


def fill(binary, server, options, scratch):
    """Writes revisions, over and over the same keys."""
    have, out = revision(server), os.path.join(scratch, "fill.json")
    command = [
        binary, "bench", "put", "--no-progress", "--keep", "--clients=256", "--keys=%d" % options.keys,
        "--total=%d" % options.revisions, "--warmup=0s", "--value-size=256", "--timeout=60s", "--json=" + out,
        "--endpoints=" + server.address,
    ]
    if subprocess.run(command, stdout=subprocess.DEVNULL, env=harness.clean_env()).returncode:
        raise harness.Failure("the revisions were not written")
    written = revision(server) - have
    if written < options.revisions:
        raise harness.Failure("only %d revisions were written" % written)


def measure(binary, server, options, scratch, work):
    """Puts at a fixed rate, and the work in the middle of it. Returns milliseconds: the longest put, p99, the work."""
    out = os.path.join(scratch, "put.json")
    command = [
        binary, "bench", "put", "--no-progress", "--keep", "--clients=512", "--connections=8",
        "--keys=%d" % options.keys, "--rate=%d" % options.rate, "--duration=%ds" % options.seconds, "--warmup=1s",
        "--value-size=256", "--timeout=120s", "--json=" + out, "--endpoints=" + server.address,
    ]
    bench = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=harness.clean_env())
    took, failed = [], []

    def do_work():
        begun = time.monotonic()
        try:
            work()
        except harness.Failure as failure:
            failed.append(failure)
        took.append(time.monotonic() - begun)

    # After the warm-up and a little of the load.
    time.sleep(3)
    worker = threading.Thread(target=do_work)
    worker.start()
    code = bench.wait()
    worker.join()
    if failed or code:
        raise failed[0] if failed else harness.Failure("metastore bench ended with %d" % code)
    row = json.load(open(out))["workloads"][0]["systems"][0]["rounds"][0]["rows"][0]
    if row["errors"]:
        raise harness.Failure("puts failed: %s" % row["errors"])
    latency = row["latency"]
    return {"max": latency["max"] / 1e6, "p99": latency["p99"] / 1e6, "took": took[0] * 1e3, "puts": latency["count"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metastore", metavar="PATH", help="the binary (default: METASTORE_BIN, then cargo's newest); a release build")
    parser.add_argument("--storage", default="rocksdb", help="the engine (default: rocksdb)")
    parser.add_argument("--revisions", type=int, default=1_000_000, help="to be compacted in each round")
    parser.add_argument("--keys", type=int, default=100_000, help="that they are spread over")
    parser.add_argument("--rate", type=int, default=1000, help="puts a second while it is measured")
    parser.add_argument("--seconds", type=int, default=15, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--measure-with", metavar="COMMAND", help="run only the measurements through this command")
    parser.add_argument("--measure", nargs=2, metavar=("URL", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()

    binary = harness.find_metastore(options.metastore)
    if options.measure:
        return measure_one(binary, options)
    servers = harness.Servers([
        harness.Target("metastore", binary, ["--storage=" + options.storage, "--log-level=error"]),
        harness.Target("etcd", harness.need("etcd"), ["--log-level=error"]),
    ])
    results = {}
    try:
        group = servers.start()
        servers.wait_ready(group)
        for number in range(options.rounds):
            for server in group:
                scratch = tempfile.mkdtemp(prefix="metastore-pause-")
                begun = time.monotonic()
                fill(binary, server, options, scratch)
                print("round %d, %s: wrote %d revisions in %.0f s" % (number + 1, server.label, options.revisions, time.monotonic() - begun), flush=True)
                out = os.path.join(scratch, "measured.json")
                command = [sys.executable, os.path.abspath(__file__), "--metastore", binary, "--rate=%d" % options.rate,
                           "--seconds=%d" % options.seconds, "--keys=%d" % options.keys, "--measure", server.url, out]
                prefix = options.measure_with.split() if options.measure_with else []
                if subprocess.run(prefix + command).returncode:
                    raise harness.Failure("a measurement failed")
                for phase, figures in json.load(open(out)).items():
                    print("  %-16s longest put %8.1f ms, p99 %7.1f ms, of %d puts; the work took %.0f ms" % (
                        phase, figures["max"], figures["p99"], figures["puts"], figures["took"]), flush=True)
                    results.setdefault((phase, server.label), []).append(figures["max"])
                shutil.rmtree(scratch, ignore_errors=True)
    finally:
        servers.close()
    print("\nlongest put, median of %d rounds (lowest to highest ratio of a round)" % options.rounds)
    for phase in PHASES:
        ours, theirs = results[phase, "metastore"], results[phase, "etcd"]
        ratios = sorted(a / b for a, b in zip(ours, theirs))
        print("%-16s metastore %8.1f ms, etcd %8.1f ms: %.3f (%.3f to %.3f)" % (
            phase, statistics.median(ours), statistics.median(theirs),
            statistics.median(ours) / statistics.median(theirs), ratios[0], ratios[-1]))
    return 0


def measure_one(binary, options):
    """All measurements of one server in one round, in a process of their own."""
    url, out = options.measure
    server = harness.Server("server", url)
    scratch = tempfile.mkdtemp(prefix="metastore-pause-")
    try:
        works = {
            "nothing": lambda: None,
            "compaction": lambda: etcdctl(server, "compact", str(revision(server)), "--physical"),
            "defragmentation": lambda: etcdctl(server, "defrag"),
        }
        results = {phase: measure(binary, server, options, scratch, works[phase]) for phase in PHASES}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    with open(out, "w") as file:
        json.dump(results, file)
    return 0


if __name__ == "__main__":
    harness.run(main)
