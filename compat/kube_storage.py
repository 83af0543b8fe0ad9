#!/usr/bin/env python3
"""Runs the tests of Kubernetes' storage layer over metastore and over a real etcd, and says which differ in result.

They are those of the released module k8s.io/apiserver at the version in kube/go.mod, unmodified: of the layer that
speaks to etcd (etcd3), of the watch cache over it (cacher), and of what sets both up (factory). They run etcd within
themselves; kube/testserver has them start processes instead. Exit code: 0 none fails over metastore only, 1 some do,
2 it could not run.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile

import harness
import kube
import suite

MODULE = "k8s.io/apiserver"
PACKAGES = {"etcd3": "etcd3", "cacher": "cacher", "factory": "storagebackend/factory"}
TIMEOUT_S = 600.0


def build(packages):
    """Copies the module, puts our way to start servers into it, and builds the tests."""
    copy, modfile = os.path.join(harness.BIN, "kube-storage"), os.path.join(harness.BIN, "kube-storage.mod")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(kube.go("list", "-m", "-f", "{{.Dir}}", MODULE), copy)
    for path, folders, files in os.walk(copy):
        for name in folders + files:
            os.chmod(os.path.join(path, name), 0o755)
    shutil.copy(os.path.join(kube.MODULE, "testserver", "test_server.go"),
                os.path.join(copy, "pkg", "storage", "etcd3", "testserver"))
    for name in ("go.mod", "go.sum"):
        shutil.copy(os.path.join(kube.MODULE, name), modfile[:-len(".mod")] + name[2:])
    kube.go("mod", "edit", "-replace", "%s=%s" % (MODULE, copy), modfile)
    for package in packages:
        kube.go("test", "-c", "-p", kube.JOBS, "-mod=mod", "-modfile", modfile, "-o", binary_of(package),
                "%s/pkg/storage/%s" % (MODULE, PACKAGES[package]))
    return copy


def binary_of(package):
    return os.path.join(harness.BIN, "kube-%s.test" % package)


def run(copy, package, test, target, logs):
    """Runs one test. Returns what came of it and of its subtests, by name."""
    env = harness.clean_env()
    env["METASTORE_COMPAT_BINARY"] = target.binary
    if target.flags:
        env["METASTORE_STORAGE"] = target.label
    log = os.path.join(logs, "%s-%s-%s.log" % (target.label, package, test))
    with open(log, "wb") as out:
        proc = harness.PROCESSES.start(
            [binary_of(package), "-test.v", "-test.run", "^%s$" % test, "-test.timeout", "%gs" % TIMEOUT_S],
            cwd=os.path.join(copy, "pkg", "storage", PACKAGES[package]), env=env, stdin=subprocess.DEVNULL,
            stdout=out, stderr=subprocess.STDOUT)
        try:
            status = proc.wait(TIMEOUT_S + 20)
        except subprocess.TimeoutExpired:
            status = "timeout"
        harness.PROCESSES.stop(proc)
    outcome = suite.Outcome(package, test)
    with open(log, errors="replace") as file:
        suite.parse(outcome, file.read(), status, TIMEOUT_S)
    return {name: (result, reason) for name, result, reason in outcome.results}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--package", default=",".join(PACKAGES), help="packages, with commas (default: %(default)s)")
    arguments.add_argument("--storage", default=",".join(suite.ENGINES), help="engines to run with")
    arguments.add_argument("--metastore", metavar="PATH", help="the binary (or METASTORE_BIN; default: the newest build)")
    arguments.add_argument("--only", default=".", help="regular expression for the names of tests to run")
    options = arguments.parse_args()

    packages = options.package.split(",")
    binary = harness.find_metastore(options.metastore)
    targets = [harness.Target(engine, binary, [engine]) for engine in options.storage.split(",")]
    targets.append(harness.Target("etcd", harness.need("etcd")))
    copy = build(packages)
    logs = tempfile.mkdtemp(prefix="metastore-kube-storage-")
    failed = False
    for package in packages:
        listed = subprocess.run([binary_of(package), "-test.list", "."], capture_output=True, text=True, check=True)
        tests = [t for t in listed.stdout.splitlines() if t.startswith("Test") and re.search(options.only, t)]
        for target in targets:
            counts = {"pass": 0, "fail": 0, "skip": 0}
            target.results = {}
            for test in tests:
                for name, result in run(copy, package, test, target, logs).items():
                    target.results[name] = result
                    counts[result[0]] += 1
            suite.say("%s, %s: %d tests and subtests passed, %d failed, %d skipped" % (
                package, target.label, counts["pass"], counts["fail"], counts["skip"]))
        reference = targets[-1]
        for target in targets:
            for name, (result, reason) in sorted(target.results.items()):
                known = reference.results.get(name, ("not run", ""))[0]
                if target is reference and result == "fail" or target is not reference and result != known:
                    suite.say("  %s, %s: %s, over etcd: %s: %s" % (target.label, name, result, known, reason))
                    failed |= result == "fail" and known != "fail"
    if failed:
        suite.say("kept: " + logs)
    else:
        shutil.rmtree(logs)
    return 1 if failed else 0


if __name__ == "__main__":
    harness.run(main)
