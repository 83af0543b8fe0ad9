#!/usr/bin/env python3
"""Runs etcd's own end-to-end tests with metastore in the place of etcd, and says what came of each.

The tests are those of the released module go.etcd.io/etcd/tests/v3 at the version in go.mod, unmodified: the packages
common and e2e, built with the tag e2e, and as "recipes" the packages of integration/clientv3 with the examples of
etcd's client library, its locks, elections, queues, barriers and software transactional memory, which shim/ lets run
against processes. Each test is a process of its own in a copy of the layout it expects. Where the
system allows namespaces, each has a network and a process table to itself: tests that use the same ports run side by
side, and nothing that a test starts outlives it. Otherwise they run one after another.

known.txt lists the tests that are expected to fail, and those that are not run, each with the reason. Exit code: 0 all
as expected, 1 an unexpected failure or an unexpected pass, 2 it could not run.
"""

import argparse
import concurrent.futures
import fnmatch
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import harness

HERE = os.path.dirname(os.path.abspath(__file__))
MODULE = "go.etcd.io/etcd/tests/v3"
# By name: the folder in the module, and whether it runs over the shim.
PACKAGES = {
    "common": ("common", False),
    "e2e": ("e2e", False),
    "examples": ("integration/clientv3/examples", True),
    "concurrency": ("integration/clientv3/concurrency", True),
    "recipes": ("integration/clientv3/experimental/recipes", True),
    "naming": ("integration/clientv3/naming", True),
}
ENGINES = ("rocksdb", "memory")
TIMEOUT_S = 300.0
# One line of a log that tells why a test failed is cut to this many characters.
REASON_MAX = 200

# In the new namespace: loopback up, with an address and a way out that leads nowhere, since some tests ask which address
# the machine has; then the test. The shell stays process 1 and collects what is orphaned.
INSIDE = """ip link set lo up || exit
ip addr add 10.255.255.2/32 dev lo && ip route add default dev lo src 10.255.255.2
"$@\""""

RESULT = re.compile(r"^\s*--- (PASS|FAIL|SKIP): (\S+) \(([\d.]+)s\)")


def say(text=""):
    print(text, flush=True)


class Known:
    """One line of known.txt."""

    def __init__(self, what, engines, package, pattern, reason):
        self.what = what
        self.engines = engines
        self.package = package
        self.pattern = pattern
        self.reason = reason
        self.failed = False
        self.passed = []

    def matches(self, engine, package, test):
        return (
            engine in self.engines and package == self.package and
            (fnmatch.fnmatchcase(test, self.pattern) or fnmatch.fnmatchcase(test, self.pattern + "/*"))
        )


def read_known(path):
    known = []
    with open(path) as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            parts = line.split(None, 3)
            if len(parts) != 4 or parts[0] not in ("fail", "skip") or "/" not in parts[2]:
                raise harness.Failure("%s:%d: want: fail|skip ENGINE|both PACKAGE/TEST REASON" % (path, number))
            what, engine, test, reason = parts
            package, _, pattern = test.partition("/")
            engines = ENGINES if engine == "both" else (engine,)
            if package not in PACKAGES or not set(engines) <= set(ENGINES):
                raise harness.Failure("%s:%d: unknown package or engine" % (path, number))
            # Go writes blanks in names of subtests as underscores, and so does the file; brackets are meant as such.
            known.append(Known(what, engines, package, pattern.replace("[", "[[]"), reason))
    return known


def isolation():
    """The command that gives what follows a network and processes of its own, or nothing."""
    options = ["unshare", "--net", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    if os.geteuid() != 0:
        options[1:1] = ["--user", "--map-root-user"]
    try:
        done = subprocess.run(options + ["sh", "-c", INSIDE, "sh", "true"], capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return options if done.returncode == 0 else []


def go(*args):
    try:
        done = subprocess.run(("go",) + args, cwd=HERE, capture_output=True, text=True)
    except FileNotFoundError:
        raise harness.Failure("Go is not installed")
    if done.returncode != 0:
        raise harness.Failure("go %s: %s" % (" ".join(args), done.stderr.strip() or done.stdout.strip()))
    return done.stdout.strip()


def build(package, jobs):
    """Builds the tests of a package, unless they are newer than what says which version they are of."""
    binary = os.path.join(HERE, "bin", package + ".test")
    sources = [os.path.join(HERE, name) for name in ("go.mod", "go.sum", "shim/integration.go")]
    if os.path.exists(binary) and os.path.getmtime(binary) > max(map(os.path.getmtime, sources)):
        return binary
    folder, shimmed = PACKAGES[package]
    options = shimmed_module() if shimmed else ["-tags", "e2e"]
    go("test", "-c", "-p", str(jobs), *options, "-o", binary, "%s/%s" % (MODULE, folder))
    return binary


def shimmed_module():
    """Copies the module, puts the shim in the place of its framework for integration tests, and returns the options
    with which Go takes the copy."""
    copy = os.path.join(HERE, "bin", "tests")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(module_dir(), copy, ignore=shutil.ignore_patterns("antithesis", "robustness", "e2e", "common"))
    for path, folders, files in os.walk(copy):
        for name in folders + files:
            os.chmod(os.path.join(path, name), 0o755)
    framework = os.path.join(copy, "framework", "integration")
    shutil.rmtree(framework)
    os.makedirs(framework)
    shutil.copy(os.path.join(HERE, "shim", "integration.go"), framework)
    for name in ("go.mod", "go.sum"):
        shutil.copy(os.path.join(HERE, name), os.path.join(HERE, "bin", "suite" + name[2:]))
    modfile = os.path.join(HERE, "bin", "suite.mod")
    go("mod", "edit", "-replace", "%s=%s" % (MODULE, copy), modfile)
    return ["-mod=mod", "-modfile", modfile]


def module_dir():
    """Where Go keeps the module with the tests."""
    go("mod", "download", MODULE)
    return go("list", "-m", "-f", "{{.Dir}}", MODULE)


# The newest release whose root module, which holds the sample of a configuration file, is in Go's module proxy.
SAMPLE = "go.etcd.io/etcd/v3@v3.6.8"


def sample_config():
    return os.path.join(json.loads(go("mod", "download", "-json", SAMPLE))["Dir"], "etcd.conf.yml.sample")


class Place:
    """A directory with the binaries by etcd's names and the files that the tests expect around them."""

    def __init__(self, root, name, etcd, storage, module, sample):
        self.root = os.path.join(root, name)
        self.bin = os.path.join(self.root, "bin")
        os.makedirs(self.bin)
        for tool in ("etcdctl", "etcdutl"):
            os.symlink(os.path.join(HERE, "bin", tool), os.path.join(self.bin, tool))
        path = os.path.join(self.bin, "etcd")
        if storage is None:
            os.symlink(etcd, path)
        else:
            with open(path, "w") as file:
                file.write("#!/bin/sh\nMETASTORE_STORAGE=%s exec '%s' \"$@\"\n" % (storage, etcd))
            os.chmod(path, 0o755)
        self.module = module
        self.sample = sample
        self.numbers = itertools.count()

    def directory(self, package, test):
        """A fresh working directory for one test: tests create sockets in it and read ../fixtures. Its name is short,
        since paths of sockets must be."""
        root = os.path.join(self.root, str(next(self.numbers)))
        work = os.path.join(root, "tests", package)
        os.makedirs(work)
        os.makedirs(os.path.join(root, "t"))
        shutil.copytree(os.path.join(self.module, "fixtures"), os.path.join(root, "tests", "fixtures"))
        os.symlink(self.bin, os.path.join(root, "bin"))
        if self.sample:
            shutil.copy(self.sample, root)
        return root, work


class Outcome:
    """What came of one test and its subtests."""

    def __init__(self, package, test):
        self.package = package
        self.test = test
        self.results = []  # (name, "pass" | "fail" | "skip", reason)
        self.seconds = 0.0


def reason_of(lines):
    """The line that says best why a test failed or was skipped."""
    text = [line.strip() for line in lines]
    for index, line in enumerate(text):
        if line.startswith("Error:"):
            said = [line[6:].strip()]
            for more in text[index + 1:index + 6]:
                if more.startswith(("Test:", "Messages:", "Error Trace:")) or not more:
                    break
                said.append(more)
            return " ".join(said)[:REASON_MAX]
    for line in text:
        if line.startswith("panic:") or "DATA RACE" in line:
            return line[:REASON_MAX]
    said = [line for line in text if re.match(r"^\w+\.go:\d+:", line)]
    # What the framework logs along the way says less than what comes last.
    said = [line for line in said if "logger.go" not in line] or said
    return said[-1][:REASON_MAX] if said else "no reason given"


def parse(outcome, text, status, timeout_s):
    """Reads the results of a run with -test.v."""
    lines = text.splitlines()
    seen = {}
    start = {}
    spans = {}
    current = outcome.test
    for number, line in enumerate(lines):
        began = re.match(r"^=== (?:RUN|CONT|NAME)\s+(\S+)", line)
        if began:
            current = began.group(1)
            start.setdefault(current, number)
        spans.setdefault(current, []).append(line)
        found = RESULT.match(line)
        if found:
            seen[found.group(2)] = found.group(1).lower()
            current = found.group(2)
    if status == "timeout":
        unfinished = [name for name in start if name not in seen]
        for name in unfinished:
            seen[name] = "timeout"
    if not seen:
        seen[outcome.test] = "fail"
    parents = {name.rsplit("/", 1)[0] for name in seen if "/" in name}
    for name, result in seen.items():
        children = [seen[other] for other in seen if other.startswith(name + "/")]
        if name in parents and (result in ("pass", "skip") or any(c in ("fail", "timeout") for c in children)):
            continue
        if result == "timeout":
            outcome.results.append((name, "fail", "not done after %g s" % timeout_s))
        else:
            reason = "" if result == "pass" else reason_of(spans.get(name, []))
            outcome.results.append((name, result, reason))
    # etcd runs all tests in one process and looks for leaked goroutines at its end; after one test alone some that are
    # about to end are there yet, with the real etcd too.
    leaked = status == 1 and "Unexpected goroutines running after all test(s)." in text
    if status not in (0, "timeout") and not leaked and not any(result == "fail" for _, result, _ in outcome.results):
        outcome.results.append((outcome.test, "fail", "the process ended with %s: %s" % (status, reason_of(lines))))


def run(place, binary, package, test, options, wrap):
    """Runs one test to its end, or to the end of its time."""
    outcome = Outcome(package, test)
    root, work = place.directory(package, test)
    env = {key: os.environ[key] for key in ("PATH", "HOME", "USER", "LANG") if key in os.environ}
    env["TMPDIR"] = os.path.join(root, "t")
    env["EXPECT_DEBUG"] = "true"
    if options.minimal:
        env["E2E_TEST_MINIMAL"] = "true"
    env["METASTORE_COMPAT_BINARY"] = os.path.join(place.bin, "etcd")
    args = [binary, "-test.v", "-test.run", "^%s$" % test, "-test.timeout", "%ds" % options.timeout]
    if not PACKAGES[package][1]:
        args += ["-bin-dir", place.bin, "-cert-dir", os.path.join(root, "tests", "fixtures")]
    if wrap:
        args = wrap + ["sh", "-c", INSIDE, "sh"] + args
    args = shlex.split(options.through) + args
    log = os.path.join(options.logs, os.path.basename(place.root), package, test + ".log")
    os.makedirs(os.path.dirname(log), exist_ok=True)
    begun = time.monotonic()
    with open(log, "wb") as out:
        proc = subprocess.Popen(args, cwd=work, env=env, stdin=subprocess.DEVNULL, stdout=out,
                                stderr=subprocess.STDOUT, start_new_session=True)
        options.live.add(proc)
        try:
            status = proc.wait(options.timeout + 20)
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            # Without namespaces the servers of a test that was cut off are in its session, if in no other place.
            try:
                os.killpg(proc.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            proc.wait()
            options.live.discard(proc)
    outcome.seconds = time.monotonic() - begun
    with open(log, errors="replace") as file:
        text = file.read()
    if "panic: test timed out after" in text:
        status = "timeout"
    parse(outcome, text, status, options.timeout)
    if not options.keep:
        shutil.rmtree(root, ignore_errors=True)
        if all(result != "fail" for _, result, _ in outcome.results) and not options.logs_given:
            os.remove(log)
    return outcome


def judge(outcomes, engine, known, reference):
    """Prints the table of one run. Returns the results that were not expected."""
    rows, unexpected = [], []
    for entry in known:
        entry.failed, entry.passed = False, []
    counts = {"pass": 0, "fail": 0, "skip": 0}
    tests = {"pass": 0, "fail": 0, "skip": 0}
    for outcome in outcomes:
        results = [result for _, result, _ in outcome.results]
        tests["fail" if "fail" in results else "pass" if "pass" in results else "skip"] += 1
        for name, result, reason in outcome.results:
            counts[result] += 1
            entry = next((k for k in known if k.what == "fail" and k.matches(engine, outcome.package, name)), None)
            if result == "pass":
                if entry:
                    entry.passed.append(name)
                continue
            if result == "skip":
                rows.append(("skipped", outcome.package, name, reason))
            elif entry and not reference:
                entry.failed = True
                rows.append(("failed", outcome.package, name, "expected: %s" % entry.reason))
            else:
                rows.append(("FAILED", outcome.package, name, reason))
                unexpected.append("%s/%s fails: %s" % (outcome.package, name, reason))
    for entry in known:
        if entry.what == "skip" and engine in entry.engines and not reference:
            rows.append(("not run", entry.package, entry.pattern.replace("[[]", "["), entry.reason))
        if entry.what == "fail" and engine in entry.engines and not reference and entry.passed and not entry.failed:
            for name in entry.passed:
                rows.append(("PASSED", entry.package, name, "though known.txt expects: %s" % entry.reason))
                unexpected.append("%s/%s passes, though known.txt expects it to fail" % (entry.package, name))
    # Subtests that come to the same for the same reason share a line.
    shown = {}
    for what, package, name, reason in sorted(rows):
        shown.setdefault((what, package, name.split("/")[0], reason), []).append(name)
    for (what, package, test, reason), names in shown.items():
        name = names[0] if len(names) == 1 else "%s (%d subtests)" % (test, len(names))
        say("  %-8s %-70s %s" % (what, "%s/%s" % (package, name), reason))
    say("  tests:   %(pass)d passed, %(fail)d failed, %(skip)d skipped" % tests)
    say("  with subtests counted one by one: %(pass)d passed, %(fail)d failed, %(skip)d skipped" % counts)
    return unexpected


def stop_all(options):
    for proc in list(options.live):
        try:
            os.killpg(proc.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--package", default="common", help="packages, with commas: %s" % ", ".join(PACKAGES))
    arguments.add_argument("--storage", default=",".join(ENGINES), help="engines to run with")
    arguments.add_argument("--reference", action="store_true", help="run the real etcd instead of metastore")
    arguments.add_argument("--metastore", help="the binary (or METASTORE_BIN; default: the newest build)")
    arguments.add_argument("--only", default=".", help="regular expression for the names of tests to run")
    arguments.add_argument("--list-file", help="file with the tests to run, PACKAGE/TEST a line")
    arguments.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="tests at a time")
    arguments.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds a test may take")
    arguments.add_argument("--minimal", action="store_true", help="fewer kinds of clusters, as etcd's presubmits")
    arguments.add_argument("--logs", help="keep the log of every test in this directory")
    arguments.add_argument("--keep", action="store_true", help="keep the working directories")
    arguments.add_argument("--through", default="", help="a command to run each test through, such as one that waits "
                           "for its turn on a busy machine")
    arguments.add_argument("--again", action="store_true", help="run what fails once more, alone: etcd's tests have "
                           "bounds of time that a busy machine may miss")
    arguments.add_argument("--build-only", action="store_true", help="build the tests and end")
    options = arguments.parse_args()
    options.live = set()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    packages = options.package.split(",")
    if not set(packages) <= set(PACKAGES):
        raise harness.Failure("--package knows %s" % ", ".join(PACKAGES))
    built = {package: build(package, 2) for package in packages}
    if options.build_only:
        return 0
    module = module_dir()
    for tool in ("etcdctl", "etcdutl") + (("etcd",) if options.reference else ()):
        if not os.path.exists(os.path.join(HERE, "bin", tool)):
            raise harness.Failure("bin/%s is missing: run ./build.sh" % tool)
    binary = os.path.join(HERE, "bin", "etcd") if options.reference else harness.find_metastore(options.metastore)
    known = read_known(os.path.join(HERE, "known.txt"))
    wrap = isolation()
    if not wrap:
        say("# no namespaces here: one test at a time, on the ports from 20000")
        options.jobs = 1

    chosen = {}
    listed = None
    if options.list_file:
        with open(options.list_file) as file:
            listed = {line.split("#")[0].strip() for line in file} - {""}
    for package in packages:
        done = subprocess.run([built[package], "-test.list", "."], capture_output=True, text=True)
        tests = [line for line in done.stdout.splitlines() if line.startswith(("Test", "Example"))]
        if not tests:
            raise harness.Failure("%s lists no tests: %s" % (package, done.stderr.strip()))
        if listed is not None:
            tests = [test for test in tests if "%s/%s" % (package, test) in listed]
            missing = {name for name in listed if name.startswith(package + "/")} - {package + "/" + t for t in tests}
            if missing:
                raise harness.Failure("%s does not have %s" % (options.list_file, ", ".join(sorted(missing))))
        chosen[package] = [test for test in tests if re.search(options.only, test)]

    unexpected = []
    options.logs_given = options.logs is not None
    options.logs = os.path.abspath(options.logs or tempfile.mkdtemp(prefix="compat-logs-"))
    sample = sample_config() if "e2e" in packages else None
    engines = [None] if options.reference else options.storage.split(",")
    root = tempfile.mkdtemp(prefix="compat-")
    try:
        for engine in engines:
            name = engine or "etcd"
            place = Place(root, name, binary, engine, module, sample)
            todo = []
            for package, tests in chosen.items():
                for test in tests:
                    skip = any(k.what == "skip" and k.matches(engine, package, test) for k in known)
                    if not skip or options.reference:
                        todo.append((package, test))
            say("# %s: %d tests, %d at a time" % (name, len(todo), options.jobs))
            begun = time.monotonic()
            outcomes = []
            with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
                futures = [pool.submit(run, place, built[p], p, t, options, wrap) for p, t in todo]
                try:
                    for future in concurrent.futures.as_completed(futures):
                        outcome = future.result()
                        outcomes.append(outcome)
                        bad = any(result == "fail" for _, result, _ in outcome.results)
                        say("  [%d/%d] %s/%s %s %.1f s" % (
                            len(outcomes), len(todo), outcome.package, outcome.test,
                            "failed" if bad else "done", outcome.seconds))
                except BaseException:
                    for future in futures:
                        future.cancel()
                    stop_all(options)
                    raise
            for index, outcome in enumerate(outcomes if options.again else []):
                failed = [
                    (test, reason) for test, result, reason in outcome.results
                    if result == "fail" and not any(k.matches(engine, outcome.package, test) for k in known)
                ]
                for test, reason in failed:
                    say("  %s/%s failed: %s; once more, alone" % (outcome.package, test, reason))
                if failed:
                    outcomes[index] = run(place, built[outcome.package], outcome.package, outcome.test, options, wrap)
            say("# %s, %.0f s:" % (name, time.monotonic() - begun))
            unexpected += ["%s: %s" % (name, u) for u in judge(outcomes, engine, known, options.reference)]
    finally:
        stop_all(options)
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)
    if unexpected:
        say("# not as expected (logs in %s):" % options.logs)
        for line in unexpected:
            say("  " + line)
        return 1
    if not options.logs_given:
        shutil.rmtree(options.logs, ignore_errors=True)
    say("# all as expected")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except harness.Failure as failure:
        print("suite.py: %s" % failure, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
