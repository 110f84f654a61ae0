"""10,000 requests that no client should send, of fifteen kinds, while well-behaved users ask: what are they told, and who waits for them?

    python bench/malformed.py [--requests 10000] [--seed 0]

`mlkit serve`'s own server of a table's model. Each request has a connection of its own, four at a time; the kinds are those of
tests/test_malformed.py. Two users ask without a break beside them, over connections that stay open. What was not answered with 4xx is shown."""
import argparse
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from test_gateway import hashes, shop, workers
from test_malformed import KINDS, barrage

from mlkit.serving.front import Front


def family(front): return [p.pid for p in [psutil.Process(front.process.pid), *workers(front)]]


def report(statuses, slowest, taken, users):
    print("| kind | requests | status: how often | slowest ms |")
    print("|---|---|---|---|")
    for kind in KINDS:
        found = ", ".join(f"{s}: {n:,}" for s, n in sorted(statuses[kind].items()))
        print(f"| {kind} | {statuses[kind].total():,} | {found} | {1000 * slowest[kind]:.0f} |")
    p50, p99, most = 1000 * np.percentile(users.seconds, [50, 99, 100])
    print(f"\nUsers beside them: {len(users.seconds):,} requests, {len(users.failed)} failed, p50 {p50:.1f} ms, p99 {p99:.1f} ms, slowest {most:.0f} ms.")
    print(f"Not answered with 4xx: {len(taken)}.")
    for kind, status, data in taken[:5]:
        print(f"  {kind} {status} {data}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        bundle = shop(Path(d) / "1")
        with Front(bundle, hashes(bundle), "bench") as front:
            before, gateway = family(front), psutil.Process(front.process.pid)
            memory, began = gateway.memory_info().rss, time.monotonic()
            found = barrage(front, args.requests, args.seed)
            took, grown = time.monotonic() - began, gateway.memory_info().rss - memory
            ended = len(set(before) - set(family(front)))
    packages = ", ".join(f"{p} {version(p)}" for p in ("uvicorn", "httptools", "msgspec", "onnxruntime"))
    print(f"{os.cpu_count()} CPUs ({platform.machine()}), load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, {packages}; {took:.0f} s\n")
    report(*found)
    print(f"Processes that ended: {ended} of {len(before)}. The gateway has grown by {grown / 1e6:.0f} MB.")


if __name__ == "__main__":
    main()
