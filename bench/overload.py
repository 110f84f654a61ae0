"""Ten times more requests than the model can answer, for a minute: are the others told so at once, and do those that are taken get answers?

    python bench/overload.py [--seconds 60] [--times 10] [--layers 40]

The client shares the machine, and what it and the refusals cost is taken from the answers. Of 40 layers the model costs about ten
milliseconds a sample; the more layers, the fewer requests are ten times too many, and the less the client weighs.

First the peak: clients that wait for their answers, more and more of them. Then an open loop: requests come by a Poisson process whatever
becomes of those before, as users do. Latency counts from the moment that a request should have been sent."""
import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from test_gateway import hashes, shop
from test_traffic import costly, identity

from mlkit.load.client import closed_loop, open_loop
from mlkit.load.requests import Target
from mlkit.load.watch import Watch
from mlkit.serving.front import Front

BODY = json.dumps({"age": 41, "income": 1, "town": "Bonn"}).encode()


def quantiles(level, status): # "p50, p99" in ms
    ms = 1000 * (level.ended - level.due)[level.status == status]
    return ", ".join(f"{q:.0f}" for q in np.percentile(ms, [50, 99])) if len(ms) else "–"


async def ratio(target, n, times, seconds): # of the peak just before, for a machine that others use too
    peak = (await closed_loop(target, n, seconds)).rate
    return (await open_loop(target, times * peak, seconds)).rate / max(peak, 1e-9)


async def measure(front, seconds, times):
    target = Target(f"{front.url}/predict", [BODY])
    peaks = {n: (await closed_loop(target, n, seconds / 6)).rate for n in (1, 4, 16, 64)}
    n, peak = max(peaks.items(), key=lambda x: x[1])
    with Watch([psutil.Process(front.process.pid)], every=1) as watch:
        level = await open_loop(target, times * peak, seconds)
    ratios = [await ratio(target, n, times, seconds / 10) for _ in range(5)]
    sizes = [p["gateway_mb"] for p in watch.points]
    good, busy = ((level.status == status).sum() for status in (200, 503))
    packages = ", ".join(f"{p} {version(p)}" for p in ("onnxruntime", "uvicorn", "httptools"))
    print(f"\n{os.cpu_count()} CPUs ({platform.machine()}), load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, {packages}")
    print(f"peak {peak:.0f} answers a second with {n} clients; then {len(level.status) / seconds:.0f} requests a second for {seconds:.0f} s\n")
    print("| answered, a second | of the peak | p50, p99 ms | status 503 | p50, p99 ms | neither | gateway MB, second 5 and last |")
    print("|---|---|---|---|---|---|---|")
    print(f"| {level.rate:.0f} | {level.rate / peak:.2f} | {quantiles(level, 200)} | {busy:,} | {quantiles(level, 503)} "
          f"| {len(level.status) - good - busy} | {sizes[min(5, len(sizes) - 1)]:.0f}, {sizes[-1]:.0f} |")
    print(f"\nFive times peak and overload in turn, {seconds / 10:g} s each: of the peak " + ", ".join(f"{r:.2f}" for r in sorted(ratios)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--times", type=float, default=10)
    parser.add_argument("--layers", type=int, default=40)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        bundle = shop(Path(d) / "1", model=costly(args.layers))
        with Front(bundle, hashes(bundle), identity(bundle)[:12]) as front:
            uvloop.run(measure(front, args.seconds, args.times))


if __name__ == "__main__":
    main()
