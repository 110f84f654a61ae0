"""The server of `mlkit serve`, by each of its engines, beside raw ONNX Runtime, FastAPI with ONNX Runtime, and Triton by its own door:
same graph, same client, in turn.

    python bench/serving.py [--bundle models/bundle] [--seconds 5] [--repeats 3]

Needs wrk on PATH. The request is one sample, as JSON of the Open Inference Protocol; everyone answers it whole.
"""
import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import psutil

from mlkit.registry.bundle import read_manifest, verify_bundle
from mlkit.serving.front import Front, example_row
from mlkit.serving.hosted import Tuning
from mlkit.serving.protocol import DATATYPES
from mlkit.triton_server.repository import write_repository
from mlkit.export.signature import Signatures, arrays
from mlkit.triton_server.server import Triton, free_port

CONCURRENCY = 1, 8, 32
FASTAPI = '''
import json, sys
import numpy as np, onnxruntime
from fastapi import FastAPI
from pydantic import BaseModel

class Tensor(BaseModel):
    name: str
    shape: list[int]
    datatype: str
    data: list

class Request(BaseModel):
    inputs: list[Tensor]

KINDS = {"UINT8": np.uint8, "FP64": np.float64, "INT64": np.int64, "BYTES": object}
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession("MODEL", options, providers=["CPUExecutionProvider"])
names = [o.name for o in session.get_outputs()]
app = FastAPI()

@app.post("/v2/models/m/infer")
def infer(request: Request):
    given = {t.name: np.array(t.data, KINDS[t.datatype]).reshape(t.shape) for t in request.inputs}
    said = session.run(None, given)
    return {"outputs": [{"name": n, "shape": y.shape, "data": y.ravel().tolist()} for n, y in zip(names, said)]}
'''


def sample(bundle): # (signatures, one array a tensor on the wire)
    from mlkit.data.contract import load_contract
    signatures = Signatures.load(bundle / "onnx/signatures.json")
    served = signatures.served
    if len(served.inputs) == 1 and len(served.inputs[0].shape) > 1:
        return signatures, [np.random.default_rng(0).integers(0, 256, (1, *served.inputs[0].shape), np.uint8)]
    row = example_row(load_contract(bundle / "contract.json"), [t.name for t in served.inputs])
    return signatures, served.pack(arrays(served, [row]))


def body(signatures, sent):
    rows = [{"name": t.name, "shape": list(x.shape), "datatype": DATATYPES[t.dtype], "data": x.ravel().tolist()} for t, x in zip(signatures.wire.inputs, sent)]
    return json.dumps({"inputs": rows})


@contextmanager
def mlkit(bundle, name, engine="onnxruntime"):
    files = read_manifest(bundle)["files"]
    with Front(bundle, {f: e["sha256"] for f, e in files.items()}, "bench", tuning=Tuning(engine=engine)) as front:
        yield f"{front.url}/v2/models/{name}/infer", psutil.Process(front.process.pid)


@contextmanager
def triton(bundle, name):
    with tempfile.TemporaryDirectory() as d, Triton(write_repository(bundle / "onnx", Path(d) / "r", name)) as server:
        yield f"http://{server.url}/v2/models/{name}/infer", psutil.Process(server.guard.pid)


@contextmanager
def fastapi(bundle, name):
    with tempfile.TemporaryDirectory() as d:
        Path(d, "app.py").write_text(FASTAPI.replace("MODEL", str((bundle / "onnx/fused.onnx").resolve())))
        port = free_port("127.0.0.1", 0)
        command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port), "--workers", "2", "--log-level", "error", "--no-access-log"]
        p = subprocess.Popen(command, cwd=d, env=os.environ | {"PYTHONPATH": d})
        try:
            yield f"http://127.0.0.1:{port}/v2/models/m/infer", psutil.Process(p.pid)
        finally:
            p.terminate()
            p.wait()


def until_answers(url, request):
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, request.encode(), {"Content-Type": "application/json"}), timeout=5) as r:
                return json.loads(r.read())
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def cpu(process):
    return sum(sum(p.cpu_times()[:2]) for p in [process, *process.children(recursive=True)])


def load(url, process, script, concurrency, seconds):
    "requests a second, p50 and p99 in ms, CPU ms a request."
    command = ["wrk", "-t1", f"-c{concurrency}", f"-d{seconds}s", "--latency", "-s", script, url]
    before, began = cpu(process), time.monotonic()
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    took, spent = time.monotonic() - began, cpu(process) - before
    if "Non-2xx" in said:
        raise SystemExit(f"{url}: some requests failed:\n{said}")
    n = int(re.search(r"(\d+) requests in", said)[1])
    unit = {"us": 1e-3, "ms": 1, "s": 1e3}
    def percentile(q):
        value, kind = re.search(rf"{q}%\s+([\d.]+)(us|ms|s)", said).groups()
        return float(value) * unit[kind]
    return n / took, percentile(50), percentile(99), spent / n * 1e3


def raw(bundle, sent, seconds):
    "ONNX Runtime in one loop of one thread, without any server."
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(bundle / "onnx/fused.onnx", options, providers=["CPUExecutionProvider"])
    given = {i.name: x for i, x in zip(session.get_inputs(), sent)}
    times, end, spent = [], time.perf_counter() + seconds, time.process_time()
    while time.perf_counter() < end:
        began = time.perf_counter()
        session.run(None, given)
        times.append((time.perf_counter() - began) * 1e3)
    spent = time.process_time() - spent
    return len(times) / seconds, *np.percentile(times, [50, 99]), spent / len(times) * 1e3


def figures(rows):
    def shown(values, digits): return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
    rate, p50, p99, ms = zip(*rows)
    return f"{shown(rate, 0)} | {shown(p50, 2)} | {shown(p99, 2)} | {shown(ms, 3)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=Path("models/bundle"))
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if not shutil.which("wrk"):
        raise SystemExit("wrk is not on PATH; install it (Debian: apt install wrk)")
    verify_bundle(args.bundle)
    signatures, sent = sample(args.bundle)
    request, name = body(signatures, sent), next(f.name for f in (args.bundle / "model_repository").iterdir())
    contenders = {"mlkit serve": mlkit, "mlkit serve --engine triton": partial(mlkit, engine="triton"), "FastAPI + ONNX Runtime": fastapi, "Triton": triton}
    found, alone = {}, []
    with tempfile.TemporaryDirectory() as d:
        script = Path(d, "post.lua")
        Path(d, "body").write_text(request)
        script.write_text(f'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\nwrk.body = io.open("{d}/body"):read("*a")\n')
        for _ in range(args.repeats):
            alone.append(raw(args.bundle, sent, 1))
            for who, start in contenders.items():
                with start(args.bundle, name) as (url, process):
                    until_answers(url, request)
                    for c in CONCURRENCY:
                        found.setdefault((c, who), []).append(load(url, process, script, c, args.seconds))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}, "
          f"{args.repeats} repeats of {args.seconds} s, load average {os.getloadavg()[1]:.1f}\n")
    print("| at a time | | requests/s | p50 ms | p99 ms | CPU ms a request |\n|---|---|---|---|---|---|")
    print(f"| 1 | ONNX Runtime alone, no server | {figures(alone)} |")
    for (c, who), rows in sorted(found.items(), key=lambda item: item[0][0]):
        print(f"| {c} | {who} | {figures(rows)} |")


if __name__ == "__main__":
    main()
