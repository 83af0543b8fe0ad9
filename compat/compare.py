#!/usr/bin/env python3
"""Runs the same etcdctl commands against a real etcd and against metastore, and compares every answer.

The commands are in scenarios/*.txt; scenarios/README.md describes their format. Every scenario gets fresh servers, so
that a difference in one of them cannot spoil the next. Exit code: 0 all equal, 1 differences, 2 it could not run.
"""

import argparse
import concurrent.futures
import glob
import os
import re
import shlex
import subprocess
import sys
import threading
import time

import harness

COMMAND_S = 30.0
WATCH_START_S = 10.0
# A watcher is read until all of them have as many lines and nothing came for this long, or until the time is up.
QUIET_S = 0.4
WAIT_S = 6.0


# --- Scenarios ---------------------------------------------------------------------------------------------------


class Step:
    def __init__(self, kind, where, **fields):
        self.kind = kind
        self.where = where
        self.stdin = None
        self.__dict__.update(fields)


class Scenario:
    def __init__(self, name, about, tags, flags):
        self.name, self.about, self.tags, self.flags = name, about, tags, flags
        self.steps = []


HEAD = re.compile(r"^== (?P<name>[\w.-]+)(?P<tags>(?: \[[^\]]*\])*): (?P<about>.+)$")
LINE = re.compile(
    r"^(?:"
    r"(?P<lease>\w+) = (?P<grant>lease grant .*)"
    r"|(?P<back>\w+) & (?P<back_args>.*)"
    r"|(?P<live>\w+) live (?P<live_args>watch .*)"
    r"|(?P<tell>\w+) tell (?P<tell_line>.*)"
    r"|(?P<wait>\w+) wait (?P<lines>\d+)(?P<unordered> unordered)?"
    r"|sleep (?P<sleep>[\d.]+)"
    r"|(?P<command>.*)"
    r")$"
)


def parse(path):
    scenarios, step = [], None
    with open(path, encoding="utf-8") as f:
        lines = f.read().split("\n")
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        where = "%s:%d" % (os.path.basename(path), number)
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("=="):
            head = HEAD.match(line)
            if not head:
                raise harness.Failure("%s: not a scenario head: %s" % (where, line))
            tags = re.findall(r"\[([^\]]*)\]", head["tags"])
            flags = [t for t in tags if t.startswith("--")]
            scenarios.append(Scenario(head["name"], head["about"], [t for t in tags if t not in flags], flags))
            continue
        if not scenarios:
            raise harness.Failure("%s: a command before the first scenario" % where)
        stdin = None
        if line.endswith(" <<"):
            line, stdin = line[:-3], []
            while number < len(lines) and lines[number] != ".":
                stdin.append(lines[number])
                number += 1
            number += 1
        elif re.search(r" < \d+\*\S+$", line):
            line, size = line.rsplit(" < ", 1)
            count, unit = size.split("*", 1)
            stdin = (unit * (int(count) // len(unit) + 1))[: int(count)]
        m = LINE.match(line.strip())
        if m["lease"]:
            step = Step("grant", where, args=m["grant"], name=m["lease"])
        elif m["back"]:
            step = Step("background", where, args=m["back_args"], name=m["back"])
        elif m["live"]:
            step = Step("live", where, args=m["live_args"], name=m["live"])
        elif m["tell"]:
            step = Step("tell", where, args=m["tell_line"], name=m["tell"])
        elif m["wait"]:
            step = Step("wait", where, name=m["wait"], lines=int(m["lines"]), ordered=not m["unordered"])
        elif m["sleep"]:
            step = Step("sleep", where, seconds=float(m["sleep"]))
        else:
            step = Step("command", where, args=m["command"])
        step.line = line.strip()
        step.stdin = expand(stdin) if isinstance(stdin, list) else stdin
        scenarios[-1].steps.append(step)
    return scenarios


def expand(lines):
    """Text given by heredoc; a line `*3 put k%d v` stands for three, with %d from 1 to 3."""
    out = []
    for line in lines:
        m = re.match(r"^\*(\d+) (.*)$", line)
        if m:
            out += [m[2].replace("%d", str(i + 1)) for i in range(int(m[1]))]
        else:
            out.append(line)
    # One empty line more, so that a txn without failure requests needs none.
    return "\n".join(out) + "\n\n"


# --- Answers -----------------------------------------------------------------------------------------------------

# What may differ between two servers that behave alike: identity, Raft's numbers, time, sizes on disk.
NOISE = [
    (r'("(?:cluster_id|member_id|leader|ID)":)\d{12,}', r"\1<id>"),
    (r'("(?:cluster_id|member_id|ID)":")[0-9a-f]{12,}', r"\1<id>"),
    (r'("(?:raft_term|raftTerm|raftIndex|raftAppliedIndex)":)\d+', r"\1<raft>"),
    (r'("(?:dbSize|dbSizeInUse|dbSizeQuota)":)\d+', r"\1<size>"),
    (r'^("(?:ClusterID|MemberID|Leader|ID)" : )\d{12,}', r"\1<id>"),
    (r'^("(?:RaftTerm|RaftIndex|RaftAppliedIndex)" : )\d+', r"\1<raft>"),
    (r'^("(?:DBSize|DBSizeInUse|DBSizeQuota)" : )\d+', r"\1<size>"),
    (r'("took":)"[^"]*"', r"\1<time>"),
    (r'^("Took" : )\S+', r"\1<time>"),
    (r"(took (?:= )?)[\d.]+\S*", r"\1<time>"),
    (r"(?<=/)[0-9a-f]{15,16}$", "<lease>"),
    (r'("ts":)"[^"]*"', r"\1<time>"),
    (r"0x[0-9a-f]{6,}|client-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", "<pointer>"),
    (r"(?:127\.0\.0\.1|localhost|\[::1\]):\d+", "<address>"),
    (r"^[0-9a-f]{12,16}, started, ", "<id>, started, "),
]
NOISE = [(re.compile(pattern, re.M), to) for pattern, to in NOISE]
ID_NOISE = {i for i, (pattern, to) in enumerate(NOISE) if "<id>" in to}

# Remaining seconds of a lease: close enough to what was granted is equal.
TTL = re.compile(r'("ttl":)(\d+)(,"granted-ttl":(\d+))')
TTL_SIMPLE = re.compile(r"(granted with TTL\((\d+)s\), remaining\()(\d+)(?=s\))")
TTL_FIELDS = re.compile(r'^("TTL" : )(\d+)(\n"GrantedTTL" : (\d+))', re.M)
TTL_SLACK_S = 10

# The keys of a lease: etcd lists them in no order (that of a Go map).
LEASE_KEYS = re.compile(r'("granted-ttl":\d+,"keys":\[)([^\]]*)(?=\])')
LEASE_KEYS_SIMPLE = re.compile(r"(attached keys\(\[)([^\]]*)(?=\]\))")
LEASE_KEYS_FIELDS = re.compile(r'(^"GrantedTTL" : \d+\n)((?:"Key" : .*\n)+)', re.M)


GRANTED = re.compile(r'"ID"(?: : |:)(\d+)|^lease ([0-9a-f]+) granted', re.M)


def about(granted, remaining):
    return "<about granted>" if int(granted) - TTL_SLACK_S <= int(remaining) <= int(granted) else remaining


def normalise(text, leases, exact_ids):
    for name, number in leases.items():
        text = re.sub(r"\b%d\b" % number, "<%s>" % name, text)
        text = re.sub(r"\b0{0,16}%x\b" % number, "<%s hex>" % name, text)
    text = TTL.sub(lambda m: m[1] + about(m[4], m[2]) + m[3], text)
    text = TTL_SIMPLE.sub(lambda m: m[1] + about(m[2], m[3]), text)
    text = TTL_FIELDS.sub(lambda m: m[1] + about(m[4], m[2]) + m[3], text)
    text = LEASE_KEYS.sub(lambda m: m[1] + ",".join(sorted(m[2].split(","))), text)
    text = LEASE_KEYS_SIMPLE.sub(lambda m: m[1] + " ".join(sorted(m[2].split(" "))), text)
    text = LEASE_KEYS_FIELDS.sub(lambda m: m[1] + "".join(sorted(m[2].splitlines(True))), text)
    for i, (pattern, to) in enumerate(NOISE):
        if not (exact_ids and i in ID_NOISE):
            text = pattern.sub(to, text)
    return text


class Answer:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def __eq__(self, other):
        return (self.code, self.out, self.err) == (other.code, other.out, other.err)

    def show(self, than=None):
        """The answer as text; of one too long to print, the part around where it first differs from another."""
        parts = ["exit %s" % self.code]
        for name, text, other in (("stdout", self.out, than and than.out), ("stderr", self.err, than and than.err)):
            if text:
                parts.append("%s: %s" % (name, cut(text, other).rstrip("\n").replace("\n", "\n" + " " * 16)))
        return "\n        ".join(parts)


def cut(text, other, limit=4000, before=200):
    if len(text) <= limit:
        return text
    start = 0
    if other is not None and text != other:
        start = max(0, len(os.path.commonprefix([text, other])) - before)
    return "%s%s… (%d characters, %d lines)" % (
        "from character %d: …" % start if start else "", text[start : start + limit // 4], len(text), text.count("\n"))


# --- Running -----------------------------------------------------------------------------------------------------


class Watcher:
    """A command in the background, with its output collected as it comes."""

    def __init__(self, args, env, interactive):
        self.proc = harness.PROCESSES.start(
            args, env=env, stdin=subprocess.PIPE if interactive else subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._lines = {"out": [], "err": []}
        self._threads = [
            threading.Thread(target=self._read, args=(name, pipe), daemon=True)
            for name, pipe in (("out", self.proc.stdout), ("err", self.proc.stderr))
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, name, pipe):
        for line in pipe:
            with self._lock:
                self._lines[name].append(line.decode("utf-8", "backslashreplace"))
                self._last = time.monotonic()

    def tell(self, line):
        try:
            self.proc.stdin.write(line.encode() + b"\n")
            self.proc.stdin.flush()
        except OSError:
            pass

    def count(self):
        with self._lock:
            return len(self._lines["out"])

    def quiet(self, seconds):
        with self._lock:
            return time.monotonic() - self._last >= seconds

    def ended(self):
        return self.proc.poll() is not None

    def take(self):
        with self._lock:
            out, err = "".join(self._lines["out"]), "".join(self._lines["err"])
            self._lines = {"out": [], "err": []}
        return out, err

    def stop(self):
        harness.PROCESSES.stop(self.proc, grace_s=2)
        for thread in self._threads:
            thread.join(2)
        for pipe in (self.proc.stdin, self.proc.stdout, self.proc.stderr):
            if pipe:
                try:
                    pipe.close()
                except OSError:
                    pass


class Runner:
    def __init__(self, options):
        self.options = options
        self.etcdctl = options.etcdctl or harness.need("etcdctl")
        self.env = harness.clean_env()
        self.pool = concurrent.futures.ThreadPoolExecutor(max_workers=4)
        self.commands = 0

    def each(self, function, things):
        return list(self.pool.map(function, things))

    def argv(self, server, args):
        words = [w.encode("utf-8").replace(b"${ff}", b"\xff") for w in shlex.split(args)]
        head = [self.etcdctl]
        if not any(w.startswith(b"--endpoints") for w in words):
            head.append("--endpoints=" + server.address)
        if not any(w == b"-w" or w.startswith((b"-w=", b"--write-out")) for w in words):
            head += ["-w", "json"]
        return [os.fsencode(w) for w in head] + words

    def etcdctl_run(self, server, args, stdin):
        code, out, err = harness.PROCESSES.run(
            self.argv(server, args), (stdin or "").encode(), COMMAND_S, env=self.env
        )
        return code, out.decode("utf-8", "backslashreplace"), err.decode("utf-8", "backslashreplace")

    def run(self, scenario, servers, report):
        """Returns how many commands ran and how many steps differed."""
        state = {s: Vars(self.options.exact_ids) for s in servers}
        revisions = self.each(self.revision, servers)
        if len(set(revisions)) > 1:
            raise harness.Failure("the servers are at different revisions: %s" % revisions)
        for s in servers:
            state[s].base = revisions[0]
        commands = differences = 0
        try:
            for step in scenario.steps:
                commands += step.kind in ("command", "grant", "background", "live")
                answers = getattr(self, "do_" + step.kind)(step, servers, state)
                if answers is None:
                    continue
                wrong = [i for i in range(1, len(answers)) if answers[i] != answers[0]]
                if self.options.verbose:
                    report("    %s  %s\n        %s" % (step.where, step.line, answers[0].show()))
                if wrong:
                    differences += 1
                    report("  differs: %s  %s" % (step.where, step.line))
                    for i in [0] + wrong:
                        than = answers[wrong[0]] if i == 0 else answers[0]
                        report("    %s:\n        %s" % (servers[i].label, answers[i].show(than)))
        finally:
            for s in servers:
                for watcher in state[s].watchers.values():
                    watcher.stop()
        self.commands += commands
        return commands, differences

    def revision(self, server):
        code, out, err = self.etcdctl_run(server, "get compat-revision", None)
        m = re.search(r'"revision":(\d+)', out)
        if code != 0 or not m:
            raise harness.Failure("%s does not answer: exit %s, %s" % (server.label, code, err.strip()))
        return int(m[1])

    def clear(self, server):
        """Before a scenario on servers that are not fresh: no keys, no leases."""
        self.etcdctl_run(server, "del '' --from-key", None)
        _, out, _ = self.etcdctl_run(server, "lease list -w simple", None)
        for lease in re.findall(r"^[0-9a-f]{1,16}$", out, re.M):
            self.etcdctl_run(server, "lease revoke " + lease, None)

    def do_command(self, step, servers, state):
        def one(server):
            v = state[server]
            return v.answer(*self.etcdctl_run(server, v.fill(step.args), v.fill(step.stdin)))

        return self.each(one, servers)

    def do_grant(self, step, servers, state):
        def one(server):
            v = state[server]
            code, out, err = self.etcdctl_run(server, v.fill(step.args), None)
            m = GRANTED.search(out)
            if m:
                v.leases[step.name] = int(m[1]) if m[1] else int(m[2], 16)
            return v.answer(code, out, err)

        return self.each(one, servers)

    def do_sleep(self, step, servers, state):
        time.sleep(step.seconds)

    # Background commands are started from this, the main, thread: see harness.die_with_parent.
    def do_background(self, step, servers, state):
        for server in servers:
            v = state[server]
            v.watchers[step.name] = Watcher(self.argv(server, v.fill(step.args)), self.env, False)

    def do_live(self, step, servers, state):
        """A watcher that certainly runs before the next command: `watch -i`, asked for progress until it tells some."""
        for server in servers:
            v = state[server]
            # Who asks is the program's business, not the watch's.
            args, user = re.subn(r" --user (\S+)", "", step.args), re.search(r" --user \S+", step.args)
            command = "watch -i" + (user[0] if user else "")
            v.watchers[step.name] = watcher = Watcher(self.argv(server, command), self.env, True)
            watcher.tell(v.fill(args[0]))
        deadline = time.monotonic() + WATCH_START_S
        waiting = list(servers)
        while waiting and time.monotonic() < deadline:
            for server in waiting:
                state[server].watchers[step.name].tell("progress")
            time.sleep(0.15)
            waiting = [
                s for s in waiting
                if not (state[s].watchers[step.name].count() or state[s].watchers[step.name].ended())
            ]
        time.sleep(0.15)
        answers = []
        for server in servers:
            watcher = state[server].watchers[step.name]
            out, err = watcher.take()
            answers.append(Answer("none" if not watcher.ended() else watcher.proc.returncode, "progress" if out else "", err))
        return answers

    def do_tell(self, step, servers, state):
        for server in servers:
            state[server].watchers[step.name].tell(state[server].fill(step.args))

    def do_wait(self, step, servers, state):
        watchers = [state[s].watchers[step.name] for s in servers]
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            counts = {w.count() for w in watchers}
            enough = len(counts) == 1 and min(counts) >= step.lines
            if (enough or all(w.ended() for w in watchers)) and all(w.quiet(QUIET_S) for w in watchers):
                break
            time.sleep(0.03)
        answers = []
        for server, watcher in zip(servers, watchers):
            out, err = watcher.take()
            lines = out.count("\n")
            if server is servers[0] and lines < step.lines:
                err += "the scenario expects %d lines or more, the reference gave %d\n" % (step.lines, lines)
            if not step.ordered:
                out = "".join(sorted(out.splitlines(True)))
            answers.append(state[server].answer(watcher.proc.returncode if watcher.ended() else "none", out, err))
        return answers


class Vars:
    """What one server's commands refer to by name: its leases, its watchers, and the revision it began at."""

    def __init__(self, exact_ids):
        self.leases, self.watchers, self.base, self.exact_ids = {}, {}, 1, exact_ids

    def fill(self, text):
        """`@N` is revision N of a fresh server; on one that is not fresh, as many after the scenario's start."""
        if text is None:
            return None
        text = re.sub(r"\$(\w+)", lambda m: "%x" % self.leases.get(m[1], 0), text)
        return re.sub(r"(?<![\w/])@(\d+)", lambda m: str(self.base - 1 + int(m[1])), text)

    def answer(self, code, out, err):
        return Answer(code, normalise(out, self.leases, self.exact_ids), normalise(err, self.leases, self.exact_ids))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    parser.add_argument("--etcdctl", metavar="PATH", help="another etcdctl, such as Debian's (default: compat/bin/etcdctl)")
    parser.add_argument("--later", action="store_true", help="also the scenarios marked [later]: services that come later")
    parser.add_argument("--exact-ids", action="store_true", help="compare cluster and member ids too (fresh servers share one peer URL)")
    parser.add_argument("--verbose", action="store_true", help="print every command with the reference's answer")
    options = parser.parse_args()

    scenarios = []
    for path in sorted(glob.glob(os.path.join(harness.HERE, "scenarios", "*.txt"))):
        scenarios += parse(path)
    names = [s.name for s in scenarios]
    if len(set(names)) != len(names):
        raise harness.Failure("two scenarios of one name: %s" % sorted(n for n in set(names) if names.count(n) > 1))
    if options.only:
        scenarios = [s for s in scenarios if any(o in s.name for o in options.only)]
    elif not options.later:
        scenarios = [s for s in scenarios if "later" not in s.tags]
    if options.list:
        for s in scenarios:
            print("%-28s %3d  %s" % (s.name, len(s.steps), s.about))
        return 0
    if not scenarios:
        raise harness.Failure("no scenario of that name")

    servers = harness.make_servers(options)
    runner = Runner(options)
    started = time.monotonic()
    different, skipped = [], 0
    try:
        fresh = not isinstance(servers, harness.Attached)
        following = servers.start(scenarios[0].flags) if fresh else None
        for i, scenario in enumerate(scenarios):
            if not fresh and scenario.flags:
                print("skipped  %s: it needs its own server flags" % scenario.name)
                skipped += 1
                continue
            group = following if fresh else servers.start()
            following = None
            servers.wait_ready(group)
            if fresh and i + 1 < len(scenarios):
                following = servers.start(scenarios[i + 1].flags)
            if not fresh:
                runner.each(runner.clear, group)
            lines = []
            begin = time.monotonic()
            commands, differences = runner.run(scenario, group, lines.append)
            for label, code, log in servers.stop(group):
                differences += 1
                lines.append("  %s ended by itself, exit %s; the end of its log:\n%s" % (label, code, log))
            verdict = "equal   " if not differences else "DIFFERS "
            print("%s %s: %d commands, %d differ (%.1f s)" % (verdict, scenario.name, commands, differences, time.monotonic() - begin))
            for line in lines:
                print(line)
            sys.stdout.flush()
            if differences:
                different.append(scenario.name)
    finally:
        servers.close()
        runner.pool.shutdown(wait=False)
    print("%d scenarios, %d commands on each server, %d scenarios differ%s (%.0f s)" % (
        len(scenarios) - skipped, runner.commands, len(different), ": " + " ".join(different) if different else "", time.monotonic() - started))
    return 1 if different else 0


if __name__ == "__main__":
    harness.run(main)
