#!/usr/bin/env python3
"""What a million keys of 1 KiB cost a real etcd and metastore: resident memory, data on disk, and the time that a restart
takes. For values of random bytes, and for such as an orchestrator writes.

Each system is filled alone, with `metastore bench`, and with its own defaults but for a quota that the data fits into.
`fill` leaves the data in --dir; `restart` starts the systems on it, in turns; `compact` forgets its history. Prints tables for docs/benchmarks.md. Exit
code: 0 it ran, 2 it could not.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.request

import harness

QUOTA = str(8 << 30)
VALUES = ("random", "kubernetes")


class System:
    """One server on one data directory."""

    def __init__(self, name, binary, port, options):
        self.name, self.binary, self.port, self.options = name, binary, port, options
        self.process = None

    def start(self, directory):
        client, peer = ("http://127.0.0.1:%d" % port for port in (self.port, self.port + 1))
        flags = [
            "--name=default", "--data-dir=" + directory, "--quota-backend-bytes=" + QUOTA, "--log-level=error",
            "--listen-client-urls=" + client, "--advertise-client-urls=" + client,
            "--listen-peer-urls=" + peer, "--initial-advertise-peer-urls=" + peer, "--initial-cluster=default=" + peer,
        ]
        log = open(directory + ".log", "ab")
        begun = time.monotonic()
        self.process = subprocess.Popen([self.binary] + flags + self.options, stdout=log, stderr=log, env=harness.clean_env())
        while not self.is_healthy(client):
            if self.process.poll() is not None or time.monotonic() - begun > 300:
                raise harness.Failure("%s does not start: see %s.log" % (self.name, directory))
            time.sleep(0.002)
        return time.monotonic() - begun

    @staticmethod
    def is_healthy(client):
        # Answered after a linearizable read of its own, by both.
        try:
            with urllib.request.urlopen(client + "/health", timeout=5) as answer:
                return b'"true"' in answer.read()
        except OSError:
            return False

    def stop(self, how=signal.SIGTERM):
        if self.process:
            self.process.send_signal(how)
            self.process.wait(60)
            self.process = None

    def memory(self):
        for line in open("/proc/%d/status" % self.process.pid):
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
        raise harness.Failure("no memory of %s" % self.name)


def disk(directory):
    """Bytes that files take on disk: of logs, and of everything else."""
    logs = rest = 0
    for root, _, files in os.walk(directory):
        is_log = os.path.relpath(root, directory).replace("member/", "").split("/")[0] in ("wal", "raft-log", "log", "raft")
        for name in files:
            size = os.lstat(os.path.join(root, name)).st_blocks * 512
            if is_log:
                logs += size
            else:
                rest += size
    return logs, rest


def count(binary, port):
    out = subprocess.run(
        [binary, "--endpoints=127.0.0.1:%d" % port, "get", "", "--prefix", "--count-only", "--write-out=fields",
         "--command-timeout=60s"],
        check=True, capture_output=True, text=True, env=harness.clean_env()).stdout
    return int([line for line in out.splitlines() if line.startswith('"Count"')][0].split(":")[1])


def fill(systems, options, bench):
    rows = []
    for values in options.values.split(","):
        for system in systems:
            directory = os.path.join(options.dir, "%s-%s" % (system.name, values))
            shutil.rmtree(directory, ignore_errors=True)
            system.start(directory)
            begun = time.monotonic()
            subprocess.run(
                [bench, "bench", "put", "--clients=256", "--keys=%d" % options.keys, "--total=%d" % options.keys,
                 "--warmup=0s", "--timeout=10m", "--key-order=seq", "--value-size=1KiB", "--values=" + values, "--keep", "--no-progress",
                 "--pids=%d" % system.process.pid, "--endpoints=127.0.0.1:%d" % system.port],
                check=True, stdout=subprocess.DEVNULL, env=harness.clean_env())
            took = time.monotonic() - begun
            time.sleep(options.settle)
            memory = system.memory()
            keys = count(harness.need("etcdctl"), system.port)
            if keys != options.keys:
                raise harness.Failure("%s holds %d keys" % (system.name, keys))
            system.stop()
            rows.append((values, system.name, took, memory) + disk(directory))
            print("%-11s %-10s filled in %4.0f s, resident %6.0f MiB, data %6.0f MiB, logs %5.0f MiB" % (
                rows[-1][:3] + tuple(number / (1 << 20) for number in (memory, rows[-1][5], rows[-1][4]))), flush=True)
    print("\n| Values | System | Resident memory | Data on disk | Logs on disk |\n|---|---|---|---|---|")
    for values, name, _, memory, logs, data in rows:
        print("| %s | %s | %.0f MiB | %.0f MiB | %.0f MiB |" % ((values, name) + tuple(n / (1 << 20) for n in (memory, data, logs))))


def ctl(port, *args):
    """etcdctl's answer, as JSON."""
    out = subprocess.run(
        [harness.need("etcdctl"), "--endpoints=127.0.0.1:%d" % port, "--command-timeout=300s", "--write-out=json"] + list(args),
        check=True, capture_output=True, text=True, env=harness.clean_env()).stdout
    return json.loads(out) if out.startswith(("{", "[")) else None


def compact(systems, options):
    """Forgets all history, which leaves one version of each key, and gives the space back."""
    print("| Values | System | Data on disk without history | Resident then |\n|---|---|---|---|")
    for values in options.values.split(","):
        for system in systems:
            directory = os.path.join(options.dir, "%s-%s" % (system.name, values))
            system.start(directory)
            revision = ctl(system.port, "get", "x")["header"]["revision"]
            ctl(system.port, "compact", "--physical", str(revision))
            ctl(system.port, "defrag")
            sizes = []
            # What is dropped is given back in the background: until nothing changes any more.
            while len(sizes) < 4 or sizes[-1] != sizes[-4]:
                time.sleep(options.settle / 2)
                sizes.append(disk(directory)[1])
            memory = system.memory()
            system.stop()
            print("| %s | %s | %.0f MiB | %.0f MiB |" % (
                values, system.name, disk(directory)[1] / (1 << 20), memory / (1 << 20)), flush=True)


def restart(systems, options):
    print("| Values | System | Start to first answer, median (range) | Resident then |\n|---|---|---|---|")
    for values in options.values.split(","):
        times = {system.name: [] for system in systems}
        memory = {}
        for _ in range(options.rounds):
            for system in systems:
                times[system.name].append(system.start(os.path.join(options.dir, "%s-%s" % (system.name, values))))
                memory[system.name] = system.memory()
                system.stop(signal.SIGKILL if options.kill else signal.SIGTERM)
        for name, all_times in times.items():
            print("| %s | %s | %.2f s (%.2f to %.2f) | %.0f MiB |" % (
                values, name, statistics.median(all_times), min(all_times), max(all_times), memory[name] / (1 << 20)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fill", "restart", "compact"])
    parser.add_argument("--metastore", metavar="PATH", help="the binary (default: METASTORE_BIN, then cargo's newest); a release build")
    parser.add_argument("--dir", required=True, help="where the data is; some 10 GB")
    parser.add_argument("--values", default=",".join(VALUES), help="kinds of values, with commas")
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--settle", type=int, default=10, help="seconds before memory is read")
    parser.add_argument("--rounds", type=int, default=5, help="restarts of each")
    parser.add_argument("--kill", action="store_true", help="end the servers by SIGKILL between restarts")
    parser.add_argument("--port", type=int, default=32479, help="the first of four ports")
    parser.add_argument("--only", help="only this system")
    parser.add_argument("--flag", action="append", default=[], metavar="FLAG", help="one more flag for metastore")
    options = parser.parse_args()

    binary = harness.find_metastore(options.metastore)
    os.makedirs(options.dir, exist_ok=True)
    systems = [
        System("metastore", binary, options.port, options.flag),
        System("etcd", harness.need("etcd"), options.port + 2, []),
    ]
    systems = [system for system in systems if options.only in (None, system.name)]
    try:
        if options.what == "fill":
            fill(systems, options, binary)
        elif options.what == "restart":
            restart(systems, options)
        else:
            compact(systems, options)
    finally:
        for system in systems:
            system.stop(signal.SIGKILL)
    return 0


if __name__ == "__main__":
    harness.run(main)
