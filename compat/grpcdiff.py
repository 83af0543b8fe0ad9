#!/usr/bin/env python3
"""Starts fresh servers for every group of raw requests in bin/grpcdiff and lets it compare their answers.

Exit code: 0 all equal, 1 differences, 2 it could not run.
"""

import argparse
import re
import subprocess
import sys
import time

import harness

GROUP_S = 240.0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    parser.add_argument("--later", action="store_true", help="also the groups of services that come later")
    parser.add_argument("--exact-ids", action="store_true", help="compare cluster and member ids too")
    parser.add_argument("--verbose", action="store_true", help="print every request with the reference's answer")
    options = parser.parse_args()

    program = harness.need("grpcdiff")
    listing = subprocess.run([program, "-list"], capture_output=True, check=True, text=True, timeout=30).stdout
    groups = [line.split("\t") for line in listing.splitlines()]
    if options.only:
        groups = [g for g in groups if any(o in g[0] for o in options.only)]
    elif not options.later:
        groups = [g for g in groups if g[1] == "now"]
    if options.list:
        for name, when, flags, about in groups:
            print("%-20s %-5s %s%s" % (name, when, about, "; servers with " + flags if flags else ""))
        return 0
    if not groups:
        raise harness.Failure("no group of that name")

    servers = harness.make_servers(options)
    fresh = not isinstance(servers, harness.Attached)
    if not fresh and len(groups) > 1:
        raise harness.Failure("every group needs fresh servers: with --a and --b give one group by --only")
    started = time.monotonic()
    different, requests = [], 0
    try:
        following = servers.start(groups[0][2].split())
        for i, (name, _, _, _) in enumerate(groups):
            group, following = following, None
            servers.wait_ready(group)
            if i + 1 < len(groups):
                following = servers.start(groups[i + 1][2].split())
            args = [program, "-group", name]
            args += [a for server in group for a in ("-server", "%s=%s" % (server.label, server.url))]
            args += ["-verbose"] * options.verbose + ["-exact-ids"] * options.exact_ids
            child = harness.PROCESSES.start(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            try:
                out, _ = child.communicate(timeout=GROUP_S)
            except subprocess.TimeoutExpired:
                harness.PROCESSES.stop(child)
                out = "%s did not end within %g s\n" % (name, GROUP_S)
            harness.PROCESSES.stop(child)
            gone = servers.stop(group)
            # The verdict is the last line; it reads better before what explains it.
            lines = out.rstrip("\n").split("\n")
            if not re.match(r"(equal|DIFFERS) ", lines[-1]):
                lines.append("DIFFERS  %s: grpcdiff ended with exit %s" % (name, child.returncode))
            print("\n".join([lines[-1]] + lines[:-1]))
            for label, code, log in gone:
                print("  %s ended by itself, exit %s; the end of its log:\n%s" % (label, code, log))
            sys.stdout.flush()
            counted = re.search(r": (\d+) requests", lines[-1])
            requests += int(counted[1]) if counted else 0
            if child.returncode or gone:
                different.append(name)
    finally:
        servers.close()
    print("%d groups, %d requests to each server, %d groups differ%s (%.0f s)" % (
        len(groups), requests, len(different), ": " + " ".join(different) if different else "", time.monotonic() - started))
    return 1 if different else 0


if __name__ == "__main__":
    harness.run(main)
