#!/usr/bin/env python3
"""Plants bugs in the code that ships, one at a time, and lets the simulator look for each.

The bugs of the simulator's own drivers are switches (`metastore-sim --mutants`). These are edits of the source, made in a
copy of the workspace, so that the code that ships has no switch for them. Each names a text that must be there exactly
once: when the code changes, the edit fails loudly and is to be renewed.

usage: mutants.py COPY [--seeds N] [NAME...]     COPY is a directory for the copy of the workspace
"""
import os, shutil, subprocess, sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MEMBER, FORWARD, VIEW, LESSOR = (f"crates/replica/src/{name}.rs" for name in ("member", "forward", "log_view", "lessor"))
MACHINE, WATCH, COMPACTION = (f"crates/mvcc/src/{name}.rs" for name in ("machine", "watch", "compaction"))

MUTANTS = [
    # Bugs that were there, found by the simulator, and mended.
    ("batch-append", MEMBER, "batch_append: false", "batch_append: true"),
    ("snapshot-too-old-is-kept", MEMBER, "if self.node.mut_store().drop_snapshot(to) {", "if false {"),
    ("forgotten-batches-are-awaited", FORWARD, "(window.first, window.accepted) = (self.next, self.next - 1);", "let _ = window;"),
    ("leads-after-removing-itself", MEMBER, "self.node.raft.prs().get(self.config.id).is_none()", "false"),
    ("lone-voter-with-learners-reads-locally", MEMBER, "is_alone: is_only_voter && conf_state.learners.is_empty() && conf_state.learners_next.is_empty(),", "is_alone: is_only_voter,"),
    ("checkpoint-under-way-is-overlooked", LESSOR, "lease.remaining_s > 0 || lease.checkpointing", "lease.remaining_s > 0"),
    ("commit-of-member-change-not-durable", MEMBER, "let sync = ready.must_sync() || changes_members;", "let sync = ready.must_sync();"),
    ("dropped-entries-count-as-unapplied", MEMBER, "                while let Some((_, bytes)) = self.unapplied.pop_front_if(|(last, _)| *last <= index) {\n                    self.unapplied_bytes -= bytes;\n                }\n", ""),
    ("snapshots-outlive-a-leadership", MEMBER, "            self.snapshots.clear();\n", ""),
    ("lone-voter-campaigns-while-writing", MEMBER, " || (self.part.is_only_voter && self.has_unwritten());", ";"),
    ("reads-locally-as-soon-as-alone", MEMBER, " && self.applied >= self.alone_from", ""),
    ("speaks-of-a-term-that-is-not-on-disk", MEMBER, "if self.persisted_term == self.node.raft.term {", "if true {"),
    ("takes-batches-in-a-term-that-is-not-on-disk", MEMBER, "self.incoming.lead(if self.persisted_term == term { term } else { 0 });", "self.incoming.lead(term);"),
    # Bugs that were never there.
    ("acknowledges-before-persisted", MEMBER, "messages.extend(ready.take_persisted_messages());", "let early = ready.take_persisted_messages(); self.send(early.clone(), effects); messages.extend(early);"),
    ("persists-out-of-turn", MEMBER, "if front.number > number && front.writes {", "if front.number > number + 1 && front.writes {"),
    ("follows-refused-changes", MEMBER, "if carried_out {", "if carried_out || true {"),
    ("proposes-again-too-early", FORWARD, "&& batch.term < term", "&& batch.term < term + 1"),
    ("accepts-batches-twice", FORWARD, "if number == *last + 1 {", "if number >= *last {"),
    ("accepts-batches-with-gaps", FORWARD, "if number == *last + 1 {", "if number > *last {"),
    ("accepts-batches-of-any-term", FORWARD, "if self.term == 0 || forward.term != self.term {", "if self.term == 0 {"),
    ("revokes-under-any-leader", MEMBER, "proposal.leader_term == 0 || proposal.leader_term == leading;", "proposal.leader_term < u64::MAX || leading == 0;"),
    ("lost-reads-are-not-repeated", MEMBER, "self.reads.splice(0..0, round.reads);", "drop(round.reads);"),
    ("late-proposals-are-not-refused", MEMBER, "while let Some(waiting) = self.proposals.front()\n            && is_late(waiting.since_tick)", "while let Some(waiting) = self.proposals.front()\n            && is_late(waiting.since_tick) && false"),
    ("term-begins-too-early", MEMBER, "            && raft.commit_to_current_term()\n", ""),
    ("tail-survives-a-snapshot", VIEW, "    pub(crate) fn install(&mut self, index: u64, term: u64) {\n        self.tail.clear();", "    pub(crate) fn install(&mut self, index: u64, term: u64) {"),
    ("goes-on-while-installing", MEMBER, "if self.installing.is_some() || !self.has_ready() {", "if !self.has_ready() {"),
    ("changes-of-members-do-not-wait", MEMBER, "if self.node.raft.has_pending_conf() {", "if false {"),
    ("digest-counts-what-is-on-disk", COMPACTION, "self.engine.compact_hint(keys::REV, dropped);", "self.engine.compact_hint(keys::REV, dropped); self.state.digest = self.state.digest.wrapping_add(job.target as u64);"),
    ("reads-are-answered-by-a-former-leader", MEMBER, "read_only_option: ReadOnlyOption::Safe,", "read_only_option: ReadOnlyOption::LeaseBased,"),
    ("leases-keep-their-old-end", LESSOR, "lease.ends_ms = now_ms.saturating_add(seconds(left_s)).saturating_add(extension_ms);", "lease.ends_ms = lease.ends_ms.max(now_ms.saturating_add(extension_ms)); let _ = left_s;"),
    ("keep-alive-adds-nothing", LESSOR, "lease.ends_ms = now_ms.saturating_add(seconds(lease.ttl_s));", "lease.ends_ms = lease.ends_ms.max(now_ms);"),
    ("record-cache-survives-a-snapshot", MACHINE, "        self.cache.clear();\n", ""),
    ("leases-survive-a-snapshot", MACHINE, "        self.leases = found.leases;\n", ""),
    ("members-survive-a-snapshot", MACHINE, "        self.rare = found.rare;\n", ""),
    ("users-survive-a-snapshot", MACHINE, "        self.auth = found.auth;\n", ""),
    ("compaction-is-not-resumed-after-a-snapshot", MACHINE, "self.job = Job::resume(found.compacted_physically, &found.state, found.log_bytes);", "self.job = None;"),
    ("readers-keep-the-old-engine", MACHINE, "self.hub.reader().switch(engine.clone(), published.clone());", ""),
    ("overlay-forgets", MACHINE, "        step.overlay.cur.insert(key, record);", "        if record.version % 7 != 0 { step.overlay.cur.insert(key, record); }"),
    ("watchers-lose-a-revision-when-behind", WATCH, "watcher.next = watcher.next.max(from);", "watcher.next = watcher.next.max(from + 1);"),
    ("catch-up-splits-a-revision", WATCH, "if at.main != last {", "if at.main != last || scanned % 3 == 0 {"),
]


def sh(command, **options):
    return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def main():
    arguments = sys.argv[1:]
    if not arguments:
        sys.exit(__doc__)
    copy, seeds, wanted = arguments[0], "2000", arguments[1:]
    if wanted[:1] == ["--seeds"]:
        seeds, wanted = wanted[1], wanted[2:]
    shutil.copytree(ROOT, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("target", ".git"))
    target = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(copy, "target")), "debug", "metastore-sim")
    missed = 0
    for name, path, old, new in MUTANTS:
        if wanted and name not in wanted:
            continue
        file = os.path.join(copy, path)
        with open(file) as source:
            text = source.read()
        if text.count(old) != 1:
            print(f"{name}: the text to change is there {text.count(old)} times; renew this mutant", flush=True)
            missed += 1
            continue
        try:
            with open(file, "w") as source:
                source.write(text.replace(old, new))
            built = sh(["cargo", "build", "-p", "metastore-sim"], cwd=copy)
            if built.returncode != 0:
                print(f"{name}: does not build\n{built.stdout[-2000:]}", flush=True)
                missed += 1
                continue
            ran = sh([target, "--seeds", seeds])
            finding = [line for line in ran.stdout.splitlines() if line.startswith("seed ")]
            missed += not finding
            print(f"{name}: {finding[0][:200] if finding else f'NOT FOUND in {seeds} seeds'}", flush=True)
        finally:
            with open(file, "w") as source:
                source.write(text)
    sys.exit(min(missed, 1))


if __name__ == "__main__":
    main()
