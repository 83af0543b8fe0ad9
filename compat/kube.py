#!/usr/bin/env python3
"""Runs a real kube-apiserver on metastore and on etcd, tells both the same story, and compares what came of it.

The API server and the driver that tells the story are built from kube/, a module of its own, into bin/. The driver's
transcript from an API server on etcd is what that from one on metastore has to be, line by line; durations and other
figures are printed and not compared, and so are the warnings and errors in the log of the API server that it never gave
on etcd, up to where servers are killed. Exit code: 0 all equal, 1 differences, 2 it could not run.
"""

import argparse
import collections
import difflib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request

import harness
import suite

HERE = os.path.dirname(os.path.abspath(__file__))
MODULE = os.path.join(HERE, "kube")
APISERVER, DRIVER = os.path.join(harness.BIN, "kube-apiserver"), os.path.join(harness.BIN, "kube-driver")
TOKEN = "compat-token"
JOBS = os.environ.get("COMPAT_BUILD_JOBS", "2")
READY_S = 120.0
# A member without a quorum waits for the requests that it has before it ends.
STOP_S = 30.0
STORY = ["start", "objects", "allocations", "apply", "lists", "watches", "deletions", "custom", "ttl", "conflicts",
         "election", "sizes"]


class Setup:
    """One way to run the API server on a store, and the scenarios of kube/driver that are told there."""

    def __init__(self, scenarios, flags, members=1, tls=False):
        self.scenarios = scenarios
        self.flags = flags
        self.members = members
        self.tls = tls


SETUPS = {
    # As most run it.
    "cached": Setup(STORY + ["expiry", "load", "metrics", "restarts"], ["--etcd-compaction-interval=20s"]),
    # Every list and watch of a client is one of the store, streamed. History is compacted by request alone.
    "direct": Setup(STORY + ["expiry", "metrics", "restarts"], ["--etcd-compaction-interval=0", "--watch-cache=false"]),
    # The same over TLS, lists page by page.
    "tls": Setup(STORY + ["expiry", "metrics", "restarts"], ["--etcd-compaction-interval=20s", "--watch-cache=false",
                 "--feature-gates=EtcdRangeStream=false"], tls=True),
    "cluster": Setup(["start", "metrics", "members", "restarts"], ["--etcd-compaction-interval=20s"], members=3),
}


def say(text):
    print(text, flush=True)


def go(*args):
    try:
        done = subprocess.run(("go",) + args, cwd=MODULE, capture_output=True, text=True)
    except FileNotFoundError:
        raise harness.Failure("Go is not installed")
    if done.returncode != 0:
        raise harness.Failure("go %s: %s" % (args[0], done.stderr.strip()))
    return done.stdout.strip()


def build():
    """Builds the API server, which takes a quarter of an hour the first time, and the driver."""
    os.makedirs(harness.BIN, exist_ok=True)
    stamp = "k8s.io/component-base/version.gitVersion=" + go("list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
    go("build", "-p", JOBS, "-ldflags", "-X " + stamp, "-o", APISERVER, "./apiserver")
    go("build", "-p", JOBS, "-o", DRIVER, "./driver")


class Store:
    """The members of one store, which keep their ports and data while they are stopped and started."""

    def __init__(self, target, root, setup):
        self.target, self.root = target, root
        self.fixtures = os.path.join(suite.module_dir(), "fixtures") if setup.tls else None
        scheme = "https" if setup.tls else "http"
        ports = harness.free_ports(2 * setup.members)
        self.urls = ["%s://127.0.0.1:%d" % (scheme, port) for port in ports[::2]]
        self.peers = ["http://127.0.0.1:%d" % port for port in ports[1::2]]
        self.procs = [None] * setup.members
        self.used_s = 0.0
        for member in range(setup.members):
            self.start(member)
        self.wait()

    def certificates(self, ca, cert, key):
        if not self.fixtures:
            return []
        files = ("ca.crt", "server.crt", "server.key.insecure")
        return ["%s=%s" % (flag, os.path.join(self.fixtures, file)) for flag, file in zip((ca, cert, key), files)]

    def start(self, member):
        flags = self.certificates("--trusted-ca-file", "--cert-file", "--key-file")
        if flags:
            flags.append("--client-cert-auth")
        name = "m%d" % member
        with open(os.path.join(self.root, "%s.log" % name), "ab") as log:
            self.procs[member] = harness.PROCESSES.start(
                [self.target.binary, "--name=" + name, "--data-dir=" + os.path.join(self.root, name),
                 "--listen-client-urls=" + self.urls[member], "--advertise-client-urls=" + self.urls[member],
                 "--listen-peer-urls=" + self.peers[member], "--initial-advertise-peer-urls=" + self.peers[member],
                 "--initial-cluster=" + ",".join("m%d=%s" % pair for pair in enumerate(self.peers))]
                + flags + self.target.flags,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=harness.clean_env())

    def etcdctl(self, *args):
        code, out, err = harness.PROCESSES.run(
            [harness.need("etcdctl"), "--endpoints=" + ",".join(self.urls)]
            + self.certificates("--cacert", "--cert", "--key") + list(args), None, 30, env=harness.clean_env())
        if code != 0:
            raise harness.Failure("etcdctl %s: %s" % (args[0], err.decode(errors="replace")))
        return out.decode()

    def wait(self):
        deadline = time.monotonic() + harness.READY_S
        while True:
            try:
                return self.etcdctl("endpoint", "health")
            except harness.Failure as error:
                if time.monotonic() > deadline or any(proc.poll() is not None for proc in self.procs):
                    raise harness.Failure("%s is not healthy (its log is in %s): %s" % (
                        self.target.label, self.root, error))
            time.sleep(0.1)

    def wait_same(self):
        """Waits until all members have the same history, which they have at once unless one lags or compacts."""
        deadline = time.monotonic() + harness.READY_S
        while True:
            hashes = {(a["HashKV"]["hash"], a["HashKV"]["hash_revision"], a["HashKV"]["compact_revision"])
                      for a in json.loads(self.etcdctl("endpoint", "hashkv", "--write-out=json"))}
            if len(hashes) == 1:
                return
            if time.monotonic() > deadline:
                raise harness.Failure("the members differ: %s" % sorted(hashes))
            time.sleep(0.1)

    def status(self):
        live = [url for url, proc in zip(self.urls, self.procs) if proc.poll() is None]
        return [answer["Status"] for answer in json.loads(
            self.etcdctl("endpoint", "status", "--endpoints=" + ",".join(live), "--write-out=json"))]

    def stop(self, member, signal_number):
        begun = time.monotonic()
        self.procs[member].send_signal(signal_number)
        self.procs[member].wait(STOP_S)
        harness.PROCESSES.stop(self.procs[member])
        return time.monotonic() - begun

    def restart(self, signal_number):
        took = [self.stop(member, signal_number) for member in range(len(self.procs))]
        begun = time.monotonic()
        for member in range(len(self.procs)):
            self.start(member)
        self.wait()
        return "the store ended after %s s and was healthy again after %.1f s" % (
            " and ".join("%.1f" % t for t in took), time.monotonic() - begun)

    def leads(self, member):
        status = self.status()[member]
        return status["header"]["member_id"] == status["leader"]

    def figures(self):
        """Memory and processor time of the members."""
        rss, peak, cpu = 0, 0, 0.0
        for proc in self.procs:
            with open("/proc/%d/status" % proc.pid) as file:
                fields = dict(line.split(":", 1) for line in file)
            rss += int(fields["VmRSS"].split()[0])
            peak += int(fields["VmHWM"].split()[0])
            cpu += processor_s(proc.pid)
        used, self.used_s = cpu - self.used_s, cpu
        return "store: %d MiB resident, %d MiB at most, %.1f s of processor" % (rss >> 10, peak >> 10, used)


def processor_s(pid):
    with open("/proc/%d/stat" % pid) as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class ApiServer:
    def __init__(self, store, root, flags):
        self.root = root
        self.log = os.path.join(root, "apiserver.log")
        (port,) = harness.free_ports(1)
        self.url = "https://127.0.0.1:%d" % port
        key, tokens = os.path.join(root, "service-accounts.key"), os.path.join(root, "tokens.csv")
        subprocess.run([DRIVER, "-key", key], check=True)
        with open(tokens, "w") as file:
            file.write('%s,admin,admin,"system:masters"\n' % TOKEN)
        self.args = [
            APISERVER, "--etcd-servers=" + ",".join(store.urls), "--bind-address=127.0.0.1", "--secure-port=%d" % port,
            # No endpoint may have a loopback address; nobody ever connects to this one.
            "--advertise-address=192.0.2.1", "--cert-dir=" + os.path.join(root, "certs"),
            "--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file=" + key,
            "--service-account-signing-key-file=" + key, "--token-auth-file=" + tokens, "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.96.0.0/16", "--event-ttl=10s",
            # Nothing here makes service accounts.
            "--disable-admission-plugins=ServiceAccount",
        ] + store.certificates("--etcd-cafile", "--etcd-certfile", "--etcd-keyfile") + flags
        self.proc = None
        self.start()

    def start(self):
        begun = time.monotonic()
        env = harness.clean_env()
        # Should what it has in memory ever differ from what is in the store, it panics.
        env["KUBE_WATCHCACHE_CONSISTENCY_CHECKER"] = "true"
        with open(self.log, "ab") as log:
            self.proc = harness.PROCESSES.start(self.args, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        self.wait()
        return time.monotonic() - begun

    def wait(self):
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        deadline = time.monotonic() + READY_S
        while True:
            try:
                with urllib.request.urlopen(self.url + "/readyz", timeout=5, context=context):
                    return
            except OSError as error:
                if self.proc.poll() is not None or time.monotonic() > deadline:
                    raise harness.Failure("the API server is not ready (its log: %s): %s" % (self.log, error))
            time.sleep(0.1)

    def complaints(self):
        """Warnings and errors in the log, without what differs from run to run, and how often each came."""
        found = collections.Counter()
        with open(self.log, errors="replace") as file:
            for line in file:
                match = (re.match(r"[WEF]\d{4} \S+\s+\d+ ([\w.]+:\d+)\] (.*)", line)
                         or re.match(r'(\{"level":"\w+").*?("msg".*)', line))
                if match:
                    text = re.sub(r"0xc?[0-9a-f]+|(\d+\.)*\d+(ms|µs|s)?", "N", " ".join(match.groups()))
                    found[text[:300]] += 1
        return found


class Run:
    """One setup with one store."""

    def __init__(self, target, name, setup, options, root):
        self.target, self.name, self.setup = target, name, setup
        self.scenarios = [s for s in setup.scenarios if s in (options.only or [s])]
        self.root = os.path.join(root, "%s-%s" % (name, target.label))
        os.makedirs(self.root)
        self.transcript, self.complaints, self.stopped = [], None, None

    def note(self, text):
        say("  %s, %s: %s" % (self.name, self.target.label, text))

    def tell(self):
        begun = time.monotonic()
        store = Store(self.target, self.root, self.setup)
        server = ApiServer(store, self.root, self.setup.flags)
        self.note("ready after %.1f s" % (time.monotonic() - begun))
        try:
            with open(os.path.join(self.root, "driver.log"), "wb") as errors:
                driver = harness.PROCESSES.start(
                    [DRIVER, "-server", server.url, "-token", TOKEN] + self.scenarios, text=True, bufsize=1,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=harness.clean_env())
                for line in driver.stdout:
                    kind, text = line[0], line[2:].rstrip("\n")
                    if kind == "=":
                        self.transcript.append(text)
                    elif kind == "#":
                        self.note(text)
                    else:
                        driver.stdin.write(self.answer(text, store, server) + "\n")
                driver.wait(harness.STOP_S)
                if harness.PROCESSES.stop(driver) != 0:
                    self.transcript.append("FAILED: the driver ended with %s, see %s" % (
                        driver.returncode, errors.name))
            for what, proc in [("the store", p) for p in store.procs] + [("the API server", server.proc)]:
                if proc.poll() is not None:
                    self.transcript.append("FAILED: %s ended by itself with %s, see %s" % (
                        what, proc.returncode, self.root))
        finally:
            for proc in [server.proc] + store.procs:
                harness.PROCESSES.stop(proc)
        if self.complaints is None:
            self.complaints = server.complaints()

    def answer(self, request, store, server):
        what, _, argument = request.partition(" ")
        if what.startswith(("kill-", "restart-")) and self.complaints is None:
            # What is logged from now on depends on what was under way when a server ended.
            self.complaints = server.complaints()
        try:
            if what == "figures":
                self.note("%s: %s; API server: %.1f s of processor" % (
                    argument, store.figures(), processor_s(server.proc.pid)))
            elif what == "compact":
                store.etcdctl("compact", str(store.status()[0]["header"]["revision"]))
            elif what == "restart-apiserver":
                server.proc.send_signal(signal.SIGKILL)
                server.proc.wait()
                harness.PROCESSES.stop(server.proc)
                self.note("the API server was ready again after %.1f s" % server.start())
            elif what == "restart-store":
                self.note(store.restart(getattr(signal, "SIG" + argument)))
                server.wait()
            elif what in ("kill-leader", "kill-follower"):
                self.stopped = next(m for m in range(len(store.procs)) if store.leads(m) == (what == "kill-leader"))
                store.stop(self.stopped, signal.SIGKILL)
            elif what == "start-member":
                store.start(self.stopped)
                store.wait()
            elif what == "same":
                store.wait_same()
            else:
                return "kube.py does not know how"
        except (harness.Failure, StopIteration, subprocess.TimeoutExpired) as error:
            return "%s: %s" % (type(error).__name__, str(error).replace("\n", " "))
        return "done"


def compare(reference, run):
    """Prints what differs. Returns whether anything did."""
    unknown = run.complaints.keys() - reference.complaints.keys()
    for text in sorted(unknown):
        run.note("logged by the API server %d times, and never on etcd: %s" % (run.complaints[text], text))
    difference = list(difflib.unified_diff(reference.transcript, run.transcript, "etcd", run.target.label, n=1,
                                           lineterm=""))
    failed = [line for line in run.transcript if line.startswith("FAILED")]
    for line in difference:
        say("  %s" % line[:2000])
    say("%s, %s: %s" % (run.name, run.target.label, "DIFFERENT" if difference or failed else
                        "equal, %d lines" % len(run.transcript)))
    return bool(difference or failed)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--setup", default=",".join(SETUPS), help="setups to run (default: %(default)s)")
    arguments.add_argument("--only", action="append", default=[], metavar="NAME", help="only this scenario")
    arguments.add_argument("--storage", default=",".join(suite.ENGINES), help="engines to run with")
    arguments.add_argument("--metastore", metavar="PATH", help="the binary (or METASTORE_BIN; default: the newest build)")
    arguments.add_argument("--keep", action="store_true", help="keep transcripts, logs and data")
    arguments.add_argument("--self", action="store_true", dest="compare_self", help="compare etcd with itself")
    options = arguments.parse_args()

    etcd = harness.need("etcd")
    targets = [harness.Target("etcd", etcd)]
    if options.compare_self:
        targets.append(harness.Target("etcd again", etcd))
    elif options.storage:
        binary = harness.find_metastore(options.metastore)
        targets += [harness.Target(engine, binary, ["--storage=" + engine]) for engine in options.storage.split(",")]
    build()
    root = tempfile.mkdtemp(prefix="metastore-kube-")
    different = False
    try:
        for name in options.setup.split(","):
            reference = None
            for target in targets:
                run = Run(target, name, SETUPS[name], options, root)
                run.tell()
                with open(os.path.join(run.root, "transcript"), "w") as file:
                    file.writelines(line + "\n" for line in run.transcript)
                if reference is None:
                    reference = run
                    for line in run.transcript:
                        if line.startswith("FAILED"):
                            different = True
                            say("%s, etcd: %s" % (name, line))
                else:
                    different |= compare(reference, run)
    finally:
        harness.PROCESSES.stop_all()
        if options.keep or different:
            say("kept: " + root)
        else:
            shutil.rmtree(root, ignore_errors=True)
    return 1 if different else 0


if __name__ == "__main__":
    harness.run(main)
