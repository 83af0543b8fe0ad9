#!/usr/bin/env python3
"""Sends the same HTTP requests to fresh servers, most of them to the JSON gateway, and compares every answer: status,
headers, and the body, of streams line by line.

Spaces after commas are not compared: in etcd they come and go with each build of it. Nor is the kind of space after
"proto:", for the same reason.

Exit code: 0 all equal, 1 differences, 2 it could not run.
"""

import argparse
import base64
import concurrent.futures
import http.client
import json
import os
import re
import socket
import struct
import sys
import time
import urllib.parse

import harness

ANSWER_S = 10.0
QUIET_S = 1.0
# Requests under way at a time, of those that are sent side by side.
ASIDE_MAX = 96
HEADERS = (
    "content-type", "grpc-metadata-content-type", "access-control-allow-origin", "access-control-allow-methods",
    "access-control-allow-headers", "www-authenticate", "location", "allow", "x-content-type-options",
    "sec-websocket-protocol", "sec-websocket-version", "trailer",
)
# What differs between any two servers.
VOLATILE = {"clientURLs", "raft_term", "raftTerm", "raftIndex", "raftAppliedIndex", "dbSize", "dbSizeInUse", "dbSizeQuota", "version"}


def b64(text):
    return base64.b64encode(text.encode()).decode()


class Request:
    """One request. A stream is read until it has given so many lines, or is quiet for QUIET_S; unordered ones are
    compared in any order."""

    def __init__(self, path, body="", method="POST", headers=None, lines=None, raw=None, websocket=None, skip_body=False,
                 unordered=False):
        self.path, self.body, self.method, self.headers = path, body, method, headers or {}
        self.lines, self.raw, self.websocket, self.skip_body = lines, raw, websocket, skip_body
        self.unordered = unordered

    def __str__(self):
        body = self.raw if self.raw is not None else self.websocket or self.body
        text = repr(body)
        headers = "".join(" %s=%s" % pair for pair in self.headers.items())
        return "%s %s%s %s" % (self.method, self.path, headers, text if len(text) < 200 else text[:200] + "...")


def send(server, request):
    host, port = server.address.rsplit(":", 1)
    if request.raw is not None:
        return send_raw(host, int(port), request.raw)
    if request.websocket is not None:
        return send_websocket(host, int(port), request)
    connection = http.client.HTTPConnection(host, int(port), timeout=ANSWER_S)
    try:
        body = request.body.encode() if isinstance(request.body, str) else request.body
        connection.request(request.method, request.path, body or None, request.headers)
        # The library forgets the socket when the answer says that it is the connection's last.
        sock = connection.sock
        response = connection.getresponse()
        kept = {name: response.headers.get(name) for name in HEADERS if name in response.headers}
        if request.lines is None:
            text = "" if request.skip_body else response.read().decode("utf-8", "replace")
            return [response.status, kept] + [normal(text)]
        sock.settimeout(QUIET_S)
        lines = []
        try:
            while len(lines) < request.lines:
                line = response.readline()
                if not line:
                    lines.append("<end>")
                    break
                lines.append(normal(line.decode("utf-8", "replace")))
        except (TimeoutError, socket.timeout):
            lines.append("<quiet>")
        return [response.status, kept] + (sorted(lines) if request.unordered else lines)
    except (OSError, http.client.HTTPException) as error:
        return [type(error).__name__]
    finally:
        connection.close()


def send_raw(host, port, data):
    """Bytes as they are; of the answer, whether it is a refusal, by an error or by hanging up."""
    with socket.create_connection((host, port), ANSWER_S) as connection:
        answer = b""
        try:
            connection.sendall(data)
            while b"\r\n" not in answer:
                piece = connection.recv(4096)
                if not piece:
                    break
                answer += piece
        except OSError:
            pass
    status = answer.split(b"\r\n")[0].split(b" ")
    return ["served" if len(status) > 1 and status[1][:1] == b"2" else "refused"]


def send_websocket(host, port, request):
    """Upgrades, sends each message, and reads text messages until it is quiet."""
    with socket.create_connection((host, port), ANSWER_S) as connection:
        head = "GET %s HTTP/1.1\r\nHost: %s:%d\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" % (request.path, host, port)
        headers = {"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
        headers.update(request.headers)
        head += "".join("%s: %s\r\n" % pair for pair in headers.items() if pair[1] is not None)
        connection.sendall(head.encode() + b"\r\n")
        stream = connection.makefile("rb")
        status = int(stream.readline().split()[1])
        kept, accept = {}, None
        while True:
            line = stream.readline().strip().decode()
            if not line:
                break
            name, value = line.split(":", 1)
            if name.lower() in HEADERS:
                kept[name.lower()] = value.strip()
            if name.lower() == "sec-websocket-accept":
                accept = value.strip()
        result = [status, kept, accept]
        if status != 101:
            return result
        for message in request.websocket:
            payload = message.encode()
            length = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + struct.pack(">H", len(payload))
            connection.sendall(b"\x81" + length + b"\0\0\0\0" + payload)
        connection.settimeout(QUIET_S)
        try:
            while True:
                first = stream.read(2)
                if len(first) < 2 or first[0] & 15 == 8:
                    # etcd hangs up without a close frame.
                    result.append("<end>")
                    break
                length = first[1] & 127
                if length == 126:
                    length = struct.unpack(">H", stream.read(2))[0]
                result.append(normal(stream.read(length).decode()))
        except (TimeoutError, socket.timeout):
            result.append("<quiet>")
        except ConnectionResetError:
            # Whoever hangs up before reading everything.
            result.append("<end>")
        return result


def normal(text):
    """A body in a form to compare: JSON as lists of pairs, in the order of its fields."""
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: [
            [name, "*" if name in VOLATILE else value] for name, value in pairs
        ])
    except ValueError:
        return text
    # etcd's gateway and the server behind it keep the same deadline, and whoever is first says so in words of its own.
    text = re.sub(r'"stream terminated by RST_STREAM[^"]*"', '"context deadline exceeded"', json.dumps(value))
    return text.replace("proto:\\u00a0", "proto: ")


VALUES = [
    "null", "true", "false", "0", "1", "-1", "-0", "1.0", "1.5", "1e2", "15e-1", "150e-1", "1E+1", "1e400", "01", "1.",
    '""', '"0"', '"1"', '"-1"', '"1.0"', '"1e1"', '" 1"', '"1 "', '"1,"', '"1x"', '"x"', '"YQ=="', '"YQ"', '"YR=="', '"Y"',
    '"YWI="', '"YW\\nJj"', '"_-8="', '"+/8"', '"+_8="', '"%"', '"\\u0061\\ud83d\\ude00"', '"\\ud800"', '"\\ud800\\u0061"',
    '"\\ud800x"', '"<&>"', "[]", "{}", "[1]", '["YQ=="]', '{"a":1}', "[null]", "nul", '"', '"\\x"', "-", "9223372036854775807",
    "9223372036854775808", "-9223372036854775808", "18446744073709551615", "18446744073709551616", "2147483648",
]
BROKEN = [
    "", " ", "\n\t", "{", "}", "{}", "{}{}", "{} x", "[]", "null", "true", "1", '"x"', "{,}", '{"key"}', '{"key":}', '{"key":"YQ==",}',
    '{"key":"YQ==" "a":1}', "{'key':1}", '{"key":"YQ=="', '{"key":"YQ=="}}', '{"key":"YQ==","key":"YQ=="}',
    '{"key":"YQ==","range_end":"","rangeEnd":""}', '{"nope":{"a":[1,{"b":"\\ud800"}]}}', '{"nope":{"a":[1,{"b":"c"}]},"key":"YQ=="}',
    '{"[x]":1,"key":"YQ=="}', '{"":1,"key":"YQ=="}', '{"KEY":"YQ=="}', "\ufeff{}", '{"key":"YQ==",\n\n  "limit":x}',
    '{"key":"YQ==",\n\n  "limit":"x"}', '{"key":"YQ==","limit":"\t"}', "/* */{}", "{\"key\":\"YQ==\"}\x00", "NaN", "[" * 10001,
    '{"a":' * 5000 + "1" + "}" * 5000,
]


def post(path, body, **more):
    return Request("/v3/" + path, body if isinstance(body, (str, bytes)) else json.dumps(body), **more)


def fields(path, base, names, values=VALUES):
    """One request for each field with each value."""
    for name in names:
        for value in values:
            rest = dict(base)
            rest.pop(name, None)
            inner = json.dumps(rest)[1:-1]
            yield post(path, "{%s}" % ", ".join(part for part in (inner, '"%s": %s' % (name, value)) if part))


def seed():
    yield post("kv/put", {"key": b64("a"), "value": b64("1")})
    yield post("kv/put", {"key": b64("b"), "value": b64("2")})
    yield post("kv/put", {"key": b64("a"), "value": b64("3"), "prev_kv": True})


def kv():
    yield from seed()
    yield from fields("kv/range", {"key": b64("a")}, [
        "key", "range_end", "limit", "revision", "sort_order", "sortTarget", "serializable", "keys_only", "count_only",
        "min_mod_revision", "maxModRevision", "min_create_revision", "max_create_revision",
    ])
    for order in ("NONE", "ASCEND", "DESCEND", "x", 7):
        for target in ("KEY", "VERSION", "CREATE", "MOD", "VALUE", "LEASE", "x", 9):
            yield post("kv/range", {"key": "AA==", "range_end": "AA==", "sort_order": order, "sort_target": target})
    yield from fields("kv/put", {"key": b64("p")}, ["key", "value", "lease", "prev_kv", "ignore_value", "ignore_lease"])
    yield from fields("kv/deleterange", {"key": b64("p")}, ["key", "range_end", "prev_kv"])
    yield from fields("kv/compaction", {"revision": 2}, ["revision", "physical"], VALUES[:20])
    yield post("kv/range", {"key": "AA==", "range_end": "AA=="})


def broken():
    yield from seed()
    for path in ("kv/range", "kv/txn", "lease/leases", "cluster/member/list", "auth/status", "maintenance/hashkv"):
        for body in BROKEN:
            yield post(path, body)
    yield post("kv/range", b'{"key":"\xff"}')
    yield post("kv/range", b'{"\xff":1}')
    yield post("cluster/member/add", b'{"peerURLs":["\xff"]}')


def txn():
    yield from seed()
    a = b64("a")
    for target, value in (("VERSION", {"version": "2"}), ("CREATE", {"create_revision": 2}), ("MOD", {"mod_revision": 4}),
                          ("VALUE", {"value": b64("3")}), ("LEASE", {"lease": "0"}), (0, {"version": 2}), ("x", {"version": 2})):
        for result in ("EQUAL", "GREATER", "LESS", "NOT_EQUAL", 3, "x", 9):
            compare = dict({"key": a, "target": target, "result": result}, **value)
            yield post("kv/txn", {"compare": [compare], "success": [{"request_range": {"key": a}}],
                                  "failure": [{"requestRange": {"key": b64("b"), "count_only": True}}]})
    yield from fields("kv/txn", {}, ["compare", "success", "failure"])
    for value in VALUES:
        yield post("kv/txn", '{"success":[{"request_put":%s}]}' % value)
        yield post("kv/txn", '{"compare":[{"key":"YQ==","target":"VERSION","version":%s}]}' % value)
        yield post("kv/txn", '{"success":[%s]}' % value)
    put = {"request_put": {"key": b64("t"), "value": b64("v"), "prev_kv": True}}
    yield post("kv/txn", {"success": [put, {"request_delete_range": {"key": b64("u"), "prev_kv": True}}]})
    yield post("kv/txn", {"success": [{"request_txn": {"success": [put]}}, {"request_range": {"key": b64("t")}}]})
    yield post("kv/txn", {"success": [put, put]})
    yield post("kv/txn", '{"success":[{"request_put":{},"request_range":{}}]}')
    yield post("kv/txn", '{"success":[{"request_put":null,"request_range":{"key":"YQ=="}}]}')
    yield post("kv/txn", '{"compare":[{"version":1,"createRevision":1}]}')
    yield post("kv/txn", {"success": [put] * 129})


def leases():
    for value in VALUES:
        yield post("lease/grant", '{"ID":77,"TTL":%s}' % value)
        yield post("lease/revoke", {"ID": 77})
        yield post("lease/timetolive", '{"ID":%s,"keys":true}' % value)
        yield post("kv/lease/revoke", '{"ID":%s}' % value)
    yield post("lease/grant", {"ID": "78", "TTL": "600"})
    yield post("kv/put", {"key": b64("l"), "lease": 78})
    yield post("lease/timetolive", {"ID": 78, "keys": False})
    yield post("kv/lease/leases", {})
    yield post("lease/leases", "")
    yield post("lease/keepalive", {"ID": 78}, lines=3)
    yield post("lease/keepalive", '{"ID":"78"} {"ID":79}\n{"ID":78}', lines=5)
    yield post("lease/keepalive", '{"ID":"78"} x {"ID":79}', lines=5)
    yield post("lease/keepalive", "", lines=2)
    yield post("lease/keepalive", "x", lines=2)
    yield Request("/v3/lease/keepalive", websocket=['{"ID":"78"}', '{"ID":"1"}'])


def watches():
    """Watches change nothing, so they are sent side by side: most of them take as long as it takes to be quiet."""
    yield from seed()
    yield list(watch_requests())


def watch_requests():
    create = {"key": b64("a"), "start_revision": "1"}
    yield post("watch", {"create_request": create}, lines=4)
    for value in VALUES:
        yield post("watch", '{"create_request":{"key":"eg==","start_revision":%s}}' % value, lines=2)
    for more in ({"prev_kv": True}, {"filters": ["NOPUT"]}, {"filters": [0, "NODELETE"]}, {"filters": ["x"]}, {"fragment": True},
                 {"watch_id": "9"}, {"range_end": "AA=="}, {"range_end": b64("A")}, {"progress_notify": True}, {"start_revision": -1},
                 {"start_revision": 99}):
        yield post("watch", {"create_request": dict(create, **more)}, lines=4)
    yield post("watch", '{"create_request":{"key":"YQ=="}}{"create_request":{"key":"YQ=="}}{"cancel_request":{"watch_id":1}}'
               '{"progress_request":{}}', lines=6, unordered=True)
    yield post("watch", '{"create_request":{"watch_id":5}}{"create_request":{"watch_id":5}}', lines=3)
    yield post("watch", '{"create_request":{"key":"YQ=="}} garbage', lines=2)
    yield post("watch", '{"create_request":{},"cancel_request":{}}', lines=2)
    yield post("watch", {"create_request": create}, lines=2, headers={"Grpc-Timeout": "300m"})
    # Without history, of which there would be more or less before it is cancelled.
    yield Request("/v3/watch", websocket=['{"create_request":{"key":"YQ=="}}', '{"cancel_request":{"watch_id":"0"}}'])
    yield Request("/v3/watch", websocket=[json.dumps({"create_request": create})],
                  headers={"Sec-WebSocket-Protocol": "Bearer, token"})
    yield Request("/v3/nope", websocket=["{}"])
    yield Request("/v3/watch", websocket=["{}"], headers={"Sec-WebSocket-Version": "12"})
    yield Request("/v3/watch", websocket=["{}"], headers={"Sec-WebSocket-Key": None})


def locks():
    yield post("lease/grant", {"ID": "5", "TTL": "600"})
    yield post("lease/grant", {"ID": "6", "TTL": "600"})
    yield post("lock/lock", {"name": b64("l"), "lease": 5})
    yield post("lock/lock", {"name": b64("l"), "lease": "5"})
    yield post("lock/lock", {"name": b64("l"), "lease": 7})
    yield post("lock/lock", {"name": b64("l"), "lease": -7})
    yield post("lock/lock", {"name": b64("l"), "lease": 6}, headers={"Grpc-Timeout": "300m"})
    # The key of who gave up goes a moment later.
    yield 0.5
    yield post("kv/range", {"key": b64("l/"), "range_end": b64("l0")})
    yield post("lock/unlock", {"key": b64("l/5")})
    yield post("lock/unlock", {"key": b64("l/5")})
    yield post("lock/unlock", {})
    yield post("lock/lock", {"lease": 6})
    for body in BROKEN[:20]:
        yield post("lock/unlock", body)
    yield post("election/leader", {"name": b64("e")})
    yield post("election/observe", {"name": b64("e")}, lines=1, headers={"Grpc-Timeout": "300m"})
    yield post("election/campaign", {"name": b64("e"), "lease": 5, "value": b64("x")})
    yield post("election/campaign", {"name": b64("e"), "lease": 5, "value": b64("y")})
    yield post("election/campaign", {"name": b64("e"), "lease": 6}, headers={"Grpc-Timeout": "300m"})
    yield post("election/campaign", {"name": b64("e"), "lease": 8})
    yield post("election/leader", {"name": b64("e")})
    yield post("election/observe", {"name": b64("e")}, lines=2)
    yield post("kv/range", {"key": b64("e/"), "range_end": b64("e0")})
    for leader in (None, {}, {"name": b64("e"), "key": b64("e/5"), "rev": 1, "lease": 5}, {"name": b64("e"), "key": b64("e/5")}):
        for method in ("proclaim", "resign"):
            yield post("election/" + method, {"leader": leader, "value": b64("z")})
    yield post("election/observe", "", lines=1, headers={"Grpc-Timeout": "300m"})


def others():
    for path in (
        "cluster/member/list", "maintenance/status", "maintenance/hashkv", "auth/status", "maintenance/alarm",
        "auth/authenticate", "cluster/member/remove", "cluster/member/promote", "cluster/member/update",
        "maintenance/transfer-leadership",
    ):
        yield post(path, "{}")
        yield post(path, "")
        yield post(path, "[]")
    yield post("cluster/member/list", {"linearizable": True})
    yield from fields("maintenance/hashkv", {}, ["revision"], VALUES[:20])
    yield from fields("cluster/member/remove", {}, ["ID"])
    yield from fields("cluster/member/add", {}, ["peerURLs"], [v for v in VALUES if not v.startswith('["')])
    yield from fields("auth/authenticate", {}, ["name", "password"], VALUES[:30])
    yield post("maintenance/alarm", {"action": "GET", "memberID": "1", "alarm": "CORRUPT"})
    yield post("maintenance/alarm", {"action": "ACTIVATE", "memberID": "9", "alarm": "NOSPACE"})
    yield post("kv/put", {"key": b64("full")})
    yield post("maintenance/alarm", {"action": "DEACTIVATE", "memberID": "9", "alarm": "NOSPACE"})


def headers():
    yield from seed()
    body = {"key": b64("a")}
    for timeout in ("1S", "100m", "1", "S", "x", "1x", "-1S", "0S", "1.5S", "1H", " 1S"):
        yield post("kv/range", body, headers={"Grpc-Timeout": timeout})
    for name, value in (
        ("Authorization", "x"), ("Authorization", "Bearer x"), ("token", "x"), ("Grpc-Metadata-Token", "x"), ("hasleader", "true"),
        ("Grpc-Metadata-Hasleader", "true"), ("Grpc-Metadata-Client-Api-Version", "3.7"), ("Accept", "text/plain"),
        ("Content-Type", "text/plain"), ("Content-Type", "application/x-www-form-urlencoded"), ("Content-Type", "application/grpc"),
        ("TE", "trailers"), ("Origin", "http://a"), ("X-HTTP-Method-Override", "PUT"),
    ):
        yield post("kv/range", body, headers={name: value})
        yield post("kv/range", "{", headers={name: value})
        yield post("watch", {"create_request": body}, headers={name: value}, lines=1)
    for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        for path in ("/v3/kv/range", "/v3/nope", "/v3/", "/v3", "/v3/watch", "/version", "/health", "/nope", "/", "/metrics",
                     "/debug/vars", "/livez", "//version", "/v3//kv/range"):
            yield Request(path, "", method, skip_body=path in ("/metrics", "/debug/vars"))


def paths():
    yield from seed()
    body = json.dumps({"key": b64("a")})
    for path in (
        "/v3/kv/range", "/v3beta/kv/range", "/v3alpha/kv/range", "/v3/kv/range/", "/v3/kv/range?x=1", "/v3//kv/range", "/v3/kv/../kv/range",
        "/v3/./kv/range", "/v3/kv/r%61nge", "/v3/kv%2Frange", "/v3/kv/Range", "/v3beta//kv/range", "/v3beta", "/v3beta/", "/v3/kv",
        "//v3/kv/range", "/v3/kv/range%00", "/v3/kv/range:x", "/v3/%zz", "/etcdserverpb.KV/Range", "/v3/kv/rangestream",
    ):
        for method in ("GET", "POST"):
            yield Request(path, body if method == "POST" else "", method)
    for path in ("/a/../version", "/version/", "/version?x", "/health/", "/livez/nope", "/readyz//data_corruption", "/..", "/%3Cx%3E/../y"):
        yield Request(path, "", "GET")


def raw():
    host = b"Host: localhost\r\n"
    for data in (
        b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n", b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
        b"G\xffT / HTTP/1.1\r\n" + host + b"\r\n", b"GET /\xff HTTP/1.1\r\n" + host + b"\r\n",
        b"GET /version HTTP/1.1\r\n" + host + b"A b: c\r\n\r\n",
        b"GET /version HTTP/1.1\r\n" + host + b"A: " + b"x" * (2 << 20) + b"\r\n\r\n",
        b"POST /v3/kv/range HTTP/1.1\r\n" + host + b"Content-Length: x\r\n\r\n{}",
        b"POST /v3/kv/range HTTP/1.1\r\n" + host + b"Content-Length: -1\r\n\r\n{}",
        b"POST /v3/kv/range HTTP/1.1\r\n" + host + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"POST /v3/kv/range HTTP/1.1\r\n" + host + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        b"POST /v3/kv/range HTTP/1.1\r\n" + host + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    ):
        yield Request("", raw=data)
    # Still there for others.
    yield post("kv/range", {"key": b64("a")})


def cors():
    for method in ("GET", "OPTIONS"):
        for origin in ("http://a:1", "http://b:1", "http://c:1", "http://a", "", None):
            yield Request("/version", "", method, headers={"Origin": origin} if origin is not None else {}, skip_body=True)


def hosts():
    for host in ("localhost", "localhost:2379", "127.0.0.1:1", "good", "good:1", "GOOD", "evil", "evil:2379", "[::1]:1", "[::1]", ""):
        for path in ("/version", "/v3/kv/range", "/metrics"):
            yield Request(path, "", "GET", headers={"Host": host}, skip_body=True)


def disabled():
    for path in ("/v3", "/v3/", "/v3/kv/range", "/v3beta/kv/range"):
        for method in ("GET", "POST"):
            yield Request(path, "", method)


# Name, flags of the servers, requests (a list: in any order).
GROUPS = [
    ("kv", [], kv), ("broken", [], broken), ("txn", [], txn), ("leases", [], leases), ("watches", [], watches),
    ("locks", [], locks), ("others", [], others), ("headers", [], headers), ("paths", [], paths), ("raw", [], raw),
    ("cors", ["--cors=http://a:1,http://b:1"], cors), ("hosts", ["--host-whitelist=localhost,127.0.0.1,good,::1"], hosts),
    ("disabled", ["--enable-grpc-gateway=false"], disabled),
]


def compare(group, requests, verbose):
    """Sends the requests to all servers at once, one after another (those in a list side by side; a number is
    a pause in seconds), and prints where answers differ. Returns how many were sent, and how many differ."""
    sent = different = 0
    with concurrent.futures.ThreadPoolExecutor(ASIDE_MAX) as pool:
        for aside in requests:
            if isinstance(aside, float):
                time.sleep(aside)
                continue
            aside = aside if isinstance(aside, list) else [aside]
            asked = [(request, [pool.submit(send, server, request) for server in group]) for request in aside]
            for request, answers in asked:
                answers = [answer.result() for answer in answers]
                sent += 1
                if verbose:
                    print("  %s\n    %s" % (request, answers[0]))
                for server, answer in zip(group[1:], answers[1:]):
                    if answer != answers[0]:
                        different += 1
                        print("  %s\n    %-8s %s\n    %-8s %s" % (
                            request, group[0].label, answers[0], server.label, answer))
    return sent, different


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser)
    parser.add_argument("--verbose", action="store_true", help="print every request with the reference's answer")
    options = parser.parse_args()
    groups = [g for g in GROUPS if not options.only or any(o in g[0] for o in options.only)]
    if options.list:
        for name, flags, _ in groups:
            print("%-10s %s" % (name, " ".join(flags)))
        return 0
    if not groups:
        raise harness.Failure("no group of that name")
    servers = harness.make_servers(options)
    started, total, failed = time.monotonic(), 0, []
    try:
        for name, flags, requests in groups:
            group = servers.start(flags)
            servers.wait_ready(group)
            sent, different = compare(group, requests(), options.verbose)
            total += sent
            for label, code, log in servers.stop(group):
                different += 1
                print("  %s ended by itself, exit %s; the end of its log:\n%s" % (label, code, log))
            print("%s %s: %d requests%s" % ("DIFFERS" if different else "equal  ", name, sent,
                                            ", %d answers differ" % different if different else ""))
            sys.stdout.flush()
            if different:
                failed.append(name)
    finally:
        servers.close()
    print("%d groups, %d requests to each server, %d groups differ%s (%.0f s)" % (
        len(groups), total, len(failed), ": " + " ".join(failed) if failed else "", time.monotonic() - started))
    return 1 if failed else 0


if __name__ == "__main__":
    harness.run(main)
