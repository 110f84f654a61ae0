"What no client should send, of every kind, while others ask: each is told so, no process ends, and nobody waits. `bench/malformed.py` sends 10,000."
import gzip
import json
import random
import select
import socket
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from threading import Event, Thread

import psutil

import test_gateway
from test_gateway import ROW, tensors, workers

bundle, front = test_gateway.bundle, test_gateway.front # the fixtures

INFER = "/v2/models/shop/infer"
BOMB = gzip.compress(b"[" * 50_000_000) # 50 kB


def http(body=b"", path="/predict", method="POST", length=None, **headers):
    "A request as bytes. A header that is a list stands there several times."
    named = {"Host": "localhost", "Content-Length": len(body) if length is None else length} | {k.replace("_", "-"): v for k, v in headers.items()}
    lines = [f"{k}: {v}" for k, values in named.items() for v in (values if isinstance(values, list) else [values]) if v != ""]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1") + body


def as_rows(value): return http(json.dumps(value).encode())
def as_tensors(**change): return http(json.dumps(tensors(**change)).encode(), INFER)


def depth(r):
    opened, n = r.choice([b"[", b'{"inputs":', b'{"age":', b'[{"a":']), r.randrange(100, 20_000)
    inside = r.random() < 0.5
    body = b'{"age":' * inside + opened * n + b"1" * (r.random() < 0.5)
    return http(body, r.choice(["/predict", INFER]))


def sizes(r):
    value = r.choice([2**63 - 1, -1, 0, 17, 2**64, 1e300, None, "x", [], {}, True, [2**63 - 1, 8], [1, 1, 1], "NaN"])
    return as_tensors(shape=value if r.random() < 0.5 else r.choice([[value, 2], [1, value], [2**62, 4]]))


def dtypes(r):
    if r.random() < 0.5:
        return as_tensors(datatype=r.choice(["UINT8", "BYTES", "", 5, None, "FP65", "x" * 1000, "FP16"]))
    return as_tensors(data=r.choice([[1], [1, 2, 3], ["a", "b"], [[1, 2], [3, 4]], 5, "x", {}, [True, 2], [2**70, "1"], [[], []]]))


def ranges(r):
    change = [{"age": r.uniform(121, 1e9)}, {"age": -r.uniform(0.1, 1e300)}, {"age": None}, {"town": r.choice(["Paris", "", "x" * 10_000, "bonn"])},
              {"age": "many"}, {"town": 5}, {"hat": 1}, {"age": [41]}, {"income": {"a": 1}}]
    return as_rows(ROW | r.choice(change)) if r.random() < 0.7 else as_tensors(data=r.choice([[400.0, 1.0], [None, 1.0], [-5, 2]]))


def counts(r):
    return as_rows(r.choice([[], [ROW] * r.randrange(17, 2000), [ROW, 1], {}, [[ROW]], [{}] * 3, {k: ROW[k] for k in r.sample(sorted(ROW), 2)}]))


def nan(r):
    word = r.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"nan"])
    row = b'{"age": ' + word + b', "income": 1, "town": "Bonn"}'
    data = b'{"inputs": [{"name": "numbers", "datatype": "FP64", "shape": [1, 2], "data": [' + word + b', 1]}]}'
    return r.choice([http(row), http(data, INFER)])


def doubles(r):
    one = tensors()
    return r.choice([
        lambda: http(b'{"age": 41, "age": 42, "income": 1, "town": "Bonn"}'),
        lambda: http(json.dumps({"inputs": one["inputs"] + one["inputs"][:1]}).encode(), INFER),
        lambda: http(json.dumps(one | {"outputs": [{"name": "answer"}] * 2}).encode(), INFER),
        lambda: http(json.dumps(ROW).encode(), Content_Length=["53", str(r.randrange(54, 99))]),
        lambda: http(json.dumps(ROW).encode(), Host=["localhost", "evil.example"]),
        lambda: http(json.dumps(ROW).encode(), Transfer_Encoding="chunked")])()


def packed(r):
    if r.random() < 0.3:
        return http(BOMB, r.choice(["/predict", INFER]), Content_Encoding=r.choice(["gzip", "deflate", "br", "gzip, gzip"]))
    return http(gzip.compress(r.randbytes(50)), Content_Encoding=r.choice(["gzip", ""]))


def chunks(r):
    head = http(length="", Transfer_Encoding="chunked")
    if r.random() < 0.3:
        return head + b"1\r\n \r\n" * r.randrange(5000, 20_000) + b"0\r\n\r\n"
    return head + r.choice([b"ffffffffffffffffffff\r\n", b"-1\r\n", b"g\r\n\r\n", b"5\r\n{}\r\n0\r\n\r\n", b"2\r\n[]\r\n0\r\n\r\n", b"0\r\n\r\n"])


def paths(r):
    path = r.choice([
        "/", "//", "/predict/../../etc/passwd", "/v2/models/..%2f..%2fetc/infer", "/predict/other", "/v2/models/shop/versions/9/infer", "/%00", "/predict/%ff",
        "/v2/repository/models/shop/load", "/v2/repository/index", "/v2/systemsharedmemory/region/a/register", "/v2/logging", "/metrics", "/" + "a" * 5000,
        "/predict/" + "x/" * 500, "/predict;x", "/v2/models/shop/" + r.choice("abc") * 50])
    return http(json.dumps(ROW).encode(), path)


def methods(r):
    method = r.choice(["DELETE", "PUT", "PATCH", "TRACE", "OPTIONS", "CONNECT", "PROPFIND", "BREW", "G\x00T", "predict", "X" * 5000])
    return http(b"{}", r.choice(["/predict", "/v2", INFER]) if method != "CONNECT" else "localhost:80", method)


def headers(r):
    body = json.dumps(tensors()).encode()
    length = r.choice(["-1", "5", "x", str(2**70), "0"])
    return r.choice([
        lambda: http(body, INFER, Inference_Header_Content_Length=length), lambda: http(b"{}", Host="evil.example"), lambda: http(b"{}", Host=""),
        lambda: http(b"{}", Origin=r.choice(["http://evil.example", "null", "https://localhost.evil.example"])), lambda: http(length=r.choice(["-1", "x", "1e3", "99999999999", str(2**70)])),
        lambda: http(b"{}", X="a" * 100_000), lambda: http(b"{}", **{f"X{i}": "a" for i in range(2000)}), lambda: http(b"{}", Transfer_Encoding=r.choice(["x", "gzip, chunked, x"])),
        lambda: http(b"{}").replace(b"HTTP/1.1", r.choice([b"HTTP/9.9", b"HTTP", b"SMTP/1.1"]))])()


def torn(r):
    "Broken JSON, other bytes, bytes that have moved."
    body = bytearray(json.dumps(tensors()).encode())
    if (kind := r.randrange(4)) == 0:
        return http(r.randbytes(r.randrange(300)), INFER)
    if kind == 1:
        return http(bytes(body[:r.randrange(100)]), INFER)
    if kind == 2:
        return r.choice([b"", b"\x16\x03\x01", b"\x00"]) + r.randbytes(200) + b"\r\n\r\n"
    for _ in range(r.randrange(1, 6)):
        body[r.randrange(len(body))] = r.randrange(256)
    return http(bytes(body) + b"}", INFER) # at least one brace too many


def names(r):
    if r.random() < 0.5:
        return as_tensors(name=r.choice(["", "x", "numbers ", "../numbers", 5, "\x00", None]))
    outputs = r.choice([[{"name": "x"}], 5, [5], [{}], [{"name": "answer", "parameters": {"classification": 2}}]])
    return http(json.dumps(tensors() | {"outputs": outputs}).encode(), INFER)


def large(r):
    "100 MB, announced or in pieces."
    if r.random() < 0.5:
        return http(length=100_000_000) + bytes(100_000_000)
    return http(length="", Transfer_Encoding="chunked") + (b"f4240\r\n" + b" " * 1_000_000 + b"\r\n") * 100


KINDS = {f.__name__: f for f in (depth, sizes, dtypes, ranges, counts, nan, doubles, packed, chunks, paths, methods, headers, torn, names, large)}


def drawn(n, seed=0):
    "Kind and bytes of `n` requests. A large one is one in a thousand, and the last."
    r = random.Random(seed)
    kinds = [k for k in KINDS if k != "large"]
    for i in range(n):
        kind = "large" if i % 1000 == 500 or i == n - 1 else kinds[i % len(kinds)]
        yield kind, KINDS[kind](r)


def sent(front, data, wait=30.0):
    "The status that comes back, 0 where the connection is closed without; seconds."
    began, out = time.monotonic(), b""
    with socket.create_connection((front.host, front.port), wait) as s:
        s.setblocking(False)
        rest, ended = memoryview(data), False
        while b"\r\n" not in out and not ended and time.monotonic() - began < wait:
            readable, writable, _ = select.select([s], [s] if rest else [], [], wait)
            try:
                if readable: # before more is sent: what comes after a refusal resets the connection
                    part = s.recv(65536)
                    out, ended = out + part, not part
                elif writable:
                    rest = rest[s.send(rest[:1 << 16]):]
            except BlockingIOError:
                pass
            except OSError:
                ended = True
    words = out.split(b"\r\n")[0].split()
    return int(words[1]) if len(words) > 1 else 0, time.monotonic() - began


class Users:
    "Some who ask as they should, from `with` on; how long each answer took, and what was none."
    def __init__(self, front, n=2):
        self.front, self.over, self.seconds, self.failed = front, Event(), [], []
        self.threads = [Thread(target=self.ask, daemon=True) for _ in range(n)]

    def ask(self):
        connection, body = HTTPConnection(self.front.host, self.front.port, timeout=30), json.dumps(ROW).encode()
        while not self.over.is_set():
            began = time.monotonic()
            try:
                connection.request("POST", "/predict", body)
                answer = connection.getresponse()
                answer.read()
                status = answer.status
            except OSError as e:
                status = repr(e)
                connection.close()
            self.seconds.append(time.monotonic() - began)
            if status != 200:
                self.failed.append(status)
            time.sleep(0.005)
        connection.close()

    def __enter__(self):
        for t in self.threads:
            t.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for t in self.threads:
            t.join(60)


def barrage(front, n, seed=0):
    "kind: how often which status came; kind: the slowest answer in seconds; the requests that were not refused; the users."
    statuses, slowest, taken = defaultdict(Counter), defaultdict(float), []
    def one(request):
        kind, data = request
        status, seconds = sent(front, data)
        statuses[kind][status] += 1
        slowest[kind] = max(slowest[kind], seconds)
        if not 400 <= status < 500:
            taken.append((kind, status, data[:300]))
    with Users(front) as users, ThreadPoolExecutor(4) as pool:
        requests = drawn(n, seed)
        while some := [x for _, x in zip(range(200), requests)]:
            list(pool.map(one, some))
    return statuses, slowest, taken, users


def test_malformed_requests(front):
    "Of each kind: 4xx for all, the same processes as before, an answer for everybody else."
    def family(): return [p.pid for p in [psutil.Process(front.process.pid), *workers(front)]]
    before = family()
    statuses, _, taken, users = barrage(front, 2000)
    assert sum(c.total() for c in statuses.values()) == 2000 and statuses.keys() == KINDS.keys()
    assert taken == [], taken[:5]
    assert len(users.seconds) > 20 and users.failed == [] and family() == before
