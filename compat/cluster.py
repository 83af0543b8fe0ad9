#!/usr/bin/env python3
"""Gives a cluster of three real etcd members and one of three metastore members the same etcdctl commands, and compares
every answer: membership, endpoint status, health and hashkv, leader transfer, alarms, and what is refused, also with
members down.

Each scenario gets fresh clusters, so that a difference in one of them cannot spoil the next. In the answers, members go
by their names, members that were added by their order, addresses by whose they are, and Raft's numbers by how they
relate: equal terms, indexes and hashes within one answer must be equal in the other, and hashes of the history must be
the same number on both sides. Exit code: 0 all equal, 1 differences, 2 it could not run.
"""

import argparse
import concurrent.futures
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import compare
import harness

NAMES = ["m1", "m2", "m3"]
COMMAND_S = 30.0
READY_S = 60.0
# etcd changes members only once a member has been connected to a quorum for 5 s (its HealthInterval).
CONNECTED_S = 5.5
# Long enough for an election, and for the peers of a stopped member to notice: then each is asked until it agrees.
SETTLE_S = 20.0
START_ATTEMPTS = 3


class Cluster:
    """A cluster of one kind of server. Members keep their names, addresses and directories when they stop."""

    def __init__(self, target, root, flags):
        self.target, self.root, self.flags = target, root, list(flags)
        self.members, self.procs, self.ids, self.added = {}, {}, {}, {}
        self.urls = {}
        os.mkdir(root)

    # --- Processes

    def start(self):
        for attempt in range(START_ATTEMPTS):
            ports = harness.free_ports(2 * len(NAMES))
            self.members = {n: (ports[2 * i], ports[2 * i + 1]) for i, n in enumerate(NAMES)}
            self.initial = ",".join("%s=%s" % (n, self.peer(n)) for n in NAMES)
            for name in NAMES:
                shutil.rmtree(os.path.join(self.root, name), ignore_errors=True)
                self.spawn(name, self.initial, "new")
            if self.wait_ready(NAMES):
                break
            tails = "\n".join("%s:\n%s" % (n, self.log_tail(n)) for n in NAMES)
            self.stop_all()
            if "address already in use" not in tails.lower() or attempt + 1 == START_ATTEMPTS:
                raise harness.Failure("%s did not start; the ends of its logs:\n%s" % (self.target.label, tails))
        self.learn_ids()

    def client(self, name):
        return "http://127.0.0.1:%d" % self.members[name][0]

    def peer(self, name):
        return "http://127.0.0.1:%d" % self.members[name][1]

    def spawn(self, name, initial, state):
        directory = os.path.join(self.root, name)
        os.makedirs(directory, exist_ok=True)
        args = [
            self.target.binary,
            "--name=" + name,
            "--data-dir=" + os.path.join(directory, "data"),
            "--listen-client-urls=" + self.client(name),
            "--advertise-client-urls=" + self.client(name),
            "--listen-peer-urls=" + self.peer(name),
            "--initial-advertise-peer-urls=" + self.peer(name),
            "--initial-cluster=" + initial,
            "--initial-cluster-state=" + state,
            "--initial-cluster-token=compat",
        ]
        with open(os.path.join(directory, "log"), "ab") as log:
            self.procs[name] = harness.PROCESSES.start(
                args + self.flags + self.target.flags,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=directory, env=harness.clean_env(),
            )

    def stop(self, name):
        proc = self.procs.pop(name, None)
        if proc:
            harness.PROCESSES.stop(proc)

    def stop_all(self):
        for proc in self.procs.values():
            if proc.poll() is None:
                proc.terminate()
        for name in list(self.procs):
            self.stop(name)

    def log_tail(self, name, size=1500):
        try:
            with open(os.path.join(self.root, name, "log"), "rb") as log:
                return log.read()[-size:].decode("utf-8", "replace")
        except OSError as err:
            return str(err)

    def wait_ready(self, names, health="/health"):
        deadline = time.monotonic() + READY_S
        waiting = list(names)
        while waiting and time.monotonic() < deadline:
            if any(self.procs[n].poll() is not None for n in waiting):
                return False
            waiting = [n for n in waiting if not self.healthy(n, health)]
            time.sleep(0.05)
        return not waiting

    def healthy(self, name, health):
        try:
            return harness.get_json(self.client(name) + health).get("health") == "true"
        except (OSError, ValueError):
            return False

    # --- Who is who

    def ask(self, args, endpoints=None, timeout_s=10):
        argv = [harness.need("etcdctl"), "--endpoints=" + (endpoints or self.all_clients()), "-w", "json"]
        return harness.PROCESSES.run(argv + shlex.split(args), b"", timeout_s, env=harness.clean_env())

    def all_clients(self):
        return ",".join(self.client(n) for n in NAMES)

    def learn_ids(self):
        """Waits until the members know each other's names, then remembers which id is whose."""
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            code, out, _ = self.ask("member list", self.client(NAMES[0]))
            if code == 0:
                members = json.loads(out)["members"]
                if all(m.get("name") and m.get("clientURLs") for m in members) and len(members) == len(NAMES):
                    self.ids = {m["name"]: m["ID"] for m in members}
                    self.cluster_id = json.loads(out)["header"]["cluster_id"]
                    return
            time.sleep(0.1)
        raise harness.Failure("%s: its members do not appear in the list" % self.target.label)

    def wait_decided(self):
        """etcd's members report the storage version some seconds after they are ready."""
        deadline = time.monotonic() + SETTLE_S
        waiting = [n for n, proc in self.procs.items() if proc.poll() is None]
        while waiting and time.monotonic() < deadline:
            versions = [(n, harness.get_json(self.client(n) + "/version")) for n in waiting]
            waiting = [n for n, v in versions if v.get("storage") != v.get("etcdcluster")]
            time.sleep(0.1)

    def running(self):
        return [n for n in NAMES if n in self.procs and self.procs[n].poll() is None]

    def leader(self):
        """The leader's name, once all running members agree on one that runs."""
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline:
            seen = set()
            for name in self.running():
                code, out, _ = self.ask("endpoint status", self.client(name), 5)
                try:
                    seen.add(json.loads(out)[0]["Status"].get("leader", 0) if code == 0 else 0)
                except (ValueError, IndexError):
                    seen.add(0)
            if len(seen) == 1:
                for name in self.running():
                    if self.ids.get(name) in seen:
                        return name
            time.sleep(0.1)
        return None


# --- Commands ----------------------------------------------------------------------------------------------------


class Side:
    """One cluster under a scenario: fills its own ids and addresses into commands, and takes them out of answers."""

    def __init__(self, cluster, runner):
        self.cluster, self.runner = cluster, runner
        self.roles = {}

    def choose_roles(self):
        """`$leader`, `$f1`, `$f2`: who leads may differ between the sides, so commands name members by role."""
        leader = self.cluster.leader()
        followers = [n for n in NAMES if n != leader]
        self.roles = dict(zip(["leader", "f1", "f2"], [leader or NAMES[0]] + followers))

    def member(self, word):
        return self.roles.get(word, word)

    def fill(self, text):
        """`$leader` is a member's id, `@leader` its client address, `%leader` its peer URL; `$+1` the first added one."""

        def number(m):
            if m[1].startswith("+"):
                return "%x" % self.cluster.added.get(m[1], 0)
            return "%x" % self.cluster.ids.get(self.member(m[1]), 0)

        text = re.sub(r"\$(\+\d|\w+)", number, text)
        text = re.sub(r"@(leader|f1|f2|m\d)\b", lambda m: self.cluster.client(self.member(m[1])), text)
        return re.sub(r"%(leader|f1|f2|m\d)\b", lambda m: self.cluster.peer(self.member(m[1])), text)

    def run(self, line):
        words = shlex.split(self.fill(line))
        argv = [self.runner.etcdctl]
        if not any(w.startswith("--endpoints") for w in words):
            argv.append("--endpoints=" + self.cluster.client(self.roles["leader"]))
        code, out, err = harness.PROCESSES.run(argv + words, b"", COMMAND_S, env=harness.clean_env())
        out, err = out.decode("utf-8", "backslashreplace"), err.decode("utf-8", "backslashreplace")
        if words[:2] == ["member", "add"]:
            # Also where it failed: with a format that it does not know, etcdctl adds the member and then says so.
            self.remember_added()
        # What was said, not how often or in which order: endpoints are asked in the order of their ids, or at once.
        said = sorted(set(self.normalise(err).splitlines(True)))
        return compare.Answer(code, self.normalise(out), "".join(said))

    def remember_added(self):
        known = set(self.cluster.ids.values()) | set(self.cluster.added.values())
        code, out, _ = self.cluster.ask("member list --consistency=s", self.cluster.client(self.roles["leader"]))
        for member in json.loads(out)["members"] if code == 0 else []:
            if member["ID"] not in known:
                self.cluster.added["+%d" % (len(self.cluster.added) + 1)] = member["ID"]

    def normalise(self, text):
        c = self.cluster
        by_role = {name: role for role, name in self.roles.items()}
        ids = [(by_role.get(n, n), i) for n, i in c.ids.items()] + list(c.added.items()) + [("cluster", c.cluster_id)]
        for what, number in ids:
            # etcdctl pads ids that happen to be short.
            text = re.sub(r"(?:(?<= ) +)?\b(?:%d|%x)\b" % (number, number), "<%s>" % what, text)
        for name, (client, peer) in c.members.items():
            text = text.replace("127.0.0.1:%d" % client, "<client:%s>" % by_role.get(name, name))
            text = text.replace("127.0.0.1:%d" % peer, "<peer:%s>" % by_role.get(name, name))
        for name, role in by_role.items():
            text = re.sub(r"\b%s\b" % name, role, text)
        text = relate("".join(in_order(squeeze(text).splitlines(True))))
        for pattern, to in NOISE:
            text = pattern.sub(to, text)
        return text


# Raft's numbers differ between two clusters; what must not is which of them are equal within one answer.
RAFT = re.compile(r'("?(?:raft_term|raftTerm|RaftTerm|raftIndex|RaftIndex|raftAppliedIndex|RaftAppliedIndex)"? ?: ?)(\d+)')
NOISE = [
    (r'("(?:dbSize|dbSizeInUse|dbSizeQuota)":)\d+', r"\1<size>"),
    (r'^("(?:DBSize|DBSizeInUse|DBSizeQuota)" : )\d+', r"\1<size>"),
    # Sizes, and the percentage that one is of the other.
    (r"\b[\d.]+ (?:[kMG]?B)\b", "<size>"),
    (r"\b\d+%", "<percent>"),
    (r'("took":)"[^"]*"', r"\1<time>"),
    (r'^("Took" : )\S+', r"\1<time>"),
    (r"(took (?:= )?)[\d.]+\S*", r"\1<time>"),
    (r'("ts":)"[^"]*"', r"\1<time>"),
    (r"\b\d+(?:\.\d+)?(?:µs|ms|s)\b", "<time>"),
    (r"0x[0-9a-f]{6,}", "<pointer>"),
    # The client's end of a connection. (Peer URLs that nobody listens at have ports below 1024.)
    (r"127\.0\.0\.1:\d{4,5}", "<address>"),
    # Client and server see the end of the time allowed at about the same moment; either tells.
    (r"stream terminated by RST_STREAM with error code: CANCEL", "context deadline exceeded"),
    (r'"caller":"[^"]*"', '"caller":<place>'),
]
NOISE = [(re.compile(pattern, re.M), to) for pattern, to in NOISE]
STATUS_LINE = re.compile(r"^(http\S+, [^\n]*, )(\d+), (\d+), (\d+), ([^\n]*)$", re.M)
RAFT_COLUMNS = ("RAFT TERM", "RAFT INDEX", "RAFT APPLIED INDEX")


def relate(text):
    names = {}

    def name(number):
        return "<raft %d>" % names.setdefault(number, len(names) + 1)

    text = RAFT.sub(lambda m: m[1] + name(m[2]), text)
    text = STATUS_LINE.sub(lambda m: m[1] + ", ".join(name(n) for n in (m[2], m[3], m[4])) + ", " + m[5], text)
    lines, columns = [], []
    for line in text.splitlines(True):
        cells = line.split("│")
        if "ENDPOINT" in line:
            columns = [i for i, c in enumerate(cells) if c.strip() in RAFT_COLUMNS]
        for i in columns:
            if i < len(cells) and cells[i].strip().isdigit():
                cells[i] = " %s " % name(cells[i].strip())
        lines.append("│".join(cells))
    return "".join(lines)


def squeeze(text):
    """Columns of tables are as wide as their widest cell, which may be an id or a size."""
    text = re.sub(r"^[┌├└][─┬┼┴]+[┐┤┘]$", "──", text, flags=re.M)
    return re.sub(r"^│.*│$", lambda m: re.sub(r" {2,}", " ", m[0]), text, flags=re.M)


# A member in a simple list or a table.
MEMBER_LINE = re.compile(r"^(?:│ (?:<|http)|<[\w+]+>, |http://<client|memberID:)")


def in_order(lines):
    """Members are listed by id, or as they answer: here by role, whatever the format."""
    if len(lines) == 1 and lines[0][:1] in "[{":
        # Ids have become bare words.
        quoted = re.sub(r'(?<=[:,\[])(<[^<>"]*>)', r'"\1"', lines[0])
        try:
            return [json.dumps(order(json.loads(quoted)), separators=(",", ":")) + "\n"]
        except ValueError:
            return lines
    if any(line.startswith('"') for line in lines):
        blocks = re.split(r'(?m)^(?="ClusterID" : |"ID" : |"Endpoint" : )', "".join(lines))
        return sorted(b.strip("\n") + "\n" for b in blocks if b.strip("\n"))
    ordered, start = [], 0
    while start < len(lines):
        end = start
        while end < len(lines) and MEMBER_LINE.match(lines[end]):
            end += 1
        ordered += sorted(lines[start:end]) or [initial_cluster(lines[start])]
        start = max(end, start + 1)
    return ordered


def initial_cluster(line):
    """What `member add` prints for the new member's environment lists members, too."""
    return re.sub(r'^(ETCD_INITIAL_CLUSTER=")(.*)(")', lambda m: m[1] + ",".join(sorted(m[2].split(","))) + m[3], line)


def order(value):
    if isinstance(value, list):
        return sorted((order(v) for v in value), key=json.dumps)
    if isinstance(value, dict):
        return {k: order(v) for k, v in value.items()}
    return value


# --- Scenarios ---------------------------------------------------------------------------------------------------
#
# A line is an etcdctl command, sent to the leader unless it says otherwise, or one of:
#   all COMMAND         in every output format
#   stop ROLE, start ROLE, sleep S
#   connected           until changes of members are let through
#   decided             until all members report their versions
#   settle, lead        until all agree on a leader; lead chooses the roles anew
#   join NAME +N        starts a member that was added
#   until COMMAND       repeats it, up to a deadline, until it succeeds, then compares

FORMATS = ["simple", "json", "fields", "table"]
ALL = "--endpoints=@leader,@f1,@f2"

SCENARIOS = [
    ("lists", "member list, endpoint status, health and hashkv of all members, alarms", [], """
decided
all member list
all member list --consistency=s
member list --hex -w json
member list --hex -w fields
member list --endpoints=@f1
all endpoint status --cluster
all endpoint status --endpoints=@f1
all endpoint health --cluster
all endpoint hashkv --cluster
all alarm list
alarm list --endpoints=@f2
alarm disarm
"""),
    ("hashkv", "hashes after the same operations, before and after compaction", [], """
put a 1
put a 2
put b 1
del a
put c x --endpoints=@f1
put d y --endpoints=@f2
all endpoint hashkv --cluster
endpoint hashkv --cluster -w json --rev=1
endpoint hashkv --cluster -w json --rev=4
endpoint hashkv --cluster -w json --rev=50
compaction 4
endpoint hashkv --cluster -w json
endpoint hashkv --cluster -w json --rev=3
endpoint hashkv --cluster -w json --rev=5
compaction 6 --physical
sleep 1
all endpoint hashkv --cluster
put a 3
del c
endpoint hashkv --cluster -w json
endpoint hashkv --cluster -w json --rev=7
compaction 8 --physical --endpoints=@f1
del '' --from-key
endpoint hashkv --cluster -w json
put z z
endpoint hashkv --cluster -w json --rev=10
endpoint hashkv --cluster -w json
"""),
    ("kept-hashes", "hashes that etcd remembers: those of the revisions that were compacted to", [], """
put a 1
put a 2
put b 1
compaction 3 --physical
sleep 1
endpoint hashkv --cluster -w json --rev=3
endpoint hashkv --cluster -w json
"""),
    ("move-leader", "leadership handed over, and where that is refused", [], f"""
decided
move-leader $f1 --endpoints=@f1
move-leader $f1 --endpoints=@f2 -w json
move-leader 1234 {ALL}
move-leader nonsense {ALL}
move-leader
move-leader $leader {ALL}
move-leader $f1 {ALL}
lead
move-leader $f1 {ALL} -w json
lead
move-leader $f2 {ALL} -w fields
lead
move-leader $f2 {ALL} -w table
lead
all endpoint status --cluster
put k v --endpoints=@f1
get k --endpoints=@f2
"""),
    ("bad-members", "membership changes that are refused at once", [], """
connected
member add other --peer-urls=nonsense
member add other --peer-urls=http://127.0.0.1:9/path
member add other --peer-urls=http://127.0.0.1
member add other --peer-urls=ftp://127.0.0.1:9
member add other
member add
member add other --peer-urls=%f1
member add other --peer-urls=%f1 -w json
member add other --peer-urls=%leader --learner
member update 1234 --peer-urls=http://127.0.0.1:9
member update $f1 --peer-urls=%f2
member update $f1 --peer-urls=nonsense
member update $f1
member update nonsense --peer-urls=http://127.0.0.1:9
member remove 1234
member remove nonsense
member remove
member promote 1234
member promote $f1
member promote $leader -w json
member promote $f1 --endpoints=@f1
member promote 1234 --endpoints=@f1
all member list
"""),
    ("update", "other peer URLs, in every format, and back", [], """
connected
member update $f2 --peer-urls=http://localhost:1,%f2
member update $f2 --peer-urls=%f2,http://localhost:1 -w json
member update $f2 --peer-urls=%f2,http://127.0.0.1:1 -w fields --endpoints=@f1
member update $f2 --peer-urls=%f2 -w table
all member list
"""),
    ("learner", "a learner that is not started: added, not promoted, not led by, not in excess", [], f"""
connected
member add l --learner --peer-urls=http://127.0.0.1:1 -w json
all member list
member add l --learner --peer-urls=http://127.0.0.1:1
member add l2 --learner --peer-urls=http://127.0.0.1:2
member add l2 --learner --peer-urls=http://127.0.0.1:2 -w json --endpoints=@f1
member promote $+1
member promote $+1 -w json
member promote $+1 --endpoints=@f1
move-leader $+1 {ALL}
member update $+1 --peer-urls=http://127.0.0.1:3 -w json
member remove $+1 -w json
member remove $+1
member promote $+1
member update $+1 --peer-urls=http://127.0.0.1:3
all member list
"""),
    ("learner-formats", "adding and removing a learner in the other formats", [], """
connected
member add l --learner --peer-urls=http://127.0.0.1:2,http://127.0.0.1:1
member remove $+1
member add l --learner --peer-urls=http://127.0.0.1:1 -w fields
member remove $+2 -w fields
member add l --learner --peer-urls=http://127.0.0.1:1 -w table
member remove $+3 -w table
all member list
"""),
    ("voter", "a voter that is not started: others must wait for it", [], """
connected
member add v --peer-urls=http://127.0.0.1:1 -w json
member add w --peer-urls=http://127.0.0.1:2
sleep 1.1
member add w --learner --peer-urls=http://127.0.0.1:2 -w json
member add x --learner --peer-urls=http://127.0.0.1:3 -w json
member remove $f1
all member list
member remove $+1
member remove $+1
all member list
"""),
    ("join", "a learner starts, catches up, is promoted and removed", [], f"""
put k v
decided
connected
member add m4 --learner --peer-urls=%m4 -w json
join m4 +1
member list -w simple
put k w
get k --endpoints=@m4
until get k --endpoints=@m4 --consistency=s
put x y --endpoints=@m4
lease grant 60 --endpoints=@m4
member list --endpoints=@m4
alarm list --endpoints=@m4
endpoint hashkv --endpoints=@m4
endpoint health --endpoints=@m4
move-leader $+1 {ALL}
decided
endpoint status --endpoints=@m4 -w json
until member promote $+1
sleep 1
all member list
get k --endpoints=@m4
put x y --endpoints=@m4
all endpoint hashkv --cluster
all endpoint health --cluster
member promote $+1
connected
member remove $+1
member list -w simple
"""),
    ("one-down", "with one member of three down", [], """
connected
stop f2
settle
put k v
endpoint health --cluster --command-timeout=2s
endpoint hashkv --command-timeout=2s
member remove $f1
member remove $f1 -w json
sleep 6
member add other --peer-urls=http://127.0.0.1:1
member add other --learner --peer-urls=http://127.0.0.1:1
member update $f2 --peer-urls=http://127.0.0.1:3
member remove $f2
member list -w simple
"""),
    ("two-down", "without a quorum", [], """
decided
connected
stop f1
stop f2
sleep 6
member list --command-timeout=2s
member list --consistency=s -w simple
member add other --peer-urls=http://127.0.0.1:1 --command-timeout=2s
member remove $f1 --command-timeout=2s
put k v --command-timeout=2s
get k --consistency=s
move-leader $f1
endpoint status --endpoints=@leader -w json
endpoint status --endpoints=@leader -w simple
endpoint health --endpoints=@leader --command-timeout=2s
start f1
until endpoint health --endpoints=@leader
"""),
    ("just-started", "changes before a member has been connected for 5 s: one that was restarted counts from then on", [], """
connected
stop f1
start f1
until get k --endpoints=@f1
member add other --peer-urls=http://127.0.0.1:1
member add other --learner --peer-urls=http://127.0.0.1:1
member remove $f2
"""),
    ("not-strict", "a voter that is not started, without the strict check", ["--strict-reconfig-check=false"], """
member add v --peer-urls=http://127.0.0.1:1
member add w --peer-urls=http://127.0.0.1:2 -w json
member list -w simple
"""),
    ("more-learners", "as many learners as the flag allows", ["--max-learners=2"], """
connected
member add a --learner --peer-urls=http://127.0.0.1:1 -w json
member add b --learner --peer-urls=http://127.0.0.1:2 -w json
member add c --learner --peer-urls=http://127.0.0.1:3
member list -w simple
"""),
]


class Runner:
    def __init__(self, options):
        self.options = options
        self.etcdctl = options.etcdctl or harness.need("etcdctl")
        self.pool = concurrent.futures.ThreadPoolExecutor(max_workers=4)
        self.commands = 0

    def each(self, function, things):
        return list(self.pool.map(function, things))

    def run(self, text, clusters, report):
        sides = [Side(c, self) for c in clusters]
        self.each(lambda s: s.choose_roles(), sides)
        started = time.monotonic()
        commands = differences = 0
        for line in [l for l in text.strip().split("\n") if l]:
            verb, _, rest = line.partition(" ")
            if verb == "stop":
                self.each(lambda s: s.cluster.stop(s.member(rest)), sides)
            elif verb == "start":
                # From this, the main, thread: see harness.die_with_parent.
                for side in sides:
                    side.cluster.spawn(side.member(rest), side.cluster.initial, "new")
            elif verb == "join":
                name, _ = rest.split(" ")
                for side in sides:
                    c = side.cluster
                    c.spawn(name, "%s,%s=%s" % (c.initial, name, c.peer(name)), "existing")
                # A learner answers /health as the others do; not every server must serve all checks.
                self.each(lambda s: s.cluster.wait_ready([name], "/health?serializable=true"), sides)
            elif verb in ("settle", "lead"):
                self.each(lambda s: s.cluster.leader(), sides)
                if verb == "lead":
                    self.each(lambda s: s.choose_roles(), sides)
            elif verb == "decided":
                self.each(lambda s: s.cluster.wait_decided(), sides)
            elif verb == "connected":
                time.sleep(max(0.0, started + CONNECTED_S - time.monotonic()))
            elif verb == "sleep":
                time.sleep(float(rest))
            else:
                lines = [rest + " -w " + f for f in FORMATS] if verb == "all" else [rest if verb == "until" else line]
                for command in lines:
                    if verb == "until":
                        answers = self.each(lambda s: self.until(s, command), sides)
                    else:
                        answers = self.each(lambda s: s.run(command), sides)
                    commands += 1
                    differences += self.judge(command, answers, clusters, report)
        self.commands += commands
        return commands, differences

    def until(self, side, command):
        deadline = time.monotonic() + SETTLE_S
        while True:
            answer = side.run(command)
            if answer.code == 0 or time.monotonic() > deadline:
                return answer
            time.sleep(0.2)

    def judge(self, command, answers, clusters, report):
        wrong = [i for i in range(1, len(answers)) if answers[i] != answers[0]]
        if self.options.verbose:
            report("    %s\n        %s" % (command, answers[0].show()))
        if wrong:
            report("  differs: %s" % command)
            for i in [0] + wrong:
                report("    %s:\n        %s" % (clusters[i].target.label, answers[i].show()))
        return bool(wrong)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    parser.add_argument("--etcdctl", metavar="PATH", help="another etcdctl (default: compat/bin/etcdctl)")
    parser.add_argument("--verbose", action="store_true", help="print every command with the reference's answer")
    options = parser.parse_args()
    scenarios = [s for s in SCENARIOS if not options.only or any(o in s[0] for o in options.only)]
    if options.list:
        for name, about, flags, _ in scenarios:
            print("%-16s %s%s" % (name, about, " (%s)" % " ".join(flags) if flags else ""))
        return 0
    if not scenarios:
        raise harness.Failure("no scenario of that name")
    if options.a or options.b:
        raise harness.Failure("--a and --b are not for clusters: members are stopped and added here")

    servers = harness.make_servers(options)
    runner = Runner(options)
    root = tempfile.mkdtemp(prefix="metastore-clusters-")
    begin, different = time.monotonic(), []
    try:
        for number, (name, about, flags, text) in enumerate(scenarios):
            lines, started = [], time.monotonic()
            clusters = [Cluster(t, os.path.join(root, "%02d-%s" % (number, t.label)), flags) for t in servers.targets]
            try:
                for cluster in clusters:
                    cluster.start()
                    cluster.members["m4"] = tuple(harness.free_ports(2))
                commands, differences = runner.run(text, clusters, lines.append)
                for cluster in clusters:
                    for member in list(cluster.procs):
                        if cluster.procs[member].poll() is not None and not text_removes(text):
                            differences += 1
                            lines.append("  %s: %s ended by itself, exit %s; the end of its log:\n%s" % (
                                cluster.target.label, member, cluster.procs[member].returncode, cluster.log_tail(member)))
            finally:
                for cluster in clusters:
                    cluster.stop_all()
                    if not options.keep:
                        shutil.rmtree(cluster.root, ignore_errors=True)
            print("%s %s: %d commands, %d differ (%.1f s)" % (
                "DIFFERS " if differences else "equal   ", name, commands, differences, time.monotonic() - started))
            for line in lines:
                print(line)
            sys.stdout.flush()
            if differences:
                different.append(name)
    finally:
        servers.close()
        runner.pool.shutdown(wait=False)
        if options.keep:
            print("kept: " + root)
        else:
            shutil.rmtree(root, ignore_errors=True)
    print("%d scenarios, %d commands on each cluster, %d scenarios differ%s (%.0f s)" % (
        len(scenarios), runner.commands, len(different), ": " + " ".join(different) if different else "", time.monotonic() - begin))
    return 1 if different else 0


def text_removes(text):
    """A member that was removed stops by itself, and may."""
    return "member remove" in text


if __name__ == "__main__":
    harness.run(main)
