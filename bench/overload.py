"""Ten times more requests than the model can answer, for a minute: are the others told so at once, and do those that are taken get answers?

    python bench/overload.py [--seconds 60] [--times 10]

The model costs about ten milliseconds a sample, so that the client, which shares the machine, can send ten times what it answers. First
the peak: clients that wait for their answers, more and more of them. Then an open loop: requests come by a Poisson process whatever
becomes of those before, as users do. Latency counts from the moment that a request should have been sent."""
import argparse
import asyncio
import json
import os
import platform
import random
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from test_gateway import hashes, shop
from test_traffic import identity, slow

from mlkit.serving.front import Front

BODY = json.dumps({"age": 41, "income": 1, "town": "Bonn"}).encode()


class Connections:
    "To the server; as many as are needed at a time, up to a bound."
    def __init__(self, front, most: int = 800):
        self.front, self.most, self.idle, self.n = front, most, [], 0
        self.text = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY

    async def ask(self) -> int: # Status; 0: no answer
        if not self.idle and self.n >= self.most:
            return 0
        self.n += not self.idle
        pair = self.idle.pop() if self.idle else await asyncio.open_connection(self.front.host, self.front.port)
        try:
            reader, writer = pair
            writer.write(self.text)
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
            await reader.readexactly(length)
        except (OSError, EOFError):
            self.n -= 1
            return 0
        self.idle.append(pair)
        return int(head.split(b" ", 2)[1])


async def closed_loop(front, n: int, seconds: float) -> float: # Answers a second
    connections, end, done = Connections(front), time.monotonic() + seconds, 0
    async def one():
        nonlocal done
        while time.monotonic() < end:
            status = await connections.ask()
            done += status == 200
    await asyncio.gather(*(one() for _ in range(n)))
    return done / seconds


async def open_loop(front, rate: float, seconds: float) -> list[tuple[int, float, float]]: # Status, seconds, when
    connections, drawn, seen, tasks = Connections(front), random.Random(0), [], set()
    async def one(due):
        status = await connections.ask()
        seen.append((status, time.monotonic() - due, due))
    start = due = time.monotonic()
    while due < start + seconds:
        due += drawn.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.create_task(one(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return seen


def quantile(values, q):
    return sorted(values)[int(q * (len(values) - 1))] if values else float("nan")


async def measure(front, seconds, times):
    peaks = {n: await closed_loop(front, n, 4) for n in (1, 4, 16, 64)}
    n, peak = max(peaks.items(), key=lambda x: x[1])
    memory, sizes = psutil.Process(front.process.pid), []
    async def look():
        while True:
            sizes.append(memory.memory_full_info().uss / 1e6)
            await asyncio.sleep(1)
    looking = asyncio.create_task(look())
    seen = await open_loop(front, times * peak, seconds)
    looking.cancel()
    good, busy = ([t for s, t, _ in seen if s == status] for status in (200, 503))
    packages = ", ".join(f"{p} {version(p)}" for p in ("onnxruntime", "uvicorn", "httptools"))
    print(f"\n{os.cpu_count()} CPUs ({platform.machine()}), load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, {packages}")
    print(f"peak {peak:.0f} answers a second with {n} clients; then {len(seen) / seconds:.0f} requests a second for {seconds:.0f} s\n")
    print("| answered, a second | of the peak | p50, p99 ms | status 503 | p50, p99 ms | neither | gateway MB, second 5 and last |")
    print("|---|---|---|---|---|---|---|")
    ms = [f"{1000 * quantile(x, q):.0f}" for x in (good, busy) for q in (0.5, 0.99)]
    neither = len(seen) - len(good) - len(busy)
    print(f"| {len(good) / seconds:.0f} | {len(good) / seconds / peak:.2f} | {ms[0]}, {ms[1]} | {len(busy):,} | {ms[2]}, {ms[3]} | {neither} "
          f"| {sizes[min(5, len(sizes) - 1)]:.0f}, {sizes[-1]:.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--times", type=float, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        bundle = shop(Path(d) / "1", model=slow)
        with Front(bundle, hashes(bundle), identity(bundle)[:12]) as front:
            asyncio.run(measure(front, args.seconds, args.times))


if __name__ == "__main__":
    main()
