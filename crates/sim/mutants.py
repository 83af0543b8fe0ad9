#!/usr/bin/env python3
"""Plants bugs in the code that ships, and lets the simulator look for one after the other.

The bugs of the simulator's own drivers are switches (`metastore-sim --mutants`). These are edits of the source, made in a
copy of the workspace, so that the code that ships has no switch for them. All are built at once: in the copy, what stands
between two @ is whether the bug of that name is planted. Each edit names a text that must be there exactly once: when the
code changes, it fails loudly and is to be renewed.

usage: mutants.py COPY [--seeds N] [--build | --run] [NAME...]     COPY is a directory for the copy of the workspace

--build and --run do only the one or the other.
"""
import os, re, shutil, subprocess, sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MEMBER, FORWARD, VIEW, LESSOR = (f"crates/replica/src/{name}.rs" for name in ("member", "forward", "log_view", "lessor"))
MACHINE, WATCH, COMPACTION, AUTH, CHANGE = (
    f"crates/mvcc/src/{name}.rs" for name in ("machine", "watch", "compaction", "auth", "auth/change")
)

EDITS = [
    # Bugs that were there, found by the simulator, and mended.
    (MEMBER, "batch_append: false", "batch_append: @batch-append@"),
    (MEMBER, "if self.node.mut_store().drop_snapshot(to) {", "if !@snapshot-too-old-is-kept@ && self.node.mut_store().drop_snapshot(to) {"),
    (FORWARD, "(window.first, window.accepted) = (self.next, self.next - 1);", "if !@forgotten-batches-are-awaited@ { (window.first, window.accepted) = (self.next, self.next - 1); }"),
    (MEMBER, "self.node.raft.prs().get(self.config.id).is_none()", "!@leads-after-removing-itself@ && self.node.raft.prs().get(self.config.id).is_none()"),
    (MEMBER, "is_alone: is_only_voter && conf_state.learners.is_empty() && conf_state.learners_next.is_empty(),", "is_alone: is_only_voter && (@lone-voter-with-learners-reads-locally@ || conf_state.learners.is_empty() && conf_state.learners_next.is_empty()),"),
    (LESSOR, "lease.remaining_s > 0 || lease.checkpointing", "lease.remaining_s > 0 || (lease.checkpointing && !@checkpoint-under-way-is-overlooked@)"),
    (MEMBER, "let sync = ready.must_sync() || changes_members;", "let sync = ready.must_sync() || (changes_members && !@commit-of-member-change-not-durable@);"),
    (MEMBER, "                while let Some((_, bytes)) = self.unapplied.pop_front_if(|(last, _)| *last <= index) {\n                    self.unapplied_bytes -= bytes;", "                while !@dropped-entries-count-as-unapplied@ && let Some((_, bytes)) = self.unapplied.pop_front_if(|(last, _)| *last <= index) {\n                    self.unapplied_bytes -= bytes;"),
    (MEMBER, "self.snapshots.clear();", "if !@snapshots-outlive-a-leadership@ { self.snapshots.clear(); }"),
    (MEMBER, " || (self.part.is_only_voter && self.has_unwritten());", " || (!@lone-voter-campaigns-while-writing@ && self.part.is_only_voter && self.has_unwritten());"),
    (MEMBER, " && self.applied >= self.alone_from", " && (@reads-locally-as-soon-as-alone@ || self.applied >= self.alone_from)"),
    (MEMBER, "if self.persisted_term == self.node.raft.term {", "if @speaks-of-a-term-that-is-not-on-disk@ || self.persisted_term == self.node.raft.term {"),
    (LESSOR, "            self.revocations.insert(request, id);\n", "            self.revocations.insert(request, id);\n            if @the-end-of-a-lease-is-proposed-again-and-again@ { let lease = self.leases.get_mut(&id).expect(\"it is due\"); lease.due_ms = now_ms + 3_000; self.due.insert((lease.due_ms, id)); }\n"),
    # Bugs that were never there.
    (MEMBER, "messages.extend(ready.take_persisted_messages());", "let early = ready.take_persisted_messages(); if @acknowledges-before-persisted@ { self.send(early.clone(), effects); } messages.extend(early);"),
    (MEMBER, "if front.number > number && front.writes {", "if front.number > number + u64::from(@persists-out-of-turn@) && front.writes {"),
    (MEMBER, "if carried_out {", "if carried_out || @follows-refused-changes@ {"),
    (FORWARD, "&& batch.term < term", "&& batch.term < term + u64::from(@proposes-again-too-early@)"),
    (FORWARD, "if number == *last + 1 {", "if number == *last + 1 || (@accepts-batches-twice@ && number == *last) || (@accepts-batches-with-gaps@ && number > *last) {"),
    (FORWARD, "if self.term == 0 || forward.term != self.term {", "if self.term == 0 || (!@accepts-batches-of-any-term@ && forward.term != self.term) {"),
    (MEMBER, "proposal.leader_term == 0 || proposal.leader_term == leading;", "@revokes-under-any-leader@ || proposal.leader_term == 0 || proposal.leader_term == leading;"),
    (MEMBER, "self.reads.splice(0..0, round.reads);", "if @lost-reads-are-not-repeated@ { drop(round.reads); } else { self.reads.splice(0..0, round.reads); }"),
    (MEMBER, "while let Some(waiting) = self.proposals.front()\n            && is_late(waiting.since_tick)", "while let Some(waiting) = self.proposals.front()\n            && !@late-proposals-are-not-refused@\n            && is_late(waiting.since_tick)"),
    (MEMBER, "            .is_ok_and(|term| term == raft.term);", "            .is_ok_and(|term| term == raft.term || @term-begins-too-early@);"),
    (VIEW, "    pub(crate) fn install(&mut self, index: u64, term: u64) {\n        self.tail.clear();", "    pub(crate) fn install(&mut self, index: u64, term: u64) {\n        if !@tail-survives-a-snapshot@ { self.tail.clear(); }"),
    (MEMBER, "if self.node.raft.has_pending_conf() {", "if !@changes-of-members-do-not-wait@ && self.node.raft.has_pending_conf() {"),
    (COMPACTION, "self.engine.compact_hint(keys::REV, dropped);", "self.engine.compact_hint(keys::REV, dropped); if @digest-counts-what-is-on-disk@ { self.state.digest = self.state.digest.wrapping_add(job.target as u64); }"),
    (MEMBER, "read_only_option: ReadOnlyOption::Safe,", "read_only_option: if @reads-are-answered-by-a-former-leader@ { ReadOnlyOption::LeaseBased } else { ReadOnlyOption::Safe },"),
    (LESSOR, "lease.ends_ms = now_ms.saturating_add(seconds(left_s)).saturating_add(extension_ms);", "lease.ends_ms = if @leases-keep-their-old-end@ { lease.ends_ms.max(now_ms.saturating_add(extension_ms)) } else { now_ms.saturating_add(seconds(left_s)).saturating_add(extension_ms) };"),
    (LESSOR, "lease.ends_ms = now_ms.saturating_add(seconds(lease.ttl_s));", "lease.ends_ms = if @keep-alive-adds-nothing@ { lease.ends_ms.max(now_ms) } else { now_ms.saturating_add(seconds(lease.ttl_s)) };"),
    (MACHINE, "        self.cache.clear();\n", "        if !@record-cache-survives-a-snapshot@ { self.cache.clear(); }\n"),
    (MACHINE, "        self.leases = found.leases;\n", "        if !@leases-survive-a-snapshot@ { self.leases = found.leases; }\n"),
    (MACHINE, "        self.rare = found.rare;\n", "        if !@members-survive-a-snapshot@ { self.rare = found.rare; }\n"),
    (MACHINE, "        self.auth = found.auth;\n", "        if !@users-survive-a-snapshot@ { self.auth = found.auth; }\n"),
    (MACHINE, "self.job = Job::resume(found.compacted_physically, &found.state, found.log_bytes);", "self.job = if @compaction-is-not-resumed-after-a-snapshot@ { None } else { Job::resume(found.compacted_physically, &found.state, found.log_bytes) };"),
    (MACHINE, "self.hub.reader().switch(engine.clone(), published.clone());", "if !@readers-keep-the-old-engine@ { self.hub.reader().switch(engine.clone(), published.clone()); }"),
    (MACHINE, "        step.overlay.cur.insert(key, record);", "        if !@overlay-forgets@ || record.version % 7 != 0 { step.overlay.cur.insert(key, record); }"),
    (WATCH, "watcher.next = watcher.next.max(from);", "watcher.next = watcher.next.max(from + i64::from(@watchers-lose-a-revision-when-behind@));"),
    (MACHINE, "if self.auth.is_enabled()\n            && let Err", "if !@permissions-are-not-checked-when-applied@\n            && self.auth.is_enabled()\n            && let Err"),
    (AUTH, "if caller.revision < self.revision {", "if caller.revision + u64::from(@an-old-auth-revision-counts@) < self.revision {"),
    (CHANGE, "if entry.user.roles.iter().any(|of_user| of_user.as_bytes() == name) {", "if !@users-do-not-hear-of-a-changed-role@ && entry.user.roles.iter().any(|of_user| of_user.as_bytes() == name) {"),
    (MACHINE, "if !matches!(limits, Limits::None) && self.leases.contains_key(&lease) {", "if !@keys-of-a-lease-are-not-looked-at@ && !matches!(limits, Limits::None) && self.leases.contains_key(&lease) {"),
    (COMPACTION, "self.log_bytes = self.log_bytes - job.log_bytes + job.kept_bytes;", "self.log_bytes = self.log_bytes - job.log_bytes + job.kept_bytes + u64::from(@compaction-miscounts@);"),
]

PLACE = re.compile("@([a-z-]+)@")
NAMES = [name for _, _, new in EDITS for name in PLACE.findall(new)]

SWITCH = """
/// Whether a bug is planted.
pub fn is_planted(bug: &str) -> bool {
    static PLANTED: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    PLANTED.get_or_init(|| std::env::var("PLANTED_BUG").unwrap_or_default()) == bug
}
"""


def plant(copy):
    """Makes the edits. Returns how many could not be made."""
    missed, texts = 0, {"crates/api/src/lib.rs": None}
    texts.update((path, None) for path, _, _ in EDITS)
    for path in texts:
        with open(os.path.join(copy, path)) as source:
            texts[path] = source.read()
    texts["crates/api/src/lib.rs"] += SWITCH
    for path, old, new in EDITS:
        if texts[path].count(old) != 1:
            print(f"{PLACE.findall(new)}: the text to change is there {texts[path].count(old)} times; renew this edit")
            missed += 1
            continue
        texts[path] = texts[path].replace(old, PLACE.sub(r'api::is_planted("\1")', new))
    for path, text in texts.items():
        with open(os.path.join(copy, path), "w") as source:
            source.write(text)
    return missed


def main():
    arguments = sys.argv[1:]
    if not arguments:
        sys.exit(__doc__)
    copy, arguments = arguments[0], arguments[1:]
    seeds, builds, runs, wanted = "5000", True, True, []
    while arguments:
        argument = arguments.pop(0)
        if argument == "--seeds":
            seeds = arguments.pop(0)
        elif argument == "--build":
            runs = False
        elif argument == "--run":
            builds = False
        elif argument in NAMES:
            wanted.append(argument)
        else:
            sys.exit(f"there is no bug {argument}")
    missed = 0
    if builds:
        shutil.copytree(ROOT, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("target", ".git"))
        missed += plant(copy)
        subprocess.run(["cargo", "build", "--locked", "--release", "--workspace", "--bin", "metastore-sim"], cwd=copy, check=True)
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(copy, "target"))
    for name in wanted or NAMES if runs else []:
        binary = os.path.join(target, "release", "metastore-sim")
        ran = subprocess.run([binary, "--seeds", seeds], env={**os.environ, "PLANTED_BUG": name}, text=True, stdout=subprocess.PIPE)
        found = [line for line in ran.stdout.splitlines() if line.startswith("seed ")]
        missed += not found
        print(f"{name}: {found[0][:200] if found else f'NOT FOUND in {seeds} seeds'}", flush=True)
    sys.exit(min(missed, 1))


if __name__ == "__main__":
    main()
