"""Starts and stops the servers which compare.py and grpcdiff.py compare, in temporary directories on free ports.

Every process is stopped by its own id: at the end, on an error, on a signal, and, should this process be killed
outright, by the kernel (PR_SET_PDEATHSIG).
"""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
BIN = os.path.join(HERE, "bin")

READY_S = 30.0
DECIDED_S = 3.0
STOP_S = 10.0
START_ATTEMPTS = 3

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


class Failure(Exception):
    """Something that makes the comparison itself impossible: told in one line, exit 2."""


def die_with_parent():
    """For preexec_fn. The signal comes when the *thread* that forked ends, so only the main thread may use it."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Processes:
    """All processes this run started and has not seen end."""

    def __init__(self):
        self._live = []

    def start(self, args, **kwargs):
        """Starts a process that must not outlive this one. Only for the main thread: see die_with_parent."""
        proc = subprocess.Popen(args, preexec_fn=die_with_parent, **kwargs)
        self._live.append(proc)
        return proc

    def run(self, args, stdin, timeout_s, **kwargs):
        """Runs a short command, from any thread. Returns exit code, stdout, stderr."""
        proc = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)
        self._live.append(proc)
        try:
            out, err = proc.communicate(stdin, timeout=timeout_s)
            code = proc.returncode
        except subprocess.TimeoutExpired:
            proc.kill()
            out, err = proc.communicate()
            code = "none after %g s" % timeout_s
        finally:
            try:
                self._live.remove(proc)
            except ValueError:
                pass
        return code, out, err

    def stop(self, proc, grace_s=STOP_S):
        if proc.poll() is None:
            proc.terminate()
            try:
                proc.wait(grace_s)
            except subprocess.TimeoutExpired:
                proc.kill()
                proc.wait(grace_s)
        try:
            self._live.remove(proc)
        except ValueError:
            pass
        return proc.returncode

    def stop_all(self):
        live = list(self._live)
        for proc in live:
            if proc.poll() is None:
                proc.terminate()
        for proc in live:
            self.stop(proc)


PROCESSES = Processes()


def free_ports(count):
    sockets = []
    try:
        for _ in range(count):
            s = socket.socket()
            sockets.append(s)
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def clean_env():
    """The environment without what etcd, etcdctl or metastore would take settings from."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("ETCD_", "ETCDCTL_", "METASTORE_"))}


def get_json(url):
    with urllib.request.urlopen(url, timeout=2) as answer:
        return json.load(answer)


class Target:
    """How to start one of the servers compared: a binary and its flags."""

    def __init__(self, label, binary, flags=()):
        self.label = label
        self.binary = binary
        self.flags = list(flags)


class Server:
    """One running server, started by us or (url) by someone else."""

    def __init__(self, label, url):
        self.label = label
        self.url = url
        self.proc = None
        self.dir = None

    @property
    def address(self):
        return self.url.split("://", 1)[-1].rstrip("/")


class Servers:
    """Starts groups of servers, one of each target, all with the same name and peer URL, hence the same ids."""

    def __init__(self, targets, keep=False):
        self.targets = targets
        self.keep = keep
        self.root = tempfile.mkdtemp(prefix="metastore-compat-")
        # Only advertised: a node alone never dials itself. One URL for all makes member and cluster ids comparable.
        self.peer_url = "http://127.0.0.1:2380"
        self._count = 0
        self._running = []

    def start(self, extra_flags=()):
        """Starts one server of each target, without waiting for them."""
        group = [self._start_one(t, extra_flags) for t in self.targets]
        return group

    def _start_one(self, target, extra_flags):
        self._count += 1
        server = Server(target.label, None)
        server.target, server.extra_flags = target, list(extra_flags)
        server.dir = os.path.join(self.root, "%03d-%s" % (self._count, target.label))
        os.mkdir(server.dir)
        self._spawn(server)
        self._running.append(server)
        return server

    def _spawn(self, server):
        client, peer = free_ports(2)
        server.url = "http://127.0.0.1:%d" % client
        data = os.path.join(server.dir, "data")
        shutil.rmtree(data, ignore_errors=True)
        args = [
            server.target.binary,
            "--name=compat",
            "--data-dir=" + data,
            "--listen-client-urls=" + server.url,
            "--advertise-client-urls=" + server.url,
            "--listen-peer-urls=http://127.0.0.1:%d" % peer,
            "--initial-advertise-peer-urls=" + self.peer_url,
            "--initial-cluster=compat=" + self.peer_url,
        ]
        args += server.extra_flags + server.target.flags
        with open(os.path.join(server.dir, "log"), "wb") as log:
            server.proc = PROCESSES.start(
                args, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=server.dir, env=clean_env()
            )

    def wait_ready(self, group):
        for server in group:
            for attempt in range(START_ATTEMPTS):
                if self._wait_one(server):
                    break
                # Somebody else may have taken a port between our choosing it and the server's.
                if "address already in use" not in self.log_tail(server).lower() or attempt + 1 == START_ATTEMPTS:
                    raise Failure("%s did not start; the end of its log:\n%s" % (server.label, self.log_tail(server)))
                PROCESSES.stop(server.proc)
                self._spawn(server)

    def _wait_one(self, server):
        deadline = time.monotonic() + READY_S
        decided_by = None
        while time.monotonic() < deadline:
            if server.proc.poll() is not None:
                return False
            try:
                if decided_by is None and get_json(server.url + "/health").get("health") == "true":
                    decided_by = time.monotonic() + DECIDED_S
                if decided_by is not None:
                    # The cluster and storage versions follow a moment after readiness.
                    version = get_json(server.url + "/version")
                    decided = version.get("etcdcluster") != "not_decided" and version.get("storage") != "unknown"
                    if decided or time.monotonic() > decided_by:
                        return True
            except (OSError, ValueError):
                pass
            time.sleep(0.03)
        return decided_by is not None

    def log_tail(self, server, size=2000):
        try:
            with open(os.path.join(server.dir, "log"), "rb") as log:
                return log.read()[-size:].decode("utf-8", "replace")
        except OSError as err:
            return str(err)

    def stop(self, group):
        """Stops the servers; says which of them had ended by themselves, which none may."""
        gone = [(s.label, s.proc.returncode, self.log_tail(s)) for s in group if s.proc and s.proc.poll() is not None]
        for server in group:
            if server.proc:
                server.proc.terminate()
        for server in group:
            if server.proc:
                PROCESSES.stop(server.proc)
            if not self.keep:
                shutil.rmtree(server.dir, ignore_errors=True)
            if server in self._running:
                self._running.remove(server)
        return gone

    def close(self):
        self.stop(list(self._running))
        if self.keep:
            print("kept: " + self.root)
        else:
            shutil.rmtree(self.root, ignore_errors=True)


class Attached:
    """Servers given by URL. They are used as they are, scenario after scenario, and never stopped."""

    def __init__(self, urls):
        self.servers = [Server(label, url if "://" in url else "http://" + url) for label, url in urls]

    def start(self, extra_flags=()):
        if extra_flags:
            raise Failure("needs its own server flags")
        return self.servers

    def wait_ready(self, group):
        pass

    def stop(self, group):
        return []

    def close(self):
        pass


def find_metastore(path):
    """--metastore, METASTORE_BIN, or the newest binary in cargo's target directory."""
    path = path or os.environ.get("METASTORE_BIN")
    if path:
        if not os.access(path, os.X_OK):
            raise Failure("%s is not a program" % path)
        return os.path.abspath(path)
    try:
        out = subprocess.run(
            ["cargo", "metadata", "--format-version=1", "--no-deps", "--offline"],
            cwd=os.path.dirname(HERE), capture_output=True, check=True, timeout=60,
        ).stdout
    except (OSError, subprocess.SubprocessError) as err:
        raise Failure("cargo metadata failed (%s); give --metastore PATH or METASTORE_BIN" % err)
    target = json.loads(out)["target_directory"]
    built = [os.path.join(target, profile, "metastore") for profile in ("release", "debug")]
    built = [p for p in built if os.access(p, os.X_OK)]
    if not built:
        raise Failure("no metastore binary in cargo's target directory: cargo build it, or give --metastore PATH")
    return max(built, key=os.path.getmtime)


def need(name):
    path = os.path.join(BIN, name)
    if not os.access(path, os.X_OK):
        raise Failure("compat/bin/%s is missing: run compat/build.sh" % name)
    return path


def add_arguments(parser):
    parser.add_argument("--metastore", metavar="PATH", help="the binary to compare (default: METASTORE_BIN, then cargo's newest)")
    parser.add_argument("--storage", default="rocksdb,memory", help="engines, comma separated (default: both)")
    parser.add_argument("--self", action="store_true", dest="compare_self", help="compare etcd with another etcd, to check this program")
    parser.add_argument("--b-flag", action="append", default=[], metavar="FLAG", help="one more flag for every server but the reference")
    parser.add_argument("--a", metavar="URL", help="a running reference; needs --b")
    parser.add_argument("--b", metavar="URL", help="a running server to compare; it must be at the same revision")
    parser.add_argument("--keep", action="store_true", help="keep data directories and logs")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only what has this in its name")
    parser.add_argument("--list", action="store_true", help="list the names and end")


def make_servers(options):
    if bool(options.a) != bool(options.b):
        raise Failure("--a and --b go together")
    if options.a:
        return Attached([("a", options.a), ("b", options.b)])
    etcd = need("etcd")
    targets = [Target("etcd", etcd)]
    if options.compare_self:
        targets.append(Target("etcd-b", etcd, options.b_flag))
    else:
        binary = find_metastore(options.metastore)
        for engine in options.storage.split(","):
            targets.append(Target(engine, binary, ["--storage=" + engine] + options.b_flag))
    return Servers(targets, options.keep)


def run(main):
    """Runs main with every exit leading through PROCESSES.stop_all."""

    def on_signal(number, _frame):
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGHUP, on_signal)
    try:
        code = main()
    except Failure as err:
        print("%s: %s" % (os.path.basename(sys.argv[0]), err), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # Whoever read our output went away; say nothing more to them.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    finally:
        PROCESSES.stop_all()
    sys.exit(code)
