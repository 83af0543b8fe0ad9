#!/usr/bin/env python3
"""Puts and gets over HTTP/1.1 with keep-alive, by wrk, beside the same over gRPC, by `metastore bench`, against one server.

A round runs every load over both protocols, one right after the other; the figures are medians of the rounds, with the
lowest and the highest. Server CPU per request is the process's own time (/proc) over the whole run of a load. Prints a
table in Markdown. Needs wrk. Usage: bench-http.py METASTORE [--rounds 3] [--seconds 3] [--storage rocksdb] [--port 34100]
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

KEYS = 10_000
# Requests are made before the load begins, so that wrk only sends.
SCRIPT = """
local method, keys, order = "%(method)s", %(keys)d, "%(order)s"
local body = nil
if method == "PUT" then
  math.randomseed(1)
  local bytes = {}
  for at = 1, 256 do bytes[at] = string.char(math.random(0, 255)) end
  body = table.concat(bytes)
end
local requests, at = {}, 0
function init(args)
  for key = 1, keys do
    requests[key] = wrk.format(method, string.format("/api/v1/kv/http-bench/%%021d", key - 1), nil, body)
  end
end
function request()
  if order == "random" then return requests[math.random(keys)] end
  at = at %% keys + 1
  return requests[at]
end
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format("RESULT %%d %%d %%d %%d %%d\\n", summary.requests, summary.duration, latency:percentile(50),
    latency:percentile(99), errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""


def cpu_seconds(pid):
    with open("/proc/%d/stat" % pid) as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Server:
    def __init__(self, options):
        self.dir = tempfile.mkdtemp(prefix="bench-http-")
        self.url = "http://127.0.0.1:%d" % options.port
        self.log = open(os.path.join(self.dir, "log"), "wb")
        self.process = subprocess.Popen(
            [options.metastore, "--data-dir", os.path.join(self.dir, "data"), "--storage", options.storage,
             "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
             "--listen-peer-urls", "http://127.0.0.1:0", "--log-level", "error"],
            stdout=self.log, stderr=subprocess.STDOUT)
        self.pid = self.process.pid
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(self.url + "/health", timeout=1).read()
                return
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    sys.exit("the server does not start: %s" % open(self.log.name).read()[-2000:])
                time.sleep(0.1)

    def stop(self):
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.dir)


def over_http(server, options, load, connections, seconds):
    script = os.path.join(server.dir, load + ".lua")
    with open(script, "w") as file:
        file.write(SCRIPT % {"method": "PUT" if load == "put" else "GET", "keys": KEYS,
                             "order": "seq" if load == "put" else "random"})
    before = cpu_seconds(server.pid)
    said = subprocess.run(["wrk", "-t1", "-c%d" % connections, "-d%gs" % seconds, "--timeout", "10s", "-s", script,
                           server.url], capture_output=True, text=True, check=True).stdout
    used = cpu_seconds(server.pid) - before
    found = re.search(r"^RESULT (\d+) (\d+) (\d+) (\d+) (\d+)$", said, re.M)
    requests, microseconds, p50, p99, errors = map(int, found.groups())
    if errors:
        sys.exit("%d of %d requests failed: %s" % (errors, requests, said))
    return {"rate": requests / microseconds * 1e6, "p50": p50 / 1e3, "p99": p99 / 1e3, "cpu": used / requests * 1e6}


def over_grpc(server, options, load, clients, connections, seconds):
    result = os.path.join(server.dir, "result.json")
    args = [options.metastore, "bench", load, "--endpoints", server.url.removeprefix("http://"), "--clients",
            str(clients), "--connections", str(connections), "--keys", str(KEYS), "--duration", "%gs" % seconds,
            "--warmup", "300ms", "--pids", str(server.pid), "--keep", "--no-progress", "--json", result]
    if load == "get":
        args.append("--no-fill")
    subprocess.run(args, check=True, stdout=subprocess.DEVNULL)
    with open(result) as file:
        measured = json.load(file)["workloads"][0]["systems"][0]["rounds"][0]
    row = measured["rows"][0]
    if row["errors"]:
        sys.exit("gRPC calls failed: %s" % row["errors"])
    return {"rate": row["per_second"], "p50": row["latency"]["p50"] / 1e6, "p99": row["latency"]["p99"] / 1e6,
            "cpu": measured["server"]["cpu_per_op"] / 1e3}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("metastore", help="the binary, a release build")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--seconds", type=float, default=3)
    arguments.add_argument("--storage", default="rocksdb")
    arguments.add_argument("--port", type=int, default=34100)
    arguments.add_argument("--connections", default="1,64,256")
    options = arguments.parse_args()
    server = Server(options)
    figures = {}
    try:
        # Both kinds of keys are there before the first get.
        over_http(server, options, "put", 64, 2)
        over_grpc(server, options, "put", 64, 8, 2)
        for _ in range(options.rounds):
            for load in ("put", "get"):
                for clients in map(int, options.connections.split(",")):
                    ways = [("HTTP/1.1", clients, lambda: over_http(server, options, load, clients, options.seconds)),
                            ("gRPC", min(clients, 8),
                             lambda: over_grpc(server, options, load, clients, min(clients, 8), options.seconds))]
                    if clients > 8:
                        ways.append(("gRPC", clients,
                                     lambda: over_grpc(server, options, load, clients, clients, options.seconds)))
                    for protocol, connections, run in ways:
                        figures.setdefault((load, clients, protocol, connections), []).append(run())
                        time.sleep(0.2)
    finally:
        server.stop()
    print("| Load | In flight | Protocol | Connections | Requests/s | p50 | p99 | Server CPU per request |")
    print("|---|---|---|---|---|---|---|---|")
    for (load, clients, protocol, connections), rounds in figures.items():
        def show(name, form, spread=True):
            values = sorted(figure[name] for figure in rounds)
            shown = form(statistics.median(values))
            return "%s (%s to %s)" % (shown, form(values[0]), form(values[-1])) if spread else shown
        print("| %s | %d | %s | %d | %s | %s | %s | %s |" % (
            load, clients, protocol, connections, show("rate", "{:,.0f}".format),
            show("p50", "{:.2f} ms".format, False), show("p99", "{:.1f} ms".format, False),
            show("cpu", "{:.1f} us".format)))


if __name__ == "__main__":
    main()
