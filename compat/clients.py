#!/usr/bin/env python3
"""Runs the programs of clients/, one for each client library, against metastore: over TLS and with a password.

Each puts, gets, runs a transaction, watches, uses a lease and a lock, tries a wrong password, and says what it did. The
libraries come from their registries on the first run, into bin/clients/. Exit code: 0 all did, 1 one failed, 2 it could
not run. What needs a program that is not installed is named and left out.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import harness
import suite

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCES = os.path.join(HERE, "clients")
BUILT = os.path.join(HERE, "bin", "clients")
USER, PASSWORD = "root", "a password: with ümlaut"
BUILD_S = 900.0
RUN_S = 90.0


def command(args, cwd=None, timeout=BUILD_S, env=None):
    done = subprocess.run(args, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=env)
    if done.returncode != 0:
        raise harness.Failure("%s: %s" % (" ".join(args[:3]), (done.stderr + done.stdout).strip()[-2000:]))
    return done.stdout


def build_go():
    binary = os.path.join(BUILT, "go")
    command(["go", "build", "-p", "2", "-o", binary, "./clients/go"], cwd=HERE)
    return [binary]


def build_rust():
    target = os.path.join(BUILT, "rust")
    command(["cargo", "build", "--locked", "--manifest-path", os.path.join(SOURCES, "rust", "Cargo.toml"),
             "--target-dir", target])
    return [os.path.join(target, "debug", "metastore-compat-client")]


def build_python():
    place = os.path.join(BUILT, "python")
    python = os.path.join(place, "bin", "python")
    if not os.path.exists(python):
        command([sys.executable, "-m", "venv", place])
    command([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r",
             os.path.join(SOURCES, "python", "requirements.txt")])
    return [python, os.path.join(SOURCES, "python", "client.py")]


def build_node():
    place = os.path.join(BUILT, "node")
    os.makedirs(place, exist_ok=True)
    for name in ("package.json", "client.js"):
        shutil.copy(os.path.join(SOURCES, "node", name), place)
    if not os.path.exists(os.path.join(place, "node_modules", "etcd3")):
        command(["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=place)
    return ["node", os.path.join(place, "client.js")]


def build_java():
    place = os.path.join(BUILT, "java")
    shutil.copytree(os.path.join(SOURCES, "java"), place, dirs_exist_ok=True)
    command(["mvn", "-q", "-B", "compile", "dependency:copy-dependencies"], cwd=place)
    return ["java", "-cp", "target/classes:target/dependency/*".replace("target", os.path.join(place, "target")), "Client"]


CLIENTS = {
    "go": ("go", build_go, "go.etcd.io/etcd/client/v3"),
    "rust": ("cargo", build_rust, "etcd-client"),
    "python": ("python3", build_python, "etcd3"),
    "node": ("npm", build_node, "etcd3"),
    "java": ("mvn", build_java, "jetcd"),
}


class Server:
    """One member over TLS, with the user root."""

    def __init__(self, binary, engine, fixtures, with_password):
        self.root = tempfile.mkdtemp(prefix="compat-clients-")
        self.ca = os.path.join(fixtures, "ca.crt")
        client, peer = harness.free_ports(2)
        self.url = "https://localhost:%d" % client
        env = harness.clean_env()
        if engine:
            env["METASTORE_STORAGE"] = engine
        self.log = open(os.path.join(self.root, "log"), "wb")
        self.proc = harness.PROCESSES.start(
            [binary, "--data-dir", os.path.join(self.root, "data"), "--listen-client-urls", self.url.replace(
                "localhost", "127.0.0.1"), "--advertise-client-urls", self.url,
             "--listen-peer-urls", "http://127.0.0.1:%d" % peer,
             "--initial-advertise-peer-urls", "http://127.0.0.1:%d" % peer,
             "--initial-cluster", "default=http://127.0.0.1:%d" % peer,
             "--cert-file", os.path.join(fixtures, "server.crt"),
             "--key-file", os.path.join(fixtures, "server.key.insecure")],
            env=env, stdout=self.log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + harness.READY_S
        while True:
            try:
                self.etcdctl("endpoint", "health")
                break
            except harness.Failure:
                if self.proc.poll() is not None or time.monotonic() > deadline:
                    raise harness.Failure("the server does not start; its log: %s" % self.tail())
                time.sleep(0.2)
        if with_password:
            self.etcdctl("user", "add", USER, "--new-user-password=" + PASSWORD)
            self.etcdctl("user", "grant-role", USER, "root")
            self.etcdctl("auth", "enable")

    def etcdctl(self, *args):
        return command([os.path.join(HERE, "bin", "etcdctl"), "--endpoints", self.url, "--cacert", self.ca] + list(args),
                       timeout=30, env=harness.clean_env())

    def tail(self):
        with open(self.log.name, errors="replace") as file:
            return file.read()[-2000:]

    def stop(self):
        harness.PROCESSES.stop(self.proc)
        self.log.close()
        shutil.rmtree(self.root, ignore_errors=True)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", default=",".join(CLIENTS), help="clients to run")
    arguments.add_argument("--storage", default=",".join(suite.ENGINES), help="engines to run with")
    arguments.add_argument("--reference", action="store_true", help="run against the real etcd")
    arguments.add_argument("--metastore", help="the binary (or METASTORE_BIN; default: the newest build)")
    arguments.add_argument("--no-password", action="store_true", help="without users")
    options = arguments.parse_args()
    binary = os.path.join(HERE, "bin", "etcd") if options.reference else harness.find_metastore(options.metastore)
    fixtures = os.path.join(suite.module_dir(), "fixtures")
    os.makedirs(BUILT, exist_ok=True)

    failed = False
    built = {}
    for name in options.only.split(","):
        needs, build, library = CLIENTS[name]
        if shutil.which(needs) is None:
            print("%-8s NOT RUN: %s is not installed" % (name, needs), flush=True)
            continue
        try:
            built[name] = build()
        except (harness.Failure, subprocess.TimeoutExpired) as error:
            print("%-8s NOT BUILT: %s" % (name, error), flush=True)
            failed = True
    for engine in [None] if options.reference else options.storage.split(","):
        server = Server(binary, engine, fixtures, not options.no_password)
        try:
            for name, args in built.items():
                login = [] if options.no_password else [USER, PASSWORD]
                try:
                    done = subprocess.run(args + [server.url, server.ca] + login, capture_output=True, text=True,
                                          timeout=RUN_S, env=harness.clean_env())
                    code, said = done.returncode, done.stdout.splitlines()
                    error = done.stderr
                except subprocess.TimeoutExpired as expired:
                    code, error = "none after %g s" % RUN_S, (expired.stderr or b"").decode(errors="replace")
                    said = (expired.stdout or b"").decode(errors="replace").splitlines()
                steps = [line.removeprefix("done: ") for line in said if line.startswith("done: ")]
                well = code == 0 and said[-1:] == ["ok"] and len(steps) == 5
                failed |= not well
                print("%-8s %-8s %-28s %s%s" % (
                    engine or "etcd", name, CLIENTS[name][2], "; ".join(steps),
                    "" if well else "  FAILED (%s): %s" % (code, error.strip()[-1500:])), flush=True)
        finally:
            server.stop()
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except harness.Failure as failure:
        print("clients.py: %s" % failure, file=sys.stderr)
        sys.exit(2)
    finally:
        harness.PROCESSES.stop_all()
