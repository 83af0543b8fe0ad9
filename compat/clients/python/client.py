#!/usr/bin/env python3
"""Drives a server through the package etcd3: put, get, txn, watch, lease, lock.
Usage: client.py ENDPOINT CA_FILE [USER PASSWORD], over TLS."""

import sys
import threading
from urllib.parse import urlparse

import etcd3
import grpc

PREFIX = "clients/python/"


def check(condition, text):
    if not condition:
        sys.exit("failed: " + text)


def connect(url, ca, user=None, password=None):
    return etcd3.client(host=url.hostname, port=url.port, ca_cert=ca, user=user, password=password, timeout=10)


def main(endpoint, ca, user=None, password=None):
    url = urlparse(endpoint)
    if user:
        try:
            connect(url, ca, user, password + "-wrong")
        except (etcd3.exceptions.Etcd3Exception, grpc.RpcError):
            pass
        else:
            sys.exit("failed: a wrong password was let in")
    client = connect(url, ca, user, password)

    client.put(PREFIX + "key", "value")
    check(client.get(PREFIX + "key")[0] == b"value", "put, get")
    print("done: put, get")

    for expected in (True, False):
        succeeded, _ = client.transaction(
            compare=[client.transactions.value(PREFIX + "key") == "value"],
            success=[client.transactions.put(PREFIX + "key", "changed")],
            failure=[client.transactions.get(PREFIX + "key")],
        )
        check(succeeded == expected, "txn")
    print("done: txn")

    client.put(PREFIX + "watched", "1")
    revision = client.get(PREFIX + "watched")[1].mod_revision
    events, cancel = client.watch(PREFIX + "watched", start_revision=revision)
    # Whatever comes too late ends the watch, and the check below fails.
    timer = threading.Timer(10, cancel)
    timer.start()
    client.delete(PREFIX + "watched")
    seen = []
    for event in events:
        seen.append(type(event).__name__)
        if len(seen) == 2:
            break
    timer.cancel()
    cancel()
    check(seen == ["PutEvent", "DeleteEvent"], "watch: %s" % seen)
    print("done: watch")

    lease = client.lease(60)
    client.put(PREFIX + "leased", "1", lease=lease)
    check(list(lease.refresh())[0].TTL > 0, "lease: not kept alive")
    lease.revoke()
    check(client.get(PREFIX + "leased")[0] is None, "lease: the key outlived it")
    print("done: lease")

    lock = client.lock(PREFIX + "lock", ttl=10)
    check(lock.acquire(timeout=10), "lock")
    check(not client.lock(PREFIX + "lock", ttl=10).acquire(timeout=1), "lock: two hold it")
    check(lock.release(), "unlock")
    other = client.lock(PREFIX + "lock", ttl=10)
    check(other.acquire(timeout=10), "lock after unlock")
    other.release()
    print("done: lock")

    client.delete_prefix(PREFIX)
    print("ok")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
