"""100 versions of a model, one after the other, while clients ask: how many requests failed, how long a swap took, what memory does.

    python bench/swaps.py [--swaps 100]

A table's model behind `mlkit serve`'s own server; eight clients ask without a break, each over a connection of its own that stays open.
A swap is a rollout that a person promotes at once: the version is fetched, hashed, loaded, asked the golden answers, takes the place; the
old one ends. The registry is left out: to note a promotion there takes MLflow about a second, and no request waits for it."""
import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from http.client import HTTPConnection
from importlib.metadata import version as of_package
from pathlib import Path
from threading import Event, Thread

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from test_gateway import hashes, older_than, shop
from test_traffic import identity, version

from mlkit.rollout.file import order, read_state, started
from mlkit.rollout.state import Place, Plan, promote_now
from mlkit.serving import front as fronts
from mlkit.serving.front import Front


def client(front, seed, over, seconds, failed):
    drawn, connection = random.Random(seed), HTTPConnection(front.host, front.port, timeout=30)
    while not over.is_set():
        row, began = {"age": drawn.uniform(0, 120), "income": 1, "town": "Bonn"}, time.perf_counter()
        try:
            connection.request("POST", "/predict", json.dumps(row))
            response = connection.getresponse()
            status, said = response.status, response.read()
        except OSError as e:
            status, said = 0, repr(e)
            connection.close()
        seconds.append(time.perf_counter() - began)
        if status != 200:
            failed.append((status, said))


def machine():
    packages = ", ".join(f"{p} {of_package(p)}" for p in ("onnxruntime", "uvicorn", "httptools", "msgspec"))
    return f"{os.cpu_count()} CPUs ({platform.machine()}), load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, {packages}"


def until(condition):
    while not condition():
        time.sleep(0.01)


def memory(front): # bytes of the gateway, without its workers
    return psutil.Process(front.process.pid).memory_full_info().uss


def swap(root, front, number, stable):
    candidate = version(root, str(number), model=older_than(50 + number / 1000))
    began = time.monotonic()
    order(root, started(Plan("shop", stable, candidate, every=600.0, patience=6000.0), "bench", ""))
    until(lambda: read_state(root).phase != "checking")
    order(root, lambda state: promote_now(state, "bench", "", time.time()))
    until(lambda: front.bundled.version == candidate.bundle[:12])
    return candidate, time.monotonic() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--swaps", type=int, default=100)
    n = parser.parse_args().swaps
    fronts.promote_in_registry = lambda root: lambda state: None
    with tempfile.TemporaryDirectory() as d:
        root, over, seconds, failed = Path(d), Event(), [], []
        (root / ".mlkit").mkdir()
        bundle = shop(root / "1")
        stable = Place("1", identity(bundle))
        with Front(bundle, hashes(bundle), identity(bundle)[:12], root=root) as front:
            Thread(target=lambda: front.watch(lambda line: print(line, file=sys.stderr)), daemon=True).start()
            clients = [Thread(target=client, args=(front, i, over, seconds, failed), daemon=True) for i in range(8)]
            for c in clients:
                c.start()
            took, sizes = [], []
            for number in range(2, n + 2):
                stable, t = swap(root, front, number, stable)
                took.append(t)
                sizes.append(memory(front) / 1e6)
                print(f"\r{number - 1} of {n}", end="", file=sys.stderr, flush=True)
            over.set()
            for c in clients:
                c.join()
            time.sleep(12) # the old version may take ten seconds to end what it has
            left = len(psutil.Process(front.process.pid).children())
    seconds.sort()
    print(f"\n{machine()}\n")
    print("| swaps | requests | failed | p50 ms | p99 ms | slowest ms | a swap, s (median, most) | gateway MB after 10, in the end | workers left |")
    print("|---|---|---|---|---|---|---|---|---|")
    p50, p99 = (1000 * seconds[int(q * len(seconds))] for q in (0.5, 0.99))
    early = sizes[min(9, n - 1)]
    print(f"| {n} | {len(seconds):,} | {len(failed)} | {p50:.1f} | {p99:.1f} | {1000 * seconds[-1]:.0f} | {statistics.median(took):.1f}, {max(took):.1f} "
          f"| {early:.0f}, {sizes[-1]:.0f} | {left} |")
    if failed:
        print(failed[:3])


if __name__ == "__main__":
    main()
