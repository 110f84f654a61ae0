"""Answers for a whole table: `mlkit predict` against ONNX Runtime alone.

    nice python bench/predict.py [--rows 300000] [--repeats 5] [--large 2000000]

Two models of one table (6 numbers, a whole number, 2 categories, an id): a network, and 300 boosted trees. ONNX Runtime
alone gets the same rows, read and packed before the clock starts, through the same fused graph, in the same batches, and
its answers are dropped. mlkit reads the CSV or the Parquet file, judges every value by the contract, keeps finished parts
aside, and writes the answers. In each repeat all run once, in turn, in one process. The answers must be those of ONNX
Runtime, to the last bit. At the end, each in a process of its own: the peak memory for `--rows` and for `--large` rows.
"""
import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import polars as pl

TOWNS, PLANS = ("Rome", "Oslo", "Bonn", "Lima", "Kyiv"), tuple(f"plan {i}" for i in range(40))


# What is answered

def write_table(folder: Path, n: int):
    "The same rows as CSV and as Parquet, in chunks."
    for a in range(0, n, 100_000):
        m, r = min(100_000, n - a), np.random.default_rng(a)
        numbers = {f"x{i}": r.normal(10 * i, 3, m).round(3) for i in range(6)}
        words = {"town": r.choice(TOWNS, m), "plan": r.choice(PLANS, m)}
        frame = pl.DataFrame({"id": np.arange(a, a + m)} | numbers | {"calls": r.poisson(3, m)} | words)
        with open(folder / f"{n}.csv", "ab" if a else "wb") as f:
            frame.write_csv(f, include_header=not a)
    pl.scan_csv(folder / f"{n}.csv").sink_parquet(folder / f"{n}.parquet")


def booster(d: int, rounds: int = 300) -> bytes: # As UBJSON
    "Trees of six levels on `d` features."
    import xgboost
    r = np.random.default_rng(0)
    x = r.normal(0, 1, (20_000, d))
    y = (x[:, 0] + x[:, 1] * x[:, 2] + r.normal(0, 1, len(x)) > 0).astype(int)
    values = {"max_depth": 6, "eta": 0.05, "objective": "binary:logistic", "seed": 0}
    return bytes(xgboost.train(values, xgboost.DMatrix(x, y), rounds).save_raw("ubj"))


def write_bundle_of(kind: str, folder: Path) -> Path:
    "A bundle that was never trained, but for its trees."
    from mlkit.candidates.trees import Trees
    from mlkit.data.contract import Contract, Feature, save_contract
    from mlkit.registry.bundle import write_bundle
    from mlkit.inputs.columns import Category, Number
    from mlkit.inputs.rows import Rows
    from mlkit.export.chain import export_onnx
    from mlkit.targets.classes import Classes
    from mlkit.task import Task
    from mlkit.training.model import make_model
    numbers = [Number(f"x{i}", "float64", fill=10.0 * i, mean=10.0 * i, std=3.0) for i in range(6)]
    words = [Category("town", "category", values=TOWNS), Category("plan", "category", values=PLANS)]
    rows = Rows((*numbers, Number("calls", "int64", fill=3.0, mean=3.0, std=2.0), *words), ("id", "left"))
    task = Task(rows.in_forms("plain") if kind == "trees" else rows, Classes("left", ("no", "yes")))
    d = task.input.tensors()[1][2][0]
    network = {"name": "residual_mlp", "width": 64, "n_blocks": 2}
    net = Trees(2, booster(d)).eval() if kind == "trees" else make_model(network, task)
    export_onnx(net, task, folder / "onnx", 20)
    ranged = tuple(Feature(name=f"x{i}", dtype="float64", range=(-1e3, 1e3)) for i in range(6))
    named = tuple(Feature(name=c.name, dtype="category", categories=c.values) for c in words)
    target = Feature(name="left", dtype="category", categories=("no", "yes"))
    inputs = (*ranged, Feature(name="calls", dtype="int64", range=(0, 1e3)), *named)
    save_contract(Contract(task="classification", inputs=inputs, target=target), folder / "contract.json")
    write_bundle(folder / "bundle", {n: folder / n for n in ("onnx", "contract.json")}, {})
    return folder / "bundle"


# The contenders

def packed(model, source: Path) -> list:
    "The rows as the graph takes them, in the batches of `mlkit predict`."
    from mlkit.serving.batch import TABLE_BATCH
    from mlkit.export.signature import read_arrays
    names = [t.name for t in model.signature.inputs]
    frame = pl.read_csv(source, columns=names, infer_schema=False).select(names)
    X, _ = read_arrays(model.signature, frame)
    return [model.signature.pack([x[i:i + TABLE_BATCH] for x in X]) for i in range(0, len(frame), TABLE_BATCH)]


def timed(do) -> tuple[float, float, object]: # Seconds, seconds of CPU, what came out
    wall, cpu = time.perf_counter(), time.process_time()
    out = do()
    return time.perf_counter() - wall, time.process_time() - cpu, out


def measure(kind: str, folder: Path, n: int, repeats: int) -> dict[str, list[tuple[float, float]]]:
    "Seconds and CPU seconds of each contender, one for each repeat; the first round warms up."
    from mlkit.serving.batch import Model, predict, sample_frames
    bundle = write_bundle_of(kind, folder / kind)
    model = Model(bundle)
    batches = packed(model, folder / f"{n}.csv")
    def mlkit(ending):
        return predict(f"{n}.{ending}", bundle, folder, f"{kind}-{ending}.parquet", force=True, here=folder)
    contenders = {"ONNX Runtime alone": lambda: [model.chain.ask(b) for b in batches],
                  "mlkit predict, CSV": lambda: mlkit("csv"), "mlkit predict, Parquet": lambda: mlkit("parquet"),
                  "of it reading, CSV": lambda: sum(map(len, sample_frames(f"{n}.csv", folder, "rows")))}
    times = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, do in contenders.items():
            wall, cpu, out = timed(do)
            if repeat:
                times[name].append((wall, cpu))
            if name.startswith("ONNX"):
                expected = np.concatenate([p for p, _ in out])
    for ending in ("csv", "parquet"):
        got = pl.read_parquet(folder / f"{kind}-{ending}.parquet").select("probability_no", "probability_yes")
        assert (got.to_numpy() == expected).all(), f"{kind}, {ending}: the answers differ"
    return times


def report(kind: str, n: int, times: dict):
    "A table as Markdown."
    print(f"\n### {kind}, {n:,} rows\n\n| | rows/s | of ONNX Runtime alone | median s | min | max | CPU s |\n|---|---|---|---|---|---|---|")
    base = statistics.median(w for w, _ in times["ONNX Runtime alone"])
    for name, found in times.items():
        walls, cpus = zip(*found)
        m = statistics.median(walls)
        spread = f"{m:.2f} | {min(walls):.2f} | {max(walls):.2f} | {statistics.median(cpus):.2f}"
        print(f"| {name} | {n / m:,.0f} | {base / m:.2f} | {spread} |")


def peak_memory(folder: Path, kind: str, n: int) -> float: # MB
    "Of a process that answers `n` rows."
    code = ("import sys, resource; from pathlib import Path; from mlkit.serving.batch import predict; f = Path(sys.argv[1]); "
            "predict(sys.argv[3] + '.csv', f / sys.argv[2] / 'bundle', f, 'memory.parquet', force=True, here=f); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)")
    done = subprocess.run([sys.executable, "-c", code, folder, kind, str(n)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 300_000), ("repeats", 5), ("large", 2_000_000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    packages = ", ".join(f"{p} {version(p)}" for p in ("onnxruntime", "polars", "pyarrow"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}; load {os.getloadavg()[0]:.1f}; {args.repeats} repeats in turn")
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        (folder / "params.yaml").write_text("ingest: {source: x}\n")
        write_table(folder, args.rows)
        for kind in ("network", "trees"):
            report(kind, args.rows, measure(kind, folder, args.rows, args.repeats))
        write_table(folder, args.large)
        sizes = {n: peak_memory(folder, "network", n) for n in (args.rows, args.large)}
        print(f"\nPeak memory: {', '.join(f'{mb:,.0f} MB for {n:,} rows' for n, mb in sizes.items())}")


if __name__ == "__main__":
    main()
